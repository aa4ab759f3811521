"""gohgraph's own models as models of transformers: generation, Trainer, pipelines, PEFT, the hub.

Each holds one of `gohgraph.models.models` as `model` and speaks transformers' names: `input_ids`, `attention_mask`,
`labels` that are shifted inside, outputs with `loss` and `logits`.
"""

from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    GenerationMixin,
    PreTrainedModel,
)
from transformers.modeling_outputs import (
    BaseModelOutput,
    CausalLMOutputWithPast,
    ImageClassifierOutput,
    Seq2SeqLMOutput,
)

from gohgraph.common.hub import local_folder
from gohgraph.graphs.edge_graph import EdgeGraph
from gohgraph.models.auto import GohgraphClassifierConfig, GohgraphConfig, GohgraphSeq2SeqConfig, model_folder
from gohgraph.models.auto_cache import OwnCache
from gohgraph.models.keywords import check_unused, next_tokens, real_tokens, shifted_right
from gohgraph.models.model_output import ModelOutput, logits_of
from gohgraph.models.models import Classifier, LanguageModel, Transformer

if TYPE_CHECKING:
    from typing_extensions import Self

EDGES = "edge_index"
# What the cache is called in outputs: older versions of transformers say past_key_values.
CACHE = "cache" if "cache" in CausalLMOutputWithPast.__dataclass_fields__ else "past_key_values"


class OwnModel(PreTrainedModel):
    """What the three have in common: they are built, loaded and initialised as gohgraph does it."""

    config_class = GohgraphConfig
    base_model_prefix = "model"
    own_class: type[nn.Module]
    # Trainer averages the loss over accumulated batches itself.
    accepts_loss_kwargs = False

    def __init__(self, config: GohgraphConfig) -> None:
        super().__init__(config)
        edges = config.__dict__.pop(EDGES, {})
        device = torch.get_default_device()
        on_meta = device.type == "meta"
        # transformers builds on meta what it loads; pruned graphs are found by their edges, which have to be real.
        with torch.random.fork_rng(devices=[], enabled=on_meta), torch.device("cpu") if on_meta else device:
            self.model = self.own_class(config.own)
            _prune(self.model, edges)
        self.post_init()

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *model_args: Any, config: Any = None, **kwargs: Any
    ) -> "Self":
        """Loads what gohgraph or transformers wrote, a run's folder too; as `PreTrainedModel.from_pretrained`."""
        folder = model_folder(local_folder(pretrained_model_name_or_path, dict(kwargs)))
        config = cls.config_class.from_pretrained(folder) if config is None else config
        setattr(config, EDGES, _edges_in(folder))
        return super().from_pretrained(folder, *model_args, config=config, **kwargs)

    def _init_weights(self, module: nn.Module) -> None:
        # The constructor has done so. What loading leaves empty are the tables.
        if isinstance(module, EdgeGraph) and not module.edge_index.is_meta:
            module.edges_changed()

    def _prepare_cache_for_generation(
        self, generation_config: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Gives generation a cache of this model's kind, where it wants one and has none."""
        if generation_config.use_cache is not False and model_kwargs.get(CACHE) is None:
            model_kwargs[CACHE] = OwnCache(self.model.decoder.new_caches())

    def get_input_embeddings(self) -> nn.Module:
        """Returns the token embedding."""
        return self.model.embedding.tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Refuses: the vocabulary is part of the model's configuration."""
        raise ValueError("Expected the vocabulary the model was built with (got another). Do build a new model.")


class GohgraphForCausalLM(OwnModel, GenerationMixin):
    """A `LanguageModel` for `AutoModelForCausalLM`."""

    own_class = LanguageModel
    main_input_name = "input_ids"

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        cache: OwnCache | None = None,
        past_key_values: OwnCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **others: Any,
    ) -> CausalLMOutputWithPast:
        """Predicts the next token at every position; `attention_mask` is over cached and new tokens."""
        check_unused(others)
        cache = past_key_values if cache is None else cache
        if cache is None and use_cache:
            cache = OwnCache(self.model.decoder.new_caches())
        caches = None if cache is None else cache.layers
        targets = None if labels is None else next_tokens(labels)
        output = self.model(input_ids, targets, keep_mask=real_tokens(attention_mask), caches=caches)
        kept: dict[str, Any] = {CACHE: cache}
        return CausalLMOutputWithPast(loss=output.loss, logits=output.logits[:, -logits_to_keep:], **kept)

    if TYPE_CHECKING:
        __call__ = forward

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: OwnCache | None = None,
        past_key_values: OwnCache | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Returns what `forward` takes in one step of generation: the tokens that are not in the cache."""
        cache = past_key_values if cache is None else cache
        known = 0 if cache is None else cache.get_seq_length()
        inputs = {"input_ids": input_ids[:, known:], "attention_mask": attention_mask, "cache": cache}
        return inputs | {"use_cache": use_cache, "logits_to_keep": logits_to_keep}


class OwnEncoder(nn.Module):
    """The encoder of a `Transformer`, as generation calls one; holds the model without owning it."""

    main_input_name = "input_ids"
    of: Transformer

    def __init__(self, model: Transformer) -> None:
        super().__init__()
        self.__dict__["of"] = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **options: Any) -> BaseModelOutput:
        """Encodes source tokens `[B, S]`."""
        return BaseModelOutput(last_hidden_state=self.of.encode(input_ids, real_tokens(attention_mask)).x)


class GohgraphForSeq2SeqLM(OwnModel, GenerationMixin):
    """A `Transformer` for `AutoModelForSeq2SeqLM`."""

    config_class = GohgraphSeq2SeqConfig
    own_class = Transformer
    main_input_name = "input_ids"

    def get_encoder(self, *args: Any, **options: Any) -> nn.Module:
        """Returns what encodes sources."""
        return OwnEncoder(self.model)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        encoder_outputs: Any = None,
        cache: OwnCache | None = None,
        past_key_values: OwnCache | None = None,
        use_cache: bool | None = None,
        **others: Any,
    ) -> Seq2SeqLMOutput:
        """Predicts the token after each target token; without `decoder_input_ids` these are the shifted labels."""
        check_unused(others)
        source, target = real_tokens(attention_mask), real_tokens(decoder_attention_mask)
        if decoder_input_ids is None:
            decoder_input_ids = shifted_right(labels, self.config)
        if encoder_outputs is None and not use_cache:
            masks = {"source_keep_mask": source, "target_keep_mask": target}
            output = self.model(input_ids, decoder_input_ids, labels, **masks)
            return Seq2SeqLMOutput(loss=output.loss, logits=output.logits)
        memory = self.model.encode(input_ids, source).x if encoder_outputs is None else encoder_outputs[0]
        cache = past_key_values if cache is None else cache
        if cache is None and use_cache:
            cache = OwnCache(self.model.decoder.new_caches())
        masks = {"keep_mask": target, "memory_keep_mask": source}
        decoded = self.model.decode(decoder_input_ids, memory, caches=cache and cache.layers, **masks)
        kept: dict[str, Any] = {CACHE: cache}
        return Seq2SeqLMOutput(logits=logits_of(self.model, decoded.x), **kept)

    if TYPE_CHECKING:
        __call__ = forward

    def prepare_inputs_for_generation(
        self, input_ids: Tensor, cache: Any = None, past_key_values: Any = None, **kwargs: Any
    ) -> dict[str, Any]:
        """Returns what `forward` takes in one step of generation."""
        cache = past_key_values if cache is None else cache
        known = 0 if cache is None else cache.get_seq_length()
        names = ("encoder_outputs", "attention_mask", "decoder_attention_mask", "use_cache")
        passed = {name: kwargs.get(name) for name in names}
        return {"decoder_input_ids": input_ids[:, known:], "cache": cache, **passed}


class GohgraphForClassification(OwnModel):
    """A `Classifier` for `AutoModelForSequenceClassification` or `AutoModelForImageClassification`."""

    config_class = GohgraphClassifierConfig
    own_class = Classifier

    def __init__(self, config: GohgraphConfig) -> None:
        super().__init__(config)
        # What it reads: token ids, or images.
        self.main_input_name = "input_ids" if config.own.patch_size is None else "pixel_values"

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        pixel_values: Tensor | None = None,
        **others: Any,
    ) -> ImageClassifierOutput:
        """Classifies each input."""
        check_unused(others)
        inputs = input_ids if pixel_values is None else pixel_values
        output: ModelOutput = self.model(inputs, labels, keep_mask=real_tokens(attention_mask))
        return ImageClassifierOutput(loss=output.loss, logits=output.logits)

    if TYPE_CHECKING:
        __call__ = forward


@cache
def register() -> None:
    """Registers the models with the Auto classes; once for all."""
    pairs = (
        (AutoModelForCausalLM, GohgraphForCausalLM),
        (AutoModelForSeq2SeqLM, GohgraphForSeq2SeqLM),
        (AutoModelForSequenceClassification, GohgraphForClassification),
        (AutoModelForImageClassification, GohgraphForClassification),
    )
    for auto, model in pairs:
        AutoConfig.register(model.config_class.model_type, model.config_class, exist_ok=True)
        auto.register(model.config_class, model, exist_ok=True)


def as_transformers(model: LanguageModel | Transformer | Classifier) -> OwnModel:
    """Returns one of gohgraph's own models as a model of transformers, which holds this very one.

    Example:
        >>> import gohgraph as goh
        >>> own = goh.LanguageModel(goh.TransformerConfig(9, d_model=8, num_heads=2, num_layers=1, d_ff=8))
        >>> as_transformers(own).generate(torch.tensor([[1, 2]]), max_new_tokens=3, do_sample=False).shape
        torch.Size([1, 5])
    """
    register()
    for kind in (GohgraphForCausalLM, GohgraphForSeq2SeqLM, GohgraphForClassification):
        if type(model) is kind.own_class:
            with torch.random.fork_rng(devices=[]):
                outer = kind(kind.config_class(model.config.to_dict()))
            outer.model = model
            return outer.train(model.training)
    raise TypeError(f"Expected one of gohgraph's own models (got a {type(model).__name__}). Do pass it as it is.")


def _prune(model: nn.Module, edges: dict[str, Tensor]) -> None:
    for name, module in reversed(list(model.named_modules())):
        if isinstance(module, EdgeGraph):
            module.prune_to_saved(edges, f"{name}.")


def _edges_in(folder: Path) -> dict[str, Tensor]:
    """The edges of all graphs in a folder's weights, by their names in gohgraph's own model."""
    edges = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(str(path), framework="pt") as file:
            for name in file.keys():
                if name.endswith(f".{EDGES}"):
                    edges[name.removeprefix("model.")] = file.get_tensor(name)
    return edges
