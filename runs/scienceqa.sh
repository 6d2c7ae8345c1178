#!/usr/bin/env bash
# ScienceQA (Sec. 5.2, Table 7): from a stage-1 checkpoint to the nine columns.
#     bash runs/scienceqa.sh [stage-1 checkpoint] [output folder] [flag of train.py...]
# Table 8: RECIPE=scienceqa-7b; FORMAT=QCM-ALE predicts the answer first; "none" for the checkpoint trains from scratch; the last
# layer wants a stage 1 with it, and --feature_layer -1 here, too. The paper's 13B run took about 4 hours on 8 A100.
# From the official site (github.com/lupantech/ScienceQA), in data/scienceqa:
#     problems.json  pid_splits.json  images/train/PID/image.png  images/test/PID/image.png
# With EXPERT=URL, an OpenAI-compatible endpoint (and EXPERT_MODEL, gpt-4), a text-only model answers, too, and judges where the two
# differ: the last rows of Table 7. Add --show 1 to one of its commands first, to see what is paid for.
source "$(dirname "$0")/env.sh"
INIT=${1:-out/stage1} OUT=${2:-out/scienceqa} D=data/scienceqa FORMAT=${FORMAT:-QCM-LEA} GPUS=${GPUS:-8}
mkdir -p "$OUT"
python eval.py scienceqa_data --labels $D --split train --format $FORMAT --out $OUT/train.json
python eval.py scienceqa_data --labels $D --split test --format $FORMAT --questions $OUT/questions.jsonl

# The recipe: 12 epochs at batch 32, as the paper; the picture in front, where sample.py has it, too.
[ -f "$OUT/model/config.json" ] || torchrun --nproc_per_node="$GPUS" train.py --recipe "${RECIPE:-scienceqa-13b}" --stage 2 \
    --init "$INIT" --data "$OUT/train.json" --out "$OUT/model" --shard "${@:3}"
python eval.py answer --model $OUT/model --questions $OUT/questions.jsonl --images $D/images/test --answers $OUT/answers.jsonl
python eval.py score scienceqa --labels $D --answers $OUT/answers.jsonl --json $OUT/scores.json
if [ -n "${EXPERT:-}" ]; then
    M=${EXPERT_MODEL:-gpt-4}
    python -m extras.scienceqa_gpt4 answer --labels $D --base_url "$EXPERT" --model "$M" --out $OUT/expert.jsonl
    python -m extras.scienceqa_gpt4 judge --labels $D --base_url "$EXPERT" --model "$M" --answers $OUT/answers.jsonl \
        --second $OUT/expert.jsonl --out $OUT/verdicts.jsonl
    python eval.py score scienceqa --labels $D --answers $OUT/answers.jsonl --second $OUT/expert.jsonl \
        --requery $OUT/verdicts.jsonl --json $OUT/ensembles.json
fi
