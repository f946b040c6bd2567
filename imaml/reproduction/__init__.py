"""Reproduction of the paper's table 2 and figures 2a and 2b.

``paper`` holds the printed numbers, and ``records`` holds the results of our runs. ``table`` prints both side by side.
``gradient_error`` computes figure 2a, and ``memory`` computes figure 2b. ``pictures`` draws all three without JAX.
"""
