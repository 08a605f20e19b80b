"""Passes that simplify a graph and change no result."""
