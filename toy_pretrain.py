"""The toy's pretrained parts: the tokenizer, the language model and the CLIP of toy_parts/, and how they were made.

    python toy_pretrain.py --part llm  --out toy_parts         33 minutes on one core
    python toy_pretrain.py --part clip --out toy_parts         15 minutes on one core

Everything here is OURS. What each part stands in for:

    clip         CLIP ViT-L/14: contrastive on (picture, caption) pairs of the toy world (toy.py)
    llm          Vicuna: trained on text alone. Scenes are told to it in writing; it never sees a picture.
    small_llm    the same with half of the layers, for the ablation of model size (Table 8); not shipped

The shipped ones have seed 0. Colour-shape pairs of HELD_OUT are in no picture and no caption here, only in written scenes.
"""
import math
import random
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn.utils.rnn import pad_sequence
from transformers import AddedToken, CLIPConfig, CLIPModel, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from data import TEMPLATES, encode, render
from images import preprocess
from model import IGNORE
from records import IMAGE, run_command, typed_flags
from toy import (CELL, COLOURS, GRID, KINDS, PAIRS, SEEN, SIDE, Scene, Thing, caption, draw, questions, sample_scene, teacher)

TEMPLATE = TEMPLATES["llava_v0"]
BOS, EOS, PAD = 1, 2, 3                  # ids of <s>, </s>, <pad>; <unk> is 0 as in LLaMA, though byte-level BPE has none


def notes(scene, tokenizer):
    """The scene in writing, for a reader without eyes: a note per cell, in reading order, as lists of word ids.

    A note is a bag of words: size, colour and shape (or "." where nothing lies), row "1" to "4", column "A" to "D".
    """
    words = {t.cell: (t.size, t.colour, t.shape) for t in scene.things}
    cells = [(row, column) for row in range(GRID) for column in range(GRID)]
    return [[tokenizer.encode(" " + word, add_special_tokens=False)[0]
             for word in (*words.get(cell, "."), "1234"[cell[0]], "ABCD"[cell[1]])] for cell in cells]


def build_tokenizer(rng):
    """Byte-level BPE, trained until every word of the world is one token."""
    texts = [f"{TEMPLATE.first}{question}{TEMPLATE.reply} {answer}{TEMPLATE.STOP}"
             for kind in ("conversation", "brief", "detail_description", "complex_reasoning") * 2000
             for question, answer in teacher(kind, sample_scene(rng, PAIRS), rng, PAIRS)]
    bpe = Tokenizer(models.BPE())
    words = Regex(r" ?[A-Za-z]+| ?\d+|#+| ?[^\sA-Za-z\d#]+|\s")
    bpe.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(words, "isolated"),
                                                 pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(texts + [" . 1 2 3 4 in A B C D"] * 100, trainers.BpeTrainer(
        vocab_size=1600, min_frequency=20, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        special_tokens=["<unk>", "<s>", "</s>", "<pad>"], show_progress=False))
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", BOS)])
    return PreTrainedTokenizerFast(tokenizer_object=bpe, unk_token="<unk>", bos_token="<s>", eos_token="</s>",
                                   pad_token="<pad>", model_max_length=1024, clean_up_tokenization_spaces=False)


def schedule(optimizer, lr, done):
    """Linear warm-up over the first 3%, then cosine, by the share of the work that is done."""
    for group in optimizer.param_groups:
        group["lr"] = lr * min(1, done / 0.03 + 1e-3) * 0.5 * (1 + math.cos(math.pi * done))


def chats(tokenizer, rng, done, n=200, tokens=2000):
    """`n` chats about written scenes, as batches of about `tokens` tokens: (input_ids, labels, notes).

    Where LLaVA has a picture, <image> stands for the 16 notes. All pairs occur, HELD_OUT too. A curriculum: scenes of few
    things first; look-ups "in short" alone until 30% are done; the system message, the same everywhere, mostly left out until
    70% are.
    """
    samples = []
    while len(samples) < n:
        scene = sample_scene(rng, PAIRS)
        if len(scene.things) > 1 + 400 * done: continue
        kind = rng.choices(("conversation", "brief", "detail_description", "complex_reasoning"), (12, 2, 2, 1))[0]
        said = teacher(kind, scene, rng, PAIRS)
        if done < 0.3:
            said = [(q.text, q.answer) for q in questions(scene, rng, PAIRS) if q.kind not in KINDS]
            rng.shuffle(said)
        turns = [{"from": who, "value": text} for turn in said for who, text in zip(("human", "gpt"), turn)]
        turns[0]["value"] = f"{IMAGE}\n{turns[0]['value']}"
        template = TEMPLATE._replace(first="Human: ") if done < 0.7 and rng.random() < 0.9 else TEMPLATE
        samples.append((*encode(render(turns, template), tokenizer, [GRID * GRID]), notes(scene, tokenizer)))
    samples.sort(key=lambda sample: len(sample[0]))
    pad = lambda rows, value: pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value)
    batches = []
    while samples:
        size = max(1, tokens // len(samples[-1][0]))
        ids, labels, written = zip(*samples[-size:])
        del samples[-size:]
        batches.append((pad(ids, PAD), pad(labels, IGNORE), pad([cell for scene in written for cell in scene], PAD)))
    rng.shuffle(batches)
    return batches


def pretrain_llm(tokenizer, rng, steps, lr=1.5e-3, layers=4):
    """A small Llama on text alone, with the answer-only loss of Eq. (3): it learns to look things up in written scenes.

    A note enters as the sum of its words' embeddings over the root of their number: what it says lies in the space of word
    embeddings, where stage 1 puts W Z_v.
    """
    tokenizer.add_tokens([AddedToken(IMAGE, special=True, normalized=False)])
    image_id = tokenizer.convert_tokens_to_ids(IMAGE)
    model = LlamaForCausalLM(LlamaConfig(
        vocab_size=image_id, hidden_size=128, intermediate_size=384, num_hidden_layers=layers, num_attention_heads=8,
        max_position_embeddings=1024, bos_token_id=BOS, eos_token_id=EOS, pad_token_id=PAD, tie_word_embeddings=True,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},            # a match of words should not fade with distance
        initializer_range=0.08))         # the usual 0.02 is for widths in the thousands: a small model hardly starts to learn
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.0)
    for layer in model.model.layers:     # like attends to like, and what is attended to is copied: half of a look-up already
        layer.self_attn.k_proj.weight.data.copy_(layer.self_attn.q_proj.weight)
        layer.self_attn.o_proj.weight.data.copy_(layer.self_attn.v_proj.weight.T)
    embed, pool, start = model.get_input_embeddings(), [], time.time()
    for step in range(steps):
        schedule(optimizer, lr, step / steps)
        pool = pool or chats(tokenizer, rng, step / steps)
        ids, labels, written = pool.pop()
        there = (written != PAD)[..., None]                                     # (B N, words, 1)
        H_v = (embed(written) * there).sum(1) / there.sum(1).sqrt()             # (B N, D)
        is_note = ids == image_id
        H = embed(ids.masked_fill(is_note, PAD)).masked_scatter(is_note[..., None], H_v)      # (B, T, D)
        h, scored = model.model(inputs_embeds=H).last_hidden_state[:, :-1], labels[:, 1:] != IGNORE
        loss = torch.nn.functional.cross_entropy(model.lm_head(h[scored]), labels[:, 1:][scored])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 100 == 0:
            print(f"llm  step {step + 1:5d}  loss {loss.item():.4f}  {time.time() - start:6.0f} s", flush=True)
    return model.eval()


def siblings(rng, n=4):
    """n pictures and captions that differ in colours, shapes or places alone: what CLIP learns most from.

    Most of the shape siblings are painted in any RGB, their colours left unsaid, so that a shape is learnt apart from
    eight colours. A paint is never nearest to a colour that is held out with that shape.
    """
    scene, vary = sample_scene(rng), rng.choice(("colour", "colour", "shape", "shape", "shape", "place"))
    painted = vary == "shape" and rng.random() < 0.85
    say = (rng.random() < 0.5, not painted,
           "in {0.place}" if vary == "place" else rng.choice(("", "in {0.place}")))
    kept = 0 if vary == "shape" else 1
    pools = [rng.sample(pool, len(pool)) for pool in ([p for p in SEEN if p[kept] == t.pair[kept]] for t in scene.things)]
    for i in range(n):
        things, cells = [], rng.sample(range(GRID * GRID), len(scene.things))
        for t, cell, pool in zip(scene.things, cells, pools):
            pair, box, paint = t.pair, t.box, None
            if vary == "place":
                box = (cell % GRID * CELL + box[0] % CELL, cell // GRID * CELL + box[1] % CELL, *box[2:])
            else:
                pair = pool[i]
            while painted:
                paint = tuple(rng.randint(0, 255) for _ in range(3))
                apart = {name: sum(abs(p - q) for p, q in zip(paint, rgb)) for name, rgb in COLOURS.items()}
                if min(paint) < 160 and (min(apart, key=apart.get), pair[1]) in SEEN: break
            things.append(Thing(*pair, box, paint))
        sibling = Scene(tuple(sorted(things, key=lambda t: t.cell)), rng.randint(215, 250))
        yield sibling, caption(sibling, rng, say)


def pretrain_clip(tokenizer, rng, steps, lr=1e-3, batch=64):
    """A small CLIP, contrastive on pictures and captions of SEEN pairs, drawn as it goes."""
    size = {"hidden_size": 128, "intermediate_size": 512, "num_attention_heads": 4, "initializer_factor": 2.5}
    model = CLIPModel(CLIPConfig(
        projection_dim=128, vision_config={**size, "num_hidden_layers": 2, "image_size": SIDE, "patch_size": CELL},
        # CLIPTextModel pools at the first eos_token_id; 2 would mean "the largest id" (an old bug that transformers keeps
        # for old folders), so a text ends where its padding starts, and each text has at least one.
        text_config={**size, "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2,
                     "vocab_size": len(tokenizer), "max_position_embeddings": 64,
                     "bos_token_id": BOS, "eos_token_id": PAD, "pad_token_id": PAD}))
    for k in range(GRID * GRID):         # a row and a column stand out from the start, or a patch soon forgets where it lies
        model.vision_model.embeddings.position_embedding.weight.data[1 + k, [k // GRID, GRID + k % GRID]] += 8
    model.vision_model.pre_layrnorm.weight.data.fill_(8)     # and what it shows stays louder than what the layers add to it
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.98), weight_decay=0.0)
    start = time.time()
    for step in range(steps):
        schedule(optimizer, lr, step / steps)
        scenes, texts = zip(*(pair for _ in range(batch // 4) for pair in siblings(rng)))
        texts = [[BOS, *tokenizer.encode(text, add_special_tokens=False), PAD] for text in texts]
        T = max(map(len, texts))
        out = model(input_ids=torch.tensor([t + [PAD] * (T - len(t)) for t in texts]),
                    pixel_values=torch.stack([preprocess(draw(scene), SIDE) for scene in scenes]), return_loss=True)
        optimizer.zero_grad()
        out.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % 50 == 0:
            print(f"clip step {step + 1:5d}  loss {out.loss.item():.4f}  {time.time() - start:6.0f} s", flush=True)
    shrink(model.vision_model, 0.045)
    return model.eval()


@torch.no_grad()
def shrink(vision, s):
    """Scale the residual stream of a CLIP: what it computes stays the same, for each layer norm undoes it.

    Z_v comes to the size of word embeddings, so that W need not first learn to be small.
    """
    writers = [part for layer in vision.encoder.layers for part in (layer.self_attn.out_proj, layer.mlp.fc2)]
    for part in (vision.pre_layrnorm, *writers):
        part.weight *= s
        part.bias *= s


@dataclass(frozen=True)
class Pretrain:
    part: str                            # llm, clip or small_llm
    out: str                             # the part goes to OUT/PART
    seed: int = 0
    steps: int = None                    # fewer, to try it


def pretrain(args):
    """Build one part."""
    torch.manual_seed(args.seed)
    out, rng, start = Path(args.out) / args.part, random.Random(args.seed), time.time()
    tokenizer = build_tokenizer(random.Random(args.seed))
    tokenizer.save_pretrained(out)
    build, steps = {"llm": (pretrain_llm, 5000), "clip": (pretrain_clip, 4500),
                    "small_llm": (partial(pretrain_llm, layers=2), 5000)}[args.part]
    build(tokenizer, rng, args.steps or steps).save_pretrained(out)
    print(f"{out}: {(time.time() - start) / 60:.1f} minutes on {torch.get_num_threads()} threads")


def arguments(argv):
    return pretrain, Pretrain(**typed_flags(Pretrain, argv, __doc__, {"part": ["llm", "clip", "small_llm"]}))


def main(argv=None):
    run_command(__doc__, arguments, argv)


if __name__ == "__main__":
    main()
