"""JSON as every reader takes it: its numbers are finite or null."""

import json
import math
from typing import Any


def dumps(value: object, **options: Any) -> str:
    """`json.dumps` with null for NaN and infinities, which JSON does not have.

    Args:
      value: what to write.
      **options: of `json.dumps`; what `default` makes of a value has to be finite.
    """
    try:
        return json.dumps(value, allow_nan=False, **options)
    except ValueError:  # most values need no second look
        return json.dumps(_finite(value), allow_nan=False, **options)


def _finite(value: object) -> object:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(one) for one in value]
    return value
