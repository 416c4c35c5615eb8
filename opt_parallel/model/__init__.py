"""The OPT network, its output layers, its LoRA terms, and text generation."""
