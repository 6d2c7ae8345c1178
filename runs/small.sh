#!/usr/bin/env bash
# A small model of today on one GPU of 24 GB: SigLIP 2 (base, 512 px) and Qwen3-0.6B, from public data to a chat. Not run here.
#     bash runs/small.sh --estimate        hours, money and memory, predicted from the shapes; nothing else happens
#     bash runs/small.sh                   all of it; what is done is not done again: after an interruption run the same command again
# TFLOPS is the card's dense bf16 peak (RTX 4090: 165, RTX 3090: 71, L4: 121), PRICE what an hour of it costs you.
# OCR-VQA's covers have no archive to download: put them in data/ocr_vqa/images, or their samples are left out and counted.
set -euo pipefail
cd "$(dirname "$0")/.."
OUT=${OUT:-out/small} D=data
export TFLOPS=${TFLOPS:-165} PRICE=${PRICE:-0.5}

# FLOPs of a sample: 2 a weight and token forward, as much again for gradients of what is computed, again for those of weights;
# and attention, half of which is masked. OURS: 30 and 300 tokens of text, 12 and 150 of them answers; an MFU of 20 to 40%.
estimate() {
    python3 - <<'PLAN'
import os
N, TEXT, ANSWERS = 1024, (30, 300), (12, 150)
g = 11 * (7.1e6 * 2 + 4 * 768 * N)                       # a token, of the 11 layers that are read
F_PHI, HEAD = 440e6, 1024 * 151_936                      # weights in the 28 layers, and in the head
hours = [0, 0]
for stage, samples in enumerate((558_128, 665_298)):
    T = N + TEXT[stage]
    attention = 4 * 2048 * 28 * T / 2
    passes = 2 + stage                                   # f_phi's own gradients come with stage 2
    flops = N * g + T * passes * (2 * F_PHI + attention) + ANSWERS[stage] * passes * 2 * HEAD
    best, worst = (samples * flops / (float(os.environ["TFLOPS"]) * 1e12 * mfu) / 3600 for mfu in (0.4, 0.2))
    hours = [hours[0] + best, hours[1] + worst]
    print(f"stage {stage + 1}: {samples} samples of about {T} tokens, {samples * flops / 1e15:,.0f} PFLOP: "
          f"{best:.0f} to {worst:.0f} hours, about {(14, 21)[stage]} GB")
cost = [n * float(os.environ["PRICE"]) for n in hours]
print(f"predicted, not measured: {hours[0]:.0f} to {hours[1]:.0f} hours at {os.environ['TFLOPS']} TFLOP/s and an MFU of 40 to 20%, "
      f"{cost[0]:.0f} to {cost[1]:.0f} dollars at {os.environ['PRICE']} an hour; and 120 GB of disk")
PLAN
}
estimate
[ "${1:-}" != --estimate ] || exit 0
source runs/env.sh

# fetch NAME COMMAND...: once; a download that was interrupted goes on
fetch() { [ -e "$D/$1.done" ] || { echo "== $1" && "${@:2}" && touch "$D/$1.done"; }; }
archive() {      # archive URL FOLDER: a zip, unpacked there
    mkdir -p "$2"
    curl --fail --location --continue-at - --output "$2/archive.zip" "$1"
    python3 -m zipfile -e "$2/archive.zip" "$2"
    rm "$2/archive.zip"
}
pairs() {
    hf download liuhaotian/LLaVA-Pretrain --repo-type dataset --local-dir $D/LLaVA-Pretrain
    python3 -m zipfile -e $D/LLaVA-Pretrain/images.zip $D/LLaVA-Pretrain
}
mkdir -p $D
fetch pairs pairs
fetch mix665k hf download liuhaotian/LLaVA-Instruct-150K llava_v1_5_mix665k.json --repo-type dataset --local-dir $D
fetch coco archive http://images.cocodataset.org/zips/train2017.zip $D/coco
fetch gqa archive https://downloads.cs.stanford.edu/nlp/data/gqa/images.zip $D/gqa
fetch textvqa archive https://dl.fbaipublicfiles.com/textvqa/images/train_val_images.zip $D/textvqa
fetch vg archive https://cs.stanford.edu/people/rak248/VG_100K_2/images.zip $D/vg
fetch vg2 archive https://cs.stanford.edu/people/rak248/VG_100K_2/images2.zip $D/vg

# trained FOLDER: whether a run there has ended; else --resume begins it, or goes on with it
trained() { [ -e "$1/config.json" ]; }
trained "$OUT-stage1" ||
    python train.py --recipe small --stage 1 --out "$OUT-stage1" --resume
trained "$OUT" ||
    python train.py --recipe small --stage 2 --init "$OUT-stage1" --out "$OUT" --skip_bad --micro_batch_tokens 4096 --resume
echo "scores: bash runs/llava_1.5_benchmarks.sh $OUT; llama.cpp: docs/serving.md"
python sample.py --model "$OUT"
