"""Where the heads of a stock model read and write its residual stream, found by structure."""

from gohgraph.analysis.architectures.wiring import AttentionUnit, FeedForwardUnit, Reading, Rows, Stream, Wiring
from gohgraph.analysis.architectures.wiring_of import wiring_of

__all__ = ["AttentionUnit", "FeedForwardUnit", "Reading", "Rows", "Stream", "Wiring", "wiring_of"]
