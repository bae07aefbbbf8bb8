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
import functools                                                     # noqa: E402  imports of this part
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


# mini-affect, version 1.  Tuned on the lower and the upper bound alone, then frozen: any change needs a new version.
MINI_AFFECT = {
    "version": 1,
    "lengths": {"audio": 4, "video": 4, "text": 6}, "dims": {"audio": 12, "video": 12, "text": 16},
    "train": 448, "val": 192, "test": 640, "upstream": 2000, "upstream_val": 300,          # utterances
    "signal": {"audio": 1.6, "video": 0.8, "text": 1.0},             # how much of the sentiment each modality shows
    "habit": 4.0, "shown": {"audio": 1.0, "video": 1.0, "text": 0.4},     # the habit's spread, and where it shows
    "noise": {"audio": 0.5, "video": 0.4, "text": 0.4},              # of the evidence, in units of sentiment (-3..3)
    "relation": 0.5,                                                 # correlation of audio's and text's noise
    "gain": 0.5, "token": 0.25}                                      # evidence in features; noise of every feature


def _mini_affect(n, rng, world, classes=0):
    """n utterances of mini-affect -> features {m: (n,len,dim)}, label (n,).

    Sentiment s ~ +-U(0.3,3); the speaker's habit b ~ N(0, habit^2), how loud, lively and wordy somebody always is.
    Evidence of modality m:  e_m = signal_m s + shown_m b + noise_m u_m,   audio's and text's u correlated ("relation").
    Text is the strongest alone, audio next, video weak.  Two modalities together tell s from b, so the right use of one
    depends on which others are there (video counts against audio where both are, and for the sentiment alone): the
    missing-modality tasks contradict each other, and training on one spoils another.
    The evidence is written along one direction of the feature space at two random steps of the sequence, a second
    direction marks those steps; everything else is noise.
    classes=4: the label is the quadrant of s and of an arousal r ~ +-U(0.3,3), written along a third direction.
    """
    geometry = np.random.default_rng(7)                              # the same directions for everybody, upstream too
    strong = lambda: rng.choice((-1.0, 1.0), n) * rng.uniform(0.3, 3, n)
    s, r, b = strong(), strong(), world["habit"] * rng.standard_normal(n)
    u = dict(zip(MODALITIES, rng.standard_normal((3, n))))
    u["audio"] = world["relation"] * u["text"] + np.sqrt(1 - world["relation"] ** 2) * u["audio"]
    features = {}
    for m in MODALITIES:
        length, dim = world["lengths"][m], world["dims"][m]
        q = np.linalg.qr(geometry.standard_normal((dim, dim)))[0]    # orthogonal directions: evidence, arousal, marker
        x = world["token"] * rng.standard_normal((n, length, dim)) / np.sqrt(3)
        where = np.argsort(rng.random((n, length)), axis=1)[:, :2]   # (n,2) the steps that speak
        arousal = r + (1.5 if m == "text" else 0.7) * rng.standard_normal(n)
        evidence = world["signal"][m] * s + world["shown"][m] * b + world["noise"][m] * u[m]
        value = world["gain"] * evidence[:, None] * q[0] + 2 * q[2] + (arousal[:, None] * q[1] if classes else 0)
        x[np.arange(n)[:, None], where] += value[:, None]            # (n,2,dim)
        features[m] = x.astype(np.float32)
    label = (2 * (s > 0) + (r > 0)).astype(np.int64) if classes else s.astype(np.float32)
    return features, label


def affect_stream(source, patterns, root=None, samples="shared", fold=0, seed=0, max_length=50, world=None):
    """The stream of the missing-modality paper: one task per pattern of available modalities, in the order given.

    source      "mini" | "mini4" (built in) | "mosi" | "mosei" | "sims" | "iemocap" (with root) | a path to <file>.npz
    patterns    sequence of frozensets over MODALITIES, Table 1        root   folder (or file) of the real data
    samples     "shared": every task masks the same utterances; "disjoint": each task has its own share of train and val
    fold        of <file>.npz with a fold array, or IEMOCAP's cross-validation set, from 0     seed   of mini's utterances
    max_length  longer sequences are averaged over that many equal windows        world   changes to MINI_AFFECT
    Returns a Stream; task.train/val/test are Utterances; extra: dims, lengths {m: int}, outputs (1 or the number of
    classes), scoring ("mosi", "sims", "classes"), upstream (train, val) with complete modalities, version, features,
    label.
    Raises InputError for a name that is not known, a missing or malformed file.
    """
    if samples not in ("shared", "disjoint"):
        raise InputError(f"--samples is shared or disjoint, not {samples!r}")
    notes = []
    if source in ("mini", "mini4"):
        world, classes = {**MINI_AFFECT, **(world or {})}, 4 if source == "mini4" else 0
        sizes = [world[k] for k in ("upstream", "upstream_val", "train", "val", "test")]
        up, up_label = _mini_affect(sum(sizes[:2]), np.random.default_rng(1), world, classes)
        own, own_label = _mini_affect(sum(sizes[2:]), np.random.default_rng(1000 + seed), world, classes)
        features = {m: np.concatenate([up[m], own[m]]) for m in MODALITIES}
        label = np.concatenate([up_label, own_label])
        up_train, up_val, *splits = np.split(np.arange(len(label)), np.cumsum(sizes)[:-1])
        scoring, version = ("classes" if classes else "mosi"), f"mini-affect {world['version']}"
    else:
        if str(source).endswith(".npz"):
            raw, scoring = _read_npz(Path(root or "", source), fold), None
        elif source in _READERS:
            if not root:
                raise InputError(f"--data {source} needs --root, the folder with {_READERS[source][1]}")
            raw, scoring = _READERS[source][0](Path(root), source, fold), {"sims": "sims"}.get(source)
        else:
            raise InputError(f"--data is mini, mini4, {', '.join(_READERS)} or a path to <file>.npz, not {source!r}")
        features, label, splits = _join(raw, max_length, notes)
        up_train, up_val = splits[:2]                                # real data: no utterances besides the stream's
        scoring = scoring or ("classes" if label.dtype.kind in "iu" else "mosi")
        version = Path(source).name
    extra = {"dims": {m: x.shape[2] for m, x in features.items()}, "lengths": {m: x.shape[1] for m, x in features.items()},
             "outputs": int(label.max()) + 1 if scoring == "classes" else 1, "scoring": scoring, "version": version,
             "features": features, "label": label,
             "upstream": tuple(Utterances(features, label, rows) for rows in (up_train, up_val))}
    rng, T = np.random.default_rng(seed), len(patterns)
    parts = [[rows] * T if samples == "shared" or k == 2 else np.array_split(rng.permutation(rows), T)
             for k, rows in enumerate(splits)]                       # test: always everybody, masked with each pattern
    tasks = [Task(pattern_name(p), *(Utterances(features, label, parts[k][t], frozenset(p)) for k in range(3)))
             for t, p in enumerate(patterns)]
    empty = [f"{t.name} has no {k} utterances" for t in tasks for k in ("train", "val", "test")
             if not len(getattr(t, k))]
    if empty:
        raise InputError(f"--data {source}: task {empty[0]}; use more data or --samples shared")
    return Stream(tasks, notes, extra)


def _join(raw, max_length, notes):
    """{split: {"audio", "video", "text", "label", "where"}} -> features, label, [rows of train, val, test]."""
    features, first = {}, raw["train"]
    for m in MODALITIES:
        parts = []
        for split, part in raw.items():
            x, where = np.asarray(part[m]), part["where"]
            if x.dtype.kind not in "fiu" or x.ndim not in (2, 3):
                raise InputError(f"{where}: {m} of {split} has type {x.dtype} and shape {x.shape}, "
                                 "expected numbers (N,n,d)")
            x = x[:, None] if x.ndim == 2 else x
            if len(x) != len(part["label"]):
                raise InputError(f"{where}: {m} of {split} has {len(x)} rows, expected {len(part['label'])}, as labels")
            expected = np.shape(first[m])[-1]
            if x.shape[2] != expected:
                raise InputError(f"{where}: {m} of {split} has dimension {x.shape[2]}, expected {expected} as in train")
            x = x.astype(np.float32)
            bad = ~np.isfinite(x)
            if bad.any():
                notes.append(f"warning: {where}: {m} of {split} has {int(bad.sum())} values -inf or NaN; set to 0")
                x = np.where(bad, np.float32(0), x)
            parts.append(windows(x, max_length))
        longest = max(x.shape[1] for x in parts)
        features[m] = np.concatenate([np.pad(x, ((0, 0), (0, longest - x.shape[1]), (0, 0))) for x in parts])
    label = np.concatenate([np.asarray(part["label"]) for part in raw.values()])
    if label.dtype.kind == "f" and not np.isfinite(label).all():
        raise InputError(f"{first['where']}: {int((~np.isfinite(label)).sum())} labels are not numbers; drop those rows")
    label = label.astype(np.int64 if label.dtype.kind in "iu" else np.float32)
    sizes = [len(part["label"]) for part in raw.values()]
    return features, label, np.split(np.arange(len(label)), np.cumsum(sizes)[:-1])


def windows(x, n):
    """(N,length,d) -> at most n steps: the mean of each of n nearly equal windows; shorter ones stay as they are."""
    length = x.shape[1]
    if length <= n:
        return x
    edges = np.linspace(0, length, n + 1).astype(int)
    return np.add.reduceat(x, edges[:-1], axis=1) / np.diff(edges)[:, None].astype(np.float32)


class _SafeUnpickler(pickle.Unpickler):
    """Admits numpy arrays, numbers, strings and builtin containers.  Everything else a pickle could call is refused."""
    _core = getattr(np, "_core", None) or np.core                    # NumPy 2 renamed numpy.core
    _allowed = {("collections", "OrderedDict"): dict, ("_codecs", "encode"): lambda text, codec: text.encode(codec),
                ("numpy", "ndarray"): np.ndarray, ("numpy", "dtype"): np.dtype}
    for _name in ("numpy.core", "numpy._core"):
        _allowed[_name + ".multiarray", "_reconstruct"] = _core.multiarray._reconstruct
        _allowed[_name + ".multiarray", "scalar"] = _core.multiarray.scalar
        _allowed[_name + ".numeric", "_frombuffer"] = _core.numeric._frombuffer
    for _type in (list, dict, set, frozenset, tuple, bytearray, complex, slice, range):
        _allowed["builtins", _type.__name__] = _allowed["__builtin__", _type.__name__] = _type

    def find_class(self, module, name):
        try:
            return self._allowed[module, name]
        except KeyError:
            raise InputError(f"it asks for {module}.{name}, which is neither numpy nor a builtin container") from None


def read_pickle(path):
    """The content of a pickle of numpy arrays and builtin containers.  Raises InputError if it holds anything else: a
    pickle from elsewhere can run any program when it is read the usual way."""
    try:
        with open(path, "rb") as f:
            return _SafeUnpickler(f, encoding="latin1").load()       # latin1: arrays pickled by Python 2
    except InputError as e:
        raise InputError(f"{path} is refused: {e}; convert it to <file>.npz on a machine where you trust it") from None
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except Exception as e:
        raise InputError(f"{path} is not a complete pickle ({type(e).__name__}: {e}); download it again") from None


def _take(part, where, split, *names):
    for name in names:
        if name in part:
            return part[name]
    raise InputError(f"{where}: {split} has no key {' or '.join(names)}; found {', '.join(map(str, part))}")


def _read_pickles(root, source, fold):
    """MulT's and MMSA's pickles: {split: {text, audio, vision, labels (N,1,1) | regression_labels (N,)}}."""
    names = {"mosi": ("mosi_data.pkl", "mosi_data_noalign.pkl"), "sims": ("unaligned_39.pkl", "unaligned.pkl"),
             "mosei": ("mosei_senti_data.pkl", "mosei_senti_data_noalign.pkl"),
             "iemocap": ("iemocap_data.pkl", "iemocap_data_noalign.pkl")}[source]
    names += ("aligned_50.pkl", "unaligned_50.pkl") if source in ("mosi", "mosei") else ()
    found = [root] if root.is_file() else [f for n in names for f in (root / n, root / "Processed" / n) if f.is_file()]
    if not found:
        raise InputError(f"{root} has none of {', '.join(names)} (nor Processed/ with one); "
                         "--root may also be the file itself")
    data, raw = read_pickle(found[0]), {}
    for split in ("train", "valid", "test"):
        part = _take(data, found[0], "the file", split) if isinstance(data, dict) else {}
        label = np.asarray(_take(part, found[0], split, "regression_labels", "labels"))
        if source == "iemocap":                                      # MulT: (N,4,2), one yes/no pair per emotion
            if label.ndim != 3 or label.shape[1:] != (4, 2):
                raise InputError(f"{found[0]}: labels of {split} has shape {label.shape}, expected (N,4,2)")
            label = label[:, :, 1].argmax(1).astype(np.int64)
        else:
            label = label.reshape(len(label), -1)[:, 0].astype(np.float32)
        take = functools.partial(_take, part, found[0], split)
        raw[split] = {"audio": take("audio"), "video": take("vision", "video"), "text": take("text"), "label": label,
                      "where": found[0]}
    return raw


def _read_iemocap(root, source, fold):
    """MMIN's IEMOCAP: A/comparE.h5, V/denseface.h5, L/bert_large.h5 keyed by utterance, target/<cv>/*_label.npy.
    Needs h5py.  A folder without A/, or a file, is read as MulT's 4-class pickle."""
    if not (root / "A").is_dir():
        return _read_pickles(root, source, fold)
    try:
        import h5py
    except ImportError:
        raise InputError(f"{root} holds .h5 files: pip install h5py, or use MulT's iemocap_data.pkl") from None
    files = {"audio": root / "A/comparE.h5", "video": root / "V/denseface.h5", "text": root / "L/bert_large.h5"}
    longest, raw, cv = {"audio": 350, "video": 50, "text": 22}, {}, str(fold + 1)
    missing = [f for f in files.values() if not f.is_file()]
    if missing:
        raise InputError(f"{missing[0]} does not exist")
    opened, scale = {m: h5py.File(f, "r") for m, f in files.items()}, (0.0, 1.0)
    if (root / "A/comparE_mean_std.h5").is_file():
        with h5py.File(root / "A/comparE_mean_std.h5", "r") as f:
            if cv not in f:
                raise InputError(f"{root / 'A/comparE_mean_std.h5'} has no cross-validation set {cv} (--folds {fold})")
            scale = f[cv]["mean"][()], np.maximum(f[cv]["std"][()], 1e-6)
    for split, short in (("train", "trn"), ("valid", "val"), ("test", "tst")):
        labels, names = (root / "target" / cv / f"{short}_{k}.npy" for k in ("label", "int2name"))
        for f in (labels, names):
            if not f.is_file():
                raise InputError(f"{f} does not exist (--folds {fold} is cross-validation set {cv})")
        keys = [k.decode() if isinstance(k, bytes) else str(k) for k in np.load(names).reshape(-1)]
        part = {"label": np.load(labels).argmax(1).astype(np.int64), "where": labels}
        for m, f in opened.items():
            lost = [k for k in keys if k not in f]
            if lost:
                raise InputError(f"{files[m]} has no utterance {lost[0]} ({len(lost)} of {len(keys)} of {split} lack)")
            rows = [np.asarray(f[k][()], np.float32)[:longest[m]] for k in keys]
            rows = [(x - scale[0]) / scale[1] for x in rows] if m == "audio" else rows
            part[m] = np.stack([np.pad(x, ((0, longest[m] - len(x)), (0, 0))) for x in rows]).astype(np.float32)
        raw[split] = part
    for f in opened.values():
        f.close()
    return raw


def _read_npz(path, fold):
    """<file>.npz: audio, video, text (N,n,d), label (N,), and split (0 1 2 | train valid test) or fold (0..F-1).

    With fold: test = that fold, val = the next one, train = the others.  label of integers = classes.
    """
    try:
        with np.load(path, allow_pickle=False) as z:
            data = {k: z[k] for k in z.files if k in (*MODALITIES, "label", "split", "fold")}
    except FileNotFoundError:
        raise InputError(f"{path} does not exist") from None
    except Exception as e:
        raise InputError(f"{path} is not a readable .npz of plain arrays ({type(e).__name__}: {e})") from None
    label = np.asarray(_take(data, path, "the file", "label")).reshape(-1)
    which = np.asarray(_take(data, path, "the file", "split", "fold"))
    if len(which) != len(label):
        raise InputError(f"{path}: split or fold has {len(which)} entries, expected {len(label)}, one per label")
    if "split" in data:
        rows = {k: np.isin(which.astype(str), names) for k, names in
                (("train", ("0", "train")), ("valid", ("1", "valid", "val")), ("test", ("2", "test")))}
    else:
        folds = int(which.max()) + 1
        if folds < 3 or not 0 <= fold < folds:
            raise InputError(f"{path}: fold has {folds} folds; three or more are needed, --folds is of 0..{folds - 1}")
        rows = {"train": (which != fold) & (which != (fold + 1) % folds) & (which >= 0),
                "valid": which == (fold + 1) % folds, "test": which == fold}
    for m in MODALITIES:
        if len(_take(data, path, "the file", m)) != len(label):
            raise InputError(f"{path}: {m} has {len(data[m])} rows, expected {len(label)}, one per label")
    return {split: {**{m: data[m][keep] for m in MODALITIES}, "label": label[keep], "where": path}
            for split, keep in rows.items()}


_READERS = {"mosi": (_read_pickles, "mosi_data.pkl (MulT) or Processed/unaligned_50.pkl (MMSA)"),
            "mosei": (_read_pickles, "mosei_senti_data.pkl (MulT) or Processed/unaligned_50.pkl (MMSA)"),
            "sims": (_read_pickles, "Processed/unaligned_39.pkl (MMSA)"),
            "iemocap": (_read_iemocap, "A/ V/ L/ target/ (MMIN) or iemocap_data.pkl (MulT)")}


def pattern_name(available):
    """frozenset({"audio", "text"}) -> "al": the available modalities, a audio, v video, l text (language)."""
    return "".join({"audio": "a", "video": "v", "text": "l"}[m] for m in MODALITIES if m in available)


def describe_affect(source="mini", patterns=None, **options):
    """A few lines about an affect stream: sizes, and what a linear read-out of the mean features reaches per pattern.

    For every pattern: accuracy (points) of least squares fitted on that pattern's train split (its best use), and of the
    weights fitted on complete modalities with the missing ones set to zero (what a model that knows no other case does).
    """
    patterns = patterns or [frozenset(p) for p in (MODALITIES, ("audio", "video"), ("video", "text"), ("audio", "text"),
                                                   ("audio",), ("video",), ("text",))]
    stream = affect_stream(source, patterns, **options)
    task, extra = stream.tasks[0], stream.extra
    mean = {m: x.mean(1) for m, x in extra["features"].items()}
    label = np.eye(extra["outputs"])[extra["label"]] * 2 - 1 if extra["scoring"] == "classes" else extra["label"][:, None]
    table = lambda rows, seen: np.concatenate([mean[m][rows] * (m in seen) for m in MODALITIES] + [np.ones((len(rows), 1))], 1)
    fit = lambda seen: np.linalg.lstsq(table(task.train.rows, seen), label[task.train.rows], rcond=1e-4)[0]

    def accuracy(weights, seen):
        guess, truth = table(task.test.rows, seen) @ weights, label[task.test.rows]
        return 100 * np.mean(guess.argmax(1) == truth.argmax(1) if truth.shape[1] > 1 else (guess > 0) == (truth > 0))
    full = fit(MODALITIES)
    lines = [f"{extra['version']}: " + ", ".join(f"{m} {extra['lengths'][m]}x{extra['dims'][m]}" for m in MODALITIES)
             + f"; {len(task.train)} train, {len(task.val)} val, {len(task.test)} test per task", *stream.notes,
             "pattern   linear, fitted on it   fitted on all three modalities"]
    return "\n".join(lines + [f"{t.name:<9} {accuracy(fit(t.test.available), t.test.available):20.1f}   "
                              f"{accuracy(full, t.test.available):30.1f}" for t in stream.tasks])
