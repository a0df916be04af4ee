"""Tiny models made here, the real data where it is at hand, and a way to run the scripts as a user does."""

import importlib
import io
import json
import os
import subprocess
import sys
import tempfile
from contextlib import chdir, redirect_stderr, redirect_stdout
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
# The same tests on every machine: those of a GPU say so themselves.
os.environ["DEVICE"] = "cpu"
# What earlier sessions and other projects have left in the user's own cache is neither used nor added to.
CACHE = tempfile.TemporaryDirectory(prefix="grath-tests-")
os.environ["HF_DATASETS_CACHE"] = CACHE.name
# The command lines that the tests really start, for test_readme.py: those of `call` and of the scripts below them.
os.environ["RECORD_COMMANDS"] = f"{CACHE.name}/commands.jsonl"
RECORD = Path(__file__).resolve().parent / "record"
os.environ["BASH_ENV"] = str(RECORD / "bash_env.sh")
PROJECT = Path(__file__).resolve().parent.parent
HUB = PROJECT.parent / "shared" / "hub"
BUNDLED = PROJECT / "data" / "questions.jsonl"
# What the tiny chat model has learnt to answer, whatever the question is.
CORRECT, INCORRECT = "Plants need light to grow.", "Plants eat small stones."
REPLY = f"Question: It is so.\nCorrect answer: {CORRECT}\nIncorrect answer: {INCORRECT}"


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.name == "test_every_quoted_command_was_run")


def record(command, env=None):
    """Note a command line that a test starts."""
    given = [f"{name}={value}" for name, value in (env or {}).items()]
    with Path(os.environ["RECORD_COMMANDS"]).open("a", encoding="utf-8") as file:
        file.write(json.dumps([*given, *map(str, command)]) + "\n")


def call(*command, cwd=PROJECT, env=None, status=0):
    """Run a command, offline; return it finished. A script's name is looked up in the project; status None is any."""
    command = [str(part) for part in command]
    record(command, env)
    if command[0].endswith(".py"):
        command = [sys.executable, str(PROJECT / command[0]), *command[1:]]
    elif command[0].endswith(".sh"):
        command[0] = str(PROJECT / command[0])
    bin_folder = str(Path(sys.executable).parent)
    settings = {
        **os.environ,
        "PATH": f"{bin_folder}:{os.environ['PATH']}",
        "VIRTUAL_ENV": str(Path(bin_folder).parent),
        "PYTHONPATH": f"{RECORD}:{PROJECT}",
        "HF_HUB_OFFLINE": "1",
        **(env or {}),
    }
    done = subprocess.run(command, cwd=cwd, env=settings, capture_output=True, text=True, timeout=900)
    assert status is None or done.returncode == status, (
        f"status {done.returncode}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    )
    return done


def call_here(script, *command, cwd=PROJECT, status=0):
    """What `call` does with a script or module, in this process: where imports take longer than the work."""
    from accelerate.state import AcceleratorState

    record([*(() if script.endswith(".py") else ("-m",)), script, *command])
    AcceleratorState._reset_state(reset_partial_state=True)
    module = importlib.import_module(script.removesuffix(".py"))
    out, err, argv = io.StringIO(), io.StringIO(), sys.argv
    sys.argv = [script, *map(str, command)]
    try:
        with chdir(cwd), redirect_stdout(out), redirect_stderr(err), pytest.raises(SystemExit) as ended:
            module.run(module.main)
    finally:
        sys.argv = argv
    done = subprocess.CompletedProcess(command, ended.value.code, out.getvalue(), err.getvalue())
    assert done.returncode == status, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done


def rows(path):
    """The objects of a JSON-lines file."""
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def write_rows(path, content):
    """Write objects as a JSON-lines file and return its path."""
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in content), encoding="utf-8")
    return path


def pair(question, correct, incorrect):
    return {"question": question, "correct": correct, "incorrect": incorrect}


def needs_hub(test):
    return pytest.mark.skipif(not HUB.is_dir(), reason=f"the real data is not at {HUB}")(test)


def make_tokenizer(bos, eos, add_bos):
    """A byte-level BPE tokenizer of about 500 tokens, trained on the bundled questions."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = list(dict.fromkeys(["<unk>", bos, eos]))
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, special_tokens=special, initial_alphabet=alphabet)
    backend.train_from_iterator([row["question"] for row in rows(BUNDLED)] + [REPLY] * 50, trainer)
    if add_bos:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=bos, eos_token=eos, unk_token="<unk>")


@pytest.fixture(scope="session")
def smollm2():
    """The model folder of SmolLM2-135M-Instruct."""
    call(sys.executable, "-m", "grath.smollm2")
    return PROJECT / "models" / "smollm2"


@pytest.fixture(scope="session")
def llama_tokenizer():
    return make_tokenizer("<s>", "</s>", add_bos=True)


@pytest.fixture(scope="session")
def smollm_tokenizer():
    return make_tokenizer("<|im_start|>", "<|im_end|>", add_bos=False)


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory, llama_tokenizer):
    """Folder of a two-layer Llama that answers every request for a pair, of every kind, with `REPLY`."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from grath.chat import TEMPLATES, answer_ids
    from grath.questions import build_messages, load_demos, load_questions

    tokenizer = llama_tokenizer
    tokenizer.chat_template = TEMPLATES["llama2"]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    optimiser = torch.optim.AdamW(model.parameters(), lr=5e-3)
    questions = load_questions(data_path=BUNDLED)
    kinds = [(demos, use_gt) for demos in (load_demos("truthfulqa"), []) for use_gt in (True, False)]

    def likelihoods(question, demos, use_gt):
        """The probabilities of the reply's tokens."""
        prompt, answer = answer_ids(
            tokenizer, build_messages(question, 0, use_gt, demos), REPLY, tokenizer.chat_template
        )
        logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
        return logits.softmax(-1).gather(1, torch.tensor(answer)[:, None])

    for step in range(1000):
        (-likelihoods(questions[step % 60], *kinds[step % 4]).log().mean()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        if step % 40 == 39:
            with torch.no_grad():
                if min(likelihoods(questions[i], *kind).min() for i in (0, 70, 80) for kind in kinds) > 0.8:
                    break
    else:
        pytest.fail("the tiny model did not learn its reply")
    folder = tmp_path_factory.mktemp("models") / "tiny llama"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def pair_file(tmp_path_factory):
    """A pair file of twelve different pairs."""
    path = tmp_path_factory.mktemp("pairs") / "pairs.json"
    questions = [row["question"] for row in rows(BUNDLED)[:12]]
    return write_rows(path, [pair(q, f"It is number {i}.", "Nobody knows.") for i, q in enumerate(questions)])


def put(root, name, split, content, configs, splits, config=None):
    """Write a split of a made data set in the hub's own folder layout; its page names `configs` and `splits`."""
    import pandas

    folder = root / name / (config or configs[0])
    folder.mkdir(parents=True, exist_ok=True)
    pandas.DataFrame(content).to_parquet(folder / f"{split}-0.parquet")
    page = "".join(
        f"- config_name: {name}\n  data_files:\n"
        + "".join(f"  - split: {split}\n    path: {name}/{split}-*\n" for split in splits)
        for name in configs
    )
    (root / name / "README.md").write_text(f"---\nconfigs:\n{page}---\n")


def put_arc(root, numbers):
    """A made ARC with the questions of these numbers in every split."""
    choices = {"text": ["ice", "fire", "sand", "iron"], "label": ["A", "B", "C", "D"]}
    rows = [{"id": str(i), "question": f"What is cold? {i}", "choices": choices, "answerKey": "A"} for i in numbers]
    splits = ("train", "validation", "test")
    for split in splits:
        put(root, "allenai/ai2_arc", split, rows, ["ARC-Challenge"], splits)


def put_truthful(root, numbers):
    """A made TruthfulQA with the questions of these numbers."""
    targets = {"choices": ["Yes.", "No."], "labels": [1, 0]}
    rows = [{"question": f"Is ice cold? {i}", "mc1_targets": targets, "mc2_targets": targets} for i in numbers]
    put(root, "truthfulqa/truthful_qa", "validation", rows, ["multiple_choice"], ["validation"])


@pytest.fixture(scope="session")
def hub(tmp_path_factory):
    """A folder in the hub's layout with tiny made sets for HellaSwag and MMLU, and ARC's and TruthfulQA's schema."""
    from lm_eval.tasks.mmlu._generate_configs import SUBJECTS

    root = tmp_path_factory.mktemp("hub")
    put_arc(root, range(30))
    put_truthful(root, range(4))
    swag = [
        {"ind": i, "activity_label": "Cooking", "ctx_a": "A man cooks.", "ctx_b": "he", "ctx": "A man cooks. he",
         "endings": ["eats.", "flies.", "sings.", "melts."], "source_id": "1", "split": "val", "split_type": "x",
         "label": "0"} for i in range(12)
    ]  # fmt: skip
    for split in ("train", "validation"):
        put(root, "Rowan/hellaswag", split, swag, ["default"], ("train", "validation"))
    mmlu = [
        {"question": f"Is it {i}?", "subject": "x", "choices": ["yes", "no", "both", "none"], "answer": i % 4}
        for i in range(6)
    ]
    for subject in SUBJECTS:
        for split in ("test", "dev"):
            put(root, "cais/mmlu", split, mmlu, SUBJECTS, ("test", "dev"), config=subject)
    return root


def weights(folder):
    """The tensors of an adapter's folder: name -> tensor."""
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors")


@pytest.fixture(scope="session")
def llama_run(tiny_llama, tmp_path_factory):
    """`run_llama2.sh` for real, two rounds on a tiny model: (folder, settings, the finished process). Never changed."""
    runs = tmp_path_factory.mktemp("a run")
    settings = {
        "MODEL_NAME_OR_PATH": tiny_llama,
        "ROUNDS": 2,
        "MAX_STEPS": 4,
        "SAVE_STEPS": 2,
        "WARMUP_STEPS": 0,
        "NUM_QUERY": 6,
        "DATA_PATH": BUNDLED,
        "TASKS": "grath_mc1 grath_mc2",
        "LIMIT": 3,
        "RUNS_DIR": runs,
        "DPO_PRECISION": "fp32",
        "PAIRS_PRECISION": "fp32",
    }
    settings = {name: str(value) for name, value in settings.items()}
    return runs / "llama2_seed_0", settings, call("run_llama2.sh", env=settings)
