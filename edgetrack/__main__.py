"""``python -m edgetrack``: the command line."""

from edgetrack.cli import main

main()
