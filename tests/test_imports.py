"""Imports point one way, and importing the package does nothing else."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import gohgraph

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "gohgraph"

# The floors, lowest first: a room imports from those below it. At the top of the package stand the command lines.
ROOMS = ("common", "graphs", "attention", "models", "convert", "analysis", "drawing", "parallel", "learning")
TOP = ("__init__", "__main__", "cli")


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


def at_the_top(path):
    """Yields the dotted names a file imports when it is imported itself."""
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def for_type_checkers(path):
    """Returns what a file imports where types are checked alone: the module of every name."""
    tests = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.If)]
    imports = [node for test in tests if ast.unparse(test.test) == "TYPE_CHECKING" for node in test.body]
    return {alias.name: node.module for node in imports for alias in node.names}


FILES = sorted(path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py")
WITH_PYG = {f"graphs/{name}.py" for name in ("graph", "conv", "experts", "keyed", "learned_topology")}
WITH_PYG |= {"analysis/network.py"}
# Subclasses of PyG's classes, and of these.
BUILT_ON_PYG = WITH_PYG - {"graphs/graph.py"} | {"parallel/sharded_graph.py"}
# What is there without an extra: what torch brings, and these.
# The last two come with the checkpointing of torch 2.7; newer ones bring them later.
BROUGHT = {"gohgraph", "numpy", "safetensors", "tqdm", "sympy", "mpmath"}
WITH_TRITON = {f"attention/kernels/{name}.py" for name in ("tiles", "forward", "backward", "launch")}
# Subclasses of transformers' classes, imported by functions alone.
WITH_TRANSFORMERS = {f"convert/{name}.py" for name in ("converted_config", "converted_models")}
WITH_TRANSFORMERS |= {f"models/{name}.py" for name in ("auto", "auto_models")}
OPTIONAL = {"matplotlib", "networkx", "accelerate", "transformers", "bokeh", "tensorboard", "flwr"}
OUTSIDE = {"tools", "examples", "tests", "helpers", "conftest", "benchmarks", "planning"}


def test_the_package_has_nine_rooms():
    folders = {path.name for path in PACKAGE.iterdir() if path.is_dir() and path.name != "__pycache__"}
    assert folders == set(ROOMS) and {path.stem for path in PACKAGE.glob("*.py")} <= set(TOP)


def test_imports_point_down_and_optional_packages_are_imported_where_they_are_used():
    wrong = []
    for path in FILES:
        name, room = path.relative_to(PACKAGE).as_posix(), path.relative_to(PACKAGE).parts[0]
        roots = {module.split(".")[0] for module, _ in imports_of(path)}
        wrong += [(name, root) for root in roots & OUTSIDE]
        if name not in WITH_PYG and "torch_geometric" in roots:
            wrong.append((name, "torch_geometric"))
        optional = OPTIONAL - {"transformers"} if name in WITH_TRANSFORMERS else OPTIONAL
        wrong += [(name, root) for root in {module.split(".")[0] for module in at_the_top(path)} & optional]
        for module, _ in own_imports(path) if room in ROOMS else ():
            if module == "gohgraph":
                wrong.append((name, "modules import modules, not the public names"))
            elif ROOMS.index(module.split(".")[1]) > ROOMS.index(room):
                wrong.append((name, module))
    assert not wrong


def test_triton_is_imported_by_its_kernels_alone_and_these_where_they_run():
    kernels = tuple("gohgraph." + name.removesuffix(".py").replace("/", ".") for name in WITH_TRITON)
    found = {
        path.relative_to(PACKAGE).as_posix()
        for path in FILES
        if any(module.split(".")[0] == "triton" or module.startswith(kernels) for module in at_the_top(path))
    }
    assert found == WITH_TRITON


def test_what_is_built_on_pyg_is_imported_where_it_is_used():
    names = tuple(f"gohgraph.{name.removesuffix('.py').replace('/', '.')}." for name in BUILT_ON_PYG)
    found = {
        path.relative_to(PACKAGE).as_posix()
        for path in FILES
        if any(f"{module}.".startswith(("torch_geometric.", *names)) for module in at_the_top(path))
    }
    # Megatron-Core takes longer than PyG, and who imports that room wants graphs.
    assert {name for name in found if not name.startswith("parallel/megatron/")} == BUILT_ON_PYG


def test_type_checkers_see_the_names_that_are_imported_when_they_are_asked_for():
    assert for_type_checkers(PACKAGE / "__init__.py") == gohgraph.BUILT_ON_PYG
    with pytest.raises(AttributeError, match="module 'gohgraph' has no attribute 'HeadGraphCon'"):
        gohgraph.HeadGraphCon  # noqa: B018


def test_what_subclasses_transformers_is_imported_where_transformers_is():
    files = tuple("gohgraph." + name.removesuffix(".py").replace("/", ".") for name in WITH_TRANSFORMERS)
    found = {
        path.relative_to(PACKAGE).as_posix()
        for path in FILES
        if any(module.startswith(tuple(f"{file}." for file in files)) for module in at_the_top(path))
    }
    assert found <= WITH_TRANSFORMERS


def test_programs_use_public_names():
    programs = [path for folder in ("tools", "examples", "tests") for path in (ROOT / folder).rglob("*.py")]
    for path in programs:
        for module, names in own_imports(path):
            private = [name for name in (*module.split("."), *names) if name.startswith("_") and name != "__version__"]
            assert not private, f"{path.name} imports {private} from {module}"


def test_importing_has_no_side_effects_and_optional_packages_come_where_they_are_used():
    """In one process: importing torch is what takes time."""
    federated = ", ".join(f"gohgraph.learning.federated.{name}" for name in ("sharing", "split", "client"))
    code = (
        "import os, random, sys, torch\n"
        "def state():\n"
        "    return (torch.get_num_threads(), torch.get_default_dtype(), torch.initial_seed(), random.getstate(),\n"
        "            torch.get_rng_state().tolist(), dict(os.environ), torch.are_deterministic_algorithms_enabled(),\n"
        "            torch.backends.cuda.matmul.allow_tf32, torch.is_grad_enabled(), os.getcwd())\n"
        "def packages():\n"
        "    return {name.split('.')[0] for name in sys.modules} - sys.stdlib_module_names\n"
        "before, known = state(), packages()\n"
        "import gohgraph\n"
        "assert state() == before\n"
        f"assert packages() - known <= {BROUGHT}, packages() - known\n"
        "missing = set(gohgraph.__all__) - set(dir(gohgraph))\n"
        "assert not missing, missing\n"
        "config = gohgraph.TransformerConfig(9, d_model=8, num_heads=2, num_layers=1, d_ff=8)\n"
        "gohgraph.LanguageModel(config)\n"
        # That of torch 2.7 brings networkx and Triton itself.
        "ours = packages()\n"
        "import torch.distributed.fsdp\n"
        "known |= packages() - ours\n"
        "import gohgraph.learning.training, gohgraph.parallel\n"
        "unwanted = {'torch_geometric', 'networkx', 'matplotlib', 'transformers', 'accelerate', 'triton', 'pandas'}\n"
        "unwanted &= packages() - known\n"
        "assert not unwanted, unwanted\n"
        "graph = gohgraph.head_graph(2)\n"
        "from gohgraph import *\n"
        "missing = [name for name in gohgraph.__all__ if name not in globals()]\n"
        "assert not missing, missing\n"
        "assert isinstance(graph, sys.modules['torch_geometric'].data.Data)\n"
        "assert issubclass(HeadGraphConv, sys.modules['torch_geometric'].nn.MessagePassing)\n"
        "assert 'matplotlib' not in sys.modules\n"
        "from gohgraph.drawing import draw_curves\n"
        "draw_curves({'a': [{'step': 1, 'loss': 2.0}]})\n"
        "assert 'matplotlib' in sys.modules and 'matplotlib.pyplot' not in sys.modules\n"
        "import gohgraph.learning.tracking\n"
        "assert not {'tensorboard', 'wandb', 'mlflow'} & set(sys.modules)\n"
        f"import {federated}\n"
        "assert 'flwr' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert [line for line in done.stderr.splitlines() if "gohgraph" in line] == []
