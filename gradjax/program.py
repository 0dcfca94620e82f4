"""How each `python -m gradjax.*` starts and ends."""

import logging as standard_logging
import sys
from collections.abc import Callable

from absl import app, flags, logging

from gradjax.errors import GradjaxError


def start(main: Callable[[list[str]], None]) -> None:
    """Runs a program's `main` under absl, its log on standard error from INFO up.

    A GradjaxError ends it with one sentence and status 1, Ctrl-C with a word on what remains.
    """

    def guarded(argv: list[str]) -> None:
        if flags.FLAGS["verbosity"].using_default_value:
            logging.set_verbosity(logging.INFO)
            # Libraries speak up only where something is wrong.
            standard_logging.getLogger("jax").setLevel(standard_logging.WARNING)
        try:
            if len(argv) > 1:
                raise GradjaxError(f"unexpected argument {argv[1]!r}; expected flags only (--help)")
            main(argv)
        except GradjaxError as error:
            sys.exit(f"gradjax: {error}")
        except KeyboardInterrupt:
            sys.exit("gradjax: stopped; finished work is kept, the same command goes on")

    app.run(guarded)
