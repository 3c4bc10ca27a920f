"""Samples as training data on disk: JSON lines of messages, and a PNG a page."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import yaml
from tqdm import tqdm

from tiny.page import Sample, Skill, is_one_in_five


def as_caption(sample: Sample) -> Sample:
    """A sample as the first stage takes it: the page is described."""
    return sample.caption()


def as_it_is(sample: Sample) -> Sample:
    """A sample as the second part of the second stage takes it: its questions."""
    return sample


def as_conversation(sample: Sample) -> Sample:
    """A sample as the second stage takes it: all its questions, and its pages are described, mostly in the end."""
    if not sample.pages:
        return sample
    description = sample.caption().questions
    comes_first = is_one_in_five(sample.notes)
    return replace(sample, questions=description + sample.questions if comes_first else sample.questions + description)


def write_samples(folder: Path, skill: Skill, count: int, *, form: Callable[[Sample], Sample]) -> Path:
    """Write the first samples of a skill to `folder`/NAME.jsonl, and their pages beside it.

    Returns:
        The JSON lines' path.
    """
    name = skill.name.replace(" ", "_")
    (folder / name).mkdir(parents=True, exist_ok=True)
    with (folder / f"{name}.jsonl").open("w") as lines:
        for index in tqdm(range(count), desc=skill.name, mininterval=5):
            sample = form(skill.sample(index))
            pictures = []
            for i, page in enumerate(sample.pages):
                pictures.append(f"{name}/{index:06d}-{i}.png")
                page.picture.save(folder / pictures[-1], compress_level=1)
            lines.write(json.dumps({"messages": sample.messages(pictures)}) + "\n")
    return folder / f"{name}.jsonl"


def write_blend(folder: Path, skills: list[Skill], counts: dict[str, int], *, form: Callable[[Sample], Sample]) -> None:
    """Write some skills' samples to `folder`, and `blend.yaml` that mixes them as often as they are."""
    sources = [
        {"path": write_samples(folder, skill, counts[skill.name], form=form).name, "weight": counts[skill.name]}
        for skill in skills
        if skill.name in counts
    ]
    (folder / "blend.yaml").write_text(yaml.safe_dump({"sources": sources}, sort_keys=False))
