"""What the command lines promise: exit codes, one sentence, and no hidden faults."""

from __future__ import annotations

import pytest

from gohgraph.common.command_line import ArgumentParser, run


def failing(error):
    def command(flags):
        raise error

    return command


def parser():
    own = ArgumentParser(prog="tool")
    own.add_argument("--steps", type=int)
    return own


REFUSED = [kind("Expected a (got b). Do c.") for kind in (ValueError, TypeError, FloatingPointError, ImportError)]


@pytest.mark.parametrize("error", [*REFUSED, FileNotFoundError(2, "gone", "file.txt")])
def test_bad_input_is_one_sentence_and_code_2(error, capsys):
    assert run(parser(), failing(error), []) == 2
    shown = capsys.readouterr()
    assert shown.out == "" and shown.err.count("\n") == 1 and shown.err.startswith("error: ")


def test_bad_flags_are_one_sentence_and_code_2(capsys):
    assert run(parser(), failing(AssertionError()), ["--steps", "many"]) == 2
    assert capsys.readouterr().err.startswith("error: Expected other flags (got: argument --steps")


@pytest.mark.parametrize(
    "error", [ValueError("too many values to unpack"), ModuleNotFoundError("No module named 'b'"), KeyError("Expected")]
)
def test_faults_of_the_program_are_raised(error):
    with pytest.raises(type(error), match=str(error)):
        run(parser(), failing(error), [])


def test_interruption(capsys):
    assert run(parser(), failing(KeyboardInterrupt("stopped; resume with --resume")), []) == 130
    assert "resume" in capsys.readouterr().err


def test_success():
    seen = []
    assert run(parser(), seen.append, ["--steps", "3"]) == 0
    assert seen[0].steps == 3
