"""The command `gohgraph`: draws the head graph of a model, or trains one while you wait."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Sequence

from gohgraph.common.command_line import ArgumentParser, run
from gohgraph.learning.cli.draw.command import draw_model, draw_parser
from gohgraph.learning.cli.language_model import Demo

EXAMPLES = """examples:
    gohgraph demo                                      train head graphs beside plain attention, in three minutes
    gohgraph draw runs/demo/goh --out heads.html       draw what was learned, as an interactive page
    gohgraph draw HuggingFaceTB/SmolLM2-135M --text "heads talk to heads"
                                                       which head of a pretrained model reads which
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code.

    Args:
        argv: the words behind `gohgraph`; `None` takes those of the process.

    Example:
        >>> main(["draw", "--demo", "--out", "heads.bmp"])
        2
    """
    argv = sys.argv[1:] if argv is None else argv

    def call(flags: argparse.Namespace) -> None:
        # The command is the first word; what a run stores is its flags alone.
        vars(flags).pop("call")(flags, argv[1:])

    with warnings.catch_warnings():
        # Of torch-geometric under torch 2.14, when it is imported: nothing that a reader could do.
        warnings.filterwarnings("ignore", r"`torch\.jit\.script", FutureWarning)
        return run(_parser(), call, argv)


def _parser() -> ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    parser = ArgumentParser(prog="gohgraph", description=__doc__, epilog=EXAMPLES, formatter_class=raw)
    commands = parser.add_subparsers(metavar="COMMAND", required=True)
    calls = {"draw": lambda flags, argv: draw_model(flags), "demo": Demo.run_with}
    for name, of in {"draw": draw_parser(), "demo": Demo.parser()}.items():
        text = of.description or ""
        command = commands.add_parser(
            name,
            parents=[of],
            # Both parsers have --help.
            add_help=False,
            description=text,
            help=text.splitlines()[0],
            formatter_class=raw,
            allow_abbrev=False,
        )
        command.set_defaults(call=calls[name])
    return parser
