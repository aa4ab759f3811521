"""Equal parameter counts for fair comparisons: the feed-forward of the lighter model is widened."""

import dataclasses
from collections.abc import Callable

from torch import nn

from gohgraph.models.config import TransformerConfig

# Makes a model of a configuration.
Build = Callable[[TransformerConfig], nn.Module]


def count_parameters(model: nn.Module) -> int:
    """Returns the number of trainable parameters, tied ones once."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def match_parameters(build: Build, config: TransformerConfig, parameters: int) -> TransformerConfig:
    """Returns `config` with d_ff widened until its model has as nearly `parameters` parameters as whole units allow.

    The count is linear in d_ff, so one unit more tells its price.

    Args:
        build: makes a model, to count its parameters.
        config: the lighter model's configuration.
        parameters: the count to reach, at least the lighter model's own.

    Example:
        >>> from gohgraph.models.models import LanguageModel
        >>> plain = TransformerConfig(vocab_size=7, d_model=8, num_heads=2, num_layers=2, d_ff=16)
        >>> match_parameters(LanguageModel, plain, 2000).d_ff
        37
    """
    have = count_parameters(build(config))
    if have > parameters:
        raise ValueError(f"Expected a model of at most {parameters} parameters (got {have}). Do widen the other one.")
    unit = count_parameters(build(dataclasses.replace(config, d_ff=config.d_ff + 1))) - have
    return dataclasses.replace(config, d_ff=config.d_ff + round((parameters - have) / unit))


def with_plain(build: Build, config: TransformerConfig) -> dict[str, TransformerConfig]:
    """Returns `config` as "goh" and, as "plain", plain attention of as many parameters.
    """
    if config.head_graph is None:
        raise ValueError("Expected a head graph to compare with (got head_graph=None). Do add --sites or --router.")
    parameters = count_parameters(build(config))
    return {"goh": config, "plain": match_parameters(build, dataclasses.replace(config, head_graph=None), parameters)}
