"""The commands `push`, `pull` and `card`."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from diffusers_erasure import Erasure, ErasureInputError, demo, erase
from diffusers_erasure.hub.beside import Beside
from tests.commands import invoke
from tests.helpers import random_erasure, tiny_sd_pipe
from tests.mini_hub import Hub, environment


@pytest.fixture
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("erasure") / "no-zebra"
    random_erasure(tiny_sd_pipe()).save_pretrained(path)
    return path


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
    token, base = ["--token", "hf_alice"], ["--base-model", "user/zoo"]
    pushed, proposed, shown, pulled, redacted, refused, missing = in_child(
        hub,
        tmp_path / "home",
        ["push", str(folder), "alice/no-zebra", "--private", "-m", "Take the zebra out", "--json", *base, *token],
        ["push", str(folder), "alice/no-zebra", "--create-pr", "--half", *base, *token],
        ["info", "alice/no-zebra", "--json", *token],
        ["pull", "alice/no-zebra", "-o", str(tmp_path / "back"), "--json", *token],
        ["push", str(folder), "alice/secret", "--redact", "--revision", "quiet", *base, *token],
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
    files = hub.files("alice/no-zebra")
    for name in ("README.md", "erasure_config.json", "pytorch_lora_weights.safetensors"):
        assert (tmp_path / "back" / name).read_bytes() == files[name]
    assert set(json.loads(pulled["out"])["files"]) == {*files}
    name = "pytorch_lora_weights.safetensors"
    assert files[name] == (folder / name).read_bytes()
    assert json.loads(files["erasure_config.json"])["base_model"]["repo"] == "user/zoo"
    assert 'DiffusionPipeline.from_pretrained("user/zoo")' in files["README.md"].decode()
    half = hub.files("alice/no-zebra", "refs/pr/1")["pytorch_lora_weights.safetensors"]
    assert len(half) < 0.7 * os.path.getsize(folder / "pytorch_lora_weights.safetensors")
    secret = hub.files("alice/secret", "quiet")
    assert set(secret) == set(files) and not any(b"zebra" in data for data in secret.values())
    for answer in (refused, missing):
        assert answer["error"] == "ErasureNotFoundError" and "hf auth login" in answer["text"]
    assert not (tmp_path / "not").exists()


@pytest.mark.slow
def test_what_was_edited_is_pulled_shown_and_pushed(hub: Hub, folder: Path, tmp_path: Path) -> None:
    token, repo = ["--token", "hf_alice"], "alice/edited"
    mine, home = tmp_path / "mine", tmp_path / "home"
    Erasure.from_pretrained(folder).with_base_model("user/zoo").save_pretrained(mine)
    (nameless, pushed) = in_child(
        hub, home, ["push", str(folder), repo, *token], ["push", str(mine), repo, "--license", "mit", *token]
    )
    assert nameless["error"] == "ErasureInputError" and "--base-model" in nameless["text"]
    assert pushed["code"] == 0, pushed
    files = hub.files(repo)
    card = files["README.md"].decode().replace("## Limits", "Their words.\n\n## Limits")
    hub.set(repo, files={**files, "README.md": card.encode(), "notes.txt": b"x"})
    readme = mine / "README.md"
    readme.write_text(readme.read_text().replace("## Limits", "My words.\n\n## Limits"))
    before = {path.name: path.read_bytes() for path in mine.iterdir()}
    refused, untouched, shown, here, fresh, hubs, again, local = in_child(
        hub,
        home,
        ["push", str(mine), repo, *token],
        ["pull", repo, "-o", str(mine), *token],
        ["card", repo, *token],
        ["card", str(mine)],
        ["pull", repo, "-o", str(tmp_path / "fresh"), *token],
        ["push", str(mine), repo, "--card", "hub", *token],
        ["pull", repo, "-o", str(tmp_path / "fresh"), *token],
        ["push", str(mine), repo, "--card", "local", *token],
    )
    for answer in (refused, untouched):
        assert answer["error"] == "ErasureInputError" and "--card" in answer["text"]
        assert repo in answer["text"] and str(mine) in answer["text"]
    for answer in (shown, here, fresh, hubs, again, local):
        assert answer["code"] == 0, answer
    kept = {path.name: path.read_bytes() for path in mine.iterdir()}
    assert {name: kept[name] for name in before if not name.startswith(".")} == {
        name: data for name, data in before.items() if not name.startswith(".")
    }
    assert shown["out"] == card and "license: " in card and "Their words." in card
    assert "My words." in here["out"] and f'load_erasure("{repo}")' not in here["out"]
    assert (tmp_path / "fresh" / "README.md").read_text() == card
    now = hub.files(repo)
    assert "My words." in now["README.md"].decode() and now["notes.txt"] == b"x"
    assert "license: mit" in now["README.md"].decode().replace('"', "")


def test_erase_names_the_base_model(tmp_path: Path) -> None:
    erase = ["erase", "cat", "--anchor", "animal", "--set", "rank=1", "-o", str(tmp_path / "no-cat")]
    with pytest.raises(ErasureInputError, match="model"):
        invoke(*erase, "--base-model", "model")
    assert not (tmp_path / "no-cat").exists()
    invoke(*erase)
    assert "demo.load_pipeline()" in invoke("card", str(tmp_path / "no-cat")).stdout
    invoke(*erase, "--base-model", "user/model", "--overwrite")
    assert Erasure.from_pretrained(tmp_path / "no-cat").config.base_model.repo == "user/model"
    assert 'from_pretrained("user/model")' in invoke("card", str(tmp_path / "no-cat")).stdout


def test_a_pull_reads_the_card_once(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the Hub's card says cannot be lost by a Hub that fails between two readings."""
    erasure, asked = Erasure.from_pretrained(folder), []

    class Origin:
        def beside(self, strict: bool = False) -> Beside:
            asked.append(strict)
            if len(asked) > 1:
                return Beside()
            card = (folder / "README.md").read_text(encoding="utf-8").replace("## Limits", "Their words.\n\n## Limits")
            return Beside(card, where="user/a", place="user/a@main")

    erasure.origin = Origin()
    monkeypatch.setattr("diffusers_erasure_cli.options.Source.read", lambda *_, **__: erasure)
    invoke("pull", "user/a", "-o", str(tmp_path / "pulled"))
    assert asked == [True] and "Their words." in (tmp_path / "pulled" / "README.md").read_text(encoding="utf-8")


def test_card_and_usage(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert invoke("card", str(folder)).stdout == (folder / "README.md").read_text(encoding="utf-8")
    named = invoke("card", str(folder), "--repo-id", "user/no-zebra").stdout
    assert 'pipe.load_erasure("user/no-zebra")' in named and "| zebra | horse |" in named
    assert "zebra" not in invoke("card", str(folder), "--redact").stdout.replace(str(folder), "")
    invoke("push", code=2)
    invoke("pull", "a/b", code=2)
    monkeypatch.chdir(folder.parent)
    assert "is a folder here" in invoke("pull", folder.name, "-o", str(tmp_path / "x"), code=2).output
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "pytorch_lora_weights.safetensors").write_bytes(b"mine")
    monkeypatch.chdir(tmp_path)  # so that the message has no long path to be broken at
    taken = invoke("pull", "user/no-zebra", "-o", "mine", code=2).output
    assert "holds a file pytorch_lora_weights.safetensors that is no erasure's" in taken
    assert Path("mine/pytorch_lora_weights.safetensors").read_bytes() == b"mine"
    assert Erasure.from_pretrained(folder).concepts[0].target == "zebra"


def test_a_revision_can_be_named_with_every_erasure(hub: Hub, folder: Path, tmp_path: Path) -> None:
    """`user/x@REVISION`, wherever a command takes an erasure: the branch v1 holds another than main."""
    first, second = tmp_path / "first", tmp_path / "second"
    model, token = ["--base-model", "user/model"], ["--token", "hf_alice"]
    pipe = demo.load_pipeline()
    for place, target in ((first, "cat"), (second, "dog")):
        erase(pipe, target, anchors="animal", rank=1).save_pretrained(place)
    named, at = "alice/two", "alice/two@v1"
    answers = in_child(
        hub,
        tmp_path / "home",
        ["push", str(second), named, *model, *token],
        ["push", str(first), named, "--revision", "v1", *model, *token],
        ["info", at, "--json", *token],
        ["info", named, "--json", *token],
        ["card", at, *token],
        ["pull", at, "-o", str(tmp_path / "pulled"), *token],
        ["push", at, "alice/copy", *token],
        ["combine", at, f"{named}@main", "--mode", "sum", "-o", str(tmp_path / "sum"), *token],
        ["erase", "--config", at, "-o", str(tmp_path / "again"), *token],
        ["generate", "a cat", "-e", f"{at}=0.5", "--steps", "1", "-o", str(tmp_path / "drawn"), "--json", *token],
        ["export", str(tmp_path / "lora.safetensors"), "--format", "kohya", "-e", at, *token],
        ["info", "alice/two@v9", *token],
    )
    *good, missing = answers
    assert [answer["code"] for answer in good] == [0] * len(good), good
    assert missing["error"] == "ErasureNotFoundError" and "'v9'" in missing["text"]
    shown = [json.loads(answer["out"])["concepts"][0]["target"] for answer in good[2:4]]
    assert shown == ["cat", "dog"] and "| cat | animal |" in good[4]["out"]
    for place in (tmp_path / "pulled", tmp_path / "again"):
        assert Erasure.from_pretrained(place).content_hash == Erasure.from_pretrained(first).content_hash
    assert "cat" in hub.files("alice/copy", "main")["erasure_config.json"].decode()
    assert [concept.target for concept in Erasure.from_pretrained(tmp_path / "sum").concepts] == ["cat", "dog"]
    (drawn,) = json.loads(good[9]["out"])["erasures"]
    assert (drawn["source"], drawn["strength"], len(drawn["revision"])) == (named, 0.5, 40)
