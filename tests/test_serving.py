"""Served prompts are those of `chat()`, and nothing that a user writes becomes a control token; without vLLM here.

The last tests run the checks where vLLM (`serving/install_vllm.sh .cache/vllm-venv`) and what `transformers serve`
needs (`pip install --target .cache/transformers-serving fastapi uvicorn openai`) are installed.
"""

import json
import subprocess
import sys
import textwrap
from types import ModuleType, SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoTokenizer

from nvlm import NVLM_D_Config, NVLM_D_ImageProcessor, NVLM_D_Model, NVLM_D_Processor
from nvlm.conversation import Control
from nvlm.prompt import control_token_id, encode_prompt, picture_segments
from nvlm.serving import plugin, transformers_check, transformers_serve
from nvlm.serving.cases import Case, all_cases, as_question, draw
from nvlm.serving.check import Comparison, largest_difference, table
from nvlm.serving.process import ServerProcess, free_port
from nvlm.serving.prompts import chat_segments, expand_pictures
from nvlm.serving.random_checkpoint import CONFIG, random_weights
from nvlm.serving.reference import Generated
from nvlm.serving.server import Answer
from nvlm.serving.transformers_check import TextComparison, streamed_text
from nvlm.tile_tags import tile_tags

TILE = 28
CASES = all_cases(TILE, max_length=20)
PAD = "<|vision_pad|>"


@pytest.fixture(scope="module")
def small_tokenizer(repository, tmp_path_factory):
    """A tokenizer of the same kind with few tokens: bytes, four merges, and the added tokens behind them."""
    folder = tmp_path_factory.mktemp("small-tokenizer")
    merges = ["> <", ">< t", "> Ċ", "< I"]
    tokens = [*sorted(ByteLevel.alphabet()), *(merge.replace(" ", "") for merge in merges)]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    config = json.loads((repository / "tokenizer_config.json").read_text())
    added = config["added_tokens_decoder"].values()
    config["added_tokens_decoder"] = {str(len(tokens) + i): token for i, token in enumerate(added)}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    loaded = AutoTokenizer.from_pretrained(folder)
    assert control_token_id(loaded, PAD) < 300
    return loaded


@pytest.fixture(scope="module", params=["qwen2", "small"])
def any_tokenizer(request, tokenizer, small_tokenizer):
    return tokenizer if request.param == "qwen2" else small_tokenizer


@pytest.fixture(scope="module")
def processor(any_tokenizer, repository):
    template = (repository / "chat_template.jinja").read_text()
    image_processor = NVLM_D_ImageProcessor(size=TILE)
    return NVLM_D_Processor(image_processor, any_tokenizer, image_seq_length=4, chat_template=template)


def segments_of(processor, messages, **variables):
    def render(shielded, options):
        return processor.tokenizer.apply_chat_template(
            shielded, chat_template=processor.chat_template, tokenize=False, **options
        )

    return chat_segments(processor.tokenizer, messages, {"add_generation_prompt": True, **variables}, render)


def without_urls(messages):
    """Messages as vLLM hands them to a template."""
    return [
        {**message, "content": [part if part["type"] == "text" else {"type": "image"} for part in message["content"]]}
        if isinstance(message["content"], list)
        else message
        for message in messages
    ]


def picture_ids(processor, num_tiles):
    tags = tile_tags(num_tiles)
    return encode_prompt(processor.tokenizer, picture_segments(tags, num_image_token=4, image_token=PAD))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_served_prompt_has_the_processors_ids(processor, case):
    tokenizer = processor.tokenizer
    ids = encode_prompt(tokenizer, segments_of(processor, without_urls(case.messages)))
    num_tiles = processor.image_processor([picture.data for picture in case.pictures])["num_patches"]
    pictures = [picture_ids(processor, n) for n in num_tiles]
    pad = control_token_id(tokenizer, PAD)
    expanded, places = expand_pictures(tokenizer, ids, pictures, image_token_id=pad)
    expected = processor.apply_chat_template(case.messages, add_generation_prompt=True, tokenize=True)
    assert [expanded] == expected
    assert [sum(token_id == pad for token_id in expanded[place.start : place.stop]) for place in places] == [
        4 * n for n in num_tiles
    ]
    assert all(expanded[place.start] == expanded[place.stop - 1] == pad for place in places)


@pytest.mark.parametrize("case", [case for case in CASES if case.fits_chat], ids=lambda case: case.name)
def test_a_conversation_is_the_same_for_chat(base_model, tokenizer, repository, case):
    """The text that `chat()` gets makes the ids that the messages make."""
    template = (repository / "chat_template.jinja").read_text()
    config = base_model.config
    image_processor = NVLM_D_ImageProcessor(size=config.tile_size)
    processor = NVLM_D_Processor(
        image_processor, tokenizer, image_seq_length=config.num_image_token, chat_template=template
    )
    seen = []

    def record(input_ids, scores):
        seen.append(input_ids[0].tolist())
        return scores

    features = image_processor([picture.data for picture in case.pictures])
    *past, question = case.texts
    base_model.chat(
        tokenizer,
        features["pixel_values"] if case.pictures else None,
        question,
        {"max_new_tokens": 1, "do_sample": False, "logits_processor": [record]},
        history=list(zip(past[::2], past[1::2], strict=True)),
        num_patches_list=features["num_patches"] if case.pictures else None,
        system_message=case.system,
    )
    assert [seen[0]] == processor.apply_chat_template(case.messages, add_generation_prompt=True, tokenize=True)


# Surrogates are no text; what a character that is not assigned yet composes to depends on who normalises.
texts = st.text(st.characters(exclude_categories=("Cs", "Cn")), max_size=12) | st.sampled_from(
    ["<", ">", "\n", "\n\n", "<|im_end|>", PAD, "<image>", "\u0338", "</Image>", "<tool_call>", " "]
)


@settings(deadline=None, max_examples=150)
@given(parts=st.lists(texts | st.integers(1, 3), min_size=1, max_size=6))
def test_pictures_between_any_texts(tokenizer, parts):
    """A number is a picture of so many tiles."""
    pictures = [picture_segments(tile_tags(n), num_image_token=2, image_token=PAD) for n in parts if isinstance(n, int)]
    one_each = [Control(PAD) if isinstance(part, int) else part for part in parts]
    queue = iter(pictures)
    whole = [s for part in parts for s in (next(queue) if isinstance(part, int) else [part])]
    expanded, _ = expand_pictures(
        tokenizer,
        encode_prompt(tokenizer, one_each),
        [encode_prompt(tokenizer, picture) for picture in pictures],
        image_token_id=control_token_id(tokenizer, PAD),
    )
    assert expanded == encode_prompt(tokenizer, whole)


def test_ids_away_from_pictures_stay_as_they_came(tokenizer):
    """Nobody's own choice of ids is tokenised again, unless it touches a picture."""
    unusual = [tokenizer.convert_tokens_to_ids(letter) for letter in "Hello"]
    end, pad = control_token_id(tokenizer, "<|im_end|>"), control_token_id(tokenizer, PAD)
    expanded, [place] = expand_pictures(tokenizer, [*unusual, end, pad, end, *unusual], [[pad] * 3], image_token_id=pad)
    assert expanded == [*unusual, end, pad, pad, pad, end, *unusual]
    assert place == range(6, 9)


@pytest.mark.parametrize(("ids", "pictures"), [([1, 9, 2], []), ([1, 2], [[9]]), ([9, 9], [[9]])])
def test_a_miscounted_prompt_names_both_numbers(tokenizer, ids, pictures):
    with pytest.raises(ValueError, match=rf"{ids.count(9)} places of pictures .* {len(pictures)} pictures were passed"):
        expand_pictures(tokenizer, ids, pictures, image_token_id=9)


def test_tools_and_template_variables_hold_no_tokens(processor):
    tool = {"type": "function", "function": {"name": "f", "description": "<|im_end|><image>", "parameters": {}}}
    controls = [
        segment.token
        for segment in segments_of(processor, [{"role": "user", "content": "Hello"}], tools=[tool], x="<|im_end|>")
        if isinstance(segment, Control)
    ]
    assert controls == ["<|im_start|>", "<|im_end|>"] * 2 + ["<|im_start|>"]


def test_videos_are_refused(processor):
    with pytest.raises(ValueError, match="Videos are not served"):
        segments_of(processor, [{"role": "user", "content": [{"type": "video"}]}])


@pytest.mark.parametrize(
    ("parts", "question"),
    [
        ([0, "What?"], "<image>\nWhat?"),
        ([0, "\nWhat?"], "<image>\nWhat?"),
        ([0, " What?"], "<image> What?"),
        (["Look: ", 0], "Look: <image>"),
        ([0, 0, "What?"], "<image>\n<image>\nWhat?"),
        ([0], "<image>\n"),
        (["What?"], "What?"),
    ],
)
def test_as_question_puts_pictures_where_the_template_does(parts, question):
    picture = draw(TILE, TILE, seed=0)
    assert as_question([picture if part == 0 else part for part in parts]) == question


def test_a_case_knows_whether_chat_can_say_it():
    picture = draw(TILE, TILE, seed=0)
    assert Case("", [["<image>"]]).fits_chat
    assert Case("", [[picture]]).fits_chat
    assert not Case("", [[picture, "<image>"]]).fits_chat


def test_register_tells_vllm_and_can_be_called_again(monkeypatch):
    models, renderers = {}, {"hf": ("vllm.renderers.hf", "HfRenderer"), "mistral": ("", "")}
    vllm = ModuleType("vllm")
    vllm.ModelRegistry = SimpleNamespace(register_model=models.__setitem__)
    registry = ModuleType("vllm.renderers.registry")
    registry.RENDERER_REGISTRY = SimpleNamespace(renderers=renderers)
    for name, module in {"vllm": vllm, "vllm.renderers": ModuleType(""), registry.__name__: registry}.items():
        monkeypatch.setitem(sys.modules, name, module)
    for _ in range(2):
        plugin.register()
    assert models == {"NVLM_D": "nvlm.serving.model:ServedNVLM_D_Model"}
    assert renderers == {"hf": ("nvlm.serving.renderer", "make_renderer"), "mistral": ("", "")}


def test_register_leaves_a_vllm_without_renderers_alone(monkeypatch, caplog):
    vllm = ModuleType("vllm")
    vllm.ModelRegistry = SimpleNamespace(register_model=lambda *_: None)
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    monkeypatch.setitem(sys.modules, "vllm.renderers.registry", None)
    plugin.register()
    assert "needs vLLM 0.32" in caplog.text


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_transformers_serve_makes_the_processors_prompt(processor, case):
    """By transformers' own reading of a request, and the call that its server makes of the processor."""
    handler = pytest.importorskip("transformers.cli.serving.utils")
    messages = handler.BaseHandler.get_processor_inputs_from_messages(case.messages, handler.Modality.MULTIMODAL)
    inputs = processor.apply_chat_template(
        messages,
        add_generation_prompt=True,
        tools=None,
        return_tensors="pt",
        return_dict=True,
        tokenize=True,
        load_audio_from_video=False,
    )
    expected = processor.apply_chat_template(case.messages, add_generation_prompt=True, tokenize=True)
    assert inputs["input_ids"].tolist() == expected
    pictures = [picture.data for picture in case.pictures]
    assert ("pixel_values" in inputs) == bool(pictures)
    if pictures:
        assert torch.equal(inputs["pixel_values"], processor.image_processor(pictures)["pixel_values"])


def test_transformers_serve_loads_nvlm_d_as_a_multimodal_model(repository, monkeypatch):
    manager = pytest.importorskip("transformers.cli.serving.model_manager")
    from transformers import AutoModelForMultimodalLM
    from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES

    options = {"device": "cpu", "dtype": "float32", "force_model": str(repository / "tiny" / "checkpoint")}
    with pytest.raises(AttributeError, match="NVLM_D"):
        manager.ModelManager(**options)
    with monkeypatch.context() as tables:  # what `register` writes there is taken away again
        tables.setitem(MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES, "NVLM_D", "")
        tables.setitem(AutoModelForMultimodalLM._model_mapping._extra_content, NVLM_D_Config, None)
        for _ in range(2):
            transformers_serve.register()
        [loaded] = manager.ModelManager(**options).loaded_models.values()
        assert type(loaded.model) is NVLM_D_Model
        assert type(loaded.processor) is NVLM_D_Processor
        modality = manager.ModelManager.get_model_modality(loaded.model, processor=loaded.processor)
    assert modality.value == "MULTIMODAL"


def test_the_random_checkpoint_loads_and_its_dummy_heads_are_zero():
    weights = random_weights(CONFIG)
    config = NVLM_D_Config(**CONFIG)
    width, inner = config.vision_config.hidden_size, 12 * 32
    assert inner - width == 7 * 32
    for layer in range(config.vision_config.num_hidden_layers):
        attention = f"vision_model.encoder.layers.{layer}.attn"
        qkv = weights[f"{attention}.qkv.weight"].view(3, inner, width)
        assert not qkv[:, width:].any()
        assert qkv[:, :width].all()
        assert not weights[f"{attention}.proj.weight"][:, width:].any()
    with torch.device("meta"):
        model = NVLM_D_Model(config)
    assert {name: tuple(value.shape) for name, value in model.state_dict().items()} == {
        name: tuple(value.shape) for name, value in weights.items()
    }


def test_the_largest_difference_is_taken_until_the_tokens_part():
    own = Generated([1], [2, 0, 1], torch.tensor([[-1.0, -2.0, -0.5], [-0.1, -3.0, -4.0], [-1.0, -1.0, -1.0]]))
    logprobs = [{2: -0.5, 0: -1.01}, {1: -0.2, 0: -0.3}, {1: -9.0}]
    assert largest_difference(Answer(200, "", [1], [2, 1, 1], logprobs), own) == pytest.approx(2.8)
    assert largest_difference(Answer(200, "", [1], [2, 0, 1], logprobs), own) == pytest.approx(8.0)
    assert largest_difference(Answer(500, "no", [], [], []), own) is None


def comparison(**changes):
    fields = {
        "case": "a|b",
        "plugin": True,
        "status": 200,
        "error": "",
        "failing": [],
        "retry": None,
        "same_prompt": True,
        "prompt_lengths": (3, 3),
        "same_tokens": True,
        "steps": 2,
        "difference": 1e-6,
        "difference_same_ids": 1e-6,
        "same_tokens_same_ids": True,
    }
    return Comparison(**{**fields, **changes})


def test_agreement_needs_ids_tokens_and_logprobs():
    assert comparison().agrees
    for change in ({"status": 500}, {"same_prompt": False}, {"same_tokens": False}, {"difference": 2e-3}):
        assert not comparison(**change).agrees
    assert not comparison(difference=None).agrees


def test_the_table_says_what_happened():
    refused = comparison(plugin=False, status=500, retry=200, failing=[400], error="no")
    other = comparison(same_prompt=False, prompt_lengths=(4, 3), difference=None, difference_same_ids=None)
    _, _, equal, failed, differing = table([comparison(), refused, other]).splitlines()
    assert equal == r"| a\|b | yes | 200 | equal | equal | 1.0e-06 | equal, 1.0e-06 |"
    assert failed == r"| a\|b | no | 500, again 200 (after 400) |  |  |  |  |"
    assert differing == r"| a\|b | yes | 200 | differ (4 for 3) | equal |  | other tiles |"


CHILD = textwrap.dedent(
    """
    import json, sys
    from http.server import BaseHTTPRequestHandler, HTTPServer

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.answer(200, "ok")

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.answer(body["status"], body["content"])

        def answer(self, status, content):
            self.send_response(status)
            self.end_headers()
            self.wfile.write(content.encode())

    HTTPServer(("127.0.0.1", int(sys.argv[1])), Handler).serve_forever()
    """
)


def test_a_server_is_started_asked_and_ended(tmp_path):
    port = free_port()
    command = [sys.executable, "-c", CHILD, str(port)]
    with ServerProcess("child", command, {}, port=port, log=tmp_path / "logs" / "child.log") as server:
        assert server.chat({"status": 200, "content": "Grüße"}) == (200, "Grüße")
        assert server.chat({"status": 400, "content": '{"error": {"message": "too long"}}'}) == (400, "too long")
        assert server.chat({"status": 500, "content": "Internal Server Error"}) == (500, "Internal Server Error")
    with pytest.raises(OSError, match="refused"):
        server.chat({"status": 200, "content": ""})


def test_a_server_that_does_not_start_says_why(tmp_path):
    command = [sys.executable, "-c", "raise SystemExit('no such model')"]
    with (
        pytest.raises(RuntimeError, match=r"child ended with status 1\..*child\.log:\nno such model"),
        ServerProcess("child", command, {}, port=free_port(), log=tmp_path / "child.log"),
    ):
        pass


def text_comparison(**changes):
    fields = {
        "case": "a|b",
        "status": 200,
        "error": "",
        "prompt_lengths": (9, 9),
        "new_lengths": (2, 2),
        "texts": ("Hi", "Hi"),
        "streamed": "Hi",
    }
    return TextComparison(**{**fields, **changes})


def test_texts_agree_with_equal_counts_and_streams():
    assert text_comparison().agrees
    assert text_comparison(texts=("Hi\ufffd", "Hi\ufffd")).agrees  # a character whose last bytes did not come
    changes = [{"status": 500}, {"prompt_lengths": (10, 9)}, {"new_lengths": (1, 2)}]
    for change in [*changes, {"texts": ("Hi", "Ho")}, {"streamed": "H"}]:
        assert not text_comparison(**change).agrees


def test_the_table_of_texts_says_what_happened():
    rows = [
        text_comparison(),
        text_comparison(prompt_lengths=(10, 9), texts=("", "Hi")),
        text_comparison(status=500, error="no"),
    ]
    _, _, equal, differing, failed = transformers_check.table(rows).splitlines()
    assert equal == r"| a\|b | 200 | 9 | 2 | equal | equal |"
    assert differing == r"| a\|b | 200 | 10 for 9 | 2 | differ | differ |"
    assert failed == r"| a\|b | 500 |  |  |  |  |"


def test_streamed_text_joins_the_pieces_and_shows_an_error():
    events = [{"choices": [{"delta": {"role": "assistant"}}]}, {"choices": [{"delta": {"content": "Hel"}}]}]
    events += [{"choices": [{"delta": {"content": "lo"}}]}, {"choices": []}, {"error": "; it broke"}]
    body = "\n\n".join(f"data: {json.dumps(event)}" for event in events) + "\n\ndata: [DONE]\n\n"
    assert streamed_text(body) == "Hello; it broke"


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_transformers_serve_gives_this_packages_answers(repository, tmp_path):
    packages = repository / ".cache" / "transformers-serving"
    if not packages.exists():
        pytest.skip(f"no server: run pip install --target {packages} fastapi uvicorn openai")
    checkpoint, out = repository / "tiny" / "checkpoint", tmp_path / "report.json"
    command = [
        sys.executable,
        "-m",
        "nvlm.serving.transformers_check",
        checkpoint,
        "--packages",
        packages,
        "--out",
        out,
    ]
    result = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    report = json.loads(out.read_text())
    assert all(row["agrees"] for row in report["comparisons"])
    assert "has no attribute NVLM_D" in report["alone"]


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_vllm_with_the_plugin_gives_this_packages_answers(repository, tmp_path):
    if not (repository / ".cache" / "vllm-venv" / "bin" / "python").exists():
        pytest.skip("vLLM is not installed: run serving/install_vllm.sh .cache/vllm-venv")
    out = tmp_path / "report.json"
    command = [sys.executable, "-m", "nvlm.serving.check", "--plugin-only", f"--out={out}"]
    result = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-4000:]
    assert all(row["agrees"] for row in json.loads(out.read_text())["comparisons"])
