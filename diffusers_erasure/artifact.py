"""`Erasure`: the artefact that removes concepts from a base model, in memory, on disk and on the Hub."""

import dataclasses
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from . import tensors as tensor_io
from .cards import render_card
from .errors import ErasureConfigError, ErasureError, ErasureFileError, ErasureInputError, ErasureNotFoundError
from .layers import layer_kind
from .logging import get_logger
from .schema import (
    CARD_FILE,
    CONFIG_FILE,
    LORA_FILE,
    MAX_CONFIG_BYTES,
    TENSOR_FILES,
    Concept,
    ErasureConfig,
    FileRecord,
    LayerSpec,
    SolveSpec,
)


if TYPE_CHECKING:
    from huggingface_hub import CommitInfo
    from PIL import Image

logger = get_logger(__name__)


@dataclass
class Erasure:
    """A configuration and its tensors.

    Attributes:
        config ([`ErasureConfig`]): what the erasure removes, how it was made, for which base model, and its layers.
        tensors (`dict`): for each tensor file its tensors by name, on the CPU.
        source (`str`, *optional*): the folder or repository that it was read from.
        revision (`str`, *optional*): the commit that it was read from.
    """

    config: ErasureConfig
    tensors: dict[str, dict[str, torch.Tensor]] = field(repr=False)
    source: str | None = None
    revision: str | None = None

    def __post_init__(self) -> None:
        expected = self.config.tensor_files
        if set(self.tensors) != expected:
            raise ErasureFileError(f"The tensors lie in {sorted(expected)}, but there is {sorted(self.tensors)}.")
        used: dict[str, set[str]] = {name: set() for name in expected}
        for layer in self.config.layers:
            own = self.layer_tensors(layer)
            layer_kind(layer.kind).validate(layer, own)
            used[layer.file] |= {layer.prefix + name for name in own}
            odd = [layer.prefix + name for name, value in own.items() if not bool(torch.isfinite(value).all())]
            if odd:
                raise ErasureFileError(f"{layer.file}: {odd[0][:200]!r} has values that are not finite.")
        if self.config.solve is not None:
            rows = self.solve_tensors()
            check_solve(self.config.solve, rows)
            used[self.config.solve.file] |= {self.config.solve.prefix + name for name in rows}
        for name, names in used.items():
            strangers = sorted(set(self.tensors[name]) - names)
            if strangers:
                raise ErasureFileError(f"{name} holds tensors that no layer uses: {[s[:120] for s in strangers[:3]]}.")

    @property
    def concepts(self) -> tuple[Concept, ...]:
        """What is removed, and what it is mapped to."""
        return self.config.concepts

    @property
    def content_hash(self) -> str:
        """SHA-256 over the layers' tensors in float32: the same for a copy under another name."""
        parts = {f"{file}/{key}": value for file, items in self.tensors.items() for key, value in items.items()}
        return tensor_io.content_hash(parts)

    def layer_tensors(self, layer: LayerSpec) -> dict[str, torch.Tensor]:
        """Return the tensors of one layer, their names without the layer's prefix."""
        items = self.tensors[layer.file].items()
        return {key.removeprefix(layer.prefix): value for key, value in items if key.startswith(layer.prefix)}

    def solve_tensors(self) -> dict[str, torch.Tensor]:
        """Return the text rows that were kept for a joint solve, their names without the prefix; empty where none were."""
        spec = self.config.solve
        items = {} if spec is None else self.tensors[spec.file]
        prefix = "" if spec is None else spec.prefix
        return {key.removeprefix(prefix): value for key, value in items.items() if key.startswith(prefix)}

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
        config = dataclasses.replace(self.config, published_strength=self.config.published_strength * factor, files={})
        return Erasure(config, tensors)

    def redacted(self) -> "Erasure":
        """Return a copy without the concepts' names and without everything that states them.

        Targets, anchors, and the method's settings that hold concept text go, and so do diagnostics and results, which
        are reported by name. The weights remain: who holds the text encoder can test guesses against them. An erasure
        made from a redacted one's settings is no longer possible.
        """
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
        return Erasure(config, self.tensors, self.source, self.revision)

    def cast(self, dtype: torch.dtype) -> "Erasure":
        """Return a copy with its tensors in another dtype; the additional error is added to `stock.max_error`.

        Args:
            dtype (`torch.dtype`): `torch.float32`, `torch.float16` or `torch.bfloat16`.

        Raises:
            ErasureInputError: another dtype, or a value that the dtype cannot hold.
        """
        if dtype not in tensor_io.DTYPES:
            raise ErasureInputError(f"Tensors can be saved as float32, float16 or bfloat16, not as {dtype}.")
        tensors = {name: {k: v.to(dtype) for k, v in items.items()} for name, items in self.tensors.items()}
        if not all(bool(torch.isfinite(v).all()) for items in tensors.values() for v in items.values()):
            raise ErasureInputError(f"Some values are too large for {dtype}; save as float32 (dtype=None).")
        config = self.config
        if config.stock is not None:
            error = low_rank_error(self.tensors[LORA_FILE], tensors[LORA_FILE])
            config = dataclasses.replace(
                config, stock=dataclasses.replace(config.stock, max_error=config.stock.max_error + error)
            )
        return Erasure(config, tensors, self.source, self.revision)

    # ------------------------------------------------------------------------------------------------- writing

    def to_files(self, *, dtype: torch.dtype | None = None, redact_concepts: bool = False) -> dict[str, bytes]:
        """Serialise to `{file name: content}`; the same erasure always gives the same bytes.

        Raises:
            ErasureFileError: what was written does not read back equal.
        """
        erasure = self if dtype is None else self.cast(dtype)
        erasure = erasure.redacted() if redact_concepts else erasure
        files = {name: tensor_io.dump(items) for name, items in sorted(erasure.tensors.items())}
        records = {name: FileRecord(tensor_io.sha256(data), len(data)) for name, data in files.items()}
        config = dataclasses.replace(erasure.config, files=records)
        files[CONFIG_FILE] = config.to_json().encode()
        back = Erasure.from_files(files)
        if back.config != config or back.content_hash != erasure.content_hash:
            raise ErasureFileError("What was written does not read back equal; nothing was saved. Please report this.")
        files[CARD_FILE] = render_card(config).encode()
        return files

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        *,
        dtype: torch.dtype | None = None,
        redact_concepts: bool = False,
    ) -> list[Path]:
        """Save the erasure to a folder: `README.md`, `erasure_config.json` and one or two safetensors files.

        The folder appears whole or not at all. An erasure that is already there is replaced; other files stay.

        Args:
            save_directory (`str` or `os.PathLike`): the folder.
            dtype (`torch.dtype`, *optional*): dtype of the tensors; as they are by default (float32).
            redact_concepts (`bool`, *optional*, defaults to `False`): leave out the concepts' names.

        Returns:
            `list` of `Path`: the files.
        """
        files = self.to_files(dtype=dtype, redact_concepts=redact_concepts)
        return write_folder(Path(save_directory), files)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        create_pr: bool = False,
        commit_message: str | None = None,
        dtype: torch.dtype | None = None,
        redact_concepts: bool = False,
        grid: "Image.Image | None" = None,
        license: str | None = None,
    ) -> "CommitInfo":
        """Push the erasure to the Hub in one commit: all of it becomes visible, or nothing.

        A tensor file of an earlier erasure that this one does not have is deleted in the same commit. A card whose text
        was edited by hand is kept; then only its metadata is updated.

        Args:
            repo_id (`str`): the repository, such as `"user/no-cat"`; it is created where it does not exist.
            private (`bool`, *optional*): whether a repository that is created is private; the account's default
                otherwise. `True` with a repository that exists and is public is refused.
            token (`str` or `bool`, *optional*): the token; the stored one by default.
            revision (`str`, *optional*): the branch, created from the main one where it does not exist; main by default.
            create_pr (`bool`, *optional*, defaults to `False`): propose the commit as a pull request.
            commit_message (`str`, *optional*): the commit's message.
            dtype (`torch.dtype`, *optional*): dtype of the tensors; as they are by default (float32).
            redact_concepts (`bool`, *optional*, defaults to `False`): leave out the concepts' names.
            grid (`PIL.Image.Image`, *optional*): a picture for the card, of images before and after.
            license (`str`, *optional*): identifier of the licence, for the card's metadata.

        Returns:
            [`~huggingface_hub.CommitInfo`]: the commit, with its address and that of the pull request.

        Raises:
            ErasureHubError: the Hub refused it or gave no answer, or somebody else pushed meanwhile.
            ErasureInputError: the repository's name, or what it holds, does not allow it.
        """
        from .hub import push

        return push(
            self,
            repo_id,
            private=private,
            token=token,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message,
            dtype=dtype,
            redact_concepts=redact_concepts,
            grid=grid,
            license=license,
        )

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
        config = ErasureConfig.from_json(files[CONFIG_FILE])
        needed = config.tensor_files
        if set(config.files) != needed:
            raise ErasureConfigError(f"`files` names {sorted(config.files)}, but the tensors lie in {sorted(needed)}.")
        tensors = {}
        for name in sorted(needed):
            if name not in files:
                raise ErasureFileError(f"{name} is missing; {CONFIG_FILE} names it.")
            data, record = files[name], config.files[name]
            if len(data) != record.size or tensor_io.sha256(data) != record.sha256:
                raise ErasureFileError(
                    f"{name} is not the file that {CONFIG_FILE} names: {len(data)} bytes instead of {record.size}, or "
                    "another SHA-256. It was cut short or changed; download or save it again."
                )
            tensors[name] = tensor_io.parse(data, name)
        return cls(config, tensors, source)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        subfolder: str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | os.PathLike[str] | None = None,
        force_download: bool = False,
        local_files_only: bool = False,
    ) -> "Erasure":
        """Read an erasure from a folder or from the Hub, and validate all of it.

        Args:
            pretrained_model_name_or_path (`str` or `os.PathLike`): a local folder, or a repository id on the Hub.
            subfolder (`str`, *optional*): a folder within it.
            revision (`str`, *optional*): branch, tag or commit. It is resolved once, and all files come from there.
            token (`str` or `bool`, *optional*): token for private and gated repositories; the stored one by default.
            cache_dir (`str` or `os.PathLike`, *optional*): cache folder, the Hub's default otherwise.
            force_download (`bool`, *optional*, defaults to `False`): download again what is cached.
            local_files_only (`bool`, *optional*, defaults to `False`): use the cache alone.

        Raises:
            ErasureNotFoundError: the folder or repository holds no erasure.
            ErasureHubError: the Hub refused access or gave no answer.
            ErasureConfigError, ErasureFileError: what it holds is not valid.
        """
        folder, commit = Path(pretrained_model_name_or_path), None
        source = str(pretrained_model_name_or_path)
        if folder.is_dir():
            files = read_folder(folder, subfolder)
        else:
            from .hub import fetch

            files, commit = fetch(
                source,
                subfolder=subfolder,
                revision=revision,
                token=token,
                cache_dir=cache_dir,
                force_download=force_download,
                local_files_only=local_files_only,
            )
        erasure = cls.from_files(files, source=source)
        erasure.revision = commit
        return erasure


def check_solve(spec: SolveSpec, tensors: Mapping[str, torch.Tensor]) -> None:
    """Check names and shapes of the rows that are kept for a joint solve.

    Raises:
        ErasureFileError: a tensor is missing, unexpected, not finite, or of a shape that cannot be right.
    """
    known = {
        f"{name}.{part}" for name in spec.rows for part in ("targets", "anchors", "probe_targets", "probe_anchors")
    }
    strangers = sorted(set(tensors) - known)
    if strangers:
        raise ErasureFileError(f"{spec.file} holds unknown rows for a joint solve: {strangers[0][:120]!r}.")
    for name in spec.rows:
        parts = {
            part: tensors.get(f"{name}.{part}") for part in ("targets", "anchors", "probe_targets", "probe_anchors")
        }
        shapes = {part: () if value is None else tuple(value.shape) for part, value in parts.items()}
        rows, width = shapes["targets"] if len(shapes["targets"]) == 2 else (0, 0)
        fit = rows > 0 and shapes["anchors"] in ((1, width), (rows, width))
        probes = [shapes["probe_targets"], shapes["probe_anchors"]]
        fit = fit and (
            probes == [(), ()] or (len(probes[0]) == 2 and probes[0] == probes[1] and probes[0][1] == width)
        )
        if not fit:
            raise ErasureFileError(
                f"{spec.file}: the rows {name!r} for a joint solve are missing or do not fit together."
            )
    odd = [name for name, value in tensors.items() if not bool(torch.isfinite(value).all())]
    if odd:
        raise ErasureFileError(f"{spec.file}: {odd[0]!r} has values that are not finite.")


def low_rank_error(exact: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> float:
    """Largest |B'A' - BA| / |BA| over the sites of a LoRA file (Frobenius norms, float64, no product formed).

    B'A' - BA = dB A' + B dA, so that its square is tr(dB^T dB A' A'^T) + 2 tr(dB^T B dA A'^T) + tr(B^T B dA dA^T).
    """
    worst = 0.0
    for name in exact:
        if not name.endswith(".lora_A.weight"):
            continue
        partner = name.replace(".lora_A.", ".lora_B.")
        a, b = exact[name].double().flatten(1), exact[partner].double().flatten(1)
        a2, b2 = other[name].double().flatten(1), other[partner].double().flatten(1)
        da, db, gram = a2 - a, b2 - b, b.T @ b
        terms = (db.T @ db) * (a2 @ a2.T) + 2 * (db.T @ b) * (a2 @ da.T) + gram * (da @ da.T)
        square, norm = float(terms.sum()), float((gram * (a @ a.T)).sum())
        if norm > 0:
            worst = max(worst, max(square, 0.0) ** 0.5 / norm**0.5)
    return worst


def read_folder(folder: Path, subfolder: str | None = None) -> dict[str, bytes]:
    """Read an erasure's files from a local folder; only the schema's names, and nothing outside the folder.

    Raises:
        ErasureNotFoundError: there is no configuration.
        ErasureFileError: a file is missing, lies outside the folder, or is larger than stated.
    """
    root = folder.resolve()
    place = (root / subfolder).resolve() if subfolder else root
    if not place.is_relative_to(root):
        raise ErasureInputError(f"`subfolder` must lie inside {folder}, not at {subfolder!r}.")
    if not (place / CONFIG_FILE).is_file():
        hint = (
            ' It holds a plain LoRA; load it as one with `load_erasure(..., method="lora")`.'
            if any(place.glob("*.safetensors"))
            else ""
        )
        raise ErasureNotFoundError(f"{place} holds no erasure: there is no {CONFIG_FILE}.{hint}")
    files = {CONFIG_FILE: _read_inside(place, CONFIG_FILE, MAX_CONFIG_BYTES)}
    for name, record in ErasureConfig.from_json(files[CONFIG_FILE]).files.items():
        files[name] = _read_inside(place, name, record.size)
    missing = ErasureConfig.from_json(files[CONFIG_FILE]).tensor_files - set(files)
    if missing:
        raise ErasureConfigError(f"`files` does not name {sorted(missing)}, where tensors lie.")
    return files


def _read_inside(folder: Path, name: str, limit: int) -> bytes:
    path = folder / name
    try:
        real = path.resolve(strict=True)
        if not real.is_file() or not (real.is_relative_to(folder) or real.parent == _blobs(folder)):
            raise ErasureFileError(f"{path} is no plain file, or a link that leads out of its folder.")
        size = real.stat().st_size
        if size > limit:
            raise ErasureFileError(f"{path} has {size} bytes; at most {limit} were expected.")
        with open(real, "rb") as handle:
            return handle.read(limit + 1)
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle
        raise ErasureFileError(f"{path} is missing or cannot be read: {error}") from error


def _blobs(folder: Path) -> Path | None:
    """Where the Hub's cache keeps the content of a snapshot's files: `models--x--y/snapshots/<commit>` links there."""
    for place in (folder, *folder.parents):
        repo = place.parent.parent
        if place.parent.name == "snapshots" and repo.name.startswith("models--"):
            return repo / "blobs"
    return None


def write_folder(folder: Path, files: Mapping[str, bytes]) -> list[Path]:
    """Write files so that the folder holds all of them or none: a temporary folder beside it, then a rename."""
    folder = folder.expanduser().resolve()  # behind a link, so that the link stays
    if folder.exists() and not folder.is_dir():
        raise ErasureInputError(f"{folder} is a file; name a folder.")
    if folder.exists() and folder.samefile(Path.cwd()):
        raise ErasureInputError("The current folder cannot be replaced as a whole; name a new folder in it.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        fresh, old = work / "new", work / "old"
        fresh.mkdir()
        for name, data in files.items():
            with open(fresh / name, "wb") as handle:
                handle.write(data)
                handle.flush()
                os.fsync(handle.fileno())
        for name, data in files.items():
            if (fresh / name).read_bytes() != data:
                raise ErasureFileError(f"{fresh / name} does not read back as it was written; nothing was saved.")
        if folder.exists():
            os.rename(folder, old)
            foreign = [e.name for e in old.iterdir() if e.name not in (*TENSOR_FILES, CONFIG_FILE, CARD_FILE)]
            try:
                for name in foreign:  # what is not ours stays
                    os.rename(old / name, fresh / name)
                os.rename(fresh, folder)
            except BaseException:
                for name in foreign:
                    if not os.path.lexists(old / name):
                        os.rename(fresh / name, old / name)
                os.rename(old, folder)
                raise
        else:
            os.rename(fresh, folder)
    except OSError as error:
        raise ErasureError(f"Saving to {folder} failed, nothing was changed there: {error}") from error
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return [folder / name for name in files]
