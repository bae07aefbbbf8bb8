"""Every metric of the three papers, answer scoring, and what a run leaves behind.

The accuracy matrix.  A is a float array (T,T): A[t,i] = score on task i after learning task t, nan above the diagonal.
T tasks, indices from 0, scores in points (0..100).  Every function below is pure: it never edits what it is given.

Sources   MM-Prompt, arXiv 2505.19455v1, sections 4.1, A, B (Eq. 12-13)     ModalPrompt, arXiv 2410.05849v2, appendix A
          missing modalities, arXiv 2503.00528, section 4.1                  VQA evaluation, Antol et al. 2015
"""
import argparse
import contextlib
import csv
import errno
import hashlib
import itertools
import json
import math
import os
import platform
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np

from data import InputError, parse_box

# ------------------------------------------------------------------------------------------ the accuracy matrix


def _matrix(A):
    """A checked float64 copy of A.  Raises ValueError unless A is (T,T) with a full lower triangle."""
    A = np.array(A, dtype=float)                                     # a copy: callers keep theirs
    if A.ndim != 2 or A.shape[0] != A.shape[1] or len(A) == 0:
        raise ValueError(f"an accuracy matrix is (T,T) with T >= 1, not {A.shape}")
    if np.isnan(A[np.tril_indices(len(A))]).any():
        raise ValueError("nan on or below the diagonal: a task was learned but not evaluated")
    return A


def average_accuracy(A):
    """A = 1/T sum_t A[T,t]: the mean of the last row, a float.  MM-Prompt section 4.1; AA of the missing-modality paper."""
    return float(_matrix(A)[-1].mean())


def forgetting(A, best="earlier"):
    """F = 1/(T-1) sum_{t<T} (best score on task t before the end - A[T,t]), a float; 0.0 for one task; may be negative.

    best="earlier"  max over the rows t..T-1: Chaudhry et al. 2018, what MM-Prompt's code computes; FM(max).
    best="own"      max over the rows 1..t, as MM-Prompt's section 4.1 prints it.  Rows before t are nan unless future
                    tasks were evaluated, so it is the diagonal A[t,t]: FM(diag), minus backward transfer.
    """
    A = _matrix(A)
    T = len(A)
    if best not in ("earlier", "own"):
        raise ValueError(f"best is 'earlier' or 'own', not {best!r}")
    if T == 1:
        return 0.0
    rows = (lambda t: A[t:T - 1, t]) if best == "earlier" else (lambda t: A[:t + 1, t])
    return float(np.mean([np.nanmax(rows(t)) - A[-1, t] for t in range(T - 1)]))


def intra_forgetting(matrices, best="earlier"):
    """F_intra: the mean of `forgetting` over the outer tasks, each with the (S,S) matrix of its own subtasks, a float.

    MM-Prompt names it "logically similar" to F_inter and prints no formula (section 4.1); this is the literal reading.
    """
    return float(np.mean([forgetting(A, best) for A in matrices]))


def last(A):
    """Last_i = A[T,i], an array (T,).  ModalPrompt, appendix A."""
    return _matrix(A)[-1]


def avg(A):
    """Avg_i = 1/(T-i) sum_{t>i} A[t,i], an array (T-1,): the diagonal is left out, the last task has none.  Appendix A."""
    A = _matrix(A)
    return np.array([A[i + 1:, i].mean() for i in range(len(A) - 1)])


def backward_transfer(A):
    """B_t = 1/(t-1) sum_{i<t} (A[i,i] - A[t,i]) for t = 2..T, an array (T-1,).  Lower is better: the sign is the paper's,
    opposite to the usual BWT.  ModalPrompt, appendix A."""
    A = _matrix(A)
    return np.array([(A.diagonal()[:t] - A[t, :t]).mean() for t in range(1, len(A))])


def mean_accuracy(A):
    """M_t = 1/t sum_{i<=t} A[t,i] for t = 2..T, an array (T-1,).  ModalPrompt, appendix A."""
    A = _matrix(A)
    return np.array([A[t, :t + 1].mean() for t in range(1, len(A))])


def merge_effectiveness(joint, v, q):
    """Acc_joint - max(Acc_V-only, Acc_Q-only), elementwise.  Higher: the modalities add to each other.  MM-Prompt Eq. 12."""
    return np.asarray(joint, float) - np.maximum(v, q)


def modality_difference(v, q):
    """max(Acc_V-only, Acc_Q-only) - min(Acc_V-only, Acc_Q-only), elementwise.  Lower: balanced.  MM-Prompt Eq. 13."""
    return np.abs(np.subtract(v, q, dtype=float))


# ------------------------------------------------------------------------------------------------ answer scoring
_NUMBERS = dict(zip("none zero one two three four five six seven eight nine ten".split(),
                    "0 0 1 2 3 4 5 6 7 8 9 10".split()))
_ARTICLES = {"a", "an", "the"}
# The evaluation writes contractions with their apostrophe; answers without it are mapped to the form with it.
_CONTRACTIONS = {w.replace("'", ""): w for w in (
    "ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's I'm "
    "I've isn't it'd it'll let's ma'am might've mightn't must've mustn't needn't o'clock oughtn't shan't she'd she's "
    "should've shouldn't somebody'd something's that'd that's there'd there's they'd they'll they're they've wasn't "
    "we've weren't what'll what're what's what've when's where'd where's who'd who'll who's why'd why'll why're "
    "won't would've wouldn't y'all you'd you'll you're you've").split()
    if w.replace("'", "") not in {"shed", "hed", "its", "ill", "well", "were", "wed", "id"}}
_PUNCTUATION = ";/[]\"{}()=+\\_-><@`,?!"


def normalize_answer(text):
    """One answer as the official VQA evaluation compares it: no punctuation, digits for number words, no articles,
    contractions with their apostrophe, single spaces, lower case."""
    text = str(text).replace("\n", " ").replace("\t", " ").strip()
    comma_number = re.search(r"(\d)(,)(\d)", text) is not None
    out = text
    for p in _PUNCTUATION:                                           # a sign next to a space, or in 1,000: drop; else a space
        out = out.replace(p, "" if f"{p} " in text or f" {p}" in text or comma_number else " ")
    out = re.sub(r"(?<!\d)\.(?!\d)", "", out)                        # full stops, but not decimal points
    words = [_NUMBERS.get(w, w) for w in out.lower().split()]
    return " ".join(_CONTRACTIONS.get(w, w) for w in words if w not in _ARTICLES)


def vqa_accuracy(prediction, ten_answers):
    """VQA soft accuracy in [0,1]: mean over leaving one annotator out of min(1, matches among the others / 3).

    Any number of answers >= 1 works; one answer alone is compared exactly (official code needs ten).
    """
    truth = [normalize_answer(a) for a in ten_answers]
    guess = normalize_answer(prediction)
    if len(truth) == 1:
        return float(guess == truth[0])
    hits = truth.count(guess)                                        # leaving out a hit leaves hits-1, a miss leaves hits
    score = hits * min(1.0, (hits - 1) / 3) + (len(truth) - hits) * min(1.0, hits / 3)
    return score / len(truth)


def exact_match(prediction, answer):
    """1.0 if both are the same after trimming and lower-casing, else 0.0."""
    return float(str(prediction).strip().lower() == str(answer).strip().lower())


def token_f1(prediction, answer):
    """F1 of the two bags of normalised words, in [0,1].  Beside exact match for NExT-QA; WUPS needs WordNet: not here."""
    guess, truth = Counter(normalize_answer(prediction).split()), Counter(normalize_answer(answer).split())
    if not guess or not truth:
        return float(guess == truth)
    return 2 * sum((guess & truth).values()) / (guess.total() + truth.total())


# ------------------------------------------------------------------- answer scoring of CoIN (modalprompt.py)


def option_letter(text):
    """The letter A-E of a multiple-choice answer as CoIN reads it, or None: "B", "B. cat", "the choice is B"."""
    text = str(text).strip()
    match = re.match(r"([A-E])(?:\.\s|\.?$|\))", text) or re.search(r"\b([A-E])\b", text)
    return match.group(1) if match else None


def box_iou(a, b):
    """Intersection over union of two boxes (x1, y1, x2, y2), in [0,1]; 0.0 where one of them is empty."""
    w, h = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    area = lambda r: max(0.0, r[2] - r[0]) * max(0.0, r[3] - r[1])
    union = area(a) + area(b) - max(0.0, w) * max(0.0, h)
    return max(0.0, w) * max(0.0, h) / union if union > 0 else 0.0


def _official_box(text):
    """The official parser with its defect: brackets go, then the first and last character go once more, so that
    "[0.12, 0.30, 0.45, 0.98]" reads y2 = 0.9 and "[1.0, ..." reads x1 = 0.0."""
    try:
        return [float(x) for x in str(text).replace("[", "").replace("]", "")[1:-1].split(",")]
    except ValueError:
        return None


def score_instruction(kind, prediction, sample, official=False):
    """The score of one answer in [0,1] by the rule of its task; sample: dict with answer (and answers where known).

    kind letter   ScienceQA   the letter is right; no letter is wrong
         vqa      TextVQA     VQA soft accuracy over `answers`, normalised exact match where there is one answer
         class    ImageNet    official: one string contains the other, case matters, an empty answer counts as right
                              corrected: one contains the other as whole words, any case, empty is wrong
         gqa      GQA         exact, lower case, final full stops dropped
         word     VizWiz, VQAv2   exact, any case
         box      REC         IoU > 0.5; official: with the parser that loses digits; corrected: every number read
         title    OCRVQA      exact, any case; "unanswerable" is wrong
    Sources: the evaluation scripts of the official repository at c7bee7c, retold.  Raises ValueError for another kind.
    """
    truth, guess = str(sample["answer"]).strip(), str(prediction).strip()
    if kind == "letter":
        return float(option_letter(guess) == option_letter(truth))
    if kind == "vqa":
        return vqa_accuracy(guess, sample.get("answers") or [truth])
    if kind == "class":
        if official:
            return float(truth in guess or guess in truth)
        words = lambda x: f" {' '.join(re.findall(r'[a-z0-9]+', x.lower()))} "
        return float(bool(guess.strip()) and bool(words(guess).strip()) and
                     (words(truth) in words(guess) or words(guess) in words(truth)))
    if kind == "gqa":
        return float(guess.rstrip(".").lower() == truth.rstrip(".").lower())
    if kind == "word":
        return exact_match(guess, truth)
    if kind == "box":
        a, b = (_official_box(guess) if official else parse_box(guess)), parse_box(truth)
        return float(a is not None and len(a) == 4 and b is not None and box_iou(a, b) > 0.5)
    if kind == "title":
        return float(guess.lower() == truth.lower() and guess.lower() != "unanswerable")
    raise ValueError(f"kind is one of letter, vqa, class, gqa, word, box, title, not {kind!r}")


# -------------------------------------------------------------------------------- sentiment and emotion (missing_prompt.py)


def affect_scores(output, label, scoring="mosi"):
    """Scores of outputs (n,C) against labels (n,): a dict of floats, "accuracy" in points first.

    "mosi"     Acc-2: sign of the score, neutral labels (0) left out        "sims"   the same with zeros kept, as negative
    "classes"  accuracy of the argmax over C classes
    With a score also f1 (weighted over the two signs, points), mae, and corr (Pearson; nan where the outputs are constant).
    """
    output, label = np.asarray(output, float), np.asarray(label)
    if scoring == "classes":
        guess, truth = output.argmax(-1), label
    else:
        value = output[:, 0]
        used = label != 0 if scoring == "mosi" else np.ones(len(label), bool)
        guess, truth = value[used] > 0, label[used] > 0
    scores = {"accuracy": float(100 * np.mean(guess == truth)), "f1": weighted_f1(guess, truth)}
    if scoring != "classes":
        constant = value.std() == 0 or label.std() == 0
        scores |= {"mae": float(np.abs(value - label).mean()),
                   "corr": math.nan if constant else float(np.corrcoef(value, label)[0, 1])}
    return scores


def weighted_f1(guess, truth):
    """F1 of every class weighted by how often it is true, in points."""
    total = 0.0
    for c in np.unique(truth):
        hit = np.sum((guess == c) & (truth == c))
        total += np.mean(truth == c) * 2 * hit / (np.sum(guess == c) + np.sum(truth == c))
    return float(100 * total)


# ---------------------------------------------------------------------------------------------------- statistics


def mean_std(values):
    """(mean, sample standard deviation with ddof 1; 0.0 for one value)."""
    values = np.asarray(values, float)
    return float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else 0.0


def paired(a, b):
    """Paired comparison of two equally long lists of scores, one entry per seed.

    Returns {"difference": mean of a-b, "std": ddof 1, "wins": how often a > b, "n": n, "p": two-sided sign-flip test}.
    p is exact up to 16 pairs, from 20,000 seeded flips beyond.  With five pairs p cannot go below 2/32 = 0.0625.
    """
    d = np.subtract(a, b, dtype=float)
    mean, std = mean_std(d)
    n = len(d)
    signs = (np.array(list(itertools.product((1, -1), repeat=n))) if n <= 16
             else np.random.default_rng(0).choice((1, -1), size=(20_000, n)))
    p = float((np.abs(signs @ d) >= abs(d.sum()) - 1e-9).mean())
    return {"difference": mean, "std": std, "wins": int((d > 0).sum()), "n": n, "p": p}


# ------------------------------------------------------------------------------------- what a run leaves behind


@contextlib.contextmanager
def atomic(path, mode="w"):
    """Write to a neighbour of `path`, then rename: a run killed at any moment leaves the old file or the new, never half."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(part, mode, **({} if "b" in mode else {"encoding": "utf-8", "newline": ""})) as f:
            yield f
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def heat_map(A, path, rows=None, columns=None, title="", low=0.0, high=100.0):
    """Draw a matrix (R,C) as a PNG with Pillow; nan cells stay white.  rows, columns: labels.  Values are printed."""
    from PIL import Image, ImageDraw
    A = np.asarray(A, float)
    R, C = A.shape
    rows, columns = rows or [str(i + 1) for i in range(R)], columns or [str(i + 1) for i in range(C)]
    cell, left, top = 46, 12 + 7 * max(map(len, map(str, rows))), 54
    image = Image.new("RGB", (left + cell * C + 8, top + 26 * R + 8), "white")
    draw = ImageDraw.Draw(image)
    draw.text((8, 6), title, fill="black")
    for j, name in enumerate(columns):
        draw.text((left + cell * j + 2, top - 26 + 12 * (j % 2)), str(name)[:12], fill="black")
    for i, name in enumerate(rows):
        draw.text((6, top + 26 * i + 7), str(name), fill="black")
        for j in range(C):
            if not np.isfinite(A[i, j]):
                continue
            x = float(np.clip((A[i, j] - low) / (high - low or 1), 0, 1))
            box = (left + cell * j, top + 26 * i, left + cell * (j + 1) - 2, top + 26 * (i + 1) - 2)
            draw.rectangle(box, fill=(int(247 - 239 * x), int(251 - 170 * x), int(255 - 99 * x)))
            text = f"{A[i, j]:.1f}" if high > 2 else f"{A[i, j]:.2f}"
            draw.text((box[0] + 6, box[1] + 6), text, fill="white" if x > 0.55 else "black")
    with atomic(path, "wb") as f:
        image.save(f, "PNG")


def format_matrix(A, names):
    """The lower triangle as text, one row per learned task, at most 100 columns wide."""
    A = np.asarray(A, float)
    width = max(5, min(9, 86 // max(1, A.shape[1]) - 1))
    lines = [" " * 13 + " ".join(f"{str(n)[:width]:>{width}}" for n in names[:A.shape[1]])]
    for name, row in zip(names, A):
        lines.append(f"{str(name)[:12]:<12} " + " ".join(
            f"{'' if np.isnan(x) else f'{x:.1f}':>{width}}" for x in row).rstrip())
    return "\n".join(lines)


def environment():
    """Versions, commit and hardware of this run: a flat dict of strings and numbers."""
    import torch
    import transformers
    here = Path(__file__).resolve().parent
    git = lambda *a: subprocess.run(["git", "-C", str(here), *a], capture_output=True, text=True).stdout.strip()
    try:
        commit = git("rev-parse", "--short=12", "HEAD") + ("-dirty" if git("status", "--porcelain", "-uno") else "")
    except OSError:                                                  # no git on this machine
        commit = ""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
    return {"commit": commit or "unknown", "python": platform.python_version(), "torch": torch.__version__,
            "transformers": transformers.__version__, "numpy": np.__version__, "hardware": device,
            "cores": os.cpu_count(), "threads": torch.get_num_threads()}


def peak_memory_mb():
    """Peak memory so far in MiB: of the GPU where there is one, else of this process."""
    import torch
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2 ** 20
    try:
        import resource
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / (2 ** 20 if sys.platform == "darwin" else 1024)
    except ImportError:                                              # Windows has no resource module
        return float("nan")


class Run:
    """One folder, one run: log.jsonl, checkpoint.pt, results.json, matrix.csv, matrix.png, prompts.safetensors.

    args: a flat dict that decides the outcome.  resume=True needs the same args and continues; resume=False starts anew, and
    moves another run's files to <folder>/before.<n>; only a finished run of the same args is replaced.
    Raises InputError for a checkpoint of other arguments.
    """

    FILES = ("checkpoint.pt", "log.jsonl", "results.json", "matrix.csv", "matrix.png", "prompts.safetensors")

    def __init__(self, folder, args, resume=False):
        self.folder, self.args, self.start, self.before = Path(folder), dict(args), time.time(), 0.0
        self.folder.mkdir(parents=True, exist_ok=True)
        self.state = self._load() if resume else None
        if self.state is None:
            self._make_room()
        else:
            self.before = self.state["minutes"]
            lines = (self.folder / "log.jsonl").read_text().splitlines() if (self.folder / "log.jsonl").exists() else []
            with atomic(self.folder / "log.jsonl") as f:             # drop the lines written after the last checkpoint
                f.writelines(line + "\n" for line in lines[:self.state["log_lines"]])
        self.lines = self.state["log_lines"] if self.state else 0

    def _make_room(self):
        old, files = finished(self.folder), [f for name in self.FILES if (f := self.folder / name).exists()]
        if old and old.get("args") == jsonable(self.args):
            for f in files:
                f.unlink()
        elif files:
            aside = next(p for n in itertools.count(1) if not (p := self.folder / f"before.{n}").exists())
            aside.mkdir()
            _say(f"{self.folder} held another run, now in {aside}" + ("" if old else "; --resume goes on with a run"))
            for f in files:
                f.rename(aside / f.name)

    def _load(self):
        import torch
        path = self.folder / "checkpoint.pt"
        if not path.exists():
            return None
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            old = state["args"]
        except Exception as e:
            raise InputError(f"{path} is not a readable checkpoint ({type(e).__name__}); delete it or run without --resume")
        wrong = sorted(k for k in {*old, *self.args} if old.get(k) != self.args.get(k))
        if wrong:
            k = wrong[0]
            raise InputError(f"{path} was made with other arguments: {', '.join(wrong)} (--{k.replace('_', '-')} was "
                             f"{old.get(k)!r}, now {self.args.get(k)!r}); use the same, another --out, or no --resume")
        return state

    @property
    def minutes(self):
        return self.before + (time.time() - self.start) / 60

    def log(self, **row):
        """Append one line to log.jsonl."""
        with open(self.folder / "log.jsonl", "a", encoding="utf-8") as f:
            f.write(json.dumps(jsonable(row)) + "\n")
        self.lines += 1

    def checkpoint(self, **state):
        """Write checkpoint.pt atomically; tensors, numbers, strings, lists and dicts only (read with weights_only=True)."""
        import torch
        with atomic(self.folder / "checkpoint.pt", "wb") as f:
            torch.save({**state, "args": self.args, "log_lines": self.lines, "minutes": self.minutes}, f)

    def finish(self, A, names, metrics, prompts=None, title="", **more):
        """Write results.json, matrix.csv and matrix.png, and prompts.safetensors if given.  Returns what results.json holds."""
        A = np.asarray(A, float)
        with atomic(self.folder / "matrix.csv") as f:
            out = csv.writer(f)
            out.writerow(["after"] + list(names))
            out.writerows([name, *("" if np.isnan(x) else f"{x:.4f}" for x in row)] for name, row in zip(names, A))
        heat_map(A, self.folder / "matrix.png", list(names), list(names), title)
        if prompts:
            from safetensors.torch import save                       # comes with transformers
            with atomic(self.folder / "prompts.safetensors", "wb") as f:
                f.write(save({k: v.detach().cpu().contiguous() for k, v in prompts.items()}))
        results = jsonable({"metrics": metrics, "matrix": A, "tasks": list(names), "minutes": self.minutes,
                            "peak_memory_mb": peak_memory_mb(), "args": self.args, **more, "environment": environment()})
        with atomic(self.folder / "results.json") as f:
            json.dump(results, f, indent=1)
        return results


def jsonable(x):
    """x with arrays as lists and nan as None, so that any JSON reader takes it."""
    if isinstance(x, dict):
        return {str(k): jsonable(v) for k, v in x.items()}
    if isinstance(x, (list, tuple, np.ndarray)):
        return [jsonable(v) for v in x]
    if isinstance(x, (np.generic,)):
        x = x.item()
    if isinstance(x, Path):
        return str(x)
    return None if isinstance(x, float) and not math.isfinite(x) else x


# ------------------------------------------------------------------------------ several seeds, the papers' tables


def finished(folder):
    """What results.json of a finished run holds, or None."""
    try:
        return json.loads((Path(folder) / "results.json").read_text())
    except (OSError, ValueError):
        return None


def spread(values):
    """"mean ± standard deviation" of several values, one value alone, "-" for none."""
    return "{:.2f} ± {:.2f}".format(*mean_std(values)) if len(values) > 1 else f"{values[0]:.2f}" if values else "-"


def last_line(name, results, jobs, columns):
    """One line to copy: the columns (mean ± standard deviation over runs), the jobs, minutes, peak memory."""
    values = {k: [r["metrics"][k] for r in results] for k in columns if k in results[0]["metrics"]}
    flags = {k: list(dict.fromkeys(str(job[k]) for job in jobs)) for k in jobs[0]}
    return f"{name}: " + " | ".join([f"{k} {spread(v)}" for k, v in values.items()] +
                                    [f"{k}{'s' * (len(v) > 1)} {' '.join(v)}" for k, v in flags.items()] +
                                    [f"{sum(r['minutes'] for r in results):.1f} min",
                                     f"peak {max(r['peak_memory_mb'] for r in results):.0f} MiB"])


def run_jobs(name, jobs, run, folder, columns):
    """run(job, folder) for every job, a dict of flags such as {"seed": 0}; a line each.  Several get a folder each in `folder`, a
    results.json of their means and standard deviations, and a line for all.  Returns what the runs return, a list."""
    folder, results = Path(folder), []
    for job in jobs:
        results.append(run(job, folder / "-".join(f"{k}{v}" for k, v in job.items()) if len(jobs) > 1 else folder))
        print(last_line(name, results[-1:], [job], columns))
    if len(jobs) > 1:
        both = {k: dict(zip(("mean", "std"), mean_std([r["metrics"][k] for r in results]))) for k in results[0]["metrics"]}
        with atomic(folder / "results.json") as f:
            json.dump(jsonable({"metrics": both, "jobs": jobs, "runs": [r["metrics"] for r in results]}), f, indent=1)
        print(last_line(name, results, jobs, columns))
    return results


def run_table(args, title, rows, jobs, settle, run, folder, columns, compare, against, paper, only=None, more=lambda done: []):
    """Every row x job of a table of a paper beside the paper's numbers: printed, and table<name>.md and .json in `folder`.

    rows     [(label, changes, numbers)]: the flags that make a row, and what the paper prints, a tuple or None
    jobs     [{"seed": 0}, ...]: the flags that make a repetition
    args     of the command line; a run has them with its row's changes and its job
    settle   args of a run -> (args, deciding): with the defaults that depend on others, and the dict of those that decide its outcome
    run      args, folder -> what results.json holds
    columns  the metrics shown; compare: those compared with the row against(label), paired over jobs
    paper    heading of the paper's numbers      only: the labels to run, None for all; others are shown where finished
    more     {label: {job's values: results}} -> further lines

    A run lies in runs/<method>-<job>-<digest of deciding>: rows with equal flags share it, between tables too; what is finished
    is not run again, so a stopped table goes on; processes may share `folder` (the last word has a call with all jobs).
    Raises InputError for a label that is not there.
    """
    folder, name, labels, plan = Path(folder), args.table, [label for label, *_ in rows], []
    if {*(only or ())} - {*labels}:
        raise InputError(f"--rows of table {name} are: {', '.join(labels)}")
    for job, (label, changes, _) in itertools.product(jobs, rows):
        one, deciding = settle(argparse.Namespace(**{**vars(args), **changes, **job, "quiet": True, "resume": True}))
        digest = hashlib.sha256(json.dumps(jsonable(deciding), sort_keys=True).encode()).hexdigest()[:10]
        plan.append((label, tuple(job.values()), one,
                     folder / "runs" / "-".join([one.method, *(f"{k}{v}" for k, v in job.items()), digest])))

    def write():
        done = {label: {job: r for l, job, _, where in plan if l == label and (r := finished(where))} for label in labels}
        lines, content = format_table(rows, done, columns, compare, against, paper)
        lines = [title, "", *lines, *more(done)]
        with atomic(folder / f"table{name}.json") as f:
            json.dump(jsonable({"title": title, "jobs": list(jobs[0]), "rows": content}), f)
        with atomic(folder / f"table{name}.md") as f:
            f.write("\n".join(lines) + "\n")
        return "\n".join(lines)
    todo = [p for p in plan if (only is None or p[0] in only) and not finished(p[3])]
    for n, (label, job, one, where) in enumerate(todo):
        if not finished(where):                                      # a row before it, or a process beside, may share it
            result = run(one, where)
            print(f"[{n + 1}/{len(todo)}] " + last_line(label, [result], [dict(zip(jobs[0], job))], columns), flush=True)
            (where / "checkpoint.pt").unlink(missing_ok=True)
            write()
    print(write())


def format_table(rows, done, columns, compare, against, paper):
    """(lines of Markdown, rows for JSON) of run_table: mean ± standard deviation (ddof 1) over runs, and paired differences."""
    refs = " or ".join(dict.fromkeys(x for x in map(against, done) if x in done))
    compare = compare if refs else ()
    head = [*columns, *(f"{k} minus that of {refs}" for k in compare), *([f"paper: {paper}"] if paper else []), "runs", "min"]
    lines, content = ["| | " + " | ".join(head) + " |", "|---" * (1 + len(head)) + "|"], []
    for label, changes, numbers in rows:
        runs, ref = done[label], done.get(against(label), {})
        row = {"label": label, "changes": changes, "paper": numbers, "against": {}, "runs": [
            {"job": job, **{k: r[k] for k in ("metrics", "matrix", "minutes")}, **{k: r["environment"][k] for k in ("commit", "hardware")}}
            for job, r in runs.items()]}
        values = {k: [r["metrics"][k] for r in runs.values() if r["metrics"].get(k) is not None] for k in columns}
        cells, both = [spread(values[k]) if runs else "not run" for k in columns], [job for job in runs if job in ref]
        for k in compare:
            if against(label) in (None, label) or not both:
                cells.append("-")
                continue
            d = row["against"][k] = paired(*([x[job]["metrics"][k] for job in both] for x in (runs, ref)))
            cells.append(f"{d['difference']:+.2f} ± {d['std']:.2f} ({d['wins']}/{d['n']}, {d['p']:.3f})")
        cells += [" / ".join("-" if x is None else f"{x:g}" for x in numbers) if numbers else "-"] if paper else []
        cells += [str(len(runs)), f"{np.mean([r['minutes'] for r in runs.values()]):.1f}" if runs else "-"]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
        content.append(row)
    made = [r for row in content for r in row["runs"]]
    lines += ["", "Mean ± standard deviation over runs. " + ("Differences: paired (in how many higher/pairs, p of the two-sided sign-flip "
              "test). " if compare else "") + f"Commits {', '.join(sorted({r['commit'] for r in made})) or 'none'}; "
              f"{', '.join(sorted({r['hardware'] for r in made})) or 'nothing run'}."]
    return lines, content


# ------------------------------------------------------------------------------------------------- command line


def run_cli(main):
    """Run a script's main(): bad input, a full disk, no GPU memory or Ctrl-C end in one clear line and exit code 2 (130)."""
    try:
        main()
        sys.stdout.flush()
    except InputError as e:
        sys.exit(_say(f"error: {e}"))
    except KeyboardInterrupt:
        _say("stopped; --resume goes on from the last finished epoch")
        sys.exit(130)
    except BrokenPipeError:                                          # the reader of the pipe has seen enough, as head has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT):
            sys.exit(_say(f"error: cannot write {e.filename or ''}: {e.strerror}; free space or choose another --out; "
                          "--resume goes on from the last finished epoch"))
        raise
    except RuntimeError as e:
        if "out of memory" in str(e).lower():
            sys.exit(_say("error: not enough memory on the device; use a smaller --batch (with --accum to keep its product), "
                          "--dtype bf16, or --device cpu; --resume goes on from the last finished epoch"))
        raise


def _say(line):
    print(line, file=sys.stderr)
    return 2
