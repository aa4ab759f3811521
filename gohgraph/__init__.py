"""Graphs-of-Heads: attention heads as the nodes of an explicit graph that passes messages between them."""

from gohgraph.analysis import head_importance, prune
from gohgraph.collect import collect_routing
from gohgraph.config import ClassifierConfig, TransformerConfig
from gohgraph.confusion_chart import draw_confusion
from gohgraph.conv import HeadGraphConv
from gohgraph.convert import Report, convert, load_converted, save_converted, unconvert
from gohgraph.drawing import (
    draw,
    draw_difference,
    draw_matrices,
    draw_network,
    draw_pruning,
    draw_tokens,
    save_film,
    save_page,
)
from gohgraph.dropin import GraphMultiheadAttention
from gohgraph.experts import GraphExperts
from gohgraph.feed_forward import FeedForward
from gohgraph.fold import fold
from gohgraph.graph import head_graph
from gohgraph.graph_config import HeadGraphConfig, RoutingConfig
from gohgraph.head_order import share_important_heads
from gohgraph.keyed import KeyedGraphConv
from gohgraph.learned_topology import LearnedTopologyConv
from gohgraph.load_chart import draw_load
from gohgraph.models import Classifier, LanguageModel, Transformer
from gohgraph.network import HeadNetwork, head_graph_of
from gohgraph.network_files import load_head_graph, save_head_graph
from gohgraph.objects import Heads, MultiHeadAttention
from gohgraph.outputs import ModelOutput
from gohgraph.record import record
from gohgraph.routing import HeadRouter, Routing
from gohgraph.site_config import BaselineConfig, SiteConfig
from gohgraph.stacks import DecoderLayer, EncoderLayer, Stack
from gohgraph.tensorboard import log_head_graphs

__version__ = "0.1.0"

__all__ = [
    "BaselineConfig",
    "Classifier",
    "ClassifierConfig",
    "DecoderLayer",
    "EncoderLayer",
    "FeedForward",
    "GraphExperts",
    "GraphMultiheadAttention",
    "HeadGraphConfig",
    "HeadGraphConv",
    "HeadNetwork",
    "HeadRouter",
    "Heads",
    "KeyedGraphConv",
    "LanguageModel",
    "LearnedTopologyConv",
    "ModelOutput",
    "MultiHeadAttention",
    "Report",
    "Routing",
    "RoutingConfig",
    "SiteConfig",
    "Stack",
    "Transformer",
    "TransformerConfig",
    "collect_routing",
    "convert",
    "draw",
    "draw_confusion",
    "draw_difference",
    "draw_load",
    "draw_matrices",
    "draw_network",
    "draw_pruning",
    "draw_tokens",
    "fold",
    "head_graph",
    "head_graph_of",
    "head_importance",
    "load_converted",
    "load_head_graph",
    "log_head_graphs",
    "prune",
    "record",
    "save_converted",
    "save_film",
    "save_head_graph",
    "save_page",
    "share_important_heads",
    "unconvert",
]
