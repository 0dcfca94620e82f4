"""Files that come along with the package: flagfiles and recipes (configs/), scripts (launch/)."""

from pathlib import Path

_PACKAGE = Path(__file__).parent


def shipped(name: str) -> Path | None:
    """A file such as `configs/gemma2_2b.flags`; None if there is none of this name.

    An installed package has these folders inside itself, a checkout beside itself.
    """
    for root in (_PACKAGE, _PACKAGE.parent):
        if (root / name).is_file() and Path(name).parts[0] in ("configs", "launch"):
            return root / name
    return None
