"""What leaves the pipeline: merged models, GGUF, hubs, and whether an artefact can be trusted."""
