"""Shows the head graph of a model: `gohgraph draw`, from a checkout.

    python tools/visualize_heads.py runs/demo/goh --out heads.html --open
"""

import sys

from gohgraph.common.command_line import run
from gohgraph.learning.cli.draw.command import draw_model, draw_parser


def main(argv: list[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    return run(draw_parser(), draw_model, argv)


if __name__ == "__main__":
    sys.exit(main())
