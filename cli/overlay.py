"""`nvlm overlay`: this package's code beside downloaded weights, and back again.

A folder with the overlay loads by `trust_remote_code=True` like the published repository, with this package's code.
Weights and tokenizer are never touched. What is replaced is kept in `.nvlm-overlay/`, and the manifest that tells how
to undo everything is there before the first file changes, so a crash at any point can be undone.
"""

import argparse
import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..checkpoint import read_json

PACKAGE = Path(__file__).resolve().parent.parent
BACKUP_FOLDER = ".nvlm-overlay"


def add_parser(subparsers: Any) -> None:
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "overlay",
        help="put this package's code beside downloaded weights",
        description="Put this package's code beside downloaded weights, for trust_remote_code=True; undo restores all.",
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT_DIR", help="folder with the weights and their config.json")
    parser.add_argument("--undo", action="store_true", help="restore every file byte for byte")
    parser.add_argument("--dry-run", action="store_true", help="only say what would be done")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Carry out `nvlm overlay`."""
    folder = Path(args.checkpoint)
    actions = undo(folder, dry_run=args.dry_run) if args.undo else overlay(folder, dry_run=args.dry_run)
    for action in actions:
        print(("would " if args.dry_run else "") + action)
    if not actions:
        print("nothing to do")
    return 0


@dataclass(frozen=True)
class Change:
    """One file of the overlay.

    Args:
        name: the file's name in the checkpoint's folder.
        original: fingerprint of the file before, "" if there was none; else its copy is in the backup folder.
        installed: fingerprints of what overlays put there. All are kept: a crash can leave any of them.
    """

    name: str
    original: str
    installed: list[str]


def hub_files() -> list[Path]:
    """The modules that a Hub repository of this package holds: all at the top level but the package's own __init__."""
    return [path for path in sorted(PACKAGE.glob("*.py")) if path.name != "__init__.py"]


def overlay(folder: Path, *, dry_run: bool = False) -> list[str]:
    """Put the Hub files into a checkpoint's folder and see to its config.json's `auto_map`; done twice, it is as once.

    Returns:
        What was done (or would be), one line a file.

    Raises:
        ValueError: the folder holds no NVLM-D checkpoint, or a file that was edited since the last overlay.
        OSError: a file cannot be read or written.
    """
    config = _read_config(folder / "config.json")
    wanted = {path.name: path.read_bytes() for path in hub_files()} | _processor_files(config)
    patched = _patched_config(config)
    if patched is not None:
        wanted["config.json"] = patched
    changes = {change.name: change for change in _read_manifest(folder)}
    obsolete = [change for name, change in changes.items() if name not in wanted and name != "config.json"]
    pending = {name: data for name, data in wanted.items() if _fingerprint(folder / name) != _digest(data)}
    _refuse_edited(folder, [change for name, change in changes.items() if name in pending or change in obsolete])
    actions = [f"{'replace' if os.path.lexists(folder / name) else 'add'} {name}" for name in pending]
    actions += [_undo_action(change) for change in obsolete]
    if dry_run or not actions:
        return actions

    (folder / BACKUP_FOLDER).mkdir(exist_ok=True)
    for name, data in pending.items():
        change = changes.setdefault(name, Change(name, original=_fingerprint(folder / name), installed=[]))
        if change.original and not change.installed:
            _copy(folder / name, folder / BACKUP_FOLDER / name, folder=folder)
        if _digest(data) not in change.installed:
            change.installed.append(_digest(data))
    _write_manifest(folder, list(changes.values()))
    for name, data in pending.items():
        _write(folder / name, data, folder=folder)
    for change in obsolete:
        _restore(folder, change)
        del changes[change.name]
    _write_manifest(folder, list(changes.values()))
    return actions


def undo(folder: Path, *, dry_run: bool = False) -> list[str]:
    """Take the overlay off: every file as it was, byte for byte, and the backup folder gone.

    Returns:
        What was done (or would be), one line a file.

    Raises:
        ValueError: there is no overlay in the folder, or a file of it was edited since.
        OSError: a file cannot be read or written.
    """
    changes = _read_manifest(folder)
    if not changes:
        raise ValueError(f"{folder} has no overlay to undo: there is no {BACKUP_FOLDER}/manifest.json.")
    _refuse_edited(folder, changes)
    if not dry_run:
        for change in changes:
            _restore(folder, change)
        # The manifest goes first: without it there is no overlay, so a crash here leaves nothing to undo.
        (folder / BACKUP_FOLDER / "manifest.json").unlink()
        shutil.rmtree(folder / BACKUP_FOLDER)
    return [_undo_action(change) for change in changes]


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path.parent} has no config.json: give the folder of a downloaded NVLM-D checkpoint.")
    config, published = read_json(path), read_json(PACKAGE / "config.json")
    if config.get("model_type") != published["model_type"]:
        raise ValueError(
            f"{path} is of model_type {config.get('model_type')!r}, expected {published['model_type']!r}: the overlay "
            "is for NVLM-D checkpoints only."
        )
    return config


def _patched_config(config: dict[str, Any]) -> bytes | None:
    """config.json with the `auto_map` of this package's own; None if it has that already."""
    own = read_json(PACKAGE / "config.json")["auto_map"]
    auto_map = config.get("auto_map")
    auto_map = auto_map if isinstance(auto_map, dict) else {}
    if auto_map | own == auto_map:
        return None
    return _json_bytes(config | {"auto_map": auto_map | own})


def _processor_files(config: dict[str, Any]) -> dict[str, bytes]:
    """The chat template and the processors' settings, these with the sizes of this checkpoint."""
    from ..configuration_nvlm_d import NVLM_D_Config

    model = NVLM_D_Config(**config)
    side = {"height": model.tile_size, "width": model.tile_size}
    processor = read_json(PACKAGE / "processor_config.json") | {
        "image_seq_length": model.num_image_token,
        "tile_tag": model.tile_tag,
        "thumbnail_tag": model.thumbnail_tag,
    }
    preprocessor = read_json(PACKAGE / "preprocessor_config.json") | {
        "size": side,
        "crop_to_patches": model.dynamic_image_size,
        "min_patches": model.min_dynamic_patch,
        "max_patches": model.max_dynamic_patch,
        "use_thumbnail": model.use_thumbnail,
    }
    return {
        "chat_template.jinja": (PACKAGE / "chat_template.jinja").read_bytes(),
        "processor_config.json": _json_bytes(processor),
        "preprocessor_config.json": _json_bytes(preprocessor),
    }


def _json_bytes(value: dict[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()


def _undo_action(change: Change) -> str:
    return f"{'restore' if change.original else 'remove'} {change.name}"


def _digest(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


def _fingerprint(path: Path) -> str:
    """What a file is, "" if there is none. A link counts as itself: the Hub's cache links to its blobs."""
    if path.is_symlink():
        return f"link:{os.readlink(path)}"
    if not os.path.lexists(path):
        return ""
    if not path.is_file():
        raise ValueError(f"{path} is in the way: expected a file or nothing there.")
    return _digest(path.read_bytes())


def _refuse_edited(folder: Path, changes: list[Change]) -> None:
    """Raise a ValueError if a file that is to change holds somebody's own work: it would be lost."""
    edited = [c.name for c in changes if _fingerprint(folder / c.name) not in ("", c.original, *c.installed)]
    if edited:
        raise ValueError(
            f"Edited since the overlay: {', '.join(edited)}. Move these files out of {folder} to keep your edits, or "
            "delete them, and run this again."
        )


def _read_manifest(folder: Path) -> list[Change]:
    path = folder / BACKUP_FOLDER / "manifest.json"
    if not path.is_file():
        return []
    try:
        changes = [Change(**entry) for entry in read_json(path)["changes"]]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is broken ({error}): restore the originals beside it by hand.") from error
    for change in changes:
        # A manifest must not lead out of its folder.
        if not isinstance(change.name, str) or change.name != os.path.basename(change.name) or not change.name:
            raise ValueError(f"{path} names {change.name!r}, expected a file name.")
    return changes


def _write_manifest(folder: Path, changes: list[Change]) -> None:
    manifest = json.dumps({"changes": [asdict(change) for change in changes]}, indent=2)
    _write(folder / BACKUP_FOLDER / "manifest.json", manifest.encode(), folder=folder)


def _scratch(folder: Path) -> Path:
    """Where a file is made before it is renamed: on the same disk, and gone with the backup folder."""
    scratch = folder / BACKUP_FOLDER / "new"
    scratch.unlink(missing_ok=True)
    return scratch


def _write(path: Path, data: bytes, *, folder: Path) -> None:
    """Replace a file at one stroke: readers see the old one or the new one."""
    scratch = _scratch(folder)
    with scratch.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(scratch, path)


def _copy(source: Path, target: Path, *, folder: Path) -> None:
    """Copy a file with its times and mode, or a link as a link, at one stroke."""
    scratch = _scratch(folder)
    shutil.copy2(source, scratch, follow_symlinks=False)
    os.replace(scratch, target)


def _restore(folder: Path, change: Change) -> None:
    path, backup = folder / change.name, folder / BACKUP_FOLDER / change.name
    if _fingerprint(path) == change.original:
        return
    if not change.original:
        path.unlink()
        return
    if _fingerprint(backup) != change.original:
        raise ValueError(f"{backup} is missing or was edited, so {change.name} cannot be restored: download it again.")
    _copy(backup, path, folder=folder)
