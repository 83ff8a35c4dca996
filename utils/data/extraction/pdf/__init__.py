"""A PDF file as text, from the places of its characters."""
