"""toy/nano.py: the whole paper in one file, from drawn pictures to answers about held-out ones."""
import random

import torch

from toy import nano


def test_what_is_spliced_and_what_is_scored():
    """Eq. (2): the picture stands before or after the question; the answer and ### are scored."""
    rng = random.Random(0)
    scene = [("red", "circle", (0, 3))]
    assert nano.caption_of(scene) == "a red circle at the top right"
    seen = set()
    for _ in range(20):
        ids, labels = nano.to_ids("what shape is red ?", "a circle .", rng)
        words = [nano.WORDS[i] for i in ids]
        assert words.count(nano.IMAGE) == nano.N
        scored = [word for word, label in zip(words, labels, strict=True) if label != nano.IGNORE]
        assert scored == ["a", "circle", ".", "###"]
        seen.add(words[2])
    assert seen == {nano.IMAGE, "what"}, "the picture always stands on the same side"


def test_every_stage_runs_and_stage_1_trains_W_alone():
    """What is asked gets an answer. How well it sees after all of its steps is in docs/toy.md; that
    takes minutes."""
    rng = random.Random(0)
    torch.manual_seed(0)
    scenes = [nano.random_scene(rng) for _ in range(100)]
    X_v = torch.stack([nano.paint(scene, rng) for scene in scenes])
    g = nano.learn_to_see(scenes, X_v, rng, steps=8)
    model = nano.TinyLLaVA(g, nano.learn_to_write(scenes, rng, steps=8))
    for stage, trained in ((1, {"W"}), (2, {"W", "f_phi"})):
        before = {name: p.clone() for name, p in model.named_parameters()}
        nano.train_stage(stage, model, scenes, X_v, rng, steps=8, lr=1e-3)
        moved = {name.split(".")[0] for name, p in model.named_parameters()
                 if not torch.equal(before[name], p)}
        assert moved == trained, f"theta of stage {stage}"
    questions, truths = zip(*[nano.ask_about(scene, rng) for scene in scenes], strict=True)
    percent, answers = nano.percent_exact(model, questions, truths, X_v)
    assert 0 <= percent <= 100 and len(answers) == 100
