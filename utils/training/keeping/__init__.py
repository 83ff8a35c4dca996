"""A task adapter that does not undo its domain: what is looked at, decided and mixed into its steps."""
