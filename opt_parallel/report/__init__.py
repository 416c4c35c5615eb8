"""A run's metrics, trackers, plots and scores."""
