"""The benchmark suite of the substitution engine: `python -m benchmarks.run`."""
