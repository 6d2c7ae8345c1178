"""Other people's checkpoints: folders in the layout of `liuhaotian/llava-*`, made up and tiny, to ours and back.

The original's names are written out here a second time, and what a converted folder computes is compared with the parts:
CLIP's hidden_states[-2] without CLS, the projector, the language model, put together by hand.
"""
import json
import os
import resource
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import (AddedToken, AutoImageProcessor, AutoTokenizer, LlavaConfig, LlavaForConditionalGeneration,
                          LlavaNextConfig, LlavaNextForConditionalGeneration, PreTrainedTokenizerFast)

import convert
import train
from conftest import FORKS, lines, run_script, tiny_clip, tiny_llm
from checkpoint import hf_keys
from data import TEMPLATES
from model import LLaVA
from records import IMAGE
from test_checkpoint import vicuna_folder

PINPOINTS = [[28, 56], [56, 28], [56, 56]]
INV_FREQ = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)}


# ---------------------------------------------------------------------------------------------------------------------
# Folders as other people write them


def text_tokenizer(*added):
    """A language model's tokenizer without <image>: 259 ids, and those of `added` tokens."""
    alphabet = ["<unk>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    tokenizer.add_tokens([AddedToken(t, special=True, normalized=False) for t in ("<unk>", "<s>", "</s>", *added)])
    return tokenizer


def W_of(kind, D_v=32, D=48):
    """v1's linear projector, or the two layers of 1.5 and 1.6, wide enough to matter."""
    torch.manual_seed(5)
    W = nn.Linear(D_v, D) if kind == "v1" else nn.Sequential(nn.Linear(D_v, D), nn.GELU(), nn.Linear(D, D))
    for p in W.parameters():
        nn.init.normal_(p, std=0.4)
    return W


def save_files(state, folder, stem, end, files=1):
    """A state in `files` files, stem-00001-of-0000n.end and their index, or in one."""
    names, write = sorted(state), save_file if end == "safetensors" else torch.save
    for i in range(files):
        name = f"{stem}.{end}" if files == 1 else f"{stem}-{i + 1:05}-of-{files:05}.{end}"
        write({k: state[k].detach().clone() for k in names[i::files]}, folder / name)


class Parts:
    """The parts of a made-up LLaVA, and the folders that hold them: CLIP, and the original's layout."""

    def __init__(self, folder, kind="1.5", family="llama", rows=259, dtype=torch.float32, end="bin", files=1, added=(), **more):
        self.kind, self.folder, self.clip, self.llm, self.W = kind, folder, tiny_clip(), tiny_llm(
            family, vocab_size=rows, **more), W_of(kind)
        self.clip_dir, self.dir, self.newline = folder / "clip", folder / "original", torch.linspace(-2, 2, 48)
        tiny_clip().save_pretrained(self.clip_dir)
        self.dir.mkdir()
        self.state = {**self.llm.state_dict(), **{f"model.mm_projector.{k}": v for k, v in self.W.state_dict().items()}}
        if more.get("tied"):
            del self.state["lm_head.weight"]
        if kind == "1.6":                                # its own CLIP, which was trained too
            self.clip = tiny_clip(seed=7)
            self.state |= {f"model.vision_tower.vision_tower.vision_model.{k}": v for k, v in self.clip.state_dict().items()}
            self.state["model.image_newline"] = self.newline
        self.state = {k: v.to(dtype) for k, v in self.state.items()}
        stem = "model" if end == "safetensors" else "pytorch_model"
        save_files(self.state | INV_FREQ, self.dir, stem, end, files)
        config = json.loads(self.llm.config.to_json_string(use_diff=False))
        for new in ("rope_parameters", "dtype"):
            del config[new]
        kinds = {"llama": "llava" if kind == "v1" else "llava_llama", "mistral": "llava_mistral", "qwen2": "llava_qwen"}
        self.config = config | {
            "model_type": kinds[family], "architectures": ["LlavaLlamaForCausalLM"], "torch_dtype": str(dtype)[6:],
            "rope_theta": 5e4, "rope_scaling": None, "mm_vision_tower": str(self.clip_dir), "mm_hidden_size": 32,
            "mm_vision_select_layer": -2, "mm_vision_select_feature": "patch", "mm_use_im_start_end": False,
            "mm_use_im_patch_token": False, "use_mm_proj": True, "tune_mm_mlp_adapter": False, "freeze_mm_mlp_adapter": False,
            "max_length": 4096}                          # 1.5 says this too, of generation
        if kind != "v1":
            self.config |= {"mm_projector_type": "mlp2x_gelu", "image_aspect_ratio": "pad"}
        if kind == "1.6":
            self.config |= {"image_aspect_ratio": "anyres", "image_grid_pinpoints": PINPOINTS, "mm_vision_tower_lr": 2e-6,
                            "mm_patch_merge_type": "spatial_unpad", "unfreeze_mm_vision_tower": True,
                            "image_crop_resolution": 28, "tokenizer_model_max_length": 4096}
        if kind == "1.5":                                # a copy that nobody reads: the weights above are whole
            torch.save({"model.mm_projector.0.weight": torch.zeros(48, 32)}, self.dir / "mm_projector.bin")
        self.configure()
        text_tokenizer(*added).save_pretrained(self.dir)
        self.llm.model.config.rope_parameters["rope_theta"] = 5e4
        self.llm.model.rotary_emb = type(self.llm.model.rotary_emb)(self.llm.config)

    def configure(self, **more):
        (self.dir / "config.json").write_text(json.dumps(self.config | more))

    def base(self):
        """The language model's own folder, as --llm takes it."""
        self.llm.save_pretrained(self.folder / "llm")
        text_tokenizer().save_pretrained(self.folder / "llm")
        return self.folder / "llm"

    def features(self, X_v):
        """H_v of X_v (K, 3, 28, 28)"""
        return self.W(self.clip(X_v, output_hidden_states=True).hidden_states[-2][:, 1:])

    def logits(self, ids, H_v):
        """Of the language model with H_v (n, D) from position 5 on."""
        H = self.llm.get_input_embeddings()(ids.clamp(max=2**8)).clone()    # the placeholder has no row here
        H[0, 5:5 + len(H_v)] = H_v
        return self.llm(inputs_embeds=H).logits[0]


def converted(out, *argv):
    convert.main([*map(str, argv), "--out", str(out)])
    return out


def in_transformers(folder, kind=LlavaForConditionalGeneration):
    model, info = kind.from_pretrained(folder, output_loading_info=True, dtype="auto")
    assert not any(info.values()), f"transformers finds another model in the folder: {info}"
    return model.eval()


def picture_and_ids(N, image_id, tiles=()):
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 250, (1, N + 30), generator=generator)
    ids[0, 5:5 + N] = image_id
    return torch.randn(1, *tiles, 3, 28, 28, generator=generator), ids


def assert_equal_states(a, b):
    assert a.keys() == b.keys(), f"keys that only one has: {sorted(a.keys() ^ b.keys())[:5]}"
    for name, value in a.items():
        assert value.dtype == b[name].dtype and torch.equal(value, b[name]), f"{name} is not bit-equal"


def state_of(folder):
    return {k: v for path in sorted(folder.glob("*.safetensors")) for k, v in load_file(path).items()}


def meta_of(folder):
    return json.loads((folder / "config.json").read_text())["minllava"]


def assert_refused(out, argv, *words):
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        converted(out, *argv)
    message = str(error.value)
    assert all(str(word) in message for word in words), f"the message should name {words}: {message[:600]}"
    assert len(message) < 1000 and "\n" not in message, f"not one line: {message}"
    assert not out.exists(), "something was written before the folder was understood"


# ---------------------------------------------------------------------------------------------------------------------
# Whole models


@pytest.mark.parametrize("end, files", [("bin", 1), ("bin", 3), ("safetensors", 1), ("safetensors", 3)])
def test_v1_computes_what_its_parts_compute(tmp_path, end, files):
    """Names, linear W with bias, hidden_states[-2] without CLS: in transformers and in model.py, from any kind of file."""
    parts = Parts(tmp_path, "v1", end=end, files=files)
    out = converted(tmp_path / "out", "--model", parts.dir)
    X_v, ids = picture_and_ids(4, 259)
    with torch.no_grad():
        want = parts.logits(ids, parts.features(X_v)[0])
        theirs = in_transformers(out)(input_ids=ids, pixel_values=X_v).logits[0]
        model = LLaVA.from_pretrained(out)
        ours = model.f_phi(inputs_embeds=model.splice(ids, X_v)).logits[0]
    assert theirs.shape == ours.shape == (len(want), 320), "259 ids and <image>, in rows to the next multiple of 64"
    torch.testing.assert_close(theirs[:, :259], want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours[:, :259], want, atol=1e-5, rtol=1e-5)
    assert (meta_of(out)["aspect"], meta_of(out)["template"], meta_of(out)["stage"]) == ("crop", "vicuna_v1", 2)
    assert model.tokenizer.chat_template == TEMPLATES["vicuna_v1"].jinja() and model.eos_ids == {2}


def our_logits(folder, ids, X_v, **more):
    """What minLLaVA itself makes of a converted folder, over the old vocabulary."""
    model = LLaVA.from_pretrained(folder)
    with torch.no_grad():
        return model.f_phi(inputs_embeds=model.splice(ids, X_v, **more)).logits[0, :, :259]


@pytest.mark.parametrize("family, tied", [("llama", False), ("mistral", False), ("qwen2", False), ("qwen2", True)])
def test_1_5_computes_what_its_parts_compute(tmp_path, family, tied):
    """Diss. Sec. 4.3: two layers with GELU between, pictures padded to a square; on every kind of language model."""
    parts = Parts(tmp_path, "1.5", family, tied=tied, files=2)
    out = converted(tmp_path / "out", "--model", parts.dir)
    X_v, ids = picture_and_ids(4, 259)
    with torch.no_grad():
        want = parts.logits(ids, parts.features(X_v)[0])
        theirs = in_transformers(out)(input_ids=ids, pixel_values=X_v).logits[0, :, :259]
    torch.testing.assert_close(theirs, want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(our_logits(out, ids, X_v), want, atol=1e-5, rtol=1e-5)
    assert meta_of(out)["aspect"] == "pad"
    assert meta_of(out)["template"] == ("mistral_instruct" if family == "mistral" else "vicuna_v1")


def test_1_5_pads_pictures_in_transformers_too(tmp_path):
    """The original pads with (122, 116, 104); llava-hf's own folders crop, and so answer about other pictures."""
    out = converted(tmp_path / "out", "--model", Parts(tmp_path, "1.5").dir)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (28, 20, 3), dtype=np.uint8))
    square = Image.new("RGB", (28, 28), (122, 116, 104))
    square.paste(picture, (4, 0))
    X_v = AutoImageProcessor.from_pretrained(out)(picture, return_tensors="np")["pixel_values"][0]
    mean, std = ([0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711])
    want = (np.asarray(square) / 255 - mean) / std
    np.testing.assert_allclose(X_v, want.transpose(2, 0, 1), atol=1e-5)


@pytest.mark.parametrize("family, pinpoints", [("llama", PINPOINTS), ("mistral", str(PINPOINTS))])
def test_1_6_computes_what_its_parts_compute(tmp_path, family, pinpoints):
    """Diss. Sec. 4.7: its own CLIP is used, not --vision's; the global picture, then rows of tiles with newlines."""
    parts = Parts(tmp_path, "1.6", family, end="safetensors", files=2)
    parts.configure(image_grid_pinpoints=pinpoints)
    out = converted(tmp_path / "out", "--model", parts.dir)
    X_v, ids = picture_and_ids(24, 259, tiles=(5,))      # 4 + 4 rows of 4 and a newline
    with torch.no_grad():
        H_v = parts.features(X_v[0])                     # (5, 4, D)
        rows = [torch.cat([H_v[1 + 2 * (y // 2) + x // 2][2 * (y % 2) + x % 2][None] for x in range(4)]
                          + [parts.newline[None]]) for y in range(4)]
        want = parts.logits(ids, torch.cat([H_v[0], *rows]))
        model = in_transformers(out, LlavaNextForConditionalGeneration)
        theirs = model(input_ids=ids, pixel_values=X_v, image_sizes=torch.tensor([[56, 56]])).logits[0, :, :259]
    torch.testing.assert_close(theirs, want, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(our_logits(out, ids, X_v[0], sizes=[(56, 56)]), want, atol=1e-5, rtol=1e-5)
    turned = [[h, w] for w, h in PINPOINTS]              # (height, width), as transformers reads them
    assert model.config.image_grid_pinpoints == turned
    assert (meta_of(out)["aspect"], meta_of(out)["tiling"]["rule"]) == ("anyres", "original")
    assert meta_of(out)["tiling"]["pinpoints"] == PINPOINTS
    assert AutoImageProcessor.from_pretrained(out).image_grid_pinpoints == turned


def test_new_rows_are_the_mean_of_the_old_and_spare_rows_are_used_first(tmp_path):
    """As in LLaVA.from_parts: a vocabulary of 32,000 grows to 32,064; one with rows left stays."""
    for rows, grown in ((259, 320), (290, 290)):
        (tmp_path / str(rows)).mkdir()
        parts = Parts(tmp_path / str(rows), rows=rows)
        state = state_of(converted(tmp_path / str(rows) / "out", "--model", parts.dir))
        for ours, theirs in (("language_model.model.embed_tokens.weight", "model.embed_tokens.weight"),
                             ("language_model.lm_head.weight", "lm_head.weight")):
            old = parts.state[theirs]
            assert state[ours].shape == (grown, 48) and torch.equal(state[ours][:rows], old)
            torch.testing.assert_close(state[ours][rows:], old.mean(0).expand(grown - rows, 48))


@pytest.mark.parametrize("added, family, template", [
    ((), "llama", "vicuna_v1"), ((), "mistral", "mistral_instruct"), (("[PAD]", "<im_patch>"), "llama", "llava_v0"),
    (("<|im_start|>", "<|im_end|>"), "llama", "chatml_direct")])
def test_the_template_is_read_from_the_contents_not_the_name(tmp_path, added, family, template):
    """The released code looks for "v1", "mistral" or "34b" in the path; here a folder may have any name."""
    parts = Parts(tmp_path, family=family, added=added)
    shutil.move(parts.dir, name := tmp_path / ("llava-v1.6-34b" if template == "vicuna_v1" else "llava-v1-llama-2"))
    out = converted(tmp_path / "out", "--model", name)
    assert meta_of(out)["template"] == meta_of(out)["chat"] == template and meta_of(out)["init"] == str(name)
    asked = converted(tmp_path / "asked", "--model", name, "--template", "llava_v0")
    assert meta_of(asked)["template"] == "llava_v0"
    assert AutoTokenizer.from_pretrained(asked).chat_template == TEMPLATES["llava_v0"].jinja()
    if not added:
        assert_refused(tmp_path / "unfit", ["--model", name, "--template", "chatml_direct"], "<|im_start|>")


@pytest.mark.parametrize("model_type", ["llava", "llava_llama"])
def test_a_sentencepiece_vocabulary_keeps_its_blanks(tmp_path, model_type):
    """Released folders have tokenizer.model alone; beside a config.json that says "llava", transformers 5 drops blanks."""
    parts = Parts(tmp_path, rows=384)
    (tmp_path / "vicuna").mkdir()
    _, vicuna, pieces = vicuna_folder(tmp_path / "vicuna", False)
    for path in parts.dir.glob("tokenizer*"):
        path.unlink()
    assert_refused(tmp_path / "out", ["--model", parts.dir], parts.dir, "tokenizer_config.json")
    for name in ("tokenizer.model", "tokenizer_config.json"):
        shutil.copy(tmp_path / "vicuna" / name, parts.dir)
    parts.configure(model_type=model_type)
    model = AutoTokenizer.from_pretrained(converted(tmp_path / "out", "--model", parts.dir))
    for text in ("What is this?", "\nWhat is", "a  b", "ASSISTANT: 3"):
        assert model(text)["input_ids"] == [1] + pieces.encode(text), f"{text!r} has not the ids that Vicuna knows"
    assert model.convert_tokens_to_ids(IMAGE) == 384 and model.pad_token == "<unk>"


# ---------------------------------------------------------------------------------------------------------------------
# Round trips


@pytest.mark.parametrize("kind, rows, tied", [("v1", 259, False), ("1.5", 259, False), ("1.5", 290, True), ("1.6", 259, False)])
def test_there_and_back_is_bit_equal(tmp_path, kind, rows, tied):
    """Original -> ours -> original gives each weight again, and ours -> original -> ours: names, formats, bits."""
    family = "qwen2" if tied else "llama"
    parts = Parts(tmp_path, kind, family, rows=rows, tied=tied, dtype=torch.float16, files=2)
    (parts.dir / "tokenizer.model").write_text("what the original's code reads")
    out = converted(tmp_path / "out", "--model", parts.dir)
    assert {v.dtype for v in state_of(out).values()} == {torch.float16}
    back = converted(tmp_path / "back", "--model", out, "--to_original")
    assert_equal_states(state_of(back), parts.state)
    assert (back / "tokenizer.model").read_bytes() == (parts.dir / "tokenizer.model").read_bytes()
    was, now = parts.config, json.loads((back / "config.json").read_text())
    differ = {k for k in was if k not in now or was[k] != now[k]}
    expected = {"tune_mm_mlp_adapter", "freeze_mm_mlp_adapter", "mm_vision_tower_lr", "image_crop_resolution",
                "tokenizer_model_max_length", "max_length", "model_type", "architectures"}   # training; "llava" is HF's by now
    assert differ <= expected, {k: (was[k], now.get(k)) for k in differ - expected}
    assert now["model_type"] == ("llava_qwen" if tied else "llava_llama") and now["rope_theta"] == 5e4
    again = converted(tmp_path / "again", "--model", back)
    assert_equal_states(state_of(again), state_of(out))
    configs = [json.loads((folder / "config.json").read_text()) for folder in (out, again)]
    for config in configs:
        del config["minllava"]["init"], config["minllava"]["llm"]
    assert configs[0] == configs[1]


def test_a_model_of_ours_goes_to_the_original_and_back(tmp_path):
    """A checkpoint that train.py wrote: linear W, CLIP left out because it is as it was; template and stage stay."""
    parts = Parts(tmp_path, "v1")
    torch.manual_seed(0)
    model = LLaVA.from_parts(str(parts.clip_dir), str(parts.base()))
    model.meta |= {"template": "plain", "chat": "llava_v0", "stage": 1, "recipe": "llava-7b"}
    model.save_pretrained(tmp_path / "ours")
    back = converted(tmp_path / "back", "--model", tmp_path / "ours", "--to_original")
    assert state_of(back).keys() == parts.state.keys(), "nothing but the language model and mm_projector.{weight,bias}"
    assert torch.equal(state_of(back)["model.mm_projector.weight"], model.W.weight)
    assert len(state_of(back)["lm_head.weight"]) == 259 == json.loads((back / "config.json").read_text())["vocab_size"]
    again = converted(tmp_path / "again", "--model", back)
    assert_equal_states(state_of(again), state_of(tmp_path / "ours"))
    kept = {k: v for k, v in meta_of(again).items() if k in ("template", "chat", "stage", "recipe", "vision")}
    assert kept == {"template": "plain", "chat": "llava_v0", "stage": 1, "recipe": "llava-7b", "vision": str(parts.clip_dir)}


@pytest.mark.parametrize("kind", ["1.5", "1.6"])
def test_a_llava_hf_folder_goes_to_the_original(tmp_path, kind):
    """llava-hf's folders have new or old names and 64 spare rows, and no word of ours: --vision and --llm say the rest."""
    parts = Parts(tmp_path, kind)
    out = converted(tmp_path / "out", "--model", parts.dir)
    config = json.loads((out / "config.json").read_text())
    del config["minllava"]
    (out / "config.json").write_text(json.dumps(config))
    new = {}
    for name, value in state_of(out).items():
        new[name.replace("language_model.model.", "model.language_model.").replace("language_model.lm_head", "lm_head")
            .replace("vision_tower.vision_model.", "model.vision_tower.").replace("multi_", "model.multi_")
            .replace("image_newline", "model.image_newline")] = value
    save_file(new, out / "model.safetensors", {"format": "pt"})
    assert_refused(tmp_path / "back", ["--model", out, "--to_original"], "--vision", "--llm")
    back = converted(tmp_path / "back", "--model", out, "--to_original", "--vision", parts.clip_dir, "--llm", parts.base())
    state = state_of(back)
    tower = {k: state.pop(k) for k in list(state) if k.startswith("model.vision_tower.") and kind == "1.5"}
    assert_equal_states(state, parts.state)
    assert len(tower) == (len(parts.clip.state_dict()) if kind == "1.5" else 0), "whose CLIP this is, nobody says: it is kept"
    config = json.loads((back / "config.json").read_text())
    assert config["image_aspect_ratio"] == {"1.5": "pad", "1.6": "anyres"}[kind] and config["unfreeze_mm_vision_tower"]


@pytest.mark.parametrize("rule", ["original", "hf", "theirs"])
def test_canvases_that_are_not_symmetric_keep_their_sides(tmp_path, rule):
    """The original reads (width, height), transformers (height, width): a wide canvas stays a wide one, there and back."""
    parts = Parts(tmp_path, "1.6")
    parts.configure(image_grid_pinpoints=[[28, 84], [56, 28]])
    out = converted(tmp_path / "out", "--model", parts.dir)
    config = json.loads((out / "config.json").read_text())
    if rule == "theirs":                                 # llava-hf's own folder, without our word
        del config["minllava"]
    elif rule == "hf":
        config["minllava"]["tiling"] |= {"rule": "hf", "pinpoints": [[84, 28], [28, 56]]}
    (out / "config.json").write_text(json.dumps(config))
    from checkpoint import load_settings
    ours = load_settings(out)[2].tiling
    sizes = [(10, 40), (90, 30), (30, 90), (200, 20), (64, 64)]
    assert {ours.plan(*size).canvas for size in sizes} == {(28, 84), (56, 28)}
    back = converted(tmp_path / "back", "--model", out, "--to_original", "--vision", parts.clip_dir, "--llm", parts.base())
    assert json.loads((back / "config.json").read_text())["image_grid_pinpoints"] == [[28, 84], [56, 28]]
    again = load_settings(converted(tmp_path / "again", "--model", back))[2].tiling
    assert [again.plan(*size).canvas for size in sizes] == [ours.plan(*size).canvas for size in sizes]
    assert again == ours or rule == "theirs"


@pytest.mark.parametrize("kind", [LlavaForConditionalGeneration, LlavaNextForConditionalGeneration])
def test_old_and_new_llava_hf_names_are_one(tmp_path, kind):
    """transformers 5's modules, the files it saves, and the hub's files: with and without vision_model."""
    make = LlavaConfig if kind is LlavaForConditionalGeneration else LlavaNextConfig
    model = kind(make(vision_config=tiny_clip().config.to_dict(), text_config=tiny_llm().config.to_dict()))
    model.save_pretrained(tmp_path)
    hub = {f"vision_tower.vision_model.{k}" for k in tiny_clip().state_dict()}
    hub |= {f"language_model.{k}" for k in tiny_llm().state_dict()}
    hub |= {f"multi_modal_projector.linear_{i}.{k}" for i in (1, 2) for k in ("weight", "bias")}
    hub |= {"image_newline"} if make is LlavaNextConfig else set()
    saved = load_file(tmp_path / "model.safetensors").keys()
    for names in (model.state_dict().keys(), saved, hub, {k.replace(".vision_model", "") for k in hub}):
        assert hf_keys(dict.fromkeys(names)).keys() == hub
    with pytest.raises(ValueError, match="mixed"):
        hf_keys(dict.fromkeys([*model.state_dict(), *hub]))


# ---------------------------------------------------------------------------------------------------------------------
# Parts of a model: adapters, projectors, deltas


def lora_folder(parts, r=4, alpha=8, end="bin", **more):
    """What the original's training with LoRA leaves; the adapter as {weight: (A, B)}."""
    generator, adapter, state = torch.Generator().manual_seed(1), {}, {}
    for name, module in parts.llm.named_modules():
        if isinstance(module, nn.Linear) and name != "lm_head":
            adapter[name] = (torch.randn(r, module.in_features, generator=generator),
                             torch.randn(module.out_features, r, generator=generator))
            state |= {f"base_model.model.{name}.lora_{k}.weight": v for k, v in zip("AB", adapter[name])}
    folder = parts.folder / "lora"
    folder.mkdir()
    save_files(state, folder, "adapter_model", end)
    torch.save({f"base_model.model.model.mm_projector.{k}": v for k, v in parts.W.state_dict().items()},
               folder / "non_lora_trainables.bin")
    (folder / "config.json").write_text(json.dumps(parts.config))
    (folder / "adapter_config.json").write_text(json.dumps({
        "peft_type": "LORA", "r": r, "lora_alpha": alpha, "bias": "none", "base_model_name_or_path": "lmsys/vicuna-7b-v1.5",
        "modules_to_save": None, "fan_in_fan_out": False} | more))
    return folder, adapter


@pytest.mark.parametrize("end, more, scale", [("bin", {}, 2), ("safetensors", {"use_rslora": True}, 4)])
def test_a_lora_folder_is_merged_onto_its_base(tmp_path, end, more, scale):
    """y = W x + alpha / r B A x: the written folder computes what base and adapter compute side by side."""
    parts = Parts(tmp_path)
    folder, adapter = lora_folder(parts, end=end, **more)
    out = converted(tmp_path / "out", "--model", folder, "--llm", parts.base())
    for name, (A, B) in adapter.items():
        parts.llm.get_submodule(name).register_forward_hook(lambda _, x, y, A=A, B=B: y + scale * (x[0] @ A.T @ B.T))
    X_v, ids = picture_and_ids(4, 259)
    with torch.no_grad():
        want = parts.logits(ids, parts.features(X_v)[0])
        theirs = in_transformers(out)(input_ids=ids, pixel_values=X_v).logits[0, :, :259]
    torch.testing.assert_close(theirs, want, atol=1e-4, rtol=1e-4)
    assert meta_of(out)["llm"] == str(parts.base()) and meta_of(out)["init"] == str(folder)


@pytest.mark.parametrize("prefix", ["model.mm_projector.", "base_model.model.model.mm_projector."])
@pytest.mark.parametrize("kind", ["v1", "1.5"])
def test_a_projector_alone_becomes_a_model_with_its_parts(tmp_path, kind, prefix):
    """The original's stage 1 leaves mm_projector.bin: a folder of ours with --vision, --llm and that W."""
    parts = Parts(tmp_path, kind)
    (folder := tmp_path / "stage1").mkdir()
    torch.save({prefix + k: v.detach() for k, v in parts.W.state_dict().items()}, folder / "mm_projector.bin")
    argv = ["--model", folder, "--llm", parts.base()]
    assert_refused(tmp_path / "out", argv, "--vision")   # without config.json nothing names CLIP
    out = converted(tmp_path / "out", *argv, "--vision", parts.clip_dir)
    state, W = state_of(out), parts.W.state_dict()
    for name, value in W.items():
        ours = {"0": "linear_1", "2": "linear_2"}.get(name.split(".")[0], "linear_1") + "." + name.split(".")[-1]
        assert torch.equal(state[f"multi_modal_projector.{ours}"], value)
    assert (meta_of(out)["stage"], meta_of(out)["template"], meta_of(out)["chat"]) == (1, "plain", "vicuna_v1")
    in_transformers(out)


def test_stage_2_starts_from_a_projector_of_the_original(tmp_path, chats):
    """train.py --init takes the folder, and goes on with the template of its language model."""
    parts = Parts(tmp_path, "v1")
    (folder := tmp_path / "stage1").mkdir()
    torch.save({f"model.mm_projector.{k}": v.detach() for k, v in parts.W.state_dict().items()}, folder / "mm_projector.bin")
    out = converted(tmp_path / "out", "--model", folder, "--llm", parts.base(), "--vision", parts.clip_dir)
    assert torch.equal(LLaVA.from_pretrained(out).W.weight, parts.W.weight)
    train.main([*f"--stage 2 --init {out} --out {tmp_path / 'two'} --data {chats / 'chat.json'} --images {chats / 'images'} "
                "--max_steps 1 --global_batch_size 2 --workers 0 --device cpu --max_length 512".split()])
    assert meta_of(tmp_path / "two")["template"] == "vicuna_v1" and len(lines(tmp_path / "two" / "log.jsonl")) == 1


def test_a_v0_delta_is_added_to_its_llama(tmp_path):
    """target = delta + LLaMA in fp16; the projector and the rows of the four added tokens are in the delta itself."""
    added = ("[PAD]", "<im_patch>", "<im_start>", "<im_end>")
    parts = Parts(tmp_path, "v1", rows=263, dtype=torch.float16, added=added, files=2)
    parts.configure(mm_use_im_start_end=True)
    (llama := tmp_path / "llama").mkdir()
    base = {k: v.half() for k, v in tiny_llm(seed=3, vocab_size=259).state_dict().items()}
    save_files(base | INV_FREQ, llama, "pytorch_model", "bin", 3)
    out = converted(tmp_path / "out", "--model", parts.dir, "--delta", "--llm", llama)
    state, want = state_of(out), dict(parts.state)
    for name, value in base.items():
        want[name] = torch.cat([want[name][:len(value)] + value, want[name][len(value):]])
    for name in ("lm_head.weight", "model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight"):
        ours = state[f"language_model.{name}"]
        assert ours.dtype == torch.float16 and torch.equal(ours[:len(want[name])], want[name])
    assert torch.equal(state["multi_modal_projector.linear_1.weight"], want["model.mm_projector.weight"])
    assert meta_of(out)["template"] == "llava_v0" and meta_of(out)["im_start_end"] is True
    back = converted(tmp_path / "back", "--model", out, "--to_original")
    assert_equal_states(state_of(back), want)
    assert json.loads((back / "config.json").read_text())["mm_use_im_start_end"] is True


# ---------------------------------------------------------------------------------------------------------------------
# Memory


def peak(argv, log):
    """Run convert in this process; write the peak of its memory, less that before, in MB."""
    now = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    import convert
    before = now()
    convert.main(argv)
    log.write_text(json.dumps(now() - before))


@pytest.mark.slow
@pytest.mark.parametrize("end", ["bin", "safetensors"])
def test_memory_peaks_at_about_one_shard(tmp_path, end):
    """A 13B model is 26 GB in fp16; a laptop converts it all the same. Here six shards of 40 MB, in and out."""
    parts, D = Parts(tmp_path, "v1"), 512
    state = {k: v for k, v in parts.state.items() if "layers" not in k}
    state |= {"model.embed_tokens.weight": torch.ones(259, D), "lm_head.weight": torch.ones(259, D),
              "model.norm.weight": torch.ones(D), "model.mm_projector.weight": torch.ones(D, 32),
              "model.mm_projector.bias": torch.ones(D)}
    for i in range(30):
        shapes = {"self_attn.q_proj": (D, D), "self_attn.k_proj": (D // 2, D), "self_attn.v_proj": (D // 2, D),
                  "self_attn.o_proj": (D, D), "mlp.gate_proj": (2 * D, D), "mlp.up_proj": (2 * D, D),
                  "mlp.down_proj": (D, 2 * D), "input_layernorm": (D,), "post_attention_layernorm": (D,)}
        state |= {f"model.layers.{i}.{k}.weight": torch.ones(shape) for k, shape in shapes.items()}
    for old in parts.dir.glob("pytorch_model*"):
        old.unlink()
    save_files(state, parts.dir, "model" if end == "safetensors" else "pytorch_model", end, files=6)
    size = sum(v.nbytes for v in state.values()) / 2**20
    parts.configure(hidden_size=D, intermediate_size=2 * D, num_hidden_layers=30, head_dim=D // 4)
    argv = ["--model", str(parts.dir), "--out", str(tmp_path / "out"), "--shard", "40MB"]
    process = FORKS.Process(target=peak, args=(argv, tmp_path / "log"))
    process.start()
    process.join(120)
    used = json.loads((tmp_path / "log").read_text())
    shards = sorted((tmp_path / "out").glob("*.safetensors"))
    assert size > 230 and len(shards) >= 6 and max(os.path.getsize(f) for f in shards) < 41e6
    assert used < 100, f"{used:.0f} MB for shards of 40 MB: the model of {size:.0f} MB is held in memory"
    in_transformers(tmp_path / "out")


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


def edit(parts, change):
    """The one weight file of a folder, changed."""
    path = parts.dir / "pytorch_model.bin"
    state = torch.load(path, weights_only=True)
    change(state)
    torch.save(state, path)


@pytest.mark.parametrize("change, words", [
    (lambda s: s.pop("model.layers.1.mlp.up_proj.weight"), ["1 weights are missing", "model.layers.1.mlp.up_proj.weight"]),
    (lambda s: s.update({"model.layers.2.mlp.x.weight": torch.ones(1)}), ["no such model", "model.layers.2.mlp.x.weight"]),
    (lambda s: s.update({"model.image_newline": torch.ones(48)}), ["no such model", "model.image_newline"]),
    (lambda s: s.update({"xmodel.norm.weight": torch.ones(48)}), ["no such model", "xmodel.norm.weight"]),
    (lambda s: s.update({"model.norm.weight": torch.ones(47)}), ["model.norm.weight (47,) instead of (48,)"]),
    (lambda s: s.update({"model.mm_projector.0.weight": torch.ones(48, 31)}),
     ["model.mm_projector.0.weight (48, 31) instead of (48, 32)", "--vision"]),
    (lambda s: s.update({"model.mm_projector.weight": torch.ones(48, 32)}), ["no such model", "model.mm_projector.weight"]),
    (lambda s: [s.pop(k) for k in list(s) if "projector" in k], ["missing", "model.mm_projector.weight"]),
    (lambda s: s.update(epoch=3), ["pytorch_model.bin", "other things"])])
def test_a_weight_too_many_too_few_or_of_another_shape_is_refused(tmp_path, change, words):
    """Strict, by whole names: the first examples are named as they are in the file, and nothing is written."""
    parts = Parts(tmp_path)
    edit(parts, change)
    assert_refused(tmp_path / "out", ["--model", parts.dir], parts.dir, *words)


@pytest.mark.parametrize("change, words", [
    ({"model_type": "llava_mpt"}, ["model_type", "llava_mpt", "llava_llama"]),
    ({"image_aspect_ratio": "keep"}, ["image_aspect_ratio", "keep", "pad"]),
    ({"mm_vision_select_feature": "cls_patch"}, ["mm_vision_select_feature", "cls_patch"]),
    ({"image_grid_pinpoints": [[30, 56]]}, ["image_grid_pinpoints", "30", "multiples of 28"]),
    ({"image_grid_pinpoints": "(1x1),...,(6x6)"}, ["image_grid_pinpoints", "multiples of 28"]),
    ({"image_grid_pinpoints": None}, ["image_grid_pinpoints", "None"]),
    ({"mm_patch_merge_type": "flat"}, ["mm_patch_merge_type", "flat", "spatial_unpad"]),
    ({"mm_vision_tower": "nobody/clip"}, ["--vision", "nobody/clip"]),
    ({"mm_vision_tower": None}, ["--vision"]),
    ({"text_config": {}}, ["ours already"]), ({"vocab_size": 250}, ["embed_tokens", "(259, 48) instead of (250, 48)"])])
def test_a_setting_that_would_be_another_model_is_refused(tmp_path, change, words):
    """What this code does not compute is not converted as if it did."""
    parts = Parts(tmp_path, "1.6")
    parts.configure(**change)
    assert_refused(tmp_path / "out", ["--model", parts.dir], *words)


def test_parts_without_their_base_are_refused(tmp_path):
    """An adapter, a projector, a delta: the message says that --llm is missing, and what --model is."""
    parts = Parts(tmp_path, "v1")
    folder, _ = lora_folder(parts)
    (stage1 := tmp_path / "stage1").mkdir()
    torch.save({f"model.mm_projector.{k}": v for k, v in parts.W.state_dict().items()}, stage1 / "mm_projector.bin")
    out = tmp_path / "out"
    assert_refused(out, ["--model", folder], folder, "LoRA adapter without its base", "--llm", "adapter_config.json")
    assert_refused(out, ["--model", stage1], stage1, "projector without its base", "--llm")
    assert_refused(out, ["--model", parts.dir, "--delta"], parts.dir, "delta without its base", "--llm")
    assert_refused(out, ["--model", parts.dir, "--llm", parts.base()], "whole model", "--delta")
    assert_refused(out, ["--model", folder, "--llm", parts.base(), "--delta"], "LoRA adapter", "--delta")
    assert_refused(out, ["--model", folder, "--llm", parts.dir], "model.mm_projector.bias", "before LLaVA")
    assert_refused(out, ["--model", folder, "--llm", tmp_path], "--llm", "pytorch_model")


def test_a_base_of_another_size_is_refused(tmp_path):
    """The 13B adapter on the 7B base: the widths of both are named."""
    parts = Parts(tmp_path)
    folder, _ = lora_folder(parts)
    narrow = tiny_llm(vocab_size=259)
    narrow = type(narrow)(type(narrow.config)(**narrow.config.to_dict() | {"hidden_size": 40, "head_dim": 10}))
    narrow.save_pretrained(tmp_path / "narrow")
    out = tmp_path / "out"
    assert_refused(out, ["--model", folder, "--llm", tmp_path / "narrow"], "(48, 4)", "40", "the language model")
    assert_refused(out, ["--model", parts.dir, "--delta", "--llm", tmp_path / "narrow"], "48", "40", "LLaMA")
    edit(parts, lambda s: s.update({"model.layers.2.mlp.up_proj.weight": torch.ones(1)}))
    assert_refused(out, ["--model", parts.dir, "--delta", "--llm", parts.base()], "only in", "model.layers.2.mlp.up_proj")
    (stage1 := tmp_path / "stage1").mkdir()
    torch.save({f"model.mm_projector.{k}": v for k, v in parts.W.state_dict().items()}, stage1 / "mm_projector.bin")
    text_tokenizer().save_pretrained(tmp_path / "narrow")
    assert_refused(out, ["--model", stage1, "--llm", tmp_path / "narrow", "--vision", parts.clip_dir],
                   "model.mm_projector.0.bias (48,) instead of (40,)", "--llm")


@pytest.mark.parametrize("change", [{"use_dora": True}, {"bias": "all"}, {"modules_to_save": ["lm_head"]}])
def test_an_adapter_that_is_not_plain_lora_is_refused(tmp_path, change):
    """A merge that leaves half of an adapter out gives a model that nobody trained."""
    parts = Parts(tmp_path)
    folder, _ = lora_folder(parts, **change)
    assert_refused(tmp_path / "out", ["--model", folder, "--llm", parts.base()], *change, "plain LoRA")


def test_folders_that_are_no_llava_are_refused(tmp_path):
    """An empty folder, a language model, a CLIP, no folder, a torn download, ours for the original's and the reverse."""
    parts, out = Parts(tmp_path, "v1"), tmp_path / "out"
    (tmp_path / "empty").mkdir()
    assert_refused(out, ["--model", tmp_path / "empty"], tmp_path / "empty", "no LLaVA folder")
    assert_refused(out, ["--model", tmp_path / "nowhere"], "--model", tmp_path / "nowhere")
    assert_refused(out, ["--model", parts.base()], "mm_vision_tower")
    assert_refused(out, ["--model", parts.base(), "--vision", parts.clip_dir], "missing", "model.mm_projector.bias")
    assert_refused(out, ["--model", parts.clip_dir, "--vision", parts.clip_dir], "model_type", "clip")
    assert_refused(out, ["--model", parts.dir, "--to_original"], "llava-hf")
    ours = converted(tmp_path / "ours", "--model", parts.dir)
    assert_refused(out, ["--model", ours, "--vision", parts.clip_dir], "ours already")
    with open(parts.dir / "pytorch_model.bin", "r+b") as f:
        f.truncate(9000)
    assert_refused(out, ["--model", parts.dir], "pytorch_model.bin", "not a whole file")


def test_a_weight_in_two_files_is_refused(tmp_path):
    """Files of two downloads in one folder: which one holds, nobody knows."""
    parts = Parts(tmp_path, files=2)
    torch.save({"model.norm.weight": torch.ones(48)}, parts.dir / "pytorch_model-00003-of-00003.bin")
    assert_refused(tmp_path / "out", ["--model", parts.dir], "another file", "model.norm.weight")


def test_the_way_back_is_as_strict(tmp_path):
    """A second layer that is none, a key too few, a tokenizer of another model."""
    parts = Parts(tmp_path, "v1")
    ours, back = converted(tmp_path / "ours", "--model", parts.dir), tmp_path / "back"
    text_tokenizer().save_pretrained(parts.base())
    other = text_tokenizer("[PAD]")
    other._tokenizer = Tokenizer.from_str(other.backend_tokenizer.to_str().replace('"!"', '"\\u2603"'))
    other.save_pretrained(tmp_path / "other")
    assert_refused(back, ["--model", ours, "--to_original", "--llm", tmp_path / "other"], "--llm", "tokenizer is not that of")
    state = state_of(ours)
    for change, words in (({"multi_modal_projector.linear_2.bias": torch.ones(48)}, ["linear_2 is not the identity"]),
                          ({"model.image_newline": torch.ones(48)}, ["no such model", "image_newline"])):
        save_file(state | change, ours / "model.safetensors", {"format": "pt"})
        assert_refused(back, ["--model", ours, "--to_original"], ours, *words)


def test_the_command_line_says_one_line_and_overwrites_nothing(tmp_path):
    """An output folder that exists is not touched; an error is one line and an exit code; -h explains."""
    parts = Parts(tmp_path, "v1")
    (out := tmp_path / "out").mkdir()
    code, said = run_script(tmp_path, "convert.py", "--model", parts.dir, "--out", out)
    assert code == 1 and said.strip().splitlines()[-1] == f"error: --out {out} exists; name a new folder"
    assert os.listdir(out) == []
    code, said = run_script(tmp_path, "convert.py", "-h")
    assert code == 0 and "--to_original" in said
    assert IMAGE in AutoTokenizer.from_pretrained(converted(tmp_path / "new", "--model", parts.dir)).get_vocab()
