"""The forms of attention that leave out heads a router turned off: what they refuse, and when they pay."""

from typing import Any

import torch
from torch import Tensor

from gohgraph.attention.call import Call, Result
from gohgraph.attention.grouped import FROM_KEYS, LARGEST_SHARE, grouped_attention, may_pay
from gohgraph.attention.skipped import ActiveHeads, only_multiplies
from gohgraph.common.checks import there
from gohgraph.common.modules import is_traced

# Numbers per row that need not be read for heads that are off, from which leaving these out pays on a CPU; with fewer
# the calls cost more. By `tools/benchmark.py routing`: between 0.79 and 0.98 million on one thread, between 0.33 and
# 0.39 on two, where a single token's `F.linear` keeps but one of them busy.
SKIP_FROM_UNREAD_ON_ONE_THREAD, SKIP_FROM_UNREAD = 950_000, 350_000


def why_all_heads(block: Any, x: Tensor, keys: int) -> str:
    """Returns why a routed block projects all heads of `x [B, T, M]` over `keys` keys; empty if it does not."""
    if x.shape[1] != 1 or not len(x):
        return "more than one token"
    if torch.is_grad_enabled() or is_traced() or (block.training and block.dropout):
        return "in training, or under torch.compile"
    if block.inner_graphs or (block.score_graph is not None and block.score_graph.traits.keyed):
        return "graphs at further sites, or edges that read the keys' tokens"
    if x.device.type != "cpu" and block.form != "skipped":
        return "measured to pay on a CPU only"
    projections = (block.query, block.key, block.value, block.output)
    # Weights are read by head, past the modules that hold them: these must do nothing else, nor autocast.
    if torch.is_autocast_enabled(x.device.type) or not all(map(only_multiplies, projections)):
        return "under autocast, or projections that do more than multiply"
    if block.form is not None:
        return "" if block.form == "skipped" else f"{block.form} was asked for"
    off = 1 - block.router.num_active / block.num_heads
    unread = off * (keys * block.num_kv_heads * block.head_dim + block.d_model**2 / x.shape[0])
    pays_from = SKIP_FROM_UNREAD_ON_ONE_THREAD if torch.get_num_threads() == 1 else SKIP_FROM_UNREAD
    return "" if unread >= pays_from else f"{unread:,.0f} unread numbers, it pays from {pays_from:,} on"


def refuses_skipped(call: Call) -> str:
    """Returns why a call cannot be taken by the active heads of single tokens; empty where it can."""
    if call.routed is None:
        return "no router"
    if isinstance(call.routed.heads, str):
        return call.routed.heads
    if call.need_weights or call.dropout or call.weights is not None or call.core is not None:
        return "dropout, messages between weights, weights that are asked for, or another library's attention"
    return "a float mask" if call.mask.is_float else ""


def skipped(call: Call) -> Result:
    """Attends for single tokens with their active heads alone."""
    heads = there(call.routed).heads
    assert isinstance(heads, ActiveHeads)
    return heads.attend(call.scaled_q, call.k, call.v, call.scores, call.mask.keep), None


def refuses_grouped(call: Call) -> str:
    """Returns why routed heads cannot attend for the tokens that chose them alone; empty where they can."""
    if call.routed is None:
        return "no router"
    if call.messages:
        return "messages between maps"
    if call.need_weights or call.dropout or call.core is not None:
        return "dropout, weights that are asked for, or another library's attention"
    if call.q.shape[1] == 1 or not call.q.numel():
        return "a single query"
    if call.mask.is_float:
        return "a float mask"
    if call.is_compiling:
        return "under torch.compile"
    if call.v.shape[-1] != call.q.shape[-1]:
        return "queries and values of unequal widths"
    return "all heads are active" if call.routed.num_active == call.q.shape[2] else ""


def pays_grouped(call: Call) -> str:
    """Returns why this was measured not to pay; empty where it does."""
    if not may_pay(call.q, call.k.shape[1], call.mask.causal):
        return f"measured to pay on a CPU from {FROM_KEYS} keys on"
    largest, share = LARGEST_SHARE[call.mask.causal], there(call.routed).groups.share(call.q.shape[1])
    return "" if share <= largest else f"{share:.0%} of all queries are to be computed, it pays up to {largest:.0%}"


def grouped(call: Call) -> Result:
    """Attends for many tokens, each routed head for those that chose it alone."""
    return grouped_attention(call.scaled_q, call.k, call.v, there(call.routed).groups, *call.mask), None
