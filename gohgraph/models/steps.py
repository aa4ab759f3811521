"""The steps of decoding with a language model: the next token's logits, eagerly or compiled."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from gohgraph.attention.block import MultiHeadAttention
from gohgraph.attention.cache import KeyValueCache, padded
from gohgraph.common.checks import check_torch
from gohgraph.models.model_output import logits_of

if TYPE_CHECKING:
    from gohgraph.models.models import LanguageModel

# Compiled steps read a whole number of so many keys, so that texts of about a length have one program.
KEYS_AT_ONCE = 64
# The oldest torch of those tried whose compiler follows attention in one graph.
OLDEST = "2.11"


class Steps:
    """The logits `[B, V]` after new tokens `[B, T]`, with caches of all tokens before.

    Args:
        model: the language model.
        keep_mask: bool `[B, T]` of the prompts, False = padding on the left; `None` without padding.
        length: of prompts and continuations, at most.
    """

    def __init__(self, model: LanguageModel, keep_mask: Tensor | None, length: int) -> None:
        self.model, self.keep_mask, self.length = model, keep_mask, length
        self.caches: list[tuple[KeyValueCache, ...]] = model.decoder.new_caches()

    def __call__(self, new: Tensor) -> Tensor:
        """Takes the step."""
        mask = self.keep_mask
        if mask is not None:
            mask = padded(mask, len(self.caches[0][0]) + new.shape[1])
        return self.model(new, keep_mask=mask, caches=self.caches).logits[:, -1]  # [B, V]


class CompiledSteps(Steps):
    """The same under `torch.compile`: prompts run eagerly, then each token is one program over caches of one size.

    A program serves all calls of one model and kind of input in a process: after the second length, every length.

    Args:
        model, keep_mask, length: as in `Steps`.
        backend: of `torch.compile`.

    Raises:
        ValueError: a torch before 2.11; forward hooks in the model, which compiled programs pass by; weights that are
            sharded or quantised; or scores over the keys of several heads, whose order is that of caches that grow.
    """

    def __init__(
        self, model: LanguageModel, keep_mask: Tensor | None, length: int, *, backend: str = "inductor"
    ) -> None:
        _check_compiles(model)
        super().__init__(model, keep_mask, length)
        self.step = torch.compile(_step, backend=backend, fullgraph=True)
        self.place: Tensor | None = None

    def __call__(self, new: Tensor) -> Tensor:
        """Takes the step."""
        if self.place is None:
            logits = super().__call__(new)
            self._stand_still(new)
            return logits
        logits = self.step(self.model, new, self.place, self.real, self.padding, self.caches)
        self.place += 1
        return logits

    def _stand_still(self, prompts: Tensor) -> None:
        """Gives caches, and the mask of real tokens, the size they keep."""
        batch, tokens = prompts.shape
        size = -(-self.length // KEYS_AT_ONCE) * KEYS_AT_ONCE
        keep = prompts.new_ones(batch, tokens, dtype=torch.bool) if self.keep_mask is None else self.keep_mask
        self.place = torch.tensor([tokens], device=prompts.device)
        self.real, self.padding = padded(keep, size), (~keep).sum(dim=1, keepdim=True)  # [B, S], [B, 1]
        self.caches = [tuple(cache.in_place(size, self.place) for cache in layer) for layer in self.caches]


def _step(
    model: LanguageModel,
    new: Tensor,
    place: Tensor,
    real: Tensor,
    padding: Tensor,
    caches: list[tuple[KeyValueCache, ...]],
) -> Tensor:
    """Returns the logits `[B, V]` after tokens `[B, 1]` that stand at `place [1]`."""
    keep = real & (torch.arange(real.shape[1], device=real.device) <= place)  # [B, S]
    positions = place - padding  # [B, 1]
    x = model.embedding(new, positions)  # [B, 1, M]
    decoded = model.decoder(x, keep_mask=keep[:, None, None, :], positions=positions, caches=caches)
    return logits_of(model, decoded.x[:, -1])


def _check_compiles(model: nn.Module) -> None:
    check_torch(OLDEST, "to compile steps", "generate without compile")
    for name, module in model.named_modules():
        reason = _why_eager(module)
        if reason:
            raise ValueError(
                f"Expected a model whose steps can be compiled (got {reason} in {name or 'the model'!r}). Do generate "
                "without compile."
            )


def _why_eager(module: nn.Module) -> str:
    if module._forward_hooks or module._forward_pre_hooks:
        return "forward hooks"
    if any(type(parameter.data) is not Tensor for parameter in module.parameters(recurse=False)):
        return "sharded or quantised weights"
    if isinstance(module, MultiHeadAttention) and module.score_graph is not None:
        return "scores over the keys of several heads" if module.score_graph.traits.joins_keys else ""
    return ""
