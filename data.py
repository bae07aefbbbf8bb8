"""Streams of tasks: the built-in worlds (mini-VQA, mini-CoIN, mini-affect) and the readers of real data.

A Stream is a list of Tasks that arrive one after the other; a Task holds train, val and test samples and, in double
increment, its subtasks.  Nothing here needs torch, a GPU or the network.
"""
import argparse
import csv
import functools
import hashlib
import json
import random
import re
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np


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


# ------------------------------------------------------------------------------- visual question answering: shared parts


@dataclass(slots=True)
class Sample:
    """One question about one picture.  answers: one, or the ten annotators'.  image: a path below the root, or an index
    into stream.extra["regions"].  question_type and category decide the task."""
    id: Any
    image: Any
    question: str
    answers: tuple
    question_type: str
    category: str


# COCO's 80 categories by id (1..90 with gaps) and MM-Prompt's Table 4: eight groups of ten, CI and DI.
COCO_IDS = [i for i in range(1, 91) if i not in (12, 26, 29, 30, 45, 66, 68, 69, 71, 83)]
COCO_NAMES = (
    "person,bicycle,car,motorcycle,airplane,bus,train,truck,boat,traffic light,fire hydrant,stop sign,parking meter,bench,"
    "bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,backpack,umbrella,handbag,tie,suitcase,frisbee,skis,snowboard,"
    "sports ball,kite,baseball bat,baseball glove,skateboard,surfboard,tennis racket,bottle,wine glass,cup,fork,knife,spoon,"
    "bowl,banana,apple,sandwich,orange,broccoli,carrot,hot dog,pizza,donut,cake,chair,couch,potted plant,bed,dining table,"
    "toilet,tv,laptop,mouse,remote,keyboard,cell phone,microwave,oven,toaster,sink,refrigerator,book,clock,vase,scissors,"
    "teddy bear,hair drier,toothbrush").split(",")
COCO_GROUPS = [group.split(",") for group in (
    "truck,couch,bowl,chair,scissors,sandwich,orange,knife,dining table,potted plant",
    "teddy bear,microwave,skateboard,bottle,hot dog,book,apple,refrigerator,tennis racket,oven",
    "laptop,person,car,banana,snowboard,bed,umbrella,surfboard,motorcycle,sink",
    "tv,dog,baseball bat,cup,parking meter,sheep,spoon,cake,broccoli,toilet",
    "kite,fork,bus,train,cell phone,pizza,keyboard,sports ball,cow,giraffe",
    "baseball glove,bear,wine glass,traffic light,horse,mouse,stop sign,zebra,handbag,skis",
    "fire hydrant,toaster,cat,bench,remote,clock,hair drier,bird,suitcase,toothbrush",
    "carrot,backpack,tie,elephant,frisbee,bicycle,donut,boat,airplane,vase")]
# Table 7: one QI task each, in this order.  Table 6: consecutive pairs are the five subtasks inside a DI task.
QUESTION_TYPES = "recognition location judge commonsense count action color type subcategory causal".split()

# VQACL's ten question types by the `question_type` field (a question's opening words) of the VQA annotations.
# "how" alone is in no list: such questions are dropped and counted.
_PREFIXES = {
    "recognition": "what|what the|what is the|what is|what are the|what are|which|what is on the|what is in the|what is this|"
                   "what does the|who is|what is the name",
    "location": "where is the|where are the|what room is",
    "judge": "is the|is this|is this a|is this an|are the|is there a|is there|it is|is it|is|are there|are there any|are these|"
             "are|was|is that a",
    "commonsense": "does the|does this|do|do you|has|can you|could",
    "count": "how many|how many people are|how many people are in|what number is",
    "action": "what is the man|what is the woman|what is the person|is the man|is the woman|is the person|is he|are they|"
              "is this person",
    "color": "what color|what color is|what color is the|what color are the|what is the color of the",
    "type": "what kind of|what type of",
    "subcategory": "none of the above|what time|what sport is|what animal is|what brand",
    "causal": "why|why is the",
}
_TYPE_OF_PREFIX = {p: name for name, prefixes in _PREFIXES.items() for p in prefixes.split("|")}
_ABOUT_PEOPLE = re.compile(r"^(is this|are|are the|are these)\s+((both|all|the|these)\s+)*(woman|women|man|men)\b")


def vqa_question_type(prefix, question):
    """One of QUESTION_TYPES from the annotation's `question_type` and the question, or None when no rule names it.

    VQACL's partition, recovered from its published test files: questions that open with is/are and ask about a man or
    woman count as action whatever their prefix says.
    """
    if _ABOUT_PEOPLE.match(question.lower()):
        return "action"
    return _TYPE_OF_PREFIX.get(prefix.strip().lower())


def partition(setting, parts, categories, types, pairs=None, outer="category", subtask_seed=None):
    """A Stream from {"train","val","test": samples} in one of MM-Prompt's settings (section 4.1, appendix A).

    CI: one task per group of `categories` [(name, {category, ...})].  QI: one per entry of `types` [name].
    DI: outer tasks are the groups (outer="category") or the types (outer="type", NExT-QA), with inner subtasks made of
    the other: `pairs` of types, or the groups in `pairs` [(name, {category, ...})].  subtask_seed shuffles the inner order per
    outer task, as the official code does; None keeps it.  Samples no task takes are counted in .notes; empty tasks raise InputError.
    """
    if setting not in ("DI", "CI", "QI"):
        raise InputError(f"--setting is DI, CI or QI, not {setting!r}")
    by_category = [(name, lambda s, group=frozenset(group): s.category in group) for name, group in categories]
    by_type = [(name, lambda s, name=name: s.question_type == name) for name in types]
    if setting == "CI":
        outer_rules, inner_rules = by_category, []
    elif setting == "QI":
        outer_rules, inner_rules = by_type, []
    elif outer == "category":
        outer_rules = by_category
        inner_rules = [("+".join(pair), lambda s, pair=frozenset(pair): s.question_type in pair) for pair in pairs]
    else:
        outer_rules = by_type
        inner_rules = [(name, lambda s, group=frozenset(group): s.category in group) for name, group in pairs]
    splits = ("train", "val", "test")
    tasks = []
    for t, (name, rule) in enumerate(outer_rules):
        own = {k: [s for s in parts[k] if rule(s)] for k in splits}
        empty = [k for k in splits if not own[k]]
        if empty:
            raise InputError(f"task {name!r} of setting {setting} has no {' and no '.join(empty)} question; "
                             "leave it out, give more data, or name the splits yourself")
        subtasks = [Task(inner, *([s for s in own[k] if r(s)] for k in splits)) for inner, r in inner_rules]
        subtasks = [s for s in subtasks if s.train]
        if subtask_seed is not None:
            random.Random(f"{subtask_seed} {t}").shuffle(subtasks)
        tasks.append(Task(name, own["train"], own["val"], own["test"], subtasks))
    taken = {id(s) for t in tasks for k in splits for s in getattr(t, k)}
    lost = sum(id(s) not in taken for k in splits for s in parts[k])
    return Stream(tasks, [f"{lost} questions belong to no task of setting {setting}: dropped"] if lost else [])


def vqa_stream(setting, source, root=".", seed=0, **more):
    """A Stream of Samples for DI, CI or QI.

    source: "mini" | "vqav2" | "nextqa" | a path to .jsonl.  root: the folder with the files (for .jsonl: with the pictures,
    default its own folder).  more: passed to the reader.  Raises InputError for anything missing, broken or empty.
    """
    if source == "mini":
        return mini_vqa(setting, seed, **more)
    if source == "vqav2":
        return _vqav2(setting, Path(root), seed, **more)
    if source == "nextqa":
        return _nextqa(setting, Path(root), seed, **more)
    if str(source).endswith(".jsonl"):
        return _jsonl(setting, Path(source), None if root in (None, ".") else Path(root), seed, **more)
    raise InputError(f"--data is mini, vqav2, nextqa or a .jsonl file, not {source!r}")


def describe(stream):
    """The partition as text: tasks, questions per split, subtasks, notes."""
    lines = [f"{'task':<34}{'train':>9}{'val':>8}{'test':>8}"]
    for t in stream.tasks:
        lines.append(f"{t.name[:33]:<34}{len(t.train):>9}{len(t.val):>8}{len(t.test):>8}")
        lines += [f"  - {s.name[:30]:<30}{len(s.train):>9}{len(s.val):>8}{len(s.test):>8}" for s in t.subtasks]
    total = [sum(len(getattr(t, k)) for t in stream.tasks) for k in ("train", "val", "test")]
    return "\n".join(lines + [f"{'all':<34}{total[0]:>9}{total[1]:>8}{total[2]:>8}"] + stream.notes)


def inside(root, path):
    """root/path, refusing a path in the data that leaves the root.  Raises InputError."""
    full = Path(root) / path
    if not full.resolve().is_relative_to(Path(root).resolve()):
        raise InputError(f"the data names {path!r}, which leaves {root}; use paths below --root")
    return full


def open_picture(path):
    """The picture as RGB, decoded whole.  Raises InputError for a missing, truncated or unreadable file."""
    from PIL import Image
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except FileNotFoundError:
        raise InputError(f"picture {path} is missing; put it there or remove its questions")
    except Exception as e:                                           # Pillow raises many kinds for a damaged file
        raise InputError(f"picture {path} cannot be read ({e}); replace the file or remove its questions")


def _share(key, seed):
    """A number in [0,1) that depends on key and seed alone: splits stay the same when files grow."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {key}".encode(), digest_size=7).digest(), "big") / 2 ** 56


def _read_json(path, hook=None):
    try:
        with open(path, encoding="utf-8") as f:
            return json.load(f, object_hook=hook)
    except FileNotFoundError:
        raise InputError(f"{path} is missing")
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        where = f"line {e.lineno} column {e.colno}: {e.msg}" if isinstance(e, json.JSONDecodeError) else str(e)
        raise InputError(f"{path} is not valid JSON ({where}); download it again")


# ------------------------------------------------------------------------------------------- mini-VQA: the built-in world
MINI_VQA_VERSION = 1
COLORS = {"red": (214, 44, 38), "orange": (244, 138, 26), "yellow": (246, 222, 52), "green": (52, 160, 62),
          "blue": (40, 88, 214), "purple": (142, 62, 178), "white": (248, 248, 248), "black": (24, 24, 28)}
PATTERNS = ["plain", "striped", "dotted", "checked"]
POSES = ["standing", "leaning", "falling", "sleeping"]               # turned by 0, 90, 180, 270 degrees
SIZES = ["small", "large"]                                           # 20 and 30 of 96 pixels
PLACES = {"kitchen": ((232, 220, 196), (176, 148, 118)), "street": ((170, 196, 222), (104, 104, 110)),
          "beach": ((150, 210, 240), (236, 214, 150)), "forest": ((112, 158, 112), (70, 92, 52)),
          "bedroom": ((222, 196, 214), (150, 110, 140)), "field": ((190, 224, 250), (128, 196, 96))}
CELLS = {"left": (0, 1), "right": (2, 1), "top": (1, 0), "bottom": (1, 2), "middle": (1, 1)}   # of a 3 x 3 grid
NUMBERS = ["one", "two", "three", "four"]
REASONS = dict(zip(PLACES, ["hungry", "lost", "hot", "hiding", "tired", "playing"]))           # why is it here: by place
KINDS = {"person": 1, "vehicle": 9, "outdoor": 14, "animal": 24, "accessory": 29, "sport": 39, "tableware": 46, "food": 56,
         "furniture": 62, "electronic": 68, "appliance": 73, "household": 80}                  # last index in COCO order + 1
ABILITIES = {"can you eat it": {"food"}, "can you ride it": {"vehicle"}, "is it alive": {"person", "animal"},
             "does it need power": {"electronic", "appliance"}, "can you wear it": {"accessory"},
             "can you play with it": {"sport"}}
# How often each type is asked: VQACL's training counts, flattened so that a rare type still makes a task in QI.
TYPE_SHARES = dict(zip(QUESTION_TYPES, [.20, .08, .14, .08, .10, .08, .10, .08, .09, .05]))
REGIONS, REGION_PIXELS = 6, 16                                       # up to four copies, one other object, the whole picture


def kind_of(name):
    """COCO's super-category of a class."""
    return next(k for k, end in KINDS.items() if COCO_NAMES.index(name) < end)


def _sprites():
    """(80,4,8,8) bool: a mirror-symmetric glyph per class and its four turns, any two at least 14 of 64 cells apart."""
    rng, found = np.random.default_rng(7), []
    while len(found) < len(COCO_NAMES):
        half = rng.random((8, 4)) < 0.55
        glyph = np.concatenate([half, half[:, ::-1]], 1)
        turns = np.stack([np.rot90(glyph, k) for k in range(4)])
        others = np.concatenate([turns[1:]] + found)
        if (others != glyph).sum((1, 2)).min() >= 14:
            found.append(turns)
    return np.stack(found)


@functools.lru_cache(maxsize=None)
def _glyph(name, pose):
    if "all" not in _GLYPHS:
        _GLYPHS["all"] = _sprites()
    return _GLYPHS["all"][COCO_NAMES.index(name), POSES.index(pose)]


_GLYPHS = {}


def draw_scene(scene):
    """The picture (96,96) RGB of a scene, and its boxes (n,4) in [0,1] as x1 y1 x2 y2: objects, then the whole picture."""
    from PIL import Image
    top, ground = PLACES[scene["place"]]
    rng = np.random.default_rng(scene["noise"])
    canvas = np.empty((96, 96, 3), np.int16)
    canvas[:48], canvas[48:] = top, ground
    canvas += rng.integers(-12, 13, canvas.shape, np.int16)
    canvas = canvas.clip(0, 255).astype(np.uint8)
    boxes = []
    for thing in scene["things"]:
        cells = _glyph(thing["name"], thing["pose"])
        y, x = np.mgrid[:8, :8]
        dark = {"plain": y < 0, "striped": y % 2 == 1, "dotted": (y % 3 == 1) & (x % 3 == 1), "checked": (x + y) % 2 == 1}
        color = np.array(COLORS[thing["color"]])
        shade = (color * 0.4 + (80 if thing["color"] == "black" else 0)).astype(int)
        tile = np.where(dark[thing["pattern"]][..., None], shade, color)
        side = 20 if thing["size"] == "small" else 30
        grow = np.arange(side) * 8 // side                           # nearest-neighbour enlargement
        x0, y0 = thing["corner"]
        spot = canvas[y0:y0 + side, x0:x0 + side]
        spot[cells[grow][:, grow]] = tile[grow][:, grow][cells[grow][:, grow]]
        boxes.append((x0 / 96, y0 / 96, (x0 + side) / 96, (y0 + side) / 96))
    return Image.fromarray(canvas), np.array(boxes + [(0, 0, 1, 1)], np.float32)


def random_scene(rng, name, crowd=True, alone=False):
    """A scene about class `name`.  crowd: one to four copies, else one.  alone: no other object beside it.
    rng: random.Random.  The main copies come first in "things"."""
    def thing(name, cell, size):
        side, (cx, cy) = 20 if size == "small" else 30, cell
        slack = 32 - side
        return {"name": name, "cell": next((k for k, c in CELLS.items() if c == cell), "corner"), "corner": (cx * 32 + rng.randint(0, slack), cy * 32 + rng.randint(0, slack)), "size": size}

    count = rng.randint(1, 4) if crowd else 1
    position = rng.choice(list(CELLS))
    free = [(x, y) for x in range(3) for y in range(3) if (x, y) != CELLS[position]]
    rng.shuffle(free)
    look = {"color": rng.choice(list(COLORS)), "pattern": rng.choice(PATTERNS), "pose": rng.choice(POSES)}
    size = rng.choice(SIZES)
    things = [thing(name, cell, size) | look for cell in [CELLS[position]] + free[:count - 1]]
    if not alone and rng.random() < 0.2:
        other = rng.choice([n for n in COCO_NAMES if n != name])
        things.append(thing(other, free[count - 1], rng.choice(SIZES))
                      | {"color": rng.choice([c for c in COLORS if c != look["color"]]),
                         "pattern": rng.choice(PATTERNS), "pose": rng.choice(POSES)})
    return {"name": name, "count": count, "position": position, "place": rng.choice(list(PLACES)), **look, "size": size,
            "things": things, "other": things[count] if len(things) > count else None, "noise": rng.getrandbits(32)}


def ask(rng, scene, kind):
    """(question, answer) of one of the ten types about a scene.  Several wordings each; "it" only where nothing else is."""
    name, pick = scene["name"], rng.choice
    if kind == "recognition":
        return (pick(["what is the {} thing", "what is the {} object"]).format(scene["color"]) if scene["other"] else
                pick(["what is this", "what is in the picture", "what object is shown"])), name
    if kind == "location":
        if scene["count"] == 1 and rng.random() < 0.6:
            return pick(["where is the {}", "where is the {} in the picture"]).format(name), scene["position"]
        return pick(["what place is this", "where is this"]), scene["place"]
    if kind == "judge":
        yes = rng.random() < 0.5
        if rng.random() < 0.5:
            shown = {t["name"] for t in scene["things"]}
            about = name if yes else pick([n for n in COCO_NAMES if n not in shown])
            return pick(["is there a {}", "is a {} in the picture"]).format(about), "yes" if yes else "no"
        color = scene["color"] if yes else pick([c for c in COLORS if c != scene["color"]])
        return f"is the {name} {color}", "yes" if yes else "no"
    if kind == "commonsense":
        true = [q for q, kinds in ABILITIES.items() if kind_of(name) in kinds]
        yes = bool(true) and rng.random() < 0.6
        return pick(true) if yes else pick([q for q in ABILITIES if q not in true]), "yes" if yes else "no"
    if kind == "count":
        return pick(["how many {} are there", "what number of {} is there"]).format(name), NUMBERS[scene["count"] - 1]
    if kind == "action":
        return pick(["what is the {} doing", "what does the {} do"]).format(name), scene["pose"]
    if kind == "color":
        return pick(["what color is the {}", "what is the color of the {}"]).format(name), scene["color"]
    if kind == "type":
        return pick(["what kind of {} is this", "what type of {} is it"]).format(name), scene["pattern"]
    if kind == "subcategory":
        return pick(["what family is this", "what family is it from"]), kind_of(name)
    return pick(["why is the {} here", "why is the {} in this place"]).format(name), REASONS[scene["place"]]


def upstream_statement(rng, scene):
    """(input, target) for pre-training: statements with a gap and words to repeat, never a question of the stream.
    The reasons of `causal` are facts that only the stream teaches; their words do occur, so that they can be said."""
    name, pick = scene["name"], rng.choice
    row = rng.randrange(16)
    if row < 3:
        return (f"the {scene['color']} one is a <mask>" if scene["other"] or rng.random() < .5 else "here we see a <mask>"), name
    if row == 3:
        return ((f"the {name} stands at the <mask>", scene["position"]) if scene["count"] == 1 and rng.random() < .6
                else ("the background is a <mask>", scene["place"]))
    if row == 4:
        return f"the number of {name} is <mask>", NUMBERS[scene["count"] - 1]
    if row == 5:
        return f"the {name} is busy <mask>", scene["pose"]
    if row == 6:
        return f"the {name} has the color <mask>", scene["color"]
    if row == 7:
        return f"the {name} has the pattern <mask>", scene["pattern"]
    if row == 8:
        return f"the {name} has the size <mask>", scene["size"]
    if row in (9, 10, 11, 12):
        yes = rng.random() < 0.5
        if row < 11:
            shown = {t["name"] for t in scene["things"]}
            text = f"true or false : here we see a {name if yes else pick([n for n in COCO_NAMES if n not in shown])}"
        else:
            color = scene["color"] if yes else pick([c for c in COLORS if c != scene["color"]])
            text = f"true or false : the {name} has the color {color}"
        return text, "yes" if yes else "no"
    if row == 13:
        return f"the {scene['color']} one is a sort of <mask>" if rng.random() < .7 else f"a {name} is a sort of <mask>", kind_of(name)
    if row == 14:                                                    # what a language model knows of the world, as words
        question = pick([q for q, kinds in ABILITIES.items() if kind_of(name) in kinds] * (rng.random() < .5) or list(ABILITIES))
        yes = kind_of(name) in ABILITIES[question]
        fact = " ".join(w for w in question.split() if w not in ("can", "is", "does", "it", "with"))
        about = f"the {scene['color']} one" if scene["other"] is None and rng.random() < .6 else f"a {name}"
        return f"true or false : {about} is to {fact}", "yes" if yes else "no"
    if row == 15 and rng.random() < .4:
        return f"the number of {name} is <mask>", NUMBERS[scene["count"] - 1]
    words = [pick(MINI_WORDS) for _ in range(rng.randint(1, 2))]
    return "repeat " + " ".join(words), " ".join(words)


_TEMPLATES = """what is the thing object this in picture shown where place there a number of doing does do color kind type it family from
why here how many are can you eat ride alive need power wear play with one we see stands at background busy has pattern size
true or false : sort repeat yes no to"""
MINI_WORDS = sorted({w for text in (_TEMPLATES, *COCO_NAMES, *COLORS, *PATTERNS, *POSES, *SIZES, *PLACES, *CELLS, *NUMBERS,
                                    *REASONS.values(), *KINDS) for w in text.split()})


def region_pixels(image, boxes, jitter=None):
    """The picture inside each box as (n,16,16,3) uint8.  boxes (n,4) in [0,1]; jitter: random.Random to shift them a little."""
    W, H = image.size
    out = np.empty((len(boxes), REGION_PIXELS, REGION_PIXELS, 3), np.uint8)
    for i, (x1, y1, x2, y2) in enumerate(boxes):
        dx, dy = (jitter.uniform(-.006, .006), jitter.uniform(-.006, .006)) if jitter and x2 - x1 < 1 else (0, 0)
        box = ((x1 + dx) * W, (y1 + dy) * H, (x2 + dx) * W, (y2 + dy) * H)
        out[i] = np.asarray(image.resize((REGION_PIXELS, REGION_PIXELS), 2, [min(max(v, 0), m) for v, m in zip(box, (W, H, W, H))]))
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
        pixels[i, :n], boxes[i, :n], valid[i, :n] = region_pixels(image, where, random.Random(scene["noise"])), where, True
    return pixels, boxes, valid


@functools.lru_cache(maxsize=1)
def _mini_world(seed, sizes):
    """All questions of one seed and the regions of their scenes; the same for the three settings.  Two questions a scene."""
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
    return parts, scenes, draw_scenes(scenes)


def mini_vqa(setting, seed=0, sizes=(8000, 800, 1600), subtask_seed=None):
    """The built-in world as a Stream: .extra["regions"] = pixels (S,6,16,16,3), boxes (S,6,4), valid (S,6); sample.image = row.

    CI 8 tasks, QI 10 tasks, DI 8 tasks of 5 subtasks.  Two seconds a thousand questions.
    """
    parts, scenes, regions = _mini_world(seed, tuple(sizes))
    stream = partition(setting, parts, [(f"G{i + 1} {g[0]}..", g) for i, g in enumerate(COCO_GROUPS)], QUESTION_TYPES,
                       pairs=list(zip(QUESTION_TYPES[::2], QUESTION_TYPES[1::2])),
                       subtask_seed=seed if subtask_seed is None else subtask_seed)
    stream.extra.update(regions=regions, version=f"mini-VQA {MINI_VQA_VERSION}")
    return stream


# ------------------------------------------------------------------------------------------------ VQA v2, official files


def _vqav2(setting, root, seed, outer="category"):
    """VQA v2 from the official JSON files below `root` (README: file tree).  sample.image = "val2014/COCO_val2014_...jpg".

    Category of a picture: VQACL's ImgId_cate_map.json when present, else from instances_*.json the category with the largest
    total area.  Splits: Karpathy's dataset_coco.json when present; else train2014 trains and val2014 is halved by picture into
    val and test; with one year-split alone its pictures go 80/10/10.
    """
    found = [y for y in ("train2014", "val2014") if (root / f"v2_mscoco_{y}_annotations.json").exists()]
    if not found:
        raise InputError(f"{root} holds no v2_mscoco_train2014_annotations.json; get the VQA v2 annotation and question files "
                         "from visualqa.org and name their folder with --root")
    category = _coco_categories(root, found)
    karpathy = {}
    if (root / "dataset_coco.json").exists():
        for image in _read_json(root / "dataset_coco.json")["images"]:
            karpathy[image["cocoid"]] = "train" if image["split"] == "restval" else image["split"]
    compact = lambda d: sys.intern(d["answer"]) if "answer_id" in d else d    # ten dicts -> ten shared strings, while parsing
    parts, dropped = {"train": [], "val": [], "test": []}, Counter()
    for year in found:
        path = root / f"v2_OpenEnded_mscoco_{year}_questions.json"
        try:
            questions = {q["question_id"]: q["question"] for q in _read_json(path)["questions"]}
            path = root / f"v2_mscoco_{year}_annotations.json"
            rows = _read_json(path, compact)["annotations"]
            for row in rows:
                number = row["image_id"]
                kind = vqa_question_type(row["question_type"], questions[row["question_id"]])
                group = category.get((year, number))
                if kind is None:
                    dropped[f"question type: no rule for {row['question_type']!r}"] += 1
                elif group is None:
                    dropped["picture has no category"] += 1
                else:
                    share = _share(number, seed)
                    split = (karpathy.get(number, "train") if karpathy else
                             "train" if (year == "train2014" and len(found) == 2) or (len(found) == 1 and share < .8) else
                             "val" if share < (.5 if len(found) == 2 else .9) else "test")
                    parts[split].append(Sample(row["question_id"], sys.intern(f"{year}/COCO_{year}_{number:012d}.jpg"),
                                               questions[row["question_id"]], tuple(row["answers"]), kind, group))
        except (KeyError, TypeError) as e:
            raise InputError(f"{path}: key {e} is missing; this is not the official VQA v2 file")
    stream = partition(setting, parts, [(f"G{i + 1} {g[0]}..", g) for i, g in enumerate(COCO_GROUPS)], QUESTION_TYPES,
                       list(zip(QUESTION_TYPES[::2], QUESTION_TYPES[1::2])), outer, seed)
    stream.notes += [f"dropped {n:,}: {why}" for why, n in dropped.most_common()]
    stream.extra["root"] = root
    return stream


def _coco_categories(root, years):
    """{(year, image id): category name}."""
    names = dict(zip(COCO_IDS, COCO_NAMES))
    if (root / "ImgId_cate_map.json").exists():
        out = {}
        for key, number in _read_json(root / "ImgId_cate_map.json").items():
            _, year, image = key.split("_")
            out[year, int(image)] = names.get(int(number))
        return out
    out = {}
    for year in years:
        path = next((p for p in (root / f"instances_{year}.json", root / "annotations" / f"instances_{year}.json") if p.exists()),
                    None)
        if path is None:
            raise InputError(f"{root} holds neither ImgId_cate_map.json (VQACL) nor instances_{year}.json (COCO); "
                             "one of them gives each picture its category")
        keep = lambda d: (d["image_id"], d["category_id"], d["area"]) if "area" in d else d   # polygons are not needed
        area = Counter()
        for row in _read_json(path, keep)["annotations"]:
            area[row[:2]] += row[2]
        for (image, number), _ in sorted(area.items(), key=lambda kv: kv[1]):    # the largest comes last and stays
            out[year, image] = names.get(number)
    return out


# ------------------------------------------------------------------------------------------------------ NExT-QA, open-ended
NEXTQA_TYPES = "CW TN TC DL DB DC DO".split()                        # Table 8; CH is in the files but in no setting
NEXTQA_NAMES = (                                                     # bigCate 1..80
    "cat,stingray,cellphone,panda,camera,stool,baby walker,turtle,duck,racket,bottle,cake,aircraft,squirrel,bat,chair,faucet,"
    "toilet,suitcase,hamster/rat,snowboard,ski,bench,stop sign,baby seat,dish,sofa,oven,handbag,bus/truck,refrigerator,"
    "microwave,bird,pig,frisbee,chicken,train,baby,backpack,motorcycle,skateboard,rabbit,sink,cup,fish,electric fan,fruits,"
    "antelope,ball/sports ball,bicycle,scooter,car,traffic light,crab,laptop,cattle/cow,lion,adult,piano,camel,watercraft,"
    "screen/monitor,elephant,toy,guitar,sheep/goat,horse,child,crocodile,bread,dog,bear,surfboard,kangaroo,tiger,leopard,table,"
    "penguin,snake,vegetables").split(",")
NEXTQA_GROUPS = [group.split(",") for group in (                     # Table 5: CI
    "bicycle,camel,bat,microwave,snake,sofa,traffic light,hamster/rat,chicken,oven,stop sign",
    "crab,camera,lion,ball/sports ball,crocodile,screen/monitor,baby walker,cat,squirrel,frisbee,cattle/cow",
    "piano,watercraft,kangaroo,train,fruits,pig,suitcase,bear,tiger,bench,elephant",
    "ski,stingray,antelope,toy,child,duck,guitar,dish,fish,cake,turtle,leopard",
    "penguin,faucet,car,bottle,bus/truck,aircraft,baby,bread,baby seat,cellphone,sink,rabbit",
    "vegetables,skateboard,bird,toilet,racket,sheep/goat,adult,scooter,electric fan,stool,motorcycle",
    "horse,snowboard,surfboard,handbag,laptop,panda,table,cup,backpack,chair,dog,refrigerator")]
NEXTQA_SUBGROUPS = [                                                 # DI: five groups of 16 bigCate ids (VQACL)
    [50, 60, 15, 32, 79, 27, 53, 20, 36, 28, 24, 80, 41, 33, 18, 10], [54, 5, 57, 49, 69, 62, 7, 1, 14, 35, 56, 66, 58, 51, 46, 6],
    [59, 61, 74, 37, 47, 34, 19, 72, 75, 23, 63, 40, 67, 21, 73, 29], [22, 2, 48, 64, 68, 9, 65, 26, 45, 12, 8, 76, 55, 4, 77, 44],
    [78, 17, 52, 11, 30, 13, 38, 70, 25, 3, 43, 42, 39, 16, 71, 31]]


def _nextqa(setting, root, seed):
    """NExT-QA's open-ended questions from {train,val,test}_{CW,TN,...}.csv below `root`.  sample.image = the video's id.

    Files of one split alone are divided 70/10/20 by video.  DI: question types outside, five object groups inside.
    """
    parts, files = {"train": [], "val": [], "test": []}, 0
    for split in parts:
        for kind in NEXTQA_TYPES:
            path = next((p for p in (root / f"{split}_{kind}.csv", root / "Partition_Q_nextqa" / f"{split}_{kind}.csv")
                         if p.exists()), None)
            if path is None:
                continue
            files += 1
            with open(path, encoding="utf-8", newline="") as f:
                for line, row in enumerate(csv.DictReader(f), 2):
                    try:
                        parts[split].append(Sample(f"{row['video']}_{row['qid']}", row["video"], row["question"], (row["answer"],),
                                                   row["type"], NEXTQA_NAMES[int(row["bigCate"]) - 1]))
                    except (KeyError, TypeError, ValueError, IndexError) as e:
                        raise InputError(f"{path} line {line}: {e}; columns video, question, answer, qid, type, bigCate (1..80) "
                                         "are needed")
    if not files:
        raise InputError(f"{root} holds no val_CW.csv or the like; NExT-QA's open-ended CSV files, one per question type, go there")
    filled = [k for k in parts if parts[k]]
    if len(filled) < 3:
        everything = [s for k in filled for s in parts[k]]
        cut = lambda lo, hi: [s for s in everything if lo <= _share(s.image, seed) < hi]
        parts = {"train": cut(0, .7), "val": cut(.7, .8), "test": cut(.8, 1)}
    stream = partition(setting, parts, [(f"G{i + 1} {g[0]}..", g) for i, g in enumerate(NEXTQA_GROUPS)], NEXTQA_TYPES,
                       [(f"G{i}", [NEXTQA_NAMES[n - 1] for n in ids]) for i, ids in enumerate(NEXTQA_SUBGROUPS)], "type", seed)
    if len(filled) < 3:
        stream.notes.append(f"only {' and '.join(filled)} files: divided 70/10/20 by video")
    stream.extra["root"] = root
    return stream


# --------------------------------------------------------------------------------------------------------- your own data


def _jsonl(setting, path, root, seed):
    """One JSON object a line: image (path below root), question, answer or answers, question_type, category; optional id, split.

    Tasks appear in the order of the file.  Without "split", pictures go 70/10/20, the same way for the same seed.
    """
    root = root or path.parent
    parts, types, categories = {"train": [], "val": [], "test": []}, {}, {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (FileNotFoundError, UnicodeDecodeError) as e:
        raise InputError(f"{path} cannot be read ({type(e).__name__}); --data takes a UTF-8 file of one JSON object a line")
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            answers = row["answers"] if "answers" in row else [row["answer"]]
            sample = Sample(row.get("id", number), row["image"], row["question"], tuple(map(str, answers)),
                            str(row["question_type"]), str(row["category"]))
        except json.JSONDecodeError as e:
            raise InputError(f"{path} line {number}: not JSON ({e.msg}); one object a line")
        except (KeyError, TypeError, AttributeError) as e:
            raise InputError(f"{path} line {number}: {e} is missing; each line needs image, question, answer or answers, "
                             "question_type and category")
        if not answers or not isinstance(sample.question, str) or not sample.question.strip():
            raise InputError(f"{path} line {number}: an empty question or no answer")
        inside(root, sample.image)
        share = _share(sample.image, seed)
        split = row.get("split") or ("train" if share < .7 else "val" if share < .8 else "test")
        if split not in parts:
            raise InputError(f"{path} line {number}: split is train, val or test, not {split!r}")
        parts[split].append(sample)
        types[sample.question_type] = categories[sample.category] = None
    if not types:
        raise InputError(f"{path} holds no question")
    stream = partition(setting, parts, [(name, {name}) for name in categories], list(types), [(name,) for name in types],
                       subtask_seed=seed)
    stream.extra["root"] = root
    return stream


# ----------------------------------------------------------------------------------------------------------- command line


def mini_vqa_sheet(path, rows=4, columns=5, seed=0):
    """A sheet of labelled scenes as PNG: a picture, its regions, and two questions with their answers."""
    from PIL import Image, ImageDraw
    rng = random.Random(seed)
    sheet = Image.new("RGB", (columns * 250, rows * 250), "white")
    draw = ImageDraw.Draw(sheet)
    for i in range(rows * columns):
        kinds = [QUESTION_TYPES[i * 2 % 10], QUESTION_TYPES[(i * 2 + 1) % 10]]
        scene = random_scene(rng, rng.choice(COCO_NAMES), "count" in kinds, bool({"commonsense", "subcategory"} & set(kinds)))
        image, boxes = draw_scene(scene)
        x, y = i % columns * 250 + 8, i // columns * 250 + 8
        sheet.paste(image.resize((144, 144), 0), (x, y))
        for j, crop in enumerate(region_pixels(image, boxes)):
            sheet.paste(Image.fromarray(crop).resize((32, 32), 0), (x + 150 + j % 2 * 36, y + j // 2 * 36))
        for j, kind in enumerate(kinds):
            question, answer = ask(rng, scene, kind)
            draw.text((x, y + 150 + j * 34), f"{kind}: {question}?", fill=(90, 90, 90))
            draw.text((x + 10, y + 164 + j * 34), answer, fill=(0, 60, 160))
    sheet.save(path)


def main():
    """python data.py vqav2|nextqa|mini-vqa|FILE.jsonl: print a partition, or draw a sheet of samples."""
    parser = argparse.ArgumentParser(description="Print how a source is divided into tasks, or draw a sheet of samples.")
    parser.add_argument("source", help="mini-vqa, vqav2, nextqa or a .jsonl file")
    parser.add_argument("sheet", nargs="?", help="mini-vqa: draw labelled samples into this PNG instead")
    parser.add_argument("--root", default=".", help="folder with the files")
    parser.add_argument("--setting", nargs="+", default=["DI", "CI", "QI"], choices=["DI", "CI", "QI"])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    if args.source == "mini-vqa" and args.sheet:
        mini_vqa_sheet(args.sheet, seed=args.seed)
        return print(f"wrote {args.sheet}")
    for setting in args.setting:
        try:
            stream = vqa_stream(setting, args.source.replace("mini-vqa", "mini"), args.root, args.seed)
            print(f"{setting}\n{describe(stream)}\n")
        except InputError as e:
            print(f"{setting}: {e}", file=sys.stderr)
            if setting == args.setting[-1]:
                sys.exit(2)


if __name__ == "__main__":
    main()
