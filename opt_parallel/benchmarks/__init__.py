"""The measurements of `opt-parallel benchmark`."""
