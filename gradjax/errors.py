"""The one exception for faults of a run: one sentence a user can act on."""

import difflib
import shlex
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager


class GradjaxError(Exception):
    """A run cannot go on: the model, the data, a flag or the disk is at fault.

    The message is one sentence that names the file, key or flag, what was found,
    what was expected, and what to do. `main` prints it and exits with status 1.
    Problems of single rows are never raised: they become statuses in the store.
    """


def out_of_memory(error: Exception) -> bool:
    """Whether an exception of JAX or Python says that memory ran out."""
    return isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)


def first_line(error: BaseException) -> str:
    """The first line of what another library says, without its full stop; never empty."""
    return str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__


def did_you_mean(word: str, known: Iterable[object]) -> str:
    """` (did you mean NAME?)`, to be put behind a word that is none of the known names.

    Empty where no name is near. Small and capital letters, `-` and `_` are alike.
    """
    names = {str(name).lower().replace("-", "_"): name for name in known}
    close = difflib.get_close_matches(word.lower().replace("-", "_"), names, n=1)
    return f" (did you mean {names[close[0]]}?)" if close else ""


# What only an extra of the package installs, by the name that is imported.
_EXTRAS = {
    "matplotlib": "report",
    "statsmodels": "report",
    "openai": "score",
    "datasets": "data",
    "gcsfs": "cloud",
    "s3fs": "cloud",
}


def missing_extra(error: ImportError) -> GradjaxError | None:
    """What to say of a package that only an extra installs; None for any other import error."""
    # fsspec says in words of its own what it misses, and names it in the cause.
    names = [e.name or "" for e in (error, error.__cause__) if isinstance(e, ImportError)]
    for package in (name.partition(".")[0] for name in names):
        if extra := _EXTRAS.get(package):
            return GradjaxError(
                f"this needs {package}, which is not installed; install it with "
                f"{shlex.quote(sys.executable)} -m pip install 'gradjax[{extra}]'"
            )
    return None


@contextmanager
def extras() -> Iterator[None]:
    """Around an import of what an extra installs: raises GradjaxError where that is missing."""
    try:
        yield
    except ImportError as error:
        if missing := missing_extra(error):
            raise missing from error
        raise
