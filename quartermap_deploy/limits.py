"""Bounds of numbers that a user gives, beyond which a machine could only fail: late, slowly, or without a word."""

from __future__ import annotations

MOST_THREADS = 1024
"""Threads of a session. Each takes memory at once, and no operator here gains from more than there are cores."""
MOST_WORKERS = 256
"""Sessions or processes beside each other, each with a model of its own."""
LARGEST_BATCH = 65_536
"""Entries of a batch."""
MOST_ROUNDS = 1_000_000
"""Rounds that are timed; every time is kept."""
