#!/usr/bin/env bash
# The paper's instruction data (Sec. 3): 58K conversations, 23K detailed descriptions, 77K complex reasonings about COCO's
# pictures, by a text-only teacher. COCO's annotations lie in data/coco/annotations; OPENAI_API_KEY is in the environment.
#     BASE_URL=... MODEL=... bash runs/instruct_158k.sh [further flags, e.g. --estimate --price_in 30 --price_out 60]
# Started again after any interruption it goes on; nothing is asked twice.
source "$(dirname "$0")/env.sh"
COCO=data/coco/annotations
python generate_data.py instruct --captions $COCO/captions_train2014.json --instances $COCO/instances_train2014.json \
    --numbers conversation=58000 detail_description=23000 complex_reasoning=77000 \
    --base_url "${BASE_URL:-https://api.openai.com/v1}" --model "${MODEL:-gpt-4}" --workers 64 --out data/instruct_158k "$@"
