"""
A picture in tiles: how LLaVA-NeXT ("anyres", Diss. Sec. 4.7) and LLaVA-1.5-HD (Diss. Sec. 4.3) see details for which one
square of CLIP's size has no pixels.

    picture --fit--> canvas --cut--> tiles --g, W--> features --merge--> tokens
        '----one small global picture----'

A canvas is a few tiles wide and high; the picture is scaled to fit it, the rest is padding. To g, each tile is a picture of
its own. Behind W the tiles' features are laid out as one large map, its padding is cut off again, and a learned vector,
`newline`, ends each of its rows; the features of the global picture stand in front. All of this is planned from the
picture's size, so the number of tokens is known before a pixel is read.

Dimension letters:  P pictures to encode, tiles and global ones   n tokens of each, (tile / patch)^2   D model width
"""
import math
from typing import NamedTuple

import torch
from PIL import Image


class Plan(NamedTuple):
    """Where a picture lies on its canvas, and which of the canvas's patches become tokens. Pairs are (width, height)."""
    canvas: tuple          # pixels
    scaled: tuple          # the picture's size on the canvas, pixels
    offset: tuple          # of its upper left corner, pixels
    grid: tuple            # (columns, rows) of tiles
    rows: range            # of the map, one row a patch: those left when the padding is cut off
    columns: range         # likewise
    pictures: int          # to encode: the tiles, and the global picture if there is one
    tokens: int            # n of the global picture + rows x (columns + 1)


class Tiling(NamedTuple):
    """One way to see pictures in tiles, as data: `tiling._asdict()` goes into JSON, and `Tiling(**json)` comes back."""
    pinpoints: tuple       # the canvases to choose from, (width, height) in pixels
    tile: int              # side of a tile, g's own size, pixels
    patch: int             # side of a patch of g, pixels
    background: tuple      # colour of the padding
    global_picture: str    # "stretched" to a square, "padded" to a square, or None for tiles alone
    rule: str              # "original" or "hf", see `anyres_plan`

    def plan(self, width, height):
        """The `Plan` of a picture of width x height pixels."""
        if self.global_picture not in ("stretched", "padded", None):
            raise ValueError(f"global_picture {self.global_picture!r}: pass 'stretched', 'padded' or None")
        return anyres_plan(width, height, self.pinpoints, self.tile, self.patch, self.rule, self.global_picture is not None)

    def at(self, tile, patch=14):
        """The same grids, in tiles for a g of another size."""
        pinpoints = tuple((w // self.tile * tile, h // self.tile * tile) for w, h in self.pinpoints)
        return self._replace(pinpoints=pinpoints, tile=tile, patch=patch)


MEAN_COLOUR = (122, 116, 104)            # OFFICIAL: int(255 x CLIP's mean), around what is padded: nearly 0 once normalised

# Diss. Sec. 4.7 has 2x2, 1x{2,3,4} and {2,3,4}x1 tiles. OFFICIAL: the released checkpoints' list, which we follow, ends at
# three tiles in a row. OFFICIAL: the global picture is squeezed into a square, and padding is black.
NEXT = Tiling(pinpoints=((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)), tile=336, patch=14,
              background=(0, 0, 0), global_picture="stretched", rule="original")

# Diss. Sec. 4.3: tiles of 224 pixels and a global picture, resized and padded, which the ablation leaves out (that is
# HD._replace(global_picture=None)). Neither code nor weights were released. OURS: all grids of up to six tiles, chosen,
# unpadded and merged as in NeXT; the padding has CLIP's mean colour, as in LLaVA-1.5.
HD = Tiling(pinpoints=tuple((224 * w, 224 * h) for w in range(1, 7) for h in range(1, 7) if w * h <= 6), tile=224, patch=14,
            background=MEAN_COLOUR, global_picture="padded", rule="original")


def anyres_plan(width, height, pinpoints, tile=336, patch=14, rule="original", global_picture=True):
    """The `Plan` of a picture of width x height pixels (Diss. Sec. 4.7).

    rule  "original": as the released code plans. "hf": as transformers does, for checkpoints trained or served with it;
          the two places where it differs are marked below.
    ValueError for a size below 1, for an unknown rule, and for pinpoints that do not fit the tile, or tiles the patch.

    With NeXT's pinpoints ("map" is rows x columns, 2928 tokens are the most):
      size          canvas       map      tokens  |  size          canvas       map      tokens
      1024 x 899    672 x 672    42 x 48  2634    |  1344 x 336    1008 x 336   18 x 72  1890
      640 x 480     672 x 672    36 x 48  2340    |  1008 x 336    1008 x 336   24 x 72  2328
      480 x 640     672 x 672    48 x 36  2352    |  336 x 1008    336 x 1008   72 x 24  2376
      672 x 672     672 x 672    48 x 48  2928    |  1920 x 1080   672 x 672    28 x 48  1948
      336 x 336     336 x 672    24 x 24  1176    |  300 x 200     336 x 672    16 x 24  976
      224 x 224     336 x 672    24 x 24  1176    |  55 x 176      336 x 672    48 x 14  1296
      500 x 375     672 x 672    36 x 48  2340    |
    """
    check(width, height, pinpoints, tile, patch, rule)
    # OFFICIAL: transformers reads the same list as (height, width). Its canvases are the same, but in another order, and the
    # earlier one wins a tie: a picture with both sides up to 336, or with proportions beyond 1008 : 1, of which no canvas
    # keeps a pixel, lies on 672 x 336, not on 336 x 672.
    canvases = [(w, h) if rule == "original" else (h, w) for w, h in pinpoints]

    def wasted(canvas):
        """To be minimal: first the pixels of the picture that are lost, then the pixels of the canvas that gain nothing."""
        scale = min(canvas[0] / width, canvas[1] / height)
        effective = min(int(width * scale) * int(height * scale), width * height)
        return width * height - effective, canvas[0] * canvas[1] - effective

    canvas = min(canvases, key=wasted)                                       # of equals the earlier
    scaled, offset = fitted(width, height, canvas)
    columns, rows = canvas[0] // patch, canvas[1] // patch
    # OFFICIAL: int() cuts 15.999999999999998 to 15; transformers rounds before it does. The map's kept part is computed anew
    # from the proportions, and as much is cut off on both sides: half a patch of padding can stay, or of picture be lost, at
    # each border. To tiles of two patches that is much.
    whole = int if rule == "original" else lambda x: int(round(x, 7))
    least = 0 if global_picture else 1                    # OURS: of tiles alone, a strip of 1 x 2000 would have no token left
    top = left = 0                                        # patches to cut off above and below, and on both sides
    if width / height > columns / rows:
        top = (rows - max(least, whole(height * (columns / width)))) // 2
    else:
        left = (columns - max(least, whole(width * (rows / height)))) // 2
    kept_rows, kept_columns = range(top, rows - top), range(left, columns - left)
    grid, base = (canvas[0] // tile, canvas[1] // tile), bool(global_picture)
    return Plan(canvas, scaled, offset, grid, kept_rows, kept_columns, pictures=base + grid[0] * grid[1],
                tokens=base * (tile // patch) ** 2 + len(kept_rows) * (len(kept_columns) + 1))


def check(width, height, pinpoints, tile, patch, rule):
    """ValueError for what cannot be planned."""
    if width < 1 or height < 1:
        raise ValueError(f"a picture of {width} x {height} pixels; both sides must be at least 1")
    if rule not in ("original", "hf"):
        raise ValueError(f"rule {rule!r}: pass 'original', or 'hf' for a checkpoint of transformers")
    if patch < 1 or tile < patch or tile % patch:
        raise ValueError(f"tile {tile}, patch {patch}: pass a tile that is a positive multiple of the patch, e.g. 336 and 14")
    if not pinpoints:
        raise ValueError(f"no pinpoints; pass (width, height) pairs in multiples of the tile, e.g. [({tile}, {2 * tile})]")
    for p in pinpoints:
        if not isinstance(p, tuple | list) or len(p) != 2 or any(not isinstance(x, int) or x < 1 or x % tile for x in p):
            raise ValueError(f"pinpoint {p!r} does not fit tiles of {tile} pixels; pass (width, height) pairs in positive "
                             f"multiples of {tile}, e.g. ({tile}, {2 * tile})")


def fitted(width, height, canvas):
    """(size, offset) of a picture that is scaled to fit a canvas, centred: one side fills it, the other is rounded up."""
    across, down = canvas[0] / width, canvas[1] / height
    if across < down:
        size = (canvas[0], min(math.ceil(height * across), canvas[1]))
    else:
        size = (min(math.ceil(width * down), canvas[0]), canvas[1])
    return size, ((canvas[0] - size[0]) // 2, (canvas[1] - size[1]) // 2)


def fit(image, canvas, background):
    """The picture on a canvas, padded (PIL)."""
    size, offset = fitted(*image.size, canvas)
    padded = Image.new("RGB", canvas, tuple(background))
    padded.paste(image.resize(size, Image.Resampling.BICUBIC), offset)
    return padded


def cut(image, tiling):
    """The pictures (PIL, tile x tile) that g encodes for one picture (PIL, RGB): the global one, then the tiles row by row.

    With rule "hf" and CLIP's normalisation, bit-equal to transformers' LlavaNextImageProcessorPil (tested).
    """
    plan, side = tiling.plan(*image.size), (tiling.tile, tiling.tile)
    pictures = []
    if tiling.global_picture == "stretched":
        pictures.append(image.resize(side, Image.Resampling.BICUBIC))
    elif tiling.global_picture == "padded":
        pictures.append(fit(image, side, tiling.background))
    canvas = fit(image, plan.canvas, tiling.background)
    for y in range(0, plan.canvas[1], tiling.tile):
        pictures += [canvas.crop((x, y, x + side[0], y + side[1])) for x in range(0, plan.canvas[0], tiling.tile)]
    return pictures


def merge(features, plans, newline, tiling):
    """What the language model sees of each picture: a list of (plan.tokens, D), from features behind W (Diss. Sec. 4.7).

    features (P, n, D) of all that `cut` made, picture after picture; plans: one a picture; newline (D,) ends each row.
    OFFICIAL: the global picture's rows are not ended. No plans give [], which carries no graph: in a batch of text alone, add
    `newline[None][:0]` to what is concatenated, so that no rank waits for its gradient.
    Equal to transformers' LlavaNextModel.pack_image_features with rule "hf" (tested).
    """
    n, counts = tiling.tile // tiling.patch, [plan.pictures for plan in plans]
    assert features.shape[:2] == (sum(counts), n * n), (
        f"features {tuple(features.shape)} for {len(plans)} pictures in {sum(counts)} parts of {n * n} tokens")
    merged = []
    for plan, parts in zip(plans, features.split(counts)):
        columns, rows = plan.grid
        first = plan.pictures - rows * columns                               # 1 if there is a global picture
        tiles = parts[first:].unflatten(0, (rows, columns)).unflatten(2, (n, n))    # (rows, columns, n, n, D)
        whole = tiles.transpose(1, 2).flatten(2, 3).flatten(0, 1)            # (rows n, columns n, D)  one large map
        kept = whole[plan.rows.start:plan.rows.stop, plan.columns.start:plan.columns.stop]
        ends = newline.to(kept.dtype).expand(len(kept), 1, -1)
        merged.append(torch.cat([parts[:first].flatten(0, 1), torch.cat([kept, ends], 1).flatten(0, 1)]))
    return merged


def draw(image, tiling, path):
    """Draw how a picture (PIL, RGB) is seen: the global picture, the canvas with its tiles, numbered as `cut` orders them,
    what is cut off (hatched) and where rows end. `path` is a file for matplotlib, .png or .svg. Returns the caption."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import Rectangle

    plan, (w, h), pictures = tiling.plan(*image.size), image.size, cut(image, tiling)
    tile, patch, (wide, high) = tiling.tile, tiling.patch, plan.canvas
    base = plan.pictures - plan.grid[0] * plan.grid[1]
    places = [(-1.2 * tile, (high - tile) / 2)] * base                       # of each picture's upper left corner
    places += [(x, y) for y in range(0, high, tile) for x in range(0, wide, tile)]
    kept = [plan.columns.start * patch, plan.rows.start * patch, plan.columns.stop * patch, plan.rows.stop * patch]
    lines = [f"{w} x {h} pixels, scaled to {plan.scaled[0]} x {plan.scaled[1]} on a canvas of {wide} x {high}: "
             f"{plan.grid[0]} x {plan.grid[1]} tiles of {tile}",
             f"{(tile // patch) ** 2} (global picture) + " * base +
             f"{len(plan.rows)} rows x ({len(plan.columns)} + 1 row end) = {plan.tokens:,} tokens",
             "hatched: cut off before the language model sees it; orange: row ends"]

    left = places[0][0]
    inches = 9 / max(wide - left, high)
    figure = plt.figure(figsize=((wide - left) * inches, high * inches))
    axes = figure.add_axes((0, 0, 1, 1))
    for picture, (x, y) in zip(pictures, places):
        axes.imshow(picture, extent=(x, x + tile, y + tile, y))
    for x0, y0, x1, y1 in ((0, 0, wide, kept[1]), (0, kept[3], wide, high), (0, 0, kept[0], high), (kept[2], 0, wide, high)):
        axes.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, facecolor="#e8e8e8cc", edgecolor="#888888", hatch="///", lw=0))
    for row in plan.rows:
        axes.add_patch(Rectangle((kept[2], row * patch), patch, patch, facecolor="orange", edgecolor="white", lw=0.4))
    for number, (x, y) in enumerate(places):
        axes.add_patch(Rectangle((x, y), tile, tile, fill=False, edgecolor="white", lw=3))
        axes.add_patch(Rectangle((x, y), tile, tile, fill=False, edgecolor="crimson", lw=1.4))
        axes.text(x + tile / 16, y + tile / 16, str(number), va="top", color="white", weight="bold", size=12,
                  bbox={"facecolor": "crimson", "edgecolor": "none", "boxstyle": "round,pad=0.25"})
    axes.set(xlim=(left - tile / 60, wide + patch), ylim=(high + tile / 60, -tile / 60))
    axes.axis("off")
    figure.text(0.5, -0.02, "\n".join(lines), ha="center", va="top", size=11, linespacing=1.5)
    figure.savefig(path, dpi=110, bbox_inches="tight", pad_inches=0.2)
    plt.close(figure)
    return "\n".join(lines)
