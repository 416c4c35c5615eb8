"""Reads the checkpoints that Meta published in the format of metaseq, without running a pickle's code."""
