"""
A checkpoint is one folder in the layout of llava-hf, which transformers, vLLM, SGLang and
llama.cpp's converter read:

    config.json              LlavaConfig or LlavaNextConfig; what we add lies under "minllava"
    model.safetensors        the weights, in several files and an index where they are large
    processor_config.json    how a picture is prepared; preprocessor_config.json for older readers
    tokenizer.json, ...      with <image>, and the template as chat template
    generation_config.json   what ends an answer

An adapter's folder is PEFT's: adapter_config.json and adapter_model.safetensors stand in place of
the first two. Behaviour never depends on a folder's name, loading is strict and asks no network.
"""
import dataclasses
import json
import os
import re
import string
import sys

import torch
import transformers
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GenerationConfig, LlavaConfig, LlavaNextConfig
from transformers.initialization import no_init_weights

from parts.files import IMAGE, PROMPTS, write_json
from parts.gated import VisionTower
from parts.lora import adapters, add_adapters, merge_adapters, merged_state
from parts.tiles import NEXT, Tiling
from parts.views import ASPECTS

# transformers reports CLIP's unused text tower; what is missing is an error of ours, see load_part
transformers.logging.set_verbosity_error()
if not sys.stderr.isatty():
    transformers.logging.disable_progress_bar()

# -----------------------------------------------------------------------------
# Keys: what a weight is called here, and in the files of llava-hf

PREFIXES = {"g.": "vision_tower.vision_model.", "f_phi.": "language_model.",
            "newline": "image_newline"}
LINEAR_1 = "multi_modal_projector.linear_1."
LINEAR_2 = "multi_modal_projector.linear_2."
HIDDEN_ACT = {"linear": "linear", "mlp2x_gelu": "gelu"}      # projector: projector_hidden_act

# What transformers 5 calls its modules, and what the hub's files call them.
NEW_NAMES = {
    r"^model\.language_model\.": "language_model.model.",
    r"^lm_head\.": "language_model.lm_head.",
    r"^(model\.)?vision_tower\.(vision_model\.)?": "vision_tower.vision_model.",
    r"^model\.(multi_modal_projector\.|image_newline$)": r"\1",
}
# In old files; these are computed, not learned.
COMPUTED = re.compile(r"\.(rotary_emb\.inv_freq|embeddings\.position_ids)$")


def hf_keys(state):
    """{name: anything} under the names of the hub's files, from these or from transformers 5's.

    Raises ValueError if both kinds are mixed, so that two weights would be one.
    """
    renamed = {}
    for name, value in state.items():
        if COMPUTED.search(name):
            continue
        pattern = next((new for new in NEW_NAMES if re.match(new, name)), None)
        if pattern:
            name = re.sub(pattern, NEW_NAMES[pattern], name)
        if name in renamed:
            raise ValueError(f"two weights are {name}: old and new llava-hf names are mixed")
        renamed[name] = value
    return renamed


def hf_names(model, names):
    """{our name of a weight: llava-hf's}, without a head that is the input embedding, too."""
    if model.projector == "linear":
        prefixes = PREFIXES | {"W.": LINEAR_1}
    else:
        prefixes = PREFIXES | {"W.0.": LINEAR_1, "W.2.": LINEAR_2}
    found = {}
    for name in names:
        if is_tied(model.f_phi) and name == "f_phi.lm_head.weight":
            continue
        ours = next(prefix for prefix in prefixes if name.startswith(prefix))
        found[name] = prefixes[ours] + name.removeprefix(ours)
    return found


def is_tied(f_phi):
    """Whether input embedding and head are one tensor."""
    return f_phi.get_input_embeddings().weight is f_phi.get_output_embeddings().weight


def to_hf_keys(model, state=None):
    """The model's state dict, or `state`, under llava-hf's names.

    A linear W is linear_1 = W, no activation, linear_2 = identity.
    """
    state = model.state_dict() if state is None else state
    hf_state = {theirs: state[ours] for ours, theirs in hf_names(model, state).items()}
    if model.projector == "linear":
        hf_state |= identity_layer(model.W.out_features, model.W.weight.dtype)
    return hf_state


def from_hf_keys(model, hf_state, folder):
    """llava-hf's names to ours. Raises ValueError unless the keys are those that we would write."""
    check_weights(hf_state, to_hf_keys(model), folder,
                  "pass a whole checkpoint folder, whose config.json is of the same model")
    if model.projector == "linear":
        check_identity(hf_state, folder)
    names = hf_names(model, model.state_dict())
    state = {ours: hf_state[theirs] for ours, theirs in names.items()}
    if is_tied(model.f_phi):
        state["f_phi.lm_head.weight"] = state["f_phi.model.embed_tokens.weight"]
    return state


def identity_layer(D, dtype):
    """linear_2 of a linear W."""
    return {LINEAR_2 + "weight": torch.eye(D, dtype=dtype),
            LINEAR_2 + "bias": torch.zeros(D, dtype=dtype)}


def check_identity(hf_state, folder):
    """Raises ValueError if linear_2 does anything: then W is not one linear layer."""
    weight = hf_state[LINEAR_2 + "weight"].float()
    if not torch.equal(weight, torch.eye(len(weight))) or hf_state[LINEAR_2 + "bias"].any():
        raise ValueError(f"{folder}: linear_2 is not the identity, so W is not one linear layer")


def check_weights(found, wanted, where, advice):
    """Raises ValueError unless two {name: tensor} have the same names and shapes."""
    wrong = []
    for name in sorted(wanted.keys() & found.keys()):
        if found[name].shape != wanted[name].shape:
            shapes = f"{(*found[name].shape,)} instead of {(*wanted[name].shape,)}"
            wrong.append(f"{name} {shapes}")
    problems = {
        "are missing": sorted(wanted.keys() - found.keys()),
        "are not of this model": sorted(found.keys() - wanted.keys()),
        "have another shape": wrong,
    }
    for problem, names in problems.items():
        if names:
            raise ValueError(f"{where}: {len(names)} weights {problem}, e.g. {names[:5]}; {advice}")


# -----------------------------------------------------------------------------
# Settings: all of the folder but the weights


def llava_config(vision_config, text_config, dtype, feature_layer, projector, meta):
    """transformers' LlavaConfig; LlavaNextConfig where pictures are seen in tiles.

    `meta` is what we add. The caller sets image_token_index and pad_token_id.
    """
    tiling = meta.get("tiling")
    kind = LlavaNextConfig if tiling else LlavaConfig
    pinpoints = {"image_grid_pinpoints": hf_pinpoints(tiling)} if tiling else {}
    architecture = kind.__name__.replace("Config", "ForConditionalGeneration")
    if getattr(vision_config, "gated_layers", 0):
        # Only parts/gated.py builds such blocks, so the name is one that no other program knows.
        architecture = "Gated" + architecture
    return kind(
        vision_config=vision_config.to_dict() | {"dtype": dtype},    # copies: it writes into them
        text_config=text_config.to_dict() | {"dtype": dtype},
        tie_word_embeddings=text_config.tie_word_embeddings,
        dtype=dtype,
        architectures=[architecture],
        image_seq_length=(vision_config.image_size // vision_config.patch_size) ** 2,
        vision_feature_layer=feature_layer,
        vision_feature_select_strategy="default",                    # without CLS
        projector_hidden_act=HIDDEN_ACT[projector],
        multimodal_projector_bias=True,
        minllava=meta,
        **pinpoints,
    )


def projector_of(config):
    """Our name for the projector of a LlavaConfig."""
    return {act: name for name, act in HIDDEN_ACT.items()}[config.projector_hidden_act]


def hf_pinpoints(tiling):
    """The canvases as transformers reads them: (height, width), in an order that breaks ties alike.

    With rule "hf" our own list is transformers' already.
    """
    step = 1 if tiling["rule"] == "hf" else -1
    return [list(pinpoint)[::step] for pinpoint in tiling["pinpoints"]]


def save_settings(folder, tokenizer, eos_ids, vision_config, meta):
    """Write all of a checkpoint folder but config.json and the weights."""
    side = vision_config.image_size
    size = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
    processor_class = transformers.LlavaProcessor
    if meta.get("tiling"):
        processor_class = transformers.LlavaNextProcessor
        image_processor = transformers.LlavaNextImageProcessorPil(
            image_grid_pinpoints=hf_pinpoints(meta["tiling"]), **size)
    elif meta.get("aspect") == "pad":
        image_processor = transformers.LlavaImageProcessorPil(do_pad=True, **size)
    else:
        image_processor = transformers.CLIPImageProcessorPil(**size)
    # One more token, CLS, which "default" takes away again: else 575 placeholders for 576 tokens.
    processor = processor_class(
        image_processor, tokenizer, patch_size=vision_config.patch_size,
        num_additional_image_tokens=1, vision_feature_select_strategy="default")
    processor.save_pretrained(folder)
    image_processor.save_pretrained(folder)              # preprocessor_config.json
    generation = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=sorted(eos_ids),
        pad_token_id=tokenizer.pad_token_id)
    generation.save_pretrained(folder)


def has_file(folder, name):
    return os.path.isfile(os.path.join(folder, name))


def read_settings(folder, name):
    """A JSON file of a folder. Raises ValueError if it was torn."""
    try:
        with open(os.path.join(folder, name), encoding="utf-8") as f:
            return json.load(f)
    except ValueError as error:
        raise ValueError(f"{folder}: {name} is no whole JSON file; copy it again") from error


def load_settings(folder):
    """(transformers' config, meta) of a checkpoint folder; meta always has aspect and tiling.

    Raises FileNotFoundError if the folder holds no checkpoint, ValueError if it holds a model that
    this project does not compute.
    """
    if is_adapter(folder):
        raise FileNotFoundError(f"{folder}: no config.json; this folder holds an adapter, which "
                                "belongs to the merged checkpoint beside it")
    if not has_file(folder, "config.json"):
        raise FileNotFoundError(f"{folder}: no config.json; a checkpoint is the --out folder of a "
                                "finished train.py")
    raw = read_settings(folder, "config.json")
    kind = raw.get("model_type")
    if kind not in ("llava", "llava_next") or "text_config" not in raw:
        raise ValueError(f"{folder}: model_type in config.json is {kind!r}; a checkpoint in "
                         "llava-hf's layout has 'llava' or 'llava_next', and a text_config; "
                         "extras.convert makes one of a folder of the original project")
    config = (LlavaNextConfig if kind == "llava_next" else LlavaConfig).from_dict(raw)
    check_supported(config, folder)
    meta = raw.get("minllava") or {}
    if "aspect" not in meta:
        meta |= foreign_view(config, folder)
    meta.setdefault("tiling", None)
    check_view(meta, config.vision_config, folder)
    if (kind == "llava_next") != bool(meta["tiling"]):
        raise ValueError(f"{folder}: config.json has model_type {kind!r} and aspect "
                         f"{meta['aspect']!r}; 'llava_next' belongs to tiles, and only to them")
    return config, meta


def inherit(config, origin):
    """What a model of stage 2 that is trained on (config.init) brings along: features and view.

    config, origin    a dataclass with init, feature_layer, projector, aspect, and where its values
                      came from; both come back. A flag that was typed wins. A recipe's features and
                      views are for a model that is new, or fresh from stage 1.
    """
    if config.init in (None, "none"):
        return config, origin
    theirs, meta = load_settings(config.init)
    if meta.get("stage") == 1:
        return config, origin
    inherited = {"feature_layer": theirs.vision_feature_layer, "aspect": meta["aspect"],
                 "projector": projector_of(theirs)}
    inherited = {flag: value for flag, value in inherited.items() if origin[flag] != "command line"}
    config = dataclasses.replace(config, **inherited)
    return config, origin | dict.fromkeys(inherited, "checkpoint")


def check_supported(config, folder):
    """Raises ValueError for settings of a LlavaConfig that would be another model than ours."""
    n_layers = config.vision_config.num_hidden_layers
    supported = {
        "projector_hidden_act": list(HIDDEN_ACT.values()),
        "vision_feature_select_strategy": ["default"],
        "vision_feature_layer": range(-n_layers - 1, 0),
    }
    for name, allowed in supported.items():
        found = getattr(config, name)
        if found not in allowed:
            raise ValueError(f"{folder}: {name} in config.json is {found!r}; "
                             f"this model has {allowed}")


def foreign_view(config, folder):
    """aspect and tiling of a folder that is not ours: as transformers prepares its pictures."""
    if config.model_type == "llava_next":
        tiling = NEXT._replace(
            pinpoints=config.image_grid_pinpoints, tile=config.vision_config.image_size,
            patch=config.vision_config.patch_size, rule="hf")
        return {"aspect": "anyres_hf", "tiling": tiling._asdict()}
    for name in ("processor_config.json", "preprocessor_config.json"):   # of transformers 5, 4
        if has_file(folder, name):
            processor = read_settings(folder, name)
            if processor.get("image_processor", processor).get("do_pad"):
                return {"aspect": "pad"}
    return {"aspect": "crop"}


def check_view(meta, vision_config, folder):
    """Raises ValueError if a g of that size cannot see pictures as `meta` says."""
    aspect, tiling = meta["aspect"], meta["tiling"]
    if aspect not in ASPECTS or (aspect in ("crop", "pad")) == bool(tiling):
        raise ValueError(f"{folder}: aspect {aspect!r} {'with' if tiling else 'without'} tiling; "
                         f"of {ASPECTS}, crop and pad have none, and all others have one")
    if not tiling:
        return
    size, patch = vision_config.image_size, vision_config.patch_size
    try:
        tiling = Tiling(**tiling)
        tiling.plan(size, size)                          # what does not fit is found here, once
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder}: its tiling cannot be used: {error}") from error
    if (tiling.tile, tiling.patch) != (size, patch):
        raise ValueError(f"{folder}: tiles of {tiling.tile} pixels in patches of {tiling.patch}, "
                         f"for a vision tower of {size} and {patch}")


# -----------------------------------------------------------------------------
# The whole model


def save(model, folder, dtype=None, state=None):
    """Write a model as a checkpoint folder; it is complete once it has its config.json.

    dtype    casts the weights; else they are written in W's
    state    the model's state dict, where it was gathered already. Adapters become part of the
             weights that they belong to.
    """
    dtype = dtype or next(model.W.parameters()).dtype
    config = llava_config(model.g.config, model.f_phi.config, dtype, model.feature_layer,
                          model.projector, model.meta)
    config.image_token_index = model.image_id
    config.pad_token_id = model.tokenizer.pad_token_id
    os.makedirs(folder, exist_ok=True)
    if has_file(folder, "config.json"):
        os.remove(os.path.join(folder, "config.json"))
    state = state or model.state_dict()
    if adapters(model.f_phi) and "init" in model.meta:       # also alone, for PEFT
        save_adapter(model, os.path.join(folder, "adapter"), model.meta["init"], state)
    state = to_hf_keys(model, merged_state(model, state))
    state = {name: value.to(dtype) for name, value in state.items()}
    save_torch_state_dict(state, folder, max_shard_size="5GB", metadata={"format": "pt"})
    save_settings(folder, model.tokenizer, model.eos_ids, model.g.config, model.meta)
    config.save_pretrained(folder)


def load(cls, folder, dtype=torch.float32):
    """A model of class `cls` (model.LLaVA) from a checkpoint folder, in eval mode.

    An adapter's folder is loaded as its base with the adapter merged. Raises FileNotFoundError if
    the folder holds no checkpoint, ValueError for keys that are missing or left over.
    """
    if is_adapter(folder):
        model = load(cls, base_of(folder), dtype)
        load_adapter(model, folder)
        merge_adapters(model.f_phi)
        return model
    config, meta = load_settings(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    found, image_id = config.image_token_index, tokenizer.convert_tokens_to_ids(IMAGE)
    if found != image_id:
        raise ValueError(f"{folder}: image_token_index in config.json is {found}; in its tokenizer "
                         f"{IMAGE} is {image_id}")
    with no_init_weights():                              # every weight is about to be overwritten
        g = VisionTower(config.vision_config)
        f_phi = transformers.AutoModelForCausalLM.from_config(config.text_config, dtype=dtype)
        f_phi.tie_weights()
        model = cls(g, f_phi, tokenizer, config.vision_feature_layer, projector_of(config), meta)
        if meta["tiling"]:
            model.see_in_tiles()
    for p in model.parameters():         # not model.to(dtype), which would round the rotary
        p.data = p.data.to(dtype)        # frequencies, too
    model.load_state_dict(from_hf_keys(model, read_weights(folder), folder))
    if has_file(folder, "generation_config.json"):
        f_phi.generation_config = GenerationConfig.from_pretrained(folder, local_files_only=True)
    return model.eval()


def read_weights(folder):
    """{llava-hf's name: tensor} of all .safetensors files of a folder."""
    files = sorted(name for name in os.listdir(folder) if name.endswith(".safetensors"))
    state = {}
    try:
        for name in files:
            state |= load_file(os.path.join(folder, name))
    except SafetensorError as error:
        raise ValueError(f"{folder}: not all of {', '.join(files)} are whole files ({error}); "
                         "copy them again") from error
    return hf_keys(state)


# -----------------------------------------------------------------------------
# The parts of a new model: a hub id or a folder each


def load_part(cls, name, dtype, flag):
    """cls.from_pretrained(name); a weight that the files lack is an error, never a random number.

    `flag` is the command's flag, without dashes, which errors name.
    """
    if os.path.isdir(name) and not has_file(name, "config.json"):
        raise FileNotFoundError(f"--{flag} {name}: the folder has no config.json")
    try:
        part, info = cls.from_pretrained(
            name, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True)
    except (OSError, ValueError) as error:               # nothing there, or a model of another kind
        raise ValueError(f"--{flag} {name}: cannot be loaded as {cls.__name__}: "
                         f"{str(error)[:300]}") from error
    bad = sorted([*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])])
    if bad:
        raise ValueError(f"--{flag} {name}: {len(bad)} weights of {cls.__name__} are not in its "
                         f"files, or of another shape, e.g. {bad[:5]}; is it another model?")
    return part


def load_tokenizer(llm):
    """A language model's tokenizer, with <image> as one reserved id."""
    if os.path.isdir(llm) and not has_file(llm, "tokenizer_config.json"):
        raise ValueError(f"--llm {llm}: no tokenizer_config.json; without it <s> and blanks would "
                         "be guessed")
    tokenizer = AutoTokenizer.from_pretrained(llm)
    if IMAGE not in tokenizer.get_vocab():
        token = transformers.AddedToken(IMAGE, special=True, normalized=False)
        tokenizer.add_tokens([token])
    if tokenizer.pad_token is None:      # OFFICIAL: pad = unk; lengths, not ids, tell padding here
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    return tokenizer


def grow_vocabulary(f_phi, size):
    """Give every id below `size` a row of embedding and head, where there is no spare one.

    OURS: they grow to a multiple of 64, as engines want it, from 32,000 to 32,064 for Vicuna, and
    new rows are the mean of the old ones.
    """
    old_size = f_phi.get_input_embeddings().num_embeddings
    if size <= old_size:
        return
    f_phi.resize_token_embeddings(size, pad_to_multiple_of=64, mean_resizing=False)
    for layer in (f_phi.get_input_embeddings(), f_phi.get_output_embeddings()):
        rows = layer.weight.data
        rows[old_size:] = rows[:old_size].float().mean(0).to(rows.dtype)


# -----------------------------------------------------------------------------
# Adapters (parts/lora.py) in PEFT's own layout: A, B and all of W

PEFT = "base_model.model.model."         # PEFT's prefix, then that of transformers' LLaVA
ADAPTER_KIND = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "bias": "none", "use_rslora": False,
                "use_dora": False, "rank_pattern": {}, "alpha_pattern": {},
                "init_lora_weights": True, "modules_to_save": ["multi_modal_projector"]}


def peft_state(model, state):
    """{PEFT's name: tensor} of what LoRA trains, from the model's `state` dict."""
    body = f"f_phi.{model.f_phi.base_model_prefix}"
    found = {}
    for name in adapters(model.f_phi.base_model):
        for matrix in ("lora_A", "lora_B"):
            theirs = f"{PEFT}language_model.{name}.{matrix}.weight"
            found[theirs] = state[f"{body}.{name}.{matrix}"]
    for name, value in to_hf_keys(model, state).items():
        if name.startswith("multi_modal_projector."):
            found[PEFT + name] = value
    return found


def save_adapter(model, folder, base, state=None):
    """Write adapters and W as a folder for PEFT: on AutoModelForImageTextToText of `base`.

    Processor, tokenizer and template lie in it, too: `base`, the checkpoint folder that training
    started from, may be a stage 1, which knows neither this view nor any turns. vLLM takes no
    adapter that brings modules of its own, such as W: it needs the merged checkpoint.
    """
    layers = adapters(model.f_phi.base_model)
    names = sorted({name.split(".")[-1] for name in layers})
    layer = next(iter(layers.values()))
    config = ADAPTER_KIND | {
        "base_model_name_or_path": os.path.abspath(base),
        "r": len(layer.lora_A),
        "lora_alpha": layer.alpha,
        "lora_dropout": layer.dropout,
        "inference_mode": True,
        # names alone would match CLIP's layers, too
        "target_modules": rf"model\.language_model\..*\.({'|'.join(names)})",
    }
    os.makedirs(folder, exist_ok=True)
    save_file(peft_state(model, state or model.state_dict()),
              os.path.join(folder, "adapter_model.safetensors"), metadata={"format": "pt"})
    save_settings(folder, model.tokenizer, model.eos_ids, model.g.config, model.meta)
    write_json(os.path.join(folder, "minllava.json"), model.meta)
    write_json(os.path.join(folder, "adapter_config.json"), config)      # last: with it, complete


def is_adapter(folder):
    """Whether a folder holds an adapter alone."""
    return has_file(folder, "adapter_config.json") and not has_file(folder, "config.json")


def base_of(folder):
    """The checkpoint folder that an adapter's folder belongs to.

    Raises FileNotFoundError if either of them is not there.
    """
    if not has_file(folder, "adapter_config.json"):
        raise FileNotFoundError(f"{folder}: no adapter_config.json; pass an adapter's folder, as "
                                "train.py --lora_rank writes it")
    base = read_settings(folder, "adapter_config.json").get("base_model_name_or_path") or ""
    if not has_file(base, "config.json"):
        raise FileNotFoundError(f"{folder}: an adapter without its base, {base!r} is no checkpoint "
                                "folder here; put its place into base_model_name_or_path of "
                                f"{folder}/adapter_config.json, or pass a merged checkpoint")
    return base


def load_adapter(model, folder):
    """Put a saved adapter on `model`, its base; W, tokenizer and meta become the adapter's.

    Raises ValueError for an adapter of another kind or of another model, FileNotFoundError if its
    weights are not there.
    """
    config = read_settings(folder, "adapter_config.json")
    for key, value in ADAPTER_KIND.items():
        if config.get(key, value) != value:
            raise ValueError(f"{folder}/adapter_config.json: an adapter of another kind: {key} "
                             f"{config[key]!r}, not {value!r}; merge it by PEFT, pass that folder")
    file = os.path.join(folder, "adapter_model.safetensors")
    if not os.path.isfile(file):
        raise FileNotFoundError(f"{file}: no such file; copy the adapter's folder again, or pass a "
                                "merged checkpoint")
    add_adapters(model.f_phi, config["r"], config["lora_alpha"], config["lora_dropout"])
    found = load_file(file)
    parameters = peft_state(model, model.state_dict())   # of A and B the parameters' own storage
    check_weights(found, parameters, folder, "this is an adapter of another model; pass its base, "
                  f"{config['base_model_name_or_path']!r}")
    W = {}
    for name, value in found.items():
        if "multi_modal_projector" in name:
            W[name.removeprefix(PEFT)] = value
        else:
            parameters[name].copy_(value)
    model.load_state_dict(from_hf_keys(model, to_hf_keys(model) | W, folder))
    if has_file(folder, "minllava.json"):                # PEFT alone writes none
        meta = read_settings(folder, "minllava.json")
        check_view({"aspect": "crop", "tiling": None} | meta, model.g.config, folder)
        if bool(meta.get("tiling")) != (model.newline is not None):
            raise ValueError(f"{folder}: of the adapter and its base, one sees pictures in tiles; "
                             "pass the base that it was trained on")
        model.meta = meta
        model.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)


# -----------------------------------------------------------------------------
# The template, for programs that render conversations by themselves


def chat_template(template):
    """What data.render writes in a Template, as a chat template in Jinja."""
    question = "text(m.content)"
    if template.name == "plain":                         # its images alone, as in data.render
        question = "'<image>' * (text(m.content).split('<image>') | length - 1)"
    before, after = template.answer.split("{}")
    strings = template._asdict() | {"before": before, "after": after}
    quoted = {key: json.dumps(value, ensure_ascii=False) for key, value in strings.items()}
    jinja = (PROMPTS / "chat_template.jinja").read_text()
    return string.Template(jinja).substitute(quoted, question=question)
