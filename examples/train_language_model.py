"""Trains a byte-level language model with head graphs, or beside plain attention of equal parameter count (--compare).

    python examples/train_language_model.py --compare
    python examples/train_language_model.py --data book.txt --sites both --score-in-degree 4 --run runs/book
    python examples/train_language_model.py --sites none --router --compare --run runs/mixture-of-heads
    python examples/train_language_model.py --experts --rounds 3 --router --top-k 3 --run runs/experts
    torchrun --nproc-per-node 4 -- examples/train_language_model.py --parallel tp fsdp --run runs/sharded

It is gohgraph/learning/cli/language_model.py, which `gohgraph demo` runs too.
"""

import sys

from gohgraph.learning.cli.language_model import LanguageModelTraining

main = LanguageModelTraining.main

if __name__ == "__main__":
    sys.exit(main())
