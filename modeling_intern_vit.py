"""InternViT, the vision encoder: one tile of pixels in, one feature vector a patch out (SPEC 3)."""

from collections.abc import Callable

import torch
from einops import rearrange
from torch import nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, PreTrainedModel
from transformers.utils import logging

from .configuration_intern_vit import InternVisionConfig

logger = logging.get_logger(__name__)


class InternRMSNorm(nn.Module):
    """RMS normalisation, computed in float32 and cast back before the weight is applied.

    Args:
        width: number of channels, all of which are scaled and weighted.
        eps: added to the mean square.
        num_real: channels that the mean square is taken over, the first ones; None for all. Dummy heads are scaled
            but not counted (SPEC 2).
    """

    def __init__(self, width: int, *, eps: float, num_real: int | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps
        self.num_real = num_real or width

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x32 = x.float()
        mean_square = x32[..., : self.num_real].square().mean(-1, keepdim=True)
        return self.weight * (x32 * torch.rsqrt(mean_square + self.eps)).to(x.dtype)


def build_norm(config: InternVisionConfig) -> nn.Module:
    """A layer's norm, by `norm_type`."""
    if config.norm_type == "layer_norm":
        return nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
    return InternRMSNorm(config.hidden_size, eps=config.layer_norm_eps)


def resize_position_embedding(positions: torch.Tensor, grid: int) -> torch.Tensor:
    """Position embeddings for another patch grid: the class token's stays, the rest is resized (bicubic, float32).

    Args:
        positions: (1, 1 + old_grid ** 2, D).
        grid: new number of patches a side.

    Returns:
        (1, 1 + grid ** 2, D) in the dtype of `positions`.
    """
    old_grid = round((positions.shape[1] - 1) ** 0.5)
    if old_grid == grid:
        return positions
    patches = rearrange(positions[:, 1:].float(), "1 (r c) d -> 1 d r c", r=old_grid)
    patches = nn.functional.interpolate(patches, size=(grid, grid), mode="bicubic", align_corners=False)
    patches = rearrange(patches, "1 d r c -> 1 (r c) d").to(positions.dtype)
    return torch.cat([positions[:, :1], patches], dim=1)


class InternVisionEmbeddings(nn.Module):
    """Pixels to patch embeddings, a class token in front, position embeddings added."""

    def __init__(self, config: InternVisionConfig) -> None:
        super().__init__()
        self.config = config
        grid = config.image_size // config.patch_size
        self.class_embedding = nn.Parameter(torch.zeros(1, 1, config.hidden_size))
        self.patch_embedding = nn.Conv2d(
            config.num_channels, config.hidden_size, kernel_size=config.patch_size, stride=config.patch_size
        )
        self.position_embedding = nn.Parameter(torch.zeros(1, 1 + grid * grid, config.hidden_size))

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        patches = self.patch_embedding(pixel_values)  # [n, D, r, c]
        positions = resize_position_embedding(self.position_embedding, patches.shape[-1])
        patches = rearrange(patches, "n d r c -> n (r c) d")
        classes = self.class_embedding.expand(patches.shape[0], 1, -1).to(patches.dtype)
        return torch.cat([classes, patches], dim=1) + positions.to(patches.dtype)  # [n, 1 + r * c, D]


def eager_attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: object,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention in plain matrix products, with the probabilities returned; transformers' interface.

    query, key, value are [n, heads, t, d]; the output is [n, t, heads, d].
    """
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling  # [n, h, t, t]
    if attention_mask is not None:
        scores = scores + attention_mask
    probabilities = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    probabilities = nn.functional.dropout(probabilities, p=dropout, training=module.training)
    return torch.matmul(probabilities, value).transpose(1, 2), probabilities


class InternAttention(torch.nn.Module):
    """Multi-head attention over one tile, with RMS-normalised queries and keys.

    The checkpoint's layout is kept: `qkv` gives [q | k | v], each of all heads, the dummy heads last (SPEC 2).
    """

    is_causal = False

    def __init__(self, config: InternVisionConfig) -> None:
        super().__init__()
        self.config = config
        self.scaling = config.head_dim**-0.5
        width, inner = config.hidden_size, config.attention_width
        self.qkv = nn.Linear(width, 3 * inner, bias=config.qkv_bias)
        self.q_norm: nn.Module = nn.Identity()
        self.k_norm: nn.Module = nn.Identity()
        if config.qk_normalization:
            self.q_norm = InternRMSNorm(inner, eps=config.layer_norm_eps, num_real=width)
            self.k_norm = InternRMSNorm(inner, eps=config.layer_norm_eps, num_real=width)
        self.proj = nn.Linear(inner, width)
        self.proj_drop = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """x [n, t, D] -> ([n, t, D], probabilities [n, h, t, t] with the eager backend)."""
        query, key, value = self.qkv(x).chunk(3, dim=-1)
        query, key = self.q_norm(query), self.k_norm(key)
        # Not by einops, whose patterns torch.compile would trace letter by letter, in every layer.
        query, key, value = (
            part.unflatten(-1, (-1, self.config.head_dim)).transpose(1, 2) for part in (query, key, value)
        )  # [n, h, t, d]
        backend = self.config._attn_implementation
        attend: Callable = eager_attention if backend in (None, "eager") else ALL_ATTENTION_FUNCTIONS[backend]
        output, probabilities = attend(
            self,
            query,
            key,
            value,
            None,
            scaling=self.scaling,
            dropout=self.config.attention_dropout if self.training else 0.0,
            is_causal=False,
        )
        output = self.proj(output.flatten(2))  # [n, t, D]
        return self.proj_drop(output), probabilities

    def dummy_heads_are_zero(self) -> bool:
        """Whether the dummy heads add nothing: their values or their columns of the projection are all zero."""
        real = self.config.hidden_size
        _, _, value = self.qkv.weight.chunk(3)  # [inner, D]
        silent_values = not value[real:].any() and (self.qkv.bias is None or not self.qkv.bias.chunk(3)[2][real:].any())
        return bool(silent_values or not self.proj.weight[:, real:].any())

    @torch.no_grad()
    def drop_dummy_heads(self) -> None:
        """Cut the dummy heads out of every tensor that holds them."""
        real = self.config.hidden_size

        def keep_real(parameter: torch.Tensor) -> nn.Parameter:
            kept = torch.cat([part[:real] for part in parameter.chunk(3)])
            return nn.Parameter(kept, requires_grad=parameter.requires_grad)

        self.qkv.weight = keep_real(self.qkv.weight)
        if self.qkv.bias is not None:
            self.qkv.bias = keep_real(self.qkv.bias)
        self.qkv.out_features = 3 * real
        proj = self.proj.weight
        self.proj.weight = nn.Parameter(proj[:, :real].clone(), requires_grad=proj.requires_grad)
        self.proj.in_features = real
        for norm in (self.q_norm, self.k_norm):
            if isinstance(norm, InternRMSNorm):
                norm.weight = nn.Parameter(norm.weight[:real].clone(), requires_grad=norm.weight.requires_grad)


class InternMLP(nn.Module):
    """fc1, activation, fc2."""

    def __init__(self, config: InternVisionConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.intermediate_size)
        self.act = ACT2FN[config.hidden_act]
        self.fc2 = nn.Linear(config.intermediate_size, config.hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.act(self.fc1(x)))


def build_drop_path(rate: float) -> nn.Module:
    """Stochastic depth; timm is only imported where it is switched on."""
    if rate == 0:
        return nn.Identity()
    from timm.layers import DropPath

    return DropPath(rate)


class InternVisionEncoderLayer(GradientCheckpointingLayer):
    """A pre-norm transformer layer with layer scale on both branches."""

    def __init__(self, config: InternVisionConfig, *, drop_path_rate: float) -> None:
        super().__init__()
        self.attn = InternAttention(config)
        self.mlp = InternMLP(config)
        self.norm1 = build_norm(config)
        self.norm2 = build_norm(config)
        self.ls1 = nn.Parameter(config.initializer_factor * torch.ones(config.hidden_size))
        self.ls2 = nn.Parameter(config.initializer_factor * torch.ones(config.hidden_size))
        self.drop_path1 = build_drop_path(drop_path_rate)
        self.drop_path2 = build_drop_path(drop_path_rate)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """x [n, t, D] -> ([n, t, D], attention probabilities or None)."""
        attended, probabilities = self.attn(self.norm1(x))
        x = torch.addcmul(x, self.drop_path1(attended), self.ls1)
        x = torch.addcmul(x, self.drop_path2(self.mlp(self.norm2(x))), self.ls2)
        return x, probabilities


class InternVisionEncoder(nn.Module):
    """The stack of layers."""

    def __init__(self, config: InternVisionConfig) -> None:
        super().__init__()
        depth = config.num_hidden_layers
        rates = [config.drop_path_rate * i / max(depth - 1, 1) for i in range(depth)]
        self.layers = nn.ModuleList(InternVisionEncoderLayer(config, drop_path_rate=rate) for rate in rates)


class InternVisionModel(PreTrainedModel):
    """InternViT without a final norm."""

    config_class = InternVisionConfig
    base_model_prefix = "vision_model"
    main_input_name = "pixel_values"
    input_modalities = ["image"]  # noqa: RUF012
    supports_gradient_checkpointing = True
    _no_split_modules = ["InternVisionEncoderLayer"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def __init__(self, config: InternVisionConfig) -> None:
        super().__init__(config)
        self.embeddings = InternVisionEmbeddings(config)
        self.encoder = InternVisionEncoder(config)
        self.post_init()

    @property
    def activation_bytes(self) -> int:
        """What one tile needs at most inside a layer, without gradients, in bytes.

        That is in its MLP: the embeddings, the layer's input, the stream with attention's output, that output and its
        norm (T, 5 D), and what fc1 and the activation put out (T, 2 M).
        """
        config = self.config
        positions = 1 + (config.image_size // config.patch_size) ** 2
        return positions * (5 * config.hidden_size + 2 * config.intermediate_size) * self.dtype.itemsize

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, InternVisionEmbeddings):
            nn.init.normal_(module.class_embedding, std=self.config.initializer_range)
            nn.init.normal_(module.position_embedding, std=self.config.initializer_range)
        elif isinstance(module, InternVisionEncoderLayer):
            nn.init.constant_(module.ls1, self.config.initializer_factor)
            nn.init.constant_(module.ls2, self.config.initializer_factor)

    def forward(
        self,
        pixel_values: torch.Tensor,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool | None = None,
        *,
        select_layer: int = -1,
        **kwargs: object,
    ) -> tuple | BaseModelOutputWithPooling:
        """Encode tiles.

        Args:
            pixel_values: (n, channels, side, side) normalised pixels, side a multiple of the patch size.
            output_hidden_states: also return the embeddings and every layer's output.
            output_attentions: also return every layer's probabilities (eager backend only).
            select_layer: the layer to stop after, counted from the end; later layers are not run.

        Returns:
            `last_hidden_state` (n, 1 + patches, D), class token first, and `pooler_output` (n, D), the class token.
        """
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        if return_dict is None:
            return_dict = self.config.return_dict
        x = self.embeddings(pixel_values)  # [n, t, D]
        states, attentions = [x], []
        layers = self.encoder.layers
        for layer in layers[: len(layers) + 1 + select_layer]:
            x, probabilities = layer(x)
            if output_hidden_states:
                states.append(x)
            if output_attentions:
                attentions.append(probabilities)
        output = BaseModelOutputWithPooling(
            last_hidden_state=x,
            pooler_output=x[:, 0],
            hidden_states=tuple(states) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
        )
        return output if return_dict else output.to_tuple()

    @torch.no_grad()
    def resize_pos_embeddings(self, image_size: int) -> None:
        """Make the encoder one of tiles of `image_size` pixels a side, resizing its position embeddings.

        Raises:
            ValueError: `image_size` is not a multiple of the patch size.
        """
        if image_size < 1 or image_size % self.config.patch_size:
            raise ValueError(
                f"image_size is {image_size}, expected a multiple of the patch size {self.config.patch_size}."
            )
        old = self.embeddings.position_embedding
        resized = resize_position_embedding(old, image_size // self.config.patch_size)
        self.embeddings.position_embedding = nn.Parameter(resized.clone(), requires_grad=old.requires_grad)
        self.config.image_size = image_size

    def drop_dummy_heads(self) -> int:
        """Remove the dummy heads if that changes nothing: the same output from 8.5 % fewer weights (SPEC 2).

        They are kept, and a warning says so once, where any of them contributes; and kept silently where the
        weights are not plain tensors on this machine (quantised, offloaded, LoRA).

        Returns:
            The number of heads removed in every layer, 0 where they are kept or there are none.
        """
        num_dummies = self.config.num_dummy_heads
        attentions: list[InternAttention] = [layer.attn for layer in self.encoder.layers]  # type: ignore[misc]
        linears = [linear for attn in attentions for linear in (attn.qkv, attn.proj)]
        plain = all(type(linear) is nn.Linear and linear.weight.device.type != "meta" for linear in linears)
        if num_dummies == 0 or not plain:
            return 0
        if not all(attn.dummy_heads_are_zero() for attn in attentions):
            logger.warning_once(
                f"The {num_dummies} dummy attention heads of this encoder are not zero: they contribute and are kept."
            )
            return 0
        for attn in attentions:
            attn.drop_dummy_heads()
        self.config.num_dummy_heads = 0
        return num_dummies
