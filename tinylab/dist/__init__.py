"""Processes and devices, applied to the model from outside."""
