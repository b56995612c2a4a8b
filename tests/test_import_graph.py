"""Who may import whom. Only files are read, nothing is imported.

A room is a file in the package's root, or a folder there. An import within a function counts as any other; one under
`if TYPE_CHECKING:` does not.
"""

import ast
import json
from collections.abc import Iterable, Mapping
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[1]
PACKAGE, CLI = "diffusers_erasure", "diffusers_erasure_cli"
MOST_IN_THE_ROOT = 26

Graph = dict[str, set[str]]


@cache
def sources(package: str) -> dict[str, str]:
    """The text of each module by its path."""
    paths = (ROOT / package).rglob("*.py")
    return {path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8") for path in paths}


def module_name(path: str) -> str:
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def _is_for_type_checkers(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def _imports(node: ast.AST) -> Iterable[ast.Import | ast.ImportFrom]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import | ast.ImportFrom):
            yield child
        elif isinstance(child, ast.If) and _is_for_type_checkers(child):
            yield from (each for part in child.orelse for each in _imports(ast.Module([part], [])))
        else:
            yield from _imports(child)


def graph(files: Mapping[str, str]) -> Graph:
    """For each module those of the others that it imports, as a whole or a name of."""
    edges: Graph = {module_name(path): set() for path in files}
    for path, text in files.items():
        name = module_name(path)
        for node in _imports(ast.parse(text)):
            if isinstance(node, ast.Import):
                targets = [alias.name for alias in node.names]
            else:
                # Each level is a folder up, the first the file's own.
                up = path.split("/")[: -node.level] if node.level else []
                base = ".".join([*up, *([node.module] if node.module else [])])
                targets = [full if (full := f"{base}.{alias.name}") in edges else base for alias in node.names]
            edges[name].update(target for target in targets if target in edges and target != name)
    return edges


def room(module: str) -> str:
    return (module.split(".") + [""])[1]


def rooms(edges: Graph) -> Graph:
    """For each room the others that it imports from; the package's `__init__.py` is none."""
    found: Graph = {}
    for module, targets in edges.items():
        if room(module):
            there = {room(target) for target in targets} - {"", room(module)}
            found.setdefault(room(module), set()).update(there)
    return found


def circle(edges: Graph) -> list[str]:
    """One that there is, its first member again at the end; empty where there is none."""
    try:
        TopologicalSorter(edges).prepare()
    except CycleError as error:
        return list(reversed(error.args[1]))
    return []


def told(edges: Graph, of: str, to: set[str]) -> list[str]:
    """The imports of a room from others, for a message."""
    return sorted(
        f"{module} imports {target}"
        for module, targets in edges.items()
        if room(module) == of
        for target in targets
        if room(target) in to
    )


@cache
def library() -> Graph:
    edges = graph(sources(PACKAGE))
    assert len(edges) > 50 and sum(map(len, edges.values())) > 200, "the modules are not found"
    return edges


@pytest.mark.parametrize("package", [PACKAGE, CLI])
def test_no_modules_import_each_other_in_a_circle(package: str) -> None:
    assert not circle(graph(sources(package)))


def test_no_rooms_import_each_other_in_a_circle() -> None:
    found = circle(rooms(library()))
    steps = [line for a, b in zip(found, found[1:], strict=False) for line in told(library(), a, {b})]
    assert not found, f"{' → '.join(found)}:\n" + "\n".join(steps)


def test_nobody_inside_imports_from_the_package_itself() -> None:
    assert not [module for module, targets in library().items() if PACKAGE in targets]


def test_the_root_is_small() -> None:
    files = [path.name for path in (ROOT / PACKAGE).glob("*.py")]
    assert "__init__.py" in files and len(files) <= MOST_IN_THE_ROOT


@pytest.mark.parametrize(
    ("of", "to"),
    [("layers", {"methods", "live", "training"}), ("methods", {"live"}), ("training", {"methods", "live"})],
)
def test_rooms_that_do_not_know_each_other(of: str, to: set[str]) -> None:
    assert {of, *to} <= set(rooms(library()))
    assert not told(library(), of, to)


def test_the_embedded_model_needs_next_to_nothing() -> None:
    assert rooms(library())["demo"] <= {"errors", "logging", "pictures", "schema"}


def test_methods_that_do_not_train_import_nothing_of_training() -> None:
    """Neither themselves nor by way of what `methods/` shares."""
    methods = json.loads((ROOT / PACKAGE / "methods" / "catalogue.json").read_text(encoding="utf-8"))
    still = {name for name, told in methods.items() if not told["trains"]}
    assert {"uce", "rece", "speed"} <= still
    seen: set[str] = set()
    ahead = {f"{PACKAGE}.methods.{name}" for name in still}
    while ahead:
        seen |= ahead
        ahead = {each for module in ahead for each in library()[module] if room(each) == "methods"} - seen
    assert not [line for line in told(library(), "methods", {"training"}) if line.partition(" ")[0] in seen]


def test_the_library_does_not_know_its_command_line() -> None:
    """But for two doors to it: its former place, and `accelerate launch -m diffusers_erasure.training`."""
    both = graph(sources(PACKAGE) | sources(CLI))
    found = {name for name in library() if any(target.split(".")[0] == CLI for target in both[name])}
    assert found == {f"{PACKAGE}.cli", f"{PACKAGE}.training.__main__"}


# -------------------------------------------------------------------------------------- the search itself

SMALL = {
    "p/__init__.py": "from .a import x\nfrom .room import y",
    "p/a.py": "import os\n\ndef f():\n    from .room.inner import g\n    from . import b",
    "p/b.py": "import p.a\nfrom p.c import z",
    "p/c.py": "if TYPE_CHECKING:\n    from .a import x\nelse:\n    from . import d",
    "p/d.py": "from . import w",
    "p/room/__init__.py": "from .inner import g\nfrom .. import a",
    "p/room/inner.py": "from ..c import z\nfrom . import other",
    "p/room/other.py": "",
    "p/lone/__init__.py": "from ..b import x",
}


def test_the_search_for_imports() -> None:
    assert graph(SMALL) == {
        "p": {"p.a", "p.room"},
        "p.a": {"p.room.inner", "p.b"},
        "p.b": {"p.a", "p.c"},
        "p.c": {"p.d"},
        "p.d": {"p"},
        "p.room": {"p.room.inner", "p.a"},
        "p.room.inner": {"p.c", "p.room.other"},
        "p.room.other": set(),
        "p.lone": {"p.b"},
    }
    assert rooms(graph(SMALL)) == {
        "a": {"room", "b"},
        "b": {"a", "c"},
        "c": {"d"},
        "d": set(),
        "room": {"a", "c"},
        "lone": {"b"},
    }
    assert told(graph(SMALL), "room", {"c"}) == ["p.room.inner imports p.c"]


def test_the_search_for_circles() -> None:
    assert circle({"a": {"b"}, "b": {"c"}, "c": set()}) == []
    assert set(circle({"a": {"b"}, "b": {"c"}, "c": {"b"}})) == {"b", "c"}
    found = circle({"a": {"b"}, "b": {"c"}, "c": {"a"}})
    assert len(found) == 4 and found[0] == found[-1] and " ".join(found) in "a b c a b c"
    assert circle(graph(SMALL)) and circle(rooms(graph(SMALL)))
    without = SMALL | {"p/b.py": "", "p/c.py": "", "p/d.py": ""}
    assert circle(rooms(graph(without))) == ["a", "room", "a"] and not circle(graph(without))
