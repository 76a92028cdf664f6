"""Formats that are only written: LoRA for PEFT and vLLM, and GGUF."""
