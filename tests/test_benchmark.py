"""Tests of tools/benchmark.py: forms compute the same function, numbers are measured, bad input is refused."""

from __future__ import annotations

import gc
import json

import pytest
import torch
from helpers import load_script
from tqdm import tqdm


@pytest.fixture(scope="module")
def tool():
    return load_script("tools", "benchmark")


@pytest.fixture
def size(tool):
    return tool.Size(d_model=35, num_heads=5, length=11, batch=3)


def outputs(tool, name, size):
    x = torch.randn(size.batch, size.length, size.d_model, generator=torch.Generator().manual_seed(2)).double()
    layer = tool.build(name, size).double()
    return layer.attention(x)[0], layer(x)[0]


def test_smoke_measures_every_form_and_writes_what_it_prints(tool, tmp_path, capsys):
    files = tmp_path / "out.json", tmp_path / "out.md"
    threads = torch.get_num_threads()
    assert tool.main(["--smoke", "--threads", "1", "--json", str(files[0]), "--markdown", str(files[1])]) == 0
    assert torch.get_num_threads() == threads and gc.isenabled()
    saved, printed = json.loads(files[0].read_text()), capsys.readouterr().out
    assert torch.__version__ in saved["machine"] and "1 CPU threads" in saved["machine"]
    assert [row["variant"] for row in saved["rows"]] == 2 * list(tool.VARIANTS)
    assert all(min(row[passes]["seconds"]) > 0 for row in saved["rows"] for passes in tool.PASSES)
    tables = [block for block in files[1].read_text().split("\n\n") if block.startswith("|")]
    assert len(tables) == 2 and all(table in printed for table in tables)
    for table in tables:
        lines = table.splitlines()
        assert len(lines) == 2 + len(tool.VARIANTS) and len({len(line) for line in lines}) == 1
    plain, folded = ([row for row in saved["rows"] if row["variant"] == name] for name in ("plain", "output-folded"))
    assert [row["peak_bytes"] for row in plain] == [row["peak_bytes"] for row in folded]
    assert all(row["forward"]["ratio"] == [1.0, 1.0, 1.0] for row in plain)


def test_outside_opponent_computes_the_plain_function(tool, size):
    for ours, theirs in zip(outputs(tool, "plain", size), outputs(tool, "torch", size), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


FORMS = [("output", "output-pyg"), *((f"score-ring{k}", f"score-ring{k}-eager") for k in (2, 3, 4))]


@pytest.mark.parametrize("pair", FORMS)
def test_two_forms_of_one_graph_agree_and_differ_from_plain(tool, size, pair):
    plain = outputs(tool, "plain", size)
    first, second = (outputs(tool, name, size) for name in pair)
    for a, b, c in zip(first, second, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
        assert (a - c).abs().max() > 1e-3


def test_variants_are_what_their_names_say(tool, size):
    attention = {name: tool.build(name, size).attention.object for name in tool.VARIANTS if name != "torch"}
    assert attention["score-ring3"].wide.in_degree == 3 and attention["score-ring3-eager"].wide is None
    assert attention["output-folded"].output_graph is None and attention["output-pyg"].output_graph.backend == "pyg"
    assert attention["output-ring4"].output_graph.edge_index.shape == (2, 4 * size.num_heads)
    assert torch.equal(attention["plain"].query.weight, attention["output"].query.weight)


def test_peak_memory_is_the_largest_sum_of_live_allocations(tool):
    def allocate_and_free():
        first = torch.empty(1_000_000)
        second = torch.empty(3_000_000)
        del first, second
        torch.empty(2_000_000)

    assert tool.cpu_peak(allocate_and_free) == 16_000_000


def test_eager_scores_hold_maps_that_wide_heads_do_not(tool):
    size = tool.Size(d_model=16, num_heads=2, length=509, batch=1)
    x, grad = torch.randn(2, size.batch, size.length, size.d_model)
    x.requires_grad_()
    wide, eager = (
        tool.Step(tool.build(name, size), "attention", "forward+backward", x, grad).peak_bytes()
        for name in ("score-ring2", "score-ring2-eager")
    )
    assert eager - wide > 4 * size.num_heads * size.length**2


def test_forward_and_backward_gives_gradients_and_forward_none(tool, size):
    x, grad = torch.randn(2, size.batch, size.length, size.d_model)
    x.requires_grad_()
    layer = tool.build("score-ring2", size)
    tool.Step(layer, "block", "forward", x, grad).seconds()
    assert x.grad is None
    tool.Step(layer, "block", "forward+backward", x, grad).seconds()
    assert x.grad is not None and all(parameter.grad is not None for parameter in layer.parameters())


def test_rounds_run_every_form_once_and_drop_the_warm_up(tool):
    class Counted:
        calls = 0

        def seconds(self):
            self.calls += 1
            return float(self.calls)

    steps = {"plain": Counted(), "other": Counted()}
    expected = [tool.WARM_UP + 1.0, tool.WARM_UP + 2.0, tool.WARM_UP + 3.0]
    assert tool.interleaved(steps, 3, tqdm(disable=True)) == {"plain": expected, "other": expected}


def test_ratios_are_taken_within_a_round(tool):
    # The machine slows down fourfold on the way; each round still says the same.
    assert tool.ratios([2.0, 4.0, 8.0], [1.0, 2.0, 4.0]) == [2.0, 2.0, 2.0]
    assert tool.ratios([1.0, 2.0, 3.0, 4.0, 5.0], [1.0] * 5) == [2.0, 3.0, 4.0]


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--sizes", "512/8/512"], "512/8/512/2"),
        (["--sizes", "512/7/512/2"], "heads dividing d_model"),
        (["--sizes", "512/0/512/2"], "heads dividing d_model"),
        (["--sizes", "6/3/5/2"], "at least 4 heads for output-ring4"),
        (["--only", "talking"], "['talking']"),
        (["--repeats", "1"], "--repeats of at least 2"),
        (["--repeats", "many"], "many"),
        (["--threads", "0"], "--threads of at least 1"),
        (["--dtype", "int8"], "int8"),
        (["--device", "tpu"], "'tpu'"),
        (["--json", "no/such/folder/out.json"], "can be written"),
    ],
)
def test_bad_input_is_one_sentence_and_code_2(tool, arguments, said, capsys):
    assert tool.main(["--smoke", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: Expected") and captured.err.count("\n") == 1 and said in captured.err
    assert captured.out == "" and gc.isenabled()
