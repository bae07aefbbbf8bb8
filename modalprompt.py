"""ModalPrompt: continual instruction tuning of a large multimodal model with dual-modality guided prompts.

Paper     "ModalPrompt: Towards Efficient Multimodal Continual Instruction Tuning with Dual-Modality Guided Prompt",
          EMNLP 2025, arXiv 2410.05849v2.  Official code: github.com/AuroraZengfh/ModalPrompt at c7bee7c.
          Written from the paper; where paper and official code differ, README lists both and what is done here.
Run       python modalprompt.py                      mini-CoIN, eight tasks, one seed: minutes on a laptop, no downloads
          python modalprompt.py --data coin --root DIR --backbone llava-hf/llava-1.5-7b-hf \\
                 --clip openai/clip-vit-large-patch14-336 --template vicuna --dtype bf16        one GPU
Shapes    B batch, T tasks, t current task, L prompt length (M in the paper), k prompt sets kept, D width of the
          language model, G width of the guidance, S tokens of a sequence, P = k'L tokens of the prefix.   (B,G) is a shape.

One task, one set of L prompt tokens and one prototype.  A frozen CLIP reads the picture and the instruction; the sets
whose prototypes are nearest to both are put in front of the input.  Only the set of the current task learns.
"""
import argparse
import json
import math
import os
import random
import re
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import metrics
from data import (MINI_COIN, MINI_WORD, InputError, cache_folder, instruction_stream, mini_coin_upstream, mini_coin_words,
                  picture_problem, sample_picture)
from metrics import Run, atomic, run_cli, score_instruction

# --------------------------------- the paper: Eq. 1 to 4, 6, 8  (Eq. 5, 9: class VLM below; Eq. 7: learn_task)


class Guidance(nn.Module):
    """Eq. 1: what a frozen CLIP sees in the picture and reads in the instruction.

    clip: a transformers CLIPModel; processor: its processor.  text_feature "pooled" (official code: the end-of-text
    state before CLIP's text projection) or "projected" (after it, in the space of the picture).  Pooled needs a text width
    equal to the projection width, as in CLIP-L; else the projected feature is used.
    """

    def __init__(self, clip, processor, text_feature="pooled"):
        super().__init__()
        self.clip, self.processor = clip.requires_grad_(False).eval(), processor
        self.width = clip.config.projection_dim
        self.text_feature = text_feature if clip.config.text_config.hidden_size == self.width else "projected"

    @torch.no_grad()
    def forward(self, images, texts):
        """images: list of B PIL pictures or None; texts: list of B instructions -> x_v (B,G), x_t (B,G), float32.

        A sample without a picture has a row of zeros in x_v, which every formula below reads as "no picture"."""
        device = self.clip.device
        x_v = torch.zeros(len(texts), self.width, device=device)
        seen = [b for b, image in enumerate(images) if image is not None]
        if seen:
            pixels = self.processor(images=[images[b] for b in seen], return_tensors="pt")["pixel_values"].to(device)
            # x_v = Proj_v(E_I(X_v)): class token after the last norm, then CLIP's own projection           Eq. 1
            x_v[seen] = self.clip.visual_projection(
                self.clip.vision_model(pixel_values=pixels.to(self.clip.dtype)).pooler_output).float()
        tokens = self.processor(text=list(texts), return_tensors="pt", padding=True, truncation=True, max_length=77)
        # x_t = E_T(X_instruct): end-of-text token                                                           Eq. 1
        x_t = self.clip.text_model(input_ids=tokens["input_ids"].to(device),
                                   attention_mask=tokens["attention_mask"].to(device)).pooler_output
        if self.text_feature == "projected":
            x_t = self.clip.text_projection(x_t)
        return x_v, x_t.float()                                          # (B,G) (B,G)


class ModalPrompt(nn.Module):
    """The prompts X_p^t, their prototypes, and the choice between them.

    width D, guidance_width G, length L (M in the paper, 10), top_k k (3), lam: weight of the picture in the guidance,
    so that 0.5 ranks like the paper's alpha + beta, 1 is picture only and 0 text only (Table 3).
    fusion=False trains each task with its own set alone; selection=False answers with all sets, oldest first (Table 5).
    Earlier sets are frozen and never written again; a task keeps its set and its prototype, its projector is dropped.
    """

    needs_guidance, deep = True, {}

    def __init__(self, width, guidance_width, length=10, top_k=3, lam=0.5, fusion=True, selection=True):
        super().__init__()
        if top_k < 1 or length < 1 or not 0 <= lam <= 1:
            raise ValueError(f"top_k and length are at least 1 and lam lies in 0..1, not {top_k}, {length}, {lam}")
        self.width, self.guidance_width, self.length, self.top_k, self.lam = width, guidance_width, length, top_k, lam
        self.fusion, self.selection = fusion, selection
        self.prompts = nn.ParameterList()                                # t sets X_p^i, each (L,D)
        self.projector = None                                            # Proj_p^t of the current task only
        self.register_buffer("kept", torch.zeros(0, guidance_width))     # prototypes of finished tasks (t or t-1,G)

    def begin_task(self, token_embeddings, generator=None):
        """Adds X_p^t, copies of random rows of token_embeddings (V,D), and Proj_p^t; freezes all earlier sets."""
        self.end_task()
        device = token_embeddings.device
        rows = torch.randint(len(token_embeddings), (self.length,), generator=generator).to(device)
        self.prompts.append(nn.Parameter(token_embeddings.detach()[rows].float().clone()))       # (L,D)
        self.projector = nn.Sequential(nn.Linear(self.width, self.width), nn.SiLU(),
                                       nn.Linear(self.width, self.guidance_width)).to(device)
        self.kept = self.kept.to(device)

    @torch.no_grad()
    def end_task(self):
        """Freezes X_p^t and keeps c_t as a constant.  Does nothing when no task is open."""
        if self.projector is not None:
            self.kept = torch.cat([self.kept, self._current_prototype()[None]])
            self.projector = None
        for prompt in self.prompts:
            prompt.requires_grad_(False)

    def _current_prototype(self):
        # c_t = Proj_p(X_p^t): the MLP on each of the L tokens, then their mean                              Eq. 2
        return self.projector(self.prompts[-1]).mean(0)                  # (L,D) -> (L,G) -> (G,)

    @property
    def prototypes(self):
        """(t,G): one row per learned task; the row of the current task carries gradient."""
        return self.kept if self.projector is None else torch.cat([self.kept, self._current_prototype()[None]])

    def similarities(self, x_v, x_t, prototypes=None):
        """alpha (B,t) and beta (B,t), cosines of every prototype with picture and instruction.  Eq. 3.
        A row of zeros in x_v (no picture) has alpha = 0 and sends no gradient."""
        c = F.normalize(self.prototypes if prototypes is None else prototypes, dim=-1)     # (t,G)
        # alpha_i = cos(c_i, x_v),  beta_i = cos(c_i, x_t)                                                   Eq. 3
        return F.normalize(x_v, dim=-1) @ c.T, F.normalize(x_t, dim=-1) @ c.T              # (B,G) @ (G,t) -> (B,t)

    def scores(self, x_v, x_t, prototypes=None):
        """lam alpha + (1 - lam) beta, (B,t); without a picture beta alone."""
        alpha, beta = self.similarities(x_v, x_t, prototypes)
        lam = self.lam * (x_v != 0).any(-1, keepdim=True)                # (B,1)  0 where there is no picture
        return lam * alpha + (1 - lam) * beta

    def gather(self, chosen):
        """chosen (B,k') task numbers in prefix order -> prefix (B,k'L,D).  All L tokens of a task come together."""
        return torch.stack(list(self.prompts))[chosen].flatten(1, 2)     # (t,L,D)[(B,k')] -> (B,k',L,D) -> (B,k'L,D)

    def forward(self, x_v, x_t):
        """Training on task t: x_v (B,G), x_t (B,G) -> prefix (B,k'L,D), {"proto": ()}.  k' = min(k,t).

        The k-1 nearest of the earlier sets in ascending order, then the current set: it is always in."""
        if self.projector is None:
            raise RuntimeError("no task is open: call begin_task first, or select to answer")
        t = len(self.prompts)
        earlier = min(self.top_k - 1, t - 1) if self.fusion else 0
        with torch.no_grad():
            # X~_p^t = X_p^{<=t} o I_k{alpha^{<=t} + beta^{<=t}},  t in I_k                                  Eq. 4
            # flip: topk is descending, the most similar set belongs next to the input
            chosen = self.scores(x_v, x_t, self.kept).topk(earlier, -1).indices.flip(-1)   # (B,k'-1)
            chosen = torch.cat([chosen, chosen.new_full((len(x_v), 1), t - 1)], -1)        # (B,k')
        # L_Proto = [1 - cos(c_t, x_v)] + [1 - cos(c_t, x_t)], each a mean over the batch                    Eq. 6
        alpha, beta = self.similarities(x_v, x_t)
        return self.gather(chosen), {"proto": ((1 - alpha[:, -1]) + (1 - beta[:, -1])).mean()}

    @torch.no_grad()
    def select(self, x_v, x_t):
        """Answering: x_v (B,G), x_t (B,G) -> prefix (B,k'L,D), chosen (B,k').  No task number goes in."""
        t = len(self.prompts)
        if t == 0:
            raise RuntimeError("no task is learned: call begin_task and train first")
        if not self.selection:
            chosen = torch.arange(t, device=x_v.device).expand(len(x_v), t)
        else:
            # X~_p^eval = X_p^{<=T} o I_k{alpha^{<=T} + beta^{<=T}}, per sample                              Eq. 8
            chosen = self.scores(x_v, x_t).topk(min(self.top_k, t), -1).indices.flip(-1)   # (B,k') nearest last
        return self.gather(chosen), chosen

    def tensors(self):
        """What is needed to answer: a flat dict of tensors for safetensors.  About 0.17 MB a task at D = 4096."""
        return {"prompts": torch.stack(list(self.prompts)).detach(), "prototypes": self.prototypes.detach(),
                "top_k": torch.tensor(self.top_k), "lam": torch.tensor(self.lam),
                "selection": torch.tensor(int(self.selection))}

    @classmethod
    def from_tensors(cls, saved):
        """A ModalPrompt that can select, from `tensors()`.  Raises InputError if a tensor is missing or misshapen."""
        wrong = {"prompts", "prototypes", "top_k", "lam"} - set(saved)
        if wrong or saved["prompts"].ndim != 3 or saved["prototypes"].shape[:1] != saved["prompts"].shape[:1]:
            raise InputError(f"these prompts are not ModalPrompt's: {', '.join(sorted(wrong)) or 'shapes do not fit'}; "
                             "use the prompts.safetensors of a run with --method modalprompt")
        T, L, D = saved["prompts"].shape
        method = cls(D, saved["prototypes"].shape[1], L, int(saved["top_k"]), float(saved["lam"]),
                     selection=bool(saved.get("selection", torch.tensor(1))))
        method.prompts.extend(nn.Parameter(p.float(), requires_grad=False) for p in saved["prompts"])
        method.kept = saved["prototypes"].float()
        return method


# --------------------------------------------------- the backbone: any image-text-to-text model, frozen (Eq. 5, Eq. 9)
VICUNA = ("A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
          "detailed, and polite answers to the user's questions. USER: {image}{text} ASSISTANT:")
PLAIN = "USER: {image}{text} ASSISTANT:"


class VLM:
    """A frozen Hugging Face image-text-to-text model that reads a prefix of soft tokens.

    The prefix takes the places of P placeholder tokens (an ordinary id, masked by position) after BOS: a hook on the
    embedding layer writes it there.  Every tensor of token shape grows with them, so that models which compute
    positions from ids (the Qwen family) stay right, which `inputs_embeds` would silently break.  The hook counts its firings.
    template: "chat" the processor's own chat template, "vicuna" LLaVA-1.5's training string, "plain" the same without
    its first sentence.
    """

    def __init__(self, model, processor, template="chat"):
        self.model, self.processor = model.requires_grad_(False).eval(), processor
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.embedding = model.get_input_embeddings()
        self.width, self.device = self.embedding.weight.shape[1], self.embedding.weight.device
        self.template = template if template != "chat" or getattr(processor, "chat_template", None) else "plain"
        eos = self.tokenizer.eos_token_id
        self.pad = self.tokenizer.pad_token_id if self.tokenizer.pad_token_id is not None else eos
        self.eos, self._items, self._prefix, self.fired, self.deep = eos, {}, None, 0, {}
        self.embedding.register_forward_hook(self._write_prefix)
        stacks = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) and hasattr(m[0], "self_attn")]
        causal = lambda m: getattr(m[0].self_attn, "is_causal", False)   # the decoder, not the vision tower
        self.layers = max(stacks, key=lambda m: (causal(m), len(m)), default=[])
        for i, layer in enumerate(self.layers):
            hook = lambda m, args, kwargs, i=i: self._write_deep(i, args, kwargs)
            layer.register_forward_pre_hook(hook, with_kwargs=True)

    # ---- the hook
    def _places(self, B, S):
        """The placeholder mask (B,S) for this call, or None for calls that carry no placeholders (cached decoding)."""
        if self._prefix is None or S != self._mask.shape[1]:
            return None
        if B % len(self._mask):
            raise RuntimeError(f"the model runs a batch of {B} for a prefix of {len(self._mask)}")
        return self._mask.repeat_interleave(B // len(self._mask), 0)     # beams: every row several times

    def _write_prefix(self, module, args, out):
        ids = args[0]
        mask = self._places(*ids.shape) if ids.ndim == 2 else None
        if mask is None:
            return None
        self.fired += 1
        prefix = self._prefix.repeat_interleave(len(ids) // len(self._prefix), 0).to(out.dtype)
        return out.masked_scatter(mask[..., None], prefix)

    def _write_deep(self, i, args, kwargs):
        h = args[0] if args else kwargs["hidden_states"]
        mask = self._places(*h.shape[:2]) if i in self.deep else None
        if mask is None:
            return None
        new = self.deep[i].repeat_interleave(len(h) // len(self.deep[i]), 0).to(h.dtype)
        # deep[i] (B,n,D) takes the last n of the P places
        where = mask & (mask.flip(-1).cumsum(-1).flip(-1) <= new.shape[1])
        h = h.masked_scatter(where[..., None], new)
        return ((h, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": h})

    def _call(self, function, prefix, mask, deep, **kwargs):
        """function(**kwargs) with the prefix armed.  Raises RuntimeError unless the hook fired exactly once."""
        if prefix is None or prefix.shape[1] == 0:
            return function(**kwargs)
        self._prefix, self._mask, self.fired, self.deep = prefix, mask, 0, deep or {}
        try:
            out = function(**kwargs)
        finally:
            self._prefix, self.deep = None, {}
        if self.fired != 1:
            raise RuntimeError(f"the prompts went in {self.fired} times instead of once: this model does not embed its "
                               "input ids through get_input_embeddings(), it cannot be used")
        return out

    # ---- samples to tensors
    def _item(self, sample):
        """One sample through the processor: a dict of tensors, (1,S) for tokens.  Kept where the sample has a `key`."""
        key = sample.get("key")
        if key in self._items:
            return self._items[key]
        image = sample_picture(sample)
        mark = "" if image is None else getattr(self.processor, "image_token", "<image>") + "\n"
        if self.template == "chat":
            content = [{"type": "image"}] * (image is not None) + [{"type": "text", "text": sample["text"]}]
            text = self.processor.apply_chat_template([{"role": "user", "content": content}], tokenize=False,
                                                      add_generation_prompt=True)
        else:
            text = (VICUNA if self.template == "vicuna" else PLAIN).format(image=mark, text=sample["text"])
        bos = self.tokenizer.bos_token
        kwargs = {"add_special_tokens": False} if bos and text.startswith(bos) else {}
        if image is not None:
            kwargs["images"] = [image]
        item = dict(self.processor(text=[text], return_tensors="pt", **kwargs))
        if key is not None:
            self._items[key] = item
        return item

    def answer_ids(self, sample):
        """The answer's tokens and the end of sequence, a list of ids."""
        return self.tokenizer(sample["answer"], add_special_tokens=False)["input_ids"] + [self.eos]

    def encode(self, samples, P, answers=False):
        """samples -> (inputs, mask (B,S) of the P placeholders, labels (B,A) or None).

        Rows are padded on the left up to the answer; answers on the right, so that they fill the last A columns and
        only A + 1 columns need logits.  labels: answer tokens and end of sequence, -100 elsewhere (never the prompts).
        """
        items = [self._item(s) for s in samples]
        shape = [item["input_ids"].shape for item in items]
        tails = [[] for _ in samples]
        if answers:
            tails = [self.answer_ids(s) for s in samples]
        left, A = max(n for _, n in shape), max(map(len, tails))
        S, bos = left + P + A, self.tokenizer.bos_token_id
        inputs, mask = {}, torch.zeros(len(samples), S, dtype=torch.bool)
        names = {k for item in items for k in item}
        for name in names:
            parts = [item.get(name) for item in items]
            if any(p is not None and p.shape == s for p, s in zip(parts, shape)):                # token-shaped: (1,S_b)
                out = torch.full((len(samples), S), self.pad if name == "input_ids" else 0, dtype=torch.long)
                for b, (part, tail) in enumerate(zip(parts, tails)):
                    n = shape[b][1]
                    row = torch.zeros(n, dtype=torch.long) if part is None else part[0]
                    start = left - n
                    head = int(bos is not None and items[b]["input_ids"][0, 0] == bos)   # after BOS, if there is one
                    fill = {"input_ids": self.eos, "attention_mask": 1}.get(name, 0)
                    out[b, start:start + head] = row[:head]
                    out[b, start + head:start + head + P] = fill
                    out[b, start + head + P:start + n + P] = row[head:]
                    if tail:
                        out[b, left + P:left + P + len(tail)] = (torch.tensor(tail) if name == "input_ids" else
                                                                 int(name == "attention_mask"))
                    mask[b, start + head:start + head + P] = True
                inputs[name] = out
            else:                                                        # pictures and their sizes: joined along axis 0
                parts = [p for p in parts if p is not None]
                big = [max(n) for n in zip(*(p.shape[1:] for p in parts))]
                parts = [F.pad(p, [x for n, m in zip(p.shape[:0:-1], big[::-1]) for x in (0, m - n)]) for p in parts]
                out = torch.cat(parts)
                inputs[name] = out.to(self.model.dtype) if out.is_floating_point() else out
        labels = None
        if answers:
            labels = torch.full((len(samples), A), -100)
            for b, tail in enumerate(tails):
                labels[b, :len(tail)] = torch.tensor(tail)
            labels = labels.to(self.device)
        return {k: v.to(self.device) for k, v in inputs.items()}, mask.to(self.device), labels

    # ---- Eq. 5 and Eq. 9
    def loss(self, samples, prefix, deep=None):
        """Sum over the batch of -log p(answer tokens | prefix, picture, instruction), and the number of tokens."""
        inputs, mask, labels = self.encode(samples, prefix.shape[1], answers=True)
        A = labels.shape[1]
        # L_LMM = -sum_l log p(y_l | [X~_p, X_v, X_instruct, y_<l]): logits one place before each answer token   Eq. 5
        logits = self._call(self.model, prefix, mask, deep, **inputs, logits_to_keep=A + 1, use_cache=False).logits
        logits = logits[:, -(A + 1):-1].float()                          # (B,A,V)
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum"), \
            (labels != -100).sum()

    @torch.no_grad()
    def answer(self, samples, prefix, deep=None, max_new_tokens=32, **generate):
        """y = f([X~_p; X_v; X_instruct]; theta), greedy: list of B strings.  Eq. 9.  prefix (B,P,D), P may be 0."""
        inputs, mask, _ = self.encode(samples, prefix.shape[1])
        out = self._call(self.model.generate, prefix, mask, deep, **inputs, **{
            "do_sample": False, "num_beams": 1, "max_new_tokens": max_new_tokens, "pad_token_id": self.pad, **generate})
        return [t.strip() for t in self.tokenizer.batch_decode(out[:, mask.shape[1]:], skip_special_tokens=True)]


# ------------------------------------------------------------------ the small backbone: pre-trained once, then frozen
MINI = dict(width=96, layers=3, clip_width=64, pictures=12_000, sight_steps=800, align_steps=300, steps=2000, clip_steps=400, batch=64,
            lr=2e-3, seed=0)
FILLERS = ("well", "so", "just", "kindly", "ok")


def _quiet():
    import warnings

    from transformers.utils import logging
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message=".*torchvision.*")
    return __import__("transformers")


SEVEN_B = dict(width=4096, layers=32, clip_width=768, side=336, patch=14, heads=32, inner=11008,         # for --bench:
               tower=(1024, 24, 16, 4096), vocabulary=32064)             # the shapes of LLaVA-1.5-7B and CLIP-L/14-336


def tiny_models(words, width=96, layers=3, clip_width=64, side=48, patch=16, heads=4, inner=None, tower=None,
                vocabulary=0):
    """An untrained LLaVA and CLIP, small by default, with a word-level tokenizer over `words`.

    tower: (width, layers, heads, inner width) of the two vision towers; default: 2 layers as wide as what they feed.
    Returns (model, processor, clip, clip_processor), ordinary transformers objects: save_pretrained, Auto classes work.
    """
    tf = _quiet()
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    special = ["<pad>", "<s>", "<unk>", "</s>", "<image>"]               # </s> is 3: CLIP takes 2 for "the largest id"
    words = special + [w for w in dict.fromkeys(["USER", "ASSISTANT", ":", *FILLERS, *words]) if w not in special]

    def tokenizer(end):
        raw = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
        raw.pre_tokenizer = pre_tokenizers.Split(Regex(MINI_WORD), "removed", invert=True)       # keep what matches
        raw.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>" if end else "<s> $A", special_tokens=[("<s>", 1), ("</s>", 3)])
        return tf.PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
                                          unk_token="<unk>", additional_special_tokens=["<image>"], padding_side="left")

    pictures = getattr(tf, "CLIPImageProcessorPil", None) or tf.CLIPImageProcessor       # the one without torchvision
    picture = dict(do_resize=True, size={"height": side, "width": side}, do_center_crop=False,
                   image_mean=[0.5] * 3, image_std=[0.5] * 3)
    vision = lambda w: dict(zip(("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size"),
                                tower or (w, 2, 4, 2 * w)), image_size=side, patch_size=patch)
    size, inner = max(len(words), vocabulary), inner or 2 * width
    model = tf.LlavaForConditionalGeneration(tf.LlavaConfig(
        vision_config=tf.CLIPVisionConfig(**vision(width)), image_token_index=4, image_seq_length=(side // patch) ** 2,
        text_config=tf.LlamaConfig(vocab_size=size, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
                                   num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=2048,
                                   pad_token_id=0, bos_token_id=1, eos_token_id=3),
        vision_feature_layer=-2 if tower else -1))
    processor = tf.LlavaProcessor(pictures(**picture), tokenizer(False), patch_size=patch,
                                  vision_feature_select_strategy="default", num_additional_image_tokens=1)
    g = clip_width
    clip = tf.CLIPModel(tf.CLIPConfig(
        projection_dim=g, vision_config=vision(g),
        text_config=dict(vocab_size=len(words), hidden_size=g, intermediate_size=2 * g, num_hidden_layers=2,
                         num_attention_heads=4, max_position_embeddings=128, bos_token_id=1, eos_token_id=3,
                         pad_token_id=0)))
    text = tokenizer(True)
    text.padding_side = "right"
    return model, processor, clip, tf.CLIPProcessor(pictures(**picture), text)


def pretrain(folder, config=MINI, progress=True, watch=None):
    """Pre-trains the small LLaVA and the small CLIP on the upstream mixture and saves both as ordinary model folders.

    First the vision tower alone names what stands where in a picture; it is frozen; the projector learns to send a patch
    near the words for what it shows, and the language model to answer, LLaVA's two stages; then CLIP is aligned.  Upstream
    (data.mini_coin_upstream): a terse skill word, before the picture or in the user's turn among filler words; sentences
    for answers unless it says "short".  None of the stream's sentences, instructions or pictures occur in it.
    """
    from tqdm import tqdm
    torch.manual_seed(config["seed"])
    rng = random.Random(f"upstream {config['seed']}")
    model, processor, clip, clip_processor = tiny_models(mini_coin_words(), config["width"], config["layers"],
                                                         config["clip_width"])
    pool = [mini_coin_upstream(rng) for _ in range(config["pictures"])]
    blank = np.full((48, 48, 3), 128, np.uint8)
    pixels = torch.from_numpy(np.stack([blank if p[0] is None else np.asarray(p[0]) for p in pool])).permute(0, 3, 1, 2)
    ids = processor.tokenizer.get_vocab()
    seen = torch.tensor([p[0] is not None for p in pool])
    cells = torch.tensor([[[ids[w] if w else 0 for w in cell] for cell in p[3]] for p in pool])          # (N,9,8) words
    words = lambda text: [ids[w] for w in re.findall(MINI_WORD, text)]
    fill = lambda n: " ".join(rng.choice(FILLERS) for _ in range(rng.randint(0, n)))
    see = lambda rows: pixels[rows] / 127.5 - 1                          # (B,3,48,48), as the image processor does it

    def fit(what, steps, module, loss_of, choose):
        opt = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], config["lr"], betas=(0.9, 0.98),
                                weight_decay=0.01)
        bar = tqdm(range(steps), desc=f"pre-training the small {what}, once", disable=not progress, mininterval=2)
        for step in bar:
            for group in opt.param_groups:                               # warm-up, then cosine to zero
                decay = 0.505 + 0.495 * math.cos(math.pi * step / steps)
                group["lr"] = config["lr"] * min(1, (step + 1) / 100) * decay
            loss = loss_of(torch.tensor(rng.choices(choose, k=config["batch"])))
            opt.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            opt.step()
            if step % 50 == 0:
                bar.set_postfix(loss=f"{loss.item():.3f}")
            if watch:
                watch(what, step, loss.item(), model)

    def sight(rows):
        h = tower(see(rows)).last_hidden_state[:, 1:]                    # (B,9,D)
        return F.cross_entropy(eyes(h).unflatten(-1, (8, -1)).flatten(0, 2), cells[rows].flatten())

    def alignment(rows):
        said = F.one_hot(cells[rows][..., :4], len(ids)).sum(2)[..., 1:].float()         # (B,9,V-1): what stands there
        where = said.sum(-1) > 0
        near = model.model.multi_modal_projector(features[rows]) @ model.get_input_embeddings().weight.detach().T
        return F.cross_entropy(50 * near[..., 1:][where], said[where] / said[where].sum(-1, keepdim=True))

    def language(rows):
        lines, answers = [], []
        for row in rows.tolist():                                        # several questions on one picture
            line, mine = [1], [0]
            asked = rng.sample(pool[row][1], min(4, len(pool[row][1])))
            for i, (skill, text, answer, sentence) in enumerate(asked):
                image = "<image>" * n_image if i == 0 and pool[row][0] is not None else ""
                if rng.random() < 0.5:
                    skill = f"{skill} short"
                else:
                    answer = sentence
                head = words(f"{skill} USER: {image} {fill(3)} {text} {fill(3)} ASSISTANT:" if rng.random() < 0.5 else
                             f"USER: {image} {fill(1)} {skill} {text} {fill(2)} ASSISTANT:")
                tail = words(answer) + [ids["</s>"]]
                line, mine = line + head + tail, mine + [0] * len(head) + [1] * len(tail)
            lines.append(torch.tensor(line))
            answers.append(torch.tensor(mine))
        x = nn.utils.rnn.pad_sequence(lines, batch_first=True)
        y = x.masked_fill(nn.utils.rnn.pad_sequence(answers, batch_first=True) == 0, -100)[:, 1:]
        table = model.get_input_embeddings()(x)
        patches = model.model.multi_modal_projector(features[rows[seen[rows]]])          # (B',9,D)
        table = table.masked_scatter((x == ids["<image>"])[..., None], patches)
        h = model.model.language_model(inputs_embeds=table, use_cache=False).last_hidden_state[:, :-1]
        return F.cross_entropy(model.lm_head(h[y != -100]), y[y != -100])

    def contrast(rows):
        text = [torch.tensor([1, *words(pool[i][2]), ids["</s>"]]) for i in rows.tolist()]
        text = nn.utils.rnn.pad_sequence(text, batch_first=True)
        return clip(pixel_values=see(rows), input_ids=text, attention_mask=(text != 0).long(), return_loss=True).loss

    tower, n_image, eyes = model.model.vision_tower, model.config.image_seq_length, nn.Linear(config["width"], 8 * len(ids))
    shown = seen.nonzero()[:, 0].tolist()
    fit("eyes", config["sight_steps"], nn.ModuleList([tower, eyes]), sight, shown)
    tower.requires_grad_(False).eval()
    with torch.no_grad():                                                # frozen: looked at once
        features = torch.cat([tower(see(r)).last_hidden_state[:, 1:] for r in torch.arange(len(pool)).split(500)])
    fit("projector", config["align_steps"], model.model.multi_modal_projector, alignment, shown)
    fit("LLaVA", config["steps"], model, language, range(len(pool)))
    fit("CLIP", config["clip_steps"], clip.train(), contrast, shown)
    part = folder.with_name(f".{folder.name}.{os.getpid()}.part")
    for name, m, p in (("llava", model, processor), ("clip", clip, clip_processor)):
        m.eval().save_pretrained(part / name)
        p.save_pretrained(part / name)
    if folder.exists():                                                  # another process was faster
        shutil.rmtree(part)
    else:
        part.rename(folder)


def mini_backbone(smoke=False, seed=0):
    """Folder with llava/ and clip/ of a small backbone; trained on the first call, read from the cache afterwards.
    seed: of its pre-training.  Two seeds, or two machines, give backbones of which one takes prompts better than the other."""
    import hashlib
    tiny = dict(pictures=500, sight_steps=20, align_steps=5, steps=40, clip_steps=20, batch=32)
    config = {**MINI, "seed": seed, **(tiny if smoke else {})}
    name = hashlib.sha256(json.dumps([config, MINI_COIN], sort_keys=True).encode()).hexdigest()[:12]
    folder = cache_folder() / f"mini-coin-v{MINI_COIN}-{name}"
    if not (folder / "clip").exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        pretrain(folder, config)
    return folder


def load(backbone="mini", clip=None, device="cpu", dtype="fp32", template="chat", text_feature="pooled", smoke=False,
         backbone_seed=0):
    """(VLM, Guidance) from "mini", a Hugging Face id or a folder.  Raises InputError if one cannot be had or read."""
    tf = _quiet()
    if backbone == "mini":
        folder = mini_backbone(smoke, backbone_seed)
        backbone, clip = str(folder / "llava"), clip or str(folder / "clip")
    if clip is None:
        raise InputError("--clip is needed with this --backbone: the CLIP that guides, for instance "
                         "openai/clip-vit-large-patch14-336 or a folder")
    out, kind = [], {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    for name, model_class, flag in ((backbone, tf.AutoModelForImageTextToText, "--backbone"),
                                    (clip, tf.CLIPModel, "--clip")):
        try:
            out += [model_class.from_pretrained(name, dtype=kind).to(device), tf.AutoProcessor.from_pretrained(name)]
        except (OSError, ValueError, KeyError) as e:
            raise InputError(f"{flag} {name}: cannot be loaded ({str(e).strip().splitlines()[0][:160]}); "
                             "give a folder written by save_pretrained or a Hugging Face id that this machine can reach")
    return VLM(out[0], out[1], template), Guidance(out[2], out[3], text_feature)


def load_for(a):
    """load() with the flags of the command line."""
    return load(a.backbone, a.clip, a.device, a.dtype, a.template, a.text_feature, a.smoke, a.backbone_seed or 0)


# ------------------------------------------------------------------------------------------------------- baselines


class Frozen(nn.Module):
    """Zero-shot: the frozen model, no prefix."""
    needs_guidance, deep = False, {}

    def __init__(self, width):
        super().__init__()
        self.width = width

    def begin_task(self, token_embeddings, generator=None):
        pass

    def end_task(self):
        pass

    def forward(self, x_v, x_t):
        return x_v.new_zeros(len(x_v), 0, self.width), {}

    def select(self, x_v, x_t):
        return x_v.new_zeros(len(x_v), 0, self.width), None


class LoRA(Frozen):
    """Sequential fine-tuning (experts=1) and MoELoRA (experts=8), on every linear layer of the language model.

    W x + alpha/r sum_e g_e(x) B_e A_e x,  g = softmax(W_g x) over the experts (1 for a single one).  B starts at zero.
    """

    def __init__(self, vlm, rank=8, alpha=16, experts=1):
        super().__init__(vlm.width)
        self.rank, self.scale, self.experts = rank, alpha / rank, experts
        self.A, self.B, self.gate = nn.ParameterList(), nn.ParameterList(), nn.ParameterList()
        for linear in (m for layer in vlm.layers for m in layer.modules() if isinstance(m, nn.Linear)):
            n = {"device": linear.weight.device}
            self.A.append(torch.randn(experts * rank, linear.in_features, **n) / math.sqrt(linear.in_features))
            self.B.append(torch.zeros(linear.out_features, experts * rank, **n))
            if experts > 1:
                self.gate.append(torch.zeros(experts, linear.in_features, **n))
            i = len(self.A) - 1
            linear.register_forward_hook(lambda m, args, out, i=i: out + self.delta(i, args[0]).to(out.dtype))

    def delta(self, i, x):
        x = x.float()
        h = x @ self.A[i].T                                              # (...,in) @ (in,E r) -> (...,E r)
        if self.experts > 1:
            g = (x @ self.gate[i].T).softmax(-1)                         # (...,E)
            h = (h.unflatten(-1, (self.experts, self.rank)) * g[..., None]).flatten(-2)
        return h @ self.B[i].T * self.scale                              # (...,E r) @ (E r,out)


def query(x_v, x_t):
    """What the prompt pools below are asked with: both modalities, like ours.  (B,G), unit length."""
    return F.normalize(F.normalize(x_v, dim=-1) + F.normalize(x_t, dim=-1), dim=-1)


def vocabulary_rows(token_embeddings, shape, generator):
    """Copies of random rows (…,D), the paper's start for every prompt."""
    rows = torch.randint(len(token_embeddings), shape, generator=generator).to(token_embeddings.device)
    return token_embeddings.detach()[rows].float().clone()


class L2P(Frozen):
    """Wang et al. 2022b: one pool for all tasks; the N prompts whose keys are nearest to the query go in front.
    Pool of 10, length 10, N = 3 (appendix D); chosen keys are pulled to the query with weight 0.5 (L2P's default)."""
    needs_guidance = True

    def __init__(self, width, guidance_width, pool=10, length=10, top=3, pull=0.5):
        super().__init__(width)
        self.shape, self.top, self.pull = (pool, length), top, pull
        self.pool = nn.Parameter(torch.zeros(pool, length, width))
        self.keys = nn.Parameter(torch.empty(pool, guidance_width).uniform_(-1, 1))
        self.started = False

    def begin_task(self, token_embeddings, generator=None):
        if not self.started:
            self.to(token_embeddings.device).pool.data = vocabulary_rows(token_embeddings, self.shape, generator)
            self.started = True

    def forward(self, x_v, x_t):
        s = query(x_v, x_t) @ F.normalize(self.keys, dim=-1).T           # (B,G) @ (G,M) -> (B,M)
        best, chosen = s.topk(self.top, -1)                              # (B,N) per sample
        return self.pool[chosen].flatten(1, 2), {"pull": self.pull * (1 - best).sum(-1).mean()}

    def select(self, x_v, x_t):
        return self(x_v, x_t)[0], None


class DualPrompt(Frozen):
    """Wang et al. 2022a, prompt-tuning form: a general prompt (3 tokens) in the lower layers, an expert prompt (10) a
    task in the upper ones, each layer with its own tokens.  Below its layers an expert place holds a zero vector, which has
    zero key and value.  The expert of the nearest key answers; keys learn 1 - cos to the query."""
    needs_guidance = True

    def __init__(self, width, guidance_width, n_layers, general=3, expert=10):
        super().__init__(width)
        low = max(1, min(2, n_layers // 2))
        self.low, self.high = list(range(low)), list(range(low, min(n_layers, low + 3)))
        self.n, self.m, self.guidance_width = general, expert, guidance_width
        self.general = nn.Parameter(torch.zeros(len(self.low), general, width))
        self.experts, self.keys, self.started = nn.ParameterList(), nn.ParameterList(), False

    def begin_task(self, token_embeddings, generator=None):
        self.end_task()
        if not self.started:
            start = vocabulary_rows(token_embeddings, self.general.shape[:2], generator)
            self.to(token_embeddings.device).general.data = start
            self.started = True
        self.experts.append(nn.Parameter(vocabulary_rows(token_embeddings, (len(self.high), self.m), generator)))
        self.keys.append(nn.Parameter(torch.empty(self.guidance_width).uniform_(-1, 1).to(token_embeddings.device)))

    def end_task(self):
        for p in [*self.experts, *self.keys]:
            p.requires_grad_(False)

    def _prefix(self, chosen):
        B = len(chosen)
        expert = torch.stack(list(self.experts))[chosen]                 # (B,layers,m,D)
        zeros = expert.new_zeros(B, self.m, self.width)
        general = self.general[:, None].expand(-1, B, -1, -1)            # (layers,B,n,D)
        self.deep = {i: torch.cat([general[j], zeros], 1) for j, i in enumerate(self.low) if i}
        self.deep.update({i: expert[:, j] for j, i in enumerate(self.high)})     # the last m places of the prefix
        return torch.cat([general[0], zeros], 1)                         # (B,n+m,D)

    def forward(self, x_v, x_t):
        now = torch.full((len(x_v),), len(self.experts) - 1, device=x_v.device)
        near = (query(x_v, x_t) @ F.normalize(self.keys[-1], dim=-1)).mean()
        return self._prefix(now), {"pull": 1 - near}

    def select(self, x_v, x_t):
        chosen = (query(x_v, x_t) @ F.normalize(torch.stack(list(self.keys)), dim=-1).T).argmax(-1)      # (B,)
        return self._prefix(chosen), chosen[:, None]


class CODAPrompt(Frozen):
    """Smith et al. 2023: p = sum_m w_m P_m with w_m = cos(q * A_m, K_m).  10 components of length 10 (appendix D),
    shared out over the T tasks; those of earlier tasks are frozen.  Components, keys and attentions are kept orthogonal."""
    needs_guidance = True

    def __init__(self, width, guidance_width, tasks, pool=10, length=10, ortho=0.1):
        super().__init__(width)
        pool = max(pool, tasks)                                          # at least one component a task
        self.tasks, self.pool, self.ortho, self.t, self.length = tasks, pool, ortho, 0, length
        self.P = nn.ParameterList()
        self.K, self.A = nn.ParameterList(), nn.ParameterList()
        self.guidance_width = guidance_width

    def begin_task(self, token_embeddings, generator=None):
        self.end_task()
        n = (self.t + 1) * self.pool // self.tasks - self.t * self.pool // self.tasks
        self.P.append(nn.Parameter(vocabulary_rows(token_embeddings, (n, self.length), generator)))
        for bank in (self.K, self.A):
            bank.append(nn.Parameter(torch.empty(n, self.guidance_width).uniform_(0, 1).to(token_embeddings.device)))
        self.t += 1

    def end_task(self):
        for p in self.parameters():
            p.requires_grad_(False)

    def _banks(self):
        return torch.cat(list(self.P)), torch.cat(list(self.K)), torch.cat(list(self.A))

    def select(self, x_v, x_t):
        P, K, A = self._banks()
        w = F.cosine_similarity(query(x_v, x_t)[:, None] * A, K[None], dim=-1)           # (B,1,G) * (M,G) -> (B,M)
        return torch.einsum("bm,mld->bld", w, P), None

    def forward(self, x_v, x_t):
        loss = 0.0
        for bank in self._banks():                                       # unit rows, as far from each other as can be
            x = F.normalize(bank.flatten(1), dim=-1)
            loss = loss + (x @ x.T - torch.eye(len(x), device=x.device)).pow(2).mean()
        return self.select(x_v, x_t)[0], {"ortho": self.ortho * loss}


class ProgressivePrompts(Frozen):
    """Razdaibiedina et al. 2023: the sets of all tasks, one after the other, always; only the current one learns."""

    def __init__(self, width, length=10):
        super().__init__(width)
        self.length, self.prompts = length, nn.ParameterList()

    def begin_task(self, token_embeddings, generator=None):
        self.end_task()
        self.prompts.append(nn.Parameter(vocabulary_rows(token_embeddings, (self.length,), generator)))

    def end_task(self):
        for p in self.prompts:
            p.requires_grad_(False)

    def select(self, x_v, x_t):
        return torch.cat(list(self.prompts)).expand(len(x_v), -1, -1), None              # (B,tL,D)

    def forward(self, x_v, x_t):
        return self.select(x_v, x_t)[0], {}


METHODS = {
    "modalprompt": lambda vlm, G, T, a: ModalPrompt(vlm.width, G, a.length, a.top_k, a.lam, a.fusion, a.selection),
    "zero-shot": lambda vlm, G, T, a: Frozen(vlm.width),
    "finetune": lambda vlm, G, T, a: LoRA(vlm, a.rank, 2 * a.rank),
    "multi-task": lambda vlm, G, T, a: LoRA(vlm, a.rank, 2 * a.rank),
    "moelora": lambda vlm, G, T, a: LoRA(vlm, max(1, a.rank // a.experts), 2 * max(1, a.rank // a.experts), a.experts),
    "l2p": lambda vlm, G, T, a: L2P(vlm.width, G, length=a.length),
    "dualprompt": lambda vlm, G, T, a: DualPrompt(vlm.width, G, len(vlm.layers), expert=a.length),
    "coda": lambda vlm, G, T, a: CODAPrompt(vlm.width, G, T, length=a.length),
    "progressive": lambda vlm, G, T, a: ProgressivePrompts(vlm.width, a.length),
}


# ---------------------------------------------------------------------------------------------- train and evaluate
LR = {"modalprompt": 5e-3, "l2p": 5e-3, "dualprompt": 0.02, "coda": 0.02, "progressive": 1e-3,         # mini-CoIN, each
      "finetune": 5e-4, "moelora": 2e-3, "multi-task": 2e-4, "zero-shot": 0.0}          # the best of three (README)
BOUNDS = ("zero-shot", "multi-task")


def default_lr(a):
    return LR[a.method] if a.backbone == "mini" else 2e-4


@torch.no_grad()
def guidance_features(guidance, samples, batch=64):
    """x_v (N,G), x_t (N,G) of a list of samples, in order: frozen, hence computed once a sample.  Empty list: (0,G)."""
    parts = [guidance([sample_picture(s) for s in samples[i:i + batch]], [s["text"] for s in samples[i:i + batch]])
             for i in range(0, len(samples), batch)]
    empty = torch.zeros(0, guidance.width)
    return tuple(torch.cat([p[j].cpu() for p in parts]) if parts else empty for j in (0, 1))


def learn_task(vlm, method, samples, features, a, t, start=(0, None), after_epoch=lambda *_: None, name=""):
    """Trains method on one task: AdamW, warm-up over 3 % of the steps, then constant; gradients clipped at norm 1.

    start: (epoch, optimizer state) to go on from.  after_epoch(epoch, optimizer, loss) runs after each epoch."""
    from tqdm import tqdm
    named = [(n, p) for n, p in method.named_parameters() if p.requires_grad]
    groups = [{"params": [p for n, p in named if not n.startswith("projector")], "lr": a.lr},
              {"params": [p for n, p in named if n.startswith("projector")], "lr": a.lr_projector}]
    opt = torch.optim.AdamW([g for g in groups if g["params"]], weight_decay=0.0)
    rates = [g["lr"] for g in opt.param_groups]
    if start[1] is not None:
        opt.load_state_dict(start[1])
    per_epoch = math.ceil(len(samples) / a.batch)
    warm = max(1, round(0.03 * a.epochs * per_epoch))
    device = vlm.device
    for epoch in range(start[0], a.epochs):
        dice = torch.Generator().manual_seed(a.seed * 1_000_003 + t * 1009 + epoch)
        order = torch.randperm(len(samples), generator=dice)
        bar = tqdm(range(per_epoch), desc=f"task {t + 1} {name} epoch {epoch + 1}/{a.epochs}", leave=False,
                   mininterval=1, disable=a.quiet)
        total = 0.0
        for i in bar:
            step = epoch * per_epoch + i
            for group, rate in zip(opt.param_groups, rates):
                group["lr"] = rate * min(1.0, (step + 1) / warm)
            rows = order[i * a.batch:(i + 1) * a.batch].tolist()
            micro = math.ceil(len(rows) / a.accum)
            n_tokens = sum(len(vlm.answer_ids(samples[r])) for r in rows)
            value = 0.0
            for j in range(0, len(rows), micro):                         # same gradient whatever --accum
                part = rows[j:j + micro]
                x_v, x_t = (f[part].to(device) for f in features)
                prefix, extra = method(x_v, x_t)
                nll, _ = vlm.loss([samples[r] for r in part], prefix, method.deep)
                # L_Total = L_Proto + L_LMM                                                                  Eq. 7
                loss = nll / n_tokens + a.own_weight * sum(extra.values()) * (len(part) / len(rows))
                if not torch.isfinite(loss):
                    raise InputError(f"the loss is not finite at task {t + 1}, step {step + 1}, learning rate "
                                     f"{opt.param_groups[0]['lr']:.2g}: use a smaller --lr (or --dtype fp32)")
                loss.backward()
                value += loss.item()
            nn.utils.clip_grad_norm_([p for _, p in named], 1.0)
            opt.step()
            opt.zero_grad(set_to_none=True)
            total += value
            bar.set_postfix(loss=f"{value:.3f}")
        after_epoch(epoch + 1, opt, total / per_epoch)


@torch.no_grad()
def evaluate(vlm, method, samples, features, a):
    """Scores on one task in points: (corrected, official, number chosen per prompt set (T,) or None, answers)."""
    fixed, official, counts, answers = [], [], None, []
    for i in range(0, len(samples), a.eval_batch):
        part = samples[i:i + a.eval_batch]
        x_v, x_t = (f[i:i + a.eval_batch].to(vlm.device) for f in features)
        prefix, chosen = method.select(x_v, x_t)
        said = vlm.answer(part, prefix, method.deep, a.max_new_tokens)
        answers += said
        fixed += [score_instruction(s["kind"], y, s) for s, y in zip(part, said)]
        official += [score_instruction(s["kind"], y, s, official=True) for s, y in zip(part, said)]
        if chosen is not None:
            new = torch.bincount(chosen.flatten().cpu(), minlength=a.tasks)
            counts = new if counts is None else counts + new
    return 100 * float(np.mean(fixed)), 100 * float(np.mean(official)), counts, answers


def summary(A):
    """The paper's four averages of a matrix (T,T): Last, Avg, B, M (appendix A); only Last for one task."""
    out = {"Last": float(metrics.last(A).mean())}
    if len(A) > 1:
        out.update(Avg=float(metrics.avg(A).mean()), B=float(metrics.backward_transfer(A).mean()),
                   M=float(metrics.mean_accuracy(A).mean()))
    return out


def run_args(a):
    """The arguments that decide a run's outcome, for results.json, --resume and --table."""
    keys = ("method data root backbone clip template text_feature seed order epochs batch accum lr lr_projector "
            "own_weight length top_k lam fusion selection rank experts dtype device checkpointing sizes limit split "
            "see max_new_tokens smoke backbone_seed")
    args = {k: (list(v) if isinstance(v := getattr(a, k), tuple) else v) for k in keys.split()}
    return {**args, "world": f"mini-CoIN {MINI_COIN}" if a.data == "mini" else a.data}


def run_one(a, folder):
    """One method, one seed: learns the stream and leaves `folder`; returns what results.json holds."""
    torch.use_deterministic_algorithms(True, warn_only=True)         # two threads, one result
    torch.manual_seed(a.seed)
    stream = instruction_stream(a.data, a.root, a.seed, a.sizes, a.limit).reorder(a.order)
    for task in stream.tasks if a.see != "both" else []:
        for sample in (*task.train, *task.val, *task.test):
            sample.update({"image": None} if a.see == "question" else {"text": ""})
    vlm, guidance = load_for(a)
    a.tasks = T = len(stream)
    if a.checkpointing:
        vlm.model.gradient_checkpointing_enable()
        vlm.model.train()                                                # checkpointing looks at this flag
        for module in vlm.model.modules():                               # but nothing frozen drops out
            if isinstance(module, nn.Dropout):
                module.eval()
    method = METHODS[a.method](vlm, guidance.width, T, a).to(a.device)
    table = vlm.embedding.weight
    begin = lambda t: method.begin_task(table, torch.Generator().manual_seed(a.seed * 7919 + t))
    begin_all = lambda t: [(torch.manual_seed(a.seed * 7919 + i), begin(i)) for i in range(t + 1)]

    run = Run(folder, run_args(a), a.resume)
    say = (lambda *_: None) if a.quiet else print
    say(f"{'method':<10}{a.method}   backbone {a.backbone} (width {vlm.width}, {len(vlm.layers)} layers)   guidance "
        f"width {guidance.width} ({guidance.text_feature} text)   seed {a.seed}   no task id at test")
    say(f"{'samples':<10}" + "  ".join(f"{x.name} {len(x.train)}/{len(x.val)}/{len(x.test)}" for x in stream.tasks))
    for note in stream.notes:
        say(f"{'note':<10}{note}")
    env = metrics.environment()
    say(f"{'setup':<10}{a.epochs} epochs, batch {a.batch} (x{a.accum} parts), lr {a.lr:g}, {a.dtype} on {a.device}; "
        f"torch {env['torch']}, transformers {env['transformers']}, commit {env['commit']}")

    features = None
    if method.needs_guidance:
        features = [{s: guidance_features(guidance, getattr(x, s)) for s in ("train", a.split)} for x in stream.tasks]
    empty = lambda samples: (torch.zeros(len(samples), 0),) * 2
    look = lambda i, s: features[i][s] if features else empty(getattr(stream.tasks[i], s))

    A, official = np.full((T, T), np.nan), np.full((T, T), np.nan)
    counts, first, start = np.zeros((T, T)), 0, (0, None)
    if run.state:
        s = run.state
        first = s["task"]
        if first >= 0:
            begin_all(first if a.method not in BOUNDS else 0)
            method.load_state_dict(s["method"])
            start, A, official = (s["epoch"], s["optimizer"]), np.array(s["A"]), np.array(s["official"])
    stages = [0] if a.method in BOUNDS else list(range(T))
    for t in stages[first:]:
        pool = range(T) if a.method in BOUNDS else [t]
        samples = [x for i in pool for x in stream.tasks[i].train]
        joined = tuple(torch.cat(parts) for parts in zip(*(look(i, "train") for i in pool)))
        if not (run.state and t == first):
            torch.manual_seed(a.seed * 7919 + t)
            begin(t)

        trained = sum(p.numel() for p in method.parameters() if p.requires_grad)

        def after_epoch(epoch, opt, loss):
            run.log(task=t, name=stream.names[t], epoch=epoch, loss=loss, minutes=run.minutes)
            run.checkpoint(task=t, epoch=epoch, method=method.state_dict(), optimizer=opt.state_dict(), A=A.tolist(),
                           official=official.tolist())
        name = stream.names[t] if len(stages) > 1 else "all tasks"
        if a.method != "zero-shot":
            learn_task(vlm, method, samples, joined, a, t, start, after_epoch, name)
        start = (0, None)
        method.end_task()
        row = T - 1 if a.method in BOUNDS else t
        for i in range(row + 1):
            A[row, i], official[row, i], picked, answers = evaluate(vlm, method, getattr(stream.tasks[i], a.split),
                                                                    look(i, a.split), a)
            if picked is not None and row == T - 1:
                counts[i] = picked.numpy()
        say(f"\nafter {name}")
        say(metrics.format_matrix(A[:row + 1], stream.names))

    bound = a.method in BOUNDS
    result = {"Last": float(A[-1].mean())} if bound else summary(A)
    total = sum(p.numel() for p in vlm.model.parameters())
    more = {"official": {"Last": float(official[-1].mean())} if bound else summary(official),
            "official_matrix": official,
            "selection_counts": counts, "trainable_a_task": trained, "frozen": total,
            "share_percent": 100 * trained / total, "notes": stream.notes}
    if a.method == "modalprompt":                                        # Fig. 4: prototype i, features of task j
        near = [sum(x.mean(0) / 2 for x in method.similarities(*(f.to(a.device) for f in look(j, a.split))))
                for j in range(T)]
        more["similarity"] = torch.stack(near).T.cpu().numpy()           # (T prototypes, T tasks)
    out = run.finish(A, stream.names, result, method.tensors() if hasattr(method, "tensors") else None,
                     f"{a.method}, seed {a.seed}", **more)
    return out



# ---------------------------------------------------------------------------------------- tables, bench, one answer
SETTINGS = {**{name: {"method": name} for name in METHODS},              # what differs from the defaults
            "picture only": {"method": "multi-task", "see": "picture"},
            "question only": {"method": "multi-task", "see": "question"},
            "image": {"lam": 1.0}, "text": {"lam": 0.0},                 # Table 3
            "fusion only": {"selection": False}, "selection only": {"fusion": False},                        # Table 5
            **{f"k {n}": {"top_k": n} for n in (1, 2)},                  # not in the paper
            **{f"length {n}": {"length": n} for n in (1, 2, 5, 20)},     # Fig. 3
            **{f"experts {n}": {"method": "moelora", "experts": n} for n in (2, 4, 16)}}
COLUMNS = ("Last", "Avg", "B", "M")
TABLES = {"bounds": ["zero-shot", "multi-task", "picture only", "question only", "finetune"], "2": list(METHODS),
          "3": ["image", "text", "modalprompt"], "5": ["fusion only", "selection only", "modalprompt"],
          "k": ["k 1", "k 2", "modalprompt"],
          "10": ["finetune", "moelora", "modalprompt", "l2p", "dualprompt", "coda"],
          "fig3": ["length 1", "length 2", "length 5", "modalprompt", "length 20", "experts 2", "experts 4", "moelora",
                   "experts 16"], "fig4": ["modalprompt"]}
PAPER = {"multi-task": {"Last": 67.10}, "zero-shot": {"Last": 48.89},    # Tables 2 to 5; None: not in the paper
         "finetune": {"Last": 29.06, "Avg": 17.53, "B": 51.73, "M": 26.19},     # B: its formula gives 53.26 (README)
         "coda": {"Last": 45.46, "Avg": 39.93, "B": 14.34, "M": 43.18}, "dualprompt": {"Last": 43.05, "Avg": 36.92},
         "l2p": {"Last": 42.99, "Avg": 35.91}, "moelora": {"Last": 37.48, "Avg": 28.53, "B": 36.95, "M": 36.29},
         "modalprompt": {"Last": 55.06, "Avg": 54.19, "B": 3.72, "M": 56.10}, "image": {"Last": 51.95, "Avg": 50.35},
         "text": {"Last": 50.39, "Avg": 49.02}, "fusion only": {"Last": 37.36, "Avg": 31.87, "B": 27.09, "M": 34.94},
         "selection only": {"Last": 44.81, "Avg": 38.24, "B": 17.16, "M": 40.71}}


def run_table(a, out):
    """One table or figure of the paper at the chosen scale, a run for every row and seed: see metrics.run_table."""
    rows = [(name, SETTINGS[name], tuple(map(PAPER[name].get, COLUMNS)) if name in PAPER else None) for name in TABLES[a.table]]

    def set_up(one):
        one.backbone_seed = one.seed if one.backbone_seed is None else one.backbone_seed
        one.lr = a.lr if a.given_lr else default_lr(one)
        return one, run_args(one)

    def more(done):
        lines, some = [], next((r for runs in done.values() for r in runs.values()), None)
        mean = lambda name, key: np.mean([np.array(r[key], float) for r in done[name].values()], 0)
        there, tasks = [name for name in done if done[name]], some and some["tasks"]
        if a.table == "2" and some:
            lines += ["", "Last by task:", "", "| | " + " | ".join(tasks) + " |", "|---" * (1 + len(tasks)) + "|"]
            lines += [f"| {name} | " + " | ".join(f"{x:.1f}" for x in mean(name, "matrix")[-1]) + " |" for name in there]
            lines += ["", "Last with the official scoring (REC, ImageNet and OCRVQA differ): " + ", ".join(
                f"{name} {np.mean([r['official']['Last'] for r in done[name].values()]):.1f}" for name in there)]
        if a.table in ("10", "fig4"):
            for name in there:
                A = mean(name, "matrix")
                lines += ["", f"{name}, mean of {len(done[name])} seeds (rows: after learning)", "", "```",
                          metrics.format_matrix(A, tasks), "```"]
                metrics.heat_map(A, out / f"matrix-{name}.png", tasks, tasks, f"{name}: A[t,i]")
        if a.table == "fig4" and some:
            near, picked = mean("modalprompt", "similarity"), mean("modalprompt", "selection_counts")
            picked = 100 * picked / picked.sum(1, keepdims=True)
            metrics.heat_map(near, out / "fig4-similarity.png", tasks, tasks, "similarity: prototype x task", 0, 1)
            metrics.heat_map(picked, out / "fig4-selection.png", tasks, tasks, "% of picks: task x prompt set", 0, 34)
            for title, X in (("Similarity of prototype (row) and task (column)", near),
                             ("Share of picks in %: task (row), set (column)", picked)):
                lines += ["", title, "", "```", *(f"{n:<10}" + " ".join(f"{x:6.2f}" for x in row) for n, row in zip(tasks, X)), "```"]
        return lines
    metrics.run_table(a, f"Table {a.table} on {a.data}; the paper's numbers are LLaVA-1.5-7B on CoIN; B: lower is better",
                      rows, [{"seed": s} for s in a.seeds], set_up, run_one, out, COLUMNS, ("Last",), lambda name: "modalprompt",
                      " / ".join(COLUMNS), a.rows if a.run else [], more)


def answer_one(a):
    """--answer IMAGE "question" --prompts FILE: selects among the saved prompts, prints the answer and the tasks chosen."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    image, question = a.answer
    path = Path(a.prompts or "")
    if not a.prompts or not path.is_file():
        raise InputError("--answer needs --prompts FILE, the prompts.safetensors of a run; "
                         f"{a.prompts or 'none'} is not there")
    try:
        method = ModalPrompt.from_tensors(load_file(path))
    except SafetensorError as e:
        raise InputError(f"{path} is not a safetensors file ({e}); use the prompts.safetensors of a run")
    if image != "none" and (problem := picture_problem(image)):
        raise InputError(f"{image}: {problem}; give a picture file, or the word none for a question without a picture")
    results = metrics.finished(path.parent) or {}
    if a.backbone == "mini" and results.get("args", {}).get("backbone", "mini") != "mini":
        raise InputError(f"these prompts belong to --backbone {results['args']['backbone']}; give it and its --clip")
    a.backbone_seed = results.get("args", {}).get("backbone_seed") if a.backbone_seed is None else a.backbone_seed
    vlm, guidance = load_for(a)
    if (vlm.width, guidance.width) != (method.width, method.guidance_width):
        raise InputError(f"{path} was learned for widths {method.width} and {method.guidance_width}, --backbone and --clip "
                         f"have {vlm.width} and {guidance.width}; give the models it was learned with")
    method = method.to(a.device)
    sample = {"image": None if image == "none" else image, "text": question.replace("\\n", "\n"), "pad": True}
    prefix, chosen = method.select(*guidance([sample_picture(sample)], [sample["text"]]))
    names = results.get("tasks") or [str(i + 1) for i in range(len(method.prompts))]
    print(vlm.answer([sample], prefix, max_new_tokens=a.max_new_tokens)[0])
    print(f"prompt sets, nearest last: {' '.join(names[i] for i in chosen[0].tolist())}", file=sys.stderr)


def learned(method, vlm, T):
    """method with T tasks begun and ended, untrained: what costs time does not depend on what was learned."""
    for t in range(T):
        method.begin_task(vlm.embedding.weight, torch.Generator().manual_seed(t))
        method.end_task()
    return method


def bench(a):
    """Parameters, memory, step time and tokens per second of one method; how an answer's time grows with the tasks."""
    seven = a.backbone == "7b"
    if seven:
        meta = a.device == "cpu"
        with torch.device("meta" if meta else a.device):
            torch.set_default_dtype(torch.bfloat16)
            model, processor, clip, clip_processor = tiny_models(mini_coin_words(), **SEVEN_B)
            torch.set_default_dtype(torch.float32)
        vlm, guidance = VLM(model, processor, "plain"), Guidance(clip, clip_processor)
    else:
        vlm, guidance = load_for(a)
    base = sum(p.numel() for p in vlm.model.parameters())
    a.tasks = 8
    method = METHODS[a.method](vlm, guidance.width, 8, a).to(vlm.device)
    for t in range(8):
        method.begin_task(vlm.embedding.weight, torch.Generator().manual_seed(t))
    trained = sum(p.numel() for p in method.parameters() if p.requires_grad)
    row = {"method": a.method, "trainable": trained, "frozen": base, "share_percent": 100 * trained / base}
    if seven and meta:
        print(f"{a.method} at LLaVA-1.5-7B shapes: trainable {trained:,} a task = {row['share_percent']:.2f} % of "
              f"{base:,}; memory and time: not run, that needs a GPU with about 24 GB")
        return row
    samples = instruction_stream(a.data, a.root, 0, a.sizes, a.limit).tasks[0]
    train, test = (samples.train * 99)[:a.batch], (samples.test * 99)[:a.eval_batch]
    sync = torch.cuda.synchronize if a.device == "cuda" else lambda: None

    def seconds(*jobs, repeats=7):
        """The median time of each job, run in turns and changing order so that the machine's moods fall on all of them."""
        times = [[] for _ in jobs]
        for r in range(repeats + 1):
            for job, mine in random.Random(r).sample([*zip(jobs, times)], len(jobs)):
                sync()
                start = time.perf_counter()
                job()
                sync()
                mine += [time.perf_counter() - start] * (r > 0)          # the first round warms up
        return [float(np.median(m)) for m in times]

    def step():
        prefix, extra = method(*(f.to(a.device) for f in guidance_features(guidance, train)))
        nll, n = vlm.loss(train, prefix, method.deep)
        (nll / n + sum(extra.values())).backward()

    def answering(m):
        def job():
            prefix, _ = m.select(*(f.to(a.device) for f in guidance_features(guidance, test)))
            vlm.answer(test, prefix, m.deep, max_new_tokens=8, min_new_tokens=8)
        return job

    vlm.model.requires_grad_(False)
    if trained:
        row["step_seconds"] = seconds(step)[0]
    row["answer_seconds"], row["frozen_answer_seconds"] = (x / len(test) for x in seconds(answering(method),
                                                                                          answering(Frozen(vlm.width))))
    row["tokens_per_second"], row["peak_memory_mb"] = 8 / row["answer_seconds"], metrics.peak_memory_mb()
    if a.method in ("modalprompt", "progressive"):
        few, many = (learned(METHODS[a.method](vlm, guidance.width, T, a).to(a.device), vlm, T) for T in (8, 64))
        x, y = seconds(answering(few), answering(many), repeats=21)
        row["64_over_8_tasks"] = y / x
    print(f"{a.method:<12} trainable {trained:,} ({row['share_percent']:.2f} %)  " + "  ".join(
        f"{k} {v:.4g}" for k, v in row.items() if k not in ("method", "trainable", "frozen", "share_percent")))
    return row


def table6(a, out):
    """Table 6: memory, time and trainable share, one process a method; the backbone stands in the title."""
    import subprocess
    rows = []
    for name in ("moelora", "coda", "modalprompt", "progressive"):
        code = "import json, sys, modalprompt as m; print(json.dumps(m.bench(m.settle(m.parser().parse_args(sys.argv[1:])))))"
        flags = ["--method", name, "--backbone", a.backbone, "--device", a.device, "--batch", str(a.batch),
                 "--eval-batch", str(a.eval_batch), "--dtype", a.dtype, *(["--clip", a.clip] if a.clip else []),
                 *["--smoke"] * a.smoke]
        done = subprocess.run([sys.executable, "-c", code, *flags], capture_output=True, text=True,
                              cwd=Path(__file__).parent)
        if done.returncode:
            raise InputError(f"the bench of {name} failed: {(done.stderr.strip() or '?').splitlines()[-1]}")
        rows.append(json.loads(done.stdout.strip().splitlines()[-1]))
    where = metrics.environment()["hardware"]
    lines = [f"Table 6 on --backbone {a.backbone}, {where}, batch {a.batch}; (paper) is LLaVA-1.5-7B on A6000.", "",
             "| | memory MiB | (paper) | s/step | tokens/s | (paper) | trainable % | (paper) | time at 64 tasks / at 8 |",
             "|---" * 9 + "|"]
    paper = {"moelora": (16784, 2.41, 4.73), "coda": (16073, 2.90, 1.97), "modalprompt": (15517, 3.43, 0.27)}
    show = lambda r, k, form: form.format(r[k]) if k in r else "not run"
    for r in rows:
        memory, speed, share = paper.get(r["method"], ("-",) * 3)
        cells = [r["method"], show(r, "peak_memory_mb", "{:.0f}"), memory, show(r, "step_seconds", "{:.3f}"),
                 show(r, "tokens_per_second", "{:.0f}"), speed, f"{r['share_percent']:.2f}", share,
                 show(r, "64_over_8_tasks", "{:.3f}") if "64_over_8_tasks" in r else "-"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    with atomic(out / "table6.md") as f:
        f.write("\n".join(lines) + "\n")
    with atomic(out / "table6.json") as f:
        json.dump({"rows": rows, "environment": metrics.environment()}, f, indent=1)
    print("\n".join(lines))


# ---------------------------------------------------------------------------------------------------- command line


def parser():
    p = argparse.ArgumentParser(description="ModalPrompt: continual instruction tuning, dual-modality guided prompts.",
                                formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    flag = lambda name, **k: p.add_argument(name, **{"action": argparse.BooleanOptionalAction, **k})
    p.add_argument("--data", default="mini", choices=["mini", "coin"], help="mini-CoIN (built in) or CoIN's files")
    p.add_argument("--root", help="folder of CoIN's files and pictures (--data coin)")
    p.add_argument("--limit", type=int, help="keep this many samples of each CoIN file, seeded")
    p.add_argument("--sizes", type=int, nargs=3, default=(240, 60, 100), help="mini-CoIN: samples a task, train val test")
    p.add_argument("--method", default="modalprompt", choices=list(METHODS), help="the paper's, baselines, the two bounds")
    p.add_argument("--backbone", default="mini", help="mini, a Hugging Face image-text-to-text id, or a folder")
    p.add_argument("--backbone-seed", type=int, help="mini: seed of its pre-training; default 0, in tables the run's own, "
                   "so that their spread holds that of the backbones")
    p.add_argument("--clip", help="CLIP of the guidance: id or folder (mini brings its own)")
    p.add_argument("--template", default="chat", choices=["chat", "vicuna", "plain"], help="how a question is written; "
                   "vicuna is LLaVA-1.5's training string")
    p.add_argument("--text-feature", default="pooled", choices=["pooled", "projected"], help="x_t of Eq. 1 before or "
                   "after CLIP's text projection")
    p.add_argument("--length", type=int, default=10, help="tokens of a prompt set (M in the paper)")
    p.add_argument("--top-k", type=int, default=3, help="prompt sets in the prefix (k)")
    p.add_argument("--lam", type=float, default=0.5, help="weight of the picture in the guidance: 1 picture, 0 text only")
    flag("--fusion", default=True, help="Eq. 4: earlier sets in front while training")
    flag("--selection", default=True, help="Eq. 8: top-k at test; without it all sets")
    p.add_argument("--own-weight", type=float, default=1.0, help="weight of L_Proto in Eq. 7, and of the baselines' own "
                   "losses (L2P and DualPrompt: pull of the keys; CODA-Prompt: orthogonality), as a multiple of their default")
    p.add_argument("--rank", type=int, default=16, help="rank of LoRA; MoELoRA divides it among its experts")
    p.add_argument("--experts", type=int, default=8, help="experts of MoELoRA")
    p.add_argument("--epochs", type=int, default=5)
    p.add_argument("--batch", type=int, default=16)
    p.add_argument("--accum", type=int, default=1, help="parts a batch is computed in; the gradient stays the same")
    p.add_argument("--lr", type=float, help="learning rate; default: per method on mini, 2e-4 elsewhere")
    p.add_argument("--lr-projector", type=float, help="learning rate of Proj_p; default 2e-3 on mini, 2e-4 elsewhere")
    p.add_argument("--eval-batch", type=int, default=100)
    p.add_argument("--max-new-tokens", type=int, help="longest answer; default 12 on mini, 128 elsewhere")
    p.add_argument("--split", default="test", choices=["test", "val"], help="what is scored; val is to choose settings on")
    p.add_argument("--see", default="both", choices=["both", "picture", "question"], help="hide the other modality, in "
                   "training too: how much of a task one modality solves")
    p.add_argument("--seeds", type=int, nargs="+", default=[0])
    p.add_argument("--order", type=int, nargs="+", help="task order, numbers from 0")
    p.add_argument("--device", default="cuda" if torch.cuda.is_available() else
                   "mps" if torch.backends.mps.is_available() else "cpu")
    p.add_argument("--dtype", default="fp32", choices=["fp32", "bf16"], help="of the frozen models; prompts stay fp32")
    flag("--checkpointing", default=False, help="gradient checkpointing: less memory, slower steps")
    p.add_argument("--table", choices=[*TABLES, "6"], help="re-runs this table or figure of the paper and prints both")
    p.add_argument("--rows", nargs="+", help="with --table: run only these rows, by label; finished others are shown too")
    flag("--run", default=True, help="with --table: without it only finished runs are shown")
    flag("--bench", default=False, help="parameters, memory, times of --method; --backbone 7b: at LLaVA-1.5-7B shapes")
    p.add_argument("--answer", nargs=2, metavar=("IMAGE", "QUESTION"), help="answer one question (IMAGE none: no picture)")
    p.add_argument("--prompts", help="prompts.safetensors of a finished run, for --answer")
    flag("--smoke", default=False, help="everything once, tiny: under a minute")
    flag("--resume", default=False, help="go on from the last finished epoch")
    flag("--quiet", default=False, help="print the last lines only")
    p.add_argument("--out", default=None, help="run folder; default runs/modalprompt-<method>")
    return p


def settle(a):
    """Fills the defaults that depend on other flags and checks what argparse cannot."""
    mini = a.backbone == "mini"
    if a.smoke:
        a.sizes, a.epochs, a.batch, a.eval_batch = (16, 4, 8), 1, 8, 8
        a.limit = a.limit or 16
    a.sizes = tuple(a.sizes)
    a.given_lr = a.lr is not None
    a.lr = a.lr if a.given_lr else default_lr(a)
    a.lr_projector = a.lr_projector if a.lr_projector is not None else 2e-3 if mini else 2e-4
    a.max_new_tokens = a.max_new_tokens or (12 if mini else 128)
    for name in ("length", "top_k", "epochs", "batch", "accum", "eval_batch", "rank", "experts"):
        if getattr(a, name) < 1:
            raise InputError(f"--{name.replace('_', '-')} is at least 1, not {getattr(a, name)}")
    if not 0 <= a.lam <= 1:
        raise InputError(f"--lam lies in 0..1, not {a.lam}")
    if min(a.sizes) < 1:
        raise InputError(f"--sizes are at least 1, not {' '.join(map(str, a.sizes))}")
    return a


def main(argv=None):
    a = settle(parser().parse_args(argv))
    if a.answer:
        return answer_one(a)
    if a.table == "6":
        return table6(a, Path(a.out or "runs/modalprompt-tables"))
    if a.bench:
        return bench(a)
    if a.table:
        return run_table(a, Path(a.out or "runs/modalprompt-tables"))
    one = lambda job: argparse.Namespace(**{**vars(a), **job, "backbone_seed": a.backbone_seed or 0})
    metrics.run_jobs(f"{a.method} {a.data}", [{"seed": seed} for seed in a.seeds], lambda job, folder: run_one(one(job), folder),
                     a.out or f"runs/modalprompt-{a.method}", COLUMNS)


if __name__ == "__main__":
    run_cli(main)
