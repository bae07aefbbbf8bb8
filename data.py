"""Streams of tasks: the built-in worlds (mini-VQA, mini-CoIN, mini-affect) and the readers of real data.

A Stream is a list of Tasks that arrive one after the other; a Task holds train, val and test samples and, in
dual increment, its subtasks.  Nothing here needs torch, a GPU or the network.
"""
import argparse
import csv
import dataclasses
import functools
import hashlib
import io
import json
import math
import os
import pickle
import random
import re
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np


class InputError(ValueError):
    """Something the user gave is wrong.  The text is one line: what is wrong, where (file, line, key), and
    the mend."""

    def __init__(self, message):
        super().__init__("".join(c if c.isprintable() else " " for c in str(message)))


@dataclasses.dataclass
class Task:
    """One task of a stream.  train, val, test: sequences of samples; subtasks: Tasks learned inside this one,
    in order."""
    name: str
    train: Any
    val: Any
    test: Any
    subtasks: list = dataclasses.field(default_factory=list)


@dataclasses.dataclass
class Stream:
    """Tasks in the order they arrive, and what readers report.

    notes: lines for the user (counts, what was dropped and why).  extra: whatever the source adds (dims,
    images, ...).
    """
    tasks: list
    notes: list = dataclasses.field(default_factory=list)
    extra: dict = dataclasses.field(default_factory=dict)

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

    def mixed(self):
        """All tasks as one, for joint training: their samples one after the other, in a list of one Task."""
        together = lambda split: [s for task in self.tasks for s in getattr(task, split)]
        return [Task("all tasks", together("train"), together("val"), together("test"))]


# ==================================================================== visual question answering: shared parts
# A stream is a list of tasks, and which question belongs to which task is decided by two labels of every question:
# its type (what is asked) and the category of its picture (what is shown).  `partition` makes the paper's three
# settings from them: class increment (CI), question increment (QI), and both at once, one inside the other (DI).


@dataclasses.dataclass(slots=True)
class Sample:
    """One question about one picture.  answers: one, or the ten annotators'.  image: a path below the root,
    or an index into stream.extra["regions"].  question_type and category decide the task."""
    id: Any
    image: Any
    question: str
    answers: tuple
    question_type: str
    category: str


# COCO's 80 categories by id (1..90 with gaps) and MM-Prompt's Table 4: eight groups of ten, CI and DI.
COCO_IDS = [i for i in range(1, 91) if i not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)]
COCO_NAMES = (
    "person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,stop sign,"
    "parking meter,bench,bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,umbrella,"
    "handbag,tie,suitcase,frisbee,skis,snowboard,sports ball,kite,baseball bat,baseball glove,"
    "skateboard,surfboard,tennis racket,bottle,wine glass,cup,fork,knife,spoon,bowl,banana,apple,"
    "sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,potted plant,bed,"
    "dining table,toilet,tv,laptop,mouse,remote,keyboard,cell phone,microwave,oven,toaster,sink,"
    "refrigerator,book,clock,vase,scissors,teddy bear,hair drier,toothbrush").split(",")
COCO_GROUPS = [group.split(",") for group in (
    "truck,couch,bowl,chair,scissors,sandwich,orange,knife,dining table,potted plant",
    "teddy bear,microwave,skateboard,bottle,hot dog,book,apple,refrigerator,tennis racket,oven",
    "laptop,person,car,banana,snowboard,bed,umbrella,surfboard,motorcycle,sink",
    "tv,dog,baseball bat,cup,parking meter,sheep,spoon,cake,broccoli,toilet",
    "kite,fork,bus,train,cell phone,pizza,keyboard,sports ball,cow,giraffe",
    "baseball glove,bear,wine glass,traffic light,horse,mouse,stop sign,zebra,handbag,skis",
    "fire hydrant,toaster,cat,bench,remote,clock,hair drier,bird,suitcase,toothbrush",
    "carrot,backpack,tie,elephant,frisbee,bicycle,donut,boat,airplane,vase")]
VQA_GROUPS = [(f"G{i + 1} {group[0]}..", {*group}) for i, group in enumerate(COCO_GROUPS)]
# Table 7: one QI task each, in this order.  Table 6: consecutive pairs are the five subtasks inside a DI task.
QUESTION_TYPES = "recognition location judge commonsense count action color type subcategory causal".split()
TYPE_PAIRS = [("+".join(pair), {*pair}) for pair in zip(QUESTION_TYPES[::2], QUESTION_TYPES[1::2])]

# VQACL's ten question types by the `question_type` field (a question's opening words) of the VQA annotations.
# "how" alone is in no list: such questions are dropped and counted.
_PREFIXES = {
    "recognition": "what|what the|what is the|what is|what are the|what are|which|what is on the|"
                   "what is in the|what is this|what does the|who is|what is the name",
    "location": "where is the|where are the|what room is",
    "judge": "is the|is this|is this a|is this an|are the|is there a|is there|it is|is it|is|are there|"
             "are there any|are these|are|was|is that a",
    "commonsense": "does the|does this|do|do you|has|can you|could",
    "count": "how many|how many people are|how many people are in|what number is",
    "action": "what is the man|what is the woman|what is the person|is the man|is the woman|is the person|"
              "is he|are they|is this person",
    "color": "what color|what color is|what color is the|what color are the|what is the color of the",
    "type": "what kind of|what type of",
    "subcategory": "none of the above|what time|what sport is|what animal is|what brand",
    "causal": "why|why is the"}
_TYPE_OF_PREFIX = {p: name for name, prefixes in _PREFIXES.items() for p in prefixes.split("|")}
_ABOUT_PEOPLE = re.compile(r"^(is this|are|are the|are these)\s+((both|all|the|these)\s+)*(woman|women|man|men)\b")


def vqa_question_type(prefix, question):
    """One of QUESTION_TYPES from the annotation's `question_type` and the question, or None.

    VQACL's partition, recovered from its published test files: questions that open with is/are and ask about
    a man or woman count as action whatever their prefix says.
    """
    if _ABOUT_PEOPLE.match(question.lower()):
        return "action"
    return _TYPE_OF_PREFIX.get(prefix.strip().lower())


def partition(setting, parts, categories, types, inner, seed, outer="category", **extra):
    """A Stream from {"train","val","test": samples} in one of MM-Prompt's settings (section 4.1, appendix A).

    CI: one task per group of `categories` [(name, {category, ...})].  QI: one per entry of `types` [name].
    DI: outer tasks are the groups (outer="category") or the types (outer="type", NExT-QA), with `inner` subtasks of
    the other label, [(name, {type, ...})] or [(name, {category, ...})], in an order of their own for each outer task,
    drawn from the seed as in the official code.
    extra: what the Stream's .extra holds.  Samples that no task takes are counted in .notes; empty tasks
    raise InputError.
    """
    if setting not in ("DI", "CI", "QI"):
        raise InputError(f"--setting is DI, CI or QI, not {setting!r}")
    by_class = {"DI": outer == "category", "CI": True, "QI": False}[setting]      # what the tasks are made of
    groups = categories if by_class else [(name, {name}) for name in types]
    label, other = ("category", "question_type") if by_class else ("question_type", "category")
    splits, tasks = ("train", "val", "test"), []
    for t, (name, group) in enumerate(groups):
        own = {k: [s for s in parts[k] if getattr(s, label) in group] for k in splits}
        empty = " and no ".join(k for k in splits if not own[k])
        if empty:
            raise InputError(f"task {name!r} of {setting} has no {empty} question; add data or name the splits")
        subtasks = [Task(part, *([s for s in own[k] if getattr(s, other) in labels] for k in splits))
                    for part, labels in (inner if setting == "DI" else [])]
        subtasks = [s for s in subtasks if s.train]
        random.Random(f"{seed} {t}").shuffle(subtasks)
        tasks.append(Task(name, own["train"], own["val"], own["test"], subtasks))
    lost = sum(map(len, parts.values())) - sum(len(getattr(t, k)) for t in tasks for k in splits)
    notes = [f"{lost} questions belong to no task of setting {setting}: dropped"] if lost else []
    return Stream(tasks, notes, extra)


def vqa_stream(setting, source, root=".", seed=0, **more):
    """A Stream of Samples for DI, CI or QI.

    source: "mini" | "vqav2" | "nextqa" | a path to .jsonl.  root: the folder with the files (for .jsonl: with
    the pictures, default its own folder).  more: sizes, for mini.  Raises InputError for anything missing,
    broken or empty.
    """
    if source == "mini":
        return mini_vqa(setting, seed, **more)
    if source == "vqav2":
        return _vqav2(setting, Path(root), seed)
    if source == "nextqa":
        return _nextqa(setting, Path(root), seed)
    if str(source).endswith(".jsonl"):
        return _jsonl(setting, Path(source), Path(source).parent if root in (None, ".") else Path(root), seed)
    raise InputError(f"--data is mini, vqav2, nextqa or a .jsonl file, not {source!r}")


def describe(stream):
    """The partition as text: tasks, questions per split, subtasks, notes."""
    row = lambda name, t: f"{name:<34}{len(t.train):>9}{len(t.val):>8}{len(t.test):>8}"
    lines = [f"{'task':<34}{'train':>9}{'val':>8}{'test':>8}"]
    for t in stream.tasks:
        lines += [row(t.name[:33], t), *(row(f"  - {s.name[:30]}", s) for s in t.subtasks)]
    return "\n".join([*lines, row("all", *stream.mixed()), *stream.notes])


def inside(root, path, where="the data"):
    """root/path, refusing a path in the data that leaves the root, by .. or by a link.  Raises InputError."""
    if not isinstance(path, str) or "\0" in path:
        raise InputError(f"{where} names {str(path)[:60]!r} as a picture; a path below --root is needed")
    full, top = os.path.join(root, path), os.path.realpath(root)
    if os.path.commonpath([os.path.realpath(full), top]) != top:
        raise InputError(f"{where} names {path[:60]!r}, which leaves {root}; use paths below --root")
    return Path(full)


def open_picture(path):
    """The picture as RGB, decoded whole.  Raises InputError for a missing, truncated or unreadable file."""
    from PIL import Image
    need_file(path, "put the picture there or remove its questions")
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except Exception as e:                                       # Pillow raises many kinds for a damaged file
        raise InputError(f"picture {path} cannot be read ({e}); replace the file or remove its questions")


def cache_folder():
    """Where small backbones and picture features are kept: $MMPROMPTS_CACHE, else
    ~/.cache/multimodal-prompts."""
    return Path(os.environ.get("MMPROMPTS_CACHE") or Path.home() / ".cache" / "multimodal-prompts")


def _split(key, seed, train=.7, val=.8):
    """The split of a key, by a number in [0,1) that depends on key and seed alone: splits stay the same when
    files grow."""
    share = int.from_bytes(hashlib.blake2b(f"{seed} {key}".encode(), digest_size=7).digest(), "big") / 2 ** 56
    return "train" if share < train else "val" if share < val else "test"


def need_file(path, mend="put it there"):
    """Raises InputError for what is not there or no file: a pipe would wait for ever."""
    if not os.path.isfile(path):
        raise InputError(f"{path} is {'no regular file' if os.path.lexists(path) else 'missing'}; {mend}")


def read_text(path):
    """The text of a file of a data set, its line ends as they are.  Raises InputError."""
    need_file(path)
    try:
        return Path(path).read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise InputError(f"{path} cannot be read ({e}); a UTF-8 text file is needed") from None


def read_json(path, hook=None):
    text = read_text(path)
    try:
        return json.loads(text, object_hook=hook)
    except (ValueError, RecursionError, MemoryError) as e:
        where = str(e) or "too large"
        if isinstance(e, json.JSONDecodeError):
            where = f"line {e.lineno} column {e.colno}: {e.msg}"
        raise InputError(f"{path} is not valid JSON ({where}); download it again") from None


def entries(path, key, hook=None):
    """(where it stands, entry) of the list at a key of a JSON file's object.  Raises InputError."""
    whole = read_json(path, hook)
    rows = whole.get(key) if isinstance(whole, dict) else None
    if not isinstance(rows, list):
        raise InputError(f"{path}: an object with a list of {key} is needed; this is not the official file")
    return ((f"{path}, {key[:-1]} {i}", row) for i, row in enumerate(rows))


def field(row, key, kind, where):
    """row[key], which must be of that type: text that is not blank, a number that is finite, an int that is no
    truth value.  Raises InputError that names file, entry and key."""
    if not isinstance(row, dict) or key not in row:
        raise InputError(f"{where}: key {key!r} is missing")
    value = row[key]
    good = isinstance(value, kind) and not isinstance(value, bool)
    if isinstance(value, (int, float)):
        good = good and -2 ** 53 < value < 2 ** 53                   # nan fails both
    if not good or isinstance(value, str) and (not value.strip() or re.search("[\ud800-\udfff]", value)):
        names = " or ".join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        raise InputError(f"{where}: {key} is {str(value)[:40]!r}, expected {names}, not blank")
    return value


# =============================================================================== mini-VQA: the built-in world
# Drawn scenes with questions, so that continual visual question answering can be tried in a minute without a
# download.  It is made so that the paper's questions have an answer here: a scene must be looked at (the
# question alone says little), the same answers serve all groups of classes, as in VQA v2, and one type of
# question does not teach the next.  The small backbone has seen other scenes and statements about them, never
# a question (`upstream_statement`).
MINI_VQA_VERSION = 3
COLORS = {"red": (214, 44, 38), "orange": (244, 138, 26), "yellow": (246, 222, 52), "green": (52, 160, 62),
          "blue": (40, 88, 214), "purple": (142, 62, 178), "white": (248, 248, 248), "black": (24, 24, 28)}
PATTERNS = ["plain", "striped", "dotted", "checked"]
POSES = ["standing", "leaning", "falling", "sleeping"]               # turned by 0, 90, 180, 270 degrees
SIZES = ["small", "large"]                                           # 20 and 30 of 96 pixels
PLACES = {"kitchen": ((232, 220, 196), (176, 148, 118)), "street": ((170, 196, 222), (104, 104, 110)),
          "beach": ((150, 210, 240), (236, 214, 150)), "forest": ((112, 158, 112), (70, 92, 52)),
          "bedroom": ((222, 196, 214), (150, 110, 140)), "field": ((190, 224, 250), (128, 196, 96))}
CELLS = {"left": (0, 1), "right": (2, 1), "top": (1, 0), "bottom": (1, 2), "middle": (1, 1)}  # of a 3 x 3 grid
NUMBERS = ["one", "two", "three", "four"]
REASONS = dict(zip(PLACES, ["hungry", "lost", "hot", "hiding", "tired", "playing"]))  # why is it here: by place
KINDS = {"person": 1, "vehicle": 9, "outdoor": 14, "animal": 24, "accessory": 29, "sport": 39, "tableware": 46,
         "food": 56, "furniture": 62, "electronic": 68, "appliance": 73, "household": 80}  # last index in COCO order + 1
ABILITIES = {"can you eat it": {"food"}, "can you ride it": {"vehicle"}, "is it alive": {"person", "animal"},
             "does it need power": {"electronic", "appliance"}, "can you wear it": {"accessory"},
             "can you play with it": {"sport"}}
# How often each type is asked: VQACL's training counts, flattened so that a rare type still makes a task in QI.
TYPE_SHARES = dict(zip(QUESTION_TYPES, [.20, .08, .14, .08, .10, .08, .10, .08, .09, .05]))
UPSTREAM = {"name": 3, "place": 2, "number": 2, "pose": 1.5, "color": 1, "pattern": 1, "size": .5, "is there": 2,
            "is colored": 2, "sort": 1, "ability": 2, "repeat": 1.5}  # what pre-training says about a scene, and how often
REGIONS, REGION_PIXELS = 6, 16                        # up to four copies, one other object, the whole picture


def kind_of(name):
    """COCO's super-category of a class."""
    return next(k for k, end in KINDS.items() if COCO_NAMES.index(name) < end)


@functools.cache
def _sprites():
    """(80,4,8,8) bool: a mirror-symmetric glyph per class and its four turns, any two at least 14 of 64 cells
    apart."""
    rng, found = np.random.default_rng(7), []
    while len(found) < len(COCO_NAMES):
        half = rng.random((8, 4)) < 0.55
        glyph = np.concatenate([half, half[:, ::-1]], 1)
        turns = np.stack([np.rot90(glyph, k) for k in range(4)])
        others = np.concatenate([turns[1:]] + found)
        if (others != glyph).sum((1, 2)).min() >= 14:
            found.append(turns)
    return np.stack(found)


def draw_scene(scene):
    """The picture (96,96) RGB of a scene, and its boxes (n,4) in [0,1] as x1 y1 x2 y2: objects, then the
    whole picture."""
    from PIL import Image
    top, ground = PLACES[scene["place"]]
    rng = np.random.default_rng(scene["noise"])
    canvas = np.empty((96, 96, 3), np.int16)
    canvas[:48], canvas[48:] = top, ground
    canvas += rng.integers(-12, 13, canvas.shape, np.int16)
    canvas = canvas.clip(0, 255).astype(np.uint8)
    boxes = []
    for thing in scene["things"]:
        side = 20 if thing["size"] == "small" else 30
        y, x = np.mgrid[:side, :side] * 8 // side                    # which of the glyph's 8 x 8 cells
        glyph = _sprites()[COCO_NAMES.index(thing["name"]), POSES.index(thing["pose"]), y, x]
        dark = {"plain": y < 0, "striped": y % 2 == 1, "dotted": (y % 3 == 1) & (x % 3 == 1),
                "checked": (x + y) % 2 == 1}
        color = np.array(COLORS[thing["color"]])
        shade = (color * 0.4 + (80 if thing["color"] == "black" else 0)).astype(int)
        tile = np.where(dark[thing["pattern"]][..., None], shade, color)
        x0, y0 = thing["corner"]
        canvas[y0:y0 + side, x0:x0 + side][glyph] = tile[glyph]
        boxes.append((x0 / 96, y0 / 96, (x0 + side) / 96, (y0 + side) / 96))
    return Image.fromarray(canvas), np.array(boxes + [(0, 0, 1, 1)], np.float32)


def random_scene(rng, name, crowd=True, alone=False):
    """A scene about class `name`.  crowd: one to four copies, else one.  alone: no other object beside it.
    rng: random.Random.  The main copies come first in "things"."""
    def thing(name, cell, size):
        slack = 12 if size == "small" else 2                         # pixels to spare in a cell of 32
        corner = tuple(k * 32 + rng.randint(0, slack) for k in cell)
        where = next((k for k, c in CELLS.items() if c == cell), "corner")
        return {"name": name, "cell": where, "corner": corner, "size": size}

    count = rng.randint(1, 4) if crowd else 1
    position = rng.choice(list(CELLS))
    free = [(x, y) for x in range(3) for y in range(3) if (x, y) != CELLS[position]]
    rng.shuffle(free)
    look = {"color": rng.choice(list(COLORS)), "pattern": rng.choice(PATTERNS), "pose": rng.choice(POSES)}
    size = rng.choice(SIZES)
    things = [thing(name, cell, size) | look for cell in [CELLS[position]] + free[:count - 1]]
    if not alone and rng.random() < 0.2:
        other = rng.choice([n for n in COCO_NAMES if n != name])
        things.append(thing(other, free[count - 1], rng.choice(SIZES)) | {
            "color": colored(rng, look, False), "pattern": rng.choice(PATTERNS), "pose": rng.choice(POSES)})
    other = things[count] if len(things) > count else None
    return {"name": name, "count": count, "position": position, "place": rng.choice(list(PLACES)), **look,
            "size": size, "things": things, "other": other, "noise": rng.getrandbits(32)}


def named(rng, scene, true):
    """The scene's name, or one of nothing in it."""
    shown = {t["name"] for t in scene["things"]}
    return scene["name"] if true else rng.choice([n for n in COCO_NAMES if n not in shown])


def colored(rng, scene, true):
    """The thing's color, or another."""
    return scene["color"] if true else rng.choice([c for c in COLORS if c != scene["color"]])


def ask(rng, scene, kind):
    """(question, answer) of one of the ten types about a scene.  Several wordings each; "it" only where
    nothing else is."""
    name, pick = scene["name"], rng.choice
    if kind == "location":
        if scene["count"] == 1 and rng.random() < 0.6:
            return pick(["where is the {}", "where is the {} in the picture"]).format(name), scene["position"]
        return pick(["what place is this", "where is this"]), scene["place"]
    if kind == "judge":
        yes = rng.random() < 0.5
        if rng.random() < 0.5:
            about = named(rng, scene, yes)                           # drawn before the wording
            return pick(["is there a {}", "is a {} in the picture"]).format(about), "yes" if yes else "no"
        return f"is the {name} {colored(rng, scene, yes)}", "yes" if yes else "no"
    if kind == "commonsense":
        true = [q for q, kinds in ABILITIES.items() if kind_of(name) in kinds]
        yes = bool(true) and rng.random() < 0.6
        return pick(true) if yes else pick([q for q in ABILITIES if q not in true]), "yes" if yes else "no"
    one_of_two = "what is the {color} thing|what is the {color} object"
    alone = "what is this|what is in the picture|what object is shown"
    wordings, answer = {
        "recognition": (one_of_two if scene["other"] else alone, name),
        "count": ("how many {name} are there|what number of {name} is there", NUMBERS[scene["count"] - 1]),
        "action": ("what is the {name} doing|what does the {name} do", scene["pose"]),
        "color": ("what color is the {name}|what is the color of the {name}", scene["color"]),
        "type": ("what kind of {name} is this|what type of {name} is it", scene["pattern"]),
        "subcategory": ("what family is this|what family is it from", kind_of(name)),
        "causal": ("why is the {name} here|why is the {name} in this place", REASONS[scene["place"]])}[kind]
    return pick(wordings.split("|")).format(**scene), answer


def upstream_statement(rng, scene):
    """(input, target) for pre-training: statements with a gap and words to repeat, never a question of the stream.

    The reasons of `causal` are facts that only the stream teaches; their words do occur, so that they can be said.
    """
    name, pick = scene["name"], rng.choice
    kind = rng.choices(list(UPSTREAM), list(UPSTREAM.values()))[0]
    if kind == "name":
        several = scene["other"] or rng.random() < .5
        return f"the {scene['color']} one is a <mask>" if several else "here we see a <mask>", name
    if kind == "place":
        return ((f"the {name} stands at the <mask>", scene["position"]) if scene["count"] == 1 and rng.random() < .6
                else ("the background is a <mask>", scene["place"]))
    if kind == "number":
        return f"the number of {name} is <mask>", NUMBERS[scene["count"] - 1]
    if kind == "pose":
        return f"the {name} is busy <mask>", scene["pose"]
    if kind in ("color", "pattern", "size"):
        return f"the {name} has the {kind} <mask>", scene[kind]
    if kind == "is there":
        yes = rng.random() < 0.5
        about = named(rng, scene, yes)                               # drawn before the wording
        return pick(["there is a {}", "a {} is in the picture"]).format(about), "yes" if yes else "no"
    if kind == "is colored":
        yes = rng.random() < 0.5
        return f"the {name} is {colored(rng, scene, yes)}", "yes" if yes else "no"
    if kind == "sort":
        what = f"the {scene['color']} one" if rng.random() < .7 else f"a {name}"
        return f"{what} is a sort of <mask>", kind_of(name)
    if kind == "ability":                                           # what a language model knows of the world
        true = [q for q, kinds in ABILITIES.items() if kind_of(name) in kinds]
        question = pick(true * (rng.random() < .5) or list(ABILITIES))
        yes, (first, second, *rest) = kind_of(name) in ABILITIES[question], question.split()
        thing = "it" if scene["other"] is None and rng.random() < .6 else f"a {name}"
        return " ".join(thing if w == "it" else w for w in (second, first, *rest)), "yes" if yes else "no"
    words = [pick(MINI_WORDS) for _ in range(rng.randint(1, 2))]
    return "repeat " + " ".join(words), " ".join(words)


_TEMPLATES = """what is the thing object this in picture shown where place there a number of doing does do color kind
type it family from why here how many are can you eat ride alive need power wear play with one we see stands at
background busy has pattern size sort repeat yes no"""
MINI_WORDS = sorted({w for text in (_TEMPLATES, *COCO_NAMES, *COLORS, *PATTERNS, *POSES, *SIZES, *PLACES, *CELLS, *NUMBERS,
                                    *REASONS.values(), *KINDS) for w in text.split()})


def region_pixels(image, boxes, jitter=None):
    """The picture inside each box, (n,16,16,3) uint8.  boxes (n,4) in [0,1]; jitter: a random.Random that shifts them
    a little."""
    W, H = image.size
    out = np.empty((len(boxes), REGION_PIXELS, REGION_PIXELS, 3), np.uint8)
    for i, (x1, y1, x2, y2) in enumerate(boxes):
        dx, dy = (jitter.uniform(-.006, .006) if jitter and x2 - x1 < 1 else 0 for _ in range(2))
        box = ((x1 + dx) * W, (y1 + dy) * H, (x2 + dx) * W, (y2 + dy) * H)
        inside_picture = [min(max(v, 0), m) for v, m in zip(box, (W, H, W, H))]
        out[i] = np.asarray(image.resize((REGION_PIXELS, REGION_PIXELS), 2, inside_picture))
    return out


def region_order(scene):
    """Which thing each region shows: indices into scene["things"], shuffled; len(things) is the whole picture."""
    n = len(scene["things"]) + 1
    return random.Random(scene["noise"]).sample(range(n), n)


def draw_scenes(scenes):
    """Regions of many scenes: pixels (S,6,16,16,3) uint8, boxes (S,6,4), valid (S,6) bool, in region_order."""
    pixels = np.zeros((len(scenes), REGIONS, REGION_PIXELS, REGION_PIXELS, 3), np.uint8)
    boxes, valid = np.zeros((len(scenes), REGIONS, 4), np.float32), np.zeros((len(scenes), REGIONS), bool)
    for i, scene in enumerate(scenes):
        image, where = draw_scene(scene)
        where = where[region_order(scene)]
        n = len(where)
        pixels[i, :n] = region_pixels(image, where, random.Random(scene["noise"]))
        boxes[i, :n], valid[i, :n] = where, True
    return pixels, boxes, valid


@functools.lru_cache(maxsize=1)
def _mini_world(seed, sizes):
    """All questions of one seed and the regions of their scenes; the same for the three settings.  Two
    questions a scene."""
    parts, scenes = {}, []
    for split, size in zip(("train", "val", "test"), sizes):
        rng, rows = random.Random(f"mini-vqa {MINI_VQA_VERSION} {seed} {split}"), []
        while len(rows) < size:
            name = COCO_NAMES[len(rows) // 2 % 80]
            kinds = rng.choices(QUESTION_TYPES, list(TYPE_SHARES.values()), k=2)
            scene = random_scene(rng, name, crowd="count" in kinds or rng.random() < .3,
                                 alone=bool({"commonsense", "subcategory"} & set(kinds)))
            for kind in kinds:
                question, answer = ask(rng, scene, kind)
                rows.append(Sample(f"{split}{len(rows)}", len(scenes), question, (answer,), kind, name))
            scenes.append(scene)
        parts[split] = rows[:size]
    return parts, draw_scenes(scenes)


def mini_vqa(setting, seed=0, sizes=(8000, 800, 1600)):
    """The built-in world as a Stream: .extra["regions"] = pixels (S,6,16,16,3), boxes (S,6,4), valid (S,6);
    sample.image = row.

    CI 8 tasks, QI 10 tasks, DI 8 tasks of 5 subtasks.  Two seconds a thousand questions.
    """
    parts, regions = _mini_world(seed, tuple(sizes))
    return partition(setting, parts, VQA_GROUPS, QUESTION_TYPES, TYPE_PAIRS, seed, regions=regions,
                     version=f"mini-VQA {MINI_VQA_VERSION}")


# ===================================================================================== VQA v2, official files
# The files of visualqa.org as they are, with COCO's categories.  The file tree stands in docs/mmprompt.md.


def _vqav2(setting, root, seed):
    """VQA v2 from the official JSON files below `root` (docs/mmprompt.md shows the tree).

    sample.image is "val2014/COCO_val2014_...jpg".  Category of a picture: VQACL's ImgId_cate_map.json when present,
    else from instances_*.json the category with the largest total area.  Splits: Karpathy's dataset_coco.json when
    present; else train2014 trains and val2014 is halved by picture; one year-split alone goes 80/10/10.
    """
    found = [y for y in ("train2014", "val2014") if (root / f"v2_mscoco_{y}_annotations.json").exists()]
    if not found:
        raise InputError(f"{root} holds no v2_mscoco_train2014_annotations.json; get the VQA v2 annotation and question files "
                         "from visualqa.org and name their folder with --root")
    category = _coco_categories(root, found)
    path, karpathy = root / "dataset_coco.json", {}
    for where, image in entries(path, "images") if path.exists() else ():
        split = field(image, "split", str, where)
        if split not in ("train", "restval", "val", "test"):
            raise InputError(f"{where}: split is train, restval, val or test, not {split[:40]!r}")
        karpathy[field(image, "cocoid", int, where)] = "train" if split == "restval" else split
    # ten dicts become ten shared strings while the file is parsed: a million questions fit into memory
    compact = lambda d: sys.intern(d["answer"]) if "answer_id" in d and type(d.get("answer")) is str else d
    parts, dropped = {"train": [], "val": [], "test": []}, Counter()
    for year in found:
        shares = (.8, .9) if len(found) == 1 else (1, 1) if year == "train2014" else (0, .5)
        path, questions = root / f"v2_OpenEnded_mscoco_{year}_questions.json", {}
        for where, row in entries(path, "questions"):
            questions[field(row, "question_id", int, where)] = field(row, "question", str, where)
        for where, row in entries(root / f"v2_mscoco_{year}_annotations.json", "annotations", compact):
            number, name, answers = (field(row, k, kind, where) for k, kind in
                                     (("image_id", int), ("question_id", int), ("answers", list)))
            question = questions.pop(name, None)                     # each is asked once
            if question is None or not answers or not all(isinstance(a, str) for a in answers):
                raise InputError(f"{where}: question {name} is in no questions file or was annotated before, or an "
                                 "answer is no text")
            kind = vqa_question_type(field(row, "question_type", str, where), question)
            group = category.get((year, number))
            if kind is None:
                dropped[f"question type: no rule for {row['question_type']!r}"] += 1
            elif group is None:
                dropped["picture has no category"] += 1
            else:
                split = karpathy.get(number, "train") if karpathy else _split(number, seed, *shares)
                picture = sys.intern(f"{year}/COCO_{year}_{number:012d}.jpg")
                parts[split].append(Sample(name, picture, question, tuple(answers), kind, group))
    stream = partition(setting, parts, VQA_GROUPS, QUESTION_TYPES, TYPE_PAIRS, seed, root=root)
    stream.notes += [f"dropped {n:,}: {why}" for why, n in dropped.most_common()]
    return stream


def _coco_categories(root, years):
    """{(year, image id): category name}."""
    names, out = dict(zip(COCO_IDS, COCO_NAMES)), {}
    path = root / "ImgId_cate_map.json"
    if path.exists():
        whole = read_json(path)
        for key, number in whole.items() if isinstance(whole, dict) else ():
            pair = f"{key}: {number}"
            found = re.fullmatch(r"COCO_(\w+2014)_(\d{1,12}): (\d{1,3})", pair)
            if not found:
                raise InputError(f"{path}: {pair[:80]!r}, expected COCO_<split>_<picture>: <category number>")
            out[found[1], int(found[2])] = names.get(int(found[3]))
        return out
    for year in years:
        places = root / f"instances_{year}.json", root / "annotations" / f"instances_{year}.json"
        path = next((p for p in places if p.exists()), None)
        if path is None:
            raise InputError(f"{root} holds neither ImgId_cate_map.json (VQACL) nor instances_{year}.json (COCO); "
                             "one of them gives each picture its category")
        # polygons are not needed
        keep = lambda d: {k: d.get(k) for k in ("image_id", "category_id", "area")} if "area" in d else d
        area = Counter()
        for where, row in entries(path, "annotations", keep):
            pair = field(row, "image_id", int, where), field(row, "category_id", int, where)
            area[pair] += field(row, "area", (int, float), where)
        for (image, number), _ in sorted(area.items(), key=lambda kv: kv[1]):  # the largest comes last and stays
            out[year, image] = names.get(number)
    return out


# ======================================================================================== NExT-QA, open-ended
# One CSV file per question type, as published.  Here dual increment is turned round: types outside, groups
# inside.
NEXTQA_TYPES = "CW TN TC DL DB DC DO".split()                  # Table 8; CH is in the files but in no setting
NEXTQA_NAMES = (  # bigCate 1..80
    "cat,stingray,cellphone,panda,camera,stool,baby walker,turtle,duck,racket,bottle,cake,aircraft,"
    "squirrel,bat,chair,faucet,toilet,suitcase,hamster/rat,snowboard,ski,bench,stop sign,baby seat,"
    "dish,sofa,oven,handbag,bus/truck,refrigerator,microwave,bird,pig,frisbee,chicken,train,baby,"
    "backpack,motorcycle,skateboard,rabbit,sink,cup,fish,electric fan,fruits,antelope,ball/sports ball,"
    "bicycle,scooter,car,traffic light,crab,laptop,cattle/cow,lion,adult,piano,camel,watercraft,"
    "screen/monitor,elephant,toy,guitar,sheep/goat,horse,child,crocodile,bread,dog,bear,surfboard,"
    "kangaroo,tiger,leopard,table,penguin,snake,vegetables").split(",")
NEXTQA_GROUPS = [group.split(",") for group in (                     # Table 5: CI
    "bicycle,camel,bat,microwave,snake,sofa,traffic light,hamster/rat,chicken,oven,stop sign",
    "crab,camera,lion,ball/sports ball,crocodile,screen/monitor,baby walker,cat,squirrel,frisbee,cattle/cow",
    "piano,watercraft,kangaroo,train,fruits,pig,suitcase,bear,tiger,bench,elephant",
    "ski,stingray,antelope,toy,child,duck,guitar,dish,fish,cake,turtle,leopard",
    "penguin,faucet,car,bottle,bus/truck,aircraft,baby,bread,baby seat,cellphone,sink,rabbit",
    "vegetables,skateboard,bird,toilet,racket,sheep/goat,adult,scooter,electric fan,stool,motorcycle",
    "horse,snowboard,surfboard,handbag,laptop,panda,table,cup,backpack,chair,dog,refrigerator")]
NEXTQA_SUBGROUPS = [                                               # DI: five groups of 16 bigCate ids (VQACL)
    [50, 60, 15, 32, 79, 27, 53, 20, 36, 28, 24, 80, 41, 33, 18, 10], [54, 5, 57, 49, 69, 62, 7, 1, 14, 35, 56, 66, 58, 51, 46, 6],
    [59, 61, 74, 37, 47, 34, 19, 72, 75, 23, 63, 40, 67, 21, 73, 29], [22, 2, 48, 64, 68, 9, 65, 26, 45, 12, 8, 76, 55, 4, 77, 44],
    [78, 17, 52, 11, 30, 13, 38, 70, 25, 3, 43, 42, 39, 16, 71, 31]]


def _nextqa(setting, root, seed):
    """NExT-QA's open-ended questions from {train,val,test}_{CW,TN,...}.csv below `root`.  sample.image = the
    video's id.

    Unless all three splits are there, all files are divided 70/10/20 by video.  DI: types outside, five object
    groups inside.
    """
    parts, files = {"train": [], "val": [], "test": []}, 0
    for split in parts:
        for kind in NEXTQA_TYPES:
            places = root / f"{split}_{kind}.csv", root / "Partition_Q_nextqa" / f"{split}_{kind}.csv"
            path = next((p for p in places if p.exists()), None)
            if path is None:
                continue
            files += 1
            try:
                rows = list(csv.DictReader(io.StringIO(read_text(path), newline="")))
            except csv.Error as e:
                raise InputError(f"{path} cannot be read ({e}); a UTF-8 CSV file is needed") from None
            for line, row in enumerate(rows, 2):
                where = f"{path} line {line}"
                columns = "video", "qid", "question", "answer", "type", "bigCate"
                video, number, question, answer, of, group = (field(row, k, str, where) for k in columns)
                if not re.fullmatch(r"[1-9]|[1-7]\d|80", group):
                    raise InputError(f"{where}: bigCate is {group[:40]!r}, expected 1..80")
                name, group = f"{video}_{number}", NEXTQA_NAMES[int(group) - 1]
                parts[split].append(Sample(name, video, question, (answer,), of, group))
    if not files:
        raise InputError(f"{root} holds no val_CW.csv or the like; NExT-QA's open-ended CSV files go there")
    filled = [k for k in parts if parts[k]]
    if len(filled) < 3:
        everything = [s for k in filled for s in parts[k]]
        parts = {k: [s for s in everything if _split(s.image, seed) == k] for k in parts}
    groups = [(f"G{i + 1} {g[0]}..", g) for i, g in enumerate(NEXTQA_GROUPS)]
    inner = [(f"G{i}", [NEXTQA_NAMES[n - 1] for n in ids]) for i, ids in enumerate(NEXTQA_SUBGROUPS)]
    stream = partition(setting, parts, groups, NEXTQA_TYPES, inner, seed, outer="type", root=root)
    if len(filled) < 3:
        stream.notes.append(f"only {' and '.join(filled)} files: divided 70/10/20 by video")
    return stream


# ============================================================================================== your own data
# The simplest format that can carry a continual stream: a line of JSON for each question.  Pictures may also
# come as region features that somebody else has extracted (`region_files`).


def _jsonl(setting, path, root, seed):
    """One JSON object a line: image (path below root), question, answer or answers, question_type, category;
    optional id, split.

    Tasks appear in the order of the file.  Without "split", pictures go 70/10/20, by the seed.
    """
    parts, types, categories, known = {"train": [], "val": [], "test": []}, {}, {}, set()
    for number, line in enumerate(read_text(path).split("\n"), 1):   # U+2028 in a string ends no line
        if not line.strip():
            continue
        where = f"{path} line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as e:
            raise InputError(f"{where}: not JSON ({getattr(e, 'msg', e)}); one object a line") from None
        image, question = (field(row, k, str, where) for k in ("image", "question"))
        kind, category = (str(field(row, k, (str, int, float), where)) for k in ("question_type", "category"))
        key = "answers" if "answers" in row else "answer"
        answers = field(row, key, (str, int, float, list), where)    # a word is one answer, not its letters
        answers = answers if isinstance(answers, list) else [answers]
        answers = [str(field({key: a}, key, (str, int, float), where)) for a in answers]
        name = field({"id": number, **row}, "id", (str, int), where)
        if not answers:
            raise InputError(f"{where}: no answer")
        if name in known:
            raise InputError(f"{where}: id {name!r} was there before; ids are unique")
        known.add(name)
        inside(root, image, where)
        split = row.get("split") or _split(image, seed)
        if not isinstance(split, str) or split not in parts:
            raise InputError(f"{where}: split is train, val or test, not {split!r}")
        parts[split].append(Sample(name, image, question, tuple(answers), kind, category))
        types[kind] = categories[category] = None
    if not types:
        raise InputError(f"{path} holds no question")
    single = lambda names: [(name, {name}) for name in names]
    return partition(setting, parts, single(categories), types, single(types), seed, root=root)


def region_files(folder):
    """Region features made elsewhere -> load(image), which returns features (n,f) and boxes (n,4) in [0,1],
    float32.

    folder   holds <picture name>.npz (features (n,f), boxes (n,4)) or .npy (features) for every picture, or is
             VL-T5's .h5 file (<name>/features, boxes in pixels, img_w, img_h; needs h5py)
    Raises InputError for a picture that is not there, and for arrays that are misshapen or not finite.
    """
    folder = Path(folder)
    h5, width = open_h5(folder) if folder.suffix in (".h5", ".hdf5") else None, None

    def load(image):
        nonlocal width
        name = Path(str(image)).stem
        where, features, boxes = _from_h5(h5, folder, name) if h5 is not None else _from_numpy(folder, name)
        features = numbers(features, where, (2,)).astype(np.float32)
        whole = np.tile([0., 0, 1, 1], (len(features), 1))           # without boxes: the whole picture
        boxes = numbers(whole if boxes is None else boxes, where, (2,)).astype(np.float32)
        if not features.size or boxes.shape != (len(features), 4) or width not in (None, features.shape[1]):
            raise InputError(f"{where}: features {features.shape} and boxes {boxes.shape}; "
                             f"expected (n,{width or 'f'}) and (n,4)")
        if not (np.isfinite(features).all() and (abs(boxes - .5) <= .51).all()):        # rounding is no fault
            raise InputError(f"{where} holds NaN, infinite numbers or boxes outside [0,1]; extract it again")
        width = features.shape[1]
        return features, boxes
    return load


def open_h5(path):
    """An HDF5 file, open.  Raises InputError for what is none, and without h5py."""
    try:
        import h5py
    except ImportError:
        raise InputError(f"{path} is an HDF5 file, which needs h5py: pip install h5py") from None
    need_file(path, "name it or its folder with --root or --features")
    try:
        return h5py.File(path, "r")
    except OSError as e:
        raise InputError(f"{path} cannot be read ({str(e)[:200]}); download it again") from None


def take_h5(h5, path, *keys):
    """[array] of those keys of an open HDF5 file.  Raises InputError."""
    try:
        return [np.asarray(h5[key][()]) for key in keys]
    except Exception as e:                                       # h5py raises many kinds for a damaged file
        raise InputError(f"{path} cannot be read ({type(e).__name__}: {str(e)[:200]}); it needs the arrays "
                         f"{', '.join(keys[:4])} and so on; download it again") from None


def _from_h5(h5, path, name):
    where, keys = f"{path}, key {name}", [f"{name}/{k}" for k in ("features", "boxes", "img_w", "img_h")]
    features, boxes, *size = take_h5(h5, path, *keys)
    boxes, size = numbers(boxes, where, (2,)), np.stack([numbers(x, where, (0,)) for x in size * 2])
    if boxes.shape[1] != 4 or not (size > 0).all():
        raise InputError(f"{where}: boxes (n,4) in pixels, img_w and img_h are needed; extract it again")
    return where, features, boxes / size


def _from_numpy(folder, name):
    where = next((p for p in (folder / f"{name}.npz", folder / f"{name}.npy") if p.exists()), None)
    if where is None:
        raise InputError(f"{folder / name}.npz (or .npy) is missing; --features must hold every picture")
    file = load_arrays(where, "features", "boxes")
    features = file[""] if "" in file else _take(file, where, "the file", "features")
    return where, features, file.get("boxes")


# ================================== affect: mini-affect and the readers of MOSI, MOSEI, CH-SIMS, IEMOCAP, npz
# Utterances with three sequences each: audio, video, text.  A task is a case of missing modalities, so one
# set of utterances serves all tasks: each sees it through its own mask.  The readers take the pickles and
# HDF5 files that the field passes around; a pickle is read by an unpickler that admits arrays and builtin
# containers only.


MODALITIES = ("audio", "video", "text")


@dataclasses.dataclass
class Utterances:
    """Some utterances with some modalities available: one split of one task of an affect stream.

    features   {"audio": (N,n,d), "video": (N,n,d), "text": (N,n,d)} float32, complete and shared by all tasks
    label      (N,) float32 sentiment, or int64 class
    rows  (n,) int64: which of the N utterances these are     available   the modalities that may be looked at
    """
    features: dict
    label: np.ndarray
    rows: np.ndarray
    available: frozenset = frozenset(MODALITIES)

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        """Utterance i as {"audio", "video", "text": (n,d), "label"}; a missing modality is zeros of the same
        shape."""
        row = self.rows[i]
        seen = {m: x[row] if m in self.available else np.zeros_like(x[row]) for m, x in self.features.items()}
        return {**seen, "label": self.label[row]}


# mini-affect, version 1.  Tuned on the lower and the upper bound alone, then frozen: any change needs a new
# version.
MINI_AFFECT = {
    "version": 1,
    "lengths": {"audio": 4, "video": 4, "text": 6}, "dims": {"audio": 12, "video": 12, "text": 16},
    "train": 448, "val": 192, "test": 640, "upstream": 2000, "upstream_val": 300,          # utterances
    "signal": {"audio": 1.6, "video": 0.8, "text": 1.0},       # how much of the sentiment each modality shows
    "habit": 4.0, "shown": {"audio": 1.0, "video": 1.0, "text": 0.4},     # a speaker's habit: its spread, where it shows
    "noise": {"audio": 0.5, "video": 0.4, "text": 0.4},       # of the evidence, in units of sentiment (-3..3)
    "relation": 0.5,                                                 # correlation of audio's and text's noise
    "gain": 0.5, "token": 0.25}                                 # evidence in features; noise of every feature


def _mini_affect(n, rng, world, classes=0):
    """n utterances of mini-affect -> features {m: (n,len,dim)}, label (n,).

    Sentiment s ~ +-U(0.3,3).  The speaker's habit b ~ N(0, habit^2) is how loud, lively and wordy somebody always
    is.  Evidence of modality m: e_m = signal_m s + shown_m b + noise_m u_m, where audio's and text's u are
    correlated ("relation").  Alone, text is the strongest, audio next, video weak.

    Two modalities together tell s from b.  So the right use of one depends on which others are there (video counts
    against audio where both are, and for the sentiment where it is alone): the tasks contradict each other, and
    training on one spoils another.

    The evidence is written along one direction of the feature space at two random steps of the sequence; a second
    direction marks those steps; everything else is noise.  classes=4: the label is the quadrant of s and of an
    arousal r ~ +-U(0.3,3), written along a third direction.
    """
    geometry = np.random.default_rng(7)                      # the same directions for everybody, upstream too
    strong = lambda: rng.choice((-1.0, 1.0), n) * rng.uniform(0.3, 3, n)
    s, r, b = strong(), strong(), world["habit"] * rng.standard_normal(n)
    u = dict(zip(MODALITIES, rng.standard_normal((3, n))))
    u["audio"] = world["relation"] * u["text"] + np.sqrt(1 - world["relation"] ** 2) * u["audio"]
    features = {}
    for m in MODALITIES:
        length, dim = world["lengths"][m], world["dims"][m]
        q = np.linalg.qr(geometry.standard_normal((dim, dim)))[0]    # directions: evidence, arousal, marker
        x = world["token"] * rng.standard_normal((n, length, dim)) / np.sqrt(3)
        where = np.argsort(rng.random((n, length)), axis=1)[:, :2]   # (n,2) the steps that speak
        arousal = r + (1.5 if m == "text" else 0.7) * rng.standard_normal(n)
        evidence = world["signal"][m] * s + world["shown"][m] * b + world["noise"][m] * u[m]
        value = world["gain"] * evidence[:, None] * q[0] + 2 * q[2]
        if classes:
            value = value + arousal[:, None] * q[1]
        x[np.arange(n)[:, None], where] += value[:, None]            # (n,2,dim)
        features[m] = x.astype(np.float32)
    label = (2 * (s > 0) + (r > 0)).astype(np.int64) if classes else s.astype(np.float32)
    return features, label


def affect_stream(source, patterns, root=None, samples="shared", fold=0, seed=0, max_length=50, world=None,
                  standardize=True):
    """The stream of the missing-modality paper: one task per pattern of available modalities, in this order.

    source      "mini" | "mini4" (built in) | "mosi" | "mosei" | "sims" | "iemocap" (with root) | a path to .npz
    patterns    sequence of frozensets over MODALITIES, Table 1
    root        folder (or file) of the real data
    samples     "shared": every task masks the same utterances; "disjoint": each has its own share of train and val
    fold        of an .npz with a fold array, or IEMOCAP's cross-validation set, from 0
    seed        of mini's utterances
    max_length  longer sequences are averaged over that many equal windows
    world       changes to MINI_AFFECT
    standardize real features to mean 0 and spread 1 on the training part, so that a missing modality, zeros, is the mean

    Returns a Stream whose task.train/val/test are Utterances.  extra: dims and lengths {m: int}, outputs (1, or the
    number of classes), scoring ("mosi", "sims", "classes"), upstream (train, val) with complete modalities,
    version, features, label.  Raises InputError for an unknown name, a missing or malformed file.
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
        version = f"mini-affect {world['version']}"
    else:
        if str(source).endswith(".npz"):
            raw = _read_npz(Path(root or "", source), fold)
        elif source in _PICKLES:
            if not root:
                raise InputError(f"--data {source} needs --root, the folder (or the one above Processed/) of one of {_PICKLES[source]}"
                                 + " or of A/ V/ L/ target/ (MMIN)" * (source == "iemocap"))
            mmin = source == "iemocap" and (Path(root) / "A").is_dir()
            raw = _read_iemocap(Path(root), fold) if mmin else _read_pickles(Path(root), source)
        else:
            raise InputError(f"--data is mini, mini4, {', '.join(_PICKLES)} or a path to <file>.npz, not {source!r}")
        features, label, splits = _join(raw, max_length, standardize, notes)
        up_train, up_val = splits[:2]                          # real data: no utterances besides the stream's
        version = Path(source).name
    scoring = "sims" if source == "sims" else "classes" if label.dtype.kind == "i" else "mosi"
    extra = {"dims": {m: x.shape[2] for m, x in features.items()},
             "lengths": {m: x.shape[1] for m, x in features.items()},
             "outputs": int(label.max()) + 1 if scoring == "classes" else 1, "scoring": scoring, "version": version,
             "features": features, "label": label,
             "upstream": tuple(Utterances(features, label, rows) for rows in (up_train, up_val))}
    rng, T = np.random.default_rng(seed), len(patterns)
    parts = [[rows] * T if samples == "shared" or k == 2 else np.array_split(rng.permutation(rows), T)
             for k, rows in enumerate(splits)]              # test: always everybody, masked with each pattern
    tasks = [Task(pattern_name(p), *(Utterances(features, label, parts[k][t], frozenset(p)) for k in range(3)))
             for t, p in enumerate(patterns)]
    empty = [f"{t.name} has no {k} utterances" for t in tasks for k in ("train", "val", "test")
             if not len(getattr(t, k))]
    if empty:
        raise InputError(f"--data {source}: task {empty[0]}; use more data or --samples shared")
    return Stream(tasks, notes, extra)


def _join(raw, max_length, standardize, notes):
    """{split: {"audio", "video", "text", "label", "where"}} -> features, label, [rows of each split]."""
    features, first = {}, raw["train"]
    for m in MODALITIES:
        parts = []
        for split, part in raw.items():
            what = f"{part['where']}: {m} of {split}"
            x = numbers(part[m], what, (3, 2)).astype(np.float32)
            x = x[:, None] if x.ndim == 2 else x
            if not x.size and len(x):
                raise InputError(f"{what} has shape {x.shape}: there is nothing in it")
            if len(x) != len(part["label"]):
                raise InputError(f"{what} has {len(x)} rows, expected {len(part['label'])}, as labels")
            if parts and x.shape[2] != parts[0].shape[2]:
                raise InputError(f"{what} has dimension {x.shape[2]}, expected {parts[0].shape[2]} as train")
            bad = ~np.isfinite(x)
            if bad.any():
                notes.append(f"warning: {what} has {int(bad.sum())} values -inf or NaN; set to 0")
                x[bad] = 0
            parts.append(windows(x, max_length))
        longest = max(x.shape[1] for x in parts)
        features[m] = np.concatenate([np.pad(x, ((0, 0), (0, longest - x.shape[1]), (0, 0))) for x in parts])
        if standardize:
            features[m] = _standardized(features[m], len(first["label"]))
    label = np.concatenate([part["label"] for part in raw.values()])
    bad = ~np.isfinite(label)
    if bad.any():
        raise InputError(f"{first['where']}: {int(bad.sum())} labels are not numbers; drop those rows")
    if label.dtype.kind == "i" and (label < 0).any():
        raise InputError(f"{first['where']}: label {label.min()}; integers are classes from 0, floats scores")
    sizes = [len(part["label"]) for part in raw.values()]
    return features, label, np.split(np.arange(len(label)), np.cumsum(sizes)[:-1])


def _standardized(x, n):
    """x (N,length,d), each of the d columns with mean 0 and spread 1 over the first n rows, the training part.

    Steps of zeros are padding: they are not counted, and stay.  A column that never changes becomes zeros.
    """
    real = (x != 0).any(-1, keepdims=True)                           # (N,length,1)
    train = x[:n][real[:n, :, 0]].astype(np.float64)                 # (steps,d)
    if not len(train):
        return x
    mean, std = train.mean(0), train.std(0)
    flat = std <= 1e-6 * np.abs(mean).clip(1e-6)                     # rounding is no spread
    return np.where(real & ~flat, (x - mean) / np.where(flat, 1.0, std), 0.0).astype(np.float32)


def windows(x, n):
    """(N,length,d) -> at most n steps: the mean of each of n nearly equal windows; shorter ones stay as they
    are."""
    length = x.shape[1]
    if length <= n:
        return x
    edges = np.linspace(0, length, n + 1).astype(int)
    return np.add.reduceat(x, edges[:-1], axis=1) / np.diff(edges)[:, None].astype(np.float32)


class _Dtype:
    """A dtype in a pickle.  Of its state only the byte order is taken: the rest could point anywhere in memory."""
    def __init__(self, code, *_):
        self.dtype = np.dtype(str(code))

    def __setstate__(self, state):
        self.dtype = self.dtype.newbyteorder(state[1])


class _Array(np.ndarray):
    def __setstate__(self, state):
        shape, kind, fortran, values = state[-4:]
        super().__setstate__((1, shape, kind.dtype, fortran, values))


def _scalar(kind, value):
    value = value.encode("latin1") if isinstance(value, str) else value
    return np.frombuffer(value, kind.dtype)[0] if value else kind.dtype.type()       # "" has no bytes


def _at_any_address(*_):
    raise InputError("it asks numpy for an array at an address of its own")


class _SafeUnpickler(pickle.Unpickler):
    """Admits numpy arrays, numbers, strings and builtin containers.  Everything else a pickle could call is
    refused, and so is numpy's own constructor: it makes arrays of any address in memory."""
    _allowed = {("collections", "OrderedDict"): dict, ("_codecs", "encode"): lambda text, codec: text.encode(codec),
                ("numpy", "ndarray"): _at_any_address, ("numpy", "dtype"): _Dtype,
                ("numpy.core.multiarray", "_reconstruct"): lambda *_: _Array(0),
                ("numpy.core.multiarray", "scalar"): _scalar,
                ("numpy.core.numeric", "_frombuffer"):
                    lambda values, kind, shape, order: np.frombuffer(values, kind.dtype).reshape(shape, order=order)}
    for _type in (list, dict, set, frozenset, tuple, bytes, bytearray, complex, slice, range):
        _allowed["builtins", _type.__name__] = _type

    def find_class(self, module, name):
        key = module.replace("numpy._core", "numpy.core").replace("__builtin__", "builtins"), name
        if key not in self._allowed:
            raise InputError(f"it asks for {module}.{name}, which is neither numpy nor a builtin container")
        return self._allowed[key]


def read_pickle(path):
    """The content of a pickle of numpy arrays and builtin containers.  Raises InputError if it holds anything
    else: a pickle from elsewhere can run any program when it is read the usual way."""
    need_file(path)
    try:
        with open(path, "rb") as f:
            return _SafeUnpickler(f, encoding="latin1").load()       # latin1: arrays pickled by Python 2
    except InputError as e:
        raise InputError(f"{path} is refused: {e}; convert it to <file>.npz on a machine where you trust it") from None
    except Exception as e:
        raise InputError(f"{path} is not a complete pickle ({type(e).__name__}: {e}); download it again") from None


def _take(part, where, split, *names):
    for name in names if isinstance(part, dict) else ():
        if name in part:
            return part[name]
    found = ", ".join(map(str, part))[:200] if isinstance(part, dict) else type(part).__name__
    raise InputError(f"{where}: {split} has no key {' or '.join(names)}; found {found}")


def numbers(x, where, dims, kinds="fiu"):
    """x as an array of real numbers with one of these counts of dimensions; float32, or int64 for integers.
    Raises InputError; numbers too large for float32 become infinite."""
    try:
        x = np.asarray(x)
    except ValueError as e:                                          # rows of different lengths
        raise InputError(f"{where}: no array ({e})") from None
    if x.dtype.kind not in kinds or x.ndim not in dims:
        raise InputError(f"{where}: type {x.dtype}, shape {x.shape}; expected numbers, {dims[0]} dimensions")
    with np.errstate(over="ignore"):
        return x.astype(np.int64 if x.dtype.kind in "iu" else np.float32)


def load_arrays(path, *keys):
    """{key: array} of those keys that an .npz has, or {"": array} of an .npy.  Raises InputError."""
    need_file(path)
    try:
        with open(path, "rb") as f:
            file = np.load(f, allow_pickle=False)
            return {k: file[k] for k in keys if k in file} if hasattr(file, "files") else {"": file}
    except Exception as e:                             # numpy and zipfile raise many kinds for a damaged file
        raise InputError(f"{path} is not a readable file of plain arrays ({type(e).__name__}: {e})") from None


_PICKLES = {"mosi": "mosi_data.pkl mosi_data_noalign.pkl aligned_50.pkl unaligned_50.pkl",   # MulT's, MMSA's
            "mosei": "mosei_senti_data.pkl mosei_senti_data_noalign.pkl aligned_50.pkl unaligned_50.pkl",
            "sims": "unaligned_39.pkl unaligned.pkl", "iemocap": "iemocap_data.pkl iemocap_data_noalign.pkl"}


def _read_pickles(root, source):
    """MulT's and MMSA's pickles: {split: {text, audio, vision, labels (N,1,1) | regression_labels (N,)}}."""
    names = _PICKLES[source].split()
    places = [root] if root.is_file() else [f for n in names for f in (root / n, root / "Processed" / n)]
    path = next((f for f in places if f.is_file()), None)
    if path is None:
        raise InputError(f"{root} and its Processed/ hold none of {_PICKLES[source]}; --root may be the file")
    data, raw = read_pickle(path), {}
    for split in ("train", "valid", "test"):
        take = functools.partial(_take, _take(data, path, "the file", split), path, split)
        where = f"{path}: labels of {split}"
        label = numbers(take("regression_labels", "labels"), where, (3, 1, 2))
        if not label.size:
            raise InputError(f"{where}: there is none")
        if source == "iemocap":                                   # MulT: (N,4,2), one yes/no pair per emotion
            if label.shape[1:] != (4, 2):
                raise InputError(f"{where} has shape {label.shape}, expected (N,4,2)")
            label = label[:, :, 1].argmax(1)
        else:
            label = label.reshape(len(label), -1)[:, 0].astype(np.float32)
        raw[split] = {"audio": take("audio"), "video": take("vision", "video"), "text": take("text"),
                      "label": label, "where": path}
    return raw


def _read_iemocap(root, fold):
    """MMIN's IEMOCAP: A/comparE.h5, V/denseface.h5, L/bert_large.h5 keyed by utterance, target/<cv>/*_label.npy.

    Needs h5py.
    """
    files = {"audio": root / "A/comparE.h5", "video": root / "V/denseface.h5", "text": root / "L/bert_large.h5"}
    longest, raw, cv = {"audio": 350, "video": 50, "text": 22}, {}, str(fold + 1)
    for split, short in (("train", "trn"), ("valid", "val"), ("test", "tst")):
        labels, names = (root / "target" / cv / f"{short}_{k}.npy" for k in ("label", "int2name"))
        need_file(labels, f"--folds {fold} is cross-validation set {cv}")
        keys, label = (np.asarray(load_arrays(path).get("")) for path in (names, labels))
        if keys.dtype.kind not in "SU" or not keys.size or label.ndim != 2 or label.shape[1] < 2:
            raise InputError(f"{names}: names of utterances are needed, and in {labels} one column per class")
        keys = [k.decode("latin1") if isinstance(k, bytes) else str(k) for k in keys.reshape(-1)]
        raw[split] = part = {"label": numbers(label, labels, (2,)).argmax(1), "where": labels}
        for m, path in files.items():
            with open_h5(path) as h5:
                arrays = take_h5(h5, path, *keys)
            rows = [numbers(x, f"{path}, {k}", (2,))[:longest[m]] for k, x in zip(keys, arrays)]
            if len({x.shape[1] for x in rows}) > 1:
                raise InputError(f"{path}: the utterances of {names} have several dimensions")
            part[m] = np.array([np.pad(x, ((0, longest[m] - len(x)), (0, 0))) for x in rows], np.float32)
    return raw


def _read_npz(path, fold):
    """<file>.npz: audio, video, text (N,n,d), label (N,), split (0 1 2 | train valid test) or fold (0..F-1).

    With fold: test = that fold, val = the next one, train = the others.  label of integers = classes.
    """
    data = load_arrays(path, *MODALITIES, "label", "split", "fold")
    label = numbers(_take(data, path, "the file", "label"), f"{path}: label", (1, 2)).reshape(-1)
    which = _take(data, path, "the file", "split", "fold")
    if "split" not in data:
        which = numbers(which, f"{path}: fold", (1,), "iu")
    if which.shape != label.shape or not label.size:
        raise InputError(f"{path}: split or fold has {which.size} entries, expected {len(label)} as label")
    if "split" in data:
        number = {"0": 0, "train": 0, "1": 1, "valid": 1, "val": 1, "2": 2, "test": 2}
        if bad := [x for x in which.astype(str) if x not in number]:
            raise InputError(f"{path}: split is 0 1 2 or train valid test, not {bad[0][:40]!r}")
        part = np.array([number[x] for x in which.astype(str)])
    else:
        folds = int(which.max()) + 1
        if folds < 3 or not 0 <= fold < folds:
            raise InputError(f"{path}: fold has {folds} folds; three or more are needed, --folds is of 0..{folds - 1}")
        part = np.select([which == fold, which == (fold + 1) % folds, which >= 0], [2, 1, 0], -1)
    for m in MODALITIES:
        if np.shape(_take(data, path, "the file", m))[:1] != label.shape:
            raise InputError(f"{path}: {m} has shape {data[m].shape}, expected {len(label)} rows as label")
    return {split: {**{m: data[m][part == i] for m in MODALITIES}, "label": label[part == i], "where": path}
            for i, split in enumerate(("train", "valid", "test"))}


def pattern_name(available):
    """frozenset({"audio", "text"}) -> "al": the available modalities, a audio, v video, l text (language)."""
    return "".join({"audio": "a", "video": "v", "text": "l"}[m] for m in MODALITIES if m in available)


def describe_affect():
    """A few lines about mini-affect: sizes, and what a linear read-out of the mean features reaches per
    pattern.

    For every pattern: accuracy (points) of least squares fitted on that pattern's train split (its best use),
    and of the weights fitted on complete modalities with the missing ones set to zero (what a model that
    knows no other case does).
    """
    patterns = [{m for m in MODALITIES if pattern_name([m]) in name} for name in "avl av vl al a v l".split()]
    stream = affect_stream("mini", patterns)
    task, extra = stream.tasks[0], stream.extra
    x, y = extra["features"], extra["label"][:, None]

    def table(part, seen):
        means = [x[m][part.rows].mean(1) * (m in seen) for m in MODALITIES]
        return np.concatenate([*means, np.ones((len(part), 1))], 1)                            # (n,41)

    def accuracy(known, seen):
        weights = np.linalg.lstsq(table(task.train, known), y[task.train.rows], rcond=1e-4)[0]
        return 100 * np.mean((table(task.test, seen) @ weights > 0) == (y[task.test.rows] > 0))
    sizes = ", ".join(f"{m} {extra['lengths'][m]}x{extra['dims'][m]}" for m in MODALITIES)
    counts = f"{len(task.train)} train, {len(task.val)} val, {len(task.test)} test per task"
    lines = [f"{extra['version']}: {sizes}; {counts}",
             "pattern   linear, fitted on it   fitted on all three modalities"]
    return "\n".join(lines + [f"{pattern_name(p):<9} {accuracy(p, p):20.1f}   {accuracy(MODALITIES, p):30.1f}"
                              for p in patterns])


# ============================================================================== mini-CoIN and the CoIN layout
# Eight instruction tasks in CoIN's order: small pictures drawn with Pillow, with the instructions of the
# paper's Table 7, and the reader of the real files.  The world is made so that tasks differ in form (a
# letter, a word, a box) and share pictures, as CoIN's do: GQA, REC and VQAv2 look at the same kind of scene
# and ask different things. One instruction sample is a dict:
#   image    a PIL picture, a path, or None (a question without a picture)
#   text     the question, then the instruction of Table 7, as the model and the guidance read it
#   answer   the answer to learn and to compare with; a box is "[x1, y1, x2, y2]", shares of the padded square
#   kind     which rule of metrics.score_instruction applies
#   and      of mini-CoIN key, the sample's name; of CoIN answers (the annotators') and pad (to a square)
COIN = ("ScienceQA", "TextVQA", "ImageNet", "GQA", "VizWiz", "REC", "VQAv2", "OCRVQA")     # the paper's order
LETTER = "Answer with the option's letter from the given choices directly."                          # Table 7
WORD = "Answer the question using a single word or phrase."
OBJECT = "What is the object in the image?"
BOX = "Please provide the bounding box coordinate of the region this sentence describes: the {}."
MINI_COIN = 1                                                        # the version of the world below; frozen

_SHAPES = "circle square triangle star heart cross moon ring arrow house tree key".split()
_COLOURS = {"red": (214, 40, 40), "green": (40, 160, 60), "blue": (40, 80, 220), "yellow": (240, 210, 40),
            "purple": (150, 50, 190), "black": (25, 25, 25)}
_SIGNS = ("stop", "exit", "sale", "open", "taxi", "cafe", "bank", "farm")
_TITLES = ("wind", "rain", "gold", "fire", "lake", "echo")
_AUTHORS = ("west", "king", "hart", "ford", "nash", "wolf")
_GENRES = {"romance": "heart", "travel": "arrow", "nature": "tree", "space": "moon", "crime": "key"}
_SIDES = {"left": (-1, 0), "right": (1, 0), "above": (0, -1), "below": (0, 1)}
_SIDE, _CELL = 48, 16                                             # a picture is 3 x 3 cells of 16 x 16 pixels


def _outline(shape):
    """Polygons of a shape in the unit square, and which of them, by number, are holes in the background's colour."""
    arc = lambda x, y, r, a=0, b=360, n=14: [(x + r * math.cos(math.radians(a + (b - a) * i / n)),
                                              y + r * math.sin(math.radians(a + (b - a) * i / n))) for i in range(n + 1)]
    box = lambda x1, y1, x2, y2: [(x1, y1), (x2, y1), (x2, y2), (x1, y2)]
    star = [(.5 + r * math.sin(math.pi * i / 5), .5 - r * math.cos(math.pi * i / 5))
            for i, r in enumerate([.5, .2] * 5)]
    return {"circle": [arc(.5, .5, .5)], "square": [box(.05, .05, .95, .95)], "triangle": [[(.5, 0), (1, 1), (0, 1)]],
            "star": [star], "heart": [arc(.27, .28, .27), arc(.73, .28, .27), [(.02, .4), (.98, .4), (.5, 1)]],
            "cross": [box(.35, 0, .65, 1), box(0, .35, 1, .65)], "moon": [arc(.5, .5, .5), [*arc(.78, .4, .42)]],
            "ring": [arc(.5, .5, .5), arc(.5, .5, .26)], "arrow": [[(0, .35), (.5, .35), (.5, .05), (1, .5), (.5, .95),
                                                                     (.5, .65), (0, .65)]],
            "house": [box(.15, .45, .85, 1), [(.5, 0), (1, .5), (0, .5)]],
            "tree": [arc(.5, .33, .33), box(.42, .6, .58, 1)],
            "key": [arc(.25, .5, .25), box(.4, .42, 1, .58), box(.75, .5, .85, .8), box(.9, .5, 1, .8), arc(.22, .5, .1)]
            }[shape], {"moon": {1}, "ring": {1}, "key": {4}}.get(shape, set())


def _draw(draw, shape, colour, box, background):
    polygons, holes = _outline(shape)
    x1, y1, x2, y2 = box
    for i, points in enumerate(polygons):
        draw.polygon([(x1 + x * (x2 - x1), y1 + y * (y2 - y1)) for x, y in points],
                     fill=background if i in holes else colour)


def _tint(name, rng):
    return tuple(min(255, max(0, c + rng.randint(-12, 12))) for c in _COLOURS[name])


def _canvas(rng, paper=None):
    from PIL import Image, ImageDraw
    background = paper or tuple(rng.randint(205, 245) for _ in range(3))
    image = Image.new("RGB", (_SIDE, _SIDE), background)
    return image, ImageDraw.Draw(image), background


def _object_picture(rng, kind="photo"):
    """One object.  kind: diagram (ruled white paper) or photo (tinted, speckled)."""
    image, draw, background = _canvas(rng, (255, 255, 255) if kind == "diagram" else None)
    if kind == "diagram":
        shapes, colours = _OPTIONS["shape"], _OPTIONS["colour"]
        for y in range(6, _SIDE, 7):
            draw.line((0, y, _SIDE, y), fill=(200, 210, 235))
    else:
        shapes, colours = _SHAPES, list(_COLOURS)
        for _ in range(40):
            spot = rng.randrange(_SIDE), rng.randrange(_SIDE)
            draw.point(spot, fill=tuple(rng.randint(120, 255) for _ in range(3)))
    shape, colour, size = rng.choice(shapes), rng.choice(colours), rng.randint(12, 14)
    column, row = rng.randrange(3), rng.randrange(3)
    x, y = (_CELL * k + rng.randint(0, _CELL - size) for k in (column, row))
    _draw(draw, shape, _tint(colour, rng), (x, y, x + size, y + size), background)
    return image, {"shape": shape, "colour": colour, "seen": [(column, row, shape, colour, "")]}


# A 3 x 5 font of our own (five rows a letter, three bits each), so that no Pillow version changes the world.
_FONT = dict(zip("abcdefghijklmnopqrstuvwxyz", (
    "25755 65656 34443 65556 74647 74644 34553 55755 72227 11152 55655 44447 57755 67555 25552 65644 25563 65655 34216 "
    "72222 55557 55552 55775 55255 55222 71247").split()))


def _write(draw, rng, word, column, row, fill):
    """Four letters of 3 x 5 pixels fill the width of a cell."""
    x, y = _CELL * column, _CELL * row + rng.randint(5, 6)
    for i, letter in enumerate(word):
        for j, bits in enumerate(_FONT[letter]):
            draw.point([(x + 4 * i + k, y + j) for k in range(3) if int(bits) >> (2 - k) & 1], fill=fill)


def _ink(colour):
    return (20, 20, 20) if sum(_COLOURS[colour]) > 330 else (255, 255, 255)


def _sign_picture(rng):
    """A coloured board across the picture with one word."""
    image, draw, _ = _canvas(rng)
    word, colour = rng.choice(_SIGNS), rng.choice(list(_COLOURS))
    column, row = rng.randrange(3), rng.randrange(3)
    draw.rectangle((0, _CELL * row, _SIDE, _CELL * (row + 1) - 1), fill=_tint(colour, rng))
    _write(draw, rng, word, column, row, _ink(colour))
    return image, {"word": word, "colour": colour, "seen": [(column, row, "", colour, word)]}


def _cover_picture(rng):
    """A book: title above, the genre's emblem in the middle, author below."""
    image, draw, _ = _canvas(rng)
    colour = rng.choice(list(_COLOURS))
    paper, ink = _tint(colour, rng), _ink(colour)
    draw.rectangle((0, 0, _SIDE, _SIDE), fill=paper)
    title, author, genre = rng.choice(_TITLES), rng.choice(_AUTHORS), rng.choice(list(_GENRES))
    above, middle, below = (rng.randrange(3) for _ in range(3))                          # columns
    _write(draw, rng, title, above, 0, ink)
    _write(draw, rng, author, below, 2, ink)
    x = _CELL * middle + rng.randint(0, 2)
    _draw(draw, _GENRES[genre], ink, (x, 17, x + 13, 30), paper)
    seen = [(above, 0, "", "", title), (middle, 1, _GENRES[genre], "", ""), (below, 2, "", "", author)]
    return image, {"title": title, "author": author, "genre": genre, "colour": colour, "seen": seen}


def _scene_picture(rng):
    """Two to five objects in the cells."""
    image, draw, background = _canvas(rng)
    few = rng.sample(_SHAPES[:10], 4)                     # some shapes repeat: questions ask about the others
    seen = []
    for cell in rng.sample(range(9), rng.randint(2, 5)):
        shape, colour, size = rng.choice(few), rng.choice(list(_COLOURS)), rng.randint(13, 14)
        x, y = (_CELL * k + rng.randint(0, _CELL - size) for k in (cell % 3, cell // 3))
        _draw(draw, shape, _tint(colour, rng), (x, y, x + size, y + size), background)
        seen.append((cell % 3, cell // 3, shape, colour, ""))
    return image, {"seen": seen}


def _blur(image, rng):
    """Out of focus and dark, as a picture that cannot be answered about."""
    from PIL import ImageEnhance, ImageFilter
    blurred = image.filter(ImageFilter.GaussianBlur(rng.uniform(6, 9)))
    return ImageEnhance.Brightness(blurred).enhance(rng.uniform(.4, .7))


def box_text(column, row):
    """The region of a cell as CoIN writes boxes, shares of the side: "[0.33, 0.00, 0.67, 0.33]"."""
    return "[" + ", ".join(f"{k / 3:.2f}" for k in (column, row, column + 1, row + 1)) + "]"


def _scene_facts(seen):
    """Every question a scene answers: {skill: [(argument, answer)]}, shapes and colours in words."""
    at = {(x, y): shape for x, y, shape, *_ in seen}
    shapes = [*at.values()]
    facts = {"colour": [], "count": [("", str(len(seen)))], "locate": [], **{side: [] for side in _SIDES}}
    for column, row, shape, colour, _ in seen:
        if shapes.count(shape) == 1:
            facts["locate"].append((shape, box_text(column, row)))
            facts["colour"].append((shape, colour))
            for side, (dx, dy) in _SIDES.items():
                if (column + dx, row + dy) in at:
                    facts[side].append((shape, at[column + dx, row + dy]))
    return facts


# Multiple choice: the options of a kind are always these five, in this order; facts need no picture.
_OPTIONS = {"shape": ("circle", "heart", "square", "star", "triangle"),
            "colour": ("blue", "green", "purple", "red", "yellow")}
_FACTS = {"three corners": "triangle", "four corners": "square", "five points": "star", "no corner": "circle",
          "two lobes": "heart", "grass": "green", "the sky": "blue", "blood": "red", "a lemon": "yellow",
          "a plum": "purple"}


def _options(answer):
    """The kind, the lettered options of that kind, and the letter of the answer."""
    kind = "shape" if answer in _OPTIONS["shape"] else "colour"
    lines = "\n".join(f"{letter}. {x}" for letter, x in zip("ABCDE", _OPTIONS[kind]))
    return kind, lines, "ABCDE"[_OPTIONS[kind].index(answer)]


def mini_coin_sample(task, rng):
    """One sample of one of the eight mini-CoIN tasks: (image or None, question, instruction, answer)."""
    if task == "ScienceQA":
        if rng.random() < 0.25:                                    # ScienceQA has questions without a picture
            fact = rng.choice(list(_FACTS))
            kind, options, letter = _options(_FACTS[fact])
            return None, f"Which {kind} goes with {fact}?\n{options}", LETTER, letter
        image, facts = _object_picture(rng, "diagram")
        kind, options, letter = _options(facts[rng.choice(("shape", "colour"))])
        return image, f"Which {kind} does the diagram show?\n{options}", LETTER, letter
    if task == "TextVQA":
        image, facts = _sign_picture(rng)
        question = rng.choice(("What does the sign say?", "What word is written here?",
                               "What is written on the board?"))
        return image, question, WORD, facts["word"]
    if task == "ImageNet":
        image, facts = _object_picture(rng)
        return image, OBJECT, WORD, facts["shape"]
    if task == "VizWiz":
        image, facts = (_object_picture, _sign_picture)[rng.randrange(2)](rng)
        question, key = rng.choice((("What is this?", "shape" if "shape" in facts else "word"),
                                    ("What colour is this?", "colour")))
        if rng.random() < 0.4:
            return _blur(image, rng), question, WORD, "unanswerable"
        return image, question, WORD, facts[key]
    if task == "OCRVQA":
        image, facts = _cover_picture(rng)
        key = rng.choice(("title", "author", "genre"))
        return image, f"{'Who' if key == 'author' else 'What'} is the {key} of this book?", WORD, facts[key]
    while True:                                          # GQA, REC and VQAv2 share their pictures, as in CoIN
        image, facts = _scene_picture(rng)
        facts = _scene_facts(facts["seen"])
        side, either = rng.choice(list(_SIDES)), rng.choice(("colour", "count"))
        skill = {"GQA": side, "REC": "locate", "VQAv2": either}[task]
        if facts[skill]:
            break
    argument, answer = rng.choice(facts[skill])
    question = {"colour": "What is the colour of the {}?", "count": "How many things are there?",
                "left": "What is to the left of the {}?", "right": "What is to the right of the {}?",
                "above": "What is above the {}?", "below": "What is below the {}?",
                "locate": BOX}[skill].format(argument)
    return image, question, "" if task == "REC" else WORD, answer


def _labels(seen):
    """What stands in each of the nine cells, for the eyes of the small backbone: nine rows of 8 words, ""
    where there is none.

    Shape, colour, where (its box), word written there, the shapes left, right, above and below."""
    cells, at = [[""] * 8 for _ in range(9)], {(x, y): shape for x, y, shape, *_ in seen}
    for x, y, shape, colour, word in seen:
        around = [at.get((x + dx, y + dy), "") if shape else "" for dx, dy in _SIDES.values()]
        cells[3 * y + x] = [shape, colour, box_text(x, y), word, *around]
    return cells


def mini_coin_upstream(rng):
    """One picture of the upstream mixture that the small backbone is pre-trained on, with all its questions.

    Returns (image or None, [(skill, text, answer, sentence)], caption, cells).  Disjoint from the stream:
    other pictures, terse skill words instead of the stream's sentences and instructions; sentence is the
    answer in full, given unless the skill says "short".  caption: what the guidance encoder is aligned
    with.  cells: see _labels.
    """
    kind = rng.choice(("diagram", "photo", "sign", "sign", "cover", "text", "blur", *("scene",) * 6))
    image, say, facts = None, [], {"seen": []}
    if kind in ("diagram", "photo", "sign"):
        image, facts = _sign_picture(rng) if kind == "sign" else _object_picture(rng, kind)
        x, y, shape, colour, word = facts["seen"][0]
        caption = f"a {colour} sign with {word}" if word else f"a {kind} of a {colour} {shape}"
        say = [("read", "", word, "the text says {}") if word else ("name", "", shape, "it shows a {}"),
               ("colour", "", colour, "the colour is {}"), ("locate", "", box_text(x, y), "it is at {}")]
    elif kind == "cover":
        image, facts = _cover_picture(rng)
        caption = f"a {facts['colour']} cover with {facts['title']} and {facts['author']} and {facts['genre']}"
        say = [(key, "", facts[key], f"the {key} is {{}}") for key in ("title", "author", "genre")]
    elif kind == "scene":
        image, facts = _scene_picture(rng)
        caption = "a scene with " + " and ".join(f"a {o[3]} {o[2]}" for o in facts["seen"])
        whole = {o[2]: f"the {o[2]} is {o[3]} at {box_text(*o[:2])}" for o in facts["seen"]}
        say = [(s, *fact, whole[fact[0]] if s in ("colour", "locate") else f"{s} the {fact[0]} is a {{}}" if fact[0] else
                "there are {}") for s, all_facts in _scene_facts(facts["seen"]).items()
               for fact in rng.sample(all_facts, min(3 if s == "locate" else 2, len(all_facts)))]
    elif kind == "blur":
        image, _ = (_object_picture, _sign_picture)[rng.randrange(2)](rng)
        image, caption = _blur(image, rng), "a blurred picture"
        say = [(skill, "", "unanswerable", "it is {}") for skill in ("name", "colour", "read")]
    for fact in rng.sample(list(_FACTS), 2) if kind == "text" else []:
        options, letter = _options(_FACTS[fact])[1:]
        caption = f"words about {fact}"
        say.append(("choose", f"{fact} {options}", letter, "the choice is {}"))
    for key in ("shape", "colour") if kind == "diagram" else ():
        pool, options, letter = _options(facts[key])
        say.append(("choose", f"{pool} {options}", letter, "the choice is {}"))
    say = [(skill, text, answer, form.format(answer)) for skill, text, answer, form in say]
    return image, say, caption, _labels(facts["seen"])


MINI_WORD = r"<image>|\[[^\]]*\]|[A-E]\.|\w+|[^\w\s]"          # one token of the small backbone; a box is one


@functools.cache
def mini_coin_words():
    """Every word of mini-CoIN and of its upstream mixture, in a fixed order: the vocabulary of the small
    backbone."""
    rng = random.Random("vocabulary")
    lines = [" ".join((*_SHAPES, *_COLOURS, *_SIGNS, *_TITLES, *_AUTHORS, *_GENRES, *map(str, range(10)))),
             " ".join(box_text(k % 3, k // 3) for k in range(9)), "A. B. C. D. E. A B C D E", " ".join(_FACTS)]
    for _ in range(1500):
        _, said, caption, _ = mini_coin_upstream(rng)
        lines += [caption, "short", *(" ".join(turn) for turn in said)]
    lines += [" ".join(mini_coin_sample(task, rng)[1:]) for task in COIN for _ in range(200)]
    return tuple(sorted({word for line in lines for word in re.findall(MINI_WORD, line)}))


# the rule of metrics.score_instruction that scores each task
_RULES = dict(zip(COIN, ("letter", "vqa", "class", "gqa", "word", "box", "word", "title")))


def _mini_coin(seed, sizes):
    tasks = []
    for task in COIN:
        splits = []
        for split, n in zip(("train", "val", "test"), sizes):
            rng, samples = random.Random(f"mini-CoIN {MINI_COIN} {seed} {task} {split}"), []
            for i in range(n):
                image, question, instruction, answer = mini_coin_sample(task, rng)
                samples.append({"key": f"{task}/{split}/{i}", "image": image, "answer": answer,
                                "kind": _RULES[task], "text": f"{question}\n{instruction}".rstrip()})
            splits.append(samples)
        tasks.append(Task(task, *splits))
    return Stream(tasks, [f"mini-CoIN version {MINI_COIN}, seed {seed}"], {"version": f"mini-CoIN {MINI_COIN}"})


def sample_picture(sample):
    """The sample's picture as a PIL RGB image, or None; padded to a square with its mean colour where the
    source says so.

    Raises InputError if the file cannot be decoded: readers leave missing and truncated pictures out before.
    """
    image = sample.get("image")
    if image is None or not isinstance(image, (str, Path)):
        return image
    image = open_picture(image)
    return pad_square(image) if sample.get("pad") else image


def pad_square(image):
    """The picture in the middle of a square of its mean colour: CoIN's boxes are shares of this square."""
    from PIL import Image, ImageStat
    side = max(image.size)
    square = Image.new("RGB", (side, side), tuple(int(c) for c in ImageStat.Stat(image).mean))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square


def picture_problem(path):
    """None if the file looks whole, else "missing", "truncated" or "not a picture".  Reads only the file's
    two ends."""
    if not os.path.isfile(path):                                     # a folder, a pipe, or nothing
        return "missing"
    try:
        with open(path, "rb") as f:
            head = f.read(16)
            f.seek(max(0, os.path.getsize(path) - 1024))
            tail = f.read()
    except OSError:
        return "missing"
    for start, end in ((b"\xff\xd8", b"\xff\xd9"), (b"\x89PNG\r\n\x1a\n", b"IEND")):
        if head.startswith(start):
            return None if end in tail else "truncated"
    return None if head.startswith((b"RIFF", b"GIF8", b"BM", b"II", b"MM")) else "not a picture"


COIN_TREE = ("DIR/Instructions_Original/{ScienceQA,TextVQA,ImageNet,GQA,VizWiz,Grounding,VQAv2,OCRVQA}/"
             "{train,test}.json (val.json instead of test.json for TextVQA, VizWiz, VQAv2), from the dataset "
             "Zacks-Chen/CoIN; pictures below DIR at the paths the JSON files name")


def parse_box(text):
    """Four numbers of "[x1, y1, x2, y2]" as floats, or None."""
    found = re.findall(r"-?\d*\.?\d+", str(text))
    return [float(x) for x in found[:4]] if len(found) >= 4 else None


def _coin_file(path, task, root, count):
    rows = read_json(path)
    if not isinstance(rows, list):
        raise InputError(f"{path}: a JSON list of samples is needed, this is a {type(rows).__name__}")
    samples = []
    for i, row in enumerate(rows):
        where = f"{path}, sample {i}"
        if isinstance(row, dict) and "conversations" in row:         # training file
            turns = field(row, "conversations", list, where)
            text, answer = (field(turn, "value", str, where) for turn in (turns + [None, None])[:2])
        else:                                                        # test file
            text = field(row, "text", str, where)
            key = "answer_bbox" if "answer_bbox" in row else "answer"
            answer = field(row, key, (str, int, float, list), where)
        several = row.get("answers") or []                           # ten annotators, where the file has them
        # a word is one answer, not its letters
        several = several if isinstance(several, list) else [several]
        several = [a if isinstance(a, dict) else {"answer": a} for a in several]
        sample = {"text": text.replace("<image>", "").strip(), "answer": str(answer).strip(),
                  "answers": [field(a, "answer", str, where) for a in several],
                  "kind": _RULES[task], "image": None, "pad": True}
        if task == "REC" and parse_box(answer) is None:
            count["boxes that cannot be parsed, left out"] += 1
            continue
        if row.get("image"):
            sample["image"] = str(inside(root, field(row, "image", str, where), where))
            if problem := picture_problem(sample["image"]):
                count[f"pictures {problem}, samples left out"] += 1
                continue
        else:
            count["questions without a picture"] += 1
        samples.append(sample)
    return samples


def _coin(root, seed, limit):
    if root is None:
        raise InputError(f"--data coin needs --root DIR; expected: {COIN_TREE}")
    folder = Path(root) / "Instructions_Original"
    if not folder.is_dir():
        raise InputError(f"{folder} is not there; expected: {COIN_TREE}")
    tasks, notes = [], []
    for task in COIN:
        where = folder / ("Grounding" if task == "REC" else task)
        test = "val.json" if task in ("TextVQA", "VizWiz", "VQAv2") else "test.json"
        files = {"train": where / "train.json", "test": where / test}
        if not where.is_dir():
            notes.append(f"{task}: no folder {where}, task left out")
            continue
        splits = {}
        for split, path in files.items():
            count = Counter()
            samples = _coin_file(path, task, Path(root), count)
            if not samples:
                raise InputError(f"{path}: no usable sample" + "".join(f"; {n} {what}" for what, n in count.items()))
            notes += [f"{task} {split}: {n} {what}" for what, n in sorted(count.items())]
            rng = random.Random(f"{seed} {task} {split}")
            splits[split] = rng.sample(samples, len(samples))[:limit or None]
        n = len(splits["train"])                               # CoIN has no validation part: a share of train
        n_val = max(1, min(500, n // 10)) if n > 1 else 0
        tasks.append(Task(task, splits["train"][n_val:], splits["train"][:n_val], splits["test"]))
    if not tasks:
        raise InputError(f"{folder} holds none of the eight tasks; CoIN is expected as {COIN_TREE}")
    return Stream(tasks, notes)


def instruction_stream(source="mini", root=None, seed=0, sizes=(240, 60, 100), limit=None):
    """The tasks of continual instruction tuning in CoIN's order.

    source "mini": mini-CoIN, sizes = samples per task for train, val, test.  source "coin": the CoIN files
    below root; limit keeps that many samples of each file, seeded; a tenth of train (at most 500) serves as
    val. Raises InputError for a missing or malformed file; what was left out, and why, stands in the stream's
    notes.
    """
    if source == "mini":
        return _mini_coin(seed, sizes)
    if source == "coin":
        return _coin(root, seed, limit)
    raise InputError(f"--data {source}: unknown; one of mini, coin")


def describe_mini_coin(path=None, columns=8, seed=0):
    """One line of text a task: the first of `columns` samples.  path: also draws a sheet of them as PNG, one
    row of pictures a task below its line; a question without a picture leaves a gap."""
    from PIL import Image, ImageDraw
    rng, lines = random.Random(seed), []
    width, height = 104, 122                                     # a picture of 96 pixels and its line of text
    sheet = Image.new("RGB", (columns * width, len(COIN) * height), "white")
    draw = ImageDraw.Draw(sheet)
    for i, task in enumerate(COIN):
        for j in range(columns):
            image, question, instruction, answer = mini_coin_sample(task, rng)
            if image is not None:
                sheet.paste(image.resize((96, 96), 0), (j * width + 4, i * height + 22))
            if j == 0:
                lines.append(f"{task}: {' '.join(f'{question} {instruction}'.split())} -> {answer}")
        draw.text((4, i * height + 6), lines[-1], fill=(0, 60, 160))
    if path:
        sheet.save(path)
    return lines


# =============================================================================================== command line
# `python data.py SOURCE` shows what a stream holds before anything is trained on it.


def mini_vqa_sheet(path, rows=3, columns=4, seed=0):
    """A sheet of labelled scenes as PNG: a picture, its regions, and two questions with their answers."""
    from PIL import Image, ImageDraw
    rng = random.Random(seed)
    sheet = Image.new("RGB", (columns * 250, rows * 250), "white")
    draw = ImageDraw.Draw(sheet)
    for i in range(rows * columns):
        kinds = [QUESTION_TYPES[i * 2 % 10], QUESTION_TYPES[(i * 2 + 1) % 10]]
        alone = bool({"commonsense", "subcategory"} & set(kinds))
        scene = random_scene(rng, rng.choice(COCO_NAMES), "count" in kinds, alone)
        image, boxes = draw_scene(scene)
        x, y = i % columns * 250 + 8, i // columns * 250 + 8
        sheet.paste(image.resize((144, 144), 0), (x, y))
        for j, crop in enumerate(region_pixels(image, boxes)):
            sheet.paste(Image.fromarray(crop).resize((32, 32), 0), (x + 150 + j % 2 * 36, y + j // 2 * 36))
        for j, kind in enumerate(kinds):
            question, answer = ask(rng, scene, kind)
            draw.text((x, y + 150 + j * 34), f"{kind}: {question}?", fill=(90, 90, 90))
            draw.text((x + 10, y + 164 + j * 34), answer, fill=(0, 60, 160))
    # A palette makes the file three times smaller; this way of choosing it keeps the rare colours of objects.
    palette = sheet.quantize(256, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE)
    palette.save(path, optimize=True)


def main():
    """python data.py mini-vqa|vqav2|nextqa|FILE.jsonl|mini-affect|mini-coin: print a partition, or draw a
    sheet of samples."""
    parser = argparse.ArgumentParser(description="Print how a source is divided into tasks, or draw samples.")
    parser.add_argument("source", help="mini-vqa, vqav2, nextqa, a .jsonl file, mini-affect or mini-coin")
    parser.add_argument("sheet", nargs="?", help="mini-vqa, mini-coin: draw samples into this PNG instead")
    parser.add_argument("--root", default=".", help="folder with the files")
    parser.add_argument("--setting", nargs="+", default=["DI", "CI", "QI"], choices=["DI", "CI", "QI"])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.source == "mini-affect":
        return print(describe_affect())
    if args.source == "mini-coin":
        print("\n".join(describe_mini_coin(args.sheet, seed=args.seed)))
        return print(f"wrote {args.sheet}") if args.sheet else None
    if args.source == "mini-vqa" and args.sheet:
        mini_vqa_sheet(args.sheet, seed=args.seed)
        return print(f"wrote {args.sheet}")
    for setting in args.setting:
        stream = vqa_stream(setting, args.source.replace("mini-vqa", "mini"), args.root, args.seed)
        print(f"{setting}\n{describe(stream)}\n")


if __name__ == "__main__":
    try:
        main()
        sys.stdout.flush()
    except InputError as e:
        sys.exit(print(f"error: {e}", file=sys.stderr) or 2)
    except BrokenPipeError:                              # the reader of the pipe has seen enough, as head has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
