"""`python -m gradjax.score`: another name of `gradjax score`."""

import sys

from gradjax.cli.app import main

if __name__ == "__main__":
    main(["score", *sys.argv[1:]])
