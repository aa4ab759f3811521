"""Graphs-of-Heads: attention heads as the nodes of an explicit graph that passes messages between them."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from gohgraph.analysis import head_importance, prune
from gohgraph.analysis.attribution_graph import attribution_graph
from gohgraph.analysis.composition import composition_graph
from gohgraph.analysis.faithfulness import faithfulness
from gohgraph.analysis.head_labels import label_heads
from gohgraph.analysis.network_files import load_head_graph, save_head_graph
from gohgraph.analysis.record import record
from gohgraph.attention.block import Heads, MultiHeadAttention
from gohgraph.attention.routing import HeadRouter, Routing
from gohgraph.attention.routing_hooks import collect_routing
from gohgraph.convert import Report, convert, load_converted, save_converted, unconvert
from gohgraph.convert.auto_classes import offer_model_types
from gohgraph.convert.dropin import GraphMultiheadAttention
from gohgraph.convert.fold import fold
from gohgraph.convert.head_order import share_important_heads
from gohgraph.drawing import (
    draw,
    draw_attention,
    draw_difference,
    draw_faithfulness,
    draw_matrices,
    draw_network,
    draw_pruning,
    draw_tokens,
    save_film,
    save_page,
    show,
)
from gohgraph.drawing.confusion_chart import draw_confusion
from gohgraph.drawing.load_chart import draw_load
from gohgraph.drawing.tensorboard import log_head_graphs
from gohgraph.graphs.config import HeadGraphConfig, RoutingConfig
from gohgraph.graphs.cross_layer import CrossLayer
from gohgraph.graphs.graph import head_graph
from gohgraph.graphs.site_config import BaselineConfig, SiteConfig
from gohgraph.models.config import ClassifierConfig, TransformerConfig
from gohgraph.models.model_output import ModelOutput
from gohgraph.models.models import Classifier, LanguageModel, Transformer
from gohgraph.models.objects import FeedForward
from gohgraph.models.stacks import DecoderLayer, EncoderLayer, Stack

if TYPE_CHECKING:
    from gohgraph.analysis.network import HeadNetwork, head_graph_of
    from gohgraph.graphs.conv import HeadGraphConv
    from gohgraph.graphs.experts import GraphExperts
    from gohgraph.graphs.keyed import KeyedGraphConv
    from gohgraph.graphs.learned_topology import LearnedTopologyConv
else:
    # Subclasses of PyG's classes, and what makes them. They are imported when they are first asked for: PyG takes
    # longer than everything else together.
    BUILT_ON_PYG = {
        "GraphExperts": "gohgraph.graphs.experts",
        "HeadGraphConv": "gohgraph.graphs.conv",
        "HeadNetwork": "gohgraph.analysis.network",
        "KeyedGraphConv": "gohgraph.graphs.keyed",
        "LearnedTopologyConv": "gohgraph.graphs.learned_topology",
        "head_graph_of": "gohgraph.analysis.network",
    }

    # Type checkers, which would take any name for one of the package's, do not see this.
    def __getattr__(name: str) -> Any:
        if name not in BUILT_ON_PYG:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(import_module(BUILT_ON_PYG[name]), name)
        return value


__version__ = "0.2.0"

offer_model_types()

__all__ = [
    "BaselineConfig",
    "Classifier",
    "ClassifierConfig",
    "CrossLayer",
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
    "attribution_graph",
    "collect_routing",
    "composition_graph",
    "convert",
    "draw",
    "draw_attention",
    "draw_confusion",
    "draw_difference",
    "draw_faithfulness",
    "draw_load",
    "draw_matrices",
    "draw_network",
    "draw_pruning",
    "draw_tokens",
    "faithfulness",
    "fold",
    "head_graph",
    "head_graph_of",
    "head_importance",
    "label_heads",
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
    "show",
    "unconvert",
]


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
