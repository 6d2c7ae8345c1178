"""Recipe small, as far as it goes without a GPU: its plan, and tiny models of its two families."""
import re
import subprocess

import torch
from conftest import ROOT, lines, save_parts, tiny_llm, tiny_siglip
from test_families import FAMILIES
from transformers import AutoModel, Qwen3Config, SiglipVisionConfig

import sample
import train
from parts.checkpoints import load_settings

SCRIPT = f"{ROOT}/runs/small.sh"


def printed(**environment):
    done = subprocess.run(["bash", SCRIPT, "--estimate"], stdout=-1, text=True, check=True,
                          env={"PATH": "/usr/bin:/bin", **environment})
    return done.stdout


def test_the_plan_says_hours_money_and_memory_first_and_scales_with_the_card():
    """Whoever rents a GPU reads it before anything is downloaded; it says that it is predicted."""
    said = printed()
    assert "stage 1: 558128" in said and "stage 2: 665298" in said and "predicted, not" in said
    hours = [int(n) for n in re.search(r"measured: (\d+) to (\d+) hours", said).groups()]
    halved = printed(TFLOPS="330", PRICE="2")
    faster = [int(n) for n in re.search(r"measured: (\d+) to (\d+) hours", halved).groups()]
    assert hours == [18, 36] and faster == [9, 18] and "18 to 36 dollars" in halved


def test_the_shapes_that_the_plan_counts_are_those_of_the_two_models():
    """Weights of a layer of SigLIP base, and of Qwen3-0.6B's layers, counted on the meta device."""
    script = open(SCRIPT).read()
    with torch.device("meta"):
        # as google/siglip2-base-patch16-512 and Qwen/Qwen3-0.6B have them
        g = AutoModel.from_config(SiglipVisionConfig(
            hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
            image_size=512, patch_size=16))
        f_phi = AutoModel.from_config(Qwen3Config(
            vocab_size=151_936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28,
            num_attention_heads=16, num_key_value_heads=8, head_dim=128))
    layer = sum(p.numel() for name, p in g.named_parameters() if ".layers.3." in name)
    layers = sum(p.numel() for name, p in f_phi.named_parameters() if "layers." in name)
    for found, pattern in ((layer, r"g = 11 \* \(([\d.e]+)"), (layers, r"F_PHI, HEAD = ([\d.e]+)")):
        assert abs(found / float(re.search(pattern, script)[1]) - 1) < 0.01
    assert (512 // 16) ** 2 == int(re.search(r"N, TEXT, ANSWERS = (\d+)", script)[1])


def test_tiny_models_of_its_families_train_under_it_and_answer(chats, tmp_path, capsys):
    """Both stages by the script's flags, begun by --resume; Qwen3's template, two layers of W."""
    kind, tokenizer, _, more = FAMILIES["qwen3"]
    tokenizer = tokenizer()
    llm = tiny_llm(kind, vocab_size=len(tokenizer), **more)
    llm.generation_config.eos_token_id = llm.config.eos_token_id = tokenizer.eos_token_id
    save_parts(tmp_path, llm, tokenizer, tiny_siglip())
    one, two = tmp_path / "stage1", tmp_path / "small"
    rest = ["--recipe", "small", "--data", chats / "chat.json", "--images", chats / "images",
            "--resume", "--max_steps", 2, "--global_batch_size", 8, "--workers", 0,
            "--max_length", 512, "--micro_batch_tokens", 4096, "--skip_bad"]
    parts = ["--vision", tmp_path / "clip", "--llm", tmp_path / "llm"]
    for stage in (["--stage", 1, "--out", one, *parts],
                  ["--stage", 2, "--out", two, "--init", one]):
        assert train.main([str(word) for word in [*rest, *stage]]) == 0
        assert "small" in capsys.readouterr().out
    assert [record["step"] for record in lines(two / "log.jsonl")] == [0, 1]
    config, meta = load_settings(str(two))
    assert config.vision_config.model_type.startswith("siglip")
    assert config.text_config.model_type == "qwen3" and meta["template"] == "qwen_3"
    picture = next((chats / "images").iterdir())
    assert not sample.main(["--model", str(two), "--image", str(picture), "--question", "What?",
                            "--max_new_tokens", "3"])
