"""How a matrix's codes and scales are chosen: one method a file, in numpy, knowing no graph."""
