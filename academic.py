"""
LLaVA-1.5's data: academic visual question answering as conversations (Diss. Sec. 4.2 and 4.3).

    python academic.py --questions v2_OpenEnded_mscoco_train2014_questions.json \\
        --annotations v2_mscoco_train2014_annotations.json --out vqav2.json            VQAv2; OK-VQA in the same way
    python academic.py --questions train_balanced_questions.json --out gqa.json        GQA
    python academic.py --questions aokvqa_v1p0_train.json --out aokvqa.json            A-OKVQA: options, answered by a letter
    python academic.py --questions regions.jsonl --images DIR --out refcoco.json       boxes and what is in them, both ways

A question gets a line that says how to answer, the response-format prompt: "dog" is then what was asked for, and no habit
that spoils the longer answers. What a file is shows in its form and fields (KINDS), never in its name. JSON lines of one's own:

    {"image": "a.jpg", "question": "What is it?", "answer": "a dog", "choices": ["a dog", "a cat"]}       choices or none
    {"image": "a.jpg", "phrase": "the dog on the left", "box": [x, y, width, height]}                     in pixels of a.jpg
"""
import gc
import json
import os
import random
import re
import sys
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from eval import BY_LETTER, read
from judge import write_whole
from records import IMAGE, header_size, image_path, run_command, typed_flags

# OFFICIAL: in the released mixture `short` ends the first question of a conversation only, and holds for all of it; BY_LETTER
# ends every question, behind its options.
FORMAT_PROMPTS = {"short": "Answer the question using a single word or phrase.", "letter": BY_LETTER, "none": ""}
DESCRIBE = "Please provide a short description for this region: {}."
LOCATE = "Please provide the bounding box coordinate of the region this sentence describes: {}."


@dataclass(frozen=True)
class Config:
    questions: str                       # the data set's official file of questions, or JSON lines
    out: str                             # JSON to train on, in LLaVA's format
    annotations: str = None              # VQAv2, OK-VQA: the answers, which are a file of their own
    format_prompt: str = "auto"          # auto: letter for questions with choices, short for the others
    rotate: bool = True                  # letter: ask once per choice, the options moved on by one each time
    image_name: str = None               # of a record's fields, as "val2014/{image_id:012d}.jpg"; default: LLaVA-1.5's folders
    turns: int = None                    # answers in a conversation, the rest goes to further ones (default: all; regions: 10)
    skip_bad: bool = False               # leave bad records out and count them, rather than stop
    ask: str = "random"                  # regions: for the phrase, for the box, or for one of them, drawn for each region
    box: str = "xywh"                    # regions: [x, y, width, height] or the corners [x1, y1, x2, y2], in pixels
    aspect: str = "pad"                  # regions: how the model will see pictures, which is what its coordinates refer to
    decimals: int = 2                    # regions: of the coordinates
    images: str = None                   # regions: folder of the pictures, where records lack their width and height
    seed: int = 0                        # regions: of --ask random


CHOICES = {"format_prompt": ["auto", *FORMAT_PROMPTS], "ask": ["random", "phrase", "box"], "box": ["xywh", "xyxy"],
           "aspect": ["pad", "crop", "stretched"], "decimals": [2, 3]}

# ---------------------------------------------------------------------------------------------------------------------
# Boxes: in pixels of the original picture, and in the unit square of what the model sees


def frame(width, height, aspect):
    """What the model sees, (left, top, width, height) in pixels of the original picture.

    "pad": the square that LLaVA-1.5 pads to (Diss. Sec. 4.3); "crop": the centre crop of the shortest edge; "stretched": the
    picture itself, squeezed into the square, as LLaVA-NeXT's global picture. ValueError for any other word.
    """
    long, short = max(width, height), min(width, height)
    if aspect == "pad":                  # OFFICIAL: whole pixels; an odd one is on the right, or at the bottom
        return -((long - width) // 2), -((long - height) // 2), long, long
    if aspect == "crop":                 # true to a pixel of the resized picture, in which that crop is rounded
        return (width - short) / 2, (height - short) / 2, short, short
    if aspect == "stretched":
        return 0, 0, width, height
    raise ValueError(f"aspect {aspect!r}: {', '.join(CHOICES['aspect'])} are known")


def box_to_text(box, width, height, aspect="pad", decimals=2):
    """Corners [x1, y1, x2, y2] in pixels of a width x height picture as LLaVA-1.5 writes them: shares of what the model sees.

    >>> box_to_text([0, 0, 320, 240], 640, 480)
    '[0.0, 0.12, 0.5, 0.5]'
    Rounding moves a coordinate by half a unit of the last decimal at most, here 3.2 pixels. ValueError for a box that is empty
    or reaches more than a pixel beyond what the model sees; OURS: a box that a crop cuts, too, as its words are of all of it.
    """
    left, top, w, h = frame(width, height, aspect)
    a, b, c, d = max(left, 0), max(top, 0), min(left + w, width), min(top + h, height)
    x1, y1, x2, y2 = box if len(box) == 4 else [0] * 4
    if not (a - 1 <= x1 < x2 <= c + 1 and b - 1 <= y1 < y2 <= d + 1):                   # NaN and inf neither
        raise ValueError(f"corners {box} of a box in a {width} x {height} picture, of which {aspect!r} shows x {a:g} to {c:g}, "
                         f"y {b:g} to {d:g}: they must be x1, y1, x2, y2 in there (--box: xywh or xyxy?)")
    shares = (max(x1, a) - left) / w, (max(y1, b) - top) / h, (min(x2, c) - left) / w, (min(y2, d) - top) / h
    return str([round(share, decimals) for share in shares])


def text_to_box(text, width, height, aspect="pad"):
    """The first [x1, y1, x2, y2] of a text back as corners in pixels of a width x height picture, cut at its edge.

    ValueError if there is none, or it is no box in the unit square.
    """
    found = re.search(r"\[{0},{0},{0},{0}\]".format(r"\s*(\d*\.?\d+)\s*"), text)
    x1, y1, x2, y2 = map(float, found.groups()) if found else (1, 1, 0, 0)
    if not (x1 <= x2 <= 1 and y1 <= y2 <= 1):
        raise ValueError(f"{text!r} has no box [x1, y1, x2, y2] with 0 <= x1 <= x2 <= 1 and 0 <= y1 <= y2 <= 1")
    left, top, w, h = frame(width, height, aspect)
    x1, x2 = (min(max(left + w * x, 0), width) for x in (x1, x2))
    y1, y2 = (min(max(top + h * y, 0), height) for y in (y1, y2))
    return [x1, y1, x2, y2]


# ---------------------------------------------------------------------------------------------------------------------
# The kinds of files, and one record as [(way, rotation, question, answer), ...]


def most_frequent(record):
    """Of some people's answers to one question; of equally frequent ones the first."""
    return Counter(a["answer"] if isinstance(a, dict) else a for a in record["answers"]).most_common(1)[0][0]


COCO, LIST = "coco/train2017/{image_id:012d}.jpg", "list"
KINDS = {    # form: the list is in this field, or is all, or "ids": {id: record}; fields; LLaVA-1.5's picture name; the answer
    "VQAv2": ("questions", ["question", "image_id", "multiple_choice_answer"], COCO, lambda r: r["multiple_choice_answer"]),
    "OK-VQA": ("questions", ["question", "image_id", "answers"], COCO, most_frequent),
    "TextVQA": ("data", ["question", "image_id", "answers"], "textvqa/train_images/{image_id}.jpg", most_frequent),
    "GQA": ("ids", ["question", "imageId", "answer"], "gqa/images/{imageId}.jpg", lambda r: r["answer"]),
    "A-OKVQA": (LIST, ["question", "image_id", "choices", "correct_choice_idx"], COCO,
                lambda r: r["choices"][r["correct_choice_idx"]]),
    "regions": (LIST, ["image", "phrase", "box"], "{image}", None),
    "questions": (LIST, ["image", "question", "answer"], "{image}", lambda r: r["answer"])}


def records_of(args):
    """The kind of --questions, and its records as [(index or id, record), ...]; VQAv2's with their annotations' fields."""
    data = read(args.questions)
    if isinstance(data, dict) and {"question", "phrase"} & data.keys():     # JSON lines, of which there is one
        data = [data]
    form = LIST if isinstance(data, list) else next((form for form in ("questions", "data") if form in data), "ids")
    if bool(args.annotations) != (form == "questions"):
        raise ValueError(f"{args.questions}: the questions of VQAv2 and OK-VQA, {{\"questions\": [...]}}, and no others, have "
                         "their answers in a file of their own, --annotations FILE")
    records = data if form == LIST else data if form == "ids" else data[form]
    records = list(records.items() if isinstance(records, dict) else enumerate(records))
    if form == "questions":
        try:
            rows = {row["question_id"]: row for row in read(args.annotations)["annotations"]}
            records = [(i, q | rows.get(q["question_id"], {})) for i, q in records]
        except (KeyError, TypeError) as error:
            raise ValueError(f"{args.questions} and {args.annotations}: records with question_id are needed, in fields "
                             f"questions and annotations ({type(error).__name__}: {error})") from error
    for _, record in records:
        for name, (its_form, fields, _, _) in KINDS.items():
            if its_form == form and isinstance(record, dict) and record.keys() >= {*fields}:
                return name, records
    raise ValueError(f"{args.questions}: no record is of a known kind, the first is {str(records[:1])[:200]}; known are "
                     + "; ".join(f"{name} ({', '.join(fields)})" for name, (_, fields, _, _) in KINDS.items()))


def region(record, args, place):
    """A box asked for its phrase, or a phrase for its box (Diss. Sec. 4.2).

    OFFICIAL: one of the two, at random; both in one conversation would be a question whose answer was just given.
    """
    if "width" not in record and not args.images:
        raise ValueError("the picture's width and height are needed: in the record, or by --images DIR")
    size = (record["width"], record["height"]) if "width" in record else header_size(image_path(args.images, record["image"]))
    box, phrase = record["box"], record["phrase"].strip().rstrip(".")
    if not phrase:
        raise ValueError(f"phrase {record['phrase']!r}: words are needed")
    if args.box == "xywh":
        box = [box[0], box[1], box[0] + box[2], box[1] + box[3]]
    text = box_to_text(box, *size, args.aspect, args.decimals)
    way = args.ask if args.ask != "random" else random.Random(f"{args.seed} {place}").choice(["phrase", "box"])
    return [(way, 0, DESCRIBE.format(text), phrase) if way == "phrase" else (way, 0, LOCATE.format(phrase), text)]


def question(record, args, answer):
    """A question with its answer, or with its options and a letter, once for each rotation of them."""
    choices = record.get("choices") or []
    how = args.format_prompt if args.format_prompt != "auto" else "letter" if choices else "short"
    if how != "letter":
        return [(how, 0, record["question"].strip(), answer)]
    if not 2 <= len(choices) <= 26 or choices.count(answer) != 1:
        raise ValueError(f"a letter needs 2 to 26 choices, and the answer once among them; found {answer!r} and {choices}")
    turns = []
    for rotation in range(len(choices) if args.rotate else 1):
        options = choices[rotation:] + choices[:rotation]
        lines = [record["question"].strip(), *(f"{chr(65 + i)}. {option}" for i, option in enumerate(options))]
        turns.append((how, rotation, "\n".join(lines), chr(65 + options.index(answer))))
    return turns


def turns_of(name, place, record, args):
    """One record as (picture's name, [(way, rotation, question, answer), ...]). ValueError says what is wrong with it."""
    _, fields, image_name, answer = KINDS[name]
    if not isinstance(record, dict) or not record.keys() >= {*fields}:
        raise ValueError(f"{name} needs {', '.join(fields)}; found {', '.join(record) if isinstance(record, dict) else record}")
    try:
        image = (args.image_name or image_name).format(**record)
        turns = region(record, args, place) if name == "regions" else question(record, args, answer(record))
    except (KeyError, TypeError, IndexError, AttributeError, ArithmeticError, OSError) as error:
        raise ValueError(f"cannot be used as {name} ({type(error).__name__}: {error})") from error
    texts = [record[field] for field in ("image", "phrase", "question") if field in record]
    for text in texts + [text for turn in turns for text in turn[2:]]:
        if not isinstance(text, str) or not text.strip() or IMAGE in text:
            raise ValueError(f"text is needed, and without {IMAGE}; found {text!r}")
    return image, turns


# ---------------------------------------------------------------------------------------------------------------------
# The command


def conversation(pairs, how):
    """Questions and answers about one picture as LLaVA's turns: the picture first, a format prompt on a line of its own."""
    turns, prompt = [], FORMAT_PROMPTS.get(how, "")
    for i, (text, answer) in enumerate(pairs):
        lines = [IMAGE] * (i == 0) + [text] + [prompt] * (prompt > "" and (i == 0 or how == "letter"))
        # OURS: answers stay as they were annotated, "yes" and not "Yes"; the scorers take either.
        turns += [{"from": "human", "value": "\n".join(lines)}, {"from": "gpt", "value": answer.strip()}]
    return turns


def convert(args):
    """Write --out, and say what became of all that was read.

    All questions about a picture are one conversation. A rotation of the options is one of its own: the same question a second
    time would have been answered just before.
    """
    name, records = records_of(args)
    if name == "regions" and args.format_prompt != "auto":
        raise ValueError(f"--format_prompt {args.format_prompt}: regions have questions of their own")
    groups, ways, problems = {}, Counter(), []
    for place, record in records:
        try:
            image, turns = turns_of(name, place, record, args)
        except ValueError as error:
            problems.append(f"{os.path.basename(args.questions)}[{place}]: {error}")
            continue
        for way, rotation, text, answer in turns:
            ways[way] += 1
            groups.setdefault((image, way if way in FORMAT_PROMPTS else "none", rotation), []).append((text, answer))
    shown = "\n".join(problems[:20] + [f"... and {len(problems) - 20} more"] * (len(problems) > 20))
    if problems and (not args.skip_bad or not groups):
        raise ValueError(f"{len(problems):,} of {len(records):,} records are bad (--skip_bad leaves them out):\n{shown}")
    most, made, pieces = args.turns or (10 if name == "regions" else sys.maxsize), [], Counter()
    for (image, how, _), pairs in groups.items():
        for at in range(0, len(pairs), most):
            name_of = Path(image).stem + f"_{pieces[image]}" * (pieces[image] > 0)
            made.append({"id": name_of, "image": image, "conversations": conversation(pairs[at:at + most], how)})
            pieces[image] += 1
    write_whole(args.out, json.dumps(made, indent=1) + "\n")
    print(f"{name}: {len(records):,} records, {len(problems):,} bad and left out" + f":\n{shown}" * bool(problems))
    print(f"{args.out}: {len(pieces):,} pictures, {len(made):,} conversations, {sum(ways.values()):,} answers ("
          + ", ".join(f"{way} {n:,}" for way, n in ways.items()) + ")")


def arguments(argv):
    """A command line -> (function, its configuration)"""
    args = Config(**typed_flags(Config, argv, "Academic visual question answering as LLaVA's conversations.", CHOICES))
    if args.turns is not None and args.turns < 1:
        raise ValueError(f"--turns {args.turns}: a conversation has at least 1 answer")
    return convert, args


def main(argv=None):
    run_command(__doc__, arguments, argv)


if __name__ == "__main__":
    gc.disable()                         # millions of small objects and no garbage, as in eval.py
    try:
        main()
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
