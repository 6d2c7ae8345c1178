"""runs/gpu.sh, as it runs on a lent GPU, at toy size on the CPU."""
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT
from test_bench import small
from torch.utils.flop_counter import FlopCounterMode

from extras import bench, gpu_table


def test_the_rows_are_those_that_a_gpu_can_hold():
    """All of 7B trains on 141 GB alone; what is large comes first, for minutes may end."""
    names = {memory: [" ".join(map(str, row.values())) for row in
                      gpu_table.plan_rows(gpu_table.Config(), memory)] for memory in (80e9, 150e9)}
    assert "train 7b full False" in names[150e9] and "train 7b full False" not in names[80e9]
    for memory, rows in names.items():
        assert rows[0] == "pictures" and "answer 7b 16 True" in rows
        assert rows.index("train 7b lora False") < rows.index("train 0.6b full True"), memory


@pytest.mark.parametrize("way, stage", [("full", 2), ("frozen", 1)])
def test_floating_point_operations_of_a_step_are_counted_right(way, stage):
    """Against torch's counter, which knows no attention on the CPU, and counts the head's second
    forward pass; g and W are small."""
    config = small(size="toy", stage=stage, micro_batch_size=4)
    machine = bench.Machine("cpu", "fp32")
    model = bench.random_llava(config)
    model.set_stage(stage)
    turn = bench.our_steps(config, machine, model)
    with FlopCounterMode(display=False) as counter:
        turn(2)
    [batch] = bench.draw_batches(model, config, True)[2]
    B, T = batch["input_ids"].shape
    text = model.f_phi.config
    attention = 12 * B * T * T * text.hidden_size * text.num_hidden_layers
    again = 2 * text.hidden_size * text.vocab_size * bench.count_answer_tokens([batch])
    found = gpu_table.flops_of(model, way, [batch]) - attention
    assert found == pytest.approx(counter.get_total_flops() - again, rel=0.03)


@pytest.mark.slow
def test_one_command_fills_the_table(tmp_path):
    """Every row by a process of its own, with transformers beside; no row fails."""
    out = tmp_path / "gpu.md"
    command = ["bash", f"{ROOT}/runs/gpu.sh", "--sizes", "toy", "--samples", "4", "--repeats", "1",
               "--new_tokens", "4", "--answers", "1", "--no-compile", "--out", str(out)]
    python = os.path.dirname(sys.executable)
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PATH": f"{python}:{os.environ['PATH']}"}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    assert done.returncode == 0, done.stderr[-2000:]
    head, _, _, _, *rows = out.read_text().splitlines()
    assert f"torch {torch.__version__}" in head and "gpu_table.py" in head
    assert [row.split("|")[1].strip() for row in rows] == [
        "pictures", "train toy full", "train toy lora", "train toy frozen", "answer toy 1"]
    assert not [row for row in rows if "failed" in row or "no time" in row], rows
    assert rows[1].split("|")[6].strip() == "flash" and "transformers' loop" in rows[1]
    assert "transformers' generate" in rows[4] and "pictures/s" in rows[0]


def test_a_row_that_fails_or_has_no_time_says_so():
    """The others still come."""
    config = gpu_table.Config()
    bad = gpu_table.line_of({"job": "train", "size": "none", "way": "full"}, config, 60)
    assert bad.startswith("| train none full | failed: KeyError")
    assert "no time was left" in gpu_table.line_of({"job": "pictures"}, config, 0)
