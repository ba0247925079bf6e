#!/usr/bin/env bash
# Asks one document two questions with curl:  bash launch/examples/serve_and_ask.sh [URL of a server with --obcache]
# Without a URL it starts a server with the small model first, and stops it at the end.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
url=${1:-http://127.0.0.1:30000}
if [[ $# -eq 0 ]]; then
    bash launch/serve.sh small --port 30000 --obcache-head-profile smollm2-135m &
    trap 'kill %1' EXIT
    until curl --silent --fail --output /dev/null "$url/health"; do kill -0 %1; sleep 2; done
fi

# A document of about 600 tokens. The marker ends it; the question follows.
document=$(printf 'Room %d of the museum shows the painter number %d. ' $(seq 1 80))
for question in "Which painter is shown in room 7?" "Which painter is shown in room 33?"; do
    curl --silent --show-error --fail "$url/generate" -H "Content-Type: application/json" -d @- <<EOF
{"text": "$document<|obcache|>\n\nQuestion: $question\nAnswer:", "sampling_params": {"max_new_tokens": 16, "temperature": 0}}
EOF
    echo
done
