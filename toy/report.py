"""What the toy's runs have come to: accuracies, relative scores, tables beside the paper's.

    python -m toy.report report       --out out/toy            results.json and report.png
    python -m toy.report ablations    --out out/toy_ablations  Tables 4 and 8 in miniature
    python -m toy.report family       --out out/toy_family     LLaVA-1.5, 1.5-HD and NeXT
    python -m toy.report answer_first --data instruct.json --out turned.json

The first three read what runs/toy.sh, runs/toy_ablations.sh and runs/toy_family.sh leave behind;
the last one writes the data of the row "predict answer first" of Table 8.
"""
import json
import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from eval import relative_scores
from parts.files import read_json, read_lines, run_command, run_main, write_json, write_text
from toy.teacher import JUDGE
from toy.world import KINDS

SPLITS = ("held_out", "new_pairs", "blind", "shuffled")
ASPECTS = ("conv", "detail", "complex", "all")   # of the bench
TABLE_4 = {     # LLaVA-Bench (COCO), relative scores; the others are compared with the first row
    "full": ("full data", 83.1, 75.3, 96.5, 85.1),
    "detail_complex": ("detail + complex", 81.5, 73.3, 90.8, 81.9),
    "conversation_few": ("conversation + 5% detail + 10% complex", 81.0, 68.4, 91.5, 80.5),
    "conversation": ("conversation", 76.5, 59.8, 84.9, 73.8),
    "stage1": ("no instruction tuning", 22.0, 24.0, 18.5, 21.5),
}
TABLE_8 = {     # ScienceQA, accuracy
    "full": ("best variant", 90.92),
    "last_layer": ("features of the last layer", 89.96),
    "answer_first": ("predict answer first", 89.77),
    "scratch": ("training from scratch: no stage 1", 85.81),
    "small": ("smaller language model", 89.84),
}


# ------------------------------------------------------------------------------------------------
# One run


def score_answers(questions_file, answers_file, part=str):
    """({"all": percent, kind: percent, ...}, rows): exact matches of answers with the truth.

    `part` takes from both what has to match. Raises ValueError if answers are missing, or too many.
    """
    questions = read_lines(questions_file)
    answers = read_lines(answers_file)
    texts = {answer["question_id"]: answer["text"].strip() for answer in answers}
    missing = [row["question_id"] for row in questions if row["question_id"] not in texts]
    if missing or len(answers) > len(questions):
        raise ValueError(f"{answers_file}: {len(answers)} answers to the {len(questions)} "
                         f"questions of {questions_file}, {len(missing)} have none; run sample.py "
                         "on that file again")
    rows = []
    for question in questions:
        text = texts[question["question_id"]]
        rows.append({**question, "answer": text, "right": part(text) == part(question["truth"])})
    scores = {"all": percent_right(rows)}
    for kind in KINDS:
        scores[kind] = percent_right([row for row in rows if row["category"] == kind])
    return scores, rows


def percent_right(rows):
    return round(100 * sum(row["right"] for row in rows) / len(rows), 1)


def bench_scores(reviews):
    """Relative scores on the toy's LLaVA-Bench: those of three types, and of all questions."""
    scores, _ = relative_scores([str(reviews)])
    return {aspect: round(scores[f"{aspect}.relative"], 1) for aspect in ASPECTS}


def in_line(scores):
    return "  ".join(f"{name} {score:5.1f}" for name, score in scores.items())


@dataclass(frozen=True)
class Report:
    out: str                             # folder of runs/toy.sh
    minutes: list[str] = ()              # PHASE=MINUTES ..., copied into results.json


def write_report(config):
    """Accuracies and the bench's scores -> results.json; pictures and loss curves -> report.png."""
    out = Path(config.out)
    results = {}
    rows = {}
    for split in SPLITS:
        questions = out / "world" / f"questions_{split}.jsonl"
        results[split], rows[split] = score_answers(questions, out / f"answers_{split}.jsonl")
        print(f"{split:10s} {in_line(results[split])}")
    results["bench"] = bench_scores(out / "reviews.jsonl")
    print(f"bench      {in_line(results['bench'])}  (relative to the scripted teacher; {JUDGE})")
    minutes = [pair.split("=") for pair in config.minutes]
    results["minutes"] = {phase: float(minute) for phase, minute in minutes}
    write_json(out / "results.json", results)
    title = "   ".join(f"{split.replace('_', ' ')} {results[split]['all']} %" for split in SPLITS)
    draw_report(out, rows["held_out"], title)
    print(f"wrote {out / 'results.json'} and {out / 'report.png'}")


def draw_report(out, rows, title):
    """report.png: three questions of each kind with their answers, and both stages' loss curves."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure = plt.figure(figsize=(13, 11.5), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(4, 1))
    for column, kind in zip(above.subplots(3, len(KINDS)).T, KINDS, strict=True):
        right = [row for row in rows if row["category"] == kind and row["right"]]
        wrong = [row for row in rows if row["category"] == kind and not row["right"]]
        shown = wrong[:1] + right[:2]    # where some are wrong, one of the three is
        if not wrong:
            shown = right[:3]
        for axes, row in zip(column, shown, strict=False):
            draw_answer(axes, row, out / "world" / "images")
    for stage, axes in zip((1, 2), below.subplots(1, 2), strict=True):
        log = [row for row in read_lines(out / f"stage{stage}" / "log.jsonl") if "loss" in row]
        axes.semilogy([row["step"] for row in log], [row["loss"] for row in log], lw=0.8)
        axes.set(title=f"stage {stage}: training loss", xlabel="step")
    figure.suptitle(title)
    figure.savefig(out / "report.png", dpi=110)


def draw_answer(axes, row, images):
    axes.imshow(Image.open(images / row["image"]), interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    verdict = "right" if row["right"] else f"wrong: {row['truth']}"
    lines = [textwrap.fill(text, 30) for text in (row["text"], row["answer"], verdict)]
    colour = "darkgreen" if row["right"] else "firebrick"
    axes.set_title("\n".join(lines), fontsize=8, color=colour)


@dataclass(frozen=True)
class Runs:
    out: str                             # folder of runs/toy_family.sh or runs/toy_ablations.sh


def print_family(config):
    """The systems on larger pictures: accuracies by kind of question."""
    out = Path(config.out)
    answers = {path.stem.removeprefix("held_out_"): path for path in out.glob("held_out_*.jsonl")}
    for system in sorted(answers):
        scores, _ = score_answers(out / "world" / "questions_held_out.jsonl", answers[system])
        print(f"{system:10s} {in_line(scores)}")


# ------------------------------------------------------------------------------------------------
# The paper's ablations in miniature


def conclusion_first(text):
    """The conclusion before what it rests on.

    "A is in row 1 and B in row 2, so it is above." -> "It is above. A is in row 1 and B in row 2."
    """
    parts = re.split(r", so |\. So |\. (?=Taking )", text.rstrip("."))
    if len(parts) != 2:
        return text
    reason, verdict = (part[0].upper() + part[1:] for part in parts)
    return f"{verdict}. {reason}."


def conclusion(text):
    return conclusion_first(text).split(". ")[0].rstrip(".")


@dataclass(frozen=True)
class AnswerFirst:
    data: str                            # LLaVA-format JSON
    out: str                             # the same, with every conclusion first


def turn_answers(config):
    """Write a copy of the data in which every answer begins with its conclusion (Table 8)."""
    records = list(read_json(config.data))
    for record in records:
        for turn in record["conversations"]:
            if turn["from"] == "gpt":
                turn["value"] = conclusion_first(turn["value"])
    write_text(config.out, json.dumps(records))


def print_ablations(config):
    """Tables 4 and 8 in miniature, mean and standard deviation over seeds, beside the paper's."""
    seeds = sorted(Path(config.out).glob("seed*/"))
    if len(seeds) < 2:
        raise ValueError(f"{config.out}: a spread needs at least two folders seedN, found "
                         f"{len(seeds)}; runs/toy_ablations.sh makes them")
    print(f"\nTable 4 (data), relative scores on the toy's bench, {JUDGE}, {len(seeds)} seeds; "
          "paper: LLaVA-Bench (COCO)")
    ours = {}
    for row in TABLE_4:
        reviews = [bench_scores(seed / f"reviews_{row}.jsonl") for seed in seeds]
        ours[row] = np.array([list(review.values()) for review in reviews])
    columns = ("conversation", "detailed description", "complex reasoning", "all")
    for k, column in enumerate(columns):
        paper = {row: (name, values[k]) for row, (name, *values) in TABLE_4.items()}
        print_column(column, paper, {row: ours[row][:, k] for row in TABLE_4}, 1)

    print(f"\nTable 8 (design), accuracy on held-out toy questions, {len(seeds)} seeds; "
          "paper: ScienceQA")
    right = {row: [] for row in TABLE_8}
    for row in TABLE_8:                  # conclusions alone count, as in ScienceQA
        for seed in seeds:
            questions = seed / "world" / "questions_held_out.jsonl"
            answers = seed / f"held_out_{row}.jsonl"
            scores, _ = score_answers(questions, answers, conclusion)
            right[row].append([scores["all"], scores["relation"]])
    for k, column in enumerate(("all questions", "relations, the kind that reasons")):
        print_column(column, TABLE_8, {row: np.array(right[row])[:, k] for row in TABLE_8}, 2)


def print_column(column, paper, ours, digits):
    """One column of a table: our scores and their change from the first row, then the paper's.

    paper     {row: (name, score)}
    ours      {row: (seeds,)}
    """
    print(f"\n{column:40s}         ours           change   paper  change")
    for row, (name, score) in paper.items():
        line = f"{name:40s} {ours[row].mean():5.1f} ± {ours[row].std():4.1f}"
        if row == "full":
            print(f"{line}                   {score:6.{digits}f}")
            continue
        change = ours[row] - ours["full"]
        theirs = score - paper["full"][1]
        print(f"{line}   {change.mean():+6.1f} ± {change.std():4.1f}   {score:6.{digits}f}  "
              f"{theirs:+6.{digits}f}  {verdict_on(change, theirs)}".rstrip())


def verdict_on(change, theirs):
    """What a row says of a change over seeds beside the paper's, where they are not alike.

    A change is clear if it is beyond two standard errors over the seeds.
    """
    if abs(change.mean()) <= 2 * change.std(ddof=1) / len(change) ** 0.5:
        return "no clear change here"
    ratio = change.mean() / theirs
    if ratio < 0:
        return "DISAGREES with the paper"
    if ratio > 3:
        return f"{ratio:.0f} times the paper's"
    return "less than a third of the paper's" if ratio < 1 / 3 else ""


COMMANDS = {
    "report": (write_report, Report),
    "ablations": (print_ablations, Runs),
    "family": (print_family, Runs),
    "answer_first": (turn_answers, AnswerFirst),
}


def main(argv=None):
    run_command(COMMANDS, argv, __doc__)


if __name__ == "__main__":
    run_main(main)
