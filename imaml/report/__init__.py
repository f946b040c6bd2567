"""What a person sees of a run: the learning curve as a picture, progress as lines of text."""
