"""Audio on disk -> packed corpus -> batches -> log-mel features, for every model of this project.

Sections 1 audio files, 2 the packed corpus, 3 splits, 4 batches, 5 features, 6 augmentation,
         7 built-in corpora, 8 corpora, 9 getting one, 10 the check
Axes     B batch, T frames (25 ms every 10 ms), F mel bins, C classes or speakers.

The first use of a corpus decodes every clip once, to 16 kHz mono int16, into one packed file. From
then on a training segment is a slice of a memory map: no decoding, no worker processes, the same
speed for WAV, FLAC and M4A. Features are computed a batch at a time on the device that trains.

    corpus = open_corpus("fsdd", "recordings-of/fsdd")
    for batch in batches(corpus, corpus.pick("train"), 32, frames=100, seed=0):
        x = features(batch.to("cpu"), encoder)                     # (B, T, F) = (32, 100, 128)

To add a corpus write one function that lists its clips as (path, class, split) and one line in
CORPORA (section 8). `python data.py NAME ROOT` checks a corpus before anyone trains on it.

Does not: stream from the network, keep more than 16 bits or another rate than 16 kHz, or balance
classes.
"""

import argparse
import contextlib
import csv
import functools
import gzip
import hashlib
import json
import math
import os
import shutil
import struct
import sys
import tarfile
import types
import zipfile
import zlib
from collections import Counter, namedtuple
from dataclasses import dataclass, field, replace
from fractions import Fraction
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
    """Return torchaudio, also beside a torch it was not built for.

    Its compiled extension refuses another CUDA version or a CPU-only torch. Nothing here needs it,
    so when the import fails an empty extension takes its place.
    """
    try:
        import torchaudio.compliance.kaldi
    except (OSError, RuntimeError, ImportError):
        for name in [name for name in sys.modules if name.split(".")[0] == "torchaudio"]:
            del sys.modules[name]
        stand_in = types.ModuleType("torchaudio._extension")
        stand_in._IS_TORCHAUDIO_EXT_AVAILABLE = stand_in._IS_ALIGN_AVAILABLE = False
        stand_in.fail_if_no_align = lambda function: function
        sys.modules["torchaudio._extension"] = stand_in
        import torchaudio.compliance.kaldi
    return torchaudio


# samples a second; "pcm" or "float"; bits of one sample; bytes before the first; samples a channel
WavHeader = namedtuple("WavHeader", "rate channels kind bits offset samples")
WAV_TYPES = {("pcm", 8): "u1", ("pcm", 16): "<i2", ("pcm", 24): "u1", ("pcm", 32): "<i4",
             ("float", 32): "<f4", ("float", 64): "<f8"}  # numpy has no type of three bytes


def wav_header(path):
    """Read a RIFF header: chunks of (4 letters, little-endian size, body padded to even).

    Raises ValueError, with the path, for a file that is empty, cut off or neither PCM nor float.
    """
    size, form = os.path.getsize(path), b""
    with open(path, "rb") as file:
        riff = file.read(12)
        if riff[:4] != b"RIFF" or riff[8:] != b"WAVE":
            raise ValueError(f"{path}: " + (f"not a WAV file (it starts with {riff[:12]!r})"
                                            if size else "the file is empty"))
        while (chunk := file.read(8))[:4] != b"data":  # recorders put chunks of their own before
            if len(chunk) < 8:
                raise ValueError(f"{path}: truncated, it ends before its audio data")
            length = int.from_bytes(chunk[4:], "little")
            body = file.read(length + length % 2)
            form = body if chunk[:4] == b"fmt " else form
        offset, length = file.tell(), int.from_bytes(chunk[4:], "little")
    code, channels, rate, _, _, bits = struct.unpack("<HHIIHH", form[:16].ljust(16, b"\0"))
    if code == 0xFFFE:  # WAVE_FORMAT_EXTENSIBLE: the real code opens a GUID
        code = int.from_bytes(form[24:26], "little")
    kind = {1: "pcm", 3: "float"}.get(code)
    if (kind, bits) not in WAV_TYPES or not channels:
        raise ValueError(f"{path}: WAV code {code} with {bits} bits is neither PCM nor float; "
                         "convert it to PCM")
    if not 1_000 <= rate <= 768_000:
        raise ValueError(f"{path}: {rate} samples a second are no sound's: the header is damaged")
    if length in (0, 0xFFFFFFFF):  # written by a stream that could not seek back
        length = size - offset
    if offset + length > size:
        raise ValueError(f"{path}: truncated, {length} bytes announced, {size - offset} there")
    return WavHeader(rate, channels, kind, bits, offset, length // (channels * bits // 8))


def read_wav(path, start=0, samples=None):
    """Return samples [start, start + samples) as float32 (channels, n) in [-1, 1], and the rate.

    Reads no more of the file than that. Raises ValueError for what is not a sound WAV file.
    """
    head = wav_header(path)
    count = max(0, min(head.samples - start, head.samples if samples is None else samples))
    width = head.bits // 8  # bytes a sample
    raw = np.fromfile(path, WAV_TYPES[head.kind, head.bits],
                      count * head.channels * (3 if width == 3 else 1),
                      offset=head.offset + start * head.channels * width)
    if width == 3:  # three bytes, little-endian: put them on top of an empty lowest byte
        padded = np.zeros((count * head.channels, 4), np.uint8)
        padded[:, 1:] = raw.reshape(-1, 3)  # (n * channels, 3)
        raw, width = padded.view("<i4")[:, 0], 4  # (n * channels,)
    wave = raw.astype(np.float32)
    if head.kind == "pcm":  # 8 bits are the one unsigned kind
        wave = (wave - 128) / 128 if width == 1 else wave / 2 ** (8 * width - 1)
    return wave.reshape(count, head.channels).T, head.rate  # channels alternate: (n, ch) -> (ch, n)


def read_audio(path):
    """Read any audio file: mono float32 (samples,) at RATE, the mean of its channels.

    Raises ValueError with a sentence for what cannot be decoded, holds NaN or is too short for one
    frame of features; OSError for a file that is not there.
    """
    path = Path(path)
    if path.suffix.lower() == ".wav":
        wave, rate = read_wav(path)
    else:
        try:
            wave, rate = import_torchaudio().load(str(path))
        except ImportError as error:
            raise ValueError(f"{path}: reading {path.suffix or 'this kind of'} files needs "
                             "torchcodec and FFmpeg: pip install torchcodec, or convert to "
                             "WAV") from error
        except (RuntimeError, OSError, ValueError) as error:
            reason = str(error).partition("\n")[0]  # FFmpeg's errors go on for a page
            raise ValueError(f"{path}: not readable as audio ({reason})") from error
        wave = wave.numpy()
    wave = wave.mean(0)  # (channels, n) -> (n,)
    samples = math.ceil(len(wave) * RATE / rate)  # after resampling, which fails on an empty wave
    if samples < WINDOW:
        raise ValueError(f"{path}: {samples} samples at 16 kHz, shorter than one frame ({WINDOW})")
    if not np.isfinite(wave).all():
        raise ValueError(f"{path}: holds samples that are not finite")
    if rate != RATE:  # with a low-pass filter: dropping samples would fold high sounds down
        # The filter grows with the ratio's terms: 44,101 Hz would take 28 GB. A ratio of small
        # terms is off by less than one in a million, far less than a recorder's clock.
        ratio = Fraction(RATE, rate).limit_denominator(1000)
        wave = import_torchaudio().functional.resample(
            torch.from_numpy(wave), ratio.denominator, ratio.numerator).numpy()
    return wave


def to_int16(wave):
    """Floats in [-1, 1) -> int16, 32768 steps to 1. Clipped: an overshoot would wrap to its other
    sign, a loud click, and float files and resampling do overshoot."""
    return (np.clip(wave, -1, 32767 / 32768) * 32768).round().astype("<i2")


def find_audio(root):
    """Return the paths of the audio files below a folder, relative to it, sorted."""
    found = []
    for folder, _, files in os.walk(root, followlinks=True):  # Path.rglob is five times slower
        place = os.path.relpath(folder, root).replace(os.sep, "/")
        place = "" if place == "." else place + "/"
        found += [place + file for file in files if file.lower().endswith(AUDIO)]
    return sorted(found)


# --------------------------------------------------------------------------------------------------
# 2. The packed corpus: every clip decoded once, side by side in one file

MISSING = ": missing, but listed"


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
    splits: np.ndarray  # (clips,) "train", "valid", "test", "bad" or "unused"
    classes: list
    start: np.ndarray  # (clips,) int64, in samples or frames
    length: np.ndarray  # (clips,) int64, 0 for a clip that cannot be used
    store: np.ndarray
    trials: dict = field(default_factory=dict)
    notes: list = field(default_factory=list)  # sentences for the user
    bad: dict = field(default_factory=dict)  # id -> why this clip cannot be used
    gaps: list = field(default_factory=list)  # sentences on what the official corpus has more

    @property
    def mels(self):
        """F of a corpus of ready features, None for audio."""
        return self.store.shape[1] if self.store.ndim == 2 else None

    def pick(self, split):
        """Return the indices of the clips of a split."""
        return np.flatnonzero(self.splits == split)

    def fingerprint(self):
        """Hash what training sees: names, splits, labels, lengths and some ten thousand samples.
        All of the sound would take minutes."""
        columns = [self.ids, *(c.tolist() for c in (self.splits, self.length, self.labels))]
        samples = self.store[:: math.ceil(len(self.store) / 10_000)].tobytes()
        return hashlib.sha256(json.dumps(columns).encode() + samples).hexdigest()


def unlabelled(name, ids, start, length, store):
    """Clips without classes or splits, as a Corpus."""
    zeros = np.zeros(len(ids), np.int64)
    return Corpus(name, ids, zeros, zeros.astype(str), [], start, length, store)


def open_corpus(name, root=None, cache="cache", seed=0, fold=None, few_shot=0, skip_bad=False,
                valid=True, trials="o", train=True):
    """Return the corpus `name` of CORPORA, packed, with splits and trials.

    root      its folder; built-in corpora need none
    cache     folder for packed files: a corpus may lie where nobody can write
    seed      of all that is drawn: validation clips or speakers, splits of a folder, few_shot
    fold      test fold of a corpus with folds, from 1 on; None: the first, or no folds
    few_shot  keep so many training clips a class, drawn by `seed`; 0 keeps all
    skip_bad  go on without clips that cannot be read; else they raise
    valid     False: the validation clips train too, so there is nothing to select on
    trials    which of a corpus' lists of trials: VoxCeleb's o, e or h
    train     False: only the test clips are of use, so the trials may name every speaker
    Raises ValueError with a sentence: unknown name, no root, wrong tree, bad clips, empty split.
    """
    source = find_source(name)
    if source.tree and not (root and Path(root).is_dir()):
        raise ValueError(f"--data {name} needs --root: no folder at '{root or ''}'.\n"
                         + how_to_get(source))
    if fold is not None and not source.folds:
        raise ValueError(f"--fold {fold}: {name} has no folds")
    root = Path(root or ".")
    corpus = (open_features(root) if name == "features" else
              open_clips(name, root, cache, skip_bad, trials))
    return make_splits(corpus, seed, fold or 1, few_shot, valid, train)


def find_source(name):
    if name not in CORPORA:
        raise ValueError(f"unknown corpus {name!r}: choose from {', '.join(CORPORA)}")
    return CORPORA[name]


def open_clips(name, root, cache, skip_bad, trials):
    """Return a corpus of audio, packed; splits still as listed, trials still with names."""
    source, listed, missing = CORPORA[name], [], ""
    try:
        rows = source.rows(root)
    except FileNotFoundError as error:
        rows, missing = [], f" ({Path(error.filename).name} is missing)"
    if not rows:
        raise ValueError(f"--root {root}: no clips of {name} there{missing}.\n"
                         + how_to_get(source))
    if source.lists:
        rows, listed = add_trials(source, root, rows, trials)
    elif source.tree and (root / "trials.txt").is_file():
        listed = read_trials(root / "trials.txt")
    store, start, length, bad = pack(name, root, rows, source.read, cache, skip_bad)
    ids, names, splits = (list(column) for column in zip(*rows))
    corpus = Corpus(name, ids, names, np.array(splits, object), [], start, length, store, bad=bad)
    corpus.trials = {"test": listed} if listed else source.trials(rows) if source.trials else {}
    if bad:
        corpus.splits[length == 0] = "bad"
        corpus.notes.append(f"{len(bad)} unusable clips are left out (--skip-bad)")
    corpus.gaps = find_gaps(source, rows, bad, trials, len(listed))
    corpus.notes += corpus.gaps
    return corpus


def pack(name, root, rows, read, cache, skip_bad):
    """Decode all clips into `cache`, once; return (store, start, length, {id: what is wrong}).

    The file's name carries a hash of the clips' names, sizes and times, so a changed corpus is
    another file. The index is written last: without it nothing is packed. Clips that were bad are
    tried again, for a decoder may have been installed since. Raises ValueError for bad clips,
    unless `skip_bad`.
    """
    digest, cache = hashlib.sha256(), Path(cache)
    for clip, _, _ in rows:  # a million: one by one, not as one text
        digest.update(f"{clip} {VERSION if read else size_and_time(root, clip)}\n".encode())
    place = "own" if read else hashlib.sha256(str(root.resolve()).encode()).hexdigest()[:6]
    name, key = f"{name}-{place}", digest.hexdigest()[:16]  # two roots are two packed files
    decode = functools.partial(read_or_reason, read or (lambda clip: read_audio(root / clip)))
    pcm, index = cache / f"{name}.{key}.pcm", cache / f"{name}.{key}.npz"
    _, bad = read_index(index)
    if bad is None or any(not decode(clip)[1] for clip in list(bad)[:: max(1, len(bad) // 100)]):
        cache.mkdir(parents=True, exist_ok=True)
        write_pack(pcm, index, name, [row[0] for row in rows], decode)
        for old in cache.glob(f"{name}.*"):  # of this corpus before it changed
            if key not in old.name and ".part" not in old.name:
                with contextlib.suppress(OSError):  # Windows keeps a file that is in use
                    old.unlink()
    lengths, bad = read_index(index)
    if bad and not skip_bad:
        first = "".join(f"\n  {reason}" for reason in list(bad.values())[:5])
        raise ValueError(f"{len(bad)} of {len(rows)} clips of {name} cannot be used:{first}\n"
                         "Repair or remove them, or go on without them with --skip-bad.")
    return np.memmap(pcm, "<i2", "r"), np.cumsum(lengths) - lengths, lengths, bad


def size_and_time(root, clip):
    """[bytes, time of change in ns]: hashing the contents would read the whole corpus each time."""
    try:
        stat = os.stat(f"{root}/{clip}")  # a million times: Path's slash costs more than the call
    except OSError:
        return None  # missing: reading it will say so
    return [stat.st_size, stat.st_mtime_ns]


def read_or_reason(read, clip):
    """Return (wave, ""), or (empty wave, why it cannot be read)."""
    try:
        return read(clip), ""
    except FileNotFoundError as error:  # a list names it
        return np.zeros(0), f"{error.filename}{MISSING}"
    except (ValueError, OSError) as error:
        return np.zeros(0), str(error)


def write_pack(pcm, index, name, clips, decode):
    """Decode into a temporary file and rename it, so that a name stands for a whole file."""
    lengths, bad, part = [], {}, pcm.with_suffix(f".{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            for clip in tqdm(clips, desc=f"packing {name}", unit="clip", leave=False, disable=None):
                wave, reason = decode(clip)
                if reason:
                    bad[clip] = reason
                file.write(to_int16(wave).tobytes())  # a full disk is no clip's fault: it stops
                lengths.append(len(wave))
            file.write(b"\0\0" * (sum(lengths) == 0))  # an empty file cannot be mapped
        os.replace(part, pcm)
    finally:
        part.unlink(missing_ok=True)  # interrupted, it would lie there for good, and be large
    part = index.with_suffix(f".{os.getpid()}.part.npz")  # savez appends .npz to any other name
    np.savez(part, lengths=np.array(lengths, np.int64), bad=json.dumps(bad))
    os.replace(part, index)


def read_index(index):
    """Return (lengths of the clips in samples, {id: what is wrong}), or Nones before packing."""
    if not index.exists():
        return None, None
    with np.load(index) as saved:
        return saved["lengths"], json.loads(str(saved["bad"]))


def corpus_of_files(paths):
    """Return audio files, and those below folders, as a corpus in memory, one clip each."""
    paths = [file for path in map(Path, paths) for file in
             ([path / name for name in find_audio(path)] if path.is_dir() else [path])]
    if not paths:
        raise ValueError("expected audio files, or folders that hold some; found none")
    waves = [to_int16(read_audio(path)) for path in paths]
    length = np.array([len(wave) for wave in waves])
    return unlabelled("files", list(map(str, paths)), np.cumsum(length) - length, length,
                      np.concatenate(waves))


def open_sounds(folder, cache="cache", skip_bad=False):
    """Return every audio file below a folder of noises or impulse responses, packed like a corpus:
    MUSAN alone is a hundred hours, more than a memory holds. Nothing and "generated" stay."""
    if folder in ("", "generated"):
        return folder
    rows = [(clip, "", "") for clip in find_audio(folder)]
    if not rows:
        raise ValueError(f"no audio files below {folder!r}: expected a folder of noises or impulse "
                         "responses, or the word generated")
    store, start, length, _ = pack("extra", Path(folder), rows, None, cache, skip_bad)
    good = np.flatnonzero(length)
    return unlabelled(str(folder), [rows[i][0] for i in good], start[good], length[good], store)


# --------------------------------------------------------------------------------------------------
# 3. Splits: who trains, validates and tests; drawn by a seed where the corpus does not say


def make_splits(corpus, seed, fold, few_shot, valid, train):
    """Turn names into labels and folds into splits; draw what the corpus does not bring."""
    names = np.array(corpus.labels)
    if corpus.trials:
        drop_bad_trials(corpus)
        test_named_speakers(corpus, names)
        if train and valid and "valid" not in corpus.trials:
            hold_out_speakers(corpus, names, seed)
    else:
        rotate_folds(corpus, fold)
        draw_splits(corpus, names, seed)
    if not valid:
        corpus.splits[corpus.splits == "valid"] = "train"
        corpus.trials.pop("valid", None)
    corpus.classes = sorted({str(name) for name in names[corpus.splits == "train"]})
    number = {name: label for label, name in enumerate(corpus.classes)}
    corpus.labels = np.array([number.get(name, -1) for name in names])
    if few_shot:
        rng, clips = np.random.default_rng(seed), corpus.pick("train")
        kept = [rng.permutation(clips[corpus.labels[clips] == label])[:few_shot]
                for label in range(len(corpus.classes))]
        corpus.splits[np.setdiff1d(clips, np.concatenate(kept))] = "unused"
    index_trials(corpus)
    for split in ("train", "test") if train else ("test",):
        if not len(corpus.pick(split)):
            raise ValueError(f"{corpus.name} has no {split} clips: {dict(Counter(corpus.splits))}")
    return corpus


def drop_bad_trials(corpus):
    """Leave out the trials of clips that cannot be read: they have no embedding. Say so."""
    for split, trials in corpus.trials.items():
        good = [trial for trial in trials if not corpus.bad.keys() & set(trial[1:])]
        if len(good) < len(trials):
            corpus.notes.append(f"{len(trials) - len(good)} {split} trials of unusable clips are "
                                "left out: error rates are not comparable with the full list's")
            corpus.trials[split] = good


def test_named_speakers(corpus, names):
    """Of clips marked "any": speakers in the trials test, with all their clips; others train."""
    named = {clip for _, *pair in corpus.trials.get("test", ()) for clip in pair}
    tested = {name for clip, name in zip(corpus.ids, names) if clip in named}
    drawn = corpus.splits == "any"
    corpus.splits[drawn] = ["test" if name in tested else "train" for name in names[drawn]]
    if drawn.any():
        corpus.notes.append(f"{len(tested)} speakers are in the trials and so never in training, "
                            f"with all their {len(corpus.pick('test')):,} clips")


def hold_out_speakers(corpus, names, seed):
    """Validate on a tenth of the training speakers, drawn by `seed`: speakers, not clips, for
    recognising a known speaker is easier than telling strangers apart."""
    rng, speakers = np.random.default_rng(seed), sorted(set(names[corpus.splits == "train"]))
    held = set(rng.permutation(speakers)[: max(2, len(speakers) // 10)])
    if len(speakers) - len(held) < 2:
        raise ValueError(f"{corpus.name}: {len(speakers)} speakers besides those in the trials; it "
                         "takes two to train and two to validate (VoxCeleb's E and H test all of "
                         "VoxCeleb1: train on VoxCeleb2)")
    clips = [i for i in corpus.pick("train") if names[i] in held]
    corpus.splits[clips] = "valid"
    corpus.trials["valid"] = make_trials([(corpus.ids[i], names[i]) for i in clips], rng)
    if not corpus.trials["valid"]:
        raise ValueError(f"{corpus.name}: {len(clips)} clips of {len(held)} held-out speakers make "
                         "no validation trials: it takes two speakers, and two clips of one")


def make_trials(clips, rng, each=2000):
    """Draw up to `each` target and as many non-target trials among (id, speaker) pairs."""
    if len(clips) > 3000:  # a tenth of VoxCeleb2 would make six thousand million pairs
        clips = [clips[i] for i in rng.permutation(len(clips))[:3000]]
    _, speaker = np.unique([name for _, name in clips], return_inverse=True)  # (clips,)
    i, j = np.tril_indices(len(clips), -1)  # (pairs,) each: every pair once
    same = speaker[i] == speaker[j]
    groups = np.flatnonzero(same), np.flatnonzero(~same)
    size = min(each, *map(len, groups))  # as many of both, so neither error is measured worse
    drawn = [group[rng.permutation(len(group))[:size]] for group in groups]
    return [(int(same[k]), clips[i[k]][0], clips[j[k]][0]) for k in np.concatenate(drawn)]


def rotate_folds(corpus, fold):
    """Fold k tests, fold k-1 validates, the rest trains: P1's rotation for ESC-50."""
    folds = sorted({int(split) for split in corpus.splits if split.isdigit()})
    if folds and fold not in folds:
        raise ValueError(f"--fold {fold}: {corpus.name} has folds {folds}")
    for k in folds:
        role = "test" if k == fold else "valid" if k == folds[folds.index(fold) - 1] else "train"
        corpus.splits[corpus.splits == str(k)] = role


def draw_splits(corpus, names, seed):
    """Draw a validation tenth of "train*", and all three splits of what is marked "any", class by
    class, so that each split has every class, whatever the sizes."""
    rng, splits, alone = np.random.default_rng(seed), corpus.splits, []
    for name in sorted(set(names)):
        clips = rng.permutation(np.flatnonzero((names == name) & (splits == "any")))
        splits[clips] = "train"
        if len(clips) > 2:
            valid, test = max(1, len(clips) // 10), max(1, len(clips) // 5)
            splits[clips[:valid]] = "valid"
            splits[clips[valid : valid + test]] = "test"
        elif len(clips):
            alone.append(name)
        clips = rng.permutation(np.flatnonzero((names == name) & (splits == "train*")))
        splits[clips] = "train"
        splits[clips[: len(clips) // 10]] = "valid"
    if alone:
        corpus.notes.append(f"{len(alone)} classes have fewer than three clips and only train: "
                            + ", ".join(alone[:5]))


def index_trials(corpus):
    """Turn the clips' names in the trials into indices; refuse trials that measure nothing."""
    index = {clip: i for i, clip in enumerate(corpus.ids)}
    for split, trials in corpus.trials.items():
        unknown = sorted({clip for _, *pair in trials for clip in pair if clip not in index})
        if unknown:
            raise ValueError(f"the {split} trials name {len(unknown)} clips that {corpus.name} "
                             f"lacks, the first is {unknown[0]}")
        corpus.trials[split] = [(label, index[a], index[b]) for label, a, b in trials]
        if len({label for label, _, _ in trials}) < 2:
            raise ValueError(f"the {split} trials of {corpus.name} are all of one kind: error "
                             "rates need trials of one speaker and of two")


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
    """Yield Batches of `frames` frames; shuffled, cropped at random and cut to whole for training.

    The draw of batch n depends on (seed, epoch, n) alone, so a resumed run sees the same data.
    repeat  a clip shorter than the crop is repeated (speakers) rather than padded (AST)
    shard   (rank, world): every process takes its part of each batch
    steps   stop after so many batches; None: after one pass
    """
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
    """Return one Batch of `frames` frames a clip, from a random place with `rng`, else its start.

    A shorter clip is followed by zeros, or with `repeat` by itself; `lengths` says where it ends.
    """
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
    if repeat:
        lengths[:] = size
    return Batch(*map(torch.from_numpy, (x, lengths, corpus.labels[clips])), clips)


def cut_windows(corpus, clips, frames):
    """Return (a corpus of the windows of `frames` frames of these clips, side by side; (windows,)
    the row in `clips` that each is of).

    The last window of a clip is moved back to be whole, so that all of them weigh the same.
    """
    size = frames if corpus.mels else samples_of(frames)
    count = np.maximum(1, -(-corpus.length[clips] // size))  # rounded up
    owner = np.repeat(np.arange(len(clips)), count)  # (windows,)
    number = np.arange(len(owner)) - (np.cumsum(count) - count)[owner]  # 0, 1, ... in its clip
    clips = clips[owner]
    length = corpus.length[clips]
    start = corpus.start[clips] + np.minimum(number * size, np.maximum(0, length - size))
    windows = replace(corpus, ids=[corpus.ids[i] for i in clips], labels=corpus.labels[clips],
                      splits=corpus.splits[clips], start=start, length=np.minimum(length, size))
    return windows, torch.from_numpy(owner)


# --------------------------------------------------------------------------------------------------
# 5. Features: a batch of waves to log-mel frames, equal to kaldi's

# Mean and std of AudioSet's log-mel bins, from AST's code. They belong to its checkpoints and stay
# the same on every corpus: a corpus' own would shift what the frozen layers have learned to read.
AUDIOSET_MEAN, AUDIOSET_STD = -4.2677393, 4.5689974


def frames_of(samples):
    """Frames in so many samples, a number or an array: only whole windows count (kaldi's "snip
    edges")."""
    return np.maximum(0, (samples - WINDOW) // HOP + 1)


def samples_of(frames):
    """The fewest samples that give so many frames: the inverse of `frames_of`."""
    return (frames - 1) * HOP + WINDOW


@functools.lru_cache
def mel_triangles(mels, device):
    """(FFT/2 + 1, mels): kaldi's triangles, equally spaced in mel from 20 Hz to 8 kHz."""
    kaldi = import_torchaudio().compliance.kaldi
    triangles, _ = kaldi.get_mel_banks(mels, FFT, RATE, 20.0, 0.0, 100.0, -500.0, 1.0)
    return F.pad(triangles, (0, 1)).T.to(device)  # (mels, 256) without the highest bin's zero


def fbank(waves, mels=128):
    """Log-mel features of float waves in [-1, 1]: (B, samples) -> (B, T, F), on their device.

    Equal to torchaudio.compliance.kaldi.fbank(htk_compat=True, window_type="hanning", dither=0),
    natural logarithm of power: what AST's checkpoints were trained on. Raises ValueError below one
    frame of 25 ms.
    """
    waves = torch.atleast_2d(waves.float())  # one wave is a batch of one
    if waves.shape[1] < WINDOW:
        raise ValueError(f"fbank expects at least {WINDOW} samples (25 ms), got {waves.shape[1]}")
    window = torch.hann_window(WINDOW, periodic=False, device=waves.device)  # (400,)
    triangles = mel_triangles(mels, waves.device)  # (257, F)
    # On a CPU some 400 frames at a time stay in the cache: twice as fast as the whole batch.
    rows = max(1, 400 // int(frames_of(waves.shape[1])))
    # Evaluation may sit in bfloat16 autocast, whose three digits would change the features.
    with torch.autocast(waves.device.type, enabled=False):
        return torch.cat([_fbank(part, window, triangles) for part in
                          waves.split(rows if waves.device.type == "cpu" else len(waves))])


def _fbank(waves, window, triangles):
    frames = waves.unfold(1, WINDOW, HOP)  # (B, T, 400)
    frames = frames - frames.mean(2, keepdim=True)  # each frame's own offset, as kaldi does
    # Pre-emphasis. The first sample is compared with itself, but the window is zero there.
    frames = F.pad(frames[..., 1:] - 0.97 * frames[..., :-1], (1, 0))
    spectrum = torch.fft.rfft(frames * window, n=FFT)  # (B, T, 257)
    power = spectrum.real.square() + spectrum.imag.square()  # abs() would take a root in vain
    # The floor is kaldi's: silence is log(1.19e-7) = -15.9, and not minus infinity.
    return (power @ triangles).clamp_min(torch.finfo(torch.float32).eps).log()  # (B, T, F)


def features(batch, encoder):
    """Return the encoder's input (B, T, F), normalised as it asks, on the Batch's device.

    "audioset": frames behind a clip's end are zero before normalisation, as in AST. That is loud:
    silence is -15.9, and AudioSet's mean is -4.3. Models tuned with it expect it.
    "utterance": each clip's own mean per bin is removed, and with it a channel's constant colour.
    Floats of three axes were made before: inputs (B, T, F), or frozen outputs (B, 1, D) -> (B, D).
    Raises ValueError when a corpus of ready features has other bins than the model.
    """
    x = batch.x  # (B, samples) or (B, T, F)
    if x.ndim == 3 and x.is_floating_point():
        return x[:, 0] if x.shape[1] == 1 else x
    if x.ndim == 3:
        x = x.float() * 0.1  # int8 -> log-mel (B, T, F)
    else:
        x = fbank(x.float() / 32768, encoder.mels)  # (B, samples) -> (B, T, F)
        if encoder.normalise == "audioset":
            ends = (batch.lengths - WINDOW) // HOP + 1  # (B,) frames, as `frames_of`
            past = torch.arange(x.shape[1], device=x.device) >= ends[:, None]  # (B, T)
            x = x.masked_fill(past[:, :, None], 0.0)  # (B, T, 1): all bins of a frame
    if x.shape[2] != encoder.mels:
        raise ValueError(f"the model expects {encoder.mels} mel bins, the corpus has {x.shape[2]}")
    if encoder.normalise == "audioset":
        return (x - AUDIOSET_MEAN) / (2 * AUDIOSET_STD)
    return x - x.mean(1, keepdim=True)  # (B, 1, F): one mean a bin


# --------------------------------------------------------------------------------------------------
# 6. Augmentation of training batches; everything is drawn from torch's generator

SPEEDS = ((1, 1), (9, 10), (11, 10))  # x1, x0.9, x1.1


def augment_features(x, shift=0, spec_f=0, spec_t=0):
    """Training features (B, T, F): roll each clip by up to `shift` frames either way, as AST's
    recipe does; then hide one band of bins and one stretch of frames, each up to so wide
    (SpecAugment, 1904.08779). x is normalised, so the mask's 0 is near the mean."""
    transforms = import_torchaudio().transforms
    if shift:
        by = torch.randint(-shift, shift + 1, (len(x), 1), device=x.device)  # (B, 1)
        source = (torch.arange(x.shape[1], device=x.device) - by) % x.shape[1]  # (B, T)
        x = x.gather(1, source[:, :, None].expand_as(x))  # (B, T, 1) -> (B, T, F)
    if spec_f:  # torchaudio wants (B, F, T)
        hide = transforms.FrequencyMasking(min(spec_f, x.shape[2]), iid_masks=True)
        x = hide(x.transpose(1, 2)).transpose(1, 2)
    if spec_t:
        hide = transforms.TimeMasking(min(spec_t, x.shape[1]), iid_masks=True)
        x = hide(x.transpose(1, 2)).transpose(1, 2)
    return x


def augment_waves(batch, classes, frames, speeds=False, gain=0.0, noise="", rooms="", share=0.6,
                  snr=(0, 15)):
    """Give the waves (B, samples) of a training Batch speeds, levels, and noise or a room.

    speeds  play each clip at one of SPEEDS; a crop of `frames_at_speed` is then cut to `frames`
    gain    make each clip up to so many dB louder or quieter
    noise, rooms    nothing, "generated", or a Corpus of `open_sounds`
    share   of the clips that get noise or a room, half of them each if both are on
    snr     lowest and highest signal-to-noise ratio in dB
    """
    if not (speeds or gain or noise or rooms):
        return batch
    batch = replace(batch, x=batch.x.float())  # still int16's scale
    if speeds:
        batch = perturb_speed(batch, frames, classes)
    if gain:
        decibels = gain * (2 * torch.rand(len(batch.x), 1, device=batch.x.device) - 1)  # (B, 1)
        batch = replace(batch, x=batch.x * 10 ** (decibels / 20))
    return distort(batch, share, noise, rooms, snr) if noise or rooms else batch


def frames_at_speed(frames):
    """Frames of a crop that still holds `frames` when it is played x1.1."""
    return math.ceil(1.1 * samples_of(frames) / HOP)


def perturb_speed(batch, frames, classes):
    """Play each clip at one of SPEEDS. Pitch and formants move with the speed, which makes another
    speaker: label + classes * k."""
    resample, samples = import_torchaudio().functional.resample, samples_of(frames)
    x, lengths = batch.x.new_empty(len(batch.x), samples), batch.lengths.clone()
    drawn = torch.randint(len(SPEEDS), lengths.shape, device=x.device)  # (B,)
    for k, (fast, slow) in enumerate(SPEEDS):
        rows = (drawn == k).nonzero()[:, 0]
        if len(rows):  # as if recorded at `fast` and kept at `slow`: fewer samples, higher tones
            x[rows] = resample(batch.x[rows], fast, slow)[:, :samples]
            lengths[rows] = (lengths[rows] * slow // fast).clamp(max=samples)
    return Batch(x, lengths, batch.labels + classes * drawn, batch.clips)


def distort(batch, share, noise, rooms, snr):
    """Give a share of the clips noise or a room (see `augment_waves`)."""
    x, count = batch.x, len(batch.x)
    changed = torch.randperm(count)[: round(share * count)].to(x.device)
    half = len(changed) // (2 if noise else 1) if rooms else 0
    indoors, noisy = changed[:half], changed[half:]
    y = x.clone()  # x stays whole: babble is made of it
    if len(indoors):
        responses = (made_rooms(half, x.device) if rooms == "generated" else
                     draw_sounds(rooms, half, 100, False).to(x.device))  # about a second
        y[indoors] = reverberate(x[indoors], responses)
    if noise and len(noisy):
        sounds = (made_noise(x, noisy) if noise == "generated" else
                  draw_sounds(noise, len(noisy), frames_of(x.shape[1]), True).to(x.device))
        low, high = snr
        ratios = low + (high - low) * torch.rand(len(noisy), device=x.device)  # (noisy,) dB
        add_noise = import_torchaudio().functional.add_noise
        y[noisy] = add_noise(x[noisy], sounds, ratios, batch.lengths[noisy])
    return replace(batch, x=y)


def reverberate(x, responses):
    """Put waves (B, n) each in a room: convolve them with impulse responses (B, m). The direct
    path, a response's highest peak, stays where the wave was; the energy is kept."""
    wet = import_torchaudio().functional.fftconvolve(x, responses)  # (B, n + m - 1)
    direct = responses.abs().argmax(1, keepdim=True)  # (B, 1)
    wet = wet.gather(1, direct + torch.arange(x.shape[1], device=x.device))  # (B, n)
    return wet * x.norm(dim=1, keepdim=True) / wet.norm(dim=1, keepdim=True).clamp_min(1e-6)


def made_rooms(count, device):
    """(count, m) impulse responses: a direct path of 1, then noise, 0 to 10 dB weaker as a whole,
    that dies by 60 dB in 0.2 to 0.8 s."""
    seconds = 0.2 + 0.6 * torch.rand(count, 1, device=device)
    weaker = 10 * torch.rand(count, 1, device=device)
    instants = torch.arange(RATE // 2, device=device) / RATE  # (m,)
    tail = torch.randn(count, len(instants), device=device) * 10 ** (-3 * instants / seconds)
    tail = tail / tail.norm(dim=1, keepdim=True) / 10 ** (weaker / 20)
    tail[:, 0] = 1
    return tail


def made_noise(x, rows):
    """(rows, n) noise for some clips of x (B, n): by a coin's toss babble, up to four other clips
    of the batch at once, or a hiss whose power falls by 0 to 6 dB an octave."""
    babble = sum(x[(rows + k) % len(x)] for k in range(1, min(5, len(x))))  # (rows, n)
    spectrum = torch.fft.rfft(torch.randn(len(rows), x.shape[1], device=x.device))
    slope, coin = torch.rand(2, len(rows), 1, device=x.device)  # (rows, 1) each
    bins = torch.arange(1, spectrum.shape[1] + 1, device=x.device)  # from 1: 0 has no power of -a
    hiss = torch.fft.irfft(spectrum * bins**-slope, x.shape[1])  # (rows, n)
    return torch.where(coin < 0.5, babble, hiss)


def draw_sounds(sounds, count, frames, anywhere):
    """(count, samples) of `open_sounds`: from anywhere and repeated, or once from the start."""
    rng = np.random.default_rng(int(torch.randint(2**31, ())))
    clips = rng.integers(len(sounds.ids), size=count)
    return load_batch(sounds, clips, frames, rng if anywhere else None, repeat=anywhere).x.float()


# --------------------------------------------------------------------------------------------------
# 7. Built-in corpora: synthetic, deterministic, offline

VERSION = 1  # raise it when a generator changes: packed files are made anew
TIME = np.arange(RATE) / RATE  # one second


def band_noise(rng, low, high, n=RATE):
    """White noise between two frequencies (Hz), by zeroing the rest of its spectrum."""
    spectrum, hertz = np.fft.rfft(rng.standard_normal(n)), np.fft.rfftfreq(n, 1 / RATE)
    return np.fft.irfft(spectrum * ((hertz > low) & (hertz < high)), n)


def tone(hertz):
    """A sine whose frequency (Hz, a number or one per sample) is integrated to its phase."""
    return np.sin(2 * np.pi * np.cumsum(np.broadcast_to(hertz, TIME.shape)) / RATE)


def log_uniform(rng, low, high):
    return math.exp(rng.uniform(math.log(low), math.log(high)))


def strike(at, decay):
    """An envelope that starts at second `at` and falls by e every `decay` seconds."""
    return np.where(TIME >= at, np.exp(-np.maximum(TIME - at, 0) / decay), 0)


def pulse_times(rng, rate, jitter=0.0):
    """Instants (s) of a pulse train of `rate` a second."""
    gaps = (1 + jitter * rng.standard_normal(int(rate) + 2)) / rate
    times = rng.uniform(0, 1 / rate) + np.cumsum(np.abs(gaps))
    return times[times < 1]


def clicks(times, length=0.004):
    """One short burst at each instant."""
    wave, n = np.zeros(RATE), int(length * RATE)
    wave[(np.asarray(times) * RATE).astype(int)] = 1
    return np.convolve(wave, np.sin(np.arange(n) * 1.3) * np.hanning(n))[:RATE]


def gate(rng, half):
    """1 for about a fifth of a second within a half of the clip."""
    start = half + rng.uniform(0.02, 0.25)
    return (TIME > start) & (TIME < start + rng.uniform(0.12, 0.24))


def burst(rng, half):
    low = log_uniform(rng, 50, 3000)
    return band_noise(rng, low, low * rng.uniform(1.5, 3)) * gate(rng, half)


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
    "clicks-slow": lambda r: clicks(pulse_times(r, r.uniform(4, 7))),
    "clicks-fast": lambda r: clicks(pulse_times(r, r.uniform(18, 30))),
    "swell": lambda r: band_noise(r, 200, 4000) * TIME ** r.uniform(1, 3),
    "fade": lambda r: band_noise(r, 200, 4000) * (1 - TIME) ** r.uniform(1, 3),
    "burst-early": lambda r: burst(r, 0.0),
    "burst-late": lambda r: burst(r, 0.5),
    "beep-early": lambda r: tone(log_uniform(r, 200, 6000)) * gate(r, 0.0),
    "beep-late": lambda r: tone(log_uniform(r, 200, 6000)) * gate(r, 0.5),
}


def bell(rng, at, decay=(0.1, 0.3)):
    """Inharmonic partials that die away."""
    pitch = log_uniform(rng, 500, 2000)
    return sum(tone(pitch * ratio) * strike(at, rng.uniform(*decay) / ratio**0.5)
               for ratio in (1, 2.76, 5.4) if pitch * ratio < 7500)


def cricket(rng):
    chirps = sum(((TIME > start) & (TIME < start + 0.12)).astype(float)
                 for start in pulse_times(rng, rng.uniform(2, 4)))
    return tone(rng.uniform(3500, 5500)) * chirps * np.clip(tone(rng.uniform(35, 60)), 0, 1)


def ringing(wave, hertz, decay, samples):
    """Every pulse of `wave` starts a tone of `hertz` that falls by e in 1 / `decay` seconds."""
    ring = np.arange(samples) / RATE
    return np.convolve(wave, np.exp(-ring * decay) * np.sin(2 * np.pi * hertz * ring))[:RATE]


def rain(rng):
    wave = np.zeros(RATE)
    drops = rng.integers(0, RATE, rng.integers(40, 90))
    wave[drops] = rng.exponential(1, len(drops))
    return ringing(wave, rng.uniform(1500, 3500), 400, 300)


def drum(rng, at):
    pitch = rng.uniform(60, 110) * (1 + 2 * strike(at, 0.03))
    return tone(pitch) * strike(at, rng.uniform(0.08, 0.2))


def string(rng):
    """A plucked string: noise in a loop that loses its highs at every turn (Karplus-Strong)."""
    period = int(RATE / log_uniform(rng, 110, 440))
    turns = [rng.uniform(-1, 1, period)]
    while len(turns) * period < RATE:
        turns.append(0.498 * (turns[-1] + np.roll(turns[-1], 1)))
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
    start, gaps = rng.uniform(0.01, 0.1), gaps if faster else gaps[::-1]
    return clicks(start + np.cumsum(gaps)[:-1] * 0.95, 0.008)


# Target classes, other generators: what the source classes teach must be adapted, not recalled. A
# name with ">" has a twin of the same parts in another order: a model without order guesses there.
TARGET = {
    "bell": lambda r: bell(r, r.uniform(0, 0.4)),
    "cricket": cricket,
    "engine": lambda r: ringing(clicks(pulse_times(r, r.uniform(22, 40), 0.1)), r.uniform(120, 300),
                                90, 800),
    "rain": rain,
    "drum": lambda r: drum(r, r.uniform(0, 0.5)),
    "string": string,
    "ping>thud": lambda r: two(r, lambda at: bell(r, at, (0.05, 0.1)), lambda at: drum(r, at)),
    "thud>ping": lambda r: two(r, lambda at: drum(r, at), lambda at: bell(r, at, (0.05, 0.1))),
    "high>low": lambda r: two(r, note(r, 2500, 4500), note(r, 300, 600)),
    "low>high": lambda r: two(r, note(r, 300, 600), note(r, 2500, 4500)),
    "slow>fast": lambda r: knocks(r, True),
    "fast>slow": lambda r: knocks(r, False),
}
SOUNDS = {"sounds": TARGET, "sounds-source": SOURCE}
COUNTS = {"train": 80, "valid": 20, "test": 40}  # clips a class


def sound_rows(name, root):
    """Clips are named before they are made: the name is the seed of the wave."""
    return [(f"{name}/{kind}/{split}-{n}", kind, split) for kind in SOUNDS[name]
            for split, count in COUNTS.items() for n in range(count)]


def rng_of(name):
    """Seeded by a hash of the name: the same on every machine, in any order, one at a time."""
    return np.random.default_rng(list(hashlib.sha256(name.encode()).digest()))


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

# What everybody says. Formants in Hz of a tract of middle length; loudness of pulses and of noise.
PHONEMES = np.array([
    (730, 1090, 2440, 1.0, 0.00),  # a    vowels: F1 rises as the jaw opens, F2 as the tongue
    (270, 2290, 3010, 0.7, 0.00),  # i    comes forward
    (300, 870, 2240, 0.7, 0.00),   # u
    (530, 1840, 2480, 0.9, 0.00),  # e
    (570, 840, 2410, 0.9, 0.00),   # o
    (490, 1350, 1690, 0.8, 0.00),  # er
    (250, 1100, 2200, 0.3, 0.00),  # m
    (300, 1700, 2600, 0.3, 0.15),  # v    voice and noise at once
    (5000, 6200, 7300, 0.0, 0.5),  # s    hisses: the tract in front of the gap is short
    (2600, 3700, 5200, 0.0, 0.5),  # sh
    (500, 1500, 2500, 0.0, 0.3),   # h    the whole tract, whispered
    (500, 1500, 2500, 0.0, 0.0)])  # a pause
VOICES = {"train": (120, 15), "valid": (20, 15), "test": (20, 15)}  # speakers, utterances of each
STEP = 256  # 16 ms: in so short a time a mouth stands still
BINS = np.arange(STEP + 1) * RATE / (2 * STEP)  # (bins,) Hz
FADE = np.hanning(2 * STEP + 1)[:-1] ** 0.5  # applied twice it is Hann's, whose halves add up to 1


def voice_rows(root):
    """Clips `voices/SPEAKER/N`; nobody is in two splits, so a test is of strangers."""
    return [(f"voices/{split}-{who}/{n}", f"{split}-{who}", split)
            for split, (speakers, each) in VOICES.items() for who in range(speakers)
            for n in range(each)]


def voice_trials(rows):
    """{"valid": [(label, id, id), ...], "test": ...}: as many of one speaker as of two."""
    return {split: make_trials([row[:2] for row in rows if row[2] == split], rng_of(split))
            for split in ("valid", "test")}


def speaker(name):
    """What is the same in all that one person says."""
    rng = rng_of(name)
    return types.SimpleNamespace(
        pitch=log_uniform(rng, 80, 280),  # Hz, from a deep man's to a child's
        melody=rng.uniform(0.1, 0.4),  # how far the pitch wanders, in octaves
        jitter=rng.uniform(0.0, 0.03),  # its unsteadiness, in octaves
        tilt=rng.uniform(3, 12),  # dB an octave: folds that close slowly make duller pulses
        breath=rng.uniform(0.02, 0.4),  # air that escapes between the pulses
        tract=rng.uniform(0.86, 1.18),  # scales all formants: a shorter tube rings higher
        upper=rng.uniform((3100, 4100), (3900, 5200)))  # F4, F5: hardly move with the phoneme


def sentence(rng, steps):
    """(steps, 5): rows of PHONEMES at random, each gliding into the next."""
    length = rng.integers(3, 13, steps)  # 48 to 192 ms each; more phonemes than there is time for
    said = np.repeat(PHONEMES[rng.integers(len(PHONEMES), size=steps)], length, axis=0)
    return (said[:steps] + said[1 : steps + 1] + said[2 : steps + 2]) / 3  # no mouth jumps


def spectra(wave):
    """((steps + 1) STEP,) -> (steps, bins): one spectrum every STEP samples, of twice as many."""
    frames = np.lib.stride_tricks.sliding_window_view(wave, 2 * STEP)[::STEP]  # (steps, 2 STEP)
    return np.fft.rfft(frames * FADE)


def source(rng, who, said):
    """(steps, bins): a pulse wherever the phase passes a whole number, and noise."""
    steps, n = len(said), (len(said) + 1) * STEP
    wander = np.interp(np.arange(steps) / 20, np.arange(steps // 20 + 2),
                       rng.standard_normal(steps // 20 + 2))  # another direction every 0.3 s
    pitch = who.pitch * 2 ** (who.melody * wander + who.jitter * rng.standard_normal(steps))
    pitch = np.interp(np.arange(n) / STEP, np.arange(steps), pitch)  # (n,) Hz
    pulses = np.diff(np.floor(np.cumsum(pitch) / RATE), prepend=0) * np.sqrt(RATE / pitch)
    dull = 10 ** (-who.tilt / 20 * np.log2(np.maximum(BINS, 200) / 200))  # (bins,)
    voiced, hiss = said[:, 3:4], said[:, 4:] + who.breath * said[:, 3:4]  # (steps, 1) each
    return voiced * dull * spectra(pulses) + hiss * spectra(rng.standard_normal(n))


def resonances(who, said):
    """(steps, bins): how strongly the tract sounds; higher formants are wider."""
    upper = np.broadcast_to(who.upper, (len(said), 2))
    peaks = who.tract * np.concatenate([said[:, :3], upper], 1)[:, :, None]  # (steps, 5, 1) Hz
    return np.sqrt((1 / (1 + ((BINS - peaks) / (40 + 0.04 * peaks)) ** 2)).sum(1))


def colour(rng):
    """(bins,): a random smooth filter, some 3 dB up and down, as of a microphone or telephone."""
    place = np.log1p(BINS / 700) / np.log1p(BINS[-1] / 700)  # (bins,) 0 to 1, as mel does
    waves = np.cos(np.pi * np.arange(1, 7)[:, None] * place)  # (6, bins)
    return 10 ** (4 / 20 * rng.standard_normal(6) @ waves / 6**0.5)


def voice(clip):
    """The wave of one clip of `voices`: a speaker says something, through a channel."""
    rng, who = rng_of(clip), speaker(clip.rpartition("/")[0])
    steps = int(rng.choice([125, 156, 187]))  # 2, 2.5 or 3 s: equal lengths share a batch
    said = sentence(rng, steps)
    heard = source(rng, who, said) * resonances(who, said) * colour(rng)  # (steps, bins)
    hum = spectra(rng.standard_normal((steps + 1) * STEP)) * colour(rng)
    heard += hum * np.abs(heard).std() / np.abs(hum).std() / 10 ** (rng.uniform(15, 35) / 20)
    frames = np.fft.irfft(heard) * FADE  # (steps, 2 STEP)
    wave = np.concatenate([frames[:, :STEP].ravel(), np.zeros(STEP)])
    wave[STEP:] += frames[:, STEP:].ravel()  # the halves overlap
    return wave / np.abs(wave).max() * rng.uniform(0.5, 0.9)


# --------------------------------------------------------------------------------------------------
# 8. Corpora: one function each that lists its clips as (path below the root, class, split)


def folder_rows(root):
    """One folder a class (or speaker); splits are drawn by a seed, "any" says so."""
    return [(clip, clip.split("/")[0], "any") for clip in find_audio(root) if "/" in clip]


def fsdd_rows(root):
    """Free Spoken Digit Dataset, `recordings/{digit}_{speaker}_{index}.wav`; index 0-4 tests.

    That is its authors' split: the same six speakers train and test. "train*" lends a tenth to
    validation.
    """
    rows = []
    for path in sorted((root / "recordings").glob("*.wav")):
        digit, _, index = [*path.stem.split("_"), "", ""][:3]
        if path.stem.count("_") != 2 or not index.isdecimal():
            raise ValueError(f"{path}: expected a name such as 7_jackson_32.wav")
        rows.append((f"recordings/{path.name}", digit, "test" if int(index) < 5 else "train*"))
    return rows


def table(path, *columns):
    """Rows of a CSV file as tuples of the named columns. ValueError for a file without them."""
    with open(path, newline="", encoding="utf-8-sig") as file:  # -sig: Excel's first three bytes
        rows = list(csv.DictReader(file))
    wrong = [number for number, row in enumerate(rows, 2) if None in map(row.get, columns)]
    if wrong or not rows:
        raise ValueError(f"{path}, line {min(wrong, default=2)}: expected columns "
                         f"{', '.join(columns)}")
    return [tuple(row[column] for column in columns) for row in rows]


def esc50_rows(root):
    """Five folds: P1 trains on three, validates on one, tests on one."""
    return [(f"audio/{file}", name, fold) for file, name, fold in
            table(root / "meta/esc50.csv", "filename", "category", "fold")]


def urbansound8k_rows(root):
    """Ten folds; slices of one recording are in one fold, so the folds must stay whole."""
    return [(f"audio/fold{fold}/{file}", name, fold) for file, name, fold in
            table(root / "metadata/UrbanSound8K.csv", "slice_file_name", "class", "fold")]


def speechcommands_rows(root):
    """Version 2: a folder a word; what neither list names trains."""
    split = {clip: part for part in ("validation", "testing") for clip in
             (root / f"{part}_list.txt").read_text(encoding="utf-8").split()}
    clips = split.keys() | set(find_audio(root))  # with what a list names and is not there
    role = {"validation": "valid", "testing": "test", None: "train"}
    return [(clip, clip.split("/")[0], role[split.get(clip)]) for clip in sorted(clips)
            if clip.count("/") == 1 and not clip.startswith("_")]  # _background_noise_ is no word


def fluentspeech_rows(root):
    """Fluent Speech Commands: an intent is its action, object and location, 31 of them."""
    columns = ("path", "action", "object", "location")
    return [(path, "/".join(intent), split) for split in ("train", "valid", "test")
            for path, *intent in table(root / f"data/{split}_data.csv", *columns)]


def voxceleb_rows(root):
    """All idXXXXX/VIDEO/NNNNN.wav or .m4a below the root, VoxCeleb1, VoxCeleb2 or both."""
    paths = ((clip, clip.split("/")[-3:]) for clip in find_audio(root))
    return [(clip, parts[0], "any") for clip, parts in paths
            if len(parts) == 3 and parts[0].startswith("id")]


def add_trials(source, root, rows, which):
    """Return rows, with what only the chosen list of trials names, and its trials, each clip by its
    path: VoxCeleb's lists say id10270/x6uYqmx31kE/00001.wav, wherever below the root the tree
    begins and whatever kind of file lies there."""
    if which not in source.lists:
        raise ValueError(f"--trials {which!r}: choose from {', '.join(source.lists)}")
    file = root / source.lists[which][0]
    if not file.is_file():
        raise ValueError(f"--root {root}: no {file.name} there.\n{how_to_get(source)}")
    trials = read_trials(file)
    short = lambda clip: "/".join(clip.rpartition(".")[0].split("/")[-3:])
    named = {short(clip): clip for _, *pair in trials for clip in pair}
    speakers = {clip.split("/")[0] for clip in named}
    there = {short(clip): clip for clip, speaker, _ in rows if speaker in speakers}
    rows = rows + [(clip, key.split("/")[0], "any") for key, clip in named.items()
                   if key not in there]
    path = named | there
    return rows, [(label, path[short(a)], path[short(b)]) for label, a, b in trials]


def read_trials(path):
    """Lines `label id_a id_b`, label 1 for the same speaker -> [(label, id_a, id_b)].

    VoxCeleb's format. Raises ValueError with the number of a line that has another one.
    """
    trials = []
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), 1):
        fields = line.split()
        if fields and (len(fields) != 3 or fields[0] not in ("0", "1")):
            raise ValueError(f"{path}, line {number}: expected `1 id_a id_b`, got {line!r}")
        if fields:
            trials.append((int(fields[0]), fields[1], fields[2]))
    if not trials:
        raise ValueError(f"{path}: no trials")
    return trials


def open_features(root):
    """Return a corpus of ready log-mel features: features.npy (frames, F) int8, one step 0.1 of a
    natural logarithm; index.csv, a row a clip: id, speaker, split, start, frames; trials.txt.
    Raises ValueError for another shape."""
    for name in ("features.npy", "index.csv"):
        if not (root / name).is_file():
            raise ValueError(f"--root {root}: no {name} there.\n{CORPORA['features'].tree}")
    store = np.load(root / "features.npy", mmap_mode="r")
    rows = table(root / "index.csv", "id", "speaker", "split", "start", "frames")
    ids, speakers, splits, start, length = (list(column) for column in zip(*rows))
    start, length = np.array(start, np.int64), np.array(length, np.int64)
    frames, unknown = (start + length).max(), set(splits) - {"train", "valid", "test"}
    if unknown:
        raise ValueError(f"{root / 'index.csv'}: unknown split {min(unknown)!r}: expected train, "
                         "valid or test")
    if store.dtype != np.int8 or store.ndim != 2 or frames > len(store):
        raise ValueError(f"{root}: features.npy is {store.dtype} {store.shape}, expected int8 "
                         f"(frames, mel bins) with at least the {frames} frames of index.csv")
    trials = read_trials(root / "trials.txt") if (root / "trials.txt").is_file() else []
    return Corpus("features", ids, speakers, np.array(splits, object), [], start, length, store,
                  {"test": trials} if trials else {})


@dataclass
class Source:
    """What CORPORA says about one corpus. Split "any": drawn for this clip; "train*": a tenth of
    these validates; "1", "2", ...: a fold."""

    rows: object  # root -> [(clip, class, split)]
    tree: str = ""  # how the root must look; empty: built in
    read: object = None  # clip -> wave, for built-in corpora
    trials: object = None  # rows -> {"valid": [...], "test": [...]}
    lists: dict = field(default_factory=dict)  # --trials -> (file of the list, trials in it)
    folds: int = 0  # test folds 1..folds; 0: one split
    expect: dict = field(default_factory=dict)  # split as listed, or "all" -> official clips
    address: str = ""  # of its archive, or of the folder of its lists; empty: no plain download
    sha256: str = ""  # of the archive; empty: none is published with us
    ask: str = ""  # where to get what is not downloaded
    recipe: dict = field(default_factory=dict)  # P1, section 3.1, or ours: settings of train.py


VOXCELEB = "https://www.robots.ox.ac.uk/~vgg/data/voxceleb/"
CORPORA = {
    "sounds": Source(functools.partial(sound_rows, "sounds"), read=sound,
                     recipe=dict(frames=100, epochs=6)),
    "sounds-source": Source(functools.partial(sound_rows, "sounds-source"), read=sound,
                     recipe=dict(frames=100, epochs=7)),
    "voices": Source(voice_rows, read=voice, trials=voice_trials,
                     recipe=dict(frames=150, epochs=6, batch_size=32)),
    "folder": Source(folder_rows, "A folder per class or speaker: ROOT/dog/1.wav, ROOT/cat/2.wav"),
    "fsdd": Source(
        fsdd_rows, "ROOT/recordings/7_jackson_32.wav, ... (3,000 WAV)",
        expect={"train*": 2700, "test": 300}, address="https://github.com/Jakobovski/"
        "free-spoken-digit-dataset/archive/refs/heads/master.zip",
        recipe=dict(frames=64, epochs=40, spec_f=16, spec_t=8, shift=6, gain=10.0)),
    "esc50": Source(
        esc50_rows, "ROOT/meta/esc50.csv, ROOT/audio/1-100032-A-0.wav, ... (2,000 WAV)", folds=5,
        expect={str(fold): 400 for fold in range(1, 6)},
        address="https://github.com/karolpiczak/ESC-50/archive/master.zip",
        recipe=dict(frames=500, epochs=50, spec_f=24, spec_t=80)),
    "urbansound8k": Source(
        urbansound8k_rows, "ROOT/metadata/UrbanSound8K.csv, ROOT/audio/fold1/101415-3-0-2.wav, ... "
        "(8,732 WAV)", folds=10, expect={"all": 8732},
        address="https://zenodo.org/record/1203745/files/UrbanSound8K.tar.gz",
        recipe=dict(frames=400, epochs=30, spec_f=24, spec_t=80)),
    "speechcommands": Source(
        speechcommands_rows, "ROOT/validation_list.txt, ROOT/testing_list.txt, "
        "ROOT/bed/00176480_nohash_0.wav, ... (version 2, 105,829 WAV)",
        expect={"train": 84843, "valid": 9981, "test": 11005},
        address="http://download.tensorflow.org/data/speech_commands_v0.02.tar.gz",
        sha256="af14739ee7dc311471de98f5f9d2c9191b18aedfe957f4a6ff791c709868ff58",
        recipe=dict(frames=100, epochs=75, batch_size=128)),
    "fluentspeech": Source(
        fluentspeech_rows, "ROOT/data/train_data.csv, valid_data.csv, test_data.csv, "
        "ROOT/wavs/speakers/SPEAKER/CLIP.wav, ... (30,043 WAV)",
        expect={"train": 23132, "valid": 3118, "test": 3793},
        ask="Ask for it by the form of its publisher, Fluent.ai; no direct link is left.",
        recipe=dict(frames=400, epochs=75)),
    "voxceleb": Source(
        voxceleb_rows, "ROOT/veri_test2.txt, list_test_all2.txt, list_test_hard2.txt, and anywhere "
        "below ROOT\nid10270/x6uYqmx31kE/00001.wav, ... (VoxCeleb1), "
        "id00012/21Uxsk56VDQ/00001.m4a, ... (VoxCeleb2)",
        lists={"o": ("veri_test2.txt", 37611), "e": ("list_test_all2.txt", 579818),
               "h": ("list_test_hard2.txt", 550894)}, address=VOXCELEB + "meta/",
        ask=f"Ask for the audio by the form at {VOXCELEB}.",
        recipe=dict(frames=200)),
    "features": Source(None, "ROOT/features.npy (frames, mel bins) int8, index.csv, trials.txt"),
}


# --------------------------------------------------------------------------------------------------
# 9. Getting a corpus: download, and unpacking that stays in its folder


def download(address, path, sha256=""):
    """Bring `address` to `path`, unless it is there; return the path. Raises ValueError with a
    sentence: no network, a lost connection, another checksum."""
    path = Path(path)
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        try:  # to a temporary name, then renamed
            torch.hub.download_url_to_file(address, str(path), hash_prefix=sha256 or None)
        except Exception as error:  # of the network, of HTTP, of the checksum
            raise ValueError(f"{address} could not be downloaded ({error}). If it stays so, fetch "
                             f"it by hand and save it as {path}") from error
    return path


def download_corpus(name, root, cache="cache"):
    """--download: bring the archive of a corpus into an empty or new `root`, or its lists into any.

    The archive waits in `cache` and is deleted once it is unpacked. A root that holds something is
    left as it is, so the command can be repeated. Raises ValueError where there is no download.
    """
    source = find_source(name)
    if not source.address:
        raise ValueError(f"--download: {name} has none. {how_to_get(source)}")
    if not root:
        raise ValueError(f"--download needs --root, the folder to put {name} into")
    root = Path(root)
    for file, _ in source.lists.values():
        download(source.address + file, root / file)
    if source.lists or (root.is_dir() and any(p.name != UNPACKING for p in root.iterdir())):
        return
    kind = ".zip" if source.address.endswith(".zip") else ".tar.gz"
    archive = download(source.address, Path(cache) / f"{name}{kind}", source.sha256)
    unpack(archive, root)
    archive.unlink()
    print(f"{name} is unpacked in {root}" + (
        "" if source.sha256 else "; no checksum is known: the clips are counted instead"))


def how_to_get(source):
    """How the root of a corpus must look, and where it comes from."""
    what = "the lists" if source.lists else "it, where ROOT is empty,"
    plain = f"--download brings {what} into ROOT." if source.address else ""
    return "\n".join(line for line in (source.tree, source.ask, plain) if line)


UNPACKING = ".unpacking"


def unpack(archive, folder):
    """Unpack a zip or tar.gz into `folder`, without the one folder that may hold all the rest.

    Nothing is written outside: tar's filter refuses such members, shutil leaves zip's out. `folder`
    fills by renaming, at the end: it never looks whole when it is not. Raises ValueError for a
    damaged archive.
    """
    archive, folder = Path(archive), Path(folder)
    part = folder / UNPACKING  # inside: `folder` may be a disk of its own
    shutil.rmtree(part, ignore_errors=True)
    try:
        if zipfile.is_zipfile(archive):
            shutil.unpack_archive(archive, part, "zip")
        else:
            with gzip.open(archive) as file:  # its checksum stands behind all that tar reads
                while file.read(2**20):
                    pass
            shutil.unpack_archive(archive, part, "gztar", filter="data")
        inside = [p for p in part.iterdir() if not p.name.startswith((".", "__"))]  # of a Mac
        top = inside[0] if len(inside) == 1 and inside[0].is_dir() else part
        for path in list(top.iterdir()):
            os.replace(path, folder / path.name)
    except (gzip.BadGzipFile, zipfile.BadZipFile, tarfile.TarError, zlib.error, EOFError) as error:
        archive.unlink()
        raise ValueError(f"{archive} is damaged ({error}) and was deleted: the same command gets "
                         "it again") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


# --------------------------------------------------------------------------------------------------
# 10. The check: `python data.py NAME ROOT` looks at a corpus before anyone trains on it


def find_gaps(source, rows, bad, which, trials):
    """Sentences on what the official corpus has and this one lacks, with the first names."""
    lost = sorted(clip for clip, reason in bad.items() if reason.endswith(MISSING))
    here, said = Counter(split for clip, _, split in rows), []
    here.subtract(split for clip, _, split in rows if clip in set(lost))
    total, found = sum(source.expect.values()) or len(rows), len(rows) - len(lost)
    if lost or total != found:
        names = ", ".join(lost[:5]) + ", ..." * (len(lost) > 5)
        said.append(f"expected {total:,} clips, found {found:,}"
                    + f": missing {names}" * bool(lost))
    said += [f"{'fold' if split.isdigit() else 'split'} {split.rstrip('*')}: expected {count:,} "
             f"clips, found {here[split]:,}" for split, count in source.expect.items()
             if split != "all" and here[split] != count]
    if source.lists and trials != source.lists[which][1]:
        said.append(f"{source.lists[which][0]}: expected {source.lists[which][1]:,} trials, "
                    f"found {trials:,}")
    return said


def check(name, root, cache="cache", seed=0, trials="o"):
    """Print what a corpus holds and every fault by name; return the number of faults."""
    corpus = open_corpus(name, root, cache, seed, skip_bad=True, trials=trials, train=False)
    faults = [reason for reason in corpus.bad.values() if not reason.endswith(MISSING)]
    faults += corpus.gaps
    if CORPORA[name].rows and CORPORA[name].tree:
        describe_files(corpus, Path(root))
        faults += find_doubles(corpus)
    unit = 100 if corpus.mels else RATE  # frames or samples a second
    print(f"{name}: {len(corpus.ids):,} clips, {len(corpus.classes)} classes or training speakers")
    for split in sorted(set(corpus.splits)):
        clips = corpus.pick(split)
        seconds = corpus.length[clips] / unit
        counts = Counter(corpus.labels[clips].tolist()).values()
        print(f"  {split:7s} {len(clips):7,} clips  {min(counts)} to {max(counts)} a class  "
              f"{seconds.min():.2f} / {np.median(seconds):.2f} / {seconds.max():.2f} s shortest, "
              f"median, longest  {seconds.sum() / 3600:.2f} h")
    for split, pairs in corpus.trials.items():
        same = sum(label for label, _, _ in pairs)
        print(f"  {split} trials: {len(pairs):,}, {same:,} of one speaker")
    notes = [f"note: {note}" for note in corpus.notes if note not in corpus.gaps]
    for line in notes + [f"fault: {fault}" for fault in faults]:
        print(f"  {line}")
    print(f"  {len(faults)} faults" if faults else "  no fault found")
    return len(faults)


def describe_files(corpus, root):
    """Print the kinds of WAV, and the audio files that no list names."""
    kinds = Counter()
    for clip in corpus.ids:
        with contextlib.suppress(ValueError, OSError):  # no WAV, or packing has named it
            head = wav_header(root / clip)
            kinds[f"{head.rate} Hz, {head.channels} channel, {head.bits}-bit {head.kind}"] += 1
    for kind, count in kinds.most_common():
        print(f"{count:,} clips of {kind}")
    stray = sorted(set(find_audio(root)) - set(corpus.ids))
    if stray:
        print(f"{len(stray):,} audio files are in no list and not used, the first is {stray[0]}")


def find_doubles(corpus):
    """Sentences on clips of the same samples in different splits, which make a test look better
    than it is. Compared whole are only clips of one length with the same samples in the middle."""
    clip = lambda i: corpus.store[corpus.start[i] : corpus.start[i] + corpus.length[i]]
    first, doubles = {}, []
    for i in np.flatnonzero(corpus.length):
        middle = clip(i)[corpus.length[i] // 2 :][:64].tobytes()
        same = first.setdefault((corpus.length[i], middle), i)
        if corpus.splits[i] != corpus.splits[same] and np.array_equal(clip(i), clip(same)):
            doubles.append(f"{corpus.ids[i]} ({corpus.splits[i]}) is the same as "
                           f"{corpus.ids[same]} ({corpus.splits[same]})")
    return doubles


def main(argv=None):
    parser = argparse.ArgumentParser(description="Check a corpus: counts, durations, faults.")
    parser.add_argument("name", help=", ".join(CORPORA))
    parser.add_argument("root", nargs="?", help="its folder; built-in corpora need none")
    parser.add_argument("--cache", default="cache", help="folder for packed corpora")
    parser.add_argument("--seed", type=int, default=0, help="draws validation and few-shot clips")
    parser.add_argument("--trials", default="o", help="VoxCeleb's list of trials: o, e or h")
    parser.add_argument("--download", action="store_true", help="get it first, where that is free")
    args = parser.parse_args(argv)
    try:
        if args.download:
            download_corpus(args.name, args.root, args.cache)
        sys.exit(1 if check(args.name, args.root, args.cache, args.seed, args.trials) else 0)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
