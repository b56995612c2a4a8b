"""An erasure of each method, made in a few steps on each tiny trained model, loaded in one line and taken off again."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from diffusers_erasure import demo, erase
from diffusers_erasure.registry import declaration, method_names
from diffusers_erasure.training import TrainingRun
from tests.worlds import in_a_checkout


WORLDS = [name for name in demo.WORLDS if name != "sd1"]
TRAINED: dict[str, Any] = {
    **{"steps": 2, "rank": 2, "batch_size": 1, "trajectories": 2, "num_inference_steps": 2, "learning_rate": 0.05},
    **{"templates": "none", "compare": False, "training": TrainingRun(progress=False)},
}
CASES = [
    (world, method)
    for world in WORLDS
    for method in method_names()
    if demo.WORLDS[world].family in declaration(method).families
]


def quick(method: str) -> dict[str, Any]:
    """The least that makes an erasure."""
    if method == "acterase":
        return {"num_pairs": 2, "num_inference_steps": 2, "timesteps": 2, "batch_size": 2, "compare": False}
    if not declaration(method).resumable:
        return {"retain": ["dog", "rabbit"], "retain_default": "none", "compare": False}
    return {**TRAINED, **({"schedule_steps": 4} if method == "dumo" else {"retain": ["dog"]})}


@pytest.fixture(scope="module")
def pipes() -> dict[str, Any]:
    return {}


def drawn(pipe: Any, world: str) -> np.ndarray:
    how = {**demo.call_arguments(world), "num_inference_steps": 2, "output_type": "np"}
    return pipe("a cat in noto style", generator=torch.Generator().manual_seed(0), **how).images


@in_a_checkout
@pytest.mark.parametrize(("world", "method"), CASES)
def test_one_line_loads_it(world: str, method: str, pipes: dict[str, Any], tmp_path: Path) -> None:
    if world not in pipes:
        pipes.clear()  # one model at a time
        pipe = demo.load_pipeline(world)
        pipe.set_progress_bar_config(disable=True)
        pipes[world] = pipe, drawn(pipe, world)
    pipe, before = pipes[world]
    erase(pipe, "cat", anchors="animal", method=method, **quick(method)).save_pretrained(tmp_path / "no-cat")
    pipe.load_erasure(tmp_path / "no-cat")
    (info,) = pipe.list_erasures()
    assert info.method == method and abs(drawn(pipe, world) - before).max() > 0.02
    pipe.unload_erasure()
    assert np.array_equal(drawn(pipe, world), before)


def test_every_method_is_for_one_of_them() -> None:
    methods = {world: {method for other, method in CASES if other == world} for world in WORLDS}
    assert set().union(*methods.values()) == set(method_names())
    assert methods["sd3"] == methods["flux"] == set(method_names()) - {"dumo"}
    assert methods["sdxl"] == set(method_names()) - {"gem", "eraseanything"}
