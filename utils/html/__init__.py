"""Self-contained HTML pages: one file, no network, no script, for a screen, a phone and paper, light and dark.

pages      templates with everything escaped, and the page around them
numbers    figures as people read them, with the exact value behind
charts     lines, points and bars as inline SVG that fills whatever width it gets
"""
