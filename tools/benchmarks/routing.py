"""Time and cache reads of decoding one token with Mixture-of-Head routing, as speed-up over plain attention.

Timed is the attention sublayer of a causal layer (norm, attention with router and key/value cache, residual) in eval
mode without gradients, on the last token of a context: the cache holds the others, with random keys and values. All
forms have the weights of the plain one and see the same tokens, another in every round, and router weights so large
that a token's active heads are its own. A call decodes one token through four such sublayers, each with weights and a
cache of its own: as in a model, no long context is found in the processor's cache because it has just been read. Each
round runs every row once, in shuffled order, and gives one ratio of plain's time to its own; shown are their median and
quartiles.

Of H heads H/4 are shared and always active; at 25 % active, half of those that are. Skipping is `attention.form`:
off is "plain", which computes all heads and multiplies by the gates, on is "skipped", which leaves out what is off,
auto is the default and chooses. The cache a row reads is found by trial, not taken from the router: a head has been
read where NaN in its cached keys and values makes the output NaN. Rows that differ in skipping alone must give equal
outputs, or nothing is timed. Times and bytes are per token and sublayer.

A second table times the router alone: one token is routed in Python floats, two go the way of many, by torch.

Where other programs keep a core busy, use fewer threads than cores: a thread that waits for its turn adds a scheduler's
time slice, milliseconds, to every step of a call.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.decoding import (
    SKIPPING,
    Case,
    Decode,
    Variant,
    build,
    cache_bytes,
    check_agreement,
    filled_cache,
    heads_read,
)
from benchmarks.flags import DTYPES, add_shared_flags, check_shared_flags, numbers_of, place
from benchmarks.timing import WARM_UP, Call, interleaved, ratios
from gohgraph.attention.routing import HeadRouter
from gohgraph.common.checks import check_int
from gohgraph.common.tables import markdown_table

DEFAULT_SIZES, DEFAULT_CONTEXTS = ("512/8", "1024/16"), (512, 2048, 8192)
SMOKE_SIZES, SMOKE_CONTEXTS = ("32/8",), (5, 67)
REPEATS = 100
CHECKED_TOKENS = 4
LAYERS = 4
FORMS = [(100, False), (75, False), (50, False), (25, False), (50, True)]
ROUTED_TOKENS = {1: "in Python floats", 2: "by torch"}
VARIANTS = [None, *(Variant(percent, skipping, graph) for percent, graph in FORMS for skipping in SKIPPING)]


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this benchmark."""
    sizes, contexts = " ".join(DEFAULT_SIZES), " ".join(map(str, DEFAULT_CONTEXTS))
    parser.add_argument("--sizes", nargs="+", metavar="SIZE", help=f"d_model/heads (default: {sizes})")
    parser.add_argument("--contexts", nargs="+", type=int, metavar="LENGTH", help=f"tokens (default: {contexts})")
    parser.add_argument("--batch", type=int, default=1, help="sequences decoded together (default: %(default)s)")
    add_shared_flags(parser, REPEATS)


def cases(flags: argparse.Namespace) -> list[Case]:
    """Fills in the defaults of `flags` and returns the sizes and contexts to measure.

    Raises:
        ValueError: a flag that cannot be measured.
    """
    check_shared_flags(flags, REPEATS)
    check_int("--batch", flags.batch, low=1)
    contexts = flags.contexts or (SMOKE_CONTEXTS if flags.smoke else DEFAULT_CONTEXTS)
    # With one key there is no past to read.
    for context in contexts:
        check_int("--contexts", context, low=2)
    sizes = [_size(text) for text in flags.sizes or (SMOKE_SIZES if flags.smoke else DEFAULT_SIZES)]
    return [Case(*size, context, flags.batch) for size in sizes for context in contexts]


def calls(case: Case, flags: argparse.Namespace) -> int:
    """Returns how many calls `measure` times."""
    return (len(VARIANTS) + len(ROUTED_TOKENS)) * (flags.repeats + WARM_UP)


def measure(case: Case, flags: argparse.Namespace, progress: tqdm) -> list[dict[str, Any]]:
    """Returns one row of measurements for plain attention and for each variant."""
    progress.set_description(f"{case.d_model}/{case.num_heads} context {case.context}")
    stacks = {
        variant: [build(variant, case, seed).to(**place(flags)) for seed in range(LAYERS)] for variant in VARIANTS
    }
    layers = {variant: stack[0] for variant, stack in stacks.items()}
    head_dim = case.d_model // case.num_heads
    torch.manual_seed(1)
    tokens = torch.randn(flags.repeats + WARM_UP, case.batch, 1, case.d_model, **place(flags))  # [N, B, 1, M]
    past = torch.randn(2, case.batch, case.context - 1, case.num_heads, head_dim, **place(flags))
    keys, values = past  # [B, S-1, H, D] each
    caches = [filled_cache(keys, values) for _ in range(LAYERS)]
    check_agreement(layers, caches[0], tokens[:CHECKED_TOKENS])
    read = {variant: heads_read(layer, caches[0], tokens[0]) for variant, layer in layers.items()}
    steps = {variant: Decode(stack, caches, tokens) for variant, stack in stacks.items()}
    seconds = interleaved(steps, flags.repeats, progress)
    itemsize = DTYPES[flags.dtype].itemsize
    rows = [
        {
            "size": case._asdict(),
            "variant": "plain" if variant is None else variant.name,
            "active_heads": case.num_heads * (100 if variant is None else variant.percent) // 100,
            "skipping": None if variant is None else variant.skipping,
            "seconds": [each / (case.batch * LAYERS) for each in seconds[variant]],
            "speed_up": ratios(seconds[None], seconds[variant]),
            "cache_bytes": cache_bytes(read[variant], case.context, head_dim, itemsize),
        }
        for variant in VARIANTS
    ]
    return rows + _router_rows(case, flags, progress)


class Route(Call):
    """Routes tokens `[N, M]`."""

    def __init__(self, router: HeadRouter, x: Tensor) -> None:
        super().__init__(x.device)
        self.router, self.x = router, x

    @torch.no_grad()
    def work(self) -> None:
        """Runs the router as decoding does."""
        self.router(self.x, statistics=False)


def _router_rows(case: Case, flags: argparse.Namespace, progress: tqdm) -> list[dict[str, Any]]:
    """The router alone: the way of one token, and that of many."""
    quarter = case.num_heads // 4
    router = HeadRouter(case.d_model, case.num_heads, quarter, quarter).to(**place(flags)).eval()
    inputs = {tokens: torch.randn(tokens, case.d_model, **place(flags)) for tokens in ROUTED_TOKENS}
    steps = {tokens: Route(router, x) for tokens, x in inputs.items()}
    seconds = interleaved(steps, flags.repeats, progress)
    return [
        {
            "size": case._asdict(),
            "router": f"{tokens} token{'s' * (tokens > 1)}, {how}",
            "seconds": seconds[tokens],
            "speed_up": ratios(seconds[2], seconds[tokens]),
        }
        for tokens, how in ROUTED_TOKENS.items()
    ]


def tables(rows: list[dict[str, Any]]) -> list[str]:
    """Returns the Markdown table of a case, from the rows of `measure`; the first is plain."""
    size = ", ".join(f"{name} {value}" for name, value in rows[0]["size"].items())
    lines = [["", "active heads", "skipping", "time per token", "speed-up (quartiles)", "cache read", "to plain"]]
    for row in rows:
        low, median, high = row["speed_up"]
        if "router" in row:
            continue
        cells = [row["variant"], f"{row['active_heads']} of {row['size']['num_heads']}", row["skipping"] or "-"]
        cells += [f"{statistics.median(row['seconds']) * 1e3:.3f} ms", f"{median:.2f} ({low:.2f}-{high:.2f})"]
        share = row["cache_bytes"] / rows[0]["cache_bytes"]
        lines.append([*cells, f"{row['cache_bytes'] / 2**20:.2f} MiB", f"{share:.0%}"])
    routers = [["", "time per call", "speed-up (quartiles)"]]
    for row in rows:
        if "router" in row:
            low, median, high = row["speed_up"]
            milliseconds = f"{statistics.median(row['seconds']) * 1e3:.3f} ms"
            routers.append([row["router"], milliseconds, f"{median:.2f} ({low:.2f}-{high:.2f})"])
    return [
        markdown_table(lines, f"**decoding one token**, {size}"),
        markdown_table(routers, f"**the router alone**, {size}"),
    ]


def _size(text: str) -> tuple[int, int]:
    d_model, num_heads = numbers_of(text, "d_model/heads", "512/8")
    if num_heads % 4:
        raise ValueError(f"Expected heads in multiples of 4, to halve and quarter them (got {text!r}). Do pass others.")
    return d_model, num_heads
