"""Features are made once for equal pictures, within the budget, and never for others."""

import copy
import threading

import pytest
import torch

from nvlm.feature_cache import FeatureCache
from nvlm.pictures import Picture, split_pictures


class Encoder:
    """Means of tiles, and a count of the tiles that it saw."""

    def __init__(self):
        self.seen = 0

    def __call__(self, tiles):
        self.seen += len(tiles)
        return tiles.mean((1, 2, 3))[:, None, None].expand(-1, 2, 4).contiguous()


def picture(value, tiles=1, **options):
    return Picture(torch.full((tiles, 1, 2, 2), float(value), **options), is_encoded=False)


TILE_BYTES = 2 * 4 * 4


def test_equal_pictures_are_encoded_once_wherever_they_come_from():
    cache, encode = FeatureCache(), Encoder()
    first = cache.features([picture(1, 2), picture(2), picture(1, 2)], encode=encode)
    assert encode.seen == 3
    assert [features[0, 0, 0].item() for features in first] == [1, 2, 1]
    again = cache.features([picture(2), picture(1, 2)], encode=encode)
    assert encode.seen == 3
    assert torch.equal(again[1], first[0])
    assert (len(cache), cache.nbytes) == (2, 3 * TILE_BYTES)


@pytest.mark.parametrize("other", [picture(1.5), picture(1, 2), picture(1, dtype=torch.float64)])
def test_other_values_shapes_and_dtypes_are_other_pictures(other):
    assert other.key != picture(1).key
    assert Picture(picture(1).tiles, is_encoded=True).key != picture(1).key


def test_keys_see_what_views_hold_and_not_where():
    tiles = torch.arange(24.0).reshape(6, 1, 2, 2)
    parts = split_pictures(tiles, [2, 4], is_encoded=False)
    assert [part.key for part in parts] == [Picture(part.tiles.clone(), is_encoded=False).key for part in parts]
    assert Picture(tiles.mT, is_encoded=False).key == Picture(tiles.mT.contiguous(), is_encoded=False).key
    assert picture(1, dtype=torch.bfloat16).key == picture(1, dtype=torch.bfloat16).key


def test_those_unused_for_the_longest_time_go_first():
    cache, encode = FeatureCache(max_bytes=2 * TILE_BYTES), Encoder()
    for value in (1, 2, 1, 3):
        cache.features([picture(value)], encode=encode)
    assert (encode.seen, cache.nbytes) == (3, 2 * TILE_BYTES)
    cache.features([picture(1), picture(3)], encode=encode)
    assert encode.seen == 3
    cache.features([picture(2)], encode=encode)
    assert encode.seen == 4


def test_a_picture_larger_than_the_budget_is_answered_and_not_kept():
    cache, encode = FeatureCache(max_bytes=TILE_BYTES), Encoder()
    for _ in range(2):
        [features] = cache.features([picture(4, 2)], encode=encode)
        assert features.shape == (2, 2, 4)
    assert (encode.seen, len(cache), cache.nbytes) == (4, 0, 0)


def test_what_is_kept_holds_no_memory_of_its_neighbours():
    cache = FeatureCache(max_bytes=TILE_BYTES)
    cache.features([picture(1), picture(2, 5)], encode=Encoder())
    [kept] = cache._features.values()
    assert kept.untyped_storage().nbytes() == TILE_BYTES == cache.nbytes


def test_features_stand_for_themselves():
    cache = FeatureCache()
    given = Picture(torch.randn(2, 2, 4), is_encoded=True)
    [features] = cache.features([given], encode=Encoder())
    assert features is given.tiles
    assert len(cache) == 0


def test_other_weights_make_other_features():
    cache, encode = FeatureCache(), Encoder()
    for version in (0, 1, 1):
        cache.features([picture(1)], encode=encode, version=version)
    assert encode.seen == 2


def test_the_version_of_a_models_encoder_changes_with_its_weights(load_model):
    model = load_model("base")
    before = model.encoder_version
    assert model.encoder_version == before
    with torch.no_grad():
        next(model.vision_model.parameters()).mul_(1.0)
    assert model.encoder_version != before


def test_clear_and_copies_are_empty():
    cache = FeatureCache(max_bytes=1000)
    cache.features([picture(1)], encode=Encoder())
    copied = copy.deepcopy(cache)
    assert (len(copied), copied.max_bytes) == (0, 1000)
    cache.clear()
    assert (len(cache), cache.nbytes) == (0, 0)
    with pytest.raises(ValueError, match="max_bytes is -1"):
        FeatureCache(max_bytes=-1)


def test_threads_keep_the_books_in_order():
    cache = FeatureCache(max_bytes=3 * TILE_BYTES)

    def work(seed):
        for i in range(200):
            value = (seed * 7 + i) % 5
            [features] = cache.features([picture(value)], encode=Encoder())
            assert features[0, 0, 0] == value

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert cache.nbytes == sum(features.nbytes for features in cache._features.values()) <= 3 * TILE_BYTES
