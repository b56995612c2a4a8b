"""Set before anything imports a hub library, as those read their environment once, when they are imported."""

import logging
import os
import shutil
import sys
import tempfile


_early = sorted({"diffusers", "huggingface_hub", "transformers"} & sys.modules.keys())
if _early:
    raise RuntimeError(f"{', '.join(_early)} imported before tests/conftest.py could set the environment")

_HF_HOME = tempfile.mkdtemp(prefix="diffusers-erasure-hf-home-")
os.environ.update(
    HF_HOME=_HF_HOME,
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_XET="1",
    TOKENIZERS_PARALLELISM="false",
    # Two workers share two cores; and what a test's other processes compute must be summed as this one sums it.
    OMP_NUM_THREADS="1",
    MKL_NUM_THREADS="1",
    OPENBLAS_NUM_THREADS="1",
)
# A developer's own account, cache and endpoint have no part in a test.
for _name in (
    "HF_ENDPOINT",
    "HF_HUB_CACHE",
    "HF_TOKEN",
    "HF_TOKEN_PATH",
    "HUGGINGFACE_HUB_CACHE",
    "HUGGING_FACE_HUB_TOKEN",
):
    os.environ.pop(_name, None)

from typing import TYPE_CHECKING  # noqa: E402

import pytest  # noqa: E402
import torch  # noqa: E402


if TYPE_CHECKING:
    from collections.abc import Iterator

    from diffusers import DiffusionPipeline

    from tests.mini_hub import Hub

torch.set_num_threads(1)  # in case that torch was imported before


def pytest_unconfigure() -> None:
    shutil.rmtree(_HF_HOME, ignore_errors=True)


@pytest.fixture(autouse=True)
def loggers_as_they_were() -> "Iterator[None]":
    """Commands that are run in this process set the library's loggers: which tests follow must not matter."""
    names = [
        name for name in (*logging.root.manager.loggerDict, "") if name.startswith("diffusers_erasure") or not name
    ]
    before = {name: logging.getLogger(name).level for name in names}
    library = logging.getLogger("diffusers_erasure")
    handlers = list(library.handlers)
    yield
    library.handlers[:] = handlers
    for name in [name for name in logging.root.manager.loggerDict if name.startswith("diffusers_erasure")]:
        logging.getLogger(name).setLevel(before.get(name, logging.NOTSET))


@pytest.fixture
def demo_pipe() -> "DiffusionPipeline":
    """A fresh copy of the embedded model."""
    from diffusers_erasure import demo

    return demo.load_pipeline()


@pytest.fixture
def pipe() -> "DiffusionPipeline":
    """A fresh tiny pipeline with random weights; always the same."""
    from tests.helpers import tiny_sd_pipe

    return tiny_sd_pipe()


@pytest.fixture(scope="module")
def hub() -> "Iterator[Hub]":
    """A Hub of its own for a file's tests."""
    from tests.mini_hub import Hub

    with Hub() as server:
        yield server
