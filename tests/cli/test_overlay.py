"""`nvlm overlay`: on, on again, off, after crashes and edits; nothing of the checkpoint may be lost."""

import contextlib
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from nvlm.cli import overlay as overlay_module
from nvlm.cli.main import main
from nvlm.cli.overlay import BACKUP_FOLDER, hub_files, overlay, undo


@pytest.fixture
def folder(tmp_path: Path, recipe: ModuleType) -> Path:
    """A downloaded checkpoint: weights, tokenizer, and the released code."""
    (tmp_path / "config.json").write_text(json.dumps(recipe.config_dict("base"), indent=3) + "\n\n")
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "tokenizer_config.json").write_text("{}")
    (tmp_path / "modeling_nvlm_d.py").write_bytes(b"# released\r\n\xff")
    (tmp_path / "modeling_nvlm_d.py").chmod(0o600)
    (tmp_path / "eval.py").write_text("# someone's own\n")
    return tmp_path


def snapshot(folder: Path) -> dict[str, Any]:
    """What every file is: link target, or mode, time and hash."""
    files: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            files[name] = os.readlink(path)
        elif path.is_file():
            stat = path.stat()
            files[name] = (stat.st_mode, stat.st_mtime_ns, hashlib.sha256(path.read_bytes()).hexdigest())
    return files


def without_auto_map(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoConfig": "other.Config", "AutoThing": "thing.Thing"}
    (folder / "config.json").write_text(json.dumps(config))


def test_hub_files_are_the_modules_that_remote_code_needs() -> None:
    names = [path.name for path in hub_files()]
    assert {"configuration_nvlm_d.py", "modeling_nvlm_d.py", "chat.py", "device_map.py", "checkpoint.py"} <= set(names)
    assert "__init__.py" not in names


def test_on_and_off_again(folder: Path) -> None:
    before = snapshot(folder)
    actions = overlay(folder)
    assert "replace modeling_nvlm_d.py" in actions
    assert "add checkpoint.py" in actions
    for path in hub_files():
        assert (folder / path.name).read_bytes() == path.read_bytes()
    untouched = ("model.safetensors", "tokenizer_config.json", "eval.py")
    assert all(snapshot(folder)[name] == before[name] for name in untouched)
    processor, pictures = (
        json.loads((folder / f"{name}_config.json").read_text()) for name in ("processor", "preprocessor")
    )
    assert processor["image_seq_length"] == 4
    assert pictures["size"] == {"height": 56, "width": 56}
    undone = undo(folder)
    assert {"restore modeling_nvlm_d.py", "remove checkpoint.py"} <= set(undone)
    assert snapshot(folder) == before


def test_twice_is_as_once(folder: Path) -> None:
    before = snapshot(folder)
    overlay(folder)
    after = snapshot(folder)
    assert overlay(folder) == []
    assert snapshot(folder) == after
    undo(folder)
    assert snapshot(folder) == before


def test_auto_map_is_merged_and_all_else_kept(folder: Path, recipe: ModuleType) -> None:
    without_auto_map(folder)
    before = snapshot(folder)
    assert "replace config.json" in overlay(folder)
    config = json.loads((folder / "config.json").read_text())
    own = json.loads((Path(__file__).parents[2] / "config.json").read_text())["auto_map"]
    assert config == recipe.config_dict("base") | {"auto_map": own | {"AutoThing": "thing.Thing"}}
    assert overlay(folder) == []
    undo(folder)
    assert snapshot(folder) == before


def test_dry_run_changes_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = snapshot(folder)
    assert main(["overlay", str(folder), "--dry-run"]) == 0
    assert "would replace modeling_nvlm_d.py" in capsys.readouterr().out
    assert snapshot(folder) == before
    overlay(folder)
    after = snapshot(folder)
    assert main(["overlay", str(folder), "--dry-run", "--undo"]) == 0
    assert "would restore modeling_nvlm_d.py" in capsys.readouterr().out
    assert snapshot(folder) == after


def test_command(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = snapshot(folder)
    assert main(["overlay", str(folder)]) == 0
    assert main(["overlay", str(folder)]) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert main(["overlay", str(folder), "--undo"]) == 0
    assert snapshot(folder) == before
    assert main(["overlay", str(folder), "--undo"]) == 2
    assert "no overlay to undo" in capsys.readouterr().err


def test_links_are_restored_as_links(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    blob = tmp_path_factory.mktemp("blobs") / "abc"
    (folder / "modeling_nvlm_d.py").rename(blob)
    (folder / "modeling_nvlm_d.py").symlink_to(blob)
    before, content = snapshot(folder), blob.read_bytes()
    overlay(folder)
    assert not (folder / "modeling_nvlm_d.py").is_symlink()
    assert blob.read_bytes() == content  # the cache's blob is shared: never written through the link
    undo(folder)
    assert snapshot(folder) == before


@pytest.mark.parametrize("config", [None, "{", '{"model_type": "llava"}', "{}"])
def test_other_folders_are_refused(tmp_path: Path, config: str | None) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    before = snapshot(tmp_path)
    with pytest.raises(ValueError, match=r"config\.json"):
        overlay(tmp_path)
    assert snapshot(tmp_path) == before


def test_a_folder_in_the_way_is_an_error(folder: Path) -> None:
    (folder / "chat.py").mkdir()
    with pytest.raises(ValueError, match=r"chat\.py is in the way"):
        overlay(folder)
    assert not (folder / BACKUP_FOLDER).exists()


def test_edits_since_are_not_lost(folder: Path) -> None:
    overlay(folder)
    (folder / "chat.py").write_text("# my own edit\n")
    for action in (undo, overlay):
        with pytest.raises(ValueError, match=r"Edited since the overlay: chat\.py"):
            action(folder)
    assert (folder / "chat.py").read_text() == "# my own edit\n"
    (folder / "chat.py").unlink()
    assert overlay(folder) == ["add chat.py"]


def test_a_newer_package_updates_and_undo_still_gives_the_first_original(
    folder: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = snapshot(folder)
    overlay(folder)
    newer = tmp_path_factory.mktemp("newer")
    (newer / "modeling_nvlm_d.py").write_text("# newer\n")
    (newer / "brand_new.py").write_text("# new\n")
    monkeypatch.setattr(overlay_module, "hub_files", lambda: sorted(newer.glob("*.py")))
    actions = overlay(folder)
    assert {"replace modeling_nvlm_d.py", "add brand_new.py", "remove chat.py"} <= set(actions)
    assert not (folder / "chat.py").exists()
    assert overlay(folder) == []
    undo(folder)
    assert snapshot(folder) == before


class CrashError(Exception):
    """The power goes."""


@pytest.mark.parametrize("num_steps", range(0, 40, 3))
@pytest.mark.parametrize("crash_in", ["overlay", "update", "undo"])
def test_a_crash_at_any_step_can_be_undone(
    folder: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
    crash_in: str,
    num_steps: int,
) -> None:
    without_auto_map(folder)
    before = snapshot(folder)
    package = tmp_path_factory.mktemp("package")
    for n in range(8):
        (package / f"module_{n}.py").write_text(f"# {n}")
    (package / "modeling_nvlm_d.py").write_text("# ours")
    monkeypatch.setattr(overlay_module, "hub_files", lambda: sorted(package.glob("*.py")))
    if crash_in != "overlay":
        overlay(folder)
    if crash_in == "update":
        (package / "modeling_nvlm_d.py").write_text("# ours, newer")
        (package / "module_3.py").write_text("# 3, newer")
        (package / "module_7.py").unlink()
        (package / "module_9.py").write_text("# 9")

    steps = 0

    def crash_at_last(real: Any) -> Any:
        def step(*args: Any, **kwargs: Any) -> Any:
            nonlocal steps
            steps += 1
            if steps > num_steps:
                raise CrashError
            return real(*args, **kwargs)

        return step

    with monkeypatch.context() as crashing:
        for name in ("replace", "fsync"):
            crashing.setattr(os, name, crash_at_last(getattr(os, name)))
        crashing.setattr(Path, "unlink", crash_at_last(Path.unlink))
        with contextlib.suppress(CrashError):
            (undo if crash_in == "undo" else overlay)(folder)
    if (folder / BACKUP_FOLDER / "manifest.json").exists():
        undo(folder)
    # Backups without a manifest are of no meaning.
    assert {name: file for name, file in snapshot(folder).items() if not name.startswith(BACKUP_FOLDER)} == before
    overlay(folder)
    undo(folder)
    assert snapshot(folder) == before


def test_lost_backups_are_named(folder: Path) -> None:
    overlay(folder)
    (folder / BACKUP_FOLDER / "modeling_nvlm_d.py").unlink()
    with pytest.raises(ValueError, match=r"modeling_nvlm_d\.py cannot be restored"):
        undo(folder)


@pytest.mark.parametrize(
    "manifest",
    [
        "{",
        "{}",
        '{"changes": [{"name": "a.py"}]}',
        '{"changes": [{"name": "../a.py", "original": "", "installed": []}]}',
        '{"changes": [{"name": "", "original": "", "installed": []}]}',
    ],
)
def test_broken_manifests_are_refused(folder: Path, manifest: str) -> None:
    (folder / BACKUP_FOLDER).mkdir()
    (folder / BACKUP_FOLDER / "manifest.json").write_text(manifest)
    before = snapshot(folder)
    for action in (undo, overlay):
        with pytest.raises(ValueError, match=r"manifest\.json"):
            action(folder)
    assert snapshot(folder) == before


def test_the_overlaid_code_is_what_the_hub_loads(
    checkpoint: Callable[[str], Path], tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    for name in ("config.json", "model.safetensors"):
        os.link(checkpoint("base") / name, tmp_path / name)
    overlay(tmp_path)
    script = (
        "import sys; from transformers import AutoModel;"
        f"model = AutoModel.from_pretrained({str(tmp_path)!r}, trust_remote_code=True);"
        "assert type(model).__module__.startswith('transformers_modules.'), type(model);"
        "assert 'nvlm' not in sys.modules"
    )
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path_factory.mktemp("modules"))}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment, cwd=tmp_path_factory.mktemp("empty"))
