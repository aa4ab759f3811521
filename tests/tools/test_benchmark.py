"""Tests of tools/benchmark.py and `speed`: forms compute one function, numbers are measured, bad input is refused."""

from __future__ import annotations

import argparse
import gc
import json
from functools import partial

import pytest
import torch
from benchmarks import forms, grids, speed, timing
from helpers import load_script
from tqdm import tqdm

from gohgraph.common.tables import markdown_table


@pytest.fixture(scope="module")
def tool():
    return load_script("tools", "benchmark")


@pytest.fixture
def size():
    return forms.Size(d_model=35, num_heads=5, length=11, batch=3)


def outputs(name, size):
    x = torch.randn(size.batch, size.length, size.d_model, generator=torch.Generator().manual_seed(2)).double()
    layer = forms.build(name, size).double()
    return layer.attention(x)[0], layer(x)[0]


def test_smoke_measures_every_form_and_writes_what_it_prints(tool, tmp_path, capsys):
    files = tmp_path / "out.json", tmp_path / "out.md"
    threads = torch.get_num_threads()
    assert tool.main(["--smoke", "--threads", "1", "--json", str(files[0]), "--markdown", str(files[1])]) == 0
    assert torch.get_num_threads() == threads and gc.isenabled()
    saved, printed = json.loads(files[0].read_text()), capsys.readouterr().out
    assert torch.__version__ in saved["machine"] and "1 CPU threads" in saved["machine"]
    on_cpu = [name for name, variant in forms.VARIANTS.items() if variant.form != "kernel"]
    assert [row["variant"] for row in saved["rows"]] == 2 * on_cpu
    for row in saved["rows"]:
        timed = [passes for passes in speed.PASSES if passes in row]
        assert timed == list(speed.PASSES[: 3 if forms.VARIANTS[row["variant"]].foreign is None else 2])
        assert all(min(row[passes]["seconds"]) > 0 for passes in timed)
    tables = [block for block in files[1].read_text().split("\n\n") if block.startswith("|")]
    assert len(tables) == 2 and all(table in printed for table in tables)
    for table in tables:
        lines = table.splitlines()
        assert len(lines) == 2 + len(on_cpu) and len({len(line) for line in lines}) == 1
    plain, folded = ([row for row in saved["rows"] if row["variant"] == name] for name in ("plain", "output-folded"))
    assert [row["peak_bytes"] for row in plain] == [row["peak_bytes"] for row in folded]
    assert all(row["forward"]["ratio"] == [1.0, 1.0, 1.0] for row in plain)


def test_kernel_forms_are_measured_where_a_gpu_takes_every_size(monkeypatch):
    monkeypatch.setattr(forms, "kernel_refuses", lambda device, dtype, heads, head_dim: "too many" * (heads > 15))
    kernels = [name for name, variant in forms.VARIANTS.items() if variant.form == "kernel"]
    asked = {"only": None, "smoke": False, "repeats": 2, "threads": 1, "device": "cpu", "dtype": "bfloat16"}
    asked |= {"json": None, "markdown": None}
    for sizes, compiled, expected in (
        (["64/8/4/1"], False, kernels),
        (["64/8/4/1", "64/16/4/1"], False, []),
        (["64/8/4/1"], True, []),
    ):
        flags = argparse.Namespace(**asked, sizes=sizes, compile=compiled)
        speed.cases(flags)
        assert [name for name in flags.only if forms.VARIANTS[name].form == "kernel"] == expected


def test_outside_opponent_computes_the_plain_function(size):
    for ours, theirs in zip(outputs("plain", size), outputs("torch", size), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", ["x-transformers", "x-talking-heads"])
def test_x_transformers_computes_the_plain_function_but_for_the_logits_it_doubles(size, name):
    x = torch.randn(size.batch, size.length, size.d_model).double()
    theirs, plain = (forms.build(form, size).double() for form in (name, "plain"))
    attention = plain.attention.object
    for linear in (attention.query, attention.key, attention.value, attention.output):
        torch.nn.init.zeros_(linear.bias)
    if name == "x-talking-heads":
        # Its talking heads before the softmax are a residual around an identity at the start.
        attention.query.weight.data.mul_(2)
    # Its softmax over materialised maps is taken in float32.
    tolerance = {"rtol": 0, "atol": 1e-6 if name == "x-talking-heads" else 1e-10}
    torch.testing.assert_close(theirs.attention(x)[0], plain.attention(x)[0], **tolerance)
    torch.testing.assert_close(theirs(x)[0], plain(x)[0], **tolerance)


@pytest.mark.parametrize("part", speed.PARTS)
@pytest.mark.parametrize("name", ["plain", "output", "score-ring2", "talking-heads", "moh-50"])
def test_decode_is_the_last_token_of_the_whole(size, name, part):
    layer = forms.build(name, size).double().eval()
    x = torch.randn(size.batch, size.length, size.d_model).double()
    step = speed.Decode(layer, part, x)
    seen = []
    step.layer.attention.register_forward_hook(lambda module, inputs, result: seen.append(len(step.cache)))
    for _ in range(3):
        step.prepare()
        step()
    assert seen == [size.length] * 3


SCORES = ("score-ring2", "score-ring4", "score-complete")
FORMS = [("output", "output-pyg"), *((name, f"{name}-eager") for name in SCORES)]


@pytest.mark.parametrize("pair", FORMS)
def test_two_forms_of_one_graph_agree_and_differ_from_plain(size, pair):
    plain = outputs("plain", size)
    first, second = (outputs(name, size) for name in pair)
    for a, b, c in zip(first, second, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-10)
        assert (a - c).abs().max() > 1e-3


def test_variants_are_what_their_names_say(size):
    ours = [name for name, variant in forms.VARIANTS.items() if variant.foreign is None]
    attention = {name: forms.build(name, size).attention.object for name in ours}
    assert attention["score-ring4"].score_graph.traits.in_degree == 4 and attention["score-ring4"].form is None
    named = {"wide": "wide", "eager": "maps", "kernel": "kernel", "all": "plain"}
    for name, one in attention.items():
        assert one.form == named.get(name.rpartition("-")[2]), name
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


def test_compiled_forms_are_timed(tool, monkeypatch, capsys):
    # What is built of a graph is up to the compiler: `tests/graphs/test_conv.py` builds machine code.
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    assert tool.main(["--smoke", "--compile", "--only", "output", "--threads", "2"]) == 0
    assert "| output" in capsys.readouterr().out
    torch.compiler.reset()


def test_eager_scores_hold_maps_that_wide_heads_do_not():
    size = forms.Size(d_model=16, num_heads=2, length=509, batch=1)
    x, grad = torch.randn(2, size.batch, size.length, size.d_model)
    x.requires_grad_()
    wide, eager = (
        speed.Step(forms.build(name, size), "attention", "forward+backward", x, grad).peak_bytes()
        for name in ("score-ring2", "score-ring2-eager")
    )
    assert eager - wide > 4 * size.num_heads * size.length**2


def test_forward_and_backward_gives_gradients_and_forward_none(size):
    x, grad = torch.randn(2, size.batch, size.length, size.d_model)
    x.requires_grad_()
    layer = forms.build("score-ring2", size)
    speed.Step(layer, "block", "forward", x, grad).seconds()
    assert x.grad is None
    speed.Step(layer, "block", "forward+backward", x, grad).seconds()
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
        (["--only", "score-complete-kernel"], "['score-complete-kernel'] on cpu"),
        (["--repeats", "1"], "--repeats to be an int >= 2"),
        (["--repeats", "many"], "many"),
        (["--threads", "0"], "--threads to be an int >= 1"),
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


def test_speed_is_what_no_command_means(tool, capsys):
    shown = []
    for command in ([], ["speed"]):
        assert tool.main([*command, "--smoke", "--threads", "1", "--only", "output"]) == 0
        shown.append([line.split("|")[1] for line in capsys.readouterr().out.splitlines() if line.startswith("|")])
    assert shown[0] == shown[1] and len(shown[0]) == 8


def test_help_shows_the_flags_of_every_command(tool, capsys):
    with pytest.raises(SystemExit):
        tool.main(["--help"])
    shown = capsys.readouterr().out
    assert "--only" in shown and "benchmark.py routing" in shown and "--contexts" in shown


@pytest.mark.parametrize(("command", "value"), [("scaling", "ratio"), ("memory", "training")])
def test_grids_are_measured_in_every_form(tool, tmp_path, capsys, command, value):
    file = tmp_path / "out.json"
    assert tool.main([command, "--smoke", "--threads", "1", "--json", str(file)]) == 0
    rows, printed = json.loads(file.read_text())["rows"], capsys.readouterr().out
    assert [(row["size"]["length"], row["variant"]) for row in rows] == [(t, f) for t in (5, 11) for f in grids.FORMS]
    assert all(row[value] == 1 for row in rows if row["variant"] == "plain") and all(row[value] > 0 for row in rows)
    lines = [line for line in printed.splitlines() if line.startswith("| x-talking-heads")]
    cell = f"{rows[-1][value]:.2f}"
    if command == "scaling":
        low, _, high = rows[-1]["quartiles"]
        cell = f"{cell} ({low:.2f}-{high:.2f})"
    assert lines[0].endswith(f"| {cell} |") and len(lines) == (1 if command == "scaling" else 2)


def test_one_table_of_chosen_sizes(tool, capsys):
    flags = tool._parser("scaling").parse_args(["--lengths", "2048", "4096", "--only", "output"])
    assert [[size.length for size in grid.sizes] for grid in grids.grids_of(flags, 2)] == [[2048, 4096]]
    assert tool.main(["memory", "--heads", "24"]) == 2
    assert "Expected heads that divide a d_model of 512 (got [24])" in capsys.readouterr().err


def test_maps_that_do_not_fit_are_not_run():
    size = forms.Size(512, 8, 8192, 1)
    assert grids.forms_at(size, list(grids.FORMS)) == [form for form in grids.FORMS if form not in grids.MAPS]
    rows = [{"axis": "length", "size": {"length": t, "batch": 3}, "variant": "a", "ratio": 1.5} for t in (5, 7)]
    text = grids.grid_table("time", [*rows, {**rows[0], "variant": "b", "ratio": 2}], "ratio")
    assert text.splitlines()[-1].split() == ["|", "b", "|", "2.00", "|", "-", "|"]


def test_unknown_command_is_one_sentence_and_code_2(tool, capsys):
    assert tool.main(["rooting", "--smoke"]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: Expected") and captured.err.count("\n") == 1 and "rooting" in captured.err


def test_table_aligns_names_left_and_numbers_right():
    lines = markdown_table([["", "n"], ["a", "8.0"], ["long", "10.25"]], "**t**").splitlines()
    assert lines == [
        "**t**",
        "",
        "|      |     n |",
        "| ---- | ----: |",
        "| a    |   8.0 |",
        "| long | 10.25 |",
    ]
