"""Reports of runs for people: a picture of the learning curve, an HTML page of one run, and a table of several runs."""
