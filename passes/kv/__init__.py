"""Passes that change how the KV cache is kept."""
