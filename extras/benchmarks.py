"""
The benchmarks of LLaVA-1.5 (Diss. Sec. 4.4): answers and official labels in, numbers out.

    python eval.py answer --model DIR --questions q.jsonl --images DIR --answers a.jsonl
    python -m extras.benchmarks score pope --answers a.jsonl --questions q.jsonl --labels coco
    python -m extras.benchmarks mmbench_data --labels dev.tsv --questions q.jsonl --images DIR
    (and mmmu_data, mathvista_data: questions that the label files hold, for eval.py)

names: pope mme mmbench seed_bench vqav2 textvqa vizwiz gqa mmmu mathvista; -h behind a name tells
its rules. A scorer takes what the label files hold, finds the answer to each label, and returns
scores, {name: (right, n) or a number}. Missing, doubled and foreign answers are an error, never a
number. What cannot be read is wrong, and counted. --official is the published arithmetic
of POPE, MME and SEED-Bench, which reads and pairs answers in other ways.
"""
import ast
import base64
import csv
import io
import re
from collections import defaultdict
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path

from extras.published import normalise
from parts.files import (
    library,
    read_json,
    read_text,
    run_command,
    run_main,
    typed,
    typed_fields,
    write_json,
    write_lines,
)
from parts.scienceqa import BY_LETTER, LETTERS, lettered
from parts.scoring import (
    check_ids,
    id_of,
    layout,
    percent,
    read_answers,
    read_by_id,
    records_by_id,
    score_rows,
)

# Published under the names of our scores (Diss. Table 4.3, Diss. Table 4.4, Diss. Sec. 4.7).
PUBLISHED = {
    "pope": ("random.f1 popular.f1 adversarial.f1 f1", {
        "LLaVA-1.5-7B": "87.3 86.1 84.2 85.9", "13B": "87.1 86.2 84.5 85.9",
        "HD-13B": "87.5 86.4 85.0 86.3"}),
    "mme": ("perception", {"LLaVA-1.5-7B": "1510.7", "13B": "1531.3", "HD-13B": "1500.1"}),
    "mmbench": ("circular", {
        "LLaVA-1.5-7B": "64.3", "13B": "67.7", "HD-13B": "68.8", "NeXT-13B": "70",
        "NeXT-34B": "79.3", "7B on CN": "58.3", "13B on CN": "63.6", "HD-13B on CN": "61.9",
        "NeXT-13B on CN": "64.4", "NeXT-34B on CN": "79"}),
    "seed_bench": ("image video all", {
        "LLaVA-1.5-7B": "66.1 37.3 58.6", "13B": "68.2 42.7 61.6", "HD-13B": "70.1 41.3 62.6",
        "NeXT-13B": "71.9 - -", "NeXT-34B": "75.9 - -"}),
    "vqav2": ("accuracy", {"LLaVA-1.5-7B, test-dev": "78.5", "13B": "80.0", "HD-13B": "81.8"}),
    "gqa": ("accuracy", {"LLaVA-1.5-7B": "62.0", "13B": "63.3", "HD-13B": "64.7"}),
    "vizwiz": ("accuracy", {"LLaVA-1.5-7B, test": "50.0", "13B": "53.6", "HD-13B": "57.5"}),
    "textvqa": ("accuracy", {"LLaVA-1.5-7B, with OCR": "58.2", "13B": "61.3", "HD-13B": "62.5"}),
    "mmmu": ("accuracy", {"LLaVA-1.5-13B": "36.4", "NeXT-13B": "36.2", "NeXT-34B": "51.1"}),
    "mathvista": ("accuracy", {"LLaVA-1.5-13B": "27.6", "NeXT-13B": "35.3", "NeXT-34B": "46.5"})}


@dataclass(frozen=True, kw_only=True)
class Benchmark:
    answers: str                         # JSON lines of question_id and text, or an upload file
    labels: list[str]                    # the official label files, or their folder
    questions: str = None                # what was asked: pope's splits; uploads of vqav2, vizwiz
    json: str = None                     # a file for the unrounded numbers


@dataclass(frozen=True, kw_only=True)
class Published(Benchmark):
    official: bool = False               # the published arithmetic


@dataclass(frozen=True, kw_only=True)
class Upload(Benchmark):
    upload: str = None                   # a file for the benchmark's server


@dataclass(frozen=True, kw_only=True)
class ForServer(Upload):
    labels: list[str] = ()               # of a public split; without them its server can score


# --------------------------------------------------------------------------------------------------
# Files


def read_rows(path):
    """The rows of a .tsv as dicts, of a .txt as lists of cells, or the records of a JSON file."""
    if path.endswith(".tsv"):
        csv.field_size_limit(2 ** 31 - 1)      # MMBench keeps its pictures in the sheet
        sheet = io.StringIO(read_text(path), newline="")
        rows = list(csv.DictReader(sheet, delimiter="\t", restval=""))
        if any(None in row for row in rows):
            raise ValueError(f"{path}: a row has more cells than the first; is the file whole?")
    elif path.endswith(".txt"):
        lines = read_text(path).replace("\r", "").split("\n")
        rows = [line.split("\t") for line in lines if line.strip()]
    else:
        rows = list(read_json(path))
    if not rows:
        raise ValueError(f"{path}: it is empty")
    return rows


def read_labels(paths, pattern):
    """{path: rows} of the files of --labels; of a folder, those that are called like the official
    ones."""
    labels = {}
    for path in map(Path, paths):
        files = sorted(path.glob(pattern)) if path.is_dir() else [path]
        if not files:
            raise FileNotFoundError(f"--labels {path}: the folder has no {pattern}")
        labels |= {str(file): read_rows(str(file)) for file in files}
    return labels


def read_label_records(labels, part=None, key="id", **kinds):
    """{id: record} of all label files, with fields of these kinds.

    A file's rows are the records, or objects that hold a list of them as `part`.
    """
    rows = [row for rows in labels.values() for row in rows]
    source = " ".join(labels)
    if part:
        rows = [row for data in rows for row in typed_fields(data, source, **{part: list})[part]]
    return records_by_id(rows, source, key, **kinds)


def read_label_objects(labels, **kinds):
    """{id: record} of label files that are such objects, with fields of these kinds."""
    records = {}
    for path, rows in labels.items():
        for data in rows:
            for name, record in typed(data, dict, path).items():
                if name in records:
                    raise ValueError(f"{path}: {name} has a label in another file, too")
                records[name] = typed_fields(record, f"{path}: {name}", **kinds)
    return records


def read_predictions(path):
    """[(id, prompt or "", text), ...] of an answers file, or of SEED-Bench's upload."""
    predictions = []
    for i, row in enumerate(read_rows(path)):
        where = f"{path}[{i}]"
        name = id_of(row, "question_id", where)
        prompt = typed(row.get("prompt") or "", str, f"{where}: prompt")
        text = typed(row.get("text", row.get("prediction")), str, f"{where}: text")
        predictions.append((name, prompt, text))
    return predictions


ADDED_LINES = ("Reference OCR token:", "When the provided information is")
BY_WORD = "Answer the question using a single word or phrase."
ADDED_WORDS = (BY_WORD, "Please answer yes or no.")


def bare_question(prompt):
    """The question in a prompt: without what LLaVA-1.5 adds to it, blanks made single."""
    lines = [line for line in prompt.split("\n") if not line.startswith(ADDED_LINES)]
    text = " ".join(lines)
    for words in ADDED_WORDS:
        text = text.replace(words, " ")
    return " ".join(text.split())


def match_answers(wanted, found, source, missing_ok=False):
    """The values of `found`, [(key, value), ...], in the order of the keys that are wanted.

    What is asked more than once is found in order. Raises ValueError, see `check_ids`; with
    `missing_ok` a missing value is None.
    """
    check_ids(source, [key for key, _ in found], wanted, missing_ok)
    left = defaultdict(list)
    for key, value in reversed(found):
        left[key].append(value)
    return [left[key].pop() if left[key] else None for key in wanted]


def with_texts(config, records, missing_ok=False):
    """[(id, record, the text of its answer in --answers), ...] of {id: record}."""
    found = [(name, text) for name, _, text in read_predictions(config.answers)]
    texts = match_answers(list(map(str, records)), found, config.answers, missing_ok)
    return list(zip(records, records.values(), texts, strict=True))


def tally(pairs):
    """[(name, is it right?), ...] -> {name: (right, n)}"""
    counts = {}
    for name, right in pairs:
        k, n = counts.get(name, (0, 0))
        counts[name] = (k + right, n + 1)
    return counts


@dataclass(frozen=True)
class QuestionsData:
    labels: list[str]                    # the official files, which hold the questions, too
    questions: str                       # JSON lines to write
    images: str                          # folder of the pictures; MMBench's are written there


def question_row(name, image, lines, options):
    """A question for eval.py, with LLaVA-1.5's prompts: for a letter if there are options."""
    ending = [*options, BY_LETTER] if options else [BY_WORD]
    return {"question_id": name, "image": image, "text": "\n".join([*lines, *ending])}


def save_questions(config, questions):
    """Write the questions, and say where they and their pictures are."""
    write_lines(config.questions, questions)
    print(f"{len(questions):,} questions in {config.questions}, pictures in {config.images}")


# --------------------------------------------------------------------------------------------------
# Yes or no: POPE, MME

YES_NO = ("yes", "no")
SPLITS = ["adversarial", "popular", "random"]
# The published scores belong to these labels, the random ones of which were changed later.
POPE_VERSION = "POPE's commit e3e39262 has 2910 random, 3000 popular, 3000 adversarial labels"
GROUPS = {
    "perception": ("existence", "count", "position", "color", "posters", "celebrity", "scene",
                   "landmark", "artwork", "OCR"),
    "cognition": ("commonsense_reasoning", "numerical_calculation", "text_translation",
                  "code_reasoning")}


def one_of(allowed, label, where):
    """A label, which must be one of these: with another one all answers to it would be wrong."""
    if label not in allowed:
        raise ValueError(f"--labels: the label of {where} is {label!r:.80}, not one of "
                         f"{', '.join(allowed)}")
    return label


def yes_or_no(text):
    """The first word of an answer without case and marks, "yes" or "no"; None if it is neither."""
    word = re.match(r"[\W\d_]*([^\W\d_]*)", text.lower())[1]
    return word if word in YES_NO else None


def pope_official(text):
    """OFFICIAL: all is yes but what has No, not or no among the words of its first sentence."""
    words = text.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def mme_official(text):
    """OFFICIAL: a "yes" in the first four characters decides, else a "no", so "Not sure" is no."""
    start = text.lower()[:4]
    return next((word for word in YES_NO if word in start), None)


def pope_measures(split, answers, truths):
    """POPE's measures of one split; None where nothing can be divided by.

    An answer that is neither yes nor no is wrong in all of them.
    """
    n = len(truths)
    pairs = list(zip(answers, truths, strict=True))
    hits = pairs.count(("yes", "yes"))
    rejections = pairs.count(("no", "no"))
    true = truths.count("yes")
    found = n - true - rejections + hits                     # with what is wrongly found
    return {f"{split}.f1": 200 * hits / (found + true) if hits else None,
            f"{split}.accuracy": (hits + rejections, n),
            f"{split}.precision": (hits, found) if found else None,
            f"{split}.recall": (hits, true) if true else None,
            f"{split}.yes": (answers.count("yes"), n),
            f"{split}.unparsed": (answers.count(None), n)}


def score_pope(config, labels):
    """POPE: is there such a thing in the picture? F1 of yes in three splits, and its mean.

    --questions says which question is of which split. OFFICIAL: answers and labels are paired by
    position (--official), which is silently wrong with other label files than POPE's e3e39262;
    here those are an error.
    """
    if not config.questions:
        raise ValueError("--questions FILE is needed: it says which question is of which split")
    questions = read_by_id(config.questions, "image", "text", "category")
    read = pope_official if config.official else yes_or_no
    found = defaultdict(list)
    for name, answer in read_answers(config.answers, questions).items():
        question = questions[name]
        key = question["image"], bare_question(question["text"])
        found[question["category"]].append((key, read(answer["text"])))
    splits = [Path(path).stem.rpartition("_")[2] for path in labels]     # coco_pope_random.json
    if sorted(splits) != SPLITS or found.keys() - set(SPLITS):
        raise ValueError(f"--labels {' '.join(labels)}: one file for each of {', '.join(SPLITS)}, "
                         "called after it, and questions of these categories are needed")
    scores = {}
    for split, (path, rows) in zip(splits, labels.items(), strict=True):
        wanted = []
        truths = []
        for row in rows:
            typed_fields(row, path, image=str, text=str, label=str)
            wanted.append((row["image"], bare_question(row["text"])))
            truths.append(one_of(YES_NO, row["label"].strip().lower(), path))
        answers = match_answers(wanted, found[split], f"{path} ({POPE_VERSION})")
        if config.official:
            answers = [answer for _, answer in found[split]]
        scores |= pope_measures(split, answers, truths)
    f1 = [scores[f"{split}.f1"] for split in SPLITS]
    scores["f1"] = None
    if None not in f1:
        scores["f1"] = sum(f1) / len(f1)
    return scores


def score_mme(config, labels):
    """MME: two yes/no questions a picture; a task has accuracy + share of pictures all right.

    --labels is the official tool's folder of TASK.txt: picture, question, label by tabs, two lines
    a picture. Perception is the sum of ten tasks, cognition of four.
    """
    keys = []
    truths = []
    for path, rows in labels.items():
        for row in rows:
            if len(row) < 3:
                raise ValueError(f"{path}: {row}: picture, question, label, by tabs, are needed")
            truths.append(one_of(YES_NO, row[2].strip().lower(), path))
            keys.append((Path(path).stem, row[0].split(".")[0], bare_question(row[1])))
    read = mme_official if config.official else yes_or_no
    found = []
    for name, prompt, text in read_predictions(config.answers):      # an id is TASK/.../PICTURE
        task, _, picture = name.partition("/")
        key = task, Path(picture).name.split(".")[0], bare_question(prompt)
        found.append((key, read(text)))
    answers = match_answers(keys, found, config.answers)
    pictures = defaultdict(list)                 # {(task, picture): [right, right]}
    for (task, picture, _), answer, truth in zip(keys, answers, truths, strict=True):
        pictures[task, picture].append(answer == truth)
    pairs = []
    for (task, picture), rights in pictures.items():
        if len(rights) != 2:
            raise ValueError(f"--labels: {task} has {len(rights)} lines, not 2, for {picture}")
        pairs += [(f"{task}.acc", right) for right in rights]
        pairs.append((f"{task}.acc_plus", all(rights)))
    counts = tally(pairs)
    points = {}
    for task, _ in pictures:
        points[task] = percent(counts[f"{task}.acc"]) + percent(counts[f"{task}.acc_plus"])
    sums = {}
    for group, tasks in GROUPS.items():
        is_whole = points.keys() >= set(tasks)
        sums[group] = sum(points[task] for task in tasks) if is_whole else None
    print(f"{answers.count(None)} answers are neither yes nor no, and wrong")
    return sums | points | counts


# --------------------------------------------------------------------------------------------------
# Multiple choice: MMBench, SEED-Bench, MMMU, MathVista

ROTATION = 10 ** 6                       # between the rows of one question in MMBench
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
    """{letter: option} of a row of MMBench's sheet, in which an empty cell may say nan."""
    return {letter: row[letter] for letter in "ABCD" if is_filled(row.get(letter))}


def is_filled(cell):
    return (cell or "nan").lower() not in ("nan", "none")


def read_mmbench(labels, **kinds):
    """{number of the row: row} of MMBench's sheet; rotations of a question are 1,000,000 apart."""
    found = read_label_records(labels, key="index", question=str, **kinds)
    rows = {}
    for index, row in found.items():
        if not index.isdecimal() or str(int(index) % ROTATION) not in found:
            raise ValueError(f"--labels: the index {index!r} is no number, or the row that it "
                             "rotates is missing; is the file whole?")
        rows[int(index)] = row
    return rows


def score_mmbench(config, labels):
    """MMBench: `circular` counts a question only if each rotation of its options is right.

    The rotations are the rows index, index + 1,000,000, ... of the official TSV; `plain` looks at
    the first. OFFICIAL: what no rule understands goes to GPT, and at last to chance; here it is
    wrong. --upload writes the result sheet, .xlsx.
    """
    rows = read_mmbench(labels)
    answered = with_texts(config, rows)
    if config.upload:
        write_sheet(config.upload, answered)
    if not any(row.get("answer") for row in rows.values()):
        return {}                                # a test split
    groups = defaultdict(dict)                   # {question: {row: is it right?}}
    pairs = []
    for index, row, text in answered:
        letter = option_of(text, options_of(row))
        pairs.append(("unparsed", letter is None))
        groups[index % ROTATION][index] = letter == one_of(LETTERS, row.get("answer"), index)
    levels = []
    easier = 0
    for index, rights in groups.items():
        row = rows[index]
        easier += len(rights) < len(options_of(row))
        circular = all(rights.values())
        pairs += [("circular", circular), ("plain", rights[index])]
        levels += [(row[name], circular) for name in ("l2-category", "category") if row.get(name)]
    if easier:
        print(f"{easier} of {len(groups)} questions have fewer rows than options: `circular` is "
              "easier for them")
    return tally(pairs) | tally(sorted(levels))


def write_sheet(path, answered):
    """Write MMBench's result sheet, .xlsx: columns for its server, with `prediction`.

    It cannot hold control characters: they become "?".
    """
    if not path.endswith(".xlsx"):
        raise ValueError(f"--upload {path}: MMBench's server reads .xlsx; name the file so")
    openpyxl = library("openpyxl", ".xlsx", "openpyxl")
    control = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff]")
    dropped = ("hint", "category", "source", "image", "comment", "l2-category")
    names = [name for name in answered[0][1] if name not in dropped]
    names.insert(6, "prediction")                # behind the options
    book = openpyxl.Workbook()
    book.active.append(names)
    for _, row, text in answered:
        record = row | {"prediction": text}
        book.active.append([control.sub("?", record[name]) for name in names])
        for cell in book.active[book.active.max_row]:
            cell.data_type = "s"                 # "=..." is an answer, no formula
    book.save(path)


def mmbench_data(config):
    """MMBench's sheet as questions, and its pictures as files, one for all rotations."""
    rows = read_mmbench(read_labels(config.labels, "*.tsv"), image=str)
    pictures = {str(index): row["image"] for index, row in rows.items()}
    questions = []
    Path(config.images).mkdir(parents=True, exist_ok=True)
    for index, row in rows.items():
        name = f"{index % ROTATION}.png"         # pictures are read by what they hold
        picture = pictures.get(row["image"], row["image"])       # a cell may name another row
        try:
            Path(config.images, name).write_bytes(base64.b64decode(picture, validate=True))
        except ValueError as error:
            raise ValueError(f"--labels: the picture of {index} is no base64: {error}") from error
        options = options_of(row)
        lines = [row["question"]]
        for letter in takewhile(options.get, "ABCD"):            # as published, up to a gap
            lines.append(f"{letter}. {options[letter]}")
        if is_filled(row.get("hint")):
            lines.insert(0, row["hint"])
        chinese = re.search("[\u4e00-\u9fff]", row["question"])
        lines.append("请直接回答选项字母。" if chinese else BY_LETTER)
        text = "\n".join(lines)
        questions.append({"question_id": index, "image": name, "text": text})
    save_questions(config, questions)


def score_seed_bench(config, labels):
    """SEED-Bench: the text must equal the letter. Images or videos may be left out altogether.

    OFFICIAL: a missing answer is a wrong one (--official).
    """
    questions = read_label_records(labels, "questions", "question_id", data_type=str, answer=str)
    answered = {name for name, _, _ in read_predictions(config.answers)}
    kinds = {question["data_type"] for name, question in questions.items()
             if config.official or name in answered}
    asked = {name: question for name, question in questions.items()
             if question["data_type"] in kinds}
    pairs = []
    for name, question, text in with_texts(config, asked, config.official):
        right = text == one_of(LETTERS, question["answer"], name)
        pairs += [("all", right), (question["data_type"], right)]
        pairs.append(("unparsed", text not in LETTERS))
    scores = {"image": None, "video": None} | tally(pairs)
    if len(asked) < len(questions):
        print("images or videos have no answers, so all is undefined")
        scores["all"] = None
    return scores


def choice_named(text, options):
    """MMMU's choice, or None: "(A)", else "A ", else "A.", else an option in a longer answer.

    If several are named, the last one counts.
    """
    for sign in ",.!?;:'":
        text = text.strip(sign)
    text = f" {text} "
    letters = CAPITALS[:len(options)]
    for form in ("({})", "{} ", "{}."):
        places = {letter: text.rfind(form.format(letter)) for letter in letters}
        last = max(letters, key=places.get)
        if places[last] >= 0:
            return last
    if len(text.split()) <= 5:
        return None
    places = {letters[i]: text.lower().rfind(option.lower()) for i, option in enumerate(options)}
    last = max(letters, key=places.get)
    return last if places[last] >= 0 else None


CAPITALS = list("ABCDEFGHIJ")
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
    found = [value for piece in open_pieces(text) for value in open_values(piece)]
    if set(wanted) & set(found):
        return True
    words = [truth for truth in wanted if isinstance(truth, str)]
    return any(word in piece for word in words for piece in found if isinstance(piece, str))


def listed_value(cell):
    """A cell of MMMU's rows, a text, in which a list is written as Python writes it; as a list."""
    if isinstance(cell, str) and cell.startswith("["):
        try:
            cell = ast.literal_eval(cell)
        except (SyntaxError, ValueError):        # "[0, 5)" is an answer
            pass
    return [str(value) for value in cell] if isinstance(cell, list) else [str(cell)]


CHOICE = "multiple-choice"               # MMMU's word for a question with options


def read_mmmu(labels, **kinds):
    """{id: row} of MMMU, with their options as lists: the rows of the data set as JSON."""
    rows = read_label_records(labels, question_type=str, **kinds)
    for name, row in rows.items():
        row["options"] = listed_value(row.get("options"))
        one_of((CHOICE, "open"), row["question_type"], name)
        if row["question_type"] == CHOICE and not 2 <= len(row["options"]) <= len(CAPITALS):
            raise ValueError(f"--labels: {name} has the options {row['options']!r:.80}; 2 to "
                             f"{len(CAPITALS)} are needed")
    return rows


def mmmu_data(config):
    """MMMU's rows as questions; `image_1` is a path in --images.

    OFFICIAL: MMMU's own run of LLaVA-1.5 writes options as (A), (B), ..., and shows the first of
    several pictures alone. So it is here.
    """
    rows = read_mmmu(read_labels(config.labels, "*.json*"), question=str, image_1=str)
    questions = []
    for name, row in rows.items():
        options = []
        if row["question_type"] == CHOICE:
            options = [*lettered(row["options"], "({}) {}"), ""]
        questions.append(question_row(name, row["image_1"], [row["question"]], options))
    save_questions(config, questions)


def score_mmmu(config, labels):
    """MMMU (validation): choices and open questions by the official parsers.

    --labels holds the rows of the data set as JSON. OFFICIAL: a choice that cannot be read is drawn
    at random; here it is wrong.
    """
    pairs = []
    for name, row, text in with_texts(config, read_mmmu(labels)):
        truths = listed_value(row.get("answer"))
        letter = ""
        if row["question_type"] == CHOICE:
            letter = choice_named(text, row["options"])
            right = letter == one_of(CAPITALS, "".join(truths), name)
        else:
            right = open_is_right(text, truths)
        pairs += [("accuracy", right), ("unparsed", letter is None)]
    return tally(pairs)


def value_named(problem, text):
    """MathVista's value of an answer that needs no reading, or None: a choice, its letter (OURS),
    an integer, a number with the problem's precision."""
    letter = re.fullmatch(r"\(?([A-Z])\)?[.:]?", text.strip())
    try:
        if problem["question_type"] == "multi_choice":
            choices = list(map(str, problem["choices"]))
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


def read_mathvista(labels, **kinds):
    """{pid: problem} of testmini.json, with fields of these kinds, too."""
    problems = read_label_objects(labels, question_type=str, answer_type=str, **kinds)
    for name, problem in problems.items():
        if problem["question_type"] == "multi_choice":
            typed_fields(problem, f"--labels: {name}", choices=list)
        elif problem["answer_type"] == "float":
            typed_fields(problem, f"--labels: {name}", precision=float)
    return problems


def mathvista_data(config):
    """MathVista's problems as questions.

    OURS: LLaVA-1.5's two format prompts. The benchmark's own ask for the value "at the end" of an
    answer, where a language model has to find it.
    """
    problems = read_mathvista(read_labels(config.labels, "*.json"), question=str, image=str)
    questions = []
    for name, problem in problems.items():
        text = problem["question"]
        if problem.get("unit"):
            text += f" (Unit: {problem['unit']})"
        options = []
        if problem["question_type"] == "multi_choice":
            options = lettered(problem["choices"])
        questions.append(question_row(name, problem["image"], [text], options))
    save_questions(config, questions)


def score_mathvista(config, labels):
    """MathVista (testmini), as far as no language model must read the answer.

    The rest is unparsed and wrong, so accuracy is a lower bound; the benchmark has GPT read it.
    """
    pairs = []
    for _, problem, text in with_texts(config, read_mathvista(labels, answer=str)):
        value = value_named(problem, text)
        pairs.append(("accuracy", value == problem["answer"].strip()))
        pairs.append(("unparsed", value is None))
    return tally(pairs)


# --------------------------------------------------------------------------------------------------
# Short answers: VQAv2, TextVQA, VizWiz, GQA


def vqa_accuracy(text, humans):
    """min(1, matches / 3), averaged over the ten sets of nine humans: 0, 0.3, 0.6, 0.9 or 1."""
    if len(humans) != 10 or not all(isinstance(human, str) for human in humans):
        raise ValueError(f"VQA's accuracy is defined for ten human answers, found {humans}")
    matches = [normalise(human) for human in humans].count(normalise(text))
    return (0, 0.3, 0.6, 0.9, 1)[min(4, matches)]


def asked_for_server(config, *fields):
    """The records of --questions, where there are no labels and a server scores."""
    if not config.questions or not config.upload:
        raise ValueError("--labels is needed; or --questions and --upload, for the server")
    return read_by_id(config.questions, *fields)


def vqa_scores(config, answered, key):
    """The accuracy on rows with human answers; for the server, all texts by the rows' `key`."""
    upload = []
    pairs = []
    has_humans = any("answers" in row for _, row, _ in answered)
    for _, row, text in answered:
        upload.append({key: row[key], "answer": normalise(text or "")})
        if has_humans:
            answers = typed(row.get("answers"), list, f"--labels: answers of {row[key]}")
            humans = [a.get("answer") if isinstance(a, dict) else a for a in answers]
            right = vqa_accuracy(text, humans)
            pairs.append(("accuracy", right))
            if row.get("answer_type") == "unanswerable":
                pairs.append(("unanswerable", right))
    if config.upload:
        write_json(config.upload, upload, indent=None)
    return tally(pairs)


def score_vqav2(config, labels):
    """VQAv2: the accuracy on a public split; without labels, all of --questions for the server.

    The questions that have no answer are empty in its file, and counted.
    """
    if labels:
        rows = read_label_records(labels, "annotations", "question_id", answers=list)
    else:
        rows = asked_for_server(config, "text")
    answered = with_texts(config, rows, missing_ok=not labels)
    missing = sum(text is None for _, _, text in answered)
    print(f"{missing:,} of {len(answered):,} questions have no answer")
    return vqa_scores(config, answered, "question_id")


def score_textvqa(config, labels):
    """TextVQA (validation): found by picture and question, as LLaVA's ids are those of pictures.

    LLaVA-1.5's prompts hold a line `Reference OCR token: ...`; without it, it is another setting.
    """
    rows = read_label_records(labels, "data", "question_id", image_id=str, question=str,
                              answers=list)
    predictions = read_predictions(config.answers)
    wanted = [(row["image_id"], bare_question(row["question"]).lower()) for row in rows.values()]
    found = [((name, bare_question(prompt).lower()), text) for name, prompt, text in predictions]
    texts = match_answers(wanted, found, config.answers)
    with_ocr = sum("Reference OCR token:" in prompt for _, prompt, _ in predictions)
    print(f"{with_ocr:,} of {len(predictions):,} prompts hold OCR tokens")
    return vqa_scores(config, list(zip(rows, rows.values(), texts, strict=True)), "question_id")


def score_vizwiz(config, labels):
    """VizWiz: with human answers in the labels the accuracy, else a file for the server.

    A question_id is the place in the official annotations; without them, as --questions has it.
    """
    questions = {}
    for i, row in enumerate([row for rows in labels.values() for row in rows]):
        typed_fields(row, f"--labels[{i}]", image=str, question=str)
        questions[str(i)] = row | {"text": row["question"]}
    if not labels:
        questions = asked_for_server(config, "image", "text")
    answers = read_answers(config.answers, questions)
    answered = [(name, row, answers[name]["text"]) for name, row in questions.items()]
    return vqa_scores(config, answered, "image")


def score_gqa(config, labels):
    """GQA: lower case and without full stops at its end, the answer equals the label.

    Only the balanced questions count; the server gets all.
    """
    pairs = []
    upload = []
    labels = read_label_objects(labels, answer=str, isBalanced=bool)
    for name, label, text in with_texts(config, labels):
        answer = text.rstrip(".").lower()
        upload.append({"questionId": name, "prediction": answer})
        if label["isBalanced"]:
            pairs.append(("accuracy", answer == label["answer"].lower()))
    if config.upload:
        write_json(config.upload, upload, indent=None)
    return tally(pairs)


# --------------------------------------------------------------------------------------------------
# The commands

SCORERS = {                              # its flags, the scorer, what its label files are called
    "pope": (Published, score_pope, "*pope_*.json"),
    "mme": (Published, score_mme, "*.txt"),
    "mmbench": (Upload, score_mmbench, "*.tsv"),
    "seed_bench": (Published, score_seed_bench, "SEED*.json"),
    "vqav2": (ForServer, score_vqav2, "*annotations.json"),
    "textvqa": (Upload, score_textvqa, "TextVQA*.json"),
    "vizwiz": (ForServer, score_vizwiz, "*.json"),
    "gqa": (Upload, score_gqa, "*questions.json"),
    "mmmu": (Benchmark, score_mmmu, "*.json*"),
    "mathvista": (Benchmark, score_mathvista, "*.json")}


def scorer_command(name, scorer, pattern):
    """What `score NAME` runs; its help is the benchmark's rules."""
    def score_benchmark(config):
        scores = scorer(config, read_labels(config.labels, pattern))
        if scores:
            keys, published = PUBLISHED[name]
            rows = score_rows(name, scores, keys.split(), published)
            print(layout(list(zip(*rows, strict=True))))     # one score a line
            print("low, high: 95% interval (Wilson); behind them, as published")
        else:
            print("there are no labels to score by: the server scores")
        if config.json:
            write_json(config.json, {key: percent(value) for key, value in scores.items()})

    score_benchmark.__doc__ = scorer.__doc__
    return score_benchmark


COMMANDS = {f"score {name}": (scorer_command(name, scorer, pattern), flags)
            for name, (flags, scorer, pattern) in SCORERS.items()}
COMMANDS["mmbench_data"] = (mmbench_data, QuestionsData)
COMMANDS["mmmu_data"] = (mmmu_data, QuestionsData)
COMMANDS["mathvista_data"] = (mathvista_data, QuestionsData)


def main(argv=None):
    run_command(COMMANDS, argv, __doc__)


if __name__ == "__main__":
    run_main(main)
