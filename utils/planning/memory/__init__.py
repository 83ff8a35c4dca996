"""The parts of a predicted peak: how many parameters there are, and what a training step keeps."""
