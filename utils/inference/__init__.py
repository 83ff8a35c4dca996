"""What a model answers, and the likelihoods it gives."""
