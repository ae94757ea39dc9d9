"""`python -m peftkit` is the `peftkit` command; `accelerate launch -m peftkit` starts its workers this way."""

from peftkit.cli import main

main()
