"""Every equation against plain loops in float64, every metric on worked numbers, every reader on good and broken files, every script
end to end.  pytest -q test_all.py"""
import ast
import json
import math
import os
import random
import re
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn

import data
import metrics
import mmprompt
from data import InputError

HERE = Path(__file__).resolve().parent
torch.set_num_threads(1)                                           # tiny tensors: a second thread only waits


@pytest.fixture(scope="session", autouse=True)
def _cache(tmp_path_factory):
    """Small backbones made by the tests are kept for this session only."""
    os.environ["MMPROMPTS_CACHE"] = str(tmp_path_factory.mktemp("cache"))


def script(*words, ok=True, timeout=280):
    """Run a script as a user does.  Returns (exit code, stdout, stderr)."""
    done = subprocess.run([sys.executable, *map(str, words)], cwd=HERE, capture_output=True, text=True, timeout=timeout)
    assert not ok or done.returncode == 0, done.stderr[-2000:]
    return done.returncode, done.stdout, done.stderr


def one_clear_line(words, *parts):
    """The script ends with exit code 2 and one line on stderr that holds every part; no traceback."""
    code, _, err = script(*words, ok=False)
    lines = [line for line in err.replace("\r", "\n").splitlines() if line.strip() and "it/s" not in line]
    assert code == 2 and "Traceback" not in err, err
    assert lines[-1].startswith("error: "), err
    for part in parts:
        assert str(part) in lines[-1], (part, lines[-1])


# ===================================================================================================== metrics.py
A3 = [[80, math.nan, math.nan], [85, 90, math.nan], [75, 95, 60]]


def test_five_published_codes_of_forgetting_give_five_values():
    """Ours is 2.5 (best earlier score, as MM-Prompt's code) and -BWT 0.0 ("own"); the other published readings are worked here."""
    A = np.array(A3)
    assert metrics.forgetting(A) == pytest.approx(((85 - 75) + (90 - 95)) / 2) == 2.5
    assert metrics.forgetting(A, "own") == pytest.approx(((80 - 75) + (90 - 95)) / 2) == 0.0
    with_last = np.mean([np.nanmax(A[:, i]) - A[-1, i] for i in range(2)])
    adjacent = np.mean([np.mean([A[t - 1, i] - A[t, i] for t in range(i + 1, 3)]) for i in range(2)])
    assert (with_last, adjacent) == (5.0, -1.25) and with_last != metrics.forgetting(A) != adjacent


def test_matrix_metrics_by_hand_and_pure():
    A = np.array(A3)
    before = A.copy()
    assert metrics.average_accuracy(A) == pytest.approx((75 + 95 + 60) / 3)
    assert metrics.last(A).tolist() == [75, 95, 60]
    assert metrics.avg(A).tolist() == [80, 95]                       # (85+75)/2, 95: the diagonal is left out
    assert metrics.backward_transfer(A).tolist() == [-5, 0]          # 80-85; ((80-75)+(90-95))/2
    assert metrics.mean_accuracy(A) == pytest.approx([87.5, 230 / 3])
    assert metrics.forgetting([[50.0]]) == 0.0
    np.testing.assert_array_equal(A, before)
    assert metrics.intra_forgetting([A, [[10, math.nan], [4, 7]]]) == pytest.approx((2.5 + 6) / 2)
    for bad in ([[1, 2]], [[1, 2], [math.nan, 3]], [1, 2]):
        with pytest.raises(ValueError):
            metrics.average_accuracy(bad)
    with pytest.raises(ValueError):
        metrics.forgetting(A, "best")


def test_best_own_uses_rows_before_the_task_when_they_are_known():
    A = [[80, 70, 0], [85, 60, 0], [75, 50, 60]]                     # future tasks evaluated: row 0 knows task 1
    assert metrics.forgetting(A, "own") == pytest.approx(((80 - 75) + (70 - 50)) / 2)


def test_merge_effectiveness_and_modality_difference():
    assert metrics.merge_effectiveness(60, 35, 42) == pytest.approx(18)                          # Eq. 12
    assert metrics.modality_difference([35, 10], [42, 8]) == pytest.approx([7, 2])               # Eq. 13


@pytest.mark.parametrize("text, want", [
    ("The Dogs.", "dogs"), ("two", "2"), ("a  man", "man"), ("dont", "don't"), ("1,000", "1000"), ("3.5", "3.5"),
    ("t-shirt", "t shirt"), ("yes!", "yes"), ("None", "0"), ("its", "its"), ("hot dog ", "hot dog"), ("\n", "")])
def test_answer_normalisation(text, want):
    assert metrics.normalize_answer(text) == want


@pytest.mark.parametrize("hits, want", [(0, 0), (1, .3), (2, .6), (3, .9), (4, 1), (10, 1)])
def test_vqa_accuracy_is_the_mean_over_nine_of_ten(hits, want):
    answers = ["red"] * hits + [f"other{i}" for i in range(10 - hits)]
    by_hand = np.mean([min(1, sum(a == "red" for j, a in enumerate(answers) if j != i) / 3) for i in range(10)])
    assert metrics.vqa_accuracy("Red", answers) == pytest.approx(by_hand) == pytest.approx(want)


def test_token_f1_and_exact_match():
    assert metrics.token_f1("the red ball", "red balloon") == pytest.approx(0.5)
    assert metrics.token_f1("", "x") == 0 and metrics.exact_match(" Cat", "cat") == 1


def test_paired_sign_flip_by_enumeration():
    out = metrics.paired([3, 4, 5], [1, 3, 6])                       # differences 2, 1, -1: sum 2; |sum| >= 2 in 6 of 8 flips
    assert out["difference"] == pytest.approx(2 / 3) and out["wins"] == 2 and out["p"] == pytest.approx(6 / 8)
    assert metrics.mean_std([1, 3]) == (2, pytest.approx(math.sqrt(2)))


def test_atomic_write_keeps_the_old_file_when_interrupted(tmp_path):
    path = tmp_path / "results.json"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), metrics.atomic(path) as f:
        f.write("half")
        raise KeyboardInterrupt
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["results.json"]


def test_heat_map_draws_each_cell(tmp_path):
    from PIL import Image
    metrics.heat_map(A3, tmp_path / "m.png", ["a", "b", "c"], ["a", "b", "c"])
    picture = np.asarray(Image.open(tmp_path / "m.png"))
    left, row = 12 + 7, lambda i: 54 + 26 * i + 3
    assert (picture[row(0), left + 46 + 3] == 255).all() and (picture[row(0), left + 3] != 255).any()   # nan white, 80 blue


# ================================================================================= mmprompt.py: equations against plain loops


def loop_attention(layer, query, key, mask=None):
    """Multi-head attention with the weights of an nn.MultiheadAttention, one sample, head and token at a time."""
    D, H = layer.embed_dim, layer.num_heads
    W, b = layer.in_proj_weight, layer.in_proj_bias
    d, rows = D // H, []
    for x in query:
        heads = []
        for h in range(H):
            part = slice(h * d, (h + 1) * d)
            q = (W[:D] @ x + b[:D])[part]
            k = [(W[D:2 * D] @ y + b[D:2 * D])[part] for y in key]
            v = [(W[2 * D:] @ y + b[2 * D:])[part] for y in key]
            s = [torch.exp((q @ kj) / math.sqrt(d)) * (1.0 if mask is None else float(mask[j])) for j, kj in enumerate(k)]
            heads.append(sum(sj / sum(s) * vj for sj, vj in zip(s, v)))
        rows.append(layer.out_proj.weight @ torch.cat(heads) + layer.out_proj.bias)
    return torch.stack(rows)


def loop_encoder(layer, x):
    """A transformer encoder layer with norm first, from its weights."""
    norm = lambda n, v: torch.stack([(r - r.mean()) / torch.sqrt(((r - r.mean()) ** 2).mean() + n.eps) * n.weight + n.bias for r in v])
    y = norm(layer.norm1, x)
    x = x + loop_attention(layer.self_attn, y, y)
    y = norm(layer.norm2, x)
    return x + torch.stack([layer.linear2.weight @ (layer.linear1.weight @ r + layer.linear1.bias).clamp(min=0) + layer.linear2.bias
                            for r in y])


@pytest.fixture
def double():
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(1)
    yield
    torch.set_default_dtype(torch.float32)


def shake(module):
    """Random weights everywhere, so that no term hides behind a zero or an identity."""
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.randn_like(p) * 0.3)
    return module


def tokens(B=3, Nq=5, Nv=4, D=8):
    q_mask = torch.ones(B, Nq, dtype=torch.bool)
    v_mask = torch.ones(B, Nv, dtype=torch.bool)
    q_mask[0, 3:] = v_mask[1, 2:] = False
    return torch.randn(B, Nq, D), torch.randn(B, Nv, D), q_mask, v_mask


def test_eq1_cross_modal_query(double):
    layer = shake(mmprompt.CrossModalQuery(8, 2))
    F_q, F_v, q_mask, v_mask = tokens()
    got = layer(F_q, F_v, q_mask, v_mask)
    for b in range(3):
        for M, own, other, m_own, m_other in (("Q", F_q, F_v, q_mask, v_mask), ("V", F_v, F_q, v_mask, q_mask)):
            seen = loop_attention(layer.attend[M], own[b], other[b], m_other[b]) + own[b]
            real = [seen[i] for i in range(len(seen)) if m_own[b, i]]
            torch.testing.assert_close(got[M][b], layer.w[M] * sum(real) / len(real))


def test_eq2_eq3_selection_weights_and_pull(double):
    pool = shake(mmprompt.PromptPool(8, 7, length=3, top_k=3, temperature=0.7))
    q = torch.randn(4, 8, requires_grad=True)
    p, pull, chosen = pool(q)
    want_pull = 0.0
    for b in range(4):
        cos = [float(q[b] @ k / (q[b].norm() * k.norm())) for k in pool.keys]
        best = sorted(range(7), key=lambda i: -cos[i])[:3]
        assert chosen[b].tolist() == best
        e = [math.exp(cos[i] / 0.7) for i in best]
        torch.testing.assert_close(p[b], sum(w / sum(e) * pool.prompts[i] for w, i in zip(e, best)))
        want_pull += sum(1 - cos[i] for i in best) / 4
    assert float(pull) == pytest.approx(want_pull)
    pull.backward(retain_graph=True)
    assert q.grad is None and pool.keys.grad.abs().sum() > 0         # L_qk moves keys, never queries
    (p ** 2).sum().backward()
    assert q.grad.abs().sum() > 0                                    # the task loss does reach the query, through Eq. 3
    unused = sorted(set(range(7)) - set(chosen.flatten().tolist()))
    assert all((pool.prompts.grad[i] == 0).all() for i in unused)


@pytest.mark.parametrize("granularity, shape", [("token", (200, 6, 1)), ("feature", (200, 6, 8))])
def test_eq4_one_mask_for_both_modalities_in_training_only(granularity, shape):
    torch.manual_seed(0)
    layer = mmprompt.CrossModalRecovery(8, 2, mask_ratio=0.25, mask_granularity=granularity)
    p = {"Q": torch.randn(200, 6, 8), "V": torch.randn(200, 6, 8)}
    out = layer.train().hide(p)
    gone = {M: out[M] == 0 for M in "QV"}
    assert (gone["Q"] == gone["V"]).all()
    if granularity == "token":
        assert (gone["Q"].all(-1) == gone["Q"].any(-1)).all()        # whole tokens
    assert abs(gone["Q"].float().mean() - 0.25) < 0.05
    torch.testing.assert_close(out["Q"][~gone["Q"]], p["Q"][~gone["Q"]])
    assert layer.eval().hide(p) is p


def loop_recovery(layer, p, hidden):
    """Eq. 5-10 one sample at a time.  hidden (B,L) bool.  Returns p_final, L_intra, L_inter."""
    B, L, D = p["Q"].shape
    final = {M: [] for M in "QV"}
    intra = inter = 0.0
    for b in range(B):
        x = {}
        for M, N in (("Q", "V"), ("V", "Q")):
            masked = torch.stack([torch.zeros(D) if hidden[b, i] else p[M][b, i] for i in range(L)])
            x[M] = loop_encoder(layer.intra[M], masked) + 0.1 * torch.stack([layer.W_res[M] @ p[N][b, i] for i in range(L)])
            intra += ((x[M] - p[M][b]) ** 2).sum() / (B * L * D)
        views = {}
        for M, N in (("Q", "V"), ("V", "Q")):
            y = loop_attention(layer.inter[M], x[M], p[N][b]) + x[M]
            g = torch.stack([1 / (1 + torch.exp(-layer.W_g[M].weight @ torch.cat([y[i], p[N][b, i]]).clamp(min=0))) for i in range(L)])
            z = (1 - g) * y + g * loop_encoder(layer.refine[M], y)
            final[M].append(z)
            views[M] = sum(loop_attention(layer.inter[M], z, p[N][b])) / L
        inter += (1 - views["Q"] @ views["V"] / (views["Q"].norm() * views["V"].norm())) / B
    for M in "QV":
        WWt = layer.W_res[M] @ layer.W_res[M].T
        intra += sum((WWt[i, j] - float(i == j)) ** 2 for i in range(D) for j in range(D)) / D
    return {M: torch.stack(final[M]) for M in "QV"}, intra, inter


@pytest.mark.parametrize("masked", [False, True])
def test_eq5_to_eq10_recovery(double, masked):
    layer = shake(mmprompt.CrossModalRecovery(8, 2, mask_ratio=0.4))
    p = {M: torch.randn(3, 4, 8, requires_grad=True) for M in "QV"}
    hidden = torch.rand(3, 4) < 0.4 if masked else torch.zeros(3, 4, dtype=torch.bool)
    layer.hide = lambda p: {M: p[M].masked_fill(hidden[..., None], 0.0) for M in "QV"}
    got, intra, inter = layer(p)
    want, want_intra, want_inter = loop_recovery(layer, p, hidden)
    for M in "QV":
        torch.testing.assert_close(got[M], want[M])
    torch.testing.assert_close(intra, want_intra)
    torch.testing.assert_close(inter, want_inter)


def test_eq6_target_is_a_constant_and_recovery_learns(double):
    layer = shake(mmprompt.CrossModalRecovery(8, 2)).eval()
    p = {M: torch.randn(2, 4, 8, requires_grad=True) for M in "QV"}
    layer(p)[1].backward()
    # by hand: the gradient of the same loss with the target replaced by numbers
    twin = {M: p[M].detach().clone().requires_grad_() for M in "QV"}
    numbers = {M: p[M].detach() for M in "QV"}
    x = {M: layer.intra[M](twin[M]) + 0.1 * twin[N] @ layer.W_res[M].T for M, N in (("Q", "V"), ("V", "Q"))}
    sum(((x[M] - numbers[M]) ** 2).mean() for M in "QV").backward()
    for M in "QV":
        torch.testing.assert_close(p[M].grad, twin[M].grad)
    assert all(q.grad is not None and q.grad.abs().sum() > 0 for M in "QV" for q in layer.intra[M].parameters())


def test_eq6_vector_form(double):
    w = torch.randn(6)
    full = ((torch.outer(w, w) - torch.eye(6)) ** 2).sum()
    assert float(mmprompt.orthogonality(w) * 6 + 5) == pytest.approx(float(full))                # (|w|^2-1)^2 + D-1


def test_eq10_is_blind_to_the_prompts_at_length_one_only(double):
    for L, alive in ((1, False), (4, True)):
        layer = shake(mmprompt.CrossModalRecovery(8, 2)).eval()
        layer({M: torch.randn(2, L, 8) for M in "QV"})[2].backward()
        moved = sum(float(q.grad.abs().sum()) for q in layer.refine.parameters() if q.grad is not None)
        assert (moved > 1e-12) == alive, L


def test_eq8_gate_ends(double):
    layer = shake(mmprompt.CrossModalRecovery(8, 2)).eval()
    p = {M: torch.rand(2, 4, 8) for M in "QV"}
    x = {M: layer.intra[M](p[M]) + 0.1 * p[mmprompt.OTHER[M]] @ layer.W_res[M].T for M in "QV"}
    inter = {M: layer.cross(M, x[M], p) + x[M] for M in "QV"}
    for M in "QV":
        layer.W_g[M].weight.data.zero_()
    got = layer(p)[0]                                                # g = sigmoid(0) = 1/2 everywhere
    for M in "QV":
        torch.testing.assert_close(got[M], (inter[M] + layer.refine[M](inter[M])) / 2)


def test_eq11_total():
    one = torch.tensor
    assert float(mmprompt.total_loss(one(1.0), {"qk": one(2.0), "intra": one(10.0), "inter": one(100.0)},
                                     {"qk": 1.0, "intra": 0.3, "inter": 1.5})) == pytest.approx(1 + 2 + 3 + 150)
    method = mmprompt.MMPrompt(16, 2, alpha=0.7, beta=0.2, qk_weight=0.05)
    assert method.weights == {"qk": 0.05, "inter": 0.7, "intra": 0.2}


def test_method_sums_types_and_orders_question_first():
    torch.manual_seed(0)
    method = mmprompt.MMPrompt(16, 2, length=4, pool_sizes={"QG": 6, "QE": 7, "VG": 8, "VE": 9}).eval()
    F_q, F_v, q_mask, v_mask = tokens(D=16)
    out = method(F_q, F_v, q_mask, v_mask)
    q = method.query(F_q, F_v, q_mask, v_mask)
    losses = {"qk": 0, "intra": 0, "inter": 0}
    for G in "GE":
        parts = {M: method.pools[M + G](q[M]) for M in "QV"}
        final, intra, inter = method.recovery[G]({M: parts[M][0] for M in "QV"})
        torch.testing.assert_close(out.prompts[G], torch.cat([final["Q"], final["V"]], 1))
        losses = {"qk": losses["qk"] + parts["Q"][1] + parts["V"][1], "intra": losses["intra"] + intra, "inter": losses["inter"] + inter}
    assert out.prompts["E"].shape == (3, 8, 16)
    for k, v in losses.items():
        torch.testing.assert_close(out.losses[k], v)
    # isolated prompts: the mixture of the pool goes in as it is
    plain = mmprompt.MMPrompt(16, 2, length=4, use_query=False, use_intra=False, use_inter=False)
    out = plain(F_q, F_v, q_mask, v_mask)
    torch.testing.assert_close(out.prompts["G"][:, :4], plain.pools["QG"](mmprompt.masked_mean(F_q, q_mask))[0])


# -------------------------------------------------------------------------------------------- mmprompt.py: backbone and methods


def tiny_t5(D=16, blocks=6):
    from transformers import T5Config, T5ForConditionalGeneration
    torch.manual_seed(0)
    return T5ForConditionalGeneration(T5Config(vocab_size=mmprompt.MINI_VOCAB, d_model=D, d_kv=8, d_ff=32, num_heads=2, num_layers=blocks,
                                               num_decoder_layers=2, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0))


def tiny_model(D=16):
    pictures = lambda image: (torch.full((2 + image % 3, 5), float(image) / 7), torch.tensor([[0, 0, .5, .5]] * (2 + image % 3)))
    torch.manual_seed(0)
    return mmprompt.VQABackbone(tiny_t5(D), mmprompt.mini_tokenizer(), mmprompt.VisualEmbedding(5, D), pictures, max_answer=3)


def asked(n=6):
    questions = ["what is this", "where is the cat in the picture", "how many dog are there", "is this a bus", "why", "what color is the tie"]
    return [data.Sample(i, i, questions[i % 6], ("red", "cat", "two", "no", "lost", "white")[i % 6:i % 6 + 1], "color", "cat") for i in range(n)]


def arguments(method, **more):
    args = mmprompt.build_parser().parse_args([])
    for k, v in {**mmprompt.method_defaults(method), "method": method, "device": "cpu", "train_vision": "never", "pool_sizes": [6, 7, 8, 9],
                 "top_k": 2, "length": 4, "heads": 2, "epochs": 1, "batch": 4, "quiet": True, **more}.items():
        setattr(args, k, v)
    return args


def test_encoder_without_prompts_is_t5(double):
    model = tiny_model()
    ids, mask = model.tokens(["what color is the cat", "why"], 20)
    F_q = model.t5.get_input_embeddings()(ids)
    nothing = torch.zeros(2, 0, 16), torch.zeros(2, 0, dtype=torch.bool)
    hidden, _, _ = model.encode(F_q, nothing[0], mask, nothing[1])
    want = model.t5.encoder(input_ids=ids, attention_mask=mask.long()).last_hidden_state
    torch.testing.assert_close(hidden[mask], want[mask])


def test_injection_appends_for_its_block_and_drops_again(double):
    """Against a pass by hand: block by block, prompts of every block computed as extra tokens with zero position bias."""
    model = tiny_model()
    F_q, F_v, q_mask, v_mask = tokens(D=16)
    method = mmprompt.MMPrompt(16, 2, length=4, top_k=2).eval()
    method.keep = False
    hidden, mask, out = model.encode(F_q, F_v, q_mask, v_mask, method)
    assert hidden.shape == (3, 9, 16) and mask.shape == (3, 9)
    blocks = model.t5.encoder.block
    relative = blocks[0].layer[0].SelfAttention.compute_bias(5, 5)
    for b in range(3):
        keep = torch.cat([q_mask[b], v_mask[b]])
        h = torch.cat([F_q[b], F_v[b]])[keep][None]
        n, nq = int(keep.sum()), int(q_mask[b].sum())
        for i, block in enumerate(blocks):
            p = out.prompts["G"][b:b + 1] if i in (1, 2) else out.prompts["E"][b:b + 1] if i in (3, 4, 5) else h[:, :0]
            x = torch.cat([h, p], 1)
            bias = torch.zeros(1, 2, x.shape[1], x.shape[1])
            bias[:, :, :nq, :nq] = relative[:, :, :nq, :nq]
            h = block(x, position_bias=bias)[0][:, :n]
        torch.testing.assert_close(hidden[b][keep], model.t5.encoder.final_layer_norm(h)[0])
    method.keep = True
    assert model.encode(F_q, F_v, q_mask, v_mask, method)[0].shape == (3, 9 + 5 * 8, 16)


@pytest.mark.parametrize("name", [m for m in mmprompt.METHODS if m not in ("none", "finetune", "joint")])
def test_padding_and_batch_mates_change_nothing(name):
    model = tiny_model()
    method = mmprompt.build_method(arguments(name), 16, 3).eval()
    if hasattr(method, "begin_task"):
        method.begin_task(2)
    samples = asked()
    together, mask, _ = model.encode(*model.embed(samples), method)
    again, _, _ = model.encode(*model.embed(samples), method)
    assert torch.equal(together[mask], again[mask])                  # evaluation is deterministic, memo or not
    for i, s in enumerate(samples):
        alone, alone_mask, _ = model.encode(*model.embed([s]), method)
        torch.testing.assert_close(together[i][mask[i]], alone[0][alone_mask[0]], atol=1e-5, rtol=1e-4)
        assert model.answer(alone, alone_mask) == model.answer(together, mask)[i:i + 1]


@pytest.mark.parametrize("name", [m for m in mmprompt.METHODS if m != "none"])
def test_gradient_reaches_all_that_learns_and_the_frozen_stays_bit_identical(name):
    model = tiny_model()
    torch.manual_seed(0)
    method = mmprompt.build_method(arguments(name, mask_ratio=0.3), 16, 2)
    learner = mmprompt.Learner(arguments(name), model, method)
    learner.begin(0)
    learning = learner.trainable()
    frozen = {k: p.clone() for k, p in model.named_parameters() if f"model.{k}" not in learning}
    start = {k: p.detach().clone() for k, p in learning.items()}
    bar = Namespace(set_postfix_str=lambda *_: None, update=lambda *_: None)
    for step in range(6):
        learner.epoch(asked(12), [], f"{step}", "here", bar)
    for k, p in learning.items():
        if name == "dualprompt" and k.endswith(("QE", "VE", "keys")) or name == "coda":
            assert not torch.equal(p, start[k]), k                   # parts of later tasks stay as they are, see below
        elif ".pools." in k and p.ndim > 1 and name not in ("maple", "dualprompt"):
            moved = (p != start[k]).flatten(1).any(1)
            assert moved.any(), k
        else:
            assert not torch.equal(p, start[k]), k
    for k, p in model.named_parameters():
        if k in frozen:
            assert torch.equal(p, frozen[k]), k
    assert all(k.startswith("visual.") for k in frozen) == (name in ("finetune", "joint"))


def test_coda_old_components_freeze_and_future_ones_wait():
    torch.manual_seed(0)
    method = mmprompt.build_method(arguments("coda", pool_sizes=[6, 6, 6, 6]), 16, 3)
    method.begin_task(1)
    out = method(*tokens(D=16))
    sum(p.square().sum() for p in out.prompts.values()).backward()
    rows = method.pools["QG"]["prompts"].grad.flatten(1).abs().sum(1) > 0
    assert rows.tolist() == [False, False, True, True, False, False]
    q = mmprompt.masked_mean(*[x for x in (tokens(D=16)[0], tokens(D=16)[2])])
    pool = method.pools["QG"]
    F_q, F_v, q_mask, v_mask = tokens(D=16)
    got = method(F_q, F_v, q_mask, v_mask).prompts["G"][0, :4]
    q = mmprompt.masked_mean(F_q, q_mask)[0]
    want = 0
    for m in range(4):                                               # components of tasks 0 and 1
        x = q * pool["attend"][m]
        want = want + (x @ pool["key"][m]) / (x.norm() * pool["key"][m].norm()) * pool["prompts"][m]
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name, pool, rows", [("coda", "pools.QG.prompts", slice(2, 4)), ("dualprompt", "pools.QE", slice(1, 2))])
def test_what_a_task_does_not_own_stays_bit_identical(name, pool, rows):
    """Also under weight decay and Adam: only the rows of the current task move."""
    torch.manual_seed(0)
    args = arguments(name, pool_sizes=[6, 6, 6, 6], weight_decay=0.5)
    method = mmprompt.build_method(args, 16, 3)
    learner = mmprompt.Learner(args, tiny_model(), method)
    learner.begin(1)
    start = dict(method.named_parameters())[pool].detach().clone()
    learner.epoch(asked(12), [], "0", "here", Namespace(set_postfix_str=lambda *_: None, update=lambda *_: None))
    moved = (dict(method.named_parameters())[pool] != start).flatten(1).any(1)
    want = torch.zeros_like(moved)
    want[rows] = True
    assert torch.equal(moved, want)


def test_dualprompt_trains_its_task_and_finds_it_by_key():
    torch.manual_seed(0)
    method = mmprompt.build_method(arguments("dualprompt"), 16, 4)
    method.begin_task(2)
    F_q, F_v, q_mask, v_mask = tokens(D=16)
    assert method.train()(F_q, F_v, q_mask, v_mask).chosen["QE"].flatten().tolist() == [2, 2, 2]
    q = mmprompt.masked_mean(F_q, q_mask)
    with torch.no_grad():
        method.pools["Qkeys"][1] = q[0]
        method.pools["Qkeys"][3] = q[1]                              # task 3 is not learned yet: must not be chosen
    out = method.eval()(F_q, F_v, q_mask, v_mask)
    assert out.chosen["QE"][0] == 1 and out.chosen["QE"].max() <= 2
    torch.testing.assert_close(out.prompts["E"][0, :4], method.pools["QE"][1])


def test_l2p_joins_the_chosen_prompts_unmixed():
    torch.manual_seed(0)
    method = mmprompt.build_method(arguments("l2p"), 16, 2)
    F_q, F_v, q_mask, v_mask = tokens(D=16)
    out = method(F_q, F_v, q_mask, v_mask)
    first = out.chosen["Q"][0, 0]
    torch.testing.assert_close(out.prompts["G"][0, :2], method.pools["Q"].prompts[first])
    assert out.prompts["G"].shape == (3, 2 * 2 * 2, 16) and method.keep and method.layers == {"G": (0,)}


def test_modality_hides_the_other_from_the_encoder():
    model = tiny_model()
    method = mmprompt.build_method(arguments("mmprompt"), 16, 2).eval()
    F_q, F_v, q_mask, v_mask = model.embed(asked())
    changed = F_q.clone()
    changed[:, 0] += 1
    fixed = lambda *_: out                                           # the queries saw both; hold the prompts fixed here
    out = method(F_q, F_v, q_mask, v_mask)
    shell = type("Fixed", (), {"__call__": staticmethod(fixed), "layers": method.layers, "keep": False})()
    for modality, same in (("v", True), ("q", False), ("joint", False)):
        a, mask, _ = model.encode(F_q, F_v, q_mask, v_mask, shell, modality)
        b, _, _ = model.encode(changed, F_v, q_mask, v_mask, shell, modality)
        assert torch.equal(a[mask], b[mask]) == same, modality
    out.prompts = {G: torch.cat([p[:, :4] + 9, p[:, 4:]], 1) for G, p in out.prompts.items()}    # question prompts changed
    c, mask, _ = model.encode(F_q, F_v, q_mask, v_mask, shell, "v")
    a, _, _ = model.encode(F_q, F_v, q_mask, v_mask, method, "v")
    torch.testing.assert_close(a[mask], c[mask])


def test_fast_selection_equals_the_loop_that_bench_times():
    torch.manual_seed(0)
    method = mmprompt.build_method(arguments("mmprompt"), 16, 2).eval()
    x = tokens(D=16)
    got, want = method(*x).prompts, mmprompt.looped_method(method, *x)
    for G in "GE":
        torch.testing.assert_close(got[G], want[G], atol=1e-5, rtol=1e-4)


# ============================================================================================================== data.py: VQA


@pytest.mark.parametrize("prefix, question, want", [
    ("what", "What English meal is this likely for?", "recognition"), ("where is the", "Where is the clock?", "location"),
    ("is this", "Is this a zoo?", "judge"), ("is this", "Is this woman smiling?", "action"), ("are", "Are both men wearing hats?", "action"),
    ("are the", "Are the men playing?", "action"), ("is the", "Is the woman's shirt red?", "judge"),
    ("is the man", "Is the man old?", "action"), ("can you", "Can you see a cat?", "commonsense"), ("how many", "How many dogs?", "count"),
    ("what color is the", "What color is the sky?", "color"), ("what type of", "What type of train?", "type"),
    ("none of the above", "Tell me the brand.", "subcategory"), ("why", "Why is it wet?", "causal"), ("how", "How old is he?", None),
    ("are these", "Are these giraffes?", "judge"), ("what is the person", "What is the person doing?", "action")])
def test_question_type_rules(prefix, question, want):
    assert data.vqa_question_type(prefix, question) == want


def test_question_type_rules_are_disjoint_and_tables_are_the_papers():
    prefixes = [p for group in data._PREFIXES.values() for p in group.split("|")]
    assert len(prefixes) == len(set(prefixes)) and list(data._PREFIXES) == data.QUESTION_TYPES
    assert sorted(n for g in data.COCO_GROUPS for n in g) == sorted(data.COCO_NAMES) and len(set(data.COCO_NAMES)) == 80 == len(data.COCO_IDS)
    assert dict(zip(data.COCO_IDS, data.COCO_NAMES))[90] == "toothbrush" and dict(zip(data.COCO_IDS, data.COCO_NAMES))[44] == "bottle"
    assert sorted(n for g in data.NEXTQA_GROUPS for n in g) == sorted(data.NEXTQA_NAMES) and [len(g) for g in data.NEXTQA_GROUPS].count(11) == 4
    assert sorted(i for g in data.NEXTQA_SUBGROUPS for i in g) == list(range(1, 81))


def make_vqav2(root, n=200, categories=True):
    """A small VQA v2 of the official structure: ten annotators a question, two year-splits."""
    rng = random.Random(0)
    kinds = [("what is the", "What is the thing?"), ("where is the", "Where is the cat?"), ("is this", "Is this red?"), ("can you", "Can you eat it?"),
             ("how many", "How many?"), ("is the man", "Is the man old?"), ("what color is the", "What color is the cat?"),
             ("what kind of", "What kind of cat?"), ("what time", "What time is it?"), ("why", "Why?"), ("how", "How?")]
    instances = {}
    for year, first in (("train2014", 1), ("val2014", 100_001)):
        questions, answers = [], []
        for k in range(n):
            prefix, text = kinds[k % 11]
            image = first + k
            questions.append({"image_id": image, "question": text, "question_id": image * 1000})
            answers.append({"question_type": prefix, "multiple_choice_answer": "yes", "image_id": image, "question_id": image * 1000,
                            "answer_type": "other", "answers": [{"answer": rng.choice(["yes", "no"]), "answer_confidence": "yes", "answer_id": i}
                                                                for i in range(1, 11)]})
        (root / f"v2_OpenEnded_mscoco_{year}_questions.json").write_text(json.dumps({"questions": questions}))
        (root / f"v2_mscoco_{year}_annotations.json").write_text(json.dumps({"annotations": answers}))
        # each picture holds a small person and something larger: the larger area decides
        rows = []
        for k in range(n):
            big = data.COCO_IDS[1 + (k // 11 * 7 + k) % 79]
            rows += [{"image_id": first + k, "category_id": 1, "area": 5.0, "segmentation": [[1, 2]]},
                     {"image_id": first + k, "category_id": big, "area": 4.0}, {"image_id": first + k, "category_id": big, "area": 3.0}]
        instances[year] = rows
        if categories:
            (root / f"instances_{year}.json").write_text(json.dumps({"annotations": rows}))
    return instances


def test_vqav2_reader(tmp_path):
    instances = make_vqav2(tmp_path, 2000)
    stream = data.vqa_stream("DI", "vqav2", tmp_path)
    assert len(stream) == 8 and all(len(t.subtasks) == 5 for t in stream.tasks)
    names = dict(zip(data.COCO_IDS, data.COCO_NAMES))
    largest = {r["image_id"]: names[r["category_id"]] for r in instances["train2014"] if r["area"] == 4.0}
    sample = stream.tasks[0].train[0]
    number = int(sample.image[-16:-4])
    assert sample.image == f"train2014/COCO_train2014_{number:012d}.jpg" and sample.category == largest[number]
    assert sample.category in data.COCO_GROUPS[0] and len(sample.answers) == 10
    assert {s.image[:3] for t in stream.tasks for s in t.train} == {"tra"} and {s.image[:3] for t in stream.tasks for s in t.test} == {"val"}
    assert not {s.image for t in stream.tasks for s in t.val} & {s.image for t in stream.tasks for s in t.test}
    used = sum(len(getattr(t, k)) for t in stream.tasks for k in ("train", "val", "test"))
    assert used + 2 * len(range(10, 2000, 11)) == 4000 and any("no rule for 'how'" in n for n in stream.notes)
    assert [len(s.train) for s in stream.tasks[0].subtasks] and sum(len(s.train) for s in stream.tasks[0].subtasks) == len(stream.tasks[0].train)
    # VQACL's map wins over instances_*.json
    (tmp_path / "ImgId_cate_map.json").write_text(json.dumps({f"COCO_{y}_{i:012d}": 90 for y, a in (("train2014", 1), ("val2014", 100_001))
                                                              for i in range(a, a + 2000)}))
    with pytest.raises(InputError, match="has no train"):
        data.vqa_stream("CI", "vqav2", tmp_path)                     # everything is a toothbrush now: seven tasks are empty
    assert {s.category for s in data.vqa_stream("QI", "vqav2", tmp_path).tasks[0].train} == {"toothbrush"}


def test_vqav2_broken_files_name_themselves(tmp_path):
    with pytest.raises(InputError, match="v2_mscoco_train2014_annotations.json"):
        data.vqa_stream("CI", "vqav2", tmp_path)
    make_vqav2(tmp_path, 30, categories=False)
    with pytest.raises(InputError, match="ImgId_cate_map.json"):
        data.vqa_stream("CI", "vqav2", tmp_path)
    make_vqav2(tmp_path, 30)
    path = tmp_path / "v2_OpenEnded_mscoco_train2014_questions.json"
    path.write_text(path.read_text()[:500])
    with pytest.raises(InputError, match=r"questions.json is not valid JSON \(line 1"):
        data.vqa_stream("CI", "vqav2", tmp_path)
    path.write_text('{"questions": [{"image_id": 1}]}')
    with pytest.raises(InputError, match="key 'question_id' is missing"):
        data.vqa_stream("CI", "vqav2", tmp_path)


def test_nextqa_reader(tmp_path):
    for split in ("train", "val", "test"):
        for kind in data.NEXTQA_TYPES:
            rows = ["Unnamed: 0,Unnamed: 0.1,video,frame_count,width,height,question,answer,qid,type,bigCate"]
            rows += [f"{i},{i},4{split}{i},9,8,7,why is it,because,{i},{kind},{i + 1}" for i in range(80)]
            (tmp_path / f"{split}_{kind}.csv").write_text("\n".join(rows))
    stream = data.vqa_stream("DI", "nextqa", tmp_path)
    assert stream.names == data.NEXTQA_TYPES and [len(s.train) for s in stream.tasks[0].subtasks] == [16] * 5
    assert [len(t.train) // 7 for t in data.vqa_stream("CI", "nextqa", tmp_path).tasks] == [11, 11, 11, 12, 12, 11, 12]
    sample = data.vqa_stream("QI", "nextqa", tmp_path).tasks[0].train[0]
    assert (sample.id, sample.category, sample.answers) == ("4train0_0", "cat", ("because",))
    (tmp_path / "val_CW.csv").write_text("video,question,answer,qid,type,bigCate\n1,q,a,2,CW,99\n")
    with pytest.raises(InputError, match="val_CW.csv line 2"):
        data.vqa_stream("QI", "nextqa", tmp_path)


def make_pictures(root, n=60, size=(60, 40)):
    """Real PNG files and a .jsonl about them."""
    from PIL import Image
    (root / "images").mkdir(parents=True, exist_ok=True)
    lines = []
    for i in range(n):
        color = [(220, 30, 30), (30, 30, 220), (30, 160, 30)][i % 3]
        Image.new("RGB", size, color).save(root / "images" / f"{i}.png")
        lines.append({"image": f"images/{i}.png", "question": ["what color is it ?", "is it red"][i % 2],
                      "answer": [["red", "blue", "green"][i % 3], "yes" if i % 3 == 0 else "no"][i % 2],
                      "question_type": ["color", "judge"][i % 2], "category": ["box", "wall"][i // 2 % 2],
                      "split": "train" if i < n * .6 else "val" if i < n * .8 else "test"})
    (root / "mine.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return lines


def test_jsonl_reader_and_its_mends(tmp_path):
    lines = make_pictures(tmp_path)
    path = tmp_path / "mine.jsonl"
    assert data.vqa_stream("QI", path).names == ["color", "judge"] and data.vqa_stream("CI", path).names == ["box", "wall"]
    stream = data.vqa_stream("DI", path)
    assert stream.names == ["box", "wall"] and sorted(s.name for s in stream.tasks[0].subtasks) == ["color", "judge"]
    assert [len(getattr(stream.tasks[0], k)) for k in ("train", "val", "test")] == [18, 6, 6]
    for broken, message in (('{"image": ', "line 3: not JSON"), ('{"image": "a.png", "answer": "x"}', "line 3: 'question' is missing"),
                            (json.dumps({**lines[2], "image": "../../etc/passwd"}), "leaves"),
                            (json.dumps({**lines[2], "split": "dev"}), "line 3: split is train, val or test"),
                            (json.dumps({**lines[2], "question": " "}), "line 3: an empty question")):
        rows = [json.dumps(r) for r in lines]
        rows[2] = broken
        path.write_text("\n".join(rows))
        with pytest.raises(InputError, match=re.escape(message)):
            data.vqa_stream("QI", path)
    path.write_text("\n".join(json.dumps({**r, "split": "train"}) for r in lines))
    with pytest.raises(InputError, match="has no val and no test"):
        data.vqa_stream("QI", path)


def test_mini_world_is_what_it_says():
    parts = {s: data.mini_vqa(s, 3, (800, 80, 240)) for s in ("CI", "QI", "DI")}
    CI, QI, DI = parts["CI"], parts["QI"], parts["DI"]
    assert (len(CI), len(QI), len(DI)) == (8, 10, 8) and [len(t.subtasks) for t in DI.tasks] == [5] * 8
    for t, group in zip(CI.tasks, data.COCO_GROUPS):
        assert {s.category for s in t.train} == set(group)
    assert [t.name for t in QI.tasks] == data.QUESTION_TYPES and all({s.question_type for s in t.test} == {t.name} for t in QI.tasks)
    ids = lambda stream, k: sorted(s.id for t in stream.tasks for s in getattr(t, k))
    assert ids(CI, "train") == ids(QI, "train") == ids(DI, "train")   # one pool of questions, three orders
    assert {s.name for t in DI.tasks[:1] for s in t.subtasks} == {"+".join(data.QUESTION_TYPES[i:i + 2]) for i in range(0, 10, 2)}
    assert [s.name for s in DI.tasks[0].subtasks] != [s.name for s in DI.tasks[1].subtasks] or \
        [s.name for s in DI.tasks[1].subtasks] != [s.name for s in DI.tasks[2].subtasks]
    again = data.mini_vqa("CI", 3, (800, 80, 240))
    assert [s.question for s in again.tasks[5].test] == [s.question for s in CI.tasks[5].test]
    pixels, boxes, valid = CI.extra["regions"]
    train_scenes = {s.image for t in CI.tasks for s in t.train}
    assert not train_scenes & {s.image for t in CI.tasks for s in t.test} and valid.sum(1).min() >= 2
    words = {w for t in QI.tasks for s in t.train for w in (s.question + " " + s.answers[0]).split()}
    assert words <= set(data.MINI_WORDS)


def test_mini_answers_follow_from_the_scene():
    rng = random.Random(0)
    for _ in range(200):
        name = rng.choice(data.COCO_NAMES)
        scene = data.random_scene(rng, name)
        same = [t for t in scene["things"] if t["name"] == name]
        assert data.ask(rng, scene, "count")[1] == data.NUMBERS[len(same) - 1] and data.ask(rng, scene, "recognition")[1] == name
        assert all(t["color"] == scene["color"] for t in same) and data.ask(rng, scene, "color")[1] == scene["color"]
        if scene["other"]:
            assert scene["other"]["color"] != scene["color"] and scene["other"]["name"] != name
        corners = {t["corner"][0] // 32 * 3 + t["corner"][1] // 32 for t in scene["things"]}
        assert len(corners) == len(scene["things"])                  # nothing overlaps
        question, answer = data.ask(rng, scene, "commonsense")
        assert (answer == "yes") == (data.kind_of(name) in data.ABILITIES[question])


def test_order_and_unknown_settings():
    stream = data.mini_vqa("QI", 0, (400, 80, 160))
    assert stream.reorder([9, *range(9)]).names[0] == "causal"
    with pytest.raises(InputError, match="each of 0..9 once"):
        stream.reorder([0, 0])
    with pytest.raises(InputError, match="DI, CI or QI"):
        data.vqa_stream("XI", "mini")
    with pytest.raises(InputError, match="mini, vqav2, nextqa or a .jsonl"):
        data.vqa_stream("CI", "coco")


def test_pictures_that_cannot_be_read(tmp_path):
    make_pictures(tmp_path, 6)
    whole = (tmp_path / "images/0.png").read_bytes()
    (tmp_path / "images/1.png").write_bytes(whole[:len(whole) // 2])
    with pytest.raises(InputError, match="1.png cannot be read"):
        data.open_picture(tmp_path / "images/1.png")
    with pytest.raises(InputError, match="9.png is missing"):
        data.open_picture(tmp_path / "images/9.png")
    with pytest.raises(InputError, match="leaves"):
        data.inside(tmp_path, "../x.png")


# -------------------------------------------------------------------------------------------- region features from files


def test_region_files(tmp_path):
    np.savez(tmp_path / "a.npz", features=np.ones((3, 5), np.float16), boxes=np.tile([0, 0, .5, 1], (3, 1)))
    np.save(tmp_path / "b.npy", np.zeros((2, 5), np.float32))
    load = mmprompt.region_files(tmp_path, ".")
    features, boxes = load("train2014/a.jpg")
    assert features.shape == (3, 5) and boxes[0].tolist() == [0, 0, .5, 1] and load("b.jpg")[1][0].tolist() == [0, 0, 1, 1]
    np.savez(tmp_path / "c.npz", features=np.ones((3, 6)))
    with pytest.raises(InputError, match=r"c.npz: features \(3, 6\).*expected \(n,5\)"):
        load("c.jpg")
    np.save(tmp_path / "d.npy", np.full((2, 5), np.nan))
    with pytest.raises(InputError, match="d.npy holds NaN"):
        load("d.jpg")
    (tmp_path / "e.npz").write_bytes(b"half")
    with pytest.raises(InputError, match="e.npz cannot be read"):
        load("e.jpg")
    with pytest.raises(InputError, match="missing.npz"):
        load("missing.jpg")


def test_region_files_h5(tmp_path):
    with pytest.raises(InputError, match="h5py|missing"):
        mmprompt.region_files(tmp_path / "x.h5", ".")
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "f.h5", "w") as f:
        g = f.create_group("COCO_val2014_000000000001")
        g["features"], g["boxes"], g["img_w"], g["img_h"] = np.ones((36, 8), np.float32), np.tile([0, 0, 50, 100], (36, 1)), 100, 200
    features, boxes = mmprompt.region_files(tmp_path / "f.h5", ".")("val2014/COCO_val2014_000000000001.jpg")
    assert features.shape == (36, 8) and boxes[0].tolist() == [0, 0, .5, .5]


# ============================================================================================ mmprompt.py end to end


def short(monkeypatch, **more):
    """Arguments of a run of seconds on the built-in world, with a backbone of two pre-training steps."""
    monkeypatch.setattr(mmprompt, "MINI_STEPS", 2)
    return arguments(more.pop("method", "mmprompt"), sizes=[160, 80, 80], batch=16, quiet=True, **more)


@pytest.mark.parametrize("method, setting", [("mmprompt", "DI"), ("finetune", "CI"), ("joint", "QI"), ("none", "CI"), ("dualprompt", "QI")])
def test_a_run_leaves_what_it_promises(tmp_path, monkeypatch, method, setting):
    args = short(monkeypatch, method=method, setting=setting)
    result = mmprompt.run(args, 0, tmp_path)
    saved = json.loads((tmp_path / "results.json").read_text())
    T = 10 if setting == "QI" else 8
    assert len(saved["matrix"]) == T and saved["matrix"][0][1] is None and saved["metrics"]["A"] == result["metrics"]["A"]
    assert ("F_intra" in saved["metrics"]) == (setting == "DI") and (tmp_path / "matrix.png").exists()
    assert len((tmp_path / "matrix.csv").read_text().splitlines()) == T + 1
    epochs = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()] if method != "none" else []
    assert len(epochs) == {"none": 0, "joint": 1}.get(method, sum(len(t.subtasks) or 1 for t in mmprompt.load_stream(args, 0).tasks))
    if method == "mmprompt":
        from safetensors.torch import load_file
        again = mmprompt.build_method(args, 96, T)
        again.load_state_dict(load_file(tmp_path / "prompts.safetensors"))
        counts = saved["selection"]["QG"]
        assert len(counts) == T and sum(counts[0].values()) == args.top_k * saved["counts"][0][2]
    if method in ("none", "joint"):
        assert saved["metrics"]["F_inter"] == 0


def test_same_seed_same_matrix_and_resume_after_a_kill_at_any_epoch(tmp_path, monkeypatch):
    args = short(monkeypatch, setting="DI", epochs=2, mask_ratio=0.2, memory=20)
    load = mmprompt.load_stream
    monkeypatch.setattr(mmprompt, "load_stream", lambda *a: data.Stream((full := load(*a)).tasks[:2], [], full.extra))   # two of eight
    whole = mmprompt.run(args, 0, tmp_path / "whole")["matrix"]
    assert mmprompt.run(args, 0, tmp_path / "again")["matrix"] == whole
    real, calls, kills = metrics.Run.checkpoint, [0], iter((2, 7, 9, 10 ** 9))
    limit = [next(kills)]

    def dying(self, **state):
        real(self, **state)
        calls[0] += 1
        if calls[0] == limit[0]:
            raise KeyboardInterrupt
    monkeypatch.setattr(metrics.Run, "checkpoint", dying)
    for _ in range(4):
        try:
            args.resume = True
            broken = mmprompt.run(args, 0, tmp_path / "broken")
            break
        except KeyboardInterrupt:
            limit[0] = calls[0] + next(kills)                        # an epoch's end, a subtask's end, a task's end
    assert broken["matrix"] == whole
    lines = [[json.loads(line)[k] for k in ("task", "subtask", "epoch")] for line in (tmp_path / "broken/log.jsonl").read_text().splitlines()]
    assert lines == sorted(lines) and len(lines) == len({tuple(x) for x in lines})               # nothing twice, nothing lost


def test_accumulation_is_one_large_batch_and_bf16_runs(tmp_path, monkeypatch):
    samples, bar = asked(8), Namespace(set_postfix_str=lambda *_: None, update=lambda *_: None)
    ends = []
    for batch, accum in ((8, 1), (4, 2)):
        torch.manual_seed(0)
        args = arguments("finetune", batch=batch, accum=accum)
        args.clip = 1e9
        learner = mmprompt.Learner(args, tiny_model(), None)
        learner.begin(0)
        monkeypatch.setattr(learner, "optimizer", torch.optim.SGD(learner.model.t5.parameters(), 0.1))
        # answers of one token and </s>, so that a mean over tokens is a mean over samples
        for s in samples:
            s.answers = ("red",)
        learner.epoch(samples, [], "0", "here", bar)
        ends.append(learner.model.t5.encoder.block[3].layer[1].DenseReluDense.wo.weight.detach().clone())
    torch.testing.assert_close(*ends, atol=1e-6, rtol=1e-4)
    result = mmprompt.run(short(monkeypatch, setting="CI", dtype="bf16"), 0, tmp_path)
    assert math.isfinite(result["metrics"]["A"])


def test_checkpoint_of_other_arguments_is_refused(tmp_path, monkeypatch):
    args = short(monkeypatch, setting="CI")
    mmprompt.run(args, 0, tmp_path)
    args.resume, args.alpha = True, 0.5
    with pytest.raises(InputError, match=r"other arguments: alpha \(--alpha was 1.0, now 0.5\)"):
        mmprompt.run(args, 0, tmp_path)
    (tmp_path / "checkpoint.pt").write_bytes(b"half a file")
    with pytest.raises(InputError, match="not a readable checkpoint"):
        mmprompt.run(args, 0, tmp_path)


def test_a_run_aborts_on_a_loss_that_is_not_finite(tmp_path, monkeypatch):
    args = short(monkeypatch, setting="CI", lr=float("nan"))
    with pytest.raises(InputError, match="task 1/8 .* step 1, lr nan"):
        mmprompt.run(args, 0, tmp_path)


def test_any_t5_and_clip_by_path_on_real_pictures(tmp_path, monkeypatch):
    """A tiny random T5 and CLIP, written by save_pretrained and loaded by path, on PNG files: features kept on disk per picture."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel
    make_pictures(tmp_path)
    tiny_t5().save_pretrained(tmp_path / "t5")
    mmprompt.mini_tokenizer().save_pretrained(tmp_path / "t5")
    torch.manual_seed(0)
    vision = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=7)
    CLIPModel(CLIPConfig(text_config=dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=99),
                         vision_config=vision, projection_dim=8)).save_pretrained(tmp_path / "clip")
    CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}).save_pretrained(tmp_path / "clip")
    args = arguments("mmprompt", data=str(tmp_path / "mine.jsonl"), backbone=str(tmp_path / "t5"), vision=str(tmp_path / "clip"), setting="QI",
                     train_vision=None)
    monkeypatch.setenv("MMPROMPTS_CACHE", str(tmp_path / "cache"))
    result = mmprompt.run(args, 0, tmp_path / "run")
    kept = list((tmp_path / "cache").glob("grid-6-*.npy"))
    assert len(kept) == 60 and np.load(kept[0]).shape == (36, 16) and len(result["matrix"]) == 2
    mmprompt.run(args, 0, tmp_path / "run2")
    with pytest.raises(InputError, match="--vision .*nowhere"):
        mmprompt.run(Namespace(**{**vars(args), "vision": str(tmp_path / "nowhere")}), 0, tmp_path / "run3")


def test_grid_cells_are_means_of_patches_in_reading_order(tmp_path, monkeypatch):
    """A stand-in vision model whose patch value is its index: cell means and boxes worked by hand."""
    make_pictures(tmp_path, 1)
    monkeypatch.setenv("MMPROMPTS_CACHE", str(tmp_path / "cache"))

    class Eyes(nn.Module):
        def forward(self, pixel_values):
            index = torch.arange(144.0).view(1, 144, 1)
            return Namespace(last_hidden_state=torch.cat([torch.full((1, 1, 1), 1e6), index], 1))     # a class token first
    monkeypatch.setattr(mmprompt, "from_pretrained", lambda cls, *_, **__: Eyes() if "Model" in cls.__name__ else
                        (lambda images, return_tensors: {"pixel_values": torch.zeros(1, 3, 4, 4)}))
    features, boxes = mmprompt.grid_features("eyes", tmp_path, "cpu")("images/0.png")
    assert features[0].item() == np.mean([0, 1, 12, 13]) and features[7].item() == np.mean([26, 27, 38, 39])
    assert boxes[7].tolist() == pytest.approx([1 / 6, 1 / 6, 2 / 6, 2 / 6])


# ====================================================================================================== the command line


def test_smoke_of_the_script_and_one_line_mistakes(tmp_path):
    _, out, _ = script("mmprompt.py", "--smoke", "--setting", "QI", "--out", tmp_path / "run", "--seeds", 0, 1)
    last = out.strip().splitlines()[-1]
    assert re.match(r"mmprompt QI: A [\d.]+ ± [\d.]+ \| F_inter -?[\d.]+ ± [\d.]+ \| .* seeds 0 1 \| [\d.]+ min \| peak \d+ MiB", last), last
    assert (tmp_path / "run/seed1/results.json").exists() and "mean_std" in json.loads((tmp_path / "run/results.json").read_text())
    make_pictures(tmp_path, 20)
    (tmp_path / "images/3.png").unlink()
    one_clear_line(["mmprompt.py", "--smoke", "--setting", "QI", "--data", tmp_path / "mine.jsonl", "--out", tmp_path / "x"], "3.png", "missing")


def test_mistakes_cost_one_line(tmp_path):
    make_vqav2(tmp_path, 2000)
    one_clear_line(["mmprompt.py", "--data", "vqav2", "--root", tmp_path, "--out", tmp_path / "x"], "train2014", "put the picture folder")
    code, _, err = script("mmprompt.py", "--setting", "XI", ok=False)
    assert code == 2 and "'DI', 'CI', 'QI'" in err
    code, out, _ = script("data.py", "vqav2", "--root", tmp_path)
    assert "dropped" in out and out.count("causal") >= 9


def test_every_flag_is_read():
    """Each argparse name occurs in the script outside the parser that defines it."""
    for name, module in (("mmprompt.py", mmprompt),):
        source = (HERE / name).read_text()
        body = source[:source.index("def build_parser")] + source[source.index("\ndef main"):]
        for action in module.build_parser()._actions:
            if action.dest != "help":
                assert re.search(rf"args\.{action.dest}\b|\"{action.dest}\"", body), (name, action.dest)


def test_importing_has_no_side_effect_and_only_the_five_packages():
    allowed = {"torch", "numpy", "tqdm", "PIL", "transformers", "safetensors", "tokenizers", "h5py", "data", "metrics"} | sys.stdlib_module_names
    for name in ("data.py", "metrics.py", "mmprompt.py"):
        tree = ast.parse((HERE / name).read_text())
        for node in ast.walk(tree):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module] if isinstance(node, ast.ImportFrom) else []
            assert all(n.split(".")[0] in allowed for n in names), (name, names)
    done = subprocess.run([sys.executable, "-c", "import sys; sys.argv = ['x', '--bogus']; from mmprompt import MMPrompt"],
                          cwd=HERE, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stdout
