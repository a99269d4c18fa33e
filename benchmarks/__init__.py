"""Benchmarks: ratios of things measured in turn in one run. `python -m benchmarks --help`."""
