"""Settings that every test shares."""

from __future__ import annotations

import os

import torch
from hypothesis import HealthCheck, settings

# The same examples at every run and on every machine; `HYPOTHESIS_PROFILE=search` looks for new ones.
settings.register_profile(
    "repeatable",
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=20,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
settings.register_profile("search", settings.get_profile("repeatable"), derandomize=False, max_examples=200)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "repeatable"))

# One thread makes the sums of a run repeatable, and lets several test runs share a machine.
torch.set_num_threads(1)
