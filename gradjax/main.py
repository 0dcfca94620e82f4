"""`python -m gradjax.main`: another name of `gradjax spectra`."""

from gradjax.cli.app import start
from gradjax.cli.spectra import main

if __name__ == "__main__":
    start(main)
