"""Flower's names, or an error that says what to install."""

from gohgraph.common.packages import needs

with needs("the package flwr, on Python 3.11 or newer,", "federated"):
    from flwr.app import (  # noqa: F401
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
    from flwr.clientapp import ClientApp  # noqa: F401
    from flwr.serverapp import Grid, ServerApp  # noqa: F401
    from flwr.serverapp.strategy import FedAvg, Strategy  # noqa: F401
