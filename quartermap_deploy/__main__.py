"""`python -m quartermap_deploy` is the command line."""

from __future__ import annotations

from quartermap_deploy.cli import script

script()
