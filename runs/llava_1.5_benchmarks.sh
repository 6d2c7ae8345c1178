#!/usr/bin/env bash
# The benchmarks of LLaVA-1.5 that need no judge: a checkpoint answers, greedily, and is scored.
#     bash runs/llava_1.5_benchmarks.sh CHECKPOINT [output folder]      DATA=data/eval; what is not there is passed over
# Question files (*.jsonl) are those of LLaVA's eval.zip (docs/Evaluation.md of haotian-liu/LLaVA); pictures and labels come from
# the benchmarks' own sites:
#     pope/        llava_pope_test.jsonl  coco/coco_pope_{random,popular,adversarial}.json (POPE's commit e3e39262)  val2014/
#     MME/         llava_mme.jsonl  MME_Benchmark_release_version/  eval_tool/Your_Results/TASK.txt
#     mmbench/     mmbench_dev_20230712.tsv  mmbench_dev_cn_20231003.tsv (they hold pictures and questions)
#     seed_bench/  llava-seed-bench.jsonl  SEED-Bench.json  SEED-Bench-image/  SEED-Bench-video-image/ (the middle frames)
#     scienceqa/   problems.json  pid_splits.json  images/test/
#     textvqa/     llava_textvqa_val_v051_ocr.jsonl  TextVQA_0.5.1_val.json  train_images/
#     gqa/         llava_gqa_testdev_balanced.jsonl  testdev_balanced_questions.json  images/
#     MMMU/        validation.jsonl  images/                                docs/evaluation.md says how they are made
#     MathVista/   testmini.json  images/                                   testmini.json has the questions
#     vizwiz/      llava_test.jsonl  test/                                  only an upload: the server scores
#     vqav2/       llava_vqav2_mscoco_test-dev2015.jsonl  llava_vqav2_mscoco_test2015.jsonl  test2015/        the same
source "$(dirname "$0")/env.sh"
MODEL=${1:?usage: bash runs/llava_1.5_benchmarks.sh CHECKPOINT [output folder]} OUT=${2:-out/benchmarks} D=${DATA:-data/eval}
mkdir -p "$OUT"
have() { [ -e "$D/$1" ] || { echo "== no $D/$1: passed over"; return 1; }; }
ask() {    # ask QUESTIONS PICTURES NAME
    python eval.py answer --model "$MODEL" --questions "$1" --images "$2" --answers "$OUT/$3.jsonl" --max_new_tokens 128
}

if have pope; then
    ask $D/pope/llava_pope_test.jsonl $D/pope/val2014 pope
    python -m extras.benchmarks score pope --answers $OUT/pope.jsonl --questions $D/pope/llava_pope_test.jsonl --labels $D/pope/coco --json $OUT/pope.json
fi
if have MME; then
    ask $D/MME/llava_mme.jsonl $D/MME/MME_Benchmark_release_version mme
    python -m extras.benchmarks score mme --answers $OUT/mme.jsonl --labels $D/MME/eval_tool/Your_Results --json $OUT/mme.json
fi
for name in mmbench_dev_20230712 mmbench_dev_cn_20231003; do
    if have mmbench/$name.tsv; then
        python -m extras.benchmarks mmbench_data --labels $D/mmbench/$name.tsv --questions $OUT/$name.questions.jsonl --images $D/mmbench/$name
        ask $OUT/$name.questions.jsonl $D/mmbench/$name $name
        python -m extras.benchmarks score mmbench --answers $OUT/$name.jsonl --labels $D/mmbench/$name.tsv --json $OUT/$name.json
    fi
done
if have seed_bench; then
    ask $D/seed_bench/llava-seed-bench.jsonl $D/seed_bench seed_bench
    python -m extras.benchmarks score seed_bench --answers $OUT/seed_bench.jsonl --labels $D/seed_bench --json $OUT/seed_bench.json
fi
if have scienceqa; then
    python eval.py scienceqa_data --labels $D/scienceqa --split test --format letter --questions $OUT/scienceqa.questions.jsonl
    ask $OUT/scienceqa.questions.jsonl $D/scienceqa/images/test scienceqa
    python eval.py score scienceqa --answers $OUT/scienceqa.jsonl --labels $D/scienceqa --json $OUT/scienceqa.json
fi
if have textvqa; then
    ask $D/textvqa/llava_textvqa_val_v051_ocr.jsonl $D/textvqa/train_images textvqa
    python -m extras.benchmarks score textvqa --answers $OUT/textvqa.jsonl --labels $D/textvqa --json $OUT/textvqa.json
fi
if have gqa; then
    ask $D/gqa/llava_gqa_testdev_balanced.jsonl $D/gqa/images gqa
    python -m extras.benchmarks score gqa --answers $OUT/gqa.jsonl --labels $D/gqa/testdev_balanced_questions.json --json $OUT/gqa.json
fi
if have MMMU; then
    python -m extras.benchmarks mmmu_data --labels $D/MMMU/validation.jsonl --questions $OUT/mmmu.questions.jsonl --images $D/MMMU/images
    ask $OUT/mmmu.questions.jsonl $D/MMMU/images mmmu
    python -m extras.benchmarks score mmmu --answers $OUT/mmmu.jsonl --labels $D/MMMU/validation.jsonl --json $OUT/mmmu.json
fi
if have MathVista; then
    python -m extras.benchmarks mathvista_data --labels $D/MathVista/testmini.json --questions $OUT/mathvista.questions.jsonl --images $D/MathVista
    ask $OUT/mathvista.questions.jsonl $D/MathVista mathvista
    python -m extras.benchmarks score mathvista --answers $OUT/mathvista.jsonl --labels $D/MathVista/testmini.json --json $OUT/mathvista.json
fi
if have vizwiz; then
    ask $D/vizwiz/llava_test.jsonl $D/vizwiz/test vizwiz
    python -m extras.benchmarks score vizwiz --answers $OUT/vizwiz.jsonl --questions $D/vizwiz/llava_test.jsonl --upload $OUT/vizwiz_upload.json
fi
if have vqav2; then
    ask $D/vqav2/llava_vqav2_mscoco_test-dev2015.jsonl $D/vqav2/test2015 vqav2
    python -m extras.benchmarks score vqav2 --answers $OUT/vqav2.jsonl --questions $D/vqav2/llava_vqav2_mscoco_test2015.jsonl --upload $OUT/vqav2_upload.json
fi
