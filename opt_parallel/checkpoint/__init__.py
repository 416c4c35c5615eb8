"""Checkpoints: a folder that is whole or absent, with the weights as logical tensors that any layout can read."""
