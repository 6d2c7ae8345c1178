"""
What a picture is to the model: read, cut to squares of CLIP's size, normalised (Sec. 4.1; Diss. Sec. 4.3, 4.7).

    file --load_image--> picture --View.squares--> squares --preprocess--> X_v

    crop      its middle, one square                            the paper; stage 1 of LLaVA-1.5
    pad       all of it, with grey beside it, one square        LLaVA-1.5
    anyres    in tiles, and squeezed into one square            LLaVA-NeXT: tiles.py
    hd        in tiles, and padded to one square                LLaVA-1.5-HD: tiles.py
"""
import struct
import warnings
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

import tiles
from records import header_size, image_path

ASPECTS = ("crop", "pad", "anyres", "hd")
CLIP_MEAN = np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
CLIP_STD = np.array([0.26862954, 0.26130258, 0.27577711], np.float32)
MAX_RESIZED = 2 ** 26      # pixels; beyond it only the part that the crop keeps is resized
warnings.simplefilter("ignore", Image.DecompressionBombWarning)   # twice Pillow's limit (179 megapixels) is an error


# What Pillow's decoders raise; the last four for damaged EXIF blocks, AVIF, DDS and JPEG 2000 files.
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError, struct.error, TypeError, RuntimeError,
              MemoryError)


def load_image(source, name=None):
    """A picture (path or file object, called `name` in errors) as RGB, upright. ValueError for what is no picture,
    is cut off, or is far too large.

    OURS: the EXIF orientation is applied; the official code shows such pictures to the model lying on their side.
    Grey, palette, RGBA and CMYK go through Pillow's convert("RGB"), as in the official code.
    """
    try:
        with Image.open(source) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except FileNotFoundError:
        raise
    except UNREADABLE as error:
        why = "its form is not known" if isinstance(error, UnidentifiedImageError) else error     # Pillow's names the object
        raise ValueError(f"{name or source}: not a readable picture ({why})") from error


ABSENT = "image {!r} is not in {}"


def picture_problem(folder, name):
    """What is wrong with a picture, or None. It is decoded to its end, in the smallest size that its format offers."""
    try:
        with Image.open(image_path(folder, name)) as image:
            image.draft(image.mode, (1, 1))
            ImageOps.exif_transpose(image).convert("RGB")                   # as in load_image
    except FileNotFoundError:
        return ABSENT.format(name, folder)
    except UNREADABLE as error:
        return f"image {name!r}: {error}"
    return None


def picture_size(path):
    """(width, height) of a picture as `load_image` shows it, from its header. ValueError for what is no picture."""
    try:
        return header_size(path)
    except UNREADABLE as error:
        raise ValueError(f"{path}: not a readable picture ({error})") from error


def preprocess(image, size):
    """X_v: shortest edge to `size` (bicubic), centre crop, CLIP's mean and deviation. (3, size, size) float32.

    Bit-equal to transformers' CLIPImageProcessorPil (tested).
    """
    w, h = image.size
    short = min(w, h)
    new_w, new_h = int(size * w / short), int(size * h / short)
    left, top = (new_w - size) // 2, (new_h - size) // 2
    if new_w * new_h <= MAX_RESIZED:
        image = image.resize((new_w, new_h), Image.Resampling.BICUBIC).crop((left, top, left + size, top + size))
    else:                  # 1 x 2000 pixels would become 224 x 448,000: resize what is kept, equal up to rounding
        sx, sy = w / new_w, h / new_h
        y = max(0, int(top * sy) - 8)                                      # the rows that the kept ones depend on
        image = image.crop((0, y, w, min(h, y + int(size * sy) + 17)))
        for new, box in (((size, image.height), (left * sx, 0, (left + size) * sx, image.height)),   # columns, then rows:
                         ((size, size), (0, top * sy - y, size, (top + size) * sy - y))):            # Pillow's own order
            image = image.resize(new, Image.Resampling.BICUBIC, box=box)
    x = (np.asarray(image, np.float32) / 255 - CLIP_MEAN) / CLIP_STD      # (size, size, 3)
    return torch.from_numpy(x).permute(2, 0, 1).contiguous()             # (3, size, size)


class View(NamedTuple):
    """How the model looks at a picture: which squares g encodes of it, and how many visual tokens that gives."""
    aspect: str            # one of ASPECTS
    size: int              # side of a square in pixels: g's own
    patch: int             # side of a patch of g in pixels
    tiling: tiles.Tiling = None          # of anyres and hd

    @property
    def N(self):
        """Visual tokens of one square: 256 for ViT-L/14 at 224 px."""
        return (self.size // self.patch) ** 2

    def tokens(self, width, height):
        """Visual tokens of a picture of width x height pixels; one number for all pictures, but for tiles."""
        return self.tiling.plan(width, height).tokens if self.tiling else self.N

    def n_squares(self, width, height):
        """How many squares g encodes of a picture of width x height pixels."""
        return self.tiling.plan(width, height).pictures if self.tiling else 1

    @property
    def flags(self):
        """What `view_of` takes, beside the sizes, to make such a view."""
        anyres, whole = (self.tiling.rule, self.tiling.global_picture is not None) if self.tiling else ("original", True)
        return {"aspect": self.aspect, "anyres": anyres, "global_picture": whole}

    @property
    def said(self):
        """What a picture costs, for people."""
        if not self.tiling:
            return f"one image = {self.N}"
        return f"one image = at most {max(self.tiling.plan(*canvas).tokens for canvas in self.tiling.pinpoints)}"

    def squares(self, picture):
        """The PIL pictures that g encodes for one."""
        if self.tiling:
            return tiles.cut(picture, self.tiling)
        if self.aspect == "pad":
            side = max(picture.size) if max(picture.size) ** 2 <= MAX_RESIZED else self.size
            return [tiles.fit(picture, (side, side), tiles.MEAN_COLOUR)]
        return [picture]

    def X_v(self, pictures):
        """Pictures to (their squares together, 3, size, size); no picture gives (0, 3, size, size)."""
        squares = [preprocess(square, self.size) for picture in pictures for square in self.squares(picture)]
        return torch.stack(squares) if squares else torch.zeros(0, 3, self.size, self.size)


def view_of(aspect, size, patch, anyres="original", global_picture=True):
    """The `View` of an aspect for a g of that size. `anyres`: its rule (tiles.py); without `global_picture`: hd's ablation."""
    if aspect not in ASPECTS:
        raise ValueError(f"aspect {aspect!r}: it is one of {', '.join(ASPECTS)}")
    if not global_picture and aspect != "hd":
        raise ValueError(f"--no-global_picture leaves the global picture of aspect hd out; the aspect is {aspect}")
    if anyres != "original" and aspect != "anyres":
        raise ValueError(f"--anyres {anyres} is a rule of aspect anyres; the aspect is {aspect}")
    if aspect == "anyres":
        return View(aspect, size, patch, tiles.NEXT.at(size, patch)._replace(rule=anyres))
    if aspect == "hd":
        tiling = tiles.HD.at(size, patch)
        return View(aspect, size, patch, tiling if global_picture else tiling._replace(global_picture=None))
    return View(aspect, size, patch)
