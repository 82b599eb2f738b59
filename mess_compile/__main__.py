"""`python -m mess_compile`: the command line, as torchrun starts it."""

from mess_compile.cli import main

main(prog_name="mess-compile")
