"""Reports of a run for people: the learning curve as a picture, and progress as lines of text."""
