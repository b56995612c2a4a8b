"""Whole erased models: a base model with erasures fused into its weights, saved as any pipeline is saved."""

import dataclasses
import os
import tempfile
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from torch import nn

from .. import compat
from .._version import __version__
from ..base_model import describe_base
from ..cards import card_environment, sealed
from ..errors import ErasureError, ErasureInputError
from ..fingerprints import describe_model
from ..hub.options import CommitOptions, takes
from ..hub.transfer import push_model
from ..live import fusing
from ..live.loaded import components, known, loaded, states
from ..live.requests import Block, within
from ..logging import get_logger
from ..schema import CARD_FILE, SCHEMA, Library
from ..schema.erased_model import KIND, PLACES, Contained, Provenance, contained_config
from ..storage import new_folder


if TYPE_CHECKING:
    from huggingface_hub import CommitInfo

logger = get_logger(__name__)


def export_erased(
    pipe: Any, save_directory: str | os.PathLike[str], names: str | Sequence[str] | None = None
) -> list[Path]:
    """Save a whole erased model: the pipeline with erasures fused into its weights.

    This is the permanent form: whoever has only this model has no base model to go back to. It loads with
    `DiffusionPipeline.from_pretrained`, without this library. Beside the weights lie `erasure_config.json` (which
    erasures it contains, and from which base model it was made) and a card, `README.md`.

    The pipeline itself is afterwards as it was, bit for bit. Loading a contained erasure onto the exported model raises.

    Args:
        pipe ([`DiffusionPipeline`]): the pipeline.
        save_directory (`str` or `os.PathLike`): a new or an empty folder. It appears whole or not at all.
        names (`str` or sequence of `str`, *optional*): the erasures, each at its present strength; all by default. The
            others are not in the exported weights.

    Returns:
        `list` of `Path`: the files.

    Raises:
        ErasureNotFoundError: a name is not loaded.
        ErasureInputError: no erasure is loaded, one is at strength 0 or disabled, the pipeline carries LoRAs, or the
            folder is not empty.
        ErasureCompatibilityError: an erasure cannot be fused; see [`fuse_erasures`].
        ErasureError: the files could not be written; then there is no folder.
    """
    wanted = list(loaded(pipe)) if names is None else [names] if isinstance(names, str) else list(names)
    items = [known(pipe, name) for name in wanted]
    if not items:
        raise ErasureInputError("No erasure is loaded; a model without one is saved with `pipe.save_pretrained`.")
    off = [item.name for item in items if item.strength == 0]
    if off or any(state.view().disabled for state in states(pipe).values()):
        raise ErasureInputError(
            f"Erasures that are off cannot be exported: {off or wanted}. Name others, or set them on."
        )
    models = {name: value for name, value in pipe.components.items() if isinstance(value, nn.Module)}
    carrying = [name for name, model in models.items() if compat.has_adapters(model)]
    if carrying:
        raise ErasureInputError(
            f"The pipeline carries LoRAs on {carrying}, which are no part of an erased model. Call "
            "`pipe.unload_lora_weights()` first; to keep them in the weights, `pipe.fuse_lora()` before that."
        )
    meta = [name for name, model in models.items() if any(p.device.type == "meta" for p in model.parameters())]
    if meta:
        raise ErasureInputError(f"The weights of {meta} are offloaded; call `pipe.remove_all_hooks()` first.")
    folder = Path(save_directory).expanduser().resolve()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ErasureInputError(f"{folder} is not an empty folder; name a new one for the erased model.")
    fusing.plan(pipe, wanted, alone=True)

    base = describe_base(pipe)
    contains = tuple(
        Contained(item.name, item.strength, item.content_hash, contained_config(item.erasure.config)) for item in items
    )
    with fusing.unfused(pipe):
        fusing.merge(pipe, wanted, alone=True)
        try:
            changed = {name: components(pipe)[name] for name, state in states(pipe).items() if state.fused}
            provenance = Provenance(
                schema=SCHEMA,
                kind=KIND,
                library=Library("diffusers_erasure", __version__),
                base_model=base,
                erased_model={
                    name: describe_model(compat.unwrap_compiled(model), as_fused=True)
                    for name, model in changed.items()
                },
                contains=contains,
            )
            files = _write(pipe, folder, provenance)
        finally:
            fusing.unfuse_erasures(pipe)
    logger.info("Exported the model with the erasures %s to %s.", wanted, folder)
    return files


@takes(CommitOptions)
def push_erased_model(
    pipe: Any, repo_id: str, names: str | Sequence[str] | None = None, **options: Unpack[CommitOptions]
) -> "CommitInfo":
    """Push the pipeline with erasures fused into its weights to the Hub, in one commit. See [`export_erased`].

    Args:
        pipe ([`DiffusionPipeline`]): the pipeline, which is afterwards as it was.
        repo_id (`str`): the repository, such as `"user/model-without-cats"`; created where it does not exist.
        names (`str` or sequence of `str`, *optional*): the erasures; all by default.
        options: see [`CommitOptions`].

    Returns:
        [`~huggingface_hub.CommitInfo`]: the commit.

    Raises:
        ErasureHubError: the Hub refused it or gave no answer, or somebody else pushed meanwhile.
        ErasureInputError: the repository holds something else; or see [`export_erased`].
    """
    with tempfile.TemporaryDirectory(prefix="erased-model-") as work:
        folder = Path(work) / "model"
        export_erased(pipe, folder, names)
        return push_model(folder, repo_id, options)


def _write(pipe: Any, folder: Path, provenance: Provenance) -> list[Path]:
    """The folder with all of its files, or none."""
    text = provenance.to_json()
    Provenance.from_json(text.encode())  # what is written can be read
    try:
        with new_folder(folder) as fresh:
            with within(Block(pipe, exact={})):  # what acts besides is not to be in the weights
                pipe.save_pretrained(fresh)
            for place in PLACES:
                if (fresh / place).parent.is_dir():
                    (fresh / place).write_text(text, encoding="utf-8")
            (fresh / CARD_FILE).write_text(render_model_card(provenance), encoding="utf-8")
            names = sorted(path.relative_to(fresh) for path in fresh.rglob("*") if path.is_file())
    except OSError as error:
        raise ErasureError(f"Exporting to {folder} failed, nothing was written there: {error}") from error
    return [folder / name for name in names]


def render_model_card(provenance: Provenance) -> str:
    """Render the card of a whole erased model.

    Args:
        provenance ([`Provenance`]): what the model contains.

    Returns:
        `str`: the text of `README.md`. Concept strings are escaped for YAML and Markdown.
    """
    source = resources.files("diffusers_erasure.hub_cards").joinpath("erased_model.md.j2").read_text(encoding="utf-8")
    return sealed(
        card_environment()
        .from_string(source)
        .render(**{field.name: getattr(provenance, field.name) for field in dataclasses.fields(provenance)})
    )
