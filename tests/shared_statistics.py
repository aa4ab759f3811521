"""What two ranks that share their routing statistics check; a module of its own, as every rank imports it."""

from __future__ import annotations

import copy
from typing import Any

import torch
from helpers import assert_equal_to, small_config, trained_like
from torch import Tensor, distributed
from torch.nn.parallel import DistributedDataParallel

from gohgraph import LanguageModel
from gohgraph.attention.routing import routers, share_statistics


def losses(output: Any) -> Tensor:
    return sum(r.balance_loss for r in output.routing) + sum(r.z_loss for r in output.routing)


def statistics_of_all_ranks(rank: int) -> None:
    """Losses, loads and gradients are those of the whole batch, until a model evaluates, is copied or undone."""
    torch.manual_seed(5)
    model = trained_like(LanguageModel(small_config("moh-outputs")))
    tokens = torch.randint(13, (6, 7))
    # One rank has four rows and many real tokens, the other two rows and few.
    keep = torch.arange(7) < torch.tensor([7, 7, 6, 7, 3, 2])[:, None]
    own = slice(0, 4) if rank == 0 else slice(4, 6)
    whole = model(tokens, keep_mask=keep)
    expected = torch.autograd.grad(losses(whole), list(model.parameters()), allow_unused=True)
    parallel = DistributedDataParallel(copy.deepcopy(model), find_unused_parameters=True)
    share_statistics(parallel, distributed.group.WORLD)
    output = parallel(tokens[own], keep_mask=keep[own])
    losses(output).backward()
    for one, all_of_them in zip(output.routing, whole.routing, strict=True):
        for name in ("balance_loss", "z_loss", "load", "entropy"):
            assert_equal_to(getattr(one, name), getattr(all_of_them, name))
    for parameter, gradient in zip(parallel.parameters(), expected, strict=True):
        if gradient is not None:
            assert_equal_to(parameter.grad, gradient)
    # In eval mode a rank is on its own, and so is a copy; None undoes it.
    alone = [r.load for r in model.eval()(tokens[own], keep_mask=keep[own]).routing]
    again = [r.load for r in parallel.module.eval()(tokens[own], keep_mask=keep[own]).routing]
    assert all(map(torch.equal, again, alone))
    assert all(router.process_group is None for router in routers(copy.deepcopy(parallel.module)))
    share_statistics(parallel, None)
    if rank == 0:
        undone = [r.load for r in parallel.module.train()(tokens[own], keep_mask=keep[own]).routing]
        assert all(map(torch.equal, undone, alone))
    distributed.barrier()
