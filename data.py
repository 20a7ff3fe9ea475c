"""Audio on disk -> packed corpus -> batches -> log-mel features, for every model of this project.

Sections 1 audio files, 2 folders and tables, 3 the packed corpus, 4 trials and splits, 5 batches,
         6 features and augmentation, 7 built-in corpora, 8 corpora, 9 the command line
Axes     B batch, T frames (25 ms every 10 ms), F mel bins, C classes or speakers.

The first use of a corpus decodes every clip once, to 16 kHz mono int16, into one packed file. From
then on a training segment is a slice of a memory map: no decoding, no worker processes. Features
are computed a batch at a time on the device that trains.

    corpus = open_corpus("fsdd", "recordings-of/fsdd")
    for batch in batches(corpus, corpus.pick("train"), 32, frames=100, seed=0):
        x = features(batch.to("cpu"), encoder)                     # (B, T, F) = (32, 100, 128)

To add a corpus write one entry in CORPORA (section 8): what lists its clips as (path, class,
split), and how its folder looks. `python data.py NAME ROOT` checks a corpus before training.
Does not: stream from the network, keep more than 16 bits or another rate, or balance classes.
"""

import argparse
import contextlib
import csv
import hashlib
import importlib
import io
import json
import math
import os
import posixpath
import re
import shutil
import struct
import subprocess
import sys
import tarfile
import tempfile
import types
import unicodedata
import zipfile
from collections import Counter
from dataclasses import dataclass, field, replace
from fractions import Fraction
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

try:
    import torchaudio
except (ImportError, OSError, RuntimeError):
    # Its compiled extension, which nothing here needs, refuses a torch that it was not built for:
    # a CPU-only one, or one for another CUDA version. An empty one takes its place.
    sys.modules["torchaudio._extension"] = types.SimpleNamespace(
        _IS_TORCHAUDIO_EXT_AVAILABLE=False, _IS_ALIGN_AVAILABLE=False, fail_if_no_align=lambda f: f)
    import torchaudio

RATE = 16_000  # samples a second, everywhere behind the packed file
HOP = 160  # 10 ms
WINDOW = 400  # 25 ms
FFT = 512  # the next power of two

# --------------------------------------------------------------------------------------------------
# 1. Audio files: plain WAV with numpy alone, the rest through torchaudio

# (format code, bytes of a sample) -> (its type, full scale): PCM has code 1, floats have 3.
SAMPLES = {(1, 1): ("u1", 2**7), (1, 2): ("<i2", 2**15), (1, 3): ("<i4", 2**31),
           (1, 4): ("<i4", 2**31), (3, 4): ("<f4", 1), (3, 8): ("<f8", 1)}
PLACEHOLDERS = range(2_000_000_000, 2**32)  # sizes, in bytes, of who writes a stream
NO_DECODER = "pip install torchcodec"  # in the sentence on a clip that waits for it
SILENCE = "digital silence"  # the remark on a clip without sound


class NotPlain(ValueError):
    """A file that is no plain WAV. `samples`: how many it announces in each channel, 0 if none."""

    def __init__(self, reason, samples=0):
        super().__init__(reason)
        self.samples = samples


def read_wav(path):
    """Return a WAV file of PCM or floats as float32 (channels, n) in [-1, 1], its samples a second
    and remarks on the file. Raise NotPlain for what this function is not sure of."""
    with open(path, "rb") as file:
        chunks, size = read_chunks(file)
        forms = [body for name, body in chunks if name == b"fmt " and len(body) >= 16]
        if len(forms) != 1:
            raise NotPlain(f"{len(forms)} whole `fmt ` chunks")
        code, channels, rate, _, block, bits = struct.unpack("<HHIIHH", forms[0][:16])
        if code == 0xFFFE:  # WAVE_FORMAT_EXTENSIBLE: the real code opens a GUID
            code = int.from_bytes(forms[0][24:26], "little")
        width = block // max(1, channels)  # bytes; 24 bits may lie on top of 4, as 20 do of 3
        fits = block == channels * width > 0 and (bits > 8) == (width > 1) and bits <= 8 * width
        there = os.fstat(file.fileno()).st_size - file.tell()
        if there < size:
            raise ValueError(f"truncated: {size} bytes of sound announced, {there} there")
        if (code, width) not in SAMPLES or not fits:
            raise NotPlain(f"format {code}, {bits} bits, {channels} channels in {block} bytes",
                           announced(chunks, size, code, block))
        raw = file.read(size - size % block)
        behind = file.read(size % block + 5)[-5:]
    remarks = []
    # Another chunk may follow, whose name is four letters, behind a zero if the size is odd.
    known = re.search(rb"[ -~]{4}", behind) and b"data" not in behind
    if there - size > 0.01 * size and not known:
        remarks.append("sound behind the length that the header gives (left out)")
    if width == 3:  # put the three bytes on top of an empty lowest byte: 32 bits
        raw = np.pad(np.frombuffer(raw, "u1").reshape(-1, 3), ((0, 0), (1, 0))).tobytes()
    kind, top = SAMPLES[code, width]
    wave = np.frombuffer(raw, kind).astype(np.float32)
    if width == 1:
        wave -= 128  # bytes are unsigned
    wave = (wave / top).reshape(-1, channels).T  # (n * channels,) alternate -> (channels, n)
    return wave, rate, remarks


def read_chunks(file):
    """Read a RIFF up to its sound; return [(name, body)] of the chunks before it, and the sound's
    size in bytes. A RIFF is a row of chunks: 4 letters, little-endian size, body padded to even."""
    riff = file.read(12)
    if riff[:4] == b"RIFX":
        raise ValueError("big-endian, which FFmpeg takes for noise; convert it: sox FILE NEW.wav")
    if riff[:4] != b"RIFF" or riff[8:] != b"WAVE":
        raise NotPlain(f"it starts with {riff!r}" if riff else "the file is empty")
    chunks = []
    while True:
        head = file.read(8)
        size = int.from_bytes(head[4:], "little")
        if head[:4] == b"data":
            break
        if len(head) < 8:
            raise NotPlain("it has no `data` chunk")
        chunks.append((head[:4], file.read(size + size % 2)))
    # Who writes a stream does not know the size yet, and puts 0 or a huge number there.
    start = file.tell()
    there = os.fstat(file.fileno()).st_size - start
    whole = int.from_bytes(riff[4:8], "little")
    if size == 0 and (whole + 8 <= start or whole in PLACEHOLDERS):
        size = there
    elif there < size and (size in PLACEHOLDERS or size - there <= 0.01 * size):
        size = there
    return chunks, size


def announced(chunks, size, code, block):
    """Samples in each channel of a compressed WAV by its own header, 0 if it does not say."""
    chunks = dict(chunks)
    fact = int.from_bytes(chunks.get(b"fact", b"")[:4], "little")
    each = int.from_bytes(chunks[b"fmt "][18:20], "little")  # samples in a block of ADPCM
    if code in (2, 0x11) and block:
        count = size // block * each
        if 0 < fact <= count:
            count = fact  # the last block may be filled up
        return count
    return 0 if fact in PLACEHOLDERS else fact


def load_audio(path):
    """Return any recording as float32 (channels, n), in [-1, 1] as a rule, its samples a second and
    remarks on the file. Raise ValueError with the reason, without the file's name."""
    try:
        return read_wav(path)
    except NotPlain as other:
        reason = str(other)
        samples = other.samples
    except OSError as error:
        raise ValueError(error.strerror or str(error)) from error  # No such file or directory
    try:
        wave, rate = torchaudio.load(str(path))
    except Exception as error:  # of FFmpeg, torchcodec, older versions: they share no class
        try:
            importlib.import_module("torchcodec")
        except (ImportError, OSError, RuntimeError):
            raise ValueError(f"no plain WAV ({reason}); if it is sound, it needs FFmpeg and "
                             f"torchcodec ({NO_DECODER})") from error
        said = " ".join(str(error).split())
        raise ValueError(f"no plain WAV ({reason}), damaged or no sound: {said:.200}") from error
    if wave.shape[1] < 0.9 * samples:  # torchcodec 0.17 loses most of ADPCM without a word
        return convert(path, f"only {wave.shape[1]} of {samples} samples were decoded; convert it")
    return wave.numpy(), int(rate), []


def convert(path, reason):
    """Return a recording as `load_audio` does, as FFmpeg's own program reads it."""
    command = ["ffmpeg", "-v", "error", "-i", f"file:{path}", "-c:a", "pcm_s16le"]
    with tempfile.TemporaryDirectory() as folder:
        try:
            subprocess.run([*command, f"{folder}/copy.wav"], check=True, capture_output=True)
            return read_wav(f"{folder}/copy.wav")
        except (OSError, subprocess.CalledProcessError) as error:
            raise ValueError(f"{reason}: ffmpeg -i FILE -c:a pcm_s16le NEW.wav") from error


def inspect_wave(wave):
    """Return a recording (channels, n) as one channel (n,), the mean of all, and remarks on what
    it holds. What 16 bits would spoil is scaled; of channels that cancel the loudest stays."""
    high = float(wave.max())
    low = float(wave.min())
    if not math.isfinite(high - low):
        raise ValueError("its samples are not finite")
    peak = max(high, -low)
    remarks = []
    exact = peak >= 2**-8 or not np.any(wave * 2**15 % 1)  # 16 bits hold it
    dither = exact and peak <= 2**-14  # two steps of 16 bits
    if high == low or dither or peak < 2**-40:  # what keeps a studio's programs from zeros
        return wave[0], [SILENCE]
    if peak > 16:  # integers, kept as floats: of 16, 24 or 32 bits
        bits = 15
        while peak > 2.0**bits:
            bits += 8
        wave = wave / 2.0**bits
        remarks.append("floats at the scale of integers (scaled)")
    elif peak > 1 and np.mean(np.abs(wave) > 1) > 0.001:  # MP3 may overshoot here and there
        remarks.append("floats beyond [-1, 1] (clipped)")
    elif not exact:
        wave = wave * 2.0 ** math.floor(math.log2(0.5 / peak))
        remarks.append("sound too quiet for 16 bits (raised)")
    if len(wave) == 1:
        return wave[0], remarks
    mono = wave.mean(0)
    loudness = wave.std(1)  # (channels,)
    if mono.std() < 0.15 * loudness.max():
        mono = wave[loudness.argmax()]
        remarks.append("channels that cancel, or mostly empty ones (the loudest is taken)")
    return mono, remarks


def prepare(wave, rate, remarks=()):
    """Return a recording (channels, n) as float32 (samples,) at RATE, and remarks on it."""
    if not (len(wave) and 1_000 <= rate <= 768_000):
        raise ValueError(f"{len(wave)} channels, {rate} Hz: no sound")
    samples = math.ceil(wave.shape[1] * RATE / rate)  # resampling fails on an empty wave
    if samples < WINDOW:
        raise ValueError(f"{samples} samples at 16 kHz are shorter than one frame ({WINDOW})")
    wave, noticed = inspect_wave(wave)
    remarks = [*remarks, *noticed]
    if samples > 3600 * RATE:
        remarks.append("more than an hour")
    if rate != RATE:  # with a low-pass filter: dropping samples would fold high sounds down
        # It grows with the ratio's terms: 44,101 Hz would take 28 GB. Small ones are off by 1e-6.
        ratio = Fraction(RATE, rate).limit_denominator(1000)
        wave = torchaudio.functional.resample(
            torch.from_numpy(wave), ratio.denominator, ratio.numerator).numpy()
    return wave, remarks


def read_clip(path):
    """Read any recording; return (float32 (samples,) at RATE, remarks on it)."""
    return prepare(*load_audio(path))


def read_audio(path):
    """Read any recording: mono float32 (samples,) at RATE. Errors name the file."""
    try:
        return read_clip(path)[0]
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def to_int16(wave):
    """Floats in [-1, 1) -> int16. Clipped: resampling overshoots, which would wrap to a click."""
    return (np.clip(wave, -1, 32767 / 32768) * 32768).round().astype("<i2")


# --------------------------------------------------------------------------------------------------
# 2. Folders and tables: what lies there, and what is wrong with it

# Endings in the order in which they are taken, if a recording is there in several.
AUDIO = ("wav wave flac aif aiff aifc au snd caf w64 ogg oga opus mp3 mp2 m4a m4b mp4 aac wma webm "
         "amr 3gp ac3 mka wv").split()
PAPERS = ("txt csv tsv json xml md html pdf png jpg svg py sh lab textgrid zip gz ini db log "
          "jsonl npy pt packed readme license licence makefile").split()


@dataclass
class Findings:
    """What is wrong with a corpus, in sentences: `bad` stops a training, `notes` do not."""
    bad: list = field(default_factory=list)
    notes: list = field(default_factory=list)

    def stop(self, bad, skip_bad, summary):
        """If `bad` holds sentences, raise `summary` and the first; with `skip_bad` note them."""
        if bad and not skip_bad:
            raise ValueError(f"{summary}; --skip-bad goes on without them:\n  "
                             + "\n  ".join(bad[:5]))
        if bad:
            self.notes.append(f"{summary}, such as {bad[0]}")

    def error(self, sentence):
        """Return a ValueError: the sentence, then what has been found, which may be its reason."""
        return ValueError("\n  ".join([sentence, *self.bad[:5]]))

    def note(self, what, clips):
        """Note a fact about some clips, with their number and first names."""
        if clips:
            more = ", ..." if len(clips) > 5 else ""
            names = ", ".join(map(printable, clips[:5]))
            self.notes.append(f"{len(clips):,} {what}: {names}{more}")


def printable(name):
    """A file's name in one line; bytes that are no UTF-8 (of old Windows, say) become \\xfc."""
    name = name.replace("\n", r"\n")
    return name if name.isascii() else os.fsencode(name).decode("utf-8", "backslashreplace")


def same_name(clip):
    """What a clip is known by, however a list or a Mac, whose accents stand apart from their
    letters, writes it: ./dog\\1.wav is dog/1.wav."""
    return posixpath.normpath(unicodedata.normalize("NFC", clip).replace("\\", "/"))


def locate(root, clip):
    """Return the path of a clip, whose name on the disk may have its accents apart, or not."""
    if not clip.isascii() or "\\" in clip:
        known = same_name(clip)
        for name in (clip, known, unicodedata.normalize("NFD", known)):
            if os.path.exists(f"{root}/{name}"):
                return f"{root}/{name}"
    return f"{root}/{clip}"  # Path's slash takes longer than all the rest


def walk(root):
    """Yield (folder, its files) for each folder below `root` once, links to folders last; what is
    hidden is not there, and a folder that cannot be listed raises."""
    def refuse(error):
        raise error

    later = [str(root)]
    seen = set()
    while later:
        for folder, folders, files in os.walk(later.pop(0), onerror=refuse):
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in seen:
                folders.clear()  # a link led here before, or leads to a folder above
                continue
            seen.add((status.st_dev, status.st_ino))
            folders[:] = sorted(name for name in folders if name[0] != "." and name != "__MACOSX")
            paths = [os.path.join(folder, name) for name in folders]
            later += filter(os.path.islink, paths)  # os.walk does not follow them itself
            yield folder, [name for name in files if name[0] != "."]


def find_audio(root, found):
    """Return the paths of the recordings below a folder, relative to it, sorted."""
    clips = []
    others = []
    start = len(os.path.join(root, ""))
    for folder, files in walk(root):
        place = os.path.join(folder, "")[start:].replace(os.sep, "/")  # "", "dog/", ...
        for file in files:
            ending = file.rpartition(".")[2].lower()
            if ending in AUDIO and "." in file:
                clips.append(place + file)
            elif ending not in PAPERS:
                others.append(place + file)
    found.note("files have another ending or none; left out", sorted(others))
    return keep_one(sorted(clips), lambda clip: clip.rpartition(".")[0], found)


def keep_one(clips, key, found):
    """Of recordings with one key (1.wav and 1.m4a) keep one, by the order of AUDIO."""
    rank = lambda clip: AUDIO.index(clip.rpartition(".")[2].lower())
    kept = {}
    for clip in sorted(clips, key=rank):
        kept.setdefault(key(clip), clip)
    twice = sorted(set(clips) - set(kept.values()))
    found.note("recordings are there twice, with another ending or place; left out", twice)
    return sorted(kept.values())


def leave_out(clips, wanted, why, found):
    """Return the clips that are `wanted`, and note the others."""
    found.note(why, [clip for clip in clips if not wanted(clip)])
    return [clip for clip in clips if wanted(clip)]


def read_text(path):
    """Read a text file in UTF-8, in UTF-16 (Excel's "Unicode"), or else in Latin-1."""
    raw = Path(path).read_bytes()
    if raw[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return raw.decode("utf-16")
    try:
        return raw.decode("utf-8-sig")  # -sig: Excel's first three bytes
    except UnicodeDecodeError:
        return raw.decode("latin-1")


def read_table(path, found, *forms):
    """Rows of a CSV file as tuples: each form with the columns it names, as "audio/{filename}"."""
    text = read_text(path).replace("\0", "?")  # Python 3.10 reads no table with a zero in it
    gap = max(",;\t", key=text.partition("\n")[0].count)  # Excel writes all three
    csv.field_size_limit(2**31 - 1)  # a quote that is never closed
    lines = csv.reader(io.StringIO(text, newline=""), delimiter=gap, skipinitialspace=True)
    header = [cell.strip() for cell in next(lines, [])]
    used = re.findall(r"{(\w+)}", " ".join(forms))  # the columns that the forms name
    unclear = [name for name in used if header.count(name) != 1]
    if unclear:
        raise ValueError(f"{path}: expected one column {unclear[0]!r}; its columns are "
                         + ", ".join(header))
    before = len(found.bad)
    rows = []
    last = lines.line_num
    for cells in lines:
        where = f"{path}, line {last + 1}"
        if lines.line_num > last + 1:
            where += f" to {lines.line_num} (a quote)"
        last = lines.line_num
        while len(cells) > len(header) and not cells[-1]:
            cells.pop()  # a comma at the end
        row = dict(zip(header, map(str.strip, cells)))
        empty = [name for name in used if not row.get(name)]
        if not any(cells):
            continue
        if len(cells) != len(header):
            found.bad.append(f"{where}: {len(cells)} columns, the header has {len(header)}")
        elif empty:
            found.bad.append(f"{where}: {empty[0]!r} is empty")
        else:
            rows.append(tuple(form.format_map(row) for form in forms))
    if not rows and len(found.bad) == before:
        raise ValueError(f"{path}: no rows")
    return rows


# --------------------------------------------------------------------------------------------------
# 3. The packed corpus: every clip decoded once, side by side in one file


@dataclass
class Corpus:
    """Clips as columns; clip i is store[start[i] : start[i] + length[i]], int16 samples, of a
    memory map. With `trials` the corpus is one for verification, else for classes."""
    name: str
    ids: list
    labels: np.ndarray  # (clips,) index into classes; -1 for a speaker who is not in training
    splits: np.ndarray  # (clips,) "train", "valid", "test", "bad" or "unused"
    classes: list
    start: np.ndarray  # (clips,) int64, in samples
    length: np.ndarray  # (clips,) int64, 0 for a clip that cannot be used
    store: np.ndarray
    trials: dict = field(default_factory=dict)  # "valid", "test" -> [(label, index, index)]
    notes: list = field(default_factory=list)  # sentences on what was left out or changed
    bad: list = field(default_factory=list)  # sentences on what cannot be used

    def pick(self, split):
        """Return the indices of the clips of a split."""
        return np.flatnonzero(self.splits == split)

    def fingerprint(self):
        """Hash what training sees; of all samples ten thousand, for all would take minutes."""
        columns = [self.ids, *(c.tolist() for c in (self.splits, self.length, self.labels))]
        samples = self.store[:: math.ceil(len(self.store) / 10_000)].tobytes()
        return hashlib.sha256(json.dumps(columns).encode() + samples).hexdigest()


def open_corpus(name, root=None, *, cache="cache", seed=0, fold=None, few_shot=0, skip_bad=False,
                valid=True, trials="o", train=True):
    """Return the corpus `name` of CORPORA, packed, with splits and trials. The arguments are flags
    of train.py; with train=False only the test is used, so no speaker need be left to train."""
    source = CORPORA[name]
    root = Path(root or "ROOT")
    file, count = source.lists.get(trials, ("trials.txt", 0))
    found = Findings()

    # List: the clips that lie there, or that the corpus' own tables name.
    paths, labels, splits = list_clips(name, root, file, found)
    found.stop(found.bad, skip_bad, f"{name}: {len(found.bad)} rows are not clear")
    ids = [printable(path) for path in paths]

    # Pack: decode each clip once.
    length, store, copies = pack(name, root, paths, source.read, cache, skip_bad, found)
    splits[length == 0] = "bad"
    good = np.count_nonzero(length)
    if source.clips not in (0, good):
        found.notes.append(f"expected {source.clips:,} clips, found {good:,}")

    # Trials: pairs of clips, of one speaker or of two. A corpus without any is one of classes.
    pairs = {}
    if source.tree and (root / file).is_file():
        pairs["test"] = read_trials(root / file, ids, labels, length, count, skip_bad, found)
    if source.trials:
        for split in ("valid", "test"):
            pairs[split] = make_trials(np.flatnonzero(splits == split), labels, rng_of(split))

    # Splits: as the corpus says, else drawn by the seed ("any"). They are changed in place.
    drawn = set(labels[splits == "any"].tolist())
    make_splits(splits, labels, pairs, seed, fold or 1, valid, train)
    check_splits(name, splits, labels, pairs, train, found)
    if not pairs:
        check_classes(name, splits, labels, drawn, train, skip_bad, found)

    # Number: classes are those that train.
    classes = np.unique(labels[splits == "train"]).tolist()
    if few_shot:
        choose_few(splits, labels, classes, few_shot, seed, found)
    note_copies(copies, paths, labels, splits, found)
    index = {label: k for k, label in enumerate(classes)}
    numbers = np.array([index.get(label, -1) for label in labels])
    return Corpus(name, ids, numbers, splits, classes, np.cumsum(length) - length, length, store,
                  pairs, found.notes, found.bad)


def list_clips(name, root, file, found):
    """Return a corpus' clips, their labels and splits (clips,) each. Clips without a label, or in
    two rows, go into found.bad."""
    source = CORPORA[name]
    try:
        if source.lists:
            (root / file).stat()  # raises before the clips are packed, which takes hours
        rows = source.rows(root, found)
        if not rows:
            faults = [*found.notes, *found.bad[:5]]
            raise FileNotFoundError("; ".join([f"no clips of {name} below {root}", *faults]))
    except FileNotFoundError as error:
        tree = source.tree
        if source.address:
            tree += f"\n--download brings {source.address} into ROOT."
        raise ValueError(f"no corpus {name} in {root} ({error}). Name its folder (--root), which "
                         f"holds\n{tree}") from error
    first = {}
    for row in rows:
        before = first.setdefault(same_name(row[0]), row)
        if before is not row:
            clip, label, split = map(printable, row)
            found.bad.append(f"{clip}: in two rows, as {label} {split} and {' '.join(before[1:])}")
    clips, labels, splits = zip(*first.values())
    labels = [unicodedata.normalize("NFC", printable(label)) for label in labels]
    kinds = sorted(set(labels))
    spelled = Counter(label.strip().casefold() for label in kinds)
    found.note("classes differ by capitals or spaces alone",
               [label for label in kinds if spelled[label.strip().casefold()] > 1])
    found.note("names hold a new line or no UTF-8, here escaped",
               [clip for clip in clips if printable(clip) != clip])
    return list(clips), np.array(labels), np.array(splits, object)


def pack(name, root, clips, read, cache, skip_bad, found):
    """Decode clips once, into a file named by a hash of their names, sizes and times; return
    (length of each clip, memory map of samples, {copy: the clip it is of}). Without `skip_bad`, bad
    clips are read again, then raise. `read`: clip -> wave, of a built-in corpus."""
    digest = hashlib.sha256(b"index 3")
    for clip in clips:  # a million: one by one, not as one text
        stamp = VERSION
        if not read:
            with contextlib.suppress(OSError, ValueError):  # missing: reading it will say so
                status = os.stat(locate(root, clip))
                stamp = status.st_size, status.st_mtime_ns
        digest.update(f"{clip} {stamp}\n".encode("utf-8", "surrogateescape"))
    owner = "own"
    if not read:
        owner = hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:6]
    path = Path(cache) / f"{name}-{owner}.{digest.hexdigest()[:16]}.packed"

    def read_one(clip):
        return (read(clip), []) if read else read_clip(locate(root, clip))

    def readable(clip):
        with contextlib.suppress(ValueError, OSError, MemoryError):
            return read_one(clip)

    index = None
    with contextlib.suppress(OSError, ValueError):  # it is not there, or was cut
        index = read_index(path)
    lacked = index and NO_DECODER in str(index["bad"]) and importlib.util.find_spec("torchcodec")
    again = not skip_bad or lacked
    if not index or (again and any(map(readable, index["bad"]))):  # one can be read now
        write_pack(path, clips, read_one)
        index = read_index(path)
    bad = [f"{printable(clip)}: {reason}" for clip, reason in index["bad"].items()]
    found.bad += bad
    found.stop(bad, skip_bad and len(bad) < len(clips),
               f"{len(bad)} of {len(clips)} clips in {root} cannot be used")
    for remark, noticed in index["remarks"].items():
        found.note(f"clips hold {remark}", noticed)
    length = np.array(index["lengths"], np.int64)
    return length, np.memmap(path, "<i2", "r", shape=length.sum()), index["copies"]


def write_pack(path, clips, read):
    """Write the samples of all clips, an index in JSON and its size. The file is renamed at the
    end: its name stands for a whole file, also for another program."""
    name = path.name.partition(".")[0]
    lengths = []
    bad = {}  # clip -> reason
    remarks = {}  # remark -> clips
    first = {}  # hash of samples -> the first clip that holds them
    copies = {}  # clip -> that first one
    part = path.with_suffix(f".{os.getpid()}.part")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(part, "wb") as file:
            for clip in tqdm(clips, f"packing {name}", leave=False, disable=None):
                try:
                    wave, noticed = read(clip)
                except (ValueError, OSError, MemoryError) as error:
                    bad[clip] = str(error) or "too large for this machine's memory"
                    lengths.append(0)
                    continue
                lengths.append(len(wave))
                for remark in noticed:
                    remarks.setdefault(remark, []).append(clip)
                samples = to_int16(wave).tobytes()
                file.write(samples)  # a full disk is no clip's fault: it stops
                if SILENCE not in noticed:
                    original = first.setdefault(hashlib.sha256(samples).digest(), clip)
                    if original is not clip:
                        copies[clip] = original
            index = dict(lengths=lengths, bad=bad, remarks=remarks, copies=copies)
            text = json.dumps(index).encode()
            file.write(text + len(text).to_bytes(8, "little"))
        os.replace(part, path)
    except OSError as error:
        raise OSError(f"{part}: {error.strerror or error}") from error  # of a full disk
    finally:
        part.unlink(missing_ok=True)  # interrupted, it would lie there for good, and be large
    for old in set(path.parent.glob(f"{name}.*.packed")) - {path}:  # before the corpus changed
        with contextlib.suppress(OSError):  # Windows keeps a file that is in use
            old.unlink()


def read_index(path):
    """Return what stands at the end of a packed file: lengths, bad clips, remarks, copies."""
    with open(path, "rb") as file:
        file.seek(-8, os.SEEK_END)
        size = int.from_bytes(file.read(8), "little")
        file.seek(-8 - size, os.SEEK_END)
        return json.loads(file.read(size))


def open_sounds(folder, cache="cache", skip_bad=False):
    """Return a folder of noises or of rooms' responses, packed; nothing and "generated" stay."""
    if folder in ("", "generated"):
        return folder
    found = Findings()
    clips = find_audio(folder, found)
    if not clips:
        raise ValueError("; ".join([f"no recordings below {folder}", *found.notes]))
    length, store, _ = pack("extra", Path(folder), clips, None, cache, skip_bad, found)
    return loose_corpus("extra", clips, length, store, found)


def loose_corpus(name, ids, length, store, found):
    """Return clips without classes and splits as a Corpus."""
    none = np.zeros(len(ids), np.int64)
    return Corpus(name, ids, none, none, [], np.cumsum(length) - length, length, store,
                  notes=found.notes, bad=found.bad)


def corpus_of_waves(waves):
    """Return {name: (wave, samples a second)} as `corpus_of_files` does. A wave is an array
    (samples,) or (channels, samples), int16 or floats in [-1, 1]."""
    return corpus_in_memory(waves, lambda name: prepare(*check_wave(*waves[name])), Findings())


def check_wave(wave, rate):
    """Return an array as float32 (channels, n), and its rate; raise a sentence for another one."""
    wave = np.atleast_2d(wave)
    if wave.ndim != 2 or not wave.size:
        raise ValueError(f"expected an array (samples,) or (channels, samples), got {wave.shape}")
    if len(wave) > wave.shape[1]:
        raise ValueError(f"{len(wave)} channels of {wave.shape[1]} samples: expected (channels, "
                         "samples), so give wave.T")
    if not rate:
        raise ValueError("how many samples a second has it? Give its rate")
    if wave.dtype == np.int16:
        wave = wave / np.float32(2**15)
    if wave.dtype.kind != "f":
        raise ValueError(f"expected int16 or floats in [-1, 1], got {wave.dtype}")
    return wave.astype(np.float32), int(rate)


def corpus_of_files(paths):
    """Return the readable ones of audio files, and of those below folders, as a corpus in memory,
    without classes. `bad` holds a sentence on each of the others."""
    files = []
    found = Findings()
    for path in map(Path, paths):
        if path.is_dir():
            names = find_audio(path, found)
            files += [str(path / name) for name in names]
            if not names:
                found.notes.append(f"no recordings below {path}")
        else:
            files.append(str(path))
    if not files:
        raise ValueError("; ".join(["expected audio files or folders; found none", *found.notes]))
    return corpus_in_memory(files, read_clip, found)


def corpus_in_memory(names, read, found):
    """Read each name's (wave, remarks); return a Corpus of what can be read."""
    ids = []
    waves = []
    for name in names:
        try:
            wave, noticed = read(name)
        except ValueError as error:
            found.bad.append(f"not read: {printable(name)}: {error}")
            continue
        for remark in noticed:
            found.note(f"clip holds {remark}", [name])
        ids.append(printable(name))
        waves.append(to_int16(wave))
    length = np.array([len(wave) for wave in waves], np.int64)
    store = np.concatenate([np.zeros(0, np.int16), *waves])
    return loose_corpus("files", ids, length, store, found)


# --------------------------------------------------------------------------------------------------
# 4. Trials and splits: who trains, validates and tests; drawn by a seed where the corpus is silent


def read_trials(path, ids, labels, length, count, skip_bad, found):
    """Return the trials of a file, lines `label id_a id_b`, label 1 for the same speaker, as
    (label, index, index). Names count without their ending, in VoxCeleb's lists, of `count`
    trials, from the third last part on: there a clip may lie at any depth."""
    def key(clip):
        stem = re.sub(r"\.([A-Za-z]\w*|3gp)$", "", same_name(clip))  # rec.2024.1 has no ending
        return "/".join(stem.split("/")[-3:]) if count else stem

    index = {key(clip): i for i, clip in enumerate(ids) if length[i]}
    rows = []
    for line in read_text(path).split("\n"):
        if line.strip():
            rows.append(split_trial(line.strip(), lambda clip: key(clip) in index, path))
    if not rows:
        raise ValueError(f"{path}: no trials; without this file the folders are classes")
    lost = {clip for _, *pair in rows for clip in pair if key(clip) not in index}
    if lost and not skip_bad:
        raise ValueError(f"{path} names {len(lost)} clips that are missing or unusable, such as "
                         f"{min(lost)!r}; --skip-bad goes on without them")
    good = [(int(label), index[key(a)], index[key(b)]) for label, a, b in rows if not lost & {a, b}]
    if lost:
        found.bad += [f"{clip}: in the trials, but missing or unusable" for clip in sorted(lost)]
        found.notes.append(f"{len(rows) - len(good)} test trials of unusable clips are left out: "
                           "error rates are not comparable with the full list's")
    if count not in (0, len(rows)):
        found.notes.append(f"expected {count:,} trials in {path.name}, found {len(rows):,}")
    odd = [f"{ids[a]} {ids[b]}" for _, a, b in good if a == b]
    found.note("test trials are of a clip with itself", odd)
    odd = [f"{ids[a]} {ids[b]}" for same, a, b in good if same != (labels[a] == labels[b])]
    found.note("test trials contradict the folders", odd)
    return good


def split_trial(line, known, path):
    """Split `label id_a id_b`. Tabs part names with spaces, else what is known tells them apart."""
    words = line.split("\t")
    label, *words = map(str.strip, words) if len(words) == 3 else line.split()
    for cut in range(1, len(words)):
        pair = " ".join(words[:cut]), " ".join(words[cut:])
        if label in ("0", "1") and (len(words) == 2 or all(map(known, pair))):
            return label, *pair
    raise ValueError(f"{path}: expected `1 id_a id_b` (tabs between, if names hold spaces), got "
                     f"{line!r}")


def make_trials(clips, labels, rng):
    """Draw up to 2,000 target and as many non-target trials among clips, given by their index."""
    if len(clips) > 3000:  # a tenth of VoxCeleb2 would make six thousand million pairs
        clips = clips[rng.permutation(len(clips))[:3000]]
    _, speaker = np.unique(labels[clips], return_inverse=True)  # (clips,)
    i, j = np.tril_indices(len(clips), -1)  # (pairs,) each: every pair once
    same = speaker[i] == speaker[j]
    groups = np.flatnonzero(same), np.flatnonzero(~same)
    size = min(2000, *map(len, groups))  # as many of both, so neither error is measured worse
    drawn = np.concatenate([group[rng.permutation(len(group))[:size]] for group in groups])
    return np.stack([same[drawn], clips[i[drawn]], clips[j[drawn]]], 1).tolist()


def make_splits(splits, labels, trials, seed, fold, valid, train):
    """Turn folds, "any" and "train*" into "train", "valid" and "test", in place. Without `valid`
    its clips train."""
    rng = np.random.default_rng(seed)
    if trials:
        split_by_speaker(splits, labels, trials, rng, draw=train and valid)
    else:
        split_by_class(splits, labels, rng, fold)
    if not valid:
        splits[splits == "valid"] = "train"
        trials.pop("valid", None)


def split_by_speaker(splits, labels, trials, rng, draw):
    """Speakers in the test's trials test, with all their clips; others train. With `draw` a tenth
    of these validates, unless the corpus brings others: a folder `valid`, or trials of its own."""
    tested = {labels[i] for _, *pair in trials.get("test", ()) for i in pair}
    splits[(splits != "bad") & np.isin(labels, list(tested))] = "test"
    splits[np.isin(splits, ["any", "train*"])] = "train"
    if draw and "valid" not in trials:
        speakers = np.unique(labels[splits == "train"])
        held = rng.permutation(speakers)[: max(2, len(speakers) // 10)]
        if "valid" not in splits:  # there is no such folder
            splits[(splits == "train") & np.isin(labels, held)] = "valid"
        trials["valid"] = make_trials(np.flatnonzero(splits == "valid"), labels, rng)


def split_by_class(splits, labels, rng, fold):
    """Of folds, `fold` tests, the one before it validates, the rest trains: P1's rotation. Draw
    class by class a tenth of "train*" to validate, and of "any" also a fifth to test."""
    folds = sorted({int(split) for split in splits if split.isdigit()})
    if fold in folds:
        before = folds[folds.index(fold) - 1]  # before the first one comes the last
        splits[splits == str(fold)] = "test"
        splits[splits == str(before)] = "valid"
    splits[np.isin(splits, [str(k) for k in folds])] = "train"
    for name in np.unique(labels):
        for kind in ("any", "train*"):
            clips = rng.permutation(np.flatnonzero((labels == name) & (splits == kind)))
            splits[clips] = "train"
            if len(clips) > 2:
                valid = max(1, len(clips) // 10)
                test = max(1, len(clips) // 5) if kind == "any" else 0
                splits[clips[:valid]] = "valid"
                splits[clips[valid : valid + test]] = "test"


def choose_few(splits, labels, classes, few_shot, seed, found):
    """Leave `few_shot` clips of each class in training, drawn by a generator of its own."""
    rng = np.random.default_rng(seed)
    counts = Counter(labels[splits == "train"].tolist())
    found.note(f"classes have fewer than {few_shot} clips to train",
               [name for name in classes if counts[name] < few_shot])
    for name in classes:
        clips = np.flatnonzero((labels == name) & (splits == "train"))
        splits[rng.permutation(clips)[few_shot:]] = "unused"


def check_splits(name, splits, labels, trials, train, found):
    """Raise a sentence for trials and splits that cannot train, or test."""
    for split, rows in trials.items():
        if len({label for label, _, _ in rows}) < 2:
            raise found.error(f"{name}: trials to {split} are all of one kind, or none; they need "
                              "two speakers and two recordings of one. Validation is drawn from "
                              "the training speakers, --no-valid does without")
    if trials and train and len(set(labels[splits == "train"])) < 2:
        raise found.error(f"{name}: fewer than two speakers train; --no-valid leaves more to "
                          "train. (VoxCeleb's E and H test all of VoxCeleb1: train on VoxCeleb2.)")
    counts = Counter(splits)
    needed = {"train", "test"} if train else {"test"}
    if not needed <= counts.keys() <= {"train", "valid", "test", "bad", "unused"}:
        raise found.error(f"{name}: clips {dict(counts)}; expected some to train and some to test. "
                          "A class is split from three clips on; beside folders train and valid "
                          "there is a test")


def note_copies(copies, paths, labels, splits, found):
    """Note the clips that have the samples of a clip in another split or class."""
    if not copies:
        return  # the rest takes a second for a million clips
    used = {clip: (label, split) for clip, label, split in zip(paths, labels, splits)
            if split != "unused"}
    first = {}  # the clip that `copies` names -> the first of its copies that is used
    odd = []
    for clip in (*copies.values(), *copies):
        if clip in used:
            one = first.setdefault(copies.get(clip, clip), clip)
            if used[one] != used[clip]:
                odd.append(f"{clip} (of {one})")
    found.note("clips are copies of a clip in another split or class", odd)


def check_classes(name, splits, labels, drawn, train, skip_bad, found):
    """Name classes that train and are never tested, or the other way, and leave the latter out;
    raise if they shall train without `skip_bad`. A few clips of a class `drawn` all train."""
    trained = set(labels[splits == "train"].tolist())
    tested = set(labels[splits == "test"].tolist())
    judged = tested | set(labels[splits == "valid"].tolist())
    if len(trained) == 1:
        raise found.error(f"{name}: only one class trains, {trained.pop()!r}. Is ROOT a folder too "
                          "high or too deep?")
    if not trained:
        return  # only a test
    if train and not trained & tested:
        raise found.error(f"{name}: no class is in both training and test")
    found.note("classes have no clip that can be used",
               sorted(set(labels.tolist()) - set(labels[splits != "bad"].tolist())))
    found.note("classes have too few clips to be tested", sorted((trained - tested) & drawn))
    lone = sorted(trained - tested - drawn)
    faults = [f"class {label!r} trains and is never tested" for label in lone]
    faults += [f"class {label!r} is tested and never trains" for label in sorted(judged - trained)]
    found.bad += faults
    found.stop(faults, skip_bad or not train, f"{name}: {len(faults)} classes train or test alone")
    splits[np.isin(splits, ["valid", "test"]) & ~np.isin(labels, list(trained))] = "unused"


# --------------------------------------------------------------------------------------------------
# 5. Batches: slices of the packed file, in an order that only seed and epoch decide


@dataclass
class Batch:
    """x: (B, samples) int16, or floats of that scale; lengths, labels, clips (indices): (B,)."""
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
    size = samples_of(frames)
    x = np.zeros((len(clips), size), np.int16)  # widened on the device, so half of it travels
    lengths = np.minimum(corpus.length[clips], size)
    for row, (clip, length) in enumerate(zip(clips, lengths)):
        spare = corpus.length[clip] - length
        start = corpus.start[clip] + (rng.integers(spare + 1) if rng and spare else 0)
        segment = corpus.store[start : start + length]
        if repeat and length < size:
            segment = np.resize(segment, size)  # numpy's resize repeats
        x[row, : len(segment)] = segment
    if repeat:
        lengths = np.full_like(lengths, size)
    columns = map(torch.from_numpy, (x, lengths, corpus.labels[clips]))
    return Batch(*columns, clips)


def cut_windows(corpus, clips, frames):
    """Return (a corpus of these clips' windows of `frames` frames; (windows,) the row in `clips` of
    each). A clip's last window is moved back to be whole, so that all weigh the same."""
    size = samples_of(frames)
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
# 6. Features: a batch of waves to log-mel frames, equal to kaldi's; and their augmentation


def frames_of(samples):
    """How many whole windows fit into so many samples, 400 or more: a number, array or tensor."""
    return (samples - WINDOW) // HOP + 1


def samples_of(frames):
    """The fewest samples that give so many frames: the inverse of `frames_of`."""
    return (frames - 1) * HOP + WINDOW


@lru_cache
def mel_triangles(mels, device):
    """(FFT/2 + 1, mels): triangles, equally wide in mel from 20 Hz to 8 kHz. Mel is nearly linear
    below 700 Hz and logarithmic above, as an ear is."""
    low = 1127 * math.log(1 + 20 / 700)  # mel
    step = (1127 * math.log(1 + RATE / 2 / 700) - low) / (mels + 1)
    edges = low + torch.arange(mels + 2) * step  # left, middle and right of a triangle: a step each
    bins = 1127 * torch.log(1 + torch.arange(FFT // 2 + 1)[:, None] * RATE / FFT / 700)
    rising = (bins - edges[:-2]) / (edges[1:-1] - edges[:-2])  # (FFT/2 + 1, mels)
    falling = (edges[2:] - bins) / (edges[2:] - edges[1:-1])
    return torch.minimum(rising, falling).clamp_min(0).to(device)


def fbank(waves, mels=128):
    """Log-mel features of float waves in [-1, 1]: (B, samples) -> (B, T, F). AST was trained on
    kaldi's, fbank(htk_compat=True, window_type="hanning", dither=0): these are equal."""
    window = torch.hann_window(WINDOW, periodic=False, device=waves.device)  # (400,)
    # On the CPU in parts of some 400 frames, which stay in its cache: twice as fast.
    size = max(1, 400 // frames_of(waves.shape[1])) if waves.is_cpu else len(waves)
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
    """Return the encoder's input (B, T, F), normalised as it asks: by the mean and deviation that
    it was trained with, or (None) without each clip's own mean per bin, the colour of a channel."""
    x = fbank(batch.x.float() / 32768, encoder.mels)  # (B, samples) -> (B, T, F)
    if encoder.normalise is None:
        return x - x.mean(1, keepdim=True)  # (B, 1, F): one mean a bin
    mean, std = encoder.normalise
    past = torch.arange(x.shape[1], device=x.device) >= frames_of(batch.lengths)[:, None]  # (B, T)
    x = x.masked_fill(past[:, :, None], 0.0)  # behind a clip's end: loud, but AST expects it
    return (x - mean) / (2 * std)


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
    half = 0  # how many of them get a room
    if rooms:
        half = len(chosen) // 2 if noise else len(chosen)
    indoors = chosen[:half]
    noisy = chosen[half:]
    if half:
        if rooms == "generated":
            responses = make_rooms(half, x.device)
        else:
            responses = draw_sounds(rooms, half, 100, False).to(x.device)  # about a second
        y[indoors] = reverberate(x[indoors], responses)
    if noise and len(noisy):
        if noise == "generated":
            sounds = make_noise(x, noisy)
        else:
            sounds = draw_sounds(noise, len(noisy), frames_of(x.shape[1]), True).to(x.device)
        ratio = snr[0] + (snr[1] - snr[0]) * torch.rand(len(noisy), device=x.device)  # (noisy,)
        y[noisy] = add_noise(x[noisy], sounds, ratio, batch.lengths[noisy])
    return replace(batch, x=y)


def add_noise(x, sounds, ratio, lengths):
    """Add to each wave of x (B, n) a sound, `ratio` (B,) dB weaker; none where either is silent."""
    mixed = torchaudio.functional.add_noise(x, sounds, ratio, lengths)
    possible = mixed.isfinite().all(1, keepdim=True)  # (B, 1): silence has no ratio to anything
    return torch.where(possible, mixed, x)


def perturb_speed(batch, frames, classes):
    """Play each clip at one of SPEEDS. Pitch and formants move with the speed, which makes another
    speaker: label + classes * k."""
    x = batch.x.new_empty(len(batch.x), samples_of(frames))
    lengths = batch.lengths.clone()
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
    energy = wet.norm(dim=1, keepdim=True)  # (B, 1)
    louder = wet * x.norm(dim=1, keepdim=True) / energy.clamp_min(1e-6)
    return torch.where(energy > 0, louder, x)  # a silent response is no room


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
# 7. Built-in corpora: synthetic, deterministic, offline

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
    spectrum = np.fft.rfft(rng.standard_normal(RATE))
    hertz = np.fft.rfftfreq(RATE, 1 / RATE)
    return np.fft.irfft(spectrum * ((hertz > low) & (hertz < high)))


def dying(start, decay):
    """An envelope that starts at second `start` and falls by e every `decay` seconds."""
    return np.where(TIME >= start, np.exp(-np.maximum(TIME - start, 0) / decay), 0)


def part_of(rng, half):
    """1 for about a fifth of a second in one half of the clip, which begins at second `half`."""
    start = half + rng.uniform(0.02, 0.2)
    return (TIME > start) & (TIME < start + rng.uniform(0.15, 0.25))


def clicks(instants, hertz, length):
    """At each instant (s) a burst of `hertz` that swells and falls within `length` seconds."""
    burst = tone(hertz)[: int(length * RATE)]
    wave = np.zeros(RATE)
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


def cricket(rng):
    wings = tone(rng.uniform(3500, 5500)) * np.maximum(tone(rng.uniform(35, 60)), 0)
    return np.where(tone(rng.uniform(2, 4)) > 0, wings, 0)


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
    "cricket": cricket,
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


def sound_rows(name, root, found):
    """Clips are named before they are made: the name is the seed of the wave."""
    rows = []
    for kind in SOUNDS[name]:
        for split, count in COUNTS.items():
            rows += [(f"{name}/{kind}/{split}-{n}", kind, split) for n in range(count)]
    return rows


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


def voice_rows(root, found):
    """Nobody is in two splits, so a test is of strangers."""
    rows = []
    for split, (speakers, each) in VOICES.items():
        for speaker in [f"{split}-{who}" for who in range(speakers)]:
            rows += [(f"voices/{speaker}/{n}", speaker, split) for n in range(each)]
    return rows


def voice(clip):
    """The wave of one clip of `voices`: a speaker says random phonemes, through a channel."""
    speaker = rng_of(clip.rpartition("/")[0])  # who
    rng = rng_of(clip)  # what this time
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
# 8. Corpora: each lists its clips as (path below the root, class, split)


@dataclass
class Source:
    """What CORPORA says about one corpus. Splits of `rows` besides train, valid and test: "any" is
    drawn by a seed, of "train*" a tenth validates, "1", "2", ... are folds."""
    rows: object  # (root, Findings) -> [(clip, class, split)]
    tree: str = ""  # how the root must look, and where to ask for it; empty: built in
    clips: int = 0  # of the official corpus; 0: any number
    address: str = ""  # of its archive, or of the folder of its lists; empty: no plain download
    sha256: str = ""  # of the archive; empty: none is published with us
    folds: int = 0  # test folds 1..folds; 0: one split
    lists: dict = field(default_factory=dict)  # --trials -> (file of the list, trials in it)
    trials: bool = False  # draw trials among the speakers that validate and test
    read: object = None  # clip -> wave, for built-in corpora


SPLIT_FOLDERS = dict(train="train", training="train", test="test", testing="test", eval="test",
                     evaluation="test", val="valid", valid="valid", validation="valid", dev="valid",
                     development="valid")


def folder_rows(root, found=None):
    """ROOT/dog/1.wav: a class is a folder, the splits are drawn. With ROOT/train/dog/1.wav and
    ROOT/test/dog/2.wav, and maybe validation, they are the folders'."""
    found = found or Findings()
    clips = find_audio(root, found)
    tops = {clip.partition("/")[0] for clip in clips if "/" in clip}
    words = {top: re.split(r"[-_ \d]|set|data", top.lower())[0] for top in tops}  # train_set: train
    role = {top: SPLIT_FOLDERS[word] for top, word in words.items() if word in SPLIT_FOLDERS}
    if "train" not in role.values() or len(set(role.values())) == 1:
        why = "recordings directly in ROOT are left out"
        clips = leave_out(clips, lambda clip: "/" in clip, why, found)
        folders = {part.lower() for clip in clips for part in clip.split("/")[:-1]}
        found.note("folders have the name of a split and are not taken for one",
                   sorted(folders & SPLIT_FOLDERS.keys()))
        return [(clip, clip.partition("/")[0], "any") for clip in clips]
    if "valid" not in role.values():
        role = {top: split.replace("train", "train*") for top, split in role.items()}
    why = ("recordings in no folder of a class, as ROOT/train/dog, are left out (splits are "
           f"{', '.join(sorted(role))})")
    clips = leave_out(clips, lambda clip: clip.count("/") > 1 and clip.split("/")[0] in role, why,
                      found)
    return [(clip, clip.split("/")[1], role[clip.split("/")[0]]) for clip in clips]


def fsdd_rows(root, found):
    """Of each digit and speaker recordings 0 to 4 test: its authors' split."""
    named = partial(re.fullmatch, r"\d_.+_\d+\.\w+")
    clips = leave_out(find_audio(root / "recordings", found), named,
                      "recordings have no name as 7_jackson_32.wav and are left out", found)
    rows = []
    for clip in clips:
        digit, *_, take = clip.rpartition(".")[0].split("_")
        split = "test" if int(take) < 5 else "train*"
        rows.append((f"recordings/{clip}", digit, split))
    return rows


def fluentspeech_rows(root, found):
    """31 intents: action, object and location."""
    rows = []
    for split in ("train", "valid", "test"):
        table = root / f"data/{split}_data.csv"
        rows += read_table(table, found, "{path}", "{action}/{object}/{location}", split)
    return rows


def speechcommands_rows(root, found):
    """Version 2: a folder a word; what neither list names trains."""
    rows = []
    for split, file in (("valid", "validation_list.txt"), ("test", "testing_list.txt")):
        names = filter(None, map(str.strip, read_text(root / file).split("\n")))
        rows += [(name, name.split("/")[0], split) for name in map(same_name, names)]
    listed = {name for name, _, _ in rows}  # also with what is not there
    clips = leave_out(find_audio(root, found), lambda clip: clip.count("/") == 1,
                      "recordings are not directly in a word's folder and left out", found)
    for clip in clips:
        if same_name(clip) not in listed and not clip.startswith("_background_noise_/"):
            rows.append((clip, clip.split("/")[0], "train"))
    return sorted(rows)


def voxceleb_rows(root, found):
    """VoxCeleb1, VoxCeleb2 or both, at any depth: .../id10270/x6uYqmx31kE/00001.wav."""
    tail = lambda clip: clip.rpartition(".")[0].split("/")[-3:]
    clips = leave_out(find_audio(root, found), lambda clip: tail(clip)[0].startswith("id"),
                      "recordings lie in no folder id.../... and are left out", found)
    clips = keep_one(clips, lambda clip: "/".join(tail(clip)), found)
    return [(clip, tail(clip)[0], "any") for clip in clips]


VOXCELEB = "https://www.robots.ox.ac.uk/~vgg/data/voxceleb/"
CORPORA = {
    "sounds": Source(partial(sound_rows, "sounds"), read=sound),
    "sounds-source": Source(partial(sound_rows, "sounds-source"), read=sound),
    "voices": Source(voice_rows, read=voice, trials=True),
    "folder": Source(
        folder_rows,
        tree="A folder per class or speaker: ROOT/dog/1.wav, ...; or ROOT/train/dog/1.wav, "
             "ROOT/test/dog/2.wav, ..."),
    "fsdd": Source(
        fsdd_rows, tree="ROOT/recordings/7_jackson_32.wav, ...", clips=3000,
        address="https://github.com/Jakobovski/free-spoken-digit-dataset/archive/refs/heads/"
                "master.zip"),
    "esc50": Source(
        lambda root, found: read_table(
            root / "meta/esc50.csv", found, "audio/{filename}", "{category}", "{fold}"),
        tree="ROOT/meta/esc50.csv, ROOT/audio/1-100032-A-0.wav, ...",
        clips=2000, folds=5,
        address="https://github.com/karolpiczak/ESC-50/archive/master.zip"),
    "urbansound8k": Source(  # slices of one recording are in one fold, so the folds stay whole
        lambda root, found: read_table(
            root / "metadata/UrbanSound8K.csv", found, "audio/fold{fold}/{slice_file_name}",
            "{class}", "{fold}"),
        tree="ROOT/metadata/UrbanSound8K.csv, ROOT/audio/fold1/101415-3-0-2.wav, ...",
        clips=8732, folds=10,
        address="https://zenodo.org/record/1203745/files/UrbanSound8K.tar.gz"),
    "speechcommands": Source(
        speechcommands_rows,
        tree="ROOT/validation_list.txt, ROOT/testing_list.txt, ROOT/bed/00176480_nohash_0.wav, ...",
        clips=105829,
        address="http://download.tensorflow.org/data/speech_commands_v0.02.tar.gz",
        sha256="af14739ee7dc311471de98f5f9d2c9191b18aedfe957f4a6ff791c709868ff58"),
    "fluentspeech": Source(
        fluentspeech_rows,
        tree="ROOT/data/train_data.csv, valid_data.csv, test_data.csv, ROOT/wavs/speakers/SPEAKER/"
             "CLIP.wav, ...\nAsk for it by the form of its publisher, Fluent.ai",
        clips=30043),
    "voxceleb": Source(
        voxceleb_rows,
        tree="ROOT/veri_test2.txt, list_test_all2.txt, list_test_hard2.txt, and anywhere below ROOT"
             "\nid10270/x6uYqmx31kE/00001.wav or .m4a, ...\nAsk for the audio by the form at "
             + VOXCELEB,
        address=VOXCELEB + "meta/",
        lists={"o": ("veri_test2.txt", 37611), "e": ("list_test_all2.txt", 579818),
               "h": ("list_test_hard2.txt", 550894)}),
}


# --------------------------------------------------------------------------------------------------
# 9. The command line: getting, checking and drawing a corpus


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
    try:
        if zipfile.is_zipfile(archive):
            shutil.unpack_archive(archive, part, "zip")
        else:
            unpack_tar(archive, part)
        top, *others = part.glob("[!._]*")  # without what a Mac adds
        if others or not top.is_dir():
            top = part
        for path in list(top.iterdir()):
            os.replace(path, folder / path.name)
    except Exception as error:  # of zipfile, tarfile, gzip, zlib: they share no other class
        raise ValueError(f"{archive} could not be unpacked ({error}); if it is damaged, delete it: "
                         "the same command gets it again") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    archive.unlink()


def unpack_tar(archive, folder):
    """Unpack a tar.gz; raise if a member would lie outside of `folder`."""
    with tarfile.open(archive, "r:gz") as tar:
        if hasattr(tarfile, "data_filter"):
            tar.extractall(folder, filter="data")
            return
        whole = folder.resolve()  # Python before 3.11.4 has no filter
        for member in tar.getmembers():
            plain = member.isfile() or member.isdir()
            if not plain or not (whole / member.name).resolve().is_relative_to(whole):
                raise ValueError(f"{member.name} is a link, or would lie outside")
        tar.extractall(folder)


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
    if not len(train):
        raise ValueError("--figure draws clips that train; there are none")
    names = sorted(corpus.classes, key=lambda name: (">" not in name, name))[:6]
    clips = [train[corpus.labels[train] == corpus.classes.index(name)][0] for name in names]
    x = load_batch(corpus, np.array(clips), 100).x  # their first second
    x = fbank(x / 32768)  # (B, T, F)
    augmented = augment_features(x - x.mean(), shift=25, spec_f=24, spec_t=20)
    with figure(path, 2, len(names), (1.6 * len(names), 3.6)) as axes:
        for axis, name, picture in zip(axes.flat, names * 2, [*x, *augmented]):
            axis.imshow(picture.T.numpy(), origin="lower", aspect="auto", cmap="magma")
            axis.set(title=name.replace("$", r"\$"), xlabel="frame (10 ms)", ylabel="mel bin")
            axis.label_outer()


def check(corpus):
    """Print what a corpus holds, and every fault by name; return whether there is one."""
    print(f"{corpus.name}: {len(corpus.ids):,} clips, {len(corpus.classes)} classes or speakers")
    more = ", ..." if len(corpus.classes) > 50 else ""
    print(f"  {', '.join(corpus.classes[:50])}{more}")
    for split in sorted(set(corpus.splits)):
        clips = corpus.pick(split)
        seconds = corpus.length[clips] / RATE
        counts = Counter(corpus.labels[clips].tolist()).values()
        each = f"{min(counts)} to {max(counts)} a class, "
        if min(corpus.labels[clips]) < 0:
            each = ""  # who does not train has no number
        print(f"  {split:7s} {len(clips):7,} clips, {each}"
              f"{seconds.min():.2f} to {seconds.max():.2f} s, {seconds.sum() / 3600:.2f} h")
    for split, pairs in corpus.trials.items():
        print(f"  {split} trials: {len(pairs):,}, {sum(t[0] for t in pairs):,} of one speaker")
    faults = [*corpus.notes, *corpus.bad]
    if len(corpus.classes) < 2:
        faults.append("fewer than two classes or speakers train")
    for fault in faults or ["none"]:
        print(f"  fault: {fault}")
    return bool(faults)


def main(argv=None):
    parser = argparse.ArgumentParser(description="Check a corpus: counts, durations, faults.")
    parser.add_argument("name", choices=CORPORA, metavar="NAME", help=", ".join(CORPORA))
    parser.add_argument("root", metavar="ROOT", nargs="?", help="its folder; none if built in")
    parser.add_argument("--cache", default="cache", help="folder for packed corpora")
    parser.add_argument("--trials", default="o", choices=("o", "e", "h"), help="VoxCeleb's list")
    parser.add_argument("--download", action="store_true", help="get it first, where that is free")
    parser.add_argument("--figure", help="draw spectrograms into this .png, .svg or .pdf")
    args = parser.parse_args(argv)
    sys.stdout.reconfigure(errors="backslashreplace")  # names that a code page lacks
    opened = partial(open_corpus, args.name, args.root, cache=args.cache, trials=args.trials,
                     train=False)
    try:
        if args.figure:
            check_figure(args.figure)
        if args.download:
            download_corpus(args.name, args.root, args.cache)
        try:
            corpus = opened()  # without skip_bad, so that what is bad is read again
        except ValueError:
            corpus = opened(skip_bad=True)
        faulty = check(corpus)
        if args.figure:
            draw_spectrograms(corpus, args.figure)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    sys.exit(1 if faulty else 0)


if __name__ == "__main__":
    main()
