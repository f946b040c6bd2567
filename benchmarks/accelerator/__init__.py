"""Training of the paper's cells on an accelerator, in calls of some minutes that resume the runs of earlier calls."""
