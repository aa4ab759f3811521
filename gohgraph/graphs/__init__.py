"""Head graphs: topologies, learned edges, the convolution over heads, and what it has to beat."""
