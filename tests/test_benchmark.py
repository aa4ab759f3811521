"""Tests of tools/benchmark.py and `blocks`: forms compute one function, numbers are measured, bad input is refused."""

from __future__ import annotations

import gc
import json

import pytest
import torch
from helpers import load_script
from tqdm import tqdm

from gohgraph.benchmarks import blocks, timing


@pytest.fixture(scope="module")
def tool():
    return load_script("tools", "benchmark")


@pytest.fixture
def size():
    return blocks.Size(d_model=35, num_heads=5, length=11, batch=3)


def outputs(name, size):
    x = torch.randn(size.batch, size.length, size.d_model, generator=torch.Generator().manual_seed(2)).double()
    layer = blocks.build(name, size).double()
    return layer.attention(x)[0], layer(x)[0]


def test_smoke_measures_every_form_and_writes_what_it_prints(tool, tmp_path, capsys):
    files = tmp_path / "out.json", tmp_path / "out.md"
    threads = torch.get_num_threads()
    assert tool.main(["--smoke", "--threads", "1", "--json", str(files[0]), "--markdown", str(files[1])]) == 0
    assert torch.get_num_threads() == threads and gc.isenabled()
    saved, printed = json.loads(files[0].read_text()), capsys.readouterr().out
    assert torch.__version__ in saved["machine"] and "1 CPU threads" in saved["machine"]
    assert [row["variant"] for row in saved["rows"]] == 2 * list(blocks.VARIANTS)
    assert all(min(row[passes]["seconds"]) > 0 for row in saved["rows"] for passes in blocks.PASSES)
    tables = [block for block in files[1].read_text().split("\n\n") if block.startswith("|")]
    assert len(tables) == 2 and all(table in printed for table in tables)
    for table in tables:
        lines = table.splitlines()
        assert len(lines) == 2 + len(blocks.VARIANTS) and len({len(line) for line in lines}) == 1
    plain, folded = ([row for row in saved["rows"] if row["variant"] == name] for name in ("plain", "output-folded"))
    assert [row["peak_bytes"] for row in plain] == [row["peak_bytes"] for row in folded]
    assert all(row["forward"]["ratio"] == [1.0, 1.0, 1.0] for row in plain)


def test_outside_opponent_computes_the_plain_function(size):
    for ours, theirs in zip(outputs("plain", size), outputs("torch", size), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


FORMS = [("output", "output-pyg"), *((f"score-ring{k}", f"score-ring{k}-eager") for k in (2, 3, 4))]


@pytest.mark.parametrize("pair", FORMS)
def test_two_forms_of_one_graph_agree_and_differ_from_plain(size, pair):
    plain = outputs("plain", size)
    first, second = (outputs(name, size) for name in pair)
    for a, b, c in zip(first, second, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
        assert (a - c).abs().max() > 1e-3


def test_variants_are_what_their_names_say(size):
    attention = {name: blocks.build(name, size).attention.object for name in blocks.VARIANTS if name != "torch"}
    assert attention["score-ring3"].wide.in_degree == 3 and attention["score-ring3-eager"].wide is None
    assert attention["output-folded"].output_graph is None and attention["output-pyg"].output_graph.backend == "pyg"
    assert attention["output-ring4"].output_graph.edge_index.shape == (2, 4 * size.num_heads)
    assert torch.equal(attention["plain"].query.weight, attention["output"].query.weight)


def test_peak_memory_is_the_largest_sum_of_live_allocations():
    def allocate_and_free():
        first = torch.empty(1_000_000)
        second = torch.empty(3_000_000)
        del first, second
        torch.empty(2_000_000)

    assert timing.cpu_peak(allocate_and_free) == 16_000_000


def test_eager_scores_hold_maps_that_wide_heads_do_not():
    size = blocks.Size(d_model=16, num_heads=2, length=509, batch=1)
    x, grad = torch.randn(2, size.batch, size.length, size.d_model)
    x.requires_grad_()
    wide, eager = (
        blocks.Step(blocks.build(name, size), "attention", "forward+backward", x, grad).peak_bytes()
        for name in ("score-ring2", "score-ring2-eager")
    )
    assert eager - wide > 4 * size.num_heads * size.length**2


def test_forward_and_backward_gives_gradients_and_forward_none(size):
    x, grad = torch.randn(2, size.batch, size.length, size.d_model)
    x.requires_grad_()
    layer = blocks.build("score-ring2", size)
    blocks.Step(layer, "block", "forward", x, grad).seconds()
    assert x.grad is None
    blocks.Step(layer, "block", "forward+backward", x, grad).seconds()
    assert x.grad is not None and all(parameter.grad is not None for parameter in layer.parameters())


def test_rounds_run_every_form_once_and_drop_the_warm_up():
    class Counted:
        calls = 0

        def seconds(self):
            self.calls += 1
            return float(self.calls)

    steps = {"plain": Counted(), "other": Counted()}
    expected = [timing.WARM_UP + 1.0, timing.WARM_UP + 2.0, timing.WARM_UP + 3.0]
    assert timing.interleaved(steps, 3, tqdm(disable=True)) == {"plain": expected, "other": expected}


def test_ratios_are_taken_within_a_round():
    # The machine slows down fourfold on the way; each round still says the same.
    assert timing.ratios([2.0, 4.0, 8.0], [1.0, 2.0, 4.0]) == [2.0, 2.0, 2.0]
    assert timing.ratios([1.0, 2.0, 3.0, 4.0, 5.0], [1.0] * 5) == [2.0, 3.0, 4.0]


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


def test_blocks_is_what_no_command_means(tool, capsys):
    shown = []
    for command in ([], ["blocks"]):
        assert tool.main([*command, "--smoke", "--threads", "1", "--only", "output"]) == 0
        shown.append([line.split("|")[1] for line in capsys.readouterr().out.splitlines() if line.startswith("|")])
    assert shown[0] == shown[1] and len(shown[0]) == 8


def test_help_shows_the_flags_of_every_command(tool, capsys):
    with pytest.raises(SystemExit):
        tool.main(["--help"])
    shown = capsys.readouterr().out
    assert "--only" in shown and "benchmark.py routing" in shown and "--contexts" in shown


def test_unknown_command_is_one_sentence_and_code_2(tool, capsys):
    assert tool.main(["rooting", "--smoke"]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: Expected") and captured.err.count("\n") == 1 and "rooting" in captured.err


def test_table_aligns_names_left_and_numbers_right():
    lines = timing.markdown_table("**t**", [["", "n"], ["a", "8.0"], ["long", "10.25"]]).splitlines()
    assert lines == [
        "**t**",
        "",
        "|      |     n |",
        "| ---- | ----: |",
        "| a    |   8.0 |",
        "| long | 10.25 |",
    ]
