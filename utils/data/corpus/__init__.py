"""The corpus: what was read and left out, near duplicates, and what is written to prepared data."""
