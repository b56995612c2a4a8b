"""The commands `push`, `pull` and `card`."""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from diffusers_erasure import Erasure, cli
from tests.helpers import random_erasure, tiny_sd_pipe
from tests.mini_hub import Hub
from tests.test_hub import environment


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("erasure") / "no-zebra"
    random_erasure(tiny_sd_pipe()).save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with Hub() as server:
        yield server


def in_child(hub: Hub, home: Path, *lines: list[str]) -> list[dict[str, Any]]:
    """Run command lines in one fresh process whose Hub is the test's."""
    import subprocess
    import sys

    code = """
import json, sys
from typer.testing import CliRunner
from diffusers_erasure import cli
def one(arguments):
    done = CliRunner().invoke(cli.app, arguments, env={"COLUMNS": "200"})
    error = None if done.exception is None or isinstance(done.exception, SystemExit) else done.exception
    return {"code": done.exit_code, "out": done.stdout, "error": error and type(error).__name__, "text": str(error)}
print(json.dumps([one(arguments) for arguments in json.loads(sys.argv[1])]))
"""
    command = [sys.executable, "-c", code, json.dumps(lines)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(hub.url, home), timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_push_pull_card(hub: Hub, folder: Path, tmp_path: Path) -> None:
    token = ["--token", "hf_alice"]
    pushed, proposed, shown, pulled, redacted, refused, missing = in_child(
        hub,
        tmp_path / "home",
        ["push", str(folder), "alice/no-zebra", "--private", "-m", "Take the zebra out", "--json", *token],
        ["push", str(folder), "alice/no-zebra", "--create-pr", "--half", *token],
        ["info", "alice/no-zebra", "--json", *token],
        ["pull", "alice/no-zebra", "-o", str(tmp_path / "back"), "--json", *token],
        ["push", str(folder), "alice/secret", "--redact", "--revision", "quiet", *token],
        ["pull", "alice/no-zebra", "-o", str(tmp_path / "not"), "--token", "hf_bob"],
        ["pull", "alice/nothing", "-o", str(tmp_path / "not"), *token],
    )
    for answer in (pushed, proposed, shown, pulled, redacted):
        assert answer["code"] == 0, answer
    commit, message = hub.commits("alice/no-zebra")[0]
    assert json.loads(pushed["out"])["commit"] == commit and message == "Take the zebra out"
    assert json.loads(pushed["out"])["pull_request"] is None
    assert proposed["out"].strip().endswith("/alice/no-zebra/discussions/1")
    assert json.loads(shown["out"])["concepts"] == [{"anchor": "horse", "target": "zebra"}]
    assert json.loads(pulled["out"])["commit"] == commit
    for name in ("erasure_config.json", "pytorch_lora_weights.safetensors"):
        assert (tmp_path / "back" / name).read_bytes() == (folder / name).read_bytes()
    half = hub.files("alice/no-zebra", "refs/pr/1")["pytorch_lora_weights.safetensors"]
    assert len(half) < 0.7 * os.path.getsize(folder / "pytorch_lora_weights.safetensors")
    assert not any(b"zebra" in data for data in hub.files("alice/secret", "quiet").values())
    for answer in (refused, missing):
        assert answer["error"] == "ErasureNotFoundError" and "hf auth login" in answer["text"]
    assert not (tmp_path / "not").exists()


def test_card_and_usage(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def invoke(*arguments: str) -> Any:
        return CliRunner().invoke(cli.app, list(arguments), env={"COLUMNS": "160"})

    plain = invoke("card", str(folder))
    assert plain.exit_code == 0 and plain.stdout == (folder / "README.md").read_text(encoding="utf-8")
    named = invoke("card", str(folder), "--repo-id", "user/no-zebra").stdout
    assert 'pipe.load_erasure("user/no-zebra")' in named and "| zebra | horse |" in named
    assert "zebra" not in invoke("card", str(folder), "--redact").stdout.replace(str(folder), "")
    assert invoke("push").exit_code == 2 and invoke("pull", "a/b").exit_code == 2
    monkeypatch.chdir(folder.parent)
    here = invoke("pull", folder.name, "-o", str(tmp_path / "x"))
    assert here.exit_code == 2 and "is a folder here" in here.output
    assert Erasure.from_pretrained(folder).concepts[0].target == "zebra"
