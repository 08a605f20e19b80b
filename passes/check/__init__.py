"""Passes that change nothing and refuse what cannot be ported."""
