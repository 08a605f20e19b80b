"""Kernels of blocks scheduled for a chip with scratchpads: levels, copies, unit steps (family tile)."""
