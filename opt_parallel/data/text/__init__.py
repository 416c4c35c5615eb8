"""Reads text records from files and data sets."""
