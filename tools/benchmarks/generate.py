"""Tokens a second in generating text greedily, against transformers and a minimal loop.

All are of one size and of the same parts: rotary positions, RMS norms, SwiGLU, no biases. `minimal` is a loop written
for this one model, with the plain model's weights; `Llama` is transformers' own, by its own `generate`. Every round
lets all continue the same prompts, in shuffled order. On a CPU the time is that of the processor. Sizes are
d_model/heads/layers/d_ff/prompt/batch.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple, Union

import torch
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.flags import add_shared_flags, check_shared_flags, numbers_of, place
from benchmarks.minimal import MinimalModel
from benchmarks.timing import WARM_UP, Call, interleaved, ratios
from gohgraph.common.checks import check_int
from gohgraph.common.tables import markdown_table
from gohgraph.graphs.config import HeadGraphConfig
from gohgraph.graphs.site_config import SiteConfig
from gohgraph.models.config import TransformerConfig
from gohgraph.models.models import LanguageModel

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

VOCABULARY = 1000
DEFAULT_SIZES, SMOKE_SIZES = ("128/8/4/512/128/1", "512/8/6/1408/512/1"), ("24/4/2/16/7/1",)
FORM = "d_model/heads/layers/d_ff/prompt/batch"
NEW_TOKENS, SMOKE_NEW_TOKENS = 32, 3
REPEATS = 12
OURS = {
    "plain": None,
    "output graph": HeadGraphConfig(),
    "score graph, ring of 2": HeadGraphConfig(None, SiteConfig.ring(2)),
}
OTHERS = ("minimal", "Llama")
Generate = Callable[[Tensor, int], Tensor]
Model = Union[LanguageModel, MinimalModel, "LlamaForCausalLM"]


class Case(NamedTuple):
    """The size of a model, and its input."""

    d_model: int
    num_heads: int
    num_layers: int
    d_ff: int
    prompt: int
    batch: int


class Generation(Call):
    """One call to be measured: prompts are continued by `new` tokens."""

    def __init__(self, generate: Generate, prompts: Tensor, new: int) -> None:
        super().__init__(prompts.device)
        self.generate, self.prompts, self.new = generate, prompts, new
        if self.device.type == "cpu":
            self.clock = time.process_time

    def work(self) -> Tensor:
        """Generates."""
        return self.generate(self.prompts, self.new)


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this benchmark."""
    parser.add_argument("--sizes", nargs="+", metavar="SIZE", help=f"{FORM} (default: {' '.join(DEFAULT_SIZES)})")
    parser.add_argument("--only", nargs="+", choices=(*OURS, *OTHERS), help="plain is always run")
    parser.add_argument(
        "--compile", nargs="?", const="inductor", metavar="BACKEND", help="ours under torch.compile, too"
    )
    parser.add_argument("--new", type=int, help=f"tokens to generate (default: {NEW_TOKENS})")
    add_shared_flags(parser, REPEATS)


def cases(flags: argparse.Namespace) -> list[Case]:
    """Fills in the defaults of `flags` and returns the sizes to measure.

    Raises:
        ValueError: a flag that cannot be measured.
    """
    check_shared_flags(flags, REPEATS)
    flags.new = (SMOKE_NEW_TOKENS if flags.smoke else NEW_TOKENS) if flags.new is None else flags.new
    check_int("--new", flags.new, low=1)
    flags.only = [name for name in (*OURS, *OTHERS) if name == "plain" or name in (flags.only or (*OURS, *OTHERS))]
    sizes = flags.sizes or (SMOKE_SIZES if flags.smoke else DEFAULT_SIZES)
    return [Case(*numbers_of(text, FORM, DEFAULT_SIZES[0])) for text in sizes]


def calls(case: Case, flags: argparse.Namespace) -> int:
    """Returns how many calls `measure` times."""
    ours = [name for name in flags.only if name in OURS]
    return (len(flags.only) + bool(flags.compile) * len(ours)) * (flags.repeats + WARM_UP)


def measure(case: Case, flags: argparse.Namespace, progress: tqdm) -> list[dict[str, Any]]:
    """Returns one row for every model."""
    progress.set_description(f"{case.d_model}/{case.num_heads} prompt {case.prompt}")
    models = {name: build(name, case, flags.new).to(**place(flags)).eval() for name in flags.only}
    prompts = torch.randint(VOCABULARY, (case.batch, case.prompt), device=flags.device)  # [B, T]
    steps = {name: Generation(generating(model), prompts, flags.new) for name, model in models.items()}
    for name in OURS if flags.compile else ():
        if name in models:
            function = generating(models[name], compile=flags.compile)
            steps[f"{name}, compiled"] = Generation(function, prompts, flags.new)
    seconds = interleaved(steps, flags.repeats, progress)
    rows = []
    for name, own in seconds.items():
        row = {"size": case._asdict(), "model": name, "seconds": own, "new": flags.new}
        rows.append({**row, "ratio": ratios(seconds["plain"], own)})
    return rows


def tables(rows: list[dict[str, Any]]) -> list[str]:
    """Returns the Markdown table of a size."""
    size = ", ".join(f"{name} {value}" for name, value in rows[0]["size"].items())
    lines = [["", "tokens a second (quartiles)", "speed to plain (quartiles)"]]
    for row in rows:
        tokens = row["new"] * row["size"]["batch"]
        low, median, high = statistics.quantiles([tokens / each for each in row["seconds"]], method="inclusive")
        lines.append([row["model"], f"{median:.0f} ({low:.0f}-{high:.0f})"])
        low, median, high = row["ratio"]
        lines[-1].append(f"{median:.2f} ({low:.2f}-{high:.2f})")
    return [markdown_table(lines, f"**{rows[0]['new']} tokens after the prompt**, {size}")]


def build(name: str, case: Case, new: int) -> Model:
    """Returns a model by its name, with random weights, edges moved from zero; ours share those of the plain one.

    Raises:
        ImportError: transformers is not installed.
    """
    if name == "Llama":
        return _llama(case, new)
    sizes: dict[str, Any] = dict(zip(("d_model", "num_heads", "num_layers", "d_ff"), case[:4], strict=True))
    parts: dict[str, Any] = {"activation": "swiglu", "norm": "rms", "bias": False, "qk_norm": False}
    torch.manual_seed(0)
    plain = LanguageModel(TransformerConfig(VOCABULARY, **sizes, **parts))
    if name == "minimal":
        return MinimalModel(plain, case.prompt + new)
    model = LanguageModel(replace(plain.config, head_graph=OURS[name]))
    model.load_state_dict(plain.state_dict(), strict=False)
    for key, parameter in model.named_parameters():
        if ".edges." in key:
            nn.init.normal_(parameter, std=0.02)
    return model


def generating(model: Model, *, compile: bool | str = False) -> Generate:
    """Returns a function that continues prompts greedily by so many tokens; our models may `compile` their steps."""
    if isinstance(model, LanguageModel):
        return lambda prompts, new: model.generate(prompts, new, temperature=0, compile=compile)
    if isinstance(model, MinimalModel):
        return model.generate
    # No token ends a text: all generate as many.
    return lambda prompts, new: model.generate(prompts, max_new_tokens=new, do_sample=False, eos_token_id=None)


def _llama(case: Case, new: int) -> LlamaForCausalLM:
    try:
        from transformers import LlamaConfig, LlamaForCausalLM
    except ImportError as error:
        raise ImportError("Expected transformers (got none). Do pip install 'gohgraph[hf]'.") from error
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=case.d_model, intermediate_size=case.d_ff, tie_word_embeddings=True,
        num_hidden_layers=case.num_layers, num_attention_heads=case.num_heads, num_key_value_heads=case.num_heads,
        max_position_embeddings=case.prompt + new, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config)
