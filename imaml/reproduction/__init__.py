"""The paper's table and figures beside ours.

``paper`` has its printed numbers, ``records`` what our runs came to, ``table`` both side by side; ``gradient_error``
and ``memory`` compute figures 2a and 2b on the spot; ``pictures`` draws them, and imports no JAX.
"""
