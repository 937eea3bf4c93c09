"""The checkpoints of a run: committed whole, verified before use, kept as long as retention says."""
