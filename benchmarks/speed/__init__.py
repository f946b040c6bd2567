"""Speed of this library and of others; see docs/speed.md. `python -m benchmarks.speed --help` lists the suites."""
