"""From an encoder and a decoder to an NVLM-D, and from a trained one to the checkpoint of this repository."""

import json
import os
import shutil
from pathlib import Path

import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from nvlm import NVLM_D_Config, NVLM_D_Model
from nvlm.checkpoint import read_json
from nvlm.cli.overlay import hub_files, overlay
from nvlm.prompt import control_token_id
from tiny.page import TILE

DUMMY_HEADS = 7  # zero heads that the published encoder stores, and that vLLM asks for (SPEC 2 and 11)
REPOSITORY = Path(__file__).resolve().parent.parent


def assemble(
    folder: Path,
    *,
    encoder: PreTrainedModel,
    decoder: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    seed: int,
) -> None:
    """Write a checkpoint of an encoder, a decoder and a projector that is drawn anew."""
    torch.manual_seed(seed)
    config = NVLM_D_Config(
        vision_config=encoder.config.to_dict(),
        llm_config=decoder.config.to_dict(),
        force_image_size=TILE,
        image_token_id=control_token_id(tokenizer, "<|vision_pad|>"),
        dtype="float32",
    )
    model = NVLM_D_Model(config)
    model.vision_model.load_state_dict(encoder.state_dict())
    model.language_model.load_state_dict(decoder.state_dict())
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def add_dummy_heads(model: NVLM_D_Model, count: int) -> None:
    """Put zero heads behind the real ones of each of the encoder's layers; its outputs stay the same.

    Raises:
        ValueError: there are dummy heads already.
    """
    config = model.config.vision_config
    if config.num_dummy_heads:
        raise ValueError(f"The encoder has {config.num_dummy_heads} dummy heads already, expected 0.")
    extra = count * config.head_dim

    def padded(parameter: torch.Tensor, *, parts: int) -> torch.nn.Parameter:
        zeros = parameter.new_zeros(extra, *parameter.shape[1:])
        pieces = [piece for part in parameter.detach().chunk(parts) for piece in (part, zeros)]
        return torch.nn.Parameter(torch.cat(pieces))

    for layer in model.vision_model.encoder.layers:
        attention = layer.attn
        attention.qkv.weight = padded(attention.qkv.weight, parts=3)
        attention.q_norm.weight = padded(attention.q_norm.weight, parts=1)
        attention.k_norm.weight = padded(attention.k_norm.weight, parts=1)
        attention.proj.weight = torch.nn.Parameter(padded(attention.proj.weight.T, parts=1).T.contiguous())
    config.num_dummy_heads = count


def tidy_config(file: Path) -> None:
    """Give a config.json the architecture's published name, and take out where its parts were on this machine."""
    config = read_json(file) | {"architectures": ["NVLM_D"]}
    for part in ("llm_config", "vision_config"):
        config[part].pop("_name_or_path", None)
    file.write_text(json.dumps(config, indent=2) + "\n")


def tidy_tokenizer(file: Path) -> None:
    """Give a tokenizer_config.json the form that transformers 4.57 reads too, without what it says of this machine."""
    config = read_json(file)
    special = config.pop("extra_special_tokens")
    kept = {name: value for name, value in config.items() if name not in ("is_local", "local_files_only")}
    file.write_text(json.dumps({**kept, "additional_special_tokens": special}, indent=2, sort_keys=True) + "\n")


def publish(trained: Path, folder: Path) -> None:
    """Write the checkpoint that the repository holds: with dummy heads, in bfloat16, with links to the code.

    Everything that the Hub's loader wants is there; the modules are links to the repository's own.
    """
    model = NVLM_D_Model.from_pretrained(trained, dtype=torch.bfloat16)
    add_dummy_heads(model, DUMMY_HEADS)
    model.config.dtype = torch.bfloat16
    work = folder.with_name(folder.name + ".part")
    shutil.rmtree(work, ignore_errors=True)
    model.save_pretrained(work)
    AutoTokenizer.from_pretrained(trained).save_pretrained(work)
    tidy_config(work / "config.json")
    tidy_tokenizer(work / "tokenizer_config.json")
    overlay(work)
    for module in hub_files():
        (work / module.name).unlink()
        os.symlink(os.path.relpath(module, folder), work / module.name)
    shutil.rmtree(work / ".nvlm-overlay")
    shutil.rmtree(folder, ignore_errors=True)
    work.rename(folder)
