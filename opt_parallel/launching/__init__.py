"""Start runs on one host or a cluster, by a command, a batch script or Kubernetes manifests."""
