"""Text out of one file: a module for each family of formats, `formats` lists them, `pool` runs them in child processes.

Nothing here imports torch, datasets or a model: a worker process starts in a fraction of a second.
"""
