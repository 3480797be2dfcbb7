"""Folders that are one user's own: native code and caches are taken from these, and from nowhere beside a file.

What lies in them is believed, so nobody else may be able to put anything there.
"""

from __future__ import annotations

import os
import stat
import sys
from pathlib import Path
from typing import Literal

from quartermap_deploy.errors import TrustError
from quartermap_deploy.plain_text import command, printable

HOME_VARIABLE = "QUARTERMAP_HOME"
"""Names a folder that holds both kinds, in the place of the usual ones."""
OWNER_ONLY = 0o700
_NOBODY = 65534
"""Whom Linux names as the owner where a container does not know the real one."""

Kind = Literal["plugins", "cache"]


def own_folder(kind: Kind) -> Path | None:
    """Where a user's own plugins or caches lie; the folder need not be there yet. None where nobody knows a home.

    Raises:
        TrustError: if the environment names a relative path, which would lead elsewhere wherever a command is called.
    """
    named = os.environ.get(HOME_VARIABLE)
    if named:
        if not os.path.isabs(named):
            raise TrustError(
                f"the environment variable {HOME_VARIABLE} is {printable(named)!r}; expected a path from / on, so that "
                "it means the same folder wherever a command is called"
            )
        return Path(named) / kind
    if sys.platform == "win32":
        local = os.environ.get("LOCALAPPDATA")
        return Path(local) / "quartermap" / kind if local and os.path.isabs(local) else None
    variable, usual = {
        "plugins": ("XDG_DATA_HOME", ".local/share"),
        "cache": ("XDG_CACHE_HOME", ".cache"),
    }[kind]
    base = os.environ.get(variable, "")
    if not os.path.isabs(base):
        # As their specification says: relative ones are to be passed over.
        home = os.path.expanduser("~")
        # Users without a home have one that is not there, such as /nonexistent; root could make it.
        if not os.path.isabs(home) or not os.path.isdir(home):
            return None
        base = os.path.join(home, usual)
    return Path(base) / "quartermap" / kind


def make_private(folder: Path) -> Path:
    """Make a folder that its owner alone may enter, unless it is there; returns it, checked.

    Raises:
        TrustError: as `check_private` says.
        OSError: if it cannot be made.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    if not os.path.lexists(folder):
        folder.mkdir(mode=OWNER_ONLY, exist_ok=True)
    check_private(folder)
    return folder


def check_private(folder: Path) -> None:
    """Check that a folder is this user's, and that nobody else can put anything into it, or another in its place.

    Windows keeps what is below a user's folder from others by itself, and has no permissions of this kind.

    Raises:
        TrustError: if not; the message says what to do.
    """
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode):
        what = "a link" if stat.S_ISLNK(found.st_mode) else "no folder"
        raise TrustError(
            f"{printable(folder)} is {what}; expected a folder of your own, so move it out of the way"
        )
    if sys.platform == "win32":
        return
    if found.st_uid != os.geteuid():
        raise TrustError(
            f"{printable(folder)} belongs to another user (number {found.st_uid}), and what is in it would be "
            f"believed; move it out of the way, or name a folder of your own in the environment variable "
            f"{HOME_VARIABLE}"
        )
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise TrustError(
            f"others may write to {printable(folder)}, and what is in it would be believed; look at what it holds, "
            f"then: {command('chmod', '700', folder)}"
        )
    for parent in dict.fromkeys((*folder.absolute().parents, *folder.resolve().parents)):
        above = parent.stat()
        shared = above.st_mode & stat.S_IWOTH and not above.st_mode & stat.S_ISVTX
        if shared or above.st_uid not in (0, os.geteuid(), _NOBODY):
            raise TrustError(
                f"{printable(folder)} lies in {printable(parent)}, where another user can put another folder in its "
                f"place; name a folder of your own in the environment variable {HOME_VARIABLE}"
            )
