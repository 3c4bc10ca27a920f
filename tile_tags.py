"""The text that stands before each tile, so that the decoder knows which part of a picture it reads (SPEC 6)."""

TAG_KINDS = ("none", "1d", "2d_grid", "2d_box")


def tile_tags(
    num_tiles: int,
    *,
    kind: str = "1d",
    thumbnail_tag: str = "<tile_global_thumbnail>",
    has_thumbnail: bool = True,
    grid: tuple[int, int] | None = None,
    tile_size: int = 448,
) -> list[str]:
    """One tag a tile, in the tiles' order: row by row, the thumbnail last.

    Args:
        num_tiles: tiles of the picture, the thumbnail counted; a picture of one tile has only the thumbnail's tag.
        kind: one of `TAG_KINDS` (the paper's Table 1).
        thumbnail_tag: `<tile_global_thumbnail>` in the released 72B, `<tile_global>` in the paper and the 34B.
        has_thumbnail: whether the last of several tiles is the thumbnail.
        grid: (columns, rows) of the tiles; the two 2-D kinds need it.
        tile_size: side of a tile in pixels; the boxes are in pixels of the resized picture.

    Raises:
        ValueError: no tiles, an unknown kind, or a 2-D kind without a grid that holds the tiles.
    """
    if num_tiles < 1:
        raise ValueError(f"A picture has at least one tile, but num_tiles is {num_tiles}.")
    if kind not in TAG_KINDS:
        raise ValueError(f"Unknown tile tag kind {kind!r}: expected one of {list(TAG_KINDS)}.")
    if kind == "none":
        return [""] * num_tiles
    if num_tiles == 1:
        return [thumbnail_tag]
    num_regular = num_tiles - 1 if has_thumbnail else num_tiles
    if kind == "1d":
        regular = [f"<tile_{i}>" for i in range(1, num_regular + 1)]
    else:
        regular = _tags_2d(num_regular, kind=kind, grid=grid, tile_size=tile_size)
    return [*regular, thumbnail_tag] if has_thumbnail else regular


def _tags_2d(num_regular: int, *, kind: str, grid: tuple[int, int] | None, tile_size: int) -> list[str]:
    is_pair = isinstance(grid, (tuple, list)) and len(grid) == 2 and all(isinstance(n, int) and n > 0 for n in grid)
    if grid is None or not is_pair or grid[0] * grid[1] != num_regular:
        raise ValueError(
            f"Tile tags of kind {kind!r} need the grid (columns, rows) of the {num_regular} tiles, got {grid!r}: "
            "pass `tile_grids` with one (columns, rows) a picture."
        )
    columns, rows = grid
    cells = [(x, y) for y in range(rows) for x in range(columns)]
    if kind == "2d_grid":
        return [f"<tile_x{x}_y{y}>" for x, y in cells]
    s = tile_size
    return [f"<box> ({x * s}, {y * s}), ({(x + 1) * s}, {(y + 1) * s}) </box>" for x, y in cells]
