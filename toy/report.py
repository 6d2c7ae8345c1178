"""What the toy's runs have come to: accuracies, relative scores, tables beside the paper's.

    python -m toy.report report       --out out/toy            results.json and report.png
    python -m toy.report ablations    --out out/toy_ablations  Tables 4 and 8 in miniature
    python -m toy.report road         --out out/toy_ablations  the dissertation's Ch. 4
    python -m toy.report family       --out out/toy_family     LLaVA-1.5, 1.5-HD and NeXT
    python -m toy.report answer_first --data instruct.json --out turned.json

The first four read what runs/toy.sh, toy_ablations.sh, toy_road.sh and toy_family.sh leave behind;
the last one writes the data of the row "predict answer first" of Table 8.
"""
import json
import re
import textwrap
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from eval import relative_scores
from parts.files import read_json, read_lines, run_command, run_main, write_json, write_text
from parts.scoring import read_answers, read_by_id
from toy.teacher import JUDGE
from toy.vqa import WAYS, is_short, short_answer
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
TABLE_4_2 = {   # of the dissertation: GQA, MME, MM-Vet
    "row0": ("0 LLaVA", None, 809.6, 25.5),
    "row1": ("1 + short answers", 47.0, 1197.0, 27.7),
    "row2": ("2 + format prompt", 46.8, 1323.8, 26.3),
    "row3": ("3 + two layers", 47.3, 1355.2, 27.8),
    "row5": ("5 + regions", 50.3, 1426.5, 30.8),
    "row7": ("7 + relations (GQA)", 62.0, 1469.2, 30.7),
}
SHARES = {"tenth": 0.1, "half": 0.5, "full": 1.0}      # of the data: the dissertation's Fig. 4.4


# ------------------------------------------------------------------------------------------------
# One run


def score_answers(questions_file, answers_file, part=str):
    """({"all": percent, kind: percent, ...}, rows): exact matches of answers with the truth.

    `part` takes from both what has to match. Raises ValueError unless each question has one answer.
    """
    questions = read_by_id(questions_file, "text", "category", "truth")
    answers = read_answers(answers_file, questions)
    rows = []
    for name, question in questions.items():
        text = answers[name]["text"].strip()
        rows.append({**question, "answer": text, "right": part(text) == part(question["truth"])})
    return scores_by_kind(rows), rows


def scores_by_kind(rows):
    """{"all": percent, kind: percent, ...}"""
    scores = {"all": percent_right(rows)}
    for kind in KINDS:
        scores[kind] = percent_right([row for row in rows if row["category"] == kind])
    return scores


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
    figure = Figure(figsize=(13, 11.5), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(4, 1))
    for column, kind in zip(above.subplots(3, len(KINDS)).T, KINDS, strict=True):
        right = [row for row in rows if row["category"] == kind and row["right"]]
        wrong = [row for row in rows if row["category"] == kind and not row["right"]]
        shown = [*wrong[:1], *right]     # where some are wrong, one of the three is
        for axes, row in zip(column, shown, strict=False):
            draw_answer(axes, row, out / "world" / "images")
    for stage, axes in zip((1, 2), below.subplots(1, 2), strict=True):
        plot_loss(axes, out / f"stage{stage}", lw=0.8)
        axes.set(title=f"stage {stage}: training loss", xlabel="step")
    figure.suptitle(title)
    figure.savefig(out / "report.png", dpi=110)


def plot_loss(axes, run, **style):
    """The training loss of a run's folder, over its steps."""
    log = [row for row in read_lines(run / "log.jsonl") if "loss" in row]
    axes.semilogy([row["step"] for row in log], [row["loss"] for row in log], **style)


def draw_answer(axes, row, images):
    axes.imshow(Image.open(images / row["image"]), interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    verdict = "right" if row["right"] else f"wrong: {row['truth']}"
    lines = [textwrap.fill(text, 30) for text in (row["text"], row["answer"], verdict)]
    colour = "darkgreen" if row["right"] else "firebrick"
    axes.set_title("\n".join(lines), fontsize=8, color=colour)


@dataclass(frozen=True)
class Runs:
    out: str                             # folder of toy_family.sh, toy_ablations.sh or toy_road.sh


def print_family(config):
    """The systems on larger pictures: accuracies by kind of question."""
    out = Path(config.out)
    rows = []
    for answers in sorted(out.glob("held_out_*.jsonl")):
        scores, _ = score_answers(out / "world" / "questions_held_out.jsonl", answers)
        rows.append((answers.stem.removeprefix("held_out_"), *scores.values()))
    print_table("held-out questions, percent right", ("all", *KINDS), rows)


def print_table(title, columns, rows):
    """Rows of (name, cell, ...); an array over seeds is shown by mean and standard deviation."""
    print(f"\n{title}\n{'':40s}", *(f"{column:>14s}" for column in columns))
    for name, *cells in rows:
        print(f"{name:40s}", *(f"{cell_text(cell):>14s}" for cell in cells))


def cell_text(cell):
    if isinstance(cell, np.ndarray):
        return f"{cell.mean():.1f} ± {cell.std():.1f}"
    return "-" if cell is None else str(cell)


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


def seed_folders(out):
    """The folders of a run's seeds. Raises ValueError if they are too few for a spread."""
    seeds = sorted(Path(out).glob("seed*/"))
    if len(seeds) < 2:
        raise ValueError(f"{out}: a spread needs at least two folders seedN, found {len(seeds)}; "
                         "runs/toy_ablations.sh makes them")
    return seeds


def rows_made(table, seeds, name):
    """The part of a table whose file NAME.format(row) every seed has."""
    made = {}
    for row, values in table.items():
        if all((seed / name.format(row)).exists() for seed in seeds):
            made[row] = values
    return made


def bench_of(row, seeds):
    """(seeds, ASPECTS): a row's scores on the bench."""
    scores = [bench_scores(seed / f"reviews_{row}.jsonl") for seed in seeds]
    return np.array([list(of_seed.values()) for of_seed in scores])


def held_out_of(row, seeds, part=conclusion):
    """(seeds, 1 + kinds): a row's accuracy on all held-out questions, and on each kind.

    By default conclusions alone count, as in ScienceQA.
    """
    right = []
    for seed in seeds:
        questions = seed / "world" / "questions_held_out.jsonl"
        scores, _ = score_answers(questions, seed / f"held_out_{row}.jsonl", part)
        right.append(list(scores.values()))
    return np.array(right)


def print_ablations(config):
    """Tables 4 and 8 in miniature, mean and standard deviation over seeds, beside the paper's."""
    seeds = seed_folders(config.out)
    print(f"{len(seeds)} seeds; changes are from the first row")
    table = rows_made(TABLE_4, seeds, "reviews_{}.jsonl")
    ours = {row: bench_of(row, seeds) for row in table}
    columns = ("conversation", "detailed description", "complex reasoning", "all")
    for k, column in enumerate(columns):
        paper = {row: (name, values[k]) for row, (name, *values) in table.items()}
        title = f"Table 4 (data), {column}: relative scores, {JUDGE}; paper: LLaVA-Bench (COCO)"
        print_changes(title, paper, {row: ours[row][:, k] for row in table})

    table = rows_made(TABLE_8, seeds, "held_out_{}.jsonl")
    ours = {row: held_out_of(row, seeds) for row in table}
    relation = 1 + KINDS.index("relation")
    for k, column in ((0, "all questions"), (relation, "relations, the kind that reasons")):
        title = f"Table 8 (design), {column}: accuracy on held-out toy questions; paper: ScienceQA"
        print_changes(title, table, {row: ours[row][:, k] for row in table})


def print_changes(title, paper, ours):
    """Our scores and their change from the row "full", then the paper's.

    paper     {row: (name, score)}
    ours      {row: (seeds,)}
    """
    rows = []
    for row, (name, score) in paper.items():
        change = ours[row] - ours.get("full", np.nan)
        theirs = round(score - paper.get("full", (None, np.nan))[1], 2)
        verdict = "" if row == "full" else verdict_on(change, theirs)
        rows.append((name, ours[row], change, score, theirs, verdict))
    print_table(title, ("ours", "change", "paper's", "change", ""), rows)


def verdict_on(change, theirs):
    """What a row says of a change over seeds where its sign is not the paper's.

    A change is clear if it is beyond two standard errors over the seeds.
    """
    if abs(change.mean()) <= 2 * change.std(ddof=1) / len(change) ** 0.5:
        return "no clear change here"
    return "DISAGREES with the paper" if change.mean() * theirs < 0 else ""


# ------------------------------------------------------------------------------------------------
# Ch. 4 of the dissertation in miniature


def exam_scores(row, way, seeds):
    """A row's answers to questions asked in one way of toy.vqa, {what is counted: (seeds,)}.

    as asked     right, in the form that was asked for: a word, or the answer in full
    any form     right, in whatever form
    a word       answers that are a word or phrase, right or wrong
    relations, yes/no      the kinds of questions that stand in for GQA and MME, as asked
    """
    counted = []
    for seed in seeds:
        file = seed / f"exam_{way}-{row}.jsonl"
        scores, rows = score_answers(seed / "vqa" / f"exam_{way}.jsonl", file, short_answer)
        for row_asked in rows:
            row_asked["brief"] = is_short(row_asked["answer"])
            full = row_asked["answer"] == row_asked["truth"]
            row_asked["right"] &= row_asked["brief"] if way == "format" else full
        as_asked = scores_by_kind(rows)
        counted.append([as_asked["all"], scores["all"],
                        100 * np.mean([row_asked["brief"] for row_asked in rows]),
                        as_asked["relation"], as_asked["existence"]])
    names = ("as asked", "any form", "a word", "relations", "yes/no")
    return dict(zip(names, np.array(counted).T, strict=True))


def print_road(config):
    """The dissertation's Tables 4.1b, 4.2 and Fig. 4.4 in miniature; the types in equal shares."""
    seeds = seed_folders(config.out)
    rows = []
    for row, (name, *paper) in rows_made(TABLE_4_2, seeds, "exam_format-{}.jsonl").items():
        word = exam_scores(row, "format", seeds)
        full = exam_scores(row, "normal", seeds)
        ours = (word["relations"], word["yes/no"], word["as asked"], full["as asked"])
        rows.append((name, *ours, full["a word"], *paper))
    print_table(f"Table 4.2 of the dissertation, percent right over {len(seeds)} seeds, then how "
                "often a word comes where a sentence is due",
                ("relations", "yes/no", "a word", "in full", "a word for it", "GQA", "MME",
                 "MM-Vet"), rows)

    rows = []
    for way in WAYS:
        models = dict.fromkeys(("stage1", "full", "row1", "row2"))
        for model in rows_made(models, seeds, f"exam_{way}-{{}}.jsonl"):
            scores = exam_scores(model, way, seeds)
            rows.append((f"{model}, {way}", scores["any form"], scores["a word"]))
    print_table("Table 4.1b: answers that are right in whatever form, and that are a word",
                ("right", "a word"), rows)

    right = {row: held_out_of(row, seeds)[:, 0]
             for row in rows_made(SHARES, seeds, "held_out_{}.jsonl")}
    rows = [(f"{SHARES[row]} of the data", right[row], 100 * right[row] / right[list(right)[-1]])
            for row in right]
    print_table("Fig. 4.4: held-out accuracy, and in percent of the last one's",
                ("right", "of the last"), rows)
    if len(rows_made({"row0": 0, "uniform": 0}, seeds, "reviews_{}.jsonl")) == 2:
        print_types(seeds)


def print_types(seeds):
    """Sec. 4.2's "uniformly sampled": the three types as they come, and in equal shares."""
    as_is, equal = (np.hstack([bench_of(row, seeds), held_out_of(row, seeds)[:, :1]]).T
                    for row in ("row0", "uniform"))
    rows = zip((*ASPECTS, "held out"), as_is, equal, equal - as_is, strict=True)
    print_table("a tenth of the data: types as they come (58 : 23 : 77), and in equal shares",
                ("as they come", "equal shares", "change"), rows)


COMMANDS = {
    "report": (write_report, Report),
    "ablations": (print_ablations, Runs),
    "road": (print_road, Runs),
    "family": (print_family, Runs),
    "answer_first": (turn_answers, AnswerFirst),
}


def main(argv=None):
    run_command(COMMANDS, argv, __doc__)


if __name__ == "__main__":
    run_main(main)
