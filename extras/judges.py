"""
More of judges: MM-Vet, one judge beside another, both orders of the answers, and a page to read.

    python -m extras.judges grade_mm_vet --labels mm-vet.json --answers a.jsonl --grades g.json
    python -m extras.judges score mm_vet --grades g.json --labels mm-vet.json
    python -m extras.judges calibrate --reviews r.jsonl --against theirs.jsonl
    python -m extras.judges swap --reviews r.jsonl --swapped s.jsonl --questions q.jsonl ...
    python -m extras.judges html --reviews r.jsonl --page r.html --questions q.jsonl ...

MM-Vet has 218 questions, graded from 0 to 1 (Diss. Sec. 4.4). OURS is all else: the paper's judge
is gone, so a new one should first be held against its reviews.
"""
import html
import re
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from eval import (
    KINDS,
    MOST_FAILED,
    WILD,
    Review,
    parse_scores,
    read_cases,
    relative_score,
    review_request,
)
from parts.client import Endpoint, Request, is_preview, request_body
from parts.files import (
    PROMPTS,
    check_least,
    read_text,
    read_value,
    run_command,
    run_main,
    typed,
    typed_fields,
    write_json,
    write_lines,
    write_text,
)
from parts.replies import content_of
from parts.scoring import (
    check_ids,
    examples,
    judges_of,
    layout,
    read_by_id,
    read_runs,
    replies_for,
)

# --------------------------------------------------------------------------------------------------
# MM-Vet

CAPABILITIES = ("rec", "ocr", "know", "gen", "spat", "math")
MM_VET = {"LLaVA-1.5-7B": "31.1", "LLaVA-1.5-13B": "36.1"}       # totals, as published
TRIES = 5                                # OFFICIAL: a reply that is no grade is asked for again
PLEASE = "\nPredict the correctness of the answer (digit): "     # OFFICIAL: behind the first try


@dataclass(frozen=True, kw_only=True)
class GradeMMVet(Endpoint):
    labels: str                          # mm-vet.json: {id: {question, answer, capability, ...}}
    answers: str                         # {id: text}, or JSON lines, where 7 stands for v1_7
    grades: str                          # JSON to write; the raw replies lie in GRADES.raw
    judge_model: str = "gpt-4"
    runs: int = 1                        # times that each answer is graded
    prompt: str = str(PROMPTS / "judge" / "mm_vet.txt")      # instructions and examples; ours
    temperature: float = 0.0             # OFFICIAL: as max_tokens
    max_tokens: int = 3

    def __post_init__(self):
        super().__post_init__()
        check_least(self, runs=1)

    @property
    def model(self):                     # the client's name for it
        return self.judge_model


def parse_grade(content):
    """A grade from 0 to 1, or None: the first word, or the only number of the first line (OURS)."""
    line = content.strip().split("\n")[0]
    numbers = re.findall(r"-?\d*\.?\d+%?", line)
    for text in (line.split(" ")[0], numbers[0] if len(numbers) == 1 else ""):
        try:
            grade = float(text)
        except ValueError:
            continue
        return grade if 0 <= grade <= 1 else None
    return None


def is_no_grade(reply):
    """Whether to ask again; not for what --max_tokens cut off, which would be cut off again."""
    was_cut = reply["choices"][0].get("finish_reason") == "length"
    return parse_grade(content_of(reply)) is None and not was_cut


def read_mm_vet(path):
    """{id: label} of mm-vet.json, or of its folder."""
    if Path(path).is_dir():
        path = Path(path, "mm-vet.json")
    labels = read_value(path)
    for name, label in labels.items():
        typed_fields(label, f"{path}: {name}", question=str, answer=str, capability=list)
    return labels


def read_mm_vet_answers(path, labels):
    """{id: text} of an answers file, one to each label."""
    if path.endswith(".jsonl"):
        rows = read_by_id(path, "text")
        answers = {f"v1_{name}" if name.isdigit() else name: row["text"]
                   for name, row in rows.items()}
    else:
        answers = read_value(path)
    check_ids(path, answers, labels)
    return {name: typed(text, str, f"{path}: {name}") for name, text in answers.items()}


def grade_request(config, label, answer, name, attempt):
    """One grading; a later attempt asks for a digit, and is hotter."""
    truth = label["answer"].replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
    prompt = read_text(config.prompt).strip()
    text = f"{prompt}\n{label['question']} | {truth} | {answer} | "
    if attempt > 0:
        text += PLEASE
    hotter = replace(config, temperature=config.temperature + 0.5 * attempt)
    messages = [{"role": "user", "content": text}]
    return Request(f"{name}-try{attempt}", "mm_vet", request_body(hotter, messages))


def grade_mm_vet(config):
    """A judge grades MM-Vet answers. Started again, it resumes."""
    labels = read_mm_vet(config.labels)
    answers = read_mm_vet_answers(config.answers, labels)
    left = [(name, run) for name in labels for run in range(config.runs)]
    replies = {}
    for attempt in range(TRIES):
        requests = {}
        for name, run in left:
            requests[name, run] = grade_request(config, labels[name], answers[name],
                                                f"{name}-run{run}", attempt)
        if attempt == 0 and is_preview(list(requests.values()), config):
            return
        found = replies_for(list(requests.values()), config.grades, config)
        replies |= {pair: found[request.key] for pair, request in requests.items()}
        left = [pair for pair in left if is_no_grade(replies[pair])]
        if not left:
            break
    grades = {}
    for name in labels:
        given = [replies[name, run] for run in range(config.runs)]
        contents = [content_of(reply) for reply in given]
        grades[name] = {"model": [reply.get("model") or config.judge_model for reply in given],
                        "content": contents,
                        "score": [parse_grade(content) or 0.0 for content in contents],
                        "date": [reply["date"] for reply in given]}
    write_json(config.grades, grades)
    print(mm_vet_scores(config.grades, config.labels)[1])


@dataclass(frozen=True)
class MMVet:
    grades: str                          # {id: {model, content, score}}, one entry a run
    labels: str = None                   # mm-vet.json or its folder, for the capabilities
    json: str = None                     # a file for the unrounded numbers


def read_grades(path):
    """((runs, questions) numbers from 0 to 1, {id: record} that they are from, failed gradings).

    Raises ValueError if that is not so, or if more than a share of MOST_FAILED failed.
    """
    grades = read_value(path)
    rows = []
    failed = []
    for name, row in grades.items():
        where = f"{path}: {name}"
        scores = typed_fields(row, where, score=list)["score"]
        rows.append([typed(score, float, where) for score in scores])
        if not scores or len(scores) != len(rows[0]) or not all(0 <= x <= 1 for x in scores):
            raise ValueError(f"{where}: a score from 0 to 1 is needed for each of "
                             f"{len(rows[0])} runs, found {scores}; grade it again")
        for text in typed(row.get("content", []), list, where):
            if parse_grade(typed(text, str, where)) is None:
                failed.append(name)
    scores = np.array(rows, float).T
    if not rows or len(failed) > MOST_FAILED * scores.size:
        raise ValueError(f"{path}: {len(failed)} of {scores.size} gradings have no number"
                         f"{examples(failed)}. Above {MOST_FAILED:.0%}, or without any grade, "
                         "there is no score: raise --max_tokens if they were cut off, or take "
                         "another judge")
    return scores, grades, len(failed)


def mm_vet_scores(path, labels=None):
    """Grades -> ({"total": 36.1, ...}, the table as text).

    A run's score is 100 x the mean grade, of all questions or of those that need a capability; over
    runs the mean and the population standard deviation. No number counts as 0.0, as published.
    """
    scores, grades, failed = read_grades(path)               # (runs, questions)
    groups = {}
    if labels:
        needs = read_mm_vet(labels)
        check_ids(path, grades, needs)
        for capability in CAPABILITIES:
            groups[capability] = [capability in needs[name]["capability"] for name in grades]
    groups["total"] = [True] * len(grades)
    numbers = {"failed": failed}
    columns = [["", "score", "  questions"]]
    for name, is_part in groups.items():
        if any(is_part):
            runs = 100 * scores[:, is_part].mean(1)
            numbers[name] = runs.mean()
            spread = f" ± {runs.std():.1f}" if len(runs) > 1 else ""
            columns.append([name, f"{runs.mean():.1f}{spread}", str(sum(is_part))])
            numbers["total_std"] = runs.std()
    published = ", ".join(f"{model} {total}" for model, total in MM_VET.items())
    text = (f"MM-Vet, {len(grades)} questions (the benchmark has 218), runs: {len(scores)}\n"
            f"{layout(list(zip(*columns, strict=True)))}\npublished totals: {published}\n"
            f"graded 0.0 because no number came: {failed}")
    return numbers, text


def score_mm_vet(config):
    """Scores of a grades file."""
    print_numbers(*mm_vet_scores(config.grades, config.labels), config.json)


def print_numbers(numbers, text, path):
    print(text)
    if path:
        write_json(path, {name: float(value) for name, value in numbers.items()})


# --------------------------------------------------------------------------------------------------
# One judge beside another


@dataclass(frozen=True)
class Calibrate:
    reviews: str                         # one judge's reviews
    against: str                         # another's, of the same answers
    json: str = None                     # a file for the unrounded numbers


def spearman(x, y):
    """Rank correlation: equal values share the mean of their ranks; nan if one side is constant."""
    ranks = []
    for values in (x, y):
        _, place, count = np.unique(values, return_inverse=True, return_counts=True)
        rank = (np.cumsum(count) - (count - 1) / 2)[place]
        ranks.append(rank - rank.mean())
    x, y = ranks
    with np.errstate(invalid="ignore"):
        return float(x @ y / np.sqrt((x @ x) * (y @ y)))


def paired_scores(first, second, names):
    """(m, 2) scores each of two runs, {id: review}, where neither failed; how many are left out."""
    pairs = np.array([[first[name]["tuple"], second[name]["tuple"]] for name in names])
    good = (pairs >= 0).all((1, 2))                          # pairs (n, 2, 2)
    return pairs[good, 0], pairs[good, 1], int((~good).sum())


def calibrate(config):
    """How far one judge, A, agrees with another, B, about the same answers."""
    first, second = (read_runs([path], MOST_FAILED)[0] for path in (config.reviews, config.against))
    check_ids(config.against, second, first)
    for name, review in first.items():
        for field in ("category", "answer1_id", "answer2_id"):
            if review.get(field) != second[name].get(field):
                raise ValueError(f"{config.against}: {name} has another {field} than in "
                                 f"{config.reviews}; both must be about the same answers")
    numbers = {}
    rows = []
    for kind in [*KINDS, "all"]:
        names = [name for name, review in first.items()
                 if kind in ("all", review["category"].removeprefix(WILD))]
        if not names:
            continue
        A, B, failed = paired_scores(first, second, names)
        reference, answers = (A - B).mean(0)
        found = {"questions": len(A), "failed": failed, "relative": relative_score(A)[0],
                 "relative_against": relative_score(B)[0], "reference_difference": reference,
                 "mean_difference": answers, "spearman": spearman(A[:, 1], B[:, 1])}
        numbers |= {f"{kind}.{name}": value for name, value in found.items()}
        rows.append([kind, *[f"{value:.4g}" for value in found.values()]])
    table = layout(list(zip(["", *found], *rows, strict=True)))
    text = (f"A: {judges_of(first)} ({config.reviews})\nB: {judges_of(second)} "
            f"({config.against})\n{table}\ndifferences: mean of A's scores less B's, of 10")
    print_numbers(numbers, text, config.json)


# --------------------------------------------------------------------------------------------------
# Both orders, and a page


@dataclass(frozen=True, kw_only=True)
class Swap(Review):
    swapped: str                         # JSON lines to write: reviews with the answers first


def swap(config):
    """Judge a second time with the answers first, and say what the order does."""
    cases = read_cases(config)
    requests = [review_request(config, case, swapped=True) for case in cases]
    if is_preview(requests, config):
        return
    first = read_runs([config.reviews], MOST_FAILED)[0]
    names = [str(case.question["question_id"]) for case in cases]
    check_ids(config.reviews, first, names)
    replies = replies_for(requests, config.swapped, config)
    rows = []
    for name, request in zip(names, requests, strict=True):
        content = content_of(replies[request.key])
        scores = parse_scores(content)[::-1]
        rows.append(first[name] | {"content": content, "tuple": scores})
    write_lines(config.swapped, rows)
    second = read_runs([config.swapped], MOST_FAILED)[0]
    before, after, failed = paired_scores(first, second, names)
    gain = ((before - after) * (1, -1)).mean()
    turned = np.sign(before[:, 0] - before[:, 1]) != np.sign(after[:, 0] - after[:, 1])
    print(f"relative score: {relative_score(before)[0]:.1f} with the reference first, "
          f"{relative_score(after)[0]:.1f} with it last, "
          f"{relative_score((before + after) / 2)[0]:.1f} averaged over both orders\n"
          f"standing first is worth {gain:+.2f} points of 10; {100 * turned.mean():.1f}% of the "
          f"verdicts depend on the order; {failed} failed and are left out")


@dataclass(frozen=True, kw_only=True)
class Page(Review):
    page: str                            # the page to write
    images: str = None                   # folder of the questions' images


def picture_tag(folder, name):
    """A picture, made small, as an <img> that holds all its bytes."""
    from parts import pictures  # only here: scoring reads none
    small = pictures.load_image(pictures.image_path(folder, name))
    small.thumbnail((400, 400))
    data = pictures.data_url(small, "JPEG")
    return f'<img width="200" alt="{html.escape(name)}" src="{data}">'


def write_page(config):
    """Reviews as one page without anything outside of it."""
    reviews = read_runs([config.reviews], most_failed=1)[0]
    cases = read_cases(config)
    check_ids(config.reviews, reviews, [str(case.question["question_id"]) for case in cases])
    names = ("picture", "question", "reference", "answer", "scores", "the judge's words")
    rows = ["".join(f"<th>{name}</th>" for name in names)]
    for case in cases:
        question = case.question
        review = reviews[str(question["question_id"])]
        picture = picture_tag(config.images, question["image"]) if config.images else ""
        scores = " ".join(f"{score:g}" for score in review["tuple"])
        texts = (question["text"], case.reference["text"], case.answer["text"], scores,
                 str(review.get("content")))
        cells = "".join(f"<td>{html.escape(text)}</td>" for text in texts)
        rows.append(f"<td>{picture}</td>{cells}")
    body = "\n".join(f"<tr>{row}</tr>" for row in rows)
    write_text(config.page, '<!DOCTYPE html>\n<html lang="en"><meta charset="utf-8">'
               "<title>LLaVA-Bench</title><style>td { vertical-align: top; white-space: pre-wrap }"
               f"</style>\n<table border>\n{body}\n</table></html>\n")
    print(f"wrote {config.page}")


COMMANDS = {
    "grade_mm_vet": (grade_mm_vet, GradeMMVet),
    "score mm_vet": (score_mm_vet, MMVet),
    "calibrate": (calibrate, Calibrate),
    "swap": (swap, Swap),
    "html": (write_page, Page)}


def main(argv=None):
    run_command(COMMANDS, argv, __doc__)


if __name__ == "__main__":
    run_main(main)
