"""The parts of a predicted peak."""
