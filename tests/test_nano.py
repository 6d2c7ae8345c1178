"""toy/nano.py: the whole paper in one file, from drawn pictures to answers about held-out ones."""
import random

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
