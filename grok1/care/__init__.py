"""The care of checkpoints: verify, inspect, convert."""
