#!/usr/bin/env bash
# The whole sweep of methods, scores and budgets with the small model; every part goes on where it was stopped (two to three hours on two quiet cores):
#   bash launch/sweep.sh [FOLDER]
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
folder=${1:-eval-sweep}
source launch/env.sh
model=$(python launch/model.py | tail -n 1)

windows=({snapkv,h2o}/{attention,obcache-v,obcache-k,obcache-kv}/{uniform,adakv} tova/{attention,obcache-v,obcache-k,obcache-kv}/uniform)
profiles=(tova/{attention,obcache-v}/profile snapkv/{attention,obcache-k}/profile)
replays=(replay/{attention,obcache-v}/{global,adakv})
needles=(needle_prose needle_noise needle_code needle_two_keys)

sweep() { # NAME SAMPLES RATIOS OPTIONS...
    echo "sweep: $1"
    python -m obcache_sglang.eval "$model" --output "$folder/$1" --samples "$2" --ratios $3 "${@:4}" \
        --server-flags "--obcache-head-profile smollm2-135m --max-total-tokens 65536"
}
sweep needles 8 "0.5 0.7 0.9" --tasks "${needles[@]}" --arms "${windows[@]}" "${profiles[@]}" "${replays[@]}"
sweep aware 8 "0.5 0.7 0.9" --modes aware --tasks "${needles[@]}" --arms "${windows[@]}" "${profiles[@]}"
sweep continuation 30 "0.5 0.7 0.9" --tasks continuation --arms "${windows[@]}" "${profiles[@]}" "${replays[@]}"
sweep highest 8 0.95 --tasks "${needles[@]}" --arms tova/obcache-v/profile replay/{attention,obcache-v}/global
sweep highest-continuation 30 0.95 --tasks continuation --arms tova/obcache-v/profile replay/{attention,obcache-v}/global
