"""The models whose conversion is timed: a Llama of transformers, and our own of the same size and parts."""

from __future__ import annotations

import inspect
from typing import Any, NamedTuple, Protocol

from torch import Tensor, nn

from gohgraph import LanguageModel, TransformerConfig

VOCABULARY = 256


class Case(NamedTuple):
    """The size of a model and its input; `past` is the number of cached keys in decoding."""

    d_model: int
    num_heads: int
    num_layers: int
    tokens: int
    batch: int
    past: int = 2048


class Backbone(Protocol):
    """How a kind of model is built and called."""

    def build(self, case: Case) -> nn.Module:
        """Returns a plain model, with rotary positions, RMS norms, SwiGLU, and no biases."""

    def forward(self, model: nn.Module, tokens: Tensor) -> object:
        """Runs the model on `tokens [B, T]`."""

    def loss(self, model: nn.Module, tokens: Tensor) -> Tensor:
        """Returns the loss of the next token."""

    def prefill(self, model: nn.Module, tokens: Tensor) -> Any:
        """Returns a cache filled with `tokens [B, S]`."""

    def decode(self, model: nn.Module, token: Tensor, cache: Any) -> object:
        """Runs the model on one token `[B, 1]` more, which the cache takes in."""

    def forget(self, cache: Any, past: int) -> None:
        """Lets the cache forget what came after the first `past` tokens."""


class Llama:
    """`LlamaForCausalLM`, sdpa attention."""

    def build(self, case: Case) -> nn.Module:
        """Returns a model with random weights.

        Raises:
            ImportError: transformers is not installed.
        """
        try:
            from transformers import LlamaConfig, LlamaForCausalLM
        except ImportError as error:
            raise ImportError("Expected transformers (got none). Do pip install 'gohgraph[hf]'.") from error
        config = LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=case.d_model, intermediate_size=4 * case.d_model,
            num_hidden_layers=case.num_layers, num_attention_heads=case.num_heads, num_key_value_heads=case.num_heads,
            max_position_embeddings=max(64, case.tokens, case.past + 1),
        )  # fmt: skip
        return LlamaForCausalLM._from_config(config, attn_implementation="sdpa")

    def forward(self, model: nn.Module, tokens: Tensor) -> object:
        """Runs the model."""
        return model(input_ids=tokens, use_cache=False)

    def loss(self, model: nn.Module, tokens: Tensor) -> Tensor:
        """Returns the loss, which transformers shifts itself."""
        return model(input_ids=tokens, labels=tokens, use_cache=False).loss

    def prefill(self, model: nn.Module, tokens: Tensor) -> Any:
        """Returns a filled cache."""
        return getattr(model(input_ids=tokens, use_cache=True), self._cache_name(model))

    def decode(self, model: nn.Module, token: Tensor, cache: Any) -> object:
        """Runs the model on one token more."""
        return model(input_ids=token, use_cache=True, **{self._cache_name(model): cache})

    def forget(self, cache: Any, past: int) -> None:
        """Crops the cache."""
        if surplus := cache.get_seq_length() - past:
            cache.crop(-surplus)

    def _cache_name(self, model: nn.Module) -> str:
        # The name changes in transformers 5.
        return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


class Own:
    """`gohgraph.LanguageModel`."""

    def build(self, case: Case) -> nn.Module:
        """Returns a model with random weights."""
        parts: dict[str, Any] = {"activation": "swiglu", "norm": "rms", "bias": False, "tie_embeddings": False}
        config = TransformerConfig(
            VOCABULARY, case.d_model, case.num_heads, num_layers=case.num_layers, d_ff=4 * case.d_model, qk_norm=False,
            **parts,
        )  # fmt: skip
        return LanguageModel(config)

    def forward(self, model: nn.Module, tokens: Tensor) -> object:
        """Runs the model."""
        return model(tokens)

    def loss(self, model: nn.Module, tokens: Tensor) -> Tensor:
        """Returns the loss."""
        return model(tokens[:, :-1], targets=tokens[:, 1:]).loss

    def prefill(self, model: nn.Module, tokens: Tensor) -> Any:
        """Returns filled caches, of every layer."""
        assert isinstance(model, LanguageModel)
        caches = model.decoder.new_caches()
        model(tokens, caches=caches)
        return caches

    def decode(self, model: nn.Module, token: Tensor, cache: Any) -> object:
        """Runs the model on one token more."""
        return model(token, caches=cache)

    def forget(self, cache: Any, past: int) -> None:
        """Truncates the caches."""
        for layer in cache:
            for one in layer:
                one.truncate(past)


BACKBONES: dict[str, Backbone] = {"Llama": Llama(), "own": Own()}
