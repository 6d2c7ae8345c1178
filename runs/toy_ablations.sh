#!/usr/bin/env bash
# Tables 4 and 8 of the paper in miniature: nine variants on the toy world, over three seeds, printed beside the paper's.
#     bash runs/toy_ablations.sh [folder] [seed...]      a seed takes about 35 minutes of one core; as many at once as there are
# What is done is not done again: after an interruption run the same command again. Logs: FOLDER/seedN.log
source "$(dirname "$0")/env.sh"
export OUT=${1:-out/toy_ablations} OMP_NUM_THREADS=1
SEEDS=${*:2}
mkdir -p "$OUT"

once() {      # once FILE COMMAND...: run the command that makes FILE, unless it has been
    local file=$1; shift
    [ -e "$file.done" ] || { rm -rf "$file"; "$@" && touch "$file.done"; }
}
teacher() {  # teacher FOLDER WORLD SEED: the toy's teacher and judge as an endpoint on localhost; sets URL
    python -m toy.teacher --world "$2" --seed "$3" > "$1/teacher.txt" & TEACHER=$!
    trap 'kill $TEACHER' EXIT
    until grep -q http "$1/teacher.txt"; do sleep 0.2; kill -0 $TEACHER; done
    URL=$(cat "$1/teacher.txt")
}
variants() {  # variants SEED
    set -euo pipefail
    local D=$OUT/seed$1 W=$OUT/seed$1/world seed=$1
    data() {       # data NAME TYPE=N...
        once "$D/data_$1" python generate_data.py instruct --base_url "$URL" --keep_duplicates --captions "$W/annotations/captions_train.json" \
            --instances "$W/annotations/instances_train.json" --out "$D/data_$1" --seed "$seed" --numbers "${@:2}"
    }
    stage1() {     # stage1 NAME FLAG...
        once "$D/$1" python train.py --recipe toy --stage 1 --data "$D/stage1.json" --images "$W/images" --out "$D/$1" \
            --seed "$seed" "${@:2}"
    }
    stage2() {     # stage2 NAME JSON INIT FLAG...
        once "$D/$1" python train.py --recipe toy --stage 2 --data "$D/$2" --images "$W/images" --init "$3" --out "$D/$1" \
            --seed "$seed" "${@:4}"
    }
    bench() {      # bench NAME: Table 4's score
        once "$D/bench_$1.jsonl" python eval.py answer --model "$D/$1" --questions "$D/bench/questions.jsonl" \
            --images "$W/images" --answers "$D/bench_$1.jsonl" --max_new_tokens 128 --batch_size 100
        once "$D/reviews_$1.jsonl" python eval.py judge --base_url "$URL" --questions "$D/bench/questions.jsonl" \
            --reference "$D/bench/reference.jsonl" --context "$D/bench/context.jsonl" --answers "$D/bench_$1.jsonl" \
            --reviews "$D/reviews_$1.jsonl"
    }
    held_out() {   # held_out NAME: Table 8's
        once "$D/held_out_$1.jsonl" python eval.py answer --model "$D/$1" --questions "$W/questions_held_out.jsonl" \
            --images "$W/images" --answers "$D/held_out_$1.jsonl" --max_new_tokens 32 --batch_size 120
    }
    once "$W" python -m toy.world world --out "$W" --seed "$seed" --pictures 4000
    teacher "$D" "$W" "$seed"
    once "$D/bench" python -m extras.llava_bench make --base_url "$URL" --captions "$W/annotations/captions_held_out.json" \
        --instances "$W/annotations/instances_held_out.json" --out "$D/bench" --seed "$seed" --bench 100
    once "$D/stage1.json" python generate_data.py expand --pairs "$W/pairs.jsonl" --out "$D/stage1.json" --seed "$seed"
    data full             conversation=1470 detail_description=580 complex_reasoning=1950      # the paper's 58 : 23 : 77
    data detail_complex   detail_description=580 complex_reasoning=1950
    data conversation_few conversation=1470 detail_description=29 complex_reasoning=195
    data conversation     conversation=1470
    once "$D/answer_first.json" python -m toy.report answer_first --data "$D/data_full/instruct.json" --out "$D/answer_first.json"

    stage1 stage1
    stage2 full             data_full/instruct.json             "$D/stage1"
    stage2 detail_complex   data_detail_complex/instruct.json   "$D/stage1"
    stage2 conversation_few data_conversation_few/instruct.json "$D/stage1"
    stage2 conversation     data_conversation/instruct.json     "$D/stage1"
    for name in stage1 full detail_complex conversation_few conversation; do bench $name; done

    stage1 last_layer_stage1 --feature_layer -1
    stage1 small_stage1 --llm "$OUT/small_llm" --template llava_v0
    stage2 last_layer   data_full/instruct.json "$D/last_layer_stage1" --feature_layer -1
    stage2 answer_first answer_first.json       "$D/stage1"
    stage2 scratch      data_full/instruct.json none
    stage2 small        data_full/instruct.json "$D/small_stage1"
    for name in full last_layer answer_first scratch small; do held_out $name; done
}
export -f once teacher variants

echo "a language model of half the layers, then nine variants a seed; logs: $OUT/*.log"
once "$OUT/small_llm" python -m toy.pretrain --out "$OUT" --part small_llm > "$OUT/small_llm.log" 2>&1
for seed in ${SEEDS:-0 1 2}; do echo "$seed"; done | xargs -P "${JOBS:-$(python -c "import os; print(os.cpu_count())")}" -I SEED \
    bash -c 'bash -c "variants SEED" > "$OUT/seedSEED.log" 2>&1 && echo "seed SEED is done" || { tail -3 "$OUT/seedSEED.log"; exit 1; }'
python -m toy.report ablations --out "$OUT" | tee "$OUT/tables.txt"
