"""`python -m gradjax.convert`: another name of `gradjax convert`."""

from gradjax.cli.app import start
from gradjax.cli.convert import main

if __name__ == "__main__":
    start(main)
