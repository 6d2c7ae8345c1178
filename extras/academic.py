"""
LLaVA-1.5's data: academic data sets as conversations, and its mixture by source (Diss. Sec. 4.3).

    python -m extras.academic convert --questions v2_OpenEnded_mscoco_train2014_questions.json \\
        --annotations v2_mscoco_train2014_annotations.json --out vqav2.json       also OK-VQA
    python -m extras.academic convert --questions train_balanced_questions.json --out gqa.json
    python -m extras.academic convert --questions "refcoco/refs(unc).p" \\
        --annotations refcoco/instances.json --out refcoco.json
    python -m extras.academic split --data llava_v1_5_mix665k.json --out data/mix665k

A question gets a line that says how to answer, the response-format prompt. "dog" is then what was
asked for, and no habit that spoils longer answers. The files that are read, and how each is known,
are the table KINDS of extras/academic_layouts.py; in its last rows, JSON lines of your own, with or
without choices, or with boxes in pixels:

    {"image": "a.jpg", "question": "What is it?", "answer": "a dog", "choices": ["a dog", "a cat"]}
    {"image": "a.jpg", "phrase": "the dog on the left", "box": [x, y, width, height],
     "width": 640, "height": 480}
"""
import os
import random
import string
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

from extras.academic_layouts import read_academic
from parts.files import IMAGE, read_json, run_command, run_main, typed, write_array, write_json
from parts.records import normal_record
from parts.scienceqa import lettered

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
    questions: str                  # an official file, or a folder of AI2D's, or JSON lines
    out: str                        # JSON to train on, in LLaVA's format
    annotations: str = None         # the official file beside it: answers, boxes, sizes, OCR tokens
    format_prompt: str = "auto"     # auto: letter for questions with choices, short for the others
    image_name: str = None          # as "val2014/{image_id:012d}.jpg"; default: LLaVA-1.5's folders
    skip_bad: bool = False          # leave bad records out and count them, rather than stop
    aspect: str = "pad"             # regions: padded to a square, or stretched as LLaVA-NeXT does
    seed: int = 0                   # regions: which, and what is asked for, the phrase or the box

    CHOICES: ClassVar[dict] = {"format_prompt": ["auto", *FORMAT_PROMPTS],
                               "aspect": ["pad", "stretched"]}


class QA(NamedTuple):
    """One question with its answer."""
    way: str             # "short", "letter", "none"; of a region what is asked: "phrase" or "box"
    part: int            # questions of different parts never stand in one conversation
    question: str
    answer: str


# -----------------------------------------------------------------------------
# One record


def box_to_text(box, width, height, aspect="pad"):
    """Corners x1, y1, x2, y2 in pixels as LLaVA-1.5 writes them: shares of what the model sees.

    >>> box_to_text([0, 0, 320, 240], 640, 480)
    '[0.0, 0.12, 0.5, 0.5]'

    "pad" is the square that LLaVA-1.5 pads to, as released; the dissertation pads only HD's global
    picture. "stretched" is LLaVA-NeXT's. Rounding moves a corner by half a hundredth, here by 3.2
    pixels. Raises ValueError for an empty box and for one that reaches more than a pixel beyond the
    picture.
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


def ask_region(item, config, rng):
    """A box asked for its phrase, or a phrase for its box (Diss. Sec. 4.3).

    OFFICIAL: one of the two, at random; with both in one conversation, the second question's answer
    would stand in the first.
    """
    width, height = (typed(item[side], int, side) for side in ("width", "height"))
    phrase = item["phrase"].strip().rstrip(".")
    if not phrase:
        raise ValueError(f"phrase {item['phrase']!r}: words are needed")
    x, y, w, h = (typed(number, float, "box") for number in item["box"])
    text = box_to_text([x, y, x + w, y + h], width, height, config.aspect)
    way = rng.choice(["phrase", "box"])
    if way == "phrase":
        return QA(way, 0, DESCRIBE.format(text), phrase)
    return QA(way, 0, LOCATE.format(phrase), text)


def ask_question(item, config):
    """A question with its answer; or with options and a letter, once for each rotation of them."""
    text, answer = item["question"].strip(), item["answer"]
    choices = typed(item.get("choices") or [], list, "choices")
    way = config.format_prompt
    if way == "auto":
        way = "letter" if choices else "short"
    way = item.get("way", way)
    if way != "letter":
        return [QA(way, 0, text, answer)]
    if not 2 <= len(choices) <= 26 or choices.count(answer) != 1:
        raise ValueError("a letter needs 2 to 26 choices, and the answer once among them; found "
                         f"{answer!r} and {choices}")
    asked = []
    for rotation in range(len(choices) if item.get("rotate", True) else 1):
        options = choices[rotation:] + choices[:rotation]
        lines = [text, *lettered(typed(option, str, "a choice") for option in options)]
        letter = string.ascii_uppercase[options.index(answer)]
        asked.append(QA(way, rotation, "\n".join(lines), letter))
    return asked


def ask_conversation(item, place):
    """The turns of a conversation, which stays alone; a picture goes before its first question."""
    normal_record(item)                  # raises ValueError for what training refuses
    texts = [turn["value"].replace(IMAGE, "").strip() for turn in item["conversations"]]
    return [QA("conversation", place, question, answer)
            for question, answer in zip(texts[::2], texts[1::2], strict=True)]


def picture_of(item, kind, place, record, config):
    """The name of an item's picture, or None for text alone."""
    if "conversations" in item and not item["image"]:
        return None
    if config.image_name or "image" not in item:
        field = kind.fields[0]
        if type(record[field]) not in (int, str):
            raise ValueError(f"{field}: a name or a number is needed; found {record[field]!r}")
        return (config.image_name or kind.image_name).format(**{"key": place} | record)
    return typed(item["image"], str, "image")


def ask_item(item, image, place, config, rng):
    """One item of a record as [QA, ...]. Raises ValueError that says what is wrong with it."""
    if "conversations" in item:
        return ask_conversation(item, place)
    if "box" in item:
        asked = [ask_region(item, config, rng)]
    else:
        asked = ask_question(item, config)
    texts = [image, item.get("question", image)]
    for qa in asked:
        texts += [qa.question, qa.answer]
    for text in texts:
        if not isinstance(text, str) or not text.strip() or IMAGE in text:
            raise ValueError(f"text is needed, and without {IMAGE}; found {text!r}")
    return asked


@contextmanager
def noted_problem(problems, where, kind):
    """Note (place, what is wrong in this block), and go on behind it."""
    try:
        yield
    except (LookupError, TypeError, AttributeError, ArithmeticError) as error:
        problems.append((where, f"cannot be used as {kind} ({error!r})"))
    except ValueError as error:
        problems.append((where, str(error)))


# -----------------------------------------------------------------------------
# convert: one data set


def as_conversation(asked, prompt, image):
    """Questions and answers as LLaVA's turns, the picture first, if there is one.

    OFFICIAL: the short prompt ends the first question and holds for all of the conversation; the
    letter's ends every question, behind its options. OURS: answers stay as they were annotated,
    "yes" and not "Yes"; the scorers take either.
    """
    turns = []
    for i, qa in enumerate(asked):
        lines = [qa.question]
        if i == 0 and image:
            lines.insert(0, IMAGE)
        if prompt and (i == 0 or prompt == LETTER_PROMPT):
            lines.append(prompt)
        turns.append({"from": "human", "value": "\n".join(lines)})
        turns.append({"from": "gpt", "value": qa.answer.strip()})
    return turns


def group_by_picture(kind, records, config):
    """All questions about a picture together: ({(image, prompt, part): [QA, ...]}, problems, left).

    A rotation of the options is a conversation of its own: asked a second time, a question would
    have been answered just before. `left` counts what is rightly not asked, by its reason.
    """
    groups, problems, left = {}, [], Counter()
    for place, record in records.items():
        where = f"{os.path.basename(config.questions)}[{place}]"
        rng = random.Random(f"{config.seed} {place}")
        items = []
        with noted_problem(problems, where, kind.name):
            items = items_of(kind, record, rng, left)
        for item in items:
            with noted_problem(problems, where, kind.name):
                image = picture_of(item, kind, place, record, config)
                for qa in ask_item(item, image, place, config, rng):
                    key = image, FORMAT_PROMPTS.get(qa.way, ""), qa.part
                    group = groups.setdefault(key, [])
                    if kind.once and group:
                        left["about a picture that has one"] += 1
                    else:
                        group.append(qa)
    return groups, problems, left


def items_of(kind, record, rng, left):
    """What a record says that is for training; of Visual Genome's regions ten, at random."""
    if not kind.matches(record, kind.joined):
        raise ValueError(f"needed are {', '.join([*kind.fields, *kind.joined])}; found "
                         f"{str(record)[:200]}")
    if kind.split is not None:
        split = typed(record["split"], type(kind.split), "split")
        if split != kind.split:
            left[f"of split {split}, not {kind.split}"] += 1
            return []
    items = kind.items(record, kind)
    if not items:
        left["with nothing to ask"] += 1
    if kind.most is not None and len(items) > kind.most:
        left["not drawn"] += len(items) - kind.most
        items = [items[i] for i in sorted(rng.sample(range(len(items)), kind.most))]
    return items


def convert_academic(config):
    """Make one academic data set LLaVA's conversations, and print what became of its records."""
    kind, records = read_academic(config.questions, config.annotations)
    groups, problems, left = group_by_picture(kind, records, config)
    shown = [f"{where}: {reason}" for where, reason in problems[:MOST_SHOWN]]
    n_bad = len({where for where, _ in problems})
    if problems and not (config.skip_bad and groups):
        raise ValueError("\n".join([f"{n_bad:,} of {len(records):,} records are bad "
                                    "(--skip_bad leaves them out):", *shown]))
    notes = [f"{n:,} {reason}" for reason, n in left.items()]
    if not groups:
        raise ValueError(f"{config.questions}: nothing in it to train on; found {', '.join(notes)}")
    conversations = as_records(groups)
    write_json(config.out, conversations)
    print(f"{kind.name}: {len(records):,} records, {len(problems):,} left out")
    for line in [*shown, *notes]:
        print(line)
    n_pictures = len({image for image, _, _ in groups if image})
    ways = Counter(qa.way for asked in groups.values() for qa in asked)
    counts = ", ".join(f"{way} {n:,}" for way, n in ways.items())
    print(f"{config.out}: {n_pictures:,} pictures, {len(conversations):,} conversations, "
          f"{ways.total():,} answers ({counts})")


def as_records(groups):
    """LLaVA's records, one a group; of regions, at most MOST_REGIONS answers in each."""
    records = []
    pieces = Counter()
    for (image, prompt, _), asked in groups.items():
        most = len(asked)
        if asked[0].way in ("phrase", "box"):
            most = MOST_REGIONS
        for start in range(0, len(asked), most):
            record = {"id": Path(image or "text").stem}
            if pieces[image]:
                record["id"] += f"_{pieces[image]}"
            pieces[image] += 1
            if image:
                record["image"] = image
            record["conversations"] = as_conversation(asked[start:start + most], prompt, image)
            records.append(record)
    return records


# -----------------------------------------------------------------------------
# split: the released mixture


MIXTURE_FOLDERS = ("gqa", "ocr_vqa", "textvqa", "vg")
ON_COCO = {      # what the first question about a picture of COCO holds
    "a_okvqa": [LETTER_PROMPT],
    "vqa": [FORMAT_PROMPTS["short"]],
    "refcoco": [DESCRIBE.split(":")[0], LOCATE.split(":")[0]],
}


@dataclass(frozen=True)
class SplitConfig:
    data: str                       # llava_v1_5_mix665k.json
    out: str                        # a folder, for one file a source


def source_of(record, where):
    """Which data set a record of LLaVA-1.5's mixture is from.

    No picture: sharegpt. The folder of the picture: gqa, ocr_vqa, textvqa (the captions of
    TextCaps) or vg. In coco/, the prompt of the first question: a_okvqa, refcoco, or vqa, which is
    VQAv2 and OK-VQA, whose records cannot be told apart; what has none is llava_instruct.
    """
    try:
        turns = typed(record["conversations"], list, f"{where}: conversations")
        image = record.get("image")
        if not image:
            return "sharegpt"
        folder = image.split("/")[0]
        if folder in MIXTURE_FOLDERS:
            return folder
        question = turns[0]["value"]
        sources = [source for source, prompts in ON_COCO.items()
                   if any(prompt in question for prompt in prompts)]
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise ValueError(f"{where}: no record in LLaVA's format ({error!r})") from error
    if folder != "coco":
        raise ValueError(f"{where}: image {image!r} is in none of coco, "
                         f"{', '.join(MIXTURE_FOLDERS)}; LLaVA-1.5's mixture is needed")
    return sources[0] if sources else "llava_instruct"


def split_mixture(config):
    """Split LLaVA-1.5's mixture by source: OUT/gqa.json, OUT/vqa.json, ..., each in its order."""
    sources = {name: [] for name in ("llava_instruct", "sharegpt", *MIXTURE_FOLDERS, *ON_COCO)}
    for i, record in enumerate(read_json(config.data)):
        source = source_of(record, f"{os.path.basename(config.data)}[{i}]")
        sources[source].append(record)
    if not any(sources.values()):
        raise ValueError(f"{config.data}: no records in it")
    for source, records in sources.items():
        if records:
            write_array(Path(config.out, f"{source}.json"), records)
        print(f"{source:<16}{len(records):>9,}")
    print(f"{'all':<16}{sum(map(len, sources.values())):>9,}")


# -----------------------------------------------------------------------------
# The command


COMMANDS = {"convert": (convert_academic, Config), "split": (split_mixture, SplitConfig)}


def main(argv=None):
    run_command(COMMANDS, argv, __doc__)


if __name__ == "__main__":
    run_main(main)
