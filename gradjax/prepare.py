"""`python -m gradjax.prepare`: another name of `gradjax prepare`."""

import sys

from gradjax.cli.app import main

if __name__ == "__main__":
    main(["prepare", *sys.argv[1:]])
