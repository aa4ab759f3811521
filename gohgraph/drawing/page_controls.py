"""The controls of an interactive page, where they stand at first, and the line that says what to click."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from gohgraph.drawing.page_script import SQUARED

if TYPE_CHECKING:
    from gohgraph.analysis.network import HeadNetwork

# So many edges can be read: the page begins with them, none below this share of the strongest.
MANY, FAINT = 300, 0.05
WIDGETS = ":host, label, .bk-input-group, .bk-slider-title { color: var(--ink); }"


def first_least(network: HeadNetwork, chosen: np.ndarray, threshold: float | None) -> float:
    """The weight below which edges are hidden at first."""
    strengths = np.sort(np.abs(network.mean.numpy()[chosen]))[::-1]
    strongest = float(strengths.max(initial=0.0))
    if threshold is not None:
        return threshold * strongest
    return max(FAINT * strongest, float(strengths[MANY - 1 : MANY + 1].mean()) if len(strengths) > MANY else 0.0)


def controls_of(network: HeadNetwork, end: float, least: float) -> tuple[Any, Any, Any, Any, Any]:
    """The threshold's slider, choices of sites and layers, the button for the theme, and the line that counts edges."""
    from bokeh.models import CheckboxButtonGroup, CustomJSTickFormatter, Div, MultiChoice, Slider, Toggle

    style = {"stylesheets": [WIDGETS]}
    slider = Slider(
        start=0, end=end**0.5, step=end**0.5 / 200, value=least**0.5, title="hide weights below", name="threshold",
        format=CustomJSTickFormatter(code=SQUARED), width=240, **style,
    )  # fmt: skip
    names = list(dict.fromkeys(network.site))
    sites = CheckboxButtonGroup(labels=names, active=list(range(len(names))), name="sites", margin=(14, 5, 5, 5))
    layers = MultiChoice(options=network.blocks, placeholder="all layers", name="layers", width=240, **style)
    toggle = Toggle(label="dark", name="theme", width=70, margin=(14, 5, 5, 5))
    status = Div(text="", name="status", margin=(0, 5, 0, 15), width_policy="max", **style)
    return slider, sites if len(names) > 1 else None, layers, toggle, status


def hint_of(has_tokens: bool, has_patterns: bool) -> str:
    """Returns what to click in a page whose tokens, and whose heads' attention patterns, are known or not.

    Example:
        >>> hint_of(False, False)
        'Click a head for its senders and receivers; an edge for its two ends; beside them to undo.'
    """
    head = "its pattern, senders and receivers" if has_patterns else "its senders and receivers"
    token = "; a token for the weights there, \u2190 \u2192 for the next" if has_tokens else ""
    return f"Click a head for {head}; an edge for its two ends{token}; beside them to undo."
