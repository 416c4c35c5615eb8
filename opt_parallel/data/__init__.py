"""From text to micro-batches: tokens, the store of blocks, the order of samples, batches."""
