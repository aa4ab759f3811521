"""Tests of `tools/benchmark.py routing`: budgets, equal outputs, what is read of the cache, the table, bad input."""

from __future__ import annotations

import gc
import json

import pytest
import torch
from benchmarks import routing
from benchmarks.decoding import (
    Case,
    Decode,
    Variant,
    budget,
    build,
    cache_bytes,
    check_agreement,
    decoded,
    filled_cache,
    heads_read,
)
from helpers import load_script

CASE = Case(d_model=56, num_heads=8, context=11, batch=3)


@pytest.fixture(scope="module")
def tool():
    return load_script("tools", "benchmark")


def layer_of(variant):
    return build(variant, CASE).double()


def past_and_tokens(count=5):
    past = torch.randn(2, CASE.batch, CASE.context - 1, CASE.num_heads, CASE.d_model // CASE.num_heads).double()
    return *past, torch.randn(count, CASE.batch, 1, CASE.d_model).double()


def active_heads(layer, x):
    attention = layer.attention
    return attention.object.router(attention.norm(x)).active.squeeze(1)  # [B, H]


@pytest.mark.parametrize("num_heads", [4, 8, 12, 16, 40])
def test_budgets_are_the_share_they_say(num_heads):
    for percent in (100, 75, 50, 25):
        routed = budget(num_heads, percent)
        routed.check_heads(num_heads, num_layers=1)
        assert 100 * (routed.num_shared + routed.top_k) == percent * num_heads
        assert routed.num_shared == num_heads // 4 or percent == 25


def test_rows_differ_in_what_their_name_says_alone():
    plain = layer_of(None).attention.object
    assert plain.router is None and plain.output_graph is None
    for variant in routing.VARIANTS[1:]:
        attention = layer_of(variant).attention.object
        assert torch.equal(attention.query.weight, plain.query.weight)
        assert attention.router.num_active == CASE.num_heads * variant.percent // 100
        assert (attention.output_graph is not None) == variant.graph == variant.name.startswith("head graph")
        assert attention.form == {"off": "plain", "on": "skipped", "auto": None}[variant.skipping]


def test_active_heads_vary_between_tokens():
    tokens = past_and_tokens(count=31)[2]
    chosen = active_heads(layer_of(Variant(50, "off")), tokens.flatten(0, 1))  # [N*B, H]
    assert len(chosen.unique(dim=0)) > 5


def test_a_call_decodes_another_token_on_the_same_past():
    keys, values, tokens = past_and_tokens(count=2)
    layer, cache = layer_of(Variant(50, "off")), filled_cache(keys, values)
    second = filled_cache(keys, values)
    step, seen = Decode([layer, layer_of(Variant(50, "off"))], [cache, second], tokens), []
    layer.attention.register_forward_hook(lambda module, inputs, y: seen.append((inputs[0], y[0])))
    for _ in range(3):
        assert step.seconds() > 0
        assert len(cache) == len(second) == CASE.context and torch.equal(cache.read()[0][:, :-1], keys)
    assert torch.equal(seen[0][0], tokens[0]) and torch.equal(seen[1][0], tokens[1])
    assert torch.equal(seen[2][0], tokens[0]) and torch.equal(seen[2][1], seen[0][1])
    assert not torch.equal(seen[1][1], seen[0][1])


def test_outputs_with_and_without_skipping_are_compared():
    keys, values, tokens = past_and_tokens()
    cache = filled_cache(keys, values)
    layers = {variant: layer_of(variant) for variant in routing.VARIANTS}
    check_agreement(layers, cache, tokens)
    with torch.no_grad():
        layers[Variant(75, "auto")].attention.object.value.weight.mul_(1 + 1e-6)
    with pytest.raises(RuntimeError, match="MoH 75 %, skipping auto"):
        check_agreement(layers, cache, tokens)
    with torch.no_grad():
        layers[Variant(75, "auto")].attention.object.value.weight.fill_(float("nan"))
    with pytest.raises(RuntimeError, match="nan of the largest"):
        check_agreement(layers, cache, tokens)


@pytest.mark.parametrize("graph", [False, True])
@pytest.mark.parametrize("percent", [100, 75, 50, 25])
def test_skipping_reads_the_active_heads_and_no_others(percent, graph):
    keys, values, tokens = past_and_tokens(count=3)
    cache = filled_cache(keys, values)
    for x in tokens:
        skipping = layer_of(Variant(percent, "on", graph))
        assert torch.equal(heads_read(skipping, cache, x), active_heads(skipping, x))
        assert heads_read(layer_of(Variant(percent, "off", graph)), cache, x).all()
    assert heads_read(layer_of(None), cache, tokens[0]).all()


def test_looking_at_what_is_read_leaves_the_cache_alone():
    keys, values, tokens = past_and_tokens()
    cache, layer = filled_cache(keys, values), layer_of(Variant(50, "off"))
    before = decoded(layer, cache, tokens[0])
    heads_read(layer, cache, tokens[0])
    assert all(map(torch.equal, cache.read(), (keys, values)))
    assert torch.equal(decoded(layer, cache, tokens[0]), before)


def test_cache_bytes_equal_a_count_by_hand():
    read = torch.tensor([[True, False, True], [True, True, True]])
    # Two and three heads of 7 keys and 7 values of 5 numbers of 4 bytes.
    assert cache_bytes(read, length=7, head_dim=5, itemsize=4) == (2 * 280 + 3 * 280) / 2
    assert cache_bytes(torch.zeros(1, 3).bool(), length=7, head_dim=5, itemsize=4) == 0


def fake_row(variant, active, skipping, seconds, speed_up, mebibytes):
    return {
        "size": {"d_model": 512, "num_heads": 8, "context": 8192, "batch": 1},
        "variant": variant,
        "active_heads": active,
        "skipping": skipping,
        "seconds": seconds,
        "speed_up": speed_up,
        "cache_bytes": mebibytes * 2**20,
    }


def test_table_from_made_up_numbers():
    plain = fake_row("plain", 8, None, [2e-3, 3e-3, 9e-3], [1.0, 1.0, 1.0], 32)
    routed = fake_row("MoH 25 %", 2, "on", [1e-3, 0.5e-3, 1.5e-3], [1.75, 2.0, 2.254], 8)
    alone = {"router": "1 token, in Python floats", "seconds": [2e-4], "speed_up": [1.5, 2.0, 2.5]}
    alone["size"] = plain["size"]
    table, routers = routing.tables([plain, routed, alone])
    assert routers.splitlines()[2:] == [
        "|                           | time per call | speed-up (quartiles) |",
        "| ------------------------- | ------------: | -------------------: |",
        "| 1 token, in Python floats |      0.200 ms |     2.00 (1.50-2.50) |",
    ]
    assert table.splitlines() == [
        "**decoding one token**, d_model 512, num_heads 8, context 8192, batch 1",
        "",
        "|          | active heads | skipping | time per token | speed-up (quartiles) | cache read | to plain |",
        "| -------- | -----------: | -------: | -------------: | -------------------: | ---------: | -------: |",
        "| plain    |       8 of 8 |        - |       3.000 ms |     1.00 (1.00-1.00) |  32.00 MiB |     100% |",
        "| MoH 25 % |       2 of 8 |       on |       1.000 ms |     2.00 (1.75-2.25) |   8.00 MiB |      25% |",
    ]


@pytest.mark.parametrize("batch", [1, 3])
def test_smoke_measures_every_row_and_writes_what_it_prints(tool, tmp_path, capsys, batch):
    files = tmp_path / "out.json", tmp_path / "out.md"
    threads = torch.get_num_threads()
    flags = ["--smoke", "--threads", "1", "--batch", str(batch), "--json", str(files[0]), "--markdown", str(files[1])]
    assert tool.main(["routing", *flags]) == 0
    assert torch.get_num_threads() == threads and gc.isenabled()
    saved, printed = json.loads(files[0].read_text()), capsys.readouterr().out
    contexts = routing.SMOKE_CONTEXTS
    rows = [row for row in saved["rows"] if "router" not in row]
    assert len(rows) == len(contexts) * len(routing.VARIANTS) and torch.__version__ in saved["machine"]
    assert [row["router"] for row in saved["rows"] if "router" in row][:2] == [
        "1 token, in Python floats", "2 tokens, by torch"
    ]  # fmt: skip
    tables = [block for block in files[1].read_text().split("\n\n") if block.startswith("|")]
    assert len(tables) == 2 * len(contexts) and all(table in printed for table in tables)
    for row in rows:
        assert len(row["seconds"]) == 2 and min(row["seconds"]) > 0 and row["size"]["batch"] == batch
        if row["skipping"] is None:
            assert row["speed_up"] == [1.0, 1.0, 1.0]
        if row["skipping"] != "auto":
            read = row["active_heads"] if row["skipping"] == "on" else 8
            assert row["cache_bytes"] == read * row["size"]["context"] * 4 * 2 * 4


@pytest.mark.parametrize("dtype", ["float64", "bfloat16"])
def test_other_precisions(tool, tmp_path, dtype):
    path = tmp_path / "out.json"
    flags = ["--smoke", "--contexts", "7", "--sizes", "24/4", "--dtype", dtype, "--json", str(path)]
    assert tool.main(["routing", *flags]) == 0
    plain = json.loads(path.read_text())["rows"][0]
    assert plain["cache_bytes"] == 7 * 24 * 2 * {"float64": 8, "bfloat16": 2}[dtype]


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--sizes", "512"], "512/8"),
        (["--sizes", "512/8/512/2"], "d_model/heads,"),
        (["--sizes", "512/7"], "heads dividing d_model"),
        (["--sizes", "36/6"], "multiples of 4"),
        (["--contexts", "512", "1"], "--contexts to be an int >= 2"),
        (["--contexts", "long"], "long"),
        (["--batch", "0"], "--batch to be an int >= 1"),
        (["--repeats", "1"], "--repeats to be an int >= 2"),
        (["--threads", "0"], "--threads to be an int >= 1"),
        (["--dtype", "int8"], "int8"),
        (["--device", "tpu"], "'tpu'"),
        (["--only", "plain"], "--only"),
        (["--markdown", "no/such/folder/out.md"], "can be written"),
    ],
)
def test_bad_input_is_one_sentence_and_code_2(tool, arguments, said, capsys):
    assert tool.main(["routing", "--smoke", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("error: Expected") and captured.err.count("\n") == 1 and said in captured.err
    assert captured.out == "" and gc.isenabled()
