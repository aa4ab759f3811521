"""Training beyond one device: heads sharded over ranks, sharded and replicated data parallelism, checkpoints."""
