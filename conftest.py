"""Leaves modules out of the doctests whose optional package is not there."""

from __future__ import annotations

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("triton") else ["gohgraph/kernels/[!_m]*.py"]
