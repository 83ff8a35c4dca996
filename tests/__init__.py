"""Tests, one flat folder: `python -m unittest discover tests`."""
