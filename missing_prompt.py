"""Prompts for missing modalities that arrive one case after the other, in one file.

Paper     Guo, Wang, Lin, Yan, Wu, Jin: Efficient Prompting for Continual Adaptation to Missing Modalities.
          NAACL 2025 (long.219), arXiv 2503.00528v1.
Official  no code is public.  Our copy of the paper holds none of its formulas: they are reconstructed here
          from its words, under its equation numbers; docs/missing_prompt.md says how sure each is.
Run       python missing_prompt.py                       the paper's method on mini-affect, nothing downloaded
          python missing_prompt.py --method finetune     the lower bound; --help names the others

Idea.  A model that knows audio, video and text together is frozen.  Then seven tasks arrive: each is one case
of missing modalities (Table 1).  Three kinds of prompts adapt the model: modality-specific (Eq. 1),
task-aware, made from those and two missing keys (Eq. 2-4), and task-specific (Eq. 5); a contrastive loss on
the task-aware ones lets similar cases help each other (Eq. 6-8).

Shapes    B batch · T tasks = cases of missing modalities · t current task · L prompt length · D width
          H heads · M = 3 modalities: a audio, v video, l text · n steps of a modality's sequence
          C outputs (1 score, or classes).  (B,n,D) is a shape; Eq. n is the paper's number.

Call path, from the command line to the line where the prompts enter the backbone
    main                          reads the flags; a run for each seed
    run                           the protocol: task after task, test on all tasks seen so far
    learn_task                    epochs over one task
    MissingModalityPrompts.loss   Eq. 8 on a batch
    Store.batch                   utterances with modalities missing, already projected: {m: (B,n,D)}
    MissingPrompts.attach         which prompt each layer gets: Eq. 1 (P^m), Eq. 2-4 (P_A(t)), Eq. 5 (P_S^t)
    MultimodalTransformer.encode  walks through the layers of each modality, then through the fusion layers
    MSALayer.forward              attention over [P ; h]: here the prompt enters, for its layer alone
    Head                          the score, or the classes
"""
import contextlib
import copy
import functools
import itertools
import math
import sys
import time
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import data
import metrics
from data import InputError

# ================================================================================================== the paper
# Section 3 of the paper in the order of its equations, and nothing else: this part copies out by itself.
MODALITIES = ("audio", "video", "text")
# Table 1: what is available in task 1..7.  Our copy holds none of its cells; this is one of the orders that
# fit the text: "tasks 2 and 3, tasks 5 and 7" (Figure 4) must be the pairs that turn into each other when
# audio and text swap.
PATTERNS = tuple(map(frozenset, (("audio", "video", "text"), ("audio", "video"), ("video", "text"),
                                 ("audio", "text"), ("audio",), ("video",), ("text",))))
# The positive pairs (i,j) and (m,n) of Eq. 7, from 0: such as turn into each other when audio and text swap.
PAIRS = ((1, 2), (4, 6))                                        # av and vl, a and l
KINDS = ("MS", "TA", "TS")                                      # modality-specific, task-aware, task-specific


class MissingPrompts(nn.Module):
    """The three kinds of prompts and where they are attached.  Section 3.2, Eq. 1-5.

    patterns   T frozensets of available modalities; a task is a pattern, so its number is visible in the input
    sequence   the order of the kinds from the first layer on (Table 5)
    depths     N_M, N_A, N_S: how many layers carry each kind, by kind, not place
    kinds      the kinds that are attached; a kind left out leaves its layers without prompt (Table 3)
    start      the first layer with a prompt, from 0 (Table 6)     layers   MSA layers of each modality
    keys       "shared": one k_miss and one k_avail; "modality": a pair for each modality
    specific   "shared": one P_S^t for the three modalities; "modality": one each
    init       standard deviation of the prompts.  Zero is refused: Eq. 2 multiplies two trained tensors, and with
               both at zero neither ever receives a gradient; k_avail = k_miss makes all task-aware prompts equal.
    Raises ValueError where the prompts do not fit into the layers.
    """

    def __init__(self, width=30, length=16, patterns=PATTERNS, kinds=KINDS, sequence=KINDS, depths=(1, 1, 1),
                 start=0, layers=5, keys="shared", init=0.02, specific="shared"):
        super().__init__()
        if init <= 0:
            raise ValueError("init must be positive: prompts of zero times keys never learn (Eq. 2)")
        # Which kind each layer carries: none before `start`, then N_M, N_A and N_S layers, then none again.
        plan = [kind for kind in sequence for _ in range(depths[KINDS.index(kind)])]
        if start + len(plan) > layers:
            raise ValueError(f"--start {start} and N_M+N_A+N_S = {len(plan)} need {start + len(plan)} layers, "
                             f"the backbone has {layers}; use a smaller --start or --depths, or more --layers")
        after = layers - start - len(plan)
        self.plan = [None] * start + [kind if kind in kinds else None for kind in plan] + [None] * after
        # What is trained.  Prompts start small; a key multiplies them, so "available" starts near one, which
        # leaves a prompt as it is, and "missing" elsewhere, which makes the cases differ from the first step.
        T, M, groups = len(patterns), len(MODALITIES), 1 if keys == "shared" else len(MODALITIES)
        aware = "TA" in self.plan                            # P_M is also what task-aware prompts are made of
        normal = lambda used, spread, *shape: nn.Parameter(spread * torch.randn(*shape)) if used else None
        self.P_M = normal(aware or "MS" in self.plan, init, M, length, width)                        # (M,L,D)
        own = (M, length, width) if specific == "modality" else (length, width)
        self.P_S = normal("TS" in self.plan, init, T, *own)                                      # (T,[M,]L,D)
        self.k_miss = normal(aware, 0.5, groups, width)                                              # (1|M,D)
        self.k_avail = nn.Parameter(1 + 0.1 * torch.randn(groups, width)) if aware else None         # (1|M,D)
        missing = torch.tensor([[float(m not in p) for m in MODALITIES] for p in patterns])
        self.register_buffer("missing", missing, persistent=False)            # (T,M) e_m(t) = 1: m is missing

    def modality(self, m):
        """P^m (L,D), m a name or an index: the same in all tasks.                                    Eq. 1"""
        return self.P_M[MODALITIES.index(m) if isinstance(m, str) else m]

    def task_aware(self, t=slice(None)):
        """P_A(t) (L,D) for a number, (B,L,D) for (B,) task numbers, (T,L,D) without argument.      Eq. 2-3"""
        # A modality's prompt is scaled, feature by feature, by the key for "missing" or for "available".
        # P_A^m(t) = [ e_m(t) k_miss + (1 - e_m(t)) k_avail ] * P^m  the key is broadcast to the L rows  Eq. 2
        e = self.missing[t][..., None]                                                  # (..,M,1)
        key = e * self.k_miss + (1 - e) * self.k_avail                                  # (..,M,D)
        # The prompt of the case is what the three modalities say together.
        # P_A(t) = sum_m P_A^m(t)                                                                        Eq. 3
        return torch.einsum("...md,mld->...ld", key, self.P_M)                  # (..,M,D) (M,L,D) -> (..,L,D)

    def task_specific(self, t):
        """P_S^t (L,D) for a number, (B,L,D) for (B,) task numbers: only its own task trains it.      Eq. 5"""
        return self.P_S[t]

    def z(self):
        """z_t = mean over the L rows of P_A(t), (T,D): what Eq. 6 compares."""
        return self.task_aware().mean(1)

    def attach(self, t):
        """What each MSA layer gets in task t: one entry per layer, None or {modality: (1|B,L,D)}.

        The layer reads [P ; h], the prompt in front of the sequence (MSALayer.forward).
        """
        batch = lambda P: P if P.dim() == 3 else P[None]                                # (L,D) -> (1,L,D)
        at = {None: None}
        if "MS" in self.plan:
            # The first N_M layers: a prompt for each modality.
            # h_i^m = MSA_i^m([P^m ; h_{i-1}^m])       i = 1 .. N_M                                      Eq. 1
            at["MS"] = {m: batch(self.modality(m)) for m in MODALITIES}
        if "TA" in self.plan:
            # The next N_A: one prompt for all three modalities, made for the case.
            # h_i^m = MSA_i^m([P_A(t) ; h_{i-1}^m])    i = N_M+1 .. N_M+N_A                              Eq. 4
            at["TA"] = dict.fromkeys(MODALITIES, batch(self.task_aware(t)))
        if "TS" in self.plan:
            # The last N_S: a prompt that belongs to the case alone.
            # h_i^m = MSA_i^m([P_S^t ; h_{i-1}^m])     i = N_M+N_A+1 .. N_M+N_A+N_S                      Eq. 5
            P_S = self.task_specific(t)
            each = P_S.unbind(-3) if self.P_S.dim() == 4 else [P_S] * len(MODALITIES)
            at["TS"] = {m: batch(P) for m, P in zip(MODALITIES, each)}
        return [at[kind] for kind in self.plan]


def prepended(layer, P, h):
    """A layer reads [P ; h], and the L outputs at the prompt's places are dropped: Eq. 1, 4 and 5 literally.

    layer: any map (B,n,D) -> (B,n,D).  P (B,L,D), h (B,n,D) -> (B,n,D).  MSALayer computes the same with half
    the work.
    """
    return layer(torch.cat([P, h], 1))[:, P.shape[1]:]               # (B,L+n,D) -> (B,n,D)


def nt_xent(z, i, j, tau=0.5):
    """The modified NT-Xent loss of the positive pair (i,j) among all task-aware prompts z (T,D), ().      Eq. 6"""
    # z_j should be nearer to z_i than any other z_k; the positive stays in the sum, as in SimCLR.
    # l(i,j) = -log  exp(sim(z_i,z_j)/tau) / sum_k 1[k != i] exp(sim(z_i,z_k)/tau),   sim = cosine       Eq. 6
    sim = F.cosine_similarity(z[i], z, dim=-1) / tau                                    # (D,) (T,D) -> (T,)
    others = torch.arange(len(z), device=z.device) != i                                 # (T,)
    return torch.logsumexp(sim[others], 0) - sim[j]


def task_interaction_loss(z, pairs=PAIRS, trade_off=1.0, tau=0.5):
    """The contrastive task interaction loss on z (T,D), (); a pair that is None is left out (Table 4).    Eq. 7"""
    # Both pairs, each in both directions; lambda (trade_off) weighs the second.
    # L_con = [l(i,j) + l(j,i)] + lambda [l(m,n) + l(n,m)]                                               Eq. 7
    loss = z.new_zeros(())
    for weight, pair in zip((1.0, trade_off), pairs):
        if pair:
            i, j = pair
            loss = loss + weight * (nt_xent(z, i, j, tau) + nt_xent(z, j, i, tau))
    return loss


def total_loss(L_task, L_con, gamma):
    """The loss of a batch: the task's own (L1 for a score, cross-entropy for classes) and L_con."""
    # L = L_task(yhat, y) + gamma L_con                                                                  Eq. 8
    return L_task + gamma * L_con


# =============================================================================================== the backbone
# A transformer that knows all three modalities: a self-attention encoder for each, then self-attention over
# the three sequences together.  It is trained on complete modalities, then frozen.  On the built-in world it
# is shipped (backbones/); for anything else it is trained before the first task and kept in the cache (see
# the last section).


class Prefix(NamedTuple):
    """DualPrompt's prompt: one half for a layer's keys, one for its values, (1|B,L,D) each."""
    keys: torch.Tensor
    values: torch.Tensor


class MSALayer(nn.Module):
    """One pre-norm transformer layer, MSA_i^m of the paper.  Raises ValueError if heads H do not divide width D."""

    def __init__(self, width, heads, dropout=0.1):
        super().__init__()
        if width % heads:
            raise ValueError(f"--heads {heads} must divide --width {width}")
        self.H, self.rate = heads, dropout
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, h, P=None):
        """h (B,n,D), P (1|B,L,D), a Prefix or None -> (B,n,D): MSA([P ; h]) less the outputs at P's places."""
        # Attention over [P ; h].  The outputs at the prompt's places are dropped after the layer, so the prompt
        # is needed as keys and values only: what `prepended` says, for half the work.         Eq. 1, 4, 5
        P_k, P_v = self.prompt_keys_values(P)                       # 2 x (1|B,H,L,D/H), or None twice
        if P_k is not None:                                 # one row of a missing modality, B rows of prompts
            h = h.expand(max(len(h), len(P_k)), -1, -1)
        q, k, v = self.split(self.qkv(self.norm1(h)))                                   # 3 x (B,H,n,D/H)
        return self.finish(h, q, self.in_front(P_k, k), self.in_front(P_v, v))          # keys (B,H,L+n,D/H)

    def split(self, x):
        """(B,n,c*D) -> c tensors (B,H,n,D/H): one for each of queries, keys, values, cut into heads."""
        size = self.norm1.normalized_shape[0] // self.H
        return x.unflatten(-1, (-1, self.H, size)).permute(2, 0, 3, 1, 4)

    def keys_values(self, x):
        """Keys and values of x (B,n,D), 2 x (B,H,n,D/H)."""
        D = x.shape[-1]
        return self.split(F.linear(self.norm1(x), self.qkv.weight[D:], self.qkv.bias[D:]))

    def prompt_keys_values(self, P):
        """Those of a prompt; a Prefix brings a half for the keys and a half for the values."""
        if isinstance(P, Prefix):
            return self.keys_values(P.keys)[0], self.keys_values(P.values)[1]
        return (None, None) if P is None else self.keys_values(P)

    @staticmethod
    def in_front(P, x):
        """[P ; x] for P (1|B,H,L,D/H) or None and x (B,H,n,D/H)."""
        return x if P is None else torch.cat([P.expand(len(x), -1, -1, -1), x], 2)

    def finish(self, h, q, k, v):
        """Attention, its residual, and the feed-forward part."""
        a = F.scaled_dot_product_attention(q, k, v, dropout_p=self.rate if self.training else 0.0)
        h = h + F.dropout(self.out(a.transpose(1, 2).flatten(2)), self.rate, self.training)
        return h + F.dropout(self.down(F.relu(self.up(self.norm2(h)))), self.rate, self.training)


class CrossLayer(MSALayer):
    """The same layer with queries of one modality, keys and values of another, as in MulT."""

    def forward(self, h, source, P=None):
        """h (B,n,D) asks source (B,n',D), a prompt (1|B,L,D) or Prefix in front of it -> (B,n,D)."""
        q, _, _ = self.split(self.qkv(self.norm1(h)))
        k, v = self.keys_values(source)
        P_k, P_v = self.prompt_keys_values(P)
        return self.finish(h, q, self.in_front(P_k, k), self.in_front(P_v, v))


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
    """The backbone: a self-attention encoder per modality, then self-attention over the three together.

    dims {m: feature dimension}, outputs C.  The paper says "the multimodal transformer", writes MSA_i^a,
    MSA_i^v, MSA_i^l and 2-3 % trainable parameters; this reading fits all (--backbone mult is another).
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
        """Raw features {m: (B,n,d)}, zeros if missing -> {m: (B,n,D)}: projection and positions."""
        D = self.width
        return {m: math.sqrt(D) * self.project[m](v) + positions(v.shape[1], D, v) for m, v in x.items()}

    def encode(self, h, prompts=(), keep=False):
        """h {m: (B,n,D)} from embed, prompts: an entry per layer and fusion layer -> (B,D), read at position 0.

        A modality that is missing in the whole batch comes as one row: its stream runs once and is repeated.
        keep: a prompt goes in at its group's first layer and stays until the next group takes its place.
        """
        prompts = [*prompts] + [None] * (self.depth - len(prompts))
        done = [self.stream(m, h, prompts[:self.layers], keep) for m in ("text", "audio", "video")]
        x = torch.cat(done, 1)                                                       # (B, n_l + n_a + n_v, D)
        for layer, P in zip(self.fusion, prompts[self.layers:]):
            x = layer(x, P)
        return self.norm(x[:, 0])                                                    # position 0 is a feature

    def stream(self, m, h, prompts, keep=False):
        """Modality m through its own layers.  h and keep as above, prompts: an entry per layer -> (B,n,D)"""
        B = max(len(x) for x in h.values())
        x = h[m].expand(B, -1, -1) if self.training else h[m]        # dropout differs from row to row
        own = [p[m] if p else None for p in prompts]
        if keep:
            x = self.walk_and_keep(self.streams[m], x, own)
        else:
            for layer, P in zip(self.streams[m], own):
                x = layer(x, P)                                      # here the prompts enter, and leave again
        return x.expand(B, -1, -1)

    def summaries(self, h):
        """One vector for each modality: the mean of its stream's outputs.  h as above -> (B,M,D)"""
        return torch.stack([self.stream(m, h, [None] * self.layers).mean(1) for m in MODALITIES], 1)

    @staticmethod
    def walk_and_keep(layers, x, prompts):
        """Through the layers, with prompts that stay behind the sequence until others take their place."""
        slot, previous, n = x[:, :0], None, x.shape[1]               # at first nothing stands there
        for layer, P in zip(layers, prompts):
            if P is not None and P is not previous:
                slot = previous = P
            rows = max(len(x), len(slot))
            x = layer(torch.cat([x.expand(rows, -1, -1), slot.expand(rows, -1, -1)], 1))
            x, slot = x[:, :n], x[:, n:]
        return torch.cat([x, slot], 1)

    def forward(self, h, prompts=(), keep=False):
        return self.head(self.encode(h, prompts, keep))                                 # (B,C)


class MulT(MultimodalTransformer):
    """MulT (Tsai et al. 2019) as the backbone: each modality attends to the other two, layer by layer.

    Crossmodal layers have no self-attention: a prompt among the queries would reach nobody, so it joins the
    keys and values, with the prompt of the modality that is looked at.  No causal mask.
    """

    def __init__(self, dims, outputs, width=30, heads=5, layers=5, fusion=3, dropout=0.1):
        super().__init__(dims, outputs, width, heads, 0, 0, dropout)
        stack = lambda n, kind, w: nn.ModuleList(kind(w, heads, dropout) for _ in range(n))
        self.layers, self.features = layers, 6 * width
        names = [f"{m}<{s}" for m in MODALITIES for s in MODALITIES if m != s]
        self.cross = nn.ModuleDict({name: stack(layers, CrossLayer, width) for name in names})
        self.memory = nn.ModuleDict({m: stack(fusion, MSALayer, 2 * width) for m in MODALITIES})
        self.norm, self.head = nn.LayerNorm(6 * width), Head(6 * width, outputs, dropout)

    def encode(self, h, prompts=(), keep=False):
        """As above, (B,6D).  Raises InputError for keep: in crossmodal layers a prompt has no place to stay."""
        if keep:
            raise InputError("keep needs --backbone msa: in MulT's crossmodal layers a prompt has no place to stay")
        prompts = [*prompts] + [None] * self.layers
        B, read = max(len(x) for x in h.values()), []
        h = {m: x.expand(B, -1, -1) for m, x in h.items()}
        for m in MODALITIES:
            both = []
            for s in (s for s in MODALITIES if s != m):
                x = h[m]
                for layer, p in zip(self.cross[f"{m}<{s}"], prompts):
                    x = layer(x, h[s], p[s] if p else None)
                both.append(x)
            x = torch.cat(both, -1)                                                     # (B,n_m,2D)
            for layer in self.memory[m]:
                x = layer(x)
            read.append(x[:, -1])
        return self.norm(torch.cat(read, -1))                                           # (B,6D)


BACKBONES = {"msa": MultimodalTransformer, "mult": MulT}


def make_backbone(args, stream):
    """An untrained backbone.  Raises InputError where its parts do not fit."""
    with metrics.one_clear_line():
        sizes = args.width, args.heads, args.layers, args.fusion_layers
        return BACKBONES[args.backbone](stream.extra["dims"], stream.extra["outputs"], *sizes).to(args.device)


def load_backbone(args, stream):
    """The backbone, trained on complete modalities: the shipped one, or one from the cache, or made now."""
    gpus = [torch.device(args.device)] if args.device.startswith("cuda") else []
    with torch.random.fork_rng(gpus):                   # its start and training leave the run's numbers alone
        torch.manual_seed(args.backbone_seed)
        net = make_backbone(args, stream)
        if is_shipped(args):
            net.load_state_dict(metrics.small_backbone("mini-affect", args.backbone_seed, affect_config(args)))
        else:
            cached_backbone(args, stream, net)
    return net


# ========================================================================================== compared methods
# A method is a backbone with what it adds.  The protocol of every method:
#     begin_task(t, rows)   before task t, rows (n,) are its training utterances
#     forward(b)            a Batch -> (B,C), in training and at test
#     loss(b)               a Batch -> (), what a step makes smaller
#     end_task(t, rows)     after the task
# A few also use edit_gradients(), between backward and step, and observe(b, epoch), after the step.
# Class attributes: lr, its own rate; weight, of its own loss term; frozen, whether the backbone is;
# one_stage, whether it learns everything at once; buffered, whether it keeps past samples.


class Batch(NamedTuple):
    x: dict                # {m: (B,n,d)} features, projected where the backbone is frozen; (1,n,d) if missing
    y: torch.Tensor        # (B,)
    present: torch.Tensor  # (B,M) bool
    task: object           # the task's number, or (B,) numbers in a mixed batch
    rows: torch.Tensor     # (B,)


class Store:
    """The utterances of a stream as tensors; makes batches with modalities missing, and scores outputs."""

    def __init__(self, stream, device="cpu"):
        self.scoring, self.outputs = stream.extra["scoring"], stream.extra["outputs"]
        self.x = {m: torch.as_tensor(x, device=device) for m, x in stream.extra["features"].items()}
        self.blank = {m: torch.zeros_like(x[0]) for m, x in self.x.items()}         # (n,d) a missing modality
        self.y = torch.as_tensor(stream.extra["label"], device=device)
        self.present = torch.tensor([[m in p for m in MODALITIES] for p in PATTERNS], device=device)   # (T,M)

    @torch.no_grad()
    def project(self, net):
        """Replace raw features by net.embed of them, once: right while the backbone is frozen."""
        seen = lambda m, x: torch.cat([net.embed({m: part})[m] for part in x.split(1024)])
        self.x = {m: seen(m, x) for m, x in self.x.items()}
        self.blank = {m: net.embed({m: x[None]})[m][0] for m, x in self.blank.items()}

    def batch(self, rows, task=0):
        """rows (B,), task: a number, or (B,) numbers; task 0 has all modalities."""
        present = self.present[task].expand(len(rows), -1)                              # (B,M)
        if torch.is_tensor(task):
            x = {m: torch.where(present[:, i, None, None], self.x[m][rows], self.blank[m])
                 for i, m in enumerate(MODALITIES)}
        else:                                                # one pattern for all: what is missing is one row
            x = {m: self.x[m][rows] if m in PATTERNS[task] else self.blank[m][None] for m in MODALITIES}
        return Batch(x, self.y[rows], present, task, rows)

    def loss(self, output, y):
        """L_task: L1 for sentiment, cross-entropy for classes.  Section 4.3."""
        return F.cross_entropy(output, y) if self.scoring == "classes" else F.l1_loss(output[:, 0], y)

    def distill(self, output, old):
        """How far outputs moved from old ones: squared distance, or KL at temperature 2 for classes."""
        if self.scoring != "classes":
            return F.mse_loss(output, old)
        return 4 * F.kl_div((output / 2).log_softmax(-1), (old / 2).softmax(-1), reduction="batchmean")


class Method(nn.Module):
    """What all methods share: the backbone `net`, the utterances `store`, and hooks that do nothing."""
    lr, weight, frozen, one_stage, buffered = 3.3e-4, 0.0, False, False, False
    lr_added = None                                    # of what a method adds to the backbone; None: the same lr

    def __init__(self, net, store, args):
        super().__init__()
        self.net, self.store = net, store
        self.weight = self.weight if args.weight is None else args.weight
        self.register_buffer("tasks", torch.zeros((), dtype=torch.long))     # learned (not counted by EWC, iCaRL)
        if self.frozen:
            net.requires_grad_(False).eval()
            store.project(net)

    def train(self, mode=True):
        super().train(mode)
        if self.frozen:
            self.net.eval()                                          # no dropout inside what does not learn
        return self

    def nothing(self, *_):
        """What a method does in a hook that it has no use for."""

    begin_task = edit_gradients = observe = nothing

    def forward(self, b):
        """At test nothing but the input may decide: b.task is the pattern that the input shows."""
        return self.net(b.x if self.frozen else self.net.embed(b.x))

    def loss(self, b):
        return self.store.loss(self(b), b.y)

    def end_task(self, t, rows):
        self.tasks += 1

    def extras(self):
        """What results.json should know besides."""
        return {}


class MissingModalityPrompts(Method):
    """The paper's method: a frozen backbone, three kinds of prompts, contrastive interaction of the tasks.

    keep: prompts stay in the sequence until the next kind takes their place.  init: their spread at the start.
    specific: as in MissingPrompts.  head: the read-out learns, too.  shared: whether P_M and the keys, which
    all tasks share, learn "always" or in the "first" task only.
    """
    lr, frozen = 3e-2, True

    def __init__(self, net, store, args, keep=False, init=0.02, specific="shared", head=False, shared="always"):
        super().__init__(net, store, args)
        self.prompts = MissingPrompts(net.width, args.length, PATTERNS, args.prompts, args.sequence, args.depths,
                                      args.start, net.layers, args.keys, init, specific)
        net.head.requires_grad_(head)
        self.keep, self.gamma, self.trade_off, self.tau = keep, args.gamma, args.trade_off, args.tau
        self.shared = shared
        self.pairs = {"both": PAIRS, "first": (PAIRS[0], None), "second": (None, PAIRS[1]), "none": ()}[args.pairs]

    def forward(self, b):
        return self.net(b.x, self.prompts.attach(b.task), self.keep)                    # Eq. 1-5

    def edit_gradients(self):
        if self.shared == "first" and self.tasks > 0:
            for p in (self.prompts.P_M, self.prompts.k_avail, self.prompts.k_miss):
                if p is not None:
                    p.grad = None

    def contrastive(self):
        """L_con: zero where there are no task-aware prompts or no pairs to compare."""
        if self.prompts.k_miss is None or not self.pairs:
            return torch.zeros((), device=self.store.y.device)
        with torch.autocast(self.store.y.device.type, enabled=False):        # bf16 would blur cosines near 1
            return task_interaction_loss(self.prompts.z(), self.pairs, self.trade_off, self.tau)  # Eq. 6-7

    def loss(self, b):
        return total_loss(self.store.loss(self(b), b.y), self.contrastive(), self.gamma)          # Eq. 8

    def extras(self):
        if self.prompts.k_miss is None:
            return {}
        z = F.normalize(self.prompts.z().detach(), dim=-1)
        return {"task_aware_cosine": (z @ z.T).cpu().numpy()}        # (T,T), instead of Figure 4's t-SNE


class JointPrompts(MissingModalityPrompts):
    """Upperbound (Ours): the paper's prompts trained on all tasks mixed, i.i.d."""
    lr, one_stage = 1e-2, True


class Frozen(Method):
    """The pre-trained backbone as it is: what there is before any adaptation."""
    frozen, one_stage = True, True


class Finetune(Method):
    """Sequential fine-tuning of everything: the paper's lower bound."""
    lr = 1.1e-4


class Joint(Method):
    """Upper bound: everything is trained on all tasks mixed, i.i.d."""
    lr, one_stage = 1e-3, True


# ---- with a buffer of past samples


class ER(Method):
    """Experience replay (Chaudhry et al. 2019b): a second batch in every step, from a reservoir of the past."""
    buffered, lr, every_epoch = True, 1e-3, False               # is a sample offered once, or in every epoch?

    def __init__(self, net, store, args):
        super().__init__(net, store, args)
        size = args.buffer
        self.register_buffer("kept", torch.zeros(2, size, dtype=torch.long))        # utterance, task
        self.register_buffer("kept_output", torch.zeros(size, store.outputs))
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    def observe(self, b, epoch):
        # reservoir: sample s, from 0, takes place j ~ U{0..s} if j < size: each is kept with size / (s + 1)
        size = self.kept.shape[1]
        for i in range(len(b.rows) if epoch == 0 or self.every_epoch else 0):
            s = int(self.seen)
            j = s if s < size else int(torch.randint(s + 1, ()))
            self.seen += 1
            if j < size:
                self.kept[:, j] = torch.tensor([int(b.rows[i]), b.task])
                self.kept_output[j] = self.latest[i]

    def recall(self, n, before=-1):
        """n random places of the buffer, fewer while it holds fewer.  before: a task whose own samples stay out."""
        filled = min(int(self.seen), self.kept.shape[1])
        places = torch.randperm(filled, device=self.kept.device)
        return places[self.kept[1, places] != before][:n]

    def together(self, b, *places):
        """Outputs and labels of the new batch and of each replayed one, in one pass through the model."""
        rows = torch.cat([b.rows, *(self.kept[0, j] for j in places)])
        task = torch.cat([torch.full_like(b.rows, b.task), *(self.kept[1, j] for j in places)])
        sizes, mixed = [len(b.rows), *map(len, places)], self.store.batch(rows, task)
        outputs = self(mixed).split(sizes)
        self.latest = outputs[0].detach()                            # what observe stores
        return [(o, y) for o, y in zip(outputs, mixed.y.split(sizes)) if len(y)]

    def loss(self, b):
        return sum(self.store.loss(*pair) for pair in self.together(b, self.recall(len(b.rows))))


class DERpp(ER):
    """DER++ (Buzzega et al. 2020): L_task + alpha |f(x) - stored output|^2 + beta L_task on another draw.

    Samples are offered in every epoch: the outputs of a model that has hardly learned are no knowledge to keep.
    """
    weight, beta, every_epoch = 0.3, 0.5, True                       # weight is alpha

    def loss(self, b):
        j, again = self.recall(len(b.rows)), self.recall(len(b.rows))
        new, *old = self.together(b, j, again)
        loss = self.store.loss(*new)
        if old:
            loss = loss + self.weight * F.mse_loss(old[0][0], self.kept_output[j])
            loss = loss + self.beta * self.store.loss(*old[1])
        return loss


class AGEM(ER):
    """A-GEM (Chaudhry et al. 2019a): what in the gradient would raise the loss on earlier tasks is taken out."""

    def loss(self, b):
        j = self.recall(len(b.rows), before=b.task)                  # drawn here, used by edit_gradients
        self.old = self.store.batch(self.kept[0, j], self.kept[1, j])
        output = self(b)
        self.latest = output.detach()
        return self.store.loss(output, b.y)

    def edit_gradients(self):
        if not len(self.old.rows):
            return
        parameters = [p for p in self.parameters() if p.grad is not None]
        g = torch.cat([p.grad.flatten() for p in parameters])
        loss = self.store.loss(self(self.old), self.old.y)
        ref = torch.autograd.grad(loss, parameters, materialize_grads=True)
        # g <- g - (g . g_ref / g_ref . g_ref) g_ref   where g . g_ref < 0
        g = project_away(g, torch.cat([x.flatten() for x in ref]))
        for p, part in zip(parameters, g.split([p.numel() for p in parameters])):
            p.grad = part.view_as(p).clone()


def project_away(g, ref):
    """A-GEM's update: g (P,) where it agrees with ref (P,), else g without its component along ref."""
    dot = g @ ref
    return g if dot >= 0 else g - dot / (ref @ ref) * ref


class Distilling(Method):
    """What iCaRL and LwF share: the model before the task, and how far the outputs moved away from its."""

    def __init__(self, net, store, args):
        super().__init__(net, store, args)
        self.old = copy.deepcopy(net).requires_grad_(False)

    def train(self, mode=True):
        super().train(mode)
        self.old.eval()                                              # what it said, without dropout
        return self

    def begin_task(self, t, rows):
        self.old.load_state_dict(self.net.state_dict())

    def moved(self, output, b):
        with torch.no_grad():
            before = self.old(self.old.embed(b.x))
        return self.store.distill(output, before)


class ICaRL(Distilling):
    """iCaRL (Rebuffi et al. 2017): herded exemplars of every task; on them, distillation from the last model.

    Its nearest-mean classifier has no meaning for a sentiment score; prediction stays the head's.
    """
    buffered, lr, weight = True, 1e-3, 1.0

    def __init__(self, net, store, args):
        super().__init__(net, store, args)
        self.register_buffer("kept", torch.full((2, args.buffer), -1))              # utterance, task; -1 free

    def loss(self, b):
        loss = super().loss(b)
        full = (self.kept[0] >= 0).nonzero()[:, 0]
        if len(full):
            j = full[torch.randperm(len(full))[:len(b.rows)]]
            old = self.store.batch(self.kept[0, j], self.kept[1, j])
            output = self(old)
            loss = loss + self.store.loss(output, old.y) + self.weight * self.moved(output, old)
        return loss

    @torch.no_grad()
    def end_task(self, t, rows):
        tasks = [*dict.fromkeys(self.kept[1][self.kept[0] >= 0].tolist()), t]
        share = self.kept.shape[1] // len(tasks)
        kept = [self.kept[:, self.kept[1] == k][:, :share] for k in tasks[:-1]]  # herding order: the first are best
        parts = [self.store.batch(some, t) for some in rows.split(256)]
        feature = torch.cat([self.net.encode(self.net.embed(b.x)) for b in parts])
        chosen = rows[herd(F.normalize(feature, dim=-1), share)]
        kept = torch.cat([*kept, torch.stack([chosen, torch.full_like(chosen, t)])], 1)
        self.kept.fill_(-1)
        self.kept[:, :kept.shape[1]] = kept


def herd(feature, k):
    """Herding, (N,D) -> at most k indices: each next one brings the mean of the chosen closest to that of all."""
    mean, total, chosen = feature.mean(0), torch.zeros_like(feature[0]), []
    free = torch.ones(len(feature), dtype=torch.bool, device=feature.device)
    for i in range(min(k, len(feature))):
        gap = (mean - (total + feature) / (i + 1)).norm(dim=-1).masked_fill(~free, math.inf)     # (N,)
        best = int(gap.argmin())
        total, free[best] = total + feature[best], False
        chosen.append(best)
    return torch.tensor(chosen, dtype=torch.long, device=feature.device)


# ---- with regularisation


class EWC(Method):
    """EWC, online (Kirkpatrick et al. 2017): stay near the last weights where they mattered to any task."""
    lr, weight = 1e-3, 4000.0                                        # weight is lambda

    def __init__(self, net, store, args):
        super().__init__(net, store, args)
        size = sum(p.numel() for p in self.parameters())
        self.register_buffer("anchor", torch.zeros(size))
        self.register_buffer("fisher", torch.zeros(size))

    def loss(self, b):
        # L_task + lambda/2 sum_k F_k (theta_k - theta*_k)^2
        theta = torch.cat([p.flatten() for p in self.parameters()])
        return super().loss(b) + self.weight / 2 * (self.fisher * (theta - self.anchor) ** 2).sum()

    def end_task(self, t, rows):
        # F_k += mean over samples of (d loss / d theta_k)^2, one sample at a time: squaring a batch mean is
        # not Fisher
        parameters, samples = list(self.parameters()), rows[torch.randperm(len(rows))[:32]]
        for row in samples:
            b = self.store.batch(row[None], t)
            g = torch.autograd.grad(self.store.loss(self(b), b.y), parameters, materialize_grads=True)
            self.fisher += torch.cat([x.flatten() for x in g]) ** 2 / len(samples)
        self.anchor.copy_(torch.cat([p.detach().flatten() for p in parameters]))


class LwF(Distilling):
    """LwF (Li and Hoiem 2017): on the new task's inputs, keep the outputs that the model gave before it."""
    weight = 0.3                                                     # of 0.1 to 10, by validation on seed 100

    def loss(self, b):
        output = self(b)
        loss = self.store.loss(output, b.y)
        return loss + self.weight * self.moved(output, b) if self.tasks else loss


# ---- that know about modalities, trained like the lower bound


class Summarised(Method):
    """What MISA, MMIN and MCTN share: each works on one summary a modality, and what it makes of them, (B,D),
    is added to what the read-out sees.  The map that adds it starts at zero: all start like fine-tuning.
    """
    lr, lr_added = 3.3e-4, 1e-3      # what is added is new: at the backbone's rate it would hardly leave its start

    def __init__(self, net, store, args):
        super().__init__(net, store, args)
        self.add = nn.Linear(net.width, net.features, bias=False)
        nn.init.zeros_(self.add.weight)

    def forward(self, b):
        return self.predict(b)[0]

    def predict(self, b):
        """(outputs (B,C), summaries (B,M,D), whatever `made` returns besides)."""
        h = self.net.embed(b.x)
        summaries = self.net.summaries(h)
        vector, made = self.made(summaries, b)
        return self.net.head(self.net.encode(h) + self.add(vector)), summaries, made


class MISA(Summarised):
    """MISA (Hazarika et al. 2020): of each summary a part alike for all modalities, and one of its own.

    Alike by central moments, own by orthogonality, and both together rebuild the summary.
    """
    weight = 0.1                                                     # of the three losses together

    def __init__(self, net, store, args):
        super().__init__(net, store, args)
        D, M = net.width, len(MODALITIES)
        self.shared, self.join = nn.Linear(D, D), nn.TransformerEncoderLayer(D, 1, 2 * D, batch_first=True)
        self.private, self.rebuild = (nn.ModuleList(nn.Linear(D, D) for _ in range(M)) for _ in range(2))

    def made(self, h, b):
        shared = torch.sigmoid(self.shared(h))                                          # (B,M,D)
        private = torch.sigmoid(torch.stack([f(h[:, i]) for i, f in enumerate(self.private)], 1))
        return self.join(torch.cat([shared, private], 1)).mean(1), (shared, private)    # attention over six

    def loss(self, b):
        output, h, (shared, private) = self.predict(b)
        M, there = range(len(MODALITIES)), b.present                                    # (B,M)

        def on(f, x, i, y, j):                                       # of the samples that have both modalities
            rows = there[:, i] & there[:, j]
            return f(x[rows, i], y[rows, j]) if rows.sum() > 1 else 0.0
        pairs = list(itertools.combinations(M, 2))
        alike = sum(on(moments_apart, shared, i, shared, j) for i, j in pairs) / len(pairs)
        overlap = sum(on(crossing, shared, i, private, i) for i in M)
        overlap = overlap + sum(on(crossing, private, i, private, j) for i, j in pairs)
        rebuilt = torch.stack([f(shared[:, i] + private[:, i]) for i, f in enumerate(self.rebuild)], 1)
        again = F.mse_loss(rebuilt[there], h[there])
        return self.store.loss(output, b.y) + self.weight * (alike + overlap + again)


def moments_apart(x, y, orders=5):
    """Central moment discrepancy of two samples (B,D) with numbers in [0,1] -> ()."""
    x0, y0 = x.mean(0), y.mean(0)
    apart = (x0 - y0).norm()
    for k in range(2, orders + 1):
        apart = apart + (((x - x0) ** k).mean(0) - ((y - y0) ** k).mean(0)).norm()
    return apart


def crossing(x, y):
    """Mean squared entry of x^T y (D,D) after centring and scaling the rows of x, y (B,D): 0 if orthogonal."""
    x, y = (F.normalize(z - z.mean(0), dim=-1) for z in (x, y))
    return (x.T @ y).square().mean()


class MMIN(Summarised):
    """MMIN (Zhao et al. 2021): residual autoencoders imagine the missing summaries from those that are there.

    They learn it where everything is there, by hiding some: never from what is masked.  On later tasks the
    task loss alone reaches them.
    """
    lr, weight = 1.1e-4, 1.0                                         # weight of imagination and its way back

    def __init__(self, net, store, args):
        super().__init__(net, store, args)
        wide = len(MODALITIES) * net.width
        code = lambda: nn.Sequential(nn.Linear(wide, net.width), nn.ReLU(), nn.Linear(net.width, wide))
        self.forth, self.back = (nn.ModuleList(code() for _ in range(3)) for _ in range(2))

    @staticmethod
    def cascade(blocks, h):
        x = h.flatten(1)                                             # each adds to the sum of those before it
        for block in blocks:
            x = x + block(x)
        return x.view_as(h)                                                             # (B,M,D)

    def made(self, h, b):
        there = b.present[..., None]                                                    # (B,M,1)
        return torch.where(there, h, self.cascade(self.forth, h * there)).mean(1), None

    def loss(self, b):
        output, h, _ = self.predict(b)
        loss = self.store.loss(output, b.y)
        if not b.present.all():
            return loss
        hidden = self.store.present[torch.randint(1, len(PATTERNS), (len(h),))][..., None]           # (B,M,1)
        whole, seen = h.detach(), h.detach() * hidden
        imagined = self.cascade(self.forth, seen)
        again = self.cascade(self.back, imagined)                    # and back to what there was
        return loss + self.weight * (F.mse_loss(imagined, whole) + F.mse_loss(again * hidden, seen))


class MCTN(Summarised):
    """In the style of MCTN (Pham et al. 2019): one modality is encoded so that the others can be decoded from
    the code, and it again from them; the code predicts.

    On summaries, not sequences.  Text is encoded, or what is there; with one modality nothing is translated.
    """
    lr, lr_added, weight = 1.1e-4, 3e-3, 0.1                         # weight of the translations

    def __init__(self, net, store, args):
        super().__init__(net, store, args)
        D = net.width
        self.encoders, self.decoders = (nn.ModuleList(nn.Sequential(nn.Linear(D, D), nn.ReLU(), nn.Linear(D, D))
                                                      for _ in MODALITIES) for _ in range(2))

    def made(self, h, b):
        source, *others = [i for i, m in enumerate(MODALITIES) if m in PATTERNS[b.task]][::-1]       # text is last
        code = self.encoders[source](h[:, source])
        return code, (source, others)

    def loss(self, b):
        output, h, (source, others) = self.predict(b)
        # MCTN translates features, which are constants: else a summary would move against its own translation
        loss, h = self.store.loss(output, b.y), h.detach()
        code = self.encoders[source](h[:, source])
        for i in others:
            there = self.decoders[i](code)
            again = self.decoders[source](self.encoders[i](there))
            loss = loss + self.weight * (F.mse_loss(there, h[:, i]) + F.mse_loss(again, h[:, source]))
        return loss


# ---- with prompts


class Prompted(Method):
    """What prompt baselines share: a frozen backbone, and its own unprompted read-out as the query."""
    frozen, lr = True, 1e-2

    def __init__(self, net, store, args):
        super().__init__(net, store, args)
        self.known = {}                                              # task -> (N,D), nan where not yet asked

    @torch.no_grad()
    def query(self, b):
        """Batch of one task -> (B,D), of unit length, in float32; computed once for each utterance and task."""
        if b.task not in self.known:
            shape = len(self.store.y), self.net.features
            self.known[b.task] = torch.full(shape, math.nan, device=b.y.device)
        known = self.known[b.task]
        new = b.rows[known[b.rows, 0].isnan()]
        if len(new):
            with torch.autocast(new.device.type, enabled=False):    # bf16 would take near keys for each other
                known[new] = F.normalize(self.net.encode(self.store.batch(new, b.task).x), dim=-1)
        return known[b.rows]

    def match(self, b):
        """How near the query is to each key, (B,K), in float32."""
        with torch.autocast(b.rows.device.type, enabled=False):
            return self.query(b) @ F.normalize(self.keys, dim=-1).T


class L2P(Prompted):
    """L2P (Wang et al. 2022c): of 10 prompts of length 5, the 5 with the nearest keys go into layers 1-3."""
    lr, weight = 1.1e-3, 0.01

    def __init__(self, net, store, args):
        super().__init__(net, store, args)
        self.pool = nn.Parameter(0.02 * torch.randn(10, 5, net.width))
        self.keys = nn.Parameter(torch.randn(10, net.features))

    def select(self, b):
        return self.match(b).topk(5, dim=-1)                  # per sample: nobody else in the batch has a say

    def forward(self, b):
        prompt = self.pool[self.select(b).indices].flatten(1, 2)                        # (B,25,D)
        return self.net(b.x, [dict.fromkeys(MODALITIES, prompt)] * min(3, self.net.layers))

    def loss(self, b):
        return super().loss(b) + self.weight * (1 - self.select(b).values).sum(-1).mean()


class DualPrompt(Prompted):
    """DualPrompt (Wang et al. 2022b): a general prefix in layers 1-2, a task's own, found by its key, in 3-5;
    each of these layers has its own.

    A key starts at the mean query of its task: from a random start it would travel further than its steps allow.
    """
    lr, weight = 3e-2, 1.0

    def __init__(self, net, store, args):
        super().__init__(net, store, args)
        T, D = len(PATTERNS), net.width
        if net.layers < 3:
            raise ValueError(f"DualPrompt needs three layers at least, not --layers {net.layers}")
        self.general = nn.Parameter(0.02 * torch.randn(2, 2, 5, D))             # layers; prefix: keys, values
        self.expert = nn.Parameter(0.02 * torch.randn(net.layers - 2, T, 2, args.length, D))
        self.keys = nn.Parameter(torch.zeros(T, net.features))
        self.register_buffer("learned", torch.zeros(T, dtype=torch.bool))

    def begin_task(self, t, rows):
        self.learned[t] = True
        self.keys.data[t] = self.query(self.store.batch(rows, t)).mean(0)

    def chosen(self, b):
        """The task with the nearest key, (B,)."""
        return self.match(b).masked_fill(~self.learned, -math.inf).argmax(-1)

    def forward(self, b):
        # Training knows its task, test does not.
        task = [b.task] if self.training else self.chosen(b)
        pairs = [*self.general[:, None], *self.expert[:, task]]               # of each layer (1|B,2,L,D)
        return self.net(b.x, [dict.fromkeys(MODALITIES, Prefix(*pair.unbind(1))) for pair in pairs])

    def loss(self, b):
        return super().loss(b) + self.weight * (1 - self.match(b)[:, b.task]).mean()


class SPrompts(Prompted):
    """S-Prompts (Wang et al. 2022a): prompts for each task alone; at test the nearest k-means centre says which."""
    lr = 0.27

    def __init__(self, net, store, args):
        super().__init__(net, store, args)
        T = len(PATTERNS)
        self.prompts = nn.Parameter(0.02 * torch.randn(T, args.length, net.width))
        self.register_buffer("centres", torch.full((T, 5, net.features), math.inf))

    def chosen(self, b):
        """The task with the nearest centre, (B,); centres of tasks that are not learned are infinitely far."""
        return (self.query(b)[:, None, None] - self.centres).norm(dim=-1).amin(-1).argmin(-1)

    def forward(self, b):
        prompt = self.prompts[b.task][None] if self.training else self.prompts[self.chosen(b)]     # (1|B,L,D)
        return self.net(b.x, [dict.fromkeys(MODALITIES, prompt)] * min(3, self.net.layers))

    def begin_task(self, t, rows):
        self.centres[t] = kmeans(self.query(self.store.batch(rows, t)), 5)


def kmeans(x, k, steps=10):
    """Lloyd's algorithm, (N,D) -> centres (k,D); starts from k random rows."""
    centres = x[torch.randperm(len(x), device=x.device)[:k]].clone()
    centres = centres[torch.arange(k, device=x.device) % len(centres)]               # fewer rows than centres
    for _ in range(steps):
        nearest = F.one_hot(torch.cdist(x, centres).argmin(-1), k).to(x.dtype)          # (N,k)
        count = nearest.sum(0)[:, None]
        centres = torch.where(count > 0, nearest.T @ x / count.clamp(min=1), centres)
    return centres


class MPLMM(Prompted):
    """MPLMM (Guo et al. 2024c) on this backbone: generative prompts make up the missing modality from those
    at hand, signal prompts say for each modality whether it is real, missing-type prompts enter the fusion
    layers."""
    lr = 3e-2

    def __init__(self, net, store, args):
        super().__init__(net, store, args)
        D, L, M = net.width, args.length, len(MODALITIES)
        self.generative = nn.Parameter(0.02 * torch.randn(M, L, D))
        self.translate = nn.ModuleList(nn.Linear(D, D) for _ in MODALITIES)             # 1x1 convolutions
        self.signal = nn.Parameter(torch.zeros(M, 2, D))                                # missing, real
        self.kind = nn.Parameter(0.02 * torch.randn(M, 2, L, D))
        self.matrix = nn.Parameter(torch.zeros(D, D))       # of their product; kind could hold all of it here

    def forward(self, b):
        real = b.present.to(self.signal.dtype)                                          # (B,M)
        B, x = len(real), {}
        pooled = torch.stack([b.x[m].mean(1).expand(B, -1) for m in MODALITIES], 1)     # (B,M,D)
        at_hand = (pooled * real[..., None]).sum(1) / real.sum(1, keepdim=True)  # (B,D) mean of what is there
        for i, m in enumerate(MODALITIES):
            # a missing modality = its blank sequence + GELU(1x1 conv) of the generative prompt and what is there
            made = F.gelu(self.translate[i](self.generative[i].mean(0) + at_hand))[:, None]          # (B,1,D)
            signal = self.signal[i][b.present[:, i].long()][:, None]                    # (B,1,D)
            x[m] = b.x[m].expand(B, -1, -1) + made * (1 - real[:, i, None, None]) + signal
        kind = sum(self.kind[i][b.present[:, i].long()] for i in range(len(MODALITIES)))             # (B,L,D)
        kind = kind + kind @ self.matrix
        if isinstance(self.net, MulT):
            return self.net(x, [dict.fromkeys(MODALITIES, kind)])
        return self.net(x, [None] * self.net.layers + [kind])


METHODS = {"prompts": MissingModalityPrompts, "none": Frozen, "finetune": Finetune, "joint": Joint,
           "joint-prompts": JointPrompts, "icarl": ICaRL, "agem": AGEM, "er": ER, "derpp": DERpp, "ewc": EWC, "lwf": LwF,
           "misa": MISA, "mmin": MMIN, "mctn": MCTN, "l2p": L2P, "dualprompt": DualPrompt, "sprompts": SPrompts,
           "mplmm": MPLMM}


def build_method(args, backbone, stream):
    """The method that --method names.  Raises InputError where its arguments do not fit."""
    if METHODS[args.method].buffered and metrics.PROCESSES > 1:
        raise InputError(f"--method {args.method} fills one buffer, from one process: start it without torchrun")
    metrics.compiled(args, [layer for layer in backbone.modules() if isinstance(layer, MSALayer)])
    with metrics.one_clear_line():
        return METHODS[args.method](backbone, Store(stream, args.device), args, **args.options).to(args.device)


# ============================================================================================ learn and test
# The continual protocol: cases of missing modalities come one after the other, each with a new optimiser and
# no look back (except for the methods with a buffer); after each, every case seen so far is tested.  The case
# is visible in the input, so nobody has to tell the task.  The epoch with the lowest validation loss is kept.


def load_stream(args):
    """The tasks of a run, in the order asked for."""
    world = {**args.world, **(SMOKE_WORLD if args.smoke else {})}
    where = args.root, args.samples, args.fold, args.seed, args.max_length
    return data.affect_stream(args.data, PATTERNS, *where, world, args.standardize).reorder(args.order)


def number(task):
    """The number of a task in Table 1, from 0, whatever the order of arrival."""
    return PATTERNS.index(task.train.available)


def utterances(lesson, split, device):
    """The utterances of the tasks that are learned together: rows (n,) and each one's task (n,)."""
    rows = [torch.as_tensor(getattr(task, split).rows, device=device) for task in lesson]
    return torch.cat(rows), torch.cat([torch.full_like(r, number(task)) for r, task in zip(rows, lesson)])


@torch.no_grad()
def predict(args, method, part):
    """Outputs (n,C) for the utterances of one split of one task, and their labels (n,)."""
    method.eval()
    rows, t = torch.as_tensor(part.rows, device=args.device), PATTERNS.index(part.available)
    outputs = [method(method.store.batch(some, t)).float().cpu() for some in metrics.mine(rows)[0].split(args.eval_batch)]
    whole = torch.stack(metrics.gathered([*torch.cat(outputs)], len(rows)))
    return whole.to(args.device), method.store.y[rows]


def learn_task(args, backbone, method, lesson, run):
    """Learns one lesson with a new optimiser: a list with one task, or with all of them for joint training.

    Raises InputError where the loss is not finite.
    """
    store, device = method.store, torch.device(args.device)
    learning = {name: p for name, p in method.named_parameters() if p.requires_grad}
    if not learning:
        return
    groups = [{"params": [p for name, p in learning.items() if name.startswith("net.") == inside], "lr": rate}
              for inside, rate in ((True, args.lr), (False, method.lr_added or args.lr))]
    optimizer = adam([group for group in groups if group["params"]], args.lr, device)
    rows, tasks = utterances(lesson, "train", device)
    first = number(lesson[0])
    for epoch in run.epochs(args.epochs, learning, optimizer, "all" if len(lesson) > 1 else lesson[0].name):
        method.train()
        shuffle = torch.Generator().manual_seed(args.seed * 1_000_003 + first * 1009 + epoch)
        total = 0.0
        order = torch.randperm(len(rows), generator=shuffle).to(device)
        for step, whole in enumerate(run.bar(order.split(args.batch))):
            part, weight = metrics.mine(whole)
            b = store.batch(rows[part], tasks[part] if len(lesson) > 1 else first)
            with torch.autocast(device.type, torch.bfloat16, enabled=args.dtype == "bf16"):
                loss = method.loss(b) * weight
            value = metrics.summed(loss.detach()).item()
            run.check(value, step)
            optimizer.zero_grad()
            loss.backward()
            metrics.sum_gradients(learning.values())
            method.edit_gradients()
            nn.utils.clip_grad_norm_(learning.values(), args.grad_clip)
            optimizer.step()
            method.observe(b, epoch)
            total += value * len(whole)
        losses = [store.loss(*predict(args, method, task.val)).item() for task in lesson]
        run.keep(total / len(rows), score=-float(np.mean(losses)))


def adam(parameters, lr, device):
    return torch.optim.Adam(parameters, lr=lr, fused=device.type in ("cpu", "cuda"))


def evaluate(args, backbone, method, part):
    """Scores of one split of one task: "score", the accuracy in points, and what metrics.affect_scores knows."""
    output, label = predict(args, method, part)
    scores = metrics.affect_scores(output.cpu().numpy(), label.cpu().numpy(), method.store.scoring)
    return {"score": scores["accuracy"], **scores}


def run(args, folder):
    """One run with one fold and seed (args.fold, args.seed) in `folder` -> what its results.json holds."""
    metrics.prepare(args, is_small(args))
    stream = load_stream(args)
    backbone = load_backbone(args, stream)
    torch.manual_seed(args.seed)                  # what a method draws at its start depends on the seed alone
    method = build_method(args, backbone, stream)
    run = metrics.Run(folder, metrics.deciding(args), stream.names, args.resume, args.quiet, args.checkpoint_minutes)
    describe(args, stream, method, run)

    run.restore(method=method)                                       # of a run that was killed
    for stage, lesson in run.tasks([stream.tasks] if method.one_stage else [[task] for task in stream.tasks]):
        rows, t = utterances(lesson, "train", args.device)[0], number(lesson[0])
        if not run.begun:                                            # by a killed run
            method.begin_task(t, rows)
        learn_task(args, backbone, method, lesson, run)
        method.eval()                                    # a resumed run may have had no epoch left to learn
        method.end_task(t, rows)
        seen = stream.tasks if method.one_stage else stream.tasks[:stage + 1]
        run.kept["last"] = [evaluate(args, backbone, method, getattr(task, args.split)) for task in seen]
        run.row([one["score"] for one in run.kept["last"]])
    return finish(args, stream, method, run)


def describe(args, stream, method, run):
    """Prints what is about to run."""
    extra, task = stream.extra, stream.tasks[0]
    run.kept["trainable"] = count = sum(p.numel() for p in method.parameters() if p.requires_grad)
    total = sum(p.numel() for p in method.net.parameters())
    sizes = ", ".join(f"{m} {extra['lengths'][m]}x{extra['dims'][m]}" for m in MODALITIES)
    buffer = f", buffer {args.buffer}" if method.buffered else ""
    run.say(f"method    {args.method}   backbone {args.backbone} {args.backbone_seed}, D {args.width}, "
            f"{args.layers}+{args.fusion_layers} layers   seed {args.seed}   {args.device} {args.dtype}\n"
            f"data      {extra['version']}: {sizes}; {len(task.train)} train, {len(task.val)} val, "
            f"{len(task.test)} test per task, {args.samples}\n"
            f"tasks     {' -> '.join(stream.names)}   (available: a audio, v video, l text); no task id at test\n"
            f"learned   {count} of {total} parameters, {100 * count / total:.1f} %; lr {args.lr:g}, "
            f"batch {args.batch}, {args.epochs} epochs{buffer}")
    for note in stream.notes:
        run.say(note)


def finish(args, stream, method, run):
    """The metrics, and the files of a run."""
    last, A = dict(zip(stream.names, run.kept["last"])), run.A
    values = {"AA": float(np.mean(A[-1]))}
    if not method.one_stage:
        values |= {"FM_max": metrics.forgetting(A), "FM_diag": metrics.forgetting(A, "own")}
    if hasattr(method, "chosen"):                                   # how often the task's own prompt is found
        rows, tasks = utterances(stream.tasks, args.split, args.device)
        right = [method.chosen(method.store.batch(rows[tasks == t], t)) == t for t in tasks.unique().tolist()]
        values["right_prompt"] = 100 * float(torch.cat(right).float().mean())
    values["full"] = last[data.pattern_name(PATTERNS[0])]["score"]   # with all three modalities
    prompts = {name: p for name, p in method.named_parameters() if p.requires_grad} if method.frozen else None
    results = run.finish(values, prompts, f"{args.method}: accuracy after each task", final=last,
                         trainable=run.kept["trainable"], backbone=sum(p.numel() for p in method.net.parameters()),
                         world=stream.extra["version"], **method.extras())
    if "task_aware_cosine" in results:                             # in the order of Table 1, whatever --order
        cosine_map(results["task_aware_cosine"], run.folder / "task_aware_cosine.png")
    if args.data == "mini" and not args.smoke:
        bounds = {word: (word, "AA") for word in ("frozen", "fine-tuning", "joint")}
        run.say(metrics.worth("missing_prompt", stream.extra["version"], bounds))
    return results


def cosine_map(cosine, path):
    names = [data.pattern_name(p) for p in PATTERNS]
    metrics.heat_map(cosine, path, names, names, "cosine of the task-aware prompts z_t", -1.0, 1.0)


# ==================================================================================================== tables
# name: (title, the row that others are compared with, rows).  A row: its label, the arguments that make it,
# and what the paper prints for CMU-MOSI (AA, FM).  Our copy of the paper lost the cells of Tables 1, 3, 4, 5,
# 6: their labels are ours.
COLUMNS = ("AA", "FM_max", "FM_diag")
LINE = (*COLUMNS, "right_prompt")                                  # of the last line of a run
ALONE = {"pairs": "none"}                                            # without L_con
TABLES = {
    "2": ("Table 2: all methods", "ours", [
        *((f"{label}, buffer {size}", {"method": method, "buffer": size}, numbers)
          for label, method, size, numbers in (
              ("iCaRL", "icarl", 250, (64.12, 3.49)), ("A-GEM", "agem", 250, (63.18, 4.10)),
              ("ER", "er", 250, (65.78, 3.44)), ("DER++", "derpp", 250, (64.62, 2.74)),
              ("iCaRL", "icarl", 500, (66.81, 2.01)), ("A-GEM", "agem", 500, (65.12, 2.88)),
              ("ER", "er", 500, (68.91, 1.12)), ("DER++", "derpp", 500, (67.02, 0.69)))),
        *((label, {"method": method}, numbers) for label, method, numbers in (
            ("EWC", "ewc", (66.44, 1.75)), ("LwF", "lwf", (64.56, 2.97)), ("L2P", "l2p", (63.79, 2.67)),
            ("DualPrompt", "dualprompt", (67.23, 0.73)), ("S-Prompts", "sprompts", (64.83, 3.57)),
            ("MISA", "misa", (61.63, 6.75)), ("MCTN style", "mctn", (63.35, 4.17)),
            ("MMIN", "mmin", (65.31, 3.92)), ("MPLMM", "mplmm", (70.35, 2.18)), ("ours", "prompts", (71.87, -0.15)),
            ("lower bound", "finetune", (62.34, 6.18)), ("upper bound", "joint", (71.19, None)),
            ("upper bound (ours)", "joint-prompts", (73.20, None)), ("frozen, no prompts", "none", None)))]),
    "3": ("Table 3: kinds of prompts, without task interaction", "MS TA TS", [
        ("none (lower bound)", {"method": "finetune"}, (62.34, 6.18)),
        *((kinds, {"prompts": kinds.split(), **ALONE}, numbers) for kinds, numbers in (
            ("MS", (64.07, 4.01)), ("TA", (66.21, 3.24)), ("TS", (68.01, 1.27)), ("MS TA", (69.16, 2.08)),
            ("MS TS", (70.34, 0.74)), ("TA TS", (70.51, 0.31)), ("MS TA TS", (70.91, 0.13))))]),
    "4": ("Table 4: task interaction", "default", [
        ("without L_con", ALONE, (70.91, 0.13)), ("without l(i,j), l(j,i)", {"pairs": "second"}, (71.14, 0.09)),
        ("without l(m,n), l(n,m)", {"pairs": "first"}, (71.42, 0.06)), ("lambda 0.5", {"trade_off": 0.5}, (71.52, 0.04)),
        ("lambda 2", {"trade_off": 2.0}, (71.69, 0.01)), ("gamma 0.5", {"gamma": 0.5}, (71.58, -0.04)),
        ("default", {}, (71.87, -0.15))]),
    "5": ("Table 5: order of the kinds", "MS TA TS", [
        (order, {"sequence": order.split()}, numbers) for order, numbers in (
            ("MS TA TS", (71.87, -0.15)), ("MS TS TA", (70.96, -0.03)), ("TA MS TS", (71.23, 0.06)),
            ("TA TS MS", (70.57, 0.04)), ("TS MS TA", (70.00, 0.10)), ("TS TA MS", (69.98, 0.28)))]),
    "6": ("Table 6: where prompts are attached", "layers 1 2 3", [
        ("layers 3 4 5", {"start": 2}, (70.06, 0.23)), ("layers 1 2 3", {}, (71.87, -0.15)),
        ("N_M N_A N_S = 2 1 1", {"depths": [2, 1, 1]}, (71.10, 0.07)),
        ("N_M N_A N_S = 1 2 2", {"depths": [1, 2, 2]}, (71.42, -0.09))]),
    "open": ("What our copy leaves open", "as we read it", [
        ("as we read it", {}, None), ("keys of each modality", {"keys": "modality"}, None),
        ("P_S of each modality", {"options": {"specific": "modality"}}, None),
        ("the read-out learns", {"options": {"head": True}}, None),
        ("prompts stay in the sequence", {"options": {"keep": True}}, None),
        ("each task has its own utterances", {"samples": "disjoint"}, None)]),
    "why": ("What explains the order of the methods", "ours", [
        ("ours", {}, None), ("P_M and keys learn in task 1 only", {"options": {"shared": "first"}}, None),
        ("TS alone, in layers 1 2 3", {"prompts": ["TS"], "depths": [0, 0, 3], **ALONE}, None),
        ("30 epochs", {"epochs": 30}, None), ("lower bound, 30 epochs", {"method": "finetune", "epochs": 30}, None)]),
    # the spread of what makes a modality alone mean the opposite of what it means beside the others
    "habit": ("How much tasks contradict each other: the habit of mini-affect", "{} ours", [
        (f"habit={h} {label}", {"world": {"habit": float(h)} if h < 4 else {}, "method": method}, None)
        for h in (0, 1, 2, 4)                                        # 4 is mini-affect's own
        for label, method in (("ours", "prompts"), ("MPLMM", "mplmm"), ("EWC", "ewc"), ("lower bound", "finetune"),
                              ("upper bound", "joint"), ("frozen", "none"))]),
    "fig5": ("Figure 5: prompt length (the paper prints no numbers: it rises, falls, and peaks at 16)", "L = 16", [
        (f"L = {n}", {"length": n}, None) for n in (1, 2, 4, 8, 16, 24, 32, 48)]),
    "bounds": ("Bounds of the built-in world", None, [
        ("frozen", {"method": "none"}, None), ("fine-tuning", {"method": "finetune"}, None),
        ("joint", {"method": "joint"}, None), ("joint, prompts", {"method": "joint-prompts"}, None)]),
}


# ============================================================================================== command line
# The paper's own flags beside those that all three scripts share (metrics.shared_flags), and --bench.
SMOKE_WORLD = {"train": 64, "val": 64, "test": 96, "upstream": 256, "upstream_val": 64}


def bench(args):
    """Step time, memory kept for the backward pass, and parameters, against the frozen backbone.  In training
    S-Prompts is one plain prompt in three layers: the floor of any prompt method."""
    stream = load_stream(args)
    rows, _ = utterances(stream.tasks[:1], "train", args.device)
    rows, t, methods = rows[:args.batch], number(stream.tasks[0]), {}
    for name in dict.fromkeys(("none", args.method, "sprompts", "finetune")):
        args.method = name
        methods[name] = build_method(args, make_backbone(args, stream), stream).train()

    def step(method):
        loss = method.loss(method.store.batch(rows, t))
        if loss.requires_grad:                                       # not that of the frozen backbone
            method.zero_grad()
            loss.backward()

    steps = {name: functools.partial(step, method) for name, method in methods.items()}
    times = metrics.seconds(args.device, *steps.values(), repeats=30)
    total = sum(p.numel() for p in methods["none"].net.parameters())
    print(f"batch {len(rows)}, {args.data}, backbone {args.backbone} with {total} parameters, {args.device}, "
          f"{torch.get_num_threads()} threads\n{'':14}ms/step  x frozen  samples/s  MiB for backward  learned")
    for name, second in zip(methods, times):
        count = sum(p.numel() for p in methods[name].parameters() if p.requires_grad)
        print(f"{name:12}{1e3 * second:9.1f}  {second / times[0]:8.1f}  {len(rows) / second:9.0f}  "
              f"{metrics.for_backward_mb(steps[name]):16.1f}  {count} ({100 * count / total:.2f} %)"
              f"{'' if count else '  forward only'}")


def settle(args):
    """The arguments of one run, with the defaults that depend on others.  Raises InputError if they do not fit."""
    args = metrics.settle_shared(args)
    if args.world and not is_small(args):
        raise InputError(f"--table {args.table} changes the built-in world: it says nothing about --data {args.data}")
    args.lr = METHODS[args.method].lr if args.lr is None else args.lr
    args.epochs = args.epochs or (2 if args.smoke else 6 if is_small(args) else 30)
    return args


def is_small(args):
    """Is this one of the built-in worlds?"""
    return args.data in ("mini", "mini4")


def parse_args(argv=None):
    p = metrics.shared_flags("Prompts for missing modalities that arrive one after the other.  (open): the paper "
                             "does not say.", METHODS, TABLES,
                             "mini, mini4 (four classes), <file>.npz, or mosi, mosei, sims, iemocap with --root",
                             "msa: self-attention encoders; mult: crossmodal ones (open in the paper)",
                             backbone="msa", batch=64, eval_batch=512, grad_clip=0.8)
    add, number = p.add_argument, metrics.positive
    add("--folds", type=metrics.natural, nargs="+", default=[0], help="of <file>.npz, or IEMOCAP's sets")
    add("--samples", default="shared", choices=("shared", "disjoint"), help="are tasks the same utterances (open)")
    add("--standardize", default=True, action=metrics.YES_NO, help="real features: mean 0, spread 1 on train")
    add("--max-length", type=number, default=50, help="longer real sequences are averaged over that many windows")
    add("--width", type=number, default=30, help="D of prompts and backbone; paper 30")
    add("--heads", type=number, default=5, help="of the backbone's attention")
    add("--layers", type=number, default=5, help="MSA layers of each modality (open)")
    add("--fusion-layers", type=number, default=3, help="layers over the three sequences together (open)")
    add("--pre-epochs", type=number, default=20, help="epochs of pre-training on complete modalities")
    add("--length", type=number, default=16, help="prompt length L; paper 16 (Figure 5)")
    add("--prompts", nargs="*", default=list(KINDS), choices=KINDS, metavar="KIND", help="kinds attached (Table 3)")
    add("--sequence", nargs=3, default=list(KINDS), choices=KINDS, metavar="KIND", help="their order (Table 5)")
    add("--depths", nargs=3, type=metrics.natural, default=[1, 1, 1], metavar=("N_M", "N_A", "N_S"),
        help="layers that carry each kind (open)")
    add("--start", type=metrics.natural, default=0, help="first layer with a prompt, from 0 (Table 6)")
    add("--keys", default="shared", choices=("shared", "modality"), help="missing keys: one pair, or three (open)")
    add("--pairs", default="both", choices=("both", "first", "second", "none"), help="those in Eq. 7 (Table 4)")
    add("--trade-off", type=metrics.weight, default=1.0, help="lambda of Eq. 7 (open)")
    add("--tau", type=metrics.above_zero, default=0.5, help="temperature of Eq. 6 (open)")
    add("--gamma", type=metrics.weight, default=0.1, help="gamma of Eq. 8 (open)")
    add("--weight", type=metrics.weight, help="of a compared method's own loss term; default: the method's own")
    add("--buffer", type=number, default=250, help="samples kept by iCaRL, A-GEM, ER, DER++; paper 250, 500")
    args = metrics.check_shared(p.parse_args(argv))
    args.options, args.world = {}, {}    # for tables: arguments of the class without a flag, another world
    if args.backbone not in BACKBONES:
        raise InputError(f"--backbone is {' or '.join(BACKBONES)}, not {args.backbone!r}")
    if sorted(args.sequence) != sorted(KINDS):
        raise InputError(f"--sequence needs each of {' '.join(KINDS)} once, not {' '.join(args.sequence)}")
    args.out = args.out or f"runs/missing_prompt-{'tables' if args.table else args.method}"
    return args


def main(argv=None):
    args = parse_args(argv)
    one = settle(metrics.with_seed(args))
    if args.pretrain:
        return pretrain(one)
    if args.bench:
        metrics.prepare(one, is_small(one))
        return bench(one)
    if args.table:
        title, against, rows = TABLES[args.table]
        title = f"{title}; {args.data}, {one.epochs} epochs; the paper's numbers are its CMU-MOSI"
        table = metrics.Table(args, settle, title, against, rows, COLUMNS, ("AA",), "AA / FM", lines=args.table.startswith("fig"))
        for one, folder in table.missing():
            run(one, folder)
        done = table.done().get(against, {}).values()
        cosines = [r["task_aware_cosine"] for r in done if "task_aware_cosine" in r]
        if cosines:
            cosine_map(np.mean(cosines, 0), table.folder / f"table{args.table}_cosine.png")
        return print(table.write())
    name, results = f"{args.method} {args.data}", []
    for one, folder in metrics.repetitions(args, settle):
        results.append(run(one, folder))
        print(metrics.last_line(name, results[-1:], LINE))
    metrics.conclude(args.out, name, results, LINE)


# ======================================================================================== the small backbone
# Training on complete modalities: on utterances of its own for the built-in world, disjoint from the stream;
# on the training utterances for real data, which has no others.  Nobody needs this to read the method.
SHIPPED = {"backbone": "msa", "width": 30, "heads": 5, "layers": 5, "fusion_layers": 3, "pre_epochs": 20}
PRE_CLIP = 0.8                                                       # largest gradient norm


def is_shipped(args):
    """Is this the configuration whose backbone lies in backbones/?"""
    return args.data == "mini" and not args.world and all(getattr(args, k) == v for k, v in SHIPPED.items())


def affect_config(args):
    """What decides a small backbone, besides the code here."""
    return [{k: getattr(args, k) for k in SHIPPED}, PRE_CLIP, data.MINI_AFFECT, args.backbone_seed]


def teach_backbone(args, stream, net):
    """Trains net on complete modalities, keeps the epoch with the lowest validation loss.

    Raises InputError if none is finite.
    """
    store, best, device = Store(stream, args.device), (math.inf, None), torch.device(args.device)
    rows, val = (torch.as_tensor(part.rows, device=device) for part in stream.extra["upstream"])
    optimizer = adam(net.parameters(), 1e-3, device)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, args.pre_epochs * math.ceil(len(rows) / 64))
    for epoch in range(args.pre_epochs):
        net.train()
        parts = rows[torch.randperm(len(rows)).to(device)].split(64)

        def loss_of(step):
            b = store.batch(parts[step])
            return store.loss(net(net.embed(b.x)), b.y)
        text = f"pre-training on complete modalities, epoch {epoch + 1}/{args.pre_epochs}"
        metrics.fit(text, loss_of, optimizer, schedule, len(parts), PRE_CLIP, args.quiet)
        net.eval()
        with torch.no_grad():
            output = torch.cat([net(net.embed(store.batch(part).x)) for part in val.split(512)])
        value = store.loss(output, store.y[val]).item()
        if value < best[0]:
            best = value, copy.deepcopy(net.state_dict())
    if best[1] is None:
        raise InputError("pre-training on complete modalities gave no finite loss; look at the features' scale")
    net.load_state_dict(best[1])
    return net


def cached_backbone(args, stream, net):
    """Trains net on complete modalities; or reads it from the cache, if it was trained on these utterances."""
    from safetensors.torch import load_file, save
    parts = [np.ascontiguousarray(x[part.rows]).tobytes() for part in stream.extra["upstream"]
             for x in (*part.features.values(), part.label)]
    about = affect_config(args), stream.extra["version"], stream.extra["scoring"]
    key = metrics.digest([*about, *map(metrics.content, parts)])
    path = data.cache_folder() / f"affect-{args.backbone}-{key}.safetensors"
    if path.exists():
        with contextlib.suppress(Exception):                         # a broken file is made anew
            net.load_state_dict(load_file(str(path)))
            return
        print(f"{path} cannot be read; pre-training again")
    teach_backbone(args, stream, net)
    with metrics.atomic(path, "wb") as f:
        f.write(save(net.state_dict()))


def pretrain(args):
    """Makes backbones/mini-affect-<seed>.safetensors anew."""
    if not is_shipped(args):
        raise InputError("--pretrain makes the shipped backbone: leave --data and its own flags at their defaults")
    torch.set_num_threads(1)
    start, stream = time.time(), data.affect_stream("mini", PATTERNS, seed=args.seed)
    torch.manual_seed(args.backbone_seed)
    net = teach_backbone(args, stream, make_backbone(args, stream))
    metrics.keep_with_bounds("mini-affect", args.backbone_seed, affect_config(args), net.state_dict(), start, stream.extra["version"],
                             sys.modules[__name__], ("AA", "full"))


if __name__ == "__main__":
    metrics.run_cli(main)
