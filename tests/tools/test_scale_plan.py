from __future__ import annotations

import json

import pytest
from example_runs import refused
from helpers import load_script

main = load_script("tools", "scale_plan").main
CLUSTER = ["--tensor", "8", "--pipeline", "4", "--data", "16"]


def test_it_prints_a_line_for_each_topology_and_groups_send_nothing(tmp_path, capsys):
    file = tmp_path / "plan.json"
    assert main([*CLUSTER, "--topologies", "complete", "groups", "empty", "--json", str(file)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("|")[1].strip() for line in lines if line.startswith("|")][2:] == [
        "none", "complete", "groups", "empty"
    ]  # fmt: skip
    costs = json.loads(file.read_text())["costs"]
    assert costs["groups"]["tensor_bytes"] == costs["empty"]["tensor_bytes"] == 0 < costs["complete"]["tensor_bytes"]
    # 32 layers of 32 x 32 edges, each of a row of 4096 and a bias.
    assert costs["complete"]["parameters"] == 32 * 32 * 32 * 4097


def test_costs_grow_as_they_must(tmp_path, capsys):
    def cost(*flags):
        file = tmp_path / "plan.json"
        assert main([*CLUSTER, "--topologies", "ring", "--json", str(file), *flags]) == 0
        return json.loads(file.read_text())["costs"]["ring"]

    base, more = cost(), cost("--router")
    assert cost("--rounds", "2")["tensor_bytes"] == pytest.approx(2 * base["tensor_bytes"], rel=1e-3)
    assert cost("--site", "scores")["tensor_bytes"] == 2 * base["tensor_bytes"]
    assert cost("--fsdp")["data_bytes"] == 1.5 * base["data_bytes"]
    assert cost("--batch-size", "8")["flops"] == 2 * base["flops"]
    assert cost("--rank", "16")["parameters"] < base["parameters"] < more["parameters"]
    assert more["tensor_bytes"] > base["tensor_bytes"]


@pytest.mark.parametrize("flags", [["--tensor", "5"], ["--pipeline", "3"], ["--tflops", "0"], ["--heads", "7"]])
def test_bad_input_is_one_sentence(flags, capsys):
    assert refused(main(flags), capsys).startswith("error: Expected")
