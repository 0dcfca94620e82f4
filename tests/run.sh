#!/usr/bin/env bash
# Checks the code and runs every test that needs no accelerator:
# bash tests/run.sh [pytest arguments]
set -euo pipefail

# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/../launch/environment.sh"

ensure_environment requirements-test.txt
cd "$root"
python=$VENV/bin/python
"$python" -m ruff check
"$python" -m ruff format --check
"$python" -m pyright --pythonpath "$python"
exec "$python" -m pytest -m "not gpu and not tpu" "$@"
