"""`python -m porter` is the command line."""

from porter.cli import main

main()
