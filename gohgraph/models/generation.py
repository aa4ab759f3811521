"""Decoding: sampling one token at a time, and beam search."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from gohgraph.common.checks import check_int, check_number


def sample(logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None) -> Tensor:
    """Draws one token from each row of logits, `[B]`.

    Args:
        logits: `[B, V]`.
        temperature: divides the logits; 0 takes the most likely token.
        top_k: keeps the k most likely tokens.
        top_p: then keeps the fewest tokens whose probability reaches p (nucleus, arXiv 1904.09751).

    Example:
        >>> sample(torch.tensor([[0.0, 2.0, 1.0]]), temperature=0).tolist()
        [1]
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits.float()
    # The largest becomes 0, so that a temperature near 0 does not divide to infinity.
    logits = (logits - logits.amax(dim=-1, keepdim=True)) / temperature
    if top_k is not None:
        least = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[:, -1:]  # [B, 1]
        logits = logits.masked_fill(logits < least, float("-inf"))
    # Rounded up, the mass before the least likely token is 1, and p = 1 would drop it.
    if top_p is not None and top_p < 1:
        ranked, order = logits.sort(dim=-1, descending=True)  # [B, V] each
        before = ranked.softmax(dim=-1).cumsum(dim=-1) - ranked.softmax(dim=-1)  # mass of the more likely ones
        logits = logits.scatter(-1, order, ranked.masked_fill(before >= top_p, float("-inf")))
    return torch.multinomial(logits.softmax(dim=-1), 1).squeeze(-1)  # [B]


def check_sampling(max_new_tokens: int, temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Raises `TypeError` or `ValueError` for sampling settings of a wrong type or out of range."""
    check_int("max_new_tokens", max_new_tokens, low=1)
    check_number("temperature", temperature, low=0)
    if top_k is not None:
        check_int("top_k", top_k, low=1)
    if top_p is not None:
        check_number("top_p", top_p, above=0, high=1)


def continued(
    step: Callable[[Tensor], Tensor],
    tokens: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    eos: int | None = None,
) -> Tensor:
    """Continues each prompt `[B, T]` token by token: `[B, T + new]`.

    Args:
        step: `new tokens [B, T] -> logits [B, V]` of the token after them; the first call gets the prompts.
        tokens: the prompts.
        max_new_tokens: number of tokens to add, fewer when all rows have ended.
        temperature, top_k, top_p: as in `sample`.
        eos: token that ends a row; the row is filled with it.
    """
    new = tokens
    ended = None if eos is None else torch.zeros(tokens.shape[0], dtype=torch.bool, device=tokens.device)
    for _ in range(max_new_tokens):
        token = sample(step(new), temperature, top_k, top_p)  # [B]
        if ended is not None and eos is not None:
            token = torch.where(ended, eos, token)
            ended = ended | (token == eos)
        new = token.unsqueeze(1)
        tokens = torch.cat((tokens, new), dim=1)
        if ended is not None and ended.all():
            break
    return tokens


@torch.no_grad()
def beam_search(
    step: Callable[[Tensor, Tensor], Tensor],
    batch: int,
    *,
    bos: int,
    eos: int,
    max_new_tokens: int,
    num_beams: int = 4,
    length_penalty: float = 0.6,
    device: torch.device | None = None,
) -> Tensor:
    r"""Finds the likeliest sequences `[B, 1 + length]`, from `bos` on, keeping the `num_beams` best at every length.

    Hypotheses, ended ones among them, are ranked by log P / ((5 + length) / 6)^length_penalty (Wu et al. 2016,
    arXiv 1609.08144, equation 14, without coverage); one beam is greedy decoding.

    Args:
        step: `(tokens [B*K], rows [B*K]) -> logits [B*K, V]` of the next token: the last tokens of all hypotheses,
            and for each the row it continues, by which caches are reordered first.
        batch: B.
        bos, eos: ids of the first and of the ending token; hypotheses that ended are filled with `eos`.
        max_new_tokens: longest hypothesis, without `bos`.
        num_beams: K.
        length_penalty: 0 ranks by probability alone, which favours short ones.
        device: where the search runs.
    """
    check_int("max_new_tokens", max_new_tokens, low=1)
    check_int("num_beams", num_beams, low=1)
    sequences = torch.full((batch * num_beams, 1), bos, device=device)  # [B*K, 1]
    # All beams of an input begin alike: only the first may propose, or the same hypothesis would fill them all.
    log_p = torch.full((batch, num_beams), float("-inf"), device=device)
    log_p[:, 0] = 0.0
    lengths = torch.zeros_like(log_p)
    ended = torch.zeros_like(log_p, dtype=torch.bool)
    rows = torch.arange(batch * num_beams, device=device)
    first_row = torch.arange(0, batch * num_beams, num_beams, device=device).unsqueeze(1)  # [B, 1]
    for _ in range(max_new_tokens):
        next_log_p = step(sequences[:, -1], rows).float().log_softmax(dim=-1).unflatten(0, (batch, num_beams))
        next_log_p[ended] = float("-inf")
        next_log_p[..., eos][ended] = 0.0
        total = log_p.unsqueeze(-1) + next_log_p  # [B, K, V]
        grown = (lengths + ~ended).unsqueeze(-1)  # [B, K, 1]
        ranked = (total / ((5 + grown) / 6) ** length_penalty).flatten(1)  # [B, K*V]
        best = ranked.topk(num_beams, dim=-1).indices  # [B, K]
        beam, token = best // next_log_p.shape[-1], best % next_log_p.shape[-1]
        log_p = total.flatten(1).gather(1, best)
        lengths, ended = grown.squeeze(-1).gather(1, beam), ended.gather(1, beam) | (token == eos)
        rows = (first_row + beam).flatten()  # [B*K]
        sequences = torch.cat((sequences[rows], token.flatten().unsqueeze(1)), dim=1)
        if ended.all():
            break
    score = log_p / ((5 + lengths) / 6) ** length_penalty
    return sequences.unflatten(0, (batch, num_beams))[torch.arange(batch, device=device), score.argmax(dim=1)]
