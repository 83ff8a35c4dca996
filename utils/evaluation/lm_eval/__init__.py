"""The test split as tasks for lm-evaluation-harness."""
