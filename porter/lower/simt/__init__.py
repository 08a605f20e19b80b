"""Family simt: every kernel of a planned program as source for groups of threads, and the launches to run it."""
