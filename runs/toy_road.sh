#!/usr/bin/env bash
# Diss. Ch. 4 in miniature, over three seeds: the road to LLaVA-1.5 (Table 4.2), ways to ask (Table 4.1b), less data (Fig. 4.4), and
# the three response types in equal shares (Sec. 4.2 of the paper). Fig. 4.3 and row 9 are the row `small` of runs/toy_ablations.sh.
#     bash runs/toy_road.sh [folder] [seed...]
# The folder is that of runs/toy_ablations.sh, whose world, stage 1 and row `full` are made here, if they have not been.
# What is done is not done again: after an interruption run the same command again. Logs: FOLDER/seedN-road.log
source "$(dirname "$0")/toy_env.sh"
export OUT=${1:-out/toy_ablations} OMP_NUM_THREADS=1
SEEDS=${*:2}
mkdir -p "$OUT"

exam() {       # exam NAME WAY...: the same questions, asked in each way
    for way in "${@:2}"; do
        once "$D/exam_$way-$1.jsonl" python eval.py answer --model "$D/$1" --questions "$D/vqa/exam_$way.jsonl" \
            --images "$IMAGES" --answers "$D/exam_$way-$1.jsonl" --max_new_tokens 32 --batch_size 120
    done
}
convert() {    # convert NAME SOURCE FLAG...
    once "$D/$1.json" python -m extras.academic convert --questions "$D/vqa/$2.jsonl" --out "$D/$1.json" "${@:3}"
}
road() {       # road ROW INIT FILE... [-- FLAG...]: a tenth of the instructions, and these files
    stage2 "$1" "$D/$2" --data "$D/data_full/instruct.json=0.1" "${@:3}"
    exam "$1" normal format
}
rows_of() {
    begin_seed "$1"
    IMAGES=$W/images
    full_data
    stage1 stage1
    stage2 full "$D/stage1" --data "$D/data_full/instruct.json"
    held_out full
    bench full
    once "$D/vqa" python -m toy.vqa --world "$W" --out "$D/vqa" --seed "$seed"
    convert plain attributes --format_prompt none
    for source in attributes places relations; do convert $source $source; done

    # Table 4.1b
    exam stage1 normal ambiguous format
    exam full normal ambiguous format
    # Table 4.2
    road row0 stage1
    road row1 stage1 "$D/plain.json"
    road row2 stage1 "$D/attributes.json"
    exam row2 ambiguous
    stage1 stage1_mlp --projector mlp2x_gelu
    road row3 stage1_mlp "$D/attributes.json" --projector mlp2x_gelu
    road row5 stage1_mlp "$D"/{attributes,places}.json --projector mlp2x_gelu
    road row7 stage1_mlp "$D"/{attributes,places,relations}.json --projector mlp2x_gelu
    # Fig. 4.4
    held_out row0
    stage2 data_half "$D/stage1" --data "$D/data_full/instruct.json=0.5"
    held_out data_half
    # As many of each type, beside as many as they come
    data uniform conversation=667 detail_description=667 complex_reasoning=666
    stage2 uniform "$D/stage1" --data "$D/data_uniform/instruct.json"
    for name in data_half uniform; do bench $name; done
    held_out uniform
    # Row 6 taken back from row 7: pictures of half as many pixels a side
    IMAGES=$D/vqa/half
    stage1 stage1_half --projector mlp2x_gelu --images "$IMAGES"
    road row7_half stage1_half "$D"/{attributes,places,relations}.json --projector mlp2x_gelu --images "$IMAGES"
}
each_seed rows_of road ${SEEDS:-0 1 2}
python -m toy.report road --out "$OUT" | tee "$OUT/road.txt"
