"""Search: which format each weight, and each side of a cache, is best kept in under a budget."""
