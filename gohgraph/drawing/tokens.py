"""Figure of a text as a strip of tokens, with the head graphs of one of them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from gohgraph.analysis.recording import Recording, Recordings
from gohgraph.common.checks import there
from gohgraph.common.files import checked_path
from gohgraph.drawing.circles import check_threshold, circle_label, draw_circle
from gohgraph.drawing.colours import colour_bar, colour_scale
from gohgraph.drawing.figures import INK, WIDTH, finish, new_figure
from gohgraph.drawing.panels import draw_panels, grid_of, panels_of, strongest_weight

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Lines of a strip, inches of each, and letters in it.
ROWS, CELL_HEIGHT, ROOM = 6, 0.27, 92
MOST_EDGES = 200
# From white to dark grey: how far a token's weights are from their mean; the signs' colours stay with the edges.
GREYS = ("#ffffff", "#8c8c8c")
CHOSEN = "#d62728"


class AtToken:
    """What a recording with `every_token=True` says of one token; static edges are the same at all."""

    def __init__(self, recording: Recording, token: int) -> None:
        every = there(recording.every)
        weights = every["weights"]  # [N, R, E]
        self.edge_index, self.num_heads = recording.edge_index, recording.num_heads
        self.mean = weights[token if len(weights) > 1 else 0].double()  # [R, E]
        self.num_shared = recording.num_shared
        active = every.get("active")  # [N, H]
        self.load = torch.ones(self.num_heads) if active is None else active[token].double()  # [H]
        if active is not None:
            both = active[token][self.edge_index[0] % self.num_heads] & active[token][self.edge_index[1]]
            self.mean = self.mean * both


def draw_tokens(
    heads: Recordings,
    token: int,
    path: str | os.PathLike[str] | None = None,
    *,
    title: str | None = None,
    threshold: float = 0.05,
    limit: float | None = None,
) -> Figure:
    """Draw a text as a strip of tokens, and below it the head graphs of one of them.

    The grey of a token tells how far its edge weights are from their mean over tokens (root mean square over all
    graphs). The circles are those of `draw`, with the weights of the token: messages of heads that are off there are
    left out. A long text is cut around the token.

    Args:
        heads: recorded with `every_token=True` and `token_strings`, one sequence.
        token: number of the token, from 0; from the end where it is negative.
        title: a line above; `None` names token and text.
        path, threshold, limit, and what is returned: as in `draw`.

    Raises:
        ValueError: a recording without every token or its strings, a token that the text does not have, and as `draw`.

    Example:
        >>> import gohgraph as goh
        >>> shape = dict(d_model=8, num_heads=2, num_layers=1, d_ff=8)
        >>> model = goh.LanguageModel(goh.TransformerConfig(9, **shape, head_graph=goh.HeadGraphConfig()))
        >>> with goh.record(model, every_token=True, token_strings=list("abc")) as heads:
        ...     _ = model(torch.tensor([[1, 2, 3]]))
        >>> draw_tokens(heads, -1).get_suptitle()
        'token 2, c over “abc”'
    """
    path = checked_path(path)
    check_threshold(threshold)
    strings = check_tokens_recorded(heads)
    if not -len(strings) <= token < len(strings):
        raise ValueError(f"Expected a token from 0 to {len(strings) - 1} (got {token}). Do choose one of the text.")
    token %= len(strings)
    panels = panels_of({name: AtToken(recording, token) for name, recording in heads.items()})
    rows, columns, size = grid_of(panels)
    lines = _around(strip_of(strings), token)
    strip = CELL_HEIGHT * len(lines) + 0.25
    heights = [strip] + [size + 0.22] * len(rows)
    width = max(size * columns, 6.5)
    figure = new_figure(width, sum(heights) + 0.8)
    grid = figure.add_gridspec(len(heights), columns, height_ratios=heights)
    _draw_strip(figure.add_subplot(grid[0, :]), strings, lines, token, token_changes(heads), width)
    strongest = strongest_weight(panels)
    colours = colour_scale(strongest, limit)
    axes = np.array([[figure.add_subplot(grid[r + 1, c]) for c in range(columns)] for r in range(len(rows))])
    faint_below = threshold * strongest
    draw_panels(axes, rows, lambda axis, panel: draw_circle(axis, panel, colours, faint_below, size, MOST_EDGES))
    label = "edge weight at the token in red   (arrow: from sender to receiver,  fill: a head's self-loop)"
    colour_bar(figure, axes, colours, circle_label(label, panels, MOST_EDGES))
    title = f"token {token}, {readable(strings[token])}{text_of(strings)}" if title is None else title
    return finish(figure, title, path)


def check_tokens_recorded(heads: Recordings) -> list[str]:
    """Returns the token strings of a recording of all tokens; `ValueError` where it is none."""
    if any(getattr(recording, "every", None) is None for recording in heads.values()):
        raise ValueError("Expected a recording of every token (got means alone). Do record with every_token=True.")
    strings = getattr(heads, "token_strings", None)
    if strings is None:
        raise ValueError("Expected token strings to show (got token_strings=None). Do record with token_strings=[...].")
    numbers = {len(there(recording.every)["weights"]) for recording in heads.values()}
    if others := sorted(numbers - {1, len(strings)}):
        raise ValueError(f"Expected one pass over {len(strings)} tokens (got {others}). Do record a single sequence.")
    return strings


def token_changes(heads: Recordings) -> np.ndarray:
    """Returns how far the weights of every token are from their mean, `[N]`: root mean square over all edges."""
    squares: Any = 0.0
    edges = 0
    for recording in heads.values():
        weights = there(recording.every)["weights"].double()  # [N, R, E]
        squares = squares + (weights - weights.mean(dim=0)).square().sum(dim=(1, 2))  # [N]
        edges += weights[0].numel()
    changes = (squares / max(1, edges)).sqrt().numpy()
    return np.broadcast_to(changes, (len(there(heads.token_strings)),))


def readable(token: str) -> str:
    """Returns a token string with signs for what would not be seen: spaces, tabs, line ends.

    Example:
        >>> readable(" the"), readable("\\n")
        ('\u2423the', '\u21b5')
    """
    shown = token.replace("\n", "\u21b5").replace("\t", "\u21e5").replace(" ", "\u2423")
    return "".join(sign if sign.isprintable() else "\u00b7" for sign in shown) or "\u00b7"


def text_of(strings: Sequence[str] | None, most: int = 48) -> str:
    """Returns the beginning of a text for a title, with its quotation marks; nothing where it is not known.

    Example:
        >>> text_of(["heads", " talk"])
        ' over \u201cheads talk\u201d'
    """
    if not strings:
        return ""
    text = " ".join("".join(strings).split())
    shown = text if len(text) <= most else text[: most - 1] + "\u2026"
    return f" over \u201c{shown}\u201d"


def strip_of(strings: list[str], room: float = ROOM) -> list[list[tuple[int, float, float]]]:
    """Returns the lines of a strip: (number, left edge, width) of every token, in letters; `room` of them in a line.

    Example:
        >>> strip_of(["a", "bcd"], room=3)
        [[(0, 0.0, 1.6)], [(1, 0.0, 3.6)]]
    """
    lines: list[list[tuple[int, float, float]]] = [[]]
    used = 0.0
    for number, string in enumerate(strings):
        need = len(readable(string)) + 0.6
        if used + need > room and lines[-1]:
            lines.append([])
            used = 0.0
        lines[-1].append((number, used, need))
        used += need
    return lines


def shades_of(changes: np.ndarray) -> np.ndarray:
    """Returns the shade of every token in [0, 1]; extremes of a few tokens do not leave the others white."""
    low, high = np.quantile(changes, [0.02, 0.98])
    return np.clip((changes - low) / max(high - low, 1e-12), 0, 1)


def _around(lines: list, token: int) -> list:
    """The lines around the chosen token."""
    at = next(index for index, line in enumerate(lines) if token in [number for number, _, _ in line])
    first = max(0, min(at - ROWS // 2, len(lines) - ROWS))
    return lines[first : first + ROWS]


def _draw_strip(axis: Axes, strings: list[str], lines: list, token: int, changes: np.ndarray, width: float) -> None:
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.patches import Rectangle

    greys = LinearSegmentedColormap.from_list("greys", GREYS)
    shade = shades_of(changes)
    axis.set(xlim=(0, ROOM), ylim=(len(lines), 0))
    axis.set_axis_off()
    font = min(8.5, 8.5 * width / WIDTH)
    for row, line in enumerate(lines):
        for number, left, need in line:
            chosen = number == token
            box = Rectangle((left, row + 0.06), need - 0.12, 0.88, facecolor=greys(shade[number]), zorder=1 + chosen)
            box.set(edgecolor=CHOSEN if chosen else "#dddddd", linewidth=2 if chosen else 0.5)
            axis.add_patch(box)
            axis.text(
                left + need / 2, row + 0.52, readable(strings[number]), fontsize=font, family="monospace",
                ha="center", va="center_baseline", color=INK, zorder=3, parse_math=False,
            )  # fmt: skip
