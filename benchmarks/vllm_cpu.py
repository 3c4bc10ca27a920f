"""vLLM's CPU build on a model of the mid-size model's sizes, where its environment is there (`make serve-check`).

vLLM runs in a process of its own and waits while this one works, so the two take turns. Its checkpoint has the seven
dummy heads, which vLLM computes.
"""

import json
import os
import shutil
import statistics
import subprocess
import tempfile
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors.torch import save_file

from benchmarks.models import REPOSITORY, TOKENIZER, mid_config, mid_tokenizer, prompt_ids, random_tiles
from benchmarks.prefill import one_token
from benchmarks.report import Figure, Section
from benchmarks.settings import Settings
from benchmarks.timing import median_ratio, seconds_of
from nvlm.cli.overlay import overlay
from nvlm.serving.random_checkpoint import CONFIG, random_weights

VENV = REPOSITORY / ".cache" / "vllm-venv"
TEXT, PROMPT, NEW = 1024, 256, 33
QUESTION = "<image>\nWhich word is in the upper left corner?"


def write_checkpoint(folder: Path) -> None:
    """The mid-size model as vLLM loads it, in bfloat16 with random weights: 2.4 GB."""
    mid = mid_config()
    decoder = {name: getattr(mid.llm_config, name) for name in CONFIG["llm_config"] if hasattr(mid.llm_config, name)}
    vision = {name: getattr(mid.vision_config, name) for name in CONFIG["vision_config"]}
    config = CONFIG | {
        "force_image_size": mid.tile_size,
        "torch_dtype": "bfloat16",
        "vision_config": CONFIG["vision_config"] | vision,
        "llm_config": CONFIG["llm_config"] | decoder | {"model_type": "qwen2", "rope_theta": 1000000.0},
    }
    for released_only in ("rope_scaling", "rope_parameters"):
        config["llm_config"].pop(released_only, None)
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    weights = {name: weight.to(torch.bfloat16) for name, weight in random_weights(config).items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    mid_tokenizer()
    for file in (*TOKENIZER.iterdir(), REPOSITORY / "generation_config.json"):
        shutil.copy(file, folder)
    overlay(folder)


class Engine:
    """vLLM in its own process, from entering the context to leaving it.

    Raises:
        RuntimeError: it ended; the message has the end of its log.
    """

    def __init__(self, venv: Path, checkpoint: Path, log: Path) -> None:
        self._log = log
        self._command = [
            str(venv.absolute() / "bin" / "python"),
            "-P",
            str(Path(__file__).with_name("vllm_engine.py")),
            str(checkpoint),
        ]
        self._environment = os.environ | {
            "VLLM_CPU_KVCACHE_SPACE": "1",  # GiB
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",
            "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_PLUGINS": "nvlm",
            "HF_HUB_OFFLINE": "1",
            "OMP_NUM_THREADS": str(torch.get_num_threads()),
        }

    def __enter__(self) -> "Engine":
        self._log.parent.mkdir(parents=True, exist_ok=True)
        self._process = subprocess.Popen(
            self._command,
            env=self._environment,
            cwd=self._log.parent,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log.open("wb"),
            text=True,
        )
        try:
            self._wait_for("READY")
        except BaseException:
            self._stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop()

    def _stop(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _wait_for(self, word: str) -> str:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(word):
                return line.removeprefix(word).strip()
        tail = self._log.read_text(errors="replace")[-1500:]
        raise RuntimeError(f"vLLM ended before it said {word}. {self._log}:\n{tail}")

    def seconds_of(self, **request: Any) -> float:
        """How long a request took, by vLLM's process's own clock."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return float(self._wait_for("SECONDS"))


def compare(settings: Settings, engine: Engine) -> dict[str, dict[str, list[float]]]:
    """Seconds of both for text, a picture, and a step, in turn."""
    bench = settings.bench("mid")
    text, short = prompt_ids(bench, 0, TEXT), prompt_ids(bench, 0, PROMPT)
    tile = random_tiles(bench, 1)
    one = {"max_new_tokens": 1, "do_sample": False}
    many = one_token(short, eos_token_id=None) | {"max_new_tokens": NEW}
    found: dict[str, dict[str, list[float]]] = {
        name: {"ours": [], "vLLM": []} for name in ("text", "picture", "first", "many")
    }
    for number in range(-1, settings.rounds_or(3)):
        taken = {
            "text": (
                seconds_of(partial(bench.model.generate, **one_token(text))),
                engine.seconds_of(tokens=text[0].tolist(), new=1),
            ),
            "picture": (
                seconds_of(partial(bench.model.chat, bench.tokenizer, tile, QUESTION, one)),
                engine.seconds_of(side=bench.model.config.tile_size, text=QUESTION, seed=number + 1, new=1),
            ),
            "first": (
                seconds_of(partial(bench.model.generate, **one_token(short))),
                engine.seconds_of(tokens=short[0].tolist(), new=1),
            ),
            "many": (
                seconds_of(partial(bench.model.generate, **many)),
                engine.seconds_of(tokens=short[0].tolist(), new=NEW),
            ),
        }
        if number >= 0:
            for name, (ours, theirs) in taken.items():
                found[name]["ours"].append(ours)
                found[name]["vLLM"].append(theirs)
    found["step"] = {
        name: [
            (long - short) / (NEW - 1) for long, short in zip(found["many"][name], found["first"][name], strict=True)
        ]
        for name in ("ours", "vLLM")
    }
    return found


def run(settings: Settings) -> Section:
    title = "vLLM's CPU build, bfloat16, one request at a time; ratio of ours to vLLM's, above 1 is faster"
    if "mid" not in settings.models or settings.dtype != torch.bfloat16:
        return Section("vllm", title, note="skipped: it is compared on the mid-size model in bfloat16")
    if not (VENV / "bin" / "python").exists():
        return Section("vllm", title, note=f"skipped: {VENV} is not there (`make serve-check` installs it)")
    with tempfile.TemporaryDirectory() as scratch:
        checkpoint = Path(scratch) / "checkpoint"
        checkpoint.mkdir()
        write_checkpoint(checkpoint)
        with Engine(VENV, checkpoint, settings.output / "vllm.log") as engine:
            found = compare(settings, engine)
    names = {
        "text": f"{TEXT} tokens of text",
        "picture": "a picture of one tile",
        "step": f"a step after {PROMPT} tokens",
    }
    figures = []
    for name, label in names.items():
        seconds = found[name]
        figures += [
            Figure(f"{label}: vLLM", statistics.median(seconds["vLLM"]) * 1e3, "ms"),
            Figure(f"{label}: vLLM's time / ours", median_ratio(seconds["vLLM"], seconds["ours"])),
        ]
    return Section("vllm", title, figures, found)
