"""The named topologies of a head graph, each a function from the number of heads to (sender, receiver) pairs."""

from collections.abc import Callable, Iterable, Iterator

import torch

from gohgraph.common.checks import check_int, check_probability

Edges = Iterable[tuple[int, int]]
LARGEST_SEED = 2**63 - 1


def complete(num_heads: int) -> Iterator[tuple[int, int]]:
    """Yields every ordered pair of distinct heads."""
    return ((j, i) for i in range(num_heads) for j in range(num_heads) if i != j)


def ring(num_heads: int, *, hops: int = 1) -> Iterator[tuple[int, int]]:
    """Yields edges to head i from heads i-1, ..., i-hops (modulo `num_heads`)."""
    check_int("hops", hops, low=0, high=num_heads - 1)
    return (((i - hop) % num_heads, i) for i in range(num_heads) for hop in range(1, hops + 1))


def star(num_heads: int, *, center: int = 0) -> Iterator[tuple[int, int]]:
    """Yields edges from the hub `center` to every other head and back."""
    check_int("center", center, low=0, high=num_heads - 1)
    rim = [i for i in range(num_heads) if i != center]
    return (edge for i in rim for edge in ((center, i), (i, center)))


def bipartite(num_heads: int, *, num_shared: int | None = None) -> Iterator[tuple[int, int]]:
    """Yields edges both ways between the first `num_shared` heads (default: half of them) and the others."""
    shared = num_heads // 2 if num_shared is None else num_shared
    check_int("num_shared", shared, low=0, high=num_heads)
    pairs = ((i, j) for i in range(shared) for j in range(shared, num_heads))
    return (edge for i, j in pairs for edge in ((i, j), (j, i)))


def groups(num_heads: int, *, num_groups: int | None = None, ranks: int = 1) -> Iterator[tuple[int, int]]:
    """Yields all edges within each of `num_groups` equal runs of consecutive heads (default: as many as ranks, but 2).

    No group spans two of the `ranks` equal runs of heads that ranks hold in tensor parallelism.
    """
    check_int("ranks", ranks, low=1, high=num_heads)
    number = max(2, ranks) if num_groups is None else num_groups
    check_int("num_groups", number, low=1, high=num_heads)
    if number % ranks or num_heads % number:
        raise ValueError(
            f"Expected num_groups that {ranks} ranks divide and that divides {num_heads} heads (got {number}). Do "
            "change one of them."
        )
    size = num_heads // number
    return ((j, i) for i in range(num_heads) for j in range(num_heads) if i != j and i // size == j // size)


def small_world(num_heads: int, *, neighbors: int = 4, rewire: float = 0.1, seed: int = 0) -> Edges:
    """Returns a Watts-Strogatz graph, each undirected edge carrying both ways (`networkx.watts_strogatz_graph`)."""
    import networkx

    check_int("neighbors", neighbors, low=0, high=num_heads)
    check_int("seed", seed, low=0, high=LARGEST_SEED)
    check_probability("rewire", rewire)
    edges = list(networkx.watts_strogatz_graph(num_heads, neighbors, rewire, seed=seed).edges())
    return [(j, i) for j, i in edges if i != j] + [(i, j) for j, i in edges if i != j]


def random(num_heads: int, *, in_degree: int = 2, seed: int = 0) -> Iterator[tuple[int, int]]:
    """Yields `in_degree` edges to every head from other heads drawn without replacement."""
    check_int("in_degree", in_degree, low=0, high=num_heads - 1)
    check_int("seed", seed, low=0, high=LARGEST_SEED)
    generator = torch.Generator("cpu").manual_seed(seed)
    for i in range(num_heads):
        order = torch.randperm(num_heads - 1, generator=generator, device="cpu")[:in_degree].tolist()
        # An index at or past i means the next head up, which leaves i itself out of the draw.
        yield from ((j + (j >= i), i) for j in order)


def empty(num_heads: int) -> Edges:
    """Returns no edges."""
    return ()


TOPOLOGIES: dict[str, Callable[..., Edges]] = {
    "complete": complete,
    "ring": ring,
    "star": star,
    "bipartite": bipartite,
    "groups": groups,
    "small-world": small_world,
    "random": random,
    "empty": empty,
}
