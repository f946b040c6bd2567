"""Training of the paper's cells on an accelerator, in stretches of minutes that add up."""
