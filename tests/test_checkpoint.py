"""One checkpoint: a folder that knows what it is, that loads strictly and offline, and that `transformers` reads as its own."""
import json
import multiprocessing
import os
import re
import shutil
import sys

import numpy as np
import pytest
import sentencepiece
import torch
from huggingface_hub import constants, model_info, save_torch_state_dict
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, processors
from transformers import (AutoModelForImageTextToText, AutoProcessor, CLIPConfig, CLIPModel, GenerationConfig,
                          PreTrainedTokenizerFast)

from conftest import byte_tokenizer, tiny_clip, tiny_llava, tiny_llm
from data import TEMPLATES, prompt
from model import LLaVA
from records import IMAGE

KINDS = [(family, tied) for family in ("llama", "mistral", "qwen2") for tied in (False, True)]
TEXTS = ["What is this?", "\nWhat is", " A cat.</s>USER: Is it?", "a  b\n\n c ", "日本, Grüße!", f"x{IMAGE}{IMAGE}\ny",
         "###Human:"]


def assert_same(a, b):
    """Two models are one: every bit of the weights, the features, what the ids mean, what ends a sequence, and meta."""
    assert a.state_dict().keys() == b.state_dict().keys()
    for name, value in a.state_dict().items():
        other = b.state_dict()[name]
        assert value.dtype == other.dtype, f"{name} is {value.dtype} and {other.dtype}"
        assert torch.equal(value, other), f"{name} is not bit-equal: the folder does not hold the model that was saved"
    assert (a.meta, a.feature_layer, a.image_id, a.view, a.tied, a.eos_ids) == (
        b.meta, b.feature_layer, b.image_id, b.view, b.tied, b.eos_ids)
    assert len(a.tokenizer) == len(b.tokenizer)
    for text in TEXTS:
        assert a.tokenizer(text)["input_ids"] == b.tokenizer(text)["input_ids"], f"{text!r} has other ids after saving"


def logits(model, T=60, dtype=torch.float32):
    """Logits (T, V) of a row with one picture: of a LLaVA of ours, or of transformers' (which takes the same ids)."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 250, (1, T), generator=generator)
    ids[0, 5:9], X_v = 259, torch.randn(1, 3, 28, 28, generator=generator).to(dtype)
    with torch.no_grad():
        if isinstance(model, LLaVA):
            return model.f_phi(inputs_embeds=model.splice(ids, X_v)).logits[0]
        return model(input_ids=ids, pixel_values=X_v, attention_mask=torch.ones_like(ids)).logits[0]


@pytest.fixture
def saved(tmp_path):
    """(a model, its folder)"""
    model = tiny_llava(meta={"template": "vicuna_v1", "stage": 2, "data": ["a.json", "b.json"], "seed": 0})
    model.save_pretrained(tmp_path / "model")
    return model, tmp_path / "model"


# ---------------------------------------------------------------------------------------------------------------------
# The round trip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("family, tied", KINDS)
def test_save_and_load_is_bit_exact(family, tied, dtype, tmp_path):
    """Sec. 4.2: stage 2 starts from exactly what stage 1 ended with; saving again writes the same file."""
    meta = {"template": "llava_v0", "stage": 1, "lr": 0.002, "data": ["a.json"], "note": "ünï", "nothing": None}
    model = tiny_llava(family, tied, feature_layer=-1 if tied else -2, meta=meta)
    model.f_phi.generation_config = GenerationConfig(eos_token_id=[2, 77])
    model.tokenizer.chat_template = TEMPLATES["llava_v0"].jinja()
    model.save_pretrained(tmp_path / "a", dtype=dtype)
    loaded = LLaVA.from_pretrained(tmp_path / "a", dtype=dtype)
    for p in model.parameters():
        p.data = p.data.to(dtype)
    assert_same(model, loaded)
    assert loaded.meta == meta | {"aspect": "crop"} and loaded.eos_ids == {2, 77}
    assert loaded.tokenizer.chat_template == model.tokenizer.chat_template
    loaded.save_pretrained(tmp_path / "b")
    for name in ("model.safetensors", "config.json", "tokenizer.json", "chat_template.jinja"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes(), f"{name} changes when saved again"
    assert not loaded.training, "a loaded model is in eval mode"


def test_weights_trained_in_fp32_survive_a_bf16_start(tmp_path):
    """Sec. 4.2, mixed precision: parts read in bf16, trained in fp32 and saved in fp32 come back with all their bits."""
    tiny_clip().save_pretrained(tmp_path / "clip"), tiny_llm().save_pretrained(tmp_path / "llm")
    byte_tokenizer().save_pretrained(tmp_path / "llm")
    model = LLaVA.from_parts(str(tmp_path / "clip"), str(tmp_path / "llm"), dtype=torch.bfloat16)
    for p in model.parameters():
        p.data = p.data.float() + 1e-3 * torch.randn_like(p.float())
    model.save_pretrained(tmp_path / "out")
    assert_same(model, LLaVA.from_pretrained(tmp_path / "out"))
    dtypes = re.findall(r'"dtype": "(\w+)"', (tmp_path / "out" / "config.json").read_text())
    assert set(dtypes) == {"float32"}, f"the weights are float32, config.json says {dtypes}"


def test_a_folder_loaded_in_bf16_keeps_exact_rotary_frequencies(saved):
    """Eq. (3)'s order of tokens: rotary frequencies rounded to bf16 turn far positions by whole radians."""
    model, folder = saved
    half = LLaVA.from_pretrained(folder, torch.bfloat16)
    theirs = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.bfloat16).eval()
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    for (name, want), (_, got) in zip(model.f_phi.named_buffers(), half.f_phi.named_buffers(), strict=True):
        assert got.dtype == want.dtype and torch.equal(got, want), f"{name} is {got.dtype}: positions are wrong"
    torch.testing.assert_close(logits(half, 400, torch.bfloat16), logits(theirs, 400, torch.bfloat16), atol=0, rtol=0)


def test_a_sharded_folder_loads_equally_and_strictly(saved):
    """A 13B model is 5 GB files and an index; a lost one is an error that names keys, not random weights."""
    model, folder = saved
    state = load_file(folder / "model.safetensors")
    os.remove(folder / "model.safetensors")
    save_torch_state_dict(state, folder, max_shard_size="60KB", metadata={"format": "pt"})
    shards = sorted(f for f in os.listdir(folder) if f.endswith(".safetensors"))
    assert len(shards) >= 3
    assert_same(model, LLaVA.from_pretrained(folder))
    lost = next(iter(load_file(folder / shards[1])))
    os.rename(folder / shards[1], folder / "lost")
    with pytest.raises(ValueError, match="missing") as error:
        LLaVA.from_pretrained(folder)
    assert "language_model" in str(error.value) or lost in str(error.value)
    os.rename(folder / "lost", folder / shards[1])
    model.save_pretrained(folder)
    assert [f for f in os.listdir(folder) if "safetensors" in f] == ["model.safetensors"], "shards of an older save are left"
    assert_same(model, LLaVA.from_pretrained(folder))


@pytest.mark.parametrize("name", ["llava-v1.5-13b-lora", "mpt", "checkpoint-500", "a b ü"])
def test_renaming_the_folder_changes_nothing(saved, tmp_path, name):
    """The released code picks model and template by the path; here both are in config.json."""
    model, folder = saved
    shutil.move(folder, tmp_path / name)
    assert_same(model, LLaVA.from_pretrained(tmp_path / name))
    assert_same(model, LLaVA.from_pretrained(str(tmp_path / name) + os.sep))


def load_with_the_network_watched(pipe, clip, llm, folder, out):
    """In a process of its own, with the hub allowed: what local folders ask the network, and what a hub id asks."""
    asked = []

    def watch(event, args):
        if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname"):
            asked.append((event, str(args)))
            raise OSError("no network")
    sys.addaudithook(watch)
    constants.HF_HUB_OFFLINE = False
    LLaVA.from_pretrained(folder)
    LLaVA.from_parts(clip, llm).save_pretrained(out)
    LLaVA.from_pretrained(out)
    local = list(asked)
    with pytest.raises(Exception, match="no network"):
        model_info("nobody/nothing")
    pipe.send((local, asked[len(local):]))


def test_no_network_is_asked_for_local_folders(saved, vision, tmp_path):
    """A loaded folder needs no network: with the hub allowed and every socket watched, none is opened."""
    fork = multiprocessing.get_context("fork")            # an audit hook cannot be removed again, so it gets its own process
    result, pipe = fork.Pipe(duplex=False)
    process = fork.Process(target=load_with_the_network_watched,
                           args=(pipe, vision, llm_folder(tmp_path / "llm")[1], saved[1], tmp_path / "out"))
    process.start()
    pipe.close()
    local, hub = result.recv()
    process.join()
    assert not local, f"local folders ask the network: {local[:3]}"
    assert hub, "the watch does not see what a hub id asks for, so this test proves nothing"


def test_a_save_that_fails_leaves_nothing_that_loads(saved, tmp_path):
    """config.json is written last: a full disk leaves no folder that looks whole, neither a new one nor over an old one."""
    model, folder = saved
    for target in (tmp_path / "new", folder):
        (target / "generation_config.json").unlink(missing_ok=True)
        (target / "generation_config.json").mkdir(parents=True)           # what writing stumbles over, after the weights
        with pytest.raises(OSError):
            model.save_pretrained(target)
        with pytest.raises(FileNotFoundError, match="config.json"):
            LLaVA.from_pretrained(target)


# ---------------------------------------------------------------------------------------------------------------------
# What others read


@pytest.mark.parametrize("family, tied", KINDS)
def test_transformers_loads_our_folder_completely(family, tied, tmp_path):
    """llava-hf layout: AutoModelForImageTextToText has no missing, unexpected or mismatched key, and equal logits."""
    model = tiny_llava(family, tied, feature_layer=-1 if tied else -2)
    model.save_pretrained(tmp_path)
    theirs, info = AutoModelForImageTextToText.from_pretrained(tmp_path, output_loading_info=True)
    assert type(theirs).__name__ == "LlavaForConditionalGeneration"
    assert not any(info.values()), f"transformers sees another model in our folder: {info}"
    torch.testing.assert_close(logits(model), logits(theirs.eval()), atol=1e-5, rtol=1e-5)


KEYS = [r"vision_tower\.vision_model\.embeddings\.(class_embedding|patch_embedding\.weight|position_embedding\.weight)",
        r"vision_tower\.vision_model\.(pre_layrnorm|post_layernorm)\.(weight|bias)",
        r"vision_tower\.vision_model\.encoder\.layers\.[012]\.self_attn\.(q|k|v|out)_proj\.(weight|bias)",
        r"vision_tower\.vision_model\.encoder\.layers\.[012]\.(layer_norm1|layer_norm2|mlp\.fc1|mlp\.fc2)\.(weight|bias)",
        r"multi_modal_projector\.linear_[12]\.(weight|bias)",
        r"language_model\.model\.(embed_tokens|norm)\.weight",
        r"language_model\.model\.layers\.[01]\.self_attn\.(q|k|v|o)_proj\.weight",
        r"language_model\.model\.layers\.[01]\.(mlp\.(gate|up|down)_proj|input_layernorm|post_attention_layernorm)\.weight"]
BIAS, HEAD = r"language_model\.model\.layers\.[01]\.self_attn\.(q|k|v)_proj\.bias", r"language_model\.lm_head\.weight"


@pytest.mark.parametrize("family, tied", KINDS)
def test_the_keys_are_those_of_the_llava_hf_hub(family, tied, tmp_path):
    """vLLM, SGLang and llama.cpp read these names, with `vision_model.` and `language_model.model.` in them."""
    tiny_llava(family, tied).save_pretrained(tmp_path)
    patterns = KEYS + [BIAS] * (family == "qwen2") + [HEAD] * (not tied)
    keys = load_file(tmp_path / "model.safetensors").keys()
    strange = [k for k in keys if not any(re.fullmatch(p, k) for p in patterns)]
    assert not strange, f"keys that llava-hf does not have: {strange[:5]}"
    count = {p: sum(bool(re.fullmatch(p, k)) for k in keys) for p in patterns}
    want = [3, 4, 24, 24, 4, 2, 8, 10] + [6] * (family == "qwen2") + [1] * (not tied)
    assert list(count.values()) == want, f"keys per kind: {count}"


def test_the_folder_describes_a_linear_W(saved):
    """Eq. (1) in llava-hf's two-layer projector: linear_1 = W, no activation, linear_2 = the identity; and its config."""
    model, folder = saved
    state = load_file(folder / "model.safetensors")
    assert torch.equal(state["multi_modal_projector.linear_1.weight"], model.W.weight)
    assert torch.equal(state["multi_modal_projector.linear_1.bias"], model.W.bias)
    assert torch.equal(state["multi_modal_projector.linear_2.weight"], torch.eye(48))
    assert not state["multi_modal_projector.linear_2.bias"].any()
    config = json.loads((folder / "config.json").read_text())
    want = {"model_type": "llava", "architectures": ["LlavaForConditionalGeneration"], "projector_hidden_act": "linear",
            "image_token_index": 259, "image_seq_length": 4, "vision_feature_layer": -2, "multimodal_projector_bias": True,
            "vision_feature_select_strategy": "default", "dtype": "float32", "minllava": model.meta}
    assert {k: config.get(k) for k in want} == want
    assert config["vision_config"]["model_type"] == "clip_vision_model" and config["text_config"]["model_type"] == "llama"
    processor = json.loads((folder / "processor_config.json").read_text())
    assert (processor["patch_size"], processor["num_additional_image_tokens"]) == (14, 1), "575 placeholders instead of 576"
    assert json.loads((folder / "preprocessor_config.json").read_text())["image_processor_type"] == "CLIPImageProcessor"


def picture(w, h, seed=0):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (h, w, 3), dtype=np.uint8))


def both_ways(model, folder, template, turns):
    """Our prompt, and AutoProcessor's ids and pixels of the same conversation. A part of a turn is a text or a picture."""
    theirs, ours, pictures = [], [], []
    for i, turn in enumerate(turns):
        parts = [turn] if isinstance(turn, str) else turn
        content = [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image", "image": p} for p in parts]
        theirs.append({"role": ("user", "assistant")[i % 2], "content": content})
        ours.append({"from": ("human", "gpt")[i % 2], "value": "\n".join(p if isinstance(p, str) else IMAGE for p in parts)})
        pictures += [p for p in parts if not isinstance(p, str)]
    theirs = AutoProcessor.from_pretrained(folder).apply_chat_template(
        theirs, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt")
    ours = prompt(ours, pictures, model.tokenizer, TEMPLATES[template], model.view)
    return ours, theirs["input_ids"][0].tolist(), theirs["pixel_values"]


CONVERSATIONS = [[[picture(37, 53), "What is this?"], "A cat, sir.", " Is it?  "],
                 [["How do", picture(200, 31), picture(28, 28), "differ?"]],
                 ["Hi", "Hello.", [picture(29, 300), "And\nthis?"], "A <dog> & \"co\".", [picture(28, 29, 1)]]]


@pytest.mark.parametrize("bos", [False, True], ids=["no BOS", "BOS"])
@pytest.mark.parametrize("template", ["llava_v0", "vicuna_v1", "chatml_direct"])
def test_AutoProcessor_makes_the_same_ids_and_pixels(template, bos, tmp_path):
    """Table 2 in other engines: the folder's chat template and processor give our prompt, bit for bit."""
    tokenizer = byte_tokenizer(("<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"))
    if bos:
        tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.chat_template = TEMPLATES[template].jinja()
    LLaVA(tiny_clip(), tiny_llm(), tokenizer).save_pretrained(tmp_path)
    model = LLaVA.from_pretrained(tmp_path)
    assert (model.tokenizer("a")["input_ids"][0] == 1) == bos
    for turns in CONVERSATIONS:
        ours, ids, pixels = both_ways(model, tmp_path, template, turns)
        assert ids == ours["input_ids"], f"\n{model.tokenizer.decode(ids)!r}\n{model.tokenizer.decode(ours['input_ids'])!r}"
        assert torch.equal(pixels, ours["X_v"]), "AutoProcessor's pixels differ from those that we train on"


# ---------------------------------------------------------------------------------------------------------------------
# Strictness


def edit(folder, weights=lambda state: None, **config):
    """Change the weights in the folder's file, and values of its config.json."""
    state = load_file(folder / "model.safetensors")
    weights(state)
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | config))


def assert_refused(folder, *words):
    with pytest.raises(ValueError) as error:
        LLaVA.from_pretrained(folder)
    message = str(error.value)
    assert all(word in message for word in (str(folder), *words)), f"the message should name {words} and the folder: {message}"
    assert len(message) < 1000, f"a message of {len(message)} characters is not one that is read"


def test_a_missing_key_is_an_error_that_names_it(saved):
    """No silent random weights: transformers warns and goes on."""
    edit(saved[1], lambda s: s.pop("language_model.model.norm.weight"))
    assert_refused(saved[1], "1 weights are missing", "language_model.model.norm.weight")


def test_a_left_over_key_is_an_error_that_names_it(saved):
    """A weight that the model does not have belongs to another model, e.g. LLaVA-NeXT's image_newline."""
    edit(saved[1], lambda s: s.update(image_newline=torch.zeros(48)))
    assert_refused(saved[1], "image_newline")


@pytest.mark.parametrize("key, found, needed", [("language_model.model.norm.weight", (47,), (48,)),
                                                ("multi_modal_projector.linear_1.weight", (48, 31), (48, 32)),
                                                ("multi_modal_projector.linear_2.weight", (47, 47), (48, 48))])
def test_a_wrong_shape_is_an_error_that_names_the_key_and_both_shapes(saved, key, found, needed):
    """The key as it is in the file, what was found and what is needed, in one ValueError."""
    edit(saved[1], lambda s: s.update({key: torch.eye(*found) if len(found) == 2 else torch.ones(found)}))
    assert_refused(saved[1], key, str(found), str(needed))


@pytest.mark.parametrize("key", ["weight", "bias"])
def test_a_second_projector_layer_is_refused(saved, key):
    """Eq. (1): W is one linear layer; an MLP's second layer must not be dropped on loading."""
    edit(saved[1], lambda s: s[f"multi_modal_projector.linear_2.{key}"].view(-1)[1].add_(1e-3))
    assert_refused(saved[1], "linear_2 is not the identity")


@pytest.mark.parametrize("change, words", [
    ({"projector_hidden_act": "relu"}, ("projector_hidden_act", "relu")),
    ({"vision_feature_select_strategy": "full"}, ("vision_feature_select_strategy", "full")),
    ({"vision_feature_layer": [-2, -1]}, ("vision_feature_layer", "-2, -1")),
    ({"image_token_index": 7}, ("image_token_index", "7", "259")),
    ({"model_type": "llava_next"}, ("model_type", "llava_next"))])
def test_a_config_that_means_another_model_is_refused(saved, change, words):
    """Sec. 4.1: one linear W, no CLS, one layer of CLIP, one <image> id; each would load and answer nonsense."""
    edit(saved[1], **change)
    assert_refused(saved[1], *words)


@pytest.mark.parametrize("part", ["clip", "llm"])
def test_a_folder_of_one_part_is_refused_as_what_it_is(tmp_path, part):
    """--model with a language model's folder: the message says so, instead of speaking of a projector."""
    (tiny_clip() if part == "clip" else tiny_llm()).save_pretrained(tmp_path)
    assert_refused(tmp_path, "model_type", {"clip": "clip_vision_model", "llm": "llama"}[part])


def test_a_folder_without_config_is_refused(saved, tmp_path):
    """An unfinished run, an empty folder, no folder."""
    os.remove(saved[1] / "config.json")
    for folder in (saved[1], tmp_path, tmp_path / "nowhere"):
        with pytest.raises(FileNotFoundError, match="config.json") as error:
            LLaVA.from_pretrained(folder)
        assert str(folder) in str(error.value)


def test_a_folder_without_weights_is_refused(saved):
    """config.json alone (a download that was cut off) is no model."""
    os.remove(saved[1] / "model.safetensors")
    assert_refused(saved[1], "80 weights are missing")


# ---------------------------------------------------------------------------------------------------------------------
# From the parts


def text_tokenizer():
    """A language model's tokenizer before LLaVA: 259 ids, no <image>, no padding token (as Llama)."""
    backend = json.loads(byte_tokenizer().backend_tokenizer.to_str())
    backend["added_tokens"] = [t for t in backend["added_tokens"] if t["content"] != IMAGE]
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(backend)), unk_token="<unk>", bos_token="<s>",
                                   eos_token="</s>")


@pytest.fixture
def vision(tmp_path):
    tiny_clip(seed=3).save_pretrained(tmp_path / "vision")
    return str(tmp_path / "vision")


def llm_folder(folder, **more):
    """(language model, its folder with the tokenizer)"""
    f_phi = tiny_llm(**more)
    f_phi.save_pretrained(folder)
    text_tokenizer().save_pretrained(folder)
    return f_phi, str(folder)


@pytest.mark.parametrize("kind", ["CLIPVisionModel", "CLIPModel"])
def test_g_is_read_from_a_vision_folder_and_from_a_full_CLIP(tmp_path, kind):
    """Sec. 4.1 "pre-trained CLIP visual encoder": openai/clip-vit-large-patch14 holds both towers; g is its vision half."""
    if kind == "CLIPModel":
        tower = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
        clip = CLIPModel(CLIPConfig(text_config=tower | {"vocab_size": 90, "max_position_embeddings": 9, "bos_token_id": 1,
                                                         "eos_token_id": 2, "pad_token_id": 0},
                                    vision_config=tower | {"image_size": 28, "patch_size": 14}))
        want = clip.vision_model
    else:
        want = clip = tiny_clip(seed=3)
    clip.save_pretrained(tmp_path / "clip")
    model = LLaVA.from_parts(str(tmp_path / "clip"), llm_folder(tmp_path / "llm")[1])
    X_v = torch.randn(2, 3, 28, 28)
    torch.testing.assert_close(model.g(X_v).last_hidden_state, want.eval()(X_v).last_hidden_state, atol=0, rtol=0)
    assert (model.N, model.view.size) == (4, 28)
    model.save_pretrained(tmp_path / "out")
    assert_same(model, LLaVA.from_pretrained(tmp_path / "out"))


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_a_full_vocabulary_grows_to_the_next_multiple_of_64(tmp_path, vision, tied):
    """Vicuna: 32,000 to 32,064 rows; the new ones are the mean of the old, which stay as they were, in both tables."""
    f_phi, llm = llm_folder(tmp_path / "llm", vocab_size=259, tied=tied)
    model = LLaVA.from_parts(vision, llm)
    assert (model.image_id, len(model.tokenizer), model.f_phi.config.vocab_size, model.tied) == (259, 260, 320, tied)
    for new, old in ((model.f_phi.get_input_embeddings().weight, f_phi.get_input_embeddings().weight),
                     (model.f_phi.get_output_embeddings().weight, f_phi.get_output_embeddings().weight)):
        assert new.shape == (320, 48), f"{tuple(new.shape)}: <image> needs a row, and engines want a multiple of 64"
        assert torch.equal(new[:259], old), "the old rows changed"
        torch.testing.assert_close(new[259:], old.mean(0).expand(61, 48), msg=lambda m: f"not the mean of the old rows: {m}")
    assert model.meta == {"vision": vision, "llm": llm, "aspect": "crop"} and model.tokenizer.pad_token == "<unk>"
    model.save_pretrained(tmp_path / "out")
    assert_same(model, LLaVA.from_pretrained(tmp_path / "out"))
    theirs, info = AutoModelForImageTextToText.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    torch.testing.assert_close(logits(model), logits(theirs.eval()), atol=1e-5, rtol=1e-5)


def test_spare_rows_are_used_before_the_vocabulary_grows(tmp_path, vision):
    """Qwen2 has hundreds of unused rows: nothing is resized, every weight is the language model's own."""
    f_phi, llm = llm_folder(tmp_path / "llm", vocab_size=270)
    model = LLaVA.from_parts(vision, llm)
    assert model.image_id == 259
    for name, value in f_phi.state_dict().items():
        assert torch.equal(model.f_phi.state_dict()[name], value), f"{name} changed although the vocabulary has room"


def test_W_is_new_and_its_start_is_a_matter_of_the_seed(tmp_path, vision):
    """Sec. 4.2 stage 1 starts from an untrained W; the same seed gives the same W, in the dtype that is asked for."""
    llm = llm_folder(tmp_path / "llm")[1]
    made = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        made.append(LLaVA.from_parts(vision, llm, dtype=torch.bfloat16))
    a, b, c = (m.W.weight for m in made)
    assert torch.equal(a, b) and not torch.equal(a, c) and a.any()
    assert {p.dtype for p in made[0].parameters()} == {torch.bfloat16}


def assert_part_refused(vision, llm, *words):
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        LLaVA.from_parts(vision, llm)
    message = str(error.value)
    assert all(word in message for word in words), f"the message should name {words}: {message[:500]}"
    assert len(message) < 1000, f"a message of {len(message)} characters is not one that is read: {message[:200]}..."


def test_a_CLIP_folder_as_llm_is_refused(tmp_path, vision):
    """Swapped flags are said in one line that names the flag and the folder."""
    assert_part_refused(vision, vision, "--llm", vision)


def test_a_language_model_as_vision_is_refused(tmp_path, vision):
    """Swapped flags, the other way round."""
    llm = llm_folder(tmp_path / "llm")[1]
    assert_part_refused(llm, llm, "--vision", llm)


@pytest.mark.parametrize("flag", ["--vision", "--llm"])
def test_a_part_that_is_not_there_is_refused(tmp_path, vision, flag):
    """A mistyped path: its flag and the path, not a lecture on repository ids; an empty folder likewise."""
    llm = llm_folder(tmp_path / "llm")[1]
    (tmp_path / "empty").mkdir()
    for path in (str(tmp_path / "nowhere"), str(tmp_path / "empty")):
        assert_part_refused(*((path, llm) if flag == "--vision" else (vision, path)), flag, path)


def test_a_part_with_missing_weights_is_refused(tmp_path, vision):
    """No silent random weights: a file that was cut short by one tensor is named, on either side."""
    llm = llm_folder(tmp_path / "llm")[1]
    for folder, flag, key in ((llm, "--llm", "model.norm.weight"), (vision, "--vision", "pre_layrnorm.weight")):
        state = load_file(f"{folder}/model.safetensors")
        whole = dict(state)
        del state[next(k for k in state if k.endswith(key))]
        save_file(state, f"{folder}/model.safetensors", metadata={"format": "pt"})
        assert_part_refused(vision, llm, flag, folder, key)
        save_file(whole, f"{folder}/model.safetensors", metadata={"format": "pt"})


def test_a_part_with_a_wrong_shape_is_refused(tmp_path, vision):
    """A config.json that does not belong to the weights beside it."""
    llm = llm_folder(tmp_path / "llm")[1]
    state = load_file(f"{llm}/model.safetensors")
    save_file(state | {"model.norm.weight": torch.ones(47)}, f"{llm}/model.safetensors", metadata={"format": "pt"})
    assert_part_refused(vision, llm, "--llm", llm, "model.norm.weight")


# ---------------------------------------------------------------------------------------------------------------------
# Vicuna: tokenizer.model and .bin files, no tokenizer.json


def special(text):
    return {"__type": "AddedToken", "content": text} | dict.fromkeys(["lstrip", "normalized", "rstrip", "single_word"], False)


def vicuna_folder(folder, legacy=None):
    """What lmsys/vicuna-* ship, small: a sentencepiece model of 384 pieces, its tokenizer_config.json, a .bin file.

    `legacy` is False in v1.5's tokenizer_config.json and absent in v1.1's and v1.3's.
    """
    f_phi = tiny_llm(vocab_size=384)
    f_phi.save_pretrained(folder)
    state = load_file(folder / "model.safetensors")
    torch.save(state | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(6)}, folder / "pytorch_model.bin")
    os.remove(folder / "model.safetensors")
    with open(folder / "tokenizer.model", "wb") as f:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([TEMPLATES["vicuna_v1"].first + "What is in it? ASSISTANT: A cat sits on the mat."] * 20),
            model_writer=f, vocab_size=384, model_type="bpe", byte_fallback=True, character_coverage=1.0, minloglevel=2,
            normalization_rule_name="identity", remove_extra_whitespaces=False)
    config = {"add_bos_token": True, "add_eos_token": False, "bos_token": special("<s>"), "eos_token": special("</s>"),
              "unk_token": special("<unk>"), "pad_token": None, "clean_up_tokenization_spaces": False, "model_max_length": 2048,
              "padding_side": "right", "sp_model_kwargs": {}, "tokenizer_class": "LlamaTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config | ({} if legacy is None else {"legacy": legacy})))
    return f_phi, str(folder), sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))


@pytest.mark.parametrize("legacy", [None, False, True])
def test_a_vicuna_folder_becomes_a_LLaVA(tmp_path, vision, legacy):
    """Sec. 4.1 "we choose Vicuna as our LLM": its ids are sentencepiece's behind one <s>, before and after saving."""
    (tmp_path / "vicuna").mkdir()
    f_phi, llm, pieces = vicuna_folder(tmp_path / "vicuna", legacy)
    model = LLaVA.from_parts(vision, llm)
    for name, value in f_phi.state_dict().items():
        assert torch.equal(model.f_phi.state_dict()[name][:len(value)], value), f"{name} is not what the .bin file holds"
    assert (model.image_id, model.f_phi.config.vocab_size, model.eos_ids) == (384, 448, {2})
    assert model.tokenizer.pad_token == "<unk>" and model.tokenizer.bos_token_id == 1
    for text in ("What is this?", "\nWhat is", "a  b", "日本, Grüße!", "ASSISTANT: 3"):
        assert model.tokenizer(text)["input_ids"] == [1] + pieces.encode(text), f"{text!r} has not the ids that Vicuna knows"
    assert model.tokenizer("A cat.</s>")["input_ids"] == [1] + pieces.encode("A cat.") + [2]
    model.save_pretrained(tmp_path / "out")
    assert_same(model, LLaVA.from_pretrained(tmp_path / "out"))


def test_AutoProcessor_agrees_for_vicuna_but_for_the_blank_behind_the_image(tmp_path, vision):
    """transformers 5 drops sentencepiece's blank behind <image>; released LLaVAs were trained with it, so ours keeps it."""
    (tmp_path / "vicuna").mkdir()
    model = LLaVA.from_parts(vision, vicuna_folder(tmp_path / "vicuna", False)[1])
    model.tokenizer.chat_template = TEMPLATES["vicuna_v1"].jinja()
    model.save_pretrained(tmp_path / "out")
    model = LLaVA.from_pretrained(tmp_path / "out")
    blank = model.tokenizer.convert_tokens_to_ids("▁")
    for turns in CONVERSATIONS:
        ours, got, pixels = both_ways(model, tmp_path / "out", "vicuna_v1", turns)
        ids = ours["input_ids"]
        behind = [i for i, x in enumerate(ids) if x == blank and ids[i - 1] == model.image_id]
        assert behind, "the blank that released checkpoints saw behind an image is gone"
        want = [x for i, x in enumerate(ids) if i not in behind]
        assert got == want, f"\n{model.tokenizer.convert_ids_to_tokens(got)}\n{model.tokenizer.convert_ids_to_tokens(want)}"
        assert torch.equal(pixels, ours["X_v"])


def test_a_bare_tokenizer_model_is_read_as_sentencepiece_or_refused(tmp_path, vision):
    """Without tokenizer_config.json nothing says <s> and blanks; a guess without them is not what the model was trained on."""
    (tmp_path / "llama").mkdir()
    _, llm, pieces = vicuna_folder(tmp_path / "llama")
    os.remove(tmp_path / "llama" / "tokenizer_config.json")
    try:
        model = LLaVA.from_parts(vision, llm)
    except ValueError as error:
        assert "tokenizer_config.json" in str(error) and llm in str(error)
    else:
        assert model.tokenizer("What is this?")["input_ids"] == [1] + pieces.encode("What is this?")
