"""Weights in the graph: which there are, how they are stored in a format, and computed when they are read."""
