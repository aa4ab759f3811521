"""What ends a training in order, and what at once."""

import signal

import pytest

from gohgraph.learning.interrupts import interrupts

INT, TERM = signal.SIGINT, signal.SIGTERM


@pytest.mark.parametrize("sent", [[INT], [TERM], [TERM, TERM], [INT, TERM]])
def test_the_running_step_may_finish(sent):
    before = [signal.getsignal(number) for number in (INT, TERM)]
    with interrupts() as interrupted:
        for number in sent:
            signal.raise_signal(number)
        assert interrupted.is_set()
    assert [signal.getsignal(number) for number in (INT, TERM)] == before


@pytest.mark.parametrize("first", [INT, TERM])
def test_ctrl_c_after_that_ends_it_at_once(first):
    with pytest.raises(KeyboardInterrupt), interrupts():
        signal.raise_signal(first)
        signal.raise_signal(INT)
