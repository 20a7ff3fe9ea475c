"""The Audio Spectrogram Transformer and every way to adapt it with few parameters, from scratch.

Papers   AST: Gong, Chung, Glass, "AST: Audio Spectrogram Transformer", arXiv 2104.01778.
         P1:  Cappellazzo et al., "Parameter-Efficient Transfer Learning of Audio Spectrogram
              Transformers", arXiv 2312.03694; its follow-up on mixtures of adapters, 2402.00828.
Sections 1 the AST, 2 methods, 3 adapt, 4 pretrained weights, 5 adapter files, 6 demo
Axes     B batch, T frames, F mel bins, N tokens, D width, H heads, E embedding size, C classes,
         r rank, f x t the grid of patches (rows of frequency x columns of time).

A method is surgery on a plain AST: the Transformer block stays the textbook one and `adapt` wraps
some of its layers. To add a method write it in section 2 and put one line into METHODS.

    ast = AST("base")                                    # log-mel, 128 bins, 16 frames or more
    print(load_pretrained(ast, "audioset_10_10_0.4593.pth"))
    adapt(ast, "lora", rank=8, targets="qv")             # freezes, inserts, unfreezes
    embedding = ast(torch.randn(4, 500, 128))            # (B, T, F) -> (B, E) = (4, 768)

Differs from P1's published code (its defects: README, section 9):
  D1 the position embedding is cropped or interpolated, never silently replaced by zeros;
  D2 the first matrix of a bottleneck starts random, the last one zero (both were zero);
  D3 the Conformer adapter has no LayerNorm: the published one computes it and drops the result;
  D4 the Convpass convolution is used, and over the f x t grid; the published one drops its output;
  D5 LoRA's `rank` is a true rank, its scale alpha / rank; q and v have a pair (A, B) each;
  D6 a mixture's output is added once; Soft-MoA combines with a softmax over the slots;
  D7 "before" means f(u + a(u)), "after" f(u) + a(f(u)), parallel f(u) + a(u);
  D8 prompts stand beside CLS and DIST and replace nothing.
Does not: pre-train on AudioSet, pad (data.py does), or combine two methods in one AST.
"""

import copy
import hashlib
import json
import math
import re
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

# --------------------------------------------------------------------------------------------------
# 1. The AST: a Vision Transformer over 16 x 16 patches of a log-mel spectrogram

SIZES = {  # width D, depth, heads H, grid (f, t) on which the position embedding is kept
    "nano": (64, 4, 2, (12, 9)),  # for laptops and tests: clips of about a second
    "tiny": (192, 12, 3, (12, 101)),  # the others: AudioSet clips of 1024 frames
    "small": (384, 12, 6, (12, 101)),
    "base": (768, 12, 12, (12, 101)),
}
PATCH = 16


def attend(q, k, v):
    """Attention of each head, softmax(q k^T / sqrt(d)) v: (B, H, N, d = D/H) -> the same shape."""
    scores = q.shape[2] * k.shape[2]  # of one head: N x N; prefixes make k and v longer than q
    if q.device.type != "cpu" or not torch.is_autocast_enabled("cpu") or scores > 2**21:
        return F.scaled_dot_product_attention(q, k, v)
    # In bf16 on a CPU the formula is two to three times as fast as torch's kernel, if only a few
    # heads are taken at a time: their scores stay in the cache. It keeps all scores for the
    # backward pass, so inputs of more than 1,448 tokens go to the kernel, which keeps none.
    q_k_v = (x.flatten(0, 1).split(2**21 // scores) for x in (q * q.shape[3] ** -0.5, k, v))
    heads = [(q @ k.mT).softmax(2) @ v for q, k, v in zip(*q_k_v)]  # each (some of B*H, N, d)
    return torch.cat(heads).view(q.shape)


class Attention(nn.Module):
    """Multi-head self-attention (MHSA): (B, N, D) -> (B, N, D)."""

    def __init__(self, width, heads):
        super().__init__()
        self.heads = heads
        # Four Linears instead of one fused qkv: LoRA, IA3 and prefixes wrap them one by one.
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))

    def split(self, y):
        """(B, N, D) -> (B, H, N, D/H)."""
        return y.unflatten(2, (self.heads, -1)).transpose(1, 2)

    def forward(self, x):
        q, k, v = (self.split(y) for y in (self.q(x), self.k(x), self.v(x)))
        return self.o(attend(q, k, v).transpose(1, 2).flatten(2))  # (B, N, D)


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
    """A pre-norm Transformer block. `adapt` wraps `attn` and `mlp`; this code never changes."""

    def __init__(self, width, heads, eps):
        super().__init__()
        self.norm1, self.attn = nn.LayerNorm(width, eps=eps), Attention(width, heads)
        self.norm2, self.mlp = nn.LayerNorm(width, eps=eps), MLP(width)

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        x = x + self.mlp(self.norm2(x))
        return x


class AST(nn.Module):
    """Audio Spectrogram Transformer as an encoder: log-mel (B, T, F) -> embedding (B, E = D).

    size       a key of SIZES
    mels       F, the mel bins it expects (128 in every published checkpoint)
    grid       (f, t) of the stored position embedding; None: the size's own
    stride     distance between patches; 10 in the paper, checkpoints with 12, 14, 16 exist
    pool       "mean" over all tokens (P1) or "cls", the mean of CLS and DIST (AST)
    pos_embed  "crop": the checkpoint's positions, cropped or interpolated to each input;
               "zero": no positions at all, as P1's code trained (an experiment)
    eps        of the LayerNorms; `load_pretrained` sets the one that belongs to the checkpoint
    """

    normalise = "audioset"  # data.py: (log-mel - mean) / (2 std), fixed mean and std
    checkpointing = False  # True: compute blocks again in the backward pass, keep them nowhere
    # (The Conformer adapter's BatchNorm then counts each batch twice: momentum 0.19, not 0.1.)

    def __init__(self, size="base", mels=128, grid=None, stride=10, pool="mean", pos_embed="crop",
                 eps=1e-6):
        super().__init__()
        _known("pool", pool, ("mean", "cls"))
        _known("pos_embed", pos_embed, ("crop", "zero"))
        width, depth, heads, own_grid = SIZES[_known("AST size", size, SIZES)]
        self.rows = (mels - PATCH) // stride + 1  # of frequency in the grid of patches
        self.grid = tuple(grid or own_grid)
        self.mels, self.embed_dim, self.stride, self.pool = mels, width, stride, pool
        self.settings = dict(size=size, mels=mels, stride=stride, pool=pool, grid=list(self.grid),
                             pos_embed=pos_embed, eps=eps)  # AST(**settings) is this one again
        self.adaptation = None  # set by `adapt`: method, options, fingerprint of the backbone

        self.patch = nn.Conv2d(1, width, PATCH, stride)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.dist_token = nn.Parameter(torch.zeros(1, 1, width))  # DeiT's second token
        self.pos_embed = nn.Parameter(torch.zeros(1, 2 + self.grid[0] * self.grid[1], width))
        self.blocks = nn.ModuleList(Block(width, heads, eps) for _ in range(depth))
        self.norm = nn.LayerNorm(width, eps=eps)
        self.reset_parameters()

    def reset_parameters(self):
        """Vision Transformer's start: weights normal 0.02, biases zero; torch's for the patches.
        Only the positions are larger, normal 0.3: with 0.02 a short training hardly sees order."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        for token, std in ((self.cls_token, 0.02), (self.dist_token, 0.02), (self.pos_embed, 0.3)):
            nn.init.trunc_normal_(token, std=std)
        if self.settings["pos_embed"] == "zero":
            nn.init.zeros_(self.pos_embed)

    def positions(self, f, t):
        """Position embedding (1, 2 + f*t, D) for an f x t grid, as the original AST makes it: the
        middle of the stored grid if that is larger, bilinear interpolation if it is smaller."""
        top, left = (max(0, stored // 2 - n // 2) for stored, n in zip(self.grid, (f, t)))
        grid = self.pos_embed[:, 2:].transpose(1, 2).unflatten(2, self.grid)  # (1, D, f0, t0)
        grid = grid[:, :, top : top + f, left : left + t]
        if grid.shape[2:] != (f, t):
            grid = F.interpolate(grid, size=(f, t), mode="bilinear", align_corners=False)
        grid = grid.flatten(2).transpose(1, 2)  # (1, f*t, D)
        return torch.cat([self.pos_embed[:, :2], grid], dim=1)  # (1, 2 + f*t, D)

    def pooled(self, x):
        """Everything but the last LayerNorm's scale and shift: (B, T, F) -> (B, D). These commute
        with the mean over tokens and come after it; `linear` can cache everything up to here."""
        if x.ndim != 3 or x.shape[2] != self.mels or x.shape[1] < PATCH:
            raise ValueError(f"AST expects (batch, at least {PATCH} frames, {self.mels} mel bins), "
                             f"got {tuple(x.shape)}")
        x = self.patch(x.transpose(1, 2)[:, None])  # (B, T, F) -> (B, 1, F, T) -> (B, D, f, t)
        f, t = x.shape[2:]
        x = x.flatten(2).transpose(1, 2)  # (B, f*t, D), frequency-major: token = row * t + column
        tokens = [token.expand(len(x), -1, -1) for token in (self.cls_token, self.dist_token)]
        x = torch.cat([*tokens, x], dim=1) + self.positions(f, t)  # (B, N = 2 + f*t, D)
        for block in self.blocks:
            again = self.checkpointing and self.training
            x = checkpoint(block, x, use_reentrant=False) if again else block(x)
        x = F.layer_norm(x, (self.embed_dim,), eps=self.norm.eps)  # (B, N, D)
        return x.mean(1) if self.pool == "mean" else x[:, :2].mean(1)  # (B, D)

    def forward(self, x):
        return self.rescale(self.pooled(x))  # (B, E)

    def rescale(self, pooled):
        """The last LayerNorm's scale and shift: (B, D) -> (B, E). All that `linear` trains."""
        return pooled * self.norm.weight + self.norm.bias


class LinearHead(nn.Linear):
    """The classifier, one Linear as in P1: (B, E) -> (B, C). Heads for speakers read labels."""

    def forward(self, embedding, labels=None):
        return super().forward(embedding)


class Model(nn.Module):
    """Encoder and head: (B, T, F), or frozen outputs (B, D), and labels (B,) -> logits (B, C)."""

    def __init__(self, encoder, head):
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, x, labels=None):
        embedding = self.encoder.rescale(x) if x.ndim == 2 else self.encoder(x)  # (B, E)
        return self.head(embedding, labels)


# --------------------------------------------------------------------------------------------------
# 2. Methods: units, each one idea in one small module, and behind them how they go into the blocks.
# An added path starts at zero, added tokens do not. What all blocks share an insertion makes; if it
# is random and frozen, from a seed of its own: an adapter's file holds only what was trained.


def wrap(ast, names, unit, *args):
    """In every block, replace each named layer by unit(layer, *args)."""
    for block in ast.blocks:
        for name in names:
            block.set_submodule(name, unit(block.get_submodule(name), *args))


def zero(layer):
    """Set the last layer B of an added path B(A(x)) to zero and return it. So the path starts at
    zero exactly; A is random, so B learns from the first step and A from the second."""
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
    """P1's Conformer adapter, a narrow convolution module of a Conformer block. Neighbours in the
    sequence are neighbours in time, so it sees order by itself. As in P1 it also reaches from the
    end of a row of frequency into the next row, and over CLS and DIST."""

    def __init__(self, width, rank, kernel):
        super().__init__()
        self.down = nn.Linear(width, 2 * rank)
        self.pad = ((kernel - 1) // 2, kernel // 2)  # twice as fast as padding="same"
        self.depthwise = nn.Conv1d(rank, rank, kernel, groups=rank)
        self.norm = nn.BatchNorm1d(rank)
        self.up = zero(nn.Linear(rank, width))

    def forward(self, x):
        x = F.glu(self.down(x), dim=2).transpose(1, 2)  # (B, N, 2r) -> (B, N, r) -> (B, r, N)
        x = F.silu(self.norm(self.depthwise(F.pad(x, self.pad))))  # (B, r, N)
        return self.up(x.transpose(1, 2))  # (B, N, D)


class Convpass(nn.Module):
    """Convpass (Jie and Deng, 2207.07039): 1x1, 3x3 over the f x t grid, 1x1, QuickGELU between."""

    def __init__(self, width, rank, rows):
        super().__init__()
        self.rows = rows
        self.down = nn.Linear(width, rank)
        self.conv = nn.Conv2d(rank, rank, 3, padding=1)
        self.up = zero(nn.Linear(rank, width))

    def forward(self, x):
        quick_gelu = lambda x: x * torch.sigmoid(1.702 * x)
        x = quick_gelu(self.down(x)).transpose(1, 2)  # (B, N, D) -> (B, r, N)
        tokens, grid = x[..., :2], x[..., 2:].unflatten(2, (self.rows, -1))  # (B, r, 2), (B,r,f,t)
        # CLS and DIST have no neighbours: each is a 1 x 1 picture, which meets the middle tap only.
        tokens = F.conv1d(tokens, self.conv.weight[:, :, 1, 1:2], self.conv.bias)
        x = torch.cat([tokens, self.conv(grid).flatten(2)], dim=2)  # (B, r, N)
        return self.up(quick_gelu(x).transpose(1, 2))  # (B, N, D)


class DenseMoA(nn.Module):
    """Dense mixture of adapters (2402.00828): sum_i softmax(router x)_i A_i(x), token by token."""

    def __init__(self, width, rank, experts):
        super().__init__()
        self.router = nn.Linear(width, experts)
        self.experts = nn.ModuleList(Bottleneck(width, rank) for _ in range(experts))

    def forward(self, x):
        share = self.router(x).softmax(dim=2)  # (B, N, experts)
        return sum(share[..., i, None] * expert(x) for i, expert in enumerate(self.experts))


class SoftMoA(nn.Module):
    """Soft mixture of adapters (2402.00828; Soft MoE, 2308.00951). Each expert reads `slots`
    mixtures of all tokens (dispatch: softmax over tokens), and each token takes a mixture of all
    slots' outputs (combine: softmax over slots)."""

    def __init__(self, width, rank, experts, slots):
        super().__init__()
        self.phi = nn.Parameter(torch.randn(width, experts * slots) * width**-0.5)
        self.experts = nn.ModuleList(Bottleneck(width, rank) for _ in range(experts))

    def forward(self, x):
        logits = x @ self.phi  # (B, N, experts * slots)
        slots = logits.softmax(dim=1).transpose(1, 2) @ x  # (B, experts * slots, D)
        parts = slots.chunk(len(self.experts), dim=1)  # experts x (B, slots, D)
        slots = torch.cat([expert(part) for expert, part in zip(self.experts, parts)], dim=1)
        return logits.softmax(dim=2) @ slots  # (B, N, D)


class Placed(nn.Module):
    """A sub-layer f with an adapter a, in the places that P1 ablates (D7). Without residual the
    zero start silences the sub-layer: this is not the frozen model any more."""

    def __init__(self, layer, adapter, form, at, residual):
        super().__init__()
        self.layer, self.adapter = layer, adapter
        self.form, self.at, self.residual = form, at, residual

    def forward(self, u):
        if self.form == "parallel":
            return self.layer(u) + self.adapter(u)  # both read u
        x = u if self.at == "before" else self.layer(u)
        x = x + self.adapter(x) if self.residual else self.adapter(x)
        return self.layer(x) if self.at == "before" else x  # without residual f(a(u)), a(f(u))


# One adapter a block is Pfeiffer's placement, one at each sub-layer is Houlsby's.
SITES = {"ffn": ["mlp"], "mhsa": ["attn"], "both": ["attn", "mlp"]}


def place(unit, ast, where, form, at, residual, **options):
    """An adapter at the FFN, the MHSA or both of every block; that sub-layer's LayerNorm trains."""
    sites = SITES[where]
    wrap(ast, sites, lambda f: Placed(f, unit(ast.embed_dim, **options), form, at, residual))
    for block in ast.blocks:
        block.norm1.requires_grad_("attn" in sites)
        block.norm2.requires_grad_("mlp" in sites)


class LoRA(nn.Module):
    """Low-rank update of a Linear (Hu et al., 2106.09685): W x + b + (alpha / r) B A x."""

    def __init__(self, linear, rank, alpha):
        super().__init__()
        self.linear, self.scale = linear, alpha / rank
        self.A = nn.Parameter(torch.empty(rank, linear.in_features))  # (r, D)
        self.B = nn.Parameter(torch.zeros(linear.out_features, rank))  # (D, r), zero at the start
        nn.init.kaiming_uniform_(self.A, a=5**0.5)

    def forward(self, x):
        return self.linear(x) + self.scale * F.linear(F.linear(x, self.A), self.B)

    def folded(self):
        """The weight (D, D) of a plain Linear that does the same."""
        return self.linear.weight + self.scale * self.B @ self.A


class DoRA(LoRA):
    """LoRA on the direction of each row of W, and a magnitude m of its own (Liu, 2402.09353)."""

    def __init__(self, linear, rank, alpha):
        super().__init__(linear, rank, alpha)
        self.m = nn.Parameter(linear.weight.detach().norm(dim=1, keepdim=True))  # (D, 1)

    def forward(self, x):
        return F.linear(x, self.folded(), self.linear.bias)

    def folded(self):
        weight = super().folded()
        # The norm counts as a constant (section 4.3 of the paper): less memory, same accuracy.
        return self.m / weight.detach().norm(dim=1, keepdim=True) * weight


def low_rank(unit, ast, targets, rank, alpha):
    """LoRA or DoRA on some of the attention's four Linears; alpha defaults to rank (scale 1)."""
    wrap(ast, [f"attn.{name}" for name in targets], unit, rank, rank if alpha is None else alpha)


class ScaleShift(nn.Module):
    """y -> s y + b behind a layer, s = 1 and b = 0 at the start: SSF (Lian et al., 2210.08823);
    without the shift b, IA3 (Liu et al., 2205.05638)."""

    def __init__(self, layer, width, shift):
        super().__init__()
        self.layer, self.scale = layer, nn.Parameter(torch.ones(width))
        self.shift = nn.Parameter(torch.zeros(width)) if shift else None

    def forward(self, x):
        y = self.layer(x) * self.scale
        return y if self.shift is None else y + self.shift


def scale(ast, names, shift):
    """SSF (with a shift) or IA3 behind these layers; the FFN is four times wider inside."""
    for name in names:
        width = ast.embed_dim * (4 if name in ("mlp.fc1", "mlp.act") else 1)
        wrap(ast, [name], ScaleShift, width, shift)


class Prefixed(nn.Module):
    """p vectors in front of the keys (or values) a Linear makes (Li and Liang, 2101.00190)."""

    def __init__(self, linear, tokens):
        super().__init__()
        self.linear = linear
        self.prefix = nn.Parameter(torch.randn(1, tokens, linear.out_features) * 0.02)

    def forward(self, x):  # (B, N, D) -> (B, p + N, D)
        return torch.cat([self.prefix.expand(len(x), -1, -1), self.linear(x)], dim=1)


class Prompted(nn.Module):
    """A block that reads p learned tokens behind CLS and DIST (VPT, Jia et al., 2203.12119).
    With `replace` they take the place of the previous block's prompts."""

    def __init__(self, block, tokens, width, replace):
        super().__init__()
        self.block, self.skip = block, tokens if replace else 0
        self.prompts = nn.Parameter(torch.empty(1, tokens, width))
        bound = (6 / (PATCH * PATCH + width)) ** 0.5  # as for a patch embedding (VPT, appendix)
        nn.init.uniform_(self.prompts, -bound, bound)

    def forward(self, x):  # (B, N, D) -> (B, N + p, D)
        prompts = self.prompts.expand(len(x), -1, -1)
        return self.block(torch.cat([x[:, :2], prompts, x[:, 2 + self.skip :]], dim=1))


def prompts(ast, tokens, deep):
    """Shallow: p tokens join before the first block. Deep: each further block gets its own."""
    for i in range(len(ast.blocks) if deep else 1):
        ast.blocks[i] = Prompted(ast.blocks[i], tokens, ast.embed_dim, replace=i > 0)


def biases(ast):
    """BitFit (Zaken et al., 2106.10199): biases of Linear and LayerNorm, not of the patches."""
    for name, parameter in ast.named_parameters():
        parameter.requires_grad_(name.endswith("bias") and name != "patch.bias")


# --------------------------------------------------------------------------------------------------
# 3. adapt: one line a method; freezes, inserts, unfreezes, counts

_PLACE = dict(where="ffn", form="parallel", at="after", residual=True)
METHODS = {  # name: (insertion, its options with the defaults of P1's Table 1)
    "full": (lambda ast: ast.requires_grad_(True), {}),
    "linear": (lambda ast: None, {}),  # the last LayerNorm, which every method trains, is all
    "bitfit": (biases, {}),
    "prompt-shallow": (partial(prompts, deep=False), dict(tokens=300)),
    "prompt-deep": (partial(prompts, deep=True), dict(tokens=25)),
    "prefix": (lambda ast, tokens: wrap(ast, ["attn.k", "attn.v"], Prefixed, tokens // 2),
               dict(tokens=24)),  # half of the tokens for the keys, half for the values
    "lora": (partial(low_rank, LoRA), dict(rank=6, alpha=None, targets="qv")),
    "adapter": (partial(place, Bottleneck), dict(rank=12, **_PLACE)),
    "conformer": (partial(place, Conformer), dict(rank=8, kernel=31, **_PLACE)),
    "convpass": (lambda ast, **options: place(partial(Convpass, rows=ast.rows), ast, **options),
                 dict(rank=8, **_PLACE)),
    "dense-moa": (partial(place, DenseMoA), dict(rank=6, experts=7, **_PLACE)),
    "soft-moa": (partial(place, SoftMoA), dict(rank=6, experts=7, slots=1, **_PLACE)),
    "dora": (partial(low_rank, DoRA), dict(rank=6, alpha=None, targets="qv")),  # beyond P1
    "ssf": (partial(scale, names=["attn.q", "attn.k", "attn.v", "attn.o", "mlp.fc1", "mlp.fc2",
                                  "norm1", "norm2"], shift=True), {}),
    "ia3": (partial(scale, names=["attn.k", "attn.v", "mlp.act"], shift=False), {}),
}


def adapt(ast, method, **options):
    """Turn a plain AST, in place, into one that trains only what `method` trains, and return it.
    Options are those of METHODS[method]: `rank`, `where` (ffn, mhsa, both), `form` (parallel,
    sequential), `at` (before, after) and `residual` (both for sequential only), `kernel`, `tokens`
    (for prefix the total of keys and values), `alpha`, `targets`, `experts`, `slots`. Besides what
    it inserts every method trains the last LayerNorm (BitFit: its bias)."""
    if ast.adaptation:
        raise ValueError(f"adapt a plain AST: this one carries {ast.adaptation['method']!r}")
    check_options(ast.settings["size"], method, options)
    insert, defaults = METHODS[method]
    ast.adaptation = dict(method=method, options=options, backbone=fingerprint(ast))
    ast.requires_grad_(False)
    ast.norm.requires_grad_(True)
    insert(ast, **defaults | options)
    return ast


def check_options(size, method, options):
    """Raise a sentence for an unknown method, and for options that do not fit it or this size."""
    defaults = METHODS[_known("method", method, METHODS)][1]
    width, _, _, grid = SIZES[size]
    most = dict(rank=width, kernel=2 + math.prod(grid))
    known = dict(where=SITES, form=("parallel", "sequential"), at=("before", "after"),
                 residual=(True, False))
    for name, value in options.items():
        _known(f"option of {method!r}", name, defaults)
        if name in known:
            _known(name, value, known[name])
        elif name == "targets" and (not value or len({*value} & {*"qkvo"}) < len(value)):
            raise ValueError(f"targets {value!r}: name some of q, k, v, o, each once, such as 'qv'")
        elif isinstance(value, int) and not 1 <= value <= most.get(name, value):
            raise ValueError(f"{name} {value}: expected at least 1"
                             + f" and at most {most[name]} on AST-{size}" * (name in most))
        elif method == "prefix" and value % 2:
            raise ValueError(f"tokens {value} is odd: half are keys, half are values")
    if {"at", "residual"} & options.keys() and options.get("form") != "sequential":
        raise ValueError("`at` and `residual` are for form='sequential': parallel has no order")


def count(module):
    """Return the numbers of trainable, of frozen and of all parameters of a module."""
    trainable = sum(p.numel() for p in module.parameters() if p.requires_grad)
    total = sum(p.numel() for p in module.parameters())
    return trainable, total - trainable, total


def training_memory(model, clips, frames, bf16):
    """Return the MB that a training step of so many clips needs beside the weights: what is kept
    for the backward pass, gradients and AdamW's two moments. Counted, so equal on every device."""
    x = model.head.weight.new_zeros(clips, frames, model.encoder.mels)  # (B, T, F)
    kept, weights = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}

    def note(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor.detach()  # the tensor itself holds the graph that holds it: never freed

    hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
    with hooks, torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
        model.train()(x, x.new_zeros(clips, dtype=torch.long)).sum().backward()
    activations = sum(size for place, size in kept.items() if place not in weights)
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    return round((activations + 3 * trained) / 2**20, 2)


def recipe(size, method):
    """Return P1's learning rate (section 3.1), or our settings for a nano AST. It is four hundred
    times smaller than AST-base, and its 110 tokens are fewer than P1's 300 prompts."""
    tokens = {"prompt-shallow": 32, "prompt-deep": 8, "prefix": 8}
    if size == "nano":
        return dict(lr=1.5e-3 if method == "full" else 1e-2, warmup=0.1, batch_size=16,
                    frames=100, tokens=tokens.get(method))
    return dict(lr={"full": 5e-5, "linear": 1e-3}.get(method, 1e-2 if method in tokens else 5e-3))


def _known(what, name, known):
    """Return `name` if it is among `known`, else raise a sentence that lists the valid ones."""
    if name not in known:
        hint = "choose from " + ", ".join(map(str, known)) if known else "it has none"
        raise ValueError(f"unknown {what} {name!r}: {hint}")
    return name


# --------------------------------------------------------------------------------------------------
# 4. Pretrained weights: four layouts of the same AST, told apart by their keys

# AudioSet checkpoints of AST's authors, as their README links them (github.com/YuanGongND/ast).
# Stride 16 is for laptops: 514 tokens instead of 1,214 for 10 s, 0.442 mAP instead of 0.459.
AUDIOSET = {  # name: (address, sha256); no checksum is published: if you know one, put it here
    "audioset": ("https://www.dropbox.com/s/ca0b1v2nlxzyeb4/audioset_10_10_0.4593.pth?dl=1", ""),
    "audioset-16": ("https://www.dropbox.com/s/mdsa4t1xmcimia6/audioset_16_16_0.4422.pth?dl=1", ""),
}
RENAME = [  # (their key, ours), applied in this order: later lines see what earlier ones left
    # DataParallel, the original's class and Hugging Face's classifier wrap the whole model.
    (r"^(module\.)?(v\.|audio_spectrogram_transformer\.)?", ""),
    (r"^embeddings\.patch_embeddings\.projection|^patch_embed\.proj", "patch"),
    (r"^embeddings\.distillation_token", "dist_token"),
    (r"^embeddings\.position_embeddings", "pos_embed"), (r"^embeddings\.", ""),
    (r"^(encoder\.layer|layers)\.", "blocks."),
    (r"layernorm_before", "norm1"), (r"layernorm_after", "norm2"), (r"^layernorm\.", "norm."),
    (r"attention\.attention\.([qkv])(uery|ey|alue)|attention\.([qkv])_proj", r"attn.\1\3"),
    (r"attention\.output\.dense|attention\.o_proj|attn\.proj", "attn.o"),
    (r"intermediate\.dense", "mlp.fc1"), (r"output\.dense", "mlp.fc2"),
]
HEADS = r"^(mlp_head|head|head_dist|classifier)\."  # AudioSet's and ImageNet's: not ours


def load_pretrained(ast, path):
    """Load a checkpoint of the same size into a plain AST and return a sentence about it: AST's
    `.pth`, Hugging Face's `.bin` or `.safetensors`, a DeiT from ImageNet, or a file of ours. The
    position embedding gives grid and stride, the layout LayerNorm's eps: with near-zero tokens the
    wrong eps moves outputs by 1e-2."""
    if ast.adaptation:  # it would become plain again
        raise ValueError(f"load into a plain AST: this one carries {ast.adaptation['method']!r}")
    state, own = read_weights(path)
    keys, size = " ".join(state), ast.settings["size"]
    layout = "original" if "qkv" in keys else "Hugging Face" if "layernorm" in keys else "our"
    state = to_our_names(state)
    for key in {"pos_embed", "patch.weight"} - state.keys():
        raise ValueError(f"{path} is not an AST-{size}: it has no {key}")
    eps = 1e-12 if layout == "Hugging Face" else 1e-6
    known = dict(eps=eps) | infer_grid(ast, state["pos_embed"].shape[1] - 2) | own  # own wins
    with torch.device("meta"):  # built again for them, without drawing random weights again
        ast.__init__(**ast.settings | known)
    if ast.settings["pos_embed"] == "zero":
        state["pos_embed"] = torch.zeros_like(state["pos_embed"])
    # An ImageNet model reads three colours, and grey is the same in all three: add their weights.
    state["patch.weight"] = state["patch.weight"].sum(1, keepdim=True)  # -> (D, 1, 16, 16)
    try:
        ast.to_empty(device="cpu").load_state_dict(state)
    except RuntimeError as error:  # it lists missing and unexpected keys, and shapes that differ
        raise ValueError(f"{path} is not an AST-{size}: {error}") from error
    return (f"{Path(path).name}: {layout} layout, {len(state)} tensors, positions "
            f"{ast.grid[0]} x {ast.grid[1]}, stride {ast.stride}, eps {ast.norm.eps:g}")


def to_our_names(state):
    """{key: tensor} of any layout -> the same under our names, without heads."""
    renamed = {}
    for key, value in state.items():
        for pattern, ours in RENAME:
            key = re.sub(pattern, ours, key)
        if ".qkv." in key:  # one matrix with the rows of q, then k, then v
            renamed |= {key.replace("qkv", name): x for name, x in zip("qkv", value.chunk(3))}
        elif not re.match(HEADS, key):
            renamed[key] = value
    return renamed


def infer_grid(ast, patches):
    """Return grid and stride for so many positions: the AST's own, or those of AudioSet's 1024
    frames (each stride has another number), else a square, as ImageNet's pictures are."""
    known = {s: [(n - PATCH) // s + 1 for n in (ast.mels, 1024)] for s in range(16, 7, -1)}
    for stride, grid in [(ast.stride, ast.grid), *known.items()]:
        if math.prod(grid) == patches:
            return dict(grid=grid, stride=stride)
    return dict(grid=[math.isqrt(patches)] * 2, stride=ast.stride)


def read_weights(path):
    """Return {key: tensor} of a `.safetensors` or a torch file, whose code never runs, and the
    grid, stride and eps that our own files hold."""
    if not Path(path).is_file():
        raise ValueError(f"no checkpoint at {path}")
    try:
        state = (read_safetensors(path) if str(path).endswith(".safetensors")
                 else torch.load(path, map_location="cpu", weights_only=True))
        own = {name: value for name, value in state.get("settings", {}).items()
               if name in ("grid", "stride", "eps")}
        for name in ("encoder", "model", "state_dict"):  # our own files; DeiT's
            state = state.get(name, state)
        return dict(state), own
    except Exception as error:  # many kinds, by what the file holds
        raise ValueError(f"{path} is no checkpoint that loads safely: it is damaged, holds no "
                         "weights, or Python code, which is never run") from error


def read_safetensors(path):
    """The format: 8 bytes of header length, a JSON header, then the tensors' raw bytes."""
    kinds = dict(F16=torch.float16, BF16=torch.bfloat16, F32=torch.float32, F64=torch.float64)
    raw, state = bytearray(Path(path).read_bytes()), {}
    start = 8 + int.from_bytes(raw[:8], "little")
    header, body = json.loads(raw[8:start]), memoryview(raw)[start:]
    header.pop("__metadata__", None)
    if max(entry["data_offsets"][1] for entry in header.values()) != len(body):
        raise ValueError("the last tensor does not end where the file ends")
    for key, entry in header.items():
        first, last = entry["data_offsets"]
        tensor = torch.frombuffer(body[first:last], dtype=kinds[entry["dtype"]])
        state[key] = tensor.reshape(entry["shape"])
    return state


# --------------------------------------------------------------------------------------------------
# 5. Adapter files: only what was trained, for one backbone


def fingerprint(ast):
    """A short hash of a plain AST's weights: an adapter fits the backbone it was trained on."""
    digest = hashlib.sha256(json.dumps(ast.settings).encode())  # pool and stride count too
    for name, value in sorted(ast.state_dict().items()):
        digest.update(name.encode())
        if not value.is_meta:  # counting on "meta" has shapes and no weights
            digest.update(value.float().cpu().contiguous().numpy())
    return digest.hexdigest()[:16]


def adapter_state(ast):
    """Return method, options, backbone's fingerprint and what was trained, with BatchNorm's
    buffers: kilobytes of plain values and tensors, for torch.load(weights_only=True)."""
    if not ast.adaptation:
        raise ValueError("this AST is plain: adapt it first, or save its state_dict")
    frozen = {name for name, p in ast.named_parameters(remove_duplicate=False)
              if not p.requires_grad}  # one that blocks share has a name in each
    weights = {k: v.cpu().clone() for k, v in ast.state_dict().items() if k not in frozen}
    return dict(ast.adaptation, weights=weights)


def load_adapter(ast, state):
    """Return a new AST that carries the adapter `state`; the plain `ast` gives what it gave before.
    Both share the weights that the adapter leaves frozen (now frozen in `ast` too): ten adapters
    on one backbone cost ten times kilobytes. An adapter of another backbone is refused."""
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
def cls_attention(ast, x):
    """How much CLS looks at each patch in the last block, all heads' mean: (B, T, F) -> (B, f, t).
    Prompts and prefixes stand before the patches, so the last f*t keys are the patches."""
    attention = [module for module in ast.modules() if isinstance(module, Attention)][-1]
    read = []
    hook = attention.register_forward_pre_hook(lambda module, inputs: read.extend(inputs))
    ast(x)
    hook.remove()
    q, k = (attention.split(linear(*read)) for linear in (attention.q, attention.k))
    weights = (q[:, :, :1] @ k.mT / q.shape[3] ** 0.5).softmax(3).mean((1, 2))  # (B, N)
    columns = (x.shape[1] - PATCH) // ast.stride + 1
    return weights[:, -ast.rows * columns:].unflatten(1, (ast.rows, columns))  # (B, f, t)


def draw_attention(axes, ast, x, title):
    """Draw a spectrogram (1, T, F) on the first of two axes, and below it what CLS looks at."""
    axes[0].set_title(f"{title}; below: attention of CLS in the last block")
    for axis, picture in zip(axes, (x[0].T, cls_attention(ast, x)[0])):  # (F, T), (f, t)
        axis.imshow(picture.cpu().numpy(), origin="lower", aspect="auto", cmap="magma",
                    extent=(0, x.shape[1] / 100, 0, x.shape[2]))
        axis.set(xlabel="seconds", ylabel="mel bin")


# --------------------------------------------------------------------------------------------------
# 6. Demo: `python ast_adapters.py` prints every method's trainable parameters on AST-base


def main():
    with torch.device("meta"):  # shapes without memory: counting needs no weights
        total = count(AST("base"))[2]
        shape = tuple(AST("base")(torch.empty(2, 500, 128)).shape)
        print(f"AST-base: {total:,} parameters; (B, T, F) = (2, 500, 128) -> {shape}\n")
        print(f"{'method':15s} {'trainable':>11s} {'share':>7s}   options (defaults)")
        for method, (_, options) in METHODS.items():
            trainable = count(adapt(AST("base"), method))[0]
            shown = " ".join(f"{k}={v}" for k, v in options.items() if k not in ("at", "residual"))
            print(f"{method:15s} {trainable:11,} {trainable / total:7.2%}   {shown}")
    print("\nTrainable: without the head (769 C), with the last LayerNorm (1,536).")


if __name__ == "__main__":
    main()
