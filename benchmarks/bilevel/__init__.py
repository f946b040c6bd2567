"""Comparison of stochastic bilevel algorithms with those of benchopt/benchmark_bilevel; see __main__.py."""
