"""A small world of one's own: parts for the toy's recipe that know its pictures and its words.

    python -m toy.own parts --captions captions.json --questions questions.json --images DIR \\
        --out out/own
    python -m toy.own ask --model out/own/stage2 --questions held_out.jsonl --images DIR \\
        --data questions.json --answers out/own/answers.jsonl

The toy's tower knows eight colours and six shapes, and its language model 741 words. Of other words
it can say none, whatever W does: stage 1 has nothing to point at. So both parts are made anew, of
the data that the two stages train on. Everything here is OURS.

    clip    learns which words the caption of a picture has, from the patches that show them
    llm     learns to answer about captions: their clauses stand where LLaVA has visual tokens

The language model sees no picture, as Vicuna saw none. Between these two commands lie both stages
of train.py, see docs/training.md.
"""
import random
import re
from collections import Counter
from dataclasses import dataclass
from functools import partial
from itertools import combinations_with_replacement
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits
from transformers import CLIPVisionConfig, CLIPVisionModel

from data import Conversations
from parts import check
from parts.files import (
    IMAGE,
    brief_instructions,
    check_least,
    run_command,
    run_main,
    typed_fields,
    write_lines,
)
from parts.pictures import image_path, load_image
from parts.questions import read_questions
from parts.records import Records, image_names
from parts.templates import TEMPLATES
from parts.views import View, preprocess
from sample import Config, Talker, human_turn
from toy import pretrain

TEMPLATE = TEMPLATES["vicuna_v1"]        # what train.py takes for a Llama that names no other
VIEW = View("crop", size=64, patch=16)   # of the tower: N = 16 visual tokens
OFTEN = 20                               # captions that a word is in, and that it is missing from
D_V = 128


# ------------------------------------------------------------------------------------------------
# The data


@dataclass(frozen=True)
class Parts:
    captions: str                        # LLaVA JSON: a picture and its caption, stage 1's data
    questions: str                       # LLaVA JSON: questions and answers, stage 2's data
    images: str                          # folder of the pictures
    out: str                             # the parts go to OUT/clip and OUT/llm
    seed: int = 0
    clip_steps: int = 3000
    llm_steps: int = 4500


def read_checked(file, images):
    """LLaVA JSON with one picture a sample, as data.Conversations.

    Raises ValueError with file, row and id for all that train.py would refuse.
    """
    data = Conversations(Records([file]), images, None, TEMPLATE, VIEW)
    problems, table = check.inspect_data(data)
    check.refuse(data, problems, table, skip_bad=False, context=0)
    for i, record in enumerate(data.records):
        count = len(record["image"])
        if count != 1:
            raise ValueError(f"{data.records.where(i)}: {count} pictures; a sample of a world of "
                             "one's own has one")
    return data


def captions_by_picture(captions, questions):
    """{picture: caption}. Raises ValueError for a question about a picture without caption."""
    by_picture = {record["image"][0]: record["conversations"][1]["value"]
                  for record in captions.records}
    for i, record in enumerate(questions.records):
        [picture] = record["image"]
        if picture not in by_picture:
            raise ValueError(f"{questions.records.where(i)}: its picture {picture} has no caption "
                             f"in {captions.records.files[0]}; write one, or take the sample out")
    return by_picture


def clauses_of(caption):
    """What commas, full stops, "and" and "then" part. Each is taken to speak of one thing."""
    clauses = re.split(r"[,.;:]|\b(?:and|then)\b", caption)
    return [clause.strip() for clause in clauses if clause.strip()] or [caption]


def pairs_of(record):
    """[(question, answer), ...] of a sample, without its <image>."""
    texts = [turn["value"].replace(IMAGE, "").strip() for turn in record["conversations"]]
    return list(zip(texts[::2], texts[1::2], strict=True))


# ------------------------------------------------------------------------------------------------
# The tower


def caption_targets(captions):
    """(captions, targets) of 0 and 1: which words, and which two words of a clause, a caption has.

    Two, as "teal" and "left", ask that one patch knows both.
    """
    found = []
    for record in captions.records:
        found.append(set())
        for clause in clauses_of(record["conversations"][1]["value"].lower()):
            words = sorted(set(re.findall(r"\w+", clause)))
            found[-1].update(combinations_with_replacement(words, 2))
    counts = Counter(target for targets in found for target in targets)
    names = [name for name, n in counts.items() if OFTEN <= n <= len(found) - OFTEN]
    if len(names) < 2:
        raise ValueError(
            f"{captions.records.files[0]}: of the words in its {len(found)} captions, "
            f"{len(names)} are in {OFTEN} captions or more and missing from {OFTEN} or more; a "
            "tower learns from such words: bring more pictures, or captions that tell them apart")
    rows = [[float(name in targets) for name in names] for targets in found]
    return torch.tensor(rows).unique(dim=1)


def build_tower():
    """A small ViT with CLIP's parts. Its last layer is not used, as in LLaVA."""
    g = CLIPVisionModel(CLIPVisionConfig(
        hidden_size=D_V, intermediate_size=4 * D_V, num_hidden_layers=4, num_attention_heads=4,
        image_size=VIEW.size, patch_size=VIEW.patch))
    # A place as loud as a colour: with the usual 0.02, left and right are hardly ever learnt.
    nn.init.normal_(g.embeddings.position_embedding.weight, std=0.5)
    return g


def pretrain_tower(data, targets, rng, steps, batch_size=16):
    """A tower that learns which words each caption has, from the patches that show them.

    A word is in the caption if any patch says so: the words lie in Z_v, where W finds them. That
    tells more than CLIP's loss. Shifts by up to 2 pixels: 3,000 pictures are soon known by heart.
    """
    model = nn.ModuleDict({"g": build_tower(), "words": nn.Linear(D_V, targets.shape[1])})
    pictures = [preprocess(data.pictures(i)[0][1], VIEW.size) for i in range(len(data))]

    def losses():
        while True:
            batch = rng.choices(range(len(data)), k=batch_size)
            X_v = torch.stack([
                pictures[i].roll(rng.choices(range(-2, 3), k=2), (1, 2)) for i in batch])
            Z_v = features(model["g"], X_v)                                   # (B, N, D_v)
            logits = model["words"](Z_v).logsumexp(1)                         # (B, targets)
            yield targets.shape[1] * binary_cross_entropy_with_logits(logits, targets[batch])
    pretrain.descend(model, losses(), steps, peak=1e-3)
    with torch.no_grad():
        loud = features(model["g"], torch.stack(pictures[:100])).std().item()
    pretrain.shrink(model["g"], 0.3 / loud)       # about as loud as word embeddings
    return model["g"]


def features(g, X_v):
    """Z_v, from before the last layer."""
    return g(pixel_values=X_v, output_hidden_states=True).hidden_states[-2][:, 1:]


# ------------------------------------------------------------------------------------------------
# The language model


def caption_notes(caption, tokenizer, rng):
    """N notes, as lists of word ids: the clauses of a caption, in order, and blanks between them.

    They stand where LLaVA has visual tokens. A clause has several, as a thing covers patches.
    """
    clauses = clauses_of(caption)[:VIEW.N]
    which = list(range(len(clauses)))
    which += rng.choices(which, k=rng.randint(0, VIEW.N - len(which)))
    notes = [" ."] * VIEW.N
    for place, k in zip(sorted(rng.sample(range(VIEW.N), len(which))), sorted(which), strict=True):
        notes[place] = f" {clauses[k]}"
    return [tokenizer.encode(note, add_special_tokens=False) for note in notes]


def clause_by_word(clause, rng):
    """(a word, its clause), read forwards or backwards, so that each word leads to the others."""
    words = clause.split()[::rng.choice((1, -1))]
    return rng.choice(words), " ".join(words)


def draw_caption_chats(records, captions, tokenizer, rng, done, n=200):
    """`n` chats about captions, [(ids, labels, notes), ...]; every fifth asks for the caption.

    Until half is done, two in five are look-ups: an answer begins with finding its note.
    """
    samples = []
    for _ in range(n):
        record = records[rng.randrange(len(records))]
        caption = captions[record["image"][0]]
        pairs = pairs_of(record)
        rng.shuffle(pairs)
        draw = rng.random()
        if draw < 0.2:
            pairs = [(rng.choice(brief_instructions()), caption)]
        elif draw < 0.6 and done < 0.5:
            clauses = rng.choices(clauses_of(caption), k=6)
            pairs = [clause_by_word(clause, rng) for clause in clauses]
        ids, labels = pretrain.encode_chat(pairs, TEMPLATE, tokenizer, rng, done)
        samples.append((ids, labels, caption_notes(caption, tokenizer, rng)))
    return samples


def make_parts(config):
    """The two parts, from one's own pictures, captions and questions."""
    check_least(config, clip_steps=1, llm_steps=1)
    captions = read_checked(config.captions, config.images)
    questions = read_checked(config.questions, config.images)
    by_picture = captions_by_picture(captions, questions)
    targets = caption_targets(captions)
    torch.manual_seed(config.seed)
    rng = random.Random(config.seed)
    out = Path(config.out)

    texts = [TEMPLATE.first + question for question in brief_instructions()] * OFTEN
    for data in (captions, questions):
        for record in data.records:
            texts += [f"{TEMPLATE.later}{question}{TEMPLATE.reply} {answer}"
                      for question, answer in pairs_of(record)]
    tokenizer = pretrain.train_tokenizer(texts)
    tokenizer.save_pretrained(out / "llm")
    print(f"{len(captions)} pictures, {targets.shape[1]} words and pairs to see, "
          f"{len(tokenizer)} tokens")

    print("clip")
    g = pretrain_tower(captions, targets, rng, config.clip_steps)
    g.save_pretrained(out / "clip")
    pretrain.save_processor(VIEW.size, out / "clip")
    print("llm")
    draw_chats = partial(draw_caption_chats, questions.records, by_picture, tokenizer, rng)
    llm = pretrain.pretrain_llm(tokenizer, draw_chats, rng, config.llm_steps, layers=3, peak=3e-3,
                                tokens=600)
    llm.save_pretrained(out / "llm")
    print(f"wrote {out / 'clip'} and {out / 'llm'}")


# ------------------------------------------------------------------------------------------------
# The result, beside two controls


@dataclass(frozen=True)
class HeldOut:
    model: str                           # checkpoint folder
    questions: str                       # JSON lines of question_id, image, text, category, truth
    images: str                          # folder of their pictures
    data: str                            # what stage 2 trained on: its most frequent answers
    answers: str                         # JSON lines to write: the questions and all answers


def ask_held_out(config):
    """Right answers, word for word: with the picture, without it, and by the most frequent answer.

    A model that looks is well above both controls.
    """
    questions = read_questions(config.questions, config.images)
    for i, question in enumerate(questions):
        typed_fields(question, f"{config.questions}[{i}]", truth=str, category=str)
    talker = Talker(Config(model=config.model, temperature=0, max_new_tokens=64))
    frequent = frequent_answers(Records([config.data]))
    ways = {
        "pictures": ask_all(talker, questions, config.images),
        "blind": ask_all(talker, questions),
        "frequent": [frequent.get(question["text"], "") for question in questions],
    }
    rows = [question | dict(zip(ways, texts, strict=True))
            for question, *texts in zip(questions, *ways.values(), strict=True)]
    write_lines(config.answers, rows)
    for way in ways:
        print(f"{way:10s}all {percent_true(rows, way):5.1f}", end="")
        for kind in sorted({row["category"] for row in rows}):
            score = percent_true([row for row in rows if row["category"] == kind], way)
            print(f"  {kind} {score:5.1f}", end="")
        print()


def percent_true(rows, way):
    return 100 * sum(row[way] == row["truth"].strip() for row in rows) / len(rows)


def ask_all(talker, questions, folder=None, batch_size=50):
    """The answer to each question, about the pictures of a folder, or without any."""
    texts = []
    for start in range(0, len(questions), batch_size):
        conversations = []
        for question in questions[start:start + batch_size]:
            names = image_names(question) if folder else []
            pictures = [load_image(image_path(folder, name)) for name in names]
            conversations.append(([human_turn(question["text"], len(names))], pictures))
        texts += talker.answers(conversations)
    return texts


def frequent_answers(records):
    """{question: the answer that it has most often} of the data that stage 2 trained on."""
    counts = {}
    for record in records:
        for question, answer in pairs_of(record):
            counts.setdefault(question, Counter())[answer] += 1
    return {question: answers.most_common(1)[0][0] for question, answers in counts.items()}


COMMANDS = {"parts": (make_parts, Parts), "ask": (ask_held_out, HeldOut)}


def main(argv=None):
    run_command(COMMANDS, argv, __doc__)


if __name__ == "__main__":
    run_main(main)
