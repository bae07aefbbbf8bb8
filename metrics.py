"""Every metric of the three papers, answer scoring, and what a run leaves behind.

The accuracy matrix.  A is a float array (T,T): A[t,i] = score on task i after learning task t, nan above the
diagonal.  T tasks, indices from 0, scores in points (0..100).  Every function on it is pure: it never edits
what it is given.

Sources   MM-Prompt, arXiv 2505.19455v1, sections 4.1, A, B (Eq. 12-13)
          ModalPrompt, arXiv 2410.05849v2, appendix A
          missing modalities, arXiv 2503.00528, section 4.1
          VQA evaluation, Antol et al. 2015
"""
import argparse
import contextlib
import csv
import errno
import hashlib
import io
import itertools
import json
import math
import os
import pickle
import platform
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save                                   # comes with transformers
from tqdm import tqdm

from data import InputError, cache_folder, parse_box

# ======================================================================================== the accuracy matrix


def _matrix(A):
    """A checked float64 copy of A.  Raises ValueError unless A is (T,T) with a full lower triangle."""
    A = np.array(A, dtype=float)                                     # a copy: callers keep theirs
    if A.ndim != 2 or A.shape[0] != A.shape[1] or len(A) == 0:
        raise ValueError(f"an accuracy matrix is (T,T) with T >= 1, not {A.shape}")
    if np.isnan(A[np.tril_indices(len(A))]).any():
        raise ValueError("nan on or below the diagonal: a task was learned but not evaluated")
    return A


def average_accuracy(A):
    """A = 1/T sum_t A[T,t]: the mean of the last row, a float.  MM-Prompt section 4.1; AA of missing modalities."""
    return float(_matrix(A)[-1].mean())


def forgetting(A, best="earlier"):
    """F = 1/(T-1) sum_{t<T} (best score on task t before the end - A[T,t]), a float; 0.0 for one task.

    best="earlier"  max over the rows t..T-1: Chaudhry et al. 2018, what MM-Prompt's code computes; FM(max).
    best="own"     max over the rows 1..t, as MM-Prompt's section 4.1 prints it.  Rows before t are nan unless
                    future tasks were evaluated, so it is the diagonal A[t,t]: FM(diag), minus backward transfer.
    It may be negative: learning one task can help another.
    """
    A = _matrix(A)
    rows = {"earlier": lambda t: A[t:-1, t], "own": lambda t: A[:t + 1, t]}
    if best not in rows:
        raise ValueError(f"best is 'earlier' or 'own', not {best!r}")
    lost = [np.nanmax(rows[best](t)) - A[-1, t] for t in range(len(A) - 1)]
    return float(np.mean(lost)) if lost else 0.0


def intra_forgetting(matrices):
    """F_intra: the mean of `forgetting` over the outer tasks, each with the (S,S) matrix of its own subtasks.

    MM-Prompt names it "logically similar" to F_inter and prints no formula (section 4.1); this is the literal
    reading.  A float.
    """
    return float(np.mean([forgetting(A) for A in matrices]))


def last(A):
    """Last_i = A[T,i], an array (T,).  ModalPrompt, appendix A."""
    return _matrix(A)[-1]


def avg(A):
    """Avg_i = 1/(T-i) sum_{t>i} A[t,i], an array (T-1,).  ModalPrompt, appendix A.

    The diagonal is left out, so the last task has none."""
    A = _matrix(A)
    return np.array([A[i + 1:, i].mean() for i in range(len(A) - 1)])


def backward_transfer(A):
    """B_t = 1/(t-1) sum_{i<t} (A[i,i] - A[t,i]) for t = 2..T, an array (T-1,).  ModalPrompt, appendix A.

    Lower is better: the sign is the paper's, opposite to the usual BWT."""
    A = _matrix(A)
    return np.array([(A.diagonal()[:t] - A[t, :t]).mean() for t in range(1, len(A))])


def mean_accuracy(A):
    """M_t = 1/t sum_{i<=t} A[t,i] for t = 2..T, an array (T-1,).  ModalPrompt, appendix A."""
    A = _matrix(A)
    return np.array([A[t, :t + 1].mean() for t in range(1, len(A))])


def merge_effectiveness(joint, v, q):
    """How much the modalities add to each other: higher is better.  MM-Prompt Eq. 12."""
    # Acc_joint - max(Acc_V-only, Acc_Q-only), elementwise                                              Eq. 12
    return np.asarray(joint, float) - np.maximum(v, q)


def modality_difference(v, q):
    """How far one modality is ahead of the other: lower is balanced.  MM-Prompt Eq. 13."""
    # max(Acc_V-only, Acc_Q-only) - min(Acc_V-only, Acc_Q-only), elementwise                            Eq. 13
    return np.abs(np.subtract(v, q, dtype=float))


# ============================================================================================= answer scoring
_NUMBERS = dict(zip("none zero one two three four five six seven eight nine ten".split(),
                    "0 0 1 2 3 4 5 6 7 8 9 10".split()))
_ARTICLES = {"a", "an", "the"}
# The evaluation writes contractions with their apostrophe; answers without it are mapped to the form with it.
_CONTRACTIONS = {w.replace("'", ""): w for w in (
    "ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he's how'd how'll how's I'm "
    "I've isn't it'd it'll let's ma'am might've mightn't must've mustn't needn't o'clock oughtn't shan't she's "
    "should've shouldn't somebody'd something's that'd that's there'd there's they'd they'll they're they've wasn't "
    "we've weren't what'll what're what's what've when's where'd where's who'd who'll who's why'd why'll why're "
    "won't would've wouldn't y'all you'd you'll you're you've").split()}
_PUNCTUATION = ";/[]\"{}()=+\\_-><@`,?!"


def normalize_answer(text):
    """One answer as the official VQA evaluation compares it: no punctuation, digits for number words, no
    articles, contractions with their apostrophe, single spaces, lower case."""
    text = str(text).replace("\n", " ").replace("\t", " ").strip()
    comma_number = re.search(r"(\d)(,)(\d)", text) is not None
    out = text
    for p in _PUNCTUATION:                                           # next to a space, or in 1,000: dropped
        out = out.replace(p, "" if f"{p} " in text or f" {p}" in text or comma_number else " ")
    out = re.sub(r"(?<!\d)\.(?!\d)", "", out)                        # full stops, but not decimal points
    words = [_NUMBERS.get(w, w) for w in out.lower().split()]
    return " ".join(_CONTRACTIONS.get(w, w) for w in words if w not in _ARTICLES)


def vqa_accuracy(prediction, ten_answers):
    """VQA soft accuracy in [0,1]: min(1, matches among the others / 3), each annotator left out once, mean.

    With fewer than four annotators the threshold is the number of the others; one answer alone is compared exactly
    (the official code needs ten).
    """
    truth = [normalize_answer(a) for a in ten_answers]
    guess = normalize_answer(prediction)
    if len(truth) == 1:
        return float(guess == truth[0])
    hits, enough = truth.count(guess), min(3, len(truth) - 1)
    # without one of the hits, hits - 1 are left
    score = hits * min(1.0, (hits - 1) / enough) + (len(truth) - hits) * min(1.0, hits / enough)
    return score / len(truth)


def token_f1(prediction, answer):
    """F1 of the two bags of normalised words, in [0,1].

    It stands beside exact match for NExT-QA, whose WUPS needs WordNet."""
    guess, truth = Counter(normalize_answer(prediction).split()), Counter(normalize_answer(answer).split())
    if not guess or not truth:
        return float(guess == truth)
    return 2 * sum((guess & truth).values()) / (guess.total() + truth.total())


# ==================================================================== answer scoring of CoIN (modalprompt.py)


def option_letter(text):
    """The letter A-E of a multiple-choice answer as CoIN reads it ("B", "B. cat", "the choice is B"), or None."""
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
    """The official parser with its defect: brackets go, then the first and last character go once more.

    So "[0.12, 0.30, 0.45, 0.98]" reads y2 = 0.9 and "[1.0, ..." reads x1 = 0.0."""
    try:
        return [float(x) for x in str(text).replace("[", "").replace("]", "")[1:-1].split(",")]
    except ValueError:
        return None


def score_instruction(kind, prediction, sample, official=False):
    """The score of one answer in [0,1] by the rule of its task.  sample: a dict with answer, and answers if known.

    kind letter   ScienceQA   the letter is right; no letter is wrong
         vqa      TextVQA     VQA soft accuracy over `answers`; normalised exact match where there is one
         class    ImageNet    official: one string contains the other, case matters, an empty one is right
                              corrected: one contains the other as whole words, any case, empty is wrong
         gqa      GQA         exact, lower case, final full stops dropped
         word     VizWiz, VQAv2   exact, any case
         box      REC         IoU > 0.5; official: with the parser that loses digits; corrected: all are read
         title    OCRVQA      exact, any case; "unanswerable" is wrong
    Source: the evaluation scripts of the official repository at c7bee7c, retold.
    Raises ValueError for another kind.
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
        a, b = words(guess), words(truth)
        return float(bool(a.strip()) and (a in b or b in a))
    if kind == "gqa":
        return float(guess.rstrip(".").lower() == truth.rstrip(".").lower())
    if kind == "word":
        return float(guess.lower() == truth.lower())
    if kind == "box":
        a, b = (_official_box(guess) if official else parse_box(guess)), parse_box(truth)
        return float(a is not None and len(a) == 4 and b is not None and box_iou(a, b) > 0.5)
    if kind == "title":
        return float(guess.lower() == truth.lower() and guess.lower() != "unanswerable")
    raise ValueError(f"kind is one of letter, vqa, class, gqa, word, box, title, not {kind!r}")


# ================================================================== sentiment and emotion (missing_prompt.py)


def affect_scores(output, label, scoring="mosi"):
    """Scores of outputs (n,C) against labels (n,): a dict of floats, "accuracy" in points first.

    "mosi"     Acc-2: sign of the score, neutral labels (0) left out
    "sims"     the same with zeros kept, as negative
    "classes"  accuracy of the argmax over C classes
    f1 is weighted, in points; with a score also mae, and corr (Pearson; nan where outputs are equal).
    """
    output, label = np.asarray(output, float), np.asarray(label)
    if scoring == "classes":
        return agreement(output.argmax(-1), label)
    value = output[:, 0]
    used = label != 0 if scoring == "mosi" else np.ones(len(label), bool)
    constant = value.std() == 0 or label.std() == 0
    return {**agreement(value[used] > 0, label[used] > 0), "mae": float(np.abs(value - label).mean()),
            "corr": math.nan if constant else float(np.corrcoef(value, label)[0, 1])}


def agreement(guess, truth):
    """{"accuracy", "f1"} in points; f1 is that of every class, weighted by how often the class is true."""
    f1 = 0.0
    for c in np.unique(truth):
        hit = np.sum((guess == c) & (truth == c))
        f1 += np.mean(truth == c) * 2 * hit / (np.sum(guess == c) + np.sum(truth == c))
    return {"accuracy": float(100 * np.mean(guess == truth)), "f1": float(100 * f1)}


# ================================================================================================= statistics


def mean_std(values):
    """(mean, sample standard deviation with ddof 1; 0.0 for one value)."""
    values = np.asarray(values, float)
    return float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else 0.0


def paired(a, b):
    """Paired comparison of two equally long lists of scores, one entry per seed.

    Returns {"difference": mean of a-b, "std": ddof 1, "wins": how often a > b, "n": n, "p": two-sided sign-flip
    test}.  p is exact up to 16 pairs, from 20,000 seeded flips beyond; with five it cannot go below 2/32 = 0.0625.
    """
    d = np.subtract(a, b, dtype=float)
    mean, std = mean_std(d)
    n = len(d)
    signs = (np.array(list(itertools.product((1, -1), repeat=n))) if n <= 16
             else np.random.default_rng(0).choice((1, -1), size=(20_000, n)))
    p = float((np.abs(signs @ d) >= abs(d.sum()) - 1e-9).mean())
    return {"difference": mean, "std": std, "wins": int((d > 0).sum()), "n": n, "p": p}


# ========================================================================================= files and pictures
# Whatever is written appears whole or not at all, and every picture is drawn with Pillow: nothing else is needed.


@contextlib.contextmanager
def atomic(path, mode="w"):
    """Write to a neighbour of `path`, then rename: a kill at any moment leaves the old file or the new, never
    half.  Of several processes the first writes."""
    if RANK:
        yield io.BytesIO() if "b" in mode else io.StringIO()
        return
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(part, mode, **({} if "b" in mode else {"encoding": "utf-8", "newline": ""})) as f:
            yield f
            f.flush()
            os.fsync(f.fileno())                             # on the disk before it takes the old file's name
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def jsonable(x):
    """x with arrays as lists and nan as None, so that any JSON reader takes it."""
    if isinstance(x, dict):
        return {str(k): jsonable(v) for k, v in x.items()}
    if isinstance(x, (list, tuple, np.ndarray)):
        return [jsonable(v) for v in x]
    if isinstance(x, np.generic):
        x = x.item()
    return None if isinstance(x, float) and not math.isfinite(x) else x


def digest(x):
    """Twelve hexadecimal digits that depend on all of x."""
    return hashlib.sha256(json.dumps(jsonable(x), sort_keys=True).encode()).hexdigest()[:12]


def content(data):
    """The same for bytes: their hash as text."""
    return hashlib.sha256(data).hexdigest()


def _canvas(width, height, title):
    from PIL import Image, ImageDraw, ImageFont
    image = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(image)
    draw.font = ImageFont.load_default(12)
    draw.text((10, 8), title, fill="black")
    return image, draw


def heat_map(A, path, rows, columns, title="", low=0.0, high=100.0):
    """Draw a matrix (R,C) as a PNG; nan cells stay white.  rows, columns: labels.  Values are printed."""
    A = np.asarray(A, float)
    R, C = A.shape
    cell, left, top = 46, 12 + 7 * max(map(len, map(str, rows))), 54
    image, draw = _canvas(left + cell * C + 8, top + 26 * R + 8, title)
    for j, name in enumerate(columns):                          # two lines, so that neighbours do not overlap
        draw.text((left + cell * j + 2, top - 29 + 13 * (j % 2)), str(name)[:12], fill="black")
    for i, name in enumerate(rows):
        draw.text((6, top + 26 * i + 5), str(name), fill="black")
        for j in np.flatnonzero(np.isfinite(A[i])):
            x = float(np.clip((A[i, j] - low) / (high - low or 1), 0, 1))
            box = (left + cell * j, top + 26 * i, left + cell * (j + 1) - 2, top + 26 * (i + 1) - 2)
            draw.rectangle(box, fill=(int(247 - 239 * x), int(251 - 170 * x), int(255 - 99 * x)))
            text = f"{A[i, j]:.1f}" if high > 2 else f"{A[i, j]:.2f}"
            draw.text((box[0] + 6, box[1] + 4), text, fill="white" if x > 0.55 else "black")
    with atomic(path, "wb") as f:
        image.save(f, "PNG")


def chart(labels, values, path, title="", lines=False):
    """A bar for each label, as long as the mean of its values, with the standard deviation as a whisker; or,
    for the figures of a paper that are lines, points joined from left to right.  Written to `path` as a PNG.

    labels: n strings.  values: n lists of floats, an empty one for what was not run.
    """
    points = [mean_std(v) if len(v) else None for v in values]
    known = [m + s * k for m, s in filter(None, points) for k in (-1, 1)] or [0.0, 1.0]
    low, high = min(0.0, *known), max(known) * 1.02 or 1.0
    scale = lambda x: (x - low) / (high - low or 1)
    blue, grey = (8, 81, 156), (120, 120, 120)
    if lines:
        low = min(known) - 0.1 * (max(known) - min(known) or 1)      # a line needs no zero
        width, height, left, bottom = 100 + 90 * len(labels), 360, 60, 310
        image, draw = _canvas(width, height, title)
        place = lambda i, x: (left + 45 + 90 * i, bottom - 250 * scale(x))
        for x in np.linspace(low, high, 6):
            y = place(0, x)[1]
            draw.line((left, y, width - 10, y), fill=(225, 225, 225))
            draw.text((8, y - 8), f"{x:.1f}", fill=grey)
        there = [(i, p) for i, p in enumerate(points) if p]
        draw.line([place(i, m) for i, (m, _) in there], fill=blue, width=2)
        for i, (m, s) in there:
            (x, y0), (_, y1) = place(i, m - s), place(i, m + s)
            draw.line((x, y0, x, y1), fill=grey, width=2)
            draw.ellipse((x - 4, place(i, m)[1] - 4, x + 4, place(i, m)[1] + 4), fill=blue)
        for i, label in enumerate(labels):
            draw.text((left + 12 + 90 * i, bottom + 14), str(label)[:13], fill="black")
    else:
        left = 24 + 8 * max(map(len, labels))
        image, draw = _canvas(left + 480, 44 + 26 * len(labels), title)
        for i, (label, point) in enumerate(zip(labels, points)):
            y = 38 + 26 * i
            draw.text((10, y), label, fill="black")
            if point is None:
                draw.text((left, y), "not run", fill=grey)
                continue
            x = lambda value: left + 380 * scale(value)
            m, s = point
            draw.rectangle((min(x(0), x(m)), y, max(x(0), x(m)), y + 16), fill=blue)
            draw.line((x(m - s), y + 8, x(m + s), y + 8), fill=grey, width=3)
            draw.text((max(x(m + s), x(0)) + 8, y), f"{m:.1f} ± {s:.1f}", fill="black")
    with atomic(path, "wb") as f:
        image.save(f, "PNG")


def format_matrix(A, names):
    """The rows of A that are known as text, one per learned task, at most 100 columns wide."""
    A = np.asarray(A, float)
    width = max(5, min(9, 86 // max(1, A.shape[1]) - 1))
    lines = [" " * 13 + " ".join(f"{str(n)[:width]:>{width}}" for n in names[:A.shape[1]])]
    for name, row in zip(names, A):
        if not np.isnan(row).all():
            lines.append(f"{str(name)[:12]:<12} " + " ".join(
                f"{'' if np.isnan(x) else f'{x:.1f}':>{width}}" for x in row).rstrip())
    return "\n".join(lines)


# ============================================================================================ models and time


def from_pretrained(cls, name, flag, **more):
    """cls.from_pretrained, with one clear line when the id or folder cannot be loaded."""
    try:
        return cls.from_pretrained(name, **more)
    except (OSError, ValueError, TypeError, KeyError, RuntimeError, EOFError, SafetensorError,
            pickle.UnpicklingError) as e:                            # TypeError: a configuration that is no object
        why = (str(e).strip() or "empty").splitlines()[0][:160]
        raise InputError(f"{flag} {name}: cannot be loaded ({why}); give a Hugging Face id (needs the network once) or a "
                         "folder written by save_pretrained") from None


@contextlib.contextmanager
def one_clear_line():
    """Around the making of a paper's module: its ValueError becomes the command line's one line."""
    try:
        yield
    except ValueError as e:
        raise InputError(str(e)) from None


BACKBONES, SHIPPED = Path(__file__).resolve().parent / "backbones", 5


def small_backbone(name, seed, config):
    """The weights {name: float32 tensor} in backbones/<name>-<seed>.safetensors, of a built-in world.

    config: everything its training depends on.  Raises InputError for a file that is missing, broken, or made
    for another configuration.
    """
    path = BACKBONES / f"{name}-{seed}.safetensors"
    if not path.exists():
        raise InputError(f"{path} is missing: seeds 0 to {SHIPPED - 1} are shipped; "
                         f"--pretrain --backbone-seed {seed} makes this one (up to half an hour)")
    try:
        with safe_open(path, "pt") as f:
            made_for, names = (f.metadata() or {}).get("config"), list(f.keys())
            tensors = {k: f.get_tensor(k) for k in names}
    except (SafetensorError, OSError) as e:
        raise InputError(f"{path} is not a whole safetensors file ({e}); check it out again, or use --pretrain")
    if made_for != digest(config):
        raise InputError(f"{path} was made for another configuration or world; check it out again, or make it "
                         f"anew with --pretrain --backbone-seed {seed}")
    return {k: v.float() if v.is_floating_point() else v for k, v in tensors.items()}


def keep_small_backbone(name, seed, config, tensors, **about):
    """Write such a file in half precision.  about: what else its metadata says (world, minutes, bounds)."""
    half = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    half = {k: v.to(torch.float16) if v.is_floating_point() else v for k, v in half.items()}
    about = {"config": digest(config), **{k: v if isinstance(v, str) else json.dumps(jsonable(v)) for k, v in about.items()}}
    with atomic(BACKBONES / f"{name}-{seed}.safetensors", "wb") as f:
        f.write(save(half, metadata=about))


def keep_with_bounds(name, seed, config, tensors, start, world, script, scores):
    """Write a small backbone, measure what it reaches frozen and with joint training, and write that into its
    metadata.

    start: when its training began.  script: the module that uses it.  scores: the metrics that are kept,
    ("A", ...).
    """
    minutes, bounds = (time.time() - start) / 60, {}
    command = f"python {Path(script.__file__).name} --pretrain --backbone-seed {seed}"
    about = {"world": world, "command": command, "minutes": round(minutes, 1)}
    keep_small_backbone(name, seed, config, tensors, **about)
    with tempfile.TemporaryDirectory() as folder:
        for method in ("none", "joint"):
            flags = ["--method", method, "--seeds", str(seed), "--backbone-seed", str(seed), "--quiet"]
            done = script.run(script.settle(with_seed(script.parse_args(flags))), Path(folder) / method)
            bounds[method] = {k: round(done["metrics"][k], 2) for k in scores if k in done["metrics"]}
    keep_small_backbone(name, seed, config, tensors, bounds=bounds, **about)
    print(f"{name}-{seed}: {minutes:.1f} min, {bounds}")


def fit(text, loss_of, optimizer, schedule, steps, grad_clip=math.inf, quiet=False):
    """The loop of every pre-training: loss_of(step) -> (), one optimiser step each, a progress bar."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    bar = tqdm(range(steps), desc=text, leave=False, mininterval=5, disable=quiet)
    for step in bar:
        loss = loss_of(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if grad_clip < math.inf:
            torch.nn.utils.clip_grad_norm_(parameters, grad_clip)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")


def seconds(device, *jobs, repeats=7):
    """The median time of each job in seconds, for --bench.

    Jobs run in turns that change order from round to round, so that a machine's moods fall on all of them
    alike; the first round warms up and does not count."""
    wait = torch.cuda.synchronize if str(device).startswith("cuda") else lambda: None
    times, dice = [[] for _ in jobs], random.Random(0)
    for r in range(repeats + 1):
        for job, mine in dice.sample([*zip(jobs, times)], len(jobs)):
            wait()
            start = time.perf_counter()
            job()
            wait()
            mine += [time.perf_counter() - start] * (r > 0)
    return [float(np.median(t)) for t in times]


def for_backward_mb(job):
    """MiB that job keeps for its backward pass, for --bench: every stored tensor once."""
    stored = {}                                                      # where it lies -> bytes

    def note(x):
        stored[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x
    with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
        job()
    return sum(stored.values()) / 2 ** 20


def environment():
    """Versions, commit and hardware of this run: a flat dict of strings and numbers."""
    import transformers
    here = Path(__file__).resolve().parent
    git = lambda *a: subprocess.run(["git", "-C", str(here), *a], capture_output=True, text=True).stdout.strip()
    try:
        commit = git("rev-parse", "--short=12", "HEAD") + ("-dirty" if git("status", "--porcelain", "-uno") else "")
    except OSError:                                                  # no git on this machine
        commit = ""
    device = torch.cuda.get_device_name() if torch.cuda.is_initialized() else f"{platform.machine()} CPU"
    return {"commit": commit or "unknown", "python": platform.python_version(), "torch": torch.__version__,
            "transformers": transformers.__version__, "numpy": np.__version__, "hardware": device,
            "cores": os.cpu_count(), "threads": torch.get_num_threads()}


def peak_memory_mb():
    """Peak memory so far in MiB: of the GPU where one was used, else of this process."""
    if torch.cuda.is_initialized():
        return torch.cuda.max_memory_allocated() / 2 ** 20
    try:
        import resource
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak / (2 ** 20 if sys.platform == "darwin" else 1024)
    except ImportError:                                              # Windows has no resource module
        return float("nan")


# ===================================================================================== more than one device
# torchrun --nproc_per_node=N <script> ... starts N processes.  Each learns on its share of every batch; the
# gradients are summed, so that all take the step that one process would take.  Each answers its share of the
# test; process 0 writes.

RANK, PROCESSES = (int(os.environ.get(name, usual)) for name, usual in (("RANK", 0), ("WORLD_SIZE", 1)))


def join_processes(args):
    """Meets the other processes of torchrun."""
    if PROCESSES > 1:
        args.quiet |= RANK > 0                                       # process 0 speaks
        if not torch.distributed.is_initialized():
            torch.distributed.init_process_group("nccl" if args.device.startswith("cuda") else "gloo")
            sys.stdout = open(os.devnull, "w") if RANK else sys.stdout


def mine(batch):
    """This process's share of a batch (a list or tensor), and its weight in the batch's mean.  A share is never
    empty: a sample of weight 0 keeps all processes in step."""
    own = batch[RANK::PROCESSES]
    return (own, len(own) / len(batch)) if len(own) else (batch[:1], 0.0)


def in_parts(batch, n):
    """A batch (a list) in n parts, one after the other: yields this process's share of each, and the share's weight in
    the batch's mean."""
    size = math.ceil(len(batch) / n)
    for part in (batch[i:i + size] for i in range(0, len(batch), size)):
        own, weight = mine(part)
        yield own, weight * (len(part) / len(batch))


def wait_for_all():
    if PROCESSES > 1:
        torch.distributed.barrier()


def summed(x):
    """The sum of a tensor over the processes."""
    if PROCESSES > 1:
        torch.distributed.all_reduce(x := x.clone())
    return x


def sum_gradients(parameters):
    """Sums every gradient over the processes, in one message."""
    if PROCESSES > 1:
        gradients = [p.grad for p in parameters if p.grad is not None]
        whole = summed(torch.cat([g.flatten() for g in gradients])).split([g.numel() for g in gradients])
        for g, sum_of_all in zip(gradients, whole):
            g.copy_(sum_of_all.view_as(g))


def gathered(own, n):
    """The n results of all processes in order, from those of each one's share, a list."""
    if PROCESSES == 1:
        return own
    parts, out = [None] * PROCESSES, [None] * n
    torch.distributed.all_gather_object(parts, own)
    for rank, part in enumerate(parts):
        out[rank::PROCESSES] = part[:len(range(rank, n, PROCESSES))]     # without what filled an empty share
    return out


# ================================================================================================ the data path
# A GPU waits for nobody: what a frozen model makes of a picture is computed once for all runs, and the next
# batch is made while this one learns.


def file_key(path):
    """What names a file's content at this moment: path, size, time of the last change.  Raises InputError."""
    try:
        state = os.stat(path)
    except (OSError, ValueError) as e:
        raise InputError(f"picture {path} is missing ({getattr(e, 'strerror', e)}): put the picture folder "
                         f"{Path(path).parent} there, or name the folder above it with --root") from None
    return digest([os.path.abspath(path), state.st_size, state.st_mtime_ns])


def fingerprint(module):
    """A digest of a torch module's weights, by the sum and the norm of each."""
    with torch.no_grad():
        return digest([[p.double().sum().item(), p.double().norm().item()] for p in module.parameters()])


class FeatureFile:
    """What a frozen model makes of many items, each computed once and kept in the cache: half precision,
    memory-mapped, so that memory does not grow with the number of items.

    name, made_of: of the folder; made_of is all that the numbers depend on: model, sizes, code.  Each pass
    writes a file of rows and a list of their keys: a pass that was stopped goes on where it was, an item under
    a new key is computed, and two passes at once do not meet.
    """

    def __init__(self, name, made_of):
        self.folder = cache_folder() / f"{name}-{digest(made_of)}"
        self.folder.mkdir(parents=True, exist_ok=True)
        self.rows = {}                                               # key -> (its file, row)
        self._list()

    def _list(self):
        for index in self.folder.glob("*.keys"):
            path = index.with_suffix(".f16")
            lines = index.read_text().split("\n")[:-1]               # a half-written line is none
            if len(lines) > 1:
                self.shape = tuple(map(int, lines[0].split()))       # of one row
                whole = path.stat().st_size // (2 * math.prod(self.shape))
                self.rows.update((key, (path, i)) for i, key in enumerate(lines[1:whole + 1]))

    def fill(self, items, decode, compute, batch=64, quiet=False):
        """Computes what is not there yet.

        items {key: item}; decode(item), in worker processes, -> anything; compute(list of B of these) -> a
        tensor (B,...).  Raises InputError where decode does, and for numbers that are not finite.
        """
        new = [key for key in items if key not in self.rows]
        wait_for_all()                                               # nobody writes before all have looked
        if new:
            self._pass(items, new[RANK::PROCESSES], decode, compute, batch, quiet)
            wait_for_all()
            self._list()

    def _pass(self, items, todo, decode, compute, batch, quiet):
        def decoded(some):
            """An InputError travels as a value: the loader would wrap it in a traceback."""
            try:
                return [decode(item) for item in some]
            except InputError as e:
                return e
        workers = min(8, os.cpu_count() or 1) if len(todo) > 500 and hasattr(os, "fork") else 0
        loader = torch.utils.data.DataLoader([items[key] for key in todo], batch, collate_fn=decoded,
                                             num_workers=workers, multiprocessing_context="fork" if workers else None)
        path = self.folder / f"{os.getpid()}-{time.time_ns()}.f16"
        with open(path, "wb") as rows, open(path.with_suffix(".keys"), "w") as index, \
                tqdm(total=len(todo), unit="item", desc="features", leave=False, mininterval=1, disable=quiet) as bar:
            for i, part in enumerate(loader):
                if isinstance(part, InputError):
                    raise part
                features = compute(part).half().cpu().numpy()        # (B,...)
                keys = todo[i * batch:(i + 1) * batch]
                if not np.isfinite(features).all():
                    raise InputError(f"features that are not finite, of one of {items[keys[0]]} and the next "
                                     f"{len(keys) - 1}")
                if i == 0:                                           # first line: the shape of a row
                    index.write(" ".join(map(str, features.shape[1:])) + "\n")
                rows.write(features.tobytes())
                rows.flush()                                         # rows first: a key never lacks its row
                index.writelines(key + "\n" for key in keys)
                index.flush()
                bar.update(len(keys))

    def read(self, keys):
        """The rows of these keys: a tensor (B,...) in half precision.  Each file is mapped for this read alone."""
        out = np.empty((len(keys), *self.shape), np.float16)
        places = [self.rows[key] for key in keys]
        for path in {path for path, _ in places}:
            mapped = np.memmap(path, np.float16, "r").reshape(-1, *self.shape)
            here = [(b, row) for b, (other, row) in enumerate(places) if other == path]
            out[[b for b, _ in here]] = mapped[[row for _, row in here]]
        return torch.from_numpy(out)


def ahead(make, items, depth=2):
    """Yields make(item) of each item, the next ones made in a thread while this one is used."""
    with ThreadPoolExecutor(1) as thread:
        waiting = deque()
        for item in items:
            waiting.append(thread.submit(make, item))
            if len(waiting) > depth:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def pinned(tensors, device):
    """The tensors, in memory that a CUDA device reads without waiting."""
    return [x.contiguous().pin_memory() for x in tensors] if device.type == "cuda" else tensors


def resident_mb():
    """Memory of this process now, in MiB; nan where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2 ** 20
    except OSError:
        return float("nan")


# =========================================================================== a run, and what it leaves behind


class Run:
    """One folder, one run: where it stands, and what it leaves behind.

    The loop of a script reads like the paper's protocol; what a killed run needs to go on lives here:

        run.restore(method=method)                                   # the tensors of a run that was killed
        for t, task in run.tasks(stream.tasks):                      # tasks that are not finished yet
            if not run.begun:                                        # by the killed run
                method.begin_task(t)
            for epoch in run.epochs(n, learning, optimizer):     # in learn_task: epochs that are not done yet
                ...
                run.keep(loss, score)                           # ends an epoch: log, best weights, checkpoint
            run.row(scores)                                          # the next row of the accuracy matrix

    folder   gets log.jsonl, checkpoint.pt, results.json, matrix.csv, matrix.png, prompts.safetensors
    args     a flat dict that decides the outcome
    names    of the T tasks                    A   (T,T), nan where not known
    kept     a dict for whatever else must survive a kill: numbers, strings, lists, dicts
    minutes  between two checkpoints inside a task; there is one at the end of each task in any case
    resume=True needs the same args and goes on; resume=False starts anew and moves another run's files to
    <folder>/before.<n>; only a finished run of the same args is replaced.
    Raises InputError for a checkpoint of other arguments.
    """

    FILES = ("checkpoint.pt", "log.jsonl", "results.json", "matrix.csv", "matrix.png", "prompts.safetensors")

    def __init__(self, folder, args, names=(), resume=False, quiet=False, minutes=0.0):
        self.between, self.written = 60 * minutes, time.time()
        self.folder, self.args, self.names, self.quiet = Path(folder), dict(args), list(names), quiet
        self.start, self.before, self.lines, self.modules = time.time(), 0.0, 0, {}
        self.A, self.kept = np.full((len(self.names),) * 2, np.nan), {}
        # the cursor: task, part of it (a subtask), epochs done, was the task begun, best epoch, optimiser
        self.stage, self.part, self.epoch, self.begun, self.best, self.optimizer = 0, 0, 0, False, None, None
        self.folder.mkdir(parents=True, exist_ok=True)
        for part in self.folder.glob(".*.part") if not RANK else ():      # half-written files of a killed run
            if time.time() - part.stat().st_mtime > 600:                  # a younger one may be another run's
                part.unlink(missing_ok=True)
        self.state = self._load() if resume else None
        if self.state is None and not RANK:
            self._make_room()
        wait_for_all()
        if self.state is None:
            return
        for k in ("stage", "part", "epoch", "begun", "best", "kept", "before", "lines"):
            setattr(self, k, self.state[k])
        self.A = np.array(self.state["A"], float).reshape(self.A.shape)
        log = self.folder / "log.jsonl"
        lines = log.read_text().splitlines() if log.exists() else []
        with atomic(log) as f:                                     # without what followed the last checkpoint
            f.writelines(line + "\n" for line in lines[:self.lines])

    def _make_room(self):
        old, files = finished(self.folder), [f for name in self.FILES if (f := self.folder / name).exists()]
        if old and old.get("args") == jsonable(self.args):
            for f in files:
                f.unlink()
        elif files:
            aside = next(p for n in itertools.count(1) if not (p := self.folder / f"before.{n}").exists())
            aside.mkdir()
            hint = "" if old else "; --resume goes on with a run"
            _say(f"{self.folder} held another run, now in {aside}{hint}")
            for f in files:
                f.rename(aside / f.name)

    def _load(self):
        path = self.folder / "checkpoint.pt"
        if not path.exists():
            return None
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            old = state["args"]
        except Exception as e:
            raise InputError(f"{path} is not a readable checkpoint ({type(e).__name__}); "
                             "delete it or run without --resume")
        wrong = sorted(k for k in {*old, *self.args} if old.get(k) != self.args.get(k))
        if wrong:
            k = wrong[0]
            raise InputError(f"{path} was made with other arguments: {', '.join(wrong)} (--{k.replace('_', '-')} "
                             f"was {old.get(k)!r}, now {self.args.get(k)!r}); "
                             "use the same, another --out, or no --resume")
        return state

    def restore(self, **modules):
        """Names the modules whose tensors a checkpoint holds; in a resumed run they get back what they held."""
        self.modules = modules
        if self.state is None:
            return
        for name, module in modules.items():
            module.load_state_dict(self.state["modules"][name])
        torch.set_rng_state(self.state["rng"][0])
        if torch.cuda.is_initialized() and len(self.state["rng"]) > 1:
            torch.cuda.set_rng_state(self.state["rng"][1])

    def tasks(self, lessons):
        """Yields (t, lesson) of those that an earlier, killed run has not finished."""
        while self.stage < len(lessons):
            yield self.stage, lessons[self.stage]
            self.stage, self.part, self.epoch, self.begun = self.stage + 1, 0, 0, False
            self.checkpoint()

    def parts(self, lessons):
        """Yields (s, subtask) of those of this task that are not finished."""
        while self.part < len(lessons):
            yield self.part, lessons[self.part]
            self.part, self.epoch = self.part + 1, 0
            self.checkpoint()

    def epochs(self, n, learning, optimizer, name=""):
        """Yields the epochs, from 0, that are not done; the body must end with keep().  Afterwards the
        weights of the best epoch are back.

        learning: {name: parameter} of all that learns now.  name: of the (sub)task, for the progress bar.
        """
        self.begun, self.learning, self.optimizer = True, learning, optimizer
        if self.epoch and self.state and self.state["optimizer"]:
            optimizer.load_state_dict(self.state["optimizer"])
            if self.best and not self.best["weights"]:
                self.best["weights"] = self._weights()
        else:
            self.best = None
        while self.epoch < n:
            self.where = f"task {self.stage + 1}/{len(self.names)} {name[:16]} epoch {self.epoch + 1}/{n}"
            yield self.epoch
        if self.best:
            with torch.no_grad():
                for k, value in self.best["weights"].items():
                    learning[k].copy_(value)
        self.state = self.best = self.optimizer = None

    def bar(self, steps):
        """A progress bar over the steps of an epoch: a list, or anything else with a length."""
        return tqdm(steps, desc=self.where, leave=False, mininterval=1, disable=self.quiet)

    def check(self, loss, step):
        """Raises InputError where the loss () is not finite."""
        if not math.isfinite(loss):
            raise InputError(f"the loss is {loss} at {self.where}, step {step + 1}, "
                             f"lr {self.optimizer.param_groups[0]['lr']:g}; use a smaller --lr (or --dtype fp32)")

    def keep(self, loss, score=None):
        """Ends an epoch: log, best weights, checkpoint.

        score: on validation, higher is better; the later of equals is kept.  None: the last epoch is."""
        if score is not None and (self.best is None or score >= self.best["score"]):
            self.best = {"score": score, "epoch": self.epoch, "weights": self._weights()}
        self.log(task=self.stage, subtask=self.part, epoch=self.epoch, loss=loss, score=score,
                 minutes=self.minutes)
        self.epoch += 1
        if time.time() - self.written >= self.between:
            self.checkpoint()

    def _weights(self):
        return {k: p.detach().cpu().clone() for k, p in self.learning.items()}

    def row(self, scores):
        """Scores on the first n tasks are row n of the accuracy matrix."""
        n = len(scores)
        self.A[n - 1, :n] = scores
        self.say(f"\nafter {'all tasks' if n - 1 != self.stage else self.names[n - 1]}\n"
                 f"{format_matrix(self.A[:n], self.names)}")

    def say(self, text):
        if not self.quiet:
            print(text, flush=True)

    @property
    def minutes(self):
        return self.before + (time.time() - self.start) / 60

    def log(self, **row):
        """Append one line to log.jsonl."""
        if not RANK:
            with open(self.folder / "log.jsonl", "a", encoding="utf-8") as f:
                f.write(json.dumps(jsonable(row)) + "\n")
        self.lines += 1

    def checkpoint(self):
        """Write checkpoint.pt atomically: tensors, numbers, strings, lists, dicts (read with weights_only=True)."""
        if RANK:
            return
        rng = [torch.get_rng_state()] + ([torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else [])
        state = {k: getattr(self, k) for k in ("stage", "part", "epoch", "begun", "best", "kept", "lines", "args")}
        if self.best and self.best["epoch"] == self.epoch - 1:          # the weights are those of the modules
            state["best"] = {**self.best, "weights": {}}
        with atomic(self.folder / "checkpoint.pt", "wb") as f:
            torch.save({**state, "A": self.A.tolist(), "before": self.minutes, "rng": rng,
                        "optimizer": self.optimizer.state_dict() if self.optimizer else None,
                        "modules": {k: m.state_dict() for k, m in self.modules.items()}}, f)
        self.written = time.time()

    def finish(self, values, prompts=None, title="", **more):
        """Write results.json, matrix.csv, matrix.png, and prompts.safetensors if given.  Returns
        results.json's content.

        values: {metric: float}.  prompts: {name: tensor}.  more: what else results.json shall hold.
        """
        with atomic(self.folder / "matrix.csv") as f:
            out = csv.writer(f)
            out.writerow(["after", *self.names])
            for name, row in zip(self.names, self.A):
                out.writerow([name, *("" if np.isnan(x) else f"{x:.4f}" for x in row)])
        heat_map(self.A, self.folder / "matrix.png", self.names, self.names, title)
        if prompts:
            with atomic(self.folder / "prompts.safetensors", "wb") as f:
                f.write(save({k: v.detach().cpu().contiguous() for k, v in prompts.items()}))
        results = jsonable({"metrics": values, "matrix": self.A, "tasks": self.names, "minutes": self.minutes,
                            "peak_memory_mb": peak_memory_mb(), "args": self.args, **more, "environment": environment()})
        with atomic(self.folder / "results.json") as f:
            json.dump(results, f, indent=1)
        wait_for_all()
        return results


def finished(folder):
    """What results.json of a finished run holds, or None."""
    try:
        return json.loads((Path(folder) / "results.json").read_text())
    except (OSError, ValueError):
        return None


# ========================================================================== several seeds, the papers' tables
# A run of a script is a set of arguments with one seed (and, where the data has folds, one fold).  Both
# generators below yield such arguments and the folder of the run; the script's loop makes the run.


def _repetitions(args):
    """[{"seed": 0}, ...] or [{"fold": 0, "seed": 0}, ...]"""
    folds = getattr(args, "folds", None)
    return [{**({"fold": fold} if folds else {}), "seed": seed} for fold in folds or [0] for seed in args.seeds]


def repetitions(args, settle):
    """Yields (arguments, folder) for every fold and seed: --out itself for one, else a folder each inside it.

    settle(arguments) -> arguments with the defaults filled in that depend on others.
    """
    jobs = _repetitions(args)
    for job in jobs:
        name = "-".join(f"{k}{v}" for k, v in job.items()) if len(jobs) > 1 else ""
        yield settle(argparse.Namespace(**{**vars(args), **job})), Path(args.out) / name


def with_seed(args):
    """args with the first fold and seed, for what is not a run."""
    return argparse.Namespace(**{**vars(args), **_repetitions(args)[0]})


def spread(values):
    """"mean ± standard deviation" of several values, one value alone, "not defined" for none."""
    if len(values) < 2:
        return f"{values[0]:.2f}" if values else "not defined"
    return "{:.2f} ± {:.2f}".format(*mean_std(values))


def last_line(name, results, columns):
    """One line to copy: the columns (mean ± standard deviation over runs), folds, seeds, minutes, peak memory."""
    values = {k: [r["metrics"][k] for r in results] for k in columns if k in results[0]["metrics"]}
    there = [k for k in ("fold", "seed") if k in results[0]["args"]]
    flags = {k: list(dict.fromkeys(str(r["args"][k]) for r in results)) for k in there}
    return f"{name}: " + " | ".join([f"{k} {spread(v)}" for k, v in values.items()] +
                                    [f"{k}{'s' * (len(v) > 1)} {' '.join(v)}" for k, v in flags.items()] +
                                    [f"{sum(r['minutes'] for r in results):.1f} min",
                                     f"peak {max(r['peak_memory_mb'] for r in results):.0f} MiB"])


def conclude(folder, name, results, columns):
    """Of several runs: the last line, and results.json with mean and standard deviation (ddof 1) of every metric
    and each run's own.  One run has said everything already."""
    if len(results) < 2:
        return
    both = {}
    for k in results[0]["metrics"]:
        mean, std = mean_std([r["metrics"][k] for r in results])
        both[k] = {"mean": mean, "std": std}
    runs = [{"seed": r["args"]["seed"], "fold": r["args"].get("fold"), **r["metrics"]} for r in results]
    with atomic(Path(folder) / "results.json") as f:
        json.dump(jsonable({"metrics": both, "runs": runs}), f, indent=1)
    print(last_line(name, results, columns))


RESULTS = Path(__file__).resolve().parent / "results"


def worth(script, world, bounds):
    """What a score on a built-in world is worth: the bounds on the same world and setting, as one line.

    "" where they are not on file.
    bounds: {word: (row of results/<script>/tablebounds.json, metric)}.
    """
    try:
        table = json.loads((RESULTS / script / "tablebounds.json").read_text())
        rows = {row["label"]: row["runs"] for row in table["rows"]}
    except (OSError, ValueError, KeyError):
        return ""
    words = []
    for word, (label, k) in bounds.items():
        values = [r["metrics"][k] for r in rows.get(label, ()) if r.get("world") == world and k in r["metrics"]]
        if values:
            words.append(f"{word} {np.mean(values):.1f} ({len(values)} seeds)")
    return f"for comparison on {world}: {', '.join(words)}; results/{script}/tablebounds.md" if words else ""


class Table:
    """A table or figure of a paper: a run for every row and repetition, shown beside the paper's numbers.

    rows  [(label, changes, numbers)]: the arguments that make a row, and what the paper prints, a tuple or None
    against  the label that others are compared with, paired over repetitions; "{}" in it stands for the first word
              of a row's own label; None compares none
    columns   the metrics shown     compare   those compared     paper   heading of the paper's numbers
    lines     draw the chart as a line (the figures of a paper) and not as bars

    A run lies in runs/<method>-seed<n>-<digest of what decides it>: rows with equal arguments share it,
    between tables too; what is finished is not run again, so a stopped table goes on, and processes may share
    a folder. Raises InputError for a label in --rows that is not there.
    """

    def __init__(self, args, settle, title, against, rows, columns, compare, paper, lines=False):
        self.args, self.folder, self.plan = args, Path(args.out), []
        self.title, self.against, self.rows, self.lines = title, against, rows, lines
        self.columns, self.compare, self.paper = columns, compare, paper
        labels = [label for label, *_ in rows]
        if {*(args.rows or ())} - {*labels}:
            raise InputError(f"--rows of table {args.table} are: {', '.join(labels)}")
        for job, (label, changes, _) in itertools.product(_repetitions(args), rows):
            changes = {**changes, **job, "quiet": True, "resume": True}
            if args.smoke:                                           # tiny: not as long as the row asks
                changes["epochs"] = args.epochs
            one = settle(argparse.Namespace(**{**vars(args), **changes}))
            name = "-".join([one.method, *(f"{k}{v}" for k, v in job.items()), digest(deciding(one))])
            self.plan.append((label, tuple(job.values()), one, self.folder / "runs" / name))

    def missing(self):
        """Yields (arguments, folder) of the runs that are not finished; after each the table is written anew."""
        todo = [p for p in self.plan if (not self.args.rows or p[0] in self.args.rows) and not finished(p[3])]
        for n, (label, _, one, where) in enumerate(todo):
            if not finished(where):                                  # a row before it may share it
                yield one, where
                print(f"[{n + 1}/{len(todo)}]", last_line(label, [finished(where)], self.columns), flush=True)
                (where / "checkpoint.pt").unlink(missing_ok=True)
                self.write()

    def done(self):
        """{label: {repetition: results}} of what is finished."""
        done = {label: {} for label, *_ in self.plan}
        for label, job, _, where in self.plan:
            if results := finished(where):
                done[label][job] = results
        return done

    def reference(self, label):
        return self.against.format(label.split()[0]) if self.against else None

    def write(self, more=()):
        """table<name>.md, .json and .png in the folder; returns the text.  more: further lines of Markdown."""
        name, done = self.args.table, self.done()
        lines, content = self._format(done)
        text = "\n".join([self.title, "", *lines, *more])
        with atomic(self.folder / f"table{name}.json") as f:
            json.dump(jsonable({"title": self.title, "rows": content}), f)
        with atomic(self.folder / f"table{name}.md") as f:
            f.write(text + "\n")
        first, labels = self.columns[0], [label for label, *_ in self.rows]
        values = [[r["metrics"][first] for r in done[label].values()] for label in labels]
        title = f"{self.title.split(';')[0]}: {first}"
        chart(labels, values, self.folder / f"table{name}.png", title, self.lines)
        return text

    def _format(self, done):
        """(lines of Markdown, rows for JSON): mean ± standard deviation (ddof 1) over runs, and paired
        differences."""
        refs = " or ".join(dict.fromkeys(x for x in map(self.reference, done) if x in done))
        compare = self.compare if refs else ()
        head = [*self.columns, *(f"{k} minus that of {refs}" for k in compare),
                *([f"paper: {self.paper}"] if self.paper else []), "runs", "min"]
        lines, content = ["| | " + " | ".join(head) + " |", "|---" * (1 + len(head)) + "|"], []
        for label, changes, numbers in self.rows:
            runs, ref = done[label], done.get(self.reference(label), {})
            row = {"label": label, "changes": changes, "paper": numbers, "against": {}, "runs": [
                {"job": job, "world": r.get("world"), **{k: r[k] for k in ("metrics", "matrix", "minutes")},
                 **{k: r["environment"][k] for k in ("commit", "hardware")}} for job, r in runs.items()]}
            cells = []
            for k in self.columns:
                known = [r["metrics"][k] for r in runs.values() if r["metrics"].get(k) is not None]
                cells.append(spread(known) if runs else "not run")
            both = [job for job in runs if job in ref]
            for k in compare:
                if self.reference(label) in (None, label) or not both:
                    cells.append("-")
                    continue
                first = {job[0] for job in both}     # folds: their seeds share test data, so each counts once
                units = [[job for job in both if job[0] == x] for x in first] if len(first) > 1 else [[job] for job in both]
                d = row["against"][k] = paired(*([np.mean([x[job]["metrics"][k] for job in unit]) for unit in units]
                                                 for x in (runs, ref)))
                cells.append(f"{d['difference']:+.2f} ± {d['std']:.2f} ({d['wins']}/{d['n']}, {d['p']:.3f})")
            if self.paper:
                cells.append(" / ".join("-" if x is None else f"{x:g}" for x in numbers) if numbers else "-")
            cells += [str(len(runs)), f"{np.mean([r['minutes'] for r in runs.values()]):.1f}" if runs else "-"]
            lines.append(f"| {label} | " + " | ".join(cells) + " |")
            content.append(row)
        made = [r for row in content for r in row["runs"]]
        said = "Differences: paired (higher in/pairs, p of the two-sided sign-flip test). " if compare else ""
        lines += ["", f"Mean ± standard deviation over runs. {said}Commits "
                  f"{', '.join(sorted({r['commit'] for r in made})) or 'none'}; "
                  f"{', '.join(sorted({r['hardware'] for r in made})) or 'nothing run'}."]
        return lines, content


# =============================================================================================== command line
# Flags that the three scripts share are declared and checked here, once.


def _number(kind, good, what):
    """An argparse type: a number for which good(x) holds."""
    def read(text):
        with contextlib.suppress(ValueError):
            x = kind(text)
            if good(x):
                return x
        raise argparse.ArgumentTypeError(f"{text} is not {what}")
    return read


positive = _number(int, lambda x: 0 < x <= 10 ** 7, "a whole number from 1 to ten million")
natural = _number(int, lambda x: 0 <= x < 2 ** 31, "a whole number from 0 on")
above_zero = _number(float, lambda x: 0 < x <= 1e6, "a number above 0, at most a million")
weight = _number(float, lambda x: 0 <= x <= 1e6, "a number from 0 to a million")
share = _number(float, lambda x: 0 <= x <= 1, "a share between 0 and 1")
YES_NO = argparse.BooleanOptionalAction
# What does not decide a run's outcome: where it is written, where it is computed, what else is run.
FREE = {"out", "resume", "checkpoint_minutes", "quiet", "seeds", "folds", "device", "table", "rows", "bench",
        "pretrain", "compile"}


class Help(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults where there are any."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line."""

    def error(self, message):
        raise InputError(f"{message}; --help lists the flags")


def shared_flags(description, methods, tables, data_help, backbone_help, **defaults):
    """An argparse parser with the flags that all three scripts have.

    methods, tables: their names, the paper's first.  defaults: of a script, such as
    epochs=5; None where it depends on other flags.
    """
    p = Parser(description=description, formatter_class=Help)
    g = p.add_argument_group("what to run")
    g.add_argument("--method", default=[*methods][0], choices=[*methods],
                   help="the paper's; bounds (none: frozen, finetune, joint); compared methods")
    g.add_argument("--seeds", type=natural, nargs="+", default=[0], help="one run each; more than one: mean ± std")
    g.add_argument("--order", type=natural, nargs="+", help="a permutation of the tasks, from 0")
    g.add_argument("--table", choices=[*tables], help="run a table or figure of the paper, show both; goes on if stopped")
    g.add_argument("--rows", nargs="+", help="with --table: run these rows only, by label; finished others are shown")
    g.add_argument("--bench", default=False, action=YES_NO, help="parameters, memory and time against the frozen backbone")
    g.add_argument("--pretrain", default=False, action=YES_NO, help="make the small backbone of --backbone-seed anew")
    g.add_argument("--smoke", default=False, action=YES_NO, help="everything once and tiny: does it run?")
    g.add_argument("--resume", default=False, action=YES_NO, help="go on from the last checkpoint")
    g.add_argument("--checkpoint-minutes", type=weight, default=3, help="between checkpoints inside a task; 0: every epoch")
    g.add_argument("--quiet", default=False, action=YES_NO, help="print the last lines only")
    g.add_argument("--out", help="run folder; default runs/<script>...")
    g = p.add_argument_group("data and backbone")
    g.add_argument("--data", default="mini", help=data_help)
    g.add_argument("--root", help="folder with the files of --data")
    g.add_argument("--backbone", default="mini", help=backbone_help)
    g.add_argument("--backbone-seed", type=natural, help="which of the small backbones; default: the run's seed modulo "
                   f"{SHIPPED}, so that ± holds the backbone's spread too")
    g = p.add_argument_group("training")
    g.add_argument("--epochs", type=positive, help="per task, or per subtask where a task has some")
    g.add_argument("--batch", type=positive, help="samples a step; a replay buffer adds as many old ones")
    g.add_argument("--eval-batch", type=positive, default=200, help="samples at a time when answering")
    g.add_argument("--lr", type=above_zero, help="learning rate of prompts and keys; default: the method's own")
    g.add_argument("--grad-clip", type=above_zero, default=1.0, help="largest gradient norm")
    g.add_argument("--split", default="test", choices=["test", "val"], help="what is scored; val is to choose settings on")
    g.add_argument("--device", help="cuda, cuda:<n>, mps or cpu; default: the first there is")
    g.add_argument("--dtype", default="fp32", choices=["fp32", "bf16"], help="what the frozen model computes in; prompts stay fp32")
    g.add_argument("--compile", default=False, action=YES_NO, help="torch.compile: minutes at the start, then faster steps")
    p.set_defaults(**defaults)
    return p


def settle_shared(args):
    """Fills in and checks what the shared flags leave open, for one run with args.seed.  Raises InputError."""
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    args.device = args.device or ("cuda" if cuda else "mps" if mps else "cpu")
    try:
        kind = torch.device(args.device).type
    except RuntimeError:
        raise InputError(f"--device is cuda, cuda:<n>, mps or cpu, not {args.device!r}") from None
    if {"cuda": not cuda, "mps": not mps}.get(kind):
        raise InputError(f"--device {args.device}: there is none on this machine; use --device cpu")
    if kind == "cuda":
        if PROCESSES > 1 and args.device == "cuda":                  # each process has a device of its own
            args.device = f"cuda:{os.environ['LOCAL_RANK']}"
        number = torch.device(args.device).index or 0
        if number >= torch.cuda.device_count():
            raise InputError(f"--device {args.device}: this machine has {torch.cuda.device_count()} GPU(s), counted from 0")
        torch.cuda.set_device(number)                # memory, waiting and random numbers are asked of this one
    if args.backbone_seed is None:
        args.backbone_seed = args.seed % SHIPPED
    join_processes(args)
    return args


def check_shared(args, parser=None, smoke=()):
    """What can be said before anything is run.  smoke: the flags that --smoke sets itself.  Raises InputError."""
    for name in smoke if args.smoke else ():
        if getattr(args, name) != parser.get_default(name):
            raise InputError(f"--smoke sets --{name.replace('_', '-')} itself: leave one of them out")
    for name in ("seeds", "folds"):
        numbers = getattr(args, name, [])
        if len({*numbers}) < len(numbers):
            raise InputError(f"--{name} must not repeat a number: the same run twice is no second measurement")
    if args.rows and not args.table:
        raise InputError("--rows needs --table")
    return args


def prepare(args, small):
    """Before anything random: one order of sums, and one thread where the model is small.

    Two threads on such small matrices only wait for each other, and with one the same command gives the same
    figures on any number of cores.
    """
    torch.use_deterministic_algorithms(True, warn_only=True)     # gradients of gathered prompts, in one order
    if small and args.device == "cpu":
        torch.set_num_threads(1)


def compiled(args, layers):
    """With --compile, each of these modules is compiled in place, for batches of any length."""
    for layer in layers if args.compile else ():
        layer.compile(dynamic=True)


def deciding(args):
    """The arguments that decide a run's outcome, for results.json, --resume and tables: a flat dict."""
    return jsonable({k: v for k, v in sorted(vars(args).items()) if k not in FREE})


def run_cli(main):
    """Run a script's main().  Bad input, a full disk, no GPU memory: one clear line, exit code 2.

    Ctrl-C and SIGTERM: one line, exit code 130.  A terminal without a sign that is printed shows "?" for it.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.stdout.reconfigure(errors="replace")
    try:
        main()
        sys.stdout.flush()
        if PROCESSES > 1:
            torch.distributed.destroy_process_group()
    except InputError as e:
        sys.exit(_say(f"error: {e}"))
    except KeyboardInterrupt:
        _say("stopped; --resume goes on from the last checkpoint")
        sys.exit(130)
    except BrokenPipeError:                                      # the pipe's reader, such as head, has enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as e:
        if e.errno in (errno.ENOSPC, errno.EACCES, errno.EROFS, errno.EDQUOT, errno.EEXIST, errno.ENOTDIR, errno.EISDIR,
                       errno.ENAMETOOLONG, errno.ELOOP, errno.EIO):
            sys.exit(_say(f"error: cannot write {e.filename or ''}: {e.strerror}; free space or choose another "
                          "--out; --resume goes on from the last checkpoint"))
        raise
    except (RuntimeError, MemoryError) as e:
        full = "out of memory|can't allocate memory|not enough memory|storage size|overflow"
        if isinstance(e, MemoryError) or re.search(full, str(e)):
            sys.exit(_say("error: not enough memory on the device; use a smaller --batch, --dtype bf16, or --device "
                          "cpu; --resume goes on from the last checkpoint"))
        raise


def _say(line):
    for bar in [*getattr(tqdm, "_instances", ())]:                 # an open progress bar would share the line
        bar.close()
    print(line, file=sys.stderr)
    return 2
