"""What every metric gives: one score per row."""

import dataclasses

from gradjax.structs import Status


@dataclasses.dataclass(frozen=True)
class Score:
    """One row's numbers of one family of metrics."""

    values: dict[str, float | None]  # by column of scores/; None where undefined, never 0
    status: Status = "ok"
    reason: str = ""  # why a value is None
