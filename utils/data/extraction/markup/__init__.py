"""Markup languages as text: reStructuredText, Sphinx's too, and LaTeX."""
