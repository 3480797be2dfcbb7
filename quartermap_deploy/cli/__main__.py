"""`python -m quartermap_deploy.cli` is `quartermap`."""

from __future__ import annotations

import sys

from quartermap_deploy.cli import main

if __name__ == "__main__":
    sys.exit(main())
