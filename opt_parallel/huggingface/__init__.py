"""Hugging Face's formats: configurations, names, weights, tokenizers, folders."""
