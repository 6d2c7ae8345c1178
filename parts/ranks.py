"""
Ranks: this process's device and number format, and the other processes that train with it.

    Machine     joins the other processes of `torchrun`, places a model, sums over ranks
    Optimizer   AdamW with a peak rate a group, and the loss scale that fp16 needs

With `shard` (FSDP2) each of n ranks keeps 1/n of every weight that f_phi, W and, if it trains, g
have, of its gradient and of AdamW's two moments. A decoder layer is gathered just before it is
used, the next one meanwhile, and its gradients are summed and dealt out behind it. A frozen g stays
whole on every rank: CLIP ViT-L has 0.6 GB in bf16.
"""
import contextlib
import functools
import itertools
import math
import os
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed import fsdp
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.rendezvous import rendezvous
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint
from transformers import masking_utils

from parts import lora
from parts.files import library

RECOMPUTED = {"none": 0, "all": 1, "every_2": 2}     # of how many decoder layers one runs again
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
# What LLaVA.forward and LLaVA.generate take of a batch; the rest is for people.
TRAINING = ("input_ids", "answer_index", "X_v", "visual_index")
ANSWERING = ("input_ids", "attention_mask", "X_v", "visual_index")


def choose_device(name="auto", index=0):
    """The device of that name; "auto" takes a GPU (number `index`), else Apple's, else the CPU."""
    found = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(),
             "cpu": True}
    if name == "auto":
        name = next(kind for kind, is_found in found.items() if is_found)
    if not found.get(name):
        raise ValueError(f"--device {name}: torch finds none on this machine; auto takes what is "
                         "there")
    if name == "cuda":
        torch.cuda.set_device(index)
        return torch.device("cuda", index)
    return torch.device(name)


def choose_dtype(name, device):
    """(dtype, why): "auto", and nf4's products, have bf16 where a GPU has it, else fp16; fp32
    elsewhere."""
    if name in DTYPES:
        return DTYPES[name], "as asked"
    if device.type != "cuda":
        return torch.float32, f"{device.type}: half precision gains little here"
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16, "this GPU has bf16"
    return torch.float16, "this GPU lacks bf16"


def restarts():
    """How often `torchrun --max-restarts` has started this run again."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def share_of(global_batch_size, world_size):
    """A rank's share of a global batch. Raises ValueError, with a size that would do."""
    share, rest = divmod(global_batch_size, world_size)
    if rest:
        raise ValueError(f"global_batch_size {global_batch_size} over {world_size} ranks: take a "
                         f"multiple of {world_size}, e.g. {(share + 1) * world_size}")
    return share


# -----------------------------------------------------------------------------
# One process among its ranks


class Machine:
    """This process's place: its rank, its device, and the number format it computes in."""

    def __init__(self, device="auto", dtype="auto", shard=False):
        self.rank = int(os.environ.get("RANK", 0))
        self.world_size = int(os.environ.get("WORLD_SIZE", 1))
        self.device = choose_device(device, int(os.environ.get("LOCAL_RANK", 0)))
        self.dtype, self.reason = choose_dtype(dtype, self.device)
        self.nf4 = dtype == "nf4"        # what adapters leave frozen, see parts/lora.py
        if self.nf4:
            lora.bitsandbytes()          # a missing library is found out now
        self.shard = shard
        self.background = None           # the ranks again, for what they do beside training
        kind = self.device.type
        if shard and (kind == "mps" or self.dtype == torch.float16):
            raise ValueError("--shard goes with cuda or cpu and bf16 or fp32, "
                             f"not with {kind} and {self.dtype}")
        if (self.world_size > 1 or shard) and not dist.is_initialized():
            self.join()

    def join(self):
        """Meet the other ranks."""
        store = dist.HashStore()
        if self.world_size > 1:
            # a restart finds the store of before, with the addresses of ranks that are gone
            store = dist.PrefixStore(f"restart_{restarts()}", next(rendezvous("env://"))[0])
        dist.init_process_group(
            "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo",
            timeout=timedelta(hours=2),  # so long may rank 0 check the data while the others wait
            store=store, rank=self.rank, world_size=self.world_size)
        self.background = dist.new_group(backend="gloo", timeout=timedelta(hours=2))

    def finish(self):
        """End together. Nothing may hold what `wrap` returned any more: its destructor joins
        gloo's threads, and would wait for them with Python's lock in its hand."""
        if dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()

    def print0(self, *blocks):
        """Print on rank 0 alone, each block on lines of its own."""
        if self.rank == 0:
            print(*blocks, sep="\n", flush=True)

    def sum(self, *values):
        """Numbers added up over all ranks: one number, or a list as long as `values`. It is done on
        the CPU, by gloo, so that nobody waits for a GPU."""
        total = torch.tensor(values, dtype=torch.float64)
        if self.world_size > 1:
            dist.all_reduce(total)
        return total.tolist() if len(values) > 1 else total.item()

    def gather(self, value, group=None):
        """Every rank's value, as a list on every rank."""
        values = [value] * self.world_size
        if self.world_size > 1:
            dist.all_gather_object(values, value, group)
        return values

    def to_device(self, batch, names=TRAINING):
        """These tensors of a batch, on this rank's device."""
        return {name: batch[name].to(self.device, non_blocking=True) for name in names}

    def place(self, model, checkpoint_activations="none", compile=False, kernels="torch"):
        """Put a model whose stage is set on its device: in fp32 what trains, in the compute dtype
        what is frozen; with other kernels, compiled, recomputed, sharded as asked.

        Its weights may be mapped files, of which a rank then holds its shards alone. Returns theta,
        {name: parameter}, which in shards are other objects than before.
        """
        model.eval()                     # CLIP and LLaMA-like models have no dropout to switch on
        if self.device.type == "cuda":
            masking_utils.find_packed_sequence_indices = none_are_packed
        if kernels == "liger":
            use_liger(model, self.device)
        if compile:
            compile_layers(model, self.device)
        recompute_layers(model, checkpoint_activations)
        if self.shard:
            shard_model(model, self.device, self.dtype)
        else:
            if self.nf4:
                for layer in lora.adapters(model).values():
                    layer.hold_in_4_bits(self.device, self.dtype)
            others = [p for p in model.parameters() if p.is_floating_point()]
            copy_weights(others, self.device, self.dtype)
            model.to(self.device)        # its buffers, too
            start_stream(model, self.dtype)
        return {name: p for name, p in model.named_parameters() if p.requires_grad}

    def wrap(self, model):
        """The model as the loop calls it, which averages gradients over ranks. Only here is one
        wrapped: all names in a checkpoint stay what they are."""
        if self.world_size == 1 or self.shard:
            return model
        return DistributedDataParallel(model)

    @contextlib.contextmanager
    def forward(self, model, sync=True):
        """Around a forward pass and its backward: compute in this machine's dtype.

        Without `sync`, gradients wait on their ranks for a pass that has it. Those of shards never
        wait: whole ones would not fit.
        """
        with contextlib.ExitStack() as stack:
            if isinstance(model, DistributedDataParallel) and not sync:
                stack.enter_context(model.no_sync())
            if self.dtype != torch.float32:
                stack.enter_context(torch.autocast(self.device.type, self.dtype))
            yield

    def gathered_state(self, model):
        """The model's state dict on the CPU of rank 0, whole; every rank calls this."""
        state = {}
        for name, tensor in model.state_dict().items():
            is_sharded = isinstance(tensor, DTensor)
            if is_sharded:
                tensor = tensor.full_tensor()
            if self.rank == 0:
                # a gathered tensor may be part of a larger one, which a file would hold as well
                state[name] = tensor.to("cpu", copy=is_sharded)
        return state


def start_stream(model, dtype):
    """Both residual streams start in the compute dtype, and stay in it. OFFICIAL: as in shards, and
    under DeepSpeed. Of fp32 weights autocast alone makes fp32 streams, twice as long to read."""
    embeddings = model.f_phi.get_input_embeddings()
    embeddings.register_forward_hook(lambda module, ids, H_q: H_q.to(dtype))
    first = model.g.encoder.layers[0]
    first.register_forward_pre_hook(lambda layer, inputs: inputs[0].to(dtype))


def none_are_packed(position_ids):
    """No row holds several samples. transformers asks the GPU in every forward pass, and waits."""


# -----------------------------------------------------------------------------
# AdamW


def groups_of(theta, peaks):
    """theta, {name: parameter}, as groups: a peak rate for each part (a name's first word)."""
    groups = []
    for part, peak in peaks.items():
        parameters = [p for name, p in theta.items() if name.split(".")[0] == part]
        if parameters:
            groups.append({"params": parameters, "peak": peak})
    return groups


class Optimizer:
    """AdamW over groups, dicts of "params" and their "peak" rate, with fp16's loss scale.

    skipped    the last step's gradient was not finite: fp16's scale was too high, and is halved
    is_lost    and no lower scale can help
    """

    def __init__(self, groups, machine, betas=(0.9, 0.999), eps=1e-8):
        is_cuda = machine.device.type == "cuda"
        # a CPU would gain 1% of a step from the fused kernel
        self.adamw = torch.optim.AdamW(groups, betas=betas, eps=eps, weight_decay=0.0,
                                       fused=is_cuda)
        is_fp16 = machine.dtype == torch.float16
        self.scaler = torch.amp.GradScaler(machine.device.type, enabled=is_fp16)
        self.parameters = [p for group in self.adamw.param_groups for p in group["params"]]
        # Allocate the moments now, so that too little memory fails before step 0.
        for p in self.parameters:
            self.adamw.state[p] = {
                "step": torch.tensor(0.0, device=p.device if is_cuda else "cpu"),
                "exp_avg": torch.zeros_like(p),
                "exp_avg_sq": torch.zeros_like(p),
            }

    def set_lr(self, share):
        """Set every group's rate to this share of its peak."""
        for group in self.adamw.param_groups:
            group["lr"] = share * group["peak"]

    def zero_grad(self):
        self.adamw.zero_grad(set_to_none=True)

    def backward(self, loss):
        """Gradients of a loss, which fp16 scales up, for small ones would vanish."""
        self.scaler.scale(loss).backward()

    def step(self, *values):
        """Update the parameters, unless the gradient is not finite.

        Returns `values`, numbers on the device such as the loss, and behind them the gradient's
        norm. They are read together, once a step, for the host then waits for the device.
        """
        self.scaler.unscale_(self.adamw)
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        numbers = [*(value.detach().float() for value in values), norm]
        *values, norm = torch.stack(numbers).tolist()
        self.skipped = not math.isfinite(norm)
        self.is_lost = self.skipped and self.scaler.get_scale() <= 1
        if not self.is_lost:
            self.scaler.step(self.adamw)
            self.scaler.update()
        return [*values, norm]


# -----------------------------------------------------------------------------
# Shards


def shard_model(model, device, dtype):
    """Shard a model (on the CPU) over all ranks, in place. It computes in `dtype`, sums gradients
    in fp32 and keeps its weights as they are; its parameters are new objects."""
    policy = fsdp.MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    options = {"mesh": init_device_mesh(device.type, (dist.get_world_size(),)), "mp_policy": policy}
    layers = list(model.f_phi.base_model.layers)
    not_sharded = set()
    if model.train_g:
        layers += model.g.encoder.layers
    else:
        not_sharded = set(model.g.parameters())
        copy_weights(not_sharded, device, dtype)
        model.g.to(device)
    for layer in layers:                 # one is whole at a time, and then 1/n of it stays
        copy_weights(layer.parameters(), device, dtype)
        fsdp.fully_shard(layer, **options, reshard_after_forward=True)
    for layer, later in itertools.pairwise(layers):      # asked for early: a link never waits for
        layer.set_modules_to_forward_prefetch([later])   # the host; backward does so by itself
    # the rest: embeddings, head, norms, W, newline
    rest = [p for p in model.parameters() if not isinstance(p, DTensor) and p not in not_sharded]
    copy_weights(rest, device, dtype)
    fsdp.fully_shard(model, **options, ignored_params=not_sharded)
    fsdp.register_fsdp_forward_method(model, "generate")     # it gathers as `forward` does


def copy_weights(parameters, device, dtype):
    """Copy these to a device, in fp32 what trains, in `dtype` what is frozen: of a mapped file
    nothing is left in use, so that it may change."""
    for p in parameters:
        kind = torch.float32 if p.requires_grad else dtype
        p.data = p.data.to(device, kind, copy=True)


def local_shard(tensor):
    """The part of a tensor that lies on this rank: all of it, if it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


# -----------------------------------------------------------------------------
# Less memory, less time


def recompute_layers(model, checkpoint_activations):
    """Activation checkpointing of decoder layers, see RECOMPUTED: such a layer keeps its input
    alone, and runs again in the backward pass."""
    every = RECOMPUTED[checkpoint_activations]
    if every:
        for layer in list(model.f_phi.base_model.layers)[::every]:
            layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)


def compile_layers(model, device):
    """torch.compile of the decoder layers, one by one, for lengths of any kind; all share what is
    compiled for the first. ValueError where there is no compiler."""
    try:
        torch.compile(torch.sin)(torch.zeros(2, device=device))
    except Exception as error:           # of many kinds: no C++ compiler, no Triton, no such system
        raise ValueError(f"--compile is not possible here: {str(error).splitlines()[0]}") from error
    # do not keep for the backward pass what is quick to compute
    torch._functorch.config.activation_memory_budget = 0.95
    for layer in model.f_phi.base_model.layers:
        layer.forward = compile_training(layer.forward)


def use_liger(model, device):
    """Liger-Kernel's fused norms, rotary positions and SwiGLU in f_phi, and its loss, for which no
    logits are kept. ValueError where they are not to be had.

    Not the default: with equal losses it once gave worse models.
    """
    if device.type != "cuda":
        raise ValueError(f"--kernels liger: they are CUDA's, not {device.type}'s; leave it out")
    liger, patches = (library(f"liger_kernel.transformers{part}", "--kernels liger", "liger-kernel")
                      for part in ("", ".monkey_patch"))
    kinds = patches.MODEL_TYPE_TO_APPLY_LIGER_FN
    kind = model.f_phi.config.model_type
    if kind not in kinds:
        raise ValueError(f"--kernels liger: it has none for a language model of type {kind}, but "
                         f"for {', '.join(kinds)}; leave it out")
    kinds[kind](model=model.f_phi, fused_linear_cross_entropy=False)
    model.forward = fused_forward(model, liger.LigerFusedLinearCrossEntropyLoss(reduction="sum"))


def fused_forward(model, linear_cross_entropy):
    """LLaVA.forward by a loss of (the head's weight, hidden states, targets), a sum."""
    def forward(**batch):
        h, targets = model.answer_states(**batch)
        weight = model.f_phi.get_output_embeddings().weight
        return linear_cross_entropy(weight, h, targets), len(targets)
    return forward


def compile_training(forward):
    """A layer's forward, compiled where gradients are wanted: generation, whose cache grows, would
    be compiled again and again."""
    compiled = torch.compile(forward, dynamic=True)

    def compiled_in_training(*args, **more):
        run = compiled if torch.is_grad_enabled() else forward
        return run(*args, **more)
    return compiled_in_training
