"""What tasks of a harness ask of generation, in the words of `generate`."""

import pytest
import torch
from transformers import AutoTokenizer

from nvlm.integrations.task_options import StopAt, TaskOptions, cut, read_options

GREEDY = {"max_new_tokens": 1024, "do_sample": False}


@pytest.mark.parametrize(
    ("asked", "arguments"),
    [
        (None, GREEDY),
        ({}, GREEDY),
        ({"max_new_tokens": 16}, {**GREEDY, "max_new_tokens": 16}),
        ({"max_new_tokens": None}, GREEDY),
        ({"temperature": 0.0, "top_p": 1.0, "num_beams": 1}, {**GREEDY, "num_beams": 1}),
        ({"temperature": 0, "do_sample": True}, GREEDY),
        ({"temperature": 0.7, "do_sample": False, "top_k": 5}, GREEDY),
        ({"do_sample": True, "top_k": 5}, {"max_new_tokens": 1024, "do_sample": True, "top_k": 5}),
        ({"temperature": 0.7}, {"max_new_tokens": 1024, "do_sample": True, "temperature": 0.7}),
        ({"num_beams": 3, "repetition_penalty": 1.1}, {**GREEDY, "num_beams": 3, "repetition_penalty": 1.1}),
        ({"image_aspect_ratio": "pad", "max_new_tokens": 2}, {**GREEDY, "max_new_tokens": 2}),
    ],
)
def test_arguments_of_generate(asked, arguments):
    before = None if asked is None else dict(asked)
    assert read_options(asked) == TaskOptions(arguments)
    assert asked == before


@pytest.mark.parametrize(
    ("until", "stop"),
    [
        ("\n", ("\n",)),
        (["\n", "Q:"], ("\n", "Q:")),
        (["", "Q:"], ("Q:",)),
        (None, ()),
        (["\n\n"], ()),  # what lmms-eval writes into every task without `until`
        ("\n\n", ()),
        (["\n\n", "Q:"], ("\n\n", "Q:")),
    ],
)
def test_texts_that_end_an_answer(until, stop):
    assert read_options({"until": until}).stop == stop


def test_blank_lines_end_an_answer_on_demand():
    assert read_options({"until": ["\n\n"]}, stop_at_blank_lines=True).stop == ("\n\n",)


@pytest.mark.parametrize("until", [3, ["\n", 3]])
def test_until_is_text(until):
    with pytest.raises(ValueError, match="until must be a text or a list of texts"):
        read_options({"until": until})


def test_an_answer_is_cut_at_the_first_text_that_ends_it():
    assert cut("one. two; three", [";", "."]) == "one"
    assert cut("one", [";"]) == "one"
    assert cut("one", []) == "one"


def test_generation_stops_where_the_new_text_holds_the_end(repository):
    """Whatever tokens it is made of, a part of one or several, and not where the prompt holds it."""
    tokenizer = AutoTokenizer.from_pretrained(repository / "tiny" / "checkpoint")
    prompt = tokenizer.encode("two pictures")
    stop = StopAt(tokenizer, ["pictures", "é5"], prompt_length=len(prompt))
    for text, end in [("a picture", None), ("pictures", "pictures"), ("x = é54", "é5")]:
        new = tokenizer.encode(text)
        stopped = [stop(torch.tensor([prompt + new[: n + 1]]), None).tolist() for n in range(len(new))]
        texts = [tokenizer.decode(new[: n + 1]) for n in range(len(new))]
        first = next((n for n, shown in enumerate(texts) if end is not None and end in shown), len(new))
        assert stopped[: first + 1] == [[False]] * first + [[True]] * (first < len(new)), text
