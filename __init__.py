"""NVLM 1.0 on today's transformers.

Importing this package registers its classes, so that transformers' Auto classes load NVLM-D without
`trust_remote_code`. `__all__` is the public API.
"""

from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
)

from .configuration_intern_vit import InternVisionConfig
from .configuration_nvlm_d import NVLM_D_Config
from .conversation import get_conv_template
from .device_map import split_model
from .feature_cache import FeatureCache
from .image_processing_nvlm_d import NVLM_D_ImageProcessor
from .loading import bitsandbytes_4bit, bitsandbytes_8bit, torchao_int4, torchao_int8
from .modeling_intern_vit import InternVisionModel
from .modeling_nvlm_d import NVLM_D_Model
from .preprocessing import build_transform, dynamic_preprocess, find_closest_aspect_ratio, load_image, load_images
from .processing_nvlm_d import NVLM_D_Processor
from .session import ChatSession
from .video import load_video

__all__ = [
    "ChatSession",
    "FeatureCache",
    "InternVisionConfig",
    "InternVisionModel",
    "NVLM_D_Config",
    "NVLM_D_ImageProcessor",
    "NVLM_D_Model",
    "NVLM_D_Processor",
    "bitsandbytes_4bit",
    "bitsandbytes_8bit",
    "build_transform",
    "dynamic_preprocess",
    "find_closest_aspect_ratio",
    "get_conv_template",
    "load_image",
    "load_images",
    "load_video",
    "split_model",
    "torchao_int4",
    "torchao_int8",
]

AutoConfig.register(InternVisionConfig.model_type, InternVisionConfig, exist_ok=True)
AutoConfig.register(NVLM_D_Config.model_type, NVLM_D_Config, exist_ok=True)
AutoModel.register(InternVisionConfig, InternVisionModel, exist_ok=True)
AutoModel.register(NVLM_D_Config, NVLM_D_Model, exist_ok=True)
AutoModelForCausalLM.register(NVLM_D_Config, NVLM_D_Model, exist_ok=True)
AutoModelForImageTextToText.register(NVLM_D_Config, NVLM_D_Model, exist_ok=True)
AutoImageProcessor.register(NVLM_D_Config, slow_image_processor_class=NVLM_D_ImageProcessor, exist_ok=True)
AutoProcessor.register(NVLM_D_Config, NVLM_D_Processor, exist_ok=True)
