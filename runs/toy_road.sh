#!/usr/bin/env bash
# Diss. Ch. 4 in miniature, over three seeds: the road to LLaVA-1.5 (Table 4.2), three ways to ask (Table 4.1b), less data (Fig. 4.4);
# and the three response types in equal shares (Sec. 4.2 of the paper). Fig. 4.3 and row 9 are the row `small` of runs/toy_ablations.sh.
#     bash runs/toy_road.sh [folder] [seed...]
#     ROWS="row0 row1 row2" bash runs/toy_road.sh      these rows alone
# The folder is that of runs/toy_ablations.sh, whose world, stage 1 and row `full` are made here, if they have not been.
# What is done is not done again: after an interruption run the same command again. Logs: FOLDER/seedN-road.log
source "$(dirname "$0")/toy_env.sh"
export OUT=${1:-out/toy_ablations} OMP_NUM_THREADS=1
export ROWS=${ROWS:-stage1 row0 row1 row2 uniform row3 row5 row7 full half tenth}
SEEDS=${*:2}
mkdir -p "$OUT"

exam() {       # exam NAME WAY...: the same questions, asked in each way
    for way in "${@:2}"; do
        once "$D/exam_$way-$1.jsonl" python eval.py answer --model "$D/$1" --questions "$D/vqa/exam_$way.jsonl" \
            --images "$W/images" --answers "$D/exam_$way-$1.jsonl" --max_new_tokens 32 --batch_size 120
    done
}
convert() {    # convert NAME SOURCE FLAG...
    once "$D/$1.json" python -m extras.academic convert --questions "$D/vqa/$2.jsonl" --out "$D/$1.json" "${@:3}"
}
few() {        # few NAME INIT FLAG...: stage 2 on few samples, in steps of 8
    stage2 "$1" "$D/$2" --global_batch_size 8 --val_samples 0 "${@:3}"
}
road() {       # road ROW INIT FILE... FLAG...: a tenth of the instructions, and these files
    few "$1" "$2" --data "$D/data_full/instruct.json=0.1" "${@:3}"
    exam "$1" normal format
}
row() {
    local A=$D/attributes.json B=$D/places.json C=$D/relations.json MLP="--projector mlp2x_gelu"
    case $1 in
        stage1) exam stage1 normal ambiguous format ;;
        row0) road row0 stage1; held_out row0; bench row0 ;;
        uniform)   # row 0 with as many of each type as of the others, rather than as they come (58 : 23 : 77)
            data uniform conversation=133 detail_description=133 complex_reasoning=134
            few uniform stage1 --data "$D/data_uniform/instruct.json"; held_out uniform; bench uniform ;;
        row1) convert plain attributes --format_prompt none; road row1 stage1 "$D/plain.json" ;;
        row2) road row2 stage1 "$A"; exam row2 ambiguous ;;
        row3) stage1 stage1_mlp $MLP; road row3 stage1_mlp "$A" $MLP ;;
        row5) stage1 stage1_mlp $MLP; road row5 stage1_mlp "$A" "$B" $MLP ;;
        row7) stage1 stage1_mlp $MLP; road row7 stage1_mlp "$A" "$B" "$C" $MLP ;;
        full)
            stage2 full "$D/stage1" --data "$D/data_full/instruct.json"
            exam full normal ambiguous format; held_out full; bench full ;;
        half)      # Fig. 4.4
            stage2 half "$D/stage1" --data "$D/data_full/instruct.json=0.5"; held_out half ;;
        tenth)
            stage2 tenth "$D/stage1" --data "$D/data_full/instruct.json=0.1"; held_out tenth ;;
        *) echo "error: row $1; there are stage1 row0 row1 row2 uniform row3 row5 row7 full half tenth"; exit 1 ;;
    esac
}
rows_of() {
    begin_seed "$1"
    full_data
    stage1 stage1
    once "$D/vqa" python -m toy.vqa --world "$W" --out "$D/vqa" --seed "$seed"
    for source in attributes places relations; do convert $source $source; done
    for name in $ROWS; do row "$name"; done
}
each_seed rows_of road ${SEEDS:-0 1 2}
python -m toy.report road --out "$OUT" | tee "$OUT/road.txt"
