"""NVLM-D: pictures are encoded, projected and spliced into the decoder's sequence (SPEC 1 to 6).

pixels -> InternViT -> pixel shuffle -> projector -> splice at `<|vision_pad|>` -> decoder -> logits
"""

from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import nn
from transformers import LlamaForCausalLM, PretrainedConfig, Qwen2ForCausalLM
from transformers.cache_utils import Cache
from transformers.generation import GenerationConfig, GenerationMixin
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import ModelOutput, TransformersKwargs, can_return_tuple, logging

from .answering import Answerer  # noqa: F401 (transformers 4.57 copies only what this file itself imports)
from .batching import group_prompts  # noqa: F401
from .chat import ChatMixin
from .chat_arguments import read_pictures  # noqa: F401
from .chat_samples import read_samples  # noqa: F401
from .configuration_nvlm_d import NVLM_D_Config
from .feature_cache import FeatureCache  # noqa: F401
from .loading import execution_device, on_single_device, translate_arguments
from .modeling_intern_vit import InternVisionModel
from .pictures import Picture  # noqa: F401
from .prefix import Prefix  # noqa: F401
from .preprocessing import load_image  # noqa: F401
from .projector import build_projector, pixel_shuffle
from .prompt import encode_prompt  # noqa: F401
from .session import ChatSession  # noqa: F401
from .tile_tags import tile_tags  # noqa: F401

logger = logging.get_logger(__name__)

CPU_ENCODER_BYTES = 192 * 2**20  # two released tiles in bfloat16; by `make bench`, 13 at once are slower by a quarter

DECODERS: dict[str, type[PreTrainedModel]] = {
    "Qwen2ForCausalLM": Qwen2ForCausalLM,
    "LlamaForCausalLM": LlamaForCausalLM,
}


def build_decoder(config: PretrainedConfig) -> PreTrainedModel:
    """The decoder, with plain rotary embeddings.

    The released code ran on a transformers that ignores the published `rope_scaling` (dynamic, factor 3). Up to
    `max_position_embeddings` that scaling does nothing, but looking whether it should costs a device
    synchronisation every step.
    """
    [architecture] = config.architectures or ["Qwen2ForCausalLM"]
    decoder = DECODERS[architecture](config)
    rotary = decoder.model.rotary_emb
    if rotary.rope_type == "dynamic":
        rotary.rope_type = "default"
    return decoder


def mask_of_chunk(mask: Any, start: int, end: int, *, past: int) -> Any:
    """The part of a decoder's attention mask that belongs to the tokens start..end of its input.

    Args:
        mask: (B, past + L), 0 at padding; or what `generate` makes for static caches: (B, 1, L, cache), or such masks
            by kind of layer, None where the whole input can do without; or None.
        past: how many tokens are in the KV cache before the input.
    """
    if isinstance(mask, dict):
        parts = {kind: mask_of_chunk(part, start, end, past=past) for kind, part in mask.items()}
        return None if None in parts.values() else parts  # nothing is padded then, but a later chunk needs a mask
    if mask is None:
        return None
    return mask[:, : past + end] if mask.ndim == 2 else mask[:, :, start:end]


@dataclass
class NVLM_D_Output(ModelOutput):
    """What `forward` returns.

    Args:
        loss: scalar, where labels are passed.
        logits: (B, L, vocabulary), or the last `logits_to_keep` positions of it; of the last chunk where the prompt
            was read in chunks.
        past_key_values: the KV cache.
        hidden_states, attentions: the decoder's, where asked for.
        image_hidden_states: (tiles, tokens, H) projected features, where pictures are passed.
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    past_key_values: Cache | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None
    attentions: tuple[torch.Tensor, ...] | None = None
    image_hidden_states: torch.Tensor | None = None


class NVLM_D_Model(ChatMixin, PreTrainedModel, GenerationMixin):
    """The decoder-only NVLM: pictures become tokens of the decoder."""

    config_class = NVLM_D_Config
    base_model_prefix = "nvlm_d"
    main_input_name = "input_ids"
    input_modalities = ["image", "text"]  # noqa: RUF012
    supports_gradient_checkpointing = True
    _no_split_modules = ["InternVisionEncoderLayer", "Qwen2DecoderLayer", "LlamaDecoderLayer"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    # The decoder brings its own plan. Of the rest, transformers 5 can split these layers alone: attention's q, k and v
    # lie in one weight, and the projector's layers have numbers for names. 4.57 knows no names with numbers at all.
    _tp_plan = {  # noqa: RUF012
        "vision_model.encoder.layers.*.mlp.fc1": "colwise",
        "vision_model.encoder.layers.*.mlp.fc2": "rowwise",
    }

    def __init__(self, config: NVLM_D_Config) -> None:
        super().__init__(config)
        self.loss_type = "ForCausalLM"
        self.vision_model = InternVisionModel(config.vision_config)
        self.mlp1 = build_projector(
            in_features=config.shuffled_width,
            inner_features=config.llm_config.intermediate_size,
            out_features=config.llm_config.hidden_size,
            bias=config.projector_bias,
        )
        self.language_model = build_decoder(config.llm_config)
        self.post_init()

    @classmethod
    def from_pretrained(cls, *args: Any, drop_dummy_heads: bool = True, **kwargs: Any) -> Any:
        """`PreTrainedModel.from_pretrained`, and the arguments of the documents' scripts.

        Args:
            drop_dummy_heads: remove the encoder's dummy heads where they are zero and the model is on one device
                (see `drop_dummy_heads()`).
            use_flash_attn, load_in_8bit, load_in_4bit: see `loading.translate_arguments`.
        """
        loaded = super().from_pretrained(*args, **translate_arguments(kwargs))
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if drop_dummy_heads and on_single_device(model):
            model.drop_dummy_heads()
        return loaded

    @property
    def base_model(self) -> PreTrainedModel:
        """The decoder: the published layout has no headless NVLM-D inside that could be loaded by itself."""
        return self.language_model

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.language_model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.language_model.set_output_embeddings(new_embeddings)

    def get_decoder(self) -> PreTrainedModel:
        return self.language_model.model

    def set_decoder(self, decoder: PreTrainedModel) -> None:
        self.language_model.model = decoder

    @property
    def input_device(self) -> torch.device:
        """Where token ids are wanted: the device that the embeddings compute on."""
        return execution_device(self.get_input_embeddings())

    @property
    def num_image_token(self) -> int:
        """Decoder tokens per tile."""
        return self.config.num_image_token

    @property
    def tiles_at_once(self) -> int:
        """How many tiles the encoder runs at once: the config's `tile_batch_size`, on a CPU fewer where they are large.

        A CPU gains nothing from more tiles than fill its cores, and touching fresh memory costs it time.
        """
        most = self.config.tile_batch_size
        if execution_device(self.vision_model).type == "cpu":
            most = min(most, max(1, CPU_ENCODER_BYTES // self.vision_model.activation_bytes))
        return most

    def limit_encoder_memory(self, max_bytes: int) -> int:
        """Set the config's `tile_batch_size` to as many tiles as the encoder can take within a budget, at least one.

        Args:
            max_bytes: for the activations inside an encoder layer; a released tile needs 85 MB in bfloat16.

        Returns:
            The number of tiles.

        Raises:
            ValueError: no positive number.
        """
        if max_bytes < 1:
            raise ValueError(f"max_bytes is {max_bytes}, expected a positive number of bytes.")
        self.config.tile_batch_size = max(1, max_bytes // self.vision_model.activation_bytes)
        return self.config.tile_batch_size

    def drop_dummy_heads(self) -> int:
        """Remove the encoder's dummy heads where that changes nothing; see `InternVisionModel.drop_dummy_heads`."""
        return self.vision_model.drop_dummy_heads()

    def resize_pos_embeddings(self, image_size: int) -> None:
        """Make the model one of tiles of `image_size` pixels a side (bicubic, float32).

        Raises:
            ValueError: the patches of such a tile can't be shuffled evenly.
        """
        block = self.config.vision_config.patch_size * round(1 / self.config.downsample_ratio)
        if image_size < 1 or image_size % block:
            raise ValueError(
                f"image_size is {image_size}, expected a multiple of {block} (patch size x shuffled block)."
            )
        self.vision_model.resize_pos_embeddings(image_size)
        self.config.force_image_size = image_size

    def pixel_shuffle(self, x: torch.Tensor, scale_factor: float = 0.5) -> torch.Tensor:
        """`projector.pixel_shuffle` in the config's version: (n, r, c, D) -> (n, r/2, c/2, 4 D)."""
        return pixel_shuffle(x, scale_factor, version=self.config.ps_version)

    def run_encoder(self, pixel_values: torch.Tensor, **kwargs: Any) -> Any:
        """The encoder on tiles of the right shape, up to the config's `select_layer`.

        Raises:
            ValueError: the tiles' shape is not the config's.
        """
        config = self.config
        expected = (config.vision_config.num_channels, config.tile_size, config.tile_size)
        if tuple(pixel_values.shape[1:]) != expected:
            raise ValueError(
                f"pixel_values must have the shape (tiles, {', '.join(map(str, expected))}), got "
                f"{tuple(pixel_values.shape)}: load_image(..., input_size={config.tile_size}) makes such tiles."
            )
        pixel_values = pixel_values.to(execution_device(self.vision_model), self.vision_model.dtype)
        return self.vision_model(pixel_values, return_dict=True, select_layer=config.select_layer, **kwargs)

    def shuffle_patches(self, last_hidden_state: torch.Tensor) -> torch.Tensor:
        """The encoder's output (tiles, 1 + patches, D) -> pixel-shuffled features (tiles, tokens, 4 D)."""
        grid = self.config.tile_size // self.config.vision_config.patch_size
        patches = rearrange(last_hidden_state[:, 1:], "t (r c) d -> t r c d", r=grid)  # the class token dropped
        return rearrange(self.pixel_shuffle(patches, self.config.downsample_ratio), "t r c d -> t (r c) d")

    def project(self, visual_features: torch.Tensor) -> torch.Tensor:
        """Pixel-shuffled features (tiles, tokens, 12800) -> decoder embeddings (tiles, tokens, 8192)."""
        norm = self.mlp1[0]
        dtype = next(norm.parameters()).dtype
        return self.mlp1(visual_features.to(execution_device(norm), dtype))

    def get_visual_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Pixels (tiles, 3, S, S) -> pixel-shuffled features (tiles, tokens, 12800), for `visual_features`."""
        batches = pixel_values.split(self.tiles_at_once)
        return torch.cat([self.shuffle_patches(self.run_encoder(tiles).last_hidden_state) for tiles in batches])

    @property
    def encoder_version(self) -> int:
        """A number that changes with the encoder's weights: how often they were written to."""
        return sum(0 if weight.is_inference() else weight._version for weight in self.vision_model.parameters())

    def extract_feature(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """Pixels (tiles, 3, S, S) -> decoder embeddings (tiles, tokens, 8192), `tiles_at_once` tiles at a time."""
        batches = pixel_values.split(self.tiles_at_once)
        return torch.cat(
            [self.project(self.shuffle_patches(self.run_encoder(tiles).last_hidden_state)) for tiles in batches]
        )

    @can_return_tuple
    def get_image_features(self, pixel_values: torch.Tensor, **kwargs: Any) -> BaseModelOutputWithPooling:
        """Transformers' name for encoding pictures, with everything that the encoder puts out.

        Args:
            pixel_values: (tiles, 3, S, S).
            output_hidden_states, output_attentions: as in `InternVisionModel.forward`.

        Returns:
            `pooler_output` (tiles, tokens, 8192), what `extract_feature` gives; `last_hidden_state`
            (tiles, 1 + patches, 3200); `hidden_states` and `attentions` of the encoder where asked for.
        """
        batches = [self.run_encoder(tiles, **kwargs) for tiles in pixel_values.split(self.tiles_at_once)]
        last_hidden_state = torch.cat([batch.last_hidden_state for batch in batches])
        layers = {
            name: tuple(map(torch.cat, zip(*(getattr(batch, name) for batch in batches), strict=True)))
            for name in ("hidden_states", "attentions")
            if getattr(batches[0], name) is not None
        }
        features = self.project(self.shuffle_patches(last_hidden_state))
        return BaseModelOutputWithPooling(last_hidden_state=last_hidden_state, pooler_output=features, **layers)

    def picture_embeddings(
        self,
        pixel_values: torch.Tensor | None,
        image_flags: torch.Tensor | None,
        visual_features: torch.Tensor | None,
    ) -> torch.Tensor | None:
        """The decoder embeddings (tiles, tokens, H) of what `forward` takes as pictures; None without pictures."""
        tiles = pixel_values if visual_features is None else visual_features
        if tiles is None:
            return None
        if image_flags is not None:
            tiles = tiles[image_flags.reshape(-1).bool().to(tiles.device)]
        if len(tiles) == 0:
            return None
        return self.extract_feature(tiles) if visual_features is None else self.project(tiles)

    def placeholder_mask(
        self,
        input_ids: torch.Tensor | None,
        inputs_embeds: torch.Tensor | None,
        attention_mask: Any,
    ) -> torch.Tensor:
        """(B, L) bool: where features of pictures stand. Without ids, the embeddings are compared.

        Padding is no place for them: some people pad with the very token that stands for pictures.
        """
        if input_ids is not None and input_ids.numel() > 0:
            placeholders = input_ids == self.config.image_token_id
        else:
            image_token = torch.tensor(self.config.image_token_id, device=inputs_embeds.device)  # type: ignore[union-attr]
            placeholders = (inputs_embeds == self.get_input_embeddings()(image_token)).all(-1)
        if isinstance(attention_mask, torch.Tensor) and attention_mask.ndim == 2:  # static caches bring it otherwise
            placeholders &= attention_mask[:, -placeholders.shape[1] :].to(placeholders.device, torch.bool)
        return placeholders

    def check_slots(self, placeholders: torch.Tensor, features: torch.Tensor) -> None:
        """Check that there is one placeholder a feature.

        Raises:
            ValueError: their numbers differ; the message has both.
        """
        slots, tokens = int(placeholders.sum()), features.shape[0] * features.shape[1]
        if slots != tokens:
            raise ValueError(
                f"The input holds {slots} placeholders (token id {self.config.image_token_id}) for {tokens} features "
                f"({features.shape[0]} tiles of {features.shape[1]} tokens): there must be one a feature."
            )

    def splice(self, inputs_embeds: torch.Tensor, placeholders: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
        """Put features (tiles, tokens, H) in the places of the placeholders (B, L), in order.

        Raises:
            ValueError: as `check_slots`.
        """
        if not torch.compiler.is_compiling():
            self.check_slots(placeholders, features)
        features = features.to(inputs_embeds.device, inputs_embeds.dtype)
        return inputs_embeds.masked_scatter(placeholders[..., None], features)

    def check_cache(self, cache: Cache | None) -> None:
        """Check that the decoder's attention can read the KV cache.

        Raises:
            ValueError: flex attention is to read a static cache. On transformers 5 it would look one step ahead,
                because the lengths that its masks remember move while the layers run; 5.23 stops before it.
        """
        flex = self.config.llm_config._attn_implementation == "flex_attention"
        if flex and cache is not None and cache.is_compileable:
            raise ValueError(
                'Flex attention can\'t read a static cache: load with attn_implementation="sdpa", or leave the cache '
                "dynamic."
            )

    def fill_cache(
        self,
        chunk_size: int,
        *,
        inputs_embeds: torch.Tensor,
        attention_mask: Any,
        position_ids: torch.Tensor | None,
        past_key_values: Cache | None,
    ) -> dict[str, Any]:
        """Let the decoder read its input into the KV cache, all but the last chunk.

        Its layers then need memory for `chunk_size` tokens, however long the input is.

        Args:
            chunk_size: most tokens of a row to read at once.
            inputs_embeds, attention_mask, position_ids, past_key_values: the decoder's, of the whole input.

        Returns:
            The same four for the last chunk.

        Raises:
            ValueError: `chunk_size` is below 1.
        """
        if chunk_size < 1:
            raise ValueError(f"prefill_chunk_size is {chunk_size}, expected a number of tokens, at least 1.")
        length = inputs_embeds.shape[1]
        past = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        for start in range(0, length, chunk_size):
            end = min(start + chunk_size, length)
            chunk = {
                "inputs_embeds": inputs_embeds[:, start:end],
                "attention_mask": mask_of_chunk(attention_mask, start, end, past=past),
                "position_ids": None if position_ids is None else position_ids[:, start:end],
                "past_key_values": past_key_values,
            }
            if end < length:
                past_key_values = self.get_decoder()(**chunk, use_cache=True).past_key_values
        return chunk

    @can_return_tuple
    def forward(  # type: ignore[misc]  # position_ids is a field of TransformersKwargs too
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        image_flags: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        use_cache: bool | None = None,
        visual_features: torch.Tensor | None = None,
        mm_encoder_outputs: dict[str, BaseModelOutputWithPooling] | None = None,
        prompt_length: int | None = None,
        prefill_chunk_size: int | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> NVLM_D_Output:
        """One pass of the decoder over text and pictures.

        Args:
            input_ids: (B, L) token ids; `image_token_id` at each place of a feature.
            pixel_values: (tiles, 3, S, S) of all pictures of the batch, row by row.
            attention_mask: (B, L), 0 at padding.
            position_ids: (B, L).
            past_key_values: the KV cache to go on from.
            inputs_embeds: (B, L, H), in the place of input_ids.
            labels: (B, L), -100 where there is no loss.
            image_flags: (tiles,), 0 for tiles to leave out.
            logits_to_keep: how many last positions to compute logits for, or their indices; 0 for all.
            use_cache: whether to return a KV cache.
            visual_features: (tiles, tokens, 12800), in the place of pixel_values.
            mm_encoder_outputs: {"image": what `get_image_features` returned}, in the place of both.
            prompt_length: where generated tokens begin (generation without a cache reads them again): a placeholder
                that the model itself wrote is a token like any other.
            prefill_chunk_size: most tokens of a row that the decoder reads at once; the logits are then those of the
                last chunk.

        Raises:
            ValueError: not exactly one of input_ids and inputs_embeds; several kinds of pictures; as many
                placeholders as there are features do not stand in the input; chunks with labels or without a cache;
                or as `check_cache`.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("forward needs exactly one of input_ids and inputs_embeds.")
        self.check_cache(past_key_values)
        encoded = (mm_encoder_outputs or {}).get("image")
        if encoded is not None and not (pixel_values is None and visual_features is None):
            raise ValueError("Pass pictures once: as pixel_values, as visual_features or as mm_encoder_outputs.")
        if encoded is None:
            features = self.picture_embeddings(pixel_values, image_flags, visual_features)
        else:
            features = encoded.pooler_output

        if features is not None:
            placeholders = self.placeholder_mask(input_ids, inputs_embeds, attention_mask)
            if prompt_length is not None:
                placeholders[:, prompt_length:] = False
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)  # [B, L, H]
        if features is not None:
            inputs_embeds = self.splice(inputs_embeds, placeholders.to(inputs_embeds.device), features)

        inputs: dict[str, Any] = {
            "inputs_embeds": inputs_embeds,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "past_key_values": past_key_values,
        }
        if prefill_chunk_size is not None:
            if labels is not None or use_cache is False:
                raise ValueError("prefill_chunk_size needs the KV cache, and computes no logits for labels.")
            inputs = self.fill_cache(prefill_chunk_size, **inputs)
            kwargs.pop("cache_position", None)  # transformers 4.57: of the whole input
        outputs = self.language_model(
            **inputs, use_cache=use_cache, logits_to_keep=logits_to_keep, return_dict=True, **kwargs
        )
        loss = None
        if labels is not None:
            vocab_size = self.config.llm_config.vocab_size
            loss = self.loss_function(logits=outputs.logits, labels=labels, vocab_size=vocab_size, **kwargs)
        return NVLM_D_Output(
            loss=loss,
            logits=outputs.logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            image_hidden_states=features,
        )

    @torch.no_grad()
    def generate(self, inputs: torch.Tensor | None = None, *args: Any, **kwargs: Any) -> Any:
        """`GenerationMixin.generate`: prompt and continuation. Pictures are encoded once, before the first step."""
        pictures = {name: kwargs.pop(name, None) for name in ("pixel_values", "image_flags", "visual_features")}
        features = self.picture_embeddings(**pictures)
        if features is not None:
            prompts = [x for x in (inputs, kwargs.get("input_ids"), kwargs.get("inputs_embeds")) if x is not None]
            if not prompts:
                raise ValueError("generate got pictures but no prompt: pass input_ids with a placeholder a feature.")
            kwargs["prompt_length"] = prompts[0].shape[1]
            kwargs["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(pooler_output=features)}
        return super().generate(inputs, *args, **kwargs)

    def _prepare_generation_config(self, *args: Any, **kwargs: Any) -> tuple[GenerationConfig, dict[str, Any]]:
        """Settings that transformers would not follow here.

        - `prefill_chunk_size` goes to `forward`, which cuts the input where the pictures are already in it. What
          `generate` would do with it depends on the version: leave pictures out (5.16), miscount padding (4.57).
        - Caches that are offloaded to the CPU need a model that is elsewhere: on a CPU they are plain ones.
        """
        generation_config, model_kwargs = super()._prepare_generation_config(*args, **kwargs)
        if generation_config.prefill_chunk_size is not None:
            model_kwargs["prefill_chunk_size"] = generation_config.prefill_chunk_size
            generation_config.prefill_chunk_size = None
        not_offloaded = {"offloaded": None, "offloaded_static": "static"}
        if generation_config.cache_implementation in not_offloaded and self.input_device.type == "cpu":
            logger.warning_once("The model is on the CPU, to which caches are offloaded: using a plain cache.")
            generation_config.cache_implementation = not_offloaded[generation_config.cache_implementation]
        return generation_config, model_kwargs

    def prepare_inputs_for_generation(  # type: ignore[override]  # `inputs_embeds` must be a name here
        self,
        input_ids: torch.LongTensor,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """`GenerationMixin.prepare_inputs_for_generation`, after `check_cache`."""
        self.check_cache(past_key_values)
        return super().prepare_inputs_for_generation(
            input_ids, past_key_values=past_key_values, inputs_embeds=inputs_embeds, **kwargs
        )

    def _expand_inputs_for_generation(
        self,
        expand_size: int = 1,
        is_encoder_decoder: bool = False,
        input_ids: torch.LongTensor | None = None,
        **model_kwargs: Any,
    ) -> tuple[torch.LongTensor, dict[str, Any]]:
        """Give each beam or returned sequence of a sample the sample's own tiles."""
        encoded = (model_kwargs.get("mm_encoder_outputs") or {}).get("image")
        if expand_size == 1 or encoded is None:
            return super()._expand_inputs_for_generation(
                expand_size, is_encoder_decoder, input_ids=input_ids, **model_kwargs
            )
        placeholders = self.placeholder_mask(
            input_ids, model_kwargs.get("inputs_embeds"), model_kwargs.get("attention_mask")
        )
        features = encoded.pooler_output
        self.check_slots(placeholders, features)
        tiles = (placeholders.sum(-1) // features.shape[1]).tolist()
        repeated = [tile for sample in features.split(tiles) for tile in [sample] * expand_size]
        del model_kwargs["mm_encoder_outputs"]
        input_ids, model_kwargs = super()._expand_inputs_for_generation(
            expand_size, is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
        model_kwargs["mm_encoder_outputs"] = {"image": BaseModelOutputWithPooling(pooler_output=torch.cat(repeated))}
        return input_ids, model_kwargs

    def _update_model_kwargs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """After the prefill the pictures are in the KV cache; without one, every step needs them again."""
        model_kwargs = super()._update_model_kwargs_for_generation(*args, **kwargs)
        if model_kwargs.get("use_cache", True):
            for name in ("mm_encoder_outputs", "prompt_length", "prefill_chunk_size"):
                model_kwargs.pop(name, None)
        return model_kwargs
