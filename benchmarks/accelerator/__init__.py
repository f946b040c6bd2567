"""Training for the cells of table 2 of the implicit MAML paper, in short calls that resume the earlier ones."""
