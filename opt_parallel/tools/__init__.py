"""What works on checkpoints beside training: export, verify, evaluate, inspect, compare."""
