"""How fast is it, beside the others? See docs/speed.md; `python -m benchmarks.speed --help` lists the suites."""
