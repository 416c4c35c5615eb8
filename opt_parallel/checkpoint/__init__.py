"""Saves checkpoints, and reads them into any number of processes, independently of how many processes saved them."""
