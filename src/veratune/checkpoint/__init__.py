"""Read and write adapter files in veratune's and PEFT's formats, also on the Hub. Safetensors and JSON only."""
