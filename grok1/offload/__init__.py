"""Models larger than memory: experts come from where they lie."""
