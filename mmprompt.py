"""MM-Prompt: cross-modal prompt query and recovery for continual visual question answering, in one file.

Paper     "MM-Prompt: Cross-Modal Prompt Tuning for Continual Visual Question Answering", arXiv 2505.19455v1.
Official  github.com/xli04/CVQA @ 338c19b (read for the list of differences; nothing copied).
Run       python mmprompt.py --setting CI            python mmprompt.py --help

Idea.  A question and a picture each pick prompts from their own pool.  Isolated, the stronger modality wins.
So (1) let each modality's query look at the other before it picks (Eq. 1-3), and (2) hide a few prompt
tokens and recover them from their own and from the other modality's prompts (Eq. 4-10) before they enter a
frozen encoder.

Shapes    B batch · T tasks · t current task · N prompts in a pool · k chosen · L tokens of a prompt · D width
          Nq Nv tokens of question and picture · P tokens injected · f width of a region's feature · H heads
          M is a modality, Q or V, and M' the other one.
          (B,L,D) is a shape; Eq. n is the paper's number.  Masks are bool, True = a real token.

Call path main                          reads the flags, one run a seed
            run                         protocol: task after task, each followed by a row of the accuracy matrix
              learn_task                epochs over one task (in DI: over its subtasks), best epoch kept
                learn_epoch             batches; Eq. 11
                  VQABackbone.embed     question and pictures -> F_q, F_v, the tokens before the encoder
                  VQABackbone.encode    asks the method for prompts, then runs the encoder block by block
                    MMPrompt.forward    Eq. 1-10: CrossModalQuery, PromptPool, CrossModalRecovery -> Prompts
                    VQABackbone.inject  torch.cat([h, prompts]): HERE THE PROMPTS ENTER, for their block
                    VQABackbone.look_once   that block, for the tokens alone: they look at the prompts
                  VQABackbone.loss      the frozen decoder reads the encoder's output: L_CE
"""
import dataclasses
import functools
import inspect
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import data
import metrics
from data import InputError
from metrics import YES_NO, above_zero, check_shared, natural, positive, share, shared_flags, weight

# ================================================================================================== the paper
# The method in the order of its equations, and nothing else: with `import dataclasses, torch` and torch's
# `nn` and `F`, this section runs by itself.  A dictionary {"Q": ..., "V": ...} holds the same thing for
# question and picture.
OTHER = {"Q": "V", "V": "Q"}                                         # M -> M'
# The outputs of attention modules start small, so that queries and prompts start almost unchanged.
START = 0.03
# Standard deviation of a prompt's numbers at its start.  Against the rate it says how fast a prompt turns;
# against the outputs of the attention modules, how much recovery changes it.
SPREAD = 0.2


def masked_mean(x, mask):
    """Phi of Eq. 1: the mean over real tokens.  x (B,N,D), mask (B,N) -> (B,D)."""
    m = mask[..., None].to(x.dtype)                                  # (B,N,1)
    return (x * m).sum(1) / m.sum(1).clamp(min=1)                    # padding neither adds nor counts


def cosines(q, keys):
    """cos(q, k_i) for every key.  q (B,D), keys (N,D) -> (B,N), in the precision of the keys: bf16 cannot tell
    keys apart whose cosines differ by less than 0.004, and picks others."""
    with torch.autocast(q.device.type, enabled=False):
        return F.normalize(q.to(keys.dtype), dim=-1) @ F.normalize(keys, dim=-1).T


class Attention(nn.MultiheadAttention):
    """A(query, key, value): attention of M's tokens on other tokens.  Raises ValueError unless n_heads
    divides d_model.

    forward(query (B,N,D), key and value (B,N',D), mask (B,N') of the keys) -> (B,N,D)
    start: size of the output at first, 1 for torch's own.
    """

    def __init__(self, d_model, n_heads, start=START):
        if d_model % n_heads:
            raise ValueError(f"--heads {n_heads} does not divide the width {d_model}")
        super().__init__(d_model, n_heads, batch_first=True)
        with torch.no_grad():                                    # what it is added to hardly changes at first
            self.out_proj.weight.mul_(start)

    def forward(self, query, key, value, mask=None):
        # Where to look must not depend on how long the vectors are: tokens with numbers around 0.2 would all
        # get the same weight.  Values keep their length, so what is added has the size of what is looked at.
        query, key = (F.layer_norm(x, x.shape[-1:]) for x in (query, key))
        hidden = None if mask is None else ~mask                     # torch marks what must not be seen
        return super().forward(query, key, value, key_padding_mask=hidden, need_weights=False)[0]


class SelfAttention(nn.TransformerEncoderLayer):
    """A(x), with one argument: an encoder layer, self-attention and a feed-forward of `hidden`, each on
    normalised tokens and with a residual.  Raises ValueError unless n_heads divides d_model.

    forward(x (B,N,D)) -> (B,N,D)
    """

    def __init__(self, d_model, n_heads, hidden):
        if d_model % n_heads:
            raise ValueError(f"--heads {n_heads} does not divide the width {d_model}")
        super().__init__(d_model, n_heads, hidden, dropout=0.0, batch_first=True, norm_first=True)
        with torch.no_grad():                                # both branches are added to x: nearly x at first
            self.self_attn.out_proj.weight.mul_(START)
            self.linear2.weight.mul_(START)
            self.linear2.bias.zero_()


class CrossModalQuery(nn.Module):
    """Each modality looks at the other before it becomes a query (section 3.2, Eq. 1).

    forward(F_q (B,Nq,D), F_v (B,Nv,D), q_mask (B,Nq), v_mask (B,Nv)) -> {"Q": (B,D), "V": (B,D)}
    fusion: "query" is the paper's; "none" leaves the modalities apart; the rest are Table 12's alternatives.
    Divide the tokens of both by their root mean square first (F.rms_norm), as VQABackbone.encode does: else
    the modality with the larger numbers would decide both queries.
    Uses OTHER, masked_mean, Attention and START of this section.
    """

    def __init__(self, d_model, n_heads=8, fusion="query"):
        super().__init__()
        if fusion not in ("query", "none", "plus", "mean", "hadamard", "cross-attention"):
            raise ValueError(f"no query fusion {fusion!r}")
        self.fusion = fusion
        if fusion in ("query", "cross-attention"):           # the latter is added to nothing: at full size
            self.attend = nn.ModuleDict({M: Attention(d_model, n_heads, START if fusion == "query" else 1.0)
                                         for M in "QV"})
        if fusion == "query":                                        # w "initialised uniformly": all ones
            self.w = nn.ParameterDict({M: nn.Parameter(torch.ones(d_model)) for M in "QV"})

    def forward(self, F_q, F_v, q_mask, v_mask):
        x, mask = {"Q": F_q, "V": F_v}, {"Q": q_mask, "V": v_mask}
        if self.fusion not in ("query", "cross-attention"):
            return self.without_attention(x, mask)
        # Every token asks the other modality's tokens what matters to it.  seen^M = A(F^M, F^M', F^M')
        seen = {M: self.attend[M](x[M], x[OTHER[M]], x[OTHER[M]], mask[OTHER[M]]) for M in "QV"}  # (B,N,D)
        if self.fusion == "cross-attention":                         # Table 12: nothing of its own is kept
            return {M: masked_mean(seen[M], mask[M]) for M in "QV"}
        # What it saw is added to what it is; the mean over tokens, weighted feature by feature, is the query.
        # q^M = w^M * Phi( A(F^M, F^M', F^M') + F^M )                                                    Eq. 1
        return {M: self.w[M] * masked_mean(seen[M] + x[M], mask[M]) for M in "QV"}          # 2 x (B,D)

    def without_attention(self, x, mask):
        """Isolated queries ("none"), and Table 12's simple ways to mix them."""
        own = {M: masked_mean(x[M], mask[M]) for M in "QV"}                                 # 2 x (B,D)
        if self.fusion == "none":
            return own
        if self.fusion == "mean":                                    # over the tokens of both
            both = masked_mean(torch.cat([x["Q"], x["V"]], 1), torch.cat([mask["Q"], mask["V"]], 1))
        else:
            both = own["Q"] + own["V"] if self.fusion == "plus" else own["Q"] * own["V"]
        return {"Q": both, "V": both}


class PromptPool(nn.Module):
    """N prompts of L tokens with one key each; a query takes the k nearest and mixes them (Eq. 2-3).

    forward(q (B,D)) -> p~ (B,L,D), L_qk (), chosen (B,k).  Every sample chooses alone: its batch mates do not
    matter.  Raises ValueError for a k above the size of the pool.  Uses cosines and SPREAD of this section.
    """

    def __init__(self, d_model, size, length=8, top_k=5, temperature=1.0):
        super().__init__()
        if top_k > size:
            raise ValueError(f"--top-k {top_k} is more than the {size} prompts of a pool; see --pool-sizes")
        self.k, self.temperature = top_k, temperature
        self.prompts = nn.Parameter(torch.randn(size, length, d_model) * SPREAD)                 # P^M (N,L,D)
        self.keys = nn.Parameter(torch.randn(size, d_model) * 0.02)                              # K^M (N,D)

    def forward(self, q):
        # The prompts whose keys point where the query points are chosen.
        # I^M = the k largest of cos(q^M, k_i^M)                                                         Eq. 2
        score, chosen = cosines(q, self.keys).topk(self.k, dim=-1)                               # 2 x (B,k)
        # The nearer the key, the more of its prompt: a is a softmax over the chosen ones only.
        # p~^M = sum_{i in I} a_i p_i,  a = softmax over I of cos(q, k_i)                                Eq. 3
        a = (score / self.temperature).softmax(-1)                                               # (B,k)
        p = torch.einsum("bk,bkld->bld", a, self.prompts[chosen])                                # (B,L,D)
        # The chosen keys move towards the query.  It is a constant here: otherwise the query network
        # satisfies this loss by sending every query in one direction, and selection dies.
        # L_qk = sum_{i in I} (1 - cos(q, k_i)), mean over B                                    part of Eq. 11
        pull = cosines(q.detach(), self.keys).gather(-1, chosen)                                 # (B,k)
        return p, (1 - pull).sum(-1).mean(), chosen                                              # L_qk ()


class CrossModalRecovery(nn.Module):
    """Hide prompt tokens, recover them inside the modality, then across (section 3.3, Eq. 4-10).

    forward({"Q": p~ (B,L,D), "V": p~ (B,L,D)}) -> p_final {"Q","V"}, L_intra (), L_inter ()
    Both losses are 0 without gradients.
    fusion: "recovery" is the paper's; the rest are Table 13's alternatives.  w_res: "matrix" or "vector".
    mask_granularity: whether Eq. 4 hides a "token" or a "feature".  res_scale: w_res is a rotation times
    this, the paper's "very small" hint.  only_hidden: what was not hidden stays
    as it was selected (official code), so recovery reaches mask_ratio of the tokens and none at test.
    Uses OTHER, Attention, SelfAttention and START of this section.
    """

    def __init__(self, d_model, n_heads=8, mask_ratio=0.05, use_intra=True, use_inter=True, fusion="recovery",
                 w_res="matrix", mask_granularity="token", res_scale=0.1, only_hidden=False):
        super().__init__()
        if fusion not in ("recovery", "plus", "mean", "hadamard", "cross-attention"):
            raise ValueError(f"no recovery fusion {fusion!r}")
        self.delta, self.use_intra, self.use_inter, self.fusion = mask_ratio, use_intra, use_inter, fusion
        self.granularity, self.res_scale, self.only_hidden = mask_granularity, res_scale, only_hidden
        if fusion == "recovery" and use_intra:
            self.intra = nn.ModuleDict({M: SelfAttention(d_model, n_heads, 2 * d_model) for M in "QV"})
            # A matrix starts as the identity, a vector with length 1: both meet the second term of Eq. 6.
            start = torch.eye(d_model) if w_res == "matrix" else torch.full((d_model,), d_model ** -0.5)
            self.W_res = nn.ParameterDict({M: nn.Parameter(start.clone()) for M in "QV"})
        if fusion in ("recovery", "cross-attention") and use_inter:
            self.inter = nn.ModuleDict({M: Attention(d_model, n_heads, START if fusion == "recovery" else 1.0)
                                        for M in "QV"})
        if fusion == "recovery" and use_inter:                     # A' has "twice the feed-forward dimension"
            self.refine = nn.ModuleDict({M: SelfAttention(d_model, n_heads, 4 * d_model) for M in "QV"})
            self.W_g = nn.ModuleDict({M: nn.Linear(2 * d_model, d_model, bias=False) for M in "QV"})

    def forward(self, p):
        nothing = p["Q"].new_zeros(())
        if self.fusion != "recovery":                                                            # Table 13
            return {M: self.mix(M, p) for M in "QV"}, nothing, nothing
        if not (self.use_intra or self.use_inter):          # isolated prompts: nothing is hidden or recovered
            return p, nothing, nothing
        learns = torch.is_grad_enabled()                                 # an answer needs no losses
        L_intra = L_inter = nothing
        p_intra = p_hat = self.hide(p)                                                           # Eq. 4
        if self.use_intra:
            p_intra = self.fill_in(p_hat, p)                                                     # Eq. 5
            L_intra = self.intra_loss(p_hat, p) if learns else nothing                           # Eq. 6
        p_final = p_intra
        if self.use_inter:
            p_final = self.look_across(p_intra, p)                                               # Eq. 7-9
            L_inter = self.inter_loss(p_final, p) if learns else nothing                         # Eq. 10
        if self.only_hidden:
            p_final = {M: torch.where(p_hat[M] == p[M], p[M], p_final[M]) for M in "QV"}
        return p_final, L_intra, L_inter

    def hide(self, p):
        """Some tokens become zeros, in training only: what is hidden must be recovered.  -> p^ 2 x (B,L,D)"""
        if not self.training or self.delta == 0:
            return p
        B, L, D = p["Q"].shape
        # b = 1 with probability delta, at the same places in both modalities: neither can copy from the other.
        b = torch.rand(B, L, D if self.granularity == "feature" else 1, device=p["Q"].device) < self.delta
        # p^^M = (1 - b) p~^M                                                                            Eq. 4
        return {M: p[M].masked_fill(b, 0.0) for M in "QV"}                                       # 2 x (B,L,D)

    def fill_in(self, p_hat, p):
        """From what is left of the modality, with a light hint of the other.  -> p_intra 2 x (B,L,D)"""
        # The hint goes through a rotation W_res and is made small: w_res = res_scale * W_res.
        light = {M: self.res_scale * (p[OTHER[M]] @ W.T if W.ndim == 2 else p[OTHER[M]] * W)
                 for M, W in self.W_res.items()}                                                 # 2 x (B,L,D)
        # Hidden tokens are filled in from those that are left, then the hint is added.  Tokens have no
        # position: all hidden ones of a sample are filled in alike.
        # p_intra^M = A(p^^M) + w_res^M p~^M'                                                            Eq. 5
        return {M: self.intra[M](p_hat[M]) + light[M] for M in "QV"}                             # 2 x (B,L,D)

    def intra_loss(self, p_hat, p):
        """How far p_intra is from p~, over all tokens, hidden or not, ()."""
        # What was recovered must be what was hidden, and W_res must stay a rotation.  The recovery learns this,
        # from prompts that are constants on both sides.  With a gradient on the left alone a prompt would move
        # against what the recovery adds to it, step after step, since the right side moves along.
        # The norm is over D; mean over samples and tokens.
        # L_intra = sum_M |p_intra^M - p~^M|^2 + |W_res W_res^T - I|_F^2                                 Eq. 6
        p_hat, p = ({M: x.detach() for M, x in both.items()} for both in (p_hat, p))
        again = self.fill_in(p_hat, p)
        missed = {M: (again[M] - p[M]).square().sum(-1).mean() for M in "QV"}                    # 2 x ()
        return sum(missed[M] + self.orthogonality(self.W_res[M]) for M in "QV")                  # ()

    @staticmethod
    def orthogonality(W):
        """|W W^T - I|_F^2, the second term of Eq. 6, ().  W (D,D).  For a vector w (D,) the outer product has
        rank one and the term equals (|w|^2-1)^2 + D-1; the constant D-1 is left out."""
        if W.ndim == 1:
            return (W.square().sum() - 1).square()
        return (W @ W.T - torch.eye(len(W), device=W.device, dtype=W.dtype)).square().sum()

    def look_across(self, p_intra, p):
        """From the other modality's prompts.  -> p_final 2 x (B,L,D)"""
        # Each token asks the other modality's prompts, and keeps what it is.
        # p_inter^M = A(p_intra^M, p~^M', p~^M') + p_intra^M                                             Eq. 7
        p_inter = {M: self.cross(M, p_intra[M], p) + p_intra[M] for M in "QV"}                   # 2 x (B,L,D)
        # A gate per feature says how much refinement it gets; it looks at both modalities.
        # g^M = sigmoid( w_g^M ReLU([p_inter^M ; p~^M']) )                                               Eq. 9
        g = {M: torch.sigmoid(self.W_g[M](F.relu(torch.cat([p_inter[M], p[OTHER[M]]], -1)))) for M in "QV"}
        # Gate closed: the prompt stays.  Gate open: it is replaced by its refinement.
        # p_final^M = (1 - g^M) p_inter^M + g^M A'(p_inter^M)                                            Eq. 8
        return {M: (1 - g[M]) * p_inter[M] + g[M] * self.refine[M](p_inter[M]) for M in "QV"}

    def inter_loss(self, p_final, p):
        """How far apart the two modalities are, each seen through the other, ()."""
        # Both modalities, each seen through the other, must mean the same: their mean tokens point one way.
        # L_inter = 1 - cos( A(p_final^Q, p~^V, p~^V), A(p_final^V, p~^Q, p~^Q) ), mean over L first    Eq. 10
        views = [self.cross(M, p_final[M], p).mean(1) for M in "QV"]                             # 2 x (B,D)
        return (1 - F.cosine_similarity(*views, dim=-1)).mean()

    def cross(self, M, x, p):
        """A(x, p~^M', p~^M'), the cross-attention that Eq. 7 and Eq. 10 share.  x (B,L,D) -> (B,L,D)."""
        return self.inter[M](x, p[OTHER[M]], p[OTHER[M]])

    def mix(self, M, p):
        """Table 13: other ways to bring the two modalities' prompts together.  -> (B,L,D)"""
        if self.fusion == "cross-attention":
            return self.cross(M, p[M], p)
        if self.fusion == "hadamard":
            return p["Q"] * p["V"]
        return (p["Q"] + p["V"]) / (2 if self.fusion == "mean" else 1)


@dataclasses.dataclass
class Prompts:
    """What a prompt method hands to the encoder.  prompts {"G": (B,2L,D), ...}: question prompts first, then
    visual; losses {"qk": (), ...} to add to the task loss; chosen {"QG": (B,k), ...} for the statistics."""
    prompts: dict
    losses: dict
    chosen: dict


class MMPrompt(nn.Module):
    """The whole method (Fig. 2): one cross-modal query, four pools, one recovery for G(eneral) and one for
    E(xpert) prompts.

    forward(F_q (B,Nq,D), F_v (B,Nv,D), q_mask, v_mask) -> Prompts: {"G","E"}: (B,2L,D), losses qk, intra, inter.
    pool_sizes: prompts in Q-G, Q-E, V-G, V-E (Table 9's best row).  layers: 0-based encoder blocks.
    keep: prompts stay in the sequence after their block (official code).
    learn_query, learn_recovery: when Eq. 1 and Eq. 5-9 learn: "always", in the "first" task only, so that old
    questions keep their prompts, or "never".
    temperature of Eq. 3.  only_hidden: see CrossModalRecovery.
    query_fusion, recovery_fusion: Tables 12 and 13.
    """
    # prompts and keys, Eq. 1, recovery; searched on other seeds.  Eq. 1 learns through the weights of Eq. 3
    # alone: at the rate of the recovery its query never comes to look at the other modality.
    lr, lr_query, lr_attention = 5e-3, 5e-4, 5e-5

    def __init__(self, d_model, n_heads=8, length=8, top_k=5,
                 pool_sizes={"QG": 40, "QE": 60, "VG": 80, "VE": 120}, mask_ratio=0.05, use_query=True, use_intra=True,
                 use_inter=True, alpha=1.0, beta=0.3, qk_weight=1.0, temperature=1.0,
                 layers={"G": (1, 2), "E": (3, 4, 5)}, keep=False, query_fusion="query",
                 recovery_fusion="recovery", w_res="matrix", mask_granularity="token", learn_query="always",
                 learn_recovery="always", only_hidden=False):
        super().__init__()
        self.layers, self.keep = dict(layers), keep
        self.learn_query, self.learn_recovery = learn_query, learn_recovery
        self.weights = {"qk": qk_weight, "inter": alpha, "intra": beta}                          # of Eq. 11
        self.query = CrossModalQuery(d_model, n_heads, query_fusion if use_query else "none")
        self.pools = nn.ModuleDict({name: PromptPool(d_model, size, length, top_k, temperature)
                                    for name, size in pool_sizes.items()})
        self.recovery = nn.ModuleDict({
            G: CrossModalRecovery(d_model, n_heads, mask_ratio, use_intra, use_inter, recovery_fusion, w_res,
                                  mask_granularity, only_hidden=only_hidden) for G in "GE"})
        self.begin_task(0)                                           # what learns, for whoever counts it

    def begin_task(self, t):
        for part, when in ((self.query, self.learn_query), (self.recovery, self.learn_recovery)):
            part.requires_grad_(when == "always" or when == "first" and t == 0)

    def end_task(self):
        pass

    def forward(self, F_q, F_v, q_mask, v_mask):
        # Two queries serve all four pools.                                                              Eq. 1
        q = self.query(F_q, F_v, q_mask, v_mask)                                                 # 2 x (B,D)
        out = Prompts({}, dict.fromkeys(("qk", "intra", "inter"), F_q.new_zeros(())), {})
        for G in "GE":                                    # general prompts for early blocks, expert for later
            p = {}
            for M in "QV":
                # Each modality picks and mixes its own prompts.                                       Eq. 2-3
                p[M], qk, out.chosen[M + G] = self.pools[M + G](q[M])                            # p~ (B,L,D)
                out.losses["qk"] = out.losses["qk"] + qk
            # Then the two are brought together.                                                      Eq. 4-10
            p_final, intra, inter = self.recovery[G](p)                                          # 2 x (B,L,D)
            out.prompts[G] = torch.cat([p_final["Q"], p_final["V"]], 1)                          # (B,2L,D)
            out.losses["intra"] = out.losses["intra"] + intra
            out.losses["inter"] = out.losses["inter"] + inter
        return out


def total_loss(ce, losses, weights):
    """What training minimises: the answer's cross-entropy and the weighted losses of the prompts, all ().

    losses {name: ()}, weights {name: float}; a loss without a weight counts once."""
    # L = L_CE + L_qk + alpha L_inter + beta L_intra                                                    Eq. 11
    return ce + sum(weights.get(name, 1.0) * value for name, value in losses.items())


# =============================================================================================== the backbone
# A frozen T5 reads the question's tokens and the picture's tokens in one sequence; `inject` is where prompts
# enter. Pictures come as regions: features (n,f) and boxes (n,4), from the built-in world, a file, or a
# frozen vision model.


class VisualEmbedding(nn.Module):
    """Region features and boxes to tokens F^V: a small network on the feature plus a linear map of the box.
    VL-T5's is one linear layer with a layer norm for each.

    forward(features (B,Nv,f), boxes (B,Nv,4) as x1 y1 x2 y2 in [0,1]) -> (B,Nv,D)
    """

    def __init__(self, feature, d_model):
        super().__init__()
        self.look = nn.Sequential(nn.Linear(feature, 2 * d_model), nn.GELU(), nn.Linear(2 * d_model, d_model))
        self.place = nn.Linear(5, d_model)

    def forward(self, features, boxes):
        area = ((boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1]))[..., None]    # (B,Nv,1)
        return self.look(features) + self.place(torch.cat([boxes, area], -1))                    # (B,Nv,D)


class VQABackbone(nn.Module):
    """A T5 encoder-decoder that reads question tokens and visual tokens in one sequence, with room for
    prompts.

    t5: any T5ForConditionalGeneration.  pictures(B images) -> features (B,Nv,f), boxes (B,Nv,4), how many are
    real (B).  Everything is frozen at first.  prefix: put before each question.  max_question, max_answer: in
    tokens.
    """

    def __init__(self, t5, tokenizer, visual, pictures, prefix="", max_question=20, max_answer=8):
        super().__init__()
        self.t5, self.tokenizer, self.visual, self.width = t5, tokenizer, visual, t5.config.d_model
        self.pictures, self.prefix = pictures, prefix
        self.max_question, self.max_answer = max_question, max_answer
        self.known = {}                              # limit -> {text: its tokens}: each text is split once
        self.eval().requires_grad_(False)                  # dropout off too: the backbone is a fixed function

    def tokens(self, texts, limit):
        """B texts -> ids (B,N), which are real (B,N)"""
        known = self.known.setdefault(limit, {})
        new = [text for text in {*texts} if text not in known]
        if new:
            ids = self.tokenizer(new, truncation=True, max_length=limit)["input_ids"]
            known.update(zip(new, (np.array(row, np.int32) for row in ids)))  # a quarter of a tensor's memory
        rows = [torch.from_numpy(known[text]).long() for text in texts]
        lengths = torch.tensor([len(row) for row in rows])
        ids = nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=self.tokenizer.pad_token_id)
        return ids, torch.arange(ids.shape[1]) < lengths[:, None]                                # (B,N) (B,N)

    def read(self, samples, answers=()):
        """A batch as tensors on the CPU, made ahead of the step: question tokens, regions, answer tokens."""
        ids, q_mask = self.tokens([self.prefix + s.question for s in samples], self.max_question)
        features, boxes, count = self.pictures([s.image for s in samples])
        v_mask = torch.arange(features.shape[1]) < count[:, None]                                # (B,Nv)
        labels = self.tokens(answers, self.max_answer) if answers else ()                        # 2 x (B,Na)
        return metrics.pinned([ids, q_mask, features, boxes, v_mask, *labels], self.t5.device)

    def embed(self, batch):
        """F_q (B,Nq,D), F_v (B,Nv,D) and their masks: the tokens before encoder block 0.  batch: of read()"""
        ids, q_mask, features, boxes, v_mask = (x.to(self.t5.device, non_blocking=True) for x in batch[:5])
        F_q = self.t5.get_input_embeddings()(ids)                                                # (B,Nq,D)
        F_v = self.visual(features.float(), boxes)                                               # (B,Nv,D)
        return F_q, F_v, q_mask, v_mask

    def position_bias(self, Nq, mask, dtype):
        """What attention scores get added: T5's own bias between question tokens, zero wherever a visual or
        prompt token takes part, minus infinity for padding.  mask (B,N) of the whole sequence -> (B,H,N,N)"""
        first = self.t5.encoder.block[0].layer[0].SelfAttention  # T5 keeps the bias of all blocks in its first
        bias = first.compute_bias(Nq, Nq, device=mask.device)                                    # (1,H,Nq,Nq)
        more = mask.shape[1] - Nq
        bias = F.pad(bias, (0, more, 0, more))                                                   # (1,H,N,N)
        return bias.masked_fill(~mask[:, None, None, :], torch.finfo(bias.dtype).min).to(dtype)

    def encode(self, F_q, F_v, q_mask, v_mask, method=None, modality="joint"):
        """One pass through the encoder, the method's prompts injected at their blocks.  Returns hidden
        (B,N,D), mask (B,N), Prompts.

        modality "v" hides the question tokens and question prompts, "q" the picture's (Eq. 12-13); "joint"
        nothing.
        """
        with torch.autocast(F_v.device.type, enabled=False):         # prompts stay in full precision
            # divided by their root mean square, as in T5's first layer norm: else the modality with the longer
            # tokens decides every query that looks at both
            full = [x.to(torch.promote_types(x.dtype, torch.float32)) for x in (F_q, F_v)]
            full = [F.rms_norm(x, x.shape[-1:]) for x in full]
            out = method(*full, q_mask, v_mask) if method is not None else Prompts({}, {}, {})
        place = {i: p for G, p in out.prompts.items() for i in method.layers[G]}            # block -> (B,P,D)
        if modality != "joint":                                      # queries saw both, the encoder sees one
            q_mask, v_mask = q_mask & (modality == "q"), v_mask & (modality == "v")
            place = {i: p.chunk(2, 1)["qv".index(modality)] for i, p in place.items()}  # question prompts come first
        Nq, h, mask = F_q.shape[1], torch.cat([F_q, F_v], 1), torch.cat([q_mask, v_mask], 1)   # (B,N,D) (B,N)
        bias = self.position_bias(Nq, mask, h.dtype)                                             # (B,H,N,N)
        for i, block in enumerate(self.t5.encoder.block):
            if i not in place:
                h = block(h, position_bias=bias)[0]                                              # (B,N,D)
                continue
            longer, P = self.inject(h, place[i]), place[i].shape[1]                              # (B,N+P,D)
            if method.keep:                                          # prompts stay in the sequence...
                mask = F.pad(mask, (0, P), value=True)                                           # (B,N+P)
                bias = self.position_bias(Nq, mask, h.dtype)                                     # (B,H,N+P,N+P)
                h = block(longer, position_bias=bias)[0]                                         # (B,N+P,D)
            else:                                                  # ...or are dropped again after their block
                h = self.look_once(block, h, longer, F.pad(bias, (0, P)))                        # (B,N,D)
        return self.t5.encoder.final_layer_norm(h), mask, out                                 # dropout is off

    def inject(self, h, prompts):
        """HERE THE PROMPTS ENTER: P more tokens behind those of the sequence, which every token may look
        at."""
        return torch.cat([h, prompts.to(h.dtype)], 1)                                            # (B,N+P,D)

    @staticmethod
    def look_once(block, h, longer, bias):
        """What `block` makes of the first N of `longer`: block(longer)[:, :N].  What it would make of the
        prompts is dropped, so they are keys and values alone, and cost a sixth of a token.

        h (B,N,D), longer (B,N+P,D), bias (B,H,N,N+P) -> (B,N,D)
        """
        attend, feed_forward = block.layer
        x, N = attend.layer_norm(longer), h.shape[1]                                             # (B,N+P,D)
        looked = attend.SelfAttention(x[:, :N], key_value_states=x, position_bias=bias)[0]
        return feed_forward(h + looked)                                                          # (B,N,D)

    def parts(self):
        """Attention and feed-forward of each encoder block, for --compile."""
        return [part for block in self.t5.encoder.block for part in (block.layer[0].SelfAttention, block.layer[1])]

    def loss(self, hidden, mask, batch):
        """Cross-entropy of the answers' tokens, L_CE of Eq. 11.  hidden (B,N,D), batch: of read() -> ()"""
        labels, real = (x.to(self.t5.device, non_blocking=True) for x in batch[5:])              # (B,Na)
        labels = labels.masked_fill(~real, -100)
        return self.t5(encoder_outputs=(hidden,), attention_mask=mask.long(), labels=labels).loss

    @torch.no_grad()
    def answer(self, hidden, mask):
        """Greedy decoding with cache.  hidden (B,N,D) -> B strings."""
        from transformers.modeling_outputs import BaseModelOutput
        ids = self.t5.generate(encoder_outputs=BaseModelOutput(last_hidden_state=hidden), attention_mask=mask.long(),
                               max_new_tokens=self.max_answer, num_beams=1, do_sample=False)
        return [text.strip() for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]


# ---- pictures: each of these returns load(B images) -> features (B,Nv,f), boxes (B,Nv,4), the count of real
# ones (B)


def padded(rows):
    """B pairs of features (n,f) and boxes (n,4), n as it comes -> (B,Nv,f), (B,Nv,4), the n (B)"""
    features, boxes = (nn.utils.rnn.pad_sequence(list(x), batch_first=True) for x in zip(*rows))
    return features, boxes, torch.tensor([len(row[0]) for row in rows])


def world_regions(regions):
    """Regions of the built-in world: the crops' pixels in [-1,1] are the feature, f = 768."""
    pixels, boxes, valid = regions                                   # (S,6,16,16,3) uint8, (S,6,4), (S,6)
    flat, boxes, count = map(torch.from_numpy, (pixels.reshape(*pixels.shape[:2], -1), boxes, valid.sum(1)))

    def load(rows):
        most = int(count[rows].max())                                # Nv
        return flat[rows, :most].float() / 127.5 - 1, boxes[rows, :most], count[rows]
    return load


def file_regions(folder):
    """Region features made elsewhere: data.region_files, as tensors."""
    load = data.region_files(folder)
    return lambda images: padded([tuple(map(torch.from_numpy, load(image))) for image in images])


def picture_regions(root, images):
    """Regions of any picture for the small backbone: a 3 x 3 grid of crops and the whole picture, 16 x 16
    pixels each."""
    grid = [(x / 3, y / 3, (x + 1) / 3, (y + 1) / 3) for y in range(3) for x in range(3)] + [(0, 0, 1, 1)]
    crops = lambda picture: data.region_pixels(picture, grid)        # (10,16,16,3) uint8
    pixels = lambda batch: torch.from_numpy(np.stack(batch)).flatten(2) / 127.5 - 1              # (B,10,768)
    return kept_features("crops", "", root, images, crops, pixels, torch.tensor(grid, dtype=torch.float32))


def grid_features(name, root, images, device, cells=6):
    """Patch features of a frozen CLIP, SigLIP or DINOv2 (Hugging Face id or folder), averaged to 6 x 6 = 36
    cells with boxes."""
    from transformers import AutoModel
    # From its own module: the one at the top level asks for torchvision in some versions.
    from transformers.models.auto.image_processing_auto import AutoImageProcessor
    model = metrics.from_pretrained(AutoModel, name, "--vision")
    model = getattr(model, "vision_model", model).eval().requires_grad_(False).to(device)
    process = metrics.from_pretrained(AutoImageProcessor, name, "--vision")
    edges = np.linspace(0, 1, cells + 1)
    boxes = torch.tensor([(edges[x], edges[y], edges[x + 1], edges[y + 1]) for y in range(cells) for x in range(cells)],
                         dtype=torch.float32)                                                    # (36,4)

    @torch.no_grad()
    def average(batch):
        patches = model(pixel_values=torch.cat(batch).to(device)).last_hidden_state            # (B,(1+)n*n,f)
        side = int(patches.shape[1] ** 0.5)                                     # a class token may come first
        square = patches[:, -side * side:].mT.unflatten(2, (side, side))                         # (B,f,n,n)
        return F.adaptive_avg_pool2d(square.float(), cells).flatten(2).mT                        # (B,36,f)
    look = lambda picture: process(images=picture, return_tensors="pt")["pixel_values"]          # (1,3,h,w)
    return kept_features(f"grid {cells}", metrics.fingerprint(model), root, images, look, average, boxes)


def kept_features(what, model, root, images, look, average, boxes):
    """Every picture is looked at once, before training, in the order given; what was seen lies in the cache."""
    paths = {image: data.inside(root, image) for image in dict.fromkeys(images)}
    keys = {image: metrics.file_key(path) for image, path in paths.items()}
    code = [inspect.getsource(f) for f in (look, average, data.region_pixels)]
    made_of = [what, model, code, boxes.tolist(), data.REGION_PIXELS]
    kept = metrics.FeatureFile("pictures", made_of)
    decode = lambda path: look(data.open_picture(path))
    kept.fill({keys[image]: path for image, path in paths.items()}, decode, average)

    def load(batch):
        features = kept.read([keys[image] for image in batch])                                 # (B,Nv,f) half
        return features, boxes.expand(len(batch), -1, -1), torch.full((len(batch),), len(boxes))
    return load


# ---- loading


def load_backbone(args, stream):
    """The frozen encoder-decoder with its eyes: the small one, or any T5 with any CLIP-like vision model or
    feature files. Fills in args.train_vision where it is left open: eyes that nobody has trained learn in the
    first task."""
    root, built_in, small = stream.extra.get("root"), args.data == "mini", args.backbone == "mini"
    if built_in and not small:
        raise InputError("--data mini is for the small backbone; with --backbone give your own --data")
    if small and args.vision:
        raise InputError("--vision goes with --backbone; the small backbone has eyes of its own")
    visual = None
    if small:
        texts = [] if built_in else [x for t in stream.tasks for s in t.train for x in (s.question, *s.answers)]
        t5, visual = (small_modules(args.seed) if args.scratch else load_small(args.backbone_seed)).values()
        tokenizer = mini_tokenizer(texts)
    else:
        t5, tokenizer = load_t5(args.backbone)
        if args.scratch:
            torch.manual_seed(args.seed)
            t5 = type(t5)(t5.config)
        if not args.features and not args.vision:
            raise InputError("--backbone needs eyes: --vision (a CLIP, SigLIP or DINOv2 id or folder) or --features")
    images = (s.image for task in stream.tasks for s in (*task.train, *task.val, *task.test))
    if args.features:
        pictures, visual = file_regions(args.features), None
    elif built_in:
        pictures = world_regions(stream.extra["regions"])
    elif small:
        pictures = picture_regions(root, images)
    else:
        pictures = grid_features(args.vision, root, images, args.device)
    args.train_vision = args.train_vision or ("never" if visual is not None else "first")
    if visual is None:                                          # width of the features: ask the first picture
        width = pictures([stream.tasks[0].train[0].image])[0].shape[-1]
        torch.manual_seed(0)
        visual = VisualEmbedding(width, t5.config.d_model)
    blocks, wanted = len(t5.encoder.block), max(args.layers_g + args.layers_e, default=-1)
    if wanted >= blocks:
        raise InputError(f"--layers-g/--layers-e name block {wanted}, but the encoder has blocks 0..{blocks - 1}")
    return VQABackbone(t5, tokenizer, visual, pictures, prefix="" if small else "vqa: ").to(args.device)


def load_t5(name):
    """(model, tokenizer) of any T5-family Hugging Face id or folder."""
    from transformers import AutoModelForSeq2SeqLM, AutoTokenizer
    t5, tokenizer = (metrics.from_pretrained(c, name, "--backbone") for c in (AutoModelForSeq2SeqLM, AutoTokenizer))
    if not hasattr(t5, "encoder") or not hasattr(t5.encoder, "block"):
        raise InputError(f"--backbone {name} is a {type(t5).__name__}; the prompts need a T5-family encoder-decoder")
    return t5, tokenizer


# =========================================================================================== compared methods
# All of them see the same frozen tokens, hold as many prompts as MM-Prompt's four pools where their design
# allows, and inject at the same blocks ("identical injection layers if possible", section 4.2).
# A method is a module with begin_task(t), forward(F_q, F_v, q_mask, v_mask) -> Prompts, and end_task().
# Its class says at which blocks its prompts enter (layers), whether they stay behind their block (keep), what
# its losses weigh (weights), and its rates: from the same small search on a seed that is not reported.


class Method(nn.Module):
    """What the compared methods share: they know the current task, t."""
    lr, layers, keep, weights = 8e-3, {}, False, {}
    whole_t5 = False                                                 # does the T5 itself learn?
    one_stage = False                                                # knows no tasks: all of them at once
    t = 0

    def begin_task(self, t):
        self.t = t

    def end_task(self):
        pass


class Frozen(Method):
    """The backbone as it was pre-trained: no prompts, nothing learns."""
    one_stage = True

    def forward(self, F_q, F_v, q_mask, v_mask):
        return Prompts({}, {}, {})


class Finetune(Frozen):
    """No prompts; the whole T5 learns, task after task.  What forgetting looks like."""
    whole_t5, one_stage, lr_backbone = True, False, 5e-4


class Joint(Finetune):
    """The same, but all tasks at once.  The upper bound: as many steps as it takes, its rate falling to
    zero."""
    one_stage, epochs, batch, schedule = True, 16, 50, "linear"


def own_means(F_q, F_v, q_mask, v_mask):
    """What the pools of compared methods are asked with: each modality's mean token, 2 x (B,D)."""
    return {"Q": masked_mean(F_q, q_mask), "V": masked_mean(F_v, v_mask)}


def joined(q):
    """One query for both modalities, each counting as much as the other.  2 x (B,D) -> (B,D)"""
    return F.normalize(q["Q"], dim=-1) + F.normalize(q["V"], dim=-1)


class L2P(Method):
    """L2P (Wang et al. 2022): each modality's mean token picks k short prompts, which join the sequence at
    the input and stay. 2 tokens times k = 5 inject about as many tokens as MM-Prompt does."""
    lr, one_pool = 2e-2, False              # one_pool, of any method: its prompts belong to no modality

    def __init__(self, d_model, pool_sizes, top_k=5, tokens=2, blocks=(0,), keep=True):
        super().__init__()
        self.layers, self.keep = {"G": blocks}, keep
        sizes = {"Q": pool_sizes["QG"] + pool_sizes["QE"], "V": pool_sizes["VG"] + pool_sizes["VE"]}
        sizes = {"QV": sum(sizes.values())} if self.one_pool else sizes
        self.pools = nn.ModuleDict({M: PromptPool(d_model, n, tokens, top_k) for M, n in sizes.items()})

    def forward(self, F_q, F_v, q_mask, v_mask):
        q = own_means(F_q, F_v, q_mask, v_mask)
        q["QV"] = joined(q)
        prompts, pull, chosen = [], 0, {}
        for M, pool in self.pools.items():
            _, qk, chosen[M] = pool(q[M])
            prompts.append(pool.prompts[chosen[M]].flatten(1, 2))  # (B,k,L,D) -> (B,k*L,D): joined, not mixed
            pull = pull + qk
        return Prompts({"G": torch.cat(prompts, 1)}, {"qk": pull}, chosen)


class L2POnePool(L2P):
    """L2P*: one pool for both modalities, chosen by one query.  Its prompts belong to neither, so that Eq. 12
    and 13 are not defined for it."""
    one_pool = True


class DualPrompt(Method):
    """DualPrompt (Wang et al. 2022): G prompts that all tasks share, and one E prompt per task, found at test by
    its key.  A key starts at the mean query of its task's first batch: from a random start it would have to
    travel further than its steps allow."""
    lr = 2e-2

    def __init__(self, d_model, layers, length=8, tasks=10):
        super().__init__()
        self.layers = layers
        self.pools = nn.ParameterDict({"G": torch.randn(2 * length, d_model) * SPREAD})
        for M in "QV":
            self.pools[M + "E"] = torch.randn(tasks, length, d_model) * SPREAD
            self.pools[M + "keys"] = torch.zeros(tasks, d_model)     # zeros: the task has not begun

    def forward(self, F_q, F_v, q_mask, v_mask):
        expert, pull, chosen, t = [], 0, {}, self.t
        for M, q in own_means(F_q, F_v, q_mask, v_mask).items():
            keys = self.pools[M + "keys"]                                                        # (T,D)
            if self.training:
                start = metrics.summed(q.detach().mean(0)) / metrics.PROCESSES
                keys.data[t] = torch.where(keys[t].any(), keys[t], start)
            s = cosines(q.detach(), keys)                        # (B,T); keys move, eyes that learn do not
            pull = pull + (1 - s[:, t]).mean()
            # training knows its task, test does not: there the nearest key of the tasks so far decides
            best = torch.full_like(s[:, 0], t, dtype=torch.long) if self.training else s[:, :t + 1].argmax(-1)
            chosen[M + "E"] = best[:, None]
            expert.append(self.pools[M + "E"][best])                 # (B,L,D)
        general = self.pools["G"].expand(len(F_q), -1, -1)           # (B,2L,D)
        return Prompts({"G": general, "E": torch.cat(expert, 1)}, {"qk": pull}, chosen)


class CODAPrompt(Method):
    """CODA-Prompt (Smith et al. 2023): a prompt is a weighted sum of all components; each task adds its
    share, old ones freeze. Weight of component m: cos(q * A_m, K_m).  Orthogonality is asked of components,
    keys and attention vectors."""
    lr = 2e-3

    def __init__(self, d_model, pool_sizes, layers, length=8, tasks=10, ortho=0.1):
        super().__init__()
        self.layers, self.weights, self.tasks, self.pools = layers, {"ortho": ortho}, tasks, nn.ModuleDict()
        for name, n in pool_sizes.items():
            if n < tasks:
                raise ValueError(f"each task needs its share of a pool: --pool-sizes {n} is less than {tasks}")
            start = lambda *L: nn.init.orthogonal_(torch.empty(n, *L, d_model))      # as a matrix of n rows
            self.pools[name] = nn.ParameterDict({"attend": start(), "key": start(), "prompts": start(length)})

    def forward(self, F_q, F_v, q_mask, v_mask):
        q = own_means(F_q, F_v, q_mask, v_mask)
        p, penalty, t = {}, 0, self.t
        for name, pool in self.pools.items():
            old, now = (i * len(pool["key"]) // self.tasks for i in (t, t + 1))        # this task's share
            use = {k: torch.cat([x[:old].detach(), x[old:now]]) for k, x in pool.items()}
            a = F.cosine_similarity(q[name[0]][:, None] * use["attend"], use["key"][None], dim=-1)   # (B,m)
            p[name] = torch.einsum("bm,mld->bld", a, use["prompts"])                             # (B,L,D)
            for x in use.values():
                x = x.flatten(1)
                penalty = penalty + (x @ x.T - torch.eye(len(x), device=x.device)).square().mean()
        return Prompts({G: torch.cat([p["Q" + G], p["V" + G]], 1) for G in "GE"}, {"ortho": penalty}, {})


class Triplet(Method):
    """Triplet (Qian et al. 2023): pools for questions, pictures and their fusion, each with its own query; a
    matrix brings fusion prompts to the other two, and may not move far within a task.

    Simplified: the fusion prompts enter with the other two and not by themselves.
    """
    lr_attention = 5e-4                                              # of the matrices

    def __init__(self, d_model, pool_sizes, layers, length=8, top_k=5):
        super().__init__()
        self.layers = layers
        sizes = {**pool_sizes, **{"F" + G: pool_sizes["Q" + G] for G in layers}}
        self.pools = nn.ModuleDict({name: PromptPool(d_model, n, length, top_k) for name, n in sizes.items()})
        zeros = lambda: nn.ParameterDict({M + G: torch.zeros(d_model, d_model) for G in layers for M in "QV"})
        self.interact, self.before = zeros(), zeros().requires_grad_(False)

    def end_task(self):                                  # not begin_task, which a resumed run repeats
        self.before.load_state_dict(self.interact.state_dict())

    def forward(self, F_q, F_v, q_mask, v_mask):
        q = own_means(F_q, F_v, q_mask, v_mask)
        q["F"] = joined(q)
        p, pull, moved, chosen = {}, 0, 0, {}
        for name, pool in self.pools.items():
            p[name], qk, chosen[name] = pool(q[name[0]])                                         # (B,L,D)
            pull = pull + qk
        for name, W in self.interact.items():
            fused = p["F" + name[1]]
            p[name] = p[name] + fused @ W.T
            moved = moved + (fused.detach() @ (W - self.before[name]).T).square().sum(-1).mean()
        prompts = {G: torch.cat([p["Q" + G], p["V" + G]], 1) for G in self.layers}
        return Prompts(prompts, {"qk": pull, "interact": moved}, chosen)


class CluMo(Method):
    """CluMo (Cai et al. 2024): mean tokens of each modality fall into clusters, and each pair of a question's and
    a picture's cluster has its prompt, at the input and kept.

    Simplified: mini-batch k-means while the prompts learn and not before; no distillation from the last model.
    """
    lr, layers, keep, one_pool = 2e-2, {"G": (0,)}, True, True

    def __init__(self, d_model, length=8, clusters=10):
        super().__init__()
        self.pools = nn.ParameterDict({"pairs": torch.randn(clusters, clusters, 2 * length, d_model) * SPREAD})
        for M in "QV":
            self.register_buffer("keys_" + M, torch.zeros(clusters, d_model))
            self.register_buffer("count_" + M, torch.zeros(clusters))

    def forward(self, F_q, F_v, q_mask, v_mask):
        nearest = {}
        for M, q in own_means(F_q, F_v, q_mask, v_mask).items():
            keys, count = getattr(self, "keys_" + M), getattr(self, "count_" + M)
            q = F.normalize(q.detach(), dim=-1)
            if self.training:
                self.cluster(q, keys, count)
            nearest[M] = cosines(q, keys).argmax(-1)                                             # (B,)
        prompts = self.pools["pairs"][nearest["Q"], nearest["V"]]                                # (B,2L,D)
        return Prompts({"G": prompts}, {}, {M: n[:, None] for M, n in nearest.items()})

    @staticmethod
    def cluster(q, keys, count):
        """A step of mini-batch k-means: each centre becomes the mean of all queries (B,D) it ever got.

        One that gets few starts again at the query farthest from all centres: the first task would keep all."""
        few = (count <= 0.1 * count.mean()).nonzero()[:, 0]
        far = cosines(q, keys).amax(-1).argsort(stable=True)[torch.arange(len(few), device=q.device) % len(q)]
        keys[few] = metrics.summed(q[far] * (metrics.RANK == 0))     # the same centres in every process
        count[few] = 0.2 * count.mean()                              # time to find its own
        own = F.one_hot(cosines(q, keys).argmax(-1), len(keys)).to(q.dtype)                      # (B,n)
        count += metrics.summed(own.sum(0))
        keys += metrics.summed(own.T @ q - own.sum(0)[:, None] * keys) / count.clamp(min=1)[:, None]


class MaPLe(Method):
    """MaPLe (Khattak et al. 2023): question prompts at every injected block, visual prompts a linear map of
    them; no selection."""
    lr, lr_attention = 5e-3, 3.2e-3                                  # the latter of the map

    def __init__(self, d_model, layers, length=8):
        super().__init__()
        blocks = sorted(i for group in layers.values() for i in group)
        self.layers = {str(i): (i,) for i in blocks}
        self.pools = nn.ParameterDict({str(i): torch.randn(length, d_model) * SPREAD for i in blocks})
        self.couple = nn.ModuleDict({str(i): nn.Linear(d_model, d_model) for i in blocks})

    def forward(self, F_q, F_v, q_mask, v_mask):
        both = {i: torch.cat([p, self.couple[i](p)], 0) for i, p in self.pools.items()}          # (2L,D)
        return Prompts({i: p.expand(len(F_q), -1, -1) for i, p in both.items()}, {}, {})


METHODS = {"mmprompt": MMPrompt, "none": Frozen, "finetune": Finetune, "joint": Joint, "l2p": L2P,
           "l2p-one-pool": L2POnePool, "dualprompt": DualPrompt, "coda": CODAPrompt, "triplet": Triplet,
           "clumo": CluMo, "maple": MaPLe}


def build_method(args, backbone, stream):
    """The method that --method names.  Each class is given those of the flags that it has an argument for,
    and args.options: what has no flag (a table's row sets it)."""
    kind = METHODS[args.method]
    flags = {**vars(args), "d_model": backbone.width, "n_heads": args.heads, "tasks": len(stream),
             "layers": {"G": tuple(args.layers_g), "E": tuple(args.layers_e)},
             "pool_sizes": dict(zip(("QG", "QE", "VG", "VE"), args.pool_sizes))}
    wanted = {k: flags[k] for k in inspect.signature(kind).parameters if k in flags}
    with metrics.one_clear_line():
        return kind(**{**wanted, **args.options})


# ============================================================================================= learn and test
# The protocol.  `run` reads like the paper's: tasks arrive one after the other; after each, the model is
# asked about all tasks so far without being told which is which.  `learn_task` is one task, `learn_epoch` one
# pass over its samples.


def load_stream(args):
    """The tasks of a run, in the order asked for; the run's seed decides world and splits."""
    more = {"sizes": args.sizes} if args.data == "mini" else {}
    return data.vqa_stream(args.setting, args.data, args.root, args.seed, **more).reorder(args.order)


def what_learns(args, backbone, method, t):
    """{name: parameter} of what task t may change.  Everything else is frozen."""
    backbone.requires_grad_(False)
    if getattr(method, "whole_t5", False):
        backbone.t5.requires_grad_(True)
    elif args.train_decoder and args.method != "none":
        backbone.t5.decoder.requires_grad_(True)
        backbone.t5.get_input_embeddings().requires_grad_(False)     # shared with the frozen encoder
    if args.method != "none" and (args.train_vision == "always" or args.train_vision == "first" and t == 0):
        backbone.visual.requires_grad_(True)
    return {f"{k}.{name}": p for k, part in (("backbone", backbone), ("method", method))
            for name, p in part.named_parameters() if p.requires_grad}


def make_optimizer(args, learning):
    """AdamW with a rate for each kind: prompts and keys, Eq. 1, attention modules, backbone (its eyes too).
    No decay on prompts and keys: it would shrink those that this task never touches."""
    rates = {"method.pools.": args.lr, "method.query.": args.lr_query, "method.": args.lr_attention,
             "backbone.": args.lr_backbone}
    groups = {part: {"params": [], "lr": rate, "weight_decay": args.weight_decay} for part, rate in rates.items()}
    groups["method.pools."]["weight_decay"] = 0.0
    for name, p in learning.items():
        groups[next(part for part in rates if name.startswith(part))]["params"].append(p)  # the first that fits
    groups = [group for group in groups.values() if group["params"]]
    return torch.optim.AdamW(groups, fused=torch.device(args.device).type in ("cpu", "cuda"))


def learn_task(args, backbone, method, task, run, past=()):
    """Train on one task; in DI on its subtasks, one after the other, each followed by a row of its own small
    matrix (F_intra). past: earlier tasks, for --memory."""
    memory = replay(args, past)
    for s, part in run.parts(task.subtasks or [task]):
        learning = what_learns(args, backbone, method, run.stage)
        if not learning:                                             # the frozen bound
            continue
        optimizer = make_optimizer(args, learning)  # a new one for each task: no momentum of the last
        for epoch in run.epochs(args.epochs, learning, optimizer, part.name):
            loss = learn_epoch(args, backbone, method, part.train, memory, optimizer, run, epoch)
            known = evaluate(args, backbone, method, part.val, args.train_modality) if part.val else {"score": None}
            run.keep(loss, known["score"])
        if task.subtasks:
            seen = [getattr(one, args.split) for one in task.subtasks[:s + 1]]
            row = [evaluate(args, backbone, method, samples)["score"] if samples else 0.0 for samples in seen]
            run.kept.setdefault("intra", {}).setdefault(str(run.stage), []).append(row)


def learn_epoch(args, backbone, method, samples, memory, optimizer, run, epoch):
    """One pass over the samples.  Their order, answers and masks depend on seed, task, subtask and epoch
    alone, so that a resumed run draws what the whole one would have drawn.  Returns the mean loss."""
    rng = random.Random(f"{args.seed} {run.stage} {run.part} {epoch}")
    torch.manual_seed(rng.getrandbits(48) + metrics.RANK)
    order = rng.sample(samples, len(samples))
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    method.train()

    def read(i):
        batch = order[i:i + args.batch] + rng.sample(memory, min(args.batch, len(memory)))
        answers = [draw_answer(rng, s.answers) for s in batch]
        words = backbone.tokens(answers, backbone.max_answer)[1].sum(1)
        parts = []
        for rows, of_samples in metrics.in_parts([*range(len(batch))], args.accum):
            of_words = of_samples and float(words[rows].sum() / words.sum())     # this part of all answer tokens
            tensors = backbone.read([batch[r] for r in rows], [answers[r] for r in rows])
            parts.append((tensors, of_words, of_samples))
        return parts
    total, bar = 0.0, run.bar(range(0, len(order), args.batch))
    for step, parts in enumerate(metrics.ahead(read, bar)):
        whole = torch.zeros((), device=backbone.t5.device)
        for batch, of_words, of_samples in parts:
            with precision(args):
                hidden, mask, out = backbone.encode(*backbone.embed(batch), method, args.train_modality)
                ce = backbone.loss(hidden, mask, batch)
            losses = {k: of_samples * value for k, value in out.losses.items()}
            loss = total_loss(of_words * ce, losses, method.weights)                             # Eq. 11
            loss.backward()
            whole += loss.detach()
        value = metrics.summed(whole).item()
        run.check(value, step)
        if getattr(method, "schedule", "constant") == "linear":      # to zero, over the epochs of the task
            for group in optimizer.param_groups:
                first = group.setdefault("first_lr", group["lr"])
                group["lr"] = first * (1 - epoch / args.epochs - 1 / args.epochs * step / len(bar))
        metrics.sum_gradients(parameters)
        nn.utils.clip_grad_norm_(parameters, args.grad_clip)
        optimizer.step()
        optimizer.zero_grad()
        total += value
        bar.set_postfix_str(f"loss {total / (step + 1):.3f}")
    return total / max(len(bar), 1)


def precision(args):
    return torch.autocast(torch.device(args.device).type, torch.bfloat16, enabled=args.dtype == "bf16")


def draw_answer(rng, answers):
    """A training target: one of the annotators' answers with probability proportional to its soft score
    min(1, count/3)."""
    if len(answers) == 1:
        return answers[0]
    count = Counter(answers)
    return rng.choices(list(count), [min(1.0, c / 3) for c in count.values()])[0]


def replay(args, past):
    """Replay samples: --memory in all, shared equally by the past tasks, drawn at random from each (Table
    3)."""
    each = args.memory // max(1, len(past))
    return [s for i, task in enumerate(past)
            for s in random.Random(f"memory {args.seed} {i}").sample(task.train, len(task.train))[:each]]


@torch.no_grad()
def evaluate(args, backbone, method, samples, modality=None):
    """{"score", "f1" (of tokens), both in points, "chosen": {pool: {prompt: how often}}}.  Each prediction
    depends on its own sample alone.  modality: what the encoder sees, default args.modality."""
    method.eval()
    own, told = metrics.mine(samples)[0], []                       # of each sample: score, F1, chosen prompts
    parts = [own[i:i + args.eval_batch] for i in range(0, len(own), args.eval_batch)]
    for part, batch in zip(parts, metrics.ahead(backbone.read, parts)):
        with precision(args):
            hidden, mask, out = backbone.encode(*backbone.embed(batch), method, modality or args.modality)
            answers = backbone.answer(hidden, mask)
        picks = {pool: numbers.tolist() for pool, numbers in out.chosen.items()}
        for b, (s, answer) in enumerate(zip(part, answers)):
            f1 = max(metrics.token_f1(answer, truth) for truth in set(s.answers))
            chosen = {pool: rows[b] for pool, rows in picks.items()}
            told.append((metrics.vqa_accuracy(answer, s.answers), f1, chosen))
    scores, f1s, chosen = zip(*metrics.gathered(told, len(samples)))
    count = {pool: Counter(n for one in chosen for n in one[pool]) for pool in chosen[0]}
    return {"score": 100 * sum(scores) / len(samples), "f1": 100 * sum(f1s) / len(samples),
            "chosen": {pool: dict(sorted(numbers.items())) for pool, numbers in count.items()}}


def run(args, folder):
    """One run with one seed (args.seed).  Returns what results.json holds."""
    stream = load_stream(args)
    metrics.prepare(args, small=args.backbone == "mini")
    backbone = load_backbone(args, stream)
    torch.manual_seed(args.seed)
    method = build_method(args, backbone, stream).to(args.device)
    metrics.compiled(args, [*backbone.parts(), method])
    run = metrics.Run(folder, metrics.deciding(args), stream.names, args.resume, args.quiet,
                      args.checkpoint_minutes)
    count = announce(args, stream, backbone, method, run)

    run.restore(**may_change(args, backbone, method))                # what a killed run had learned
    one_stage = getattr(method, "one_stage", False)                  # the bounds none and joint know no tasks
    for t, task in run.tasks(stream.mixed() if one_stage else stream.tasks):
        method.begin_task(t)
        learn_task(args, backbone, method, task, run, stream.tasks[:t])
        method.end_task()
        seen = stream.tasks if one_stage else stream.tasks[:t + 1]
        run.kept["last"] = [evaluate(args, backbone, method, getattr(one, args.split)) for one in seen]
        run.row([answers["score"] for answers in run.kept["last"]])
        if args.each_task and len(seen) < len(stream.tasks):     # Fig. 3; after the last, `measure` does this
            run.kept.setdefault("alone", []).append([
                float(np.mean([evaluate(args, backbone, method, getattr(one, args.split), m)["score"] for one in seen]))
                for m in "vq"])

    values, selection = measure(args, stream, backbone, method, run)
    if args.data == "mini" and not args.smoke:
        tasks, joint = ("QI", "A_by_type") if args.setting == "QI" else ("CI", "A")      # DI's tasks are CI's
        bounds = {"frozen": (f"{tasks} zero-shot", "A"), "fine-tuning": (f"{args.setting} fine-tuning", "A"),
                  "joint": ("joint", joint)}
        run.say(metrics.worth("mmprompt", stream.extra["version"], bounds))
    title = f"{args.method} {args.setting}: score on task (column) after (row)"
    return run.finish(values, method.state_dict(), title, **count, selection=selection, intra=run.kept.get("intra", {}),
                      protocol={"task id at test": False, "replay": args.memory, "select": "validation"},
                      world=stream.extra.get("version"), counts=[[len(t.train), len(t.val), len(t.test)] for t in stream.tasks])


def announce(args, stream, backbone, method, run):
    """Says what is about to run; returns how many parameters learn and how many are frozen."""
    trainable = sum(p.numel() for p in what_learns(args, backbone, method, 0).values())
    total = sum(p.numel() for part in (backbone, method) for p in part.parameters())
    run.say(f"method {args.method} · setting {args.setting} · data {stream.extra.get('version', args.data)} · backbone "
            f"{args.backbone} {args.backbone_seed} · seed {args.seed} · {args.device}\n{data.describe(stream)}\ntrainable "
            f"{trainable:,} of {total:,} parameters · batch {args.batch} in {args.accum} · epochs {args.epochs} · "
            f"greedy decoding, no task id at test, replay buffer {args.memory}")
    return {"trainable": trainable, "frozen": total - trainable}


def may_change(args, backbone, method):
    """The modules that some task may change: what a checkpoint must hold."""
    modules = {"method": method, "visual": backbone.visual}
    if getattr(method, "whole_t5", False):
        modules["t5"] = backbone.t5
    elif args.train_decoder:
        modules["decoder"] = backbone.t5.decoder
    return modules


def measure(args, stream, backbone, method, run):
    """({metric: value}, {pool: for each task, how often each prompt was chosen}) of a run whose tasks are all
    learned. Each task is answered again with one modality hidden (Eq. 12-13)."""
    tests = [getattr(task, args.split) for task in stream.tasks]
    alone = () if getattr(method, "one_pool", False) else ("v", "q")  # prompts of no modality cannot be hidden
    by = {m: [evaluate(args, backbone, method, samples, m) for samples in tests]
          for m in ("joint", *alone) if m != args.modality} | {args.modality: run.kept["last"]}
    mean = {m: float(np.mean([answers["score"] for answers in rows])) for m, rows in by.items()}
    f1 = float(np.mean([answers["f1"] for answers in by["joint"]]))
    A = np.where(np.isnan(run.A) & (np.tri(len(tests)) == 1), run.A[-1], run.A)  # one stage: nothing to forget
    values = {"A": metrics.average_accuracy(A), "F_inter": metrics.forgetting(A), "token_F1": f1,
              "F_inter_own": metrics.forgetting(A, "own")}
    if alone:
        values |= {"A_v_only": mean["v"], "A_q_only": mean["q"],
                   "merge_effectiveness": float(metrics.merge_effectiveness(mean["joint"], mean["v"], mean["q"])),
                   "modality_difference": float(metrics.modality_difference(mean["v"], mean["q"]))}
    for t, (v, q) in enumerate(run.kept.get("alone", []), 1):
        joint = float(np.nanmean(run.A[t - 1]))
        values |= {f"ME {t}": float(metrics.merge_effectiveness(joint, v, q)),                   # Eq. 12
                   f"MD {t}": float(metrics.modality_difference(v, q))}                          # Eq. 13
    if args.each_task:
        some = [sample for samples in tests for sample in samples[:20]]
        values["prompts_apart"] = prompts_apart(backbone, method, some)
    if run.kept.get("intra"):
        matrices = run.kept["intra"].values()                 # rows of 1, 2, ... scores: filled up to squares
        squares = [[row + [np.nan] * (len(rows) - len(row)) for row in rows] for rows in matrices]
        values["F_intra"] = metrics.intra_forgetting(squares)
    if isinstance(method, Joint):                       # one model for all settings: scored as QI's tasks too
        by_type = {}
        for sample in (s for samples in tests for s in samples):
            by_type.setdefault(sample.question_type, []).append(sample)
        scores = [evaluate(args, backbone, method, some)["score"] for some in by_type.values()]
        values["A_by_type"] = float(np.mean(scores))
    pools = sorted({pool for answers in by["joint"] for pool in answers["chosen"]})
    chosen = {pool: [answers["chosen"].get(pool, {}) for answers in by["joint"]] for pool in pools}
    if isinstance(method, DualPrompt):                               # prompt t belongs to task t
        right = [100 * count.get(t, 0) / sum(count.values()) for pool in pools for t, count in enumerate(chosen[pool])]
        values["right_prompt"] = float(np.mean(right))
    return values, chosen


@torch.no_grad()
def prompts_apart(backbone, method, samples):
    """Fig. 6 as a number: the percentage of the variance of injected prompts that lies between question
    prompts and picture prompts.  0: one cloud.  100: two points."""
    method.eval()
    prompts = backbone.encode(*backbone.embed(backbone.read(samples)), method)[2].prompts
    Q, V = (torch.cat([p.chunk(2, 1)[i].flatten(0, 1) for p in prompts.values()])
            for i in (0, 1))                                                                     # 2 x (n,D)
    between = ((Q.mean(0) - V.mean(0)) / 2).square().sum()
    return float(100 * between / torch.cat([Q, V]).var(0, correction=0).sum())


# ===================================================================================================== tables
# Each row: label, the arguments that make it, and what the paper prints (VQA v2; A / F_inter).  "options" are
# arguments of the method's class that have no flag.  A table is {name: (title, label that the others are
# compared with, rows)}.
SETTINGS = ("CI", "QI", "DI")
COLUMNS = ("A", "F_inter", "F_intra", "merge_effectiveness")
LINE = (*COLUMNS, "right_prompt")                                  # of the last line of a run
FIG_3 = ("merge_effectiveness", "modality_difference", "prompts_apart",
         *(f"{x} {t}" for x in ("ME", "MD") for t in range(1, 8)))     # after each of the first 7 tasks
PAPER_1 = {                                                          # Table 1: CI, QI, DI
    "l2p": ((33.706, 4.323), (13.720, 23.807), (31.186, 2.112)),
    "l2p-one-pool": ((33.428, 4.150), (13.853, 23.651), (31.343, 2.201)),
    "dualprompt": ((36.063, 4.449), (14.146, 23.518), (33.601, 2.660)),
    "coda": ((37.102, 4.527), (15.438, 22.561), (35.138, 0.902)),
    "triplet": ((37.102, 4.527), (14.382, 22.697), (32.826, 1.134)),  # CI: CODA-Prompt's, as printed
    "clumo": ((36.462, 4.039), (13.208, 25.016), (35.079, 1.580)),
    "maple": ((37.450, 4.606), (15.371, 22.164), (35.187, 1.054)),
    "mmprompt": ((39.240, 3.748), (16.757, 21.546), (36.223, 0.447))}
OURS = ("CQ + CR", {"setting": "DI"}, (36.223, 0.447))        # the method itself, a row of nearly every table
DI, CI = {"setting": "DI"}, {"setting": "CI"}
NO_RECOVERY = {"setting": "DI", "use_intra": False, "use_inter": False}
ISOLATED = ("isolated prompts", {**NO_RECOVERY, "use_query": False}, (34.172, 1.310))
QUERY = ("CQ", NO_RECOVERY, (34.990, 0.588))
STOPPED = [                                                 # parts that stop learning after the first task
    ("CQ learned in task 1 only", {**NO_RECOVERY, "options": {"learn_query": "first"}}, None),
    ("CQ learned in task 1 only + CR", {**DI, "options": {"learn_query": "first"}}, None),
    ("CQ + CR learned in task 1 only", {**DI, "options": {"learn_recovery": "first"}}, None),
    ("CQ + CR as it starts", {**DI, "options": {"learn_recovery": "never"}}, None)]
# What the official code does: encoder and eyes drawn at random and frozen, decoder trained, prompts of one
# token that stay in the sequence, recovered ones where they were hidden (5 %; here in training only, there at
# test too), a hundredth of L_qk.
OFFICIAL = {**DI, "scratch": True, "train_decoder": True, "train_vision": "never", "length": 1,
            "qk_weight": 0.01, "options": {"keep": True, "only_hidden": True}}
PAPERS = "; the paper's numbers are its VQA v2"
TICKS = PAPERS + ", its tick marks reconstructed from the prose"


def ours(label):
    """The method's row under the label that a table gives it."""
    return (label, *OURS[1:])


def other_ways(part, *papers):
    """The rows of Tables 12 and 13: a part brings the modalities together in other ways, at last in ours."""
    ways = zip(("plus", "mean", "hadamard", "cross-attention"), papers)
    return [*((way, {**DI, "options": {f"{part}_fusion": way}}, paper) for way, paper in ways), ours(part)]


TABLES = {
    "1": ("Table 1 on mini" + PAPERS, "{} mmprompt",
          [(f"{setting} {method}", {"setting": setting, "method": method}, PAPER_1.get(method, (None,) * 3)[i])
           for i, setting in enumerate(SETTINGS) for method in METHODS  # DI's tasks are CI's; joint knows none
           if (setting, method) not in (("DI", "none"), ("DI", "joint"), ("QI", "joint"))]),
    "2": ("Table 2 on mini" + TICKS, "CQ + CR", [ISOLATED, QUERY, OURS]),
    "settings": ("Query and recovery in each setting, on mini", "{} CQ + CR", [
        (f"{setting} {label}", {**own, "setting": setting}, None) for setting in SETTINGS
        for label, own, _ in (ISOLATED, QUERY, OURS, *STOPPED)]),
    "official": ("Table 2 on mini as the official code has it" + PAPERS, "isolated prompts", [
        ("isolated prompts", {**ISOLATED[1], **OFFICIAL}, ISOLATED[2]),
        ("CQ", {**NO_RECOVERY, **OFFICIAL}, (34.990, 0.588)), ("CQ + CR", OFFICIAL, OURS[2]),
        ("no prompts", {**OFFICIAL, "layers_g": [], "layers_e": [], "options": {}}, None),
        ("CQ + CR, pre-trained encoder", {**OFFICIAL, "scratch": False}, None)]),
    "fig3": ("Fig. 3 on mini: each modality alone, after each task", "MM-Prompt", [
        (label, {**own, **CI, "each_task": True}, None) for label, own in (
            ("MM-Prompt", {}), ("isolated prompts", ISOLATED[1]), ("L2P", {"method": "l2p"}),
            ("DualPrompt", {"method": "dualprompt"}))]),
    "3": ("Table 3 on mini; the paper's numbers are its NExT-QA", None, [
        (f"{method} memory {m}", {**DI, "method": method, "memory": m}, paper) for method, m, paper in (
            ("dualprompt", 500, (27.641, 3.765)), ("coda", 500, (30.632, 2.471)), ("maple", 500, (30.049, 3.112)),
            ("mmprompt", 500, (32.394, 2.259)), ("mmprompt", 200, (29.945, 3.112)), ("mmprompt", 1000, (34.268, 2.427)))]),
    "9": ("Table 9 on mini" + PAPERS, "40 60 80 120", [
        ("10 80 10 80", {**DI, "pool_sizes": [10, 80, 10, 80]}, (35.79, 0.914)),
        ("50 50 50 50", {**DI, "pool_sizes": [50, 50, 50, 50]}, (35.168, 1.268)), ours("40 60 80 120"),
        ("60 80 100 140", {**DI, "pool_sizes": [60, 80, 100, 140]}, (34.851, 0.985))]),
    "10": ("Table 10 on mini" + TICKS, "intra + inter", [
        ("no recovery", NO_RECOVERY, (34.990, 0.588)), ("intra", {**DI, "use_inter": False}, (35.150, 1.140)),
        ("inter", {**DI, "use_intra": False}, (35.318, 1.071)), ours("intra + inter")]),
    "11": ("Table 11 on mini" + TICKS, "L_intra + L_inter", [
        ("no loss", {**DI, "alpha": 0.0, "beta": 0.0}, (34.260, 1.871)), ("L_intra", {**DI, "alpha": 0.0}, (34.743, 1.531)),
        ("L_inter", {**DI, "beta": 0.0}, (35.059, 1.204)), ours("L_intra + L_inter")]),
    "12": ("Table 12 on mini" + PAPERS, "query", other_ways(
        "query", (34.275, 1.731), (34.398, 2.015), (34.702, 1.142), (34.891, 1.202))),
    "13": ("Table 13 on mini" + PAPERS, "recovery", other_ways(
        "recovery", (33.850, 1.335), (34.170, 1.405), (34.212, 1.274), (34.628, 1.428))),
    "blocks": ("Where prompts enter, on mini", "MM-Prompt", [
        ("MM-Prompt", DI, None), ("L2P", {**DI, "method": "l2p"}, None),
        ("L2P at MM-Prompt's blocks", {**DI, "method": "l2p", "options": {"blocks": (1, 2, 3, 4, 5), "keep": False}}, None),
        ("MM-Prompt at L2P's, kept", {**DI, "layers_g": [0], "layers_e": [1], "options": {"keep": True}}, None)]),
    "orders": ("Fig. 8: other orders of the tasks, on mini", "{} MM-Prompt", [
        (f"{name} {label}", {**changes, "order": order}, None)
        for name, order in (("given", None), ("reversed", [*range(7, -1, -1)]), ("drawn", [3, 6, 1, 0, 7, 4, 2, 5]))
        for label, changes in (("MM-Prompt", DI), ("isolated", ISOLATED[1]), ("L2P", {**DI, "method": "l2p"}))]),
    "bounds": ("Bounds of mini, as long as a run without --table", None, [
        ("CI zero-shot", {**CI, "method": "none"}, None), ("QI zero-shot", {"setting": "QI", "method": "none"}, None),
        ("joint", {**CI, "method": "joint"}, None),
        *((f"{setting} fine-tuning", {"setting": setting, "method": "finetune", "epochs": 2}, None)
          for setting in SETTINGS),
        *((f"joint, {word} only", {**CI, "method": "joint", "epochs": 8, "train_modality": m, "modality": m}, None)
          for word, m in (("question", "q"), ("picture", "v")))]),
}
for name, letter, flag, best, values in (("fig4c", "delta", "mask_ratio", 0.05, (0.01, 0.03, 0.05, 0.07, 0.10)),
                                         ("fig4d", "alpha", "alpha", 1.0, (0.4, 0.6, 0.8, 1.0, 1.2, 1.4)),
                                         ("fig9", "beta", "beta", 0.3, (0.1, 0.2, 0.3, 0.4, 0.5, 3.0))):
    rows = [(f"{letter} {x}", {**DI, flag: x}, OURS[2] if x == best else None) for x in values]
    TABLES[name] = (f"Fig. {name[3:]} on mini" + PAPERS, f"{letter} {best}", rows)

# =============================================================================================== command line
# What the prompts cost (--bench), the flags, and `main`, where everything starts.


def bench(args):
    """Cost of the prompts against the frozen encoder they are injected into, at T5-base shapes with random
    weights; and of a training step against DualPrompt's, whose prompts cost next to nothing: the floor of any
    prompt method.  --length and --heads decide, other sizes are the defaults."""
    from transformers import T5Config, T5ForConditionalGeneration
    B, Nq, Nv, D, H, blocks, words = (8, 8, 6, 64, 4, 6, 512) if args.smoke else (100, 20, 36, 768, 12, 12, 32128)
    data_path = bench_data(args, B, *((50, 500) if args.smoke else (20_000, 200_000)))
    config = T5Config(d_model=D, d_kv=D // H, d_ff=4 * D, num_heads=H, num_layers=blocks,
                      vocab_size=words, dropout_rate=0.0, decoder_start_token_id=0)
    torch.manual_seed(0)
    backbone = VQABackbone(T5ForConditionalGeneration(config), None, VisualEmbedding(8, D), None).to(args.device)
    F_q, F_v = torch.randn(B, Nq, D, device=args.device), torch.randn(B, Nv, D, device=args.device)
    x = F_q, F_v, torch.ones_like(F_q[..., 0]).bool(), torch.ones_like(F_v[..., 0]).bool()  # every token is real
    mm = MMPrompt(D, args.heads, args.length).to(args.device).eval()
    dual = DualPrompt(D, mm.layers, args.length, 10).to(args.device).eval()
    dual.begin_task(9)
    metrics.compiled(args, [*backbone.parts(), mm])
    pools = {name: len(pool.keys) for name, pool in mm.pools.items()}
    more = {"MaPLe": MaPLe(D, mm.layers, args.length), "Triplet": Triplet(D, pools, mm.layers, args.length)}
    batch = [*x, None, torch.randint(words, (B, 4)), torch.ones(B, 4).bool()]    # loss() reads the last two

    @torch.enable_grad()
    def train(method, optimizer):
        hidden, mask, out = backbone.encode(*x, method.train())
        total_loss(backbone.loss(hidden, mask, batch), out.losses, method.weights).backward()
        optimizer.step()
        optimizer.zero_grad()
        method.eval()

    def step_of(method):
        learning = {f"method.{name}": p for name, p in method.named_parameters()}
        return functools.partial(train, method, make_optimizer(args, learning))
    jobs = {"frozen encoder, no prompts": lambda: backbone.encode(*x),
            "query + selection + recovery (Eq. 1-9)": lambda: mm(*x), "DualPrompt's prompts": lambda: dual(*x),
            "encoder with MM-Prompt": lambda: backbone.encode(*x, mm),
            "encoder with DualPrompt": lambda: backbone.encode(*x, dual),
            **{f"encoder with {name}": functools.partial(backbone.encode, *x, method.to(args.device).eval())
               for name, method in more.items()},
            "training step with MM-Prompt": step_of(mm), "training step with DualPrompt": step_of(dual)}
    with torch.no_grad(), precision(args):
        times = dict(zip(jobs, metrics.seconds(args.device, *jobs.values(), repeats=3)))
    names, here = list(times), metrics.environment()
    over = dict.fromkeys((names[1], *names[3:-2]), names[0]) | {names[-2]: names[-1]}
    print(f"batch {B}, {Nq} question and {Nv} picture tokens, width {D}, {blocks} encoder blocks, {args.dtype}, "
          f"{here['hardware']}, {here['threads']} threads")
    for name, value in times.items():
        ratio = f"{value / times[over[name]]:8.2f} x {over[name]}" if name in over else ""
        print(f"{name:<52}{1000 * value:10.1f} ms  {ratio}")
    sizes = [sum(p.numel() for p in part.parameters()) for part in (mm, dual, backbone.t5.encoder.block)]
    print("parameters: MM-Prompt {:,}, DualPrompt {:,}, frozen encoder blocks {:,} · ".format(*sizes) +
          f"throughput {B / times[names[3]]:.0f} samples/s · peak {metrics.peak_memory_mb():.0f} MiB\n"
          "paper, Fig. 7, s per 100: MM-Prompt 0.179, DualPrompt 0.158 (ratio 1.13; "
          f"here, of encoders, {times[names[3]] / times[names[4]]:.2f}), MaPLe 0.211, Triplet 0.226")
    return times | data_path


def bench_data(args, batch, pictures, questions):
    """The data path without the models: one pass that decodes pictures, then batches of features (36 cells of 768
    numbers) and tokens.  Memory is noted with a tenth of the pictures and with all."""
    from PIL import Image
    coarse = np.random.default_rng(0).integers(0, 255, (24, 32, 3), np.uint8)
    with tempfile.TemporaryDirectory() as root:
        os.environ["MMPROMPTS_CACHE"] = f"{root}/cache"
        Image.fromarray(coarse).resize((640, 480)).save(f"{root}/0.jpg")
        for i in range(1, pictures):
            shutil.copyfile(f"{root}/0.jpg", f"{root}/{i}.jpg")
        names, rates, memory = [f"{i}.jpg" for i in range(pictures)], [], []
        look = lambda picture: torch.from_numpy(np.array(picture.resize((224, 224))))      # (224,224,3) uint8
        cells = lambda batch: torch.zeros(len(batch), 36, 768)       # where a model would be
        for done, n in ((0, pictures // 10), (pictures // 10, pictures)):
            start = time.time()
            load = kept_features("bench", "", root, names[:n], look, cells, torch.zeros(36, 4))
            rates.append((n - done) / (time.time() - start))
            backbone = VQABackbone(load_small(0)["t5"], mini_tokenizer(), None, load).to(args.device)
            samples = [data.Sample(i, names[i % n], f"what is at {i % 977} ?", ("cat",), "", "")
                       for i in range(questions)]
            parts, start = [samples[i:i + batch] for i in range(0, questions, batch)], time.time()
            for _ in metrics.ahead(lambda part: backbone.read(part, ["cat"] * len(part)), parts):
                pass
            speed = questions / (time.time() - start)
            memory.append(metrics.resident_mb())
            load = backbone = samples = parts = None                 # gone before the next are made
    print(f"data path: {rates[1]:.0f} pictures/s once, {speed:.0f} samples/s in each epoch; resident memory "
          f"{memory[0]:.0f} MiB with {pictures // 10} pictures, {memory[1]:.0f} MiB with {pictures}")
    return {"pictures/s": rates[1], "samples/s": speed, "resident MiB": memory}


def settle(args):
    """Fills in the defaults that depend on the method, for one run: its class knows what suits it."""
    metrics.settle_shared(args)
    kind = METHODS[args.method]
    long = 4 if args.setting == "DI" else 6        # a table trains until more epochs would change little
    usual = {"lr": None, "lr_query": None, "lr_attention": 5e-5, "lr_backbone": 1e-4, "batch": 25,
             "epochs": long if args.table else 2}
    for name, value in usual.items():
        if getattr(args, name) is None:
            setattr(args, name, getattr(kind, name, value))
    return args


def parse_args(argv=None):
    p = shared_flags("MM-Prompt: continual visual question answering with cross-modal prompts.", METHODS, TABLES,
                     "mini | vqav2 | nextqa | a .jsonl file", "mini, or any T5-family Hugging Face id or folder", root=".")
    g = p.add_argument_group("data and backbone of MM-Prompt")
    g.add_argument("--setting", default="CI", choices=["DI", "CI", "QI"], help="dual, class or question increment")
    g.add_argument("--sizes", type=positive, nargs=3, default=[8000, 800, 1600], help="mini: questions in train, val, test")
    g.add_argument("--features", help="region features: a folder of .npz/.npy per picture, or VL-T5's .h5")
    g.add_argument("--vision", help="CLIP, SigLIP or DINOv2 id or folder: the vision model of --backbone")
    g.add_argument("--train-vision", choices=["first", "always", "never"], help="when the visual "
                   "embedding learns (default: never where it is pre-trained, else in the first task)")
    g.add_argument("--train-decoder", default=False, action=YES_NO, help="as the official code does")
    g = p.add_argument_group("the paper's")
    g.add_argument("--length", type=positive, default=8, help="L, tokens per prompt (paper: 1)")
    g.add_argument("--top-k", type=positive, default=5, help="k of Eq. 2")
    g.add_argument("--pool-sizes", type=positive, nargs=4, default=[40, 60, 80, 120], help="N of QG QE VG VE")
    g.add_argument("--mask-ratio", type=share, default=0.05, help="delta of Eq. 4")
    g.add_argument("--alpha", type=weight, default=1.0, help="alpha of Eq. 11, weight of L_inter")
    g.add_argument("--beta", type=weight, default=0.3, help="beta of Eq. 11, weight of L_intra")
    g.add_argument("--heads", type=positive, default=8, help="attention heads of A")
    g.add_argument("--layers-g", type=natural, nargs="+", default=[1, 2], help="blocks with G prompts, from 0")
    g.add_argument("--layers-e", type=natural, nargs="+", default=[3, 4, 5], help="blocks with E prompts, from 0")
    g.add_argument("--use-query", default=True, action=YES_NO, help="CQ of Table 2 (Eq. 1)")
    g.add_argument("--use-intra", default=True, action=YES_NO, help="intra recovery (Eq. 5-6)")
    g.add_argument("--use-inter", default=True, action=YES_NO, help="inter recovery (Eq. 7-10)")
    g.add_argument("--memory", type=natural, default=0, help="replay samples in all (Table 3)")
    g = p.add_argument_group("training of MM-Prompt")
    g.add_argument("--accum", type=positive, default=1, help="parts a batch is computed in, to save memory")
    g.add_argument("--lr-query", type=above_zero, help="learning rate of Eq. 1")
    g.add_argument("--lr-attention", type=above_zero, help="learning rate of what is not prompts or query")
    g.add_argument("--lr-backbone", type=above_zero, help="learning rate of the backbone where it learns")
    g.add_argument("--weight-decay", type=weight, default=0.01, help="not of prompts")
    args = check_shared(p.parse_args(argv), p, ["sizes"])
    # what a table's row alone sets: arguments of the class without a flag, a backbone drawn at random, the
    # weight of L_qk, the modalities seen at test and in training ("joint", "v" or "q"), each modality alone after
    # each task
    args.options, args.scratch, args.qk_weight = {}, False, 1.0
    args.modality, args.train_modality, args.each_task = "joint", "joint", False
    if args.smoke:
        args.sizes, args.epochs = [240, 80, 160], args.epochs or 1
    if {*args.layers_g} & {*args.layers_e}:
        raise InputError("--layers-g and --layers-e name the same block: each carries one kind of prompts")
    args.out = args.out or ("runs/mmprompt_tables" if args.table else f"runs/mmprompt_{args.setting}_{args.method}")
    return args


def main(argv=None):
    args = parse_args(argv)
    if args.pretrain or args.bench:
        return (pretrain if args.pretrain else bench)(settle(metrics.with_seed(args)))
    if args.table:
        columns, paper = (FIG_3, None) if args.table == "fig3" else (COLUMNS, "A / F_inter")
        lines = args.table in ("fig4c", "fig4d", "fig9")
        title, against, rows = TABLES[args.table]
        title = title.replace("on mini", f"on {args.data}")
        table = metrics.Table(args, settle, title, against, rows, columns, columns[:2], paper, lines)
        for one, folder in table.missing():
            run(one, folder)
        return print(table.write())
    name, results = f"{args.method} {args.setting}", []
    for one, folder in metrics.repetitions(args, settle):
        results.append(run(one, folder))
        print(metrics.last_line(name, results[-1:], LINE))
    metrics.conclude(args.out, name, results, LINE)


# ========================================================================================= the small backbone
# How backbones/mini-vqa-<seed>.safetensors was made: a small T5 and its eyes learn from statements about
# scenes of the built-in world with a gap to fill, never from the stream's questions.  Nobody needs this to
# read the method.
SHAPE = dict(d_model=96, d_kv=16, d_ff=192, num_heads=6, num_layers=6, num_decoder_layers=2)  # 0.75 M parameters
STEPS, BATCH, SCENES, RATE, WORDS = 4500, 128, 24_000, 2e-3, 512
EYES = 3                                                      # steps of the eyes alone, per step of the whole


def small_config(seed):
    """Everything that the training depends on: a file made for anything else is refused."""
    return {"shape": SHAPE, "steps": STEPS, "batch": BATCH, "scenes": SCENES, "lr": RATE, "words": WORDS, "eyes": EYES,
            "world": data.MINI_VQA_VERSION, "seed": seed}


def small_modules(seed):
    """{"t5", "visual"} of the small backbone before training."""
    from transformers import T5Config, T5ForConditionalGeneration
    torch.manual_seed(seed)
    config = T5Config(vocab_size=WORDS, dropout_rate=0.0, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0,
                      tie_word_embeddings=True, **SHAPE)
    return nn.ModuleDict({"t5": T5ForConditionalGeneration(config),
                          "visual": VisualEmbedding(3 * data.REGION_PIXELS ** 2, SHAPE["d_model"])})


def load_small(seed):
    """small_modules(seed) with the shipped weights."""
    tensors, both = metrics.small_backbone("mini-vqa", seed, small_config(seed)), small_modules(seed)
    both.load_state_dict(tensors, strict=False)                      # tied tensors are stored once
    return both


def mini_tokenizer(texts=()):
    """One token a word: the world's words, then the most frequent new words of `texts` while the 512 rows
    last."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast
    known = ["<pad>", "</s>", "<unk>", "<mask>", *data.MINI_WORDS]
    split = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(),                  # < and > stay: <mask>
                                     pre_tokenizers.Split(Regex(r"[.,;:!?\"'()]"), "isolated")])
    count = Counter(w for text in texts for w, _ in split.pre_tokenize_str(text.lower()))
    new = [w for w, _ in count.most_common() if w not in set(known)]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate((known + new)[:WORDS])}, unk_token="<unk>"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), split
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    lost = max(0, len(known) + len(new) - WORDS)
    if new:
        tqdm.write(f"{len(new)} words are new: {len(new) - lost} get random rows, {lost} become <unk>")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def pretrain(args):
    """--pretrain: makes the small backbone of --backbone-seed anew, and measures the bounds on it."""
    start, seed = time.time(), args.backbone_seed
    torch.set_num_threads(1)
    tensors = train_small(seed, STEPS, SCENES, args.device, args.quiet)
    metrics.keep_with_bounds("mini-vqa", seed, small_config(seed), tensors, start, f"mini-VQA {data.MINI_VQA_VERSION}",
                             sys.modules[__name__], ("A", "A_by_type"))


def train_small(seed, steps, scenes_n, device="cpu", quiet=False):
    """The tensors of a small backbone.  First the eyes alone: a region's token is drawn to the embeddings of
    the words that describe it, as in contrastive picture-text training.  Then everything together on
    statements with a gap."""
    both = small_modules(seed).to(device)
    rng = random.Random(f"upstream {seed}")
    scenes = [data.random_scene(rng, data.COCO_NAMES[i % 80], crowd=rng.random() < .4, alone=rng.random() < .4)
              for i in range(scenes_n)]
    regions, tokenizer = data.draw_scenes(scenes), mini_tokenizer()
    open_eyes(both, scenes, regions, tokenizer, rng, max(EYES * steps, 20), device, quiet)
    backbone = VQABackbone(both["t5"], tokenizer, both["visual"], world_regions(regions), "", 16, 10)
    both.requires_grad_(True).train()

    def fill_the_gap(step):
        rows = [rng.randrange(scenes_n) for _ in range(BATCH)]
        pairs = [data.upstream_statement(rng, scenes[r]) for r in rows]
        samples = [data.Sample(r, r, statement, (gap,), "", "") for r, (statement, gap) in zip(rows, pairs)]
        batch = backbone.read(samples, [gap for _, gap in pairs])
        hidden, mask, _ = backbone.encode(*backbone.embed(batch))
        return backbone.loss(hidden, mask, batch)
    optimizer = torch.optim.AdamW(both.parameters(), RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=max(steps, 20), pct_start=0.1)
    metrics.fit("small backbone: statements", fill_the_gap, optimizer, schedule, steps, grad_clip=1.0, quiet=quiet)
    return dict(both.named_parameters())                             # tied tensors are named once


def open_eyes(both, scenes, regions, tokenizer, rng, steps, device, quiet):
    """The visual embedding learns alone which words belong to a region."""
    words = {"name": data.COCO_NAMES, "color": list(data.COLORS), "pattern": data.PATTERNS, "pose": data.POSES,
             "size": data.SIZES, "cell": list(data.CELLS)}
    embedding = both["t5"].get_input_embeddings().weight.detach()
    rows = [torch.stack([embedding[tokenizer(word, add_special_tokens=False)["input_ids"]].mean(0) for word in values])
            for values in words.values()]                            # one (values,D) for each attribute
    shown = []                                          # (scene, region, the thing's value of each attribute)
    for r, scene in enumerate(scenes):
        for i, j in enumerate(data.region_order(scene)):
            if j < len(scene["things"]):
                thing = scene["things"][j]
                shown.append((r, i, [vs.index(thing[k]) if thing[k] in vs else -1 for k, vs in words.items()]))
    visual = both["visual"].requires_grad_(True)

    def name_the_region(step):
        r, i, truth = zip(*rng.sample(shown, min(BATCH, len(shown))))
        features = torch.from_numpy(regions[0][list(r), list(i)]).flatten(1).float() / 127.5 - 1  # (B,768)
        x = visual(features.to(device), torch.from_numpy(regions[1][list(r), list(i)]).to(device))   # (B,D)
        target = torch.tensor(truth, device=device)                                              # (B,6)
        return sum(F.cross_entropy(x @ e.T / SHAPE["d_model"] ** 0.5, target[:, k], ignore_index=-1)
                   for k, e in enumerate(rows))
    optimizer = torch.optim.AdamW(visual.parameters(), RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.1)
    metrics.fit("small backbone: eyes", name_the_region, optimizer, schedule, steps, quiet=quiet)


if __name__ == "__main__":
    metrics.run_cli(main)
