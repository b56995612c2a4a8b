"""Methods from outside: `register_method`, and the entry points of installed packages, whole, broken and in the way."""

import importlib
import json
import logging
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffusers_erasure import (
    Erasure,
    ErasureCompatibilityError,
    ErasureInputError,
    MethodDeclaration,
    demo,
    erase,
    register_method,
    registry,
)
from diffusers_erasure.encoding import last_rows
from diffusers_erasure.methods import get_method
from diffusers_erasure.methods.catalogue import describe
from diffusers_erasure.schema import TENSOR_FILE
from diffusers_erasure_cli import completion
from tests.commands import invoke
from tests.helpers import far, images


ROOT = Path(__file__).resolve().parents[1]
PLUGIN = ROOT / "tests" / "plugin"
PAGE = ROOT / "docs" / "write_a_method.md"


@pytest.fixture
def fresh() -> Iterator[None]:
    """What is registered and installed, as it is seen by a new process; afterwards too."""

    def forget() -> None:
        registry._registered.clear()
        registry._loaded.clear()
        registry._offered.cache_clear()
        completion.offered.cache_clear()

    forget()
    yield
    forget()


@pytest.fixture
def plugin(fresh: None, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The example's module, imported and not installed."""
    monkeypatch.syspath_prepend(PLUGIN)
    yield importlib.import_module("erasure_projection")
    sys.modules.pop("erasure_projection")


# ---------------------------------------------------------------------------------------------------- the page


@pytest.mark.parametrize("name", ["erasure_projection.py", "pyproject.toml"])
def test_the_page_shows_the_package_that_is_tested(name: str) -> None:
    blocks = re.findall(r"^```(?:python|toml)\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    assert (PLUGIN / name).read_text(encoding="utf-8") in blocks


# ------------------------------------------------------------------------------------------- an installed package


def run(python: Path, *arguments: str, cwd: Path) -> str:
    done = subprocess.run(
        [str(python), *arguments], cwd=cwd, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False
    )
    assert done.returncode == 0, f"{arguments}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an environment that borrows what is installed in this one, and has the example on top."""
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder / "venv", with_pip=False)
    site = Path(sysconfig.get_path("purelib", vars={"base": str(folder / "venv")}))
    borrowed = Path(sysconfig.get_path("purelib"))
    (site / "0.pth").write_text(f"{borrowed}\n", encoding="utf-8")  # read first: the others import from there
    for path in borrowed.glob("*.pth"):
        shutil.copy(path, site)
    python = folder / "venv" / "bin" / "python"
    source = shutil.copytree(PLUGIN, folder / "plugin", ignore=shutil.ignore_patterns("__pycache__"))
    how = ("--no-deps", "--no-build-isolation", "--no-index", "--quiet", "--disable-pip-version-check")
    run(Path(sys.executable), "-m", "pip", "--python", str(python), "install", *how, str(source), cwd=folder)
    return python


def test_an_installed_package_erases_and_its_artefact_needs_it_not(installed: Path, tmp_path: Path) -> None:
    command = ("-m", "diffusers_erasure_cli.app")
    look = (
        "import sys; sys.argv[1:] = ['methods']; from diffusers_erasure_cli.app import app; app(standalone_mode=False)"
    )
    listed = run(
        installed, "-c", f"{look}; print(sorted({{'torch', 'erasure_projection'}} & set(sys.modules)))", cwd=tmp_path
    )
    assert re.search(r"^projection +Projection: .* \(package erasure-projection\)$", listed, re.MULTILINE)
    assert listed.endswith("[]\n"), "neither the library nor the package is imported to list names"
    arguments = ("erase", "cat", "--anchor", "animal", "--method", "projection", "--set", "amount=0.5", "-o", "no-cat")
    run(installed, *command, *arguments, cwd=tmp_path)

    assert "projection" not in registry.method_names() and "erasure_projection" not in sys.modules
    erasure = Erasure.from_pretrained(tmp_path / "no-cat")
    assert (erasure.config.method.name, erasure.config.method.settings) == ("projection", {"amount": 0.5})
    pipe = demo.load_pipeline()
    rows = last_rows(pipe, ["cat", "animal"])
    way = (rows[0] - rows[1]) / (rows[0] - rows[1]).norm()
    maps = erasure.layer_tensors(erasure.config.layers[0])
    moved = rows + (rows @ maps["A"].double().T) @ maps["D"].double()
    assert torch.allclose(moved @ way, 0.5 * (rows @ way), atol=1e-5)  # half of it is gone
    before = images(pipe, prompt="a cat")
    pipe.load_erasure(erasure)
    assert far(images(pipe, prompt="a cat"), before) > 1e-2
    pipe.unload_erasure()
    assert np.array_equal(images(pipe, prompt="a cat"), before)


# --------------------------------------------------------------------------------------------------- registered


def test_a_registered_method_is_one_like_the_others(plugin: Any) -> None:
    with pytest.raises(ErasureInputError, match="There is no method 'projection'"):
        erase(demo.load_pipeline(), "cat", method="projection")
    register_method(plugin.METHOD)
    register_method(plugin.METHOD)  # a cell that is run again
    pipe = demo.load_pipeline()
    erasure = erase(pipe, ["cat", "dog"], anchors="animal", method="projection")
    assert erasure.tensors[TENSOR_FILE]["text_map.A"].shape[0] == 2
    assert {layer.kind for layer in erasure.config.layers} == set(plugin.METHOD.makes)
    with pytest.raises(ErasureInputError, match="takes no retained prompts.*no more than one direction"):
        erase(pipe, "cat", retain=["dog"], method="projection")
    with pytest.raises(ErasureInputError, match="`amount` must be a finite number above 0"):
        erase(pipe, "cat", method="projection", amount=0)
    told = describe(get_method("projection"))
    assert told["settings"]["amount"]["meaning"].startswith("how much of each direction")
    assert (told["needs"], told["makes"], told["presets"]) == ("text encoders", ["text_map"], [])
    assert f"projection, {plugin.METHOD.summary.partition(':')[0]}" in erasure.to_files()["README.md"].decode()


def declared(**changes: Any) -> MethodDeclaration:
    values = {"name": "mine", "module": "no.such.module", "summary": "A method.", "families": ("flux",)}
    return MethodDeclaration(**{**values, "needs": "base weights", "makes": ("lora",), **changes})


def test_what_cannot_be_declared_or_registered(fresh: None) -> None:
    for changes, message in (
        ({"name": "no name"}, "made of letters"),
        ({"families": ()}, "declares no families"),
        ({"families": ("sd",)}, r"\['sd'\], which are unknown"),
        ({"needs": "nothing"}, "needs 'nothing'"),
    ):
        with pytest.raises(ErasureInputError, match=message):
            declared(**changes)
    with pytest.raises(ErasureInputError, match="There is a method 'uce' already"):
        register_method(declared(name="uce"))
    register_method(declared())
    with pytest.raises(ErasureInputError, match="There is a method 'mine' already"):
        register_method(declared(summary="Another one."))
    with pytest.raises(ErasureInputError, match=r"'no\.such\.module' does not give a function `fit`.*No module"):
        erase(object(), "cat", method="mine")


def test_a_family_that_is_not_declared_is_refused_before_anything_is_encoded(
    plugin: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    register_method(declared(name="other", module="erasure_projection"))
    pipe = demo.load_pipeline()
    monkeypatch.setattr(pipe, "text_encoder", None)
    with pytest.raises(ErasureCompatibilityError, match="'other' works on flux, but .* family stable-diffusion"):
        erase(pipe, "cat", method="other")


# ------------------------------------------------------------------------------------------------ broken packages


def install(folder: Path, package: str, points: str, **modules: str) -> None:
    """What pip leaves behind of a package."""
    about = folder / f"{package}-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\nSummary: A package.\n")
    (about / "entry_points.txt").write_text(f"[{registry.GROUP}]\n{points}\n")
    for name, code in modules.items():
        (folder / f"{name}.py").write_text(code)


def test_broken_packages_are_named_and_do_not_break_the_others(
    plugin: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    install(tmp_path, "good", "projection = erasure_projection:METHOD")
    install(tmp_path, "raising", "raising = raises:METHOD", raises="raise RuntimeError('out of order')")
    install(tmp_path, "wrong", "wrong = is_wrong:METHOD", is_wrong="METHOD = 1")
    install(tmp_path, "thief", "uce = raises:METHOD\nprojection = raises:METHOD")
    monkeypatch.syspath_prepend(tmp_path)
    caplog.set_level(logging.WARNING)

    assert registry.method_names()["raising"] == "A package. (package raising)"
    assert "raises" not in sys.modules
    told = caplog.text
    assert "package 'thief' offers a method 'uce', which is the name of one of this library" in told
    assert "package 'thief' offers a method 'projection', which is the name of one of good" in told

    found = registry.declarations()
    assert found["projection"] is plugin.METHOD and {"uce", "speed"} < found.keys()
    assert not {"raising", "wrong"} & found.keys()
    assert re.search("'raising' of the package 'raising' cannot be used .RuntimeError: out of order", caplog.text)
    assert re.search("'wrong' of the package 'wrong' cannot be used .TypeError: is_wrong:METHOD is not a", caplog.text)
    with pytest.raises(ErasureInputError, match="of the package 'raising' cannot be used"):
        erase(object(), "cat", method="raising")
    with pytest.raises(ErasureInputError, match="The package 'good' offers a method 'projection' already"):
        register_method(plugin.METHOD)

    assert "raising" in invoke("methods").stdout
    every = json.loads(invoke("methods", "--json").stdout)
    assert "projection" in every and "uce" in every and not {"raising", "wrong"} & every.keys()
    assert "For stable-diffusion" in invoke("methods", "projection").stdout
    assert [name for name, _ in completion.methods("pro")] == ["projection"]


CODE = """
from dataclasses import dataclass
from typing import Literal
from diffusers_erasure import MethodDeclaration

METHOD = MethodDeclaration(
    name={name!r}, module={module!r}, summary="x", families=("stable-diffusion",), needs="text encoders", makes=("text_map",)
)
"""
BROKEN = {
    "quits": "raise SystemExit(3)",
    "divides": "1 / 0",
    "bare": "class Config: ...\ndef fit(*_): ...",
    "unannotated": "from dataclasses import dataclass\n@dataclass\nclass Config:\n    n: int = 1\ndef fit(*_): ...",
    "gives": "from dataclasses import dataclass\n@dataclass\nclass Config: ...\ndef fit(*_): return 1",
    "settings": (  # a name of its own use, and a preset that nothing fills
        "from dataclasses import dataclass\nfrom typing import Literal\n@dataclass\nclass Config:\n"
        "    preset: Literal['a', 'b'] = 'a'\nclass Settings: ...\ndef fit(*_): return 1"
    ),
}


def test_broken_modules_are_told_and_left_out(fresh: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, body in BROKEN.items():
        module = f"method_{name}"
        code = CODE.format(name=name, module=module)
        install(tmp_path, f"package_{name}", f"{name} = says_{name}:METHOD", **{f"says_{name}": code, module: body})
    monkeypatch.syspath_prepend(tmp_path)
    done = invoke("methods", "--json")
    every = json.loads(done.stdout)
    assert "uce" in every and {"gives", "settings"} <= every.keys()
    assert not {"quits", "divides", "bare", "unannotated"} & every.keys()
    assert "'divides' cannot be used" in done.stderr
    assert list(every)[-2:] == ["gives", "settings"]  # in the order of their names
    pipe = demo.load_pipeline()
    for name in ("quits", "divides", "bare", "unannotated"):
        with pytest.raises(ErasureInputError, match=f"The method '{name}' cannot be used"):
            erase(pipe, "cat", method=name)
    for name in ("gives", "settings"):
        with pytest.raises(ErasureInputError, match="should give an Erasure"):
            erase(pipe, "cat", method=name)
