"""Streams of tasks: the built-in worlds (mini-VQA, mini-CoIN, mini-affect) and the readers of real data.

A Stream is a list of Tasks that arrive one after the other; a Task holds train, val and test samples and, in double
increment, its subtasks.  Nothing here needs torch, a GPU or the network.
"""
import functools
import json
import math
import random
import re
from dataclasses import dataclass, field
from pathlib import Path
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


# ------------------------------------------------------------------------------- mini-CoIN and the CoIN layout
# One instruction sample is a dict:
#   image    a PIL picture, a path, or None (a question without a picture)
#   text     the question, then the instruction of Table 7, as the model and the guidance read it
#   answer   the answer to learn and to compare with; a box is "[x1, y1, x2, y2]", shares of the padded square
#   kind     which rule of metrics.score_instruction applies; id, and where a source has them: answers, size
COIN = ("ScienceQA", "TextVQA", "ImageNet", "GQA", "VizWiz", "REC", "VQAv2", "OCRVQA")               # the paper's order
LETTER = "Answer with the option's letter from the given choices directly."                          # Table 7
WORD = "Answer the question using a single word or phrase."
OBJECT = "What is the object in the image?"
BOX = "Please provide the bounding box coordinate of the region this sentence describes: {}."
MINI_COIN = 1                                                        # the version of the world below; frozen

_SHAPES = ("circle", "square", "triangle", "star", "heart", "cross", "moon", "ring", "arrow", "house", "tree", "key")
_COLOURS = {"red": (214, 40, 40), "green": (40, 160, 60), "blue": (40, 80, 220), "yellow": (240, 210, 40),
            "purple": (150, 50, 190), "black": (25, 25, 25)}
_SIGNS = ("stop", "exit", "sale", "open", "taxi", "cafe", "bank", "farm")
_TITLES = ("wind", "rain", "gold", "fire", "lake", "echo")
_AUTHORS = ("west", "king", "hart", "ford", "nash", "wolf")
_GENRES = {"romance": "heart", "travel": "arrow", "nature": "tree", "space": "moon", "crime": "key"}
_SIDES = {"left": (-1, 0), "right": (1, 0), "above": (0, -1), "below": (0, 1)}
_SIDE, _CELL = 48, 16                                                # a picture is 3 x 3 cells of 16 x 16 pixels


def _outline(shape):
    """Polygons of a shape in the unit square, and whether each is filled with the background (a hole)."""
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


def _tint(name, rng, spread=12):
    return tuple(int(min(255, max(0, c + rng.randint(-spread, spread)))) for c in _COLOURS[name])


def _canvas(rng, paper=None):
    from PIL import Image, ImageDraw
    background = paper or tuple(rng.randint(205, 245) for _ in range(3))
    image = Image.new("RGB", (_SIDE, _SIDE), background)
    return image, ImageDraw.Draw(image), background


def _object_picture(rng, kind="photo"):
    """One object.  kind: diagram (ruled white paper) or photo (tinted, speckled)."""
    image, draw, background = _canvas(rng, (255, 255, 255) if kind == "diagram" else None)
    if kind == "diagram":
        for y in range(6, _SIDE, 7):
            draw.line((0, y, _SIDE, y), fill=(200, 210, 235))
    else:
        for _ in range(40):
            spot = rng.randrange(_SIDE), rng.randrange(_SIDE)
            draw.point(spot, fill=tuple(rng.randint(120, 255) for _ in range(3)))
    shapes, colours = (_OPTIONS["shape"], _OPTIONS["colour"]) if kind == "diagram" else (_SHAPES, list(_COLOURS))
    shape, colour, size = rng.choice(shapes), rng.choice(colours), rng.randint(12, 14)
    column, row = _place(rng)
    x, y = (_CELL * k + rng.randint(0, _CELL - size) for k in (column, row))
    _draw(draw, shape, _tint(colour, rng), (x, y, x + size, y + size), background)
    return image, {"shape": shape, "colour": colour, "cell": (column, row)}


# A 3 x 5 font of our own (five rows a letter, three bits each), so that no Pillow version changes the world.
_FONT = dict(zip("abcdefghijklmnopqrstuvwxyz", (
    "25755 65656 34443 65556 74647 74644 34553 55755 72227 11152 55655 44447 57755 67555 25552 65644 25563 65655 34216 "
    "72222 55557 55552 55775 55255 55222 71247").split()))


def _place(rng):
    return rng.randrange(3), rng.randrange(3)


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
    word, colour, (column, row) = rng.choice(_SIGNS), rng.choice(list(_COLOURS)), _place(rng)
    draw.rectangle((0, _CELL * row, _SIDE, _CELL * (row + 1) - 1), fill=_tint(colour, rng))
    _write(draw, rng, word, column, row, _ink(colour))
    return image, {"word": word, "colour": colour, "cell": (column, row)}


def _cover_picture(rng):
    """A book: title above, the genre's emblem in the middle, author below."""
    image, draw, _ = _canvas(rng)
    colour = rng.choice(list(_COLOURS))
    paper, ink = _tint(colour, rng), _ink(colour)
    draw.rectangle((0, 0, _SIDE, _SIDE), fill=paper)
    facts = {"title": rng.choice(_TITLES), "author": rng.choice(_AUTHORS), "genre": rng.choice(list(_GENRES)),
             "colour": colour, "columns": tuple(rng.randrange(3) for _ in range(3))}
    for row, key in ((0, "title"), (2, "author")):
        _write(draw, rng, facts[key], facts["columns"][row], row, ink)
    x = _CELL * facts["columns"][1] + rng.randint(0, 2)
    _draw(draw, _GENRES[facts["genre"]], ink, (x, 17, x + 13, 30), paper)
    return image, facts


def _scene_picture(rng):
    """Three to six objects in the cells.  facts["objects"]: (shape, colour, column, row)."""
    image, draw, background = _canvas(rng)
    few = rng.sample(_SHAPES[:10], 4)                                # some shapes repeat: questions ask about the others
    objects = []
    for cell in rng.sample(range(9), rng.randint(3, 6)):
        shape, colour, size = rng.choice(few), rng.choice(list(_COLOURS)), rng.randint(13, 14)
        x, y = (_CELL * k + rng.randint(0, _CELL - size) for k in (cell % 3, cell // 3))
        _draw(draw, shape, _tint(colour, rng), (x, y, x + size, y + size), background)
        objects.append((shape, colour, cell % 3, cell // 3))
    return image, {"objects": objects}


def _blur(image, rng):
    """Out of focus and dark, as a picture that cannot be answered about."""
    from PIL import ImageEnhance, ImageFilter
    return ImageEnhance.Brightness(image.filter(ImageFilter.GaussianBlur(rng.uniform(6, 9)))).enhance(rng.uniform(.4, .7))


def box_text(column, row):
    """The region of a cell as CoIN writes boxes, shares of the side: "[0.33, 0.00, 0.67, 0.33]"."""
    return "[" + ", ".join(f"{k / 3:.2f}" for k in (column, row, column + 1, row + 1)) + "]"


def _scene_facts(objects):
    """Every question a scene answers: (skill, argument, answer), shapes and colours in words."""
    shapes = [o[0] for o in objects]
    at = {(o[2], o[3]): o[0] for o in objects}
    facts = {"colour": [], "count": [], "locate": [], **{side: [] for side in _SIDES}}
    for shape, colour, column, row in objects:
        if shapes.count(shape) == 1:
            facts["locate"].append((f"{colour} {shape}", box_text(column, row)))
            facts["colour"].append((shape, colour))
            for side, (dx, dy) in _SIDES.items():
                if (column + dx, row + dy) in at:
                    facts[side].append((shape, at[column + dx, row + dy]))
    facts["count"] = [("", str(len(objects)))]
    return facts


# Multiple choice: the options of a kind are always these five, in this order; facts are asked without a picture.
_OPTIONS = {"shape": ("circle", "heart", "square", "star", "triangle"), "colour": ("blue", "green", "purple", "red", "yellow")}
_FACTS = {"three corners": "triangle", "four corners": "square", "five points": "star", "no corner": "circle",
          "two lobes": "heart", "grass": "green", "the sky": "blue", "blood": "red", "a lemon": "yellow", "a plum": "purple"}


def _options(answer):
    """The kind, the lettered options of that kind, and the letter of the answer."""
    kind = "shape" if answer in _OPTIONS["shape"] else "colour"
    lines = "\n".join(f"{letter}. {x}" for letter, x in zip("ABCDE", _OPTIONS[kind]))
    return kind, lines, "ABCDE"[_OPTIONS[kind].index(answer)]


def mini_coin_sample(task, rng):
    """One sample of one of the eight mini-CoIN tasks: (image or None, question, instruction, answer)."""
    if task == "ScienceQA":
        if rng.random() < 0.25:                                      # ScienceQA has questions without a picture
            fact = rng.choice(list(_FACTS))
            kind, options, letter = _options(_FACTS[fact])
            return None, f"Which {kind} goes with {fact}?\n{options}", LETTER, letter
        image, facts = _object_picture(rng, "diagram")
        kind, options, letter = _options(facts[rng.choice(("shape", "colour"))])
        return image, f"Which {kind} does the diagram show?\n{options}", LETTER, letter
    if task == "TextVQA":
        image, facts = _sign_picture(rng)
        question = rng.choice(("What does the sign say?", "What word is written here?", "What is written on the board?"))
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
        key, question = rng.choice((("title", "What is the title of this book?"),
                                    ("author", "Who is the author of this book?"),
                                    ("genre", "What is the genre of this book?")))
        return image, question, WORD, facts[key]
    while True:                                                      # GQA, REC and VQAv2 share their pictures, as in CoIN
        image, facts = _scene_picture(rng)
        facts = _scene_facts(facts["objects"])
        skill = {"GQA": rng.choice(list(_SIDES)), "REC": "locate", "VQAv2": rng.choice(("colour", "count"))}[task]
        if facts[skill]:
            break
    argument, answer = rng.choice(facts[skill])
    if task == "REC":
        return image, BOX.format(argument), "", answer
    if task == "VQAv2":
        question = f"What is the colour of the {argument}?" if skill == "colour" else "How many things are there?"
        return image, question, WORD, answer
    side = {"left": "to the left of", "right": "to the right of"}.get(skill, skill)
    return image, f"What is {side} the {argument}?", WORD, answer


def _labels(kind, facts):
    """What stands in each of the nine cells, for the eyes of the small backbone: nine rows of 9 numbers.

    Shape, colour, the shapes left, right, above and below, column, row, word written there; 0 where there is none."""
    cells, words = [[0] * 9 for _ in range(9)], (*_SIGNS, *_TITLES, *_AUTHORS)

    def number(x, y, **labels):
        for name, value in labels.items():
            cells[3 * y + x][{"shape": 0, "colour": 1, "word": 8}[name]] = value + 1

    colour = list(_COLOURS).index
    if kind in ("diagram", "photo"):
        number(*facts["cell"], shape=_SHAPES.index(facts["shape"]), colour=colour(facts["colour"]))
    elif kind == "sign":
        number(*facts["cell"], word=words.index(facts["word"]), colour=colour(facts["colour"]))
    elif kind == "cover":
        number(facts["columns"][0], 0, word=words.index(facts["title"]))
        number(facts["columns"][1], 1, shape=_SHAPES.index(_GENRES[facts["genre"]]))
        number(facts["columns"][2], 2, word=words.index(facts["author"]))
    elif kind == "scene":
        at = {(o[2], o[3]): _SHAPES.index(o[0]) + 1 for o in facts["objects"]}
        for shape, name, x, y in facts["objects"]:
            around = (at.get((x + dx, y + dy), 0) for dx, dy in _SIDES.values())
            cells[3 * y + x] = [at[x, y], colour(name) + 1, *around, x + 1, y + 1, 0]
    return cells


def mini_coin_upstream(rng):
    """One picture of the upstream mixture that the small backbone is pre-trained on, with all its questions.

    Returns (image or None, [(skill, text, answer, sentence)], caption, cells).  Disjoint from the stream: other pictures,
    terse skill words instead of the stream's sentences and instructions; sentence is the answer in full, given unless the
    skill says "short".  caption: what the guidance encoder is aligned with.  cells: see _labels.
    """
    kind = rng.choice(("diagram", "photo", "sign", "cover", "scene", "scene", "scene", "scene", "text", "blur"))
    image, say, facts = None, [], {}
    if kind in ("diagram", "photo"):
        image, facts = _object_picture(rng, kind)
        caption = f"a {kind} of a {facts['colour']} {facts['shape']}"
        say = [("name", "", facts["shape"], "it shows a {}"), ("colour", "", facts["colour"], "the colour is {}")]
    elif kind == "sign":
        image, facts = _sign_picture(rng)
        caption = f"a {facts['colour']} sign with {facts['word']}"
        say = [("read", "", facts["word"], "the text says {}"), ("colour", "", facts["colour"], "the colour is {}")]
    elif kind == "cover":
        image, facts = _cover_picture(rng)
        caption = f"a {facts['colour']} cover with {facts['title']} and {facts['author']} and {facts['genre']}"
        say = [(key, "", facts[key], f"the {key} is {{}}") for key in ("title", "author", "genre")]
    elif kind == "scene":
        image, facts = _scene_picture(rng)
        caption = "a scene with " + " and ".join(f"a {o[1]} {o[0]}" for o in facts["objects"])
        forms = {"colour": "the colour is {}", "count": "there are {}", "locate": "it is at {}"}
        say = [(s, *fact, forms.get(s, "it shows a {}")) for s, all_facts in _scene_facts(facts["objects"]).items()
               for fact in rng.sample(all_facts, min(3 if s == "locate" else 2, len(all_facts)))]
    elif kind == "blur":
        image, facts = (_object_picture, _sign_picture)[rng.randrange(2)](rng)
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
    return image, say, caption, _labels(kind, facts)


MINI_WORD = r"<image>|\[[^\]]*\]|[A-E]\.|\w+|[^\w\s]"             # one token of the small backbone; a box is one


@functools.cache
def mini_coin_words():
    """Every word of mini-CoIN and of its upstream mixture, in a fixed order: the vocabulary of the small backbone."""
    rng, seen = random.Random("vocabulary"), {}
    lines = [" ".join((*_SHAPES, *_COLOURS, *_SIGNS, *_TITLES, *_AUTHORS, *_GENRES, *map(str, range(10)))),
             " ".join(box_text(k % 3, k // 3) for k in range(9)), "A. B. C. D. E. A B C D E", " ".join(_FACTS)]
    for _ in range(1500):
        _, said, caption, _ = mini_coin_upstream(rng)
        lines += [caption, "short", *(" ".join(turn) for turn in said)]
    lines += [" ".join(mini_coin_sample(task, rng)[1:]) for task in COIN for _ in range(200)]
    for line in lines:
        seen.update(dict.fromkeys(re.findall(MINI_WORD, line)))
    return tuple(sorted(seen))


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
                name = f"{task}/{split}/{i}"
                samples.append({"id": name, "key": name, "image": image, "answer": answer, "kind": _RULES[task],
                                "text": f"{question}\n{instruction}" if instruction else question})
            splits.append(samples)
        tasks.append(Task(task, *splits))
    return Stream(tasks, [f"mini-CoIN version {MINI_COIN}, seed {seed}"])


def open_picture(sample):
    """The sample's picture as a PIL RGB image, or None; padded to a square with its mean colour where the source says so.

    Raises InputError if the file cannot be decoded: readers leave missing and truncated pictures out beforehand.
    """
    image = sample.get("image")
    if image is None or not isinstance(image, (str, Path)):
        return image
    from PIL import Image
    try:
        with Image.open(image) as f:
            image = f.convert("RGB")
    except (OSError, SyntaxError, ValueError) as e:
        raise InputError(f"{image}: the picture cannot be read ({e}); replace or delete it and run again") from e
    return pad_square(image) if sample.get("pad") else image


def pad_square(image):
    """The picture in the middle of a square of its mean colour: CoIN's boxes are shares of this square."""
    from PIL import Image, ImageStat
    w, h = image.size
    if w == h:
        return image
    square = Image.new("RGB", (max(w, h),) * 2, tuple(int(c) for c in ImageStat.Stat(image).mean))
    square.paste(image, ((max(w, h) - w) // 2, (max(w, h) - h) // 2))
    return square


def picture_problem(path):
    """None if the file looks whole, else "missing", "truncated" or "not a picture".  Reads only the file's two ends."""
    path = Path(path)
    try:
        with open(path, "rb") as f:
            head = f.read(16)
            f.seek(max(0, path.stat().st_size - 1024))
            tail = f.read()
    except OSError:
        return "missing"
    if head[:2] == b"\xff\xd8":
        return None if b"\xff\xd9" in tail else "truncated"
    if head[:8] == b"\x89PNG\r\n\x1a\n":
        return None if b"IEND" in tail else "truncated"
    return None if head[:4] in (b"RIFF", b"GIF8") or head[:2] in (b"BM", b"II", b"MM") else "not a picture"


_COIN_FOLDERS = {"REC": "Grounding"}                                 # CoIN's folder of a task, where the names differ
_COIN_TEST = {"TextVQA": "val.json", "VizWiz": "val.json", "VQAv2": "val.json"}                  # others: test.json
COIN_TREE = ("DIR/Instructions_Original/{ScienceQA,TextVQA,ImageNet,GQA,VizWiz,Grounding,VQAv2,OCRVQA}/{train,test}.json "
             "(val.json instead of test.json for TextVQA, VizWiz, VQAv2), from the dataset Zacks-Chen/CoIN; pictures below "
             "DIR at the paths the JSON files name")


def parse_box(text):
    """Four numbers of "[x1, y1, x2, y2]" as floats, or None."""
    numbers = re.findall(r"-?\d*\.?\d+", str(text))
    return [float(x) for x in numbers[:4]] if len(numbers) >= 4 else None


def _coin_file(path, task, root, count):
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as e:
        raise InputError(f"{path}: not JSON ({e}); download the file again")
    if not isinstance(rows, list):
        raise InputError(f"{path}: a JSON list of samples is needed, this is a {type(rows).__name__}")
    samples = []
    for i, row in enumerate(rows):
        where = f"{path}, sample {i}"
        try:
            if "conversations" in row:                               # training file
                human, gpt = (turn["value"] for turn in row["conversations"][:2])
                text, answer = human.replace("<image>", "").strip(), gpt
            else:                                                    # test file
                text, answer = row["text"].replace("<image>", "").strip(), row.get("answer_bbox", row.get("answer"))
            if not isinstance(text, str) or answer is None:
                raise KeyError("answer")
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            raise InputError(f"{where}: needs conversations (human, gpt) or text and answer; missing or wrong: {e}")
        sample = {"id": row.get("id", row.get("question_id", i)), "text": text, "answer": str(answer).strip(),
                  "kind": _RULES[task], "image": None, "pad": True}
        if row.get("answers"):                                       # ten annotators, where the file has them
            sample["answers"] = [a["answer"] if isinstance(a, dict) else a for a in row["answers"]]
        if task == "REC" and parse_box(answer) is None:
            count["boxes that cannot be parsed, left out"] += 1
            continue
        if row.get("image"):
            sample["image"] = str(root / row["image"])
            problem = picture_problem(sample["image"])
            if problem:
                count[f"pictures {problem}, samples left out"] += 1
                continue
        else:
            count["questions without a picture"] += 1
        samples.append(sample)
    return samples


def _coin(root, seed, limit):
    from collections import Counter
    folder = Path(root) / "Instructions_Original"
    if not folder.is_dir():
        raise InputError(f"{folder} is not there; CoIN is expected as {COIN_TREE}")
    tasks, notes = [], []
    for task in COIN:
        where = folder / _COIN_FOLDERS.get(task, task)
        files = {"train": where / "train.json", "test": where / _COIN_TEST.get(task, "test.json")}
        if not where.is_dir():
            notes.append(f"{task}: no folder {where}, task left out")
            continue
        splits = {}
        for split, path in files.items():
            if not path.exists():
                raise InputError(f"{path} is not there; CoIN is expected as {COIN_TREE}")
            count = Counter()
            samples = _coin_file(path, task, Path(root), count)
            if not samples:
                raise InputError(f"{path}: no usable sample" + "".join(f"; {n} {what}" for what, n in count.items()))
            notes += [f"{task} {split}: {n} {what}" for what, n in sorted(count.items())]
            order = random.Random(f"{seed} {task} {split}").sample(range(len(samples)), len(samples))
            splits[split] = [samples[i] for i in (order[:limit] if limit else order)]
        n = len(splits["train"])                                     # CoIN has no validation part: a share of train
        n_val = max(1, min(500, n // 10)) if n > 1 else 0
        tasks.append(Task(task, splits["train"][n_val:], splits["train"][:n_val], splits["test"]))
    if not tasks:
        raise InputError(f"{folder} holds none of the eight tasks; CoIN is expected as {COIN_TREE}")
    return Stream(tasks, notes)


def instruction_stream(source="mini", root=None, seed=0, sizes=(240, 60, 100), limit=None):
    """The tasks of continual instruction tuning in CoIN's order.

    source "mini": mini-CoIN, sizes = samples per task for train, val, test.  source "coin": the CoIN files below root;
    limit keeps that many samples of each file, seeded; a tenth of train (at most 500) serves as val.
    Raises InputError for a missing or malformed file; what was left out, and why, stands in the stream's notes.
    """
    if source == "mini":
        return _mini_coin(seed, sizes)
    if source == "coin":
        if root is None:
            raise InputError(f"--data coin needs --root DIR; expected: {COIN_TREE}")
        return _coin(root, seed, limit)
    raise InputError(f"--data {source}: unknown; one of mini, coin")


def describe_mini_coin(path, columns=8, seed=0):
    """Writes a contact sheet of mini-CoIN, one row a task, to `path` (PNG) and returns one line of text a task."""
    from PIL import Image
    rng, lines = random.Random(seed), []
    sheet = Image.new("RGB", (columns * 104, len(COIN) * 104), "white")
    for i, task in enumerate(COIN):
        for j in range(columns):
            image, question, instruction, answer = mini_coin_sample(task, rng)
            if image is not None:
                sheet.paste(image.resize((96, 96), 0), (j * 104 + 4, i * 104 + 4))
        lines.append(f"{task}: {' '.join(f'{question} {instruction}'.split())} -> {answer}")
    sheet.save(path)
    return lines
