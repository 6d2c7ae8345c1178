# Sourced by the toy's scripts: the virtual environment, and what they share.
source "$(dirname "${BASH_SOURCE[0]}")/env.sh"
export TIMEFORMAT="%U + %S s of one core"

once() {      # once FILE COMMAND...: run the command that makes FILE, unless it has been
    local file=$1; shift
    [ -e "$file.done" ] || { rm -rf "$file"; echo "== $file"; time "$@" && touch "$file.done"; }
}
teacher() {   # teacher FOLDER SEED [WORLD]: the toy's teacher, judge and expert as an endpoint on localhost, no language model; sets URL
    python -m toy.teacher ${3:+--world "$3"} --seed "$2" > "$1/teacher.txt" & TEACHER=$!
    trap 'kill $TEACHER; wait $TEACHER || true' EXIT
    until grep -q http "$1/teacher.txt"; do sleep 0.2; kill -0 $TEACHER; done
    URL=$(cat "$1/teacher.txt")
}

# What follows is of scripts whose rows are run over seeds; each seed has a folder, D.
begin_seed() {   # begin_seed SEED: its world W, stage 1's data, the teacher
    set -euo pipefail
    seed=$1 D=$OUT/seed$1 W=$OUT/seed$1/world
    once "$W" python -m toy.world world --out "$W" --seed "$seed" --pictures 4000
    once "$D/stage1.json" python generate_data.py expand --pairs "$W/pairs.jsonl" --out "$D/stage1.json" --seed "$seed"
    teacher "$D" "$seed" "$W"
}
data() {       # data NAME TYPE=N...: instructions by the teacher
    once "$D/data_$1" python generate_data.py instruct --base_url "$URL" --keep_duplicates --captions "$W/annotations/captions_train.json" \
        --instances "$W/annotations/instances_train.json" --out "$D/data_$1" --seed "$seed" --numbers "${@:2}"
}
full_data() { data full conversation=1470 detail_description=580 complex_reasoning=1950; }      # the paper's 58 : 23 : 77
stage1() {     # stage1 NAME FLAG...
    once "$D/$1" python train.py --recipe toy --stage 1 --data "$D/stage1.json" --images "$W/images" --out "$D/$1" \
        --seed "$seed" "${@:2}"
}
stage2() {     # stage2 NAME INIT FLAG...: --data and others
    once "$D/$1" python train.py --recipe toy --stage 2 --images "$W/images" --init "$2" --out "$D/$1" --seed "$seed" "${@:3}"
}
bench() {      # bench NAME: Table 4's score
    once "$D/bench" python -m extras.llava_bench make --base_url "$URL" --captions "$W/annotations/captions_held_out.json" \
        --instances "$W/annotations/instances_held_out.json" --out "$D/bench" --seed "$seed" --bench 100
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
each_seed() {  # each_seed FUNCTION LOG SEED...: as many seeds at once as there are cores; logs: OUT/seedN-LOG.log
    export -f $(compgen -A function)
    echo "to follow it: tail -f $OUT/seed$3-$2.log"
    printf '%s\n' "${@:3}" | xargs -P "${JOBS:-$(python -c "import os; print(os.cpu_count())")}" -I SEED \
        bash -c "bash -c '$1 SEED' >> $OUT/seedSEED-$2.log 2>&1 && echo 'seed SEED is done' || { tail -3 $OUT/seedSEED-$2.log; exit 1; }"
}
