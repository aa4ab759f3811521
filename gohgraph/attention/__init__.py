"""Attention whose heads form graphs: the block, the forms it is computed in, and the routing of heads."""
