"""Several pieces in one row of a batch, none of which sees another: how a model is told, and what was measured."""
