"""Audio on disk -> packed corpus -> batches -> log-mel features, for every model of this project.

Sections 1 audio files, 2 the packed corpus, 3 splits, 4 batches, 5 features and augmentation,
         6 built-in corpora, 7 corpora, 8 the command line
Axes     B batch, T frames (25 ms every 10 ms), F mel bins, C classes or speakers.

The first use of a corpus decodes every clip once, to 16 kHz mono int16, into one packed file. From
then on a training segment is a slice of a memory map: no decoding, no worker processes. Features
are computed a batch at a time on the device that trains.

    corpus = open_corpus("fsdd", "recordings-of/fsdd")
    for batch in batches(corpus, corpus.pick("train"), 32, frames=100, seed=0):
        x = features(batch.to("cpu"), encoder)                     # (B, T, F) = (32, 100, 128)

To add a corpus write one entry in CORPORA (section 7): what lists its clips as (path, class,
split), and how its folder looks. `python data.py NAME ROOT` checks a corpus before training.
Does not: stream from the network, keep more than 16 bits or another rate, or balance classes.
"""

import argparse
import contextlib
import csv
import hashlib
import importlib.util
import json
import math
import os
import shutil
import struct
import sys
import types
import zipfile
from collections import Counter
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import lru_cache, partial
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

# torchaudio's compiled extension, which nothing here needs, refuses a torch that it was not built
# for: a CPU-only one, or one for another CUDA version. An empty one takes its place.
sys.modules.setdefault("torchaudio._extension", types.SimpleNamespace(
    _IS_TORCHAUDIO_EXT_AVAILABLE=False, _IS_ALIGN_AVAILABLE=False, fail_if_no_align=lambda f: f))
import torchaudio
from torchaudio.compliance.kaldi import get_mel_banks

RATE = 16_000  # samples a second, everywhere behind the packed file
HOP, WINDOW, FFT = 160, 400, 512  # 10 ms, 25 ms, the next power of two
AUDIO = (".wav", ".flac", ".ogg", ".mp3", ".m4a")
WAV_TYPES = {(1, 8): ("u1", 128), (1, 16): ("<i2", 2**15), (1, 24): ("<i4", 2**31),  # PCM
             (1, 32): ("<i4", 2**31), (3, 32): ("<f4", 1), (3, 64): ("<f8", 1)}  # float

# --------------------------------------------------------------------------------------------------
# 1. Audio files: PCM and float WAV with numpy alone, the rest through torchaudio


def read_wav(path):
    """Return a WAV file as float32 (channels, n) in [-1, 1], and its samples a second. RIFF is a
    row of chunks: 4 letters, little-endian size, body padded to even."""
    form = b""
    with open(path, "rb") as file:
        riff = file.read(12)
        if riff[:4] != b"RIFF" or riff[8:] != b"WAVE":
            raise ValueError(f"{path}: empty or not a WAV file (it starts with {riff!r})")
        while (chunk := file.read(8))[:4] not in (b"data", b""):  # recorders put others before
            size = int.from_bytes(chunk[4:], "little")
            body = file.read(size + size % 2)
            form = body if chunk[:4] == b"fmt " else form
        size = int.from_bytes(chunk[4:], "little")
        raw = file.read(-1 if size in (0, 0xFFFFFFFF) else size)  # of a stream: not known at first
    code, channels, rate, _, _, bits = struct.unpack("<HHIIHH", form[:16].ljust(16, b"\0"))
    if code == 0xFFFE:  # WAVE_FORMAT_EXTENSIBLE: the real code opens a GUID
        code = int.from_bytes(form[24:26], "little")
    if (code, bits) not in WAV_TYPES or not channels or not 1_000 <= rate <= 768_000:
        raise ValueError(f"{path}: format {code}, {bits} bits, {channels} channels, {rate} Hz is "
                         "neither PCM nor float audio; convert it to PCM")
    if len(raw) < size < 0xFFFFFFFF:
        raise ValueError(f"{path}: truncated, {size} bytes announced, {len(raw)} there")
    raw = raw[: len(raw) - len(raw) % (channels * bits // 8)]
    if bits == 24:  # put the three bytes on top of an empty lowest byte: 32 bits
        raw = np.pad(np.frombuffer(raw, "u1").reshape(-1, 3), ((0, 0), (1, 0))).tobytes()
    kind, top = WAV_TYPES[code, bits]
    wave = np.frombuffer(raw, kind).astype(np.float32) - 128 * (bits == 8)  # which are unsigned
    return (wave / top).reshape(-1, channels).T, rate  # (n * channels,) alternate -> (channels, n)


def read_audio(path):
    """Read any audio file: mono float32 (samples,) at RATE, the mean of its channels."""
    if str(path).lower().endswith(".wav"):
        wave, rate = read_wav(path)
    else:
        try:
            wave, rate = torchaudio.load(str(path))
        except (ImportError, RuntimeError, OSError, ValueError) as error:
            raise ValueError(f"{path}: not readable as audio. All but WAV needs FFmpeg and "
                             f"torchcodec (pip install torchcodec): {error!s:.200}") from error
    wave = np.asarray(wave).mean(0)  # (channels, n) -> (n,)
    samples = math.ceil(len(wave) * RATE / rate)  # after resampling, which fails on an empty wave
    if samples < WINDOW or not np.isfinite(wave).all():
        raise ValueError(f"{path}: {samples} samples at 16 kHz; shorter than one frame ({WINDOW}), "
                         "or not finite")
    if rate != RATE:  # with a low-pass filter: dropping samples would fold high sounds down
        # It grows with the ratio's terms: 44,101 Hz would take 28 GB. Small ones are off by 1e-6.
        ratio = Fraction(RATE, rate).limit_denominator(1000)
        wave = torchaudio.functional.resample(
            torch.from_numpy(wave), ratio.denominator, ratio.numerator).numpy()
    return wave


def to_int16(wave):
    """Floats in [-1, 1) -> int16. Clipped: resampling overshoots, which would wrap to a click."""
    return (np.clip(wave, -1, 32767 / 32768) * 32768).round().astype("<i2")


def find_audio(root):
    """Return the paths of the audio files below a folder, relative to it, sorted."""
    start = len(os.path.join(root, ""))
    return sorted(os.path.join(folder, file)[start:].replace(os.sep, "/")
                  for folder, _, files in os.walk(root, followlinks=True)
                  for file in files if file.lower().endswith(AUDIO))


# --------------------------------------------------------------------------------------------------
# 2. The packed corpus: every clip decoded once, side by side in one file


@dataclass
class Corpus:
    """Clips as columns; clip i is store[start[i] : start[i] + length[i]]. The store is a memory map
    of int16 samples (n,), or of int8 log-mel frames (n, F) x 0.1 where a corpus brings features.
    With `trials` the corpus is one for verification, else for classes."""
    name: str
    ids: list
    labels: np.ndarray  # (clips,) index into classes; -1 for a speaker who is not in training
    splits: np.ndarray  # (clips,) "train", "valid", "test", "bad" or "unused"
    classes: list
    start: np.ndarray  # (clips,) int64, in samples or frames
    length: np.ndarray  # (clips,) int64, 0 for a clip that cannot be used
    store: np.ndarray
    trials: dict = field(default_factory=dict)  # "valid", "test" -> [(label, index, index)]
    notes: list = field(default_factory=list)  # sentences on what is missing
    bad: list = field(default_factory=list)  # why each of these clips cannot be used

    @property
    def mels(self):
        """F of a corpus of ready features, None for audio."""
        return self.store.shape[1] if self.store.ndim == 2 else None

    def pick(self, split):
        """Return the indices of the clips of a split."""
        return np.flatnonzero(self.splits == split)

    def fingerprint(self):
        """Hash what training sees; of all samples ten thousand, for all would take minutes."""
        columns = [self.ids, *(c.tolist() for c in (self.splits, self.length, self.labels))]
        samples = self.store[:: math.ceil(len(self.store) / 10_000)].tobytes()
        return hashlib.sha256(json.dumps(columns).encode() + samples).hexdigest()


def open_corpus(name, root=None, cache="cache", seed=0, fold=None, few_shot=0, skip_bad=False,
                valid=True, trials="o", train=True):
    """Return the corpus `name` of CORPORA, packed, with splits and trials. The arguments are flags
    of train.py; without `train` only the test is of use, so the trials may name every speaker."""
    source = CORPORA[name]
    file, count = source.lists.get(trials, ("trials.txt", 0))
    root = Path(root or "ROOT")
    try:
        if source.lists:
            (root / file).stat()  # raises before the clips are packed, which takes hours
        corpus = (pack(name, root, source.rows(root), source.read, cache, skip_bad)
                  if source.rows else open_features(root))
    except FileNotFoundError as error:
        brings = f"\n--download brings {source.address} into ROOT." * bool(source.address)
        raise ValueError(f"--data {name} needs --root, a folder with what follows ({error}).\n"
                         f"{source.tree}{brings}") from error
    good = np.count_nonzero(corpus.length)
    if source.clips not in (0, good):
        corpus.notes.append(f"expected {source.clips:,} clips, found {good:,}")
    if source.tree and (root / file).is_file():
        read_trials(corpus, root / file, count, skip_bad)
    for split in ("valid", "test") if source.trials else ():
        corpus.trials[split] = make_trials(corpus.pick(split), corpus.labels, rng_of(split))
    return make_splits(corpus, seed, fold or 1, few_shot, valid, train)


def pack(name, root, rows, read, cache, skip_bad):
    """Decode the clips of (clip, class, split) once, into a file named by a hash of their names,
    sizes and times; return a Corpus. Without `skip_bad`, bad clips are read again, then raise."""
    if not rows:
        raise FileNotFoundError(f"no clips of {name} below {root}")
    digest = hashlib.sha256()
    for clip, _, _ in rows:  # a million: one by one, not as one text
        stamp = VERSION
        if not read:  # a file, and not built in
            with contextlib.suppress(OSError):  # missing: reading it will say so
                stat = os.stat(f"{root}/{clip}")  # Path's slash takes longer than the call
                stamp = stat.st_size, stat.st_mtime_ns
        digest.update(f"{clip} {stamp}\n".encode())
    place = "own" if read else hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:6]
    path = Path(cache) / f"{name}-{place}.{digest.hexdigest()[:16]}.packed"
    ids, names, splits = (list(column) for column in zip(*rows))
    if not path.exists() or (read_pack(path)[2] and not skip_bad):
        write_pack(path, ids, read or (lambda clip: read_audio(root / clip)), 4 if read else 1)
    store, length, bad = read_pack(path)
    if bad and not skip_bad:
        raise ValueError(f"{len(bad)} of {len(ids)} clips of {name} cannot be used; --skip-bad "
                         "goes on without them:\n  " + "\n  ".join(bad[:5]))
    splits = np.where(length > 0, np.array(splits, object), "bad")
    return Corpus(name, ids, np.array(names), splits, [], np.cumsum(length) - length, length, store,
                  notes=[f"{len(bad)} unusable clips are left out"] * bool(bad), bad=bad)


def write_pack(path, clips, read, threads):
    """Write the samples of all clips, a JSON index (lengths, {id: reason}) and its size. The file
    is renamed at the end: its name stands for a whole file, also for another program."""
    def read_or_note(clip):
        try:
            return read(clip)
        except (ValueError, OSError) as error:
            bad[clip] = str(error)
            return np.zeros(0)

    name, lengths, bad = path.name.partition(".")[0], [], {}
    part = path.with_suffix(f".{os.getpid()}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with ThreadPool(threads) as pool, open(part, "wb") as file:
            for wave in tqdm(pool.imap(read_or_note, clips, 16), f"packing {name}", len(clips),
                             leave=False, disable=None):
                lengths.append(len(wave))
                file.write(to_int16(wave).tobytes())  # a full disk is no clip's fault: it stops
            index = json.dumps([lengths, bad]).encode()
            file.write(index + len(index).to_bytes(8, "little"))
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)  # interrupted, it would lie there for good, and be large
    for old in set(path.parent.glob(f"{name}.*.packed")) - {path}:  # before the corpus changed
        with contextlib.suppress(OSError):  # Windows keeps a file that is in use
            old.unlink()


def read_pack(path):
    """Return (memory map of the samples, length of each clip, why some cannot be used)."""
    raw = np.memmap(path, np.uint8, "r")
    size = int.from_bytes(raw[-8:].tobytes(), "little")
    lengths, bad = json.loads(raw[-8 - size : -8].tobytes())
    return raw[: -8 - size].view("<i2"), np.array(lengths, np.int64), list(bad.values())


def corpus_of_files(paths):
    """Return audio files, and those below folders, as a corpus in memory, without classes."""
    paths = [file for path in map(Path, paths) for file in
             ([path / name for name in find_audio(path)] if path.is_dir() else [path])]
    if not paths:
        raise ValueError("expected audio files, or folders that hold some; found none")
    waves = [to_int16(read_audio(path)) for path in paths]
    length, none = np.array([len(wave) for wave in waves]), np.zeros(len(paths), np.int64)
    return Corpus("files", list(map(str, paths)), none, none, [], np.cumsum(length) - length,
                  length, np.concatenate(waves))


def open_sounds(folder, cache="cache", skip_bad=False):
    """Return a folder of noises or of rooms' responses, packed; nothing and "generated" stay."""
    if folder in ("", "generated"):
        return folder
    rows = [(clip, 0, "") for clip in find_audio(folder)]
    return pack("extra", Path(folder), rows, None, cache, skip_bad)


# --------------------------------------------------------------------------------------------------
# 3. Splits: who trains, validates and tests; drawn by a seed where the corpus does not say


def make_splits(corpus, seed, fold, few_shot, valid, train):
    """Turn names into indices and folds into splits; draw what the corpus does not bring."""
    names, splits, rng = corpus.labels, corpus.splits, np.random.default_rng(seed)
    if corpus.trials:
        split_by_speaker(corpus, names, rng, draw=train and valid)
    else:
        split_by_class(splits, names, rng, fold)
    if not valid:
        splits[splits == "valid"] = "train"
        corpus.trials.pop("valid", None)
    corpus.classes = np.unique(names[splits == "train"]).tolist()
    number = {name: label for label, name in enumerate(corpus.classes)}
    corpus.labels = np.array([number.get(name, -1) for name in names])
    rng = np.random.default_rng(seed)  # few-shot clips do not depend on what was drawn before
    for name in corpus.classes if few_shot else ():
        clips = np.flatnonzero((names == name) & (splits == "train"))
        splits[rng.permutation(clips)[few_shot:]] = "unused"
    kinds = [len({label for label, _, _ in trials}) for trials in corpus.trials.values()]
    if min(kinds, default=2) < 2 or (kinds and train and len(corpus.classes) < 2):
        raise ValueError(f"{corpus.name}: trials are all of one kind, or fewer than two speakers "
                         "train (VoxCeleb's E and H test all of VoxCeleb1: train on VoxCeleb2)")
    found, needed = Counter(splits), {"train", "test"} if train else {"test"}
    if not needed <= found.keys() <= {"train", "valid", "test", "bad", "unused"}:
        raise ValueError(f"{corpus.name} has clips {dict(found)}: expected some of split train, "
                         "some of test, the others valid or what `Source` names")
    return corpus


def read_trials(corpus, path, count, skip_bad):
    """Read lines `label id_a id_b`, label 1 for the same speaker, into corpus.trials, as indices.
    In VoxCeleb's lists, of `count` trials, a clip may lie at any depth, and end in .m4a."""
    rows = [line.split() for line in path.read_text("utf-8-sig").split("\n") if line.strip()]
    for row in rows:
        if len(row) != 3 or row[0] not in ("0", "1"):
            raise ValueError(f"{path}: expected `1 id_a id_b`, got {' '.join(row)!r}")
    key = lambda clip: "/".join(clip.rpartition(".")[0].split("/")[-3:]) if count else clip
    index = {key(clip): i for i, clip in enumerate(corpus.ids) if corpus.length[i]}
    lost = {clip for _, *pair in rows for clip in pair if key(clip) not in index}
    if lost and not skip_bad:
        raise ValueError(f"{corpus.name} lacks {len(lost)} of the clips that the trials name, such "
                         f"as {min(lost)!r}; --skip-bad goes on without them")
    good = [(int(label), index[key(a)], index[key(b)]) for label, a, b in rows if not lost & {a, b}]
    corpus.trials["test"] = good
    if lost:
        corpus.bad += [f"{clip}: in the trials, but missing or unusable" for clip in sorted(lost)]
        corpus.notes.append(f"{len(rows) - len(good)} test trials of unusable clips are left out: "
                            "error rates are not comparable with the full list's")
    if count not in (0, len(rows)):
        corpus.notes.append(f"expected {count:,} trials in {path.name}, found {len(rows):,}")


def split_by_speaker(corpus, names, rng, draw):
    """Of clips marked "any": speakers in the trials test, with all their clips; others train. With
    `draw` a tenth of the training speakers validates, unless the corpus brings others."""
    tested = {names[i] for _, *pair in corpus.trials.get("test", ()) for i in pair}
    free = corpus.splits == "any"
    corpus.splits[free] = ["test" if name in tested else "train" for name in names[free]]
    if draw and "valid" not in corpus.trials:
        speakers = np.unique(names[corpus.splits == "train"])
        held = rng.permutation(speakers)[: max(2, len(speakers) // 10)]
        corpus.splits[(corpus.splits == "train") & np.isin(names, held)] = "valid"
        corpus.trials["valid"] = make_trials(corpus.pick("valid"), names, rng)


def split_by_class(splits, names, rng, fold):
    """Of folds, `fold` tests, the one before it validates, the rest trains: P1's rotation. Draw
    class by class a tenth of "train*" to validate, and of "any" also a fifth to test."""
    folds = sorted({int(split) for split in splits if split.isdigit()})
    for k, after in zip(folds, folds[1:] + folds[:1]):
        splits[splits == str(k)] = "test" if k == fold else "valid" if after == fold else "train"
    for name in np.unique(names):
        for kind in ("any", "train*"):
            clips = rng.permutation(np.flatnonzero((names == name) & (splits == kind)))
            valid, test = [max(1, len(clips) // part) if len(clips) > 2 else 0 for part in (10, 5)]
            splits[clips] = "train"
            splits[clips[:valid]] = "valid"
            splits[clips[valid : valid + test]] = "test" if kind == "any" else "train"


def make_trials(clips, names, rng):
    """Draw up to 2,000 target and as many non-target trials among clips, given by their index."""
    if len(clips) > 3000:  # a tenth of VoxCeleb2 would make six thousand million pairs
        clips = clips[rng.permutation(len(clips))[:3000]]
    _, speaker = np.unique(names[clips], return_inverse=True)  # (clips,)
    i, j = np.tril_indices(len(clips), -1)  # (pairs,) each: every pair once
    same = speaker[i] == speaker[j]
    groups = np.flatnonzero(same), np.flatnonzero(~same)
    size = min(2000, *map(len, groups))  # as many of both, so neither error is measured worse
    drawn = np.concatenate([group[rng.permutation(len(group))[:size]] for group in groups])
    return np.stack([same[drawn], clips[i[drawn]], clips[j[drawn]]], 1).tolist()


# --------------------------------------------------------------------------------------------------
# 4. Batches: slices of the packed file, in an order that only seed and epoch decide


@dataclass
class Batch:
    """x: (B, samples) int16 or (B, T, F) int8; lengths, labels, clips (indices): (B,)."""
    x: torch.Tensor
    lengths: torch.Tensor
    labels: torch.Tensor
    clips: np.ndarray

    def to(self, device):
        moved = (t.to(device, non_blocking=True) for t in (self.x, self.lengths, self.labels))
        return Batch(*moved, self.clips)


def batches(corpus, clips, size, frames, seed=0, epoch=0, train=True, repeat=False, shard=(0, 1),
            steps=None):
    """Yield Batches, `steps` at most; for training shuffled, cropped at random and whole. Batch n
    depends on (seed, epoch, n) alone, so a run can resume. shard (rank, world): a part of each."""
    order = np.random.default_rng([seed, epoch]).permutation(clips) if train else np.asarray(clips)
    size = min(size, len(order)) if train else size  # fewer clips than a batch: one small batch
    groups = [order[i : i + size] for i in range(0, len(order), size)]
    if train and len(groups[-1]) < size:
        groups.pop()  # a last batch of one would break BatchNorm; the next epoch shuffles anew
    rank, world = shard
    for number, group in enumerate(groups[:steps]):
        rng = np.random.default_rng([seed, epoch, number, rank]) if train else None
        if len(group[rank::world]):
            yield load_batch(corpus, group[rank::world], frames, rng, repeat)


def load_batch(corpus, clips, frames, rng=None, repeat=False):
    """Return one Batch of `frames` frames a clip, from a random place with `rng`, else its start. A
    shorter clip is followed by zeros, or with `repeat` by itself; `lengths` says where it ends."""
    size = frames if corpus.mels else samples_of(frames)
    # (B, samples) int16 or (B, T, F) int8: widened on the device, so half or a quarter travels.
    x = np.zeros((len(clips), size, *corpus.store.shape[1:]), corpus.store.dtype)
    lengths = np.minimum(corpus.length[clips], size)
    for row, (clip, length) in enumerate(zip(clips, lengths)):
        spare = corpus.length[clip] - length
        start = corpus.start[clip] + (rng.integers(spare + 1) if rng and spare else 0)
        segment = corpus.store[start : start + length]
        if repeat and length < size:
            segment = np.resize(segment, x.shape[1:])  # numpy's resize repeats
        x[row, : len(segment)] = segment
    lengths = np.full_like(lengths, size) if repeat else lengths
    return Batch(*map(torch.from_numpy, (x, lengths, corpus.labels[clips])), clips)


def cut_windows(corpus, clips, frames):
    """Return (a corpus of these clips' windows of `frames` frames; (windows,) the row in `clips` of
    each). A clip's last window is moved back to be whole, so that all weigh the same."""
    size = frames if corpus.mels else samples_of(frames)
    count = np.maximum(1, -(-corpus.length[clips] // size))  # rounded up
    owner = np.repeat(np.arange(len(clips)), count)  # (windows,)
    number = np.arange(len(owner)) - (np.cumsum(count) - count)[owner]  # 0, 1, ... in its clip
    clips = clips[owner]
    length = corpus.length[clips]
    start = corpus.start[clips] + np.minimum(number * size, np.maximum(0, length - size))
    windows = replace(corpus, labels=corpus.labels[clips], start=start,
                      length=np.minimum(length, size))  # ids and splits stay the clips'
    return windows, torch.from_numpy(owner)


# --------------------------------------------------------------------------------------------------
# 5. Features: a batch of waves to log-mel frames, equal to kaldi's; and their augmentation

# Of AudioSet's log-mel bins, from AST's code. A corpus' own would shift what its layers can read.
AUDIOSET_MEAN, AUDIOSET_STD = -4.2677393, 4.5689974


def frames_of(samples):
    """Frames in so many samples, a number or an array: only whole windows count."""
    return np.maximum(0, (samples - WINDOW) // HOP + 1)


def samples_of(frames):
    """The fewest samples that give so many frames: the inverse of `frames_of`."""
    return (frames - 1) * HOP + WINDOW


@lru_cache
def mel_triangles(mels, device):
    """(FFT/2 + 1, mels): kaldi's triangles, equally spaced in mel from 20 Hz to 8 kHz."""
    triangles, _ = get_mel_banks(mels, FFT, RATE, 20.0, 0.0, 100.0, -500.0, 1.0)
    return F.pad(triangles, (0, 1)).T.to(device)  # (mels, 256) without the highest bin's zero


def fbank(waves, mels=128):
    """Log-mel features of float waves in [-1, 1]: (B, samples) -> (B, T, F). AST was trained on
    kaldi's, fbank(htk_compat=True, window_type="hanning", dither=0): these are equal."""
    window = torch.hann_window(WINDOW, periodic=False, device=waves.device)  # (400,)
    # On the CPU in parts of some 400 frames, which stay in its cache: twice as fast.
    size = max(1, 400 // int(frames_of(waves.shape[1]))) if waves.is_cpu else len(waves)
    parts = []
    # A caller may sit in bfloat16 autocast, whose three digits would change the features.
    with torch.autocast(waves.device.type, enabled=False):
        for part in waves.split(size):
            frames = part.unfold(1, WINDOW, HOP)  # (B, T, 400)
            frames = frames - frames.mean(2, keepdim=True)  # each frame's own offset, as kaldi does
            # Pre-emphasis. The first sample is compared with itself, but the window is zero there.
            frames = F.pad(frames[..., 1:] - 0.97 * frames[..., :-1], (1, 0))
            spectrum = torch.fft.rfft(frames * window, n=FFT)  # (B, T, 257)
            power = spectrum.real.square() + spectrum.imag.square()  # abs() would take a root
            parts.append(power @ mel_triangles(mels, waves.device))  # (B, T, F)
    # The floor is kaldi's: silence is log(1.19e-7) = -15.9, and not minus infinity.
    return torch.cat(parts).clamp_min(torch.finfo(torch.float32).eps).log()


def features(batch, encoder):
    """Return the encoder's input (B, T, F), normalised as it asks: by AudioSet's mean and std, or
    ("utterance") without each clip's own mean per bin, which is where a channel's colour is."""
    x = batch.x  # (B, samples) or (B, T, F)
    if x.ndim == 3 and x.is_floating_point():  # made before: inputs, or frozen outputs (B, 1, D)
        return x[:, 0] if x.shape[1] == 1 else x  # (B, D) or (B, T, F)
    if x.ndim == 3:
        x = x.float() * 0.1  # int8 -> log-mel (B, T, F)
    else:
        x = fbank(x.float() / 32768, encoder.mels)  # (B, samples) -> (B, T, F)
        if encoder.normalise == "audioset":  # zero behind a clip's end: loud, but AST expects it
            ends = (batch.lengths - WINDOW) // HOP + 1  # (B,) frames, as `frames_of`
            past = torch.arange(x.shape[1], device=x.device) >= ends[:, None]  # (B, T)
            x = x.masked_fill(past[:, :, None], 0.0)  # (B, T, 1): all bins of a frame
    if encoder.normalise == "audioset":
        return (x - AUDIOSET_MEAN) / (2 * AUDIOSET_STD)
    return x - x.mean(1, keepdim=True)  # (B, 1, F): one mean a bin


# Augmentation of training batches; everything is drawn from torch's generator.
SPEEDS = ((1, 1), (9, 10), (11, 10))  # x1, x0.9, x1.1


def augment_features(x, shift=0, spec_f=0, spec_t=0):
    """Training features (B, T, F): roll a clip by up to `shift` frames either way, as in AST; then
    hide a band of bins and a stretch of frames, each up to so wide (SpecAugment, 1904.08779)."""
    if shift:
        by = torch.randint(-shift, shift + 1, (len(x), 1), device=x.device)  # (B, 1)
        source = (torch.arange(x.shape[1], device=x.device) - by) % x.shape[1]  # (B, T)
        x = x.gather(1, source[:, :, None].expand_as(x))  # (B, T, 1) -> (B, T, F)
    for axis, widest in ((2, spec_f), (1, spec_t)):  # bins, then frames
        if widest:  # x is normalised, so 0 is near its mean
            x = torchaudio.functional.mask_along_axis_iid(x, min(widest, x.shape[axis]), 0.0, axis)
    return x


def augment_waves(batch, classes, frames, speeds=False, gain=0.0, noise="", rooms="", share=0.6,
                  snr=(0, 15)):
    """Give the waves (B, samples) of a training Batch speeds (crops, a tenth longer, are then cut
    to `frames`), levels of up to `gain` dB more or less, and to a `share` of them noise or a
    room: nothing, "generated", or a Corpus of `open_sounds`. `snr`: lowest and highest, in dB."""
    if not (speeds or gain or noise or rooms):
        return batch
    batch = replace(batch, x=batch.x.float())  # still int16's scale
    if speeds:
        batch = perturb_speed(batch, frames, classes)
    decibels = gain * (2 * torch.rand(len(batch.x), 1, device=batch.x.device) - 1)  # (B, 1)
    x = batch.x * 10 ** (decibels / 20)
    y = x.clone()  # x stays whole: babble is made of it
    chosen = torch.randperm(len(x))[: round(share * len(x))].to(x.device)
    half = len(chosen) // (2 if noise else 1) if rooms else 0
    indoors, noisy = chosen[:half], chosen[half:]
    if half:
        responses = (make_rooms(half, x.device) if rooms == "generated" else
                     draw_sounds(rooms, half, 100, False).to(x.device))  # about a second
        y[indoors] = reverberate(x[indoors], responses)
    if noise and len(noisy):
        sounds = (make_noise(x, noisy) if noise == "generated" else
                  draw_sounds(noise, len(noisy), frames_of(x.shape[1]), True).to(x.device))
        ratio = snr[0] + (snr[1] - snr[0]) * torch.rand(len(noisy), device=x.device)  # (noisy,)
        y[noisy] = torchaudio.functional.add_noise(x[noisy], sounds, ratio, batch.lengths[noisy])
    return replace(batch, x=y)


def perturb_speed(batch, frames, classes):
    """Play each clip at one of SPEEDS. Pitch and formants move with the speed, which makes another
    speaker: label + classes * k."""
    x, lengths = batch.x.new_empty(len(batch.x), samples_of(frames)), batch.lengths.clone()
    drawn = torch.randint(len(SPEEDS), lengths.shape, device=x.device)  # (B,)
    for k, (fast, slow) in enumerate(SPEEDS):
        rows = (drawn == k).nonzero()[:, 0]
        if len(rows):  # as if recorded at `fast` and kept at `slow`: fewer samples, higher tones
            x[rows] = torchaudio.functional.resample(batch.x[rows], fast, slow)[:, : x.shape[1]]
            lengths[rows] = (lengths[rows] * slow // fast).clamp(max=x.shape[1])
    return Batch(x, lengths, batch.labels + classes * drawn, batch.clips)


def reverberate(x, responses):
    """Put waves (B, n) each in a room: convolve them with impulse responses (B, m). The direct
    path, a response's highest peak, stays where the wave was; the energy is kept."""
    wet = torchaudio.functional.fftconvolve(x, responses)  # (B, n + m - 1)
    direct = responses.abs().argmax(1, keepdim=True)  # (B, 1)
    wet = wet.gather(1, direct + torch.arange(x.shape[1], device=x.device))  # (B, n)
    return wet * x.norm(dim=1, keepdim=True) / wet.norm(dim=1, keepdim=True).clamp_min(1e-6)


def make_rooms(count, device):
    """(count, m) responses: a direct path of 1, then weaker noise that dies in 0.2 to 0.8 s."""
    seconds, weaker = torch.rand(2, count, 1, device=device)  # (count, 1) each, 0 to 1
    tail = torch.randn(count, RATE // 2, device=device)  # (count, m)
    tail *= 10 ** (-3 * torch.arange(RATE // 2, device=device) / RATE / (0.2 + 0.6 * seconds))
    tail = tail / tail.norm(dim=1, keepdim=True) / 10 ** (weaker / 2)  # 0 to 10 dB weaker
    tail[:, 0] = 1
    return tail


def make_noise(x, rows):
    """(rows, n) noise for some clips of x (B, n): babble (up to four others at once) or a hiss."""
    babble = sum(x[(rows + k) % len(x)] for k in range(1, min(5, len(x))))  # (rows, n)
    hiss = torch.randn(len(rows), x.shape[1], device=x.device)
    return torch.where(torch.rand(len(rows), 1, device=x.device) < 0.5, babble, hiss)


def draw_sounds(sounds, count, frames, anywhere):
    """(count, samples) of `open_sounds`: from anywhere and repeated, or once from the start."""
    rng = np.random.default_rng(int(torch.randint(2**31, ())))
    clips = rng.choice(sounds.length.nonzero()[0], count)  # a bad one has no samples
    return load_batch(sounds, clips, frames, rng if anywhere else None, repeat=anywhere).x.float()


# --------------------------------------------------------------------------------------------------
# 6. Built-in corpora: synthetic, deterministic, offline

VERSION = 2  # raise it when a generator changes: packed files are made anew
TIME = np.arange(RATE) / RATE  # one second
COUNTS = {"train": 80, "valid": 20, "test": 40}  # clips a class


def rng_of(name):
    """Seeded by a hash of the name: the same on every machine, in any order, one at a time."""
    return np.random.default_rng(list(hashlib.sha256(name.encode()).digest()))


def log_uniform(rng, low, high):
    return low * (high / low) ** rng.uniform()


def tone(hertz):
    """A sine whose frequency (Hz, a number or one per sample) is integrated to its phase."""
    return np.sin(2 * np.pi * np.cumsum(np.broadcast_to(hertz, TIME.shape)) / RATE)


def band_noise(rng, low, high):
    """White noise between two frequencies (Hz), by zeroing the rest of its spectrum."""
    spectrum, hertz = np.fft.rfft(rng.standard_normal(RATE)), np.fft.rfftfreq(RATE, 1 / RATE)
    return np.fft.irfft(spectrum * ((hertz > low) & (hertz < high)))


def dying(start, decay):
    """An envelope that starts at second `start` and falls by e every `decay` seconds."""
    return (TIME >= start) * np.exp(-np.maximum(TIME - start, 0) / decay)


def part_of(rng, half):
    """1 for about a fifth of a second in one half of the clip, which begins at second `half`."""
    start = half + rng.uniform(0.02, 0.2)
    return (TIME > start) & (TIME < start + rng.uniform(0.15, 0.25))


def clicks(instants, hertz, length):
    """At each instant (s) a burst of `hertz` that swells and falls within `length` seconds."""
    wave, burst = np.zeros(RATE), tone(hertz)[: int(length * RATE)]
    wave[(instants * RATE).astype(int)] = 1
    return np.convolve(wave, burst * np.hanning(len(burst)))[:RATE]


def regular(rng, rate):
    """Instants (s), `rate` a second."""
    return np.arange(rng.uniform(0, 1 / rate), 1, 1 / rate)


def burst(rng, half):
    low = log_uniform(rng, 50, 3000)
    return band_noise(rng, low, low * rng.uniform(1.5, 3)) * part_of(rng, half)


def beep(rng, half, low=200, high=6000):
    return tone(log_uniform(rng, low, high)) * part_of(rng, half)


def struck(pitch, partials, start, decay):
    """A struck or plucked thing: multiples of a pitch that die away, higher ones sooner."""
    return sum(tone(pitch * k) * dying(start, decay / k**0.5) for k in partials)


def bell(rng, start, *decay):
    return struck(log_uniform(rng, 700, 1480), (1, 2.76, 5.4), start, rng.uniform(*decay))


def drum(rng, start):
    skin = rng.uniform(60, 110) * (1 + 2 * dying(start, 0.03))  # Hz: it slackens
    return tone(skin) * dying(start, rng.uniform(0.08, 0.2))


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
    "clicks-slow": lambda r: clicks(regular(r, r.uniform(4, 7)), 3300, 0.004),
    "clicks-fast": lambda r: clicks(regular(r, r.uniform(18, 30)), 3300, 0.004),
    "swell": lambda r: band_noise(r, 200, 4000) * TIME ** r.uniform(1, 3),
    "fade": lambda r: band_noise(r, 200, 4000) * (1 - TIME) ** r.uniform(1, 3),
    "burst-early": lambda r: burst(r, 0.0),
    "burst-late": lambda r: burst(r, 0.5),
    "beep-early": lambda r: beep(r, 0.0),
    "beep-late": lambda r: beep(r, 0.5),
}

# Target classes, other generators: what the source classes teach must be adapted, not recalled. A
# name with ">" has a twin of the same parts in another order: a model without order guesses there.
TARGET = {
    "bell": lambda r: bell(r, r.uniform(0, 0.4), 0.2, 0.5),
    "cricket": lambda r: (tone(r.uniform(3500, 5500)) * np.maximum(tone(r.uniform(35, 60)), 0)
                          * (tone(r.uniform(2, 4)) > 0)),
    "engine": lambda r: clicks(regular(r, r.uniform(22, 40)), r.uniform(120, 300), 0.03),
    "rain": lambda r: clicks(r.uniform(0, 1, r.integers(40, 90)), r.uniform(1500, 3500), 0.004),
    "drum": lambda r: drum(r, r.uniform(0, 0.5)),
    "string": lambda r: struck(log_uniform(r, 110, 440), range(1, 9), 0, r.uniform(0.2, 0.6)),
    "ping>thud": lambda r: bell(r, r.uniform(0.02, 0.2), 0.05, 0.1) + drum(r, r.uniform(0.52, 0.7)),
    "thud>ping": lambda r: drum(r, r.uniform(0.02, 0.2)) + bell(r, r.uniform(0.52, 0.7), 0.05, 0.1),
    "high>low": lambda r: beep(r, 0.0, 2500, 4500) + beep(r, 0.5, 300, 600),
    "low>high": lambda r: beep(r, 0.0, 300, 600) + beep(r, 0.5, 2500, 4500),
    "slow>fast": lambda r: clicks(1 - np.geomspace(r.uniform(0.08, 0.16), 0.95, 8), 3300, 0.008),
    "fast>slow": lambda r: clicks(np.geomspace(r.uniform(0.08, 0.16), 0.95, 8), 3300, 0.008),
}
SOUNDS = {"sounds": TARGET, "sounds-source": SOURCE}


def sound_rows(name, root):
    """Clips are named before they are made: the name is the seed of the wave."""
    return [(f"{name}/{kind}/{split}-{n}", kind, split) for kind in SOUNDS[name]
            for split, count in COUNTS.items() for n in range(count)]


def sound(clip):
    """The wave of one clip of `sounds`: its generator, a random level and background noise."""
    name, kind, _ = clip.split("/")
    rng = rng_of(clip)
    wave = SOUNDS[name][kind](rng)
    noise = band_noise(rng, 20, log_uniform(rng, 500, 8000))
    noise *= wave.std() / noise.std() * 10 ** (-rng.uniform(10, 30) / 20)  # SNR 10 to 30 dB
    wave = wave + noise
    return wave / np.abs(wave).max() * rng.uniform(0.1, 0.9)  # so loudness tells no class


# `voices`: a lesson in speech as source and filter. The source is a row of pulses (the vocal folds)
# or noise (air through a gap); the filter is the vocal tract, whose resonances, the formants, make
# the phoneme. Who speaks is in both, under what is said; each utterance has a channel of its own.
PHONEMES = np.array([  # F1, F2, F3 in Hz of a tract of middle length; loudness of pulses, of noise
    (730, 1090, 2440, 1.0, 0.0), (270, 2290, 3010, 0.7, 0.0), (300, 870, 2240, 0.7, 0.0),  # a i u
    (530, 1840, 2480, 0.9, 0.0), (570, 840, 2410, 0.9, 0.0), (490, 1350, 1690, 0.8, 0.0),  # e o er
    (250, 1100, 2200, 0.3, 0.0), (300, 1700, 2600, 0.3, 0.15),  # m, v: voice and noise at once
    (5000, 6200, 7300, 0.0, 0.5), (500, 1500, 2500, 0.0, 0.0)])  # s: a short tract; a pause
VOICES = {"train": (120, 15), "valid": (20, 15), "test": (20, 15)}  # speakers, utterances of each
STEP = 256  # 16 ms: in so short a time a mouth stands still
BINS = np.linspace(0, RATE / 2, STEP + 1)[:, None]  # (bins, 1) Hz
STFT = dict(n_fft=2 * STEP, hop_length=STEP, window=torch.hann_window(2 * STEP).double() ** 0.5)


def voice(clip):
    """The wave of one clip of `voices`: a speaker says random phonemes, through a channel."""
    speaker, rng = rng_of(clip.rpartition("/")[0]), rng_of(clip)  # who, and what this time
    pitch = log_uniform(speaker, 80, 280)  # Hz, from a deep man's to a child's
    melody = speaker.uniform(0.1, 0.4)  # how far the pitch wanders, in octaves
    tilt = speaker.uniform(3, 12)  # dB an octave: folds that close slowly make duller pulses
    breath = speaker.uniform(0.02, 0.4)  # air that escapes between the pulses
    tract = speaker.uniform(0.86, 1.18)  # scales all formants: a shorter tube rings higher
    f4, f5 = speaker.uniform((3100, 4100), (3900, 5200))  # hardly move with the phoneme

    # Mouth and pitch glide from phoneme to phoneme, 48 to 192 ms apart.
    steps = int(rng.choice([125, 156, 187]))  # 2, 2.5 or 3 s: equal lengths share a batch
    places = np.cumsum(rng.integers(3, 13, steps))  # more than there is time for
    said = PHONEMES[rng.integers(len(PHONEMES), size=steps)].T  # (5, steps)
    f1, f2, f3, voiced, air = [np.interp(range(steps + 1), places, row) for row in said]  # (steps,)
    wander = np.interp(np.arange(steps * STEP) / STEP, places, rng.standard_normal(steps))
    pitch = pitch * 2 ** (melody * wander)  # (samples,) Hz

    # The source: a pulse wherever the phase passes a whole number, and noise.
    pulses = np.diff(np.floor(np.cumsum(pitch) / RATE), prepend=0) * np.sqrt(RATE / pitch)
    waves = torch.from_numpy(np.stack([pulses, rng.standard_normal(len(pulses))]))
    pulses, noise = torch.stft(waves, **STFT, return_complex=True).numpy()  # (bins, steps) each
    dull = 10 ** (-tilt / 20 * np.log2(np.maximum(BINS, 200) / 200))  # (bins, 1)
    source = voiced * dull * pulses + (air + breath * voiced) * noise  # (bins, steps)

    # The filter: five resonances, of which higher ones are wider; and a smooth channel.
    peaks = [tract * peak for peak in (f1, f2, f3, f4, f5)]  # Hz
    power = sum(1 / (1 + ((BINS - peak) / (40 + 0.04 * peak)) ** 2) for peak in peaks)
    channel = np.interp(np.log1p(BINS / 700), np.linspace(0, 2.6, 7), rng.standard_normal(7))  # dB
    heard = source * np.sqrt(power) * 10 ** (4 / 20 * channel)
    wave = torch.istft(torch.from_numpy(heard), **STFT).numpy()
    return wave / np.abs(wave).max() * rng.uniform(0.5, 0.9)


# --------------------------------------------------------------------------------------------------
# 7. Corpora: each lists its clips as (path below the root, class, split)


@dataclass
class Source:
    """What CORPORA says about one corpus. Splits of `rows` besides train, valid and test: "any" is
    drawn by a seed, of "train*" a tenth validates, "1", "2", ... are folds."""
    rows: object  # root -> [(clip, class, split)]
    tree: str = ""  # how the root must look, and where to ask for it; empty: built in
    clips: int = 0  # of the official corpus; 0: any number
    address: str = ""  # of its archive, or of the folder of its lists; empty: no plain download
    sha256: str = ""  # of the archive; empty: none is published with us
    folds: int = 0  # test folds 1..folds; 0: one split
    lists: dict = field(default_factory=dict)  # --trials -> (file of the list, trials in it)
    trials: bool = False  # draw trials among the speakers that validate and test
    read: object = None  # clip -> wave, for built-in corpora
    recipe: dict = field(default_factory=dict)  # P1, section 3.1, or ours: settings of train.py


def table(path, *forms):
    """Rows of a CSV file as tuples: each form with the columns it names, as "audio/{filename}"."""
    with open(path, newline="", encoding="utf-8-sig") as file:  # -sig: Excel's first three bytes
        rows = [{k: v for k, v in row.items() if v is not None} for row in csv.DictReader(file)]
    if not rows:
        raise ValueError(f"{path}: no rows")
    try:
        return [tuple(form.format_map(row) for form in forms) for row in rows]
    except KeyError as error:
        raise ValueError(f"{path}: no column {error}, or not in each row") from error


def speechcommands_rows(root):
    """Version 2: a folder a word; what neither list names trains."""
    role = {clip: split for split, name in (("valid", "validation"), ("test", "testing"))
            for clip in (root / f"{name}_list.txt").read_text(encoding="utf-8").split()}
    clips = role.keys() | set(find_audio(root))  # with what a list names and is not there
    return [(clip, clip.split("/")[0], role.get(clip, "train")) for clip in sorted(clips)
            if clip.count("/") == 1 and not clip.startswith("_")]  # _background_noise_ is no word


def open_features(root):
    """Return a corpus of ready log-mel features: features.npy (frames, F) int8, one step 0.1 of a
    natural logarithm; index.csv, a row a clip. Raises ValueError for another shape."""
    store = np.load(root / "features.npy", mmap_mode="r")
    rows = table(root / "index.csv", "{id}", "{speaker}", "{split}", "{start}", "{frames}")
    ids, names, splits, *numbers = map(np.array, zip(*rows))
    start, length = np.array(numbers, np.int64)
    frames = (start + length).max()
    if store.dtype != np.int8 or store.ndim != 2 or frames > len(store):
        raise ValueError(f"{root}: features.npy is {store.dtype} {store.shape}, expected int8 "
                         f"(frames, mel bins) with at least the {frames} frames of index.csv")
    return Corpus("features", ids.tolist(), names, splits.astype(object), [], start, length, store)


VOXCELEB = "https://www.robots.ox.ac.uk/~vgg/data/voxceleb/"
CORPORA = {
    "sounds": Source(partial(sound_rows, "sounds"), read=sound, recipe=dict(frames=100, epochs=7)),
    "sounds-source": Source(partial(sound_rows, "sounds-source"), read=sound,
                            recipe=dict(frames=100, epochs=7)),
    "voices": Source(  # nobody is in two splits, so a test is of strangers
        lambda root: [(f"voices/{split}-{who}/{n}", f"{split}-{who}", split)
                      for split, (speakers, each) in VOICES.items()
                      for who in range(speakers) for n in range(each)],
        read=voice, trials=True, recipe=dict(frames=150, epochs=6, batch_size=32)),
    "folder": Source(
        lambda root: [(clip, clip.split("/")[0], "any") for clip in find_audio(root)
                      if "/" in clip], "A folder per class or speaker: ROOT/dog/1.wav, ..."),
    "fsdd": Source(  # of each digit and speaker recordings 0 to 4 test: its authors' split
        lambda root: [(f"recordings/{path.name}", path.name[0],
                       "test" if path.stem.split("_")[2] in list("01234") else "train*")
                      for path in sorted((root / "recordings").glob("[0-9]_*_*.wav"))],
        "ROOT/recordings/7_jackson_32.wav, ...", 3000,
        "https://github.com/Jakobovski/free-spoken-digit-dataset/archive/refs/heads/master.zip",
        recipe=dict(frames=64, epochs=40, spec_f=16, spec_t=8, shift=6, gain=10.0)),
    "esc50": Source(
        lambda root: table(root / "meta/esc50.csv", "audio/{filename}", "{category}", "{fold}"),
        "ROOT/meta/esc50.csv, ROOT/audio/1-100032-A-0.wav, ...", 2000,
        "https://github.com/karolpiczak/ESC-50/archive/master.zip", folds=5,
        recipe=dict(frames=500, epochs=50, spec_f=24, spec_t=80)),
    "urbansound8k": Source(  # slices of one recording are in one fold, so the folds stay whole
        lambda root: table(root / "metadata/UrbanSound8K.csv", "audio/fold{fold}/{slice_file_name}",
                           "{class}", "{fold}"),
        "ROOT/metadata/UrbanSound8K.csv, ROOT/audio/fold1/101415-3-0-2.wav, ...", 8732,
        "https://zenodo.org/record/1203745/files/UrbanSound8K.tar.gz", folds=10,
        recipe=dict(frames=400, epochs=30, spec_f=24, spec_t=80)),
    "speechcommands": Source(  # version 2
        speechcommands_rows, "ROOT/validation_list.txt, ROOT/testing_list.txt, "
        "ROOT/bed/00176480_nohash_0.wav, ...", 105829,
        "http://download.tensorflow.org/data/speech_commands_v0.02.tar.gz",
        "af14739ee7dc311471de98f5f9d2c9191b18aedfe957f4a6ff791c709868ff58",
        recipe=dict(frames=100, epochs=75, batch_size=128)),
    "fluentspeech": Source(  # 31 intents: action, object and location
        lambda root: [row for split in ("train", "valid", "test") for row in table(
            root / f"data/{split}_data.csv", "{path}", "{action}/{object}/{location}", split)],
        "ROOT/data/train_data.csv, valid_data.csv, test_data.csv, ROOT/wavs/"
        "speakers/SPEAKER/CLIP.wav, ...\nAsk for it by the form of its publisher, Fluent.ai",
        30043, recipe=dict(frames=400, epochs=75)),
    "voxceleb": Source(  # VoxCeleb1, VoxCeleb2 or both, at any depth
        lambda root: [(clip, clip.split("/")[-3], "any") for clip in find_audio(root)
                      if clip.count("/") > 1 and clip.split("/")[-3].startswith("id")],
        "ROOT/veri_test2.txt, list_test_all2.txt, list_test_hard2.txt, and anywhere below ROOT\n"
        f"id10270/x6uYqmx31kE/00001.wav or .m4a, ...\nAsk for the audio by the form at {VOXCELEB}",
        address=VOXCELEB + "meta/", recipe=dict(frames=200),
        lists={"o": ("veri_test2.txt", 37611), "e": ("list_test_all2.txt", 579818),
               "h": ("list_test_hard2.txt", 550894)}),
    "features": Source(None, "ROOT/features.npy (frames, mel bins) int8, ROOT/trials.txt, "
                       "ROOT/index.csv: id, speaker, split, start, frames"),
}


# --------------------------------------------------------------------------------------------------
# 8. The command line: getting, checking and drawing a corpus


def download(address, path, sha256=""):
    """Bring `address` to `path`, unless it is there; return the path, or raise a sentence."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:  # to a temporary name, then renamed
            torch.hub.download_url_to_file(address, str(path), hash_prefix=sha256 or None)
        except Exception as error:  # of the network, of HTTP, of the checksum
            raise ValueError(f"{address} could not be downloaded ({error}). If it stays so, fetch "
                             f"it by hand and save it as {path}") from error
    return path


def download_corpus(name, root, cache="cache"):
    """--download: bring a corpus' lists into `root`, or its archive if nothing is there yet."""
    source = CORPORA[name]
    if not (root and source.address):
        raise ValueError(f"--download needs --root, and an address: {name} has "
                         f"{source.address or 'none'}. {source.tree}")
    for file, _ in source.lists.values():
        download(source.address + file, Path(root) / file)
    if not source.lists and not any(Path(root).glob("[!.]*")):
        unpack(download(source.address, Path(cache) / f"{name}.archive", source.sha256), Path(root))


def unpack(archive, folder):
    """Unpack a zip or tar.gz into `folder`, without the one folder that may hold all the rest, and
    delete it. Members that would lie outside are refused (tar) or left out (zip)."""
    part = folder / ".unpacking"  # so that `folder` never looks whole when it is not
    form = {"format": "zip"} if zipfile.is_zipfile(archive) else dict(format="gztar", filter="data")
    try:
        shutil.unpack_archive(archive, part, **form)
        top, *others = part.glob("[!._]*")  # without what a Mac adds
        for path in list((part if others or not top.is_dir() else top).iterdir()):
            os.replace(path, folder / path.name)
    except Exception as error:  # of zipfile, tarfile, gzip, zlib: they share no other class
        raise ValueError(f"{archive} could not be unpacked ({error}); if it is damaged, delete it: "
                         "the same command gets it again") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    archive.unlink()


def check_figure(path):
    """Raise a sentence, before any work, for a figure that could not be drawn or written."""
    fine = path.endswith((".png", ".svg", ".pdf")) and os.access(Path(path).parent, os.W_OK)
    if not (fine and importlib.util.find_spec("matplotlib")):
        raise ValueError(f"--figure {path}: expected a name that ends in .png, .svg or .pdf, in a "
                         "folder that is there, and matplotlib (pip install matplotlib)")


@contextlib.contextmanager
def figure(path, rows=1, columns=1, size=(7, 4)):
    """Give matplotlib axes (an array of them if there are several); write them to `path`."""
    from matplotlib.figure import Figure  # not pyplot, which wants a screen
    sheet = Figure(figsize=size, layout="constrained")
    yield sheet.subplots(rows, columns)
    sheet.savefig(path, dpi=90)
    print(f"drawn: {path}")


def draw_spectrograms(corpus, path):
    """Draw a training clip of six classes, twins in order first; below each augmented."""
    train = corpus.pick("train")
    names = sorted(corpus.classes, key=lambda name: (">" not in name, name))[:6]
    clips = [train[corpus.labels[train] == corpus.classes.index(name)][0] for name in names]
    x = load_batch(corpus, np.array(clips), 100).x  # their first second
    x = x.float() * 0.1 if corpus.mels else fbank(x / 32768)  # (B, T, F)
    augmented = augment_features(x - x.mean(), shift=25, spec_f=24, spec_t=20)
    with figure(path, 2, len(names), (1.6 * len(names), 3.6)) as axes:
        for axis, name, picture in zip(axes.flat, names * 2, [*x, *augmented]):
            axis.imshow(picture.T.numpy(), origin="lower", aspect="auto", cmap="magma")
            axis.set(title=name, xlabel="frame (10 ms)", ylabel="mel bin")
            axis.label_outer()


def main(argv=None):
    """Print what a corpus holds, and every fault by name."""
    parser = argparse.ArgumentParser(description="Check a corpus: counts, durations, faults.")
    parser.add_argument("name", choices=CORPORA, metavar="NAME", help=", ".join(CORPORA))
    parser.add_argument("root", metavar="ROOT", nargs="?", help="its folder; none if built in")
    parser.add_argument("--cache", default="cache", help="folder for packed corpora")
    parser.add_argument("--trials", default="o", choices=("o", "e", "h"), help="VoxCeleb's list")
    parser.add_argument("--download", action="store_true", help="get it first, where that is free")
    parser.add_argument("--figure", help="draw spectrograms into this .png, .svg or .pdf")
    args = parser.parse_args(argv)
    opened = partial(open_corpus, args.name, args.root, args.cache, trials=args.trials, train=False)
    try:
        if args.figure:
            check_figure(args.figure)
        if args.download:
            download_corpus(args.name, args.root, args.cache)
        try:
            corpus = opened()  # without skip_bad, so that what is bad is read again
        except ValueError:
            corpus = opened(skip_bad=True)
        print(f"{args.name}: {len(corpus.ids):,} clips, {len(corpus.classes)} classes or speakers")
        for split in sorted(set(corpus.splits)):
            clips = corpus.pick(split)
            seconds = corpus.length[clips] / (100 if corpus.mels else RATE)  # frames or samples
            counts = Counter(corpus.labels[clips].tolist()).values()
            print(f"  {split:7s} {len(clips):7,} clips, {min(counts)} to {max(counts)} a class, "
                  f"{seconds.min():.2f} to {seconds.max():.2f} s, {seconds.sum() / 3600:.2f} h")
        for split, pairs in corpus.trials.items():
            print(f"  {split} trials: {len(pairs):,}, {sum(t[0] for t in pairs):,} of one speaker")
        for fault in [*corpus.notes, *corpus.bad] or ["none"]:
            print(f"  fault: {fault}")
        if args.figure:
            draw_spectrograms(corpus, args.figure)
        sys.exit(1 if corpus.notes else 0)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
