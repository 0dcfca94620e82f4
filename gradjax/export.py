"""`python -m gradjax.export`: another name of `gradjax export`."""

import sys

from gradjax.cli.app import main

if __name__ == "__main__":
    main(["export", *sys.argv[1:]])
