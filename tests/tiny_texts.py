"""The pipelines of `tests/tiny_families.py` with tiny random text encoders and tokenizers of the classes that their families have."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKLFlux2, SCMScheduler
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    Gemma2Config,
    Gemma2Model,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3Model,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
    UMT5Config,
    UMT5EncoderModel,
)

from tests.tiny_families import FAMILIES, ROWS, Tiny


WORDS = "a cat animal dog photo of on mat tree".split()
WIDTH = 64  # of rows: many can then be mapped and others kept
DEEP = 31  # layers, of which FLUX.2 reads the tenth, twentieth and thirtieth
CHAT = ("<|im_start|>", "<|im_end|>", "[INST]", "[/INST]")
QWEN = "Describe the image by detailing color , shape size texture quantity text spatial relationships objects and background :"
TEMPLATE = (
    "{% for message in messages %}{% if message['content'] is string %}{% set text = message['content'] %}"
    "{% else %}{% set text = message['content'][0]['text'] %}{% endif %}<|im_start|>{{ message['role'] }}\n"
    "{{ text }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLM: dict[str, Any] = {
    **{"hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 2},
    **{"num_key_value_heads": 1, "head_dim": 8, "initializer_range": 0.5},
}
T5: dict[str, Any] = {"d_model": WIDTH, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}


def words_of(*more: str, start: bool = False, side: str = "right") -> PreTrainedTokenizerFast:
    """A tokenizer of whole words, line breaks and marks; all others are one token. With a start token, as Gemma has."""
    words = [
        "<pad>",
        "<unk>",
        "<bos>",
        *CHAT,
        "\n",
        ":",
        ",",
        "system",
        "user",
        "assistant",
        *WORDS,
        *" ".join(more).split(),
    ]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(dict.fromkeys(words))}, "<unk>"))
    pieces = r"<\|[a-z_]+\|>|\[/?[A-Z]+\]|\n|[:,.]|[^\s:,.<\[]+"
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(pieces), "removed", invert=True)
    backend.decoder = decoders.WordPiece()
    if start:
        backend.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 2)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>", bos_token="<bos>", padding_side=side
    )
    tokenizer.add_special_tokens({"additional_special_tokens": list(CHAT)})
    tokenizer.chat_template = TEMPLATE
    return tokenizer


def t5_words() -> T5Tokenizer:
    """T5's: no start token, and one end token."""
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)] + [("▁" + word, -3.0) for word in WORDS]
    vocabulary += [(letter, -9.0) for letter in "▁abcdefghijklmnopqrstuvwxyz"]
    return T5Tokenizer(vocab=vocabulary, extra_ids=0, additional_special_tokens=[], eos_token="</s>")


def with_t5() -> tuple[Any, Any]:
    tokenizer = t5_words()
    tokenizer.model_max_length = 64  # LTX-Video pads to 128 of its own
    return tokenizer, T5EncoderModel(T5Config(vocab_size=len(tokenizer), **T5))


def with_umt5() -> tuple[Any, Any]:
    tokenizer = t5_words()
    return tokenizer, UMT5EncoderModel(UMT5Config(vocab_size=len(tokenizer), **T5))


def with_gemma() -> tuple[Any, Any]:
    tokenizer = words_of(start=True)
    return tokenizer, Gemma2Model(Gemma2Config(vocab_size=len(tokenizer), pad_token_id=0, bos_token_id=2, **LLM))


def with_qwen_3() -> tuple[Any, Any]:
    tokenizer = words_of()
    return tokenizer, Qwen3Model(Qwen3Config(vocab_size=len(tokenizer), **LLM))


def with_qwen_3_of_flux() -> tuple[Any, Any]:
    tokenizer = words_of()
    return tokenizer, Qwen3ForCausalLM(
        Qwen3Config(vocab_size=len(tokenizer), **{**LLM, "num_hidden_layers": DEEP, "initializer_range": 0.1})
    )


def with_qwen_2() -> tuple[Any, Any]:
    tokenizer = words_of(QWEN)
    text = {
        **{key: value for key, value in LLM.items() if key != "head_dim"},
        **{
            "vocab_size": len(tokenizer),
            "num_attention_heads": 4,
            "pad_token_id": 0,
            "bos_token_id": 2,
            "eos_token_id": 2,
        },
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]},
    }
    seen = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 1, "out_hidden_size": WIDTH}
    return tokenizer, Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=seen))


class Processor:
    """Of texts and pictures, as far as FLUX.2 asks it: transformers' own needs torchvision."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer

    def apply_chat_template(self, messages: Any, **arguments: Any) -> Any:
        return self.tokenizer.apply_chat_template(messages, **arguments)


def with_mistral() -> tuple[Any, Any]:
    """It pads in front of the prompt."""
    tokenizer = words_of(side="left")
    text = {
        "model_type": "mistral",
        "vocab_size": len(tokenizer),
        **LLM,
        "num_hidden_layers": DEEP,
        "initializer_range": 0.1,
    }
    seen = {"model_type": "pixtral", "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1}
    seen |= {"num_attention_heads": 1, "head_dim": 8, "image_size": 8, "patch_size": 4}
    encoder = Mistral3ForConditionalGeneration(Mistral3Config(text_config=text, vision_config=seen))
    return Processor(tokenizer), encoder


@dataclass(frozen=True)
class Told:
    """A pipeline that reads prompts.

    Attributes:
        tiny: the pipeline without an encoder.
        encoder: makes a tokenizer and a text encoder.
        causal: whether a word is in the rows of itself and of what follows alone.
        tail: how many tokens stand behind every prompt.
        padded: whether the denoiser reads all of the padding.
        more: makes further components.
    """

    tiny: Tiny
    encoder: Callable[[], tuple[Any, Any]]
    causal: bool = False
    tail: int = 0
    padded: bool = False
    more: Callable[[], dict[str, Any]] = dict

    @property
    def wide(self) -> Tiny:
        """The pipeline with a denoiser that reads the encoder's rows."""
        width = WIDTH * (3 if self.tiny.family == "flux-2" else 1)  # of three layers side by side
        names = {"joint_attention_dim", "cap_feat_dim", "caption_channels", "text_dim"} & self.tiny.config.keys()
        config = {**self.tiny.config, **dict.fromkeys(names, width)}
        return dataclasses.replace(self.tiny, config=config, widths={ROWS: width})

    def make(self) -> Any:
        """The pipeline; all calls give equal ones."""
        pipe = self.wide.make()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            tokenizer, encoder = self.encoder()
            for name, parameter in encoder.named_parameters():
                if "norm" not in name:
                    parameter.data += 0.1 * torch.randn(parameter.shape)
            more = self.more()
        pipe.register_modules(tokenizer=tokenizer, text_encoder=encoder.eval().requires_grad_(False), **more)
        return pipe

    def draw(self, pipe: Any, prompt: str, **arguments: Any) -> torch.Tensor:
        """What a pipeline draws for a prompt."""
        generator = torch.Generator().manual_seed(1)
        given = {"num_inference_steps": 2, "generator": generator, "output_type": "latent", "return_dict": False}
        with torch.no_grad():
            return pipe(**{**given, **self.tiny.call, "prompt": prompt, **arguments})[0]


def _like(name: str, pipeline: str, config: Any = (), **call: Any) -> Tiny:
    tiny = FAMILIES[name]
    return dataclasses.replace(
        tiny, pipeline=pipeline, config={**tiny.config, **dict(config)}, call={**tiny.call, **call}
    )


def _flux_2_vae() -> dict[str, Any]:
    """FLUX.2 Klein asks it for the statistics of its latents, whatever comes out."""
    return {"vae": AutoencoderKLFlux2(block_out_channels=(4,) * 4, norm_num_groups=2, latent_channels=1).eval()}


TOLD: dict[str, Told] = {
    "FLUX.2": Told(FAMILIES["FLUX.2"], with_mistral, causal=True, tail=2, padded=True),
    "FLUX.2 Klein": Told(
        *(_like("FLUX.2", "Flux2KleinPipeline"), with_qwen_3_of_flux),
        **{"causal": True, "tail": 5, "padded": True, "more": _flux_2_vae},
    ),
    "Qwen-Image": Told(FAMILIES["Qwen-Image"], with_qwen_2, causal=True, tail=5),
    "Z-Image": Told(FAMILIES["Z-Image"], with_qwen_3, causal=True, tail=5),
    "Chroma": Told(FAMILIES["Chroma"], with_t5, tail=1),
    "PixArt-Σ": Told(FAMILIES["PixArt-Σ"], with_t5, tail=1),
    "PixArt-α": Told(_like("PixArt-Σ", "PixArtAlphaPipeline"), with_t5, tail=1),
    "SANA": Told(FAMILIES["SANA"], with_gemma, causal=True),
    "SANA-Sprint": Told(
        *(_like("SANA", "SanaSprintPipeline", {"guidance_embeds": True, "timestep_scale": 0.001}), with_gemma),
        **{"causal": True, "more": lambda: {"scheduler": SCMScheduler()}},
    ),
    "AuraFlow": Told(FAMILIES["AuraFlow"], with_umt5, tail=1),
    "Lumina 2": Told(FAMILIES["Lumina 2"], with_gemma, causal=True),
    "Wan": Told(FAMILIES["Wan"], with_umt5, tail=1),
    "LTX-Video": Told(FAMILIES["LTX-Video"], with_t5, tail=1),
}
