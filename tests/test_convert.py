"""Other people's checkpoints: made-up, tiny folders of `liuhaotian/llava-*` to ours and back.

The original's names are written out here a second time, and what a converted folder computes is
compared with the parts, put together by hand: CLIP's hidden_states[-2] without CLS, W, f_phi.
"""
import copy
import json
import os
import random
import resource
import shutil

import pytest
import torch
from conftest import FORKS, byte_tokenizer, refused, tiny_clip, tiny_llava, tiny_llm
from safetensors.torch import load_file, save_file
from test_checkpoints import see, text_tokenizer, vicuna_folder
from tokenizers import Tokenizer
from torch import nn
from transformers import (
    AutoModelForImageTextToText,
    AutoTokenizer,
    CLIPVisionConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from extras import convert
from model import LLaVA
from parts.checkpoints import load_settings
from parts.templates import TEMPLATES, chat_template
from parts.towers import CLIPTower
from parts.views import view_from

PINPOINTS = [[28, 56], [56, 28], [56, 56]]
INV_FREQ = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)}
MODEL_TYPE = {"llama": "llava_llama", "mistral": "llava_mistral", "qwen2": "llava_qwen"}
BY_KIND = {
    "v1": {"model_type": "llava"},
    "1.5": {"mm_projector_type": "mlp2x_gelu", "image_aspect_ratio": "pad"},
    "1.6": {"mm_projector_type": "mlp2x_gelu", "image_aspect_ratio": "anyres",
            "image_grid_pinpoints": PINPOINTS, "mm_patch_merge_type": "spatial_unpad",
            "unfreeze_mm_vision_tower": True, "mm_vision_tower_lr": 2e-6}}


def W_of(kind):
    """v1's linear projector, or the two layers of 1.5 and 1.6, wide enough to matter."""
    torch.manual_seed(5)
    W = nn.Linear(32, 48)
    if kind != "v1":
        W = nn.Sequential(W, nn.GELU(), nn.Linear(48, 48))
    for p in W.parameters():
        nn.init.normal_(p, std=0.4)
    return W


def save_files(state, folder, end="bin", files=1, stem=None):
    """A state in `files` files, stem-00001-of-0000n.end, or in one."""
    names = sorted(state)
    write = save_file if end == "safetensors" else torch.save
    stem = stem or {"safetensors": "model", "bin": "pytorch_model"}[end]
    for i in range(files):
        name = f"{stem}.{end}" if files == 1 else f"{stem}-{i + 1:05}-of-{files:05}.{end}"
        write({k: state[k].detach().clone() for k in names[i::files]}, folder / name)


class Parts:
    """The parts of a made-up LLaVA, and folders that hold them: CLIP, and the original's layout.

    store   the ending of its weight files, and how many they are
    """

    def __init__(self, folder, kind="1.5", family="llama", rows=259, dtype=torch.float32,
                 store=("bin", 1), added=()):
        tied = family == "qwen2"
        self.folder, self.clip_dir, self.dir = folder, folder / "clip", folder / "original"
        self.llm = tiny_llm(family, tied, vocab_size=rows)
        self.clip, self.W, self.newline = tiny_clip(), W_of(kind), torch.linspace(-2, 2, 48)
        self.clip.save_pretrained(self.clip_dir)
        self.dir.mkdir()
        self.state = {**self.llm.state_dict(), **self.projector("model.mm_projector.")}
        if tied:
            del self.state["lm_head.weight"]
        if kind == "1.6":                                # its own CLIP, which was trained, too
            self.clip = tiny_clip(seed=7)
            prefix = "model.vision_tower.vision_tower.vision_model."
            self.state |= {prefix + k: v for k, v in self.clip.state_dict().items()}
            self.state["model.image_newline"] = self.newline
        self.state = {k: v.to(dtype) for k, v in self.state.items()}
        save_files(self.state | INV_FREQ, self.dir, *store)
        config = json.loads(self.llm.config.to_json_string(use_diff=False))
        del config["rope_parameters"], config["dtype"]
        self.config = config | {
            "model_type": MODEL_TYPE[family], "architectures": ["LlavaLlamaForCausalLM"],
            "torch_dtype": str(dtype)[6:], "rope_theta": 5e4, "rope_scaling": None,
            "mm_vision_tower": str(self.clip_dir), "mm_hidden_size": 32,
            "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch",
            "mm_use_im_start_end": False, "mm_use_im_patch_token": False, "use_mm_proj": True,
            "max_length": 4096, **BY_KIND[kind]}
        self.configure()
        text_tokenizer(*added).save_pretrained(self.dir)
        self.llm.model.config.rope_parameters["rope_theta"] = 5e4
        self.llm.model.rotary_emb = type(self.llm.model.rotary_emb)(self.llm.config)

    def projector(self, prefix):
        return {prefix + name: value.detach() for name, value in self.W.state_dict().items()}

    def configure(self, **more):
        (self.dir / "config.json").write_text(json.dumps(self.config | more))

    def base(self):
        """The language model's own folder, as --llm takes it."""
        self.llm.save_pretrained(self.folder / "llm")
        text_tokenizer().save_pretrained(self.folder / "llm")
        return self.folder / "llm"

    def stage1(self, prefix="model.mm_projector."):
        """What the original's stage 1 leaves."""
        folder = self.folder / "stage1"
        folder.mkdir()
        torch.save(self.projector(prefix), folder / "mm_projector.bin")
        return folder

    def H_v(self, X_v):
        return self.W(self.clip(X_v, output_hidden_states=True).hidden_states[-2][:, 1:])

    def logits(self, ids, H_v):
        """Of the language model with H_v (n, D) from position 5 on."""
        H = self.llm.get_input_embeddings()(ids.clamp(max=2**8)).clone()
        H[0, 5:5 + len(H_v)] = H_v
        return self.llm(inputs_embeds=H).logits[0]


def converted(out, *argv):
    convert.main([*map(str, argv), "--out", str(out)])
    return out


def picture_and_ids(n, squares=1):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 250, (1, n + 30), generator=generator)
    ids[0, 5:5 + n] = 259
    return torch.randn(squares, 3, 28, 28, generator=generator), ids


@torch.no_grad()
def assert_computes(out, want, ids, X_v, size=None):
    """Both this project and transformers compute `want` (T, V) from the folder."""
    ours = LLaVA.from_pretrained(out)
    index = view_from(ours.meta, ours.g.config).index(*(size or (28, 28)))
    got = ours.f_phi(inputs_embeds=ours.splice(ids, X_v, index)).logits[0, :, :259]
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    theirs, info = AutoModelForImageTextToText.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()), f"transformers finds another model in the folder: {info}"
    more = {"image_sizes": torch.tensor([size[::-1]])} if size else {}
    pixels = X_v[None] if size else X_v
    got = theirs.eval()(input_ids=ids, pixel_values=pixels, **more).logits[0, :, :259]
    torch.testing.assert_close(got, want, atol=1e-4, rtol=1e-4)
    return ours


@torch.no_grad()
def assert_computes_what(ours, out):
    """Both this project and transformers compute from the folder what a model of ours does."""
    X_v, ids = picture_and_ids(4)
    hidden = ours.splice(ids, X_v, torch.arange(4))
    want = ours.f_phi(inputs_embeds=hidden).logits[0, :, :259]
    return assert_computes(out, want, ids, X_v)


def assert_equal_states(a, b):
    assert a.keys() == b.keys(), f"keys that only one has: {sorted(a.keys() ^ b.keys())[:5]}"
    for name, value in a.items():
        same = value.dtype == b[name].dtype and torch.equal(value, b[name])
        assert same, f"{name} is not bit-equal"


def state_of(folder):
    state = {}
    for path in sorted(folder.glob("*.safetensors")):
        state |= load_file(path)
    return state


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def meta_of(folder):
    return config_of(folder)["minllava"]


def assert_refused(out, argv, *words):
    with refused(*words):
        converted(out, *argv)
    assert not out.exists(), "something was written before the folder was understood"


# -----------------------------------------------------------------------------
# Whole models


def assert_there_and_back(parts, out):
    """Original -> ours -> original, and ours -> original -> ours: names, formats, bits."""
    back = converted(parts.folder / "back", "--model", out, "--to_original")
    assert_equal_states(state_of(back), parts.state)
    was, now = parts.config, config_of(back)
    differ = {k for k in was if k not in now or was[k] != now[k]}
    # "llava" is HF's by now, the architecture follows, and training's own settings go
    expected = {"mm_vision_tower_lr", "max_length", "model_type", "architectures"}
    assert differ <= expected, {k: (was[k], now.get(k)) for k in differ - expected}
    assert now["model_type"] == MODEL_TYPE[parts.llm.config.model_type]
    again = converted(parts.folder / "again", "--model", back)
    assert_equal_states(state_of(again), state_of(out))
    configs = [config_of(out), config_of(again)]
    for config in configs:
        del config["minllava"]["init"], config["minllava"]["llm"]
    assert configs[0] == configs[1]


@pytest.mark.parametrize("kind, family, rows, store", [
    ("v1", "llama", 259, ("safetensors", 3)), ("1.5", "mistral", 259, ("bin", 2)),
    ("1.5", "qwen2", 290, ("bin", 1))])
def test_v1_and_1_5_compute_what_their_parts_compute(tmp_path, kind, family, rows, store):
    """Names, W with bias, hidden_states[-2] without CLS, from any kind of file (Diss. Sec. 4.3)."""
    parts = Parts(tmp_path, kind, family, rows, store=store)
    out = converted(tmp_path / "out", "--model", parts.dir)
    X_v, ids = picture_and_ids(4)
    with torch.no_grad():
        want = parts.logits(ids, parts.H_v(X_v)[0])[:, :259]
    model = assert_computes(out, want, ids, X_v)
    weight = model.f_phi.get_input_embeddings().weight   # 259 rows grow to a multiple of 64
    torch.testing.assert_close(weight[rows:], weight[:rows].mean(0).expand(len(weight) - rows, 48))
    template = "mistral_instruct" if family == "mistral" else "vicuna_v1"
    aspect = "crop" if kind == "v1" else "pad"
    assert (meta_of(out)["aspect"], meta_of(out)["template"]) == (aspect, template)
    want = chat_template(TEMPLATES[template], model.tokenizer)
    assert model.tokenizer.chat_template == want
    assert model.eos_ids == {2} and model.meta["stage"] == 2
    assert_there_and_back(parts, out)


def test_1_6_computes_what_its_parts_compute(tmp_path):
    """Diss. Sec. 4.7: its own CLIP, not --vision's; the global picture, then rows and newlines."""
    parts = Parts(tmp_path, "1.6", store=("safetensors", 2))
    parts.configure(image_grid_pinpoints=str(PINPOINTS))         # or the list itself, below
    (parts.dir / "tokenizer.model").write_text("what the original's code reads")
    out = converted(tmp_path / "out", "--model", parts.dir)
    X_v, ids = picture_and_ids(24, squares=5)
    with torch.no_grad():
        H_v = parts.H_v(X_v)                             # (5, 4, D)
        tokens = list(H_v[0])
        for y in range(4):
            tokens += [H_v[1 + 2 * (y // 2) + x // 2][2 * (y % 2) + x % 2] for x in range(4)]
            tokens.append(parts.newline)
        want = parts.logits(ids, torch.stack(tokens))
    assert_computes(out, want, ids, X_v, size=(56, 56))
    assert meta_of(out)["aspect"] == "anyres"
    assert meta_of(out)["tiling"]["pinpoints"] == PINPOINTS
    assert config_of(out)["image_grid_pinpoints"] == [[h, w] for w, h in PINPOINTS]
    assert_there_and_back(parts, out)
    assert (tmp_path / "back" / "tokenizer.model").is_file()


def test_a_model_in_fp16_goes_there_and_back(tmp_path):
    """Bit for bit; the rows that are added and the tower are in the model's own format."""
    parts = Parts(tmp_path, "1.6", dtype=torch.float16)
    assert_there_and_back(parts, converted(tmp_path / "out", "--model", parts.dir))


@pytest.mark.parametrize("added, template", [
    ((), "vicuna_v1"), (("[PAD]", "<im_patch>"), "llava_v0"),
    (("<|im_start|>", "<|im_end|>"), "chatml_direct")])
def test_the_template_is_read_from_the_contents_not_the_name(tmp_path, added, template):
    """The released code looks for "v1", "mistral" or "34b" in the path."""
    name = Parts(tmp_path, added=added).dir.rename(tmp_path / "llava-v1.6-34b-llama-2")
    out = converted(tmp_path / "out", "--model", name)
    assert meta_of(out)["template"] == meta_of(out)["chat"] == template
    if not added:
        asked = converted(tmp_path / "asked", "--model", name, "--template", "llava_v0")
        assert meta_of(asked)["template"] == "llava_v0"
        argv = ["--model", name, "--template", "chatml_direct"]
        assert_refused(tmp_path / "unfit", argv, "<|im_start|>")


def test_a_sentencepiece_vocabulary_retains_its_blanks(tmp_path):
    """Beside a config.json that says "llava", transformers 5 would drop them."""
    parts = Parts(tmp_path, rows=384)
    for path in parts.dir.glob("tokenizer*"):
        path.unlink()
    assert_refused(tmp_path / "out", ["--model", parts.dir], parts.dir, "tokenizer_config.json")
    (tmp_path / "vicuna").mkdir()
    _, vicuna, pieces = vicuna_folder(tmp_path / "vicuna", False)
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(tmp_path / "vicuna" / name, parts.dir)
    parts.configure(model_type="llava")
    tokenizer = AutoTokenizer.from_pretrained(converted(tmp_path / "out", "--model", parts.dir))
    for text in ("What is this?", "\nWhat is", "a  b", "ASSISTANT: 3"):
        assert tokenizer(text)["input_ids"] == [1] + pieces.encode(text), f"{text!r}"
    assert (tmp_path / "out" / "tokenizer.model").is_file()


# -----------------------------------------------------------------------------
# Round trips


def test_a_model_of_ours_goes_to_the_original_and_back(tmp_path):
    """Linear W; CLIP is left out because it is as it was; template and stage remain."""
    parts = Parts(tmp_path, "v1")
    model = LLaVA.from_parts(str(parts.clip_dir), str(parts.base()))
    ours = {"template": "plain", "chat": "llava_v0", "stage": 1, "recipe": "llava-7b"}
    model.meta |= ours
    model.save_pretrained(tmp_path / "ours")
    back = converted(tmp_path / "back", "--model", tmp_path / "ours", "--to_original")
    assert state_of(back).keys() == parts.state.keys()
    assert torch.equal(state_of(back)["model.mm_projector.weight"], model.W.weight)
    assert len(state_of(back)["lm_head.weight"]) == 259 == config_of(back)["vocab_size"]
    again = converted(tmp_path / "again", "--model", back)
    assert_equal_states(state_of(again), state_of(tmp_path / "ours"))
    assert meta_of(again) | ours == meta_of(again)


def test_a_llava_hf_folder_goes_to_the_original(tmp_path):
    """64 spare rows, and no word of ours: --vision and --llm say the rest. The original reads a
    canvas as (width, height), transformers as (height, width): wide stays wide."""
    parts = Parts(tmp_path, "1.6")
    parts.configure(image_grid_pinpoints=[[28, 84], [56, 28]])
    out = converted(tmp_path / "out", "--model", parts.dir)
    config = config_of(out)
    del config["minllava"]
    (out / "config.json").write_text(json.dumps(config))

    def canvases(folder):
        config, meta = load_settings(folder)
        tiling = view_from(meta, config.vision_config).tiling
        sizes = [(10, 40), (90, 30), (30, 90), (200, 20), (64, 64)]
        return [tiling.plan(*size).canvas for size in sizes]
    theirs = canvases(out)
    assert set(theirs) == {(28, 84), (56, 28)}
    argv = ["--model", out, "--to_original"]
    assert_refused(tmp_path / "back", argv, "--vision", "--llm")
    argv += ["--vision", parts.clip_dir, "--llm", parts.base()]
    back = converted(tmp_path / "back", *argv)
    assert_equal_states(state_of(back), parts.state)
    assert config_of(back)["image_aspect_ratio"] == "anyres"
    assert config_of(back)["unfreeze_mm_vision_tower"]
    assert config_of(back)["image_grid_pinpoints"] == [[28, 84], [56, 28]]
    again = converted(tmp_path / "again", "--model", back)
    assert canvases(again) == theirs and meta_of(again)["aspect"] == "anyres_hf"


# -----------------------------------------------------------------------------
# Parts of a model: adapters, projectors, deltas


def lora_folder(parts, r=4, alpha=8):
    """What the original's training with LoRA leaves; the adapter as {layer: (A, B)}."""
    generator, adapter, state = torch.Generator().manual_seed(1), {}, {}
    for name, module in parts.llm.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            A = torch.randn(r, module.in_features, generator=generator)
            B = torch.randn(module.out_features, r, generator=generator)
            adapter[name] = A, B
            prefix = f"base_model.model.{name}"
            state |= {f"{prefix}.lora_A.weight": A, f"{prefix}.lora_B.weight": B}
    folder = parts.folder / "lora"
    folder.mkdir()
    save_files(state, folder, stem="adapter_model")
    rest = parts.projector("base_model.model.model.mm_projector.")
    torch.save(rest, folder / "non_lora_trainables.bin")
    (folder / "config.json").write_text(json.dumps(parts.config))
    settings = {"peft_type": "LORA", "r": r, "lora_alpha": alpha, "bias": "none",
                "modules_to_save": None, "lora_dropout": 0.05,
                "base_model_name_or_path": "lmsys/vicuna-7b-v1.5"}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
    return folder, adapter


def test_a_lora_folder_is_merged_onto_its_base(tmp_path):
    """W x + alpha / r B A x: the folder computes what base and adapter compute side by side."""
    parts = Parts(tmp_path)
    folder, adapter = lora_folder(parts)
    out = converted(tmp_path / "out", "--model", folder, "--llm", parts.base())
    for name, (A, B) in adapter.items():
        parts.llm.get_submodule(name).register_forward_hook(
            lambda _, x, y, A=A, B=B: y + 2 * (x[0] @ A.T @ B.T))
    X_v, ids = picture_and_ids(4)
    with torch.no_grad():
        want = parts.logits(ids, parts.H_v(X_v)[0])
    assert_computes(out, want, ids, X_v)
    assert (meta_of(out)["llm"], meta_of(out)["init"]) == (str(parts.base()), str(folder))


@pytest.mark.parametrize("kind, prefix", [
    ("v1", "model.mm_projector."), ("1.5", "base_model.model.model.mm_projector.")])
def test_a_projector_alone_becomes_a_model_with_its_parts(tmp_path, kind, prefix):
    """The original's stage 1 leaves mm_projector.bin; stage 2 may go on from what we make of it."""
    parts = Parts(tmp_path, kind)
    argv = ["--model", parts.stage1(prefix), "--llm", parts.base()]
    assert_refused(tmp_path / "out", argv, "--vision")   # without config.json nothing names CLIP
    out = converted(tmp_path / "out", *argv, "--vision", parts.clip_dir)
    model = LLaVA.from_pretrained(out)
    assert_equal_states(dict(model.W.state_dict()), dict(parts.W.state_dict()))
    want = {"stage": 1, "template": "plain", "chat": "vicuna_v1"}
    assert {key: model.meta[key] for key in want} == want


def test_a_v0_delta_is_added_to_its_llama(tmp_path):
    """delta + LLaMA in fp16; projector and rows of four added tokens are in the delta itself."""
    added = ("[PAD]", "<im_patch>", "<im_start>", "<im_end>")
    parts = Parts(tmp_path, "v1", rows=263, dtype=torch.float16, added=added)
    parts.configure(mm_use_im_start_end=True)
    (llama := tmp_path / "llama").mkdir()
    base = {k: v.half() for k, v in tiny_llm(seed=3, vocab_size=259).state_dict().items()}
    save_files(base | INV_FREQ, llama, files=3)
    out = converted(tmp_path / "out", "--model", parts.dir, "--delta", "--llm", llama)
    want = dict(parts.state)
    for name, value in base.items():
        n = len(value)
        want[name] = torch.cat([want[name][:n] + value, want[name][n:]])
    assert (meta_of(out)["template"], meta_of(out)["im_start_end"]) == ("llava_v0", True)
    back = converted(tmp_path / "back", "--model", out, "--to_original")
    assert_equal_states(state_of(back), want)
    assert config_of(back)["mm_use_im_start_end"] is True


def peak(argv, log):
    """Run convert in this process; write the peak of its memory, less that before, in MB."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    convert.main(argv)
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    log.write_text(json.dumps((after - before) / 1024))


@pytest.mark.slow
def test_memory_peaks_at_about_one_shard(tmp_path):
    """A laptop converts a 13B model, too. Here six files of 40 MB, in and out."""
    parts = Parts(tmp_path, "v1")
    sizes = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 30,
             "head_dim": 128}
    with torch.device("meta"):
        llm = LlamaForCausalLM(LlamaConfig(
            vocab_size=259, num_attention_heads=4, num_key_value_heads=2, **sizes))
    state = {name: torch.ones(value.shape) for name, value in llm.state_dict().items()}
    state |= {f"model.mm_projector.{name}": value
              for name, value in nn.Linear(32, 512).state_dict().items()}
    (parts.dir / "pytorch_model.bin").unlink()
    save_files(state, parts.dir, files=6)
    parts.configure(**sizes)
    argv = ["--model", str(parts.dir), "--out", str(tmp_path / "out"), "--shard", "40MB"]
    process = FORKS.Process(target=peak, args=(argv, tmp_path / "log"))
    process.start()
    process.join(120)
    used = json.loads((tmp_path / "log").read_text())
    size = sum(value.nbytes for value in state.values()) / 2 ** 20
    assert size > 230 and used < 100, f"{used:.0f} MB: the model of {size:.0f} MB is in memory"
    assert len(list((tmp_path / "out").glob("*.safetensors"))) >= 6
    LLaVA.from_pretrained(tmp_path / "out")


# -----------------------------------------------------------------------------
# A linear W for engines that have none


def test_a_linear_W_as_two_layers_computes_the_same(tmp_path):
    """Eq. (1) as gelu(z) - gelu(-z) = z: what vLLM and llama.cpp know, here and in transformers."""
    clip = CLIPTower(CLIPVisionConfig(
        hidden_size=22, intermediate_size=64, num_hidden_layers=3, num_attention_heads=2,
        image_size=28, patch_size=14))
    ours = see(LLaVA(clip, tiny_llm(tied=True), byte_tokenizer()), "crop").eval()
    nn.init.normal_(ours.W.weight)
    ours.save_pretrained(tmp_path / "ours")
    out = converted(tmp_path / "out", "--as_mlp", "--model", tmp_path / "ours")
    assert_computes_what(ours, out)
    names = {path.name for path in (tmp_path / "ours").iterdir()}
    assert {path.name for path in out.iterdir()} == names
    assert config_of(out) == config_of(tmp_path / "ours") | {"projector_hidden_act": "gelu"}

    see(ours, "anyres").save_pretrained(tmp_path / "tiles", torch.bfloat16)
    out = converted(tmp_path / "wide", "--as_mlp", "--model", tmp_path / "tiles")
    states = [{name: value for name, value in state_of(folder).items()
               if not name.startswith("multi_modal_projector")}
              for folder in (tmp_path / "tiles", out)]
    assert_equal_states(*states)
    assert {value.dtype for value in state_of(out).values()} == {torch.bfloat16}


def test_a_linear_W_that_does_not_fit_into_two_layers_is_refused(tmp_path):
    """z and -z are 2 D_v numbers, and llava-hf's hidden layer has D."""
    see(tiny_llava(), "crop").save_pretrained(tmp_path / "narrow")
    see(tiny_llava(projector="mlp2x_gelu"), "crop").save_pretrained(tmp_path / "mlp")
    for name, words in (("narrow", "32 -> 48"), ("mlp", "projector_hidden_act"),
                        ("gone", "neither a folder nor a hub id")):
        argv = ["--as_mlp", "--model", tmp_path / name]
        assert_refused(tmp_path / "out", argv, words)


@pytest.mark.parametrize("family, times", [("llama", 4), ("qwen2", 3)])
def test_wider_heads_compute_the_same(tmp_path, family, times):
    """Zeros between a head's numbers: the same angles of the rotary embedding, the same scores."""
    ours = see(tiny_llava(family, tied=True), "crop")
    if family == "qwen2":                                # it has biases, which start as zeros
        for layer in ours.f_phi.model.layers:
            nn.init.normal_(layer.self_attn.q_proj.bias)
            nn.init.normal_(layer.self_attn.v_proj.bias)
    ours.save_pretrained(tmp_path / "ours")
    out = converted(tmp_path / "out", "--head_dim", 12 * times, "--model", tmp_path / "ours",
                    "--shard", "60KB")
    assert len(list(out.glob("model-*.safetensors"))) > 2
    wide = assert_computes_what(ours, out)
    assert wide.f_phi.model.layers[1].self_attn.k_proj.weight.shape == (2 * 12 * times, 48)
    for head_dim in (0, 6, 18):
        argv = ["--head_dim", head_dim, "--model", tmp_path / "ours"]
        assert_refused(tmp_path / "refused", argv, "12 wide")


# -----------------------------------------------------------------------------
# What is refused

UP, BIAS = "model.layers.1.mlp.up_proj.weight", "model.mm_projector.0.bias"


def test_a_weight_too_many_too_few_or_of_another_shape_is_refused(tmp_path):
    """The first examples are named as they are in the file, and nothing is written."""
    parts, out = Parts(tmp_path), tmp_path / "out"
    argv = ["--model", parts.dir]
    for change, *words in (
            ({UP: None}, "1 weights are missing", UP),
            ({"xmodel.norm.weight": torch.ones(48)}, "not of this model", "xmodel.norm.weight"),
            ({BIAS: torch.ones(47)}, f"{BIAS} (47,) instead of (48,)", "--vision"),
            ({"epoch": 3}, "pytorch_model.bin", "other things")):
        state = {k: v for k, v in (parts.state | change).items() if v is not None}
        torch.save(state, parts.dir / "pytorch_model.bin")
        assert_refused(out, argv, parts.dir, *words)
    # a sum in fp16 can overflow, a download can be torn
    torch.save(parts.state | {BIAS: torch.full((48,), torch.inf)}, parts.dir / "pytorch_model.bin")
    with pytest.raises(ValueError, match="NaN or infinite numbers in 1 of .*linear_1.bias"):
        converted(out, *argv)
    assert os.listdir(out) == []


def test_a_setting_that_would_be_another_model_is_refused(tmp_path):
    """What this code does not compute is not converted as if it did; no value of another type."""
    parts = Parts(tmp_path, "1.6")
    for change, *words in (
            ({"model_type": "llava_mpt"}, "model_type", "llava_mpt", "llava_llama"),
            ({"image_aspect_ratio": "keep"}, "image_aspect_ratio", "keep", "pad"),
            ({"mm_vision_select_feature": "cls_patch"}, "mm_vision_select_feature", "cls_patch"),
            ({"mm_vision_select_layer": "-2"}, "mm_vision_select_layer", "'-2'", "whole number"),
            ({"mm_vision_select_layer": 5}, "vision_feature_layer", "5"),
            ({"image_grid_pinpoints": [[30, 56]]}, "pinpoints", "multiples of 28"),
            ({"image_grid_pinpoints": None}, "pinpoints", "multiples of 28"),
            ({"mm_patch_merge_type": "flat"}, "mm_patch_merge_type", "flat", "spatial_unpad"),
            ({"mm_vision_tower": "nobody/clip"}, "--vision", "nobody/clip"),
            ({"mm_vision_tower": None}, "--vision"), ({"text_config": {}}, "ours already"),
            ({"hidden_size": "48"}, "hidden_size", "'48'")):
        parts.configure(**change)
        assert_refused(tmp_path / "out", ["--model", parts.dir], *words)


def test_parts_without_their_base_or_on_another_are_refused(tmp_path):
    """An adapter, a projector, a delta: what --model is, and what --llm should be. Half of an
    adapter merged would be a model that nobody trained."""
    parts, out = Parts(tmp_path, "v1"), tmp_path / "out"
    lora, _ = lora_folder(parts)
    base, stage1 = parts.base(), parts.stage1()
    settings = lora / "adapter_config.json"
    plain = settings.read_text()
    for key, value, word in (("use_dora", True, "use_dora"), ("lora_alpha", "8", "lora_alpha"),
                             ("r", 0, "rank 0"), ("r", -1, "rank -1")):
        settings.write_text(json.dumps(json.loads(plain) | {key: value}))
        assert_refused(out, ["--model", lora, "--llm", base], word)
    settings.write_text(plain)
    narrow = tiny_llm(vocab_size=259)
    config = narrow.config.to_dict() | {"hidden_size": 40, "head_dim": 10}
    type(narrow)(type(narrow.config)(**config)).save_pretrained(tmp_path / "narrow")
    narrow = ["--llm", tmp_path / "narrow"]
    for argv, *words in (
            ([lora], lora, "LoRA adapter without its base", "--llm"),
            ([stage1], "projector without its base", "--llm"),
            ([parts.dir, "--delta"], parts.dir, "delta without its base", "--llm"),
            ([parts.dir, "--llm", base], "whole model", "--delta"),
            ([lora, "--llm", parts.dir], "model.mm_projector.bias", "another file"),
            ([lora, *narrow], "(48, 4)", "(40, 4)", "the language model"),
            ([stage1, *narrow, "--vision", parts.clip_dir], "(48,) instead of (40,)", "--llm")):
        assert_refused(out, ["--model", *argv], *words)


def test_folders_that_are_no_llava_are_refused(tmp_path):
    """Empty, a language model, a CLIP, no folder, two downloads in one, one that broke off."""
    parts, out = Parts(tmp_path, "v1"), tmp_path / "out"
    (tmp_path / "empty").mkdir()
    clip = ["--vision", parts.clip_dir]
    ours = converted(tmp_path / "ours", "--model", parts.dir)
    for argv, *words in (
            ([tmp_path / "empty"], tmp_path / "empty", "no LLaVA folder"),
            ([tmp_path / "nowhere"], "--model", tmp_path / "nowhere"),
            ([parts.base(), *clip], "missing", "model.mm_projector.bias"),
            ([parts.clip_dir, *clip], "model_type", "clip"),
            ([parts.dir, "--to_original"], "llava-hf"), ([ours, *clip], "ours already")):
        assert_refused(out, ["--model", *argv], *words)
    second = parts.dir / "pytorch_model-00003-of-00003.bin"
    torch.save({"model.norm.weight": torch.ones(48)}, second)
    assert_refused(out, ["--model", parts.dir], "another file", "model.norm.weight")
    second.unlink()
    os.truncate(parts.dir / "pytorch_model.bin", 9000)
    assert_refused(out, ["--model", parts.dir], "pytorch_model.bin", "not a whole file")


def test_the_way_back_is_as_strict(tmp_path):
    """A second layer that is none, a key too many, a tokenizer of another model."""
    parts, back = Parts(tmp_path, "v1"), tmp_path / "back"
    ours = converted(tmp_path / "ours", "--model", parts.dir)
    argv = ["--model", ours, "--to_original"]
    other = text_tokenizer("[PAD]")
    words = other.backend_tokenizer.to_str().replace('"!"', '"\\u2603"')
    other._tokenizer = Tokenizer.from_str(words)
    other.save_pretrained(tmp_path / "other")
    assert_refused(back, [*argv, "--llm", tmp_path / "other"], "--llm", "tokenizer is not that of")
    for name, word in (("multi_modal_projector.linear_2.bias", "linear_2 is not the identity"),
                       ("model.image_newline", "not of this model")):
        state = state_of(ours) | {name: torch.ones(48)}
        save_file(state, ours / "model.safetensors", {"format": "pt"})
        assert_refused(back, argv, ours, word)


def test_an_output_folder_that_exists_is_not_touched(tmp_path):
    """What lies there may have taken weeks."""
    with pytest.raises(ValueError, match="exists; name a new folder"):
        converted(tmp_path, "--model", tmp_path)
    assert os.listdir(tmp_path) == []


def mutated(value, rng):
    """A value of JSON in which one part has another type."""
    if not value or not isinstance(value, dict | list) or rng.random() < 0.1:
        return rng.choice([None, -1, 0, 1.5, "x", [], {"a": 1}, True])
    value = copy.copy(value)
    key = rng.choice(list(value)) if isinstance(value, dict) else rng.randrange(len(value))
    value[key] = mutated(value[key], rng)
    return value


@pytest.mark.slow
@pytest.mark.parametrize("entry", ["load", "to ours", "to original", "adapter"])
def test_200_mutated_settings_load_or_end_in_one_line(tmp_path, entry):
    """Whatever a person's file holds, there is no traceback."""
    parts, rng, out = Parts(tmp_path), random.Random(entry), tmp_path / "out"
    folder, argv = parts.dir, ["--model", parts.dir]
    if entry == "adapter":
        folder, _ = lora_folder(parts)
        argv = ["--model", folder, "--llm", parts.base()]
    elif entry != "to ours":
        folder = converted(tmp_path / "ours", *argv)
        argv = ["--model", folder, "--to_original"]
    files = [path for path in sorted(folder.glob("*.json")) if path.name != "tokenizer.json"]
    for _ in range(200):
        path = rng.choice(files)
        text = path.read_text()
        path.write_text(json.dumps(mutated(json.loads(text), rng)))
        try:
            LLaVA.from_pretrained(folder) if entry == "load" else converted(out, *argv)
        except (ValueError, OSError) as error:
            assert str(error) and "\n" not in str(error), f"not one line: {error}"
        path.write_text(text)
        shutil.rmtree(out, ignore_errors=True)
