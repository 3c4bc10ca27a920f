"""The entry point `lmms_eval.models`: tells lmms-eval which classes answer for `--model nvlm_d`, importing neither."""

from typing import Any


def manifest() -> Any:
    """What lmms-eval registers, its `ModelManifest`."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(
        model_id="nvlm_d",
        chat_class_path="nvlm.integrations.lmms_eval_models.ChatNVLM_D",
        simple_class_path="nvlm.integrations.lmms_eval_models.SimpleNVLM_D",
    )
