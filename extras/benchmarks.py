"""
The benchmarks of LLaVA-1.5 (Diss. Sec. 4.5): answers and official labels in, numbers out.

    python eval.py answer --model DIR --questions q.jsonl --images DIR --answers a.jsonl
    python -m extras.benchmarks score pope --answers a.jsonl --questions q.jsonl --labels coco
    python -m extras.benchmarks mmbench_data --labels dev.tsv --questions q.jsonl --images DIR

names: pope mme mmbench seed_bench vqav2 textvqa vizwiz gqa mmmu mathvista; -h behind a name tells
its rules. A scorer takes what the label files hold, finds the answer to each label, and returns
scores {name: (right, n) or a number} and notes. Missing, doubled and foreign answers are an error,
never a number. What cannot be read is wrong, and counted. --official is the published arithmetic
wherever it does something else: random choices, pairs by position, the servers' rules.
"""
import ast
import base64
import csv
import io
import os
import random
import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from extras.published import normalise, server_matches, texts_by_position
from parts.files import read_json, run_command, run_main, write_json, write_lines, write_text
from parts.scienceqa import BY_LETTER, LETTERS
from parts.scoring import examples, layout, percent, score_rows

# What was published, under the names of our scores.
PUBLISHED = {
    "pope": ("random.f1 popular.f1 adversarial.f1 f1", {
        "LLaVA-1.5-7B": "87.3 86.1 84.2 85.9", "13B": "87.1 86.2 84.5 85.9"}),
    "mme": ("perception", {"LLaVA-1.5-7B": "1510.7", "13B": "1531.3"}),
    "mmbench": ("circular", {
        "LLaVA-1.5-7B": "64.3", "13B": "67.7", "7B on CN": "58.3", "13B on CN": "63.6"}),
    "seed_bench": ("image video all", {
        "LLaVA-1.5-7B": "66.1 37.3 58.6", "13B": "68.2 42.7 61.6"}),
    "vqav2": ("accuracy", {"LLaVA-1.5-7B, test-dev": "78.5", "13B": "80.0"}),
    "gqa": ("accuracy", {"LLaVA-1.5-7B": "62.0", "13B": "63.3"}),
    "vizwiz": ("accuracy", {"LLaVA-1.5-7B, test": "50.0", "13B": "53.6"}),
    "textvqa": ("accuracy", {"LLaVA-1.5-7B, with OCR": "58.2", "13B": "61.3"}),
    "mmmu": ("accuracy", {"LLaVA-1.5-13B": "36.4"}),
    "mathvista": ("accuracy", {"LLaVA-1.5-13B": "27.6"})}


@dataclass(frozen=True)
class Benchmark:
    answers: str                         # JSON lines of question_id and text; a result sheet
    labels: list[str] = ()               # the official label files, or their folder
    questions: str = None                # what was asked: pope's splits; uploads of vqav2, vizwiz
    official: bool = False               # the published arithmetic
    seed: int = 0                        # of its random choices
    json: str = None                     # a file for the unrounded numbers
    upload: str = None                   # a file for the benchmark's server


# --------------------------------------------------------------------------------------------------
# Files


def read_rows(path):
    """The rows of a sheet (.tsv, .xlsx) as dicts, of a .txt as lists of cells, or JSON records."""
    if not os.path.isfile(path):
        raise FileNotFoundError(f"{path}: no such file")
    if path.endswith(".xlsx"):
        rows = read_workbook(path)
    elif path.endswith(".tsv"):
        csv.field_size_limit(2 ** 31 - 1)      # MMBench keeps its pictures in the sheet
        with open(path, encoding="utf-8-sig", newline="") as f:
            rows = list(csv.DictReader(f, delimiter="\t"))
    elif path.endswith(".txt"):
        lines = Path(path).read_text(encoding="utf-8-sig").split("\n")
        rows = [line.rstrip("\r").split("\t") for line in lines if line.strip()]
    else:
        rows = list(read_json(path))
    if not rows:
        raise ValueError(f"{path}: it is empty")
    return rows


def import_openpyxl():
    try:
        import openpyxl
    except ImportError as error:
        raise ValueError(".xlsx needs openpyxl (pip install openpyxl); or take .tsv") from error
    return openpyxl


def read_workbook(path):
    """The first sheet of an .xlsx as dicts of text."""
    book = import_openpyxl().load_workbook(path, read_only=True)
    head, *rows = book.active.iter_rows(values_only=True)
    texts = [["" if cell is None else str(cell) for cell in row] for row in rows]
    return [dict(zip(head, row, strict=True)) for row in texts]


def read_labels(paths, pattern):
    """{path: rows} of the files of --labels; of a folder, those that are called like the official
    ones."""
    files = []
    for path in paths:
        found = [path]
        if os.path.isdir(path):
            found = sorted(map(str, Path(path).glob(pattern)))
        if not found:
            raise FileNotFoundError(f"--labels {path}: the folder has no {pattern}")
        files += found
    return {path: read_rows(path) for path in files}


def read_predictions(path):
    """[(id, prompt or "", text), ...] of an answers file, an upload or a result sheet."""
    predictions = []
    for i, row in enumerate(read_rows(path)):
        found = row if isinstance(row, dict) else {}
        names = [found[key] for key in ("question_id", "questionId", "index") if key in found]
        texts = [found[key] for key in ("text", "prediction", "answer") if key in found]
        if not names or not texts or not isinstance(texts[0], str):
            raise ValueError(f"{path}[{i}]: question_id and text are needed, "
                             f"found {str(row)[:100]}")
        predictions.append((str(names[0]), found.get("prompt") or "", texts[0]))
    return predictions


ADDED_LINES = ("Reference OCR token:", "When the provided information is")
ADDED_WORDS = ("Answer the question using a single word or phrase.", "Please answer yes or no.")


def bare_question(prompt):
    """The question in a prompt: without what LLaVA-1.5 adds to it, blanks made single."""
    lines = [line for line in prompt.split("\n") if not line.startswith(ADDED_LINES)]
    text = " ".join(lines)
    for words in ADDED_WORDS:
        text = text.replace(words, " ")
    return " ".join(text.split())


def match_answers(wanted, found, source, hint="", missing_ok=False):
    """The values of `found`, [(key, value), ...], in the order of the keys that are wanted.

    What is asked more than once is found in order. Raises ValueError, with counts and examples, for
    what is missing, doubled or unknown; with `missing_ok` a missing value is None.
    """
    left = defaultdict(list)
    for key, value in reversed(found):
        left[key].append(value)
    known = set(wanted)
    unknown = [key for key in left if key not in known]
    missing = []
    values = []
    for key in wanted:
        values.append(left[key].pop() if left.get(key) else None)
        if values[-1] is None and not missing_ok:
            missing.append(key)
    doubled = [key for key in known if left.get(key)]
    if missing or doubled or unknown:
        hint = hint or "Are these the answers to these questions, all of them, once each?"
        raise ValueError(
            f"{source}: of {len(wanted):,} questions and {len(found):,} answers {len(missing):,} "
            f"have no answer{examples(missing)}; {len(doubled):,} are answered too often"
            f"{examples(doubled)}; {len(unknown):,} are answered but not asked{examples(unknown)}. "
            f"{hint}")
    return values


def texts_by_id(config, ids, missing_ok=False):
    """The texts of --answers to these ids, in their order."""
    found = [(name, text) for name, _, text in read_predictions(config.answers)]
    return match_answers(list(map(str, ids)), found, config.answers, missing_ok=missing_ok)


def texts_by_question(config, asked):
    """The texts of --answers to [(id, question), ...]: for ids that do not tell questions apart."""
    wanted = [(str(i), bare_question(question).lower()) for i, question in asked]
    found = [((name, bare_question(prompt).lower()), text)
             for name, prompt, text in read_predictions(config.answers)]
    return match_answers(wanted, found, config.answers)


def all_rows(labels):
    """The rows of all label files."""
    return [row for rows in labels.values() for row in rows]


def tally(pairs):
    """[(name, is it right?), ...] -> {name: (right, n)}"""
    counts = {}
    for name, right in pairs:
        k, n = counts.get(name, (0, 0))
        counts[name] = (k + right, n + 1)
    return counts


# --------------------------------------------------------------------------------------------------
# Yes or no: POPE, MME


def says_yes(text):
    """OFFICIAL: all is yes but what has No, not or no among the words of its first sentence."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return not {"No", "not", "no"} & set(words)


def pope_measures(split, texts, truths):
    """POPE's five measures of one split; None where nothing can be divided by."""
    yes = [says_yes(text) for text in texts]
    true = [truth != "no" for truth in truths]
    pairs = list(zip(yes, true, strict=False))       # see the note on --official
    yes_count = sum(said for said, _ in pairs)
    true_count = sum(is_true for _, is_true in pairs)
    hits = pairs.count((True, True))
    agree = hits + pairs.count((False, False))
    return {f"{split}.f1": 200 * hits / (yes_count + true_count) if hits else None,
            f"{split}.accuracy": (agree, len(pairs)),
            f"{split}.precision": (hits, yes_count) if yes_count else None,
            f"{split}.recall": (hits, true_count) if true_count else None,
            f"{split}.yes": (yes_count, len(pairs))}


def score_pope(config, labels):
    """POPE: is there such a thing in the picture? F1 of yes in three splits, and its mean.

    --questions says which question is of which split. OFFICIAL: answers and labels are paired by
    position (--official), which is silently wrong with other label files than POPE's e3e39262.
    """
    if not config.questions:
        raise ValueError("--questions FILE is needed: it says which question is of which split")
    questions = read_rows(config.questions)
    splits = {}
    for path, rows in labels.items():
        name = re.search("random|popular|adversarial", Path(path).name)
        if not name or name[0] in splits:
            raise ValueError(f"{path}: one file each for random, popular and adversarial is "
                             "needed, called after its split")
        splits[name[0]] = rows
    others = {question["category"] for question in questions} - splits.keys()
    if others:
        raise ValueError(f"--labels: no labels of {', '.join(sorted(others))}, which was asked")
    if config.official:
        predictions = read_predictions(config.answers)
        texts = {split: texts_by_position(predictions, questions, split) for split in splits}
    else:
        texts = pope_texts(config, questions, splits)
    scores = {}
    notes = []
    for split, rows in splits.items():
        scores |= pope_measures(split, texts[split], [row["label"] for row in rows])
        if len(texts[split]) != len(rows):       # only --official does not look whether they fit
            notes.append(f"{split}: {len(texts[split])} answers and {len(rows)} labels, paired by "
                         "position, do not belong together")
    f1 = [scores.get(f"{split}.f1") for split in ("random", "popular", "adversarial")]
    scores["f1"] = None if None in f1 else sum(f1) / 3
    return scores, notes


def pope_texts(config, questions, splits):
    """{split: the texts to its labels}: found by question, and by picture and question."""
    texts = texts_by_question(config, [(q["question_id"], q["text"]) for q in questions])
    found = defaultdict(list)
    for question, text in zip(questions, texts, strict=True):
        key = (question["image"], bare_question(question["text"]))
        found[question["category"]].append((key, text))
    for split, rows in splits.items():
        wanted = [(row["image"], bare_question(row["text"])) for row in rows]
        found[split] = match_answers(wanted, found[split], f"labels of {split}", POPE_VERSION)
    return found


POPE_VERSION = ("The published scores belong to POPE's commit e3e39262: 2910 random, 3000 popular, "
                "3000 adversarial labels.")
PERCEPTION = ("existence", "count", "position", "color", "posters", "celebrity", "scene",
              "landmark", "artwork", "OCR")
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation",
             "code_reasoning")


def score_mme(config, labels):
    """MME: two yes/no questions a picture; a task has accuracy + share of pictures all right.

    The first four characters decide: a "yes" in them, else a "no", else it is wrong. --labels is
    the official tool's folder of TASK.txt: picture, question, label by tabs, two lines a picture.
    Perception is the sum of ten tasks, cognition of four.
    """
    keys = []
    truths = []
    for path, rows in labels.items():
        task = Path(path).stem
        for row in rows:
            truth = row[2].strip().lower() if len(row) > 2 else ""
            if task not in PERCEPTION + COGNITION or truth not in ("yes", "no"):
                raise ValueError(f"{path}: {row}; a line is picture, question, Yes or No, by tabs, "
                                 f"and the tasks are {', '.join(PERCEPTION + COGNITION)}")
            truths.append(truth)
            keys.append((task, row[0].split(".")[0], bare_question(row[1])))
    found = []
    for name, prompt, text in read_predictions(config.answers):      # an id is TASK/.../PICTURE
        task, *_, picture = name.split("/")
        found.append(((task, picture.split(".")[0], bare_question(prompt)), text.lower()[:4]))
    starts = match_answers(keys, found, config.answers)
    pictures = defaultdict(list)                 # {(task, picture): [right, right]}
    for (task, picture, _), start, truth in zip(keys, starts, truths, strict=True):
        said = "yes" if "yes" in start else "no" if "no" in start else "other"
        pictures[task, picture].append(said == truth)
    if any(len(rights) != 2 for rights in pictures.values()):
        raise ValueError("--labels: each picture needs two lines")
    acc = tally((task, right) for (task, _), rights in pictures.items() for right in rights)
    both = tally((task, all(rights)) for (task, _), rights in pictures.items())
    scores = {}
    for name, group in (("perception", PERCEPTION), ("cognition", COGNITION)):
        parts = [percent(acc[task]) + percent(both[task]) for task in group if task in acc]
        scores[name] = sum(parts) if len(parts) == len(group) else None
    for task in acc:
        scores[task] = percent(acc[task]) + percent(both[task])
        scores |= {f"{task}.acc": acc[task], f"{task}.acc_plus": both[task]}
    others = sum("yes" not in start and "no" not in start for start in starts)
    return scores, [f"{others} answers are neither yes nor no, and wrong"]


# --------------------------------------------------------------------------------------------------
# Multiple choice: MMBench, SEED-Bench, MMMU, MathVista

SIGNS = (" ", " .", " ,", " :", " )", " ).", "( )", "( ).", ": ", ": ,", ": .", ": )", ": ).")


def option_of(text, options):
    """The letter that a free answer means, by MMBench's rules, or None.

    It is the one bare letter among the words; else the one with such signs around it; else the one
    whose option the text holds. An A among more than three words may be an article.
    """
    words = text.split()
    for signs in SIGNS:
        found = [letter for letter in LETTERS if signs.replace(" ", letter) in words]
        may_be_article = signs == " " and "A" in words and len(words) > 3
        if len(found) == 1 and not may_be_article:
            return found[0]
    found = [letter for letter, option in options.items() if option.lower() in text.lower()]
    return found[0] if len(found) == 1 else None


def options_of(row):
    """{letter: option} of a row of MMBench's sheet; the official readers call an empty cell nan."""
    cells = {letter: row.get(letter) or "nan" for letter in "ABCD"}
    return {letter: cell for letter, cell in cells.items() if cell.lower() not in ("nan", "none")}


def score_mmbench(config, labels):
    """MMBench: `circular` counts a question only if each rotation of its options is right.

    The rotations are the rows index, index + 1,000,000, ... of the official TSV; `plain` looks at
    the first, `rows` at each by itself. OFFICIAL: what no rule understands goes to GPT, and at last
    to chance (--official: at once). --upload writes the result sheet, .tsv or .xlsx.
    """
    rows = all_rows(labels)
    texts = texts_by_id(config, [row["index"] for row in rows])
    if config.upload:
        write_sheet(config.upload, result_sheet(rows, texts))
    if not rows[0].get("answer"):
        return {}, ["the TSV holds no answers: a test split, which its server scores"]
    torn = [row["index"] for row in rows if not row["answer"] or not row["index"].isdigit()]
    if torn:
        raise ValueError(f"--labels: {len(torn)} of {len(rows)} rows have no answer or no number "
                         f"as index{examples(torn)}; is the file whole?")
    rng = random.Random(config.seed)
    groups = defaultdict(list)                   # {question: [(rotation, is it right?, row), ...]}
    pairs = []
    for row, text in zip(rows, texts, strict=True):
        letter = option_of(text, options_of(row))
        pairs.append(("unparsed", letter is None))
        if letter is None and config.official:
            letter = rng.choice(LETTERS)
        rotation, question = divmod(int(row["index"]), 10 ** 6)
        groups[question].append((rotation, letter == row["answer"], row))
        pairs.append(("rows", letter == row["answer"]))
    incomplete = 0
    for group in groups.values():
        _, plain, row = min(group, key=lambda turn: turn[0])
        circular = all(right for _, right, _ in group)
        pairs += [("plain", plain), ("circular", circular)]
        pairs += [(row[level], circular) for level in ("l2-category", "category") if row.get(level)]
        incomplete += len(group) < len(options_of(row))
    scores = tally(pairs)
    first = {name: scores.pop(name) for name in ("circular", "plain", "rows", "unparsed")}
    notes = []
    if incomplete:
        notes.append(f"{incomplete} of {len(groups)} questions have fewer rows than options: "
                     "circular is easier for them")
    return first | dict(sorted(scores.items())), notes


def result_sheet(rows, texts):
    """MMBench's result sheet: its columns without picture and categories, and `prediction`."""
    dropped = ("hint", "category", "source", "image", "comment", "l2-category", "answer", "split")
    before = [name for name in rows[0] if name not in dropped]
    after = [name for name in rows[0] if name in ("answer", "split")]
    sheet = [[*before, "prediction", *after]]
    for row, text in zip(rows, texts, strict=True):
        sheet.append([*[row[name] for name in before], text, *[row[name] for name in after]])
    return sheet


def write_sheet(path, sheet):
    """Write rows of text as .tsv or .xlsx. No .xlsx holds control characters: they become "?"."""
    if not path.endswith(".xlsx"):
        text = io.StringIO(newline="")
        csv.writer(text, delimiter="\t", lineterminator="\n").writerows(sheet)
        write_text(path, text.getvalue())
        return
    control = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff]")
    book = import_openpyxl().Workbook()
    replaced = 0
    for row in sheet:
        cells = [control.subn("?", cell) for cell in row]
        book.active.append([text for text, _ in cells])
        replaced += sum(count for _, count in cells)
        for cell in book.active[book.active.max_row]:
            cell.data_type = "s"                 # "=..." is an answer, no formula
    book.save(path)
    if replaced:
        print(f"note: {replaced} characters that no .xlsx can hold are ? there")


@dataclass(frozen=True)
class MMBenchData:
    labels: list[str]                    # the official TSV, which holds the questions, too
    questions: str                       # JSON lines to write
    images: str                          # folder to write the pictures to


def mmbench_data(config):
    """MMBench's sheet as questions, and its pictures as files, one for all rotations."""
    rows = all_rows(read_labels(config.labels, "*.tsv"))
    pictures = {row["index"]: row["image"] for row in rows}
    Path(config.images).mkdir(parents=True, exist_ok=True)
    questions = []
    for row in rows:
        name = f"{int(row['index']) % 10 ** 6}.jpg"
        picture = pictures.get(row["image"], row["image"])       # a cell may name another row
        Path(config.images, name).write_bytes(base64.b64decode(picture))
        options = options_of(row)
        lines = [row["question"]]
        if (row.get("hint") or "nan").lower() not in ("nan", "none"):
            lines.insert(0, row["hint"])
        for letter in "ABCD":
            if letter not in options:
                break                            # options end at the first gap
            lines.append(f"{letter}. {options[letter]}")
        chinese = re.search("[\u4e00-\u9fff]", row["question"])
        lines.append("请直接回答选项字母。" if chinese else BY_LETTER)
        text = "\n".join(lines)
        questions.append({"question_id": int(row["index"]), "image": name, "text": text})
    write_lines(config.questions, questions)
    print(f"{len(questions):,} questions in {config.questions}, pictures in {config.images}")


def score_seed_bench(config, labels):
    """SEED-Bench: the text must equal the letter. Images or videos may be left out altogether.

    OFFICIAL: a missing answer is a wrong one (--official).
    """
    questions = [question for data in all_rows(labels) for question in data["questions"]]
    types = {number: name for data in all_rows(labels)
             for name, number in data["question_type"].items()}
    answered = {name for name, _, _ in read_predictions(config.answers)}
    kinds = {question["data_type"] for question in questions
             if config.official or str(question["question_id"]) in answered}
    asked = [question for question in questions if question["data_type"] in kinds]
    texts = texts_by_id(config, [question["question_id"] for question in asked], config.official)
    pairs = []
    upload = []
    for question, text in zip(asked, texts, strict=True):
        right = text == question["answer"]
        kind = types[question["question_type_id"]]
        pairs += [("all", right), (question["data_type"], right), (kind, right)]
        pairs.append(("unparsed", text not in LETTERS))
        upload.append({"question_id": question["question_id"], "prediction": text or ""})
    if config.upload:
        write_lines(config.upload, upload)
    scores = {"image": None, "video": None} | tally(pairs)
    left_out = {question["data_type"] for question in questions} - kinds
    if left_out:
        scores["all"] = None
    return scores, [f"no answers to {kind} questions, so all is undefined" for kind in left_out]


def choice_named(text, options):
    """MMMU's choice, or None: "(A)", else "A ", else "A.", else an option in a longer answer.

    If several are named, the last one counts.
    """
    for sign in ",.!?;:'":
        text = text.strip(sign)
    text = f" {text} "
    letters = [chr(ord("A") + i) for i in range(len(options))]
    for form in ("({})", "{} ", "{}."):
        places = {letter: text.rfind(form.format(letter)) for letter in letters}
        last = max(letters, key=places.get)
        if places[last] >= 0:
            return last
    places = {letters[i]: text.lower().rfind(option.lower()) for i, option in enumerate(options)}
    last = max(letters, key=places.get)
    return last if len(text.split()) > 5 and places[last] >= 0 else None


NUMBERS = (r"-?\b\d{1,3}(?:,\d{3})+\b",
           r"-?\d+(?:\.\d+)?[eE][+-]?\d+",
           r"-?(?:\d+\.\d+|\.\d+|\d+\b)(?![eE][+-]?\d+)(?![,\d])")
KEY_WORDS = ("could be ", "so ", "is ", "thus ", "therefore ", "final ", "answer ", "result ")


def open_values(text):
    """MMMU's normal form of an open answer: [a number with two decimals], or lower case."""
    try:
        return [round(float(text.strip().replace(",", "")), 2)]
    except ValueError:
        text = text.strip().lower()
        return [" " + text, text + " "] if len(text) == 1 else [text]     # a letter in words


def open_pieces(text):
    """Where MMMU looks for an open answer: behind a line's key words, the shortest such piece."""
    text = text.strip().strip(".").lower()
    lines = text.split("\n")
    pieces = []
    for number, line in enumerate(lines, 1):
        marks = KEY_WORDS + ("=",) if number == len(lines) else KEY_WORDS
        shortest = ""
        for mark in marks:
            tail = line.split(mark)[-1].strip()
            if mark in line and (not shortest or len(tail) < len(shortest)):
                shortest = tail
        if shortest not in ("", *":,.!?;'"):
            pieces.append(shortest)
    pieces = pieces or [text]
    numbers = []
    for piece in pieces:
        for form in NUMBERS:
            numbers += re.findall(form, piece)
    return pieces + numbers


def open_is_right(text, truths):
    """MMMU's open questions: a number equals a truth, or a piece holds it."""
    wanted = [value for truth in truths for value in open_values(truth)]
    for piece in open_pieces(text):
        for value in open_values(piece):
            for truth in wanted:
                if value == truth:
                    return True
                if isinstance(value, str) and isinstance(truth, str) and truth in value:
                    return True
    return False


def listed_value(cell):
    """A cell of MMMU's rows, in which a list is written as Python writes it."""
    try:
        return ast.literal_eval(cell) if isinstance(cell, str) and cell.startswith("[") else cell
    except (SyntaxError, ValueError):            # "[0, 5)" is an answer
        return cell


def score_mmmu(config, labels):
    """MMMU (validation): choices and open questions by the official parsers.

    --labels holds the rows of the data set as JSON. OFFICIAL: a choice that cannot be read is drawn
    at random (--official).
    """
    rows = all_rows(labels)
    rng = random.Random(config.seed)
    pairs = []
    texts = texts_by_id(config, [row["id"] for row in rows])
    for row, text in zip(rows, texts, strict=True):
        truth = listed_value(row["answer"])
        options = listed_value(row["options"])
        unread = False
        if row["question_type"] == "multiple-choice":
            letter = choice_named(text, options)
            unread = letter is None
            if unread and config.official:
                letter = rng.choice("ABCDEFGHIJ"[:len(options)])
            right = letter == truth
        else:
            right = open_is_right(text, truth if isinstance(truth, list) else [truth])
        subject = re.sub(r"^[^_]+_(.+)_\d+$", r"\1", row["id"])
        pairs += [("accuracy", right), ("unparsed", unread), (subject, right)]
    return tally(pairs), []


def value_named(problem, text):
    """MathVista's value of an answer that needs no reading, or None: a choice, its letter (OURS),
    an integer, a number with the problem's precision."""
    choices = problem.get("choices") or []
    letter = re.fullmatch(r"\(?([A-Z])\)?[.:]?", text.strip())
    try:
        if problem["question_type"] == "multi_choice":
            if letter and text not in choices:
                return choices[ord(letter[1]) - ord("A")]
            return text if text in choices else None
        if problem["answer_type"] == "integer":
            return str(int(text))
        if problem["answer_type"] == "float":
            return str(round(float(text), int(problem["precision"])))
    except (ValueError, IndexError):             # no number, no such choice
        return None
    return None


def score_mathvista(config, labels):
    """MathVista (testmini), as far as no language model must read the answer.

    The rest is unparsed and wrong, so accuracy is a lower bound; the benchmark has GPT read it.
    """
    problems = {name: problem for data in all_rows(labels) for name, problem in data.items()}
    pairs = []
    texts = texts_by_id(config, problems)
    for problem, text in zip(problems.values(), texts, strict=True):
        value = value_named(problem, text)
        pairs.append(("accuracy", value == str(problem["answer"]).strip()))
        pairs.append(("unparsed", value is None))
    return tally(pairs), ["unparsed answers are counted as wrong"]


# --------------------------------------------------------------------------------------------------
# Short answers: VQAv2, TextVQA, VizWiz, GQA


def vqa_accuracy(text, label, official=False):
    """min(1, matches / 3), averaged over the ten sets of nine humans: 0, 0.3, 0.6, 0.9 or 1."""
    humans = [a["answer"] if isinstance(a, dict) else a for a in label["answers"]]
    if len(humans) != 10:
        raise ValueError(f"VQA's accuracy is defined for ten human answers, found {humans}")
    if official:
        matches = server_matches(text, humans)
    else:
        matches = [normalise(human) for human in humans].count(normalise(text))
    return (0, 0.3, 0.6, 0.9, 1)[min(4, matches)]


def score_vqav2(config, labels):
    """VQAv2: the accuracy on a public split; without labels, all of --questions for the server.

    The questions that have no answer are empty in its file, and counted.
    """
    rows = [row for data in all_rows(labels) for row in data["annotations"]]
    asked = rows or read_rows(config.questions)
    texts = texts_by_id(config, [row["question_id"] for row in asked], missing_ok=not rows)
    upload = []
    pairs = []
    for row, text in zip(asked, texts, strict=True):
        upload.append({"question_id": row["question_id"], "answer": normalise(text or "")})
        if rows:
            pairs.append(("accuracy", vqa_accuracy(text, row, config.official)))
    write_upload(config, upload)
    return tally(pairs), [f"{texts.count(None):,} of {len(texts):,} questions have no answer"]


def score_textvqa(config, labels):
    """TextVQA (validation): found by picture and question, as LLaVA's ids are those of pictures.

    LLaVA-1.5's prompts hold a line `Reference OCR token: ...`; without it, it is another setting.
    """
    rows = [row for data in all_rows(labels) for row in data["data"]]
    predictions = read_predictions(config.answers)
    numbers = {str(row["question_id"]) for row in rows}
    key = "question_id" if predictions[0][0] in numbers else "image_id"
    texts = texts_by_question(config, [(row[key], row["question"]) for row in rows])
    pairs = []
    upload = []
    for row, text in zip(rows, texts, strict=True):
        pairs.append(("accuracy", vqa_accuracy(text, row)))
        upload.append({"question_id": row["question_id"], "answer": normalise(text)})
    write_upload(config, upload)
    with_ocr = sum("Reference OCR token:" in prompt for _, prompt, _ in predictions)
    return tally(pairs), [f"{with_ocr:,} of {len(predictions):,} prompts hold OCR tokens"]


def score_vizwiz(config, labels):
    """VizWiz: with human answers in the labels the accuracy, else a file for the server.

    A question_id is the place in the official annotations, or as --questions has it.
    """
    rows = all_rows(labels)
    asked = [(i, row["question"], row["image"]) for i, row in enumerate(rows)]
    if config.questions:
        asked = [(row["question_id"], row["text"], row["image"])
                 for row in read_rows(config.questions)]
    texts = texts_by_question(config, [(name, question) for name, question, _ in asked])
    images = [image for _, _, image in asked]
    write_upload(config, [{"image": image, "answer": normalise(text)}
                          for image, text in zip(images, texts, strict=True)])
    if not rows or "answers" not in rows[0]:
        return {}, ["there are no human answers: the server scores"]
    wanted = [row["image"] for row in rows]
    texts = match_answers(wanted, list(zip(images, texts, strict=True)), "--labels")
    pairs = []
    for row, text in zip(rows, texts, strict=True):
        right = vqa_accuracy(text, row, config.official)
        pairs.append(("accuracy", right))
        if row.get("answer_type") == "unanswerable":
            pairs.append(("unanswerable", right))
    return tally(pairs), []


def score_gqa(config, labels):
    """GQA: lower case and without full stops at its end, the answer equals the label.

    Only the balanced questions count; others may be answered.
    """
    questions = {name: question for data in all_rows(labels) for name, question in data.items()}
    predictions = read_predictions(config.answers)
    others = {name for name, question in questions.items() if not question["isBalanced"]}
    found = [(name, text) for name, _, text in predictions if name not in others]
    asked = [name for name in questions if name not in others]
    texts = match_answers(asked, found, config.answers)
    pairs = []
    for name, text in zip(asked, texts, strict=True):
        right = gqa_answer(text) == questions[name]["answer"]
        is_open = questions[name]["types"]["structural"] == "query"
        pairs += [("accuracy", right), ("open" if is_open else "binary", right)]
    write_upload(config, [{"questionId": name, "prediction": gqa_answer(text)}
                          for name, _, text in predictions])         # its server wants all of them
    return tally(pairs), []


def gqa_answer(text):
    return text.rstrip(".").lower()


def write_upload(config, rows):
    """Write what a benchmark's server takes, if --upload asks for it."""
    if config.upload:
        write_json(config.upload, rows, indent=None)


# --------------------------------------------------------------------------------------------------
# The commands

SCORERS = {                              # the scorer, and what its label files are called
    "pope": (score_pope, "*pope_*.json"),
    "mme": (score_mme, "*.txt"),
    "mmbench": (score_mmbench, "*.tsv"),
    "seed_bench": (score_seed_bench, "SEED*.json"),
    "vqav2": (score_vqav2, "*annotations.json"),
    "textvqa": (score_textvqa, "TextVQA*.json"),
    "vizwiz": (score_vizwiz, "*.json"),
    "gqa": (score_gqa, "*questions.json"),
    "mmmu": (score_mmmu, "*.json"),
    "mathvista": (score_mathvista, "*.json")}
WITHOUT_LABELS = ("vqav2", "vizwiz")     # only their servers can score the test splits
UPLOADS = (*WITHOUT_LABELS, "mmbench", "seed_bench", "textvqa", "gqa")


def run_scorer(name, config):
    """Score one benchmark: print the table, write --json and --upload."""
    scorer, pattern = SCORERS[name]
    if config.upload and name not in UPLOADS:
        raise ValueError(f"--upload: {name} has no server; {', '.join(UPLOADS)} have one")
    for_server = name in WITHOUT_LABELS and config.upload and config.questions
    if not config.labels and not for_server:
        raise ValueError(f"--labels: {name} needs {pattern}, or the folder with it; with "
                         f"--questions and --upload, {' and '.join(WITHOUT_LABELS)} do without")
    labels = read_labels(config.labels, pattern)
    try:
        scores, notes = scorer(config, labels)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{name}: {' '.join(labels)} or --questions is not in the official form "
                         f"({type(error).__name__}: {error})") from error
    if scores:
        keys, published = PUBLISHED[name]
        rows = score_rows(name, scores, keys.split(), published)
        print(layout(list(zip(*rows, strict=True))))         # one score a line
        print("low, high: 95% interval (Wilson); behind them, as published")
    for note in notes:
        print(f"note: {note}")
    if config.official:
        print("note: --official: the published arithmetic")
    if config.json:
        write_json(config.json, {key: percent(value) for key, value in scores.items()})


def scorer_command(name):
    """What `score NAME` runs; its help is the benchmark's rules."""
    def score_benchmark(config):
        run_scorer(name, config)
    score_benchmark.__doc__ = SCORERS[name][0].__doc__
    return score_benchmark


COMMANDS = {f"score {name}": (scorer_command(name), Benchmark) for name in SCORERS}
COMMANDS["mmbench_data"] = (mmbench_data, MMBenchData)


def main(argv=None):
    run_command(COMMANDS, argv, __doc__)


if __name__ == "__main__":
    run_main(main)
