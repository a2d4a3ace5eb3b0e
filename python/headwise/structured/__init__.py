"""Structured pruning: heads, neurons, blocks and hidden dimensions of a transformer."""
