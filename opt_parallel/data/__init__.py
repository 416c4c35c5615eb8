"""From text to micro-batches: records, token ids, token stores, the order of samples, batches."""
