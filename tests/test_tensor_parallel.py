"""Several processes on a CPU: the script of docs/several_processes.md, and examples/data_parallel.py."""

import json
import os
import re
import socket
import subprocess
import sys

import pytest
import transformers
from accelerate import PartialState
from PIL import Image

from examples import data_parallel
from nvlm import load_image

# Runs before the script ends: what each process answered, and the part of some weights that it holds.
PROBE = """
import json
layer = model.language_model.model.layers[0]
weights = {
    "up_proj": layer.mlp.up_proj.weight,
    "k_proj": layer.self_attn.k_proj.weight,
    "fc1": model.vision_model.encoder.layers[0].mlp.fc1.weight,
    "qkv": model.vision_model.encoder.layers[0].attn.qkv.weight,
    "mlp1": model.mlp1[1].weight,
}
held = {name: list((w.to_local() if hasattr(w, "to_local") else w).shape) for name, w in weights.items()}
reports = [None, None]
torch.distributed.all_gather_object(reports, {"answer": answer, "held": held})
if torch.distributed.get_rank() == 0:
    print(json.dumps(reports))
"""
END = "torch.distributed.destroy_process_group()\n"
LONG = pytest.mark.long


@pytest.fixture(scope="module")
def script(repository):
    text = (repository / "docs" / "several_processes.md").read_text()
    [block] = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    return block


def run_two(arguments, folder, environment):
    """Run a script or module in two processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    command += map(str, arguments)
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stderr[-5000:]
    return result


@pytest.mark.parametrize(
    "version",
    [transformers.__version__, pytest.param("5.16.1", marks=LONG), pytest.param("4.57.6", marks=LONG)],
)
def test_two_processes_answer_as_one(version, script, checkpoint, base_model, tokenizer, recipe, repository, tmp_path):
    Image.fromarray(recipe.picture(200, 100, 1)).save(tmp_path / "page.png")
    script = script.replace("/path/to/NVLM-D-72B", str(checkpoint("base"))).replace("page.jpg", "page.png")
    script = script.replace("torch.bfloat16", "torch.float32").replace('"max_new_tokens": 64', '"max_new_tokens": 8')
    script = script.replace(", trust_remote_code=True", "")  # the checkpoint has no code beside it
    environment = {}
    if version != transformers.__version__:
        environment["PYTHONPATH"] = str(repository / ".cache" / f"transformers-{version}")
    if version.startswith("4."):
        [old] = re.findall(r"# transformers 4.57: (.*)\n", script)
        script = re.sub(r"plan = .*", f"plan = {old}", script)
    assert script.endswith(END)
    script = (
        f"import transformers\nassert transformers.__version__ == {version!r}\n{script.removesuffix(END)}{PROBE}{END}"
    )
    (tmp_path / "answer.py").write_text(script)
    reports = json.loads(run_two(["answer.py"], tmp_path, environment).stdout.splitlines()[-1])

    pixels = load_image(tmp_path / "page.png", input_size=56, max_num=6)
    greedy = {"max_new_tokens": 8, "do_sample": False}
    answer = base_model.chat(tokenizer, pixels, "What does the sign say?", greedy)
    assert [report["answer"] for report in reports] == [answer, answer]
    whole = {"up_proj": [96, 64], "k_proj": [32, 64], "fc1": [160, 80], "qkv": [240, 80], "mlp1": [96, 320]}
    split = ["up_proj", "k_proj"] if version.startswith("4.") else ["up_proj", "k_proj", "fc1"]
    halves = whole | {name: [whole[name][0] // 2, whole[name][1]] for name in split}
    assert [report["held"] for report in reports] == [halves, halves]


# ------------------------------------------------------------------------------------------------------ data parallel

QUESTIONS = [("page.png", "What is it?"), (None, "How much is 2 + 3?"), ("photo.png", "Which colours?")]


@pytest.fixture
def questions(recipe, tmp_path):
    Image.fromarray(recipe.picture(200, 100, 1)).save(tmp_path / "page.png")
    Image.fromarray(recipe.picture(50, 50, 3)).save(tmp_path / "photo.png")
    file = tmp_path / "questions.jsonl"
    lines = [json.dumps({"image": image, "question": question}) for image, question in QUESTIONS]
    file.write_text("\n\n".join(lines) + "\n")
    return file


def expected_lines(model, tokenizer, folder):
    greedy = {"max_new_tokens": 6, "do_sample": False}
    for image, question in QUESTIONS:
        pixels = None if image is None else load_image(folder / image, input_size=56)
        answer = model.chat(tokenizer, pixels, question, greedy)
        yield {"image": image, "question": question, "answer": answer}


@pytest.mark.parametrize("batch_size", [1, 8])
def test_one_process_answers_in_order(batch_size, questions, checkpoint, base_model, tokenizer):
    output = questions.with_name("answers.jsonl")
    arguments = [str(questions), "--model", str(checkpoint("base")), "--output", str(output)]
    try:
        data_parallel.main([*arguments, "--max-new-tokens", "6", "--batch-size", str(batch_size)])
    finally:
        PartialState._reset_state()
    answers = [json.loads(line) for line in output.read_text().splitlines()]
    assert answers == list(expected_lines(base_model, tokenizer, questions.parent))


def test_two_processes_answer_in_order(questions, checkpoint, base_model, tokenizer, repository):
    output = questions.with_name("answers.jsonl")
    arguments = ["--model", checkpoint("base"), "--output", output, "--max-new-tokens", "6"]
    result = run_two(["-m", "examples.data_parallel", questions, *arguments], repository, {})
    assert "Process 0 of 2: 2 answers." in result.stderr
    assert "Process 1 of 2: 1 answers." in result.stderr
    answers = [json.loads(line) for line in output.read_text().splitlines()]
    assert answers == list(expected_lines(base_model, tokenizer, questions.parent))


@pytest.mark.parametrize(
    "line", ["[1, 2]", '{"image": "a.png"}', '{"image": 3, "question": "a"}', '{"image": null, "question": null}', "{"]
)
def test_a_wrong_line_is_named(line, tmp_path):
    file = tmp_path / "questions.jsonl"
    file.write_text(f'{{"image": null, "question": "Hello"}}\n\n{line}\n')
    with pytest.raises(ValueError, match=r"questions.jsonl, line 3: .* expected an object like"):
        data_parallel.read_tasks(file)
