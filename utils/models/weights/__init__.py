"""Weights on disk: safetensors a few rows at a time, FP8 blocks, tensor names, a sample of layers."""
