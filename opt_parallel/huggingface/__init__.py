"""Reads and writes Hugging Face's formats of configurations, weights, tokenizers and model folders."""
