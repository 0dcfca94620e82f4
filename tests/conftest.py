"""How every test runs: offline, on the CPU, with shapes and dtypes checked at run time.

`JAX_PLATFORMS=cuda pytest -m gpu` (or `tpu`) runs the tests that need an accelerator.
"""

import os

# Read when jax and the Hugging Face libraries are first imported, so set before them.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
for library in ("HF_HUB", "TRANSFORMERS", "HF_DATASETS"):
    os.environ[f"{library}_OFFLINE"] = "1"

import jax  # noqa: E402
import jaxtyping  # noqa: E402

# Where arrays are. Elsewhere tests hand over wrong types on purpose.
jaxtyping.install_import_hook(
    ["gradjax.gradients", "gradjax.model", "gradjax.spectra"], "beartype.beartype"
)

# Mixed dtypes must fail, not silently change the numbers.
jax.config.update("jax_numpy_dtype_promotion", "strict")
