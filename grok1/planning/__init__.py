"""What a model takes of memory and time, before any of it is taken."""
