"""Passes that replace a subgraph by one standard operator or one matmul."""
