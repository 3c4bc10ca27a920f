"""Transformers' own models of the same sizes, with the same weights: what they compute is what ours computes.

`InternVLForConditionalGeneration` is the nearest relative of NVLM-D in transformers. Its forward pass is untouched;
it gets our weights, query, key and value cut out of one matrix without a copy, and our projector's layers, which are
wider than its own would be.
"""

from typing import Any

import torch
from torch import nn
from transformers import InternVLConfig, InternVLForConditionalGeneration, Qwen2ForCausalLM
from transformers.initialization import no_init_weights

from nvlm import NVLM_D_Config, NVLM_D_Model


def decoder_of(model: NVLM_D_Model) -> Any:
    """Transformers' `Qwen2ForCausalLM` with our decoder's weights: it is the very module.

    Raises:
        ValueError: the decoder is of another kind.
    """
    decoder = model.language_model
    if type(decoder) is not Qwen2ForCausalLM:
        raise ValueError(f"The decoder is a {type(decoder).__name__}, expected a Qwen2ForCausalLM.")
    return decoder


def internvl_config(config: NVLM_D_Config) -> InternVLConfig:
    """InternVL's config of the same sizes.

    Raises:
        ValueError: a config that InternVL can't have: dummy heads, another layer than the last.
    """
    vision = config.vision_config
    if vision.num_dummy_heads or config.select_layer != -1 or config.ps_version != "v2":
        raise ValueError("InternVL has no dummy heads, the last layer's features and pixel shuffle v2 only.")
    return InternVLConfig(
        vision_config={
            "hidden_size": vision.hidden_size,
            "num_hidden_layers": vision.num_hidden_layers,
            "num_attention_heads": vision.num_attention_heads,
            "attention_bias": vision.qkv_bias,
            "use_qk_norm": vision.qk_normalization,
            "intermediate_size": vision.intermediate_size,
            "norm_type": vision.norm_type,
            "layer_norm_eps": vision.layer_norm_eps,
            "image_size": [config.tile_size, config.tile_size],
            "patch_size": [vision.patch_size, vision.patch_size],
        },
        text_config=config.llm_config.to_dict(),
        image_token_id=config.image_token_id,
        image_seq_length=config.num_image_token,
        downsample_ratio=config.downsample_ratio,
        tie_word_embeddings=False,
    )


def internvl_of(model: NVLM_D_Model) -> Any:
    """`InternVLForConditionalGeneration` with our model's weights, shared in memory."""
    config = internvl_config(model.config)
    with torch.device("meta"), no_init_weights():
        peer = InternVLForConditionalGeneration(config)
    peer.model.vision_tower.config._attn_implementation = model.vision_model.config._attn_implementation
    own = model.vision_model
    tower = peer.model.vision_tower
    embeddings = tower.embeddings
    embeddings.cls_token = own.embeddings.class_embedding
    embeddings.position_embeddings = own.embeddings.position_embedding
    embeddings.patch_embeddings.projection = own.embeddings.patch_embedding
    for theirs, ours in zip(tower.encoder.layer, own.encoder.layers, strict=True):
        attention, weights = theirs.attention, ours.attn.qkv.weight.detach().chunk(3)  # [D, D] each
        for part, weight in zip((attention.q_proj, attention.k_proj, attention.v_proj), weights, strict=True):
            part.weight = nn.Parameter(weight, requires_grad=False)
        attention.projection_layer = ours.attn.proj
        attention.q_norm.weight, attention.k_norm.weight = ours.attn.q_norm.weight, ours.attn.k_norm.weight
        theirs.mlp.fc1, theirs.mlp.fc2 = ours.mlp.fc1, ours.mlp.fc2
        theirs.layernorm_before.weight, theirs.layernorm_after.weight = ours.norm1.weight, ours.norm2.weight
        theirs.lambda_1, theirs.lambda_2 = ours.ls1, ours.ls2
    projector = peer.model.multi_modal_projector
    projector.layer_norm, projector.linear_1, projector.linear_2 = model.mlp1[0], model.mlp1[1], model.mlp1[3]
    decoder = decoder_of(model)
    peer.model.language_model = decoder.model
    peer.lm_head = decoder.lm_head
    return peer.eval()
