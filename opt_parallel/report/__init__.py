"""Metrics, experiment trackers, plots and classification scores of a run."""
