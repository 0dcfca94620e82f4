"""What a call may spend on a judge, and what it has spent."""

import dataclasses
import math
from collections.abc import Mapping

from gradjax.errors import GradjaxError

KINDS = ("requests", "tokens")


@dataclasses.dataclass
class Budget:
    """Limits of a call; without a limit it only counts.

    A request counts when it is sent, also one that is sent again. Tokens count when an answer
    comes: those that are on their way when the limit is reached come on top.

    Raises:
      GradjaxError: if a limit is not of this kind, or less than 1.
    """

    limits: Mapping[str, float] = dataclasses.field(default_factory=dict)
    requests: int = dataclasses.field(default=0, init=False)
    tokens: int = dataclasses.field(default=0, init=False)

    def __post_init__(self) -> None:
        for name, limit in self.limits.items():
            if name not in KINDS or not 1 <= limit < math.inf:
                raise GradjaxError(
                    f"--judge_budget={self}: expected requests=N, tokens=N or both, each a number "
                    "of at least 1"
                )

    @property
    def reached(self) -> bool:
        """Whether nothing more may be asked."""
        return any(getattr(self, name) >= limit for name, limit in self.limits.items())

    def __str__(self) -> str:
        """As the flag."""
        return ",".join(f"{name}={limit:.12g}" for name, limit in self.limits.items())


def estimated_tokens(characters: int) -> int:
    """A token is 4 characters of English, fewer of other languages."""
    return -(-characters // 4)


def used_tokens(reply: object) -> int | None:
    """What a chat completion says that it took, read and written; None if it does not."""
    match reply:
        case {"usage": {"prompt_tokens": int(read), "completion_tokens": int(written)}}:
            return read + written if read >= 0 <= written else None
    return None
