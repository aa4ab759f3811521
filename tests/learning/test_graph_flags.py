"""Command-line flags of head graphs and routing, and the configuration they make."""

from __future__ import annotations

import pytest

from gohgraph import HeadGraphConfig, RoutingConfig, SiteConfig
from gohgraph.common.command_line import ArgumentParser
from gohgraph.learning.cli.graph_flags import add_graph_flags, graph_from_flags


def made(text: str, num_heads: int = 8):
    parser = ArgumentParser()
    add_graph_flags(parser)
    return graph_from_flags(parser.parse_args(text.split()), num_heads)


EXPERTS = HeadGraphConfig.graph_experts


@pytest.mark.parametrize(
    "text, expected",
    [
        ("", HeadGraphConfig()),
        ("--sites none", None),
        ("--sites scores", HeadGraphConfig(None, SiteConfig("ring"))),
        ("--sites both --topology ring --in-degree 3", HeadGraphConfig(SiteConfig.ring(3), SiteConfig("ring"))),
        ("--cross-layer first", HeadGraphConfig(SiteConfig(cross_layer="first"))),
        ("--rounds 2 --cross-layer 1 --edge-norm", HeadGraphConfig(SiteConfig(rounds=2, cross_layer=1, norm=True))),
        ("--edges static --edge-activation none", HeadGraphConfig(SiteConfig(edges="static", activation=None))),
        ("--graph-layers 0 -2 -1", HeadGraphConfig(layers=(0, -2, -1))),
        ("--rank 3 --top-edges 2", HeadGraphConfig(SiteConfig(rank=3, top_edges=2))),
        ("--sites none --router", HeadGraphConfig.moh(2, 4)),
        ("--router", HeadGraphConfig(routing=RoutingConfig(2, 4))),
        ("--sites none --router --num-shared 0 --top-k 3", HeadGraphConfig.moh(0, 3)),
        ("--sites none --router --top-k 3 1 --straight-through", HeadGraphConfig.moh(2, (3, 1), straight_through=True)),
        (
            "--sites none --router --balance-loss 0 --z-loss 0.1 --bias-rate 0.2",
            HeadGraphConfig.moh(2, 4, balance_loss=0.0, z_loss=0.1, bias_rate=0.2),
        ),
        ("--experts", EXPERTS(2)),
        ("--experts --rounds 1 --num-shared 3 --alignment 0.1", EXPERTS(3, 1, alignment=0.1)),
        ("--experts --router --top-edges 2", EXPERTS(2, top_k=4, top_edges=2)),
    ],
)
def test_flags_make_the_configuration(text, expected):
    assert made(text) == expected


@pytest.mark.parametrize("heads, shared, top_k", [(1, 0, 1), (2, 0, 2), (4, 1, 2), (7, 2, 3), (12, 3, 6), (64, 16, 32)])
def test_a_quarter_is_shared_and_three_quarters_work(heads, shared, top_k):
    routing = made("--router", heads).routing
    assert (routing.num_shared, routing.top_k) == (shared, top_k)
    routing.check_heads(heads, 3)
    assert made(f"--router --num-shared {heads}", heads).routing.top_k == 0


@pytest.mark.parametrize(
    "text, message",
    [
        ("--score-in-degree 2", "no --score-in-degree with --sites outputs"),
        ("--sites scores --cross-layer 1", "no --cross-layer with --sites scores"),
        ("--sites scores --experts", "no --experts with --sites scores"),
        ("--sites none --rounds 2", "no --rounds with --sites none"),
        ("--sites none --router --top-edges 2", "no --top-edges with --sites none"),
        ("--experts --topology ring", "no --topology with --experts"),
        ("--alignment 0.1", "no --alignment without --experts"),
        ("--num-shared 2", "no --num-shared without --router or --experts"),
        *((f"{flag} 1", f"no {flag} without --router") for flag in ("--top-k", "--balance-loss", "--z-loss")),
        *((f"{flag} 0", f"no {flag} without --router") for flag in ("--bias-rate", "--anneal-top-k")),
        ("--straight-through", "no --straight-through without --router"),
        ("--in-degree 3", "ring or random topology with --in-degree"),
        ("--topology ring --in-degree 0", "--in-degree of at least 1"),
    ],
)
def test_unused_and_impossible_flags_are_refused(text, message):
    with pytest.raises(ValueError, match=rf"^Expected .*{message}.*\(got .*\)\. Do "):
        made(text)
