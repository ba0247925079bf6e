#!/usr/bin/env bash
# Makes the environment, checks the code and runs the tests:  bash launch/test.sh [--all]
# --all adds the tests marked long (soaks, sweeps).
set -euo pipefail

markers="not long"
case "${1:-}" in
    "") ;;
    --all) markers="" ;;
    *)
        echo "usage: bash launch/test.sh [--all]    unknown argument: $1" >&2
        exit 2
        ;;
esac
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

echo "== ruff"
ruff check .
ruff format --check .
echo "== mypy"
mypy obcache_sglang launch
echo "== models"
python launch/model.py --dtype float32
python launch/model.py --dtype bfloat16
echo "== pytest"
# Two at a time: the tests with servers, which wait a lot, and beside them all others (tests/serving/conftest.py).
exec python -m pytest -m "$markers" --numprocesses=2 --dist=loadgroup --durations=10
