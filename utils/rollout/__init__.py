"""The canary rollout. Here it is values without disk, clock or network; in edge/ it meets the world.

e_process    evidence that stays valid however often it is looked at
policy       what is measured, how much error is allowed in all, and the steps
gate         counts in, verdict out: worse, not worse, or not known yet
controller   state + observation -> decision; a journal of observations replays to the same state
simulation   thousands of ramps at once, to measure how often a gate is wrong
kubernetes   the same rollout as files for Gateway API, Argo Rollouts and Flagger
"""
