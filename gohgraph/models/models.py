"""Complete models: a language model, an encoder-decoder transformer, and a classifier."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gohgraph.attention.cache import KeyValueCache, reorder_all
from gohgraph.common.checkpoint import PretrainedMixin
from gohgraph.common.checks import check_int
from gohgraph.models.boundary import (
    check_ids,
    check_length,
    check_tokens,
    next_token_loss,
    positions_and_masks,
    widened,
)
from gohgraph.models.config import ClassifierConfig, TransformerConfig
from gohgraph.models.embeddings import TokenEmbedding
from gohgraph.models.generation import beam_search, check_sampling, continued
from gohgraph.models.init import initialize
from gohgraph.models.keywords import by_name, next_tokens, real_tokens, required
from gohgraph.models.model_output import ModelOutput, logits_of, model_output
from gohgraph.models.stacks import Stack, StackOutput
from gohgraph.models.steps import CompiledSteps, Steps


class LanguageModel(PretrainedMixin, nn.Module):
    """Decoder-only language model whose attention heads may form graphs.

    Args:
        config: the transformer's configuration.

    Shape:
        tokens `[B, T]` -> logits `[B, T, V]`.

    Raises:
        ValueError: in forward, token ids outside of the vocabulary or more of them than learned positions.

    Example:
        >>> from gohgraph.graphs.config import HeadGraphConfig
        >>> shape = dict(d_model=32, num_heads=4, num_layers=2, d_ff=64)
        >>> model = LanguageModel(TransformerConfig(256, **shape, head_graph=HeadGraphConfig()))
        >>> tokens = torch.tensor([list(b"heads talk to heads")])
        >>> model(tokens[:, :-1], targets=tokens[:, 1:]).loss.shape
        torch.Size([])
        >>> model.generate(tokens, max_new_tokens=5).shape
        torch.Size([1, 24])
    """

    config_class = TransformerConfig
    model_type = "gohgraph"

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = TokenEmbedding(config)
        self.decoder = Stack(config, "causal")
        self.head = None if config.tie_embeddings else nn.Linear(config.d_model, config.vocab_size, bias=False)
        initialize(self, config)

    def forward(
        self,
        tokens: Tensor | None = None,
        targets: Tensor | None = None,
        *,
        keep_mask: Tensor | None = None,
        caches: list[tuple[KeyValueCache, ...]] | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> ModelOutput:
        """Predicts the next token at every position.

        Args:
            tokens: `[B, T]`; with caches, those after the cached ones.
            targets: `[B, T]` next tokens; -100 is ignored.
            keep_mask: bool `[B, S]` over cached and new tokens, False = padding, on either side.
            caches: from `decoder.new_caches()`, extended in place.
            input_ids, attention_mask, labels: the same by the names of transformers' Trainer, in place of the others;
                labels are the tokens themselves. Returns a dictionary then, with `loss` and `logits`.
        """
        if input_ids is not None:
            targets = None if labels is None else next_tokens(labels)
            return by_name(self(input_ids, targets, keep_mask=real_tokens(attention_mask)))
        tokens = required("tokens", tokens)
        check_tokens(tokens, self.config.vocab_size)
        past = len(caches[0][0]) if caches else 0
        check_length(self.config, past + tokens.shape[1])
        positions, mask, real = positions_and_masks(tokens, past, keep_mask)
        x = self.embedding(tokens, positions)  # [B, T, M]
        decoded = self.decoder(x, keep_mask=mask, positions=positions, caches=caches, token_mask=real)
        logits = logits_of(self, decoded.x)
        return model_output(logits, next_token_loss(logits, targets), [decoded], self.config.head_graph)

    if TYPE_CHECKING:
        __call__ = forward

    @torch.no_grad()
    def generate(
        self,
        tokens: Tensor,
        max_new_tokens: int,
        *,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        eos: int | None = None,
        keep_mask: Tensor | None = None,
        compile: bool | str = False,
    ) -> Tensor:
        """Continues each prompt, with a key/value cache.

        Args:
            tokens: prompts `[B, T]`, shorter ones padded on the left under `keep_mask` `[B, T]`.
            max_new_tokens: number of tokens to add, fewer when all rows have ended.
            temperature, top_k, top_p: as in `generation.sample`; temperature 0 is greedy.
            eos: token that ends a row; the row is filled with it.
            compile: runs the steps after the prompt under `torch.compile`, over caches of one size: worth it for many
                or long calls, since the first takes a minute. A string names a backend of torch.

        Returns:
            Prompts and continuations `[B, T + new]`.

        Raises:
            TypeError, ValueError: settings out of range, an empty prompt, padding on the right, with learned positions
                more tokens than `max_length`; with `compile`, a model that does not fit, see `CompiledSteps`.
        """
        check_sampling(max_new_tokens, temperature, top_k, top_p)
        if tokens.dim() != 2 or tokens.shape[1] == 0:
            raise ValueError(f"Expected prompts of shape [B, T], T >= 1 (got {list(tokens.shape)}). Do pass a token.")
        check_length(self.config, tokens.shape[1] + max_new_tokens - 1)
        check_ids(self.config.vocab_size, eos=eos)
        if keep_mask is not None and (keep_mask.shape != tokens.shape or not keep_mask[:, -1].all()):
            raise ValueError(
                f"Expected a keep_mask of shape {list(tokens.shape)} that ends in True (got {list(keep_mask.shape)}). "
                "Do pad prompts on the left."
            )
        length, backend = tokens.shape[1] + max_new_tokens, compile if isinstance(compile, str) else "inductor"
        step = Steps(self, keep_mask, length)
        if compile:
            step = CompiledSteps(self, keep_mask, length, backend=backend)
        return continued(step, tokens, max_new_tokens, temperature=temperature, top_k=top_k, top_p=top_p, eos=eos)


class Transformer(PretrainedMixin, nn.Module):
    """Encoder-decoder transformer (Vaswani et al. 2017), source and target sharing one vocabulary.

    Every attention has head graphs of its own: the encoder's, the decoder's and the cross attention.

    Args:
        config: the transformer's configuration; `num_layers` layers in each stack.

    Shape:
        source `[B, S]`, target `[B, T]` -> logits `[B, T, V]`.

    Example:
        >>> config = TransformerConfig(11, d_model=16, num_heads=2, num_layers=1, d_ff=32, positions="sinusoidal")
        >>> model = Transformer(config).eval()
        >>> model.generate(torch.tensor([[3, 4, 5]]), bos=1, eos=2, max_new_tokens=4, num_beams=3).shape[0]
        1
    """

    config_class = TransformerConfig
    model_type = "gohgraph-seq2seq"

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.embedding = TokenEmbedding(config)
        self.encoder = Stack(config, "encoder")
        self.decoder = Stack(config, "decoder")
        self.head = None if config.tie_embeddings else nn.Linear(config.d_model, config.vocab_size, bias=False)
        initialize(self, config)

    def encode(self, source: Tensor, keep_mask: Tensor | None = None) -> StackOutput:
        """Returns the encoder's output, x `[B, S, M]`, for source tokens `[B, S]` under a token mask `[B, S]`."""
        check_tokens(source, self.config.vocab_size)
        positions, mask, real = positions_and_masks(source, 0, keep_mask)
        x = self.embedding(source, positions)  # [B, S, M]
        return self.encoder(x, keep_mask=mask, positions=positions, token_mask=real)

    def decode(
        self,
        target: Tensor,
        memory: Tensor,
        *,
        keep_mask: Tensor | None = None,
        memory_keep_mask: Tensor | None = None,
        caches: list[tuple[KeyValueCache, ...]] | None = None,
    ) -> StackOutput:
        """Returns the decoder's output, x `[B, T, M]`, given the encoder's `[B, S, M]`; masks are token masks."""
        check_tokens(target, self.config.vocab_size)
        past = len(caches[0][0]) if caches else 0
        check_length(self.config, past + target.shape[1])
        positions, mask, real = positions_and_masks(target, past, keep_mask)
        cross = None if memory_keep_mask is None else memory_keep_mask[:, None, None, :]  # [B, 1, 1, S]
        x = self.embedding(target, positions)  # [B, T, M]
        masks = {"keep_mask": mask, "memory_keep_mask": cross, "token_mask": real}
        return self.decoder(x, memory, positions=positions, caches=caches, **masks)

    def forward(
        self,
        source: Tensor | None = None,
        target: Tensor | None = None,
        targets: Tensor | None = None,
        *,
        source_keep_mask: Tensor | None = None,
        target_keep_mask: Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> ModelOutput:
        """Predicts the token after each target token (teacher forcing); -100 in `targets` is ignored.

        The last five arguments are the same by the names of transformers' Trainer, in place of the others: `labels` is
        what `targets` is. It returns a dictionary then, with `loss` and `logits`.
        """
        if input_ids is not None:
            masks = {
                "source_keep_mask": real_tokens(attention_mask), "target_keep_mask": real_tokens(decoder_attention_mask)
            }  # fmt: skip
            return by_name(self(input_ids, decoder_input_ids, labels, **masks))
        encoded = self.encode(required("source", source), source_keep_mask)
        target = required("target", target)
        decoded = self.decode(target, encoded.x, keep_mask=target_keep_mask, memory_keep_mask=source_keep_mask)
        logits = logits_of(self, decoded.x)
        return model_output(logits, next_token_loss(logits, targets), [encoded, decoded], self.config.head_graph)

    if TYPE_CHECKING:
        __call__ = forward

    @torch.no_grad()
    def generate(
        self,
        source: Tensor,
        *,
        bos: int,
        eos: int,
        max_new_tokens: int,
        num_beams: int = 1,
        length_penalty: float = 0.6,
        source_keep_mask: Tensor | None = None,
    ) -> Tensor:
        """Translates: greedy with one beam, else beam search, with caches; see `generation.beam_search`.

        Returns:
            Targets `[B, 1 + new]`, from `bos`, filled with `eos` after their end.
        """
        check_int("max_new_tokens", max_new_tokens, low=1)
        check_int("num_beams", num_beams, low=1)
        check_length(self.config, max_new_tokens)
        check_ids(self.config.vocab_size, bos=bos, eos=eos)
        memory = self.encode(source, source_keep_mask).x.repeat_interleave(num_beams, dim=0)  # [B*K, S, M]
        mask = None if source_keep_mask is None else source_keep_mask.repeat_interleave(num_beams, dim=0)
        caches = self.decoder.new_caches()

        def step(tokens: Tensor, rows: Tensor) -> Tensor:
            reorder_all(caches, rows)
            decoded = self.decode(tokens.unsqueeze(1), memory, memory_keep_mask=mask, caches=caches)
            return logits_of(self, decoded.x[:, -1])

        return beam_search(
            step, source.shape[0], bos=bos, eos=eos, max_new_tokens=max_new_tokens, num_beams=num_beams,
            length_penalty=length_penalty, device=source.device,
        )  # fmt: skip


class Classifier(PretrainedMixin, nn.Module):
    """Encoder with mean pooling over tokens: classifies token sequences, or images cut into patches.

    Args:
        config: the classifier's configuration.

    Shape:
        tokens `[B, T]`, or images `[B, channels, height, width]` with sides multiples of `patch_size`
        -> logits `[B, num_classes]`.

    Raises:
        ValueError: in forward, images of other channels or sides, or tokens outside of the vocabulary.
        TypeError: in forward, images or tokens of another dtype.

    Example:
        >>> encoder = TransformerConfig(1, d_model=16, num_heads=2, num_layers=1, d_ff=32, positions="learned")
        >>> model = Classifier(ClassifierConfig(encoder, num_classes=10, patch_size=2, channels=1))
        >>> model(torch.rand(5, 1, 8, 8)).logits.shape
        torch.Size([5, 10])
    """

    config_class = ClassifierConfig
    model_type = "gohgraph-classifier"

    def __init__(self, config: ClassifierConfig) -> None:
        super().__init__()
        self.config = config
        encoder, side = config.transformer, config.patch_size
        self.embedding = TokenEmbedding(encoder)
        if side is not None:
            # Patches take the place of token ids: the embedding table becomes a linear map of pixels.
            self.embedding.tokens = nn.Linear(config.channels * side**2, encoder.d_model)
        self.encoder = Stack(encoder, "encoder")
        self.head = nn.Linear(encoder.d_model, config.num_classes)
        initialize(self, encoder)

    def forward(
        self,
        inputs: Tensor | None = None,
        targets: Tensor | None = None,
        *,
        keep_mask: Tensor | None = None,
        input_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> ModelOutput:
        """Classifies each input; `keep_mask` `[B, T]` marks real tokens, `targets` `[B]` are class indices.

        The last four arguments are the same by the names of transformers' Trainer, in place of the others. It returns a
        dictionary then, with `loss` and `logits`.
        """
        if inputs is None:
            inputs = required("inputs", input_ids if pixel_values is None else pixel_values)
            return by_name(self(inputs, labels, keep_mask=real_tokens(attention_mask)))
        if self.config.patch_size is None:
            check_tokens(inputs, self.config.transformer.vocab_size)
        side = self.config.patch_size
        features = inputs if side is None else self._patches(inputs, side)  # [B, T] or [B, T, C*P*P]
        positions, mask, real = positions_and_masks(features, 0, keep_mask)
        x = self.embedding(features, positions)  # [B, T, M]
        encoded = self.encoder(x, keep_mask=mask, positions=positions, token_mask=real)
        x = encoded.x
        keep = x.new_ones(x.shape[:2]) if keep_mask is None else keep_mask.to(x.dtype)
        pooled = torch.einsum("btm,bt->bm", x, keep) / keep.sum(dim=1, keepdim=True).clamp(min=1)  # [B, M]
        logits = self.head(pooled)
        cross_entropy = None if targets is None else F.cross_entropy(widened(logits), targets)
        return model_output(logits, cross_entropy, [encoded], self.config.transformer.head_graph)

    if TYPE_CHECKING:
        __call__ = forward

    def _patches(self, images: Tensor, side: int) -> Tensor:
        channels = self.config.channels
        if images.dim() != 4 or images.shape[1] != channels or images.shape[2] % side or images.shape[3] % side:
            raise ValueError(
                f"Expected images [B, {channels}, height, width] with sides multiples of {side} "
                f"(got {list(images.shape)}). Do resize or choose another patch_size."
            )
        if not images.is_floating_point():
            raise TypeError(f"Expected images of a floating dtype (got {images.dtype}). Do pass images.float() / 255.")
        return F.unfold(images, side, stride=side).transpose(1, 2)  # [B, T, C*P*P]
