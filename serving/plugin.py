"""The entry point `vllm.general_plugins`: tells vLLM about this package's NVLM_D and its renderer, importing neither.

vLLM calls `register` in each of its processes, whatever model it serves, so nothing here may fail or change another
model. What does not fit the installed vLLM fails where an NVLM_D is loaded.
"""

import logging

ARCHITECTURE = "NVLM_D"


def register() -> None:
    """Register the model class (its pictures) and the renderer (its prompts); calling it again changes nothing."""
    from vllm import ModelRegistry

    ModelRegistry.register_model(ARCHITECTURE, "nvlm.serving.model:ServedNVLM_D_Model")
    try:
        from vllm.renderers.registry import RENDERER_REGISTRY
    except ImportError:
        logging.getLogger(__name__).warning("nvlm: this vLLM has no renderers; NVLM_D needs vLLM 0.32 or newer.")
        return
    RENDERER_REGISTRY.renderers["hf"] = ("nvlm.serving.renderer", "make_renderer")
