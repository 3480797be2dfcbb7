"""The command line in this process, and what one call of it did."""

from __future__ import annotations

import contextlib
import io
import json
import re
from typing import Any, NamedTuple

from quartermap_deploy import cli


class Outcome(NamedTuple):
    """What one call of the command line did: its exit code, and what it wrote to the two streams."""

    code: int
    out: str
    err: str

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
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = cli.main([str(argument) for argument in arguments])
        except SystemExit as leaving:
            code = int(leaving.code or 0)
    return Outcome(code, out.getvalue(), err.getvalue())
