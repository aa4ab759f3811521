"""Every kind of graph at every site of every holder: refused when it is built, or run and equal to one slow reference.

The reference is the definition on whole maps, of the holder's own queries, keys and values and the very graph it holds:
what equals it in every holder is the same in all.
"""

from __future__ import annotations

import importlib.util
import re

import pytest
import torch
import torch.distributed as dist
from helpers import trained_like
from matrix_holders import (
    DropIn,
    EagerLlama,
    FusedQkv,
    Llama,
    Megatron,
    MegatronCore,
    OwnModel,
    Sizes,
    TensorParallel,
    V,
)
from torch import nn

from gohgraph import BaselineConfig, SiteConfig
from gohgraph.attention.forms import FORMS, attend, explain
from gohgraph.graphs.baselines import BASELINES
from gohgraph.graphs.config import SITES
from gohgraph.graphs.cross_layer import CrossLayer, reached
from gohgraph.graphs.protocol import SiteGraph, Traits
from gohgraph.graphs.site_config import KINDS as SITE_KINDS
from gohgraph.parallel.collectives import local

MAPS, INNER = ("scores", "weights"), ("queries", "keys", "values")


class Talk(nn.Module):
    """A user's plain module."""

    def __init__(self, heads):
        super().__init__()
        self.mix, self.gain = nn.Linear(heads, heads, bias=False), nn.Parameter(torch.ones(()))

    def forward(self, nodes, context):
        shift = 1 + self.gain * context.mean(dim=-1)[..., None, None]
        return nodes + self.mix(nodes.transpose(-1, -2)).transpose(-1, -2) * shift


class Peak(SiteGraph):
    """A user's graph that is no matrix."""

    def __init__(self, heads):
        super().__init__()
        self.traits, self.share = Traits(heads), nn.Parameter(torch.ones(heads, 1))

    def forward(self, nodes, context=None, earlier=(), active=None, *, keys=None, losses=None):
        return nodes + self.share * nodes.amax(dim=-2, keepdim=True)


class Mean(SiteGraph):
    """A user's graph that is one."""

    def __init__(self, heads):
        super().__init__()
        self.traits, self.share = Traits(heads, linear=True), nn.Parameter(torch.ones(heads, 1))

    def forward(self, nodes, context=None, earlier=(), active=None, *, keys=None, losses=None):
        return nodes + self.share * nodes.mean(dim=-2, keepdim=True)

    def matrix(self, context=None, active=None):
        heads = len(self.share)
        return torch.eye(heads).to(self.share) + self.share.expand(heads, heads) / heads


CONVS = {
    "complete": SiteConfig(),
    "ring": SiteConfig.ring(2),
    "static": SiteConfig(edges="static"),
    "frozen": SiteConfig(edges="frozen"),
    "rank": SiteConfig(rank=3, learning_rate_factor=0.5),
    "no tanh": SiteConfig(activation=None, self_loops=False),
    "rounds": SiteConfig.ring(2, rounds=2),
    "top edges": SiteConfig(top_edges=2),
}
GATE, NORM = BaselineConfig("gate", {"grain": "head"}), BaselineConfig("norm")
KINDS = CONVS | {
    "pyg": SiteConfig.ring(2, backend="pyg"),
    "norm": SiteConfig(norm=True),
    "cross layer": SiteConfig.ring(2, cross_layer=1),
    "cross layer, all pairs": SiteConfig(cross_layer=CrossLayer("first", "all-pairs", scale=0.1)),
    "experts": SiteConfig("bipartite", {"num_shared": 1}, rounds=2, kind="experts", num_shared=1),
    "learned": SiteConfig(kind="learned", keep_in_degree=2),
    "keyed": SiteConfig.ring(2, kind="keyed"),
    **{f"baseline {name}": BaselineConfig(name) for name in BASELINES},
    "baseline gate of heads": GATE,
    "baseline gate of low rank": BaselineConfig("gate", {"rank": 2}),
    "baseline knocking linear": BaselineConfig("knocking", {"form": "linear"}),
    "chain": (SiteConfig.ring(2), GATE),
    "chain with a norm": (NORM, SiteConfig()),
    "a module": Talk,
    "a graph": Peak,
    "a linear graph": Mean,
}
# What only some sites can have, wherever it is.
CROSS = {"cross layer", "cross layer, all pairs"}
KEYED = {"keyed", "baseline composition"}
AT_ONE_SITE = {"baseline exclusive", "baseline differential", "baseline paired"}
LINEAR = {*CONVS, "pyg", "learned", "baseline softmax", "baseline gate of heads", "chain", "a linear graph"}
ANYWHERE = LINEAR | {"a module", "a graph"}
FEATURES = set(KINDS) - KEYED - AT_ONE_SITE

# Whom a holder takes at each of its sites; at all others it takes nobody.
OWN = {"outputs": FEATURES | {"baseline exclusive"}, "scores": ANYWHERE | KEYED | {"baseline paired"}}
OWN["weights"] = ANYWHERE | {"baseline composition", "baseline differential"}
OWN |= dict.fromkeys(INNER, FEATURES)
FOREIGN = {"outputs": FEATURES - CROSS, "scores": ANYWHERE}
MEGATRON = {"outputs": {*CONVS, "norm", "pyg"}, "scores": {*CONVS, "pyg"}}
SHARDED = {*CONVS, "pyg", "norm"}
TAKES = {
    OwnModel: OWN,
    DropIn: FOREIGN,
    FusedQkv: FOREIGN,
    Llama: {**FOREIGN, "scores": LINEAR},
    EagerLlama: {**FOREIGN, "scores": LINEAR},
    **dict.fromkeys((Megatron, MegatronCore), MEGATRON),
    TensorParallel: {site: OWN[site] & (SHARDED | CROSS) for site in SITES if site != "weights"},
}
# Distinct primes, or twice one, and numbers that coincide; with and without grouped keys.
HOLDERS = {
    "own": (OwnModel, Sizes(4, 4, 6, 7)),
    "own, H = D = T, grouped": (OwnModel, Sizes(6, 3, 6, 6)),
    "drop-in": (DropIn, Sizes(5, 5, 3, 7)),
    "drop-in, H = D = T": (DropIn, Sizes(6, 6, 6, 6)),
    "fused qkv": (FusedQkv, Sizes(5, 5, 7, 7)),
    "Llama": (Llama, Sizes(6, 3, 10, 7)),
    "Llama, H = D = T": (Llama, Sizes(6, 2, 6, 6)),
    "Llama, eager": (EagerLlama, Sizes(6, 3, 10, 7)),
    "Megatron": (Megatron, Sizes(6, 3, 10, 7)),
    "Megatron, own core, H = D = T": (MegatronCore, Sizes(6, 6, 6, 6)),
    "tensor parallel": (TensorParallel, Sizes(5, 5, 6, 7)),
}
REFUSED = re.compile(r"Expected .+ \(got .+\)\. Do .+", re.DOTALL)


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory):
    """Process groups over this process alone, Megatron-Core's too where it is installed."""
    meeting = tmp_path_factory.mktemp("meeting") / "file"
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=0, world_size=1)
    if not importlib.util.find_spec("megatron"):
        yield
    else:
        from megatron.core import parallel_state

        from gohgraph.parallel.megatron.cpu import cpu_trial

        parallel_state.initialize_model_parallel(1)
        with cpu_trial():
            yield
        parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def holders(one_rank):
    """Plain holders, each built once."""
    built = {}

    def holder(name):
        cls, sizes = HOLDERS[name]
        if issubclass(cls, Megatron):
            pytest.importorskip("megatron.core")
        if issubclass(cls, Llama):
            pytest.importorskip("transformers")
        if name not in built:
            built[name] = cls(sizes)
        return built[name]

    return holder


@pytest.fixture
def calls(monkeypatch):
    """Every call of attention, with the form that was asked for."""
    seen = []

    def noted(call, form=None):
        seen.append((call, form))
        return attend(call, form)

    modules = ["gohgraph.attention.block", "gohgraph.attention.slots"]
    modules += ["gohgraph.parallel.megatron.attention"] * bool(importlib.util.find_spec("megatron"))
    for module in modules:
        monkeypatch.setattr(f"{module}.attend", noted)
    return seen


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", HOLDERS)
def test_a_graph_is_refused_when_built_or_runs_as_defined(holders, calls, name, kind):
    holder = holders(name)
    for site in SITES:
        takes = kind in TAKES[type(holder)].get(site, ())
        if kind == "baseline paired":
            # Heads that share a key/value head have no keys to join.
            takes = takes and holder.sizes.heads == holder.sizes.groups
        if isinstance(KINDS[kind], type) and site not in holder.own_sites:
            # No door for modules.
            assert not takes
            continue
        try:
            (check_runs if takes else check_refuses)(holder, site, KINDS[kind], calls)
        finally:
            holder.take_out()
    # Neither what was refused nor what was taken out has left anything.
    assert torch.equal(holder.run(holder.tokens), holder.expected)


def check_refuses(holder, site, graph, calls):
    before = holder.model
    names = list(before.state_dict())
    with pytest.raises((ValueError, TypeError)) as refused:
        holder.put(site, graph)
    assert REFUSED.fullmatch(str(refused.value)), refused.value
    assert list(before.state_dict()) == names, site


def check_runs(holder, site, graph, calls):
    holder.put(site, graph)
    trained_like(nn.ModuleList(graph for graphs in holder.graphs() for graph in graphs.values()))
    calls.clear()
    holder.model.train()
    with holder.watched() as blocks:
        y = holder.run(holder.tokens)
    assert len(blocks) == len(calls) and not torch.equal(y, holder.expected), site
    check_heads(holder, site, blocks, calls)
    check_gradients(holder, site, y)
    check_tokens(holder, site, holder.tokens, y)


def check_heads(holder, site, blocks, calls):
    """Head outputs are those of the definition, in the form that was taken and in every other one that takes them."""
    earlier, inner = [], []
    for (x, z, graphs, block), (call, form) in zip(blocks, calls, strict=True):
        # Layers that have none before them hold none for `cross_layer`.
        assert set(graphs) == {site}
        taken = [name for name, reason in explain(call, form).items() if reason == "taken"]
        assert len(taken) == 1 and (form is None or taken == [form]), site
        expected = attention_by_definition(call, x, graphs, holder.causal)
        for other in FORMS:
            if not other.refuses(call):
                assert_close(other.run(call)[0], expected, holder.exact, f"{site}, {other.name}")
        if "outputs" in graphs:
            graph, groups = graphs["outputs"], call.q.shape[2] // call.v.shape[2]
            own = {"values": call.v.repeat_interleave(groups, dim=2)} if graph.traits.reads_values else {}
            expected = graph(expected, x, reached(earlier, graph.traits.reach), None, **own)
        assert_close(z, expected, holder.exact, site)
        earlier.insert(0, z)
        check_inner(holder, site, call, x, graphs, block, inner)


def attention_by_definition(call, x, graphs, causal):
    """Softmax over whole maps, `[B, T, H, D]`, with messages before and after."""
    q, heads = call.q, call.q.shape[2]
    k, v = (each.repeat_interleave(heads // each.shape[2], dim=2) for each in (call.k, call.v))  # [B, S, H, D]
    if "scores" in graphs and graphs["scores"].traits.joins_keys:
        return joined_by_definition(q, k, v, causal)
    maps = torch.einsum("bthd,bshd->bths", q, k) * q.shape[-1] ** -0.5  # [B, T, H, S]
    if "scores" in graphs:
        maps = graphs["scores"](maps, x, keys=graphs["scores"].key_state(x))
    if causal:
        future = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).triu(1).unsqueeze(1)  # [T, 1, S]
        maps = maps.masked_fill(future, float("-inf"))
    maps = maps.softmax(dim=-1)
    if "weights" in graphs:
        maps = graphs["weights"](maps, x, keys=graphs["weights"].key_state(x))
    return torch.einsum("bths,bshd->bthd", maps, v)  # [B, T, H, D]


def joined_by_definition(q, k, v, causal):
    """Softmax over the keys of both heads of a pair, at every token those of the first before those of the second."""
    token, z = torch.arange(q.shape[1]), []
    for head in range(q.shape[2]):
        pair = [head // 2 * 2, head // 2 * 2 + 1]
        maps = torch.einsum("btd,bspd->btsp", q[:, :, head], k[:, :, pair]) * q.shape[-1] ** -0.5  # [B, T, S, 2]
        if causal:
            places = 2 * token.unsqueeze(1) + torch.arange(2)  # [S, 2]
            maps = maps.masked_fill(places > (2 * token + head % 2).view(-1, 1, 1), float("-inf"))
        z.append(maps.flatten(2).softmax(dim=-1) @ v[:, :, pair].flatten(1, 2))  # [B, T, D]
    return torch.stack(z, dim=2)


def check_inner(holder, site, call, x, graphs, block, earlier):
    """Queries, keys and values are those of the projections after messages, then turned by their positions."""
    if site not in INNER:
        return
    projection = {"queries": "query", "keys": "key", "values": "value"}[site]
    nodes = local(getattr(block, projection)(x)).unflatten(-1, (-1, holder.sizes.features))  # [B, T, H or G, D]
    nodes = graphs[site](nodes, x, reached(earlier, graphs[site].traits.reach))
    earlier.insert(0, nodes)
    if site != "values":
        nodes = block.rotary(nodes, torch.arange(x.shape[1]))
    assert_close({"queries": call.q, "keys": call.k, "values": call.v}[site], nodes, holder.exact, site)


def check_gradients(holder, site, y):
    holder.model.zero_grad()
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)
    (y * weights).sum().backward()
    for layer, graphs in enumerate(holder.graphs()):
        for name, parameter in graphs[site].named_parameters():
            assert parameter.grad is not None, f"{site}, layer {layer}: {name} has no gradient"
            gradient = local(parameter.grad)
            assert gradient.isfinite().all() and gradient.any(), f"{site}, layer {layer}: {name}"
    assert y.isfinite().all() and all(local(p.grad).isfinite().all() for p in holder.model.parameters())


@torch.no_grad()
def check_tokens(holder, site, tokens, y):
    """In eval mode the last token changes nothing before it, and part after part tokens give what they give at once."""
    holder.model.eval()
    changed = tokens.clone()
    changed[:, -1] = (tokens[:, -1] + 1) % V
    after = holder.run(changed)
    assert not torch.allclose(after[:, -1], y[:, -1], atol=1e-6), site
    if holder.causal:
        assert_close(after[:, :-1], y[:, :-1], 1e-10, site)
    else:
        assert not torch.allclose(after[:, :-1], y[:, :-1], atol=1e-6), site
    if holder.caches:
        parts = list(tokens.split([tokens.shape[1] - 3, 2, 1], dim=1))
        assert_close(holder.run_cached(parts), y, max(holder.exact, holder.cached_exact), f"{site}, cached")


def assert_close(actual, expected, tolerance, what):
    close = {"rtol": tolerance, "atol": tolerance}
    torch.testing.assert_close(local(actual), expected, **close, msg=lambda said: f"{what}: {said}")


def test_the_matrix_has_all_kinds_and_all_sites():
    configs = [kind for kind in KINDS.values() if isinstance(kind, (SiteConfig, BaselineConfig))]
    assert {config.kind for config in configs} == {*SITE_KINDS, *BASELINES}
    defaults = SiteConfig().to_dict()
    changed = {name for config in configs if isinstance(config, SiteConfig) for name, value in config.to_dict().items()
               if value != defaults[name]}  # fmt: skip
    assert changed == set(defaults)
    assert all(set(takes) <= set(SITES) for takes in TAKES.values()) and set(OWN) == set(SITES)
    for kind in KINDS:
        assert any(kind in kinds for kinds in OWN.values()), kind
