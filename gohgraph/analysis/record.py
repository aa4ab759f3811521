"""Recording what head graphs do in a forward pass: which are recorded, and the hooks that see them."""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from gohgraph.analysis.attention_record import attention_modules, recording_attention
from gohgraph.analysis.attention_watch import Choice
from gohgraph.analysis.module_names import block_of, site_of
from gohgraph.analysis.passes import Counter, Passes
from gohgraph.analysis.recording import Recording, Recordings
from gohgraph.attention.block import MultiHeadAttention
from gohgraph.attention.routing import HeadRouter, Routing
from gohgraph.attention.watching import is_beside
from gohgraph.common.modules import is_recomputed, working_modules
from gohgraph.graphs.chain import Chain
from gohgraph.graphs.edge_graph import EdgeGraph
from gohgraph.graphs.protocol import FEATURES, SiteGraph

# Heads there are those of keys and values, whose tokens are not the ones a router chose heads for.
OF_KEYS = ("keys", "values")


@contextmanager
def record(
    model: nn.Module, *, every_token: bool = False, token_strings: Sequence[str] | None = None,
    attention: bool | Mapping[str, Any] = False,
) -> Iterator[Recordings]:  # fmt: skip
    """Records what every head graph of `model` does while the block runs: edge weights, gates, heads' outputs.

    Linear graphs of other kinds (softmax messages, a gate on every head, a `SiteGraph` of your own that has `matrix`)
    are recorded as complete graphs with the weights W - I, where nodes are features; what cannot be recorded is in
    `left_out`. Gradient checkpointing is recorded once, in the forward pass. Graphs that saw no token are warned of.

    Args:
        model: any module with head graphs.
        every_token: keeps the values of every token, beside means and variances.
        token_strings: the tokens that are run, as they are to be read in figures; one for each.
        attention: also what every head attends to, of any model `wiring_of` knows, with head graphs or without: the
            maps that are really used, in `heads.attention`. `True` for the mean over examples; or a mapping of
            `"layers"`, `"heads"` (lists of numbers) and `"every_example"` (a bool). At most 1 GiB; of this thread.

    Yields:
        The `Recording`s by module name, e.g. `"decoder.layers.0.attention.object.output_graph"`, in model order.

    Raises:
        ValueError: the model has no head graph, and attention is not asked for; maps would take too much memory, or the
            attention beneath tells nothing; at the end, another number of tokens was run than there are strings.

    Example:
        >>> import gohgraph as goh
        >>> shape = dict(d_model=8, num_heads=2, num_layers=1, d_ff=8)
        >>> model = goh.LanguageModel(goh.TransformerConfig(9, **shape, head_graph=goh.HeadGraphConfig()))
        >>> with record(model, every_token=True, token_strings=["a", "b", "c"]) as heads:
        ...     _ = model(torch.tensor([[1, 2, 3]]))
        >>> recording = heads["decoder.layers.0.attention.object.output_graph"]
        >>> recording.tokens, recording.mean.shape, recording.every["weights"].shape, recording.output_mean.shape
        (3, torch.Size([1, 4]), torch.Size([3, 1, 4]), torch.Size([2, 4]))
        >>> with record(model, attention=True) as heads:
        ...     _ = model(torch.tensor([[1, 2, 3]]))
        >>> heads.attention["decoder.layers.0.attention.object"].maps.shape
        torch.Size([2, 3, 3])
    """
    choice = Choice.of(attention)
    graphs, left_out = recordable(model)
    if not graphs and choice is None:
        head_graphs(model)
    routers = {name: module for name, module in working_modules(model) if isinstance(module, HeadRouter)}
    heads, passes, layers = Recordings({}, token_strings), Passes(), {}
    heads.left_out = left_out
    modules = dict(model.named_modules())
    watched = [*graphs, *(attention_modules(model) if choice else ())]
    around = {id(modules[prefix]): modules[prefix] for name in watched for prefix in _prefixes(name)}
    with ExitStack() as hooks:
        hooks.enter_context(passes.following(around.values()))
        for name, graph in graphs.items():
            router = None if site_of(name) in OF_KEYS else _router_of(name, routers)
            layers[name] = Layers(partial(Recording, graph, router, every_token=every_token))
            heads[name] = layers[name][0]
            for hook in _hooks(layers[name], name, graph, router, model, passes):
                hooks.enter_context(hook)
        if choice is not None:
            heads.attention = hooks.enter_context(recording_attention(model, choice, passes))
        yield heads
        _name_layers(heads, layers)
        _check_strings(heads, graphs)
        _warn_of_unseen(heads)


class Layers(list[Recording]):
    """The recordings of one module, of each of its calls in a forward pass."""

    def __init__(self, new: Callable[[], Recording]) -> None:
        super().__init__([new()])
        self.new = new

    def of_call(self, index: int) -> Recording:
        """Returns the recording of the call of that index."""
        while len(self) <= index:
            self.append(self.new())
        return self[index]


def _prefixes(name: str) -> list[str]:
    """The names of the modules around one, and its own."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(len(parts) + 1)] if name else [""]


def _name_layers(heads: Recordings, layers: dict[str, Layers]) -> None:
    """Gives every call of modules that stand for several layers a name, in the order of layers."""
    several = {name: calls for name, calls in layers.items() if len(calls) > 1}
    if not several:
        return
    single = {name: recording for name, recording in heads.items() if name not in several}
    numbered = [
        (index, f"{block_of(name)}.call.{index}{name.removeprefix(block_of(name))}".removeprefix("."), recording)
        for name, calls in several.items()
        for index, recording in enumerate(calls)
    ]
    heads.clear()
    heads.update(single)
    heads.update({name: recording for _, name, recording in sorted(numbered, key=lambda one: one[0])})


def _warn_of_unseen(heads: Recordings) -> None:
    if unseen := [name for name, recording in heads.items() if not recording.tokens]:
        warnings.warn(
            f"The recording saw no token at {', '.join(unseen[:4])}{' ...' if len(unseen) > 4 else ''}: the model was "
            "not run inside the block, or it passes these by.",
            stacklevel=4,
        )


def head_graphs(model: nn.Module) -> dict[str, EdgeGraph]:
    """Returns the head graphs of a model by module name, in model order; `ValueError` where there are none."""
    graphs = {name: module for name, module in working_modules(model) if isinstance(module, EdgeGraph)}
    if not graphs:
        others = sorted({type(module).__name__ for module in model.modules() if isinstance(module, SiteGraph)})
        raise ValueError(
            f"Expected a model with head graphs that have edges (got {', '.join(others) or 'no graph at any site'}). "
            "Do build it with head_graph=HeadGraphConfig()."
        )
    return graphs


def recordable(model: nn.Module) -> tuple[dict[str, SiteGraph], dict[str, str]]:
    """Returns the graphs of a model that can be recorded, and why the others cannot, by module name in model order."""
    graphs: dict[str, SiteGraph] = {}
    left_out: dict[str, str] = {}
    convs = {name for name, module in working_modules(model) if isinstance(module, EdgeGraph)}
    for name, module in working_modules(model):
        if isinstance(module, EdgeGraph):
            graphs[name] = module
        elif isinstance(module, Chain) or not isinstance(module, SiteGraph):
            continue
        elif any(conv.startswith(f"{name}.") for conv in convs):
            # A graph around a convolution is recorded by it.
            continue
        elif module.traits.linear and site_of(name) in FEATURES:
            graphs[name] = module
        else:
            reason = "no matrix over heads" if not module.traits.linear else "messages between maps"
            left_out[name] = f"{type(module).__name__}: {reason}"
    return graphs, left_out


def _router_of(name: str, routers: dict[str, HeadRouter]) -> HeadRouter | None:
    """The router in the nearest module around a graph."""
    around = {f"{router.rpartition('.')[0]}.".removeprefix("."): module for router, module in routers.items()}
    fitting = [prefix for prefix in around if name.startswith(prefix)]
    return around[max(fitting, key=len)] if fitting else None


def _hooks(
    layers: Layers, name: str, graph: SiteGraph, router: HeadRouter | None, model: nn.Module, passes: Passes
) -> list:
    last: list[Tensor] = []

    def on_routing(recording: Recording, inputs: Any, routing: Routing) -> None:
        last[:] = [routing.active]
        recording.update_routing(routing)

    def on_edges(recording: Recording, inputs: Any, alpha: Tensor) -> None:
        recording.update(alpha, cast(EdgeGraph, graph).select(alpha, *last))

    def on_nodes(recording: Recording, inputs: Any, nodes: Tensor) -> None:
        matrix = graph.matrix(inputs[1])  # [*, H, H]
        alpha = matrix - torch.eye(recording.num_heads, dtype=matrix.dtype, device=matrix.device)
        senders, receivers = recording.edge_index.to(alpha.device)
        alpha = alpha[..., receivers, senders].unsqueeze(-2)  # [*, 1, E]
        used = alpha
        if last:
            used = alpha * (last[0][..., senders] & last[0][..., receivers]).unsqueeze(-2)
        recording.update(alpha, used)

    block = model.get_submodule(block_of(name))
    # Both sites ask the edges for their weights, so that is where they are seen.
    takers: list[tuple[nn.Module, Callable[[Recording, Any, Any], None]]]
    takers = [(graph.edges, on_edges) if isinstance(graph, EdgeGraph) else (graph, on_nodes)]
    if router is not None:
        takers.append((router, on_routing))
    if isinstance(block, MultiHeadAttention):
        takers.append((block, lambda recording, inputs, result: recording.update_outputs(result[1].outputs)))
    elif site_of(name) == "outputs":
        takers.append((graph, lambda recording, inputs, z: recording.update_outputs(z)))
    return [_hook(owner, take, layers, passes.counter()) for owner, take in takers]


def _hook(
    owner: nn.Module, take: Callable[[Recording, Any, Any], None], layers: Layers, counter: Counter
) -> RemovableHandle:
    def take_result(module: nn.Module, inputs: Any, result: Any) -> None:
        # A deep copy of the model made inside the block carries this hook along: it is not what is recorded.
        if module is owner and not is_recomputed() and not is_beside():
            with torch.no_grad():
                take(layers.of_call(counter.next()), inputs, result)

    return owner.register_forward_hook(take_result)


def _check_strings(heads: Recordings, graphs: dict[str, SiteGraph]) -> None:
    if heads.token_strings is None:
        return
    for name, recording in heads.items():
        if name in graphs and not graphs[name].traits.static and recording.tokens != len(heads.token_strings):
            raise ValueError(
                f"Expected a string for each of the {recording.tokens} tokens that were run (got "
                f"{len(heads.token_strings)}). Do pass as many."
            )
