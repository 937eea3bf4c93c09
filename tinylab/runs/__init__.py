"""Where a run lives: its folder, metrics and manifests. Standard library only."""
