"""`mlrpl bench`: the package beside the plain formulation of `benchmarks/plain.py`, and what each method costs."""

from mlrpl.bench.run import bench

__all__ = ["bench"]
