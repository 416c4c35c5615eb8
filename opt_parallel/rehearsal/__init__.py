"""One step of the real network for one rank of any number of ranks, without a GPU and without other ranks."""
