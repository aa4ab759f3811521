"""What every head attends to in a call of attention, whatever form computes it."""

from torch import Tensor

from gohgraph.attention.call import Call
from gohgraph.attention.forms import attend
from gohgraph.attention.runs import parted
from gohgraph.attention.watching import nobody, watching


def attention_map(call: Call) -> Tensor:
    """Returns the weights of the keys, `[B, T, H, S]`, after all messages between maps and without dropout.

    It is computed by the slow definition, on whole maps, beside the model's own pass. Of heads that share one softmax
    over the keys of several, the weight of a token is that of all its keys.

    Example:
        >>> import torch
        >>> q = torch.randn(2, 7, 5, 4)
        >>> attention_map(Call(q, q, q)).sum(dim=-1).allclose(torch.ones(2, 7, 5))
        True
    """
    with watching(nobody):
        return _map_of(call._replace(dropout=0.0, core=None, routed=None, need_weights=True))


def _map_of(call: Call) -> Tensor:
    if call.scores is None or not call.scores.graph.traits.joins_keys:
        return attend(call, "maps")[1]
    weights, run = attend(call.joined(), "maps")[1], call.scores.graph.traits.run  # [B, run*T, H/run, run*S]
    return parted(weights, run).unflatten(-1, (-1, run)).sum(dim=-1)  # [B, T, H, S]
