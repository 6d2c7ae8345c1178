#!/usr/bin/env bash
# LLaVA (Sec. 4.2): both stages. On 8 A100 the authors' 13B took about 4 hours and 10 (7B: stage 1 about 2). Not run here.
#     bash runs/llava.sh [recipe]      llava-7b, llava-13b
# data/LLaVA-CC3M-Pretrain-595K, data/LLaVA-Instruct-150K (both from the hub) and data/coco/train2017
source "$(dirname "$0")/env.sh"
RECIPE=${1:-llava-7b} GPUS=${GPUS:-8}
torchrun --nproc_per_node="$GPUS" train.py --recipe "$RECIPE" --stage 1 --out "out/$RECIPE-stage1"
torchrun --nproc_per_node="$GPUS" train.py --recipe "$RECIPE" --stage 2 --init "out/$RECIPE-stage1" --out "out/$RECIPE" --shard
