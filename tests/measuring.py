"""What the tests of `compare` and `ablate` share: the command line in this process, and faults planted on the way."""

from __future__ import annotations

import errno
import functools
import os
from pathlib import Path
from unittest import mock

import command_line
import pytest
from command_line import Outcome

from quartermap_deploy.evaluation import resumable
from quartermap_deploy.sources.architectures import ArchitectureSource, card_source

MODEL = "vmamba_digits"


def call(*arguments: object) -> Outcome:
    """Run the command line as into a wide pipe: where tests run side by side COLUMNS is 80, which breaks names."""
    with mock.patch.dict(os.environ, COLUMNS="160"):
        return command_line.call(*arguments)


def refused(*arguments: object) -> str:
    """Run a command that must be refused with exit code 2; returns its one message."""
    outcome = call(*arguments)
    assert outcome.code == 2, outcome.err
    assert outcome.out == ""
    assert len(outcome.messages) == 1 and outcome.messages[0].startswith("quartermap: error: "), outcome.err
    return outcome.messages[0]


@functools.cache
def digits_source() -> ArchitectureSource:
    """The digits model as a source model; shared, so it must not be changed."""
    return card_source(MODEL)


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
