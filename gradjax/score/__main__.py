"""`python -m gradjax.score`: another name of `gradjax score`."""

from gradjax.cli.app import start
from gradjax.cli.score import main

if __name__ == "__main__":
    start(main)
