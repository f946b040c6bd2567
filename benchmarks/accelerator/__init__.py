"""Training for the cells of the paper's table 2 on an accelerator, in calls of minutes that resume earlier calls."""
