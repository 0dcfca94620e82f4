#!/usr/bin/env bash
# Runs gradjax on this machine: bash launch/local.sh [--cuda] [flags of gradjax spectra]
#
# The first call makes .venv and installs gradjax there with its extras, or with --cuda for NVIDIA
# GPUs; later ones start at once. Files named in flags are looked up from where it is called.
set -euo pipefail

# shellcheck source=launch/environment.sh
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

requirements="requirements.txt"
if [[ ${1:-} == --cuda ]]; then
  requirements="requirements-cuda.txt"
  shift
fi
ensure_environment "$requirements"
exec "$VENV/bin/gradjax" spectra "$@"
