"""
Looking inside a checkpoint: where it looked, what else it could have said, how it sees in tiles.

    python -m extras.probe attention --model DIR --image dog.jpg --question "What?" --out looks.png
    python -m extras.probe alternatives --model DIR --image dog.jpg --question "What is it?" --top 3
    python -m extras.probe rank --model DIR --question "What barks?" --answers "A dog." "A cat."
    python -m extras.probe tiles --image dog.jpg --out tiles.png

Attention is where information may have come from, no proof that it was used: some visual tokens
draw attention at every word. COURSE: compare layers (--layers 0, --layers -1) and heads, and the
same word in two questions.
"""
from dataclasses import dataclass

import matplotlib
import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageEnhance

import sample
from data import collate, sample_of
from parts.files import IGNORE, run_command, run_main
from parts.pictures import open_image
from parts.ranks import TRAINING
from parts.views import TILINGS, view_of

MAP_SIDE = 448           # pixels of a map's longer side

# -----------------------------------------------------------------------------
# Answers behind a question: given ones, and the model's own


@dataclass(frozen=True, kw_only=True)
class ProbeConfig:
    model: str                           # checkpoint folder
    question: str                        # answered greedily
    image: str = None                    # a picture: path or http(s) address
    max_new_tokens: int = 512
    template: str = None                 # for a checkpoint that does not name its own
    device: str = "auto"                 # cuda, mps or cpu
    dtype: str = "auto"                  # bf16 or fp32

    CHOICES = sample.Config.CHOICES


def open_question(config):
    """(talker, turns, pictures)"""
    talker = sample.Talker(sample.Config(
        model=config.model, temperature=0.0, max_new_tokens=config.max_new_tokens,
        template=config.template, device=config.device, dtype=config.dtype))
    pictures = [open_image(config.image)] if config.image else []
    return talker, [sample.human_turn(config.question, len(pictures))], pictures


def with_answer(talker, turns, pictures, answer):
    """A conversation and an answer, as a sample in which that answer alone is scored."""
    prompt = talker.prompt(turns, pictures)
    turns = [*turns, {"from": "gpt", "value": answer}]
    answered = sample_of(turns, prompt["pictures"], talker.model.tokenizer, talker.template,
                         talker.view)
    n = len(prompt["input_ids"])
    return answered | {"labels": [IGNORE] * n + answered["labels"][n:]}


def model_inputs(talker, samples):
    """What model.forward takes."""
    batch = collate(samples, talker.view)
    return {name: batch[name].to(talker.model.device) for name in TRAINING}


def rank_answers(talker, turns, pictures, answers):
    """[(log p, answer), ...] of given answers behind one prompt, the likeliest first, Eq. (3)."""
    samples = [with_answer(talker, turns, pictures, answer) for answer in answers]
    log_p = talker.model.score(**model_inputs(talker, samples))
    return sorted(zip(log_p.tolist(), answers, strict=True), reverse=True)


@torch.no_grad()
def alternatives(talker, turns, pictures, top):
    """A greedy answer (A,), the likeliest ids at each of its steps (A, top), their p (A, top)."""
    new = []
    "".join(talker.stream(turns, pictures, ids=new))
    prompt = talker.prompt(turns, pictures)
    answered = prompt | {"input_ids": prompt["input_ids"] + new, "labels": prompt["labels"] + new}
    h, targets = talker.model.answer_states(**model_inputs(talker, [answered]))      # (A, D), (A,)
    logits = talker.model.f_phi.get_output_embeddings()(h).float()                   # (A, V)
    logits[:, talker.model.image_id] = -torch.inf        # as when it answers: not a word
    p, ids = logits.softmax(-1).topk(top)
    return targets, ids, p


@dataclass(frozen=True, kw_only=True)
class RankConfig(ProbeConfig):
    answers: list[str]                   # to rank


def print_ranking(config):
    """Rank given answers to a question by log p."""
    for log_p, answer in rank_answers(*open_question(config), config.answers):
        print(f"{log_p:10.3f}  {answer}")


@dataclass(frozen=True, kw_only=True)
class AlternativesConfig(ProbeConfig):
    top: int = 5                         # how many at each step


def print_alternatives(config):
    """Print what else could have been said at each step, with probabilities."""
    talker, turns, pictures = open_question(config)
    spell = talker.model.tokenizer.decode
    steps = zip(*alternatives(talker, turns, pictures, config.top), strict=True)
    for i, ids, p in steps:
        line = f"{spell(i.item())!r:<16}"
        for j, likelihood in zip(ids.tolist(), p.tolist(), strict=True):
            line += f"{spell(j)!r} {likelihood:.3f}  "
        print(line.rstrip())


# -----------------------------------------------------------------------------
# Where it looked


def words_and_attention(talker, turns, pictures, answer, layers=None, heads=None):
    """[(word, [a map (rows, columns) of each picture]), ...] of an answer.

    A map sums to the share of attention that its visual tokens got, a mean over the word's tokens.
    layers, heads    which of them, as text ("0,5,-1"); None: all. ValueError for what there is not.
    """
    config = talker.model.f_phi.config
    layers = parse_numbers(layers, config.num_hidden_layers, "layers")
    heads = parse_numbers(heads, config.num_attention_heads, "heads")
    answered = with_answer(talker, turns, pictures, answer)
    weights = attention_of(talker, answered, layers, heads)      # (A, visual tokens)
    ids = [label for label in answered["labels"] if label != IGNORE]
    text = ""
    tokens = {}                          # {number of a word: the attention of its tokens}
    for k in range(len(ids)):
        longer = talker.model.to_text(ids[:k + 1], [talker.template.STOP])
        if longer != text:               # else it is a blank, or STOP
            text = longer
            tokens.setdefault(len(text.split()) - 1, []).append(weights[k])
    sizes = [picture.size for picture in pictures]
    counts = [talker.view.tokens(*size) for size in sizes]
    words = []
    for number, word in enumerate(text.split()):
        parts = torch.stack(tokens[number]).mean(0).split(counts)
        seen = zip(sizes, parts, strict=True)
        words.append((word, [map_of(talker.view, size, part) for size, part in seen]))
    return words


def parse_numbers(text, n, what):
    """"0,5,-1" to [0, 5, n - 1]; None to all n numbers."""
    numbers = range(n)
    if text is None:
        return list(numbers)
    try:
        return [numbers[int(part)] for part in text.split(",")]
    except (ValueError, IndexError):
        raise ValueError(f"--{what} {text!r}: numbers with commas between them, from 0 to {n - 1}, "
                         f"or -{n} to -1 from the end") from None


@torch.no_grad()
def attention_of(talker, answered, layers, heads):
    """(A, visual tokens): a mean over layers and heads.

    The attention of an answer's token is that of the position which predicts it.
    """
    f_phi = talker.model.f_phi
    batch = model_inputs(talker, [answered])
    predicts = batch["answer_index"] - 1                                         # (A,)
    visual = (batch["input_ids"][0] == talker.model.image_id).nonzero()[:, 0]    # (visual tokens,)
    found = []

    def watch(module, inputs, output):   # output[1] is (1, heads, T, T), of one layer at a time
        weights = output[1][0, heads][:, predicts][..., visual]
        found.append(weights.float().mean(0))

    usual = f_phi.config._attn_implementation
    f_phi.set_attn_implementation("eager")       # the only one that has the weights at hand
    hooks = [f_phi.base_model.layers[i].self_attn.register_forward_hook(watch) for i in layers]
    try:
        talker.model.answer_states(**batch)
    finally:
        f_phi.set_attn_implementation(usual)
        for hook in hooks:
            hook.remove()
    return torch.stack(found).mean(0)


def map_of(view, size, weights):
    """Weights of a picture's visual tokens as a map of it: each over the pixels that it saw."""
    scale = MAP_SIDE / max(size)
    size_of_map = [max(1, round(side * scale)) for side in size]
    total = np.zeros(size_of_map[::-1], np.float32)
    for box, numbers in grids_of(view, *size):
        left, top, right, bottom = (round(edge * scale) for edge in box)
        grid = weights[torch.from_numpy(numbers)].float().cpu().numpy()      # (rows, columns)
        stretched = (max(1, right - left), max(1, bottom - top))
        large = Image.fromarray(grid).resize(stretched, Image.Resampling.BILINEAR)
        share = grid.sum() / max(np.asarray(large).sum(), 1e-12)
        layer = Image.new("F", size_of_map)
        layer.paste(large, (left, top))  # what hangs over the edge falls off
        total += share * np.asarray(layer)
    return total


def grids_of(view, width, height):
    """Where a picture's visual tokens lie: [(box in its pixels, their numbers (rows, columns))]."""
    square = np.arange(view.N).reshape(view.size // view.patch, -1)
    edge = min(width, height) if view.aspect == "crop" else max(width, height)
    left, top = (width - edge) / 2, (height - edge) / 2
    centred = (left, top, left + edge, top + edge)
    stretched = (0, 0, width, height)
    if view.tiling is None:
        return [(stretched if view.aspect == "squeeze" else centred, square)]
    grids = []
    if view.tiling.global_picture == "stretched":
        grids = [(stretched, square)]
    elif view.tiling.global_picture:
        grids = [(centred, square)]
    plan = view.tiling.plan(width, height)
    n_rows, n_columns = len(plan.rows), len(plan.columns) + 1            # with the row's end
    numbers = np.arange(plan.tokens)[-n_rows * n_columns:].reshape(n_rows, n_columns)
    pixels = view.patch * width / plan.scaled[0]     # of the picture, in a patch of its canvas
    left, top = (offset / view.patch for offset in plan.offset)
    box = (plan.columns.start - left, plan.rows.start - top,
           plan.columns.stop - left, plan.rows.stop - top)
    return [*grids, ([edge * pixels for edge in box], numbers[:, :-1])]


def overlay(picture, heat):
    """The picture (PIL) under its map, the brightest part being where most attention lies."""
    heat = Image.fromarray(heat / max(heat.max(), 1e-12))
    heat = np.asarray(heat.resize(picture.size, Image.Resampling.BILINEAR))      # (H, W)
    colours = matplotlib.colormaps["inferno"](heat)[..., :3] * 255               # (H, W, 3)
    strength = heat[..., None]
    dimmed = np.asarray(picture) * 0.35 * (1 - strength)
    return Image.fromarray(np.uint8(dimmed + colours * (0.35 + 0.65 * strength)))


@dataclass(frozen=True, kw_only=True)
class AttentionConfig(ProbeConfig):
    image: str                           # a picture: path or http(s) address
    out: str                             # PNG to write: the picture under each word's attention
    layers: str = None                   # of which layers, e.g. 0,5,-1; their mean (default: all)
    heads: str = None                    # of which heads, likewise


def draw_attention(config):
    """Draw where the model looked at each word of its answer."""
    talker, turns, pictures = open_question(config)
    answer = sample.print_answer(talker, turns, pictures)
    words = words_and_attention(talker, turns, pictures, answer, config.layers, config.heads)
    n_rows = max(1, -(-len(words) // 8))
    figure = Figure(figsize=(12.8, 1.8 * n_rows), layout="constrained")
    for number, (word, maps) in enumerate(words, 1):
        axes = figure.add_subplot(n_rows, 8, number, title=word)
        axes.imshow(overlay(pictures[0], maps[0]))
        axes.axis("off")
    figure.savefig(config.out, format="png", dpi=200)
    print(f"wrote {config.out}")


# -----------------------------------------------------------------------------
# Tiles


@dataclass(frozen=True, kw_only=True)
class TilesConfig:
    image: str                           # a picture: path or http(s) address
    out: str                             # picture to write
    aspect: str = "anyres"               # LLaVA-NeXT's; hd is LLaVA-1.5-HD's

    CHOICES = {"aspect": list(TILINGS)}


def draw_tiles(config):
    """Draw how a picture is seen: numbered tiles, what is cut off (dark), row ends (orange)."""
    view = view_of(config.aspect, 224 if config.aspect.startswith("hd") else 336, 14)
    picture = open_image(config.image)
    plot_tiles(picture, view).save(config.out)
    plan = view.tiling.plan(*picture.size)
    print(f"{picture.size} pixels, scaled to {plan.scaled} on {plan.grid} tiles of {view.size}: "
          f"{plan.tokens:,} tokens; wrote {config.out}")


def plot_tiles(picture, view):
    """A drawing (PIL) of the canvas and, to its left, of the global picture, if there is one."""
    plan = view.tiling.plan(*picture.size)
    tile, patch = view.size, view.patch
    wide, high = plan.canvas
    left = tile + patch if view.tiling.global_picture else 0
    places = [(0, (high - tile) // 2)] if left else []
    for y in range(0, high, tile):
        places += [(left + x, y) for x in range(0, wide, tile)]
    image = Image.new("RGB", (left + wide + patch, high), "white")
    for square, place in zip(view.squares(picture), places, strict=True):
        image.paste(square, place)
    columns = range(left + plan.columns.start * patch, left + plan.columns.stop * patch)
    rows = range(plan.rows.start * patch, plan.rows.stop * patch, patch)
    canvas = (left, 0, left + wide, high)
    kept = image.crop((columns.start, rows.start, columns.stop, rows.stop))
    image.paste(ImageEnhance.Brightness(image.crop(canvas)).enhance(0.3), canvas)
    image.paste(kept, (columns.start, rows.start))
    pen = ImageDraw.Draw(image)
    for y in rows:
        pen.rectangle((columns.stop, y, columns.stop + patch, y + patch), "orange", "white")
    for number, (x, y) in enumerate(places):
        pen.rectangle((x, y, x + tile, y + tile), outline="crimson", width=3)
        pen.text((x + 12, y + 8), str(number), fill="crimson", font_size=24)
    return image


COMMANDS = {
    "attention": (draw_attention, AttentionConfig),
    "alternatives": (print_alternatives, AlternativesConfig),
    "rank": (print_ranking, RankConfig),
    "tiles": (draw_tiles, TilesConfig),
}


def main(argv=None):
    return run_command(COMMANDS, argv, __doc__)


if __name__ == "__main__":
    run_main(main)
