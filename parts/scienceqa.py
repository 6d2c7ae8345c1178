"""
ScienceQA's files: problems as its authors publish them, as turns to train on, and answers to them.

    problems.json      {id: {"question", "choices", "answer", "hint", "image", "grade", "subject",
                             "lecture", "solution"}}
    pid_splits.json    {"train": [id, ...], "val": ..., "test": ...}
"""
import re
import string
from pathlib import Path

from parts.files import IMAGE, read_value, typed, typed_fields, write_json
from parts.scoring import check_ids, layout, percent, read_by_id, score_cells, score_rows

COLUMNS = ("NAT", "SOC", "LAN", "TXT", "IMG", "NO", "G1-6", "G7-12", "AVG")
LETTERS = ["A", "B", "C", "D", "E"]
BY_LETTER = "Answer with the option's letter from the given choices directly."
FIELDS = {"question": str, "choices": list, "answer": int, "hint": str, "subject": str,
          "grade": str, "lecture": str, "solution": str}
# Question, Context and options are asked; Answer, Lecture and Explanation are told, in this order.
FORMATS = ("QCM-A", "QCM-ALE", "QCM-LEA", "QCM-LEPA", "letter")


def read_problems(folder, split):
    """{id: problem} of one split. Raises FileNotFoundError; ValueError that names what is wrong.

    folder    that of --labels, with the official problems.json and pid_splits.json
    """
    problems_path = Path(folder, "problems.json")
    splits_path = Path(folder, "pid_splits.json")
    problems = read_value(problems_path)
    splits = read_value(splits_path)
    if split not in splits:
        raise ValueError(f"{splits_path}: no split {split!r}; there are {', '.join(splits)}")
    found = {}
    for pid in map(str, typed(splits[split], list, splits_path)):
        where = f"{problems_path}: problem {pid}"
        problem = typed_fields(problems.get(pid), where, **FIELDS)
        answer = problem["answer"]
        n_choices = len(problem["choices"])
        if not 0 <= answer < n_choices <= len(LETTERS):
            raise ValueError(f"{where}: answer {answer} of {n_choices} choices, which are counted "
                             f"from 0; there are {len(LETTERS)} at most")
        found[pid] = {"image": None} | problem
    return found


def columns_of(problem):
    """The columns of the paper's table of results in which a problem counts.

    One with a hint and a picture is in TXT and in IMG, one without either in NO.
    """
    columns = []
    if problem["hint"]:
        columns.append("TXT")
    if problem["image"]:
        columns.append("IMG")
    if not columns:
        columns.append("NO")
    subject = problem["subject"][:3].upper()         # NAT, SOC or LAN
    grade = int(problem["grade"].removeprefix("grade"))
    grades = "G1-6" if grade <= 6 else "G7-12"
    return [subject, *columns, grades, "AVG"]


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
    if len(found) != 1:
        return None
    return found[0]


def choice_of(problem, letter):
    """The index of the choice that a letter names; None without a letter; -1, never right, for one
    that the problem does not have."""
    if letter is None:
        return None
    choices = LETTERS[:len(problem["choices"])]
    return choices.index(letter) if letter in choices else -1


def read_texts(path, problems, partial=False):
    """{id: text} of an answers file, in the problems' order; `partial`: to some of them only."""
    answers = read_by_id(path, "text")
    check_ids(path, answers, problems, partial)
    return {pid: answers[pid]["text"] for pid in problems if pid in answers}


def read_choices(path, problems, partial=False):
    """{id: index of a choice, see `choice_of`} of an answers file; {} without a path."""
    if not path:
        return {}
    texts = read_texts(path, problems, partial)
    return {pid: choice_of(problems[pid], letter_of(text)) for pid, text in texts.items()}


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
            rows.append([method, *[score_cells(score)[0] for score in row.values()]])
        numbers |= {prefix + column: percent(score) for column, score in row.items()}
    print(layout(rows + table[4:]))
    print("low, high: 95% interval of ours (Wilson); below the ensembles, as published")
    print(f"{unparsed[0]} of {unparsed[1]} answers name no choice, and are wrong")
    if path:
        write_json(path, numbers)


# --------------------------------------------------------------------------------------------------
# Turns


def science_turn(problem, form):
    """One problem as (question, answer), in a format of the released converter: INPUT-OUTPUT.

    `letter` is LLaVA-1.5's format, LEPA the first release's. Here is QCM-A:

        Which one is dark?          The answer is B.
        Context: N/A
        Options: (A) red (B) blue

    OFFICIAL, quirks that are kept: each pair of blanks becomes one, once; the converter deletes
    every "Question: " of an input, and every "Answer: " of an output but LEPA's.
    Raises ValueError for another format.
    """
    if form == "letter":
        return letter_question(problem), LETTERS[problem["answer"]]
    if form not in FORMATS:
        raise ValueError(f"--format {form}: one of {', '.join(FORMATS)} is needed")
    hint = problem["hint"].strip() or "N/A"
    options = " ".join(lettered(problem["choices"], "({}) {}"))
    question = f"Question: {problem['question']}\nContext: {hint}\nOptions: {options}"
    question = halve_blanks(question).replace("Question: ", "")
    return question, science_answer(problem, form.removeprefix("QCM-"))


def science_answer(problem, order):
    """The reply to a problem: lecture, solution and answer in the order of these letters."""
    answer = f"The answer is {LETTERS[problem['answer']]}."
    lecture = problem["lecture"].replace("\\n", "\n")
    solution = problem["solution"].replace("\\n", "\n")
    if order == "LEPA":
        lines = ["###", answer.replace("The answer is", "ANSWER:")]
        if solution.strip():
            lines.insert(0, f"SOLUTION: {solution}")
        if lecture.strip():
            lines.insert(0, f"LECTURE: {lecture}")
        return halve_blanks("\n".join(lines))
    reply = {"A": f"Answer: {answer}",
             "ALE": f"Answer: {answer} BECAUSE: {lecture} {solution}",
             "LEA": f"Answer: {lecture} {solution} {answer}"}
    text = halve_blanks(reply[order])
    if text.endswith("BECAUSE:"):        # neither lecture nor solution
        text = text.replace("BECAUSE:", "").strip()
    return text.replace("Answer: ", "")


def halve_blanks(text):
    """A text as the converter leaves it: each pair of blanks is one, once."""
    return text.replace("  ", " ").strip()


def letter_question(problem):
    """LLaVA-1.5's question (Diss. Sec. 4.3): a hint if there is one, an option a line."""
    lines = [problem["question"]]
    if problem["hint"].strip():
        lines.insert(0, f"Context: {problem['hint'].strip()}")
    lines += lettered(problem["choices"])
    return halve_blanks("\n".join(lines)) + "\n" + BY_LETTER


def lettered(choices, form="{}. {}"):
    """Choices with their letters: ["A. red", "B. blue"]."""
    return [form.format(*pair) for pair in zip(string.ascii_uppercase, choices, strict=False)]


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
