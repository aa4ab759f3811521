"""Head graphs in models people already have: torch modules, Hugging Face transformers, timm's attention, our own.

`convert` puts them in, `unconvert` takes them out; `save_converted` and `load_converted` keep them on disk.
"""

from gohgraph.convert.blocks import Report
from gohgraph.convert.conversion import convert, unconvert
from gohgraph.convert.saving import load_converted, save_converted

__all__ = ["Report", "convert", "load_converted", "save_converted", "unconvert"]
