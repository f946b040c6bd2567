"""The settings of a run: the record, the published presets, changing a setting, and reading saved ones."""
