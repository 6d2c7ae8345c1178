"""
What a customised CLIP can do, beside the CLIP that it was (Diss. Ch. 2).

    python -m extras.react_eval zero_shot --models DIR|ID out/react --datasets LIST.json
    python -m extras.react_eval probe     --models DIR|ID out/react --datasets LIST.json --shots 5
    python -m extras.react_eval fine_tune --models DIR|ID out/react --datasets LIST.json --shots 1%
    python -m extras.react_eval retrieval --models DIR|ID out/react --test FILE [--train FILE]
    python -m extras.react_eval segment   --models DIR|ID out/react --test FILE --classes FILE \\
        --templates FILE

LIST.json names the data sets to classify (extras/elevater.py): one, as ImageNet, or 20.
"""
import copy
import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F

from extras.elevater import check_apart, read_all, read_datasets
from extras.maskclip import segmentation_score
from extras.react import customise, react_loss, react_optimizer, unlock
from extras.retrieve import (
    load_clip,
    queries_of,
    read_batches,
    read_templates,
    read_terms,
    text_features,
    tokenise_for_clip,
)
from parts.files import check_least, run_command, run_main, write_json
from parts.ranks import Machine, choose_device
from parts.scoring import layout
from train import lr_at

PENALTIES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7)


@dataclass(frozen=True, kw_only=True)
class ComparisonConfig:
    models: list[str]                   # CLIPs to compare, the base first
    out: str = None                     # JSON file for the table
    device: str = "auto"                # cuda, mps or cpu


@dataclass(frozen=True, kw_only=True)
class ZeroShotConfig(ComparisonConfig):
    datasets: str                       # JSON list of data sets
    batch_size: int = 256               # pictures at once
    workers: int = 4                    # processes that decode pictures


@dataclass(frozen=True, kw_only=True)
class LinearProbeConfig(ZeroShotConfig):
    shots: str = "all"                  # COURSE: of each class 5 pictures, 1% of them, or all
    seed: int = 0                       # which pictures these are


@dataclass(frozen=True, kw_only=True)
class FineTuneConfig(LinearProbeConfig):
    batch_size: int = 32
    lr: float = 1e-5                    # peak, after a tenth of the steps; then cosine to 0
    weight_decay: float = 0.1           # not for biases and norms
    epochs: int = 50


@dataclass(frozen=True, kw_only=True)
class RetrievalConfig(ComparisonConfig):
    test: list[str]                     # pictures with captions, a picture with one or more
    train: list[str] = ()               # pictures with captions to fine-tune on first
    images: str = "."                   # the folder that names in .tsv and .json are relative to
    lr: float = 1e-5                    # as for fine_tune
    weight_decay: float = 0.1
    epochs: int = 5
    batch_size: int = 256               # pairs at once, each compared with each
    seed: int = 0                       # the order of pairs
    workers: int = 4                    # processes that decode pictures


@dataclass(frozen=True, kw_only=True)
class SegmentConfig(ComparisonConfig):
    test: list[str]                     # .tsv of pictures, each with the name of its mask
    classes: str                        # text file, a class name a line: 0, 1, ... in a mask
    templates: str                      # text file, a template a line
    images: str = "."                   # the folder that names in the .tsv are relative to


# -----------------------------------------------------------------------------
# Models and pictures


def readable_batches(pairs, clip, config):
    """Yield X_v (B, 3, S, S) of pairs in order. Raises ValueError for a picture that is none."""
    done = 0
    for X_v, texts, is_readable in read_batches(pairs, 0, clip, config):
        if not is_readable.all():
            bad = pairs[done + is_readable.tolist().index(False)]
            raise ValueError(f"a picture to evaluate on cannot be read: {bad.problem()}")
        done += len(texts)
        yield X_v.to(clip.device)


def compare(config, score):
    """Print {column: share} = score(clip, tokenizer) of each model in percent, and write --out."""
    table = {}
    for name in config.models:
        clip, tokenizer = load_clip(name)
        table[name] = score(clip.to(choose_device(config.device)), tokenizer)
    rows = [["percent", *table[name]]]
    for name, shares in table.items():
        rows.append([name, *(f"{100 * share:.1f}" for share in shares.values())])
    print(layout(rows))
    if config.out:
        write_json(config.out, table)


def compare_on(tasks, config, accuracy_of):
    """The table of accuracies on each task, and of their mean.

    OURS: top-1, as on ImageNet; ELEVATER's 20 sets have metrics of their own, and its toolkit.
    """
    def score(clip, tokenizer):
        row = {}
        for task in tasks:
            row[task.name] = accuracy_of(copy.deepcopy(clip), tokenizer, task, config)
        row["mean"] = sum(row.values()) / len(tasks)
        return row
    compare(config, score)


# -----------------------------------------------------------------------------
# Classification


def class_vectors(clip, tokenizer, classes, templates):
    """A zero-shot classifier (C, D): of each class the mean of its texts' features, of length 1."""
    queries = queries_of(classes, templates)
    v = text_features(clip, tokenizer, [text for _, _, text in queries])
    v = v.unflatten(0, (len(classes), len(templates)))   # (C, templates, D)
    return F.normalize(v.mean(1), dim=-1)                # (C, D)


@torch.no_grad()
def image_features(clip, pairs, config):
    """u (pairs, D) on the CPU."""
    return torch.cat([clip.images(X_v).cpu() for X_v in readable_batches(pairs, clip, config)])


def accuracy(logits, y):
    return (logits.argmax(1) == y).float().mean().item()


def zero_shot_accuracy(clip, tokenizer, task, config):
    W = class_vectors(clip, tokenizer, task.classes, task.templates).cpu()   # (C, D)
    return accuracy(image_features(clip, task.test, config) @ W.T, task.y_test)


def compare_zero_shot(config):
    """Zero-shot classification by class names alone (Diss. Table 2.2)."""
    compare_on(read_datasets(config.datasets), config, zero_shot_accuracy)


def fit_probe(u, y, W_0, penalty):
    """W (1 + D, C) of a logistic regression: a bias, and weights that a penalty pulls to W_0."""
    W = W_0.clone().requires_grad_()
    lbfgs = torch.optim.LBFGS([W], max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        lbfgs.zero_grad()
        loss = F.cross_entropy(u @ W[1:] + W[0], y) + penalty * (W - W_0)[1:].square().sum()
        loss.backward()
        return loss
    lbfgs.step(closure)
    return W.detach()


def choose_penalty(u, y, W_0):
    """The penalty of which a probe does best on a fifth that is held out."""
    generator = torch.Generator().manual_seed(0)
    held = torch.randperm(len(u), generator=generator) < max(1, len(u) // 5)
    found = {}
    for penalty in PENALTIES:
        W = fit_probe(u[~held], y[~held], W_0, penalty)
        found[penalty] = accuracy(u[held] @ W[1:] + W[0], y[held])
    return max(found, key=found.get)


def probe_accuracy(clip, tokenizer, task, config):
    """OURS: a penalty pulls the probe towards the zero-shot classifier. OFFICIAL: ELEVATER's
    toolkit starts there, and searches rates and weight decays."""
    W = class_vectors(clip, tokenizer, task.classes, task.templates).cpu()
    tau = clip.logit_scale.exp().item()
    W_0 = F.pad(tau * W.T, (0, 0, 1, 0))                 # (1 + D, C)
    u = image_features(clip, task.train, config)
    if len(u) < 2:
        raise ValueError(f"{task.name}: {len(u)} picture to learn from; a probe needs 2 or more")
    W = fit_probe(u, task.y_train, W_0, choose_penalty(u, task.y_train, W_0))
    return accuracy(image_features(clip, task.test, config) @ W[1:] + W[0], task.y_test)


def compare_probes(config):
    """A linear probe on frozen features: few-shot, full-shot (Diss. Table 2.2)."""
    tasks = read_datasets(config.datasets, config.shots, config.seed)
    compare_on(tasks, config, probe_accuracy)


def fine_tune_on(pairs, theta, loss_of, clip, config):
    """Train theta in place. loss_of(X_v, numbers of its pairs) is the loss of a batch.

    OURS: neither augmentation nor search of rates.
    """
    machine = Machine(config.device)
    optimizer = react_optimizer(theta, config, machine)
    total = config.epochs * math.ceil(len(pairs) / config.batch_size)
    step = 0
    for epoch in range(config.epochs):
        order = np.random.default_rng([config.seed, epoch]).permutation(len(pairs))
        batches = iter(torch.from_numpy(order).split(config.batch_size))
        for X_v in readable_batches([pairs[i] for i in order], clip, config):
            optimizer.set_lr(lr_at(step, total, 0.1))
            optimizer.zero_grad()
            with machine.forward(clip):
                loss = loss_of(X_v, next(batches))
            optimizer.backward(loss)
            optimizer.step()
            if not math.isfinite(loss.item()) or optimizer.is_lost:
                raise ValueError(f"step {step} of {total}: the loss is {loss.item()}; take a lower "
                                 "--lr")
            with torch.no_grad():
                clip.logit_scale.clamp_(0, math.log(100))    # OFFICIAL: after each step
            step += 1


def fine_tuned_accuracy(clip, tokenizer, task, config):
    """All of the image tower trains, with a linear head that is the zero-shot classifier before."""
    W = class_vectors(clip, tokenizer, task.classes, task.templates)
    head = torch.nn.Linear(W.shape[1], W.shape[0], device=W.device)
    with torch.no_grad():
        head.weight.copy_(W)
        head.bias.zero_()
    tau = clip.logit_scale.exp().item()
    theta = unlock(clip, "vision_model|visual_projection") | dict(head.named_parameters())
    y = task.y_train.to(clip.device)

    def loss_of(X_v, chosen):
        return F.cross_entropy(tau * head(clip.images(X_v)).float(), y[chosen])
    fine_tune_on(task.train, theta, loss_of, clip, config)
    with torch.no_grad():
        logits = head.cpu()(image_features(clip, task.test, config))
    return accuracy(logits, task.y_test)


def compare_fine_tuned(config):
    """Fine-tuning of the image tower: few-shot, full-shot, 1% of the labels (Diss. Table 2.2)."""
    check_least(config, lr=0, epochs=1, batch_size=1)
    tasks = read_datasets(config.datasets, config.shots, config.seed)
    compare_on(tasks, config, fine_tuned_accuracy)


# -----------------------------------------------------------------------------
# Retrieval


def recall_at(similar, belongs, k):
    """Share of rows of `similar` (rows, columns) that have one of their own columns, which
    `belongs` (rows, columns) marks, among the k most similar."""
    best = similar.topk(min(k, similar.shape[1])).indices
    return belongs.gather(1, best).any(1).float().mean().item()


def retrieval_recalls(clip, tokenizer, pairs, config):
    """Recall of texts for pictures and of pictures for texts; a picture may have several texts."""
    pictures = {pair.where: pair for pair in pairs}
    number = {where: i for i, where in enumerate(pictures)}
    owner = torch.tensor([number[pair.where] for pair in pairs])             # (texts,)
    belongs = owner == torch.arange(len(pictures))[:, None]                  # (pictures, texts)
    u = image_features(clip, list(pictures.values()), config)
    v = text_features(clip, tokenizer, [pair.text for pair in pairs]).cpu()
    similar = u @ v.T                                                        # (pictures, texts)
    recalls = {}
    for k in (1, 5):
        recalls[f"I2T R@{k}"] = recall_at(similar, belongs, k)
        recalls[f"T2I R@{k}"] = recall_at(similar.T, belongs.T, k)
    return recalls


def fine_tune_contrastively(clip, tokenizer, pairs, config):
    """Both towers train with the loss of CLIP."""
    theta = customise(clip, "full")

    def loss_of(X_v, chosen):
        ids = tokenise_for_clip([pairs[i].text for i in chosen], tokenizer, clip.config.text_config)
        u, v, tau = clip(X_v, ids.to(clip.device))
        return react_loss(u, v, tau, gamma=1) / (2 * len(u))
    fine_tune_on(pairs, theta, loss_of, clip, config)


def compare_retrieval(config):
    """Image-text retrieval, zero-shot, or fine-tuned on --train first (Diss. Table 2.3)."""
    check_least(config, lr=0, epochs=1, batch_size=2)
    test = read_all(config.test, config.images)
    train = read_all(config.train, config.images) if config.train else []
    check_apart(train, test)
    print(f"{len(test):,} texts to retrieve; {len(train):,} to fine-tune on")

    def score(clip, tokenizer):
        if train:
            fine_tune_contrastively(clip, tokenizer, train, config)
        return retrieval_recalls(clip, tokenizer, test, config)
    compare(config, score)


# -----------------------------------------------------------------------------
# Segmentation


def compare_segmentation(config):
    """Zero-shot semantic segmentation with class names (Diss. Table 2.5, its first column)."""
    pairs = read_all(config.test, config.images)
    classes = read_terms(config.classes, "class names")
    templates = read_templates(config.templates)
    print(f"{len(pairs):,} pictures with masks of {len(classes)} classes")

    def score(clip, tokenizer):
        W = class_vectors(clip, tokenizer, classes, templates)               # (C, D)
        return segmentation_score(clip, W, pairs, config)
    compare(config, score)


COMMANDS = {
    "zero_shot": (compare_zero_shot, ZeroShotConfig),
    "probe": (compare_probes, LinearProbeConfig),
    "fine_tune": (compare_fine_tuned, FineTuneConfig),
    "retrieval": (compare_retrieval, RetrievalConfig),
    "segment": (compare_segmentation, SegmentConfig),
}


def main(argv=None):
    return run_command(COMMANDS, argv, __doc__)


if __name__ == "__main__":
    run_main(main)
