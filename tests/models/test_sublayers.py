from __future__ import annotations

import pytest
import torch
from torch import nn

from gohgraph.models.sublayers import Residual


class Pair(nn.Module):
    """An object that returns something beside its output and takes further arguments."""

    def forward(self, x, shift, *, factor=1.0):
        return x * factor + shift, shift


def normalised(x, kind):
    centred = x - x.mean(dim=-1, keepdim=True) if kind == "layer" else x
    return centred / (centred.square().mean(dim=-1, keepdim=True) + 1e-5).sqrt()


@pytest.mark.parametrize("norm", ["layer", "rms", "unweighted-rms"])
@pytest.mark.parametrize("norm_first", [True, False])
def test_residual_follows_the_equation(norm, norm_first):
    residual = Residual(nn.Linear(7, 7), 7, norm_first=norm_first, norm=norm).double()
    is_weighted = norm != "unweighted-rms"
    gain = nn.init.normal_(residual.norm.weight) if is_weighted else 1.0
    assert is_weighted or not list(residual.norm.parameters())
    x, f = torch.randn(2, 5, 7, dtype=torch.float64), residual.object
    if norm_first:
        expected = x + f(normalised(x, norm) * gain)
    else:
        expected = normalised(x + f(x), norm) * gain
    torch.testing.assert_close(residual(x), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("norm_first", [True, False])
def test_residual_hands_on_arguments_and_what_the_object_returns(norm_first):
    x, shift = torch.randn(2, 5, 7), torch.randn(7)
    y, more = Residual(Pair(), 7, norm_first=norm_first)(x, shift, factor=0.0)
    assert more is shift
    expected = x + shift if norm_first else nn.functional.layer_norm(x + shift, (7,))
    torch.testing.assert_close(y, expected)


def test_residual_drops_the_update_and_never_the_input():
    residual = Residual(nn.Identity(), 7, dropout=0.999)
    x = torch.randn(2, 3, 7)
    assert (residual(x) == x).float().mean() > 0.9
    assert not torch.equal(residual.eval()(x), x)


def test_residual_refuses_an_unknown_norm():
    with pytest.raises(ValueError, match="^Expected norm of .*got 'batch'"):
        Residual(nn.Identity(), 7, norm="batch")
