"""What the CUDA kernels take of a GPU, as compiled for one that need not be there: shared memory and registers.

Of every kernel of `gohgraph.attention.kernels` and every form of heads: bytes of shared memory and registers of a
program, and the bytes each thread spills from registers into memory. A size is heads/head_dim.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
from typing import Any, NamedTuple

import torch

from benchmarks.flags import DTYPES
from gohgraph.common.tables import markdown_table

DEFAULT_SIZES = ("8/64", "12/64", "16/128", "32/64", "32/128")
TYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
OF_INPUTS = {"q", "k", "v", "z", "dz", "dq", "dk", "dv"}
IN_FLOAT32 = {"w", "dw", "lse", "product"}


class Usage(NamedTuple):
    """What a compiled kernel takes.

    Args:
        kernel: its name.
        shared: bytes of shared memory of a program.
        registers: of a thread.
        spilled: bytes of a thread's stack.
        products: tensor-core instructions in its code.
    """

    kernel: str
    shared: int
    registers: int
    spilled: int
    products: int


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags of this report."""
    parser.add_argument("--sizes", nargs="+", metavar="SIZE", help=f"default: {' '.join(DEFAULT_SIZES)}")
    parser.add_argument("--dtype", default="bfloat16", choices=TYPES, help="default: %(default)s")
    parser.add_argument("--capability", type=int, default=90, help="of the GPU, 80 for the A100 (default: %(default)s)")
    parser.add_argument("--smoke", action="store_true", help="one size, to see that it runs")


def run(flags: argparse.Namespace) -> None:
    """Compiles and prints a table."""
    lines = [["heads/head_dim", "kernel", "shared memory", "registers", "spilled", "mma"]]
    for text in flags.sizes or DEFAULT_SIZES[: 1 if flags.smoke else None]:
        numbers = [int(part) if part.isdecimal() else 0 for part in text.split("/")]
        if len(numbers) != 2 or min(numbers) < 1:
            raise ValueError(f"Expected heads/head_dim (got {text!r}). Do pass e.g. 8/64.")
        heads, head_dim = numbers
        for usage in usages(heads, head_dim, flags.dtype, flags.capability):
            sizes = (f"{usage.shared / 2**10:.0f} KiB", str(usage.registers), f"{usage.spilled} B")
            lines.append([text, usage.kernel, *sizes, str(usage.products)])
    print(markdown_table(lines, f"**{flags.dtype}, causal**, compute capability {flags.capability / 10}"))


def usages(heads: int, head_dim: int, dtype: str, capability: int, *, masked: bool = False) -> list[Usage]:
    """Compiles the three kernels, causal or with a mask, and returns what they take.

    Raises:
        ImportError: triton is not installed.
    """
    try:
        import triton
        from triton.backends.compiler import GPUTarget
        from triton.compiler import ASTSource
    except ImportError as error:
        raise ImportError("Expected triton to compile with (got none). Do pip install 'gohgraph[triton]'.") from error

    from gohgraph.attention.kernels import launch

    q = torch.empty(heads, head_dim, dtype=DTYPES[dtype], device="meta")
    constants = launch.constants(q, heads, masked=masked, is_causal=not masked)
    used = []
    for kernel in (launch.forward_kernel, launch.backward_queries_kernel, launch.backward_keys_kernel):
        signature = {name: "constexpr" if name in constants else _type(name, dtype) for name in kernel.arg_names}
        aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind[0] == "*"}
        source = ASTSource(kernel, signature, constexprs=constants, attrs=aligned)
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=launch.OPTIONS)
        products = len(re.findall(r"\bw?g?mma\.", compiled.asm["ptx"]))
        used.append(Usage(kernel.__name__, compiled.metadata.shared, *_registers(compiled.asm["cubin"]), products))
    return used


def _type(name: str, dtype: str) -> str:
    if name in OF_INPUTS:
        return "*" + TYPES[dtype]
    if name in IN_FLOAT32:
        return "*fp32"
    return {"mask": "*u8", "scale": "fp32"}.get(name, "i32")


def _registers(cubin: bytes) -> tuple[int, int]:
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command: list[Any] = [knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        shown = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = (int(number) for name in ("REG", "STACK") for number in re.findall(rf"{name}:(\d+)", shown)[:1])
    return registers, stack
