"""The image processor: `load_image`'s tiles, under transformers' names."""

import json

import numpy as np
import pytest
import torch
from PIL import Image

from nvlm import NVLM_D_Config, load_image
from nvlm.image_processing_nvlm_d import NVLM_D_ImageProcessor

SIZES = [(200, 100), (90, 260), (56, 56), (400, 30)]


@pytest.fixture(scope="module")
def pictures():
    generator = np.random.default_rng(0)
    return [Image.fromarray(generator.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in SIZES]


@pytest.fixture(scope="module")
def processor():
    return NVLM_D_ImageProcessor(size=56)


def test_tiles_are_those_of_load_image(processor, pictures):
    expected = [load_image(picture, input_size=56, max_num=6) for picture in pictures]
    for images in (pictures, [pictures[:1], pictures[1:]], tuple(pictures)):
        features = processor(images, return_tensors="pt")
        assert torch.equal(features["pixel_values"], torch.cat(expected))
        assert features["num_patches"].tolist() == [len(tiles) for tiles in expected]
    assert features["pixel_values"].dtype == torch.float32
    assert isinstance(processor(pictures[0])["num_patches"], list)
    assert isinstance(processor(pictures[0], return_tensors="np")["pixel_values"], np.ndarray)


def test_all_forms_of_a_picture_give_the_same_tiles(processor, pictures, tmp_path):
    picture = pictures[0]
    expected = processor(picture)["pixel_values"]
    path = tmp_path / "picture.png"
    picture.save(path)
    array = np.array(picture)
    with path.open("rb") as file:
        forms = [str(path), path, path.read_bytes(), file, array, array.transpose(2, 0, 1), array / 255.0]
        forms += [torch.from_numpy(array), torch.from_numpy(array).permute(2, 0, 1), array[None]]
        for form in forms:
            assert torch.equal(processor(form)["pixel_values"], expected), type(form)


def test_options_are_those_of_the_object_or_of_one_call(pictures):
    picture = pictures[0]
    assert len(NVLM_D_ImageProcessor(size=56, max_patches=1)(picture)["pixel_values"]) == 1
    processor = NVLM_D_ImageProcessor(size={"height": 28, "width": 28}, use_thumbnail=False)
    assert processor(picture)["pixel_values"].shape == (2, 3, 28, 28)
    assert processor(picture, use_thumbnail=True)["pixel_values"].shape == (3, 3, 28, 28)
    assert processor(picture, crop_to_patches=False, size=14)["pixel_values"].shape == (1, 3, 14, 14)
    assert processor(picture, min_patches=6)["num_patches"] == [6]


def test_values_can_be_scaled_otherwise(processor):
    array = np.arange(56 * 56 * 3, dtype=np.uint32).reshape(56, 56, 3) % 256
    array = array.astype(np.uint8)  # a picture of one tile: nothing is resized
    levels = torch.from_numpy(array).permute(2, 0, 1)[None].float()  # [1, 3, 56, 56]
    assert torch.equal(processor(array, do_rescale=False, do_normalize=False)["pixel_values"], levels)
    torch.testing.assert_close(processor(array, do_normalize=False)["pixel_values"], levels / 255)
    halves = processor(array, image_mean=[0.5, 0.5, 0.5], image_std=0.5)["pixel_values"]
    torch.testing.assert_close(halves, levels / 127.5 - 1)
    explicit = processor(array, image_mean=(0.485, 0.456, 0.406), rescale_factor=1 / 255)["pixel_values"]
    assert torch.equal(explicit, processor(array)["pixel_values"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"do_resize": False}, "do_resize=False, which is always True"),
        ({"max_patchs": 3}, "max_patchs=3"),
        ({"size": {"height": 56, "width": 28}}, "expected a square tile"),
        ({"size": {"shortest_edge": 56}}, "expected a square tile"),
        ({"max_patches": 0}, "max_num"),
    ],
)
def test_what_cannot_be_done_is_refused(processor, pictures, options, message):
    with pytest.raises(ValueError, match=message):
        processor(pictures[0], **options)


def test_settings_that_change_nothing_are_accepted(processor, pictures):
    expected = processor(pictures[0])["pixel_values"]
    same = processor(pictures[0], do_resize=True, do_convert_rgb=True, resample=3, data_format="channels_first")
    assert torch.equal(same["pixel_values"], expected)


@pytest.mark.parametrize("options", [{}, {"use_thumbnail": False}, {"max_patches": 12}, {"crop_to_patches": False}])
def test_number_of_tiles_is_told_without_the_picture(processor, pictures, options):
    counts = [processor.get_number_of_image_patches(h, w, options) for w, h in SIZES]
    assert counts == processor(pictures, **options)["num_patches"]
    grids = processor.tile_grids(pictures, **options)
    assert [columns * rows for columns, rows in grids] == [
        count - int(count > 1 and options.get("use_thumbnail", True)) for count in counts
    ]


def test_saved_and_loaded(processor, pictures, tmp_path):
    NVLM_D_ImageProcessor(size=56, max_patches=3, image_mean=[0.5] * 3).save_pretrained(tmp_path)
    loaded = NVLM_D_ImageProcessor.from_pretrained(tmp_path, min_patches=2)
    assert loaded.size == {"height": 56, "width": 56}
    assert (loaded.min_patches, loaded.max_patches, loaded.image_mean) == (2, 3, [0.5] * 3)


def test_shipped_settings_are_the_defaults_and_the_configs(repository):
    shipped = json.loads((repository / "preprocessor_config.json").read_text())
    defaults = NVLM_D_ImageProcessor().to_dict()
    assert {name: shipped[name] for name in defaults if name in shipped and name != "auto_map"} == {
        name: value for name, value in defaults.items() if name in shipped
    }
    of_config = NVLM_D_ImageProcessor.from_model_config(NVLM_D_Config.from_pretrained(repository)).to_dict()
    assert {name: shipped[name] for name in of_config if name in shipped} == {
        name: value for name, value in of_config.items() if name in shipped
    }


def test_a_config_says_how_pictures_are_cut_and_options_overrule_it():
    config = NVLM_D_Config(
        force_image_size=56, dynamic_image_size=False, min_dynamic_patch=2, max_dynamic_patch=3, use_thumbnail=False
    )
    config.vision_config.image_size = 56
    cut = NVLM_D_ImageProcessor.from_model_config(config)
    assert cut.size == {"height": config.tile_size, "width": config.tile_size} == {"height": 56, "width": 56}
    assert (cut.crop_to_patches, cut.min_patches, cut.max_patches, cut.use_thumbnail) == (False, 2, 3, False)
    other = NVLM_D_ImageProcessor.from_model_config(config, max_patches=9, use_thumbnail=True)
    assert (other.min_patches, other.max_patches, other.use_thumbnail) == (2, 9, True)
