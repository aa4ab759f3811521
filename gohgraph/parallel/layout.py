"""How the ranks of a job share the work: which hold parts of a model, and which see other data."""

from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from gohgraph.common.checks import check_int

MODES = ("ddp", "fsdp", "tp")
REPLICATE, SHARD, TENSOR = "replicate", "shard", "tensor"


@dataclass(frozen=True)
class ParallelConfig:
    """The kinds of parallelism of a job; they combine.

    Args:
        modes: of `"ddp"` (every rank holds the model and sees its own data), `"fsdp"` (as that, and each holds a part
            of every parameter, `fully_shard`) and `"tp"` (heads sharded, `tensor_parallel`). `"ddp"` beside `"fsdp"`
            shards within a machine and replicates over machines.
        tensor_ranks: ranks that share the heads of a model; `None` for all of them, or 2 beside another mode.
        sequence_parallel: with `"tp"`, tokens are sharded between blocks.
        recompute: activations inside a layer are computed again in backward instead of kept.

    Example:
        >>> ParallelConfig(("tp", "fsdp")).sizes(8)
        (1, 4, 2)
    """

    modes: tuple[str, ...]
    tensor_ranks: int | None = None
    sequence_parallel: bool = False
    recompute: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "modes", tuple(self.modes))
        if not self.modes or len(set(self.modes)) < len(self.modes) or not set(self.modes) <= set(MODES):
            raise ValueError(f"Expected one or more of {list(MODES)} (got {list(self.modes)}). Do choose among them.")
        ranks = self.tensor_ranks
        if ranks is not None:
            check_int("tensor_ranks", ranks, low=1)
        if "tp" not in self.modes and (ranks is not None or self.sequence_parallel):
            option = "sequence_parallel" if ranks is None else f"tensor_ranks = {ranks}"
            raise ValueError(f"Expected tp in the modes for {option} (got {list(self.modes)}). Do add it.")

    @property
    def is_sharded(self) -> bool:
        """Whether no rank holds a whole model."""
        return self.modes != ("ddp",)

    def sizes(self, world: int, machines: int = 1) -> tuple[int, int, int]:
        """Returns the ranks that replicate, that shard data parallel, and that share heads; their product is `world`.

        Ranks that do not divide like this are a `ValueError`.
        """
        alone = self.modes == ("tp",)
        tensor = 1 if "tp" not in self.modes else self.tensor_ranks or (world if alone else 2)
        if world % tensor or (alone and tensor != world):
            raise ValueError(
                f"Expected {tensor} ranks for tensor parallelism, or a multiple beside ddp or fsdp (got {world}). "
                "Do start another number, or change tensor_ranks."
            )
        data = world // tensor
        if "fsdp" not in self.modes:
            return data, 1, tensor
        replicas = machines if "ddp" in self.modes else 1
        if data % replicas:
            raise ValueError(f"Expected {replicas} machines to divide {data} data-parallel ranks. Do change either.")
        return replicas, data // replicas, tensor


class Layout:
    """The ranks of this job as a mesh.

    Args:
        config: the kinds of parallelism.
        device_type: `"cpu"`, `"cuda"`, ...
        machines: over which the ranks are spread evenly.

    Attributes:
        mesh: `DeviceMesh` of the dimensions replicate, shard and tensor.
        data_ranks: number of ranks that see different data.
        data_rank: which of them this is.
    """

    def __init__(self, config: ParallelConfig, device_type: str = "cpu", machines: int = 1) -> None:
        self.config = config
        sizes = config.sizes(torch.distributed.get_world_size(), machines)
        self.mesh = init_device_mesh(device_type, sizes, mesh_dim_names=(REPLICATE, SHARD, TENSOR))
        self.data_ranks = sizes[0] * sizes[1]
        self.data_rank = self.mesh.get_local_rank(REPLICATE) * sizes[1] + self.mesh.get_local_rank(SHARD)

    @property
    def tensor(self) -> DeviceMesh | None:
        """The ranks that share this rank's heads; `None` where it holds all."""
        return self.mesh[TENSOR] if "tp" in self.config.modes else None

    @property
    def data(self) -> DeviceMesh | None:
        """The ranks that average gradients, one dimension or (replicate, shard); `None` where there is one set only."""
        if not {"ddp", "fsdp"} & set(self.config.modes):
            return None
        replicates = self.mesh.size(0) > 1 or "fsdp" not in self.config.modes
        return self.mesh[REPLICATE, SHARD] if replicates else self.mesh[SHARD]

    def data_group(self) -> Any:
        """The process group of the ranks that see different data; `None` where all see the same."""
        if self.data_ranks == 1:
            return None
        whole = [name for name in (REPLICATE, SHARD) if self.mesh[name].size() == self.data_ranks]
        return self.mesh[whole[0]].get_group() if whole else self.mesh[REPLICATE, SHARD]._flatten().get_group()
