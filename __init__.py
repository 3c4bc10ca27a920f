"""NVLM 1.0 on today's transformers.

Importing this package registers its classes, so that transformers' Auto classes load NVLM-D without
`trust_remote_code`.
"""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .configuration_intern_vit import InternVisionConfig
from .configuration_nvlm_d import NVLM_D_Config
from .modeling_intern_vit import InternVisionModel
from .modeling_nvlm_d import NVLM_D_Model

AutoConfig.register(InternVisionConfig.model_type, InternVisionConfig, exist_ok=True)
AutoConfig.register(NVLM_D_Config.model_type, NVLM_D_Config, exist_ok=True)
AutoModel.register(InternVisionConfig, InternVisionModel, exist_ok=True)
AutoModel.register(NVLM_D_Config, NVLM_D_Model, exist_ok=True)
AutoModelForCausalLM.register(NVLM_D_Config, NVLM_D_Model, exist_ok=True)
