"""The token store: building it, reading it, checking it."""
