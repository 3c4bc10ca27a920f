"""The tiny model's tokenizer: a byte-level BPE of Qwen2's kind with the real special tokens at its end."""

import json
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from nvlm.tile_tags import TAG_KINDS, tile_tags
from tiny.page import TILE
from tiny.skills import make_skills

REPOSITORY = Path(__file__).resolve().parent.parent
SYSTEM = "Answer the questions."
PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
MOST_TOKENS = 1024
SAMPLES = 1000  # of each skill


def corpus() -> list[str]:
    """The text that the vocabulary is learned from: questions, notes and tags, but no words in capitals.

    Words in capitals are what pages are read for; without them in the corpus their letters stay single tokens, so that
    a word that was never seen is read like any other.
    """
    tags = [
        "<Image>" + tag + "</Image>\n"
        for kind in TAG_KINDS
        for grid in ((1, 1), (2, 1), (1, 2), (3, 1), (1, 3), (2, 2), (3, 2), (2, 3))
        for tag in tile_tags(grid[0] * grid[1] + 1, kind=kind, grid=grid, tile_size=TILE)
    ]
    texts = [f"system\n{SYSTEM}", "user\n", "assistant\n", *tags] * 200
    for skill in make_skills(seed=0, split="train"):
        for index in range(SAMPLES):
            sample = skill.sample(index)
            for text in (sample.notes, *(text for pair in sample.questions for text in pair)):
                texts.append(" ".join(word for word in text.split(" ") if not word.strip(".,").isupper()))
    return texts


def build_vocabulary(folder: Path) -> PreTrainedTokenizerBase:
    """Learn the vocabulary and write the tokenizer's files to `folder`.

    Returns:
        The tokenizer, loaded from there.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    published = json.loads((REPOSITORY / "tokenizer_config.json").read_text(encoding="utf-8"))
    added = list(published["added_tokens_decoder"].values())
    trainer = trainers.BpeTrainer(
        vocab_size=MOST_TOKENS - len(added),
        min_frequency=50,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.model.save(str(folder))
    first = tokenizer.get_vocab_size()
    published["added_tokens_decoder"] = {str(first + i): token for i, token in enumerate(added)}
    published["model_max_length"] = 2048
    (folder / "tokenizer_config.json").write_text(json.dumps(published, indent=2) + "\n", encoding="utf-8")
    return AutoTokenizer.from_pretrained(folder)
