"""Speed of this and of other libraries; see docs/speed.md. `python -m benchmarks.speed --help` lists the suites."""
