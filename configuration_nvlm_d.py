"""The configuration of NVLM-D: a vision encoder, a projector and a decoder (SPEC 1)."""

import copy
from typing import Any

from transformers import AutoConfig, LlamaConfig, PretrainedConfig, Qwen2Config

from .configuration_intern_vit import InternVisionConfig, require, require_positive_int
from .conversation import TEMPLATES
from .tile_tags import TAG_KINDS

DECODER_CONFIGS: dict[str, type[PretrainedConfig]] = {
    "Qwen2ForCausalLM": Qwen2Config,
    "LlamaForCausalLM": LlamaConfig,
}


def encoder_config(values: dict[str, Any] | PretrainedConfig | None) -> PretrainedConfig:
    """The encoder's config object."""
    if isinstance(values, PretrainedConfig):
        return values
    return InternVisionConfig(**{key: value for key, value in (values or {}).items() if key != "model_type"})


def decoder_config(values: dict[str, Any] | PretrainedConfig | None) -> PretrainedConfig:
    """The decoder's config object.

    `architectures` decides over `model_type`, because the published file says `model_type: "llama"` of a Qwen2.

    Raises:
        ValueError: neither field names a decoder that NVLM-D is made of.
    """
    if values is None:
        return Qwen2Config(architectures=["Qwen2ForCausalLM"])
    if not isinstance(values, dict):
        return values
    named = values.get("architectures") or []
    if not named:
        model_type = values.get("model_type", "qwen2")
        named = [name for name, cls in DECODER_CONFIGS.items() if cls.model_type == model_type] or [model_type]
    require(named[0] in DECODER_CONFIGS, "llm_config.architectures", named, f"one of {sorted(DECODER_CONFIGS)}")
    # A copy, because transformers rewrites nested values such as `rope_scaling` in place.
    fields = copy.deepcopy({key: value for key, value in values.items() if key not in ("model_type", "architectures")})
    return DECODER_CONFIGS[named[0]](architectures=[named[0]], **fields)


class NVLM_D_Config(PretrainedConfig):
    """A composite configuration; field names and defaults are those of the published config.json.

    Args:
        vision_config: an `InternVisionConfig` or its fields as a dict.
        llm_config: the decoder's config or its fields as a dict; also readable as `text_config`.
        select_layer: encoder layer whose output is used, counted from the end: -1 the last, -2 the one before.
        force_image_size: side of a tile in pixels; None means `vision_config.image_size`.
        downsample_ratio: pixel shuffle's factor on each side of the patch grid (0.5: 1024 patches to 256 tokens).
        ps_version: pixel shuffle's version; "v1" leaves the two spatial axes transposed (SPEC 4).
        template: name of the conversation template.
        dynamic_image_size: whether pictures are cut into tiles (else each is one tile).
        use_thumbnail: whether a thumbnail is the last tile of a picture of several tiles.
        min_dynamic_patch, max_dynamic_patch: bounds of the number of tiles, the thumbnail not counted.
        tile_tag: which text stands before each tile: "none", "1d" (released), "2d_grid" or "2d_box" (SPEC 6).
        thumbnail_tag: the thumbnail's tag; the 34B models write `<tile_global>`.
        projector_bias: whether the projector's two Linears have biases.
        image_token_id: id of `<|vision_pad|>`, at which a picture's features stand.
        tile_batch_size: most tiles that the encoder runs at once; on a CPU they are fewer where they are large.
        use_backbone_lora, use_llm_lora: kept because the published file has them; LoRA comes through PEFT.

    Raises:
        ValueError: a value is out of range; the message names the field and the value.
    """

    model_type = "NVLM_D"
    is_composition = True
    sub_configs = {"vision_config": InternVisionConfig, "llm_config": AutoConfig}  # noqa: RUF012
    attribute_map = {"text_config": "llm_config"}  # noqa: RUF012
    keys_to_ignore_at_inference = ["past_key_values"]  # noqa: RUF012

    def __init__(
        self,
        *,
        vision_config: dict[str, Any] | PretrainedConfig | None = None,
        llm_config: dict[str, Any] | PretrainedConfig | None = None,
        select_layer: int = -1,
        force_image_size: int | None = None,
        downsample_ratio: float = 0.5,
        ps_version: str = "v2",
        template: str = "chatml",
        dynamic_image_size: bool = True,
        use_thumbnail: bool = True,
        min_dynamic_patch: int = 1,
        max_dynamic_patch: int = 6,
        tile_tag: str = "1d",
        thumbnail_tag: str = "<tile_global_thumbnail>",
        projector_bias: bool = False,
        image_token_id: int = 151654,
        tile_batch_size: int = 16,
        use_backbone_lora: int = 0,
        use_llm_lora: int = 0,
        **kwargs: Any,
    ) -> None:
        llm_config = kwargs.pop("text_config", None) or llm_config
        self.vision_config = encoder_config(vision_config)
        self.llm_config = decoder_config(llm_config)
        self.select_layer = select_layer
        self.force_image_size = force_image_size
        self.downsample_ratio = downsample_ratio
        self.ps_version = ps_version
        self.template = template
        self.dynamic_image_size = dynamic_image_size
        self.use_thumbnail = use_thumbnail
        self.min_dynamic_patch = min_dynamic_patch
        self.max_dynamic_patch = max_dynamic_patch
        self.tile_tag = tile_tag
        self.thumbnail_tag = thumbnail_tag
        self.projector_bias = projector_bias
        self.image_token_id = image_token_id
        self.tile_batch_size = tile_batch_size
        self.use_backbone_lora = use_backbone_lora
        self.use_llm_lora = use_llm_lora
        kwargs.setdefault("tie_word_embeddings", self.llm_config.tie_word_embeddings)
        self._check()
        super().__init__(**kwargs)

    def _check(self) -> None:
        layers = self.vision_config.num_hidden_layers
        layer = self.select_layer
        require(isinstance(layer, int) and -layers <= layer <= -1, "select_layer", layer, f"-1 down to -{layers}")
        require_positive_int(
            min_dynamic_patch=self.min_dynamic_patch,
            max_dynamic_patch=self.max_dynamic_patch,
            tile_batch_size=self.tile_batch_size,
            force_image_size=self.tile_size,
        )
        require(
            self.min_dynamic_patch <= self.max_dynamic_patch,
            "min_dynamic_patch",
            self.min_dynamic_patch,
            f"at most `max_dynamic_patch` ({self.max_dynamic_patch})",
        )
        patch = self.vision_config.patch_size
        require(
            self.tile_size % patch == 0, "force_image_size", self.tile_size, f"a multiple of the patch size ({patch})"
        )
        ratio = self.downsample_ratio
        require(isinstance(ratio, (int, float)) and 0 < ratio <= 1, "downsample_ratio", ratio, "above 0 and at most 1")
        require(float(1 / ratio).is_integer(), "downsample_ratio", ratio, "one over an integer (1, 0.5, 0.25, ...)")
        require(
            (self.tile_size // patch) % round(1 / ratio) == 0,
            "downsample_ratio",
            ratio,
            f"a ratio that divides the grid of {self.tile_size // patch} x {self.tile_size // patch} patches",
        )
        require(self.ps_version in ("v1", "v2"), "ps_version", self.ps_version, "'v1' or 'v2'")
        require(self.template in TEMPLATES, "template", self.template, f"one of {sorted(TEMPLATES)}")
        require(self.tile_tag in TAG_KINDS, "tile_tag", self.tile_tag, f"one of {list(TAG_KINDS)}")

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """`PretrainedConfig.from_dict`, for NVLM-D only.

        Raises:
            ValueError: the dict describes another kind of model.
        """
        model_type = config_dict.get("model_type", cls.model_type)
        require(model_type == cls.model_type, "model_type", model_type, f"{cls.model_type!r}: this is no NVLM-D")
        return super().from_dict(config_dict, **kwargs)

    @property
    def tile_size(self) -> int:
        """Side of a tile in pixels (448 as released)."""
        return self.force_image_size or self.vision_config.image_size

    @property
    def num_image_token(self) -> int:
        """Decoder tokens per tile (256 as released)."""
        side = int(self.tile_size // self.vision_config.patch_size * self.downsample_ratio)
        return side * side

    @property
    def position_limit(self) -> int:
        """Longest sequence, in tokens, that the decoder was made for."""
        return self.llm_config.max_position_embeddings

    @property
    def shuffled_width(self) -> int:
        """Width of a token after pixel shuffle, which the projector reads (12800 as released)."""
        return self.vision_config.hidden_size * round(1 / self.downsample_ratio) ** 2
