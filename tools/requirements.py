"""Print what setup.cfg requires, for pip: `python tools/requirements.py latest` or `oldest`.

latest: the names alone, so that pip takes the newest of everything, whatever ranges say.
oldest: the floors, `name==floor`.

torch is left out: its build is chosen in the Makefile. Needs nothing but Python.
"""

import configparser
import re
import sys
from pathlib import Path


SETUP = Path(__file__).resolve().parents[1] / "setup.cfg"
EXTRA = ("pytest", "pytest-timeout")  # what tests/test_smoke.py runs on


def requirements(which: str) -> list[str]:
    """The lines for pip."""
    parser = configparser.ConfigParser(interpolation=None)
    parser.read(SETUP, encoding="utf-8")
    found = {}
    for line in parser["options"]["install_requires"].split("\n"):
        if line.strip():
            name, rules = re.fullmatch(r"([\w.-]+)(.*)", line.strip()).groups()  # type: ignore[union-attr]
            floor = re.search(r">=([^,]+)", rules)
            if floor is None:
                raise SystemExit(f"setup.cfg states no floor for {name}")
            found[name] = floor[1]
    del found["torch"]
    plain = [name if which == "latest" else f"{name}=={floor}" for name, floor in found.items()]
    return [*plain, *EXTRA]


if __name__ == "__main__":
    if sys.argv[1:] not in (["latest"], ["oldest"]):
        raise SystemExit(__doc__)
    print("\n".join(requirements(sys.argv[1])))
