"""Processes of their own, forked from one that has imported the libraries, which would take each of them ten seconds.

They have their own arguments, environment, output and signals, and can be interrupted and killed. Only what a library
reads from the environment as it is imported is the same for all: what tests/conftest.py says, and no network.
"""

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Mapping
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import pytest


PRELOADED = [
    "diffusers_erasure.cli",
    "diffusers_erasure.training.loop",
    "tests.helpers",
]


class Fork:
    """A process that runs a function of a test module, or of this one.

    Args:
        folder (`Path`): for what it prints; made when it is missing.
        function (`Callable`): what it runs, found by its module and name as pickle finds it.
        arguments: for the function.
        environment (`Mapping`, *optional*): added to that of the tests.
    """

    def __init__(
        self, folder: Path, function: Callable[..., Any], *arguments: Any, environment: Mapping[str, str] | None = None
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.files = folder / "stdout", folder / "stderr"
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(PRELOADED)
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("HF_HUB_OFFLINE", "1")
            patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))
            forkserver.ensure_running()
            given = {**os.environ, **(environment or {})}
        self.process = context.Process(target=_run, args=(self.files, os.getcwd(), given, function, arguments))
        self.process.start()

    @property
    def is_running(self) -> bool:
        return self.process.is_alive()

    def send(self, number: signal.Signals) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def wait(self, timeout: float = 300) -> int:
        """The exit status, negative where a signal ended it."""
        self.process.join(timeout)
        if self.process.exitcode is None:
            self.process.kill()
            raise AssertionError(f"still running after {timeout} s: {self.errors}")
        return self.process.exitcode

    @property
    def output(self) -> str:
        return self.files[0].read_text(encoding="utf-8")

    @property
    def errors(self) -> str:
        return self.files[1].read_text(encoding="utf-8")


def cli(*arguments: str) -> None:
    """The command `diffusers-erasure`."""
    from diffusers_erasure.cli import main

    sys.argv = ["diffusers-erasure", *arguments]
    main()


def _run(
    files: tuple[Path, Path],
    folder: str,
    environment: dict[str, str],
    function: Callable[..., Any],
    arguments: tuple[Any, ...],
) -> None:
    for number, path in enumerate(files, start=1):
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(handle, number)
        os.close(handle)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    function(*arguments)
