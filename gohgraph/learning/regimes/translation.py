"""Training and measuring a translating `Transformer`: label smoothing, loss of each sentence, and BLEU."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gohgraph.common.packages import needs
from gohgraph.learning.data.parallel_text import BOS, EOS, PAD, PairBatches, Subwords
from gohgraph.models.boundary import IGNORED_TARGET, widened
from gohgraph.models.model_output import ModelOutput


def translation_output(
    model: nn.Module, batch: tuple[Tensor, Tensor, Tensor], *, label_smoothing: float = 0.0
) -> ModelOutput:
    r"""Returns a `Transformer`'s output for a batch of `PairBatches`: a loss for `train`.

    .. math:: L = -\sum_v \big((1 - \epsilon) [v = y] + \epsilon / V\big) \log p(v), \quad mean over target tokens

    plus the weighted losses of routers and graph experts. Label smoothing is that of Szegedy et al. 2016, used by
    Vaswani et al. 2017 (section 5.4) with 0.1.

    Args:
        model: a `Transformer`.
        batch: source `[B, S]`, target `[B, T]` and the token after each `[B, T]`.
        label_smoothing: epsilon in [0, 1).
    """
    source, target, after = batch
    output = model(source, target, source_keep_mask=source != PAD, target_keep_mask=after != IGNORED_TARGET)
    logits = widened(output.logits).flatten(0, 1)  # [B*T, V]
    loss = F.cross_entropy(logits, after.flatten(), ignore_index=IGNORED_TARGET, label_smoothing=label_smoothing)
    auxiliary = output.auxiliary_loss
    return output._replace(loss=loss if auxiliary is None else loss + auxiliary)


@torch.no_grad()
def sentence_losses(model: nn.Module, pairs: PairBatches) -> tuple[Tensor, Tensor]:
    """Measures a model on all sentence pairs, without label smoothing.

    Args:
        model: used as it is; call `model.eval()` first.
        pairs: what to measure on.

    Returns:
        Loss of every target sentence in nats, summed over its tokens, float64 `[N]`, and its tokens `[N]`, both on the
        CPU; the quotient of their sums is the loss per token.
    """
    device = next(model.parameters()).device
    losses, counts = [], []
    for batch in pairs.in_order():
        source, target, after = (tensor.to(device) for tensor in batch)
        logits = model(source, target, source_keep_mask=source != PAD).logits.float()  # [B, T, V]
        each = F.cross_entropy(logits.transpose(1, 2), after, reduction="none", ignore_index=IGNORED_TARGET)  # [B, T]
        losses.append(each.cpu().double().sum(dim=1))
        counts.append((after != IGNORED_TARGET).sum(dim=1).cpu())
    return torch.cat(losses), torch.cat(counts)


def translate(
    model: Any, subwords: Subwords, pairs: PairBatches, *, num_beams: int = 4, length_penalty: float = 0.6
) -> Iterator[str]:
    """Yields the translation of every source sentence by beam search (4 beams and 0.6 as Vaswani et al. 2017).

    A translation ends after half as many subwords again as its longest neighbour's source, and 10 more.
    """
    device = next(model.parameters()).device
    for source, _, _ in pairs.in_order():
        longest, source = source.shape[1] * 3 // 2 + 10, source.to(device)
        tokens = model.generate(
            source, bos=BOS, eos=EOS, max_new_tokens=longest, num_beams=num_beams, length_penalty=length_penalty,
            source_keep_mask=source != PAD,
        ).cpu()  # fmt: skip
        yield from map(subwords.decode, tokens)


def bleu(translations: Sequence[str], references: Sequence[str]) -> tuple[float, str]:
    """Returns corpus BLEU in 0..100 and the signature that says how it was computed, by `sacrebleu`.

    Example:
        >>> bleu(["the house is small today"], ["the house is small today"])[0]
        100.0...
    """
    with needs("the package sacrebleu for BLEU", "translation"):
        from sacrebleu.metrics import BLEU
    metric = BLEU()
    score = metric.corpus_score(list(translations), [list(references)]).score
    return score, str(metric.get_signature())
