"""The files of Hydra's configuration, `pkg://opt_parallel.configs` for a search path."""
