"""The main things that a user does, each once: what `make test-latest` and `make test-oldest` run on other versions.

Little is imported from the tests' helpers, so that each step tells for itself what a version breaks.
"""

import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch


REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def pipe() -> Any:
    from diffusers_erasure import demo

    return demo.load_pipeline().to(torch.accelerator.current_accelerator() or "cpu")


@pytest.fixture(scope="module")
def erasure(pipe: Any) -> Any:
    import diffusers_erasure

    return diffusers_erasure.erase(pipe, "cat", anchors="animal", retain=["dog", "rabbit"], method="uce")


def draw(pipe: Any, prompt: str = "a cat in ink style") -> np.ndarray:
    generator = torch.Generator().manual_seed(0)
    return pipe(prompt, num_inference_steps=2, generator=generator, output_type="np").images


def far(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max())


def lora(model: Any, site: str, prefix: str) -> dict[str, torch.Tensor]:
    """A user's LoRA on one Linear."""
    linear, generator = model.get_submodule(site), torch.Generator().manual_seed(1)
    return {
        f"{prefix}.{site}.lora_A.weight": torch.randn(2, linear.in_features, generator=generator),
        f"{prefix}.{site}.lora_B.weight": torch.randn(linear.out_features, 2, generator=generator),
    }


def first_attention(pipe: Any) -> str:
    return next(name for name, _ in pipe.unet.named_modules() if name.endswith("attn2.to_q"))


def test_import_binds_the_methods() -> None:
    code = "import diffusers_erasure, diffusers; print(hasattr(diffusers.DiffusionPipeline, 'load_erasure'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=REPOSITORY, timeout=200)
    assert done.stdout.strip() == "True", done.stderr


def test_the_dtype_is_heard() -> None:
    """diffusers took another name for it, and ignores the one that it does not know."""
    from diffusers_erasure import demo

    pipe = demo.load_pipeline(torch.bfloat16)
    assert pipe.unet.dtype == pipe.text_encoder.dtype == torch.bfloat16


def test_erase_save_load_unload(pipe: Any, erasure: Any, tmp_path: Path) -> None:
    base = draw(pipe)
    erasure.save_pretrained(tmp_path / "no-cat")
    pipe.load_erasure(tmp_path / "no-cat", strict_base="error")
    erased = draw(pipe)
    pipe.unload_erasure()
    assert far(erased, base) > 0.05
    assert np.array_equal(draw(pipe), base)


def test_a_lora_beside_it(pipe: Any, erasure: Any) -> None:
    """An erasure stays on, whatever is done with a user's LoRA; with the LoRA at 0 the picture is the erasure's alone."""
    pipe.load_erasure(erasure, "no-cat")
    alone = draw(pipe)
    pipe.load_lora_weights(lora(pipe.unet, first_attention(pipe), "unet"), adapter_name="style")
    both = draw(pipe)
    pipe.set_adapters("style", 0.0)
    off = draw(pipe)
    pipe.delete_adapters("style")
    after = draw(pipe)
    pipe.unload_erasure()
    assert far(both, alone) > 0.01
    assert far(off, alone) < 0.01 * far(alone, draw(pipe))
    assert far(after, alone) < 0.01 * far(alone, draw(pipe))


def test_stock_diffusers_loads_it(pipe: Any, erasure: Any, tmp_path: Path) -> None:
    erasure.save_pretrained(tmp_path / "no-cat")
    base = draw(pipe)
    pipe.load_erasure(tmp_path / "no-cat")
    erased = draw(pipe)
    pipe.unload_erasure()
    pipe.load_lora_weights(str(tmp_path / "no-cat"), weight_name="pytorch_lora_weights.safetensors")
    stock = draw(pipe)
    pipe.unload_lora_weights()
    assert far(stock, erased) < 0.01 * far(erased, base)


def test_an_adapter_on_the_text_encoder_or_a_typed_error(pipe: Any, tmp_path: Path) -> None:
    """transformers refuses adapters beside a peft that it thinks too old; then the error is ours, and names both."""
    from diffusers_erasure import ErasureCompatibilityError

    names = [name for name, _ in pipe.text_encoder.named_modules() if name.endswith("q_proj")]
    site = names[0].removeprefix("text_model.")
    state = lora(pipe.text_encoder, names[0], "text_encoder")
    state = {key.replace(names[0], f"text_model.{site}"): value for key, value in state.items()}
    from safetensors.torch import save_file

    save_file(state, tmp_path / "pytorch_lora_weights.safetensors")
    base = draw(pipe)
    try:
        pipe.load_erasure(tmp_path, "words", method="lora", backend="peft")
    except ErasureCompatibilityError as error:
        assert "transformers" in str(error) and "peft" in str(error)
        return
    changed = draw(pipe)
    pipe.unload_erasure()
    assert far(changed, base) > 0
    assert np.array_equal(draw(pipe), base)


def test_push_and_pull(tmp_path: Path) -> None:
    """Over HTTP, to a Hub server on this machine, in a process of its own (the Hub's address is read at import)."""
    from tests.mini_hub import Hub

    code = """
        from diffusers_erasure import Erasure, demo, erase
        pipe = demo.load_pipeline()
        erasure = erase(pipe, "cat", anchors="animal")
        erasure.push_to_hub("alice/no-cat", token="hf_alice")
        pipe.load_erasure("alice/no-cat", token="hf_alice")
        print(Erasure.from_pretrained("alice/no-cat", token="hf_alice").content_hash == erasure.content_hash)
    """
    with Hub() as hub:
        known = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
        own = {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1", "NO_PROXY": "127.0.0.1"}
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code)],
            capture_output=True,
            text=True,
            cwd=REPOSITORY,
            env={**known, **own},
            timeout=200,
        )
    assert done.stdout.strip() == "True", done.stderr[-3000:]


def test_one_training(pipe: Any) -> None:
    import diffusers_erasure

    made = diffusers_erasure.erase(pipe, "cat", method="esd", steps=2, trajectories=1, num_inference_steps=2)
    base = draw(pipe)
    pipe.load_erasure(made)
    assert far(draw(pipe), base) > 0
    pipe.unload_erasure()


def test_the_command_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "diffusers_erasure.cli"]
    for arguments in (
        ["erase", "cat", "--anchor", "animal", "-o", "no-cat"],
        ["generate", "a cat", "-e", "no-cat", "--steps", "1", "-o", "pictures"],
    ):
        done = subprocess.run(
            [*command, *arguments],
            capture_output=True,
            text=True,
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": os.pathsep.join([str(REPOSITORY), *sys.path]), "HF_HUB_OFFLINE": "1"},
            timeout=200,
        )
        assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "pictures" / "0000.png").is_file()
