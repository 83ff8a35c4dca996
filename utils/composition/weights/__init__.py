"""Weights of a composition on dev: what is measured, how good weights are walked to, a model of the losses between."""
