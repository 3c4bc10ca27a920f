"""Pictures to tiles and prompt ids inside vLLM, by this package's own functions (SPEC 5, 6 and 11)."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from PIL import Image
from transformers import BatchFeature
from vllm.multimodal.inputs import MultiModalFieldConfig, MultiModalKwargsItems
from vllm.multimodal.media import MediaWithBytes
from vllm.multimodal.parse import ImageProcessorItems, MultiModalDataItems, MultiModalDataParser
from vllm.multimodal.processing import (
    BaseDummyInputsBuilder,
    BaseMultiModalProcessor,
    BaseProcessingInfo,
    PromptReplacement,
    PromptUpdate,
)
from vllm.multimodal.processing.processor import PlaceholderFeaturesInfo

from nvlm import NVLM_D_ImageProcessor
from nvlm.conversation import IMAGE_TOKEN
from nvlm.image_processing_nvlm_d import CONFIG_FIELDS
from nvlm.prompt import control_token_id, encode_prompt, picture_segments
from nvlm.serving.prompts import expand_pictures
from nvlm.tile_tags import tile_tags


class PicturesAsSent(MultiModalDataParser):
    """vLLM's parser, but pictures keep their mode and their EXIF header: both are for `load_images` to read."""

    def _parse_image_data(self, data: Any) -> Any:
        pictures = list(data) if isinstance(data, (list, tuple)) else [data]
        if all(isinstance(picture, (Image.Image, MediaWithBytes)) for picture in pictures):
            return ImageProcessorItems(pictures)
        return super()._parse_image_data(data)


class NvlmProcessingInfo(BaseProcessingInfo):
    """What vLLM asks about the pictures of a checkpoint."""

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        """Any number of pictures, and nothing else."""
        return {"image": None}

    def get_data_parser(self) -> MultiModalDataParser:
        """What reads the pictures of a request."""
        return PicturesAsSent(
            expected_hidden_size=self._get_expected_hidden_size(),
            allow_missing_mm_embeddings=self.allow_missing_mm_embeddings,
        )

    def image_processor(self, kwargs: Mapping[str, object]) -> NVLM_D_ImageProcessor:
        """This package's image processor with the config's options, but for those that a request overrides.

        Raises:
            ValueError: an option that is not in `CONFIG_FIELDS`.
        """
        given = self.ctx.get_merged_mm_kwargs(kwargs)
        unknown = sorted(given.keys() - CONFIG_FIELDS.keys())
        if unknown:
            raise ValueError(f"mm_processor_kwargs has {unknown}: expected some of {list(CONFIG_FIELDS)}.")
        options = {CONFIG_FIELDS[field]: value for field, value in given.items()}
        return NVLM_D_ImageProcessor.from_model_config(self.get_hf_config(), **options)

    def picture_ids(self, picture: Any, num_tiles: int, kwargs: Mapping[str, object]) -> list[int]:
        """The ids that stand for a picture: its tags, and `num_image_token` slots a tile."""
        config, image_processor = self.get_hf_config(), self.image_processor(kwargs)
        grid = image_processor.tile_grids([picture])[0] if config.tile_tag.startswith("2d") else None
        tags = tile_tags(
            num_tiles,
            kind=config.tile_tag,
            thumbnail_tag=config.thumbnail_tag,
            has_thumbnail=image_processor.use_thumbnail,
            grid=grid,
            tile_size=config.tile_size,
        )
        segments = picture_segments(tags, num_image_token=config.num_image_token, image_token=IMAGE_TOKEN)
        return encode_prompt(self.get_tokenizer(), segments)

    def check_image_token(self) -> int:
        """The id of the image token.

        Raises:
            ValueError: the config and the tokenizer disagree about it.
        """
        in_config, in_tokenizer = (
            self.get_hf_config().image_token_id,
            control_token_id(self.get_tokenizer(), IMAGE_TOKEN),
        )
        if in_config != in_tokenizer:
            raise ValueError(
                f"config.json has image_token_id {in_config}, but {IMAGE_TOKEN!r} is {in_tokenizer} in the tokenizer: "
                "expected the same. Write the tokenizer's id into config.json, or use the checkpoint's tokenizer."
            )
        return in_tokenizer


class NvlmDummyInputs(BaseDummyInputsBuilder[NvlmProcessingInfo]):
    """The largest pictures, by which vLLM measures how much memory it needs."""

    def get_dummy_text(self, mm_counts: Mapping[str, int]) -> str:
        """A prompt of so many pictures."""
        return IMAGE_TOKEN * mm_counts.get("image", 0)

    def get_dummy_mm_data(self, seq_len: int, mm_counts: Mapping[str, int], mm_options: Any) -> Any:
        """The pictures themselves, each a row of as many tiles as are allowed."""
        image_processor = self.info.image_processor({})
        side = self.info.get_hf_config().tile_size
        pictures = self._get_dummy_images(
            width=side * (image_processor.max_patches if image_processor.crop_to_patches else 1),
            height=side,
            num_images=mm_counts.get("image", 0),
            overrides=mm_options.get("image"),
        )
        return {"image": pictures}


class NvlmMultiModalProcessor(BaseMultiModalProcessor[NvlmProcessingInfo]):
    """Cuts pictures as `load_images` does, and puts them where the prompt's image tokens stand."""

    def __init__(self, info: NvlmProcessingInfo, dummy_inputs: NvlmDummyInputs) -> None:
        super().__init__(info, dummy_inputs)
        self._image_token_id = info.check_image_token()

    def _call_hf_processor(self, hf_data: Mapping[str, Any], hf_kwargs: Mapping[str, object]) -> BatchFeature:
        features = self.info.image_processor(hf_kwargs)(hf_data["images"])
        num_patches = torch.tensor(features["num_patches"])  # [N]
        return BatchFeature(
            {
                "pixel_values_flat": features["pixel_values"].to(self.info.ctx.model_config.dtype),  # [T, 3, S, S]
                "image_num_patches": num_patches,
                "image_token_id": torch.full_like(num_patches, self._image_token_id),
            }
        )

    def _get_mm_fields_config(
        self, hf_inputs: BatchFeature, hf_processor_mm_kwargs: Mapping[str, object]
    ) -> Mapping[str, MultiModalFieldConfig]:
        num_patches = hf_inputs.get("image_num_patches", torch.empty(0))
        return {
            "pixel_values_flat": MultiModalFieldConfig.flat_from_sizes("image", num_patches),
            "image_num_patches": MultiModalFieldConfig.batched("image", keep_on_cpu=True),
            "image_token_id": MultiModalFieldConfig.batched("image", keep_on_cpu=True),
        }

    def _get_prompt_updates(
        self,
        mm_items: MultiModalDataItems,
        hf_processor_mm_kwargs: Mapping[str, object],
        out_mm_kwargs: MultiModalKwargsItems,
    ) -> Sequence[PromptUpdate]:
        def replacement(index: int) -> list[int]:
            picture = mm_items.get_items("image", ImageProcessorItems).get(index)
            num_tiles = int(out_mm_kwargs["image"][index]["image_num_patches"].data)
            return self.info.picture_ids(picture, num_tiles, hf_processor_mm_kwargs)

        return [PromptReplacement(modality="image", target=[self._image_token_id], replacement=replacement)]

    def _apply_prompt_updates(
        self, token_ids: list[int], mm_prompt_updates: Any
    ) -> tuple[list[int], Mapping[str, list[PlaceholderFeaturesInfo]]]:
        pictures = [updates[0].content.full for updates in mm_prompt_updates.get("image", [])]
        image_token_id = self._image_token_id
        ids, places = expand_pictures(self.info.get_tokenizer(), token_ids, pictures, image_token_id=image_token_id)
        infos = [
            PlaceholderFeaturesInfo(
                modality="image",
                item_idx=i,
                start_idx=place.start,
                tokens=ids[place.start : place.stop],
                is_embed=torch.tensor(ids[place.start : place.stop]) == image_token_id,
            )
            for i, place in enumerate(places)
        ]
        return ids, {"image": infos} if infos else {}
