"""Head graphs in TensorBoard, while they are trained."""

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import numpy as np
from torch import nn

from gohgraph.analysis.measures import measures
from gohgraph.analysis.module_names import graph_titles
from gohgraph.analysis.recording import Recording
from gohgraph.analysis.strength import edge_strength
from gohgraph.drawing.circles import draw

if TYPE_CHECKING:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

DPI = 100


def log_head_graphs(writer: Any, model: nn.Module | Mapping[str, Recording], step: int) -> None:
    """Writes head graphs to TensorBoard: their picture, and of every graph the histograms and measures of its edges.

    Tags are `head_graphs` (the circles of `draw`, on a scale from -1 to 1), and below `layer 0 outputs/` and the like
    `mean` and `strength` of edges, and of a recording `static share` and `reciprocity`.

    Args:
        writer: a `torch.utils.tensorboard.SummaryWriter`, or what has its methods.
        model: a recording, for its means over tokens; or a model, for its weights at a context of zero.
        step: of training.

    Raises:
        ValueError: as `draw`.

    Example:
        >>> from unittest.mock import Mock
        >>> import gohgraph as goh
        >>> shape = dict(d_model=8, num_heads=2, num_layers=1, d_ff=8)
        >>> model = goh.LanguageModel(goh.TransformerConfig(9, **shape, head_graph=goh.HeadGraphConfig()))
        >>> writer = Mock()  # torch.utils.tensorboard.SummaryWriter("runs/first")
        >>> log_head_graphs(writer, model, step=100)
        >>> [call.args[0] for call in writer.add_histogram.call_args_list]
        ['layer 0 outputs/mean', 'layer 0 outputs/strength']
    """
    from gohgraph.analysis.network import at_rest

    heads = at_rest(model) if isinstance(model, nn.Module) else model
    figure = draw(heads, limit=1.0)
    figure.set_dpi(DPI)
    canvas = cast("FigureCanvasAgg", figure.canvas)
    canvas.draw()
    # add_figure would import pyplot, with its list of figures.
    writer.add_image("head_graphs", np.asarray(canvas.buffer_rgba())[..., :3], step, dataformats="HWC")
    strengths, measured = edge_strength(model), measures(heads)
    for title, name in zip(graph_titles(list(heads)), heads, strict=True):
        if not heads[name].edge_index.numel():
            continue
        # The default bins end at 1e20: a run that is about to diverge would end in their error and not in its own.
        writer.add_histogram(f"{title}/mean", heads[name].mean, step, bins="auto")
        writer.add_histogram(f"{title}/strength", strengths[name], step, bins="auto")
        numbers = {"static share": measured[name].static_share, "reciprocity": measured[name].reciprocity}
        for measure, value in ({} if isinstance(model, nn.Module) else numbers).items():
            if not math.isnan(value):
                writer.add_scalar(f"{title}/{measure}", value, step)
