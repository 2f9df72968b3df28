"""`python -m smelt` and `torchrun -m smelt run`."""

from smelt.cli import main

main()
