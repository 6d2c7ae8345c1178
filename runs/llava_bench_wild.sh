#!/usr/bin/env bash
# LLaVA-Bench (In-the-Wild), Sec. 5.1, Table 5: three decodings of 60 questions about 24 pictures, each judged once, and the
# mean and deviation of their scores.
#     MODEL=out/stage2 JUDGE=gpt-4 bash runs/llava_bench_wild.sh [further flags of the judge]
# $BENCH is the authors' liuhaotian/llava-bench-in-the-wild: questions.jsonl, context.jsonl, answers_gpt4.jsonl, images/; or
# one's own, its answers_gpt4.jsonl by `python -m extras.llava_bench references`. RULE=rule.json takes the authors' prompts.
# OPENAI_API_KEY is in the environment; 180 requests. Started again it goes on.
source "$(dirname "$0")/env.sh"
MODEL=${MODEL:-out/stage2} BENCH=${BENCH:-data/llava_bench_wild} OUT=${OUT:-out/llava_bench_wild}
mkdir -p "$OUT"
for run in 0 1 2; do
    python eval.py answer --model "$MODEL" --questions "$BENCH/questions.jsonl" --images "$BENCH/images" \
        --answers "$OUT/answers_$run.jsonl" --temperature 0.2 --max_new_tokens 1024 --seed $run
    python eval.py judge --questions "$BENCH/questions.jsonl" --reference "$BENCH/answers_gpt4.jsonl" \
        --answers "$OUT/answers_$run.jsonl" --context "$BENCH/context.jsonl" --reviews "$OUT/reviews_$run.jsonl" \
        --base_url "${BASE_URL:-https://api.openai.com/v1}" --judge_model "${JUDGE:-gpt-4}" ${RULE:+--rule "$RULE"} "$@"
done
python eval.py score llava_bench --reviews "$OUT"/reviews_[012].jsonl --json "$OUT/score.json"
