"""REACT (Diss. Ch. 2): gated blocks, the loss, retrieval, training and evaluation, on a tiny CLIP made here."""
import io
import json
import math
import os
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
import toy
from bench import clusters, recall
from checkpoint import load_part
from conftest import ROOT, byte_tokenizer, lines, run_script, save_parts, start_script
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


@pytest.mark.slow
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


# ---------------------------------------------------------------------------------------------------------------------
# Corpus, index, retrieval


def shard(path, pairs, more=()):
    with tarfile.open(path, "w") as tar:
        for name, data in [*((f"{i}.{kind}", part) for i, pair in enumerate(pairs) for kind, part in pair.items()), *more]:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def png(colour="red", i=0):
    picture(i, colour).save(data := io.BytesIO(), "png")
    return data.getvalue()


def test_a_corpus_is_read_from_a_table_json_lines_a_folder_or_tar_shards(tmp_path):
    """The same two pairs in four forms; a picture in a shard is read where it lies."""
    (tmp_path / "f").mkdir()
    for i, text in enumerate(["one red", "two  red"]):
        (tmp_path / "f" / f"{i}.png").write_bytes(png(i=i))
        (tmp_path / "f" / f"{i}.txt").write_text(text + "\n")
    (tmp_path / "c.tsv").write_text("0.png\tone red\n1.png\ttwo red\n")
    (tmp_path / "c.jsonl").write_text('{"image": "0.png", "caption": "one red"}\n{"image": "1.png", "caption": "two red"}\n')
    shard(tmp_path / "c.tar", [{"png": png(i=0), "txt": b"one red"}, {"png": png(i=1), "json": b'{"caption": "two red"}'}])
    for source in ("f", "c.tsv", "c.jsonl", "c.tar"):
        left_out = []
        pairs = [*retrieve.read_pairs([str(tmp_path / source)], str(tmp_path / "f"), left_out)]
        assert [pair.text for pair in pairs] == ["one red", "two red"] and not left_out, source
        assert [pair.picture().tobytes() for pair in pairs] == [picture(i, "red").tobytes() for i in range(2)], source


def test_what_cannot_be_a_pair_is_counted_and_shown(clip, tmp_path, capsys):
    """A torn shard, a member without text, text that is no text, an empty text, a corrupt picture: none is silent."""
    shard(tmp_path / "a.tar", [{"png": png(), "txt": b"fine"}, {"png": png()}, {"txt": b"alone"},
                               {"png": png(), "txt": b"\xff"}, {"png": b"no picture", "txt": b"corrupt"},
                               {"png": png(), "txt": b" "}])
    shard(tmp_path / "b.tar", [{"png": png(), "txt": b"also fine"}, {"png": png(), "txt": b"lost"}])
    whole = (tmp_path / "b.tar").read_bytes()
    (tmp_path / "b.tar").write_bytes(whole[:2048] + b"\x07" * 512 + whole[2560:])            # the second pair's first header
    react.main(["index", "--clip", clip, "--corpus", str(tmp_path / "a.tar"), str(tmp_path / "b.tar"), "--out",
                str(tmp_path / "out"), *QUICK])
    said = capsys.readouterr().out
    assert "2 pairs, flat; 6 left out" in said
    left = " ".join(why for _, why in lines(tmp_path / "out" / "left_out.jsonl"))
    for why in ("no text beside", "no picture beside", "not a text", "empty", "not a readable picture", "damaged at byte 2048"):
        assert why in left, why


def test_features_are_CLIPs_own_of_length_1(clip, corpus, retrieved):
    """Inner products of the stored features are cosines: transformers' own, to float16's precision."""
    model = CLIPModel.from_pretrained(clip).eval()
    pairs = retrieve.Corpus(retrieved / "index")
    X = torch.stack([retrieve.preprocess(pairs[i].picture(), 28) for i in range(8)])
    ids = tokenise([pairs[i].text for i in range(8)], byte_tokenizer(), model.config.text_config)
    out = model(input_ids=ids, pixel_values=X)
    for key, theirs in (("image", out.image_embeds), ("text", out.text_embeds)):
        ours = torch.from_numpy(np.load(retrieved / "index" / f"{key}.npy")[:8]).float()
        torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=0)


def test_an_index_that_was_killed_goes_on(clip, corpus, tmp_path, monkeypatch):
    """What is encoded is not encoded again, and the result is that of one go; another CLIP or corpus is refused."""
    command = lambda out: ["index", "--clip", clip, "--corpus", str(corpus / "corpus.tsv"), "--images", str(corpus), "--out",
                           str(tmp_path / out), "--batch_size", "10", *QUICK]
    react.main(command("whole"))
    encode, done = retrieve.encode, []

    def torn(*args):
        for batch in encode(*args):
            if len(done) == 3:
                raise KeyboardInterrupt
            done.append(batch[0])
            yield batch
    with monkeypatch.context() as patch:
        patch.setattr(retrieve, "encode", torn)
        with pytest.raises(KeyboardInterrupt):
            react.main(command("torn"))
        with pytest.raises(ValueError, match="30 of 64 pairs are encoded"):
            retrieve.open_index(tmp_path / "torn")
        done.clear()
        patch.setattr(retrieve, "encode", lambda *args: (done.append(batch[0]) or batch for batch in encode(*args)))
        react.main(command("torn"))
    assert done == [30, 40, 50, 60]
    for file in ("image.npy", "text.npy", "pairs.jsonl", "text.faiss"):
        assert (tmp_path / "torn" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes(), file
    tiny_clip(seed=1).save_pretrained(tmp_path / "other")
    byte_tokenizer().save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="begun with another CLIP"):
        react.main([str(tmp_path / "other") if word == clip else word for word in command("torn")])
    with pytest.raises(ValueError, match="begun with another corpus"):
        react.main([word.replace("corpus.tsv", "labels.tsv") for word in command("torn")])
    assert (tmp_path / "torn" / "pairs.jsonl").read_bytes() == (tmp_path / "whole" / "pairs.jsonl").read_bytes()


def test_every_class_meets_every_template():
    """Diss. Eq. 2.1: ImageNet's 1,000 classes x 80 templates are 80,000 queries."""
    queries = retrieve.queries_of([f"class {i}" for i in range(1000)], [f"{i} {{}}" for i in range(80)])
    assert len(queries) == len(set(queries)) == 80_000 and queries[81] == ("class 1", 1, "1 class 1")


def test_what_is_retrieved_is_the_brute_force_top_k_each_once(clip, corpus, retrieved):
    """Diss. Eqs. 2.2, 2.3: a set of pairs, each with all the queries that hit it."""
    rows = {row["pair"]: row["hits"] for row in lines(retrieved / "retrieved" / "retrieved.jsonl")}
    model, tokenizer = load_clip(clip)
    classes, templates = ["red", "green", "blue", "white"], ["a {} square", "a picture of a {} thing"]
    want = {}
    for name in classes:
        for t, template in enumerate(templates):
            ids = tokenise([template.format(name)], tokenizer, model.config.text_config)
            v = model.texts(ids)[0].detach().numpy()
            for key in ("image", "text"):
                similar = np.load(retrieved / "index" / f"{key}.npy").astype(np.float32) @ v
                for i in np.argsort(-similar)[:12]:
                    want.setdefault(int(i), {}).setdefault(name, set()).add((t, key))
    got = {i: {name: {(t, key) for t, key, _ in found} for name, found in hits.items()} for i, hits in rows.items()}
    assert got == want
    assert len(rows) <= 2 * 8 * 12
    report = json.loads((retrieved / "retrieved" / "report.json").read_text())
    assert len(rows) == report["pairs"]
    assert (report["queries"], report["keys"], report["pairs"]) == (8, ["T2I", "T2T"], len(rows))
    assert report["classes"]["red"]["pairs"] == sum("red" in hits for hits in rows.values())
    assert (retrieved / "retrieved" / "grid.png").stat().st_size > 5000


def edited(folder, tmp_path, **facts):
    """A copy of an index folder whose index.json says something else."""
    copy = tmp_path / "index"
    subprocess.run(["cp", "-r", str(folder), str(copy)], check=True)
    (copy / "index.json").write_text(json.dumps(json.loads((copy / "index.json").read_text()) | facts))
    return copy


@pytest.mark.parametrize("wrong, message", [
    ("clip", "is not the model that"), ("corpus", "is not of this corpus: .* had 1 bytes"), ("classes", "stand there twice"),
    ("index", "belongs to another index"), ("min_score", "4 of 4 classes have no pair"), ("template", "is no template"),
    ("keys", "image .T2I., text .T2T."), ("none", "no index.json")])
def test_what_does_not_belong_together_is_said(clip, corpus, retrieved, tmp_path, wrong, message):
    """Features of another model, a corpus that has changed, an index of another corpus, a class without a hit, ..."""
    folder, more = retrieved / "index", []
    classes, templates = corpus / "classes.txt", corpus / "templates.txt"
    if wrong == "clip":
        tiny_clip(seed=1).save_pretrained(tmp_path)
        byte_tokenizer().save_pretrained(tmp_path)
        clip = str(tmp_path)
    elif wrong == "corpus":
        folder = edited(folder, tmp_path, sizes={str(corpus / "corpus.tsv"): 1})
    elif wrong == "index":
        folder = edited(folder, tmp_path)
        faiss.write_index(faiss.IndexFlatIP(24), str(folder / "image.faiss"))
    elif wrong == "min_score":
        more = ["--min_score", "1.5"]
    elif wrong == "template":
        (templates := tmp_path / "t.txt").write_text("a photo\n")
    elif wrong == "classes":
        (classes := tmp_path / "c.txt").write_text("red\nred\n")
    elif wrong == "keys":
        more = ["--keys", "sound"]
    else:
        folder = tmp_path
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        react.main(["retrieve", "--index", str(folder), "--clip", clip, "--classes", str(classes), "--templates",
                    str(templates), "--out", str(tmp_path / "out"), "--device", "cpu", *more])


def test_hnsw_finds_what_exact_search_finds():
    """recall@50 >= 0.98 on 5,000 clustered vectors of 512 dimensions; `python bench.py index` has 200,000."""
    features, queries = clusters(5_000, 200)
    exact, hnsw = (retrieve.build(features, np.arange(5_000), kind) for kind in ("flat", "hnsw"))
    assert recall(hnsw, exact, queries) >= 0.98


def test_the_kind_of_index_follows_the_number_of_pairs():
    """Flat below 10,000 pairs, HNSW to 10 million, then compressed."""
    assert [retrieve.kind_for(n) for n in (9_999, 10_000, 10_000_000, 10_000_001)] == ["flat", "hnsw", "hnsw", "compressed"]


@pytest.mark.slow
def test_a_compressed_index_finds_most_and_is_a_quarter_of_float16():
    """OPQ, inverted lists, product quantiser: half a byte a dimension."""
    features, queries = clusters(3_000, 100, D=16, centres=100)
    exact, small = (retrieve.build(features, np.arange(3_000), kind) for kind in ("flat", "compressed"))
    assert recall(small, exact, queries) > 0.5
    assert faiss.extract_index_ivf(small).code_size == 16 // 2


# ---------------------------------------------------------------------------------------------------------------------
# Training


@pytest.mark.parametrize("row", ROWS)
def test_what_is_locked_is_bit_identical_after_training(retrieved, clip, tmp_path, row, capsys):
    """Diss. Table 2.6: what a row locks stays as it was; what it trains has moved."""
    react.main(training(retrieved, clip, tmp_path / "out", "--train", row, "--lr", "0.01", "--no-augment"))
    (base, _), (trained, _) = load_clip(clip), load_clip(str(tmp_path / "out"))
    theta = customise(load_clip(clip)[0], row, 2)
    before, after = fingerprints(base), fingerprints(trained)
    assert after.keys() == before.keys() | theta.keys()
    for name in before:
        assert name in theta or after[name] == before[name], f"{name} is locked and has changed"
    assert sum(after[name] != before.get(name, (0, 0)) for name in theta) > 0.9 * len(theta), "what trains has not moved"
    assert all(trained.get_parameter(name).abs().item() > 1e-5 for name in theta if "alpha" in name), "a gate did not open"
    said = capsys.readouterr().out
    assert f"theta: {sum(p.numel() for p in theta.values()):,} parameters, row {row}" in said
    assert ("does not settle" in said) == (row == "gated_both")
    losses = [record["loss"] for record in lines(tmp_path / "out" / "log.jsonl")]
    assert len(losses) == 6 and losses[-1] < losses[0]


def test_the_logit_scale_stays_between_1_and_100(retrieved, clip, tmp_path):
    """Clamped to [0, ln 100] after each step."""
    model, tokenizer = load_clip(clip)
    torch.nn.init.constant_(model.logit_scale, math.log(100))
    model.save_pretrained(tmp_path / "clip")
    tokenizer.save_pretrained(tmp_path / "clip")
    react.main(training(retrieved, str(tmp_path / "clip"), tmp_path / "out", "--lr", "0.1"))
    assert all(record["tau"] <= 100.001 for record in lines(tmp_path / "out" / "log.jsonl"))


def test_recomputed_activations_give_the_same_losses(retrieved, clip, tmp_path):
    """Less memory, the same arithmetic."""
    logs = []
    for flag in ("--no-checkpoint_activations", "--checkpoint_activations"):
        react.main(training(retrieved, clip, tmp_path / flag, flag, "--lr", "0.01"))
        logs.append([record["loss"] for record in lines(tmp_path / flag / "log.jsonl")])
    assert logs[0] == pytest.approx(logs[1], rel=1e-5)


@pytest.mark.slow
def test_a_killed_run_goes_on_bit_for_bit(retrieved, clip, tmp_path):
    """SIGKILL after a saved step, then --resume: the log and the weights of a run that was left alone."""
    command = training(retrieved, clip, "out", "--save_every", "1", "--max_steps", "30", "--lr", "0.01")
    (tmp_path / "whole").mkdir(), (tmp_path / "killed").mkdir()
    assert run_script(tmp_path / "whole", "react.py", *command)[0] == 0
    process = start_script(tmp_path / "killed", "react.py", *command)
    state = tmp_path / "killed" / "out" / "train_state"
    while not (state.is_dir() and any(name >= "step_00000003" for name in os.listdir(state) if name.startswith("step_"))):
        assert process.is_alive(), (tmp_path / "killed" / "output").read_text()
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    code, said = run_script(tmp_path / "killed", "react.py", *command, "--resume")
    assert code == 0 and "resuming at step" in said, said
    logs = [{record["step"]: record["loss"] for record in lines(tmp_path / run / "out" / "log.jsonl")}
            for run in ("whole", "killed")]
    assert logs[0] == logs[1] and len(logs[0]) == 30
    weights = [(tmp_path / run / "out" / "model.safetensors").read_bytes() for run in ("whole", "killed")]
    assert weights[0] == weights[1], "the resumed run ended elsewhere"


@pytest.mark.slow
def test_two_ranks_train_as_one(retrieved, clip, tmp_path):
    """The global batch's features are gathered with gradients: the losses and the result of two ranks are those of one."""
    one = training(retrieved, clip, tmp_path / "one", "--lr", "0.01", "--train", "full")
    react.main(one)
    two = [str(tmp_path / "two") if word == str(tmp_path / "one") else word for word in one]
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
                           os.path.join(ROOT, "react.py"), *two], capture_output=True, text=True, timeout=300,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    logs = [[(record["loss"], record["grad_norm"], record["tau"]) for record in lines(tmp_path / run / "log.jsonl")]
            for run in ("one", "two")]
    for alone, together in zip(*logs, strict=True):
        assert together == pytest.approx(alone, rel=1e-3), "gradients of the other rank's features are missing or doubled"


@pytest.mark.parametrize("wrong, message", [("again", "holds a run already"), ("batch", "at most the"),
                                            ("none", "no report.json"), ("corpus", "is of another corpus")])
def test_a_run_that_cannot_be_right_does_not_start(retrieved, clip, tmp_path, wrong, message):
    """Design: all is checked before step 0."""
    command = training(retrieved, clip, tmp_path / "out")
    if wrong == "again":
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "log.jsonl").touch()
    elif wrong == "batch":
        command[command.index("--global_batch_size") + 1] = "4096"
    else:
        report = json.loads((retrieved / "retrieved" / "report.json").read_text())
        if wrong == "corpus":
            (tmp_path / "report.json").write_text(json.dumps(report | {"crc": 1}))
        command[command.index("--retrieved") + 1] = str(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        react.main(command)


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation, and into LLaVA


def test_a_class_vector_has_length_1_and_templates_count_once_each(clip):
    """Each template's text normalised, their mean normalised; a list of templates said twice gives the same vectors."""
    model, tokenizer = load_clip(clip)
    W = react.class_vectors(model, tokenizer, ["red", "blue"], ["a {}.", "the {}."])
    torch.testing.assert_close(W.norm(dim=-1), torch.ones(2))
    torch.testing.assert_close(W, react.class_vectors(model, tokenizer, ["red", "blue"], ["a {}.", "the {}."] * 2))
    texts = model.texts(tokenise(["a blue.", "the blue."], tokenizer, model.config.text_config))
    torch.testing.assert_close(W[1], F.normalize(texts.mean(0), dim=-1))


def test_recall_counts_a_picture_that_finds_one_of_its_texts():
    """R@K: image 0 has texts 0 and 1, image 1 has text 2."""
    similar = torch.tensor([[0.1, 0.9, 0.5], [0.3, 0.8, 0.2]])
    mine = torch.tensor([[True, True, False], [False, False, True]])
    assert [react.recall_at(similar, mine, k) for k in (1, 2, 5)] == [0.5, 0.5, 1.0]
    assert [round(react.recall_at(similar.T, mine.T, k), 4) for k in (1, 2)] == [0.3333, 1.0]


def test_a_linear_probe_learns_what_is_linear():
    """Logistic regression on features: separable classes are told apart, and random labels are not."""
    torch.manual_seed(0)
    y = torch.arange(120) % 3
    u = F.normalize(F.one_hot(y, 8).float() + 0.1 * torch.randn(120, 8), dim=-1)
    assert react.linear_probe(u[:90], y[:90], u[90:], y[90:], 3) == 1
    assert react.linear_probe(u[:90], y[torch.randperm(90)], u[90:], y[90:], 3) < 0.7


@pytest.mark.slow
def test_base_and_customised_are_compared_in_one_table(retrieved, clip, corpus, tmp_path, capsys):
    """Zero-shot, linear probe and retrieval of each model; numbers are those of a plain loop."""
    react.main(training(retrieved, clip, tmp_path / "out", "--lr", "0.01"))
    labels = str(corpus / "labels.tsv")
    files = ["--classes", str(corpus / "classes.txt"), "--templates", str(corpus / "templates.txt")]
    react.main(["eval", "--models", clip, str(tmp_path / "out"), "--test", labels, "--probe", labels, *files, "--pairs",
                str(corpus / "corpus.tsv"), "--images", str(corpus), "--out", str(tmp_path / "table.json"), *QUICK])
    rows = json.loads((tmp_path / "table.json").read_text())
    assert list(rows) == [clip, str(tmp_path / "out")]
    assert list(rows[clip]) == ["zero-shot", "linear probe", "I2T R@1", "T2I R@1", "I2T R@5", "T2I R@5"]
    said = capsys.readouterr().out
    assert all(f"{100 * value:.1f}" in said for row in rows.values() for value in row.values())
    model, tokenizer = load_clip(str(tmp_path / "out"))
    templates, right = ["a {} square", "a picture of a {} thing"], 0
    W = react.class_vectors(model, tokenizer, ["red", "green", "blue", "white"], templates)
    for i in range(64):
        u = model.images(retrieve.preprocess(Image.open(corpus / f"{i}.png").convert("RGB"), 28)[None])[0]
        right += int((W @ u).argmax()) == i % 4
    assert rows[str(tmp_path / "out")]["zero-shot"] == pytest.approx(right / 64)


@pytest.mark.parametrize("flags, message", [(["--test", "{labels}"], "go together"), ([], "go together"),
                                            (["--test", "{corpus}", "--classes", "{classes}", "--templates", "{templates}"],
                                             "64 class names of the pictures are not in --classes")])
def test_an_evaluation_without_sense_is_refused(clip, corpus, flags, message):
    """What was typed is named."""
    names = {"labels": "labels.tsv", "corpus": "corpus.tsv", "classes": "classes.txt", "templates": "templates.txt"}
    flags = [flag.format(**{key: corpus / name for key, name in names.items()}) for flag in flags]
    with pytest.raises(ValueError, match=message):
        react.main(["eval", "--models", clip, *flags, "--images", str(corpus), *QUICK])


def test_the_customised_tower_is_g_of_a_LLaVA(retrieved, clip, chats, tmp_path):
    """The issue of it all: train.py --vision out/react; both stages keep the gated blocks, and the checkpoint loads again."""
    react.main(training(retrieved, clip, tmp_path / "react", "--lr", "0.05"))
    folder = save_parts(tmp_path)
    common = ["--llm", folder / "llm", "--data", chats / "chat.json", "--images", chats / "images", "--max_steps", "2",
              "--global_batch_size", "4", "--workers", "0", "--template", "llava_v0", "--device", "cpu"]
    code, said = run_script(tmp_path, "train.py", "--stage", "1", "--vision", tmp_path / "react", "--out", "s1", *common)
    assert code == 0 and "g has 2 gated layers (gated.py): only minLLaVA can run" in said, said[-2000:]
    code, said = run_script(tmp_path, "train.py", "--stage", "2", "--init", "s1", "--out", "s2", *common[2:])
    assert code == 0, said[-2000:]
    model, tower = LLaVA.from_pretrained(tmp_path / "s2"), load_part(VisionTower, tmp_path / "react", "vision", torch.float32)
    assert fingerprints(model.g) == fingerprints(tower), "g is not the customised tower"
    base = LLaVA.from_parts(clip, str(folder / "llm"))
    X = torch.randn(2, 3, 28, 28)
    assert not torch.equal(model.grid_features(X), base.grid_features(X))
    assert json.loads((tmp_path / "s2" / "config.json").read_text())["architectures"] == ["GatedLlavaForConditionalGeneration"]
    code, said = run_script(tmp_path, "convert.py", "--to_original", "--model", "s2", "--out", "theirs")
    assert code == 1 and "vision_config.gated_layers in config.json is 2; the original has one of [0]" in said, said
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(tmp_path / "x.png")
    code, said = run_script(tmp_path, "sample.py", "--model", "s2", "--image", "x.png", "--question", "What?",
                            "--max_new_tokens", "3", "--device", "cpu")
    assert code == 0, said


def test_the_toys_corpus_concerns_its_classes_in_part(tmp_path):
    """runs/react_toy.sh: a third of the corpus has a target among its things, and the test's pictures are dark."""
    toy.main(["react", "--out", str(tmp_path), "--pictures", "90", "--tests", "2"])
    classes = retrieve.read_lines(tmp_path / "classes.txt", "class names")
    left_out = []
    corpus, test = ([*retrieve.read_pairs([str(tmp_path / name)], tmp_path / "images", left_out)]
                    for name in ("corpus.tsv", "test.tsv"))
    assert (len(corpus), len(test), len(classes), left_out) == (90, 28, 14, [])
    assert 15 < sum(any(name in pair.text for name in classes) for pair in corpus) <= 30
    assert react.labels_of(test, classes).tolist() == [i // 2 for i in range(28)]
    assert all(np.asarray(pair.picture())[0, 0, 0] <= 120 for pair in test)
