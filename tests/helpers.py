"""Small models with weights as after training, shared by the tests. Sizes are distinct primes or twice a prime."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor, nn

from gohgraph import HeadGraphConfig, HeadGraphConv, RoutingConfig, SiteConfig, TransformerConfig

TOLERANCE = {"rtol": 0.0, "atol": 1e-10}

# Every way of running head graphs: sparse scores prefill as wide heads, complete and two-round ones eagerly; then with
# fewer edges or heads for each token.
GRAPHS = {
    "plain": None,
    "outputs": HeadGraphConfig(),
    "outputs-sparse": HeadGraphConfig(SiteConfig.ring(3)),
    "outputs-static": HeadGraphConfig(SiteConfig(topology="star", edges="static")),
    "scores-ring": HeadGraphConfig(None, SiteConfig.ring(2)),
    "scores-complete": HeadGraphConfig(None, SiteConfig()),
    "scores-pyg": HeadGraphConfig(None, SiteConfig.ring(2, backend="pyg")),
    "rounds": HeadGraphConfig(SiteConfig(rounds=2), SiteConfig.ring(2, rounds=2)),
    "cross-layer": HeadGraphConfig(SiteConfig(cross_layer=1, norm=True), SiteConfig.ring(3, rank=3)),
    "top-edges": HeadGraphConfig(SiteConfig(top_edges=2), SiteConfig.ring(3, top_edges=2)),
    "moh": HeadGraphConfig.moh(2, 2),
    "moh-outputs": HeadGraphConfig(SiteConfig(), SiteConfig.ring(2), RoutingConfig(2, 2)),
    "experts": HeadGraphConfig.graph_experts(2, rounds=2, top_k=2, alignment=0.1),
}


def small_config(graph: str = "plain", **settings) -> TransformerConfig:
    """A configuration of M = 30, H = 5, D = 6 over 13 tokens, with one of `GRAPHS`."""
    shape = {"d_model": 30, "num_heads": 5, "num_layers": 3, "d_ff": 11, "max_length": 23}
    return TransformerConfig(vocab_size=13, head_graph=GRAPHS[graph], **{**shape, **settings})


@torch.no_grad()
def trained_like(model: nn.Module) -> nn.Module:
    """Draws weights far from their start, in float64, so that nothing is zero, uniform or negligible."""
    model.double()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
        else:
            parameter.add_(torch.randn_like(parameter) * 0.3)
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight)
        if isinstance(module, HeadGraphConv):
            nn.init.normal_(module.edges.bias)
            if module.edges.weight is not None:
                nn.init.normal_(module.edges.weight)
    return model


def assert_equal_to(actual: Tensor, expected: Tensor) -> None:
    """Equality to 1e-10, absolute."""
    torch.testing.assert_close(actual, expected, **TOLERANCE)


def traced(module: nn.Module) -> nn.Module:
    """The module as `torch.compile` sees it: one graph forward and one back, run without building machine code.

    What could break here is the tracing; kernels are built from its graphs where `tests/graphs/test_conv.py` and
    `tests/learning/test_routed_training.py` compile in full.
    """
    return torch.compile(module, fullgraph=True, backend="aot_eager")


def load_script(folder: str, name: str) -> ModuleType:
    """Imports a script of `examples` or `tools`, which are no packages."""
    path = Path(__file__).parents[1] / folder / f"{name}.py"
    specification = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(specification)
    # Dataclasses look their module up by name.
    sys.modules[name] = module
    specification.loader.exec_module(module)
    return module
