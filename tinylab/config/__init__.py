"""What a run is: frozen dataclasses, presets and TOML. Standard library only."""
