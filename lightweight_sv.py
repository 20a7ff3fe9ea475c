"""Speaker verification made lightweight: three hosts and one module that lightens any of them.

An encoder maps log-mel features (B, T, F) to a speaker embedding (B, E). Two utterances are
compared by the cosine of their embeddings. To lighten a host, its features are split into S subsets
of channels. Each subset is updated with what the other subsets know. The updated subsets go through
the next block independently: it is 1/S as wide and costs about 1/S. At S = 1 the host is plain.

Paper: "Lightweight Speaker Verification Using Transformation Module with Feature Partition and
Fusion", arXiv 2312.03324. We know its abstract, not its equations. `TransformationModule` and the
sizes of AMCRN are our reconstruction. The module uses the operations that the abstract names:
convolution, pooling, mean, concatenation, normalisation, element-wise summation; and a softmax.

Sections: 1 lightening, 2 convolution over time and pooling, 3 ResNet34, 4 ECAPA-TDNN, 5 AMCRN,
6 training head, 7 scoring, 8 cost, 9 command line: `python lightweight_sv.py` prints what each host
costs, `python lightweight_sv.py scores.txt` prints error rates.

Axis letters: B batch, T frames, F mel bins, D width (channels), E embedding size, C speakers,
S subsets, H rows of a map (mel bins in ResNet34, one row in the other hosts).

Does not: read audio or make features (data.py), train (train.py), load weights, score by PLDA.
"""

import copy
import sys
import time
from functools import partial
from math import cos, gcd, pi, sin
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

# -----------------------------------------------------------------------------
# 1. Lightening: fuse S subsets of the channels, then run S narrow blocks on them.
#
# Channels are ordered by subset: the first D/S channels are subset 1, and so on. A block with S
# `groups` is S narrow blocks side by side, each with its own weights. Grouped convolutions keep the
# groups apart; the rest of a block works channel by channel or group by group.
#
# Every map is (B, D, H, T). In memory the channels of one position are neighbours: (B, H, T, D),
# torch's channels_last. Code that splits channels works in this order, which saves copies of maps.


def split(x, subsets):
    """(B, D, H, T) -> (B, H, T, S, D/S), the order of the memory."""
    return x.movedim(1, -1).unflatten(-1, (subsets, -1))


def join(parts):
    """The inverse of split: (B, H, T, S, D/S) -> (B, D, H, T)."""
    return parts.flatten(-2).movedim(-1, 1)


class TransformationModule(nn.Module):
    """Update every subset with what the subsets have in common. p_s is the mean of a subset over
    all positions (pooling):

        m = sum over s of a_s p_s        y_s = x_s + gamma_s norm(m)

    The weights a_s sum to one; a 1x1 convolution computes them from p_1 ... p_S side by side.
    gamma is zero at the start, so the module begins as the identity. gamma has a gradient at the
    first step, the gate from the second step on. To mix the maps themselves, instead of their
    means, cost half of a light ResNet34's training step."""

    def __init__(self, channels, subsets):
        super().__init__()
        self.subsets = subsets
        self.gate = nn.Linear(channels, subsets)    # on means it is the 1x1 convolution
        self.norm = nn.BatchNorm1d(channels // subsets, affine=False)
        self.gamma = nn.Parameter(torch.zeros(channels))

    def forward(self, x):
        # a sum in the order of the memory: the gradients of maps stay in it, the step takes 0.95
        pooled = x.movedim(1, -1).sum(dim=(1, 2)) / (x.shape[2] * x.shape[3])       # (B, D)
        weights = self.gate(pooled).softmax(dim=1).unsqueeze(1)     # (B, 1, S), sum 1: a mean
        parts = pooled.unflatten(1, (self.subsets, -1))             # (B, S, D/S)
        mean = self.norm((weights @ parts).squeeze(1))              # (B, D/S)
        update = self.gamma * torch.cat([mean] * self.subsets, dim=1)       # (B, D)
        # in the map's own precision: in bfloat16 a light ResNet34's step takes 0.73
        return x + update[..., None, None].to(x.dtype)              # (B, D, H, T)


class PlainMean(nn.Module):
    """The simplest fusion, for comparison: y_s = x_s + mean of all subsets."""

    def __init__(self, channels, subsets):
        super().__init__()
        self.subsets = subsets

    def forward(self, x):
        parts = split(x, self.subsets)                              # (B, H, T, S, D/S)
        return join(parts + parts.mean(dim=3, keepdim=True))        # (B, D, H, T)


# "none" is the other comparison: no subset hears of another one before the pooling
FUSIONS = {"module": TransformationModule, "mean": PlainMean, "none": nn.Identity}


class Shared(nn.Module):
    """One narrow block for all subsets: they pass it like S times as many utterances."""

    def __init__(self, block, subsets):
        super().__init__()
        self.block, self.subsets = block, subsets

    def forward(self, x):
        x = split(x, self.subsets).movedim(3, 0).flatten(0, 1)      # (S*B, H, T, D/S)
        x = self.block(x.movedim(-1, 1)).movedim(1, -1)
        return join(x.unflatten(0, (self.subsets, -1)).movedim(0, 3))       # (B, D, H, T)


def lighten(block, d_in, d_out, subsets=1, share=False, fusion="module", **options):
    """Return the block that a host asks for: plain when subsets is 1. Lightened it is a fusion,
    then S narrow blocks, side by side as groups; with `share` one narrow block for all subsets."""
    if fusion not in FUSIONS:
        raise ValueError(f"unknown fusion {fusion!r}, expected one of: {', '.join(FUSIONS)}")
    if subsets == 1:
        return block(d_in, d_out, **options)
    narrow = (Shared(block(d_in // subsets, d_out // subsets, **options), subsets) if share
              else block(d_in, d_out, groups=subsets, **options))
    return nn.Sequential(FUSIONS[fusion](d_in, subsets), narrow)


def check_subsets(subsets, **sizes):
    """Refuse a number of subsets that does not divide every size, and say which ones do."""
    common = gcd(*sizes.values())
    if subsets < 1 or common % subsets:
        fit = ", ".join(str(n) for n in range(1, common + 1) if common % n == 0)
        named = " and ".join(f"{name} {size}" for name, size in sizes.items())
        raise ValueError(f"subsets={subsets} does not divide {named}; these would: {fit}")


def as_map(x, mels):
    """Features (B, T, F) as a map of one row (B, F, 1, T): a view, already in channels_last."""
    if x.dim() != 3 or x.shape[2] != mels:
        raise ValueError(f"expected features (batch, frames, {mels} mel bins), got {(*x.shape,)}")
    return x.transpose(1, 2).unsqueeze(2)


# -----------------------------------------------------------------------------
# 2. Convolution over time, and pooling: statistics that turn any number of frames into one vector.


class Conv(nn.Conv1d):
    """A convolution over time that keeps the length of a map (B, D, 1, T)."""

    def __init__(self, d_in, d_out, groups=1, kernel=1, dilation=1, bias=True):
        super().__init__(d_in, d_out, kernel, dilation=dilation, groups=groups, bias=bias,
                         padding=dilation * (kernel // 2))

    def forward(self, x, weight=None):
        weight = (self.weight if weight is None else weight).unsqueeze(2)   # a kernel of one row
        # dilation does nothing to a kernel of one, but torch takes a faster way with it
        dilation = (1, 2 if x.is_cpu and weight.shape[-1] == 1 else self.dilation[0])
        if len(x) == 1 and x.is_cpu and not self.training and torch.backends.mkldnn.is_available():
            # for one utterance on one thread torch takes slower ways than oneDNN, by 1.2 in all
            return torch.mkldnn_convolution(x.to(weight.dtype), weight, self.bias,
                                            (0, self.padding[0]), (1, 1), dilation, self.groups)
        return F.conv2d(x, weight, self.bias, 1, (0, self.padding[0]), dilation, self.groups)


class ContextConv(Conv):
    """A 1x1 convolution of frames beside a context (B, 2*D), whose part is computed once."""

    def forward(self, x, context):
        frames, shared = self.weight.split([x.shape[1], context.shape[1]], dim=1)
        return super().forward(x, frames) + F.linear(context, shared.squeeze(-1))[..., None, None]


def mean_and_std(x, weights=None):
    """Mean and deviation over time, side by side; `weights` (none: equal) sum to one."""
    x = x.float()       # under autocast too: a difference of squares needs all the digits
    total, weighted = (x.shape[-1], x) if weights is None else (1, x * weights.float())
    mean, square = weighted.sum(dim=-1) / total, (weighted * x).sum(dim=-1) / total     # (B, D, H)
    # the clamp keeps the root's gradient finite where a channel is constant
    std = (square - mean * mean).clamp(min=1e-7).sqrt()
    return torch.cat([mean.flatten(1), std.flatten(1)], dim=1)      # (B, 2*D*H)


class AttentivePooling(nn.Module):
    """Attentive statistics pooling: each channel weighs the frames in its own way, by scores that
    compare each frame with the mean and deviation of the whole utterance (the context)."""

    def __init__(self, channels, bottleneck=128):
        super().__init__()
        self.down = ContextConv(3 * channels, bottleneck)
        # no bias: the same number added to all frames cancels in the softmax over them
        self.up = Conv(bottleneck, channels, bias=False)

    def forward(self, x):
        frames = x.float()                                          # once, not in each mean_and_std
        context = mean_and_std(frames).to(x.dtype)                  # (B, 2*D)
        scores = self.up(torch.tanh(self.down(x, context)))         # (B, D, 1, T)
        # in the order of the memory, (B, T, 1, D), the softmax makes no copy
        return mean_and_std(frames, scores.transpose(1, 3).softmax(dim=1).transpose(1, 3))


# -----------------------------------------------------------------------------
# 3. ResNet34: the picture network, reading the spectrogram as a picture.


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut; the first may halve the map."""

    def __init__(self, d_in, d_out, groups=1, stride=1):
        super().__init__()
        conv = partial(nn.Conv2d, bias=False, groups=groups)
        self.conv1, self.norm1 = conv(d_in, d_out, 3, stride, padding=1), nn.BatchNorm2d(d_out)
        self.conv2, self.norm2 = conv(d_out, d_out, 3, padding=1), nn.BatchNorm2d(d_out)
        self.shortcut = nn.Identity()
        if stride != 1 or d_in != d_out:
            # pooling takes the stride: in torch 2.11 a 1x1 convolution with a stride and less than
            # 16 channels corrupts memory (CPU, channels_last, backward pass)
            self.shortcut = nn.Sequential(nn.AvgPool2d(1, stride), conv(d_in, d_out, 1),
                                          nn.BatchNorm2d(d_out))

    def forward(self, x):
        y = self.norm1(self.conv1(x)).relu_()
        return self.norm2(self.conv2(y)).add_(self.shortcut(x)).relu_()


class ResNet34(nn.Module):
    """3, 4, 6 and 3 basic blocks of 1, 2, 4 and 8 times the width.

    Lightened, every block is split. Stem, pooling and the last linear layer stay whole.

    >>> ResNet34(subsets=4)(torch.randn(2, 200, 80)).shape
    torch.Size([2, 256])
    """

    normalise = "utterance"

    def __init__(self, mels=80, width=32, embed_dim=256, subsets=1, share=False, fusion="module"):
        super().__init__()
        check_subsets(subsets, width=width)
        self.mels, self.embed_dim = mels, embed_dim
        self.stem = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        block = partial(lighten, BasicBlock, subsets=subsets, share=share, fusion=fusion)
        widths = [width * 2**i for i, depth in enumerate((3, 4, 6, 3)) for _ in range(depth)]
        # a block that doubles the width halves the map
        self.trunk = nn.Sequential(*(block(d_in, d_out, stride=d_out // d_in)
                                     for d_in, d_out in zip([width, *widths], widths)))
        rows = -(-mels // 8)    # of the last map: mels / 8, rounded up
        self.embed = nn.Linear(2 * widths[-1] * rows, embed_dim)

    def forward(self, x):
        x = as_map(x, self.mels).transpose(2, 3).contiguous()       # (B, F, T, 1)
        x = self.norm(self.stem(x.movedim(3, 1))).relu_()           # (B, D, F, T)
        return self.embed(mean_and_std(self.trunk(x)))              # (B, 8*D, F/8, T/8) -> (B, E)


# -----------------------------------------------------------------------------
# 4. ECAPA-TDNN: dilated convolutions over time, several scales and channel gates in each block.


class ConvReluNorm(nn.Module):
    """Convolution over time, ReLU and (if `norm`) BatchNorm: the brick of ECAPA."""

    def __init__(self, d_in, d_out, groups=1, kernel=1, dilation=1, norm=True):
        super().__init__()
        self.conv, self.kernel = Conv(d_in, d_out, groups, kernel, dilation), kernel
        self.norm = nn.BatchNorm2d(d_out) if norm else nn.Identity()

    def forward(self, x):
        if self.training and self.kernel == 1 and x.dtype == torch.float32 and x.shape[3] % 4 == 0:
            # to a kernel of one, frames in rows of four are the same, but the gradient of grouped
            # weights takes 0.65 of the time (CPUs with AVX-512), a light ECAPA's step 0.95
            rows = x.unflatten(3, (-1, 4)).flatten(2, 3)            # (B, D, T/4, 4)
            return self.norm(self.conv(rows).relu_()).flatten(2).unsqueeze(2)
        return self.norm(self.conv(x).relu_())


class Res2Conv(nn.Module):
    """Convolutions in a chain over `scale` slices of a group: each sees further than the last."""

    def __init__(self, channels, groups, dilation, scale):
        super().__init__()
        self.groups, self.scale, d = groups, scale, channels // scale
        self.chain = nn.ModuleList(ConvReluNorm(d, d, groups, 3, dilation)
                                   for _ in range(scale - 1))

    def forward(self, x):
        slices = split(x, self.groups).chunk(self.scale, dim=-1)    # (B, 1, T, G, D/G/scale) each
        done, y = [], 0
        for conv, part in zip(self.chain, slices):
            y = conv(join(part) + y)        # joined first: sums of split maps are slow in bfloat16
            done.append(split(y, self.groups))
        return join(torch.cat([*done, slices[-1]], dim=-1))         # (B, D, 1, T)


class SqueezeExcite(nn.Module):
    """Scale each channel by a gate computed from all channels' means (of its group)."""

    def __init__(self, channels, groups, bottleneck):
        super().__init__()
        self.down = Conv(channels, groups * bottleneck, groups)
        self.up = Conv(groups * bottleneck, channels, groups)

    def forward(self, x):
        mean = x.sum(dim=-1, keepdim=True) / x.shape[-1]    # a sum, as in TransformationModule
        return x * torch.sigmoid(self.up(self.down(mean).relu_()))          # gate (B, D, 1, 1)


class SERes2Block(nn.Module):
    """1x1, Res2, 1x1, squeeze-excitation, and a shortcut around them all."""

    def __init__(self, d_in, d_out, groups=1, dilation=1, scale=8, bottleneck=128):
        super().__init__()
        self.path = nn.Sequential(ConvReluNorm(d_in, d_out, groups),
                                  Res2Conv(d_out, groups, dilation, scale),
                                  ConvReluNorm(d_out, d_out, groups),
                                  SqueezeExcite(d_out, groups, bottleneck))

    def forward(self, x):
        return x + self.path(x)


class ECAPA_TDNN(nn.Module):
    """Stem, three SE-Res2 blocks, aggregation of all three, attentive pooling, embedding.

    Lightened, the mel axis is split into bands, the aggregation (1x1 convolution, ReLU) is a block
    like the others, and the subsets share the bottlenecks of squeeze-excitation. Pooling and the
    last linear layer stay whole."""

    normalise = "utterance"

    def __init__(self, mels=80, width=512, embed_dim=192, subsets=1, share=False, fusion="module"):
        super().__init__()
        if width % 8:
            raise ValueError(f"ECAPA-TDNN cuts its width into 8 scales: {width} is no multiple")
        check_subsets(subsets, mels=mels, scale=width // 8)
        self.mels, self.embed_dim, self.subsets = mels, embed_dim, subsets
        aggregate = min(1536, 3 * width)
        light = partial(lighten, subsets=subsets, share=share, fusion=fusion)
        self.stem = light(ConvReluNorm, mels, width, kernel=5)
        self.blocks = nn.ModuleList(
            light(SERes2Block, width, width, dilation=dilation, bottleneck=128 // subsets)
            for dilation in (2, 3, 4))
        self.aggregate = light(ConvReluNorm, 3 * width, aggregate, norm=False)
        self.pool = AttentivePooling(aggregate)
        self.norm = nn.BatchNorm1d(2 * aggregate)
        self.embed = nn.Linear(2 * aggregate, embed_dim)

    def forward(self, x):
        x, outputs = self.stem(as_map(x, self.mels)), []            # (B, D, 1, T)
        for block in self.blocks:
            x = block(x)
            outputs.append(split(x, self.subsets))
        x = self.aggregate(join(torch.cat(outputs, dim=-1)))        # (B, 3*D, 1, T)
        return self.embed(self.norm(self.pool(x)))                  # (B, E)


# -----------------------------------------------------------------------------
# 5. AMCRN: attention-based multi-scale convolutional recurrent network.


class MultiScaleBlock(nn.Module):
    """Four convolutions of different reach side by side, mixed, and a gate over time."""

    def __init__(self, d_in, d_out, groups=1, kernels=(1, 3, 5, 7)):
        super().__init__()
        self.groups = groups
        self.scales = nn.ModuleList(ConvReluNorm(d_in, d_out // len(kernels), groups, kernel)
                                    for kernel in kernels)
        self.mix = ConvReluNorm(d_out, d_out, groups)
        self.gate = Conv(d_out, groups, groups)

    def forward(self, x):
        scales = [split(scale(x), self.groups) for scale in self.scales]
        x = self.mix(join(torch.cat(scales, dim=-1)))               # (B, D, 1, T)
        gate = torch.sigmoid(self.gate(x))                          # (B, G, 1, T)
        return join(split(x, self.groups) * split(gate, self.groups))       # (B, D, 1, T)


class RecurrentBlock(nn.Module):
    """A bidirectional LSTM and a shortcut. torch has no grouped LSTM: one for each group."""

    def __init__(self, d_in, d_out, groups=1):
        super().__init__()
        narrow = d_in // groups, d_out // groups // 2               # half in each direction
        self.lstms = nn.ModuleList(nn.LSTM(*narrow, batch_first=True, bidirectional=True)
                                   for _ in range(groups))

    def forward(self, x):
        frames = x.squeeze(2).transpose(1, 2)                       # (B, T, D)
        parts = zip(self.lstms, frames.chunk(len(self.lstms), dim=2))
        y = torch.cat([lstm(part)[0] for lstm, part in parts], dim=2)
        return x + y.transpose(1, 2).unsqueeze(2)                   # (B, D, 1, T)


class AMCRN(nn.Module):
    """Multi-scale block, recurrent block, attentive pooling, embedding with BatchNorm.

    The order of the parts is the authors' (arXiv 2306.00426). `width` is that of one scale."""

    normalise = "utterance"

    def __init__(self, mels=80, width=128, embed_dim=192, subsets=1, share=False, fusion="module"):
        super().__init__()
        check_subsets(subsets, mels=mels, width=width)
        self.mels, self.embed_dim = mels, embed_dim
        light = partial(lighten, subsets=subsets, share=share, fusion=fusion)
        self.multiscale = light(MultiScaleBlock, mels, 4 * width)
        self.recurrent = light(RecurrentBlock, 4 * width, 4 * width)
        self.pool = AttentivePooling(4 * width)
        self.embed = nn.Linear(8 * width, embed_dim, bias=False)    # the norm has one
        self.norm = nn.BatchNorm1d(embed_dim)

    def forward(self, x):
        x = self.recurrent(self.multiscale(as_map(x, self.mels)))   # (B, 4*D, 1, T)
        return self.norm(self.embed(self.pool(x)))                  # (B, E)


MODELS = {"amcrn": AMCRN, "resnet34": ResNet34, "ecapa-tdnn": ECAPA_TDNN}

# -----------------------------------------------------------------------------
# 6. Training head: softmax over angles, with a margin that makes training the harder task.


class AAMSoftmax(nn.Module):
    """Logits s cos(theta) of the angle to every speaker's direction. With labels, the true
    speaker's is s cos(theta + m): it must win by a margin of m radians. A loop may set `margin`."""

    def __init__(self, embed_dim, classes, margin=0.2, scale=30.0):
        super().__init__()
        self.margin, self.scale = margin, scale
        self.weight = nn.Parameter(nn.init.xavier_normal_(torch.empty(classes, embed_dim)))

    def forward(self, embedding, labels=None):
        # bfloat16 has 3 digits: not enough for a cosine that is to be multiplied by 30
        with torch.autocast(embedding.device.type, enabled=False):
            cosine = F.linear(F.normalize(embedding.float()), F.normalize(self.weight.float()))
        if labels is None:
            return self.scale * cosine                              # (B, C)
        true = cosine.gather(1, labels[:, None])
        # the clamp: at theta = 0 the root would have an infinite slope, and 0 * inf is NaN
        sine = (1 - true * true).clamp(min=1e-7).sqrt()
        shifted = true * cos(self.margin) - sine * sin(self.margin)         # cos(theta + m)
        line = true - self.margin * sin(self.margin)        # used where theta + m would pass pi
        shifted = torch.where(true > cos(pi - self.margin), shifted, line)
        return self.scale * cosine.scatter(1, labels[:, None], shifted)


# -----------------------------------------------------------------------------
# 7. Scoring: how well scores separate same-speaker trials from the others.
#
# All in float64; rates are fractions from 0 to 1. A trial is accepted when its score is at least
# the threshold. Every distinct score is one threshold, so the order of ties cannot matter. One
# more threshold above the highest score ends the curve.


def check_trials(scores, labels):
    """Scores as float64 and labels as bool (True: same speaker), or a sentence."""
    scores, labels = np.asarray(scores, dtype=np.float64), np.asarray(labels).astype(bool)
    if scores.ndim != 1 or scores.shape != labels.shape:
        raise ValueError(f"expected one label for each score, got scores {scores.shape} "
                         f"and labels {labels.shape}")
    if not np.isfinite(scores).all():
        raise ValueError(f"{(~np.isfinite(scores)).sum()} of {len(scores)} scores are not finite")
    if labels.all() or not labels.any():
        kind = "target" if not labels.any() else "non-target"
        raise ValueError(f"no {kind} trials among {len(labels)}: error rates need both kinds")
    return scores, labels


def error_curve(scores, labels):
    """Return thresholds, P_miss and P_fa at each, from accepting everything to nothing.

    >>> [a.tolist() for a in error_curve([0.1, 0.5, 0.5], [0, 1, 0])]
    [[0.1, 0.5, 0.5000000000000001], [0.0, 0.0, 1.0], [1.0, 0.5, 0.0]]
    """
    scores, labels = check_trials(scores, labels)
    order = np.argsort(scores)
    scores, labels = scores[order], labels[order]
    first = np.flatnonzero(np.r_[True, scores[1:] != scores[:-1]])  # where a new score begins
    thresholds = np.r_[scores[first], np.nextafter(scores[-1], np.inf)]
    rejected = np.r_[first, len(scores)]                            # trials below each threshold
    missed = np.r_[0, np.cumsum(labels)][rejected]                  # targets among them
    targets, others = missed[-1], len(scores) - missed[-1]
    return thresholds, missed / targets, (others - (rejected - missed)) / others


def equal_error_rate(scores, labels):
    """The rate at which P_miss equals P_fa; between two points the curve is a straight line."""
    _, p_miss, p_fa = error_curve(scores, labels)
    gap = p_miss - p_fa                                             # rises from -1 to 1
    i = np.searchsorted(gap, 0)                                     # first point not below 0
    part = gap[i - 1] / (gap[i - 1] - gap[i])
    return float(p_miss[i - 1] + part * (p_miss[i] - p_miss[i - 1]))


def min_dcf(scores, labels, p_target):
    """The least detection cost over all thresholds, both errors costing 1, divided by the cost of
    the better of accepting everything and accepting nothing. Always say p_target with it."""
    _, p_miss, p_fa = error_curve(scores, labels)
    cost = p_target * p_miss + (1 - p_target) * p_fa
    return float(cost.min() / min(p_target, 1 - p_target))


def threshold_at(scores, labels):
    """The score where the two error rates are closest. Do not report errors on the same trials."""
    thresholds, p_miss, p_fa = error_curve(scores, labels)
    return float(thresholds[np.abs(p_miss - p_fa).argmin()])


def error_rates_at(scores, labels, threshold):
    """P_miss and P_fa, fractions, of accepting every score of at least the threshold."""
    scores, labels = check_trials(scores, labels)
    accepted = scores >= threshold
    return float(1 - accepted[labels].mean()), float(accepted[~labels].mean())


def error_rates(scores, labels, threshold=None):
    """EER in %, minDCF at p 0.01 and 0.05; with a threshold both errors at it, in %."""
    results = {"eer": 100 * equal_error_rate(scores, labels)}
    results |= {f"min_dcf_{p}": min_dcf(scores, labels, p) for p in (0.01, 0.05)}
    if threshold is not None:
        miss, alarm = error_rates_at(scores, labels, threshold)
        results |= dict(threshold=threshold, miss=100 * miss, false_alarm=100 * alarm)
    return results


def adaptive_s_norm(scores, pairs, embeddings, cohort, top_n=300, ddof=0):
    """Return the mean of (score - mean) / std over both sides of each trial: mean and std (divided
    by n - ddof) of the side's `top_n` highest cosines with the cohort. `pairs` (trials, 2) are rows
    of `embeddings`. `cohort`: embeddings of strangers' utterances, or a mean for each stranger."""
    embeddings, cohort = (F.normalize(torch.as_tensor(x, dtype=torch.float64)).numpy()
                          for x in (embeddings, cohort))
    top_n, pairs = min(top_n, len(cohort)), np.asarray(pairs)
    if top_n < 2:
        raise ValueError(f"s-norm needs a deviation: at least 2 of the cohort, got {top_n}")
    mean, std = np.empty(len(embeddings)), np.empty(len(embeddings))
    for i in range(0, len(embeddings), 1024):
        cosine = embeddings[i:i + 1024] @ cohort.T                  # (utterances, cohort)
        top = np.partition(cosine, -top_n, axis=1)[:, -top_n:]
        mean[i:i + 1024], std[i:i + 1024] = top.mean(axis=1), top.std(axis=1, ddof=ddof)
    sides = (np.asarray(scores, dtype=np.float64)[:, None] - mean[pairs]) / std[pairs]
    return sides.mean(axis=1)                                       # (trials, 2) -> (trials,)


def draw_det(axes, scores, labels):
    """Draw the detection error trade-off, P_miss over P_fa, both axes in normal deviates (a line
    where scores are normal), with the points of the EER and of both minDCF."""
    _, p_miss, p_fa = error_curve(scores, labels)
    place = lambda p: torch.special.ndtri(torch.as_tensor(p).clamp(1e-4, 1 - 1e-4)).numpy()
    axes.plot(place(p_fa), place(p_miss), color="black")
    eer = equal_error_rate(scores, labels)
    axes.plot(place(eer), place(eer), "o", color="black", label=f"EER {100 * eer:.2f} %")
    for p, marker in ((0.01, "s"), (0.05, "^")):
        least = np.argmin(p * p_miss + (1 - p) * p_fa)
        axes.plot(place(p_fa[least]), place(p_miss[least]), marker, color="grey",
                  label=f"minDCF, p {p}: {min_dcf(scores, labels, p):.3f}")
    percent = [0.1, 1, 5, 20, 40, 60, 80, 95]
    ticks = place(np.array(percent) / 100)
    axes.set(xticks=ticks, xticklabels=percent, xlabel="false alarms, %",
             yticks=ticks, yticklabels=percent, ylabel="misses, %")
    axes.legend()


# -----------------------------------------------------------------------------
# 8. Cost: parameters, multiply-accumulates, and milliseconds, which are not the same thing.


def layer_macs(layer, x, y):
    """Multiply-accumulates of one call of a layer that maps x to y; biases are not counted."""
    if isinstance(layer, nn.LSTM):
        steps, directions = x.numel() // x.shape[-1], 1 + layer.bidirectional
        sizes = [layer.input_size] + [directions * layer.hidden_size] * (layer.num_layers - 1)
        # four gates, each a matrix for the input and one for the last hidden state
        return sum(steps * directions * 4 * layer.hidden_size * (size + layer.hidden_size)
                   for size in sizes)
    return y.numel() * layer.weight[0].numel()      # a row, or a filter: d_in/groups x kernel


@torch.no_grad()
def count_macs(encoder, frames):
    """Multiply-accumulates for one utterance: convolutions, linear layers and LSTMs.

    As in the published counts, a layer counts for all its frames, and sums that are not layers
    (means, gates, the attention product of a transformer, LoRA's products) do not count.
    """
    encoder, total = copy.deepcopy(encoder).eval(), []
    for layer in encoder.modules():
        if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Linear, nn.LSTM)):
            layer.register_forward_hook(lambda layer, x, y: total.append(
                layer_macs(layer, x[0], y[0] if isinstance(y, tuple) else y)))
    encoder(torch.zeros(1, frames, encoder.mels, device=next(encoder.parameters()).device))
    return sum(total)


@torch.inference_mode()
def latency_ms(encoder, frames, repeats=15):
    """Median milliseconds of one utterance on one CPU thread (train.py --profile: of a step)."""
    encoder, threads, taken = copy.deepcopy(encoder).cpu().eval(), torch.get_num_threads(), []
    x = torch.zeros(1, frames, encoder.mels)
    torch.set_num_threads(1)
    for _ in range(repeats + 1):                                    # the first call sets things up
        start = time.perf_counter()
        encoder(x)
        taken.append(1000 * (time.perf_counter() - start))
    torch.set_num_threads(threads)
    return float(np.median(taken[1:]))


def complexity(encoder, frames=200):
    """What an encoder costs: parameters, multiply-accumulates at `frames`, latency."""
    return {"parameters": sum(p.numel() for p in encoder.parameters()),
            "macs": count_macs(encoder, frames),
            "latency_ms": latency_ms(encoder, frames)}


# -----------------------------------------------------------------------------
# 9. Command line: what lightening saves, and the error rates of a score file.


def print_costs():
    """Print hosts x subsets. The last columns are relative to the plain host."""
    print("200 frames; ms: one utterance on one thread\nhost             subsets  params M"
          "     MMAC      ms   params  MACs    ms")
    for name, width in ("resnet34", 32), ("ecapa-tdnn", 512), ("amcrn", 128):
        for s in (1, 2, 4, 8):
            parameters, macs, ms = cost = complexity(MODELS[name](width=width, subsets=s)).values()
            host = cost if s == 1 else host
            ratios = [ours / theirs for ours, theirs in zip(cost, host)]
            print(f"{name + ' ' + str(width):16s}{s:8d}{parameters / 1e6:10.3f}{macs / 1e6:9.1f}"
                  f"{ms:8.1f}" + "{:9.2f}{:6.2f}{:6.2f}".format(*ratios))


def read_scores(path):
    """Read lines `id_a id_b score label` (1: same speaker) as (scores, labels)."""
    scores, labels = [], []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        try:
            _, _, score, label = line.split()
            scores.append(float(score))
            labels.append({"0": 0, "1": 1}[label])
        except (ValueError, KeyError):
            raise ValueError(f"{path}, line {number}: expected `id_a id_b score label`, "
                             f"got {line!r}") from None
    return scores, labels


def main(arguments):
    """Without arguments print the costs; with a score file the error rates."""
    if not arguments:
        return print_costs()
    try:
        scores, labels = read_scores(arguments[0])
        eer, dcf_01, dcf_05 = error_rates(scores, labels).values()
        print(f"{len(scores):,} trials, {sum(labels):,} of one speaker: EER {eer:.3f} %, "
              f"minDCF(p 0.01) {dcf_01:.4f}, minDCF(p 0.05) {dcf_05:.4f}")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main(sys.argv[1:])
