"""Starts runs on a machine or a cluster: from settings and overrides to a command, a batch script or manifests."""
