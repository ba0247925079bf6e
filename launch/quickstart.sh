#!/usr/bin/env bash
# From a fresh machine to a table of answers:  bash launch/quickstart.sh [flags of launch/quickstart.py]
# Makes the environment and the small model, starts a server, and asks questions about a document with exact and with
# compressed cache. Needs Python >= 3.11 and a network for pip.
set -euo pipefail

source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
exec python -m launch.quickstart "$@"
