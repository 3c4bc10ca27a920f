"""The tiny model's generators, how it is built, and what the checkpoint of this repository understands."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors import safe_open
from transformers import AutoModel, AutoTokenizer, PreTrainedTokenizerBase, Qwen2ForCausalLM

from nvlm import NVLM_D_Config, NVLM_D_Model
from nvlm.modeling_intern_vit import InternVisionModel
from tiny import ablation, build, card, dataset
from tiny.assemble import DUMMY_HEADS, add_dummy_heads
from tiny.decoder import tiny_decoder_config
from tiny.encoder import FACTS, GRID, LABEL_IDS, label_tiles, tiny_vision_config
from tiny.evaluate import CHECKPOINT, TARGETS, backwards, changed, faults, held_out, score
from tiny.page import PATCH, TILE, rng_of
from tiny.sheet import draw_sheet
from tiny.skills import make_skills
from tiny.skills.digits import handwriting
from tiny.skills.words import lexicon
from tiny.vocabulary import build_vocabulary

SKILLS = list(TARGETS)


def skill(name: str, *, split: str = "train", seed: int = 0) -> Any:
    return next(made for made in make_skills(seed=seed, split=split) if made.name == name)


# Generators


@pytest.mark.parametrize("name", SKILLS)
def test_a_sample_is_a_function_of_its_number(name: str) -> None:
    forwards = [skill(name).sample(i) for i in range(6)]
    for i in reversed(range(6)):
        again = skill(name).sample(i)
        assert again.questions == forwards[i].questions
        pairs = zip(again.pages, forwards[i].pages, strict=True)
        assert all(np.array_equal(np.asarray(a.picture), np.asarray(b.picture)) for a, b in pairs)
    assert len({str(sample.questions) + sample.notes for sample in forwards}) > 1


@pytest.mark.parametrize("name", SKILLS)
def test_seeds_and_splits_give_other_samples(name: str) -> None:
    def said(**kwargs: Any) -> list[str]:
        return [
            str(skill(name, **kwargs).sample(i).questions) + skill(name, **kwargs).sample(i).notes for i in range(8)
        ]

    assert said() != said(seed=1)
    assert said() != said(split="test")


@pytest.mark.parametrize("name", [name for name in SKILLS if name != "arithmetic"])
def test_pages_are_whole_tiles_with_all_marks_on_them(name: str) -> None:
    for i in range(40):
        sample = skill(name).sample(i)
        assert all(question and answer for question, answer in sample.questions)
        assert sample.notes
        for page in sample.pages:
            assert page.marks
            assert page.picture.width % TILE == 0
            assert page.picture.height % TILE == 0
            for mark in page.marks:
                assert 0 < mark.x < page.picture.width
                assert 0 < mark.y < page.picture.height


def test_test_handwriting_is_never_written_in_training() -> None:
    train, test = handwriting("train")[0], handwriting("test")[0]
    assert (len(train), len(test)) == (1438, 359)
    shared = {picture.tobytes() for picture in train} & {picture.tobytes() for picture in test}
    assert not shared


def test_test_words_never_stand_on_training_pages() -> None:
    assert not set(lexicon("train")) & set(lexicon("test"))
    assert 0.1 < len(lexicon("test")) / len(lexicon("train")) < 0.4
    printed = {word for i in range(300) for _, answer in skill("words").sample(i).questions for word in answer.split()}
    assert not printed & set(lexicon("test"))
    asked = {word for sample in held_out("words", 50) for word in sample.questions[0][1].split()}
    assert asked <= set(lexicon("test"))


def test_test_sums_are_never_computed_in_training() -> None:
    def problems(split: str) -> set[tuple[str, ...]]:
        questions = [q for i in range(400) for q, _ in skill("arithmetic", split=split).sample(i).questions]
        parts = [question.rstrip("?").split()[2:] for question in questions]
        return {(*sorted((a, b)), sign) if sign == "+" else (a, b, sign) for a, sign, b in parts}

    assert not problems("train") & problems("test")


def test_sums_are_right() -> None:
    for i in range(50):
        for question, answer in skill("arithmetic").sample(i).questions:
            assert eval(question.removeprefix("What is ").rstrip("?")) == int(answer)


def test_answers_follow_from_the_marks() -> None:
    for i in range(60):
        sample = skill("digit strings").sample(i)
        (page,) = sample.pages

        def reading_order(mark: Any) -> tuple[int, int, float]:
            return int(mark.y // TILE), int(mark.x // TILE), mark.x

        written = "".join(mark.label.removeprefix("digit ") for mark in sorted(page.marks, key=reading_order))
        assert sample.questions[0] == ("Read all digits on the page.", written)
        shapes = skill("shapes").sample(i)
        for question, answer in shapes.questions:
            if question == "How many shapes are there?":
                assert int(answer) == len(shapes.pages[0].marks)


def test_an_unknown_split_is_refused() -> None:
    with pytest.raises(ValueError, match="split is 'valid'"):
        rng_of("digits", seed=0, split="valid", index=0)


def test_messages_hold_the_pictures_or_the_notes() -> None:
    sample = dataset.as_conversation(skill("two pictures").sample(0))
    messages = sample.messages(["a.png", "b.png"])
    assert [part.get("image") for part in messages[0]["content"]] == ["a.png", "b.png", None]
    assert messages[-1]["content"][0]["text"] == sample.notes
    in_words = sample.messages()
    assert in_words[0]["content"][0]["text"].startswith(sample.notes + "\n")


def test_the_sheet_has_all_skills() -> None:
    sheet = draw_sheet()
    assert sheet.height > 500


def test_labels_stand_at_the_patches_of_their_marks() -> None:
    page = skill("digit strings").sample(3).pages[0]
    pixels, labels, facts = label_tiles(page)
    assert pixels.shape[1:] == (3, TILE, TILE)
    assert labels.shape == (len(pixels), GRID * GRID)
    columns = page.picture.width // TILE
    for mark in page.marks:
        tile = int(mark.y // TILE) * columns + int(mark.x // TILE)
        place = int(mark.y % TILE // PATCH) * GRID + int(mark.x % TILE // PATCH)
        assert labels[tile, place] == LABEL_IDS[mark.label]
    assert (labels[:-1] > 0).sum() == len(page.marks)
    assert not facts.any()


def test_a_letter_on_a_bar_knows_its_value_and_a_shape_its_zone() -> None:
    for name, facts_each in (("charts", 1), ("shapes", 3)):
        [page] = skill(name).sample(3).pages
        facts = label_tiles(page).facts[0]
        known = [mark for mark in page.marks if mark.facts]
        assert facts.sum() == len(known) * facts_each
        for mark in known:
            patch = int(mark.y // PATCH) * GRID + int(mark.x // PATCH)
            assert {FACTS[i] for i in facts[patch].nonzero().flatten()} == set(mark.facts)
    values = re.findall(r"([A-Z]) (\d)", skill("charts").sample(3).notes)
    page = skill("charts").sample(3).pages[0]
    assert {(mark.label[-1], mark.facts[0][-1]) for mark in page.marks if mark.facts} == set(values)


# Building


def test_make_tiny_in_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, repository: Path) -> None:
    monkeypatch.chdir(repository)
    monkeypatch.setattr(build, "WORK", tmp_path / "work")
    monkeypatch.setattr(build, "CAPTIONS", {"shapes": 4})
    monkeypatch.setattr(build, "CONVERSATIONS", {"digit strings": 4, "two pictures": 4, "arithmetic": 4})
    monkeypatch.setattr(build, "QUESTIONS", {"words": 4, "charts": 4})
    monkeypatch.setattr(build, "STEPS", {"encoder": 6, "decoder": 6})
    monkeypatch.setattr(build, "STAGES", tmp_path)
    for name in ("tiny_pretrain", "tiny_sft", "tiny_answers"):
        stage = yaml.safe_load((repository / "training" / "stages" / f"{name}.yaml").read_text())
        short = stage | {"steps": 2, "decay_steps": None, "warmup_steps": 1}
        (tmp_path / f"{name}.yaml").write_text(yaml.safe_dump(short))
    monkeypatch.setattr("tiny.vocabulary.SAMPLES", 20)
    folder = tmp_path / "checkpoint"
    monkeypatch.setattr(build, "CHECKPOINT", folder)
    monkeypatch.setattr(card, "SAMPLES", 1)
    build.main([])
    assert (folder / "README.md").read_text().count("| digits |") == 1
    results = json.loads((folder / "results.json").read_text())
    assert set(results["scores"]) == set(TARGETS)
    assert len((folder / "logs" / "sft.jsonl").read_text().splitlines()) == 1
    before = (folder / "model.safetensors").read_bytes()
    build.main([])  # every phase is there already
    assert (folder / "model.safetensors").read_bytes() == before


def test_vocabulary_reads_capitals_letter_by_letter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tiny.vocabulary.SAMPLES", 50)
    tokenizer = build_vocabulary(tmp_path)
    assert tokenizer.tokenize("HOUSE") == list("HOUSE")
    assert len(tokenizer) <= 4096
    text = "What is 37 + 63? Größe <|x|> 漢字\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    ids = tokenizer.convert_tokens_to_ids(
        ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_pad|>", "<|file_sep|>"]
    )
    assert ids == [ids[0], ids[0] + 1, ids[0] + 2, ids[0] + 11, len(tokenizer) - 1]


@pytest.fixture(scope="module")
def tiny() -> NVLM_D_Model:
    return AutoModel.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def tiny_tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(CHECKPOINT)


def test_dummy_heads_change_nothing(tiny: NVLM_D_Model) -> None:
    padded = AutoModel.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()
    assert padded.config.vision_config.num_dummy_heads == 0
    add_dummy_heads(padded, DUMMY_HEADS)
    stored = AutoModel.from_pretrained(CHECKPOINT, dtype=torch.float32, drop_dummy_heads=False)
    assert {name: tensor.shape for name, tensor in padded.state_dict().items()} == {
        name: tensor.shape for name, tensor in stored.state_dict().items()
    }
    pixels = torch.randn(2, 3, TILE, TILE)
    with torch.no_grad():
        expected = tiny.vision_model(pixels).last_hidden_state
        torch.testing.assert_close(stored.vision_model(pixels).last_hidden_state, expected, atol=1e-4, rtol=1e-4)
    with pytest.raises(ValueError, match="7 dummy heads already"):
        add_dummy_heads(padded, DUMMY_HEADS)


def test_ablation_in_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, repository: Path) -> None:
    monkeypatch.chdir(repository)
    work = tmp_path / "work"
    monkeypatch.setattr("tiny.vocabulary.SAMPLES", 20)
    tokenizer = build_vocabulary(work / "vocabulary")
    InternVisionModel(tiny_vision_config()).save_pretrained(work / "encoder")
    Qwen2ForCausalLM(tiny_decoder_config(tokenizer)).save_pretrained(work / "decoder")
    monkeypatch.setattr(ablation, "WORK", work)
    monkeypatch.setattr(ablation, "ROOT", tmp_path / "runs")
    monkeypatch.setattr(ablation, "PAGES", 4)
    monkeypatch.setattr(ablation, "BASE_STEPS", 1)
    ablation.make_base()
    for kind, changes in ablation.KINDS.items():
        scores = ablation.run_one(kind, 0, steps=1, samples=1)
        assert len(scores) == len(ablation.QUESTIONS)
        trained = NVLM_D_Config.from_pretrained(tmp_path / "runs" / f"{kind.replace(' ', '_')}-0")
        assert trained.tile_tag == changes["tile_tag"]


def test_the_docs_have_the_ablations_table(repository: Path) -> None:
    recorded = json.loads((repository / "docs" / "tile_tags.json").read_text())
    assert set(recorded["scores"]) == set(ablation.KINDS)
    assert recorded["seeds"] == [0, 1, 2]
    assert ablation.table(recorded["scores"]) in (repository / "docs" / "training.md").read_text()


def test_ablation_draws_its_results(tmp_path: Path) -> None:
    results = {kind: {name: [10.0, 20.0, 30.0] for name in ablation.QUESTIONS} for kind in ablation.KINDS}
    assert "| 1-D tags | 20.0 ± 10.0 | 20.0 ± 10.0 |" in ablation.table(results)
    ablation.plot(tmp_path / "plot.png", results)
    assert (tmp_path / "plot.png").stat().st_size > 1000


# The checkpoint


def test_checkpoint_is_small_and_fits_vllm() -> None:
    files = [file for file in CHECKPOINT.rglob("*") if file.is_file() and not file.is_symlink()]
    assert sum(file.stat().st_size for file in files) <= 20e6
    with safe_open(CHECKPOINT / "model.safetensors", "pt") as weights:
        shapes = {name: weights.get_slice(name).get_shape() for name in weights.keys()}  # noqa: SIM118
    assert sum(int(np.prod(shape)) for shape in shapes.values()) <= 8e6
    config = json.loads((CHECKPOINT / "config.json").read_text())
    assert config["vision_config"]["num_dummy_heads"] == DUMMY_HEADS
    assert config["force_image_size"] == config["vision_config"]["image_size"] == TILE
    assert config["llm_config"]["architectures"] == ["Qwen2ForCausalLM"]
    assert config["llm_config"]["hidden_size"] // config["llm_config"]["num_attention_heads"] in (32, 64)


def test_checkpoint_loads_with_its_own_code() -> None:
    script = f"""
from transformers import AutoModel, AutoTokenizer
model = AutoModel.from_pretrained({str(CHECKPOINT)!r}, trust_remote_code=True).eval()
tokenizer = AutoTokenizer.from_pretrained({str(CHECKPOINT)!r}, trust_remote_code=True)
print(type(model).__module__, model.dtype)
print(model.chat(tokenizer, None, "What is 12 + 3?", dict(max_new_tokens=4, do_sample=False)))
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=CHECKPOINT.parent)
    assert result.returncode == 0, result.stderr[-3000:]
    module, answer = result.stdout.splitlines()
    assert module.startswith("transformers_modules.")
    assert module.endswith("torch.bfloat16")
    assert answer == "15"


def test_links_to_the_code_are_whole() -> None:
    from nvlm.cli.overlay import hub_files

    links = [file for file in CHECKPOINT.iterdir() if file.is_symlink()]
    assert {link.name for link in links} == {module.name for module in hub_files()}
    assert all(link.resolve() == module for link, module in zip(sorted(links), hub_files(), strict=True))


@pytest.fixture(scope="module")
def recorded() -> dict[str, Any]:
    return json.loads((CHECKPOINT / "results.json").read_text())


def test_recorded_scores_reach_the_targets(recorded: dict[str, Any], repository: Path) -> None:
    assert recorded["samples"] == 500
    assert recorded["scores"].keys() == TARGETS.keys()
    card = (CHECKPOINT / "README.md").read_text()
    for name, value in recorded["scores"].items():
        assert value >= TARGETS[name]
        assert f"| {name} | {value:.1f} | {TARGETS[name]} |" in card
    assert all(value <= recorded["scores"]["digit strings"] - 20 for value in recorded["faults"].values())
    readme = (repository / "README.md").read_text()
    assert "| % | " + " | ".join(f"{value:.1f}" for value in recorded["scores"].values()) + " |" in readme
    assert all(f"{value:.1f} % " in readme for value in recorded["faults"].values())


@pytest.mark.parametrize("name", SKILLS)
def test_it_understands_pages_it_never_saw(
    tiny: NVLM_D_Model, tiny_tokenizer: PreTrainedTokenizerBase, recorded: dict[str, Any], name: str
) -> None:
    # 100 fresh samples of another seed than the recorded scores'; three standard deviations below those.
    share = recorded["scores"][name] / 100
    slack = 300 * (share * (1 - share) / 100) ** 0.5 + 1
    assert score(tiny, tiny_tokenizer, held_out(name, 100, seed=7)) >= recorded["scores"][name] - slack


def test_a_broken_model_scores_much_less(tiny: NVLM_D_Model, tiny_tokenizer: PreTrainedTokenizerBase) -> None:
    samples = held_out("digit strings", 100, seed=7)
    whole = score(tiny, tiny_tokenizer, samples)
    broken = faults(tiny, tiny_tokenizer, samples)
    assert set(broken) == {"pixel shuffle swapped", "tags dropped", "tiles swapped"}
    assert all(value <= whole - 20 for value in broken.values()), (whole, broken)
    assert score(tiny, tiny_tokenizer, samples) == whole  # it is whole again


@pytest.mark.long
@pytest.mark.timeout(3000)
def test_recorded_scores_are_those_of_the_checkpoint(
    tiny: NVLM_D_Model, tiny_tokenizer: PreTrainedTokenizerBase, recorded: dict[str, Any]
) -> None:
    for name, value in recorded["scores"].items():
        assert score(tiny, tiny_tokenizer, held_out(name, 500)) == pytest.approx(value, abs=0.41)


def test_backwards_keeps_the_thumbnail_last() -> None:
    tiles = torch.arange(5.0)
    assert backwards(tiles).tolist() == [3, 2, 1, 0, 4]
    assert backwards(tiles[:1]).tolist() == [0]


def test_a_changed_config_is_restored_after_an_error(
    tiny: NVLM_D_Model, tiny_tokenizer: PreTrainedTokenizerBase
) -> None:
    with pytest.raises(ValueError, match="no tiles"), changed(tiny.config, "tile_tag", "none"):
        tiny.chat(tiny_tokenizer, torch.zeros(0, 3, TILE, TILE), "?")
    assert tiny.config.tile_tag == "1d"
