"""Tests of the whole project: `python -m pytest -q`, two minutes on two cores, offline.

Sections 1 data.py, 2 the AST, 3 its methods, 4 lightweight_sv.py, 5 train.py and the README.
Each test states a claim and compares with something independent: torchaudio, Hugging Face,
published counts, values worked by hand. Speed and accuracy are measured by commands (README), not
here. Tests of real recordings look for ../shared/data and skip where it is absent.
"""

import contextlib
import copy
import doctest
import hashlib
import http.server
import importlib.util
import io
import itertools
import json
import math
import os
import re
import shlex
import struct
import subprocess
import sys
import tarfile
import threading
import time
import zipfile
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "1000")  # as train.py does, before torch is imported

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

import ast_adapters
import data
import lightweight_sv as sv
import train
from ast_adapters import AST, METHODS, adapt, count

HERE = Path(__file__).resolve().parent
REAL = HERE.parent / "shared" / "data"
real_data = pytest.mark.skipif(not REAL.exists(), reason="no real recordings beside the project")
hugging_face = pytest.mark.skipif(not importlib.util.find_spec("transformers"),
                                  reason="transformers is not installed")


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """Packed corpora, made once for all tests."""
    return str(tmp_path_factory.mktemp("cache"))


# --------------------------------------------------------------------------------------------------
# 1. data.py: helpers first, then files, packing, splits, corpora, downloads, sounds, augmentation


def wav_bytes(wave, rate=16000, code=1, bits=16, extensible=False):
    """A WAV file from floats (n, channels), written by hand as the format's specification says."""
    if code == 3:
        body = wave.astype(f"<f{bits // 8}").tobytes()
    else:
        top = 2 ** (bits - 1)
        steps = np.round(wave * top).clip(-top, top - 1).astype(np.int64) + 128 * (bits == 8)
        body = b"".join((int(s) % 2**bits).to_bytes(bits // 8, "little") for s in steps.ravel())
    channels, frame = wave.shape[1], wave.shape[1] * bits // 8
    tag = 0xFFFE if extensible else code
    form = struct.pack("<HHIIHH", tag, channels, rate, rate * frame, frame, bits)
    form += struct.pack("<HHIH14x", 22, bits, 0, code) * extensible
    odd = b"LIST" + struct.pack("<I", 3) + b"abc\0"  # a chunk of odd size is padded
    form = b"fmt " + struct.pack("<I", len(form)) + form
    body = b"data" + struct.pack("<I", len(body)) + body
    return b"RIFF" + struct.pack("<I", 4 + len(form + odd + body)) + b"WAVE" + form + odd + body


def broken_files(folder):
    """Write one file of each fault; {name: part of the sentence that must answer}."""
    zeros, good = np.zeros((2000, 1)), wav_bytes(np.zeros((2000, 1)))
    files = {"empty.wav": (b"", "empty or not"), "text.wav": (b"no audio at all", "not a WAV file"),
             "cut.wav": (good[:-100], "truncated"), "header.wav": (good[:30], "truncated"),
             "short.wav": (wav_bytes(zeros[:100]), "shorter than one frame"),
             "none.wav": (wav_bytes(zeros[:0], 44100), "shorter than one frame"),
             "law.wav": (wav_bytes(zeros, code=7), "neither PCM nor float"),
             "nan.wav": (wav_bytes(zeros + np.nan, code=3, bits=32), "not finite"),
             "rate.wav": (wav_bytes(zeros, 0), "0 Hz is neither")}
    for name, (content, _) in files.items():
        (folder / name).write_bytes(content)
    return {name: sentence for name, (_, sentence) in files.items()}


def corpus_of(waves, labels, splits):
    """A corpus in memory, as open_corpus would return it."""
    lengths = np.array([len(wave) for wave in waves])
    ids, classes = [f"clip{i}" for i in range(len(waves))], [str(c) for c in sorted(set(labels))]
    return data.Corpus("test", ids, np.array(labels), np.array(splits, object), classes,
                       np.cumsum(lengths) - lengths, lengths, np.concatenate(waves).astype("<i2"))


def folder_corpus(root, classes=3, clips=10):
    rng = np.random.default_rng(0)
    for label in range(classes):
        (root / f"class{label}").mkdir(parents=True)
        for clip in range(clips):
            tone = np.sin(np.arange(8000) * (label + 1) * 0.3)[:, None] * rng.uniform(0.1, 0.9)
            (root / f"class{label}" / f"{clip}.wav").write_bytes(wav_bytes(tone))


def few_voices(patch):
    """`voices` with few training speakers; the held-out ones and their trials are the real ones."""
    patch.setitem(data.VOICES, "train", (12, 4))
    patch.setitem(data.VOICES, "valid", (4, 4))


def write_table(path, header, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join([header, *rows]) + "\n", encoding="utf-8")


def raising(error):
    """A function that raises `error`, whatever it gets."""
    def function(*arguments):
        raise error

    return function


def people(corpus, split, part=0):
    """The speakers of a split: a part of each clip's path."""
    return {corpus.ids[i].split("/")[part] for i in corpus.pick(split)}


@pytest.fixture
def opened(tmp_path):
    """A folder corpus at `root`, and a function that opens it as a user would."""
    folder_corpus(tmp_path / "root")
    return tmp_path / "root", lambda **options: data.open_corpus(
        "folder", tmp_path / "root", tmp_path / "cache", **options)


@pytest.mark.parametrize("extensible", [False, True])
@pytest.mark.parametrize("code, bits", [(1, 8), (1, 16), (1, 24), (1, 32), (3, 32), (3, 64)])
def test_every_kind_of_wav_is_read(tmp_path, code, bits, extensible):
    wave, path = np.random.default_rng(0).uniform(-0.99, 0.99, (1000, 3)), tmp_path / "a.wav"
    path.write_bytes(wav_bytes(wave, 44100, code, bits, extensible))
    read, rate = data.read_wav(path)
    assert read.shape == (3, 1000) and rate == 44100 and read.dtype == np.float32
    np.testing.assert_allclose(read.T, wave, atol=1e-7 + (2.0**-bits if code == 1 else 0))


def test_broken_files_are_named_with_the_reason(tmp_path):
    for name, sentence in broken_files(tmp_path).items():
        with pytest.raises(ValueError, match=f"{name}: .*{sentence}"):
            data.read_audio(tmp_path / name)


@pytest.mark.parametrize("rate", [8000, 44100, 44101, 11025])  # 44,101 is a prime
def test_resampling_keeps_a_tone_at_its_frequency(tmp_path, rate):
    tone = np.sin(2 * np.pi * 440 * np.arange(rate) / rate)[:, None]
    (tmp_path / "a.wav").write_bytes(wav_bytes(tone, rate))
    wave = data.read_audio(tmp_path / "a.wav")
    assert abs(len(wave) - 16000) <= 1 and np.abs(np.fft.rfft(wave)).argmax() == 440  # of 1 Hz


def test_import_survives_a_torchaudio_that_does_not_fit_its_torch():
    """As with CPU-only torch or another CUDA version: the compiled extension refuses to load."""
    code = ("import sys, data\n"
            "class Refuse:\n"
            "    def find_spec(self, name, path=None, target=None):\n"
            "        if name == 'torchaudio._extension':\n"
            "            raise OSError('libc10_cuda.so: cannot open shared object file')\n"
            "sys.meta_path.insert(0, Refuse())\n"
            "import torch; t = data.import_torchaudio()\n"
            "print(t.functional.resample(torch.zeros(80), 8000, 16000).shape[0])")
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True)
    assert done.stdout.strip() == "160", done.stderr


@pytest.mark.parametrize("mels", [40, 80, 128])
def test_fbank_equals_kaldis(mels):
    torch.manual_seed(0)
    waves = torch.randn(3, 9000) * torch.tensor([[1.0], [0.01], [0.0]])  # loud, quiet, silent
    kaldi = data.import_torchaudio().compliance.kaldi.fbank
    expected = torch.stack([
        kaldi(wave[None], htk_compat=True, sample_frequency=16000, use_energy=False, dither=0.0,
              window_type="hanning", num_mel_bins=mels, frame_shift=10) for wave in waves])
    assert_close(data.fbank(waves, mels), expected, atol=1e-3, rtol=0)
    with torch.autocast("cpu", torch.bfloat16):  # as in evaluation with --bf16
        assert_close(data.fbank(waves, mels), expected, atol=1e-3, rtol=0)
    assert data.fbank(waves).shape[1] == data.frames_of(9000) == (9000 - 400) // 160 + 1


def test_features_of_silence_and_padding_are_asts_golden_values_and_utterances_have_no_mean():
    silent = corpus_of([np.zeros(8000)], [0], ["train"])
    batch, sound = data.load_batch(silent, np.array([0]), 100), data.frames_of(8000)
    x = data.features(batch, AST("nano"))  # (1, 100, 128)
    assert_close(x[0, :sound], torch.full((sound, 128), -1.27759), atol=1e-4, rtol=0)
    assert_close(x[0, sound:], torch.full((100 - sound, 128), 0.46703), atol=1e-4, rtol=0)
    corpus = corpus_of([np.random.default_rng(0).integers(-999, 999, 5000)], [0], ["train"])
    batch = data.load_batch(corpus, np.array([0]), 50, repeat=True)
    assert torch.equal(batch.x[0, :3000], batch.x[0, 5000:8000])  # short clips repeat
    assert_close(data.features(batch, slim("resnet34")).mean(1), torch.zeros(1, 40),
                 atol=1e-5, rtol=0)


def test_batches_depend_on_seed_and_epoch_alone():
    waves = [np.arange(i * 1000, i * 1000 + 900) for i in range(20)]
    corpus = corpus_of(waves, [0] * 20, ["train"] * 20)
    draw = lambda **kw: list(data.batches(corpus, np.arange(20), 6, frames=3, seed=1, **kw))
    first, again, later = draw(), draw(), draw(epoch=1)
    assert len(first) == 3 and len({i for b in first for i in b.clips}) == 18  # no clip twice
    assert all(torch.equal(a.x, b.x) and (a.clips == b.clips).all() for a, b in zip(first, again))
    assert any((a.clips != b.clips).any() for a, b in zip(first, later))
    assert len({int(b.x[0, 0]) % 1000 for b in first}) > 1  # crops start anywhere
    shards = [draw(shard=(rank, 2)) for rank in range(2)]
    assert all(sorted([*a.clips, *b.clips]) == sorted(c.clips) for a, b, c in zip(*shards, first))


def test_windows_of_a_loud_float_file_are_clipped_and_whole(tmp_path):
    paths = [tmp_path / "a.wav", tmp_path / "b.wav"]
    for path, samples in zip(paths, (16000, 3000)):
        path.write_bytes(wav_bytes(np.full((samples, 1), 1.2), code=3, bits=32))
    corpus = data.corpus_of_files(paths)
    windows, owner = data.cut_windows(corpus, np.arange(2), 30)
    assert (corpus.store == 32767).all() and owner.tolist() == [0, 0, 0, 0, 1]
    assert windows.start.tolist() == [0, 5040, 10080, 16000 - 5040, 16000]
    assert windows.length.tolist() == [5040, 5040, 5040, 5040, 3000]


def test_a_folder_is_split_by_class_packed_once_and_packed_anew_when_a_clip_changes(
        opened, tmp_path, monkeypatch):
    root, open_it = opened
    folder_corpus(root / "lonely", classes=1, clips=1)
    corpus, changed = open_it(), root / "class1/3.wav"
    assert corpus.notes == ["1 classes have fewer than three clips and only train: lonely"]
    clip = corpus.ids.index("class1/3.wav")
    wave = corpus.store[corpus.start[clip] :][: corpus.length[clip]]
    np.testing.assert_allclose(wave / 32768, data.read_audio(changed), atol=2**-16)
    assert [len(corpus.pick(split)) for split in ("train", "valid", "test")] == [22, 3, 6]
    with monkeypatch.context() as patch:  # the second time nothing is decoded
        patch.setattr(data, "read_audio", lambda path: pytest.fail(f"decoded {path} again"))
        patch.chdir(root)
        assert data.open_corpus("folder", ".", tmp_path / "cache").ids == corpus.ids
    changed.write_bytes(wav_bytes(np.ones((9000, 1)) * 0.5))
    again = open_it()
    assert again.length[clip] == 9000 and again.store[again.start[clip]] == 16384
    assert len(list((tmp_path / "cache").iterdir())) == 1  # the old one is gone


def test_two_programs_may_pack_one_corpus_at_the_same_time(opened, tmp_path, monkeypatch):
    """The second begins and ends while the first decodes; on Windows it even holds the file."""
    process, read, programs = os.getpid(), data.read_audio, []

    def read_while_another_packs(path):
        if not programs:
            programs.append(None)
            monkeypatch.setattr(os, "getpid", lambda: process + 1)
            programs[0] = opened[1]()
        return read(path)

    def in_use(part, path):
        if os.path.exists(path):
            raise PermissionError(path)
        os.rename(part, path)

    monkeypatch.setattr(data, "read_audio", read_while_another_packs)
    monkeypatch.setattr(os, "replace", in_use)
    programs.append(opened[1]())
    assert np.array_equal(programs[0].store, programs[1].store) and programs[1].store.any()
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_bad_clips_stop_before_training_or_are_left_out(opened, monkeypatch):
    root, open_it = opened
    with monkeypatch.context() as patch:  # as before `pip install torchcodec`
        patch.setattr(data, "read_audio", raising(ValueError("install a decoder")))
        with pytest.raises(ValueError, match="30 of 30 clips .*(?s:.)*install a decoder"):
            open_it()
    assert not open_it().bad  # they are read again, though sizes and times are what they were
    files = broken_files(root / "class0")
    with pytest.raises(ValueError, match=f"{len(files)} of 39 clips of .*(?s:.)*--skip-bad"):
        open_it()
    corpus = open_it(skip_bad=True)
    assert (corpus.splits != "bad").sum() == 30 and "9 unusable" in corpus.notes[0]
    # With trials the speakers split the clips: bad ones stay out, and so do their trials.
    (root / "trials.txt").write_text("1 class0/0.wav class0/1.wav\n0 class0/2.wav class1/3.wav\n"
                                     "1 class0/0.wav class0/cut.wav\n")
    for speaker in ("3", "4", "5"):
        folder_corpus(root / speaker, classes=1)
    corpus = open_it(skip_bad=True)
    assert [label for label, _, _ in corpus.trials["test"]] == [1, 0]
    assert "1 test trials of unusable clips" in corpus.notes[1]
    assert (corpus.splits == "bad").sum() == (corpus.length == 0).sum() == len(files)


def test_a_full_disk_is_no_bad_clip_and_leaves_nothing_behind(opened, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(data, "to_int16", raising(OSError("No space left on device")))
        with pytest.raises(OSError, match="No space left"):
            opened[1](skip_bad=True)
    assert not list((tmp_path / "cache").iterdir()) and not opened[1]().bad


@pytest.mark.parametrize("speakers, clips, trials, sentence", [
    (6, 3, "1 class0/0.wav class0/1.wav\n", "test trials of folder are all of one kind"),
    (4, 3, "0 class0/0.wav class1/1.wav\n1 class0/0.wav class0/1.wav", "2 speakers besides those"),
    (6, 1, "0 class0/0.wav class1/0.wav\n1 class0/0.wav class0/0.wav", "2 clips of 2 held out"),
    (6, 3, "1 class0/0.wav class9/1.wav\n", "name class9/1.wav, which folder lacks"),
    (6, 3, "\n", "trials.txt: no trials"), (6, 3, "1 a\n", "line 1: expected `1 id_a id_b`"),
    (6, 3, "\ufeff1 class0/0.wav class0/1.wav\n", "are all of one kind")])  # Excel's first bytes
def test_trials_that_measure_nothing_are_refused_before_training(
        tmp_path, speakers, clips, trials, sentence):
    folder_corpus(tmp_path / "root", speakers, clips)
    (tmp_path / "root/trials.txt").write_text(trials, encoding="utf-8")
    with pytest.raises(ValueError, match=sentence):
        data.open_corpus("folder", tmp_path / "root", tmp_path / "cache")


def test_validation_trials_of_a_hundred_thousand_clips_fit_in_memory():
    """All pairs of a tenth of VoxCeleb2 would take 80 GB."""
    clips = [(f"clip{i}", f"speaker{i % 600}") for i in range(100_000)]
    trials = data.make_trials(clips, np.random.default_rng(0))
    assert len(trials) == len(set(trials)) == 4000
    speaker = dict(clips)
    assert all((speaker[a] == speaker[b]) == bool(same) for same, a, b in trials)
    assert sum(same for same, _, _ in trials) == 2000 and all(a != b for _, a, b in trials)


def folds_of(number, fold, valid=True):
    """The folds that train, validate and test, of a corpus with three clips a fold."""
    folds = [str(k) for k in range(1, number + 1) for _ in range(3)]
    corpus = corpus_of([np.zeros(500)] * len(folds), ["a"] * len(folds), folds)
    data.make_splits(corpus, 0, fold, few_shot=0, valid=valid, train=True)
    return tuple("".join(sorted(set(np.array(folds)[corpus.splits == split]), key=int))
                 for split in ("train", "valid", "test"))


def test_folds_rotate_as_in_p1_and_validation_is_never_the_test_fold():
    rotation = [folds_of(5, fold) for fold in (5, 1, 2, 3, 4)]
    assert rotation == [("123", "4", "5"), ("234", "5", "1"), ("345", "1", "2"),
                        ("145", "2", "3"), ("125", "3", "4")]
    assert folds_of(10, 1) == ("23456789", "10", "1") and folds_of(5, 2, False) == ("1345", "", "2")
    assert (data.CORPORA["esc50"].folds, data.CORPORA["urbansound8k"].folds) == (5, 10)


def official_lists(name, root):
    """The lists of a complete corpus without a single audio file, whose names it returns."""
    if name == "esc50":
        write_table(root / "meta/esc50.csv", "filename,fold,category", [
            f"{i % 5 + 1}-{i}-A-{i % 50}.wav,{i % 5 + 1},c{i % 50}" for i in range(2000)])
    elif name == "urbansound8k":
        write_table(root / "metadata/UrbanSound8K.csv", "slice_file_name,fsID,fold,class", [
            f"{i}-3-0-0.wav,{i},{i % 10 + 1},c{i // 10 % 10}" for i in range(8732)])
    elif name == "fluentspeech":
        for split, count in (("train", 23132), ("valid", 3118), ("test", 3793)):
            write_table(root / f"data/{split}_data.csv",
                        ",path,speakerId,transcription,action,object,location", [
                            f'{i},wavs/speakers/s/{split}{i}.wav,s,"Turn, it on",a{i % 31},o,none'
                            for i in range(count)])
    elif name == "speechcommands":
        files = [f"word{i % 35}/{i}_nohash_0.wav" for i in range(105829)]
        write_table(root / "validation_list.txt", files[0], files[1:9981])
        write_table(root / "testing_list.txt", files[9981], files[9982 : 9981 + 11005])
        return files + ["_background_noise_/pink_noise.wav"]
    return []


@pytest.mark.parametrize("name, total, classes, split, part", [
    ("esc50", 2000, 50, "3", 400), ("urbansound8k", 8732, 10, "3", None),
    ("speechcommands", 105829, 35, "valid", 9981), ("fluentspeech", 30043, 31, "test", 3793)])
def test_lists_give_the_official_counts_and_what_lacks_is_counted(
        tmp_path, monkeypatch, name, total, classes, split, part):
    files, source = official_lists(name, tmp_path), data.CORPORA[name]
    monkeypatch.setattr(data, "find_audio", lambda root: files)
    rows = source.rows(tmp_path)
    assert len(rows) == len(set(rows)) == total and len({row[1] for row in rows}) == classes
    corpus = corpus_of([np.zeros(1)] * total, [0] * total, [row[2] for row in rows])
    assert data.find_gaps(source, corpus, "o", 0) == []
    corpus.length[corpus.pick(split)[:2]] = 0
    label = "fold 3" if split == "3" else split
    parts = [f"{label}: expected {part:,} clips, found {part - 2:,}"] if part else []
    assert data.find_gaps(source, corpus, "o", 0) == [
        *parts, f"all: expected {total:,} clips, found {total - 2:,}"]


FEATURES = "id,speaker,split,start,frames"


@pytest.mark.parametrize("header, row, kind, sentence", [
    ("id,speaker", "a,b", np.int8, "index.csv, line 2: no column 'split'"),
    (FEATURES, "", np.int8, "index.csv: no rows"),
    (FEATURES, "a,b,train,5", np.int8, "index.csv, line 2: no column 'frames'"),
    (FEATURES, "a,b,validation,0,5", np.int8, r"splits \['validation'\].*expected train, valid"),
    (FEATURES, "a,b,train,5,5", np.int8, "at least the 10 frames"),
    (FEATURES, "a,b,train,0,9", np.float32, "float32 .* expected int8")])
def test_bad_tables_and_features_are_answered_with_a_sentence(
        tmp_path, header, row, kind, sentence):
    np.save(tmp_path / "features.npy", np.zeros((9, 4), kind))
    write_table(tmp_path / "index.csv", header, [row])
    with pytest.raises(ValueError, match=sentence):
        data.open_corpus("features", tmp_path)
    with pytest.raises(ValueError, match=r"(?s)UrbanSound8K.csv is missing.*audio/fold1.*download"):
        data.open_corpus("urbansound8k", tmp_path)


@pytest.fixture
def damaged(tmp_path):
    """ESC-50's layout in small with every kind of damage: (root, {clip: what must be said})."""
    root, rng = tmp_path / "root", np.random.default_rng(0)
    names = [f"{fold}-{i}.wav" for fold in range(1, 6) for i in range(12)]
    write_table(root / "meta/esc50.csv", "filename,fold,category",
                [f"{name},{name[0]},c{i % 2}" for i, name in enumerate(names)])
    (root / "audio").mkdir()
    noise = lambda channels: rng.uniform(-0.5, 0.5, (3000, channels))
    for name in names:
        (root / "audio" / name).write_bytes(wav_bytes(noise(1)))
    files = broken_files(root / "audio")
    for name, clip in zip(files, names):  # put the broken ones in the place of good ones
        (root / "audio" / name).replace(root / "audio" / clip)
    (root / "audio/5-0.wav").unlink()
    (root / "audio/5-1.wav").write_bytes((root / "audio/1-11.wav").read_bytes())
    (root / "audio/5-2.wav").write_bytes(wav_bytes(noise(2), 44100, bits=24))
    (root / "audio/stray.wav").write_bytes(wav_bytes(noise(1)))
    return root, dict(zip(names, files.values())) | {"5-0.wav": "listed, but missing"}


def test_check_names_all_damage_of_an_official_corpus(damaged, tmp_path, capsys):
    root, said = damaged
    with pytest.raises(SystemExit, match="1"):
        data.main(["esc50", str(root), "--cache", str(tmp_path / "cache")])
    printed = capsys.readouterr().out
    for sentence in (
            *(f"fault: .*{clip}: .*{sentence}" for clip, sentence in said.items()),
            "fault: all: expected 2,000 clips, found 50", "fault: fold 5: expected 400 clips, fou",
            r"fault: audio/5-1.wav \(valid\) is the same as audio/1-11.wav \(test\)",
            "1 clips of 44100 Hz, 2 channel, 24-bit pcm", "50 clips of 16000 Hz, 1 channel, 16-bit",
            "train .* 18 to 18 a class .*0.19 / 0.19 / 0.19 s", "bad .*10 clips", "17 faults",
            "1 audio files are in no list and not used, the first is audio/stray.wav"):
        assert re.search(sentence, printed), (sentence, printed)


def test_training_stops_before_the_first_step_or_leaves_damage_out(damaged, tmp_path, capsys):
    root, said = damaged
    arguments = ["--data", "esc50", "--root", str(root), "--cache", str(tmp_path / "cache"),
                 "--init", "none", "--epochs", "1", "--steps", "1", "--frames", "20", "--rank", "1",
                 "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match=r"10 of 60 clips of esc50(?s:.)*1-0.wav(?s:.)*--skip-"):
        train.main(arguments)
    assert not (tmp_path / "out").exists()
    train.main([*arguments, "--skip-bad", "--no-valid"])
    printed = capsys.readouterr().out
    assert "10 unusable clips are left out" in printed and "the last epoch is" in printed
    assert "note: all: expected 2,000 clips, found 50" in printed


@pytest.fixture
def voxceleb(tmp_path):
    """Two trees below one root, in two depths; the lists; speakers id1000x are VoxCeleb1's."""
    root, rng = tmp_path / "root", np.random.default_rng(0)
    for number in range(48):
        place, clip = "dev/aac/id0000" if number > 15 else "vox1/wav/id1000", number % 4
        path = root / f"{place}{number // 4}/video{clip}/0000{clip}.wav"
        path.parent.mkdir(parents=True)
        path.write_bytes(wav_bytes(rng.uniform(-0.5, 0.5, (3000, 1))))
    name = lambda speaker, clip: f"id1000{speaker}/video{clip}/0000{clip}.wav"
    write_table(root / "veri_test2.txt", f"1 {name(0, 0)} {name(0, 1)}",
                [f"0 {name(0, 0)} {name(1, 1)}"])
    write_table(root / "list_test_hard2.txt", f"1 {name(0, 0)} {name(0, 1)}",
                [f"0 {name(speaker, 0)} {name(3, 1)}" for speaker in range(3)])
    return root, lambda **options: data.open_corpus("voxceleb", root, tmp_path / "cache", **options)


def test_voxcelebs_test_speakers_never_train_and_that_is_said(voxceleb):
    for trials, tested in (("o", 2), ("h", 4)):
        corpus = voxceleb[1](trials=trials)
        training, held, strangers = (people(corpus, s, -3) for s in ("train", "valid", "test"))
        assert (len(training), len(held), len(strangers)) == (10 - tested, 2, tested)
        assert len(training | held) == 12 - tested and len(corpus.classes) == 10 - tested
        assert f"{tested} speakers are in the trials" in " ".join(corpus.notes)
        assert corpus.trials["valid"]
    assert corpus.ids[corpus.trials["test"][0][1]] == "vox1/wav/id10000/video0/00000.wav"
    assert corpus.gaps == ["list_test_hard2.txt: expected 550,894 trials, found 4"]
    assert data.find_gaps(data.CORPORA["voxceleb"], corpus, "h", 550894) == []
    corpus = voxceleb[1](valid=False)
    assert len(corpus.classes) == 10 and "valid" not in corpus.trials
    for trials, sentence in (("x", "choose from o, e, h"),
                             ("e", "(?s)list_test_all2.txt is missing.*--download brings its l")):
        with pytest.raises(ValueError, match=sentence):
            voxceleb[1](trials=trials)


def test_a_voxceleb_clip_that_only_the_list_knows_is_missing(voxceleb):
    root, open_it = voxceleb
    with open(root / "veri_test2.txt", "a") as file:
        file.write("\n0 id10000/video0/00000.wav id10002/video2/00002.wav\n")
    (root / "vox1/wav/id10001/video1/00001.wav").unlink()
    with pytest.raises(ValueError, match="(?s)1 of 48 clips.*id10001/video1/00001.wav: listed"):
        open_it()
    corpus = open_it(skip_bad=True)
    assert len(corpus.trials["test"]) == 2 and len(corpus.bad) == 1


@real_data
@pytest.mark.parametrize("name, folder, sizes, classes", [
    ("esc50", "ESC-50", [4, 10, 6], 4), ("speechcommands", "speech_commands_v0.02", [10, 5, 5], 9),
    ("fsdd", "fsdd", [2430, 270, 300], 10), ("features", "korean220", None, 180)])
def test_real_corpora_have_their_official_split(cache, name, folder, sizes, classes):
    corpus = data.open_corpus(name, REAL / folder, cache)
    splits = ("train", "valid", "test")
    assert sizes in (None, [len(corpus.pick(split)) for split in splits]) and not corpus.bad
    assert len(corpus.classes) == classes and corpus.store.std() > 5
    if name == "fsdd":
        assert {clip[-5] for clip in np.array(corpus.ids)[corpus.pick("test")]} == set("01234")
    if name == "features":
        speakers = [people(corpus, split) for split in splits]
        assert [len(s) for s in speakers] == [180, 20, 20] and len(set.union(*speakers)) == 220
        assert corpus.mels == 40 and len(corpus.trials["test"]) == 20000
        assert sum(label for label, _, _ in corpus.trials["test"]) == 3800


@pytest.fixture
def server():
    """A web server on the loopback interface. `files` {path: bytes}; `hang_up`: it drops the
    connection half way, without a word on the length; `asked`: the paths it was asked for."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def do_GET(self):
            body = self.server.files.get(self.path)
            self.server.asked.append(self.path)
            self.send_response(200 if body else 404)
            self.end_headers()
            self.wfile.write((body or b"")[: len(body or b"") // (2 if self.server.hang_up else 1)])

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.files, server.asked, server.hang_up = {}, [], False
        server.url = f"http://127.0.0.1:{server.server_address[1]}"
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


BODY = np.random.default_rng(0).bytes(300_000)


def test_a_download_is_whole_and_checked_or_answered_with_a_sentence(server, tmp_path):
    server.files["/a.zip"] = BODY
    get = lambda name, sha256="": data.download(f"{server.url}/{name}", tmp_path / name, sha256)
    with pytest.raises(ValueError, match="invalid hash value .*by hand and save it as .*a"):
        get("a.zip", "0" * 64)
    assert not list(tmp_path.iterdir())
    for sha256 in (hashlib.sha256(BODY).hexdigest(), ""):  # the second time it is there
        assert get("a.zip", sha256).read_bytes() == BODY and len(server.asked) == 2
    with pytest.raises(ValueError, match=f"{server.url}/b .*404.*by hand"):
        get("b")
    server.shutdown()
    server.server_close()
    with pytest.raises(ValueError, match=f"{server.url}/a .*refused.*by hand"):
        get("a")


def archive(kind, members, link=None):
    """Bytes of a zip or tar.gz of {name: bytes}, and a link (type, target)."""
    file = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(file, "w") as out:
            for name, body in members.items():
                out.writestr(name, body)
        return file.getvalue()
    with tarfile.open(fileobj=file, mode="w:gz") as out:
        for name, body in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(body)
            out.addfile(info, io.BytesIO(body))
        if link:
            info = tarfile.TarInfo("link")
            info.type, info.linkname = link
            out.addfile(info)
    return file.getvalue()


@pytest.mark.parametrize("kind, name, link", [
    *((kind, name, None) for kind in ("zip", "tar") for name in (
        "../evil", "a/../../evil", "/tmp/evil-of-the-tests", "C:/evil", "..\\evil")),
    ("tar", "good", (tarfile.SYMTYPE, "../..")), ("tar", "good", (tarfile.LNKTYPE, "/etc/passwd")),
    ("tar", "good", (tarfile.FIFOTYPE, ""))])
def test_an_archive_writes_nothing_outside_its_folder(tmp_path, kind, name, link):
    (tmp_path / "a").write_bytes(archive(kind, {"top/first": b"1", name: b"2"}, link))
    with contextlib.suppress(ValueError):  # tar refuses it, zip leaves the member out
        data.unpack(tmp_path / "a", tmp_path / "root")
    outside = [p for p in tmp_path.rglob("*") if tmp_path / "root" not in (p, *p.parents)]
    assert not outside and not Path("/tmp/evil-of-the-tests").exists()
    assert not any(p.is_symlink() or p.is_fifo() for p in tmp_path.rglob("*"))


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_unpacking_takes_off_the_top_folder_and_a_damaged_archive_leaves_nothing(
        tmp_path, kind, monkeypatch):
    body = archive(kind, {"top/a/b.wav": BODY, "top/list.txt": b"x", "__MACOSX/top": b""})
    path, root, other = tmp_path / "archive", tmp_path / "root", tmp_path / "other"
    path.write_bytes(body)
    data.unpack(path, root)
    assert sorted(p.name for p in root.iterdir()) == ["a", "list.txt"]
    assert (root / "a/b.wav").read_bytes() == BODY and not path.exists()
    damaged = bytearray(body)
    damaged[len(body) // 2] ^= 255
    for wrong in (body[:-50_000], bytes(damaged), b"<html>404</html>"):
        path.write_bytes(wrong)
        with pytest.raises(ValueError, match="archive is damaged .* the same command gets it"):
            data.unpack(path, other)
        assert not list(other.glob("*")) and not path.exists()
    path.write_bytes(body)
    monkeypatch.setattr(os, "replace", raising(OSError(28, "No space left")))
    with pytest.raises(OSError, match="No space left"):  # which is no damage: the archive stays
        data.unpack(path, other)
    assert not list(other.glob("*")) and path.exists()


@real_data
@pytest.mark.parametrize("name, folder, kind, top, total", [
    ("esc50", "ESC-50", "zip", "ESC-50-master/", 2000),
    ("speechcommands", "speech_commands_v0.02", "tar", "./", 105829),
    ("fsdd", "fsdd", "zip", "free-spoken-digit-dataset-master/", 3000)])
def test_download_brings_a_corpus_in_its_official_layout(
        server, tmp_path, monkeypatch, capsys, name, folder, kind, top, total):
    """The real clips, packed as the official archive is; dropped half way, then run again."""
    paths = [p for p in sorted((REAL / folder).rglob("*")) if p.is_file()][:60]
    files = {p.relative_to(REAL / folder).as_posix(): p.read_bytes() for p in paths}
    body = archive(kind, {top + path: content for path, content in files.items()})
    server.files["/x." + kind], server.hang_up = body, True
    checked = data.CORPORA[name].sha256 and hashlib.sha256(body).hexdigest()
    assert bool(checked) == (name == "speechcommands")
    monkeypatch.setitem(data.CORPORA, name, replace(
        data.CORPORA[name], address=f"{server.url}/x.{kind}", sha256=checked))
    root, cache = tmp_path / "new/root", tmp_path / "cache"
    for sentence in ("invalid hash" if checked else "is damaged", "1", "1"):
        with pytest.raises(SystemExit, match=sentence):
            data.main([name, str(root), "--cache", str(cache), "--download"])
        server.hang_up = False
    clips = sum(path.endswith(".wav") for path in files)
    assert f"fault: all: expected {total:,} clips, found {clips}" in capsys.readouterr().out
    assert len(server.asked) == 2 and [p.suffix for p in cache.iterdir()] == [".packed"]
    assert {path: (root / path).read_bytes() for path in files} == files  # once for two calls
    assert not list(root.glob(".*"))


@pytest.mark.parametrize("name, sentence", [
    ("fluentspeech", "(?s)has none.*train_data.csv.*by the form"), ("sounds", "has none"),
    ("esc50", "needs --root")])
def test_what_cannot_be_downloaded_is_answered_with_where_to_ask(name, sentence):
    with pytest.raises(ValueError, match=sentence):
        data.download_corpus(name, "")


def test_sounds_are_the_same_on_every_machine_and_twins_differ_by_order_alone(cache):
    corpus = data.open_corpus("sounds", cache=cache)
    assert [len(corpus.pick(s)) // 12 for s in ("train", "valid", "test")] == [80, 20, 40]
    assert np.array_equal(data.sound("sounds/rain/train-3"), data.sound("sounds/rain/train-3"))
    assert not set(data.SOURCE) & set(data.TARGET)
    # The mean spectrum tells classes apart, but not twins: order is not in it.
    clips = np.concatenate([corpus.pick("train"), corpus.pick("test")])
    batch = data.load_batch(corpus, clips, 98)
    x = data.features(batch, AST("nano")).mean(1)  # (clips, 128)
    x = x - x.mean(1, keepdim=True)  # whatever the level
    fit = torch.tensor(corpus.splits[clips] == "train")

    def told_apart(a, b):
        """Accuracy of the nearest mean between two classes."""
        rows = [batch.labels == corpus.classes.index(name) for name in (a, b)]
        centres = torch.stack([x[fit & row].mean(0) for row in rows])
        guess = [torch.cdist(x[~fit & row], centres).argmin(1).float().mean() for row in rows]
        return float((1 - guess[0] + guess[1]) / 2)

    plain = [name for name in corpus.classes if ">" not in name]
    others = np.mean([told_apart(a, b) for i, a in enumerate(plain) for b in plain[:i]])
    twins = np.mean([told_apart(name, ">".join(reversed(name.split(">"))))
                     for name in ("ping>thud", "high>low", "slow>fast")])
    assert others > 0.8 and twins < 0.65, (others, twins)


def test_voices_are_told_apart_by_no_average_spectrum(tmp_path, monkeypatch):
    few_voices(monkeypatch)
    corpus = data.open_corpus("voices", cache=tmp_path)
    speakers = [people(corpus, split, 1) for split in data.VOICES]
    assert [len(s) for s in speakers] == [12, 4, 20] and len(set.union(*speakers)) == 36
    speaker = [clip.split("/")[1] for clip in corpus.ids]
    for trials in corpus.trials.values():
        assert sum(label for label, _, _ in trials) == len(trials) / 2
        assert all(label == (speaker[a] == speaker[b]) for label, a, b in trials)
    clip = int(corpus.pick("test")[7])
    wave = corpus.store[corpus.start[clip] :][: corpus.length[clip]]
    assert np.array_equal(wave, data.to_int16(data.voice(corpus.ids[clip])))  # alone, in any order
    means = torch.zeros(len(corpus.ids), 80)
    for length in np.unique(corpus.length):
        group, frames = np.flatnonzero(corpus.length == length), data.frames_of(length)
        for batch in data.batches(corpus, group, 64, frames, train=False):
            means[batch.clips] = data.fbank(batch.x / 32768, 80).mean(1)
    labels, left, right = (np.array(column) for column in zip(*corpus.trials["test"]))
    for centre in (torch.zeros(80), means[corpus.pick("train")].mean(0)):
        scores = F.cosine_similarity(means[left] - centre, means[right] - centre)
        assert 0.2 < sv.equal_error_rate(scores.numpy(), labels) < 0.4


def test_augmentation_hides_and_rolls_within_its_bounds():
    torch.manual_seed(0)
    x = torch.ones(200, 50, 40)
    hidden = data.augment_features(x, spec_f=8, spec_t=10) == 0  # (B, T, F)
    bands, stretches = hidden.all(1).sum(1), hidden.all(2).sum(1)
    assert bands.max() <= 8 and stretches.max() <= 10 and bands.float().mean() > 2
    assert data.augment_features(x) is x
    ramp = torch.arange(50.0).expand(200, 50)[:, :, None]
    rolled = data.augment_features(ramp, shift=5)[:, :, 0]  # (B, T)
    assert rolled.sort(1).values.equal(ramp[:, :, 0])
    start = (rolled.argmin(1) + 5) % 50
    assert start.max() == 10 and start.min() == 0
    wave, zeros = torch.ones(200, 100), torch.zeros(200, dtype=torch.int64)
    louder = data.augment_waves(data.Batch(wave, zeros + 100, zeros, zeros.numpy()), 1, 0, gain=6.0)
    decibels = 20 * louder.x.log10()  # a clip is louder as a whole, its padding stays silent
    assert decibels.std(1).max() < 1e-4 and 5 < decibels.abs().max() <= 6


def test_a_faster_voice_is_higher_and_another_speaker():
    torch.manual_seed(0)
    frames, labels = 100, torch.arange(30) % 5
    size = data.samples_of(data.frames_at_speed(frames))
    tone = 9000 * torch.sin(2 * math.pi * 1000 * torch.arange(size) / 16000).repeat(30, 1)
    lengths = torch.tensor([size, 8000]).repeat(15)
    batch = data.perturb_speed(data.Batch(tone, lengths, labels, np.arange(30)), frames, 5)
    assert batch.x.shape == (30, data.samples_of(frames))
    speed = torch.tensor([1, 0.9, 1.1])[batch.labels // 5]  # (B,)
    assert (batch.labels % 5 == labels).all() and len(set(speed.tolist())) == 3
    peak = torch.fft.rfft(batch.x * torch.hann_window(batch.x.shape[1])).abs().argmax(1)
    assert_close(peak * 16000 / batch.x.shape[1], 1000 * speed, atol=2, rtol=0)
    assert (batch.lengths[::2] == batch.x.shape[1]).all()
    assert_close(batch.lengths[1::2].float(), 8000 / speed[1::2], atol=1, rtol=0)


def test_a_room_is_a_convolution_that_keeps_the_direct_path_in_place_and_the_energy():
    rng = np.random.default_rng(0)
    x, rooms = rng.standard_normal((3, 500)), 0.1 * rng.standard_normal((3, 120))
    rooms[range(3), [0, 40, 119]] = 2.0  # the direct path: at once, late, last of all
    wet = data.reverberate(torch.from_numpy(x), torch.from_numpy(rooms)).numpy()
    for row, delay in enumerate((0, 40, 119)):
        expected = np.convolve(x[row], rooms[row])[delay : delay + 500]
        expected *= np.linalg.norm(x[row]) / np.linalg.norm(expected)
        np.testing.assert_allclose(wet[row], expected, atol=1e-9)
    assert (data.reverberate(torch.zeros(3, 500), data.make_rooms(3, "cpu")) == 0).all()


@pytest.mark.parametrize("kind", ["generated", "folder"])
def test_noise_has_the_ratio_that_is_asked_for(tmp_path, kind):
    torch.manual_seed(0)
    folder_corpus(tmp_path / "noises", classes=1)
    x, lengths = 1000 * torch.randn(20, data.samples_of(60)), torch.full((20,), 5000)
    x[:, 5000:] = 0  # padding is no part of the signal's power
    noise = kind if kind == "generated" else data.open_sounds(tmp_path / "noises", tmp_path / "c")
    added = data.add_noise_and_rooms(x, lengths, noise, "", 0.6, (7, 7)) - x
    added = added[:, :5000].square().mean(1)  # (B,) power
    assert (added > 0).sum() == 12  # a share of 60 %
    ratio = 10 * (x.square().sum(1) / 5000 / added).log10()[added > 0]
    assert_close(ratio, torch.full((12,), 7.0), atol=0.01, rtol=0)
    both = data.add_noise_and_rooms(x, lengths, noise, noise, 1, (7, 7))
    assert (both != x).any(1).all()
    with pytest.raises(ValueError, match="no audio files below"):
        data.open_sounds(tmp_path / "c")


# --------------------------------------------------------------------------------------------------
# 2. The AST


@hugging_face
@pytest.mark.parametrize("layers, file, frames, columns, start", [
    (12, "memory.pt", 1024, 101, 0), (2, "memory.pt", 1024, 101, 0),  # version 5's names
    (2, "model.safetensors", 1024, 101, 0),  # the names on disk
    (2, "model.safetensors", 500, 49, 26), (2, "model.safetensors", 100, 9, 46)])
@torch.inference_mode()
def test_outputs_equal_hugging_faces(
        tmp_path, monkeypatch, layers, file, frames, columns, start):
    """With random weights, tokens and positions; shorter clips: theirs are cropped here by hand."""
    import transformers

    torch.manual_seed(0)
    model = transformers.ASTModel(transformers.ASTConfig(num_hidden_layers=layers)).eval()
    for name, p in model.named_parameters():
        p.data.add_(torch.randn_like(p) * (0.02 if "embeddings" in name else 0.05 * (p.ndim == 1)))
    if file == "memory.pt":
        torch.save(model.state_dict(), tmp_path / file)
    else:
        model.save_pretrained(tmp_path)
    positions = model.embeddings.position_embeddings  # (1, 1214, D)
    grid = positions[:, 2:].unflatten(1, (12, 101))[:, :, start : start + columns].flatten(1, 2)
    positions.data = torch.cat([positions[:, :2], grid], 1)
    monkeypatch.setitem(ast_adapters.SIZES, "base", (768, layers, 12, (12, 101)))
    ast, x = AST("base", pool="cls").eval(), torch.randn(1, frames, 128)
    said = ast_adapters.load_pretrained(ast, tmp_path / file)
    assert "Hugging Face" in said and "eps 1e-12" in said
    assert_close(ast(x), model(x).pooler_output, atol=1e-4, rtol=0)


def original_layout(ast):
    """An AST's weights under the names of the original checkpoint, q, k and v in one matrix."""
    state, ours = {}, ast.state_dict()
    for key, value in ours.items():
        if re.search(r"attn\.[kv]\.", key):
            continue
        if ".attn.q." in key:
            value = torch.cat([ours[key.replace(".q.", f".{name}.")] for name in "qkv"])
        key = key.replace("attn.q.", "attn.qkv.").replace("attn.o.", "attn.proj.")
        state["module.v." + re.sub(r"^patch", "patch_embed.proj", key)] = value
    heads = ("module.mlp_head.0.weight", "module.v.head.weight")
    return state | {key: torch.zeros(5) for key in heads}


@pytest.mark.parametrize("stride, grid, colours", [
    (16, (8, 64), 1), (14, (9, 73), 1), (12, (10, 85), 1), (10, (12, 101), 1), (10, (12, 9), 1),
    (10, (14, 14), 3)])  # the last: ImageNet's square pictures
@torch.inference_mode()
def test_the_original_layout_loads_with_its_stride_grid_and_eps(tmp_path, stride, grid, colours):
    theirs, ours = AST("nano", stride=stride, grid=grid), AST("nano", eps=1e-12)
    state, grey = original_layout(theirs), theirs.patch.weight
    state["module.v.patch_embed.proj.weight"] = grey.repeat(1, colours, 1, 1) / colours
    torch.save(state, tmp_path / "a.pth")
    assert "original layout" in ast_adapters.load_pretrained(ours, tmp_path / "a.pth")
    assert ours.patch.stride == (stride, stride) and ours.grid == grid
    assert ours.norm.eps == ours.blocks[0].norm1.eps == 1e-6
    x = torch.randn(1, 1024, 128)
    assert_close(ours(x), theirs(x), atol=1e-6, rtol=0)


def test_positions_are_cropped_in_the_middle_or_interpolated():
    ast, index = AST("tiny"), torch.arange(12 * 101.0)
    ast.pos_embed.data[0, 2:] = index[:, None]  # position = its index
    for columns, start in ((9, 46), (12, 44), (39, 31), (49, 26), (50, 25), (101, 0)):
        rows = ast.positions(12, columns)[0, 2:, 0].reshape(12, columns)
        assert torch.equal(rows, index.reshape(12, 101)[:, start : start + columns])
    assert ast.positions(8, 9)[0, 2, 0] == 2 * 101 + 46  # fewer rows: from row 6 - 8 // 2
    longer = ast.positions(12, 202)[0, 2:, 0].reshape(12, 202)
    assert longer[0, 1] == 0.25 and longer[0, 2] == 0.75  # halves of a step, pixel centres kept


def test_attention_is_torchs_own():
    ours, theirs = ast_adapters.Attention(64, 4), nn.MultiheadAttention(64, 4, batch_first=True)
    x, qkv = torch.randn(2, 9, 64), (ours.q, ours.k, ours.v)
    theirs.in_proj_weight.data = torch.cat([linear.weight for linear in qkv]).detach()
    theirs.in_proj_bias.data = torch.cat([linear.bias for linear in qkv]).detach()
    theirs.out_proj.load_state_dict(ours.o.state_dict())
    assert_close(ours(x), theirs(x, x, x)[0])


@pytest.mark.parametrize("queries, keys", [(9, 9), (9, 14), (700, 700), (1500, 1500)])
def test_attention_written_out_in_bfloat16_is_torchs(queries, keys):
    """Outputs and gradients: with prefixes, in slices of heads, too long to be written out."""
    torch.manual_seed(0)
    wide = [torch.randn(2, 3, n, 32, dtype=torch.float64) for n in (queries, keys, keys, queries)]
    results = []
    for attend, dtype in ((ast_adapters.attend, torch.bfloat16),
                          (F.scaled_dot_product_attention, torch.float64)):
        *inputs, weight = (x.bfloat16().to(dtype).requires_grad_() for x in wide)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            out = attend(*inputs)
        results.append([out, *torch.autograd.grad(out, inputs, weight)])
    for ours, exact in zip(*results):
        assert ours.dtype == torch.bfloat16 and ours.shape == exact.shape
        assert (ours - exact).norm() < 0.01 * exact.norm()


class Payload:
    """Unpickled, it would make a file: a stand-in for a checkpoint that attacks."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


def safetensors(header, length=None):
    """The bytes of a file with this header and four more."""
    text = json.dumps(header).encode()
    return (length or len(text)).to_bytes(8, "little") + text + bytes(4)


def test_bad_checkpoints_are_refused_with_a_sentence(tmp_path):
    good = dict(dtype="F32", shape=[1], data_offsets=[0, 4])
    wrong = [dict(data_offsets="04"), dict(data_offsets=[-4, 0]), dict(data_offsets=[0, 400]),
             dict(shape="x")]
    headers = [[], {"a": 3}, *({"a": good | entry} for entry in wrong)]
    damaged = [b"no checkpoint", safetensors({}, 2**60), safetensors({"a": good}, 2**60),
               *map(safetensors, headers)]
    part = {k: v for k, v in AST("nano").state_dict().items() if k != "pos_embed"}
    for name, content, sentence in [
            ("code.pt", Payload(tmp_path / "owned"), "never run"),
            ("other.pt", {"a": torch.zeros(1)}, "is not an AST-nano: it has no"),
            ("part.pt", part, "it has no pos_embed"), ("text.pt", b"no checkpoint", "damaged"),
            ("tiny.pth", original_layout(AST("tiny")), "is not an AST-nano"),
            ("tensor.pt", torch.zeros(1), "holds a Tensor, not a dict"),
            *((f"{i}.safetensors", content, "damaged") for i, content in enumerate(damaged))]:
        if isinstance(content, bytes):
            (tmp_path / name).write_bytes(content)
        else:
            torch.save(content, tmp_path / name)
        with pytest.raises(ValueError, match=f"{name} .*{sentence}"):
            ast_adapters.load_pretrained(AST("nano"), tmp_path / name)
    with pytest.raises(ValueError, match="no checkpoint at"):
        ast_adapters.load_pretrained(AST("nano"), tmp_path / "none.pt")
    with pytest.raises(ValueError, match="load into a plain AST: this one carries 'linear'"):
        ast_adapters.load_pretrained(adapt(AST("nano"), "linear"), tmp_path / "tiny.pth")
    assert not (tmp_path / "owned").exists()


# --------------------------------------------------------------------------------------------------
# 3. The methods

COUNTS = [  # P1 and its code, on AST-base, without the head (Conformer without the dead LayerNorm)
    ("linear", {}, 1_536), ("bitfit", {}, 102_144), ("full", {}, 86_187_264),
    ("prompt-shallow", dict(tokens=300), 231_936), ("prompt-deep", dict(tokens=25), 231_936),
    ("prefix", dict(tokens=24), 222_720), ("lora", dict(rank=6), 222_720),
    ("lora", dict(rank=12), 443_904), ("adapter", dict(rank=12), 250_512),
    ("adapter", dict(rank=24), 471_840), ("adapter", dict(rank=48), 914_496),
    ("adapter", dict(rank=12, where="both"), 499_488),
    ("conformer", dict(kernel=31), 272_256 - 18_432),
    ("conformer", dict(kernel=8), 270_048 - 18_432),
    ("conformer", dict(where="both"), 542_976 - 2 * 18_432),
    ("dense-moa", {}, 923_724), ("soft-moa", {}, 923_640)]


def test_counts_of_parameters_are_the_published_ones():
    with torch.device("meta"):
        totals = [count(AST(size))[2] for size in ("tiny", "small", "base")]
        assert totals == [5_621_568, 21_859_968, 86_187_264]
        for method, options, trainable in COUNTS:
            assert count(adapt(AST("base"), method, **options))[0] == trainable, (method, options)


CASES = [(method, {}) for method in METHODS] + [
    ("lora", dict(targets="qkvo", alpha=3.0)), ("lora", dict(targets="q")),
    ("dora", dict(targets="qk")), ("adapter", dict(where="mhsa")),
    ("conformer", dict(where="both", kernel=8)), ("convpass", dict(where="both")),
    ("soft-moa", dict(slots=3, where="mhsa")), ("dense-moa", dict(experts=2, where="both")),
    *((method, dict(form="sequential", at=at, where=where)) for method in ("adapter", "conformer")
      for at in ("before", "after") for where in ("ffn", "mhsa"))]
IDS = ["-".join([m, *(f"{k}={v}" for k, v in o.items())]) for m, o in CASES]
all_methods = pytest.mark.parametrize("method, options", CASES, ids=IDS)
# Counted in the paper and of no effect: a bias on the keys shifts all scores of a query alike, and
# the softmax does not see it; BatchNorm removes the bias of the convolution before it.
BLIND = re.compile(r"attn\.k\.(linear\.|layer\.)?(bias|shift)|depthwise\.bias")


def pair(method, options, **ast_options):
    """A plain nano AST and its adapted twin with the same weights."""
    torch.manual_seed(0)
    plain = AST("nano", **ast_options)
    return plain, adapt(copy.deepcopy(plain), method, **options)


def steps(ast, x, number=2):
    """A few optimiser steps that pull the embedding somewhere; returns names without a gradient."""
    torch.manual_seed(1)
    optimiser = torch.optim.SGD([p for p in ast.parameters() if p.requires_grad], lr=0.05)
    target = torch.randn(len(x), ast.embed_dim)
    for _ in range(number):
        optimiser.zero_grad()
        (ast(x) * target).sum().backward()
        optimiser.step()
    return {n for n, p in ast.named_parameters()
            if p.requires_grad and (p.grad is None or not p.grad.any())}


@all_methods
def test_a_method_starts_as_the_frozen_model_moves_its_own_and_lives_in_its_file(
        method, options, tmp_path):
    plain, ast = pair(method, options)
    x, before = torch.randn(3, 100, 128), copy.deepcopy(ast.state_dict())
    with torch.no_grad():
        frozen = plain.eval()(x)
        same = torch.allclose(frozen, ast.eval()(x), atol=1e-6)
    assert same != (method in ("prompt-shallow", "prompt-deep", "prefix"))  # those add tokens
    trained = {n for n, p in ast.named_parameters() if p.requires_grad}
    own_buffers = {n for n, _ in ast.named_buffers()}
    silent = steps(ast.train(), x)
    moved = {k for k, v in ast.state_dict().items() if not torch.equal(v, before[k])}
    assert moved <= trained | own_buffers
    assert all("adapter" in name for name in own_buffers)  # BatchNorm of the Conformer adapter
    dead = silent | (trained - moved)
    assert all(BLIND.search(name) for name in dead), dead

    torch.save(ast_adapters.adapter_state(ast), tmp_path / "adapter.pt")
    state = torch.load(tmp_path / "adapter.pt", weights_only=True)
    twin = ast_adapters.load_adapter(plain, state).eval()
    assert torch.equal(twin(x), ast.eval()(x)) and torch.equal(plain(x), frozen)
    if method != "full":
        assert sum(v.numel() for v in state["weights"].values()) < 2e5  # of 3e5
        plain.blocks[0].mlp.fc1.bias.data += 1
        with pytest.raises(ValueError, match="was trained on backbone"):
            ast_adapters.load_adapter(plain, state)


@all_methods
def test_a_method_takes_any_length_bfloat16_and_torch_compile(method, options, monkeypatch):
    blocks = 2 if method == "prompt-deep" else 1  # compiling is slow; this one has two kinds
    monkeypatch.setitem(ast_adapters.SIZES, "nano", (16, blocks, 2, (12, 9)))
    ast = pair(method, options)[1].eval()
    for frames in (16, 57, 100, 250):
        x = torch.randn(2, frames, 128)
        with torch.autocast("cpu", torch.bfloat16):
            assert_close(ast(x).float(), ast.float()(x), atol=0.1, rtol=0)
    if not options:
        torch._dynamo.reset()
        compiled = torch.compile(ast, backend="aot_eager", fullgraph=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=method == "prefix"):
            assert_close(compiled(x), ast(x))


@pytest.mark.parametrize("method", ["lora", "conformer"])
def test_checkpointing_changes_no_gradient(method):
    """But the Conformer adapter's BatchNorm moves as with momentum 1 - (1 - 0.1) ** 2 = 0.19."""
    ast, x = pair(method, {})[1].train(), torch.randn(3, 100, 128)
    twin = copy.deepcopy(ast)
    twin.checkpointing = True
    steps(ast, x, number=1), steps(twin, x, number=1)
    for p, again in zip(ast.parameters(), twin.parameters()):
        assert p.grad is again.grad is None or torch.equal(p.grad, again.grad)
    for (name, once), twice in zip(ast.named_buffers(), twin.buffers()):
        assert "running_mean" not in name or torch.allclose(twice, 1.9 * once)


@pytest.mark.parametrize("method, options", [
    ("lora", dict(targets="qkvo", alpha=20.0)), ("lora", {}), ("dora", dict(targets="qv", rank=3))])
def test_merge_leaves_a_plain_ast_with_equal_outputs(method, options):
    plain, ast = pair(method, options)
    x = torch.randn(3, 100, 128)
    steps(ast, x)
    frozen, expected, state = plain(x), ast(x), ast_adapters.adapter_state(ast)
    merged = ast_adapters.merge(ast)
    assert merged.state_dict().keys() == plain.state_dict().keys() and not merged.adaptation
    assert_close(merged(x), expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(expected, frozen, atol=1e-3)
    # A merged twin leaves the backbone it shared its weights with alone.
    assert_close(ast_adapters.merge(ast_adapters.load_adapter(plain, state))(x), merged(x))
    assert torch.equal(plain(x), frozen)
    with pytest.raises(ValueError, match="merge folds lora and dora"):
        ast_adapters.merge(adapt(plain, "adapter"))


@pytest.mark.parametrize("method", ["linear", "full", "lora", "adapter", "conformer"])
def test_without_positions_only_the_conformer_adapter_sees_order(method):
    """P1's published code trains with zero positions (README, B1): what could it tell apart?"""
    x = torch.randn(2, 96, 128)
    swapped = torch.cat([x[:, 48:], x[:, :48]], 1)  # with stride 16: the same patches, permuted
    for pos_embed, blind in (("zero", method != "conformer"), ("crop", False)):
        _, ast = pair(method, {}, stride=16, grid=(8, 6), pos_embed=pos_embed)
        steps(ast, x)
        if pos_embed == "zero" and method == "full":
            nn.init.zeros_(ast.pos_embed)
        with torch.no_grad():
            assert torch.allclose(ast.eval()(x), ast(swapped), atol=1e-4) == blind


def test_lora_and_dora_by_hand():
    linear, x = nn.Linear(5, 4), torch.randn(3, 5)
    lora, dora = ast_adapters.LoRA(linear, 2, alpha=6), ast_adapters.DoRA(linear, 2, alpha=2)
    nn.init.normal_(lora.B), nn.init.normal_(dora.B), dora.m.data.mul_(2)
    assert_close(lora(x), x @ (linear.weight + 3 * lora.B @ lora.A).T + linear.bias)
    weight = (dora(torch.eye(5)) - linear.bias).T  # (4, 5): each row has length m
    assert_close(weight.norm(dim=1), dora.m[:, 0])


def test_conformer_adapter_by_hand():
    """Against torch's layers in the paper's order, an even kernel padded less on the left."""
    unit, x = ast_adapters.Conformer(8, rank=3, kernel=4).eval(), torch.randn(2, 7, 8)
    nn.init.normal_(unit.up.weight)
    y = F.pad(F.glu(unit.down(x), 2), (0, 0, 1, 2))  # (2, 7, 3) -> (2, 1 + 7 + 2, 3)
    taps = unit.depthwise.weight[:, 0].T  # (4, 3)
    y = torch.stack([(y[:, t : t + 4] * taps).sum(1) for t in range(7)], 1)  # (2, 7, 3)
    y = (y + unit.depthwise.bias) / math.sqrt(1 + unit.norm.eps)  # a fresh BatchNorm
    assert_close(unit(x), unit.up(F.silu(y)))


def test_convpass_convolves_the_grid_and_leaves_the_two_tokens_alone():
    unit, x = ast_adapters.Convpass(8, rank=3, rows=4), torch.randn(1, 2 + 4 * 5, 8)
    nn.init.normal_(unit.up.weight)
    changed = x.clone()
    changed[:, 2 + 1 * 5 + 2] += 1  # row 1, column 2
    differs = (unit(x) != unit(changed)).any(2)[0]
    near = torch.zeros(4, 5, dtype=torch.bool)
    near[0:3, 1:4] = True
    assert not differs[:2].any() and torch.equal(differs[2:].reshape(4, 5), near)


def test_mixtures_by_hand():
    dense, x = ast_adapters.DenseMoA(8, 2, experts=3), torch.randn(2, 5, 8)
    soft = ast_adapters.SoftMoA(8, 2, experts=3, slots=2)
    for expert in (*dense.experts, *soft.experts):
        nn.init.normal_(expert.up.weight)
    share = F.softmax(dense.router(x), 2)
    expected = torch.stack([expert(x) for expert in dense.experts], 3) @ share[..., None]
    assert_close(dense(x), expected[..., 0])
    for b in range(2):  # one clip at a time, as the equations stand in the paper
        logits = x[b] @ soft.phi  # (5, 6)
        slots = logits.softmax(0).T @ x[b]  # (6, 8)
        outputs = torch.cat([soft.experts[i](slots[2 * i : 2 * i + 2]) for i in range(3)])
        assert_close(soft(x)[b], logits.softmax(1) @ outputs)


def test_placement_by_hand():
    f, a, u = nn.Linear(4, 4), nn.Linear(4, 4), torch.randn(2, 4)
    for *options, expected in (
            ("parallel", "after", True, f(u) + a(u)),
            ("sequential", "after", True, f(u) + a(f(u))), ("sequential", "after", False, a(f(u))),
            ("sequential", "before", True, f(u + a(u))), ("sequential", "before", False, f(a(u)))):
        assert_close(ast_adapters.Placed(f, a, *options)(u), expected)


BAD_OPTIONS = [
    ("lorra", {}, "unknown method 'lorra': choose from full, linear"),
    ("linear", dict(rank=3), "unknown option of 'linear' 'rank': it has none"),
    ("lora", dict(kernel=3), "unknown option of 'lora' 'kernel': choose from rank, alpha, targets"),
    ("lora", dict(targets="qx"), "name some of q, k, v, o"),
    ("lora", dict(rank=65), "at most 64"), ("adapter", dict(rank=0), "at least 1"),
    ("adapter", dict(where="top"), "choose from ffn, mhsa, both"),
    ("adapter", dict(at="before"), "for form='sequential'"),
    ("conformer", dict(kernel=111), "at most 110"), ("prefix", dict(tokens=7), "7 is odd")]


def test_bad_options_and_inputs_are_answered_with_a_sentence():
    for method, options, sentence in BAD_OPTIONS:
        with pytest.raises(ValueError, match=re.escape(sentence)):
            adapt(AST("nano"), method, **options)
    with pytest.raises(ValueError, match=r"at least 16 frames, 128 mel bins\), got \(2, 100, 64\)"):
        AST("nano")(torch.randn(2, 100, 64))


# --------------------------------------------------------------------------------------------------
# 4. lightweight_sv.py: counts, lightening, pooling, head, scoring, cost

SLIM = {"amcrn": dict(width=16), "resnet34": dict(width=8), "ecapa-tdnn": dict(width=64)}
HOSTS = sorted(SLIM)


def slim(name, **options):
    torch.manual_seed(0)
    return sv.MODELS[name](mels=40, embed_dim=24, **SLIM[name], **options)


def parameters(module):
    return sum(p.numel() for p in module.parameters())


@pytest.mark.parametrize("name, width, subsets, millions, giga, room", [
    ("resnet34", 32, 1, 6.634, 4.528, 0.002), ("ecapa-tdnn", 512, 1, 6.191, 1.037, 0.002),
    ("ecapa-tdnn", 1024, 1, 14.657, 2.649, 0.002), ("resnet34", 32, 4, 2.7, 1.25, 0.1),
    ("ecapa-tdnn", 512, 4, 3.0, 0.45, 0.2)])
def test_hosts_have_the_published_counts_and_light_ones_keep_their_budget(
        name, width, subsets, millions, giga, room):
    encoder = sv.MODELS[name](width=width, subsets=subsets)
    counts = parameters(encoder) / 1e6, sv.count_macs(encoder, frames=200) / 1e9
    assert counts == pytest.approx((millions, giga), rel=room)
    assert subsets == 1 or (counts[0] <= millions and counts[1] <= giga)


@pytest.mark.parametrize("shape", [(3, 24, 1, 50), (3, 24, 5, 10)])
def test_module_starts_as_the_identity_and_moves_after_one_step(shape):
    module, x = sv.TransformationModule(24, subsets=4), torch.randn(shape)
    assert torch.equal(module(x), x)
    (module(x) * torch.randn(shape)).sum().backward()
    assert (module.gamma.grad != 0).all()
    torch.optim.SGD(module.parameters(), lr=0.1).step()
    assert not torch.allclose(module(x), x)


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("name", HOSTS)
def test_every_parameter_has_a_gradient_by_the_second_step_under_autocast_too(name, share):
    encoder, x, y = slim(name, subsets=2, share=share), torch.randn(4, 60, 40), torch.arange(4)
    head = sv.AAMSoftmax(24, 5)
    optimizer = torch.optim.SGD(encoder.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        F.cross_entropy(head(encoder(x), y), y).backward()
        optimizer.step()
    assert not [n for n, p in encoder.named_parameters()    # a dead bias has rounding noise
                if p.grad is None or p.grad.abs().max() < 1e-7]
    with torch.autocast("cpu", torch.bfloat16):
        F.cross_entropy(head(encoder(x), y), y).backward()
    assert all(torch.isfinite(p.grad).all() for p in encoder.parameters())


@pytest.mark.parametrize("name", HOSTS)
def test_every_fusion_runs_shrinks_the_host_and_reloads(name):
    x, sizes = torch.randn(2, 60, 40), []
    for options in (dict(), dict(subsets=4), dict(subsets=4, fusion="none"),
                    dict(subsets=4, fusion="mean"), dict(subsets=4, share=True)):
        encoder, again = slim(name, **options).train(), slim(name, **options).eval()
        assert encoder(x).shape == (2, encoder.embed_dim) and encoder.mels == 40
        again.load_state_dict(encoder.state_dict())
        assert_close(again(x), encoder.eval()(x))
        sizes.append(parameters(encoder))
    plain, module, none, mean, shared = sizes
    assert plain > module > none == mean > shared


BLOCKS = [(sv.BasicBlock, 16, 32, dict(stride=2), (2, 16, 6, 10)),
          (sv.SERes2Block, 32, 32, dict(dilation=2, bottleneck=4), (2, 32, 1, 20)),
          (sv.MultiScaleBlock, 16, 32, {}, (2, 16, 1, 20)),
          (sv.RecurrentBlock, 32, 32, {}, (2, 32, 1, 20))]


@pytest.mark.parametrize("block, d_in, d_out, options, shape", BLOCKS)
def test_groups_never_hear_of_each_other_and_shared_ones_have_the_same_weights(
        block, d_in, d_out, options, shape):
    torch.manual_seed(0)
    module, x = block(d_in, d_out, groups=2, **options).eval(), torch.randn(shape)
    changed = x.clone()
    changed[:, :d_in // 2] += 1
    before, after = module(x).chunk(2, dim=1), module(changed).chunk(2, dim=1)
    assert torch.equal(before[1], after[1]) and not torch.allclose(before[0], after[0])
    assert parameters(module) == 2 * parameters(block(d_in // 2, d_out // 2, **options))
    light = sv.Lightened(block, d_in, d_out, 2, True, "none", **options).eval()
    x[:, d_in // 2:] = x[:, :d_in // 2]
    y = light(x).chunk(2, dim=1)
    assert_close(y[0], y[1])
    assert_close(y[0], light.block(x[:, :d_in // 2]))


@pytest.mark.parametrize("kernel, dilation, groups", [(1, 1, 1), (1, 1, 4), (5, 1, 1), (3, 4, 2)])
def test_convolutions_are_those_of_torch(kernel, dilation, groups):
    conv, x = sv.Conv(8, 16, groups, kernel, dilation), torch.randn(1, 8, 20)
    assert_close(conv(x.unsqueeze(2)).squeeze(2), nn.Conv1d.forward(conv, x))
    context = torch.randn(1, 16)
    beside = torch.cat([x, context.unsqueeze(2).expand(-1, -1, 20)], dim=1)
    conv = sv.ContextConv(24, 5)
    assert_close(conv(x.unsqueeze(2), context).squeeze(2), nn.Conv1d.forward(conv, beside))


def test_attentive_pooling_by_hand():
    pool = sv.AttentivePooling(3, bottleneck=4)
    nn.init.zeros_(pool.up.weight)                      # equal scores: plain mean and deviation
    x = torch.randn(2, 3, 1, 9)
    expected = torch.cat([x.mean(-1), x.std(-1, correction=0)], dim=1).squeeze(2)
    assert_close(pool(x), expected)
    assert_close(sv.mean_and_std(x), expected)
    stats = sv.mean_and_std(torch.tensor([[[[1.0, 3.0]]]]), torch.tensor([0.25, 0.75]))
    assert_close(stats, torch.tensor([[2.5, math.sqrt(0.25 * 2.25 + 0.75 * 0.25)]]))


@pytest.mark.parametrize("name", HOSTS)
def test_bad_sizes_are_answered_with_a_sentence(name):
    with pytest.raises(ValueError, match=r"subsets=3 does not divide .*these would: 1, 2"):
        slim(name, subsets=3)
    with pytest.raises(ValueError, match=r"40 mel bins\), got \(2, 60, 80\)"):
        slim(name)(torch.randn(2, 60, 80))
    with pytest.raises(ValueError, match="unknown fusion 'sum', expected one of: module, mean"):
        slim(name, subsets=2, fusion="sum")


def test_macs_by_hand_and_no_trace_left():
    class Toy(nn.Module):
        def __init__(self):
            super().__init__()
            self.mels, self.conv = 6, nn.Conv1d(6, 8, 3, padding=1, groups=2)
            self.lstm = nn.LSTM(8, 5, num_layers=2, batch_first=True, bidirectional=True)
            self.linear = nn.Linear(10, 7)

        def forward(self, x):
            return self.linear(self.lstm(self.conv(x.transpose(1, 2)).transpose(1, 2))[0])

    toy, threads = Toy(), torch.get_num_threads()
    conv, linear = 50 * 8 * 3 * 3, 50 * 10 * 7
    lstm = 50 * 2 * 4 * 5 * ((8 + 5) + (10 + 5))        # frames, directions, gates, layers
    cost = sv.complexity(toy, frames=50) | {"step_ms": sv.time_ms(toy, 50, batch=2, repeats=1)}
    assert cost["macs"] == conv + linear + lstm and cost["latency_ms"] > 0 < cost["step_ms"]
    assert all(p.grad is None for p in toy.parameters())
    assert toy.training and torch.get_num_threads() == threads
    assert not any(m._forward_hooks for m in toy.modules())


def test_aam_softmax_by_hand():
    head = sv.AAMSoftmax(2, 2, margin=0.2, scale=30)
    head.weight.data = torch.tensor([[2.0, 0.0], [0.0, 3.0]])
    x = torch.tensor([[math.cos(0.5), math.sin(0.5)]]) * 7
    plain = 30 * torch.tensor([[math.cos(0.5), math.sin(0.5)]])
    assert_close(head(x), plain)
    plain[0, 0] = 30 * math.cos(0.5 + 0.2)              # the margin is the true speaker's alone
    assert_close(head(x, torch.tensor([0])), plain)
    head.margin = 0.0
    assert_close(head(x, torch.tensor([0])), head(x))
    for sign in (1, -1):                                # the gradient where both are parallel
        x = (sign * head.weight.detach()[:1]).requires_grad_()
        F.cross_entropy(head(x, torch.tensor([0])), torch.tensor([0])).backward()
        assert torch.isfinite(x.grad).all() and torch.isfinite(head.weight.grad).all()


def draw(seed, targets, others, shift):
    random = np.random.RandomState(seed)
    return random.randn(targets) + shift, random.randn(others)


VECTORS = [([.4, .5, .6], [.1, .2, .3], 0, 0, 0), ([.1, .2, .3], [.4, .5, .6], 100, 1, 1),
           ([.9, .8, .7, .3], [.6, .5, .2, .1], 25, .25, .25),
           ([.9, .8, .4], [.7, .5, .3, .2, .1], 100 / 3, 1 / 3, 1 / 3),
           ([.5, .5, .9, .9], [.5, .1, .1, .9], 100 / 3, 1, 1), ([.5, .5], [.5, .5], 50, 1, 1),
           (*draw(1, 37, 113, 2), 14.159292, .675676, .675676),
           (*draw(0, 1000, 10000, 3), 6.8, .632, .4313)]


@pytest.mark.parametrize("targets, others, eer, dcf_01, dcf_05", VECTORS)
def test_metric_vectors_whatever_the_order(targets, others, eer, dcf_01, dcf_05):
    scores = np.concatenate([targets, others])
    labels = np.r_[np.ones(len(targets)), np.zeros(len(others))]
    for order in (np.arange(len(scores)), np.arange(len(scores))[::-1],
                  np.random.RandomState(0).permutation(len(scores))):
        s, y = scores[order], labels[order]
        assert 100 * sv.equal_error_rate(s, y) == pytest.approx(eer, abs=1e-6)
        assert sv.min_dcf(s, y, 0.01) == pytest.approx(dcf_01, abs=1e-6)
        assert sv.min_dcf(s, y, 0.05) == pytest.approx(dcf_05, abs=1e-6)


def test_threshold_and_the_errors_at_it():
    scores, labels = [.9, .8, .7, .3, .6, .5, .2, .1], [1, 1, 1, 1, 0, 0, 0, 0]
    assert sv.error_rates_at(scores, labels, sv.threshold_at(scores, labels)) == (.25, .25)
    assert sv.error_rates_at(scores, labels, .3) == (0, .5)


@pytest.mark.parametrize("scores, labels, sentence", [
    ([.1, .2], [1, 1], "no non-target trials"), ([.1, .2], [0, 0], "no target trials"),
    ([.1, np.nan], [0, 1], "1 of 2 scores are not finite"), ([.1], [0, 1], "one label for each")])
def test_bad_trials_are_answered_with_a_sentence(scores, labels, sentence):
    with pytest.raises(ValueError, match=sentence):
        sv.equal_error_rate(scores, labels)


def test_adaptive_s_norm_by_hand():
    a, b = [1.0, 0.0], [0.0, 2.0]
    cohort = [[3.0, 4.0], [4.0, 3.0], [-1.0, 0.0]]
    # cosines: a .6 .8 -1, b .8 .6 0; the best two of each: mean .7, std .1 (ddof 0)
    score = sv.adaptive_s_norm([0.9], [[0, 1]], [a, b], cohort, top_n=2)
    assert score == pytest.approx([2.0])
    # all three: a mean .4/3, b 1.4/3
    left, right = np.std([.6, .8, -1], ddof=1), np.std([.8, .6, 0], ddof=1)
    expected = ((0.9 - .4 / 3) / left + (0.9 - 1.4 / 3) / right) / 2
    score = sv.adaptive_s_norm([0.9], [[0, 1]], [a, b], cohort, top_n=300, ddof=1)
    assert score == pytest.approx([expected])


def test_score_files_are_read_and_checked_against_their_trials(tmp_path, capsys):
    scores, trials = tmp_path / "scores.txt", tmp_path / "trials.txt"
    lines = [f"a b{i} {score} {label}" for i, (score, label) in
             enumerate([(.9, 1), (.8, 1), (.7, 1), (.3, 1), (.6, 0), (.5, 0), (.2, 0), (.1, 0)])]
    scores.write_text("\n".join(lines) + "\n")
    trials.write_text("\n".join(f"{line[-1]} a b{i}" for i, line in enumerate(lines)))
    sv.main([str(scores), str(trials)])
    assert "8 trials, 4 of one speaker: EER 25.000 %, minDCF(p 0.01) 0.2500" in \
        capsys.readouterr().out
    for changed, sentence in ((lines[:7], "scores 7 of the 8 trials"),
                              ([lines[1], *lines[1:]], "line 1: a b1 1 is not trial 1 of"),
                              ([*lines, "a c .5 0"], "line 9: a c 0 is not trial 9"),
                              (["a b .5 yes"], "line 1: expected `id_a id_b score label`")):
        scores.write_text("\n".join(changed))
        with pytest.raises(SystemExit, match=re.escape(sentence)):
            sv.main([str(scores), str(trials)])


# --------------------------------------------------------------------------------------------------
# 5. train.py and the README

TRAIN = [sys.executable, str(HERE / "train.py")]
README = (HERE / "README.md").read_text(encoding="utf-8")
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A folder corpus, a nano AST to start from, and settings of a run of a second."""
    folder = tmp_path_factory.mktemp("train")
    folder_corpus(folder / "root")
    torch.manual_seed(0)
    ast, init = AST("nano"), folder / "nano.pt"
    torch.save(dict(encoder=ast.state_dict(), settings=ast.settings), init)
    return folder, dict(data="folder", root=str(folder / "root"), cache=str(folder / "cache"),
                        method="lora", init=str(init), epochs=3, batch_size=4, frames=50,
                        device="cpu", bf16=False)


def run(settings, out, **changes):
    return train.run(train.Config(**settings | changes, out=str(out)))


def told(*arguments):
    """What a command prints, with the sentence that it ends with."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            train.main([str(argument) for argument in arguments])
        except SystemExit as stopped:
            out.write(f"\nended with {stopped.code}")
    return out.getvalue()


def as_flags(settings):
    return [part for k, v in settings.items() if k != "bf16"
            for part in (f"--{k.replace('_', '-')}", str(v))] + ["--no-bf16"]


def weights(out):
    return torch.load(out / "last.pt", weights_only=True)["model"]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def log_of(out, key="epoch"):
    lines = (out / "log.jsonl").read_text().splitlines() if (out / "log.jsonl").exists() else []
    return [json.loads(line)[key] for line in lines]


def stop_after(patch, saves):
    """Let Ctrl-C come behind so many epochs; return the growing list of their folders."""
    save_last, saved = train.save_last, []

    def save_and_stop(out, *state):
        save_last(out, *state)
        saved.append(out.name)
        if len(saved) == saves:
            raise KeyboardInterrupt
    patch.setattr(train, "save_last", save_and_stop)
    return saved


@pytest.mark.parametrize("changes", [dict(method="lora"), dict(
    method="conformer", noise="generated", reverb="generated", gain=6.0)], ids=str)
def test_a_resumed_run_equals_an_unbroken_one_bit_for_bit(small, tmp_path, changes):
    """Killed twice at random moments, and each time begun again by the same command."""
    settings, whole, out = small[1] | dict(changes, epochs=10), tmp_path / "whole", tmp_path / "run"
    results = run(settings, whole)
    for _ in range(2):
        done, process = log_of(out), subprocess.Popen(
            [*TRAIN, *as_flags(settings), "--out", out, "--resume"], stdout=subprocess.DEVNULL)
        while log_of(out) == done and process.poll() is None:
            time.sleep(0.002)
        time.sleep(np.random.default_rng().uniform(0, 0.1))  # training, evaluating, saving
        process.kill()
        assert process.wait() == -9
        torch.load(out / "best.pt", weights_only=True)
    resumed = run(settings, out, resume=True)
    assert same(weights(whole), weights(out)) and {**results, "seconds": 0} == {
        **resumed, "seconds": 0}
    assert log_of(out) == list(range(1, 11))  # none twice, none missing


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_another_run_other_clips_or_a_full_disk_change_no_checkpoint(small, tmp_path, monkeypatch):
    out, clip = tmp_path / "run", tmp_path / "root/class1/3.wav"
    folder_corpus(tmp_path / "root")
    settings = small[1] | dict(root=str(tmp_path / "root"))
    stop_after(monkeypatch, 1)
    told(*as_flags(settings), "--out", out)
    good, sound = (out / "last.pt").read_bytes(), clip.read_bytes()
    (out / "last.pt.part").symlink_to("/dev/full")  # every write there answers: no space left
    for changes, content, sentence in (
            (dict(lr=0.5), sound, "configuration (lr 0.01 -> 0.5)"),
            ({}, sound, "holds this run already"),
            (dict(resume=True), sound[:-2000] + bytes(2000), "run was begun on other clips"),
            (dict(resume=True), sound, "last.pt could not be written ([Errno 28] No space left")):
        clip.write_bytes(content)
        with pytest.raises((ValueError, OSError), match=re.escape(sentence)):
            run(settings, out, **changes)
        assert (out / "last.pt").read_bytes() == good, sentence
    run(settings, out, resume=True)
    assert log_of(out) == [1, 2, 3] and not list(out.glob("*.part"))


# What each of two processes runs: the last run of the sweep fails in the second process.
WORKER = """
import sys
sys.path.insert(0, {here!r})
import train
fit, check_loss = train.fit, train.check_loss
def fit_or_fail(cfg, *rest):
    if cfg.method == "ssf" and train.RANK == 1:
        train.check_loss = lambda loss, *rest: check_loss(loss * float("nan"), *rest)
    return fit(cfg, *rest)
train.fit = fit_or_fail
train.main()
"""


def test_two_processes_learn_what_one_learns_and_end_each_other(small, tmp_path):
    (tmp_path / "worker.py").write_text(WORKER.format(here=str(HERE)))
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
         "worker.py", *as_flags(small[1]), "--sweep", "method=lora,ssf", "--out", "two"],
        cwd=tmp_path, text=True, capture_output=True, timeout=240)
    one, two = tmp_path / "one", tmp_path / "two/method=lora"
    results = run(small[1], one)
    assert_close(weights(two), weights(one), atol=1e-4, rtol=1e-5)
    assert log_of(one, "loss") == pytest.approx(log_of(two, "loss"), abs=1e-5)
    shared = json.loads((two / "results.json").read_text())  # each tested half of the clips
    assert shared["accuracy"] == results["accuracy"] and done.stdout.count("lora on folder") == 1
    assert done.returncode == 1 and not (tmp_path / "two/method=ssf/last.pt").exists()
    assert re.search(r"error in process 1: the loss became nan in .* class\d/", done.stderr)


@pytest.fixture(scope="module")
def classifier(small):
    """A nano AST that tells the three tones of `small` apart: (path of best.pt, results)."""
    out = small[0] / "classifier"
    return out / "best.pt", run(small[1], out, epochs=10, method="conformer", seed=3)


def test_a_run_leaves_its_files_and_best_is_not_the_live_model(small, classifier, tmp_path):
    best, results = classifier
    out, saved, plain = best.parent, torch.load(best, weights_only=True), AST("nano")
    assert results == json.loads((out / "results.json").read_text()) and results["seed"] == 3
    assert saved["epoch"] == 1 + np.argmax(log_of(out, "valid")) < len(log_of(out)) == 10
    assert (out / "adapter.pt").stat().st_size < best.stat().st_size / 5
    ast_adapters.load_pretrained(plain, small[0] / "nano.pt")
    twin = ast_adapters.load_adapter(plain, torch.load(out / "adapter.pt")["adapter"])
    assert same(twin.state_dict(), saved["encoder"])
    run(small[1], tmp_path, batch_size=10**6)
    assert max(log_of(tmp_path, "clips_per_second")) < 1e5  # there are 21, not a million


def test_what_no_epoch_changes_is_computed_once_and_changes_nothing(small, tmp_path, monkeypatch):
    for n, changes in enumerate((dict(), dict(method="linear"), dict(frames=20), dict(gain=20.0),
                                 dict(model="ecapa-tdnn", width=16, init=""))):
        kept, plain = tmp_path / f"kept{n}", tmp_path / f"plain{n}"
        run(small[1], kept, **changes)
        with monkeypatch.context() as patch:
            patch.setattr(train, "cache_inputs", lambda cfg, corpus, *rest: (corpus, cfg.frames))
            run(small[1], plain, **changes)
        assert_close(weights(kept), weights(plain), atol=1e-4, rtol=1e-5)


def test_the_profile_times_the_real_loop_and_writes_nothing(small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    printed = told("--profile", *as_flags(small[1] | dict(batch_size=16)))
    *lines, step, products = map(float, re.findall(r"([\d.]+) \| *[\d.]+% \|$", printed, re.M))
    assert 0.8 * step < sum(lines) < 1.01 * step and 0 < products < step
    assert " loss.backward() |" in printed and not list(tmp_path.iterdir())


def test_rate_and_margin_follow_the_steps_of_an_ast_that_learns_speakers(
        verified, small, tmp_path, monkeypatch):
    cfg = train.Config(lr=2.0, warmup=0.1)
    rates = [train.learning_rate(cfg, step, 100) for step in (0, 9, 55, 99)]
    assert rates == pytest.approx([0.2, 2.0, 1.0, 0.0], abs=1e-3)
    forward, margins, root = sv.AAMSoftmax.forward, [], verified[1]["root"]
    monkeypatch.setattr(sv.AAMSoftmax, "forward", lambda head, *inputs: (
        margins.append(head.margin) or forward(head, *inputs)))
    run(small[1], tmp_path, root=root, epochs=2, steps=5, margin_rise=0.5)
    assert margins[:10] == pytest.approx([.04, .08, .12, .16, .2, .2, .2, .2, .2, .2])


def test_weight_decay_leaves_scales_biases_and_norms_alone():
    for method in METHODS:
        model = train.Model(adapt(AST("nano"), method), ast_adapters.LinearHead(64, 3))
        optimiser = train.make_optimiser(train.Config(lr=0.1, weight_decay=0.5), model, CPU)
        decayed = [p for g in optimiser.param_groups if g["weight_decay"] for p in g["params"]]
        ids = {id(p) for p in decayed}
        names = {name for name, p in model.named_parameters() if id(p) in ids}
        assert "head.weight" in names, method
        assert not {n for n in names if n.endswith(("bias", "scale", "shift", ".m", "norm.weight"))}


@pytest.mark.parametrize("corpus, recipe", [  # P1, section 3.1
    ("esc50", (500, 32, 50, 24, 80)), ("urbansound8k", (400, 32, 30, 24, 80)),
    ("speechcommands", (100, 128, 75, 0, 0)), ("fluentspeech", (400, 32, 75, 0, 0))])
def test_presets_are_p1s_recipes_and_what_is_typed_wins(corpus, recipe):
    for method, rate in dict(full=5e-5, linear=1e-3, bitfit=5e-3, lora=5e-3, prefix=1e-2).items():
        cfg = train.with_preset(train.Config(data=corpus, model="ast-base", method=method))
        assert (cfg.frames, cfg.batch_size, cfg.epochs, cfg.spec_f, cfg.spec_t) == recipe
        assert (cfg.lr, cfg.weight_decay, cfg.warmup) == (rate, 0.1, 0)
    assert train.with_preset(train.Config(data=corpus, epochs=2)).epochs == 2


ABSENT = "cuda" if torch.backends.mps.is_available() else "mps"
RANDOM = "--method full --init none"
BAD_COMMANDS = [  # command, part of the sentence that answers
    ("--data nope", "--data: invalid choice: 'nope'"), ("--lrr 1", "unrecognized arguments: --lrr"),
    ("--data folder", "--data folder needs --root"), ("--data voices --noise nope", "nope"),
    ("--data esc50 --root empty", "esc50.csv is missing"), ("--init code.pt", "is never run"),
    ("--evaluate code.pt", "is never run"), ("--data features --root empty", "no features.npy"),
    ("--data voxceleb --root empty", "Ask for the audio by the form at https:"),
    ("--model ast-base", "needs --init"), ("--init audioset", "add --model ast-base"),
    ("--model ecapa-tdnn --rank 3", "does not read it"), ("--subsets 4", "does not read it"),
    ("--rank 99", "at most 64"), ("--evaluate x --predict y", "predict exclude each other"),
    ("--sweep rank=2,many", "invalid int"), ("--sweep batch-size=8,0", "0: expected at least 1"),
    ("--evaluate x --epochs 7", "read by train, compare, sweep, profile, not by evaluate"),
    ("--evaluate x --fold 2", "was trained"), ("--evaluate x --durations 0.03", "at least 0.16"),
    ("--as-norm", "not by train"), ("--lr -1", "expected at least 0"), ("--lr nan", "expected"),
    ("--margin 3", "expected at least 0 and at most 1.5"), ("--snr 3", "nothing without --noise"),
    ("--fold 1", "sounds has no folds"), ("--trials e", "sounds has no lists of trials"),
    ("--data features --root empty --speed-perturb", "--data features has no audio"),
    (f"{RANDOM} --device {ABSENT}", "is not here"), (f"{RANDOM} --speed-perturb", "has no trials"),
    (f"{RANDOM} --frames 100000", "longest training clip"), (f"{RANDOM} --out code.pt", "a file")]


def test_bad_input_is_answered_with_a_sentence_and_nothing_is_made(tmp_path, monkeypatch, small):
    (tmp_path / "empty").mkdir()
    torch.save(Payload(tmp_path / "owned"), tmp_path / "code.pt")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(data.COUNTS, "train", 2)
    for command, sentence in BAD_COMMANDS:
        printed = told(*command.split())
        assert sentence in printed and re.search("ended with (error|2)", printed), command
    assert set(os.listdir()) <= {"empty", "code.pt", "cache"}
    monkeypatch.setattr(train, "has_bf16", lambda device, fast=False: False)
    assert "--bf16: cpu has no bfloat16" in told("--bf16")
    monkeypatch.setattr(train, "WORLD", 2)
    cfg = train.with_preset(train.Config(**small[1] | dict(batch_size=32)))
    with pytest.raises(ValueError, match="21 clips a step do not divide among 2 processes"):
        train.check_corpus(cfg, train.open_corpus(cfg))


def test_folds_and_seeds_go_on_where_they_stopped(small, tmp_path, monkeypatch):
    # Noise, in four folds that have one, four, one and no clips of the second class.
    clips = [(str(n), str(int(n in (0, 1, 2, 5, 9, 13))), str(n % 4 + 1)) for n in range(16)]
    noise = lambda clip: np.random.default_rng(int(clip)).uniform(-1, 1, 8000)
    monkeypatch.setitem(data.CORPORA, "folded", data.Source(lambda _: clips, read=noise, folds=4))
    command = as_flags(small[1] | dict(data="folded", epochs=1, fold="all", seeds=2, out=tmp_path))
    saved = stop_after(monkeypatch, 5)
    assert "stopped; the same command with --resume" in told(*command)
    printed = told(*command, "--resume")
    runs = [(fold, seed) for fold in (1, 2, 3, 4) for seed in (0, 1)]
    assert saved == [f"ast-nano-lora-fold{f}-seed{s}" for f, s in runs]
    results = json.loads((tmp_path / "compare.json").read_text())["ast-nano-lora"]
    assert [(result["fold"], result["seed"]) for result in results] == runs
    right = [result["accuracy"] for result in results]
    assert f"{np.mean(right):.2f} ± {np.std(right, ddof=1):.2f}" in printed


def test_evaluate_and_predict_agree_also_on_clips_a_little_longer_than_the_crop(
        small, classifier, tmp_path):
    """A last window of a few frames once had the weight of a whole one: 84 fell to 6 %."""
    (folder, settings), (best, results) = small, classifier
    printed = told("--evaluate", best, "--durations", "0.3", "full")
    assert f"full  accuracy {results['accuracy']:.4g}" in printed and "0.3 s  acc" in printed
    elsewhere = ["--evaluate", best, "--cache", settings["cache"], "--data"]
    assert re.search("knows 3 classes.* has 12", told(*elsewhere, "sounds"))
    folder_corpus(tmp_path / "root")
    for path in (tmp_path / "root").rglob("*.wav"):  # longer, and in stereo
        wave = data.read_wav(path)[0].T.repeat(2, 1)
        path.write_bytes(wav_bytes(np.pad(wave, ((0, 1500), (0, 0)), mode="reflect")))
    printed = told(*elsewhere, "folder", "--root", tmp_path / "root")
    accuracy = float(re.search(r"accuracy ([\d.]+)", printed)[1])
    assert accuracy >= results["accuracy"] - 17  # one of six test clips
    corpus = data.open_corpus("folder", tmp_path / "root", settings["cache"])
    tested = [str(tmp_path / "root" / corpus.ids[i]) for i in corpus.pick("test")]
    told("--predict", tmp_path / "root", "--checkpoint", best, "--csv", tmp_path / "rows.csv")
    rows = [line.split(",") for line in (tmp_path / "rows.csv").read_text().splitlines()]
    right = [Path(row[0]).parent.name == row[1] for row in rows if row[0] in tested]
    assert len(right) == 6 and 100 * np.mean(right) == pytest.approx(accuracy, abs=0.1)
    assert sum(float(chance) for chance in rows[0][2::2]) == pytest.approx(1, abs=1e-3)


def test_a_best_pt_that_lacks_something_is_refused_with_a_sentence(classifier, tmp_path):
    whole = torch.load(classifier[0], weights_only=True)
    broken = [{k: v for k, v in whole.items() if k != lost} for lost in (
        "classes", "trials", "settings", "adaptation", "encoder", "head", "config", "threshold")]
    broken.append(whole | dict(head=dict(weight=torch.zeros(7, 7), bias=torch.zeros(7))))
    for saved in broken:
        torch.save(saved, tmp_path / "best.pt")
        with pytest.raises(ValueError, match="best.pt is no best.pt of this program"):
            train.load_checkpoint(tmp_path / "best.pt", "cpu")


def trial_corpus(root, classes=8):
    """A folder per speaker, and trials of the first two. Some have 150 ms: an AST reads 160."""
    folder_corpus(root, classes, clips=5)
    for path in root.glob("*/1.wav"):
        path.write_bytes(wav_bytes(data.read_wav(path)[0].T[:2400]))
    pairs = itertools.product((0, 1), (0, 1), range(4))
    (root / "trials.txt").write_text("\n".join(
        f"{int(a == b)} class{a}/{i}.wav class{b}/4.wav" for a, b, i in pairs))


@pytest.fixture(scope="module")
def verified(small, tmp_path_factory):
    """A speaker model trained with noise, rooms and speeds: (folder, settings, results)."""
    folder = tmp_path_factory.mktemp("verified")
    trial_corpus(folder / "root")
    settings = small[1] | dict(
        model="ecapa-tdnn", width=16, embed_dim=12, init="", root=str(folder / "root"),
        speed_perturb=True, noise=str(small[0] / "root"), reverb="generated")
    return folder, settings, run(settings, folder / "run")


def test_a_verification_run_leaves_scores_a_threshold_and_a_head_of_three_speeds(verified):
    folder, _, results = verified
    scores, labels = sv.read_scores(folder / "run/scores.txt", folder / "root/trials.txt")
    assert results["eer"] == pytest.approx(100 * sv.equal_error_rate(scores, labels), abs=1e-3)
    best = folder / "run/best.pt"
    saved = torch.load(best, weights_only=True)
    rates = [100 * rate for rate in sv.error_rates_at(scores, labels, saved["threshold"])]
    assert rates == pytest.approx([results["miss"], results["false_alarm"]])
    assert len(saved["head"]["weight"]) == 3 * len(saved["classes"]) == 12
    printed = told("--predict", folder / "root/class7/0.wav", "--checkpoint", best)
    assert printed.split()[1] in saved["classes"]  # a speaker at all speeds is one speaker


def test_a_speaker_model_is_tested_on_a_corpus_whose_trials_name_every_speaker(verified, tmp_path):
    """As VoxCeleb's lists E and H name all of VoxCeleb1: nobody trains in --evaluate."""
    folder, settings, results = verified
    trial_corpus(tmp_path / "root", classes=2)
    saved = torch.load(folder / "run/best.pt", weights_only=True)
    saved["config"]["root"] = "gone"  # so there is no cohort
    torch.save(saved, tmp_path / "gone.pt")
    command = ["--evaluate", folder / "run/best.pt", "--durations", "0.16", "full"]
    cut, full = told(*command).splitlines()[-2:]
    assert f"full  eer {results['eer']:.4g}" in full and "miss" in full
    assert full.split("full")[1] != cut.split("0.16 s")[1]
    elsewhere = ["--data", "folder", "--cache", settings["cache"], "--root", tmp_path / "root"]
    printed = told(*command, *elsewhere, "--as-norm")
    assert printed.count(" eer ") == 2 and "miss" not in printed  # the threshold is of cosines
    assert " eer " in told("--evaluate", tmp_path / "gone.pt", *elsewhere)
    assert "needs --root" in told("--evaluate", tmp_path / "gone.pt", *elsewhere, "--as-norm")


def test_verify_enrols_by_the_mean_of_the_embeddings_that_embed_writes(verified, tmp_path):
    folder, settings, _ = verified
    best, out = ["--checkpoint", folder / "run/best.pt"], tmp_path / "embeddings"
    files = [str(folder / f"root/class{name}.wav") for name in ("0/0", "0/1", "1/0")]
    told("--embed", *files, *best, "--out", out)
    unit = np.load(out / "embeddings.npy")
    assert (out / "names.txt").read_text().split() == files and unit.shape == (3, 12)
    score = (unit[0] + unit[1]) @ unit[2] / np.linalg.norm(unit[0] + unit[1])
    assert f"score {score:.4f}, threshold" in told("--verify", *files, *best)
    assert "same speaker" in told("--verify", files[0], files[0], *best)
    results = run(settings, tmp_path / "run", valid=False, epochs=1)
    assert "eer" in results and "miss" not in results  # no validation trials: no threshold


def test_a_speaker_model_goes_on_from_a_checkpoint_and_gives_a_cohort(verified):
    folder, settings, _ = verified
    saved = torch.load(folder / "run/best.pt", weights_only=True)
    cfg = train.with_preset(train.Config(
        **settings | dict(init=str(folder / "run/best.pt"), margin=0.5, speed_perturb=False)))
    corpus = train.open_corpus(cfg)
    model = train.build_model(cfg, corpus)
    assert same(model.encoder.state_dict(), saved["encoder"]) and model.head.margin == 0.5
    assert torch.equal(model.head.weight, saved["head"]["weight"][:4])  # at their own speed
    with pytest.raises(ValueError, match="holds another model"):
        train.build_model(replace(cfg, width=32), corpus)
    clips = np.flatnonzero((corpus.labels == 0) & (corpus.splits == "train"))
    strangers = train.cohort(cfg, corpus, model, CPU)
    assert_close(strangers[0], train.embeddings(cfg, corpus, model, clips, CPU).mean(0))


@pytest.fixture
def quick_source(monkeypatch):
    """Make the nano AST of the quick start in two steps."""
    source = replace(data.CORPORA["sounds-source"], recipe=dict(frames=100, epochs=1, steps=2))
    monkeypatch.setitem(data.CORPORA, "sounds-source", source)


def test_two_first_runs_on_one_cache_both_get_the_nano_ast_and_draw_the_same(
        quick_source, tmp_path, monkeypatch):
    monkeypatch.setitem(data.COUNTS, "train", 2)
    cfg = train.with_preset(train.Config(method="adapter", cache=str(tmp_path)))
    made, run_once, corpus = [], train.run, corpus_of([np.zeros(16000)], [0], ["train"])

    def run_twice(source):  # a second program begins, and ends, while the first one is at it
        made.append(source.out)
        if len(made) == 1:
            train.build_model(cfg, corpus)
        return run_once(source)
    monkeypatch.setattr(train, "run", run_twice)
    first, second = (train.build_model(cfg, corpus).state_dict() for _ in range(2))
    assert len(made) == 2 and same(first, second)  # the second came from the cache


@pytest.mark.skipif(not importlib.util.find_spec("matplotlib"), reason="no matplotlib here")
def test_figures_are_drawn_or_refused_before_any_work(
        small, classifier, verified, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags, best = as_flags(small[1] | dict(epochs=1)), verified[0] / "run/best.pt"
    use = ["--predict", small[0] / "root/class0/0.wav", "--checkpoint"]
    for n, (command, sentence) in enumerate((
            ([*flags, "--out", "run"], "drawn: 0.png"),
            ([*flags, "--sweep", "seed=0,1", "--out", "sweep"], "drawn: 1.png"),
            (["--evaluate", best], "drawn: 2.png"), ([*use, classifier[0]], "drawn: 3.png"),
            (["--evaluate", classifier[0]], "has none, but classes"), ([*use, best], "holds none"),
            (["--figure", "a.jpg"], "expected a name that ends in .png, .svg or .pdf"))):
        assert sentence in told("--figure", f"{n}.png", *command), command
    assert {"run", "sweep", "0.png", "1.png", "2.png", "3.png"} == set(os.listdir())


@torch.no_grad()
def test_the_drawn_attention_is_the_attentions_own():
    """Against the weights that torch's own layer returns, with a prompt between CLS and patches."""
    ast, x = adapt(AST("nano"), "prompt-shallow", tokens=3).eval(), torch.randn(1, 60, 128)
    inner, read = ast.blocks[-1].attn, []
    inner.register_forward_pre_hook(lambda module, inputs: read.append(inputs[0]))
    drawn = ast_adapters.cls_attention(ast, x)  # (1, 12, 5)
    theirs, qkv = nn.MultiheadAttention(64, 2, batch_first=True), (inner.q, inner.k, inner.v)
    theirs.in_proj_weight.data = torch.cat([linear.weight for linear in qkv])
    theirs.in_proj_bias.data = torch.cat([linear.bias for linear in qkv])
    weights = theirs(*read[:1] * 3)[1][:, 0]  # (1, N), the mean of the heads
    assert_close(drawn.flatten(1), weights[:, 2 + 3 :])


COMMANDS = re.findall(r"^(?:python|torchrun \S+) train\.py(.*?)(?:\s+#.*)?$", README, re.M)


def test_the_quick_start_and_the_readmes_commands_run(quick_source, tmp_path, cache, monkeypatch):
    """The README's commands as they stand, shortened by --epochs 1 and without real corpora."""
    train.pretrained_file(train.Config(cache=cache))
    skip = ("--root", "RUN", "--profile", "--compare", "--sweep", "CHECKPOINT", "--seeds")
    offline = {c for c in COMMANDS if not any(word in c for word in skip)}
    shortened = ["--epochs", "1", "--steps", "2", "--cache", cache]
    done = subprocess.run([*TRAIN, *shortened], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    monkeypatch.chdir(tmp_path)
    few_voices(monkeypatch)
    for arguments in sorted(offline - {""}):
        train.main([*shlex.split(arguments), *shortened])
    table = (tmp_path / "out/quick-start/compare.md").read_text()
    cells = lambda text: [[cell.strip() for cell in row.split("|")] for row in text.splitlines()]
    said = cells(README[README.index("|           | accuracy") :].split("```")[0])
    assert said[0] == cells(table)[0] and "" in offline
    for column in (1, 5, 6):  # names, trainable, share: what the shorter training does not change
        assert [row[column] for row in said] == [row[column] for row in cells(table)]
    (tmp_path / "cache").symlink_to(cache, target_is_directory=True)  # of the workshop's step 2
    shapes = re.search(r"```python\n(import data, train\n.*?)```", README, re.S)[1]
    answers = re.findall(r"\(16, [\d, ]+\)", README[README.index(shapes) + len(shapes) :])[:5]
    with pytest.raises(AssertionError, match="it is not"):
        exec(shapes, {})
    exec(re.sub(r"\(\)(?=\)[,)])", lambda found: answers.pop(0), shapes), {})


def test_every_setting_is_a_flag_and_every_command_of_the_readme_is_understood():
    flags = told("--help").replace(",", " ").split()
    assert {f"--{name.replace('_', '-')}" for name in train.Config.__dataclass_fields__} < {*flags}
    assert len(COMMANDS) > 15
    for arguments in COMMANDS:
        cfg, typed = train.parse(shlex.split(arguments))
        train.check(cfg, typed)
        if train.mode_of(cfg) in train.TRAINING:
            for variant in train.variants(cfg, typed)[1].values():
                train.check(train.with_preset(variant), typed)
    assert list(train.variants(*train.parse(["--rank=4"]))[1]) == ["ast-nano-conformer"]


def test_the_readmes_tables_are_what_the_code_counts_and_prints(capsys):
    rows = dict(re.findall(r"^\| `([\w-]+)` \| .* \| ([\d,]+) \| [\d.]+ % \|$", README, re.M))
    assert len(rows) == 15 and rows.keys() <= METHODS.keys()  # yours need no row
    ast_adapters.main()
    printed = capsys.readouterr().out
    for method, trainable in rows.items():
        assert re.search(rf"^{method} +{trainable} ", printed, re.M), (method, trainable)
    failed, tried = doctest.testmod(sv)
    assert not failed and tried
