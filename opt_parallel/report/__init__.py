"""What a run reports: metrics, trackers, plots, scores."""
