"""The Audio Spectrogram Transformer and every way to adapt it with few parameters, from scratch.

Papers   AST: Gong, Chung, Glass, "AST: Audio Spectrogram Transformer", arXiv 2104.01778.
         P1:  Cappellazzo et al., "Parameter-Efficient Transfer Learning of Audio Spectrogram
              Transformers", arXiv 2312.03694; its follow-up on mixtures of adapters, 2402.00828.
Sections 1 AST, 2 methods, 3 adapt, 4 pretrained weights, 5 adapter files, 6 demo, 7 faster on CPUs
Axes     B batch, T frames, F mel bins, N tokens, D width, H heads, E embedding size, C classes,
         r rank, f x t the grid of patches (rows of frequency x columns of time).

The AST reads a log-mel: 100 frames a second, each with the log energies of F frequency bands, the
mel bins. It cuts the log-mel into patches, one token each, and puts two learned tokens before them,
CLS and DIST. `adapt` wraps layers of its blocks in small modules. To add a method write it in
section 2 and put one line into METHODS.

    ast = AST("base")                                    # expects F = 128 and T of 16 or more
    ast, sentence = load_pretrained(ast, "audioset_10_10_0.4593.pth")
    adapt(ast, "lora", rank=8, targets="qv")             # freezes, inserts, unfreezes
    embedding = ast(torch.randn(4, 500, 128))            # (B, T, F) -> (B, E) = (4, 768)

Differs from P1's published code (README, section 13; read this after section 2):
  D1 the position embedding is cropped or interpolated, never silently replaced by zeros;
  D2 the first matrix of a bottleneck starts random, the last one zero (both were zero);
  D3 the Conformer adapter has no LayerNorm: the published one computes it and drops the result;
  D4 Convpass convolves over the f x t grid; the published one drops what its convolution gives;
  D5 LoRA's product B A has rank `rank`, its scale is alpha / rank; q and v have a pair each;
  D6 a mixture's output is added once; in Soft-MoA a token's weights are a softmax over all slots;
  D7 adapter a, layer f: "before" is f(u + a(u)), "after" f(u) + a(f(u)), parallel f(u) + a(u);
  D8 prompts stand beside CLS and DIST and replace neither.
Does not: pre-train on AudioSet, pad (data.py does), or combine two methods in one AST.
"""

import argparse
import copy
import hashlib
import json
import math
import re
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

# --------------------------------------------------------------------------------------------------
# 1. The AST: a Vision Transformer over 16 x 16 patches of a log-mel spectrogram

SIZES = {  # width D, depth, heads H, mel bins F, stride, grid (f, t) of the position embedding
    "nano": (64, 4, 2, 64, 16, (4, 6)),  # for laptops and tests: clips of about a second
    "tiny": (192, 12, 3, 128, 10, (12, 101)),  # the others: AudioSet clips of 1024 frames
    "small": (384, 12, 6, 128, 10, (12, 101)),
    "base": (768, 12, 12, 128, 10, (12, 101)),
}
PATCH = 16  # frames and mel bins
AUDIOSET_MEAN_STD = (-4.2677393, 4.5689974)  # of AudioSet's log-mels


class Attention(nn.Module):
    """Multi-head self-attention (MHSA): (B, N, D) -> (B, N, D)."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        # Four Linears instead of one fused qkv: methods of section 2 wrap them one by one.
        self.q = nn.Linear(width, width)
        self.k = nn.Linear(width, width)
        self.v = nn.Linear(width, width)
        self.o = nn.Linear(width, width)

    def split(self, y):
        """(B, N, D) -> (B, H, N, D/H)."""
        return y.unflatten(2, (self.heads, -1)).transpose(1, 2)

    def forward(self, x):
        q = self.split(self.q(x))  # (B, H, N, D/H)
        k = self.split(self.k(x))
        v = self.split(self.v(x))
        y = attend(q, k, v)  # softmax(q k^T / sqrt(D/H)) v: (B, H, N, D/H), section 7
        return self.o(y.transpose(1, 2).flatten(2))  # (B, N, D)


class MLP(nn.Module):
    """The feed-forward network (FFN): (B, N, D) -> (B, N, D), four times wider inside."""

    def __init__(self, width):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.act = nn.GELU()  # exact: the tanh approximation would not match the checkpoints
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    """A Transformer block, LayerNorms first. `adapt` wraps its layers; this code never changes."""

    def __init__(self, width, heads, eps):
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, eps=eps)
        self.mlp = MLP(width)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        x = x + self.mlp(self.norm2(x))
        return x


class AST(nn.Module):
    """Audio Spectrogram Transformer as an encoder: log-mel (B, T, F) -> embedding (B, E = D).

    mels       F, the mel bins it expects; None: the size's own; 128 in every published checkpoint
    grid       (f, t) of the position embedding; None: the size's own
    stride     distance between patches; None: the size's own; 10 in the paper
    pool       "mean" over all tokens (P1) or "cls", the mean of CLS and DIST (AST)
    pos_embed  "crop": the position embedding, cut to a shorter clip, stretched for a longer one;
               "zero": zeros, which only `full` moves: P1's code trained so (an experiment)
    eps        of the LayerNorms
    normalise  (mean, std) of its training log-mels: data.py feeds (x - mean) / (2 std), as
               the AST's authors do
    picture    True for weights of DINOv2, a picture model: positions are stretched, not cropped
    """

    # True: less memory: the backward pass computes the inner values of each block again, instead of
    # keeping them. As a block then runs twice a step, a BatchNorm updates its means twice.
    checkpointing = False

    def __init__(self, size="base", mels=None, grid=None, stride=None, pool="mean",
                 pos_embed="crop", eps=1e-6, normalise=AUDIOSET_MEAN_STD, picture=False):
        super().__init__()
        check_known("AST size", size, SIZES)
        check_known("pool", pool, ("mean", "cls"))
        check_known("pos_embed", pos_embed, ("crop", "zero"))
        width, depth, heads, own_mels, own_stride, own_grid = SIZES[size]
        self.embed_dim = width
        self.mels = mels or own_mels
        self.stride = stride or own_stride
        self.rows = (self.mels - PATCH) // self.stride + 1  # f: rows in the grid of patches
        self.grid = tuple(grid or own_grid)
        self.pool = pool
        self.normalise = tuple(normalise)  # data.py reads it
        self.picture = picture
        self.settings = dict(size=size, mels=self.mels, stride=self.stride, pool=pool,
                             grid=list(self.grid), pos_embed=pos_embed, eps=eps,
                             normalise=list(normalise), picture=picture)  # to build it again
        self.adaptation = None  # set by `adapt`: method, options, fingerprint of the backbone

        self.patch = nn.Conv2d(1, width, PATCH, self.stride)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.dist_token = nn.Parameter(torch.zeros(1, 1, width))  # a second CLS, from DeiT
        self.pos_embed = nn.Parameter(torch.zeros(1, 2 + math.prod(self.grid), width))
        self.blocks = nn.ModuleList(Block(width, heads, eps) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=eps)
        self.reset_parameters()

    def reset_parameters(self):
        """Normal numbers of std 0.02, biases zero, as in the Vision Transformer. Positions have std
        0.3: with 0.02 a short training hardly learns an order in time. `patch` is torch's own."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        nn.init.trunc_normal_(self.cls_token, std=0.02)
        nn.init.trunc_normal_(self.dist_token, std=0.02)
        nn.init.trunc_normal_(self.pos_embed, std=0.3)
        if self.settings["pos_embed"] == "zero":
            nn.init.zeros_(self.pos_embed)

    def positions(self, f, t):
        """Position embedding (1, 2 + f*t, D) for an f x t grid, as in the original AST: the middle
        of the stored f0 x t0 grid if that is larger, bilinear interpolation if it is smaller."""
        patches = self.pos_embed[:, 2:]  # all but CLS and DIST: (1, f0*t0, D)
        grid = patches.transpose(1, 2).unflatten(2, self.grid)  # (1, D, f0, t0)
        if not self.picture:  # cut out the middle f rows and t columns
            top = max(0, self.grid[0] // 2 - f // 2)
            left = max(0, self.grid[1] // 2 - t // 2)
            grid = grid[:, :, top : top + f, left : left + t]
        if grid.shape[2:] != (f, t):
            grid = F.interpolate(grid, size=(f, t), mode="bilinear", align_corners=False)
        grid = grid.flatten(2).transpose(1, 2)  # (1, f*t, D)
        return torch.cat([self.pos_embed[:, :2], grid], dim=1)  # (1, 2 + f*t, D)

    def tokens(self, x):
        """CLS, DIST and the patches of a log-mel, with positions: (B, T, F) -> (B, N, D)."""
        if x.ndim != 3 or x.shape[2] != self.mels or x.shape[1] < PATCH:
            raise ValueError(f"AST expects (batch, at least {PATCH} frames, {self.mels} mel bins), "
                             f"got {tuple(x.shape)}")
        x = self.patch(x.transpose(1, 2)[:, None])  # (B, T, F) -> (B, 1, F, T) -> (B, D, f, t)
        f, t = x.shape[2:]
        patches = x.flatten(2).transpose(1, 2)  # (B, f*t, D), row after row
        cls = self.cls_token.expand(len(x), -1, -1)  # (B, 1, D)
        dist = self.dist_token.expand(len(x), -1, -1)
        return torch.cat([cls, dist, patches], dim=1) + self.positions(f, t)  # (B, N = 2 + f*t, D)

    def forward(self, x):
        x = self.tokens(x)  # (B, T, F) -> (B, N, D)
        for block in self.blocks:
            if self.checkpointing and self.training:
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        x = self.norm(x)
        if self.pool == "cls":
            x = x[:, :2]  # CLS and DIST
        return x.mean(dim=1)  # (B, E)


class LinearHead(nn.Linear):
    """The classifier, one Linear as in P1: (B, E) -> (B, C)."""

    def forward(self, embedding, labels=None):  # only a head for speakers needs the labels
        return super().forward(embedding)


# --------------------------------------------------------------------------------------------------
# 2. Methods: small modules, and functions that insert them into the blocks.
# For your own: what is added to an output starts at zero. A module that all blocks share is made
# once, in the insert function. An adapter file holds only what is trained, so a tensor that is
# random and frozen must come from a fixed seed.


def wrap(ast, names, unit, *args):
    """In every block, replace each named layer by unit(layer, *args)."""
    for block in ast.blocks:
        for name in names:
            block.set_submodule(name, unit(block.get_submodule(name), *args))


def zero(layer):
    """Set the last layer B of an added path B(A(x)) to zero and return it: the path starts at zero
    exactly. A is random, so B learns at once; A learns from the second step, when B is not zero."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


class Bottleneck(nn.Module):
    """Bottleneck adapter (Houlsby et al., 1902.00751): W_up GELU(W_down x + b) + b."""

    def __init__(self, width, rank):
        super().__init__()
        self.down = nn.Linear(width, rank)
        self.up = zero(nn.Linear(rank, width))

    def forward(self, x):  # (B, N, D) -> (B, N, r) -> (B, N, D)
        return self.up(F.gelu(self.down(x)))


class Conformer(nn.Module):
    """P1's Conformer adapter: a Conformer block's convolution module with r channels, along the
    tokens: CLS, DIST, then row after row. Neighbours in a row are neighbours in time: it sees order
    even without positions. As in P1 its kernel also crosses from a row into the next."""

    def __init__(self, width, rank, kernel):
        super().__init__()
        self.down = nn.Linear(width, 2 * rank)
        self.pad = ((kernel - 1) // 2, kernel // 2)  # left, right: padding="same" is slower
        self.depthwise = nn.Conv1d(rank, rank, kernel, groups=rank)
        self.norm = nn.BatchNorm1d(rank)
        self.up = zero(nn.Linear(rank, width))

    def forward(self, x):
        x = F.glu(self.down(x), dim=2).transpose(1, 2)  # (B, N, 2r) -> (B, N, r) -> (B, r, N)
        x = self.depthwise(F.pad(x, self.pad))  # (B, r, N)
        x = F.silu(self.norm(x))
        return self.up(x.transpose(1, 2))  # (B, N, D)


class Convpass(nn.Module):
    """Convpass (Jie and Deng, 2207.07039): between two Linears a 3 x 3 convolution of the grid."""

    def __init__(self, width, rank, rows):
        super().__init__()
        self.rows = rows
        self.down = nn.Linear(width, rank)
        self.conv = nn.Conv2d(rank, rank, 3, padding=1)
        self.up = zero(nn.Linear(rank, width))

    def forward(self, x):
        quick_gelu = lambda y: y * torch.sigmoid(1.702 * y)  # nearly GELU, as its authors have it
        x = quick_gelu(self.down(x)).transpose(1, 2)  # (B, N, D) -> (B, r, N)
        # CLS and DIST have no neighbours: they meet only the middle of the 3 x 3 kernel.
        middle = self.conv.weight[:, :, 1, 1:2]  # (r, r, 1)
        tokens = F.conv1d(x[:, :, :2], middle, self.conv.bias)  # (B, r, 2)
        grid = self.conv(x[:, :, 2:].unflatten(2, (self.rows, -1)))  # (B, r, f, t)
        x = torch.cat([tokens, grid.flatten(2)], dim=2)  # (B, r, N)
        return self.up(quick_gelu(x).transpose(1, 2))  # (B, N, D)


class DenseMoA(nn.Module):
    """Dense mixture of adapters (2402.00828): sum_i softmax(router x)_i A_i(x), token by token."""

    def __init__(self, width, rank, experts):
        super().__init__()
        self.router = nn.Linear(width, experts)
        self.experts = nn.ModuleList(Bottleneck(width, rank) for _ in range(experts))

    def forward(self, x):
        shares = self.router(x).softmax(dim=2).split(1, dim=2)  # for each expert (B, N, 1)
        return sum(share * expert(x) for share, expert in zip(shares, self.experts))  # (B, N, D)


class SoftMoA(nn.Module):
    """Soft mixture of adapters (2402.00828; Soft MoE, 2308.00951). An expert has `slots` inputs,
    weighted means of all tokens. Each token gets a weighted mean of the outputs of all slots."""

    def __init__(self, width, rank, experts, slots):
        super().__init__()
        self.phi = nn.Parameter(torch.randn(width, experts * slots) * width**-0.5)
        self.experts = nn.ModuleList(Bottleneck(width, rank) for _ in range(experts))

    def forward(self, x):
        logits = x @ self.phi  # how well token and slot fit: (B, N, experts * slots)
        dispatch = logits.softmax(dim=1)  # over tokens
        combine = logits.softmax(dim=2)  # over slots
        inputs = dispatch.transpose(1, 2) @ x  # (B, experts * slots, D)
        parts = inputs.chunk(len(self.experts), dim=1)  # for each expert (B, slots, D)
        outputs = torch.cat([expert(part) for expert, part in zip(self.experts, parts)], dim=1)
        return combine @ outputs  # (B, N, D)


class Placed(nn.Module):
    """A sub-layer f with an adapter a at one of P1's places: the formulas of D7. Without `residual`
    they are f(a(u)) and a(f(u)), so training does not start at the frozen model."""

    def __init__(self, layer, adapter, form, at, residual):
        super().__init__()
        self.layer = layer
        self.adapter = adapter
        self.form = form
        self.at = at
        self.residual = residual

    def forward(self, u):
        f = self.layer
        a = self.adapter
        if self.form == "parallel":
            return f(u) + a(u)  # both read u
        if self.at == "before":
            return f(u + a(u)) if self.residual else f(a(u))
        y = f(u)
        return y + a(y) if self.residual else a(y)


SITES = {"ffn": ["mlp"], "mhsa": ["attn"], "both": ["attn", "mlp"]}


def insert_adapters(unit, ast, where, form, at, residual, **options):
    """An adapter at FFN, MHSA or both of every block; the LayerNorm before it trains as well."""

    def place(layer):
        adapter = unit(ast.embed_dim, **options)
        return Placed(layer, adapter, form, at, residual)

    wrap(ast, SITES[where], place)
    for block in ast.blocks:
        block.norm1.requires_grad_("attn" in SITES[where])
        block.norm2.requires_grad_("mlp" in SITES[where])


def insert_convpass(ast, **options):
    insert_adapters(partial(Convpass, rows=ast.rows), ast, **options)


class LoRA(nn.Module):
    """Low-rank update of a Linear (Hu et al., 2106.09685): W x + b + (alpha / r) B A x."""

    def __init__(self, linear, rank, alpha):
        super().__init__()
        self.linear = linear
        self.scale = alpha / rank
        self.A = nn.Parameter(torch.empty(rank, linear.in_features))  # (r, D)
        self.B = nn.Parameter(torch.zeros(linear.out_features, rank))  # (D, r), zero at the start
        nn.init.kaiming_uniform_(self.A, a=5**0.5)  # as torch's Linear starts

    def forward(self, x):
        return self.linear(x) + self.scale * F.linear(F.linear(x, self.A), self.B)

    def folded(self):
        """The weight (D, D) of a plain Linear that does the same."""
        return self.linear.weight + self.scale * self.B @ self.A


class DoRA(LoRA):
    """A row of W is a length times a direction: LoRA changes the direction, the length m trains by
    itself (Liu et al., 2402.09353)."""

    def __init__(self, linear, rank, alpha):
        super().__init__(linear, rank, alpha)
        self.m = nn.Parameter(linear.weight.detach().norm(dim=1, keepdim=True))  # (D, 1)

    def forward(self, x):
        return F.linear(x, self.folded(), self.linear.bias)

    def folded(self):
        weight = super().folded()
        # No gradient through the length (section 4.3 of the paper): less memory, same accuracy.
        length = weight.detach().norm(dim=1, keepdim=True)  # of each row: (D, 1)
        return self.m / length * weight


def insert_low_rank(unit, ast, targets, rank, alpha):
    """LoRA or DoRA on some of the attention's four Linears; alpha defaults to rank (scale 1)."""
    if alpha is None:
        alpha = rank
    wrap(ast, [f"attn.{name}" for name in targets], unit, rank, alpha)


class ScaleShift(nn.Module):
    """y -> s y + b behind a layer, s = 1 and b = 0 at the start: SSF (Lian et al., 2210.08823);
    without the shift b, IA3 (Liu et al., 2205.05638)."""

    def __init__(self, layer, width, shift):
        super().__init__()
        self.layer = layer
        self.scale = nn.Parameter(torch.ones(width))
        self.shift = nn.Parameter(torch.zeros(width)) if shift else None

    def forward(self, x):
        y = self.layer(x) * self.scale
        return y if self.shift is None else y + self.shift


def insert_scales(ast, names, shift):
    """SSF (with a shift) or IA3 behind these layers; the FFN is four times wider inside."""
    for name in names:
        width = ast.embed_dim
        if name in ("mlp.fc1", "mlp.act"):
            width = 4 * width
        wrap(ast, [name], ScaleShift, width, shift)


class Prefixed(nn.Module):
    """p vectors in front of the keys (or values) that a Linear makes (Li and Liang, 2101.00190)."""

    def __init__(self, linear, tokens):
        super().__init__()
        self.linear = linear
        self.prefix = nn.Parameter(torch.randn(1, tokens, linear.out_features) * 0.02)

    def forward(self, x):  # (B, N, D) -> (B, p + N, D)
        prefix = self.prefix.expand(len(x), -1, -1)  # (B, p, D)
        return torch.cat([prefix, self.linear(x)], dim=1)


def insert_prefixes(ast, tokens):
    """Half of the tokens stand in front of the keys, half in front of the values."""
    wrap(ast, ["attn.k", "attn.v"], Prefixed, tokens // 2)


class Prompted(nn.Module):
    """A block that reads p learned tokens behind CLS and DIST (VPT, Jia et al., 2203.12119).
    With `replace` it first drops the prompts of the block before."""

    def __init__(self, block, tokens, width, replace):
        super().__init__()
        self.block = block
        self.drop = tokens if replace else 0
        self.prompts = nn.Parameter(torch.empty(1, tokens, width))
        bound = (6 / (PATCH * PATCH + width)) ** 0.5  # as in VPT: Xavier's rule for patch -> D
        nn.init.uniform_(self.prompts, -bound, bound)

    def forward(self, x):  # (B, N, D) -> (B, N + p, D); with `replace` N stays
        prompts = self.prompts.expand(len(x), -1, -1)
        rest = x[:, 2 + self.drop :]  # behind CLS, DIST and what is dropped
        return self.block(torch.cat([x[:, :2], prompts, rest], dim=1))


def insert_prompts(ast, tokens, deep):
    """Shallow: p tokens join before the first block. Deep: each further block gets its own."""
    prompted = len(ast.blocks) if deep else 1
    for i in range(prompted):
        ast.blocks[i] = Prompted(ast.blocks[i], tokens, ast.embed_dim, replace=i > 0)


def train_biases(ast):
    """BitFit (Zaken et al., 2106.10199): biases of Linear and LayerNorm, not of the patches."""
    for name, parameter in ast.named_parameters():
        parameter.requires_grad_(name.endswith("bias") and name != "patch.bias")


# --------------------------------------------------------------------------------------------------
# 3. adapt: one line a method; it freezes the model, then inserts what trains

# `at` and `residual` act only with form="sequential".
PLACE = dict(where="ffn", form="parallel", at="after", residual=True)
SSF = ["attn.q", "attn.k", "attn.v", "attn.o", "mlp.fc1", "mlp.fc2", "norm1", "norm2"]
IA3 = ["attn.k", "attn.v", "mlp.act"]
METHODS = {  # name: (insertion, its options with the defaults of P1's Table 1)
    "full": (lambda ast: ast.requires_grad_(True), {}),
    "linear": (lambda ast: None, {}),  # trains the last LayerNorm, as every method does
    "bitfit": (train_biases, {}),
    "prompt-shallow": (partial(insert_prompts, deep=False), dict(tokens=300)),
    "prompt-deep": (partial(insert_prompts, deep=True), dict(tokens=25)),
    "prefix": (insert_prefixes, dict(tokens=24)),
    "lora": (partial(insert_low_rank, LoRA), dict(rank=6, alpha=None, targets="qv")),
    "adapter": (partial(insert_adapters, Bottleneck), dict(rank=12, **PLACE)),
    "conformer": (partial(insert_adapters, Conformer), dict(rank=8, kernel=31, **PLACE)),
    "convpass": (insert_convpass, dict(rank=8, **PLACE)),
    "dense-moa": (partial(insert_adapters, DenseMoA), dict(rank=6, experts=7, **PLACE)),
    "soft-moa": (partial(insert_adapters, SoftMoA), dict(rank=6, experts=7, slots=1, **PLACE)),
    # Beyond P1:
    "dora": (partial(insert_low_rank, DoRA), dict(rank=6, alpha=None, targets="qv")),
    "ssf": (partial(insert_scales, names=SSF, shift=True), {}),
    "ia3": (partial(insert_scales, names=IA3, shift=False), {}),
}
CHOICES = dict(where=SITES, form=("parallel", "sequential"), at=("before", "after"),
               residual=(True, False))


def adapt(ast, method, **options):
    """Turn a plain AST, in place, into one that trains only what `method` trains, and return it.
    For options see METHODS and CHOICES; `at` and `residual` need form="sequential".
    All methods train the last LayerNorm too (BitFit: its bias)."""
    if ast.adaptation:
        raise ValueError(f"adapt a plain AST: this one carries {ast.adaptation['method']!r}")
    check_options(ast.settings["size"], method, options)
    insert, defaults = METHODS[method]
    ast.adaptation = dict(method=method, options=options, backbone=fingerprint(ast))
    ast.requires_grad_(False)
    ast.norm.requires_grad_(True)
    insert(ast, **(defaults | options))
    # What was inserted is new: on the CPU, and in training mode.
    return ast.to(ast.cls_token.device).train(ast.training)


def check_options(size, method, options):
    """Raise ValueError for an unknown method, and for options that do not fit it or this size."""
    check_known("method", method, METHODS)
    width, _, _, _, _, grid = SIZES[size]
    tokens = 2 + math.prod(grid)  # N of the size's grid
    # On clips of the grid's length a wider kernel never uses its outer taps.
    limits = dict(rank=width, kernel=2 * tokens - 1)
    for name, value in options.items():
        check_known(f"option of {method!r}", name, METHODS[method][1])
        if name in CHOICES:
            check_known(name, value, CHOICES[name])
        elif name == "targets":
            twice = len(set(value)) < len(value)
            if not value or twice or not set(value) <= set("qkvo"):  # <=: is a subset of
                raise ValueError(f"targets {value!r}: name some of q, k, v, o once, such as 'qv'")
        elif name == "alpha":
            if not isinstance(value, (int, float)) or not value > 0:  # 0: nothing ever moves
                raise ValueError(f"alpha {value}: expected a number above 0")
        elif type(METHODS[method][1][name]) is int:  # rank, kernel, tokens, experts, slots
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} {value}: expected a whole number, at least 1")
            if name in limits and value > limits[name]:
                raise ValueError(f"{name} {value}: expected at most {limits[name]} on AST-{size}")
    if method == "prefix" and options.get("tokens", 0) % 2:
        raise ValueError(f"tokens {options['tokens']} is odd: half are keys, half are values")
    if ("at" in options or "residual" in options) and options.get("form") != "sequential":
        raise ValueError("`at` and `residual` are for form='sequential': parallel has no order")


def check_known(what, name, known):
    """Raise ValueError, with the valid names, if `name` is not among them."""
    if name not in known:
        names = ", ".join(map(str, known))
        hint = f"choose from {names}" if known else "it has none"
        raise ValueError(f"unknown {what} {name!r}: {hint}")


def count(module):
    """Return the numbers of trainable and of all parameters; one shared by blocks counts once."""
    trainable = sum(p.numel() for p in module.parameters() if p.requires_grad)
    total = sum(p.numel() for p in module.parameters())
    return trainable, total


# --------------------------------------------------------------------------------------------------
# 4. Pretrained weights: four layouts of the same Transformer, told apart by their keys

# "audioset-16" is for laptops: 1,024 frames make 514 tokens, not 1,214. File names end with the
# score on AudioSet (mAP).
DROPBOX = "https://www.dropbox.com/s/"  # of AST's authors
DINOV2 = "https://dl.fbaipublicfiles.com/dinov2/"  # Apache 2.0; not tried here
DOWNLOADS = {  # (--init of train.py, AST size): (address, sha256; empty, for none is published)
    ("audioset", "base"): (DROPBOX + "ca0b1v2nlxzyeb4/audioset_10_10_0.4593.pth?dl=1", ""),
    ("audioset-16", "base"): (DROPBOX + "mdsa4t1xmcimia6/audioset_16_16_0.4422.pth?dl=1", ""),
    ("dinov2", "small"): (DINOV2 + "dinov2_vits14/dinov2_vits14_pretrain.pth", ""),
    ("dinov2", "base"): (DINOV2 + "dinov2_vitb14/dinov2_vitb14_pretrain.pth", ""),
}
MEAN_STD = {  # of the corpora that AST's authors fine-tuned on, by a word in a file's name
    "esc50": (-6.6268077, 5.358466),
    "speechcommands": (-6.845978, 5.5654526),
}
RENAME = [  # (regular expression for a part of their key, ours), applied one after another
    # Before all keys, as in "module.v.norm.weight"; compiled models are saved with `_orig_mod.`.
    (r"^(module\.|model\.|_orig_mod\.)?(v\.|audio_spectrogram_transformer\.|vit\.|deit\.)?", ""),
    (r"^embeddings\.patch_embeddings\.projection|^patch_embed\.proj", "patch"),
    (r"^embeddings\.distillation_token", "dist_token"),
    (r"^embeddings\.position_embeddings", "pos_embed"),
    (r"^embeddings\.", ""),
    (r"^(encoder\.layer|layers)\.", "blocks."),
    (r"layernorm_before", "norm1"),
    (r"layernorm_after", "norm2"),
    (r"^layernorm\.", "norm."),
    (r"attention\.attention\.([qkv])(uery|ey|alue)", r"attn.\1"),  # \1: the letter q, k or v
    (r"attention\.([qkv])_proj", r"attn.\1"),  # newer files of Hugging Face
    (r"attention\.output\.dense|attention\.o_proj|attn\.proj", "attn.o"),
    (r"intermediate\.dense", "mlp.fc1"),
    (r"output\.dense", "mlp.fc2"),
]
# Of AudioSet and ImageNet: not ours.
HEADS = r"^(mlp_head|head|head_dist|pooler|(cls_|distillation_)?classifier)\."


def load_pretrained(ast, path):
    """Return a new AST like the plain `ast` with the weights of a file, and a sentence on the file.
    The file holds a model of the size of `ast`: an AST, of its authors, Hugging Face or ours; or a
    Transformer of pictures: DINOv2, DeiT or a plain one (ViT)."""
    if ast.adaptation:  # the new AST would be plain
        raise ValueError(f"load into a plain AST: this one carries {ast.adaptation['method']!r}")
    path = Path(path)
    state, own = read_weights(path)  # own: settings, {} if the file is not ours
    keys = " ".join(state)
    layout = "our"
    found = dict(eps=1e-6, picture="ls1.gamma" in keys)  # a key that only DINOv2 has
    if found["picture"]:
        layout = "DINOv2"
    elif "qkv" in keys:
        layout = "original"  # also DeiT's and ViT's
    elif "layernorm" in keys:
        layout = "Hugging Face"
        found["eps"] = 1e-12  # with 1e-6 outputs would differ by 1e-2
    found["normalise"] = infer_mean_std(path, layout) or ast.normalise
    try:
        state = to_our_names(state)
        if found["picture"]:
            state = from_dinov2(state)
        if "grid" not in own:
            config = read_beside(path, "config.json", layout)
            found["stride"], found["grid"] = infer_grid(ast, state, found["picture"], config)
        with torch.device("meta"):  # shapes without memory: the weights come from the file
            loaded = AST(**(ast.settings | found | own))  # a file of ours knows best: `own` wins
        if ast.settings["pos_embed"] == "zero":
            state["pos_embed"] = torch.zeros_like(state["pos_embed"])
        # A picture has three colours, and grey is the same in all three: add their weights.
        state["patch.weight"] = state["patch.weight"].sum(1, keepdim=True)  # -> (D, 1, 16, 16)
        if own and state.keys() != loaded.state_dict().keys():
            raise ValueError("it carries what a method added; expected a plain AST")
        loaded.to_empty(device="cpu")  # memory for the weights
        loaded.load_state_dict(state)
    except KeyError as error:  # a tensor that is looked up by its name
        raise ValueError(f"{path} is not an AST: it has no {error.args[0]}") from error
    except (IndexError, RuntimeError, TypeError, ValueError) as error:  # other keys or shapes
        raise ValueError(f"{path} is not an AST-{ast.settings['size']}: {error}") from error
    mean, std = loaded.normalise
    return loaded, (f"{path.name}: {layout} layout, {len(state)} tensors, positions "
                    f"{loaded.grid[0]} x {loaded.grid[1]}, stride {loaded.stride}, "
                    f"eps {loaded.norm.eps:g}, input normalised by mean {mean:.3f}, std {std:.3f}")


def to_our_names(state):
    """{key: tensor} of any layout -> the same under our names, without heads, with DIST."""
    renamed = {}
    for key, value in state.items():
        for pattern, ours in RENAME:
            key = re.sub(pattern, ours, key)
        if ".qkv." in key:  # one matrix: q above k above v
            for letter, part in zip("qkv", value.chunk(3), strict=True):
                renamed[key.replace("qkv", letter)] = part
        elif not re.match(HEADS, key):
            renamed[key] = value
    if "dist_token" not in renamed:  # DINOv2 and ViT have only CLS, and one position for it
        positions = renamed["pos_embed"]  # (1, 1 + N, D)
        renamed["dist_token"] = renamed["cls_token"]
        renamed["pos_embed"] = torch.cat([positions[:, :1], positions], dim=1)
    return renamed


def from_dinov2(state):
    """Turn DINOv2's weights into an AST's. DINOv2 multiplies the output of each sub-layer by a
    learned gamma: here the last Linear of the sub-layer is multiplied. Its patches of 14 x 14 are
    enlarged."""
    state = {key: value.float() for key, value in state.items() if key != "mask_token"}
    for key in list(state):
        if key.endswith(".gamma"):
            gamma = state.pop(key)  # (D,)
            linear = key.replace("ls1.gamma", "attn.o").replace("ls2.gamma", "mlp.fc2")
            state[f"{linear}.weight"] = gamma[:, None] * state[f"{linear}.weight"]
            state[f"{linear}.bias"] = gamma * state[f"{linear}.bias"]
    patch = state["patch.weight"]  # (D, 3, 14, 14)
    larger = F.interpolate(patch, (PATCH, PATCH), mode="bicubic", align_corners=False)
    # The convolution sums 256 points, no longer 196: without this factor its outputs would grow.
    state["patch.weight"] = (patch.shape[2] / PATCH) ** 2 * larger
    return state


def infer_grid(ast, state, picture, config):
    """Return stride and grid (f, t). A file tells only f * t, Hugging Face's config the stride. The
    grid is that of `ast` if it fits, else that of the first stride whose rows f divide f * t; of
    picture models a square."""
    patches = state["pos_embed"].shape[1] - 2
    colours = state["patch.weight"].shape[1]
    if colours == 1:  # a picture has three
        strides = [int(config["time_stride"])] if config.get("time_stride") else []
        if strides and int(config.get("frequency_stride", strides[0])) != strides[0]:
            raise ValueError("its strides in time and frequency differ: ours has one")
        if int(config.get("num_mel_bins", ast.mels)) != ast.mels:
            raise ValueError(f"{config['num_mel_bins']} mel bins, but the AST given has {ast.mels}")
        if not strides and math.prod(ast.grid) == patches:
            return ast.stride, ast.grid
        for stride in (*strides, ast.stride, 10, 12, 14, 16):  # its own, then the published ones
            rows = (ast.mels - PATCH) // stride + 1
            if patches % rows == 0:
                return stride, (rows, patches // rows)
    side = math.isqrt(patches)  # of a picture, or of our own file that came from one
    if side * side != patches:
        raise ValueError(f"{patches} positions are no grid of patches")
    stride = PATCH if picture else ast.stride  # DINOv2's patches do not overlap
    return stride, (side, side)


def read_beside(path, name, layout):
    """Return a JSON file that Hugging Face puts beside its weights; {} if there is none."""
    beside = path.with_name(name)
    if layout != "Hugging Face" or not beside.is_file():
        return {}
    try:
        return dict(json.loads(beside.read_text(encoding="utf-8-sig")))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{beside} is no JSON: {error}") from error


def infer_mean_std(path, layout):
    """Return (mean, std), by Hugging Face's config or a corpus in the file's name, or None."""
    config = read_beside(path, "preprocessor_config.json", layout)
    if config and "image_mean" not in config:  # a picture model's: mean and std of colours
        try:
            return float(config["mean"]), float(config["std"])
        except (LookupError, TypeError, ValueError) as error:
            raise ValueError(f"{path.with_name('preprocessor_config.json')}: expected numbers "
                             "`mean` and `std`") from error
    name = re.sub("[-_]", "", path.name.lower())
    for corpus, mean_std in MEAN_STD.items():
        if corpus in name:
            return mean_std
    return None


def read_weights(path):
    """Return a file's {key: tensor} and its settings if it is ours. Code in the file never runs."""
    if not Path(path).is_file():
        raise ValueError(f"no checkpoint at {path}")
    try:
        if str(path).endswith(".safetensors"):
            state = read_safetensors(path)
        else:
            with torch.serialization.safe_globals(harmless()):
                state = torch.load(path, map_location="cpu", weights_only=True)
        settings = state.get("settings") or {}
        wanted = ("mels", "grid", "stride", "eps", "normalise", "picture")
        own = {name: settings[name] for name in wanted if name in settings}
        # The weights' key in our files or others; beside it may stand a model's name.
        for name in ("encoder", "model", "state_dict", "model_state_dict", "model"):
            if isinstance(state.get(name), dict):
                state = state[name]
        weights = {str(key): value for key, value in state.items() if torch.is_tensor(value)}
    except Exception as error:  # many kinds, by what the file holds
        raise ValueError(f"{path} is no checkpoint that loads safely: it is damaged, holds no "
                         "weights, or Python code, which is never run") from error
    return weights, own


def harmless():
    """Return types that a file may hold beside weights: none of them runs code when it is read."""
    # The function by which pickle makes a number of NumPy; NumPy 1 and 2 name it differently.
    number, _ = np.float64(0).__reduce__()
    names = "bool int8 uint8 int16 int32 int64 float16 float32 float64".split()
    kinds = [type(np.dtype(name)) for name in names]  # a class each
    numpy_1 = (number, "numpy.core.multiarray.scalar")  # (what it is, its name in the file)
    numpy_2 = (number, "numpy._core.multiarray.scalar")
    return [argparse.Namespace, np.dtype, numpy_1, numpy_2, *kinds]


def read_safetensors(path):
    """The format: 8 bytes of header length, a JSON header, then the tensors' raw bytes."""
    kinds = dict(F16=torch.float16, BF16=torch.bfloat16, F32=torch.float32, F64=torch.float64)
    raw = bytearray(Path(path).read_bytes())
    start = 8 + int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8:start])
    header.pop("__metadata__", None)
    body = memoryview(raw)[start:]
    state = {}
    for key, entry in header.items():
        first, last = entry["data_offsets"]  # in `body`
        if entry["dtype"] not in kinds or first == last:
            continue  # counters and masks are no weights
        tensor = torch.frombuffer(body[first:last], dtype=kinds[entry["dtype"]])
        state[key] = tensor.reshape(entry["shape"])
    return state


# --------------------------------------------------------------------------------------------------
# 5. Adapter files: only what was trained, for one backbone


def fingerprint(ast):
    """A short hash of a plain AST's settings and weights: an adapter fits no other backbone."""
    digest = hashlib.sha256(json.dumps(ast.settings).encode())
    for name, value in sorted(ast.state_dict().items()):
        digest.update(name.encode())
        if not value.is_meta:  # on "meta", where main() counts, tensors have no values
            digest.update(value.float().cpu().contiguous().numpy())
    return digest.hexdigest()[:16]


def adapter_state(ast):
    """Return method, options, backbone's fingerprint and what was trained, with BatchNorm's
    buffers: plain values and tensors, for torch.load(weights_only=True)."""
    if not ast.adaptation:
        raise ValueError("this AST is plain: adapt it first, or save its state_dict")
    names = {name for name, p in ast.named_parameters() if p.requires_grad}
    names |= {name for name, _ in ast.named_buffers()}
    state = ast.state_dict()
    weights = {name: value.cpu().clone() for name, value in state.items() if name in names}
    return dict(ast.adaptation, weights=weights)


def load_adapter(ast, state):
    """Return a new AST that carries the adapter `state`; the plain `ast` gives what it gave before.
    Both share the frozen weights (now frozen in `ast` too).
    An adapter for another backbone is refused, but "full" replaces all weights and fits any."""
    # deepcopy's memo, {id: object}: it takes these objects as they are, and copies all others.
    shared = {id(p): p for name, p in ast.named_parameters() if name not in state["weights"]}
    twin = adapt(copy.deepcopy(ast, shared), state["method"], **state["options"])
    if state["method"] != "full" and state["backbone"] != twin.adaptation["backbone"]:
        raise ValueError(f"this adapter was trained on backbone {state['backbone']}, not on "
                         f"{twin.adaptation['backbone']}: load the checkpoint it started from")
    if adapter_state(twin)["weights"].keys() != state["weights"].keys():
        raise ValueError("this adapter is damaged: it lacks weights, or has others")
    twin.load_state_dict(state["weights"], strict=False)
    return twin


def merge(ast):
    """Fold LoRA or DoRA into the weights, in place: a plain AST, same outputs, no slower."""
    units = {name: unit for name, unit in ast.named_modules() if isinstance(unit, LoRA)}
    if not units:
        raise ValueError("merge folds lora and dora: for other methods no plain AST is equal")
    for name, unit in units.items():
        # A new Parameter: the old one may be shared with a backbone and its other adapters.
        unit.linear.weight = nn.Parameter(unit.folded().detach(), requires_grad=False)
        ast.set_submodule(name, unit.linear)
    ast.adaptation = None
    return ast


@torch.no_grad()
def pooled_attention(ast, x):
    """The last block's attention weights for each patch: (B, T, F) -> (B, f, t), a mean over the
    heads and over the tokens that the AST pools."""
    attention = [module for module in ast.modules() if isinstance(module, Attention)][-1]
    read = []  # the hook puts here what this layer reads: one tensor (B, N, D)
    hook = attention.register_forward_pre_hook(lambda module, inputs: read.extend(inputs))
    ast(x)
    hook.remove()
    q = attention.split(attention.q(read[0]))  # (B, H, N, D/H)
    k = attention.split(attention.k(read[0]))
    if ast.pool == "cls":
        q = q[:, :, :2]
    scores = q @ k.mT / q.shape[3] ** 0.5  # (B, H, tokens that are pooled, N)
    weights = scores.softmax(dim=3).mean(dim=(1, 2))  # (B, N)
    columns = (x.shape[1] - PATCH) // ast.stride + 1
    # The last f * t are patches: prompts and prefixes stand before them.
    return weights[:, -ast.rows * columns :].unflatten(1, (ast.rows, columns))  # (B, f, t)


def draw_attention(axes, ast, x, title):
    """Draw a spectrogram (1, T, F) on the first of two axes, below it what the AST looks at."""
    axes[0].set_title(f"{title}; below: attention of the pooled tokens in the last block")
    images = (x[0].T, pooled_attention(ast, x)[0])  # (F, T) and (f, t)
    for axis, image in zip(axes, images):
        axis.imshow(image.cpu().numpy(), origin="lower", aspect="auto", cmap="magma",
                    extent=(0, x.shape[1] / 100, 0, x.shape[2]))  # 100 frames a second
        axis.set(xlabel="seconds", ylabel="mel bin")


# --------------------------------------------------------------------------------------------------
# 6. Demo: `python ast_adapters.py` prints every method's trainable parameters on AST-base


def main():
    with torch.device("meta"):  # shapes without memory: counting needs no weights
        _, plain = count(AST("base"))
        shape = tuple(AST("base")(torch.empty(2, 500, 128)).shape)
        print(f"AST-base: {plain:,} parameters; (B, T, F) = (2, 500, 128) -> {shape}\n")
        print(f"{'method':15s} {'trainable':>11s} {'share':>7s}   options (defaults)")
        for method, (_, options) in METHODS.items():
            trainable, total = count(adapt(AST("base"), method))
            shown = " ".join(f"{k}={v}" for k, v in options.items() if k not in ("at", "residual"))
            print(f"{method:15s} {trainable:11,} {trainable / total:7.2%}   {shown}")
    print("\nTrainable: without the head (769 a class), with the last LayerNorm (1,536).")


# --------------------------------------------------------------------------------------------------
# 7. Faster on a CPU: the same formula, skip it


def attend(q, k, v):
    """softmax(q k^T / sqrt(d)) v for each head, d = D/H: three tensors (B, H, N, d) -> one. In bf16
    on a CPU a training takes this two to three times as fast as torch's kernel up to 600 tokens: it
    works on few heads at a time, whose scores stay in the CPU's cache. Above 1,448 tokens it calls
    torch's, to save memory."""
    most = 2**21  # scores at a time: 1,448 x 1,448
    scores = q.shape[2] * k.shape[2]  # of one head: N x N; prefixes make k and v longer than q
    bf16_on_cpu = q.device.type == "cpu" and torch.is_autocast_enabled("cpu")
    if not bf16_on_cpu or scores > most:
        return F.scaled_dot_product_attention(q, k, v)
    heads = most // scores  # how many at a time
    scaled = q * q.shape[3] ** -0.5
    q_parts = scaled.flatten(0, 1).split(heads)  # each (heads, N, d)
    k_parts = k.flatten(0, 1).split(heads)
    v_parts = v.flatten(0, 1).split(heads)
    parts = zip(q_parts, k_parts, v_parts)
    outputs = [(q_part @ k_part.mT).softmax(dim=2) @ v_part for q_part, k_part, v_part in parts]
    return torch.cat(outputs).view(q.shape)


if __name__ == "__main__":
    main()
