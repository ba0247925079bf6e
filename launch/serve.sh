#!/usr/bin/env bash
# Serves a model with compressed contexts:  bash launch/serve.sh MODEL [SGLang and --obcache-* flags]
# MODEL is a Hugging Face name or directory, or "small" for the small model of the quickstart.
set -euo pipefail

if [[ $# -lt 1 || "$1" == -* ]]; then
    echo "usage: bash launch/serve.sh MODEL [flags]    MODEL: a Hugging Face name or directory, or 'small'" >&2
    exit 2
fi
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"

model="$1"
shift
if [[ "$model" == small ]]; then
    model="$(python launch/model.py)"
fi
exec sglang serve --model-path "$model" --obcache "$@"
