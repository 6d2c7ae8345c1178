#!/usr/bin/env bash
# LLaVA-Bench (COCO), Sec. 5.1, Table 4: a checkpoint's answers to 90 questions about 30 pictures, judged beside a reference's.
#     MODEL=out/stage2 JUDGE=gpt-4 bash runs/llava_bench_coco.sh [further flags of the judge]
# $BENCH holds questions.jsonl, reference.jsonl, context.jsonl and images/: the authors' qa90_questions.jsonl,
# qa90_gpt4_answer.jsonl and caps_boxes_coco2014_val_80.jsonl under these names, RULE=rule.json being their prompts; or a new
# one by `python -m extras.llava_bench make --bench 30 --out $BENCH`. Pictures are named as in the questions, 000000441147.jpg.
# OPENAI_API_KEY is in the environment; 90 requests. Started again it goes on; nothing is asked twice.
source "$(dirname "$0")/env.sh"
MODEL=${MODEL:-out/stage2} BENCH=${BENCH:-data/llava_bench_coco} OUT=${OUT:-out/llava_bench_coco}
mkdir -p "$OUT"
python eval.py answer --model "$MODEL" --questions "$BENCH/questions.jsonl" --images "$BENCH/images" \
    --answers "$OUT/answers.jsonl" --temperature 0.2 --max_new_tokens 1024
python eval.py judge --questions "$BENCH/questions.jsonl" --reference "$BENCH/reference.jsonl" --answers "$OUT/answers.jsonl" \
    --context "$BENCH/context.jsonl" --reviews "$OUT/reviews.jsonl" ${RULE:+--rule "$RULE"} \
    --base_url "${BASE_URL:-https://api.openai.com/v1}" --judge_model "${JUDGE:-gpt-4}" "$@"
python eval.py score llava_bench --reviews "$OUT/reviews.jsonl" --json "$OUT/score.json"
