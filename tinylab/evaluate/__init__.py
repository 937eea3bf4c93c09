"""Scores with error bars."""
