"""The settings of a run: the record of a preset, the published presets, overrides, and reading of saved settings."""
