"""Several adapters as one: methods over factors, what they must pass, weights chosen on dev, where adapters collide."""
