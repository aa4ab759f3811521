"""What transformers has to know in a process where converted models live: how to call their attention and save them."""

from __future__ import annotations

import sys

from gohgraph.convert.save_pretrained import teach_save_pretrained


def arrive() -> None:
    """Tells transformers, where it is imported; called for every model that is converted, loaded or unpickled."""
    if "transformers.modeling_utils" in sys.modules:
        teach_save_pretrained()
