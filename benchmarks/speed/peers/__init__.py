"""What is timed: a module for each library, imported only in a process of its own.

Each has ``programs(item, dtype) -> dict of name to callable``. A program does its whole work when it is called, waits
for it, and returns its gradient as NumPy arrays under the names that :mod:`benchmarks.speed.workloads` gives them.
"""
