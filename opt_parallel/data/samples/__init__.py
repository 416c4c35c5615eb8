"""Cuts token stores into training samples, orders the samples, and collates them into batches."""
