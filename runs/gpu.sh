#!/usr/bin/env bash
# Nine minutes on one GPU, offline, without data: step time, MFU, memory and tokens/s at real shapes.
#   bash runs/gpu.sh [--minutes 9] [--out out/gpu.md]      its table belongs in docs/unmeasured.md
set -e
cd "$(dirname "$0")/.."
export HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
python -m extras.gpu_table "$@"
