"""Measurements, run from a checkout: `python -m benchmarks.suite --out DIR`."""
