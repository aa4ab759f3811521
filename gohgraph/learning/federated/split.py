"""Clients that differ: several kinds of text, dealt out unevenly."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from gohgraph.common.checks import check_int, check_number
from gohgraph.learning.data.corpus import Corpus


def dirichlet_split(
    texts: Sequence[Corpus], num_clients: int, *, alpha: float, minimum: int = 2000, seed: int = 0
) -> tuple[list[Corpus], Tensor]:
    r"""Deals texts out to clients, each kind in shares of its own.

    .. math:: p_k \sim \text{Dirichlet}(\alpha 1_C)

    Client c gets the share p_kc of text k, in one piece, for training and for validation alike; every byte goes to
    exactly one client. With alpha near 0 every kind of text is at one client, with a large one all clients are alike.
    As Yurochkin et al. 2019 (arXiv 1905.12022, section 4) do with classes; drawn again while a client would have too
    little text, as Li et al. 2022 do (arXiv 2102.02079).

    Args:
        texts: K kinds.
        num_clients: C >= 1.
        alpha: > 0.
        minimum: bytes of validation text that every client needs.
        seed: of the shares.

    Returns:
        The text of each client, and how many bytes of each kind it trains on `[C, K]`.

    Example:
        >>> texts = [Corpus(name, *torch.randint(256, (2, 900), dtype=torch.uint8)) for name in ("a", "b")]
        >>> clients, shares = dirichlet_split(texts, 3, alpha=1.0, minimum=100)
        >>> len(clients), shares.shape, shares.sum(dim=0).tolist()
        (3, torch.Size([3, 2]), [900, 900])
    """
    check_int("num_clients", num_clients, low=1)
    check_number("alpha", alpha, above=0)
    check_int("minimum", minimum, low=1)
    generator, every = np.random.default_rng(seed), range(num_clients)
    for _ in range(1000):
        shares = generator.dirichlet([alpha] * num_clients, size=len(texts))  # [K, C]
        train, validation = (
            [_deal(getattr(text, part), share) for text, share in zip(texts, shares, strict=True)]
            for part in ("train", "validation")
        )
        texts_of = [[torch.cat([pieces[c] for pieces in part]) for part in (train, validation)] for c in every]
        clients = [Corpus(f"client {number}", *parts) for number, parts in zip(every, texts_of, strict=True)]
        if min(len(client.validation) for client in clients) >= minimum:
            return clients, torch.tensor([[len(piece) for piece in pieces] for pieces in train]).T  # [C, K]
    raise ValueError(
        f"Expected shares that give {num_clients} clients {minimum} bytes of validation text each (got none in 1,000 "
        f"draws). Do raise alpha = {alpha}, or take fewer clients or more text."
    )


def _deal(text: Tensor, share: np.ndarray) -> list[Tensor]:
    ends = np.rint(np.cumsum(share) * len(text)).astype(int)
    ends[-1] = len(text)
    return list(text.tensor_split(torch.from_numpy(ends[:-1])))
