# ------------------------------------------------------------------------------------- tests of missing_prompt.py
import argparse
import itertools
import json
import math
import os
import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import data
import metrics
import missing_prompt as mp
from data import MODALITIES, InputError, affect_stream

HERE = Path(__file__).resolve().parent
MISSING_WORLD = {"train": 24, "val": 16, "test": 20, "upstream": 48, "upstream_val": 16}
MISSING_SMALL = ["--epochs", "2", "--pre-epochs", "1", "--layers", "3", "--fusion-layers", "1", "--length", "4", "--buffer", "16",
                 "--device", "cpu"]


@pytest.fixture(autouse=True)
def missing_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("MMPROMPTS_CACHE", str(tmp_path_factory.getbasetemp() / "missing-cache"))


def missing_args(*argv):
    a = mp.resolve(mp.arguments([*MISSING_SMALL, *argv]))
    a.quiet = True
    return a


def missing_learner(method="prompts", *argv, seed=0):
    """A small learner of `method` on a small world, nothing trained."""
    a = missing_args("--method", method, *argv)
    stream = affect_stream(a.data, a.patterns, seed=seed, world=MISSING_WORLD, samples=a.samples)
    torch.manual_seed(seed)
    return mp.METHODS[method](mp.make_backbone(a, stream), mp.Store(stream, a.patterns), a), stream


class MissingToy(nn.Module):
    """A backbone of one weight: output = w * the text's only feature.  Everything about it can be worked by hand."""
    width = features = layers = 1

    def __init__(self, w=1.0):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([w]))

    def embed(self, x):
        return x

    def encode(self, h, *_):
        return h["text"][:, 0]

    def forward(self, h, *_):
        return h["text"][:, 0] * self.w


def missing_toy(method, text, label, w=1.0, **settings):
    features = {m: np.zeros((len(text), 1, 1), np.float32) for m in MODALITIES}
    features["text"][:, 0, 0] = text
    stream = data.Stream([], extra={"features": features, "label": np.float32(label), "scoring": "mosi", "outputs": 1})
    a = argparse.Namespace(**{"weight": None, "buffer": 4, "patterns": mp.PATTERNS, "length": 1, **settings})
    return mp.METHODS[method](MissingToy(w), mp.Store(stream, mp.PATTERNS), a)


# the paper's equations -------------------------------------------------------------------------------------------


def test_missing_table_1_and_pairs():
    assert len(mp.PATTERNS) == len(set(mp.PATTERNS)) == 7 and all(mp.PATTERNS)
    assert mp.PATTERNS[0] == set(MODALITIES)
    assert mp.mirror_pairs(mp.PATTERNS) == ((1, 2), (4, 6))
    swap = {"audio": "text", "text": "audio", "video": "video"}
    for i, j in mp.mirror_pairs(mp.PATTERNS):
        assert {swap[m] for m in mp.PATTERNS[i]} == mp.PATTERNS[j]
    assert mp.mirror_pairs(mp.PATTERNS[::-1]) == ((5, 4), (2, 0))
    assert mp.mirror_pairs(mp.PATTERNS[:3]) == ((1, 2), None)


@pytest.mark.parametrize("keys", ["shared", "modality"])
def test_missing_eq_2_and_3_against_loops(keys):
    torch.manual_seed(0)
    p = mp.MissingPrompts(6, 4, keys=keys).double()
    P, miss, avail = (x.detach().numpy() for x in (p.P_M, p.k_miss, p.k_avail))
    for t, pattern in enumerate(mp.PATTERNS):
        expected = np.zeros((4, 6))
        for m, name in enumerate(MODALITIES):
            key = (avail if name in pattern else miss)[m if keys == "modality" else 0]
            for row in range(4):
                for d in range(6):
                    expected[row, d] += key[d] * P[m, row, d]
        assert np.allclose(p.task_aware(t).detach(), expected, atol=1e-12)
        assert np.allclose(p.task_aware(torch.tensor([t, 0]))[0].detach(), expected, atol=1e-12)
        assert np.allclose(p.z()[t].detach(), expected.mean(0), atol=1e-12)


def test_missing_attach_puts_each_kind_at_its_layers():
    p = mp.MissingPrompts(6, 4, depths=(2, 1, 2), layers=6)
    got = p.attach(3)
    for i, layer in enumerate(got):
        for j, m in enumerate(MODALITIES):
            want = [p.P_M[j], p.P_M[j], p.task_aware(3), p.P_S[3], p.P_S[3], None][i]
            assert layer is None if want is None else torch.equal(layer[m][0], want)
    later = mp.MissingPrompts(6, 4, sequence=("TS", "MS", "TA"), start=1, layers=5)
    assert later.plan == [None, "TS", "MS", "TA", None]
    only = mp.MissingPrompts(6, 4, kinds=("TA",))
    assert only.plan == [None, "TA", None, None, None] and only.P_S is None and only.P_M is not None
    with pytest.raises(InputError, match="need 6 layers"):
        mp.MissingPrompts(6, 4, depths=(2, 2, 2))
    assert sum(x.numel() for x in mp.MissingPrompts().parameters()) == 3 * 16 * 30 + 2 * 30 + 7 * 16 * 30 == 4860


def missing_msa_loop(layer, x, n):
    """MSA on x (N,D) in plain loops, float64: the last n rows."""
    D, H = x.shape[1], layer.heads
    w = {k: v.detach().numpy() for k, v in layer.state_dict().items()}
    norm = lambda r, k: (r - r.mean()) / np.sqrt(r.var() + 1e-5) * w[f"{k}.weight"] + w[f"{k}.bias"]
    qkv = [w["qkv.weight"] @ norm(r, "norm1") + w["qkv.bias"] for r in x]
    out = []
    for i in range(len(x) - n, len(x)):
        heads = []
        for h in range(H):
            part = slice(h * D // H, (h + 1) * D // H)
            scores = [qkv[i][:D][part] @ r[D:2 * D][part] / math.sqrt(D // H) for r in qkv]
            e = np.exp(np.array(scores) - max(scores))
            heads.append(sum(a * r[2 * D:][part] for a, r in zip(e / e.sum(), qkv)))
        y = x[i] + w["out.weight"] @ np.concatenate(heads) + w["out.bias"]
        hidden = np.maximum(w["up.weight"] @ norm(y, "norm2") + w["up.bias"], 0)
        out.append(y + w["down.weight"] @ hidden + w["down.bias"])
    return np.stack(out)


def test_missing_eq_1_4_5_prepend_attend_drop():
    torch.manual_seed(1)
    layer = mp.MSALayer(6, 2).double().eval()
    h, P = torch.randn(3, 4, 6).double(), torch.randn(1, 5, 6).double()
    got = layer(h, P).detach()
    for b in range(3):
        assert np.allclose(got[b], missing_msa_loop(layer, torch.cat([P[0], h[b]]).numpy(), 4), atol=1e-10)
        assert np.allclose(layer(h).detach()[b], missing_msa_loop(layer, h[b].numpy(), 4), atol=1e-10)
    literal = layer(torch.cat([P.expand(3, -1, -1), h], 1))[:, 5:]
    assert torch.allclose(got, literal, atol=1e-12)
    assert torch.allclose(layer(h, (P, P.clone())), literal, atol=1e-12)               # a prefix pair, for DualPrompt
    assert not torch.allclose(got, layer(h), atol=1e-3)


def test_missing_encode_follows_the_layers_one_by_one():
    learner, _ = missing_learner()
    learner.eval()
    net, b = learner.net, learner.store.batch(torch.arange(3), 2)
    prompts, seqs = learner.prompts, {}
    for m in ("text", "audio", "video"):
        h = b.x[m].expand(3, -1, -1)
        for layer, P in zip(net.streams[m], (prompts.modality(m), prompts.task_aware(2), prompts.task_specific(2))):
            h = layer(torch.cat([P[None].expand(3, -1, -1), h], 1))[:, 4:]
        seqs[m] = h
    x = torch.cat([seqs["text"], seqs["audio"], seqs["video"]], 1)
    for layer in net.fusion:
        x = layer(x)
    assert torch.allclose(learner.output(b), net.head(net.norm(x[:, 0])), atol=1e-5)


def test_missing_keep_lets_prompts_stay_and_replaces_them():
    learner, _ = missing_learner("prompts", "--keep", "--depths", "2", "1", "0")
    learner.eval()
    net, b, prompts = learner.net, learner.store.batch(torch.arange(2), 0), learner.prompts
    seqs = []
    for m in ("text", "audio", "video"):
        h, n = b.x[m], b.x[m].shape[1]
        x = torch.cat([h, prompts.modality(m)[None].expand(2, -1, -1)], 1)
        x = net.streams[m][1](net.streams[m][0](x))                  # stays through its two layers
        x = torch.cat([x[:, :n], prompts.task_aware(0)[None].expand(2, -1, -1)], 1)
        seqs.append(net.streams[m][2](x))                            # replaced, then passed to the fusion
    x = torch.cat(seqs, 1)
    for layer in net.fusion:
        x = layer(x)
    assert torch.allclose(learner.output(b), net.head(net.norm(x[:, 0])), atol=1e-5)


def test_missing_eq_6_against_loops_and_by_hand():
    z = np.random.default_rng(0).standard_normal((7, 5))
    cos = lambda a, b: a @ b / math.sqrt((a @ a) * (b @ b))
    for i, j, tau in ((1, 2, 0.5), (6, 4, 0.1), (0, 3, 2.0)):
        total = sum(math.exp(cos(z[i], z[k]) / tau) for k in range(7) if k != i)      # k = i alone is left out
        expected = -math.log(math.exp(cos(z[i], z[j]) / tau) / total)
        assert mp.nt_xent(torch.tensor(z), i, j, tau).item() == pytest.approx(expected, abs=1e-10)
    hand = torch.tensor([[2.0, 0.0], [5.0, 0.0], [0.0, 3.0]])        # cos(0,1) = 1, cos(0,2) = 0
    assert mp.nt_xent(hand, 0, 1, 1.0).item() == pytest.approx(-math.log(math.e / (math.e + 1)), abs=1e-6)
    assert mp.nt_xent(hand, 0, 2, 1.0).item() == pytest.approx(-math.log(1 / (math.e + 1)), abs=1e-6)


def test_missing_eq_6_pulls_the_pair_and_pushes_the_rest():
    z = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.8, -0.6]], requires_grad=True)        # pair (0,1); 2 is a negative
    mp.nt_xent(z, 0, 1, 0.5).backward()
    step = -z.grad
    assert step[1] @ z[0] > 0 and step[2] @ z[0] < 0                 # the positive towards z_0, the negative away
    with torch.no_grad():
        moved = F.cosine_similarity(z + 0.1 * step, (z + 0.1 * step)[:1], dim=-1)
        before = F.cosine_similarity(z, z[:1], dim=-1)
    assert moved[1] > before[1] and moved[2] < before[2]


def test_missing_eq_7_and_table_4():
    z = torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    one = mp.nt_xent(z, 1, 2, 0.3) + mp.nt_xent(z, 2, 1, 0.3)
    two = mp.nt_xent(z, 4, 6, 0.3) + mp.nt_xent(z, 6, 4, 0.3)
    assert mp.nt_xent(z, 1, 2, 0.3) != mp.nt_xent(z, 2, 1, 0.3)
    loss = lambda *pairs, w=1.0: mp.task_interaction_loss(z, pairs, w, 0.3).item()
    assert loss((1, 2), (4, 6), w=0.25) == pytest.approx((one + 0.25 * two).item(), abs=1e-12)
    assert loss(None, (4, 6), w=0.25) == pytest.approx(0.25 * two.item(), abs=1e-12)
    assert loss((1, 2), None, w=0.25) == pytest.approx(one.item(), abs=1e-12)
    assert loss(None, None) == 0
    assert mp.task_interaction_loss(z).item() == pytest.approx(mp.task_interaction_loss(z, ((1, 2), (4, 6)), 1.0, 0.5).item())


def test_missing_eq_8():
    for gamma, trade in ((0.1, 1.0), (0.7, 3.0)):
        learner, _ = missing_learner("prompts", "--gamma", str(gamma), "--trade-off", str(trade), "--tau", "0.2")
        b = learner.store.batch(torch.arange(5), 3)
        task = (learner.output(b)[:, 0] - b.y).abs().mean()
        con = mp.task_interaction_loss(learner.prompts.z(), ((1, 2), (4, 6)), trade, 0.2)
        assert con > 0 and learner.loss(b).item() == pytest.approx((task + gamma * con).item(), rel=1e-5)
        for p in (learner.prompts.k_avail, learner.prompts.P_M):     # both terms teach the shared tensors
            got, *want = (torch.autograd.grad(x, p, retain_graph=True)[0] for x in (learner.loss(b), task, gamma * con))
            assert want[0].any() and want[1].any() and torch.allclose(got, sum(want), atol=1e-5)
    learner, _ = missing_learner("prompts", "--data", "mini4")
    b = learner.store.batch(torch.arange(5), 3)
    expected = -sum(learner.output(b).log_softmax(-1)[i, b.y[i]] for i in range(5)) / 5 + 0.1 * learner.contrastive() \
        * learner.strength / 0.1
    assert learner.loss(b).item() == pytest.approx(expected.item(), rel=1e-5)


def test_missing_zero_times_zero_is_dead_and_refused():
    with pytest.raises(InputError, match="never learn"):
        mp.MissingPrompts(6, 4, init=0)
    p = mp.MissingPrompts(6, 4)
    with torch.no_grad():
        for x in (p.P_M, p.k_miss, p.k_avail):
            x.zero_()
    p.task_aware().pow(2).sum().backward()
    (p.task_aware() * torch.randn(7, 4, 6)).sum().backward()         # any loss: both factors of Eq. 2 are zero
    assert not any(x.grad.any() for x in (p.P_M, p.k_miss, p.k_avail))
    p = mp.MissingPrompts(6, 4)                                      # our start is alive, and tells the tasks apart
    mp.task_interaction_loss(p.z()).backward()
    assert all(x.grad.any() for x in (p.P_M, p.k_miss, p.k_avail))
    with torch.no_grad():
        p.k_miss.copy_(p.k_avail)
        assert torch.allclose(p.z()[0], p.z()[5])                    # equal keys: all task-aware prompts equal


def missing_steps(learner, task, steps=3, lr=1e-2):
    optimizer = torch.optim.Adam([p for p in learner.parameters() if p.requires_grad], lr)
    learner.train()
    rows = torch.arange(12)
    learner.begin(task, rows)
    for _ in range(steps):
        optimizer.zero_grad()
        learner.loss(learner.store.batch(rows, task)).backward()
        learner.edit_gradients()
        optimizer.step()
        learner.observe(learner.store.batch(rows, task), 0)
    learner.end(task, rows)


def test_missing_task_specific_prompts_stay_and_shared_ones_move():
    alone, _ = missing_learner("prompts", "--prompts", "TS")
    shared, _ = missing_learner("prompts", "--prompts", "MS")
    for learner, same in ((alone, True), (shared, False)):
        before = mp.predict(learner, torch.arange(6), 2)
        missing_steps(learner, 4)
        assert torch.equal(before, mp.predict(learner, torch.arange(6), 2)) == same
    assert alone.prompts.P_S.grad[[0, 1, 2, 3, 5, 6]].abs().max() == 0 and alone.prompts.P_S.grad[4].any()


# every method ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [m for m in mp.METHODS if m != "none"])
def test_missing_gradients_frozen_parts_and_batch_invariance(method):
    learner, _ = missing_learner(method)
    frozen = {n: p.clone() for n, p in learner.net.state_dict().items()} if learner.frozen else {}
    named = {n: p for n, p in learner.named_parameters() if p.requires_grad}
    touched = set()
    for task in (2, 4):                                              # together: every modality seen, every one missing
        optimizer = torch.optim.Adam(named.values(), 1e-2)
        learner.begin(task, torch.arange(12))
        for step in range(3):                                        # a zero factor learns one step after the other
            learner.train()
            assert learner.net.training != learner.frozen            # no dropout inside what does not learn
            rows = torch.arange(12)
            b = learner.store.batch(rows, torch.tensor([2, 4] * 6) if learner.joint else task)
            optimizer.zero_grad()
            learner.loss(b).backward()
            learner.edit_gradients()
            touched |= {n for n, p in named.items() if p.grad is not None and p.grad.abs().sum() > 0}
            optimizer.step()
            learner.observe(b, 0)
        learner.end(task, torch.arange(12))
    learner.eval()
    assert touched == set(named)
    assert all(torch.equal(p, learner.net.state_dict()[n]) for n, p in frozen.items())
    for task in (2, 4):                                              # who else is in the batch changes nothing
        whole = mp.predict(learner, torch.arange(8), task)
        assert torch.allclose(whole, mp.predict(learner, torch.arange(8), task, size=1), atol=1e-5)
        assert torch.allclose(whole.flip(0), mp.predict(learner, torch.arange(8).flip(0), task), atol=1e-5)
        if method not in ("l2p", "dualprompt", "sprompts"):                # those look their query up by task
            mixed = learner.output(learner.store.batch(torch.arange(8), torch.full((8,), task)))
            assert torch.allclose(whole, mixed, atol=1e-5)


@pytest.mark.parametrize("backbone", ["msa", "mult"])
def test_missing_a_missing_modality_is_zeros(backbone):
    learner, stream = missing_learner("finetune", "--backbone", backbone)
    learner.eval()
    b = learner.store.batch(torch.arange(4), 4)                      # audio alone
    assert b.x["text"].shape[0] == b.x["video"].shape[0] == 1 and not b.x["text"].any()
    full = {m: torch.tensor(stream.extra["features"][m][:4]) * (m == "audio") for m in MODALITIES}
    assert torch.allclose(learner.output(b), learner.net(learner.net.embed(full)), atol=1e-5)
    seen = stream.tasks[4].test[0]
    assert seen["audio"].any() and not seen["video"].any() and not seen["text"].any()
    changed = {**full, "text": torch.ones_like(full["text"])}
    assert not torch.allclose(learner.output(b), learner.net(learner.net.embed(changed)), atol=1e-4)


def test_missing_mult_prompts_matter_and_keep_is_refused():
    learner, _ = missing_learner("prompts", "--backbone", "mult")
    learner.eval()
    b = learner.store.batch(torch.arange(4), 0)
    assert not torch.allclose(learner.output(b), learner.net(b.x), atol=1e-6)
    learner.a.keep = True
    with pytest.raises(InputError, match="--backbone msa"):
        learner.output(b)


def test_missing_agem_projects_by_hand():
    g, ref = torch.tensor([1.0, 2.0]), torch.tensor([0.0, -1.0])
    assert mp.project_away(g, ref).tolist() == [1.0, 0.0]            # the part along ref is gone, the rest stays
    assert mp.project_away(g, -ref).tolist() == [1.0, 2.0]
    # w = 1: new sample x = 1, y = 0 has gradient +1; kept sample x = 2, y = 9 has -2: they disagree, nothing is left
    for kept_label, expected in ((9.0, 0.0), (0.0, 1.0)):
        learner = missing_toy("agem", [1, 2], [0, kept_label], buffer=1)
        learner.kept[:, 0], learner.seen = torch.tensor([1, 0, 0]), torch.tensor(1)
        learner.loss(learner.store.batch(torch.tensor([0]), 0)).backward()
        learner.edit_gradients()
        assert learner.net.w.grad.item() == pytest.approx(expected)


def test_missing_er_and_derpp_losses_by_hand():
    for method, expected in (("er", 1 + 7), ("derpp", 1 + 0.3 * 1.5 ** 2 + 0.5 * 7)):
        learner = missing_toy(method, [1, 2], [0, 9], buffer=1)
        assert learner.loss(learner.store.batch(torch.tensor([0]), 0)).item() == 1                # empty buffer
        learner.kept[:, 0], learner.seen = torch.tensor([1, 0, 0]), torch.tensor(1)
        learner.kept_output[0] = 3.5                                 # the model says 2 now: off by 1.5
        learner.strength = 0.3 if method == "derpp" else learner.strength
        assert learner.loss(learner.store.batch(torch.tensor([0]), 0)).item() == pytest.approx(expected)


def test_missing_reservoir_is_uniform_and_keeps_what_was_said():
    torch.manual_seed(0)
    count = np.zeros(30)
    for _ in range(400):
        learner = missing_toy("er", np.arange(30.0), np.zeros(30), buffer=5)
        for part in torch.arange(30).split(10):
            b = learner.store.batch(part, 0)
            learner.loss(b)
            learner.observe(b, 0)
            learner.observe(b, 1)                                    # a later epoch offers nothing again
        assert learner.seen == 30
        count[learner.kept[0].numpy()] += 1
        assert torch.equal(learner.kept_output[:, 0], learner.kept[0].float())
    assert count.sum() == 2000 and np.abs(count / 400 - 5 / 30).max() < 0.065              # 3.5 sd of 400 draws
    assert abs(count[:15].sum() - 1000) < 120                        # neither early nor late ones are favoured


def test_missing_ewc_penalty_and_fisher_by_hand():
    learner = missing_toy("ewc", [1, 2, 3], [0, 0, 0], weight=10.0)
    b = learner.store.batch(torch.tensor([0]), 0)
    assert learner.loss(b).item() == pytest.approx(1)
    learner.end(0, torch.arange(3))                                  # d|wx|/dw = x: Fisher = (1 + 4 + 9) / 3
    assert learner.fisher.item() == pytest.approx(14 / 3) and learner.anchor.item() == 1
    with torch.no_grad():
        learner.net.w.fill_(1.5)
    assert learner.loss(b).item() == pytest.approx(1.5 + 10 / 2 * 14 / 3 * 0.25)
    learner.end(1, torch.tensor([1]))                                # online: Fisher adds up, the anchor is the latest
    assert learner.anchor.item() == 1.5


def test_missing_lwf_and_icarl_by_hand():
    learner = missing_toy("lwf", [2], [0], weight=0.5)
    b = learner.store.batch(torch.tensor([0]), 0)
    learner.begin(0, None)
    assert learner.loss(b).item() == 2                               # first task: nothing to keep
    learner.end(0, None)
    learner.begin(1, None)
    with torch.no_grad():
        learner.net.w.fill_(2.0)
    assert learner.loss(b).item() == pytest.approx(4 + 0.5 * (4 - 2) ** 2)
    feature = torch.tensor([[0.0], [1.0], [4.0], [5.0]])             # mean 2.5: 1.0 and 4.0 tie, then the mean of both is exact
    assert mp.herd(feature, 2).tolist() == [1, 2] and len(mp.herd(feature, 9)) == 4
    learner = missing_toy("icarl", [1, 2, 3, 4], [0, 0, 0, 9], buffer=4)
    learner.end(0, torch.arange(3))
    assert (learner.kept[0] >= 0).sum() == 3
    learner.end(2, torch.arange(1, 4))                               # two tasks share the four places
    assert (learner.kept[1] == 0).sum() == (learner.kept[1] == 2).sum() == 2
    learner.kept[:] = torch.tensor([[1, -1, -1, -1], [0, -1, -1, -1]])
    learner.begin(2, None)
    with torch.no_grad():
        learner.net.w.fill_(2.0)                                     # new |2-0|, exemplar |4-0|, moved from 2 to 4
    b = learner.store.batch(torch.tensor([0]), 0)
    assert learner.loss(b).item() == pytest.approx(2 + 4 + learner.strength * 4)


def test_missing_distillation_of_classes():
    store = missing_toy("lwf", [1], [0]).store
    store.scoring = "classes"
    new, old = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 0.0]])
    p = np.array([0.5, 0.5])
    q = np.exp([1.0, 0.0]) / np.exp([1.0, 0.0]).sum()                # temperature 2
    assert store.distill(new, old).item() == pytest.approx(4 * (p * np.log(p / q)).sum(), rel=1e-5)


def test_missing_l2p_dualprompt_sprompts_select_per_sample():
    learner, _ = missing_learner("l2p")
    b = learner.store.batch(torch.arange(5), 0)
    with torch.no_grad():
        learner.keys[3], learner.keys[7] = learner.query(b)[0], -learner.query(b)[0]
    chosen = learner.select(b).indices
    assert chosen.shape == (5, 5) and chosen[0, 0] == 3 and 7 not in chosen[0]
    pull = learner.loss(b) - mp.Finetune.loss(learner, b)
    assert pull.item() == pytest.approx(learner.strength * (1 - learner.select(b).values).sum(-1).mean().item(), rel=1e-4)

    learner, _ = missing_learner("dualprompt")
    learner.eval()
    learner.learned[[1, 4]] = True
    with torch.no_grad():
        learner.keys[4], learner.keys[2] = learner.query(b)[0], learner.query(b)[0]        # 2 is nearer too, but not learned
    before = learner.output(b)
    with torch.no_grad():
        learner.expert[2] += 1
    assert torch.equal(before, learner.output(b))
    with torch.no_grad():
        learner.expert[4] += torch.randn_like(learner.expert[4])
    assert not torch.equal(before[0], learner.output(b)[0])

    learner, _ = missing_learner("sprompts")
    learner.eval()
    q = learner.query(b)
    learner.centres[2], learner.centres[5] = q[0] + 0.1, q[1]
    before = learner.output(b)
    with torch.no_grad():
        learner.prompts[5] += torch.randn_like(learner.prompts[5])
    assert not torch.equal(before[1], learner.output(b)[1])          # the nearest centre's task, whatever b.task says
    points = torch.tensor([[0.0, 0], [0, 2], [10, 0], [10, 2]])
    torch.manual_seed(1)
    assert sorted(mp.kmeans(points, 2)[:, 0].tolist()) in ([0.0, 10.0], [5.0, 5.0])
    assert mp.kmeans(points[:2], 5).shape == (5, 2)


def test_missing_mplmm_makes_up_only_what_is_missing():
    learner, _ = missing_learner("mplmm")
    learner.eval()
    taken = {}
    learner.net.forward = lambda x, prompts: taken.update(x=x, prompts=prompts) or torch.zeros(3, 1)
    b = learner.store.batch(torch.arange(3), 1)                      # audio and video are there, text is not
    learner.output(b)
    assert torch.allclose(taken["x"]["audio"], b.x["audio"]) and torch.allclose(taken["x"]["video"], b.x["video"])
    made = taken["x"]["text"] - b.x["text"]
    for i in range(3):
        hand = sum(b.x[m][i].mean(0) for m in ("audio", "video")) / 2 + learner.generative[2].mean(0)
        hand = F.gelu(learner.translate[2].weight @ hand + learner.translate[2].bias)
        assert torch.allclose(made[i], hand.expand_as(made[i]), atol=1e-5)
    assert taken["prompts"][:3] == [None] * 3 and torch.allclose(
        taken["prompts"][3][0], learner.kind[0, 1] + learner.kind[1, 1] + learner.kind[2, 0], atol=1e-6)


# scores, data ----------------------------------------------------------------------------------------------------


def test_missing_scores_by_hand():
    out, y = np.array([[1.0], [-2.0], [0.5], [-1.0]]), np.array([2.0, -1.0, -1.0, 0.0])
    s = metrics.affect_scores(out, y, "mosi")                        # the neutral one is left out: 2 of 3
    assert s["accuracy"] == pytest.approx(200 / 3) and s["mae"] == pytest.approx((1 + 1 + 1.5 + 1) / 4)
    assert s["corr"] == pytest.approx(np.corrcoef(out[:, 0], y)[0, 1])
    assert s["f1"] == pytest.approx(100 * (1 / 3 * 2 / 3 + 2 / 3 * 2 / 3))
    assert metrics.affect_scores(out, y, "sims")["accuracy"] == pytest.approx(75)      # zero counts as negative
    assert metrics.affect_scores(np.eye(4)[[0, 1, 2, 2]], np.array([0, 1, 2, 3]), "classes")["accuracy"] == 75
    assert math.isnan(metrics.affect_scores(np.ones((3, 1)), np.array([1.0, 2, -1]))["corr"])


def test_missing_mini_affect_is_what_it_says():
    stream = affect_stream("mini", mp.PATTERNS, seed=3)
    again, other = affect_stream("mini", mp.PATTERNS, seed=3), affect_stream("mini", mp.PATTERNS, seed=4)
    assert stream.names == ["avl", "av", "vl", "al", "a", "v", "l"]
    x, y = stream.extra["features"], stream.extra["label"]
    assert all(np.array_equal(x[m], again.extra["features"][m]) for m in MODALITIES)
    own, up = stream.tasks[0].test.rows, stream.extra["upstream"][0].rows
    assert not np.array_equal(y[own], other.extra["label"][own]) and np.array_equal(y[up], other.extra["label"][up])
    rows = [set(getattr(stream.tasks[0], k).rows) for k in ("train", "val", "test")] + [set(u.rows) for u in stream.extra["upstream"]]
    assert sum(map(len, rows)) == len(set().union(*rows)) == len(y)  # upstream and the three splits are disjoint
    assert all(np.abs(y) > 0.29) and x["text"].dtype == np.float32
    disjoint = affect_stream("mini", mp.PATTERNS, samples="disjoint")
    parts = [set(t.train.rows) for t in disjoint.tasks]
    assert sum(map(len, parts)) == len(set().union(*parts)) == data.MINI_AFFECT["train"]
    assert all(len(t.test) == data.MINI_AFFECT["test"] for t in disjoint.tasks)
    classes = affect_stream("mini4", mp.PATTERNS).extra
    assert classes["outputs"] == 4 and set(classes["label"]) == {0, 1, 2, 3} and classes["scoring"] == "classes"


def test_missing_mini_affect_tasks_contradict_each_other():
    text = data.describe_affect("mini")
    rows = {line.split()[0]: [float(x) for x in line.split()[1:]] for line in text.splitlines()[2:]}
    own, full = (np.array([rows[n][k] for n in ("avl", "av", "vl", "al", "a", "v", "l")]) for k in (0, 1))
    assert own[0] >= 90 and own[6] > own[4] > own[5]                 # all three; text alone, audio alone, video alone
    assert own.mean() - full.mean() > 8 and full[5] < 50             # video's weight has the wrong sign when it is alone


def missing_split(n, dims=(5, 4, 6), lengths=(3, 2, 4), seed=0):
    rng = np.random.default_rng(seed)
    return {k: rng.standard_normal((n, l, d)).astype(np.float32) for k, l, d in zip(("audio", "vision", "text"), lengths, dims)}


def missing_pickle(path, label="labels", change=None, protocol=4):
    content = {}
    for i, (split, n) in enumerate((("train", 6), ("valid", 4), ("test", 5))):
        y = np.random.default_rng(i).uniform(-3, 3, (n, 1, 1) if label == "labels" else n).astype(np.float32)
        content[split] = {**missing_split(n, seed=i), label: y, "id": [f"v_{j}" for j in range(n)]}
    if change:
        change(content)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(pickle.dumps(content, protocol))
    return content


@pytest.mark.parametrize("source,file,label,protocol", [
    ("mosi", "mosi_data.pkl", "labels", 2), ("mosei", "mosei_senti_data.pkl", "labels", 4),
    ("mosi", "Processed/unaligned_50.pkl", "regression_labels", 4), ("sims", "Processed/unaligned_39.pkl", "regression_labels", 5)])
def test_missing_reads_mult_and_mmsa_pickles(tmp_path, source, file, label, protocol):
    content = missing_pickle(tmp_path / file, label, protocol=protocol)
    stream = affect_stream(source, mp.PATTERNS, tmp_path)
    assert [len(getattr(stream.tasks[2], k)) for k in ("train", "val", "test")] == [6, 4, 5]
    assert stream.extra["dims"] == {"audio": 5, "video": 4, "text": 6} and stream.extra["outputs"] == 1
    assert stream.extra["scoring"] == ("sims" if source == "sims" else "mosi")
    item = stream.tasks[2].test[1]                                   # task 3: video and text
    assert np.array_equal(item["video"], content["test"]["vision"][1]) and not item["audio"].any()
    assert item["label"] == content["test"][label].reshape(-1)[1]


def test_missing_reader_cleans_checks_and_names(tmp_path):
    def spoil(c):
        c["train"]["audio"][0, 0, :2] = -np.inf
        c["test"]["text"][1, 1, 1] = np.nan
    missing_pickle(tmp_path / "mosi_data.pkl", change=spoil)
    stream = affect_stream("mosi", mp.PATTERNS, tmp_path)
    assert any("audio of train has 2 values" in n for n in stream.notes) and any("text of test has 1 values" in n for n in stream.notes)
    assert stream.extra["features"]["audio"][0, 0, 0] == 0 and all(np.isfinite(x).all() for x in stream.extra["features"].values())

    def error(change, *words):
        missing_pickle(tmp_path / "mosi_data.pkl", change=change)
        with pytest.raises(InputError) as e:
            affect_stream("mosi", mp.PATTERNS, tmp_path)
        assert "\n" not in str(e.value) and all(w in str(e.value) for w in ("mosi_data.pkl", *words)), str(e.value)
    error(lambda c: c["test"].update(audio=np.zeros((5, 3, 7))), "audio of test", "dimension 7", "expected 5")
    error(lambda c: c["valid"].update(text=np.zeros((3, 3, 6))), "text of valid", "3 rows", "expected 4")
    error(lambda c: c["train"].update(vision=np.array(["a"] * 6)), "video of train", "expected numbers")
    error(lambda c: c["train"].pop("audio"), "train has no key audio", "found vision")
    error(lambda c: c.pop("valid"), "no key valid")
    error(lambda c: c["train"]["labels"].fill(np.nan), "6 labels")
    for argument, words in (({"source": "nope"}, "--data is mini"), ({"source": "sims"}, "needs --root"),
                            ({"source": "sims", "root": tmp_path}, "unaligned_39.pkl"), ({"source": "mini", "samples": "x"}, "shared or disjoint")):
        with pytest.raises(InputError, match=words):
            affect_stream(patterns=mp.PATTERNS, **argument)


class MissingEvil:
    def __reduce__(self):
        return os.system, ("touch pwned",)


@pytest.mark.parametrize("protocol", [0, 2, 4])
def test_missing_malicious_and_broken_pickles_are_refused(tmp_path, monkeypatch, protocol):
    monkeypatch.chdir(tmp_path)
    Path("mosi_data.pkl").write_bytes(pickle.dumps({"train": MissingEvil()}, protocol))
    with pytest.raises(InputError, match="refused: it asks for .*system"):
        affect_stream("mosi", mp.PATTERNS, tmp_path)
    assert not Path("pwned").exists()
    for payload in (b"cbuiltins\neval\n(S'1'\ntR.", b"cnumpy\nload\n.", b"cnumpy.testing._private.utils\nruncode\n."):
        Path("x.pkl").write_bytes(payload)
        with pytest.raises(InputError, match="refused"):
            data.read_pickle("x.pkl")
    good = pickle.dumps({"a": np.arange(3.0), "b": [np.float32(1), {"c": ("x", 2)}], "o": np.array(["s", None], object)}, protocol)
    Path("x.pkl").write_bytes(good)
    assert data.read_pickle("x.pkl")["a"].tolist() == [0, 1, 2]
    Path("x.pkl").write_bytes(good[:-9])
    with pytest.raises(InputError, match="not a complete pickle"):
        data.read_pickle("x.pkl")


def test_missing_reads_iemocap(tmp_path):
    content = {}
    for split, n in (("train", 8), ("valid", 4), ("test", 4)):
        y = np.zeros((n, 4, 2))
        y[np.arange(n), :, 0] = 1
        y[np.arange(n), np.arange(n) % 4] = (0, 1)
        content[split] = {**missing_split(n), "labels": y}
    (tmp_path / "iemocap_data.pkl").write_bytes(pickle.dumps(content))
    extra = affect_stream("iemocap", mp.PATTERNS, tmp_path).extra
    assert extra["outputs"] == 4 and extra["label"][:8].tolist() == [0, 1, 2, 3] * 2


def test_missing_reads_iemocap_h5(tmp_path):
    h5py = pytest.importorskip("h5py")
    rng, names = np.random.default_rng(0), [f"Ses01_{i}" for i in range(12)]
    for file, dim, longest in (("A/comparE.h5", 130, 400), ("V/denseface.h5", 342, 50), ("L/bert_large.h5", 1024, 22)):
        (tmp_path / file).parent.mkdir(exist_ok=True)
        with h5py.File(tmp_path / file, "w") as f:
            for i, k in enumerate(names):
                f[k] = rng.standard_normal((longest - i, dim)).astype(np.float32) + 5
    with h5py.File(tmp_path / "A/comparE_mean_std.h5", "w") as f:
        f["2/mean"], f["2/std"] = np.full(130, 5.0), np.zeros(130) + 2
    folder = tmp_path / "target/2"
    folder.mkdir(parents=True)
    for k, part in (("trn", slice(0, 6)), ("val", slice(6, 9)), ("tst", slice(9, 12))):
        np.save(folder / f"{k}_label.npy", np.eye(4)[np.arange(12)[part] % 4])
        np.save(folder / f"{k}_int2name.npy", np.array([[n.encode()] for n in names[part]]))
    stream = affect_stream("iemocap", mp.PATTERNS, tmp_path, fold=1)
    assert stream.extra["dims"] == {"audio": 130, "video": 342, "text": 1024} and stream.extra["outputs"] == 4
    assert stream.extra["lengths"] == {"audio": 50, "video": 50, "text": 22}
    assert abs(stream.extra["features"]["audio"][:, :30].mean()) < 0.05                  # z-scored
    with pytest.raises(InputError, match="cross-validation set 1"):
        affect_stream("iemocap", mp.PATTERNS, tmp_path, fold=0)


def test_missing_reads_npz(tmp_path):
    rng, path = np.random.default_rng(0), tmp_path / "own.npz"
    x = {"audio": rng.standard_normal((12, 7)), "video": rng.standard_normal((12, 1, 3)), "text": rng.standard_normal((12, 120, 4))}
    np.savez(path, **x, label=np.linspace(-3, 3, 12), fold=np.arange(12) % 4)
    stream = affect_stream(str(path), mp.PATTERNS, fold=3, max_length=50)
    assert [len(getattr(stream.tasks[0], k)) for k in ("train", "val", "test")] == [6, 3, 3]
    assert stream.extra["lengths"] == {"audio": 1, "video": 1, "text": 50}
    y = stream.extra["label"]
    assert np.allclose(y[stream.tasks[0].test.rows], np.linspace(-3, 3, 12)[3::4])
    assert np.allclose(y[stream.tasks[0].val.rows], np.linspace(-3, 3, 12)[0::4])        # the next fold, around the corner
    mean = x["text"][3].mean(0)                                      # windows of 2 and 3 steps, weighted by their length
    width = np.diff(np.linspace(0, 120, 51).astype(int))[:, None]
    assert np.allclose((stream.tasks[0].test[0]["text"] * width).sum(0) / 120, mean, atol=1e-5)
    np.savez(path, **x, label=np.arange(12) % 3, split=np.array(["train"] * 6 + ["valid"] * 3 + ["test"] * 3))
    stream = affect_stream(str(path), mp.PATTERNS)
    assert stream.extra["outputs"] == 3 and stream.extra["scoring"] == "classes" and len(stream.tasks[6].train) == 6
    for change, words in (({"fold": np.zeros(12, int)}, "three or more"), ({}, "no key split or fold"),
                          ({"fold": np.arange(11)}, "11 entries"), ({"split": np.zeros(12, int)}, "no val utterances")):
        np.savez(path, **x, label=np.zeros(12), **change)
        with pytest.raises(InputError, match=words):
            affect_stream(str(path), mp.PATTERNS)
    np.savez(path, **{**x, "text": np.array([None] * 12)}, label=np.zeros(12), fold=np.arange(12) % 4)
    with pytest.raises(InputError, match="plain arrays"):            # object arrays would need pickle
        affect_stream(str(path), mp.PATTERNS)


# runs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["prompts", "derpp"])
def test_missing_resume_gives_the_same_matrix(tmp_path, monkeypatch, method):
    a = missing_args("--method", method)
    stream = affect_stream("mini", a.patterns, world=MISSING_WORLD)
    whole = mp.run_one(a, 0, 0, tmp_path / "whole", stream)
    a.resume = True
    real, calls = metrics.Run.checkpoint, itertools.count(1)

    def stop(self, **state):
        real(self, **state)
        if next(calls) in (3, 8):                                    # in the middle of task 2, after task 4
            raise KeyboardInterrupt
    monkeypatch.setattr(metrics.Run, "checkpoint", stop)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            mp.run_one(a, 0, 0, tmp_path / "parts", stream)
    parts = mp.run_one(a, 0, 0, tmp_path / "parts", stream)
    assert parts["matrix"] == whole["matrix"] and parts["metrics"] == whole["metrics"]
    log = [(tmp_path / d / "log.jsonl").read_text().splitlines() for d in ("whole", "parts")]
    assert [json.loads(x)["loss"] for x in log[0]] == [json.loads(x)["loss"] for x in log[1]] and len(log[0]) == 14
    A = np.array(whole["matrix"], float)
    assert np.isnan(A[np.triu_indices(7, 1)]).all() and whole["metrics"]["AA"] == pytest.approx(np.mean(A[-1]))
    with pytest.raises(InputError, match="other arguments: lr"):
        mp.run_one(argparse.Namespace(**{**vars(a), "lr": 0.5}), 0, 0, tmp_path / "parts", stream)


def test_missing_run_leaves_everything_and_prompts_load_again(tmp_path):
    from safetensors.torch import load_file
    a = missing_args("--order", "6", "5", "4", "3", "2", "1", "0")
    stream = affect_stream("mini", a.patterns, world=MISSING_WORLD)
    r = mp.run_one(a, 0, 0, tmp_path, stream)
    for name in ("results.json", "matrix.csv", "matrix.png", "log.jsonl", "prompts.safetensors", "checkpoint.pt", "task_aware_cosine.png"):
        assert (tmp_path / name).stat().st_size > 0
    assert r["tasks"] == ["l", "v", "a", "al", "vl", "av", "avl"] and r["trainable"] == 3 * 4 * 30 + 60 + 7 * 4 * 30
    saved = load_file(tmp_path / "prompts.safetensors")
    prompts = mp.MissingPrompts(30, 4, layers=3)
    prompts.load_state_dict({k.removeprefix("prompts."): v for k, v in saved.items()})
    net, _ = mp.pretrain(a, stream, torch.device("cpu"))
    net.eval()
    store, t, rows = mp.Store(stream, a.patterns), 0, torch.as_tensor(stream.tasks[0].test.rows)
    with torch.no_grad():
        output = net(net.embed(store.batch(rows, t).x), prompts.attach(t))
    assert metrics.affect_scores(output.numpy(), stream.extra["label"][rows])["accuracy"] == pytest.approx(r["matrix"][-1][-1])
    assert r["final"]["avl"]["accuracy"] == pytest.approx(r["matrix"][-1][-1])


def test_missing_joint_sees_all_tasks_and_nonfinite_loss_stops(tmp_path, monkeypatch):
    a = missing_args("--method", "joint", "--epochs", "1")
    stream = affect_stream("mini", a.patterns, world=MISSING_WORLD)
    seen = set()
    real = mp.Joint.loss
    monkeypatch.setattr(mp.Joint, "loss", lambda self, b: seen.update(zip(b.rows.tolist(), b.task.tolist())) or real(self, b))
    r = mp.run_one(a, 0, 0, tmp_path, stream)
    assert len(seen) == 24 * 7 and set(r["metrics"]) == {"AA"}
    monkeypatch.setattr(mp.Joint, "loss", lambda self, b: real(self, b) * math.nan)
    with pytest.raises(InputError, match="loss is nan in task all, epoch 1, step 1 at --lr"):
        mp.run_one(a, 0, 0, tmp_path / "nan", stream)


def test_missing_table_continues_and_says_not_run(tmp_path, monkeypatch):
    a = missing_args("--table", "4", "--smoke", "--epochs", "1")
    monkeypatch.setattr(mp, "SMOKE_WORLD", MISSING_WORLD)
    monkeypatch.setitem(mp.TABLES, "4", ("short", "default", [row for row in mp.TABLES["4"][2] if row[0] in ("without L_con", "default")]))
    real, calls = mp.run_one, []

    def once(*x):
        if calls:
            raise KeyboardInterrupt
        calls.append(1)
        return real(*x)
    monkeypatch.setattr(mp, "run_one", once)
    with pytest.raises(KeyboardInterrupt):
        mp.run_table(a, tmp_path)
    assert "not run" in (tmp_path / "table4.md").read_text()
    counted = []
    monkeypatch.setattr(mp, "run_one", lambda *x: counted.append(1) or real(*x))
    mp.run_table(a, tmp_path)
    text = (tmp_path / "table4.md").read_text()
    assert len(counted) == 1 and "not run" not in text and "70.91" in text and "1/1" in text
    assert json.loads((tmp_path / "table4.json").read_text())["rows"][0]["runs"] == [[0, 0]]
    assert [len(mp.TABLES[k][2]) for k in ("3", "4", "5", "6", "fig5")] == [8, 2, 6, 4, 8]


@pytest.mark.parametrize("argv,words", [
    (["--order", "0", "1"], "--order needs each of 0 1 2 3 4 5 6"), (["--sequence", "MS", "MS", "TA"], "--sequence needs each"),
    (["--start", "4"], "need 7 layers"), (["--epochs", "-1"], "--epochs must be positive"), (["--width", "31"], "must divide"),
    (["--data", "nope"], "--data is mini"), (["--init-std", "0"], "must be positive"), (["--seeds", "1", "1"], "must not repeat")])
def test_missing_bad_input_is_one_line(argv, words, capsys, tmp_path):
    with pytest.raises(SystemExit) as e:
        metrics.run_cli(lambda: mp.main([*argv, "--smoke", "--device", "cpu", "--out", str(tmp_path / "x")]))
    error = capsys.readouterr().err
    assert e.value.code == 2 and words in error and "Traceback" not in error and len(error.strip().splitlines()) == 1


@pytest.mark.parametrize("flags", [
    ["--length", "7"], ["--prompts", "MS"], ["--sequence", "TS", "MS", "TA"], ["--depths", "2", "1", "0"], ["--keep"],
    ["--keys", "modality"], ["--init-std", "0.5"], ["--pairs", "first"], ["--trade-off", "2"], ["--tau", "0.2"], ["--gamma", "1"],
    ["--layers", "4"], ["--fusion-layers", "2"], ["--heads", "3"], ["--width", "20"], ["--backbone", "mult"], ["--data", "mini4"]])
def test_missing_every_model_flag_changes_the_loss(flags):
    loss = []
    for extra in ([], flags):
        learner, _ = missing_learner("prompts", *extra)
        learner.eval()
        loss.append(learner.loss(learner.store.batch(torch.arange(4), 2)).item())
    assert abs(loss[0] - loss[1]) > 1e-6


def test_missing_every_flag_is_read():
    source = (HERE / "missing_prompt.py").read_text()
    listed = source[source.index("def resolve"):source.index("def main")]
    for name in vars(mp.arguments([])):
        assert source.count(f"a.{name}") > listed.count(f"a.{name}") or f"{name} " in source[source.index("def pretrain"):][:900], name


def test_missing_bf16_disjoint_and_mult_run(tmp_path):
    a = missing_args("--dtype", "bf16", "--samples", "disjoint", "--backbone", "mult", "--epochs", "1", "--batch", "8")
    stream = affect_stream("mini", a.patterns, samples="disjoint", world=MISSING_WORLD)
    r = mp.run_one(a, 0, 0, tmp_path, stream)
    assert np.isfinite(np.array(r["matrix"], float)[np.tril_indices(7)]).all()


def test_missing_smoke_as_a_user_runs_it(tmp_path):
    done = subprocess.run([sys.executable, str(HERE / "missing_prompt.py"), "--smoke", "--out", "run"], cwd=tmp_path, text=True,
                          capture_output=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    last = done.stdout.strip().splitlines()[-1]
    assert last.startswith("prompts on mini: AA ") and "FM_max" in last and "MiB" in last
    assert json.loads((tmp_path / "run/results.json").read_text())["task_aware_cosine"]
