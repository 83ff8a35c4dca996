"""What follows from the number of a step alone, so that a resumed run does the same."""
