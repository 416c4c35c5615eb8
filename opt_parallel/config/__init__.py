"""The typed sections of the configuration, their checks, and the interface to Hydra."""
