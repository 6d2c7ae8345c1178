"""
Where it looks: how much of f_phi's attention lies on each part of a picture while it says each word of an answer (Sec. 5.1).

    python sample.py --model out/stage2 --image dog.jpg --question "What is this?" --show_attn looks

Attention is where information may have come from, no proof that it was used: some visual tokens draw attention at every word.
COURSE: compare layers (--attn_layers 0, --attn_layers -1) and heads, and the same word in two questions.
"""
import os
import re

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from data import collate, encode, render
from images import MAX_RESIZED

SIDE = 448                                               # pixels of a map's longer side


def words_and_attention(model, template, turns, pictures, answer, layers=None, heads=None):
    """[(word, [one map a picture]), ...] of an answer: maps (rows, columns) cover the picture, and sum to the share of
    attention that its visual tokens got, a mean over the word's tokens, `layers` and `heads` (lists of numbers; None: all).

    The attention of a token is that of the position which predicts it. ValueError for a layer or head that there is none of.
    """
    config, f_phi, counts = model.f_phi.config, model.f_phi, [model.view.tokens(*p.size) for p in pictures]
    layers = chosen(layers, config.num_hidden_layers, "layer")
    heads = chosen(heads, config.num_attention_heads, "head")
    before, _ = encode(render(turns, template), model.tokenizer, counts)
    ids, labels = encode(render([*turns, {"from": "gpt", "value": answer}], template), model.tokenizer, counts)
    batch = collate([{"input_ids": ids, "labels": labels, "X_v": model.view.X_v(pictures), "sizes": [p.size for p in pictures],
                      "where": "answer"}])
    predicts = torch.arange(len(before) - 1, len(ids) - 1, device=model.device)              # (A,)
    looked_at = (batch["input_ids"][0] == model.image_id).nonzero()[:, 0].to(model.device)   # (visual tokens,)
    found = []

    def watch(module, inputs, output):                   # output[1] is (1, heads, T, T), of one layer at a time
        found.append(output[1][0, heads][:, predicts][..., looked_at].float().mean(0))       # (A, visual tokens)

    kind, hooks = config._attn_implementation, []
    f_phi.set_attn_implementation("eager")               # the only one that has the weights at hand
    try:
        hooks = [f_phi.base_model.layers[i].self_attn.register_forward_hook(watch) for i in layers]
        with torch.no_grad():
            H = model.splice(batch["input_ids"].to(model.device), batch["X_v"].to(model.device), sizes=batch["sizes"])
            f_phi.base_model(inputs_embeds=H, use_cache=False)
    finally:
        f_phi.set_attn_implementation(kind)
        for hook in hooks:
            hook.remove()
    weights = torch.stack(found).mean(0)                 # (A, visual tokens)
    new, of_word, said = ids[len(before):], [], ""
    for k in range(len(new)):
        text = model.to_text(new[:k + 1], [template.STOP])
        of_word.append(len(text.split()) - 1 if text != said else -1)        # -1: a blank, or STOP
        said = text
    result = []
    for n, word in enumerate(said.split()):
        mine = weights[[k for k, w in enumerate(of_word) if w == n]].mean(0)                 # (visual tokens,)
        result.append((word, [on_picture(model.view, p.size, part) for p, part in zip(pictures, mine.split(counts))]))
    return result


def chosen(numbers, n, what):
    """A list of numbers below n, where -1 is the last; None is all."""
    if wrong := [i for i in numbers or [] if not -n <= i < n]:
        raise ValueError(f"{what} {wrong[0]}: the language model has {n}, 0 to {n - 1}, or -{n} to -1 from the end")
    return list(range(n)) if numbers is None else [i % n for i in numbers]


def grids(view, width, height):
    """Where a picture's visual tokens lie: [((left, top, right, bottom) in its pixels, their numbers (rows, columns)), ...]."""
    side, found, k = view.size // view.patch, [], 0
    square = np.arange(view.N).reshape(side, side)
    centred = lambda s: ((width - s) / 2, (height - s) / 2, (width + s) / 2, (height + s) / 2)
    if not view.tiling:
        return [(centred(max(width, height) if view.aspect == "pad" else min(width, height)), square)]
    plan = view.tiling.plan(width, height)
    if view.tiling.global_picture:
        whole = (0, 0, width, height) if view.tiling.global_picture == "stretched" else centred(max(width, height))
        found, k = [(whole, square)], view.N
    rows, columns = len(plan.rows), len(plan.columns)
    numbers = k + np.arange(rows * (columns + 1)).reshape(rows, columns + 1)[:, :-1]         # the last of a row is `newline`
    x = lambda column: (column * view.patch - plan.offset[0]) * width / plan.scaled[0]
    y = lambda row: (row * view.patch - plan.offset[1]) * height / plan.scaled[1]
    box = x(plan.columns.start), y(plan.rows.start), x(plan.columns.stop), y(plan.rows.stop)
    return [*found, (box, numbers)]


def on_picture(view, size, weights):
    """Weights of a picture's visual tokens as a map of it, its longer side SIDE: each token's weight over the pixels it saw."""
    scale = SIDE / max(size)
    width, height = (max(1, round(x * scale)) for x in size)
    total = np.zeros((height, width), np.float32)
    for box, numbers in grids(view, *size):
        left, top, right, bottom = (round(x * scale) for x in box)
        if right <= left or bottom <= top or (right - left) * (bottom - top) > MAX_RESIZED:
            continue                                     # a strip so thin that its square is far larger than the map
        grid = weights[torch.from_numpy(numbers)].cpu()[None, None]          # (1, 1, rows, columns)
        large = F.interpolate(grid, (bottom - top, right - left), mode="bilinear", align_corners=False)[0, 0].numpy()
        large *= grid.sum().item() / max(large.sum(), 1e-12)
        y0, y1, x0, x1 = max(top, 0), min(bottom, height), max(left, 0), min(right, width)
        total[y0:y1, x0:x1] += large[y0 - top:y1 - top, x0 - left:x1 - left]
    return total


def overlay(picture, heat):
    """The picture (PIL) under its map, the brightest part being where most attention lies."""
    import matplotlib                                    # not at the top: answers alone need none
    heat = Image.fromarray(np.uint8(255 * heat / max(heat.max(), 1e-12))).resize(picture.size, Image.Resampling.BILINEAR)
    strength = np.asarray(heat, np.float32)[..., None] / 255                 # (H, W, 1)
    colours = matplotlib.colormaps["inferno"](strength[..., 0])[..., :3] * 255
    dimmed = np.asarray(picture, np.float32) * 0.35 * (1 - strength)
    return Image.fromarray(np.uint8(dimmed + colours * (0.35 + 0.65 * strength)))


def save_overlays(words, pictures, folder):
    """Write one PNG a word and picture, 03_cat.png, or 03_cat_2.png for the second picture, and words.png with all of them.
    Returns their paths."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    os.makedirs(folder, exist_ok=True)
    paths, across = [], min(len(words), 8)
    fig, axes = plt.subplots(-(-len(words) // across) * len(pictures), across, squeeze=False, layout="constrained",
                             figsize=(1.6 * across, 1.8 * -(-len(words) // across) * len(pictures)))
    for ax in axes.flat:
        ax.axis("off")
    for n, (word, maps) in enumerate(words):
        for k, (picture, heat) in enumerate(zip(pictures, maps)):
            seen, name = overlay(picture, heat), re.sub(r"\W+", "", word)[:40]
            paths.append(os.path.join(folder, f"{n:02}_{name}{f'_{k + 1}' if k else ''}.png"))
            seen.save(paths[-1])
            ax = axes[n // across * len(pictures) + k, n % across]
            ax.imshow(seen)
            ax.set_title(word if k == 0 else "", fontsize=10)
    paths.append(os.path.join(folder, "words.png"))
    fig.savefig(paths[-1], dpi=100)
    plt.close(fig)
    return paths
