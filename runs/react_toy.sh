#!/usr/bin/env bash
# REACT in miniature (Diss. Ch. 2: Tables 2.2, 2.3, 2.5, 2.6 and the retrieval-size row), offline, on two CPU cores: class names,
# a corpus, and a toy CLIP that has never seen dark paper.
#     bash runs/react_toy.sh [seed] [folder]      about 12 minutes on two cores; folder is emptied first
source "$(dirname "$0")/env.sh"
SEED=${1:-0} OUT=${2:-out/react_toy}
W=$OUT/world
export OMP_NUM_THREADS=1     # two trainings run side by side
rm -rf "$OUT"

retrieve() {   # retrieve K: texts near the queries (T2T); CLIP's own image tower would find what it knows already
    python -m extras.retrieve retrieve --index "$OUT/index" --clip toy/pretrained/clip --classes "$W/classes.txt" --templates "$W/templates.txt" --keys text --k "$1" --out "$OUT/retrieved_$1"
}
tune() {       # tune ROW LR K
    python -m extras.react train --clip toy/pretrained/clip --retrieved "$OUT/retrieved_$3" --train "$1" --lr "$2" --out "$OUT/$1_$3" --gated_layers 2 --no-augment --global_batch_size 64 --epochs 1000 --max_steps 250 --workers 0 --seed "$SEED" > "$OUT/$1_$3.log"
}

python -m toy.world react --out "$W" --seed "$SEED"
python -m extras.retrieve index --clip toy/pretrained/clip --corpus "$W/corpus.tsv" --images "$W/images" --out "$OUT/index" --workers 0
for k in 5 20 60; do retrieve "$k"; done
GATED=3e-3 OWN=3e-4          # the paper's rates, 5e-4 and 5e-5, are as far apart
tune locked_text_gated_image $GATED 60 & tune locked_text $OWN 60; wait $!
tune locked_image $OWN 60 & tune full $OWN 60; wait $!
tune gated_text $GATED 60 & tune gated_both $GATED 60; wait $!
tune locked_text_gated_image $GATED 5 & tune locked_text $OWN 5; wait $!
tune locked_text_gated_image $GATED 20 & tune full $OWN 5; wait $!

# Diss. Table 2.6 and the retrieval sizes: all models, what they know of the targets and what they forget
TUNED=("$OUT"/{locked_image,locked_text,full,gated_text,locked_text_gated_image,gated_both}_60 "$OUT"/{locked_text_gated_image_20,locked_text_gated_image_5,locked_text_5,full_5})
python -m extras.react_eval zero_shot --models toy/pretrained/clip "${TUNED[@]}" --datasets "$W/datasets.json" --workers 0 --out "$OUT/zero_shot.json"
python -m extras.react_eval retrieval --models toy/pretrained/clip "${TUNED[@]}" --test "$W/captions.tsv" --images "$W/images" --workers 0 --out "$OUT/retrieval.json"
python -m extras.react_eval segment --models toy/pretrained/clip "${TUNED[@]}" --test "$W/masks.tsv" --images "$W/images" --classes "$W/classes.txt" --templates "$W/templates.txt" --out "$OUT/segment.json"

# Diss. Tables 2.2, 2.3: CLIP and REACT, with examples to learn from
probe() {      # probe SHOTS
    python -m extras.react_eval probe --models toy/pretrained/clip "$OUT/locked_text_gated_image_60" --datasets "$W/datasets.json" --shots "$1" --seed "$SEED" --workers 0 --out "$OUT/probe_$1.json"
}
fine_tune() {  # fine_tune SHOTS EPOCHS
    python -m extras.react_eval fine_tune --models toy/pretrained/clip "$OUT/locked_text_gated_image_60" --datasets "$W/datasets.json" --shots "$1" --epochs "$2" --lr $OWN --seed "$SEED" --workers 0 --out "$OUT/fine_tune_$1.json"
}
(probe 5; fine_tune 5 30; fine_tune 1% 30; probe all) & fine_tune all 10; wait $!
python -m extras.react_eval retrieval --models toy/pretrained/clip "$OUT/locked_text_gated_image_60" --test "$W/dark_captions.tsv" --images "$W/images" --workers 0 --out "$OUT/dark_retrieval.json"
python -m extras.react_eval retrieval --models toy/pretrained/clip "$OUT/locked_text_gated_image_60" --test "$W/dark_captions.tsv" --train "$W/dark_captions_train.tsv" --images "$W/images" --lr $OWN --epochs 8 --batch_size 64 --seed "$SEED" --workers 0 --out "$OUT/dark_retrieval_fine_tuned.json"
