"""
Other people's checkpoints: folders of `liuhaotian/llava-*` to ours, and back.

    python -m extras.convert --model liuhaotian/llava-v1.5-7b --out OUT      a model: v1, 1.5, 1.6
    python -m extras.convert --model DIR --llm lmsys/vicuna-7b-v1.5 --out OUT
            a LoRA folder, merged; or the folder of a stage 1, which holds mm_projector.bin alone
    python -m extras.convert --model DIR --delta --llm huggyllama/llama-7b --out OUT
            a v0 delta, and the LLaMA that it is for
    python -m extras.convert --to_original --model OURS --out OUT            back
    python -m extras.convert --as_mlp --model OURS --out OUT
            a linear W as two layers that compute the same, for engines that know no other
    python -m extras.convert --head_dim 32 --model OURS --out OUT
            heads wider by zeros, which compute the same, for engines that have no kernel of theirs

`train.py --init OUT` and `sample.py --model OUT` go on from there. A name, shape or setting that is
not understood is an error before anything is written. A weight is read when its file is written, so
memory peaks at about one file (--shard), plus CLIP where the checkpoint has none inside, or what
--as_mlp and --head_dim change. Tested on small made-up folders of these layouts, never on a
released one.
"""
import json
import math
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import snapshot_download, split_torch_state_dict_into_shards
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForImageTextToText, CLIPVisionConfig

from model import LLaVA
from parts import checkpoints
from parts.checkpoints import (
    LINEAR_1,
    LINEAR_2,
    UNUSED,
    check_finite,
    check_new,
    check_weights,
    has_file,
    hf_keys,
    load_tensors,
    named_errors,
    weight_files,
)
from parts.files import IMAGE, read_value, run_main, typed, typed_flags, write_json
from parts.lora import merge
from parts.templates import TEMPLATES, check_template, template_for
from parts.towers import CLIPTower


@dataclass(frozen=True)
class Config:
    model: str                   # what to convert: a folder or a hub id
    out: str                     # a new folder
    llm: str = None              # under an adapter, a projector or a delta; back: its tokenizer
    vision: str = None           # CLIP, a folder or a hub id; else the one that config.json names
    delta: bool = False          # --model is a v0 delta, to be added to --llm
    to_original: bool = False    # from ours, or any llava-hf folder, to the original's layout
    as_mlp: bool = False         # ours again, its linear W as the two layers of LLaVA-1.5
    head_dim: int = None         # ours again, its heads this wide: a multiple of what they are
    template: str = "auto"       # auto: from config.json and the tokenizer
    shard: str = "2GB"           # size of a written file; about as much memory is needed

    CHOICES = {"template": ["auto", *TEMPLATES]}


# -----------------------------------------------------------------------------
# Names: ours, which are llava-hf's, and the original's

PREFIXES = {"language_model.model.": "model.", "language_model.lm_head.": "lm_head.",
            "image_newline": "model.image_newline"}
TOWER = {"vision_tower.": "model.vision_tower.vision_tower."}
MLP = {LINEAR_1: "model.mm_projector.0.", LINEAR_2: "model.mm_projector.2."}
LINEAR = {LINEAR_1: "model.mm_projector."}       # our linear_2 is the identity then
PEFT_PREFIX = re.compile(r"^(base_model\.model\.|model\.(?=model\.))")   # of training with LoRA
EMBEDDING = "language_model.model.embed_tokens.weight"
HEAD = "language_model.lm_head.weight"


def original_names(names, mlp, tower):
    """{our name: the original's} of the weights that it has; with CLIP's if `tower`."""
    prefixes = PREFIXES | (MLP if mlp else LINEAR)
    if tower:
        prefixes |= TOWER
    return {name: theirs + name.removeprefix(ours) for name in names
            for ours, theirs in prefixes.items() if name.startswith(ours)}


# -----------------------------------------------------------------------------
# Tables: a checkpoint as {name: Weight}, of which nothing is read before it is written


class Weight(NamedTuple):
    meta: torch.Tensor           # its shape and dtype, without memory
    read: Callable               # () -> the tensor


def in_file(path, name, value):
    """A weight of a file. Each read maps the file anew, so that its pages go with the tensor."""
    def read():
        return load_tensors(path, name)[name].detach()
    return Weight(value.to("meta"), read)


def table_of(files):
    """The table of some files."""
    table = {}
    for path in files:
        tensors = load_tensors(path).items()
        new = {name: in_file(path, name, v) for name, v in tensors if not UNUSED.search(name)}
        check_new(new, table, path)
        table |= new
    return table


def table_in_memory(state):
    """The table of tensors that are there already."""
    return {name: Weight(value.to("meta"), value.detach) for name, value in state.items()}


def shapes_of(table):
    return {name: weight.meta for name, weight in table.items()}


def weights_of_config(config):
    """{our name: meta tensor} of every weight of transformers' model of a LlavaConfig."""
    with torch.device("meta"), named_errors("config.json describes no model"):
        wanted = hf_keys(AutoModelForImageTextToText.from_config(config).state_dict())
    if config.text_config.tie_word_embeddings:
        del wanted[HEAD]
    return wanted


def write_table(table, folder, shard):
    """The table as model.safetensors, or as files of at most `shard` ("2GB") and their index."""
    split = split_torch_state_dict_into_shards(shapes_of(table), max_shard_size=shard)
    folder.mkdir(parents=True)
    for file, names in tqdm(split.filename_to_tensors.items(), disable=not sys.stderr.isatty()):
        tensors = {name: table[name].read().contiguous() for name in names}
        check_finite(tensors, f"{folder / file} is not written")
        save_file(tensors, folder / file, {"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(folder / "model.safetensors.index.json", index)


def computed(function, *weights):
    """A weight that is a function of others."""
    def read():
        return function(*[weight.read() for weight in weights])
    return Weight(function(*[weight.meta for weight in weights]), read)


def resized(value, rows):
    """A tensor with this many rows: cut, or grown by the mean, as by `grow_vocabulary`."""
    mean = value.float().mean(0).to(value.dtype)
    return torch.cat([value[:rows], mean.expand(max(0, rows - len(value)), -1)])


def resize_vocabulary(table, rows):
    """The table with so many rows, one a token, in embedding and head."""
    resize = partial(resized, rows=rows)
    return table | {n: computed(resize, table[n]) for n in table.keys() & {EMBEDDING, HEAD}}


def added(delta, base):
    """delta + base; the delta may have rows of added tokens behind the base's."""
    value = delta.clone()
    value[:len(base)] += base.to(value.dtype)
    return value


def add_delta(delta, base, where):
    """v0: delta + LLaMA. What LLaMA lacks (projector, added tokens) is in the delta as it is."""
    shapes = {}
    for name, weight in delta.items():
        if "mm_projector" not in name:
            rows = len(base[name].meta) if name in base else None
            shapes[name] = weight.meta[:rows]
    check_weights(shapes, shapes_of(base), f"{where}: delta on --llm",
                  "pass the LLaMA that the delta is for")
    return delta | {name: computed(added, delta[name], old) for name, old in base.items()}


def add_lora(table, folder):
    """The table with the LoRA adapter of a folder merged."""
    settings = checkpoints.adapter_settings(folder)
    r = settings["r"]
    path = next(folder.glob("adapter_model.*"), folder / "adapter_model.safetensors")
    found = {PEFT_PREFIX.sub("", key): weight for key, weight in table_of([path]).items()}
    layers = {key.split(".lora_")[0] for key in found}
    layers &= {name.removesuffix(".weight") for name in table}
    with named_errors(f"{path}: rank {r}"):
        weights = {layer: table[f"{layer}.weight"].meta for layer in layers}
        wanted = checkpoints.lora_weights(weights, r)
    check_weights(shapes_of(found), wanted, f"{path}: rank {r}, on --llm",
                  "pass the language model that it was trained on")
    merge_scaled = partial(merge, scale=settings["lora_alpha"] / r)
    for layer in layers:
        A, B = found[f"{layer}.lora_A.weight"], found[f"{layer}.lora_B.weight"]
        table[f"{layer}.weight"] = computed(merge_scaled, table[f"{layer}.weight"], A, B)
    return table


# -----------------------------------------------------------------------------
# Folders

TOKENIZER_FILES = ["tokenizer.model", "tokenizer.json", "tokenizer_config.json",
                   "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt"]
WEIGHT_FILES = ["model*.safetensors", "pytorch_model*.bin", "mm_projector.bin", "adapter_model.*",
                "non_lora_trainables.bin"]


def local_folder(name, flag):
    """A folder as it is; a hub id's files, downloaded."""
    if os.path.isdir(name):
        return Path(name)
    with named_errors(f"--{flag} {name}: neither a folder nor a hub id that can be downloaded"):
        files = ["*.json", *TOKENIZER_FILES, *WEIGHT_FILES]
        return Path(snapshot_download(name, allow_patterns=files))


def load_original_tokenizer(folder):
    """The tokenizer of an original folder or of a language model, with <image>.

    It is read away from config.json: for a model_type "llava", transformers would read a
    tokenizer.model without its blanks.
    """
    if not has_file(folder, "tokenizer_config.json"):
        raise FileNotFoundError(f"{folder}: no tokenizer_config.json, which says what <s> and "
                                "blanks are")
    with tempfile.TemporaryDirectory() as alone:
        for file in TOKENIZER_FILES:
            if has_file(folder, file):
                shutil.copy(folder / file, alone)
        tokenizer = checkpoints.load_tokenizer(alone)
    tokenizer.vocab_file = str(folder / "tokenizer.model")       # the copy is gone
    return tokenizer


def find_source(args, folder):
    """What --model is, put together with its base, --llm, where it is only a part.

    Returns (table under the original's names, the folder of its config.json, that of its tokenizer,
    the stage that made it).
    """
    files = weight_files(folder)
    is_lora = has_file(folder, "adapter_config.json")
    rest = folder / ("non_lora_trainables.bin" if is_lora else "mm_projector.bin")
    if not files and not rest.is_file():
        raise FileNotFoundError(f"{folder}: no LLaVA folder; it has neither model*.safetensors or "
                                f"pytorch_model*.bin nor {rest.name}")
    part = "a whole model"
    if args.delta:
        part = "a delta"
    elif is_lora:
        part = "a LoRA adapter"
    elif not files:
        part = "a projector"
    if part == "a whole model":
        if args.llm:
            raise ValueError(f"{folder} is {part}: leave out --llm, or say --delta if it is one")
        return table_of(files), folder, folder, 2
    if not args.llm:
        raise ValueError(f"{folder} is {part} without its base: pass --llm, the language model "
                         "that it was trained on")

    base = local_folder(args.llm, "llm")
    table = table_of(weight_files(base))
    if part == "a delta":
        table = add_delta(table_of(files), table, folder)
    else:
        new = {PEFT_PREFIX.sub("", name): weight for name, weight in table_of([rest]).items()}
        check_new(new, table, f"{rest} and --llm {base}")
        table |= new
    if is_lora:
        table = add_lora(table, folder)
    config_folder = folder if has_file(folder, "config.json") else base
    tokenizer_folder = folder if has_file(folder, "tokenizer_config.json") else base
    return table, config_folder, tokenizer_folder, 1 if part == "a projector" else 2


# -----------------------------------------------------------------------------
# Configurations

# A language model's kind, and what the original calls a LLaVA of it: model_type, architecture.
KINDS = {"llama": ("llava_llama", "LlavaLlamaForCausalLM"),
         "mistral": ("llava_mistral", "LlavaMistralForCausalLM"),
         "qwen2": ("llava_qwen", "LlavaQwenForCausalLM")}
KIND_OF = {theirs: kind for kind, (theirs, _) in KINDS.items()} | {kind: kind for kind in KINDS}
KIND_OF["llava"] = "llama"       # v1
CLIP_KINDS = ["clip", "clip_vision_model"]           # the original's towers, by model_type
OUR_ASPECT = {"square": "crop", "pad": "pad", "anyres": "anyres"}    # of image_aspect_ratio
ORIGINAL_ASPECT = {"crop": "square", "pad": "pad", "anyres": "anyres", "anyres_hf": "anyres",
                   "anyres_4": "anyres"}


def check_setting(folder, name, found, allowed):
    """Raises ValueError if a value in config.json would be another model than ours."""
    if found not in list(allowed):
        raise ValueError(f"{folder}: {name} in config.json is {found!r}; what can be converted "
                         f"has one of {list(allowed)}")


def original_view(raw, folder):
    """aspect and tiling as an original's config.json says them; `check_meta` checks the latter."""
    ratio = raw.get("image_aspect_ratio") or "square"
    check_setting(folder, "image_aspect_ratio", ratio, OUR_ASPECT)
    if ratio != "anyres":
        return {"aspect": OUR_ASPECT[ratio], "tiling": None}
    merge_type = raw.get("mm_patch_merge_type", "flat")
    check_setting(folder, "mm_patch_merge_type", merge_type, ["spatial_unpad"])
    pinpoints = json.dumps(raw.get("image_grid_pinpoints"))      # [[336, 672], ...], or it as text
    sides = [int(side) for side in re.findall(r"\d+", pinpoints)]
    pairs = [list(pair) for pair in zip(sides[::2], sides[1::2], strict=True)]   # (width, height)
    if raw["minllava"].get("aspect") == "anyres_hf":             # of a folder that was ours
        return {"aspect": "anyres_hf", "tiling": {"pinpoints": [pair[::-1] for pair in pairs]}}
    return {"aspect": "anyres", "tiling": {"pinpoints": pairs}}


def our_config(raw, vision_config, mlp, dtype, folder):
    """The LlavaConfig of an original's config.json."""
    model_type = raw.get("model_type")
    if "text_config" in raw:
        model_type = "llava-hf's, which is ours already"
    check_setting(folder, "model_type", model_type, KIND_OF)
    feature = raw.get("mm_vision_select_feature", "patch")
    check_setting(folder, "mm_vision_select_feature", feature, ["patch"])
    layer = raw.get("mm_vision_select_layer", -2)
    typed(layer, int, f"{folder}: mm_vision_select_layer in config.json")
    view = original_view(raw, folder)
    kind = KIND_OF[model_type]
    known = AutoConfig.for_model(kind).to_dict().keys() | {"rope_theta", "rope_scaling"}
    known -= {"model_type", "architectures", "transformers_version", "dtype"}
    projector = "mlp2x_gelu" if mlp else "linear"
    with named_errors(f"{folder}: config.json"):
        text_config = AutoConfig.for_model(kind, **{k: v for k, v in raw.items() if k in known})
        config = checkpoints.llava_config(vision_config, text_config, dtype, layer, projector, view)
        checkpoints.check_supported(config)
    return config


def our_meta(args, raw, config, tokenizer, stage):
    """What we add to config.json: template, stage, and where the model came from."""
    # what convert_to_original left; --template wins
    old = dict(raw["minllava"]) if args.template == "auto" else {}
    chat = old.get("chat", args.template)
    if chat == "auto":                                   # OURS: by the vocabulary
        chat = template_for(config.text_config, tokenizer).name
        if "[PAD]" in tokenizer.get_vocab():             # only v0 added it
            chat = "llava_v0"
        print(f"template {chat}, guessed from the tokenizer; the folder does not say, and "
              "--template would")
    meta = {"template": "plain" if stage == 1 else chat, "chat": chat, "stage": stage,
            "recipe": None, **old, "init": args.model}
    if raw.get("mm_use_im_start_end"):
        meta["im_start_end"] = True
        print("it was trained on <im_start><image><im_end> where others have <image>; its "
              "questions should have them too")
    return meta | config.minllava                        # aspect and tiling are config.json's own


# -----------------------------------------------------------------------------
# The two directions


def convert_to_ours(args):
    """Convert a folder of the original's."""
    folder = local_folder(args.model, "model")
    table, config_folder, tokenizer_folder, stage = find_source(args, folder)
    raw = read_value(config_folder / "config.json")
    raw["minllava"] = typed(raw.get("minllava") or {}, dict, f"{folder}: minllava in config.json")
    vision = args.vision or raw.get("mm_vision_tower")
    if not vision:
        raise ValueError(f"{folder}: no config.json names its CLIP (mm_vision_tower); pass "
                         "--vision")
    check_setting(vision, "model_type", checkpoints.kind_of(vision, "vision"), CLIP_KINDS)
    with named_errors(f"--vision {vision}: no CLIP can be loaded from there"):
        vision_config = CLIPVisionConfig.from_pretrained(vision)
    mlp = "model.mm_projector.0.weight" in table
    inside = any(name.startswith(TOWER["vision_tower."]) for name in table)
    weight = table.get("model.embed_tokens.weight") or next(iter(table.values()))
    dtype = weight.meta.dtype
    config = our_config(raw, vision_config, mlp, dtype, folder)

    wanted = weights_of_config(config)
    names = original_names(wanted, mlp, inside)
    original = {theirs: wanted[ours] for ours, theirs in names.items()}
    check_weights(shapes_of(table), original, folder,
                  "pass the --vision and --llm that it was trained with")
    ours = {name: table[theirs] for name, theirs in names.items()}
    if not inside:
        g = checkpoints.load_part(CLIPTower, vision, dtype, "vision")
        state = {f"vision_tower.{name}": value for name, value in g.state_dict().items()}
        ours |= table_in_memory(hf_keys(state))
    if not mlp:
        bias = ours[LINEAR_1 + "bias"].meta
        ours |= table_in_memory(checkpoints.identity_layer(len(bias), bias.dtype))

    tokenizer = load_original_tokenizer(tokenizer_folder)
    rows = config.text_config.vocab_size
    if len(tokenizer) > rows:                            # no spare row for <image>
        config.text_config.vocab_size = -(-len(tokenizer) // 64) * 64
        ours = resize_vocabulary(ours, config.text_config.vocab_size)
    config.image_token_index = tokenizer.convert_tokens_to_ids(IMAGE)
    config.pad_token_id = tokenizer.pad_token_id
    llm = args.model if tokenizer_folder == folder else args.llm
    config.minllava = our_meta(args, raw, config, tokenizer, stage) | {
        "vision": vision, "vision_inside": inside, "llm": llm, "vocab_size": rows}
    checkpoints.check_meta(config.minllava, vision_config, bool(config.minllava["tiling"]), folder)
    check_template(TEMPLATES[config.minllava["template"]], tokenizer)

    write_table(ours, Path(args.out), args.shard)
    ends = config.text_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
    checkpoints.save_settings(args.out, tokenizer, ends, vision_config, config.minllava)
    config.save_pretrained(args.out)
    print(f"{args.out}: {len(ours)} weights, {config.minllava}")


def convert_to_original(args):
    """Convert a folder of ours, or any llava-hf folder, to the original's layout."""
    folder = local_folder(args.model, "model")
    config, meta = checkpoints.load_settings(folder)
    ours = getattr(config, "minllava", None) or {}
    gated_layers = getattr(config.vision_config, "gated_layers", 0)
    check_setting(folder, "text_config.model_type", config.text_config.model_type, KINDS)
    check_setting(folder, "vision_config.model_type", config.vision_config.model_type, CLIP_KINDS)
    check_setting(folder, "minllava.aspect", meta["aspect"], ORIGINAL_ASPECT)
    check_setting(folder, "vision_config.gated_layers", gated_layers, [0])
    vision, llm = args.vision or meta.get("vision"), args.llm or meta.get("llm")
    if not vision or not llm:
        raise ValueError(f"{folder}: config.json does not say what it was made of: pass --vision, "
                         "the CLIP that the original will name, and --llm, for its tokenizer")
    mlp = config.projector_hidden_act == "gelu"
    table = hf_keys(table_of(weight_files(folder)))
    check_weights(shapes_of(table), weights_of_config(config), folder, "pass a whole folder")
    if not mlp:
        names = [LINEAR_2 + "weight", LINEAR_2 + "bias"]
        checkpoints.check_identity({name: table[name].read() for name in names}, folder)

    image_id, rows = config.image_token_index, config.text_config.vocab_size
    if rows == -(-(image_id + 1) // 64) * 64:            # it was grown for <image>
        rows = image_id
    rows = meta.get("vocab_size", rows)
    inside = bool(meta["tiling"]) or meta.get("vision_inside", "vision" not in meta)
    table = resize_vocabulary(table, rows)
    names = original_names(table, mlp, inside)
    llm = local_folder(llm, "llm")
    vocabularies = []
    for tokenizer in (checkpoints.read_tokenizer(folder), load_original_tokenizer(llm)):
        ids = tokenizer.get_vocab().items()
        vocabularies.append({token: i for token, i in ids if i < rows})
    if vocabularies[0] != vocabularies[1]:
        raise ValueError(f"--llm {llm}: its tokenizer is not that of {folder}; pass the language "
                         "model that it was made of")

    original = original_config(config, meta, ours, rows) | {
        "mm_vision_tower": vision, "unfreeze_mm_vision_tower": inside}
    table = {theirs: table[name] for name, theirs in names.items()}
    write_table(table, Path(args.out), args.shard)
    for path in [*(llm / file for file in TOKENIZER_FILES), folder / "generation_config.json"]:
        if path.is_file():
            shutil.copy(path, args.out)
    write_json(Path(args.out) / "config.json", original)
    print(f"{args.out}: {len(names)} weights in the original's layout")


def original_config(config, meta, ours, rows):
    """config.json as the original has it; what we add to ours stays in it."""
    text = config.text_config.to_dict()
    rope = text.pop("rope_parameters")                   # two settings in transformers 4
    theta, scaling = rope.pop("rope_theta"), rope.pop("rope_type")
    del text["dtype"]
    model_type, architecture = KINDS[config.text_config.model_type]
    original = text | {
        "model_type": model_type, "architectures": [architecture], "vocab_size": rows,
        "torch_dtype": str(config.dtype).removeprefix("torch."), "rope_theta": theta,
        "rope_scaling": None if scaling == "default" else rope | {"type": scaling},
        "mm_hidden_size": config.vision_config.hidden_size, "use_mm_proj": True,
        "mm_projector_type": checkpoints.projector_of(config),
        "mm_vision_select_layer": config.vision_feature_layer, "mm_vision_select_feature": "patch",
        "mm_use_im_start_end": meta.get("im_start_end", False), "mm_use_im_patch_token": False,
        "image_aspect_ratio": ORIGINAL_ASPECT[meta["aspect"]],
        "minllava": ours | {"aspect": meta["aspect"]}}
    if meta["tiling"]:                                   # (width, height), as the original reads
        pinpoints = [pair[::-1] for pair in checkpoints.hf_pinpoints(meta)]
        original |= {"image_grid_pinpoints": pinpoints, "mm_patch_merge_type": "spatial_unpad"}
    return original


# -----------------------------------------------------------------------------
# Other forms of a model of ours that compute the same


def two_layers(W):
    """Two layers as LLaVA-1.5 has them that compute W z + b, as far as rounding allows.

    gelu(x) - gelu(-x) = x, of either gelu: the first gives z and -z, and the second is [W, -W].
    Raises ValueError where z and -z, 2 D_v numbers, do not fit in its D.
    """
    D, D_v = W.weight.shape
    if 2 * D_v > D:
        raise ValueError(f"W is {D_v} -> {D}; as two layers it would need D >= 2 D_v, which a 7B "
                         "model behind CLIP ViT-L has")
    first = nn.Linear(D_v, D)
    first.weight[:] = torch.cat([torch.eye(D_v), -torch.eye(D_v), torch.zeros(D - 2 * D_v, D_v)])
    first.bias.zero_()
    second = nn.Linear(D, D)
    second.weight[:] = torch.cat([W.weight, -W.weight, torch.zeros(D, D - 2 * D_v)], 1)
    second.bias[:] = W.bias
    return nn.Sequential(first, nn.GELU(), second)


def spread(value, times, axis=0):
    """A tensor with `times` rows (axis 0), or columns, for each of its own: it, and then zeros."""
    shape = list(value.shape)
    shape[axis] *= times
    wide = value.new_zeros(shape)
    wide.movedim(axis, 0)[::times] = value.movedim(axis, 0)
    return wide


def widen_heads(f_phi, head_dim):
    """Give f_phi heads of width d' = head_dim, `times` d, that compute what its own do.

    Number i of a head goes to `times` i. There the rotary embedding turns it by the same angle as
    before, since theta^(-2 times i / d') = theta^(-2 i / d), and beside the same partner, half a
    head away. Scores are divided by sqrt(d') instead of sqrt(d), so q is larger by sqrt(times):
    exactly by 2 for 4 times the width, within rounding for others. Raises ValueError if it cannot.
    """
    config = f_phi.config
    check_setting("--head_dim", "text_config.model_type", config.model_type, KINDS)
    rope_type = config.rope_parameters["rope_type"]
    check_setting("--head_dim", "text_config.rope_parameters.rope_type", rope_type, ["default"])
    old = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if head_dim < old or head_dim % old:
        raise ValueError(f"--head_dim {head_dim}: the heads of this model are {old} wide; pass a "
                         "multiple of that")
    times = head_dim // old
    for name, p in f_phi.named_parameters():
        if re.search(r"\.[qkv]_proj\.", name):
            p.data = spread(p.data, times)
        elif ".o_proj." in name:
            p.data = spread(p.data, times, axis=1)
        if ".q_proj." in name:
            p.data *= math.sqrt(times)
    config.head_dim = head_dim


@torch.no_grad()
def convert_to_engine(args):
    """Write a folder of ours again in a form that computes the same and that more engines take."""
    folder = local_folder(args.model, "model")
    model = LLaVA.from_pretrained(folder, dtype=None)    # mapped
    dtype = model.f_phi.dtype
    if args.as_mlp:
        check_setting(folder, "projector_hidden_act", model.projector, ["linear"])
        model.W = two_layers(model.W)
        model.projector = "mlp2x_gelu"
    if args.head_dim is not None:
        widen_heads(model.f_phi, args.head_dim)
    checkpoints.save(model, args.out, dtype, shard=args.shard)
    print(f"{args.out}: W {model.projector}, heads of "
          f"{getattr(model.f_phi.config, 'head_dim', None)}")


def main(argv=None):
    args = Config(**typed_flags(Config, argv, __doc__.strip().splitlines()[0]))
    if os.path.exists(args.out):
        raise ValueError(f"--out {args.out} exists; name a new folder")
    again = args.as_mlp or args.head_dim is not None
    if again and args.to_original:
        raise ValueError("--to_original is a conversion of its own; do it behind the other")
    if again:
        convert_to_engine(args)
    elif args.to_original:
        convert_to_original(args)
    else:
        convert_to_ours(args)


if __name__ == "__main__":
    run_main(main)
