"""Encodes text records into arrays of token ids."""
