#!/usr/bin/env bash
# LongBench on MODEL: the paper's four baselines and their OBCache-K counterparts, and the exact cache, in one report.
#   bash launch/run_longbench.sh MODEL [query-agnostic|query-aware] [RATIO] [FOLDER of a local copy] [more options of the evaluation]
# Without a folder the sets are read from the Hugging Face Hub (Xnhyacinth/LongBench).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
model=${1:?give a model directory or Hugging Face name} mode=${2:-query-agnostic} ratio=${3:-0.7} folder=${4:-}
source launch/env.sh
sets=()
for set in narrativeqa qasper multifieldqa_en hotpotqa 2wikimqa musique gov_report qmsum multi_news trec triviaqa samsum \
    passage_count passage_retrieval_en lcc repobench-p; do
    sets+=("longbench/$set${folder:+=$folder}")
done
exec python -m obcache_sglang.eval "$model" --modes "${mode#query-}" --ratios "$ratio" --tasks --data "${sets[@]}" \
    --arms {h2o,tova,snapkv}/{attention,obcache-k}/uniform snapkv/{attention,obcache-k}/adakv \
    --output "eval-longbench-$ratio-$mode" "${@:5}"
