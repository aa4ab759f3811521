"""Graphs-of-Heads: attention heads as the nodes of an explicit graph that passes messages between them."""

from gohgraph.config import ClassifierConfig, HeadGraphConfig, SiteConfig, TransformerConfig
from gohgraph.conv import HeadGraphConv
from gohgraph.drawing import draw
from gohgraph.fold import fold
from gohgraph.graph import head_graph
from gohgraph.models import Classifier, LanguageModel, ModelOutput, Transformer
from gohgraph.objects import FeedForward, MultiHeadAttention
from gohgraph.record import record
from gohgraph.stacks import DecoderLayer, EncoderLayer, Stack

__version__ = "0.1.0"

__all__ = [
    "Classifier",
    "ClassifierConfig",
    "DecoderLayer",
    "EncoderLayer",
    "FeedForward",
    "HeadGraphConfig",
    "HeadGraphConv",
    "LanguageModel",
    "ModelOutput",
    "MultiHeadAttention",
    "SiteConfig",
    "Stack",
    "Transformer",
    "TransformerConfig",
    "draw",
    "fold",
    "head_graph",
    "record",
]
