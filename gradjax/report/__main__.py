"""`python -m gradjax.report`: another name of `gradjax report`."""

from gradjax.cli.app import start
from gradjax.cli.report import main

if __name__ == "__main__":
    start(main)
