"""Tests of `tools/benchmark.py laws`: power laws, ratios of compute at equal loss, and folders that do not fit."""

from __future__ import annotations

import json
import math

import pytest
from benchmarks.laws import read_sizes
from benchmarks.power_laws import Curve, compute_ratios, geometric, trend
from helpers import load_script

COMPUTE = [6e9, 6e10, 6e11]


def law(scale, exponent, seeds=(1.0, 1.1)):
    return Curve(COMPUTE, [[seed * scale * c**-exponent for c in COMPUTE] for seed in seeds])


def test_a_power_law_is_found_again():
    assert law(30.0, 0.07).exponents == pytest.approx([0.07, 0.07])


def test_a_variant_that_saves_compute_is_worth_what_it_saves():
    plain = law(30.0, 0.07)
    # With the loss that plain attention has at 1.25 times the compute, at every size and on both seeds.
    other = Curve(COMPUTE, [[seed * 30 * (1.25 * c) ** -0.07 for c in COMPUTE] for seed in (1.0, 1.1)])
    ratios = compute_ratios(plain, other)
    assert all(own == pytest.approx([1.25] * 3) for own in ratios)
    assert trend(COMPUTE, ratios) == pytest.approx((1, 1, 1))
    assert compute_ratios(plain, plain) == [[1.0] * 3] * 2


def test_a_growing_lead_has_a_trend_above_one():
    plain, other = law(30.0, 0.07), law(30.0, 0.08)
    growth, low, high = trend(COMPUTE, compute_ratios(plain, other))
    # L_plain / L_other = C^0.01, so the ratio is C^(1/7).
    assert growth == pytest.approx(10 ** (1 / 7)) and low == pytest.approx(high)


def test_intervals_are_of_logarithms():
    centre, low, high = geometric([1.0, 1.21])
    half = 12.7062 * math.log(1.21) / 2
    assert centre == pytest.approx(1.1) and high == pytest.approx(1.1 * math.exp(half), rel=1e-4)
    assert centre / low == pytest.approx(high / centre) and math.isnan(geometric([1.3])[1])


def write(folder, parameters, losses, *, time=1.1, tokens=1000):
    folder.mkdir()
    entries = {
        variant: {
            "parameters": parameters, "tokens": tokens, "times": [1.0, time if variant != "plain" else 1.0, 1.0],
            "logs": [[{"validation_loss": 9.0}, {"validation_loss": loss}] for loss in own],
        }
        for variant, own in losses.items()
    }  # fmt: skip
    (folder / "results.json").write_text(json.dumps({"text": entries}))
    return folder


def test_the_table_and_the_picture_are_of_the_folders(tmp_path, capsys):
    large = write(tmp_path / "large", 2_000_000, {"plain": [1.0, 1.2], "outputs": [0.9, 1.0]})
    small = write(tmp_path / "small", 200_000, {"plain": [2.0, 2.4], "outputs": [1.8, 2.0]})
    tool, files = load_script("tools", "benchmark"), [tmp_path / "laws.md", tmp_path / "laws.png"]
    argv = ["laws", str(large), str(small), "--markdown", str(files[0]), "--picture", str(files[1])]
    assert tool.main(argv) == 0
    text = files[0].read_text()
    assert text.strip() in capsys.readouterr().out and files[1].stat().st_size > 1000
    (row,) = [line for line in text.splitlines() if line.startswith("| outputs")]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    # Plain attention halves its loss from size to size: b = log10(2) on either seed.
    seeds = [(2 / 1.8) ** (1 / math.log10(2)), 1.2 ** (1 / math.log10(2))]
    assert cells[1:3] == ["1.9000", "0.9500"] and cells[3].startswith("0.3010")
    assert cells[4].split()[0] == cells[5].split()[0] == f"{math.sqrt(seeds[0] * seeds[1]):.3f}"
    assert cells[6] == f"{math.sqrt(seeds[0] * seeds[1]) / 1.1:.3f}" and cells[8].split()[0] == "1.000"
    assert "1.20e+09, 1.20e+10 operations, 2 seeds" in text


def test_folders_that_do_not_fit_are_refused(tmp_path):
    one = write(tmp_path / "one", 200, {"plain": [2.0], "outputs": [1.8]})
    same = write(tmp_path / "same", 200, {"plain": [2.0], "outputs": [1.8]})
    fewer = write(tmp_path / "fewer", 400, {"plain": [2.0]})
    with pytest.raises(ValueError, match="Expected two sizes or more"):
        read_sizes([one], "text")
    with pytest.raises(ValueError, match="Expected two sizes or more"):
        read_sizes([one, same], "text")
    with pytest.raises(ValueError, match="same variants and seeds"):
        read_sizes([one, fewer], "text")
    with pytest.raises(ValueError, match="Expected results of 'digits'"):
        read_sizes([one, fewer], "digits")
    with pytest.raises((OSError, ValueError), match=r"results\.json"):
        read_sizes([one, tmp_path / "absent"], "text")
