"""
A GPU that is not there: tensors say `cuda:0`, and their numbers are computed on the CPU.

    library, reason = build(folder)     None, where there is no C++ compiler or torch has changed
    run(library, program)               the program, in a process where torch finds a GPU

What asks for the device takes its GPU branch: autocast, fused AdamW, pinned memory. An operation on
tensors of both devices raises, as on a GPU, and each time that the host waits for the device is
counted, with the line of ours that made it wait. Kernels, streams, NCCL, CUDA graphs and Triton are
not seen.
"""
import contextlib
import os
import shutil
import subprocess
import sys
import traceback
from collections import Counter
from types import SimpleNamespace

import torch
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

HERE = os.path.dirname(os.path.abspath(__file__))
ROOT = os.path.dirname(HERE)
GPU = torch.device("cuda", 0)
aten = torch.ops.aten
COPIES = {aten.copy_.default, aten._to_copy.default, aten._foreach_copy_.default}
INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default,
           aten._index_put_impl_.default}
# how many numbers come out depends on those that go in
COUNTED = {aten.nonzero.default, aten.masked_select.default, aten._local_scalar_dense.default,
           aten._unique2.default, aten.unique_dim.default, aten.equal.default,
           aten.repeat_interleave.Tensor}
waits = Counter()                        # {(what, where): how often}


def build(folder):
    """Compile fake_cuda.cpp; returns (the library's path, None), or (None, why there is none)."""
    compiler = shutil.which("g++") or shutil.which("clang++")
    if sys.platform != "linux" or compiler is None:
        return None, "there is no C++ compiler, or this is not Linux"
    library = f"{folder}/fake_cuda.so"
    torch_folder = os.path.dirname(torch.__file__)
    done = subprocess.run(
        [compiler, "-shared", "-fPIC", "-std=c++20", f"{HERE}/fake_cuda.cpp", "-o", library,
         f"-I{torch_folder}/include", f"-L{torch_folder}/lib", f"-Wl,-rpath,{torch_folder}/lib",
         "-ltorch_cpu", "-lc10"],
        capture_output=True, text=True)
    if done.returncode:
        return None, f"torch's hooks are other ones now: {done.stderr[:500]}"
    return library, None


def run(library, program):
    """Run a program on the GPU that is not there, with `fake_cuda` imported. Returns what it prints
    and its errors, together, and its exit code."""
    lines = ["import ctypes, sys", f"sys.path[:0] = [{ROOT!r}, {HERE!r}]",
             f"ctypes.CDLL({library!r}, ctypes.RTLD_GLOBAL)",        # it must come before torch
             "import fake_cuda", "fake_cuda.pretend()", program]
    done = subprocess.run([sys.executable, "-c", "\n".join(lines)], text=True, cwd=ROOT,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    return done.stdout, done.returncode


# -----------------------------------------------------------------------------
# Tensors


class OnGPU(torch.Tensor):
    """A tensor that says cuda:0; its numbers are in `held`, on the CPU."""

    @staticmethod
    def __new__(cls, held, requires_grad=False):
        tensor = torch.Tensor._make_wrapper_subclass(
            cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(),
            dtype=held.dtype, device=GPU, requires_grad=requires_grad)
        tensor.held = held
        return tensor

    def __repr__(self, **_):
        return f"OnGPU({self.held!r})"

    def __tensor_flatten__(self):        # of a tensor that has this, `module.to` makes a parameter
        return ["held"], None

    @staticmethod
    def __tensor_unflatten__(inner, meta, size, stride):
        return OnGPU(inner["held"])

    def untyped_storage(self):
        return self.held.untyped_storage()

    def tolist(self):
        return self.cpu().tolist()

    @property
    def data(self):
        return self.detach()

    @data.setter
    def data(self, new):
        torch.Tensor.data.__set__(self, new)
        self.held = new.held

    @classmethod
    def __torch_dispatch__(cls, operation, types, args=(), kwargs=None):
        return compute(operation, args, kwargs or {})


class Everywhere(TorchDispatchMode):
    """What makes a tensor on the GPU has none among its arguments."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        return compute(operation, args, kwargs or {})


def is_ours(x):
    return isinstance(x, OnGPU)


def compute(operation, args, kwargs):
    """An operation, on the CPU; its results are on the GPU if they would be."""
    tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
    ours = [x for x in tensors if is_ours(x)]
    device = kwargs.get("device")
    to_gpu = bool(ours) if device is None else torch.device(device).type == "cuda"
    if ours:
        refuse_mixture(operation, args, tensors)
    if ours or to_gpu:
        note_wait(operation, args, kwargs, to_gpu)
    if device is not None:
        kwargs = kwargs | {"device": torch.device("cpu")}
    if kwargs.get("pin_memory"):
        kwargs = kwargs | {"pin_memory": False}

    def down(x):
        return x.held if is_ours(x) else x

    def up(x):
        return OnGPU(x) if isinstance(x, torch.Tensor) else x

    out = operation(*tree_map(down, args), **tree_map(down, kwargs))
    if operation is aten.copy_.default:
        return args[0]
    if not to_gpu or operation is aten._local_scalar_dense.default:
        return out
    out = tree_map(up, out)
    if any(result.alias_info for result in operation._schema.returns):
        return return_and_correct_aliasing(operation, args, kwargs, out)
    return out


def refuse_mixture(operation, args, tensors):
    """Tensors of both devices in one operation: only copies may, and indices of the CPU."""
    if operation in COPIES:
        return
    if operation in INDEXED:
        tensors = [args[0]]
    strangers = [x for x in tensors if not is_ours(x) and (x.dim() > 0 or operation in INDEXED)]
    if strangers:
        raise RuntimeError(f"{operation}: all tensors must be on the same device, not on cuda:0, "
                           f"and on the CPU ({tuple(strangers[0].shape)})")


def note_wait(operation, args, kwargs, to_gpu):
    """Count this operation if the host waits for the device in it."""
    what = None
    if operation in COUNTED and kwargs.get("output_size") is None:
        what = operation.__name__
    elif operation is aten._to_copy.default and is_ours(args[0]) != to_gpu:
        what = None if kwargs.get("non_blocking") else "a copy between the devices"
    elif operation is aten.copy_.default and is_ours(args[0]) != is_ours(args[1]):
        what = "a copy between the devices"
    elif operation in INDEXED:
        indices = [i for i in args[1] if i is not None]
        if any(i.dtype == torch.bool or not is_ours(i) for i in indices):
            what = "a boolean index, or one of the CPU"
    if what:
        waits[what, line_of_ours()] += 1


def line_of_ours():
    frames = [frame for frame in traceback.extract_stack()
              if frame.filename.startswith(ROOT) and frame.filename != __file__]
    return f"{frames[-1].filename}:{frames[-1].lineno} {frames[-1].line}" if frames else "?"


def counted(function, found):
    """The function; at the end of each call, what the host has waited for since the one before is
    appended to a list."""
    def count(*args, **kwargs):
        result = function(*args, **kwargs)
        found.append({" in ".join(key): n for key, n in waits.items()})
        waits.clear()
        return result
    return count


# -----------------------------------------------------------------------------
# torch.cuda


class Stream(contextlib.nullcontext):
    """A stream, or an event: nothing ever waits for one."""
    device = GPU

    def __getattr__(self, name):
        return nothing


class Generator(torch.Generator):
    def __new__(cls, device="cpu"):
        return super().__new__(cls, "cpu")


def move_parameter(parameter, data):
    """`p.data = ...`, where data that are on the GPU make p a tensor of another class."""
    if is_ours(data):
        torch.utils.swap_tensors(parameter, torch.nn.Parameter(data, parameter.requires_grad))
    else:
        torch.Tensor.data.__set__(parameter, data)


def nothing(*_, **__):
    pass


def pretend():
    """From here on torch finds one GPU, an A100 as far as it is asked."""
    card = SimpleNamespace(name="none", major=8, minor=0, total_memory=80 * 10 ** 9)
    answers = {"is_available": True, "is_initialized": False, "is_bf16_supported": True,
               "device_count": 1, "current_device": 0, "get_device_properties": card,
               "get_device_capability": (8, 0), "max_memory_allocated": 0, "stream": Stream(),
               "current_stream": Stream(), "set_device": None, "synchronize": None,
               "manual_seed_all": None, "_lazy_init": None}

    def always(answer):
        return lambda *_, **__: answer

    for name, answer in answers.items():
        setattr(torch.cuda, name, always(answer))
    torch.cuda.Stream = torch.cuda.Event = Stream
    torch.inference_mode = torch.no_grad         # within it, operations would not come in parts
    torch.Tensor.pin_memory = lambda tensor, *_: tensor
    torch.Generator = Generator
    torch.nn.Parameter.data = property(torch.Tensor.data.__get__, move_parameter)
    torch._C._set_only_lift_cpu_tensors(True)
    Everywhere().__enter__()
