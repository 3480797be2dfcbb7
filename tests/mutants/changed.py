"""Which files a change touches, as git tells it."""

from __future__ import annotations

import subprocess
from pathlib import Path


def touched_files(repository: Path) -> list[str] | None:
    """Return the files that differ from where this branch left main, or, on main itself, from the commit before.

    Files that are not committed yet count, too. None where there is no git, or no history to compare with.
    """
    head = _git(repository, "rev-parse", "HEAD")
    if head is None:
        return None
    for base in ("origin/main", "main", "HEAD~1"):
        start = _git(repository, "merge-base", "HEAD", base)
        if start is not None and start != head:
            found = _git(repository, "diff", "--name-only", "--no-renames", start)
            new = _git(repository, "ls-files", "--others", "--exclude-standard")
            return None if found is None else sorted({*found.splitlines(), *(new or "").splitlines()})
    return None


def _git(repository: Path, *arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(repository), *arguments],
            capture_output=True,
            text=True,
            timeout=30,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
