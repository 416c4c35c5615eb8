"""The process: rank, host, terminal, log, signals, errors, and the run's clock."""
