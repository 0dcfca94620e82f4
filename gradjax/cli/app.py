"""`gradjax COMMAND`: finds the command, shows its help or runs it, and says how it ended."""

import logging as standard_logging
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from select import poll

from absl import app, flags, logging

from gradjax.cli import convert, demo, export, prepare, report, score, select, spectra
from gradjax.cli.command import COMMON, Command, help_text, parse_flags
from gradjax.errors import GradjaxError, did_you_mean, extras
from gradjax.version import __version__

_MODULES = (spectra, score, select, report, prepare, convert, export, demo)
COMMANDS: dict[str, Command] = {module.COMMAND.name: module.COMMAND for module in _MODULES}

_HELP = {"--help", "-h", "-help", "--helpfull", "--helpshort"}
_VERSION = {"--version", "-version"}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs a command of `gradjax`: its name and its flags, those of this process if not given."""
    name, *arguments = (sys.argv[1:] if argv is None else argv) or ["--help"]
    if name in COMMANDS:
        run(COMMANDS[name], arguments)
    elif name in _HELP:
        _show(overview())
    elif name in _VERSION:
        _show(f"gradjax {__version__}")
    elif name.startswith("-"):
        hint = did_you_mean(name, ["--help", "--version"])
        sys.exit(
            f"gradjax: {name} stands before a command{hint}; expected gradjax COMMAND [flags], "
            "and gradjax --help lists the commands"
        )
    else:
        hint, names = did_you_mean(name, COMMANDS), ", ".join(COMMANDS)
        sys.exit(
            f"gradjax: {name} is not a command{hint}; expected one of {names}, "
            "and gradjax --help says what they do"
        )


def overview() -> str:
    """What `gradjax --help` prints."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {command.summary}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "gradjax COMMAND [flags]",
            "",
            "  gradjax demo",
            "",
            "Commands",
            *lines,
            "",
            "gradjax COMMAND --help explains one of them.",
        ]
    )


def run(command: Command, arguments: Sequence[str]) -> None:
    """Runs a command with its arguments, or prints its help or the version."""
    if _HELP & set(arguments):
        _show(help_text(command))
    elif _VERSION & set(arguments):
        _show(f"gradjax {__version__}")
    else:
        start(
            lambda _: command.main(),
            [command.program, *arguments],
            partial(parse_flags, own=command.flags, program=command.program),
        )


def start(
    main: Callable[[list[str]], None],
    argv: list[str] | None = None,
    parse: Callable[[list[str]], list[str]] = parse_flags,
) -> None:
    """Runs a program's `main` under absl, its log on standard error from INFO up.

    A GradjaxError ends it with one sentence and status 1, Ctrl-C with a word on what remains.
    """

    def parsed(argv: list[str]) -> list[str]:
        try:
            return parse(argv)
        except GradjaxError as error:
            sys.exit(f"gradjax: {error}")

    def guarded(argv: list[str]) -> None:
        logging.get_absl_handler().python_handler.addFilter(_worth_saying)
        try:
            _set_up_log(Path(argv[0]).name.replace(" ", "-"))
            with _output(), extras():
                main(argv)
        except GradjaxError as error:
            sys.exit(f"gradjax: {error}")
        except KeyboardInterrupt:
            sys.exit(
                "gradjax: stopped; finished work is kept, the same command goes on "
                "(--overwrite would start anew)"
            )

    app.run(guarded, argv, flags_parser=parsed)


def _set_up_log(name: str) -> None:
    """Does what --quiet and --log_dir say."""
    if COMMON.quiet:
        logging.set_verbosity(logging.WARNING)
    if directory := flags.FLAGS.log_dir:
        flags.FLAGS.alsologtostderr = True
        folder = Path(directory).expanduser()
        try:
            folder.mkdir(parents=True, exist_ok=True)
            logging.get_absl_handler().use_absl_log_file(name, str(folder))
        except OSError as error:
            raise GradjaxError(
                f"--log_dir={directory} cannot be written ({error.strerror}); give another folder"
            ) from error


def _show(text: str) -> None:
    with _output():
        print(text)


@contextmanager
def _output() -> Iterator[None]:
    """Around what prints: ends the program quietly, with status 1, where its reader has left.

    That is how `gradjax prepare --list | head -1` ends.
    """
    try:
        yield
        sys.stdout.flush()
    except BrokenPipeError:
        reader = poll()
        reader.register(sys.stdout, 0)  # asks for nothing but whether it is gone
        if not reader.poll(0):
            raise  # it was another connection
        # What is left would be written, and fail, when Python ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def _worth_saying(record: standard_logging.LogRecord) -> bool:
    """Everything of gradjax; libraries speak up only where something is wrong."""
    ours = Path(record.pathname).is_relative_to(Path(__file__).parent.parent)
    # Orbax warns of what it left out on purpose; the Hub's client also prints its own warnings.
    quiet = any(name in record.pathname for name in ("orbax", "huggingface_hub"))
    loud = standard_logging.ERROR if quiet else standard_logging.WARNING
    return ours or record.levelno >= loud
