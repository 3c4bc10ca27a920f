"""The vision encoder's configuration: InternViT-6B-448px-V1-5 by default (SPEC 1 and 3)."""

from typing import Any

from transformers import PretrainedConfig


def require(condition: bool, field: str, value: object, expected: str) -> None:
    """Raise a ValueError that names a configuration field, its value and what was expected of it."""
    if not condition:
        raise ValueError(f"config field `{field}` is {value!r}, expected {expected}.")


def require_positive_int(**fields: object) -> None:
    """Check that every given configuration field is an integer of at least 1."""
    for field, value in fields.items():
        is_int = isinstance(value, int) and not isinstance(value, bool)
        require(is_int and value >= 1, field, value, "an integer >= 1")  # type: ignore[operator]


class InternVisionConfig(PretrainedConfig):
    """Sizes and switches of the InternViT encoder.

    Args:
        hidden_size: width D of the encoder; a multiple of `num_attention_heads`.
        num_attention_heads: heads that carry weights (25 in the released checkpoint).
        num_dummy_heads: zero heads that the checkpoint stores after the real ones in q, k, v and proj
            (SPEC 2, "Dummy heads"): 7 in the released checkpoint, 0 once they are dropped.
        image_size: side in pixels of the square tile that the position embeddings are stored for.
        patch_size: side in pixels of a patch.
        norm_type: "rms_norm" (released) or "layer_norm".
        use_flash_attn: kept because the published file has it; the backend is chosen by `attn_implementation`.
        initializer_range: standard deviation of freshly drawn weights.
        initializer_factor: initial value of the layer scales `ls1` and `ls2`.

    Raises:
        ValueError: a value is out of range; the message names the field and the value.
    """

    model_type = "intern_vit_6b"
    base_config_key = "vision_config"

    def __init__(
        self,
        *,
        num_channels: int = 3,
        patch_size: int = 14,
        image_size: int = 448,
        hidden_size: int = 3200,
        intermediate_size: int = 12800,
        num_hidden_layers: int = 45,
        num_attention_heads: int = 25,
        num_dummy_heads: int = 7,
        qkv_bias: bool = False,
        qk_normalization: bool = True,
        norm_type: str = "rms_norm",
        layer_norm_eps: float = 1e-6,
        hidden_act: str = "gelu",
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        drop_path_rate: float = 0.0,
        initializer_range: float = 0.02,
        initializer_factor: float = 0.1,
        use_flash_attn: bool = True,
        **kwargs: Any,
    ) -> None:
        self.num_channels = num_channels
        self.patch_size = patch_size
        self.image_size = image_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_dummy_heads = num_dummy_heads
        self.qkv_bias = qkv_bias
        self.qk_normalization = qk_normalization
        self.norm_type = norm_type
        self.layer_norm_eps = layer_norm_eps
        self.hidden_act = hidden_act
        self.dropout = dropout
        self.attention_dropout = attention_dropout
        self.drop_path_rate = drop_path_rate
        self.initializer_range = initializer_range
        self.initializer_factor = initializer_factor
        self.use_flash_attn = use_flash_attn
        self._check()
        super().__init__(**kwargs)

    def _check(self) -> None:
        require_positive_int(
            num_channels=self.num_channels,
            patch_size=self.patch_size,
            image_size=self.image_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
        )
        require(
            self.hidden_size % self.num_attention_heads == 0,
            "hidden_size",
            self.hidden_size,
            f"a multiple of `num_attention_heads` ({self.num_attention_heads})",
        )
        require(
            self.image_size % self.patch_size == 0,
            "image_size",
            self.image_size,
            f"a multiple of `patch_size` ({self.patch_size})",
        )
        dummies = self.num_dummy_heads
        require(isinstance(dummies, int) and dummies >= 0, "num_dummy_heads", dummies, "an integer >= 0")
        require(self.norm_type in ("rms_norm", "layer_norm"), "norm_type", self.norm_type, "'rms_norm' or 'layer_norm'")
        for field in ("dropout", "attention_dropout", "drop_path_rate"):
            rate = getattr(self, field)
            require(isinstance(rate, (int, float)) and 0 <= rate < 1, field, rate, "a rate of at least 0 and below 1")

    @property
    def head_dim(self) -> int:
        """Width of one attention head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def attention_width(self) -> int:
        """Width inside the attention, dummy heads included (4096 as released, 3200 without them)."""
        return (self.num_attention_heads + self.num_dummy_heads) * self.head_dim
