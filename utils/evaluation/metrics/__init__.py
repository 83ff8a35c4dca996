"""What an evaluation is decided on: the primary metric, built in or a person's own function."""
