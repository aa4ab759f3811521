"""Leaves out what needs an optional package that is not there, for doctests too."""

from __future__ import annotations

from importlib.util import find_spec

# Flower needs Python 3.11.
_NEEDS = {
    "triton": ["gohgraph/attention/kernels/[!_m]*.py"],
    "flwr": ["gohgraph/learning/federated/*", "tests/*/test_federated*"],
}
collect_ignore_glob = [glob for package, globs in _NEEDS.items() if find_spec(package) is None for glob in globs]
