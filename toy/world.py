"""A miniature world in which the paper runs on a laptop: pictures, captions, boxes, questions.

    python -m toy.world world --out out/toy/world --seed 0    what runs/toy.sh trains and tests on
    python -m toy.world react --out out/react_toy/world       a corpus for REACT (Diss. Ch. 2)

Everything here is OURS: the paper has no toy. The world stands in for COCO, which has photographs,
five captions of each, and the boxes of what is on them. Beside it stand

    toy/teacher.py     GPT-4, the teacher of Sec. 3 and the judge of Sec. 5.1
    toy/pretrained/    CLIP and Vicuna, made by toy/pretrain.py of this world's pictures and texts
    toy/report.py      accuracies, and Tables 4 and 8 in miniature

Some pairs of colour and shape (HELD_OUT) are in no picture that any part trains on. The language
model has read of them, as Vicuna has read of purple triangles. Whether the assembled model can see
one is the test of composition, `new_pairs`.
"""
import json
import math
import random
from collections import Counter
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import ClassVar

from PIL import Image, ImageDraw

from parts.files import check_least, run_command, run_main, write_lines, write_text

COLOURS = {
    "red": (222, 45, 38),
    "orange": (250, 140, 30),
    "yellow": (240, 220, 40),
    "green": (50, 165, 70),
    "blue": (45, 95, 215),
    "purple": (130, 50, 165),
    "pink": (245, 130, 190),
    "black": (35, 35, 35),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
PAIRS = [(colour, shape) for colour in COLOURS for shape in SHAPES]
HELD_OUT = [    # every colour once, every shape at most twice
    ("red", "square"), ("orange", "circle"), ("yellow", "cross"), ("green", "star"),
    ("blue", "ring"), ("purple", "triangle"), ("pink", "square"), ("black", "circle"),
]
SEEN = [pair for pair in PAIRS if pair not in HELD_OUT]
TARGETS = HELD_OUT + SEEN[::7]           # REACT's 14 classes: 8 that CLIP never saw, 6 that it did
GRID = 4                                 # things stand in the cells of a jittered 4 x 4 grid
CELL = 16                                # pixels; a cell is a patch of the toy's CLIP, so N = 16
SIDE = GRID * CELL                       # pictures are 64 x 64
NUMBERS = ("zero", "one", "two", "three", "four")
N_ANSWERS = {                            # the kinds of questions, and how many answers each has
    "colour": len(COLOURS),
    "shape": len(SHAPES),
    "count": len(NUMBERS),
    "existence": 2,
    "relation": 4,
    "place": 4,
}
KINDS = tuple(N_ANSWERS)


# ------------------------------------------------------------------------------------------------
# Scenes and pictures


@dataclass(frozen=True)
class Thing:
    """One coloured shape, known by what COCO says of it: a category ("red circle") and a box."""
    colour: str
    shape: str
    box: tuple                           # (x, y, width, height) in pixels
    paint: tuple = None                  # an RGB other than the colour's, for CLIP's pictures only
    side: int = SIDE                     # of the picture, in pixels

    @property
    def pair(self):
        return self.colour, self.shape

    @property
    def name(self):
        return f"{self.colour} {self.shape}"

    @property
    def size(self):
        return "large" if self.box[2] > 11 else "small"

    @property
    def cell(self):
        """(row, column), both from 0 to 3: that of the middle of the box."""
        x, y, width, height = self.box
        return (y + height // 2) * GRID // self.side, (x + width // 2) * GRID // self.side

    @property
    def row(self):
        return "1234"[self.cell[0]]

    @property
    def column(self):
        return "ABCD"[self.cell[1]]

    @property
    def place(self):
        """As in a spreadsheet: A 1 is at the top left."""
        return f"{self.column} {self.row}"


@dataclass(frozen=True)
class Scene:
    """One to four things in reading order, and the grey of the paper that they lie on."""
    things: tuple
    grey: int = 235

    @property
    def side(self):
        return self.things[0].side

    @property
    def unique_things(self):
        """Those whose colour and shape no other thing has, so that "the red circle" means one."""
        pairs = [thing.pair for thing in self.things]
        return [thing for thing in self.things if pairs.count(thing.pair) == 1]

    def things_with(self, value):
        """Those of one colour or one shape."""
        return [thing for thing in self.things if value in thing.pair]


def scene_with(things, grey=235):
    """A scene of things in any order."""
    return Scene(tuple(sorted(things, key=attrgetter("cell"))), grey)


def sample_scene(rng, pairs=SEEN, must=None, side=SIDE):
    """A random scene of `pairs`; its first thing is one of `must`, if given.

    Half of the scenes lean to one colour or shape, or counts above two and hard negatives would be
    rare. A larger picture has things of the same size.
    """
    theme = rng.choice([None] * 14 + list(COLOURS) + list(SHAPES))
    count = rng.choice((1, 2, 2, 3, 3, 4, 4))
    chosen = []
    for i in range(count):
        pool = pairs
        if must and i == 0:
            pool = must
        elif theme and rng.random() < 0.75:
            pool = [pair for pair in pairs if theme in pair]
        chosen.append(rng.choice(pool))
    cells = rng.sample(range(GRID * GRID), count)
    things = []
    for pair, cell in zip(chosen, cells, strict=True):
        things.append(place_thing(rng, pair, cell, side))
    return scene_with(things, rng.randint(215, 250))


def place_thing(rng, pair, cell, side):
    """A thing of random size somewhere in a cell, never across the border of two patches."""
    size = rng.choice((9, 10, 13, 14))
    slack = CELL - size - 1              # a pixel of air: it never touches the neighbouring patch
    zoom = side // SIDE                  # patches along the side of a cell
    patch = [zoom * (cell % GRID), zoom * (cell // GRID)]
    if zoom > 1:
        patch = [start + rng.randrange(zoom) for start in patch]
    x, y = (CELL * at + 1 + rng.randint(0, slack - 1) for at in patch)
    return Thing(*pair, (x, y, size, size), side=side)


def outline(shape):
    """The corners of a shape in the unit square. They touch all four sides, so a box is exact."""
    if shape == "star":
        points = []
        for k in range(10):
            radius = 0.42 if k % 2 else 1
            points.append((radius * math.sin(math.pi * k / 5), -radius * math.cos(math.pi * k / 5)))
        xs, ys = zip(*points, strict=True)
        width = max(xs) - min(xs)
        height = max(ys) - min(ys)
        return [((x - min(xs)) / width, (y - min(ys)) / height) for x, y in points]
    return {
        "square": [(0, 0), (1, 0), (1, 1), (0, 1)],
        "triangle": [(.5, 0), (1, 1), (0, 1)],
        "cross": [(.3, 0), (.7, 0), (.7, .3), (1, .3), (1, .7), (.7, .7),
                  (.7, 1), (.3, 1), (.3, .7), (0, .7), (0, .3), (.3, .3)],
    }[shape]


def draw_scene(scene, scale=4):
    """Scene -> RGB picture. It is drawn `scale` times larger and averaged down: anti-aliasing."""
    size = scene.side * scale
    picture = Image.new("RGB", (size, size), (scene.grey,) * 3)
    pen = ImageDraw.Draw(picture)
    for thing in scene.things:
        x, y, width, height = (scale * v for v in thing.box)
        colour = thing.paint or COLOURS[thing.colour]
        frame = (x, y, x + width - 1, y + height - 1)
        if thing.shape == "circle":
            pen.ellipse(frame, fill=colour)
        elif thing.shape == "ring":
            pen.ellipse(frame, outline=colour, width=round(width * 0.24))
        else:
            corners = outline(thing.shape)
            pen.polygon([(x + u * (width - 1), y + v * (height - 1)) for u, v in corners], colour)
    return picture.reduce(scale)


# ------------------------------------------------------------------------------------------------
# What people say of pictures


def with_article(words):
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


def listed(items):
    """["a", "b", "c"] -> "a, b and c" """
    if len(items) == 1:
        return items[0]
    return ", ".join(items[:-1]) + " and " + items[-1]


def caption(scene, rng, say=None):
    """One caption. People leave much out; `say` tells whether size, colour and place are named."""
    if not say:
        say = (rng.random() < 0.5, rng.random() < 0.85, rng.choice((False, True)))
    size, colour, place = say
    phrases = []
    for thing in scene.things:
        words = [thing.size] if size else []
        if colour:
            words.append(thing.colour)
        phrase = with_article(" ".join([*words, thing.shape]))
        phrases.append(f"{phrase} in {thing.place}" if place else phrase)
    return rng.choice(("", "a picture of ", "there is ")) + listed(phrases) + "."


@dataclass(frozen=True)
class Question:
    kind: str                            # one of KINDS, or "in short ...": a list of look-ups
    text: str
    answer: str                          # in full: it is scored by exact match
    value: str                           # what is asked for in it: "red", "two", "yes"
    about: frozenset                     # the pairs of colour and shape that decide it


def question_of(rng, kind, texts, answer, value, about=()):
    return Question(kind, rng.choice(texts), answer, value, frozenset(about))


def look_up(rng, what, facts):
    """[a question whose answer is a list of up to six facts in any order], or [] without facts.

    Telegraphic: in each fact, the word that is looked up comes right after the key.
    """
    facts = rng.sample(facts, min(6, len(facts)))
    if not facts:
        return []
    texts = (f"In short, {what}?",)
    return [question_of(rng, f"in short {what}", texts, ", ".join(facts) + ".", " ".join(facts))]


def count_question(rng, things, many):
    texts = (f"How many {many} are there?", f"How many {many} can you see?")
    number = NUMBERS[len(things)]
    answer = f"The number of {many} is {number}."
    return question_of(rng, "count", texts, answer, number, [thing.pair for thing in things])


def colour_question(rng, thing):
    what = thing.shape
    texts = (f"What colour is the {what}?", f"Which colour does the {what} have?")
    answer = f"The {what} is {thing.colour}."
    return question_of(rng, "colour", texts, answer, thing.colour, [thing.pair])


def shape_question(rng, thing):
    what = f"{thing.colour} thing"
    texts = (f"What shape is the {what}?", f"Which shape does the {what} have?")
    answer = f"The {what} is {with_article(thing.shape)}."
    return question_of(rng, "shape", texts, answer, thing.shape, [thing.pair])


def attribute_questions(scene, rng):
    """How many things have each colour and shape; of a lone one also its shape or colour."""
    questions = [count_question(rng, scene.things, "things")]
    facts = ([], [], [])                 # about what is absent, what is there once, what more often
    facts[min(len(scene.things), 2)].append(f"thing {NUMBERS[len(scene.things)]}")
    for value in (*COLOURS, *SHAPES):
        found = scene.things_with(value)
        many = f"{value} things" if value in COLOURS else f"{value} shapes"
        questions.append(count_question(rng, found, many))
        facts[min(len(found), 2)].append(f"{value} {NUMBERS[len(found)]}")
        if len(found) == 1:
            ask = colour_question if value in SHAPES else shape_question
            questions.append(ask(rng, found[0]))
    absent, once, often = facts
    # "one" is by far the most frequent count, so there is about as much of the others.
    drawn = rng.sample(absent, 2) + rng.sample(once, min(len(once), 1 + len(often))) + often
    return questions + look_up(rng, "how many are there", drawn)


def existence_questions(scene, rng, pairs):
    """Is there a red circle? A "no" shares a colour or a shape with a thing, or it is too easy."""
    here = {thing.pair for thing in scene.things}
    values = {value for pair in here for value in pair}
    questions = []
    for pair in pairs:
        if not values & set(pair):
            continue
        what = with_article(" ".join(pair))
        texts = (f"Is there {what}?", f"Can you see {what}?")
        value = "yes" if pair in here else "no"
        answer = "Yes, there is." if pair in here else "No, there is not."
        questions.append(question_of(rng, "existence", texts, answer, value, [pair]))
    return questions


def place_questions(scene, rng):
    """Where each unique thing is, and how any two of them stand to each other."""
    questions = []
    for thing in scene.unique_things:
        name = thing.name
        place = thing.place
        texts = (f"In short, where is the {name}?",)
        answer = f"{name} {place}."
        questions.append(question_of(rng, "in short where", texts, answer, place, [thing.pair]))
        texts = (f"Where is the {name}?", f"Where in the picture is the {name}?")
        answer = f"The {name} is in {place}."
        questions.append(question_of(rng, "place", texts, answer, thing.column, [thing.pair]))
        for other in scene.unique_things:
            questions += relation_questions(rng, thing, other)
    return questions


def relation_questions(rng, thing, other):
    """Above or below, left or right; neither where both are in the same row, or the same column."""
    questions = []
    for line, less, more, of in (("row", "above", "below", ""), ("column", "left", "right", " of")):
        p = getattr(thing, line)
        q = getattr(other, line)
        if p == q:
            continue
        value = less if p < q else more
        text = f"Is the {thing.name} {less} or {more}{of} the {other.name}?"
        answer = (f"The {thing.name} is in {line} {p} and the {other.name} is in {line} {q}, "
                  f"so it is {value}.")
        pairs = [thing.pair, other.pair]
        questions.append(question_of(rng, "relation", (text,), answer, value, pairs))
    return questions


def questions_about(scene, rng, pairs=SEEN):
    """Every unambiguous question about a scene, with its answer.

    "Is there" asks only after `pairs`, so that training never names HELD_OUT.
    """
    attributes = attribute_questions(scene, rng)
    existence = existence_questions(scene, rng, pairs)
    places = place_questions(scene, rng)
    questions = attributes + existence + places

    colours = [f"{thing.shape} {thing.colour}" for thing in lone_things(scene, SHAPES)]
    shapes = [f"{thing.colour} {thing.shape}" for thing in lone_things(scene, COLOURS)]
    questions += look_up(rng, "what colour is what", colours)
    questions += look_up(rng, "what shape is what", shapes)
    rows = [f"{thing.name} {thing.row}" for thing in scene.unique_things]
    columns = [f"{thing.name} {thing.column}" for thing in scene.unique_things]
    questions += look_up(rng, "what row is what", rows)
    questions += look_up(rng, "what column is what", columns)
    there = existence_facts(existence, "yes")
    absent = existence_facts(existence, "no")
    drawn = there + rng.sample(absent, min(len(absent), len(there)))
    return questions + look_up(rng, "what is there", drawn)


def lone_things(scene, values):
    """For each value that exactly one thing has, that thing."""
    found = [scene.things_with(value) for value in values]
    return [things[0] for things in found if len(things) == 1]


def existence_facts(questions, value):
    """["red circle yes", ...]: the answers of one value among existence questions, as facts."""
    asked = [question for question in questions if question.value == value]
    return [" ".join([*pair, value]) for question in asked for pair in question.about]


# ------------------------------------------------------------------------------------------------
# On disk


def save_coco(folder, split, scenes, first_id, rng):
    """Write pictures and both of COCO's annotation files; returns {image id: scene}."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    numbered = dict(enumerate(scenes, first_id))
    images = []
    captions = []
    boxes = []
    for i, scene in numbered.items():
        name = picture_name(i)
        images.append({"id": i, "file_name": name, "width": scene.side, "height": scene.side})
        draw_scene(scene).save(folder / "images" / name)
        for _ in range(5):               # COCO has five captions a picture
            number = first_id * 10 + len(captions)
            captions.append({"id": number, "image_id": i, "caption": caption(scene, rng)})
        for thing in scene.things:
            boxes.append(coco_box(first_id * 10 + len(boxes), i, thing))
    categories = []
    for k, (colour, shape) in enumerate(PAIRS, 1):
        categories.append({"id": k, "name": f"{colour} {shape}", "supercategory": shape})
    written = {"images": images, "annotations": captions}
    drawn = {"images": images, "annotations": boxes, "categories": categories}
    write_text(folder / "annotations" / f"captions_{split}.json", json.dumps(written))
    write_text(folder / "annotations" / f"instances_{split}.json", json.dumps(drawn))
    return numbered


def picture_name(i):
    return f"{i:012d}.png"               # as in COCO


def coco_box(number, image_id, thing):
    return {
        "id": number,
        "image_id": image_id,
        "category_id": 1 + PAIRS.index(thing.pair),
        "bbox": list(thing.box),
        "area": thing.box[2] * thing.box[3],
        "iscrowd": 0,
        "segmentation": [],
    }


def read_coco(instances):
    """{image id: Scene} of an `instances_*.json`, all that the teacher knows of a picture."""
    coco = json.loads(Path(instances).read_text())
    names = {category["id"]: category["name"].split() for category in coco["categories"]}
    sides = {image["id"]: image["width"] for image in coco["images"]}
    things = {i: [] for i in sides}
    for box in coco["annotations"]:
        i = box["image_id"]
        things[i].append(Thing(*names[box["category_id"]], tuple(box["bbox"]), side=sides[i]))
    return {i: scene_with(found) for i, found in things.items()}


def sample_exam(rng, per_kind, new, side=SIDE):
    """[(scene, question), ...]: `per_kind` questions of each kind, whose answers are equally often.

    If `new`, every question is decided by a pair of HELD_OUT; otherwise none is. `per_kind` must be
    a multiple of the numbers of answers; 120 is, and 24 if `new`.
    """
    pairs = PAIRS if new else SEEN
    exam = []
    wanted = {kind: per_kind // n for kind, n in N_ANSWERS.items()}      # of each answer
    if new:
        wanted["count"] = per_kind // 4                      # "zero" is decided by no pair
    counts = Counter()                                       # (kind, answer): the questions so far
    while len(exam) < per_kind * len(KINDS):
        scene = sample_scene(rng, pairs, HELD_OUT if new else None, side)
        fitting = []
        for question in questions_about(scene, rng, pairs):
            is_new = not question.about.isdisjoint(HELD_OUT)
            missing = wanted.get(question.kind, 0) - counts[question.kind, question.value]
            if is_new == new and missing > 0:
                fitting.append(question)
        if fitting:
            kind = rng.choice(sorted({question.kind for question in fitting}))
            question = rng.choice([question for question in fitting if question.kind == kind])
            counts[kind, question.value] += 1
            exam.append((scene, question))
    return exam


# ------------------------------------------------------------------------------------------------
# Commands


@dataclass(frozen=True)
class WorldConfig:
    out: str                             # folder to write to
    seed: int = 0
    side: int = SIDE                     # of the pictures; in larger ones, things are details
    pictures: int = 8000                 # to train on
    questions: int = 120                 # of each kind in each set

    CHOICES: ClassVar = {"side": [SIDE, 2 * SIDE]}


def make_world(config):
    """Draw the world: pictures, COCO's files, image-caption pairs, four sets of questions."""
    check_least(config, pictures=1, questions=1)
    if config.questions % 120:
        raise ValueError(f"--questions {config.questions}: take a multiple of 120, which divides "
                         "evenly among the answers of each kind")
    out = Path(config.out)
    rng = random.Random(config.seed)
    scenes = [sample_scene(rng, side=config.side) for _ in range(config.pictures)]
    pairs = caption_pairs(save_coco(out, "train", scenes, 1, rng), rng)
    first_id = config.pictures + 1
    for split in ("held_out", "new_pairs"):
        exam = sample_exam(rng, config.questions, split == "new_pairs", config.side)
        save_coco(out, split, [scene for scene, _ in exam], first_id, rng)
        rows = []
        for n, (_, question) in enumerate(exam):
            rows.append({
                "question_id": f"{split}-{n}",
                "image": picture_name(first_id + n),
                "text": question.text,
                "category": question.kind,
                "truth": question.answer,
            })
        write_lines(out / f"questions_{split}.jsonl", rows)
        if split == "held_out":
            write_controls(out, rows)
        first_id += len(exam)
    if config.side > SIDE:
        # Stage 1 looks at squares, stage 2 at tiles, which show things from near. W has to know
        # this view from stage 1, so as many smaller pictures come with the larger ones.
        scenes = [sample_scene(rng) for _ in range(config.pictures)]
        pairs += caption_pairs(save_coco(out, "near", scenes, first_id, rng), rng)
    write_lines(out / "pairs.jsonl", pairs)
    print(f"{out}: {config.pictures} pictures to train on, {config.questions * len(KINDS)} "
          "questions each: held_out, new_pairs, blind, shuffled.")


def caption_pairs(numbered, rng):
    """Stage 1's pairs: one more caption of each picture."""
    pairs = []
    for i, scene in numbered.items():
        pairs.append({"image": picture_name(i), "caption": caption(scene, rng)})
    return pairs


def write_controls(out, rows):
    """The same questions without a picture, and each with the picture of another question."""
    blind = []
    shuffled = []
    half = len(rows) // 2
    for row, other in zip(rows, rows[half:] + rows[:half], strict=True):
        blind.append({key: value for key, value in row.items() if key != "image"})
        shuffled.append({**row, "image": other["image"]})
    write_lines(out / "questions_blind.jsonl", blind)
    write_lines(out / "questions_shuffled.jsonl", shuffled)


@dataclass(frozen=True)
class ReactWorldConfig:
    out: str                             # folder to write to
    seed: int = 0
    pictures: int = 6000                 # of the corpus
    tests: int = 100                     # pictures of each class to classify


def make_react_world(config):
    """For REACT: class names, templates, a corpus of captioned pictures, and tests of a CLIP.

    A third of the corpus shows a target among other things. Two thirds of it, and all pictures to
    classify, lie on dark paper, which the toy's CLIP has never seen; the captions do not say so.
    The pictures with captions to retrieve are as CLIP knows them.
    """
    check_least(config, pictures=1, tests=1)
    out = Path(config.out)
    rng = random.Random(config.seed)
    others = [pair for pair in PAIRS if pair not in TARGETS]
    scenes = []
    for i in range(config.pictures):
        if i % 3 == 0:
            scenes.append(sample_scene(rng, PAIRS, TARGETS))
        else:
            scenes.append(sample_scene(rng, others))
    scenes = [darker(scene, rng) if rng.random() < 2 / 3 else scene for scene in scenes]
    save_tsv(out, "corpus", scenes, [caption(scene, rng) for scene in scenes])
    shown = [pair for pair in TARGETS for _ in range(config.tests)]
    scenes = [darker(scene_of_one(pair, rng), rng) for pair in shown]
    save_tsv(out, "test", scenes, [" ".join(pair) for pair in shown])
    scenes = [sample_scene(rng) for _ in range(300)]
    save_tsv(out, "captions", scenes, [caption(scene, rng) for scene in scenes])
    classes = [f"{colour} {shape}\n" for colour, shape in TARGETS]
    write_text(out / "classes.txt", "".join(classes))
    write_text(out / "templates.txt", "a {}.\na picture of a {}.\nthere is a {}.\n")
    print(f"{out}: a corpus of {config.pictures} pictures, {len(shown)} to classify as one of "
          f"{len(TARGETS)}, {len(scenes)} with captions")


def darker(scene, rng):
    return Scene(scene.things, rng.randint(60, 120))


def scene_of_one(pair, rng):
    """A scene of one thing of this pair, with the places and sizes that things have in scenes."""
    while True:
        for thing in sample_scene(rng, PAIRS, [pair]).things:
            if thing.pair == pair:
                return Scene((thing,))


def save_tsv(folder, name, scenes, texts):
    """Pictures, and NAME.tsv of their file names and texts."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    lines = []
    for i, (scene, text) in enumerate(zip(scenes, texts, strict=True)):
        draw_scene(scene).save(folder / "images" / f"{name}_{i}.png")
        lines.append(f"{name}_{i}.png\t{text}\n")
    write_text(folder / f"{name}.tsv", "".join(lines))


COMMANDS = {"world": (make_world, WorldConfig), "react": (make_react_world, ReactWorldConfig)}


def main(argv=None):
    run_command(COMMANDS, argv, __doc__)


if __name__ == "__main__":
    run_main(main)
