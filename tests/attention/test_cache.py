from __future__ import annotations

import pytest
import torch

from gohgraph.attention.cache import KeyValueCache, padded, reorder_all


def random_pair(tokens, batch=2):
    return torch.randn(batch, tokens, 3, 5), torch.randn(batch, tokens, 3, 5)


@pytest.mark.parametrize("fixed", [False, True])
def test_cache_returns_all_tokens_in_order(fixed):
    cache, parts = KeyValueCache(fixed), []
    for tokens in (7, 1, 1, 61, 1, 131, 1):
        parts.append(random_pair(tokens))
        keys, values = cache.update(*parts[-1])
        assert torch.equal(keys, torch.cat([k for k, _ in parts], dim=1))
        assert torch.equal(values, torch.cat([v for _, v in parts], dim=1))
        assert len(cache) == keys.shape[1]
    assert all(map(torch.equal, cache.read(), (keys, values)))


def test_cache_keeps_further_tensors_of_each_token():
    cache, parts = KeyValueCache(), []
    for tokens in (7, 61, 131):
        parts.append((*random_pair(tokens), torch.randn(2, tokens, 1, 11)))
        kept = cache.update(*parts[-1])
        expected = [torch.cat(given, dim=1) for given in zip(*parts, strict=True)]
        assert all(map(torch.equal, kept, expected))
    cache.reorder(torch.tensor([1, 0]))
    assert all(map(torch.equal, cache.read(), [tensor.flip(0) for tensor in expected]))


def test_cache_does_not_change_what_it_was_given():
    cache, (keys, values) = KeyValueCache(), random_pair(3)
    before = keys.clone()
    cache.update(keys, values)
    cache.update(*random_pair(1))
    assert torch.equal(keys, before)


def test_cache_copies_the_past_only_when_it_doubles():
    cache = KeyValueCache()
    places = {cache.update(*random_pair(1))[0].data_ptr() for _ in range(600)}
    assert len(places) <= 5


def test_truncate_forgets_the_tokens_after_and_copies_nothing():
    cache = KeyValueCache()
    keys, values = random_pair(7)
    places = [heads.data_ptr() for heads in cache.update(keys, values)]
    for _ in range(3):
        cache.truncate(5)
        assert len(cache) == 5
        assert torch.equal(cache.read()[0], keys[:, :5]) and torch.equal(cache.read()[1], values[:, :5])
        more = random_pair(11)
        new_keys, new_values = cache.update(*more)
        assert torch.equal(new_keys, torch.cat((keys[:, :5], more[0]), dim=1))
        assert torch.equal(new_values, torch.cat((values[:, :5], more[1]), dim=1))
        assert [heads.data_ptr() for heads in cache.read()] == places
    cache.truncate(16)
    assert len(cache) == 16


def test_truncating_a_fixed_cache_to_nothing_empties_it():
    cache = KeyValueCache(fixed=True)
    cache.update(*random_pair(3))
    cache.truncate(0)
    assert not cache.is_filled


@pytest.mark.parametrize("length", [-1, 4])
def test_truncate_keeps_at_most_what_there_is(length):
    cache = KeyValueCache()
    cache.update(*random_pair(3))
    with pytest.raises(ValueError, match=rf"Expected a length in 0..3 \(got {length}\)"):
        cache.truncate(length)
    assert len(cache) == 3


def test_reorder_replaces_rows_and_appends_after():
    cache = KeyValueCache()
    keys, values = random_pair(3, batch=2)
    cache.update(keys, values)
    rows = torch.tensor([1, 1, 0])
    cache.reorder(rows)
    more = random_pair(1, batch=3)
    new_keys, new_values = cache.update(*more)
    assert torch.equal(new_keys, torch.cat((keys[rows], more[0]), dim=1))
    assert torch.equal(new_values, torch.cat((values[rows], more[1]), dim=1))


def test_reorder_all_reaches_every_cache_and_skips_empty_ones():
    filled, fixed, empty = KeyValueCache(), KeyValueCache(fixed=True), KeyValueCache()
    expected = []
    for cache in (filled, fixed):
        keys, _ = cache.update(*random_pair(2))
        expected.append(keys.flip(0))
    reorder_all([(filled, fixed), (empty,)], torch.tensor([1, 0]))
    assert torch.equal(filled.read()[0], expected[0])
    assert torch.equal(fixed.read()[0], expected[1])
    assert len(empty) == 0


def test_only_a_fixed_cache_is_ever_filled():
    growing, fixed = KeyValueCache(), KeyValueCache(fixed=True)
    assert not fixed.is_filled
    for cache in (growing, fixed):
        cache.update(*random_pair(3))
    assert fixed.is_filled and not growing.is_filled


def test_padded_continues_a_mask_with_true():
    mask = torch.tensor([[False, True, True], [True, True, False]])
    longer = padded(mask, 5)
    assert longer.dtype == torch.bool
    assert torch.equal(longer[:, :3], mask) and longer[:, 3:].all() and longer.shape == (2, 5)
