"""What transformers' own processor tests need to know of this package's processor.

    run_processor.py --package . --processor-class processing_nvlm_d.NVLM_D_Processor --hooks THIS_FILE

The tests' tokenizer has a token a byte, so the tags of the tiles alone are longer than their usual maximal lengths.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import AutoImageProcessor

PROCESSOR_KWARGS = {
    "image_seq_length": 2,
    "chat_template": (Path(__file__).resolve().parents[2] / "chat_template.jinja").read_text(encoding="utf-8"),
}
CLASS_ATTRS = {
    "images_text_kwargs_max_length": 150,
    "images_text_kwargs_override_max_length": 150,
    "images_unstructured_max_length": 150,
    "chat_template_max_length": 200,
}


def setup_image_processor(load: Callable[[str], Any]) -> Any:
    """A small image processor, registered so that the Auto class finds it without `trust_remote_code`."""
    image_processor_class = load("image_processing_nvlm_d.NVLM_D_ImageProcessor")
    config_class = load("configuration_nvlm_d.NVLM_D_Config")
    AutoImageProcessor.register(config_class, slow_image_processor_class=image_processor_class, exist_ok=True)
    return image_processor_class(size=28, max_patches=2)
