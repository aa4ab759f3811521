"""Kernels for CUDA, in Triton: attention that mixes the scores of all heads within a tile."""
