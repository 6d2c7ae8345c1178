"""REACT (Diss. Ch. 2): gated blocks, the loss and training, on a tiny CLIP."""
import json
import math
import shutil

import pytest
import test_retrieve
import torch
import torch.nn.functional as F
from conftest import byte_tokenizer, killed_when, lines, run_ranks, run_script, save_parts
from test_retrieve import run_index, run_retrieve
from transformers import CLIPConfig, CLIPModel
from transformers.models.clip.modeling_clip import image_text_contrastive_loss

from extras import react
from extras.retrieve import load_clip, tokenise_for_clip
from model import LLaVA
from parts.checkpoints import load_part
from parts.gated import GatedLayer, gate
from parts.run import fingerprints
from parts.towers import CLIPTower

pytest.importorskip("faiss")
QUICK = ["--workers", "0", "--device", "cpu"]


clip = test_retrieve.clip
corpus = test_retrieve.corpus


@pytest.fixture(scope="module")
def retrieved(clip, corpus, tmp_path_factory):
    out = tmp_path_factory.mktemp("retrieved")
    run_index(clip, corpus, out / "index")
    run_retrieve(clip, corpus, out / "index", out / "pairs", k=12, keys=["image", "text"])
    return out / "pairs"


def training(retrieved, clip, out, *more):
    argv = ["train", "--clip", clip, "--retrieved", retrieved, "--out", out, "--gated_layers", 2,
            "--global_batch_size", 8, "--max_steps", 6, "--epochs", 9, *QUICK, *more]
    return [str(word) for word in argv]


def tiny_inputs(clip):
    torch.manual_seed(0)
    texts = ["a red thing", "blue", "a very long green thing"]
    ids = tokenise_for_clip(texts, byte_tokenizer(), clip.config.text_config)
    return torch.randn(3, 3, 28, 28), ids


# -----------------------------------------------------------------------------
# Gated blocks

B_16 = {"patch_size": 16}
L_14 = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
        "num_attention_heads": 16, "patch_size": 14}
BIG_G = {"hidden_size": 1664, "intermediate_size": 8192, "num_hidden_layers": 48,
         "num_attention_heads": 16, "patch_size": 14}


REACT = "locked_text_gated_image"


@pytest.mark.parametrize("row, count, gamma, vision, k", [
    ("locked_image", 63_428_096, 1.0, {}, 6), ("locked_text", 88_111_360, 0.9, {}, 6),
    ("full", 151_277_312, 1.0, {}, 6), ("gated_text", 18_914_316, 1.0, {}, 6),
    (REACT, 42_527_244, 0.9, {}, 6), ("gated_both", 61_441_560, 1.0, {}, 6),
    pytest.param(REACT, 42_527_244, 0.9, B_16, 6, marks=pytest.mark.slow),
    pytest.param(REACT, 75_577_356, 0.9, L_14, 6, marks=pytest.mark.slow),
    pytest.param(REACT, 398_980_632, 0.9, BIG_G, 12, marks=pytest.mark.slow)])
def test_each_row_of_table_2_6_trains_as_many_parameters_as_it_says(row, count, gamma, vision, k):
    """Diss. Table 2.6, ViT-B/32: 63.4M, 88.1M, 151.3M, 18.9M, 42.5M, besides logit_scale; then the
    public code's other towers, 12 D_v^2 + 13 D_v + 2 a block. Gamma is 1 where texts train."""
    with torch.device("meta"):
        clip = CLIPModel(CLIPConfig(vision_config=vision))
    theta = react.customise(clip, row, k)
    assert sum(p.numel() for p in theta.values()) == count + 1
    assert react.choose_gamma(None, theta) == gamma and react.choose_gamma(0.8, theta) == 0.8


def test_without_gates_it_is_transformers_CLIP(clip):
    """Features and similarities of transformers.CLIPModel, within 1e-6."""
    ours, theirs = load_clip(clip)[0], CLIPModel.from_pretrained(clip).eval()
    X, ids = tiny_inputs(ours)
    u, v, tau = ours(X, ids)
    want = theirs(input_ids=ids, pixel_values=X)
    torch.testing.assert_close(u, want.image_embeds, atol=1e-6, rtol=0)
    torch.testing.assert_close(v, want.text_embeds, atol=1e-6, rtol=0)
    torch.testing.assert_close(tau * u @ v.T, want.logits_per_image, atol=1e-5, rtol=0)


@pytest.mark.parametrize("row", react.ROWS)
def test_before_training_every_row_is_its_base_bit_for_bit(row, clip):
    """Diss. Fig. 2.3: tanh(0) = 0; open gates change the output."""
    model = load_clip(clip)[0]
    X, ids = tiny_inputs(model)
    u, v, _ = model(X, ids)
    react.customise(model, row, 2)
    u_closed, v_closed, _ = model(X, ids)
    assert torch.equal(u, u_closed) and torch.equal(v, v_closed)
    for name, p in model.named_parameters():
        if "alpha" in name:
            torch.nn.init.constant_(p, 0.3)
    u_open, v_open, _ = model(X, ids)
    assert torch.equal(u, u_open) == ("vision_model" not in react.ROWS[row][0])
    assert torch.equal(v, v_open) == ("text_model" not in react.ROWS[row][0])


def test_a_gated_text_tower_sees_no_later_word(clip):
    """The causal mask reaches the gated attention."""
    model = load_clip(clip)[0]
    react.customise(model, "gated_text", 2)
    for layer in model.text_model.encoder.layers:
        torch.nn.init.ones_(layer.gated.alpha_attn)
    ids = torch.tensor([[1, 50, 60, 70, 80, 0], [1, 50, 60, 71, 90, 0]])
    h = model.text_model(ids).last_hidden_state
    assert torch.equal(h[0, :3], h[1, :3]) and not torch.equal(h[0, 3:], h[1, 3:])


def test_gated_blocks_stand_immediately_before_the_last_k_layers(clip):
    """Layers 6 to 11 of B/32; a block's output is what its layer gets."""
    with torch.device("meta"):
        large = CLIPModel(CLIPConfig())
        gate(large.vision_model, 6)
    is_gated = [isinstance(layer, GatedLayer) for layer in large.vision_model.encoder.layers]
    assert is_gated == [False] * 6 + [True] * 6
    model, seen = load_clip(clip)[0], {}
    gate(model.vision_model, 1)
    before, layer = model.vision_model.encoder.layers
    before.register_forward_hook(lambda *call: seen.update(before=call[2]))
    layer.layer_norm1.register_forward_hook(lambda *call: seen.update(input=call[1][0]))
    torch.nn.init.ones_(layer.gated.alpha_dense)
    X, _ = tiny_inputs(model)
    model.images(X)
    torch.testing.assert_close(seen["input"], layer.gated(seen["before"]))
    assert not torch.equal(seen["input"], seen["before"])
    with pytest.raises(ValueError, match="gated_layers 3: this tower has 2 layers"):
        gate(model.text_model, 3)


def test_in_the_first_step_only_the_gates_have_a_gradient(clip):
    """2 k scalars and logit_scale; all that lies behind a closed gate gets exactly 0."""
    model = load_clip(clip)[0]
    theta = react.customise(model, "locked_text_gated_image", 2)
    u, v, tau = model(*tiny_inputs(model))
    react.react_loss(u, v, tau, 0.9).backward()
    names = [name.rsplit(".", 1)[-1] for name, p in theta.items() if p.grad.any()]
    assert sorted(names) == ["alpha_attn"] * 2 + ["alpha_dense"] * 2 + ["logit_scale"]


# -----------------------------------------------------------------------------
# The loss


def unit_vectors():
    u = torch.tensor([[1, 0, 0], [0.8, 0.6, 0], [0, 1, 0], [0, 0.6, 0.8]], dtype=torch.float64)
    v = torch.tensor([[1, 0, 0], [0.96, 0.28, 0], [0, 1, 0], [0, 0, 1]], dtype=torch.float64)
    return u, v


@pytest.mark.parametrize("gamma, loss", [(0.9, 3.643694634089292), (1.0, 1.883694634089293)])
def test_the_loss_of_a_worked_example(gamma, loss):
    """Diss. Eqs. 2.4-2.6, tau 10; at gamma 0.9 the first two texts are positives of both pictures.
    With one positive each it is 2 B times the loss of CLIP."""
    u, v = unit_vectors()
    ours = react.react_loss(u, v, 10.0, gamma).item()
    assert ours == pytest.approx(loss, abs=1e-12)
    if gamma == 1:
        assert ours == pytest.approx(8 * image_text_contrastive_loss(10 * v @ u.T).item())


def test_a_pair_is_its_own_positive_whatever_rounding_says():
    """In float32 v . v is often less than 1; without the diagonal the loss would be NaN."""
    v = F.normalize(torch.randn(64, 48, generator=torch.Generator().manual_seed(0)), dim=-1)
    assert ((v @ v.T).diagonal() < 1).any()
    assert math.isfinite(react.react_loss(v, v, 10.0, 1.0).item())


# -----------------------------------------------------------------------------
# Training


@pytest.mark.parametrize("row", react.ROWS)
def test_what_is_locked_is_bit_identical_after_training(retrieved, clip, tmp_path, row):
    """Diss. Table 2.6: what a row locks stays as it was; what it trains has moved."""
    out = tmp_path / "out"
    react.main(training(retrieved, clip, out, "--train", row, "--lr", "0.01", "--no-augment"))
    base, trained = load_clip(clip)[0], load_clip(str(out))[0]
    theta = react.customise(load_clip(clip)[0], row, 2)
    before, after = fingerprints(base), fingerprints(trained)
    assert after.keys() == before.keys() | theta.keys()
    for name in before.keys() - theta.keys():
        assert after[name] == before[name], f"{name} is locked and has changed"
    moved = [after[name] != before.get(name) for name in theta]
    assert sum(moved) > 0.9 * len(theta)
    for name in theta:
        assert "alpha" not in name or trained.get_parameter(name).abs() > 1e-5, "a closed gate"
    losses = [record["loss"] for record in lines(out / "log.jsonl")]
    assert len(losses) == 6 and losses[-1] < losses[0]


def test_the_logit_scale_stays_below_100_and_is_shown(retrieved, clip, tmp_path, capsys):
    """Clamped to [0, ln 100] after each step. Layers that run again give the same losses."""
    model, tokenizer = load_clip(clip)
    torch.nn.init.constant_(model.logit_scale, math.log(100))
    react.save_clip(tmp_path / "clip", model, tokenizer)
    logs = []
    for flag in ("--no-checkpoint_activations", "--checkpoint_activations"):
        react.main(training(retrieved, tmp_path / "clip", tmp_path / flag, flag, "--lr", "0.01"))
        logs.append(lines(tmp_path / flag / "log.jsonl"))
    assert all(record["tau"] <= 100.001 for record in logs[0])
    assert capsys.readouterr().out.count(f"| tau {logs[0][0]['tau']:6.2f} |") >= 2
    losses = [[record["loss"] for record in log] for log in logs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.slow
def test_a_killed_customisation_goes_on_bit_for_bit(retrieved, clip, tmp_path):
    """SIGKILL after a saved step, then --resume: the log and the weights of an undisturbed run."""
    argv = training(retrieved, clip, "out", "--save_every", 1, "--max_steps", 30, "--lr", 0.01)
    folders = [tmp_path / "left_alone", tmp_path / "killed"]
    for folder in folders:
        folder.mkdir()
    assert run_script(folders[0], "extras.react", *argv)[0] == 0
    assert killed_when(lambda: list(folders[1].glob("out/train_state/step_*[3-9]")), folders[1],
                       argv, script="extras.react"), "it ended before the kill"
    code, shown = run_script(folders[1], "extras.react", *argv, "--resume")
    assert code == 0 and "resuming at step" in shown, shown
    logs = [{record["step"]: record["loss"] for record in lines(folder / "out/log.jsonl")}
            for folder in folders]
    assert logs[0] == logs[1] and len(logs[0]) == 30
    one, two = ((folder / "out/model.safetensors").read_bytes() for folder in folders)
    assert one == two


@pytest.mark.slow
def test_two_ranks_customise_as_one(retrieved, clip, tmp_path):
    """The global batch's features are gathered with gradients."""
    more = ["--lr", "0.01", "--train", "full"]
    react.main(training(retrieved, clip, tmp_path / "one", *more))
    run_ranks(tmp_path, 2, "extras.react", *training(retrieved, clip, tmp_path / "two", *more))
    logs = [[(record["loss"], record["grad_norm"], record["tau"]) for record in lines(path)]
            for path in (tmp_path / "one/log.jsonl", tmp_path / "two/log.jsonl")]
    for alone, together in zip(*logs, strict=True):
        assert together == pytest.approx(alone, rel=1e-3), "gradients are missing or doubled"


def test_a_customisation_that_cannot_be_right_does_not_start(retrieved, clip, tmp_path):
    """A batch larger than the pairs, rows that are no pairs, doubled, missing or of another type,
    pairs of another corpus, a folder with a run."""
    folder = shutil.copytree(retrieved, tmp_path / "pairs")

    def is_refused(message, *more):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            react.main(training(folder, clip, tmp_path / "out", *more))
    is_refused("at most the", "--global_batch_size", "4096")
    rows = (folder / "retrieved.jsonl").read_text().splitlines(keepends=True)
    for changed in ([*rows[1:], '{"pair": 64}\n'], [*rows[1:], '{"pair": -3}\n'], rows + rows[:1],
                    [*rows[1:], rows[1]], rows[1:]):
        (folder / "retrieved.jsonl").write_text("".join(changed))
        is_refused("retrieved.jsonl: .*; retrieve again")
    (folder / "retrieved.jsonl").write_text('{"pair": "3"}\n')
    is_refused("pair: '3' where a whole number belongs")
    test_retrieve.change_facts(folder / "report.json", crc=1)
    is_refused("is of another corpus")
    (folder / "report.json").unlink()
    is_refused("No such file.*report.json")
    (tmp_path / "out" / "log.jsonl").touch()
    is_refused("holds a run already")


# -----------------------------------------------------------------------------
# Into LLaVA


def test_the_customised_tower_is_g_of_a_LLaVA(retrieved, clip, chats, tmp_path):
    """train.py --vision out/react: both stages keep the gated blocks, the checkpoint loads again,
    and does not say that it is a plain LLaVA."""
    import train
    react.main(training(retrieved, clip, tmp_path / "react", "--lr", "0.05"))
    folder = save_parts(tmp_path)
    common = ["--data", chats / "chat.json", "--images", chats / "images", "--max_steps", 1,
              "--global_batch_size", 4, "--workers", 0, "--template", "llava_v0"]
    one = ["--stage", 1, "--vision", tmp_path / "react", "--llm", folder / "llm", "--out",
           tmp_path / "s1", *common]
    two = ["--stage", 2, "--init", tmp_path / "s1", "--out", tmp_path / "s2", *common]
    for argv in (one, two):
        assert train.main([str(word) for word in argv]) == 0
    model = LLaVA.from_pretrained(tmp_path / "s2")
    tower = load_part(CLIPTower, str(tmp_path / "react"), torch.float32, "vision")
    assert fingerprints(model.g) == fingerprints(tower), "g is not the customised tower"
    assert any(isinstance(layer, GatedLayer) for layer in model.g.encoder.layers)
    config = json.loads((tmp_path / "s2" / "config.json").read_text())
    assert config["architectures"] == ["GatedLlavaForConditionalGeneration"]
