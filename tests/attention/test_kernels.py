"""The Triton kernels: what they compute, as compiled for GPUs, and when they are chosen."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from benchmarks.kernels import usages
from helpers import load_script

import gohgraph as goh
from gohgraph.attention.call import Call
from gohgraph.attention.forms import explain
from gohgraph.attention.kernels import mixed_attention
from gohgraph.attention.kernels.mixed_attention import flash_mixed_attention, kernel_refuses
from gohgraph.graphs.protocol import Messages

B, T, H, D = 2, 13, 6, 5
GPU = torch.device("cuda", 0)
LARGE, SMALL = ({"major": 9, "shared_memory_per_block_optin": size} for size in (232_448, 101_376))


@pytest.fixture
def gpu(monkeypatch):
    """A GPU with Triton, as far as the choice of a form can tell; its properties can be changed."""
    properties = dict(LARGE)
    for known in ("_has_triton", "_is_large"):
        getattr(mixed_attention, known).cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(**properties))
    monkeypatch.setattr(mixed_attention, "version", lambda name: "3.7.1")
    yield properties
    for known in ("_has_triton", "_is_large"):
        getattr(mixed_attention, known).cache_clear()


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """A cache of compiled kernels of this run's own."""
    pytest.importorskip("triton")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_CACHE_DIR", str(tmp_path_factory.mktemp("compiled")))
        yield


@pytest.mark.parametrize("interpreted", [True, False], ids=["in the interpreter", "on a GPU"])
def test_kernels_equal_whole_maps(interpreted):
    """One process for all: the interpreter has to be chosen before anything imports Triton."""
    pytest.importorskip("triton")
    if not interpreted and (not torch.cuda.is_available() or kernel_refuses(GPU, torch.float32, 8, 64)):
        pytest.skip("needs a GPU that the kernels run on")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/kernel_parity.py"]
    environment = {**os.environ, "TRITON_INTERPRET": str(int(interpreted))}
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "passed" in done.stdout and "skipped" not in done.stdout


@pytest.mark.parametrize(
    ("heads", "head_dim", "dtype", "masked"), [(32, 64, "bfloat16", True), (13, 96, "float32", False)]
)
def test_kernels_compile_for_a_gpu_and_fit_into_it(compiled, heads, head_dim, dtype, masked):
    compiled_kernels = usages(heads, head_dim, dtype, capability=80, masked=masked)
    assert len(compiled_kernels) == 3
    for usage in compiled_kernels:
        assert usage.shared <= mixed_attention.SHARED_MEMORY and usage.products and 0 < usage.registers <= 255


def test_the_report_of_what_kernels_take(compiled, capsys):
    tool = load_script("tools", "benchmark")
    assert tool.main(["kernels", "--sizes", "13/96", "--dtype", "float32", "--capability", "80"]) == 0
    shown = capsys.readouterr().out
    assert "float32" in shown and "capability 8.0" in shown and shown.count("| 13/96 ") == 3
    assert tool.main(["kernels", "--sizes", "8"]) == 2
    assert capsys.readouterr().err.startswith("error: Expected heads/head_dim (got '8')")


def test_what_the_kernels_take(gpu, monkeypatch):
    assert kernel_refuses(GPU, torch.bfloat16, 32, 256) == kernel_refuses(GPU, torch.float32, 16, 64) == ""
    assert kernel_refuses(GPU, torch.float64, 8, 64).startswith("torch.float64 is none of")
    for dtype, heads, head_dim in [(torch.bfloat16, 33, 64), (torch.float32, 17, 64), (torch.float16, 8, 257)]:
        assert kernel_refuses(GPU, dtype, heads, head_dim).startswith(f"{heads} heads of {head_dim} features are not")
    assert kernel_refuses(torch.device("cpu"), torch.bfloat16, 8, 64) == "cpu is no NVIDIA GPU"


@pytest.mark.parametrize("change", [SMALL, {**LARGE, "major": 7}], ids=["consumer", "old"])
def test_small_and_old_gpus_take_the_other_forms(gpu, change):
    gpu.update(change)
    assert kernel_refuses(GPU, torch.bfloat16, 8, 64).endswith("less than 160 KiB of shared memory")


@pytest.mark.parametrize("installed", [None, "3.4.0"])
def test_without_a_triton_that_compiles_them_the_other_forms_run(gpu, monkeypatch, installed):
    def version(name):
        if installed is None:
            raise mixed_attention.PackageNotFoundError(name)
        return installed

    monkeypatch.setattr(mixed_attention, "version", version)
    assert kernel_refuses(GPU, torch.bfloat16, 8, 64) == "Triton 3.5 or newer is not installed"


def conv_of(topology, **options):
    return goh.HeadGraphConv(goh.head_graph(H, topology, **options), D, H * D)


@pytest.mark.parametrize(("form", "taken"), [(None, "maps"), ("tiled", "tiled"), ("kernel", "kernel")])
def test_off_the_cpu_tiles_and_the_kernel_are_for_those_who_ask(monkeypatch, form, taken):
    monkeypatch.setattr("gohgraph.attention.forms.kernel_refuses", lambda *args: "")
    q, x = torch.empty(B, 512, H, D, device="meta"), torch.empty(B, 512, H * D, device="meta")
    reasons = explain(Call(q, q, q, scores=Messages(conv_of("complete"), x)), form)
    assert [name for name, reason in reasons.items() if reason == "taken"] == [taken]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"keep_mask": torch.ones(1, 1, T, T, dtype=torch.bool)}, r"keep_mask or is_causal \(got both\)"),
        ({"k": torch.randn(B, 3, H, D)}, r"as many keys as queries \(got 3, 13\)"),
        ({"v": torch.randn(B, T, H, D).half()}, "one type of"),
        ({name: torch.randn(B, T, 17, D) for name in "qkv"}, r"up to 16 heads .* \(got 17 of 5\)"),
        ({name: torch.empty(1, 2**17, 16, 2**10, device="meta") for name in "qkv"}, r"less than 2\^31 numbers"),
    ],
)
def test_what_the_kernels_do_not_take_is_refused(change, said):
    arguments = {name: torch.randn(B, T, H, D) for name in "qkv"} | {"mix_scores": torch.eye(H)} | change
    with pytest.raises(ValueError, match=f"Expected .*{said}"):
        flash_mixed_attention(**arguments, is_causal=True)


def test_without_triton_the_error_names_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "gohgraph.attention.kernels.launch", None)
    monkeypatch.delattr("gohgraph.attention.kernels.launch", raising=False)
    q, k, v = torch.randn(3, B, T, H, D)
    with pytest.raises(ImportError, match=r"gohgraph\[triton\]"):
        flash_mixed_attention(q, k, v, torch.eye(H))
