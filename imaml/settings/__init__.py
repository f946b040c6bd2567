"""The settings of a run: the preset record, the published presets, overrides, and saved settings."""
