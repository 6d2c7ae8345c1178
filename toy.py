"""A miniature world in which the whole paper runs on a laptop, offline: pictures, captions, boxes, teacher and judge.

    python toy.py world     --out out/toy/world --seed 0    pictures, COCO's files, image-caption pairs, questions
    python toy.py report    --out out/toy                   accuracies -> results.json, pictures and curves -> report.png
    python toy.py ablations --out out/toy_ablations         Tables 4 and 8 in miniature, beside the paper's
    python toy.py family    --out out/toy_family            LLaVA-1.5, 1.5-HD and NeXT where things are details
    python toy.py react     --out out/react_toy/world       a corpus for REACT, in which few pictures concern its classes

Between the first two stand the data (generate_data.py), the paper's two stages (train.py) and the answers (sample.py);
runs/toy.sh has all of it, runs/toy_ablations.sh, runs/toy_family.sh and runs/react_toy.sh what comes before the others.
Everything in this file is OURS: the paper has no toy. What each piece stands in for:

    the world               COCO: photographs, five captions and the boxes of each
    the scripted teacher    GPT-4: it reads captions and boxes and writes the three response types (Sec. 3, Table 1).
                            It is a script, no language model: it can only say what its templates say.
    the scripted judge      GPT-4 again, as judge (Sec. 5.1)
    toy_parts/              CLIP and Vicuna, pretrained on this world's pictures and on text alone (toy_pretrain.py)

Some colour-shape pairs (HELD_OUT) are in no picture that any part trains on. The language model has read of them, as
Vicuna has read of purple triangles. Whether the assembled model can see one is the composition test (`new_pairs`).
"""
import argparse
import json
import math
import random
import re
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from generate_data import detail_questions
from judge import relative_scores
from records import brief_instructions, whole_lines, write_lines

COLOURS = {"red": (222, 45, 38), "orange": (250, 140, 30), "yellow": (240, 220, 40), "green": (50, 165, 70),
           "blue": (45, 95, 215), "purple": (130, 50, 165), "pink": (245, 130, 190), "black": (35, 35, 35)}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
PAIRS = [(c, s) for c in COLOURS for s in SHAPES]
HELD_OUT = [("red", "square"), ("orange", "circle"), ("yellow", "cross"), ("green", "star"),    # every colour once,
            ("blue", "ring"), ("purple", "triangle"), ("pink", "square"), ("black", "circle")]  # every shape at most twice
SEEN = [pair for pair in PAIRS if pair not in HELD_OUT]
GRID, CELL = 4, 16                       # things stand in the cells of a jittered grid; a cell is one CLIP patch, so N = 16
SIDE = GRID * CELL                       # pictures are 64 x 64
NUMBERS = ("zero", "one", "two", "three", "four")


# ------------------------------------------------------------------------------------------------- scenes and pictures
@dataclass(frozen=True)
class Thing:
    """One coloured shape, known only by what a COCO annotation says of it: a category ("red circle") and a box."""
    colour: str
    shape: str
    box: tuple                           # (x, y, width, height) in pixels, as COCO writes it
    paint: tuple = None                  # another RGB than the colour's own: only CLIP's pictures have such
    side: int = SIDE                     # of the picture, pixels

    @property
    def pair(self): return self.colour, self.shape
    @property
    def name(self): return f"{self.colour} {self.shape}"
    @property
    def size(self): return "large" if self.box[2] > 11 else "small"
    @property
    def cell(self): return tuple((self.box[k] + self.box[k + 2] // 2) * GRID // self.side for k in (1, 0))
    @property
    def row(self): return "1234"[self.cell[0]]
    @property
    def column(self): return "ABCD"[self.cell[1]]
    @property
    def place(self): return f"{self.column} {self.row}"      # as in a spreadsheet: A 1 is at the top left


@dataclass(frozen=True)
class Scene:
    """One to four things in reading order, and the grey of the paper they lie on."""
    things: tuple
    grey: int = 235

    @property
    def side(self): return self.things[0].side


def sample_scene(rng, pairs=SEEN, must=None, side=SIDE):
    """A random scene of `pairs`; its first thing is one of `must`, if given. A larger picture has things of the same size.

    Half of the scenes lean to one colour or shape, or counts above two and hard negatives would be rare.
    """
    theme = rng.choice([None] * 14 + list(COLOURS) + list(SHAPES))
    chosen, zoom = [], side // SIDE
    for i in range(rng.choice((1, 2, 2, 3, 3, 4, 4))):
        pool = must if must and i == 0 else [p for p in pairs if theme in p] if theme and rng.random() < 0.75 else pairs
        chosen.append(rng.choice(pool))
    things = []
    for (colour, shape), cell in zip(chosen, rng.sample(range(GRID * GRID), len(chosen))):
        size = rng.choice((9, 10, 13, 14))
        slack = CELL - size - 1          # one pixel of air: a thing never touches its neighbour's cell
        at = [zoom * i + (rng.randrange(zoom) if zoom > 1 else 0) for i in (cell % GRID, cell // GRID)]      # which patch
        x, y = (CELL * i + 1 + rng.randint(0, slack - 1) for i in at)
        things.append(Thing(colour, shape, (x, y, size, size), side=side))
    return Scene(tuple(sorted(things, key=lambda t: t.cell)), rng.randint(215, 250))


def outline(shape):
    """The corners of a shape in the unit square, touching all four sides, so that a COCO box is exact."""
    if shape == "star":
        points = [(r * math.sin(math.pi * k / 5), -r * math.cos(math.pi * k / 5)) for k, r in enumerate((1, .42) * 5)]
        (x0, x1), (y0, y1) = [(min(v), max(v)) for v in zip(*points)]
        return [((x - x0) / (x1 - x0), (y - y0) / (y1 - y0)) for x, y in points]
    return {"square": [(0, 0), (1, 0), (1, 1), (0, 1)], "triangle": [(.5, 0), (1, 1), (0, 1)],
            "cross": [(.3, 0), (.7, 0), (.7, .3), (1, .3), (1, .7), (.7, .7),
                      (.7, 1), (.3, 1), (.3, .7), (0, .7), (0, .3), (.3, .3)]}[shape]


def draw(scene, scale=4):
    """Scene -> RGB picture, drawn `scale` times larger and averaged down, which is all its anti-aliasing."""
    picture = Image.new("RGB", (scene.side * scale, scene.side * scale), (scene.grey,) * 3)
    pen = ImageDraw.Draw(picture)
    for t in scene.things:
        x, y, w, h = (v * scale for v in t.box)
        colour, frame = t.paint or COLOURS[t.colour], (x, y, x + w - 1, y + h - 1)
        if t.shape == "circle":
            pen.ellipse(frame, fill=colour)
        elif t.shape == "ring":
            pen.ellipse(frame, outline=colour, width=round(w * 0.24))
        else:
            pen.polygon([(x + u * (w - 1), y + v * (h - 1)) for u, v in outline(t.shape)], fill=colour)
    return picture.reduce(scale)


# ------------------------------------------------------------------------------------------- what people say of pictures
def a(words): return ("an " if words[0] in "aeiou" else "a ") + words
def listed(items): return items[0] if len(items) == 1 else ", ".join(items[:-1]) + " and " + items[-1]
def are(n, one, many): return f"is {NUMBERS[n]} {one}" if n == 1 else f"are {NUMBERS[n]} {many}"


def caption(scene, rng, say=None):
    """One caption. People leave things out: `say` tells whether size and colour, and how the place, are named."""
    size, colour, place = say or (rng.random() < 0.5, rng.random() < 0.85, rng.choice(("", "in {0.place}")))
    said = [" ".join((a(" ".join([t.size] * size + [t.colour] * colour + [t.shape])), place.format(t))).strip()
            for t in scene.things]
    return rng.choice(("", "a picture of ", "there is ")) + listed(said) + "."


def captions(scene, rng):
    """Five captions, COCO's number."""
    return [caption(scene, rng) for _ in range(5)]


def description(scene):
    """The detailed description: everything there is to say, in reading order."""
    said = [f"{a(f'{t.size} {t.name}').capitalize()} is in {t.place}." for t in scene.things]
    return " ".join([f"There {are(len(said), 'thing', 'things')} in the picture.", *said])


@dataclass(frozen=True)
class Question:
    kind: str                            # one of KINDS, or "in short ...": a list of look-ups
    text: str
    answer: str                          # the whole answer: scored by exact match
    value: str                           # what is asked for in it: "red", "two", "yes"; balanced within a kind
    about: frozenset                     # the colour-shape pairs that decide it


def questions(scene, rng, pairs=SEEN):
    """Every unambiguous question about a scene; "is there" asks only after `pairs`, so training never names HELD_OUT."""
    things, out = scene.things, []
    def ask(kind, texts, answer, value, about):
        out.append(Question(kind, rng.choice(texts), answer, value, frozenset(about)))
    def count(found, many):
        n = len(found)
        ask("count", (f"How many {many} are there?", f"How many {many} can you see?"),
            f"The number of {many} is {NUMBERS[n]}.", NUMBERS[n], [t.pair for t in found])
    def in_short(what, facts):           # telegraphic lists in any order: the word that is looked up comes right after
        facts = rng.sample(facts, min(6, len(facts)))
        if facts: ask(f"in short {what}", (f"In short, {what}?",), ", ".join(facts) + ".", " ".join(facts), ())
    count(things, "things")
    colours, shapes, counts = [], [], ([], [], [])           # counts: of what is absent, of what is once, of what is often
    counts[min(len(things), 2)].append(f"thing {NUMBERS[len(things)]}")
    for value in (*COLOURS, *SHAPES):
        found = [t for t in things if value in t.pair]
        what = f"{value} thing" if value in COLOURS else value
        count(found, f"{value} {'things' if value in COLOURS else 'shapes'}")
        counts[min(len(found), 2)].append(f"{value} {NUMBERS[len(found)]}")
        if len(found) == 1 and value in SHAPES:
            ask("colour", (f"What colour is the {value}?", f"Which colour does the {value} have?"),
                f"The {value} is {found[0].colour}.", found[0].colour, [found[0].pair])
            colours.append(f"{value} {found[0].colour}")
        elif len(found) == 1:
            ask("shape", (f"What shape is the {what}?", f"Which shape does the {what} have?"),
                f"The {what} is {a(found[0].shape)}.", found[0].shape, [found[0].pair])
            shapes.append(f"{value} {found[0].shape}")
    none, once, often = counts           # "one" is by far the most frequent count: as much of the others
    in_short("how many are there", rng.sample(none, 2) + rng.sample(once, min(len(once), 1 + len(often))) + often)
    here, there, absent = [t.pair for t in things], [], []
    for pair in pairs:                   # a "no" must share a colour or a shape with something there, or it is too easy
        if any(set(pair) & set(p) for p in here):
            ask("existence", (f"Is there {a(' '.join(pair))}?", f"Can you see {a(' '.join(pair))}?"),
                *(("Yes, there is.", "yes") if pair in here else ("No, there is not.", "no")), [pair])
            (there if pair in here else absent).append(f"{' '.join(pair)} {out[-1].value}")
    single = [t for t in things if here.count(t.pair) == 1]
    for t in single:
        ask("in short where", (f"In short, where is the {t.name}?",), f"{t.name} {t.place}.", t.place, [t.pair])
        ask("place", (f"Where is the {t.name}?", f"Where in the picture is the {t.name}?"),
            f"The {t.name} is in {t.place}.", t.column, [t.pair])
        for o in single:
            for line, less, more, of in (("row", "above", "below", ""), ("column", "left", "right", " of")):
                p, q = getattr(t, line), getattr(o, line)
                if p != q:
                    way = less if p < q else more
                    ask("relation", (f"Is the {t.name} {less} or {more}{of} the {o.name}?",),
                        f"The {t.name} is in {line} {p} and the {o.name} is in {line} {q}, so it is {way}.",
                        way, [t.pair, o.pair])
    in_short("what colour is what", colours)
    in_short("what shape is what", shapes)
    in_short("what row is what", [f"{t.name} {t.row}" for t in single])
    in_short("what column is what", [f"{t.name} {t.column}" for t in single])
    in_short("what is there", there + rng.sample(absent, min(len(absent), len(there))))
    return out


KINDS = ("colour", "shape", "count", "existence", "relation", "place")


# ------------------------------------------------------------------------------------------------- the scripted teacher
def pick(some, rng):
    """One of the questions: its kind drawn first, then the value, then the words, so that no answer is a safe bet."""
    for key in ("kind", "value", "text"):
        values = sorted({getattr(q, key) for q in some})
        want = rng.choices(values, [3 if value in KINDS else 1 for value in values])[0]
        some = [q for q in some if getattr(q, key) == want]
    return some[0]


def conversation(scene, rng, pairs=SEEN, turns=8):
    """Multi-turn conversation: up to `turns` different questions and their answers."""
    left, said = questions(scene, rng, pairs), []
    for _ in range(min(rng.randint(1, turns), len(left))):
        said.append(pick(left, rng))
        left.remove(said[-1])
    return [(q.text, q.answer) for q in said]


def reasoning(scene, rng):
    """Complex reasoning: the answer first names what it looks at, then concludes."""
    things, rows = scene.things, []
    value = rng.choice([v for t in things for v in t.pair])
    what = f"{value} thing" if value in COLOURS else value
    n, k = len(things), sum(value in t.pair for t in things)
    rows.append((f"If every {what} were taken away, how many things would be left?",
                 f"There {are(n, 'thing', 'things')}. Taking away {NUMBERS[k]} leaves {NUMBERS[n - k]}."))
    for attribute, many in (("colour", "have the same colour"), ("shape", "have the same shape")):
        values = sorted({getattr(t, attribute) for t in things})
        said = f"I see {listed([a(t.name) for t in things])}."
        so = "So yes, they do." if len(values) == 1 else "So no, they do not."
        rows.append((f"Do all things {many}?", f"{said} {so}"))
    single = [t for t in things if sum(o.pair == t.pair for o in things) == 1]
    if len(single) > 1:
        t, o = rng.sample(single, 2)
        ways = [w for w, go in (("up", o.cell[0] < t.cell[0]), ("down", o.cell[0] > t.cell[0]),
                                ("left", o.cell[1] < t.cell[1]), ("right", o.cell[1] > t.cell[1])) if go]
        rows += [(f"How do I get from the {t.name} to the {o.name}?",
                  f"The {t.name} is in {t.place} and the {o.name} is in {o.place}. So go {listed(ways)}.")] * 2
    return [rng.choice(rows)]


def teacher(kind, scene, rng, pairs=SEEN):
    """The scripted teacher (no language model): a response type of Sec. 3 and annotations -> [(question, answer), ...]."""
    if kind == "conversation": return conversation(scene, rng, pairs)
    if kind == "detail_description": return [(rng.choice(detail_questions()), description(scene))]
    if kind == "complex_reasoning": return reasoning(scene, rng)
    if kind == "brief": return [(rng.choice(brief_instructions()), caption(scene, rng))]
    raise ValueError(f"no response type {kind!r}: conversation, detail_description, complex_reasoning or brief")


def scene_of(boxes):
    """Box lines, `red circle: [0.1, 0.2, 0.3, 0.4]`, -> the Scene that they tell of. ValueError if they are not the toy's."""
    things, side = [], SIDE
    for line in boxes.splitlines() or [": "]:
        name, _, box = line.rpartition(": ")
        if tuple(name.split()) not in PAIRS:
            raise ValueError(f"a script that reads the toy's shapes finds {line.strip(': ') or 'no boxes of the toy world'} "
                             "here; for other pictures take a language model")
        left, _, right, _ = json.loads(box)
        while (right - left) * side < 8:                 # things have 9 to 14 pixels, whatever the picture has
            side *= 2
        x, y, right, bottom = (round(v * side) for v in json.loads(box))
        things.append(Thing(*name.split(), (x, y, right - x, bottom - y), side=side))
    return Scene(tuple(sorted(things, key=lambda t: t.cell)))


def scripted_teacher(request, seed):
    """`generate_data.py --teacher script`: a request -> a reply of the shape that a chat endpoint returns.

    No language model, and it reads the boxes whatever the type: what it can say needs all there is to know.
    """
    context, scene = request.context, scene_of(request.context.boxes)
    told = lambda kind: teacher(kind, scene, random.Random(f"{seed} {context.id} {kind}"))
    if request.question:                 # a reference answer: to one of our own questions, or to one for a description
        text = dict(told("conversation") + told("complex_reasoning")).get(request.question) or description(scene)
    elif request.kind == "detail_description":
        text = description(scene)
    else:
        text = "\n===\n".join(f"Question:\n{question}\n===\nAnswer:\n{answer}" for question, answer in told(request.kind))
    return {"model": "scripted teacher (no language model)",
            "choices": [{"message": {"content": text}, "finish_reason": "stop"}]}


JUDGE = "scripted judge (no language model)"


def facts(text):
    """The statements of an answer, one a clause: "There are two things. A ..." -> {"there are two things", "a ...", ...}"""
    return {" ".join(part.lower().split()) for part in re.split(r"[.,]", text)} - {""}


def truths(question, scene, tries=400):
    """All that can rightly be said to a question about a scene, and how much of it a whole answer says.

    What the teacher says is random, so it is asked again and again; one kind of answer ("In short, ...") lists a few facts of
    many, in any order, and 40 such answers hold practically all of them.
    """
    if question in detail_questions():
        return facts(description(scene)), len(facts(description(scene)))
    true, enough = set(), 0
    for seed in range(tries):
        rng = random.Random(seed)
        told = [pair for _ in range(10) for pair in reasoning(scene, rng)]
        told += [(q.text, q.answer) for q in questions(scene, rng, PAIRS)] if seed < 80 else []
        for said in (facts(answer) for text, answer in told if text == question):
            true, enough = true | said, len(said)
        if true and (seed >= 40 or not question.startswith("In short")): break
    if not true:
        raise ValueError(f"the scripted judge knows only the toy's questions, not {question!r}; take a language model as judge")
    return true, enough


def scripted_judge(request):
    """`eval.py judge --judge script`: a review of two answers by what the boxes say, in the form that a language model has.

    A score is 1 + 9 x the share of right statements, among those made or, if an answer is too short, those needed: only an
    answer that is right from end to end gets a 10. It judges no style, and knows no other words than the teacher's.
    """
    message = request.body["messages"][-1]["content"]
    name = rf"(?:{'|'.join(COLOURS)}) (?:{'|'.join(SHAPES)})"
    boxes = "\n".join(re.findall(rf"^{name}: \[.*\]$", message.partition("\n\n[Question]\n")[0], re.MULTILINE))
    question = re.search(r"\[Question\]\n(.*?)\n\n\[(.*?) 1\]", message, re.DOTALL)[1]
    said = re.findall(r"\[([^\]\n]+ [12])\]\n(.*?)\n\n\[End of \1\]", message, re.DOTALL)
    true, enough = truths(question, scene_of(boxes))
    shares, words = [], []
    for name, answer in said:
        made = facts(answer)
        shares.append(len(made & true) / max(len(made), enough))
        wrong = "; ".join(sorted(made - true)) or "nothing"
        words.append(f"{name}: {len(made & true)} right of {len(made)} said and {enough} needed; wrong: {wrong}.")
    scores = " ".join(f"{1 + 9 * share:.3g}" for share in shares)
    return {"model": JUDGE, "choices": [{"message": {"content": "\n".join([scores, f"This is a {JUDGE}.", *words])},
                                         "finish_reason": "stop"}]}


# ------------------------------------------------------------------------------------------------------------- commands
def save_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def save_coco(folder, split, scenes, first_id, rng):
    """Pictures and the two annotation files in COCO's own format; returns {image id: scene}."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    numbered = dict(enumerate(scenes, first_id))
    images = [{"id": i, "file_name": f"{i:012d}.png", "width": s.side, "height": s.side} for i, s in numbered.items()]
    said, boxes = [], []
    for image, scene in zip(images, scenes):
        draw(scene).save(folder / "images" / image["file_name"])
        for text in captions(scene, rng):
            said.append({"id": first_id * 10 + len(said), "image_id": image["id"], "caption": text})
        for t in scene.things:
            boxes.append({"id": first_id * 10 + len(boxes), "image_id": image["id"], "category_id": 1 + PAIRS.index(t.pair),
                          "bbox": list(t.box), "area": t.box[2] * t.box[3], "iscrowd": 0, "segmentation": []})
    categories = [{"id": 1 + k, "name": " ".join(pair), "supercategory": pair[1]} for k, pair in enumerate(PAIRS)]
    save_json(folder / "annotations" / f"captions_{split}.json", {"images": images, "annotations": said})
    save_json(folder / "annotations" / f"instances_{split}.json",
              {"images": images, "annotations": boxes, "categories": categories})
    return numbered


def read_coco(instances):
    """{image id: Scene} from an `instances_*.json`: all that the scripted teacher may know of a picture."""
    coco, found = json.loads(Path(instances).read_text()), {}
    names = {c["id"]: c["name"].split() for c in coco["categories"]}
    side = {image["id"]: image["width"] for image in coco["images"]}
    for b in coco["annotations"]:
        found.setdefault(b["image_id"], []).append(
            Thing(*names[b["category_id"]], tuple(b["bbox"]), side=side[b["image_id"]]))
    return {i: Scene(tuple(sorted(things, key=lambda t: t.cell))) for i, things in found.items()}


def exam(rng, per_kind, new, side=SIDE):
    """Scenes and (scene number, question) pairs: `per_kind` of each kind, the answers of a kind equally often.

    `new`: every question is decided by a pair of HELD_OUT; otherwise none is.
    """
    ways = {"colour": len(COLOURS), "shape": len(SHAPES), "existence": 2, "relation": 4, "place": 4,
            "count": 4 if new else 5}    # one to four; "none" is decided by no pair
    if uneven := [kind for kind, n in ways.items() if per_kind % n]:
        raise ValueError(f"{per_kind} questions of each kind do not divide evenly among the answers of {', '.join(uneven)}; "
                         f"take a multiple of {math.lcm(*ways.values())}")
    scenes, asked, have = [], [], {}
    while len(asked) < per_kind * len(KINDS):
        scene = sample_scene(rng, PAIRS if new else SEEN, HELD_OUT if new else None, side)
        fit = [q for q in questions(scene, rng, PAIRS if new else SEEN) if q.kind in KINDS
               and have.get((q.kind, q.value), 0) < per_kind // ways[q.kind] and (not new or q.about & set(HELD_OUT))]
        if fit:
            kind = rng.choice(sorted({q.kind for q in fit}))
            question = rng.choice([q for q in fit if q.kind == kind])
            have[kind, question.value] = have.get((kind, question.value), 0) + 1
            asked.append((len(scenes), question))
            scenes.append(scene)
    return scenes, asked


def world(args):
    """Draw the world: pictures, COCO's two files, image-caption pairs, and four sets of questions with their answers."""
    out, rng = Path(args.out), random.Random(args.seed)
    train = save_coco(out, "train", [sample_scene(rng, side=args.side) for _ in range(args.pictures)], 1, rng)
    pairs = [{"image": f"{i:012d}.png", "caption": caption(s, rng)} for i, s in train.items()]
    first_id = args.pictures + 1
    for split in ("held_out", "new_pairs"):
        scenes, asked = exam(rng, args.questions, split == "new_pairs", args.side)
        save_coco(out, split, scenes, first_id, rng)
        rows = [{"question_id": f"{split}-{n}", "image": f"{first_id + k:012d}.png", "text": q.text, "category": q.kind,
                 "truth": q.answer} for n, (k, q) in enumerate(asked)]
        first_id += len(scenes)
        write_lines(out / f"questions_{split}.jsonl", rows)
        if split == "held_out":          # the same questions without a picture, and each with a picture of another question
            write_lines(out / "questions_blind.jsonl", [{k: v for k, v in r.items() if k != "image"} for r in rows])
            moved = rows[len(rows) // 2:] + rows[:len(rows) // 2]
            write_lines(out / "questions_shuffled.jsonl", [{**r, "image": m["image"]} for r, m in zip(rows, moved)])
    if args.side > SIDE:                 # what tiles will show, W has to know from stage 1, which looks at squares: things near
        near = save_coco(out, "near", [sample_scene(rng) for _ in range(args.pictures)], first_id, rng)
        pairs += [{"image": f"{i:012d}.png", "caption": caption(s, rng)} for i, s in near.items()]
    write_lines(out / "pairs.jsonl", pairs)
    print(f"{out}: {len(train)} pictures to train on, {args.questions * len(KINDS)} questions each: held_out, new_pairs, "
          "blind, shuffled.")


SPLITS = ("held_out", "new_pairs", "blind", "shuffled")


def score(questions_file, answers_file, part=str):
    """Percent of answers of which a part, or the whole, is exactly the truth's: all, then by kind; and the rows."""
    answers, rows = whole_lines(answers_file), whole_lines(questions_file)
    said = {row["question_id"]: row["text"].strip() for row in answers}
    missing = [row["question_id"] for row in rows if row["question_id"] not in said]
    if not missing and len(answers) > len(rows):
        raise ValueError(f"{answers_file}: {len(answers)} answers to the {len(rows)} questions of {questions_file}; each once")
    if missing:
        raise ValueError(f"{answers_file}: {len(missing)} of {len(rows)} questions of {questions_file} have no answer, "
                         f"e.g. {missing[0]}; run sample.py on that file again")
    rows = [{**row, "answer": (text := said[row["question_id"]]), "right": part(text) == part(row["truth"])} for row in rows]
    percent = lambda some: round(100 * sum(row["right"] for row in some) / len(some), 1)
    return {"all": percent(rows), **{k: percent([r for r in rows if r["category"] == k]) for k in KINDS}}, rows


def bench_scores(reviews):
    """Relative scores of the toy's LLaVA-Bench: conversation, detail, complex reasoning, all."""
    scores, _ = relative_scores([str(reviews)])
    return {kind: round(scores[f"{kind}.relative"], 1) for kind in ("conv", "detail", "complex", "all")}


def report(args):
    """Accuracies and the bench's scores -> results.json and the terminal; pictures, answers and loss curves -> report.png."""
    out, results, rows = Path(args.out), {}, {}
    for split in SPLITS:
        results[split], rows[split] = score(out / "world" / f"questions_{split}.jsonl", out / f"answers_{split}.jsonl")
        print(f"{split:10s} " + "  ".join(f"{k} {v:5.1f}" for k, v in results[split].items()))
    results["bench"] = bench_scores(out / "reviews.jsonl")
    print("bench      " + "  ".join(f"{k} {v:5.1f}" for k, v in results["bench"].items())
          + f"  (relative to the scripted teacher; {JUDGE})")
    results["minutes"] = {phase: float(m) for phase, m in (pair.split("=") for pair in args.minutes)}
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")

    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure = plt.figure(figsize=(13, 11.5), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(4, 1))
    grid = above.subplots(3, len(KINDS))
    for column, kind in zip(grid.T, KINDS):       # three questions a kind; where some are wrong, one of the three is
        some = sorted((r for r in rows["held_out"] if r["category"] == kind), key=lambda r: r["right"])
        for ax, row in zip(column, some[:1] + [r for r in some[1:] if r["right"]][:2]):
            ax.imshow(Image.open(out / "world" / "images" / row["image"]), interpolation="nearest")
            ax.set(xticks=[], yticks=[])
            verdict = "right" if row["right"] else f"wrong: {row['truth']}"
            ax.set_title("\n".join(textwrap.fill(text, 30) for text in (row["text"], row["answer"], verdict)),
                         fontsize=8, color="darkgreen" if row["right"] else "firebrick")
    for stage, ax in zip((1, 2), below.subplots(1, 2)):
        log = [row for row in whole_lines(out / f"stage{stage}" / "log.jsonl") if "loss" in row]
        ax.semilogy([row["step"] for row in log], [row["loss"] for row in log], lw=0.8)
        ax.set(title=f"stage {stage}: training loss", xlabel="step")
    figure.suptitle("held-out {held_out[all]} %   new pairs {new_pairs[all]} %   blind {blind[all]} %   shuffled "
                    "{shuffled[all]} %".format(**results))
    figure.savefig(out / "report.png", dpi=110)
    print(f"wrote {out / 'results.json'} and {out / 'report.png'}")


# ------------------------------------------------------------------------------------- the paper's ablations in miniature
def answer_first(text):
    """The conclusion before what it rests on: "A is in row 1 and B in row 2, so it is above." -> "It is above. A is in ..." """
    parts = re.split(r", so |\. So |\. (?=Taking )", text.rstrip("."))
    return ". ".join(part[0].upper() + part[1:] for part in reversed(parts)) + "." if len(parts) == 2 else text


def conclusion(text):
    return answer_first(text).split(". ")[0].rstrip(".")


def turn_answers(args):
    """Write a copy of LLaVA-format data in which every answer begins with its conclusion."""
    records = json.loads(Path(args.data).read_text())
    for turn in (turn for record in records for turn in record["conversations"] if turn["from"] == "gpt"):
        turn["value"] = answer_first(turn["value"])
    save_json(Path(args.out), records)


TABLE_4 = {                              # LLaVA-Bench (COCO), relative scores: conversation, detail, complex reasoning, all
    "full": ("full data", 83.1, 75.3, 96.5, 85.1), "detail_complex": ("detail + complex", 81.5, 73.3, 90.8, 81.9),
    "conversation_few": ("conversation + 5% detail + 10% complex", 81.0, 68.4, 91.5, 80.5),
    "conversation": ("conversation", 76.5, 59.8, 84.9, 73.8), "stage1": ("no instruction tuning", 22.0, 24.0, 18.5, 21.5)}
TABLE_8 = {                              # ScienceQA, accuracy
    "full": ("best variant", 90.92), "last_layer": ("features of the last layer", 89.96),
    "answer_first": ("predict answer first", 89.77), "scratch": ("training from scratch: no stage 1", 85.81),
    "small": ("smaller language model", 89.84)}


def compare(title, table, columns, ours, digits):
    """One table: ours (mean and standard deviation over the seeds), its change from the first row, and the same of the paper.

    ours: {row: (seeds, columns)}. A change is clear if it is beyond two standard errors over the seeds. The paper's changes are
    the differences of its printed scores. Where the two disagree, in sign or in size, the row says so.
    """
    print(f"\n{title}")
    for k, column in enumerate(columns):
        print(f"\n{column:40s}         ours           change   paper  change")
        base, best = ours["full"][:, k], table["full"][1 + k]
        for row, (name, *paper) in table.items():
            x = ours[row][:, k]
            line = f"{name:40s} {x.mean():5.1f} ± {x.std():4.1f}"
            if row == "full":
                print(f"{line}                   {best:6.{digits}f}")
                continue
            d, theirs = x - base, paper[k] - best
            clear = abs(d.mean()) > 2 * d.std(ddof=1) / len(d) ** 0.5
            ratio = d.mean() / theirs
            verdict = ("no clear change here" if not clear else "DISAGREES with the paper" if ratio < 0 else
                       f"{ratio:.0f} times the paper's" if ratio > 3 else
                       "less than a third of the paper's" if ratio < 1 / 3 else "")
            line += f"   {d.mean():+6.1f} ± {d.std():4.1f}   {paper[k]:6.{digits}f}  {theirs:+6.{digits}f}  {verdict}"
            print(line.rstrip())


def ablations(args):
    """Tables 4 and 8 of the paper in miniature, from the folders that runs/toy_ablations.sh fills, one a seed."""
    seeds = sorted(Path(args.out).glob("seed*/"))
    if len(seeds) < 2:
        raise ValueError(f"{args.out}: a spread needs at least two folders seedN, found {len(seeds)}; runs/toy_ablations.sh")
    bench = {row: np.array([list(bench_scores(s / f"reviews_{row}.jsonl").values()) for s in seeds]) for row in TABLE_4}
    compare(f"Table 4 (data), relative scores on the toy's bench, {JUDGE}, {len(seeds)} seeds; paper: LLaVA-Bench (COCO)",
            TABLE_4, ("conversation", "detailed description", "complex reasoning", "all"), bench, 1)
    right = {}
    for row in TABLE_8:                  # only conclusions count, as in ScienceQA; in either order
        scored = [score(s / "world" / "questions_held_out.jsonl", s / f"held_out_{row}.jsonl", conclusion)[0] for s in seeds]
        right[row] = np.array([[r["all"], r["relation"]] for r in scored])
    table = {row: (name, paper, paper) for row, (name, paper) in TABLE_8.items()}
    compare(f"Table 8 (design), accuracy on held-out toy questions, {len(seeds)} seeds; paper: ScienceQA",
            table, ("all questions", "relations, the kind that reasons"), right, 2)


def family(args):
    """The toy's systems on larger pictures, from the folder that runs/toy_family.sh fills: accuracies by kind of question."""
    for answers in sorted(Path(args.out).glob("held_out_*.jsonl"), key=lambda path: path.stem):
        scores, _ = score(Path(args.out) / "world" / "questions_held_out.jsonl", answers)
        print(f"{answers.stem.removeprefix('held_out_'):10s} " + "  ".join(f"{k} {v:5.1f}" for k, v in scores.items()))


TARGETS = HELD_OUT + SEEN[::7]           # 14 classes for REACT: 8 that the toy's CLIP has never seen, and 6 that it has


def react_world(args):
    """For REACT (Diss. Ch. 2): class names, templates, a corpus of captioned pictures, and what a CLIP is tested on.

    A third of the corpus shows a target among other things. Two thirds of it, and all pictures of the test, lie on dark paper,
    which the toy's CLIP has never seen; the captions do not say so. Pictures with captions to retrieve are as CLIP knows them.
    """
    out, rng = Path(args.out), random.Random(args.seed)
    (out / "images").mkdir(parents=True, exist_ok=True)
    others, dark = [pair for pair in PAIRS if pair not in TARGETS], lambda scene: Scene(scene.things, rng.randint(60, 120))

    def single(pair):
        while True:
            for t in sample_scene(rng, PAIRS, [pair]).things:
                if t.pair == pair: return Scene((t,))

    def save(name, scenes, texts):
        for i, scene in enumerate(scenes):
            draw(scene).save(out / "images" / f"{name}_{i}.png")
        (out / f"{name}.tsv").write_text("".join(f"{name}_{i}.png\t{text}\n" for i, text in enumerate(texts)))

    scenes = [sample_scene(rng, PAIRS, TARGETS) if i % 3 == 0 else sample_scene(rng, others) for i in range(args.pictures)]
    scenes = [dark(scene) if rng.random() < 2 / 3 else scene for scene in scenes]
    save("corpus", scenes, [caption(scene, rng) for scene in scenes])
    shown = [pair for pair in TARGETS for _ in range(args.tests)]
    save("test", [dark(single(pair)) for pair in shown], [" ".join(pair) for pair in shown])
    scenes = [sample_scene(rng) for _ in range(300)]
    save("captions", scenes, [caption(scene, rng) for scene in scenes])
    (out / "classes.txt").write_text("".join(f"{' '.join(pair)}\n" for pair in TARGETS))
    (out / "templates.txt").write_text("a {}.\na picture of a {}.\nthere is a {}.\n")
    print(f"{out}: a corpus of {args.pictures} pictures, {len(shown)} to classify as one of {len(TARGETS)}, 300 with captions")


def arguments(argv):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter,
                                     allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True)
    for command, run in (("world", world), ("report", report), ("answer_first", turn_answers), ("ablations", ablations),
                         ("family", family), ("react", react_world)):
        sub = commands.add_parser(command, help=run.__doc__, allow_abbrev=False)
        sub.set_defaults(run=run)
        sub.add_argument("--out", required=True)
        if command == "answer_first":
            sub.add_argument("--data", required=True)
        if command == "report":
            sub.add_argument("--minutes", nargs="*", default=[], metavar="PHASE=MINUTES", help="copied into results.json")
        if command == "react":
            sub.add_argument("--seed", type=int, default=0)
            sub.add_argument("--pictures", type=int, default=6000, help="pictures of the corpus")
            sub.add_argument("--tests", type=int, default=100, help="pictures of each class to classify")
        if command == "world":
            sub.add_argument("--seed", type=int, default=0)
            sub.add_argument("--side", type=int, default=SIDE, choices=[SIDE, 2 * SIDE],
                             help="of the pictures in pixels; things keep their size, and are details of larger ones. Their "
                                  "pairs come with those of as many smaller pictures")
            sub.add_argument("--pictures", type=int, default=8000, help="pictures to train on")
            sub.add_argument("--questions", type=int, default=120, help="questions of each kind in each set")
    return parser.parse_args(argv)


def main(argv=None):
    args = arguments(argv)
    args.run(args)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
