"""`gradjax select`; called as a function, `gradjax.select(...)`, it is `select_rows`."""

import sys
import types
from typing import Any


class _Callable(types.ModuleType):
    """A package and the function of its name: importing a module of it must not hide that."""

    def __call__(self, **settings: Any) -> Any:
        from gradjax.select.write import select_rows

        return select_rows(**settings)


sys.modules[__name__].__class__ = _Callable
