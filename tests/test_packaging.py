"""The wheel, the sdist and the editable install, each made from a copy of the repository and each looked into.

Nothing is fetched: the build runs in this environment (`--no-isolation`), the installs take no dependencies.
"""

import ast
import configparser
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import venv
import zipfile
from collections.abc import Iterator
from email.parser import Parser
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "diffusers_erasure"
PACKAGES = (PACKAGE, "diffusers_erasure_cli")
ASSETS = ROOT / PACKAGE / "demo" / "assets"
NOT_COPIED = {".git", ".venv", "build", "dist", "site", "shared", "__pycache__"} | {
    f".{tool}_cache" for tool in ("mypy", "pytest", "ruff")
}

# Run outside the repository with the installed package. Prints where the package and its data were found.
LOOK = """
import json
from importlib.metadata import version
from importlib.resources import files

import diffusers_erasure

cards = files("diffusers_erasure.hub_cards")
model = files("diffusers_erasure.demo") / "assets" / "model" / "model_index.json"
print(json.dumps({
    "package": diffusers_erasure.__file__,
    "version": diffusers_erasure.__version__,
    "metadata": version("diffusers-erasure"),
    "cards": {entry.name: [str(entry), len(entry.read_bytes())] for entry in cards.iterdir() if entry.is_file()},
    "model": [str(model), json.loads(model.read_text(encoding="utf-8"))["_class_name"]],
}))
"""


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env={**kept, "PIP_NO_INPUT": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,  # the assertion shows the output
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def build(*what: str, source: Path, into: Path) -> None:
    run(sys.executable, "-m", "build", "--no-isolation", *what, "--outdir", into, source, cwd=into.parent)


def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None)
    parser.read(ROOT / "setup.cfg", encoding="utf-8")
    return parser


def copy_of_repository(folder: Path) -> Path:
    """What a user has after cloning: neither an old build/ nor an egg-info reaches the new build."""

    def left_out(_: str, names: list[str]) -> set[str]:
        return {name for name in names if name in NOT_COPIED or name.endswith((".egg-info", ".pyc"))}

    shutil.copytree(ROOT, folder, ignore=left_out)
    return folder


def wheel_names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if not name.endswith("/")}


def expected_files() -> set[str]:
    """Every module and every data file, as the wheel should name it."""
    modules = {path.relative_to(ROOT).as_posix() for name in PACKAGES for path in (ROOT / name).rglob("*.py")}
    assets = {path.relative_to(ROOT).as_posix() for path in ASSETS.rglob("*") if path.is_file()}
    cards = {f"{PACKAGE}/hub_cards/{path.name}" for path in (ROOT / "hub_cards").iterdir() if path.is_file()}
    lists = {path.relative_to(ROOT).as_posix() for path in (ROOT / PACKAGE / "lists").glob("*.txt")}
    data = {f"{PACKAGE}/py.typed", f"{PACKAGE}/methods/catalogue.json"}
    return {name for name in modules | assets | cards | lists if "__pycache__" not in name} | data


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The wheel, made straight from the sources, and the sdist."""
    folder = tmp_path_factory.mktemp("built")
    source = copy_of_repository(folder / "source")
    build("--sdist", "--wheel", source=source, into=folder / "dist")
    (wheel,) = (folder / "dist").glob("*.whl")
    (sdist,) = (folder / "dist").glob("*.tar.gz")
    return wheel, sdist


def check_look(output: str, below: Path) -> None:
    found = json.loads(output.splitlines()[-1])
    assert Path(found["package"]).is_relative_to(below)
    assert found["version"] == found["metadata"]
    cards = found["cards"]
    templates = {path.name: path for path in (ROOT / "hub_cards").glob("*.md*")}
    assert templates.keys() <= cards.keys()
    for name, path in templates.items():
        # an editable install of this very checkout must not stand in for a file that the install lacks
        assert Path(cards[name][0]).is_relative_to(below)
        assert cards[name][1] == path.stat().st_size
    assert Path(found["model"][0]).is_relative_to(below)
    assert found["model"][1].endswith("Pipeline")


def test_wheel_contents(built: tuple[Path, Path]) -> None:
    wheel, _ = built
    names = wheel_names(wheel)
    assert f"{PACKAGE}/demo/assets/model/model_index.json" in names
    metadata_folders = {name.split("/")[0] for name in names if ".dist-info/" in name}
    (metadata_folder,) = metadata_folders
    shipped = {name for name in names if not name.startswith(metadata_folder)}
    assert shipped == expected_files()
    demo = {name.removeprefix(f"{PACKAGE}/demo/") for name in shipped if name.startswith(f"{PACKAGE}/demo/")}
    modules = {name for name in demo if name.endswith(".py")}
    assert modules == {"__init__.py", "dataset.py", "drawing.py", "judge.py", "words.py", "worlds.py"}, (
        "what trains the model is in tools/"
    )
    assert f"{metadata_folder}/licenses/LICENSE" in names
    assert f"{metadata_folder}/licenses/NOTICE" in names  # the attribution that CC-BY asks for


def test_wheel_metadata(built: tuple[Path, Path]) -> None:
    wheel, _ = built
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in wheel_names(wheel) if ".dist-info/" in name}
        texts = {name.rsplit("/", 1)[1]: archive.read(name).decode() for name in names}
    metadata = Parser().parsestr(texts["METADATA"])
    assert metadata["Name"] == "diffusers-erasure"
    assert metadata["Version"] == re.search(r'"(.+)"', (ROOT / PACKAGE / "_version.py").read_text())[1]
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    assert set(metadata.get_all("Provides-Extra")) == {"test", "quality", "docs", "dev"}
    assert "# " in metadata.get_payload()  # README.md
    assert "diffusers-erasure = diffusers_erasure_cli.app:main" in texts["entry_points.txt"]


def test_sdist_makes_the_same_wheel(built: tuple[Path, Path], tmp_path: Path) -> None:
    wheel, sdist = built
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
        archive.extractall(tmp_path, filter="data")
    needed = {
        "CHANGELOG.md",
        "constraints.txt",
        "LICENSE",
        "Makefile",
        "README.md",
        "docs/index.md",
        "mkdocs.yml",
        "tests/conftest.py",
        "tools/demo_model/rebuild.py",
    }
    assert needed <= names
    assert (ROOT / "tools/demo_worlds/models/flux").is_dir() or not (ROOT / ".git").exists()
    assert not [name for name in names if name.startswith("tools/demo_worlds/models")], "42 MB stay in the repository"
    assert sdist.stat().st_size < 40e6
    (source,) = (path for path in tmp_path.iterdir() if path.is_dir())
    build("--wheel", source=source, into=tmp_path / "again")
    (again,) = (tmp_path / "again").glob("*.whl")
    assert again.name == wheel.name
    with zipfile.ZipFile(wheel) as one, zipfile.ZipFile(again) as other:
        assert {entry.filename: entry.CRC for entry in one.infolist()} == {
            entry.filename: entry.CRC for entry in other.infolist()
        }


def test_wheel_installed(built: tuple[Path, Path], tmp_path: Path) -> None:
    wheel, _ = built
    site = tmp_path / "site"
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", site, wheel, cwd=tmp_path)
    check_look(run(sys.executable, "-c", LOOK, cwd=tmp_path, PYTHONPATH=str(site)), site)
    assert (site / "bin" / "diffusers-erasure").is_file()


@pytest.mark.slow
def test_editable_install(tmp_path: Path) -> None:
    """PEP 660, in a virtual environment of its own, which borrows this one's dependencies."""
    source = copy_of_repository(tmp_path / "source")
    environment = tmp_path / "venv"
    venv.create(environment, with_pip=False, symlinks=os.name != "nt")
    bin_folder = environment / ("Scripts" if os.name == "nt" else "bin")
    python = bin_folder / "python"
    site = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path).strip())
    # A folder named in a .pth file is searched, but its own .pth files are not read: this checkout's own editable
    # install does not come along.
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n", encoding="utf-8")
    pip = (sys.executable, "-m", "pip", "--python", python)
    run(*pip, "install", "--no-deps", "--no-index", "--no-build-isolation", "--editable", source, cwd=tmp_path)
    assert list(site.glob("__editable__*diffusers_erasure*"))
    assert not (site / PACKAGE).exists()

    check_look(run(python, "-c", LOOK, cwd=tmp_path), source)
    (source / "hub_cards" / "new.md.j2").write_text("new", encoding="utf-8")
    read = "from importlib.resources import files; print((files('diffusers_erasure.hub_cards') / 'new.md.j2').read_text())"
    assert run(python, "-c", read, cwd=tmp_path).endswith("new\n"), "an edit of the checkout is seen"
    assert "diffusers-erasure" in run(bin_folder / "diffusers-erasure", "--help", cwd=tmp_path, COLUMNS="120")


def test_every_package_is_listed() -> None:
    listed = set(setup_cfg()["options"]["packages"].split())
    there = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for name in PACKAGES
        for path in (ROOT / name).rglob("*.py")
        if not path.is_relative_to(ASSETS)
    }
    assert listed == there | {f"{PACKAGE}.hub_cards"}


def imported_names() -> Iterator[tuple[str, str]]:
    for path in (path for name in PACKAGES for path in (ROOT / name).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                for alias in node.names:
                    yield alias.name.split(".")[0], f"{path.relative_to(ROOT)}:{node.lineno}"
            elif isinstance(node, ast.ImportFrom) and not node.level:
                yield (node.module or "").split(".")[0], f"{path.relative_to(ROOT)}:{node.lineno}"


def test_every_import_is_a_declared_dependency() -> None:
    requirements = setup_cfg()["options"]["install_requires"].split("\n")
    declared = {re.split(r"[^A-Za-z0-9_.-]", line)[0].replace("-", "_").lower() for line in requirements if line}
    known = declared | set(PACKAGES) | sys.stdlib_module_names
    assert "pillow" in declared
    undeclared = {f"{where}: {name}" for name, where in imported_names() if name not in known | {"PIL"}}
    assert not undeclared, "not in setup.cfg's install_requires: " + ", ".join(sorted(undeclared))


def test_metadata_is_in_setup_cfg_only() -> None:
    assert "[project]" not in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert not (ROOT / "setup.py").exists()
    for line in setup_cfg()["options"]["install_requires"].split("\n"):
        assert "==" not in line, f"a range, not a pin: {line}"
