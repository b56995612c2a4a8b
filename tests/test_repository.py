"""Rules of the repository that a reader of a diff would miss. Only files are read, nothing is imported."""

import ast
import re
import subprocess
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import pytest


ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "diffusers_erasure"
PACKAGES = (PACKAGE, ROOT / "diffusers_erasure_cli")
LONGEST = 500

# Put together from pieces, so that this file does not contain what it looks for.
FORBIDDEN_TEXT = {
    "a package registry's host name": [
        "pypi" + ".org",
        "files.python" + "hosted.org",
        "registry.npm" + "js.org",
        "registry.yarn" + "pkg.com",
        "deb.deb" + "ian.org",
        "download.py" + "torch.org",
        "crates" + ".io",
        "anaconda" + ".org",
        "proxy.go" + "lang.org",
        "--extra-" + "index-url",
        "--index" + "-url",
    ],
    "a path of one machine": ["../" + "shared", "/work" + "/", "/opt" + "/dev", "/opt" + "/wheels", "/opt" + "/pypi"],
}
LIBRARIES = {"accelerate", "diffusers", "huggingface_hub", "peft", "transformers"}
PICKLES = {"cloudpickle", "dill", "joblib", "marshal", "pickle", "shelve"}


@cache
def repository_files() -> tuple[Path, ...]:
    """What is tracked, and what would be with `git add .`; in an unpacked sdist every file."""
    try:
        listed = subprocess.run(
            ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
            cwd=ROOT,
            capture_output=True,
            check=True,
            text=True,
        ).stdout.split("\0")
        paths = [ROOT / name for name in listed if name]
    except (OSError, subprocess.CalledProcessError):
        paths = [path for path in ROOT.rglob("*") if not {".venv", "build", "__pycache__"} & set(path.parts)]
    return tuple(sorted(path for path in paths if path.is_file()))


def text_of(path: Path) -> str | None:
    data = path.read_bytes()
    if b"\0" in data[:8192]:
        return None
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        return None


def python_files(folder: Path) -> list[Path]:
    return [path for path in repository_files() if path.suffix == ".py" and path.is_relative_to(folder)]


def place(path: Path, line: int) -> str:
    return f"{path.relative_to(ROOT)}:{line}"


def dotted(node: ast.expr) -> list[str]:
    """`a.b.c` as ["a", "b", "c"]; anything else as []."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return [node.id, *reversed(names)] if isinstance(node, ast.Name) else []


def is_private(name: str) -> bool:
    return name.startswith("_") and not (name.startswith("__") and name.endswith("__"))


def private_names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            paths = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            paths = [[*node.module.split("."), alias.name] for alias in node.names]
        elif isinstance(node, ast.Attribute):
            paths = [dotted(node)]
        else:
            continue
        for path in paths:
            if path and path[0] in LIBRARIES and any(is_private(part) for part in path[1:]):
                yield node.lineno, ".".join(path)


def own_members(trees: Iterable[ast.AST]) -> set[str]:
    """The private names that classes of these modules define: in their bodies, or on `self` and `cls`."""
    names: set[str] = set()
    for tree in trees:
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                for part in node.body:
                    if isinstance(part, ast.FunctionDef | ast.AsyncFunctionDef):
                        names.add(part.name)
                    targets = [part.target] if isinstance(part, ast.AnnAssign) else getattr(part, "targets", [])
                    names.update(target.id for target in targets if isinstance(target, ast.Name))
            elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
                if isinstance(node.value, ast.Name) and node.value.id in ("self", "cls"):
                    names.add(node.attr)
    return {name for name in names if is_private(name)}


def private_attributes(tree: ast.AST, members: set[str]) -> Iterator[tuple[int, str]]:
    """Private attributes, also by `getattr` and the like, that no class has of those which define `members`.

    Those of a module of the library itself, and marks that carry the library's name, are its own.
    """
    relative = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level]
    modules = {alias.asname or alias.name for node in relative for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            owner, name = node.value, node.attr
        elif isinstance(node, ast.Call) and dotted(node.func)[-1:] in (
            ["getattr"],
            ["hasattr"],
            ["setattr"],
            ["delattr"],
        ):
            if len(node.args) < 2 or not isinstance(node.args[1], ast.Constant):
                continue
            owner, name = node.args[0], str(node.args[1].value)
        else:
            continue
        of_module = isinstance(owner, ast.Name) and owner.id in modules
        if is_private(name) and name not in members and not of_module and not name.startswith(f"_{PACKAGE.name}"):
            yield node.lineno, ast.unparse(node)


WEIGHTS_ONLY = "torch.load(..., weights_only=True)"
# Converters read local files that methods' authors publish; `load_erasure` never calls them.
CONVERTERS = {(PACKAGE / "formats/weight_files.py", WEIGHTS_ONLY)}


def unsafe_loads(tree: ast.AST) -> Iterator[tuple[int, str]]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] in PICKLES:
                    yield node.lineno, f"import {alias.name}"
        elif isinstance(node, ast.ImportFrom) and not node.level:
            module = (node.module or "").split(".")
            if module[0] in PICKLES or (module[0] == "torch" and any(alias.name == "load" for alias in node.names)):
                yield node.lineno, f"from {node.module} import ..."
        elif isinstance(node, ast.Call):
            name = dotted(node.func)
            if name == ["torch", "load"]:
                literal = {k.arg: k.value.value for k in node.keywords if isinstance(k.value, ast.Constant)}
                yield node.lineno, WEIGHTS_ONLY if literal.get("weights_only") is True else "torch.load(...)"
            for keyword in node.keywords:
                literal_false = isinstance(keyword.value, ast.Constant) and not keyword.value.value
                if keyword.arg in ("allow_pickle", "trust_remote_code") and not literal_false:
                    yield node.lineno, f"{keyword.arg}=True"


@pytest.mark.parametrize("what", FORBIDDEN_TEXT)
def test_no_file_names(what: str) -> None:
    pattern = re.compile("|".join(map(re.escape, FORBIDDEN_TEXT[what])), re.IGNORECASE)
    found = [
        f"{place(path, number)}: {match.group()}"
        for path in repository_files()
        if (text := text_of(path)) is not None and pattern.search(text)
        for number, line in enumerate(text.splitlines(), 1)
        for match in pattern.finditer(line)
    ]
    assert not found, f"{what} in:\n" + "\n".join(found)


def test_private_names_of_other_libraries_are_imported_in_compat_only() -> None:
    found = [
        f"{place(path, line)}: {name}"
        for path in python_files(ROOT)
        if path != PACKAGE / "compat.py"
        for line, name in private_names(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert not found, "move to diffusers_erasure/compat.py:\n" + "\n".join(found)


def test_private_attributes_of_other_libraries_are_in_compat_only() -> None:
    trees = {
        path: ast.parse(path.read_text(encoding="utf-8"))
        for folder in (*PACKAGES, ROOT / "tools")
        for path in python_files(folder)
        if path != PACKAGE / "compat.py"
    }
    members = own_members(trees.values())
    assert trees and members
    found = [
        f"{place(path, line)}: {what}"
        for path, tree in trees.items()
        for line, what in private_attributes(tree, members)
    ]
    assert not found, "move to diffusers_erasure/compat.py:\n" + "\n".join(found)


def test_no_module_is_longer_than_a_sitting() -> None:
    lengths = {
        place(path, 1): len(path.read_text(encoding="utf-8").splitlines())
        for package in PACKAGES
        for path in python_files(package)
    }
    assert lengths, "no module found"
    too_long = {path: length for path, length in lengths.items() if length > LONGEST}
    assert not too_long, f"more than {LONGEST} lines: {too_long}"


def test_nothing_that_runs_code_from_a_file_is_loaded() -> None:
    found = [
        f"{place(path, line)}: {what}"
        for package in PACKAGES
        for path in python_files(package)
        for line, what in unsafe_loads(ast.parse(path.read_text(encoding="utf-8")))
        if (path, what) not in CONVERTERS
    ]
    assert not found, "safetensors and JSON only:\n" + "\n".join(found)


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("from diffusers.loaders import _x", "diffusers.loaders._x"),
        ("from peft.tuners._y import z", "peft.tuners._y.z"),
        ("import transformers._z", "transformers._z"),
        ("import diffusers\ndiffusers.loaders._x(1)", "diffusers.loaders._x"),
        ("from diffusers import __version__, loaders\nimport torch._dynamo\nself._x", None),
    ],
)
def test_the_search_for_private_names(code: str, expected: str | None) -> None:
    assert [name for _, name in private_names(ast.parse(code))] == ([expected] if expected else [])


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("module._modules.get(x)", "module._modules"),
        ("pipe.unet.attn._attention_backend = None", "pipe.unet.attn._attention_backend"),
        ("find(x)._parameters", "find(x)._parameters"),
        ("self._modules", "self._modules"),
        ("getattr(pipe, '_lora_loadable_modules', ())", "getattr(pipe, '_lora_loadable_modules', ())"),
        ("builtins.hasattr(config, '_name_or_path')", "builtins.hasattr(config, '_name_or_path')"),
        ("class A:\n    def __init__(self):\n        self._mine = 1\na._mine", None),
        ("class A:\n    _mine: int\n    _other = 1\n    def _third(self): ...\na._mine, A._other, a._third()", None),
        ("def _function(): ...\na._function", "a._function"),
        ("from . import hooks\nhooks._run(x)", None),
        ("import hooks\nhooks._run(x)", "hooks._run"),
        ("method._diffusers_erasure = True\nx.__dict__, x.y, getattr(x, name), getattr(x, 'y')", None),
    ],
)
def test_the_search_for_private_attributes(code: str, expected: str | None) -> None:
    tree = ast.parse(code)
    assert [what for _, what in private_attributes(tree, own_members([tree]))] == ([expected] if expected else [])


@pytest.mark.parametrize(
    ("code", "caught"),
    [
        ("torch.load(path)", True),
        ("torch.load(path, weights_only=True)", True),
        ("from torch import load", True),
        ("import pickle", True),
        ("from joblib import load", True),
        ("Model.from_pretrained(x, trust_remote_code=True)", True),
        ("np.load(x, allow_pickle=flag)", True),
        ("np.load(x, allow_pickle=False)", False),
        ("'never torch.load(x) nor trust_remote_code=True'", False),
    ],
)
def test_the_search_for_unsafe_loads(code: str, caught: bool) -> None:
    assert bool(list(unsafe_loads(ast.parse(code)))) is caught


def test_the_threat_model_names_tests_that_there_are() -> None:
    page = (ROOT / "docs" / "threat-model.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`(test_\w+\.py)`", page))
    assert len(named) > 10 and not [name for name in named if not (ROOT / "tests" / name).is_file()]
