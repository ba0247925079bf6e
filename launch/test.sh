#!/usr/bin/env bash
# Makes the environment, checks the code and runs the tests:  bash launch/test.sh [--all]
# --all adds the tests marked long (soaks, sweeps).
set -euo pipefail

markers="not long"
# Two at a time, each with half of the processors: servers of a small model gain little from more. Long tests have several servers themselves.
workers=2
case "${1:-}" in
    "") ;;
    --all) markers="" workers=0 ;;
    *)
        echo "usage: bash launch/test.sh [--all]    unknown argument: $1" >&2
        exit 2
        ;;
esac
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

echo "== ruff"
ruff check .
ruff format --check .
echo "== models"
python launch/model.py --dtype float32 bfloat16
echo "== pytest: tests with servers; mypy and all others at the same time, their results follow"
others="$(mktemp)"
{
    failed=0
    echo "== mypy"
    mypy obcache_sglang launch || failed=$?
    python -m pytest tests/contract tests/unit -m "$markers" --durations=5 || failed=$?
    # By themselves: Triton's interpreter is chosen for a whole process.
    python -m pytest tests/kernels -m "$markers" --durations=5 || failed=$?
    exit "$failed"
} >"$others" 2>&1 &
others_pid=$!
trap 'kill "$others_pid" 2>/dev/null || true; rm -f "$others"' EXIT
status=0
# All of them wait a lot: for servers, and in one thread of Triton's interpreter.
python -m pytest tests/serving -m "$markers" --numprocesses "$workers" --dist loadfile --durations=10 || status=$?
wait "$others_pid" || status=$?
cat "$others"
exit "$status"
