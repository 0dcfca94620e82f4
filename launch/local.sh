#!/usr/bin/env bash
# Runs gradjax on this machine: bash launch/local.sh [flags of gradjax.main]
#
# The first call makes .venv and installs requirements.txt; later ones start at once. Files named
# in flags are looked up from where it is called.
set -euo pipefail

# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

ensure_environment requirements.txt
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
# -P: a file there that is named like a module is not imported in its place.
exec "$VENV/bin/python" -P -m gradjax.main "$@"
