"""Family simt: a program's kernels as source for groups of threads, and the launches that run it."""
