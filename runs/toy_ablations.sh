#!/usr/bin/env bash
# Tables 4 and 8 of the paper in miniature: nine variants on the toy world, over three seeds, printed beside the paper's.
#     bash runs/toy_ablations.sh [folder] [seed...]
#     ROWS="full stage1" bash runs/toy_ablations.sh      these rows alone; `full` is what the others are compared with
# What is done is not done again: after an interruption run the same command again. Logs: FOLDER/seedN-ablations.log
source "$(dirname "$0")/toy_env.sh"
export OUT=${1:-out/toy_ablations} OMP_NUM_THREADS=1
export ROWS=${ROWS:-full stage1 detail_complex conversation_few conversation last_layer answer_first scratch small}
mkdir -p "$OUT"

row() {
    case $1 in
        full)
            stage2 full "$D/stage1" --data "$D/data_full/instruct.json"
            bench full; held_out full ;;
        stage1)
            bench stage1 ;;
        detail_complex)
            data $1 detail_description=580 complex_reasoning=1950
            stage2 $1 "$D/stage1" --data "$D/data_$1/instruct.json"; bench $1 ;;
        conversation_few)
            data $1 conversation=1470 detail_description=29 complex_reasoning=195
            stage2 $1 "$D/stage1" --data "$D/data_$1/instruct.json"; bench $1 ;;
        conversation)
            data $1 conversation=1470
            stage2 $1 "$D/stage1" --data "$D/data_$1/instruct.json"; bench $1 ;;
        last_layer)
            stage1 last_layer_stage1 --feature_layer -1
            stage2 $1 "$D/last_layer_stage1" --data "$D/data_full/instruct.json" --feature_layer -1; held_out $1 ;;
        answer_first)
            once "$D/$1.json" python -m toy.report answer_first --data "$D/data_full/instruct.json" --out "$D/$1.json"
            stage2 $1 "$D/stage1" --data "$D/$1.json"; held_out $1 ;;
        scratch)
            stage2 $1 none --data "$D/data_full/instruct.json"; held_out $1 ;;
        small)       # a language model of half the layers
            stage1 small_stage1 --llm "$OUT/small_llm" --template llava_v0
            stage2 $1 "$D/small_stage1" --data "$D/data_full/instruct.json"; held_out $1 ;;
        *) echo "error: row $1; there are full stage1 detail_complex conversation_few conversation last_layer answer_first scratch small"; exit 1 ;;
    esac
}
rows_of() {
    begin_seed "$1"
    full_data
    stage1 stage1
    for name in $ROWS; do row "$name"; done
}
if [[ " $ROWS " = *" small "* ]]; then
    once "$OUT/small_llm" python -m toy.pretrain --out "$OUT" --part small_llm > "$OUT/small_llm.log" 2>&1
fi
SEEDS=${*:2}
each_seed rows_of ablations ${SEEDS:-0 1 2}
python -m toy.report ablations --out "$OUT" | tee "$OUT/tables.txt"
