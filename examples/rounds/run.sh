#!/bin/sh
# Two rounds of DPO on a reward: sh run.sh MODEL FOLDER [policy|first] [SEED]
#
# Round 2 samples from the policy of round 1. Its reference is that policy ("policy", the default), or the
# first model ("first"). The same command continues where it stopped.
set -eu
case $#:${3:-policy} in
  [234]:policy | [34]:first) ;;
  *)
    echo "usage: sh $0 MODEL FOLDER [policy|first] [SEED]" >&2
    exit 2
    ;;
esac
model=$1 folder=$2 reference=${3:-policy} seed=${4:-0}
here=$(dirname "$0")

python "$here/prompts.py" "$folder"
measure() {  # measure POLICY NAME: samples of held-out openings, and their KL from the first model
  [ -e "$folder/kl/$2.parquet" ] || dpo-opt kl --model "$1" --reference "$model" \
    --prompts "$folder/held_out.jsonl" --num-prompts 36 --num-samples 16 --max-new-tokens 32 \
    --seed 1 --backend hf --output "$folder/kl/$2.parquet" > "$folder/kl.log"
}
measure "$model" round-0
policy=$model
for round in 1 2; do
  at=$folder/round-$round
  other=""
  scored=$policy
  if [ "$reference" = first ]; then
    scored=$model
    [ "$round" = 1 ] || other=--reference-differs  # the policy does not begin as its reference
  fi
  dpo-opt sample --model "$policy" --prompts "$folder/prompts.jsonl" --output "$at/samples" \
    --num-samples 4 --max-new-tokens 32 --seed "$seed" --backend hf
  dpo-opt judge --samples "$at/samples" --output "$at/judged" --function "$here/sentiment.py:sentiment"
  dpo-opt precompute --model "$scored" --data "$at/judged/ranked.jsonl" --shards "$at/shards" --backend hf
  [ -e "$at/run/final" ] || dpo-opt train --shards "$at/shards" --model "$policy" --output-dir "$at/run" \
    --resume --beta 0.1 --learning-rate 2e-4 --batch-size 16 --num-train-epochs 1 --seed "$seed" $other
  policy=$at/run/final
  measure "$policy" "round-$round"
done
python "$here/measure.py" "$model" "$folder"
