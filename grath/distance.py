"""Measure how far apart correct and incorrect answers are in a model's hidden states.

    python -m grath.distance PAIRS... --model_name_or_path MODEL

The paper relates this distance to what DPO can learn from the pairs. The command prints two figures for each pair file
and writes them next to it, to {PAIRS without .json}.distance.json; `grath.report` shows them too.

distance    |mean correct - mean incorrect| / sqrt(trace of the mean covariance within the two): 0 if both are alike
probe       accuracy of a linear classifier that tells the two apart, by five-fold cross-validation that keeps the two
            answers to a question in one fold: 0.5 is chance

An answer's position is the mean of the model's last hidden states over its tokens. The question precedes the answer in
the chat template, as in DPO. Pairs with identical answers are left out, as in DPO.
"""

import json
import math
from pathlib import Path

import numpy

from grath.common.arguments import Parser, positive_int
from grath.common.errors import UserError, run_main
from grath.common.files import atomic_write_text, check_writable, sha256
from grath.common.progress import progress_bar
from grath.modeling.chat import MODEL_TYPES, answer_ids, template_for
from grath.modeling.identity import model_identity
from grath.modeling.loading import check_vocabulary, context_window, load_for_inference, load_tokenizer
from grath.modeling.precision import PRECISIONS, resolve_precision
from grath.pairs.files import read_pairs

FOLDS = 5


def embed(model, sequences, batch_size):
    """Compute the mean last hidden state of each answer: float32 array (number of sequences, hidden size).

    Args:
        sequences: list of (prompt, answer), lists of token ids.
        batch_size: sequences per forward pass.
    """
    import torch
    from torch.nn.utils.rnn import pad_sequence

    means = []
    for at in progress_bar(range(0, len(sequences), batch_size), desc="Embedding answers", unit=" batches"):
        batch = sequences[at : at + batch_size]
        ids = pad_sequence([torch.tensor(prompt + answer) for prompt, answer in batch], batch_first=True)
        with torch.inference_mode():  # no token attends to the padding, which follows it
            hidden = model.get_decoder()(input_ids=ids.to(model.device), use_cache=False).last_hidden_state.float()
        for (prompt, answer), states in zip(batch, hidden, strict=True):
            means.append(states[len(prompt) : len(prompt) + len(answer)].mean(0).cpu().numpy())
    return numpy.stack(means)


def distance(correct, incorrect):
    """Divide the distance of the two means by the spread within the two; both are arrays (n, hidden size)."""
    within = (correct.var(0).sum() + incorrect.var(0).sum()) / 2
    return float(numpy.linalg.norm(correct.mean(0) - incorrect.mean(0)) / numpy.sqrt(within))


def probe(correct, incorrect):
    """Return the cross-validated accuracy of a logistic regression; both answers to a question share a fold."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GroupKFold, cross_val_score
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    count = len(correct)
    classifier = make_pipeline(StandardScaler(), LogisticRegression(C=0.01, max_iter=1000))
    labels, groups = numpy.repeat([1, 0], count), numpy.tile(numpy.arange(count), 2)
    features = numpy.concatenate([correct, incorrect])
    return float(cross_val_score(classifier, features, labels, groups=groups, cv=GroupKFold(FOLDS)).mean())


def main():
    parser = Parser(__doc__)
    add = parser.add_argument
    add("pairs", type=Path, nargs="+", help="pair files")
    add("--model_name_or_path", required=True, help="hub name, model folder or LoRA adapter folder")
    add("--model_type", choices=MODEL_TYPES, default="auto", help="chat template")
    add("--precision", choices=PRECISIONS, default="auto", help="auto: int8 on a CUDA GPU, bf16 on a CPU")
    add("--batch_size", type=positive_int, default=32, help="answers per batch")
    args = parser.parse_args()
    files = {}
    for path in args.pairs:
        rows = [row for row in read_pairs(path) if row["correct"] != row["incorrect"]]
        if len(rows) < FOLDS:
            raise UserError(f"{path} has {len(rows)} pairs of different answers: at least {FOLDS} are needed")
        check_writable(path.parent)
        files[path] = rows
    inputs = {"model": model_identity(args.model_name_or_path), "model_type": args.model_type}
    tokenizer = load_tokenizer(args.model_name_or_path)
    template = template_for(tokenizer, args.model_type)
    precision = resolve_precision(args.precision, "pairs")
    model = load_for_inference(args.model_name_or_path, precision)
    for path, rows in files.items():
        sides = []
        for side in ("correct", "incorrect"):
            turns = [([{"role": "user", "content": row["question"]}], row[side]) for row in rows]
            sequences = [answer_ids(tokenizer, turn, answer, template) for turn, answer in turns]
            whole = [sum(pair, []) for pair in sequences]
            check_vocabulary(args.model_name_or_path, tokenizer, whole)
            window = context_window(model.config)
            if window and (longest := max(map(len, whole))) > window:
                raise UserError(f"{path}: a pair has {longest} tokens, and the model's context window {window}")
            sides.append(embed(model, sequences, args.batch_size))
        if not math.isfinite(apart := distance(*sides)):
            raise UserError(f"{args.model_name_or_path} computes NaN: its weights are broken")
        found = {"pairs": len(rows), "distance": apart, "probe": probe(*sides), "pairs_sha256": sha256(path)}
        found |= {"model": args.model_name_or_path, "precision": precision, "inputs": inputs}
        out = path.with_suffix(".distance.json")
        atomic_write_text(out, json.dumps(found, indent=2) + "\n")
        print(f"{path}: distance {found['distance']:.3f}, probe {found['probe']:.3f}, {len(rows)} pairs\nWrote {out}")


if __name__ == "__main__":
    run_main(main)
