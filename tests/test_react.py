"""REACT (Diss. Ch. 2): gated blocks, the loss, retrieval, training and evaluation, on a tiny CLIP made here."""
import io
import json
import math
import os
import resource
import signal
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from transformers import CLIPConfig, CLIPModel
from transformers.models.clip.modeling_clip import image_text_contrastive_loss

import react
import retrieve
from checkpoint import load_part
from conftest import ROOT, byte_tokenizer, lines, save_parts, start_script, run_script
from gated import ROWS, GatedCLIP, GatedLayer, VisionTower, customise, gate, load_clip, tokenise
from model import LLaVA
from react import react_loss
from train import fingerprints

faiss = pytest.importorskip("faiss")


# ---------------------------------------------------------------------------------------------------------------------
# A tiny CLIP, and a corpus: squares of a colour on grey


def clip_config(**vision):
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    return CLIPConfig(projection_dim=24, vision_config=tower | {"image_size": 28, "patch_size": 14} | vision,
                      text_config=tower | {"vocab_size": 320, "max_position_embeddings": 40, "bos_token_id": 1,
                                           "eos_token_id": 0, "pad_token_id": 0})


def tiny_clip(seed=0, cls=CLIPModel):
    torch.manual_seed(seed)
    return cls(clip_config()).eval()


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """The tiny CLIP as a folder."""
    folder = tmp_path_factory.mktemp("clip")
    tiny_clip().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return str(folder)


COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220), "white": (250, 250, 250)}


def picture(i, colour):
    picture = Image.new("RGB", (30, 30), (90 + i % 40,) * 3)
    picture.paste(COLOURS[colour], (i % 15, i % 13, i % 15 + 12, i % 13 + 12))
    return picture


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """corpus.tsv of 64 pictures, class names, templates, and labels.tsv, in one folder."""
    folder = tmp_path_factory.mktemp("corpus")
    rows, labels = [], []
    for i in range(64):
        colour = list(COLOURS)[i % 4]
        picture(i, colour).save(folder / f"{i}.png")
        rows.append(f"{i}.png\ta {colour} square, number {i}\n")
        labels.append(f"{i}.png\t{colour}\n")
    (folder / "corpus.tsv").write_text("".join(rows))
    (folder / "labels.tsv").write_text("".join(labels))
    (folder / "classes.txt").write_text("red\ngreen\nblue\nwhite\n")
    (folder / "templates.txt").write_text("a {} square\na picture of a {} thing\n")
    return folder


QUICK = ["--workers", "0", "--device", "cpu"]


@pytest.fixture(scope="module")
def retrieved(clip, corpus, tmp_path_factory):
    """A folder with index/ and retrieved/."""
    out = tmp_path_factory.mktemp("retrieved")
    react.main(["index", "--clip", clip, "--corpus", str(corpus / "corpus.tsv"), "--images", str(corpus), "--out",
                str(out / "index"), *QUICK])
    react.main(["retrieve", "--index", str(out / "index"), "--clip", clip, "--classes", str(corpus / "classes.txt"),
                "--templates", str(corpus / "templates.txt"), "--k", "12", "--keys", "image", "text", "--out",
                str(out / "retrieved"), "--device", "cpu"])
    return out


def training(retrieved, clip, out, *more):
    return ["train", "--clip", clip, "--retrieved", str(retrieved / "retrieved"), "--out", str(out), "--gated_layers", "2",
            "--global_batch_size", "8", "--max_steps", "6", "--epochs", "9", *QUICK, *more]


# ---------------------------------------------------------------------------------------------------------------------
# Gated blocks

B_16, L_14 = {"patch_size": 16}, {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
                                  "num_attention_heads": 16, "patch_size": 14}
BIG_G = {"hidden_size": 1664, "intermediate_size": 8192, "num_hidden_layers": 48, "num_attention_heads": 16, "patch_size": 14}


@pytest.mark.parametrize("row, count", [("locked_image", 63_428_096), ("locked_text", 88_111_360), ("full", 151_277_312),
                                        ("gated_text", 18_914_316), ("locked_text_gated_image", 42_527_244),
                                        ("gated_both", 61_441_560)])
def test_each_row_of_table_2_6_trains_as_many_parameters_as_it_says(row, count):
    """Diss. Table 2.6, ViT-B/32: 63.4M, 88.1M, 151.3M, 18.9M, 42.5M, besides the one of logit_scale."""
    with torch.device("meta"):
        clip = CLIPModel(CLIPConfig())
    assert sum(p.numel() for p in clip.parameters()) == 151_277_313
    theta = customise(clip, row)
    assert sum(p.numel() for p in theta.values()) == count + 1
    if row == "gated_both":              # the unsettled row: 89.8M is these, and what lies outside of both towers' layers
        outside = sum(p.numel() for name, p in clip.named_parameters() if ".layers." not in name)
        assert count + outside == 89_835_801


@pytest.mark.parametrize("vision, k, gated, total", [
    (B_16, 6, 42_527_244, 192_147_981), (L_14, 6, 75_577_356, None), (BIG_G, 12, 398_980_632, None)],
    ids=["B/16", "L/14", "bigG/14"])
def test_other_towers_have_gated_blocks_of_the_published_size(vision, k, gated, total):
    """12 D_v^2 + 13 D_v + 2 a block, as in the public code's B/16, L/14 and bigG/14."""
    with torch.device("meta"):
        clip = CLIPModel(CLIPConfig(vision_config=vision))
    theta = customise(clip, "locked_text_gated_image", k)
    assert sum(p.numel() for p in theta.values()) == gated + 1
    assert total in (None, sum(p.numel() for p in clip.parameters()))


def inputs(seed=0):
    torch.manual_seed(seed)
    return torch.randn(3, 3, 28, 28), tokenise(["a red thing", "blue", "a very long green thing"], byte_tokenizer(),
                                               clip_config().text_config)


def test_without_gates_it_is_transformers_CLIP():
    """The oracle of the base path: features and similarities of transformers.CLIPModel, within 1e-6."""
    X, ids = inputs()
    u, v, tau = tiny_clip(cls=GatedCLIP)(X, ids)
    theirs = tiny_clip()(input_ids=ids, pixel_values=X)
    torch.testing.assert_close(u, theirs.image_embeds, atol=1e-6, rtol=0)
    torch.testing.assert_close(v, theirs.text_embeds, atol=1e-6, rtol=0)
    torch.testing.assert_close(tau * u @ v.T, theirs.logits_per_image, atol=1e-5, rtol=0)


@pytest.mark.parametrize("row", ROWS)
def test_before_training_every_row_is_its_base_bit_for_bit(row):
    """Diss. Fig. 2.3: tanh(0) = 0; open gates change the output."""
    X, ids = inputs()
    clip = tiny_clip(cls=GatedCLIP)
    u, v, _ = clip(X, ids)
    customise(clip, row, 2)
    now = clip(X, ids)
    assert torch.equal(u, now[0]) and torch.equal(v, now[1]), "a closed gate lets something through"
    for name, p in clip.named_parameters():
        if "alpha" in name:
            torch.nn.init.constant_(p, 0.3)
    u_open, v_open, _ = clip(X, ids)
    assert torch.equal(u, u_open) == ("vision_model" not in ROWS[row][0])
    assert torch.equal(v, v_open) == ("text_model" not in ROWS[row][0])


def test_a_gated_text_tower_looks_at_no_later_word():
    """The causal mask reaches the gated attention: what follows changes nothing before it."""
    clip = tiny_clip(cls=GatedCLIP)
    customise(clip, "gated_text", 2)
    for layer in clip.text_model.encoder.layers[-2:]:
        torch.nn.init.ones_(layer.gated.alpha_attn)
    ids = torch.tensor([[1, 50, 60, 70, 80, 0], [1, 50, 60, 71, 90, 0]])
    h = clip.text_model(ids).last_hidden_state
    torch.testing.assert_close(h[0, :3], h[1, :3], atol=0, rtol=0)
    assert not torch.equal(h[0, 3:], h[1, 3:])


def test_gated_blocks_stand_immediately_before_the_last_k_layers():
    """Facts of the public code: layers 6 to 11 of B/32; a block's output is its layer's input, and nothing earlier sees it."""
    with torch.device("meta"):
        clip = CLIPModel(CLIPConfig())
        gate(clip.vision_model, 6)
    assert [isinstance(layer, GatedLayer) for layer in clip.vision_model.encoder.layers] == [False] * 6 + [True] * 6
    clip, seen = tiny_clip(cls=GatedCLIP), {}
    gate(clip.vision_model, 2)
    layers = clip.vision_model.encoder.layers
    layers[0].register_forward_hook(lambda *call: seen.update(out=call[2]))
    layers[1].layer_norm1.register_forward_hook(lambda *call: seen.update(own=call[1][0]))
    X, _ = inputs()
    clip.images(X)
    closed = dict(seen)
    assert torch.equal(closed["out"], closed["own"])
    torch.nn.init.ones_(layers[1].gated.alpha_dense)
    clip.images(X)
    assert torch.equal(closed["out"], seen["out"]), "the layer before has changed"
    torch.testing.assert_close(seen["own"], layers[1].gated(seen["out"]))
    assert not torch.equal(closed["own"], seen["own"])


def test_in_the_first_step_only_the_gates_have_a_gradient():
    """2 k scalars; all that lies behind a closed gate gets exactly 0."""
    clip = tiny_clip(cls=GatedCLIP)
    theta = customise(clip, "locked_text_gated_image", 2)
    u, v, tau = clip(*inputs())
    react_loss(u, v, tau, 0.9).backward()
    moved = {name for name, p in theta.items() if p.grad.any()}
    assert {name.rsplit(".", 1)[-1] for name in moved - {"logit_scale"}} == {"alpha_attn", "alpha_dense"} and len(moved) == 5


def test_a_tower_has_no_more_gated_layers_than_layers():
    """k is at most the tower's depth."""
    with pytest.raises(ValueError, match="gated_layers 4: this tower has 3 layers"):
        customise(tiny_clip(), "gated_both", 4)


def test_an_old_CLIP_config_ends_its_texts_with_the_tokenizers_end():
    """openai/clip-vit-base-patch32 has eos_token_id 2, which transformers reads as "the largest id"."""
    config = clip_config().text_config
    config.eos_token_id = 2
    ids = tokenise(["ab", "a"], byte_tokenizer(), config)
    assert ids.tolist() == [[1, *byte_tokenizer().encode("ab"), 2], [1, *byte_tokenizer().encode("a"), 2, 2]]
    long = tokenise(["x" * 99], byte_tokenizer(), config)
    assert long.shape == (1, 40) and long[0, -1] == 2, "a text that is cut must still end"


# ---------------------------------------------------------------------------------------------------------------------
# The loss


def vector():
    unit = lambda rows: F.normalize(torch.tensor(rows, dtype=torch.float64), dim=-1)
    return (unit([[1, 0, 0], [0.8, 0.6, 0], [0, 1, 0], [0, 0.6, 0.8]]),
            unit([[1, 0, 0], [0.96, 0.28, 0], [0, 1, 0], [0, 0, 1]]))


@pytest.mark.parametrize("gamma, loss", [(0.9, 3.643694634089292), (1.0, 1.883694634089293)])
def test_the_loss_of_a_worked_example(gamma, loss):
    """Diss. Eqs. 2.4-2.6, tau 10, in float64; at gamma 0.9 the first two texts are positives of both pictures."""
    assert react_loss(*vector(), 10.0, gamma).item() == pytest.approx(loss, abs=1e-12)


def test_with_one_positive_each_it_is_2_B_times_the_loss_of_CLIP():
    """OpenCLIP's loss is the mean of two cross-entropies."""
    u, v = vector()
    assert react_loss(u, v, 10.0, 1.0).item() == pytest.approx(8 * image_text_contrastive_loss(10 * v @ u.T).item(), abs=1e-12)


def test_equal_captions_cost_what_CLIP_would_make_of_them():
    """Averaged positives of exactly equal texts: CLIP's value, and its gradient; only near duplicates make a difference."""
    torch.manual_seed(0)
    u = F.normalize(torch.randn(6, 5, dtype=torch.float64), dim=-1).requires_grad_()
    v = F.normalize(torch.randn(6, 5, dtype=torch.float64), dim=-1)
    v[3], v[4] = v[0], v[1]
    ours, theirs = react_loss(u, v, 20.0, 0.9), 12 * image_text_contrastive_loss(20 * v @ u.T)
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-10)
    torch.testing.assert_close(*(torch.autograd.grad(loss, u)[0] for loss in (ours, theirs)), atol=1e-10, rtol=0)


def test_a_pair_is_its_own_positive_whatever_rounding_says():
    """In float32 v . v is often less than 1; without the diagonal the loss would be NaN."""
    torch.manual_seed(0)
    v = F.normalize(torch.randn(64, 48), dim=-1)
    assert ((v @ v.T).diagonal() < 1).any()
    assert math.isfinite(react_loss(v, v, 10.0, 1.0).item())
