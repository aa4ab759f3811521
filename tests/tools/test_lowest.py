from __future__ import annotations

from pathlib import Path

import pytest
from helpers import load_script
from packaging.requirements import Requirement

lowest = load_script("tools", "lowest")
PINS = Path(__file__).parents[2] / "constraints.txt"


def test_every_bound_is_printed_once_as_a_version_that_pip_takes(capsys):
    assert lowest.main([]) == 0
    lines = [Requirement(line) for line in capsys.readouterr().out.splitlines()]
    names = [line.name for line in lines]
    assert {"torch", "networkx", "transformers", "flwr"} < set(names) and names == sorted(set(names))
    assert all(str(line.specifier).startswith("==") for line in lines)
    assert {str(line.marker) for line in lines if line.name == "flwr"} == {'python_version >= "3.11"'}


def test_the_pinned_versions_are_within_the_bounds():
    bounds = {name: Requirement(f"{name}>={low}") for name, (low, _) in lowest.lower_bounds(lowest.SETTINGS).items()}
    pins = [Requirement(line) for line in PINS.read_text().splitlines() if not line.startswith("#")]
    assert set(bounds) <= {pin.name for pin in pins}
    for pin in pins:
        if pin.name in bounds:
            (version,) = pin.specifier
            assert version.version in bounds[pin.name].specifier, pin


def test_the_table_names_what_is_installed(capsys):
    assert lowest.main(["--table"]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("| pytest |"))
    assert row.split("|")[3].strip() == lowest.installed("pytest") != "none"
    assert lowest.installed("no-such-package") == "none"


@pytest.mark.parametrize(
    "lines", ["torch>=2.7,<3", "torch==2.7", "torch", "torch>=2.7\n    torch>=2.8", "gohgraph[train]>=1"]
)
def test_a_requirement_without_one_lower_bound_is_refused(lines, tmp_path):
    file = tmp_path / "setup.cfg"
    text = f"[metadata]\nname = gohgraph\n[options]\ninstall_requires =\n    {lines}\n[options.extras_require]\n"
    file.write_text(text)
    with pytest.raises(ValueError, match="Expected one"):
        lowest.lower_bounds(file)
