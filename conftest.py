"""For all tests, doctests too: the longest files first, none of a package that is not there, and no figures of runs."""

from __future__ import annotations

import gc
import sys
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

# Flower needs Python 3.11.
_NEEDS = {
    "triton": ["gohgraph/attention/kernels/[!_m]*.py"],
    "flwr": ["gohgraph/learning/federated/*", "tests/*/test_federated*"],
}
collect_ignore_glob = [glob for package, globs in _NEEDS.items() if find_spec(package) is None for glob in globs]


# A file runs on one worker: begun last, one of these would keep all others waiting. In order of their seconds, behind
# those that start ranks.
_RANKS = (
    "test_parallel",
    "test_megatron",
    "test_sharded_graph",
    "test_router_training",
    "test_devices",
    "test_routed_training",
    "test_pretrain_gpt",
)
_LONGEST = (
    *_RANKS,
    "test_federated_example",
    "test_benchmark_quality",
    "test_kernels",
    "test_draw",
    "test_drawing_views",
    "test_saving",
    "test_page",
    "test_convert_training",
    "test_train_language_model",
    "test_continual",
    "test_benchmark",
    "test_compiled_generation",
    "test_kept",
    "test_auto",
    "test_continue_tune",
    "test_tiled_operator",
    "test_convert_transformers",
    "test_forms",
    "test_presets",
    "test_serving",
    "test_federated",
    "test_loop",
    "test_round_trips",
)
# Who draws the figures of a run: to draw one takes longer than a training of a few steps.
_FIGURES = {
    "gohgraph.learning.training": "draw_curves",
    "gohgraph.learning.cli.contest_script": "draw_curves",
    "gohgraph.learning.cli.comparison": "draw",
    "gohgraph.learning.federated.server": "draw_curves",
}
_PLACES = {name: place for place, name in enumerate(_LONGEST)}


def pytest_configure(config):
    # pytest-xdist would begin with the files of the most tests, which are the quickest.
    if hasattr(config.option, "loadscopereorder"):
        config.option.loadscopereorder = False


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """A file runs on one worker, and one worker all files that start ranks: their fork server imports everything."""
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class ByFile(LoadFileScheduling):
        def _split_scope(self, nodeid):
            file = super()._split_scope(nodeid)
            return "ranks" if Path(file).stem in _RANKS else file

    return ByFile(config, log)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: _PLACES.get(item.path.stem, len(_PLACES)))


def pytest_collection_finish():
    # What was imported and collected stays: the garbage collector need not look through it again and again.
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def no_figures():
    """Runs leave empty files in place of their figures, but for tests that ask for `figures`."""
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in _drawing():
            patch.setattr(owner, name, lambda drawn, path, **options: Path(path).touch())
        yield


@pytest.fixture
def figures(monkeypatch):
    """Runs draw their figures."""
    from gohgraph import drawing

    for owner, name in _drawing():
        monkeypatch.setattr(owner, name, getattr(drawing, name))


def _drawing():
    for module, name in _FIGURES.items():
        # Flower need not be there, and takes its time.
        if "federated" not in module or module in sys.modules:
            yield import_module(module), name
