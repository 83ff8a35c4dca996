"""The proof: does the adaptation help? Who takes part, what is scored, what follows, how it is shown.

families    the runs that are compared: one family for each seed, with its controls
controls    training what a comparison lacks, by the pipeline's own scripts
cells       each row as an adapter on one loaded base; scoring it
results     from per-item scores to numbers with intervals, contrasts, examples
reads       how often a test split has been read
table       for a terminal
report      report.html: pictures (SVG), background (roles, training, data, lineage), templates and style
lookup      the evaluation of a composed model, for its card
"""
