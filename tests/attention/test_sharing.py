"""Parts of a computation in threads of their own, and attention over blocks of keys shared out to them."""

from __future__ import annotations

import threading

import pytest
import torch

from gohgraph.attention import blocked, sharing
from gohgraph.attention.blocked import blocked_attention

B, T, H, D = 2, 13, 3, 5


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    for name, number in {"ROWS": 8, "FEWEST_KEYS": 3, "NUMBERS": 1}.items():
        monkeypatch.setattr(blocked, name, number)


def results(threads, mask=None, shape=(B, T)):
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    heads = torch.randn(3, *shape, H, D, dtype=torch.float64).unbind()
    inputs = [x.requires_grad_() for x in (*heads, torch.randn(*shape, H, H, dtype=torch.float64))]
    z = blocked_attention(*inputs, mask, mask is None)
    return [z, *torch.autograd.grad(z.sin().sum(), inputs)]


@pytest.mark.parametrize("mask", [None, torch.arange(T) % 3 > 0])
@pytest.mark.parametrize("threads", [2, 3, 50])
def test_blocks_shared_out_equal_those_of_one_thread(threads, mask):
    mask = None if mask is None else mask.expand(B, 1, 1, T)
    for one, other in zip(results(1, mask), results(threads, mask), strict=True):
        torch.testing.assert_close(one, other, atol=1e-12, rtol=1e-12)


def test_runs_on_as_many_threads_are_bit_equal():
    assert all(map(torch.equal, results(3), results(3)))


@pytest.mark.parametrize("shape", [(0, T), (B, 0)])
def test_nothing_to_share_out(shape):
    assert [len(x) for x in results(2, shape=shape)] == 5 * [shape[0]]


def test_gradients_of_every_sample_on_two_threads():
    torch.set_num_threads(2)
    q, mix = torch.randn(4, T, H, D, dtype=torch.float64), torch.randn(4, T, H, H, dtype=torch.float64)

    def loss(q, mix):
        return blocked_attention(q[None], q[None], q[None], mix[None], None, True).sin().sum()

    mapped = torch.func.vmap(torch.func.grad(loss))(q, mix)
    for n in range(4):
        torch.testing.assert_close(mapped[n], torch.func.grad(loss)(q[n], mix[n]), atol=1e-12, rtol=1e-12)


def test_parts_run_at_once_without_gradients_and_leave_the_threads_as_they_were():
    torch.set_num_threads(4)
    together, seen = threading.Barrier(2, timeout=30), []

    def work(part):
        together.wait()
        seen.append((torch.get_num_threads(), torch.is_grad_enabled()))
        return 2 * part

    assert sharing.shared_out(work, [3, 5]) == [6, 10]
    assert seen == 2 * [(2, False)] and torch.get_num_threads() == 4
    # What a thread begins with that has never asked.
    late = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
    late.start()
    late.join()
    assert seen[-1] == 4


def test_what_a_part_raises_is_raised():
    def work(part):
        raise ValueError(f"part {part}")

    torch.set_num_threads(2)
    with pytest.raises(ValueError, match="part 0"):
        sharing.shared_out(work, [0, 1])
    assert torch.get_num_threads() == 2


def test_inference_mode_holds_in_every_part():
    torch.testing.assert_close(inferred(threads=2), inferred(threads=1), atol=1e-12, rtol=1e-12)


@torch.inference_mode()
def inferred(threads):
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    q, k, v = torch.randn(3, B, T, H, D, dtype=torch.float64)
    return blocked_attention(q, k, v, torch.randn(B, T, H, H, dtype=torch.float64), None, True)


def test_a_thread_that_cannot_start_leaves_none_waiting(monkeypatch):
    torch.set_num_threads(3)
    started, real = [], sharing.ThreadPoolExecutor.submit

    def submit(pool, *arguments):
        if started:
            raise RuntimeError("can't start new thread")
        started.append(real(pool, *arguments))
        return started[0]

    monkeypatch.setattr(sharing.ThreadPoolExecutor, "submit", submit)
    with pytest.raises(RuntimeError, match="start new thread"):
        sharing.shared_out(lambda part: part, [0, 1, 2])
    assert isinstance(started[0].exception(timeout=30), threading.BrokenBarrierError)
    assert torch.get_num_threads() == 3
