"""Each benchmark runs on small shapes and reports what it promises. Nothing is asserted about times."""

import argparse
import ast
import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler

from benchmarks import beside_loras, flux_update, image_to_image
from diffusers_erasure import demo
from diffusers_erasure.demo.drawing import fast_pipeline


ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.timeout(900)  # on a machine that others use too
SUMMARY = {"median", "q1", "q3", "min", "max", "n"}


def run(name: str, tmp_path: Path, *arguments: str) -> dict[str, Any]:
    path = tmp_path / "numbers.json"
    command = [sys.executable, "-m", f"benchmarks.{name}", "--smoke", "--json", str(path), *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=880)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "Measured on a CPU." in done.stdout and "--smoke" in done.stdout
    numbers = json.loads(path.read_text(encoding="utf-8"))
    assert (numbers["benchmark"], numbers["smoke"]) == (name, True)
    assert {"device", "threads", "clock", "torch", "diffusers", "peft"} <= set(numbers["machine"])
    return numbers


def test_benchmarks_use_public_names_and_patch_nothing() -> None:
    files = list((ROOT / "benchmarks").rglob("*.py"))
    assert len(files) > 20
    for file in files:
        text = file.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 500, file
        assert not re.search(r"\bmock\b|monkeypatch|setattr\(", text), f"{file} patches"
        ours = set()
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("diffusers_erasure"):
                ours |= {alias.asname or alias.name for alias in node.names}
                assert not [alias.name for alias in node.names if re.match("_[^_]", alias.name)], file
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ours:
                assert not node.attr.startswith("_"), f"{file}:{node.lineno}"


@pytest.mark.slow
def test_import_time(tmp_path: Path) -> None:
    numbers = run("import_time", tmp_path)
    assert all(set(numbers[key]) == SUMMARY for key in ("diffusers_s", "library_s", "over_s", "within_s"))
    assert "diffusers_erasure.pipeline" in numbers["modules"]
    assert numbers["imported_but_should_be_lazy"] == []


@pytest.mark.slow
def test_firing_check(tmp_path: Path) -> None:
    numbers = run("firing_check", tmp_path)
    checked, bare = numbers["with the check"], numbers["without"]
    assert checked["kernels"] == bare["kernels"] > 1000
    assert checked["synchronisations"] == bare["synchronisations"] == 0


@pytest.mark.slow
def test_unet_step(tmp_path: Path) -> None:
    numbers = run("unet_step", tmp_path)
    rows = numbers["rows"]
    assert {(row["variant"], row["erasures"]) for row in rows} == {
        (variant, count) for variant in ("lora", "text_map", "activation", "stock") for count in (1, 2)
    }
    # 32 projections of 2 x 77 text rows: 64 wide in, 2 x (5 x 32 + 5 x 64 + 6 x 128) wide out.
    widths = {"lora": 32 * 64 + 2 * (5 * 32 + 5 * 64 + 6 * 128), "text_map": 64 + 64}
    # A later step: a product and a sum in one at each site, whatever the number of erasures, or nothing, as mapped rows are kept;
    # stock LoRAs take two products, a scale and a sum, each on its own.
    kernels = {"lora": lambda count: 32, "text_map": lambda count: 0, "stock": lambda count: 4 * 32 * count}
    alike = {row["added_kernels"] for row in rows if row["variant"] == "activation"}
    assert len(alike) == 1 and 16 <= alike.pop() < 16 * 4
    for row in rows:
        assert set(row["host"]["ratio"]) == set(row["step"]["ratio"]) == SUMMARY
        assert 0 <= row["added_kernels_first"] - row["added_kernels"] < 10
        if row["variant"] == "activation":
            assert row["added_flops"] == row["formula_flops"] == 0 and row["rank"] is None
            continue
        flops = 2 * 2 * 77 * row["rank"] * row["erasures"] * widths.get(row["variant"], widths["lora"])
        assert row["added_flops"] == row["formula_flops"] == flops, row["name"]
        assert row["added_kernels"] == kernels[row["variant"]](row["erasures"]), row["name"]
        assert set(row["step"]["over_stock"]) == SUMMARY


@pytest.mark.slow
def test_transformer_step(tmp_path: Path) -> None:
    rows = {row["variant"]: row for row in run("transformer_step", tmp_path, "--ranks", "4")["rows"]}
    # A product and a sum in one, and a product before, for rows and pooled vector; later steps take what the first one made.
    assert (rows["map"]["added_kernels_first"], rows["map"]["added_kernels"]) == (4, 0)
    # The door reads the same rows in each step, so that a LoRA on it has its first product at hand.
    assert rows["door"]["added_kernels"] == 3 and rows["door, stock"]["added_kernels"] == 8
    # 2 double blocks with 4 queries and keys each.
    assert rows["keys"]["added_kernels"] == 16 and rows["keys, stock"]["added_kernels"] == 32
    assert rows["map"]["added_flops"] == 2 * 4 * 2 * (512 * 64 + 768)
    assert rows["map"]["bytes"] == 2 * 4 * 2 * (64 + 768)


@pytest.mark.slow
def test_flux_fit(tmp_path: Path) -> None:
    numbers = run("flux_fit", tmp_path)
    assert numbers["prompts"] == 3 and numbers["seconds"] > 0
    # Two directions of rows 64 wide, and one of pooled vectors as wide as the tiny model's.
    assert numbers["bytes"] == 2 * 2 * (2 * 64 + 96)


@pytest.mark.slow
def test_flux_update(tmp_path: Path) -> None:
    numbers = run("flux_update", tmp_path)
    rows = {(row["method"], row["batch_size"], row["gradient_checkpointing"]): row for row in numbers["rows"]}
    # The presets' batches, with activations computed again and kept; and a batch of one.
    assert list(rows) == [
        *(("esd", 4, True), ("gem", 8, True), ("esd", 1, False), ("gem", 1, False), ("esd", 4, False)),
        ("gem", 8, False),
    ]
    for (method, batch, checkpointing), row in rows.items():
        assert "error" not in row and row["gradient_checkpointing"] is checkpointing
        assert all(set(row[key]) == SUMMARY for key in ("update_s", "teacher_s", "student_s", "backward_s"))
        assert row["update_s"]["n"] == 4 and row["update_s"]["min"] > 0
        # As many retained prompts join; GEM asks the base for concept and anchor, of which ESD's pool knows.
        assert (row["samples"], row["teacher_samples"]) == (2 * batch, 2 * batch if method == "gem" else 0)
        # Two trajectories of two steps: sampled, and concept and anchor without guidance; and one of each retained text.
        pool = row["pool"]
        assert pool["concept_samples"] == (2 if method == "gem" else 2 * 3)
        assert len(pool["concept_pass_s"]) == (1 if method == "gem" else 2) and pool["retained_samples"] == [6, 6]
        # GEM draws latents again before the fifth update.
        assert (row["refresh_s"] or {}).get("n") == (1 if method == "gem" else None)
        assert row["preset"]["run_s"] > row["preset"]["pool_s"] > 0
    assert numbers["left"] == []


@pytest.mark.slow
def test_flux_update_is_cut_off(tmp_path: Path) -> None:
    numbers = run("flux_update", tmp_path, "--methods", "esd", "--updates", "1", "--limit", "0")
    assert numbers["rows"] == [] and len(numbers["left"]) == 3


def test_what_fits_no_memory_is_told(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def full(*_: Any) -> int:
        raise torch.cuda.OutOfMemoryError(
            "CUDA out of memory. Tried to allocate 3 GiB. If reserved but unallocated ..."
        )

    monkeypatch.setattr(flux_update, "run", full)
    pipe = flux_update.make_pipeline("cpu", smoke=True)
    options = argparse.Namespace(pixels=64, updates=1, smoke=True, device="cpu")
    row = flux_update.measured(pipe, flux_update.Case("gem", 0, False), options)
    assert (row["error"], row["updates_done"], row["batch_size"]) == ("out of memory", 0, 8)
    assert capsys.readouterr().out.strip() == "CUDA out of memory. Tried to allocate 3 GiB."
    flux_update.print_tables([row], options)
    assert "gem, 8 + 8, without checkpointing  out of memory" in capsys.readouterr().out


@pytest.mark.slow
def test_serving(tmp_path: Path) -> None:
    numbers = run("serving", tmp_path, "--erasures", "text_map")
    assert [(row["variant"], row["threads"]) for row in numbers["rows"]] == [
        (variant, threads) for variant in ("un-erased", "erased") for threads in (0, 1, 4)
    ]
    for row in numbers["rows"]:
        assert all(set(row[key]) == SUMMARY for key in ("seconds", "per_second", "over_loop", "over_unerased"))
        assert row["threads"] or row["over_loop"]["median"] == 1.0
    assert [row["variant"] for row in numbers["batches"]] == ["un-erased", "erased"]
    assert all(set(row["over_singly"]) == set(row["over_unerased"]) == SUMMARY for row in numbers["batches"])


@pytest.mark.slow
def test_unet_layers(tmp_path: Path) -> None:
    numbers = run("unet_layers", tmp_path)
    rows = {row["variant"]: row for row in numbers["rows"]}
    assert set(rows) == {"activation", "folded", "full", "controlnet", "compact"}
    for name, row in rows.items():
        assert set(row["ratio"]) == set(row["over_controlnet"]) == set(row["over_full"]) == SUMMARY
        # One graph, and no other one within 50 timesteps.
        assert row.get("compiled") == (None if name == "controlnet" else {"graphs": 1, "recompilations": 0})
    bare = numbers["bare"]["flops"]
    assert rows["activation"]["flops"] == rows["folded"]["flops"] == bare
    assert bare < rows["full"]["flops"] < min(rows["compact"]["flops"], rows["controlnet"]["flops"])


@pytest.mark.slow
def test_load_erasure(tmp_path: Path) -> None:
    (row,) = run("load_erasure", tmp_path)["rows"]
    firsts = ("first_s", "first_older_s", "first_stock_s", "fingerprint_s", "ratio_first", "ratio_first_older")
    assert all(set(row[key]) == SUMMARY for key in (*firsts, "again_s", "stock_s", "ratio_again"))
    assert row["ratio_first"]["n"] == 1 and row["ratio_again"]["n"] == 3
    assert {
        "read and validate",
        "attach",
        "fingerprint, first time",
        "  unet",
        "  text_encoder",
        "  tokenizer",
    } <= set(row["parts_s"])
    values = 4 * row["rank"] * (32 * 64 + 2 * (5 * 32 + 5 * 64 + 6 * 128))
    assert values < row["bytes"] < values + 16_384  # float32 factors and a header


@pytest.mark.slow
def test_uce(tmp_path: Path) -> None:
    rows = run("uce", tmp_path)["rows"]
    assert [row["targets"] for row in rows] == [1, 4]
    for row in rows:
        assert row["rank"] == row["targets"]
        assert all(set(row[key]) == SUMMARY for key in ("ours_s", "solve_s", "baseline_s", "speedup"))
        assert row["error"]["ours_before_cast"] < 1e-9
        assert row["error"]["ours"] < 1e-6


@pytest.mark.slow
def test_closed_form(tmp_path: Path) -> None:
    numbers = run("closed_form", tmp_path)
    assert [row["targets"] for row in numbers["speed"]] == [1, 4]
    for row in numbers["speed"]:
        assert all(set(row[key]) == SUMMARY for key in ("ours_s", "first_s", "baseline_s", "speedup", "speedup_first"))
        assert row["error"]["ours"] < 1e-6  # both sides are given the same rows, shuffle and draws
        assert row["error"]["baseline"] < 1e-2 and len(row["apart"]) == 3
    names = {
        "erase": {"empty cache", "warm cache"},
        "gated": {"empty cache", "warm cache"},
        "rece": {f"{kind}, {n}" for kind in ("rece", "rece, published", "uce") for n in (1, 3)},
        "combine": {f"{kind}, {mode}" for kind in ("speed", "rece", "uce") for mode in ("joint", "sum")},
    }
    for table, calls in names.items():
        assert {row["call"] for row in numbers[table]} == calls
        for row in numbers[table]:
            assert set(row["s"]) == SUMMARY and row["parts_s"]
    cold, warm = (
        {row["call"]: row["parts_s"] for row in numbers["erase"]}[f"{kind} cache"] for kind in ("empty", "warm")
    )
    directions, edit = "methods.base_sums.least_direction", "methods.nullspace.edit"
    assert cold[directions] > 0 and directions not in warm  # it comes from the cache
    assert cold[edit] > 0 and warm[edit] > 0 and warm["torch"] > 0
    # One call of `erase` for each method, from an empty cache and from a warm one.
    assert [(row["method"], row["cached"]) for row in numbers["memory"]] == [
        (method, cached) for method in ("speed", "rece", "uce") for cached in (False, True)
    ]
    assert [row["concepts"] for row in numbers["files"]] == [1, 20]
    # 16 value projections of 64 wide text rows, 5 x 32 + 5 x 64 + 6 x 128 wide out, two bytes a value, and a header.
    for row in numbers["files"]:
        values = 2 * row["concepts"] * (16 * 64 + 5 * 32 + 5 * 64 + 6 * 128)
        assert values < row["files"]["pytorch_lora_weights.safetensors"] < values + 8_192


@pytest.mark.slow
def test_closed_form_sdxl(tmp_path: Path) -> None:
    numbers = run("closed_form", tmp_path, "--model", "sdxl")
    assert {row["call"] for row in numbers["speed"]} == {"speed, 1, empty cache", "speed, 1", "speed, 4"}
    assert {row["call"] for row in numbers["rece"]} == {
        "rece, 1, empty cache",
        "rece, 1",
        "rece, 4",
        "uce, 1",
        "uce, 4",
    }
    edits = {"speed": "methods.nullspace.edit", "rece": "methods.rece.solve", "uce": "methods.uce.solve"}
    for row in (*numbers["speed"], *numbers["rece"]):
        assert row["parts_s"][edits[row["call"].partition(",")[0]]] > 0 and "transformers" not in row["parts_s"]


@pytest.mark.slow
def test_training(tmp_path: Path) -> None:
    numbers = run("training", tmp_path)
    (row,) = numbers["compare"]
    assert set(row["ratio"]) == {"forwards", "passes", "seconds"}
    # Two steps of two samples and two retained ones; the student's passes are the same in both ways.
    assert (
        row["plain"]["passes"] - row["plain"]["forwards"] == row["library"]["passes"] - row["library"]["forwards"] == 8
    )
    assert all(case["peak_gb"] > case["loaded_gb"] > 0 for case in numbers["memory"])
    assert numbers["run"]["seconds"] > 0 and numbers["run"]["bytes"] > 0


@pytest.mark.slow
def test_acterase_ablation(tmp_path: Path) -> None:
    numbers = run("acterase_ablation", tmp_path)
    (rows,) = numbers["tables"].values()
    assert [row["changes"] for row in rows] == [{"tau": 0.0}, {"tau": 0.25}]
    for row in rows:
        assert 0 <= row["erased"] <= 1 and 0 <= row["kept"] <= 1 and 0 < row["patched"] < 0.11
        assert all(0 < each["bytes"] < 100_000 for each in row["concepts"].values())
    assert len(numbers["calibration_s"]) == 1  # both settings only read it


@pytest.mark.slow
def test_beside_loras(tmp_path: Path) -> None:
    numbers = run("beside_loras", tmp_path, "--store", str(tmp_path / "store"))
    assert numbers["command"] == "python -m benchmarks.beside_loras --smoke"
    assert [row["lora"] for row in numbers["loras"]] == ["brown ink", "new objects"]
    assert all(row["steps"] == 2 and row["pictures"] > 100 for row in numbers["loras"])
    assert 0 < numbers["changed"]["0.7"] < numbers["changed"]["1"] < 0.1  # two steps of training are on, and no more
    assert list(numbers["rows"]) == ["none", "anchor prompt", "uce"]
    for row in numbers["rows"].values():
        for each in row["beside"].values():
            assert row["without"]["images"] == each["share"]["images"] == numbers["images"] == 2
            more = 100 * (each["share"]["value"] - row["without"]["value"])
            assert each["points"]["value"] == pytest.approx(more)
    assert numbers["rows"]["none"]["without"]["value"] == 1 and numbers["rows"]["uce"]["without"]["value"] < 1


@pytest.mark.slow
def test_image_to_image(tmp_path: Path) -> None:
    numbers = run("image_to_image", tmp_path, "--store", str(tmp_path / "store"))
    rows = {(row["way"], row["prompt"], row["method"]): row["shares"] for row in numbers["rows"]}
    ways = ("img2img", "inpainting, middle", "inpainting, left half")
    assert set(rows) == {(way, says, by) for way in ways for says in ("its own", "neutral") for by in ("none", "uce")}
    assert all([each["strength"] for each in shares] == [0.5, 1.0] for shares in rows.values())
    # At full strength nothing of the picture is left but what a mask keeps: the prompt alone says what is drawn.
    assert rows["img2img", "its own", "none"][1]["value"] == 1 and rows["img2img", "neutral", "none"][1]["value"] == 0
    assert set(numbers["blank"]) == {"inpainting, middle", "inpainting, left half"}


def test_what_inpainting_keeps() -> None:
    pipe = fast_pipeline()
    pipe.scheduler.set_timesteps(4)
    latents, noise, drawn = torch.randn(3, 2, 8, 8, 8, generator=torch.Generator().manual_seed(0))
    keep = image_to_image.KeepOutside(latents, noise, [(2, 6, 2, 6), (0, 8, 0, 8)])
    first, second, *_, last = pipe.scheduler.timesteps
    noisy = DDPMScheduler.from_config(pipe.scheduler.config).add_noise(latents, noise, second[None])
    for step, timestep, outside in ((0, first, noisy), (3, last, latents)):
        after = keep(pipe, step, timestep, {"latents": drawn})["latents"]
        torch.testing.assert_close(after[0, :, :, :2], outside[0, :, :, :2])
        assert torch.equal(after[0, :, 2:6, 2:6], drawn[0, :, 2:6, 2:6]) and torch.equal(after[1], drawn[1])


def test_the_loras_know_nothing_of_the_targets() -> None:
    known = demo.load_images()
    for lora in (beside_loras.STYLE, beside_loras.OBJECTS):
        pictures = beside_loras.pictures_of(lora)
        assert not set(pictures.objects) & set(beside_loras.TARGETS)
        assert len(pictures.images) == len(pictures.objects) == len(pictures.styles)
        # The n-th picture is of the n-th name: as it was, or in brown.
        for picture, name, style in zip(pictures.images, pictures.objects, pictures.styles, strict=True):
            source = known if name in known.objects else demo.load_unseen_images()
            own = source.images[source.objects.index(name), source.styles.index(style)]
            if lora == beside_loras.OBJECTS:
                assert np.array_equal(picture, own)
            else:
                assert not np.array_equal(picture, own) and (picture[..., 0] >= picture[..., 2]).all()
                assert (picture[(own == 255).all(-1)] == 255).all()


def test_numbers_of_an_earlier_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    share = {"value": 0.25, "low": 0.125, "high": 0.375, "images": 8}
    beside = {"share": share, "points": {"value": 3.0, "low": -1.0, "high": 7.0, "images": 8}}
    numbers = {
        **{"benchmark": "beside_loras", "smoke": False, "command": "python -m benchmarks.beside_loras --device cuda"},
        **{"made_on": {"device": "a GPU", "torch": "9", "diffusers": "9"}, "targets": ["dog"], "images": 8, "seed": 0},
        **{
            "loras": [{"lora": "x", "steps": 3, "pictures": 4, "loss": [0.5, 0.25]}],
            "changed": {"1": 0.125},
            "seconds": 1.0,
        },
        "rows": dict.fromkeys(("none", "uce"), {"without": share, "beside": {"1": beside}}),
    }
    path = tmp_path / "earlier.json"
    path.write_text(json.dumps(numbers), encoding="utf-8")
    beside_loras.main(["--numbers", str(path)])
    shown = capsys.readouterr().out
    assert re.search(r"\+3\.0 \[-1\.0 to \+7\.0\] +no\n", shown) and "(a GPU, torch 9, diffusers 9)" in shown
    text = beside_loras.markdown(numbers)
    assert "| none | 25.0 [12.5 to 37.5] | 25.0 [12.5 to 37.5] | +3.0 [-1.0 to +7.0] |  |" in text
    assert (
        "| uce |" in text
        and text.endswith("| no |")
        and "`python -m benchmarks.beside_loras --device cuda` (a GPU" in text
    )
    path.write_text(json.dumps({**numbers, "benchmark": "uce"}), encoding="utf-8")
    with pytest.raises(SystemExit, match="no numbers of beside_loras"):
        beside_loras.main(["--numbers", str(path)])


@pytest.mark.parametrize("wrong", [["--smoke", "--write-docs"], ["--images", "9"], ["--images", "0"], ["--jobs", "0"]])
@pytest.mark.parametrize("parse", [beside_loras.parse, image_to_image.parse])
def test_wrong_options(parse: Callable[[list[str]], Any], wrong: list[str]) -> None:
    with pytest.raises(SystemExit):
        parse(wrong)


@pytest.mark.slow
def test_collateral(tmp_path: Path) -> None:
    numbers = run("collateral", tmp_path)
    assert [(each["target"], each["default"]) for each in numbers["runs"]] == [("cat", False), ("cat", True)]
    for each in numbers["runs"]:
        assert len(each["kept"]) == len(each["base"]) == 6 and 0 <= each["left"] <= 5
        assert all(len(moves) == 6 for moves in each["moves"].values())
    assert set(numbers["measures"]) == {"row alone, dev", "row behind an article, dev"}
    assert sum(numbers["runs"][0]["kept"]) <= sum(numbers["runs"][1]["kept"])
