"""The README's words: its Python runs as written, its commands exist, its model card is one."""

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="module")
def readme():
    return (Path(__file__).resolve().parent.parent / "README.md").read_text()


def blocks(readme, language):
    return re.findall(rf"```{language}\n(.*?)```", readme, re.DOTALL)


def test_python_runs_as_written(readme, checkpoint, recipe, tmp_path):
    Image.fromarray(recipe.picture(200, 100, 1)).save(tmp_path / "page.jpg")
    Image.fromarray(recipe.picture(90, 260, 3)).save(tmp_path / "photo.jpg")
    with av.open(str(tmp_path / "clip.mp4"), "w") as video:
        stream = video.add_stream("mpeg4", rate=8)
        stream.width = stream.height = 64
        for i in range(16):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), i * 10, np.uint8), format="rgb24")
            video.mux(stream.encode(frame))
        video.mux(stream.encode())
    script = "\n".join(blocks(readme, "python"))
    assert script.count("nvidia/NVLM-D-72B") == 1
    template = Path(__file__).resolve().parent.parent / "chat_template.jinja"
    script = script.replace("/path/to/NVLM-D-72B/chat_template.jinja", str(template))
    script = script.replace('"tiny/checkpoint"', repr(str(template.parent / "tiny" / "checkpoint")))
    script = script.replace("nvidia/NVLM-D-72B", str(checkpoint("base"))).replace(
        "max_new_tokens=1024", "max_new_tokens=4"
    )
    script += "\nassert all(isinstance(text, str) for text in [response, *responses]) and len(responses) == 3\n"
    result = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-3000:]


def test_commands_run_as_written(readme, checkpoint, recipe, tmp_path):
    shutil.copytree(checkpoint("base"), tmp_path / "NVLM-D-72B")
    Image.fromarray(recipe.picture(200, 100, 1)).save(tmp_path / "page.jpg")
    [block] = blocks(readme, "bash")
    commands = [shlex.split(line, comments=True) for line in block.replace("/path/to/", "").splitlines()]
    commands = [words for words in commands if words[0] == "nvlm"]
    names = ["overlay", "inspect", "split", "chat", "repack", "extract", "compose"]
    assert [words[1] for words in commands] == names
    # The block extracts one part and leaves the others to a comment; compose is to find all three.
    for part, folder in (("projector", "mlp"), ("decoder", "qwen2")):
        commands.insert(-1, ["nvlm", "extract", "NVLM-D-72B", folder, "--part", part])
    commands[-1] += ["--config", "NVLM-D-72B/config.json"]  # without it the sizes are the published 72B's
    for words in commands:
        result = subprocess.run(
            [Path(sys.executable).parent / "nvlm", *words[1:]], cwd=tmp_path, capture_output=True, text=True
        )
        assert result.returncode == 0, f"{words}: {result.stdout}{result.stderr}"
    assert (tmp_path / "NVLM-D-72B" / "modeling_nvlm_d.py").exists()
    assert (tmp_path / "model" / "model.safetensors.index.json").exists()


def test_front_matter_is_a_model_card(readme):
    front = readme.split("---")[1]
    for line in ("license: apache-2.0", "library_name: transformers", "pipeline_tag: image-text-to-text"):
        assert line in front
    assert "CC BY-NC 4.0" in readme


def test_walk_names_every_module(readme, repository):
    for module in repository.glob("*.py"):
        if module.name != "__init__.py":
            assert f"`{module.name}`" in readme, f"{module.name} is missing from the README's walk through the code"
