"""`python -m quartermap_deploy` is the command line."""

from __future__ import annotations

import sys

from quartermap_deploy.cli import main

sys.exit(main())
