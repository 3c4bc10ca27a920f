"""Pixel shuffle and the projector."""

import pytest
import torch

from nvlm.projector import build_projector, pixel_shuffle


def test_v2_folds_each_block_in_place():
    x = torch.arange(16.0).reshape(1, 4, 4, 1)
    expected = [[[0, 1, 4, 5], [2, 3, 6, 7]], [[8, 9, 12, 13], [10, 11, 14, 15]]]
    assert pixel_shuffle(x)[0].tolist() == expected


def test_v1_leaves_the_axes_transposed():
    x = torch.randn(2, 4, 6, 3)
    assert torch.equal(pixel_shuffle(x, version="v1"), pixel_shuffle(x, version="v2").transpose(1, 2))


def test_released_shape():
    assert pixel_shuffle(torch.zeros(1, 32, 32, 3200)).shape == (1, 16, 16, 12800)
    assert pixel_shuffle(torch.zeros(1, 32, 32, 2), 0.25).shape == (1, 8, 8, 32)


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="'v3'"):
        pixel_shuffle(torch.zeros(1, 4, 4, 1), version="v3")
    with pytest.raises(ValueError, match=r"2 x 2 patches.*\[3, 4\]"):
        pixel_shuffle(torch.zeros(1, 3, 4, 1))


@pytest.mark.parametrize("bias", [False, True])
def test_projector_has_the_checkpoints_names(bias):
    projector = build_projector(in_features=8, inner_features=6, out_features=4, bias=bias)
    names = {"0.weight", "0.bias", "1.weight", "3.weight"} | ({"1.bias", "3.bias"} if bias else set())
    assert set(projector.state_dict()) == names
    assert projector(torch.zeros(2, 8)).shape == (2, 4)
