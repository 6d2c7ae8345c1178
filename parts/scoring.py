"""
The files of an evaluation, joined by id, and tables of scores with their intervals. No torch here.

    questions    JSON lines of question_id, image, text, category
    answers      JSON lines of question_id, prompt, text, as sample.py writes them
    reviews      JSON lines of question_id, category, content, tuple: what a judge said of answers

What does not belong together is a ValueError that counts and shows it, never a number.
"""
import math
import os
from collections import Counter

import numpy as np

from parts.client import ask_everything
from parts.files import PROMPTS, lock_folder, read_json, read_value, typed, typed_fields

# --------------------------------------------------------------------------------------------------
# Records found by id


def id_of(record, key, where):
    """An id as text: 7 and "7" are the same. Raises ValueError for what can be none."""
    typed(record, dict, where)
    name = record.get(key)
    if type(name) not in (int, str):
        raise ValueError(f"{where}: {key}, a whole number or text, is needed; found {name!r:.80}")
    return str(name)


def records_by_id(rows, path, key, **kinds):
    """{id: record} of the rows of a file, each with fields of these kinds.

    Raises ValueError for a record without them, an id that occurs twice, and an empty file.
    """
    records = {}
    for i, row in enumerate(rows):
        where = f"{path}[{i}]"
        name = id_of(row, key, where)
        if name in records:
            raise ValueError(f"{where}: the id {name} occurs more than once")
        records[name] = typed_fields(row, f"{where} ({key} {name})", **kinds)
    if not records:
        raise ValueError(f"{path}: it is empty")
    return records


def read_by_id(path, *fields, key="question_id"):
    """{id: record} of a JSON file whose records have a text in each of `fields`."""
    return records_by_id(read_json(path), path, key, **dict.fromkeys(fields, str))


def examples(items):
    """', e.g. 3, 4, 5', or nothing if there are none."""
    shown = ", ".join(map(str, items[:3]))
    return f", e.g. {shown}" if shown else ""


def check_ids(path, found, wanted, partial=False):
    """Raises ValueError unless a file answers what is wanted, as often, or `partial`: some of it.
    """
    asked = Counter(list(wanted))
    answered = Counter(list(found))
    missing = [] if partial else list(asked - answered)
    surplus = list(answered - asked)
    if missing or surplus:
        raise ValueError(
            f"{path}: of {asked.total():,} questions {len(missing):,} have no answer"
            f"{examples(missing)}; {len(surplus):,} are answered too often, or not asked"
            f"{examples(surplus)}. Are these the answers to these questions, all of them?")


def read_answers(path, questions):
    """{id: answer} of an answers file, exactly one to each of {id: question}.

    Raises ValueError for missing, doubled and foreign answers, and for answers to other questions
    under the same ids: two benches may use the same numbers.
    """
    answers = read_by_id(path, "text")
    check_ids(path, answers, questions)
    for i, answer in answers.items():
        asked = " ".join(questions[i]["text"].split())
        prompt = typed(answer.get("prompt", asked), str, f"{path}: prompt of {i}")
        prompt = " ".join(prompt.split())
        if asked not in prompt:
            raise ValueError(f"{path}: {i} answers another question than {asked!r:.80}, which is "
                             "asked under this id; take the files of one bench")
    return answers


# --------------------------------------------------------------------------------------------------
# LLaVA-Bench's files


def read_bench(config):
    """[(question, reference, answer, context), ...]: records joined by question_id and by image.

    Raises ValueError for what does not belong together: ids, pictures, answers to other questions.
    """
    questions = read_by_id(config.questions, "image", "text", "category")
    contexts = read_by_id(config.context, key="image")
    reference = read_answers(config.reference, questions)
    answers = read_answers(config.answers, questions)
    cases = []
    for i, question in questions.items():
        if question["image"] not in contexts:
            raise ValueError(f"{config.context}: nothing about {question['image']}, the picture of "
                             f"question {i}; the names must be equal")
        cases.append((question, reference[i], answers[i], contexts[question["image"]]))
    return cases


def read_rules(path, kinds, wild):
    """{category: {"role", "prompt"}}: our prompts, or those of a file like the official rule.json.

    kinds, wild    the kinds of questions, and what In-the-Wild's files write before them
    """
    rules = {}
    if path:
        for category, rule in read_value(path).items():
            typed_fields(rule, f"{path}: {category}", role=str, prompt=str)
            rules[category] = {"role": rule["role"], "prompt": rule["prompt"]}
        return rules
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
    ordered = []
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
        ordered.append({name: run[name] for name in first})
    return ordered


def check_tuples(path, run, most_failed):
    """Raises ValueError if a review has no two numbers, or if too many judgements failed.

    A score that was not asked for is a failure, too: its tuple becomes -1, -1. With a `most_failed`
    of 1, as in the published arithmetic, it stays as it is.
    """
    failed = []
    for name, review in run.items():
        where = f"{path}: tuple of {name}"
        scores = typed(review.get("tuple"), list, where)
        total = sum(typed(score, float, where) for score in scores)
        if len(scores) != 2 or not math.isfinite(total):
            raise ValueError(f"{where}: two numbers are needed, found {scores}")
        if min(scores) < 1 or max(scores) > 10:
            failed.append(name)
            if most_failed < 1:
                review["tuple"] = [-1, -1]
    told = f"{path}: {len(failed)} of {len(run)} judgements failed: {', '.join(failed)}"
    if len(failed) > most_failed * len(run):
        raise ValueError(
            f"{told}. Above {most_failed:.0%} there is no score. Their first line is not two "
            "numbers from 1 to 10 with one space between: read it, then take another judge or "
            "another --rule")
    if failed:
        print(told)


def judges_of(run):
    """The names of the judges of {id: review}, as text."""
    names = {str(review.get("judge", "not recorded")) for review in run.values()}
    return printable(" and ".join(sorted(names)))


def printable(text):
    """A text without halves of surrogate pairs, which no terminal prints."""
    return text.encode(errors="backslashreplace").decode()


def replies_for(requests, path, config):
    """The replies to all requests, {key: reply}; each is kept in PATH.raw and never paid twice."""
    raw = f"{path}.raw"
    if os.path.exists(path) and not os.path.exists(raw):
        raise ValueError(f"{path} was not written here and would be lost; name another file")
    with lock_folder(raw) as folder:
        return ask_everything(requests, folder / "raw.jsonl", config)


# --------------------------------------------------------------------------------------------------
# Tables of scores: {name: (right, n), a number, or None for what is undefined}


def percent(score):
    """100 right / n; what is no pair stays as it is."""
    if isinstance(score, tuple):
        return 100 * score[0] / score[1]
    return score


def wilson(right, n):
    """The 95% interval of an accuracy, in percent (Wilson's)."""
    z2 = 1.96 ** 2
    total = n + z2
    centre = right + z2 / 2
    half = math.sqrt(z2 * (right * (1 - right / n) + z2 / 4))
    low = max(0.0, centre - half)
    high = min(total, centre + half)
    return 100 * low / total, 100 * high / total


RELATIVE = ("relative score, %", "  95% interval (questions redrawn)", "  reference, mean x 10",
            "  answers, mean x 10", "  questions")


def relative_cells(found, runs, n):
    """Cells under RELATIVE of eval.py's statistics of n questions."""
    spread = f"±{found['relative_std']:.1f}" if runs > 1 else ""
    return (f"{found['relative']:.1f}{spread}",
            f"{found['relative_low']:.1f} to {found['relative_high']:.1f}",
            f"{found['reference']:.1f}", f"{found['candidate']:.1f}", str(n))


def bootstrap(scores, draws=10_000):
    """Between which two relative scores 95% lie if the questions are drawn anew, with replacement.

    scores    (runs, n, 2): the reference's and the answers'; 0 and 0 where a judgement failed
    """
    n = scores.shape[1]
    rng = np.random.default_rng(0)
    counts = rng.multinomial(n, np.full(n, 1 / n), draws)            # (draws, n)
    reference, answers = np.moveaxis(counts @ scores, 2, 0)          # (runs, draws) each
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = (answers / reference).mean(0)                       # (draws,)
    return 100 * np.nanpercentile(ratios, (2.5, 97.5))


def score_cells(score):
    """A score and its interval as text."""
    if score is None:
        return ["undefined", "-", "-"]
    if not isinstance(score, tuple):
        return [f"{score:.2f}", "-", "-"]
    low, high = wilson(*score)
    return [f"{percent(score):.2f}", f"{low:.2f}", f"{high:.2f}"]


def score_rows(name, scores, keys, published):
    """Rows of cells: our scores, their intervals, and the published ones under the same keys."""
    columns = [["ours", "low", "high"], *map(score_cells, scores.values())]
    rows = [[name, *scores], *zip(*columns, strict=True)]
    for model, values in published.items():
        known = dict(zip(keys, values.split(), strict=True))
        rows.append([model, *[known.get(key, "-") for key in scores]])
    return rows


def layout(rows):
    """Rows of cells as text; the first column is flush left, all others right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [cell.rjust(width) for cell, width in zip(row, widths, strict=True)]
        cells[0] = row[0].ljust(widths[0])
        lines.append("  ".join(cells))
    return printable("\n".join(lines))
