"""
GPT-4 as judge: LLaVA-Bench (COCO) and (In-the-Wild), and MM-Vet (Sec. 5.1).

    python eval.py judge --questions q.jsonl --reference ref.jsonl --answers a.jsonl --context ctx.jsonl \\
        --reviews r.jsonl --base_url https://api.openai.com/v1 --judge_model gpt-4          ask a judge, print the score
    python eval.py score llava_bench --reviews r1.jsonl r2.jsonl r3.jsonl                   score reviews, ours or others'
    python eval.py calibrate --reviews r.jsonl --against theirs.jsonl                       one judge beside another
    python eval.py grade_mm_vet --labels mm-vet.json --answers a.jsonl --grades g.json      MM-Vet: ask, print the score
    python eval.py score mm_vet --grades g.json --labels mm-vet.json

    context, question, two answers --review_message--> one message --ask--> the judge's words, kept raw on disk
        --parse_scores--> reviews --relative_scores--> 100 x mean score of the answers / mean score of the reference

The judge never sees the picture either: captions and boxes, or a description, are what it compares with. The reference
is what a text-only GPT-4 answered from the same context, so 100 says "as good as a reader of the ground truth".
"""
import base64
import html
import io
import json
import math
import os
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from string import Template

import numpy as np

from generate_data import (HERE, Replies, Request, ask, ask_missing, body_of, finish, messages, only_one, print_requests,
                           whole_file)
from records import image_path, read_json

SYSTEM = "You are a helpful and precise assistant for checking the quality of the answer."      # OFFICIAL: the judge's
KINDS, WILD, COCO = ("conv", "detail", "complex"), "llava_bench_", ""    # categories, and what a bench writes before them
PROMPTS = HERE / "prompts" / "judge"
MOST_FAILED = 0.02                       # OURS: above this share of failed judgements there is no score
PUBLISHED = {                            # conversation, detail, complex reasoning, all
    COCO: {"paper, Table 4: LLaVA, full data": ("83.1", "75.3", "96.5", "85.1"),
           "paper, Table 4: no instruction tuning": ("22.0", "24.0", "18.5", "21.5")},
    WILD: {"paper, Table 5: LLaVA": ("57.3 ± 1.9", "52.5 ± 6.3", "81.7 ± 1.8", "67.3 ± 2.0"),
           "paper, Table 5: BLIP-2": ("54.6 ± 1.4", "29.1 ± 1.2", "32.9 ± 0.7", "38.1 ± 1.0"),
           "paper, Table 5: OpenFlamingo": ("19.3 ± 0.5", "19.0 ± 0.5", "19.1 ± 0.7", "19.1 ± 0.4"),
           "LLaVA-1.5-7B": ("-", "-", "-", "65.4"), "LLaVA-1.5-13B": ("-", "-", "-", "72.5")}}
CAPABILITIES = ("rec", "ocr", "know", "gen", "spat", "math")
MM_VET = {"LLaVA-1.5-7B": "31.1", "LLaVA-1.5-13B": "36.1"}       # totals, Diss. Table 4.4


# ---------------------------------------------------------------------------------------------------------------------
# Files, joined by id: a doubled, missing or foreign id is an error, never a number


def some(items):
    return f", e.g. {', '.join(repr(i) for i in items[:3])}" if items else ""


def unique(pairs):
    """A JSON object, for json.loads; ValueError if a name occurs twice, of which one would silently win."""
    if twice := [name for name, n in Counter(name for name, _ in pairs).items() if n > 1]:
        raise ValueError(f"{len(twice)} names occur more than once in one object{some(twice)}")
    return dict(pairs)


def keyed(path, key="question_id", **kinds):
    """{id: record} of JSON records whose field `key` is the id, or (key=None) of one JSON object that is such a dict.

    ValueError if an id is doubled, if a field is not of its type in `kinds`, or if the file is empty.
    """
    if key:
        rows, kinds = list(enumerate(read_json(path))), {key: str | int, **kinds}
    else:
        try:
            rows = list(json.loads(Path(path).read_text(encoding="utf-8-sig"), object_pairs_hook=unique).items())
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{path}: one JSON object is needed ({error})") from error
    bad = [name for name, row in rows if kinds and not (
        isinstance(row, dict) and all(isinstance(row.get(field), kind) for field, kind in kinds.items()))]
    if bad or not rows:
        raise ValueError(f"{path}: " + (f"{len(bad)} of {len(rows)} records{some(bad)}, lack {', '.join(kinds)} or have "
                                        "something else there than belongs there" if bad else "no records in it"))
    rows = [(row[key], row) for _, row in rows] if key else rows
    if twice := [i for i, n in Counter(i for i, _ in rows).items() if n > 1]:
        raise ValueError(f"{path}: {len(twice)} ids occur more than once{some(twice)}; each needs one record")
    return dict(rows)


def match(path, ids, other, others):
    """ValueError unless two files hold the same ids, or the same tuples that begin with an id."""
    missing, foreign = [i for i in ids if i not in others], [i for i in others if i not in ids]
    if missing or foreign:
        raise ValueError(f"{other}: {len(missing)} of {len(ids)} ids of {path} are missing{some(missing)}; {len(foreign)} of "
                         f"{len(others)} ids there are unknown{some(foreign)}; both files must be about the same")


@contextmanager
def kept(path):
    """PATH.raw, the folder of the raw replies from which PATH is written; ValueError if PATH was not made from such."""
    if os.path.exists(path) and not os.path.exists(f"{path}.raw"):
        raise ValueError(f"{path} was not written here, and would be lost; name another file")
    with only_one(Path(f"{path}.raw")) as folder:
        yield folder


def write_whole(path, text):
    """Write a file that is there in full or not at all."""
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as f:
        f.write(text.encode(errors="replace").decode())          # half a surrogate pair of a judge's is a "?"


# ---------------------------------------------------------------------------------------------------------------------
# Who judges


@dataclass(frozen=True, kw_only=True)
class Judge:
    base_url: str = "https://api.openai.com/v1"  # any OpenAI-compatible endpoint; key: environment variable OPENAI_API_KEY
    judge_model: str = "gpt-4"           # the paper's, gpt-4-0314, is no longer served
    temperature: float = 0.2             # OFFICIAL: as the released scripts, so is max_tokens
    max_tokens: int = 1024               # of a reply
    extra: str = None                    # JSON object of further fields of the request, e.g. {"seed": 0}; null removes one
    workers: int = 16                    # requests at a time
    rpm: float = 0                       # requests a minute at most; 0: no limit
    tpm: float = 0                       # tokens a minute at most, counting max_tokens for an answer; 0: no limit
    timeout: float = 120                 # seconds without a byte
    attempts: int = 8                    # times that a request is tried
    show: int = 0                        # print the first N requests whole, send nothing

    @property
    def model(self):                     # generate_data.py's name for it
        return self.judge_model


def ask_judge(plan, folder, args, judge):
    """All replies to `plan`, each with the day that it came; only those that are not in the folder yet are asked for."""
    dated = lambda request: {**judge(request), "date": str(date.today())}
    finish(ask_missing(lambda: iter(plan), folder / "raw.jsonl", dated, args, lambda reply: 0.0))
    return Replies([folder / "raw.jsonl"])


def content_of(reply):
    return reply["choices"][0]["message"]["content"]


def who(rows):
    """'gpt-4-0613, 2026-01-31': which judges gave these reviews, and when."""
    names, days = (sorted({row[field] for row in rows if row.get(field)}) for field in ("judge", "date"))
    return f"{' and '.join(names) or 'judge not recorded'}, {' to '.join(dict.fromkeys(days[:1] + days[-1:])) or 'no date'}"


# ---------------------------------------------------------------------------------------------------------------------
# LLaVA-Bench: from files to requests


def review_message(context, question, first, second, role, prompt):
    """What the judge reads. OFFICIAL: this layout, byte for byte."""
    return (f"[Context]\n{context}\n\n[Question]\n{question}\n\n[{role} 1]\n{first}\n\n[End of {role} 1]\n\n"
            f"[{role} 2]\n{second}\n\n[End of {role} 2]\n\n[System]\n{prompt}\n\n")


def context_of(record):
    """(what the judge is told of a picture, which bench that is): captions and boxes for COCO, else a description."""
    if "caption" in record:
        return (record["caption"] if isinstance(record["caption"], str) else "\n".join(record["caption"])), WILD
    boxes = [f"{thing['category']}: {thing['bbox']}" for thing in record["instances"]]
    return "\n".join(record["captions"]) + "\n\n" + "\n".join(boxes), COCO


def read_rules(path):
    """{category: (role, prompt)}: our prompts, or a file in the layout of the official rule.json."""
    if path is None:
        prompts = {COCO: "captions_boxes.txt", WILD: "caption.txt"}
        return {bench + kind: ("Assistant", (PROMPTS / name).read_text().strip())
                for bench, name in prompts.items() for kind in KINDS}
    return {category: (rule["role"], rule["prompt"]) for category, rule in keyed(path, None, role=str, prompt=str).items()}


def read_bench(args):
    """[(question, reference, answer, context, category, (role, prompt)), ...], joined by question_id and by image name."""
    questions, contexts = keyed(args.questions, image=str, text=str, category=str), keyed(args.context, "image")
    sides, rules, rows, squeeze = [], read_rules(args.rule), [], lambda text: " ".join(text.split())
    for path in (args.reference, args.answers):
        sides.append(keyed(path, text=str))
        match(args.questions, questions, path, sides[-1])
        if other := [i for i, row in sides[-1].items() if squeeze(questions[i]["text"]) not in squeeze(
                row.get("prompt") or questions[i]["text"])]:
            raise ValueError(f"{path}: {len(other)} of {len(questions)} answers are to another question than {args.questions} "
                             f"asks under the same id{some(other)}; take the files of one bench")
    if blind := [i for i, q in questions.items() if q["image"] not in contexts]:
        raise ValueError(f"{args.context}: nothing about the pictures of {len(blind)} of {len(questions)} questions"
                         f"{some(sorted({questions[i]['image'] for i in blind}))}; the image names must be equal")
    for i, q in questions.items():
        try:
            context, bench = context_of(contexts[q["image"]])
        except (KeyError, TypeError) as error:
            raise ValueError(f"{args.context}: {q['image']}: {type(error).__name__} {error}; captions and instances: "
                             "[{category, bbox}] are needed (COCO), or caption (In-the-Wild)") from error
        rows.append((q, sides[0][i], sides[1][i], context, bench + q["category"].removeprefix(WILD)))
    if unknown := [(q["question_id"], category) for q, *_, category in rows if category not in rules]:
        raise ValueError(f"{args.questions}: {len(unknown)} of {len(rows)} questions are of a category without a rule"
                         f"{some(unknown)}; {args.rule or 'prompts/judge'} has rules for {', '.join(rules)}")
    return [(*row, rules[row[-1]]) for row in rows]


def parse_scores(content):
    """The two scores on the first line of a review, or [-1, -1].

    OFFICIAL: a comma is a space; exactly two numbers with exactly one space between them, and nothing else.
    """
    try:
        first, second = map(float, content.split("\n")[0].replace(",", " ").split(" "))
    except ValueError:
        return [-1, -1]
    return [first, second] if math.isfinite(first) and math.isfinite(second) else [-1, -1]


@dataclass(frozen=True, kw_only=True)
class Review(Judge):
    questions: str                       # JSON lines of question_id, image, text, category
    reference: str                       # the reference's answers: JSON lines of question_id, text
    answers: str                         # the answers to be judged: the same
    context: str                         # JSON lines of image, captions, instances (COCO), or image, caption (In-the-Wild)
    reviews: str                         # JSON lines to write; the raw replies are kept in the folder REVIEWS.raw
    judge: str = "api"                   # api: a chat endpoint; script: the toy's scripted judge, no language model
    rule: str = None                     # the official rule.json or one like it, instead of our prompts
    swap: bool = False                   # judge a second time with the answers in the other order, and average
    html: str = None                     # a report to write: pictures, answers, scores and the judge's words
    images: str = None                   # folder of the questions' images, for the report


def review(args):
    """A judge's reviews of answers beside a reference's. Start it again after any interruption: it goes on."""
    judge = lambda request: ask(args.base_url, request.body, args.timeout)
    if args.judge == "script":
        from toy import JUDGE, scripted_judge as judge   # only here: toy.py stands above this file
        args = replace(args, judge_model=JUDGE)
    rows, plan = read_bench(args), {}
    orders = (False, True) if args.swap else (False,)    # OFFICIAL: the reference is always Assistant 1
    for q, reference, answer, context, category, rule in rows:
        for turned in orders:
            pair = (answer["text"], reference["text"]) if turned else (reference["text"], answer["text"])
            body = body_of(args, messages(SYSTEM, [], review_message(context, q["text"], *pair, *rule)))
            plan[q["question_id"], turned] = Request(f"{q['question_id']}{'-swapped' * turned}", category, None, body)
    if args.show:
        return print_requests(lambda: list(plan.values())[:args.show])
    pictures = [picture(args.images, q["image"]) for q, *_ in rows] if args.html and args.images else [""] * len(rows)
    with kept(args.reviews) as folder:
        replies, reviews = ask_judge(list(plan.values()), folder, args, judge), []
        for n, (q, reference, answer, _, category, _) in enumerate(rows, 1):
            i = q["question_id"]
            said = [replies[plan[i, turned].key] for turned in orders]
            first, *other = map(content_of, said)
            scores = [parse_scores(first), *(parse_scores(text)[::-1] for text in other)]        # reference, answer
            reviews.append({"id": n, "question_id": i, "answer1_id": reference.get("answer_id", i),
                            "answer2_id": answer.get("answer_id", i), "category": category, "content": first,
                            "tuple": [-1, -1] if [-1, -1] in scores else np.mean(scores, 0).tolist(),
                            "judge": said[0].get("model") or args.judge_model, "date": said[0]["date"]})
            if args.swap:
                reviews[-1]["swapped"] = {"content": other[0], "tuple": scores[1]}
        write_whole(args.reviews, "".join(json.dumps(row) + "\n" for row in reviews))
    print(f"wrote {len(reviews)} reviews to {args.reviews}")
    table = "No score: too many judgements failed."
    try:
        table = relative_scores([args.reviews])[1]
        print(table)
    finally:
        if args.html:
            write_html(args.html, [(image, *row[:3], r) for image, row, r in zip(pictures, rows, reviews)], table)


# ---------------------------------------------------------------------------------------------------------------------
# LLaVA-Bench: from reviews to scores


def read_reviews(path):
    """{question_id: review}, whose `tuple` holds two finite numbers; ValueError names the file."""
    found = keyed(path, category=str, tuple=list)
    bad = [i for i, row in found.items() if len(row["tuple"]) != 2 or not all(
        isinstance(x, int | float) and math.isfinite(x) for x in row["tuple"])]
    if bad:
        raise ValueError(f"{path}: the tuple of {len(bad)} of {len(found)} reviews is not two numbers{some(bad)}")
    return found


def interval(top, bottom, seed=0, draws=10_000):
    """Bootstrap over questions: the middle 95% of 100 x sum(top) / sum(bottom), averaged over runs; both (runs, questions)."""
    n = top.shape[1]
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), draws)        # how often each question is drawn
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = (counts @ top.T / (counts @ bottom.T)).mean(1)                            # (draws,)
    return [100 * float(x) for x in np.nanpercentile(ratio, (2.5, 97.5))]


def relative_scores(files, official=False):
    """Reviews of one set of questions, a file a run -> (scores for --json, the table as text).

    The relative score is a ratio of means, never a mean of ratios: 100 x mean of the answers / mean of the reference, over
    all questions of a category, or over all. Several runs: mean and population standard deviation. Failed judgements are
    left out and listed; above 2% in a file is a ValueError. `official`: they count as -1 for both, and means are rounded to
    three decimals before the ratio, which with several runs is rounded to one before the mean.
    """
    if twice := [path for path, n in Counter(map(os.path.realpath, files)).items() if n > 1]:
        raise ValueError(f"{twice[0]}: given more than once; each run is one file")
    runs = [read_reviews(path) for path in files]
    kinds = {i: row["category"] for i, row in runs[0].items()}
    bench = WILD if next(iter(kinds.values())).startswith(WILD) else COCO
    if strays := [i for i, kind in kinds.items() if kind.startswith(WILD) != (bench == WILD)]:
        raise ValueError(f"{files[0]}: {len(strays)} of {len(kinds)} reviews are of another bench than the first{some(strays)};"
                         " COCO and In-the-Wild are scored apart")
    for path, run in zip(files[1:], runs[1:]):
        match(files[0], kinds.items(), path, {i: row["category"] for i, row in run.items()}.items())
        if judges := {row.get("judge") for row in run.values()} ^ {row.get("judge") for row in runs[0].values()}:
            raise ValueError(f"{files[0]} and {path} are by different judges{some(sorted(map(str, judges)))}, which have no "
                             "common mean; score them apart, or compare them with calibrate")
    scores = np.array([[run[i]["tuple"] for i in kinds] for run in runs], float)          # (runs, questions, 2)
    bad, failed = (scores < 0).any(-1), []                                                # (runs, questions)
    for path, row in zip(files, bad):
        failed += (ids := [f"{path}: {i!r}" for i, is_bad in zip(kinds, row) if is_bad])
        if len(ids) > MOST_FAILED * len(row) and not official:
            raise ValueError(f"{len(ids)} of {len(row)} judgements failed, and above {MOST_FAILED:.0%} there is no score: "
                             f"{', '.join(ids)}. Their first line is not two numbers with one space between: read their "
                             "content, then take another judge or a clearer --rule. --official would count them as -1")
    weight = np.ones_like(bad) if official else ~bad
    names, columns, out = [*KINDS, *sorted({k.removeprefix(WILD) for k in kinds.values()} - set(KINDS)), "all"], {}, {}
    for name in names:
        at = np.array([name in ("all", kind.removeprefix(WILD)) for kind in kinds.values()])
        if not at.any():
            continue
        means = [run[at & w].mean(0).tolist() if (at & w).any() else [0, 0] for run, w in zip(scores, weight)]    # (runs, 2)
        means = [[round(x, 3) for x in pair] if official else pair for pair in means]
        if min(reference for reference, _ in means) <= 0:
            raise ValueError(f"{files[0]}: the reference's mean score for {name} is not above 0: nothing was judged there")
        relative = [answer / reference * 100 for reference, answer in means]
        relative = [round(x, 1) for x in relative] if official and len(files) > 1 else relative
        low, high = interval(*((scores * weight[..., None])[:, at, side] for side in (1, 0)))
        ours = {"relative": np.mean(relative), "relative_std": np.std(relative), "relative_low": low, "relative_high": high,
                "reference": 10 * np.mean(means, 0)[0], "candidate": 10 * np.mean(means, 0)[1]}
        out |= {f"{name}.{key}": float(value) for key, value in ours.items()}
        spread = f" ± {ours['relative_std']:.1f}" if len(files) > 1 else ""
        columns[name] = [f"{ours['relative']:.1f}{spread}", f"{low:.1f} to {high:.1f}", f"{ours['reference']:.1f}",
                         f"{ours['candidate']:.1f}", str(at.sum())]
    rows = [row for run in runs for row in run.values()]
    lines = [("", list(columns)), *zip(("relative score, %", "  95% interval (questions redrawn)", "  reference, mean x 10",
                                        "  answers, mean x 10", "  questions"), zip(*columns.values()))]
    lines += PUBLISHED[bench].items() if list(columns) == [*KINDS, "all"] else []
    text = f"LLaVA-Bench ({'In-the-Wild' if bench else 'COCO'}), judge: {who(rows)}; {len(files)} run{'s' * (len(files) > 1)}\n"
    text += layout(lines) + f"failed judgements: {len(failed)}" + (
        f", {'counted as -1 (--official)' if official else 'left out'}: {', '.join(failed)}" if failed else "")
    if all("swapped" in row for row in rows):
        extra, said = both_orders([row for row in rows if row["tuple"][0] >= 0])
        out, text = out | extra, f"{text}\n{said}"
    if bench:                                            # under the names that its files have, too
        out |= {bench + key: value for key, value in out.items() if not key.startswith("all.")}
    return {**out, "failed": len(failed)}, text


def both_orders(rows):
    """What the order did to reviews that were made both ways: (scores, a line of text). OURS: the paper judges one order."""
    first = np.array([parse_scores(row["content"]) for row in rows])         # (n, 2): reference, answer; reference first
    last = np.array([row["swapped"]["tuple"] for row in rows])               # (n, 2): reference, answer; answer first
    relative = [100 * float(s.mean(0)[1] / s.mean(0)[0]) for s in (first, last)]
    gain = float(((first - last) * (1, -1)).mean())      # what an answer gets as first, less what it gets as second
    turned = 100 * float((np.sign(first[:, 0] - first[:, 1]) != np.sign(last[:, 0] - last[:, 1])).mean())
    out = {"all.relative_reference_first": relative[0], "all.relative_reference_last": relative[1], "position_bias": gain,
           "verdicts_turned": turned}
    return out, (f"both orders averaged: {relative[0]:.1f} with the reference first, {relative[1]:.1f} with it last\n"
                 f"standing first is worth {gain:+.2f} points of 10, and {turned:.1f}% of the verdicts depend on the order")


def layout(lines):
    """[(name, cells), ...] as lines of text."""
    wide = max(12, *(len(cell) + 2 for _, cells in lines for cell in cells))
    return "".join(f"{name:<40}" + "".join(f"{cell:>{wide}}" for cell in cells) + "\n" for name, cells in lines)


@dataclass(frozen=True, kw_only=True)
class LLaVABench:
    reviews: list[str]                   # review files of the same questions, one a run
    official: bool = False               # the published arithmetic: failed judgements count as -1, means are rounded first
    json: str = None                     # a file for the unrounded numbers


def score(compute, args, *files):
    """Compute, print the table, write --json."""
    scores, text = compute(*files)
    print(text)
    if args.json:
        write_whole(args.json, json.dumps(scores, indent=1) + "\n")


def score_llava_bench(args):
    """Relative scores of review files."""
    score(relative_scores, args, args.reviews, args.official)


# ---------------------------------------------------------------------------------------------------------------------
# One judge beside another. OURS: the paper's judge is gone, so a new one should first be held against its reviews


@dataclass(frozen=True, kw_only=True)
class Calibrate:
    reviews: str                         # one judge's reviews
    against: str                         # another's, of the same answers
    json: str = None                     # a file for the unrounded numbers


def ranks(x):
    """1 for the smallest; equal values share the mean of their ranks."""
    _, place, count = np.unique(x, return_inverse=True, return_counts=True)
    return (np.cumsum(count) - (count - 1) / 2)[place]


def spearman(x, y):
    """Rank correlation, or None where one side is constant."""
    return float(np.corrcoef(ranks(x), ranks(y))[0, 1]) if len(set(x)) > 1 and len(set(y)) > 1 else None


def agreement(path, against):
    """Two review files of the same answers -> (numbers for --json, the table as text). A difference is A's less B's."""
    A, B = read_reviews(path), read_reviews(against)
    same = [{(i, *map(row.get, ("category", "answer1_id", "answer2_id"))): 1 for i, row in r.items()} for r in (A, B)]
    match(path, same[0], against, same[1])
    both = [i for i in A if min(A[i]["tuple"] + B[i]["tuple"]) >= 0]
    failed = [i for i in A if i not in set(both)]
    for name, run in ((path, A), (against, B)):
        if (bad := [i for i, row in run.items() if min(row["tuple"]) < 0]) and len(bad) > MOST_FAILED * len(run):
            raise ValueError(f"{name}: {len(bad)} of {len(run)} judgements failed{some(bad)}; above {MOST_FAILED:.0%} such "
                             "reviews are not compared")
    out, lines = {}, [("", ["questions", "relative A", "relative B", "reference", "answers", "Spearman"])]
    for name in [*sorted({A[i]["category"].removeprefix(WILD) for i in both}), "all"]:
        a, b = (np.array([r[i]["tuple"] for i in both if name in ("all", A[i]["category"].removeprefix(WILD))]) for r in (A, B))
        if not len(a) or min(a.mean(0)[0], b.mean(0)[0]) <= 0:
            raise ValueError(f"{path} and {against}: no review that both judges gave" if not len(a) else
                             f"{path} and {against}: a reference's mean score for {name} is 0")
        relative = [100 * float(s.mean(0)[1] / s.mean(0)[0]) for s in (a, b)]
        reference, answer, rho = *map(float, (a - b).mean(0)), spearman(a[:, 1], b[:, 1])
        out |= {f"{name}.n": len(a), f"{name}.relative": relative[0], f"{name}.relative_against": relative[1],
                f"{name}.reference_difference": reference, f"{name}.mean_difference": answer, f"{name}.spearman": rho}
        lines.append((name, [str(len(a)), *(f"{r:.1f}" for r in relative), f"{reference:+.2f}", f"{answer:+.2f}",
                             "-" if rho is None else f"{rho:.3f}"]))
    out["failed"] = len(failed)
    return out, (f"A: {who(A.values())} ({path})\nB: {who(B.values())} ({against})\nreference, answers: mean of A's score less "
                 f"B's, of 10; Spearman: of the answers' scores\n{layout(lines)}left out, failed with A or B: "
                 f"{len(failed)}{some(failed)}")


def calibrate(args):
    """How far one judge agrees with another about the same answers."""
    score(agreement, args, args.reviews, args.against)


# ---------------------------------------------------------------------------------------------------------------------
# MM-Vet: 218 questions, graded from 0 to 1 (Diss. Table 4.4)


@dataclass(frozen=True, kw_only=True)
class GradeMMVet(Judge):
    labels: str                          # mm-vet.json: {id: {question, answer, capability, ...}}
    answers: str                         # {id: text}, or JSON lines of question_id and text, where 7 stands for v1_7
    grades: str                          # the file to write, {id: {model, content, score, date}}; raw replies: GRADES.raw
    runs: int = 1                        # times that each answer is graded
    prompt: str = str(PROMPTS / "mm_vet.txt")    # instructions and examples; ours
    temperature: float = 0.0             # OFFICIAL: so is max_tokens
    max_tokens: int = 3


TRIES, PLEASE = 5, "\nPredict the correctness of the answer (digit): "      # OFFICIAL: after a reply that is no grade


def parse_grade(content):
    """What stands before the first space, as a number from 0 to 1, or None."""
    try:
        grade = float(content.split(" ")[0].strip())
    except ValueError:
        return None
    return grade if 0 <= grade <= 1 else None


def grade_mm_vet(args):
    """A judge's grades of MM-Vet answers. Start it again after any interruption: it goes on."""
    labels = keyed(args.labels, None, question=str, answer=str)
    if args.answers.endswith(".jsonl"):
        answers = {f"v1_{i}" if isinstance(i, int) else i: row["text"] for i, row in keyed(args.answers, text=str).items()}
    else:
        answers = keyed(args.answers, None)
    match(args.labels, labels, args.answers, answers)
    if odd := [i for i, text in answers.items() if not isinstance(text, str)]:
        raise ValueError(f"{args.answers}: {len(odd)} of {len(answers)} answers are no text{some(odd)}; {{id: text}} is needed")
    prompt, left, grades = Path(args.prompt).read_text().strip(), [(i, run) for i in labels for run in range(args.runs)], {}

    def request(i, run, attempt):
        truth = labels[i]["answer"].replace("<AND>", " <AND> ").replace("<OR>", " <OR> ")
        text = f"{prompt}\n{labels[i]['question']} | {truth} | {answers[i]} | " + PLEASE * (attempt > 0)
        hotter = replace(args, temperature=args.temperature + 0.5 * attempt)
        return Request(f"{i}-run{run}-try{attempt}", "mm_vet", None, body_of(hotter, [{"role": "user", "content": text}]))
    if args.show:
        return print_requests(lambda: [request(i, run, 0) for i, run in left[:args.show]])
    with kept(args.grades) as folder:
        for attempt in range(TRIES):
            plan = {pair: request(*pair, attempt) for pair in left}
            replies = ask_judge(list(plan.values()), folder, args, lambda r: ask(args.base_url, r.body, args.timeout))
            grades |= {pair: replies[r.key] for pair, r in plan.items()}
            left = [pair for pair in left if parse_grade(content_of(grades[pair])) is None]
            if not left: break
        rows = {i: [grades[i, run] for run in range(args.runs)] for i in labels}
        write_whole(args.grades, json.dumps({i: {
            "model": [r.get("model") or args.judge_model for r in said], "content": [content_of(r) for r in said],
            "score": [parse_grade(content_of(r)) or 0.0 for r in said], "date": [r["date"] for r in said]}
            for i, said in rows.items()}, indent=1) + "\n")
    print(mm_vet_scores(args.grades, args.labels)[1])


def mm_vet_scores(path, labels=None):
    """Grades {id: {model, content, score}}, one entry a run -> (scores for --json, the table as text).

    A run's score is 100 x the mean grade, of all questions or of those that need a capability; over runs the mean and the
    population standard deviation. A grade that no number came for is 0.0, as published, and counted.
    """
    grades = keyed(path, None, score=list)
    scores, wanted = [row["score"] for row in grades.values()], len(next(iter(grades.values()))["score"]) or 1
    if bad := [i for i, s in zip(grades, scores) if len(s) != wanted or not all(
            isinstance(x, int | float) and 0 <= x <= 1 for x in s)]:
        raise ValueError(f"{path}: the score of {len(bad)} of {len(grades)} questions is not {wanted} numbers from 0 to 1"
                         f"{some(bad)}; grade them again")
    scores, groups = np.array(scores, float).T, {"total": np.ones(len(grades), bool)}     # (runs, questions)
    if labels:
        needs = keyed(labels, None, capability=list)
        match(labels, needs, path, grades)
        groups = {c: np.array([c in needs[i]["capability"] for i in grades]) for c in CAPABILITIES} | groups
        groups = {c: at for c, at in groups.items() if at.any()}
    per_run = {name: 100 * scores[:, at].mean(1) for name, at in groups.items()}
    failed = [i for i, row in grades.items() for said in row.get("content") or () if parse_grade(said) is None]
    low, high = interval(scores, np.ones_like(scores))
    out = {name: float(x.mean()) for name, x in per_run.items()} | {"total_std": float(per_run["total"].std())}
    judges = [{"judge": name, "date": day} for row in grades.values() for name in row.get("model") or ()
              for day in row.get("date") or [None]]
    text = (f"MM-Vet, judge: {who(judges)}; {len(grades)} questions{' (the benchmark has 218)' * (len(grades) != 218)}, "
            f"{len(scores)} run{'s' * (len(scores) > 1)}\n")
    lines = [("", list(groups)), ("score", [f"{x.mean():.1f}" + (f" ± {x.std():.1f}" if len(x) > 1 else "")
                                            for x in per_run.values()])]
    lines += [("  questions", [str(at.sum()) for at in groups.values()])]
    lines += [(f"published, {name}", [""] * (len(groups) - 1) + [total]) for name, total in MM_VET.items()]
    text += layout(lines) + f"95% interval of the total (questions redrawn): {low:.1f} to {high:.1f}\n"
    text += f"graded 0.0 because no number came in {TRIES} tries: {len(failed)}{some(failed)}"
    return out | {"total_low": low, "total_high": high, "failed": len(failed)}, text


@dataclass(frozen=True, kw_only=True)
class MMVet:
    grades: str                          # {id: {model, content, score}}, one entry a run
    labels: str = None                   # mm-vet.json or its folder, for the capabilities
    official: bool = False               # the published arithmetic, which is the only one
    json: str = None                     # a file for the unrounded numbers


def score_mm_vet(args):
    """Scores of a grades file."""
    folder = args.labels and os.path.isdir(args.labels)
    score(mm_vet_scores, args, args.grades, os.path.join(args.labels, "mm-vet.json") if folder else args.labels)


# ---------------------------------------------------------------------------------------------------------------------
# The report: one page without anything outside of it


PAGE = """<!DOCTYPE html>
<html lang="en"><meta charset="utf-8"><title>LLaVA-Bench</title>
<style>
body { font: 15px/1.4 sans-serif; margin: 2em; }
table { border-collapse: collapse; }
th, td { border: 1px solid #ccc; padding: .5em; vertical-align: top; text-align: left; white-space: pre-wrap; }
th { position: sticky; top: 0; background: #eee; cursor: pointer; }
th[data-way="1"]::after { content: " \\25b2"; }
th[data-way="-1"]::after { content: " \\25bc"; }
td { min-width: 3em; max-width: 28em; overflow-wrap: anywhere; }
img { width: 200px; }
</style>
<h1>LLaVA-Bench</h1>
<pre>$scores</pre>
<table><thead><tr>$head</tr></thead><tbody>
$body</tbody></table>
<script>
document.querySelectorAll("th").forEach((th, column) => th.onclick = () => {
  const way = th.dataset.way == "1" ? -1 : 1, body = document.querySelector("tbody");
  const value = row => row.cells[column].dataset.value ?? row.cells[column].textContent;
  const compare = (a, b) => isNaN(a) || isNaN(b) ? a.localeCompare(b) : a - b;
  document.querySelectorAll("th").forEach(other => delete other.dataset.way);
  th.dataset.way = way;
  body.append(...[...body.rows].sort((a, b) => way * compare(value(a), value(b))));
});
</script></html>
"""


def picture(folder, name):
    """A picture, made small, as an <img> that holds all its bytes."""
    from PIL import Image, ImageOps
    path, jpeg = image_path(folder, name), io.BytesIO()
    if not os.path.isfile(path):
        raise FileNotFoundError(f"image {name} is not in {folder}; --images must be the folder that the names are relative to")
    with Image.open(path) as opened:
        small = ImageOps.exif_transpose(opened).convert("RGB")
    small.thumbnail((400, 400))
    small.save(jpeg, "JPEG", quality=80)
    return f'<img alt="{html.escape(name)}" src="data:image/jpeg;base64,{base64.b64encode(jpeg.getvalue()).decode()}">'


def cell(text, value=None):
    return f"<td>{text}</td>" if value is None else f'<td data-value="{html.escape(str(value))}">{text}</td>'


def write_html(path, rows, table):
    """[(picture, question, reference, answer, review), ...] -> a page whose columns sort at a click."""
    names = ("id", "picture", "category", "question", "reference", "answer", "reference's score", "answer's score",
             "difference", "the judge's words")
    body = []
    for image, q, reference, answer, r in rows:
        said = r["content"] + (f"\n\nIn the other order:\n{r['swapped']['content']}" if "swapped" in r else "")
        texts = [html.escape(str(text)) for text in (q["question_id"], q["category"], q["text"], reference["text"],
                                                     answer["text"], said)]
        (a, b), failed = r["tuple"], min(r["tuple"]) < 0
        points = [cell("failed" if failed else f"{x:g}", x) for x in (a, b, b - a)]
        cells = [cell(texts[0]), cell(image, q["image"]), *map(cell, texts[1:5]), *points, cell(texts[5])]
        body.append(f"<tr>{''.join(cells)}</tr>\n")
    head = "".join(f"<th>{name}</th>" for name in names)
    write_whole(path, Template(PAGE).substitute(scores=html.escape(table), head=head, body="".join(body)))
    print(f"wrote {path}")
