"""
The concept filter of CC3M: 3M image-caption pairs to 595K that cover all concepts (appendix).

    python -m extras.concept_filter --pairs cc3m.tsv --columns "caption image" --out data/cc3m

    captions --noun phrases--> how often each occurs --from the rarest up--> which pairs stay

Noun phrases are found by spaCy, as in the paper, where its en_core_web_sm is installed, and else by
a rough finder of our own. pairs.tsv is what `generate_data.py expand` reads; metadata.json has the
counts, coverage.png shows them.
"""
import re
from array import array
from collections import defaultdict
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from tqdm import tqdm

from parts.annotations import read_caption_pairs
from parts.files import check_least, open_atomic, run_main, typed_flags, write_json

STOP_WORDS = frozenset("""
a an the this that these those some any each every all both either neither no none such own other
another same several many few much more most one two three four five six seven eight nine ten first
second last next it its he him his she her hers they them their we us our you your i me my mine who
whom whose which what there here where when how why while if so as at by for from in into of off on
onto out over under up down with without within along across after against among around before
behind below beneath beside besides between beyond during except inside near outside past since
through throughout till to toward towards until upon via and or but nor yet than then too very just
also only even still not never ever always often again once is are was were be been being am has
have had having do does did doing done can could will would shall should may might must get gets got
getting go goes going gone come comes coming came make makes making made take takes taking took
taken give gives giving put puts show shows showing shown see sees seen look looks looking seem
seems sit sits sitting stand stands standing lie lies lying hold holds holding wear wears wearing
walk walks walking run runs running ride rides riding play plays playing eat eats eating pose poses
posing use uses using used fill fills filled cover covers covered hang hangs hanging like about
because however
""".split())
WORDS = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*|[^\w\s]")


@dataclass(frozen=True)
class Config:
    pairs: str                           # TSV, JSON lines, or a folder of pictures with .txt files
    out: str                             # folder for pairs.tsv, metadata.json, coverage.png
    columns: str = "image caption"       # of a TSV; "caption image" for CC3M's own
    most: int = 100                      # captions that one phrase adds
    least: int = 3                       # occurrences below which a phrase is dropped
    seed: int = 0


# --------------------------------------------------------------------------------------------------
# Noun phrases


def light_phrases(captions):
    """A set of noun phrases for each caption, without a tagger.

    OURS, as rough as it is fast: the runs of words between function words, frequent verbs and
    signs. "a small dog sits on the wooden bench" -> {"small dog", "wooden bench"}.
    """
    for caption in captions:
        phrases = set()
        run = []
        for word in (*WORDS.findall(caption.lower()), "."):
            if word[0].isalpha() and word not in STOP_WORDS:
                run.append(word)
            elif run:
                phrases.add(" ".join(run[-4:]))
                run = []
        yield phrases


def spacy_phrases(captions):
    """The same by spaCy's noun chunks, as the paper has it; determiners are dropped."""
    import spacy
    tagger = spacy.load("en_core_web_sm", exclude=["ner", "lemmatizer"])
    for document in tagger.pipe(captions, batch_size=1000):
        phrases = set()
        for chunk in document.noun_chunks:
            words = [t.lower_ for t in chunk if t.pos_ not in ("DET", "PRON", "PUNCT", "SPACE")]
            phrases.add(" ".join(words))
        yield phrases - {""}


# --------------------------------------------------------------------------------------------------
# The filter


def concept_filter(phrases, most=100, least=3, seed=0):
    """Which captions stay, for an even coverage of concepts.

    phrases   for each caption its set of noun phrases
    Phrases seen fewer than `least` times are dropped. From the rarest of the others up, each adds
    all its captions, or `most` random ones if it has more. OURS: ties in order of first appearance;
    the random ones are drawn from all of a phrase's captions, chosen before or not.
    Returns (stays, before, after): bool for each caption, and how often each phrase occurs in all
    captions and in those that stay.
    """
    found_in = defaultdict(partial(array, "i"))        # {phrase: the captions that have it}
    n = 0
    for phrases_of_caption in phrases:
        for phrase in sorted(phrases_of_caption):
            found_in[phrase].append(n)
        n += 1
    stays = np.zeros(n, bool)
    rng = np.random.default_rng(seed)
    for captions in sorted(found_in.values(), key=len):
        if len(captions) >= least:
            if len(captions) > most:
                captions = rng.choice(captions, most, replace=False)
            stays[np.asarray(captions)] = True
    before = np.array([len(captions) for captions in found_in.values()])
    after = np.array([stays[np.asarray(captions)].sum() for captions in found_in.values()])
    return stays, before, after


def plot_coverage(path, frequencies, least):
    """How often phrases occur, the most frequent first. frequencies: {label: counts}."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(7, 4.5))
    ax = figure.subplots()
    for label, counts in frequencies.items():
        falling = np.sort(counts)[::-1]
        ax.loglog(np.arange(1, len(counts) + 1), np.maximum(falling, 0.5), label=label)
    ax.axhline(least, lw=0.5, color="grey")
    ax.set(xlabel="noun phrases, the most frequent first",
           ylabel="captions with the phrase (at 0.5: none)")
    ax.legend()
    figure.savefig(path, dpi=110)


def filter_pairs(config):
    """Image-caption pairs in, fewer pairs out, with every frequent enough concept in them."""
    has_spacy = find_spec("en_core_web_sm")              # a package of its own, which needs spacy
    find_phrases = spacy_phrases if has_spacy else light_phrases
    pairs = list(read_caption_pairs(config.pairs, config.columns))
    captions = tqdm([caption for _, caption in pairs], unit="caption", disable=None)
    stays, before, after = concept_filter(find_phrases(captions), config.most, config.least,
                                          config.seed)
    if not stays.any():
        raise ValueError(f"{config.pairs}: no noun phrase is in {config.least} of the {len(pairs)} "
                         "captions; lower --least")
    out = Path(config.out)
    with open_atomic(out / "pairs.tsv") as f:
        for (image, caption), is_chosen in zip(pairs, stays, strict=True):
            if is_chosen:
                f.write(f"{image}\t{caption}\n")
    frequent = before >= config.least
    counts = {"pairs": len(pairs), "kept": int(stays.sum()), "phrases": len(before),
              "phrases_frequent": int(frequent.sum()),
              "phrases_covered": int((frequent & (after > 0)).sum()),
              "finder": "spacy" if has_spacy else "light"}
    write_json(out / "metadata.json", {**counts, "settings": asdict(config)})
    labels = {f"all {len(pairs):,} pairs": before, f"kept {counts['kept']:,} pairs": after}
    plot_coverage(out / "coverage.png", labels, config.least)
    for what, n in counts.items():
        print(f"{what:<20} {n}")
    print(f"wrote {out / 'pairs.tsv'}, metadata.json, coverage.png")


def main(argv=None):
    config = Config(**typed_flags(Config, argv, "The concept filter of CC3M."))
    check_least(config, most=1, least=1)
    filter_pairs(config)


if __name__ == "__main__":
    run_main(main)
