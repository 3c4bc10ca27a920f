"""NVLM-D inside evaluation harnesses: see docs/evaluation.md."""
