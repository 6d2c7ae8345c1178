#!/usr/bin/env bash
# LLaVA, LLaVA-1.5, 1.5-HD and NeXT in miniature, on pictures twice as wide and high in which every thing is a detail.
#     bash runs/toy_family.sh [seed] [folder]      two systems at a time; folder is emptied first
source "$(dirname "$0")/toy_env.sh"
export SEED=${1:-0} OUT=${2:-out/toy_family} OMP_NUM_THREADS=1
export W=$OUT/world
rm -rf "$OUT"
python -m toy.world world --out "$W" --seed "$SEED" --pictures 4000 --side 128
python generate_data.py expand --pairs "$W/pairs.jsonl" --out "$OUT/stage1.json" --seed "$SEED"
teacher "$OUT" "$SEED" "$W"
python generate_data.py instruct --captions "$W/annotations/captions_train.json" --base_url "$URL" --out "$OUT/instruct" \
    --instances "$W/annotations/instances_train.json" --keep_duplicates --mix conversation=8 detail_description=1 complex_reasoning=2 --seed "$SEED"
stage_1() {
    python train.py --recipe "$1" --stage 1 --data "$OUT/stage1.json" --images "$W/images" --out "$OUT/$1-stage1" --seed "$SEED"
}
stage_2() {    # and the answers. Stage 1 sees squares, so toy-1.5's is that of the systems with tiles, too
    [ "$1" = toy ] && init=toy || init=toy-1.5
    python train.py --recipe "$1" --stage 2 --data "$OUT/instruct/instruct.json" --images "$W/images" \
        --init "$OUT/$init-stage1" --out "$OUT/$1" --seed "$SEED"
    python eval.py answer --model "$OUT/$1" --questions "$W/questions_held_out.jsonl" --images "$W/images" \
        --answers "$OUT/held_out_$1.jsonl" --max_new_tokens 32 --batch_size 120
}
export -f stage_1 stage_2
all() {    # all STAGE RECIPE...: two at a time, each with a log
    printf '%s\n' "${@:2}" | xargs -P "${JOBS:-2}" -I NAME bash -c 'bash -ec "stage_'$1' NAME" > "$OUT/NAME-'$1'.log" 2>&1 \
        && echo "NAME: stage '$1' is done" || { tail -3 "$OUT/NAME-'$1'.log"; exit 1; }'
}
all 1 toy-1.5 toy
all 2 toy-next toy-hd toy-1.5 toy
python -m toy.report family --out "$OUT" | tee "$OUT/table.txt"
