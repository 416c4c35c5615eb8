"""Tools to export, verify, evaluate and inspect checkpoints, and to compare runs."""
