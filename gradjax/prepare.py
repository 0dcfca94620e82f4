"""`python -m gradjax.prepare`: another name of `gradjax prepare`."""

from gradjax.cli.app import start
from gradjax.cli.prepare import main

if __name__ == "__main__":
    start(main)
