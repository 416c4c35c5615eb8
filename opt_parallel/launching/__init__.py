"""Starting a run on a machine or a cluster: settings and overrides in; a command, a batch script or manifests out."""
