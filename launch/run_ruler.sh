#!/usr/bin/env bash
# RULER on MODEL: the paper's four baselines and their OBCache-K counterparts, and the exact cache, in one report.
#   bash launch/run_ruler.sh MODEL [query-agnostic|query-aware] [RATIO] [4k|8k|...] [more options of python -m obcache_sglang.eval]
# The tasks are generated for the model's own tokenizer. KVPress's copy of RULER instead: --tasks --data ruler/4096
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
model=${1:?give a model directory or Hugging Face name} mode=${2:-query-agnostic} ratio=${3:-0.7} length=${4:-4k}
source launch/env.sh
exec python -m obcache_sglang.eval "$model" --modes "${mode#query-}" --ratios "$ratio" --tokens "$((${length%k} * 1024))" \
    --tasks niah_single_{1,2,3} niah_multikey_{1,2,3} niah_multivalue niah_multiquery vt cwe fwe \
    --arms {h2o,tova,snapkv}/{attention,obcache-k}/uniform snapkv/{attention,obcache-k}/adakv \
    --output "eval-ruler-$length-$ratio-$mode" "${@:5}"
