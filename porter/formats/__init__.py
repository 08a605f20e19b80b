"""Number formats in numpy: element codes, blocks, rounding; knows no graph."""
