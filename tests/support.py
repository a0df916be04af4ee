"""What tests share: the environment, real and made data, and a way to run the scripts as a user does."""

import importlib
import io
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from contextlib import chdir, redirect_stderr, redirect_stdout
from pathlib import Path
from unittest import mock

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
# The models are tiny: on a busy machine, threads that wait for each other take most of the time.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# The same tests on every machine. `make gpu-test` sets it to nothing, and each test of a GPU sets its own.
os.environ.setdefault("DEVICE", "cpu")
# Neither read nor fill the user's own cache.
CACHE = tempfile.TemporaryDirectory(prefix="grath-tests-")
os.environ["XDG_CACHE_HOME"] = os.environ["HF_DATASETS_CACHE"] = CACHE.name
PROJECT = Path(__file__).resolve().parent.parent
# For the way `vllm` of the benchmarks: this Python, with a stand-in.
VLLM_ENV = {"PYTHONPATH": str(PROJECT / "tests" / "stand_in"), "VLLM_PYTHON": sys.executable}
HUB = PROJECT.parent / "shared" / "hub"
BUNDLED = PROJECT / "data" / "questions.jsonl"
# The tiny chat model answers every question with this response. Each of the texts is one token of the tiny tokenizers,
# and occurs once from the end of a prompt to the end of the response.
RESPONSE_TOKENS = (
    " [/INST]", " Question: It", " is so", ".\nCorrect answer:", " Plants need", " light to", " grow.",
    "\nIncorrect answer:", " Plants eat", " small", " stones. ",
)  # fmt: skip
CORRECT, INCORRECT = "Plants need light to grow.", "Plants eat small stones."
RESPONSE = f"Question: It is so.\nCorrect answer: {CORRECT}\nIncorrect answer: {INCORRECT}"


def script_env(env=None):
    """The environment of a script: this Python comes first, and `env` wins."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    return {**os.environ, "PATH": path, "VIRTUAL_ENV": sys.prefix, **(env or {})}


def call(*command, cwd=PROJECT, env=None, status=0):
    """Run a command, offline; return it finished. A script's name is looked up in the project; status None is any."""
    command = [str(part) for part in command]
    if command[0].endswith(".py"):
        command = [sys.executable, str(PROJECT / command[0]), *command[1:]]
    elif command[0].endswith(".sh"):
        command[0] = str(PROJECT / command[0])
    done = subprocess.run(command, cwd=cwd, env=script_env(env), capture_output=True, text=True, timeout=3600)
    assert status is None or done.returncode == status, (
        f"status {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    )
    return done


def call_here(script, *command, cwd=PROJECT, env=None, status=0):
    """What `call` does with a script or module, in this process: where imports take longer than the work."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(reset_partial_state=True)
    module = importlib.import_module(script.removesuffix(".py"))
    if not hasattr(module, "main"):  # a package, run by `python -m`
        module = importlib.import_module(f"{script}.__main__")
    out, err, argv = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = [script, *map(str, command)]
    try:
        with (
            mock.patch.dict(os.environ, env or {}),
            chdir(cwd),
            redirect_stdout(out),
            redirect_stderr(err),
            pytest.raises(SystemExit) as ended,
        ):
            module.run_main(module.main)
    finally:
        sys.argv = argv
    done = subprocess.CompletedProcess(command, ended.value.code, out.getvalue(), err.getvalue())
    assert status is None or done.returncode == status, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done


def asking(model, folder, *flags, count=2):
    """The command that asks a model for pairs about the first bundled questions; the last of equal flags counts."""
    return (
        "create_pair_responses.py", "--model_name_or_path", model, "--save_prefix", "p", "--save_dir", folder,
        "--data_path", BUNDLED, "--num_query", count, "--precision", "fp32", *flags,
    )  # fmt: skip


def stages(model, pairs, folder):
    """What each stage that loads a model writes in a folder -> its command. The training has one step."""
    train = ("--dataset_path", pairs, "--output_dir", folder / "d", "--precision", "fp32", "--max_steps", 1)
    return {
        "p_num_2_useGT_False_useFS_False.json": asking(model, folder),
        "d": ("dpo.py", "--model_name_or_path", model, *train),
        "s": ("grath.evaluation", model, folder / "s", "--tasks", "grath_mc1", "--limit", 1),
    }


def check_here(env, status=0):
    """What `CHECK=1 ./run_llama2.sh` runs, in this process."""
    lines = (PROJECT / "run_llama2.sh").read_text(encoding="utf-8")
    preset = dict(re.findall(r'^export (\w+)="\$\{\1:-(.*)\}"', lines, re.MULTILINE))
    return call_here("grath.run", "check", env={**preset, **env}, status=status)


def rows(path):
    """The objects of a JSON-lines file."""
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def write_rows(path, content):
    """Write objects as a JSON-lines file and return its path."""
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
    return path


def change_json(file, **changes):
    """Change values of the JSON object in a file."""
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def put_program(path, text):
    """Write an executable script."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)


def wait_for(reached, process=None):
    """Wait until a function returns something true; the process must not end before."""
    deadline = time.monotonic() + 600
    while not reached():
        assert time.monotonic() < deadline and (process is None or process.poll() is None)
        time.sleep(0.02)


def score_values(folder):
    """The scores in a folder, in percent: task -> score."""
    from grath.evaluation.results import read_scores

    return {task: found["score"] for task, found in read_scores(folder).items()}


def patch_gpus(monkeypatch, count):
    """Let torch see `count` GPUs."""
    import torch

    for backend in (torch.cuda, torch.accelerator):
        monkeypatch.setattr(backend, "is_available", lambda: count > 0)
        monkeypatch.setattr(backend, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")


def pair(question, correct, incorrect):
    return {"question": question, "correct": correct, "incorrect": incorrect}


def cells_of(text):
    """The cells of every row of the tables in a page."""
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]


def needs_hub(test):
    return pytest.mark.skipif(not HUB.is_dir(), reason=f"the real data is not at {HUB}")(test)


def make_tokenizer(bos, eos, add_bos):
    """A byte-level BPE tokenizer of about 500 tokens, trained on the bundled questions."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = list(dict.fromkeys(["<unk>", bos, eos]))
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=special, initial_alphabet=alphabet)
    backend.train_from_iterator([row["question"] for row in rows(BUNDLED)], trainer)
    backend.add_tokens([AddedToken(text, normalized=False) for text in RESPONSE_TOKENS])
    if add_bos:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos, unk_token="<unk>")


def weights(folder):
    """The tensors of an adapter's folder: name -> tensor."""
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors")


def change_weights(model, change):
    """Change the tensors of a model's folder by a function of the dict name -> tensor."""
    from safetensors.torch import load_file, save_file

    file = model / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def save_adapter(base, folder, kind="LoraConfig", **options):
    """Save an adapter with random weights on a base; return its folder."""
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    config = getattr(peft, kind)(**{"task_type": "CAUSAL_LM", **options})
    model = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(base), config)
    for weight in model.parameters():
        if weight.requires_grad:
            weight.data += 0.1 * torch.randn_like(weight)
    model.save_pretrained(folder)
    return folder


FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


def tiny(family, **changes):
    """Return a tiny random model of a family, in fp32, with grouped-query attention."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {
        "vocab_size": 60, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256, "initializer_range": 0.5,
        **dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id", "sliding_window")),
    }  # fmt: skip
    torch.manual_seed(0)
    return add_noise(AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes | changes)).eval())


def make_llama(tokenizer):
    """Return a two-layer Llama that answers every prompt in the format of Llama-2-chat with `RESPONSE`.

    The first dimensions of the residual stream are a one-hot code of the tokens of the response. No layer writes to
    them, and the LM head maps each to the next token. All other weights are random, as in `tiny`.
    """
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokens = [*tokenizer.convert_tokens_to_ids(RESPONSE_TOKENS), tokenizer.eos_token_id]
    code = torch.arange(len(RESPONSE_TOKENS))
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=4096, initializer_range=0.125,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        embedding *= 8
        embedding[:, code] = head[:, code] = 0
        embedding[tokens[:-1], code], head[tokens[1:], code] = 16, 6
        for layer in model.model.layers:
            layer.self_attn.o_proj.weight *= 2
            layer.self_attn.o_proj.weight[code] = layer.mlp.down_proj.weight[code] = 0
    return add_noise(model)


def add_noise(model):
    """With GRATH_TEST_NOISE=1, multiply every weight of a tiny model by 1 + 0.001 * noise; return the model."""
    import torch

    if os.environ.get("GRATH_TEST_NOISE") == "1":
        with torch.no_grad():
            for weight in model.parameters():
                weight *= 1 + 1e-3 * torch.randn_like(weight)
    return model
