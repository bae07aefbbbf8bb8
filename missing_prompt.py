"""Prompts for missing modalities that arrive one case after the other.

Paper   Guo, Wang, Lin, Yan, Wu, Jin: Efficient Prompting for Continual Adaptation to Missing Modalities.
        NAACL 2025 (long.219), arXiv 2503.00528v1.
Code    none is public.  The formulas of the paper are followed by number; where it leaves something open, README lists
        what we do and the flag that changes it.

A model that knows audio, video and text together is frozen.  Then seven tasks arrive: each is one case of missing
modalities (Table 1).  Three kinds of prompts adapt the model: modality-specific (Eq. 1), task-aware, made from those
and two missing keys (Eq. 2-4), and task-specific (Eq. 5); a contrastive loss on the task-aware ones lets similar
cases help each other (Eq. 6-8).

Shape letters, the same everywhere
    B batch   T tasks = patterns of missing modalities   t current task   M = 3 modalities: a audio, v video, l text
    L prompt length   D width   n steps of a modality's sequence   C outputs (1 score, or classes)   N utterances
    (B,n,D) is a shape; Eq. n is the paper's number.

Run     python missing_prompt.py                       the paper's method on mini-affect, nothing downloaded
        python missing_prompt.py --method finetune     the lower bound; --help names the others
        python missing_prompt.py --table 2             every method beside the paper's numbers
"""
import argparse
import contextlib
import copy
import functools
import hashlib
import json
import math
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import metrics
from data import MODALITIES, InputError, affect_stream, cache_folder, pattern_name
from metrics import Run, atomic, run_cli

# ------------------------------------------------------------------------------- the paper: patterns, prompts, losses
# Table 1: what is available in task 1..7.  Its cells are lost in the public text; this order is the one under which
# "tasks 2 and 3, tasks 5 and 7" (Figure 4) are the pairs that turn into each other when audio and text are swapped.
PATTERNS = tuple(map(frozenset, (("audio", "video", "text"), ("audio", "video"), ("video", "text"), ("audio", "text"),
                                 ("audio",), ("video",), ("text",))))
KINDS = ("MS", "TA", "TS")                                           # modality-specific, task-aware, task-specific


def mirror_pairs(patterns):
    """The positive pairs (i,j), (m,n) of Eq. 7, from 0: patterns that turn into each other when audio and text swap.

    First the pair with two modalities, then the pair with one; None where `patterns` does not hold both members.
    """
    pairs = (({"audio", "video"}, {"video", "text"}), ({"audio"}, {"text"}))
    patterns = [set(p) for p in patterns]
    return tuple((patterns.index(p), patterns.index(q)) if p in patterns and q in patterns else None for p, q in pairs)


class MissingPrompts(nn.Module):
    """The three kinds of prompts and where they are attached.  Sections 3.2, Eq. 1-5.

    patterns   T frozensets of available modalities; a task is a pattern, so its number t is visible in the input
    sequence   the order of the kinds from the first layer on (Table 5)      depths   N_M, N_A, N_S: by kind, not place
    kinds      the kinds that are attached; a kind left out leaves its layers without prompt (Table 3)
    start      the first layer with a prompt, from 0 (Table 6)               layers   MSA layers of each modality
    keys       "shared": one k_miss and one k_avail; "modality": a pair for each modality
    init       standard deviation of the prompts.  Zero is refused: Eq. 2 multiplies two trained tensors, and with both
               at zero neither ever receives a gradient; k_avail = k_miss makes all task-aware prompts equal.
    """

    def __init__(self, width=30, length=16, patterns=PATTERNS, kinds=KINDS, sequence=KINDS, depths=(1, 1, 1), start=0,
                 layers=5, keys="shared", init=0.02):
        super().__init__()
        if init <= 0:
            raise InputError("--init-std must be positive: prompts of zero times keys never learn (Eq. 2)")
        plan = [kind for kind in sequence for _ in range(depths[KINDS.index(kind)])]
        if start + len(plan) > layers:
            raise InputError(f"--start {start} and N_M+N_A+N_S = {len(plan)} need {start + len(plan)} layers, "
                             f"the backbone has {layers}; use a smaller --start or --depths, or more --layers")
        self.plan = [None] * start + [k if k in kinds else None for k in plan] + [None] * (layers - start - len(plan))
        T, M = len(patterns), len(MODALITIES)
        uses = lambda *k: any(x in self.plan for x in k)             # P_M is also what task-aware prompts are made of
        self.P_M = nn.Parameter(init * torch.randn(M, length, width)) if uses("MS", "TA") else None          # (M,L,D)
        self.P_S = nn.Parameter(init * torch.randn(T, length, width)) if uses("TS") else None                # (T,L,D)
        groups = {"shared": 1, "modality": M}[keys]
        self.k_miss = nn.Parameter(0.5 * torch.randn(groups, width)) if uses("TA") else None                # (1|M,D)
        self.k_avail = nn.Parameter(1 + 0.1 * torch.randn(groups, width)) if uses("TA") else None           # (1|M,D)
        missing = torch.tensor([[float(m not in p) for m in MODALITIES] for p in patterns])
        self.register_buffer("missing", missing, persistent=False)   # (T,M) e_m(t) = 1 where modality m is missing

    def modality(self, m):
        """P^m (L,D), m a name or an index: the same in all tasks.                                              Eq. 1"""
        return self.P_M[MODALITIES.index(m) if isinstance(m, str) else m]

    def task_aware(self, t=slice(None)):
        """P_A(t) (L,D) for a number, (B,L,D) for (B,) task numbers, (T,L,D) without argument.                Eq. 2-3"""
        # P_A^m(t) = [ e_m(t) k_miss + (1 - e_m(t)) k_avail ] (.) P^m    (.) elementwise, the key broadcast to L  Eq. 2
        e = self.missing[t][..., None]                                                  # (..,M,1)
        key = e * self.k_miss + (1 - e) * self.k_avail                                  # (..,M,D)
        # P_A(t) = sum_m P_A^m(t)                                                                               Eq. 3
        return torch.einsum("...md,mld->...ld", key, self.P_M)                          # (..,M,D) (M,L,D) -> (..,L,D)

    def task_specific(self, t):
        """P_S^t (L,D) for a number, (B,L,D) for (B,) task numbers: only its own task trains it.                Eq. 5"""
        return self.P_S[t]

    def z(self):
        """z_t = mean over the L rows of P_A(t), (T,D): what Eq. 6 compares."""
        return self.task_aware().mean(1)

    def attach(self, t):
        """What each MSA layer of each modality gets in task t: one entry per layer, None or {modality: (1|B,L,D)}.

        h_i^m = MSA_i^m([P^m    ; h_{i-1}^m])   i = 1 .. N_M                      one prompt per modality        Eq. 1
        h_i^m = MSA_i^m([P_A(t) ; h_{i-1}^m])   i = N_M+1 .. N_M+N_A              one for all modalities         Eq. 4
        h_i^m = MSA_i^m([P_S^t  ; h_{i-1}^m])   i = N_M+N_A+1 .. N_M+N_A+N_S      one for all modalities         Eq. 5
        """
        batch = lambda p: p if p.dim() == 3 else p[None]                                # (L,D) -> (1,L,D)
        made = {None: None}
        if "MS" in self.plan:
            made["MS"] = {m: batch(self.modality(m)) for m in MODALITIES}
        if "TA" in self.plan:
            made["TA"] = dict.fromkeys(MODALITIES, batch(self.task_aware(t)))
        if "TS" in self.plan:
            made["TS"] = dict.fromkeys(MODALITIES, batch(self.task_specific(t)))
        return [made[kind] for kind in self.plan]


def nt_xent(z, i, j, tau=0.5):
    """The modified NT-Xent loss of the positive pair (i,j) among all task-aware prompts z (T,D), a scalar.     Eq. 6"""
    # l(i,j) = -log  exp(sim(z_i,z_j)/tau) / sum_k 1[k != i] exp(sim(z_i,z_k)/tau),   sim = cosine               Eq. 6
    sim = F.cosine_similarity(z[i], z, dim=-1) / tau                                    # (D,) (T,D) -> (T,)
    others = torch.arange(len(z), device=z.device) != i                                 # the positive stays in the sum
    return torch.logsumexp(sim[others], 0) - sim[j]


def task_interaction_loss(z, pairs=((1, 2), (4, 6)), trade_off=1.0, tau=0.5):
    """The contrastive task interaction loss on z (T,D), a scalar; a pair that is None is left out (Table 4).   Eq. 7"""
    # L_con = [l(i,j) + l(j,i)] + lambda [l(m,n) + l(n,m)]                                                        Eq. 7
    weights = (1.0, trade_off)
    terms = [w * (nt_xent(z, *pair, tau) + nt_xent(z, *pair[::-1], tau)) for w, pair in zip(weights, pairs) if pair]
    return sum(terms, z.new_zeros(()))


# ---------------------------------------------------------------------------------- the backbone they are injected into


class MSALayer(nn.Module):
    """One pre-norm transformer layer, MSA_i^m of the paper.  width D, heads H."""

    def __init__(self, width, heads, dropout=0.1):
        super().__init__()
        if width % heads:
            raise InputError(f"--width {width} must divide into --heads {heads}")
        self.heads, self.rate = heads, dropout
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, h, prompt=None, source=None):
        """h (B,n,D), prompt (1|B,L,D) or a pair of them for keys and values, source (B,n',D) or None -> (B,n,D).

        MSA([P ; h]) without the L outputs at the prompt's places.  Those are dropped after the layer, so the prompt is
        needed as keys and values only: the same numbers for half the work.  source: cross-attention (MulT).
        """
        D, H = h.shape[-1], self.heads
        heads = lambda x: x.unflatten(-1, (-1, H, D // H)).permute(2, 0, 3, 1, 4)       # (B,n,k*D) -> (k,B,H,n,D/H)
        keys_values = lambda x: heads(F.linear(self.norm1(x), self.qkv.weight[D:], self.qkv.bias[D:]))
        if prompt is not None:
            pk, pv = prompt if isinstance(prompt, tuple) else (prompt, prompt)
            h = h.expand(max(len(h), len(pk)), -1, -1)               # one row of a missing modality, B rows of prompts
        q, k, v = heads(self.qkv(self.norm1(h)))                                        # 3 x (B,H,n,D/H)
        if source is not None:
            k, v = keys_values(source)
        if prompt is not None:
            to_k, to_v = keys_values(pk)                                                # 2 x (1|B,H,L,D/H)
            to_v = to_v if pv is pk else keys_values(pv)[1]
            k, v = (torch.cat([p.expand(len(h), -1, -1, -1), x], 2) for p, x in ((to_k, k), (to_v, v)))  # (B,H,L+n,.)
        att = F.scaled_dot_product_attention(q, k, v, dropout_p=self.rate if self.training else 0.0)
        drop = lambda x: F.dropout(x, self.rate, self.training)
        h = h + drop(self.out(att.transpose(1, 2).flatten(2)))
        return h + drop(self.down(F.relu(self.up(self.norm2(h)))))


def positions(n, width, like):
    """Sinusoidal position code (n,D) of Vaswani et al. 2017, for any n."""
    angle = torch.arange(n, device=like.device)[:, None] * torch.exp(
        torch.arange(0, width, 2, device=like.device) * (-math.log(10000.0) / width))
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(1)[:, :width].to(like.dtype)


class Head(nn.Module):
    """Residual two-layer perceptron and a linear read-out: (B,D) -> (B,C)."""

    def __init__(self, width, outputs, dropout):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Dropout(dropout), nn.Linear(width, width))
        self.out = nn.Linear(width, outputs)

    def forward(self, x):
        return self.out(x + self.mlp(x))


class MultimodalTransformer(nn.Module):
    """The backbone: a self-attention encoder per modality, then self-attention over the three sequences together.

    dims {m: feature dimension}, outputs C.  The paper says "the multimodal transformer", writes MSA_i^a, MSA_i^v,
    MSA_i^l and 2-3 % trainable parameters; this reading fits all three (--backbone mult is the other).
    """

    def __init__(self, dims, outputs, width=30, heads=5, layers=5, fusion=3, dropout=0.1):
        super().__init__()
        stack = lambda n: nn.ModuleList(MSALayer(width, heads, dropout) for _ in range(n))
        self.width, self.layers, self.depth, self.features = width, layers, layers + fusion, width
        self.project = nn.ModuleDict({m: nn.Linear(dims[m], width, bias=False) for m in MODALITIES})
        self.streams = nn.ModuleDict({m: stack(layers) for m in MODALITIES})
        self.fusion, self.norm = stack(fusion), nn.LayerNorm(width)
        self.head = Head(width, outputs, dropout)

    def embed(self, x):
        """Raw features {m: (B,n,d)} -> {m: (B,n,D)}: projection and positions.  A missing modality is zeros."""
        D = self.width
        return {m: math.sqrt(D) * self.project[m](v) + positions(v.shape[1], D, v) for m, v in x.items()}

    def encode(self, h, prompts=None, keep=False):
        """h {m: (B,n,D)} from embed, prompts: one entry per layer and fusion layer or None -> (B,D) read at position 0.

        A modality that is missing in the whole batch comes as one row: its stream runs once and is repeated.
        keep: a prompt goes in at the first layer of its group and stays, until the next group takes its place.
        """
        prompts = list(prompts or []) + [None] * (self.depth - len(prompts or []))
        B = max(len(x) for x in h.values())
        done = []
        for m in ("text", "audio", "video"):
            x = h[m].expand(B, -1, -1) if self.training else h[m]    # dropout differs from row to row
            slot, previous = None, None
            for layer, p in zip(self.streams[m], prompts):
                if not keep:
                    x = layer(x, p[m] if p else None)
                    continue
                if p is not None and p is not previous:
                    slot, previous = p[m], p
                if slot is None:
                    x = layer(x)
                else:
                    rows, n = max(len(x), len(slot)), x.shape[1]
                    x = layer(torch.cat([x.expand(rows, -1, -1), slot.expand(rows, -1, -1)], 1))
                    x, slot = x[:, :n], x[:, n:]
            x = x if slot is None else torch.cat([x, slot], 1)       # behind the features: position 0 stays a feature
            done.append(x.expand(B, -1, -1))
        x = torch.cat(done, 1)                                                          # (B, n_l + n_a + n_v, D)
        for layer, p in zip(self.fusion, prompts[self.layers:]):
            x = layer(x, p)
        return self.norm(x[:, 0])

    def forward(self, h, prompts=None, keep=False):
        return self.head(self.encode(h, prompts, keep))                                 # (B,C)


class MulT(MultimodalTransformer):
    """MulT (Tsai et al. 2019) as the backbone: every modality attends to each of the other two, layer by layer.

    Crossmodal layers have no self-attention: a prompt among the queries would reach nobody, so it joins the keys and
    values, with the prompt of the modality that is looked at.  No causal mask.
    """

    def __init__(self, dims, outputs, width=30, heads=5, layers=5, fusion=3, dropout=0.1):
        super().__init__(dims, outputs, width, heads, 0, 0, dropout)
        stack = lambda n, w: nn.ModuleList(MSALayer(w, heads, dropout) for _ in range(n))
        self.layers, self.depth, self.features = layers, layers, 6 * width
        self.cross = nn.ModuleDict({f"{m}<{s}": stack(layers, width) for m in MODALITIES for s in MODALITIES if m != s})
        self.memory = nn.ModuleDict({m: stack(fusion, 2 * width) for m in MODALITIES})
        self.norm, self.head = nn.LayerNorm(6 * width), Head(6 * width, outputs, dropout)

    def encode(self, h, prompts=None, keep=False):
        if keep:
            raise InputError("--keep needs --backbone msa: in MulT's crossmodal layers a prompt has no place to stay")
        prompts = list(prompts or []) + [None] * self.layers
        B = max(len(x) for x in h.values())
        h = {m: x.expand(B, -1, -1) for m, x in h.items()}
        read = []
        for m in MODALITIES:
            both = []
            for s in (s for s in MODALITIES if s != m):
                x = h[m]
                for layer, p in zip(self.cross[f"{m}<{s}"], prompts):
                    x = layer(x, p[s] if p else None, source=h[s])
                both.append(x)
            x = torch.cat(both, -1)                                                     # (B,n_m,2D)
            for layer in self.memory[m]:
                x = layer(x)
            read.append(x[:, -1])
        return self.norm(torch.cat(read, -1))                                           # (B,6D)


BACKBONES = {"msa": MultimodalTransformer, "mult": MulT}

# -------------------------------------------------------------------------------------------- methods: data as tensors


class Batch(NamedTuple):
    x: dict                # {m: (B,n,d)}: raw features, projected ones where the backbone is frozen; (1,n,d) if missing
    y: torch.Tensor        # (B,)
    present: torch.Tensor  # (B,M) bool
    task: object           # the task's number, or (B,) numbers in a mixed batch
    rows: torch.Tensor     # (B,)


class Store:
    """The utterances of a stream as tensors; makes batches with modalities missing, and scores outputs."""

    def __init__(self, stream, patterns, device="cpu"):
        self.scoring, self.outputs = stream.extra["scoring"], stream.extra["outputs"]
        self.x = {m: torch.as_tensor(x, device=device) for m, x in stream.extra["features"].items()}
        self.blank = {m: torch.zeros_like(x[0]) for m, x in self.x.items()}             # (n,d) a missing modality
        self.y = torch.as_tensor(stream.extra["label"], device=device)
        self.patterns = patterns
        self.present = torch.tensor([[m in p for m in MODALITIES] for p in patterns], device=device)    # (T,M)

    @torch.no_grad()
    def project(self, net):
        """Replace raw features by net.embed of them, once: right while the backbone is frozen."""
        self.x = {m: torch.cat([net.embed({m: part})[m] for part in x.split(1024)]) for m, x in self.x.items()}
        self.blank = {m: net.embed({m: x[None]})[m][0] for m, x in self.blank.items()}

    def batch(self, rows, task=None):
        """rows (B,), task: a number, (B,) numbers, or None for complete modalities."""
        if torch.is_tensor(task):
            present = self.present[task]                                                # (B,M)
            x = {m: torch.where(present[:, i, None, None], self.x[m][rows], self.blank[m])
                 for i, m in enumerate(MODALITIES)}
        else:                                                        # one pattern for all: what is missing is one row
            available = MODALITIES if task is None else self.patterns[task]
            x = {m: self.x[m][rows] if m in available else self.blank[m][None] for m in MODALITIES}
            present = torch.tensor([m in available for m in MODALITIES], device=self.y.device).expand(len(rows), -1)
        return Batch(x, self.y[rows], present, task, rows)

    def loss(self, output, y):
        """L_task: L1 for sentiment, cross-entropy for classes.  Section 4.3."""
        return F.cross_entropy(output, y) if self.scoring == "classes" else F.l1_loss(output[:, 0], y)

    def distill(self, output, old):
        """How far outputs moved from old ones: squared distance, or KL at temperature 2 for classes."""
        if self.scoring != "classes":
            return F.mse_loss(output, old)
        return 4 * F.kl_div((output / 2).log_softmax(-1), (old / 2).softmax(-1), reduction="batchmean")


# ---------------------------------------------------------------------------------------- methods: the paper's and bounds


class Finetune(nn.Module):
    """Sequential fine-tuning of everything: the paper's lower bound, and the base of all other methods."""
    frozen, joint, lr, weight, buffered = False, False, 3.3e-4, 0.0, False

    def __init__(self, net, store, a):
        super().__init__()
        self.net, self.store, self.a = net, store, a
        self.strength = self.weight if a.weight is None else a.weight
        if self.frozen:
            net.requires_grad_(False).eval()
            store.project(net)

    def train(self, mode=True):
        super().train(mode)
        if self.frozen:
            self.net.eval()                                          # no dropout inside what does not learn
        return self

    def embed(self, b):
        return b.x if self.frozen else self.net.embed(b.x)

    def output(self, b):
        """Batch -> (B,C).  At test nothing but the input may decide: b.task is the pattern that the input shows."""
        return self.net(self.embed(b))

    def loss(self, b):
        output = self.output(b)
        self.latest = output.detach()                                # what replay methods may store
        return self.store.loss(output, b.y)

    def begin(self, t, rows):
        """Before task t with training rows (n,)."""

    def edit_gradients(self):
        """Between backward and step."""

    def observe(self, b, epoch):
        """After the step on batch b."""

    def end(self, t, rows):
        """After task t, with its best epoch's weights."""

    def extras(self):
        """What results.json should know besides."""
        return {}


class Joint(Finetune):
    """Upper bound: everything is trained on all tasks mixed, i.i.d."""
    joint, lr = True, 1e-3


class Frozen(Finetune):
    """The pre-trained backbone as it is: what there is before any adaptation."""
    frozen = True


class Ours(Finetune):
    """The paper's method: frozen backbone, three kinds of prompts, contrastive task interaction."""
    frozen, lr, weight = True, 3e-2, 0.1

    def __init__(self, net, store, a):
        super().__init__(net, store, a)
        self.prompts = MissingPrompts(net.width, a.length, a.patterns, a.prompts, a.sequence, a.depths, a.start,
                                      net.layers, a.keys, a.init_std)
        pairs = mirror_pairs(a.patterns)
        self.pairs = [p if a.pairs in ("both", which) else None for p, which in zip(pairs, ("first", "second"))]

    def output(self, b):
        return self.net(self.embed(b), self.prompts.attach(b.task), self.a.keep)

    def contrastive(self):
        if self.prompts.k_miss is None or not any(self.pairs):       # no task-aware prompts, nothing to compare
            return torch.zeros((), device=self.store.y.device)
        return task_interaction_loss(self.prompts.z(), self.pairs, self.a.trade_off, self.a.tau)

    def loss(self, b):
        # L = L_task(yhat, y) + gamma L_con                                                                      Eq. 8
        return super().loss(b) + self.strength * self.contrastive()

    def extras(self):
        if self.prompts.k_miss is None:
            return {}
        z = F.normalize(self.prompts.z().detach(), dim=-1)
        return {"task_aware_cosine": (z @ z.T).cpu().numpy()}        # (T,T), instead of Figure 4's t-SNE


class JointOurs(Ours):
    """Upperbound (Ours): the paper's prompts trained on all tasks mixed, i.i.d."""
    joint = True


# --------------------------------------------------------------------------------------------- baselines: with a buffer


class ER(Finetune):
    """Experience replay (Chaudhry et al. 2019b): a reservoir of past samples, a second batch from it in every step."""
    buffered, lr = True, 1e-3

    def __init__(self, net, store, a):
        super().__init__(net, store, a)
        size = a.buffer
        self.register_buffer("kept", torch.zeros(3, size, dtype=torch.long))            # utterance, task, seen at
        self.register_buffer("kept_output", torch.zeros(size, store.outputs))
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    def observe(self, b, epoch):
        # reservoir: the s-th sample of the stream takes place j ~ U{0..s-1} if j < size: each is kept with size/s
        size = self.kept.shape[1]
        for i in range(len(b.rows) if epoch == 0 else 0):            # each sample is offered once
            s = int(self.seen)
            j = s if s < size else int(torch.randint(s + 1, ()))
            self.seen += 1
            if j < size:
                self.kept[:, j] = torch.tensor([int(b.rows[i]), int(b.task), s])
                self.kept_output[j] = self.latest[i]

    def recall(self, n):
        """n random places of the buffer; fewer while it holds fewer, none while it is empty."""
        filled = min(int(self.seen), self.kept.shape[1])
        return torch.randperm(filled, device=self.kept.device)[:n]

    def together(self, b, *places):
        """Outputs and labels of the new batch and of each replayed one, in one pass through the model."""
        rows = torch.cat([b.rows, *(self.kept[0, j] for j in places)])
        task = torch.cat([torch.full_like(b.rows, b.task), *(self.kept[1, j] for j in places)])
        sizes, mixed = [len(b.rows), *map(len, places)], self.store.batch(rows, task)
        outputs = self.output(mixed).split(sizes)
        self.latest = outputs[0].detach()
        return [(o, y) for o, y in zip(outputs, mixed.y.split(sizes)) if len(y)]

    def loss(self, b):
        return sum(self.store.loss(*pair) for pair in self.together(b, self.recall(len(b.rows))))


class DERpp(ER):
    """DER++ (Buzzega et al. 2020): task loss + alpha |f(x) - stored output|^2 + beta task loss on another draw."""
    weight, beta = 0.3, 0.5

    def loss(self, b):
        j, again = self.recall(len(b.rows)), self.recall(len(b.rows))
        new, *old = self.together(b, j, again)
        loss = self.store.loss(*new)
        if old:
            loss = loss + self.strength * F.mse_loss(old[0][0], self.kept_output[j])
            loss = loss + self.beta * self.store.loss(*old[1])
        return loss


class AGEM(ER):
    """A-GEM (Chaudhry et al. 2019a): if the gradient g would raise the loss on the buffer, take that part out of it."""

    def loss(self, b):
        j = self.recall(len(b.rows))                                 # drawn here, used by edit_gradients
        self.old = self.store.batch(self.kept[0, j], self.kept[1, j])
        return Finetune.loss(self, b)

    def edit_gradients(self):
        if not len(self.old.rows):
            return
        parameters = [p for p in self.parameters() if p.grad is not None]
        g = torch.cat([p.grad.flatten() for p in parameters])
        for p in parameters:
            p.grad = None
        self.store.loss(self.output(self.old), self.old.y).backward()
        ref = torch.cat([p.grad.flatten() if p.grad is not None else torch.zeros(p.numel()) for p in parameters])
        # g <- g - (g . g_ref / g_ref . g_ref) g_ref   where g . g_ref < 0
        g = project_away(g, ref)
        for p, part in zip(parameters, g.split([p.numel() for p in parameters])):
            p.grad = part.view_as(p).clone()


def project_away(g, ref):
    """A-GEM's update: g (P,) where it agrees with ref (P,), else g without its component along ref."""
    dot = g @ ref
    return g if dot >= 0 else g - dot / (ref @ ref) * ref


class ICaRL(Finetune):
    """iCaRL (Rebuffi et al. 2017): herded exemplars of every task, and distillation from the model before the task.

    Its nearest-mean classifier has no meaning for a sentiment score; prediction stays the head's.
    """
    buffered, lr, weight = True, 3e-3, 1.0

    def __init__(self, net, store, a):
        super().__init__(net, store, a)
        self.register_buffer("kept", torch.full((2, a.buffer), -1))                     # utterance, task; -1 free
        self.old = copy.deepcopy(net).requires_grad_(False)

    def begin(self, t, rows):
        self.old.load_state_dict(self.net.state_dict())
        self.old.eval()

    def loss(self, b):
        loss = super().loss(b)
        full = (self.kept[0] >= 0).nonzero()[:, 0]
        if len(full):
            j = full[torch.randperm(len(full))[:len(b.rows)]]
            old = self.store.batch(self.kept[0, j], self.kept[1, j])
            output = self.output(old)
            with torch.no_grad():
                before = self.old(self.old.embed(old.x))
            loss = loss + self.store.loss(output, old.y) + self.strength * self.store.distill(output, before)
        return loss

    @torch.no_grad()
    def end(self, t, rows):
        tasks = [*dict.fromkeys(self.kept[1][self.kept[0] >= 0].tolist()), t]
        share = self.kept.shape[1] // len(tasks)
        kept = [self.kept[:, self.kept[1] == k][:, :share] for k in tasks[:-1]]      # herding order: the first are best
        feature = torch.cat([self.net.encode(self.net.embed(self.store.batch(r, t).x)) for r in rows.split(256)])
        chosen = rows[herd(F.normalize(feature, dim=-1), share)]
        kept.append(torch.stack([chosen, torch.full_like(chosen, t)]))
        kept = torch.cat(kept, 1)
        self.kept.fill_(-1)
        self.kept[:, :kept.shape[1]] = kept


def herd(feature, k):
    """Herding, (N,D) -> at most k indices: each next one brings the mean of the chosen closest to the mean of all."""
    mean, total, chosen = feature.mean(0), torch.zeros_like(feature[0]), []
    free = torch.ones(len(feature), dtype=torch.bool, device=feature.device)
    for i in range(min(k, len(feature))):
        gap = (mean - (total + feature) / (i + 1)).norm(dim=-1).masked_fill(~free, math.inf)     # (N,)
        best = int(gap.argmin())
        total, free[best] = total + feature[best], False
        chosen.append(best)
    return torch.tensor(chosen, dtype=torch.long, device=feature.device)


# -------------------------------------------------------------------------------------------- baselines: regularisation


class EWC(Finetune):
    """EWC, online form (Kirkpatrick et al. 2017): stay near the last task's weights where they mattered to any task."""
    lr, weight = 1e-3, 1000.0

    def __init__(self, net, store, a):
        super().__init__(net, store, a)
        size = sum(p.numel() for p in self.parameters())
        self.register_buffer("anchor", torch.zeros(size))
        self.register_buffer("fisher", torch.zeros(size))

    def loss(self, b):
        # L_task + lambda/2 sum_k F_k (theta_k - theta*_k)^2
        theta = torch.cat([p.flatten() for p in self.parameters()])
        return super().loss(b) + self.strength / 2 * (self.fisher * (theta - self.anchor) ** 2).sum()

    def end(self, t, rows):
        # F_k += mean over samples of (d loss / d theta_k)^2, one sample at a time: squaring a batch mean is not Fisher
        parameters, samples = list(self.parameters()), rows[torch.randperm(len(rows))[:32]]
        for row in samples:
            b = self.store.batch(row[None], t)
            g = torch.autograd.grad(Finetune.loss(self, b), parameters, allow_unused=True)
            g = torch.cat([torch.zeros_like(p).flatten() if x is None else x.flatten() for p, x in zip(parameters, g)])
            self.fisher += g ** 2 / len(samples)
        self.anchor.copy_(torch.cat([p.detach().flatten() for p in parameters]))


class LwF(Finetune):
    """LwF (Li and Hoiem 2017): on the new task's inputs, keep the outputs that the model gave before the task."""
    weight = 0.1

    def __init__(self, net, store, a):
        super().__init__(net, store, a)
        self.old = copy.deepcopy(net).requires_grad_(False)
        self.register_buffer("tasks", torch.zeros((), dtype=torch.long))

    def begin(self, t, rows):
        self.old.load_state_dict(self.net.state_dict())
        self.old.eval()

    def end(self, t, rows):
        self.tasks += 1

    def loss(self, b):
        output = self.output(b)
        loss = self.store.loss(output, b.y)
        if self.tasks:
            with torch.no_grad():
                before = self.old(self.old.embed(b.x))
            loss = loss + self.strength * self.store.distill(output, before)
        return loss


# -------------------------------------------------------------------------------------------------- baselines: prompts


class Prompted(Finetune):
    """What prompt baselines share: a frozen backbone, and its own unprompted read-out as the query."""
    frozen, lr = True, 1e-2

    def __init__(self, net, store, a):
        super().__init__(net, store, a)
        self.known = {}                                              # task -> (N,D), nan where not yet asked

    @torch.no_grad()
    def query(self, b):
        """Batch of one task -> (B,D), of unit length; computed once for each utterance and task."""
        if b.task not in self.known:
            self.known[b.task] = torch.full((len(self.store.y), self.net.features), math.nan, device=b.y.device)
        known = self.known[b.task]
        new = b.rows[known[b.rows, 0].isnan()]
        if len(new):
            known[new] = F.normalize(self.net.encode(self.store.batch(new, b.task).x), dim=-1)
        return known[b.rows]


class L2P(Prompted):
    """L2P (Wang et al. 2022c): 10 prompts of length 5; the 5 whose keys are nearest to the query go into layers 1-3."""
    lr, weight = 3.3e-3, 0.01

    def __init__(self, net, store, a):
        super().__init__(net, store, a)
        self.pool = nn.Parameter(0.02 * torch.randn(10, 5, net.width))
        self.keys = nn.Parameter(torch.randn(10, net.features))

    def select(self, b):
        sim = self.query(b) @ F.normalize(self.keys, dim=-1).T                          # (B,10)
        return sim.topk(5, dim=-1)                                   # per sample: nobody else in the batch has a say

    def output(self, b):
        prompt = self.pool[self.select(b).indices].flatten(1, 2)                        # (B,25,D)
        return self.net(b.x, [dict.fromkeys(MODALITIES, prompt)] * min(3, self.net.layers))

    def loss(self, b):
        return super().loss(b) + self.strength * (1 - self.select(b).values).sum(-1).mean()


class DualPrompt(Prompted):
    """DualPrompt (Wang et al. 2022b): a general prefix in layers 1-2, a task's own in layers 3-5, found by its key."""
    weight = 1.0

    def __init__(self, net, store, a):
        super().__init__(net, store, a)
        T, D = len(a.patterns), net.width
        self.general = nn.Parameter(0.02 * torch.randn(2, 5, D))                        # prefix: keys, values
        self.expert = nn.Parameter(0.02 * torch.randn(T, 2, a.length, D))
        self.keys = nn.Parameter(torch.randn(T, net.features))
        self.register_buffer("learned", torch.zeros(T, dtype=torch.bool))

    def begin(self, t, rows):
        self.learned[t] = True

    def match(self, b):
        return self.query(b) @ F.normalize(self.keys, dim=-1).T                         # (B,T)

    def output(self, b):
        if self.training:
            expert = self.expert[b.task][None]                                          # (1,2,L,D)
        else:
            expert = self.expert[self.match(b).masked_fill(~self.learned, -math.inf).argmax(-1)]          # (B,2,L,D)
        g = dict.fromkeys(MODALITIES, (self.general[None, 0], self.general[None, 1]))
        e = dict.fromkeys(MODALITIES, (expert[:, 0], expert[:, 1]))
        return self.net(b.x, [g, g] + [e] * (self.net.layers - 2))

    def loss(self, b):
        return super().loss(b) + self.strength * (1 - self.match(b)[:, b.task]).mean()


class SPrompts(Prompted):
    """S-Prompts (Wang et al. 2022a): prompts learned for each task alone; at test the nearest of 5 k-means centres per
    task says which."""
    lr = 3e-2

    def __init__(self, net, store, a):
        super().__init__(net, store, a)
        T = len(a.patterns)
        self.prompts = nn.Parameter(0.02 * torch.randn(T, a.length, net.width))
        self.register_buffer("centres", torch.full((T, 5, net.features), math.inf))

    def output(self, b):
        if self.training:
            prompt = self.prompts[b.task][None]
        else:
            gap = (self.query(b)[:, None, None] - self.centres).norm(dim=-1).amin(-1)   # (B,T), inf where not learned
            prompt = self.prompts[gap.argmin(-1)]
        return self.net(b.x, [dict.fromkeys(MODALITIES, prompt)] * min(3, self.net.layers))

    def begin(self, t, rows):
        self.centres[t] = kmeans(self.query(self.store.batch(rows, t)), 5)


def kmeans(x, k, steps=10):
    """Lloyd's algorithm, (N,D) -> centres (k,D); starts from k random rows."""
    centres = x[torch.randperm(len(x), device=x.device)[:k]].clone()
    centres = centres[torch.arange(k, device=x.device) % len(centres)]                 # fewer rows than centres
    for _ in range(steps):
        nearest = F.one_hot(torch.cdist(x, centres).argmin(-1), k).to(x.dtype)          # (N,k)
        count = nearest.sum(0)[:, None]
        centres = torch.where(count > 0, nearest.T @ x / count.clamp(min=1), centres)
    return centres


class MPLMM(Prompted):
    """MPLMM (Guo et al. 2024c) on this backbone: generative prompts make up the missing modality from those at hand,
    signal prompts say for each modality whether it is real, missing-type prompts enter the fusion layers."""
    lr = 3e-2

    def __init__(self, net, store, a):
        super().__init__(net, store, a)
        D, L, M, self.length = net.width, a.length, len(MODALITIES), a.length
        self.generative = nn.Parameter(0.02 * torch.randn(M, L, D))
        self.translate = nn.ModuleList(nn.Linear(D, D) for _ in MODALITIES)             # 1x1 convolutions
        self.signal = nn.Parameter(torch.zeros(M, 2, D))                                # missing, real
        self.kind = nn.Parameter(0.02 * torch.randn(M, 2, L, D))
        self.matrix = nn.Parameter(torch.zeros(D, D))                # one factor random, one zero: two zeros are dead

    def output(self, b):
        real = b.present.to(self.signal.dtype)                                          # (B,M)
        B, x = len(real), {}
        pooled = torch.stack([b.x[m].mean(1).expand(B, -1) for m in MODALITIES], 1)     # (B,M,D)
        at_hand = (pooled * real[..., None]).sum(1) / real.sum(1, keepdim=True)         # (B,D) mean of what is there
        for i, m in enumerate(MODALITIES):
            # a missing modality = its blank sequence + GELU(1x1 conv) of [generative prompt ; what is there]
            made = F.gelu(self.translate[i](self.generative[i].mean(0) + at_hand))[:, None]              # (B,1,D)
            signal = self.signal[i][b.present[:, i].long()][:, None]                    # (B,1,D)
            x[m] = b.x[m].expand(B, -1, -1) + made * (1 - real[:, i, None, None]) + signal
        kind = sum(self.kind[i][b.present[:, i].long()] for i in range(len(MODALITIES)))                 # (B,L,D)
        kind = kind + kind @ self.matrix
        if isinstance(self.net, MulT):
            return self.net(x, [dict.fromkeys(MODALITIES, kind)])
        return self.net(x, [None] * self.net.layers + [kind])


METHODS = {"prompts": Ours, "finetune": Finetune, "joint": Joint, "joint-prompts": JointOurs, "none": Frozen,
           "icarl": ICaRL, "agem": AGEM, "er": ER, "derpp": DERpp, "ewc": EWC, "lwf": LwF,
           "l2p": L2P, "dualprompt": DualPrompt, "sprompts": SPrompts, "mplmm": MPLMM}

# ------------------------------------------------------------------------------------------------- train and evaluate


def make_backbone(a, stream):
    return BACKBONES[a.backbone](stream.extra["dims"], stream.extra["outputs"], a.width, a.heads, a.layers,
                                 a.fusion_layers, a.dropout)


def adam(parameters, lr, device):
    return torch.optim.Adam(parameters, lr=lr, fused=device.type in ("cpu", "cuda"))


def rng_state(device):
    return [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])


def pretrain(a, stream, device):
    """The backbone trained on complete modalities, from the cache if this configuration was trained before.

    Built-in world: on utterances of its own, disjoint from the stream.  Real data: on the training utterances.
    """
    from safetensors.torch import load_file, save
    train, val = stream.extra["upstream"]
    what = {k: getattr(a, k) for k in "backbone width heads layers fusion_layers dropout pre_epochs clip".split()}
    sha = hashlib.sha256(json.dumps([what, stream.extra["version"], stream.extra["scoring"]], sort_keys=True).encode())
    for x in (*train.features.values(), train.label):
        sha.update(np.ascontiguousarray(x[train.rows]).tobytes())
    path = cache_folder() / f"affect-{a.backbone}-{sha.hexdigest()[:16]}.safetensors"
    with torch.random.fork_rng():
        torch.manual_seed(0)                                         # one backbone for all seeds and methods
        net = make_backbone(a, stream).to(device)
        if path.exists():
            try:
                net.load_state_dict(load_file(str(path)))
                return net, path
            except Exception as e:                                   # a broken file is made anew
                print(f"{path} cannot be read ({type(e).__name__}); pre-training again")
        store, best = Store(stream, a.patterns, device), (math.inf, None)
        rows, val = (torch.as_tensor(u.rows, device=device) for u in (train, val))
        optimizer = adam(net.parameters(), 1e-3, device)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, a.pre_epochs * math.ceil(len(rows) / 64))
        bar = tqdm(range(a.pre_epochs), desc="pre-training on complete modalities", disable=a.quiet, leave=False)
        for _ in bar:
            net.train()
            for part in rows[torch.randperm(len(rows)).to(device)].split(64):
                b = store.batch(part)
                loss = store.loss(net(net.embed(b.x)), b.y)
                optimizer.zero_grad()
                loss.backward()
                nn.utils.clip_grad_norm_(net.parameters(), a.clip)
                optimizer.step()
                schedule.step()
            net.eval()
            with torch.no_grad():
                output = torch.cat([net(net.embed(store.batch(part).x)) for part in val.split(512)])
            value = store.loss(output, store.y[val]).item()
            bar.set_postfix(val=f"{value:.3f}")
            if value < best[0]:
                best = value, copy.deepcopy(net.state_dict())
        if best[1] is None:
            raise InputError("pre-training on complete modalities gave no finite loss; look at the features' scale")
        net.load_state_dict(best[1])
        with atomic(path, "wb") as f:
            f.write(save(best[1]))
    return net, path


@torch.no_grad()
def predict(learner, rows, t, size=512):
    """Outputs (n,C) for utterances rows (n,) with the modalities of task t."""
    learner.eval()
    return torch.cat([learner.output(learner.store.batch(part, t)) for part in rows.split(size)]).float()


def train_task(learner, a, run, bar, name, t, rows, tasks, val, resume=None):
    """One task: rows (n,) with their tasks, a number or (n,); val: list of (rows, task).  Keeps the best epoch on val.

    Raises InputError where the loss is not finite.
    """
    store, device = learner.store, learner.store.y.device
    trainable = {n: p for n, p in learner.named_parameters() if p.requires_grad}
    if not trainable:
        return
    optimizer = adam(trainable.values(), a.lr, device)               # a new one for every task
    best, first = {"loss": math.inf, "weights": {}}, 0
    if resume:
        optimizer.load_state_dict(resume["optimizer"])
        best, first = resume["best"], resume["epoch"] + 1
    else:
        learner.begin(t, rows)
    for epoch in range(first, a.epochs):
        learner.train()
        shuffle = torch.Generator().manual_seed(run.args["seed"] * 1_000_003 + t * 1009 + epoch)
        total = 0.0
        for step, part in enumerate(torch.randperm(len(rows), generator=shuffle).to(device).split(a.batch)):
            b = store.batch(rows[part], tasks[part] if torch.is_tensor(tasks) else tasks)
            with torch.autocast(device.type, torch.bfloat16, enabled=a.dtype == "bf16"):
                loss = learner.loss(b)
            if not loss.isfinite():
                raise InputError(f"the loss is {loss.item()} in task {name}, epoch {epoch + 1}, step {step + 1} at "
                                 f"--lr {a.lr}; use a smaller --lr or a smaller --weight")
            optimizer.zero_grad()
            loss.backward()
            learner.edit_gradients()
            nn.utils.clip_grad_norm_(trainable.values(), a.clip)
            optimizer.step()
            learner.observe(b, epoch)
            total += loss.item() * len(part)
        value = float(np.mean([store.loss(predict(learner, r, k), store.y[r]).item() for r, k in val]))
        if value < best["loss"] or not best["weights"]:
            best = {"loss": value, "weights": {n: p.detach().clone() for n, p in trainable.items()}}
        bar.update()
        bar.set_postfix(task=name, epoch=epoch + 1, loss=f"{total / len(rows):.3f}", val=f"{value:.3f}")
        run.log(task=name, epoch=epoch + 1, loss=total / len(rows), val_loss=value, minutes=run.minutes)
        if epoch + 1 < a.epochs:                                     # after the last one run_one writes the task's own
            run.checkpoint(t=run.stage, epoch=epoch, learner=learner.state_dict(), optimizer=optimizer.state_dict(),
                           best=best, A=run.A.tolist(), rng=rng_state(device))
    with torch.no_grad():
        for n, p in trainable.items():
            p.copy_(best["weights"][n])
    learner.end(t, rows)


def run_one(a, fold, seed, folder, stream):
    """One fold and seed, from the pre-trained backbone to results.json, whose content is returned."""
    device, T = torch.device(a.device), len(stream)
    net, cached = pretrain(a, stream, device)
    torch.use_deterministic_algorithms(True, warn_only=True)         # two threads, one result
    torch.manual_seed(seed)
    store = Store(stream, a.patterns, device)
    learner = METHODS[a.method](net, store, a).to(device)
    rows = [{k: torch.as_tensor(getattr(task, k).rows, device=device) for k in ("train", "val", "test")}
            for task in stream.tasks]
    names = [stream.tasks[k].name for k in a.order]
    run = Run(folder, settings(a, fold, seed), a.resume)
    run.A, start, state, scores = np.full((T, T), np.nan), 0, run.state, []
    if state:
        learner.load_state_dict(state["learner"])
        run.A, start, scores = np.array(state["A"]), state["t"], state.get("scores", [])
        torch.set_rng_state(state["rng"][0])
        if device.type == "cuda":
            torch.cuda.set_rng_state(state["rng"][-1], device)
    score = lambda t: metrics.affect_scores(predict(learner, rows[t][a.split], t).cpu().numpy(),
                                            store.y[rows[t][a.split]].cpu().numpy(), store.scoring)
    stages = 1 if learner.joint else T
    bar = tqdm(total=stages * a.epochs, initial=min(start, stages) * a.epochs, desc=f"{a.method} seed {seed}",
               leave=False, disable=a.quiet)
    for stage in range(start, stages):
        run.stage, resume = stage, state if state and stage == start and state["epoch"] >= 0 else None
        if learner.joint:                                            # every utterance with every pattern, mixed
            number = torch.cat([torch.full_like(r["train"], t) for t, r in enumerate(rows)])
            train_task(learner, a, run, bar, "all", 0, torch.cat([r["train"] for r in rows]), number,
                       [(r["val"], t) for t, r in enumerate(rows)], resume)
            stage = T - 1
        else:
            t = a.order[stage]
            train_task(learner, a, run, bar, names[stage], t, rows[t]["train"], t, [(rows[t]["val"], t)], resume)
        scores = [score(t) for t in a.order[:stage + 1]]
        run.A[stage, :stage + 1] = [x["accuracy"] for x in scores]
        if not (a.quiet or learner.joint):
            bar.write(f"after task {stage + 1} of {T}\n" + metrics.format_matrix(run.A[:stage + 1], names))
        run.checkpoint(t=stage + 1, epoch=-1, learner=learner.state_dict(), A=run.A.tolist(), rng=rng_state(device),
                       scores=scores)
    bar.close()
    values = {"AA": float(np.mean(run.A[-1]))}
    if not learner.joint:
        values |= {"FM_max": metrics.forgetting(run.A), "FM_diag": metrics.forgetting(run.A, "own")}
    trainable = {n: p for n, p in learner.named_parameters() if p.requires_grad}
    results = run.finish(
        run.A, names, values, trainable if learner.frozen else None, f"{a.method}: accuracy after each task",
        final=dict(zip(names, scores)), trainable=sum(p.numel() for p in trainable.values()),
        backbone=sum(p.numel() for p in net.parameters()), backbone_file=cached.name, world=stream.extra["version"],
        **learner.extras())
    if "task_aware_cosine" in results:                               # in the order of Table 1, whatever --order
        cosine_map(a, results["task_aware_cosine"], Path(folder) / "task_aware_cosine.png")
    return results


def cosine_map(a, cosine, path):
    names = [pattern_name(p) for p in a.patterns]
    metrics.heat_map(cosine, path, names, names, "cosine of the task-aware prompts z_t", -1.0, 1.0)


def run_seeds(a, folder):
    """All folds and seeds of one configuration -> list of results."""
    jobs = [{"fold": fold, "seed": seed} for fold in a.folds for seed in a.seeds]

    def one(job, where):
        stream = make_stream(a, **job)
        if job == jobs[0]:
            print_config(a, stream)
        return run_one(a, **job, folder=where, stream=stream)
    return metrics.run_jobs(f"{a.method} {a.data}", jobs, one, folder, COLUMNS)


def make_stream(a, fold, seed):
    world = SMOKE_WORLD if a.smoke else None
    return affect_stream(a.data, a.patterns, a.root, a.samples, fold, seed, a.max_length, world)


def print_config(a, stream):
    extra, task = stream.extra, stream.tasks[0]
    learner = METHODS[a.method](make_backbone(a, stream), Store(stream, a.patterns), a)
    count = sum(p.numel() for p in learner.parameters() if p.requires_grad)
    backbone = sum(p.numel() for p in learner.net.parameters())
    sizes = ", ".join(f"{m} {extra['lengths'][m]}x{extra['dims'][m]}" for m in MODALITIES)
    print(f"missing modalities (arXiv 2503.00528v1)   method {a.method}   backbone {a.backbone}, "
          f"{a.layers}+{a.fusion_layers} layers, D {a.width}\n"
          f"data      {extra['version']}: {sizes}; {len(task.train)} train, {len(task.val)} val, {len(task.test)} test "
          f"per task, {a.samples}\n"
          f"tasks     {' -> '.join(stream.tasks[k].name for k in a.order)}   (available: a audio, v video, l text)\n"
          f"learned   {count} of {backbone} parameters, {100 * count / backbone:.1f} %; lr {a.lr:g}, batch {a.batch}, "
          f"{a.epochs} epochs, weight {learner.strength:g}{f', buffer {a.buffer}' if learner.buffered else ''}\n"
          f"protocol  no task id at test but the pattern, which the input shows; select on validation, report test\n"
          f"runs      seeds {' '.join(map(str, a.seeds))}; torch {torch.__version__}, {a.device}, {a.dtype}")
    for note in stream.notes:
        print(note)


# -------------------------------------------------------------------------------------- tables of the paper, and speed
COLUMNS = ("AA", "FM_max", "FM_diag")
# (row, changed settings, the paper's AA and FM on CMU-MOSI)
METHOD_ROWS = [
    ("iCaRL, buffer 250", {"method": "icarl"}, 64.12, 3.49), ("A-GEM, buffer 250", {"method": "agem"}, 63.18, 4.10),
    ("ER, buffer 250", {"method": "er"}, 65.78, 3.44), ("DER++, buffer 250", {"method": "derpp"}, 64.62, 2.74),
    ("iCaRL, buffer 500", {"method": "icarl", "buffer": 500}, 66.81, 2.01),
    ("A-GEM, buffer 500", {"method": "agem", "buffer": 500}, 65.12, 2.88),
    ("ER, buffer 500", {"method": "er", "buffer": 500}, 68.91, 1.12),
    ("DER++, buffer 500", {"method": "derpp", "buffer": 500}, 67.02, 0.69),
    ("EWC", {"method": "ewc"}, 66.44, 1.75), ("LwF", {"method": "lwf"}, 64.56, 2.97),
    ("L2P", {"method": "l2p"}, 63.79, 2.67),
    ("DualPrompt", {"method": "dualprompt"}, 67.23, 0.73), ("S-Prompts", {"method": "sprompts"}, 64.83, 3.57),
    ("MPLMM", {"method": "mplmm"}, 70.35, 2.18), ("ours", {"method": "prompts"}, 71.87, -0.15),
    ("lower bound", {"method": "finetune"}, 62.34, 6.18), ("upper bound", {"method": "joint"}, 71.19, None),
    ("upper bound (ours)", {"method": "joint-prompts"}, 73.20, None),
    ("frozen, no prompts", {"method": "none"}, None, None)]
ALONE = {"pairs": "none"}                                            # without L_con
TABLES = {                                                           # title, the row others are compared with, rows
    "2": ("Table 2: all methods", "ours", METHOD_ROWS),
    "3": ("Table 3: kinds of prompts, without task interaction", "MS TA TS", [
        ("none (lower bound)", {"method": "finetune"}, 62.34, 6.18), ("MS", {"prompts": ["MS"], **ALONE}, 64.07, 4.01),
        ("TA", {"prompts": ["TA"], **ALONE}, 66.21, 3.24), ("TS", {"prompts": ["TS"], **ALONE}, 68.01, 1.27),
        ("MS TA", {"prompts": ["MS", "TA"], **ALONE}, 69.16, 2.08),
        ("MS TS", {"prompts": ["MS", "TS"], **ALONE}, 70.34, 0.74),
        ("TA TS", {"prompts": ["TA", "TS"], **ALONE}, 70.51, 0.31), ("MS TA TS", ALONE, 70.91, 0.13)]),
    "4": ("Table 4: task interaction (the values in the paper's rows 4 to 6 are lost: ours)", "default", [
        ("without L_con", ALONE, 70.91, 0.13), ("without l(i,j), l(j,i)", {"pairs": "second"}, 71.14, 0.09),
        ("without l(m,n), l(n,m)", {"pairs": "first"}, 71.42, 0.06), ("lambda 0.5", {"trade_off": 0.5}, 71.52, 0.04),
        ("lambda 2", {"trade_off": 2.0}, 71.69, 0.01), ("gamma 0.5", {"weight": 0.5}, 71.58, -0.04),
        ("default", {}, 71.87, -0.15)]),
    "5": ("Table 5: order of the kinds", "MS TA TS", [
        ("MS TA TS", {}, 71.87, -0.15), ("MS TS TA", {"sequence": ["MS", "TS", "TA"]}, 70.96, -0.03),
        ("TA MS TS", {"sequence": ["TA", "MS", "TS"]}, 71.23, 0.06),
        ("TA TS MS", {"sequence": ["TA", "TS", "MS"]}, 70.57, 0.04),
        ("TS MS TA", {"sequence": ["TS", "MS", "TA"]}, 70.00, 0.10),
        ("TS TA MS", {"sequence": ["TS", "TA", "MS"]}, 69.98, 0.28)]),
    "6": ("Table 6: where prompts are attached (the labels of rows 3 and 4 are lost: ours)", "layers 1 2 3", [
        ("layers 3 4 5", {"start": 2}, 70.06, 0.23), ("layers 1 2 3", {}, 71.87, -0.15),
        ("N_M N_A N_S = 2 1 1", {"depths": [2, 1, 1]}, 71.10, 0.07),
        ("N_M N_A N_S = 1 2 2", {"depths": [1, 2, 2]}, 71.42, -0.09)]),
    "fig5": ("Figure 5: prompt length (the paper prints no numbers: it rises, falls, and peaks at 16)", "L = 16", [
        (f"L = {n}", {"length": n}, None, None) for n in (1, 2, 4, 8, 16, 24, 32, 48)])}


def run_table(a, folder):
    """One of TABLES, a run for every row, fold and seed: see metrics.run_table."""
    title, reference, rows = TABLES[a.table]
    rows = [(label, changes, None if paper == [None, None] else paper) for label, changes, *paper in rows]

    def set_up(b):
        if b.method != a.method:                                     # --lr and --weight are meant for --method
            b.lr, b.weight = METHODS[b.method].lr, None
        return b, settings(b, b.fold, b.seed)

    def more(done):
        cosines = [r["task_aware_cosine"] for r in done[reference].values() if "task_aware_cosine" in r]
        if cosines:
            cosine_map(a, np.mean(cosines, 0), folder / f"table{a.table}_cosine.png")
        return []
    stream = functools.lru_cache(1)(lambda fold, seed: make_stream(a, fold, seed))
    metrics.run_table(a, f"{title}; {a.data}, {a.epochs} epochs; the paper's numbers are its CMU-MOSI", rows,
                      [{"fold": fold, "seed": seed} for seed in a.seeds for fold in a.folds], set_up,
                      lambda b, where: run_one(b, b.fold, b.seed, where, stream(b.fold, b.seed)), folder,
                      COLUMNS, ("AA",), lambda label: reference, "AA / FM", a.rows, more)


def bench(a, steps=30):
    """Step time, memory kept for the backward pass, and parameters, against the frozen backbone without prompts."""
    stream = make_stream(a, a.folds[0], a.seeds[0])
    rows = torch.as_tensor(stream.tasks[0].train.rows[:a.batch], device=a.device)
    wait = torch.cuda.synchronize if a.device.startswith("cuda") else lambda: None
    base = None
    for name in dict.fromkeys(("none", a.method, "finetune")):
        net, store = make_backbone(a, stream).to(a.device), Store(stream, a.patterns, a.device)
        learner = METHODS[name](net, store, a).to(a.device)
        count, kept, times = sum(p.numel() for p in learner.parameters() if p.requires_grad), {}, []
        note = lambda x: kept.update({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()}) or x
        learner.train()
        for i in range(steps + 5):
            wait()
            start = time.perf_counter()
            with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x) if i == 0 else contextlib.nullcontext(), \
                    torch.set_grad_enabled(count > 0):
                loss = learner.loss(learner.store.batch(rows, a.order[0]))
                if count:
                    learner.zero_grad()
                    loss.backward()
            wait()
            times.append(1e3 * (time.perf_counter() - start))
        backbone, ms = sum(p.numel() for p in learner.net.parameters()), float(np.median(times[5:]))
        if base is None:
            base = ms
            print(f"batch {len(rows)}, {a.data}, backbone {a.backbone} with {backbone} parameters, {a.device}, "
                  f"{torch.get_num_threads()} threads\n{'':14}ms/step  x frozen  samples/s  MiB for backward  learned")
        print(f"{name:12}{ms:9.1f}  {ms / base:8.1f}  {1e3 * len(rows) / ms:9.0f}  "
              f"{sum(kept.values()) / 2 ** 20:16.1f}  {count} ({100 * count / backbone:.2f} %)"
              + ("  forward only" if not count else ""))


# ------------------------------------------------------------------------------------------------------- command line
SMOKE_WORLD = {"train": 64, "val": 64, "test": 96, "upstream": 256, "upstream_val": 64}


def settings(a, fold, seed):
    """What decides the outcome of a run, as a flat dict."""
    skip = {"folds", "seeds", "out", "resume", "quiet", "table", "rows", "bench", "patterns"}
    return {**{k: v for k, v in sorted(vars(a).items()) if k not in skip}, "fold": fold, "seed": seed}


def arguments(argv=None):
    p = argparse.ArgumentParser(description="Prompts for missing modalities that arrive one after the other (arXiv 2503.00528).")
    add, yes = p.add_argument, argparse.BooleanOptionalAction
    add("--data", default="mini",
        help="mini (default), mini4 (four classes), <file>.npz, or mosi, mosei, sims, iemocap with --root")
    add("--root", help="folder (or file) of mosi, mosei, sims, iemocap")
    add("--folds", type=int, nargs="+", default=[0], help="of <file>.npz, or IEMOCAP's cross-validation sets; from 0")
    add("--samples", default="shared", choices=("shared", "disjoint"),
        help="do tasks mask the same utterances or own ones (open)")
    add("--max-length", type=int, default=50, help="longer sequences are averaged over that many windows (real data)")
    add("--order", type=int, nargs="+", help="order in which Table 1's tasks arrive, from 0; default as numbered")
    add("--method", default="prompts", choices=list(METHODS),
        help="prompts = the paper's (default); its bounds; baselines")
    add("--backbone", default="msa", choices=list(BACKBONES),
        help="msa: self-attention encoders; mult: crossmodal ones (open)")
    add("--width", type=int, default=30, help="D of prompts and backbone; paper 30")
    add("--heads", type=int, default=5)
    add("--layers", type=int, default=5, help="MSA layers of each modality (open in the paper)")
    add("--fusion-layers", type=int, default=3, help="layers over the three sequences together (open in the paper)")
    add("--dropout", type=float, default=0.1, help="in the backbone, while it learns")
    add("--pre-epochs", type=int, default=20, help="epochs of pre-training on complete modalities")
    add("--length", type=int, default=16, help="prompt length L; paper 16 (Figure 5)")
    add("--prompts", nargs="*", default=list(KINDS), choices=KINDS, metavar="KIND",
        help="kinds attached, of MS TA TS (Table 3)")
    add("--sequence", nargs=3, default=list(KINDS), choices=KINDS, metavar="KIND",
        help="their order; paper MS TA TS (Table 5)")
    add("--depths", nargs=3, type=int, default=[1, 1, 1], metavar=("N_M", "N_A", "N_S"),
        help="layers that carry each kind (lost)")
    add("--start", type=int, default=0, help="first layer with a prompt, from 0 (Table 6)")
    add("--keep", action=yes, default=False,
        help="prompts stay in the sequence; default: dropped after their layer (open)")
    add("--keys", default="shared", choices=("shared", "modality"),
        help="one pair of missing keys, or one per modality (open)")
    add("--init-std", type=float, default=0.02, help="spread of the prompts at the start (open)")
    add("--pairs", default="both", choices=("both", "first", "second", "none"),
        help="pairs in Eq. 7: (i,j), (m,n) (Table 4)")
    add("--trade-off", type=float, default=1.0, help="lambda of Eq. 7 (value lost)")
    add("--tau", type=float, default=0.5, help="temperature of Eq. 6 (value lost)")
    add("--gamma", "--weight", dest="weight", type=float,
        help="gamma of Eq. 8 (value lost); for a baseline the weight of its own term: DER++ alpha, EWC lambda, iCaRL, "
        "LwF, L2P, DualPrompt; default tuned per method")
    add("--buffer", type=int, default=250, help="samples kept by iCaRL, A-GEM, ER, DER++; paper 250 and 500")
    add("--epochs", type=int, help="per task; default 30 as in the paper, 6 on mini")
    add("--batch", type=int, default=64, help="paper 64")
    add("--lr", type=float, help="Adam's learning rate (value lost); default tuned per method")
    add("--clip", type=float, default=0.8, help="limit of the gradient norm")
    add("--seeds", type=int, nargs="+", default=[0])
    add("--split", default="test", choices=("test", "val"), help="what is scored; val is to choose settings on")
    add("--device", help="cuda, mps or cpu; default the first there is")
    add("--dtype", default="fp32", choices=("fp32", "bf16"))
    add("--smoke", action=yes, default=False, help="a tiny world and two epochs: does everything run?")
    add("--resume", action=yes, default=False, help="go on from the last finished epoch")
    add("--out", help="folder of the run; default runs/missing_prompt-<method>")
    add("--table", choices=list(TABLES),
        help="run every row of that table of the paper, print it beside the paper's numbers")
    add("--rows", nargs="+", help="with --table: only these rows, by label; finished others are shown too")
    add("--bench", action=yes, default=False,
        help="time, memory and parameters against the frozen backbone without prompts")
    return p.parse_args(argv)


def resolve(a):
    """Fill in what depends on other arguments, and check.  Raises InputError."""
    a.patterns, a.quiet = PATTERNS, False
    T, learner = len(a.patterns), METHODS[a.method]
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    a.device = a.device or ("cuda" if cuda else "mps" if mps else "cpu")
    a.order = list(range(T)) if a.order is None else a.order
    if a.smoke:
        a.epochs, a.pre_epochs = 2 if a.epochs is None else a.epochs, min(a.pre_epochs, 2)
    a.epochs = (6 if a.data in ("mini", "mini4") else 30) if a.epochs is None else a.epochs
    a.lr = learner.lr if a.lr is None else a.lr
    for option, values, wanted in (("order", a.order, range(T)), ("sequence", a.sequence, KINDS)):
        if sorted(values) != sorted(wanted):
            raise InputError(f"--{option} needs each of {' '.join(map(str, wanted))} once, "
                             f"not {' '.join(map(str, values))}")
    for name in "epochs pre_epochs batch length width heads layers fusion_layers buffer max_length lr tau clip".split():
        if not getattr(a, name) > 0:
            raise InputError(f"--{name.replace('_', '-')} must be positive, not {getattr(a, name)}")
    if min(*a.depths, a.start) < 0:
        raise InputError("--depths and --start must not be negative")
    if len({*a.seeds}) < len(a.seeds) or len({*a.folds}) < len(a.folds):
        raise InputError("--seeds and --folds must not repeat a number: the same run twice is no second measurement")
    try:
        torch.device(a.device)
    except RuntimeError:
        raise InputError(f"--device is cuda, cuda:<n>, mps or cpu, not {a.device!r}") from None
    return a


def main(argv=None):
    a = resolve(arguments(argv))
    if a.data in ("mini", "mini4") and a.device == "cpu":            # matrices so small that threads only wait
        torch.set_num_threads(1)
    if a.bench:
        bench(a)
    elif a.table:
        run_table(a, Path(a.out or "runs/missing_prompt-tables"))
    else:
        run_seeds(a, Path(a.out or f"runs/missing_prompt-{a.method}"))


if __name__ == "__main__":
    run_cli(main)
