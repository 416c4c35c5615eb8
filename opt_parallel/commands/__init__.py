"""The commands of `opt-parallel`, one module each. `run()` starts a command with the words of `sys.argv`."""
