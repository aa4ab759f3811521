"""Tests of `tools/benchmark.py page`: every change of the page is measured, and a size that is none is refused."""

from __future__ import annotations

import json
import shutil

import pytest
from benchmarks import page as benchmark
from helpers import load_script

HAS_BROWSER = any(map(shutil.which, benchmark.BROWSERS))


@pytest.fixture(scope="module")
def tool():
    return load_script("tools", "benchmark")


@pytest.mark.slow
@pytest.mark.skipif(not HAS_BROWSER, reason="no Chromium on this machine: install chromium, or put one on the PATH")
def test_every_change_is_measured(tool, tmp_path, capsys):
    pytest.importorskip("playwright.sync_api", reason="playwright is missing: pip install playwright")
    given = ["page", "--smoke", "--repeats", "1", "--tokens", "20", "--json", str(tmp_path / "out.json")]
    assert tool.main([*given, "--pages", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [row["what"] for row in rows] == ["ready", *benchmark.CHANGES]
    assert all(row["page"] == "2/4" and min(row["seconds"]) > 0 for row in rows)
    assert (tmp_path / "2x4.html").exists() and "choice of layers" in capsys.readouterr().out


def test_a_page_of_no_size_is_refused(tmp_path):
    for size in ("12", "12/x", "1/4", "2/3/4"):
        with pytest.raises(ValueError, match="Expected LAYERS/HEADS"):
            benchmark.write_page(tmp_path / "page.html", size, 5)
