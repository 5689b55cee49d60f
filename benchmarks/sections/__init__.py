"""What is measured, a module for what has the same needs."""
