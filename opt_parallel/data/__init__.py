"""Reads text, encodes it to token ids, stores the ids on disk, and cuts them into training samples and batches."""
