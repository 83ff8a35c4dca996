"""The canary rollout as values: no disk, no clock, no network.

eprocess     evidence that stays valid however often it is looked at
policy       what is measured, how much error is allowed in all, and the steps
gate         counts in, verdict out: worse, not worse, or not known yet
controller   state + observation -> decision; a journal of observations replays to the same state
simulation   thousands of ramps at once, to measure how often a gate is wrong
"""
