"""Faults planted one at a time, and the tests that catch them: `make mutants` (docs/adr/0016)."""
