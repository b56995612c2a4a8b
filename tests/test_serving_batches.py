"""One batch, and a strength for each of its pictures: each is the picture that it would be alone.

Alone and in a batch sums are taken in another order, also without erasures. Four steps of the embedded model (with guidance 3,
which triples what it sees) carry that to at most about a thousand roundings of the values' range on the kernels that were tried, so
TOLERANCE is 4,096 of them (0.0005); wrong strengths move every picture by more than ten times that.
"""

from typing import Any

import numpy as np
import pytest
import torch

from benchmarks.builders import twin
from diffusers_erasure import ErasureInputError, ErasureNotFoundError, demo
from tests.helpers import equal, far
from tests.serving import KINDS, ON_UNET, Request, at_once, erasures, serving


TOLERANCE = 4096 * torch.finfo(torch.float32).eps
EFFECT = 10 * TOLERANCE
PROMPTS = ("a cat", "a dog in ink style", "a rose in pencil style", "a cat")
STRENGTHS = [0.0, 1.0, 0.4, 0.7]


def latents(count: int) -> torch.Tensor:
    return torch.randn(count, 8, 8, 8, generator=torch.Generator().manual_seed(0))


def draw(pipe: Any, prompts: Any, noise: torch.Tensor, guidance: float, **options: Any) -> np.ndarray:
    texts = {"prompt_embeds": prompts} if isinstance(prompts, torch.Tensor) else {"prompt": list(prompts)}
    return pipe(
        **texts, num_inference_steps=4, guidance_scale=guidance, latents=noise, output_type="np", **options
    ).images


def singly(
    pipe: Any, prompts: Any, noise: torch.Tensor, guidance: float, strengths: dict[str, list[float]], per: int = 1
) -> np.ndarray:
    """Each picture alone, at numbers."""
    drawn = []
    for i in range(len(noise)):
        with pipe.erasure_strengths({name: values[i] for name, values in strengths.items()}):
            own = prompts[i // per : i // per + 1]
            drawn.append(draw(pipe, own, noise[i : i + 1], guidance))
    return np.concatenate(drawn)


def assert_each_is_its_own(actual: np.ndarray, alone: np.ndarray, others: np.ndarray) -> None:
    """`others` are the pictures at strengths that are wrong for each of them."""
    assert far(actual, alone) <= TOLERANCE
    assert all(far(a, b) > EFFECT for a, b in zip(actual, others, strict=True))


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_control_without_erasures(guidance: float) -> None:
    pipe, noise = demo.load_pipeline(), latents(4)
    alone = [draw(pipe, [prompt], noise[i : i + 1], guidance) for i, prompt in enumerate(PROMPTS)]
    assert far(draw(pipe, PROMPTS, noise, guidance), np.concatenate(alone)) <= TOLERANCE


@pytest.mark.parametrize("guidance", [1.0, 3.0], ids=["without guidance", "with guidance"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_strength_for_each_prompt(kind: str, guidance: float) -> None:
    pipe, noise = serving((kind,)), latents(4)
    strengths = {kind: [0.0, 1.0, 0.4, 0.7]}
    alone = singly(pipe, PROMPTS, noise, guidance, strengths)
    others = singly(pipe, PROMPTS, noise, guidance, {kind: [1.0, 0.0, 1.0, 0.0]})
    with pipe.erasure_strengths(strengths):
        (info,) = pipe.list_erasures()
        assert info.acting == (0.0, 1.0, 0.4, 0.7) and info.strength == 1.0
        drawn = draw(pipe, PROMPTS, noise, guidance)
    assert_each_is_its_own(drawn, alone, others)
    plain = draw(demo.load_pipeline(), PROMPTS, noise, guidance)
    assert far(drawn[:1], plain[:1]) <= TOLERANCE


@pytest.mark.parametrize("guidance", [1.0, 3.0], ids=["without guidance", "with guidance"])
def test_four_requests_in_one_batch(guidance: float) -> None:
    """Every picture has erasures of its own, beside numbers that hold for all, and beside what is loaded."""
    pipe, noise = serving(), latents(4)
    names = ("lora", "text_map", "activation", "gated")
    rows = {name: [float(i == j) for j in range(4)] for i, name in enumerate(names)}
    numbers = {"skip": 0.2, "scheduled": 0.0}
    strengths = {**rows, **{name: [value] * 4 for name, value in numbers.items()}}
    alone = singly(pipe, PROMPTS, noise, guidance, strengths)
    others = singly(pipe, PROMPTS, noise, guidance, {name: row[::-1] for name, row in strengths.items()})
    with pipe.erasure_strengths({**rows, **numbers}):
        drawn = draw(pipe, PROMPTS, noise, guidance)
    assert_each_is_its_own(drawn, alone, others)


@pytest.mark.parametrize("guidance", [1.0, 3.0], ids=["without guidance", "with guidance"])
@pytest.mark.parametrize("kind", ON_UNET)
def test_several_pictures_of_a_prompt(kind: str, guidance: float) -> None:
    pipe, noise = serving((kind,)), latents(6)
    strengths = {kind: [0.0, 1.0, 0.4, 0.7, 1.0, 0.1]}
    alone = singly(pipe, PROMPTS, noise, guidance, strengths, per=3)
    others = singly(pipe, PROMPTS, noise, guidance, {kind: [1.0, 0.0, 1.0, 0.0, 0.0, 1.0]}, per=3)
    with pipe.erasure_strengths(strengths):
        drawn = draw(pipe, PROMPTS[:2], noise, guidance, num_images_per_prompt=3)
    assert_each_is_its_own(drawn, alone, others)


@pytest.mark.parametrize("kind", ON_UNET)
@pytest.mark.parametrize("length", [77, 8, 4])
def test_lengths_of_text(kind: str, length: int) -> None:
    """77 rows, and as many as the batch has pictures: a strength belongs to a picture, not to a place in its text."""
    pipe, noise = serving((kind,)), latents(4)
    rows = torch.randn(4, length, 128, generator=torch.Generator().manual_seed(1))
    strengths = {kind: STRENGTHS}
    alone = singly(pipe, rows, noise, 1.0, strengths)
    others = singly(pipe, rows, noise, 1.0, {kind: [1.0, 0.0, 1.0, 0.0]})
    with pipe.erasure_strengths(strengths):
        drawn = draw(pipe, rows, noise, 1.0)
    assert_each_is_its_own(drawn, alone, others)


def test_two_batches_at_once() -> None:
    pipe, noise = serving(), latents(4)
    turned = {name: STRENGTHS[i % 4 :] + STRENGTHS[: i % 4] for i, name in enumerate(KINDS)}
    twins = [twin(pipe) for _ in range(4)]

    def served(index: int) -> np.ndarray:
        order = slice(None, None, -1 if index % 2 else 1)
        with pipe.erasure_strengths({name: row[order] for name, row in turned.items()}):
            return draw(twins[index], PROMPTS, noise, 3.0)

    alone = [served(index) for index in range(4)]
    drawn = at_once(*(lambda index=index: [served(index) for _ in range(3)] for index in range(4)))
    assert all(equal(picture, wanted) for pictures, wanted in zip(drawn, alone, strict=True) for picture in pictures)
    assert far(alone[0], alone[1]) > EFFECT


# -------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "wrong",
    [
        -0.1,
        float("nan"),
        float("inf"),
        True,
        "1",
        None,
        [],
        [0.5, -1.0],
        [0.5, float("nan")],
        [True, 0.5],
        ["1"],
        {"a": 1},
    ],
    ids=str,
)
def test_strengths_that_are_none(wrong: Any) -> None:
    pipe = serving(("lora",))
    with pytest.raises(ErasureInputError):
        with pipe.erasure_strengths({"lora": wrong}):
            pytest.fail("the block began")
    assert pipe.list_erasures()[0].acting == 1.0


def test_a_name_that_is_not_loaded() -> None:
    pipe = serving(("lora",))
    with pytest.raises(ErasureNotFoundError, match="text_map"):
        with pipe.erasure_strengths({"lora": 0.5, "text_map": 0.5}):
            pytest.fail("the block began")
    assert pipe.list_erasures()[0].acting == 1.0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize(("count", "per"), [(1, 1), (2, 1), (4, 1), (2, 2), (3, 2)])
def test_a_list_that_does_not_fit(kind: str, guidance: float, count: int, per: int) -> None:
    pipe = serving((kind,))
    with pipe.erasure_strengths({kind: [0.1, 0.2, 0.3]}), pytest.raises(ErasureInputError, match="3"):
        draw(pipe, PROMPTS[:count], latents(count * per), guidance, num_images_per_prompt=per)
    drawn = draw(pipe, PROMPTS[:1], latents(1), guidance)
    assert equal(drawn, draw(serving((kind,)), PROMPTS[:1], latents(1), guidance))


@pytest.mark.parametrize("backend", ["merge", "peft"])
def test_what_is_not_a_requests(backend: str) -> None:
    """Weights, and stock adapters, are the same for everybody."""
    pipe = serving(("text_map",))
    pipe.load_erasure(erasures()["lora"], "global", backend=backend)
    before = Request().draw(pipe)
    with pytest.raises(ErasureInputError, match="global"):
        with pipe.erasure_strengths({"global": 0.5}):
            pytest.fail("the block began")
    with pipe.erasure_strengths({"text_map": 0.0}):  # the others can be
        assert far(Request().draw(pipe), before) > EFFECT
    assert equal(Request().draw(pipe), before)
