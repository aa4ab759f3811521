"""gohgraph's own models as transformers' Auto classes know them: the configurations of three model types.

`AutoModelForCausalLM.from_pretrained(folder)` reads what `LanguageModel.save_pretrained` wrote, and so on. The models
are in `auto_models`, imported when a configuration is read.
"""

from typing import Any

from transformers import PreTrainedConfig

from gohgraph.models.config import ClassifierConfig, TransformerConfig
from gohgraph.models.models import Classifier, LanguageModel, Transformer

# Of `config.json` as gohgraph's own models write it, what is not about the shape.
OWN = {"model", "format", "gohgraph"}


class GohgraphConfig(PreTrainedConfig):
    """The configuration of a `LanguageModel` for transformers.

    Args:
        config: the model's own configuration, as `to_dict` gives it; `None` for a tiny one, which transformers makes to
            compare with.
        **options: of transformers, e.g. `eos_token_id`.

    Attributes:
        own: the model's own configuration.
    """

    model_type = LanguageModel.model_type
    own_class: type[Any] = TransformerConfig

    def __init__(self, config: dict[str, Any] | None = None, **options: Any) -> None:
        self.config = self._default() if config is None else config
        for name in OWN:
            options.pop(name, None)
        super().__init__(**options)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **options: Any) -> Any:
        """Builds the configuration, and has its models registered with the Auto classes."""
        from gohgraph.models.auto_models import register

        register()
        return super().from_dict(config_dict, **options)

    @property
    def own(self) -> Any:
        """The model's own configuration; built anew, and so checked."""
        return self.own_class.from_dict(self.config)

    @property
    def shape(self) -> TransformerConfig:
        """The transformer's configuration."""
        return self.own

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.shape.vocab_size

    @property
    def hidden_size(self) -> int:
        """M."""
        return self.shape.d_model

    @property
    def num_hidden_layers(self) -> int:
        """Layers of a stack."""
        return self.shape.num_layers

    @property
    def num_attention_heads(self) -> int:
        """H."""
        return self.shape.num_heads

    @property
    def max_position_embeddings(self) -> int:
        """The longest sequence: with positions that have no limit, one far away."""
        return self.shape.max_length if self.shape.positions == "learned" else 2**20

    @classmethod
    def _default(cls) -> dict[str, Any]:
        return TransformerConfig(1, d_model=2, num_heads=1, num_layers=1, d_ff=1).to_dict()


class GohgraphSeq2SeqConfig(GohgraphConfig):
    """The configuration of a `Transformer` for transformers, which starts targets with `decoder_start_token_id`."""

    model_type = Transformer.model_type

    def __init__(self, config: dict[str, Any] | None = None, **options: Any) -> None:
        super().__init__(config, **{**options, "is_encoder_decoder": True})


class GohgraphClassifierConfig(GohgraphConfig):
    """The configuration of a `Classifier` for transformers."""

    model_type = Classifier.model_type
    own_class = ClassifierConfig

    def __init__(self, config: dict[str, Any] | None = None, **options: Any) -> None:
        given = self._default() if config is None else config
        if "id2label" not in options:
            options = {"num_labels": given["num_classes"], **options}
        super().__init__(given, **options)

    @property
    def shape(self) -> TransformerConfig:
        """The encoder's configuration."""
        return self.own.transformer

    @classmethod
    def _default(cls) -> dict[str, Any]:
        return {"transformer": super()._default(), "num_classes": 2}


CONFIGS = (GohgraphConfig, GohgraphSeq2SeqConfig, GohgraphClassifierConfig)
