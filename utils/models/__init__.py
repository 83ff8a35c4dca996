"""A base model: where it comes from, what identifies it, how it is loaded, where it computes."""
