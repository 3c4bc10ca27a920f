"""Serving by vLLM: its own NVLM_D runs the checkpoint, and a plugin gives it the prompts and tiles of this package."""
