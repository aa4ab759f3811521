"""Figures of head graphs, one file per view; each function takes data, returns the figure and never shows it."""

from gohgraph.analysis.module_names import graph_titles
from gohgraph.drawing.attention_patterns import draw_attention
from gohgraph.drawing.circles import draw
from gohgraph.drawing.curves import draw_curves
from gohgraph.drawing.difference import draw_difference
from gohgraph.drawing.faithfulness import draw_faithfulness
from gohgraph.drawing.film import save_film
from gohgraph.drawing.layered import draw_network
from gohgraph.drawing.matrices import draw_matrices
from gohgraph.drawing.notebook import show
from gohgraph.drawing.page import save_page
from gohgraph.drawing.pruning import draw_pruning
from gohgraph.drawing.tokens import draw_tokens

__all__ = [
    "draw",
    "draw_attention",
    "draw_curves",
    "draw_difference",
    "draw_faithfulness",
    "draw_matrices",
    "draw_network",
    "draw_pruning",
    "draw_tokens",
    "graph_titles",
    "save_film",
    "save_page",
    "show",
]
