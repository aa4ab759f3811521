"""The modules of a model that work, whether they run again for a gradient, and which weights may be written into."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn


def working_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yields the modules by name, of copies that PEFT keeps (`modules_to_save`) the one in use alone.

    Example:
        >>> [name for name, _ in working_modules(nn.Sequential(nn.Linear(2, 3)))]
        ['', '0']
    """
    idle: list[str] = []
    for name, module in model.named_modules():
        if any(f"{name}.".startswith(prefix) for prefix in idle):
            continue
        copies = getattr(module, "modules_to_save", None)
        if isinstance(copies, nn.ModuleDict) and isinstance(getattr(module, "original_module", None), nn.Module):
            active = [] if module.disable_adapters else module.active_adapters
            chosen = [adapter for adapter in active if adapter in copies]
            prefix = f"{name}." if name else ""
            working = f"modules_to_save.{chosen[0]}" if chosen else "original_module"
            every = ["original_module", *(f"modules_to_save.{adapter}" for adapter in copies)]
            idle += [f"{prefix}{copy}." for copy in every if copy != working]
        yield name, module


def is_traced() -> bool:
    """Whether what is computed is written down for other inputs too: under torch.compile, export and torch.jit.trace.

    Example:
        >>> is_traced()
        False
    """
    return torch.compiler.is_compiling() or torch.jit.is_tracing()


def is_exported() -> bool:
    """Whether it is written down for other programs, which know torch's own operators alone.

    Example:
        >>> is_exported()
        False
    """
    return torch.compiler.is_exporting() or torch.jit.is_tracing()


def check_writable(model: nn.Module, parts: Iterable[nn.Module], names: Iterable[str] = ("weight",)) -> None:
    """Raises `ValueError` unless what a part has under these names is its own to write into.

    That is: a parameter or buffer of its own, not computed from others before every call; of a plain dtype and in
    memory; and not shared with another module.

    Args:
        model: around the parts, where weights might be shared.
        parts: modules inside it.
        names: of their tensors; those that are `None` or missing are passed over.

    Example:
        >>> tied = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        >>> tied[1].weight = tied[0].weight
        >>> check_writable(tied, [tied[1]])
        Traceback (most recent call last):
        ValueError: Expected a weight of its own in '1' (got one that is shared with '0.weight'). Do untie it.
    """
    owned = [
        (f"{owner}.{name}".removeprefix("."), module, name, tensor)
        for owner, module in model.named_modules()
        for name, tensor in (*module._parameters.items(), *module._buffers.items())
        if tensor is not None
    ]
    titles = {id(module): name for name, module in model.named_modules()}
    for part in parts:
        for name in names:
            tensor = getattr(part, name, None)
            if tensor is None:
                continue
            reason, remedy = _not_plain(part, name, tensor) or _shared(part, name, tensor, owned)
            if reason:
                title = titles.get(id(part), type(part).__name__)
                raise ValueError(f"Expected a {name} of its own in {title!r} (got {reason}). Do {remedy}.")


def _not_plain(part: nn.Module, name: str, tensor: Tensor) -> tuple[str, str] | None:
    if part._parameters.get(name) is not tensor and part._buffers.get(name) is not tensor:
        return (
            "one that a parametrization, a hook or an adapter computes anew",
            "merge it first: remove_parametrizations, remove_weight_norm, prune.remove, merge_and_unload",
        )
    if tensor.is_meta:
        return "none in memory: on meta, or offloaded", "load it first, without offloading"
    data = tensor.data
    if type(data) is not Tensor or not data.is_floating_point() or data.dtype.itemsize < 2:
        return f"a {type(data).__name__} of {data.dtype}, quantised or sharded", "load it in full precision, whole"
    return None


def _shared(
    part: nn.Module, name: str, tensor: Tensor, owned: list[tuple[str, nn.Module, str, Tensor]]
) -> tuple[str, str]:
    for title, module, other, candidate in owned:
        if (module is not part or other != name) and not candidate.is_meta and _overlap(tensor, candidate):
            return f"one that is shared with {title!r}", "untie it"
    return "", ""


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors have numbers of one memory."""
    if a is b:
        return True
    if a.device != b.device or type(b.data) is not Tensor or b.layout is not torch.strided or not b.numel():
        return False
    (start, end), (low, high) = _reach(a), _reach(b)
    return start < high and low < end


def _reach(x: Tensor) -> tuple[int, int]:
    last = sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True))
    return x.data_ptr(), x.data_ptr() + (last + 1) * x.element_size()


def is_recomputed() -> bool:
    """Whether a backward pass is under way: what runs forward then is gradient checkpointing, which ran before."""
    return torch._C._current_graph_task_id() != -1
