"""Checkpoints: a folder, complete or absent, with the weights as logical tensors that any layout can read."""
