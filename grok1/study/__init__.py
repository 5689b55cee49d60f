"""The laboratory: score, trace, intervene."""
