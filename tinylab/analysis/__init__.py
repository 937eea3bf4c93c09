"""What changed between checkpoints."""
