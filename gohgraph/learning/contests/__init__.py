"""Fair comparisons: equal sizes, learning rates chosen alike, many runs."""
