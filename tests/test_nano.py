"""toy/nano.py: the whole paper in one file, from drawn pictures to answers about held-out ones."""
import random

import pytest
import torch

from toy import nano


def test_what_is_spliced_and_what_is_scored():
    """Eq. (2): the picture stands before or after the question; the answer and ### are scored."""
    scene = [(2, "red", "circle")]
    assert nano.caption_of(scene) == "a red circle at the top right"
    input_ids, labels = nano.to_ids([("what shape is red ?", "a circle .")] * 20)
    seen = set()
    for ids, scored in zip(input_ids, labels, strict=True):
        words = [nano.WORDS[i] for i in ids]
        assert words.count(nano.IMAGE) == nano.N
        assert [nano.WORDS[i] for i in scored if i != nano.IGNORE] == ["a", "circle", ".", "###"]
        assert torch.equal(ids[-4:], scored[-4:])
        seen.add(words[2])
    assert seen == {nano.IMAGE, "what"}, "the picture always stands on the same side"


def test_H_v_stands_where_the_placeholders_are_and_padding_changes_no_loss():
    """Other pictures change the loss; a longer sample beside it leaves a sample's logits alone."""
    torch.manual_seed(0)
    model = nano.TinyLLaVA()
    short = ("where is the star ?", "the star is at the top left .")
    long = (nano.DESCRIBE, nano.caption_of([(0, "red", "star"), (4, "blue", "circle")]))
    H_v = torch.randn(2, nano.N, nano.D)
    random.seed(0)
    alone, _ = nano.to_ids([short])
    random.seed(0)
    padded, _ = nano.to_ids([short, long])
    T = alone.shape[1]
    assert padded.shape[1] > T
    logits = model(padded, H_v)
    assert torch.allclose(logits[:1, :T], model(alone, H_v[:1]), atol=1e-4)
    assert not torch.allclose(logits[:1, :T], model(alone, H_v[1:]), atol=1e-2), "nobody looks"


def test_every_stage_runs_and_stage_1_trains_W_alone():
    """A few steps of everything, and an answer to what is asked."""
    random.seed(0)
    torch.manual_seed(0)
    scenes = [nano.random_scene() for _ in range(100)]
    X_v = torch.stack([nano.paint(scene) for scene in scenes])
    model = nano.TinyLLaVA()
    nano.learn_to_see(model.g, scenes, X_v, steps=8)
    nano.learn_to_write(model, scenes, steps=8)
    for stage, trained in ((1, {"W"}), (2, {"W", "f_phi"})):
        before = {name: p.clone() for name, p in model.named_parameters()}
        nano.train_stage(stage, model, scenes, X_v, steps=8, lr=1e-3)
        moved = {name.split(".")[0] for name, p in model.named_parameters()
                 if not torch.equal(before[name], p)}
        assert moved == trained, f"theta of stage {stage}"
    pairs = [nano.ask_about(scene) for scene in scenes]
    assert 0 <= nano.percent_exact("8 steps", model, pairs[:5], X_v) <= 100


@pytest.mark.slow
def test_trained_for_real_it_answers_about_held_out_pictures_and_blind_it_cannot():
    """docs/toy.md; about four minutes of one core."""
    seen, blind, _ = nano.main(seed=0)
    assert seen >= 80, "it no longer learns to answer about pictures that it has not seen"
    assert blind <= seen - 30, "its answers do not come from the pictures"
