"""Checkpoints: one safetensors file each, written whole or not at all, that knows what it belongs to."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from ..errors import ErasureCompatibilityError, ErasureFileError, ErasureInputError, ErasureTrainingError
from ..logging import get_logger
from ..storage import write_file
from ..tensors import content_hash


logger = get_logger(__name__)

KEPT = 2
_NAME = re.compile(r"checkpoint-(\d{7})\.safetensors", re.ASCII)
FORMAT = 1
STAGES = "stage-*"  # folders of a run in several stages
POOL_FILE = "pool-of-the-base.safetensors"


class Checkpoints:
    """The checkpoints of one run in a folder.

    Args:
        folder: where they lie; it is made with the first one.
        identity: what decides about the result: method, settings, concepts, processes (JSON).
        base: the base model's fingerprint (JSON).
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], base: Mapping[str, Any]) -> None:
        self.folder = folder
        self.identity = json.loads(json.dumps(identity))
        self.base = json.loads(json.dumps(base))

    def steps(self) -> list[int]:
        """Steps of which there is a checkpoint, in order."""
        if not self.folder.is_dir():
            return []
        return sorted(int(match[1]) for path in self.folder.iterdir() if (match := _NAME.fullmatch(path.name)))

    def path(self, step: int) -> Path:
        """The file of a step's checkpoint."""
        return self.folder / f"checkpoint-{step:07d}.safetensors"

    def save(self, step: int, tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any]) -> Path:
        """Save a checkpoint, and delete those before the last two.

        Raises:
            ErasureTrainingError: it cannot be written; the earlier ones stay.
        """
        path = self.write(self.path(step).name, tensors, {**state, "step": step})
        for old in self.steps()[:-KEPT]:
            self.path(old).unlink(missing_ok=True)
        return path

    def write(self, name: str, tensors: Mapping[str, torch.Tensor], state: Mapping[str, Any]) -> Path:
        """Write tensors and plain values to a file of the folder.

        Raises:
            ErasureTrainingError: it cannot be written; what was there stays.
        """
        path = self.folder / name
        plain = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
        about = {
            "format": FORMAT,
            "identity": self.identity,
            "base": self.base,
            "state": dict(state),
            "content": content_hash(plain),
        }
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            data = safetensors.torch.save(plain, metadata={"diffusers_erasure": json.dumps(about)})
            write_file(path, data)
        except OSError as error:
            good = self.steps()
            last = f"the last good one is of step {good[-1]}" if good else "there is none yet"
            raise ErasureTrainingError(
                f"The checkpoint {path} could not be written ({error.strerror or error}); {last}. Make room, and start again "
                "with `resume=True` (`--resume`)."
            ) from error
        return path

    def latest(self) -> tuple[dict[str, torch.Tensor], dict[str, Any]] | None:
        """The newest checkpoint's tensors and values; `None` where there is none.

        Raises:
            ErasureFileError: it is damaged.
            ErasureInputError: it belongs to other settings or concepts.
            ErasureCompatibilityError: it belongs to another base model.
        """
        steps = self.steps()
        if not steps:
            return None
        try:
            return self.read(self.path(steps[-1]).name)
        except ErasureFileError as error:
            good = f"; delete it to go on from step {steps[-2]}" if len(steps) > 1 else "; delete it to start again"
            raise ErasureFileError(f"{error}{good}.") from error

    def read(self, name: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """Read a file of [`write`], after the checks of [`latest`]."""
        path = self.folder / name
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                about = json.loads((file.metadata() or {})["diffusers_erasure"])
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (not a dict)
            if about["format"] != FORMAT or about["content"] != content_hash(tensors):
                raise ValueError("its content is not what was written")
            state, identity, base = about["state"], about["identity"], about["base"]
        except Exception as error:  # whatever a damaged file makes the readers raise
            raise ErasureFileError(f"The checkpoint {path} is damaged ({str(error)[:120]})") from error
        if base != self.base:
            raise ErasureCompatibilityError(
                f"The checkpoint {path} belongs to a run on another base model. Give that one, or another checkpoint folder."
            )
        if _stated(identity) != _stated(self.identity):
            raise ErasureInputError(
                f"The checkpoint {path} belongs to another run: {_difference(identity, self.identity)}. Use the same "
                "settings to go on, or another checkpoint folder to start a new run."
            )
        return tensors, state


def clear(folder: Path) -> None:
    """Delete a folder's checkpoints, and those of its stages; sample images stay."""
    if not folder.is_dir():
        return
    for stage in folder.glob(STAGES):
        clear(stage)
    for path in folder.iterdir():
        if _NAME.fullmatch(path.name) or path.name == POOL_FILE:
            path.unlink(missing_ok=True)
    if not any(folder.iterdir()):
        folder.rmdir()


def _stated(value: Any) -> Any:
    """Without what stands for nothing: earlier versions wrote null where 0 or an empty text is written now."""
    if isinstance(value, dict):
        return {key: _stated(each) for key, each in value.items() if each or isinstance(each, dict)}
    return value


def _difference(stored: Any, own: Any, name: str = "run") -> str:
    """The first thing in which two JSON values differ, for a message."""
    if isinstance(stored, dict) and isinstance(own, dict):
        for key in sorted({*stored, *own}):
            if stored.get(key) != own.get(key):
                return _difference(stored.get(key), own.get(key), key)
    return f"`{name}` was {str(stored)[:80]}, and is now {str(own)[:80]}"
