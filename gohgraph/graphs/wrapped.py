"""Plain modules of your own at a site of attention."""

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from gohgraph.graphs.protocol import SiteGraph, Traits, check_site


class WrappedModule(SiteGraph):
    """A plain module `(nodes, context) -> nodes` at a site: what is not known of it is not asked of it.

    It is handed the heads of one token and layer, and is not known to be linear: over maps it runs on whole ones, and
    that it keeps causality there is up to it. Its parameters keep the names they had when it stood there unwrapped.

    Args:
        module: called with nodes `[*, H, F]` and context `[*, M]`.
        num_heads: H.
    """

    def __init__(self, module: nn.Module, num_heads: int) -> None:
        super().__init__()
        self.module = module
        self.traits = Traits(num_heads)

    def forward(
        self, nodes: Tensor, context: Tensor | None = None, earlier: Any = (), active: Tensor | None = None, **call: Any
    ) -> Tensor:
        """Calls the module; heads that are off send zeros and receive nothing."""
        if active is None:
            return self.module(nodes, context)
        works = active.unsqueeze(-1)  # [*, H, 1]
        return torch.where(works, self.module(torch.where(works, nodes, 0.0), context), nodes)

    def _load_from_state_dict(self, state_dict, prefix, *rest):
        names = [name for name in state_dict if name.startswith(prefix)]
        wrapped = {f"{prefix}module.{name}" for name in self.module.state_dict()}
        if not set(names) <= wrapped:
            for name in names:
                state_dict[f"{prefix}module.{name.removeprefix(prefix)}"] = state_dict.pop(name)
        super()._load_from_state_dict(state_dict, prefix, *rest)


def as_site_graph(module: nn.Module, num_heads: int) -> SiteGraph:
    """Returns the module where it is a `SiteGraph`, and a wrapper of it where it is a plain one."""
    if isinstance(module, SiteGraph):
        return module
    if not isinstance(module, nn.Module):
        raise TypeError(f"Expected a module at a site of attention (got {module!r}). Do pass a SiteGraph, or None.")
    return WrappedModule(module, num_heads)


def graph_at(site: str, module: nn.Module | None, num_heads: int, allowed: Collection[str]) -> SiteGraph | None:
    """Returns what stands at a site, wrapped where it is a plain module; refuses it as `check_site` does."""
    if module is None:
        return None
    graph = as_site_graph(module, num_heads)
    check_site(site, graph, num_heads, allowed)
    return graph
