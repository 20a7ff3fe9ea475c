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
costs, `python lightweight_sv.py scores.txt` prints error rates; 10 faster on a CPU.

Axis letters: B batch, T frames, F mel bins, D width (channels), E embedding size, C speakers,
S subsets, G groups of a block (S, or 1 in a plain host), H rows of a map (mel bins in ResNet34, one
row in the other hosts).

Does not: read audio or make features (data.py), train (train.py), load weights, score by PLDA.
"""

import copy
import sys
import timeit
from functools import partial
from math import cos, gcd, pi, sin
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

# --------------------------------------------------------------------------------------------------
# 1. Lightening: fuse S subsets of the channels, then run S narrow blocks on them.
#
# Every map is (B, D, H, T). Channels are ordered by subset: the first D/S channels are subset 1,
# and so on. So x.unflatten(1, (S, -1)) is (B, S, D/S, H, T), and .flatten(1, 2) is the way back.
#
# A block with S `groups` is S narrow blocks side by side, each with its own weights. Grouped
# convolutions keep them apart; the rest of a block works channel by channel or group by group.


class TransformationModule(nn.Module):
    """Update every subset with what the subsets have in common. p_s is the mean of subset x_s over
    all positions (pooling):

        a = softmax(W [p_1; ...; p_S] + b)   m = sum over s of a_s p_s   y_s = x_s + gamma_s norm(m)

    norm is BatchNorm. W is a 1x1 convolution of the means, so a Linear. gamma is zero at the start:
    the module begins as the identity, and W, whose gradient is a multiple of gamma, learns from the
    second step on."""

    def __init__(self, channels, subsets):
        super().__init__()
        self.subsets = subsets
        self.gate = nn.Linear(channels, subsets)  # W and b
        self.norm = nn.BatchNorm1d(channels // subsets, affine=False)
        self.gamma = nn.Parameter(torch.zeros(channels))

    def forward(self, x):  # (B, D, H, T)
        pooled = x.mean(dim=(2, 3), dtype=torch.float32)  # p_1 ... p_S side by side: (B, D)
        weights = self.gate(pooled).softmax(dim=1)  # a: (B, S), sum 1
        parts = pooled.unflatten(1, (self.subsets, -1))  # (B, S, D/S)
        mean = (weights[:, :, None] * parts).sum(dim=1)  # m: (B, D/S)
        update = self.gamma * self.norm(mean).repeat(1, self.subsets)  # (B, D)
        update = update.to(x.dtype)  # a float32 update would turn a bfloat16 map into float32
        return x + update[:, :, None, None]  # (B, D, H, T)


class PlainMean(nn.Module):
    """The simplest fusion, for comparison: y_s = x_s + mean of all subsets."""

    def __init__(self, channels, subsets):
        super().__init__()
        self.subsets = subsets

    def forward(self, x):
        parts = x.unflatten(1, (self.subsets, -1))  # (B, S, D/S, H, T)
        return (parts + parts.mean(dim=1, keepdim=True)).flatten(1, 2)  # (B, D, H, T)


# "none" is the other comparison: no subset hears of another one before the pooling
FUSIONS = {"module": TransformationModule, "mean": PlainMean, "none": nn.Identity}


class Shared(nn.Module):
    """One narrow block for all subsets: they pass it like S times as many utterances."""

    def __init__(self, block, subsets):
        super().__init__()
        self.block, self.subsets = block, subsets

    def forward(self, x):
        x = x.unflatten(1, (self.subsets, -1)).flatten(0, 1)  # (B*S, D/S, H, T)
        x = self.block(x)
        return x.unflatten(0, (-1, self.subsets)).flatten(1, 2)  # (B, D, H, T)


def lighten(block, d_in, d_out, subsets=1, share=False, fusion="module", **options):
    """Return the block that a host asks for: plain when subsets is 1. Lightened it is a fusion,
    then S narrow blocks, side by side as groups; with `share` one narrow block for all subsets."""
    if fusion not in FUSIONS:
        raise ValueError(f"unknown fusion {fusion!r}, expected one of: {', '.join(FUSIONS)}")
    if subsets == 1:
        return block(d_in, d_out, **options)
    if share:
        narrow = Shared(block(d_in // subsets, d_out // subsets, **options), subsets)
    else:
        narrow = block(d_in, d_out, groups=subsets, **options)
    return nn.Sequential(FUSIONS[fusion](d_in, subsets), narrow)


def check_subsets(subsets, **sizes):
    """Refuse a number of subsets that does not divide every size, and say which ones do."""
    common = gcd(*sizes.values())
    if subsets < 1 or common % subsets:
        fit = ", ".join(str(n) for n in range(1, common + 1) if common % n == 0)
        named = " and ".join(f"{name} {size}" for name, size in sizes.items())
        raise ValueError(f"subsets={subsets} does not divide {named}; these would: {fit}")


def as_map(x, mels):
    """Features (B, T, F) as a map of one row (B, F, 1, T)."""
    if x.dim() != 3 or x.shape[2] != mels:
        raise ValueError(f"expected features (batch, frames, {mels} mel bins), got {(*x.shape,)}")
    return x.transpose(1, 2).unsqueeze(2).contiguous()


# --------------------------------------------------------------------------------------------------
# 2. Convolution over time, and pooling: statistics that turn any number of frames into one vector.


def conv(d_in, d_out, groups=1, kernel=1, dilation=1, bias=True):
    """A convolution over time that keeps the length of a map (B, D, 1, T)."""
    padding = dilation * (kernel // 2)
    return nn.Conv2d(d_in, d_out, (1, kernel), padding=(0, padding), dilation=(1, dilation),
                     groups=groups, bias=bias)


def mean_and_std(x, weights=None):
    """Mean and deviation over time, side by side; `weights` (none: equal) sum to one."""
    x = x.float()  # under autocast too: a difference of squares needs all the digits
    if weights is None:
        mean = x.mean(dim=-1)  # (B, D, H)
        square = (x * x).mean(dim=-1)
    else:
        weighted = weights * x
        mean = weighted.sum(dim=-1)
        square = (weighted * x).sum(dim=-1)
    variance = square - mean * mean
    std = variance.clamp(min=1e-7).sqrt()  # the root of 0, a constant channel, has slope infinity
    return torch.cat([mean.flatten(1), std.flatten(1)], dim=1)  # (B, 2*D*H)


class AttentivePooling(nn.Module):
    """Attentive statistics pooling: the mean and deviation over time, where each channel weighs the
    frames x_t by scores of its own. c is the context: mean and deviation of the whole utterance.

        scores_t = V tanh(W [x_t; c] + b)       W [x_t; c] = W1 x_t + W2 c

    W2 c is the same for all frames, so it is computed once."""

    def __init__(self, channels, bottleneck=128):
        super().__init__()
        self.frames = conv(channels, bottleneck)  # W1 and b
        self.context = nn.Linear(2 * channels, bottleneck, bias=False)  # W2
        # V has no bias: the same number added to all frames cancels in the softmax over them
        self.scores = conv(bottleneck, channels, bias=False)

    def forward(self, x):  # (B, D, 1, T)
        context = self.context(mean_and_std(x))[:, :, None, None]  # (B, 128, 1, 1)
        scores = self.scores(torch.tanh(self.frames(x) + context))  # (B, D, 1, T)
        # In float32 also under autocast, which on a CPU would round weights that sum to one.
        return mean_and_std(x, scores.softmax(dim=-1, dtype=torch.float32))  # (B, 2*D)


# --------------------------------------------------------------------------------------------------
# 3. ResNet34: the picture network, reading the spectrogram as a picture.


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut; the first may halve the map."""

    def __init__(self, d_in, d_out, groups=1, stride=1):
        super().__init__()
        square = partial(nn.Conv2d, bias=False, groups=groups)
        self.conv1 = square(d_in, d_out, 3, stride, padding=1)
        self.norm1 = nn.BatchNorm2d(d_out)
        self.conv2 = square(d_out, d_out, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(d_out)
        self.shortcut = nn.Identity()
        if stride != 1 or d_in != d_out:
            # pooling takes the stride: in torch 2.11 a 1x1 convolution with a stride and less than
            # 16 channels corrupts memory (CPU, channels_last, backward pass)
            self.shortcut = nn.Sequential(
                nn.AvgPool2d(1, stride), square(d_in, d_out, 1), nn.BatchNorm2d(d_out))

    def forward(self, x):
        y = F.relu(self.norm1(self.conv1(x)))
        y = self.norm2(self.conv2(y))
        return F.relu(y + self.shortcut(x))


class ResNet34(nn.Module):
    """3, 4, 6 and 3 basic blocks of 1, 2, 4 and 8 times the width.

    Lightened, every block is split. Stem, pooling and the last linear layer stay whole.

    >>> ResNet34(subsets=4)(torch.randn(2, 200, 80)).shape
    torch.Size([2, 256])
    """

    normalise = None  # data.py takes away each clip's own mean per mel bin

    def __init__(self, mels=80, width=32, embed_dim=256, subsets=1, share=False, fusion="module"):
        super().__init__()
        check_subsets(subsets, width=width)
        self.mels, self.embed_dim = mels, embed_dim
        light = partial(lighten, subsets=subsets, share=share, fusion=fusion)
        self.stem = nn.Conv2d(1, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)
        self.trunk = nn.Sequential()
        d_in = width
        for d_out, depth in zip((width, 2 * width, 4 * width, 8 * width), (3, 4, 6, 3)):
            for _ in range(depth):
                # a block that doubles the width halves the map
                self.trunk.append(light(BasicBlock, d_in, d_out, stride=d_out // d_in))
                d_in = d_out
        rows = (mels + 7) // 8  # of the last map: halved three times, rounded up
        self.embed = nn.Linear(2 * d_out * rows, embed_dim)

    def forward(self, x):
        x = as_map(x, self.mels).transpose(1, 2)  # a picture of one channel: (B, 1, F, T)
        x = channels_last(self.stem(x))  # (B, D, F, T)
        x = F.relu(self.norm(x))
        x = self.trunk(x)  # (B, 8*D, F/8, T/8)
        return self.embed(mean_and_std(x))  # (B, E)


# --------------------------------------------------------------------------------------------------
# 4. ECAPA-TDNN: dilated convolutions over time, several scales and channel gates in each block.


class ConvReluNorm(nn.Module):
    """Convolution over time, ReLU and (if `norm`) BatchNorm: the brick of ECAPA."""

    def __init__(self, d_in, d_out, groups=1, kernel=1, dilation=1, norm=True):
        super().__init__()
        self.conv = conv(d_in, d_out, groups, kernel, dilation)
        self.norm = nn.BatchNorm2d(d_out) if norm else nn.Identity()

    def forward(self, x):
        return self.norm(F.relu(self.conv(x)))


class Res2Conv(nn.Module):
    """Convolutions in a chain over `scale` slices of a group: each sees further than the last."""

    def __init__(self, channels, groups, dilation, scale):
        super().__init__()
        self.groups, self.scale = groups, scale
        self.chain = nn.ModuleList()
        width = channels // scale
        for _ in range(scale - 1):
            self.chain.append(ConvReluNorm(width, width, groups, 3, dilation))

    def forward(self, x):
        slices = x.unflatten(1, (self.groups, -1)).chunk(self.scale, dim=2)
        outputs = []
        y = 0
        for conv, part in zip(self.chain, slices):
            y = conv(part.flatten(1, 2) + y)  # (B, D/scale, 1, T)
            outputs.append(y.unflatten(1, (self.groups, -1)))
        outputs.append(slices[-1])  # the last slice stays as it is
        return torch.cat(outputs, dim=2).flatten(1, 2)  # (B, D, 1, T)


class SqueezeExcite(nn.Module):
    """Scale each channel by a gate computed from all channels' means (of its group)."""

    def __init__(self, channels, groups, bottleneck):
        super().__init__()
        self.down = conv(channels, groups * bottleneck, groups)
        self.up = conv(groups * bottleneck, channels, groups)

    def forward(self, x):
        mean = x.mean(dim=3, keepdim=True)  # (B, D, 1, 1)
        gate = torch.sigmoid(self.up(F.relu(self.down(mean))))  # (B, D, 1, 1)
        return x * gate


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

    Lightened, the mel axis is split into bands, the aggregation is a block like the others, and the
    bottleneck's 128 channels are divided among the subsets. Pooling and last layer stay whole."""

    normalise = None  # data.py takes away each clip's own mean per mel bin

    def __init__(self, mels=80, width=512, embed_dim=192, subsets=1, share=False, fusion="module"):
        super().__init__()
        if width % 8:
            raise ValueError(f"ECAPA-TDNN cuts its width into 8 scales: {width} is no multiple")
        aggregate = min(1536, 3 * width)
        check_subsets(subsets, mels=mels, scale=width // 8, aggregate=aggregate)
        self.mels, self.embed_dim = mels, embed_dim
        self.subsets = subsets
        light = partial(lighten, subsets=subsets, share=share, fusion=fusion)
        # Features have no means (`normalise`), so the module in front of the stem adds nothing,
        # but for SpecAugment's masks in training.
        self.stem = light(ConvReluNorm, mels, width, kernel=5)
        self.blocks = nn.ModuleList()
        for dilation in (2, 3, 4):
            sizes = dict(dilation=dilation, bottleneck=128 // subsets)
            self.blocks.append(light(SERes2Block, width, width, **sizes))
        self.aggregate = light(ConvReluNorm, 3 * width, aggregate, norm=False)
        self.pool = AttentivePooling(aggregate)
        self.norm = nn.BatchNorm1d(2 * aggregate)
        self.embed = nn.Linear(2 * aggregate, embed_dim)

    def forward(self, x):
        x = self.stem(as_map(x, self.mels))  # (B, D, 1, T)
        outputs = []
        for block in self.blocks:
            x = block(x)
            outputs.append(x.unflatten(1, (self.subsets, -1)))  # (B, S, D/S, 1, T)
        x = torch.cat(outputs, dim=2).flatten(1, 2)  # (B, 3*D, 1, T), still ordered by subset
        x = self.pool(self.aggregate(x))  # (B, 2*1536)
        return self.embed(self.norm(x))  # (B, E)


# --------------------------------------------------------------------------------------------------
# 5. AMCRN: attention-based multi-scale convolutional recurrent network.


class MultiScaleBlock(nn.Module):
    """Four convolutions of different reach side by side, mixed, and a gate over time."""

    def __init__(self, d_in, d_out, groups=1, kernels=(1, 3, 5, 7)):
        super().__init__()
        self.groups = groups
        self.scales = nn.ModuleList()
        for kernel in kernels:
            self.scales.append(ConvReluNorm(d_in, d_out // len(kernels), groups, kernel))
        self.mix = ConvReluNorm(d_out, d_out, groups)
        self.gate = conv(d_out, groups, groups)

    def forward(self, x):
        outputs = [scale(x).unflatten(1, (self.groups, -1)) for scale in self.scales]
        x = self.mix(torch.cat(outputs, dim=2).flatten(1, 2))  # (B, D, 1, T), ordered by group
        gate = torch.sigmoid(self.gate(x)).unsqueeze(2)  # one for each group: (B, G, 1, 1, T)
        return (x.unflatten(1, (self.groups, -1)) * gate).flatten(1, 2)  # (B, D, 1, T)


class RecurrentBlock(nn.Module):
    """A bidirectional LSTM and a shortcut. torch has no grouped LSTM: one for each group."""

    def __init__(self, d_in, d_out, groups=1):
        super().__init__()
        self.lstms = nn.ModuleList()
        half = d_out // groups // 2  # in each direction
        for _ in range(groups):
            self.lstms.append(nn.LSTM(d_in // groups, half, batch_first=True, bidirectional=True))

    def forward(self, x):
        frames = x.squeeze(2).transpose(1, 2)  # (B, T, D)
        outputs = []
        for lstm, part in zip(self.lstms, frames.chunk(len(self.lstms), dim=2)):
            y, _ = lstm(part)
            outputs.append(y)
        y = torch.cat(outputs, dim=2).transpose(1, 2)  # (B, D, T)
        return x + y.unsqueeze(2)  # (B, D, 1, T)


class AMCRN(nn.Module):
    """Multi-scale block, recurrent block, attentive pooling, embedding with BatchNorm.

    The order of the parts is the authors' (arXiv 2306.00426). `width` is that of one scale."""

    normalise = None  # data.py takes away each clip's own mean per mel bin

    def __init__(self, mels=80, width=128, embed_dim=192, subsets=1, share=False, fusion="module"):
        super().__init__()
        check_subsets(subsets, mels=mels, width=width)
        self.mels, self.embed_dim = mels, embed_dim
        light = partial(lighten, subsets=subsets, share=share, fusion=fusion)
        # Features have no means (`normalise`), so the module in front of this block adds nothing,
        # but for SpecAugment's masks in training.
        self.multiscale = light(MultiScaleBlock, mels, 4 * width)
        self.recurrent = light(RecurrentBlock, 4 * width, 4 * width)
        self.pool = AttentivePooling(4 * width)
        self.embed = nn.Linear(8 * width, embed_dim, bias=False)  # the norm has one
        self.norm = nn.BatchNorm1d(embed_dim)

    def forward(self, x):
        x = self.recurrent(self.multiscale(as_map(x, self.mels)))  # (B, 4*D, 1, T)
        return self.norm(self.embed(self.pool(x)))  # (B, E)


MODELS = {"amcrn": AMCRN, "resnet34": ResNet34, "ecapa-tdnn": ECAPA_TDNN}

# --------------------------------------------------------------------------------------------------
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
            return self.scale * cosine  # (B, C)
        true = cosine.gather(1, labels[:, None])
        # the clamp: at theta = 0 the root would have an infinite slope, and 0 * inf is NaN
        sine = (1 - true * true).clamp(min=1e-7).sqrt()
        shifted = true * cos(self.margin) - sine * sin(self.margin)  # cos(theta + m)
        line = true - self.margin * sin(self.margin)  # used where theta + m would pass pi
        shifted = torch.where(true > cos(pi - self.margin), shifted, line)
        return self.scale * cosine.scatter(1, labels[:, None], shifted)


# --------------------------------------------------------------------------------------------------
# 7. Scoring: how well scores separate same-speaker trials from the others.
#
# All in float64; rates are fractions from 0 to 1. A trial is accepted when its score is at least
# the threshold. Every distinct score is one threshold, so the order of ties cannot matter. One
# more threshold above the highest score ends the curve.


def check_trials(scores, labels):
    """Scores as float64 and labels as bool (True: same speaker), or a sentence."""
    scores = np.asarray(scores, dtype=np.float64)
    labels = np.asarray(labels).astype(bool)
    if scores.ndim != 1 or scores.shape != labels.shape:
        raise ValueError(f"expected one label for each score, got scores {scores.shape} "
                         f"and labels {labels.shape}")
    bad = np.count_nonzero(~np.isfinite(scores))
    if bad:
        raise ValueError(f"{bad} of {len(scores)} scores are not finite")
    for kind, present in (("target", labels.any()), ("non-target", not labels.all())):
        if not present:
            raise ValueError(f"no {kind} trials among {len(labels)}: error rates need both kinds")
    return scores, labels


def error_curve(scores, labels):
    """Return thresholds, P_miss and P_fa at each, from accepting everything to nothing.

    >>> [a.tolist() for a in error_curve([0.1, 0.5, 0.5], [0, 1, 0])]
    [[0.1, 0.5, 0.5000000000000001], [0.0, 0.0, 1.0], [1.0, 0.5, 0.0]]
    """
    scores, labels = check_trials(scores, labels)
    order = np.argsort(scores)
    scores = scores[order]
    labels = labels[order]
    first = np.flatnonzero(np.r_[True, scores[1:] != scores[:-1]])  # where a new score begins
    thresholds = np.r_[scores[first], np.nextafter(scores[-1], np.inf)]
    rejected = np.r_[first, len(scores)]  # trials below each threshold
    missed = np.r_[0, np.cumsum(labels)][rejected]  # targets among them
    targets = missed[-1]
    others = len(scores) - targets
    return thresholds, missed / targets, (others - (rejected - missed)) / others


def equal_rate(p_miss, p_fa):
    """The rate at which P_miss equals P_fa; between two points the curve is a straight line."""
    gap = p_miss - p_fa  # rises from -1 to 1
    i = np.searchsorted(gap, 0)  # first point not below 0
    part = gap[i - 1] / (gap[i - 1] - gap[i])
    return float(p_miss[i - 1] + part * (p_miss[i] - p_miss[i - 1]))


def detection_costs(p_miss, p_fa, p_target):
    """The cost at each threshold, both errors costing 1, divided by the cost of the better of
    accepting everything and accepting nothing."""
    cost = p_target * p_miss + (1 - p_target) * p_fa
    return cost / min(p_target, 1 - p_target)


def equal_error_rate(scores, labels):
    """The EER, a fraction."""
    _, p_miss, p_fa = error_curve(scores, labels)
    return equal_rate(p_miss, p_fa)


def min_dcf(scores, labels, p_target):
    """The least detection cost over all thresholds. Always say p_target with it."""
    _, p_miss, p_fa = error_curve(scores, labels)
    return float(detection_costs(p_miss, p_fa, p_target).min())


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
    _, p_miss, p_fa = error_curve(scores, labels)
    results = {"eer": 100 * equal_rate(p_miss, p_fa)}
    for p in (0.01, 0.05):
        results[f"min_dcf_{p}"] = float(detection_costs(p_miss, p_fa, p).min())
    if threshold is not None:
        miss, alarm = error_rates_at(scores, labels, threshold)
        results |= dict(threshold=threshold, miss=100 * miss, false_alarm=100 * alarm)
    return results


def adaptive_s_norm(scores, pairs, embeddings, cohort, top_n=300):
    """Return the mean of (score - mean) / std over both sides of each trial: mean and std of the
    side's `top_n` highest cosines with the cohort. `pairs` (trials, 2) are indices of `embeddings`.
    `cohort`: embeddings of strangers' utterances, or a mean for each stranger."""
    unit = lambda x: F.normalize(torch.as_tensor(x, dtype=torch.float64)).numpy()
    embeddings = unit(embeddings)
    cohort = unit(cohort)
    top_n = min(top_n, len(cohort))
    if top_n < 2:
        raise ValueError(f"s-norm needs a deviation: at least 2 of the cohort, got {top_n}")
    mean = np.empty(len(embeddings))
    std = np.empty(len(embeddings))
    for i in range(0, len(embeddings), 1024):  # all cosines at once might not fit into memory
        cosine = embeddings[i:i + 1024] @ cohort.T  # (utterances, cohort)
        top = np.partition(cosine, -top_n, axis=1)[:, -top_n:]
        mean[i:i + 1024] = top.mean(axis=1)
        std[i:i + 1024] = top.std(axis=1)
    if not std.all():
        raise ValueError("s-norm needs a deviation: all of the cohort are one and the same")
    pairs = np.asarray(pairs)
    scores = np.asarray(scores, dtype=np.float64)
    sides = (scores[:, None] - mean[pairs]) / std[pairs]  # (trials, 2)
    return sides.mean(axis=1)


def deviate(p):
    """The normal deviate of a probability: 0.5 -> 0, 0.84 -> 1."""
    return torch.special.ndtri(torch.as_tensor(p).clamp(1e-4, 1 - 1e-4)).numpy()


def draw_det(axes, scores, labels):
    """Draw the detection error trade-off, P_miss over P_fa, both axes in normal deviates (a line
    where scores are normal), with the points of the EER and of both minDCF."""
    _, p_miss, p_fa = error_curve(scores, labels)
    axes.plot(deviate(p_fa), deviate(p_miss), color="black")
    eer = equal_rate(p_miss, p_fa)
    point = deviate(eer)
    axes.plot(point, point, "o", color="black", label=f"EER {100 * eer:.2f} %")
    for p, marker in ((0.01, "s"), (0.05, "^")):
        costs = detection_costs(p_miss, p_fa, p)
        least = costs.argmin()
        axes.plot(deviate(p_fa[least]), deviate(p_miss[least]), marker, color="grey",
                  label=f"minDCF, p {p}: {costs[least]:.3f}")
    percent = [0.1, 1, 5, 20, 40, 60, 80, 95]
    ticks = deviate(np.array(percent) / 100)
    axes.set_xticks(ticks, percent)
    axes.set_yticks(ticks, percent)
    axes.set(xlabel="false alarms, %", ylabel="misses, %")
    axes.legend()


# --------------------------------------------------------------------------------------------------
# 8. Cost: parameters, multiply-accumulates, and milliseconds, which are not the same thing.


def layer_macs(layer, x, y):
    """Multiply-accumulates of one call of a layer that maps x to y; biases are not counted."""
    if isinstance(layer, nn.LSTM):
        # each step takes every matrix once: for the input, and for the last hidden state
        matrices = sum(w.numel() for w in layer.parameters() if w.ndim == 2)
        return x.numel() // x.shape[-1] * matrices
    if isinstance(layer, AttentivePooling):
        # published counts take W2 c for every frame; the layer itself counts for one
        return (x.shape[-1] - 1) * layer.context.weight.numel()
    return y.numel() * layer.weight[0].numel()  # a filter: d_in/groups x kernel


@torch.no_grad()
def count_macs(encoder, frames):
    """Multiply-accumulates for one utterance: convolutions, linear layers and LSTMs.

    As in the published counts, a layer counts for all its frames, and sums that are not layers
    (means, gates, the attention product of a transformer, LoRA's products) do not count.
    """
    encoder = copy.deepcopy(encoder).cpu().eval()
    macs = []
    add_layer = lambda layer, x, y: macs.append(layer_macs(layer, x[0], y))
    for layer in encoder.modules():
        if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Linear, nn.LSTM, AttentivePooling)):
            layer.register_forward_hook(add_layer)
    encoder(torch.zeros(1, frames, encoder.mels))
    return sum(macs)


@torch.inference_mode()
def latency_ms(encoder, frames, repeats=15):
    """Median milliseconds of one utterance on one CPU thread."""
    encoder = copy.deepcopy(encoder).cpu().eval()
    x = torch.zeros(1, frames, encoder.mels)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    encoder(x)  # the first call sets things up
    taken = timeit.repeat(lambda: encoder(x), number=1, repeat=repeats)  # seconds
    torch.set_num_threads(threads)
    return 1000 * float(np.median(taken))


def complexity(encoder, frames=200):
    """What an encoder costs: parameters, multiply-accumulates at `frames`, latency."""
    return {"parameters": sum(p.numel() for p in encoder.parameters()),
            "macs": count_macs(encoder, frames),
            "latency_ms": latency_ms(encoder, frames)}


# --------------------------------------------------------------------------------------------------
# 9. Command line: what lightening saves, and the error rates of a score file.


def print_costs():
    """Print hosts x subsets. The last columns are relative to the plain host."""
    print("200 frames; ms: one utterance on one thread")
    print("host             subsets  params M     MMAC      ms   params  MACs    ms")
    for name, width in (("resnet34", 32), ("ecapa-tdnn", 512), ("amcrn", 128)):
        for subsets in (1, 2, 4, 8):
            cost = complexity(MODELS[name](width=width, subsets=subsets))
            if subsets == 1:
                host = cost
            ratios = [cost[key] / host[key] for key in cost]
            print(f"{name + ' ' + str(width):16s}{subsets:8d}{cost['parameters'] / 1e6:10.3f}"
                  f"{cost['macs'] / 1e6:9.1f}{cost['latency_ms']:8.1f}"
                  + "{:9.2f}{:6.2f}{:6.2f}".format(*ratios))


def read_scores(path):
    """Read lines `id_a id_b score label` (1: same speaker) as (scores, labels)."""
    scores = []
    labels = []
    lines = Path(path).read_text(encoding="utf-8").rstrip("\n").split("\n")
    for number, line in enumerate(lines, 1):
        try:
            _, _, *_, score, label = line.split()  # names may hold spaces
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
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"{len(scores):,} trials, {sum(labels):,} of one speaker: EER {eer:.3f} %, "
          f"minDCF(p 0.01) {dcf_01:.4f}, minDCF(p 0.05) {dcf_05:.4f}")


# --------------------------------------------------------------------------------------------------
# 10. Faster on a CPU: the same formulas, skip it.


def channels_last(x):
    """The same map; in memory the channels of one position are neighbours. Layers keep this order.
    A light ResNet34 then takes 0.93 of the time, 0.54 instead of 0.60 of its host's latency."""
    return x.contiguous(memory_format=torch.channels_last)


if __name__ == "__main__":
    main(sys.argv[1:])
