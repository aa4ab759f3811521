"""`save_pretrained` of transformers for models that have head graphs in them.

Once a first model of a process has head graphs, `PreTrainedModel.save_pretrained` is wrapped: it does as ever for all
models that no conversion gave any. That way it holds for whatever calls it: Trainer, `push_to_hub`, pipelines,
sentence-transformers, a part of a converted model, and a larger model that contains one.
"""

from __future__ import annotations

import functools
from typing import Any, cast


def teach_save_pretrained() -> None:
    """Lets transformers' models save their head graphs with them; once for all."""
    from transformers import PreTrainedModel

    stock = PreTrainedModel.save_pretrained
    if hasattr(stock, "knows_head_graphs"):
        return

    @functools.wraps(stock)
    def save_pretrained(self: Any, *args: Any, **options: Any) -> Any:
        return stock(_seen_by_saving(self), *args, **options)

    vars(save_pretrained)["knows_head_graphs"] = True
    cast(Any, PreTrainedModel).save_pretrained = save_pretrained


def _seen_by_saving(model: Any) -> Any:
    """Returns the model, and one with head graphs as a shallow copy whose configuration is written with them."""
    from gohgraph.convert.converted_config import WrittenWithGraphs
    from gohgraph.convert.description import describe

    # Loaded adapters are saved alone, without a configuration.
    description = None if getattr(model, "_hf_peft_config_loaded", False) else describe(model)
    if description is None:
        return model
    # Not copy.copy: FSDP's classes build a new model then.
    shown = object.__new__(type(model))
    shown.__dict__ = {**model.__dict__, "config": WrittenWithGraphs(model.config, description)}
    return shown
