"""A picture in tiles (tiles.py): LLaVA-NeXT's anyres (Diss. Sec. 4.7) and LLaVA-1.5-HD (Diss. Sec. 4.3)."""
import json
import math
import random
import re
from fractions import Fraction

import numpy as np
import pytest
import torch
from conftest import byte_tokenizer
from PIL import Image
from transformers import CLIPVisionConfig, LlamaConfig, LlavaNextConfig, LlavaNextModel, LlavaNextProcessor
from transformers.image_processing_utils import get_patch_output_size, select_best_resolution
from transformers.image_utils import ChannelDimension
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_next.modeling_llava_next import unpad_image

from images import CLIP_MEAN, preprocess
from tiles import HD, NEXT, Tiling, anyres_plan, cut, draw, fit, merge

HF = NEXT._replace(rule="hf")
ALONE = HD._replace(global_picture=None)                  # the ablation: tiles without a global picture
TABLE = {(1024, 899): (672, 672, 42, 48, 2634), (640, 480): (672, 672, 36, 48, 2340), (480, 640): (672, 672, 48, 36, 2352),
         (672, 672): (672, 672, 48, 48, 2928), (336, 336): (336, 672, 24, 24, 1176), (224, 224): (336, 672, 24, 24, 1176),
         (500, 375): (672, 672, 36, 48, 2340), (1344, 336): (1008, 336, 18, 72, 1890), (1008, 336): (1008, 336, 24, 72, 2328),
         (336, 1008): (336, 1008, 72, 24, 2376), (1920, 1080): (672, 672, 28, 48, 1948), (300, 200): (336, 672, 16, 24, 976),
         (55, 176): (336, 672, 48, 14, 1296)}
# Where int() and int(round(x, 7)) differ: 16 patches to the one, 15.999999999999998 to the other.
WHOLE = [(55, 176), (110, 352), (88, 55), (205, 984), (396, 704), (748, 352), (987, 376), (1056, 220)]


def sizes(count, seed=0):
    """Random (width, height): all proportions, small and large, some of them extreme."""
    rng = random.Random(seed)
    draws = [(rng.randint(1, 1500), rng.randint(1, 1500)) for _ in range(count // 2)]
    draws += [(rng.randint(1, 400), rng.randint(1, 400)) for _ in range(count // 4)]
    return draws + [tuple(int(2 ** rng.uniform(0, 13)) for _ in "wh") for _ in range(count // 4)] + WHOLE + list(TABLE)


def noise(width, height):
    return Image.fromarray(np.random.default_rng(width + height).integers(0, 256, (height, width, 3), np.uint8))


def theirs(width, height, pinpoints):
    """(canvas, scaled, rows, columns) by the functions of transformers, which take and give (height, width)."""
    high, wide = select_best_resolution((height, width), pinpoints)
    shape = np.broadcast_to(np.uint8(0), (3, height, width))
    scaled = get_patch_output_size(shape, (high, wide), input_data_format=ChannelDimension.FIRST)
    rows, columns = high // 14, wide // 14
    kept = unpad_image(torch.arange(rows * columns).view(1, rows, columns), (height, width))[0]
    ids = kept.flatten().tolist() or [0]
    span = lambda length, first, last: range(first, last + 1) if length else range(0)
    return (wide, high), scaled[::-1], (span(kept.shape[0], ids[0] // columns, ids[-1] // columns),
                                        span(kept.shape[1], ids[0] % columns, ids[-1] % columns)), tuple(kept.shape)


def processor_of(tiling):
    pinpoints, side = [list(p) for p in tiling.pinpoints], tiling.tile
    return LlavaNextImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side},
                                      image_grid_pinpoints=pinpoints)


# ----------------------------------------------------------------------------------------------------------------- the plan


@pytest.mark.parametrize("size", TABLE)
def test_the_plan_has_the_tokens_of_the_table(size):
    """Diss. Sec. 4.7, measured on the released code: 1176 to 2928 tokens for everyday pictures."""
    plan = NEXT.plan(*size)
    assert (*plan.canvas, len(plan.rows), len(plan.columns), plan.tokens) == TABLE[size]


def test_the_table_of_the_docstring_is_true():
    """The table that a reader sees is the table that is tested."""
    rows = [tuple(map(int, row)) for row in
            re.findall(r"(\d+) x (\d+) +(\d+) x (\d+) +(\d+) x (\d+) +(\d+)", anyres_plan.__doc__)]
    assert {row[:2]: row[2:] for row in rows} == TABLE


def test_a_plan_with_rule_hf_is_transformers_own_for_thousands_of_sizes():
    """Canvas, scaled size, offset, kept rows and columns, and the placeholders that transformers' processor writes."""
    todo = sizes(4000)
    processor = LlavaNextProcessor(processor_of(HF), byte_tokenizer(), patch_size=14, num_additional_image_tokens=1,
                                   vision_feature_select_strategy="default")
    tokens = processor._get_num_multimodal_tokens(image_sizes=[(h, w) for w, h in todo])["num_image_tokens"]
    for (w, h), count in zip(todo, tokens):
        plan, (canvas, scaled, (rows, columns), shape) = HF.plan(w, h), theirs(w, h, HF.pinpoints)
        assert (plan.canvas, plan.scaled) == (canvas, scaled), f"{w} x {h}: the picture lies elsewhere"
        assert plan.offset == ((canvas[0] - scaled[0]) // 2, (canvas[1] - scaled[1]) // 2)
        assert (len(plan.rows), len(plan.columns)) == shape, f"{w} x {h}: other padding is cut off"
        assert 0 in shape or (plan.rows, plan.columns) == (rows, columns), f"{w} x {h}: other rows or columns are kept"
        assert plan.tokens == count, f"{w} x {h}: {plan.tokens} tokens, {count} placeholders in transformers"
        assert plan.pictures == 1 + canvas[0] * canvas[1] // 336 ** 2


def test_a_plan_with_rule_original_is_transformers_own_but_for_the_order_and_the_rounding():
    """The released code's pinpoints are (width, height): transformers' functions agree with it once they get them turned,
    wherever the unpadded size is not a whole number that floating point misses."""
    turned, missed = [(h, w) for w, h in NEXT.pinpoints], []
    for w, h in sizes(4000, seed=1):
        plan, (canvas, scaled, _, shape) = NEXT.plan(w, h), theirs(w, h, turned)
        assert (plan.canvas, plan.scaled) == (canvas, scaled), f"{w} x {h}: the picture lies elsewhere"
        if (len(plan.rows), len(plan.columns)) != shape:
            missed.append((w, h))
            columns, rows = canvas[0] // 14, canvas[1] // 14
            exact = Fraction(h * columns, w) if Fraction(w, h) > Fraction(columns, rows) else Fraction(w * rows, h)
            assert exact.denominator == 1, f"{w} x {h}: {float(exact)} patches are no matter of rounding"
            assert shape == (len(plan.rows) + 2 * (shape[0] != rows), len(plan.columns) + 2 * (shape[1] != columns))
    assert set(missed) >= set(WHOLE), "the released code cuts these with int(), transformers rounds them first"


def test_the_order_of_the_pinpoints_matters_in_ties_only():
    """transformers reads (height, width): another canvas for both sides up to a tile, or for strips beyond 1008 : 1."""
    edges = [(336, 336), (337, 336), (336, 337), (1, 1), (1, 1008), (1, 1009), (1009, 1), (1008, 1), (2, 2017), (337, 1)]
    for w, h in sizes(4000, seed=2) + edges:
        tie = max(w, h) <= 336 or max(w, h) > 1008 * min(w, h)
        ours, hf = NEXT.plan(w, h).canvas, HF.plan(w, h).canvas
        assert (ours, hf) == ((336, 672), (672, 336)) if tie else ours == hf, f"{w} x {h}: original {ours}, hf {hf}"


def test_named_differences_between_the_rules():
    """The same picture to two programs: what a checkpoint loses when it is served by the other one."""
    turned = [(h, w) for w, h in NEXT.pinpoints]
    tokens = lambda size: (NEXT.plan(*size).tokens, anyres_plan(*size, turned, rule="hf").tokens, HF.plan(*size).tokens)
    assert tokens((110, 352)) == (1296, 1392, 1392), "rounding alone"
    assert tokens((55, 176)) == (1296, 1392, 792), "rounding, and a tie"
    assert tokens((300, 200)) == (976, 976, 1464), "a tie alone"
    assert tokens((640, 480)) == (2340, 2340, 2340), "neither"


def test_any_list_of_pinpoints_is_chosen_from_as_in_transformers():
    """Most of the picture, then least of the canvas, then the earlier: NEXT's own list is in such an order that only its
    first and last rule ever speak."""
    assert anyres_plan(200, 200, [(672, 672), (336, 672)]).canvas == (336, 672), "the smaller canvas, if both hold everything"
    for first, second in (((336, 672), (672, 336)), ((672, 336), (336, 672))):
        assert anyres_plan(200, 200, [first, second]).canvas == first, "the released code compares strictly"
    rng = random.Random(0)
    for w, h in sizes(1000, seed=3):
        pinpoints = [(336 * rng.randint(1, 4), 336 * rng.randint(1, 4)) for _ in range(rng.randint(1, 8))]
        assert anyres_plan(w, h, pinpoints, rule="hf").canvas == select_best_resolution((h, w), pinpoints)[::-1]
        turned = [(b, a) for a, b in pinpoints]
        assert anyres_plan(w, h, pinpoints, rule="original").canvas == select_best_resolution((h, w), turned)[::-1]


def test_HD_has_up_to_six_tiles_and_a_global_picture_that_the_ablation_leaves_out():
    """Diss. Sec. 4.3: 13B at 448 x 448 with 224-pixel tiles; tiles alone against tiles with global context."""
    grids = {(1, n) for n in range(1, 7)} | {(n, 1) for n in range(1, 7)} | {(2, 2), (2, 3), (3, 2)}
    assert sorted(HD.pinpoints) == sorted((224 * a, 224 * b) for a, b in grids)
    assert (HD.plan(448, 448).grid, HD.plan(448, 448).tokens, ALONE.plan(448, 448).tokens) == ((2, 2), 256 + 32 * 33, 32 * 33)
    assert (HD.plan(224, 200).grid, HD.plan(2000, 1000).grid, HD.plan(100, 1000).grid) == ((1, 1), (3, 2), (1, 5))
    for w, h in sizes(1000):
        both, alone = HD.plan(w, h), ALONE.plan(w, h)
        assert both.pictures == alone.pictures + 1 == both.grid[0] * both.grid[1] + 1 <= 7
        assert alone.tokens > 0, f"{w} x {h} would have no token at all"
        if both.rows and both.columns:
            assert both.tokens == alone.tokens + 256
            assert both._replace(pictures=0, tokens=0) == alone._replace(pictures=0, tokens=0)


def test_what_is_kept_is_the_picture_up_to_half_a_patch():
    """Unpadding: 7 pixels, and one of rounding, at each border; a patch where no global picture stands in for a thin strip."""
    for tiling in (NEXT, HF, HD, ALONE):
        for w, h in sizes(400):
            plan = tiling.plan(w, h)
            for kept, at, length in zip((plan.columns, plan.rows), plan.offset, plan.scaled):
                limit = 15 if tiling == ALONE and len(kept) == 2 else 8
                assert abs(kept.start * 14 - at) <= limit and abs(kept.stop * 14 - at - length) <= limit, f"{w} x {h}: {plan}"


def test_a_tiling_survives_json_and_scales_to_another_tile():
    """It is stored in a checkpoint, and the toy's tiles have 28 pixels."""
    again = Tiling(**json.loads(json.dumps(HD._asdict())))
    assert again.plan(500, 300) == HD.plan(500, 300)
    assert [p.tobytes() for p in cut(noise(50, 30), again)] == [p.tobytes() for p in cut(noise(50, 30), HD)]
    assert NEXT.at(28).pinpoints == ((28, 56), (56, 28), (56, 56), (84, 28), (28, 84))
    assert NEXT.at(28).plan(56, 56).tokens == 4 + 4 * 5 and NEXT.at(336) == NEXT
    assert NEXT.at(32, patch=16).plan(64, 64).tokens == 4 + 4 * 5


@pytest.mark.parametrize("wrong, words", [
    ({"pinpoints": []}, ["no pinpoints", "(336, 672)"]), ({"pinpoints": [(336, 500)]}, ["(336, 500)", "multiples of 336"]),
    ({"pinpoints": [(336, 672), (0, 336)]}, ["(0, 336)"]), ({"pinpoints": [(-336, 336)]}, ["(-336, 336)"]),
    ({"pinpoints": [(336,)]}, ["(336,)"]), ({"pinpoints": [336, 672]}, ["pinpoint 336 "]),
    ({"pinpoints": "[[336, 672]]"}, ["pinpoint '['", "pairs"]), ({"pinpoints": [(336.0, 672.0)]}, ["336.0"]),
    ({"tile": 224}, ["(336, 672)", "224"]), ({"patch": 16, "pinpoints": [(320, 320)], "tile": 330}, ["tile 330", "patch 16"]),
    ({"width": 0}, ["0 x 480"]), ({"height": -1}, ["640 x -1"]), ({"rule": "HF"}, ["'HF'", "'original'", "'hf'"])])
def test_what_cannot_be_planned_is_an_error_that_says_what_to_pass(wrong, words):
    """Ours: pinpoints that do not fit the tile would cut half tiles, silently."""
    with pytest.raises(ValueError) as error:
        anyres_plan(**{"width": 640, "height": 480, "pinpoints": NEXT.pinpoints} | wrong)
    assert all(word in str(error.value) for word in words), str(error.value)


# --------------------------------------------------------------------------------------------------------------- the pixels


@pytest.mark.parametrize("rule", ["hf", "original"])
def test_pixels_are_those_of_transformers(rule):
    """Bit for bit what LlavaNextImageProcessorPil makes; with the original's order once its pinpoints are turned."""
    tiling = NEXT._replace(rule=rule)
    processor = processor_of(tiling)
    if rule == "original":
        processor.image_grid_pinpoints = [[h, w] for w, h in tiling.pinpoints]
    rng = random.Random(rule)
    shapes = [(rng.randint(4, 900), rng.randint(4, 900)) for _ in range(26)]
    for w, h in [(5, 1500), (1500, 7), (336, 336), (110, 352), *shapes]:
        image = noise(w, h)
        want = torch.as_tensor(np.asarray(processor(image)["pixel_values"][0]))
        got = torch.stack([preprocess(picture, 336) for picture in cut(image, tiling)])
        assert got.shape == want.shape, f"{w} x {h}: {len(got)} pictures, {len(want)} in transformers"
        assert torch.equal(got, want), f"{w} x {h}: off by {(got - want).abs().max()}; g sees other pixels"


def test_tiles_of_another_size_are_those_of_transformers():
    """The toy's 28-pixel tiles are cut by the same rule."""
    tiling = HF.at(28)
    processor = processor_of(tiling)
    for w, h in [(40, 30), (56, 56), (17, 90), (300, 111), (28, 28)]:
        got = torch.stack([preprocess(picture, 28) for picture in cut(noise(w, h), tiling)])
        assert torch.equal(got, torch.as_tensor(np.asarray(processor(noise(w, h))["pixel_values"][0])))


def test_the_background_of_HD_is_clips_mean_and_its_global_picture_is_not_distorted():
    """Diss. Sec. 4.3: as LLaVA-1.5's padding; a circle stays a circle. NeXT's is black, and squeezed."""
    assert HD.background == tuple(int(m * 255) for m in CLIP_MEAN)
    image = Image.new("RGB", (600, 300), (0, 255, 0))
    first, *tiles = (np.asarray(picture) for picture in cut(image, HD))
    assert (first[:56] == HD.background).all() and (first[-56:] == HD.background).all() and (first[56:-56] == (0, 255, 0)).all()
    assert len(tiles) == math.prod(HD.plan(600, 300).grid)
    assert [p.tobytes() for p in cut(image, ALONE)] == [t.tobytes() for t in tiles]
    squeezed, tile, *_ = (np.asarray(picture) for picture in cut(Image.new("RGB", (640, 480), (0, 255, 0)), NEXT))
    assert (squeezed == (0, 255, 0)).all() and (tile[:84] == (0, 0, 0)).all() and (tile[84:] == (0, 255, 0)).all()


def test_an_unknown_kind_of_global_picture_is_an_error():
    """Ours: a typing error must not become another preprocessing."""
    with pytest.raises(ValueError, match="'streched'.*'stretched', 'padded' or None"):
        cut(noise(9, 9), NEXT._replace(global_picture="streched"))


@pytest.mark.parametrize("tiling", [NEXT, HF, HD, ALONE], ids=["NEXT", "HF", "HD", "ALONE"])
def test_pictures_of_any_proportions_are_cut_and_merged_as_planned(tiling):
    """Strips of a single pixel included: as many pictures and tokens as the plan says, every picture a tile."""
    for w, h in [(1, 1), (1, 5000), (5000, 1), (3, 2000), (20000, 3), (2, 1), (337, 336)]:
        plan, pictures = tiling.plan(w, h), cut(Image.new("RGB", (w, h), (9, 9, 9)), tiling)
        assert [p.size for p in pictures] == [(tiling.tile, tiling.tile)] * plan.pictures
        features = torch.zeros(plan.pictures, (tiling.tile // 14) ** 2, 3)
        assert merge(features, [plan], torch.ones(3), tiling)[0].shape == (plan.tokens, 3)


# ---------------------------------------------------------------------------------------------------------------- the merge


def test_merged_features_are_those_of_transformers():
    """LlavaNextModel.pack_image_features: one batch of many proportions, base first, a newline behind every row."""
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
                                       image_size=336, patch_size=14),
        text_config=LlamaConfig(vocab_size=32, hidden_size=6, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1),
        image_grid_pinpoints=[list(p) for p in HF.pinpoints], image_token_index=31)
    model, rng = LlavaNextModel(config), random.Random(0)
    shapes = [(640, 480), (480, 640), (336, 336), (55, 176), (110, 352), (1500, 300), (1, 5000), (5000, 1), (672, 672)]
    shapes += [(rng.randint(1, 1200), rng.randint(1, 1200)) for _ in range(30)]
    plans = [HF.plan(w, h) for w, h in shapes]
    features = torch.randn(sum(plan.pictures for plan in plans), 576, 6)
    want, lengths = model.pack_image_features(features.split([plan.pictures for plan in plans]), [(h, w) for w, h in shapes],
                                              "default", model.image_newline)
    got = merge(features, plans, model.image_newline, HF)
    assert [len(g) for g in got] == lengths.tolist() == [plan.tokens for plan in plans]
    for size, ours, their in zip(shapes, got, want):
        assert torch.equal(ours, their), f"{size}: the tokens stand in another order"


def by_hand(parts, plan, newline, tiling):
    """One picture's tokens, one by one."""
    n, tokens = tiling.tile // tiling.patch, []
    if tiling.global_picture:
        tokens += list(parts[0])
    for row in plan.rows:
        for column in plan.columns:
            tile = (row // n) * plan.grid[0] + column // n + (tiling.global_picture is not None)
            tokens.append(parts[tile][(row % n) * n + column % n])
        tokens.append(newline)
    return torch.stack(tokens)


@pytest.mark.parametrize("tiling", [NEXT, HD, ALONE, NEXT.at(28)], ids=["NEXT", "HD", "ALONE", "toy"])
def test_merging_is_what_a_loop_over_rows_and_columns_does(tiling):
    """Diss. Sec. 4.7 / 4.3, token by token: which tile, which patch of it, and where a row ends."""
    plans, D = [tiling.plan(w, h) for w, h in [(640, 480), (480, 640), (224, 100), (1000, 290), (300, 2000), (60, 60)]], 5
    features, newline = torch.randn(sum(p.pictures for p in plans), (tiling.tile // 14) ** 2, D), torch.randn(D)
    parts = features.split([plan.pictures for plan in plans])
    for plan, ours, mine in zip(plans, merge(features, plans, newline, tiling), parts):
        assert torch.equal(ours, by_hand(mine, plan, newline, tiling))


@pytest.mark.parametrize("tiling", [NEXT, HD, ALONE, HD.at(28)], ids=["NEXT", "HD", "ALONE", "toy"])
def test_the_map_shows_the_picture(tiling):
    """If a patch's feature is its mean colour, the merged rows are the canvas, patch by patch: cut and merge agree."""
    means = lambda a: a.reshape(a.shape[0] // 14, 14, a.shape[1] // 14, 14, 3).mean((1, 3))
    for w, h in [(640, 480), (300, 500), (1000, 200)]:
        plan, image = tiling.plan(w, h), noise(w, h)
        features = torch.tensor(np.stack([means(np.asarray(p, float)).reshape(-1, 3) for p in cut(image, tiling)]))
        merged = merge(features, [plan], torch.full((3,), -1.0), tiling)[0]
        shown = merged[plan.tokens - len(plan.rows) * (len(plan.columns) + 1):].view(len(plan.rows), len(plan.columns) + 1, 3)
        canvas = means(np.asarray(fit(image, plan.canvas, tiling.background), float))
        np.testing.assert_allclose(shown[:, :-1], canvas[np.ix_(plan.rows, plan.columns)])
        assert (shown[:, -1] == -1).all(), "a row does not end in newline"


@pytest.mark.parametrize("tiling", [NEXT, ALONE], ids=["NEXT", "ALONE"])
def test_gradients_reach_newline_and_what_is_kept(tiling):
    """Training: newline learns once a row; padding that was cut off teaches nothing."""
    plans = [tiling.plan(640, 480), tiling.plan(224, 224)]
    features = torch.randn(sum(p.pictures for p in plans), (tiling.tile // 14) ** 2, 3, requires_grad=True)
    newline = torch.zeros(3, requires_grad=True)
    torch.cat(merge(features, plans, newline, tiling)).sum().backward()
    ends, tokens = (sum(counts) for counts in zip(*((len(plan.rows), plan.tokens) for plan in plans)))
    assert newline.grad.tolist() == [ends] * 3
    assert set(features.grad.unique().tolist()) <= {0.0, 1.0} and features.grad.sum() == 3 * (tokens - ends)


def test_a_batch_of_text_alone_can_still_give_newline_a_gradient():
    """As the docstring says: no rank of a distributed run waits for newline."""
    newline, features = torch.ones(3, requires_grad=True), torch.zeros(0, 576, 3, requires_grad=True)
    torch.cat([*merge(features, [], newline, NEXT), newline[None][:0]]).sum().backward()
    assert newline.grad.tolist() == [0, 0, 0]


def test_features_keep_their_precision():
    """bf16 features and an fp32 newline: no silent fp32 sequence."""
    plan = HD.plan(100, 100)
    assert merge(torch.zeros(plan.pictures, 256, 2).bfloat16(), [plan], torch.ones(2), HD)[0].dtype == torch.bfloat16


@pytest.mark.parametrize("shape", [(4, 576), (6, 576), (5, 256)])
def test_features_that_are_not_those_of_the_plans_are_refused(shape):
    """Our own invariant: a tile too few would shift every later picture."""
    with pytest.raises(AssertionError, match="1 pictures in 5 parts of 576 tokens"):
        merge(torch.zeros(*shape, 2), [NEXT.plan(640, 480)], torch.zeros(2), NEXT)


# -------------------------------------------------------------------------------------------------------------- the drawing


@pytest.mark.parametrize("tiling", [NEXT, HD, ALONE, NEXT.at(28)], ids=["NEXT", "HD", "ALONE", "toy"])
def test_a_drawing_numbers_the_pictures_and_counts_the_tokens(tiling, tmp_path):
    """What `cut` makes, in its order, and the plan's sum in the caption."""
    import matplotlib
    plan, w, h = tiling.plan(640, 480), 640, 480
    with matplotlib.rc_context({"svg.fonttype": "none"}):                    # text as text
        caption = draw(noise(w, h), tiling, tmp_path / "x.svg")
    words = re.findall(r"<text[^>]*>(.*?)</text>", (tmp_path / "x.svg").read_text(), re.DOTALL)
    assert [word for word in words if word.isdigit()] == [str(i) for i in range(plan.pictures)]
    assert f"= {plan.tokens:,} tokens" in caption and any(f"= {plan.tokens:,} tokens" in word for word in words)


def test_a_drawing_shows_the_picture_the_padding_and_the_row_ends(tmp_path):
    """A green 640 x 480 picture on 672 x 672: its parts fill the areas that the plan gives them."""
    draw(Image.new("RGB", (640, 480), (0, 160, 0)), NEXT, tmp_path / "x.png")
    pixels = np.asarray(Image.open(tmp_path / "x.png").convert("RGB")).astype(int)
    area = lambda colour: (np.abs(pixels - colour).max(-1) < 3).sum()
    green, padding = area((0, 160, 0)), area((186, 186, 186))               # 20% of black shines through the tint
    assert 0.8 < green / area((255, 165, 0)) / ((336 ** 2 + 672 * 504) / (36 * 14 * 14)) < 1.5, "green to orange"
    assert 0.5 < padding / green / (672 * 168 / (336 ** 2 + 672 * 504)) < 1, "hatched padding to green"


@pytest.mark.parametrize("size", [(1, 1), (1, 3000), (3000, 1), (200, 200)])
def test_extreme_pictures_are_drawn(size, tmp_path):
    """A strip, a single pixel."""
    for tiling in (NEXT, ALONE):
        draw(Image.new("RGB", size), tiling, tmp_path / "x.png")
        assert min(Image.open(tmp_path / "x.png").size) > 100
