"""`python -m quartermap_deploy.cli` is `quartermap`."""

from __future__ import annotations

from quartermap_deploy.cli import script

if __name__ == "__main__":
    script()
