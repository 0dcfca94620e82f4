"""What is said on the screen of rows that cannot be used, and of columns that were not read."""

from collections import Counter
from collections.abc import Iterable, Sequence

from absl import logging

from gradjax.errors import GradjaxError
from gradjax.structs import Example, Status


def report_usable(group: str, rows: Sequence[tuple[Example, Status, str]]) -> None:
    """Logs how many rows of a group are not usable, and the first reason of each status.

    Args:
      group: its name.
      rows: each with the status and the reason that it has now.

    Raises:
      GradjaxError: if none is usable.
    """
    if not (text := describe_unusable(rows)):
        return
    if all(status != "ok" for _, status, _ in rows):
        raise GradjaxError(
            f"none of the {len(rows):,} rows of group {group!r} is usable: {text}; mend the data, "
            "or say how they are read with --columns, --field, --response_marker or another "
            "--prompt_format"
        )
    logging.warning("%s: not usable are %s", group, text)


def describe_unusable(rows: Iterable[tuple[Example, Status, str]]) -> str:
    """Unusable rows by status, with a first reason each; "" if there are none."""
    counts: Counter[str] = Counter()
    first: dict[str, str] = {}
    for example, status, reason in rows:
        if status != "ok":
            counts[status] += 1
            if reason:  # those of an earlier call have none
                first.setdefault(status, f" (row {example.example_id}: {reason})")
    return ", ".join(
        f"{count:,} {status}{first.get(status, '')}" for status, count in counts.most_common()
    )


def report_ignored(group: str, examples: Iterable[Example]) -> list[str]:
    """Logs the columns of a group that were not read; returns them."""
    ignored = Counter(name for example in examples for name in example.ignored)
    if names := [name for name, _ in ignored.most_common()]:
        shown = ", ".join(names[:12]) + (" …" if len(names) > 12 else "")
        logging.info("%s: columns that are not read: %s", group, shown)
    return names
