#!/usr/bin/env bash
# LLaVA-1.5 (Diss. Sec. 4.3): both stages, 7B. On 8 A100 the authors' took 3.5 and 10 hours (13B: 5.5 and 20). Not run here.
#     bash runs/llava_1.5.sh [recipe]      llava-1.5-7b, llava-1.5-13b, llava-1.5-hd-13b
# data/LLaVA-Pretrain (LCS-558K, from the hub), data/llava_v1_5_mix665k.json, and its pictures: data/coco/train2017,
# data/gqa/images, data/ocr_vqa/images, data/textvqa/train_images, data/vg/VG_100K, data/vg/VG_100K_2
source "$(dirname "$0")/env.sh"
RECIPE=${1:-llava-1.5-7b} GPUS=${GPUS:-8}
torchrun --nproc_per_node="$GPUS" train.py --recipe "$RECIPE" --stage 1 --out "out/$RECIPE-stage1"
torchrun --nproc_per_node="$GPUS" train.py --recipe "$RECIPE" --stage 2 --init "out/$RECIPE-stage1" --out "out/$RECIPE" --shard
