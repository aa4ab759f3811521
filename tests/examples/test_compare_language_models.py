"""The comparison on a tiny scale: equal parameters, chosen rates, a table, and going on where it stopped."""

from __future__ import annotations

import json

import pytest
from helpers import load_script


@pytest.fixture(scope="module")
def example():
    return load_script("examples", "compare_language_models")


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("heads talk to heads, and some of them listen. " * 200)
    return str(file)


def smoke(text, folder, *more):
    rates = ["--learning-rates", "1e-3", "1e-2"]
    return ["--smoke", "--data", text, "--run", str(folder), "--jobs", "1", *rates, *more]


def test_table_results_and_going_on(example, text, tmp_path, capsys):
    flags = smoke(text, tmp_path / "run", "--seeds", "0", "1")
    assert example.main(flags) == 0
    table = (tmp_path / "run" / "table.md").read_text()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()]
    assert [row[0] for row in rows[2:]] == ["plain", "outputs", "scores", "both"]
    counts = [int(row[1].replace(",", "")) for row in rows[2:]]
    assert max(counts) - min(counts) < 0.01 * max(counts)
    assert all(row[3] in ("0.001", "0.01") and "±" in row[-2] for row in rows[2:])
    results = sorted((tmp_path / "run" / "results").glob("*.json"))
    # Two rates for each variant on the first seed, the better one on the second.
    assert len(results) == 12 and (tmp_path / "run" / "curves.png").stat().st_size > 1000
    for row in rows[2:]:
        files = {rate: tmp_path / "run" / "results" / f"{row[0]}-{rate}-0.json" for rate in ("0.001", "0.01")}
        ends = {rate: json.loads(file.read_text())["result"][-1]["validation_loss"] for rate, file in files.items()}
        assert row[3] == min(ends, key=ends.get)
    stamps = [result.stat().st_mtime_ns for result in results]
    assert example.main(flags) == 0
    assert [result.stat().st_mtime_ns for result in results] == stamps
    assert table in capsys.readouterr().out


def test_routed_variants_tell_their_load(example, text, tmp_path):
    names = ["plain", "moh-75", "moh-50", "outputs-moh-75", "experts-1", "experts-3"]
    assert example.main(smoke(text, tmp_path / "run", "--seeds", "0", "--variants", *names)) == 0
    *rows, _, load = (tmp_path / "run" / "table.md").read_text().splitlines()
    assert [row.split("|")[1].strip() for row in rows[2:]] == names
    told = dict(item.split() for item in load.partition(": ")[2].rstrip(".").split(", "))
    assert list(told) == ["moh-75", "moh-50", "outputs-moh-75"]
    assert all(0 <= float(value) < 2 for value in told.values())
    assert not (tmp_path / "run" / "pilots").exists()


def test_many_rates_are_tried_in_pilots_first(example, text, tmp_path):
    rates = ["1e-3", "2e-3", "1e-2", "2e-2"]
    flags = smoke(text, tmp_path / "run", "--seeds", "0", "--variants", "plain", "--learning-rates", *rates)
    assert example.main(flags) == 0
    assert len(list((tmp_path / "run" / "pilot-results").glob("*.json"))) == 4
    assert len(list((tmp_path / "run" / "results").glob("*.json"))) == 3


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (["--data", "missing.txt"], "Expected"),
        (["--jobs", "0"], "Expected jobs >= 1"),
        (["--num-heads", "7", "--steps", "1"], "Expected"),
    ],
)
def test_bad_input(example, text, tmp_path, capsys, change, match):
    flags = [flag for flag in smoke(text, tmp_path / "run", *change) if flag != "--smoke"]
    assert example.main(flags) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and match in error
