"""Adapters as files: the native format, PEFT's VeRA format, LoRA export, and the hub. Safetensors and JSON only."""
