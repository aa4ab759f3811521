"""Training regimes: corpora, the loop, and what is built on them."""
