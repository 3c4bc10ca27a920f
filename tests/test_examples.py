"""The notebook-style examples, run as a user runs them: what they print is what the model says and does.

Right means: as `chat()` answers. What the tiny checkpoint knows is measured elsewhere (`tiny/evaluate.py`).
"""

import base64
import io
import json
import os
import re
import runpy
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer

from nvlm import NVLM_D_Model, NVLM_D_Processor, load_image
from tiny.evaluate import CHECKPOINT, held_out
from tiny.page import TILE, Sample

NAMES = ("processor", "decoding", "conversation", "lora", "tensor_parallel", "serving", "repacking", "harness")


@pytest.fixture(scope="module")
def model():
    return NVLM_D_Model.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(CHECKPOINT)


@pytest.fixture(scope="module")
def chat(model, tokenizer):
    """(sample) -> what `chat()` answers to its first question."""

    def ask(sample: Sample, **options: Any) -> str:
        tiles = [load_image(page.picture, input_size=TILE, max_num=6) for page in sample.pages]
        return model.chat(
            tokenizer,
            torch.cat(tiles) if tiles else None,
            "<image>\n" * len(tiles) + sample.questions[0][0],
            {"max_new_tokens": 24, "do_sample": False, **options},
            num_patches_list=[len(picture) for picture in tiles] or None,
        )

    return ask


@pytest.fixture
def run(monkeypatch, capsys) -> Callable[..., tuple[list[tuple[str, str]], dict[str, Any]]]:
    """(name, *arguments) -> (what is before and after the first colon of each printed line, its variables)."""

    def run(name: str, *arguments: object) -> tuple[list[tuple[str, str]], dict[str, Any]]:
        monkeypatch.setattr(sys, "argv", [name, *map(str, arguments)])
        variables = runpy.run_module(f"examples.{name}", run_name="__main__")
        lines = capsys.readouterr().out.splitlines()
        return [(before, after.strip()) for before, _, after in (line.partition(":") for line in lines)], variables

    return run


@pytest.mark.parametrize("name", NAMES)
def test_each_is_a_notebook_that_says_how_it_is_run(name, repository):
    text = (repository / "examples" / f"{name}.py").read_text()
    assert len(re.findall(r"^# %% \w", text, re.MULTILINE)) >= 3
    assert f"-m examples.{name}" in text.split('"""')[1]
    assert len(text.splitlines()) <= 70


def test_processor(run, chat):
    lines, _ = run("processor")
    samples = [held_out(skill, 1)[0] for skill in ("words", "two pictures", "arithmetic")]
    answers = [chat(sample) for sample in samples]
    assert len(set(answers)) == 3
    printed = dict(lines)
    assert printed["one conversation"] == printed["pipeline"] == printed["streamed"] == answers[0]
    batch = [f"{answer} (asked: {sample.questions[0][0]})" for answer, sample in zip(answers, samples, strict=True)]
    assert [after for before, after in lines if before == "batch"] == batch
    paddings = json.loads(re.search(r"\[.*?\]", printed["padding"])[0])
    assert 0 in paddings
    assert len(set(paddings)) == 3


def test_decoding(run, chat):
    lines, _ = run("decoding")
    sample = held_out("digit strings", 1)[0]
    printed = dict(lines)
    names = ("greedy", "prompt lookup", "static cache", "stopped and resumed")
    assert {printed[name] for name in names} == {chat(sample)}
    assert printed["4 beams"] == chat(sample, num_beams=4)
    best, second = printed["the best 2 of 4 beams"].split(" | ")
    assert best == printed["4 beams"]
    assert second != best
    torch.manual_seed(0)
    options = {"do_sample": True, "temperature": 3.0, "num_return_sequences": 4}
    assert printed["sampled"].split(" | ")[0] == chat(sample, **options)
    assert printed["sampled"].count(" | ") == 3


def test_conversation(run, model, tokenizer):
    lines, variables = run("conversation")
    chart, shapes = (held_out(skill, 1)[0] for skill in ("charts", "shapes"))
    session = model.start_chat(tokenizer, generation_config={"max_new_tokens": 24, "do_sample": False})
    answers = [session.ask(sample.questions[0][0], [sample.pages[0].picture]) for sample in (chart, shapes)]
    streamed = session.ask(shapes.questions[1][0])
    assert lines == [
        ("bars", answers[0]),
        ("shapes", answers[1]),
        ("streamed", streamed),
        ("turns", "1 and 3"),
        ("same history", "True"),
    ]
    assert variables["session"].history == session.history


def test_lora(run, model, tokenizer):
    lines, variables = run("lora")
    printed = dict(lines)
    plain = model.chat(tokenizer, None, variables["question"], {"max_new_tokens": 24, "do_sample": False})
    assert printed["before"] == printed["unloaded"] == plain != variables["wanted"]
    assert printed["adapted"] == printed["merged"] == variables["wanted"]
    losses = [float(after.removeprefix("loss ")) for before, after in lines if before.startswith("step ")]
    assert losses == sorted(losses, reverse=True)
    assert len(losses) == 3


@pytest.mark.long
def test_tensor_parallel(chat, repository):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(
        [*command, "-m", "examples.tensor_parallel"], cwd=repository, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr[-3000:]
    sample = held_out("words", 1)[0]
    question, truth = sample.questions[0]
    assert result.stdout.splitlines() == [
        "process 0 of 2 holds 256 of 512 rows of a layer's up_proj",
        f"{question} {chat(sample)} (written is {truth})",
    ]


@pytest.fixture
def server(model) -> Iterator[ThreadingHTTPServer]:
    """Stands for vLLM's server: answers by this package's processor, and keeps what it was asked."""
    processor = NVLM_D_Processor.from_pretrained(CHECKPOINT)

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args: Any) -> None:
            """Quiet."""

        def send(self, kind: str, body: str) -> None:
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.end_headers()
            self.wfile.write(body.encode())

        def do_GET(self) -> None:
            assert self.path == "/v1/models"
            self.send("application/json", json.dumps({"data": [{"id": "tiny"}]}))

        def do_POST(self) -> None:
            assert self.path == "/v1/chat/completions"
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.server.asked.append(asked)
            inputs = processor.apply_chat_template(
                asked["messages"], tokenize=True, return_dict=True, add_generation_prompt=True
            )
            output = model.generate(**inputs, max_new_tokens=asked["max_tokens"], do_sample=False)
            answer = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            if asked.get("stream"):
                deltas: list[dict[str, Any]] = [{"role": "assistant"}, *({"content": letter} for letter in answer), {}]
                events = [json.dumps({"choices": [{"delta": delta}]}) for delta in deltas]
                self.send("text/event-stream", "".join(f"data: {event}\n\n" for event in [*events, "[DONE]"]))
            else:
                self.send("application/json", json.dumps({"choices": [{"message": {"content": answer}}]}))

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as made:
        made.asked = []
        thread = Thread(target=made.serve_forever)
        thread.start()
        yield made
        made.shutdown()
        thread.join()


def test_serving(run, chat, model, tokenizer, server):
    lines, _ = run("serving", f"http://127.0.0.1:{server.server_port}/v1")
    sample = held_out("words", 1)[0]
    question, truth = sample.questions[0]
    answer = chat(sample)
    pixels = load_image(sample.pages[0].picture, input_size=TILE, max_num=6)
    greedy = {"max_new_tokens": 24, "do_sample": False}
    history = [(f"<image>\n{question}", answer)]
    second = model.chat(tokenizer, pixels, "What is 37 + 5?", greedy, history=history)
    assert [before for before, _ in lines] == [f"{question} {answer} (written is {truth})", f"What is 37 + 5? {second}"]
    first_request, second_request = server.asked
    assert {key: first_request[key] for key in ("model", "temperature", "max_tokens")} == {
        "model": "tiny",
        "temperature": 0,
        "max_tokens": 24,
    }
    picture = base64.b64decode(first_request["messages"][0]["content"][0]["image_url"]["url"].partition(",")[2])
    assert np.array_equal(Image.open(io.BytesIO(picture)), sample.pages[0].picture)
    assert second_request["stream"]
    assert [message["role"] for message in second_request["messages"]] == ["user", "assistant", "user"]


def test_repacking(run, chat, tmp_path):
    lines, _ = run("repacking", tmp_path)
    sample = held_out("words", 1)[0]
    printed = dict(lines)
    answer = chat(sample)
    assert printed["as it is"] == f"{answer} (written is {sample.questions[0][1]})"
    assert printed["repacked"] == printed["composed"] == answer
    assert printed["extracted"] == "InternVisionModel, Qwen2ForCausalLM"
    old, new = map(int, re.findall(r"\d+", printed["dry run"]))
    assert new < old
    assert sum(file.stat().st_size for file in (tmp_path / "smaller").glob("*.safetensors")) == pytest.approx(new, 0.01)


def test_harness(run, chat, tmp_path):
    lines, _ = run("harness", tmp_path)
    printed = dict(lines)
    samples = [sample for skill in ("digits", "digit strings", "words") for sample in held_out(skill, 4)]
    right = sum(chat(sample) == sample.questions[0][1] for sample in samples)
    assert right > 0
    assert printed["VLMEvalKit's calls"] == f"{right} of {len(samples)} right"
    assert printed["lmms-eval"] in (
        f"{right} of {len(samples)} right",
        f"not installed; its task is in {tmp_path.resolve()}",
    )
    tasks = [json.loads(line) for line in (tmp_path / "questions.jsonl").read_text().splitlines()]
    assert [(task["question"], task["answer"]) for task in tasks] == [sample.questions[0] for sample in samples]
    assert all(
        np.array_equal(Image.open(task["picture"]), sample.pages[0].picture)
        for task, sample in zip(tasks, samples, strict=True)
    )
