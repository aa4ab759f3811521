"""Leaves out what needs an optional package that is not there, for doctests too; begins with the longest files."""

from __future__ import annotations

from importlib.util import find_spec

# Flower needs Python 3.11.
_NEEDS = {
    "triton": ["gohgraph/attention/kernels/[!_m]*.py"],
    "flwr": ["gohgraph/learning/federated/*", "tests/*/test_federated*"],
}
collect_ignore_glob = [glob for package, globs in _NEEDS.items() if find_spec(package) is None for glob in globs]


# A file runs on one worker: begun last, one of these would keep all others waiting. In order of their seconds.
_LONGEST = (
    "test_federated_example",
    "test_parallel",
    "test_megatron",
    "test_kernels",
    "test_convert_transformers",
    "test_train_language_model",
    "test_routed_training",
    "test_router_training",
    "test_continual",
    "test_draw",
    "test_pretrain_gpt",
    "test_continue_tune",
    "test_meta",
    "test_multitask",
    "test_tuning",
    "test_benchmark",
    "test_drawing_views",
)
_PLACES = {name: place for place, name in enumerate(_LONGEST)}


def pytest_configure(config):
    # pytest-xdist would begin with the files of the most tests, which are the quickest.
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: _PLACES.get(item.path.stem, len(_PLACES)))
