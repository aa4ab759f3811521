"""The archives of finished runs: what the documentation shows is what they hold."""

import csv
import json
import tarfile
from collections import defaultdict
from pathlib import Path
from statistics import fmean

import pytest

DOCS = Path(__file__).parents[2] / "docs"
ARCHIVES = sorted((DOCS / "measured").glob("*.tar.xz"))


@pytest.fixture(params=ARCHIVES, ids=lambda archive: archive.name)
def run(request, tmp_path):
    """The run folder of an archive."""
    with tarfile.open(request.param) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / request.param.name.removesuffix(".tar.xz")


def tables(run):
    """The tables of a run, that of what is reported first."""
    return [part for part in (run / "tables.md").read_text().strip().split("\n\n") if part.startswith("|")]


def test_every_archive_is_linked_beside_its_table(run):
    page = (DOCS / "experiments.md").read_text()
    assert f"](measured/{run.name}.tar.xz)" in page
    assert tables(run) and all(table in page for table in tables(run))


def test_tables_are_the_means_of_finished_runs(run):
    values, rows = defaultdict(list), tables(run)[0].splitlines()
    with open(run / "results.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    for line in lines:
        values[line["variant"]].append(float(line["value"]))
        name = f"{line['task']}_{line['variant']}_*_{line['seed']}.json"
        ends = [json.loads(file.read_text())["result"][-1][line["measure"]] for file in run.glob(f"results/{name}")]
        assert float(line["value"]) in ends
    for variant, own in values.items():
        (row,) = [row for row in rows if row.startswith(f"| {variant} ")]
        assert f" {fmean(own):.4f} ± " in row and len(own) > 1
