"""The machine underneath: its processor, processes and memory, and what is said to its user."""
