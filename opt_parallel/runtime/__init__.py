"""The process: its rank, host, terminal, log, signals, errors and clock."""
