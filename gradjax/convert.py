"""`python -m gradjax.convert`: another name of `gradjax convert`."""

import sys

from gradjax.cli.app import main

if __name__ == "__main__":
    main(["convert", *sys.argv[1:]])
