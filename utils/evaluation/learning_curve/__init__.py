"""Would more data help? Adapters trained on parts of the data, a power law through their losses, one doubling ahead."""
