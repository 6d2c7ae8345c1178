"""The GPU's branches on a machine without one (tests/fake_cuda.py): nothing is left on the CPU, and
the host waits for the device once a step."""
import json

import fake_cuda
import pytest
import test_react
import test_train

from extras import bench

pytestmark = pytest.mark.slow
flags = test_train.flags
clip = test_react.clip
corpus = test_react.corpus
retrieved = test_react.retrieved
# of each step but a run's first, in which the model is loaded and checked: {where it waits: n};
# or the error that ends the run
TRAIN = """
import importlib, json
from parts.run import Run
from parts.ranks import Machine
steps = []
Run.log_step = fake_cuda.counted(Run.log_step, steps)
to_device = Machine.to_device
def planted(machine, batch, *names):
    new = to_device(machine, batch, *names)
    exec(bug)
    return new
Machine.to_device = planted
found = []
for module, argv, bug in {runs!r}:
    steps.clear()
    try:
        importlib.import_module(module).main(argv)
        found.append(steps[1:])
    except RuntimeError as error:
        found.append(str(error))
print(json.dumps(found))
"""
BENCH = """
import json
from extras import bench
config = bench.Config(size="toy", global_batch_size=4, micro_batch_size=2, repeats=2, compile=False,
                      new_tokens=6)
steps = []
bench.clock = fake_cuda.counted(bench.clock, steps)      # around what is timed
turn = bench.our_training(config, {folder!r})
losses = [turn(k)["loss"] for k in range(4)]
turn = bench.our_answers(config, {folder!r})
ids = turn(0)["ids"]
print(json.dumps([steps, losses, ids]))
"""

ANSWERS = """
import json
import torch.nn.functional as F
from test_engine import SAMPLING, Engine, batch_of, generated, tiny_llava
model = tiny_llava()
batch = batch_of(model)
expected = generated(model, batch, **SAMPLING)
masked, attention = [], F.scaled_dot_product_attention
def watch(q, k, v, attn_mask=None, enable_gqa=False, **more):
    masked.append(attn_mask is not None and enable_gqa)
    return attention(q, k, v, attn_mask, enable_gqa=enable_gqa, **more)
F.scaled_dot_product_attention = watch
answers = Engine(model.to("cuda")).generate(batch, **SAMPLING)
print(json.dumps([answers == expected, len(masked), any(masked)]))
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    path, reason = fake_cuda.build(tmp_path_factory.mktemp("fake_cuda"))
    if path is None:
        pytest.skip(reason)
    return path


def printed(library, program):
    """What the program prints last."""
    shown, code = fake_cuda.run(library, program)
    assert code == 0, shown[-5000:]
    return json.loads(shown.splitlines()[-1])


def waits(steps):
    return [sum(step.values()) for step in steps]


def test_every_kind_of_training_waits_for_the_device_once_a_step(
        library, flags, retrieved, clip, tmp_path):
    """Both stages, adapters in fp16, NeXT, whose g trains, in steps of several micro-batches, and
    REACT: autocast, fused AdamW, validation; the loss and the gradient's norm are read together. A
    planted wait in each micro-batch is found with its line, and a tensor left on the CPU, too."""
    more = ["--max_steps", 3, "--micro_batch_tokens", 700]
    one, two = test_train.STAGE[1], test_train.STAGE[2]
    adapters = ["--init", tmp_path / "one", *test_train.LORA, "--dtype", "fp16"]
    react = test_react.training(retrieved, clip, tmp_path / "react", "--device", "cuda")
    runs = [("train", flags(tmp_path / "one", *one, *more), ""),
            ("train", flags(tmp_path / "two", *two, *more, "--val_samples", 3), ""),
            ("train", flags(tmp_path / "adapters", *two, *adapters, *more), ""),
            ("train", flags(tmp_path / "next", *test_train.STAGE["NeXT"], *more), ""),
            ("extras.react", react, ""),
            ("train", flags(tmp_path / "wait", *one, *more), "new['X_v'].sum().item()"),
            ("train", flags(tmp_path / "CPU", *one, *more), "new['X_v'] = batch['X_v']")]
    *fine, slow, wrong = printed(library, TRAIN.format(runs=runs))
    assert list(map(waits, fine)) == [*4 * [[1, 1]], [1] * 5], fine
    assert min(waits(slow)) > 2 and "train.py" in str(slow), slow
    assert "all tensors must be on the same device" in wrong


def test_answers_are_the_CPUs_and_no_mask_meets_grouped_queries(library):
    """For which A100s have only the kernel that holds every weight of attention."""
    are_equal, n, together = printed(library, ANSWERS)
    assert are_equal and n > 20 and not together


def test_the_bench_measures_on_the_device(library, tmp_path):
    """Its steps and answers; a step waits once, a word of an answer twice: is it finite, and which
    is it."""
    bench.random_llava(bench.Config(size="toy")).save_pretrained(tmp_path)
    steps, losses, ids = printed(library, BENCH.format(folder=str(tmp_path)))
    assert len(set(losses)) == 4 and len(ids) == 2 and len(ids[0]) == 6
    assert waits(steps)[1::2][:4] == [1] * 4, steps
