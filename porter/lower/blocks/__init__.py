"""Kernels of schedulable blocks, in a target's numerics: what families tile and simt are lowered to."""
