"""lmms-eval's models: what its requests hold, and what its evaluator reads of the answers.

lmms-eval is no requirement of the tests: a stand-in with the parts of its interface that are used takes its place.
The last test runs the real one where it is installed.
"""

import gc
import importlib
import importlib.util
import json
import os
import re
import subprocess
import sys
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from types import ModuleType, SimpleNamespace
from typing import Any

import av
import numpy as np
import pytest
import torch

from nvlm import load_image, load_video
from nvlm.video import video_prefix
from tiny.evaluate import CHECKPOINT, held_out
from tiny.page import TILE

GREEDY = {"max_new_tokens": 24, "do_sample": False}
SKILLS = ("words", "arithmetic", "two pictures", "digit strings", "digits")
MODELS = ("SimpleNVLM_D", "ChatNVLM_D")


class Lmms:
    """Stands for `lmms_eval.api.model.lmms`."""

    def __init__(self) -> None:
        self._rank, self._world_size = 0, 1
        self.task_dict: dict[str, Any] = {}

    @property
    def rank(self) -> int:
        return self._rank

    def clean(self) -> None:
        self.cleaned = True


@dataclass(frozen=True)
class GenerationResult:
    """Stands for what lmms-eval's evaluator unwraps."""

    text: Any


@dataclass(frozen=True)
class ModelManifest:
    """Stands for what lmms-eval registers."""

    model_id: str
    simple_class_path: str
    chat_class_path: str


@pytest.fixture(scope="module")
def stand_in() -> Iterator[None]:
    """lmms-eval as far as the adapter knows it."""
    contents = {
        "lmms_eval": {},
        "lmms_eval.api": {},
        "lmms_eval.api.instance": {"GenerationResult": GenerationResult},
        "lmms_eval.api.model": {"lmms": Lmms},
        "lmms_eval.models": {},
        "lmms_eval.models.registry_v2": {"ModelManifest": ModelManifest},
    }
    with pytest.MonkeyPatch.context() as patch:
        modules = {name: ModuleType(name) for name in contents}
        for name, content in contents.items():
            vars(modules[name]).update(content)
            patch.setitem(sys.modules, name, modules[name])
        modules["lmms_eval.api"].instance = modules["lmms_eval.api.instance"]
        patch.delitem(sys.modules, "nvlm.integrations.lmms_eval_models", raising=False)
        yield
        sys.modules.pop("nvlm.integrations.lmms_eval_models", None)


@pytest.fixture(scope="module")
def models(stand_in):
    return importlib.import_module("nvlm.integrations.lmms_eval_models")


@pytest.fixture(scope="module")
def documents():
    """One held-out sample a skill, as a task's documents."""
    samples = [held_out(skill, 1)[0] for skill in SKILLS]
    return [
        {"pictures": [page.picture for page in sample.pages], "question": sample.questions[0][0]} for sample in samples
    ]


@pytest.fixture(scope="module", params=MODELS)
def lm(request, models, documents):
    """Each of the models, in batches of three."""
    made = getattr(models, request.param)(pretrained=str(CHECKPOINT), dtype="float32", batch_size="3")
    made.task_dict = {"pages": {"test": documents}}
    return made


def request_of(lm, doc_id, kwargs=GREEDY, *, visuals=lambda doc: doc["pictures"], text=None, messages=None):
    """A `generate_until` request as lmms-eval makes it for such a model."""
    doc = lm.task_dict["pages"]["test"][doc_id]
    context = doc["question"] if text is None else text
    if lm.is_simple:
        return SimpleNamespace(args=(context, kwargs, visuals, doc_id, "pages", "test"))

    def to_messages(doc):
        parts = [{"type": "image", "url": visual} for visual in visuals(doc) or []]
        return messages or [{"role": "user", "content": [*parts, {"type": "text", "text": context}]}]

    return SimpleNamespace(args=(context, to_messages, kwargs, doc_id, "pages", "test"))


def by_chat(lm, doc, **options):
    """The answer of `chat()`."""
    tiles = [load_image(picture, input_size=TILE, max_num=6) for picture in doc["pictures"]]
    return lm.answerer.model.chat(
        lm.answerer.tokenizer,
        torch.cat(tiles) if tiles else None,
        "<image>\n" * len(tiles) + doc["question"],
        {**GREEDY, **options},
        num_patches_list=[len(picture) for picture in tiles] or None,
    )


def test_the_entry_point_names_classes_of_the_right_kind(stand_in, repository):
    project = (repository / "pyproject.toml").read_text()
    [(name, value)] = re.findall(r'entry-points."lmms_eval.models"\]\n(\w+) = "(.*)"\n', project)
    manifest = EntryPoint(name, value, "lmms_eval.models").load()()
    assert manifest.model_id == name == "nvlm_d"
    for path, is_simple in ((manifest.chat_class_path, False), (manifest.simple_class_path, True)):
        module, _, class_name = path.rpartition(".")
        found = getattr(importlib.import_module(module), class_name)
        assert issubclass(found, Lmms)
        assert found.is_simple == is_simple


def test_answers_are_those_of_chat_in_the_requests_order(lm, documents):
    """Text, one and two pictures, one and several tiles; options that differ make batches of their own."""
    short = {"max_new_tokens": 1, "do_sample": False}
    kwargs = [GREEDY, short, GREEDY, {**GREEDY, "until": ["\n\n"]}, short]
    answers = lm.generate_until([request_of(lm, i, asked) for i, asked in enumerate(kwargs)])
    assert answers == [
        by_chat(lm, doc, max_new_tokens=asked["max_new_tokens"]) for doc, asked in zip(documents, kwargs, strict=True)
    ]
    assert len(set(answers)) > 3


def test_until_and_defaults(lm, documents):
    whole = by_chat(lm, documents[3])
    assert lm.generate_until([request_of(lm, 3, {"until": whole[1]})]) == [whole[: whole.index(whole[1])]]
    assert lm.generate_until([request_of(lm, 3, None)]) == [whole]


def test_videos(lm, documents, tmp_path):
    clip = tmp_path / "clip.mp4"
    with av.open(str(clip), "w") as video:
        stream = video.add_stream("mpeg4", rate=4)
        stream.width = stream.height = 64
        for i in range(8):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), i * 30, np.uint8), format="rgb24")
            video.mux(stream.encode(frame))
        video.mux(stream.encode())
    part = {"type": "video", "url": str(clip)}
    messages = [{"role": "user", "content": [part, {"type": "text", "text": "Describe the page."}]}]
    request = request_of(lm, 0, GREEDY, visuals=lambda doc: [str(clip)], text="Describe the page.", messages=messages)
    tiles, counts = load_video(clip, num_segments=32, input_size=TILE)
    expected = lm.answerer.model.chat(
        lm.answerer.tokenizer, tiles, video_prefix(32) + "Describe the page.", GREEDY, num_patches_list=counts
    )
    assert lm.generate_until([request]) == [expected]


def test_rounds_go_on_until_the_task_ends_them(lm, documents):
    """The second question is about another document's pictures."""
    seen = []

    def next_round(doc, *, previous_output, round_idx, previous_round_info):
        seen.append((round_idx, previous_output, previous_round_info))
        if round_idx == 2:
            return None, None, True, previous_output, None
        return documents[0]["pictures"], documents[0]["question"], False, previous_output, 7

    def next_messages(doc, *, round_idx=None, previous_output=None, previous_round_info=None):
        if round_idx is None:
            return request_of(lm, 3).args[1](doc)
        visuals, text, *rest = next_round(
            doc, previous_output=previous_output, round_idx=round_idx, previous_round_info=previous_round_info
        )
        parts = [{"type": "image", "url": visual} for visual in visuals or []]
        return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}], *rest

    if lm.is_simple:
        context, kwargs, visuals, *where = request_of(lm, 3).args
        args = (context, kwargs, visuals, next_round, *where)
    else:
        context, _, kwargs, *where = request_of(lm, 3).args
        args = (context, next_messages, kwargs, *where)
    [answers] = lm.generate_until_multi_round([SimpleNamespace(args=args)])
    assert answers == [by_chat(lm, documents[3]), by_chat(lm, documents[0])]
    assert seen == [(1, answers[:1], None), (2, answers, 7)]


def test_the_smallest_number_is_the_likeliest_choice(lm, documents):
    """Of a question's choices the greedy answer wins, as lmms-eval scores them; a text alone has no document."""
    doc = documents[1]
    answer = by_chat(lm, doc)
    where = (lambda doc: doc["pictures"], 1, "pages", "test")
    choices = [f" {answer}", " zzz", " 1234"]
    requests = [SimpleNamespace(args=(doc["question"], choice, *where)) for choice in choices]
    requests.append(SimpleNamespace(args=(doc["question"], lambda doc: answer, *where)))
    requests.append(SimpleNamespace(args=("", answer)))
    pairs = [result.text for result in lm.loglikelihood(requests)]
    losses = [loss for loss, _ in pairs]
    assert int(np.argmin(losses[:3])) == 0
    assert [is_greedy for _, is_greedy in pairs[:3]] == [True, False, False]
    assert losses[3] == pytest.approx(losses[0])
    assert losses[4] != pytest.approx(losses[0])
    conversation = [{"role": "user", "content": doc["question"]}]
    [(likelihood, _)] = lm.answerer.log_likelihoods([conversation], [answer])
    assert losses[0] == pytest.approx(-likelihood, rel=1e-4, abs=1e-5)


def test_likelihoods_as_they_are_on_demand(models, documents):
    lm = models.SimpleNVLM_D(pretrained=str(CHECKPOINT), likelihoods_as_losses=False)
    [result] = lm.loglikelihood([SimpleNamespace(args=("Why?", "because"))])
    assert result.text[0] < 0


def test_drawing_is_refused(lm):
    with pytest.raises(NotImplementedError, match="draws no pictures"):
        lm.generate_visual_cot([])


@pytest.mark.parametrize("batch_size", ["auto", 0, "-1"])
def test_the_batch_size_is_a_number(models, batch_size):
    with pytest.raises(ValueError, match="expected a number of at least 1"):
        models.SimpleNVLM_D(pretrained=str(CHECKPOINT), batch_size=batch_size)


@pytest.mark.parametrize("options", [{"device": "cpu"}, {"device_map": "split_model"}, {"device_map": "auto"}])
def test_loading_and_giving_back(models, documents, options):
    lm = models.SimpleNVLM_D(pretrained=str(CHECKPOINT), dtype="bfloat16", system_prompt="Be brief.", **options)
    lm.task_dict = {"pages": {"test": documents}}
    model = weakref.ref(lm.answerer.model)
    assert model().dtype == torch.bfloat16
    assert {parameter.device.type for parameter in model().parameters()} == {"cpu"}
    assert lm.generate_until([request_of(lm, 1)])[0]
    lm.clean()
    gc.collect()
    assert lm.cleaned
    assert model() is None


# ------------------------------------------------------------------------------------------------------- the real one

TASK = """task: {name}
dataset_path: json
dataset_kwargs:
  data_files:
    test: {folder}/questions.jsonl
test_split: test
doc_to_visual: !function utils.pictures
doc_to_text: "{{{{question}}}}"
metric_list:
  - metric: {metric}
    aggregation: mean
    higher_is_better: true
{rest}
"""
TASKS = {
    "tiny_pages": ("exact_match", "output_type: generate_until\ndoc_to_target: answer"),
    "tiny_choices": ("acc", "output_type: multiple_choice\ndoc_to_target: 0\ndoc_to_choice: '{{choices}}'"),
}
UTILS = "from PIL import Image\n\n\ndef pictures(doc):\n    return [Image.open(path) for path in doc['pictures']]\n"


@pytest.fixture
def task_folder(documents, lm, tmp_path):
    """Tasks whose right answers are those of `chat()`, but for one that is wrong."""
    lines = []
    for i, doc in enumerate(documents):
        paths = [str(tmp_path / f"{i}-{j}.png") for j in range(len(doc["pictures"]))]
        for picture, path in zip(doc["pictures"], paths, strict=True):
            picture.save(path)
        answer = by_chat(lm, doc) if i else "wrong"
        choices = [answer, by_chat(lm, doc) if i == 0 else "zzz"]
        lines.append(json.dumps({**doc, "pictures": paths, "answer": answer, "choices": choices}))
    (tmp_path / "questions.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "utils.py").write_text(UTILS)
    for name, (metric, rest) in TASKS.items():
        (tmp_path / f"{name}.yaml").write_text(TASK.format(name=name, folder=tmp_path, metric=metric, rest=rest))
    return tmp_path


@pytest.mark.long
@pytest.mark.skipif(
    not entry_points(group="lmms_eval.models", name="nvlm_d"),
    reason="installed without the entry point",
)
@pytest.mark.skipif(
    importlib.util.find_spec("lmms_eval") is None, reason="lmms-eval is not installed: pip install lmms-eval"
)
@pytest.mark.parametrize("lm", ["SimpleNVLM_D"], indirect=True)
@pytest.mark.parametrize(
    ("task", "flags"), [("tiny_pages", []), ("tiny_pages", ["--force_simple"]), ("tiny_choices", ["--force_simple"])]
)
def test_lmms_eval_itself_finds_and_scores_the_model(task, flags, task_folder, repository):
    command = [sys.executable, "-m", "lmms_eval", "--model", "nvlm_d", "--tasks", task, "--batch_size", "2", *flags]
    command += ["--model_args", f"pretrained={CHECKPOINT},dtype=float32", "--include_path", str(task_folder)]
    command += ["--output_path", str(task_folder / "results")]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(task_folder / "cache"), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, cwd=repository, env=environment, capture_output=True, text=True, timeout=500)
    assert run.returncode == 0, run.stderr[-3000:]
    [file] = (task_folder / "results").rglob("*_results.json")
    result = json.loads(file.read_text())["results"][task]
    assert result[f"{TASKS[task][0]},none"] == pytest.approx(0.8)
