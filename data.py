"""Audio on disk -> packed corpus -> batches -> log-mel features, for every model of this project.

Reading  @READING@
Axes     B batch, T frames (25 ms every 10 ms), F mel bins, C classes or speakers.

The first use of a corpus decodes every clip once, to 16 kHz mono int16, into one packed file. From
then on a training segment is a slice of a memory map: no decoding, no worker processes, the same
speed for WAV, FLAC and M4A. Features are computed a batch at a time on the device that trains.

    corpus = open_corpus("fsdd", "recordings-of/fsdd")
    for batch in batches(corpus, corpus.pick("train"), 32, frames=100, seed=0):
        x = features(batch, "audioset", mels=128, device="cpu")    # (B, T, F) = (32, 100, 128)

To add a corpus write one function that lists its clips as (path, class, split) and one line in
CORPORA. `python data.py NAME ROOT` checks a corpus before anyone trains on it.

Does not: stream from the network, keep more than 16 bits or another rate than 16 kHz, or balance
classes.
"""

import argparse
import contextlib
import csv
import functools
import hashlib
import json
import math
import os
import struct
import sys
import tarfile
import types
import urllib.error
import urllib.request
import zipfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

RATE = 16_000  # samples a second, everywhere behind the packed file
HOP, WINDOW, FFT = 160, 400, 512  # 10 ms, 25 ms, the next power of two
AUDIO = (".wav", ".flac", ".ogg", ".mp3", ".m4a")

# --------------------------------------------------------------------------------------------------
# 1. Audio files: WAV of every kind with numpy alone, the rest through torchaudio


def import_torchaudio():
    """torchaudio, also beside a torch it was not built for.

    Its compiled extension refuses another CUDA version or a CPU-only torch. Nothing here needs it,
    so when the import fails an empty extension takes its place.
    """
    try:
        import torchaudio
    except (OSError, RuntimeError, ImportError):
        for name in [name for name in sys.modules if name.split(".")[0] == "torchaudio"]:
            del sys.modules[name]
        stand_in = types.ModuleType("torchaudio._extension")
        stand_in._IS_TORCHAUDIO_EXT_AVAILABLE = stand_in._IS_ALIGN_AVAILABLE = False
        stand_in.fail_if_no_align = lambda function: function
        sys.modules["torchaudio._extension"] = stand_in
        import torchaudio
    return torchaudio


@dataclass
class WavHeader:
    rate: int
    channels: int
    kind: str  # "pcm" or "float"
    bits: int
    offset: int  # of the first sample, in bytes
    samples: int  # per channel


def wav_header(path):
    """Read a RIFF header: chunks of (4 letters, little-endian size, body padded to even)."""
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        riff = file.read(12)
        if size == 0:
            raise ValueError(f"{path}: the file is empty")
        if riff[:4] != b"RIFF" or riff[8:] != b"WAVE":
            raise ValueError(f"{path}: not a WAV file (it starts with {riff[:12]!r})")
        form = None
        while True:
            chunk = file.read(8)
            if len(chunk) < 8:
                raise ValueError(f"{path}: truncated, it ends before its audio data")
            name, length = chunk[:4], int.from_bytes(chunk[4:], "little")
            if name == b"fmt ":
                form = file.read(length)
            elif name == b"data":
                break
            else:
                file.seek(length + length % 2, 1)
        offset = file.tell()
    if form is None or len(form) < 16:
        raise ValueError(f"{path}: damaged, no format before its audio data")
    code, channels, rate, _, frame, bits = struct.unpack("<HHIIHH", form[:16])
    if code == 0xFFFE and len(form) >= 26:  # WAVE_FORMAT_EXTENSIBLE: the real code opens a GUID
        code = int.from_bytes(form[24:26], "little")
    kind = {1: "pcm", 3: "float"}.get(code)
    if kind is None or bits not in ((8, 16, 24, 32) if kind == "pcm" else (32, 64)) or not channels:
        raise ValueError(f"{path}: WAV code {code} with {bits} bits is neither PCM nor float; "
                         "convert it to PCM")
    if length in (0, 0xFFFFFFFF):  # written by a stream that could not seek back
        length = size - offset
    if offset + length > size:
        raise ValueError(f"{path}: truncated, {length} bytes announced, {size - offset} there")
    return WavHeader(rate, channels, kind, bits, offset, length // (channels * bits // 8))


def read_wav(path, start=0, samples=None):
    """Samples [start, start + samples) of a WAV file as float32 (channels, n) in [-1, 1], and rate.

    Reads no more of the file than that. Raises ValueError for what is not a sound WAV file.
    """
    head = wav_header(path)
    count = max(0, min(head.samples - start, head.samples if samples is None else samples))
    width = head.bits // 8
    dtype = {"pcm1": "u1", "pcm2": "<i2", "pcm3": "u1", "pcm4": "<i4", "float4": "<f4",
             "float8": "<f8"}[f"{head.kind}{width}"]
    items = count * head.channels * (3 if (head.kind, width) == ("pcm", 3) else 1)
    offset = head.offset + start * head.channels * width
    raw = np.fromfile(path, dtype, items, offset=offset)
    if head.kind == "float":
        wave = raw.astype(np.float32)
    elif width == 1:
        wave = (raw.astype(np.float32) - 128) / 128  # the one unsigned kind
    elif width == 3:  # three bytes, little-endian: put them on top of an empty lowest byte
        padded = np.zeros((count * head.channels, 4), np.uint8)
        padded[:, 1:] = raw.reshape(-1, 3)
        wave = padded.view("<i4")[:, 0].astype(np.float32) / 2**31
    else:
        wave = raw.astype(np.float32) / 2 ** (head.bits - 1)
    return wave.reshape(count, head.channels).T, head.rate


def read_audio(path):
    """Any audio file -> mono float32 (samples,) at RATE. Raises ValueError with a sentence."""
    path = Path(path)
    if path.suffix.lower() == ".wav":
        wave, rate = read_wav(path)
    else:
        try:
            wave, rate = import_torchaudio().load(str(path))
        except ImportError as error:
            raise ValueError(f"{path}: reading {path.suffix or 'this kind of'} files needs torchcodec and "
                             "FFmpeg: pip install torchcodec, or convert to WAV") from error
        except (RuntimeError, OSError, ValueError) as error:
            raise ValueError(f"{path}: not readable as audio ({str(error).splitlines()[0]})") from error
        wave = wave.numpy()
    wave = wave.mean(0)  # (channels, n) -> (n,)
    if not np.isfinite(wave).all():
        raise ValueError(f"{path}: holds samples that are not finite")
    if rate != RATE:
        wave = import_torchaudio().functional.resample(torch.from_numpy(wave), rate, RATE).numpy()
    if len(wave) < WINDOW:
        raise ValueError(f"{path}: {len(wave)} samples at 16 kHz, shorter than one frame ({WINDOW})")
    return wave


# --------------------------------------------------------------------------------------------------
# 2. The packed corpus: every clip decoded once, side by side in one file


@dataclass
class Corpus:
    """Clips of one corpus as columns; clip i is store[start[i] : start[i] + length[i]].

    The store is a memory map: int16 samples (n,), or int8 log-mel frames (n, F) x 0.1 for corpora
    that come as features. `trials` maps "valid" and "test" to lists of (label, index, index) and
    makes the corpus one for verification; without it, it is one for classification.
    """

    name: str
    ids: list
    labels: np.ndarray  # (clips,) index into classes; -1 for a speaker who is not in training
    splits: np.ndarray  # (clips,) "train", "valid" or "test"
    classes: list
    start: np.ndarray
    length: np.ndarray
    store: np.ndarray
    trials: dict = field(default_factory=dict)
    notes: list = field(default_factory=list)  # sentences for the user
    bad: dict = field(default_factory=dict)  # id -> why this clip cannot be used

    @property
    def mels(self):
        """F of a corpus of ready features, None for audio."""
        return self.store.shape[1] if self.store.ndim == 2 else None

    def pick(self, split):
        """Indices of the clips of a split."""
        return np.flatnonzero(self.splits == split)


def pack(name, rows, read, stamp, cache, skip_bad=False):
    """Decode all clips into `cache`, once; returns (store, start, length, {id: what is wrong}).

    The file's name carries a hash of the clips' names and their stamps (size and time), so a
    changed corpus is another file. The index is written last: without it nothing is packed.
    """
    key = hashlib.sha256(json.dumps([[row[0], stamp(row[0])] for row in rows]).encode()).hexdigest()
    cache = Path(cache)
    cache.mkdir(parents=True, exist_ok=True)
    pcm, index = cache / f"{name}.{key[:16]}.pcm", cache / f"{name}.{key[:16]}.npz"
    if not index.exists():
        lengths, bad = [], {}
        part = pcm.with_suffix(f".{os.getpid()}.part")
        with open(part, "wb") as file:
            for row in tqdm(rows, desc=f"packing {name}", unit="clip", leave=False, disable=None):
                try:
                    wave = read(row[0])
                    file.write((np.clip(wave, -1, 32767 / 32768) * 32768).round().astype("<i2").tobytes())
                    lengths.append(len(wave))
                except (ValueError, OSError) as error:
                    bad[row[0]] = str(error)
                    lengths.append(0)
            file.write(b"\0\0" * (sum(lengths) == 0))  # an empty file cannot be mapped
        os.replace(part, pcm)
        part = index.with_suffix(f".{os.getpid()}.part.npz")
        np.savez(part, lengths=np.array(lengths, np.int64), bad=json.dumps(bad))
        os.replace(part, index)
        for old in cache.glob(f"{name}.*"):  # of this corpus before it changed
            if key[:16] not in old.name and not old.name.endswith(".part"):
                with contextlib.suppress(OSError):  # Windows keeps a file that is in use
                    old.unlink()
    with np.load(index) as saved:
        lengths, bad = saved["lengths"], json.loads(str(saved["bad"]))
    if bad and not skip_bad:
        first = "".join(f"\n  {reason}" for reason in list(bad.values())[:5])
        raise ValueError(f"{len(bad)} of {len(rows)} clips of {name} cannot be used:{first}\n"
                         "Repair or remove them, or go on without them with --skip-bad.")
    return np.memmap(pcm, "<i2", "r"), np.cumsum(lengths) - lengths, lengths, bad


def open_corpus(name, root=None, cache="cache", seed=0, fold=1, few_shot=0, skip_bad=False):
    """The corpus `name` of CORPORA, packed, with splits and trials. Raises ValueError.

    fold      test fold of a corpus with folds (1-based); validation is the fold before it
    few_shot  keep so many training clips a class, drawn by `seed`; 0 keeps all
    """
    if name not in CORPORA:
        raise ValueError(f"unknown corpus {name!r}: choose from {', '.join(CORPORA)}")
    source = CORPORA[name]
    if source.tree:
        root = Path(root or "")
        if not root.name or not root.is_dir():
            raise ValueError(f"--data {name} needs --root: no folder at '{root}'.\n{source.tree}")
    if name == "features":
        corpus = open_features(root)
    else:
        rows = source.rows(root)
        if not rows:
            raise ValueError(f"--root {root}: no clips of {name} there.\n{source.tree}")
        read = source.read or (lambda clip: read_audio(root / clip))
        stamp = (lambda clip: VERSION) if source.read else functools.partial(file_stamp, root)
        # Two roots of one corpus are two packed files.
        place = hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:6] if source.tree else "own"
        store, start, length, bad = pack(f"{name}-{place}", rows, read, stamp, cache, skip_bad)
        ids, names, splits = (list(column) for column in zip(*rows))
        corpus = Corpus(name, ids, names, np.array(splits), [], start, length, store)
        if bad:
            corpus.bad = bad
            corpus.splits = np.where(length == 0, "bad", corpus.splits)
            corpus.notes.append(f"{len(bad)} unusable clips are left out (--skip-bad)")
        lists = {"test": read_trials(root / "trials.txt")} if source.tree and (
            root / "trials.txt").is_file() else source.trials(rows) if source.trials else {}
        corpus.trials = lists
    return settle(corpus, seed, fold, few_shot)


def file_stamp(root, clip):
    try:
        stat = os.stat(root / clip)
    except OSError:
        return None  # missing: reading it will say so
    return [stat.st_size, stat.st_mtime_ns]


def settle(corpus, seed, fold, few_shot):
    """Turn names into labels, folds into splits, make what the corpus does not bring."""
    names = np.array(corpus.labels)
    if corpus.trials:
        if "any" in corpus.splits:  # a folder: speakers in trials test, the others train
            named = {clip for _, *pair in corpus.trials["test"] for clip in pair}
            tested = {name for clip, name in zip(corpus.ids, names) if clip in named}
            corpus.splits = np.array(["test" if name in tested else "train" for name in names])
        hold_out_speakers(corpus, names, seed)
    else:
        settle_folds(corpus, fold)
        split_by_seed(corpus, names, seed)
    corpus.classes = sorted({str(name) for name in names[corpus.splits == "train"]})
    number = {name: label for label, name in enumerate(corpus.classes)}
    corpus.labels = np.array([number.get(name, -1) for name in names])
    if few_shot:
        rng = np.random.default_rng(seed)
        train = [corpus.pick("train")[corpus.labels[corpus.pick("train")] == label]
                 for label in range(len(corpus.classes))]
        kept = np.concatenate([rng.permutation(clips)[:few_shot] for clips in train])
        corpus.splits[np.setdiff1d(corpus.pick("train"), kept)] = "unused"
    index = {clip: i for i, clip in enumerate(corpus.ids)}
    for split, trials in corpus.trials.items():
        unknown = sorted({clip for _, *pair in trials for clip in pair if clip not in index})
        if unknown:
            raise ValueError(f"the {split} trials name {len(unknown)} clips that {corpus.name} lacks, "
                             f"the first is {unknown[0]}")
        corpus.trials[split] = [(label, index[a], index[b]) for label, a, b in trials]
    for split in ("train", "test"):
        if not len(corpus.pick(split)):
            raise ValueError(f"{corpus.name} has no {split} clips: {dict(Counter(corpus.splits))}")
    return corpus


def settle_folds(corpus, fold):
    """Fold k tests, fold k-1 validates, the rest trains: P1's rotation for ESC-50."""
    folds = sorted({int(split) for split in corpus.splits if split.isdigit()})
    if not folds:
        return
    if fold not in folds:
        raise ValueError(f"--fold {fold}: {corpus.name} has folds {folds}")
    before = folds[folds.index(fold) - 1]
    role = {str(k): "test" if k == fold else "valid" if k == before else "train" for k in folds}
    corpus.splits = np.array([role.get(split, split) for split in corpus.splits])


def split_by_seed(corpus, names, seed):
    """Draw a validation tenth of "train*", and all three splits of what is marked "any"."""
    rng = np.random.default_rng(seed)
    splits = corpus.splits = corpus.splits.astype("<U6")
    alone = []
    for name in sorted(set(names)):
        clips = rng.permutation(np.flatnonzero((names == name) & (splits == "any")))
        if 0 < len(clips) < 3:
            alone.append(name)
            splits[clips] = "train"
        elif len(clips):
            valid, test = max(1, len(clips) // 10), max(1, len(clips) // 5)
            splits[clips] = "train"
            splits[clips[:valid]] = "valid"
            splits[clips[valid : valid + test]] = "test"
        clips = rng.permutation(np.flatnonzero((names == name) & (splits == "train*")))
        splits[clips] = "train"
        splits[clips[: len(clips) // 10]] = "valid"
    if alone:
        corpus.notes.append(f"{len(alone)} classes have fewer than three clips and only train: "
                            + ", ".join(alone[:5]))


def hold_out_speakers(corpus, names, seed):
    """Validation for a corpus of trials: a tenth of the training speakers, drawn by `seed`."""
    if "valid" in corpus.trials:
        return
    rng = np.random.default_rng(seed)
    speakers = sorted(set(names[corpus.splits == "train"]))
    held = set(rng.permutation(speakers)[: max(2, len(speakers) // 10)])
    clips = [i for i in corpus.pick("train") if names[i] in held]
    corpus.splits = corpus.splits.astype("<U6")
    corpus.splits[clips] = "valid"
    corpus.trials["valid"] = make_trials([(corpus.ids[i], names[i]) for i in clips], rng)


def make_trials(clips, rng, each=2000):
    """Up to `each` target and as many non-target trials among (id, speaker) pairs."""
    pairs = [(a, b) for i, a in enumerate(clips) for b in clips[:i]]
    same = [(1, a[0], b[0]) for a, b in pairs if a[1] == b[1]]
    other = [(0, a[0], b[0]) for a, b in pairs if a[1] != b[1]]
    size = min(each, len(same), len(other))
    return [group[i] for group in (same, other) for i in rng.permutation(len(group))[:size]]


# --------------------------------------------------------------------------------------------------
# 3. Features: a batch of waves to log-mel frames, equal to kaldi's


@functools.lru_cache
def mel_triangles(mels, device):
    """(FFT/2 + 1, mels): triangles equally spaced in mel = 1127 ln(1 + f/700), 20 Hz to 8 kHz.

    In float32 like kaldi's: the lowest triangles are narrower than an FFT bin, so that rounding
    an edge moves their few weights by more than the last digit.
    """
    mel = lambda hertz: 1127 * torch.log(1 + torch.as_tensor(hertz) / 700)
    low, high = 1127 * math.log(1 + 20 / 700), 1127 * math.log(1 + RATE / 2 / 700)
    step, number = (high - low) / (mels + 1), torch.arange(mels)
    left, centre, right = (low + (number + i) * step for i in range(3))  # (mels,) each
    bins = mel(torch.arange(FFT // 2 + 1) * (RATE / FFT))[:, None]  # (257, 1)
    rise, fall = (bins - left) / (centre - left), (right - bins) / (right - centre)  # (257, mels)
    return torch.minimum(rise, fall).clamp_min(0).to(device)


def frames_of(samples):
    """Frames in so many samples: only whole windows count (kaldi's "snip edges")."""
    return max(0, (samples - WINDOW) // HOP + 1)


def samples_of(frames):
    return (frames - 1) * HOP + WINDOW


def fbank(waves, mels=128):
    """Log-mel features of float waves in [-1, 1]: (B, samples) -> (B, T, F), on their device.

    Equal to torchaudio.compliance.kaldi.fbank(htk_compat=True, window_type="hanning", dither=0).
    """
    waves = torch.atleast_2d(waves.float())
    if waves.shape[1] < WINDOW:
        raise ValueError(f"fbank expects at least {WINDOW} samples (25 ms), got {waves.shape[1]}")
    window = torch.hann_window(WINDOW, periodic=False, device=waves.device)
    triangles = mel_triangles(mels, waves.device)
    # On a CPU some 400 frames at a time stay in the cache: twice as fast as the whole batch.
    rows = max(1, 400 // frames_of(waves.shape[1])) if waves.device.type == "cpu" else len(waves)
    return torch.cat([_fbank(part, window, triangles) for part in waves.split(rows)])


def _fbank(waves, window, triangles):
    frames = waves.unfold(1, WINDOW, HOP)  # (B, T, 400)
    frames = frames - frames.mean(2, keepdim=True)
    # Pre-emphasis. The first sample is compared with itself, but the window is zero there.
    frames = F.pad(frames[..., 1:] - 0.97 * frames[..., :-1], (1, 0))
    spectrum = torch.fft.rfft(frames * window, n=FFT)  # (B, T, 257)
    power = spectrum.real.square() + spectrum.imag.square()  # abs() would take a root in vain
    return (power @ triangles).clamp_min(torch.finfo(torch.float32).eps).log()  # (B, T, F)


# --------------------------------------------------------------------------------------------------
# 4. Batches: slices of the packed file, in an order that only seed and epoch decide

NORMALISE = {"audioset": (-4.2677393, 4.5689974)}  # mean and std of AudioSet's log-mel bins


@dataclass
class Batch:
    """x: (B, samples) int16 or (B, T, F) int8; lengths, labels, clips (indices): (B,)."""

    x: torch.Tensor
    lengths: torch.Tensor
    labels: torch.Tensor
    clips: np.ndarray
    speed: float = 1.0  # x holds so many times the audio of `frames` frames


def batches(corpus, clips, size, frames, seed=0, epoch=0, train=True, repeat=False, workers=0,
            shard=(0, 1), speeds=(1.0,), steps=None):
    """Yield Batches of `frames` frames; shuffled, cropped at random and cut to whole for training.

    The draw of batch n depends on (seed, epoch, n) alone, so a resumed run sees the same data,
    with any number of `workers` (threads that prepare batches ahead).
    repeat  a clip shorter than the crop is repeated (speakers) rather than padded (AST)
    shard   (rank, world): every process takes its part of each global batch
    speeds  each training batch draws one; speed k > 0 makes new speakers, labels shift by k x C
    steps   stop after so many batches; None: after one pass
    """
    order = np.random.default_rng([seed, epoch]).permutation(clips) if train else np.asarray(clips)
    size = min(size, len(order)) if train else size  # fewer clips than a batch: one small batch
    groups = [order[i : i + size] for i in range(0, len(order), size)]
    if train and len(groups[-1]) < size:
        groups.pop()  # a last batch of one would break BatchNorm; the next epoch shuffles anew
    rank, world = shard

    def make(number):
        rng = np.random.default_rng([seed, epoch, number, rank]) if train else None
        kind = int(np.random.default_rng([seed, epoch, number]).integers(len(speeds)))
        batch = load(corpus, groups[number][rank::world], round(frames * speeds[kind]), rng, repeat)
        batch.labels += kind * len(corpus.classes)
        batch.speed = speeds[kind]
        return batch

    numbers = range(len(groups) if steps is None else min(steps, len(groups)))
    if not workers:
        yield from map(make, numbers)
        return
    with ThreadPoolExecutor(workers) as pool:
        ahead = [pool.submit(make, number) for number in numbers[: 2 * workers]]
        for number in numbers:
            batch = ahead.pop(0).result()
            if number + 2 * workers < len(numbers):
                ahead.append(pool.submit(make, number + 2 * workers))
            yield batch


def load(corpus, clips, frames, rng=None, repeat=False):
    """One Batch of `frames` frames a clip, from a random place with `rng`, else from the start.

    0 frames: labels and clips alone, for a loop that has the embeddings already.
    """
    size = frames if corpus.mels or not frames else samples_of(frames)
    x = np.zeros((len(clips), size, *corpus.store.shape[1:]), corpus.store.dtype)
    lengths = np.minimum(corpus.length[clips], size)
    for row, (clip, length) in enumerate(zip(clips, lengths)):
        spare = corpus.length[clip] - length
        start = corpus.start[clip] + (rng.integers(spare + 1) if rng and spare else 0)
        segment = corpus.store[start : start + length]
        if repeat and length < size:
            segment = np.resize(segment, x.shape[1:])  # numpy's resize repeats
        x[row, : len(segment)] = segment
    if repeat:
        lengths[:] = size
    return Batch(torch.from_numpy(x), torch.from_numpy(lengths), torch.from_numpy(corpus.labels[clips]),
                 clips)


def windows(path, frames):
    """One audio file as a corpus in memory, each clip a window of `frames` frames."""
    wave = (read_audio(path) * 32767).round().astype("<i2")
    start = np.arange(0, max(1, len(wave) - WINDOW), samples_of(frames))
    length = np.minimum(len(wave) - start, samples_of(frames))
    zeros = np.zeros(len(start), np.int64)
    return Corpus(str(path), [f"{path}#{i}" for i in range(len(start))], zeros, zeros.astype(str), [],
                  start, length, wave)


def features(batch, normalise, mels, device):
    """A Batch -> the encoder's input (B, T, F) on `device`, normalised as the encoder asks.

    "audioset": frames behind a clip's end are zero before normalisation, as in AST.
    "utterance": each clip's own mean per bin is removed.
    """
    x = batch.x.to(device, non_blocking=True)
    if x.ndim == 3:
        x = x.float() * 0.1  # int8 log-mel (B, T, F)
    else:
        x = x.float() / 32768
        x = fbank(x, mels)  # (B, T, F)
        if normalise == "audioset":
            ends = batch.lengths.sub(WINDOW).div(HOP, rounding_mode="floor").add(1).to(device)
            past = torch.arange(x.shape[1], device=device) >= ends[:, None]  # (B, T)
            x = x.masked_fill(past[:, :, None], 0.0)
    if x.shape[2] != mels:
        raise ValueError(f"the model expects {mels} mel bins, the corpus has {x.shape[2]}")
    if normalise == "audioset":
        mean, std = NORMALISE["audioset"]
        return (x - mean) / (2 * std)
    return x - x.mean(1, keepdim=True)


def spec_augment(x, widest_f, widest_t):
    """Hide one band of bins and one stretch of frames a clip, each up to so wide (1904.08779).

    x (B, T, F) is normalised, so the mask's 0 is near the mean. Draws from torch's generator.
    """
    for axis, widest in ((2, widest_f), (1, widest_t)):
        if widest:
            size = x.shape[axis]
            width = torch.rand(len(x), 1, device=x.device) * min(widest, size)  # (B, 1)
            start = torch.rand(len(x), 1, device=x.device) * (size - width)
            place = torch.arange(size, device=x.device)  # (size,)
            hidden = (place >= start) & (place < start + width)  # (B, size)
            x = x.masked_fill(hidden.unsqueeze(3 - axis), 0.0)  # (B, 1, F) or (B, T, 1)
    return x


def random_gain(x, most):
    """Make each clip of log-mel x (B, T, F), normalised as AudioSet, up to `most` dB louder or
    quieter: a sum in the log domain."""
    if not most:
        return x
    nats = most * math.log(10) / 10 / (2 * NORMALISE["audioset"][1])
    return x + (2 * torch.rand(len(x), 1, 1, device=x.device) - 1) * nats


def time_shift(x, most):
    """Roll each clip of x (B, T, F) by up to `most` frames either way, as AST's recipe does."""
    if not most:
        return x
    by = torch.randint(-most, most + 1, (len(x), 1), device=x.device)  # (B, 1)
    frames = (torch.arange(x.shape[1], device=x.device) - by) % x.shape[1]  # (B, T)
    return x.gather(1, frames[:, :, None].expand_as(x))


# --------------------------------------------------------------------------------------------------
# 5. Built-in corpora: synthetic, deterministic, offline

VERSION = 1  # raise it when a generator changes: packed files are made anew
TIME = np.arange(RATE) / RATE  # one second


def band_noise(rng, low, high, n=RATE):
    """White noise between two frequencies (Hz), by zeroing the rest of its spectrum."""
    spectrum = np.fft.rfft(rng.standard_normal(n))
    hertz = np.fft.rfftfreq(n, 1 / RATE)
    return np.fft.irfft(spectrum * ((hertz > low) & (hertz < high)), n)


def tone(hertz):
    """A sine whose frequency (Hz, a number or one per sample) is integrated to its phase."""
    return np.sin(2 * np.pi * np.cumsum(np.broadcast_to(hertz, TIME.shape)) / RATE)


def log_uniform(rng, low, high):
    return math.exp(rng.uniform(math.log(low), math.log(high)))


def strike(at, decay):
    """An envelope that starts at second `at` and falls by e every `decay` seconds."""
    return np.where(TIME >= at, np.exp(-np.maximum(TIME - at, 0) / decay), 0)


def train_of(rng, rate, jitter=0.0):
    """Instants (s) of a pulse train of `rate` a second."""
    gaps = (1 + jitter * rng.standard_normal(int(rate) + 2)) / rate
    times = rng.uniform(0, 1 / rate) + np.cumsum(np.abs(gaps))
    return times[times < 1]


def clicks(times, length=0.004):
    """One short burst at each instant."""
    wave = np.zeros(RATE)
    wave[(np.asarray(times) * RATE).astype(int)] = 1
    kernel = np.sin(np.arange(int(length * RATE)) * 1.3) * np.hanning(int(length * RATE))
    return np.convolve(wave, kernel)[:RATE]


def gate(rng, half):
    """1 for about a fifth of a second within a half of the clip."""
    start = half + rng.uniform(0.02, 0.25)
    return (TIME > start) & (TIME < start + rng.uniform(0.12, 0.24))


def burst(rng, half):
    low = log_uniform(rng, 50, 3000)
    return band_noise(rng, low, low * rng.uniform(1.5, 3)) * gate(rng, half)


def beep(rng, half):
    return tone(log_uniform(rng, 200, 6000)) * gate(rng, half)


# Source classes: steady or slowly changing textures, to pre-train on.
SOURCE = {
    "sweep-up": lambda r: tone(log_uniform(r, 200, 1200) * r.uniform(2, 5) ** TIME),
    "sweep-down": lambda r: tone(log_uniform(r, 1000, 6000) * r.uniform(2, 5) ** -TIME),
    "hiss-low": lambda r: band_noise(r, 50, r.uniform(300, 600)),
    "hiss-high": lambda r: band_noise(r, r.uniform(3000, 4500), 8000),
    "tremolo-slow": lambda r: band_noise(r, 300, 5000) * (1 + tone(r.uniform(3, 6))),
    "tremolo-fast": lambda r: band_noise(r, 300, 5000) * (1 + tone(r.uniform(12, 20))),
    "vibrato": lambda r: tone(log_uniform(r, 500, 3000) * 2 ** (0.3 * tone(r.uniform(2, 4)))),
    "buzz": lambda r: np.sign(tone(r.uniform(60, 120))),
    "clicks-slow": lambda r: clicks(train_of(r, r.uniform(4, 7))),
    "clicks-fast": lambda r: clicks(train_of(r, r.uniform(18, 30))),
    "swell": lambda r: band_noise(r, 200, 4000) * TIME ** r.uniform(1, 3),
    "fade": lambda r: band_noise(r, 200, 4000) * (1 - TIME) ** r.uniform(1, 3),
    "burst-early": lambda r: burst(r, 0.0),
    "burst-late": lambda r: burst(r, 0.5),
    "beep-early": lambda r: beep(r, 0.0),
    "beep-late": lambda r: beep(r, 0.5),
}


def bell(rng, at, low=500, high=2000, decay=(0.1, 0.3)):
    """Inharmonic partials that die away."""
    pitch = log_uniform(rng, low, high)
    partials = [tone(pitch * ratio) * strike(at, rng.uniform(*decay) / ratio**0.5)
                for ratio in (1, 2.76, 5.4) if pitch * ratio < 7500]
    return sum(partials)


def cricket(rng):
    gate = np.zeros(RATE)
    for start in train_of(rng, rng.uniform(2, 4)):
        gate += (TIME > start) & (TIME < start + 0.12)
    return tone(rng.uniform(3500, 5500)) * gate * np.clip(tone(rng.uniform(35, 60)), 0, 1)


def engine(rng):
    wave, ring = clicks(train_of(rng, rng.uniform(22, 40), 0.1)), np.arange(800) / RATE
    return np.convolve(wave, np.exp(-ring * 90) * np.sin(2 * np.pi * rng.uniform(120, 300) * ring))[:RATE]


def rain(rng):
    wave = np.zeros(RATE)
    drops = rng.integers(0, RATE, rng.integers(40, 90))
    wave[drops] = rng.exponential(1, len(drops))
    ring = np.arange(300) / RATE
    return np.convolve(wave, np.exp(-ring * 400) * np.sin(2 * np.pi * rng.uniform(1500, 3500) * ring))[:RATE]


def drum(rng, at):
    return tone(rng.uniform(60, 110) * (1 + 2 * strike(at, 0.03))) * strike(at, rng.uniform(0.08, 0.2))


def string(rng):
    """A plucked string: noise in a loop that loses its highs at every turn (Karplus-Strong)."""
    period = int(RATE / log_uniform(rng, 110, 440))
    loop, turns = rng.uniform(-1, 1, period), []
    for _ in range(RATE // period + 1):
        turns.append(loop)
        loop = 0.498 * (loop + np.roll(loop, 1))
    return np.concatenate(turns)[:RATE]


def two(rng, first, second):
    """Two events, one in each half, each at a random place of its half."""
    return first(rng.uniform(0.02, 0.2)) + second(rng.uniform(0.52, 0.7))


def note(rng, low, high):
    """A function of time: a short tone between two frequencies, starting there."""
    wave, length = tone(log_uniform(rng, low, high)), rng.uniform(0.15, 0.25)
    return lambda at: wave * (TIME > at) * (TIME < at + length)


def knocks(rng, faster):
    """Knocks whose gaps shrink (faster) or grow; the set of gaps is the same."""
    gaps = np.geomspace(rng.uniform(0.16, 0.22), rng.uniform(0.035, 0.05), 8)
    return clicks(rng.uniform(0.01, 0.1) + np.cumsum(gaps if faster else gaps[::-1])[:-1] * 0.95, 0.008)


# Target classes, other generators. A name with ">" has a twin of the same parts in another order.
TARGET = {
    "bell": lambda r: bell(r, r.uniform(0, 0.4)),
    "cricket": cricket,
    "engine": engine,
    "rain": rain,
    "drum": lambda r: drum(r, r.uniform(0, 0.5)),
    "string": string,
    "ping>thud": lambda r: two(r, lambda at: bell(r, at, decay=(0.05, 0.1)), lambda at: drum(r, at)),
    "thud>ping": lambda r: two(r, lambda at: drum(r, at), lambda at: bell(r, at, decay=(0.05, 0.1))),
    "high>low": lambda r: two(r, note(r, 2500, 4500), note(r, 300, 600)),
    "low>high": lambda r: two(r, note(r, 300, 600), note(r, 2500, 4500)),
    "slow>fast": lambda r: knocks(r, True),
    "fast>slow": lambda r: knocks(r, False),
}
SOUNDS = {"sounds": TARGET, "sounds-source": SOURCE}
COUNTS = {"train": 80, "valid": 20, "test": 40}  # clips a class


def sound_rows(name, root):
    return [(f"{name}/{kind}/{split}-{n}", kind, split) for kind in SOUNDS[name]
            for split, count in COUNTS.items() for n in range(count)]


def sound(clip):
    """The wave of one clip of `sounds`: its generator, a random level and background noise."""
    name, kind, _ = clip.split("/")
    rng = np.random.default_rng(list(hashlib.sha256(clip.encode()).digest()))
    wave = SOUNDS[name][kind](rng)
    noise = band_noise(rng, 20, log_uniform(rng, 500, 8000))
    noise *= wave.std() / noise.std() * 10 ** (-rng.uniform(10, 30) / 20)  # SNR 10 to 30 dB
    wave = wave + noise
    return wave / np.abs(wave).max() * rng.uniform(0.1, 0.9)


# --------------------------------------------------------------------------------------------------
# 6. Corpora: one function each that lists its clips as (path below the root, class, split)


def folder_rows(root):
    """One folder a class (or speaker); splits are drawn by a seed, "any" says so."""
    files = sorted(path for path in root.rglob("*") if path.suffix.lower() in AUDIO)
    return [(path.relative_to(root).as_posix(), path.relative_to(root).parts[0], "any")
            for path in files if path.parent != root]


def fsdd_rows(root):
    """Free Spoken Digit Dataset, `recordings/{digit}_{speaker}_{index}.wav`; index 0-4 tests."""
    rows = []
    for path in sorted((root / "recordings").glob("*_*_*.wav")):
        digit, _, index = path.stem.split("_")
        rows.append((f"recordings/{path.name}", digit, "test" if int(index) < 5 else "train*"))
    return rows


def open_features(root):
    """A corpus of ready log-mel features: features.npy (frames, F) int8, index.csv, trials.txt."""
    for name in ("features.npy", "index.csv"):
        if not (root / name).is_file():
            raise ValueError(f"--root {root}: no {name} there.\n{CORPORA['features'].tree}")
    store = np.load(root / "features.npy", mmap_mode="r")
    with open(root / "index.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    start, length = (np.array([int(row[key]) for row in rows]) for key in ("start", "frames"))
    if store.dtype != np.int8 or store.ndim != 2 or (start + length).max() > len(store):
        raise ValueError(f"{root}: features.npy is {store.dtype} {store.shape}, expected int8 (frames, "
                         f"mel bins) with at least the {(start + length).max()} frames of index.csv")
    trials = read_trials(root / "trials.txt") if (root / "trials.txt").is_file() else []
    return Corpus("features", [row["id"] for row in rows], [row["speaker"] for row in rows],
                  np.array([row["split"] for row in rows]), [], start, length, store,
                  {"test": trials} if trials else {})


def read_trials(path):
    """Lines `label id_a id_b`, label 1 for the same speaker -> [(label, id_a, id_b)]."""
    trials = []
    for number, line in enumerate(path.read_text().split("\n"), 1):
        fields = line.split()
        if fields and (len(fields) != 3 or fields[0] not in "01"):
            raise ValueError(f"{path}, line {number}: expected `1 id_a id_b`, got {line!r}")
        if fields:
            trials.append((int(fields[0]), fields[1], fields[2]))
    return trials


@dataclass
class Source:
    rows: object  # root -> [(clip, class, split)]
    tree: str = ""  # how the root must look; empty: built in
    read: object = None  # clip -> wave, for built-in corpora
    trials: object = None  # rows -> {"valid": [...], "test": [...]}
    expect: int = 0  # clips of the complete corpus


CORPORA = {
    "sounds": Source(functools.partial(sound_rows, "sounds"), read=sound),
    "sounds-source": Source(functools.partial(sound_rows, "sounds-source"), read=sound),
    "folder": Source(folder_rows, "A folder per class or speaker: ROOT/dog/1.wav, ROOT/cat/2.wav"),
    "fsdd": Source(fsdd_rows, "ROOT/recordings/7_jackson_32.wav, ... (3,000 WAV files)", expect=3000),
    "features": Source(None, "ROOT/features.npy (frames, mel bins) int8, index.csv, trials.txt"),
}


# --------------------------------------------------------------------------------------------------
# 7. Check: `python data.py NAME ROOT` looks at a corpus before anyone trains on it


def check(name, root, cache="cache", seed=0):
    """Print what a corpus holds and every fault by name; returns the number of faults."""
    corpus = open_corpus(name, root, cache, seed, skip_bad=True)
    faults = list(corpus.bad.values())
    if CORPORA[name].rows and CORPORA[name].tree:
        faults += check_files(CORPORA[name], Path(root))
    unit = 100 if corpus.mels else RATE
    print(f"{name}: {len(corpus.ids):,} clips, {len(corpus.classes)} classes or training speakers")
    for split in sorted(set(corpus.splits.tolist())):
        clips = corpus.pick(split)
        seconds = corpus.length[clips] / unit
        counts = Counter(corpus.labels[clips].tolist()).values()
        print(f"  {split:7s} {len(clips):7,} clips  {min(counts)} to {max(counts)} a class  "
              f"{seconds.min():.2f} / {np.median(seconds):.2f} / {seconds.max():.2f} s shortest, median, "
              f"longest  {seconds.sum() / 3600:.2f} h")
    for split, trials in corpus.trials.items():
        print(f"  {split} trials: {len(trials):,}, {sum(label for label, _, _ in trials):,} of one speaker")
    for line in [f"note: {note}" for note in corpus.notes] + [f"fault: {fault}" for fault in faults]:
        print(f"  {line}")
    print(f"  {len(faults)} faults" if faults else "  no fault found")
    return len(faults)


def check_files(source, root):
    """Print the kinds of WAV; return what decoding does not notice: missing and double clips."""
    rows, faults, kinds, sizes = source.rows(root), [], Counter(), {}
    if source.expect and len(rows) != source.expect:
        faults.append(f"expected {source.expect:,} clips, found {len(rows):,}")
    for clip, _, split in rows:
        with contextlib.suppress(ValueError, OSError):  # packing has named these
            sizes.setdefault(os.path.getsize(root / clip), []).append((clip, split))
            if clip.lower().endswith(".wav"):
                head = wav_header(root / clip)
                kinds[f"{head.rate} Hz, {head.channels} channel, {head.bits}-bit {head.kind}"] += 1
    for kind, count in kinds.most_common():
        print(f"{count:,} clips of {kind}")
    return faults + duplicates_across(root, sizes)


def duplicates_across(root, sizes):
    """Files of the same bytes in different splits; only files of one size are compared."""
    faults = []
    for group in sizes.values():
        seen = {}
        for clip, split in group if len(group) > 1 else ():
            digest = hashlib.sha256((root / clip).read_bytes()).digest()
            first, other = seen.setdefault(digest, (clip, split))
            if other != split:
                faults.append(f"{clip} ({split}) is the same as {first} ({other})")
    return faults


def main(argv=None):
    parser = argparse.ArgumentParser(description="Check a corpus: counts, durations, faults by name.")
    parser.add_argument("name", help=", ".join(CORPORA))
    parser.add_argument("root", nargs="?", help="its folder; built-in corpora need none")
    parser.add_argument("--cache", default="cache", help="folder for packed corpora")
    parser.add_argument("--seed", type=int, default=0, help="draws validation and few-shot clips")
    args = parser.parse_args(argv)
    try:
        sys.exit(1 if check(args.name, args.root, args.cache, args.seed) else 0)
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
