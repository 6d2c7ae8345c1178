"""
What the model sees: from LLaVA-format JSON to ids, labels and pixels (Sec. 4.2).

    {"id", "image", "conversations": [{"from": "human", "value": "<image>\\n..."},
                                      {"from": "gpt",   "value": "..."}]}
      --arrange-->  the image's place in the first turn, Eq. (2)
      --render-->   [(text, is it scored?), ...] in a template (parts/templates.py)
      --encode-->   input_ids and labels, appended in lockstep; an image is its placeholder ids
      --collate-->  a batch: what LLaVA.forward and generate take

    python data.py check|show|stats chat.json --images DIR --llm DIR     before anybody trains on it

Letters in shape comments:
    B samples   T tokens of each   K squares of pixels   S their side   N visual tokens of a square
"""
import os
import random
import sys
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import AutoConfig, AutoTokenizer

from parts import check, checkpoints
from parts.files import IGNORE, IMAGE, run_main
from parts.pictures import image_path, image_size, load_image
from parts.records import Records
from parts.templates import TEMPLATES, Template, check_template, template_for, template_of
from parts.tiles import NEWLINE
from parts.views import View, view_from, view_of

# -----------------------------------------------------------------------------
# From turns to text to ids


def arrange(conversations, image_position, rng, questions=None):
    """Put the image where Eq. (2) has it: [X_q, X_v] or [X_v, X_q] in the first turn, at random.

    image_position   "random": Eq. (2), drawn by `rng`; "first": <image> leads; "as_written".
                     OFFICIAL: the released JSON has one draw of it, and the released code then
                     puts <image> first. OURS: a turn with several images stays as it is written.
    questions        stage 1: one of them is drawn where a human turn has no words of its own.
    """
    turns = [dict(turn) for turn in conversations]        # the record stays as it is
    for turn in turns:
        if turn["from"] != "human":
            continue
        X_q = turn["value"].replace(IMAGE, "").strip()
        if not X_q and questions:
            X_q = rng.choice(questions)                   # "randomly sampled", Sec. 4.2
            turn["value"] += "\n" + X_q
        if turn["value"].count(IMAGE) != 1 or image_position == "as_written":
            continue
        is_last = image_position == "random" and turn is turns[0] and rng.random() < 0.5
        turn["value"] = f"{X_q}\n{IMAGE}" if is_last else f"{IMAGE}\n{X_q}"      # Eq. (2)
    return turns


def render(conversations, template):
    """Turns to [(text, scored), ...]: exactly the answers and their STOP are scored.

    A last human turn stays open: that is a prompt. By llava_v0, Table 2, with what is scored in «»:
        A chat ...###Human: <image>\\nWhat is this?###Assistant:« A cat.###»Human: Why?###Assistant:
    """
    segments = []
    for i, turn in enumerate(conversations):
        text = turn["value"].strip()      # OURS: outer blanks would merge with the template's own
        if turn["from"] == "gpt":
            segments.append((template.answer.format(text) + template.STOP, True))     # X_a STOP
            continue
        if template.name == "plain":
            text = IMAGE * text.count(IMAGE)      # of a human turn only its images remain
        role = template.first if i == 0 else template.later       # the first has SYSTEM before it
        segments.append((role + text + template.reply, False))    # X_instruct
    return segments


def encode(segments, tokenizer, image_tokens):
    """[(text, scored), ...] to input_ids and labels; labels = ids where scored, else IGNORE.

    image_tokens   how many placeholders each <image> becomes, in order.
    Every piece of text is tokenised on its own, so that no token straddles the border of a
    question and its answer, under any tokenizer. Raises ValueError unless tags and images agree.
    """
    tags = sum(text.count(IMAGE) for text, _ in segments)
    if tags != len(image_tokens):
        raise ValueError(f"{tags} {IMAGE} tags for {len(image_tokens)} pictures; "
                         "each tag needs one picture")
    image_id = tokenizer.convert_tokens_to_ids(IMAGE)
    counts = iter(image_tokens)
    ids, labels = [], []                  # (T,), (T,)

    def append(new, scored):              # the only place where either list grows
        ids.extend(new)
        labels.extend(new if scored else [IGNORE] * len(new))

    if tokenizer.bos_token_id in tokenizer("a")["input_ids"][:1]:     # puts <s>; Qwen2 does not
        append([tokenizer.bos_token_id], False)
    new_text = True                       # OFFICIAL: text starts anew after <s> and each image
    for text, scored in segments:
        for n, piece in enumerate(text.split(IMAGE)):
            if n > 0:                     # a piece of text stood before it, then an <image>
                append([image_id] * next(counts), False)          # model.splice puts H_v there
                new_text = True
            if piece:
                append(tokenize(piece, tokenizer, new_text), scored)      # COURSE: True scores all
                new_text = False
    return ids, labels


def tokenize(text, tokenizer, new_text):
    """The ids of a piece of text. Some tokenizers put a space before every text.

    After <s> and after an image it belongs there. Elsewhere "<image>" + text is tokenised, so that
    the text is not at the start, and the first id is dropped.
    """
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()               # a tokenizer file may carry limits of its own
    backend.no_padding()
    if new_text:
        return backend.encode(text, add_special_tokens=False).ids
    return backend.encode(IMAGE + text, add_special_tokens=False).ids[1:]


def encode_within(conversations, template, tokenizer, image_tokens, max_length):
    """`encode`. OURS: trailing turns that do not fit go, pair by pair; no image is ever cut.

    Returns input_ids, labels and the turns that remain. Raises ValueError if not even the first
    question and its answer fit.
    """
    turns = conversations
    while True:
        tokens = image_tokens[:count_images(turns)]       # of the pictures that these turns show
        ids, labels = encode(render(turns, template), tokenizer, tokens)
        if len(ids) <= max_length:
            return ids, labels, turns
        if len(turns) <= 2:
            raise ValueError(f"{len(ids)} tokens ({sum(tokens)} of them visual) with a single "
                             f"answer left, the limit is {max_length}")
        turns = turns[:-2]                # the last question and its answer


def count_images(turns):
    return sum(turn["value"].count(IMAGE) for turn in turns)


# -----------------------------------------------------------------------------
# Samples


def sample_of(turns, pictures, tokenizer, template, view, where="prompt"):
    """A conversation and its pictures, [(name, PIL), ...], as a sample for `collate`.

    One that ends in a question is a prompt: its ids equal those of training up to the answer.
    """
    tokens = [view.tokens(*picture.size) for _, picture in pictures]
    ids, labels = encode(render(turns, template), tokenizer, tokens)
    return {"where": where, "input_ids": ids, "labels": labels, "pictures": pictures}


@dataclass
class Conversations:
    """Conversations in LLaVA's format, made into samples when they are asked for."""
    records: Records
    folder: str                           # that image names are relative to
    tokenizer: object                     # None: samples can be checked, but not made
    template: Template
    view: View
    max_length: int = 2048                # tokens, with visual ones
    image_position: str = "random"        # see `arrange`
    questions: list = None                # stage 1's, see `arrange`
    seed: int = 0

    def __len__(self):
        return len(self.records)

    def pictures(self, i):
        names = self.records[i]["image"]
        return [(name, load_image(image_path(self.folder, name))) for name in names]

    def encoded(self, i, epoch=0, sizes=None):
        """input_ids, labels and the turns that fit. `sizes`: of the pictures, where known."""
        record = self.records[i]
        if sizes is None:
            paths = [image_path(self.folder, name) for name in record["image"]]
            # without tiles every picture has N tokens: no file is opened for its size
            sizes = [image_size(path) if self.view.tiling else (1, 1) for path in paths]
        rng = random.Random(f"{self.seed} {epoch} {i}")   # the same draw, whoever asks again
        turns = arrange(record["conversations"], self.image_position, rng, self.questions)
        tokens = [self.view.tokens(*size) for size in sizes]
        try:
            return encode_within(turns, self.template, self.tokenizer, tokens, self.max_length)
        except ValueError:
            if epoch == 0:
                raise
            return self.encoded(i, 0, sizes)      # this epoch's draw is too long, 0's was checked

    def sample(self, i, epoch=0, scored=True):
        """{where, input_ids, labels, pictures}. Eq. (2) is drawn anew in each epoch, from seed,
        epoch and i. Without `scored` it has no labels, and fills a batch up: `micro_batches`."""
        where = self.records.where(i)     # 'chat.json[1432] (id 000000123)'
        try:
            pictures = self.pictures(i)
            ids, labels, turns = self.encoded(i, epoch, [image.size for _, image in pictures])
        except (OSError, ValueError) as error:
            raise ValueError(f"{where}: {error}") from error
        labels = labels if scored else [IGNORE] * len(ids)
        pictures = pictures[:count_images(turns)]         # not those of turns that did not fit
        return {"where": where, "input_ids": ids, "labels": labels, "pictures": pictures}

    def question(self, i):
        """Sample i up to its first answer, as a prompt, and that answer."""
        _, _, turns = self.encoded(i)
        pictures = self.pictures(i)[:count_images(turns[:1])]
        prompt = sample_of(turns[:1], pictures, self.tokenizer, self.template, self.view,
                           self.records.where(i))
        return prompt, turns[1]["value"]

    def measure(self, i):                 # parts/check.py asks this of every sample
        """(tokens, scored tokens, images, turns) of what fits; ValueError if nothing does."""
        ids, labels, turns = self.encoded(i)
        scored = sum(label != IGNORE for label in labels)
        return len(ids), scored, count_images(turns), len(turns)


# -----------------------------------------------------------------------------
# Batches


def plan_epoch(lengths, global_batch_size, seed, epoch, window=50):
    """The order of one epoch: global batches (arrays of indices); only the last one is short.

    Types come mixed, "uniformly sampled" (Sec. 4.2). OURS: within windows of 50 batches samples are
    sorted by length, so that little is padded; the short batch has the longest of its window.
    """
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(lengths))                 # (samples,)
    # small data has smaller windows, or the same samples would share a batch in every epoch
    window = max(1, min(window, len(order) // (4 * global_batch_size)))
    batches = []
    for start in range(0, len(order), window * global_batch_size):
        part = order[start:start + window * global_batch_size]
        part = part[np.argsort(lengths[part], kind="stable")]     # short ones first
        batches += [part[i:i + global_batch_size] for i in range(0, len(part), global_batch_size)]
    full = [batch for batch in batches if len(batch) == global_batch_size]
    rng.shuffle(full)                     # else the lengths would rise within each window
    return full + [batch for batch in batches if len(batch) < global_batch_size]


def micro_batches(batch, lengths, epoch, budget, world_size, rank):
    """This rank's share of a global batch: micro-batches, as many on every rank, each a list of
    arguments of `Conversations.sample`. Samples of like length share one, up to `budget` tokens
    with padding. A short last batch is filled up with unscored copies, which add no loss.
    """
    order = batch[np.argsort(lengths[batch], kind="stable")]      # (samples of the batch,)
    samples = [(int(order[0]), epoch, False)] * (-len(order) % world_size)
    samples += [(int(i), epoch, True) for i in order]     # (i, epoch, scored), short ones first
    groups = [[]]
    for start in range(0, len(samples), world_size):
        row = samples[start:start + world_size]           # a sample for each rank
        longest, _, _ = row[-1]           # of the group so far: all are padded to its length
        if groups[-1] and (len(groups[-1]) + 1) * lengths[longest] > budget:
            groups.append([])
        groups[-1].append(row[rank])
    return groups


@dataclass
class Steps(Dataset):
    """Step number -> this rank's micro-batches: all of training as a function of the step."""
    data: Conversations
    indices: np.ndarray                   # of the samples to train on
    lengths: np.ndarray                   # of all samples, in tokens
    global_batch_size: int
    budget: int                           # tokens of a forward pass on one rank, with padding
    world_size: int = 1
    rank: int = 0

    @property
    def per_epoch(self):
        return -(-len(self.indices) // self.global_batch_size)    # rounded up

    def __getitem__(self, step):
        epoch, position = divmod(step, self.per_epoch)
        if getattr(self, "epoch", None) != epoch:         # plan it once
            lengths = self.lengths[self.indices]
            self.plan = plan_epoch(lengths, self.global_batch_size, self.data.seed, epoch)
            self.epoch = epoch
        batch = self.indices[self.plan[position]]         # samples' numbers, of all ranks
        share = micro_batches(batch, self.lengths, epoch, self.budget, self.world_size, self.rank)
        return [collate([self.data.sample(*which) for which in group], self.data.view)
                for group in share]


def collate(samples, view, side="right"):
    """Samples to a batch: ids, labels, mask (B, T), X_v (K, 3, S, S), visual_index (placeholders,);
    answer_index (A,) says where the A scored tokens stand, the rows laid end to end.

    Training pads on the right, where causal attention never looks; generation on the left. A
    picture that several samples show is in X_v once; `visual_index` names it several times.
    """
    T = max(len(sample["input_ids"]) for sample in samples)       # the longest; the rest is padded
    input_ids = torch.zeros(len(samples), T, dtype=torch.long)                # (B, T)
    labels = torch.full_like(input_ids, IGNORE)                               # (B, T)
    attention_mask = torch.zeros_like(input_ids)                              # (B, T)
    for row, sample in enumerate(samples):
        n = len(sample["input_ids"])
        span = slice(0, n) if side == "right" else slice(T - n, T)
        input_ids[row, span] = torch.tensor(sample["input_ids"])
        labels[row, span] = torch.tensor(sample["labels"])
        attention_mask[row, span] = 1
    labels[:, 0] = IGNORE                 # nothing predicts a first token
    pictures = [picture for sample in samples for picture in sample["pictures"]]
    X_v, visual_index, first_row = [], [], {}
    for name, picture in pictures:
        if name not in first_row:
            first_row[name] = view.N * sum(map(len, X_v))     # rows of H_v before this picture's
            X_v.append(view.X_v(picture))                                     # (squares, 3, S, S)
        index = view.index(*picture.size)                                     # (its tokens,)
        visual_index.append(torch.where(index == NEWLINE, NEWLINE, index + first_row[name]))
    if not pictures:      # a blank square, which nothing names: W has a gradient, of 0, everywhere
        X_v.append(torch.zeros(1, 3, view.size, view.size))
        visual_index.append(torch.zeros(0, dtype=torch.long))
    return {"input_ids": input_ids, "labels": labels, "attention_mask": attention_mask,
            "answer_index": (labels != IGNORE).flatten().nonzero()[:, 0],
            "X_v": torch.cat(X_v), "visual_index": torch.cat(visual_index), "images": len(pictures),
            "where": [sample["where"] for sample in samples]}


# -----------------------------------------------------------------------------
# python data.py check | show | stats


def show(ids, labels, tokenizer):
    """A sample as text: what is scored in green, or in «» where no terminal shows colours."""
    styles = {"scored": "«{}»"}
    if sys.stdout.isatty() and "NO_COLOR" not in os.environ:
        styles = {"image": "\033[36m{}\033[0m", "scored": "\033[1;32m{}\033[0m"}
    is_image = np.array(ids) == tokenizer.convert_tokens_to_ids(IMAGE)
    is_scored = np.array(labels) != IGNORE
    kinds = np.select([is_image, is_scored], ["image", "scored"], "plain").tolist()
    text = ""
    for kind, run in groupby(zip(kinds, ids, strict=True), key=itemgetter(0)):
        run = [token for _, token in run]
        words = f"[{len(run)} x {IMAGE}]" if kind == "image" else tokenizer.decode(run)
        text += styles.get(kind, "{}").format(words)
    return text


def open_data(args):
    """The data set of a command line; without --model or --llm one that is not tokenised."""
    tokenizer = None
    template = TEMPLATES.get(args.template)
    view = view_of(args.aspect)
    if args.model:
        config, meta = checkpoints.load_settings(args.model)
        tokenizer = AutoTokenizer.from_pretrained(args.model)
        view = view_from(meta, config.vision_config)
        template = template_of(args.template or meta.get("template"), args.model)
    elif args.llm:
        tokenizer = checkpoints.load_tokenizer(args.llm)
        template = template or template_for(AutoConfig.from_pretrained(args.llm), tokenizer)
    if tokenizer:
        check_template(template, tokenizer)
    return Conversations(Records(args.files, args.seed), args.images, tokenizer,
                         template, view, args.max_length, args.image_position)


def main(argv=None):
    args = check.parse_args(argv)
    data = open_data(args)
    if args.command == "show":
        return check.show_sample(data, args.index, show)
    problems, table = check.inspect_data(data, args.workers)
    print("\n".join(check.report(data, problems, table, args.command == "stats")))
    print(check.list_problems(problems, data.records))
    return 1 if problems else 0


if __name__ == "__main__":
    run_main(main)
