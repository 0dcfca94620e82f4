"""`python -m gradjax.main`: another name of `gradjax spectra`."""

import sys

from gradjax.cli.app import main

if __name__ == "__main__":
    main(["spectra", *sys.argv[1:]])
