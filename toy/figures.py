"""
Two drawings for those who would rather look than read: docs/splice.png and docs/stages.png.

    python -m toy.figures [folder]        the folder is docs, if none is named

They stand on a light card, so that they are legible on a dark page, too.
"""
import sys
from itertools import pairwise
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from data import encode, render
from model import LLaVA
from parts.files import IGNORE, run_main
from parts.templates import TEMPLATES
from parts.views import set_view

CARD = "#fbfaf7"
INK = "#222222"
RED = "#c1121f"
COLOURS = {"text": "#d9d9d9", "image": "#8ecae6", "scored": "#95d5b2"}
LEGEND = {
    "text": "H_q: embeddings of the prompt",
    "image": "H_v = W Z_v, where <image> stands",
    "scored": "the answer and STOP: these predictions are the loss, Eq. (3)",
}
QUESTION = "<image>\nWhat colour is the star?"
ANSWER = "The star is blue."


def new_figure(width, height):
    figure = Figure(figsize=(width, height), facecolor=CARD)
    axes = figure.subplots()
    axes.set_axis_off()
    return figure, axes


def draw_box(axes, x, y, width, height, colour, text, size=9):
    axes.add_patch(Rectangle((x, y), width, height, facecolor=colour, edgecolor=INK, linewidth=0.8))
    axes.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=size,
              color=INK)


def draw_splice(path):
    """The tokens of a toy sample from the end of SYSTEM on: what each is, and what is scored."""
    model = LLaVA.from_parts("toy/pretrained/clip", "toy/pretrained/llm")
    view = set_view(model, "crop")
    turns = [{"from": "human", "value": QUESTION}, {"from": "gpt", "value": ANSWER}]
    ids, labels = encode(render(turns, TEMPLATES["llava_v0"]), model.tokenizer, [view.N])
    words = [model.tokenizer.decode([i]).replace("\n", "\\n") for i in ids]
    start = words.index("Human") - 1
    figure, axes = new_figure(11, 3.1)
    visual_token = 0
    for i in range(start, len(ids)):
        kind = "scored"
        word = words[i].strip(" ") or "␣"
        if ids[i] == model.image_id:
            kind = "image"
            word = f"H_v[{visual_token}]"
            visual_token += 1
        elif labels[i] == IGNORE:
            kind = "text"
        row, column = divmod(i - start, 12)
        draw_box(axes, column, -1.4 * row, 0.94, 1, COLOURS[kind], word)
    lowest = -1.4 * row - 1.2
    x = 0
    for kind, words in LEGEND.items():
        draw_box(axes, x, lowest, 0.3, 0.5, COLOURS[kind], "")
        axes.text(x + 0.42, lowest + 0.25, words, va="center", fontsize=8.5, color=INK)
        x += 4
    axes.set_xlim(-0.2, 13)
    axes.set_ylim(lowest - 0.2, 1.2)
    figure.savefig(path, dpi=130, bbox_inches="tight", facecolor=CARD)


def draw_stages(path):
    """What trains in which stage, and how far the gradient of the loss runs back (Sec. 4.2)."""
    figure, axes = new_figure(11, 3.6)
    draw_stage(axes, 1.9, "stage 1   theta = {W}: captions", ["W"])
    draw_stage(axes, 0, "stage 2   theta = {W, phi}: instructions", ["W", "f_phi"])
    axes.text(11.2, 1.3, "black: forward\nred: gradient\ngreen: trains", fontsize=9, color=INK)
    axes.set_xlim(-0.2, 13)
    axes.set_ylim(-0.5, 3.6)
    figure.savefig(path, dpi=130, bbox_inches="tight", facecolor=CARD)


def draw_stage(axes, y, title, trained):
    axes.text(0, y + 1.25, title, fontsize=11, color=INK)
    places = {"X_v": 0, "g": 1.8, "W": 4.2, "f_phi": 6.6, "loss": 9.6}
    notes = {"g": "frozen: no gradient", "W": "trains", "f_phi": "frozen, but the gradient passes"}
    for name, x in places.items():
        colour = CARD
        if name in notes:
            colour = COLOURS["text"]
        if name in trained:
            colour = COLOURS["scored"]
            notes[name] = "trains"
        draw_box(axes, x, y, 1.3, 0.8, colour, name, size=12)
        axes.text(x + 0.65, y - 0.28, notes.get(name, ""), ha="center", fontsize=8.5, color=INK)
    for left, right in pairwise(places):
        end = places[left] + 1.3
        draw_arrow(axes, end, places[right], y + 0.55, INK)
        if left in ("W", "f_phi"):
            draw_arrow(axes, places[right], end, y + 0.22, RED)


def draw_arrow(axes, start, end, y, colour):
    axes.annotate("", (end, y), (start, y), arrowprops={"arrowstyle": "->", "color": colour})


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    folder = Path(argv[0] if argv else "docs")
    draw_splice(folder / "splice.png")
    draw_stages(folder / "stages.png")


if __name__ == "__main__":
    run_main(main)
