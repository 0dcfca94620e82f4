"""How each `python -m gradjax.*` starts and ends."""

import logging as standard_logging
import os
import sys
from collections.abc import Callable
from pathlib import Path

from absl import app, logging

from gradjax.errors import GradjaxError


def _worth_saying(record: standard_logging.LogRecord) -> bool:
    """Everything of gradjax; libraries speak up only where something is wrong."""
    ours = Path(record.pathname).is_relative_to(Path(__file__).parent.parent)
    # Orbax warns of what it left out on purpose.
    loud = standard_logging.ERROR if "orbax" in record.pathname else standard_logging.WARNING
    return ours or record.levelno >= loud


def start(main: Callable[[list[str]], None]) -> None:
    """Runs a program's `main` under absl, its log on standard error from INFO up.

    A GradjaxError ends it with one sentence and status 1, Ctrl-C with a word on what remains.
    """

    def guarded(argv: list[str]) -> None:
        logging.get_absl_handler().python_handler.addFilter(_worth_saying)
        # transformers would say at import that it misses PyTorch, which gradjax does not use.
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
        try:
            if len(argv) > 1:
                raise GradjaxError(f"unexpected argument {argv[1]!r}; expected flags only (--help)")
            main(argv)
        except GradjaxError as error:
            sys.exit(f"gradjax: {error}")
        except KeyboardInterrupt:
            sys.exit(
                "gradjax: stopped; finished work is kept, the same command goes on "
                "(--overwrite would start anew)"
            )

    app.run(guarded)
