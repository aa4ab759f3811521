"""The one place that chooses how attention is computed.

Every form computes the same numbers, those of `mixed_attention` on whole maps. A form says why it cannot take a call
(`refuses`), and why it was measured not to pay (`pays`): the first that has neither to say runs. Whoever attends builds
a `Call`: our own block, the drop-in, timm's and transformers' attention, Megatron and tensor parallelism.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from gohgraph.attention.call import Call, Result
from gohgraph.attention.edge_matrices import EdgeMatrices, edge_tiles
from gohgraph.attention.kernels.mixed_attention import flash_mixed_attention, kernel_refuses
from gohgraph.attention.maps import Mix, mixed_attention, plain_attention
from gohgraph.attention.routed_forms import grouped, pays_grouped, refuses_grouped, refuses_skipped, skipped
from gohgraph.attention.runs import parted
from gohgraph.attention.tiled import FEWEST_ROWS, tiled_attention
from gohgraph.attention.tiled_operator import blocks, tiles
from gohgraph.attention.watching import show
from gohgraph.common.checks import there
from gohgraph.graphs.protocol import Messages
from gohgraph.graphs.token_edges import TokenEdges

# Wide heads cost about in-degree times the plain attention core and hold no map of scores; on denser graphs their
# widened keys outgrow the maps. On a CPU maps or tiles are faster from in-degree 3 on, at every length, unless wide
# heads are narrow even so: `tools/benchmark.py thresholds`.
WIDEST_IN_DEGREE, WIDEST_IN_DEGREE_ON_CPU = 4, 2

# Where tiles are the fastest form of dense graphs on a CPU, given queries enough for a tile: from so many keys, or from
# so many numbers of a head's keys, where whole maps take about as long and more memory, or where the maps of the whole
# batch outgrow the cache and those of a sequence are worth a tile: half of them where weights are mixed besides scores.
# Below, and for a few queries over many keys, what is done once a tile outweighs it: `tools/benchmark.py thresholds`.
TILED_FROM_KEYS, TILED_FROM_NUMBERS = 256, 128 * 64
TILED_FROM_MAPS, TILED_FROM_SEQUENCE = 2**18, 2**17

# Wide heads up to so many numbers are faster than tiles, whose products are as thin as heads are, below so many keys.
NARROW_WIDTH, NARROW_BELOW_KEYS = 32, 512


class Form(NamedTuple):
    """One way to compute attention.

    Args:
        name: by which it is asked for.
        refuses: of a call, why it cannot take it; empty where it can.
        pays: of a call it can take, why it was measured not to pay; empty where it does.
        run: the head outputs `[B, T, H, D]`, and the attention weights or `None`.
    """

    name: str
    refuses: Callable[[Call], str]
    pays: Callable[[Call], str]
    run: Callable[[Call], Result]


def attend(call: Call, form: str | None = None) -> Result:
    """Attends in the first form that takes the call and pays, or in the one asked for by name.

    Returns:
        Head outputs `[B, T, H, D]`, and the weights where they were asked for or the core tells them, else `None`.

    Raises:
        ValueError: an unknown form, the one asked for refuses, or all do; with the reasons.

    Example:
        >>> q = torch.randn(2, 7, 5, 4)
        >>> attend(Call(q, q, q))[0].shape
        torch.Size([2, 7, 5, 4])
    """
    call = _prepared(call)
    show(call)
    if form is not None:
        return _named(form, call).run(call)
    return _chosen(call).run(call)


def explain(call: Call, form: str | None = None) -> dict[str, str]:
    """Returns for every form of attention that it is taken, or why not.

    Example:
        >>> q = torch.randn(2, 7, 5, 4)
        >>> explain(Call(q, q, q))["plain"], explain(Call(q, q, q))["grouped"]
        ('taken', 'no router')
    """
    call = _prepared(call)
    taken = _chosen(call) if form is None else _named(form, call)
    reasons = {other.name: other.refuses(call) or other.pays(call) or f"{taken.name} comes first" for other in FORMS}
    return {**reasons, taken.name: "taken"}


def _chosen(call: Call) -> Form:
    able = None
    for form in FORMS:
        if not form.refuses(call):
            if not form.pays(call):
                return form
            able = able or form
    if able is None:
        reasons = "; ".join(f"{form.name}: {form.refuses(call)}" for form in FORMS)
        raise ValueError(f"Expected a form of attention that takes this call (got {reasons}). Do change one of these.")
    return able


def _named(name: str, call: Call) -> Form:
    form = next((form for form in FORMS if form.name == name), None)
    if form is None:
        raise ValueError(f"Expected a form of {[form.name for form in FORMS]} (got {name!r}). Do choose one of them.")
    if reason := form.refuses(call):
        raise ValueError(f"Expected a call that the form {name!r} takes (got {reason}). Do set form=None.")
    return form


def _prepared(call: Call) -> Call:
    """A call under messages as forms take it: with the senders of other ranks, and a mask that says what it is."""
    if call.messages and call.mask.is_float:
        call = call._replace(mask=call.mask.without_zeros())
    if call.scores is None:
        return call
    q, k = call.scores.graph.gather_senders(call.q, call.k)
    return call if q is call.q else call._replace(q=q, k=k)


# Without messages between maps.


def _refuses_plain(call: Call) -> str:
    if call.messages:
        return "messages between maps"
    return "weights are asked for" if call.need_weights and call.core is None else ""


def _plain(call: Call) -> Result:
    if call.core is not None:
        return call.core.attend(call.q, call.k, call.v, call.scale, False)
    keep, is_causal = call.mask.for_kernel(call.q, call.k)
    return plain_attention(call.q, call.k, call.v, keep, call.dropout, is_causal, call.scale), None


# Several heads' keys in one softmax.


def _refuses_paired(call: Call) -> str:
    if call.scores is None or not call.scores.graph.traits.joins_keys:
        return "every head has its own keys"
    return "weights are asked for" if call.need_weights else ""


def _paired(call: Call) -> Result:
    z, _ = _plain(call.joined())
    return parted(z, there(call.scores).graph.traits.run), None


# Under messages between maps.


def _refuses_matrix(call: Call) -> str:
    """What all forms need that take messages as one matrix over heads for every query."""
    if not call.messages:
        return "no messages between maps"
    if call.core is not None and call.core.opaque:
        return call.core.opaque
    if not all(messages.graph.traits.linear for messages in call.messages):
        return "messages that are no matrix over heads"
    if call.need_weights or call.dropout:
        return "dropout, or weights that are asked for"
    if call.mask.is_float:
        return "a float mask"
    if call.q.shape[1] == 1:
        return "a single query"
    if call.is_exported:
        return "under torch.export, which takes torch's own operators alone"
    # What is compiled has no second gradients.
    if call.is_compiling or torch.backends.cuda.flash_sdp_enabled():
        return ""
    return "torch's math kernel was asked for, for second gradients"


def _refuses_shared(call: Call) -> str:
    """Messages between the weights of heads that read the same values are messages between their outputs."""
    if call.weights is None:
        return "no messages between weights"
    if call.scores is not None or not call.weights.graph.traits.linear:
        return "messages between scores, or some that are no matrix over heads"
    if call.core is not None or call.need_weights or call.dropout:
        return "another library's attention, weights that are asked for, or dropout"
    traits, groups = call.weights.graph.traits, call.q.shape[2] // call.k.shape[2]
    among = traits.run or traits.num_heads
    return f"{groups} heads share their values, and messages go among {among}" if groups % among else ""


def _shared(call: Call) -> Result:
    z, _ = _plain(call._replace(weights=None))
    return there(call.weights)(z), None


def _refuses_kernel(call: Call) -> str:
    if reason := _refuses_matrix(call):
        return reason
    if call.weights is not None:
        return "messages between weights"
    if call.is_compiling:
        return "under torch.compile"
    q = call.q
    if call.v.shape[-1] != q.shape[-1] or there(call.scores).graph.traits.num_heads != q.shape[2]:
        return "values of another width, or senders on other ranks"
    return kernel_refuses(q.device, q.dtype, *q.shape[2:])


def _pays_kernel(call: Call) -> str:
    return "never timed on a GPU: it runs where it is asked for"


def _kernel(call: Call) -> Result:
    keep, is_causal = call.mask.for_kernel(call.q, call.k)
    k, v = call.k.to(call.q.dtype), call.v.to(call.q.dtype)
    return flash_mixed_attention(call.scaled_q, k, v, there(call.scores).matrix(), keep, is_causal), None


def _pays_tiled(call: Call) -> str:
    if call.q.device.type != "cpu":
        return "measured to pay on a CPU only"
    widens = call.scores is not None and not (_refuses_wide(call) or _pays_wide(call))
    (batch, rows, heads), (keys, head_dim) = call.q.shape[:3], call.k.shape[1::2]
    width = there(call.scores).graph.traits.most_senders * head_dim if widens else 0
    if 0 < width <= NARROW_WIDTH and keys < NARROW_BELOW_KEYS:
        return f"wide heads of {width} numbers are faster, up to {NARROW_WIDTH} and below {NARROW_BELOW_KEYS} keys"
    maps, is_mixed_twice = heads * rows * keys, call.scores is not None and call.weights is not None
    is_worth_tiles = maps >= TILED_FROM_SEQUENCE // (2 if is_mixed_twice else 1)
    outgrows = not widens and is_worth_tiles and batch * maps >= TILED_FROM_MAPS
    if rows >= FEWEST_ROWS and (keys >= TILED_FROM_KEYS or keys * head_dim >= TILED_FROM_NUMBERS or outgrows):
        return ""
    return (
        f"pays from {FEWEST_ROWS} queries on, and {TILED_FROM_KEYS} keys, {TILED_FROM_NUMBERS} numbers of a head's, or "
        f"{TILED_FROM_MAPS} of all maps"
    )


def _tiled(call: Call) -> Result:
    keep, is_causal = call.mask.for_kernel(call.q, call.k)
    heads = call.scaled_q, call.k, call.v
    edges = _many_edges(call)
    if edges is not None:
        return tiled_attention(*heads, EdgeMatrices(edges, len(call.q)), None, keep, is_causal, edge_tiles), None
    scores, weights = (None if messages is None else messages.matrix() for messages in (call.scores, call.weights))
    operators = (tiles, blocks) if call.is_compiling else ()
    return tiled_attention(*heads, scores, weights, keep, is_causal, *operators), None


def _many_edges(call: Call) -> TokenEdges | None:
    """What messages between scores alone are computed from, where their matrices are too many to keep."""
    if call.scores is None or call.weights is not None:
        return None
    return call.scores.graph.token_edges(call.q, call.scores.context, call.scores.active)


def _refuses_wide(call: Call) -> str:
    if call.scores is None or call.weights is not None:
        return "no messages between scores, or some between weights"
    in_degree = call.scores.graph.traits.most_senders
    if not in_degree:
        return "messages that are no matrix over heads"
    if call.q.shape[-1] != call.v.shape[-1]:
        return "queries and values of unequal widths"
    if call.core is None:
        return "weights are asked for" if call.need_weights else ""
    width = in_degree * call.q.shape[-1]
    if call.core.widest is not None and width > call.core.widest:
        return f"heads of size {in_degree} x {call.q.shape[-1]}, and the attention beneath takes {call.core.widest}"
    return ""


def _pays_wide(call: Call) -> str:
    in_degree, is_single = there(call.scores).graph.traits.most_senders, call.q.shape[1] == 1
    is_costly = call.q.is_cpu and not is_single and in_degree * call.q.shape[-1] > NARROW_WIDTH
    widest = WIDEST_IN_DEGREE_ON_CPU if is_costly else WIDEST_IN_DEGREE
    if in_degree > widest:
        return f"in-degree {in_degree}, it pays up to {widest}"
    # One query is cheaper on its whole maps, unless all its keys have weights.
    return "a single query" if is_single and there(call.scores).keys is None else ""


def _wide(call: Call) -> Result:
    wide, width = there(call.scores).widen(call.q, call.k, call.v), call.v.shape[-1]
    scale = call.q.shape[-1] ** -0.5 if call.scale is None else call.scale
    if call.core is not None:
        z, weights = call.core.attend(*wide, scale, True)
        return z[..., :width], weights
    keep, is_causal = call.mask.for_kernel(call.q, call.k)
    z = plain_attention(*wide, keep_mask=keep, dropout=call.dropout, is_causal=is_causal, scale=scale)
    return z[..., :width], None


def _refuses_maps(call: Call) -> str:
    if call.scores is not None and call.scores.graph.traits.joins_keys:
        return "one softmax over the keys of several heads"
    if call.core is None:
        return ""
    return call.core.opaque if call.messages else "no messages between maps"


def _mix(messages: Messages | None) -> Mix | None:
    # For mypy a named tuple is nothing to call.
    return None if messages is None else messages.__call__


def _maps(call: Call) -> Result:
    keep = call.mask.whole(call.q, call.k)
    scores, weights = _mix(call.scores), _mix(call.weights)
    if not call.need_weights:
        return mixed_attention(call.q, call.k, call.v, scores, weights, keep, call.dropout, call.scale), None
    told: list[Tensor] = []

    def tell(maps: Tensor) -> Tensor:
        maps = maps if weights is None else weights(maps)
        told.append(F.dropout(maps, call.dropout))  # [B, T, H, S]
        return told[0]

    z = mixed_attention(call.q, call.k, call.v, scores, tell, keep, scale=call.scale)
    return z, told[0]


def _pays(call: Call) -> str:
    return ""


FORMS = (
    Form("skipped", refuses_skipped, _pays, skipped),
    Form("grouped", refuses_grouped, pays_grouped, grouped),
    Form("plain", _refuses_plain, _pays, _plain),
    Form("paired", _refuses_paired, _pays, _paired),
    Form("shared", _refuses_shared, _pays, _shared),
    Form("kernel", _refuses_kernel, _pays_kernel, _kernel),
    Form("tiled", _refuses_matrix, _pays_tiled, _tiled),
    Form("wide", _refuses_wide, _pays_wide, _wide),
    Form("maps", _refuses_maps, _pays, _maps),
)
