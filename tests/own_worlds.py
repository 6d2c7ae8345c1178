"""Two small worlds as a class might bring them, unlike the toy's in shapes, words and surfaces.

    python tests/own_worlds.py slabs out/slabs       rectangles that pale, on woven ground
    python tests/own_worlds.py digits out/digits     textured digits on coloured card

Each writes images/, captions.json and questions.json (LLaVA's format), and questions.jsonl about
held-out pictures, with the truth.
"""
import json
import random
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

S = 96                                   # pixels on a side
NUMBERS = ("no", "one", "two", "three")
COLOURS = {"maroon": (130, 20, 40), "teal": (0, 140, 140), "gold": (225, 180, 30),
           "lilac": (190, 150, 225), "olive": (120, 130, 30), "navy": (20, 30, 110)}
FORMS = {"pillar": (20, 44), "plank": (44, 20), "tile": (30, 30)}
DIGITS = ("nought", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TEXTURES = ("plain", "striped", "barred", "speckled")
CARDS = {"salmon": (235, 150, 130), "mint": (160, 225, 185), "sand": (225, 205, 160),
         "slate": (150, 165, 185)}


def joined(phrases):
    return ", ".join(phrases[:-1]) + " and " + phrases[-1] if len(phrases) > 1 else phrases[0]


def draw_slabs(rng):
    """(picture, caption, questions): one to three rectangles that pale towards one end."""
    noise = np.random.default_rng(rng.randrange(2 ** 32))
    rows, columns = np.mgrid[:S, :S]
    weave = 18 * np.sin(rows / rng.uniform(1, 2)) * np.sin(columns / rng.uniform(1, 2))
    ground = rng.randint(110, 190) + weave + noise.normal(0, 8, (S, S))
    pixels = ground[..., None] * [1, 0.95, 0.85]
    n = rng.randint(1, 3)
    slots = rng.sample([(0, 0), (0, 1), (1, 0), (1, 1)], n)
    names = list(zip(rng.sample(list(COLOURS), n), rng.sample(list(FORMS), n), strict=True))
    slabs = []
    for (colour, form), (row, column) in zip(names, slots, strict=True):
        width, height = (side + rng.randint(-4, 2) for side in FORMS[form])
        left = 48 * column + rng.randint(0, 48 - width)
        top = 48 * row + rng.randint(0, 48 - height)
        end = rng.choice(("upwards", "downwards"))
        pale = np.linspace(0, 0.75, height)[:, None, None]
        pale = pale[::-1] if end == "upwards" else pale
        rgb = np.array(COLOURS[colour]) + noise.normal(0, 8, 3)
        pixels[top:top + height, left:left + width] = rgb * (1 - pale) + 235 * pale
        slabs.append((colour, form, ("left", "right")[column], end))
    picture = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    phrases = [f"a {colour} {form} paling {end} on the {side}" for colour, form, side, end in slabs]
    asked = [("count", "How many slabs lie here?", f"There are {NUMBERS[n]}.")]
    for colour, form, side, end in slabs:
        asked += [("colour", f"Which paint has the {form}?", f"The {form} is {colour}."),
                  ("form", f"What form has the {colour} slab?", f"The {colour} slab is a {form}."),
                  ("side", f"On which side lies the {form}?", f"It lies on the {side}."),
                  ("fade", f"Where does the {colour} slab pale?", f"It pales {end}.")]
    return picture, joined(phrases) + ".", asked + existence(rng, names, COLOURS, FORMS)


def draw_digits(rng):
    """(picture, caption, questions): one or two digits in a row, each with its texture."""
    card = rng.choice(list(CARDS))
    shade = np.linspace(rng.uniform(0.8, 1), rng.uniform(0.8, 1.1), S)[:, None, None]
    pixels = np.ones((S, S, 3)) * CARDS[card] * shade
    picture = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    n = rng.randint(1, 2)
    names = list(zip(rng.sample(TEXTURES, n), rng.sample(DIGITS, n), strict=True))
    for column, (texture, digit) in zip(sorted(rng.sample(range(2), n)), names, strict=True):
        mask = Image.new("L", (S, S))
        place = 24 + 48 * column + rng.randint(-4, 4), rng.randint(38, 58)
        ImageDraw.Draw(mask).text(place, str(DIGITS.index(digit)), 255, anchor="mm",
                                  font=ImageFont.load_default(60), stroke_width=3)
        mask = mask.rotate(rng.uniform(-8, 8), Image.Resampling.BILINEAR, center=place)
        picture.paste(textured(rng, texture), mask=mask)
    phrases = [f"a {texture} {digit}" for texture, digit in names]
    asked = [("count", "How many digits do you read?", f"I read {NUMBERS[n]}."),
             ("card", "Which card is it?", f"It is {card} card."),
             ("first", "Which digit comes first?", f"The first is {names[0][1]}.")]
    for texture, digit in names:
        asked += [("texture", f"How is the {digit} filled?", f"The {digit} is {texture}."),
                  ("digit", f"Which digit is {texture}?", f"The {texture} digit is {digit}.")]
    caption = f"{', then '.join(phrases)} on {card} card."
    return picture, caption, asked + existence(rng, names, TEXTURES, DIGITS)


def textured(rng, texture):
    """A sheet of ink, all over, with lighter stripes, bars or grains in it."""
    noise = np.random.default_rng(rng.randrange(2 ** 32))
    rows, columns = np.mgrid[:S, :S] + rng.randrange(8)
    light = {"plain": rows < 0, "striped": rows % 8 < 4, "barred": columns % 8 < 4,
             "speckled": (noise.random((S // 3, S // 3)) < 0.4).repeat(3, 0).repeat(3, 1)}[texture]
    ink = noise.integers(0, 40, 3)
    return Image.fromarray(np.where(light[..., None], ink + 80, ink).astype(np.uint8))


def existence(rng, here, firsts, seconds):
    """Is there such a thing? A "no" shares a word with a thing that is there."""
    first, second = rng.choice(here)
    absent = [(a, b) for a in firsts for b in seconds
              if (a == first) != (b == second) and (a, b) not in here]
    asked = rng.choice([(first, second), rng.choice(absent)])
    answer = "Yes, it is here." if asked in here else "No, it is missing."
    return [("existence", f"Do you find a {' '.join(asked)}?", answer)]


WORLDS = {"slabs": draw_slabs, "digits": draw_digits}


def make(name, out, n=3000, n_held_out=300, seed=0):
    """Write a world: n pictures to train on, two questions about each of n_held_out others."""
    rng = random.Random(f"{name} {seed}")
    out = Path(out)
    (out / "images").mkdir(parents=True, exist_ok=True)
    captions, instructions, questions = [], [], []
    for i in range(n + n_held_out):
        picture, caption, asked = WORLDS[name](rng)
        image = f"{i:05d}.png"
        picture.save(out / "images" / image)
        if i >= n:
            for kind, text, truth in rng.sample(asked, 2):
                questions.append({"question_id": f"{i}-{kind}-{len(questions)}", "image": image,
                                  "text": text, "category": kind, "truth": truth})
            continue
        captions.append(record(i, image, [("Describe the picture.", caption)]))
        turns = [turn[1:] for turn in rng.sample(asked, min(5, len(asked)))]
        instructions.append(record(i, image, turns))
    (out / "captions.json").write_text(json.dumps(captions))
    (out / "questions.json").write_text(json.dumps(instructions))
    lines = [json.dumps(question) + "\n" for question in questions]
    (out / "questions.jsonl").write_text("".join(lines))


def record(i, image, pairs):
    turns = []
    for question, answer in pairs:
        turns += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    turns[0]["value"] = f"<image>\n{turns[0]['value']}"
    return {"id": str(i), "image": image, "conversations": turns}


if __name__ == "__main__":
    make(*sys.argv[1:3], seed=int(*sys.argv[3:4]))
