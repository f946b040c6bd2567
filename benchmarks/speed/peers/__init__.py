"""The timed programs: one module for each library, which is imported only in its peer's process.

Each module has a function ``programs(item, dtype)`` that returns callables by name. A call computes a gradient, waits
for the result, and returns it as NumPy arrays under the names of :mod:`benchmarks.speed.workloads`.
"""
