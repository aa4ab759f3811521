from __future__ import annotations

import math

import pytest
import torch
from helpers import small_config
from torch import nn

from gohgraph.models.config import TransformerConfig
from gohgraph.models.embeddings import (
    LearnedPositions,
    QueryKeyNorm,
    RotaryPositions,
    SinusoidalPositions,
    TokenEmbedding,
    positions_of_heads,
    shared_rotation,
)
from gohgraph.models.models import LanguageModel


@pytest.mark.parametrize("d_model", [1, 7, 10])
def test_sinusoidal_positions_follow_the_equation(d_model):
    expected = [
        [(math.cos if m % 2 else math.sin)(t * 10000.0 ** (-(m - m % 2) / d_model)) for m in range(d_model)]
        for t in range(11)
    ]
    encoded = SinusoidalPositions(d_model)(torch.arange(11))
    torch.testing.assert_close(encoded, torch.tensor(expected), rtol=0, atol=2e-6)


def test_sinusoidal_positions_take_one_row_of_positions_per_sequence():
    positions = torch.tensor([[3, 1, 4], [1, 5, 9]])
    encode = SinusoidalPositions(7)
    assert torch.equal(encode(positions), torch.stack([encode(row) for row in positions]))


def rotated_slowly(x, positions, base):
    """Each pair of features (i, i + D/2) is a complex number, turned by t * theta_i."""
    half = x.shape[-1] // 2
    pairs = torch.complex(x[..., :half], x[..., half:])
    theta = torch.tensor([base ** (-i / half) for i in range(half)], dtype=torch.float64)
    turned = pairs * torch.polar(torch.ones(()).double(), positions[..., None] * theta).unsqueeze(-2)
    return torch.cat((turned.real, turned.imag), dim=-1)


@pytest.mark.parametrize("positions", [torch.arange(7), torch.randint(0, 50, (2, 7))], ids=["row", "batch"])
def test_rotary_positions_turn_pairs(positions):
    x = torch.randn(2, 7, 3, 10, dtype=torch.float64)
    expected = rotated_slowly(x, positions, 100.0)
    torch.testing.assert_close(RotaryPositions(10, base=100.0)(x, positions), expected, rtol=0, atol=1e-5)


def test_a_rotation_is_shared_by_what_it_was_made_for_alone():
    x, positions = torch.randn(2, 7, 3, 10), torch.randint(0, 50, (2, 7))
    one, other, normed = RotaryPositions(10), RotaryPositions(10, base=100.0), QueryKeyNorm(10, RotaryPositions(10))
    rotation = shared_rotation([one, other, normed], positions)
    assert one.rotation(rotation) is rotation
    for rotary in (one, other, normed):
        assert torch.equal(rotary(x, rotation), rotary(x, positions))


@pytest.mark.parametrize("rotaries", [[nn.Identity()], [RotaryPositions(4), None], [QueryKeyNorm(4)], []])
def test_positions_stay_where_nothing_can_be_shared(rotaries):
    positions = torch.arange(3)
    assert shared_rotation(rotaries, positions) is positions and shared_rotation(rotaries, None) is None


@torch.no_grad()
def test_a_stack_computes_angles_once_a_forward_pass():
    model = LanguageModel(small_config()).eval()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        model(torch.zeros(2, 7, dtype=torch.long))
    assert [event.count for event in profiler.key_averages() if event.key == "aten::cos"] == [1]


def test_rotary_scores_depend_on_distance_only():
    q, k = torch.randn(2, 1, 1, 3, 14).unbind()
    rotary = RotaryPositions(14)

    def score(t, s):
        turned_q, turned_k = rotary(q, torch.tensor([t])), rotary(k, torch.tensor([s]))
        return (turned_q * turned_k).sum(dim=-1)

    torch.testing.assert_close(score(9, 4), score(25, 20))
    assert not torch.allclose(score(9, 4), score(9, 5))


def test_rotary_positions_tell_far_positions_apart_in_bfloat16():
    x = torch.ones(1, 2, 3, 10, dtype=torch.bfloat16)
    turned = RotaryPositions(10)(x, torch.tensor([1000, 1001]))
    assert turned.dtype == torch.bfloat16
    assert not torch.equal(turned[:, 0], turned[:, 1])


def test_rotary_positions_refuse_an_odd_head_dim():
    with pytest.raises(ValueError, match="^Expected an even head_dim"):
        RotaryPositions(7)


def test_learned_positions_refuse_a_longer_sequence():
    positions = LearnedPositions(7, 5)
    assert torch.equal(positions(torch.arange(7)), positions.weight)
    with pytest.raises(ValueError, match="^Expected at most 7 tokens"):
        positions(torch.arange(8))


@pytest.mark.parametrize("kind", ["sinusoidal", "learned", "rotary", "none"])
def test_token_embedding_adds_positions(kind):
    embedding = TokenEmbedding(small_config(positions=kind))
    tokens, positions = torch.randint(0, 13, (2, 7)), torch.arange(7)
    expected = nn.functional.embedding(tokens, embedding.tokens.weight)
    if kind == "sinusoidal":
        expected = expected * math.sqrt(30) + SinusoidalPositions(30)(positions)
    if kind == "learned":
        expected = expected + embedding.positions.weight[:7]
    torch.testing.assert_close(embedding(tokens, positions), expected)
    assert (embedding.positions is None) == (kind in ("rotary", "none"))


def test_token_embedding_drops_out_in_training_only():
    embedding = TokenEmbedding(small_config(dropout=0.5))
    tokens = torch.randint(0, 13, (2, 7))
    assert (embedding(tokens, torch.arange(7)) == 0).float().mean() > 0.3
    assert (embedding.eval()(tokens, torch.arange(7)) != 0).all()


@pytest.mark.parametrize("rotates", [True, False])
@pytest.mark.parametrize("head_dim,length", [(6, 5), (6, 6)])
def test_normalised_queries_follow_the_equation(rotates, head_dim, length):
    rotary = RotaryPositions(head_dim) if rotates else None
    norm = QueryKeyNorm(head_dim, rotary).double()
    gain = nn.init.normal_(norm.norm.weight)
    x, positions = torch.randn(2, length, 3, head_dim, dtype=torch.float64), torch.arange(length)
    epsilon = torch.finfo(x.dtype).eps
    expected = gain * x / (x.square().mean(dim=-1, keepdim=True) + epsilon).sqrt()
    expected = rotary(expected, positions) if rotates else expected
    torch.testing.assert_close(norm(x, positions), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("start", [0.5, True, 3])
def test_qk_norm_is_the_rms_that_queries_and_keys_start_with(start):
    norm = positions_of_heads(TransformerConfig(7, d_model=10, num_heads=2, positions="none", qk_norm=start))
    rms = norm(torch.randn(2, 3, 2, 5)).square().mean(dim=-1).sqrt()  # [B, T, H]
    torch.testing.assert_close(rms, torch.full_like(rms, float(start)))
    assert positions_of_heads(TransformerConfig(7, d_model=10, num_heads=2, positions="none", qk_norm=0)) is None


def test_embedding_norm_is_the_layers_own_kind():
    config = TransformerConfig(7, d_model=10, num_heads=2, norm="rms", embedding_norm=True, positions="learned")
    embedding = TokenEmbedding(config).eval()
    x = embedding(torch.tensor([[1, 2, 3]]), torch.arange(3))
    torch.testing.assert_close(x.square().mean(dim=-1), torch.ones(1, 3), rtol=0.1, atol=0)
