"""MM-Prompt: cross-modal prompt query and recovery for continual visual question answering, in one file.

Paper     "MM-Prompt: Cross-Modal Prompt Tuning for Continual Visual Question Answering", arXiv 2505.19455v1.
Official  github.com/xli04/CVQA @ 338c19b (read for the list of differences in docs/mmprompt.md; nothing copied).
Run       python mmprompt.py --setting CI            python mmprompt.py --help

Idea.  A question and a picture each pick prompts from their own pool.  Isolated, the stronger modality wins.  So (1)
let each modality's query look at the other before it picks (Eq. 1-3), and (2) hide a few prompt tokens and recover
them from their own and from the other modality's prompts (Eq. 4-10) before the prompts enter a frozen encoder.

Shapes    B batch · T tasks · t current task · N prompts in a pool · k chosen · L prompt length (tokens) · D width
          Nq Nv tokens of question and picture · H heads.  M is a modality, Q or V, and M' the other one.
          (B,L,D) is a shape; Eq. n is the paper's number.  Masks are bool, True = a real token.

Call path, from the command line to the line where the prompts enter the backbone
    main                      reads the flags; a run for each seed
    run                       the protocol: task after task, test on all tasks seen so far
    learn_task                epochs over one task (in double increment: over one subtask)
    batch_loss                Eq. 11 on a batch
    VQABackbone.embed         question and picture -> F^Q (B,Nq,D), F^V (B,Nv,D): the tokens before encoder block 0
    VQABackbone.encode        asks the method for prompts, then walks through the encoder's blocks
    MMPrompt.forward          CrossModalQuery (Eq. 1) -> PromptPool (Eq. 2-3) -> CrossModalRecovery (Eq. 4-10)
    VQABackbone.encode        torch.cat([h, prompts]): appended for blocks 1, 2 (G) and 3, 4, 5 (E), dropped after each
    VQABackbone.loss, answer  the decoder reads the encoder's output: cross-entropy, or greedy decoding
"""
import json
import math
import random
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import data
import metrics
from data import InputError

# ================================================================================================== the paper
# Section 3 of the paper in the order of its equations, and nothing else: this part can be copied out by itself.  Every
# quantity exists twice, for the question and for the picture; {"Q": ..., "V": ...} holds the two.
OTHER = {"Q": "V", "V": "Q"}                                         # M -> M'


def attention(d_model, n_heads):
    """A(query, key, value) of the paper: multi-head attention.  It starts small, so that what it is added to passes
    almost unchanged at first.  Raises ValueError where the heads do not divide the width."""
    if d_model % n_heads:
        raise ValueError(f"--heads {n_heads} does not divide the width {d_model}")
    layer = nn.MultiheadAttention(d_model, n_heads, batch_first=True)
    with torch.no_grad():
        layer.out_proj.weight.mul_(0.1)
    return layer


def encoder_layer(d_model, n_heads, width):
    """A(x) of the paper, with one argument: self-attention and a feed-forward part of `width`, each with a residual.
    It starts near identity.  Raises ValueError where the heads do not divide the width."""
    if d_model % n_heads:
        raise ValueError(f"--heads {n_heads} does not divide the width {d_model}")
    layer = nn.TransformerEncoderLayer(d_model, n_heads, width, dropout=0.0, batch_first=True, norm_first=True)
    with torch.no_grad():
        layer.self_attn.out_proj.weight.mul_(0.1)
        layer.linear2.weight.mul_(0.1)
        layer.linear2.bias.zero_()
    return layer


def masked_mean(x, mask):
    """Mean over real tokens.  x (B,N,D), mask (B,N) -> (B,D)."""
    m = mask[..., None].to(x.dtype)                                  # (B,N,1)
    return (x * m).sum(1) / m.sum(1).clamp(min=1)                    # padding neither adds nor counts


class CrossModalQuery(nn.Module):
    """Each modality looks at the other before it becomes a query.  Section 3.2, Eq. 1.  Uses attention, masked_mean.

    forward(F_q (B,Nq,D), F_v (B,Nv,D), q_mask (B,Nq), v_mask (B,Nv)) -> {"Q": (B,D), "V": (B,D)}
    """

    def __init__(self, d_model, n_heads=8):
        super().__init__()
        self.attend = nn.ModuleDict({M: attention(d_model, n_heads) for M in "QV"})
        self.w = nn.ParameterDict({M: nn.Parameter(torch.ones(d_model)) for M in "QV"})   # "initialised uniformly"

    def forward(self, F_q, F_v, q_mask, v_mask):
        x, mask = {"Q": F_q, "V": F_v}, {"Q": q_mask, "V": v_mask}
        q = {}
        for M in "QV":
            # Every token of M asks the tokens of M' what they know: queries from M, keys and values from M'.
            other, hidden = x[OTHER[M]], ~mask[OTHER[M]]
            seen, _ = self.attend[M](x[M], other, other, key_padding_mask=hidden, need_weights=False)   # (B,N_M,D)
            # The answer is added to the token, the tokens are averaged, and w weighs the features.
            # q^M = w^M * Phi( A(F^M, F^M', F^M') + F^M ),   Phi = mean over real tokens                    Eq. 1
            q[M] = self.w[M] * masked_mean(seen + x[M], mask[M])     # (B,D)
        return q


class PromptPool(nn.Module):
    """N prompts of L tokens with one key each; a query takes the k nearest and mixes them.  Section 3.2, Eq. 2-3.

    forward(q (B,D)) -> p~ (B,L,D), L_qk (), chosen (B,k).  Every sample chooses alone: batch mates do not matter.
    Raises ValueError where k is more than N.
    """

    def __init__(self, d_model, size, length=8, top_k=5, temperature=1.0):
        super().__init__()
        if top_k > size:
            raise ValueError(f"--top-k {top_k} is more than the {size} prompts of a pool; enlarge --pool-sizes")
        self.k, self.temperature = top_k, temperature
        self.prompts = nn.Parameter(torch.randn(size, length, d_model) * 0.02)        # P^M (N,L,D)
        self.keys = nn.Parameter(torch.randn(size, d_model) * 0.02)                   # K^M (N,D)

    def forward(self, q):
        # The k keys that point most nearly in the query's direction.
        # I^M = the k largest of cos(q^M, k_i^M)                                                            Eq. 2
        keys = F.normalize(self.keys, dim=-1)                                         # (N,D)
        score, chosen = (F.normalize(q, dim=-1) @ keys.T).topk(self.k, dim=-1)        # 2 x (B,k)
        # Their prompts are mixed, the nearer the more.  Through these weights keys and query learn from the answer.
        # p~^M = sum_{i in I} a_i p_i,   a = softmax over I of cos(q, k_i)                                  Eq. 3
        a = (score / self.temperature).softmax(-1)                                    # (B,k)
        p_tilde = torch.einsum("bk,bkld->bld", a, self.prompts[chosen])               # (B,L,D)
        # Chosen keys are pulled to the query.  The query is a constant here: otherwise the query network satisfies
        # this loss by sending every query in one direction, and selection dies.
        # L_qk = sum_{i in I} (1 - cos(q, k_i)), mean over B                                     a part of Eq. 11
        near = torch.einsum("bd,bkd->bk", F.normalize(q.detach(), dim=-1), keys[chosen])       # (B,k)
        return p_tilde, (1 - near).sum(-1).mean(), chosen


class CrossModalRecovery(nn.Module):
    """Hide prompt tokens, recover them inside the modality, then across.  Section 3.3, Eq. 4-10.

    forward({"Q": p~ (B,L,D), "V": p~ (B,L,D)}) -> p_final {"Q","V"}, L_intra (), L_inter ()
    Uses attention, encoder_layer and OTHER.  w_res: "matrix" (D,D), for which Eq. 6's orthogonality has a meaning, or
    "vector" (D,), as printed.  mask_granularity: what b of Eq. 4 hides, a "token" or a "feature" of it.
    res_scale: how lightly Eq. 5 touches the other modality.
    """

    def __init__(self, d_model, n_heads=8, mask_ratio=0.05, use_intra=True, use_inter=True, w_res="matrix",
                 mask_granularity="token", res_scale=0.1):
        super().__init__()
        self.delta, self.use_intra, self.use_inter = mask_ratio, use_intra, use_inter
        self.granularity, self.res_scale = mask_granularity, res_scale
        if use_intra:                                                # "twice the feed-forward dimension": 2 D, then 4 D
            self.intra = nn.ModuleDict({M: encoder_layer(d_model, n_heads, 2 * d_model) for M in "QV"})
            start = torch.eye(d_model) if w_res == "matrix" else torch.full((d_model,), d_model ** -0.5)
            self.W_res = nn.ParameterDict({M: nn.Parameter(start.clone()) for M in "QV"})
        if use_inter:
            self.inter = nn.ModuleDict({M: attention(d_model, n_heads) for M in "QV"})
            self.refine = nn.ModuleDict({M: encoder_layer(d_model, n_heads, 4 * d_model) for M in "QV"})
            self.W_g = nn.ModuleDict({M: nn.Linear(2 * d_model, d_model, bias=False) for M in "QV"})

    def hide(self, p_tilde):
        """p^ from p~, {"Q","V"} (B,L,D): a share delta is set to zero, the same places in both, in training only."""
        if not self.training or self.delta == 0:
            return p_tilde
        B, L, D = p_tilde["Q"].shape
        # p^^M = (1 - b) * p~^M,   b = 1 with probability delta, one b for both modalities                  Eq. 4
        b = torch.rand(B, L, D if self.granularity == "feature" else 1, device=p_tilde["Q"].device) < self.delta
        return {M: p_tilde[M].masked_fill(b, 0.0) for M in "QV"}     # b (B,L,1) or (B,L,D)

    def cross(self, M, x, p_tilde):
        """A(x, p~^M', p~^M'), the cross-attention that Eq. 7 and Eq. 10 share.  x (B,L,D) -> (B,L,D)."""
        other = p_tilde[OTHER[M]]
        return self.inter[M](x, other, other, need_weights=False)[0]

    @staticmethod
    def orthogonality(W):
        """|W W^T - I|_F^2 / D, the second term of Eq. 6.  For a vector w (D,) the product has rank one and the term is
        (|w|^2 - 1)^2 + D - 1; the constant D - 1 is left out."""
        if W.ndim == 1:
            return (W.square().sum() - 1).square() / len(W)
        return (W @ W.T - torch.eye(len(W), device=W.device, dtype=W.dtype)).square().sum() / len(W)

    def forward(self, p_tilde):
        L_intra = L_inter = p_tilde["Q"].new_zeros(())
        if not (self.use_intra or self.use_inter):                   # isolated prompts: nothing to recover
            return p_tilde, L_intra, L_inter
        p_hat = self.hide(p_tilde)                                   # Eq. 4                          2 x (B,L,D)

        p_intra = p_hat
        if self.use_intra:
            # What is hidden is guessed from the tokens around it, with a light touch of the other modality.
            # p_intra^M = A(p^^M) + w_res^M p~^M'                                                           Eq. 5
            light = {M: p_tilde[OTHER[M]] @ W.T if W.ndim == 2 else p_tilde[OTHER[M]] * W for M, W in self.W_res.items()}
            p_intra = {M: self.intra[M](p_hat[M]) + self.res_scale * light[M] for M in "QV"}       # (B,L,D)
            # The guess is held to the prompt as it was.  p~ is a constant target, or the prompts would chase their own
            # recovery.  Means instead of sums, so that beta does not depend on B, L, D.
            # L_intra = sum_M |p_intra^M - p~^M|^2 + |w_res^M w_res^M^T - I|_F^2                            Eq. 6
            L_intra = sum(F.mse_loss(p_intra[M], p_tilde[M].detach()) + self.orthogonality(self.W_res[M]) for M in "QV")

        p_final = p_intra
        if self.use_inter:
            # Every prompt token now asks the prompt of the other modality.
            # p_inter^M = A(p_intra^M, p~^M', p~^M') + p_intra^M                                            Eq. 7
            p_inter = {M: self.cross(M, p_intra[M], p_tilde) + p_intra[M] for M in "QV"}           # (B,L,D)
            # A gate per feature says how much of the result is refined once more.  (Eq. 8 uses it, so Eq. 9 comes first.)
            # g^M = sigmoid( w_g^M ReLU([p_inter^M ; p~^M']) )                                              Eq. 9
            both = {M: torch.cat([p_inter[M], p_tilde[OTHER[M]]], -1) for M in "QV"}               # (B,L,2D)
            g = {M: torch.sigmoid(self.W_g[M](F.relu(both[M]))) for M in "QV"}                     # (B,L,D)
            # p_final^M = (1 - g^M) p_inter^M + g^M A'(p_inter^M),   A' is the wider layer                  Eq. 8
            p_final = {M: (1 - g[M]) * p_inter[M] + g[M] * self.refine[M](p_inter[M]) for M in "QV"}
            # Seen through the other modality's prompts, the two results should say the same; the mean over L comes first.
            # L_inter = 1 - cos( A(p_final^Q, p~^V, p~^V), A(p_final^V, p~^Q, p~^Q) )                      Eq. 10
            views = [self.cross(M, p_final[M], p_tilde).mean(1) for M in "QV"]                     # 2 x (B,D)
            L_inter = (1 - F.cosine_similarity(*views, dim=-1)).mean()
        return p_final, L_intra, L_inter


@dataclass
class Prompts:
    """What a prompt method hands to the encoder.  prompts {"G": (B,2L,D), ...}: question prompts first, then visual;
    losses {"qk": (), ...} to add to the task loss; chosen {"QG": (B,k), ...} for the statistics."""
    prompts: dict
    losses: dict
    chosen: dict


class MMPrompt(nn.Module):
    """The whole method (Fig. 2): one cross-modal query, four pools, one recovery for G(eneral) and one for E(xpert).

    forward(F_q (B,Nq,D), F_v (B,Nv,D), q_mask, v_mask) -> Prompts with {"G","E"}: (B,2L,D) and losses qk, intra, inter.
    pool_sizes: prompts in Q-G, Q-E, V-G, V-E (Table 9's best row).  layers: 0-based encoder blocks of each type.
    use_query, use_intra, use_inter: the ablations of Tables 2 and 10.  alpha, beta, qk_weight: Eq. 11.
    keep: prompts stay in the sequence after their block.  freeze_query: Eq. 1 learns in the first task only.
    """
    lr, lr_backbone = 5e-4, 1e-4                                     # of prompts; of a decoder where it learns
    epochs, batch, schedule = 2, 25, "constant"

    def __init__(self, d_model, n_heads=8, length=8, top_k=5, pool_sizes={"QG": 40, "QE": 60, "VG": 80, "VE": 120},
                 mask_ratio=0.05, use_query=True, use_intra=True, use_inter=True, alpha=1.0, beta=0.3, qk_weight=1.0,
                 temperature=1.0, layers={"G": (1, 2), "E": (3, 4, 5)}, keep=False, freeze_query=False, **recovery):
        super().__init__()
        self.layers, self.keep, self.freeze_query = dict(layers), keep, freeze_query
        self.weights = {"qk": qk_weight, "inter": alpha, "intra": beta}
        self.query = CrossModalQuery(d_model, n_heads) if use_query else None
        self.pools = nn.ModuleDict({name: PromptPool(d_model, size, length, top_k, temperature)
                                    for name, size in pool_sizes.items()})
        recovery = dict(mask_ratio=mask_ratio, use_intra=use_intra, use_inter=use_inter, **recovery)
        self.recovery = nn.ModuleDict({G: CrossModalRecovery(d_model, n_heads, **recovery) for G in "GE"})

    def begin_task(self, t):
        if self.freeze_query and self.query is not None:
            self.query.requires_grad_(t == 0)

    def end_task(self):
        """Nothing ends with a task: pools, query and recovery are shared by all of them."""

    def forward(self, F_q, F_v, q_mask, v_mask):
        if self.query is None:                                       # isolated: each modality asks for itself alone
            q = {"Q": masked_mean(F_q, q_mask), "V": masked_mean(F_v, v_mask)}
        else:
            q = self.query(F_q, F_v, q_mask, v_mask)                 # Eq. 1                          2 x (B,D)
        out = Prompts({}, dict.fromkeys(("qk", "intra", "inter"), F_q.new_zeros(())), {})
        for G in "GE":
            p_tilde = {}
            for M in "QV":
                p_tilde[M], L_qk, out.chosen[M + G] = self.pools[M + G](q[M])         # Eq. 2-3           (B,L,D)
                out.losses["qk"] = out.losses["qk"] + L_qk
            p_final, L_intra, L_inter = self.recovery[G](p_tilde)                     # Eq. 4-10      2 x (B,L,D)
            out.prompts[G] = torch.cat([p_final["Q"], p_final["V"]], 1)               # (B,2L,D)
            out.losses["intra"] = out.losses["intra"] + L_intra                       # summed over G and E
            out.losses["inter"] = out.losses["inter"] + L_inter
        return out


def total_loss(L_ce, losses, weights):
    """The loss of a batch: losses {name: ()}, weights {name: float}; a loss without a weight counts once."""
    # L = L_CE + L_qk + alpha L_inter + beta L_intra                                                       Eq. 11
    return L_ce + sum(weights.get(name, 1.0) * value for name, value in losses.items())


# =============================================================================================== the backbone
# A frozen T5 reads question tokens and picture tokens in one sequence, as VL-T5 does.  VQABackbone.encode walks through
# its encoder block by block, because the prompts enter between blocks.  Below it stand the sources of picture tokens:
# regions of the built-in world, of any picture, of feature files, or patches of a CLIP.


class VisualEmbedding(nn.Module):
    """Region features and boxes to tokens F^V: a small network on the feature plus a linear map of the box.

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

    t5: any T5ForConditionalGeneration.  pictures(image) -> (features (n,f), boxes (n,4)).  Everything is frozen at
    first.  prefix: put before each question.  max_question, max_answer: tokens.
    train_vision: when the visual embedding learns, "never", in the "first" task or "always".
    """

    def __init__(self, t5, tokenizer, visual, pictures, prefix="", max_question=20, max_answer=8, train_vision="never"):
        super().__init__()
        self.t5, self.tokenizer, self.visual, self.pictures = t5, tokenizer, visual, pictures
        self.prefix, self.max_question, self.max_answer = prefix, max_question, max_answer
        self.train_vision = train_vision
        self.memo = {}                                               # image -> its visual tokens, while `visual` is frozen
        self.eval().requires_grad_(False)                            # dropout off too: the backbone is a fixed function

    @property
    def device(self):
        return self.t5.device

    @property
    def width(self):
        return self.t5.config.d_model

    def tokens(self, texts, limit):
        """B strings -> ids (B,N), mask (B,N)."""
        out = self.tokenizer(list(texts), padding=True, truncation=True, max_length=limit, return_tensors="pt")
        return out["input_ids"].to(self.device), out["attention_mask"].bool().to(self.device)

    def look(self, images):
        """B images -> a list of their visual tokens, (n,D) each.  A picture is seen once while `visual` is frozen."""
        learning = self.visual.place.weight.requires_grad
        if learning:
            self.memo.clear()
        if not learning and all(image in self.memo for image in images):
            return [self.memo[image] for image in images]
        raw = [self.pictures(image) for image in images]
        features, boxes = (nn.utils.rnn.pad_sequence(rows, batch_first=True).to(self.device) for rows in zip(*raw))
        rows = [x[:len(f)] for x, (f, _) in zip(self.visual(features, boxes), raw)]
        if not learning:                                             # a copy: a view would keep the whole batch alive
            self.memo.update({image: x.clone() for image, x in zip(images, rows)})
        return rows

    def embed(self, samples):
        """Samples -> F_q (B,Nq,D), F_v (B,Nv,D) and their masks: the tokens before encoder block 0."""
        ids, q_mask = self.tokens([self.prefix + s.question for s in samples], self.max_question)
        F_q = self.t5.get_input_embeddings()(ids)                                                 # (B,Nq,D)
        rows = self.look([s.image for s in samples])
        F_v = nn.utils.rnn.pad_sequence(rows, batch_first=True)                                   # (B,Nv,D)
        v_mask = torch.arange(F_v.shape[1]) < torch.tensor([len(x) for x in rows])[:, None]       # (B,Nv)
        return F_q, F_v, q_mask, v_mask.to(self.device)

    def position_bias(self, Nq, mask, dtype):
        """T5's own position bias between the Nq question tokens, zero wherever a visual or prompt token takes part,
        and minus infinity at padding.  mask (B,N) -> (B,H,N,N)."""
        own = self.t5.encoder.block[0].layer[0].SelfAttention.compute_bias(Nq, Nq, device=mask.device)   # (1,H,Nq,Nq)
        rest = mask.shape[1] - Nq
        bias = F.pad(own, (0, rest, 0, rest))                                                     # (1,H,N,N)
        return bias.masked_fill(~mask[:, None, None, :], torch.finfo(bias.dtype).min).to(dtype)

    def encode(self, F_q, F_v, q_mask, v_mask, method, modality="joint"):
        """One pass through the encoder, prompts injected at their blocks -> hidden (B,N,D), mask (B,N), Prompts.

        modality "v" hides the question tokens and question prompts, "q" the picture's (Eq. 12-13); "joint" nothing.
        """
        out = method(F_q, F_v, q_mask, v_mask)
        place = {i: p for group, p in out.prompts.items() for i in method.layers[group]}          # block -> (B,P,D)
        if modality != "joint":                                      # queries saw both, the encoder sees one
            q_mask, v_mask = q_mask & (modality == "q"), v_mask & (modality == "v")
            half = 0 if modality == "q" else 1                       # question prompts come first
            place = {i: p.chunk(2, 1)[half] if p.shape[1] % 2 == 0 else p for i, p in place.items()}
        h, mask, Nq = torch.cat([F_q, F_v], 1), torch.cat([q_mask, v_mask], 1), F_q.shape[1]      # (B,N,D) (B,N)
        bias = self.position_bias(Nq, mask, h.dtype)                                              # (B,H,N,N)
        for i, block in enumerate(self.t5.encoder.block):
            if i not in place:
                h = block(h, position_bias=bias)[0]
                continue
            # Here the prompts enter: appended for this block...
            p = place[i].to(h.dtype)                                                              # (B,P,D)
            longer = F.pad(mask, (0, p.shape[1]), value=True)                                     # (B,N+P)
            longer_bias = self.position_bias(Nq, longer, h.dtype)                                 # (B,H,N+P,N+P)
            h = block(torch.cat([h, p], 1), position_bias=longer_bias)[0]                         # (B,N+P,D)
            if method.keep:
                mask, bias = longer, longer_bias
            else:
                h = h[:, :mask.shape[1]]                             # ...and dropped again after it
        return self.t5.encoder.final_layer_norm(h), mask, out                                     # dropout is off

    def loss(self, hidden, mask, answers):
        """Cross-entropy of the answers' tokens, L_CE of Eq. 11.  hidden (B,N,D), answers: B strings -> ()"""
        from transformers.modeling_outputs import BaseModelOutput
        labels, real = self.tokens(answers, self.max_answer)                                      # (B,Na)
        return self.t5(encoder_outputs=BaseModelOutput(last_hidden_state=hidden), attention_mask=mask.long(),
                       labels=labels.masked_fill(~real, -100)).loss

    @torch.no_grad()
    def answer(self, hidden, mask):
        """Greedy decoding with cache.  hidden (B,N,D) -> B strings."""
        from transformers.modeling_outputs import BaseModelOutput
        ids = self.t5.generate(encoder_outputs=BaseModelOutput(last_hidden_state=hidden), attention_mask=mask.long(),
                               max_new_tokens=self.max_answer, num_beams=1, do_sample=False)
        return [text.strip() for text in self.tokenizer.batch_decode(ids, skip_special_tokens=True)]


def world_regions(regions):
    """Regions of the built-in world: the crops' pixels in [-1,1] are the feature, f = 768."""
    pixels, boxes, valid = regions
    flat, boxes, count = torch.from_numpy(pixels).flatten(2), torch.from_numpy(boxes), valid.sum(1)   # (S,6,768) uint8
    return lambda row: (flat[row, :count[row]].float() / 127.5 - 1, boxes[row, :count[row]])


def picture_regions(root):
    """Regions of any picture for the small backbone: a 3 x 3 grid of crops and the whole picture, 16 x 16 pixels each."""
    grid = [(x / 3, y / 3, (x + 1) / 3, (y + 1) / 3) for y in range(3) for x in range(3)] + [(0, 0, 1, 1)]
    boxes, kept = torch.tensor(grid, dtype=torch.float32), {}                                     # (10,4)

    def load(image):
        if image not in kept:
            kept[image] = torch.from_numpy(data.region_pixels(data.open_picture(data.inside(root, image)), grid))
        return kept[image].flatten(1).float() / 127.5 - 1, boxes
    return load


def feature_regions(folder):
    """Region features made elsewhere, as tensors: see data.region_files."""
    read = data.region_files(folder)
    return lambda image: tuple(torch.from_numpy(x) for x in read(image))


def grid_features(name, root, device, cells=6):
    """Patch features of a frozen CLIP, SigLIP or DINOv2 (Hugging Face id or folder), averaged to 6 x 6 = 36 cells with
    boxes.  Each picture passes the vision model once; the result is kept on disk."""
    from transformers import AutoImageProcessor, AutoModel
    model = metrics.from_pretrained(AutoModel, name, "--vision")
    model = getattr(model, "vision_model", model).eval().requires_grad_(False).to(device)
    process = metrics.from_pretrained(AutoImageProcessor, name, "--vision")
    edges = np.linspace(0, 1, cells + 1)
    corners = [(edges[x], edges[y], edges[x + 1], edges[y + 1]) for y in range(cells) for x in range(cells)]
    boxes = torch.tensor(corners, dtype=torch.float32)                                            # (36,4)

    @torch.no_grad()
    def load(image):
        path = data.inside(root, image)
        try:
            stamp = f"{path.resolve()} {path.stat().st_mtime_ns}"
        except OSError:
            raise InputError(f"picture {path} is missing; put it there or name the folder above it with --root")
        kept = data.cache_folder() / f"grid-{cells}-{metrics.digest([name, stamp])}.npy"
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


# The small backbone of the built-in world: 0.75 M parameters, shipped in backbones/, made by `pretrain` at the end.
MINI = dict(d_model=96, d_kv=16, d_ff=192, num_heads=6, num_layers=6, num_decoder_layers=2)
MINI_VOCAB = 512
MINI_STEPS, MINI_BATCH, MINI_SCENES, MINI_LR = 4500, 128, 24_000, 2e-3
MINI_EYES = 3                                                        # steps of the eyes alone, per step of the whole


def mini_config(seed):
    """Everything that the training of a small backbone depends on."""
    return [MINI, MINI_VOCAB, MINI_STEPS, MINI_BATCH, MINI_SCENES, MINI_LR, MINI_EYES, data.MINI_VQA_VERSION, seed]


def mini_models():
    """An untrained small T5 with its visual embedding: a ModuleDict {"t5", "visual"}."""
    from transformers import T5Config, T5ForConditionalGeneration
    t5 = T5ForConditionalGeneration(T5Config(vocab_size=MINI_VOCAB, dropout_rate=0.0, pad_token_id=0, eos_token_id=1,
                                             decoder_start_token_id=0, tie_word_embeddings=True, **MINI))
    return nn.ModuleDict({"t5": t5, "visual": VisualEmbedding(3 * data.REGION_PIXELS ** 2, MINI["d_model"])})


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
    if new:
        lost = max(0, len(known) + len(new) - MINI_VOCAB)
        print(f"{len(new)} words are new to the small backbone: {len(new) - lost} get random rows, {lost} become <unk>")
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def load_backbone(args, stream):
    """The frozen encoder-decoder with its eyes: the small one, or any T5 with any CLIP-like vision model or feature files.
    Raises InputError for what cannot be loaded or does not fit together."""
    mini_world, root = args.data == "mini", stream.extra.get("root")
    device = torch.device(args.device)
    if not mini_world and not args.features:
        first = data.inside(root, stream.tasks[0].train[0].image)
        if not first.exists():
            raise InputError(f"picture {first} is missing: put the picture folder {first.parent} there, or name region "
                             "features with --features")
    options = {"max_question": 20, "max_answer": 8}
    if args.backbone == "mini":
        texts = [] if mini_world else [x for t in stream.tasks for s in t.train for x in (s.question, *s.answers)]
        both, tokenizer = mini_models(), mini_tokenizer(texts)
        both.load_state_dict(metrics.small_backbone("mini-vqa", args.backbone_seed, mini_config(args.backbone_seed)), strict=False)
        t5, visual = both["t5"], both["visual"]
        t5.tie_weights()                                             # tied tensors are in the file once
        pictures = world_regions(stream.extra["regions"]) if mini_world else picture_regions(root)
    else:
        from transformers import AutoModelForSeq2SeqLM, AutoTokenizer
        if mini_world:
            raise InputError("--data mini has pictures of its own for the small backbone; with --backbone give your own --data")
        t5 = metrics.from_pretrained(AutoModelForSeq2SeqLM, args.backbone, "--backbone")
        tokenizer = metrics.from_pretrained(AutoTokenizer, args.backbone, "--backbone")
        if not hasattr(t5, "encoder") or not hasattr(t5.encoder, "block"):
            raise InputError(f"--backbone {args.backbone} is a {type(t5).__name__}; the prompts need a T5-family encoder-decoder")
        if not args.features and not args.vision:
            raise InputError("--backbone other than mini needs eyes: --vision (a CLIP, SigLIP or DINOv2 id or folder) "
                             "or --features")
        pictures, visual = (None, None) if args.features else (grid_features(args.vision, root, device), None)
        options["prefix"] = "vqa: "
    if args.features:
        pictures, visual = feature_regions(args.features), None
    if visual is None:                                               # width of the features: ask the first picture
        width = pictures(stream.tasks[0].train[0].image)[0].shape[1]
        torch.manual_seed(0)
        visual = VisualEmbedding(width, t5.config.d_model)
        options["train_vision"] = "first"                            # nobody has trained it yet
    if args.train_vision:
        options["train_vision"] = args.train_vision
    blocks, wanted = len(t5.encoder.block), max(args.layers_g + args.layers_e)
    if wanted >= blocks:
        raise InputError(f"--layers-g/--layers-e name block {wanted}, but the encoder has blocks 0..{blocks - 1}")
    return VQABackbone(t5, tokenizer, visual, pictures, **options).to(device)


# ========================================================================================== compared methods
# All of them see the same frozen tokens, hold as many prompts as MM-Prompt's four pools where their design allows, and
# inject at the same blocks ("identical injection layers if possible", section 4.2).  The protocol of every method:
#     layers {group: encoder blocks}, keep, weights {loss: factor}     begin_task(t)     forward -> Prompts     end_task()
# and as class attributes its own rates, epochs per task (in DI per subtask) and batch, chosen on a seed not reported.


class Frozen(nn.Module):
    """The backbone as it is, without prompts: what there is before anything is learned.  Base of the other bounds."""
    lr, lr_backbone, epochs, batch, schedule = 2e-3, 1e-4, 2, 25, "constant"
    layers, keep, weights, learns_backbone = {}, False, {}, False

    def __init__(self, *_, **__):
        super().__init__()

    def begin_task(self, t):
        pass

    def end_task(self):
        pass

    def forward(self, F_q, F_v, q_mask, v_mask):
        return Prompts({}, {}, {})


class Finetune(Frozen):
    """Sequential fine-tuning of the whole T5: the lower bound of continual learning."""
    lr_backbone, learns_backbone = 5e-4, True


class Joint(Finetune):
    """The whole T5 trained on all tasks mixed: the upper bound.  The rate falls to zero, as its one long task allows."""
    epochs, batch, schedule = 16, 50, "linear"


class L2P(nn.Module):
    """L2P (Wang et al. 2022): each modality's mean token picks k short prompts, which join the sequence at the input and
    stay.  Length 2 times k = 5 injects about as many tokens as MM-Prompt."""
    lr, lr_backbone, epochs, batch, schedule, shared = 8e-3, 1e-4, 2, 25, "constant", False

    def __init__(self, d_model, pool_sizes, top_k=5, length=2, qk_weight=1.0):
        super().__init__()
        sizes = {"Q": pool_sizes["QG"] + pool_sizes["QE"], "V": pool_sizes["VG"] + pool_sizes["VE"]}
        if self.shared:
            sizes = {"QV": sum(sizes.values())}
        self.pools = nn.ModuleDict({M: PromptPool(d_model, n, length, top_k) for M, n in sizes.items()})
        self.layers, self.keep, self.weights = {"G": (0,)}, True, {"qk": qk_weight}

    def begin_task(self, t):
        pass

    def end_task(self):
        pass

    def forward(self, F_q, F_v, q_mask, v_mask):
        q = {"Q": masked_mean(F_q, q_mask), "V": masked_mean(F_v, v_mask)}
        q["QV"] = (q["Q"] + q["V"]) / 2
        prompts, pull, chosen = [], 0, {}
        for M, pool in self.pools.items():
            _, L_qk, chosen[M] = pool(q[M])
            prompts.append(pool.prompts[chosen[M]].flatten(1, 2))    # (B,k,L,D) -> (B,k*L,D): joined, not mixed
            pull = pull + L_qk
        return Prompts({"G": torch.cat(prompts, 1)}, {"qk": pull}, chosen)


class L2POnePool(L2P):
    """L2P* of the paper: one pool and one query for both modalities."""
    lr, shared = 5e-4, True


class DualPrompt(nn.Module):
    """DualPrompt (Wang et al. 2022): G prompts that all tasks share, and one E prompt per task, found by its key at test."""
    lr, lr_backbone, epochs, batch, schedule = 8e-3, 1e-4, 2, 25, "constant"

    def __init__(self, d_model, length=8, tasks=10, layers=None, qk_weight=1.0):
        super().__init__()
        self.layers, self.keep, self.weights, self.t = layers, False, {"qk": qk_weight}, 0
        make = lambda *shape: nn.Parameter(torch.randn(*shape) * 0.02)
        self.pools = nn.ParameterDict({"G": make(2 * length, d_model)})
        for M in "QV":
            self.pools[M + "E"], self.pools[M + "keys"] = make(tasks, length, d_model), make(tasks, d_model)

    def begin_task(self, t):
        self.t = t

    def end_task(self):
        pass

    def forward(self, F_q, F_v, q_mask, v_mask):
        expert, pull, chosen = [], 0, {}
        for M, q in (("Q", masked_mean(F_q, q_mask)), ("V", masked_mean(F_v, v_mask))):
            s = F.normalize(q, dim=-1) @ F.normalize(self.pools[M + "keys"], dim=-1).T            # (B,T)
            pull = pull + (1 - s[:, self.t]).mean()
            best = torch.full_like(s[:, 0], self.t, dtype=torch.long)                             # training knows its task,
            if not self.training:
                best = s[:, :self.t + 1].argmax(-1)                                               # test does not
            chosen[M + "E"] = best[:, None]
            expert.append(self.pools[M + "E"][best])                                              # (B,L,D)
        general = self.pools["G"].expand(len(F_q), -1, -1)                                        # (B,2L,D)
        return Prompts({"G": general, "E": torch.cat(expert, 1)}, {"qk": pull}, chosen)


class CODAPrompt(nn.Module):
    """CODA-Prompt (Smith et al. 2023): a prompt is a weighted sum of all components; each task adds its share, old ones
    freeze.  Weight of component m: cos(q * A_m, K_m).  Components, keys and attention vectors are asked to be orthogonal."""
    lr, lr_backbone, epochs, batch, schedule = 8e-3, 1e-4, 2, 25, "constant"

    def __init__(self, d_model, pool_sizes, length=8, tasks=10, layers=None, ortho=0.1):
        super().__init__()
        self.layers, self.keep, self.weights, self.t, self.tasks = layers, False, {"ortho": ortho}, 0, tasks
        self.pools = nn.ModuleDict()
        for name, n in pool_sizes.items():
            shapes = {"prompts": (n, length, d_model), "key": (n, d_model), "attend": (n, d_model)}
            self.pools[name] = nn.ParameterDict({k: torch.empty(*shape) for k, shape in shapes.items()})
            for p in self.pools[name].values():
                nn.init.orthogonal_(p.data.view(n, -1))

    def begin_task(self, t):
        self.t = t

    def end_task(self):
        pass

    def forward(self, F_q, F_v, q_mask, v_mask):
        q = {"Q": masked_mean(F_q, q_mask), "V": masked_mean(F_v, v_mask)}
        p, penalty = {}, 0
        for name, pool in self.pools.items():
            share = len(pool["key"]) // self.tasks                   # components per task
            old, now = self.t * share, (self.t + 1) * share
            use = {k: torch.cat([x[:old].detach(), x[old:now]]) for k, x in pool.items()}
            a = F.cosine_similarity(q[name[0]][:, None] * use["attend"], use["key"][None], dim=-1)    # (B,m)
            p[name] = torch.einsum("bm,mld->bld", a, use["prompts"])                                  # (B,L,D)
            for x in use.values():
                x = x.flatten(1)
                penalty = penalty + (x @ x.T - torch.eye(len(x), device=x.device)).square().mean()
        return Prompts({G: torch.cat([p["Q" + G], p["V" + G]], 1) for G in "GE"}, {"ortho": penalty}, {})


class MaPLe(nn.Module):
    """MaPLe (Khattak et al. 2023): question prompts at every injected block, visual prompts a linear map of them."""
    lr, lr_backbone, epochs, batch, schedule = 8e-3, 1e-4, 2, 25, "constant"

    def __init__(self, d_model, length=8, layers=None):
        super().__init__()
        blocks = sorted(i for group in layers.values() for i in group)
        self.layers, self.keep, self.weights = {str(i): (i,) for i in blocks}, False, {}
        self.pools = nn.ParameterDict({str(i): torch.randn(length, d_model) * 0.02 for i in blocks})
        self.couple = nn.ModuleDict({str(i): nn.Linear(d_model, d_model) for i in blocks})

    def begin_task(self, t):
        pass

    def end_task(self):
        pass

    def forward(self, F_q, F_v, q_mask, v_mask):
        both = {i: torch.cat([p, self.couple[i](p)], 0) for i, p in self.pools.items()}           # (2L,D)
        return Prompts({i: p.expand(len(F_q), -1, -1) for i, p in both.items()}, {}, {})


class OtherFusion(MMPrompt):
    """MM-Prompt with another way to bring the modalities together, for Tables 12 and 13.

    query_fusion in place of Eq. 1, recovery_fusion in place of Eq. 4-10: plus, mean, hadamard or cross-attention.
    """
    FUSIONS = ("plus", "mean", "hadamard", "cross-attention")

    def __init__(self, d_model, n_heads=8, query_fusion=None, recovery_fusion=None, **rest):
        super().__init__(d_model, n_heads, **rest)
        for fusion in (query_fusion, recovery_fusion):
            if fusion not in (None, *self.FUSIONS):
                raise ValueError(f"a fusion is one of {', '.join(self.FUSIONS)}, not {fusion!r}")
        self.query_fusion, self.recovery_fusion = query_fusion, recovery_fusion
        if query_fusion:
            self.query = FusedQuery(d_model, n_heads, query_fusion)
        if recovery_fusion:
            self.recovery = nn.ModuleDict({G: FusedPrompts(d_model, n_heads, recovery_fusion) for G in "GE"})


def fuse(fusion, a, b):
    """Two tensors of one shape brought together: plus, mean or hadamard."""
    return {"plus": a + b, "mean": (a + b) / 2, "hadamard": a * b}[fusion]


class FusedQuery(nn.Module):
    """Table 12: both modalities ask with one fused query, or each with what it sees in the other (cross-attention)."""

    def __init__(self, d_model, n_heads, fusion):
        super().__init__()
        self.fusion = fusion
        if fusion == "cross-attention":
            self.attend = nn.ModuleDict({M: attention(d_model, n_heads) for M in "QV"})

    def forward(self, F_q, F_v, q_mask, v_mask):
        x, mask = {"Q": F_q, "V": F_v}, {"Q": q_mask, "V": v_mask}
        if self.fusion == "cross-attention":
            seen = {M: self.attend[M](x[M], x[OTHER[M]], x[OTHER[M]], key_padding_mask=~mask[OTHER[M]],
                                      need_weights=False)[0] for M in "QV"}
            return {M: masked_mean(seen[M], mask[M]) for M in "QV"}
        if self.fusion == "mean":                                    # of all tokens, question's and picture's
            both = masked_mean(torch.cat([F_q, F_v], 1), torch.cat([q_mask, v_mask], 1))
        else:
            both = fuse(self.fusion, masked_mean(F_q, q_mask), masked_mean(F_v, v_mask))
        return {"Q": both, "V": both}


class FusedPrompts(nn.Module):
    """Table 13: the two selected prompts are fused at once, nothing is hidden and nothing recovered."""

    def __init__(self, d_model, n_heads, fusion):
        super().__init__()
        self.fusion = fusion
        if fusion == "cross-attention":
            self.inter = nn.ModuleDict({M: attention(d_model, n_heads) for M in "QV"})

    def forward(self, p):
        zero = p["Q"].new_zeros(())
        if self.fusion == "cross-attention":
            seen = {M: self.inter[M](p[M], p[OTHER[M]], p[OTHER[M]], need_weights=False)[0] for M in "QV"}
            return seen, zero, zero
        both = fuse(self.fusion, p["Q"], p["V"])
        return {"Q": both, "V": both}, zero, zero


METHODS = {"mmprompt": MMPrompt, "none": Frozen, "finetune": Finetune, "joint": Joint, "l2p": L2P,
           "l2p-one-pool": L2POnePool, "dualprompt": DualPrompt, "coda": CODAPrompt, "maple": MaPLe, "fusion": OtherFusion}


def build_method(args, backbone, stream):
    """The prompt module that --method names.  Raises InputError where its arguments do not fit."""
    cls, width, tasks = METHODS[args.method], backbone.width, len(stream)
    layers = {"G": tuple(args.layers_g), "E": tuple(args.layers_e)}
    sizes = dict(zip(("QG", "QE", "VG", "VE"), args.pool_sizes))
    arguments = {
        L2P: dict(pool_sizes=sizes, top_k=args.top_k, qk_weight=args.qk_weight),
        DualPrompt: dict(length=args.length, tasks=tasks, layers=layers, qk_weight=args.qk_weight),
        CODAPrompt: dict(pool_sizes=sizes, length=args.length, tasks=tasks, layers=layers),
        MaPLe: dict(length=args.length, layers=layers),
        MMPrompt: dict(n_heads=args.heads, length=args.length, top_k=args.top_k, pool_sizes=sizes, layers=layers,
                       mask_ratio=args.mask_ratio, use_query=args.use_query, use_intra=args.use_intra,
                       use_inter=args.use_inter, alpha=args.alpha, beta=args.beta, qk_weight=args.qk_weight),
        Frozen: {}}
    own = next(kwargs for kind, kwargs in arguments.items() if issubclass(cls, kind))
    with metrics.one_clear_line():
        return cls(width, **own, **args.options).to(args.device)


# ============================================================================================ learn and test
# The continual protocol: tasks come one after the other, each with a new optimiser and no look back (except for
# --memory, a replay buffer); after each, every task seen so far is tested, without a task number.  In double increment
# (DI) a task is learned as five subtasks in turn.  The epoch with the best validation score is kept.


def load_stream(args):
    """The tasks of a run, in the order asked for."""
    more = {"sizes": args.sizes} if args.data == "mini" else {}
    return data.vqa_stream(args.setting, args.data, args.root or ".", args.seed, **more).reorder(args.order)


def let_learn(args, backbone, method, t):
    """Decides what task t may change -> {name: parameter}; everything else is frozen."""
    backbone.requires_grad_(False)
    if METHODS[args.method] is Frozen:
        return {}
    if METHODS[args.method] in (Finetune, Joint):
        backbone.t5.requires_grad_(True)
    elif args.train_decoder:
        backbone.t5.decoder.requires_grad_(True)
        backbone.t5.get_input_embeddings().requires_grad_(False)     # shared with the frozen encoder
    if backbone.train_vision == "always" or backbone.train_vision == "first" and t == 0:
        backbone.visual.requires_grad_(True)
    return {f"{part}.{k}": p for part, module in (("backbone", backbone), ("method", method))
            for k, p in module.named_parameters() if p.requires_grad}


def make_optimizer(args, learning):
    """AdamW over {name: parameter}.  Prompts and keys have --lr, attention modules and the visual embedding
    --lr-attention, the T5 --lr-backbone."""
    groups = {"prompts": [], "attention": [], "backbone": []}
    full = METHODS[args.method] in (Finetune, Joint)
    for name, p in learning.items():
        kind = "prompts" if "pools." in name else "attention"
        groups["backbone" if full or name.startswith("backbone.t5.") else kind].append(p)
    rates = {"prompts": args.lr, "attention": args.lr_attention, "backbone": args.lr_backbone}
    # No decay on prompts and keys: it would shrink those that this task never touches.
    groups = [{"params": ps, "lr": rates[k], "weight_decay": 0.0 if k == "prompts" else args.weight_decay}
              for k, ps in groups.items() if ps]
    return torch.optim.AdamW(groups, fused=torch.device(args.device).type in ("cpu", "cuda"))


def batch_loss(args, backbone, method, samples, answers):
    """Eq. 11 on a batch: samples and as many answers, one drawn for each -> ()"""
    with precision(args):
        hidden, mask, out = backbone.encode(*backbone.embed(samples), method, args.train_modality)
        L_ce = backbone.loss(hidden, mask, answers)
    return total_loss(L_ce, out.losses, method.weights)


def precision(args):
    """The context that --dtype asks for."""
    return torch.autocast(torch.device(args.device).type, torch.bfloat16) if args.dtype == "bf16" else nullcontext()


def draw_answer(dice, answers):
    """A training target: one of the annotators' answers with probability proportional to its soft score min(1, count/3)."""
    if len(answers) == 1:
        return answers[0]
    count = Counter(answers)
    return dice.choices(list(count), [min(1.0, c / 3) for c in count.values()])[0]


def replay_memory(args, past):
    """Replay samples: --memory in all, shared equally by the past tasks, drawn at random from each (Table 3)."""
    if not args.memory or not past:
        return []
    share = args.memory // len(past)
    return [s for i, task in enumerate(past)
            for s in random.Random(f"memory {args.seed} {i}").sample(task.train, min(len(task.train), share))]


def learn_task(args, backbone, method, task, run, memory=()):
    """Learns one task, or in DI one subtask, with a new optimiser; memory: samples of earlier tasks to mix in.
    Raises InputError where the loss is not finite."""
    learning = let_learn(args, backbone, method, run.stage)
    if not learning:
        return
    optimizer, B = make_optimizer(args, learning), args.batch
    rates, steps = [group["lr"] for group in optimizer.param_groups], math.ceil(len(task.train) / B)
    for epoch in run.epochs(args.epochs, learning, optimizer, task.name):
        # Order, answers and masks of an epoch depend on the seed and the place in the run alone.
        dice = random.Random(f"{args.seed} {run.stage} {run.part} {epoch}")
        torch.manual_seed(dice.getrandbits(48))
        order = dice.sample(task.train, len(task.train))
        method.train()
        total = 0.0
        for step in (bar := run.bar(range(steps))):
            batch = order[step * B:(step + 1) * B]
            if memory:
                batch = batch + dice.sample(memory, min(B, len(memory)))
            loss = batch_loss(args, backbone, method, batch, [draw_answer(dice, s.answers) for s in batch])
            run.check(loss.item(), step, optimizer)
            if method.schedule == "linear":                          # the rates fall to zero over the task
                for group, rate in zip(optimizer.param_groups, rates):
                    group["lr"] = rate * (1 - epoch / args.epochs - 1 / args.epochs * step / steps)
            (loss / args.accum).backward()
            if (step + 1) % args.accum == 0 or step + 1 == steps:
                nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], args.grad_clip)
                optimizer.step()
                optimizer.zero_grad()
            total += loss.item()
            bar.set_postfix(loss=f"{total / (step + 1):.3f}")
        score = evaluate(args, backbone, method, task.val, args.train_modality)["score"] if task.val else epoch
        run.keep(total / max(steps, 1), score)


@torch.no_grad()
def evaluate(args, backbone, method, samples, modality=None):
    """Answers samples, each of which depends on itself alone.

    Returns {"score": VQA accuracy in points, "f1": token F1 in points, "chosen": {pool: {prompt: how often}}}.
    modality: "joint", or what alone the encoder sees, "v" or "q"; default --modality.
    """
    method.eval()
    score, f1, chosen = 0.0, 0.0, {}
    for i in range(0, len(samples), args.eval_batch):
        part = samples[i:i + args.eval_batch]
        with precision(args):
            hidden, mask, out = backbone.encode(*backbone.embed(part), method, modality or args.modality)
            answers = backbone.answer(hidden, mask)
        for s, answer in zip(part, answers):
            score += metrics.vqa_accuracy(answer, s.answers)
            f1 += max(metrics.token_f1(answer, truth) for truth in set(s.answers))
        for pool, picked in out.chosen.items():
            chosen.setdefault(pool, Counter()).update(picked.flatten().tolist())
    n = max(1, len(samples))
    return {"score": 100 * score / n, "f1": 100 * f1 / n, "chosen": {pool: dict(c) for pool, c in chosen.items()}}


def run(args, folder):
    """One run with one seed (args.seed) in `folder`.  Returns what its results.json holds."""
    metrics.prepare(args, args.backbone == "mini")
    stream = load_stream(args)
    backbone = load_backbone(args, stream)
    torch.manual_seed(args.seed)                                     # what a method draws at its start depends on the seed alone
    method = build_method(args, backbone, stream)
    run = metrics.Run(folder, metrics.deciding(args), stream.names, args.resume, args.quiet)
    one_stage = args.method in ("none", "joint")                     # the bounds know no tasks: one stage, all tasks tested
    describe(args, stream, backbone, method, run)

    learned = {"method": method, "visual": backbone.visual}
    if method is not None and (args.train_decoder or args.method in ("finetune", "joint")):
        learned["t5"] = backbone.t5
    run.restore(**learned)                                           # of a run that was killed
    for t, task in run.tasks(stream.mixed() if one_stage else stream.tasks):
        if run.fresh:                                                # a killed run may have begun it
            method.begin_task(t)
        memory = replay_memory(args, stream.tasks[:t])
        for s, part in run.parts(task.subtasks or [task]):
            learn_task(args, backbone, method, part, run, memory)
            if task.subtasks:                                        # F_intra: the subtasks of this task so far
                scores = [evaluate(args, backbone, method, p.test)["score"] for p in task.subtasks[:s + 1]]
                run.kept.setdefault("intra", {}).setdefault(str(t), []).append(scores)
        method.end_task()
        seen = stream.tasks if one_stage else stream.tasks[:t + 1]
        run.kept["last"] = [evaluate(args, backbone, method, getattr(one, args.split)) for one in seen]
        run.row([one["score"] for one in run.kept["last"]])
    return finish(args, stream, backbone, method, run)


def describe(args, stream, backbone, method, run):
    """Prints what is about to run."""
    learning = sum(p.numel() for p in let_learn(args, backbone, method, 0).values())
    total = sum(p.numel() for module in (backbone, method) for p in module.parameters())
    run.kept.update(trainable=learning, frozen=total - learning)
    run.say(f"method {args.method} · setting {args.setting} · data {stream.extra.get('version', args.data)} · backbone "
            f"{args.backbone} {args.backbone_seed} · seed {args.seed} · {args.device} {args.dtype}\n{data.describe(stream)}\n"
            f"trainable {learning:,} of {total:,} parameters · batch {args.batch} x {args.accum} · epochs {args.epochs} · "
            f"lr {args.lr:g} · greedy decoding, no task id at test, replay buffer {args.memory}")


def finish(args, stream, backbone, method, run):
    """The last row again with one modality hidden (Eq. 12-13), the metrics, and the files of a run."""
    last, A = run.kept["last"], run.A
    by = {args.modality: last}
    for modality in {"joint", "v", "q"} - {args.modality}:
        by[modality] = [evaluate(args, backbone, method, getattr(task, args.split), modality) for task in stream.tasks]
    mean = {modality: float(np.mean([one["score"] for one in rows])) for modality, rows in by.items()}
    values = {"A": float(A[-1].mean())}
    if not np.isnan(A[0, 0]) and len(A) > 1 and args.method not in ("none", "joint"):
        values |= {"F_inter": metrics.forgetting(A), "F_inter_own": metrics.forgetting(A, "own")}
    values |= {"token_F1": float(np.mean([one["f1"] for one in by["joint"]])), "A_v_only": mean["v"], "A_q_only": mean["q"],
               "merge_effectiveness": float(metrics.merge_effectiveness(mean["joint"], mean["v"], mean["q"])),
               "modality_difference": float(metrics.modality_difference(mean["v"], mean["q"]))}
    if intra := run.kept.get("intra"):
        square = [np.array([r + [np.nan] * (len(rows) - len(r)) for r in rows]) for rows in intra.values()]
        values["F_intra"] = metrics.intra_forgetting(square)
    if args.method == "joint":                                       # one model for all settings: scored by question type too
        by_type = {}
        for task in stream.tasks:
            for s in getattr(task, args.split):
                by_type.setdefault(s.question_type, []).append(s)
        values["A_by_type"] = float(np.mean([evaluate(args, backbone, method, part)["score"] for part in by_type.values()]))
    pools = sorted({pool for one in by["joint"] for pool in one["chosen"]})
    selection = {pool: [dict(sorted(one["chosen"].get(pool, {}).items())) for one in by["joint"]] for pool in pools}
    results = run.finish(values, dict(method.state_dict()), f"{args.method} {args.setting}: score on task (column) after (row)",
                         trainable=run.kept["trainable"], frozen=run.kept["frozen"], selection=selection, intra=intra or {},
                         protocol={"task id at test": False, "replay": args.memory}, world=stream.extra.get("version"),
                         counts=[[len(t.train), len(t.val), len(t.test)] for t in stream.tasks])
    if args.data == "mini" and not args.smoke:
        bounds = {"frozen": "QI zero-shot" if args.setting == "QI" else "CI zero-shot",
                  "fine-tuning": f"{args.setting} fine-tuning", "joint": "joint"}
        joint = "A_by_type" if args.setting == "QI" else "A"
        run.say(metrics.worth("mmprompt", stream.extra["version"], bounds, {"frozen": "A", "fine-tuning": "A", "joint": joint}))
    return results


# ==================================================================================================== tables
# name: (title, the row that others are compared with, rows).  A row: its label, the arguments that make it, and what the
# paper prints for VQA v2 (A, F_inter).  "options" are arguments of the method's class that have no flag.
COLUMNS = ("A", "F_inter", "F_intra", "merge_effectiveness")
SETTINGS = ("CI", "QI", "DI")
PAPER_1 = {"l2p": ((33.706, 4.323), (13.720, 23.807), (31.186, 2.112)),
           "l2p-one-pool": ((33.428, 4.150), (13.853, 23.651), (31.343, 2.201)),
           "dualprompt": ((36.063, 4.449), (14.146, 23.518), (33.601, 2.660)),
           "coda": ((37.102, 4.527), (15.438, 22.561), (35.138, 0.902)),
           "maple": ((37.450, 4.606), (15.371, 22.164), (35.187, 1.054)),
           "mmprompt": ((39.240, 3.748), (16.757, 21.546), (36.223, 0.447))}
OURS = (36.223, 0.447)
NO_RECOVERY = {"use_intra": False, "use_inter": False}
ISOLATED = {"use_query": False, **NO_RECOVERY}
FROZEN_QUERY = {"options": {"freeze_query": True}}
TABLES = {
    "1": ("Table 1: methods", "{} mmprompt", [
        (f"{setting} {method}", {"setting": setting, "method": method}, PAPER_1.get(method, (None,) * 3)[i])
        for i, setting in enumerate(SETTINGS) for method in METHODS
        if method not in ("joint", "none", "fusion")]),              # joint training and no training: table bounds
    "2": ("Table 2: parts", "CQ + CR", [
        ("isolated prompts", {"setting": "DI", **ISOLATED}, (34.172, 1.310)),
        ("CQ", {"setting": "DI", **NO_RECOVERY}, (34.990, 0.588)), ("CQ + CR", {"setting": "DI"}, OURS)]),
    "query": ("A query that stops learning", "CQ + CR", [
        ("isolated prompts", {"setting": "DI", **ISOLATED}, (34.172, 1.310)),
        ("CQ", {"setting": "DI", **NO_RECOVERY}, (34.990, 0.588)),
        ("CQ learned in task 1 only", {"setting": "DI", **NO_RECOVERY, **FROZEN_QUERY}, None),
        ("CQ + CR", {"setting": "DI"}, OURS),
        ("CQ learned in task 1 only + CR", {"setting": "DI", **FROZEN_QUERY}, None)]),
    "3": ("Table 3: replay", "mmprompt memory 500", [
        (f"{method} memory {m}", {"setting": "DI", "method": method, "memory": m}, paper) for method, m, paper in (
            ("dualprompt", 500, (27.641, 3.765)), ("coda", 500, (30.632, 2.471)), ("maple", 500, (30.049, 3.112)),
            ("mmprompt", 500, (32.394, 2.259)), ("mmprompt", 200, (29.945, 3.112)), ("mmprompt", 1000, (34.268, 2.427)))]),
    "9": ("Table 9: pool sizes", "40 60 80 120", [
        (" ".join(map(str, sizes)), {"setting": "DI", "pool_sizes": sizes}, paper) for sizes, paper in (
            ([10, 80, 10, 80], (35.79, 0.914)), ([50, 50, 50, 50], (35.168, 1.268)), ([40, 60, 80, 120], OURS),
            ([60, 80, 100, 140], (34.851, 0.985)))]),
    "10": ("Table 10: recovery", "intra + inter", [
        ("no recovery", {"setting": "DI", **NO_RECOVERY}, (34.990, 0.588)),
        ("intra", {"setting": "DI", "use_inter": False}, (35.150, 1.140)),
        ("inter", {"setting": "DI", "use_intra": False}, (35.318, 1.071)), ("intra + inter", {"setting": "DI"}, OURS)]),
    "11": ("Table 11: losses", "L_intra + L_inter", [
        ("no loss", {"setting": "DI", "alpha": 0.0, "beta": 0.0}, (34.260, 1.871)),
        ("L_intra", {"setting": "DI", "alpha": 0.0}, (34.743, 1.531)),
        ("L_inter", {"setting": "DI", "beta": 0.0}, (35.059, 1.204)), ("L_intra + L_inter", {"setting": "DI"}, OURS)]),
    "12": ("Table 12: other queries", "Eq. 1", [
        (f, {"setting": "DI", "method": "fusion", "options": {"query_fusion": f}}, paper) for f, paper in (
            ("plus", (34.275, 1.731)), ("mean", (34.398, 2.015)), ("hadamard", (34.702, 1.142)),
            ("cross-attention", (34.891, 1.202)))] + [("Eq. 1", {"setting": "DI"}, OURS)]),
    "13": ("Table 13: other recoveries", "Eq. 4-10", [
        (f, {"setting": "DI", "method": "fusion", "options": {"recovery_fusion": f}}, paper) for f, paper in (
            ("plus", (33.850, 1.335)), ("mean", (34.170, 1.405)), ("hadamard", (34.212, 1.274)),
            ("cross-attention", (34.628, 1.428)))] + [("Eq. 4-10", {"setting": "DI"}, OURS)]),
    "fig4c": ("Fig. 4c: mask ratio", "delta 0.05", [
        (f"delta {d}", {"setting": "DI", "mask_ratio": d}, OURS if d == 0.05 else None)
        for d in (0.01, 0.03, 0.05, 0.07, 0.10)]),
    "fig4d": ("Fig. 4d: weight of L_inter", "alpha 1.0", [
        (f"alpha {a}", {"setting": "DI", "alpha": a}, OURS if a == 1.0 else None) for a in (0.4, 0.6, 0.8, 1.0, 1.2, 1.4)]),
    "fig9": ("Fig. 9: weight of L_intra", "beta 0.3", [
        (f"beta {b}", {"setting": "DI", "beta": b}, OURS if b == 0.3 else None) for b in (0.1, 0.2, 0.3, 0.4, 0.5)]),
    "bounds": ("Bounds of the built-in world", None, [
        ("CI zero-shot", {"setting": "CI", "method": "none"}, None),
        ("QI zero-shot", {"setting": "QI", "method": "none"}, None), ("joint", {"setting": "CI", "method": "joint"}, None),
        *((f"{setting} fine-tuning", {"setting": setting, "method": "finetune"}, None) for setting in SETTINGS),
        *((f"joint, {word} only", {"setting": "CI", "method": "joint", "epochs": 8, "train_modality": m, "modality": m}, None)
          for word, m in (("question", "q"), ("picture", "v")))]),
}


# ============================================================================================== command line
# The paper's own flags beside those that all three scripts share (metrics.shared_flags), and --bench.


@torch.no_grad()
def bench(args):
    """Cost of the prompts against the frozen encoder they are injected into, at T5-base shapes with random weights."""
    from transformers import T5Config, T5ForConditionalGeneration
    B, Nq, Nv, D, heads, blocks = (8, 8, 6, 64, 4, 6) if args.smoke else (100, 20, 36, 768, 12, 12)
    config = T5Config(d_model=D, d_kv=D // heads, d_ff=4 * D, num_heads=heads, num_layers=blocks, num_decoder_layers=1,
                      vocab_size=512 if args.smoke else 32128, dropout_rate=0.0, decoder_start_token_id=0)
    torch.manual_seed(0)
    backbone = VQABackbone(T5ForConditionalGeneration(config), None, VisualEmbedding(8, D), None).to(args.device)
    F_q, F_v = torch.randn(B, Nq, D, device=args.device), torch.randn(B, Nv, D, device=args.device)
    q_mask, v_mask = (torch.ones(B, n, dtype=torch.bool, device=args.device) for n in (Nq, Nv))
    inputs, layers = (F_q, F_v, q_mask, v_mask), {"G": (1, 2), "E": (3, 4, 5)}
    ours = MMPrompt(D, length=args.length).to(args.device).eval()
    dual, none = DualPrompt(D, args.length, 10, layers).to(args.device).eval(), Frozen()
    dual.begin_task(9)
    pool, q = ours.pools["QG"], ours.query(*inputs)["Q"]

    def timed(job):
        def call():
            with precision(args):
                job()
        return call
    jobs = {"frozen encoder": lambda: backbone.encode(*inputs, none),
            "Eq. 1-10: query, selection, recovery": lambda: ours(*inputs),
            "prompts of DualPrompt": lambda: dual(*inputs),
            "encoder with MM-Prompt": lambda: backbone.encode(*inputs, ours),
            "encoder with DualPrompt": lambda: backbone.encode(*inputs, dual),
            "Eq. 2-3: selection from one pool": lambda: pool(q),
            "Eq. 2-3 in loops over samples and prompts": lambda: looped_pool(pool, q),
            "Eq. 1-10, a loop over samples": lambda: looped_method(ours, *inputs)}
    rows = dict(zip(jobs, metrics.seconds(args.device, *map(timed, jobs.values()), repeats=3 if args.smoke else 5)))
    names, hardware = list(rows), metrics.environment()
    over = dict(zip((names[1], names[3], names[6], names[7]), (names[0], names[4], names[5], names[1])))
    print(f"batch {B}, {Nq} question and {Nv} picture tokens, width {D}, {blocks} encoder blocks, {args.dtype}, "
          f"{hardware['hardware']}, {hardware['threads']} threads")
    for name, value in rows.items():
        ratio = f"{value / rows[over[name]]:8.2f} x {over[name]}" if name in over else ""
        print(f"{name:<46}{1000 * value:10.1f} ms  {ratio}")
    count = lambda module: sum(p.numel() for p in module.parameters())
    print(f"parameters: MM-Prompt {count(ours):,}, DualPrompt {count(dual):,}, frozen encoder blocks "
          f"{count(backbone.t5.encoder.block):,} · throughput {B / rows[names[3]]:.0f} samples/s · peak "
          f"{metrics.peak_memory_mb():.0f} MiB\npaper, Fig. 7: MM-Prompt 0.179 s per 100 samples, DualPrompt 0.158 s, ratio 1.13")
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


def settle(args):
    """The arguments of one run, with the defaults that depend on others.  Each default rate was chosen with the same
    small search on a seed that is not reported (results/mmprompt/search.md)."""
    method = METHODS[args.method]
    args = metrics.settle_shared(args)
    args.lr = method.lr if args.lr is None else args.lr
    args.lr_attention = args.lr / 10 if args.lr_attention is None else args.lr_attention
    args.lr_backbone = method.lr_backbone if args.lr_backbone is None else args.lr_backbone
    args.epochs, args.batch = args.epochs or method.epochs, args.batch or method.batch
    return args


def parse_args(argv=None):
    p = metrics.shared_flags("MM-Prompt: continual visual question answering with cross-modal prompts.", METHODS, TABLES,
                             "mini | vqav2 | nextqa | a .jsonl file", "mini, or any T5-family Hugging Face id or folder")
    add, number = p.add_argument, metrics.positive
    add("--setting", default="CI", choices=["DI", "CI", "QI"], help="dual, class or question increment")
    add("--sizes", type=number, nargs=3, default=[8000, 800, 1600], help="mini: questions in train, val, test")
    add("--features", help="region features: a folder of .npz/.npy per picture, or VL-T5's .h5")
    add("--vision", help="CLIP, SigLIP or DINOv2 id or folder that sees the pictures for --backbone")
    add("--train-decoder", default=False, action=metrics.YES_NO, help="the official code's choice; the paper freezes it")
    add("--train-vision", choices=["first", "always", "never"], help="when the visual embedding learns; default: never where "
        "it is pre-trained, else in the first task")
    add("--length", type=number, default=8, help="L, tokens per prompt (1: as paper and official code)")
    add("--top-k", type=number, default=5, help="k of Eq. 2")
    add("--pool-sizes", type=number, nargs=4, default=[40, 60, 80, 120], metavar=("QG", "QE", "VG", "VE"), help="N, Table 9")
    add("--mask-ratio", type=metrics.share, default=0.05, help="delta of Eq. 4")
    add("--alpha", type=metrics.finite, default=1.0, help="alpha of Eq. 11, weight of L_inter")
    add("--beta", type=metrics.finite, default=0.3, help="beta of Eq. 11, weight of L_intra")
    add("--qk-weight", type=metrics.finite, default=1.0, help="weight of L_qk, in L2P and DualPrompt too")
    add("--heads", type=number, default=8, help="attention heads of A")
    add("--layers-g", type=metrics.natural, nargs="+", default=[1, 2], help="encoder blocks with G prompts, from 0")
    add("--layers-e", type=metrics.natural, nargs="+", default=[3, 4, 5], help="encoder blocks with E prompts, from 0")
    add("--use-query", default=True, action=metrics.YES_NO, help="CQ of Table 2 (Eq. 1)")
    add("--use-intra", default=True, action=metrics.YES_NO, help="intra recovery of Table 10 (Eq. 5-6)")
    add("--use-inter", default=True, action=metrics.YES_NO, help="inter recovery of Table 10 (Eq. 7-10)")
    add("--memory", type=metrics.natural, default=0, help="replay samples in all (Table 3)")
    add("--modality", default="joint", choices=["joint", "v", "q"], help="what the encoder sees at test (Eq. 12-13)")
    add("--train-modality", default="joint", choices=["joint", "v", "q"], help="what it sees in training (blind bounds)")
    add("--accum", type=number, default=1, help="batches per optimiser step")
    add("--lr-attention", type=metrics.above_zero, help="of the attention modules and the visual embedding; default: a tenth "
        "of --lr")
    add("--lr-backbone", type=metrics.above_zero, help="of the T5 where it learns; default: 5e-4 joint and finetune, else 1e-4")
    add("--weight-decay", type=metrics.finite, default=0.01, help="of attention modules and T5; prompts and keys have none")
    args = metrics.check_shared(p.parse_args(argv))
    args.options = {}                                                # arguments of the class without a flag, for tables
    if args.smoke:
        args.sizes, args.epochs = [240, 80, 160], args.epochs or 1
    args.out = args.out or ("runs/mmprompt_tables" if args.table else f"runs/mmprompt_{args.setting}_{args.method}")
    return args


def main(argv=None):
    args = parse_args(argv)
    if args.pretrain:
        return pretrain(args)
    if args.bench:
        return bench(settle(metrics.with_seed(args)))
    if args.table:
        title, against, rows = TABLES[args.table]
        table = metrics.Table(args, settle, f"{title}, on {args.data}; the paper's numbers are its VQA v2", against, rows,
                              COLUMNS, ("A", "F_inter"), "A / F_inter", lines=args.table.startswith("fig"))
        for one, folder in table.missing():
            run(one, folder)
        return print(table.write())
    name, results = f"{args.method} {args.setting}", []
    for one, folder in metrics.repetitions(args, settle):
        results.append(run(one, folder))
        print(metrics.last_line(name, results[-1:], COLUMNS))
    if len(results) > 1:
        metrics.keep_means(args.out, results)
        print(metrics.last_line(name, results, COLUMNS))


# ======================================================================================== the small backbone
# The built-in world's T5 and its eyes, trained on *statements* about other scenes ("the horse has the color <mask>"),
# never on a question; nobody needs this to read the method.  Its bounds are measured at the end and kept in the file.


def pretrain(args):
    """Makes backbones/mini-vqa-<seed>.safetensors anew."""
    args = settle(metrics.with_seed(args))
    torch.set_num_threads(1)
    start, seed = metrics.time.time(), args.backbone_seed
    torch.manual_seed(seed)
    both, dice = mini_models().to(args.device), random.Random(f"upstream {seed}")
    scenes = [data.random_scene(dice, data.COCO_NAMES[i % 80], crowd=dice.random() < .4, alone=dice.random() < .4)
              for i in range(min(MINI_SCENES, 12 * MINI_STEPS + 200))]
    regions = data.draw_scenes(scenes)
    teach_eyes(both, scenes, regions, dice, args)
    teach_statements(both, scenes, regions, dice, args)
    both.to("cpu")
    once = {}                                                        # tied tensors are stored once
    for name, tensor in both.state_dict().items():
        if tensor.data_ptr() not in {other.data_ptr() for other in once.values()}:
            once[name] = tensor.contiguous()
    metrics.keep_with_bounds("mini-vqa", mini_config(seed), once, start, f"mini-VQA {data.MINI_VQA_VERSION}",
                             "python mmprompt.py", args, settle, run, ("A", "A_by_type"))


def teach_eyes(both, scenes, regions, dice, args):
    """First the eyes alone: a region's token is drawn to the embeddings of the words that describe it, as in contrastive
    picture-text training.  Without this, naming stays at chance for thousands of steps."""
    tokenizer = mini_tokenizer()
    values = {"name": data.COCO_NAMES, "color": list(data.COLORS), "pattern": data.PATTERNS, "pose": data.POSES,
              "size": data.SIZES, "cell": list(data.CELLS)}          # {attribute: its words}
    embedding = both["t5"].get_input_embeddings().weight.detach().cpu()
    rows = [torch.stack([embedding[tokenizer(word, add_special_tokens=False)["input_ids"]].mean(0) for word in words])
            for words in values.values()]                            # per attribute (words,D)
    shown = []                                                       # (scene, region, word of each attribute or -1)
    for r, scene in enumerate(scenes):
        for i, j in enumerate(data.region_order(scene)):
            if j < len(scene["things"]):
                thing = scene["things"][j]
                shown.append((r, i, [words.index(thing[k]) if thing[k] in words else -1 for k, words in values.items()]))
    visual, steps = both["visual"].requires_grad_(True), max(MINI_EYES * MINI_STEPS, 20)
    optimizer = torch.optim.AdamW(visual.parameters(), 2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps, pct_start=0.1)

    def loss_of(step):
        batch = dice.sample(shown, min(128, len(shown)))
        r, i = [b[0] for b in batch], [b[1] for b in batch]
        features = torch.from_numpy(regions[0][r, i]).flatten(1).float() / 127.5 - 1              # (B,768)
        x = visual(features.to(args.device), torch.from_numpy(regions[1][r, i]).to(args.device))  # (B,D)
        target = torch.tensor([t for *_, t in batch], device=args.device)                         # (B,6)
        return sum(F.cross_entropy(x @ e.T.to(args.device) / MINI["d_model"] ** 0.5, target[:, k], ignore_index=-1)
                   for k, e in enumerate(rows))
    metrics.fit("eyes of the small backbone", loss_of, optimizer, schedule, steps, quiet=args.quiet)


def teach_statements(both, scenes, regions, dice, args):
    """Then everything together on statements with a gap."""
    model = VQABackbone(both["t5"], mini_tokenizer(), both["visual"], world_regions(regions), max_question=16, max_answer=10)
    both.requires_grad_(True).train()
    optimizer = torch.optim.AdamW(both.parameters(), MINI_LR, weight_decay=0.01)
    steps = max(MINI_STEPS, 20)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, MINI_LR, total_steps=steps, pct_start=0.1)

    def loss_of(step):
        rows = [dice.randrange(len(scenes)) for _ in range(MINI_BATCH)]
        pairs = [data.upstream_statement(dice, scenes[r]) for r in rows]
        samples = [data.Sample(r, r, text, (answer,), "", "") for r, (text, answer) in zip(rows, pairs)]
        hidden, mask, _ = model.encode(*model.embed(samples), Frozen())
        return model.loss(hidden, mask, [answer for _, answer in pairs])
    metrics.fit("the small backbone", loss_of, optimizer, schedule, MINI_STEPS, 1.0, args.quiet)
    both.requires_grad_(False).eval()


if __name__ == "__main__":
    metrics.run_cli(main)
