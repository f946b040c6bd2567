"""Training, evaluation and verification of a preset; the files that a run writes and the signals that stop it."""
