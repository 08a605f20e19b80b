"""Sweeps: a model on several targets in several formats, each a conversion; resumable, on many workers."""
