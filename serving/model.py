"""The model class that vLLM loads: its own NVLM_D with this package's pictures and prompts."""

from typing import Any

from vllm.model_executor.models.intern_vit import InternVisionModel
from vllm.model_executor.models.nvlm_d import NVLM_D_Model
from vllm.multimodal import MULTIMODAL_REGISTRY

from nvlm.serving.pictures import NvlmDummyInputs, NvlmMultiModalProcessor, NvlmProcessingInfo


@MULTIMODAL_REGISTRY.register_processor(NvlmMultiModalProcessor, info=NvlmProcessingInfo, dummy_inputs=NvlmDummyInputs)
class ServedNVLM_D_Model(NVLM_D_Model):
    """vLLM's NVLM_D; weights and forward pass are vLLM's own."""

    def _init_vision_model(self, config: Any, quant_config: Any, *, prefix: str) -> InternVisionModel:
        """The encoder with as many dummy heads as the checkpoint has, not always 7."""
        vision_config = config.vision_config
        return InternVisionModel(
            vision_config,
            quant_config=quant_config,
            num_hidden_layers_override=vision_config.num_hidden_layers + config.select_layer + 1,
            num_dummy_heads=vision_config.num_dummy_heads,
            prefix=prefix,
        )
