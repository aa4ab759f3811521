"""The command `gohgraph draw`: the head graph of a model as a picture, a page, a film or a file."""
