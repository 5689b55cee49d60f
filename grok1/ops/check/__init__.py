"""Kernels beside XLA's forms of their operations, on the devices that are here."""
