"""Imports point one way, and importing the package does nothing else."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "gohgraph"

# Lowest first: a module imports from lines before its own, and from its own line only what stands to its left.
ORDER = [
    ["config_base", "site_config", "graph_config", "config"],
    ["topologies", "graph", "edges", "cache", "generation", "checkpoint", "figures", "tables"],
    ["command_line", "graph_flags"],
    ["inputs", "moments", "places"],
    ["conv", "routing", "collect", "load", "baselines"],
    ["experts", "keyed", "learned_topology", "sites"],
    ["scores", "kernels", "tiled", "skipping", "grouping", "embeddings", "feed_forward", "objects"],
    ["head_sites"],
    ["sublayers", "stacks"],
    ["outputs", "models"],
    ["dropin", "convert", "fold", "head_order"],
    ["record"],
    ["network", "network_files"],
    ["analysis"],
    ["curves", "load_chart", "confusion_chart", "drawing"],
    ["tensorboard"],
    ["parallel", "learning", "benchmarks"],
]
PLACE = {module: place for place, module in enumerate(module for line in ORDER for module in line)}


def imports_of(path):
    """Yields (module, imported names) of every import of this project in a file, those inside functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            yield node.module, [alias.name for alias in node.names]
        elif isinstance(node, ast.Import):
            yield from ((alias.name, []) for alias in node.names)


def own_imports(path):
    return [(module, names) for module, names in imports_of(path) if module.split(".")[0] == "gohgraph"]


def part_of(module):
    """The module or subpackage directly under gohgraph that a dotted name lies in."""
    return module.split(".")[1]


FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")
relative = [str(path.relative_to(ROOT)) for path in FILES]


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_the_package_imports_one_way(path):
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    assert own in PLACE, f"{own} has no place in ORDER yet"
    for module, _ in own_imports(path):
        assert module != "gohgraph", "modules import modules, not the public names"
        if part_of(module) != own:
            assert PLACE[part_of(module)] < PLACE[own], f"{own} must not import {module}"


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT)))
def test_the_package_imports_nothing_from_outside_it(path):
    roots = {module.split(".")[0] for module, _ in imports_of(path)}
    assert not roots & {"tools", "examples", "tests", "helpers", "conftest"}


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_graphs_are_built_in_few_places(path):
    roots = {module.split(".")[0] for module, _ in imports_of(path)}
    if path.name not in ("graph.py", "conv.py", "experts.py", "keyed.py", "learned_topology.py", "network.py"):
        assert "torch_geometric" not in roots


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_pictures_and_networkx_are_imported_where_used(path):
    at_top = [node for node in ast.parse(path.read_text()).body if isinstance(node, (ast.Import, ast.ImportFrom))]
    roots = {name.split(".")[0] for node in at_top for name in ([a.name for a in node.names] + [node_module(node)])}
    assert not roots & {"matplotlib", "networkx", "accelerate", "transformers", "bokeh", "tensorboard", "flwr"}


WITH_TRITON = [PACKAGE / "kernels" / f"{name}.py" for name in ("tiles", "forward", "backward", "launch")]


@pytest.mark.parametrize("path", FILES, ids=relative)
def test_triton_is_imported_by_its_kernels_alone_and_these_where_they_run(path):
    at_top = [node for node in ast.parse(path.read_text()).body if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = {f"{node_module(node)}.{alias.name}".strip(".") for node in at_top for alias in node.names}
    kernels = tuple(f"gohgraph.kernels.{file.stem}" for file in WITH_TRITON)
    found = [name for name in names if name.split(".")[0] == "triton" or name.startswith(kernels)]
    assert bool(found) == (path in WITH_TRITON)


def node_module(node):
    return getattr(node, "module", None) or ""


PROGRAMS = sorted([*(ROOT / "tools").glob("*.py"), *(ROOT / "examples").rglob("*.py"), *(ROOT / "tests").glob("*.py")])


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: str(path.relative_to(ROOT)))
def test_programs_use_public_names(path):
    for module, names in own_imports(path):
        private = [name for name in (*module.split("."), *names) if name.startswith("_") and name != "__version__"]
        assert not private, f"{path.name} imports {private} from {module}"


def run(code):
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=120)


def test_importing_the_package_has_no_side_effects():
    done = run(
        "import os, random, sys, torch\n"
        "def state():\n"
        "    return (torch.get_num_threads(), torch.get_default_dtype(), torch.initial_seed(), random.getstate(),\n"
        "            torch.get_rng_state().tolist(), dict(os.environ), torch.are_deterministic_algorithms_enabled(),\n"
        "            torch.backends.cuda.matmul.allow_tf32, torch.is_grad_enabled(), os.getcwd())\n"
        # It imports transformers itself where that is installed.
        "import torch_geometric.nn\n"
        "before, known = state(), set(sys.modules)\n"
        "import gohgraph\n"
        "assert state() == before\n"
        "unwanted = {'accelerate', 'transformers', 'matplotlib.pyplot', 'matplotlib', 'megatron'}\n"
        "unwanted &= set(sys.modules) - known\n"
        "assert not unwanted, unwanted\n"
        "missing = [name for name in gohgraph.__all__ if not hasattr(gohgraph, name)]\n"
        "assert not missing and sorted(gohgraph.__all__, key=str.lower), missing\n"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert [line for line in done.stderr.splitlines() if "gohgraph" in line] == []


def test_flower_is_imported_where_messages_are_made():
    names = ", ".join(f"gohgraph.learning.federated.{name}" for name in ("sharing", "split", "client"))
    done = run(f"import sys, {names}\nassert 'flwr' not in sys.modules")
    assert done.returncode == 0, done.stderr
