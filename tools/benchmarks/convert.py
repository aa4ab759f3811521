"""Time of a converted model's forward pass against the stock one, without gradients or with a training step.

Both are a Llama of Hugging Face transformers with the same random weights, of the size given; they take turns in one
run, in shuffled order, and every round gives one ratio. Head graphs have moved from their start: nothing in them is
zero. The first row of a table is the stock model.
"""

from __future__ import annotations

import argparse
import copy
import statistics
from typing import Any, NamedTuple

import torch
from torch import nn
from tqdm import tqdm

from benchmarks.flags import add_shared_flags, check_shared_flags, numbers_of, place
from benchmarks.timing import WARM_UP, Call, interleaved, ratios
from gohgraph.common.tables import markdown_table
from gohgraph.convert import convert
from gohgraph.graphs.config import HeadGraphConfig
from gohgraph.graphs.conv import HeadGraphConv
from gohgraph.graphs.site_config import SiteConfig

DEFAULT_SIZES, SMOKE_SIZES = ("768/12/12/256/1",), ("24/4/2/7/1",)
REPEATS = 20
FORM = "d_model/heads/layers/tokens/batch"
VOCABULARY = 256
VARIANTS = {
    "stock": None,
    "output graph": HeadGraphConfig(),
    "output graph, ring of 4": HeadGraphConfig(SiteConfig.ring(4)),
    "score graph, ring of 2": HeadGraphConfig(None, SiteConfig.ring(2)),
}


class Case(NamedTuple):
    """The size of a model and its input."""

    d_model: int
    num_heads: int
    num_layers: int
    tokens: int
    batch: int


class Forward(Call):
    """A forward pass in eval mode without gradients."""

    def __init__(self, model: nn.Module, tokens: torch.Tensor) -> None:
        super().__init__(tokens.device)
        self.model, self.tokens = model.eval(), tokens

    @torch.no_grad()
    def work(self) -> None:
        """Runs the model."""
        self.model(input_ids=self.tokens, use_cache=False)


class Step(Call):
    """A forward and backward pass in training mode."""

    def __init__(self, model: nn.Module, tokens: torch.Tensor) -> None:
        super().__init__(tokens.device)
        self.model, self.tokens = model, tokens

    def prepare(self) -> None:
        """Forgets the gradients of the call before."""
        self.model.train().zero_grad()

    def work(self) -> None:
        """Runs the model and its backward pass."""
        self.model(input_ids=self.tokens, labels=self.tokens, use_cache=False).loss.backward()


KINDS = {"forward": Forward, "forward and backward": Step}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this benchmark."""
    parser.add_argument("--sizes", nargs="+", metavar="SIZE", help=f"{FORM} (default: {DEFAULT_SIZES[0]})")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=["forward"], help="(default: forward)")
    add_shared_flags(parser, REPEATS)


def cases(flags: argparse.Namespace) -> list[Case]:
    """Fills in the defaults of `flags` and returns the sizes to measure.

    Raises:
        ValueError: a flag that cannot be measured.
        ImportError: transformers is not installed.
    """
    check_shared_flags(flags, REPEATS)
    sizes = flags.sizes or (SMOKE_SIZES if flags.smoke else DEFAULT_SIZES)
    return [Case(*numbers_of(text, FORM, DEFAULT_SIZES[0])) for text in sizes]


def calls(case: Case, flags: argparse.Namespace) -> int:
    """Returns how many calls `measure` times."""
    return len(VARIANTS) * len(flags.kinds) * (flags.repeats + WARM_UP)


def measure(case: Case, flags: argparse.Namespace, progress: tqdm) -> list[dict[str, Any]]:
    """Returns one row of measurements for the stock model and each converted one, for each kind of call."""
    progress.set_description(f"{case.d_model}/{case.num_heads}/{case.num_layers} tokens {case.tokens}")
    torch.manual_seed(0)
    stock = _stock(case).to(**place(flags))
    models = {name: _converted(stock, config) for name, config in VARIANTS.items()}
    tokens = torch.randint(VOCABULARY, (case.batch, case.tokens), device=flags.device)  # [B, T]
    rows = []
    for kind in flags.kinds:
        steps = {name: KINDS[kind](model, tokens) for name, model in models.items()}
        seconds = interleaved(steps, flags.repeats, progress)
        for name in VARIANTS:
            ratio = ratios(seconds[name], seconds["stock"])
            parameters = sum(parameter.numel() for parameter in models[name].parameters())
            rows.append({"size": case._asdict(), "kind": kind, "variant": name, "parameters": parameters})
            rows[-1] |= {"seconds": seconds[name], "ratio": ratio}
    return rows


def tables(rows: list[dict[str, Any]]) -> list[str]:
    """Returns one Markdown table for each kind of call."""
    size = ", ".join(f"{name} {value}" for name, value in rows[0]["size"].items())
    shown = []
    for kind in dict.fromkeys(row["kind"] for row in rows):
        lines = [["", "parameters", "time", "ratio to stock (quartiles)"]]
        for row in (row for row in rows if row["kind"] == kind):
            low, median, high = row["ratio"]
            time = f"{statistics.median(row['seconds']) * 1e3:.1f} ms"
            lines.append([row["variant"], f"{row['parameters']:,}", time, f"{median:.3f} ({low:.3f}-{high:.3f})"])
        shown.append(markdown_table(lines, f"**{kind}**, {size}"))
    return shown


def _stock(case: Case) -> nn.Module:
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError as error:
        raise ImportError("Expected transformers (got none). Do pip install 'gohgraph[hf]'.") from error
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=case.d_model, intermediate_size=4 * case.d_model,
        num_hidden_layers=case.num_layers, num_attention_heads=case.num_heads, num_key_value_heads=case.num_heads,
        max_position_embeddings=max(64, case.tokens), attn_implementation="sdpa",
    )  # fmt: skip
    return LlamaForCausalLM(config)


@torch.no_grad()
def _converted(stock: nn.Module, config: HeadGraphConfig | None) -> nn.Module:
    if config is None:
        return stock
    model = convert(copy.deepcopy(stock), config).model
    for module in model.modules():
        if isinstance(module, HeadGraphConv):
            nn.init.normal_(module.edges.bias, std=0.1)
            nn.init.normal_(module.edges.weight, std=0.1 * module.edges.context_dim**-0.5)
    return model
