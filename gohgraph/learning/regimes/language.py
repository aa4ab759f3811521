"""Byte-level language modelling: text as token ids, and how well a model predicts it."""

import codecs
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gohgraph.common.checks import there
from gohgraph.learning.data.corpus import evaluation_batches
from gohgraph.models.model_output import ModelOutput

VOCAB_SIZE = 256


def encode(text: str) -> Tensor:
    """Returns the UTF-8 bytes of a text as token ids, int64 `[T]`.

    Example:
        >>> encode("hé").tolist()
        [104, 195, 169]
    """
    return torch.tensor(list(text.encode("utf-8")), dtype=torch.long)


def decode(tokens: Tensor) -> str:
    """Returns the text of token ids `[T]`; bytes that are not UTF-8, as a half-trained model writes, become "\ufffd".

    Example:
        >>> decode(encode("heads"))
        'heads'
    """
    return bytes(tokens.tolist()).decode("utf-8", "replace")


def byte_strings(tokens: Tensor) -> list[str]:
    """Returns token ids `[T]` as strings, one for each; a character of several bytes stands at its last one.

    Example:
        >>> byte_strings(encode("h\u00e9"))
        ['h', '', '\u00e9']
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    return [decoder.decode(bytes([byte])) for byte in tokens.tolist()]


def next_token_output(model: nn.Module, batch: tuple[Tensor, Tensor]) -> ModelOutput:
    """Returns a language model's output for `(inputs [B, T], targets [B, T])`: a loss for `train`.

    It carries the loss (mean cross entropy in nats, plus the weighted losses of routers and graph experts) and what
    the routers did.
    """
    inputs, targets = batch
    return model(inputs, targets=targets)


@torch.no_grad()
def window_losses(model: nn.Module, data: Tensor, *, batch_size: int, length: int, limit: int | None = None) -> Tensor:
    """Measures a language model on the fixed windows of `evaluation_batches`, one number each.

    Window by window, two models are compared far more precisely than by their means: hard windows are hard for both.

    Args:
        model: used as it is; call `model.eval()` first.
        data: bytes `[N]`.
        batch_size, length, limit: as in `evaluation_batches`.

    Returns:
        Mean loss of every window in nats per token, float64 `[windows]`, on the CPU.

    Example:
        >>> import gohgraph as goh
        >>> model = goh.LanguageModel(goh.TransformerConfig(256, d_model=8, num_heads=2, num_layers=1, d_ff=8)).eval()
        >>> window_losses(model, torch.arange(100, dtype=torch.uint8), batch_size=2, length=10, limit=3).shape
        torch.Size([3])
    """
    device = next(model.parameters()).device
    losses = []
    for inputs, targets in evaluation_batches(data, batch_size=batch_size, length=length, limit=limit):
        logits = model(inputs.to(device)).logits.float()  # [B, T, V]
        each = F.cross_entropy(logits.transpose(1, 2), targets.to(device), reduction="none")  # [B, T]
        losses.append(each.cpu().double().mean(dim=1))
    return torch.cat(losses)


@torch.no_grad()
def head_loads(model: nn.Module, data: Tensor, *, batch_size: int, length: int, limit: int | None = None) -> Tensor:
    """Measures which heads a routed language model uses on the fixed windows of `evaluation_batches`.

    Args:
        model, data, batch_size, length, limit: as in `window_losses`; a model without routers is refused.

    Returns:
        Share of tokens each head is active for, float64 `[L, H]`, one row for each router, on the CPU.

    Example:
        >>> import gohgraph as goh
        >>> shape = dict(d_model=8, num_heads=4, num_layers=1, d_ff=8, head_graph=goh.HeadGraphConfig.moh(1, 2))
        >>> model = goh.LanguageModel(goh.TransformerConfig(256, **shape)).eval()
        >>> load = head_loads(model, torch.arange(100, dtype=torch.uint8), batch_size=2, length=10)
        >>> load[0, 0].item(), round(load[0, 1:].sum().item(), 6)
        (1.0, 2.0)
    """
    device = next(model.parameters()).device
    total, windows = torch.zeros((), dtype=torch.double), 0
    for inputs, _ in evaluation_batches(data, batch_size=batch_size, length=length, limit=limit):
        routing = model(inputs.to(device)).routing
        if not routing:
            kind = type(model).__name__
            raise ValueError(f"Expected routers (got a {kind} without). Do build it with HeadGraphConfig.moh(...).")
        # The last batch may hold fewer windows than the others.
        loads = torch.stack([there(decision.load) for decision in routing])  # [L, H]
        total = total + len(inputs) * loads.cpu().double()
        windows += len(inputs)
    return total / windows


def sample_text(model: Any, data: Tensor, *, length: int, samples: int = 4, seed: int = 0) -> str:
    """Lets a language model continue pieces of a text: a quarter of the length is given, in brackets.

    It continues no further than the length it was trained on, past which it has seen nothing.

    Args:
        model: a `LanguageModel` of bytes.
        data: bytes `[N]`, of which `samples` windows begin the samples.
        length: bytes of one sample.
        samples: how many; an empty line stands between them.
        seed: of the sampling; the global random state is left as it was.
    """
    known, device = max(1, length // 4), next(model.parameters()).device
    prompts, _ = next(evaluation_batches(data, batch_size=samples, length=known, limit=samples))
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        texts = model.generate(prompts.to(device), max(1, length - known), temperature=0.8).cpu()
    return "\n\n".join(f"[{decode(text[:known])}]{decode(text[known:])}" for text in texts) + "\n"


def standard_error(values: Tensor) -> float:
    """Returns the standard error of the mean of `values [N]`; NaN for fewer than two.

    Example:
        >>> round(standard_error(torch.tensor([1.0, 2.0, 3.0])), 4)
        0.5774
    """
    return float(values.std() / len(values) ** 0.5) if len(values) > 1 else float("nan")
