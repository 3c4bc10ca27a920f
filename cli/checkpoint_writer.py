"""A checkpoint's folder, written so that it can be stopped at any time and gone on with (SPEC 2).

Every file appears whole or not at all, config.json last: until then nothing takes the folder for a checkpoint. What was
asked for is kept in `.nvlm-repack/manifest.json`, so that two different requests never mix in one folder.
"""

import json
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ..checkpoint import read_json
from .checkpoint_source import INDEX
from .shards import Piece, is_written, total_bytes, write_shard

WORK_FOLDER = ".nvlm-repack"


@dataclass(frozen=True)
class Plan:
    """A checkpoint to write.

    Args:
        asked: what was asked for and of which sources, as JSON-ready values: the identity of the plan.
        shards: {file name: its tensors}.
        config: its config.json.
        copies: {path in the folder: file to copy there}.
    """

    asked: dict[str, Any]
    shards: dict[str, list[Piece]]
    config: dict[str, Any]
    copies: dict[str, Path]

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensors, the index's `total_size`."""
        return sum(total_bytes(pieces) for pieces in self.shards.values())


def check_apart(folder: Path, sources: Iterable[Path]) -> None:
    """Refuse a folder to write that is one of the sources or lies in it.

    Raises:
        ValueError: it does.
    """
    target = folder.resolve()
    for source in sources:
        if target == source.resolve():
            raise ValueError(f"{folder} is both source and target: name another folder to write to.")
        if target.is_relative_to(source.resolve()):
            raise ValueError(f"{folder} lies in the source {source}: name a folder outside of it to write to.")


def write_checkpoint(folder: Path, plan: Plan) -> bool:
    """Write a checkpoint, or what is left to write of it after a run of the same plan that was stopped.

    Returns:
        Whether there was anything to do.

    Raises:
        ValueError: the folder holds something else, or what another plan began.
        OSError: there is too little space, or a file cannot be read or written.
    """
    finished = _read_manifest(folder, plan.asked)
    left = {name: pieces for name, pieces in plan.shards.items() if not is_written(folder / name, pieces)}
    if finished and not left:
        return False
    scratch = folder / WORK_FOLDER / "new"
    scratch.unlink(missing_ok=True)
    _check_space(
        folder, sum(map(total_bytes, left.values())) + sum(path.stat().st_size for path in plan.copies.values())
    )
    scratch.parent.mkdir(parents=True, exist_ok=True)
    _write(folder / WORK_FOLDER / "manifest.json", {"asked": plan.asked, "finished": False}, scratch=scratch)
    done = plan.num_bytes - sum(map(total_bytes, left.values()))
    # None: no bar where stderr is no terminal.
    with tqdm(total=plan.num_bytes, initial=done, unit="B", unit_scale=True, disable=None) as bar:
        for name, pieces in left.items():
            bar.set_postfix_str(name)
            write_shard(folder / name, pieces, scratch=scratch, progress=bar.update)
    for name, path in plan.copies.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        _copy(path, folder / name, scratch=scratch)
    weight_map = {piece.name: name for name, pieces in plan.shards.items() for piece in pieces}
    index = {"metadata": {"total_size": plan.num_bytes}, "weight_map": weight_map}
    _write(folder / INDEX, index, scratch=scratch)
    _write(folder / "config.json", plan.config, scratch=scratch)
    _write(folder / WORK_FOLDER / "manifest.json", {"asked": plan.asked, "finished": True}, scratch=scratch)
    return True


def _read_manifest(folder: Path, asked: dict[str, Any]) -> bool:
    """Whether a run of the same plan has finished in this folder; anything else but an empty folder is refused."""
    if not os.path.lexists(folder):
        return False
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder: expected an empty one, or none, to write to.")
    path = folder / WORK_FOLDER / "manifest.json"
    if not path.is_file():
        others = sorted(name for name in os.listdir(folder) if name != WORK_FOLDER)
        if others:
            raise ValueError(f"{folder} is not empty (it holds {others[0]!r}): name a new folder to write to.")
        return False
    manifest = read_json(path)
    before = manifest.get("asked")
    if not isinstance(before, dict):
        raise ValueError(f"{path} is broken: delete {folder} and run this again.")
    other = [name for name in sorted(before.keys() | asked.keys()) if before.get(name) != asked.get(name)]
    if "sources" in other and len(other) == 1:
        raise ValueError(f"{folder} was begun from other files than the source's now: delete {folder} to begin anew.")
    if other:
        shown = ", ".join(
            f"{name} {before.get(name)!r}, now {asked.get(name)!r}" for name in other if name != "sources"
        )
        raise ValueError(f"{folder} was begun with {shown}: ask for the same again, or delete {folder} to begin anew.")
    return manifest.get("finished") is True


def _check_space(folder: Path, needed: int) -> None:
    place = folder.resolve()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if needed > free:
        raise OSError(f"{folder} needs {needed / 1e9:.1f} GB, but {place} has {free / 1e9:.1f} GB free: make room.")


def _copy(source: Path, path: Path, *, scratch: Path) -> None:
    """Copy a file's content at one stroke; a link's target is copied, not the link."""
    with source.open("rb") as original, scratch.open("wb") as file:
        shutil.copyfileobj(original, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(scratch, path)


def _write(path: Path, value: dict[str, Any], *, scratch: Path) -> None:
    """Write JSON at one stroke: readers see the old file or the new one."""
    with scratch.open("w", encoding="utf-8") as file:
        file.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(scratch, path)
