"""The command line: `grok1`, `python -m grok1` and `run.py`."""
