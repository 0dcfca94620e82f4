"""How every test runs: offline, on the CPU, with shapes and dtypes checked at run time."""

import atexit
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator

# Read when jax and the Hugging Face libraries are first imported, so set before them.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
for library in ("HF_HUB", "TRANSFORMERS", "HF_DATASETS"):
    os.environ[f"{library}_OFFLINE"] = "1"
# Workers and processes that tests start share what they compile, and with nothing else.
if "PYTEST_XDIST_WORKER" not in os.environ:
    _compiled = tempfile.mkdtemp(prefix="gradjax-tests-")
    atexit.register(shutil.rmtree, _compiled, ignore_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = _compiled
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.1"

import jax  # noqa: E402
import jaxtyping  # noqa: E402
import pytest  # noqa: E402

# Where arrays are. Elsewhere tests hand over wrong types on purpose.
jaxtyping.install_import_hook(
    [
        "gradjax.checkpoints",
        "gradjax.gradients",
        "gradjax.model",
        "gradjax.sharding",
        "gradjax.spectra",
    ],
    "beartype.beartype",
)

# Mixed dtypes must fail, not silently change the numbers.
jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.fixture(scope="session")
def bucket() -> Iterator[str]:
    """The URL of a bucket on a server that speaks S3, which the environment points to.

    One for all tests: two servers in one process would share their buckets.
    """
    import s3fs  # not among what the smoke tests need
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    logging.getLogger("werkzeug").setLevel("WARNING")  # not a line per request
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        environment.setenv("AWS_ACCESS_KEY_ID", "anyone")
        environment.setenv("AWS_SECRET_ACCESS_KEY", "anything")
        environment.setenv("AWS_DEFAULT_REGION", "us-east-1")
        s3fs.S3FileSystem().mkdir("spectra-bucket")
        yield "s3://spectra-bucket"
        s3fs.S3FileSystem.clear_instance_cache()
    server.stop()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Says loudly where the page went untested."""
    skipped = terminalreporter.stats.get("skipped", [])
    if untested := [report for report in skipped if "NO BROWSER" in str(report.longrepr)]:
        title = f"NO BROWSER: {len(untested)} tests of the page did not run"
        terminalreporter.section(title, red=True)
        terminalreporter.line("apt-get install chromium")
