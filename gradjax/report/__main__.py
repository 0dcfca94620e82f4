"""`python -m gradjax.report`: another name of `gradjax report`."""

import sys

from gradjax.cli.app import main

if __name__ == "__main__":
    main(["report", *sys.argv[1:]])
