"""Pictures to tiles, as transformers' image processors take and give them (SPEC 5).

The tiles themselves are made by `preprocessing.py`, as for `chat()`.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.image_processing_utils import BaseImageProcessor, BatchFeature
from transformers.processing_utils import ImagesKwargs

from .configuration_nvlm_d import NVLM_D_Config
from .preprocessing import IMAGENET_MEAN, IMAGENET_STD, describe, load_images, open_picture, tile_grid

OPTIONS = (
    "size",
    "crop_to_patches",
    "min_patches",
    "max_patches",
    "use_thumbnail",
    "do_rescale",
    "rescale_factor",
    "do_normalize",
    "image_mean",
    "image_std",
)
# The model's config says how pictures are cut: its fields, and the options that they are.
CONFIG_FIELDS = {
    "dynamic_image_size": "crop_to_patches",
    "min_dynamic_patch": "min_patches",
    "max_dynamic_patch": "max_patches",
    "use_thumbnail": "use_thumbnail",
}
# What is done to every picture; transformers has switches for it, and these are the settings that it has here.
FIXED_OPTIONS: dict[str, Any] = {
    "do_convert_rgb": True,
    "do_resize": True,
    "resample": Image.Resampling.BICUBIC,
    "do_center_crop": False,
    "do_pad": False,
    "data_format": "channels_first",
}


class NVLM_D_ImagesKwargs(ImagesKwargs, total=False):
    """The options that transformers' image processors do not have already; see `NVLM_D_ImageProcessor`."""

    crop_to_patches: bool | None
    min_patches: int | None
    max_patches: int | None
    use_thumbnail: bool | None


def flatten_pictures(pictures: Any) -> list[Any]:
    """The pictures of nested lists, and of arrays or tensors (n, H, W, C) and (n, C, H, W), in one list."""
    if isinstance(pictures, (list, tuple)):
        return [picture for part in pictures for picture in flatten_pictures(part)]
    if isinstance(pictures, (np.ndarray, torch.Tensor)) and pictures.ndim == 4:
        return list(pictures)
    return [pictures]


def channels_last(picture: Any) -> Any:
    """A tensor or array (C, H, W) as an array (H, W, C), the form that `load_image` takes; else the picture itself."""
    if isinstance(picture, torch.Tensor):
        picture = picture.detach().cpu().numpy()
    if isinstance(picture, np.ndarray) and picture.ndim == 3:
        is_first = picture.shape[-1] not in (1, 3, 4) and picture.shape[0] in (1, 3, 4)
        return picture.transpose(1, 2, 0) if is_first else picture
    return picture


class NVLM_D_ImageProcessor(BaseImageProcessor):
    """Cuts pictures into normalised tiles.

    Args:
        size: {"height": S, "width": S}, the sides of a tile in pixels (config: `force_image_size`); an int does too.
        crop_to_patches: whether pictures are cut into tiles, else each is one tile (config: `dynamic_image_size`).
        min_patches, max_patches: bounds of the number of tiles, the thumbnail not counted
            (config: `min_dynamic_patch`, `max_dynamic_patch`).
        use_thumbnail: whether a thumbnail is the last tile of a picture of several tiles.
        do_rescale, rescale_factor: whether the values 0..255 are multiplied by a factor, and by which.
        do_normalize, image_mean, image_std: whether the mean is then subtracted and the result divided by the standard
            deviation, channel by channel. The model was trained with the defaults.

    Each is also an argument of `preprocess`, for one call.

    Raises:
        ValueError: a tile that is not square.
    """

    model_input_names = ["pixel_values"]  # noqa: RUF012
    valid_kwargs = NVLM_D_ImagesKwargs

    def __init__(
        self,
        *,
        size: dict[str, int] | int | None = None,
        crop_to_patches: bool = True,
        min_patches: int = 1,
        max_patches: int = 6,
        use_thumbnail: bool = True,
        do_rescale: bool = True,
        rescale_factor: float = 1 / 255,
        do_normalize: bool = True,
        image_mean: Sequence[float] | None = None,
        image_std: Sequence[float] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        side = tile_side(448 if size is None else size)
        self.size = {"height": side, "width": side}
        self.crop_to_patches = crop_to_patches
        self.min_patches = min_patches
        self.max_patches = max_patches
        self.use_thumbnail = use_thumbnail
        self.do_rescale = do_rescale
        self.rescale_factor = rescale_factor
        self.do_normalize = do_normalize
        self.image_mean = list(IMAGENET_MEAN if image_mean is None else image_mean)
        self.image_std = list(IMAGENET_STD if image_std is None else image_std)

    @classmethod
    def from_model_config(cls, config: NVLM_D_Config, **options: Any) -> "NVLM_D_ImageProcessor":
        """The image processor of a model.

        Args:
            config: the model's; says how its pictures are cut.
            **options: of the class, instead of the config's.
        """
        of_config = {option: getattr(config, field) for field, option in CONFIG_FIELDS.items()}
        return cls(**{"size": config.tile_size, **of_config, **options})

    def preprocess(self, images: Any, **kwargs: Any) -> BatchFeature:
        """Cut pictures into tiles.

        Args:
            images: whatever `load_image` takes (a path, bytes, a file object, a PIL image, an array (H, W, C)), an
                array or a tensor (C, H, W), or nested lists of these.
            return_tensors: "pt" or "np"; None leaves the numbers of tiles in a list.
            **kwargs: the options of the class.

        Returns:
            `pixel_values`: float32 (tiles, 3, S, S), all tiles of all pictures in order, a thumbnail after its
            picture's tiles; `num_patches`: each picture's number of tiles, the thumbnail counted.

        Raises:
            ValueError: an option that does not exist here; and what `load_image` raises.
        """
        tensor_type = kwargs.pop("return_tensors", None)
        options = self.options(kwargs)
        pictures = [channels_last(picture) for picture in flatten_pictures(images)]
        tiles, num_patches = load_images(
            pictures,
            tile_side(options["size"]),
            options["max_patches"],
            min_num=options["min_patches"],
            use_thumbnail=options["use_thumbnail"],
        )
        values = self.scale_values(tiles, options)
        return BatchFeature({"pixel_values": values, "num_patches": num_patches}, tensor_type=tensor_type)

    def options(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The options of one call: those in `kwargs` that are not None, the others as the object has them.

        Raises:
            ValueError: an option that does not exist here, or a value that it cannot have.
        """
        options = {name: getattr(self, name) for name in OPTIONS}
        for name, value in kwargs.items():
            if value is None:
                continue
            if name in OPTIONS:
                options[name] = value
            elif name not in FIXED_OPTIONS or value != FIXED_OPTIONS[name]:
                fixed = f", which is always {FIXED_OPTIONS[name]!r}" if name in FIXED_OPTIONS else ""
                raise ValueError(f"Tiles cannot be made with {name}={value!r}{fixed}: expected one of {list(OPTIONS)}.")
        if not options["crop_to_patches"]:
            options["min_patches"] = options["max_patches"] = 1
        return options

    @staticmethod
    def scale_values(tiles: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
        """Tiles (tiles, 3, S, S) as `load_image` normalises them -> tiles of the values that `options` ask for.

        The defaults are what `load_image` does already. For others the values 0..255 are restored, exactly: they are
        whole numbers.
        """
        factor = options["rescale_factor"] if options["do_rescale"] else 1
        mean, std = per_channel(options["image_mean"]), per_channel(options["image_std"])
        if not options["do_normalize"]:
            mean, std = torch.zeros(1), torch.ones(1)
        released_mean, released_std = per_channel(IMAGENET_MEAN), per_channel(IMAGENET_STD)
        if factor == 1 / 255 and torch.equal(mean, released_mean) and torch.equal(std, released_std):
            return tiles
        values = (tiles * released_std + released_mean).mul_(255).round_()  # [T, 3, S, S]
        return values.mul_(factor).sub_(mean).div_(std)

    def tile_grids(self, images: Any, **kwargs: Any) -> list[tuple[int, int]]:
        """The (columns, rows) that each picture is cut into; the arguments are those of `preprocess`."""
        options = self.options(kwargs)
        pictures = [channels_last(picture) for picture in flatten_pictures(images)]
        return [grid_of(open_picture(picture, describe(picture, "picture")).size, options) for picture in pictures]

    def get_number_of_image_patches(self, height: int, width: int, images_kwargs: dict[str, Any] | None = None) -> int:
        """The number of tiles, the thumbnail counted, that a picture of `height` x `width` pixels is cut into."""
        options = self.options(images_kwargs or {})
        columns, rows = grid_of((width, height), options)
        return columns * rows + int(options["use_thumbnail"] and columns * rows > 1)


def grid_of(size: tuple[int, int], options: dict[str, Any]) -> tuple[int, int]:
    """The grid (columns, rows) of a picture of (width, height) pixels."""
    bounds = {"min_num": options["min_patches"], "max_num": options["max_patches"]}
    return tile_grid(*size, image_size=tile_side(options["size"]), **bounds)


def tile_side(size: Any) -> int:
    """The side of a tile in pixels, out of the forms that transformers has for a size.

    Raises:
        ValueError: it is not one side, or two equal ones.
    """
    sides = [size] if isinstance(size, int) else [size[name] for name in ("height", "width") if name in size]
    if len(set(sides)) != 1:
        raise ValueError(f"size is {size!r}, expected a square tile: {{'height': S, 'width': S}} or S.")
    return sides[0]


def per_channel(values: float | Sequence[float]) -> torch.Tensor:
    """One value for all channels, or one a channel, as a tensor that broadcasts over (tiles, channels, S, S)."""
    return torch.tensor(values, dtype=torch.float32).reshape(-1, 1, 1)
