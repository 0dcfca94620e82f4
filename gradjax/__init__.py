"""What does the gradient of one fine-tuning example say about its quality?

model = gradjax.load_model("demo")
for result in gradjax.gradient_spectra(model, rows): ...
run = gradjax.open_run("runs/demo")
"""

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

# transformers would say at import that it misses PyTorch, which gradjax does not use.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

__all__ = ["ExampleResult", "GradjaxError", "Model", "gradient_spectra", "load_model", "open_run"]


def __getattr__(name: str):
    # Loaded on first use: `import gradjax` must not start JAX before flags are parsed.
    if name in __all__:
        from gradjax import api

        return getattr(api, name)
    raise AttributeError(f"module 'gradjax' has no attribute {name!r}")
