"""Which prompts are answered together, and what their beginnings have in common."""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from .prefix import Prompt, Slots, shared_length

LEAST_SHARED = 64  # tokens; less is not worth a pass of its own


@dataclass(frozen=True)
class Group:
    """Prompts that begin alike.

    Args:
        rows: their indices.
        shared: tokens at the beginning that are the same in all of them, 0 where each is read by itself.
    """

    rows: list[int]
    shared: int


def group_prompts(prompts: Sequence[Prompt], *, slots: Slots) -> list[Group]:
    """Groups of prompts with the same first picture, or without pictures; those that share too little are one group.

    Every prompt keeps at least one token that is not shared: the first new token comes after it.
    """
    by_picture: dict[str | None, list[int]] = defaultdict(list)
    for row, prompt in enumerate(prompts):
        by_picture[prompt.pictures[0].key if prompt.pictures else None].append(row)
    groups, alone = [], []
    for rows in by_picture.values():
        shared = common_length([prompts[row] for row in rows], slots=slots) if len(rows) > 1 else 0
        if shared >= LEAST_SHARED:
            groups.append(Group(rows, shared))
        else:
            alone += rows
    return [Group(sorted(alone), 0), *groups] if alone else groups


def common_length(prompts: Sequence[Prompt], *, slots: Slots) -> int:
    """How many tokens at the beginning of all prompts are the same; never a part of a tile, never a whole prompt."""
    first = prompts[0]
    shared = len(first.ids)
    for prompt in prompts:
        ids = prompt.ids[: min(shared, len(prompt.ids) - 1)]
        shared = shared_length(first.ids, first.tile_keys, ids, prompt.tile_keys, slots=slots)
    return shared


def split_group(group: Group, lengths: Sequence[int], *, max_batch_tokens: int | None, new_tokens: int) -> list[Group]:
    """A group in batches, prompts of like length together.

    Args:
        lengths: tokens of each prompt, by its index.
        max_batch_tokens: most tokens of a batch, padding and answers included; a prompt that is longer by itself gets a
            batch of its own. None: no limit.
        new_tokens: the longest answer, in tokens.
    """
    if max_batch_tokens is None:
        return [group]
    batches: list[list[int]] = []
    for row in sorted(group.rows, key=lambda row: lengths[row]):
        fits = batches and (len(batches[-1]) + 1) * (lengths[row] + new_tokens) <= max_batch_tokens
        if fits:
            batches[-1].append(row)
        else:
            batches.append([row])
    return [Group(rows, group.shared) for rows in batches]
