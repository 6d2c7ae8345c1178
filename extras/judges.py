"""
More of judges: MM-Vet, one judge beside another, both orders of the answers, and a page to read.

    python -m extras.judges grade_mm_vet --labels mm-vet.json --answers a.jsonl --grades g.json
    python -m extras.judges score mm_vet --grades g.json --labels mm-vet.json
    python -m extras.judges calibrate --reviews r.jsonl --against theirs.jsonl
    python -m extras.judges swap --reviews r.jsonl --swapped s.jsonl --questions q.jsonl ...
    python -m extras.judges html --reviews r.jsonl --page r.html --questions q.jsonl ...

MM-Vet has 218 questions, graded from 0 to 1 (Diss. Sec. 4.5). OURS is all else: the paper's judge
is gone, so a new one should first be held against its reviews.
"""
import base64
import html
import io
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from eval import MOST_FAILED, Review, parse_scores, read_cases, relative_score, review_request
from parts.client import Endpoint, Request, content_of, print_requests, request_body
from parts.files import (
    PROMPTS,
    check_least,
    read_json,
    run_command,
    run_main,
    write_json,
    write_lines,
    write_text,
)
from parts.scoring import (
    ask_judge,
    check_ids,
    examples,
    judges_of,
    layout,
    read_by_id,
    read_object,
    read_runs,
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
    """What stands before the first space, as a number from 0 to 1, or None."""
    try:
        grade = float(content.split(" ")[0].strip())
    except ValueError:
        return None
    return grade if 0 <= grade <= 1 else None


def read_texts(path):
    """{id: text} of an answers file."""
    if not path.endswith(".jsonl"):
        answers = read_object(path)
        odd = [name for name, text in answers.items() if not isinstance(text, str)]
        if odd:
            raise ValueError(f"{path}: {len(odd)} of {len(answers)} answers are no text"
                             f"{examples(odd)}; {{id: text}} is needed")
        return answers
    answers = {}
    for name, row in read_by_id(path, "text").items():
        answers[f"v1_{name}" if name.isdigit() else name] = row["text"]
    return answers


def grade_request(config, label, answer, name, attempt):
    """One grading; a later attempt asks for a digit, and is hotter."""
    truth = label["answer"].replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
    prompt = Path(config.prompt).read_text().strip()
    text = f"{prompt}\n{label['question']} | {truth} | {answer} | "
    if attempt > 0:
        text += PLEASE
    hotter = replace(config, temperature=config.temperature + 0.5 * attempt)
    messages = [{"role": "user", "content": text}]
    return Request(f"{name}-try{attempt}", "mm_vet", request_body(hotter, messages))


def grade_mm_vet(config):
    """A judge's grades of MM-Vet answers. Started again, it goes on."""
    labels = read_object(config.labels)
    answers = read_texts(config.answers)
    check_ids(config.answers, answers, labels)
    left = [(name, run) for name in labels for run in range(config.runs)]

    def request_of(name, run, attempt):
        return grade_request(config, labels[name], answers[name], f"{name}-run{run}", attempt)

    if config.show:
        return print_requests([request_of(*pair, 0) for pair in left[:config.show]])
    replies = {}
    for attempt in range(TRIES):
        requests = {pair: request_of(*pair, attempt) for pair in left}
        found = ask_judge(list(requests.values()), config.grades, config)
        replies |= {pair: found[request.key] for pair, request in requests.items()}
        left = [pair for pair in left if parse_grade(content_of(replies[pair])) is None]
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
    """(runs, questions) numbers from 0 to 1, and the records that they are from."""
    grades = read_object(path)
    n_runs = len(next(iter(grades.values()))["score"])
    for name, row in grades.items():
        scores = row.get("score")
        is_good = isinstance(scores, list) and len(scores) == n_runs > 0
        if not is_good or not all(isinstance(x, int | float) and 0 <= x <= 1 for x in scores):
            raise ValueError(f"{path}: the score of {name} is not {n_runs} numbers from 0 to 1, "
                             f"but {scores}; grade it again")
    return np.array([row["score"] for row in grades.values()], float).T, grades


def mm_vet_scores(path, labels=None):
    """Grades -> ({"total": 36.1, ...}, the table as text).

    A run's score is 100 x the mean grade, of all questions or of those that need a capability; over
    runs the mean and the population standard deviation. No number counts as 0.0, as published.
    """
    scores, grades = read_grades(path)                       # (runs, questions)
    groups = {}
    if labels:
        needs = read_object(labels)
        check_ids(path, grades, needs)
        for capability in CAPABILITIES:
            groups[capability] = [capability in needs[name]["capability"] for name in grades]
    groups["total"] = [True] * len(grades)
    numbers, columns = {}, [["", "score", "  questions"]]
    for name, is_part in groups.items():
        if any(is_part):
            runs = 100 * scores[:, is_part].mean(1)
            numbers[name] = runs.mean()
            spread = f" ± {runs.std():.1f}" if len(runs) > 1 else ""
            columns.append([name, f"{runs.mean():.1f}{spread}", str(sum(is_part))])
            numbers["total_std"] = runs.std()
    contents = [text for row in grades.values() for text in row.get("content") or ()]
    numbers["failed"] = sum(parse_grade(text) is None for text in contents)
    published = ", ".join(f"{model} {total}" for model, total in MM_VET.items())
    text = (f"MM-Vet, {len(grades)} questions (the benchmark has 218), runs: {len(scores)}\n"
            f"{layout(list(zip(*columns, strict=True)))}\npublished totals: {published}\n"
            f"graded 0.0 because no number came in {TRIES} tries: {numbers['failed']}")
    return numbers, text


def score_mm_vet(config):
    """Scores of a grades file."""
    labels = config.labels
    if labels and Path(labels).is_dir():
        labels = str(Path(labels, "mm-vet.json"))
    print_numbers(*mm_vet_scores(config.grades, labels), config.json)


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


def average_ranks(x):
    """1 for the smallest; equal values share the mean of their ranks."""
    _, place, count = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[place]


def spearman(x, y):
    """Rank correlation; nan where one side is constant."""
    if len(set(x)) < 2 or len(set(y)) < 2:
        return float("nan")
    return float(np.corrcoef(average_ranks(x), average_ranks(y))[0, 1])


def calibrate(config):
    """How far one judge agrees with another about the same answers."""
    runs = [read_runs([path], MOST_FAILED)[0] for path in (config.reviews, config.against)]
    check_ids(config.against, runs[1], runs[0])
    for name, review in runs[0].items():
        for field in ("category", "answer1_id", "answer2_id"):
            if review.get(field) != runs[1][name].get(field):
                raise ValueError(f"{config.against}: {name} has another {field} than in "
                                 f"{config.reviews}; both must be about the same answers")
    A, B = (np.array([run[name]["tuple"] for name in runs[0]]) for run in runs)      # (n, 2)
    both = (A >= 0).all(1) & (B >= 0).all(1)
    A, B = A[both], B[both]
    numbers = {"n": len(A), "failed": int((~both).sum()),
               "relative": relative_score(A)[0], "relative_against": relative_score(B)[0],
               "reference_difference": (A - B).mean(0)[0], "mean_difference": (A - B).mean(0)[1],
               "spearman": spearman(A[:, 1], B[:, 1])}
    text = (f"A: {judges_of(runs[0])} ({config.reviews})\nB: {judges_of(runs[1])} "
            f"({config.against})\nquestions {len(A)}, left out as failed {numbers['failed']}\n"
            f"relative score: A {numbers['relative']:.1f}, B {numbers['relative_against']:.1f}\n"
            f"mean of A's scores less B's: reference {numbers['reference_difference']:+.2f}, "
            f"answers {numbers['mean_difference']:+.2f}, of 10\n"
            f"Spearman's correlation of the answers' scores: {numbers['spearman']:.3f}")
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
    if config.show:
        return print_requests(requests[:config.show])
    first = read_by_id(config.reviews, "category", "content")
    check_ids(config.reviews, first, [str(case.question["question_id"]) for case in cases])
    replies = ask_judge(requests, config.swapped, config)
    rows = []
    for case, request in zip(cases, requests, strict=True):
        content = content_of(replies[request.key])
        review = first[str(case.question["question_id"])]
        rows.append({**review, "content": content, "tuple": parse_scores(content)[::-1]})
    write_lines(config.swapped, rows)
    before = np.array([first[str(row["question_id"])]["tuple"] for row in rows])     # (n, 2)
    after = np.array([row["tuple"] for row in rows])
    good = (before >= 0).all(1) & (after >= 0).all(1)
    before, after = before[good], after[good]
    gain = ((before - after) * (1, -1)).mean()
    turned = np.sign(before[:, 0] - before[:, 1]) != np.sign(after[:, 0] - after[:, 1])
    print(f"relative score: {relative_score(before)[0]:.1f} with the reference first, "
          f"{relative_score(after)[0]:.1f} with it last, "
          f"{relative_score((before + after) / 2)[0]:.1f} averaged over both orders\n"
          f"standing first is worth {gain:+.2f} points of 10; {100 * turned.mean():.1f}% of the "
          f"verdicts depend on the order; {int((~good).sum())} failed and are left out")


@dataclass(frozen=True, kw_only=True)
class Page(Review):
    page: str                            # the page to write
    images: str = None                   # folder of the questions' images


def picture_tag(folder, name):
    """A picture, made small, as an <img> that holds all its bytes."""
    from parts.pictures import image_path, load_image  # only here: scoring reads no pictures
    jpeg = io.BytesIO()
    small = load_image(image_path(folder, name))
    small.thumbnail((400, 400))
    small.save(jpeg, "JPEG", quality=80)
    data = base64.b64encode(jpeg.getvalue()).decode()
    return f'<img width="200" alt="{html.escape(name)}" src="data:image/jpeg;base64,{data}">'


def write_page(config):
    """Reviews as one page without anything outside of it."""
    reviews = {str(row["question_id"]): row for row in read_json(config.reviews)}
    names = ("picture", "question", "reference", "answer", "scores", "the judge's words")
    rows = ["".join(f"<th>{name}</th>" for name in names)]
    for case in read_cases(config):
        review = reviews[str(case.question["question_id"])]
        picture = ""
        if config.images:
            picture = picture_tag(config.images, case.question["image"])
        scores = " ".join(f"{score:g}" for score in review["tuple"])
        texts = (case.question["text"], case.reference["text"], case.answer["text"], scores,
                 review["content"])
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
