"""Builds, reads and checks token stores, which hold encoded text on disk."""
