"""
One model over many devices (`train.py --shard`, FSDP2), and a training state that any number of them can go on from.

Each of n ranks keeps 1/n of every weight that f_phi, W and, if it trains, g have, of its gradient and of AdamW's two moments. A
decoder layer is gathered just before it is used, the next one meanwhile, and its gradients are summed and dealt out behind it.
A frozen g stays whole on every rank: CLIP ViT-L has 0.6 GB in bf16. What is saved is gathered: the same files for any n.
"""
import functools
import json
import os
import shutil

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (CPUOffloadPolicy, MixedPrecisionPolicy, OffloadPolicy, fully_shard,
                                    register_fsdp_forward_method)
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils.checkpoint import checkpoint


def shard(model, device, dtype, offload=False):
    """Shard a model (on the CPU) over all ranks, in place: computing in `dtype`, gradients summed in fp32, masters as they are.

    `offload`: weights, gradients and moments lie on the CPU, where AdamW runs, too. The parameters are new objects.
    """
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    how = {"mesh": mesh, "mp_policy": MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32),
           "offload_policy": CPUOffloadPolicy() if offload else OffloadPolicy()}
    layers, whole_g = list(model.f_phi.base_model.layers), set()
    if model.train_g:
        layers += model.g.encoder.layers
    else:
        whole_g = set(model.g.parameters())
        model.g.to(device)
    for layer in layers:
        fully_shard(layer, **how)
    fully_shard(model, **how, ignored_params=whole_g)    # the rest: embeddings, head, norms, W, newline
    register_fsdp_forward_method(model, "generate")      # gathers as `forward` does


def recompute(model, every):
    """Activation checkpointing: each `every`-th decoder layer keeps its input alone and runs again in the backward pass."""
    for layer in list(model.f_phi.base_model.layers)[::every]:
        layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)


def own(tensor):
    """The part of a tensor that lies here: all of it, if it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def writes():
    """Whether this process is the one that writes: rank 0, or the only one."""
    return not dist.is_initialized() or dist.get_rank() == 0


def whole(tensor):
    """A tensor on the CPU, gathered: every rank calls this, rank 0 gets it, the others None."""
    tensor = tensor.detach()
    sharded = isinstance(tensor, DTensor)
    full = tensor.full_tensor() if sharded else tensor
    if writes():
        return full.to("cpu", copy=sharded)              # what is gathered may be a view of something larger


def whole_state(model):
    """`model.state_dict()` on the CPU, gathered: as in `whole`."""
    return {name: whole(tensor) for name, tensor in model.state_dict().items()}


# ---------------------------------------------------------------------------------------------------------------------
# A training state is train_state/step_N: theta and AdamW's moments in parts, and state.json


def parts(theta, most=2 ** 29):
    """Names of theta in lists of `most` numbers at most, or of one parameter: what is gathered, and in memory, at a time."""
    some, numbers = [], 0
    for name, p in theta.items():
        if some and numbers + p.numel() > most:
            yield some
            some, numbers = [], 0
        some.append(name)
        numbers += p.numel()
    yield some


def saved_steps(folder):
    """The whole states in a folder, oldest first."""
    return sorted(n for n in os.listdir(folder) if n.startswith("step_")) if os.path.isdir(folder) else []


def write_state(folder, step, facts, theta, optimizer, keep=1):
    """Write the state under a temporary name, rename it, then drop all but the `keep` newest: a kill at any moment leaves a
    whole one. Every rank calls it, rank 0 writes. ValueError where it cannot, with what is kept."""
    writing, done = os.path.join(folder, "writing"), os.path.join(folder, f"step_{step:08d}")
    try:
        if writes():
            os.makedirs(folder, exist_ok=True)
            shutil.rmtree(writing, ignore_errors=True)
            os.makedirs(writing)
        for k, names in enumerate(parts(theta)):
            tensors = {f"theta/{name}": whole(theta[name]) for name in names}
            tensors |= {f"{key}/{name}": whole(value) for name in names for key, value in optimizer.state[theta[name]].items()}
            if writes():
                save_file(tensors, os.path.join(writing, f"part_{k:05d}.safetensors"))
        if not writes():
            return
        with open(os.path.join(writing, "state.json"), "w") as f:
            json.dump({"step": step, **facts}, f)
        for name in os.listdir(writing):
            with open(os.path.join(writing, name), "rb") as f:
                os.fsync(f.fileno())
        shutil.rmtree(done, ignore_errors=True)
        os.rename(writing, done)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(writing, ignore_errors=True)
        raise ValueError(f"{done} cannot be written ({error}); kept is {', '.join(saved_steps(folder)) or 'no state'}: make "
                         "room, then --resume") from error
    for name in saved_steps(folder)[:-keep]:
        shutil.rmtree(os.path.join(folder, name))


@torch.no_grad()
def read_state(path, theta, optimizer):
    """Copy a state into theta and its moments, each rank its own share of them."""
    for file in sorted(os.listdir(path)):
        if file.endswith(".safetensors"):
            with safe_open(os.path.join(path, file), "pt") as f:
                for key in f.keys():
                    kind, name = key.split("/", 1)
                    to, value = theta[name] if kind == "theta" else optimizer.state[theta[name]][kind], f.get_tensor(key)
                    if isinstance(to, DTensor):
                        value = distribute_tensor(value.to(to.device_mesh.device_type), to.device_mesh, to.placements,
                                                  src_data_rank=None)        # no message: every rank has read it
                    to.copy_(value)
