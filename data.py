"""
What the model sees: from LLaVA-format JSON to input_ids, labels and X_v (Sec. 4.2, Eq. (2), Table 2).

    {"id", "image", "conversations": [{"from": "human", "value": "<image>\\n..."}, {"from": "gpt", "value": "..."}]}
      --arrange-->  the image's place in the first turn, Eq. (2)
      --render-->   [(text, is it scored?), ...] in a template, Table 2
      --encode-->   input_ids and labels, appended in lockstep; an image is N placeholder ids
      --collate-->  batches

Also a command, which checks, shows and measures a data set before anybody trains on it:

    python data.py check chat.json --images DIR             everything that can go wrong, all of it listed
    python data.py show  chat.json --images DIR --llm DIR   one sample, with what is scored in colour
    python data.py stats chat.json --images DIR --llm DIR   turns, images, token lengths, what would be trimmed

Dimension letters:  B samples   K images in the batch   N visual tokens per image   T sequence
"""
import argparse
import functools
import json
import os
import random
import re
import sys
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import AutoConfig

import tiles
from checkpoint import load_settings, load_tokenizer
from images import ABSENT, ASPECTS, load_image, picture_problem, picture_size, view_of
from model import IGNORE, LLaVA
from records import IMAGE, Records, form_problem, image_names, image_path

# ---------------------------------------------------------------------------------------------------------------------
# Templates: X_system-message, the roles and STOP (Table 2)


class Template(NamedTuple):
    """How a conversation becomes text. Scored (Eq. (3)) is exactly what `answer` and `STOP` make, nothing else.

    The text of two turns is   first X_instruct^1 reply  answer(X_a^1) STOP  later X_instruct^2 reply  answer(X_a^2) STOP
    >>> "".join(text for text, _ in render(chat("<image>\\nWhat is this?", "A cat.", "Why?"), TEMPLATES["vicuna_v1"]))
    "A chat between ... USER: <image>\\nWhat is this? ASSISTANT: A cat.</s>USER: Why? ASSISTANT:"
    """
    name: str
    first: str             # before the first instruction: X_system-message and the first role
    later: str             # before every later instruction
    reply: str             # between an instruction and its answer; where a prompt ends
    answer: str            # around X_a; its blank is part of the answer's first token
    STOP: str              # ends an answer, and generation

    def jinja(self):
        """The same text as a chat template, for `transformers`, vLLM and others that load the checkpoint."""
        before, after = self.answer.split("{}")
        question = "text(m.content)"
        if self.name == "plain":                          # as in `render`: its images alone
            question = f"'{IMAGE}' * (text(m.content).split('{IMAGE}') | length - 1)"
        q = {k: json.dumps(v, ensure_ascii=False) for k, v in {**self._asdict(), "before": before, "after": after}.items()}
        return (
            "{%- macro text(content) -%}{%- if content is string -%}{{ content | trim }}{%- else -%}"
            "{%- for part in content -%}{%- if not loop.first -%}{{ '\\n' }}{%- endif -%}"
            "{{ '" + IMAGE + "' if part.type == 'image' else part.text | trim }}{%- endfor -%}{%- endif -%}{%- endmacro -%}"
            "{%- for m in messages -%}{%- if m.role == 'user' -%}"
            f"{{{{ {q['first']} if loop.first else {q['later']} }}}}{{{{ {question} }}}}"
            f"{{%- if not loop.last or add_generation_prompt -%}}{{{{ {q['reply']} }}}}{{%- endif -%}}"
            "{%- elif m.role == 'assistant' -%}"
            f"{{{{ {q['before']} + text(m.content) + {q['after']} + {q['STOP']} }}}}"
            "{%- else -%}{{ raise_exception('the system message of this model is fixed; role ' + m.role) }}{%- endif -%}"
            "{%- endfor -%}")


ASSISTANT = "The assistant gives helpful, detailed, and polite answers to the {}'s questions."
HUMAN_SYSTEM = "A chat between a curious human and an artificial intelligence assistant. " + ASSISTANT.format("human")
USER_SYSTEM = "A chat between a curious user and an artificial intelligence assistant. " + ASSISTANT.format("user")
LLAMA_2_SYSTEM = ("You are a helpful language and vision assistant. You are able to understand the visual content that "
                  "the user provides, and assist the user with a variety of tasks using natural language.")

TEMPLATES = {t.name: t for t in (
    # OFFICIAL: Table 2 prints a newline after each STOP; the released conversations have none.
    # OFFICIAL: training there rendered "### Human: ...\n", sampling "###Human: ..."; here both are the latter.
    Template("llava_v0", HUMAN_SYSTEM + "###Human: ", "Human: ", "###Assistant:", " {}", "###"),
    Template("vicuna_v1", USER_SYSTEM + " USER: ", "USER: ", " ASSISTANT:", " {}", "</s>"),
    Template("llava_llama_2", f"[INST] <<SYS>>\n{LLAMA_2_SYSTEM}\n<</SYS>>\n\n", "<s>[INST] ", " [/INST]", " {} ", "</s>"),
    Template("mistral_instruct", "[INST] ", "[INST] ", " [/INST]", " {} ", "</s>"),
    Template("chatml_direct", "<|im_start|>system\nAnswer the questions.<|im_end|><|im_start|>user\n", "<|im_start|>user\n",
             "<|im_end|><|im_start|>assistant\n", "{}", "<|im_end|>"),
    # LLaVA-NeXT's for its later bases; what follows an answer's STOP stands at the head of the next turn.
    Template("qwen_1_5", "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n",
             "\n<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n", "{}", "<|im_end|>"),
    Template("llama_3", f"<|start_header_id|>system<|end_header_id|>\n\n{LLAMA_2_SYSTEM}<|eot_id|>"
             "<|start_header_id|>user<|end_header_id|>\n\n", "<|start_header_id|>user<|end_header_id|>\n\n",
             "<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n", "{}", "<|eot_id|>"),
    # OFFICIAL: the released stage 1 drops the question of Sec. 4.2: the image, its caption, a newline, and no </s>.
    Template("plain", "", "", "", "{}", "\n"),
)}


def template_for(config, tokenizer):
    """The template that a language model knows best, from its config and tokenizer. OURS: the paper has one model."""
    if "<|im_start|>" in tokenizer.get_vocab():
        return TEMPLATES["qwen_1_5" if config.model_type.startswith("qwen") else "chatml_direct"]
    if "<|start_header_id|>" in tokenizer.get_vocab():
        return TEMPLATES["llama_3"]
    if config.model_type == "mistral":
        return TEMPLATES["mistral_instruct"]
    if "<<SYS>>" in (tokenizer.chat_template or ""):
        return TEMPLATES["llava_llama_2"]
    return TEMPLATES["vicuna_v1"]


def check_template(template, tokenizer):
    """ValueError unless the tokenizer has the template's special tokens: as plain text they would never stop anything."""
    text = "".join(template)
    for special in re.findall(r"</?s>|<\|\w+\|>", text):
        if special not in tokenizer.get_vocab():
            fit = [t.name for t in TEMPLATES.values()
                   if all(s in tokenizer.get_vocab() for s in re.findall(r"</?s>|<\|\w+\|>", "".join(t)))]
            raise ValueError(f"template {template.name} needs the token {special}, which the language model's tokenizer "
                             f"lacks; --template {' | '.join(fit)} would fit")


# ---------------------------------------------------------------------------------------------------------------------
# Rendering: text, then ids and labels in lockstep


def arrange(conversations, image_position, rng, questions=None):
    """Put the image where Eq. (2) has it: [X_q, X_v] or [X_v, X_q] in the first turn, at random.

    image_position  "random": Eq. (2), drawn by `rng`. "first": <image> leads its turn. "as_written": untouched.
    questions       stage 1 (Sec. 4.2): one of them is drawn where a human turn has no words of its own.
    OFFICIAL: nothing draws at training time; the draw is frozen in the released JSON, and the code undoes it ("first").
    A turn with several images stays as written (OURS; the released code keeps only one of them).
    """
    turns = [dict(turn) for turn in conversations]
    for turn in turns:
        if turn["from"] != "human":
            continue
        words = turn["value"].replace(IMAGE, "").strip()
        if not words and questions:
            turn["value"] += "\n" + (words := rng.choice(questions))
        if turn["value"].count(IMAGE) == 1 and image_position != "as_written":
            image_last = image_position == "random" and turn is turns[0] and rng.random() < 0.5
            turn["value"] = (f"{words}\n{IMAGE}" if image_last else f"{IMAGE}\n{words}").strip()
    return turns


def render(conversations, template):
    """Turns to [(text, scored), ...], Table 2. A last human turn stays open: that is the prompt of `sample.py`.

    The `plain` template knows no question: of a human turn only its images are kept.
    """
    segments = []
    for i, turn in enumerate(conversations):
        text = turn["value"].strip()                      # OURS: outer blanks would merge with the template's characters
        if turn["from"] == "gpt":
            segments.append((template.answer.format(text) + template.STOP, True))
        else:
            text = IMAGE * text.count(IMAGE) if template.name == "plain" else text
            segments.append(((template.later if i else template.first) + text + template.reply, False))
    return segments


def encode(segments, tokenizer, image_tokens):
    """[(text, scored), ...] to input_ids and labels: equally long, labels = ids where scored, else IGNORE.

    `image_tokens`: how many placeholder ids each <image> becomes, in order. The text is split at <image> and each
    chunk tokenised on its own, after one BOS; so ids agree with released checkpoints under any tokenizer version.
    Within a chunk, a token's character span says whether it is scored; a token that would span the border of a scored
    segment is prevented by tokenising the two sides apart.
    """
    image_id, counts, backend = tokenizer.convert_tokens_to_ids(IMAGE), iter(image_tokens), tokenizer.backend_tokenizer
    backend.no_truncation(), backend.no_padding()        # a tokenizer file may carry limits of its own
    tags = sum(text.count(IMAGE) for text, _ in segments)
    if tags != len(image_tokens):
        raise ValueError(f"{tags} {IMAGE} tags for {len(image_tokens)} pictures; each tag needs one picture")
    ids, labels = [], []

    def append(new, scored):
        ids.extend(new)
        labels.extend(new if scored else [IGNORE] * len(new))

    def tokens_of(chunk, cut):
        """A chunk's ids and labels, or None where a token would span the border of a scored segment.

        A chunk that was cut off starts no text of its own: behind a special token, which is taken away again,
        sentencepiece does not add the blank with which it starts a text.
        """
        parts = [(IMAGE, False)] * cut + chunk
        tokens = backend.encode("".join(part for part, _ in parts), add_special_tokens=False)
        begin, end = np.array(tokens.offsets, int).reshape(-1, 2).T        # characters [begin, end) of each token
        ends, scored = np.cumsum([len(part) for part, _ in parts]), np.array([s for _, s in parts])
        segment = lambda character: scored[np.searchsorted(ends[:-1], character, side="right")]
        if (segment(begin) != segment(np.maximum(end - 1, begin))).any():
            return None
        return tokens.ids[cut:], np.where(segment(begin), tokens.ids, IGNORE).tolist()[cut:]

    def append_chunk(chunk, cut=False):
        chunk = [(part, scored) for part, scored in chunk if part]
        if not chunk:
            return
        if tokens := tokens_of(chunk, cut):
            ids.extend(tokens[0])
            labels.extend(tokens[1])
            return
        # Cut at the first such border: what follows it has no say, so a prompt is cut where training was.
        n = next(n for n in range(1, len(chunk)) if tokens_of(chunk[:n + 1], cut) is None)
        append_chunk(chunk[:n], cut)
        append_chunk(chunk[n:], True)

    if tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][0] == tokenizer.bos_token_id:
        append([tokenizer.bos_token_id], False)
    chunk, cut = [], False
    for text, scored in segments:
        head, *tails = text.split(IMAGE)
        chunk.append((head, scored))
        for tail in tails:
            append_chunk(chunk, cut)
            append([image_id] * next(counts), False)
            chunk, cut = [(tail, scored)], False
        if not scored and text.endswith("\n\n"):         # GPT-2's tokenizer reads two newlines as one or two tokens, depending
            append_chunk(chunk, cut)                     # on whether an answer follows; a prompt has none
            chunk, cut = [], True
    append_chunk(chunk, cut)
    return ids, labels


def encode_within(conversations, template, tokenizer, image_tokens, max_length):
    """`encode` after dropping whole trailing turns until the sample fits; an image is never cut.

    Returns input_ids, labels, and the turns that were kept. ValueError if not even the first question and answer fit.
    """
    turns = conversations
    while True:
        tags = sum(turn["value"].count(IMAGE) for turn in turns)
        ids, labels = encode(render(turns, template), tokenizer, image_tokens[:tags])
        if len(ids) <= max_length:
            return ids, labels, turns
        if len(turns) <= 2:
            raise ValueError(f"{len(ids)} tokens ({sum(image_tokens[:tags])} of them visual) with a single answer left, the "
                             f"limit is {max_length}")
        turns = turns[:-2]


# ---------------------------------------------------------------------------------------------------------------------
# A question


def prompt(turns, pictures, tokenizer, template, view, where="prompt", pixels=True):
    """A conversation that ends in a question, with its pictures (PIL), as a sample to `collate` on the left.

    The ids are those that `encode` gives up to this answer when training (tested). Without `pixels` X_v is left out, for
    a batch in which samples share pictures.
    """
    ids, labels = encode(render(turns, template), tokenizer, [view.tokens(*p.size) for p in pictures])
    pictures = pictures if pixels else []
    return {"where": where, "input_ids": ids, "labels": labels, "X_v": view.X_v(pictures), "sizes": [p.size for p in pictures]}


# ---------------------------------------------------------------------------------------------------------------------
# The data set


class Conversations(Dataset):
    """LLaVA-format samples as {where, input_ids, labels, X_v}, made on access, in worker processes.

    Index it by (epoch, i, scored): the epoch because Eq. (2)'s draw is made anew in each one (seeded by seed,
    epoch and i); scored=False gives a copy without labels, which fills the last batch up (see `micro_batches`).
    """

    def __init__(self, records, folder, tokenizer, template, view, max_length=2048, image_position="random", questions=None,
                 seed=0):
        self.records, self.folder, self.tokenizer, self.template = records, folder, tokenizer, template
        self.view, self.max_length = view, max_length
        self.image_position, self.questions, self.seed = image_position, questions, seed

    def __len__(self):
        return len(self.records)

    def encoded(self, i, epoch=0, sizes=None):
        """input_ids, labels, names of the images, turns kept. `sizes`: of the record's pictures, where they are known."""
        record = self.records[i]
        if sizes is None:                                # only tiles depend on them
            size_of = picture_size if self.view.tiling else lambda path: (1, 1)
            sizes = [size_of(image_path(self.folder, name)) for name in image_names(record)]
        rng = random.Random(f"{self.seed} {epoch} {i}")
        turns = arrange(record["conversations"], self.image_position, rng, self.questions)
        try:
            image_tokens = [self.view.tokens(*size) for size in sizes]
            ids, labels, kept = encode_within(turns, self.template, self.tokenizer, image_tokens, self.max_length)
        except ValueError:                               # a longer question was drawn than when the sample was checked
            if epoch == 0:
                raise
            return self.encoded(i, sizes=sizes)
        assert any(label != IGNORE for label in labels), f"{self.records.where(i)}: no scored token"
        names = image_names(record)[:sum(turn["value"].count(IMAGE) for turn in kept)]
        return ids, labels, names, kept

    def __getitem__(self, key):
        epoch, i, scored = key
        try:
            pictures = [load_image(image_path(self.folder, name)) for name in image_names(self.records[i])]
            ids, labels, names, _ = self.encoded(i, epoch, [p.size for p in pictures])
            pictures = pictures[:len(names)]             # those of trailing turns may have been dropped
            X_v = self.view.X_v(pictures)
        except (OSError, ValueError) as error:
            raise ValueError(f"{self.records.where(i)}: {error}") from error
        labels = labels if scored else [IGNORE] * len(ids)
        return {"where": self.records.where(i), "input_ids": ids, "labels": labels, "X_v": X_v,
                "sizes": [p.size for p in pictures], "pictures": names}

    def measure(self, i):
        """(problem or None, tokens, scored tokens, images, turns kept, turns dropped) of sample i."""
        turns = self.records[i]["conversations"]
        if self.tokenizer is None:
            return None, 0, 0, len(image_names(self.records[i])), len(turns), 0
        try:
            ids, labels, names, kept = self.encoded(i)
        except ValueError as error:
            return str(error), 0, 0, 0, 0, 0
        return None, len(ids), sum(x != IGNORE for x in labels), len(names), len(kept), len(turns) - len(kept)

    def question(self, i):
        """Sample i up to its first answer, as a prompt, and that answer."""
        _, _, names, turns = self.encoded(i)
        pictures = [load_image(image_path(self.folder, n)) for n in names[:turns[0]["value"].count(IMAGE)]]
        where = self.records.where(i)
        return prompt(turns[:1], pictures, self.tokenizer, self.template, self.view, where), turns[1]["value"]


class Each(Dataset):
    """function(item) for every item, so that a DataLoader's workers can share the work."""

    def __init__(self, function, items, workers, desc):
        self.function, self.items, self.workers, self.desc = function, items, workers, desc

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return self.function(self.items[i])

    def results(self):
        loader = DataLoader(self, batch_size=64, num_workers=self.workers, collate_fn=list)
        rows = (row for batch in loader for row in batch)
        return list(tqdm(rows, desc=self.desc, total=len(self), disable=not sys.stderr.isatty()))


def look_at(folder, name):
    """(what is wrong with a picture or None, is it missing?, is it there under another extension?)"""
    problem = picture_problem(folder, name)
    elsewhere = not problem and image_path(folder, name) != os.path.join(folder, name)
    return problem, problem == ABSENT.format(name, folder), elsewhere


def inspect(data, workers=0):
    """Check every sample and decode every picture once. Returns ({index: problem}, table) with a row (tokens, scored tokens,
    images, turns, dropped turns, missing images, images under another extension) a sample; the tokens are 0 where `data` has
    no tokenizer, and so are the first five where the sample is bad."""
    problems, pictures, table = {}, {}, np.zeros((len(data), 7), np.int32)
    for i, record in enumerate(data.records):
        if problem := form_problem(record, data.folder):
            problems[i] = problem
        else:
            pictures |= {name: None for name in image_names(record)}
    look = functools.partial(look_at, data.folder)
    pictures = dict(zip(pictures, Each(look, list(pictures), workers, "pictures").results()))
    for i in range(len(data)):
        if i not in problems and (seen := [pictures[n] for n in image_names(data.records[i])]):
            bad, missing, other = zip(*seen)
            table[i, 5:] = sum(missing), sum(other)
            if any(bad):
                problems[i] = next(filter(None, bad))
    good = [i for i in range(len(data)) if i not in problems]
    for i, (problem, *row) in zip(good, Each(data.measure, good, workers, "samples").results()):
        table[i, :5] = row
        if problem:
            problems[i] = problem
    return dict(sorted(problems.items())), table


def report_sources(data, problems, table):
    """[(line, indices of its good samples), ...]: what each source brings, and what is missing there."""
    records, reports, start = data.records, [], 0
    for file, total, count in zip(records.files, records.totals, records.counts):
        here, start = np.arange(start, start + count), start + count
        good, (missing, other) = np.array([i for i in here if i not in problems], int), table[here, 5:].sum(0)
        line = (f"{file}: {count} samples" + f" drawn from {total}" * (count != total) + f", {count - len(good)} bad, "
                f"{missing} images missing, {(table[good, 2] == 0).sum()} text only")
        if other:
            name = next(n for n in image_names(records[here[table[here, 6] > 0][0]]) if look_at(data.folder, n)[2])
            line += f"; {other} found under another extension, e.g. {name} as {os.path.basename(image_path(data.folder, name))}"
        reports.append((line, good))
    return reports


def report_problems(problems, records, most=20):
    """The problems as lines: the first `most` of them, each with file, index and id, then the count of the rest."""
    lines = [f"{records.where(i)}: {problem}" for i, problem in list(problems.items())[:most]]
    return "\n".join(lines + [f"... and {len(problems) - most} more"] * (len(problems) > most))


# ---------------------------------------------------------------------------------------------------------------------
# Batches


def plan_epoch(lengths, global_batch_size, seed, epoch, window=50):
    """The order of one epoch: a list of global batches (arrays of indices), every sample once, the last one maybe short.

    OURS: samples are shuffled, then sorted by length within windows of 50 batches, then the batches are shuffled;
    so those of one batch are about equally long and little is padded. A function of its arguments alone: a run
    resumes from its step number.
    """
    rng = np.random.default_rng([seed, epoch])
    order = rng.permutation(len(lengths))
    window = max(1, min(window, len(order) // (4 * global_batch_size)))    # small data: still batches of other company
    batches = []
    for start in range(0, len(order), window * global_batch_size):
        part = order[start:start + window * global_batch_size]
        part = part[np.argsort(lengths[part], kind="stable")]
        batches += [part[i:i + global_batch_size] for i in range(0, len(part), global_batch_size)]
    full = [b for b in batches if len(b) == global_batch_size]
    rng.shuffle(full)
    return full + [b for b in batches if len(b) < global_batch_size]


def micro_batches(batch, lengths, epoch, micro_batch_size, world_size, rank):
    """This rank's share of one global batch: lists of (epoch, i, scored) keys, as many and as long on every rank.

    Neighbours in length share a micro-batch. A short last batch is filled up with unscored copies, which add nothing
    to the loss, so that no rank waits for one that has no work.
    """
    keys = [(epoch, int(i), True) for i in batch[np.argsort(lengths[batch], kind="stable")]]
    keys += [(epoch, keys[0][1], False)] * (-len(keys) % world_size)
    step = micro_batch_size * world_size
    return [keys[start:start + step][rank::world_size] for start in range(0, len(keys), step)]


class Steps(Dataset):
    """Step number -> this rank's micro-batches of that step: all of training as a function, so a run resumes anywhere."""

    def __init__(self, data, indices, lengths, global_batch_size, micro_batch_size, world_size=1, rank=0):
        self.data, self.indices, self.lengths = data, indices, lengths
        self.global_batch_size, self.micro = global_batch_size, (micro_batch_size, world_size, rank)
        self.per_epoch = -(-len(indices) // global_batch_size)
        self.epoch = None

    def __getitem__(self, step):
        epoch, position = divmod(step, self.per_epoch)
        if epoch != self.epoch:
            self.plan = plan_epoch(self.lengths[self.indices], self.global_batch_size, self.data.seed, epoch)
            self.epoch = epoch
        batch = self.indices[self.plan[position]]
        parts = micro_batches(batch, self.lengths, epoch, *self.micro)
        return [each_once(collate([self.data[key] for key in keys]), self.data.view) for keys in parts]


def each_once(batch, view):
    """A batch whose pictures are all different: one that several samples show goes through g once. `shown`: which one stands
    at each place (`LLaVA.splice`)."""
    names = list(dict.fromkeys(batch["pictures"]))
    if len(names) == len(batch["pictures"]):
        return batch
    squares = batch["X_v"].split([view.n_squares(*size) for size in batch["sizes"]])
    kept = [batch["pictures"].index(name) for name in names]
    return batch | {"X_v": torch.cat([squares[i] for i in kept]), "sizes": [batch["sizes"][i] for i in kept],
                    "shown": [names.index(name) for name in batch["pictures"]]}


def collate(samples, pad_id=0, side="right"):
    """Samples to a batch: input_ids, labels (B, T) padded on one side, attention_mask (B, T), X_v (K, 3, H, W), the pictures'
    sizes and names, ids.

    Training pads on the right, where causal attention never looks; generation on the left.
    """
    T = max(len(s["input_ids"]) for s in samples)
    B = len(samples)
    input_ids = torch.full((B, T), pad_id)                                # (B, T)
    labels = torch.full((B, T), IGNORE)                                   # (B, T)
    attention_mask = torch.zeros(B, T, dtype=torch.long)                  # (B, T)
    for row, s in enumerate(samples):
        n = len(s["input_ids"])
        span = slice(0, n) if side == "right" else slice(T - n, T)
        input_ids[row, span] = torch.tensor(s["input_ids"])
        labels[row, span] = torch.tensor(s["labels"])
        attention_mask[row, span] = 1
    return {"input_ids": input_ids, "labels": labels, "attention_mask": attention_mask,
            "X_v": torch.cat([s["X_v"] for s in samples]),
            "sizes": [size for s in samples for size in s["sizes"]],
            "pictures": [name for s in samples for name in s.get("pictures", ())], "ids": [s["where"] for s in samples]}


# ---------------------------------------------------------------------------------------------------------------------
# python data.py check | show | stats


def colored(ids, labels, tokenizer, color):
    """One sample as text: what is scored green (or in «»), what is not plain, a run of placeholders as [N x <image>]."""
    image_id, out, i = tokenizer.convert_tokens_to_ids(IMAGE), [], 0
    kind = ["image" if t == image_id else "scored" if label != IGNORE else "plain" for t, label in zip(ids, labels)]
    while i < len(ids):
        j = i
        while j < len(ids) and kind[j] == kind[i]:
            j += 1
        text = f"[{j - i} x {IMAGE}]" if kind[i] == "image" else tokenizer.decode(ids[i:j])
        if color:
            text = {"image": "\033[36m", "scored": "\033[1;32m", "plain": "\033[2m"}[kind[i]] + text + "\033[0m"
        elif kind[i] == "scored":
            text = f"«{text}»"
        out.append(text)
        i = j
    return "".join(out)


def use_color():
    return sys.stdout.isatty() and "NO_COLOR" not in os.environ


def quantiles(values):
    return "min {:.0f}   median {:.0f}   95% {:.0f}   max {:.0f}".format(*np.quantile(values, [0, 0.5, 0.95, 1]))


SIZES = {"crop": 224, "pad": 336, "anyres": 336, "hd": 224}                 # of the recipes' CLIPs, in pixels


def open_data(args):
    """The data set as the command line describes it; without --model or --llm, one that is not tokenised."""
    records, tokenizer, template = Records(args.files, args.fraction, args.seed), None, None
    aspect = args.aspect or "crop"
    view = view_of(aspect, args.image_size or SIZES[aspect], 14)
    if args.model:
        model = LLaVA.from_pretrained(args.model)
        tokenizer, view = model.tokenizer, model.view
        if not (args.template or "template" in model.meta):
            raise ValueError(f"{args.model} does not say which template it was trained with; --template "
                             + " | ".join(TEMPLATES))
        template = TEMPLATES[args.template or model.meta["template"]]
    elif args.llm:
        tokenizer = load_tokenizer(args.llm)
        template = TEMPLATES[args.template] if args.template else template_for(AutoConfig.from_pretrained(args.llm), tokenizer)
    if tokenizer:
        check_template(template, tokenizer)
    return Conversations(records, args.images, tokenizer, template, view, args.max_length, args.image_position)


def print_stats(data, problems, table):
    for line, good in report_sources(data, problems, table):
        print(line)
        if not len(good):
            continue
        tokens, scored, images, turns, dropped = table[good, :5].T
        print(f"  answers per sample    {quantiles(turns / 2)}")
        print(f"  images                {images.sum()} in {(images > 0).sum()} samples, {(images == 0).sum()} text only")
        if data.tokenizer:
            print(f"  tokens per sample     {quantiles(tokens)}   ({data.view.said})")
            print(f"  scored tokens         {scored.sum()} of {tokens.sum()} ({100 * scored.sum() / tokens.sum():.1f}%), "
                  f"{(scored == 0).sum()} samples without any")
            print(f"  trimmed at {data.max_length:<10} {(dropped > 0).sum()} samples lose {dropped.sum() // 2} answers")


def show_tiles(args):
    """python data.py show --tiles PICTURE out.png: how LLaVA-NeXT (with --aspect hd, LLaVA-1.5-HD; with --model, that one) sees
    a picture."""
    aspect = args.aspect or "anyres"
    view = load_settings(args.model)[2] if args.model else view_of(aspect, args.image_size or SIZES[aspect], 14)
    if args.command != "show" or not view.tiling:
        raise ValueError("--tiles draws, so the command is show, and the aspect anyres or hd; not "
                         f"{args.command} and {view.aspect}")
    print(tiles.draw(load_image(args.tiles), view.tiling, args.files[0]))
    print(f"wrote {args.files[0]}")
    return 0


def arguments(argv):
    parser = argparse.ArgumentParser(description="Check, show or measure LLaVA-format data.", allow_abbrev=False)
    parser.add_argument("command", choices=["check", "show", "stats"])
    parser.add_argument("files", nargs="+", metavar="FILE", help="JSON array or JSON lines; FILE=0.5, FILE=20000: part of it")
    parser.add_argument("--fraction", type=float, default=1.0, help="share that is taken of every file")
    parser.add_argument("--seed", type=int, default=42, help="train.py's, which decides on the parts")
    parser.add_argument("--images", metavar="DIR", help="folder that the image names are relative to")
    parser.add_argument("--model", metavar="DIR", help="checkpoint whose tokenizer and template to use")
    parser.add_argument("--llm", metavar="DIR|ID", help="language model whose tokenizer to use")
    parser.add_argument("--template", choices=TEMPLATES)
    parser.add_argument("--image_position", choices=["random", "first", "as_written"], default="random")
    parser.add_argument("--aspect", choices=ASPECTS, help="how pictures are looked at: crop, or --model's own")
    parser.add_argument("--image_size", type=int, help=f"of CLIP, in pixels: {SIZES}, by the aspect, or --model's own")
    parser.add_argument("--tiles", metavar="PICTURE", help="draw how a picture is tiled (show --aspect anyres|hd) into FILE")
    parser.add_argument("--max_length", type=int, default=2048)
    parser.add_argument("--index", type=int, default=0, help="which sample to show")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    return parser.parse_args(argv)


def main(argv=None):
    args = arguments(argv)
    if args.model and (typed := [f"--{f}" for f in ("llm", "aspect", "image_size") if getattr(args, f)]):
        raise ValueError(f"--model brings its own {', '.join(typed)}; leave it out")
    if args.tiles:
        return show_tiles(args)
    data = open_data(args)
    if args.command == "show":
        if not data.tokenizer:
            raise ValueError("show needs --model DIR or --llm DIR for the tokenizer")
        if not 0 <= args.index < len(data):
            raise ValueError(f"--index {args.index}: the file has samples 0 to {len(data) - 1}")
        if problem := form_problem(data.records[args.index], data.folder) or data.measure(args.index)[0]:
            raise ValueError(f"{data.records.where(args.index)}: {problem}")
        ids, labels, names, _ = data.encoded(args.index)
        print(f"{data.records.where(args.index)}, template {data.template.name}, {len(ids)} tokens, "
              f"{sum(x != IGNORE for x in labels)} scored, images {names}")
        print(colored(ids, labels, data.tokenizer, use_color()))
        return 0
    problems, table = inspect(data, args.workers)
    if args.command == "stats":
        print_stats(data, problems, table)
    elif len(data.records.files) > 1 or data.records.counts != data.records.totals or table[:, 5:].any():
        print("\n".join(line for line, _ in report_sources(data, problems, table)))
    if problems:
        print(report_problems(problems, data.records, most=len(problems)))
    print(f"{len(data)} samples, {len(problems)} bad")
    return 1 if problems else 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
