"""Compares the examples in examples/from_jaxopt/ with the same programs in jaxopt, in time and in lines of code."""
