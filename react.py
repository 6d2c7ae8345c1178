"""
REACT: customising CLIP by retrieval (Diss. Ch. 2). From class names alone: retrieve image-text pairs of a large corpus, train
gated blocks in a locked CLIP on them, classify zero-shot better.

    python react.py index --clip DIR|ID --corpus SHARD.tar ... --out out/index          features of the corpus (retrieve.py)
    python react.py retrieve --index out/index --clip DIR|ID --classes FILE --templates FILE --out out/retrieved
    torchrun --nproc_per_node=8 react.py train --clip DIR|ID --retrieved out/retrieved --out out/react       (gated.py)
    python react.py eval --models DIR|ID out/react --test FILE --classes FILE --templates FILE

The result is a CLIP folder; `train.py --vision out/react` takes its image tower as g. `react.py index -h` explains a command.
"""
import dataclasses
import json
import math
import os
import signal
import sys
import textwrap
import time
import zlib
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset
from transformers import CLIPImageProcessorPil

from gated import ROWS, customise, load_clip, tokenise
from images import preprocess
from model import DTYPES, choose_device
from records import typed_flags, whole_lines
from retrieve import (Index, Pictures, Retrieve, index, open_index, queries_of, read_lines, read_pairs, read_templates,
                      retrieve, said, texts_of)
from train import (asked_to_stop, check_first_step, fingerprints, finish, ignore_sigterm, load_state, lr_at, only_run_in,
                   open_log, peak_memory, plot_losses, restarts, save_state, start)

# ---------------------------------------------------------------------------------------------------------------------
# The loss


def react_loss(u, v, tau, gamma):
    """L_i2t + L_t2i, sums over the batch (Diss. Eqs. 2.4-2.6).

    u, v (B, D): features of pictures and texts, of length 1; tau multiplies. Positive for i are all k with v_k . v_i >= gamma,
    i itself among them. With gamma 1 and different texts it is 2 B times CLIP's loss.
    OFFICIAL: the public code has no gamma, and trains with CLIP's loss.
    """
    positive = v @ v.T >= gamma                          # (B, B)  k in P(i) = Q(i)
    positive.fill_diagonal_(True)                        # rounding makes v . v less than 1
    logits = tau * u @ v.T                               # (B, B)
    share = positive / positive.sum(1, keepdim=True)     # (B, B)  1 / |P(i)|, of image i
    i2t = -(share * logits.log_softmax(1)).sum()         # ()  Diss. Eq. 2.5
    t2i = -(share.T * logits.log_softmax(0)).sum()       # ()  Diss. Eq. 2.6
    return i2t + t2i


class Gather(torch.autograd.Function):
    """Features of all ranks, one below the other, (B, D) -> (ranks B, D), with gradients.

    Every rank then computes the same loss of the same features, so each has its own features' gradient already; times the
    ranks, because DistributedDataParallel averages the ranks' gradients.
    """

    @staticmethod
    def forward(ctx, x):
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad):
        ranks = dist.get_world_size()
        return grad.chunk(ranks)[dist.get_rank()] * ranks


# ---------------------------------------------------------------------------------------------------------------------
# Training


@dataclass(frozen=True)
class Train:
    clip: str                           # the CLIP to customise, a hub id or a folder
    retrieved: str                      # what react.py retrieve wrote
    out: str                            # output folder: a CLIP
    train: str = "locked_text_gated_image"      # COURSE: Diss. Table 2.6, a row of gated.py's ROWS
    gated_layers: int = 6               # the last so many of a tower; 12 for bigG/14
    gamma: float = 0.9                  # Diss. Eq. 2.4: texts as similar as this are positives of each other; 1 for retrieval
    resume: bool = False                # go on where a run with the same flags was stopped
    augment: bool = True                # a random part of the picture, mirrored half of the time
    epochs: int = 32
    max_steps: int = None               # stop earlier; the schedule ends there too
    lr: float = 5e-4                    # peak; 5e-5 where CLIP's own weights train
    weight_decay: float = 0.1           # not for biases, norms, gates and logit_scale
    warmup_ratio: float = 0.075         # 5,000 of 66,600 steps, linear; then cosine to 0
    global_batch_size: int = 4096       # pairs a step over all ranks, each compared with each
    checkpoint_activations: bool = False        # run the layers again in the backward pass; less memory, more time
    seed: int = 42
    save_every: int = 500               # steps
    keep: int = 1                       # states to go on from that are kept in out/train_state
    workers: int = 4                    # processes that decode pictures, per rank
    device: str = "auto"                # cuda, mps or cpu
    dtype: str = "auto"                 # bf16, fp16 or fp32 compute; weights are kept in fp32

    shard = offload = False             # no flags: what train.py's `start` asks for


def random_part(picture, size, rng):
    """A part of 8% to all of a picture, 3:4 to 4:3, as a square of `size` pixels, mirrored half of the time.

    OFFICIAL: then colour jitter, RandAugment and random erasing, which are left out here.
    """
    area, ratio = picture.width * picture.height * rng.uniform(0.08, 1), math.exp(rng.uniform(-1, 1) * math.log(4 / 3))
    w, h = min(picture.width, (area * ratio) ** 0.5), min(picture.height, (area / ratio) ** 0.5)
    x, y = rng.uniform(0, picture.width - w), rng.uniform(0, picture.height - h)
    part = picture.resize((size, size), Image.Resampling.BICUBIC, box=(x, y, x + w, y + h))
    return part.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else part


class Batches(Dataset):
    """This rank's share of each step's batch: (X, input_ids). A function of seed and step alone, so a run can go on."""

    def __init__(self, corpus, pairs, tokenizer, config, clip_config, machine):
        self.corpus, self.pairs, self.tokenizer, self.config, self.clip_config = corpus, pairs, tokenizer, config, clip_config
        if config.global_batch_size % machine.world_size or config.global_batch_size > len(pairs):
            raise ValueError(f"--global_batch_size {config.global_batch_size}: a multiple of the {machine.world_size} ranks, "
                             f"and at most the {len(pairs)} pairs that were retrieved")
        self.per_epoch = len(pairs) // config.global_batch_size
        share = config.global_batch_size // machine.world_size
        self.mine = slice(machine.rank * share, (machine.rank + 1) * share)

    def __getitem__(self, step):
        epoch, at = divmod(step, self.per_epoch)
        B, size = self.config.global_batch_size, self.clip_config.vision_config.image_size
        order = np.random.default_rng([self.config.seed, epoch]).permutation(self.pairs)[at * B:(at + 1) * B][self.mine]
        X, texts = [], []
        for i in order:
            pair = self.corpus[i]
            picture, rng = pair.picture(), np.random.default_rng([self.config.seed, epoch, i])
            X.append(preprocess(random_part(picture, size, rng) if self.config.augment else picture, size))
            texts.append(pair.text)
        return torch.stack(X), tokenise(texts, self.tokenizer, self.clip_config.text_config)


def optimiser(theta, config):
    """OFFICIAL: AdamW, no decay for what has less than two dimensions: biases, norms, gates, logit_scale."""
    groups = [{"params": [p for p in theta.values() if (p.ndim < 2) == small], "weight_decay": decay}
              for small, decay in ((False, config.weight_decay), (True, 0.0))]
    adamw = torch.optim.AdamW([group for group in groups if group["params"]], betas=(0.9, 0.98), eps=1e-6)
    for p in theta.values():                             # its own start, now: a state is read into it
        adamw.state[p] = {"step": torch.tensor(0.0), "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    return adamw


def save(folder, clip, tokenizer, config, facts):
    """The customised CLIP as a Hugging Face folder. With gated blocks, only gated.py builds it: transformers would leave them
    out, and run the base model."""
    clip.config.minllava = {"train": config.train, "base": config.clip, "retrieved": facts}
    clip.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = clip.config.vision_config.image_size
    CLIPImageProcessorPil(size={"shortest_edge": size}, crop_size={"height": size, "width": size}).save_pretrained(folder)


def train(config):
    """Customise a CLIP on retrieved pairs (Diss. Eqs. 2.4-2.6, Table 2.6)."""
    machine = start(config)
    say = print if machine.rank == 0 else lambda *_, **__: None
    if restarts():                                       # by torchrun; it is this run
        config = dataclasses.replace(config, resume=True)
    log_path, state_folder = os.path.join(config.out, "log.jsonl"), os.path.join(config.out, "train_state")
    if os.path.exists(log_path) and not config.resume:
        raise ValueError(f"{config.out} holds a run already: --resume to go on with it, or another --out")
    os.makedirs(config.out, exist_ok=True)
    alone = only_run_in(config.out) if machine.rank == 0 else None           # as long as it is open

    # ---- the banner: what a reader should see before step 0
    default = {f.name: f.default for f in dataclasses.fields(config)}
    say("\n".join(f"{name:<24} {value!s:<50} {'default' if value == default[name] else 'command line'}"
                  for name, value in vars(config).items()))
    report = Path(config.retrieved, "report.json")
    if not report.is_file():
        raise FileNotFoundError(f"--retrieved {config.retrieved}: no report.json; it is the --out folder of react.py retrieve")
    facts = json.loads(report.read_text())
    index_facts, corpus, _ = open_index(facts["index"])
    if index_facts["crc"] != facts["crc"]:
        raise ValueError(f"--retrieved {config.retrieved} is of another corpus than {facts['index']} now has; retrieve again")
    pairs = np.array([row["pair"] for row in whole_lines(os.path.join(config.retrieved, "retrieved.jsonl"))])
    if len(pairs) != facts["pairs"]:
        raise ValueError(f"--retrieved {config.retrieved}: {len(pairs)} pairs, and report.json tells of {facts['pairs']}; "
                         "retrieve again")
    torch.manual_seed(config.seed)                       # the gated blocks' initial values
    clip, tokenizer = load_clip(config.clip)
    theta = customise(clip, config.train, config.gated_layers)
    clip.to(machine.device)
    if config.checkpoint_activations:
        clip.train().gradient_checkpointing_enable()
    batches = Batches(corpus, pairs, tokenizer, config, clip.config, machine)
    total = min(batches.per_epoch * config.epochs, sys.maxsize if config.max_steps is None else config.max_steps)
    say(f"\n{machine.world_size} x {machine.device.type}, computing in {str(machine.dtype)[6:]} ({machine.reason})")
    for part in ("vision_model", "visual_projection", "text_model", "text_projection", "logit_scale"):
        n, trains = (sum(p.numel() for name, p in some.items() if name.startswith(part))
                     for some in (dict(clip.named_parameters()), theta))
        say(f"  {part:<20}{n:>14,} parameters, {trains:,} of them train")
    say(f"theta: {sum(p.numel() for p in theta.values()):,} parameters, row {config.train} of Diss. Table 2.6"
        + ", which does not settle what it trains" * (config.train == "gated_both"))
    say(f"data: {len(pairs):,} pairs of {facts['corpus']:,}, by {facts['queries']:,} queries ({' and '.join(facts['keys'])}, "
        f"k {facts['k']}); {config.global_batch_size} a step, {batches.per_epoch} steps an epoch, {total} in all\n"
        f"one of them: {corpus[pairs[0]].text!r}, {corpus[pairs[0]].where}\n")

    adamw = optimiser(theta, config)
    scaler = torch.amp.GradScaler(machine.device.type, enabled=machine.dtype == torch.float16)
    checksum = zlib.crc32(pairs.tobytes(), facts["crc"])
    first = load_state(state_folder, config, theta, adamw, scaler, checksum) if config.resume else 0
    wrapped = clip if machine.world_size == 1 else DistributedDataParallel(clip)
    gather = Gather.apply if machine.world_size > 1 else lambda x: x
    loader = DataLoader(batches, sampler=range(first, total), batch_size=None, num_workers=config.workers,
                        worker_init_fn=ignore_sigterm, pin_memory=machine.device.type == "cuda")
    before = fingerprints(clip) if first == 0 else None
    stopping, log = asked_to_stop(), open_log(log_path) if machine.rank == 0 else None

    # ---- the loop
    if first:
        say(f"resuming at step {first}")
    began, ended = time.time(), time.time()
    for step, (X, input_ids) in enumerate(loader, first):
        waited = time.time() - ended                     # for data
        for group in adamw.param_groups:
            group["lr"] = lr_at(step, total, config)
        with machine.autocast():
            u, v, tau = wrapped(X.to(machine.device), input_ids.to(machine.device))          # (share, D), (share, D), ()
        u, v = gather(u), gather(v)                      # (B, D)  of the global batch
        loss = react_loss(u, v, tau, config.gamma) / (2 * len(u))            # on the scale of CLIP's own
        if not math.isfinite(loss.item()) or loss.item() == 0:
            raise ValueError(f"step {step}: the loss is {loss.item()}, tau {tau.item():.2f}; another --lr, or --dtype fp32?")
        adamw.zero_grad(set_to_none=True)
        scaler.scale(loss).backward()
        scaler.unscale_(adamw)
        norm = torch.nn.utils.get_total_norm([p.grad for p in theta.values() if p.grad is not None]).item()
        if not math.isfinite(norm) and scaler.get_scale() <= 1:              # fp16: the scaler skips the step and tries lower
            raise ValueError(f"step {step}: the gradient's norm is {norm}; another --lr, or --dtype fp32?")
        scaler.step(adamw)
        scaler.update()
        if before and math.isfinite(norm):
            check_first_step(before, clip, theta, group["lr"])
            before = None
        with torch.no_grad():
            clip.logit_scale.clamp_(0, math.log(100))    # OFFICIAL: after each step
        seconds, done = time.time() - ended, step + 1
        record = {"step": step, "loss": loss.item(), "lr": group["lr"], "seconds": seconds, "tau": tau.item(),
                  "grad_norm": norm if math.isfinite(norm) else None}
        if log:
            log.write(json.dumps(record) + "\n")
            log.flush()
        if step % max(1, total // 50) == 0 or done == total:
            eta = timedelta(seconds=round((time.time() - began) / (done - first) * (total - done)))
            say(f"step {step:>6}/{total} | loss {loss.item():8.4f} | lr {group['lr']:.2e} | norm {norm:8.3f} | "
                f"tau {tau.item():6.2f} | {len(u) / seconds:7.1f} pairs/s | wait {100 * waited / seconds:4.1f}% | "
                f"{peak_memory(machine.device) / 1e9:5.1f} GB | eta {eta}", flush=True)
        stop, = machine.sum(len(stopping))
        if done % config.save_every == 0 or done == total or stop:
            save_state(state_folder, done, config, theta, adamw, scaler, checksum)
        if stop and done < total:
            say(f"stopped after step {step}; the same command with --resume goes on from here")
            return 128 + max(stopping, default=signal.SIGINT)
        ended = time.time()

    # ---- the result
    if machine.rank == 0:
        save(config.out, clip, tokenizer, config, facts)
        plot_losses(config.out, "loss")
        alone.close()
    say(f"saved {config.out} after {timedelta(seconds=round(time.time() - began))}")
    del wrapped                                          # else its destructor joins gloo's threads while it holds the GIL
    finish()


# ---------------------------------------------------------------------------------------------------------------------
# Evaluation


@dataclass(frozen=True)
class Eval:
    models: list[str]                   # CLIPs to compare, the base first
    test: list[str] = ()                # pictures to classify: a corpus (as in index) whose texts are class names
    classes: str = None                 # text file, a class name a line
    templates: str = None               # text file, a template a line, averaged
    probe: list[str] = ()               # pictures with class names that a linear probe learns from; it is tested on --test
    pairs: list[str] = ()               # pictures with captions (one a line, several for a picture): image-text retrieval
    images: str = "."                   # the folder that names in .tsv and .json are relative to
    out: str = None                     # JSON file for the table
    batch_size: int = 256
    workers: int = 4                    # processes that decode pictures
    device: str = "auto"                # cuda, mps or cpu
    dtype: str = "fp32"                 # bf16, fp16 or fp32


def class_vectors(clip, tokenizer, classes, templates):
    """A zero-shot classifier (C, D): of each class the mean of its texts' features, of length 1 before and after."""
    v = texts_of(clip, tokenizer, [query for *_, query in queries_of(classes, templates)])
    v = v.unflatten(0, (len(classes), len(templates)))        # (C, templates, D)
    return F.normalize(v.mean(1), dim=-1)                # (C, D)


@torch.no_grad()
def image_features(clip, pairs, args):
    """u (pairs, D) on the CPU. A picture that cannot be read is an error here."""
    loader = DataLoader(Pictures(pairs, clip.config.vision_config.image_size), args.batch_size, num_workers=args.workers,
                        collate_fn=list)
    u = []
    for batch in loader:
        if bad := [x for x, _ in batch if isinstance(x, str)]:
            raise ValueError(f"{len(bad)} pictures of the test cannot be read, e.g. {bad[0]}")
        with torch.autocast(clip.device.type, DTYPES[args.dtype], enabled=args.dtype != "fp32"):
            u.append(clip.images(torch.stack([x for x, _ in batch]).to(clip.device)).cpu())
    return torch.cat(u)                                  # (pairs, D)


def linear_probe(u, y, u_test, y_test, C):
    """Accuracy of logistic regression on frozen features; its L2 penalty is the best of seven on a fifth that is held out."""
    def fit(u, y, penalty):
        W = torch.zeros(u.shape[1] + 1, C, requires_grad=True)
        lbfgs = torch.optim.LBFGS([W], max_iter=200, line_search_fn="strong_wolfe")
        def closure():
            lbfgs.zero_grad()
            loss = F.cross_entropy(u @ W[1:] + W[0], y) + penalty * W[1:].square().sum()
            loss.backward()
            return loss
        lbfgs.step(closure)
        return W.detach()
    right = lambda W, u, y: ((u @ W[1:] + W[0]).argmax(1) == y).float().mean().item()
    held = torch.randperm(len(u), generator=torch.Generator().manual_seed(0)) < len(u) // 5
    penalty = max((10.0 ** -k for k in range(1, 8)), key=lambda p: right(fit(u[~held], y[~held], p), u[held], y[held]))
    return right(fit(u, y, penalty), u_test, y_test)


def recall_at(similar, mine, k):
    """Share of rows of `similar` (rows, columns) with one of their own, `mine` (rows, columns) bool, among the k highest."""
    return mine.gather(1, similar.topk(min(k, similar.shape[1])).indices).any(1).float().mean().item()


def labels_of(pairs, classes):
    """y (pairs,): the number of each pair's class name."""
    if unknown := {pair.text for pair in pairs} - set(classes):
        raise ValueError(f"{len(unknown)} class names of the pictures are not in --classes, e.g. {sorted(unknown)[:3]}")
    return torch.tensor([classes.index(pair.text) for pair in pairs])


def evaluate(args):
    """Zero-shot classification, linear probe, image-text retrieval; base against customised, percent.

    OURS: top-1, as on ImageNet; ELEVATER's 20 sets have metrics of their own, and its toolkit.
    """
    together = {bool(args.test), bool(args.classes), bool(args.templates), bool(args.test or args.probe)}
    if len(together) > 1 or not (args.test or args.pairs):
        raise ValueError("--test, --classes and --templates go together (--probe may join them), or --pairs, or both")
    left_out = []
    test, probe, pairs = ([*read_pairs(sources, args.images, left_out)] for sources in (args.test, args.probe, args.pairs))
    if left_out:
        raise ValueError(f"what is evaluated must be whole: {said(left_out)}")
    classes, templates = (read_lines(args.classes, "class names"), read_templates(args.templates)) if test else ([], [])
    y, y_probe, rows = labels_of(test, classes), labels_of(probe, classes), {}
    for name in args.models:
        clip, tokenizer = load_clip(name)
        clip.to(choose_device(args.device))
        row = rows[name] = {}
        if test:
            u = image_features(clip, test, args)         # (pictures, D)
            guess = (u @ class_vectors(clip, tokenizer, classes, templates).cpu().T).argmax(1)       # (pictures,)
            row["zero-shot"] = (guess == y).float().mean().item()
        if probe:
            row["linear probe"] = linear_probe(image_features(clip, probe, args), y_probe, u, y, len(classes))
        if pairs:
            shown = {pair[:3]: pair for pair in pairs}                       # a picture may have several texts
            number = {place: i for i, place in enumerate(shown)}
            mine = torch.tensor([number[pair[:3]] for pair in pairs]) == torch.arange(len(shown))[:, None]
            u, v = image_features(clip, [*shown.values()], args), texts_of(clip, tokenizer, [p.text for p in pairs]).cpu()
            for k in (1, 5):                             # mine (pictures, texts)
                row[f"I2T R@{k}"], row[f"T2I R@{k}"] = recall_at(u @ v.T, mine, k), recall_at(v @ u.T, mine.T, k)
    print(f"{len(test)} pictures of {len(classes)} classes, {len(templates)} templates; {len(pairs)} texts to retrieve")
    width = max(map(len, ["percent", *rows]))
    print(f"{'percent':<{width}}" + "".join(f"{column:>14}" for column in row))
    for name, row in rows.items():
        print(f"{name:<{width}}" + "".join(f"{100 * value:>14.1f}" for value in row.values()))
    if args.out:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        Path(args.out).write_text(json.dumps(rows, indent=1) + "\n")


COMMANDS = {"index": (Index, index), "retrieve": (Retrieve, retrieve), "train": (Train, train), "eval": (Eval, evaluate)}
CHOICES = {"train": list(ROWS), "kind": ["auto", "flat", "hnsw", "compressed"], "device": ["auto", "cuda", "mps", "cpu"],
           "dtype": ["auto", *DTYPES]}


def arguments(argv):
    """A command line -> (function, its configuration)"""
    if not argv or argv[0] not in COMMANDS:
        raise ValueError(f"{f'{argv[0]} is no command' if argv else 'no command given'}; one of {', '.join(COMMANDS)} comes "
                         "first; -h explains them")
    config, run = COMMANDS[argv[0]]
    return run, config(**typed_flags(config, argv[1:], run.__doc__, CHOICES))


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    if argv and argv[0] in ("-h", "--help"):
        return print(textwrap.dedent(__doc__).strip())
    run, config = arguments(argv)
    return run(config)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
