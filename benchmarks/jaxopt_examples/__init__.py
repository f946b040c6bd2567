"""A comparison of the examples in examples/from_jaxopt/ with the same programs in jaxopt: time and lines of code."""
