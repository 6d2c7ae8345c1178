"""
The official files of the data of LLaVA-1.5 (Diss. Sec. 4.3) and LLaVA-NeXT (Diss. Sec. 4.7), read.

A file is known by its fields, not by its name. Each record says one or more items:

    {"question": "What is it?", "answer": "a dog"}           and "choices": ["a dog", "a cat"]
    {"phrase": "the dog on the left", "box": [x, y, width, height]}     and "width", "height"
    {"conversations": [{"from": "human", "value": "Hello."}, {"from": "gpt", "value": "Hello!"}]}

How these are asked, and which of them stand in one conversation, is in extras/academic.py.
"""
import json
import pickle
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from parts.files import PROMPTS, errors_of_file, read_json, read_value, typed

# OFFICIAL: the question of TextCaps in the released mixture, perhaps with what an OCR engine read.
CAPTION = "Provide a one-sentence caption for the provided image."
OCR_TOKENS = "\nReference OCR token: {}"
# OURS: the words that ask for the text of a page; what LLaVA-NeXT asked is in no paper.
READ_PAGE = "Read out all of the text in the picture."


# -----------------------------------------------------------------------------
# What a record says


def most_frequent(answers):
    """The answer; of several people's the most frequent, of equally frequent ones the first."""
    if not isinstance(answers, list):
        return answers
    texts = [a["answer"] if isinstance(a, dict) else a for a in answers]
    return Counter(texts).most_common(1)[0][0]


def chosen(choices, index, where):
    """One of the choices by its index, which is counted from 0."""
    if typed(index, int, where) < 0:
        raise ValueError(f"{where} {index}: choices are counted from 0")
    return typed(choices, list, "choices")[index]


def one_question(record, kind):
    """The question of the second field, with the answer of the last."""
    return [{"question": record[kind.fields[1]], "answer": most_frequent(record[kind.fields[-1]]),
             "choices": record.get("choices")}]


def annotated_question(record, kind):
    """VQAv2 has chosen one of ten people's answers; OK-VQA has not."""
    answer = record.get("multiple_choice_answer", record["answers"])
    return [{"question": record["question"], "answer": most_frequent(answer)}]


def question_with_choices(record, kind):
    """A-OKVQA: the right choice by its index."""
    answer = chosen(record["choices"], record["correct_choice_idx"], "correct_choice_idx")
    return [{"question": record["question"], "answer": answer, "choices": record["choices"]}]


def questions_about_a_cover(record, kind):
    """OCR-VQA: parallel lists of questions and answers about the cover of a book."""
    pairs = zip(typed(record["questions"], list, "questions"),
                typed(record["answers"], list, "answers"), strict=True)
    return [{"question": question, "answer": answer} for question, answer in pairs]


def questions_about_a_diagram(record, kind):
    """AI2D: {question: choices and the index of the right one}.

    Where the choices are letters, these stand in a second picture, in place of the labels. OURS:
    the choices are asked in their own order alone; the rotations are A-OKVQA's.
    """
    items = []
    for question, row in typed(record["questions"], dict, "questions").items():
        choices = row["answerTexts"]
        folder = "abc_images" if row.get("abcLabel") else "images"
        items.append({"question": question, "choices": choices, "rotate": False,
                      "answer": chosen(choices, row["correctAnswer"], "correctAnswer"),
                      "image": f"ai2d/{folder}/{record['imageName']}"})
    return items


def caption_with_text(record, kind):
    """TextCaps: all records of a picture say one thing, the first of its five captions.

    OURS: which of the five it is. LLaVA-1.5 has one a picture (22K).
    """
    item = {"question": CAPTION, "answer": record["reference_strs"][0], "way": "caption"}
    if record.get("ocr_tokens"):
        tokens = typed(record["ocr_tokens"], list, "ocr_tokens")
        item["question"] += OCR_TOKENS.format(", ".join(tokens))
        item["way"] = "caption with OCR tokens"
    return [item]


def long_caption(record, kind):
    """LAION-GPT-V: a picture and what GPT-4V said of it.

    OURS: it is asked for as Sec. 3 of the paper asks for details, always by the first of our ways.
    """
    questions = (PROMPTS / "detail_instructions.txt").read_text(encoding="utf-8").splitlines()
    return [{"question": questions[0], "answer": record["caption"], "way": "description"}]


def text_of_a_page(record, kind):
    """SynthDoG: the text of a page stands in JSON within the JSON."""
    with errors_of_file("ground_truth"):
        truth = json.loads(record["ground_truth"])
    return [{"question": READ_PAGE, "answer": truth["gt_parse"]["text_sequence"], "way": "page"}]


def own_region(record, kind):
    """JSON lines of your own: phrase and box, in a picture of width and height."""
    return [record]


def described_regions(record, kind):
    """Visual Genome: phrases and boxes of a picture, which lies in one of two folders."""
    folder, name = record["url"].split("/")[-2:]
    items = []
    for region in typed(record["regions"], list, "regions"):
        box = [region[side] for side in ("x", "y", "width", "height")]
        items.append({"phrase": region["phrase"], "box": box, "width": record["width"],
                      "height": record["height"], "image": f"vg/{folder}/{name}"})
    return items


def referred_object(record, kind):
    """RefCOCO, RefCOCO+ and RefCOCOg: one box, and what several people called it."""
    size = {side: record[side] for side in ("width", "height")}
    return [{"phrase": sentence["sent"], "box": record["bbox"], **size}
            for sentence in typed(record["sentences"], list, "sentences")]


def whole_conversation(record, kind):
    """ShareGPT and ShareGPT4V: a conversation as it is, about one picture or none."""
    return [{"conversations": record["conversations"], "image": record.get("image")}]


# -----------------------------------------------------------------------------
# The kinds of files


class Kind(NamedTuple):
    """What the file of one data set looks like."""
    name: str
    fields: list            # the picture, what is asked, ..., the answer
    image_name: str         # the picture's place; an item that has an "image" knows better
    items: Callable = one_question     # function of (record, kind) -> what it says
    joins: tuple = ()       # (a field, where in --annotations, the same field there), ...
    joined: tuple = ()      # the fields that cannot be missing from there
    split: object = None    # the value of "split" that is for training
    most: int = None        # so many of a record's items are drawn; OURS: which
    once: bool = False      # all records of a picture say the same

    def matches(self, record, joined=()):
        return isinstance(record, dict) and record.keys() >= {*self.fields, *joined}

    def __str__(self):
        return f"{self.name} ({', '.join(self.fields)})"


COCO = "coco/train2017/{image_id:012d}.jpg"
TEXTVQA = "textvqa/train_images/{image_id}.jpg"
# A record is of the first kind of which it has the fields; many have those of VQAv2, too. Of
# LLaVA-1.5 the folders are those of the released mixture; so are they of NeXT, where known.
KINDS = [
    Kind("TextVQA", ["image_id", "question", "answers"], TEXTVQA),
    Kind("TextCaps", ["image_id", "caption_str", "reference_strs"], TEXTVQA, caption_with_text,
         (("image_id", "data", "image_id"),), once=True),
    Kind("A-OKVQA", ["image_id", "question", "choices", "correct_choice_idx"], COCO,
         question_with_choices),
    Kind("GQA", ["imageId", "question", "answer"], "gqa/images/{imageId}.jpg"),
    Kind("OCR-VQA", ["imageURL", "questions", "split", "answers"], "ocr_vqa/images/{key}.jpg",
         questions_about_a_cover, split=1),
    Kind("RefCOCO", ["image_id", "sentences", "split", "ann_id"], COCO, referred_object,
         (("ann_id", "annotations", "id"), ("image_id", "images", "id")),
         ("bbox", "width", "height"), "train"),
    Kind("Visual Genome", ["id", "regions"], "", described_regions, (("id", "", "image_id"),),
         ("url", "width", "height"), most=10),
    Kind("DocVQA", ["image", "question", "docId", "answers"], "docvqa/{image}"),
    Kind("ChartQA", ["imgname", "query", "label"], "chartqa/train/png/{imgname}"),
    Kind("DVQA", ["image", "question", "question_id", "template_id", "answer"],
         "dvqa/images/{image}"),
    Kind("AI2D", ["imageName", "questions"], "", questions_about_a_diagram),
    Kind("SynthDoG", ["file_name", "ground_truth"], "synthdog-en/images/{file_name}",
         text_of_a_page),
    Kind("LAION-GPT-V", ["image", "caption"], "laion-gpt4v/{image}", long_caption),
    Kind("ShareGPT or ShareGPT4V", ["conversations"], "", whole_conversation),
    Kind("regions", ["image", "phrase", "box", "width", "height"], "{image}", own_region),
    Kind("questions", ["image", "question", "answer"], "{image}"),
    Kind("VQAv2 or OK-VQA", ["image_id", "question", "question_id"], COCO, annotated_question,
         (("question_id", "annotations", "question_id"),), ("answers",)),
]


# -----------------------------------------------------------------------------
# Reading


class PlainUnpickler(pickle.Unpickler):
    """Reads numbers, text, lists and dicts, and refuses whatever would run code."""

    def find_class(self, module, name):
        raise ValueError(f"it asks for the code {module}.{name}; only plain data is read")


def read_pickle(path):
    """RefCOCO's refs(unc).p, a pickle of Python 2."""
    try:
        with open(path, "rb") as f:
            return PlainUnpickler(f, encoding="utf-8").load()
    except Exception as error:           # which they are for a file that is no pickle, is not said
        raise ValueError(f"{path}: no pickle of plain data: {error}") from error


def read_official(path):
    """--questions as a value: of a file, or of a folder with one JSON file a picture (AI2D)."""
    if Path(path).is_dir():
        return [read_value(file) for file in sorted(Path(path).glob("*.json"))]
    if Path(path).suffix in (".p", ".pkl"):
        return read_pickle(path)
    data = list(read_json(path))
    if len(data) == 1 and isinstance(data[0], dict) and not kind_of_record(data[0]):
        data = data[0]                   # an object that holds all records, or is {id: record}
        data = data.get("questions", data.get("data", data))
    return data


def kind_of_record(record):
    return next((kind for kind in KINDS if kind.matches(record)), None)


def read_academic(questions, annotations=None):
    """An official file as (its kind, {index or id: record}), with the fields of --annotations.

    Raises ValueError for a file of no known kind, and for annotations that are missing, unneeded or
    of another file.
    """
    records = read_official(questions)
    if not isinstance(records, dict):
        records = dict(enumerate(typed(records, list, questions)))
    kind = next(filter(None, map(kind_of_record, records.values())), None)
    if kind is None:
        raise ValueError(f"{questions}: no record is of a known kind, the file begins "
                         f"{str(records)[:200]}; known are {'; '.join(map(str, KINDS))}")
    if kind.joined and not annotations:
        raise ValueError(f"{questions}: {kind} has {', '.join(kind.joined)} in a file of their "
                         "own, --annotations FILE")
    if annotations and not kind.joins:
        raise ValueError(f"{questions}: {kind} needs no --annotations; all is in the file itself")
    if annotations:
        records = with_annotations(records, kind, annotations)
    return kind, records


def with_annotations(records, kind, path):
    """The records, each with the fields of those rows of another file that have its ids."""
    content = list(read_json(path))
    for field, place, same_field in kind.joins:
        try:
            rows = content[0][place] if place else content
            by_id = {str(row[same_field]): row for row in rows}
            if len(by_id) < len(rows):
                raise KeyError(f"a {same_field} is there twice")
        except (KeyError, TypeError, IndexError) as error:
            where = f"field {place} of an object" if place else "a list"
            raise ValueError(f"{path}: for {kind.name}, the annotations are rows with "
                             f"{same_field} in {where} ({error!r})") from error
        for key, record in records.items():
            if isinstance(record, dict):
                records[key] = record | by_id.get(str(record.get(field)), {})
    return records
