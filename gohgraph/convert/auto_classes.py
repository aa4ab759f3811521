"""The model types that transformers' Auto classes learn when gohgraph is imported, before transformers or after it.

transformers looks for no plug-ins by itself. `import gohgraph` does not import it either: it waits, by `when_imported`,
for whoever imports the module in which model types are registered.
"""

from __future__ import annotations

from gohgraph.common.late_import import when_imported

REGISTRY = "transformers.models.auto.configuration_auto"


def offer_model_types() -> None:
    """Has the model types registered as soon as there are Auto classes to register them with."""
    when_imported(REGISTRY, _register)


def _register() -> None:
    from transformers import AutoConfig

    from gohgraph.convert.converted_config import ConvertedConfig
    from gohgraph.models.auto import CONFIGS

    for config in (ConvertedConfig, *CONFIGS):
        AutoConfig.register(config.model_type, config, exist_ok=True)
