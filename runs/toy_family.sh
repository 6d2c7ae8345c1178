#!/usr/bin/env bash
# LLaVA, LLaVA-1.5, 1.5-HD and NeXT in miniature, on pictures twice as wide and high in which every thing is a detail.
#     bash runs/toy_family.sh [seed] [folder]      two systems at a time; folder is emptied first
source "$(dirname "$0")/env.sh"
export SEED=${1:-0} OUT=${2:-out/toy_family} OMP_NUM_THREADS=1
export W=$OUT/world
rm -rf "$OUT"
python toy.py world --out "$W" --seed "$SEED" --pictures 4000 --side 128
python generate_data.py expand --pairs "$W/pairs.jsonl" --out "$OUT/stage1.json" --seed "$SEED"
python generate_data.py instruct --captions "$W/annotations/captions_train.json" --teacher script --out "$OUT/instruct" \
    --instances "$W/annotations/instances_train.json" --mix conversation=8 detail_description=1 complex_reasoning=2 --seed "$SEED"
system() {    # system RECIPE: both stages and the answers, with a log
    set -euo pipefail
    local recipe=$1
    python train.py --recipe "$recipe" --stage 1 --data "$OUT/stage1.json" --images "$W/images" --out "$OUT/$recipe-stage1" \
        --seed "$SEED"
    python train.py --recipe "$recipe" --stage 2 --data "$OUT/instruct/instruct.json" --images "$W/images" \
        --init "$OUT/$recipe-stage1" --out "$OUT/$recipe" --seed "$SEED"
    python eval.py answer --model "$OUT/$recipe" --questions "$W/questions_held_out.jsonl" --images "$W/images" \
        --answers "$OUT/held_out_$recipe.jsonl" --max_new_tokens 32 --batch_size 120
}
export -f system
printf '%s\n' toy-next toy-hd toy-1.5 toy | xargs -P "${JOBS:-2}" -I NAME \
    bash -c 'bash -c "system NAME" > "$OUT/NAME.log" 2>&1 && echo "NAME is done" || { tail -3 "$OUT/NAME.log"; exit 1; }'
python toy.py family --out "$OUT" | tee "$OUT/table.txt"
