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
import random
from collections import Counter
from dataclasses import dataclass, replace
from operator import attrgetter
from pathlib import Path
from typing import ClassVar

from PIL import Image, ImageDraw

from parts.files import (
    check_least,
    read_value,
    run_command,
    run_main,
    write_json,
    write_lines,
    write_text,
)

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
ALONE = {"train": 50, "test": 100}       # pictures of each target alone
GRID = 4                                 # things stand in the cells of a jittered 4 x 4 grid
CELL = 16                                # pixels; a cell is a patch of the toy's CLIP, so N = 16
SIDE = GRID * CELL                       # pictures are 64 x 64
NUMBERS = ("zero", "one", "two", "three", "four")
WAYS_TO_ASK = {                          # a question of each kind; one of its wordings is drawn
    "colour": ("What colour is the {}?", "Which colour does the {} have?"),
    "shape": ("What shape is the {}?", "Which shape does the {} have?"),
    "count": ("How many {} are there?", "How many {} can you see?"),
    "existence": ("Is there {}?", "Can you see {}?"),
    "relation": ("Is the {}?",),
    "place": ("Where is the {}?", "Where in the picture is the {}?"),
}
N_ANSWERS = {"colour": 8, "shape": 6, "count": 5, "existence": 2, "relation": 4, "place": 4}
KINDS = tuple(N_ANSWERS)
PER_KIND = 120                           # questions of an exam; every number of answers divides it


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
        """Those of one colour or one shape; "thing" is any."""
        return [thing for thing in self.things if value in (*thing.pair, "thing")]


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
    things = [place_thing(rng, *of_one, side) for of_one in zip(chosen, cells, strict=True)]
    return scene_with(things, rng.randint(215, 250))


def place_thing(rng, pair, cell, side):
    """A thing of random size somewhere in a cell, never across the border of two patches."""
    size = rng.choice((9, 10, 13, 14))
    zoom = side // SIDE                  # patches along the side of a cell
    patch = [zoom * (cell % GRID), zoom * (cell // GRID)]
    if zoom > 1:
        patch = [start + rng.randrange(zoom) for start in patch]
    # a pixel of air on each side: it never touches the neighbouring patch
    x, y = (CELL * at + rng.randint(1, CELL - size - 1) for at in patch)
    return Thing(*pair, (x, y, size, size), side=side)


OUTLINES = {    # corners in the unit square; they touch all four sides, so a box is exact
    "square": [(0, 0), (1, 0), (1, 1), (0, 1)],
    "triangle": [(.5, 0), (1, 1), (0, 1)],
    "star": [(.5, 0), (.63, .365), (1, .382), (.71, .625),
             (.809, 1), (.5, .785), (.191, 1),
             (.29, .625), (0, .382), (.37, .365)],
    "cross": [(.3, 0), (.7, 0), (.7, .3),
              (1, .3), (1, .7), (.7, .7),
              (.7, 1), (.3, 1), (.3, .7),
              (0, .7), (0, .3), (.3, .3)],
}


def draw_scene(scene):
    """Scene -> RGB picture. It is drawn four times larger and averaged down: anti-aliasing."""
    size = 4 * scene.side
    picture = Image.new("RGB", (size, size), (scene.grey,) * 3)
    pen = ImageDraw.Draw(picture)
    for thing in scene.things:
        x, y, width, height = (4 * v for v in thing.box)
        colour = thing.paint or COLOURS[thing.colour]
        frame = (x, y, x + width - 1, y + height - 1)
        if thing.shape == "circle":
            pen.ellipse(frame, fill=colour)
        elif thing.shape == "ring":
            pen.ellipse(frame, outline=colour, width=round(width * 0.24))
        else:
            corners = OUTLINES[thing.shape]
            pen.polygon([(x + u * (width - 1), y + v * (height - 1)) for u, v in corners], colour)
    return picture.reduce(4)


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


def question_of(rng, kind, what, answer, value, about=()):
    wordings = WAYS_TO_ASK.get(kind, ("In short, {}?",))
    return Question(kind, rng.choice(wordings).format(what), answer, value, frozenset(about))


def look_up(rng, what, facts):
    """[a question whose answer is a list of up to six facts in any order], or [] without facts.

    Telegraphic: in each fact, the word that is looked up comes right after the key.
    """
    if not facts:
        return []
    facts = rng.sample(facts, min(6, len(facts)))
    answer = ", ".join(facts) + "."
    return [question_of(rng, f"in short {what}", what, answer, " ".join(facts))]


def attribute_questions(scene, rng):
    """How many things have each colour and shape; of a lone one also its shape or colour."""
    questions = []
    facts = ([], [], [])                 # about what is absent, what is there once, what more often
    for value in ("thing", *COLOURS, *SHAPES):
        found = scene.things_with(value)
        many = f"{value} shapes" if value in SHAPES else f"{value} things"
        if value == "thing":
            many = "things"
        number = NUMBERS[len(found)]
        about = [thing.pair for thing in found]
        answer = f"The number of {many} is {number}."
        questions.append(question_of(rng, "count", many, answer, number, about))
        facts[min(len(found), 2)].append(f"{value} {number}")
        if len(found) == 1 and value in SHAPES:
            colour = found[0].colour
            answer = f"The {value} is {colour}."
            questions.append(question_of(rng, "colour", value, answer, colour, about))
        if len(found) == 1 and value in COLOURS:
            shape = found[0].shape
            answer = f"The {value} thing is a {shape}."
            questions.append(question_of(rng, "shape", f"{value} thing", answer, shape, about))
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
        if values.isdisjoint(pair):
            continue
        value = "yes" if pair in here else "no"
        answer = "Yes, there is." if pair in here else "No, there is not."
        what = with_article(" ".join(pair))
        questions.append(question_of(rng, "existence", what, answer, value, [pair]))
    return questions


def place_questions(scene, rng):
    """Where each unique thing is, and how any two of them stand to each other."""
    questions = []
    for thing in scene.unique_things:
        name = thing.name
        place = thing.place
        about = [thing.pair]
        what = f"where is the {name}"
        answer = f"{name} {place}."
        questions.append(question_of(rng, "in short where", what, answer, place, about))
        answer = f"The {name} is in {place}."
        questions.append(question_of(rng, "place", name, answer, thing.column, about))
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
        what = f"{thing.name} {less} or {more}{of} the {other.name}"
        answer = (f"The {thing.name} is in {line} {p} and the {other.name} is in {line} {q}, "
                  f"so it is {value}.")
        about = [thing.pair, other.pair]
        questions.append(question_of(rng, "relation", what, answer, value, about))
    return questions


def questions_about(scene, rng, pairs=SEEN):
    """Every unambiguous question about a scene, with its answer.

    "Is there" asks only after `pairs`, so that training never names HELD_OUT.
    """
    attributes = attribute_questions(scene, rng)
    existence = existence_questions(scene, rng, pairs)
    places = place_questions(scene, rng)
    questions = attributes + existence + places

    lone = [found[0] for found in map(scene.things_with, SHAPES) if len(found) == 1]
    questions += look_up(rng, "what colour is what", [f"{t.shape} {t.colour}" for t in lone])
    lone = [found[0] for found in map(scene.things_with, COLOURS) if len(found) == 1]
    questions += look_up(rng, "what shape is what", [thing.name for thing in lone])
    unique = scene.unique_things
    questions += look_up(rng, "what row is what", [f"{t.name} {t.row}" for t in unique])
    questions += look_up(rng, "what column is what", [f"{t.name} {t.column}" for t in unique])
    facts = {"yes": [], "no": []}
    for question in existence:
        [pair] = question.about
        facts[question.value].append(" ".join([*pair, question.value]))
    absent = rng.sample(facts["no"], min(len(facts["no"]), len(facts["yes"])))
    return questions + look_up(rng, "what is there", facts["yes"] + absent)


# ------------------------------------------------------------------------------------------------
# On disk


def picture_name(i):
    return f"{i:012d}.png"               # as in COCO


def save_coco(folder, split, scenes, first_id, rng):
    """Write pictures, numbered from first_id on, and both of COCO's annotation files."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    images = []
    captions = []
    boxes = []
    for i, scene in enumerate(scenes, first_id):
        name = picture_name(i)
        images.append({"id": i, "file_name": name, "width": scene.side, "height": scene.side})
        draw_scene(scene).save(folder / "images" / name)
        for _ in range(5):               # COCO has five captions a picture
            number = first_id * 10 + len(captions)
            captions.append({"id": number, "image_id": i, "caption": caption(scene, rng)})
        for thing in scene.things:
            boxes.append({
                "id": first_id * 10 + len(boxes),
                "image_id": i,
                "category_id": 1 + PAIRS.index(thing.pair),
                "bbox": list(thing.box),
                "area": thing.box[2] * thing.box[3],
                "iscrowd": 0,
                "segmentation": [],
            })
    categories = [{"id": k, "name": " ".join(pair), "supercategory": pair[1]}
                  for k, pair in enumerate(PAIRS, 1)]
    written = {"images": images, "annotations": captions}
    drawn = {"images": images, "annotations": boxes, "categories": categories}
    write_text(folder / "annotations" / f"captions_{split}.json", json.dumps(written))
    write_text(folder / "annotations" / f"instances_{split}.json", json.dumps(drawn))


def read_coco(instances):
    """{image id: Scene} of an `instances_*.json`, all that the teacher knows of a picture."""
    coco = read_value(instances)
    names = {category["id"]: category["name"].split() for category in coco["categories"]}
    sides = {image["id"]: image["width"] for image in coco["images"]}
    things = {i: [] for i in sides}
    for box in coco["annotations"]:
        i = box["image_id"]
        things[i].append(Thing(*names[box["category_id"]], tuple(box["bbox"]), side=sides[i]))
    return {i: scene_with(found) for i, found in things.items()}


def sample_exam(rng, new, side):
    """[(scene, question), ...]: PER_KIND questions of each kind; all its answers equally often.

    If `new`, every question is decided by a pair of HELD_OUT; otherwise none is.
    """
    wanted = {kind: PER_KIND // n for kind, n in N_ANSWERS.items()}      # of each answer
    if new:
        wanted["count"] = PER_KIND // 4                      # "zero" is decided by no pair
    pairs = PAIRS if new else SEEN
    must = HELD_OUT if new else None
    exam = []
    counts = Counter()                                       # (kind, answer): the questions so far
    while len(exam) < PER_KIND * len(KINDS):
        scene = sample_scene(rng, pairs, must, side)
        fitting = {}                                         # kind: its questions
        for question in questions_about(scene, rng, pairs):
            is_new = not question.about.isdisjoint(HELD_OUT)
            missing = wanted.get(question.kind, 0) - counts[question.kind, question.value]
            if is_new == new and missing > 0:
                fitting.setdefault(question.kind, []).append(question)
        if fitting:
            question = rng.choice(fitting[rng.choice(sorted(fitting))])
            counts[question.kind, question.value] += 1
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

    CHOICES: ClassVar = {"side": [SIDE, 2 * SIDE]}


def make_world(config):
    """Draw the world: pictures, COCO's files, image-caption pairs, four sets of questions."""
    check_least(config, pictures=1)
    out = Path(config.out)
    rng = random.Random(config.seed)
    scenes = [sample_scene(rng, side=config.side) for _ in range(config.pictures)]
    save_coco(out, "train", scenes, 1, rng)
    pairs = caption_pairs(scenes, 1, rng)
    first_id = config.pictures + 1
    for split in ("held_out", "new_pairs"):
        exam = sample_exam(rng, split == "new_pairs", config.side)
        save_coco(out, split, [scene for scene, _ in exam], first_id, rng)
        write_questions(out, split, [question for _, question in exam], first_id)
        first_id += len(exam)
    if config.side > SIDE:
        # Stage 1 looks at squares, stage 2 at tiles, which show things from near. W has to know
        # this view from stage 1, so as many smaller pictures come with the larger ones.
        scenes = [sample_scene(rng) for _ in range(config.pictures)]
        save_coco(out, "near", scenes, first_id, rng)
        pairs += caption_pairs(scenes, first_id, rng)
    write_lines(out / "pairs.jsonl", pairs)
    print(f"{out}: {config.pictures} pictures to train on, {PER_KIND * len(KINDS)} questions each: "
          "held_out, new_pairs, blind, shuffled.")


def caption_pairs(scenes, first_id, rng):
    """Stage 1's pairs: one more caption of each picture."""
    return [{"image": picture_name(i), "caption": caption(scene, rng)}
            for i, scene in enumerate(scenes, first_id)]


def write_questions(out, split, questions, first_id):
    """Write the questions on the pictures of one split.

    Those on held-out pictures are asked twice more, for control: without a picture ("blind"), and
    with the picture of another question ("shuffled").
    """
    rows = []
    for n, question in enumerate(questions):
        rows.append({
            "question_id": f"{split}-{n}",
            "image": picture_name(first_id + n),
            "text": question.text,
            "category": question.kind,
            "truth": question.answer,
        })
    write_lines(out / f"questions_{split}.jsonl", rows)
    if split == "held_out":
        blind = [{key: row[key] for key in row if key != "image"} for row in rows]
        half = len(rows) // 2
        others = rows[half:] + rows[:half]
        shuffled = [row | {"image": other["image"]}
                    for row, other in zip(rows, others, strict=True)]
        write_lines(out / "questions_blind.jsonl", blind)
        write_lines(out / "questions_shuffled.jsonl", shuffled)


@dataclass(frozen=True)
class ReactWorldConfig:
    out: str                             # folder to write to
    seed: int = 0


def make_react_world(config):
    """For REACT: class names, templates, a corpus of captioned pictures, and tests of a CLIP.

    A third of the corpus shows a target among other things. Two thirds of it, and all pictures to
    classify, lie on dark paper, which the toy's CLIP has never seen; the captions do not say so.
    The pictures with captions to retrieve are as CLIP knows them. `datasets.json` lists three data
    sets of pictures on dark paper, with parts to learn from: the targets, their colours and their
    shapes. Captions of dark pictures can be retrieved after fine-tuning, and what lies on 200 more
    is in masks.
    """
    out = Path(config.out)
    rng = random.Random(config.seed)
    others = [pair for pair in PAIRS if pair not in TARGETS]
    scenes = []
    for i in range(6000):
        if i % 3 == 0:
            scenes.append(sample_scene(rng, PAIRS, TARGETS))
        else:
            scenes.append(sample_scene(rng, others))
    for i, scene in enumerate(scenes):
        if rng.random() < 2 / 3:
            scenes[i] = dark(scene, rng)
    save_captioned(out, "corpus", scenes, rng)
    save_alone(out, "test", rng)
    save_captioned(out, "captions", [sample_scene(rng) for _ in range(300)], rng)
    write_names(out / "classes.txt", map(" ".join, TARGETS))
    write_names(out / "templates.txt", ("a {}.", "a picture of a {}.", "there is a {}."))
    save_alone(out, "train", rng)
    save_datasets(out)
    for name, count in (("dark_captions", 300), ("dark_captions_train", 900)):
        scenes = [dark(sample_scene(rng, PAIRS), rng) for _ in range(count)]
        save_captioned(out, name, scenes, rng)
    scenes = [dark(sample_scene(rng, TARGETS), rng) for _ in range(200)]
    save_tsv(out, "masks", scenes, [f"mask_{i}.png" for i in range(len(scenes))])
    for i, scene in enumerate(scenes):
        mask_of(scene).save(out / "images" / f"mask_{i}.png")
    print(f"{out}: a corpus of 6000 pictures, 1400 to classify as one of 14, 300 with captions; "
          "datasets.json with 700 to learn from, 1200 with captions on dark paper, 200 with masks")


def shown_alone(part):
    """What the pictures of train.tsv or test.tsv show: each target, again and again."""
    return [pair for pair in TARGETS for _ in range(ALONE[part])]


def save_alone(out, part, rng):
    """Dark pictures of one target each, labelled with its name."""
    shown = shown_alone(part)
    scenes = [dark(Scene((thing_of(pair, rng),)), rng) for pair in shown]
    save_tsv(out, part, scenes, map(" ".join, shown))


def save_datasets(out):
    """datasets.json: train.tsv and test.tsv, labelled as targets, by colour, and by shape."""
    targets = {
        "name": "targets",
        "train": "train.tsv",
        "test": "test.tsv",
        "classes": "classes.txt",
        "templates": "templates.txt",
        "images": "images",
    }
    rows = [targets]
    for which, (name, values) in enumerate((("colours", COLOURS), ("shapes", SHAPES))):
        row = targets | {"name": name, "classes": f"{name}.txt"}
        write_names(out / row["classes"], values)
        for part in ALONE:
            row[part] = f"{name}_{part}.tsv"
            labels = [f"{part}_{i}.png\t{pair[which]}" for i, pair in enumerate(shown_alone(part))]
            write_names(out / row[part], labels)
        rows.append(row)
    rows[1]["templates"] = "colour_templates.txt"
    write_names(out / "colour_templates.txt", [f"a {{}} {shape}." for shape in SHAPES])
    write_json(out / "datasets.json", rows)


def write_names(path, names):
    write_text(path, "".join(f"{name}\n" for name in names))


def dark(scene, rng):
    return Scene(scene.things, rng.randint(60, 120))


def mask_of(scene):
    """The number in TARGETS of the thing that each pixel shows; 255 where there is paper."""
    mask = Image.new("L", (scene.side, scene.side), 255)
    for thing in scene.things:
        white = replace(thing, paint=(255, 255, 255))
        shown = draw_scene(Scene((white,), grey=0)).convert("1", dither=Image.Dither.NONE)
        mask.paste(TARGETS.index(thing.pair), mask=shown)
    return mask


def thing_of(pair, rng):
    """A thing of this pair, with the places and sizes that things have in scenes."""
    while True:
        for thing in sample_scene(rng, PAIRS, [pair]).things:
            if thing.pair == pair:
                return thing


def save_captioned(folder, name, scenes, rng):
    save_tsv(folder, name, scenes, [caption(scene, rng) for scene in scenes])


def save_tsv(folder, name, scenes, texts):
    """Pictures, and NAME.tsv of their file names and texts."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rows = []
    for i, (scene, text) in enumerate(zip(scenes, texts, strict=True)):
        picture = f"{name}_{i}.png"
        draw_scene(scene).save(folder / "images" / picture)
        rows.append(f"{picture}\t{text}")
    write_names(folder / f"{name}.tsv", rows)


COMMANDS = {"world": (make_world, WorldConfig), "react": (make_react_world, ReactWorldConfig)}


def main(argv=None):
    run_command(COMMANDS, argv, __doc__)


if __name__ == "__main__":
    run_main(main)
