"""
REACT: customising CLIP by retrieval (Diss. Ch. 2). From class names alone: retrieve image-text
pairs of a large corpus (extras/retrieve.py), train gated blocks in a locked CLIP on them
(parts/gated.py), classify zero-shot better.

    torchrun --nproc_per_node=8 -m extras.react train --clip DIR|ID --retrieved out/retrieved \\
        --out out/react

The result is a CLIP folder. extras/react_eval.py compares it with the CLIP that it was, and
`train.py --vision out/react` takes its image tower as g.
"""
import dataclasses
import math
import re
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch.utils.data import Dataset
from transformers import CLIPImageProcessorPil

from extras.retrieve import load_clip, open_index, tokenise_for_clip
from parts.files import (
    check_least,
    read_lines,
    read_value,
    run_command,
    run_main,
    typed,
    typed_fields,
)
from parts.gated import gate
from parts.ranks import DTYPES, Machine, Optimizer, share_of
from parts.run import Run, config_table, theta_table
from parts.views import preprocess
from train import lr_at

# Diss. Table 2.6, with the parameters that train in ViT-B/32 with 6 gated layers: which towers are
# gated, and which names train besides logit_scale.
ROWS = {
    "locked_text_gated_image": (["vision_model"], r"\.gated\."),             # 42.5M: REACT
    # OFFICIAL: text_projection is locked, too (87.8M); the table's number has it
    "locked_text": ([], r"vision_model|visual_projection|text_projection"),  # 88.1M
    "locked_image": ([], r"text_model|text_projection"),                     # 63.4M
    "gated_text": (["text_model"], r"\.gated\."),                            # 18.9M
    "full": ([], r""),                                                       # 151.3M
    # OURS: the gated blocks of both towers, 61.4M. The table says 89.8M, and not of what; these
    # and all that lies outside of both towers' layers would be as many. It is not settled.
    "gated_both": (["vision_model", "text_model"], r"\.gated\."),
}
WARMUP = 0.075           # 5,000 of 66,600 steps, linear; then cosine to 0


def customise(clip, row, k=6):
    """Gate and freeze a CLIP for a row of Diss. Table 2.6, in place.

    Returns theta, {name: parameter}. ValueError if a tower has fewer than k layers.
    OFFICIAL: the last 6 layers of B/32, B/16 and L/14 are gated, the last 12 of bigG/14.
    """
    towers, trained = ROWS[row]
    for tower in towers:
        gate(getattr(clip, tower), k)
    return unlock(clip, f"^logit_scale$|{trained}")


def unlock(clip, trained):
    """Let those parameters train whose names match, and no others. Returns {name: parameter}."""
    for name, p in clip.named_parameters():
        p.requires_grad_(bool(re.search(trained, name)))
    return {name: p for name, p in clip.named_parameters() if p.requires_grad}


# -----------------------------------------------------------------------------
# The loss


def react_loss(u, v, tau, gamma):
    """L_i2t + L_t2i, sums over the batch (Diss. Eqs. 2.4-2.6).

    u, v (B, D): features of pictures and texts, of length 1; tau multiplies. Positive for i are all
    k with v_k . v_i >= gamma, and i itself. With gamma 1 and different texts it is 2 B times the
    loss of CLIP. OFFICIAL: the public code has no gamma, and trains with that.
    """
    positive = v @ v.T >= gamma                          # (B, B)  k in P(i) = Q(i)
    positive.fill_diagonal_(True)                        # rounding makes v . v less than 1
    share = positive / positive.sum(1, keepdim=True)     # (B, B)  1 / |P(i)|, of image i
    logits = tau * u @ v.T                               # (B, B)
    i2t = -(share * logits.log_softmax(1)).sum()         # ()  Diss. Eq. 2.5
    t2i = -(share.T * logits.log_softmax(0)).sum()       # ()  Diss. Eq. 2.6
    return i2t + t2i


def choose_gamma(gamma, theta):
    """The gamma of Diss. Eq. 2.4 that was asked for; else 0.9, or 1 where the text tower trains.

    OURS: a text tower that trains moves its own positives. Texts that come near each other become
    positives, which draws them nearer, until all are one and the loss of a batch of B is ln B.
    """
    if gamma is not None:
        return gamma
    trains_texts = any(name.startswith("text_model") for name in theta)
    return 1.0 if trains_texts else 0.9


def global_loss(u, v, tau, gamma, machine):
    """The loss over all ranks' features, on the scale of CLIP's own, a mean of 2 B terms."""
    if machine.world_size > 1:
        u = gather_features(u, machine)                  # (B, D)
        v = gather_features(v, machine)                  # (B, D)
    return react_loss(u, v, tau, gamma) / (2 * len(u))


def gather_features(x, machine):
    """Features of all ranks, one below the other, (share, D) -> (B, D).

    Every rank then computes the same loss of the same features, so each has the gradient of its own
    features already; times the ranks, because DistributedDataParallel averages over them.
    """
    parts = [torch.empty_like(x) for _ in range(machine.world_size)]
    dist.all_gather(parts, x.detach().contiguous())
    parts[machine.rank] = x
    if x.requires_grad:
        x.register_hook(lambda grad: machine.world_size * grad)
    return torch.cat(parts)


# -----------------------------------------------------------------------------
# Training


@dataclass(frozen=True)
class ReactConfig:
    clip: str                           # the CLIP to customise, a hub id or a folder
    retrieved: str                      # what python -m extras.retrieve retrieve wrote
    out: str                            # output folder: a CLIP
    train: str = "locked_text_gated_image"      # COURSE: Diss. Table 2.6, a row of ROWS
    gated_layers: int = 6               # the last so many of a tower; 12 for bigG/14
    gamma: float = None                 # Diss. Eq. 2.4: texts this similar are positives; 0.9 or 1
    resume: bool = False                # go on where a run with the same flags was stopped
    augment: bool = True                # a random part of the picture, mirrored half of the time
    epochs: int = 32
    max_steps: int = None               # stop earlier; the schedule ends there, too
    lr: float = 5e-4                    # peak; 5e-5 where CLIP's own weights train
    weight_decay: float = 0.1           # not for biases, norms, gates and logit_scale
    global_batch_size: int = 4096       # pairs a step over all ranks, each compared with each
    checkpoint_activations: bool = False        # run the layers again in the backward pass
    seed: int = 42
    save_every: int = 500               # steps between two states to go on from
    keep: int = 1                       # how many of these states are kept
    workers: int = 4                    # processes that decode pictures, for each rank
    device: str = "auto"                # cuda, mps or cpu
    dtype: str = "auto"                 # bf16, fp16 or fp32 compute; weights are kept in fp32

    CHOICES: ClassVar[dict] = {"train": list(ROWS), "dtype": ["auto", *DTYPES]}


def random_part(picture, size, rng):
    """A part of 8% to all of a picture, 3:4 to 4:3, as a square of `size` pixels, maybe mirrored.

    OFFICIAL: then colour jitter, RandAugment and random erasing, which are left out here.
    """
    area = picture.width * picture.height * rng.uniform(0.08, 1)
    ratio = math.exp(rng.uniform(-1, 1) * math.log(4 / 3))
    w = min(picture.width, (area * ratio) ** 0.5)
    h = min(picture.height, (area / ratio) ** 0.5)
    x = rng.uniform(0, picture.width - w)
    y = rng.uniform(0, picture.height - h)
    part = picture.resize((size, size), Image.Resampling.BICUBIC, box=(x, y, x + w, y + h))
    if rng.random() < 0.5:
        return part.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return part


class ReactSteps(Dataset):
    """Step number -> this rank's share of its batch, in a list: a function of seed and step."""

    def __init__(self, corpus, pairs, tokenizer, config, clip_config, machine):
        self.corpus = corpus
        self.pairs = pairs               # (n,) numbers of pairs in the corpus
        self.tokenizer = tokenizer
        self.config = config
        self.clip_config = clip_config
        B = config.global_batch_size
        if B > len(pairs):
            raise ValueError(f"--global_batch_size {B}: at most the {len(pairs)} pairs that were "
                             "retrieved")
        self.share = share_of(B, machine.world_size)
        self.first = machine.rank * self.share
        self.per_epoch = len(pairs) // B

    def __getitem__(self, step):
        seed = self.config.seed
        size = self.clip_config.vision_config.image_size
        epoch, position = divmod(step, self.per_epoch)
        order = np.random.default_rng([seed, epoch]).permutation(self.pairs)
        start = position * self.config.global_batch_size + self.first
        chosen = order[start:start + self.share]
        pairs = [self.corpus[i] for i in chosen]
        pictures = [pair.picture() for pair in pairs]
        if self.config.augment:
            pictures = [random_part(picture, size, np.random.default_rng([seed, epoch, i]))
                        for i, picture in zip(chosen, pictures, strict=True)]
        ids = tokenise_for_clip([pair.text for pair in pairs], self.tokenizer,
                                self.clip_config.text_config)
        return [{"X_v": torch.stack([preprocess(picture, size) for picture in pictures]),
                 "input_ids": ids, "images": len(pairs), "where": [pair.where for pair in pairs],
                 "attention_mask": (ids != ids[:, -1:]).long()}]


def read_retrieved(folder):
    """(report.json, corpus, pairs (n,)) of what was retrieved. ValueError if they do not match."""
    path = Path(folder, "report.json")
    report = typed_fields(read_value(path), path, index=str, crc=int, pairs=int, corpus=int,
                          queries=int)
    facts, corpus, _ = open_index(report["index"])
    if facts["crc"] != report["crc"]:
        raise ValueError(f"{path} is of another corpus than {report['index']}; retrieve again")
    path = Path(folder, "retrieved.jsonl")
    pairs = [typed(row.get("pair"), int, f"{path}: pair") for row in read_lines(path)]
    known = {i for i in pairs if 0 <= i < len(corpus)}
    if not len(known) == len(pairs) == report["pairs"]:
        raise ValueError(f"{path}: {len(pairs)} rows name {len(known)} of the {len(corpus)} pairs "
                         f"of the corpus, and report.json says {report['pairs']}; retrieve again")
    return report, corpus, np.array(pairs)


def react_optimizer(theta, config, machine):
    """OFFICIAL: AdamW; what has less than two dimensions does not decay: biases, norms, gates."""
    matrices = [p for p in theta.values() if p.ndim >= 2]
    rest = [p for p in theta.values() if p.ndim < 2]
    groups = [{"params": matrices, "peak": config.lr, "weight_decay": config.weight_decay},
              {"params": rest, "peak": config.lr, "weight_decay": 0.0}]
    return Optimizer(groups, machine, betas=(0.9, 0.98), eps=1e-6)


def save_clip(folder, clip, tokenizer):
    """A CLIP as a Hugging Face folder, with its tokenizer and its image processor."""
    clip.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = clip.config.vision_config.image_size
    processor = CLIPImageProcessorPil(size={"shortest_edge": size},
                                      crop_size={"height": size, "width": size})
    processor.save_pretrained(folder)


def customise_and_train(config, machine, run):
    """One run, from its banner to the customised CLIP. Returns the exit code."""
    report, corpus, pairs = read_retrieved(config.retrieved)
    torch.manual_seed(config.seed)       # the initial values of gated blocks
    clip, tokenizer = load_clip(config.clip)
    theta = customise(clip, config.train, config.gated_layers)
    clip.to(machine.device)
    if config.checkpoint_activations:
        clip.train().gradient_checkpointing_enable()
    clip.config.minllava = {"train": config.train, "base": config.clip, "retrieved": report}
    steps = ReactSteps(corpus, pairs, tokenizer, config, clip.config, machine)
    total = min(steps.per_epoch * config.epochs, config.max_steps or math.inf)

    defaults = {field.name: field.default for field in dataclasses.fields(config)}
    origin = {name: "default" if value == defaults[name] else "command line"
              for name, value in vars(config).items()}
    machine.print0(*config_table(config, origin), *theta_table(clip, theta))
    gamma = choose_gamma(config.gamma, theta)
    machine.print0(f"data: {len(pairs):,} pairs of {report['corpus']:,}, by {report['queries']:,} "
                   f"queries; {config.global_batch_size} a step, {steps.per_epoch} steps an epoch, "
                   f"{total} in all; gamma {gamma}\n")

    def save(folder):
        if machine.rank == 0:
            save_clip(folder, clip, tokenizer)

    def render(batch):
        return f"tau {clip.logit_scale.exp().item():.2f}; another --lr, or --dtype fp32?"

    optimizer = react_optimizer(theta, config, machine)
    run.watch(clip, theta, optimizer, zlib.crc32(pairs.tobytes(), report["crc"]))
    run.rehearse(save, load_clip)
    first = run.resume()
    parallel = machine.wrap(clip)
    for step, [batch] in run.steps(steps, first, total, render):
        optimizer.set_lr(lr_at(step, total, WARMUP))
        optimizer.zero_grad()
        with machine.forward(parallel):
            u, v, tau = parallel(**machine.to_device(batch, ("X_v", "input_ids")))
        loss = global_loss(u, v, tau, gamma, machine)
        optimizer.backward(loss)
        loss, tau, norm = optimizer.step(loss, tau)
        run.check_step(loss, norm)
        with torch.no_grad():
            clip.logit_scale.clamp_(0, math.log(100))    # OFFICIAL: after each step
        run.log_step(loss, norm, f"tau {tau:6.2f} | ", tau=tau)
        if run.is_due():
            run.save_state()
        if run.stopping:
            return run.goodbye()

    run.finish(save, "loss")
    return 0


def train_clip(config):
    """Customise a CLIP on retrieved pairs (Diss. Eqs. 2.4-2.6, Table 2.6)."""
    check_least(config, global_batch_size=1, epochs=1, max_steps=1, save_every=1, keep=1, workers=0)
    machine = Machine(config.device, config.dtype)
    with Run(config, machine) as run:
        return customise_and_train(config, machine, run)


COMMANDS = {"train": (train_clip, ReactConfig)}


def main(argv=None):
    return run_command(COMMANDS, argv, __doc__)


if __name__ == "__main__":
    run_main(main)
