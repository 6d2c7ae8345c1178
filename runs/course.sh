#!/usr/bin/env bash
# What the labs of docs/course.md measure besides the toy's other scripts, over three seeds.
#     bash runs/course.sh [lab...]      unfrozen labels image lora pope judge react; all of them, if none is named
#     SEEDS=0 bash runs/course.sh labels
# A lab that trains takes a quarter of the instructions. The folder is that of runs/toy_ablations.sh, whose world, stage 1 and row
# `full` are made here, if they have not been. What is done is not done again. Logs: FOLDER/seedN-course.log
source "$(dirname "$0")/toy_env.sh"
export OUT=${OUT:-out/toy_ablations} OMP_NUM_THREADS=1
mkdir -p "$OUT"
OUT=$(cd "$OUT" && pwd)
export LABS=${*:-pope judge labels image unfrozen lora react}

changed() {    # changed NAME COMMAND...: run it in a copy of the project with the change NAME of docs/course.md
    local copy; copy=$(mktemp -d)
    cp -r ./*.py parts extras toy prompts docs "$copy"
    sed -n "/^$1: /,/^\`\`\`/p" docs/course.md | sed '$d' | git -C "$copy" apply - \
        || { rm -rf "$copy"; echo "the change $1 of docs/course.md does not apply to this code"; exit 1; }
    ( cd "$copy"; "${@:2}" )
    rm -rf "$copy"
}
quarter() {    # quarter NAME INIT FLAG...: stage 2 on a quarter of the instructions, and its answers
    stage2 "$1" "$2" --data "$D/data_full/instruct.json=0.25" "${@:3}"
    held_out "$1"
}
asked_last() { # asked_last NAME: in a copy whose sample.py puts the picture behind the question
    once "$D/held_out_$1_asked_last.jsonl" python eval.py answer --model "$D/$1" --questions "$W/questions_held_out.jsonl" \
        --images "$W/images" --answers "$D/held_out_$1_asked_last.jsonl" --max_new_tokens 32 --batch_size 120
}
both_orders() {    # both_orders NAME: the bench's answers of `full`, judged by this folder's judge, the reference first and last
    once "$D/reviews_$1.jsonl" python eval.py judge --base_url "$URL" --questions "$D/bench/questions.jsonl" \
        --reference "$D/bench/reference.jsonl" --context "$D/bench/context.jsonl" --answers "$D/bench_full.jsonl" \
        --reviews "$D/reviews_$1.jsonl"
    once "$D/swapped_$1.jsonl" python -m extras.judges swap --base_url "$URL" --questions "$D/bench/questions.jsonl" \
        --reference "$D/bench/reference.jsonl" --context "$D/bench/context.jsonl" --answers "$D/bench_full.jsonl" \
        --reviews "$D/reviews_$1.jsonl" --swapped "$D/swapped_$1.jsonl"
}
own_judge() { teacher . "$seed" "$W"; both_orders "$1"; }
customise() {  # customise NAME FLAG...: REACT on what is retrieved so; --k pairs a query, by --keys
    local R=$D/react
    once "$R/$1" python -m extras.retrieve retrieve --index "$R/index" --clip toy/pretrained/clip --classes "$R/world/classes.txt" \
        --templates "$R/world/templates.txt" --out "$R/$1" "${@:2}"
    once "$R/react_$1" python -m extras.react train --clip toy/pretrained/clip --retrieved "$R/$1" --train locked_text_gated_image --lr 3e-3 \
        --out "$R/react_$1" --gated_layers 2 --no-augment --global_batch_size 64 --epochs 1000 --max_steps 250 --workers 0 --seed "$seed"
    once "$R/$1.json" python -m extras.react_eval zero_shot --models "$R/react_$1" --datasets "$R/world/datasets.json" --workers 0 --out "$R/$1.json"
}
full() {       # the row of runs/toy_ablations.sh
    stage2 full "$D/stage1" --data "$D/data_full/instruct.json"
}
lab() {
    case $1 in
        labels)
            quarter quarter "$D/stage1"
            changed labels quarter labels "$D/stage1" ;;
        image)
            quarter quarter "$D/stage1"
            for place in random last; do changed $place quarter $place "$D/stage1"; done
            for name in quarter random last; do changed asked_last asked_last $name; done ;;
        unfrozen)
            held_out stage1
            quarter quarter "$D/stage1"
            changed unfrozen stage1 unfrozen_stage1
            held_out unfrozen_stage1
            quarter unfrozen "$D/unfrozen_stage1" ;;
        lora)
            quarter quarter "$D/stage1"
            for rank in 4 16 64; do quarter lora_$rank "$D/stage1" --lora_rank $rank --lr 5e-3; done ;;
        pope)
            full
            once "$D/pope" python -m toy.course pope --world "$W" --out "$D/pope" --seed "$seed"
            once "$D/pope_full.jsonl" python eval.py answer --model "$D/full" --questions "$D/pope/questions.jsonl" --images "$W/images" \
                --answers "$D/pope_full.jsonl" --max_new_tokens 8 --batch_size 120
            python -m extras.benchmarks score pope --answers "$D/pope_full.jsonl" --questions "$D/pope/questions.jsonl" --labels "$D/pope" --json "$D/pope_full.json"
            ;;
        judge)
            full; bench full
            both_orders full
            changed first_wins own_judge first_wins ;;
        react)
            mkdir -p "$D/react"
            once "$D/react/world" python -m toy.world react --out "$D/react/world" --seed "$seed"
            once "$D/react/index" python -m extras.retrieve index --clip toy/pretrained/clip --corpus "$D/react/world/corpus.tsv" \
                --images "$D/react/world/images" --out "$D/react/index" --workers 0
            for k in 5 20 60; do customise text_$k --keys text --k $k; done
            customise image_60 --keys image --k 60 ;;
        *) echo "error: lab $1; there are unfrozen labels image lora pope judge react"; exit 1 ;;
    esac
}
labs_of() {
    begin_seed "$1"
    full_data
    stage1 stage1
    for name in $LABS; do lab "$name"; done
}
SEEDS=${SEEDS:-0 1 2}
each_seed labs_of course $SEEDS
python -m toy.course table --out "$OUT" --seeds $SEEDS | tee "$OUT/course.txt"
