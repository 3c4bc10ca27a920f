"""Training NVLM: stages as YAML files, run by transformers' Trainer on one CPU, many GPUs or a cluster."""

from .run import Result, train
from .stage import LoRA, Stage

__all__ = ["LoRA", "Result", "Stage", "train"]
