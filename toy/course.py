"""For the labs of docs/course.md: POPE's questions about the toy's pictures, and what came out.

    python -m toy.course pope  --world out/toy/world --out out/toy/pope
    python -m toy.course table --out out/toy_ablations
    python -m toy.course draw  --out out/toy_ablations --picture docs/labs.png

The first writes POPE's files (Diss. Sec. 4.4) for `python -m extras.benchmarks score pope`, the
others read what runs/course.sh leaves behind. Everything here is OURS.
"""
import random
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from eval import relative_scores
from parts.files import check_least, read_value, run_command, run_main, write_lines
from toy.report import held_out_of, plot_loss, print_table, rows_made
from toy.world import KINDS, SEEN, WAYS_TO_ASK, picture_name, read_coco, with_article

SPLITS = ("random", "popular", "adversarial")
POPE_COLUMNS = ("f1", "accuracy", "yes")
ROWS = {      # files held_out_ROW.jsonl; changes are from the first row
    "quarter": "a quarter of the instructions",
    "stage1": "stage 1 alone",
    "unfrozen_stage1": "unfrozen: stage 1 alone",
    "unfrozen": "unfrozen, then a quarter",
    "labels": "labels on everything",
    "random": "image at random",
    "last": "image last",
    "quarter_asked_last": "image first, asked last",
    "random_asked_last": "image at random, asked last",
    "last_asked_last": "image last, asked last",
    "lora_4": "LoRA, rank 4",
    "lora_16": "LoRA, rank 16",
    "lora_64": "LoRA, rank 64",
}
STAGE_1 = ("stage1", "unfrozen_stage1")
JUDGES = {"full": "the judge", "first_wins": "one that prefers what stands first"}
RETRIEVED = {"text_5": "texts, 5 a query", "text_20": "texts, 20 a query",
             "text_60": "texts, 60 a query", "image_60": "pictures, 60 a query"}


# ------------------------------------------------------------------------------------------------
# POPE in miniature


@dataclass(frozen=True)
class Pope:
    world: str                           # folder of toy.world
    out: str                             # folder to write to
    pictures: int = 240                  # of the held-out ones; two questions a picture and split
    seed: int = 0


def absent_pair(split, scene, by_count, rng):
    """A colour-shape pair that a scene has not.

    random        any of those in training
    popular       the one that most things in training have
    adversarial   the colour of one thing with the shape of another; in POPE, what is often seen
                  together with what is there, which nothing is in the toy
    """
    here = {thing.pair for thing in scene.things}
    absent = [pair for pair in by_count if pair not in here]
    if split == "popular":
        return absent[0]
    if split == "adversarial":
        colours = {colour for colour, _ in here}
        shapes = {shape for _, shape in here}
        mixed = [(colour, shape) for colour, shape in absent
                 if colour in colours and shape in shapes]
        alike = [pair for pair in absent if pair[0] in colours or pair[1] in shapes]
        absent = mixed or alike          # a picture of one thing has no mixed pair
    return rng.choice(absent)


def write_pope(config):
    """questions.jsonl, and a file of labels for each split: a yes and a no about each picture."""
    check_least(config, pictures=1)
    annotations = Path(config.world, "annotations")
    trained_on = read_coco(annotations / "instances_train.json").values()
    counts = Counter(thing.pair for scene in trained_on for thing in scene.things)
    by_count = sorted(SEEN, key=lambda pair: -counts[pair])
    scenes = sorted(read_coco(annotations / "instances_held_out.json").items())
    rng = random.Random(config.seed)
    questions = []
    for split in SPLITS:
        labels = []
        for i, scene in scenes[:config.pictures]:
            present = scene.things[i % len(scene.things)].pair       # the same in each split
            absent = absent_pair(split, scene, by_count, rng)
            for label, pair in (("yes", present), ("no", absent)):
                text = WAYS_TO_ASK["existence"][0].format(with_article(" ".join(pair)))
                asked = {"image": picture_name(i), "text": text}
                labels.append(asked | {"label": label})
                name = f"{split}-{i}-{label}"
                questions.append({"question_id": name, **asked, "category": split})
        write_lines(Path(config.out, f"coco_pope_{split}.json"), labels)
    write_lines(Path(config.out, "questions.jsonl"), questions)
    print(f"{len(questions)} questions in {config.out}")


# ------------------------------------------------------------------------------------------------
# What the labs came to


@dataclass(frozen=True)
class LabTable:
    out: str                             # folder of runs/course.sh
    seeds: list[str] = ("0", "1", "2")


def print_labs(config):
    """The labs' tables over the seeds: means and standard deviations."""
    seeds = [Path(config.out, f"seed{seed}") for seed in config.seeds]
    print(f"{len(seeds)} seeds: mean ± standard deviation, in percent")
    table = rows_made(ROWS, seeds, "held_out_{}.jsonl")
    if "quarter" in table:
        scores = {row: held_out_of(row, seeds, part=str) for row in table}
        rows = [(name, scores[row][:, 0], (scores[row] - scores["quarter"])[:, 0],
                 *scores[row][:, 1:].T) for row, name in table.items()]
        print_table("held-out questions, right word for word", ("all", "change", *KINDS), rows)

    if rows_made({"full": 0}, seeds, "pope_{}.json"):
        found = [read_value(seed / "pope_full.json") for seed in seeds]
        rows = [(split, *(np.array([scores[f"{split}.{name}"] for scores in found])
                          for name in POPE_COLUMNS)) for split in SPLITS]
        print_table("POPE of the row full", POPE_COLUMNS, rows)

    rows = [(name, *orders_of(row, seeds))
            for row, name in rows_made(JUDGES, seeds, "swapped_{}.jsonl").items()]
    if rows:
        print_table("relative scores of the row full with the reference first, last; their 95% "
                    "intervals (questions redrawn) with it first, at each seed",
                    ("first", "last", *(seed.name for seed in seeds)), rows)

    rows = []
    for row, name in rows_made(RETRIEVED, seeds, "react/{}.json").items():
        found = [customised(seed / "react", row) for seed in seeds]
        rows.append((name, *(np.array([scores[what] for scores in found]) for what in found[0])))
    if rows:
        print_table("REACT on what was retrieved", found[0], rows)


def orders_of(row, seeds):
    """A judge's relative scores of the row full: two arrays over seeds, then intervals as text."""
    first = [relative_scores([str(seed / f"reviews_{row}.jsonl")])[0] for seed in seeds]
    last = [relative_scores([str(seed / f"swapped_{row}.jsonl")])[0] for seed in seeds]
    for found in (first, last):
        yield np.array([scores["all.relative"] for scores in found])
    for scores in first:
        yield f"{scores['all.relative_low']:.1f} to {scores['all.relative_high']:.1f}"


def customised(folder, row):
    """How many pairs a retrieval brought, and how REACT on them classifies."""
    [scores] = read_value(folder / f"{row}.json").values()
    pairs = read_value(folder / row / "report.json")["pairs"]
    return {"pairs": pairs} | {name: 100 * share for name, share in scores.items()}


@dataclass(frozen=True)
class LabCurves:
    out: str                             # folder of runs/course.sh
    picture: str                         # file to write


def draw_curves(config):
    """The training losses of stage 2 at seed 0, a line a lab, on a light card."""
    from toy.figures import CARD  # only here: the tables need no torch
    figure = Figure(figsize=(8, 4), facecolor=CARD, layout="constrained")
    axes = figure.subplots()
    seed = Path(config.out, "seed0")
    for row, name in rows_made(ROWS, [seed], "{}/log.jsonl").items():
        if row not in STAGE_1:
            plot_loss(axes, seed / row, label=name, lw=1)
    axes.set(xlabel="step", ylabel="loss over what is scored", facecolor=CARD)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(config.picture, dpi=130, facecolor=CARD)


COMMANDS = {"pope": (write_pope, Pope), "table": (print_labs, LabTable),
            "draw": (draw_curves, LabCurves)}


def main(argv=None):
    run_command(COMMANDS, argv, __doc__)


if __name__ == "__main__":
    run_main(main)
