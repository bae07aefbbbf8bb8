"""MM-Prompt: cross-modal prompt query and recovery for continual visual question answering, in one file.

Paper     "MM-Prompt: Cross-Modal Prompt Tuning for Continual Visual Question Answering", arXiv 2505.19455v1.
Official  github.com/xli04/CVQA @ 338c19b (read for the list of differences in README; nothing copied).
Run       python mmprompt.py --setting CI            python mmprompt.py --help

Idea.  A question and a picture each pick prompts from their own pool.  Isolated, the stronger modality wins.  So (1) let each
modality's query look at the other before it picks (Eq. 1-3), and (2) hide a few prompt tokens and recover them from their own
and from the other modality's prompts (Eq. 4-10) before the prompts enter a frozen encoder.

Shapes    B batch · T tasks · t current task · N prompts in a pool · k chosen · L prompt length (tokens) · D width
          Nq Nv tokens of question and picture · H heads.  M is a modality, Q or V, and M' the other one.
          (B,L,D) is a shape; Eq. n is the paper's number.  Masks are bool, True = a real token.
"""
import argparse
import dataclasses
import functools
import hashlib
import json
import math
import random
import time
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import data
import metrics
from data import InputError

# ====================================================================================================== the paper
OTHER = {"Q": "V", "V": "Q"}                                         # M -> M'


def masked_mean(x, mask):
    """Mean over real tokens.  x (B,N,D), mask (B,N) -> (B,D)."""
    m = mask[..., None].to(x.dtype)                                  # (B,N,1)
    return (x * m).sum(1) / m.sum(1).clamp(min=1)                    # padding neither adds nor counts


class CrossModalQuery(nn.Module):
    """Each modality looks at the other before it becomes a query (section 3.2, Eq. 1).

    forward(F_q (B,Nq,D), F_v (B,Nv,D), q_mask (B,Nq), v_mask (B,Nv)) -> {"Q": (B,D), "V": (B,D)}
    fusion: "query" is the paper's; "none" leaves the modalities apart; the rest are the alternatives of Table 12.
    """
    FUSIONS = ("query", "none", "plus", "mean", "hadamard", "cross-attention")

    def __init__(self, d_model, n_heads=8, fusion="query"):
        super().__init__()
        self.fusion = fusion
        if fusion in ("query", "cross-attention"):
            self.attend = nn.ModuleDict({M: attention(d_model, n_heads) for M in "QV"})
        if fusion == "query":                                        # w "initialised uniformly": all ones
            self.w = nn.ParameterDict({M: nn.Parameter(torch.ones(d_model)) for M in "QV"})

    def forward(self, F_q, F_v, q_mask, v_mask):
        x, mask = {"Q": F_q, "V": F_v}, {"Q": q_mask, "V": v_mask}
        if self.fusion in ("query", "cross-attention"):
            # A(F^M, F^M', F^M'): queries from M, keys and values from the other modality
            seen = {M: self.attend[M](x[M], x[OTHER[M]], x[OTHER[M]], key_padding_mask=~mask[OTHER[M]],
                                      need_weights=False)[0] for M in "QV"}                       # 2 x (B,N_M,D)
        if self.fusion == "query":
            # q^M = w^M * Phi( A(F^M, F^M', F^M') + F^M ),  Phi = mean over real tokens                           Eq. 1
            return {M: self.w[M] * masked_mean(seen[M] + x[M], mask[M]) for M in "QV"}            # 2 x (B,D)
        own = {M: masked_mean(x[M], mask[M]) for M in "QV"}                                       # 2 x (B,D)
        if self.fusion == "none":
            return own
        both = {"plus": lambda: own["Q"] + own["V"], "hadamard": lambda: own["Q"] * own["V"],
                "mean": lambda: masked_mean(torch.cat([F_q, F_v], 1), torch.cat([q_mask, v_mask], 1))}.get(self.fusion)
        return {M: masked_mean(seen[M], mask[M]) if both is None else both() for M in "QV"}


class PromptPool(nn.Module):
    """N prompts of L tokens with one key each; a query takes the k nearest and mixes them (Eq. 2-3).

    forward(q (B,D)) -> p~ (B,L,D), L_qk (), chosen (B,k).  Every sample chooses alone: batch mates do not matter.
    """

    def __init__(self, d_model, size, length=8, top_k=5, temperature=1.0):
        super().__init__()
        if top_k > size:
            raise InputError(f"--top-k {top_k} is more than the {size} prompts of a pool; enlarge --pool-sizes")
        self.k, self.temperature = top_k, temperature
        self.prompts = nn.Parameter(torch.randn(size, length, d_model) * 0.02)                    # P^M (N,L,D)
        self.keys = nn.Parameter(torch.randn(size, d_model) * 0.02)                               # K^M (N,D)

    def forward(self, q):
        keys = F.normalize(self.keys, dim=-1)                                                     # (N,D)
        # I^M = the k largest of cos(q^M, k_i^M)                                                                  Eq. 2
        score, chosen = (F.normalize(q, dim=-1) @ keys.T).topk(self.k, dim=-1)                    # 2 x (B,k)
        # p~^M = sum_{i in I} a_i p_i,  a = softmax over I of cos(q, k_i)                                         Eq. 3
        a = (score / self.temperature).softmax(-1)                                                # (B,k)
        p = torch.einsum("bk,bkld->bld", a, self.prompts[chosen])                                 # (B,L,D)
        # L_qk = sum_{i in I} (1 - cos(q, k_i)), mean over B.  The query is a constant here: otherwise the query network
        # satisfies this loss by sending every query in one direction, and selection dies.                part of Eq. 11
        pull = torch.einsum("bd,bkd->bk", F.normalize(q.detach(), dim=-1), keys[chosen])          # (B,k)
        return p, (1 - pull).sum(-1).mean(), chosen


class CrossModalRecovery(nn.Module):
    """Hide prompt tokens, recover them inside the modality, then across (section 3.3, Eq. 4-10).

    forward({"Q": p~ (B,L,D), "V": p~ (B,L,D)}) -> p_final {"Q","V"}, L_intra (), L_inter ()
    fusion: "recovery" is the paper's; the rest are the alternatives of Table 13.
    """
    FUSIONS = ("recovery", "plus", "mean", "hadamard", "cross-attention")

    def __init__(self, d_model, n_heads=8, mask_ratio=0.05, use_intra=True, use_inter=True, fusion="recovery",
                 w_res="matrix", mask_granularity="token", res_scale=0.1):
        super().__init__()
        self.delta, self.use_intra, self.use_inter, self.fusion = mask_ratio, use_intra, use_inter, fusion
        self.granularity, self.res_scale = mask_granularity, res_scale
        each = lambda make: nn.ModuleDict({M: make() for M in "QV"})
        if fusion == "recovery" and use_intra:
            self.intra = each(lambda: encoder_layer(d_model, n_heads, 2 * d_model))
            start = (lambda: torch.eye(d_model)) if w_res == "matrix" else (lambda: torch.full((d_model,), d_model ** -0.5))
            self.W_res = nn.ParameterDict({M: nn.Parameter(start()) for M in "QV"})
        if fusion in ("recovery", "cross-attention") and use_inter:
            self.inter = each(lambda: attention(d_model, n_heads))
        if fusion == "recovery" and use_inter:
            self.refine = each(lambda: encoder_layer(d_model, n_heads, 4 * d_model))   # "twice feed-forward dimension"
            self.W_g = each(lambda: nn.Linear(2 * d_model, d_model, bias=False))

    def hide(self, p):
        """p^ = (1-b) * p~ with one b for both modalities, b = 1 with probability delta.  Training only.       Eq. 4"""
        if not self.training or self.delta == 0:
            return p
        B, L, D = p["Q"].shape
        b = torch.rand(B, L, D if self.granularity == "feature" else 1, device=p["Q"].device) < self.delta
        return {M: p[M].masked_fill(b, 0.0) for M in "QV"}                             # (B,L,1) or (B,L,D), shared

    def cross(self, M, x, p):
        """A(x, p~^M', p~^M'), the cross-attention that Eq. 7 and Eq. 10 share.  x (B,L,D) -> (B,L,D)."""
        other = p[OTHER[M]]
        return self.inter[M](x, other, other, need_weights=False)[0]

    def forward(self, p):
        zero = p["Q"].new_zeros(())
        if self.fusion != "recovery":                                                  # Table 13
            both = {"plus": lambda M: p["Q"] + p["V"], "mean": lambda M: (p["Q"] + p["V"]) / 2,
                    "hadamard": lambda M: p["Q"] * p["V"], "cross-attention": lambda M: self.cross(M, p[M], p)}[self.fusion]
            return {M: both(M) for M in "QV"}, zero, zero
        if not (self.use_intra or self.use_inter):                                     # isolated prompts: nothing to recover
            return p, zero, zero
        x, L_intra, L_inter = self.hide(p), zero, zero                                 # p^ 2 x (B,L,D)
        if self.use_intra:
            # p_intra^M = A(p^^M) + w_res^M p~^M'                                                                 Eq. 5
            light = {M: p[OTHER[M]] @ W.T if W.ndim == 2 else p[OTHER[M]] * W for M, W in self.W_res.items()}
            x = {M: self.intra[M](x[M]) + self.res_scale * light[M] for M in "QV"}     # (B,L,D)
            # L_intra = sum_M |p_intra^M - p~^M|^2 + |w_res w_res^T - I|_F^2.  Means instead of sums, so that beta does not
            # depend on B, L, D; p~ is the target, a constant, or the prompts would chase their own recovery.     Eq. 6
            L_intra = sum(F.mse_loss(x[M], p[M].detach()) + orthogonality(self.W_res[M]) for M in "QV")
        if self.use_inter:
            # p_inter^M = A(p_intra^M, p~^M', p~^M') + p_intra^M                                                  Eq. 7
            x = {M: self.cross(M, x[M], p) + x[M] for M in "QV"}                       # (B,L,D)
            # g^M = sigmoid( w_g^M ReLU([p_inter^M ; p~^M']) ), one gate per feature                              Eq. 9
            g = {M: torch.sigmoid(self.W_g[M](F.relu(torch.cat([x[M], p[OTHER[M]]], -1)))) for M in "QV"}   # (B,L,D)
            # p_final^M = (1 - g^M) p_inter^M + g^M A'(p_inter^M)                                                 Eq. 8
            x = {M: (1 - g[M]) * x[M] + g[M] * self.refine[M](x[M]) for M in "QV"}     # (B,L,D)
            # L_inter = 1 - cos( A(p_final^Q, p~^V, p~^V), A(p_final^V, p~^Q, p~^Q) ), mean over L first          Eq. 10
            views = [self.cross(M, x[M], p).mean(1) for M in "QV"]                     # 2 x (B,D)
            L_inter = (1 - F.cosine_similarity(*views, dim=-1)).mean()
        return x, L_intra, L_inter


def orthogonality(W):
    """|W W^T - I|_F^2 / D: the second term of Eq. 6.  W (D,D).  For a vector w (D,) the outer product has rank one and the
    term equals (|w|^2-1)^2 + D-1; the constant D-1 is left out."""
    if W.ndim == 1:
        return (W.square().sum() - 1).square() / len(W)
    return (W @ W.T - torch.eye(len(W), device=W.device, dtype=W.dtype)).square().sum() / len(W)


def attention(d_model, n_heads):
    """A(query, key, value): multi-head attention that starts small, so that the prompt path starts near identity."""
    if d_model % n_heads:
        raise InputError(f"--heads {n_heads} does not divide the width {d_model}")
    layer = nn.MultiheadAttention(d_model, n_heads, batch_first=True)
    with torch.no_grad():
        layer.out_proj.weight.mul_(0.1)
    return layer


def encoder_layer(d_model, n_heads, width):
    """A(x): self-attention and feed-forward of `width`, each with norm first and a residual, starting near identity."""
    if d_model % n_heads:
        raise InputError(f"--heads {n_heads} does not divide the width {d_model}")
    layer = nn.TransformerEncoderLayer(d_model, n_heads, width, dropout=0.0, batch_first=True, norm_first=True)
    with torch.no_grad():
        layer.self_attn.out_proj.weight.mul_(0.1)
        layer.linear2.weight.mul_(0.1)
        layer.linear2.bias.zero_()
    return layer


@dataclasses.dataclass
class Prompts:
    """What a prompt method hands to the encoder.  prompts {"G": (B,2L,D), ...}: question prompts first, then visual;
    losses {"qk": (), ...} to add to the task loss; chosen {"QG": (B,k), ...} for the statistics."""
    prompts: dict
    losses: dict
    chosen: dict


class MMPrompt(nn.Module):
    """The whole method (Fig. 2): one cross-modal query, four pools, one recovery for G(eneral) and one for E(xpert) prompts.

    forward(F_q (B,Nq,D), F_v (B,Nv,D), q_mask, v_mask) -> Prompts with {"G","E"}: (B,2L,D) and losses qk, intra, inter.
    pool_sizes: prompts in Q-G, Q-E, V-G, V-E (Table 9's best row).  Layers are 0-based encoder blocks.
    """

    def __init__(self, d_model, n_heads=8, length=8, top_k=5, pool_sizes={"QG": 40, "QE": 60, "VG": 80, "VE": 120},
                 mask_ratio=0.05, use_query=True, use_intra=True, use_inter=True, alpha=1.0, beta=0.3, qk_weight=1.0,
                 temperature=1.0, layers={"G": (1, 2), "E": (3, 4, 5)}, keep=False, query_fusion="query",
                 recovery_fusion="recovery", w_res="matrix", mask_granularity="token"):
        super().__init__()
        self.layers, self.keep = dict(layers), keep
        self.weights = {"qk": qk_weight, "inter": alpha, "intra": beta}
        self.query = CrossModalQuery(d_model, n_heads, query_fusion if use_query else "none")
        self.pools = nn.ModuleDict({name: PromptPool(d_model, size, length, top_k, temperature)
                                    for name, size in pool_sizes.items()})
        self.recovery = nn.ModuleDict({G: CrossModalRecovery(d_model, n_heads, mask_ratio, use_intra, use_inter,
                                                             recovery_fusion, w_res, mask_granularity) for G in "GE"})

    def forward(self, F_q, F_v, q_mask, v_mask):
        q = self.query(F_q, F_v, q_mask, v_mask)                                       # Eq. 1       2 x (B,D)
        out = Prompts({}, dict.fromkeys(("qk", "intra", "inter"), F_q.new_zeros(())), {})
        for G in "GE":
            p = {}
            for M in "QV":
                p[M], qk, out.chosen[M + G] = self.pools[M + G](q[M])                  # Eq. 2-3     (B,L,D)
                out.losses["qk"] = out.losses["qk"] + qk
            final, intra, inter = self.recovery[G](p)                                  # Eq. 4-10    2 x (B,L,D)
            out.prompts[G] = torch.cat([final["Q"], final["V"]], 1)                    # (B,2L,D)
            out.losses["intra"], out.losses["inter"] = out.losses["intra"] + intra, out.losses["inter"] + inter
        return out


def total_loss(ce, losses, weights):
    """L = L_CE + L_qk + alpha L_inter + beta L_intra.  All (); a loss without a weight counts once.             Eq. 11"""
    return ce + sum(weights.get(name, 1.0) * value for name, value in losses.items())


# ================================================================================================== the backbone


class VisualEmbedding(nn.Module):
    """Region features and boxes to tokens F^V, as VL-T5 does: a small network on the feature plus a linear map of the box.

    forward(features (B,Nv,f), boxes (B,Nv,4) as x1 y1 x2 y2 in [0,1]) -> (B,Nv,D)
    """

    def __init__(self, feature, d_model):
        super().__init__()
        self.look = nn.Sequential(nn.Linear(feature, 2 * d_model), nn.GELU(), nn.Linear(2 * d_model, d_model))
        self.place = nn.Linear(5, d_model)

    def forward(self, features, boxes):
        area = ((boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1]))[..., None]     # (B,Nv,1)
        return self.look(features) + self.place(torch.cat([boxes, area], -1))                     # (B,Nv,D)


class VQABackbone(nn.Module):
    """A T5 encoder-decoder that reads question tokens and visual tokens in one sequence, with room for prompts.

    t5: any T5ForConditionalGeneration.  pictures(image) -> (features (n,f), boxes (n,4)).  Everything is frozen at first.
    """

    def __init__(self, t5, tokenizer, visual, pictures, prefix="", max_question=20, max_answer=8):
        super().__init__()
        self.t5, self.tokenizer, self.visual = t5, tokenizer, visual
        self.pictures, self.prefix, self.max_question, self.max_answer = pictures, prefix, max_question, max_answer
        self.memo = {}                                               # image -> F_v of it, while `visual` is frozen
        self.eval().requires_grad_(False)                            # dropout off too: the backbone is a fixed function

    @property
    def device(self):
        return self.t5.device

    @property
    def width(self):
        return self.t5.config.d_model

    def tokens(self, texts, limit):
        out = self.tokenizer(list(texts), padding=True, truncation=True, max_length=limit, return_tensors="pt")
        return out["input_ids"].to(self.device), out["attention_mask"].bool().to(self.device)     # 2 x (B,N)

    def embed(self, samples):
        """F_q (B,Nq,D), F_v (B,Nv,D) and their masks: the tokens before encoder block 0.  A frozen picture is embedded once."""
        ids, q_mask = self.tokens([self.prefix + s.question for s in samples], self.max_question)
        F_q = self.t5.get_input_embeddings()(ids)                                                 # (B,Nq,D)
        learning = self.visual.place.weight.requires_grad
        if learning:
            self.memo.clear()
        if learning or any(s.image not in self.memo for s in samples):
            raw = [self.pictures(s.image) for s in samples]
            pad = lambda rows: nn.utils.rnn.pad_sequence(rows, batch_first=True).to(self.device)
            F_v = self.visual(pad([f for f, _ in raw]), pad([b for _, b in raw]))                 # (B,Nv,D)
            sizes = [len(f) for f, _ in raw]
            if not learning:
                self.memo.update({s.image: row[:n] for s, row, n in zip(samples, F_v, sizes)})
        else:
            rows = [self.memo[s.image] for s in samples]
            F_v, sizes = nn.utils.rnn.pad_sequence(rows, batch_first=True), [len(r) for r in rows]
        v_mask = torch.arange(F_v.shape[1]) < torch.tensor(sizes)[:, None]                        # (B,Nv)
        return F_q, F_v, q_mask, v_mask.to(self.device)

    def encode(self, F_q, F_v, q_mask, v_mask, method=None, modality="joint"):
        """One pass through the encoder, prompts injected at their blocks.  Returns hidden (B,N,D), mask (B,N), Prompts or None.

        modality "v" hides the question tokens and question prompts, "q" the picture's (Eq. 12-13); "joint" nothing.
        """
        out = method(F_q, F_v, q_mask, v_mask) if method is not None else None
        place = {i: p for G, p in (out.prompts if out else {}).items() for i in method.layers[G]}
        if modality != "joint":                                      # queries saw both, the encoder sees one
            q_mask, v_mask = q_mask & (modality == "q"), v_mask & (modality == "v")
            half = lambda p: p.chunk(2, 1)[0 if modality == "q" else 1] if p.shape[1] % 2 == 0 else p
            place = {i: half(p) for i, p in place.items()}
        stack, Nq = self.t5.encoder, F_q.shape[1]
        h, mask = torch.cat([F_q, F_v], 1), torch.cat([q_mask, v_mask], 1)                        # (B,N,D) (B,N)
        # Position bias: T5's own between question tokens, zero wherever a visual or prompt token takes part.
        bias = stack.block[0].layer[0].SelfAttention.compute_bias(Nq, Nq, device=h.device)        # (1,H,Nq,Nq)
        wider = lambda bias, n: F.pad(bias, (0, n, 0, n))
        hide = lambda bias, mask: bias.masked_fill(~mask[:, None, None, :], torch.finfo(bias.dtype).min).to(h.dtype)
        bias = wider(bias, F_v.shape[1])                                                          # (1,H,N,N)
        hidden_bias = hide(bias, mask)                                                            # (B,H,N,N)
        for i, block in enumerate(stack.block):
            if i not in place:
                h = block(h, position_bias=hidden_bias)[0]
                continue
            N, P = h.shape[1], place[i].shape[1]                     # append for this block...
            long_bias, long_mask = wider(bias, P), F.pad(mask, (0, P), value=True)
            long_hidden = hide(long_bias, long_mask)                                              # (B,H,N+P,N+P)
            h = block(torch.cat([h, place[i].to(h.dtype)], 1), position_bias=long_hidden)[0]      # (B,N+P,D)
            if method.keep:
                bias, mask, hidden_bias = long_bias, long_mask, long_hidden
            else:
                h = h[:, :N]                                         # ...and drop again after it
        return stack.final_layer_norm(h), mask, out                                               # dropout is off

    def loss(self, hidden, mask, answers):
        """Cross-entropy of the answers' tokens, L_CE of Eq. 11.  hidden (B,N,D), answers: B strings -> ()"""
        from transformers.modeling_outputs import BaseModelOutput
        labels, real = self.tokens(answers, self.max_answer)                                      # (B,Na)
        out = self.t5(encoder_outputs=BaseModelOutput(last_hidden_state=hidden), attention_mask=mask.long(),
                      labels=labels.masked_fill(~real, -100))
        return out.loss

    @torch.no_grad()
    def answer(self, hidden, mask):
        """Greedy decoding with cache.  hidden (B,N,D) -> B strings."""
        from transformers.modeling_outputs import BaseModelOutput
        ids = self.t5.generate(encoder_outputs=BaseModelOutput(last_hidden_state=hidden), attention_mask=mask.long(),
                               max_new_tokens=self.max_answer, num_beams=1, do_sample=False)
        return [text.strip() for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]


# ---- pictures: image -> features (n,f), boxes (n,4)


def world_regions(regions):
    """Regions of the built-in world: the crops' pixels in [-1,1] are the feature, f = 768."""
    pixels, boxes, valid = regions
    flat, boxes, count = torch.from_numpy(pixels).flatten(2), torch.from_numpy(boxes), valid.sum(1)   # (S,6,768) uint8
    return lambda row: (flat[row, :count[row]].float() / 127.5 - 1, boxes[row, :count[row]])


def picture_regions(root):
    """Regions of any picture for the small backbone: a 3 x 3 grid of crops and the whole picture, 16 x 16 pixels each."""
    grid = [(x / 3, y / 3, (x + 1) / 3, (y + 1) / 3) for y in range(3) for x in range(3)] + [(0, 0, 1, 1)]
    boxes = torch.tensor(grid, dtype=torch.float32)                                               # (10,4)

    @functools.lru_cache(maxsize=50_000)
    def load(image):
        crops = data.region_pixels(data.open_picture(data.inside(root, image)), grid)
        return torch.from_numpy(crops).flatten(1).float() / 127.5 - 1, boxes
    return load


def region_files(folder, root):
    """Region features made elsewhere: FOLDER/<picture name>.npz (features (n,f), boxes (n,4) in [0,1]) or .npy (features),
    or one VL-T5 .h5 file (<name>/features, boxes in pixels, img_w, img_h; needs h5py)."""
    folder = Path(folder)
    h5 = None
    if folder.suffix in (".h5", ".hdf5"):
        try:
            import h5py
        except ImportError:
            raise InputError(f"{folder} is an HDF5 file, which needs h5py: pip install h5py")
        if not folder.exists():
            raise InputError(f"{folder} is missing; name VL-T5's feature file with --features")
        h5 = h5py.File(folder, "r")
    width = None

    def load(image):
        nonlocal width
        name = Path(str(image)).stem
        if h5 is not None:
            where = f"{folder}, key {name}"
            if name not in h5:
                raise InputError(f"{where} is missing; --features must hold every picture of the questions")
            features, boxes = h5[name]["features"][:], h5[name]["boxes"][:].astype(np.float32)
            boxes = boxes / np.array([h5[name]["img_w"][()], h5[name]["img_h"][()]] * 2, np.float32)
        else:
            where = next((p for p in (folder / f"{name}.npz", folder / f"{name}.npy") if p.exists()), None)
            if where is None:
                raise InputError(f"{folder / name}.npz (or .npy) is missing; --features must hold every picture of the questions")
            try:
                file = np.load(where, allow_pickle=False)
                features = file["features"] if where.suffix == ".npz" else file
                boxes = file["boxes"] if where.suffix == ".npz" and "boxes" in file else np.tile([0., 0, 1, 1], (len(features), 1))
            except (ValueError, KeyError, OSError, EOFError) as e:
                raise InputError(f"{where} cannot be read ({e}); it needs an array features (n,f), and boxes (n,4) beside it")
        if features.ndim != 2 or boxes.shape != (len(features), 4) or (width and features.shape[1] != width):
            raise InputError(f"{where}: features {features.shape} and boxes {boxes.shape}; expected (n,{width or 'f'}) and (n,4)")
        if not (np.isfinite(features).all() and np.isfinite(boxes).all()):
            raise InputError(f"{where} holds NaN or infinite numbers; extract its features again")
        width = features.shape[1]
        return torch.from_numpy(np.asarray(features, np.float32)), torch.from_numpy(np.asarray(boxes, np.float32))
    return load


def grid_features(name, root, device, cells=6):
    """Patch features of a frozen CLIP, SigLIP or DINOv2 (Hugging Face id or folder), averaged to 6 x 6 = 36 cells with boxes.
    Each picture passes the vision model once; the result is kept on disk."""
    from transformers import AutoImageProcessor, AutoModel
    model = from_pretrained(AutoModel, name, "--vision")
    model = getattr(model, "vision_model", model).eval().requires_grad_(False).to(device)
    process = from_pretrained(AutoImageProcessor, name, "--vision")
    edges = np.linspace(0, 1, cells + 1)
    boxes = torch.tensor([(edges[x], edges[y], edges[x + 1], edges[y + 1]) for y in range(cells) for x in range(cells)],
                         dtype=torch.float32)                                                     # (36,4)

    @torch.no_grad()
    def load(image):
        path = data.inside(root, image)
        try:
            stamp = f"{path.resolve()} {path.stat().st_mtime_ns}"
        except OSError:
            raise InputError(f"picture {path} is missing; put it there or name the folder above it with --root")
        kept = cache_file(f"grid-{cells}", f"{name} {stamp}", ".npy")
        if not kept.exists():
            pixels = process(images=data.open_picture(path), return_tensors="pt")["pixel_values"].to(device)
            patches = model(pixel_values=pixels).last_hidden_state                                # (1,(1+)n*n,f)
            side = int(patches.shape[1] ** 0.5)                                                   # a class token may come first
            square = patches[0, -side * side:].T.reshape(1, -1, side, side)                       # (1,f,n,n)
            pooled = F.adaptive_avg_pool2d(square.float(), cells)[0].flatten(1).T.cpu().numpy()   # (36,f)
            with metrics.atomic(kept, "wb") as f:
                np.save(f, pooled.astype(np.float16))
        return torch.from_numpy(np.load(kept).astype(np.float32)), boxes
    return load


def cache_file(kind, key, suffix):
    """A path in the cache folder that depends on the whole key."""
    return data.cache_folder() / f"{kind}-{hashlib.blake2b(key.encode(), digest_size=10).hexdigest()}{suffix}"


def from_pretrained(cls, name, flag, **more):
    """cls.from_pretrained with one clear line when the id or folder cannot be loaded."""
    try:
        return cls.from_pretrained(name, **more)
    except (OSError, ValueError, KeyError) as e:
        raise InputError(f"{flag} {name}: {str(e).strip().splitlines()[0][:160]}; give a Hugging Face id (needs the network once) "
                         "or a folder written by save_pretrained")


# ---- the small backbone: pre-trained here once, then kept
MINI = dict(d_model=96, d_kv=16, d_ff=192, num_heads=6, num_layers=6, num_decoder_layers=2)       # 0.75 M parameters
EYES = 3                                                             # steps of the eyes alone, per step of the whole
MINI_STEPS, MINI_BATCH, MINI_SCENES, MINI_LR, MINI_VOCAB = 3000, 128, 24_000, 2e-3, 512


def mini_tokenizer(texts=()):
    """One token a word: the world's words, then the most frequent new words of `texts` while the 512 rows last."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast
    known = ["<pad>", "</s>", "<unk>", "<mask>", *data.MINI_WORDS]
    split = pre_tokenizers.Sequence([pre_tokenizers.WhitespaceSplit(),                            # < and > stay: <mask>
                                     pre_tokenizers.Split(Regex(r"[.,;:!?\"'()]"), "isolated")])
    count = Counter(w for text in texts for w, _ in split.pre_tokenize_str(text.lower()))
    new = [w for w, _ in count.most_common() if w not in set(known)]
    words = (known + new)[:MINI_VOCAB]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), split
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    lost = max(0, len(known) + len(new) - MINI_VOCAB)
    if new:
        tqdm.write(f"{len(new)} words are new to the small backbone: {len(new) - lost} get random rows, {lost} become <unk>")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def mini_backbone(texts=(), steps=MINI_STEPS, device="cpu", seed=0):
    """(t5, tokenizer, visual) of the small backbone.  Pre-trained on statements about scenes of the built-in world (never the
    stream's questions) the first time; later read from the cache.  texts: your own data's, for new words.  seed: of its start,
    scenes and statements."""
    from safetensors.torch import load, save
    from transformers import T5Config, T5ForConditionalGeneration
    torch.manual_seed(seed)
    config = T5Config(vocab_size=MINI_VOCAB, dropout_rate=0.0, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0,
                      tie_word_embeddings=True, **MINI)
    t5, visual = T5ForConditionalGeneration(config), VisualEmbedding(3 * data.REGION_PIXELS ** 2, MINI["d_model"])
    both = nn.ModuleDict({"t5": t5, "visual": visual})
    key = json.dumps([MINI, steps, MINI_BATCH, MINI_SCENES, MINI_LR, MINI_VOCAB, data.MINI_VQA_VERSION, EYES, 5, seed])
    path = cache_file("mini-vqa-backbone", key, ".safetensors")
    if not path.exists():
        pretrain(both.to(device), steps, device, seed)
        both.to("cpu")
        seen = {}                                                    # tied tensors are stored once
        for k, v in both.state_dict().items():
            if v.data_ptr() not in {s.data_ptr() for s in seen.values()}:
                seen[k] = v.contiguous()
        with metrics.atomic(path, "wb") as f:
            f.write(save(seen))
    both.load_state_dict(load(path.read_bytes()), strict=False)
    t5.tie_weights()
    return t5, mini_tokenizer(texts), visual


def pretrain(both, steps, device, seed=0):
    """First the eyes alone: a region's token is drawn to the embeddings of the words that describe it, as in contrastive
    picture-text training.  Then everything together on statements with a gap."""
    scenes_n = min(MINI_SCENES, 12 * steps + 200)
    rng = random.Random(f"upstream {seed}")
    scenes = [data.random_scene(rng, data.COCO_NAMES[i % 80], crowd=rng.random() < .4, alone=rng.random() < .4)
              for i in range(scenes_n)]
    regions, tokenizer = data.draw_scenes(scenes), mini_tokenizer()
    pictures = world_regions(regions)
    words = {"name": data.COCO_NAMES, "color": list(data.COLORS), "pattern": data.PATTERNS, "pose": data.POSES, "size": data.SIZES,
             "cell": list(data.CELLS)}
    embedding = both["t5"].get_input_embeddings().weight.detach()
    rows = {k: torch.stack([embedding[tokenizer(v, add_special_tokens=False)["input_ids"]].mean(0)
                            for v in vs]) for k, vs in words.items()}                              # {attribute: (values,D)}
    shown = [(r, i, [vs.index(thing[k]) if thing[k] in vs else -1 for k, vs in words.items()]) for r, scene in enumerate(scenes)
             for i, j in enumerate(data.region_order(scene)) if j < len(scene["things"]) for thing in scene["things"][j:j + 1]]
    eyes, visual = max(EYES * steps, 20), both["visual"].requires_grad_(True)
    optimizer = torch.optim.AdamW(visual.parameters(), 2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=eyes, pct_start=0.1)
    for _ in tqdm(range(eyes), desc="eyes of the small backbone, once", leave=False, mininterval=5):
        batch = rng.sample(shown, min(128, len(shown)))
        r, i = [b[0] for b in batch], [b[1] for b in batch]
        features = torch.from_numpy(regions[0][r, i]).flatten(1).float() / 127.5 - 1              # (B,768)
        x = visual(features.to(device), torch.from_numpy(regions[1][r, i]).to(device))            # (B,D)
        target = torch.tensor([t for *_, t in batch], device=device)                              # (B,6)
        loss = sum(F.cross_entropy(x @ e.T.to(device) / MINI["d_model"] ** 0.5, target[:, i], ignore_index=-1)
                   for i, e in enumerate(rows.values()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    model = VQABackbone(both["t5"], tokenizer, both["visual"], pictures, max_question=16, max_answer=10)
    both.requires_grad_(True).train()
    optimizer = torch.optim.AdamW(both.parameters(), MINI_LR, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, MINI_LR, total_steps=max(steps, 20), pct_start=0.1)
    bar = tqdm(range(steps), desc="pre-training the small backbone, once", leave=False, mininterval=5)
    for step in bar:
        rows = [rng.randrange(scenes_n) for _ in range(MINI_BATCH)]
        pairs = [data.upstream_statement(rng, scenes[r]) for r in rows]
        hidden, mask, _ = model.encode(*model.embed([data.Sample(r, r, q, (a,), "", "") for r, (q, a) in zip(rows, pairs)]))
        loss = model.loss(hidden, mask, [a for _, a in pairs])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(both.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0:
            bar.set_postfix(loss=f"{loss.item():.2f}")
    both.requires_grad_(False).eval()


# =================================================================================================== baselines
# All of them see the same frozen tokens, hold as many prompts as MM-Prompt's four pools where their design allows, and inject
# at the same blocks ("identical injection layers if possible", section 4.2).  begin_task(t) is called before task t.


class L2P(nn.Module):
    """L2P (Wang et al. 2022): each modality's mean token picks k short prompts, which join the sequence at the input and stay.
    shared=True is L2P*: one pool, one query.  length 2 times k = 5 injects about as many tokens as MM-Prompt."""

    def __init__(self, d_model, pool_sizes, top_k=5, length=2, shared=False, qk_weight=1.0, **_):
        super().__init__()
        sizes = {"Q": pool_sizes["QG"] + pool_sizes["QE"], "V": pool_sizes["VG"] + pool_sizes["VE"]}
        sizes = {"QV": sum(sizes.values())} if shared else sizes
        self.pools = nn.ModuleDict({M: PromptPool(d_model, n, length, top_k) for M, n in sizes.items()})
        self.layers, self.keep, self.weights = {"G": (0,)}, True, {"qk": qk_weight}

    def forward(self, F_q, F_v, q_mask, v_mask):
        q = {"Q": masked_mean(F_q, q_mask), "V": masked_mean(F_v, v_mask)}
        q["QV"] = (q["Q"] + q["V"]) / 2
        prompts, pull, chosen = [], 0, {}
        for M, pool in self.pools.items():
            _, qk, chosen[M] = pool(q[M])
            prompts.append(pool.prompts[chosen[M]].flatten(1, 2))    # (B,k,L,D) -> (B,k*L,D): joined, not mixed
            pull = pull + qk
        return Prompts({"G": torch.cat(prompts, 1)}, {"qk": pull}, chosen)


class DualPrompt(nn.Module):
    """DualPrompt (Wang et al. 2022): G prompts that all tasks share, and one E prompt per task, found by its key at test."""

    def __init__(self, d_model, length=8, tasks=10, layers=None, qk_weight=1.0, **_):
        super().__init__()
        self.layers, self.keep, self.weights, self.t = layers, False, {"qk": qk_weight}, 0
        make = lambda *shape: nn.Parameter(torch.randn(*shape) * 0.02)
        self.pools = nn.ParameterDict({"G": make(2 * length, d_model)})
        for M in "QV":
            self.pools[M + "E"], self.pools[M + "keys"] = make(tasks, length, d_model), make(tasks, d_model)

    def begin_task(self, t):
        self.t = t

    def forward(self, F_q, F_v, q_mask, v_mask):
        expert, pull, chosen = [], 0, {}
        for M, q in (("Q", masked_mean(F_q, q_mask)), ("V", masked_mean(F_v, v_mask))):
            s = F.normalize(q, dim=-1) @ F.normalize(self.pools[M + "keys"], dim=-1).T            # (B,T)
            pull = pull + (1 - s[:, self.t]).mean()
            best = torch.full_like(s[:, 0], self.t, dtype=torch.long) if self.training else s[:, :self.t + 1].argmax(-1)
            chosen[M + "E"] = best[:, None]                          # training knows its task, test does not
            expert.append(self.pools[M + "E"][best])                 # (B,L,D)
        return Prompts({"G": self.pools["G"].expand(len(F_q), -1, -1), "E": torch.cat(expert, 1)}, {"qk": pull}, chosen)


class CODAPrompt(nn.Module):
    """CODA-Prompt (Smith et al. 2023): a prompt is a weighted sum of all components; each task adds its share, old ones freeze.
    Weight of component m: cos(q * A_m, K_m).  Orthogonality is asked of components, keys and attention vectors."""

    def __init__(self, d_model, pool_sizes, length=8, tasks=10, layers=None, ortho=0.1, **_):
        super().__init__()
        self.layers, self.keep, self.weights, self.t, self.tasks = layers, False, {"ortho": ortho}, 0, tasks
        self.pools = nn.ModuleDict()
        for name, n in pool_sizes.items():
            self.pools[name] = nn.ParameterDict({"prompts": torch.empty(n, length, d_model), "key": torch.empty(n, d_model),
                                                 "attend": torch.empty(n, d_model)})
            for p in self.pools[name].values():
                nn.init.orthogonal_(p.data.view(n, -1))

    def begin_task(self, t):
        self.t = t

    def forward(self, F_q, F_v, q_mask, v_mask):
        q = {"Q": masked_mean(F_q, q_mask), "V": masked_mean(F_v, v_mask)}
        p, penalty = {}, 0
        for name, pool in self.pools.items():
            share = len(pool["key"]) // self.tasks                  # components per task
            old, now = self.t * share, (self.t + 1) * share
            use = {k: torch.cat([x[:old].detach(), x[old:now]]) for k, x in pool.items()}
            a = F.cosine_similarity(q[name[0]][:, None] * use["attend"], use["key"][None], dim=-1)          # (B,m)
            p[name] = torch.einsum("bm,mld->bld", a, use["prompts"])                                         # (B,L,D)
            for x in use.values():
                x = x.flatten(1)
                penalty = penalty + (x @ x.T - torch.eye(len(x), device=x.device)).square().mean()
        return Prompts({G: torch.cat([p["Q" + G], p["V" + G]], 1) for G in "GE"}, {"ortho": penalty}, {})


class MaPLe(nn.Module):
    """MaPLe (Khattak et al. 2023): question prompts at every injected block, visual prompts a linear map of them; no selection."""

    def __init__(self, d_model, length=8, layers=None, **_):
        super().__init__()
        self.blocks = sorted(i for group in layers.values() for i in group)
        self.layers, self.keep, self.weights = {str(i): (i,) for i in self.blocks}, False, {}
        self.pools = nn.ParameterDict({str(i): torch.randn(length, d_model) * 0.02 for i in self.blocks})
        self.couple = nn.ModuleDict({str(i): nn.Linear(d_model, d_model) for i in self.blocks})

    def forward(self, F_q, F_v, q_mask, v_mask):
        both = {i: torch.cat([p, self.couple[i](p)], 0) for i, p in self.pools.items()}           # (2L,D)
        return Prompts({i: p.expand(len(F_q), -1, -1) for i, p in both.items()}, {}, {})


METHODS = ("mmprompt", "none", "finetune", "joint", "l2p", "l2p-one-pool", "dualprompt", "coda", "maple")


def build_method(args, width, tasks):
    """The prompt module that --method names, or None for none, finetune and joint."""
    layers = {"G": tuple(args.layers_g), "E": tuple(args.layers_e)}
    common = dict(pool_sizes=dict(zip(("QG", "QE", "VG", "VE"), args.pool_sizes)), length=args.length, layers=layers)
    if args.method == "mmprompt":
        return MMPrompt(width, args.heads, top_k=args.top_k, mask_ratio=args.mask_ratio, use_query=args.use_query,
                        use_intra=args.use_intra, use_inter=args.use_inter, alpha=args.alpha, beta=args.beta,
                        qk_weight=args.qk_weight, temperature=args.temperature, keep=args.keep_prompts,
                        query_fusion=args.query_fusion, recovery_fusion=args.recovery_fusion, w_res=args.w_res,
                        mask_granularity=args.mask_granularity, **common)
    make = {"l2p": L2P, "l2p-one-pool": functools.partial(L2P, shared=True), "dualprompt": DualPrompt, "coda": CODAPrompt,
            "maple": MaPLe}.get(args.method)
    if make is L2P or args.method == "l2p-one-pool":
        return make(width, top_k=args.top_k, pool_sizes=common["pool_sizes"], qk_weight=args.qk_weight)
    return make and make(width, tasks=tasks, qk_weight=args.qk_weight, ortho=args.ortho_weight, **common)


# ========================================================================================== train and evaluate


class Learner:
    """A backbone, a prompt method (or none), and what the arguments let learn."""

    def __init__(self, args, model, method):
        self.args, self.model, self.method = args, model, method
        self.full = args.method in ("finetune", "joint")
        device = torch.device(args.device)
        self.amp = (lambda: torch.autocast(device.type, torch.bfloat16)) if args.dtype == "bf16" else nullcontext

    def begin(self, t):
        """Decide what task t may change, and make its optimiser."""
        self.model.requires_grad_(False)
        if self.full:
            self.model.t5.requires_grad_(True)
        elif self.args.train_decoder:
            self.model.t5.decoder.requires_grad_(True)
            self.model.t5.get_input_embeddings().requires_grad_(False)   # shared with the frozen encoder
        vision = self.args.train_vision
        if self.args.method != "none" and (vision == "always" or vision == "first" and t == 0):
            self.model.visual.requires_grad_(True)
        if hasattr(self.method, "begin_task"):
            self.method.begin_task(t)
        if self.args.freeze_query and self.args.method == "mmprompt":
            self.method.query.requires_grad_(t == 0)
        rates = {"pools": self.args.lr, "attention": self.args.lr_attention, "backbone": self.args.lr_backbone}
        groups = {k: [] for k in rates}
        for name, p in self.trainable().items():
            kind = "pools" if "pools." in name else "attention" if name.startswith(("method.", "model.visual.")) else "backbone"
            groups["backbone" if self.full else kind].append(p)
        # No decay on prompts and keys: it would shrink those that this task never touches.
        groups = [{"params": ps, "lr": rates[k], "weight_decay": 0.0 if k == "pools" else self.args.weight_decay}
                  for k, ps in groups.items() if ps]
        fused = torch.device(self.args.device).type in ("cpu", "cuda")
        self.optimizer = torch.optim.AdamW(groups, fused=fused) if groups else None
        self.rates = [group["lr"] for group in groups]

    def trainable(self):
        """{name: parameter} of everything that learns now."""
        parts = [("model", self.model)] + ([("method", self.method)] if self.method is not None else [])
        return {f"{a}.{k}": p for a, part in parts for k, p in part.named_parameters() if p.requires_grad}

    def snapshot(self):
        return {k: p.detach().cpu().clone() for k, p in self.trainable().items()}

    def restore(self, state):
        own = {f"{a}.{k}": p for a, part in (("model", self.model), ("method", self.method)) if part is not None
               for k, p in part.named_parameters()}
        with torch.no_grad():
            for k, v in state.items():
                own[k].copy_(v)
        if any(k.startswith("model.visual.") for k in state):        # else every picture would be embedded again each task
            self.model.memo.clear()

    def loss(self, samples, answers):
        """Eq. 11 on a batch."""
        with self.amp():
            hidden, mask, out = self.model.encode(*self.model.embed(samples), self.method, self.args.train_modality)
            ce = self.model.loss(hidden, mask, answers)
        return total_loss(ce, out.losses, self.method.weights) if out else ce

    def epoch(self, samples, memory, seed, where, bar, done=0.0, share=1.0):
        """One pass over the samples in an order, with answers and masks, that depend on `seed` alone.
        --schedule linear: learning rates fall to zero over the task; this epoch begins at `done` of it and is `share` of it."""
        rng = random.Random(seed)
        torch.manual_seed(rng.getrandbits(48))
        order = rng.sample(samples, len(samples))
        if self.method is not None:
            self.method.train()
        total = steps = 0
        B = self.args.batch
        starts = range(0, len(order), B)
        for step, i in enumerate(starts):
            batch = order[i:i + B] + (rng.sample(memory, min(B, len(memory))) if memory else [])
            loss = self.loss(batch, [draw_answer(rng, s.answers) for s in batch])
            if not torch.isfinite(loss):
                raise InputError(f"the loss is {loss.item()} at {where}, step {step}, lr {self.args.lr:g}; lower --lr, --lr-attention "
                                 "or --lr-backbone")
            if self.args.schedule == "linear":
                for group, rate in zip(self.optimizer.param_groups, self.rates):
                    group["lr"] = rate * (1 - done - share * step / len(starts))
            (loss / self.args.accum).backward()
            if (step + 1) % self.args.accum == 0 or step + 1 == len(starts):
                nn.utils.clip_grad_norm_([p for g in self.optimizer.param_groups for p in g["params"]], self.args.clip)
                self.optimizer.step()
                self.optimizer.zero_grad()
            total, steps = total + loss.item(), steps + 1
            bar.set_postfix_str(f"{where} loss {total / steps:.3f}")
            bar.update()
        return total / max(steps, 1)

    @torch.no_grad()
    def evaluate(self, samples, modality=None, counts=None):
        """(score, token F1) in points on test samples.  Each prediction depends on its own sample alone."""
        self._eval()
        score = f1 = 0.0
        for i in range(0, len(samples), self.args.eval_batch):
            part = samples[i:i + self.args.eval_batch]
            with self.amp():
                hidden, mask, out = self.model.encode(*self.model.embed(part), self.method, modality or self.args.modality)
                answers = self.model.answer(hidden, mask)
            for s, a in zip(part, answers):
                score += metrics.vqa_accuracy(a, s.answers)
                f1 += max(metrics.token_f1(a, truth) for truth in set(s.answers))
            for pool, chosen in (out.chosen if out and counts is not None else {}).items():
                counts.setdefault(pool, Counter()).update(chosen.flatten().tolist())
        return 100 * score / len(samples), 100 * f1 / len(samples)

    def _eval(self):
        if self.method is not None:
            self.method.eval()


def draw_answer(rng, answers):
    """A training target: one of the annotators' answers with probability proportional to its soft score min(1, count/3)."""
    if len(answers) == 1:
        return answers[0]
    count = Counter(answers)
    return rng.choices(list(count), [min(1.0, c / 3) for c in count.values()])[0]


def load_stream(args, seed):
    """The tasks of a run, in the order asked for."""
    more = {"sizes": args.sizes} if args.data == "mini" else {}
    return data.vqa_stream(args.setting, args.data, args.root, args.data_seed if args.data_seed is not None else seed,
                           **more).reorder(args.order)


def load_backbone(args, stream):
    """The frozen encoder-decoder with its eyes: the small one, or any T5 with any CLIP-like vision model or feature files."""
    mini_world = args.data == "mini"
    if args.backbone != "mini" and mini_world:
        raise InputError("--data mini has pictures of its own for the small backbone; with --backbone give your own --data")
    root = stream.extra.get("root")
    if not mini_world and not args.features:
        first = data.inside(root, stream.tasks[0].train[0].image)
        if not first.exists():
            raise InputError(f"picture {first} is missing: put the picture folder {first.parent} there, or name region features "
                             "with --features")
    device = torch.device(args.device)
    if args.backbone == "mini":
        texts = [] if mini_world else [x for t in stream.tasks for s in t.train for x in (s.question, *s.answers)]
        t5, tokenizer, visual = mini_backbone(texts, 40 if args.smoke else MINI_STEPS, device, args.backbone_seed)
        pictures = world_regions(stream.extra["regions"]) if mini_world else picture_regions(root)
    else:
        from transformers import AutoModelForSeq2SeqLM, AutoTokenizer
        t5, tokenizer = (from_pretrained(c, args.backbone, "--backbone") for c in (AutoModelForSeq2SeqLM, AutoTokenizer))
        if not hasattr(t5, "encoder") or not hasattr(t5.encoder, "block"):
            raise InputError(f"--backbone {args.backbone} is a {type(t5).__name__}; the prompts need a T5-family encoder-decoder")
        if not args.features and not args.vision:
            raise InputError("--backbone other than mini needs eyes: --vision (a CLIP, SigLIP or DINOv2 id or folder) or --features")
        pictures, visual = (None, None) if args.features else (grid_features(args.vision, root, device), None)
    if args.features:
        pictures, visual = region_files(args.features, root), None
    if visual is None:                                               # width of the features: ask the first picture
        width = pictures(stream.tasks[0].train[0].image)[0].shape[1]
        torch.manual_seed(0)
        visual = VisualEmbedding(width, t5.config.d_model)
        args.train_vision = args.train_vision or "first"
    args.train_vision = args.train_vision or "never"
    blocks, wanted = len(t5.encoder.block), max(args.layers_g + args.layers_e)
    if wanted >= blocks:
        raise InputError(f"--layers-g/--layers-e name block {wanted}, but the encoder has blocks 0..{blocks - 1}")
    prefix = "" if args.backbone == "mini" else args.prefix
    return VQABackbone(t5, tokenizer, visual, pictures, prefix, args.max_question, args.max_answer).to(device)


def deciding(args, seed):
    """The arguments that decide a run's outcome; the others (where, how it is shown) may differ when a run is resumed."""
    free = {"out", "resume", "seeds", "device", "table", "rows", "bench", "quiet"}
    return {**{k: v for k, v in vars(args).items() if k not in free}, "seed": seed}


def run(args, seed, folder):
    """One run with one seed.  Returns what results.json holds."""
    args = argparse.Namespace(**vars(args))
    torch.use_deterministic_algorithms(True, warn_only=True)         # gradients of gathered prompts add up in a fixed order
    stream = load_stream(args, seed)
    T = len(stream)
    model = load_backbone(args, stream)
    torch.manual_seed(seed)
    method = build_method(args, model.width, T)
    method = method.to(args.device) if method is not None else None
    learner = Learner(args, model, method)
    record = metrics.Run(folder, deciding(args, seed), args.resume)
    say = (lambda *a: None) if args.quiet else tqdm.write

    learner.begin(0)
    trainable = sum(p.numel() for p in learner.trainable().values()) if args.method != "none" else 0
    total = sum(p.numel() for part in (model, method) if part is not None for p in part.parameters())
    say(f"method {args.method} · setting {args.setting} · data {stream.extra.get('version', args.data)} · backbone {args.backbone} "
        f"· seed {seed} · {args.device}\n{data.describe(stream)}\ntrainable {trainable:,} of {total:,} parameters · batch {args.batch}"
        f"{f' x {args.accum}' if args.accum > 1 else ''} · epochs {args.epochs} · greedy decoding, no task id at test, "
        f"replay buffer {args.memory}")

    state = record.state or {"t": 0, "s": 0, "epoch": 0, "matrix": [], "intra": {}, "weights": None, "best": None, "optimizer": None}
    A = np.full((T, T), np.nan)
    for t, row in enumerate(state["matrix"]):
        A[t, :len(row)] = row
    intra = {int(t): rows for t, rows in state["intra"].items()}     # outer task -> rows of its subtask matrix
    if state["weights"]:
        learner.restore(state["weights"])
    lessons, row, counts = lesson_plan(args, stream), [], []
    steps = sum(math.ceil(len(part.train) / args.batch) for parts in lessons for part in parts) * args.epochs
    bar = tqdm(total=steps, disable=args.quiet, mininterval=1, leave=False)
    try:
        for t, parts in enumerate(lessons):
            if t < state["t"]:
                bar.update(sum(math.ceil(len(p.train) / args.batch) for p in parts) * args.epochs)
                continue
            memory = buffer(args.memory, stream.tasks[:t], seed)
            for s, part in enumerate(parts):
                learner.begin(t)
                resumed = t == state["t"] and s == state["s"]
                if t == state["t"] and s < state["s"]:               # learned before a kill
                    continue
                best = state["best"] if resumed else None
                if resumed and state["optimizer"]:
                    learner.optimizer.load_state_dict(state["optimizer"])
                for epoch in range(state["epoch"] if resumed else 0, args.epochs if learner.optimizer else 0):
                    where = f"task {t + 1}/{T} {part.name[:16]} epoch {epoch + 1}/{args.epochs}"
                    loss = learner.epoch(part.train, memory, f"{seed} {t} {s} {epoch}", where, bar, epoch / args.epochs, 1 / args.epochs)
                    value = learner.evaluate(part.val, args.train_modality)[0] if part.val and args.select == "best" else epoch
                    if best is None or value >= best["value"]:
                        best = {"value": value, "weights": learner.snapshot()}
                    record.log(task=t, subtask=s, epoch=epoch, loss=loss, validation=value if args.select == "best" else None)
                    record.checkpoint(t=t, s=s, epoch=epoch + 1, matrix=rows_of(A), intra=intra, best=best,
                                      weights=everything(learner), optimizer=learner.optimizer.state_dict())
                if best:
                    learner.restore(best["weights"])
                if len(parts) > 1:                                   # F_intra: the subtasks of this task so far
                    intra.setdefault(t, [])
                    intra[t] = intra[t][:s] + [[learner.evaluate(p.test)[0] if p.test else 0.0 for p in parts[:s + 1]]]
                record.checkpoint(t=t, s=s + 1, epoch=0, matrix=rows_of(A), intra=intra, best=None, weights=everything(learner),
                                  optimizer=None)
            counts = [{} for _ in range(t + 1)]
            row = [learner.evaluate(task.test, counts=c) for task, c in zip(stream.tasks[:t + 1], counts)] \
                if args.method != "joint" or t + 1 == T else [(0.0, 0.0)] * (t + 1)
            A[t, :t + 1] = [score for score, _ in row]
            record.checkpoint(t=t + 1, s=0, epoch=0, matrix=rows_of(A), intra=intra, best=None, weights=everything(learner),
                              optimizer=None)
            if args.method not in ("joint", "none") or t + 1 == T:
                say(f"\nafter task {t + 1} of {T}\n{metrics.format_matrix(A[:t + 1], stream.names)}")
    finally:
        bar.close()
    if args.method == "joint":                                       # one training, one evaluation: every row is the last
        A = np.where(np.tri(T) == 1, A[-1], np.nan)
    return finish(args, seed, stream, learner, record, A, intra, trainable, total - trainable, say, row, counts)


def lesson_plan(args, stream):
    """What is trained on, task by task: a task, its subtasks in DI, everything at once (in the last place) for joint."""
    if args.method == "joint":
        pool = lambda k: [s for task in stream.tasks for s in getattr(task, k)]
        return [[] for _ in stream.tasks[1:]] + [[data.Task("all tasks", pool("train"), pool("val"), pool("test"))]]
    return [task.subtasks or [task] for task in stream.tasks]


def buffer(size, past, seed):
    """Replay samples: `size` in all, shared equally by the past tasks, drawn at random from each (Table 3)."""
    if not size or not past:
        return []
    return [s for i, task in enumerate(past)
            for s in random.Random(f"memory {seed} {i}").sample(task.train, min(len(task.train), size // len(past)))]


def everything(learner):
    """All tensors that any task may have changed, for the checkpoint."""
    out = {f"method.{k}": p for k, p in learner.method.named_parameters()} if learner.method is not None else {}
    part = learner.model if learner.full else learner.model.t5.decoder if learner.args.train_decoder else None
    if part is not None:
        names = {id(p): k for k, p in learner.model.named_parameters()}
        out |= {f"model.{names[id(p)]}": p for p in part.parameters()}
    out |= {f"model.visual.{k}": p for k, p in learner.model.visual.named_parameters()}
    return {k: p.detach().cpu().clone() for k, p in out.items()}


def rows_of(A):
    return [row[:t + 1].tolist() for t, row in enumerate(A) if not np.isnan(row[0])]


def finish(args, seed, stream, learner, record, A, intra, trainable, frozen, say, row, counts):
    """The last row again with one modality hidden (Eq. 12-13), the metrics, the files, and the copy-paste line."""
    known = len(row) == len(stream) and args.modality == "joint"     # not known after resuming a run that was all but done
    counts = counts if known else [{} for _ in stream.tasks]
    by = {m: row if known and m == "joint" else [learner.evaluate(task.test, m, c if m == "joint" else None)
                                                 for task, c in zip(stream.tasks, counts)] for m in ("joint", "v", "q")}
    mean = {m: float(np.mean([score for score, _ in rows])) for m, rows in by.items()}
    values = {"A": metrics.average_accuracy(A), "F_inter": metrics.forgetting(A), "F_inter_own": metrics.forgetting(A, "own"),
              "token_F1": float(np.mean([f1 for _, f1 in by["joint"]])), "A_v_only": mean["v"], "A_q_only": mean["q"],
              "merge_effectiveness": float(metrics.merge_effectiveness(mean["joint"], mean["v"], mean["q"])),
              "modality_difference": float(metrics.modality_difference(mean["v"], mean["q"]))}
    if intra:
        square = [np.array([r + [np.nan] * (len(rows) - len(r)) for r in rows]) for rows in intra.values()]
        values["F_intra"] = metrics.intra_forgetting(square)
    if args.method == "joint":                                       # joint training knows no tasks: one model, scored for QI too
        by_type = {}
        for task in stream.tasks:
            for s in task.test:
                by_type.setdefault(s.question_type, []).append(s)
        values["A_by_type"] = float(np.mean([learner.evaluate(part)[0] for part in by_type.values()]))
    pools = sorted({p for c in counts for p in c})
    selection = {p: [dict(sorted(c.get(p, Counter()).items())) for c in counts] for p in pools}
    prompts = dict(learner.method.state_dict()) if learner.method is not None else None
    results = record.finish(A, stream.names, values, prompts, f"{args.method} {args.setting}: score on task (column) after (row)",
                            trainable=trainable, frozen=frozen, selection=selection, intra=intra,
                            protocol={"task id at test": False, "replay": args.memory, "select": args.select},
                            world=stream.extra.get("version"), counts=[[len(t.train), len(t.val), len(t.test)] for t in stream.tasks])
    return results


# ===================================================================================================== the paper's tables
# Each row: label, the flags that make it, and what the paper prints (VQA v2; A / F_inter).
SETTINGS = ("CI", "QI", "DI")
COLUMNS = ("A", "F_inter", "F_intra", "merge_effectiveness")
PAPER_1 = {"l2p": ((33.706, 4.323), (13.720, 23.807), (31.186, 2.112)), "l2p-one-pool": ((33.428, 4.150), (13.853, 23.651), (31.343, 2.201)),
           "dualprompt": ((36.063, 4.449), (14.146, 23.518), (33.601, 2.660)), "coda": ((37.102, 4.527), (15.438, 22.561), (35.138, 0.902)),
           "maple": ((37.450, 4.606), (15.371, 22.164), (35.187, 1.054)), "mmprompt": ((39.240, 3.748), (16.757, 21.546), (36.223, 0.447))}
OURS = (36.223, 0.447)
NO_RECOVERY = {"use_intra": False, "use_inter": False}
ISOLATED = {"use_query": False, **NO_RECOVERY}
TABLES = {
    "1": [(f"{setting} {method}", {"setting": setting, "method": method}, PAPER_1.get(method, (None,) * 3)[i])
          for i, setting in enumerate(SETTINGS) for method in METHODS    # DI's eight tasks are CI's; joint training has no tasks
          if (setting, method) not in (("DI", "none"), ("DI", "joint"), ("QI", "joint"))],
    "2": [("isolated prompts", {"setting": "DI", **ISOLATED}, (34.172, 1.310)),
          ("CQ", {"setting": "DI", **NO_RECOVERY}, (34.990, 0.588)), ("CQ + CR", {"setting": "DI"}, OURS)],
    "query": [("isolated prompts", {"setting": "DI", **ISOLATED}, (34.172, 1.310)),
              ("CQ", {"setting": "DI", **NO_RECOVERY}, (34.990, 0.588)),
              ("CQ learned in task 1 only", {"setting": "DI", **NO_RECOVERY, "freeze_query": True}, None),
              ("CQ + CR", {"setting": "DI"}, OURS), ("CQ learned in task 1 only + CR", {"setting": "DI", "freeze_query": True}, None)],
    "3": [(f"{method} memory {m}", {"setting": "DI", "method": method, "memory": m}, paper) for method, m, paper in (
        ("dualprompt", 500, (27.641, 3.765)), ("coda", 500, (30.632, 2.471)), ("maple", 500, (30.049, 3.112)),
        ("mmprompt", 500, (32.394, 2.259)), ("mmprompt", 200, (29.945, 3.112)), ("mmprompt", 1000, (34.268, 2.427)))],
    "9": [(" ".join(map(str, sizes)), {"setting": "DI", "pool_sizes": sizes}, paper) for sizes, paper in (
        ([10, 80, 10, 80], (35.79, 0.914)), ([50, 50, 50, 50], (35.168, 1.268)), ([40, 60, 80, 120], OURS),
        ([60, 80, 100, 140], (34.851, 0.985)))],
    "10": [("no recovery", {"setting": "DI", **NO_RECOVERY}, (34.990, 0.588)),
           ("intra", {"setting": "DI", "use_inter": False}, (35.150, 1.140)),
           ("inter", {"setting": "DI", "use_intra": False}, (35.318, 1.071)), ("intra + inter", {"setting": "DI"}, OURS)],
    "11": [("no loss", {"setting": "DI", "alpha": 0.0, "beta": 0.0}, (34.260, 1.871)),
           ("L_intra", {"setting": "DI", "alpha": 0.0}, (34.743, 1.531)), ("L_inter", {"setting": "DI", "beta": 0.0}, (35.059, 1.204)),
           ("L_intra + L_inter", {"setting": "DI"}, OURS)],
    "12": [(f, {"setting": "DI", "query_fusion": f}, paper) for f, paper in (
        ("plus", (34.275, 1.731)), ("mean", (34.398, 2.015)), ("hadamard", (34.702, 1.142)), ("cross-attention", (34.891, 1.202)),
        ("query", OURS))],
    "13": [(f, {"setting": "DI", "recovery_fusion": f}, paper) for f, paper in (
        ("plus", (33.850, 1.335)), ("mean", (34.170, 1.405)), ("hadamard", (34.212, 1.274)), ("cross-attention", (34.628, 1.428)),
        ("recovery", OURS))],
    "fig4c": [(f"delta {d}", {"setting": "DI", "mask_ratio": d}, OURS if d == 0.05 else None) for d in (0.01, 0.03, 0.05, 0.07, 0.10)],
    "fig4d": [(f"alpha {a}", {"setting": "DI", "alpha": a}, OURS if a == 1.0 else None) for a in (0.4, 0.6, 0.8, 1.0, 1.2, 1.4)],
    "fig9": [(f"beta {b}", {"setting": "DI", "beta": b}, OURS if b == 0.3 else None) for b in (0.1, 0.2, 0.3, 0.4, 0.5)],
    "bounds": [("zero-shot", {"setting": "CI", "method": "none"}, None), ("joint", {"setting": "CI", "method": "joint"}, None)] +
              [(f"{setting} fine-tuning", {"setting": setting, "method": "finetune"}, None) for setting in SETTINGS] +
              [(f"joint, {word} only", {"setting": "CI", "method": "joint", "epochs": 8, "train_modality": m, "modality": m}, None)
               for word, m in (("question", "q"), ("picture", "v"))],
}


def table(args):
    """One of TABLES, a run for every row and seed: see metrics.run_table."""
    rows = TABLES[args.table]
    default = next((label for label, flags, _ in rows if flags == {"setting": "DI"}), None)
    against = (lambda label: f"{label.split()[0]} mmprompt") if args.table == "1" else lambda label: default

    def settle(one):
        one.backbone_seed = one.seed if one.backbone_seed is None else one.backbone_seed
        return (one := settled(one)), deciding(one, one.seed)
    title = f"Table {args.table} on {args.data}; the paper's numbers are its VQA v2"
    metrics.run_table(args, title, rows, [{"seed": s} for s in args.seeds], settle, lambda one, folder: run(one, one.seed, folder),
                      args.out, COLUMNS, ("A", "F_inter"), against, "A / F_inter", args.rows)


# ============================================================================================================= --bench


def bench(args):
    """Cost of the prompts against the frozen encoder they are injected into, at T5-base shapes with random weights."""
    from transformers import T5Config, T5ForConditionalGeneration
    device = torch.device(args.device)
    small = args.smoke
    B, Nq, Nv, D = (8, 8, 6, 64) if small else (100, 20, 36, 768)
    config = T5Config(d_model=D, d_kv=D // 12 if D % 12 == 0 else 16, d_ff=4 * D, num_heads=12 if D % 12 == 0 else 4,
                      num_layers=6 if small else 12, num_decoder_layers=1, vocab_size=512 if small else 32128,
                      dropout_rate=0.0, decoder_start_token_id=0)
    torch.manual_seed(0)
    model = VQABackbone(T5ForConditionalGeneration(config), None, VisualEmbedding(8, D), None).to(device)
    F_q, F_v = torch.randn(B, Nq, D, device=device), torch.randn(B, Nv, D, device=device)
    q_mask, v_mask = torch.ones(B, Nq, dtype=torch.bool, device=device), torch.ones(B, Nv, dtype=torch.bool, device=device)
    layers = {"G": (1, 2), "E": (3, 4, 5)}
    ours, dual = MMPrompt(D, length=args.length).to(device).eval(), DualPrompt(D, args.length, 10, layers).to(device).eval()
    dual.begin_task(9)
    inputs = (F_q, F_v, q_mask, v_mask)
    amp = (lambda: torch.autocast(device.type, torch.bfloat16)) if args.dtype == "bf16" else nullcontext

    def seconds(work, repeat=3):
        with torch.no_grad(), amp():
            work()
            times = []
            for _ in range(repeat):
                start = time.perf_counter()
                work()
                if device.type == "cuda":
                    torch.cuda.synchronize()
                times.append(time.perf_counter() - start)
        return sorted(times)[repeat // 2]

    pool, q = ours.pools["VE"], torch.randn(B, D, device=device)
    assert torch.allclose(looped_pool(pool, q[:2]), pool(q[:2])[0], atol=1e-5)
    assert torch.allclose(looped_method(ours, *(x[:2] for x in inputs))["E"], ours(*(x[:2] for x in inputs)).prompts["E"], atol=1e-4)
    rows = {"frozen encoder, no prompts": seconds(lambda: model.encode(*inputs)),
            "query + selection + recovery (Eq. 1-10)": seconds(lambda: ours(*inputs)),
            "DualPrompt's prompts": seconds(lambda: dual(*inputs)),
            "encoder with MM-Prompt": seconds(lambda: model.encode(*inputs, ours)),
            "encoder with DualPrompt": seconds(lambda: model.encode(*inputs, dual)),
            "selection (Eq. 2-3), one pool of 120": seconds(lambda: pool(q)),
            "the same in loops over samples and prompts": seconds(lambda: looped_pool(pool, q), 1),
            "query + selection + recovery, a loop over samples": seconds(lambda: looped_method(ours, *inputs), 1)}
    names = list(rows)
    over = {names[1]: names[0], names[3]: names[4], names[6]: names[5], names[7]: names[1]}
    hardware = metrics.environment()
    print(f"batch {B}, {Nq} question and {Nv} picture tokens, width {D}, {config.num_layers} encoder blocks, {args.dtype}, "
          f"{hardware['hardware']}, {hardware['threads']} threads")
    for name, value in rows.items():
        ratio = f"{value / rows[over[name]]:8.2f} x {over[name]}" if name in over else ""
        print(f"{name:<52}{1000 * value:10.1f} ms  {ratio}")
    count = lambda m: sum(p.numel() for p in m.parameters())
    frozen = count(model.t5.encoder.block)
    print(f"parameters: MM-Prompt {count(ours):,}, DualPrompt {count(dual):,}, frozen encoder blocks {frozen:,} · "
          f"throughput {B / rows[names[3]]:.0f} samples/s · peak {metrics.peak_memory_mb():.0f} MiB\n"
          "paper, Fig. 7: MM-Prompt 0.179 s per 100 samples, DualPrompt 0.158 s, ratio 1.13")
    return rows


@torch.no_grad()
def looped_pool(pool, q):
    """Eq. 2-3 as written for one sample, one prompt at a time: the reference that --bench and the tests compare with."""
    out = []
    for b in range(len(q)):
        s = [torch.dot(q[b], k) / (q[b].norm() * k.norm()) for k in pool.keys]
        best = sorted(range(len(s)), key=lambda i: -float(s[i]))[:pool.k]
        weight = [math.exp(float(s[i]) / pool.temperature) for i in best]
        out.append(sum(w / sum(weight) * pool.prompts[i] for w, i in zip(weight, best)))
    return torch.stack(out)


def looped_method(method, F_q, F_v, q_mask, v_mask):
    """The whole of Eq. 1-10 one sample at a time, selection one prompt at a time."""
    out = {G: [] for G in "GE"}
    for b in range(len(F_q)):
        q = method.query(F_q[b:b + 1], F_v[b:b + 1], q_mask[b:b + 1], v_mask[b:b + 1])
        for G in "GE":
            final = method.recovery[G]({M: looped_pool(method.pools[M + G], q[M]) for M in "QV"})[0]
            out[G].append(torch.cat([final["Q"], final["V"]], 1))
    return {G: torch.cat(rows) for G, rows in out.items()}


# ====================================================================================================== command line


def settled(args):
    """A copy of args with the defaults that depend on the method, each chosen with the same small search on a
    seed that is not reported (README)."""
    args = argparse.Namespace(**vars(args))
    joint, learns = args.method == "joint", args.method in ("joint", "finetune")
    rates = {"mmprompt": 5e-4, "l2p-one-pool": 5e-4, "none": 2e-3, "finetune": 2e-3, "joint": 2e-3}
    lr = rates.get(args.method, 8e-3) if args.lr is None else args.lr
    for k, v in {"lr": lr, "lr_attention": lr / 10, "lr_backbone": 5e-4 if learns else 1e-4, "epochs": 16 if joint else 2,
                 "batch": 50 if joint else 25, "schedule": "linear" if joint else "constant", "backbone_seed": 0}.items():
        if getattr(args, k) is None:
            setattr(args, k, v)
    return args


def build_parser():
    p = argparse.ArgumentParser(description="MM-Prompt: continual visual question answering with cross-modal prompts.",
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    yes_no = dict(action=argparse.BooleanOptionalAction)
    g = p.add_argument_group("what to run")
    g.add_argument("--setting", default="CI", choices=["DI", "CI", "QI"], help="dual, class or question increment")
    g.add_argument("--method", default="mmprompt", choices=METHODS)
    g.add_argument("--seeds", type=int, nargs="+", default=[0])
    g.add_argument("--order", type=int, nargs="+", help="a permutation of the tasks 0..T-1")
    g.add_argument("--table", choices=list(TABLES), help="run a table or figure of the paper on the built-in world, or its bounds")
    g.add_argument("--rows", nargs="+", help="with --table: only these rows, by label")
    g.add_argument("--bench", action="store_true", help="time, memory and parameters at T5-base shapes")
    g.add_argument("--smoke", action="store_true", help="everything tiny: does it run?")
    g.add_argument("--out", help="run folder (default runs/mmprompt_<setting>_<method>, for tables runs/mmprompt_tables)")
    g.add_argument("--resume", action="store_true", help="go on from the run folder's checkpoint")
    g.add_argument("--quiet", action="store_true", help="print the last lines only")
    g = p.add_argument_group("data and backbone")
    g.add_argument("--data", default="mini", help="mini | vqav2 | nextqa | a .jsonl file")
    g.add_argument("--root", default=".", help="folder with the files of --data (a .jsonl file: with its pictures)")
    g.add_argument("--sizes", type=int, nargs=3, default=[8000, 800, 1600], help="mini: questions in train, val, test")
    g.add_argument("--data-seed", type=int, help="seed of world and splits (default: the run's seed)")
    g.add_argument("--features", help="region features: a folder of .npz/.npy per picture, or VL-T5's .h5")
    g.add_argument("--backbone", default="mini", help="mini, or any T5-family Hugging Face id or folder")
    g.add_argument("--backbone-seed", type=int, help="mini: seed of its pre-training; default 0, in tables the run's own, so that ± "
                   "holds the backbone's spread too")
    g.add_argument("--vision", help="CLIP, SigLIP or DINOv2 id or folder that sees the pictures for --backbone")
    g.add_argument("--prefix", default="vqa: ", help="put before each question, not for mini")
    g.add_argument("--max-question", type=int, default=20, help="tokens")
    g.add_argument("--max-answer", type=int, default=8, help="tokens")
    g.add_argument("--train-decoder", default=False, help="the official code's choice; the paper freezes it", **yes_no)
    g.add_argument("--train-vision", choices=["first", "always", "never"], help="when the visual embedding learns (default: never "
                   "where it is pre-trained, else in the first task)")
    g = p.add_argument_group("the paper's")
    g.add_argument("--length", type=int, default=8, help="L, tokens per prompt (1 = parity with paper and code, see README)")
    g.add_argument("--top-k", type=int, default=5, help="k of Eq. 2")
    g.add_argument("--pool-sizes", type=int, nargs=4, default=[40, 60, 80, 120], metavar=("QG", "QE", "VG", "VE"), help="N, Table 9")
    g.add_argument("--mask-ratio", type=float, default=0.05, help="delta of Eq. 4")
    g.add_argument("--alpha", type=float, default=1.0, help="alpha of Eq. 11, weight of L_inter")
    g.add_argument("--beta", type=float, default=0.3, help="beta of Eq. 11, weight of L_intra")
    g.add_argument("--qk-weight", type=float, default=1.0, help="weight of L_qk, in L2P and DualPrompt too (official code: 0.05)")
    g.add_argument("--ortho-weight", type=float, default=0.1, help="CODA-Prompt's weight of orthogonality")
    g.add_argument("--temperature", type=float, default=1.0, help="of the softmax in Eq. 3")
    g.add_argument("--heads", type=int, default=8, help="attention heads of A")
    g.add_argument("--layers-g", type=int, nargs="+", default=[1, 2], help="encoder blocks with G prompts, from 0")
    g.add_argument("--layers-e", type=int, nargs="+", default=[3, 4, 5], help="encoder blocks with E prompts, from 0")
    g.add_argument("--keep-prompts", default=False, help="leave prompts in the sequence after their block (official code)", **yes_no)
    g.add_argument("--use-query", default=True, help="CQ of Table 2 (Eq. 1)", **yes_no)
    g.add_argument("--freeze-query", default=False, help="Eq. 1 learns in the first task only: old questions keep their prompts (README)",
                   **yes_no)
    g.add_argument("--use-intra", default=True, help="intra recovery of Table 10 (Eq. 5-6)", **yes_no)
    g.add_argument("--use-inter", default=True, help="inter recovery of Table 10 (Eq. 7-10)", **yes_no)
    g.add_argument("--query-fusion", default="query", choices=CrossModalQuery.FUSIONS, help="Table 12")
    g.add_argument("--recovery-fusion", default="recovery", choices=CrossModalRecovery.FUSIONS, help="Table 13")
    g.add_argument("--w-res", default="matrix", choices=["matrix", "vector"], help="shape of w_res in Eq. 5")
    g.add_argument("--mask-granularity", default="token", choices=["token", "feature"], help="what b of Eq. 4 hides")
    g.add_argument("--memory", type=int, default=0, help="replay samples in all (Table 3)")
    g.add_argument("--modality", default="joint", choices=["joint", "v", "q"], help="what the encoder sees at test (Eq. 12-13)")
    g.add_argument("--train-modality", default="joint", choices=["joint", "v", "q"], help="what it sees in training (blind bounds)")
    g = p.add_argument_group("optimisation")
    g.add_argument("--epochs", type=int, help="per task, or per subtask in DI (default 2; joint 16)")
    g.add_argument("--batch", type=int, help="samples a step (default 25; joint 50)")
    g.add_argument("--accum", type=int, default=1, help="batches per optimiser step")
    g.add_argument("--eval-batch", type=int, default=200)
    g.add_argument("--lr", type=float, help="of prompts and keys (default 8e-3; mmprompt and l2p-one-pool 5e-4)")
    g.add_argument("--lr-attention", type=float, help="of the attention modules and the visual embedding (default a tenth of --lr)")
    g.add_argument("--lr-backbone", type=float, help="of the backbone where it learns (default 5e-4 joint and finetune, else 1e-4)")
    g.add_argument("--schedule", choices=["constant", "linear"], help="of the learning rates within a task (default constant, as the "
                   "official VQA v2 code after its warm-up; joint: linear to zero)")
    g.add_argument("--weight-decay", type=float, default=0.01, help="of attention modules and backbone; prompts and keys have none")
    g.add_argument("--clip", type=float, default=1.0, help="largest gradient norm")
    g.add_argument("--select", default="best", choices=["best", "last"], help="epoch with the best validation score (the later of equals), or the last")
    g.add_argument("--device", default="auto", help="auto (cuda, then mps, then cpu), or a torch device")
    g.add_argument("--dtype", default="fp32", choices=["fp32", "bf16"])
    return p


def main():
    parser = build_parser()
    args = parser.parse_args()
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    if args.smoke:
        args.sizes, args.epochs = [240, 80, 160], args.epochs or 1
    if args.bench:
        return bench(args)
    args.out = args.out or ("runs/mmprompt_tables" if args.table else f"runs/mmprompt_{args.setting}_{args.method}")
    if args.table:
        return table(args)
    args = settled(args)
    metrics.run_jobs(f"{args.method} {args.setting}", [{"seed": seed} for seed in args.seeds],
                     lambda job, folder: run(args, job["seed"], folder), args.out, COLUMNS)


if __name__ == "__main__":
    metrics.run_cli(main)
