#!/usr/bin/env bash
# Trains the built-in demo in .venv and writes a report: no data, no network beyond the installation, a few minutes
# on two CPU cores.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh ""
export OMP_WAIT_POLICY=${OMP_WAIT_POLICY:-passive} # threads that wait leave a busy machine's cores to others
exec .venv/bin/python scripts/demo.py "$@"
