"""toy/nano.py: the whole paper in one file, from drawn pictures to answers about held-out ones."""
import random

import pytest

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


@pytest.mark.slow
def test_it_answers_about_held_out_pictures_and_needs_them():
    """The paper's two stages teach it to look: at least 80%, and 30 more than without a picture.
    After stage 1 alone it describes, whatever is asked."""
    seen, blind, captioner = nano.main(0)
    assert seen >= 80, "it does not see"
    assert blind <= seen - 30, "the questions give their answers away"
    assert captioner < 10, "stage 2 has nothing left to teach"
