"""`python -m gradjax.select`: another name of `gradjax select`."""

import sys

from gradjax.cli.app import main

if __name__ == "__main__":
    main(["select", *sys.argv[1:]])
