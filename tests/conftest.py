"""How every test runs: offline, on the CPU, with shapes and dtypes checked at run time.

`JAX_PLATFORMS=cuda pytest -m gpu` (or `tpu`) runs the tests that need an accelerator.
"""

import atexit
import os
import shutil
import tempfile

# Read when jax and the Hugging Face libraries are first imported, so set before them.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
for library in ("HF_HUB", "TRANSFORMERS", "HF_DATASETS"):
    os.environ[f"{library}_OFFLINE"] = "1"
# Processes that tests start share what they compile, with each other and with nothing else.
_compiled = tempfile.mkdtemp(prefix="gradjax-tests-")
atexit.register(shutil.rmtree, _compiled, ignore_errors=True)
os.environ["JAX_COMPILATION_CACHE_DIR"] = _compiled
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"

import jax  # noqa: E402
import jaxtyping  # noqa: E402

# Where arrays are. Elsewhere tests hand over wrong types on purpose.
jaxtyping.install_import_hook(
    ["gradjax.gradients", "gradjax.model", "gradjax.sharding", "gradjax.spectra"],
    "beartype.beartype",
)

# Mixed dtypes must fail, not silently change the numbers.
jax.config.update("jax_numpy_dtype_promotion", "strict")
