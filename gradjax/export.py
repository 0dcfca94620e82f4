"""`python -m gradjax.export`: another name of `gradjax export`."""

from gradjax.cli.app import start
from gradjax.cli.export import main

if __name__ == "__main__":
    start(main)
