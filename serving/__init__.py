"""Serving: vLLM's NVLM_D with this package's prompts and tiles (a plugin), and transformers' own server."""
