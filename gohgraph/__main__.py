"""`python -m gohgraph`."""

import sys

from gohgraph.cli import main

sys.exit(main())
