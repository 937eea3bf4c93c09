"""Checkpoints: committed, verified, and in other formats."""
