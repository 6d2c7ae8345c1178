#!/usr/bin/env bash
# ScienceQA with a text-only expert (Sec. 5.2, Table 7) in miniature, offline, on two CPU cores: ours, expert, complement, judge.
#     bash runs/toy_scienceqa.sh [seed] [folder] [stage-1 checkpoint]      folder is emptied first
# Stage 1 is that of runs/toy.sh; if it is not there yet, one is made first, of half as many pictures.
source "$(dirname "$0")/toy_env.sh"
SEED=${1:-0} OUT=${2:-out/toy_scienceqa} STAGE1=${3:-out/toy/stage1}
D=$OUT/data
rm -rf "$OUT"

if [ ! -f "$STAGE1/config.json" ]; then
    TOY=$(dirname "$STAGE1")
    python -m toy.world world --out "$TOY/world" --seed "$SEED" --pictures 4000
    python generate_data.py expand --pairs "$TOY/world/pairs.jsonl" --out "$TOY/stage1.json" --seed "$SEED"
    python train.py --recipe toy --stage 1 --data "$TOY/stage1.json" --images "$TOY/world/images" --out "$STAGE1" --seed "$SEED"
fi

# Ours: all problems of train, then the answers to those of test.
python -m toy.science --out "$D" --seed "$SEED"
python eval.py scienceqa_data --labels "$D" --split train --out "$OUT/train.json"
python eval.py scienceqa_data --labels "$D" --split test --questions "$OUT/questions.jsonl"
python train.py --recipe toy --stage 2 --data "$OUT/train.json" --images "$D/images/train" --init "$STAGE1" --out "$OUT/model" \
    --epochs 2 --lr 1e-3 --global_batch_size 8 --val_samples 0 --seed "$SEED"
python eval.py answer --model "$OUT/model" --questions "$OUT/questions.jsonl" --images "$D/images/test" \
    --answers "$OUT/answers.jsonl" --max_new_tokens 64 --batch_size 100

# The expert: a script that reads and sees no picture. It answers alone, then again where it and ours differ.
teacher "$OUT" "$SEED"
python -m extras.scienceqa_gpt4 answer --labels "$D" --base_url "$URL" --seed "$SEED" --out "$OUT/expert.jsonl"
python -m extras.scienceqa_gpt4 judge --labels "$D" --base_url "$URL" --answers "$OUT/answers.jsonl" \
    --second "$OUT/expert.jsonl" --out "$OUT/verdicts.jsonl"
python eval.py score scienceqa --labels "$D" --answers "$OUT/answers.jsonl" --second "$OUT/expert.jsonl" \
    --requery "$OUT/verdicts.jsonl" --json "$OUT/scores.json"
