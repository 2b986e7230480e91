"""`python -m unitnorm`: the command line."""

from unitnorm.cli import main

main(prog_name="unitnorm")
