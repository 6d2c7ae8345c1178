"""
How LLaVA is scored (Sec. 5): answers in, numbers out.

    python eval.py answer --model out/stage2 --questions q.jsonl --images DIR --answers a.jsonl
    python eval.py judge --questions q.jsonl --reference ref.jsonl --answers a.jsonl \\
        --context ctx.jsonl --reviews r.jsonl --base_url http://localhost:8000/v1
    python eval.py score llava_bench --reviews r1.jsonl r2.jsonl r3.jsonl
    python eval.py scienceqa_data --labels data/scienceqa --split train --out train.json
    python eval.py score scienceqa --labels data/scienceqa --answers a.jsonl

    LLaVA-Bench   context, question, two answers --review_message--> a judge's words, kept on disk
                  --parse_scores--> reviews --relative_scores--> 100 x our mean / reference's mean
    ScienceQA     "... The answer is B." --parts/scienceqa.py--> B --> its choice, right or wrong
                  --scienceqa_scores--> accuracy by subject, context and grade

Scoring needs neither torch nor a network. Answers are found by id: missing, duplicate and unknown
ones are an error, never a number. Made elsewhere: a bench's questions and reference answers by
extras/llava_bench.py, a text-only expert's answers to ScienceQA by extras/scienceqa_gpt4.py. Where
the released scripts do something else, extras/published.py has their arithmetic, digit for digit.
"""
import math
from dataclasses import asdict, dataclass
from typing import NamedTuple

import numpy as np

from parts import scienceqa, scoring
from parts.client import Endpoint, Request, chat_messages, is_preview, request_body
from parts.files import run_command, run_main, write_json, write_lines
from parts.replies import content_of
from parts.scienceqa import COLUMNS

KINDS = ("conv", "detail", "complex")    # of questions: conversation, description, reasoning
WILD = "llava_bench_"                    # In-the-Wild's files write this before the kind
MOST_FAILED = 0.02                       # OURS: above this share of failures there is no score
SYSTEM = "You are a helpful and precise assistant for checking the quality of the answer."

# What is published. Relative scores: conversation, detailed description, complex reasoning, all.
TABLE_4 = {                              # Table 4: LLaVA-Bench (COCO)
    "paper: LLaVA, full data": "83.1 75.3 96.5 85.1",
    "paper: no instruction tuning": "22.0 24.0 18.5 21.5"}     # stage 1 alone
TABLE_5 = {                              # Table 5: LLaVA-Bench (In-the-Wild)
    "paper: LLaVA": "57.3±1.9 52.5±6.3 81.7±1.8 67.3±2.0",          # three runs of the model
    "paper: LLaVA†": "58.8±0.6 49.2±0.8 81.4±0.3 66.7±0.3",         # one, judged three times
    "paper: BLIP-2": "54.6±1.4 29.1±1.2 32.9±0.7 38.1±1.0",
    "paper: OpenFlamingo": "19.3±0.5 19.0±0.5 19.1±0.7 19.1±0.4",
    "LLaVA-1.5-7B": "- - - 65.4",        # the last two: Diss. Table 4.4
    "LLaVA-1.5-13B": "- - - 72.5"}
TABLE_7 = {                              # Table 7: ScienceQA, accuracy in percent
    "Human": "90.23 84.97 87.48 89.60 87.50 88.10 91.59 82.42 88.40",
    "GPT-3.5": "74.64 69.74 76.00 74.44 67.28 77.42 76.80 68.89 73.97",
    "GPT-3.5 CoT": "75.44 70.87 78.09 74.68 67.43 79.93 78.23 69.68 75.17",
    "LLaMA-Adapter": "84.37 88.30 84.36 83.72 80.32 86.90 85.83 84.05 85.19",
    "MM-CoT base": "87.52 77.17 85.82 87.88 82.90 86.83 84.65 85.37 84.91",
    "MM-CoT large": "95.91 82.00 90.82 95.26 88.80 92.89 92.44 90.31 91.68",
    "GPT-4": "84.06 73.45 87.36 81.87 70.75 90.73 84.69 79.10 82.69",
    "LLaVA": "90.36 95.95 88.00 89.49 88.00 90.66 90.93 90.90 90.92",
    "+ GPT-4, complement": "90.36 95.50 88.55 89.05 87.80 91.08 92.22 88.73 90.97",
    "+ GPT-4, judge": "91.56 96.74 91.09 90.62 88.99 93.52 92.73 92.16 92.53",
    "LLaVA-1.5-7B": "- - - - 66.8 - - - -",        # the last two: Diss. Table 4.3
    "LLaVA-1.5-13B": "- - - - 71.6 - - - -"}


# -----------------------------------------------------------------------------
# Answers: a checkpoint answers a file of questions


@dataclass(frozen=True)
class Answer:
    model: str                           # checkpoint folder
    questions: str                       # JSON lines of question_id, image, text
    answers: str                         # JSON lines to write; an unfinished file is resumed
    images: str = "."                    # folder of the questions' images
    temperature: float = 0.0             # LLaVA-1.5's; for Table 5's three runs take 0.2, --seed N
    seed: int = 0
    max_new_tokens: int = 1024           # for a word or a letter, 16 will do
    batch_size: int = 16                 # questions answered at once
    template: str = None                 # for a checkpoint that does not name its own
    device: str = "auto"                 # cuda, mps or cpu
    dtype: str = "auto"                  # bf16, fp16 or fp32


def answer(config):
    """Answer a file of questions. Started again, it resumes."""
    import sample  # only here: scoring needs no torch

    config = sample.Config(**asdict(config))
    sample.answer_file(sample.Talker(config), config)


# -----------------------------------------------------------------------------
# LLaVA-Bench: a text-only judge compares with a text-only reference (Sec. 5.1)


@dataclass(frozen=True, kw_only=True)
class Review(Endpoint):
    judge_model: str = "gpt-4"           # the paper's own, gpt-4-0314, is no longer served
    temperature: float = 0.2             # OFFICIAL: as the released scripts
    questions: str                       # JSON lines of question_id, image, text, category
    reference: str                       # the reference's answers: JSON lines of question_id, text
    answers: str                         # the answers to be judged: the same
    context: str                         # JSON lines of image, and captions, instances or caption
    reviews: str                         # JSON lines to write; raw replies lie in REVIEWS.raw
    rule: str = None                     # the official rule.json, instead of our prompts

    @property
    def model(self):                     # as the client calls it; elsewhere here a checkpoint
        return self.judge_model


class Case(NamedTuple):
    """What one judgement is about: three records, and how the judge is asked."""
    question: dict
    reference: dict
    answer: dict
    category: str                        # one of KINDS, after WILD in the wild
    context: str                         # what the judge is told of the picture
    rule: dict                           # {"role": "Assistant", "prompt": ...}


def context_of(record):
    """(what the judge is told of a picture, the prefix of its bench's categories).

    The judge never sees a picture. Of COCO's pictures it reads captions and boxes, of In-the-Wild's
    the manually curated description.
    """
    if "caption" in record:
        caption = record["caption"]
        return caption if isinstance(caption, str) else "\n".join(caption), WILD
    boxes = [f"{thing['category']}: {thing['bbox']}" for thing in record["instances"]]
    return "\n".join(record["captions"]) + "\n\n" + "\n".join(boxes), ""


def read_cases(config):
    """[Case, ...] of all questions. Raises ValueError for an unusable context or category."""
    rules = scoring.read_rules(config.rule, KINDS, WILD)
    cases = []
    for question, reference, candidate, record in scoring.read_bench(config):
        try:
            context, bench = context_of(record)
            category = bench + question["category"].removeprefix(WILD)
            rule = rules[category]
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{config.questions}: question {question['question_id']}: {type(error).__name__} "
                f"{error}. {config.context} needs captions and instances: [{{category, bbox}}], or "
                f"caption; a category needs a rule, one of {', '.join(rules)}") from error
        cases.append(Case(question, reference, candidate, category, context, rule))
    return cases


def review_message(context, question, first, second, role, prompt):
    """What the judge reads. OFFICIAL: this layout, byte for byte."""
    return (f"[Context]\n{context}\n\n[Question]\n{question}\n\n"
            f"[{role} 1]\n{first}\n\n[End of {role} 1]\n\n"
            f"[{role} 2]\n{second}\n\n[End of {role} 2]\n\n"
            f"[System]\n{prompt}\n\n")


def review_request(config, case, swapped=False):
    """What is sent for one judgement. OFFICIAL: the reference is always Assistant 1."""
    name = str(case.question["question_id"])
    texts = [case.reference["text"], case.answer["text"]]
    if swapped:                          # extras/judges.py asks in this order, too
        name += "-swapped"
        texts.reverse()
    message = review_message(case.context, case.question["text"], *texts, **case.rule)
    return Request(name, case.category, request_body(config, chat_messages(SYSTEM, [], message)))


def parse_scores(content):
    """The two scores on the first line of a review, or [-1, -1].

    OFFICIAL: a comma is a space, and exactly one space stands between the two, so "8,9" and "8 9"
    are scores, and "8, 9" is none.
    """
    try:
        first, second = map(float, content.split("\n")[0].replace(",", " ").split(" "))
    except ValueError:
        return [-1, -1]
    if not math.isfinite(first + second):
        return [-1, -1]                  # "nan 9" is no score either
    return [first, second]


def review_of(number, case, reply, judge_model):
    """A line of the reviews: the fields of the released files, then who judged, and when."""
    name = case.question["question_id"]
    return {"id": number + 1, "question_id": name,
            "answer1_id": case.reference.get("answer_id", name),
            "answer2_id": case.answer.get("answer_id", name),
            "category": case.category,
            "content": content_of(reply), "tuple": parse_scores(content_of(reply)),
            "judge": reply.get("model") or judge_model, "date": reply["date"]}


def judge(config):
    """A judge compares each answer with the reference's. Started again, it resumes."""
    cases = read_cases(config)
    requests = [review_request(config, case) for case in cases]
    if is_preview(requests, config):     # look before you pay
        return
    replies = scoring.replies_for(requests, config.reviews, config)    # saved, then parsed
    reviews = [review_of(i, case, replies[requests[i].key], config.judge_model)
               for i, case in enumerate(cases)]
    write_lines(config.reviews, reviews)
    print(relative_scores([config.reviews])[1])


def relative_score(scores):
    """(relative score, reference's mean, answers' mean) of one run; scores (m, 2).

    A ratio of means, never a mean of ratios. OURS: failed judgements are left out; OFFICIAL: they
    count as -1 for both sides.
    """
    reference, answers = scores[(scores >= 0).all(1)].mean(0)
    return 100 * answers / reference, reference, answers


def statistics_of(scores, score):
    """The columns of the table for the scores (runs, m, 2) of one kind of questions, unrounded."""
    if scores[..., 0].max(1).min() <= 0:
        raise ValueError("in one of the runs, no reference has a score above 0")
    relative, reference, answers = np.array([score(run) for run in scores]).T        # (runs,) each
    low, high = scoring.bootstrap(scores.clip(0))     # a failed pair, now (0, 0), adds to no sum
    return {"relative": relative.mean(), "relative_std": relative.std(), "relative_low": low,
            "relative_high": high, "reference": 10 * reference.mean(),       # of 100, as published
            "candidate": 10 * answers.mean()}


def relative_scores(files, score=relative_score, most_failed=MOST_FAILED):
    """Reviews of one bench, a file a run -> ({"all.relative": 85.1, ...}, the table as text).

    Several runs: the mean and the population standard deviation of their scores.
    """
    runs = scoring.read_runs(files, most_failed)
    categories = [review["category"] for review in runs[0].values()]
    kinds = [category.removeprefix(WILD) for category in categories]
    scores = np.array([[review["tuple"] for review in run.values()] for run in runs])
    numbers = {"failed": int((scores < 0).any(2).sum())}                 # scores (runs, n, 2)
    rows = [["", *scoring.RELATIVE]]
    for name in [*KINDS, "all"]:
        part = scores[:, [name == "all" or kind == name for kind in kinds]]      # (runs, m, 2)
        if not part.size:
            continue                     # a bench without this kind of question
        try:
            found = statistics_of(part, score)
        except ValueError as error:
            raise ValueError(f"{', '.join(files)}: {name}: {error}") from error
        numbers |= {f"{name}.{key}": value for key, value in found.items()}
        rows.append([name, *scoring.relative_cells(found, len(runs), part.shape[1])])
    table = list(zip(*rows, strict=True))                                # a kind is a column
    bench = "In-the-Wild" if categories[0].startswith(WILD) else "COCO"
    if set(kinds) == set(KINDS):         # so that our columns are the published ones
        published = TABLE_4 if bench == "COCO" else TABLE_5
        table += [(model, *values.split()) for model, values in published.items()]
    judges = scoring.judges_of(runs[0])
    return numbers, (f"LLaVA-Bench ({bench}), judge: {judges}; runs: {len(runs)}\n"
                     f"{scoring.layout(table)}\nfailed judgements: {numbers['failed']}")


@dataclass(frozen=True)
class LLaVABench:
    reviews: list[str]                   # review files of the same questions, one a run
    json: str = None                     # a file for the unrounded numbers


def score_llava_bench(config):
    """Relative scores of review files, beside the paper's."""
    numbers, text = relative_scores(config.reviews)
    print(text)
    if config.json:
        write_json(config.json, numbers)


# -----------------------------------------------------------------------------
# ScienceQA, alone and together with another model (Sec. 5.2)


@dataclass(frozen=True)
class ScienceQA:
    labels: str                          # folder with the official problems.json, pid_splits.json
    answers: str                         # JSON lines of question_id and text
    second: str = None                   # another model's answers
    requery: str = None                  # its verdicts on the problems where the two differ
    split: str = "test"                  # of pid_splits.json
    json: str = None                     # a file for the unrounded numbers


def ensemble(ours, theirs):
    """Their choices, and ours wherever they have none."""
    return {pid: ours[pid] if theirs.get(pid) is None else theirs[pid] for pid in ours}


def methods_of(ours, second, verdicts):
    """{method: [{id: choice}, ...]}, for the last rows of Table 7: right where one of these is.

    complement     the second model's choice; ours "whenever GPT-4 fails to provide answers"
    judge          its verdict "whenever GPT-4 and LLaVA produce different answers", else ours
    upper_bound    right if either is; no row of the paper
    """
    methods = {"ours": [ours]}
    if second:
        methods["second"] = [second]
        methods["complement"] = [ensemble(ours, second)]
        methods["upper_bound"] = [ours, second]
    if verdicts:
        differ = {pid: verdicts.get(pid) for pid in ours if ours[pid] != second[pid]}
        methods["judge"] = [ensemble(ours, differ)]
    return methods


def scienceqa_scores(problems, methods):
    """{method: {column: (right, n), or None}}; one with a hint and a picture is in TXT and IMG."""
    scores = {method: {} for method in methods}
    for column in COLUMNS:
        part = {pid: problem for pid, problem in problems.items()
                if column in scienceqa.columns_of(problem)}
        for method, picks in methods.items():
            right = [pid for pid, problem in part.items()
                     if problem["answer"] in [pick[pid] for pick in picks]]
            scores[method][column] = (len(right), len(part)) if part else None
    return scores


def score_scienceqa(config):
    """ScienceQA by subject, context and grade, beside the paper's; with --second: ensembles.

    OURS: an answer that names no choice is wrong, and counted; OFFICIAL: the first scripts draw.
    """
    problems = scienceqa.read_problems(config.labels, config.split)
    if config.requery and not config.second:
        raise ValueError("--requery decides between --answers and --second; --second is missing")
    ours = scienceqa.read_choices(config.answers, problems)
    second = scienceqa.read_choices(config.second, problems)
    verdicts = scienceqa.read_choices(config.requery, problems, partial=True)
    scores = scienceqa_scores(problems, methods_of(ours, second, verdicts))
    unparsed = (sum(pick is None for pick in ours.values()), len(ours))
    scienceqa.print_methods(scores, unparsed, TABLE_7, config.json)
    if second:
        differ = [pid for pid in problems if ours[pid] != second[pid]]
        decided = [pid for pid in differ if verdicts.get(pid) is not None]
        print(f"the two differ on {len(differ)} problems; {len(decided)} of these have a verdict")


@dataclass(frozen=True)
class ScienceQAData:
    labels: str                          # folder with the official problems.json, pid_splits.json
    split: str = "train"                 # of pid_splits.json
    # COURSE: QCM-LEA reasons first, QCM-ALE answers first (Table 8); `letter` is LLaVA-1.5's
    format: str = "QCM-LEA"              # Question, Context, options; Lecture, Explanation, Answer
    images: bool = True                  # without: for a model that only reads
    out: str = None                      # JSON to train on
    questions: str = None                # JSON lines to answer


def scienceqa_data(config):
    """ScienceQA's official files as training data (--out) and as questions (--questions)."""
    problems = scienceqa.read_problems(config.labels, config.split)
    if not (config.out or config.questions):
        raise ValueError("--out FILE to train on, or --questions FILE to answer")
    turns = {pid: scienceqa.science_turn(problems[pid], config.format) for pid in problems}
    image_first = config.format == "letter"      # OFFICIAL; else behind the question
    records, questions = scienceqa.science_records(turns, problems, config.images, image_first)
    if config.out:
        write_json(config.out, records)
    if config.questions:
        write_lines(config.questions, questions)
    print(f"{len(records):,} problems of {config.split}, {config.format}")


COMMANDS = {
    "answer": (answer, Answer),
    "judge": (judge, Review),
    "score llava_bench": (score_llava_bench, LLaVABench),
    "score scienceqa": (score_scienceqa, ScienceQA),
    "scienceqa_data": (scienceqa_data, ScienceQAData)}


def main(argv=None):
    run_command(COMMANDS, argv, __doc__)


if __name__ == "__main__":
    run_main(main)
