"""How the weights of a model start."""

from __future__ import annotations

import math

from torch import nn

from gohgraph.attention.block import MultiHeadAttention
from gohgraph.models.config import TransformerConfig
from gohgraph.models.objects import FeedForward


def initialize(model: nn.Module, config: TransformerConfig) -> None:
    """Draws the matrices of a model from N(0, sd²); biases are zero, and head graphs keep their neutral start.

    With L layers and F inputs of a matrix:

    | `config.init`   | matrices inside a layer | read-outs: attention's output, feed-forward's last | head, patches |
    | --------------- | ----------------------- | -------------------------------------------------- | ------------- |
    | `"normal"`      | 0.02                    | 0.02 / sqrt(2 L)                                    | 0.02          |
    | `"fan-in"`      | 1 / sqrt(F)             | 1 / sqrt(2 L F)                                     | 0.02          |
    | `"fan-in-zero"` | 1 / sqrt(F)             | 0                                                   | 0.02          |

    `"normal"` is that of GPT-2 (Radford et al. 2019, section 2.3), whose scale of read-outs `"fan-in"` takes over. With
    read-outs of zero every layer starts as the identity (muP, arXiv 2203.03466, appendix D.2, proposes it).
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    for module in model.modules():
        if isinstance(module, MultiHeadAttention):
            _start((module.query, module.key, module.value), module.output, config)
        elif isinstance(module, FeedForward):
            inner = (module.inner,) if module.gate is None else (module.inner, module.gate)
            _start(inner, module.outer, config)


def _start(inside: tuple[nn.Linear, ...], read_out: nn.Linear, config: TransformerConfig) -> None:
    by_fan_in = config.init != "normal"
    if by_fan_in:
        for linear in inside:
            nn.init.normal_(linear.weight, std=linear.in_features**-0.5)
    if config.init == "fan-in-zero":
        nn.init.zeros_(read_out.weight)
    else:
        deviation = read_out.in_features**-0.5 if by_fan_in else 0.02
        nn.init.normal_(read_out.weight, std=deviation / math.sqrt(2 * config.num_layers))
