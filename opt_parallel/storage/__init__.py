"""Atomic writes, checksums and locks for files and folders, on any file system."""
