"""Push and pull with the real `huggingface_hub` against a Hub on loopback (`mini_hub.py`), in processes of their own."""

import json
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.mini_hub import Hub, environment


HERE = Path(__file__).parent
CARD, CONFIG, LORA, TENSORS = (
    "README.md",
    "erasure_config.json",
    "pytorch_lora_weights.safetensors",
    "erasure.safetensors",
)


def python(code: str, endpoint: str, home: Path, **more: str) -> Any:
    """Run code in a fresh process; returns what it prints last, as JSON."""
    command = [sys.executable, "-c", textwrap.dedent(code)]
    done = subprocess.run(
        command, capture_output=True, text=True, env=environment(endpoint, home, **more), timeout=200
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


class Client:
    """Runs code in children of one process that has imported the library; see `hub_worker.py`."""

    def __init__(self, hub: Hub, home: Path) -> None:
        self.hub, self.home, self.caches = hub, home, 0
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "hub_worker.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment(hub.url, home / "hf"),
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        self.input, self.output = self.process.stdin, self.process.stdout
        assert self.output.readline() == "ready\n"

    def cache(self) -> str:
        """The path of a fresh cache."""
        self.caches += 1
        return str(self.home / f"cache{self.caches}")

    def together(self, *codes: str, fast: bool = True, **args: Any) -> list[dict[str, Any]]:
        work = [{"code": textwrap.dedent(code), "args": args, "fast": fast} for code in codes]
        self.input.write(json.dumps({"work": work}) + "\n")
        self.input.flush()
        return json.loads(self.output.readline())

    def __call__(self, code: str, *, fast: bool = True, **args: Any) -> dict[str, Any]:
        return self.together(code, fast=fast, **args)[0]

    def push(self, repo: str, name: str = "lora", *, token: str = "hf_alice", **args: Any) -> dict[str, Any]:
        code = f"info = {name}.push_to_hub(repo, token=token, **args); result = [info.oid, info.pr_url]"
        return self(code, repo=repo, token=token, args=args)

    def pull(self, repo: str, cache: str | None = None, token: str | bool = "hf_alice", **args: Any) -> dict[str, Any]:
        code = """
            erasure = Erasure.from_pretrained(repo, token=token, cache_dir=cache, **args)
            result = [erasure.revision, erasure.content_hash, erasure.config.to_json()]
        """
        return self(code, repo=repo, token=token, cache=cache or self.cache(), args=args)


def ok(answer: dict[str, Any]) -> Any:
    assert answer["error"] is None, answer["error"]["traceback"]
    return answer["result"]


def failed(answer: dict[str, Any], kind: str, *texts: str) -> dict[str, Any]:
    assert answer["error"] is not None, answer["result"]
    error = answer["error"]
    assert kind == error["classes"][0], error["traceback"]
    for text in texts:
        assert text in error["message"], error["message"]
    return error


@pytest.fixture(scope="module")
def client(hub: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Client]:
    worker = Client(hub, tmp_path_factory.mktemp("client"))
    yield worker
    worker.input.close()
    worker.process.wait(60)


@pytest.fixture(scope="module")
def together() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor() as pool:
        yield pool


@pytest.fixture(autouse=True)
def no_faults(hub: Hub) -> Iterator[None]:
    hub.fault()
    hub.log()
    yield
    hub.fault()


# ------------------------------------------------------------------------------------------------ push and pull


DRAW = """
    import json, numpy, torch
    torch.set_num_threads(1)
    from diffusers import DiffusionPipeline
    {imports}
    pipe = DiffusionPipeline.from_pretrained({model!r}, torch_dtype=torch.float64)
    pipe.set_progress_bar_config(disable=True)
    def draw():
        generator = torch.Generator().manual_seed(3)
        call = dict(num_inference_steps=4, generator=generator, output_type="np", guidance_scale=3.0)
        return pipe("a cat in ink style", **call).images[0]
    base = draw()
    {load}
    numpy.save({image!r}, draw())
    assert abs(base - draw()).max() > 0.05
    print(json.dumps({result}))
"""


@pytest.mark.timeout(200)
def test_pushed_is_pulled_in_a_fresh_process_and_stock_diffusers_draws_the_same(
    hub: Hub, client: Client, tmp_path: Path, together: ThreadPoolExecutor
) -> None:
    import numpy as np

    oid, pull_request = ok(
        client(
            """
            pipe.load_erasure(lora, "cat")
            info = pipe.push_erasure_to_hub("alice/no-cat", token="hf_alice", commit_message="Take the cat out")
            result = [info.oid, info.pr_url]
            """
        )
    )
    (newest, message), _ = hub.commits("alice/no-cat")  # one commit on top of the initial one
    assert (newest, message, pull_request) == (oid, "Take the cat out", None)
    files = hub.files("alice/no-cat")
    assert set(files) == {CARD, CONFIG, LORA, TENSORS}
    assert ("PUT", "_lfs") in {(method, path.split("/")[1]) for method, path, _ in hub.log()}
    assert 'pipe.load_erasure("alice/no-cat")' in files[CARD].decode()

    model = str(HERE.parent / "diffusers_erasure" / "demo" / "assets" / "model")
    ours, stock = str(tmp_path / "ours.npy"), str(tmp_path / "stock.npy")
    pulled = together.submit(
        python,
        textwrap.dedent(DRAW).format(
            imports="from diffusers_erasure import Erasure",
            model=model,
            image=ours,
            load='info = pipe.load_erasure("alice/no-cat"); files = Erasure.from_pretrained("alice/no-cat").to_files()',
            result='[info.revision, dict(info.base_match), {k: v.hex() for k, v in files.items() if k != "README.md"}]',
        ),
        hub.url,
        tmp_path / "fresh",
    )
    loaded = python(
        textwrap.dedent(DRAW).format(
            imports="import sys",
            model=model,
            image=stock,
            load=f'pipe.load_lora_weights("alice/no-cat", weight_name="{LORA}")',
            result='"diffusers_erasure" in sys.modules',
        ),
        hub.url,
        tmp_path / "stock",
    )
    found = pulled.result()
    assert found[0] == oid and set(found[1].values()) == {"same"}
    assert {name: bytes.fromhex(data) for name, data in found[2].items()} == {
        name: data for name, data in files.items() if name != CARD
    }
    assert loaded is False
    # A map and its LoRA, of factors in float32; in float64 nothing else differs. The erasure moves it by > 0.05.
    assert np.abs(np.load(ours) - np.load(stock)).max() < 1e-4


def test_each_thing_is_done_once(client: Client) -> None:
    code = """
        from tests.helpers import counting

        pull = dict(token="hf_alice", cache_dir=cache)
        with counting() as pushing:
            lora.push_to_hub("alice/once", token="hf_alice")
        with counting() as pulling:
            Erasure.from_pretrained("alice/once", **pull)
        with counting() as loading:
            pipe.load_erasure("alice/once", **pull)
        result = [sum(map(len, lora.tensors.values())), pushing, pulling, loading]
    """
    tensors, pushing, pulling, loading = ok(client(textwrap.dedent(code), cache=client.cache()))
    once = {"configs parsed": 1, "files hashed": 2, "tensors checked": tensors}
    assert pushing == {**once, "cards rendered": 1}
    assert pulling == once
    assert loading == {**once, "contents hashed": 1}


def test_an_erasure_replaces_another_and_pushing_again_changes_nothing(hub: Hub, client: Client) -> None:
    repo = "alice/changes"
    first = ok(client.push(repo))[0]
    assert set(hub.files(repo)) == {CARD, CONFIG, LORA, TENSORS}
    assert ok(client.push(repo))[0] == first  # the same content: no commit
    ok(client.push(repo, "text_map"))
    files = hub.files(repo)
    assert set(files) == {CARD, CONFIG, TENSORS}
    card = files[CARD].decode()
    assert "- lora\n" not in card and "cannot read it" in card
    assert len(hub.commits(repo)) == 3
    assert ok(client.pull(repo))[0] == hub.commits(repo)[0][0]
    # the earlier commit is still there, whole
    assert set(json.loads(ok(client.pull(repo, revision=first))[2])["files"]) == {LORA, TENSORS}


def test_a_card_with_a_picture_and_a_licence(hub: Hub, client: Client) -> None:
    code = """
        from PIL import Image
        picture = Image.new("RGB", (8, 4), "red") if grid else None
        result = lora.push_to_hub("alice/shown", token="hf_alice", grid=picture, license=licence).oid
    """
    failed(client(code, grid=True, licence="my: own"), "ErasureInputError", "license")
    ok(client(code, grid=True, licence="apache-2.0"))
    files = hub.files("alice/shown")
    assert files["before_after.png"].startswith(b"\x89PNG")
    card = files[CARD].decode()
    assert "](before_after.png)" in card and "license: " in card and "apache-2.0" in card
    ok(client(code, grid=False, licence=None))  # another push, without a picture: the old one stays, and is shown
    now = hub.files("alice/shown")
    assert now == files


# An edit of the card in a folder: a licence, a line of text and a picture.
EDIT = """
    from pathlib import Path
    from PIL import Image
    folder = Path(folder)
    def edit(old, new):
        path = folder / "README.md"
        assert old in path.read_text()
        path.write_text(path.read_text().replace(old, new, 1))
    def push(**more):
        return Erasure.from_pretrained(folder).push_to_hub(repo, token="hf_alice", **more).oid
    def pull(**more):
        Erasure.from_pretrained(repo, token="hf_alice", cache_dir=cache).save_pretrained(folder, **more)
    def contents():
        return {path.name: path.read_bytes() for path in folder.iterdir()}
"""


def script(code: str) -> str:
    return textwrap.dedent(EDIT) + textwrap.dedent(code)


def edited(hub: Hub, repo: str, old: str, new: str, **files: bytes) -> None:
    """Edit the card on the Hub."""
    there = hub.files(repo)
    assert old in there[CARD].decode()
    hub.set(repo, files={**there, CARD: there[CARD].decode().replace(old, new, 1).encode(), **files})


def test_what_was_edited_in_the_folder_travels_to_the_hub(hub: Hub, client: Client, tmp_path: Path) -> None:
    repo, args = "alice/from-here", {"folder": str(tmp_path / "no-cat"), "cache": client.cache()}
    code = script("""
    lora.save_pretrained(folder)
    edit("pipeline_tag:", "license: mit\\npipeline_tag:")
    edit("## Limits", "My words, ![mine](./mine.png) and <img src='other.webp'>, ![no](../no.png).\\n\\n## Limits")
    Image.new("RGB", (8, 4), "red").save(folder / "mine.png")
    Image.new("RGB", (8, 4), "blue").save(folder / "other.webp")
    Image.new("RGB", (8, 4)).save(folder / "unlinked.png")
    Image.new("RGB", (8, 4)).save(folder / "before_after.png")
    (folder.parent / "no.png").write_bytes((folder / "mine.png").read_bytes())
    result = push()
    """)
    first = ok(client(code, repo=repo, **args))
    files = hub.files(repo)
    assert {CARD, CONFIG, LORA, TENSORS, "mine.png", "other.webp", "before_after.png"} == set(files)
    assert files["mine.png"] == (tmp_path / "no-cat" / "mine.png").read_bytes()
    card = files[CARD].decode()
    assert "My words" in card and "license: mit" in card
    again = script("result = push()")
    assert ok(client(again, repo=repo, **args)) == first  # nothing changed, no commit

    # edited again, and pushed again: the Hub's text is what this folder had pushed
    code = script('edit("My words", "Better words"); edit("license: mit", "license: apache-2.0"); push()')
    ok(client(code, repo=repo, **args))
    card = hub.files(repo)[CARD].decode()
    assert "Better words" in card and "My words" not in card and "license: apache-2.0" in card
    # into another repository, where nothing was edited, and from there into another folder
    ok(client(script('push(); repo = "alice/copy"; push()'), repo=repo, **args))
    assert "Better words" in hub.files("alice/copy")[CARD].decode()
    # a copy in half precision takes the card and the pictures along
    code = script("Erasure.from_pretrained(folder).save_pretrained(copy, dtype=torch.float16)")
    ok(client(code, repo=repo, copy=str(tmp_path / "half"), **args))
    assert "Better words" in (tmp_path / "half" / CARD).read_text()
    assert (tmp_path / "half" / "mine.png").read_bytes() == files["mine.png"]


def test_what_was_edited_on_the_hub_travels_here_and_back(hub: Hub, client: Client, tmp_path: Path) -> None:
    repo, folder = "alice/from-there", tmp_path / "pulled"
    args = {"repo": repo, "folder": str(folder), "cache": client.cache()}
    ok(client.push(repo))
    png = b"\x89PNG\r\n\x1a\n picture"
    edited(hub, repo, "pipeline_tag:", "license: mit\npipeline_tag:")
    edited(hub, repo, "## Limits", "Their words, ![a](a.png) ![b](b.png).\n\n## Limits")
    hub.set(repo, files={**hub.files(repo), "a.png": png, "b.png": b"no picture", "unlinked.png": png})
    answer = client(script("pull()"), **args)
    ok(answer)
    assert "b.png" in answer["log"]
    assert (folder / CARD).read_bytes() == hub.files(repo)[CARD]  # with the licence, to the byte
    assert (folder / "a.png").read_bytes() == png
    assert not (folder / "b.png").exists() and not (folder / "unlinked.png").exists()
    before = hub.commits(repo)
    ok(client(script("push()"), **args))
    assert hub.commits(repo) == before  # what was pulled is not published anew

    # edited here, not there: kept by a pull, published by a push
    ok(client(script('edit("Their words", "My words"); pull()'), **args))
    assert "My words" in (folder / CARD).read_text()
    ok(client(script("push()"), **args))
    assert "My words" in hub.files(repo)[CARD].decode() and "Their words" not in hub.files(repo)[CARD].decode()
    # edited there, not here: kept by a push, brought by a pull
    edited(hub, repo, "My words", "Newer words")
    edited(hub, repo, "license: mit", "license: openrail")
    ok(client(script("push()"), **args))
    assert "Newer words" in hub.files(repo)[CARD].decode()
    ok(client(script("pull()"), **args))
    assert "Newer words" in (folder / CARD).read_text() and "license: openrail" in (folder / CARD).read_text()
    assert hub.files(repo)["unlinked.png"] == png


def test_an_edit_on_the_hub_that_the_folder_never_had_is_not_lost(hub: Hub, client: Client, tmp_path: Path) -> None:
    """A push keeps it and does not bring it: what is edited here afterwards was not made on top of it."""
    repo, folder = "alice/unseen", tmp_path / "unseen"
    args = {"repo": repo, "folder": str(folder), "cache": client.cache()}
    first, theirs, mine = (b"\x89PNG\r\n\x1a\n" + word for word in (b"first", b"theirs", b"mine"))
    code = """
    lora.save_pretrained(folder)
    edit("pipeline_tag:", "license: mit\\nlanguage: en\\npipeline_tag:")
    (folder / "before_after.png").write_bytes(first.encode("latin-1"))
    push()
    """
    ok(client(script(code), first=first.decode("latin-1"), **args))
    edited(hub, repo, "## Limits", "Their words.\n\n## Limits", **{"before_after.png": theirs})
    edited(hub, repo, "license: mit", "license: openrail")
    for _ in range(2):
        ok(client(script("push()"), **args))
        assert "Their words." in hub.files(repo)[CARD].decode() and hub.files(repo)["before_after.png"] == theirs
    there = hub.files(repo)
    code = """
    edit("## Limits", "My words.\\n\\n## Limits")
    edit("license: mit", "license: apache-2.0")
    edit("language: en", "language: de")
    (folder / "before_after.png").write_bytes(mine.encode("latin-1"))
    """
    ok(client(script(code), mine=mine.decode("latin-1"), **args))
    answer = client(script("push()"), **args)
    error = failed(answer, "ErasureInputError", "the text", "`license`", "picture before_after.png")
    assert "`language`" not in error["message"]  # that was edited here alone
    assert hub.files(repo) == there
    ok(client(script("push(card='hub')"), **args))  # once it is decided, what was here is not asked about again
    ok(client(script("push()"), **args))
    now = hub.files(repo)
    assert "Their words." in now[CARD].decode() and now["before_after.png"] == theirs
    ok(client(script("push(card='local'); edit('My words.', 'More words.'); push()"), **args))
    assert "More words." in hub.files(repo)[CARD].decode() and hub.files(repo)["before_after.png"] == mine


def test_a_card_that_was_edited_on_both_sides(hub: Hub, client: Client, tmp_path: Path) -> None:
    repo, folder = "alice/both", tmp_path / "both"
    args = {"repo": repo, "folder": str(folder), "cache": client.cache()}
    png = b"\x89PNG\r\n\x1a\n"
    ok(client(script("lora.save_pretrained(folder); push()"), **args))
    edited(hub, repo, "## Limits", "Their words.\n\n## Limits", **{"before_after.png": png + b"theirs"})
    edited(hub, repo, "pipeline_tag:", "license: mit\npipeline_tag:")
    code = """
    edit("## Limits", "My words.\\n\\n## Limits")
    edit("pipeline_tag:", "license: openrail\\npipeline_tag:")
    (folder / "before_after.png").write_bytes(picture)
    """
    there, picture = hub.files(repo), (png + b"mine").decode("latin-1")
    ok(client(script('picture = picture.encode("latin-1")') + textwrap.dedent(code), picture=picture, **args))
    here = {path.name: path.read_bytes() for path in folder.iterdir()}
    for action in ("push()", "pull()"):
        answer = client(script(action), **args)
        failed(answer, "ErasureInputError", repo, str(folder), 'card="local"', 'card="hub"', "--card")
        failed(answer, "ErasureInputError", "the text", "`license`", "picture before_after.png")
        assert hub.files(repo) == there and {path.name: path.read_bytes() for path in folder.iterdir()} == here
    failed(client(script("push(card='mine')"), **args), "ErasureInputError", "`card`")

    ok(client(script("push(card='local')"), **args))
    now = hub.files(repo)
    assert "My words." in now[CARD].decode() and "license: openrail" in now[CARD].decode()
    assert now["before_after.png"] == png + b"mine"
    hub.set(repo, files=there)
    ok(client(script("pull(card='hub')"), **args))
    assert "Their words." in (folder / CARD).read_text() and "license: mit" in (folder / CARD).read_text()
    assert (folder / "before_after.png").read_bytes() == png + b"theirs"
    ok(client(script('edit("Their words.", "Both words."); push()'), **args))  # it is known now what the Hub had
    assert "Both words." in hub.files(repo)[CARD].decode()


def test_the_names_are_not_carried_by_the_card(hub: Hub, client: Client, tmp_path: Path) -> None:
    repo, folder = "alice/quiet", tmp_path / "quiet"
    args = {"repo": repo, "folder": str(folder), "cache": client.cache()}
    code = """
    lora.save_pretrained(folder)
    edit("## Limits", "No cats: ![cats](cats.png).\\n\\n## Limits")
    edit("pipeline_tag:", "license: mit\\ncats: many\\npipeline_tag:")
    Image.new("RGB", (8, 4)).save(folder / "cats.png")
    push(redact_concepts=True)
    """
    answer = client(script(code), **args)
    ok(answer)
    assert "edited by hand" in answer["log"] and "left out" in answer["log"]
    files = hub.files(repo)
    assert set(files) == {CARD, CONFIG, LORA, TENSORS}
    assert "license: mit" in files[CARD].decode() and not any(b"cat" in data[:3000] for data in files.values())
    here = {path.name: path.read_bytes() for path in folder.iterdir()}
    code = "Erasure.from_pretrained(folder).save_pretrained({}, redact_concepts=True)"
    failed(client(script(code.format("folder")), **args), "ErasureInputError", "edited by hand")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == here
    ok(client(script(code.format("folder.parent / 'other'")), **args))
    other = {path.name: path.read_bytes() for path in (tmp_path / "other").iterdir()}
    assert set(other) == {CARD, CONFIG, LORA, TENSORS} and b"cats" not in other[CARD]


def test_a_push_deletes_the_old_tensors_alone(hub: Hub, client: Client) -> None:
    repo = "alice/full"
    ok(client.push(repo))
    own = {"notes.txt": b"x", "before_after.png": b"y", "images/a.png": b"z", "model.safetensors": b"m"}
    hub.set(repo, files={**hub.files(repo), **own})
    ok(client.push(repo, "text_map"))
    files = hub.files(repo)
    assert set(files) == {CARD, CONFIG, TENSORS, *own} and own.items() <= files.items()
    unknown = json.dumps({**json.loads(files[CONFIG]), "schema": "9.0"}).encode()
    hub.set(repo, files={**files, CONFIG: unknown, LORA: b"of a newer version"})
    answer = client.push(repo, "text_map")
    ok(answer)
    assert LORA in hub.files(repo) and LORA in answer["log"]


def test_a_base_model_without_an_id(hub: Hub, client: Client) -> None:
    code = """
        import dataclasses
        from diffusers_erasure.schema import BaseModel
        base = BaseModel("stable-diffusion")
        nameless = Erasure(dataclasses.replace(lora.config, base_model=base), lora.tensors)
        erasure = nameless.with_base_model(named, "v1") if named else nameless
        erasure.push_to_hub("alice/named", token="hf_alice", **args)
    """
    hub.log()
    failed(client(code, named=None, args={}), "ErasureInputError", 'base_model="user/model"', "--base-model")
    for wrong in ("model", "a/b/c", "/a", "a b/c", "a/..", "a--b/c", 'a/"b'):
        failed(client(code, named=None, args={"base_model": wrong}), "ErasureInputError", '"user/model"')
    assert hub.log() == []  # told before the Hub is asked
    ok(client(code, named="user/one", args={}))
    card = hub.files("alice/named")[CARD].decode()
    assert json.loads(hub.files("alice/named")[CONFIG])["base_model"]["revision"] == "v1"
    assert "user/one" in card.split("---")[1] and 'from_pretrained("user/one")' in card
    ok(client(code, named="user/one", args={"base_model": "user/two"}))
    assert 'from_pretrained("user/two")' in hub.files("alice/named")[CARD].decode()


def test_a_visitor_can_follow_the_card(hub: Hub, client: Client) -> None:
    """The code of the cards, as it stands there: on the embedded model, and on one that lies on the Hub."""
    code = r"""
        import re
        import numpy
        from huggingface_hub import HfApi
        pipe.save_pretrained(folder)
        HfApi(token="hf_alice").create_repo("alice/base")
        HfApi(token="hf_alice").upload_folder(repo_id="alice/base", folder_path=folder)
        result = []
        for repo, base in (("alice/visited", None), ("alice/visited-too", "alice/base")):
            lora.push_to_hub(repo, token="hf_alice", base_model=base)
            card = Erasure.from_pretrained(repo).origin.beside().card
            images = []
            for block in re.findall(r"```python\n(.*?)```", card, re.DOTALL):
                block = re.sub(r"(pipe\(.*?)(, num_inference_steps=20.*)?\)\.", r"\1, num_inference_steps=2).", block)
                space = {}
                torch.manual_seed(0)
                exec(block, space)
                images.append(numpy.asarray(space["image"]).tolist())
            result.append([re.findall(r"```bash\n(.*?)\n```", card), images])
    """
    embedded, named = ok(client(code, folder=str(client.home / "base")))
    assert embedded[0] == ["pip install diffusers-erasure"]
    assert named[0] == ["pip install diffusers-erasure", "pip install diffusers peft"]
    for _, images in (embedded, named):
        ours, stock = images
        assert max(abs(a - b) for x, y in zip(ours, stock) for p, q in zip(x, y) for a, b in zip(p, q)) <= 2


def test_a_whole_erased_model(hub: Hub, client: Client) -> None:
    code = """
        pipe.load_erasure(lora, "cat")
        before = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
        oid = pipe.push_erased_model(repo, token="hf_alice").oid
        assert all(torch.equal(before[name], value) for name, value in pipe.unet.state_dict().items())
        from diffusers import DiffusionPipeline
        from diffusers_erasure import ErasureError
        fresh = DiffusionPipeline.from_pretrained(repo, token="hf_alice", cache_dir=cache)
        changed = [n for n, v in fresh.unet.state_dict().items() if not torch.equal(v, before[n])]
        try:
            fresh.load_erasure(lora, "cat")
            twice = None
        except ErasureError as error:
            twice = str(error)
        result = [oid, changed, twice]
    """
    oid, changed, twice = ok(client(code, repo="alice/no-cats-at-all", cache=client.cache()))
    (newest, _), _ = hub.commits("alice/no-cats-at-all")
    assert newest == oid
    files = hub.files("alice/no-cats-at-all")
    assert {"model_index.json", CONFIG, CARD, "unet/diffusion_pytorch_model.safetensors"} <= set(files)
    assert changed and all(".attn2.to_" in name for name in changed)
    assert twice is not None and "already" in twice
    ok(client.push("alice/an-erasure"))
    code = 'pipe.load_erasure(lora, "cat"); pipe.push_erased_model("alice/an-erasure", token="hf_alice")'
    failed(client(code), "ErasureInputError", "something else")

    # another push leaves what it did not write, and the card's own words; weights of the earlier one go
    parts = {"unet/diffusion_pytorch_model-00001-of-00002.safetensors": b"x", "unet/model.fp16.safetensors": b"mine"}
    own = {"notes.txt": b"x", "unet/mine.safetensors": b"y", "images/a.png": b"z"}
    hub.set("alice/no-cats-at-all", files={**files, **parts, **own})
    edited(hub, "alice/no-cats-at-all", "## Limits", "My words.\n\n## Limits")
    code = 'pipe.load_erasure(lora, "cat", strength=0.5); pipe.push_erased_model(repo, token="hf_alice")'
    ok(client(code, repo="alice/no-cats-at-all"))
    now = hub.files("alice/no-cats-at-all")
    assert set(now) == {*files, *own, "unet/model.fp16.safetensors"} and own.items() <= now.items()
    assert "My words." in now[CARD].decode() and now[CONFIG] != files[CONFIG]


def test_a_pull_fetches_the_schemas_files_of_one_commit(hub: Hub, client: Client) -> None:
    repo, cache = "alice/crowded", client.cache()
    ok(client.push(repo))
    hub.set(repo, files={**hub.files(repo), "evil.bin": b"pickle", "model.safetensors": b"huge", "notes.md": b"x"})
    head = hub.commits(repo)[0][0]
    hub.log()
    assert ok(client.pull(repo, cache))[0] == head
    paths = [path for _, path, _ in hub.log() if "/resolve/" in path]
    assert {path.rsplit("/", 1)[1] for path in paths} == {CONFIG, LORA, TENSORS}
    assert all(f"/resolve/{head}/" in path for path in paths)
    ok(client.pull(repo, cache))
    assert [path for _, path, _ in hub.log() if "/resolve/" in path] == []  # only the head was asked for
    ok(client.pull(repo, cache, revision=head))
    ok(client.pull(repo, cache, local_files_only=True))
    assert hub.log() == []
    ok(client.pull(repo, cache, force_download=True))
    assert sum(method == "GET" and "/resolve/" in path for method, path, _ in hub.log()) == 3


def test_branches_tags_pull_requests_and_subfolders(hub: Hub, client: Client) -> None:
    repo = "alice/versions"
    first = ok(client.push(repo))[0]
    second = ok(client.push(repo, "other", revision="v2"))[0]
    assert hub.commits(repo)[0][0] == first and hub.commits(repo, "v2")[0][0] == second
    third, pull_request = ok(client.push(repo, "text_map", token="hf_bob", create_pr=True))
    assert pull_request.endswith("/discussions/1") and hub.commits(repo)[0][0] == first
    ok(client("import huggingface_hub as h; h.HfApi(token='hf_alice').create_tag(repo, tag='one')", repo=repo))
    for revision, commit in (
        (None, first),
        ("main", first),
        ("one", first),
        ("v2", second),
        ("refs/pr/1", third),
        (second, second),
    ):
        assert ok(client.pull(repo, revision=revision))[0] == commit
    failed(client.pull(repo, revision="v3"), "ErasureNotFoundError", "no revision 'v3'")
    failed(client.pull(repo, revision="0" * 40), "ErasureNotFoundError", "no revision")

    hub.set("alice/two", files={f"sub/er/{name}": data for name, data in hub.files(repo).items()})
    assert ok(client.pull("alice/two", subfolder="sub/er"))[1] == ok(client.pull(repo))[1]
    failed(client.pull("alice/two"), "ErasureNotFoundError", "no erasure_config.json")
    for outside in ("../x", "a/../../x", "..", "/etc", "a\\..\\x"):
        failed(client.pull("alice/two", subfolder=outside), "ErasureInputError", "inside")


def test_rights(hub: Hub, client: Client) -> None:
    ok(client.push("alice/secret", private=True))
    ok(client.pull("alice/secret"))
    for token in (False, "hf_bob"):
        error = failed(client.pull("alice/secret", token=token), "ErasureNotFoundError", "hf auth login")
        assert error["cause"] == "RepositoryNotFoundError"
    failed(client.pull("alice/nothing"), "ErasureNotFoundError", "neither a local folder nor")
    wrong = failed(client.pull("alice/secret", token="hf_mallory"), "ErasureHubError", "token is not valid")
    assert wrong["cause"] == "HfHubHTTPError" and "OSError" in wrong["classes"]

    ok(client.push("alice/gated"))
    hub.set("alice/gated", gated=[])
    for token in (False, "hf_bob"):
        error = failed(client.pull("alice/gated", token=token), "ErasureHubError", "must be asked for")
        assert error["cause"] == "GatedRepoError"
    ok(client.pull("alice/gated"))
    hub.set("alice/gated", gated=["bob"])
    ok(client.pull("alice/gated", token="hf_bob"))

    failed(client.push("alice/gated", token="hf_bob"), "ErasureHubError", "create_pr=True", "403")
    failed(client.push("carol/new", token="hf_bob"), "ErasureHubError", "403")
    failed(client.push("alice/secret", token="hf_bob"), "ErasureHubError")
    failed(client.push("alice/new", token="hf_mallory"), "ErasureHubError", "401", "not valid")
    failed(client("lora.push_to_hub('alice/new', token=False)"), "ErasureHubError", "hf auth login")
    failed(client.push("alice/gated", private=True), "ErasureInputError", "is public")
    failed(client.push("a/b/c"), "ErasureInputError", "id of a repository")
    failed(client.push("alice/gated", create_pr=True, revision="v2"), "ErasureInputError", "pull request")
    failed(client.push("alice/gated", revision="0" * 40), "ErasureInputError", "branch")


def test_what_others_wrote_is_kept(hub: Hub, client: Client) -> None:
    repo = "alice/edited"
    ok(client.push(repo))
    card = hub.files(repo)[CARD].decode()
    mine = card.replace("pipeline_tag:", "license: mit\npipeline_tag:").replace("- lora\n", "- lora\n- mine\n")
    hub.set(repo, files={**hub.files(repo), CARD: mine.encode()})
    ok(client.push(repo, "other"))  # the metadata was edited, the text was not
    now = hub.files(repo)[CARD].decode()
    assert "license: mit" in now and "- mine" in now and "| pizza | food |" in now and "| cat |" not in now

    hub.set(repo, files={**hub.files(repo), CARD: now.replace("## Limits", "My words.\n\n## Limits").encode()})
    answer = client.push(repo, "text_map")
    ok(answer)
    now = hub.files(repo)[CARD].decode()
    assert "My words." in now and "| pizza | food |" in now and "license: mit" in now and "- lora" not in now
    assert "edited by hand" in answer["log"]

    hub.set("alice/started", files={CARD: b"---\nlicense: openrail\n---\n", "notes.txt": b"mine"})
    ok(client.push("alice/started", redact_concepts=True))
    now = hub.files("alice/started")[CARD].decode()
    assert "license: openrail" in now and "## Limits" in now and "cat" not in now.split("## Use")[0]
    assert hub.files("alice/started")["notes.txt"] == b"mine"

    hub.set("alice/style", files={LORA: b"somebody's LoRA"})
    failed(client.push("alice/style"), "ErasureInputError", "LoRA that is no erasure")
    assert hub.files("alice/style") == {LORA: b"somebody's LoRA"}
    hub.set("alice/broken", files={CARD: b"---\n- a: [\n---\ntext"})
    failed(client.push("alice/broken"), "ErasureInputError", "metadata cannot be read")


# -------------------------------------------------------------------------------------------------------- faults


def tensors_of(files: dict[str, bytes]) -> dict[str, bytes]:
    return {name: data for name, data in files.items() if name != CARD}


@pytest.mark.parametrize(
    ("fault", "every"),
    [
        ("cut_at", True),
        ("cut_reply_at", False),
        ("down_from", False),
        pytest.param("cut_reply_at", True, marks=pytest.mark.slow),
        pytest.param("down_from", True, marks=pytest.mark.slow),
    ],
)
def test_a_push_that_is_cut_at_any_request_shows_all_or_nothing(
    fault: str, every: bool, hub: Hub, client: Client
) -> None:
    whole = f"alice/whole-{fault.replace('_', '-')}-{every}"
    ok(client.push(whole))
    before = hub.files(whole)
    hub.set(whole, files=before)
    hub.log()
    ok(client.push(whole, "text_map"))
    log = hub.log()
    old, new, requests = tensors_of(before), tensors_of(hub.files(whole)), len(log)
    assert any(path.startswith("/_lfs/") for _, path, _ in log) and "/commit/" in log[-1][1]
    cut = 0
    for number in range(1 if every else requests, requests + 1):  # the last one is the commit
        repo = f"alice/{fault.replace('_', '-')}-{every}-{number}"
        hub.set(repo, files=before)
        hub.fault(**{fault: number})
        answer = client.push(repo, "text_map")
        hub.fault()
        seen = tensors_of(hub.files(repo))
        assert seen in (old, new), f"{fault} {number}: {sorted(seen)}"
        if answer["error"] is None:
            assert seen == new
        else:
            cut += 1
            failed(answer, "ErasureHubError", "ush again")
        ok(client.push(repo, "text_map"))
        assert tensors_of(hub.files(repo)) == new
        assert len(hub.commits(repo)) == 3  # what had arrived is not pushed twice
    print(f"{fault}: {requests} requests, {cut} pushes ended in an error")
    assert cut > 0


def test_two_pushes_that_race(hub: Hub, client: Client) -> None:
    repo = "alice/race"
    ok(client.push(repo, "text_map"))
    hub.fault(hold_commits=2)
    code = "result = {}.push_to_hub('alice/race', token='hf_alice').oid"
    answers = client.together(code.format("lora"), code.format("other"))
    hub.fault()
    won = [answer for answer in answers if answer["error"] is None]
    (lost,) = [answer for answer in answers if answer["error"] is not None]
    assert len(won) == 1
    assert failed(lost, "ErasureHubError", "Somebody else pushed meanwhile")["cause"] == "HfHubHTTPError"
    assert hub.commits(repo)[0][0] == won[0]["result"] and len(hub.commits(repo)) == 3
    removed = [concept["target"] for concept in json.loads(hub.files(repo)[CONFIG])["concepts"]]
    assert removed == (["cat"] if answers[0]["error"] is None else ["dog", "pizza"])
    ok(client.pull(repo))
    ok(client.push(repo, "other" if answers[0]["error"] is None else "lora"))


def test_a_download_that_is_cut_resumes_or_fails_clean(hub: Hub, client: Client) -> None:
    repo, cache = "alice/cut", client.cache()
    ok(client.push(repo))
    expected = ok(client.pull(repo))
    hub.log()
    hub.fault(cut_download=500, times=3)
    assert ok(client.pull(repo)) == expected
    hub.fault(cut_download=0)  # never a byte
    hub.log()
    error = failed(client.pull(repo, cache), "ErasureHubError", "connection", "try again")
    assert error["cause"] in ("RemoteProtocolError", "ReadError") and len(hub.log()) < 20
    hub.fault()
    assert ok(client.pull(repo, cache)) == expected
    for number in range(1, 8):  # and at each request
        hub.fault(cut_at=number)
        answer, cache = client.pull(repo, cache := client.cache()), cache
        if answer["error"] is not None:
            failed(answer, "ErasureHubError")
        hub.fault()
        assert ok(client.pull(repo, cache)) == expected


def test_wrong_bytes_are_refused_and_not_kept(hub: Hub, client: Client) -> None:
    repo, cache = "alice/wrong", client.cache()
    ok(client.push(repo))
    hub.fault(wrong_bytes=True)
    failed(client.pull(repo, cache), "ErasureFileError", "another SHA-256")
    hub.fault()
    answer = client.pull(repo, cache)
    ok(answer)
    assert "damaged in the cache" in answer["log"]
    hub.log()
    ok(client.pull(repo, cache))
    assert not any("/resolve/" in path for _, path, _ in hub.log())


def test_what_is_too_large_is_not_downloaded(hub: Hub, client: Client) -> None:
    hub.set("alice/bomb", files={CONFIG: b" " * (256 * 1024 + 1)})
    failed(client.pull("alice/bomb"), "ErasureFileError", "at most 262144")
    ok(client.push("alice/swollen"))
    files = hub.files("alice/swollen")
    hub.set("alice/swollen", files={**files, LORA: files[LORA] + bytes(1000)})
    hub.log()
    failed(client.pull("alice/swollen"), "ErasureFileError", f"at most {len(files[LORA])}")
    got = [path for method, path, _ in hub.log() if method == "GET" and "/resolve/" in path]
    assert [path.rsplit("/", 1)[1] for path in got] == [CONFIG, TENSORS]


def test_a_hub_that_fails(hub: Hub, client: Client) -> None:
    repo, cache = "alice/ill", client.cache()
    ok(client.push(repo))
    commit = ok(client.pull(repo, cache))[0]
    for status in (500, 503):
        hub.fault(status=status)
        answer = client.pull(repo)
        failed(answer, "ErasureHubError", "try again")
        assert answer["waited"] < 5 and "trying again in 1 s" in answer["log"]
        assert ok(client.pull(repo, cache))[0] == commit  # what is in the cache is used
        failed(client.push(repo), "ErasureHubError", str(status))
    hub.fault(status=429)
    failed(client.push(repo), "ErasureHubError", "Too many requests")


# ------------------------------------------------------------------------------------------------------- offline


OFFLINE = """
    import json, logging, time
    from diffusers_erasure import Erasure, ErasureError
    logging.basicConfig(level="WARNING")
    def attempt(repo, **more):
        start = time.monotonic()
        try:
            value = Erasure.from_pretrained(repo, **more).revision
        except ErasureError as error:
            value = [type(error).__name__, str(error)]
        return value, time.monotonic() - start
    kept = Erasure.from_pretrained("alice/kept", local_files_only=True)
    results = [attempt("alice/kept"), attempt("alice/other"), attempt("alice/other", revision="1" * 40)]
    start = time.monotonic()
    try:
        kept.push_to_hub("alice/pushed", token="hf_alice")
    except ErasureError as error:
        results.append([[type(error).__name__, str(error)], time.monotonic() - start])
    print(json.dumps(results))
"""


HANGING = """
    import json, logging, time
    from diffusers_erasure import Erasure
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logging.getLogger("diffusers_erasure").addHandler(handler)
    start = time.monotonic()
    found = Erasure.from_pretrained("alice/kept")
    loaded = time.monotonic() - start
    found.save_pretrained({folder!r})
    print(json.dumps([found.revision, loaded, time.monotonic() - start, lines]))
"""


def test_a_hub_that_hangs(kept: str, client: Client, tmp_path: Path) -> None:
    """It accepts connections and never answers: what is in the cache is used within 5 s, with a word."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(16)  # the kernel accepts; nobody reads
        nobody = f"http://127.0.0.1:{server.getsockname()[1]}"
        code = HANGING.replace("{folder!r}", repr(str(tmp_path / "saved")))
        revision, loaded, saved, lines = python(code, nobody, client.home / "hf")
    print(f"loaded after {loaded:.2f} s, saved after {saved:.2f} s")
    assert revision == kept and loaded < 5 and saved < 5
    assert any("no answer" in line and "cache" in line and kept in line for line in lines)
    assert (tmp_path / "saved" / CARD).is_file()


@pytest.fixture(scope="module")
def kept(hub: Hub, client: Client) -> str:
    """The commit of an erasure that lies in the worker's own cache."""
    hub.fault()
    ok(client.push("alice/kept"))
    return ok(client("result = Erasure.from_pretrained('alice/kept').revision"))


def test_offline_mode_and_a_hub_that_is_not_there(kept: str, client: Client, together: ThreadPoolExecutor) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{free.getsockname()[1]}"
    offline = together.submit(python, OFFLINE, client.hub.url, client.home / "hf", HF_HUB_OFFLINE="1")
    alone = together.submit(python, OFFLINE, nobody, client.home / "hf")
    cached, missing, commit, push = offline.result()
    assert cached[0] == kept
    assert missing[0][0] == "ErasureNotFoundError" and "HF_HUB_OFFLINE" in missing[0][1]
    assert commit[0][0] in ("ErasureNotFoundError", "ErasureHubError") and "HF_HUB_OFFLINE" in commit[0][1]
    assert push[0][0] == "ErasureHubError" and "Unset HF_HUB_OFFLINE" in push[0][1]
    assert max(seconds for _, seconds in (cached, missing, commit, push)) < 1

    cached, *others = alone.result()
    assert cached[0] == kept and cached[1] < 1
    for (kind, message), seconds in others:
        assert kind == "ErasureHubError" and "onnection" in message
        assert seconds < 6
