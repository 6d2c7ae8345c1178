"""
ScienceQA's files: problems as its authors publish them, as turns to train on, and answers to them.

    problems.json      {id: {"question", "choices", "answer", "hint", "image", "grade", "subject",
                             "lecture", "solution"}}
    pid_splits.json    {"train": [id, ...], "val": ..., "test": ...}
"""
import json
import re
from pathlib import Path

from parts.files import IMAGE, write_json
from parts.scoring import check_ids, layout, percent, read_by_id, score_rows

COLUMNS = ("NAT", "SOC", "LAN", "TXT", "IMG", "NO", "G1-6", "G7-12", "AVG")
LETTERS = ["A", "B", "C", "D", "E"]
BY_LETTER = "Answer with the option's letter from the given choices directly."
# What an answer may be, in this order: A the answer, L the lecture, E the solution.
ANSWERS = ("A", "AL", "AE", "ALE", "AEL", "LA", "EA", "LEA", "ELA", "LEPA")


def read_problems(folder, split):
    """{id: problem} of one split. Raises FileNotFoundError, ValueError."""
    found = []
    for name in ("problems.json", "pid_splits.json"):
        path = Path(folder, name)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; --labels is the folder with the "
                                    "official problems.json and pid_splits.json")
        found.append(json.loads(path.read_text(encoding="utf-8")))
    problems, splits = found
    if split not in splits:
        raise ValueError(f"{path}: no split {split!r}; there are {', '.join(splits)}")
    missing = [pid for pid in splits[split] if pid not in problems]
    if missing:
        raise ValueError(f"{folder}: {len(missing)} of {len(splits[split])} problems of {split} "
                         f"are not in problems.json, e.g. {missing[0]}")
    return {pid: problems[pid] for pid in splits[split]}


def columns_of(problem):
    """The columns of the paper's table of results in which a problem counts.

    One with a hint and a picture is in TXT and in IMG, one without either in NO.
    """
    columns = []
    if problem["hint"]:
        columns.append("TXT")
    if problem["image"]:
        columns.append("IMG")
    subject = problem["subject"][:3].upper()         # NAT, SOC or LAN
    grade = int(problem["grade"].removeprefix("grade"))
    grades = "G1-6" if grade <= 6 else "G7-12"
    return [subject, *(columns or ["NO"]), grades, "AVG"]


# --------------------------------------------------------------------------------------------------
# Answers


def letter_of(text):
    """The letter that an answer names, or None.

    It is all of the text; the text begins with it, "B. ..."; or "The answer is B." is in it exactly
    once. OFFICIAL: any character will do for that full stop.
    """
    if text in LETTERS:
        return text
    if text[:1] in LETTERS and text[1:3] == ". ":
        return text[0]
    found = re.findall(r"The answer is ([A-Z]).", text)
    return found[0] if len(found) == 1 else None


def choice_of(problem, letter):
    """The index of the choice that a letter names; None without a letter; -1, never right, for one
    that the problem does not have."""
    if letter is None:
        return None
    choices = LETTERS[:len(problem["choices"])]
    return choices.index(letter) if letter in choices else -1


def read_letters(path, problems, partial=False):
    """{id: letter or None} of an answers file; `partial`: to some of the problems only."""
    answers = read_by_id(path, "text")
    check_ids(path, answers, problems, partial)
    return {pid: letter_of(answers[pid]["text"]) for pid in problems if pid in answers}


def read_choices(path, problems, partial=False):
    """{id: index of a choice, see `choice_of`} of an answers file; {} without a path."""
    if not path:
        return {}
    letters = read_letters(path, problems, partial)
    return {pid: choice_of(problems[pid], letter) for pid, letter in letters.items()}


def print_methods(scores, unparsed, published, path):
    """Print {method: {column: (right, n)}} above what is published; in JSON, too, with a path.

    unparsed    (n, all): our answers that name no choice
    """
    table = score_rows("scienceqa", scores["ours"], COLUMNS, published)
    rows = table[:4]                     # the head, ours, and the two ends of its interval
    numbers = {"unparsed": percent(unparsed)}
    for method, row in scores.items():
        prefix = ""
        if method != "ours":
            prefix = f"{method}."
            rows.append([method, *score_rows(method, row)[1][1:]])
        numbers |= {prefix + column: percent(score) for column, score in row.items()}
    print(layout(rows + table[4:]))
    print("low, high: 95% interval of ours (Wilson); below the ensembles, as published")
    print(f"{unparsed[0]} of {unparsed[1]} answers name no choice, and are wrong")
    if path:
        write_json(path, numbers)


# --------------------------------------------------------------------------------------------------
# Turns


def science_turn(problem, form):
    """One problem as (question, answer), in a format of the released converter.

    Formats are INPUT-OUTPUT, as QCM-LEA: the question Q, its context C and the options M are asked;
    lecture L, solution E and then the answer A are the reply. `letter` is LLaVA-1.5's format. Here
    is QCM-A:

        Which one is dark?          The answer is B.
        Context: N/A
        Options: (A) red (B) blue

    OFFICIAL, quirks that are kept: AL gives the solution and AE the lecture; each pair of blanks
    becomes one, once; the converter deletes every "Question: " of an input that begins with it, and
    every "Answer: " of such an output.
    Raises ValueError for another format.
    """
    asked, _, told = form.partition("-")
    if form == "letter":
        return letter_question(problem), LETTERS[problem["answer"]]
    if asked not in ("QCM", "CQM") or told not in ANSWERS:
        raise ValueError(f"--format {form}: QCM or CQM, a dash, and one of {', '.join(ANSWERS)}; "
                         "or letter")
    choices = enumerate(problem["choices"])
    options = [f"({LETTERS[i]}) {choice}" for i, choice in choices]
    parts = {"Q": f"Question: {problem['question']}\n",
             "C": f"Context: {problem['hint'].strip() or 'N/A'}\n",
             "M": "Options: " + " ".join(options)}
    question = "".join(parts[part] for part in asked)
    answer = halve_blanks(science_answer(problem, told))
    if answer.endswith("BECAUSE:"):      # neither lecture nor solution
        answer = answer.replace("BECAUSE:", "").strip()
    return without_head(halve_blanks(question), "Question: "), without_head(answer, "Answer: ")


def science_answer(problem, order):
    """The reply to a problem: lecture, solution and answer in the order of these letters."""
    letter = LETTERS[problem["answer"]]
    lecture = problem["lecture"].replace("\\n", "\n")
    solution = problem["solution"].replace("\\n", "\n")
    if order == "LEPA":                  # the first release's
        lines = [f"###\nANSWER: {letter}."]
        if solution.strip():
            lines.insert(0, f"SOLUTION: {solution}")
        if lecture.strip():
            lines.insert(0, f"LECTURE: {lecture}")
        return "\n".join(lines)
    parts = {"A": f"The answer is {letter}.", "L": lecture, "E": solution}
    if order[0] != "A" or order == "A":
        return "Answer: " + " ".join(parts[part] for part in order)
    reasons = {"AL": "E", "AE": "L"}.get(order, order[1:])
    because = " ".join(parts[part] for part in reasons)
    return f"Answer: {parts['A']} BECAUSE: {because}"


def halve_blanks(text):
    """A text as the converter leaves it: each pair of blanks is one, once."""
    return text.replace("  ", " ").strip()


def without_head(text, head):
    """A text without "Question: " or "Answer: ", if it begins with it."""
    return text.replace(head, "") if text.startswith(head) else text


def letter_question(problem):
    """LLaVA-1.5's question (Diss. Sec. 4.3): a hint if there is one, an option a line."""
    lines = [problem["question"]]
    if problem["hint"].strip():
        lines.insert(0, f"Context: {problem['hint'].strip()}")
    for i, choice in enumerate(problem["choices"]):
        lines.append(f"{LETTERS[i]}. {choice}")
    return halve_blanks("\n".join(lines)) + "\n" + BY_LETTER


def science_records(turns, problems, with_images, image_first):
    """(records to train on, questions to answer) of {id: (question, answer)}."""
    records = []
    questions = []
    for pid, (question, answer) in turns.items():
        picture = {}
        asked = question
        if with_images and problems[pid]["image"]:
            picture = {"image": f"{pid}/{problems[pid]['image']}"}
            asked = f"{IMAGE}\n{question}" if image_first else f"{question}\n{IMAGE}"
        conversation = [{"from": "human", "value": asked}, {"from": "gpt", "value": answer}]
        records.append({"id": pid, **picture, "conversations": conversation})
        # sample.py itself puts the picture before a question
        questions.append({"question_id": pid, **picture, "text": question,
                          "category": problems[pid]["subject"]})
    return records, questions
