"""
LLaVA-1.5's data: academic visual question answering as conversations (Diss. Sec. 4.3).

    python -m extras.academic --questions v2_OpenEnded_mscoco_train2014_questions.json \\
        --annotations v2_mscoco_train2014_annotations.json --out vqav2.json     also OK-VQA
    python -m extras.academic --questions train_balanced_questions.json --out gqa.json
    python -m extras.academic --questions aokvqa_v1p0_train.json --out aokvqa.json
    python -m extras.academic --questions regions.jsonl --images DIR --out refcoco.json

A question gets a line that says how to answer, the response-format prompt. "dog" is then what was
asked for, and no habit that spoils longer answers. A file is known by its form and its fields, not
by its name: VQAv2, OK-VQA, TextVQA, GQA, A-OKVQA, and JSON lines of your own, with or without
choices, or with boxes in pixels:

    {"image": "a.jpg", "question": "What is it?", "answer": "a dog", "choices": ["a dog", "a cat"]}
    {"image": "a.jpg", "phrase": "the dog on the left", "box": [x, y, width, height]}
"""
import os
import random
import string
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

from parts.files import IMAGE, read_json, read_value, run_main, typed, typed_flags, write_json
from parts.pictures import image_path, image_size

LETTER_PROMPT = "Answer with the option's letter from the given choices directly."
FORMAT_PROMPTS = {
    "short": "Answer the question using a single word or phrase.",
    "letter": LETTER_PROMPT,
    "none": "",
}
DESCRIBE = "Please provide a short description for this region: {}."
LOCATE = "Please provide the bounding box coordinate of the region this sentence describes: {}."
MOST_REGIONS = 10        # OFFICIAL: answers of one conversation about regions
MOST_SHOWN = 20          # bad records that are printed


@dataclass(frozen=True)
class Config:
    questions: str                  # the data set's official file of questions, or JSON lines
    out: str                        # JSON to train on, in LLaVA's format
    annotations: str = None         # VQAv2, OK-VQA: the file of answers
    format_prompt: str = "auto"     # auto: letter for questions with choices, short for the others
    image_name: str = None          # as "val2014/{image_id:012d}.jpg"; default: LLaVA-1.5's folders
    skip_bad: bool = False          # leave bad records out and count them, rather than stop
    aspect: str = "pad"             # regions: padded to a square, or stretched as LLaVA-NeXT does
    images: str = None              # regions: the pictures, where records lack width and height
    seed: int = 0                   # regions: of what is asked for, the phrase or the box

    CHOICES: ClassVar[dict] = {"format_prompt": ["auto", *FORMAT_PROMPTS],
                               "aspect": ["pad", "stretched"]}


class QA(NamedTuple):
    """One question with its answer."""
    way: str             # "short", "letter", "none"; of a region what is asked: "phrase" or "box"
    rotation: int        # by how many places the options were moved on
    question: str
    answer: str


# -----------------------------------------------------------------------------
# The kinds of files


class Kind(NamedTuple):
    """What a file of one data set looks like."""
    name: str
    form: str            # "list", or the field that holds it; "ids" is {id: record}
    fields: list         # the last is the answer
    image_name: str      # LLaVA-1.5's folders

    def matches(self, record):
        return isinstance(record, dict) and record.keys() >= set(self.fields)

    def __str__(self):
        return f"{self.name} ({', '.join(self.fields)})"


COCO = "coco/train2017/{image_id:012d}.jpg"
TEXTVQA = "textvqa/train_images/{image_id}.jpg"
KINDS = [
    Kind("VQAv2", "questions", ["question", "image_id", "multiple_choice_answer"], COCO),
    Kind("OK-VQA", "questions", ["question", "image_id", "answers"], COCO),
    Kind("TextVQA", "data", ["question", "image_id", "answers"], TEXTVQA),
    Kind("GQA", "ids", ["question", "imageId", "answer"], "gqa/images/{imageId}.jpg"),
    Kind("A-OKVQA", "list", ["question", "image_id", "choices", "correct_choice_idx"], COCO),
    Kind("regions", "list", ["image", "phrase", "box"], "{image}"),
    Kind("questions", "list", ["image", "question", "answer"], "{image}"),
]


def read_academic(config):
    """--questions as (its kind, {index or id: record}), with the fields of --annotations."""
    data = list(read_json(config.questions))
    form = "list"
    if len(data) == 1 and isinstance(data[0], dict) and not {"question", "phrase"} & data[0].keys():
        form = next((field for field in ("questions", "data") if field in data[0]), "ids")
        data = data[0] if form == "ids" else typed(data[0][form], list, config.questions)
    if bool(config.annotations) != (form == "questions"):
        raise ValueError(f'{config.questions}: the questions of VQAv2 and OK-VQA, {{"questions": '
                         '[...]}, and no others, have their answers in a file of their own, '
                         '--annotations FILE')
    if form == "questions":
        data = with_annotations(data, config)
    records = data if form == "ids" else dict(enumerate(data))
    for record in records.values():
        for kind in KINDS:
            if kind.form == form and kind.matches(record):
                return kind, records
    raise ValueError(f"{config.questions}: no record is of a known kind, the file begins "
                     f"{str(data)[:200]}; known are {'; '.join(map(str, KINDS))}")


def with_annotations(questions, config):
    """VQAv2's and OK-VQA's questions, each with the fields of the annotation of its question_id."""
    annotations = read_value(config.annotations).get("annotations")
    try:
        by_id = {str(row["question_id"]): row for row in annotations}
        if len(by_id) < len(annotations):
            raise KeyError("a question_id is there twice")
        return [q | by_id.get(str(q["question_id"]), {}) for q in questions]
    except (KeyError, TypeError) as error:
        raise ValueError(f"{config.questions} and {config.annotations}: records with question_id "
                         f"are needed, in fields questions and annotations ({error!r})") from error


# -----------------------------------------------------------------------------
# One record


def box_to_text(box, width, height, aspect="pad"):
    """Corners x1, y1, x2, y2 in pixels as LLaVA-1.5 writes them: shares of what the model sees.

    >>> box_to_text([0, 0, 320, 240], 640, 480)
    '[0.0, 0.12, 0.5, 0.5]'

    "pad" is the square that LLaVA-1.5 pads to (Diss. Sec. 4.3), "stretched" LLaVA-NeXT's global
    picture. Rounding moves a corner by half a hundredth, here by 3.2 pixels. Raises ValueError for
    an empty box and for one that reaches more than a pixel beyond the picture.
    """
    x1, y1, x2, y2 = box
    if not (-1 <= x1 < x2 <= width + 1 and -1 <= y1 < y2 <= height + 1):     # NaN is not, either
        raise ValueError(f"{box} are no corners x1, y1, x2, y2 in a picture of {width} x {height} "
                         "pixels")
    left = top = 0
    shown_width, shown_height = width, height
    if aspect == "pad":                  # OFFICIAL: an odd pixel is added on the right or below
        shown_width = shown_height = max(width, height)
        left = (shown_width - width) // 2
        top = (shown_height - height) // 2
    corners = []
    for x, y in ((x1, y1), (x2, y2)):
        corners.append(round((min(max(x, 0), width) + left) / shown_width, 2))
        corners.append(round((min(max(y, 0), height) + top) / shown_height, 2))
    return str(corners)


def ask_region(record, config, place):
    """A box asked for its phrase, or a phrase for its box (Diss. Sec. 4.3).

    OFFICIAL: one of the two, at random; with both in one conversation, the second question's answer
    would stand in the first.
    """
    if "width" in record:
        width, height = (typed(record[side], int, side) for side in ("width", "height"))
    elif config.images:
        width, height = image_size(image_path(config.images, record["image"]))
    else:
        raise ValueError("the picture's width and height are needed, here or by --images DIR")
    phrase = record["phrase"].strip().rstrip(".")
    if not phrase:
        raise ValueError(f"phrase {record['phrase']!r}: words are needed")
    x, y, w, h = (typed(number, float, "box") for number in record["box"])
    text = box_to_text([x, y, x + w, y + h], width, height, config.aspect)
    way = random.Random(f"{config.seed} {place}").choice(["phrase", "box"])
    if way == "phrase":
        return QA(way, 0, DESCRIBE.format(text), phrase)
    return QA(way, 0, LOCATE.format(phrase), text)


def answer_in(record, kind):
    """The answer; of several people's the most frequent, of equally frequent ones the first."""
    answer = record[kind.fields[-1]]
    if kind.name == "A-OKVQA":
        if typed(answer, int, "correct_choice_idx") < 0:
            raise ValueError(f"correct_choice_idx {answer}: choices are counted from 0")
        return record["choices"][answer]
    if isinstance(answer, list):
        texts = [a["answer"] if isinstance(a, dict) else a for a in answer]
        return Counter(texts).most_common(1)[0][0]
    return answer


def ask_question(record, config, answer):
    """A question with its answer; or with options and a letter, once for each rotation of them."""
    text = record["question"].strip()
    choices = typed(record.get("choices") or [], list, "choices")
    way = config.format_prompt
    if way == "auto":
        way = "letter" if choices else "short"
    if way != "letter":
        return [QA(way, 0, text, answer)]
    if not 2 <= len(choices) <= 26 or choices.count(answer) != 1:
        raise ValueError("a letter needs 2 to 26 choices, and the answer once among them; found "
                         f"{answer!r} and {choices}")
    asked = []
    for rotation in range(len(choices)):
        options = choices[rotation:] + choices[:rotation]
        lines = [text]
        for letter, option in zip(string.ascii_uppercase, options, strict=False):
            lines.append(f"{letter}. {typed(option, str, 'a choice')}")
        letter = string.ascii_uppercase[options.index(answer)]
        asked.append(QA(way, rotation, "\n".join(lines), letter))
    return asked


def ask_record(kind, place, record, config):
    """One record as (the picture's name, [QA, ...]). ValueError says what is wrong with it."""
    if not kind.matches(record):
        raise ValueError(f"needed are {', '.join(kind.fields)}; found {str(record)[:200]}")
    image_field = next(field for field in kind.fields if field.startswith("image"))
    if type(record[image_field]) not in (int, str):
        raise ValueError(f"{image_field}: a name or a number is needed; found "
                         f"{record[image_field]!r}")
    try:
        image = (config.image_name or kind.image_name).format(**record)
        if kind.name == "regions":
            asked = [ask_region(record, config, place)]
        else:
            asked = ask_question(record, config, answer_in(record, kind))
    except (KeyError, TypeError, IndexError, AttributeError, ArithmeticError, OSError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"cannot be used as {kind.name} ({reason})") from error
    texts = [record.get("question", image)]
    for qa in asked:
        texts += [qa.question, qa.answer]
    for text in texts:
        if not isinstance(text, str) or not text.strip() or IMAGE in text:
            raise ValueError(f"text is needed, and without {IMAGE}; found {text!r}")
    return image, asked


# -----------------------------------------------------------------------------
# The command


def as_conversation(asked, prompt):
    """Questions and answers about one picture as LLaVA's turns, the picture first.

    OFFICIAL: the short prompt ends the first question and holds for all of the conversation; the
    letter's ends every question, behind its options. OURS: answers stay as they were annotated,
    "yes" and not "Yes"; the scorers take either.
    """
    turns = []
    for i, qa in enumerate(asked):
        lines = [qa.question]
        if i == 0:
            lines.insert(0, IMAGE)
        if prompt and (i == 0 or prompt == LETTER_PROMPT):
            lines.append(prompt)
        turns.append({"from": "human", "value": "\n".join(lines)})
        turns.append({"from": "gpt", "value": qa.answer.strip()})
    return turns


def group_by_picture(kind, records, config):
    """All questions about a picture together: ({(image, prompt, rotation): [QA, ...]}, problems).

    A rotation of the options is a conversation of its own: asked a second time, a question would
    have been answered just before.
    """
    groups, problems = {}, []
    for place, record in records.items():
        try:
            image, asked = ask_record(kind, place, record, config)
        except ValueError as error:
            problems.append(f"{os.path.basename(config.questions)}[{place}]: {error}")
            continue
        for qa in asked:
            key = image, FORMAT_PROMPTS.get(qa.way, ""), qa.rotation
            groups.setdefault(key, []).append(qa)
    return groups, problems


def convert_academic(config):
    """Write --out, and print what became of all that was read."""
    kind, records = read_academic(config)
    groups, problems = group_by_picture(kind, records, config)
    shown = problems[:MOST_SHOWN]
    if len(problems) > MOST_SHOWN:
        shown.append(f"... and {len(problems) - MOST_SHOWN} more")
    if problems and not (config.skip_bad and groups):
        raise ValueError("\n".join([f"{len(problems):,} of {len(records):,} records are bad "
                                    "(--skip_bad leaves them out):", *shown]))
    most = MOST_REGIONS if kind.name == "regions" else sys.maxsize
    conversations, pieces, ways = [], Counter(), Counter()
    for (image, prompt, _), asked in groups.items():
        ways.update(qa.way for qa in asked)
        for start in range(0, len(asked), most):
            name = Path(image).stem
            if image in pieces:
                name += f"_{pieces[image]}"
            turns = as_conversation(asked[start:start + most], prompt)
            conversations.append({"id": name, "image": image, "conversations": turns})
            pieces[image] += 1
    write_json(config.out, conversations)
    counts = ", ".join(f"{way} {n:,}" for way, n in ways.items())
    print("\n".join([f"{kind.name}: {len(records):,} records, {len(problems):,} left out", *shown]))
    print(f"{config.out}: {len(pieces):,} pictures, {len(conversations):,} conversations, "
          f"{ways.total():,} answers ({counts})")


def main(argv=None):
    description = "Academic visual question answering as LLaVA's conversations."
    convert_academic(Config(**typed_flags(Config, argv, description)))


if __name__ == "__main__":
    run_main(main)
