"""`python -m gradjax.select`: another name of `gradjax select`."""

from gradjax.cli.app import start
from gradjax.cli.select import main

if __name__ == "__main__":
    start(main)
