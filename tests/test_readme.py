"""README and docs are true: Python blocks run and print what they show, commands, flags, files and sections exist."""

from __future__ import annotations

import re
import runpy
import shlex
import sys
from contextlib import ExitStack, redirect_stdout
from io import StringIO
from pathlib import Path
from unittest import mock

import pytest
from benchmarks.tasks import TASKS
from website.links import source_url

import gohgraph as goh
from gohgraph.graphs.baselines import BASELINES
from gohgraph.graphs.baselines.presets import PRESETS
from gohgraph.graphs.topologies import TOPOLOGIES

ROOT = Path(__file__).parent.parent
COMMAND = "gohgraph/__main__.py"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
NOTEBOOKS = sorted((ROOT / "docs/notebooks").glob("*.ipynb"))
# Where README's links lead, so that they hold on a package index too.
LINKED = re.compile(rf"{re.escape(source_url())}/(?:blob|tree)/main/")
ADDRESS = source_url().removeprefix("https://github.com/")
PICTURE = re.compile(rf"https://raw\.githubusercontent\.com/{ADDRESS}/main/")


def blocks(language: str, *pages: Path) -> list[str]:
    text = "\n".join(page.read_text() for page in pages or PAGES[:1])
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)


def examples(page: Path) -> list[tuple[str, str | None]]:
    """The Python blocks of a page, each with the text block behind it, which is what it prints."""
    behind = r"^```python\n(.*?)^```(?:\n\n```text\n(.*?)^```)?"
    found = re.findall(behind, page.read_text(), flags=re.MULTILINE | re.DOTALL)
    return [(code, printed or None) for code, printed in found]


def commands() -> list[list[str]]:
    lines = "".join(blocks("bash", *PAGES)).replace("\\\n", " ").splitlines()
    # Environment variables may stand before a command.
    lines = [re.sub(r"^(\w+=\S+\s+)+", "", line) for line in lines]
    lines = [re.sub(r"^gohgraph ", f"python {COMMAND} ", line) for line in lines]
    # What torchrun starts stands behind its own flags.
    lines = [re.sub(r"^torchrun .*? -- ", "python ", line) for line in lines]
    return [shlex.split(line, comments=True) for line in lines if line.startswith("python ")]


def called(command: list[str]) -> tuple[str, ...]:
    """The script and, where its first argument names one, its subcommand: each has flags of its own."""
    named = command[1] in ("tools/benchmark.py", COMMAND) and len(command) > 2 and not command[2].startswith("-")
    return tuple(command[1 : 2 + named])


def test_the_repository_has_one_address():
    # Who moves it replaces it in setup.cfg and README, nothing else names it.
    files = [path for kind in ("*.md", "*.cfg", "*.cff", "*.toml", "*.yml") for path in ROOT.glob(kind)]
    named = {
        path.name: set(re.findall(r"(?:github\.com|githubusercontent\.com)/([\w-]+/gohgraph)\b", path.read_text()))
        for path in [*files, *PAGES[1:], *NOTEBOOKS, *(ROOT / ".github").rglob("*.yml")]
    }
    assert {name: found for name, found in named.items() if found} == {"README.md": {ADDRESS}, "setup.cfg": {ADDRESS}}


@pytest.fixture
def registries():
    """Forgets afterwards what a page adds."""
    with ExitStack() as stack:
        for registry in (BASELINES, PRESETS, TOPOLOGIES, TASKS):
            stack.enter_context(mock.patch.dict(registry))
        yield


@pytest.mark.parametrize("page", [page for page in PAGES if blocks("python", page)], ids=lambda page: page.name)
def test_python_blocks_run_in_order_and_print_what_they_show(page, tmp_path, monkeypatch, registries):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block, shown in examples(page):
        # Flower needs Python 3.11.
        if "federated" in block and sys.version_info < (3, 11):
            continue
        with redirect_stdout(StringIO()) as printed:
            exec(compile(block, page.name, "exec"), names)
        assert shown is None or printed.getvalue() == shown


def test_every_text_block_is_the_output_of_the_python_block_before_it():
    for page in PAGES:
        assert len(blocks("text", page)) == sum(shown is not None for _, shown in examples(page))


@pytest.mark.parametrize("script", sorted({called(command) for command in commands()}), ids=" ".join)
def test_commands_name_existing_scripts_flags_and_values(script, monkeypatch, capsys):
    if script[0] != COMMAND:
        monkeypatch.syspath_prepend(str((ROOT / script[0]).parent))
    for command in (command for command in commands() if called(command) == script):
        # Values are checked before the help is shown, flags are found in it; nothing is run.
        monkeypatch.setattr(sys, "argv", [*command[1:], "--help"])
        # In this process: a new one would import torch for every script.
        with pytest.raises(SystemExit) as stop:
            runpy.run_path(str(ROOT / script[0]), run_name="__main__")
        printed = capsys.readouterr()
        assert not stop.value.code, printed.err
        assert {word for word in command if word.startswith("--")} <= set(re.findall(r"--[\w-]+", printed.out))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_named_in_the_text_exist(page):
    text = LINKED.sub("", PICTURE.sub("", page.read_text()))
    named = set(re.findall(r"\b(?:gohgraph|tools|examples|tests|docs)/[\w/]+\.\w+", text))
    assert not [name for name in sorted(named) if not (ROOT / name).is_file()]


def test_make_targets_exist():
    targets = set(re.findall(r"^make (\w+)", "".join(blocks("bash")), flags=re.MULTILINE))
    assert {"demo", "test"} <= targets
    assert targets <= set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE))


def sections(page: Path) -> set[str]:
    titles = re.findall(r"^#+ (.+)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_linked_files_and_sections_exist(page):
    for link in (a or b for a, b in re.findall(r"\]\(([^)]+)\)|src=\"([^\"]+)\"", page.read_text())):
        name, _, section = link.partition("#")
        target = page.parent / name if name else page
        if name.startswith("https:"):
            target = ROOT / LINKED.sub("", PICTURE.sub("", name))
            if target == ROOT / name:
                continue
        assert target.exists(), link
        assert not section or section in sections(target), link


def test_the_readme_is_short_and_links_absolutely():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 110
    assert not re.findall(r"\]\((?!https:)", text) and LINKED.search(text) and PICTURE.search(text)


def test_every_public_name_is_in_the_reference():
    text = "".join(page.read_text() for page in (ROOT / "docs/reference").glob("*.md"))
    documented = re.findall(r"^::: gohgraph\.(\w+)$", text, flags=re.MULTILINE)
    assert sorted(documented) == sorted(goh.__all__)
