"""Published checkpoints: Hugging Face safetensors both ways, T5X in. Rules are data; one engine runs them."""
