#!/bin/sh
# The DPO paper's controlled-sentiment experiment (Rafailov et al. 2023, section 6.1) with a tiny model:
# sh tiny.sh MODEL FOLDER
#
# Completions of story openings are ranked by how positive they sound, all 6 pairs of 4 completions are trained
# on with two betas, and reward and KL are measured on openings that no run trained on. The same command
# continues where it stopped.
set -eu
model=$1 folder=$2
here=$(dirname "$0")
common=$here/../rounds

python "$common/prompts.py" "$folder"
dpo-opt sample --model "$model" --prompts "$folder/prompts.jsonl" --output "$folder/samples" \
  --num-samples 4 --max-new-tokens 32 --backend hf
dpo-opt judge --samples "$folder/samples" --output "$folder/judged" --function "$common/sentiment.py:sentiment"
dpo-opt precompute --model "$model" --data "$folder/judged/ranked.jsonl" --shards "$folder/shards" --backend hf
dpo-opt sweep --shards "$folder/shards" --model "$model" --config "$here/tiny.yaml" --output-dir "$folder/sweep"
dpo-opt kl "$folder/sweep" --prompts "$folder/held_out.jsonl" --num-prompts 36 --num-samples 16 \
  --max-new-tokens 32 --backend hf
dpo-opt frontier "$folder/sweep" --reward-function "$common/sentiment.py:sentiment" --output "$folder/frontier.svg"
dpo-opt report "$folder/sweep" --output "$folder/report.html"
