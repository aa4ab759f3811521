"""Data of the examples and benchmarks."""
