"""
The files of an evaluation, joined by id, and tables of scores with their intervals. No torch here.

    questions    JSON lines of question_id, image, text, category
    answers      JSON lines of question_id, prompt, text, as sample.py writes them
    reviews      JSON lines of question_id, category, content, tuple: what a judge said of answers

What does not belong together is a ValueError that counts and shows it, never a number.
"""
import json
import math
import os
from pathlib import Path

import numpy as np

from parts.client import ask_everything
from parts.files import PROMPTS, lock_folder, read_json

# --------------------------------------------------------------------------------------------------
# Records found by id


def read_by_id(path, *fields, key="question_id"):
    """{id: record} of a JSON file whose records have a text in each of `fields`.

    Raises ValueError for a record without them, an id that occurs twice, and an empty file.
    """
    records = {}
    for number, record in enumerate(read_json(path)):
        found = record if isinstance(record, dict) else {}
        texts = [found.get(field) for field in fields]
        if key not in found or not all(isinstance(text, str) for text in texts):
            needed = " and ".join((key, *fields))
            raise ValueError(f"{path}[{number}]: {needed} are needed, found {str(record)[:100]}")
        name = str(found[key])           # 7 and "7" are the same id
        if name in records:
            raise ValueError(f"{path}[{number}]: the id {name} occurs more than once")
        records[name] = found
    if not records:
        raise ValueError(f"{path}: it is empty")
    return records


def read_object(path):
    """One JSON object; ValueError for a name that occurs twice in it, where the last would win."""
    def distinct(pairs):
        names = [name for name, _ in pairs]
        if len(set(names)) < len(names):
            twice = [name for name in names if names.count(name) > 1]
            raise ValueError(f"the name {twice[0]!r} occurs more than once in one object")
        return dict(pairs)

    try:
        value = json.loads(Path(path).read_text(encoding="utf-8-sig"), object_pairs_hook=distinct)
    except ValueError as error:
        raise ValueError(f"{path}: not one JSON object: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path}: not one JSON object, but a {type(value).__name__}")
    return value


def examples(items):
    """', e.g. 3, 4, 5', or nothing if there are none."""
    shown = ", ".join(str(item) for item in items[:3])
    return f", e.g. {shown}" if shown else ""


def check_ids(path, found, wanted, partial=False):
    """Raises ValueError unless a file has exactly the ids that are wanted, or `partial` ones."""
    missing = [i for i in wanted if i not in found and not partial]
    foreign = [i for i in found if i not in wanted]
    if missing or foreign:
        raise ValueError(
            f"{path}: of {len(wanted):,} questions {len(missing):,} have no answer"
            f"{examples(missing)}; {len(foreign):,} are answered but not asked{examples(foreign)}. "
            "Are these the answers to these questions, all of them?")


# --------------------------------------------------------------------------------------------------
# LLaVA-Bench's files


def read_bench(config):
    """[(question, reference, answer, context), ...]: records joined by question_id and by image.

    Raises ValueError for what does not belong together: ids, pictures, answers to other questions.
    """
    questions = read_by_id(config.questions, "image", "text", "category")
    contexts = read_by_id(config.context, key="image")
    reference = read_by_id(config.reference, "text")
    answers = read_by_id(config.answers, "text")
    for path, records in ((config.reference, reference), (config.answers, answers)):
        check_ids(path, records, questions)
        for i, record in records.items():      # two benches may use the same numbers
            asked = " ".join(questions[i]["text"].split())
            if asked not in " ".join(record.get("prompt", asked).split()):
                raise ValueError(f"{path}: {i} answers another question than {config.questions} "
                                 "asks under this id; take the files of one bench")
    for i, question in questions.items():
        if question["image"] not in contexts:
            raise ValueError(f"{config.context}: nothing about {question['image']}, the picture of "
                             f"question {i}; the names must be equal")
    return [(question, reference[i], answers[i], contexts[question["image"]])
            for i, question in questions.items()]


def read_rules(path, kinds, wild):
    """{category: {"role", "prompt"}}: our prompts, or those of a file like the official rule.json.

    kinds, wild    the kinds of questions, and what In-the-Wild's files write before them
    """
    if path:
        rules = read_object(path)
        for category, rule in rules.items():
            if not isinstance(rule, dict) or not rule.keys() >= {"role", "prompt"}:
                raise ValueError(f"{path}: {category} needs role and prompt, found {rule}")
        return rules
    rules = {}
    for bench, name in (("", "captions_boxes.txt"), (wild, "caption.txt")):
        prompt = (PROMPTS / "judge" / name).read_text().strip()
        for kind in kinds:
            rules[bench + kind] = {"role": "Assistant", "prompt": prompt}
    return rules


def read_runs(files, most_failed):
    """[{id: review}, ...] of review files: the same questions and the same judge, one file a run.

    Raises ValueError if that is not so, if a review's `tuple` is not two finite numbers, or if more
    than a share of `most_failed` of a run's judgements failed; failed ones have -1, and are named.
    """
    if len(set(map(os.path.realpath, files))) < len(files):
        raise ValueError(f"{' '.join(files)}: a file is named more than once; each run is one file")
    runs = [read_by_id(path, "category") for path in files]
    first = runs[0]
    benches = {review["category"].rpartition("_")[0] for review in first.values()}
    if len(benches) > 1:
        raise ValueError(f"{files[0]}: reviews of more than one bench; COCO and In-the-Wild are "
                         "scored apart")
    for path, run in zip(files, runs, strict=True):
        check_ids(path, run, first)
        for name, review in run.items():
            if review["category"] != first[name]["category"]:
                raise ValueError(f"{path}: {name}: another category than in {files[0]}")
        if judges_of(run) != judges_of(first):
            raise ValueError(
                f"{files[0]} and {path} are by different judges, which have no common mean; score "
                "them apart, or compare them: python -m extras.judges calibrate")
        check_tuples(path, run, most_failed)
    return [{name: run[name] for name in first} for run in runs]


def check_tuples(path, run, most_failed):
    """Raises ValueError if a review has no two numbers, or if too many judgements failed."""
    failed = []
    for name, review in run.items():
        scores = review.get("tuple")
        if not is_pair(scores):
            raise ValueError(f"{path}: {name}: tuple is not two numbers but {scores}")
        if min(scores) < 0:
            failed.append(name)
    if not failed:
        return
    told = f"{path}: {len(failed)} of {len(run)} judgements failed: {', '.join(failed)}"
    if len(failed) > most_failed * len(run):
        raise ValueError(
            f"{told}. Above {most_failed:.0%} there is no score. Their first line is not two "
            "numbers with one space between: read it, then take another judge or another --rule")
    print(told)


def is_pair(value):
    """Whether a value is two finite numbers."""
    if not isinstance(value, list) or len(value) != 2:
        return False
    return all(isinstance(number, int | float) and math.isfinite(number) for number in value)


def ask_judge(requests, path, config):
    """The replies to all requests, {key: reply}; each is kept in PATH.raw and never paid twice."""
    if os.path.exists(path) and not os.path.exists(f"{path}.raw"):
        raise ValueError(f"{path} was not written here and would be lost; name another file")
    with lock_folder(f"{path}.raw") as folder:
        return ask_everything(requests, folder / "raw.jsonl", config)


def judges_of(run):
    """The names of the judges of {id: review}, as text."""
    names = {review.get("judge") for review in run.values()} - {None}
    return " and ".join(sorted(names)) or "not recorded"


# --------------------------------------------------------------------------------------------------
# Tables of scores: {name: (right, n), a number, or None for what is undefined}


def percent(score):
    """100 right / n; what is no pair stays as it is."""
    if isinstance(score, tuple):
        return 100 * score[0] / score[1]
    return score


def wilson(right, n, z=1.96):
    """The 95% interval of an accuracy, in percent (Wilson's)."""
    p = right / n
    centre = (right + z * z / 2) / (n + z * z)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return 100 * max(0.0, centre - half), 100 * min(1.0, centre + half)


def bootstrap(scores, draws=10_000):
    """Between which two relative scores 95% lie if the questions are drawn anew, with replacement.

    scores    (runs, n, 2): the reference's and the answers'; 0 and 0 where a judgement failed
    """
    n = scores.shape[1]
    counts = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), draws)        # (draws, n)
    sums = counts @ scores                                           # (runs, draws, 2)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = (sums[..., 1] / sums[..., 0]).mean(0)               # (draws,)
    low, high = np.nanpercentile(ratios, (2.5, 97.5))
    return 100 * low, 100 * high


def score_rows(name, scores, keys=(), published=None):
    """Rows of cells: our scores, their intervals, and the published ones under the same keys."""
    ours = []
    low = []
    high = []
    for score in scores.values():
        ours.append("undefined" if score is None else f"{percent(score):.2f}")
        bounds = ["-", "-"]
        if isinstance(score, tuple):
            bounds = [f"{bound:.2f}" for bound in wilson(*score)]
        low.append(bounds[0])
        high.append(bounds[1])
    rows = [[name, *scores],
            ["ours", *ours],
            ["low", *low],
            ["high", *high]]
    for model, values in (published or {}).items():
        known = dict(zip(keys, values.split(), strict=True))
        rows.append([model, *[known.get(key, "-") for key in scores]])
    return rows


def layout(rows):
    """Rows of cells as text; the first column is flush left, all others right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for first, *others in rows:
        cells = [cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *cells]))
    return "\n".join(lines)
