"""ModalPrompt: continual instruction tuning of a large multimodal model with dual-modality guided prompts.

Paper     "ModalPrompt: Towards Efficient Multimodal Continual Instruction Tuning with Dual-Modality
          Guided Prompt", EMNLP 2025, arXiv 2410.05849v2.
          Official code: github.com/AuroraZengfh/ModalPrompt at c7bee7c.  Written from the paper; where paper
          and official code differ, the docs list both and what is done here.
Run       python modalprompt.py                  mini-CoIN, eight tasks, one seed: a minute, no downloads
          python modalprompt.py --data coin --root DIR --backbone llava-hf/llava-1.5-7b-hf \\
                 --clip openai/clip-vit-large-patch14-336 --template vicuna --dtype bf16        one GPU
Shapes    B batch, T tasks, t current task, L prompt length (M in the paper), k prompt sets kept, D width of
          the language model, G width of the guidance, S tokens of a sequence, P = k'L tokens of the prefix,
          V words, A answer tokens.   (B,G) is a shape.
Call path main -> run                   the continual protocol: eight tasks, one after the other
            -> learn_task               the steps on one task
              -> look -> Guidance       what CLIP sees and reads: x_v, x_t                          Eq. 1
              -> ModalPrompt.forward    the prompt sets nearest to both: X~_p, and L_Proto          Eq. 2-4, 6
              -> VLM.logits             makes places before the question, runs the frozen model
                -> VLM._call            arms the hook on the embedding layer
                  -> VLM._write_prefix -> join        here the prompts enter the backbone
              -> language_loss          L_LMM                                                       Eq. 5
              -> total_loss             both losses together                                        Eq. 7
            -> evaluate -> ModalPrompt.select           every set competes                          Eq. 8
                        -> VLM.answer -> VLM._call      as above, then the answer                   Eq. 9

One task, one set of L prompt tokens and one prototype.  A frozen CLIP reads the picture and the instruction;
the sets with the nearest prototypes are put in front of the input.  Only the current task's set learns, and
the projector that makes its prototype.
"""
import argparse
import copy
import functools
import inspect
import math
import random
import re
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import metrics
from data import (MINI_COIN, MINI_WORD, InputError, instruction_stream, mini_coin_upstream, mini_coin_words,
                  picture_problem, sample_picture)
from metrics import YES_NO, positive

# ================================================================================================== the paper
# Eq. 1 to 9 in their order of use.  A frozen CLIP guides (Eq. 1), each task has a prototype (Eq. 2), cosines
# with picture and text choose the prompt sets (Eq. 3, 4, 8), and two losses teach (Eq. 5 to 7).  This section
# needs torch alone.


class Guidance(nn.Module):
    """What a frozen CLIP sees in the picture and reads in the instruction (Eq. 1).

    clip: a transformers CLIPModel; processor: its processor.  text_feature "pooled" (official code: the
    end-of-text state before CLIP's text projection) or "projected" (after it, in the space of the picture).
    Pooled needs a text width equal to the projection width, as in CLIP-L; else the projected one is used.
    """

    def __init__(self, clip, processor, text_feature="pooled"):
        super().__init__()
        # The guide never learns: what it sees of a sample is the same in every epoch and task.
        self.clip, self.processor = clip.requires_grad_(False).eval(), processor
        self.width = clip.config.projection_dim                          # G
        # Both features must have G numbers, or no prototype could be compared with both.
        same_width = clip.config.text_config.hidden_size == self.width
        self.text_feature = text_feature if same_width else "projected"

    def pixels(self, image):
        """What the picture tower is shown, (1,3,h,w), of a PIL picture or None."""
        return None if image is None else self.processor(images=image, return_tensors="pt")["pixel_values"]

    @torch.no_grad()
    def forward(self, images, texts):
        """images: list of B PIL pictures, their pixels() or None; texts: B instructions -> x_v (B,G), x_t (B,G), float32.

        A sample without a picture has a row of zeros in x_v, which every formula below reads as "no picture".
        """
        device = self.clip.device
        x_v = torch.zeros(len(texts), self.width, device=device)         # (B,G)
        seen = [b for b, image in enumerate(images) if image is not None]
        if seen:
            pixels = [x if torch.is_tensor(x) else self.pixels(x) for x in (images[b] for b in seen)]
            pixels = torch.cat(pixels).to(device, self.clip.dtype)       # (B,3,h,w)
            # What stands in the picture: the class token after the last norm, then CLIP's own projection.
            # x_v = Proj_v(E_I(X_v))                                                                     Eq. 1
            state = self.clip.vision_model(pixel_values=pixels).pooler_output
            x_v[seen] = self.clip.visual_projection(state).float()
        tokens = self.processor(text=list(texts), return_tensors="pt", padding=True, truncation=True,
                                max_length=77)
        # What the instruction asks: the state of its end-of-text token.
        # x_t = E_T(X_instruct)                                                                          Eq. 1
        x_t = self.clip.text_model(input_ids=tokens["input_ids"].to(device),
                                   attention_mask=tokens["attention_mask"].to(device)).pooler_output
        if self.text_feature == "projected":
            x_t = self.clip.text_projection(x_t)
        return x_v, x_t.float()                                          # (B,G) (B,G)


def vocabulary_rows(token_embeddings, shape, generator=None):
    """Copies of random rows of token_embeddings (V,D), (*shape,D): words that the language model can read."""
    rows = torch.randint(len(token_embeddings), shape, generator=generator).to(token_embeddings.device)
    return token_embeddings.detach()[rows].float().clone()


class ModalPrompt(nn.Module):
    """The prompts X_p^t, their prototypes, and the choice between them.

    width D, guidance_width G, length L (M in the paper, 10), top_k k (3), answer_k: another k for answering
    (default k), lam: weight of the picture in the guidance, so that 0.5 ranks like the paper's alpha + beta,
    1 is picture only and 0 text only (Table 3).
    fusion=False trains each task with its own set alone; selection=False answers with all sets, oldest first
    (Table 5).  distractors=True, not in the paper: each task learns behind k-1 sets of random words, and so
    learns to answer whatever stands in front.  Earlier sets are frozen and never written again; a task keeps its set and
    its prototype, its projector is dropped, so that an old prototype cannot drift.  Raises ValueError for a bad
    setting.
    """

    needs_guidance, one_stage = True, False
    # Rates of the prompts (the best of a grid) and of Proj_p on mini-CoIN; the paper's 2e-4 elsewhere.
    lr, lr_projector, lr_large = 1.3e-2, 2e-3, 2e-4

    def __init__(self, width, guidance_width, length=10, top_k=3, lam=0.5, fusion=True, selection=True,
                 answer_k=None, distractors=False):
        super().__init__()
        if top_k < 1 or length < 1 or not 0 <= lam <= 1:
            raise ValueError(f"top_k and length from 1 on, lam in 0..1, not {top_k}, {length}, {lam}")
        self.width, self.guidance_width, self.length = width, guidance_width, length
        self.top_k, self.answer_k, self.lam = top_k, answer_k or top_k, lam
        self.fusion, self.selection, self.distractors = fusion, selection, distractors
        self.prompts = nn.ParameterList()                                # t sets X_p^i, each (L,D)
        self.projector = None                                            # Proj_p^t of the current task only
        # A buffer and no parameter: prototypes of finished tasks are constants, but saved with the rest.
        self.register_buffer("kept", torch.zeros(0, guidance_width))     # (t or t-1,G)

    def begin_task(self, token_embeddings, generator=None):
        """Adds X_p^t and Proj_p^t, and freezes all earlier sets.

        token_embeddings (V,D): the vocabulary of the language model.  generator: of the random rows.
        """
        self.end_task()
        device, self.words = token_embeddings.device, token_embeddings.detach()
        # A prompt starts as random words: the language model understands it from the first step on.
        self.prompts.append(nn.Parameter(vocabulary_rows(token_embeddings, (self.length,), generator)))
        # Proj_p^t leads from the width of the language model to that of the guidance: a small MLP.
        self.projector = nn.Sequential(nn.Linear(self.width, self.width), nn.SiLU(),
                                       nn.Linear(self.width, self.guidance_width)).to(device)
        self.kept = self.kept.to(device)

    @torch.no_grad()
    def end_task(self):
        """Freezes X_p^t and keeps c_t as a constant.  Does nothing when no task is open."""
        self.kept, self.projector = self.prototypes, None                # (t,G)
        # Frozen means frozen: what is finished gets no gradient from any later task.
        self.prompts.requires_grad_(False)

    def _current_prototype(self):
        # What a task is about, where the guidance lives: the MLP on each of its L tokens, then their mean.
        # c_t = Proj_p(X_p^t)                                                                            Eq. 2
        return self.projector(self.prompts[-1]).mean(0)                  # (L,D) -> (L,G) -> (G,)

    @property
    def prototypes(self):
        """(t,G): one row per learned task; the row of the current task carries gradient."""
        if self.projector is None:
            return self.kept
        return torch.cat([self.kept, self._current_prototype()[None]])

    def similarities(self, x_v, x_t):
        """alpha (B,t) and beta (B,t): cosines of every prototype with the picture and with the instruction.

        A row of zeros in x_v (no picture) has alpha = 0 and sends no gradient.
        """
        c = F.normalize(self.prototypes, dim=-1)                         # (t,G)
        # How near each task is to what is seen.
        # alpha_i = cos(c_i, x_v)                                                                        Eq. 3
        alpha = F.normalize(x_v, dim=-1) @ c.T                           # (B,G) @ (G,t) -> (B,t)
        # How near each task is to what is asked.
        # beta_i = cos(c_i, x_t)                                                                         Eq. 3
        beta = F.normalize(x_t, dim=-1) @ c.T                            # (B,G) @ (G,t) -> (B,t)
        return alpha, beta

    def scores(self, x_v, x_t):
        """lam alpha + (1 - lam) beta, (B,t): what Eq. 4 and Eq. 8 rank by; without a picture beta alone."""
        alpha, beta = self.similarities(x_v, x_t)
        # Both modalities guide; where there is no picture, its weight is 0.
        lam = self.lam * (x_v != 0).any(-1, keepdim=True)                # (B,1)
        return lam * alpha + (1 - lam) * beta                            # (B,t)

    def gather(self, chosen):
        """chosen (B,k') task numbers in prefix order -> prefix (B,k'L,D), a task's L tokens together."""
        # (t,L,D)[(B,k')] -> (B,k',L,D) -> (B,k'L,D)
        return torch.stack(list(self.prompts))[chosen].flatten(1, 2)

    def forward(self, x_v, x_t):
        """Training on task t: x_v (B,G), x_t (B,G) -> prefix (B,k'L,D), {"proto": ()}.  k' = min(k,t).

        The k-1 nearest of the earlier sets in ascending order, then the current set: it is always in.
        """
        if self.projector is None:
            raise RuntimeError("no task is open: call begin_task first, or select to answer")
        t = len(self.prompts)
        earlier = min(self.top_k - 1, t - 1) if self.fusion and not self.distractors else 0
        # A choice has no gradient.  Eq. 6 teaches the projector and, a little, the prompts; Eq. 5 the prompts.
        with torch.no_grad():
            # What earlier tasks know helps the current one: the sets nearest to this sample, and its own.
            # topk is descending; flipped, the most similar earlier set lies next to the current one.
            # X~_p^t = X_p^{<=t} o I_k{alpha^{<=t} + beta^{<=t}},  t in I_k                              Eq. 4
            chosen = self.scores(x_v, x_t)[:, :-1].topk(earlier, -1).indices.flip(-1)         # (B,k'-1)
            chosen = torch.cat([chosen, chosen.new_full((len(x_v), 1), t - 1)], -1)              # (B,k')
        alpha, beta = self.similarities(x_v, x_t)                        # (B,t) (B,t)
        # The prototype of the task moves to what its samples look like and ask, on average over the batch.
        # L_Proto = [1 - cos(c_t, x_v)] + [1 - cos(c_t, x_t)]                                            Eq. 6
        proto = ((1 - alpha[:, -1]) + (1 - beta[:, -1])).mean()          # ()
        prefix = self.gather(chosen)                                     # (B,k'L,D)
        if self.distractors:
            noise = vocabulary_rows(self.words, (len(x_v), (self.top_k - 1) * self.length))      # (B,(k-1)L,D)
            prefix = torch.cat([noise, prefix], 1)
        return prefix, {"proto": proto}

    @torch.no_grad()
    def select(self, x_v, x_t):
        """Answering: x_v (B,G), x_t (B,G) -> prefix (B,k'L,D), chosen (B,k').  No task number goes in."""
        t = len(self.prompts)
        if t == 0:
            raise RuntimeError("no task is learned: call begin_task and train first")
        if not self.selection:
            chosen = torch.arange(t, device=x_v.device).expand(len(x_v), t)
        else:
            # As in Eq. 4, but every task learned so far competes, for each sample by itself; nearest last.
            # X~_p^eval = X_p^{<=T} o I_k{alpha^{<=T} + beta^{<=T}}                                      Eq. 8
            chosen = self.scores(x_v, x_t).topk(min(self.answer_k, t), -1).indices.flip(-1)      # (B,k')
        return self.gather(chosen), chosen

    def tensors(self):
        """What is needed to answer: a flat dict of tensors for safetensors; 0.17 MB a task at D = 4096."""
        return {"prompts": torch.stack(list(self.prompts)).detach(), "prototypes": self.prototypes.detach(),
                "top_k": torch.tensor(self.answer_k), "lam": torch.tensor(self.lam),
                "selection": torch.tensor(int(self.selection))}

    @classmethod
    def from_tensors(cls, saved):
        """A ModalPrompt that can select, from `tensors()`.  Raises ValueError for bad ones."""
        wrong = {"prompts", "prototypes", "top_k", "lam"} - set(saved)
        if wrong or saved["prompts"].ndim != 3 or saved["prototypes"].shape[:1] != saved["prompts"].shape[:1]:
            raise ValueError(f"{', '.join(sorted(wrong)) or 'shapes that fit'} missing; use the prompts.safetensors "
                             "of a run with --method modalprompt")
        _, L, D = saved["prompts"].shape
        method = cls(D, saved["prototypes"].shape[1], L, int(saved["top_k"]), float(saved["lam"]),
                     selection=bool(saved.get("selection", torch.tensor(1))))
        method.prompts.extend(nn.Parameter(p.float(), requires_grad=False) for p in saved["prompts"])
        method.kept = saved["prototypes"].float()
        return method


def join(prefix, h, places):
    """[X~_p; X_v; X_instruct], the bracket of Eq. 5 and 9: prefix (B,P,D) into h (B,S,D) at places (B,S).

    The sequence was made with P free places after its first token, so that positions and masks fit already.
    """
    # The frozen model reads prompts, picture and instruction as one sequence.
    # [X~_p; X_v; X_instruct]                                                                         Eq. 5, 9
    return h.masked_scatter(places[..., None], prefix.to(h.dtype))       # (B,S,D)


def language_loss(logits, labels):
    """L_LMM, summed over the batch's answer tokens.  logits (B,A,V), labels (B,A), -100 for no token."""
    # Prompts are good when the frozen model, having read them, gives each next token of the answer.
    # L_LMM = -sum_l log p(y_l | [X~_p; X_v; X_instruct; y_<l]; theta)                                   Eq. 5
    return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum")   # ()


def total_loss(language, losses, weight=1.0):
    """What a step minimises, ().  language (): L_LMM; losses: of `forward`, for ModalPrompt {"proto": ()}."""
    # The prompts learn to answer, and their prototype learns to be found: together, with equal weight.
    # L_Total = L_Proto + L_LMM                                                                          Eq. 7
    return language + weight * sum(losses.values())                      # ()


# =============================================================================================== the backbone
# Any image-text-to-text model of transformers, frozen.  The prompts enter at one place: a hook on the
# embedding layer writes them over placeholder tokens (VLM._write_prefix).  Baselines that prompt deeper
# layers use one more hook a layer (VLM._deep_hook).
PLAIN = "USER: {image}{text} ASSISTANT:"
VICUNA = ("A chat between a curious user and an artificial intelligence assistant. The assistant gives "
          "helpful, detailed, and polite answers to the user's questions. " + PLAIN)
# What this way of learning would get wrong without a word, by the name in the model's configuration.
UNSUPPORTED = {"paligemma": "in evaluation mode it reads an answer in both directions, so that training "
               "would show it the words it has to foretell"}


class LayeredPrefix(NamedTuple):
    """A prefix for the input, and others that replace it in deeper layers.  Most methods need no others."""
    soft: torch.Tensor                                                   # (B,P,D)  in front of the input
    deep: dict                                                  # {layer: (B,n,D)}  the last n of the P places


def layered(prefix):
    """A tensor (B,P,D) as a LayeredPrefix without deep layers; a LayeredPrefix as it is."""
    return prefix if isinstance(prefix, LayeredPrefix) else LayeredPrefix(prefix, {})


class VLM:
    """A frozen Hugging Face image-text-to-text model that reads a prefix of soft tokens.

    The prefix takes the places of P placeholder tokens (an ordinary id, masked by position) after BOS: a hook
    on the embedding layer writes it there.  Every tensor of token shape grows with them, so that models which
    compute positions from ids (the Qwen family) stay right, which `inputs_embeds` would silently break.  The
    hook counts its firings.  A prefix is (B,P,D), or a LayeredPrefix.
    template: "chat" the processor's own chat template, "vicuna" LLaVA-1.5's training string, "plain" the same
    without its first sentence.
    """

    def __init__(self, model, processor, template="chat"):
        if (kind := model.config.model_type) in UNSUPPORTED:
            raise InputError(f"{kind} cannot be used: {UNSUPPORTED[kind]}")
        self.model, self.processor = model.requires_grad_(False).eval(), processor
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.embedding = model.get_input_embeddings()
        self.width, self.device = self.embedding.weight.shape[1], self.embedding.weight.device
        speaks = template != "chat" or getattr(processor, "chat_template", None)
        self.template = template if speaks else "plain"
        self.eos, self.pad = self.tokenizer.eos_token_id, self.tokenizer.pad_token_id
        if self.pad is None:
            self.pad = self.eos
        # The tokenizer's own first token.  SmolVLM names one that it never adds: there it begins a turn.
        first = self.tokenizer("a")["input_ids"][0]
        self.bos = first if first == self.tokenizer.bos_token_id else None
        # The prefix and its places while the model runs, and None otherwise.
        self._items, self._prefix, self._places, self.fired = {}, None, None, 0
        self.embedding.register_forward_hook(self._write_prefix)
        self.layers = model.get_decoder().layers
        # What torch.compile gets: attention is compiled anew for each layer's cache, so it stays as it is.
        self.parts = [part for layer in self.layers for name, part in layer.named_children() if "attn" not in name]
        for i, layer in enumerate(self.layers):
            layer.register_forward_pre_hook(functools.partial(self._deep_hook, i), with_kwargs=True)

    @property
    @torch.no_grad()
    def vocabulary(self):
        """(V,D): the words as the model reads them (Gemma's embedding layer scales its rows)."""
        return self.embedding(torch.arange(len(self.embedding.weight), device=self.device))

    # ---- where the prompts enter
    def _places_of(self, B, S):
        """The placeholder mask (B,S) for this call; None where there are none (cached decoding)."""
        if self._prefix is None or S != self._places.shape[1]:
            return None
        if B % len(self._places):
            raise RuntimeError(f"the model runs a batch of {B} for a prefix of {len(self._places)}")
        return self._places.repeat_interleave(B // len(self._places), 0)      # beams: every row several times

    def _write_prefix(self, module, inputs, out):
        """The hook on the embedding layer: ids (B,S) became out (B,S,D); here the prefix is written."""
        ids = inputs[0]
        places = self._places_of(*ids.shape) if ids.ndim == 2 else None
        if places is None:
            return None
        self.fired += 1
        soft = self._prefix.soft
        return join(soft.repeat_interleave(len(ids) // len(soft), 0), out, places)    # here the prompts enter

    def _deep_hook(self, i, module, inputs, kwargs):
        """The hook before layer i: what the prefix has for this layer replaces what stands there."""
        deep = self._prefix.deep.get(i) if self._prefix is not None else None
        h = inputs[0] if inputs else kwargs["hidden_states"]
        places = self._places_of(*h.shape[:2]) if deep is not None else None
        if places is None:
            return None
        # deep (B,n,D) takes the last n of the P places: count them from the right.
        last = places & (places.flip(-1).cumsum(-1).flip(-1) <= deep.shape[1])
        h = join(deep.repeat_interleave(len(h) // len(deep), 0), h, last)
        return ((h, *inputs[1:]), kwargs) if inputs else (inputs, {**kwargs, "hidden_states": h})

    def _call(self, function, prefix, places, **kwargs):
        """function(**kwargs) with a LayeredPrefix armed.  Raises RuntimeError unless the hook fired once."""
        if prefix.soft.shape[1] == 0:
            return function(**kwargs)
        self._prefix, self._places, self.fired = prefix, places, 0
        try:
            out = function(**kwargs)
        finally:
            self._prefix = None
        if self.fired != 1:
            raise RuntimeError(f"the prompts went in {self.fired} times instead of once: this model cannot be used, it "
                               "does not embed its input ids through get_input_embeddings()")
        return out

    # ---- samples to tensors
    def _item(self, sample):
        """One sample through the processor: a dict of tensors, (1,S) for tokens.  Kept by its `key`."""
        key = sample.get("key")
        if key in self._items:
            return self._items[key]
        image = sample_picture(sample)
        if self.template == "chat":
            content = [{"type": "image"}] * (image is not None) + [{"type": "text", "text": sample["text"]}]
            text = self.processor.apply_chat_template([{"role": "user", "content": content}], tokenize=False,
                                                      add_generation_prompt=True)
        else:
            mark = "" if image is None else getattr(self.processor, "image_token", "<image>") + "\n"
            text = (VICUNA if self.template == "vicuna" else PLAIN).format(image=mark, text=sample["text"])
        bos = self.tokenizer.bos_token
        more = {"add_special_tokens": False} if bos and text.startswith(bos) else {}     # never a second BOS
        if image is not None:
            more["images"] = [image]
        item = dict(self.processor(text=[text], return_tensors="pt", **more))
        item.pop("labels", None)                                         # ours are those of Eq. 5
        if key is not None:
            self._items[key] = item
        return item

    def answer_ids(self, sample):
        """The answer's tokens and the end of sequence, a list of ids."""
        return self.tokenizer(sample["answer"], add_special_tokens=False)["input_ids"] + [self.eos]

    def encode(self, samples, P, items=None, answers=False):
        """samples -> (inputs, places (B,S) of the P placeholders, labels (B,A) or None).

        A row is   padding | BOS | P placeholders | picture and question | answer | padding   so that
        questions end in the same column, the answers fill the last A columns, so A + 1 columns need logits.
        labels: answer tokens and end of sequence, -100 elsewhere (never the prompts).
        """
        items = items or self.read(samples)
        tails = [torch.tensor(self.answer_ids(s) if answers else [], dtype=torch.long) for s in samples]
        inputs = {}
        for name in {k for item in items for k in item}:
            # A tensor of token shape grows with the placeholders; all others are pictures and their sizes.
            of_tokens = any(name in item and item[name].shape == item["input_ids"].shape for item in items)
            inputs[name] = self._pad_tokens(name, items, tails, P) if of_tokens else self._pad_pictures(name, items)
        places = self._pad_tokens("placeholders", items, tails, P).bool().to(self.device)
        labels = nn.utils.rnn.pad_sequence(tails, True, -100).to(self.device) if answers else None
        return {k: v.to(self.device) for k, v in inputs.items()}, places, labels

    def _pad_tokens(self, name, items, tails, P):
        """One tensor (B,S) of token shape: ids, attention mask, token types, or the placeholders."""
        # What stands in padding, in a placeholder, and at an answer token (None: the token itself).
        padding, placeholder, said = {"input_ids": (self.pad, self.eos, None), "attention_mask": (0, 1, 1),
                                      "placeholders": (0, 1, 0)}.get(name, (0, 0, 0))
        questions, answers = [], []
        for item, tail in zip(items, tails):
            ids = item["input_ids"][0]
            own = item[name][0].long() if name in item else torch.zeros_like(ids)
            head = int(self.bos is not None and ids[0] == self.bos)      # 1 where a BOS comes first, else 0
            questions.append(torch.cat([own[:head], own.new_full((P,), placeholder), own[head:]]))
            answers.append(tail if said is None else torch.full_like(tail, said))
        pad = nn.utils.rnn.pad_sequence
        return torch.cat([pad(questions, True, padding, "left"), pad(answers, True, padding)], 1)  # (B,S)

    def _pad_pictures(self, name, items):
        """Pictures of different sizes, and what describes them: zeros at their ends, then joined."""
        parts = [item[name] for item in items if name in item]
        largest = [max(n) for n in zip(*(part.shape[1:] for part in parts))]
        out = parts[0].new_zeros(sum(map(len, parts)), *largest)
        for place, part in zip(out.split([*map(len, parts)]), parts):
            place[tuple(map(slice, part.shape))] = part                  # from the start of every axis
        return out.to(self.model.dtype) if out.is_floating_point() else out

    # ---- learning and answering
    def read(self, samples):
        """What the processor makes of B samples, on the CPU: their pictures and tokens, ahead of the step."""
        return [self._item(s) for s in samples]

    def loss(self, samples, prefix, items=None):
        """L_LMM of Eq. 5 as a sum over the batch's answer tokens, and the number of these tokens."""
        logits, labels = self.logits(samples, prefix, items)
        return language_loss(logits, labels), (labels != -100).sum()

    def logits(self, samples, prefix, items=None):
        """What foretells each answer token, (B,A,V), and the tokens, (B,A), -100 where there is none."""
        prefix = layered(prefix)
        inputs, places, labels = self.encode(samples, prefix.soft.shape[1], items, answers=True)
        A = labels.shape[1]
        out = self._call(self.model, prefix, places, **inputs, logits_to_keep=A + 1, use_cache=False)
        # The logits that foretell a token stand one place before it.
        return out.logits[:, -(A + 1):-1].float(), labels                # (B,A,V), (B,A)

    @torch.no_grad()
    def answer(self, samples, prefix, max_new_tokens=32, items=None, **generate):
        """Eq. 9, greedy: list of B strings.  prefix (B,P,D), P may be 0; items: of read(samples)."""
        prefix = layered(prefix)
        inputs, places, _ = self.encode(samples, prefix.soft.shape[1], items)
        how = {"do_sample": False, "num_beams": 1, "max_new_tokens": max_new_tokens, "pad_token_id": self.pad}
        how.update(generate)
        # No task number and no other weights: the frozen model f, and the chosen prompts in front.
        # y = f([X~_p; X_v; X_instruct]; theta)                                                          Eq. 9
        tokens = self._call(self.model.generate, prefix, places, **inputs, **how)[:, places.shape[1]:]
        return [text.strip() for text in self.tokenizer.batch_decode(tokens, skip_special_tokens=True)]


class Backbone(NamedTuple):
    """What is frozen: the model that answers, and the CLIP that guides."""
    vlm: VLM
    guidance: Guidance


def transformers_quietly():
    """The transformers package without its chatter."""
    import warnings

    import transformers
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", message=".*torchvision.*")
    return transformers


def load_backbone(args, stream=None):
    """Backbone of --backbone "mini", a Hugging Face id or a folder.  InputError if not to be had."""
    tf = transformers_quietly()
    kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.dtype]
    if args.backbone != "mini" and args.clip is None:
        raise InputError("--clip is needed with this --backbone: the CLIP that guides, for instance "
                         "openai/clip-vit-large-patch14-336 or a folder")
    if args.backbone == "mini":
        model, processor, clip, clip_processor = small_models(args.backbone_seed)
        for p in model.parameters():                                     # tables of positions stay in fp32
            p.data = p.data.to(kind)
    else:
        model = metrics.from_pretrained(tf.AutoModelForImageTextToText, args.backbone, "--backbone", dtype=kind)
        processor = metrics.from_pretrained(tf.AutoProcessor, args.backbone, "--backbone")
    if args.clip is not None:
        # Full precision whatever --dtype says: bf16 would change which sets are nearest.
        clip = metrics.from_pretrained(tf.CLIPModel, args.clip, "--clip", dtype=torch.float32)
        clip_processor = metrics.from_pretrained(tf.AutoProcessor, args.clip, "--clip")
    vlm = VLM(model.to(args.device), processor, args.template)
    if args.checkpointing:
        # A layer keeps what enters it and runs again in the backward pass.  What enters has the prompts in it
        # already: they come before the layer's forward.  transformers' own way needs training mode, in which
        # the model would answer too, and starts before the prompts come.
        for layer in vlm.layers:
            layer.forward = functools.partial(checkpoint, layer.forward, use_reentrant=False)
    return Backbone(vlm, Guidance(clip.to(args.device), clip_processor))


# =========================================================================================== compared methods
# One protocol for all, the paper's class above included:
#   begin_task(token_embeddings, generator)   once a task, before it is learned
#   forward(x_v, x_t) -> prefix, losses       a step of training
#   select(x_v, x_t) -> prefix, chosen        an answer
#   end_task()                                freezes what belongs to the task
# and two that few have:
#   compare(logits, labels, again) -> loss    a step of training: summed over answer tokens, as Eq. 5's is before
#                                             it is their mean; again() computes the logits anew
#   remember(vlm, samples)                    after a task: looks at its samples
# Class attributes: lr, the rate on mini-CoIN (each the best of a grid); lr_large, the paper's, on real
# backbones; needs_guidance, whether CLIP has to look; one_stage, whether it learns all tasks at once.  A
# constructor asks by name for what it needs: see build_method.


class Method(nn.Module):
    """What the compared methods share.  What stands in a ParameterList belongs to one task each."""
    needs_guidance, one_stage, lr, lr_large = False, False, 0.0, 2e-4

    def __init__(self, width):
        super().__init__()
        self.width = width

    def begin_task(self, token_embeddings, generator=None):
        pass

    def end_task(self):
        for bank in self.children():
            if isinstance(bank, nn.ParameterList):
                bank.requires_grad_(False)

    def forward(self, x_v, x_t):
        return self.select(x_v, x_t)[0], {}

    def select(self, x_v, x_t):
        return x_v.new_zeros(len(x_v), 0, self.width), None


class Frozen(Method):
    """Zero-shot: the frozen model as it is."""
    one_stage = True


class LoRA(nn.Module):
    """Low-rank adapters on every linear layer of the language model, several experts of them if wanted.

    W x + alpha/r sum_e g_e(x) B_e A_e x,  g = softmax(W_g x) over the experts (1 for one).  B starts at zero.
    """

    def __init__(self, vlm, rank=8, alpha=16, experts=1):
        super().__init__()
        self.rank, self.scale, self.experts = rank, alpha / rank, experts
        self.A, self.B, self.gate = nn.ParameterList(), nn.ParameterList(), nn.ParameterList()
        for linear in (m for layer in vlm.layers for m in layer.modules() if isinstance(m, nn.Linear)):
            where = {"device": linear.weight.device}
            self.A.append(torch.randn(experts * rank, linear.in_features, **where) / math.sqrt(linear.in_features))
            self.B.append(torch.zeros(linear.out_features, experts * rank, **where))
            if experts > 1:
                self.gate.append(torch.zeros(experts, linear.in_features, **where))
            linear.register_forward_hook(functools.partial(self._hook, len(self.A) - 1))

    def _hook(self, i, module, inputs, out):
        return out + self.delta(i, inputs[0]).to(out.dtype)

    def delta(self, i, x):
        """What the adapters of linear layer i add: x (...,in) -> (...,out)."""
        x = x.float()
        h = x @ self.A[i].T                                              # (...,in) @ (in,E r) -> (...,E r)
        if self.experts > 1:
            g = (x @ self.gate[i].T).softmax(-1)                         # (...,E)
            h = (h.unflatten(-1, (self.experts, self.rank)) * g[..., None]).flatten(-2)
        return h @ self.B[i].T * self.scale                              # (...,E r) @ (E r,out)


class Finetune(Method):
    """Sequential fine-tuning: one LoRA for all tasks, which nothing keeps from forgetting."""
    lr = 5e-4

    def __init__(self, vlm, rank=16):
        super().__init__(vlm.width)
        self.lora = LoRA(vlm, rank, 2 * rank)


class Joint(Finetune):
    """Multi-task training, the upper bound: the same LoRA, on the samples of all tasks at once."""
    lr, one_stage = 2e-4, True


class EWC(Finetune):
    """EWC, online (Kirkpatrick et al. 2017), on the LoRA: stay near the last weights where they mattered."""
    stiffness = 1e5                                                  # lambda, not in the paper

    def __init__(self, vlm, rank=16):
        super().__init__(vlm, rank)
        size = sum(p.numel() for p in self.parameters())
        self.register_buffer("anchor", torch.zeros(size))
        self.register_buffer("fisher", torch.zeros(size))

    def forward(self, x_v, x_t):
        # lambda/2 sum F (theta - theta*)^2
        theta = torch.cat([p.flatten() for p in self.parameters()])
        return self.select(x_v, x_t)[0], {"ewc": self.stiffness / 2 * (self.fisher * (theta - self.anchor) ** 2).sum()}

    def remember(self, vlm, samples):
        # F += mean over samples of (d loss / d theta)^2, one sample at a time
        some, parameters = samples[::max(1, len(samples) // 32)][:32], list(self.parameters())
        for sample in some:
            total, n = vlm.loss([sample], self.anchor.new_zeros(1, 0, self.width))          # no prompts
            g = torch.autograd.grad(total / n, parameters)
            self.fisher += torch.cat([x.flatten() for x in g]) ** 2 / len(some)
        self.anchor.copy_(torch.cat([p.detach().flatten() for p in parameters]))


class LwF(Finetune):
    """LwF (Li and Hoiem 2017), on the LoRA: on the new task's inputs keep the answer tokens' distribution that the
    LoRA before the task gave, KL at temperature 2."""
    weight = 0.33

    def __init__(self, vlm, rank=16):
        super().__init__(vlm, rank)
        self.old = nn.ModuleList(copy.deepcopy(x) for x in (self.lora.A, self.lora.B)).requires_grad_(False)
        self.register_buffer("tasks", torch.zeros((), dtype=torch.long))

    def swap(self):
        lists = self.lora.A, self.lora.B
        self.lora.A, self.lora.B = self.old
        self.old[0], self.old[1] = lists

    def compare(self, logits, labels, again):
        if not self.tasks:
            return 0.0
        with torch.no_grad():
            self.swap()
            before, here = again()[0], labels != -100
            self.swap()
        new, old = (x[here] / 2 for x in (logits, before))                               # (tokens,V)
        return self.weight * 4 * F.kl_div(new.log_softmax(-1), old.softmax(-1), reduction="sum")

    def end_task(self):
        self.tasks += 1
        for old, new in zip(self.old, (self.lora.A, self.lora.B)):
            old.load_state_dict(new.state_dict())


class MoELoRA(Method):
    """CoIN's method: eight LoRA experts of the paper's rank, and a router that mixes them token by token."""
    lr = 2e-3

    def __init__(self, vlm, rank=16, experts=8):
        super().__init__(vlm.width)
        self.lora = LoRA(vlm, rank, 2 * rank, experts)


def query(x_v, x_t):
    """What the prompt pools below are asked with: both modalities, like ours.  (B,G), unit length."""
    return F.normalize(F.normalize(x_v, dim=-1) + F.normalize(x_t, dim=-1), dim=-1)


class L2P(Method):
    """Wang et al. 2022b: one pool for all tasks; the N prompts with the nearest keys go in front.

    Pool of 10, length 10, N = 3 (appendix D); chosen keys are pulled to the query with weight 0.5 (L2P's
    default).
    """
    needs_guidance, lr = True, 2e-3

    def __init__(self, width, guidance_width, pool=10, length=10, top=3, pull=0.5):
        super().__init__(width)
        self.shape, self.top, self.pull = (pool, length), top, pull
        self.pool = nn.Parameter(torch.zeros(pool, length, width))
        self.keys = nn.Parameter(torch.empty(pool, guidance_width).uniform_(-1, 1))

    def begin_task(self, token_embeddings, generator=None):
        if not self.pool.any():                                          # the first task
            self.pool.data.copy_(vocabulary_rows(token_embeddings, self.shape, generator))

    def forward(self, x_v, x_t):
        s = query(x_v, x_t) @ F.normalize(self.keys, dim=-1).T           # (B,G) @ (G,pool) -> (B,pool)
        best, chosen = s.topk(self.top, -1)                              # (B,N) per sample
        return self.pool[chosen].flatten(1, 2), {"pull": self.pull * (1 - best).sum(-1).mean()}

    def select(self, x_v, x_t):
        return self(x_v, x_t)[0], None


class DualPrompt(Method):
    """Wang et al. 2022a, prompt-tuning form: a general prompt (3 tokens) in the lower layers, an expert
    prompt (10) a task in the upper ones, each layer with its own tokens.

    Below its layers an expert place holds a zero vector: it adds nothing, but takes a share of the attention.  The
    expert of the nearest key answers; keys learn 1 - cos to the query.  The prefix is a LayeredPrefix.
    """
    needs_guidance, lr = True, 0.02

    def __init__(self, width, guidance_width, n_layers, general=3, length=10):
        super().__init__(width)
        low = max(1, min(2, n_layers // 2))
        self.low, self.high = list(range(low)), list(range(low, min(n_layers, low + 3)))
        self.length, self.guidance_width = length, guidance_width
        self.general = nn.Parameter(torch.zeros(len(self.low), general, width))
        self.experts, self.keys = nn.ParameterList(), nn.ParameterList()

    def begin_task(self, token_embeddings, generator=None):
        if not self.general.any():                                       # the first task
            self.general.data.copy_(vocabulary_rows(token_embeddings, self.general.shape[:2], generator))
        shape = (len(self.high), self.length)
        self.experts.append(nn.Parameter(vocabulary_rows(token_embeddings, shape, generator)))
        self.keys.append(nn.Parameter(torch.zeros(self.guidance_width, device=token_embeddings.device)))

    def prefix(self, chosen):
        """chosen (B,) -> the general prompt and the chosen experts, each at its layers."""
        B = len(chosen)
        expert = torch.stack(list(self.experts))[chosen]                 # (B,layers,m,D)
        zeros = expert.new_zeros(B, self.length, self.width)
        general = self.general[:, None].expand(-1, B, -1, -1)            # (layers,B,n,D)
        deep = {i: torch.cat([general[j], zeros], 1) for j, i in enumerate(self.low) if i}
        deep.update({i: expert[:, j] for j, i in enumerate(self.high)})  # the last m places of the prefix
        return LayeredPrefix(torch.cat([general[0], zeros], 1), deep)    # (B,n+m,D)

    def forward(self, x_v, x_t):
        now = torch.full((len(x_v),), len(self.experts) - 1, device=x_v.device)
        q = query(x_v, x_t)                                              # (B,G)
        if not self.keys[-1].any():                                      # it starts at the first questions
            self.keys[-1].data.copy_(metrics.summed(q.mean(0)) / metrics.PROCESSES)
        near = (q @ F.normalize(self.keys[-1], dim=-1)).mean()
        return self.prefix(now), {"pull": 1 - near}

    def select(self, x_v, x_t):
        keys = F.normalize(torch.stack(list(self.keys)), dim=-1)         # (t,G)
        chosen = (query(x_v, x_t) @ keys.T).argmax(-1)                   # (B,)
        return self.prefix(chosen), chosen[:, None]


class CODAPrompt(Method):
    """Smith et al. 2023: p = sum_m w_m P_m with w_m = cos(q * A_m, K_m).

    10 components of length 10 (appendix D), shared out over the T tasks; those of earlier tasks are frozen.
    Components, keys and attentions are kept orthogonal.
    """
    needs_guidance, lr = True, 0.05

    def __init__(self, width, guidance_width, tasks, pool=10, length=10, ortho=0.1):
        super().__init__(width)
        self.tasks, self.pool = tasks, max(pool, tasks)                  # at least one component a task
        self.ortho, self.length, self.guidance_width = ortho, length, guidance_width
        self.P, self.K, self.A = nn.ParameterList(), nn.ParameterList(), nn.ParameterList()

    def begin_task(self, token_embeddings, generator=None):
        t = len(self.P)
        n = (t + 1) * self.pool // self.tasks - t * self.pool // self.tasks
        self.P.append(nn.Parameter(vocabulary_rows(token_embeddings, (n, self.length), generator)))
        for bank in (self.K, self.A):                            # unit rows, orthogonal to those before
            new = torch.randn(n, self.guidance_width, generator=generator)
            rows = torch.cat([*(x.detach().cpu() for x in bank), new])
            start = torch.linalg.qr(rows.T).Q.T[-n:]                                    # (n,G)
            bank.append(nn.Parameter(start.to(token_embeddings.device)))

    def banks(self):
        return torch.cat(list(self.P)), torch.cat(list(self.K)), torch.cat(list(self.A))

    def select(self, x_v, x_t):
        P, K, A = self.banks()
        w = F.cosine_similarity(query(x_v, x_t)[:, None] * A, K[None], dim=-1)  # (B,1,G) * (pool,G) -> (B,pool)
        return torch.einsum("bm,mld->bld", w, P), None

    def forward(self, x_v, x_t):
        loss = 0.0
        for bank in self.banks():                                # unit rows, as far from each other as can be
            x = F.normalize(bank.flatten(1), dim=-1)
            loss = loss + (x @ x.T - torch.eye(len(x), device=x.device)).pow(2).mean()
        return self.select(x_v, x_t)[0], {"ortho": self.ortho * loss}


class ProgressivePrompts(Method):
    """Razdaibiedina et al. 2023: the sets of all tasks, in a row, always; only the current one learns."""
    lr = 4e-4

    def __init__(self, width, length=10):
        super().__init__(width)
        self.length, self.prompts = length, nn.ParameterList()

    def begin_task(self, token_embeddings, generator=None):
        self.prompts.append(nn.Parameter(vocabulary_rows(token_embeddings, (self.length,), generator)))

    def select(self, x_v, x_t):
        return torch.cat(list(self.prompts)).expand(len(x_v), -1, -1), None              # (B,tL,D)


METHODS = {"modalprompt": ModalPrompt, "none": Frozen, "finetune": Finetune, "joint": Joint, "ewc": EWC, "lwf": LwF,
           "moelora": MoELoRA, "l2p": L2P, "dualprompt": DualPrompt, "coda": CODAPrompt, "progressive": ProgressivePrompts}


def build_method(args, backbone, stream):
    """The method of --method: its constructor gets what it asks for by name."""
    vlm, kind = backbone.vlm, METHODS[args.method]
    there = {**vars(args), "vlm": vlm, "width": vlm.width, "guidance_width": backbone.guidance.width,
             "n_layers": len(vlm.layers), "tasks": len(stream)}
    asked = {name: there[name] for name in inspect.signature(kind).parameters if name in there}
    with metrics.one_clear_line():
        return kind(**{**asked, **args.options}).to(vlm.device)


# ============================================================================================= learn and test
# The continual protocol: tasks come one after the other, and after each all tasks seen so far are tested,
# without a task number.  Only what the method marks as trainable learns; the backbone and the guide stay as
# they were.


def load_stream(args):
    """The tasks in their order; --see hides one modality of every sample."""
    stream = instruction_stream(args.data, args.root, args.seed, args.sizes, args.limit).reorder(args.order)
    hidden = {"both": {}, "picture": {"text": ""}, "question": {"image": None}}[args.see]
    for task in stream.tasks:
        for sample in (*task.train, *task.val, *task.test):
            sample.update(hidden)
    return stream


def guidance_key(sample):
    """Names what CLIP is shown of a sample: another picture, text or padding is another key."""
    if "guidance" not in sample:
        image = sample["image"]
        file = isinstance(image, (str, Path))
        seen = metrics.file_key(image) if file else image and metrics.content(image.tobytes())
        sample["guidance"] = metrics.digest([seen, sample["text"], sample.get("pad")])
    return sample["guidance"]


@functools.lru_cache(maxsize=1)
def guidance_file(guidance):
    """Where the features of this CLIP are kept, 2G numbers a sample."""
    return metrics.FeatureFile("guidance", [metrics.fingerprint(guidance), guidance.text_feature, inspect.getsource(Guidance)])


def look(backbone, method, samples, quiet=False):
    """CLIP is frozen, so it looks at every sample once, in the first run that needs it."""
    guidance = backbone.guidance
    if method.needs_guidance:
        guidance_file(guidance).fill({guidance_key(s): s for s in samples},
                                     lambda s: (guidance.pixels(sample_picture(s)), s["text"]),
                                     lambda batch: torch.cat(guidance(*zip(*batch)), 1), quiet=quiet)    # (B,2G)


def guide(backbone, method, samples):
    """x_v (N,G), x_t (N,G) of Eq. 1 for a list of samples that CLIP has looked at, on the CPU.  Rows of width 0 for a
    method that needs no guidance."""
    if not method.needs_guidance:
        return torch.zeros(len(samples), 0), torch.zeros(len(samples), 0)
    return guidance_file(backbone.guidance).read([guidance_key(s) for s in samples]).float().chunk(2, 1)


def begin_task(args, backbone, method, t):
    """Begins task t; what it draws depends on the seed and t alone, so a resumed run draws the same."""
    torch.manual_seed(args.seed * 7919 + t)
    method.begin_task(backbone.vlm.vocabulary, torch.Generator().manual_seed(args.seed * 7919 + t))


def learn_task(args, backbone, method, task, run):
    """Trains method on one task: AdamW, warm-up over 3 % of the steps, then constant."""
    learning = {name: p for name, p in method.named_parameters() if p.requires_grad}
    if not learning:                                                     # zero-shot
        return
    # Proj_p has a rate of its own: it starts from random weights, the prompts from words.
    projector = [p for name, p in learning.items() if name.startswith("projector")]
    others = [p for name, p in learning.items() if not name.startswith("projector")]
    groups = [{"params": others, "rate": args.lr}]
    if projector:
        rate = method.lr_projector if args.backbone == "mini" else method.lr_large
        groups.append({"params": projector, "rate": rate})
    optimizer = torch.optim.AdamW(groups, lr=args.lr, weight_decay=0.0)
    samples, vlm = task.train, backbone.vlm
    look(backbone, method, samples, args.quiet)
    lengths = [len(vlm.answer_ids(s)) for s in samples]                  # answer tokens: Eq. 5 is their mean
    steps = math.ceil(len(samples) / args.batch)
    warm = max(1, round(0.03 * args.epochs * steps))
    compare = getattr(method, "compare", lambda *_: 0.0)
    for epoch in run.epochs(args.epochs, learning, optimizer, task.name):
        dice = torch.Generator().manual_seed(args.seed * 1_000_003 + run.stage * 1009 + epoch)
        order, total = torch.randperm(len(samples), generator=dice), 0.0

        def read(i):
            rows = order[i * args.batch:(i + 1) * args.batch].tolist()
            parts = []
            for own, portion in metrics.in_parts(rows, args.accum):
                part = [samples[r] for r in own]
                parts.append((part, portion, vlm.read(part), *guide(backbone, method, part)))
            return sum(lengths[r] for r in rows), parts
        for i, (n_tokens, parts) in enumerate(metrics.ahead(read, run.bar(range(steps)))):
            step = epoch * steps + i
            for group in optimizer.param_groups:
                group["lr"] = group["rate"] * min(1.0, (step + 1) / warm)
            whole = torch.zeros((), device=vlm.device)
            for part, weight, items, x_v, x_t in parts:
                prefix, losses = method(x_v.to(vlm.device), x_t.to(vlm.device))                  # Eq. 2-4, 6
                logits, labels = vlm.logits(part, prefix, items)
                language = language_loss(logits, labels)                                         # Eq. 5
                kept = compare(logits, labels, lambda: vlm.logits(part, prefix, items))
                language = language + args.own_weight * kept
                language = language / n_tokens if weight else 0.0 * language
                loss = total_loss(language, losses, args.own_weight * weight)                    # Eq. 7
                loss.backward()
                whole += loss.detach()
            value = metrics.summed(whole).item()
            run.check(value, step)
            total += value
            metrics.sum_gradients(learning.values())
            nn.utils.clip_grad_norm_([*learning.values()], args.grad_clip)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        run.keep(total / steps)


@torch.no_grad()
def evaluate(args, backbone, method, samples):
    """Answers the samples of one task: {"score", "official"} in points, the latter by the official code's
    scoring; "chosen" (N,k') prompt sets or None; "answers", N strings."""
    look(backbone, method, samples, args.quiet)
    vlm, own, told = backbone.vlm, metrics.mine(samples)[0], []
    parts = [own[i:i + args.eval_batch] for i in range(0, len(own), args.eval_batch)]
    read = lambda part: (part, vlm.read(part), *guide(backbone, method, part))
    for part, items, x_v, x_t in metrics.ahead(read, parts):
        prefix, sets = method.select(x_v.to(vlm.device), x_t.to(vlm.device))                     # Eq. 8
        answers = vlm.answer(part, prefix, args.max_new_tokens, items)                           # Eq. 9
        told += zip(answers, [None] * len(part) if sets is None else sets.cpu())
    answers, chosen = zip(*metrics.gathered(told, len(samples)))

    def points(official):
        score = metrics.score_instruction
        return 100 * float(np.mean([score(s["kind"], y, s, official=official) for s, y in zip(samples, answers)]))
    return {"score": points(False), "official": points(True), "chosen": None if chosen[0] is None else torch.stack(chosen),
            "answers": [*answers]}


def summary(A):
    """The paper's four averages of a matrix (T,T): Last, Avg, B, M (appendix A); of one row only Last."""
    if len(A) == 1 or np.isnan(A[0, 0]):
        return {"Last": float(A[-1].mean())}
    return {"Last": float(metrics.last(A).mean()), "Avg": float(metrics.avg(A).mean()),
            "B": float(metrics.backward_transfer(A).mean()), "M": float(metrics.mean_accuracy(A).mean())}


def run(args, folder):
    """One method, one seed: learns the stream and leaves `folder`; returns what results.json holds."""
    metrics.prepare(args, small=args.backbone == "mini")
    stream = load_stream(args)
    backbone = load_backbone(args, stream)
    torch.manual_seed(args.seed)
    method = build_method(args, backbone, stream)
    metrics.compiled(args, backbone.vlm.parts)
    run, T = metrics.Run(folder, metrics.deciding(args), stream.names, args.resume, args.quiet, args.checkpoint_minutes), len(stream)
    run.say(f"method    {args.method}, backbone {args.backbone}, guidance {backbone.guidance.text_feature}, "
            f"seed {args.seed}, no task id at test")
    run.say(f"setup     {args.epochs} epochs, batch {args.batch} in {args.accum}, lr {args.lr:g}, "
            f"{args.dtype}, {args.device}; " + ", ".join(f"{k} {v}" for k, v in metrics.environment().items()))
    counts = [f"{task.name} {len(task.train)}/{len(task.val)}/{len(task.test)}" for task in stream.tasks]
    run.say(f"samples   {'  '.join(counts)}")
    run.say("\n".join(f"note      {note}" for note in stream.notes))

    for t in range(run.stage + run.begun):                     # a killed run had begun these: as many prompts
        begin_task(args, backbone, method, t)
        if t < run.stage:
            method.end_task()
    run.restore(method=method)                                           # and these are the prompts it had
    for t, task in run.tasks(stream.mixed() if method.one_stage else stream.tasks):
        if not run.begun:                                                # by a killed run
            begin_task(args, backbone, method, t)
            run.kept["trainable"] = sum(p.numel() for p in method.parameters() if p.requires_grad)
        learn_task(args, backbone, method, task, run)
        getattr(method, "remember", lambda *_: None)(backbone.vlm, task.train)
        method.end_task()
        seen = stream.tasks if method.one_stage else stream.tasks[:t + 1]
        told = [evaluate(args, backbone, method, getattr(one, args.split)) for one in seen]
        run.row([one["score"] for one in told])
        run.kept["official"] = float(np.mean([one["official"] for one in told]))
        picks = [one["chosen"] for one in told if one["chosen"] is not None]     # of each task's questions
        run.kept["counts"] = [torch.bincount(x.flatten(), minlength=T).tolist() for x in picks]
        run.kept["own"] = [100 * (x == i).any(1).float().mean().item() for i, x in enumerate(picks)]
        if picks:
            run.say(f"own prompt set in front, % of a task's questions: {' '.join(f'{x:.0f}' for x in run.kept['own'])}")

    trainable = run.kept["trainable"]
    frozen = sum(p.numel() for p in backbone.vlm.model.parameters())
    more, prompts = {}, None
    if args.method == "modalprompt":
        prompts, near = method.tensors(), []
        for task in stream.tasks:                                    # Fig. 4: every prototype with every task
            x_v, x_t = guide(backbone, method, getattr(task, args.split))
            near.append(method.scores(x_v.to(args.device), x_t.to(args.device)).mean(0))
        more["similarity"] = torch.stack(near).T.cpu().numpy()           # (T prototypes, T tasks)
    if args.data == "mini" and not args.smoke:
        bounds = {"frozen": ("zero-shot", "Last"), "fine-tuning": ("finetune", "Last"), "joint": ("multi-task", "Last")}
        run.say(metrics.worth("modalprompt", stream.extra["version"], bounds))
    return run.finish(summary(run.A), prompts, f"{args.method}, seed {args.seed}", notes=stream.notes,
                      world=stream.extra.get("version", args.data), official={"Last": run.kept["official"]},
                      own_percent=run.kept["own"], selection_counts=run.kept["counts"] or np.zeros((T, T)),
                      trainable_a_task=trainable, frozen=frozen, share_percent=100 * trainable / frozen, **more)


# ===================================================================================================== tables
# What makes a row differ from the default command, and what the paper prints: LLaVA-1.5-7B on CoIN.  B: lower
# is better.  Rows without numbers are not in the paper.
COLUMNS = ("Last", "Avg", "B", "M")
PAPER = {"multi-task": (67.10, None, None, None), "zero-shot": (48.89, None, None, None),
         "finetune": (29.06, 17.53, 51.73, 26.19),                    # B: the paper's own formula gives 53.26
         "moelora": (37.48, 28.53, 36.95, 36.29), "coda": (45.46, 39.93, 14.34, 43.18),
         "lwf": (43.91, None, None, None), "ewc": (44.72, None, None, None),
         "dualprompt": (43.05, 36.92, None, None), "l2p": (42.99, 35.91, None, None),
         "modalprompt": (55.06, 54.19, 3.72, 56.10), "image": (51.95, 50.35, None, None),
         "text": (50.39, 49.02, None, None), "fusion only": (37.36, 31.87, 27.09, 34.94),
         "selection only": (44.81, 38.24, 17.16, 40.71)}
CHANGES = {"zero-shot": {"method": "none"}, "multi-task": {"method": "joint"},
           "picture only": {"method": "joint", "see": "picture"},
           "question only": {"method": "joint", "see": "question"},
           "image": {"lam": 1.0}, "text": {"lam": 0.0},
           "fusion only": {"selection": False}, "selection only": {"fusion": False},
           **{f"k {n}": {"top_k": n} for n in (1, 2)}, "k 3, answers with 1": {"options": {"answer_k": 1}},
           "k 3, learned behind random words": {"options": {"distractors": True}},
           **{f"length {n}": {"length": n} for n in (1, 2, 5, 20)},
           **{f"experts {n}": {"method": "moelora", "experts": n} for n in (2, 4, 16)}}


def table_of(title, *labels):
    """A table's title and rows: [(label, changed arguments, the paper's numbers)]; other labels are methods."""
    return {"title": title, "rows": [(x, CHANGES.get(x, {"method": x}), PAPER.get(x)) for x in labels]}


TABLES = {
    "bounds": table_of("Bounds of mini-CoIN: without learning, jointly, from one modality; paper: CoIN",
                       "zero-shot", "multi-task", "picture only", "question only", "finetune"),
    "2": table_of("Table 2: all methods; B: lower is better", "modalprompt", "zero-shot", "finetune",
                  "multi-task", "moelora", "l2p", "dualprompt", "coda", "progressive"),
    "3": table_of("Table 3: which modality guides; B: lower is better", "image", "text", "modalprompt"),
    "5": table_of("Table 5: fusion and selection; B: lower is better",
                  "fusion only", "selection only", "modalprompt"),
    # Learned with k sets, answered with k: 1-1, 2-2, 3-3, 3-1, 1-3, and 1 behind random words - 3.
    "k": table_of("Number k of prompt sets, not in the paper; B: lower is better",
                  "k 1", "k 2", "modalprompt", "k 3, answers with 1", "selection only",
                  "k 3, learned behind random words"),
    "9": table_of("Table 9: regularised LoRA; B: lower is better", "finetune", "lwf", "ewc", "modalprompt"),
    "10": table_of("Tables 10 and 11: whole matrices; B: lower is better",
                   "finetune", "moelora", "modalprompt", "l2p", "dualprompt", "coda"),
    "fig3": table_of("Figure 3: prompt length, and experts of MoELoRA; B: lower is better",
                     *(f"length {n}" for n in (1, 2, 5)), "modalprompt", "length 20",
                     "experts 2", "experts 4", "moelora", "experts 16"),
    "fig4": table_of("Figure 4: what is near to what, and what is chosen; B: lower is better", "modalprompt")}
# Table 6, what --bench prints beside its own figures.
PAPER_6 = {"moelora": "16784 MiB, 2.41 tokens/s, 4.73 %", "coda": "16073 MiB, 2.90 tokens/s, 1.97 %",
           "modalprompt": "15517 MiB, 3.43 tokens/s, 0.27 %"}


# =============================================================================================== command line
# One run, several seeds, a table of the paper, the cost of a method, or one answer: `main` decides at the end
# of this section.  Shared flags and their checks are in metrics.shared_flags; here stand the paper's own.  What
# nobody changes from a command line is an argument of its class, which a row reaches through "options".


def table_notes(args, table):
    """What Tables 2 and 10 and Fig. 4 say beside their rows: lines of Markdown; Fig. 4 draws two pictures."""
    lines = []

    def show(title, A, tasks):
        lines.extend(["", title, "", "```", metrics.format_matrix(A, tasks), "```"])
    for label, runs in table.done().items():
        if not runs or args.table not in ("2", "10", "fig4"):
            continue
        runs = [*runs.values()]
        tasks, n = runs[0]["tasks"], f"mean of {len(runs)} seeds"
        A, near, picked = (np.mean([np.array(r.get(k, np.nan), float) for r in runs], 0)
                           for k in ("matrix", "similarity", "selection_counts"))
        show(f"{label}, {n} (rows: after learning)", A, tasks)
        official = np.mean([r["official"]["Last"] for r in runs])
        lines += ["", f"Last of {label} with the official scoring (REC and ImageNet differ): {official:.1f}"]
        if args.table == "fig4":
            picked /= picked.sum(1, keepdims=True)
            for title, X, name in (("Prototype (row), task (column): cosine x 100", near, "similarity"),
                                   ("Task (row), set (column): share of picks in %", picked, "selection")):
                show(f"{title}, {n}", 100 * X, tasks)
                metrics.heat_map(100 * X, table.folder / f"fig4-{name}.png", tasks, tasks, title)
    return lines


def answer_one(args):
    """--answer IMAGE "question" --prompts FILE: prints the answer and the prompt sets chosen.

    The saved prompts bring their prototypes, so no task number is needed.  The models and the template are
    those of the run that left the file, as results.json beside it says; a flag comes before that.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    image, question = args.answer
    path = Path(args.prompts or "")
    if not path.is_file():
        raise InputError(f"--answer needs --prompts FILE, a run's prompts.safetensors; {path} is not a file")
    if image != "none" and (problem := picture_problem(image)):
        raise InputError(f"{image}: {problem}; give a picture file, or none for a question without a picture")
    try:
        method = ModalPrompt.from_tensors(load_file(path))
    except (SafetensorError, ValueError) as e:
        raise InputError(f"{path} is not a safetensors file of ModalPrompt's prompts ({e})")
    results, unsaid = metrics.finished(path.parent) or {}, vars(parse_args([]))
    for name in ("backbone", "backbone_seed", "clip", "template", "dtype"):
        if getattr(args, name) == unsaid[name]:
            setattr(args, name, results.get("args", {}).get(name, unsaid[name]))
    vlm, guidance = load_backbone(settle(args))
    if (vlm.width, guidance.width) != (method.width, method.guidance_width):
        raise InputError(f"{path} was learned for widths {method.width} and {method.guidance_width}, --backbone "
                         f"and --clip have {vlm.width} and {guidance.width}; give the models it was learned with")
    sample = {"image": None if image == "none" else image, "text": question.replace("\\n", "\n"), "pad": True}
    prefix, chosen = method.to(args.device).select(*guidance([sample_picture(sample)], [sample["text"]]))
    names = results.get("tasks") or [str(i + 1) for i in range(len(method.prompts))]
    print(vlm.answer([sample], prefix, args.max_new_tokens)[0])
    print(f"prompt sets, nearest last: {' '.join(names[i] for i in chosen[0].tolist())}", file=sys.stderr)


def bench(args):
    """Parameters, memory, step time and tokens per second of one method; how time grows with the tasks.

    Beside them stands Table 6 of the paper, where it has the method.
    """
    meta = args.backbone == "7b" and args.device == "cpu"              # shapes only: nothing is stored or run
    if args.backbone == "7b":
        with torch.device("meta" if meta else args.device):
            torch.set_default_dtype(torch.bfloat16)
            model, processor, clip, clip_processor = tiny_models(mini_coin_words(), **SEVEN_B)
            torch.set_default_dtype(torch.float32)
        backbone = Backbone(VLM(model, processor, "plain"), Guidance(clip, clip_processor))
    else:
        backbone = load_backbone(args)
    vlm, row = backbone.vlm, {}
    metrics.compiled(args, vlm.parts)
    task = load_stream(args).tasks[0]
    train, test = (task.train * 99)[:args.batch], (task.test * 99)[:args.eval_batch]

    def begun(T):
        """The method with T tasks begun, untrained: what costs time does not depend on what was learned."""
        method = build_method(args, backbone, range(T))
        for t in range(T):
            method.end_task()
            method.begin_task(vlm.vocabulary, torch.Generator().manual_seed(t))
        return method.to(vlm.device)

    def seen(method, samples):                                       # every time anew: it is what is measured
        pictures, texts = [sample_picture(s) for s in samples], [s["text"] for s in samples]
        return backbone.guidance(pictures, texts) if method.needs_guidance else (torch.zeros(len(samples), 0),) * 2

    def answering(method):                                           # CLIP's guidance is counted apart
        x = seen(method, test)
        return lambda: vlm.answer(test, method.select(*x)[0], max_new_tokens=8, min_new_tokens=8)
    if not meta:                                                       # before LoRA hooks into the model
        row["frozen s/answer"] = metrics.seconds(args.device, answering(Frozen(vlm.width)))[0] / len(test)
    method = begun(8)
    trained, frozen = (sum(p.numel() for p in ps if p.requires_grad == learns) for ps, learns in
                       ((method.parameters(), True), (vlm.model.parameters(), False)))

    def step():
        prefix, losses = method(*shown)
        language, n = vlm.loss(train, prefix)
        total_loss(language / n, losses).backward()
    if not meta:
        shown = seen(method, train)
        if trained:
            row["s/step"] = metrics.seconds(args.device, step)[0]
        method.end_task()
        row["guidance s/sample"] = metrics.seconds(args.device, lambda: seen(method, test))[0] / len(test)
        row["s/answer"] = metrics.seconds(args.device, answering(method))[0] / len(test)
        row |= {"tokens/s": 8 / row["s/answer"], "of frozen tokens/s": row["frozen s/answer"] / row["s/answer"],
                "peak MiB": metrics.peak_memory_mb()}
        if args.method in ("modalprompt", "progressive"):
            few, many = metrics.seconds(args.device, answering(method), answering(begun(64)), repeats=21)
            row["time at 64 tasks / at 8"] = many / few
    print(f"{args.method} on {args.backbone}: trainable {trained:,} a task = {100 * trained / frozen:.2f} % of "
          f"{frozen:,}", *(f" {k} {v:.4g}" for k, v in row.items()),
          " memory and time: not run, that needs a GPU with about 24 GB" * meta,
          f" (paper, A6000: {PAPER_6.get(args.method, '-')})")
    return {"trainable": trained, "frozen": frozen, **row}


def settle(args):
    """Fills the defaults that depend on other flags, for one run, and checks what argparse cannot."""
    args.seed = getattr(args, "seed", args.seeds[0])
    metrics.settle_shared(args)
    mini = args.backbone == "mini"
    if args.smoke:
        args.sizes, args.epochs, args.batch, args.eval_batch = (16, 4, 8), 1, 8, 8
        args.limit = args.limit or 16
    args.sizes = tuple(args.sizes)
    if args.lr is None:
        args.lr = METHODS[args.method].lr if mini else METHODS[args.method].lr_large
    args.max_new_tokens = args.max_new_tokens or (12 if mini else 128)
    return args


def parse_args(argv=None):
    p = metrics.shared_flags("ModalPrompt: continual instruction tuning with dual-modality guided prompts.", METHODS,
                             TABLES, "mini (mini-CoIN, built in) or coin (CoIN's files)",
                             "mini, a Hugging Face image-text-to-text id or a folder; --bench: 7b, LLaVA-1.5-7B's shapes",
                             epochs=5, batch=16, eval_batch=100)
    g = p.add_argument_group("ModalPrompt")
    g.add_argument("--length", type=positive, default=10, help="tokens of a prompt set (M in the paper)")
    g.add_argument("--top-k", type=positive, default=3, help="prompt sets in the prefix (k)")
    g.add_argument("--lam", type=metrics.share, default=0.5, help="weight of the picture in the guidance: 1 picture, 0 text")
    g.add_argument("--fusion", default=True, action=YES_NO, help="Eq. 4: earlier sets in front while training")
    g.add_argument("--selection", default=True, action=YES_NO, help="Eq. 8: top-k at test; without it all sets")
    g.add_argument("--own-weight", type=metrics.weight, default=1.0, help="weight of L_Proto in Eq. 7, and of the baselines' own "
                   "losses (pull of the keys, orthogonality, EWC's penalty, LwF's), as a multiple of their default")
    g.add_argument("--rank", type=positive, default=16, help="rank of LoRA, and of each expert of MoELoRA")
    g.add_argument("--experts", type=positive, default=8, help="experts of MoELoRA")
    g = p.add_argument_group("its data and backbone")
    g.add_argument("--limit", type=positive, help="keep this many samples of each CoIN file, seeded")
    g.add_argument("--sizes", type=positive, nargs=3, default=(240, 60, 100),
                   help="mini-CoIN: samples a task, train val test")
    g.add_argument("--see", default="both", choices=["both", "picture", "question"], help="hide the other modality, in "
                   "training too: how much of a task one modality solves")
    g.add_argument("--clip", help="CLIP of the guidance: id or folder (mini brings its own)")
    g.add_argument("--template", default="chat", choices=["chat", "vicuna", "plain"], help="how a question is written; "
                   "vicuna is LLaVA-1.5's training string")
    g.add_argument("--max-new-tokens", type=positive, help="longest answer; default 12 on mini, 128 elsewhere")
    g.add_argument("--accum", type=positive, default=1, help="parts a batch is computed in, to save memory")
    g.add_argument("--checkpointing", default=False, action=YES_NO, help="less memory, slower steps")
    g = p.add_argument_group("one answer")
    g.add_argument("--answer", nargs=2, metavar=("IMAGE", "QUESTION"), help="answer one question (IMAGE none: no picture)")
    g.add_argument("--prompts", help="prompts.safetensors of a finished run, for --answer")
    args = p.parse_args(argv)
    if args.prompts and not args.answer:
        raise InputError("--prompts is for --answer IMAGE QUESTION; --resume goes on with a run")
    args.options = {}                                                 # arguments of a class that have no flag
    args.out = args.out or f"runs/modalprompt-{'tables' if args.table else args.method}"
    return metrics.check_shared(args, p, ["sizes", "epochs", "batch", "eval_batch"])


def main(argv=None):
    args = parse_args(argv)
    if args.answer:
        return answer_one(args)
    if args.pretrain:
        return pretrain(args)
    if args.bench:
        return bench(settle(args))
    if args.table:
        table = metrics.Table(args, settle, against="modalprompt", columns=COLUMNS, compare=("Last",),
                              paper=" / ".join(COLUMNS), **TABLES[args.table])
        for one, folder in table.missing():
            run(one, folder)
        print(table.write(table_notes(args, table)))
        return
    name, results = f"{args.method} {args.data}", []
    for one, folder in metrics.repetitions(args, settle):
        results.append(run(one, folder))
        print(metrics.last_line(name, results[-1:], COLUMNS))
    metrics.conclude(args.out, name, results, COLUMNS)


# ========================================================================================= the small backbone
# How backbones/mini-coin-<seed>.safetensors was made; nobody needs this to read the method.  A LLaVA and a
# CLIP of transformers, small, learn an upstream mixture (data.mini_coin_upstream) in which none of the
# stream's sentences, instructions or pictures occur.
MINI = {"width": 96, "layers": 3, "clip_width": 64, "pictures": 12_000, "sight_steps": 800, "align_steps": 300, "steps": 4000,
        "clip_steps": 400, "batch": 64, "lr": 2e-3, "short": 0.1, "plain": 0.15}
# short: the share of one-word answers; plain: of questions without a skill word, answered by the caption
MORE_STEPS = {0: 5000}                                  # {seed: steps} where 4,000 do not reach the bounds
FILLERS = ("well", "so", "just", "kindly", "ok")
SEVEN_B = {"width": 4096, "layers": 32, "clip_width": 768, "side": 336, "patch": 14, "heads": 32, "inner": 11008,
           "tower": (1024, 24, 16, 4096), "vocabulary": 32064}   # for --bench: LLaVA-1.5-7B and CLIP-L/14-336


def tiny_models(words, width=96, layers=3, clip_width=64, side=48, patch=16, heads=4, inner=None, tower=None,
                vocabulary=0):
    """An untrained LLaVA and CLIP, small by default, with a word-level tokenizer over `words`.

    tower: (width, layers, heads, inner width) of the two vision towers; default: 2 layers.
    Returns (model, processor, clip, clip_processor), ordinary transformers objects: save_pretrained, Auto
    classes work.
    """
    tf = transformers_quietly()
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
    special = ["<pad>", "<s>", "<unk>", "</s>", "<image>"]      # </s> is 3: CLIP takes 2 for "the largest id"
    words = special + [w for w in dict.fromkeys(["USER", "ASSISTANT", ":", *FILLERS, *words]) if w not in special]

    def tokenizer(end):
        raw = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
        raw.pre_tokenizer = pre_tokenizers.Split(Regex(MINI_WORD), "removed", invert=True)       # keep what matches
        raw.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>" if end else "<s> $A", special_tokens=[("<s>", 1), ("</s>", 3)])
        return tf.PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
                                          unk_token="<unk>", additional_special_tokens=["<image>"], padding_side="left")

    def vision(width):
        hidden, depth, n_heads, wide = tower or (width, 2, 4, 2 * width)
        return {"hidden_size": hidden, "num_hidden_layers": depth, "num_attention_heads": n_heads,
                "intermediate_size": wide, "image_size": side, "patch_size": patch}
    pictures = getattr(tf, "CLIPImageProcessorPil", None) or tf.CLIPImageProcessor      # needs no torchvision
    picture = {"do_resize": True, "size": {"height": side, "width": side}, "do_center_crop": False,
               "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 3}
    language = tf.LlamaConfig(vocab_size=max(len(words), vocabulary), hidden_size=width, intermediate_size=inner or 2 * width,
                              num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=heads,
                              max_position_embeddings=2048, **ids)
    model = tf.LlavaForConditionalGeneration(tf.LlavaConfig(
        vision_config=tf.CLIPVisionConfig(**vision(width)), text_config=language, image_token_index=4,
        image_seq_length=(side // patch) ** 2, vision_feature_layer=-2 if tower else -1))
    processor = tf.LlavaProcessor(pictures(**picture), tokenizer(False), patch_size=patch,
                                  vision_feature_select_strategy="default", num_additional_image_tokens=1)
    clip = tf.CLIPModel(tf.CLIPConfig(projection_dim=clip_width, vision_config=vision(clip_width), text_config={
        "vocab_size": len(words), "hidden_size": clip_width, "intermediate_size": 2 * clip_width, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 128, **ids}))
    text = tokenizer(True)
    text.padding_side = "right"
    return model, processor, clip, tf.CLIPProcessor(pictures(**picture), text)


def small_config(seed):
    """Everything that the training of the small backbone depends on."""
    return {**MINI, "steps": MORE_STEPS.get(seed, MINI["steps"]), "seed": seed, "world": MINI_COIN}


def small_models(seed):
    """(model, processor, clip, clip_processor) with the weights of backbones/mini-coin-<seed>.safetensors."""
    weights = metrics.small_backbone("mini-coin", seed, small_config(seed))
    models = tiny_models(mini_coin_words(), MINI["width"], MINI["layers"], MINI["clip_width"])
    for prefix, model in (("llava.", models[0]), ("clip.", models[2])):
        model.load_state_dict({k.removeprefix(prefix): v for k, v in weights.items() if k.startswith(prefix)})
    return models


def pretrain(args):
    """Makes the small backbone of --backbone-seed anew, measures the bounds on it, keeps both."""
    args, start = settle(metrics.with_seed(args)), time.time()
    torch.set_num_threads(1)
    config = small_config(args.backbone_seed)
    model, clip = pretrained(config, args.quiet)
    tensors = {**{f"llava.{k}": v for k, v in model.state_dict().items()},
               **{f"clip.{k}": v for k, v in clip.state_dict().items()}}
    metrics.keep_with_bounds("mini-coin", args.backbone_seed, config, tensors, start, f"mini-CoIN {MINI_COIN}",
                             sys.modules[__name__], ("Last",))


def pretrained(config, quiet=False):
    """(LLaVA, CLIP), pre-trained in four steps, each easy once the one before is done.

    The vision tower alone names what stands where in a picture, and is frozen; the projector learns to send a
    patch near the words for what it shows, and the language model to answer, LLaVA's two stages; then CLIP.
    Upstream: a terse skill word, before the picture or in the user's turn among filler words; sentences for
    answers unless it says "short"; the caption where there is no skill word.
    """
    torch.manual_seed(config["seed"])
    rng = random.Random(f"upstream {config['seed']}")
    model, processor, clip, _ = tiny_models(mini_coin_words(), config["width"], config["layers"], config["clip_width"])
    pool = [mini_coin_upstream(rng) for _ in range(config["pictures"])]  # (picture, questions, caption, cells)
    blank = np.full((48, 48, 3), 128, np.uint8)
    pixels = np.stack([blank if p[0] is None else np.asarray(p[0]) for p in pool])
    pixels = torch.from_numpy(pixels).permute(0, 3, 1, 2)
    ids = processor.tokenizer.get_vocab()
    seen = torch.tensor([p[0] is not None for p in pool])
    cells = torch.tensor([[[ids[w] if w else 0 for w in cell] for cell in p[3]] for p in pool])          # (N,9,8) words

    def words(text):
        return [ids[w] for w in re.findall(MINI_WORD, text)]

    def fillers(most):
        return " ".join(rng.choice(FILLERS) for _ in range(rng.randint(0, most)))

    def see(rows):                                               # (B,3,48,48), as the image processor does it
        return pixels[rows] / 127.5 - 1

    def fit(what, steps, module, loss_of, choose):
        # The schedule multiplies the optimiser's rate, so that is 1: warm-up, then a cosine to 1 %.
        def rate(step):
            decay = 0.505 + 0.495 * math.cos(math.pi * step / steps)
            return config["lr"] * min(1, (step + 1) / 100) * decay
        learning = [p for p in module.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(learning, 1.0, betas=(0.9, 0.98), weight_decay=0.01)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
        # Clipped over the whole module: the frozen tower's last gradient counts in LLaVA's first norms.
        def clip_all(*_):
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        optimizer.register_step_pre_hook(clip_all)

        def loss(step):
            return loss_of(torch.tensor(rng.choices(choose, k=config["batch"])))
        metrics.fit(f"pre-training the small {what}", loss, optimizer, schedule, steps, quiet=quiet)

    def sight(rows):
        h = tower(see(rows)).last_hidden_state[:, 1:]                    # (B,9,D)
        return F.cross_entropy(eyes(h).unflatten(-1, (8, -1)).flatten(0, 2), cells[rows].flatten())

    def alignment(rows):
        said = F.one_hot(cells[rows][..., :4], len(ids)).sum(2)[..., 1:].float()         # (B,9,V-1): what stands there
        where = said.sum(-1) > 0
        table = model.get_input_embeddings().weight.detach()             # (V,D)
        near = model.model.multi_modal_projector(features[rows]) @ table.T               # (B,9,V)
        return F.cross_entropy(50 * near[..., 1:][where], said[where] / said[where].sum(-1, keepdim=True))

    def dialogue(row):
        """Several questions on one picture: the ids of the line, and 1 where an answer stands."""
        line, mine = [1], [0]
        picture, questions = pool[row][:2]
        for i, (skill, text, answer, sentence) in enumerate(rng.sample(questions, min(4, len(questions)))):
            image = "<image>" * model.config.image_seq_length if i == 0 and picture is not None else ""
            kind = rng.random()
            if kind < config["plain"]:
                skill, answer = "", pool[row][2]
            elif kind < config["plain"] + config["short"]:
                skill = f"{skill} short"
            else:
                answer = sentence
            if rng.random() < 0.5:
                head = f"{skill} USER: {image} {fillers(3)} {text} {fillers(3)} ASSISTANT:"
            else:
                head = f"USER: {image} {fillers(1)} {skill} {text} {fillers(2)} ASSISTANT:"
            head, tail = words(head), words(answer) + [ids["</s>"]]
            line, mine = line + head + tail, mine + [0] * len(head) + [1] * len(tail)
        return torch.tensor(line), torch.tensor(mine)

    def language(rows):
        lines, answers = zip(*(dialogue(row) for row in rows.tolist()))
        x = nn.utils.rnn.pad_sequence(lines, batch_first=True)           # (B,S)
        y = x.masked_fill(nn.utils.rnn.pad_sequence(answers, batch_first=True) == 0, -100)[:, 1:]
        h = model.get_input_embeddings()(x)                              # (B,S,D)
        patches = model.model.multi_modal_projector(features[rows[seen[rows]]])          # (B',9,D)
        h = h.masked_scatter((x == ids["<image>"])[..., None], patches)
        h = model.model.language_model(inputs_embeds=h, use_cache=False).last_hidden_state[:, :-1]
        return F.cross_entropy(model.lm_head(h[y != -100]), y[y != -100])

    def contrast(rows):
        text = [torch.tensor([1, *words(pool[i][2]), ids["</s>"]]) for i in rows.tolist()]
        text = nn.utils.rnn.pad_sequence(text, batch_first=True)
        return clip(pixel_values=see(rows), input_ids=text, attention_mask=(text != 0).long(), return_loss=True).loss

    tower, eyes = model.model.vision_tower, nn.Linear(config["width"], 8 * len(ids))
    shown = seen.nonzero()[:, 0].tolist()
    fit("eyes", config["sight_steps"], nn.ModuleList([tower, eyes]), sight, shown)
    tower.requires_grad_(False).eval()
    with torch.no_grad():                                                # frozen: looked at once
        features = torch.cat([tower(see(part)).last_hidden_state[:, 1:] for part in torch.arange(len(pool)).split(500)])
    fit("projector", config["align_steps"], model.model.multi_modal_projector, alignment, shown)
    fit("LLaVA", config["steps"], model, language, range(len(pool)))
    fit("CLIP", config["clip_steps"], clip.train(), contrast, shown)
    return model.eval(), clip.eval()


if __name__ == "__main__":
    metrics.run_cli(main)
