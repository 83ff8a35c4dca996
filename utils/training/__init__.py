"""Training one adapter: the loop, its checkpoints and guards, and the run around it."""
