"""What is known of a graph before it runs: sizes as expressions, contents, and what follows the past's length."""
