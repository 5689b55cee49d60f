"""Requests, and how they share the engine."""
