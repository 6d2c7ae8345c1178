"""VQA in miniature (Diss. Sec. 4.3): the toy's questions with answers of one word or phrase.

    python -m toy.vqa --world out/toy_ablations/seed0/world --out out/toy_ablations/seed0/vqa

Everything here is OURS. It writes

    attributes.jsonl    questions about colour, shape, number and existence, as in VQAv2
    places.jsonl        where a thing is: its region
    relations.jsonl     how two things lie to each other, as in GQA
    exam_WAY.jsonl      a part of the held-out questions, asked in each of three ways

The first three are for `extras.academic convert`, which adds the response-format prompt, or not.
"""
import random
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from extras.academic import FORMAT_PROMPTS
from parts.files import check_least, read_lines, run_main, typed_flags, write_lines
from toy.teacher import draw_question
from toy.world import picture_name, questions_about, read_coco

SOURCES = {
    "attributes": ("colour", "shape", "count", "existence"),
    "places": ("place",),
    "relations": ("relation",),
}
WAYS = {        # the dissertation's Table 4.1b
    "normal": "{}",
    "ambiguous": "Q: {} A:",
    "format": f"{{}}\n{FORMAT_PROMPTS['short']}",
}
MOST_ASKED = 3           # questions of one source about one picture


@dataclass(frozen=True)
class Config:
    world: str                           # folder of toy.world
    out: str                             # folder to write to
    pictures: int = 400                  # with questions to train on
    per_kind: int = 60                   # questions of each kind in the exam
    seed: int = 0


def short_answer(text):
    """The word or phrase that an answer in full comes to; a short answer is its own.

    >>> short_answer("The red star is in C 3.")
    'C 3'
    """
    found = re.search(r"^(?:Yes|No|yes|no)\b|\b[A-D] \d$|\w+$", text.strip().rstrip("."))
    return found[0] if found else ""


def is_short(text):
    return text.strip().rstrip(".") == short_answer(text)


def ask_briefly(scenes, kinds, rng):
    """Up to MOST_ASKED questions of some kinds about each picture, with short answers."""
    rows = []
    for i, scene in scenes.items():
        left = [question for question in questions_about(scene, rng) if question.kind in kinds]
        for _ in range(min(MOST_ASKED, len(left))):
            question = draw_question(left, rng)
            left.remove(question)
            rows.append({
                "image": picture_name(i),
                "question": question.text,
                "answer": short_answer(question.answer),
            })
    return rows


def write_exam(questions, out, per_kind):
    """The first questions of each kind, in three ways, each with its answer in full."""
    counts = Counter()
    exam = []
    for row in questions:
        counts[row["category"]] += 1
        if counts[row["category"]] <= per_kind:
            exam.append(row)
    for way, words in WAYS.items():
        asked = [row | {"text": words.format(row["text"])} for row in exam]
        write_lines(out / f"exam_{way}.jsonl", asked)


def main(argv=None):
    config = Config(**typed_flags(Config, argv, __doc__))
    check_least(config, pictures=1, per_kind=1)
    out = Path(config.out)
    world = Path(config.world)
    scenes = read_coco(world / "annotations" / "instances_train.json")
    for source, kinds in SOURCES.items():
        rng = random.Random(f"{config.seed} {source}")
        drawn = dict(rng.sample(sorted(scenes.items()), min(config.pictures, len(scenes))))
        write_lines(out / f"{source}.jsonl", ask_briefly(drawn, kinds, rng))
    write_exam(read_lines(world / "questions_held_out.jsonl"), out, config.per_kind)
    print(f"{out}: {', '.join(SOURCES)} of {config.pictures} pictures each, an exam")


if __name__ == "__main__":
    run_main(main)
