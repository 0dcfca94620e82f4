"""What does the gradient of one fine-tuning example say about its quality?

model = gradjax.load_model("demo")
for result in gradjax.gradient_spectra(model, rows): ...
run = gradjax.open_run("runs/demo")
table = gradjax.score(data=["rows.jsonl"], metrics=["ifd"])
best = gradjax.select(scores=["scores"], by="ifd", top=200)
"""

import importlib
import os
from typing import TYPE_CHECKING

from gradjax.version import __version__ as __version__

if TYPE_CHECKING:
    from gradjax.api import (
        ExampleResult,
        GradjaxError,
        Model,
        gradient_spectra,
        load_model,
        open_run,
    )
    from gradjax.score.run import score_rows as score
    from gradjax.select.write import select_rows as select

# transformers would say at import that it misses PyTorch, which gradjax does not use.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

_PACKAGES = ("score", "select")  # which can be called
__all__ = [
    "ExampleResult",
    "GradjaxError",
    "Model",
    "gradient_spectra",
    "load_model",
    "open_run",
    "score",
    "select",
]


def __getattr__(name: str):
    # Loaded on first use: `import gradjax` must not start JAX before flags are parsed.
    if name in _PACKAGES:
        return importlib.import_module(f"gradjax.{name}")
    if name in __all__:
        return getattr(importlib.import_module("gradjax.api"), name)
    raise AttributeError(f"module 'gradjax' has no attribute {name!r}")
