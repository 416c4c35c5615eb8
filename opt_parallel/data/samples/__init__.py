"""From token stores to samples and batches."""
