"""
From a picture to X_v: how it is seen, as one square or in tiles, and g's own preprocessing.

    picture --View.squares--> squares of g's size --preprocess--> X_v (squares, 3, S, S)
"""
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from parts import tiles

TILINGS = {
    "anyres": tiles.NEXT,
    "anyres_hf": tiles.NEXT._replace(rule="hf"),         # as transformers tiles, where it differs
    "anyres_4": tiles.NEXT._replace(pinpoints=tiles.UP_TO_FOUR),
    "hd": tiles.HD,
    # COURSE: tiles without the picture of the whole (Diss. Sec. 4.4)
    "hd_tiles": tiles.HD._replace(global_picture=None),
    "hd_448": tiles.HD._replace(pinpoints=((448, 448),)),    # each picture in 2 x 2 tiles
}
ASPECTS = ("crop", "squeeze", "pad", *TILINGS)
MAX_PADDED = 8192                        # pixels; a larger picture shrinks when it is padded


class Pixels(NamedTuple):
    """How g knows pixels: by which filter they are resized, and as what numbers."""
    mean: tuple                          # of each colour, 0 to 1
    std: tuple
    resample: int = Image.Resampling.BICUBIC

    @property
    def mean_colour(self):
        """Nearly 0 once normalised; in whole numbers."""
        return tuple(int(255 * value) for value in self.mean)


CLIP_PIXELS = Pixels(mean=(0.48145466, 0.4578275, 0.40821073),
                     std=(0.26862954, 0.26130258, 0.27577711))


def pixels_from(meta):
    """The Pixels that a checkpoint records; CLIP's if it says nothing. ValueError if none can be
    used so."""
    if "pixels" not in meta:
        return CLIP_PIXELS
    pixels = Pixels(**meta["pixels"])
    colours = np.array([pixels.mean, pixels.std], np.float32)
    if colours.shape != (2, 3) or not (colours[1] > 0).all():
        raise ValueError(f"{pixels}: mean and std are three numbers each, of which std is above 0")
    return pixels._replace(resample=Image.Resampling(pixels.resample))


def preprocess(image, size, pixels=CLIP_PIXELS):
    """One square of X_v, (3, S, S): shortest edge to `size`, centre crop, g's normalisation.

    Bit-equal to transformers' CLIPImageProcessorPil, which a test says.
    """
    short = min(image.size)
    width, height = (int(size * side / short) for side in image.size)
    left, top = (width - size) // 2, (height - size) // 2
    image = image.resize((width, height), pixels.resample)
    image = image.crop((left, top, left + size, top + size))
    mean, std = np.array([pixels.mean, pixels.std], np.float32)
    x = (np.asarray(image, np.float32) / 255 - mean) / std               # (S, S, 3)
    return torch.from_numpy(x).permute(2, 0, 1).contiguous()             # (3, S, S)


class View(NamedTuple):
    """How a picture is seen: which squares g encodes of it, and where their tokens go.

    crop        its middle, one square                          the paper; stage 1 of LLaVA-1.5
    squeeze     all of it, stretched to one square              SigLIP's own
    pad         all of it, with grey beside it, one square      OFFICIAL: LLaVA-1.5
    anyres      in tiles, and squeezed into one square          LLaVA-NeXT (parts/tiles.py)
    hd          in tiles, and padded to one square              LLaVA-1.5-HD
    """
    aspect: str
    size: int        # S, the side of a square in pixels: g's own
    patch: int       # the side of a patch of g in pixels
    tiling: tiles.Tiling = None          # of anyres and hd
    pixels: Pixels = CLIP_PIXELS

    @property
    def N(self):
        """Visual tokens of one square: 256 for ViT-L/14 at 224 px."""
        return (self.size // self.patch) ** 2

    @property
    def meta(self):
        """What a checkpoint records of the view."""
        tiling = self.tiling and {"pinpoints": self.tiling.pinpoints}
        return {"aspect": self.aspect, "tiling": tiling, "pixels": self.pixels._asdict()}

    @property
    def cost(self):
        """What a picture costs, for people."""
        if self.tiling is None:
            return f"{self.aspect}: one image = {self.N}"
        most = max(self.tokens(*canvas) for canvas in self.tiling.pinpoints)
        return f"{self.aspect}: one image = at most {most}"

    def squares(self, picture):
        """The pictures (PIL) that g encodes for one."""
        resample = self.pixels.resample
        if self.tiling:
            return tiles.cut_tiles(picture, self.tiling, resample)
        if self.aspect == "squeeze":
            return [picture.resize((self.size, self.size), resample)]
        if self.aspect == "pad":
            side = min(max(picture.size), MAX_PADDED)
            return [tiles.fit(picture, (side, side), self.pixels.mean_colour, resample)]
        return [picture]

    def X_v(self, picture):
        squares = self.squares(picture)
        return torch.stack([preprocess(square, self.size, self.pixels) for square in squares])

    def index(self, width, height):
        """Which row of its squares' features, flattened, each visual token of a picture is."""
        if self.tiling:
            return tiles.tile_index(self.tiling.plan(width, height), self.tiling)
        return torch.arange(self.N)

    def tokens(self, width, height):
        """Visual tokens of a picture of width x height pixels; it differs only between tilings."""
        return self.tiling.plan(width, height).tokens if self.tiling else self.N


def view_of(aspect, size=None, patch=14, pixels=CLIP_PIXELS):
    """The View of an aspect for a g of that size; by default that of CLIP in the text's system."""
    if size is None:
        size = 224 if aspect == "crop" or aspect.startswith("hd") else 336
    tiling = TILINGS.get(aspect)
    if tiling:
        tiling = tiling.at(size, patch)
        if aspect.startswith("hd"):
            tiling = tiling._replace(background=pixels.mean_colour)
    return View(aspect, size, patch, tiling, pixels)


def view_from(meta, vision_config):
    """The View that a checkpoint records, with its own canvases. `vision_config` is its g's."""
    size, patch = vision_config.image_size, vision_config.patch_size
    view = view_of(meta["aspect"], size, patch, pixels_from(meta))
    if meta.get("tiling"):
        tiling = view.tiling._replace(pinpoints=meta["tiling"]["pinpoints"])
        view = view._replace(tiling=tiling)
    return view


def set_view(model, aspect):
    """Let a model.LLaVA see pictures in another way, and return the View.

    aspect    one of ASPECTS; "auto": as it sees them already, which for a new model is as g does. A
              checkpoint that sees them in this way already keeps the canvases that it has.
    """
    config = model.g.config
    if aspect not in ("auto", model.meta.get("aspect")):
        pixels = pixels_from(model.meta)
        model.meta |= view_of(aspect, config.image_size, config.patch_size, pixels).meta
    view = view_from(model.meta, config)
    if view.tiling is None:
        model.newline = None
    elif model.newline is None:
        model.add_newline()
    return view
