"""`python -m polytropo`: the command line."""

from polytropo.cli.entry import main

main()
