"""Benchmarks: speed and memory as ratios measured in one run, one module per suite, and the report over them."""
