"""A picture in tiles: LLaVA-NeXT's anyres (Diss. Sec. 4.7) and LLaVA-1.5-HD (Diss. Sec. 4.3)."""
import random
import re

import numpy as np
import pytest
import torch
from conftest import byte_tokenizer, noise, tiny_clip, tiny_llm
from PIL import Image
from transformers import (
    LlavaNextConfig,
    LlavaNextImageProcessorPil,
    LlavaNextModel,
    LlavaNextProcessor,
)
from transformers.image_processing_utils import select_best_resolution

from parts.tiles import HD, NEWLINE, NEXT, Tiling, cut_tiles, tile_index
from parts.views import CLIP_PIXELS, preprocess, view_of

HF = NEXT._replace(rule="hf")
ALONE = HD._replace(global_picture=None)          # the ablation: tiles without a global picture
TILINGS = pytest.mark.parametrize("tiling", [NEXT, HF, HD, ALONE, NEXT.at(28)],
                                  ids=["NEXT", "HF", "HD", "ALONE", "toy"])
# Where int() and int(round(x, 7)) differ: 16 patches to the one, 15.999999999999998 to the other.
ROUNDED = [(55, 176), (110, 352), (88, 55), (205, 984), (396, 704), (748, 352), (987, 376)]
STRIPS = [(1, 1), (1, 5000), (5000, 1), (3, 2000), (20000, 3), (2, 1), (337, 336)]


def sizes(count, seed=0):
    """Random (width, height): all proportions, small and large, some of them extreme."""
    rng = random.Random(seed)
    found = [(rng.randint(1, 1500), rng.randint(1, 1500)) for _ in range(count)]
    found += [(int(2 ** rng.uniform(0, 13)), int(2 ** rng.uniform(0, 13))) for _ in range(count)]
    return found + ROUNDED + STRIPS


def processor_of(tiling):
    """transformers' image processor, with pinpoints that give both rules the same canvases."""
    pinpoints = [list(p)[::-1] if tiling.rule == "original" else list(p) for p in tiling.pinpoints]
    return LlavaNextImageProcessorPil(
        size={"shortest_edge": tiling.tile}, image_grid_pinpoints=pinpoints,
        crop_size={"height": tiling.tile, "width": tiling.tile})


@pytest.mark.parametrize("rule", ["hf", "original"])
def test_a_plan_has_as_many_tokens_as_transformers_writes_placeholders(rule):
    """For random sizes. With the original's rule all but those that floating point misses."""
    tiling = NEXT._replace(rule=rule)
    processor = LlavaNextProcessor(
        processor_of(tiling), byte_tokenizer(), patch_size=14,
        num_additional_image_tokens=1, vision_feature_select_strategy="default")
    todo = sizes(1000)
    swapped = [(h, w) for w, h in todo]
    counts = processor._get_num_multimodal_tokens(image_sizes=swapped)["num_image_tokens"]
    missed = {size for size, count in zip(todo, counts, strict=True)
              if tiling.plan(*size).tokens != count}
    if rule == "hf":
        assert not missed
    else:
        assert set(ROUNDED) <= missed, "the released code cuts with int(), transformers rounds"
        assert len(missed) < 20


def test_the_tokens_of_everyday_pictures_are_those_of_the_docstring():
    """Diss. Sec. 4.7, measured on the released code; and what changes if transformers serves it."""
    cells = re.findall(r"(\d+) x (\d+) +(\d+) x (\d+) +(\d+) x (\d+) +(\d+)", Tiling.plan.__doc__)
    assert len(cells) == 13
    for width, height, *want in [map(int, row) for row in cells]:
        plan = NEXT.plan(width, height)
        assert [*plan.canvas, len(plan.rows), len(plan.columns), plan.tokens] == want
    for size, tokens, why in (((110, 352), 1392, "rounding"), ((300, 200), 1464, "a tie"),
                              ((55, 176), 792, "both"), ((640, 480), 2340, "neither")):
        assert HF.plan(*size).tokens == tokens, why


def test_the_canvas_is_chosen_as_in_transformers_from_any_list():
    """Most of the picture, then least of the canvas, then the earlier."""
    rng = random.Random(0)
    for w, h in sizes(500, seed=3):
        pinpoints = [(336 * rng.randint(1, 4), 336 * rng.randint(1, 4))
                     for _ in range(rng.randint(1, 8))]
        want = tuple(select_best_resolution((h, w), pinpoints))[::-1]
        assert HF._replace(pinpoints=pinpoints).plan(w, h).canvas == want
        turned = [(b, a) for a, b in pinpoints]
        assert NEXT._replace(pinpoints=turned).plan(w, h).canvas == want


def test_HD_has_up_to_six_tiles_and_a_global_picture_that_the_ablation_leaves_out():
    """Diss. Sec. 4.3: 13B at 448 x 448 with 224-pixel tiles; tiles alone against tiles with it."""
    assert len(HD.pinpoints) == 14 and max(w * h for w, h in HD.pinpoints) == 6 * 224 ** 2
    plan = HD.plan(448, 448)
    assert (plan.grid, plan.tokens, ALONE.plan(448, 448).tokens) == ((2, 2), 256 + 1056, 1056)
    for size in sizes(300):
        both, alone = HD.plan(*size), ALONE.plan(*size)
        assert both.pictures == alone.pictures + 1 == both.grid[0] * both.grid[1] + 1 <= 7


@TILINGS
def test_what_remains_is_the_picture_up_to_half_a_patch(tiling):
    """Unpadding: half a patch and one pixel of rounding at each border; a patch for thin strips."""
    for size in sizes(200):
        plan = tiling.plan(*size)
        assert plan.tokens > 0, f"{size} would have no token at all"
        sides = zip((plan.columns, plan.rows), plan.offset, plan.scaled, strict=True)
        for patches, at, length in sides:
            limit = 16 if tiling == ALONE and len(patches) <= 2 else 8
            assert abs(patches.start * 14 - at) <= limit, f"{size}: {plan}"
            assert abs(patches.stop * 14 - at - length) <= limit, f"{size}: {plan}"


def test_a_tiling_scales_to_another_tile():
    """The toy's tiles have 28 pixels, and SigLIP's patches 16."""
    assert NEXT.at(28).pinpoints == ((28, 56), (56, 28), (56, 56), (84, 28), (28, 84))
    assert NEXT.at(336) == NEXT and NEXT.at(32, patch=16).plan(64, 64).tokens == 4 + 4 * 5


# -----------------------------------------------------------------------------
# The pixels


@pytest.mark.parametrize("rule, side", [("hf", 336), ("original", 336), ("hf", 28)])
def test_pixels_are_those_of_transformers(rule, side):
    """Bit for bit what LlavaNextImageProcessorPil makes, at 336 pixels and at the toy's 28."""
    tiling = NEXT.at(side)._replace(rule=rule)
    processor = processor_of(tiling)
    rng = random.Random(rule)
    shapes = [(rng.randint(4, 900), rng.randint(4, 900)) for _ in range(6)]
    for w, h in [(5, 1500), (1500, 7), (side, side), (110, 352), *shapes]:
        want = torch.as_tensor(np.asarray(processor(noise((w, h)))["pixel_values"][0]))
        got = torch.stack([preprocess(square, side) for square in cut_tiles(noise((w, h)), tiling)])
        assert torch.equal(got, want), f"{w} x {h}: g sees other pixels"


def test_the_background_of_HD_is_clips_mean_and_its_global_picture_is_not_distorted():
    """Diss. Sec. 4.3: as LLaVA-1.5's padding; a circle stays one. NeXT's is black, and squeezed."""
    assert HD.background == CLIP_PIXELS.mean_colour
    green = Image.new("RGB", (600, 300), (0, 255, 0))
    first, *tiles = (np.asarray(square) for square in cut_tiles(green, HD))
    assert (first[:56] == HD.background).all() and (first[-56:] == HD.background).all()
    assert (first[56:-56] == (0, 255, 0)).all()
    alone = [np.asarray(square) for square in cut_tiles(green, ALONE)]
    assert np.array_equal(tiles, alone)
    squeezed, tile, *_ = (np.asarray(p) for p in cut_tiles(green.resize((640, 480)), NEXT))
    assert (squeezed == (0, 255, 0)).all() and (tile[:84] == 0).all()


# -----------------------------------------------------------------------------
# From features to tokens


def tokens_of(features, plan, newline, tiling):
    """What `LLaVA.splice` does with the index: features (pictures, n x n, D) to (tokens, D)."""
    return torch.cat([features.flatten(0, 1), newline[None]])[tile_index(plan, tiling)]


def test_tokens_are_those_of_transformers():
    """LlavaNextModel.pack_image_features: the global picture first, a newline behind every row."""
    config = LlavaNextConfig(
        vision_config=tiny_clip(336).config.to_dict(), text_config=tiny_llm().config.to_dict(),
        image_grid_pinpoints=[list(p) for p in HF.pinpoints], image_token_index=259)
    model = LlavaNextModel(config)
    todo = [(640, 480), (480, 640), (336, 336), (672, 672), (1500, 300), *sizes(8)]
    plans = [HF.plan(*size) for size in todo]
    features = [torch.randn(plan.pictures, 576, 48) for plan in plans]
    swapped = [(h, w) for w, h in todo]
    want, lengths = model.pack_image_features(features, swapped, "default", model.image_newline)
    assert lengths.tolist() == [plan.tokens for plan in plans]
    for size, plan, feature, their in zip(todo, plans, features, want, strict=True):
        ours = tokens_of(feature, plan, model.image_newline, HF)
        assert torch.equal(ours, their), f"{size}: the tokens stand in another order"


def patch_means(image):
    a = np.asarray(image, float)
    return a.reshape(a.shape[0] // 14, 14, a.shape[1] // 14, 14, 3).mean((1, 3))


@TILINGS
def test_the_map_shows_the_picture(tiling):
    """If a feature is its patch's mean colour, the rows of tokens are the canvas, which says which
    tile, which patch of it, and where a row ends."""
    for w, h in [(640, 480), (300, 500), (1000, 200), (60, 60), (3, 1200)]:
        plan, image = tiling.plan(w, h), noise((w, h))
        squares = cut_tiles(image, tiling)
        features = torch.tensor(np.stack([patch_means(p).reshape(-1, 3) for p in squares]))
        assert len(squares) == plan.pictures
        tokens = tokens_of(features, plan, torch.full((3,), -1.0), tiling)
        shape = len(plan.rows), len(plan.columns) + 1, 3
        shown = tokens[-shape[0] * shape[1]:].view(shape)
        canvas = Image.new("RGB", plan.canvas, tuple(tiling.background))
        canvas.paste(image.resize(plan.scaled, Image.Resampling.BICUBIC), plan.offset)
        want = patch_means(canvas)[np.ix_(plan.rows, plan.columns)]
        np.testing.assert_allclose(shown[:, :-1], want)
        assert (shown[:, -1] == NEWLINE).all(), "a row does not end in newline"


@pytest.mark.parametrize("aspect, size, grid", [
    ("anyres", (1344, 336), (3, 1)), ("anyres_4", (1344, 336), (4, 1)),
    ("anyres_4", (300, 2000), (1, 4)), ("hd", (900, 200), (5, 1)), ("hd_448", (900, 200), (2, 2))])
def test_the_texts_grids_and_a_pinned_one(aspect, size, grid):
    """Diss. Sec. 4.7: 2x2, 1x{2,3,4} and {2,3,4}x1 tiles; Diss. Sec. 4.4: HD at 448 x 448."""
    side = 224 if aspect.startswith("hd") else 336
    assert view_of(aspect, side, 14).tiling.plan(*size).grid == grid
