"""The parts of `Script` under the names that scripts without it take them from."""

from gohgraph.learning.cli.flags import add_run_flags, add_size_flags, add_training_flags, fill_sizes, train_config
from gohgraph.learning.cli.script import can_resume, open_folder, resumable

__all__ = [
    "add_run_flags", "add_size_flags", "add_training_flags", "can_resume", "fill_sizes", "open_folder", "resumable",
    "train_config",
]  # fmt: skip
