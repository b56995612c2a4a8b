"""`Erasure`: the artefact that removes concepts from a base model, in memory, on disk and on the Hub."""

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

import torch

from . import tensors as tensor_io
from .assembling import Concepts, Rows, assemble
from .cards import check_repo_id, render_card
from .errors import ErasureConfigError, ErasureFileError, ErasureInputError, ErasureNotFoundError
from .hub.beside import RECORD_FILE, FolderOrigin, Origin, Withheld, beside_of
from .hub.joining import beside_files, check_side
from .hub.options import CommitOptions, PushOptions, ReadOptions, SaveOptions, takes
from .hub.transfer import fetch, push
from .layers import layer_kind
from .layers.layer import Layer
from .layers.lora_keys import lora_layers
from .layers.validation import check_tensors, layer_tensors, modifier_tensors, solve_tensors
from .logging import get_logger
from .low_rank import UP, low_rank_error
from .schema import (
    CARD_FILE,
    CONFIG_FILE,
    LORA_FILE,
    Concept,
    ErasureConfig,
    FileRecord,
    LayerSpec,
    Method,
)
from .showing import as_html, as_text, erasure_rows
from .storage import Contents, check_file, local_folder, read_folder, write_folder


if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

logger = get_logger(__name__)


@dataclass
class Erasure:
    """A configuration and its tensors.

    Attributes:
        config ([`ErasureConfig`]): what the erasure removes, how it was made, for which base model, and its layers.
        tensors (`dict`): for each tensor file its tensors by name, on the CPU.
        source (`str`, *optional*): the folder or repository that it was read from.
        revision (`str`, *optional*): the commit that it was read from.
        origin (*optional*): where its card and pictures lie; they are read when it is saved or pushed.
    """

    config: ErasureConfig
    tensors: dict[str, dict[str, torch.Tensor]] = field(repr=False)
    source: str | None = None
    revision: str | None = None
    origin: Origin | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_tensors(self.config, self.tensors)

    def __repr__(self) -> str:
        return as_text("Erasure", erasure_rows(self))

    def _repr_html_(self) -> str:
        return as_html("Erasure", erasure_rows(self))

    @property
    def concepts(self) -> tuple[Concept, ...]:
        """What is removed, and what it is mapped to."""
        return self.config.concepts

    @property
    def content_hash(self) -> str:
        """SHA-256 over the layers' tensors in float32: the same for a copy under another name, or with a LoRA for others.

        It is computed at each call, as the tensors may be changed at any time, in ways that PyTorch does not count.
        """
        others = self.lora_for_others()
        parts = {
            f"{file}/{key}": value
            for file, items in self.tensors.items()
            for key, value in items.items()
            if not (file == LORA_FILE and key in others)
        }
        return tensor_io.content_hash(parts)

    def layer_tensors(self, layer: LayerSpec) -> dict[str, torch.Tensor]:
        """Return the tensors of one layer, their names without the layer's prefix."""
        return layer_tensors(layer, self.tensors)

    def modifier_tensors(self, layer: LayerSpec) -> dict[str, torch.Tensor]:
        """Return the tensors of one layer's schedule and gate, by name."""
        return modifier_tensors(layer, self.tensors)

    def solve_tensors(self) -> dict[str, torch.Tensor]:
        """Return the text rows that were kept for a joint solve, their names without the prefix; empty where none were."""
        return {} if self.config.solve is None else solve_tensors(self.config.solve, self.tensors)

    def lora_for_others(self) -> dict[str, torch.Tensor]:
        """The factors in the LoRA file that are no layer's: by them stock diffusers acts where this library's layers do."""
        own = {layer.prefix for layer in self.config.layers if layer.file == LORA_FILE}
        items = self.tensors.get(LORA_FILE, {}).items()
        return {name: value for name, value in items if not name.startswith(tuple(own))}

    def rescaled(self, factor: float) -> "Erasure":
        """Return the erasure whose strength 1 is this one's strength `factor`.

        Args:
            factor (`float`): finite and above 0. It is recorded as `published_strength`.
        """
        if not (isinstance(factor, int | float) and 0 < factor < float("inf")):
            raise ErasureInputError(f"An erasure can be published at a strength above 0, not at {factor!r}.")
        if factor == 1:
            return self
        tensors = {name: dict(items) for name, items in self.tensors.items()}
        for layer in self.config.layers:
            scaled = layer_kind(layer.kind).rescaled(self.layer_tensors(layer), factor)
            tensors[layer.file].update({layer.prefix + name: value for name, value in scaled.items()})
        for name, value in self.lora_for_others().items():
            tensors[LORA_FILE][name] = value * factor if name.endswith(UP) else value
        config = dataclasses.replace(self.config, published_strength=self.config.published_strength * factor, files={})
        return Erasure(config, tensors, origin=self.origin)

    def with_base_model(self, repo_id: str, revision: str | None = None) -> "Erasure":
        """Return a copy that names its base model on the Hub, for its card: one that was read from a folder has no id.

        Args:
            repo_id (`str`): the base model's repository, such as `"user/model"`. Its weights are not looked at.
            revision (`str`, *optional*): branch, tag or commit; where `repo_id` is recorded already, by default the one
                that was recorded with it.

        Raises:
            ErasureInputError: that cannot be the id of a repository.
        """
        check_repo_id(repo_id)
        base = self.config.base_model
        if revision is None and base.repo == repo_id:
            revision = base.revision
        try:
            base = dataclasses.replace(base, repo=repo_id, revision=revision)
        except ErasureConfigError as error:
            raise ErasureInputError(f"`revision` cannot be one: {error}") from error
        return dataclasses.replace(self, config=dataclasses.replace(self.config, base_model=base))

    def redacted(self) -> "Erasure":
        """Return a copy without the concepts' names and without everything that states them.

        Targets, anchors, and the method's settings that hold concept text go, and so do diagnostics and results, which
        are reported by name. The weights remain: who holds the text encoder can test guesses against them. An erasure
        made from a redacted one's settings is no longer possible.

        Raises:
            ErasureInputError: a gate compares prompts with the concepts' tokens, which name them.
        """
        if any(layer.gate is not None and layer.gate.tokens for layer in self.config.layers):
            raise ErasureInputError(
                "A gate of this erasure holds the concepts' tokens, so it cannot be published without their names."
            )
        settings = {
            key: value
            for key, value in self.config.method.settings.items()
            if key not in self.config.method.concept_settings
        }
        config = dataclasses.replace(
            self.config,
            method=dataclasses.replace(self.config.method, settings=settings, concept_settings=()),
            concepts=tuple(Concept(None, None) for _ in self.concepts),
            diagnostics={},
            results={},
            redacted=True,
        )
        if config.stock is not None:
            config = dataclasses.replace(config, stock=dataclasses.replace(config.stock, results={}))
        origin = self.origin if self.config.redacted else Withheld(self.origin)
        return Erasure(config, self.tensors, self.source, self.revision, origin)

    def cast(self, dtype: "torch.dtype | str") -> "Erasure":
        """Return a copy with its tensors in another dtype; the additional error is added to `stock.error`.

        Args:
            dtype (`torch.dtype` or `str`): `torch.float32`, `torch.float16` or `torch.bfloat16`, or its name.

        Raises:
            ErasureInputError: another dtype, or a value that the dtype cannot hold.
        """
        dtype = tensor_io.dtype_of(dtype)
        tensors = {
            name: {k: v.to(dtype) if v.dtype.is_floating_point else v for k, v in items.items()}
            for name, items in self.tensors.items()
        }
        if not all(bool(torch.isfinite(v).all()) for items in tensors.values() for v in items.values()):
            raise ErasureInputError(f"Some values are too large for {dtype}; save as float32 (dtype=None).")
        config = self.config
        if config.stock is not None:
            error = low_rank_error(self.tensors[LORA_FILE], tensors[LORA_FILE])
            config = dataclasses.replace(
                config, stock=dataclasses.replace(config.stock, error=config.stock.error + error)
            )
        return Erasure(config, tensors, self.source, self.revision, self.origin)

    # ------------------------------------------------------------------------------------------------- writing

    def to_files(self, *, dtype: torch.dtype | str | None = None, redact_concepts: bool = False) -> dict[str, bytes]:
        """Serialise to `{file name: content}`; the same erasure always gives the same bytes.

        Raises:
            ErasureFileError: what was written does not read back equal.
        """
        config, files = self._as_saved(dtype, redact_concepts)._serialised()
        return {**files, CARD_FILE: render_card(config).encode()}

    def _as_saved(self, dtype: torch.dtype | str | None, redact_concepts: bool) -> "Erasure":
        erasure = self if dtype is None else self.cast(dtype)
        return erasure.redacted() if redact_concepts else erasure

    def _serialised(self) -> tuple[ErasureConfig, dict[str, bytes]]:
        """The configuration as it is saved, and all files but the card, after a look at what they read back as."""
        files = {name: tensor_io.dump(items) for name, items in sorted(self.tensors.items())}
        records = {name: FileRecord(tensor_io.sha256(data), len(data)) for name, data in files.items()}
        config = dataclasses.replace(self.config, files=records)
        text = config.to_json().encode()
        back = Erasure._of(Contents(ErasureConfig.from_json(text), files))
        same = [tensor_io.equal(back.tensors[name], items) for name, items in self.tensors.items()]
        if back.config != config or not all(same):
            raise ErasureFileError("What was written does not read back equal; nothing was saved. Please report this.")
        return config, {**files, CONFIG_FILE: text}

    @takes(SaveOptions)
    def save_pretrained(self, save_directory: str | os.PathLike[str], **options: Unpack[SaveOptions]) -> list[Path]:
        """Save the erasure to a folder: `README.md`, `erasure_config.json` and one or two safetensors files.

        The folder appears whole or not at all. An erasure that is already there is replaced; other files stay, and so does
        what was edited in its card. The card and the pictures that lay where this erasure was read from come along.

        Args:
            save_directory (`str` or `os.PathLike`): the folder.
            options: see [`SaveOptions`].

        Returns:
            `list` of `Path`: the files.

        Raises:
            ErasureInputError: both cards were edited, or a card edited by hand lies where a redacted erasure is to be
                saved; then nothing is changed.
        """
        card = options.get("card")
        check_side(card)
        saved = self._as_saved(options.get("dtype"), options.get("redact_concepts", False))
        redacts = isinstance(saved.origin, Withheld)
        config, files = saved._serialised()
        folder = Path(save_directory)
        files |= beside_files(config, beside_of(saved.origin), folder, card=card, redacts=redacts)
        written = write_folder(folder, files, without=(RECORD_FILE,) if redacts else ())
        return [path for path in written if path.name != RECORD_FILE]

    @takes(CommitOptions, SaveOptions, PushOptions)
    def push_to_hub(self, repo_id: str, **options: Unpack[PushOptions]) -> "CommitInfo":
        """Push the erasure to the Hub in one commit: all of it becomes visible, or nothing.

        A tensor file of an earlier erasure that this one does not have is deleted in the same commit; nothing else is.
        What was edited in the card, here or on the Hub, is kept; then only its metadata is updated. The pictures to which
        the card refers go along.

        Args:
            repo_id (`str`): the repository, such as `"user/no-cat"`; it is created where it does not exist.
            options: see [`PushOptions`].

        Returns:
            [`~huggingface_hub.CommitInfo`]: the commit, with its address and that of the pull request.

        Raises:
            ErasureHubError: the Hub refused it or gave no answer, or somebody else pushed meanwhile.
            ErasureInputError: the base model has no id; the card was edited here and on the Hub; or the repository's
                name, or what it holds, does not allow it.
        """
        base_model = options.get("base_model")
        erasure = self if base_model is None else self.with_base_model(base_model)
        erasure = erasure._as_saved(options.get("dtype"), options.get("redact_concepts", False))
        return push(*erasure._serialised(), erasure.origin, repo_id, options)

    # ------------------------------------------------------------------------------------------------- making

    @classmethod
    def from_layers(
        cls,
        layers: Sequence[Layer],
        *,
        base: Any,
        concepts: Concepts,
        anchors: str | Sequence[str] | None = None,
        method: Method | str = "custom",
        error: float = 0.0,
        rows: Rows | None = None,
        diagnostics: Mapping[str, Any] | None = None,
        results: Mapping[str, Any] | None = None,
    ) -> "Erasure":
        """Make an erasure of layers with their tensors: the one way in which all methods put theirs together.

        Args:
            layers (sequence of [`Layer`]): how it acts. Layers of the kind `"lora"` are what stock diffusers loads.
            base ([`DiffusionPipeline`] or [`~diffusers_erasure.schema.BaseModel`]): what it was made for; of a pipeline the
                fingerprints are taken.
            concepts (`str`, [`Concept`](format.md), or a sequence of them): what it removes.
            anchors (`str` or sequence of `str`, *optional*): what they are mapped to: one for all, or one for each.
            method (`str` or [`~diffusers_erasure.schema.Method`], *optional*, defaults to `"custom"`): how it was made: a
                name, or with settings, seed and versions.
            error (`float`, *optional*, defaults to 0.0): where all layers are LoRAs: the largest relative error of writing
                them down, rounded or truncated.
            rows (*optional*): text rows for a joint solve; see [`combine`].
            diagnostics (`dict`, *optional*): what was computed while it was made, as JSON can hold it.
            results (`dict`, *optional*): what was measured on images.

        Raises:
            ErasureFileError: a layer's tensors are not what its kind takes.
            ErasureConfigError, ErasureInputError: sites, names or numbers that cannot be.

        Examples:

        ```py
        >>> text_map = Layer("text_map", ("encoder_hidden_states",), {"A": a, "D": d})  # x + (x Aᵀ) D, both [n, C]
        >>> erasure = Erasure.from_layers([text_map], base=pipe, concepts="Van Gogh", anchors="art")
        ```
        """
        return cls(
            *assemble(
                layers,
                base=base,
                concepts=concepts,
                anchors=anchors,
                method=method,
                error=error,
                rows=rows,
                diagnostics=diagnostics,
                results=results,
            )
        )

    @classmethod
    def from_lora(
        cls,
        state_dict: Mapping[str, torch.Tensor],
        *,
        base: Any,
        concepts: Concepts,
        alphas: Mapping[str, Any] | None = None,
        metadata: Mapping[str, Any] | None = None,
        derived_from: Sequence[str] = (),
        **known: Any,
    ) -> "Erasure":
        """Make an erasure of a LoRA's tensors, such as those that a training script of your own holds.

        Args:
            state_dict (mapping): the factors, by names as diffusers writes them: `unet.….lora_A.weight` [r, in] and
                `unet.….lora_B.weight` [out, r] (peft's), or diffusers' older ones.
            base, concepts: see [`Erasure.from_layers`].
            alphas (mapping, *optional*): diffusers' `network_alphas`.
            metadata (mapping, *optional*): peft's configuration by component (`{"unet.lora_alpha": 8, …}`). Without it and
                without `alphas` the scale is 1.
            derived_from (sequence of `str`, *optional*): components with which the LoRA was trained and without which it
                would miss, such as `("text_encoder", "tokenizer")`: with another one there it is refused.
            known: `anchors`, `method`, `error`, `diagnostics` and `results` of [`Erasure.from_layers`].

        Raises:
            ErasureFileError: they are no factors of a plain LoRA.

        Examples:

        ```py
        >>> factors = {f"unet.{name}": value for name, value in get_peft_model_state_dict(pipe.unet).items()}
        >>> erasure = Erasure.from_lora(factors, base=pipe, concepts="Van Gogh", method="my-method")
        >>> erasure.push_to_hub("me/no-vangogh")
        ```
        """
        layers = lora_layers(state_dict, alphas, metadata, tuple(derived_from))
        return cls.from_layers(layers, base=base, concepts=concepts, **known)

    # ------------------------------------------------------------------------------------------------- reading

    @classmethod
    def from_files(cls, files: Mapping[str, bytes], *, source: str | None = None) -> "Erasure":
        """Read and validate an erasure from its files' contents.

        Raises:
            ErasureConfigError: the configuration is not valid.
            ErasureFileError: a tensor file is missing, has another size or hash, or holds other tensors than stated.
        """
        if CONFIG_FILE not in files:
            raise ErasureNotFoundError(f"There is no {CONFIG_FILE}.")

        def read(name: str, record: FileRecord) -> bytes:
            if name not in files:
                raise ErasureFileError(f"{name} is missing; {CONFIG_FILE} names it.")
            return check_file(name, files[name], record)

        return cls._of(Contents.read(files[CONFIG_FILE], read), source)

    @classmethod
    def _of(
        cls, contents: Contents, source: str | None = None, revision: str | None = None, origin: Origin | None = None
    ) -> "Erasure":
        tensors = {name: tensor_io.parse(data, name) for name, data in contents.tensors.items()}
        return cls(contents.config, tensors, source, revision, origin)

    @classmethod
    @takes(ReadOptions)
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **options: Unpack[ReadOptions]
    ) -> "Erasure":
        """Read an erasure from a folder or from the Hub, and validate all of it.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): a local folder, a file in it, or a repository id on
                the Hub.
            options: see [`ReadOptions`].

        Raises:
            ErasureNotFoundError: the folder or repository holds no erasure.
            ErasureHubError: the Hub refused access or gave no answer.
            ErasureConfigError, ErasureFileError: what it holds is not valid.
        """
        folder = local_folder(pretrained_model_name_or_path)
        source = str(folder or pretrained_model_name_or_path)
        if folder is None:
            contents, snapshot = fetch(source, options)
            return cls._of(contents, source, snapshot.commit, snapshot)
        subfolder = options.get("subfolder")
        return cls._of(
            read_folder(folder, subfolder), source, None, FolderOrigin(folder.resolve() / (subfolder or ""))
        )
