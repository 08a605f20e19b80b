"""What is known of a graph before it runs: sizes and contents as expressions of batch, sequence and past."""
