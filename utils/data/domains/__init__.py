"""Domains that need no files: the documentation of the running Python, invented facts."""
