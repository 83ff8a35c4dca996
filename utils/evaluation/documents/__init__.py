"""Documents that every row of a comparison is scored on."""
