"""The processor: the same prompts and tiles as `chat()`, whichever way they come, and no forged control tokens."""

import base64
import json
import shutil
import subprocess
import sys
from unittest import mock

import jinja2
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import pipeline

from nvlm import NVLM_D_Config, NVLM_D_Model, load_image
from nvlm.conversation import Message, get_conv_template
from nvlm.image_processing_nvlm_d import NVLM_D_ImageProcessor
from nvlm.processing_nvlm_d import NVLM_D_Processor
from nvlm.prompt import as_text
from nvlm.video import load_video, video_prefix

IM_START, IM_END, PAD, IMAGE = 151644, 151645, 151643, 151654
WIDE, TALL, SMALL = (200, 100, 1), (90, 260, 3), (56, 56, 2)  # pictures of 3, 4 and 1 tiles


@pytest.fixture(scope="module")
def template(repository):
    return (repository / "chat_template.jinja").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def make_processor(tokenizer, template):
    def make(**kwargs):
        image_processor = NVLM_D_ImageProcessor(size=56)
        return NVLM_D_Processor(image_processor, tokenizer, image_seq_length=4, chat_template=template, **kwargs)

    return make


@pytest.fixture(scope="module")
def processor(make_processor):
    return make_processor()


@pytest.fixture(scope="module")
def picture(recipe):
    return lambda args: Image.fromarray(recipe.picture(*args))


def parts(question, pictures):
    """A question with `<image>` as content parts."""
    texts = question.split("<image>")
    assert len(texts) == len(pictures) + 1
    content = [{"type": "text", "text": texts[0]}] if texts[0] else []
    for image, text in zip(pictures, texts[1:], strict=True):
        content += [{"type": "image", "image": image}, {"type": "text", "text": text}]
    return content


def messages_of(question, history, pictures):
    """A call of `chat()` as messages: pictures go where its `<image>` are."""
    messages, remaining = [], list(pictures)
    for user, answer in [*(history or []), (question, None)]:
        count = user.count("<image>")
        own, remaining = remaining[:count], remaining[count:]
        messages.append({"role": "user", "content": parts(user, own)})
        if answer is not None:
            messages.append({"role": "assistant", "content": answer})
    return messages


def asked_by_chat(model, tokenizer, question, pictures, *, history=None, **kwargs):
    """What `chat()` gives to `generate`."""
    tiles = [load_image(picture, input_size=56) for picture in pictures]
    with mock.patch.object(model, "generate", side_effect=model.generate) as generate:
        model.chat(
            tokenizer,
            torch.cat(tiles) if tiles else None,
            question,
            {"max_new_tokens": 1},
            history=history,
            num_patches_list=[len(t) for t in tiles],
            **kwargs,
        )
    return generate.call_args.kwargs


CHATS = [
    ("Hello, who are you?", None, ()),
    ("<image>\nPlease describe the image.", None, (WIDE,)),
    ("Image-1: <image>\nImage-2: <image>\nPlease compare.", None, (WIDE, TALL)),
    ("<image> And <image>?", [("<image>\nWhat?", "Art. <image>"), ("Why?", "Because.\n\n")], (SMALL, WIDE, TALL)),
    ("Look:\n\n<image>\n\nWhat is it?<image>", None, (SMALL, SMALL)),
    ("é e\u0301 \uff1c <tile_1> \U0001f600 你好 <box>(1,2),(3,4)</box>", [("  spaces  ", "\n\nlines\n")], ()),
]


@pytest.mark.parametrize(("question", "history", "pictures"), CHATS)
def test_ids_and_tiles_are_those_of_chat(base_model, processor, picture, question, history, pictures):
    pictures = [picture(args) for args in pictures]
    expected = asked_by_chat(base_model, processor.tokenizer, question, pictures, history=history)
    messages = messages_of(question, history, pictures)
    from_messages = processor.apply_chat_template(messages, tokenize=True, return_dict=True, add_generation_prompt=True)
    assert set(from_messages) == set(processor.model_input_names) - (set() if pictures else {"pixel_values"})
    rendered = processor.apply_chat_template(messages, add_generation_prompt=True)
    results = [from_messages]
    if rendered.count("<image>") == len(pictures):  # else an answer holds one, which a string cannot tell
        results.append(processor(text=rendered, images=pictures or None, return_tensors="pt"))
    for inputs in results:
        assert torch.equal(inputs["input_ids"], expected["input_ids"])
        assert torch.equal(inputs["attention_mask"], expected["attention_mask"])
        if pictures:
            assert torch.equal(inputs["pixel_values"], expected["pixel_values"])


def test_golden_prompts(processor, picture, golden_chat):
    for name, golden in golden_chat["cases"]["base"].items():
        if golden["method"] != "chat":
            continue
        pictures = [picture(args) for args in golden.get("pictures", [])]
        history = golden["history"][:-1] if name == "second_turn" else None
        question = golden["question"]
        if name == "single_tile":  # a bare question with a picture
            messages = [{"role": "user", "content": [{"type": "image", "image": pictures[0]}, question]}]
        else:
            messages = messages_of(question, history, pictures)
        [ids] = processor.apply_chat_template(messages, tokenize=True, add_generation_prompt=True)
        assert ids == golden["input_ids"], name


def test_generate_takes_the_inputs_and_a_batch_answers_as_one_by_one(base_model, processor, picture):
    conversations = [messages_of(question, history, map(picture, args)) for question, history, args in CHATS[:4]]
    options = {"tokenize": True, "return_dict": True, "add_generation_prompt": True}
    batch = processor.apply_chat_template(conversations, **options)
    padded = batch["input_ids"].shape[1]
    assert batch["attention_mask"][0].tolist() == [0] * (padded - 21) + [1] * 21
    assert batch["input_ids"][0, : padded - 21].unique().tolist() == [PAD]
    greedy = {"max_new_tokens": 4, "do_sample": False}
    answers = base_model.generate(**batch, **greedy)
    assert torch.equal(answers[:, :padded], batch["input_ids"])
    for conversation, answer in zip(conversations, answers[:, padded:], strict=True):
        inputs = processor.apply_chat_template(conversation, **options)
        alone = base_model.generate(**inputs, **greedy)[0, inputs["input_ids"].shape[1] :]
        assert torch.equal(alone, answer)


def test_prompts_as_strings_in_a_batch(processor, picture):
    wide, tall = picture(WIDE), picture(TALL)
    texts = ["One: <image>", "Two: <|vision_pad|> and <image>", "None"]
    for images in ([[wide], [tall, wide], []], [wide, tall, wide]):
        inputs = processor(text=texts, images=images, return_tensors="pt", return_mm_token_type_ids=True)
        assert inputs["mm_token_type_ids"].sum(1).tolist() == [3 * 4, 7 * 4, 0]
        expected = processor.image_processor([wide, tall, wide])["pixel_values"]
        assert torch.equal(inputs["pixel_values"], expected)
    assert torch.equal(inputs["input_ids"] == IMAGE, inputs["mm_token_type_ids"] == 1)
    lists = processor(text=texts, images=images)
    assert [len(row) for row in lists["input_ids"]] == inputs["attention_mask"].sum(1).tolist()
    right = processor(text=texts, images=images, return_tensors="pt", padding_side="right", pad_to_multiple_of=64)
    assert right["input_ids"].shape[1] % 64 == 0
    assert right["attention_mask"][2].tolist() == sorted(right["attention_mask"][2].tolist(), reverse=True)


def test_without_pictures_the_placeholders_are_text(processor):
    [ids] = processor(text="What does <image> or <video> mean?")["input_ids"]
    assert processor.decode(ids) == "What does <image> or <video> mean?"
    assert processor(text="<image>", images=[], videos=[])["input_ids"] == processor(text="<image>")["input_ids"]


def test_the_template_renders_what_the_conversation_template_does(processor):
    chatml = get_conv_template("chatml")
    turns = [
        ("user", "Hi\n"),
        ("assistant", " Hello. "),
        ("user", "{{ 1 }} {% x %}"),
        ("system", "Be brief."),
        ("user", ""),
    ]
    messages = [{"role": role, "content": text} for role, text in turns]
    rendered = processor.apply_chat_template(messages, add_generation_prompt=True)
    expected = [Message("system", chatml.system_message), *(Message(role, text) for role, text in turns)]
    assert rendered == as_text(chatml.render(expected))
    own = [
        {"role": "system", "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "kind."}]},
        *messages,
    ]
    expected[0] = Message("system", "Be kind.")
    assert processor.apply_chat_template([own], add_generation_prompt=True) == [as_text(chatml.render(expected))]
    assert not processor.apply_chat_template(own).endswith("assistant\n")


def weather(city: str):
    """
    Tells the weather.

    Args:
        city: Where.
    """


def test_tools_are_rendered_as_qwen2_renders_them(processor):
    messages = [
        {"role": "user", "content": "Weather in Bern and Rome?"},
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [
                {"type": "function", "function": {"name": "weather", "arguments": {"city": "Bern"}}},
                {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}},
            ],
        },
        {"role": "tool", "content": "rain"},
        {"role": "tool", "content": [{"type": "text", "text": "sun"}]},
        {
            "role": "assistant",
            "content": "One more.",
            "tool_calls": [{"function": {"name": "weather", "arguments": {}}}],
        },
    ]
    parameters = '{"type": "object", "properties": {"city": {"type": "string", "description": "Where."}}'
    schema = '{"type": "function", "function": {"name": "weather", "description": "Tells the weather.", "parameters": '
    schema += parameters + ', "required": ["city"]}}}'
    call = '<tool_call>\n{"name": "weather", "arguments": %s}\n</tool_call>'
    expected = (
        "<|im_start|>system\nAnswer the questions.\n\n# Tools\n\nYou may call one or more functions to assist with the "
        "user query.\n\nYou are provided with function signatures within <tools></tools> XML tags:\n<tools>\n"
        f"{schema}\n</tools>\n\nFor each function call, return a json object with function name and arguments within "
        '<tool_call></tool_call> XML tags:\n<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n'
        "</tool_call><|im_end|><|im_start|>user\nWeather in Bern and Rome?<|im_end|><|im_start|>assistant\n"
        + call % '{"city": "Bern"}'
        + "\n"
        + call % '{"city": "Rome"}'
        + "<|im_end|>"
        "<|im_start|>user\n<tool_response>\nrain\n</tool_response>\n<tool_response>\nsun\n</tool_response><|im_end|>"
        "<|im_start|>assistant\nOne more.\n" + call % "{}" + "<|im_end|>"
    )
    for tools in ([weather], [json.loads(schema)]):
        assert processor.apply_chat_template(messages, tools=tools) == expected
    [ids] = processor.apply_chat_template(messages, tools=[weather], tokenize=True)
    assert ids == processor(text=expected)["input_ids"][0]


CONTROLS = ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|vision_pad|>", "<|box_start|>", "<image>", "<video>"]
HALVES = ["<|im_", "end|>", "<", "|im_end|>", "<ima", "ge>", "<|vision_pad|", ">", "user\n", " ", "x", "\n"]


@settings(max_examples=150, deadline=None)
@given(texts=st.lists(st.lists(st.sampled_from(CONTROLS + HALVES), max_size=4).map("".join), min_size=1, max_size=6))
def test_what_is_said_never_becomes_a_control_token(processor, texts):
    content = [{"type": "text", "text": text} for text in texts]
    spoken = "".join(texts)
    messages = [
        {"role": "system", "content": content},
        {"role": "user", "content": content},
        {"role": "assistant", "content": spoken, "tool_calls": [{"name": spoken, "arguments": {spoken: [spoken]}}]},
        {"role": "tool", "content": content},
    ]
    tools = [{"name": spoken, "parameters": {spoken: spoken}}]
    kwargs = {"tools": tools, "add_generation_prompt": True}
    [ids] = processor.apply_chat_template(messages, tokenize=True, **kwargs)
    assert [i for i in ids if i >= PAD and i not in (151657, 151658)] == [IM_START, IM_END] * 4 + [IM_START]
    assert processor.decode(ids) == processor.apply_chat_template(messages, **kwargs)
    prefill = processor.apply_chat_template(messages[:2], tokenize=True, tools=tools, continue_final_message=True)
    assert prefill[0].count(IM_END) == 1


def test_a_picture_stands_where_its_part_does_whatever_users_write(processor, picture):
    wide = picture(WIDE)
    content = [{"type": "text", "text": "<image><|vision_pad|><im"}, {"type": "image", "image": wide}, "age> <image>"]
    inputs = processor.apply_chat_template([{"role": "user", "content": content}], tokenize=True, return_dict=True)
    assert (inputs["input_ids"] == IMAGE).sum() == 3 * 4
    decoded = processor.decode(inputs["input_ids"][0])
    assert decoded.endswith("</Image>age> <image><|im_end|>")
    assert "user\n<image><|vision_pad|><im<Image><tile_1><|vision_pad|>" in decoded


def test_template_variables_are_text_but_for_tokens(processor):
    template = "{{ eos_token }}{{ name }}{{ my_token }}{{ messages[0].content }}"
    messages = [{"role": "user", "content": "hi"}]
    given_ids = processor.apply_chat_template(
        messages, chat_template=template, tokenize=True, name="<|im_end|>", my_token="<|im_start|>"
    )
    assert [i for i in given_ids[0] if i >= PAD] == [IM_END, IM_START]


def test_all_sources_of_a_picture(processor, picture, tmp_path):
    image = picture(WIDE)
    path = tmp_path / "picture.png"
    image.save(path)
    data = path.read_bytes()
    text = base64.b64encode(data).decode()
    array = np.array(image)
    sources = [{"image": image}, {"image": str(path)}, {"image": data}, {"image": array}, {"path": path}]
    sources += [{"url": str(path)}, {"base64": text}, {"image": f"data:image/png;base64,{text}"}]
    sources += [{"image": torch.from_numpy(array).permute(2, 0, 1)}, {"type": "image_url", "image_url": str(path)}]
    sources += [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{text}"}}]
    expected = processor.image_processor(image)["pixel_values"]
    for source in sources:
        messages = [{"role": "user", "content": [{"type": "image", **source}, {"type": "text", "text": "What?"}]}]
        inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True)
        assert torch.equal(inputs["pixel_values"], expected), source.keys()
        assert "\n<image>\nWhat?<|im_end|>" in processor.apply_chat_template(messages)
    assert messages[0]["content"][0]["type"] == "image_url"  # the caller's messages are left as they were


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    av = pytest.importorskip("av")
    path = tmp_path_factory.mktemp("video") / "video.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for shade in range(0, 240, 20):
            frame = av.VideoFrame.from_ndarray(np.full((48, 64, 3), shade, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def test_a_video_is_what_load_video_gives_to_chat(base_model, processor, video):
    tiles, num_patches = load_video(video, num_segments=5, input_size=56)
    with mock.patch.object(base_model, "generate", side_effect=base_model.generate) as generate:
        question = video_prefix(5) + "What happens?"
        base_model.chat(processor.tokenizer, tiles, question, {"max_new_tokens": 1}, num_patches_list=num_patches)
    expected = generate.call_args.kwargs
    for source in ({"video": str(video)}, {"video": video.read_bytes()}, {"path": video}):
        messages = [
            {"role": "user", "content": [{"type": "video", **source}, {"type": "text", "text": "What happens?"}]}
        ]
        options = {"tokenize": True, "return_dict": True, "add_generation_prompt": True}
        inputs = processor.apply_chat_template(messages, processor_kwargs={"num_frames": 5}, **options)
        assert torch.equal(inputs["input_ids"], expected["input_ids"])
        assert torch.equal(inputs["pixel_values"], tiles)
    rendered = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(text=rendered, videos=str(video), num_frames=5, return_tensors="pt")
    assert torch.equal(inputs["input_ids"], expected["input_ids"])
    with pytest.raises(ValueError, match="do_sample_frames=False needs a video's frames"):
        processor(text=rendered, videos=str(video), do_sample_frames=False)


def test_videos_as_frames_between_pictures(processor, picture):
    wide, tall, small = picture(WIDE), picture(TALL), picture(SMALL)
    text = "<image> <video><image>"
    inputs = processor(text=text, images=[wide, small], videos=[[tall, wide, tall]], return_tensors="pt")
    frames = processor.image_processor([tall, wide, tall], crop_to_patches=False)["pixel_values"]
    pictures = processor.image_processor([wide, small])["pixel_values"]
    assert torch.equal(inputs["pixel_values"], torch.cat([pictures[:3], frames, pictures[3:]]))
    assert "Frame1: <Image><tile_global_thumbnail><|vision_pad|>" in processor.decode(inputs["input_ids"][0])
    two = processor(text="<video>", videos=[tall, wide, tall], num_frames=2, return_tensors="pt")
    assert torch.equal(two["pixel_values"], frames[[0, 2]]) or torch.equal(two["pixel_values"], frames[[0, 1]])
    array = np.zeros((4, 56, 56, 3), np.uint8)
    assert processor(text="<video>", videos=array, return_tensors="pt")["pixel_values"].shape == (4, 3, 56, 56)


def test_tile_tags_are_the_processors(base_model, make_processor, picture):
    wide, tall = picture(WIDE), picture(TALL)
    config = NVLM_D_Config(**{**base_model.config.to_dict(), "tile_tag": "2d_grid", "thumbnail_tag": "<tile_global>"})
    processor = make_processor(tile_tag="2d_grid", thumbnail_tag="<tile_global>")
    question = "<image>\n<image>\nCompare."
    with mock.patch.object(base_model, "config", config):
        expected = asked_by_chat(base_model, processor.tokenizer, question, [wide, tall], tile_grids=[(2, 1), (1, 3)])
    messages = messages_of(question, None, [wide, tall])
    inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, add_generation_prompt=True)
    assert torch.equal(inputs["input_ids"], expected["input_ids"])
    assert "<tile_x0_y2>" in processor.decode(inputs["input_ids"][0])


@pytest.mark.parametrize("answer", ["Plain.", "\n\nLines\n", "e\u0301", "\u0301x", "\U0001f600", "<|im_end|>", ""])
def test_assistant_masks_mark_the_assistants_tokens(processor, picture, answer):
    messages = [
        {"role": "user", "content": parts("<image>\nWhat?", [picture(WIDE)])},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": "And?"},
        {"role": "assistant", "content": "Done."},
    ]
    kwargs = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True, "return_tensors": None}
    long, short = messages, messages[2:]
    inputs = processor.apply_chat_template([long, short], padding=True, **kwargs)
    rows = zip(inputs["input_ids"], inputs["assistant_masks"], strict=True)
    said = [[i for i, mark in zip(ids, marks, strict=True) if mark] for ids, marks in rows]
    assert said[1] == [17453, 13, IM_END]
    assert said[0][-3:] == said[1]
    decoded = processor.decode(said[0][:-3])
    assert answer in decoded.removesuffix("<|im_end|>") or decoded == "\né<|im_end|>" or "\u0301" in answer
    assert sum(inputs["assistant_masks"][1][: -len(said[1])]) == 0


def test_truncation_and_padding_of_messages(processor, picture):
    text = [{"role": "user", "content": "word " * 50}]
    options = {"truncation": True, "max_length": 20, "padding": "max_length"}
    [ids] = processor.apply_chat_template(text, tokenize=True, processor_kwargs=options)
    assert len(ids) == 20
    [ids] = processor.apply_chat_template(text, tokenize=True, padding="max_length", max_length=99)
    assert len(ids) == 99
    assert ids[0] == PAD
    messages = [{"role": "user", "content": [{"type": "image", "image": picture(WIDE)}]}]
    with pytest.raises(ValueError, match=r"hold 0 <\|vision_pad\|> for 12 features"):
        processor.apply_chat_template(messages, tokenize=True, processor_kwargs={"truncation": True, "max_length": 9})
    with pytest.raises(ValueError, match=r"hold 0 <\|vision_pad\|> for 12 features"):
        processor(text="<image>", images=picture(WIDE), truncation=True, max_length=2)


USER = [{"role": "user", "content": "Hi"}]
REFUSED = [
    (lambda p, i: p(text="<image> <image>", images=[i]), r"found \[2\], passed \[1\]"),
    (lambda p, i: p(text=["<image>", "<image>"], images=[[i, i], []]), r"found \[1, 1\], passed \[2, 0\]"),
    (lambda p, i: p(text="<|vision_pad|>"), r"found \[1\], passed \[\]"),
    (lambda p, i: p(text="no video", videos=[[i]]), r"found \[0\], passed \[1\]. Put one <video>"),
    (lambda p, i: p(text="a", max_patchs=3), r"does not take \['max_patchs'\]"),
    (lambda p, i: p(text="<video>", videos=[[i]], fps=2), r"Videos do not take \['fps'\]"),
    (lambda p, i: p(), "needs text, images or videos"),
    (lambda p, i: p(text=[]), "text must be a str or a list of at least one str"),
    (lambda p, i: p(text=[["a"]]), "text must be a str"),
    (lambda p, i: p.apply_chat_template([], tokenize=True), "at least one"),
    (lambda p, i: p.apply_chat_template(["Hi"], tokenize=True), "one of its messages|at least one"),
    (lambda p, i: p.apply_chat_template([{"content": "Hi"}]), "one of its messages is"),
    (
        lambda p, i: p.apply_chat_template([{"role": "user", "content": [{"type": "image"}]}], tokenize=True),
        r"found \[1\], passed \[0\]",
    ),
    (
        lambda p, i: p.apply_chat_template([{"role": "user", "content": [{"type": "image", "base64": "@"}]}]),
        "damaged base64",
    ),
    (lambda p, i: p.apply_chat_template(USER, tokenize=True, return_offsets_mapping=True), "Messages do not take"),
    (lambda p, i: p.apply_chat_template(USER, tokenize=True, padding="most"), "padding is 'most'"),
    (lambda p, i: p.apply_chat_template(USER, tokenize=True, truncation=True), "needs max_length"),
    (
        lambda p, i: p.apply_chat_template(USER, continue_final_message=True, add_generation_prompt=True),
        "leaves the last turn open",
    ),
    (lambda p, i: NVLM_D_Processor(p.image_processor, p.tokenizer, tile_tag="3d"), "tile_tag is '3d'"),
]


@pytest.mark.parametrize(("call", "message"), REFUSED)
def test_what_does_not_fit_is_refused(processor, picture, call, message):
    with pytest.raises(ValueError, match=message):
        call(processor, picture(WIDE))


@pytest.mark.parametrize(
    "message", [{"role": "bot", "content": "Hi"}, {"role": "user", "content": [{"type": "audio", "audio": "x"}]}]
)
def test_the_template_refuses_what_the_model_does_not_know(processor, message):
    with pytest.raises(jinja2.TemplateError, match="Unknown"):
        processor.apply_chat_template([message])


def test_a_missing_picture_is_named(processor, tmp_path):
    messages = [{"role": "user", "content": [{"type": "image", "url": "https://example.com/a.png"}]}]
    with pytest.raises(FileNotFoundError, match=r"example\.com.*download URLs first"):
        processor.apply_chat_template(messages, tokenize=True)


def test_pipeline(base_model, processor, picture):
    pipe = pipeline("image-text-to-text", model=base_model, processor=processor)
    messages = [{"role": "user", "content": parts("<image>\nWhat?", [picture(WIDE)])}]
    inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, add_generation_prompt=True)
    expected = base_model.generate(**inputs, max_new_tokens=4, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    options = {"max_new_tokens": 4, "do_sample": False}
    [answer] = pipe(text=messages, return_full_text=False, generate_kwargs=options)
    assert answer["generated_text"] == processor.batch_decode(expected, skip_special_tokens=True)[0]


def test_shipped_settings_are_the_defaults_and_the_configs(repository):
    shipped = json.loads((repository / "processor_config.json").read_text())
    config = NVLM_D_Config.from_pretrained(repository)
    assert shipped["image_seq_length"] == config.num_image_token
    assert (shipped["tile_tag"], shipped["thumbnail_tag"]) == (config.tile_tag, config.thumbnail_tag)


# What a user's script does, in a process that has no package `nvlm`: only the folder's own code is there.
SCRIPT = """
import sys, json
sys.modules["nvlm"] = None
import torch
from transformers import AutoImageProcessor, AutoModelForCausalLM, AutoProcessor
path, saved, picture = sys.argv[1:]
processor = AutoProcessor.from_pretrained(path, trust_remote_code=True)
image_processor = AutoImageProcessor.from_pretrained(path, trust_remote_code=True)
assert torch.equal(image_processor(picture)["pixel_values"], processor(images=picture)["pixel_values"])
content = [{"type": "image", "path": picture}, {"type": "text", "text": "What?"}]
messages = [{"role": "user", "content": content}]
options = dict(tokenize=True, return_dict=True, add_generation_prompt=True)
inputs = processor.apply_chat_template(messages, **options)
model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, trust_remote_code=True)
output = model.generate(**inputs, max_new_tokens=3, do_sample=False)
processor.save_pretrained(saved)
again = AutoProcessor.from_pretrained(saved, trust_remote_code=True)
assert torch.equal(again.apply_chat_template(messages, **options)["input_ids"], inputs["input_ids"])
assert again.image_processor.size == processor.image_processor.size
print(json.dumps({"ids": output[0].tolist(), "module": type(processor).__module__}))
"""


def test_auto_classes_load_it_from_a_folders_own_code(base_model, checkpoint, repository, processor, picture, tmp_path):
    assert isinstance(base_model, NVLM_D_Model)
    folder = tmp_path / "checkpoint"
    shutil.copytree(checkpoint("base"), folder)
    for module in repository.glob("*.py"):
        if module.name != "__init__.py":
            shutil.copy(module, folder)
    shutil.copy(repository / "chat_template.jinja", folder)
    for name, changes in {
        "processor_config.json": {"image_seq_length": 4},
        "preprocessor_config.json": {"size": {"height": 56, "width": 56}},
    }.items():
        (folder / name).write_text(json.dumps({**json.loads((repository / name).read_text()), **changes}))
    image = tmp_path / "picture.png"
    picture(WIDE).save(image)
    arguments = [sys.executable, "-c", SCRIPT, str(folder), str(tmp_path / "saved"), str(image)]
    result = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr[-3000:]
    answer = json.loads(result.stdout.splitlines()[-1])
    assert answer["module"].startswith("transformers_modules.")
    messages = [{"role": "user", "content": parts("<image>\nWhat?", [str(image)])}]
    inputs = processor.apply_chat_template(messages, tokenize=True, return_dict=True, add_generation_prompt=True)
    assert answer["ids"] == base_model.generate(**inputs, max_new_tokens=3, do_sample=False)[0].tolist()
