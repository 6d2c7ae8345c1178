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
from PIL import Image

from eval import relative_scores
from parts.files import read_json, read_lines, run_command, run_main, write_json, write_text
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
    out: str                             # folder of toy_family.sh, toy_ablations.sh or toy_road.sh


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


def held_out_of(row, seeds):
    """(seeds, 2): a row's accuracy on all held-out questions, and on relations.

    Conclusions alone count, as in ScienceQA.
    """
    right = []
    for seed in seeds:
        questions = seed / "world" / "questions_held_out.jsonl"
        scores, _ = score_answers(questions, seed / f"held_out_{row}.jsonl", conclusion)
        right.append([scores["all"], scores["relation"]])
    return np.array(right)


def print_ablations(config):
    """Tables 4 and 8 in miniature, mean and standard deviation over seeds, beside the paper's."""
    seeds = seed_folders(config.out)
    print(f"\nTable 4 (data), relative scores on the toy's bench, {JUDGE}, {len(seeds)} seeds; "
          "paper: LLaVA-Bench (COCO)")
    table = rows_made(TABLE_4, seeds, "reviews_{}.jsonl")
    ours = {row: bench_of(row, seeds) for row in table}
    columns = ("conversation", "detailed description", "complex reasoning", "all")
    for k, column in enumerate(columns):
        paper = {row: (name, values[k]) for row, (name, *values) in table.items()}
        print_column(column, paper, {row: ours[row][:, k] for row in table}, 1)

    print(f"\nTable 8 (design), accuracy on held-out toy questions, {len(seeds)} seeds; "
          "paper: ScienceQA")
    table = rows_made(TABLE_8, seeds, "held_out_{}.jsonl")
    ours = {row: held_out_of(row, seeds) for row in table}
    for k, column in enumerate(("all questions", "relations, the kind that reasons")):
        print_column(column, table, {row: ours[row][:, k] for row in table}, 2)


def print_column(column, paper, ours, digits):
    """One column of a table: our scores and their change from the row "full", then the paper's.

    paper     {row: (name, score)}
    ours      {row: (seeds,)}
    """
    if "full" not in ours:
        return
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


# ------------------------------------------------------------------------------------------------
# Ch. 4 of the dissertation in miniature


def in_spread(values):
    return f"{values.mean():5.1f} ± {values.std():4.1f}"


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
        short = [is_short(asked["answer"]) for asked in rows]
        for asked, brief in zip(rows, short, strict=True):
            in_form = brief if way == "format" else asked["answer"] == asked["truth"]
            asked["right"] = asked["right"] and in_form
        of_kind = {kind: percent_right([asked for asked in rows if asked["category"] == kind])
                   for kind in ("relation", "existence")}
        counted.append([percent_right(rows), scores["all"], 100 * np.mean(short),
                        of_kind["relation"], of_kind["existence"]])
    names = ("as asked", "any form", "a word", "relations", "yes/no")
    return dict(zip(names, np.array(counted).T, strict=True))


def print_road(config):
    """The dissertation's Tables 4.1b, 4.2 and Fig. 4.4 in miniature; the types in equal shares."""
    seeds = seed_folders(config.out)
    print(f"\nTable 4.2 of the dissertation, percent right over {len(seeds)} seeds; its GQA, MME, "
          f"MM-Vet\n{'':36s} relations      yes/no         a word         in full        "
          "words where a sentence is due")
    for row, (name, *paper) in rows_made(TABLE_4_2, seeds, "exam_format-{}.jsonl").items():
        word = exam_scores(row, "format", seeds)
        full = exam_scores(row, "normal", seeds)
        ours = (word["relations"], word["yes/no"], word["as asked"], full["as asked"],
                full["a word"])
        print(f"{name:36s}", *map(in_spread, ours), *paper, sep="  ")

    print("\nTable 4.1b: how many answers are right, in whatever form; how many are a word")
    models = dict.fromkeys(("stage1", "full", "row1", "row2"))
    for way in WAYS:
        for model in rows_made(models, seeds, f"exam_{way}-{{}}.jsonl"):
            scores = exam_scores(model, way, seeds)
            print(f"{model:8s} {way:10s} right {in_spread(scores['any form'])}  "
                  f"a word {in_spread(scores['a word'])}")

    print("\nFig. 4.4: share of the data, held-out accuracy, and that in percent of the last one")
    shares = rows_made(SHARES, seeds, "held_out_{}.jsonl")
    right = {row: held_out_of(row, seeds)[:, 0] for row in shares}
    for row, share in shares.items():
        most = right[list(shares)[-1]]
        print(f"{share:4.1f}  {in_spread(right[row])}   {in_spread(100 * right[row] / most)}")

    if len(rows_made({"row0": 0, "uniform": 0}, seeds, "reviews_{}.jsonl")) == 2:
        print_types(seeds)


def print_types(seeds):
    """Sec. 4.2's "uniformly sampled": the three types as they come, and in equal shares."""
    print("\na tenth of the data: types as they come (58 : 23 : 77), in equal shares, the change")
    as_is, equal = (np.hstack([bench_of(row, seeds), held_out_of(row, seeds)[:, :1]])
                    for row in ("row0", "uniform"))
    for k, name in enumerate((*ASPECTS, "held out")):
        columns = (as_is[:, k], equal[:, k], equal[:, k] - as_is[:, k])
        print(f"{name:10s}", *map(in_spread, columns), sep="   ")


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
