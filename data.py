"""Streams of tasks: the built-in worlds (mini-VQA, mini-CoIN, mini-affect) and the readers of real data.

A Stream is a list of Tasks that arrive one after the other; a Task holds train, val and test samples and, in double
increment, its subtasks.  Nothing here needs torch, a GPU or the network.
"""
from dataclasses import dataclass, field
from typing import Any


class InputError(Exception):
    """Something the user gave is wrong.  The text is one line: what is wrong, where (file, line, key), and the mend."""


@dataclass
class Task:
    """One task of a stream.  train, val, test: sequences of samples; subtasks: Tasks learned inside this one, in order."""
    name: str
    train: Any
    val: Any
    test: Any
    subtasks: list = field(default_factory=list)


@dataclass
class Stream:
    """Tasks in the order they arrive, and what readers report.

    notes: lines for the user (counts, what was dropped and why).  extra: whatever the source adds (dims, images, ...).
    """
    tasks: list
    notes: list = field(default_factory=list)
    extra: dict = field(default_factory=dict)

    def __len__(self):
        return len(self.tasks)

    @property
    def names(self):
        return [task.name for task in self.tasks]

    def reorder(self, order):
        """The same tasks in another order: a permutation of 0..T-1.  Raises InputError for anything else."""
        if order is None:
            return self
        if sorted(order) != list(range(len(self.tasks))):
            raise InputError(f"--order needs each of 0..{len(self.tasks) - 1} once, not {' '.join(map(str, order))}")
        return Stream([self.tasks[i] for i in order], self.notes, self.extra)


# ------------------------------------------------- mini-affect and the readers of MOSI, MOSEI, CH-SIMS, IEMOCAP, npz
import io
import pickle                                                        # noqa: E402
from pathlib import Path                                             # noqa: E402

import numpy as np                                                   # noqa: E402

MODALITIES = ("audio", "video", "text")


@dataclass
class Utterances:
    """Some utterances with some modalities available: one split of one task of an affect stream.

    features   {"audio": (N,n,d), "video": (N,n,d), "text": (N,n,d)} float32, complete and shared by all tasks
    label      (N,) float32 sentiment, or int64 class
    rows       (n,) int64: which of the N utterances these are      available   the modalities that may be looked at
    """
    features: dict
    label: np.ndarray
    rows: np.ndarray
    available: frozenset = frozenset(MODALITIES)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        """Utterance i as {"audio", "video", "text": (n,d), "label"}; a missing modality is zeros of the same shape."""
        row = self.rows[i]
        seen = {m: x[row] if m in self.available else np.zeros_like(x[row]) for m, x in self.features.items()}
        return {**seen, "label": self.label[row]}


# mini-affect, version 1.  Tuned on the lower and the upper bound alone, then frozen; any change needs a new version.
MINI_AFFECT = {"version": 0, "lengths": {"audio": 4, "video": 4, "text": 6}, "dims": {"audio": 12, "video": 12, "text": 16},
               "train": 448, "val": 192, "test": 640, "upstream": 2000, "upstream_val": 300,
               "noise": {"audio": 0.9, "video": 0.6, "text": 0.6},   # of the evidence, in units of sentiment (-3..3)
               "relation": 0.5,      # correlation of audio's and text's evidence noise
               "habit": 1.5,         # spread of the speaker's habitual loudness and smile, in voice and face alike
               "video_signal": 0.5,  # how much of the sentiment the face shows
               "token": 1.0}         # noise on every coordinate of every step


def _mini_affect(n, rng, world, classes=0):
    """n utterances of mini-affect -> features {m: (n,len,dim)}, label (n,).

    sentiment s ~ U(-3,3), |s| >= 0.3; speaker's habit b ~ N(0, habit^2); evidence
        text   e_l = s + noise_l u              audio  e_a = s + b + noise_a (r u + sqrt(1-r^2) u')      r = relation
        video  e_v = video_signal s + b + noise_v u''
    so text is strongest, audio shares text's errors, and video mostly shows the habit: it corrects audio where both are
    there, and is weak evidence of its own where audio is missing.  Evidence is written along one direction of the feature
    space at two random steps of the sequence; a second direction marks those steps; everything else is noise.
    classes=4: label = quadrant of sentiment and arousal r ~ U(-3,3); arousal has its own direction, weakest in text.
    """
    geometry = np.random.default_rng(7)                              # the same directions for everybody: upstream too
    sign = lambda: rng.choice((-1.0, 1.0), n) * rng.uniform(0.3, 3, n)
    s, r, b = sign(), sign(), world["habit"] * rng.standard_normal(n)
    u = rng.standard_normal((3, n))
    rho, noise = world["relation"], world["noise"]
    audio_noise = rho * u[0] + np.sqrt(1 - rho ** 2) * u[1]
    evidence = {"audio": s + b + noise["audio"] * audio_noise, "video": world["video_signal"] * s + b + noise["video"] * u[2],
                "text": s + noise["text"] * u[0]}
    features = {}
    for m in MODALITIES:
        length, dim = world["lengths"][m], world["dims"][m]
        q = np.linalg.qr(geometry.standard_normal((dim, dim)))[0]    # orthogonal directions: evidence, arousal, marker
        x = world["token"] * rng.standard_normal((n, length, dim)) / np.sqrt(3)
        where = np.argsort(rng.random((n, length)), axis=1)[:, :2]   # (n,2) the steps that speak
        arousal = r + (1.5 if m == "text" else 0.7) * rng.standard_normal(n)
        value = evidence[m][:, None] * q[0] + (2.0 * q[2]) + (arousal[:, None] * q[1] if classes else 0)
        x[np.arange(n)[:, None], where] += value[:, None]            # (n,2,dim)
        features[m] = x.astype(np.float32)
    label = (2 * (s > 0) + (r > 0)).astype(np.int64) if classes else s.astype(np.float32)
    return features, label


def affect_stream(source, patterns, root=None, samples="shared", fold=0, seed=0, max_length=50, world=None):
    """The stream of the missing-modality paper: one task per pattern of available modalities, in the order given.

    source     "mini" | "mini4" (built in) | "mosi" | "mosei" | "sims" | "iemocap" (with root) | a path to <file>.npz
    patterns   sequence of frozensets over MODALITIES, Table 1
    samples    "shared": every task masks the same utterances; "disjoint": each task has its own share of train and val
    Returns a Stream; task.train/val/test are Utterances; extra: dims, lengths {m: int}, outputs (1 or the number of
    classes), scoring ("mosi", "sims", "classes"), upstream (train, val) with complete modalities, version.
    """
    if samples not in ("shared", "disjoint"):
        raise InputError(f"--samples is shared or disjoint, not {samples!r}")
    notes, world = [], {**MINI_AFFECT, **(world or {})}
    if source in ("mini", "mini4"):
        classes = 4 if source == "mini4" else 0
        sizes = [world[k] for k in ("upstream", "upstream_val", "train", "val", "test")]
        up, up_label = _mini_affect(sum(sizes[:2]), np.random.default_rng(1), world, classes)
        own, own_label = _mini_affect(sum(sizes[2:]), np.random.default_rng(1000 + seed), world, classes)
        features = {m: np.concatenate([up[m], own[m]]) for m in MODALITIES}
        label = np.concatenate([up_label, own_label])
        up_train, up_val, *splits = np.split(np.arange(len(label)), np.cumsum(sizes)[:-1])
        scoring, version = ("classes" if classes else "mosi"), f"mini-affect {world['version']}"
    else:
        raise InputError(f"--data {source!r}")
    extra = {"dims": {m: x.shape[2] for m, x in features.items()}, "lengths": {m: x.shape[1] for m, x in features.items()},
             "outputs": int(label.max()) + 1 if scoring == "classes" else 1, "scoring": scoring, "version": version,
             "features": features, "label": label,
             "upstream": tuple(Utterances(features, label, rows) for rows in (up_train, up_val))}
    rng, T = np.random.default_rng(seed), len(patterns)
    parts = [[rows] * T if samples == "shared" or k == 2 else np.array_split(rng.permutation(rows), T)
             for k, rows in enumerate(splits)]                       # test: always everybody, masked with each pattern
    tasks = [Task(pattern_name(p), *(Utterances(features, label, parts[k][t], frozenset(p)) for k in range(3)))
             for t, p in enumerate(patterns)]
    return Stream(tasks, notes, extra)


def pattern_name(available):
    """frozenset({"audio", "text"}) -> "al": the available modalities, a audio, v video, l text (language)."""
    return "".join({"audio": "a", "video": "v", "text": "l"}[m] for m in MODALITIES if m in available)
