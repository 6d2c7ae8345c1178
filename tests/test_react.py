"""REACT (Diss. Ch. 2): gated blocks, the loss, what trains, and a run from corpus to table."""
import json

import numpy as np
import pytest
import torch
from conftest import byte_tokenizer
from PIL import Image
from transformers import CLIPConfig, CLIPModel
from transformers.models.clip.modeling_clip import image_text_contrastive_loss

from extras import react, retrieve
from parts.gated import GatedCLIP, gate

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220)}


def tiny_clip(cls=CLIPModel):
    torch.manual_seed(0)
    tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
             "num_attention_heads": 2}
    words = {"vocab_size": 320, "max_position_embeddings": 40, "bos_token_id": 1,
             "eos_token_id": 0, "pad_token_id": 0}
    return cls(CLIPConfig(projection_dim=24, text_config=tower | words,
                          vision_config=tower | {"image_size": 28, "patch_size": 14})).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny CLIP, and a corpus: squares of a colour on grey."""
    pytest.importorskip("faiss")
    out = tmp_path_factory.mktemp("react")
    tiny_clip().save_pretrained(out / "clip")
    byte_tokenizer().save_pretrained(out / "clip")
    rng = np.random.default_rng(0)
    rows = []
    for i in range(48):
        name = list(COLOURS)[i % 3]
        pixels = rng.integers(90, 130, (32, 32, 3), dtype=np.uint8)
        pixels[8:24, 8:24] = COLOURS[name]
        Image.fromarray(pixels).save(out / f"{i}.png")
        rows.append(f"{i}.png\ta {name} square\n")
    (out / "corpus.tsv").write_text("".join(rows))
    (out / "test.tsv").write_text("".join(row.replace("a ", "").replace(" square", "")
                                          for row in rows[:12]))
    (out / "classes.txt").write_text("red\ngreen\nblue\n")
    (out / "templates.txt").write_text("a {} square\na {}.\n")
    retrieve.main(words("index", out, clip="clip", corpus="corpus.tsv", images=".", out="index")
                  + ["--workers", "0"])
    retrieve.main(words("retrieve", out, index="index", clip="clip", classes="classes.txt",
                        templates="templates.txt", out="retrieved") + ["--k", "6"])
    return out


def words(command, root, **paths):
    """A command line whose values are paths below `root`."""
    argv = [command]
    for flag, path in paths.items():
        argv += [f"--{flag}", str(root / path)]
    return argv


def train(folder, out, *flags):
    argv = words("train", folder, clip="clip", retrieved="retrieved") + ["--out", str(out)]
    return react.main([*argv, "--global_batch_size", "4", "--epochs", "2", "--workers", "0",
                       "--gated_layers", "2", "--lr", "1e-3", *flags])


def test_with_gamma_1_the_loss_is_clips_own():
    """Diss. Eqs. 2.4-2.6: 2 B times CLIP's loss where no text is another's positive."""
    torch.manual_seed(0)
    u, v = (torch.nn.functional.normalize(torch.randn(5, 8), dim=-1) for _ in range(2))
    loss = react.react_loss(u, v, torch.tensor(7.0), 1.0) / 10
    torch.testing.assert_close(loss, image_text_contrastive_loss(7 * v @ u.T))


def test_equal_texts_are_positives_of_each_other():
    """Diss. Eq. 2.4, against a slow loop over P(i)."""
    torch.manual_seed(1)
    u = torch.nn.functional.normalize(torch.randn(4, 8), dim=-1)
    v = torch.nn.functional.normalize(torch.randn(4, 8), dim=-1)
    v[2] = v[0]
    logits = 5 * u @ v.T
    want = 0.0
    for i in range(4):
        positives = [k for k in range(4) if k == i or v[k] @ v[i] >= 0.9]
        for k in positives:
            want -= logits[i].log_softmax(0)[k] / len(positives)
            want -= logits[:, i].log_softmax(0)[k] / len(positives)
    torch.testing.assert_close(react.react_loss(u, v, torch.tensor(5.0), 0.9), want)


def test_gates_start_as_clip_bit_for_bit():
    """Diss. Fig. 2.3: both alphas are 0."""
    clip = tiny_clip(GatedCLIP)
    X = torch.randn(2, 3, 28, 28)
    with torch.no_grad():
        before = clip.images(X)
        gate(clip.vision_model, 2)
        assert torch.equal(clip.images(X), before)


@pytest.mark.parametrize("row, n", [
    ("locked_text_gated_image", 42.5), ("locked_text", 88.1), ("locked_image", 63.4),
    ("gated_text", 18.9), ("full", 151.3)])
def test_each_row_trains_the_published_number_of_parameters(row, n):
    """Diss. Table 2.6, for CLIP ViT-B/32, in millions."""
    text = {"hidden_size": 512, "intermediate_size": 2048, "num_attention_heads": 8}
    config = CLIPConfig(text_config=text, vision_config={"patch_size": 32})
    with torch.device("meta"):
        theta = react.customise(GatedCLIP(config), row, 6)
    assert sum(p.numel() for p in theta.values()) / 1e6 == pytest.approx(n, abs=0.06)


def test_a_run_is_a_function_of_its_seed_and_its_clip_can_be_evaluated(folder, tmp_path):
    """From the corpus to the table by the real commands; how often it saves changes nothing."""
    train(folder, tmp_path / "one")
    (tmp_path / "two").mkdir()
    train(folder, tmp_path / "two", "--save_every", "2")
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("one", "two")]
    assert weights[0] == weights[1]
    react.main(["eval", "--models", str(folder / "clip"), str(tmp_path / "one"),
                "--test", str(folder / "test.tsv"), "--images", str(folder),
                "--classes", str(folder / "classes.txt"), "--workers", "0",
                "--templates", str(folder / "templates.txt"), "--out", str(tmp_path / "t.json")])
    assert json.loads((tmp_path / "t.json").read_text())
