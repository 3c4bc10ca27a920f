"""The calls of VLMEvalKit's adapter for NVLM-D (its `vlmeval/vlm/nvlm.py`), in our words: they must work unchanged.

It loads the model with `device_map="auto"` in bfloat16, cuts one picture a question into tiles of 448 pixels with its
own torchvision pipeline, and passes `chat` four positional arguments, the last one the same dict each time.
"""

import json
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torchvision.transforms import functional
from transformers import AutoModel, AutoTokenizer

from nvlm import load_image
from nvlm.preprocessing import IMAGENET_MEAN, IMAGENET_STD, tile_grid

TILE = 448
QUESTIONS = [
    "Answer the question using a single word or phrase.\nWhat is in the picture?",
    "Question: Which of <image 1> and <image 2> is larger?\nA. one\nB. two\nPlease select the correct one.",
]


@pytest.fixture(scope="module")
def folder(recipe, random_weights, tokenizer_folder, repository, tmp_path_factory):
    """A tiny checkpoint with tiles of 448 pixels and this repository's code beside it, as `nvlm overlay` leaves one."""
    config = recipe.config_dict("base")
    config["force_image_size"] = config["vision_config"]["image_size"] = TILE
    folder = tmp_path_factory.mktemp("NVLM-D-72B")
    (folder / "config.json").write_text(json.dumps(config))
    weights = {name: 0.1 * tensor for name, tensor in random_weights(config).items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    modules = [module for module in repository.glob("*.py") if module.name != "__init__.py"]
    for file in [*tokenizer_folder.iterdir(), *modules]:
        shutil.copy(file, folder)
    return folder


@pytest.fixture(scope="module")
def adapter(folder):
    """(model, tokenizer, generation options) as the adapter keeps them."""
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True, use_fast=False)
    model = AutoModel.from_pretrained(
        folder,
        torch_dtype=torch.bfloat16,
        low_cpu_mem_usage=True,
        use_flash_attn=False,
        trust_remote_code=True,
        device_map="auto",
    ).eval()
    return model, tokenizer, {"max_new_tokens": 6, "do_sample": False}


def tiles_of(path):
    """A picture cut and normalised by torchvision, tile by tile."""
    picture = Image.open(path).convert("RGB")
    columns, rows = tile_grid(*picture.size, max_num=6, image_size=TILE)
    whole = picture.resize((columns * TILE, rows * TILE))
    corners = [(x * TILE, y * TILE) for y in range(rows) for x in range(columns)]
    tiles = [whole.crop((x, y, x + TILE, y + TILE)) for x, y in corners]
    tiles += [picture.resize((TILE, TILE))] if len(tiles) > 1 else []
    pixels = [functional.to_tensor(functional.resize(tile, [TILE, TILE])) for tile in tiles]
    return torch.stack([functional.normalize(pixel, IMAGENET_MEAN, IMAGENET_STD) for pixel in pixels])


def test_its_calls_work_unchanged(adapter, recipe, tmp_path):
    model, tokenizer, options = adapter
    path = tmp_path / "page.png"
    Image.fromarray(recipe.picture(900, 448, 1)).save(path)
    before = dict(options)
    pixel_values = tiles_of(path).to(torch.bfloat16).to(model.device)
    torch.testing.assert_close(pixel_values, load_image(path, TILE, 6).to(torch.bfloat16), rtol=1e-2, atol=1e-2)
    for question in QUESTIONS:
        response = model.chat(tokenizer, pixel_values, question, options)
        assert isinstance(response, str)
        assert options == before
        in_front = model.chat(
            tokenizer, pixel_values, f"<image>\n{question}", dict(before), num_patches_list=[len(pixel_values)]
        )
        assert response == in_front
    nothing = torch.zeros_like(pixel_values)
    assert model.chat(tokenizer, nothing, QUESTIONS[0], options) != model.chat(
        tokenizer, pixel_values, QUESTIONS[0], options
    )
