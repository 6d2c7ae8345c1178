#!/usr/bin/env bash
# The paper in miniature, offline, on two CPU cores: world, stage 1, stage 2, questions on held-out pictures, tables.
#     bash runs/toy.sh [--rebuild] [seed] [folder]      9 to 10 minutes after the install; folder is emptied first
# --rebuild pretrains the two parts in toy/pretrained again, side by side: 33 minutes more.
source "$(dirname "$0")/toy_env.sh"
BEGAN=$SECONDS
if [ "${1:-}" = --rebuild ]; then
    shift
    OMP_NUM_THREADS=1 python -m toy.pretrain --out toy/pretrained --part clip & CLIP=$!
    OMP_NUM_THREADS=1 python -m toy.pretrain --out toy/pretrained --part llm
    wait $CLIP
fi
SEED=${1:-0} OUT=${2:-out/toy}
W=$OUT/world MINUTES=()
rm -rf "$OUT"

phase() {   # phase NAME COMMAND...: run it and note its minutes
    local name=$1 began=$SECONDS; shift
    echo; echo "== $name: $*"
    "$@"
    MINUTES+=("$name=$(python -c "print(round(($SECONDS - $began) / 60, 2))")")
}
write() {    # stage 1 by naive expansion; stage 2 by the teacher, who reads captions and boxes
    python generate_data.py expand --pairs "$W/pairs.jsonl" --out "$OUT/stage1.json" --seed "$SEED"
    teacher "$OUT" "$SEED" "$W"
    python generate_data.py instruct --captions "$W/annotations/captions_train.json" --out "$OUT/instruct" \
        --instances "$W/annotations/instances_train.json" --base_url "$URL" --keep_duplicates --seed "$SEED" \
        --mix conversation=8 detail_description=1 complex_reasoning=2
}
ask() {
    for split in held_out new_pairs blind shuffled; do
        python sample.py --model "$OUT/stage2" --questions "$W/questions_$split.jsonl" --images "$W/images" \
            --answers "$OUT/answers_$split.jsonl" --temperature 0 --max_new_tokens 32 --batch_size 120
    done
}
bench() {    # the paper's Sec. 5.1 on held-out pictures: 90 questions, the teacher's reference answers, the judge
    python -m extras.llava_bench make --bench 30 --captions "$W/annotations/captions_held_out.json" --out "$OUT/bench" \
        --instances "$W/annotations/instances_held_out.json" --base_url "$URL" --seed "$SEED"
    python eval.py answer --model "$OUT/stage2" --questions "$OUT/bench/questions.jsonl" --images "$W/images" \
        --answers "$OUT/answers_bench.jsonl" --max_new_tokens 128 --batch_size 90
    python eval.py judge --questions "$OUT/bench/questions.jsonl" --reference "$OUT/bench/reference.jsonl" \
        --answers "$OUT/answers_bench.jsonl" --context "$OUT/bench/context.jsonl" --reviews "$OUT/reviews.jsonl" \
        --base_url "$URL"
}

phase world   python -m toy.world world --out "$W" --seed "$SEED"
phase data    write
phase stage1  python train.py --recipe toy --stage 1 --data "$OUT/stage1.json" --images "$W/images" --out "$OUT/stage1" --seed "$SEED"
phase stage2  python train.py --recipe toy --stage 2 --data "$OUT/instruct/instruct.json" --images "$W/images" --init "$OUT/stage1" --out "$OUT/stage2" --seed "$SEED"
phase answers ask
phase bench   bench
python -m toy.report report --out "$OUT" --minutes "${MINUTES[@]}" "total=$(python -c "print(round(($SECONDS - $BEGAN) / 60, 2))")"
