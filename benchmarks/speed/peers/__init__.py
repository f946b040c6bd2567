"""The timed programs: one module for each library, imported in a process of its own.

Each of these modules has a function ``programs(item, dtype)`` that returns callables by name. A call computes a
gradient and returns it as NumPy arrays under the names of :mod:`benchmarks.speed.workloads`. The programs for
the parts of our meta-gradient return None. The modules ``conv4_torch`` and ``linear_models`` have code for several
libraries.
"""
