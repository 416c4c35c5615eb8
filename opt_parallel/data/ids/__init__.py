"""Reads files of token ids: their formats, and their documents."""
