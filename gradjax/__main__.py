"""`python -m gradjax`: another name of `gradjax`."""

from gradjax.cli.app import main

if __name__ == "__main__":
    main()
