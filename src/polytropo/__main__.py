"""`python -m polytropo`: the command line."""

from polytropo.cli.main import main

main()
