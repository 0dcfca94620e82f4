"""What a command is: its flags in groups, its help, how its flags are read, and how to call it."""

import dataclasses
import functools
import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import flags

from gradjax.errors import GradjaxError, did_you_mean
from gradjax.shipped import shipped

WIDTH = 80  # of all that --help prints
_ROOT = Path(__file__).parent.parent.parent
_EVERYWHERE = """\
Everywhere
  --flagfile=FILE
      takes flags from a file, one per line; where there is no such file, one
      that comes with gradjax, as configs/qwen2.5_1.5b.flags
  --quiet
      warnings only, as --verbosity=-1
  --log_dir=DIR
      writes the log into a file there, too
  --version
  --help, -h"""

# Of every command, beside absl's own.
COMMON = flags.FlagValues()
flags.DEFINE_boolean("quiet", False, "warnings only", COMMON)


@dataclasses.dataclass(frozen=True)
class Command:
    """A command as its own help, the command line and the documentation see it.

    `flags` are its own, apart from absl's global ones: those of all commands can be loaded in one
    process. No line of a text is longer than WIDTH.
    """

    program: str  # as it is called: `gradjax spectra`
    summary: str  # one line
    examples: Sequence[str]  # the first one stands first
    details: str
    groups: Mapping[str, Sequence[flags.FlagHolder[Any]]]  # by purpose, each flag in one group
    flags: flags.FlagValues
    main: Callable[[], None]  # runs it once the flags are parsed

    @property
    def name(self) -> str:
        """The last word of the program."""
        return self.program.split()[-1]


def help_text(command: Command) -> str:
    """What `--help` prints: an example, what the command does, its flags, more examples."""
    first, *others = command.examples
    parts = [f"{command.program}: {command.summary}", f"  {first}", command.details.strip()]
    parts += [
        "\n".join([title, *(describe_flag(command.flags[holder.name]) for holder in group)])
        for title, group in command.groups.items()
    ]
    parts.append(_EVERYWHERE)
    if others:
        parts.append("\n".join(["More examples", *(f"  {example}" for example in others)]))
    return "\n\n".join(part for part in parts if part)


def describe_flag(flag: flags.Flag[Any]) -> str:
    """A flag with its choices on one line, what it means and its default on the next ones."""
    choices = _choices(flag)
    # What absl itself adds to the help of a flag with choices, and of a repeatable one.
    text = flag.help.removeprefix(f"<{'|'.join(choices)}>: ")
    text = " ".join(text.partition(";\n    repeat this option")[0].split())
    name = f"--{flag.name}={_placeholder(flag)}"
    if flag.boolean:
        name = f"--[no]{flag.name}"
    elif choices and len(head := f"--{flag.name}={'|'.join(choices)}") <= WIDTH - 2:
        name = head
    elif choices:
        text += f": one of {', '.join(choices)}"
    if flag.validators and flag.default is None:  # other validators are of bounds
        text += " (required)"
    elif "default:" not in text and flag.default not in (None, "", [], False):
        default = flag.default
        shown = ",".join(default) if isinstance(default, list) else str(default)
        text += f" (default: {shown.lower() if flag.boolean else shown})"
    wrapped = textwrap.wrap(text, WIDTH - 6, break_long_words=False, break_on_hyphens=False)
    return "\n".join([f"  {name}", *(f"      {line}" for line in wrapped)])


def _choices(flag: flags.Flag[Any]) -> Sequence[str]:
    return getattr(flag.parser, "enum_values", ())


def _placeholder(flag: flags.Flag[Any]) -> str:
    if isinstance(flag.parser, flags.IntegerParser):
        return "N"
    if isinstance(flag.parser, flags.ListParser):
        return "A,B,..."
    return flag.name.rpartition("_")[2].upper()


def parse_flags(
    argv: Sequence[str], own: flags.FlagValues = flags.FLAGS, program: str = "this program"
) -> list[str]:
    """Reads flags of a program, and absl's own, such as --verbosity; returns the program's name.

    Args:
      argv: the name of the program, and its arguments: flags only.
      own: the program's flags.
      program: how it is called, for the advice.

    Raises:
      GradjaxError: naming the argument at fault.
    """
    # The same flag objects in one place: what is unknown here is a flag of neither.
    known = flags.FlagValues()
    known.append_flag_values(own)
    known.append_flag_values(COMMON)
    for module, of_module in flags.FLAGS.flags_by_module_dict().items():
        for flag in of_module if module.startswith("absl.") else ():
            if flag.name not in known:
                known[flag.name] = flag
    name, *arguments = argv
    try:
        rest = known([name, *_find_flagfiles(arguments)])
    except (flags.Error, ValueError) as error:
        raise GradjaxError(_sentence(error, known, own, program)) from error
    own.mark_as_parsed()
    COMMON.mark_as_parsed()
    flags.FLAGS.mark_as_parsed()
    if len(rest) > 1:
        raise GradjaxError(f"unexpected argument {rest[1]!r}; expected flags only (--help)")
    return rest


def _sentence(
    error: Exception, known: flags.FlagValues, own: flags.FlagValues, program: str
) -> str:
    """What absl says of a wrong flag, as every other error of gradjax is said."""
    text = str(error)
    if isinstance(error, flags.UnrecognizedFlagError):
        names = [*own, *(f"no{name}" for name in own if own[name].boolean), *COMMON]
        names += ["flagfile", "log_dir", "verbosity", "version", "help"]
        hint = did_you_mean(error.flagname, names)
        hint = hint.replace("mean ", "mean --")
        return f"--{error.flagname} is not a flag of {program}{hint}; --help shows all of them"
    if missing := re.findall(r"^flag --(\w+)=None: ", text, re.MULTILINE):
        names = " and ".join(f"--{name}" for name in missing)
        return f"{names} must be given; {program} --help shows how"
    if without := re.fullmatch(r"Missing value for flag -*(\w+)", text):
        return f"--{without[1]} has no value; expected --{without[1]}=VALUE"
    if found := re.match(r"flag --(\w+)=(.*?): ", text, re.DOTALL):
        flag, value = known[found[1]], found[2]
        if choices := _choices(flag):
            expected = f"one of {', '.join(choices)}{did_you_mean(value, choices)}"
        else:
            expected = "true or false" if flag.boolean else flag.parser.syntactic_help
        return f"--{found[1]}={value}: expected {expected}"
    return text.partition("\n")[0]


def _find_flagfiles(arguments: Iterable[str]) -> Iterator[str]:
    """The arguments, with the path of every flagfile in place of its name."""
    rest = iter(arguments)
    for argument in rest:
        flag, equals, name = argument.partition("=")
        if flag not in ("--flagfile", "-flagfile"):
            yield argument
            continue
        name = name if equals else next(rest, "")
        path = Path(name).expanduser()
        # A pipe, as of `<(...)`, is no regular file.
        found = path if name and path.exists() and not path.is_dir() else shipped(name)
        if not found:
            raise GradjaxError(
                f"--flagfile={name}: there is no such file here, and none of this name comes with "
                "gradjax; expected a file of flags, as configs/qwen2.5_1.5b.flags"
            )
        yield f"--flagfile={found}"


def command_line(command: str, **values: object) -> str:
    """A call of `gradjax COMMAND` that a user can copy into a shell, whatever folder it is in.

    Paths among the flags' values become absolute; other values, also URLs, stay as they are.
    """
    arguments = [
        f"--{name}={value.absolute() if isinstance(value, Path) else value}"
        for name, value in values.items()
    ]
    return f"{_program()} {shlex.join([command, *arguments])}"


@functools.cache
def _program() -> str:
    """How a shell calls this gradjax."""
    script = Path(sys.executable).with_name("gradjax")
    python = f"{shlex.quote(sys.executable)} -P -m gradjax"
    if not _is_installed():
        return f"PYTHONPATH={shlex.quote(str(_ROOT))} {python}"
    if shutil.which("gradjax") == str(script):
        return "gradjax"
    return shlex.quote(str(script)) if script.is_file() else python


def _is_installed() -> bool:
    """Whether this Python finds this package by itself, and not for the folder it was started in.

    Another Python process answers that: each way of installing leaves other traces.
    """
    code = "import gradjax; print(gradjax.__file__)"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    found = subprocess.run(
        [sys.executable, "-P", "-c", code],
        cwd=Path(sys.executable).anchor,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    return Path(found.stdout.strip()) == _ROOT / "gradjax" / "__init__.py"
