"""REACT's evaluations (Diss. Tables 2.2, 2.3, 2.5): data sets, probes, fine-tuning, masks."""
import json

import numpy as np
import pytest
import test_retrieve
import torch
import torch.nn.functional as F
from PIL import Image
from test_retrieve import COLOURS, QUICK, TEMPLATES, square

from extras import maskclip, react, react_eval
from extras.elevater import choose_shots, read_datasets
from extras.retrieve import load_clip, tokenise_for_clip
from parts.views import preprocess

clip = test_retrieve.clip
corpus = test_retrieve.corpus


@pytest.fixture(scope="module")
def datasets(corpus):
    """A list of two data sets: the same pictures, half of them to learn from, with two names."""
    for name in ("labels", "corpus"):
        rows = (corpus / f"{name}.tsv").read_text().splitlines(keepends=True)
        (corpus / f"{name}_train.tsv").write_text("".join(rows[:32]))
        (corpus / f"{name}_test.tsv").write_text("".join(rows[32:]))
    row = {"name": "one", "train": "labels_train.tsv", "test": "labels_test.tsv",
           "classes": "classes.txt", "templates": "templates.txt"}
    path = corpus / "datasets.json"
    path.write_text(json.dumps([row, row | {"name": "two"}]))
    return path


def gated_clip(clip, folder):
    """A CLIP with gated blocks whose gates are open."""
    model, tokenizer = load_clip(clip)
    react.customise(model, "locked_text_gated_image", 2)
    for layer in model.vision_model.encoder.layers:
        torch.nn.init.constant_(layer.gated.alpha_attn, 0.5)
        torch.nn.init.constant_(layer.gated.alpha_dense, -0.5)
    react.save_clip(folder, model, tokenizer)
    return str(folder)


def table_of(out, *argv):
    """What a command writes to --out."""
    react_eval.main([*map(str, argv), "--out", str(out), *QUICK])
    return json.loads(out.read_text())


# -----------------------------------------------------------------------------
# Data sets


@pytest.mark.parametrize("shots, counts", [
    ("5", [5, 5, 2]), ("1%", [1, 1, 1]), ("50%", [20, 4, 1]), ("all", [40, 8, 2])])
def test_shots_are_drawn_from_each_class(shots, counts):
    """Five of each class, or all that there are; a share; the same ones for the same seed."""
    y = torch.tensor([0] * 40 + [1] * 8 + [2] * 2)[torch.randperm(50)]
    chosen = choose_shots(y, shots, seed=3)
    assert y[chosen].bincount().tolist() == counts
    assert len(chosen.unique()) == len(chosen)
    assert torch.equal(chosen, choose_shots(y, shots, seed=3))
    assert shots == "all" or not torch.equal(chosen, choose_shots(y, shots, seed=4))
    for wrong in ("0", "-1", "0.5", "half", "%"):
        with pytest.raises(ValueError, match="a number of pictures a class is needed"):
            choose_shots(y, wrong, seed=0)


@pytest.mark.parametrize("change, message", [
    ({"test": "corpus_test.tsv"}, "32 class names of the pictures are not among the classes"),
    ({"images": "../there"}, "cannot be read"),
    ({"train": "labels.tsv"}, "32 pictures to test on are among those to learn from"),
    ({"name": "mean"}, "none called mean"),
])
def test_a_list_that_cannot_be_right_is_refused(clip, corpus, datasets, change, message):
    """What is wrong is named before a model is loaded, and a missing picture when it is met."""
    row = json.loads(datasets.read_text())[0]
    (corpus / "changed.json").write_text(json.dumps([row | change]))
    with pytest.raises(ValueError, match=message):
        react_eval.main(["probe", "--models", clip, "--datasets", f"{corpus}/changed.json", *QUICK])


# -----------------------------------------------------------------------------
# Classification


def test_a_class_vector_has_length_1_and_templates_count_once_each(clip):
    """Each template's text normalised, their mean normalised; twice the same changes nothing."""
    model, tokenizer = load_clip(clip)
    W = react_eval.class_vectors(model, tokenizer, ["red", "blue"], ["a {}.", "the {}."])
    twice = react_eval.class_vectors(model, tokenizer, ["red", "blue"], ["a {}.", "the {}."] * 2)
    torch.testing.assert_close(W, twice)
    ids = tokenise_for_clip(["a blue.", "the blue."], tokenizer, model.config.text_config)
    torch.testing.assert_close(W[1], F.normalize(model.texts(ids).mean(0), dim=-1))


def test_base_and_customised_are_compared_in_one_table(clip, datasets, tmp_path, capsys):
    """Each model on each data set, as a plain loop has it, and their mean. Fine-tuning begins
    there: at rate 0 it changes nothing."""
    gated = gated_clip(clip, tmp_path / "gated")
    flags = ["--models", clip, gated, "--datasets", datasets]
    table = table_of(tmp_path / "t.json", "zero_shot", *flags)
    printed = capsys.readouterr().out
    assert list(table) == [clip, gated]
    for name, row in table.items():
        model, tokenizer = load_clip(name)
        W = react_eval.class_vectors(model, tokenizer, list(COLOURS), TEMPLATES)
        right = 0
        for i in range(32, 64):
            X_v = preprocess(square(i, list(COLOURS)[i % 4]), 28)[None]
            right += int((W @ model.images(X_v)[0]).argmax()) == i % 4
        assert row == pytest.approx(dict.fromkeys(["one", "two", "mean"], right / 32))
        assert f"{100 * right / 32:.1f}" in printed
    assert table_of(tmp_path / "f.json", "fine_tune", *flags, "--lr", 0, "--epochs", 1) == table


def test_a_probe_is_where_its_gradient_is_zero():
    """Of mean cross-entropy + penalty |W - W_0|^2, by hand; a large penalty leaves W_0."""
    torch.manual_seed(0)
    y = torch.arange(90) % 3
    u = F.normalize(F.one_hot(y, 8).float() + 0.3 * torch.randn(90, 8), dim=-1)
    W_0 = torch.cat([torch.zeros(1, 3), torch.randn(8, 3)])
    W = react_eval.fit_probe(u, y, W_0, 1e-2)
    error = (u @ W[1:] + W[0]).softmax(1) - F.one_hot(y, 3)
    gradient = u.T @ error / 90 + 2e-2 * (W - W_0)[1:]
    assert gradient.abs().max() < 1e-4 and error.mean(0).abs().max() < 1e-4
    torch.testing.assert_close(react_eval.fit_probe(u, y, W_0, 1e4)[1:], W_0[1:], atol=1e-3, rtol=0)


@pytest.mark.parametrize("command", ["probe", "fine_tune"])
def test_who_learns_from_examples_knows_more_than_class_names(
        clip, datasets, tmp_path, command, monkeypatch):
    """Few-shot and full-shot of a random CLIP, whose zero-shot is chance; a seed gives one result,
    and data sets do not learn from each other."""
    monkeypatch.setattr(react_eval, "PENALTIES", (1e-1, 1e-4))
    flags = ["--models", clip, "--datasets", datasets]
    if command == "fine_tune":
        flags += ["--lr", 1e-3, "--epochs", 8, "--batch_size", 8]
    full = table_of(tmp_path / "full.json", command, *flags)[clip]
    few = table_of(tmp_path / "few.json", command, *flags, "--shots", 2)[clip]
    assert full["one"] == full["two"] and full["mean"] > 0.6
    assert 0.3 < few["mean"] <= full["mean"]


def test_fine_tuning_trains_the_image_tower_and_its_head_alone(clip, datasets):
    """The text tower keeps its weights; a loss that is not finite stops the run."""
    base, (model, tokenizer) = load_clip(clip)[0].state_dict(), load_clip(clip)
    config = react_eval.FineTuneConfig(models=[clip], datasets="", epochs=1, lr=0.01, workers=0,
                                       device="cpu")
    [task, _] = read_datasets(datasets, "all")
    react_eval.fine_tuned_accuracy(model, tokenizer, task, config)
    for name, weight in model.state_dict().items():
        if "vision_model.encoder" in name and "k_proj.bias" not in name:
            assert not torch.equal(weight, base[name]), f"{name} has not moved"
        elif "text" in name or name == "logit_scale":
            assert torch.equal(weight, base[name]), f"{name} is not of the image tower"
    torch.nn.init.constant_(model.visual_projection.weight, float("nan"))
    with pytest.raises(ValueError, match="the loss is nan; take a lower --lr"):
        react_eval.fine_tuned_accuracy(model, tokenizer, task, config)


# -----------------------------------------------------------------------------
# Retrieval


def test_recall_counts_a_picture_that_finds_one_of_its_texts():
    """R@K: picture 0 has texts 0 and 1, picture 1 has text 2."""
    similar = torch.tensor([[0.1, 0.9, 0.5], [0.3, 0.8, 0.2]])
    belongs = torch.tensor([[True, True, False], [False, False, True]])
    assert [react_eval.recall_at(similar, belongs, k) for k in (1, 2, 5)] == [0.5, 0.5, 1.0]
    assert react_eval.recall_at(similar.T, belongs.T, 1) == pytest.approx(1 / 3)


def test_fine_tuned_retrieval_finds_more(clip, corpus, datasets, tmp_path):
    """Diss. Table 2.3: zero-shot without --train; with it both towers learn from pairs first. Its
    captions of colours are learnt, its numbers are not."""
    test = corpus / "labels_test.tsv"
    flags = ["retrieval", "--models", clip, "--images", corpus, "--test", test]
    zero = table_of(tmp_path / "zero.json", *flags)[clip]
    assert list(zero) == ["I2T R@1", "T2I R@1", "I2T R@5", "T2I R@5"]
    more = ["--train", corpus / "labels_train.tsv", "--batch_size", 8, "--epochs", 6]
    assert table_of(tmp_path / "same.json", *flags, *more, "--lr", 0)[clip] == zero
    tuned = table_of(tmp_path / "tuned.json", *flags, *more, "--lr", 3e-3)[clip]
    assert tuned["T2I R@5"] > zero["T2I R@5"]
    with pytest.raises(ValueError, match="32 pictures to test on are among those to learn from"):
        table_of(tmp_path / "same.json", *flags, "--train", test)


# -----------------------------------------------------------------------------
# Segmentation


@pytest.mark.parametrize("is_gated", [False, True])
def test_dense_features_are_the_values_of_the_last_layer(clip, tmp_path, is_gated):
    """MaskCLIP: x + out(value(norm(x))), then that layer's MLP, the last norm, the projection."""
    model = load_clip(gated_clip(clip, tmp_path) if is_gated else clip)[0]
    torch.manual_seed(0)
    X_v = torch.randn(2, 3, 28, 28)
    tower, seen = model.vision_model, {}
    layer = tower.encoder.layers[-1]
    layer.layer_norm1.register_forward_hook(lambda *call: seen.update(x=call[1][0]))
    tower(X_v)
    x = seen["x"][:, 1:]                                 # behind the gated block, if there is one
    attention = layer.self_attn
    h = x + attention.out_proj(attention.v_proj(layer.layer_norm1(x)))
    h = h + layer.mlp(layer.layer_norm2(h))
    want = F.normalize(model.visual_projection(tower.post_layernorm(h)), dim=-1)
    torch.testing.assert_close(maskclip.dense_features(model, X_v), want)


def test_mean_iou_of_a_worked_example():
    """Two classes of three pixels each, one of them taken for the other; a third is nowhere."""
    confusion = torch.tensor([[2.0, 1, 0], [0, 3, 0], [0, 0, 0]])
    assert maskclip.mean_iou(confusion) == pytest.approx((2 / 3 + 3 / 4) / 2)


def write_masks(corpus, mask):
    mask.save(corpus / "mask.png")
    (corpus / "masks.tsv").write_text("0.png\tmask.png\n1.png\tmask.png\n")


def test_segmentation_is_scored_pixel_by_pixel(clip, corpus, tmp_path):
    """As sets of pixels, of two pictures together; 255 is not counted."""
    truth = np.random.default_rng(0).integers(0, 4, (30, 30)).astype(np.uint8)
    truth[:5] = 255
    write_masks(corpus, Image.fromarray(truth))
    flags = ["--test", corpus / "masks.tsv", "--images", corpus, "--classes",
             corpus / "classes.txt", "--templates", corpus / "templates.txt"]
    react_eval.main(["segment", "--models", clip, *map(str, flags), "--device", "cpu", "--out",
                     str(tmp_path / "t.json")])
    row = json.loads((tmp_path / "t.json").read_text())[clip]
    model, tokenizer = load_clip(clip)
    W = react_eval.class_vectors(model, tokenizer, list(COLOURS), TEMPLATES)
    found = []
    for i in (0, 1):
        picture = Image.open(corpus / f"{i}.png").resize((28, 28), Image.Resampling.BICUBIC)
        u = maskclip.dense_features(model, preprocess(picture, 28)[None])[0]
        maps = (u @ W.T).T.reshape(1, 4, 2, 2)
        found.append(F.interpolate(maps, (30, 30), mode="bilinear")[0].argmax(0).numpy()[5:])
    there, found = np.stack([truth[5:], truth[5:]]), np.stack(found)
    shares = [((there == c) & (found == c)).sum() / ((there == c) | (found == c)).sum()
              for c in range(4)]
    assert row["mIoU"] == pytest.approx(np.mean(shares))
    assert row["pixels"] == pytest.approx((there == found).mean())


@pytest.mark.parametrize("mask, message", [
    (Image.new("L", (30, 30), 4), r"classes \[4\]; there are 0 to 3, and 255 for pixels"),
    (Image.new("L", (20, 30), 0), r"as large as its picture, \(30, 30\)"),
    (Image.new("RGB", (30, 30)), "needed is a mask in grey or with a palette"),
    (Image.new("I;16", (30, 30), 1), "mode I;16, .*needed is a mask in grey or with a palette"),
])
def test_a_mask_that_does_not_fit_is_refused(clip, corpus, mask, message):
    write_masks(corpus, mask)
    with pytest.raises(ValueError, match=message):
        react_eval.main(["segment", "--models", clip, "--test", f"{corpus}/masks.tsv", "--images",
                         str(corpus), "--classes", f"{corpus}/classes.txt", "--templates",
                         f"{corpus}/templates.txt", "--device", "cpu"])
