"""The trained checkpoint as a folder that `AutoModel` and `AutoProcessor` load, like the one it began with."""

import shutil
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import nvlm
from nvlm.processing_nvlm_d import NVLM_D_Processor

_WEIGHTS = (".safetensors", ".bin", ".pt", ".index.json")
_RECORDS = ("log.jsonl", "loss.png", "stage.yaml")  # of the run that made the start


def write_checkpoint(
    folder: Path,
    *,
    start: Path,
    model: PreTrainedModel,
    weights: dict[str, torch.Tensor],
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Write a whole checkpoint: weights, config, tokenizer and processor files.

    Args:
        folder: where to.
        start: the checkpoint that training began with; its other files (code, licence) are copied.
        model: whose config is written.
        weights: every tensor by its published name.
        tokenizer: the checkpoint's.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for file in start.iterdir():
        if file.is_file() and not file.name.endswith((*_WEIGHTS, *_RECORDS)):
            shutil.copy(file, folder)
    model.save_pretrained(folder, state_dict=weights)
    template = Path(nvlm.__file__).with_name("chat_template.jinja").read_text(encoding="utf-8")
    processor = NVLM_D_Processor.from_model_config(model.config, tokenizer, chat_template=template)
    processor.save_pretrained(folder)
