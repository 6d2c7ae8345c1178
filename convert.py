"""
Other people's checkpoints: `liuhaotian/llava-*` folders to ours and back.

    python convert.py --model liuhaotian/llava-v1.5-7b --out OUT               a whole model: v1, 1.5, 1.6
    python convert.py --model DIR --llm lmsys/vicuna-7b-v1.5 --out OUT         a LoRA folder, merged; or a stage 1 folder, which
                                                                               holds mm_projector.bin alone
    python convert.py --model DIR --delta --llm huggyllama/llama-7b --out OUT  a v0 delta, and the LLaMA that it is for
    python convert.py --to_original --model OURS --out OUT                     back

`train.py --init OUT` and `sample.py --model OUT` go on from there. A name, shape or setting that is not understood is an
error before anything is written. Weights are read when their shard is written: memory peaks at about one shard (--shard;
114 MB above the imports for 578 MB of weights in shards of 100 MB), plus CLIP where the checkpoint has none inside.
Tested on small made-up folders of these layouts, never on a released one.
"""
import functools
import json
import math
import os
import pickle
import re
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download, split_torch_state_dict_into_shards
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm
from transformers import (AutoConfig, AutoModelForImageTextToText, AutoTokenizer, CLIPVisionConfig, LlavaConfig,
                          LlavaNextConfig)

import tiles
from data import TEMPLATES, check_template, template_for
from checkpoint import COMPUTED, hf_keys, load_part, load_settings, load_tokenizer, save_settings, view_from
from gated import VisionTower
from records import IMAGE, run_command, typed_flags


@dataclass(frozen=True)
class Config:
    model: str                   # what to convert: a folder or a hub id
    out: str                     # a new folder
    llm: str = None              # the language model under an adapter, a projector or a delta; --to_original: its tokenizer
    vision: str = None           # CLIP, a folder or a hub id; else the one that config.json names
    delta: bool = False          # --model is a v0 delta, to be added to --llm
    to_original: bool = False    # from ours, or any llava-hf folder, to the original's layout
    template: str = "auto"       # auto: from config.json and the tokenizer
    shard: str = "2GB"           # size of the files that are written; about as much memory is needed


# ---------------------------------------------------------------------------------------------------------------------
# Names: ours (those of the llava-hf files) and the original's

PREFIXES = {"language_model.model.": "model.", "language_model.lm_head.": "lm_head.", "image_newline": "model.image_newline"}
TOWER = {"vision_tower.": "model.vision_tower.vision_tower."}
MLP = {"multi_modal_projector.linear_1.": "model.mm_projector.0.", "multi_modal_projector.linear_2.": "model.mm_projector.2."}
LINEAR = {"multi_modal_projector.linear_1.": "model.mm_projector."}              # linear_2 is the identity, see model.py
PEFT = re.compile(r"^(base_model\.model\.|model\.(?=model\.))")                  # what training with LoRA puts before a name


def original_names(names, mlp, tower):
    """{our name: the original's}, for those of our weights that the original has; CLIP's if `tower`."""
    prefixes = PREFIXES | (MLP if mlp else LINEAR) | (TOWER if tower else {})
    return {name: theirs + name[len(ours):] for name in names for ours, theirs in prefixes.items() if name.startswith(ours)}


# ---------------------------------------------------------------------------------------------------------------------
# Tables: a checkpoint as {name: (a meta tensor with its shape and dtype, a function that reads it)}


def load(path, only=None):
    """{name: tensor} of a weight file, or of `only` one weight; mapped into memory: what is not looked at is not read."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as f:             # load_file would touch every weight
                return {name: f.get_tensor(name) for name in ([only] if only else f.keys())}
        state = torch.load(path, "cpu", weights_only=True, mmap=True)
    except FileNotFoundError:
        raise
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError, SafetensorError) as error:
        raise ValueError(f"{path}: not a whole file of weights ({str(error).splitlines()[0][:200]})") from error
    if not isinstance(state, dict) or not all(isinstance(v, torch.Tensor) for v in state.values()):
        raise ValueError(f"{path}: holds other things than named weights")
    return state


def table_of(files):
    """The table of some files. Each read maps its file anew, so the pages go when the tensor goes."""
    table = {}
    for path in files:
        new = {name: (value.to("meta"), lambda path=path, name=name: load(path, name)[name].detach())
               for name, value in load(path).items() if not COMPUTED.search(name)}
        if twice := sorted(new.keys() & table.keys()):
            raise ValueError(f"{path}: {len(twice)} weights that another file has too, e.g. {twice[:5]}")
        table |= new
    return table


def given(state):
    """The table of tensors that are there already."""
    return {name: (value.to("meta"), lambda value=value: value) for name, value in state.items()}


def weight_files(folder):
    """The files of a whole model, .safetensors before .bin; [] if there is none."""
    return sorted(folder.glob("model*.safetensors")) or sorted(folder.glob("pytorch_model*.bin"))


def skeleton(config):
    """{our name: meta tensor} of every weight that transformers' model of a configuration has."""
    with torch.device("meta"):
        want = hf_keys(AutoModelForImageTextToText.from_config(config).state_dict())
    if config.text_config.tie_word_embeddings:
        del want["language_model.lm_head.weight"]
    return want


def check(table, want, where):
    """ValueError unless a table has exactly the wanted names, in their shapes."""
    for names, words in ((want.keys() - table.keys(), "are missing"), (table.keys() - want.keys(), "are of no such model")):
        if names:
            raise ValueError(f"{where}: {len(names)} weights {words}, e.g. {sorted(names)[:5]}")
    wrong = [f"{name} {(*table[name][0].shape,)} instead of {(*want[name].shape,)}" for name in want
             if table[name][0].shape != want[name].shape]
    if wrong:
        raise ValueError(f"{where}: {len(wrong)} weights do not fit config.json, vision tower and language model, e.g. "
                         + ", ".join(wrong[:5]) + "; pass the --vision and --llm that it was trained with"
                         * any("projector" in name for name in wrong))


def write(table, folder, shard):
    """The table as model.safetensors, or as files of at most `shard` ("2GB") and their index."""
    split = split_torch_state_dict_into_shards({name: meta for name, (meta, _) in table.items()}, max_shard_size=shard)
    folder.mkdir(parents=True)
    for file, names in tqdm(split.filename_to_tensors.items(), disable=not sys.stderr.isatty()):
        save_file({name: table[name][1]().contiguous() for name in names}, folder / file, {"format": "pt"})
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def with_rows(table, rows):
    """Embedding and head with this many rows, one a token: cut, or grown by the old rows' mean as in LLaVA.from_parts."""
    def read(get):
        value = get()
        return torch.cat([value[:rows], value.float().mean(0).to(value.dtype).expand(max(0, rows - len(value)), -1)])
    names = table.keys() & {"language_model.model.embed_tokens.weight", "language_model.lm_head.weight"}
    return table | {name: (table[name][0].new_empty(rows, table[name][0].shape[1]), functools.partial(read, table[name][1]))
                    for name in names}


def plus_delta(delta, base, where):
    """v0: delta + LLaMA. What LLaMA lacks (the projector, the rows of added tokens) the delta holds as it is."""
    def add(get, get_base):
        value, old = get().clone(), get_base()
        value[:len(old)] += old.to(value.dtype)
        return value
    table = {name: entry for name, entry in delta.items() if name.startswith("model.mm_projector.")}
    if differ := sorted((delta.keys() - table.keys()) ^ base.keys()):
        raise ValueError(f"{where}: {len(differ)} weights are only in the delta or only in --llm, e.g. {differ[:5]}")
    for name, (old, get_base) in base.items():
        meta, get = delta[name]
        if meta.shape[1:] != old.shape[1:] or len(meta) < len(old):
            raise ValueError(f"{where}: {name} is {(*meta.shape,)}, in --llm {(*old.shape,)}; pass the LLaMA that it is on")
        table[name] = meta, functools.partial(add, get, get_base)
    return table


def plus_adapter(table, folder):
    """LoRA: W + alpha / r B A, computed in fp32, in W's own format."""
    def add(get, A, B):
        W = get()
        return (W.float() + scale * (B.float() @ A.float())).to(W.dtype)
    lora = json.loads((folder / "adapter_config.json").read_text())
    if odd := {k: v for k, v in lora.items() if k == "bias" and v != "none" or v and k in (
            "use_dora", "fan_in_fan_out", "modules_to_save", "rank_pattern", "alpha_pattern", "layer_replication")}:
        raise ValueError(f"{folder}/adapter_config.json: {odd}; only plain LoRA can be merged")
    r, scale = lora["r"], lora["lora_alpha"] / (math.sqrt(lora["r"]) if lora.get("use_rslora") else lora["r"])
    path, pairs = next(iter(folder.glob("adapter_model.*")), folder / "adapter_model.safetensors"), {}
    for key, value in load(path).items():
        found = re.fullmatch(r"(.+)\.lora_([AB])\.weight", PEFT.sub("", key))
        if not found or (name := found[1] + ".weight") not in table:
            raise ValueError(f"{path}: {key} belongs to no weight of --llm; pass the language model that it was trained on")
        pairs.setdefault(name, {})[found[2]] = value
    for name, pair in pairs.items():
        meta, get = table[name]
        shapes, need = {k: (*v.shape,) for k, v in pair.items()}, {"A": (r, meta.shape[1]), "B": (meta.shape[0], r)}
        if shapes != need:
            raise ValueError(f"{path}: {name} has {shapes}, but rank {r} and --llm need {need}; pass the language model that "
                             "it was trained on")
        table[name] = meta, functools.partial(add, get, pair["A"], pair["B"])
    return table


# ---------------------------------------------------------------------------------------------------------------------
# Folders and configurations

# A language model's kind, and what the original calls a LLaVA of it: model_type and architecture.
KINDS = {"llama": ("llava_llama", "LlavaLlamaForCausalLM"), "mistral": ("llava_mistral", "LlavaMistralForCausalLM"),
         "qwen2": ("llava_qwen", "LlavaQwenForCausalLM")}
KIND_OF = {"llava": "llama"} | {k: k for k in KINDS} | {theirs: k for k, (theirs, _) in KINDS.items()}
ASPECTS = {"square": "crop", "pad": "pad", "anyres": "anyres"}                   # image_aspect_ratio and our word for it
TOKENIZER_FILES = ["tokenizer.model", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json",
                   "vocab.json", "merges.txt"]


def folder_of(name, flag):
    """A folder as it is; a hub id's files, downloaded."""
    if os.path.isdir(name):
        return Path(name)
    try:
        return Path(snapshot_download(name, allow_patterns=[
            "*.json", *TOKENIZER_FILES, "model*.safetensors", "pytorch_model*.bin", "mm_projector.bin", "adapter_model.*",
            "non_lora_trainables.bin"]))
    except (OSError, ValueError) as error:
        raise FileNotFoundError(f"--{flag} {name}: neither a folder nor a hub id that can be downloaded "
                                f"({str(error).splitlines()[0][:200]})") from error


def tokenizer_of(folder):
    """The tokenizer of an original folder or of a language model, with <image>.

    Away from config.json: for a model_type "llava", transformers would read a tokenizer.model without its blanks.
    """
    if not (folder / "tokenizer_config.json").is_file():
        raise FileNotFoundError(f"{folder}: no tokenizer_config.json, which says what <s> and blanks are")
    with tempfile.TemporaryDirectory() as alone:
        for file in TOKENIZER_FILES:
            if (folder / file).is_file():
                shutil.copy(folder / file, alone)
        return load_tokenizer(alone)


def source(args, folder):
    """What --model is: its table, the folder of its config.json, that of its tokenizer, the stage that made it."""
    whole, lora = weight_files(folder), (folder / "adapter_config.json").is_file()
    rest = folder / ("non_lora_trainables.bin" if lora else "mm_projector.bin")
    part = "a LoRA adapter" if lora else "a projector" if not whole else "a delta" if args.delta else None
    if not whole and not rest.is_file():
        raise FileNotFoundError(f"{folder}: no LLaVA folder; it has neither model*.safetensors or pytorch_model*.bin nor "
                                + rest.name)
    if args.delta and part != "a delta" or args.llm and not part:
        raise ValueError(f"{folder} is {part or 'a whole model, or a delta that --delta must call one'}: leave out "
                         + ("--delta" if part else "--llm"))
    if not part:
        return table_of(whole), folder, folder, 2
    if not args.llm:
        raise ValueError(f"{folder} is {part} without its base: pass --llm, the language model that it was trained on"
                         + ", which adapter_config.json names" * lora)
    base = folder_of(args.llm, "llm")
    if not (files := weight_files(base)):
        raise FileNotFoundError(f"--llm {base}: neither model*.safetensors nor pytorch_model*.bin")
    table = table_of(files)
    if part == "a delta":
        table = plus_delta(table_of(whole), table, folder)
    else:
        more = {PEFT.sub("", name): entry for name, entry in table_of([rest]).items()}
        if twice := sorted(more.keys() & table.keys()):
            raise ValueError(f"{rest} and --llm {base} both have {twice[:5]}; pass the language model as it was before LLaVA")
        table = plus_adapter(table | more, folder) if lora else table | more
    return (table, *(folder if (folder / file).is_file() else base for file in ("config.json", "tokenizer_config.json")),
            1 if part == "a projector" else 2)


def our_config(raw, vision_config, mlp, dtype, where):
    """LlavaConfig, or LlavaNextConfig for anyres, of the original's config.json."""
    size, ratio = vision_config.image_size, raw.get("image_aspect_ratio") or "square"
    anyres = ratio == "anyres"
    for key, found, allowed in (
            ("model_type", "llava-hf's, which is ours already" if "text_config" in raw else raw.get("model_type"), [*KIND_OF]),
            ("image_aspect_ratio", ratio, [*ASPECTS]),
            ("mm_vision_select_feature", raw.get("mm_vision_select_feature", "patch"), ["patch"]),
            ("mm_patch_merge_type", raw.get("mm_patch_merge_type", "flat") if anyres else None, [None, "spatial_unpad"])):
        if found not in allowed:
            raise ValueError(f"{where}: {key} in config.json is {found!r}; what can be converted has one of {allowed}")
    pinpoints = [int(n) for n in re.findall(r"\d+", json.dumps(raw.get("image_grid_pinpoints")))] if anyres else []
    if anyres and (not pinpoints or len(pinpoints) % 2 or any(n == 0 or n % size for n in pinpoints)):
        raise ValueError(f"{where}: image_grid_pinpoints in config.json is {raw.get('image_grid_pinpoints')!r}; pairs of "
                         f"multiples of {size}, the pixels of the vision tower, are needed")
    kind = KIND_OF[raw["model_type"]]
    known = AutoConfig.for_model(kind).to_dict().keys() - {"model_type", "architectures", "transformers_version", "dtype"}
    text = AutoConfig.for_model(kind, **{k: v for k, v in raw.items() if k in known | {"rope_theta", "rope_scaling"}})
    meta, patch = {"aspect": ASPECTS[ratio]}, vision_config.patch_size
    if anyres:                                           # (width, height), as the original reads them
        rule = raw.get("minllava", {}).get("tiling", {}).get("rule", "original")             # of a model that was ours
        pairs = [list(pair) if rule == "original" else list(pair)[::-1] for pair in zip(pinpoints[::2], pinpoints[1::2])]
        meta["tiling"] = tiles.NEXT._replace(pinpoints=pairs, tile=size, patch=patch, rule=rule)._asdict()
    return (LlavaNextConfig if anyres else LlavaConfig)(
        vision_config=vision_config.to_dict() | {"dtype": dtype}, text_config=text.to_dict() | {"dtype": dtype}, dtype=dtype,
        vision_feature_layer=raw.get("mm_vision_select_layer", -2), vision_feature_select_strategy="default",
        image_seq_length=(size // patch) ** 2, projector_hidden_act="gelu" if mlp else "linear",
        multimodal_projector_bias=True, minllava=meta)


# ---------------------------------------------------------------------------------------------------------------------
# The two directions


def to_ours(args):
    folder = folder_of(args.model, "model")
    table, config_folder, llm, stage = source(args, folder)
    raw = json.loads((config_folder / "config.json").read_text())
    if not (vision := args.vision or raw.get("mm_vision_tower")):
        raise ValueError(f"{folder}: no config.json names its CLIP (mm_vision_tower); pass --vision")
    try:
        vision_config = CLIPVisionConfig.from_pretrained(vision)
    except (OSError, ValueError) as error:
        raise ValueError(f"--vision {vision}: no CLIP can be loaded from there ({str(error).splitlines()[0][:200]})") from error
    mlp, inside = "model.mm_projector.0.weight" in table, any(name.startswith("model.vision_tower.") for name in table)
    dtype = table.get("model.embed_tokens.weight", next(iter(table.values())))[0].dtype
    config = our_config(raw, vision_config, mlp, dtype, folder)
    want = skeleton(config)
    names = original_names(want, mlp, inside)
    check(table, {theirs: want[ours] for ours, theirs in names.items()}, folder)

    ours = {name: table[theirs] for name, theirs in names.items()}
    if not inside:
        g = load_part(VisionTower, vision, "vision", dtype)
        ours |= hf_keys({f"vision_tower.{name}": entry for name, entry in given(g.state_dict()).items()})
    if not mlp:                                         # as in LLaVA.to_hf_keys
        D, dtype = ours["multi_modal_projector.linear_1.bias"][0].shape[0], ours["multi_modal_projector.linear_1.bias"][0].dtype
        ours |= given({"multi_modal_projector.linear_2.weight": torch.eye(D, dtype=dtype),
                       "multi_modal_projector.linear_2.bias": torch.zeros(D, dtype=dtype)})
    tokenizer, rows = tokenizer_of(llm), config.text_config.vocab_size
    if len(tokenizer) > rows:                           # no spare row for <image>
        config.text_config.vocab_size = -(-len(tokenizer) // 64) * 64
        ours = with_rows(ours, config.text_config.vocab_size)
    config.image_token_index, config.pad_token_id = tokenizer.convert_tokens_to_ids(IMAGE), tokenizer.pad_token_id

    old = raw.get("minllava", {}) if args.template == "auto" else {}                    # what to_original left
    old = {k: v for k, v in old.items() if k not in ("aspect", "tiling")}               # config.json itself says these
    chat = old.get("chat", args.template)
    if chat == "auto":                                  # OURS: by the vocabulary; only v0 added [PAD]
        chat = "llava_v0" if "[PAD]" in tokenizer.get_vocab() else template_for(config.text_config, tokenizer).name
        print(f"template {chat}, guessed from the tokenizer; the folder does not say, and --template would")
    meta = {"template": "plain" if stage == 1 else chat, "chat": chat, "stage": stage, "recipe": None} | old | config.minllava
    meta |= {"init": args.model, "vision": vision, "vision_inside": inside, "llm": args.model if llm == folder else args.llm,
             "vocab_size": rows}
    if raw.get("mm_use_im_start_end"):
        meta["im_start_end"] = True
        print("it was trained on <im_start><image><im_end> where others have <image>; its questions should have them too")
    config.minllava, template = meta, TEMPLATES[meta["template"]]
    check_template(template, tokenizer)
    tokenizer.chat_template = template.jinja()
    view = view_from(meta, vision_config.image_size, vision_config.patch_size, folder)
    write(ours, Path(args.out), args.shard)
    end = config.text_config.eos_token_id
    end = {tokenizer.eos_token_id, *(end if isinstance(end, list) else [end])} - {None}
    save_settings(args.out, tokenizer, view, end, config)
    print(f"{args.out}: {len(ours)} weights, {meta}")


def to_original(args):
    folder = folder_of(args.model, "model")
    config, meta, view, _ = load_settings(folder)
    anyres = bool(view.tiling)
    text, mlp = config.text_config, config.projector_hidden_act == "gelu"
    for key, found, allowed in (("projector_hidden_act", config.projector_hidden_act, ["linear", "gelu"]),
                                ("text_config.model_type", text.model_type, [*KINDS]),
                                ("minllava.aspect", meta.get("aspect", "crop"), [*ASPECTS.values()]),
                                ("vision_feature_select_strategy", config.vision_feature_select_strategy, ["default"]),
                                ("vision_config.gated_layers", getattr(config.vision_config, "gated_layers", 0), [0])):
        if found not in allowed:
            raise ValueError(f"{folder}: {key} in config.json is {found!r}; the original has one of {allowed}")
    vision, llm = args.vision or meta.get("vision"), args.llm or meta.get("llm")
    if not vision or not llm:
        raise ValueError(f"{folder}: config.json does not say what it was made of: pass --vision, the CLIP that the original "
                         "will name, and --llm, whose tokenizer it takes")
    table = hf_keys(table_of(weight_files(folder)))
    check(table, skeleton(config), folder)
    identity = [table[f"multi_modal_projector.linear_2.{k}"][1]().float() for k in ("weight", "bias")]
    if not mlp and not (torch.equal(identity[0], torch.eye(len(identity[0]))) and not identity[1].any()):
        raise ValueError(f"{folder}: projector_hidden_act is 'linear', but linear_2 is not the identity")

    image_id, rows = config.image_token_index, text.vocab_size
    grown = rows == -(-(image_id + 1) // 64) * 64       # the table ends behind <image>: its rows are no text's
    rows = meta.get("vocab_size", image_id if grown else rows)
    inside = anyres or "vision" not in meta or meta.get("vision_inside", False)
    table = with_rows(table, rows)
    names, llm = original_names(table, mlp, inside), folder_of(llm, "llm")
    ids, lent = ({token: i for token, i in tokenizer.get_vocab().items() if i < rows}
                 for tokenizer in (AutoTokenizer.from_pretrained(folder), tokenizer_of(llm)))
    if ids != lent:
        raise ValueError(f"--llm {llm}: its tokenizer is not that of {folder}; pass the language model that it was made of")
    rope, (model_type, architecture) = dict(text.rope_parameters), KINDS[text.model_type]
    theta, scaling = rope.pop("rope_theta"), rope.pop("rope_type")                      # two settings in transformers 4
    original = text.to_dict() | {
        "model_type": model_type, "architectures": [architecture], "vocab_size": rows, "torch_dtype": str(config.dtype)[6:],
        "rope_theta": theta, "rope_scaling": None if scaling == "default" else rope | {"type": scaling},
        "mm_vision_tower": vision, "mm_hidden_size": config.vision_config.hidden_size, "unfreeze_mm_vision_tower": inside,
        "mm_projector_type": "mlp2x_gelu" if mlp else "linear", "use_mm_proj": True,
        "mm_vision_select_layer": config.vision_feature_layer, "mm_vision_select_feature": "patch",
        "mm_use_im_start_end": meta.get("im_start_end", False), "mm_use_im_patch_token": False,
        "image_aspect_ratio": {ours: theirs for theirs, ours in ASPECTS.items()}[   # without our word: 1.5, with its MLP, pads
            meta.get("aspect", "anyres" if anyres else "pad" if mlp else "crop")], "minllava": meta}
    if anyres:
        # In ours and the original's they are (width, height), in transformers' files and for rule "hf" (height, width).
        step = 1 if view.tiling.rule == "original" else -1
        original |= {"image_grid_pinpoints": [list(p)[::step] for p in view.tiling.pinpoints],
                     "mm_patch_merge_type": "spatial_unpad"}
    write({theirs: table[ours] for ours, theirs in names.items()}, Path(args.out), args.shard)
    for path in [*(llm / file for file in TOKENIZER_FILES), folder / "generation_config.json"]:
        if path.is_file():
            shutil.copy(path, args.out)
    del original["rope_parameters"], original["dtype"]
    (Path(args.out) / "config.json").write_text(json.dumps(original, indent=2))
    print(f"{args.out}: {len(names)} weights in the original's layout")


def arguments(argv):
    """A command line -> (function, its configuration)"""
    args = Config(**typed_flags(Config, argv, "Convert checkpoints.", {"template": ["auto", *TEMPLATES]}))
    if os.path.exists(args.out):
        raise ValueError(f"--out {args.out} exists; name a new folder")
    return to_original if args.to_original else to_ours, args


def main(argv=None):
    run_command(__doc__, arguments, argv)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
