"""The text before each tile: the paper's Table 1."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nvlm.tile_tags import TAG_KINDS, tile_tags

THUMBNAIL = "<tile_global_thumbnail>"
GRIDS = st.tuples(st.integers(1, 6), st.integers(1, 6))


def test_the_released_tags_number_the_tiles_and_end_with_the_thumbnail():
    assert tile_tags(3) == ["<tile_1>", "<tile_2>", THUMBNAIL]
    assert tile_tags(7) == [*(f"<tile_{i}>" for i in range(1, 7)), THUMBNAIL]


@pytest.mark.parametrize("kind", ["1d", "2d_grid", "2d_box"])
def test_a_picture_of_one_tile_has_only_the_thumbnails_tag(kind):
    assert tile_tags(1, kind=kind) == [THUMBNAIL]
    assert tile_tags(1, kind=kind, grid=(1, 1)) == [THUMBNAIL]


def test_the_34b_writes_a_shorter_thumbnail_tag():
    assert tile_tags(2, thumbnail_tag="<tile_global>") == ["<tile_1>", "<tile_global>"]


def test_no_tags_at_all():
    assert tile_tags(3, kind="none") == ["", "", ""]
    assert tile_tags(1, kind="none") == [""]


def test_grid_tags_go_row_by_row():
    assert tile_tags(7, kind="2d_grid", grid=(3, 2)) == [
        "<tile_x0_y0>",
        "<tile_x1_y0>",
        "<tile_x2_y0>",
        "<tile_x0_y1>",
        "<tile_x1_y1>",
        "<tile_x2_y1>",
        THUMBNAIL,
    ]


def test_box_tags_are_the_tiles_corners_in_the_resized_picture():
    assert tile_tags(3, kind="2d_box", grid=(1, 2)) == [
        "<box> (0, 0), (448, 448) </box>",
        "<box> (0, 448), (448, 896) </box>",
        THUMBNAIL,
    ]
    assert tile_tags(3, kind="2d_box", grid=(2, 1), tile_size=56)[1] == "<box> (56, 0), (112, 56) </box>"


def test_without_thumbnails_every_tile_is_a_regular_one():
    assert tile_tags(2, has_thumbnail=False) == ["<tile_1>", "<tile_2>"]
    assert tile_tags(2, kind="2d_grid", grid=(2, 1), has_thumbnail=False) == ["<tile_x0_y0>", "<tile_x1_y0>"]


@given(kind=st.sampled_from([kind for kind in TAG_KINDS if kind != "none"]), grid=GRIDS, has_thumbnail=st.booleans())
@settings(max_examples=60, deadline=None, derandomize=True)
def test_every_tile_has_a_tag_of_its_own(kind, grid, has_thumbnail):
    num_tiles = grid[0] * grid[1] + (has_thumbnail and grid != (1, 1))
    tags = tile_tags(num_tiles, kind=kind, grid=grid, has_thumbnail=has_thumbnail)
    assert len(tags) == num_tiles
    assert len(set(tags)) == num_tiles
    assert (THUMBNAIL in tags) == (has_thumbnail or num_tiles == 1)


@pytest.mark.parametrize("num_tiles", [0, -1])
def test_a_picture_without_tiles_is_an_error(num_tiles):
    with pytest.raises(ValueError, match=f"num_tiles is {num_tiles}"):
        tile_tags(num_tiles)


def test_an_unknown_kind_is_an_error_that_lists_the_kinds():
    with pytest.raises(ValueError, match=r"'3d'.*'none', '1d', '2d_grid', '2d_box'"):
        tile_tags(3, kind="3d")


@pytest.mark.parametrize("kind", ["2d_grid", "2d_box"])
@pytest.mark.parametrize(
    "grid", [None, (3, 1), (1, 1), (0, 2), (-1, -2), (1.0, 2.0), (2,), (1, 2, 1), 2, "12", ("1", "2")], ids=repr
)
def test_a_grid_that_does_not_hold_the_tiles_is_an_error_that_says_what_to_pass(kind, grid):
    with pytest.raises(ValueError, match=r"2 tiles.*`tile_grids`"):
        tile_tags(3, kind=kind, grid=grid)
