#!/usr/bin/env bash
# LLaVA-NeXT (Diss. Sec. 4.7): both stages. The authors' 34B took about a day on 32 A100. Not run here.
#     bash runs/llava_next.sh [recipe] [file]      llava-next-vicuna-7b, -vicuna-13b, -mistral-7b, -yi-34b; the instructions
# data/LLaVA-Pretrain as for LLaVA-1.5. The authors' mixture of 760K was not released in full; a larger one is, as
# lmms-lab/LLaVA-NeXT-Data on the hub: its JSON is the file, its pictures lie under data/.
source "$(dirname "$0")/env.sh"
RECIPE=${1:-llava-next-vicuna-7b} DATA=${2:-data/llava_next.json} GPUS=${GPUS:-8}
torchrun --nproc_per_node="$GPUS" train.py --recipe "$RECIPE" --stage 1 --out "out/$RECIPE-stage1"
torchrun --nproc_per_node="$GPUS" train.py --recipe "$RECIPE" --stage 2 --data "$DATA" --init "out/$RECIPE-stage1" --out "out/$RECIPE" --shard
