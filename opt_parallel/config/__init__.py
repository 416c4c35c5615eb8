"""The configuration: typed sections, their checks, and the interface to Hydra."""
