"""Several ranks on one model: what the launcher asks for, who does what, and how a model is sharded."""
