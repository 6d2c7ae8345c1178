"""
How it is scored (Sec. 5.2 and Table 7; the benchmarks of LLaVA-1.5): answers in, numbers out.

    python eval.py answer --model out/stage2 --questions q.jsonl --images DIR --answers a.jsonl     a checkpoint answers
    python eval.py score pope --answers a.jsonl --questions q.jsonl --labels coco_pope_*.json       no model, no torch
    python eval.py judge --questions q.jsonl --answers a.jsonl ...                                  LLaVA-Bench: see judge.py
    python eval.py scienceqa_data --labels DIR --split train --format QCM-LEA --out train.json      ScienceQA to train on

A scorer is one function: it takes the label files, finds the answer to each label by id, and returns the scores, {key: (right,
n) or a number}, and what must be said about them. Missing, doubled and foreign answers are an error, never a number.
--official is the published arithmetic wherever it does something else: random choices, pairs by position, the servers' rules.
"""
import ast
import base64
import csv
import functools
import gc
import io
import itertools
import json
import os
import random
import re
import sys
from collections import defaultdict
from dataclasses import asdict, dataclass
from pathlib import Path

import judge
from generate_data import in_range
from records import IMAGE, read_json, run_command, typed_flags, write_lines

LETTERS = list("ABCDE")
BY_LETTER = "Answer with the option's letter from the given choices directly."
PUBLISHED = {                            # benchmark: keys, {model: values}; Table 7 and the tables of LLaVA-1.5
    "scienceqa": ("NAT SOC LAN TXT IMG NO G1-6 G7-12 AVG", {
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
        "LLaVA-1.5-7B": "- - - - 66.8 - - - -", "LLaVA-1.5-13B": "- - - - 71.6 - - - -"}),
    "pope": ("random.f1 popular.f1 adversarial.f1 f1", {"LLaVA-1.5-7B": "87.3 86.1 84.2 85.9", "13B": "87.1 86.2 84.5 85.9"}),
    "mme": ("perception", {"LLaVA-1.5-7B": "1510.7", "13B": "1531.3"}),
    "mmbench": ("circular", {"LLaVA-1.5-7B": "64.3", "13B": "67.7", "7B on CN": "58.3", "13B on CN": "63.6"}),
    "seed_bench": ("image video all", {"LLaVA-1.5-7B": "66.1 37.3 58.6", "13B": "68.2 42.7 61.6"}),
    "vqav2": ("accuracy", {"LLaVA-1.5-7B, test-dev": "78.5", "13B": "80.0"}),
    "gqa": ("accuracy", {"LLaVA-1.5-7B": "62.0", "13B": "63.3"}),
    "vizwiz": ("accuracy", {"LLaVA-1.5-7B, test": "50.0", "13B": "53.6"}),
    "textvqa": ("accuracy", {"LLaVA-1.5-7B, with OCR": "58.2", "13B": "61.3"}),
    "mmmu": ("accuracy", {"LLaVA-1.5-13B": "36.4"}), "mathvista": ("accuracy", {"LLaVA-1.5-13B": "27.6"})}


# ---------------------------------------------------------------------------------------------------------------------
# Reading, and finding the answer to each label


def read(path):
    """What a file holds: a JSON value, a list of JSON lines, or rows (.tsv and .xlsx as dicts, .txt as lists of cells)."""
    if not path:
        raise ValueError("--answers FILE is needed")
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such file")
    if path.endswith(".xlsx"):
        rows = openpyxl().load_workbook(path, read_only=True).active.iter_rows(values_only=True)
        head = next(rows, ())
        data = [dict(zip(head, ("" if cell is None else str(cell) for cell in row))) for row in rows]
    elif path.endswith((".tsv", ".txt")):
        csv.field_size_limit(2 ** 31 - 1)                # MMBench keeps its pictures in the sheet
        with open(path, encoding="utf-8-sig", newline="") as f:
            data = list(csv.DictReader(f, delimiter="\t")) if path.endswith(".tsv") else [
                line.rstrip("\r\n").split("\t") for line in f if line.strip()]
    else:
        try:
            text = Path(path).read_text(encoding="utf-8-sig")
            try:
                data = json.loads(text)
            except ValueError:                           # JSON lines, all at once
                data = json.loads("[" + ",".join(filter(str.strip, text.split("\n"))) + "]")
        except ValueError:
            data = list(read_json(path))                 # for its error, which names the line
    if not data:
        raise ValueError(f"{path}: it is empty")
    return data


def openpyxl():
    try:
        import openpyxl
        return openpyxl
    except ImportError as error:
        raise ValueError(".xlsx needs openpyxl (pip install openpyxl); or take .tsv") from error


def read_labels(args, *patterns):
    """{path: what it holds} for the files of --labels; of a folder, those that are called like the official ones."""
    files = []
    for path in args.labels:
        found = [path] if not os.path.isdir(path) else sorted(str(f) for p in patterns for f in Path(path).glob(p))
        if not found:
            raise FileNotFoundError(f"--labels {path}: the folder has no {' or '.join(patterns)}")
        files += found
    return {path: read(path) for path in files}


def answers_of(path):
    """[(id, prompt or "", text), ...] of what `answer` writes, of an upload file, a result sheet, or a result file of the
    paper's ScienceQA run, {"outputs": {id: text}}."""
    rows, answers = read(path), []
    if isinstance(rows, dict):
        rows = json.loads(Path(path).read_text(encoding="utf-8-sig"), object_pairs_hook=judge.unique)
        rows = [{"question_id": k, "text": v} for k, v in rows["outputs"].items()] if isinstance(
            rows.get("outputs"), dict) else [rows]
    for i, row in enumerate(rows if isinstance(rows, list) else [rows]):
        row = row if isinstance(row, dict) else {}
        name = next((row[k] for k in ("question_id", "questionId", "index") if k in row), None)
        text = next((row[k] for k in ("text", "prediction", "answer") if k in row), None)
        if name is None or not isinstance(text, str):
            raise ValueError(f"{path}[{i}]: question_id and text are needed, found {str(row)[:100]}")
        answers.append((name, row.get("prompt") or "", text))
    return answers


def bare(prompt):
    """The question of a prompt: without instructions, without the lines that LLaVA-1.5 adds, blanks made single."""
    lines = [x for x in prompt.split("\n") if not x.startswith(("Reference OCR token:", "When the provided information is"))]
    text = " ".join(lines).replace("Answer the question using a single word or phrase.", " ")
    return " ".join(text.replace("Please answer yes or no.", " ").split())


def match(wanted, found, source, hint="", missing_ok=False):
    """The values of `found` [(key, value), ...] in the order of the keys `wanted`; each key as often here as there.

    What is asked more than once (MME: twice under an id) is found in order. ValueError counts and shows what is missing,
    doubled or unknown: a score over other questions is no score. With `missing_ok` a missing value is None.
    """
    have = defaultdict(list)
    for key, value in found:
        have[key].append(value)
    known = set(wanted)
    values = [have[key].pop(0) if have.get(key) else None for key in wanted]
    faults = {"have no answer": [] if missing_ok else [key for key, value in zip(wanted, values) if value is None],
              "are answered too often": [key for key, left in have.items() if left and key in known],
              "are answered but not asked": [key for key in have if key not in known]}
    if any(faults.values()):
        raise ValueError(f"{source}: of {len(wanted):,} questions and {len(found):,} answers " + "; ".join(
            f"{len(keys):,} {what}, e.g. {', '.join(map(str, keys[:3]))}" for what, keys in faults.items() if keys)
            + f". {hint or 'Are these the answers to these questions, all of them, once each?'}")
    return values


def texts_of(args, asked, missing_ok=False):
    """The texts of --answers in the order of `asked`: ids, or (id, question) where ids alone do not tell."""
    answers = answers_of(args.answers)
    if isinstance(asked[0], tuple):
        asked = [(str(i), bare(text)) for i, text in asked]
        found = [((str(i), bare(prompt)), text) for i, prompt, text in answers]
    else:
        asked, found = [str(i) for i in asked], [(str(i), text) for i, _, text in answers]
    return match(asked, found, args.answers, missing_ok=missing_ok)


def tally(pairs):
    """[(key, right), ...] -> {key: (sum of right, count)}"""
    counts = {}
    for key, right in pairs:
        k, n = counts.get(key, (0, 0))
        counts[key] = (k + right, n + 1)
    return counts


def percent(value):
    return 100 * value[0] / value[1] if isinstance(value, tuple) else value


# ---------------------------------------------------------------------------------------------------------------------
# Yes or no: POPE, MME


def yes_no(split, texts, labels):
    """POPE's five measures of one split, as {split.measure: (right, n)}; None where nothing can be divided by."""
    yes = [not {"No", "not", "no"} & set(text.split(".")[0].replace(",", "").split(" ")) for text in texts]
    pairs = [(y, label != "no") for y, label in zip(yes, labels)]
    both, n_yes, n_true = pairs.count((True, True)), sum(y for y, _ in pairs), sum(true for _, true in pairs)
    return {f"{split}.f1": 200 * both / (n_yes + n_true) if both else None,
            f"{split}.accuracy": (sum(y == true for y, true in pairs), len(pairs)),
            f"{split}.precision": (both, n_yes) if n_yes else None, f"{split}.recall": (both, n_true) if n_true else None,
            f"{split}.yes": (n_yes, len(pairs))}


def pope(args, labels):
    """POPE: is there such an object? F1 of "yes" in three splits; `--questions` says which question is of which split.

    OFFICIAL: whatever has no "No", "not" or "no" among the words of its first sentence is a yes. Answers and labels are
    paired by position (--official), which is silently wrong with other label files than those of POPE's commit e3e39262.
    """
    splits = {}
    for path, rows in labels.items():
        name = re.search("random|popular|adversarial", Path(path).name)
        if not name or name[0] in splits:
            raise ValueError(f"{path}: one file each for random, popular and adversarial is needed, called after its split")
        splits[name[0]] = rows
    if args.official and not args.questions:
        raise ValueError("--official pairs by position within a split; --questions FILE says which question is of which")
    questions = read(args.questions) if args.questions else [row | {"category": s} for s in splits for row in splits[s]]
    if others := {q["category"] for q in questions} - splits.keys():
        raise ValueError(f"--labels: there are questions of the split {', '.join(others)}, but no labels")
    split_of, scores, notes = {str(q["question_id"]): q["category"] for q in questions}, {}, []
    answers = answers_of(args.answers)
    said = [] if args.official else zip(questions, texts_of(args, [(q["question_id"], q["text"]) for q in questions]))
    said = [(q["category"], (q["image"], bare(q["text"])), text) for q, text in said]
    for split, rows in splits.items():
        texts = [text for i, _, text in answers if split_of[str(i)] == split] if args.official else match(
            [(row["image"], bare(row["text"])) for row in rows], [(key, text) for name, key, text in said if name == split],
            f"labels of {split}", "The published scores belong to POPE's commit e3e39262: 2910 random, 3000 popular, 3000 "
            "adversarial labels.")
        if not texts:
            raise ValueError(f"{args.questions or args.answers}: nothing is of the split {split}, of which there are labels")
        scores |= yes_no(split, texts, [row["label"] for row in rows])
        if scores[f"{split}.f1"] is None:
            notes.append(f"{split}: no answer is rightly yes, so F1 is undefined")
        if len(texts) != len(rows):
            notes.append(f"{split}: {len(texts)} answers and {len(rows)} labels, paired by position, do not belong together")
    three = [scores.get(f"{split}.f1") for split in ("random", "popular", "adversarial")]
    if len(splits) < 3:
        notes.append(f"f1 is the mean of three splits; there are labels of {', '.join(splits)} only")
    return scores | {"f1": None if None in three else sum(three) / 3}, notes


PERCEPTION = "existence count position color posters celebrity scene landmark artwork OCR".split()
COGNITION = "commonsense_reasoning numerical_calculation text_translation code_reasoning".split()


def mme(args, labels):
    """MME: two yes/no questions a picture; TASK = accuracy + share of pictures with both right, in percent each.

    The first four characters decide: a "yes" in them, else a "no", else it is wrong. --labels is the official tool's folder of
    TASK.txt: picture, question, label (and maybe an answer) by tabs, the two lines of a picture one after the other.
    """
    rows = [(Path(path).stem, *cells[:3]) for path, lines in labels.items() for cells in lines]
    for row in rows:
        if row[0] not in PERCEPTION + COGNITION or len(row) < 4 or row[3].strip().lower() not in ("yes", "no"):
            raise ValueError(f"{row[0]}.txt: {row[1:]}; a line of TASK.txt is picture, question, Yes or No, by tabs, and the "
                             f"tasks are {', '.join(PERCEPTION + COGNITION)}")
    keys = [(task, picture.split(".")[0], bare(question)) for task, picture, question, _ in rows]
    found = [((str(i).split("/")[0], str(i).split("/")[-1].split(".")[0], bare(prompt)), text)
             for i, prompt, text in answers_of(args.answers)]
    starts = [text.lower()[:4] for text in match(keys, found, args.answers, "question_id is TASK/PICTURE, the same for two.")]
    said = ["yes" if "yes" in start else "no" if "no" in start else "other" for start in starts]
    right = [s == row[3].strip().lower() for s, row in zip(said, rows)]
    if len(rows) % 2 or any(a[:2] != b[:2] for a, b in zip(keys[::2], keys[1::2])):
        raise ValueError("--labels: each picture needs two lines, one after the other")
    acc = tally((key[0], ok) for key, ok in zip(keys, right))
    acc_plus = tally((key[0], a and b) for key, a, b in zip(keys[::2], right[::2], right[1::2]))
    tasks = {task: percent(acc[task]) + percent(acc_plus[task]) for task in acc}
    scores, notes = {}, [f"{said.count('other')} answers are neither yes nor no, and wrong"]
    for name, group in (("perception", PERCEPTION), ("cognition", COGNITION)):
        lacking = [task for task in group if task not in tasks]
        scores[name] = None if lacking else sum(tasks[task] for task in group)
        notes += [f"{name} is the sum of {len(group)} tasks; there are no labels of {', '.join(lacking)}"] * bool(lacking)
    for task in tasks:
        scores |= {task: tasks[task], f"{task}.acc": acc[task], f"{task}.acc_plus": acc_plus[task]}
    return scores, notes


# ---------------------------------------------------------------------------------------------------------------------
# Multiple choice: MMBench, SEED-Bench, MMMU, MathVista


def option_of(text, options):
    """The letter that a free answer means, by MMBench's rules, or None: the one bare letter among its words; the one with
    such signs around it; the one option whose text it holds. An A in more than three words may be an article."""
    words = text.split()
    for signs in (" ", " .", " ,", " :", " )", " ).", "( )", "( ).", ": ", ": ,", ": .", ": )", ": )."):
        found = [letter for letter in LETTERS if signs.replace(" ", letter) in words]
        if len(found) == 1 and not (signs == " " and "A" in words and len(words) > 3):
            return found[0]
    found = [letter for letter, option in options.items() if option.lower() in text.lower()]
    return found[0] if len(found) == 1 else None


def present(cell):
    """Whether a cell of a sheet holds something; an empty one was "nan" to the official readers."""
    return bool(cell) and cell.lower() not in ("nan", "none")


def mmbench(args, labels):
    """MMBench and MMBench-CN: `circular` counts a question as right only if it is so in each rotation of its options (rows
    index, index + 1,000,000, ... of the official TSV); `plain` looks at the unrotated row, `rows` at every row by itself.

    OFFICIAL: an answer that no rule understands goes to GPT, and at last to chance (--official: at once); here it is wrong
    and counted. --upload writes the result sheet, .xlsx or .tsv.
    """
    rows = [row for sheet in labels.values() for row in sheet]
    texts = texts_of(args, [row["index"] for row in rows])
    if args.upload:
        dropped = ("hint", "category", "source", "image", "comment", "l2-category")
        before = [k for k in rows[0] if k not in dropped and k != "answer" and k != "split"]
        after = [k for k in rows[0] if k in ("answer", "split")]
        write_sheet(args.upload, [[*before, "prediction", *after]] + [
            [*(row[k] for k in before), text, *(row[k] for k in after)] for row, text in zip(rows, texts)])
    if not rows[0].get("answer"):
        return {}, ["the TSV holds no answers: a test split, which its server scores"]
    if torn := [row["index"] for row in rows if not row["answer"] or not str(row["index"]).isdigit()]:
        raise ValueError(f"--labels: {len(torn)} of {len(rows)} rows have no answer or no number as index, e.g. {torn[:3]}; is "
                         "the file whole?")
    rng, groups, pairs = random.Random(args.seed), defaultdict(list), []
    for row, text in zip(rows, texts):
        letter = option_of(text, {k: row[k] for k in "ABCD" if present(row.get(k))})
        pairs.append(("unparsed", letter is None))
        letter = letter or (rng.choice(LETTERS) if args.official else None)
        groups[int(row["index"]) % 10 ** 6].append((int(row["index"]), letter == row["answer"], row))
    for group in groups.values():
        _, plain, row = min(group, key=lambda entry: entry[0])
        circular = all(ok for _, ok, _ in group)
        pairs += [("plain", plain), ("circular", circular), *(("rows", ok) for _, ok, _ in group)]
        pairs += [(row[level], circular) for level in ("l2-category", "category") if row.get(level)]
    scores = tally(pairs)
    first = ("circular", "plain", "rows", "unparsed")
    short = sum(len(group) < sum(present(group[0][2].get(k)) for k in "ABCD") for group in groups.values())
    return {key: scores[key] for key in (*first, *sorted(scores.keys() - set(first)))}, [
        f"{short} of {len(groups)} questions have fewer rows than options: circular is easier for them"] * bool(short)


def mmbench_data(args):
    """MMBench's sheet as questions to answer, and the pictures in it as files, one for all rotations of a question."""
    rows, questions = [row for sheet in read_labels(args, "*.tsv").values() for row in sheet], []
    pictures = {row["index"]: row["image"] for row in rows}
    Path(args.images).mkdir(parents=True, exist_ok=True)
    for row in rows:
        options = [f"{k}. {row[k]}" for k in itertools.takewhile(lambda k: present(row.get(k)), "ABCD")]
        lines = [row["hint"]] * present(row.get("hint")) + [row["question"], *options]
        chinese = re.search("[\u4e00-\u9fff]", row["question"])
        name, picture = f"{int(row['index']) % 10 ** 6}.jpg", pictures.get(row["image"], row["image"])   # or another row's
        Path(args.images, name).write_bytes(base64.b64decode(picture))
        questions.append({"question_id": int(row["index"]), "image": name,
                          "text": "\n".join([*lines, "请直接回答选项字母。" if chinese else BY_LETTER])})
    write_lines(Path(args.questions), questions)
    print(f"{len(questions):,} questions in {args.questions}, their pictures in {args.images}")


def seed_bench(args, labels):
    """SEED-Bench: the text must equal the letter. One kind of questions, image or video, may be left out as a whole.

    OFFICIAL: a missing answer is a wrong one (--official).
    """
    questions = [q for data in labels.values() for q in data["questions"]]
    types = {number: name for data in labels.values() for name, number in data["question_type"].items()}
    answered = {str(i) for i, _, _ in answers_of(args.answers)}
    kinds = {q["data_type"] for q in questions if args.official or str(q["question_id"]) in answered}
    asked = [q for q in questions if q["data_type"] in kinds or not kinds]
    texts = texts_of(args, [q["question_id"] for q in asked], missing_ok=args.official)
    write_upload(args, [{"question_id": q["question_id"], "prediction": t or ""} for q, t in zip(asked, texts)], lines=True)
    scores = {"image": None, "video": None, "all": None, "unparsed": (sum(t not in LETTERS for t in texts), len(texts))}
    scores |= tally((key, t == q["answer"]) for q, t in zip(asked, texts)
                    for key in ("all", q["data_type"], types[q["question_type_id"]]))
    if left_out := {q["data_type"] for q in questions} - kinds:
        scores["all"] = None
    return scores, [f"no answers to {kind} questions, so all is undefined" for kind in left_out]


def choice_of(text, options):
    """MMMU's choice, or None: "(A)", else "A ", else "A.", else an option's text in a longer answer; the last one counts."""
    for sign in ",.!?;:'":
        text = text.strip(sign)
    text, letters = f" {text} ", [chr(65 + i) for i in range(len(options))]
    for form in ("({})", "{} ", "{}."):
        places = {letter: text.rfind(form.format(letter)) for letter in letters if form.format(letter) in text}
        if places:
            return max(places, key=places.get)
    places = {letter: text.lower().rfind(option.lower()) for letter, option in zip(letters, options)}
    return max(places, key=places.get) if len(text.split()) > 5 and max(places.values()) >= 0 else None


NUMBERS = (r"-?\b\d{1,3}(?:,\d{3})+\b", r"-?\d+(?:\.\d+)?[eE][+-]?\d+", r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])")
KEY_WORDS = ["could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result "]


def values_of(text):
    """MMMU's normal form of an open answer: a number with two decimals, else lower case; a single letter needs a neighbour."""
    try:
        return [round(float(text.strip().replace(",", "")), 2)]
    except ValueError:
        text = text.strip().lower()
        return [" " + text, text + " "] if len(text) == 1 else [text]


def open_right(text, truths):
    """MMMU's open questions: what follows the key words of a line (the shortest such piece), or else all, holds a truth."""
    whole, parts = text.strip().strip(".").lower(), []
    lines = whole.split("\n")
    for line in lines:
        shortest = ""
        for mark in KEY_WORDS + ["="] * (line is lines[-1]):
            tail = line.split(mark)[-1].strip()
            if mark in line and (not shortest or len(tail) < len(shortest)):
                shortest = tail
        parts += [shortest] * (shortest not in ["", *":,.!?;'"])
    parts = parts or [whole]
    parts += [number for part in parts for form in NUMBERS for number in re.findall(form, part)]
    said, truths = ([value for part in some for value in values_of(part)] for some in (parts, truths))
    return any(t in s if isinstance(s, str) and isinstance(t, str) else t == s for s in said for t in truths)


def mmmu(args, labels):
    """MMMU (validation): choices and open questions by the official parsers. --labels: the rows of the data set as JSON.

    OFFICIAL: a choice that cannot be read is drawn at random (--official); here it is wrong and counted.
    """
    rows, rng, pairs = [row for data in labels.values() for row in data], random.Random(args.seed), []

    def listed(cell):
        try:
            return ast.literal_eval(cell) if isinstance(cell, str) and cell.startswith("[") else cell
        except (SyntaxError, ValueError):                # "[0, 5)" is an answer
            return cell

    for row, text in zip(rows, texts_of(args, [row["id"] for row in rows])):
        truth, options, unread = listed(row["answer"]), listed(row["options"]), False
        truths = truth if isinstance(truth, list) else [truth]
        if row["question_type"] == "multiple-choice":
            said = choice_of(text, options)
            unread = said is None
            right = (rng.choice("ABCDEFGHIJ"[:len(options)]) if unread and args.official else said) in truths
        else:
            right = open_right(text, truths)
        pairs += [("accuracy", right), ("unparsed", unread), (re.sub(r"^[^_]+_(.+)_\d+$", r"\1", row["id"]), right)]
    return tally(pairs), []


def mathvista(args, labels):
    """MathVista (testmini), as far as no language model must read the answer: a choice, its letter (OURS), a number.

    The rest is unparsed and counts as wrong, so `accuracy` is a lower bound; the benchmark has GPT read it.
    """
    problems, pairs = {k: v for data in labels.values() for k, v in data.items()}, []
    for p, text in zip(problems.values(), texts_of(args, list(problems))):
        choices, letter, said = p.get("choices") or [], re.fullmatch(r"\(?([A-Z])\)?[.:]?", text.strip()), None
        try:
            if p["question_type"] == "multi_choice":
                said = text if text in choices else choices[ord(letter[1]) - 65] if letter else None
            elif p["answer_type"] == "integer":
                said = str(int(text))
            elif p["answer_type"] == "float":
                said = str(round(float(text), int(p["precision"])))
        except (ValueError, IndexError):
            pass                                         # no number, no such choice
        pairs += [("accuracy", said is not None and said.strip() == str(p["answer"]).strip()), ("unparsed", said is None)]
    return tally(pairs), ["unparsed answers are counted as wrong"]


# ---------------------------------------------------------------------------------------------------------------------
# ScienceQA (Sec. 5.2)


def letter_of(text):
    """The answer's letter: it is all of the text; it begins it, "B. ..."; "The answer is B." occurs exactly once. Else None."""
    if text in LETTERS:
        return text
    if text[:1] in LETTERS and text[1:3] == ". ":
        return text[0]
    found = re.findall(r"The answer is ([A-Z]).", text)  # OFFICIAL: any character will do for the full stop
    return found[0] if len(found) == 1 else None


def columns_of(problem):
    """The columns of Table 7 in which a problem counts; with a hint and a picture it is in TXT and in IMG."""
    subject = {"natural science": "NAT", "social science": "SOC", "language science": "LAN"}[problem["subject"]]
    context = ["TXT"] * bool(problem["hint"]) + ["IMG"] * bool(problem["image"]) or ["NO"]
    return [subject, *context, "G1-6" if int(problem["grade"].removeprefix("grade")) <= 6 else "G7-12", "AVG"]


def problems_of(args, labels):
    """problems.json and pid_splits.json, in any order -> (problems, the ids of --split)"""
    problems, splits = sorted(labels.values(), key=lambda data: "test" in data) if len(labels) == 2 else ({}, {})
    if args.split not in splits:
        raise ValueError(f"--labels: problems.json and pid_splits.json with {args.split!r} are needed; found {list(labels)}")
    pids = splits[args.split]
    if lacking := [pid for pid in pids if pid not in problems]:
        raise ValueError(f"--labels: {len(lacking)} of {len(pids)} problems of {args.split} are not there, e.g. {lacking[:3]}")
    return problems, pids


def letters_of(path, pids, missing_ok=False):
    """{id: letter, None if there is none in the text, "" if there is no text} of an answers file."""
    found = [(str(i), text) for i, _, text in answers_of(path)]
    texts = match(pids, found, path, missing_ok=missing_ok)
    return {pid: "" if text is None else letter_of(text) for pid, text in zip(pids, texts)}


def scienceqa(args, labels):
    """ScienceQA (Table 7): accuracy by subject, context and grade. --second is another model: `complement` takes its answers,
    and ours where it gave none. --requery are its verdicts on the problems where the two differ: `judge`.

    OFFICIAL: where no letter, or no choice of the problem, was named, the first scripts draw one, and once more for the stored
    `results`, from which Table 7 is made. With --official: these if the file has them, else random. Here: wrong, and counted.
    """
    problems, pids = problems_of(args, labels)
    rng, notes = random.Random(args.seed), []

    def index(pid, letter):
        choices = LETTERS[:len(problems[pid]["choices"])]
        drawn = args.official and letter != ""           # OFFICIAL: a problem that was not answered is wrong
        return choices.index(letter) if letter in choices else rng.randrange(len(choices)) if drawn else -1

    def accuracy(picks):
        return sum(problems[pid]["answer"] in picks[pid] for pid in pids), len(pids)

    letters = letters_of(args.answers, pids, missing_ok=args.official)
    ours, file = {pid: index(pid, letter) for pid, letter in letters.items()}, read(args.answers)
    if args.official and isinstance(file, dict) and "results" in file:
        ours = {pid: int(file["results"].get(pid, -1)) for pid in pids}
    scores = dict.fromkeys(PUBLISHED["scienceqa"][0].split())
    scores |= tally((key, ours[pid] == problems[pid]["answer"]) for pid in pids for key in columns_of(problems[pid]))
    scores["unparsed"] = (sum(not letter for letter in letters.values()), len(pids))
    if beyond := sum(letter not in ["", None, *LETTERS[:len(problems[pid]["choices"])]] for pid, letter in letters.items()):
        notes.append(f"{beyond} answers name a letter that their problem does not have")
    if args.second:
        second = letters_of(args.second, pids, missing_ok=args.official)
        theirs = {pid: index(pid, letter) if letter else ours[pid] for pid, letter in second.items()}
        scores["complement"] = accuracy({pid: [theirs[pid]] for pid in pids})
        scores["upper_bound"] = accuracy({pid: [theirs[pid], ours[pid]] for pid in pids})
        notes.append(f"second answers: {sum(not letter for letter in second.values())} unparsed")
    if args.requery:
        if not args.second:
            raise ValueError("--requery decides between --answers and --second; --second is missing")
        verdicts = letters_of(args.requery, pids, missing_ok=True)
        final = ours | {pid: index(pid, letter) for pid, letter in verdicts.items() if letter}
        scores["judge"] = accuracy({pid: [final[pid]] for pid in pids})
        differ = [pid for pid in pids if letters[pid] != second[pid]]
        notes.append(f"the two differ on {len(differ)}; {sum(not verdicts[pid] for pid in differ)} of these have no verdict")
    return scores, notes


def science_turn(problem, form):
    """One problem as (question, answer), in the format INPUT-OUTPUT: Q question, C context, M options; L lecture, E solution,
    A answer, in that order: LEA reasons first, ALE answers first (Table 8). LEPA is the first release's, `letter` LLaVA-1.5's.

    OFFICIAL, kept: AL gives the solution and AE the lecture; double blanks are halved, once; every "Question: " of an input
    that begins with it is deleted, every "Answer: " of such an output.
    """
    letter, hint = LETTERS[problem["answer"]], problem["hint"].strip()
    choices = list(zip(LETTERS, problem["choices"]))
    if form == "letter":
        lines = [f"Context: {hint}"] * bool(hint) + [problem["question"]] + [f"{name}. {choice}" for name, choice in choices]
        return "\n".join(lines).replace("  ", " ").strip() + "\n" + BY_LETTER, letter
    Q, C = f"Question: {problem['question']}\n", f"Context: {hint or 'N/A'}\n"
    M, A = "Options: " + " ".join(f"({name}) {choice}" for name, choice in choices), f"The answer is {letter}."
    L, E = (problem[key].replace("\\n", "\n") for key in ("lecture", "solution"))
    inputs = {"QCM": Q + C + M, "CQM": C + Q + M}
    outputs = {"A": A, "AL": f"{A} BECAUSE: {E}", "AE": f"{A} BECAUSE: {L}", "ALE": f"{A} BECAUSE: {L} {E}",
               "AEL": f"{A} BECAUSE: {E} {L}", "LA": f"{L} {A}", "EA": f"{E} {A}", "LEA": f"{L} {E} {A}", "ELA": f"{E} {L} {A}"}
    outputs = {name: f"Answer: {text}" for name, text in outputs.items()} | {
        "LEPA": f"LECTURE: {L}\n" * bool(L.strip()) + f"SOLUTION: {E}\n" * bool(E.strip()) + f"###\nANSWER: {letter}."}
    before, _, after = form.partition("-")
    if before not in inputs or after not in outputs:
        raise ValueError(f"--format {form}: {' or '.join(inputs)}, a dash, and one of {', '.join(outputs)}; or letter")
    question, answer = inputs[before].replace("  ", " ").strip(), outputs[after].replace("  ", " ").strip()
    if answer.endswith("BECAUSE:"):
        answer = answer.replace("BECAUSE:", "").strip()
    drop = lambda text, head: text.replace(head, "") if text.startswith(head) else text
    return drop(question, "Question: "), drop(answer, "Answer: ")


def scienceqa_data(args):
    """ScienceQA's official files as LLaVA's training JSON (--out) and as questions to answer (--questions)."""
    problems, pids = problems_of(args, read_labels(args, "problems.json", "pid_splits.json"))
    if not (args.out or args.questions) or bool(args.answers) != bool(args.second):
        raise ValueError("--out FILE or --questions FILE is needed; --answers and --second go together")
    turns = {pid: science_turn(problems[pid], args.format) for pid in pids}
    if args.second:                                      # OURS: the wording in which the paper asks GPT-4 again is not known
        words = Path(__file__).resolve().parent.joinpath("prompts", "scienceqa", "requery.txt").read_text().strip()
        first, second = ({str(i): text for i, _, text in answers_of(path)} for path in (args.answers, args.second))
        letters = letters_of(args.answers, pids), letters_of(args.second, pids)
        turns = {pid: (words.format(question=question, first=first[pid], second=second[pid]), answer)
                 for pid, (question, answer) in turns.items() if letters[0][pid] != letters[1][pid]}
    records, questions = [], []
    for pid, (question, answer) in turns.items():
        picture = {"image": f"{pid}/{problems[pid]['image']}"} if args.images and problems[pid]["image"] else {}
        both = f"{IMAGE}\n{question}" if args.format == "letter" else f"{question}\n{IMAGE}"
        records.append({"id": pid, **picture, "conversations": [
            {"from": "human", "value": both if picture else question}, {"from": "gpt", "value": answer}]})
        questions.append({"question_id": pid, **picture, "text": question, "category": problems[pid]["subject"]})
    if args.out:
        judge.write_whole(args.out, json.dumps(records, indent=1) + "\n")
    if args.questions:
        write_lines(Path(args.questions), questions)
    print(f"{len(records):,} problems of {args.split} ({sum('image' in r for r in records):,} with a picture), {args.format}: "
          + ", ".join(filter(None, (args.out, args.questions))))


# ---------------------------------------------------------------------------------------------------------------------
# Short answers: VQAv2, TextVQA, VizWiz, GQA

MARKS, SERVER_MARKS = ';/[]"{}()=+\\_-><@`,?!', ";:/'[]\"()=+\\_><@`,?"
DIGITS = dict(zip("none zero one two three four five six seven eight nine ten".split(), "0 0 1 2 3 4 5 6 7 8 9 10".split()))
CONTRACTIONS = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
    how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock
    oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
    someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
    they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd
    where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all
    y'all'll y'all'd've you'd you'd've you'll you're you've""".split()
CONTRACTED = {word[:i] + word[i + 1:]: word for word in CONTRACTIONS for i, sign in enumerate(word) if sign == "'"} | {
    "somebody'd": "somebodyd"}           # any one apostrophe may be lacking; OFFICIAL: the last stands there like this


def punctuate(text, marks=MARKS):
    """A mark goes where one of its kind has a blank beside it, or a comma stands between digits; else it becomes a blank.

    OFFICIAL: a mistyped look-behind, so a full stop is saved only by a digit behind it; at most 32 of them go.
    """
    gone = re.search(r"\d,+\d", text)
    new = {mark: "" if gone or f"{mark} " in text or f" {mark}" in text else " " for mark in marks if mark in text}
    return re.sub(r"\.(?!\d)", "", text.translate(str.maketrans(new)), count=32)


def plain_words(text):
    """Number words as digits, no articles, contractions with their apostrophes, single blanks."""
    words = [DIGITS.get(word, word) for word in text.lower().split()]
    return " ".join(CONTRACTED.get(word, word) for word in words if word not in ("a", "an", "the"))


@functools.cache
def normalise(text):
    """A short answer in the form in which the VQA benchmarks compare it: "Two dogs." -> "2 dogs"."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return plain_words(punctuate(text.replace("\n", " ").replace("\t", " ").strip()))


def vqa_accuracy(text, label, official=False):
    """min(1, matches / 3), averaged over the ten sets of nine humans: 0, 0.3, 0.6, 0.9 or 1.

    `official`: as on the servers of VQAv2 and VizWiz. Human answers stay as they are if all ten agree and only lose their
    punctuation otherwise; the normalised prediction runs through the server's own steps, with its own list of marks.
    """
    humans = [a["answer"] if isinstance(a, dict) else a for a in label["answers"]]
    if len(humans) != 10:
        raise ValueError(f"VQA's accuracy is defined for ten human answers, a label has {len(humans)}: {humans}")
    said = normalise(text)
    if official:
        said = plain_words(punctuate(said, SERVER_MARKS))
        humans = humans if len(set(humans)) == 1 else [punctuate(human, SERVER_MARKS) for human in humans]
    else:
        humans = [normalise(human) for human in humans]
    return (0, 0.3, 0.6, 0.9, 1)[min(4, humans.count(said))]


def rows_of(args, rows):
    """The rows of --labels; ValueError if there are none."""
    if args.labels and not rows:
        raise ValueError(f"{' '.join(args.labels)}: there are no labels in it")
    return rows


def vqav2(args, labels):
    """VQAv2: --upload for the server, which wants all of `--questions`: those without answer are empty there, and counted.
    With --labels, the annotations of a public split: the accuracy."""
    labels = rows_of(args, [row for data in labels.values() for row in data["annotations"]])
    ids = [row["question_id"] for row in labels or (read(args.questions) if args.questions else ())]
    ids = ids or list(dict.fromkeys(i for i, _, _ in answers_of(args.answers)))
    if len(set(ids)) < len(ids):
        raise ValueError(f"{args.questions or args.labels}: {len(ids) - len(set(ids))} ids occur more than once")
    texts = texts_of(args, ids, missing_ok=not labels)
    write_upload(args, [{"question_id": i, "answer": normalise(text or "")} for i, text in zip(ids, texts)])
    return (tally(("accuracy", vqa_accuracy(text, row, args.official)) for text, row in zip(texts, labels)),
            [f"{texts.count(None):,} of {len(texts):,} questions have no answer and are left empty"] * (None in texts))


def textvqa(args, labels):
    """TextVQA (validation): found by picture and question. LLaVA-1.5's prompts hold a line `Reference OCR token: ...`; without
    it, it is another setting."""
    answers, labels = answers_of(args.answers), rows_of(args, [row for data in labels.values() for row in data["data"]])
    if not any(prompt for _, prompt, _ in answers):
        raise ValueError(f"{args.answers}: TextVQA's answers are found by picture and prompt, and none has a prompt")
    key = "question_id" if str(answers[0][0]) in {str(row["question_id"]) for row in labels} else "image_id"
    asked = [(row[key], row["question"].lower()) for row in labels] or list(dict.fromkeys((i, bare(p)) for i, p, _ in answers))
    texts = match([(str(i), bare(question).lower()) for i, question in asked],
                  [((str(i), bare(prompt).lower()), text) for i, prompt, text in answers], args.answers)
    ids = [row["question_id"] for row in labels] or [i for i, _ in asked]
    write_upload(args, [{"question_id": i, "answer": normalise(text)} for i, text in zip(ids, texts)])
    with_ocr = sum("Reference OCR token:" in prompt for _, prompt, _ in answers)
    return (tally(("accuracy", vqa_accuracy(text, row)) for text, row in zip(texts, labels)),
            [f"{with_ocr:,} of {len(answers):,} prompts hold OCR tokens"])


def vizwiz(args, labels):
    """VizWiz: question_id is the place in the official annotations, or as `--questions` has it. --upload is for the server;
    with answers in --labels (validation): the accuracy, and that on the questions of type unanswerable."""
    labels = [row for data in labels.values() for row in data]
    asked = [{"question_id": i, "image": row["image"], "text": row["question"]} for i, row in enumerate(labels)]
    if args.questions:
        asked = read(args.questions)
    elif not labels:                                     # the test split; its pictures are numbered as its questions
        asked = [{"question_id": i, "image": f"VizWiz_test_{int(i):08}.jpg", "text": prompt}
                 for i, prompt in dict.fromkeys((i, prompt) for i, prompt, _ in answers_of(args.answers))]
    texts = texts_of(args, [(q["question_id"], q["text"]) for q in asked])
    upload = [{"image": q["image"], "answer": normalise(text)} for q, text in zip(asked, texts)]
    if not labels or "answers" not in labels[0]:
        write_upload(args, upload)
        return {}, ["there are no human answers: the server scores"]
    texts = match([row["image"] for row in labels], [(q["image"], text) for q, text in zip(asked, texts)], "labels")
    write_upload(args, upload)
    scores = tally((key, right) for text, row in zip(texts, labels) for right in [vqa_accuracy(text, row, args.official)]
                   for key in ["accuracy"] + ["unanswerable"] * (row.get("answer_type") == "unanswerable"))
    return {"accuracy": scores["accuracy"], "unanswerable": scores.get("unanswerable")}, []


def gqa(args, labels):
    """GQA: lower case and without full stops at its end, the answer equals the label; over the balanced questions."""
    said = [(str(i), text.rstrip(".").lower()) for i, _, text in answers_of(args.answers)]
    labels = {i: q for data in labels.values() for i, q in data.items()}
    asked = rows_of(args, [i for i, q in labels.items() if q["isBalanced"]])
    match(dict.fromkeys(i for i, _ in said), said, args.answers)                             # each once
    others = labels.keys() - set(asked)
    texts = match(asked, [(i, text) for i, text in said if i not in others], args.answers) if labels else []
    write_upload(args, [{"questionId": i, "prediction": text} for i, text in said])
    return tally((key, text == q["answer"]) for text, q in zip(texts, map(labels.get, asked))
                 for key in ("accuracy", "open" if q["types"]["structural"] == "query" else "binary")), []


# ---------------------------------------------------------------------------------------------------------------------
# The commands


def write_upload(args, rows, lines=False):
    if args.upload:
        judge.write_whole(args.upload, "".join(json.dumps(row) + "\n" for row in rows) if lines else json.dumps(rows))


def write_sheet(path, rows):
    if path.endswith(".xlsx"):
        book, control = openpyxl().Workbook(), re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff]")
        if n := sum(bool(control.search(cell)) for row in rows for cell in row if isinstance(cell, str)):
            print(f"note: {n} cells hold characters that no .xlsx can hold; each of these is a ? there")
        for row in rows:
            book.active.append([control.sub("?", cell) if isinstance(cell, str) else cell for cell in row])
            for cell in book.active[book.active.max_row]:
                cell.data_type = "n" if isinstance(cell.value, int) else "s"         # "=..." is an answer, no formula
        book.save(path)
    else:
        sheet = io.StringIO(newline="")
        csv.writer(sheet, delimiter="\t", lineterminator="\n").writerows(rows)
        judge.write_whole(path, sheet.getvalue())


def wilson(right, n, z=1.96):
    """The 95% interval of an accuracy, in percent."""
    p, centre = right / n, (right + z * z / 2) / (n + z * z)
    half = z / (1 + z * z / n) * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    return 100 * max(0.0, centre - half), 100 * min(1.0, centre + half)


def print_table(name, scores):
    """Ours with its 95% interval, and beside it the published rows; a line for each key, or where many are published, model."""
    keys, published = PUBLISHED.get(name, ("", {}))
    published = {model: dict(zip(keys.split(), values.split())) for model, values in published.items()}
    show = lambda x: "undefined" if x is None else f"{x:.2f}"
    rows = [[name, "ours", "low", "high", *published]]
    for key, value in scores.items():
        interval = map(show, wilson(*value)) if isinstance(value, tuple) else ("-", "-")
        rows.append([key, show(percent(value)), *interval, *(values.get(key, "-") for values in published.values())])
    rows = list(zip(*rows)) if len(published) > 4 else rows
    widths = [max(map(len, column)) for column in zip(*rows)]
    for first, *rest in rows:
        print("  ".join([first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(rest, widths[1:]))]))
    print("low, high: 95% interval (Wilson)" + "; the others as published" * bool(published))


@dataclass(frozen=True)
class Score:
    answers: str = None                  # JSON lines of question_id and text, as `answer` writes them
    labels: list[str] = ()               # the official label files, or their folder
    questions: str = None                # what was asked: pope (for the splits), vqav2 and vizwiz (for the upload)
    second: str = None                   # scienceqa: another model's answers
    requery: str = None                  # scienceqa: its verdicts where the two differ
    split: str = "test"                  # scienceqa: of pid_splits.json
    official: bool = False               # the published arithmetic
    seed: int = 0                        # of its random choices
    json: str = None                     # file for the unrounded numbers
    upload: str = None                   # file for the benchmark's server


SCORERS = {                              # the scorer, and what its label files are called
    "pope": (pope, "*pope_*.json"), "mme": (mme, "*.txt"), "mmbench": (mmbench, "*.tsv"),
    "seed_bench": (seed_bench, "SEED*.json"), "scienceqa": (scienceqa, "problems.json", "pid_splits.json"),
    "vqav2": (vqav2, "*annotations.json"), "textvqa": (textvqa, "TextVQA*.json"), "vizwiz": (vizwiz, "*.json"),
    "gqa": (gqa, "*questions.json"), "mmmu": (mmmu, "*.json", "*.jsonl"), "mathvista": (mathvista, "*.json")}
UPLOADS = ("mmbench", "seed_bench", "vqav2", "textvqa", "vizwiz", "gqa")       # the last four without labels, too


def score(name, args):
    """Score one benchmark: print the table, write --json and --upload."""
    scorer, *patterns = SCORERS[name]
    if args.upload and name not in UPLOADS:
        raise ValueError(f"--upload: {name} has no server; {', '.join(UPLOADS)} have one")
    if not args.labels and not (args.upload and name in UPLOADS[2:] and not args.json):
        raise ValueError(f"--labels: {name} needs {' and '.join(patterns)}, or the folder with it")
    try:
        scores, notes = scorer(args, read_labels(args, *patterns))
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{name}: {' '.join(args.labels)} or --questions is not in the official form "
                         f"({type(error).__name__}: {error})") from error
    if scores:
        print_table(name, scores)
    for note in notes + ["--official: the published arithmetic"] * args.official:
        print(f"note: {note}")
    if args.json:
        judge.write_whole(args.json, json.dumps({key: percent(value) for key, value in scores.items()}, indent=1) + "\n")


@dataclass(frozen=True)
class MMBench:
    labels: list[str]                    # the official TSV, which holds the questions, too
    questions: str                       # JSON lines to write
    images: str                          # folder to write the pictures to


@dataclass(frozen=True)
class ScienceQA:
    labels: list[str]                    # problems.json and pid_splits.json, or their folder
    split: str = "train"                 # of pid_splits.json
    format: str = "QCM-LEA"              # QCM or CQM, then LEA, LEPA, A, ...; or letter, LLaVA-1.5's
    images: bool = True                  # --no-images leaves the pictures out, for a model that only reads
    out: str = None                      # JSON to train on
    questions: str = None                # JSON lines to answer
    answers: str = None                  # with --second: only the problems on which two models differ, to be asked again
    second: str = None                   # the other model's answers


@dataclass(frozen=True)
class Answer:
    model: str                           # checkpoint folder
    questions: str                       # JSON lines of question_id, image, text
    answers: str                         # JSON lines to write; an unfinished file is gone on with
    images: str = "."                    # folder of the questions' images
    temperature: float = 0.0             # greedy, as all published evaluations; LLaVA-Bench's first answers had 0.2
    seed: int = 0
    max_new_tokens: int = 1024           # for a word or a letter, 16 will do
    batch_size: int = 16                 # questions answered at once
    template: str = None                 # for a checkpoint that does not name its own
    device: str = "auto"                 # cuda, mps or cpu
    dtype: str = "auto"                  # bf16, fp16 or fp32


def answer(args):
    """Answer a file of questions."""
    import sample                        # only here: scoring needs no torch
    config = sample.Config(**asdict(args))
    sample.answer_file(sample.Talker(config), config)


COMMANDS = {"answer": (Answer, answer), "scienceqa_data": (ScienceQA, scienceqa_data), "mmbench_data": (MMBench, mmbench_data),
            "judge": (judge.Review, judge.review), "calibrate": (judge.Calibrate, judge.calibrate),
            "score llava_bench": (judge.LLaVABench, judge.score_llava_bench),
            "grade_mm_vet": (judge.GradeMMVet, judge.grade_mm_vet), "score mm_vet": (judge.MMVet, judge.score_mm_vet)}


def arguments(argv):
    """A command line -> (function, its configuration)"""
    n = 2 if argv[:1] == ["score"] else 1
    name = " ".join(argv[:n])
    if name.startswith("score ") and argv[1] in SCORERS:
        return functools.partial(score, argv[1]), Score(**typed_flags(Score, argv[n:], SCORERS[argv[1]][0].__doc__))
    if name not in COMMANDS:
        raise ValueError(f"{name or 'nothing'}: a command comes first: {', '.join(COMMANDS)}, or score and one of "
                         f"{', '.join(SCORERS)}; -h explains them")
    config, run = COMMANDS[name]
    return run, in_range(config(**typed_flags(config, argv[n:], run.__doc__, {"judge": ["api", "script"]})))


def main(argv=None):
    run_command(__doc__, arguments, argv)


if __name__ == "__main__":
    gc.disable()                         # millions of small objects and no garbage: looking for it would take half of the time
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; every answer and reply so far is kept: run the same command again, it goes on")
