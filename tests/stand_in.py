"""A device that stands in for a GPU: its numbers lie in the CPU's memory, its rules are a GPU's.

A run on it stops where it would on a GPU: where a tensor of the CPU meets one of the device, or a generator of the CPU
draws its numbers; and, as on Apple's, where a number would be a float64. What is read from it is counted: a GPU would
have to be waited for.

The device stays registered with torch: use it in a process of its own.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

aten = torch.ops.aten
NAME = "stand"
DEVICE = torch.device("privateuseone", 0)
# Indices may lie on the CPU.
INDEXING = (aten.index.Tensor, aten.index_put_.default, aten.index_put.default)
# What waits for numbers: of a value, or of the size of a result.
READING = (
    aten._local_scalar_dense.default, aten.nonzero.default, aten.masked_select.default, aten.equal.default,
    aten._unique2.default, aten.bincount.default, aten.repeat_interleave.Tensor,
)  # fmt: skip
# How often each operator was waited for.
READS: Counter[str] = Counter()


class OnDevice(Tensor):
    """A tensor of the device around the one that holds its numbers."""

    raw: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, raw: Tensor) -> OnDevice:
        place = {"strides": raw.stride(), "storage_offset": raw.storage_offset(), "device": DEVICE}
        return Tensor._make_wrapper_subclass(cls, raw.shape, dtype=raw.dtype, **place)

    def __init__(self, raw: Tensor) -> None:
        self.raw = raw

    def __repr__(self) -> str:
        return f"OnDevice({self.raw})"

    def tolist(self) -> Any:
        """Returns the numbers: torch refuses it to any subclass."""
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return call(func, args, kwargs or {})


class StandIn(TorchDispatchMode):
    """Makes on the device what is asked for there."""

    def __enter__(self) -> StandIn:
        # torch.tensor moves its numbers to the device by an operator that the mode sees.
        self._before = torch._C._only_lift_cpu_tensors()
        torch._C._set_only_lift_cpu_tensors(True)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch._C._set_only_lift_cpu_tensors(self._before)
        super().__exit__(*error)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return call(func, args, kwargs or {})


def call(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Runs an operator on the numbers and puts its results where the operator puts them."""
    leaves = tree_leaves((args, kwargs))
    ours = {id(leaf.raw): leaf for leaf in leaves if isinstance(leaf, OnDevice)}
    asked = kwargs.get("device")
    lands = bool(ours) if asked is None else torch.device(asked).type == DEVICE.type
    if func is aten.copy_.default:
        lands = isinstance(args[0], OnDevice)
    moves = func in (aten._to_copy.default, aten.copy_.default)
    if (ours or lands) and not moves:
        _check(func, leaves)
    leaves_it = moves and not lands
    # Which elements a mask takes, tells their number.
    by_mask = func in INDEXING and any(isinstance(leaf, Tensor) and leaf.dtype == torch.bool for leaf in leaves[1:])
    if ours and (func in READING or leaves_it or by_mask):
        READS[str(func)] += 1
    if lands and asked is not None:
        kwargs = {**kwargs, "device": torch.device("cpu")}
    args, kwargs = tree_map(lambda leaf: leaf.raw if isinstance(leaf, OnDevice) else leaf, (args, kwargs))
    found = func(*args, **kwargs)
    return tree_map(lambda leaf: _placed(leaf, ours) if lands and isinstance(leaf, Tensor) else leaf, found)


def _check(func: Any, leaves: list[Any]) -> None:
    if func not in INDEXING and any(isinstance(x, Tensor) and not isinstance(x, OnDevice) and x.dim() for x in leaves):
        raise RuntimeError(f"a tensor of the CPU meets one of the device in {func}")
    if any(isinstance(leaf, torch.Generator) for leaf in leaves):
        raise RuntimeError(f"a generator of the CPU draws on the device in {func}")


def _placed(raw: Tensor, ours: dict[int, OnDevice]) -> Tensor:
    if raw.dtype in (torch.float64, torch.complex128):
        raise TypeError("a number of the device would be a float64")
    # What works in place returns what it was given.
    return ours[id(raw)] if id(raw) in ours else OnDevice(raw)


def register() -> None:
    """Makes the device known to torch, as `stand`."""
    backend_registration._setup_privateuseone_for_python_backend(NAME)
