"""Looking inside: attention, alternatives and ranking against transformers, tiles on a drawing."""
import numpy as np
import pytest
import torch
from conftest import chat, noise, tiny_llava
from PIL import Image
from test_sample import save_checkpoint

import sample
from data import collate
from extras import probe
from parts.views import view_of


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_checkpoint(tiny_llava(), tmp_path_factory.mktemp("probe") / "model", "vicuna_v1")


@pytest.fixture(scope="module")
def talker(folder):
    return sample.Talker(sample.Config(str(folder), temperature=0.0, max_new_tokens=12))


def outputs_behind(talker, turns, pictures, text, **more):
    """transformers' outputs for a prompt and a text behind it, the ids, and the prompt's length."""
    prompt = talker.prompt(turns, pictures)
    new = talker.model.tokenizer.encode(text, add_special_tokens=False)
    ids = torch.tensor([prompt["input_ids"] + new])
    batch = collate([prompt], talker.view)
    with torch.no_grad():
        H = talker.model.splice(ids, batch["X_v"], batch["visual_index"])
        outputs = talker.model.f_phi(inputs_embeds=H, **more)
    return outputs, ids[0], len(prompt["input_ids"])


def test_attention_is_what_transformers_reports_for_the_tokens_of_each_word(talker):
    """output_attentions of eager attention: a map's sum is the share on the picture's tokens."""
    turns, pictures = [sample.human_turn("What is 0.0?", 1)], [noise(seed=3)]
    words = probe.words_and_attention(talker, turns, pictures, "a b\u00e9 c", "1", "0,-1")
    assert [word for word, _ in words] == ["a", "b\u00e9", "c"]
    talker.model.f_phi.set_attn_implementation("eager")
    outputs, ids, n = outputs_behind(talker, turns, pictures, " a b\u00e9 c",
                                     output_attentions=True)
    talker.model.f_phi.set_attn_implementation("sdpa")
    weights = outputs.attentions[1][0, [0, 3]].mean(0)                       # (T, T)
    on_picture = weights[:, ids == talker.model.image_id].sum(1)             # (T,)
    # a byte is a token: " ", "a", " ", "b", two of "\u00e9", " ", "c"
    for (_, (heat,)), span in zip(words, ([1], [3, 4, 5], [7]), strict=True):
        expected = on_picture[[n - 1 + k for k in span]].mean().item()
        assert heat.sum() == pytest.approx(expected, rel=1e-3), "not the positions that predict it"
        assert heat.shape == (336, 448)


@pytest.mark.parametrize("aspect, size", [("crop", (300, 200)), ("pad", (300, 200)),
                                          ("squeeze", (300, 200)), ("anyres", (300, 200)),
                                          ("hd", (130, 500))])
def test_a_map_is_bright_where_the_patch_lay(aspect, size):
    """The patch around a point is found by painting that point: there the map must be bright."""
    view = view_of(aspect, 56, 14)
    black = Image.new("RGB", size)
    for point in [(0.5, 0.5), (0.35, 0.6), (0.6, 0.3)]:
        x, y = (int(share * side) for share, side in zip(point, size, strict=True))
        painted = black.copy()
        painted.paste((255, 255, 255), (x - 9, y - 9, x + 9, y + 9))
        change = (view.X_v(painted) - view.X_v(black)).abs().mean(1)         # (squares, 56, 56)
        patches = torch.nn.functional.avg_pool2d(change[:, None], 14).flatten()
        patches = torch.cat([patches, torch.zeros(1)])       # NEWLINE, -1, is the last
        heat = probe.map_of(view, size, patches[view.index(*size)])
        row, column = np.unravel_index(heat.argmax(), heat.shape)
        scale = probe.MAP_SIDE / max(size)
        patch = 14 / 56 * (min(size) if aspect == "crop" else max(size))
        assert abs(column / scale - x) < patch and abs(row / scale - y) < patch, (aspect, point)


def test_alternatives_are_the_likeliest_ids_of_each_step(talker):
    """Greedily, the first alternative is what was said, with the probability of Eq. (3)."""
    turns, pictures = [sample.human_turn("Who?", 1)], [noise(seed=3)]
    answer, ids, p = probe.alternatives(talker, turns, pictures, 3)
    expected = talker.answers([(turns, pictures)])[0]
    assert talker.model.to_text(answer.tolist(), ["</s>"]) == expected
    assert torch.equal(ids[:, 0], answer) and ids.shape == p.shape == (12, 3)
    assert (p[:, :-1] >= p[:, 1:]).all() and (p > 0).all() and (p.sum(1) <= 1).all()


def test_given_answers_are_ranked_by_their_likelihood(talker):
    """log p of Eq. (3): the sum over an answer's tokens and STOP's; not over earlier answers'."""
    turns, pictures = chat("<image>\nWho?", "me", "Why?"), [noise(seed=3)]
    ranked = probe.rank_answers(talker, turns, pictures, ["yes", "no", "a longer answer"])
    assert [log_p for log_p, _ in ranked] == sorted((log_p for log_p, _ in ranked), reverse=True)
    for log_p, answer in ranked:
        outputs, ids, n = outputs_behind(talker, turns, pictures, f" {answer}</s>")
        log_probabilities = outputs.logits[0].log_softmax(-1)
        expected = sum(log_probabilities[k - 1, ids[k]].item() for k in range(n, len(ids)))
        assert log_p == pytest.approx(expected, rel=1e-4)


def test_the_commands_print_and_draw_and_name_what_is_wrong(folder, tmp_path, capsys):
    """Each command once; a layer that there is not is named."""
    noise((80, 60), 3).save(tmp_path / "x.png")
    image = ["--image", str(tmp_path / "x.png")]
    asked = ["--model", str(folder), *image, "--question", "Who?", "--max_new_tokens", "6"]
    probe.main(["alternatives", *asked, "--top", "2"])
    assert len(capsys.readouterr().out.strip().split("\n")) == 6
    probe.main(["rank", *asked, "--answers", "yes", "no"])
    assert {line.split()[1] for line in capsys.readouterr().out.splitlines()} == {"yes", "no"}
    attention = ["attention", *asked, "--out", str(tmp_path / "looks"), "--layers"]
    probe.main([*attention, "0,-1"])
    assert Image.open(tmp_path / "looks").width > 100
    for layers in ("7", "x"):
        with pytest.raises(ValueError, match=f"--layers '{layers}': numbers .* 0 to 1"):
            probe.main([*attention, layers])
    probe.main(["tiles", *image, "--out", str(tmp_path / "tiles.png")])
    assert "(80, 60) pixels" in capsys.readouterr().out
    assert Image.open(tmp_path / "tiles.png").size == (336 + 14 + 336 + 14, 672)
