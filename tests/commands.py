"""The command line, run as a user runs it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from diffusers_erasure import cli


def run(*arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    """A command in a process of its own."""
    command = [sys.executable, "-m", "diffusers_erasure.cli", *arguments]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "160"}
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment, timeout=580)


def invoke(*arguments: str, code: int = 0) -> Any:
    """A command in this process, which ends with this exit code; an error of its is raised."""
    result = CliRunner().invoke(cli.app, list(arguments), env={"COLUMNS": "200"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == code, result.output
    return result


def answer(*arguments: str) -> Any:
    """What a command tells as JSON."""
    return json.loads(invoke(*arguments, "--json").stdout)


def fails(monkeypatch: pytest.MonkeyPatch, capfd: Any, *arguments: str) -> str:
    """The message of a command that fails, as `main` tells it."""
    monkeypatch.setattr(sys, "argv", ["diffusers-erasure", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    captured = capfd.readouterr()
    assert stopped.value.code == 1 and captured.out == ""
    assert "Traceback" not in captured.err and captured.err.count("error: ") == 1
    return " ".join(captured.err.partition("error: ")[2].split())
