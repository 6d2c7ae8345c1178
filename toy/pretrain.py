"""The toy's pretrained parts in toy/pretrained/, and how they were made: a CLIP, a language model.

    python -m toy.pretrain --part llm  --out toy/pretrained     33 minutes on one core
    python -m toy.pretrain --part clip --out toy/pretrained     15 minutes on one core

Everything here is OURS. What each part stands in for:

    clip         CLIP ViT-L/14: contrastive on (picture, caption) pairs of toy/world.py
    llm          Vicuna: trained on text alone. Scenes are told to it in writing; it sees no picture
    small_llm    the same with half of the layers, for the smaller model of Table 8; not shipped

The shipped ones have seed 0. Pairs of colour and shape that are HELD_OUT are in no picture and no
caption here, only in written scenes.

Letters in shape comments: B texts of T tokens, N = 16 notes where LLaVA has visual tokens, D wide.
"""
import math
import random
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AddedToken,
    CLIPConfig,
    CLIPImageProcessorPil,
    CLIPModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from data import encode, render
from parts.files import IGNORE, IMAGE, run_main, typed_flags
from parts.templates import TEMPLATES
from parts.views import preprocess
from toy import world
from toy.teacher import teach
from toy.world import GRID, PAIRS, SEEN, sample_scene

TEMPLATE = TEMPLATES["llava_v0"]
BOS, EOS, PAD = 1, 2, 3                  # of <s>, </s>, <pad>; <unk> is 0 as in LLaMA, never used
RESPONSES = ("conversation", "brief", "detail_description", "complex_reasoning")


def build_tokenizer(rng):
    """Byte-level BPE, trained until every word of the world is one token."""
    texts = [" . 1 2 3 4 in A B C D"] * 100
    for kind in RESPONSES * 2000:
        for question, answer in teach(kind, sample_scene(rng, PAIRS), rng, PAIRS):
            texts.append(f"{TEMPLATE.first}{question}{TEMPLATE.reply} {answer}{TEMPLATE.STOP}")
    return train_tokenizer(texts)


def train_tokenizer(texts):
    """Byte-level BPE of some texts: a word that is in 20 of them is one token."""
    words = Regex(r" ?[A-Za-z]+| ?\d+|#+| ?[^\sA-Za-z\d#]+|\s")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(words, "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=1600, min_frequency=20, show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=["<unk>", "<s>", "</s>", "<pad>"],
    ))
    bpe.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, unk_token="<unk>", bos_token="<s>", eos_token="</s>",
        pad_token="<pad>", model_max_length=1024, clean_up_tokenization_spaces=False)


def descend(model, losses, steps, peak):
    """AdamW along `losses`, an iterator: 3% warm-up, then cosine, gradients clipped to norm 1."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.98), weight_decay=0.0)
    start = time.time()
    for step in range(steps):
        loss = next(losses)
        done = step / steps
        warm_up = min(1, done / 0.03 + 1e-3)
        for group in optimizer.param_groups:
            group["lr"] = peak * warm_up * 0.5 * (1 + math.cos(math.pi * done))
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 50 == 0:
            seconds = time.time() - start
            print(f"step {step + 1:5d}  loss {loss.item():.4f}  {seconds:6.0f} s", flush=True)
    return model.eval()


def pad(rows, value):
    rows = [torch.tensor(row) for row in rows]
    return pad_sequence(rows, batch_first=True, padding_value=value)


# ------------------------------------------------------------------------------------------------
# The language model


def written_notes(scene, tokenizer):
    """The scene in writing, for a reader without eyes: a note a cell, as lists of word ids.

    A note is a bag of words: size, colour and shape (or "." where nothing lies), then the row "1"
    to "4" and the column "A" to "D". Notes are in reading order, as patches are.
    """
    things = {thing.cell: (thing.size, thing.colour, thing.shape) for thing in scene.things}
    notes = []
    for k in range(GRID * GRID):
        row, column = divmod(k, GRID)
        words = (*things.get((row, column), "."), "1234"[row], "ABCD"[column])
        notes.append(tokenizer.encode(" " + " ".join(words), add_special_tokens=False))
    return notes


def draw_chat(scene, rng, done):
    """A chat about a scene, [(question, answer), ...]: look-ups alone until 30% are done."""
    [kind] = rng.choices(RESPONSES, (12, 2, 2, 1))
    chat = teach(kind, scene, rng, PAIRS)
    if done >= 0.3:
        return chat
    look_ups = []
    for question in world.questions_about(scene, rng, PAIRS):
        if question.kind not in world.KINDS:
            look_ups.append((question.text, question.answer))
    rng.shuffle(look_ups)
    return look_ups


def sample_chats(tokenizer, rng, done, n=200):
    """`n` chats about written scenes, [(ids, labels, notes), ...].

    Where LLaVA has a picture, <image> stands for the 16 notes. All pairs occur, HELD_OUT too. It is
    a curriculum: scenes of few things come first.
    """
    samples = []
    while len(samples) < n:
        scene = sample_scene(rng, PAIRS)
        if len(scene.things) > 1 + 400 * done:
            continue
        ids, labels = encode_chat(draw_chat(scene, rng, done), TEMPLATE, tokenizer, rng, done)
        samples.append((ids, labels, written_notes(scene, tokenizer)))
    return samples


def encode_chat(chat, template, tokenizer, rng, done):
    """(ids, labels) of [(question, answer), ...] behind 16 notes.

    The system message, the same everywhere, is mostly left out until 70% are done.
    """
    turns = []
    for question, answer in chat:
        turns.append({"from": "human", "value": question})
        turns.append({"from": "gpt", "value": answer})
    turns[0]["value"] = f"{IMAGE}\n{turns[0]['value']}"
    if done < 0.7 and rng.random() < 0.9:
        template = template._replace(first=template.later)
    return encode(render(turns, template), tokenizer, [GRID * GRID])


def batch_chats(samples, rng, tokens):
    """Chats as batches of about `tokens` tokens, of similar length, in random order."""
    samples = sorted(samples, key=lambda sample: len(sample[0]))
    batches = []
    while samples:
        size = max(1, tokens // len(samples[-1][0]))
        ids, labels, notes = zip(*samples[-size:], strict=True)
        del samples[-size:]
        batches.append((pad(ids, PAD), pad(labels, IGNORE), pad(sum(notes, []), PAD)))
    rng.shuffle(batches)
    return batches


def build_llm(vocab_size, layers):
    """A small Llama whose start is half of a look-up: like attends to like, and is copied."""
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=vocab_size, hidden_size=128, intermediate_size=384, num_hidden_layers=layers,
        num_attention_heads=8, max_position_embeddings=1024, tie_word_embeddings=True,
        bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD,
        # A match of words should not fade with distance.
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        # The usual 0.02 is for widths in the thousands: a small model hardly starts to learn.
        initializer_range=0.08,
    ))
    for layer in model.model.layers:
        attention = layer.self_attn
        attention.k_proj.weight.data.copy_(attention.q_proj.weight)
        attention.o_proj.weight.data.copy_(attention.v_proj.weight.T)
    return model


def pretrain_llm(tokenizer, draw_chats, rng, steps, layers, peak, tokens):
    """A language model on text alone, by Eq. (3): it learns to look things up in what is written.

    draw_chats   from the share of the steps that are done to samples like those of `sample_chats`
    """
    tokenizer.add_tokens([AddedToken(IMAGE, special=True, normalized=False)])
    image_id = tokenizer.convert_tokens_to_ids(IMAGE)
    model = build_llm(image_id, layers)

    def losses():
        batches = []
        for step in range(steps):
            if not batches:
                batches = batch_chats(draw_chats(step / steps), rng, tokens)
            yield chat_loss(model, image_id, *batches.pop())
    return descend(model, losses(), steps, peak)


def chat_loss(model, image_id, ids, labels, notes):
    """The mean loss of the answers' tokens, with notes where the ids are <image>.

    A note enters as the sum of its words' embeddings over the root of their number: what it says
    lies in the space of word embeddings, where stage 1 puts W Z_v.
    """
    embed = model.get_input_embeddings()
    is_word = (notes != PAD)[..., None]                                  # (B N, words, 1)
    H_v = (embed(notes) * is_word).sum(1) / is_word.sum(1).sqrt()        # (B N, D)
    is_note = ids == image_id                                            # (B, T)
    H = embed(ids.masked_fill(is_note, PAD))                             # (B, T, D)
    H = H.masked_scatter(is_note[..., None], H_v)
    h = model.model(inputs_embeds=H).last_hidden_state[:, :-1]
    targets = labels[:, 1:]
    scored = targets != IGNORE
    return cross_entropy(model.lm_head(h[scored]), targets[scored])


# ------------------------------------------------------------------------------------------------
# CLIP


def siblings(rng, n=4):
    """n pictures and captions that differ in colours, shapes or places alone.

    They are what CLIP learns most from. Most siblings of different shapes are painted in any RGB,
    their colours left unsaid, so that a shape is learnt apart from eight colours.
    """
    scene = sample_scene(rng)
    vary = rng.choice(("colour", "colour", "shape", "shape", "shape", "place"))
    painted = vary == "shape" and rng.random() < 0.85
    names_size = rng.random() < 0.5
    names_place = vary == "place" or rng.choice((False, True))
    shared = 0 if vary == "shape" else 1                     # of a pair: the colour, or the shape
    pools = []
    for thing in scene.things:
        pool = [pair for pair in SEEN if pair[shared] == thing.pair[shared]]
        pools.append(rng.sample(pool, len(pool)))
    for i in range(n):
        cells = rng.sample(range(GRID * GRID), len(scene.things))
        things = []
        for thing, cell, pool in zip(scene.things, cells, pools, strict=True):
            if vary == "place":
                thing = moved(thing, cell)
            else:
                colour, shape = pool[i]
                thing = replace(thing, colour=colour, shape=shape)
            if painted:
                thing = replace(thing, paint=draw_paint(thing.shape, rng))
            things.append(thing)
        sibling = world.scene_with(things, rng.randint(215, 250))
        yield sibling, world.caption(sibling, rng, (names_size, not painted, names_place))


def moved(thing, cell):
    row, column = divmod(cell, GRID)
    x, y, width, height = thing.box
    left, top = column * world.CELL, row * world.CELL
    return replace(thing, box=(left + x % world.CELL, top + y % world.CELL, width, height))


def draw_paint(shape, rng):
    """Any RGB but a pale one, never nearest to a colour that is held out with the shape."""
    while True:
        paint = tuple(rng.randint(0, 255) for _ in range(3))
        distances = {}
        for colour, rgb in world.COLOURS.items():
            distances[colour] = sum(abs(p - q) for p, q in zip(paint, rgb, strict=True))
        nearest = min(distances, key=distances.get)
        if min(paint) < 160 and (nearest, shape) in SEEN:
            return paint


def build_clip(vocab_size):
    """A small CLIP, in which a patch cannot easily forget where it lies."""
    size = {"intermediate_size": 512, "num_attention_heads": 4, "num_hidden_layers": 2,
            "initializer_factor": 2.5}
    vision = {**size, "hidden_size": 128, "image_size": world.SIDE,
              "patch_size": world.CELL}
    # CLIPTextModel pools at the first eos_token_id; 2 would mean "the largest id" (an old bug that
    # transformers keeps for old folders). So a text ends where its padding starts.
    text = {**size, "hidden_size": 64, "intermediate_size": 256, "vocab_size": vocab_size,
            "max_position_embeddings": 64, "bos_token_id": BOS, "eos_token_id": PAD,
            "pad_token_id": PAD}
    model = CLIPModel(CLIPConfig(projection_dim=128, vision_config=vision, text_config=text))
    places = model.vision_model.embeddings.position_embedding.weight.data
    for k in range(GRID * GRID):         # a row and a column stand out from the start
        row, column = divmod(k, GRID)
        places[1 + k, [row, GRID + column]] += 8
    # What it shows stays louder than what the layers add to it.
    model.vision_model.pre_layrnorm.weight.data.fill_(8)
    return model


def pretrain_clip(tokenizer, rng, steps, batch_size=64):
    """A CLIP, contrastive on pictures and captions of SEEN pairs, drawn as it goes."""
    model = build_clip(len(tokenizer))

    def losses():
        while True:
            ids = []
            pictures = []
            for _ in range(batch_size // 4):
                for scene, text in siblings(rng):
                    words = tokenizer.encode(text, add_special_tokens=False)
                    ids.append([BOS, *words, PAD])           # each text ends in a <pad>
                    pictures.append(preprocess(world.draw_scene(scene), world.SIDE))
            yield model(input_ids=pad(ids, PAD), pixel_values=torch.stack(pictures),
                        return_loss=True).loss
    descend(model, losses(), steps, peak=1e-3)
    shrink(model.vision_model, 0.045)
    return model


@torch.no_grad()
def shrink(vision, scale):
    """Scale the residual stream of a CLIP: what it computes stays, for each layer norm undoes it.

    Z_v comes to the size of word embeddings, so that W need not first learn to be small.
    """
    writers = [vision.pre_layrnorm]
    for layer in vision.encoder.layers:
        writers += [layer.self_attn.out_proj, layer.mlp.fc2]
    for part in writers:
        part.weight *= scale
        part.bias *= scale


def save_processor(size, folder):
    """How such a tower is shown pictures, for its folder."""
    crop_size = {"height": size, "width": size}
    processor = CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size=crop_size)
    processor.save_pretrained(folder)


# ------------------------------------------------------------------------------------------------
# The command


@dataclass(frozen=True)
class Config:
    part: str                            # llm, clip or small_llm
    out: str                             # the part goes to OUT/PART
    seed: int = 0
    steps: int = None                    # fewer, to try it

    CHOICES: ClassVar = {"part": ["llm", "clip", "small_llm"]}


def main(argv=None):
    config = Config(**typed_flags(Config, argv, __doc__))
    torch.manual_seed(config.seed)
    rng = random.Random(config.seed)
    start = time.time()
    out = Path(config.out, config.part)
    tokenizer = build_tokenizer(random.Random(config.seed))
    tokenizer.save_pretrained(out)
    if config.part == "clip":
        model = pretrain_clip(tokenizer, rng, config.steps or 4500)
        save_processor(model.config.vision_config.image_size, out)
    else:
        layers = {"llm": 4, "small_llm": 2}[config.part]
        model = pretrain_llm(tokenizer, partial(sample_chats, tokenizer, rng), rng,
                             config.steps or 5000, layers, peak=1.5e-3, tokens=2000)
    model.save_pretrained(out)
    minutes = (time.time() - start) / 60
    print(f"{out}: {minutes:.1f} minutes on {torch.get_num_threads()} threads")


if __name__ == "__main__":
    run_main(main)
