"""Blame: which nodes of a port, or of its lowered program, the drift comes from."""
