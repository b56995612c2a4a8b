"""Text rows against what the pipelines themselves feed to their denoisers, and how an encoder is recognised again."""

from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from diffusers_erasure import ErasureCompatibilityError, ErasureInputError, demo, encoding, erase
from diffusers_erasure.encoding import all_rows, fingerprint, gram, last_rows, pooled_rows
from diffusers_erasure.fingerprints import describe_model
from tests.helpers import ROUNDINGS, TOKENIZER, tiny_sd_pipe, tiny_sdxl_pipe


# The empty prompt, and prompts of one to 22 word pieces: the embedded model's encoder takes 24 with its two own tokens.
WORDS = ["cat", "pizza", "ice", "cream", "dog", "photo", "a", "of", "tree", "house", "the"]
PROMPTS = ["", "cat", "a cat", "ice cream", "zeppelin", "an unheard-of word", "CAT!"]
PROMPTS += [" ".join(["a"] * n) for n in (9, 22)]
PROMPTS += [" ".join(WORDS[i:] + WORDS[: i % 5]) for i in range(len(WORDS))]

# float32 with the sums in another order: other lengths and batches are other shapes of the same matrix products.
TOLERANCE = ROUNDINGS * torch.finfo(torch.float32).eps


@pytest.fixture(autouse=True)
def nothing_is_cached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFUSERS_ERASURE_CACHE", "off")


@pytest.fixture(scope="module")
def demo_model() -> Any:
    return demo.load_pipeline()


@pytest.fixture(scope="module")
def sdxl() -> Any:
    return tiny_sdxl_pipe()


def sd2() -> Any:
    """As Stable Diffusion 2.x differs from 1.x: another width, another activation, and "!" as padding."""
    pipe = tiny_sd_pipe(levels=1, cross_attention_dim=48)
    pipe.tokenizer = CLIPTokenizer.from_pretrained(TOKENIZER, pad_token="!")
    config = CLIPTextConfig(
        vocab_size=len(pipe.tokenizer),
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        hidden_act="gelu",
        max_position_embeddings=pipe.tokenizer.model_max_length,
        bos_token_id=pipe.tokenizer.bos_token_id,
        eos_token_id=pipe.tokenizer.eos_token_id,
        initializer_factor=5.0,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        pipe.text_encoder = CLIPTextModel(config).eval()
    return pipe


def as_fed(pipe: Any, prompts: list[str]) -> tuple[torch.Tensor, torch.Tensor | None]:
    """What the pipeline's own `encode_prompt` makes of prompts, one by one: rows, and the pooled vectors of SDXL."""
    rows, pooled = [], []
    with torch.no_grad():
        for prompt in prompts:
            found = pipe.encode_prompt(
                prompt, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=False
            )
            rows.append(found[0][0].double())
            pooled += [found[2][0].double()] if len(found) == 4 else []
    return torch.stack(rows), torch.stack(pooled) if pooled else None


def near(found: torch.Tensor, expected: torch.Tensor) -> bool:
    assert found.dtype == torch.float64 and found.device.type == "cpu" and found.shape == expected.shape
    return bool(((found - expected).norm(dim=-1) <= TOLERANCE * expected.norm(dim=-1)).all())


def change(tensor: torch.Tensor, *place: int) -> None:
    """The next float above one element."""
    with torch.no_grad():
        tensor[place] = torch.nextafter(tensor[place], torch.tensor(torch.inf))


# ---------------------------------------------------------------------------------------------------------- rows


@pytest.mark.parametrize("make", [demo.load_pipeline, sd2, tiny_sdxl_pipe], ids=["demo", "sd2", "sdxl"])
def test_rows_are_those_that_the_pipeline_feeds_to_its_denoiser(make: Any) -> None:
    pipe = make()
    expected, pooled = as_fed(pipe, PROMPTS)
    rows, last = all_rows(pipe, PROMPTS)
    assert expected.shape[1:] == (24, pipe.unet.config.cross_attention_dim)
    assert near(rows, expected)
    # The last word piece stands before the first end token.
    pieces = [len(pipe.tokenizer(prompt).input_ids) - 2 for prompt in PROMPTS]
    assert last == pieces and last[0] == 0 and max(last) == 22
    assert near(last_rows(pipe, PROMPTS), expected[range(len(PROMPTS)), last])
    if pooled is not None:
        assert near(pooled_rows(pipe, PROMPTS), pooled)
        assert pooled.shape == (len(PROMPTS), pipe.text_encoder_2.config.projection_dim)


def test_a_prompts_last_row_depends_on_what_stands_before_it_alone(demo_model: Any) -> None:
    """Else the short encoding would be wrong: the same row stands in the full one, whatever follows."""
    (short,) = last_rows(demo_model, ["a cat"])
    longer = all_rows(demo_model, ["a cat", "a cat on a mat"])[0]
    assert near(short.expand(2, -1), longer[:, 2])
    assert not near(short[None], longer[:1, 3])


def test_the_empty_prompt_gives_the_start_tokens_row(demo_model: Any) -> None:
    rows, last = all_rows(demo_model, ["", "cat"])
    assert last == [0, 1]
    assert near(last_rows(demo_model, [""]), rows[:1, 0]) and near(rows[:1, 0], rows[1:, 0])


def test_the_order_of_the_prompts_does_not_matter(sdxl: Any) -> None:
    order = torch.randperm(len(PROMPTS), generator=torch.Generator().manual_seed(0)).tolist()
    shuffled = [PROMPTS[i] for i in order]
    for rows in (last_rows, pooled_rows):
        assert near(rows(sdxl, shuffled), rows(sdxl, PROMPTS)[order])
    rows, last = all_rows(sdxl, PROMPTS)
    found, found_last = all_rows(sdxl, shuffled)
    assert near(found, rows[order]) and found_last == [last[i] for i in order]


def test_more_prompts_of_one_length_than_a_batch_holds(demo_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [f"{a} {b}" for a in demo.OBJECTS[:12] for b in demo.STYLES] + PROMPTS
    expected, places = all_rows(demo_model, prompts)
    expected_gram = gram(demo_model, prompts)
    sizes: list[tuple[int, int]] = []
    encoder = demo_model.text_encoder
    hook = encoder.register_forward_pre_hook(lambda _, given: sizes.append(tuple(given[0].shape)))
    monkeypatch.setattr(encoding.readers, "BATCH", 7)
    try:
        assert near(last_rows(demo_model, prompts), expected[range(len(prompts)), places])
    finally:
        hook.remove()
    assert max(size for size, _ in sizes) == 7 and sum(size for size, _ in sizes) == len(prompts)
    # Without padding: as many positions as there are pieces, and the start tokens.
    assert sum(size * length for size, length in sizes) == sum(places) + len(prompts)
    assert near(all_rows(demo_model, prompts)[0], expected)
    assert near(gram(demo_model, prompts), expected_gram)


def test_gram_is_the_sum_over_all_rows(sdxl: Any) -> None:
    rows = all_rows(sdxl, PROMPTS)[0]
    expected = torch.zeros(80, 80, dtype=torch.float64)
    for row in rows.flatten(0, 1):
        expected += torch.outer(row, row)
    assert near(gram(sdxl, PROMPTS), expected)
    assert near(gram(sdxl, PROMPTS[:1]), rows[0].T @ rows[0])


def test_a_refiner_has_the_second_encoder_alone(sdxl: Any) -> None:
    pipe = tiny_sdxl_pipe()
    pipe.text_encoder = pipe.tokenizer = None
    expected, pooled = as_fed(pipe, PROMPTS)
    assert pooled is not None and expected.shape[-1] == 48
    rows, last = all_rows(pipe, PROMPTS)
    assert near(rows, expected) and near(rows, all_rows(sdxl, PROMPTS)[0][..., 32:])
    assert near(last_rows(pipe, PROMPTS), expected[range(len(PROMPTS)), last])
    assert near(pooled_rows(pipe, PROMPTS), pooled)
    assert fingerprint(pipe) != fingerprint(sdxl)


def test_a_textual_inversion_of_several_vectors_is_written_out() -> None:
    pipe = tiny_sdxl_pipe()
    for tokenizer, encoder in ((pipe.tokenizer, pipe.text_encoder), (pipe.tokenizer_2, pipe.text_encoder_2)):
        assert tokenizer.add_tokens(["<toy>", "<toy>_1", "<toy>_2", "<hat>"]) == 4
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            encoder.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    prompts = ["a <toy>", "a <hat>", "a cat", "<toy> and <hat>"]
    expected, pooled = as_fed(pipe, prompts)
    rows, last = all_rows(pipe, prompts)
    assert last[:3] == [4, 2, 2]
    assert near(rows, expected)
    assert near(last_rows(pipe, prompts), expected[range(4), last])
    assert pooled is not None and near(pooled_rows(pipe, prompts), pooled)


def test_an_offloaded_encoder_gives_the_same_rows() -> None:
    from accelerate import cpu_offload

    pipe = sd2()
    expected = last_rows(pipe, PROMPTS)
    cpu_offload(pipe.text_encoder, execution_device=torch.device("cpu"))
    assert next(pipe.text_encoder.parameters()).device.type == "meta"
    assert near(last_rows(pipe, PROMPTS), expected)
    assert fingerprint(pipe) is not None


# -------------------------------------------------------------------------------------------------------- errors


def test_a_prompt_of_exactly_the_encoders_length_is_taken(demo_model: Any) -> None:
    longest, over = " ".join(["a"] * 22), " ".join(["a"] * 23)
    assert len(last_rows(demo_model, [longest])) == 1
    for rows in (last_rows, all_rows, gram):
        with pytest.raises(ErasureInputError, match="has 25 tokens; the text encoder takes 24") as caught:
            rows(demo_model, ["cat", over])
        assert repr(over) in str(caught.value)


def test_too_long_a_prompt_is_named_by_its_beginning(sdxl: Any) -> None:
    with pytest.raises(ErasureInputError, match="tokens") as caught:
        pooled_rows(sdxl, ["start " + "cat " * 100])
    assert "'start cat cat" in str(caught.value) and len(str(caught.value)) < 250


@pytest.mark.parametrize("rows", [last_rows, pooled_rows, all_rows, gram])
def test_a_damaged_encoder_is_told(rows: Any) -> None:
    pipe = tiny_sdxl_pipe()
    with torch.no_grad():
        pipe.text_encoder_2.text_model.embeddings.position_embedding.weight[1, 3] = torch.nan
    with pytest.raises(ErasureInputError, match="not finite"):
        rows(pipe, ["cat"])


@pytest.mark.parametrize("name", ["text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"])
def test_a_missing_component_is_named(name: str) -> None:
    pipes = [tiny_sdxl_pipe()] if name.endswith("_2") else [tiny_sdxl_pipe(), tiny_sd_pipe(levels=1)]
    for pipe in pipes:
        setattr(pipe, name, None)
        for rows in (last_rows, pooled_rows, all_rows, gram):
            with pytest.raises(ErasureCompatibilityError, match=name):
                rows(pipe, ["cat"])


def test_another_family_is_refused() -> None:
    class OtherTransformer(nn.Module):
        pass

    class Pipeline:
        transformer = OtherTransformer()

    with pytest.raises(ErasureCompatibilityError, match="OtherTransformer belongs to no known family"):
        last_rows(Pipeline(), ["cat"])


def test_an_active_lora_is_refused_and_a_disabled_one_changes_nothing() -> None:
    pipe = sd2()
    expected, name = last_rows(pipe, PROMPTS), fingerprint(pipe)
    pipe.text_encoder.add_adapter(LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False), "style")
    with pytest.raises(ErasureInputError, match="style"):
        last_rows(pipe, PROMPTS)
    pipe.disable_lora()
    assert near(last_rows(pipe, PROMPTS), expected)
    assert fingerprint(pipe) == name


def test_tokenizers_that_cut_differently_are_refused() -> None:
    pipe = tiny_sdxl_pipe()
    pipe.tokenizer_2.add_tokens(["ice cream"])
    pipe.text_encoder_2.resize_token_embeddings(len(pipe.tokenizer_2), mean_resizing=False)
    for rows in (all_rows, last_rows, gram):
        with pytest.raises(ErasureCompatibilityError, match="different numbers of pieces: 'ice cream' into"):
            rows(pipe, ["cat", "ice cream"])
    assert len(last_rows(pipe, ["cat"])) == 1 and len(pooled_rows(pipe, ["ice cream"])) == 1


@pytest.mark.parametrize("method", ["uce", "rece", "speed", "dp", "oce"])
def test_a_token_that_one_encoder_alone_knows_is_refused(method: str) -> None:
    """Its pieces stand at other places of the other encoder's rows: no row that the pipeline makes would be mapped."""
    pipe = tiny_sdxl_pipe()
    encoder, vector = pipe.text_encoder, pipe.text_encoder.get_input_embeddings().weight.detach()[50].clone()
    pipe.load_textual_inversion({"<thing>": vector}, token="<thing>", text_encoder=encoder, tokenizer=pipe.tokenizer)
    for arguments in ({"targets": "<thing>", "anchors": "animal"}, {"targets": "cat", "anchors": "<thing>"}):
        with pytest.raises(ErasureCompatibilityError, match="'<thing>' into 1 and 3.*load it into the other too"):
            erase(pipe, **arguments, method=method, rows="last")
    both, vector = pipe.text_encoder_2, pipe.text_encoder_2.get_input_embeddings().weight.detach()[50].clone()
    pipe.load_textual_inversion({"<thing>": vector}, token="<thing>", text_encoder=both, tokenizer=pipe.tokenizer_2)
    erase(pipe, "<thing>", anchors="animal", method=method, rows="last")


# --------------------------------------------------------------------------------------------------- fingerprint


def test_two_loads_of_a_model_have_one_fingerprint(demo_model: Any, sdxl: Any) -> None:
    names = {fingerprint(demo_model), fingerprint(demo.load_pipeline())}
    assert len(names) == 1 and None not in names
    assert fingerprint(sdxl) == fingerprint(tiny_sdxl_pipe()) != fingerprint(tiny_sdxl_pipe(seed=1))


def test_any_element_of_any_weight_changes_the_fingerprint() -> None:
    pipe = sd2()
    before, described, unsampled = fingerprint(pipe), describe_model(pipe.text_encoder), 0
    seen = {before}
    generator = torch.Generator().manual_seed(0)
    for name, weight in pipe.text_encoder.named_parameters():
        kept = weight.detach().clone()
        change(weight, *(int(torch.randint(size, (1,), generator=generator)) for size in weight.shape))
        assert fingerprint(pipe) not in seen, name
        seen.add(fingerprint(pipe))
        unsampled += describe_model(pipe.text_encoder) == described
        with torch.no_grad():
            weight.copy_(kept)
    assert unsampled > 10  # what identifies a model to an erasure would not have noticed these
    assert fingerprint(pipe) == before


def test_a_change_in_either_encoder_changes_the_fingerprint(sdxl: Any) -> None:
    for name in ("text_encoder", "text_encoder_2"):
        pipe = tiny_sdxl_pipe()
        change(getattr(pipe, name).get_input_embeddings().weight, 300, 5)
        assert fingerprint(pipe) != fingerprint(sdxl)


def test_a_token_beyond_the_sampled_ones_changes_the_fingerprint() -> None:
    pipe = demo.load_pipeline()
    before, described = fingerprint(pipe), describe_model(pipe.text_encoder)
    change(pipe.text_encoder.get_input_embeddings().weight, 530, 127)
    assert describe_model(pipe.text_encoder) == described
    assert fingerprint(pipe) != before


def test_swapped_tokens_change_the_fingerprint() -> None:
    """The plainest erasure of all, to which stale rows would be given."""
    pipe = demo.load_pipeline()
    before, rows = fingerprint(pipe), last_rows(pipe, ["dog"])
    places = [pipe.tokenizer(word).input_ids[1] for word in ("dog", "pizza")]
    weight = pipe.text_encoder.get_input_embeddings().weight
    with torch.no_grad():
        weight[places] = weight[places[::-1]].clone()
    assert not near(last_rows(pipe, ["dog"]), rows)
    assert fingerprint(pipe) != before


def test_what_else_makes_other_rows_changes_the_fingerprint() -> None:
    pipe = sd2()
    seen = {fingerprint(pipe)}

    def is_new() -> bool:
        name = fingerprint(pipe)
        new = name not in seen
        seen.add(name)
        return new and name is not None

    pipe.tokenizer.add_tokens(["<toy>"])
    assert is_new()
    pipe.text_encoder.resize_token_embeddings(len(pipe.tokenizer), mean_resizing=False)
    assert is_new()
    pipe.tokenizer.pad_token = "<|endoftext|>"
    assert is_new()
    pipe.tokenizer.model_max_length = 20
    assert is_new()
    pipe.text_encoder.config.hidden_act = "quick_gelu"  # the weights and their shapes stay as they are
    assert is_new()
    pipe.text_encoder.config.num_attention_heads = 8
    assert is_new()
    pipe.text_encoder.to(torch.float16)
    assert is_new()
    assert not is_new()


def test_weights_that_cannot_be_read_have_no_fingerprint() -> None:
    pipe = tiny_sdxl_pipe()
    linear = pipe.text_encoder_2.text_projection
    linear.weight = nn.Parameter(linear.weight.detach().to(torch.int8), requires_grad=False)
    assert fingerprint(pipe) is None
