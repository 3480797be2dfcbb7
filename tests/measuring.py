"""What the tests of `compare` and `ablate` share: the command line in this process, and faults planted on the way."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import re
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from helpers import traced_digits

from quartermap_deploy import cli
from quartermap_deploy.evaluation import resumable

MODEL = "vmamba_digits"


class Outcome:
    """What one call of the command line did."""

    def __init__(self, code: int, out: str, err: str) -> None:
        self.code, self.out, self.err = code, out, err

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    @property
    def messages(self) -> list[str]:
        """What was said on standard error, without the progress."""
        return [line for line in self.err.splitlines() if not re.match(r"\[ *\d+\.\d s\] ", line)]


def call(*arguments: object) -> Outcome:
    """Run the command line in this process; argparse leaves by SystemExit, which is its exit code."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.ExitStack() as stack:
        # Where tests run side by side, COLUMNS is 80, and long names would be broken.
        stack.enter_context(mock.patch.dict(os.environ, COLUMNS="160"))
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        try:
            code = cli.main([str(argument) for argument in arguments])
        except SystemExit as leaving:
            code = int(leaving.code or 0)
    return Outcome(code, out.getvalue(), err.getvalue())


def refused(*arguments: object) -> str:
    """Run a command that must be refused with exit code 2; returns its one message."""
    outcome = call(*arguments)
    assert outcome.code == 2, outcome.err
    assert outcome.out == ""
    assert len(outcome.messages) == 1 and outcome.messages[0].startswith("quartermap: error: "), outcome.err
    return outcome.messages[0]


def traced_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the digits model be traced once for all tests of a run; what tracing gives is the same."""
    from quartermap_deploy.frontend import exporter

    monkeypatch.setattr(exporter, "trace", lambda model, shape, **settings: traced_digits())


def full_disk(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Let the disk be full for results after some files were written."""
    written = []
    write = resumable.write_whole

    def write_whole(path: Path, data: bytes) -> None:
        if len(written) >= after:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        written.append(path)
        write(path, data)

    monkeypatch.setattr(resumable, "write_whole", write_whole)
