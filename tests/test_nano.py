"""toy/nano.py: the whole paper in one file, from drawn pictures to answers about held-out ones."""
import random

import torch

from toy import nano


def test_what_is_spliced_and_what_is_scored():
    """Eq. (2): the picture stands before or after the question; the answer and ### are scored."""
    assert len(set(nano.WORDS)) == len(nano.WORDS), "a word has two ids"
    assert nano.caption_of([("red", "circle", 3)]) == "a red circle at the top right"
    random.seed(0)
    first = set()
    for _ in range(20):
        ids, labels = nano.to_ids("what shape is red ?", "a circle .")
        words = [nano.WORDS[i] for i in ids]
        assert words.count(nano.IMAGE) == nano.N
        scored = [word for word, label in zip(words, labels, strict=True) if label != nano.IGNORE]
        assert scored == ["a", "circle", ".", "###"]
        first.add(words[2])
    assert first == {nano.IMAGE, "what"}, "the picture always stands on the same side"


def test_every_stage_runs_and_stage_1_trains_W_alone():
    """W alone trains in stage 1, all stages run, and what is asked gets an answer. How well it
    sees after all of its steps is in docs/toy.md; that takes minutes."""
    random.seed(0)
    torch.manual_seed(0)
    scenes = [nano.random_scene() for _ in range(100)]
    X_v = torch.stack([nano.paint(scene) for scene in scenes])
    model = nano.TinyLLaVA(nano.learn_to_see(scenes, X_v, steps=8), nano.TinyLM())
    before = {name: p.clone() for name, p in model.named_parameters()}
    nano.learn_to_answer("stage 1", model, scenes, X_v, steps=8, lr=3e-3)
    moved = {name for name, p in model.named_parameters() if not torch.equal(before[name], p)}
    assert moved == {"W.weight", "W.bias"}, "theta is not {W} in stage 1"
    for phase in ("notes", "stage 2"):
        nano.learn_to_answer(phase, model, scenes, X_v, steps=8, lr=1e-3)
    X_q, X_a = nano.ask_about(scenes[0])
    assert isinstance(nano.answer_to(model, X_q, X_v[0]), str)
    assert 0 <= nano.percent_exact(model, [(X_q, X_a)], X_v[:1]) <= 100
