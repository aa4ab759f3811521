"""What was seen of head graphs in a forward pass: running statistics of edges, gates and outputs, graph by graph."""

from collections.abc import Sequence

import torch
from torch import Tensor

from gohgraph.analysis import summary
from gohgraph.analysis.attention_record import AttentionRecording
from gohgraph.analysis.running_stats import Moments, samples
from gohgraph.attention.routing import HeadRouter, Routing
from gohgraph.graphs.edge_graph import EdgeGraph
from gohgraph.graphs.graph import head_graph
from gohgraph.graphs.protocol import SiteGraph


class Recording:
    """What one head graph did over tokens: its edges' weights, and the gates and outputs of the heads of its block.

    Means and variances are running ones, float64 on the CPU: memory does not grow with tokens. The weights are alpha
    as the context gives it, before a router or `top_edges` leaves any out; `share` tells how often that is.

    Args:
        graph: a `HeadGraphConv`, or another linear graph, whose edges are then all pairs of heads.
        router: the `HeadRouter` of the same attention block, or `None`.
        every_token: also keeps the values of every token, in `every`.

    Attributes:
        edge_index: `[2, E]`, senders in row 0.
        num_heads: H.
        reach: the earlier layers that send, as in `Traits`: sender j + l*H is head j of the l-th of them.
        num_shared: h_s of the router, the first heads, always active; `None` without one.
        tokens: number of tokens seen; of static edges, forward passes.
        mean, std: `[R, E]` weight of every edge in each round: mean over tokens and standard deviation, 0 if static.
        strength: `[E]`, root mean square of the weight over tokens and rounds.
        share: `[R, E]`, share of tokens where the edge carries a weight other than 0 between active heads.
        load: `[H]`, share of tokens a head is active for, 1 without router; before the first token, in balance.
        gate, gate_std: `[H]`, mean and standard deviation of a head's gate, 1 and 0 without router.
        output_mean, output_std: `[H, D]`, the heads' outputs: those an attention block reads out, after messages and
            times their gates; of other blocks, what the output graph returns. `None` where no such output was seen.
        output_norm: `[H]`, root mean square over tokens of a head output's length, or `None`.
        every: with `every_token`, what was seen of every token, in order: `"weights"` `[N, R, E]`, and where there are
            such, `"gates"` `[N, H]`, `"active"` bool `[N, H]`, `"outputs"` `[N, H, D]`; else `None`.
    """

    def __init__(self, graph: SiteGraph, router: HeadRouter | None = None, *, every_token: bool = False) -> None:
        self.num_heads = graph.traits.num_heads
        conv = graph if isinstance(graph, EdgeGraph) else None
        self.edge_index = (head_graph(self.num_heads) if conv is None else conv).edge_index.detach().cpu()
        self.reach = 0 if conv is None else conv.traits.reach
        self.num_shared = None if router is None else router.num_shared
        shape = (1 if conv is None else conv.rounds, self.edge_index.shape[1])
        self._weights, self._share = Moments(shape), Moments(shape)
        self._active, self._gates = Moments((self.num_heads,)), Moments((self.num_heads,))
        self._balanced = torch.ones(self.num_heads, dtype=torch.float64)
        if router is not None:
            self._balanced[router.num_shared :] = router.top_k / max(1, router.num_routed)
        self._outputs: Moments | None = None
        self._every: dict[str, list[Tensor]] | None = {} if every_token else None

    def __repr__(self) -> str:
        return summary.line_of(self)

    def update(self, alpha: Tensor, used: Tensor | None = None) -> None:
        """Takes in the weights of one pass, `[*, R, E]`, and those that are used, with zeros for the others."""
        self._weights.update(alpha)
        self._share.update((alpha if used is None else used) != 0)
        self._keep("weights", alpha, 2)

    def update_routing(self, routing: Routing) -> None:
        """Takes in a router's decisions."""
        self._active.update(routing.active)
        self._gates.update(routing.gates)
        self._keep("active", routing.active, 1)
        self._keep("gates", routing.gates, 1)

    def update_outputs(self, outputs: Tensor) -> None:
        """Takes in the heads' outputs `[*, H, D]`."""
        if self._outputs is None:
            self._outputs = Moments(outputs.shape[-2:])
        self._outputs.update(outputs)
        self._keep("outputs", outputs, 2)

    def _keep(self, name: str, values: Tensor, dims: int) -> None:
        if self._every is not None:
            self._every.setdefault(name, []).append(samples(values, dims).cpu().clone())  # [N, ...]

    @property
    def tokens(self) -> int:
        return self._weights.count

    @property
    def mean(self) -> Tensor:
        return self._weights.mean

    @property
    def std(self) -> Tensor:
        return self._weights.std

    @property
    def strength(self) -> Tensor:
        return self._weights.rms.square().mean(dim=0).sqrt()

    @property
    def share(self) -> Tensor:
        return self._share.mean

    @property
    def load(self) -> Tensor:
        return self._active.mean if self._active.count else self._balanced

    @property
    def gate(self) -> Tensor:
        return self._gates.mean if self._gates.count else torch.ones(self.num_heads, dtype=torch.float64)

    @property
    def gate_std(self) -> Tensor:
        return self._gates.std

    @property
    def output_mean(self) -> Tensor | None:
        return None if self._outputs is None else self._outputs.mean

    @property
    def output_std(self) -> Tensor | None:
        return None if self._outputs is None else self._outputs.std

    @property
    def output_norm(self) -> Tensor | None:
        return None if self._outputs is None else self._outputs.rms.square().sum(dim=-1).sqrt()

    @property
    def every(self) -> dict[str, Tensor] | None:
        return None if self._every is None else {name: torch.cat(parts) for name, parts in self._every.items()}


class Recordings(dict[str, Recording]):
    """The recordings of a model by module name, in model order.

    A module that is called several times in a forward pass stands for as many layers, each with a recording of its own:
    `"attention.head_graphs.call.0.output_graph"` and so on.

    Attributes:
        token_strings: the recorded tokens as they are to be read, or `None`.
        left_out: what stands at a site and is not recorded, by module name, with the reason.
        attention: with `record(attention=...)`, the `AttentionRecording`s by the name of the attention module.
    """

    def __init__(self, recordings: dict[str, Recording], token_strings: Sequence[str] | None = None) -> None:
        super().__init__(recordings)
        self.left_out: dict[str, str] = {}
        self.attention: dict[str, AttentionRecording] = {}
        self.token_strings = None if token_strings is None else list(token_strings)

    def __repr__(self) -> str:
        return summary.text_of(self)

    def _repr_html_(self) -> str:
        return summary.html_of(self)
