"""Flower's names, or an error that says what to install."""

from __future__ import annotations

try:
    from flwr.app import (
        Array,
        ArrayRecord,
        ConfigRecord,
        Context,
        Error,
        Message,
        MessageType,
        MetricRecord,
        RecordDict,
        UserConfig,
    )
    from flwr.clientapp import ClientApp
    from flwr.serverapp import Grid, ServerApp
    from flwr.serverapp.strategy import FedAvg, Strategy
except ImportError as error:
    raise ImportError(
        "Expected the package flwr for federated learning (got none). Do install it, on Python 3.11 or newer: "
        "pip install 'gohgraph[federated]'."
    ) from error

__all__ = [
    "Array",
    "ArrayRecord",
    "ClientApp",
    "ConfigRecord",
    "Context",
    "Error",
    "FedAvg",
    "Grid",
    "Message",
    "MessageType",
    "MetricRecord",
    "RecordDict",
    "ServerApp",
    "Strategy",
    "UserConfig",
]
