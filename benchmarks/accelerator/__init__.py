"""Training of the paper's cells on an accelerator, in calls of some minutes that resume each other's runs."""
