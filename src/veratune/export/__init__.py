"""Write-only formats: LoRA for PEFT and vLLM, and GGUF."""
