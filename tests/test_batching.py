"""Many questions at once: what they share is read once, batches keep to their budget, failures stay apart."""

from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from nvlm import load_image
from nvlm.batching import Group, group_prompts, split_group
from nvlm.pictures import Picture
from nvlm.prefix import Prompt, Slots
from nvlm.prompt import encode_text

GREEDY = {"max_new_tokens": 4, "do_sample": False}
SLOTS = Slots(token_id=0, per_tile=2)
FIRST, SECOND = (Picture(torch.full((1, 1, 2, 2), value), is_encoded=False) for value in (1.0, 2.0))


@pytest.fixture(scope="module")
def tiles(recipe):
    """Two pictures' tiles, three and four of them."""
    pictures = ((200, 100, 1), (90, 260, 3))
    return [load_image(Image.fromarray(recipe.picture(*p)), input_size=56, max_num=6) for p in pictures]


@pytest.fixture
def shares_anything():
    with mock.patch("nvlm.batching.LEAST_SHARED", 4):
        yield


class Encoded:
    """How many tiles a model's encoder has seen, and how many tokens its decoder has read."""

    def __init__(self, model):
        self.tiles = self.tokens = 0
        self._hooks = [
            model.vision_model.register_forward_pre_hook(self._encoder, with_kwargs=True),
            model.language_model.register_forward_pre_hook(self._decoder, with_kwargs=True),
        ]

    def _encoder(self, module, args, kwargs):
        self.tiles += len(args[0])

    def _decoder(self, module, args, kwargs):
        self.tokens += kwargs["inputs_embeds"].shape[0] * kwargs["inputs_embeds"].shape[1]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for hook in self._hooks:
            hook.remove()


def one_by_one(model, tokenizer, questions, pictures, **options):
    return [
        model.chat(tokenizer, picture, question, {**GREEDY, **options})
        for question, picture in zip(questions, pictures, strict=True)
    ]


def together(model, tokenizer, questions, pictures, config=None, **options):
    given = [picture for picture in pictures if picture is not None]
    return model.batch_chat(
        tokenizer,
        torch.cat(given) if given else None,
        questions,
        {**GREEDY, **(config or {})},
        num_patches_list=[len(picture) for picture in given],
        **options,
    )


def test_prompts_with_the_same_first_picture_are_a_group():
    def prompt(picture, *rest):
        return Prompt([7] * 70 + [0, 0, *rest], [picture])

    prompts = [prompt(FIRST, 1), Prompt([8, 9], []), prompt(SECOND, 1), prompt(FIRST, 2), prompt(FIRST, 1, 3)]
    assert group_prompts(prompts, slots=SLOTS) == [Group([1, 2], 0), Group([0, 3, 4], 72)]


def test_text_alone_is_shared_as_well_but_never_a_whole_prompt():
    prompts = [Prompt([7] * 80, []), Prompt([7] * 80, []), Prompt([7] * 100, [])]
    assert group_prompts(prompts, slots=SLOTS) == [Group([0, 1, 2], 79)]
    assert group_prompts(prompts[:1], slots=SLOTS) == [Group([0], 0)]
    assert group_prompts([], slots=SLOTS) == []


@given(st.lists(st.integers(1, 50), min_size=1, max_size=30), st.integers(1, 300), st.integers(0, 20))
def test_no_batch_exceeds_its_budget_but_single_prompts(lengths, budget, new_tokens):
    whole = Group(list(range(len(lengths))), 0)
    batches = split_group(whole, lengths, max_batch_tokens=budget, new_tokens=new_tokens)
    assert sorted(row for batch in batches for row in batch.rows) == whole.rows
    for batch in batches:
        size = len(batch.rows) * (max(lengths[row] for row in batch.rows) + new_tokens)
        assert size <= budget or len(batch.rows) == 1
    assert split_group(whole, lengths, max_batch_tokens=None, new_tokens=new_tokens) == [whole]


def test_many_questions_about_one_picture_encode_and_read_it_once(base_model, tokenizer, tiles, shares_anything):
    questions = [f"<image>\nQuestion number {i}, what is it{'?' * i}" for i in range(6)]
    pictures = [tiles[0].clone() for _ in questions]
    alone = one_by_one(base_model, tokenizer, questions, pictures)
    with Encoded(base_model) as batch:
        assert together(base_model, tokenizer, questions, pictures) == alone
    with Encoded(base_model) as single:
        one_by_one(base_model, tokenizer, questions[:1], pictures[:1])
    assert batch.tiles == len(tiles[0]) == single.tiles
    assert batch.tokens < 3.5 * single.tokens


@pytest.mark.parametrize("budget", [None, 1, 150, 400])
def test_a_mixed_batch_is_answered_as_one_by_one(base_model, tokenizer, tiles, budget, shares_anything):
    questions = ["Hi, who are you?", "<image>\nA?", "<image>\nWhat else?", "<image>\nB?", "Hi, who?", "<image>\nAnd?"]
    pictures = [None, tiles[0], tiles[0], tiles[1], None, tiles[1]]
    alone = one_by_one(base_model, tokenizer, questions, pictures)
    order = []
    answers = together(
        base_model, tokenizer, questions, pictures, max_batch_tokens=budget, on_answer=lambda *pair: order.append(pair)
    )
    assert answers == alone
    assert sorted(order) == list(enumerate(answers))


@pytest.mark.parametrize("options", [{"use_cache": False}, {"num_beams": 2}, {"cache_implementation": "static"}])
def test_where_nothing_can_be_shared_answers_are_the_same(base_model, tokenizer, tiles, options, shares_anything):
    questions = ["<image>\nA?", "<image>\nWhat else?"]
    pictures = [tiles[0], tiles[0]]
    alone = one_by_one(base_model, tokenizer, questions, pictures, **options)
    assert together(base_model, tokenizer, questions, pictures, options) == alone


def test_a_failing_sample_is_reported_in_its_place(base_model, tokenizer, tiles):
    bad = tiles[0].clone()
    bad[0, 0, 0, 0] = float("nan")
    questions = ["Hello?", None, "<image>\nA?", "<image>\nB?", "long " * 40_000]
    histories = [None, None, None, None, None]
    order = []
    answers, after = base_model.batch_chat(
        tokenizer,
        torch.cat([bad, tiles[1]]),
        questions,
        GREEDY,
        num_patches_list=[len(bad), len(tiles[1])],
        history=histories,
        return_history=True,
        errors="return",
        on_answer=lambda row, answer: order.append(row),
    )
    assert sorted(order) == [0, 1, 2, 3, 4]
    assert answers[0] == base_model.chat(tokenizer, None, "Hello?", GREEDY)
    assert answers[3] == base_model.chat(tokenizer, tiles[1], "<image>\nB?", GREEDY)
    for row, message in ((1, "must be a str, got NoneType"), (2, "NaN or infinite"), (4, "40.* tokens long")):
        with pytest.raises(ValueError, match=message):
            raise answers[row]
    assert [len(history) for history in after] == [1, 0, 0, 1, 0]


class FailsOn:
    """A logits processor that fails where a prompt holds a token."""

    def __init__(self, token_id):
        self.token_id = token_id

    def __call__(self, input_ids, scores):
        if (input_ids == self.token_id).any():
            raise RuntimeError("no memory for that")
        return scores


def test_a_batch_that_fails_is_tried_again_row_by_row(base_model, tokenizer):
    token_id = encode_text(tokenizer, "A zebra")[-1]
    options = {**GREEDY, "logits_processor": [FailsOn(token_id)]}
    questions = ["Hello?", "A zebra", "Who are you?"]
    answers = base_model.batch_chat(tokenizer, None, questions, options, errors="return")
    alone = [base_model.chat(tokenizer, None, question, GREEDY) for question in questions]
    assert [answers[0], answers[2]] == [alone[0], alone[2]]
    assert str(answers[1]) == "no memory for that"
    with pytest.raises(RuntimeError, match="no memory"):
        base_model.batch_chat(tokenizer, None, questions, options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"errors": "ignore"}, "errors is 'ignore', expected 'raise' or 'return'"),
        ({"max_batch_tokens": 0}, "max_batch_tokens must be a positive int or None, got 0"),
        ({"max_batch_tokens": 1.5}, "got 1.5"),
    ],
)
def test_options_that_make_no_sense(base_model, tokenizer, options, message):
    with pytest.raises(ValueError, match=message):
        base_model.batch_chat(tokenizer, None, ["Hi"], GREEDY, **options)


def test_pictures_that_cannot_be_told_apart_are_an_error_of_the_whole_call(base_model, tokenizer, tiles):
    with pytest.raises(ValueError, match=r"2 '<image>', but 1 pictures"):
        base_model.batch_chat(tokenizer, tiles[0], ["<image>A", "<image>B"], GREEDY, errors="return")
