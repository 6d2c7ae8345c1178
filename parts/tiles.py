"""
A picture in tiles: how LLaVA-NeXT ("anyres", Diss. Sec. 4.7) and LLaVA-1.5-HD (Diss. Sec. 4.3) see
details for which one square of g's size has no pixels.

    picture --fit--> canvas --cut_tiles--> squares --g, W--> features --tile_index--> tokens
        '----one small global picture---------'

A canvas is a few tiles wide and high. The picture is scaled to fit it, the rest is padding. To g,
each tile is a picture of its own. Behind W the tiles' features form one large map, a feature a
patch. Its padding is cut off again, and a learned vector, `newline`, ends each of its rows; the
features of the global picture stand in front. All of this is planned from the picture's size, so
the number of tokens is known before a pixel is read.
"""
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image

NEWLINE = -1                     # in `tile_index`: no feature, but the vector that ends a row


class Plan(NamedTuple):
    """Where a picture lies on its canvas, and which patches of the canvas become tokens.

    Pairs are (width, height).
    """
    canvas: tuple          # pixels
    scaled: tuple          # the picture's size on the canvas, pixels
    offset: tuple          # of its upper left corner, pixels
    grid: tuple            # (columns, rows) of tiles
    rows: range            # rows of the map, in patches, that are left without the padding
    columns: range         # columns likewise
    pictures: int          # squares that g encodes: the tiles, and the global picture if any
    tokens: int            # (tile / patch)^2 of the global picture + rows x (columns + 1)


class Tiling(NamedTuple):
    """One way to see pictures in tiles, as data. Of it a checkpoint records the pinpoints."""
    pinpoints: tuple       # the canvases to choose from, (width, height) in pixels
    tile: int              # side of a tile, g's own size, pixels
    patch: int             # side of a patch of g, pixels
    background: tuple      # colour of the padding
    global_picture: str    # "stretched" to a square, "padded" to a square, or None: tiles alone
    rule: str              # "original" as the released code plans, or "hf" as transformers does

    def plan(self, width, height):
        """The `Plan` of a picture of width x height pixels (Diss. Sec. 4.7).

        Rule "hf" is for checkpoints that were trained, or are served, with transformers; the two
        places where it differs are marked below.

        With NeXT's pinpoints ("map" is rows x columns; 2928 tokens are the most):
          size          canvas       map      tokens  |  size          canvas       map      tokens
          1024 x 899    672 x 672    42 x 48  2634    |  1344 x 336    1008 x 336   18 x 72  1890
          640 x 480     672 x 672    36 x 48  2340    |  1008 x 336    1008 x 336   24 x 72  2328
          480 x 640     672 x 672    48 x 36  2352    |  336 x 1008    336 x 1008   72 x 24  2376
          672 x 672     672 x 672    48 x 48  2928    |  1920 x 1080   672 x 672    28 x 48  1948
          336 x 336     336 x 672    24 x 24  1176    |  300 x 200     336 x 672    16 x 24  976
          224 x 224     336 x 672    24 x 24  1176    |  55 x 176      336 x 672    48 x 14  1296
          500 x 375     672 x 672    36 x 48  2340    |
        """
        canvas = self.choose_canvas(width, height)
        scaled, offset = fitted(width, height, canvas)
        grid = (canvas[0] // self.tile, canvas[1] // self.tile)
        n = self.tile // self.patch
        n_columns = grid[0] * n
        n_rows = grid[1] * n

        # What is left of the map is computed from the proportions alone, and as much is cut off on
        # both sides: half a patch of padding can stay, or of the picture be lost, at each border.
        top = 0            # rows to cut off above, and again below
        left = 0           # columns to cut off on each side
        if width / height > n_columns / n_rows:
            top = (n_rows - self.count_patches(height * (n_columns / width))) // 2
        else:
            left = (n_columns - self.count_patches(width * (n_rows / height))) // 2
        rows = range(top, n_rows - top)
        columns = range(left, n_columns - left)

        pictures = grid[0] * grid[1]
        tokens = len(rows) * (len(columns) + 1)
        if self.global_picture:
            pictures += 1
            tokens += n * n
        return Plan(canvas, scaled, offset, grid, rows, columns, pictures, tokens)

    def choose_canvas(self, width, height):
        """The canvas that keeps most of the picture; of equals the smallest, then the first."""
        canvases = self.pinpoints
        if self.rule == "hf":
            # OFFICIAL: transformers reads the same list as (height, width). Its canvases are the
            # same in another order, and the earlier one wins a tie: a picture with both sides up to
            # 336, or with proportions beyond 1008 : 1, lies on 672 x 336, not on 336 x 672.
            canvases = [(w, h) for h, w in self.pinpoints]

        def gain(canvas):
            """To be maximal: the picture's pixels that are kept, then the canvas as small."""
            scale = min(canvas[0] / width, canvas[1] / height)
            effective = min(int(width * scale) * int(height * scale), width * height)
            return effective, -canvas[0] * canvas[1]

        return tuple(max(canvases, key=gain))

    def count_patches(self, length):
        """How many rows or columns of patches a length in patches fills."""
        if self.rule == "hf":
            # OFFICIAL: int() cuts 15.999999999999998 to 15; transformers rounds before it does.
            length = round(length, 7)
        # OURS: of tiles alone, a strip of 1 x 2000 pixels would have no token left.
        least = 0 if self.global_picture else 1
        return max(least, int(length))

    def at(self, tile, patch=14):
        """The same grids, in tiles for a g of another size."""
        pinpoints = tuple((w // self.tile * tile, h // self.tile * tile) for w, h in self.pinpoints)
        return self._replace(pinpoints=pinpoints, tile=tile, patch=patch)


# Diss. Sec. 4.7 has 2x2, 1x{2,3,4} and {2,3,4}x1 tiles. OFFICIAL: the released checkpoints' list,
# which we follow, ends at three tiles in a row. OFFICIAL: the global picture is squeezed into a
# square, and padding is black.
NEXT = Tiling(
    pinpoints=((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)),
    tile=336,
    patch=14,
    background=(0, 0, 0),
    global_picture="stretched",
    rule="original")

# The grids of Diss. Sec. 4.7 itself.
UP_TO_FOUR = ((672, 672), (336, 672), (336, 1008), (336, 1344), (672, 336), (1008, 336),
              (1344, 336))

# Diss. Sec. 4.3: tiles of 224 pixels and a global picture, resized and padded, which the ablation
# leaves out (HD._replace(global_picture=None)). Neither code nor weights were released. OURS: all
# grids of up to six tiles, chosen and unpadded as in NeXT; padded with CLIP's mean, as LLaVA-1.5.
HD = NEXT._replace(
    pinpoints=tuple((224 * w, 224 * h) for w in range(1, 7) for h in range(1, 7) if w * h <= 6),
    tile=224,
    background=(122, 116, 104),      # OFFICIAL: int(255 x CLIP's mean); nearly 0 once normalised
    global_picture="padded")


def check_pinpoints(tiling):
    """Raises ValueError unless the canvases, which a person may write, are made of whole tiles."""
    sides = [side for pinpoint in tiling.pinpoints for side in pinpoint]
    if not sides or any(side <= 0 or side % tiling.tile for side in sides):
        raise ValueError(f"pinpoints {tiling.pinpoints} are no (width, height) pairs in multiples "
                         f"of {tiling.tile} pixels, the side of a tile")


def fitted(width, height, canvas):
    """(size, offset) of a picture that is scaled to fit a canvas and centred.

    One side fills the canvas, the other is rounded up.
    """
    scale = min(canvas[0] / width, canvas[1] / height)
    scaled_width = min(math.ceil(width * scale), canvas[0])
    scaled_height = min(math.ceil(height * scale), canvas[1])
    offset = ((canvas[0] - scaled_width) // 2, (canvas[1] - scaled_height) // 2)
    return (scaled_width, scaled_height), offset


def fit(image, canvas, background, resample=Image.Resampling.BICUBIC):
    """The picture (PIL, RGB) scaled and centred on a canvas of that size and colour."""
    size, offset = fitted(*image.size, canvas)
    padded = Image.new("RGB", canvas, tuple(background))
    padded.paste(image.resize(size, resample), offset)
    return padded


def cut_tiles(image, tiling, resample=Image.Resampling.BICUBIC):
    """The squares (PIL, tile x tile) that g encodes of one picture (PIL, RGB).

    The global picture comes first, then the tiles row by row. With rule "hf" and g's
    normalisation they are bit-equal to those of transformers' LlavaNextImageProcessorPil.
    """
    plan = tiling.plan(*image.size)
    side = tiling.tile
    squares = []
    if tiling.global_picture == "stretched":
        squares.append(image.resize((side, side), resample))
    elif tiling.global_picture == "padded":
        squares.append(fit(image, (side, side), tiling.background, resample))
    canvas = fit(image, plan.canvas, tiling.background, resample)
    for y in range(0, plan.canvas[1], side):
        for x in range(0, plan.canvas[0], side):
            squares.append(canvas.crop((x, y, x + side, y + side)))
    return squares


def tile_index(plan, tiling):
    """Which feature each visual token of one picture is, (plan.tokens,) int64.

    A number is a row of the features behind W of all squares of `cut_tiles`, flattened from
    (plan.pictures, n x n, D) to (plan.pictures n n, D) with n = tile / patch; NEWLINE ends a row.
    OFFICIAL: the global picture's rows are not ended. With rule "hf" it is what transformers'
    LlavaNextModel.pack_image_features does.
    """
    n = tiling.tile // tiling.patch
    columns, rows = plan.grid
    n_global = (plan.pictures - rows * columns) * n * n
    index = torch.arange(plan.pictures * n * n)
    tiles = index[n_global:].view(rows, columns, n, n)
    patches = tiles.transpose(1, 2).reshape(rows * n, columns * n)       # one large map
    patches = patches[plan.rows.start:plan.rows.stop, plan.columns.start:plan.columns.stop]
    lines = F.pad(patches, (0, 1), value=NEWLINE)                        # a newline ends each row
    return torch.cat([index[:n_global], lines.flatten()])                # (tokens,)
