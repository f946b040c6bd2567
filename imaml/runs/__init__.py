"""Training, evaluation and verification of a preset, and the files and signals of a run."""
