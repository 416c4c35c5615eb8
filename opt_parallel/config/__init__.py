"""The configuration: its types and checks, and Hydra's side of it."""
