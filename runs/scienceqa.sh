#!/usr/bin/env bash
# ScienceQA (Sec. 5.2, Table 7): from a stage-1 checkpoint to the nine columns.
#     bash runs/scienceqa.sh [stage-1 checkpoint] [output folder] [flag of train.py...]
# Table 8: RECIPE=scienceqa-7b; FORMAT=QCM-ALE predicts the answer first; "none" for the checkpoint trains from scratch; the last
# layer wants a stage 1 with it, and --feature_layer -1 here, too. The paper's 13B run took about 4 hours on 8 A100.
# From the official site (github.com/lupantech/ScienceQA), in data/scienceqa:
#     problems.json  pid_splits.json  images/train/PID/image.png  images/test/PID/image.png
# With another model's answers to the test questions (JSON lines of question_id, text): SECOND=FILE ensembles, and writes what
# it should be asked again; with its verdicts on these: REQUERY=FILE.
source "$(dirname "$0")/env.sh"
INIT=${1:-out/stage1} OUT=${2:-out/scienceqa} D=data/scienceqa FORMAT=${FORMAT:-QCM-LEA} GPUS=${GPUS:-8}
mkdir -p "$OUT"
python eval.py scienceqa_data --labels $D --split train --format $FORMAT --out $OUT/train.json
python eval.py scienceqa_data --labels $D --split test --format $FORMAT --questions $OUT/questions.jsonl
python eval.py scienceqa_data --labels $D --split test --format $FORMAT --no-images --questions $OUT/questions_without_images.jsonl

# The recipe: 12 epochs at batch 32, as the paper; the picture in front, where sample.py has it, too.
[ -f "$OUT/model/config.json" ] || torchrun --nproc_per_node="$GPUS" train.py --recipe "${RECIPE:-scienceqa-13b}" --stage 2 \
    --init "$INIT" --data "$OUT/train.json" --out "$OUT/model" --shard "${@:3}"
python eval.py answer --model $OUT/model --questions $OUT/questions.jsonl --images $D/images/test --answers $OUT/answers.jsonl
if [ -z "${SECOND:-}" ]; then
    python eval.py score scienceqa --labels $D --answers $OUT/answers.jsonl --json $OUT/scores.json
elif [ -z "${REQUERY:-}" ]; then
    python eval.py score scienceqa --labels $D --answers $OUT/answers.jsonl --second $SECOND --json $OUT/scores.json
    python eval.py scienceqa_data --labels $D --split test --format $FORMAT --no-images --answers $OUT/answers.jsonl \
        --second $SECOND --questions $OUT/ask_again.jsonl
else
    python eval.py score scienceqa --labels $D --answers $OUT/answers.jsonl --second $SECOND --requery $REQUERY \
        --json $OUT/scores.json
fi
