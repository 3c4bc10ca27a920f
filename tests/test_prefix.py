"""What two prompts have in common, and KV caches that are cut, shared and stacked."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers.cache_utils import DynamicCache, StaticCache

from nvlm.pictures import Picture
from nvlm.prefix import Prefix, Prompt, Slots, can_go_on, shared_length, stack

SLOTS = Slots(token_id=0, per_tile=3)
PICTURES = [Picture(torch.full((n, 1, 2, 2), float(n)), is_encoded=False) for n in (1, 2, 3)]
TILE = [0, 0, 0]


@st.composite
def prompts(draw):
    """Texts of few tokens and pictures of one to three tiles, in any order."""
    ids, pictures = [], []
    for part in draw(st.lists(st.one_of(st.integers(1, 2), st.sampled_from(PICTURES)), max_size=5)):
        if isinstance(part, int):
            ids.append(part)
        else:
            pictures.append(part)
            ids += [9, *TILE] * len(part.tiles)
    return Prompt(ids, pictures)


def read_as(prompt):
    """A prompt as what the decoder sees: features are not ids."""
    tiles, seen = iter(prompt.tile_keys), []
    place, key = 0, None
    for token_id in prompt.ids:
        if token_id == 0:
            if place % 3 == 0:
                key = next(tiles)
            seen.append((key, place % 3))
            place += 1
        else:
            seen.append(token_id)
    return seen


@given(prompts(), prompts())
def test_what_is_shared_reads_the_same_and_cuts_no_tile(left, right):
    length = shared_length(left.ids, left.tile_keys, right.ids, right.tile_keys, slots=SLOTS)
    assert read_as(left)[:length] == read_as(right)[:length]
    assert left.ids[:length].count(0) % 3 == 0
    most = next(
        (i for i, (a, b) in enumerate(zip(read_as(left), read_as(right), strict=False)) if a != b),
        min(len(left.ids), len(right.ids)),
    )
    assert most - length < 3


def layers_of(cache):
    return [(layer.keys, layer.values) for layer in cache.layers]


def prefix_of(ids, tile_keys=()):
    cache = DynamicCache()
    for i in range(2):
        cache.update(*torch.randn(2, 1, 4, len(ids), 8).unbind(0), i)
    return Prefix(ids, list(tile_keys), cache)


def test_a_prompt_that_was_read_whole_still_has_a_token_to_go_on_from():
    assert prefix_of([1, 2, 3, 4]).reusable(Prompt([1, 2, 3], []), slots=SLOTS) == 2
    key = PICTURES[0].key
    assert prefix_of([1, *TILE], [(key, 0)]).reusable(Prompt([1, *TILE], [PICTURES[0]]), slots=SLOTS) == 1
    assert prefix_of([1, 2]).reusable(Prompt([3, 4], []), slots=SLOTS) == 0


def test_cutting_forgets_ids_tiles_and_states_together():
    prefix = prefix_of([5, *TILE, 6, *TILE, 7], [("a", 0), ("b", 0)])
    before = layers_of(prefix.cache)
    prefix.cut(5, slots=SLOTS)
    assert (prefix.ids, prefix.tile_keys) == ([5, *TILE, 6], [("a", 0)])
    assert prefix.cache.get_seq_length() == 5
    for (keys, values), (old_keys, old_values) in zip(layers_of(prefix.cache), before, strict=True):
        assert torch.equal(keys, old_keys[:, :, :5])
        assert torch.equal(values, old_values[:, :, :5])


def test_a_fork_shares_tensors_and_goes_its_own_way():
    prefix = prefix_of([1, 2, 3])
    fork = prefix.fork()
    assert [keys.data_ptr() for keys, _ in layers_of(fork.cache)] == [k.data_ptr() for k, _ in layers_of(prefix.cache)]
    fork.cut(1, slots=SLOTS)
    fork.cache.update(torch.ones(1, 4, 2, 8), torch.ones(1, 4, 2, 8), 0)
    assert prefix.cache.get_seq_length() == 3
    assert len(prefix.ids) == 3
    assert prefix.nbytes == 2 * 2 * 4 * 3 * 8 * 4


def test_stacked_prefixes_stand_at_the_right():
    short, long = prefix_of([1, 2]), prefix_of([1, 2, 3])
    cache = stack([short, long])
    for i, (keys, values) in enumerate(layers_of(cache)):
        assert keys.shape == values.shape == (2, 4, 3, 8)
        assert torch.equal(keys[0, :, 1:], short.cache.layers[i].keys[0])
        assert torch.equal(values[1:], long.cache.layers[i].values)
        assert not keys[0, :, 0].any()


@pytest.mark.parametrize(("cache", "expected"), [(DynamicCache(), True), (None, False)])
def test_which_caches_a_later_call_can_go_on_from(cache, expected):
    assert can_go_on(cache) is expected


def test_a_cache_of_fixed_length_is_not_gone_on_from(base_model):
    assert not can_go_on(StaticCache(config=base_model.config.llm_config, max_cache_len=8))
