"""Time of a converted model against the plain one: forward passes, training steps, and decoding one token.

A Llama of Hugging Face transformers and our own model of the same size and parts, each with the same graphs put into
copies of one plain model, which has random weights. All take turns in one run, in shuffled order; every round gives one
ratio of each to its own plain model, shown with quartiles. On a CPU the time is that of the processor, over all
threads: other programs on the machine count less. Head graphs have moved from their start: nothing in them is zero.

Forward runs in eval mode without gradients, forward and backward is a training step without its optimizer, decode adds
one token to `--past` cached ones.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.backbones import BACKBONES, VOCABULARY, Backbone, Case
from benchmarks.flags import add_shared_flags, check_shared_flags, numbers_of, place
from benchmarks.timing import WARM_UP, Call, interleaved, ratios
from gohgraph.common.checks import check_int, there
from gohgraph.common.tables import markdown_table
from gohgraph.convert import convert
from gohgraph.graphs.config import HeadGraphConfig
from gohgraph.graphs.conv import HeadGraphConv
from gohgraph.graphs.site_config import SiteConfig

DEFAULT_SIZES = ("512/8/2/1024/1", "512/16/2/1024/1", "512/32/2/1024/1")
SMOKE_SIZES = ("24/4/2/7/1",)
DEFAULT_PAST, SMOKE_PAST = 2048, 11
REPEATS = 20
FORM = "d_model/heads/layers/tokens/batch"
VARIANTS = {
    "plain": None,
    "output graph": HeadGraphConfig(),
    "output graph, ring of 4": HeadGraphConfig(SiteConfig.ring(4)),
    "score graph": HeadGraphConfig(None, SiteConfig()),
    "score graph, ring of 2": HeadGraphConfig(None, SiteConfig.ring(2)),
}


class ModelCall(Call):
    """One call of a model on tokens `[B, T]`."""

    def __init__(self, backbone: Backbone, model: nn.Module, tokens: Tensor, past: int) -> None:
        super().__init__(tokens.device)
        self.backbone, self.model, self.tokens, self.past = backbone, model, tokens, past
        if self.device.type == "cpu":
            self.clock = time.process_time


class Forward(ModelCall):
    """A forward pass in eval mode without gradients."""

    def prepare(self) -> None:
        """Turns dropout off."""
        self.model.eval()

    @torch.no_grad()
    def work(self) -> None:
        """Runs the model."""
        self.backbone.forward(self.model, self.tokens)


class Step(ModelCall):
    """A forward and backward pass in training mode."""

    def prepare(self) -> None:
        """Forgets the gradients of the call before."""
        self.model.train().zero_grad()

    def work(self) -> None:
        """Runs the model and its backward pass."""
        self.backbone.loss(self.model, self.tokens).backward()


class Decode(ModelCall):
    """One token in eval mode, after `past` cached ones."""

    @torch.no_grad()
    def __init__(self, backbone: Backbone, model: nn.Module, tokens: Tensor, past: int) -> None:
        super().__init__(backbone, model.eval(), tokens[:, :1], past)
        prompt = torch.randint(VOCABULARY, (len(tokens), past), device=tokens.device)  # [B, S]
        self.cache = backbone.prefill(model, prompt)

    def prepare(self) -> None:
        """Lets the cache forget the token of the call before."""
        self.model.eval()
        self.backbone.forget(self.cache, self.past)

    @torch.no_grad()
    def work(self) -> None:
        """Decodes the token."""
        self.backbone.decode(self.model, self.tokens, self.cache)


KINDS = {"forward": Forward, "forward and backward": Step, "decode": Decode}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this benchmark."""
    parser.add_argument("--sizes", nargs="+", metavar="SIZE", help=f"{FORM} (default: {' '.join(DEFAULT_SIZES)})")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=["forward"], help="(default: forward)")
    parser.add_argument("--models", nargs="+", choices=BACKBONES, default=list(BACKBONES), help="(default: both)")
    parser.add_argument("--only", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="plain is always run")
    parser.add_argument("--past", type=int, help=f"cached keys in decoding (default: {DEFAULT_PAST})")
    add_shared_flags(parser, REPEATS)


def cases(flags: argparse.Namespace) -> list[Case]:
    """Fills in the defaults of `flags` and returns the sizes to measure.

    Raises:
        ValueError: a flag that cannot be measured.
    """
    check_shared_flags(flags, REPEATS)
    if flags.past is None:
        flags.past = SMOKE_PAST if flags.smoke else DEFAULT_PAST
    check_int("--past", flags.past, low=1)
    flags.only = [name for name in VARIANTS if name == "plain" or name in flags.only]
    sizes = flags.sizes or (SMOKE_SIZES if flags.smoke else DEFAULT_SIZES)
    found = [Case(*numbers_of(text, FORM, DEFAULT_SIZES[0]))._replace(past=flags.past) for text in sizes]
    if min(case.tokens for case in found) < 2:
        raise ValueError(f"Expected at least 2 tokens, to tell the next one (got sizes {sizes}). Do pass more.")
    return found


def calls(case: Case, flags: argparse.Namespace) -> int:
    """Returns how many calls `measure` times."""
    return len(flags.models) * len(flags.only) * len(flags.kinds) * (flags.repeats + WARM_UP)


def measure(case: Case, flags: argparse.Namespace, progress: tqdm) -> list[dict[str, Any]]:
    """Returns one row of measurements for every plain model and each converted one, for each kind of call."""
    progress.set_description(f"{case.d_model}/{case.num_heads}/{case.num_layers} tokens {case.tokens}")
    models: dict[tuple[str, str], nn.Module] = {}
    for backbone in flags.models:
        torch.manual_seed(0)
        plain = BACKBONES[backbone].build(case).to(**place(flags))
        models |= {(backbone, variant): converted(plain, VARIANTS[variant]) for variant in flags.only}
    tokens = torch.randint(VOCABULARY, (case.batch, case.tokens), device=flags.device)  # [B, T]
    rows = []
    for kind in flags.kinds:
        steps = {key: KINDS[kind](BACKBONES[key[0]], model, tokens, case.past) for key, model in models.items()}
        seconds = interleaved(steps, flags.repeats, progress)
        for (backbone, variant), model in models.items():
            own, parameters = seconds[backbone, variant], sum(parameter.numel() for parameter in model.parameters())
            row = {"size": case._asdict(), "kind": kind, "model": backbone, "variant": variant}
            clock = "processor" if flags.device == "cpu" else "wall"
            row |= {"parameters": parameters, "clock": clock, "seconds": own}
            rows.append({**row, "ratio": ratios(own, seconds[backbone, "plain"])})
    return rows


def tables(rows: list[dict[str, Any]]) -> list[str]:
    """Returns one Markdown table for each kind of call."""
    size = ", ".join(f"{name} {value}" for name, value in rows[0]["size"].items())
    shown = []
    for kind in dict.fromkeys(row["kind"] for row in rows):
        time_of = "CPU time" if rows[0]["clock"] == "processor" else "time"
        lines = [["", "parameters", f"{time_of} (quartiles)", "ratio to its plain (quartiles)"]]
        for row in (row for row in rows if row["kind"] == kind):
            low, median, high = (value * 1e3 for value in statistics.quantiles(row["seconds"], method="inclusive"))
            cells = [f"{row['model']}, {row['variant']}", f"{row['parameters']:,}"]
            cells.append(f"{median:.2f} ms ({low:.2f}-{high:.2f})")
            low, median, high = row["ratio"]
            lines.append([*cells, f"{median:.3f} ({low:.3f}-{high:.3f})"])
        shown.append(markdown_table(lines, f"**{kind}**, {size}"))
    return shown


@torch.no_grad()
def converted(plain: nn.Module, config: HeadGraphConfig | None) -> nn.Module:
    """Returns a copy of the plain model with head graphs whose edges have moved; without a configuration, itself."""
    if config is None:
        return plain
    model = convert(copy.deepcopy(plain), config).model
    for module in model.modules():
        if isinstance(module, HeadGraphConv):
            nn.init.normal_(module.edges.bias, std=0.1)
            nn.init.normal_(there(module.edges.weight), std=0.1 * module.edges.context_dim**-0.5)
    return model
