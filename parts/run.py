"""
A run and its folder: what a training loop needs besides training (train.py, extras/react.py).

    out/lock                     one process writes here at a time
    out/log.jsonl                a record a step
    out/train_state/step_...     theta and AdamW's moments, for any number of ranks to go on from
    out/loss.png                 at the end

Everything random (the order of the data, the image's place, W's start) is a function of seed, epoch
and index, so the number of the step is all that is needed to find the place in the data again.
"""
import contextlib
import dataclasses
import hashlib
import json
import math
import os
import resource
import shutil
import signal
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from torch.distributed.checkpoint.staging import BlockingAsyncStager
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from parts.files import (
    library,
    lock_folder,
    read_lines,
    read_value,
    typed_fields,
    write_json,
)
from parts.ranks import local_shard, restarts

# flags that change nothing of what a run computes
NOT_COMPARED = {"out", "resume", "save_every", "workers", "device", "micro_batch_tokens", "keep",
                "shard", "checkpoint_activations", "dry_run", "track"}
TRACKERS = ("wandb", "trackio", "tensorboard")
SIGNALS = (signal.SIGINT, signal.SIGTERM)    # Ctrl-C, and what a scheduler sends
warnings.filterwarnings("ignore", "torch.distributed is disabled")   # dcp's, of a single process


class Run:
    """One run: `with Run(config, machine) as run`; its config has out, resume, workers, keep and
    save_every.

    stopping    the loop is to end by `goodbye`: a signal has come, to any rank

    Raises ValueError if the folder holds a run already that `resume` does not go on with, or if
    another process writes there. A restart by torchrun resumes. A dry run has `writes` False.
    """

    def __init__(self, config, machine, writes=True):
        self.config = config
        self.machine = machine
        self.out = Path(config.out)
        self.log_file = self.out / "log.jsonl"
        self.resumes = config.resume or restarts() > 0
        self.writes = writes and machine.rank == 0
        self.signals = []
        self.stopping = False
        self.step = None
        self.stack = contextlib.ExitStack()      # the folder's lock, the tracker
        self.track = None                # log(numbers, step) of --track
        self.background = ThreadPoolExecutor(1)
        self.unwritten = None            # a state that is being written there
        if writes and self.log_file.exists() and not self.resumes:
            raise ValueError(f"{self.out} holds a run already: --resume to go on with it, "
                             "or another --out")

    def __enter__(self):
        name = getattr(self.config, "track", None)
        if self.writes:
            self.stack.enter_context(lock_folder(self.out))
        if self.writes and name:
            self.track, finish = open_tracker(name, self.config)
            self.stack.callback(finish)
        machine = self.machine
        machine.print0(f"{machine.world_size} x {machine.device.type}, computing in "
                       f"{machine.dtype} ({machine.reason})\n")
        return self

    def __exit__(self, kind, error, trace):
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        self.background.shutdown()       # a state that is being written is still written
        self.stack.close()
        if error is None:
            self.machine.finish()
        elif self.step is not None and not isinstance(error, ValueError):
            names = sample_names(self.micro_batches)
            print(f"rank {self.machine.rank}, step {self.step}: samples {names}", file=sys.stderr)

    def watch(self, model, theta, optimizer, checksum):
        """Take note of what trains, and of the checksum of the data that it trains on."""
        self.model = model
        self.theta = theta
        self.optimizer = optimizer
        self.checksum = checksum
        self.bits = fingerprints(model)
        self.frozen = {}
        of_ranks = self.machine.gather(self.bits)
        for name, p in model.named_parameters():
            if name not in theta:
                shards = of_ranks if isinstance(p, DTensor) else of_ranks[:1]
                # on another device it may be in another number format, with other bits
                self.frozen[f"{name}, {p.dtype}"] = sum(bits[name] for bits in shards)

    # -----------------------------------------------------------------------------
    # States

    def state(self):
        """{name: tensor} of what a state holds: theta and AdamW's moments, not copied."""
        tensors = {f"theta/{name}": p for name, p in self.theta.items()}
        for name, p in self.theta.items():
            for key, value in self.optimizer.adamw.state[p].items():
                tensors[f"{key}/{name}"] = value
        return tensors

    def facts(self):
        """What a state says of the run that it belongs to, as JSON gives it back."""
        facts = {
            "config": dataclasses.asdict(self.config),
            "data": self.checksum,
            "frozen": self.frozen,
            "shapes": {name: list(tensor.shape) for name, tensor in self.state().items()},
            "scaler": self.optimizer.scaler.state_dict(),
        }
        return json.loads(json.dumps(facts))

    @contextlib.contextmanager
    def writing(self, unfinished, path):
        """Make a folder under a temporary name, in which `path` is written, and remove it.

        Raises ValueError if `path` cannot be written, with the states that are left.
        """
        try:
            if self.machine.rank == 0:
                shutil.rmtree(unfinished, ignore_errors=True)
                unfinished.mkdir(parents=True, exist_ok=True)
            yield
        except (OSError, SafetensorError, dcp.CheckpointException) as error:
            states = saved_states(self.out / "train_state")
            left = ", ".join(state.name for state in states) or "no state"
            if isinstance(error, dcp.CheckpointException):       # it holds those of all ranks
                error, _ = next(iter(error.failures.values()))
            raise ValueError(f"{path} cannot be written ({error}); left is {left}: make room, then "
                             "--resume") from error
        finally:
            if self.machine.rank == 0:
                shutil.rmtree(unfinished, ignore_errors=True)

    def save_state(self):
        """Copy what this step has come to; it is written while the run goes on, on all ranks at
        once. The `keep` newest states stay."""
        self.finish_state()
        # without their gradients, which would be copied, too
        tensors = {name: tensor.detach() for name, tensor in self.state().items()}
        copy = BlockingAsyncStager().stage(tensors)
        facts = self.facts() | {"step": self.step + 1}
        self.unwritten = self.background.submit(
            self.write_state, self.out / "train_state", copy, facts)

    def finish_state(self):
        """Wait until the last state is written. Raises ValueError if it cannot be."""
        if self.unwritten:
            self.unwritten.result()

    def write_state(self, folder, tensors, facts):
        """Write a state under a temporary name, then rename it: a kill leaves none that is half."""
        unfinished = folder / "writing"
        path = folder / f"step_{facts['step']:08d}"
        group = self.machine.background
        with self.writing(unfinished, path):
            # each rank its shards, in files of its own; of what all have, each a part
            dcp.save(tensors, checkpoint_id=unfinished, process_group=group)
            facts["parts"] = self.digests(unfinished, os.listdir(unfinished), group)
            if self.machine.rank == 0:
                write_json(unfinished / "state.json", facts, indent=None)
                shutil.rmtree(path, ignore_errors=True)
                unfinished.rename(path)
        self.drop_old_states(folder)

    def drop_old_states(self, folder):
        if self.machine.rank == 0:
            for old in saved_states(folder)[:-self.config.keep]:
                shutil.rmtree(old)

    def digests(self, folder, names, group=None):
        """{name: SHA-256} of files, which the ranks share out; None for one that is not there."""
        mine = {}
        for name in sorted(names)[self.machine.rank::self.machine.world_size]:
            mine[name] = None
            if (folder / name).is_file():
                with open(folder / name, "rb") as f:
                    mine[name] = hashlib.file_digest(f, "sha256").hexdigest()
        return {name: digest for found in self.machine.gather(mine, group)
                for name, digest in found.items()}

    def resume(self):
        """Restore the newest state, if this run goes on with one, in place. Returns its step, or 0.

        Raises ValueError for a state of other flags, data or weights, or that is damaged.
        """
        if self.writes:
            read_lines(self.log_file, repair=True)       # a kill may have torn its last line
        folder = self.out / "train_state"
        states = saved_states(folder)
        if not states or not self.resumes:
            return 0
        state = self.read_state(states[-1])
        dcp.load(self.state(), checkpoint_id=states[-1])
        self.optimizer.scaler.load_state_dict(state["scaler"])
        self.drop_old_states(folder)
        return state["step"]

    def read_state(self, path):
        """What a state's text says, where it is whole and of this run; else ValueError."""
        state = read_value(path / "state.json")
        now = self.facts()
        kinds = {field: type(value) for field, value in now.items()}
        typed_fields(state, path / "state.json", step=int, parts=dict, **kinds)
        differ = [f"--{flag} {now['config'].get(flag)} (was {state['config'].get(flag)})"
                  for flag in differing(state["config"], now["config"]) if flag not in NOT_COMPARED]
        if differ:
            raise ValueError(f"--resume: {path} was written by a run with other flags: "
                             + ", ".join(differ))
        if state["data"] != now["data"]:
            raise ValueError(f"--resume: the data are not those that {path} was written with")
        other = [name for name, bits in now["frozen"].items()
                 if state["frozen"].get(name, bits) != bits]
        other += differing(state["shapes"], now["shapes"])
        if other:
            raise ValueError(f"--resume: {path} was written with other weights in {other[0]} and "
                             f"{len(other) - 1} more; is it the same --init, --vision and --llm?")
        damaged = differing(state["parts"], self.digests(path, state["parts"]))
        if damaged:
            raise ValueError(f"--resume: {path} is damaged: {', '.join(damaged)} is not what was "
                             f"written; remove {path}, and --resume goes on from the state before")
        return state

    def rehearse(self, save, load):
        """Save and load everything once before step 0: a full disk is better met now.

        save(folder) writes the model, on all ranks; load(folder) reads it, on rank 0.
        """
        folder = self.out / "rehearsal"
        with self.writing(folder, self.out):
            save(folder)
            if self.machine.rank == 0:
                load(folder)
            self.write_state(folder / "train_state", self.state(), self.facts() | {"step": 0})

    # -----------------------------------------------------------------------------
    # The loop

    def steps(self, dataset, first, total, render):
        """Yield (step, dataset[step]), this rank's micro-batches, from step `first` on.

        render(batch) shows the batch's first sample in errors. From here on a signal does not end
        the process, but sets `stopping`.
        """
        self.first = first
        self.total = total
        self.render = render
        self.is_checked = first > 0
        for number in SIGNALS:
            signal.signal(number, lambda number, _: self.signals.append(number))
        if first:
            self.machine.print0(f"resuming at step {first}")
        loader = DataLoader(dataset, batch_size=None, sampler=range(first, total),
                            num_workers=self.config.workers, worker_init_fn=ignore_sigterm,
                            pin_memory=self.machine.device.type == "cuda")
        self.began = time.time()
        self.ended = self.began          # of the step before
        for self.step, self.micro_batches in enumerate(loader, first):
            self.waited = time.time() - self.ended       # for data
            self.seed_step()
            yield self.step, self.micro_batches
            self.ended = time.time()

    def seed_step(self):
        """What adapters drop out depends on seed, step and rank alone, so that a resumed run drops
        what one that was never stopped does."""
        parts = self.config.seed, self.step, self.machine.rank
        torch.manual_seed(int(np.random.default_rng(parts).integers(2 ** 63)))

    def is_due(self):
        """Whether what is done every `save_every` steps, and at the end, is due now."""
        done = self.step + 1
        return done % self.config.save_every == 0 or done == self.total

    def check_step(self, loss, grad_norm):
        """Stop, and name the samples of every rank, if this step's loss is 0 or not finite, or its
        gradient is lost. After the first step that was not skipped, what is frozen is as before,
        and what trains has moved. All ranks stop, or none, for the loss is that of all."""
        if not math.isfinite(loss) or loss == 0 or self.optimizer.is_lost:
            names = sum(self.machine.gather(sample_names(self.micro_batches)), [])
            more = " ..." if len(names) > 16 else ""
            raise ValueError(f"step {self.step}: the loss is {loss}, the gradient's norm "
                             f"{grad_norm}; samples {names[:16]}{more}; "
                             + self.render(self.micro_batches[0]))
        if self.is_checked or self.optimizer.skipped:
            return
        lowest_lr = min(group["lr"] for group in self.optimizer.adamw.param_groups)
        check_moves(self.bits, self.model, self.theta, lowest_lr)
        self.is_checked = True

    def log(self, record):
        """Append a record to log.jsonl; --track shows its numbers elsewhere, too."""
        if self.writes:
            with open(self.log_file, "a") as f:
                f.write(json.dumps(record, allow_nan=False) + "\n")
        if self.track:
            numbers = {key: n for key, n in record.items() if type(n) in (int, float)}
            self.track(numbers, step=numbers.pop("step"))

    def log_step(self, loss, grad_norm, shown="", **more):
        """Log this step, with `more`, and print a line of one in fifty, with `shown` in it. Every
        rank calls this: it counts over all of them, and agrees on `stopping`."""
        masks = [batch["attention_mask"] for batch in self.micro_batches]
        tokens, with_padding, images, signals = self.machine.sum(
            sum(mask.sum().item() for mask in masks), sum(mask.numel() for mask in masks),
            sum(batch["images"] for batch in self.micro_batches), len(self.signals))
        seconds = time.time() - self.ended
        lr = self.optimizer.adamw.param_groups[-1]["lr"]
        done = self.step + 1
        self.stopping = signals > 0 and done < self.total
        self.log({"step": self.step, "loss": loss, "lr": lr, "seconds": seconds,
                  "grad_norm": None if self.optimizer.skipped else grad_norm,    # JSON has no inf
                  "tokens": tokens, "images": images, **more})
        if self.step % max(1, self.total // 50) and done < self.total:
            return
        to_go = (time.time() - self.began) / (done - self.first) * (self.total - done)
        self.machine.print0(
            f"step {self.step:>6}/{self.total} | loss {loss:8.4f} | lr {lr:.2e} | "
            f"norm {grad_norm:8.3f} | {shown}{tokens / seconds:8.0f} tok/s | "
            f"{images / seconds:6.1f} img/s | wait {100 * self.waited / seconds:4.1f}% | "
            f"pad {100 * (1 - tokens / with_padding):4.1f}% | "
            f"{peak_memory(self.machine.device) / 1e9:5.1f} GB | "
            f"eta {timedelta(seconds=round(to_go))}")

    def goodbye(self):
        """After a signal: save a state, and say how to go on. Returns the exit code, 128 and the
        signal's number."""
        if not self.is_due():            # else it is saved
            self.save_state()
        self.finish_state()
        self.machine.print0(f"stopped after step {self.step}; the same command with --resume goes "
                            "on from here")
        return 128 + max(self.signals, default=signal.SIGINT)

    def finish(self, save, ylabel="loss per answer token"):
        """The end of a run: save its result under a temporary name, then move it; plot the losses.

        save(folder) writes the model, on all ranks.
        """
        self.finish_state()
        unfinished = self.out / "writing"
        with self.writing(unfinished, self.out):
            save(unfinished)
            if self.writes:
                parts = sorted(unfinished.iterdir(), key=lambda part: part.name == "config.json")
                for part in parts:       # config.json is last: with it, a checkpoint is complete
                    target = self.out / part.name
                    if target.is_dir():
                        shutil.rmtree(target)
                    part.rename(target)
                plot_losses(self.out, ylabel)
        seconds = round(time.time() - self.began)
        self.machine.print0(f"saved {self.out} after {timedelta(seconds=seconds)}")


def open_tracker(name, config):
    """log(numbers, step=n) and finish() of --track's library. Raises ValueError without it."""
    if name == "tensorboard":
        writer = library("torch.utils.tensorboard", "--track", name).SummaryWriter(config.out)

        def log(numbers, step):
            for key, value in numbers.items():
                writer.add_scalar(key, value, step)
        return log, writer.close
    tracker = library(name, "--track", name)
    run = tracker.init(project="minllava", name=config.out, config=dataclasses.asdict(config))
    return run.log, run.finish


# -----------------------------------------------------------------------------
# What a reader should see before step 0


def config_table(config, origin):
    """A line for each setting: its value, and where that came from."""
    lines = [f"{name:<24}{value!s:<50} {origin[name]}" for name, value in vars(config).items()]
    return [*lines, ""]


def theta_table(model, theta):
    """How many parameters each part of a model has, and how many of them train."""
    lines = ["theta                parameters      that train   dtype"]
    named = list(model.named_parameters())
    for part in dict.fromkeys(name.split(".")[0] for name, _ in named):
        parameters = {name: p for name, p in named if name.split(".")[0] == part}
        n = 0
        for p in parameters.values():
            n += 2 * p.numel() if p.dtype == torch.uint8 else p.numel()      # nf4: two in a byte
        n_theta = sum(theta[name].numel() for name in parameters if name in theta)
        dtype = next(iter(parameters.values())).dtype
        lines.append(f"  {part:<18}{n:>12,}{n_theta:>16,}   {str(dtype).removeprefix('torch.')}")
    return [*lines, ""]


def saved_states(folder):
    """The states in a folder, oldest first."""
    return sorted(folder.glob("step_*"))


def differing(one, other):
    """The keys under which two dicts hold different values, or one of them none."""
    return [key for key in one | other if one.get(key) != other.get(key)]


def sample_names(micro_batches):
    return [name for batch in micro_batches for name in batch["where"]]


def ignore_sigterm(worker):
    """A scheduler's SIGTERM reaches all processes; those that load data go on, for the step that is
    finished and saved."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


# -----------------------------------------------------------------------------
# Frozen is frozen


def fingerprints(model):
    """{name: a sum over the parameter's bits}, equal before and after a step for what has not
    changed. It is one of squares, for in a plain sum as many moves up as down would cancel."""
    sums = {}
    for name, p in model.named_parameters():
        kind = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[p.element_size()]
        bits = local_shard(p.detach()).view(kind).int() % 32749
        sums[name] = bits.square().sum(dtype=torch.int64).item()
    return sums


def check_moves(before, model, theta, lr):
    """After a first step of size `lr`: what is frozen is bit-identical, what trains has moved.

    A weight far larger than the step may stand still in fp32: half a unit in the last place of 1.8
    is more than the paper's first step.
    """
    after = fingerprints(model)
    thawed = [name for name in before if name not in theta and after[name] != before[name]]
    unused = [name for name, p in theta.items() if p.grad is None]
    stuck = []
    for name, p in theta.items():
        if after[name] == before[name] and p.grad is not None:
            can_move = local_shard(p).abs() < lr / torch.finfo(p.dtype).eps
            if (local_shard(p.grad).abs() > 1e-6)[can_move].any():
                stuck.append(name)
    assert not thawed, f"frozen parameters changed in the first step: {thawed[:5]}"
    assert not stuck, f"parameters with a gradient did not move in the first step: {stuck[:5]}"
    assert not unused, f"parameters of theta without a gradient: {unused[:5]}"


# -----------------------------------------------------------------------------
# Memory and plot


def peak_memory(device):
    """Bytes at the peak so far: allocated on the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def dry_run(take_step, budget, most, machine):
    """Take two real steps; say what they need at the peak, and how many tokens would fit, as lines.

    take_step(tokens) is one step on the longest samples, so many tokens at once or a sample; it
    returns how many they were. The smallest comes first, for the peak of a process never falls.
    `most` is what a rank has of a step, and more than that is never at once.
    """
    budget = min(budget, most)
    peaks = {}
    for at_most in (1, budget, budget // 2, budget // 4, budget // 8):
        try:
            tokens = take_step(at_most)
        except torch.OutOfMemoryError:
            continue
        peaks[tokens] = peak_memory(machine.device)
        if at_most > 1:
            break
    if machine.device.type == "cuda":
        memory = torch.cuda.get_device_properties(machine.device).total_memory
    else:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / machine.world_size
    lines = [f"{n} tokens at once: {peak / 1e9:.2f} GB at the peak" for n, peak in peaks.items()]
    fitting = min(most, tokens_that_fit(peaks, 0.9 * memory))
    advice = ("nothing fits: --checkpoint_activations all, --shard over more devices, or adapters "
              "(--lora_rank)")
    if fitting:
        advice = f"take --micro_batch_tokens {fitting}"
    return [*lines, f"{memory / 1e9:.2f} GB are here, of which a tenth stays free", advice]


def tokens_that_fit(peaks, memory):
    """How many tokens need so many bytes, by the line through the measurements; 0 if the least
    does not fit."""
    if not peaks or min(peaks.values()) > memory:
        return 0
    least = min(peaks)
    largest = max(peaks)
    growth = (peaks[largest] - peaks[least]) / max(1, largest - least)
    if growth == 0:
        return largest
    return int(least + (memory - peaks[least]) / growth)


def plot_losses(folder, ylabel):
    """loss.png from log.jsonl; where a resumed run did a step twice, the later one counts."""
    from matplotlib.figure import Figure
    log = read_lines(folder / "log.jsonl")
    training = {record["step"]: record["loss"] for record in log if "loss" in record}
    held_out = {record["step"]: record["val_loss"] for record in log if "val_loss" in record}
    fig = Figure(figsize=(7, 4))
    ax = fig.subplots()
    ax.plot(list(training), list(training.values()), lw=0.8, label="training")
    ax.plot(list(held_out), list(held_out.values()), "o-", ms=3, label="held out")
    ax.set(xlabel="step", ylabel=ylabel, title=str(folder))
    ax.legend()
    fig.savefig(folder / "loss.png", dpi=120)
