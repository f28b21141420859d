"""Run the command line: python -m peftopt.cli."""

from peftopt.cli import main

main()
