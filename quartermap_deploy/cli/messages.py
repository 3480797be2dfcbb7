"""Errors and warnings, on standard error."""

from __future__ import annotations

import errno
import sys

from quartermap_deploy.plain_text import printable


def message(kind: str, text: str) -> None:
    """Write an error or a warning to standard error, as one message; further lines of it are set in.

    So a name in somebody's file cannot begin a line that looks like another message.
    """
    shown = printable(text, None, lines=True).replace("\n", "\n    ")
    print(f"quartermap: {kind}: {shown}", file=sys.stderr, flush=True)


def about_users_files(error: OSError) -> bool:
    """Whether an error of the operating system is about the user's files and disks, not a defect of ours."""
    return error.errno in {
        errno.EACCES,
        errno.EPERM,
        errno.EROFS,
        errno.ENOSPC,
        errno.EDQUOT,
        errno.ENOTDIR,
        errno.EISDIR,
        errno.ENAMETOOLONG,
    }
