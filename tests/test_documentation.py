"""Every public name is documented: a summary, its arguments, shapes of modules, errors, an example that runs."""

from __future__ import annotations

import ast
import inspect
import re

import pytest
from torch import nn

import gohgraph

# What is still missing, by part. A name that has it leaves its list; none is added.
MISSING = {
    # Those of torch_geometric's Data, which networks are built of by head_graph_of.
    "arguments": {"HeadNetwork"},
}
PARTS = ("summary", "arguments", "shape", "errors", "example")


def arguments(thing) -> list[str]:
    """The names a caller passes; several on one line of a docstring are parted by commas."""
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [name for name, one in inspect.signature(thing).parameters.items() if one.kind not in kinds]


def documented(text: str) -> set[str]:
    """The names that the section of arguments explains."""
    section = re.search(r"^Args:\n((?:    .*\n|\n)*)", text + "\n", flags=re.MULTILINE)
    lines = re.findall(r"^    ([\w*, ]+):", section[1], flags=re.MULTILINE) if section else []
    return {name.strip(" *") for line in lines for name in line.split(",")}


def raises(thing) -> bool:
    """Whether its own code stops with an error, in a class that of any method; what it calls is not looked at."""
    return any(isinstance(node, ast.Raise) for node in ast.walk(ast.parse(inspect.getsource(thing))))


def parts_missing(thing) -> set[str]:
    text, own = inspect.getdoc(thing) or "", "__doc__" in vars(thing) or not inspect.isclass(thing)
    missing = set()
    if not own or not re.match(r"\S.*[.:]( |$)", text.split("\n\n")[0].replace("\n", " ")):
        missing.add("summary")
    if set(arguments(thing)) - documented(text):
        missing.add("arguments")
    if inspect.isclass(thing) and issubclass(thing, nn.Module) and "\nShape:\n" not in text:
        missing.add("shape")
    if raises(thing) and "\nRaises:\n" not in text:
        missing.add("errors")
    if arguments(thing) and ">>> " not in text:
        missing.add("example")
    return missing


@pytest.mark.parametrize("name", gohgraph.__all__)
def test_a_public_name_is_documented(name):
    known = {part for part in PARTS if name in MISSING.get(part, ())}
    missing = parts_missing(getattr(gohgraph, name))
    assert not missing - known, "write these parts of its docstring"
    assert not known - missing, "take it off the list of what is missing"


def test_the_list_names_public_names_and_parts():
    assert set(MISSING) <= set(PARTS) and set().union(*MISSING.values()) <= set(gohgraph.__all__)
