"""Tests of the whole project: `python -m pytest -q`, two minutes on two cores, offline.

Sections 1 data.py, 2 the AST, 3 its methods, 4 lightweight_sv.py, 5 train.py and the README.
Each test states a claim and compares with something independent: torchaudio, Hugging Face,
published counts, values worked by hand. Real recordings are looked for in ../shared/data.
"""

import argparse
import contextlib
import copy
import csv
import doctest
import hashlib
import importlib.util
import io
import itertools
import json
import math
import os
import re
import shlex
import shutil
import struct
import subprocess
import sys
import tarfile
import time
import zipfile
from dataclasses import replace
from functools import partial
from pathlib import Path

os.environ.setdefault("GOMP_SPINCOUNT", "5000")  # as train.py does, before torch is imported

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing import assert_close

import ast_adapters
import data
import lightweight_sv as sv
import train
from ast_adapters import AST, METHODS, adapt, count, load_pretrained

HERE = Path(__file__).resolve().parent
REAL = HERE.parent / "shared" / "data"


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder to work in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """Packed corpora, made once for all tests."""
    return str(tmp_path_factory.mktemp("cache"))


# --------------------------------------------------------------------------------------------------
# 1. data.py: helpers first, then files, packing, splits, corpora, downloads, sounds, augmentation


def riff(*chunks):
    """A WAV file of chunks (name, body); one of odd size is padded."""
    whole = b""
    for name, body in chunks:
        whole += name + struct.pack("<I", len(body)) + body + bytes(len(body) % 2)
    return b"RIFF" + struct.pack("<I", 4 + len(whole)) + b"WAVE" + whole


def wav_bytes(wave, rate=16000, code=1, bits=16, extensible=False, width=None):
    """A WAV file from floats (n, channels), written by hand as the format's specification says.
    `width`: bytes of a sample, where it has more than its bits."""
    width = width or bits // 8
    channels = wave.shape[1]
    if code == 3:
        body = wave.astype(f"<f{width}").tobytes()
    else:
        top = 2 ** (bits - 1)
        steps = np.round(wave * top).clip(-top, top - 1).astype(np.int64) << 8 * width - bits
        if bits == 8:
            steps += 128  # bytes are unsigned
        body = b"".join((int(s) % 256**width).to_bytes(width, "little") for s in steps.ravel())
    tag = 0xFFFE if extensible else code
    block = width * channels
    form = struct.pack("<HHIIHH", tag, channels, rate, rate * block, block, bits)
    if extensible:
        form += struct.pack("<HHIH14x", 22, bits, 0, code)
    return riff((b"fmt ", form), (b"LIST", b"odd"), (b"data", body))


def noise(samples=3000):
    return np.random.default_rng(0).uniform(-0.5, 0.5, (samples, 1))


def save_clips(root, *names, wave=None, rate=16000):
    """Write a wave, (n,) or (n, channels), under several names; by default a noise of each."""
    for name in names:
        own = data.rng_of(name).uniform(-0.5, 0.5, 3000) if wave is None else wave
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(wav_bytes(own.reshape(len(own), -1), rate))


def corpus_of(waves, labels, splits):
    """A corpus in memory, as open_corpus would return it."""
    lengths = np.array([len(wave) for wave in waves])
    ids = [f"clip{i}" for i in range(len(waves))]
    classes = [str(c) for c in sorted(set(labels))]
    return data.Corpus("test", ids, np.array(labels), np.array(splits, object), classes,
                       np.cumsum(lengths) - lengths, lengths, np.concatenate(waves).astype("<i2"))


def folder_corpus(root, classes=3, clips=10):
    """A tone for each class, in clips of any level."""
    rng = np.random.default_rng(0)
    for label in range(classes):
        for clip in range(clips):
            wave = np.sin(np.arange(8000) * (label + 1) * 0.3) * rng.uniform(0.1, 0.9)
            save_clips(root, f"class{label}/{clip}.wav", wave=wave)


def write(path, *lines):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def people(corpus, part):
    """The speakers that train, validate and test: a part of each clip's path."""
    return [{corpus.ids[i].split("/")[part] for i in corpus.pick(split)}
            for split in ("train", "valid", "test")]


@pytest.mark.parametrize("code, bits, width, extensible", [
    (1, 8, 1, False), (1, 16, 2, True), (1, 24, 3, False), (1, 24, 4, False), (1, 12, 2, False),
    (1, 32, 4, False), (3, 32, 4, True), (3, 64, 8, False)])
def test_every_kind_of_plain_wav_is_read(tmp_path, code, bits, width, extensible):
    wave = np.random.default_rng(0).uniform(-0.99, 0.99, (1000, 3))
    path = tmp_path / "a.wav"
    path.write_bytes(wav_bytes(wave, 44100, code, bits, extensible, width))
    read, rate, remarks = data.read_wav(path)
    assert (read.shape, rate, read.dtype, remarks) == ((3, 1000), 44100, np.float32, [])
    step = 2.0**-bits if code == 1 else 0
    np.testing.assert_allclose(read.T, wave, atol=1e-7 + step)


@pytest.mark.parametrize("whole, sound, cut, expected", [
    (0xFFFFFFFF, 0xFFFFFFFF, 0, 3000), (100, 0x7FFFF000, 0, 3000), (100, 2_000_000_000, 0, 3000),
    (0, 0, 0, 3000), (48, 0, 0, 3000), (0x7FFFFFFF, 0, 0, 3000),  # of streams
    (6048, 6040, 0, 3000), (6048, 6000, 20, 2990), (6048, 6000, 200, "truncated: 6000 bytes"),
    (6048, 0, 0, "0 samples at 16 kHz are shorter")])  # then what follows is no sound
def test_a_headers_size_is_believed_where_it_can_be(tmp_path, whole, sound, cut, expected):
    content = bytearray(wav_bytes(noise()))
    content[4:8] = struct.pack("<I", whole)
    content[52:56] = struct.pack("<I", sound)
    (tmp_path / "a.wav").write_bytes(content[: len(content) - cut])
    try:
        found = len(data.read_audio(tmp_path / "a.wav"))
    except ValueError as error:
        found = str(error)
    assert found == expected or str(expected) in str(found), found


@pytest.mark.parametrize("behind, said", [
    (wav_bytes(noise())[60:], ["sound behind the length that the header gives (left out)"]),
    (wav_bytes(noise())[48:], ["sound behind the length that the header gives (left out)"]),
    (b"LIST" + bytes(500), []), (b"TAG" + b"a song".ljust(125, b"\0"), []), (b"\0\0", [])])
def test_sound_behind_the_length_of_the_header_is_named(tmp_path, behind, said):
    (tmp_path / "a.wav").write_bytes(wav_bytes(noise()) + behind)
    wave, remarks = data.read_clip(tmp_path / "a.wav")
    assert (len(wave), remarks) == (3000, said)


@pytest.mark.parametrize("content, sentence", [
    (b"", "the file is empty"), (b"no sound at all", "starts with b'no sound"),
    (wav_bytes(noise())[:30], "0 whole `fmt ` chunks|no `data`"),
    (wav_bytes(noise())[:44], "no `data` chunk"), (wav_bytes(noise(), code=7), "format 7, 16 bits"),
    (wav_bytes(noise(), code=1, bits=24, width=8), "24 bits, 1 channels in 8 bytes"),
    (b"RIFX" + wav_bytes(noise())[4:], "big-endian.* sox FILE"),
    (wav_bytes(noise(), 0), "0 Hz"), (wav_bytes(noise(100)), "100 samples .* one frame"),
    (wav_bytes(noise() + np.nan, code=3, bits=32), "not finite"), (None, "No such file")])
@pytest.mark.parametrize("decoder", [True, False])
def test_what_is_no_sound_is_said_to_be_none(tmp_path, monkeypatch, content, sentence, decoder):
    if content is not None:
        (tmp_path / "a.wav").write_bytes(content)
    if not decoder:
        monkeypatch.setitem(sys.modules, "torchcodec", None)
    with pytest.raises(ValueError, match=f"a.wav: .*({sentence})"):
        data.read_audio(tmp_path / "a.wav")


def test_without_torchcodec_the_sentence_says_so(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchcodec", None)
    (tmp_path / "a.flac").write_bytes(b"fLaC")
    with pytest.raises(ValueError, match="starts with b'fLaC'.*pip install torchcodec"):
        data.read_audio(tmp_path / "a.flac")


def test_a_decoder_that_loses_samples_of_a_compressed_wav_is_found_out(tmp_path, monkeypatch):
    """torchcodec 0.17 gives 12,216 of 44,100 samples of ADPCM, without a word."""
    form = struct.pack("<HHIIHHHH", 2, 1, 16000, 8000, 256, 4, 2, 500)  # 500 samples in 256 bytes
    (tmp_path / "a.wav").write_bytes(riff((b"fmt ", form), (b"data", bytes(2560))))
    monkeypatch.setattr(data.torchaudio, "load", lambda path: (torch.zeros(1, 3000), 16000))
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError, match="3000 of 5000 samples .* convert it: ffmpeg -i"):
        data.read_audio(tmp_path / "a.wav")
    monkeypatch.setattr(data.torchaudio, "load", lambda path: (torch.rand(1, 5000), 16000))
    assert len(data.read_audio(tmp_path / "a.wav")) == 5000, "all samples, and refused"
    (tmp_path / "a.wav").write_bytes((tmp_path / "a.wav").read_bytes()[:-500])
    with pytest.raises(ValueError, match="truncated"):  # FFmpeg reads what is left
        data.read_audio(tmp_path / "a.wav")


@pytest.mark.parametrize("change, level, remark", [
    (lambda wave: wave, 0.5, []), (lambda wave: 0 * wave, 0, ["digital silence"]),
    (lambda wave: 0 * wave + 2**-15, 2**-15, ["digital silence"]),
    (lambda wave: 1e-25 * wave, 5e-26, ["digital silence"]),
    (lambda wave: np.concatenate([wave, -wave]), 0.5, ["channels that cancel"]),
    (lambda wave: np.concatenate([wave, 0 * wave]), 0.25, []),
    (lambda wave: 2**15 * wave, 0.5, ["floats at the scale of integers"]),
    (lambda wave: 2**31 * wave, 0.5, ["floats at the scale of integers"]),
    (lambda wave: 2**38 * wave, 0.25, ["floats at the scale of integers"]),
    (lambda wave: 3 * wave, 1.5, ["floats beyond"]),
    (lambda wave: wave * 2**-17, 0.5, ["sound too quiet"])])
def test_what_a_recording_holds_is_looked_at_and_said(change, level, remark):
    wave = noise(16000).T.astype(np.float32)  # (1, samples)
    mono, remarks = data.inspect_wave(np.float32(change(wave)))
    assert [text.startswith(tuple(remark)) for text in remarks] == [True] * len(remark), remarks
    assert abs(np.abs(mono).max() - level) <= 0.11 * level


@pytest.mark.parametrize("rate", [8000, 44100, 44101])  # the last is a prime
def test_resampling_keeps_a_tone_at_its_frequency(tmp_path, rate):
    save_clips(tmp_path, "a.wav", wave=np.sin(2 * np.pi * 440 * np.arange(rate) / rate), rate=rate)
    wave = data.read_audio(tmp_path / "a.wav")
    assert abs(len(wave) - 16000) <= 1 and np.abs(np.fft.rfft(wave)).argmax() == 440  # of 1 Hz


def test_import_survives_a_torchaudio_that_does_not_fit_its_torch():
    """As with CPU-only torch or another CUDA version: the compiled extension refuses to load."""
    code = ("import sys, torch\n"
            "class Refuse:\n"
            "    def find_spec(self, name, path=None, target=None):\n"
            "        if name == 'torchaudio._extension':\n"
            "            raise OSError('libc10_cuda.so: cannot open shared object file')\n"
            "sys.meta_path.insert(0, Refuse())\nimport data\n"
            "resample = data.torchaudio.functional.resample\n"
            "print(len(resample(torch.zeros(80), 8000, 16000)))")
    done = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True)
    assert done.stdout.strip() == "160", done.stderr


@pytest.mark.parametrize("mels, bf16", [(40, False), (80, False), (128, False), (128, True)])
def test_fbank_equals_kaldis(mels, bf16):
    torch.manual_seed(0)
    waves = torch.randn(3, 9000) * torch.tensor([[1.0], [0.01], [0.0]])  # loud, quiet, silent
    kaldi = data.torchaudio.compliance.kaldi.fbank
    expected = torch.stack([
        kaldi(wave[None], htk_compat=True, sample_frequency=16000, use_energy=False, dither=0.0,
              window_type="hanning", num_mel_bins=mels, frame_shift=10) for wave in waves])
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):  # as in evaluation with --bf16
        assert_close(data.fbank(waves, mels), expected, atol=1e-3, rtol=0)


def test_features_have_asts_golden_values_and_those_of_an_utterance_no_mean():
    wave = np.random.default_rng(0).integers(-999, 999, 5000)
    corpus = corpus_of([np.zeros(8000), wave], [0, 0], ["train"] * 2)
    x = data.features(data.load_batch(corpus, np.array([0]), 100), AST("nano"))  # (1, 100, 64)
    sound = data.frames_of(8000)
    assert_close(x[0, :sound], torch.full((sound, 64), -1.27759), atol=1e-4, rtol=0)
    assert_close(x[0, sound:], torch.full((100 - sound, 64), 0.46703), atol=1e-4, rtol=0)
    batch = data.load_batch(corpus, np.array([1]), 50, repeat=True)
    mean = data.features(batch, slim("amcrn")).mean(1)
    assert_close(mean, torch.zeros(1, 40), atol=1e-5, rtol=0)


def test_batches_depend_on_seed_and_epoch_alone():
    waves = [np.arange(i * 1000, i * 1000 + 900) for i in range(20)]
    corpus = corpus_of(waves, [0] * 20, ["train"] * 20)
    draw = lambda **kw: list(data.batches(corpus, np.arange(20), 6, frames=3, seed=1, **kw))
    first = draw()
    assert len(first) == 3 and len({i for b in first for i in b.clips}) == 18, "a clip came twice"
    for a, b in zip(first, draw()):
        assert torch.equal(a.x, b.x) and (a.clips == b.clips).all(), "another batch, same seed"
    assert any((a.clips != b.clips).any() for a, b in zip(first, draw(epoch=1))), "same order"
    assert len({int(b.x[0, 0]) % 1000 for b in first}) > 1, "all crops start at one place"


def test_the_last_window_of_a_clip_is_moved_back_to_be_whole():
    corpus = corpus_of([np.zeros(16000), np.zeros(3000)], [0, 0], ["test", "test"])
    windows, owner = data.cut_windows(corpus, np.arange(2), 30)
    assert owner.tolist() == [0, 0, 0, 0, 1]
    assert windows.start.tolist() == [0, 5040, 10080, 16000 - 5040, 16000]
    assert windows.length.tolist() == [5040, 5040, 5040, 5040, 3000]


@pytest.mark.parametrize("name, sentence, left", [
    ("to_int16", "part: No space", 0), ("read_clip", "30 of 30 clips in .*root cannot be used", 1)])
def test_a_full_disk_makes_no_bad_clips(tmp_path, monkeypatch, name, sentence, left):
    def full_disk(*arguments):
        raise OSError("No space left on device")
    folder_corpus(tmp_path / "root")
    open_it = partial(data.open_corpus, "folder", tmp_path / "root", cache=tmp_path / "cache")
    with monkeypatch.context() as patch:
        patch.setattr(data, name, full_disk)
        with pytest.raises((OSError, ValueError), match=sentence):
            open_it()
    assert len(list((tmp_path / "cache").iterdir())) == left
    assert not open_it().bad


def test_a_folder_is_split_packed_once_and_packed_anew_when_a_clip_changes(tmp_path, monkeypatch):
    root = tmp_path / "root"
    folder_corpus(root)
    open_it = partial(data.open_corpus, "folder", root, cache=tmp_path / "cache")
    save_clips(root, "lonely/1.wav")  # a class of one clip only trains
    corpus = open_it()
    assert [len(corpus.pick(split)) for split in ("train", "valid", "test")] == [22, 3, 6]
    assert corpus.notes == ["1 classes have too few clips to be tested: lonely"]
    last = root / corpus.ids[-1]
    wave = corpus.store[-corpus.length[-1] :] / 32768
    np.testing.assert_allclose(wave, data.read_audio(last), atol=2**-16)
    with monkeypatch.context() as patch:
        patch.setattr(data, "read_clip", lambda path: pytest.fail(f"decoded {path} again"))
        assert open_it().ids == corpus.ids
    packed = next((tmp_path / "cache").iterdir())
    packed.write_bytes(packed.read_bytes()[:-100])  # a disk was full
    assert (open_it().length == corpus.length).all(), "a damaged file stays"
    last.write_bytes(wav_bytes(np.full((9000, 1), 1.2) + noise(9000), code=3, bits=32))
    again = open_it()
    assert again.length[-1] == 9000, "the old clip is still there"
    assert (again.store[-9000:] > 0).all(), "a loud sample was wrapped, not clipped"
    assert "1 clips hold floats beyond [-1, 1] (clipped): " + corpus.ids[-1] in again.notes
    assert len(list((tmp_path / "cache").iterdir())) == 1, "the old file is still there"


def found_in(root):
    """What `folder` lists below a root: ({clip: (class, split)}, notes)."""
    found = data.Findings()
    return {row[0]: row[1:] for row in data.folder_rows(root, found)}, found.notes


def test_what_is_hidden_linked_twice_or_no_recording_is_not_in_a_folder(tmp_path):
    save_clips(tmp_path, "dog/1.wav", "dog/._1.wav", ".ipynb_checkpoints/1.wav", "__MACOSX/1.wav",
               "cat/1.WAV", "cat/1.flac", "cat/1.m4a", "loose.wav", "dog/notes.txt", "dog/2.xyz",
               "README", "dog/3")
    (tmp_path / "ant").symlink_to(tmp_path / "dog")  # sorted before the folder that it is
    (tmp_path / "dog/again").symlink_to(tmp_path)
    rows, notes = found_in(tmp_path)
    assert rows == {"cat/1.WAV": ("cat", "any"), "dog/1.wav": ("dog", "any")}
    for words in ("2 files have another ending or none; left out: dog/2.xyz, dog/3",
                  "2 recordings .* twice, .*cat/1.flac",
                  "1 recordings directly in ROOT are left out: loose.wav"):
        assert any(re.search(words, note) for note in notes), (words, notes)


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path, monkeypatch):
    save_clips(tmp_path, "dog/1.wav", "cat/1.wav")
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith("cat"):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)
    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError, match="cat"):
        data.find_audio(tmp_path, data.Findings())


@pytest.mark.parametrize("valid", ["val", "valid_set", "validation", "Dev-clean", None])
def test_folders_named_train_and_test_are_splits(tmp_path, valid):
    save_clips(tmp_path, "train/a/1.wav", "Test/b/1.wav", "extra/a/1.wav")
    expected = {"train/a/1.wav": ("a", "train*"), "Test/b/1.wav": ("b", "test")}
    if valid:
        save_clips(tmp_path, f"{valid}/a/1.wav")
        expected |= {"train/a/1.wav": ("a", "train"), f"{valid}/a/1.wav": ("a", "valid")}
    rows, notes = found_in(tmp_path)
    assert rows == expected and "extra/a/1.wav" in notes[0], notes


def test_folders_of_splits_inside_classes_are_named(tmp_path):
    names = itertools.product("ab", ("train", "test"), ("1.wav", "2.wav", "3.wav"))
    save_clips(tmp_path, *map("/".join, names))
    corpus = data.open_corpus("folder", tmp_path, cache=tmp_path / ".cache")
    assert "2 folders have the name of a split and are not taken for one: test, train" in (
        corpus.notes)


def test_classes_of_fewer_clips_than_few_shot_are_named(tmp_path):
    folder_corpus(tmp_path, classes=2, clips=10)
    corpus = data.open_corpus("folder", tmp_path, cache=tmp_path / ".cache", few_shot=8)
    assert corpus.notes == ["2 classes have fewer than 8 clips to train: class0, class1"]


def test_speakers_of_the_trials_never_train_whatever_their_folder(tmp_path):
    who = ("ann", "bob", "cid", "dan", "eve")
    names = itertools.product(("train", "test"), who, ("1.wav", "2.wav"))
    save_clips(tmp_path, *map("/".join, names))
    write(tmp_path / "trials.txt", "1 train/ann/1.wav train/ann/2.wav",
          "0 train/ann/1.wav test/bob/1.wav")
    corpus = data.open_corpus("folder", tmp_path, cache=tmp_path / ".cache", valid=False)
    trained, _, tested = people(corpus, -2)
    assert not trained & {"ann", "bob"} and {"ann", "bob"} <= tested


def test_a_check_of_speakers_counts_no_classes_of_strangers(tmp_path, capsys):
    corpus = corpus_of([noise()[:, 0]] * 3, [0, 1, 2], ["train", "train", "test"])
    corpus.labels[2] = -1
    assert not data.check(corpus)
    assert re.search(r"test +1 clips, 0.19.*\n +train .* a class", capsys.readouterr().out)


def test_a_clip_larger_than_memory_and_one_that_lacked_its_decoder(tmp_path, monkeypatch):
    folder_corpus(tmp_path / "root", classes=2, clips=3)
    open_it = partial(data.open_corpus, "folder", tmp_path / "root", cache=tmp_path / "cache",
                      skip_bad=True)
    faults = [MemoryError(), ValueError(data.NO_DECODER)]
    def read(path, real=data.read_clip):
        if faults:
            raise faults.pop()
        return real(path)
    monkeypatch.setattr(data, "read_clip", read)
    monkeypatch.setattr(data.importlib.util, "find_spec", lambda name: None)
    bad = open_it().bad
    assert len(bad) == 2 and "memory" in bad[1] and open_it().bad == bad
    monkeypatch.setattr(data.importlib.util, "find_spec", lambda name: "installed")
    assert not open_it().bad, "what could be decoded now stays left out"


def test_a_bad_clip_does_not_make_all_others_be_read_again(tmp_path, monkeypatch):
    folder_corpus(tmp_path / "root", classes=2, clips=3)
    write(tmp_path / "root/class0/bad.wav", "no sound")
    read = []
    real = data.read_clip
    monkeypatch.setattr(data, "read_clip", lambda path: read.append(path) or real(path))
    for count in (7, 1):
        with pytest.raises(ValueError, match="bad.wav"):
            data.open_corpus("folder", tmp_path / "root", cache=tmp_path / "cache")
        assert len(read) == count
        read.clear()


def test_a_folder_of_validating_speakers_is_not_mixed_with_drawn_ones(tmp_path):
    for part, speakers in (("train", "abcd"), ("valid", "ef"), ("test", "gh")):
        save_clips(tmp_path, *(f"{part}/{s}/{n}.wav" for s in speakers for n in range(3)))
    write(tmp_path / "trials.txt", "1 test/g/0.wav test/g/1.wav", "0 test/g/0.wav test/h/1.wav")
    corpus = data.open_corpus("folder", tmp_path, cache=tmp_path / ".cache")
    assert {corpus.ids[i][:7] for i in corpus.pick("valid")} == {"valid/e", "valid/f"}


def test_a_file_whose_whole_name_is_an_ending_is_left_out(tmp_path):
    save_clips(tmp_path, "a/1.wav", "a/mp3")
    found = data.Findings()
    assert data.find_audio(tmp_path, found) == ["a/1.wav"]
    assert found.notes == ["1 files have another ending or none; left out: a/mp3"]


def test_copies_beside_one_that_is_not_used_are_compared_with_each_other():
    found = data.Findings()
    data.note_copies({"b": "a", "c": "a"}, "abc", "xxx", ["unused", "train", "valid"], found)
    assert found.notes == ["1 clips are copies of a clip in another split or class: c (of b)"]


def test_a_copy_in_another_class_and_classes_that_differ_by_capitals_are_named(tmp_path):
    save_clips(tmp_path, *(f"{kind}/{i}.wav" for kind in ("Dog", "dog ", "cat") for i in "345"))
    (tmp_path / "cat/6.wav").symlink_to(tmp_path / "Dog/5.wav")
    notes = data.open_corpus("folder", tmp_path, cache=tmp_path / ".cache").notes
    assert notes == ["2 classes differ by capitals or spaces alone: Dog, dog ",
                     "1 clips are copies of a clip in another split or class: cat/6.wav (of "
                     "Dog/5.wav)"]


def test_a_copy_of_a_training_clip_in_the_test_is_named(tmp_path):
    save_clips(tmp_path, "train/a/1.wav", "train/a/2.wav", "train/b/1.wav", "test/b/2.wav",
               "valid/a/4.wav", "valid/b/3.wav", "test/a/8.wav")
    shutil.copy(tmp_path / "train/a/1.wav", tmp_path / "train/a/3.wav")  # no leak
    shutil.copy(tmp_path / "train/a/2.wav", tmp_path / "test/a/9.wav")
    save_clips(tmp_path, "train/b/5.wav", "test/b/5.wav", wave=np.ones(3000))
    silence, copies = data.open_corpus("folder", tmp_path, cache=tmp_path / ".cache").notes
    assert silence == "2 clips hold digital silence: test/b/5.wav, train/b/5.wav"
    assert copies == ("1 clips are copies of a clip in another split or class: train/a/2.wav (of "
                      "test/a/9.wav)")


def test_a_name_of_two_lines_is_printed_in_one():
    assert data.printable("a\nb\u00fc.wav") == "a\\nb\u00fc.wav"


@pytest.mark.parametrize("folders, sentence", [
    (["train/a", "train/b", "val/a", "val/b"], "'train': 6, 'valid': 6.*there is a test"),
    (["corpus/a", "corpus/b"], "'corpus'. Is ROOT a folder too high or too deep")])
def test_folders_without_a_test_or_a_second_class_are_refused(tmp_path, folders, sentence):
    save_clips(tmp_path, *(f"{folder}/{i}.wav" for folder in folders for i in "345"))
    with pytest.raises(ValueError, match=sentence):
        data.open_corpus("folder", tmp_path, cache=tmp_path / ".cache")


def test_names_in_another_normal_form_and_in_no_utf8_are_found(tmp_path):
    apart = "u\u0308ber.wav"  # as a Mac writes it
    save_clips(tmp_path, apart, *(f"root/{c}/{i}.wav" for c in "ab" for i in range(4)))
    assert data.locate(tmp_path, "\u00fcber.wav") == str(tmp_path / apart)
    os.rename(tmp_path / "root/a/0.wav", os.fsencode(tmp_path / "root") + b"/a/h\xfc.wav")
    corpus = data.open_corpus("folder", tmp_path / "root", cache=tmp_path / "cache")
    note = r"1 names hold a new line or no UTF-8, here escaped: a/h\xfc.wav"
    assert corpus.notes == [note] and not corpus.bad


@pytest.mark.parametrize("encoding, gap", [
    ("utf-8", ","), ("utf-8-sig", ","), ("utf-16", "\t"), ("latin-1", ";")])
def test_tables_are_read_in_any_form_that_excel_writes(tmp_path, encoding, gap):
    text = "file, kind\r\n1.wav, H\u00fcndchen,\r\n\r\n".replace(",", gap)
    (tmp_path / "a.csv").write_text(text, encoding)
    found = data.Findings()
    rows = data.read_table(tmp_path / "a.csv", found, "audio/{file}", "{kind}", "1")
    assert (rows, found.bad) == ([("audio/1.wav", "H\u00fcndchen", "1")], [])


def test_a_table_with_a_header_alone_is_refused_by_its_name(tmp_path):
    write(tmp_path / "a.csv", "file,kind")
    with pytest.raises(ValueError, match="a.csv: no rows"):
        data.read_table(tmp_path / "a.csv", data.Findings(), "{file}", "{kind}")


@pytest.mark.parametrize("line, sentence", [
    ("1.wav,1,dog,more", "line 12: 4 columns, the header has 3"), ("1.wav,1", "line 12: 2 columns"),
    ("1.wav,1, ", "line 12: 'category' is empty"), ('"' + "1.wav" * 30000, "1 columns"),
    ('"1.wav,1,c0\n\n', r"line 12 to 14 \(a quote\): 1 columns"),
    ("0.wav,2,c0", "0.wav: in two rows, as c0 2 and c0 1"), ("./0.wav,2,c0", "in two rows"),
    ("\0.wav,1,c0", r"\?.wav: No such file"), ("10.wav,1,new", "'new' trains and is never tested"),
    ("10.wav,5,new", "'new' is tested and never trains")])
def test_a_doubtful_row_stops_training_or_is_left_out_and_is_named(tmp_path, line, sentence):
    save_clips(tmp_path / "audio", *(f"{i}.wav" for i in range(11)))
    write(tmp_path / "meta/esc50.csv", "filename,fold,category",
          *(f"{i}.wav,{i % 5 + 1},c{i // 5}" for i in range(10)), line)
    open_it = lambda **kw: data.open_corpus("esc50", tmp_path, fold=5, cache=tmp_path / "c", **kw)
    with pytest.raises(ValueError, match=f"(?s)--skip-bad goes on.*{sentence}"):
        open_it()
    corpus = open_it(skip_bad=True)
    assert re.search(sentence, corpus.bad[0]), corpus.bad
    assert re.search(sentence, str(corpus.notes)), "a training with --skip-bad does not say so"
    tested = set(corpus.labels[corpus.pick("test")])
    assert tested == {0, 1}, "a class is tested that does not train"


def test_what_is_missing_is_named_if_nothing_is_left_to_test(tmp_path):
    save_clips(tmp_path / "audio", *(f"{i}.wav" for i in range(8)))
    write(tmp_path / "meta/esc50.csv", "filename,fold,category",
          *(f"{i}.wav,{i % 5 + 1},c{i % 2}" for i in range(10)))
    open_it = partial(data.open_corpus, "esc50", tmp_path, cache=tmp_path / "c", skip_bad=True)
    for i in (0, 5):  # fold 1
        (tmp_path / f"audio/{i}.wav").unlink(missing_ok=True)
    with pytest.raises(ValueError, match="(?s)some to test.*audio/0.wav: No such file"):
        open_it(fold=1)
    for i in (1, 3, 7):  # class c1
        (tmp_path / f"audio/{i}.wav").unlink()
    save_clips(tmp_path / "audio", "0.wav")
    with pytest.raises(ValueError, match="(?s)only one class trains.*audio/1.wav: No such file"):
        open_it(fold=1)
    save_clips(tmp_path / "audio", "10.wav", "11.wav")
    write(tmp_path / "meta/esc50.csv", "filename,fold,category", "0.wav,1,c0", "2.wav,2,c0",
          "10.wav,1,c2", "11.wav,2,c2", "1.wav,1,c1", "3.wav,2,c1", "4.wav,3,c0")
    assert "1 classes have no clip that can be used: c1" in open_it(fold=1).notes


@pytest.mark.parametrize("text, sentence", [
    ("\ufeff1 class0/0.wav class0/1.wav", "all of one kind"),  # after Excel's first bytes
    ("0 class0/0.wav class1/1.wav\n1 class0/0.wav class0/1.wav", "than two speakers"),
    ("1 class0/0.wav class9/1.wav", "names 1 clips .*'class9/1.wav'"),
    ("1 class0/0 class1/0", "all of one kind"), ("\n", "trials.txt: no trials"),
    ("1 a", "trials.txt: expected `1 id_a id_b`"),
    ("1 class0/0.wav class 0/1.wav", "tabs between, if names hold spaces")])
def test_bad_trials_are_answered_with_a_sentence(tmp_path, text, sentence):
    folder_corpus(tmp_path, 4, 3)
    write(tmp_path / "trials.txt", text)
    with pytest.raises(ValueError, match=sentence):
        data.open_corpus("folder", tmp_path, cache=tmp_path / ".cache")


@pytest.mark.parametrize("gap, slash", [
    (" ", "/"), ("\t", "\\"), ("\t", "/./"), (" \t ", "/")])
def test_trials_may_name_files_with_spaces_and_any_slashes(tmp_path, gap, slash):
    save_clips(tmp_path, *(f"{who} L/take {n}.wav" for who in ("Ada", "Bob") for n in (1, 2)))
    trials = [("1", "Ada L/take 1.wav", "Ada L/take 2.wav"),
              ("0", "Ada L/take 1.wav", "Bob L/take 2.wav")]
    write(tmp_path / "trials.txt", *(gap.join(trial).replace("/", slash) for trial in trials))
    corpus = data.open_corpus("folder", tmp_path, cache=tmp_path / ".cache", train=False)
    assert corpus.trials["test"] == [(1, 0, 1), (0, 0, 3)]


def test_trials_may_leave_out_endings_also_of_names_with_points(tmp_path):
    save_clips(tmp_path, *(f"{who}/take.{n}.wav" for who in ("ann", "bob") for n in (1, 2)))
    write(tmp_path / "trials.txt", "1 ann/take.1 ann/take.2.m4a", "0 ann/take.1 bob/take.2")
    corpus = data.open_corpus("folder", tmp_path, cache=tmp_path / ".cache", train=False)
    assert corpus.trials["test"] == [(1, 0, 1), (0, 0, 3)]
    write(tmp_path / "trials.txt", "1 ann/take.1 ann/take.9")
    with pytest.raises(ValueError, match="names 1 clips .*'ann/take.9'"):
        data.open_corpus("folder", tmp_path, cache=tmp_path / ".cache", train=False)


def test_trials_of_a_clip_with_itself_or_against_the_folders_are_noted(tmp_path):
    folder_corpus(tmp_path, 6, 3)
    write(tmp_path / "trials.txt", "1 class0/0.wav class0/0.wav", "1 class0/0.wav class1/1.wav",
          "0 class0/0.wav class1/0.wav", "1 class0/0.wav class0/1.wav")
    corpus = data.open_corpus("folder", tmp_path, cache=tmp_path / ".cache")
    assert corpus.notes == ["1 test trials are of a clip with itself: class0/0.wav class0/0.wav",
                            "1 test trials contradict the folders: class0/0.wav class1/1.wav"]


def test_a_missing_table_or_column_is_answered_with_what_is_there(tmp_path):
    with pytest.raises(ValueError, match="(?s)UrbanSound8K.csv'.*audio/fold1.*--download"):
        data.open_corpus("urbansound8k", tmp_path)
    write(tmp_path / "meta/esc50.csv", "file;fold;category", "1.wav;1;dog")
    with pytest.raises(ValueError, match="one column 'filename'; its columns are file, fold"):
        data.open_corpus("esc50", tmp_path)
    write(tmp_path / "meta/esc50.csv", "filename,fold,category,fold", "1.wav,1,dog,2")
    with pytest.raises(ValueError, match="one column 'fold'"):
        data.open_corpus("esc50", tmp_path)
    with pytest.raises(ValueError, match="(?s)has none.*train_data.csv.*by the form"):
        data.download_corpus("fluentspeech", tmp_path)


def test_files_without_a_known_ending_are_named(tmp_path):
    write(tmp_path / "a.xyz", "no sound")
    with pytest.raises(ValueError, match="found none; 1 files have another ending .*: a.xyz"):
        data.corpus_of_files([tmp_path])
    save_clips(tmp_path, "b/1.wav")
    (tmp_path / "c").mkdir()
    corpus = data.corpus_of_files([tmp_path / "b", tmp_path / "c"])
    assert corpus.notes == [f"no recordings below {tmp_path / 'c'}"]


def test_arrays_of_any_rate_are_a_corpus():
    wave = np.sin(np.arange(8000) * 0.1)
    corpus = data.corpus_of_waves({
        "float": (wave, 8000), "int16": ((wave * 32767).astype(np.int16), 16000),
        "stereo": (np.stack([wave, wave]), 16000.0)})
    assert corpus.length.tolist() == [16000, 8000, 8000]
    np.testing.assert_allclose(corpus.store[16000:24000], corpus.store[24000:], atol=2)


@pytest.mark.parametrize("wave, rate, sentence", [
    (np.ones((8000, 2)), 16000, "8000 channels of 2 samples: .*wave.T"), (np.ones(9), 0, "rate"),
    (np.ones(9), None, "rate"), (np.ones(8000, np.int32), 16000, "int16 or floats"),
    (np.ones(100), 16000, "shorter than one"), (np.full(8000, np.nan), 16000, "not finite"),
    (np.ones((1, 2, 3)), 16000, "an array")])
def test_arrays_that_are_no_sound_are_answered_with_a_sentence(wave, rate, sentence):
    corpus = data.corpus_of_waves({"a": (wave, rate)})
    assert re.search(f"not read: a: .*{sentence}", corpus.bad[0]), corpus.bad


@pytest.mark.parametrize("number, fold, valid, expected", [
    (5, 5, True, ("123", "4", "5")), (5, 1, True, ("234", "5", "1")),
    (5, 2, True, ("345", "1", "2")), (10, 1, True, ("23456789", "10", "1")),
    (5, 2, False, ("1345", "", "2"))])
def test_folds_rotate_as_in_p1_and_validation_is_never_the_test_fold(number, fold, valid, expected):
    folds = np.array([str(k) for k in range(1, number + 1)], object)
    splits = folds.copy()
    data.make_splits(splits, np.array(["a"] * number), {}, 0, fold, valid, train=True)
    found = ("".join(folds[splits == split]) for split in ("train", "valid", "test"))
    assert tuple(found) == expected


def test_official_lists_are_read_and_the_published_counts_are_expected(tmp_path, monkeypatch):
    """A line in the form of each list, and how many clips the corpora's authors count."""
    splits = ("train", "valid", "test")
    write(tmp_path / "meta/esc50.csv", "filename,fold,target,category", "1-17-A-0.wav,1,0,dog")
    write(tmp_path / "metadata/UrbanSound8K.csv", "slice_file_name,fold,class", "17-3-0.wav,5,bark")
    for split in splits:
        write(tmp_path / f"data/{split}_data.csv", ",path,transcription,action,object,location",
              f'0,wavs/{split}.wav,"Please, lights",activate,lights,none')
    write(tmp_path / "validation_list.txt", "bed/a.wav")
    write(tmp_path / "testing_list.txt", r".\cat\b.wav")
    there = ["_background_noise_/a.wav", "bed/c.wav"]
    monkeypatch.setattr(data, "find_audio", lambda root, found: there)
    words = [("bed/a.wav", "bed", "valid"), ("bed/c.wav", "bed", "train"),
             ("cat/b.wav", "cat", "test")]
    spoken = [(f"wavs/{split}.wav", "activate/lights/none", split) for split in splits]
    for name, clips, folds, rows in (
            ("esc50", 5 * 400, 5, [("audio/1-17-A-0.wav", "dog", "1")]),
            ("urbansound8k", 8732, 10, [("audio/fold5/17-3-0.wav", "bark", "5")]),
            ("speechcommands", 84843 + 9981 + 11005, 0, words),
            ("fluentspeech", 23132 + 3118 + 3793, 0, spoken)):
        source = data.CORPORA[name]
        assert source.rows(tmp_path, data.Findings()) == rows
        assert (source.clips, source.folds) == (clips, folds), "other counts than the authors'"


def test_recordings_with_other_names_than_spoken_digits_have_are_left_out_and_named(tmp_path):
    names = "7_jackson_4.wav", "7_jackson_5.wav", "7_x (1).wav", "a.wav"
    save_clips(tmp_path / "recordings", *names)
    found = data.Findings()
    rows = data.fsdd_rows(tmp_path, found)
    assert [split for _, _, split in rows] == ["test", "train*"]
    assert found.notes[0].endswith("left out: 7_x (1).wav, a.wav"), found.notes


def test_damage_is_named_by_the_check_and_stops_training_or_is_left_out(tmp_path, capsys):
    """ESC-50's layout in small, three of 60 clips damaged and one silent."""
    names = [f"{fold}-{i}.wav" for fold in range(1, 6) for i in range(12)]
    write(tmp_path / "meta/esc50.csv", "filename,fold,category",
          *(f"{name},{name[0]},c{i % 2}" for i, name in enumerate(names)))
    save_clips(tmp_path / "audio", *names)
    write(tmp_path / "audio/1-0.wav", "no audio at all")
    (tmp_path / "audio/1-1.wav").write_bytes(b"")
    (tmp_path / "audio/5-0.wav").unlink()
    save_clips(tmp_path / "audio", "1-2.wav", wave=np.zeros(2000))
    with pytest.raises(SystemExit, match="1"):
        data.main(["esc50", str(tmp_path), "--cache", str(tmp_path / "cache")])
    printed = capsys.readouterr().out
    for sentence in (
            "fault: audio/1-0.wav: .*starts with b'no audio", "fault: audio/1-1.wav: .*empty",
            "fault: audio/5-0.wav: No such file", "fault: 1 clips hold digital silence: audio/1-2",
            "fault: expected 2,000 clips, found 57", "fault: 3 of 60 clips in .* such as",
            "\n  c0, c1\n",
            "train .* 18 to 18 a class, 0.19 to 0.19 s", "bad .*3 clips"):
        assert re.search(sentence, printed), (sentence, printed)
    open_it = partial(data.open_corpus, "esc50", tmp_path, cache=tmp_path / "cache")
    with pytest.raises(ValueError, match=r"3 of 60 clips in .*--skip-(?s:.)*1-0.wav"):
        open_it()
    assert len(open_it(skip_bad=True).pick("bad")) == 3


def test_voxcelebs_test_speakers_never_train_and_clips_that_only_a_list_knows_are_missing(tmp_path):
    """Twelve speakers in two trees below one root, in two depths; id1000x are VoxCeleb1's."""
    root = tmp_path / "root"
    for number in range(48):
        place = "dev/aac/id0000" if number > 15 else "vox1/wav/id1000"
        save_clips(root, f"{place}{number // 4}/video/0000{number % 4}.wav")
    open_it = partial(data.open_corpus, "voxceleb", root, cache=tmp_path / "cache")
    name = lambda speaker, clip: f"id1000{speaker}/video/0000{clip}.wav"
    for trials, file, tested in (("o", "veri_test2.txt", 2), ("h", "list_test_hard2.txt", 4)):
        write(root / file, f"1 {name(0, 0)} {name(0, 1)}",
              *(f"0 {name(0, 0)} {name(speaker, 1)}" for speaker in range(1, tested)))
        corpus = open_it(trials=trials)
        training, held, strangers = people(corpus, -3)
        assert (len(training), len(held), len(strangers)) == (10 - tested, 2, tested)
        assert len(training | held | strangers) == 12 and corpus.trials["valid"]
    assert corpus.notes == ["expected 550,894 trials in list_test_hard2.txt, found 4"]
    published = {trials: count for trials, (_, count) in data.CORPORA["voxceleb"].lists.items()}
    assert published == {"o": 37611, "e": 579818, "h": 550894}
    (root / "vox1/wav" / name(3, 1)).unlink()
    with pytest.raises(ValueError, match="hard2.txt names 1 clips.*id10003/video/00001.wav"):
        open_it(trials="h")
    corpus = open_it(trials="h", skip_bad=True)
    assert len(corpus.trials["test"]) == 3 and "1 test trials of unusable" in str(corpus.notes)


@pytest.mark.skipif(not REAL.exists(), reason="no real recordings beside the project")
@pytest.mark.parametrize("name, folder, sizes, classes", [
    ("esc50", "ESC-50", [4, 4, 0], 4), ("speechcommands", "speech_commands_v0.02", [10, 1, 2], 9),
    ("fsdd", "fsdd", [2430, 270, 300], 10)])
def test_real_corpora_have_their_official_split(cache, name, folder, sizes, classes):
    corpus = data.open_corpus(name, REAL / folder, cache=cache, train=False)
    found = [len(corpus.pick(split)) for split in ("train", "valid", "test")]
    assert (found, len(corpus.classes)) == (sizes, classes)
    if name == "fsdd":
        assert {corpus.ids[i][-5] for i in corpus.pick("test")} == set("01234")


def archive(kind, members):
    """Bytes of a zip or tar.gz of {name: bytes}; in a tar also {name: (type of link, target)}."""
    file = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(file, "w") as out:
            for name, body in members.items():
                out.writestr(name, body)
        return file.getvalue()
    with tarfile.open(fileobj=file, mode="w:gz") as out:
        for name, body in members.items():
            info = tarfile.TarInfo(name)
            if isinstance(body, tuple):
                info.type, info.linkname = body
            else:
                info.size = len(body)
            out.addfile(info, io.BytesIO(body) if info.size else None)
    return file.getvalue()


@pytest.mark.parametrize("kind, name, body", [
    *((kind, name, b"2") for kind in ("zip", "tar") for name in (
        "a/../../evil", "/tmp/evil-of-the-tests", "C:/evil", "..\\evil")),
    ("tar", "link", (tarfile.SYMTYPE, "../..")), ("tar", "link", (tarfile.LNKTYPE, "../../a"))])
@pytest.mark.parametrize("filters", [True, False])
def test_an_archive_stays_in_its_folder(tmp_path, monkeypatch, filters, kind, name, body):
    if not filters:
        monkeypatch.delattr(tarfile, "data_filter")  # as on Python 3.11.2
    (tmp_path / "a").write_bytes(archive(kind, {"top/first": b"1", name: body}))
    with contextlib.suppress(ValueError):  # tar refuses it, zip leaves the member out
        data.unpack(tmp_path / "a", tmp_path / "root")
    outside = [p for p in tmp_path.rglob("[!a]*") if tmp_path / "root" not in (p, *p.parents)]
    assert not outside and not Path("/tmp/evil-of-the-tests").exists()
    assert not list(tmp_path.rglob("link"))


@pytest.mark.parametrize("kind, top, fault", [
    ("zip", "ESC-50-master/", "not be unpacked .*the same command gets it"),
    ("tar", "./", "delete it: the same command"), ("tar", "./", "invalid hash value .*by hand")])
def test_a_download_comes_whole_or_leaves_nothing(tmp_path, monkeypatch, kind, top, fault):
    table = b"filename,fold,category\n1.wav,1,a\n2.wav,2,b"
    files = {"audio/1.wav": wav_bytes(noise()), "meta/esc50.csv": table}
    body = archive(kind, {"__MACOSX/x": b""} | {top + name: files[name] for name in files})
    sha256 = hashlib.sha256(body).hexdigest() if "hash" in fault else ""
    monkeypatch.setitem(data.CORPORA, "esc50", replace(
        data.CORPORA["esc50"], address=(tmp_path / "x").as_uri(), sha256=sha256))
    root = tmp_path / "new/root"
    cache = tmp_path / "cache"
    get = ["esc50", str(root), "--cache", str(cache), "--download"]
    with pytest.raises(SystemExit, match="/x could not be .*No such.*by hand and save it as"):
        data.main(get)
    for damaged in (b"<html></html>", body[: len(body) // 2]):
        (tmp_path / "x").write_bytes(damaged)
        with pytest.raises(SystemExit, match=fault):
            data.main(get)
        assert not list(root.glob("*"))
        (cache / "esc50.archive").unlink(missing_ok=True)
    (tmp_path / "x").write_bytes(body)
    for _ in range(2):  # the second time from what is there
        with pytest.raises(SystemExit, match="1"):  # clips are missing
            data.main(get)
        (tmp_path / "x").unlink(missing_ok=True)
    assert [p.suffix for p in cache.iterdir()] == [".packed"], "the archive stays"
    assert {name: (root / name).read_bytes() for name in files} == files


def test_twins_among_the_sounds_differ_by_order_alone(cache):
    corpus = data.open_corpus("sounds", cache=cache)
    batch = data.load_batch(corpus, np.arange(len(corpus.ids)), 98)
    x = data.features(batch, AST("nano")).amax(1)  # (clips, 64) without order
    x = x - x.mean(1, keepdim=True)
    train, test = (torch.tensor(corpus.splits == split) for split in ("train", "test"))
    centres = torch.stack([x[train & (batch.labels == k)].mean(0) for k in range(12)])
    far = torch.cdist(x[test], centres)  # (test clips, 12)
    labels = batch.labels[test]
    nearer = lambda a, b: (far[labels == a, a] < far[labels == a, b]).float().mean()
    twins = []  # accuracies between two classes
    others = []
    for a, b in itertools.combinations(range(12), 2):
        parts = [sorted(corpus.classes[k].split(">")) for k in (a, b)]
        if parts[0] == parts[1]:
            twins.append((nearer(a, b) + nearer(b, a)) / 2)
        elif ">" not in corpus.classes[a] + corpus.classes[b]:
            others.append((nearer(a, b) + nearer(b, a)) / 2)
    assert max(twins) < 0.65 and np.mean(others) > 0.9, (twins, others)


def test_voices_are_told_apart_by_no_average_spectrum(tmp_path, monkeypatch):
    monkeypatch.setattr(data, "VOICES", data.VOICES | dict(train=(12, 4), valid=(4, 4)))
    corpus = data.open_corpus("voices", cache=tmp_path)
    speakers = people(corpus, 1)
    assert [len(s) for s in speakers] == [12, 4, 20] and len(set.union(*speakers)) == 36
    labels, left, right = np.array(corpus.trials["test"]).T
    speaker = np.array([clip.split("/")[1] for clip in corpus.ids])
    assert ((speaker[left] == speaker[right]) == labels).all() and labels.mean() == 0.5
    batch = data.load_batch(corpus, np.arange(len(corpus.ids)), 198)
    means = data.fbank(batch.x / 32768, 80).mean(1)  # (clips, 80)
    means -= means[corpus.pick("train")].mean(0)
    scores = F.cosine_similarity(means[left], means[right])
    assert 0.2 < sv.equal_error_rate(scores.numpy(), labels) < 0.4


def test_augmentation_hides_rolls_and_amplifies_within_its_bounds():
    torch.manual_seed(0)
    x = torch.ones(200, 50, 40)
    hidden = data.augment_features(x, spec_f=8, spec_t=10) == 0  # (B, T, F)
    bands = hidden.all(1).sum(1)
    stretches = hidden.all(2).sum(1)
    assert bands.max() <= 8 and stretches.max() <= 10 and bands.float().mean() > 2
    ramp = torch.arange(50.0).expand(200, 50)[:, :, None]
    rolled = data.augment_features(ramp, shift=5)[:, :, 0]  # (B, T)
    assert rolled.sort(1).values.equal(ramp[:, :, 0])
    start = (rolled.argmin(1) + 5) % 50
    assert start.max() == 10 and start.min() == 0
    wave = torch.ones(200, 100)
    zeros = torch.zeros(200, dtype=torch.int64)
    louder = data.augment_waves(data.Batch(wave, zeros + 100, zeros, zeros.numpy()), 1, 0, gain=6.0)
    decibels = 20 * louder.x.log10()  # a clip is louder as a whole, its padding stays silent
    assert decibels.std(1).max() < 1e-4 and 5 < decibels.abs().max() <= 6


def test_a_faster_voice_is_higher_and_another_speaker():
    torch.manual_seed(0)
    size = data.samples_of(112)
    labels = torch.arange(30) % 5
    tone = 9000 * torch.sin(2 * math.pi * 1000 * torch.arange(size) / 16000).repeat(30, 1)
    batch = data.Batch(tone, torch.full((30,), 8000), labels, np.arange(30))
    batch = data.perturb_speed(batch, 100, 5)
    speed = torch.tensor([1, 0.9, 1.1])[batch.labels // 5]  # (B,)
    assert (batch.labels % 5 == labels).all() and len(set(speed.tolist())) == 3
    peak = torch.fft.rfft(batch.x * torch.hann_window(batch.x.shape[1])).abs().argmax(1)
    assert_close(peak * 16000 / data.samples_of(100), 1000 * speed, atol=2, rtol=0)
    assert_close(batch.lengths.float(), 8000 / speed, atol=1, rtol=0)


def test_a_room_is_a_convolution_that_keeps_the_direct_path_in_place_and_the_energy():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 500))
    rooms = 0.1 * rng.standard_normal((3, 120))
    rooms[range(3), [0, 40, 119]] = 2.0  # the direct path: at once, late, last of all
    wet = data.reverberate(torch.from_numpy(x), torch.from_numpy(rooms)).numpy()
    for row, delay in enumerate((0, 40, 119)):
        expected = np.convolve(x[row], rooms[row])[delay : delay + 500]
        expected *= np.linalg.norm(x[row]) / np.linalg.norm(expected)
        np.testing.assert_allclose(wet[row], expected, atol=1e-9)


def test_noise_has_the_ratio_that_is_asked_for(tmp_path):
    torch.manual_seed(0)
    folder_corpus(tmp_path / "noises", classes=1)
    x = 1000 * torch.randn(20, data.samples_of(60))
    lengths = torch.full((20,), 5000)
    x[:, 5000:] = 0  # padding is no part of the signal's power
    batch = data.Batch(x, lengths, lengths, lengths.numpy())
    for sounds in ("generated", data.open_sounds(tmp_path / "noises", tmp_path / "cache")):
        added = data.augment_waves(batch, 1, 60, noise=sounds, share=0.6, snr=(7, 7)).x - x
        power = added[:, :5000].square().mean(1)  # (B,)
        ratio = 10 * (x.square().sum(1) / 5000 / power).log10()[power > 0]
        assert_close(ratio, torch.full((12,), 7.0), atol=0.01, rtol=0)  # a share of 60 %
        assert (data.augment_waves(batch, 1, 60, rooms=sounds, share=1).x != x).any(1).all()
    one = data.Batch(x[:1], lengths[:1], lengths[:1], lengths[:1].numpy())
    for _ in range(8):  # it has no neighbours for a babble
        assert data.augment_waves(one, 1, 60, noise="generated", share=1.0).x.isfinite().all()


@pytest.mark.parametrize("clip, sound, kind", [(1, 0, "noise"), (0, 1, "noise"), (1, 0, "rooms")])
def test_a_silent_clip_noise_or_room_leaves_the_clip_as_it_is(clip, sound, kind):
    x = clip * 1000 * torch.randn(2, data.samples_of(60))
    sounds = {kind: corpus_of([sound * 9 * noise(16000)[:, 0]], [0], ["train"])}
    lengths = torch.full((2,), x.shape[1])
    batch = data.Batch(x, lengths, lengths, lengths.numpy())
    assert torch.equal(data.augment_waves(batch, 1, 60, share=1.0, **sounds).x, x)


# --------------------------------------------------------------------------------------------------
# 2. The AST


@torch.no_grad()
def test_outputs_equal_hugging_faces(tmp_path):
    """Of AST-tiny's sizes."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    model = transformers.ASTModel(transformers.ASTConfig(
        hidden_size=192, intermediate_size=768, num_attention_heads=3)).eval()
    for name, p in model.named_parameters():  # random tokens, positions, biases and scales too
        if p.ndim == 1 or "embeddings" in name:
            p.data.add_(0.03 * torch.randn_like(p))
    torch.save(model.state_dict(), tmp_path / "memory.pt")
    model.save_pretrained(tmp_path)
    transformers.ASTFeatureExtractor(mean=-6.845978, std=5.5654526).save_pretrained(tmp_path)
    x = torch.randn(1, 1024, 128)
    expected = model(x).pooler_output
    for file in ("memory.pt", "model.safetensors"):  # with the names in version 5, and on disk
        ast, said = load_pretrained(AST("tiny", pool="cls"), tmp_path / file)
        assert "Hugging Face layout" in said and "eps 1e-12" in said, said
        assert "mean -6.846, std 5.565" in said, f"preprocessor_config.json is not followed: {said}"
        assert_close(ast.eval()(x), expected, atol=1e-4, rtol=0)


def test_the_stride_of_hugging_faces_config_gives_the_grid(tmp_path):
    """240 positions are 12 x 20 at the usual stride of 10, but 8 x 30 at that of 16."""
    given = AST("nano", mels=128, stride=16, grid=(8, 30))
    torch.save({"layernorm.weight": torch.ones(64), **given.state_dict()}, tmp_path / "a.pt")
    (tmp_path / "config.json").write_text('{"time_stride": 16}')
    ast, said = load_pretrained(AST("nano", mels=128), tmp_path / "a.pt")
    assert (ast.stride, ast.grid) == (16, (8, 30)), said


@torch.no_grad()
@pytest.mark.parametrize("kind", ["ViTModel", "ViTForImageClassification", "DeiTModel"])
def test_picture_models_of_hugging_face_load(tmp_path, kind):
    """Their blocks are the AST's; heads, poolers and the colours' mean and std are left out."""
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig if kind[0] == "V" else transformers.DeiTConfig
    model = getattr(transformers, kind)(config(
        hidden_size=64, num_hidden_layers=4, num_attention_heads=2, intermediate_size=256)).eval()
    model.save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0, 0, 0]}')
    ast, said = load_pretrained(AST("nano", mels=128), tmp_path / "model.safetensors")
    assert "Hugging Face layout" in said and "14 x 14" in said, said
    x = torch.randn(2, 198, 64)
    hidden = x
    body = getattr(model, "vit", model)
    for theirs, ours in zip(getattr(body, "layers", None) or body.encoder.layer, ast.eval().blocks):
        hidden = theirs(hidden)
        hidden = hidden if torch.is_tensor(hidden) else hidden[0]
        x = ours(x)
    assert_close(x, hidden, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("config, sentence", [
    ({"time_stride": 10, "frequency_stride": 16}, "strides in time and frequency differ"),
    ({"num_mel_bins": 64}, "64 mel bins"), (["a list"], "config.json is no JSON")])
def test_a_config_of_hugging_face_that_does_not_fit_is_refused(tmp_path, config, sentence):
    state = AST("nano", mels=128, grid=(8, 30)).state_dict()
    torch.save({"layernorm.weight": torch.ones(64), **state}, tmp_path / "a.pt")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=sentence):
        load_pretrained(AST("nano", mels=128), tmp_path / "a.pt")


def test_our_own_file_knows_its_grid_and_its_mel_bins(tmp_path):
    own = AST("nano", mels=80, grid=(5, 7))
    torch.save(dict(encoder=own.state_dict(), settings=own.settings), tmp_path / "own.pt")
    ast, _ = load_pretrained(AST("nano"), tmp_path / "own.pt")
    assert (ast.mels, ast.grid) == (80, (5, 7))


def test_a_stride_that_is_no_number_is_refused(tmp_path):
    torch.save({"layernorm.weight": torch.ones(64), **AST("nano").state_dict()}, tmp_path / "a.pt")
    (tmp_path / "config.json").write_text('{"time_stride": [16, 16]}')
    with pytest.raises(ValueError, match="a.pt is not an AST-nano: int"):
        load_pretrained(AST("nano"), tmp_path / "a.pt")


def test_a_transformer_without_dist_loads_and_cls_stands_in(tmp_path):
    """As a ViT of ImageNet, saved by a tool that puts "model." before all keys."""
    given = AST("nano").state_dict()
    given.pop("dist_token")
    given["pos_embed"] = given["pos_embed"][:, 1:]
    torch.save({f"model.{key}": value for key, value in given.items()}, tmp_path / "vit.pt")
    state = load_pretrained(AST("nano"), tmp_path / "vit.pt")[0].state_dict()
    assert torch.equal(state["dist_token"], given["cls_token"])
    assert torch.equal(state["pos_embed"][:, 1:], given["pos_embed"])
    assert torch.equal(state["pos_embed"][:, 0], given["pos_embed"][:, 0])


def test_a_damaged_preprocessor_config_is_named(tmp_path):
    torch.save({"layernorm.weight": torch.ones(64), **AST("nano").state_dict()}, tmp_path / "a.pt")
    (tmp_path / "preprocessor_config.json").write_text('{"mean": null, "std": 1}')
    with pytest.raises(ValueError, match="preprocessor_config.json: expected numbers `mean`"):
        load_pretrained(AST("nano"), tmp_path / "a.pt")


@pytest.mark.parametrize("name, mean", [
    ("audioset_10_10_0.4593.pth", -4.2677393), ("speechcommands_10_10_0.9812.pth", -6.845978),
    ("ESC-50_fold1.pth", -6.6268077)])
def test_mean_and_std_of_the_authors_files_are_known_by_name(tmp_path, name, mean):
    torch.save(original_layout(AST("nano")), tmp_path / name)
    ast, said = load_pretrained(AST("nano"), tmp_path / name)
    assert ast.normalise[0] == mean, said


def original_layout(ast):
    """An AST's weights under the names of the original checkpoint, q, k and v in one matrix."""
    ours = ast.state_dict()
    state = {head: torch.zeros(5) for head in ("module.mlp_head.0.weight", "module.v.head.weight")}
    for key, value in ours.items():
        if re.search(r"attn\.[kv]\.", key):
            continue
        if ".attn.q." in key:
            value = torch.cat([ours[key.replace(".q.", f".{name}.")] for name in "qkv"])
        key = key.replace("attn.q.", "attn.qkv.").replace("attn.o.", "attn.proj.")
        state["module.v." + re.sub(r"^patch", "patch_embed.proj", key)] = value
    return state


@pytest.mark.parametrize("stride, grid, colours", [
    (10, (12, 101), 1), (12, (10, 85), 1), (14, (9, 73), 1), (16, (8, 64), 1),  # AudioSet's
    (10, (12, 50), 1), (10, (12, 27), 1), (10, (12, 9), 1), (16, (8, 31), 1),  # 324 is a square too
    (10, (18, 18), 3), (10, (14, 14), 3), (10, (14, 14), 1)])  # pictures; colours added
@torch.no_grad()
def test_the_original_layout_loads_with_its_stride_and_grid(tmp_path, stride, grid, colours):
    theirs = AST("nano", mels=128, stride=stride, grid=grid)
    state = original_layout(theirs)
    grey = theirs.patch.weight / colours
    state["module.v.patch_embed.proj.weight"] = grey.repeat(1, colours, 1, 1)
    torch.save(state, tmp_path / "a.pth")
    given = AST("nano", mels=128, stride=10, grid=(12, 101), eps=1e-12)
    before = copy.deepcopy(given.state_dict())
    ours, said = load_pretrained(given, tmp_path / "a.pth")
    assert (ours.stride, ours.grid) == (stride, grid), said
    assert ours.norm.eps == ours.blocks[0].norm1.eps == 1e-6, "the layout has another eps"
    x = torch.randn(1, 300, 128)
    assert_close(ours(x), theirs(x), atol=1e-6, rtol=0)
    assert all(map(torch.equal, before.values(), given.state_dict().values())), "given was changed"


@pytest.mark.parametrize("extra", [
    argparse.Namespace(lr=1e-3), np.float64(0.4), np.int64(3), np.bool_(True), np.uint8(7)],
    ids=str)
def test_a_training_state_saved_whole_loads(tmp_path, extra):
    theirs = AST("nano")
    state = theirs.state_dict()
    for deep in (dict(model=state, optimizer={}), dict(model="nano", state_dict=dict(model=state))):
        torch.save(deep | dict(extra=extra), tmp_path / "state.pth")
        ours, _ = load_pretrained(AST("nano"), tmp_path / "state.pth")
        assert torch.equal(ours.pos_embed, theirs.pos_embed)


def positions(f, t, grid=(12, 101), picture=False):
    """Positions (f, t) of an AST whose stored position is its index in the grid."""
    ast = AST("nano", grid=grid, picture=picture)
    ast.pos_embed.data[0, 2:] = torch.arange(float(math.prod(grid)))[:, None]
    return ast.positions(f, t)[0, 2:, 0].reshape(f, t)


@pytest.mark.parametrize("rows, columns, top, left", [
    (12, 9, 0, 46), (12, 50, 0, 25), (12, 101, 0, 0), (8, 9, 2, 46)])  # from row 6 less half of 8
def test_positions_of_shorter_clips_are_cropped_in_the_middle(rows, columns, top, left):
    stored = torch.arange(12 * 101.0).reshape(12, 101)
    assert torch.equal(positions(rows, columns), stored[top : top + rows, left : left + columns])


def test_positions_of_longer_clips_are_interpolated_and_a_pictures_are_stretched():
    assert positions(12, 202)[0, 1:3].tolist() == [0.25, 0.75], "pixel centres should be kept"
    stretched = positions(2, 8, grid=(4, 4), picture=True)
    assert stretched[:, 0].tolist() == [2, 10], "between rows 0 and 1, 2 and 3"
    assert stretched[0].tolist() == [2, 2.25, 2.75, 3.25, 3.75, 4.25, 4.75, 5]


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    """A small Vision Transformer, width 64, 2 heads: (weights in DINOv2's layout, an AST that
    starts from them, the sentence about it)."""
    torch.manual_seed(0)
    shapes = {"cls_token": (1, 1, 64), "mask_token": (1, 64), "pos_embed": (1, 1 + 5 * 5, 64),
              "patch_embed.proj.weight": (64, 3, 14, 14), "patch_embed.proj.bias": (64,),
              "norm.weight": (64,), "norm.bias": (64,)}
    layers = {"norm1": (64,), "attn.qkv": (192, 64), "attn.proj": (64, 64),
              "norm2": (64,), "mlp.fc1": (256, 64), "mlp.fc2": (64, 256)}
    for n in range(4):
        shapes |= {f"blocks.{n}.ls1.gamma": (64,), f"blocks.{n}.ls2.gamma": (64,)}
        for name, shape in layers.items():
            shapes |= {f"blocks.{n}.{name}.weight": shape, f"blocks.{n}.{name}.bias": shape[:1]}
    state = {key: 0.2 * torch.randn(shape) for key, shape in shapes.items()}
    file = tmp_path_factory.mktemp("picture") / "vit.pth"
    torch.save(state, file)
    return state, *load_pretrained(AST("nano", mels=128, stride=10, grid=(12, 101)), file)


def picture_block(state, n, x):
    """Block n as DINOv2 computes it, x + gamma * branch(norm(x)) twice: (B, N, 64)."""
    part = {key.removeprefix(f"blocks.{n}."): value for key, value in state.items()}
    weight = lambda name: (part[f"{name}.weight"], part[f"{name}.bias"])
    linear = lambda name, x: F.linear(x, *weight(name))
    norm = lambda name, x: F.layer_norm(x, (64,), *weight(name), eps=1e-6)
    qkv = linear("attn.qkv", norm("norm1", x)).reshape(*x.shape[:2], 3, 2, 32)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (B, 2, N, 32)
    y = (q @ k.mT / 32**0.5).softmax(dim=3) @ v
    x = x + part["ls1.gamma"] * linear("attn.proj", y.transpose(1, 2).flatten(2))
    y = F.gelu(linear("mlp.fc1", norm("norm2", x)))
    return x + part["ls2.gamma"] * linear("mlp.fc2", y)


@torch.no_grad()
def test_dinov2s_blocks_are_the_same_block_by_block(picture):
    state, ast, said = picture
    assert "DINOv2 layout" in said and "5 x 5, stride 16, eps 1e-06" in said, said
    x = torch.randn(2, 7, 64)
    for n, block in enumerate(ast.blocks):
        expected = picture_block(state, n, x)
        x = block(x)
        assert_close(x, expected, atol=1e-5, rtol=1e-5, msg=f"block {n} computes something else")


@torch.no_grad()
def test_dinov2s_patches_answer_to_an_even_picture_as_before():
    even = torch.ones(64, 3, 14, 14)
    larger = ast_adapters.from_dinov2({"patch.weight": even})["patch.weight"]
    assert larger.shape == (64, 3, 16, 16)
    assert_close(larger.sum((2, 3)), even.sum((2, 3)))


def test_dinov2s_positions_are_stretched_and_dist_is_a_copy_of_cls(picture):
    state, ast, _ = picture
    drawn = ast.positions(8, 6)
    assert torch.equal(drawn[:, 0], drawn[:, 1]), "DIST stands elsewhere than CLS"
    assert torch.equal(ast.dist_token, ast.cls_token), "DIST is no copy of CLS"
    stored = state["pos_embed"][:, 1:].transpose(1, 2).unflatten(2, (5, 5))
    whole = F.interpolate(stored, size=(8, 6), mode="bilinear")
    assert_close(drawn[:, 2:], whole.flatten(2).transpose(1, 2))


def torchs_attention(ours):
    """Torch's own layer with the weights of one of ours."""
    theirs = nn.MultiheadAttention(ours.o.in_features, ours.heads, batch_first=True)
    theirs.in_proj_weight.data = torch.cat([ours.q.weight, ours.k.weight, ours.v.weight]).detach()
    theirs.in_proj_bias.data = torch.cat([ours.q.bias, ours.k.bias, ours.v.bias]).detach()
    theirs.out_proj.load_state_dict(ours.o.state_dict())
    return theirs


@torch.no_grad()
def test_the_shared_dinov2_file_loads():
    file = REAL / "dinov2-small" / "dinov2_vits14.safetensors"
    if not file.exists():
        pytest.skip(f"no {file}")
    with torch.device("meta"):  # random weights would only be thrown away
        plain = AST("small")
    ast, said = load_pretrained(plain, file)
    assert "199 tensors, positions 37 x 37, stride 16" in said, said
    embedding = ast.eval()(torch.randn(1, 100, 128))
    assert embedding.shape == (1, 384) and embedding.isfinite().all()


def test_adapt_keeps_mode_and_device():
    with torch.device("meta"):
        plain = AST("nano").eval()
    ast = adapt(plain, "conformer")
    assert not any(module.training for module in ast.modules()), "what was inserted would train"
    assert {p.device.type for p in ast.parameters()} == {"meta"}


@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize("tokens", [9, 700, 1500])  # all heads at once, in slices, by the kernel
def test_attention_is_torchs_own_also_written_out_in_bfloat16(tokens, bfloat16):
    torch.manual_seed(0)
    ours = ast_adapters.Attention(96, 3)
    x = torch.randn(2, tokens, 96).requires_grad_()
    weight = torch.randn(2, tokens, 96)
    exact, _ = torchs_attention(ours)(x, x, x)
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        out = ours(x)
    room = 0.01 if bfloat16 else 1e-5
    assert (out - exact).norm() < room * exact.norm(), "other outputs"
    (expected,) = torch.autograd.grad(exact, x, weight)
    (gradient,) = torch.autograd.grad(out, x, weight.to(out.dtype))
    assert (gradient - expected).norm() < room * expected.norm(), "other gradients"


class Payload(str):
    """Unpickled, it would make the file of this name: a stand-in for a checkpoint that attacks."""

    def __reduce__(self):
        return open, (str(self), "w")


def nano_without(key):
    return {name: value for name, value in AST("nano").state_dict().items() if name != key}


@pytest.mark.parametrize("content, sentence", [
    (lambda: nano_without("pos_embed"), "it has no pos_embed"),
    (lambda: nano_without("cls_token"), "is not an AST-nano: .*cls_token"),
    (lambda: nano_without("norm.bias"), "is not an AST-nano: .*norm.bias"),
    (lambda: original_layout(AST("tiny")), "is not an AST-nano: .*size mismatch"),
    (lambda: AST("nano", grid=(1, 7)).state_dict(), "7 positions are no grid"),
    (lambda: {"blocks.0.ls1.gamma": torch.ones(3)}, "it has no pos_embed"),
    (lambda: torch.zeros(1), "holds no weights")])
def test_other_weights_are_refused_with_a_sentence(tmp_path, content, sentence):
    torch.save(content(), tmp_path / "a.pt")
    with pytest.raises(ValueError, match=f"(?s)a.pt .*{sentence}"):
        load_pretrained(AST("nano"), tmp_path / "a.pt")


def safetensors(header, body=bytes(4)):
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


def test_counters_beside_the_weights_of_a_safetensors_file_are_left_out(tmp_path):
    theirs = AST("nano")
    header = {"count": dict(dtype="I64", shape=[0], data_offsets=[0, 0])}
    body = b""
    for key, value in theirs.state_dict().items():
        start = len(body)
        body += value.numpy().tobytes()
        header[key] = dict(dtype="F32", shape=value.shape, data_offsets=[start, len(body)])
    (tmp_path / "a.safetensors").write_bytes(safetensors(header, body))
    ours, _ = load_pretrained(AST("nano"), tmp_path / "a.safetensors")
    assert torch.equal(ours.pos_embed, theirs.pos_embed)


@pytest.mark.parametrize("name, content", [
    ("a.pt", b"no checkpoint"), ("a.safetensors", b"no checkpoint"),
    ("a.safetensors", safetensors([])), ("a.safetensors", safetensors({"a": 3})),
    *(("a.safetensors", safetensors({"a": dict(dtype="F32", shape=shape, data_offsets=offsets)}))
      for shape, offsets in (([1], "04"), ([1], [-4, 0]), ("x", [0, 4])))])
def test_a_damaged_checkpoint_is_refused_with_a_sentence(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} is no checkpoint .* damaged"):
        load_pretrained(AST("nano"), tmp_path / name)


def test_a_missing_file_and_an_adapted_ast_are_refused_with_a_sentence(tmp_path):
    with pytest.raises(ValueError, match="no checkpoint at"):
        load_pretrained(AST("nano"), tmp_path / "none.pt")
    with pytest.raises(ValueError, match="load into a plain AST: this one carries 'linear'"):
        load_pretrained(adapt(AST("nano"), "linear"), "a.pt")


# --------------------------------------------------------------------------------------------------
# 3. The methods


@pytest.mark.parametrize("method, options, trainable", [
    ("linear", {}, 1_536), ("bitfit", {}, 102_144), ("full", {}, 86_187_264),
    ("prompt-shallow", {}, 231_936), ("prompt-deep", {}, 231_936), ("prefix", {}, 222_720),
    ("lora", {}, 222_720), ("dense-moa", {}, 923_724), ("soft-moa", {}, 923_640),
    ("adapter", {}, 250_512), ("adapter", dict(where="both"), 499_488),
    ("conformer", {}, 253_824), ("conformer", dict(where="both"), 506_112)])  # no dead LayerNorm
def test_counts_of_parameters_are_the_published_ones(method, options, trainable):
    """P1 and its code, on AST-base, without the head."""
    with torch.device("meta"):
        assert count(adapt(AST("base"), method, **options))[0] == trainable


CASES = [(method, {}) for method in METHODS] + [
    ("lora", dict(targets="qkvo", alpha=20.0)), ("dora", dict(targets="qk", rank=3)),
    ("conformer", dict(where="both", kernel=8)), ("soft-moa", dict(slots=3, where="mhsa")),
    ("adapter", dict(form="sequential", at="before", where="both"))]
# Counted in the paper and of no effect: a bias on the keys shifts all scores of a query alike, and
# the softmax does not see it; BatchNorm removes the bias of the convolution before it.
BLIND = re.compile(r"attn\.k\.(linear\.|layer\.)?(bias|shift)|depthwise\.bias")


def steps(ast, x):
    """Two optimiser steps that pull the embedding somewhere."""
    torch.manual_seed(1)
    optimiser = torch.optim.SGD([p for p in ast.parameters() if p.requires_grad], lr=0.5)
    target = torch.randn(len(x), ast.embed_dim)
    for _ in range(2):
        optimiser.zero_grad()
        (ast(x) * target).sum().backward()
        optimiser.step()


@pytest.fixture(scope="module", params=CASES, ids=str)
def case(request):
    """One method on a nano AST, as it starts and after two steps. Tests only read it."""
    method, options = request.param
    torch.manual_seed(0)
    plain = AST("nano").eval()
    fresh = adapt(copy.deepcopy(plain), method, **options).eval()
    x = torch.randn(3, 100, 64)
    ast = copy.deepcopy(fresh).train()
    steps(ast, x)
    return argparse.Namespace(method=method, plain=plain, fresh=fresh, ast=ast.eval(), x=x,
                              state=ast_adapters.adapter_state(ast))


def test_a_method_starts_as_the_frozen_model(case):
    same = torch.allclose(case.plain(case.x), case.fresh(case.x), atol=1e-6)
    if case.method in ("prompt-shallow", "prompt-deep", "prefix"):
        assert not same, "it adds tokens, and nobody sees them"
    else:
        assert same, "the added path is not zero at the start"


def test_a_method_moves_all_that_it_counts_and_nothing_that_is_frozen(case):
    before = case.fresh.state_dict()
    moved = {k for k, v in case.ast.state_dict().items() if not torch.equal(v, before[k])}
    trained = {name for name, p in case.ast.named_parameters() if p.requires_grad}
    frozen = moved - trained - {name for name, _ in case.ast.named_buffers()}
    assert not frozen, f"moved though frozen: {frozen}"
    still = {name for name in trained - moved if not BLIND.search(name)}
    assert not still, f"counted as trainable, and never moved: {still}"


def test_checkpointing_trains_the_same(case):
    saving = copy.deepcopy(case.fresh).train()
    saving.checkpointing = True
    steps(saving, case.x)
    assert all(map(torch.equal, case.ast.parameters(), saving.parameters())), "other gradients"


def test_an_adapter_lives_in_its_file_and_leaves_its_backbone_as_it_was(case, tmp_path):
    torch.save(case.state, tmp_path / "adapter.pt")
    state = torch.load(tmp_path / "adapter.pt", weights_only=True)
    plain = copy.deepcopy(case.plain)
    twin = ast_adapters.load_adapter(plain, state).eval()
    assert torch.equal(twin(case.x), case.ast(case.x)), "what is read is not what was saved"
    same = map(torch.equal, plain.parameters(), case.plain.parameters())
    assert all(same), "the adapter wrote into the backbone's weights"
    if case.method != "full":
        numbers = sum(v.numel() for v in state["weights"].values())
        assert numbers < 2e5, f"the file holds {numbers} of the backbone's 300,000 numbers"


def test_a_damaged_adapter_and_one_of_another_backbone_are_refused(case):
    part = case.state | {"weights": {"norm.bias": case.plain.norm.bias}}
    with pytest.raises(ValueError, match="this adapter is damaged"):
        ast_adapters.load_adapter(copy.deepcopy(case.plain), part)
    other = copy.deepcopy(case.plain)
    other.blocks[0].mlp.fc1.bias.data += 1
    if case.method == "full":  # its file is the whole model
        ast_adapters.load_adapter(other, case.state)
    else:
        with pytest.raises(ValueError, match="was trained on backbone"):
            ast_adapters.load_adapter(other, case.state)


@pytest.mark.parametrize("case", [("lora", {}), ("dora", {})], ids=str, indirect=True)
@torch.no_grad()
def test_merging_leaves_a_plain_ast_with_the_same_outputs(case):
    merged = ast_adapters.merge(copy.deepcopy(case.ast))
    assert merged.state_dict().keys() == case.plain.state_dict().keys(), "it is not plain"
    assert_close(merged(case.x), case.ast(case.x), atol=1e-5, rtol=1e-5)


def test_what_blocks_share_is_counted_once_stored_once_and_read(monkeypatch):
    def insert(ast):  # one scale for all blocks, as VeRA shares its matrices
        ast_adapters.insert_scales(ast, ["attn.o"], shift=False)
        for block in ast.blocks:
            block.attn.o.scale = ast.blocks[0].attn.o.scale
    monkeypatch.setitem(METHODS, "shared", (insert, {}))
    plain = AST("nano")
    ast = adapt(copy.deepcopy(plain), "shared")
    assert count(ast)[0] == 64 + 2 * 64, "one scale of 64 and the last LayerNorm should be counted"
    nn.init.zeros_(ast.blocks[0].attn.o.scale)
    state = ast_adapters.adapter_state(ast)
    assert sum(v.numel() for v in state["weights"].values()) == 64 + 2 * 64, "stored several times"
    twin = ast_adapters.load_adapter(plain, state)
    assert not twin.blocks[3].attn.o.scale.any(), "the last block does not read it"


def small_ast(method, options, monkeypatch):
    """An adapted AST that compiles quickly."""
    blocks = 2 if method == "prompt-deep" else 1  # this one has two kinds
    monkeypatch.setitem(ast_adapters.SIZES, "nano", (16, blocks, 2, 64, 16, (4, 6)))
    return adapt(AST("nano"), method, **options).eval()


@pytest.mark.parametrize("method, options", CASES, ids=str)
@torch.no_grad()
def test_a_method_takes_any_length_and_bfloat16(method, options, monkeypatch):
    ast = small_ast(method, options, monkeypatch)
    for frames in (16, 57, 250):
        x = torch.randn(2, frames, 64)
        with torch.autocast("cpu", torch.bfloat16):
            y = ast(x).float()
        assert_close(y, ast(x), atol=0.1, rtol=0)


@pytest.mark.parametrize("method", sorted(
    METHODS.keys() - {"linear", "bitfit", "prompt-shallow"}))  # compiled as full, full, prompt-deep
def test_a_method_takes_torch_compile(method, monkeypatch):
    ast = small_ast(method, {}, monkeypatch)
    torch._dynamo.reset()
    compiled = torch.compile(ast, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 57, 64)
    with torch.autocast("cpu", torch.bfloat16, enabled=method == "prefix"):
        assert_close(compiled(x), ast(x))


@pytest.mark.parametrize("pos_embed", ["crop", "zero"])
@pytest.mark.parametrize("method", ["full", "lora", "adapter", "conformer"])
def test_without_positions_only_the_conformer_adapter_sees_order(method, pos_embed):
    """P1's published code trains with zero positions (D1): what could it tell apart?"""
    x = torch.randn(2, 96, 64)
    swapped = torch.cat([x[:, 48:], x[:, :48]], dim=1)  # with stride 16: the same patches, permuted
    ast = adapt(AST("nano", pos_embed=pos_embed), method)
    steps(ast, x)
    if pos_embed == "zero":  # full fine-tuning has moved them
        nn.init.zeros_(ast.pos_embed)
    with torch.no_grad():
        same = torch.allclose(ast.eval()(x), ast(swapped), atol=1e-4)
    if pos_embed == "zero" and method != "conformer":
        assert same, "what tells it the order?"
    else:
        assert not same, "it does not see the order"


def test_lora_and_the_lengths_of_doras_rows_by_hand():
    linear = nn.Linear(5, 4)
    lora = ast_adapters.LoRA(linear, rank=2, alpha=6)
    nn.init.normal_(lora.B)
    x = torch.randn(3, 5)
    assert_close(lora(x), x @ (linear.weight + 3 * lora.B @ lora.A).T + linear.bias)
    dora = ast_adapters.DoRA(linear, rank=2, alpha=2)
    nn.init.normal_(dora.B)
    dora.m.data.mul_(2)
    weight = (dora(torch.eye(5)) - linear.bias).T  # (4, 5)
    assert_close(weight.norm(dim=1), dora.m[:, 0])


@pytest.mark.parametrize("options, formula", [
    (("parallel", "after", True), lambda f, a, u: f(u) + a(u)),
    (("sequential", "after", True), lambda f, a, u: f(u) + a(f(u))),
    (("sequential", "after", False), lambda f, a, u: a(f(u))),
    (("sequential", "before", True), lambda f, a, u: f(u + a(u))),
    (("sequential", "before", False), lambda f, a, u: f(a(u)))], ids=str)
def test_the_placement_of_an_adapter_by_hand(options, formula):
    f = nn.Linear(4, 4)
    a = nn.Linear(4, 4)
    u = torch.randn(2, 4)
    assert_close(ast_adapters.Placed(f, a, *options)(u), formula(f, a, u))


def test_the_conformer_adapter_by_hand():
    """In the paper's order, an even kernel padded less on the left."""
    unit = ast_adapters.Conformer(8, rank=3, kernel=4).eval()
    nn.init.normal_(unit.up.weight)
    x = torch.randn(2, 7, 8)
    y = F.pad(F.glu(unit.down(x), 2), (0, 0, 1, 2))  # (2, 7, 3) -> (2, 1 + 7 + 2, 3)
    taps = unit.depthwise.weight[:, 0].T  # (4, 3)
    y = torch.stack([(y[:, t : t + 4] * taps).sum(1) for t in range(7)], 1)  # (2, 7, 3)
    y = (y + unit.depthwise.bias) / math.sqrt(1 + unit.norm.eps)  # a fresh BatchNorm
    assert_close(unit(x), unit.up(F.silu(y)))


def test_convpass_mixes_neighbours_in_the_grid_of_patches():
    unit = ast_adapters.Convpass(8, rank=3, rows=4)
    nn.init.normal_(unit.up.weight)
    x = torch.randn(1, 2 + 4 * 5, 8)
    changed = x.clone()
    changed[:, 2 + 1 * 5 + 2] += 1  # row 1, column 2
    differs = (unit(x) != unit(changed)).any(dim=2)[0]
    near = torch.zeros(4, 5, dtype=torch.bool)
    near[0:3, 1:4] = True
    assert torch.equal(differs[2:].reshape(4, 5), near), "the 3 x 3 patches around should change"
    assert not differs[:2].any(), "CLS and DIST are nobody's neighbours"


def test_the_mixtures_by_hand():
    """The soft one a clip at a time, as the equations stand in the paper."""
    dense = ast_adapters.DenseMoA(8, 2, experts=3)
    soft = ast_adapters.SoftMoA(8, 2, experts=3, slots=2)
    for expert in (*dense.experts, *soft.experts):
        nn.init.normal_(expert.up.weight)
    x = torch.randn(2, 5, 8)
    share = F.softmax(dense.router(x), dim=2)
    expected = torch.stack([expert(x) for expert in dense.experts], 3) @ share[..., None]
    assert_close(dense(x), expected[..., 0])
    for b in range(2):
        logits = x[b] @ soft.phi  # (5, 6)
        inputs = logits.softmax(0).T @ x[b]  # (6, 8)
        outputs = torch.cat([soft.experts[i](inputs[2 * i : 2 * i + 2]) for i in range(3)])
        assert_close(soft(x)[b], logits.softmax(1) @ outputs)


@pytest.mark.parametrize("method, options, sentence", [
    ("lorra", {}, "unknown method 'lorra': choose from full, linear"),
    ("linear", dict(rank=3), "unknown option of 'linear' 'rank': it has none"),
    ("lora", dict(rnk=3), "unknown option of 'lora' 'rnk': choose from rank, alpha, targets"),
    ("lora", dict(targets="qx"), "name some of q, k, v, o"),
    ("adapter", dict(rank=0), "at least 1"), ("adapter", dict(rank=2.5), "a whole number"),
    ("adapter", dict(rank=65), "at most 64"), ("conformer", dict(kernel=52), "at most 51"),
    ("adapter", dict(where="top"), "from ffn, mhsa, both"), ("prefix", dict(tokens=7), "7 is odd"),
    ("adapter", dict(at="before"), "sequential")])
def test_bad_options_are_answered_with_a_sentence(method, options, sentence):
    with pytest.raises(ValueError, match=re.escape(sentence)):
        adapt(AST("nano"), method, **options)


def test_an_option_of_a_new_method_may_be_a_fraction(monkeypatch):
    def insert(ast, scale):
        ast.scale = scale
    monkeypatch.setitem(METHODS, "scaled", (insert, dict(scale=0.5)))
    assert adapt(AST("nano"), "scaled", scale=0.1).scale == 0.1


@pytest.mark.parametrize("shape", [(2, 100, 128), (2, 15, 64), (100, 64)])
def test_other_input_is_answered_with_a_sentence(shape):
    sentence = f"at least 16 frames, 64 mel bins), got {shape}"
    with pytest.raises(ValueError, match=re.escape(sentence)):
        AST("nano")(torch.randn(shape))


@pytest.mark.parametrize("pool, queries", [("mean", slice(None)), ("cls", slice(2))])
@torch.no_grad()
def test_the_drawn_attention_is_that_of_the_pooled_tokens(pool, queries):
    """Against the weights that torch's own layer returns, with a prompt between CLS and patches."""
    ast = adapt(AST("nano", pool=pool), "prompt-shallow", tokens=3).eval()
    inner = ast.blocks[-1].attn
    read = []
    inner.register_forward_pre_hook(lambda module, inputs: read.append(inputs[0]))
    drawn = ast_adapters.pooled_attention(ast, torch.randn(1, 60, 64))  # (1, 4, 3)
    _, weights = torchs_attention(inner)(read[0], read[0], read[0])  # (1, N, N), of all heads
    expected = weights[:, queries].mean(dim=1)  # (1, N)
    assert_close(drawn.flatten(1), expected[:, 2 + 3 :])


# --------------------------------------------------------------------------------------------------
# 4. lightweight_sv.py: counts, lightening, pooling, head, scoring, cost

SLIM = {"amcrn": dict(width=16), "resnet34": dict(width=8), "ecapa-tdnn": dict(width=64)}
LIGHT = {"plain": {}, "module": dict(subsets=2), "none": dict(subsets=2, fusion="none"),
         "mean": dict(subsets=2, fusion="mean"), "shared": dict(subsets=2, share=True)}
BLOCKS = [(sv.BasicBlock, 16, 32, dict(stride=2), (2, 16, 6, 10)),
          (sv.SERes2Block, 32, 32, dict(dilation=2, bottleneck=4), (2, 32, 1, 20)),
          (sv.MultiScaleBlock, 16, 32, {}, (2, 16, 1, 20)),
          (sv.RecurrentBlock, 32, 32, {}, (2, 32, 1, 20))]


def slim(name, **options):
    torch.manual_seed(0)
    return sv.MODELS[name](mels=40, embed_dim=24, **SLIM[name], **options)


@pytest.mark.parametrize("name, width, millions, giga", [
    ("resnet34", 32, 6.634, 4.528), ("ecapa-tdnn", 512, 6.191, 1.037),
    ("ecapa-tdnn", 1024, 14.657, 2.649)])
def test_hosts_have_the_published_counts(name, width, millions, giga):
    encoder = sv.MODELS[name](width=width)
    assert count(encoder)[1] / 1e6 == pytest.approx(millions, rel=0.002), "other parameters"
    macs = sv.count_macs(encoder, frames=200)
    assert macs / 1e9 == pytest.approx(giga, rel=0.002), "other multiply-accumulates"


@pytest.mark.parametrize("name, millions, giga", [
    ("resnet34", 2.7, 1.25), ("ecapa-tdnn", 3.0, 0.45)])
def test_light_hosts_keep_their_budget(name, millions, giga):
    encoder = sv.MODELS[name](subsets=4)
    assert count(encoder)[1] / 1e6 <= millions, "too many parameters"
    assert sv.count_macs(encoder, frames=200) / 1e9 <= giga, "too many multiply-accumulates"


@pytest.mark.parametrize("name", SLIM)
@pytest.mark.parametrize("options", LIGHT.values(), ids=LIGHT)
def test_every_parameter_is_trained(name, options):
    x = torch.randn(4, 60, 40)
    y = torch.arange(4)
    head = sv.AAMSoftmax(24, 5)
    encoder = slim(name, **options).train()
    optimizer = torch.optim.SGD(encoder.parameters(), lr=0.1)
    for bfloat16 in (True, False):  # the gates have a gradient from the second step on
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            loss = F.cross_entropy(head(encoder(x), y), y)
        loss.backward()
        optimizer.step()
    for key, p in encoder.named_parameters():
        assert p.grad.isfinite().all(), f"the gradient of {key} is not finite"
        assert p.grad.abs().max() > 1e-7, f"{key} gets no gradient but rounding noise"


@pytest.mark.parametrize("block, d_in, d_out, options, shape", BLOCKS)
def test_groups_are_blocks_that_do_not_hear_of_each_other(block, d_in, d_out, options, shape):
    torch.manual_seed(0)
    narrow = block(d_in, d_out, groups=2, **options).eval()
    x = torch.randn(shape)
    changed = x.clone()
    changed[:, :d_in // 2] += 1
    first, second = narrow(x).chunk(2, dim=1)
    first_changed, second_changed = narrow(changed).chunk(2, dim=1)
    assert torch.equal(second, second_changed), "group 2 hears of group 1"
    assert not torch.allclose(first, first_changed), "group 1 does not hear of itself"
    one = block(d_in // 2, d_out // 2, **options)
    assert count(narrow)[1] == 2 * count(one)[1], "two groups are not two narrow blocks"


@pytest.mark.parametrize("block, d_in, d_out, options, shape", BLOCKS)
def test_shared_weights_treat_all_subsets_alike(block, d_in, d_out, options, shape):
    torch.manual_seed(0)
    light = sv.lighten(block, d_in, d_out, 2, True, "none", **options).eval()
    half = torch.randn(shape)[:, :d_in // 2]
    expected = light[1].block(half).repeat(1, 2, 1, 1)
    assert_close(light(torch.cat([half, half], dim=1)), expected)


def test_the_module_starts_as_the_identity_and_by_hand():
    module = sv.TransformationModule(2, 2).eval()  # two subsets of one channel
    for dtype in (torch.float32, torch.bfloat16):
        x = torch.randn(2, 2, 6, 10).to(dtype)
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            assert_close(module(x), x, rtol=0, atol=0, msg="it should start as the identity")
    nn.init.zeros_(module.gate.weight)
    module.gate.bias.data = torch.tensor([math.log(3.0), 0.0])  # a = 3/4 and 1/4
    module.gamma.data = torch.tensor([1.0, 2.0])
    x = torch.tensor([[[[1.0, 3.0]], [[6.0, 6.0]]]])  # p = 2 and 6, so m = 3
    expected = torch.tensor([[[[4.0, 6.0]], [[12.0, 12.0]]]])
    assert_close(module(x), expected, rtol=1e-4, atol=1e-4)


def test_pooling_by_hand_with_the_context_beside_every_frame():
    stats = sv.mean_and_std(torch.tensor([[[[1.0, 3.0]]]]), torch.tensor([0.25, 0.75]))
    assert_close(stats, torch.tensor([[2.5, math.sqrt(0.25 * 2.25 + 0.75 * 0.25)]]))
    x = torch.randn(2, 8, 1, 20)
    pool = sv.AttentivePooling(8, bottleneck=4)
    context = sv.mean_and_std(x)[:, :, None, None].expand(-1, -1, -1, 20)
    whole = torch.cat([pool.frames.weight, pool.context.weight[:, :, None, None]], dim=1)  # W
    down = torch.tanh(F.conv2d(torch.cat([x, context], dim=1), whole, pool.frames.bias))
    assert_close(pool(x), sv.mean_and_std(x, pool.scores(down).softmax(dim=-1)))


@pytest.mark.parametrize("layer, macs", [
    (nn.Linear(6, 7), 50 * 6 * 7),
    (nn.LSTM(6, 5, bidirectional=True), 50 * 2 * 4 * 5 * (6 + 5)),  # frames, directions, gates
    (nn.Conv1d(50, 8, 3, padding=1, groups=2), 6 * 8 * 25 * 3)])  # along the mel bins
def test_macs_by_hand(layer, macs):
    layer.mels = 6
    assert sv.count_macs(layer, frames=50) == macs


def test_aam_softmax_by_hand():
    head = sv.AAMSoftmax(2, 2, margin=0.2, scale=30)
    head.weight.data = torch.tensor([[2.0, 0.0], [0.0, 3.0]])
    x = torch.tensor([[math.cos(0.5), math.sin(0.5)]]) * 7
    assert_close(head(x), 30 * x / 7)
    expected = 30 * torch.tensor([[math.cos(0.5 + 0.2), math.sin(0.5)]])  # for the true one alone
    assert_close(head(x, torch.tensor([0])), expected)


@pytest.mark.parametrize("sign", [1, -1])
def test_aam_softmax_has_a_gradient_where_embedding_and_weight_are_parallel(sign):
    head = sv.AAMSoftmax(2, 2)
    x = (sign * head.weight.detach()[:1]).requires_grad_()
    F.cross_entropy(head(x, torch.tensor([0])), torch.tensor([0])).backward()
    assert x.grad.isfinite().all(), "the embedding's gradient is not finite"
    assert head.weight.grad.isfinite().all(), "the weight's gradient is not finite"


@pytest.mark.parametrize("targets, others, eer, dcf", [  # a digit is a score
    ("456", "123", 0, 0), ("123", "456", 100, 1), ("9873", "6521", 25, 1 / 4),
    ("984", "75321", 100 / 3, 1 / 3), ("5599", "5119", 100 / 3, 1), ("55", "55", 50, 1)])
def test_error_rates_by_hand_whatever_the_order(targets, others, eer, dcf):
    scores = [int(digit) for digit in targets + others]
    labels = np.repeat([1, 0], [len(targets), len(others)])
    for order in (1, -1):
        rates = sv.error_rates(scores[::order], labels[::order])
        assert list(rates.values()) == pytest.approx([eer, dcf, dcf])


def test_error_rates_of_normal_scores():
    labels = np.repeat([1, 0], [1000, 10_000])
    scores = np.random.RandomState(0).randn(11_000) + 3 * labels
    rates = sv.error_rates(scores, labels)
    assert list(rates.values()) == pytest.approx([6.8, .632, .4313], abs=1e-6)
    assert sv.min_dcf(scores, labels, 0.01) == pytest.approx(.632, abs=1e-6)


def test_adaptive_s_norm_by_hand():
    embeddings = [[1, 0], [0, 2]]
    cohort = [[3, 4], [4, 3], [-1, 0]]
    # cosines .6 .8 -1 and .8 .6 0; the best two of each: mean .7, std .1
    score = sv.adaptive_s_norm([0.9, 0.5], [[0, 1], [1, 0]], embeddings, cohort, top_n=2)
    assert score == pytest.approx([2.0, -2.0])


def test_a_threshold_and_a_score_file_give_error_rates(tmp_path, capsys):
    scores = [.9, .8, .7, .3, .6, .5, .2, .1]
    labels = [1, 1, 1, 1, 0, 0, 0, 0]
    assert sv.error_rates_at(scores, labels, sv.threshold_at(scores, labels)) == (.25, .25)
    assert sv.error_rates_at(scores, labels, .3) == (0, .5), "a score at the threshold is accepted"
    rows = [f"a 1 b 2 {score} {label}" for score, label in zip(scores, labels)]
    write(tmp_path / "scores", *rows)
    sv.main([str(tmp_path / "scores")])
    assert "8 trials, 4 of one speaker: EER 25.000 %" in capsys.readouterr().out
    write(tmp_path / "scores", "a b .5 1", "a b .5 yes")
    with pytest.raises(SystemExit, match="line 2: expected `id_a id_b score label`"):
        sv.main([str(tmp_path / "scores")])


@pytest.mark.parametrize("call, sentence", [
    (lambda: slim("amcrn", subsets=3), "mels 40 and width 16; these would: 1, 2, 4, 8"),
    (lambda: slim("ecapa-tdnn", subsets=3),
     "does not divide mels 40 and scale 8 and aggregate 192; these would"),
    (lambda: slim("resnet34", subsets=3), "subsets=3 does not divide width 8; these would"),
    (lambda: slim("amcrn")(torch.randn(2, 60, 80)), r"40 mel bins\), got \(2, 60, 80\)"),
    (lambda: slim("amcrn", subsets=2, fusion="sum"), "expected one of: module, mean"),
    (lambda: sv.equal_error_rate([.1, .2], [1, 1]), "no non-target trials"),
    (lambda: sv.equal_error_rate([.1, np.nan], [0, 1]), "1 of 2 scores are not finite"),
    (lambda: sv.equal_error_rate([.1], [0, 1]), "one label for each")])
def test_bad_sizes_features_and_trials_are_answered_with_a_sentence(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()


# --------------------------------------------------------------------------------------------------
# 5. train.py and the README: helpers, training, files, refusals, tables, use, a pretended GPU

README = (HERE / "README.md").read_text(encoding="utf-8")
ONE_STEP = ["--epochs=1", "--steps=1"]


def tone(label, samples=8000):
    """A clip as those of a class of `folder_corpus`."""
    return 0.5 * np.sin(np.arange(samples) * (label + 1) * 0.3)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A folder corpus, a nano AST to start from, and settings of a run of a second."""
    folder = tmp_path_factory.mktemp("train")
    folder_corpus(folder / "root")
    torch.manual_seed(0)
    ast = AST("nano")
    torch.save(dict(encoder=ast.state_dict(), settings=ast.settings), folder / "nano.pt")
    settings = dict(data="folder", root=str(folder / "root"), cache=str(folder / "cache"),
                    method="lora", init=str(folder / "nano.pt"), epochs=3, batch_size=4, frames=50,
                    device="cpu", bf16=False)
    return folder, settings


def run(settings, out, **changes):
    return train.run(train.Config(**settings | changes, out=str(out)))


def told(*arguments):
    """What a command prints, with the sentence or the status that it ends with."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(out):
        try:
            train.main([str(argument) for argument in arguments])
        except SystemExit as stopped:
            out.write(f"\nended with {stopped.code}")
    return out.getvalue()


def as_flags(settings, *but):
    flags = ["--no-bf16"]
    for name, value in settings.items():
        if name not in ("bf16", *but):
            flags.append(f"--{name.replace('_', '-')}={value}")
    return flags


def weights(out):
    return torch.load(out / "last.pt", weights_only=True)["model"]


def read_json(path):
    return json.loads(path.read_text(encoding="utf-8"))


def log_of(out, key="epoch"):
    if not (out / "log.jsonl").exists():
        return []
    return [json.loads(line)[key] for line in (out / "log.jsonl").read_text().splitlines()]


def stop_after(patch, saves):
    """Let Ctrl-C come behind so many epochs; return the growing list of their folders."""
    save_last = train.save_last
    saved = []

    def save_and_stop(out, *state):
        save_last(out, *state)
        saved.append(out.name)
        if len(saved) == saves:
            raise KeyboardInterrupt
    patch.setattr(train, "save_last", save_and_stop)
    return saved


def test_compare_trains_every_method_for_a_row_of_its_table(small, tmp_path):
    flags = as_flags(small[1] | dict(out=tmp_path / "table"), "method")
    printed = told("compare", *flags, *ONE_STEP)
    assert printed.count("tested once") == len(METHODS), printed
    assert f"2 of {len(METHODS)}: linear" in printed, "no word of how far it is"
    table = read_json(tmp_path / "table/compare.json")
    assert list(table) == list(METHODS)
    assert all(results[0]["trainable"] > 0 for results in table.values()), "nothing was trained"


@pytest.mark.parametrize("subsets", [1, 2])
@pytest.mark.parametrize("host", sv.MODELS)
def test_every_host_is_trained_for_a_step(verified, tmp_path, host, subsets):
    settings = verified[1] | dict(model=host, width=16, subsets=subsets, out=tmp_path / "run")
    printed = told(*as_flags(settings, "init", "method", "speed_perturb", "noise", "reverb"),
                   *ONE_STEP)
    assert "the weights of epoch 1: eer" in printed, printed
    assert 0 <= read_json(tmp_path / "run/results.json")["eer"] <= 100


def test_an_option_without_a_field_of_config_is_named(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(train, "METHOD_OPTIONS", ["rank", "wings"])
        assert "'wings' that is no flag" in told("evaluate", "gone"), "a method's is ignored"
    monkeypatch.setitem(sv.MODELS, "winged", lambda mels=80, wings=2: None)
    assert "'wings' that is no flag" in told("evaluate", "gone"), "a host's is ignored"


def kill_after_an_epoch(settings, out):
    """Start or resume a run, and kill it at a random moment after its next epoch."""
    done = log_of(out)
    command = [sys.executable, HERE / "train.py", *as_flags(settings), "--out", out, "--resume"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    while log_of(out) == done and process.poll() is None:
        time.sleep(0.002)
    time.sleep(np.random.default_rng().uniform(0, 0.1))  # training, evaluating, saving
    process.kill()
    assert process.wait() == -9, "the run ended before it could be killed"


def test_a_run_killed_twice_equals_an_unbroken_one_bit_for_bit(small, tmp_path):
    settings = small[1] | dict(
        method="conformer", noise="generated", reverb="generated", gain=6.0, epochs=10)
    expected = run(settings, tmp_path / "unbroken")
    killed = tmp_path / "killed"
    kill_after_an_epoch(settings, killed)
    torch.load(killed / "best.pt", weights_only=True)  # whole, whenever it was killed
    kill_after_an_epoch(settings, killed)
    results = run(settings, killed, resume=True)
    machine = dict(seconds=0, peak_mb=0)
    assert_close(weights(killed), weights(tmp_path / "unbroken"), atol=0, rtol=0)
    assert results | machine == expected | machine, "other results"
    assert log_of(killed) == list(range(1, 11)), "an epoch is logged twice or not at all"


@pytest.fixture(scope="module")
def stopped(small, tmp_path_factory):
    """The folder of a run that Ctrl-C stopped after its first epoch."""
    out = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.MonkeyPatch.context() as patch:
        stop_after(patch, 1)
        assert f"--resume --out {out}" in told(*as_flags(small[1]), "--out", out)
    return out


@pytest.mark.parametrize("fault, changes, sentence", [
    ("none", {}, "holds a run already"),
    ("none", dict(resume=True, lr=0.5), "configuration (lr 0.02 -> 0.5)"),
    ("clip", dict(resume=True), "begun on other clips"),
    ("disk", dict(resume=True), "No space left")])
def test_a_refusal_spoils_no_checkpoint(small, stopped, tmp_path, fault, changes, sentence):
    shutil.copytree(small[1]["root"], tmp_path / "root")
    shutil.copytree(stopped, tmp_path / "run")
    part = tmp_path / "run/last.pt.part"
    if fault == "clip":
        save_clips(tmp_path, "root/class1/3.wav")
    if fault == "disk":
        part.symlink_to("/dev/full")  # every write there answers: no space left
    with pytest.raises((ValueError, OSError), match=re.escape(sentence)):
        run(small[1], tmp_path / "run", root=str(tmp_path / "root"), **changes)
    assert (tmp_path / "run/last.pt").read_bytes() == (stopped / "last.pt").read_bytes()
    assert not part.is_symlink(), "a half-written file stays"


def test_a_run_of_an_older_program_goes_on(small, stopped, tmp_path):
    """Its config lacks a field that is new, and has one that is gone."""
    shutil.copytree(stopped, tmp_path, dirs_exist_ok=True)
    config = read_json(tmp_path / "config.json")
    del config["snr"]
    write(tmp_path / "config.json", json.dumps(config | dict(wings=2)))
    run(small[1], tmp_path, resume=True)
    assert log_of(tmp_path) == [1, 2, 3]


@pytest.mark.parametrize("name", ["last.pt", "config.json", "results.json"])
def test_a_damaged_file_of_a_run_is_named(small, stopped, tmp_path, name):
    shutil.copytree(stopped, tmp_path / "run")
    (tmp_path / "run" / name).write_bytes(b"")
    with pytest.raises(ValueError, match=f"{name} is damaged; delete it"):
        run(small[1], tmp_path / "run", resume=True)


# Several processes. The last run of this sweep fails in the second one.
WORKER = """
import train

def fail(ast):
    ast.requires_grad_(True)
    ast.register_forward_hook(lambda *call: call[2] * float("nan"))

if train.RANK == 1:
    train.METHODS["full"] = fail, {}
train.main()
"""


@pytest.fixture(scope="module")
def two_processes(small, tmp_path_factory):
    """(folder, what they printed, results of the same run in one process)."""
    folder = tmp_path_factory.mktemp("two")
    (folder / "worker.py").write_text(WORKER)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               "worker.py", "sweep", "method=lora,full", *as_flags(small[1]), "--out=two"]
    done = subprocess.run(command, cwd=folder, text=True, capture_output=True, timeout=240,
                          env=os.environ | {"PYTHONPATH": str(HERE)})
    return folder, done, run(small[1], folder / "one")


def test_two_processes_learn_and_test_what_one_does(two_processes):
    folder, done, one = two_processes
    assert (folder / "two/lora/last.pt").exists(), done.stderr
    assert_close(weights(folder / "two/lora"), weights(folder / "one"), atol=1e-4, rtol=1e-5)
    expected = pytest.approx(log_of(folder / "one", "loss"), abs=1e-5)
    assert log_of(folder / "two/lora", "loss") == expected, "other losses"
    assert read_json(folder / "two/lora/results.json")["accuracy"] == one["accuracy"]
    assert done.stdout.count("tested once") == 1, "each of them prints"


def test_a_process_that_fails_ends_the_others_with_a_sentence(two_processes):
    folder, done, _ = two_processes
    assert done.returncode == 1 and not (folder / "two/full/last.pt").exists()
    assert re.search(r"error in process 1: the loss became nan in .* class\d/", done.stderr)


def test_clips_that_do_not_divide_among_processes_are_refused(small, monkeypatch):
    monkeypatch.setattr(train, "WORLD", 2)
    cfg = train.with_recipe(train.Config(**small[1] | dict(batch_size=32)))
    with pytest.raises(ValueError, match="21 clips a step do not divide among 2 processes"):
        train.check_corpus(cfg, train.open_corpus(cfg))


@pytest.fixture(scope="module")
def classifier(small):
    """A nano AST that tells the three tones of `small` apart: (path of best.pt, results)."""
    out = small[0] / "classifier"
    return out / "best.pt", run(small[1], out, epochs=10, method="conformer", seed=3)


@pytest.mark.parametrize("scores, best", [((50.0, 80.0, 20.0), 2), ((50.0, 80.0, 80.0, 20.0), 3)],
                         ids=["the best epoch", "the later of equal ones"])
def test_best_pt_holds_the_weights_of(small, tmp_path, monkeypatch, scores, best):
    seen = []  # the weights that validation saw

    def evaluate(cfg, corpus, model, split, *more, **options):
        if split == "valid":
            seen.append(copy.deepcopy(model.encoder.state_dict()))
        return dict(accuracy=50.0, score=scores[len(seen) - 1])
    monkeypatch.setattr(train, "evaluate", evaluate)
    run(small[1], tmp_path, epochs=len(scores))
    saved = torch.load(tmp_path / "best.pt", weights_only=True)
    assert saved["epoch"] == best
    assert_close(saved["encoder"], seen[best - 1], atol=0, rtol=0)


def test_a_figure_is_drawn_of_a_log_without_a_new_key(small, tmp_path):
    pytest.importorskip("matplotlib")
    write(tmp_path / "log.jsonl", '{"epoch": 1, "loss": 2.5}', '{"epoch": 2, "loss": 1.5}')
    train.draw_log(tmp_path, str(tmp_path / "log.png"))
    assert (tmp_path / "log.png").stat().st_size > 1000


def test_the_learning_rate_rises_in_a_line_and_falls_in_half_a_cosine():
    cfg = train.Config(lr=2.0, warmup=0.1)
    rates = [train.learning_rate(cfg, step, 100) for step in (0, 9, 55, 99)]
    assert rates == pytest.approx([0.2, 2.0, 1.0, 0.0], abs=1e-3)


def test_the_margin_of_an_ast_that_learns_speakers_rises(verified, small, tmp_path, monkeypatch):
    forward = sv.AAMSoftmax.forward
    margins = []

    def noted(head, *inputs):
        if head.training and len(inputs[0]) == 4:  # not the step that is measured
            margins.append(head.margin)
        return forward(head, *inputs)
    monkeypatch.setattr(train, "measure_step", lambda *_: (0.0, 0.0))
    monkeypatch.setattr(sv.AAMSoftmax, "forward", noted)
    run(small[1], tmp_path, root=verified[1]["root"], epochs=2, steps=5, margin_rise=0.5)
    assert margins == pytest.approx([.04, .08, .12, .16, .2, .2, .2, .2, .2, .2])


def decaying(method, **options):
    """The names of the parameters that weight decay pulls to zero."""
    model = train.Model(adapt(AST("nano"), method, **options), ast_adapters.LinearHead(64, 3))
    optimiser = train.make_optimiser(train.Config(lr=0.1, weight_decay=0.5), model)
    ids = set()
    for group in optimiser.param_groups:
        if group["weight_decay"]:
            ids |= {id(p) for p in group["params"]}
    return {name for name, p in model.named_parameters() if id(p) in ids}


@pytest.mark.parametrize("method", METHODS)
def test_weight_decay_leaves_scales_biases_and_norms_alone_at_any_rank(method):
    names = decaying(method)
    assert "head.weight" in names, "the head's matrix should decay"
    vectors = ("bias", "scale", "shift", ".m", "norm.weight", "cls_token", "dist_token")
    assert not {name for name in names if name.endswith(vectors)}, "vectors decay"
    if "rank" in METHODS[method][1]:
        assert decaying(method, rank=1) == names, "other parameters decay at rank 1"


def test_a_loss_that_is_not_finite_names_the_clips_of_its_batch(small, tmp_path, monkeypatch):
    batches = []
    features = data.features

    def broken(batch, encoder):
        batches.append([int(clip) for clip in batch.clips])
        x = features(batch, encoder)
        return x * math.nan if len(batches) == 2 else x  # the second step's
    monkeypatch.setattr(data, "features", broken)
    ids = train.open_corpus(train.Config(**small[1])).ids
    with pytest.raises(ValueError, match="the loss became nan") as stop:
        run(small[1], tmp_path)
    assert all(ids[clip] in str(stop.value) for clip in batches[1]), stop.value


def test_a_profile_has_a_line_for_each_phase_and_writes_its_trace(small, here):
    printed = told("profile", *as_flags(small[1], "epochs"), "--figure", "trace.json")
    times = re.findall(r"^ *([\d.]+) ms +[\d.]+% +([\w ]+)$", printed, re.M)
    names = ["data", "augmentation", "features", "forward", "backward", "optimiser", "a step",
             "its products alone"]
    assert [name for _, name in times] == names, printed
    assert 0 < float(times[-1][0]) < float(times[-2][0]), "the floor should lie below a step"
    assert os.listdir() == ["trace.json"] and "forward" in Path("trace.json").read_text()


@pytest.mark.parametrize("typed, recipe", [  # P1, section 3.1
    (dict(data="esc50"), dict(frames=500, batch_size=32, epochs=50, spec_f=24, spec_t=80)),
    (dict(data="urbansound8k"), dict(frames=400, batch_size=32, epochs=30, spec_f=24, spec_t=80)),
    (dict(data="speechcommands"), dict(frames=100, batch_size=128, epochs=75, spec_f=0)),
    (dict(data="fluentspeech"), dict(frames=400, batch_size=32, epochs=75, spec_f=0)),
    (dict(method="full"), dict(lr=5e-5, weight_decay=0.1, warmup=0)),
    (dict(method="linear"), dict(lr=1e-3)), (dict(method="bitfit"), dict(lr=5e-3)),
    (dict(method="lora"), dict(lr=5e-3)), (dict(method="prefix"), dict(lr=1e-2)),
    (dict(data="esc50", epochs=2), dict(epochs=2, frames=500))])  # what is typed wins
def test_recipes_are_p1s(typed, recipe):
    cfg = train.with_recipe(train.Config(model="ast-base", **typed))
    assert {name: getattr(cfg, name) for name in recipe} == recipe


@pytest.mark.parametrize("command", train.COMMANDS)
def test_the_help_names_a_command_and_has_an_example_that_it_understands(command):
    assert re.search(rf"^ +{command} ", told("--help"), re.M)
    printed = told(command, "--help")
    example = re.search(r"example: python train.py ([^\n]+(?:\n[^\n]+)*)", printed)[1]
    assert train.parse(shlex.split(example))[0] == command


@pytest.fixture(scope="module")
def bad_place(small, tmp_path_factory):
    """A folder to type bad commands in: an empty folder, a file that holds code, a corpus."""
    folder = tmp_path_factory.mktemp("bad")
    (folder / "empty").mkdir()
    Path(small[1]["cache"]).mkdir(exist_ok=True)
    torch.save(Payload(folder / "owned"), folder / "code.pt")
    (folder / "notes.txt").write_text("no checkpoint")
    (folder / "tones").symlink_to(small[1]["root"], target_is_directory=True)
    (folder / "cache").symlink_to(small[1]["cache"], target_is_directory=True)
    return folder


TONES = "--method full --init none --data folder --root tones"
OF_ANOTHER_COMMAND = [
    "predict RUN a.wav --epochs 7", "evaluate RUN --lr 1", "verify RUN a.wav b.wav --csv x",
    "embed RUN a.wav --method lora", "train --csv x", "train --durations 1", "train --as-norm",
    "compare --method lora", "profile --seeds 2", "sweep rank=1 --durations 1"]


@pytest.mark.parametrize("command, sentence", [
    *((command, "unrecognized arguments: --") for command in OF_ANOTHER_COMMAND),
    ("trian", "did you mean train"), ("evalute RUN", "did you mean evaluate"),
    ("--metod lora", "did you mean --method"), ("train --epoch 3", "did you mean --epochs"),
    ("predict RUN a.wav --cvs x", "did you mean --csv"), ("--lrr 1", "did you mean --lr"),
    ("--data nope", "--data: invalid choice: 'nope'"),
    ("--data folder", "Name its folder (--root)"),
    (f"{TONES} --noise nope", "nope"), ("--data esc50 --root empty", "empty/meta/esc50.csv'"),
    ("--data voxceleb --root empty", "Ask for the audio by the form at https:"),
    (f"{TONES} --init code.pt", "is never run"), ("evaluate code.pt", "is never run"),
    ("evaluate notes.txt", "is no best.pt of this program"), ("evaluate gone", "no such file"),
    ("predict empty a.wav", "no such file: empty/best.pt"), ("--model ast-base", "needs --init"),
    ("--init audioset", "take --model ast-base"), ("--subsets 4", "does not read it"),
    ("--model ecapa-tdnn --rank 3", "does not read it"), ("--rank 99", "at most 64"),
    ("sweep rank=2,many", "invalid int"), ("sweep batch-size=8,0", "0: expected at least 1"),
    ("sweep rank", "expected FIELD=v1,v2"), ("compare --model amcrn", "no methods"),
    ("sweep data=sounds,voices", "for the whole table"), ("--lr -1", "expected at least 1e-09"),
    ("evaluate x --durations inf", "0.16, or full"), ("evaluate x --durations .1", "0.16, or full"),
    ("--model ecapa-tdnn --fusion none", "nothing without --subsets"),
    ("--lr nan", "expected"), ("--margin 3", "expected at least 0 and at most 1.5"),
    ("--snr 3", "nothing without --noise"), ("--fold 1", "sounds has no folds"),
    ("--fold 7 --data esc50 --root empty", "esc50 has folds 1 to 5"),
    ("--root empty", "sounds is built in; name your corpus"),
    ("--trials e", "sounds has no lists"), ("--device tpu", "invalid choice"),
    (f"{TONES} --speed-perturb", "has no trials"), (f"{TONES} --margin 0.5", "has no trials"),
    (f"{TONES} --frames 100000", "longest training clip"), (f"{TONES} --out code.pt", "a file"),
    ("--figure a.jpg", "a name that ends in .png, .svg or .pdf"),
    ("profile --figure a.png", "that ends in .json"), ("profile --figure no/a.json", "is there"),
    ("predict x y --csv gone/rows.csv", "a file for a table, in a folder that is"),
    ("predict x y --csv a.wav", "expected a file for a table")])
def test_bad_input_is_answered_and_nothing_is_made(bad_place, monkeypatch, command, sentence):
    monkeypatch.chdir(bad_place)
    printed = told(*command.split())
    assert sentence in printed, printed
    assert re.search("ended with (error|2)", printed), "it should end with an error"
    assert set(os.listdir()) == {"empty", "code.pt", "notes.txt", "tones", "cache"}


def test_a_batch_of_one_for_batchnorm_is_refused_before_packing(tmp_path):
    flags = ["--data=voices", "--batch-size=1", "--device=cpu", f"--cache={tmp_path / 'cache'}"]
    printed = told("--model=ecapa-tdnn", *flags)
    assert "--batch-size 1: " in printed and "BatchNorm" in printed, printed
    assert not (tmp_path / "cache").exists(), "the corpus was packed first"


def test_bfloat16_where_it_is_not_is_refused_or_said_to_be_slow(monkeypatch, capsys):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {})
    train.on_this_machine(train.Config(bf16=True, device="cpu"))
    assert "about 8 times as long" in capsys.readouterr().out
    monkeypatch.setattr(train, "ACCELERATOR", torch.device("mps"))  # a Mac
    with pytest.raises(ValueError, match="--bf16: mps has no bfloat16"):
        train.on_this_machine(train.Config(bf16=True))


def test_a_table_of_folds_and_seeds_goes_on_where_it_stopped(small, tmp_path, monkeypatch):
    """Four folds of noise that have one, four, one and no clips of the second class."""
    clips = [(str(n), str(int(n in (0, 1, 2, 5, 9, 13))), str(n % 4 + 1)) for n in range(16)]
    source = data.Source(lambda *_: clips, folds=4, read=lambda clip: np.random.default_rng(
        int(clip)).uniform(-1, 1, 8000))
    monkeypatch.setitem(data.CORPORA, "folded", source)
    saved = stop_after(monkeypatch, 5)
    settings = small[1] | dict(
        data="folded", root="", epochs=1, fold="all", seeds=2, out=tmp_path)
    told(*as_flags(settings), "--skip-bad")
    printed = told(*as_flags(settings), "--skip-bad", "--resume")
    runs = list(itertools.product((1, 2, 3, 4), (0, 1)))
    assert saved == [f"ast-nano-lora-fold{fold}-seed{seed}" for fold, seed in runs]
    results = read_json(tmp_path / "compare.json")["ast-nano-lora"]
    assert [(result["fold"], result["seed"]) for result in results] == runs
    right = [result["accuracy"] for result in results]
    assert f"{np.mean(right):.2f} ± {np.std(right, ddof=1):.2f}" in printed, printed
    assert "name one of its runs, ast-nano-lora" in told("evaluate", tmp_path)
    one = tmp_path / "ast-nano-lora-fold1-seed0"
    assert "accuracy" in told("evaluate", one)
    assert "trained on other clips" in told("evaluate", one, "--fold", 2), "it trained on fold 2"


@pytest.fixture(scope="module")
def words(small, classifier, verified):
    """What stands in the braces of a command. `elsewhere`: a corpus whose trials name every
    speaker, as VoxCeleb's lists E and H do. `homeless`: a run whose training corpus is gone."""
    write(small[0] / "bad.wav", "no sound")
    trial_corpus(small[0] / "elsewhere", classes=2)
    saved = torch.load(verified[0] / "run/best.pt", weights_only=True)
    saved["config"]["root"] = "gone"
    torch.save(saved, small[0] / "homeless.pt")
    return dict(
        flags=shlex.join(as_flags(small[1] | dict(epochs=1))), classifier=classifier[0],
        verified=verified[0] / "run", sound=small[0] / "root/class0/0.wav",
        bad=small[0] / "bad.wav", made=small[0] / "made", homeless=small[0] / "homeless.pt",
        elsewhere=f"--data=folder --cache={small[1]['cache']} --root={small[0] / 'elsewhere'}",
        accuracy=f"{classifier[1]['accuracy']:.4g}", eer=f"{verified[2]['eer']:.4g}")


@pytest.mark.parametrize("command", [
    "{flags} --epochs=1 --out=run", "sweep seed=0,1 {flags} --epochs=1 --out=sweep",
    "evaluate {verified}", "evaluate {verified} --durations 0.2 0.4",
    "predict {classifier} {sound}"],
    ids=["log", "table", "error rates", "error rates over seconds", "attention"])
def test_a_figure_is_drawn_of(words, here, command):
    pytest.importorskip("matplotlib")
    printed = told(*shlex.split(command.format(**words)), "--figure=a.png")
    assert "drawn: a.png" in printed and Path("a.png").stat().st_size > 1000, printed


def test_without_matplotlib_a_figure_is_refused_before_any_work(words, here, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert "pip install matplotlib" in told(*shlex.split(words["flags"]), "--figure=a.png")
    assert not os.listdir(), "something was made"


@pytest.mark.parametrize("command, sentence", [
    ("evaluate {classifier} --durations 0.3 full", "0.3 s  accuracy .*full  accuracy {accuracy} %"),
    ("evaluate {classifier} {elsewhere}", "knows 3 classes"),
    ("evaluate {classifier} --as-norm", "has no trials"),
    ("evaluate {classifier} --figure=a.png", "has no trials"),
    ("evaluate {verified} {elsewhere} --as-norm", " eer (?!.*miss)"),  # no threshold of cosines
    ("evaluate {homeless} {elsewhere}", " eer "),
    ("{flags} --init={classifier}", "carries what a method added"),
    ("evaluate {homeless} {elsewhere} --as-norm", "Name its folder"),
    ("predict {verified} {sound} --figure=a.png", "holds no AST"),
    ("predict {classifier} gone.wav", "not read: gone.wav: No such file"),
    ("embed {classifier} gone.wav", "not read: gone.wav: No such file"),
    ("verify {verified} {sound} gone.wav", "not read: gone.wav: No such file"),
    ("verify {verified} {sound} {sound} {bad}", "bad.wav"),
    ("verify {verified} {sound}", "two readable files or more"),
    ("verify {verified} {sound} {sound}", "same speaker"),
    ("predict {classifier} {bad} {sound}", r"0.wav  class.*ended with not read: .*bad.wav: \w"),
    ("embed {classifier} {bad} {sound} --out {made}", r"\(1, 64\).*ended with .*bad.wav: \w"),
    ("evaluate {verified} --durations 0.16 full", "0.16 s  eer .*full  eer {eer} %.* miss ")])
def test_what_a_command_says(words, here, command, sentence):
    pytest.importorskip("matplotlib")
    printed = told(*shlex.split(command.format(**words)))
    assert re.search(f"(?s){sentence.format(**words)}", printed), printed
    assert not os.listdir(), "something was made"


def test_a_folder_that_has_grown_is_not_tested_as_the_same(small, tmp_path, monkeypatch):
    """Its splits would be drawn anew: clips that trained the model would test it."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(small[1]["root"], "grown")
    source = ["--data=folder", "--root=grown", "--cache=cache"]
    told("--init=none", "--epochs=1", "--frames=50", "--device=cpu", "--out=run", *source)
    assert "accuracy" in told("evaluate", "run")
    save_clips(Path("grown"), "class0/new.wav", wave=tone(0, 9000))
    assert "trained on other clips" in told("evaluate", "run")
    assert "accuracy" in told("evaluate", "run", *source), "a named one is another corpus"


def test_a_last_window_of_few_frames_has_their_weight(small, classifier, tmp_path):
    """It once had the weight of a whole one: 84 fell to 6 %. By evaluate and by predict's CSV."""
    root = tmp_path / "root"
    for label, clip in itertools.product(range(3), range(10)):  # a little longer than the crop
        wave = np.stack([tone(label, 9500 + clip)] * 2, axis=1)
        save_clips(root, f"class{label}/{clip}.wav", wave=wave)
    source = ["--data", "folder", "--root", root, "--cache", small[1]["cache"]]
    (root / "class0/a.odd").touch()
    printed = told("evaluate", classifier[0], *source)
    assert "1 files have another ending or none; left out: class0/a.odd" in printed
    accuracy = float(re.search(r"accuracy ([\d.]+)", printed)[1])
    assert accuracy >= classifier[1]["accuracy"] - 17, "more than one of six clips is lost"
    told("predict", classifier[0].parent, root, "--csv", tmp_path / "rows.csv")
    with open(tmp_path / "rows.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 30, "a folder's files are not all there"
    corpus = data.open_corpus("folder", root, cache=small[1]["cache"])
    said = {row["file"]: row["class"] for row in rows}
    found = [said[str(root / corpus.ids[i])] for i in corpus.pick("test")]
    expected = [corpus.classes[corpus.labels[i]] for i in corpus.pick("test")]
    assert 100 * np.mean(np.equal(found, expected)) == pytest.approx(accuracy, abs=0.1)


def test_what_predict_leaves_out_or_finds_silent_is_said(classifier, tmp_path):
    save_clips(tmp_path, "1.wav", "1.flac")
    save_clips(tmp_path, "2.wav", wave=np.zeros((8000, 1)))
    printed = told("predict", classifier[0], tmp_path)
    assert "note: 1 recordings are there twice" in printed and "left out: 1.flac" in printed
    assert "note: 1 clip holds digital silence" in printed


def test_what_a_folder_of_noises_leaves_out_is_said(small, tmp_path, capsys):
    save_clips(tmp_path / "noise", "a.wav", "b.xyz")
    run(small[1] | dict(epochs=1, steps=1), tmp_path / "run", noise=str(tmp_path / "noise"))
    assert "left out: b.xyz" in capsys.readouterr().out


def test_a_name_that_the_screen_cannot_show_is_printed_escaped(classifier, tmp_path, monkeypatch):
    save_clips(tmp_path, "é.wav", wave=tone(0))
    screen = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", screen)
    train.main(["predict", str(classifier[0]), str(tmp_path / "é.wav")])
    screen.flush()
    assert rb"\xe9.wav  class" in screen.buffer.getvalue()


@pytest.mark.parametrize("part", [
    "classes", "trials", "settings", "adaptation", "encoder", "head", "config", "threshold",
    dict(head=dict(weight=torch.zeros(7, 7), bias=torch.zeros(7)))], ids=str)
def test_a_best_pt_without_a_part_or_with_another_head_is_refused(classifier, tmp_path, part):
    saved = torch.load(classifier[0], weights_only=True)
    if isinstance(part, dict):
        saved |= part
    else:
        del saved[part]
    torch.save(saved, tmp_path / "best.pt")
    with pytest.raises(ValueError, match="best.pt is no best.pt of this program"):
        train.load_run(tmp_path)


def test_a_loaded_run_does_what_predict_its_adapter_file_and_arrays_do(small, classifier):
    loaded = train.load_run(classifier[0].parent)
    assert not loaded.model.training, "the model should be in eval mode"
    clip = small[0] / "root/class1/3.wav"
    ranked = train.classify(loaded, clip)
    printed = told("predict", classifier[0], clip).split()
    assert printed[1:] == [word for name, chance in ranked for word in (name, f"{chance:.4f}")]
    adapter = classifier[0].parent / "adapter.pt"
    other = train.load_run(adapter, backbone=small[0] / "nano.pt")
    assert train.classify(other, clip) == ranked
    with pytest.raises(ValueError, match="in Python say backbone="):
        train.load_run(adapter)
    array = train.embed(loaded, data.read_audio(clip), 16000)
    assert_close(array, train.embed(loaded, clip), atol=1e-5, rtol=0)
    assert array.norm() == pytest.approx(1, abs=1e-5)


def trial_corpus(root, classes=8):
    """A folder per speaker, and trials of the first two. Some have 150 ms: an AST reads 160."""
    folder_corpus(root, classes, clips=5)
    for label in range(classes):
        save_clips(root, f"class{label}/1.wav", wave=tone(label, 2400))
    pairs = itertools.product((0, 1), (0, 1), range(4))
    lines = [f"{int(a == b)} class{a}/{i}.wav class{b}/4.wav" for a, b, i in pairs]
    write(root / "trials.txt", *lines)


@pytest.fixture(scope="module")
def verified(small, tmp_path_factory):
    """A speaker model trained with noise, rooms and speeds: (folder, settings, results)."""
    folder = tmp_path_factory.mktemp("verified")
    trial_corpus(folder / "root")
    settings = small[1] | dict(
        model="ecapa-tdnn", width=16, embed_dim=12, init="", root=str(folder / "root"),
        speed_perturb=True, noise=str(small[0] / "root"), reverb="generated")
    return folder, settings, run(settings, folder / "run")


def test_the_scores_of_a_run_and_its_threshold_give_its_error_rates(verified):
    folder, _, results = verified
    scores, labels = sv.read_scores(folder / "run/scores.txt")
    assert results["eer"] == pytest.approx(100 * sv.equal_error_rate(scores, labels), abs=1e-3)
    miss, false_alarm = sv.error_rates_at(scores, labels, train.load_run(folder / "run").threshold)
    found = results["miss"], results["false_alarm"]
    assert found == pytest.approx((100 * miss, 100 * false_alarm)), "of validation's threshold"


def test_a_speaker_at_three_speeds_is_three_classes_of_the_head_and_one_to_predict(verified):
    loaded = train.load_run(verified[0] / "run")
    assert len(loaded.saved["head"]["weight"]) == 3 * len(loaded.classes) == 12
    ranked = train.classify(loaded, verified[0] / "root/class7/0.wav")
    assert sorted(name for name, _ in ranked) == loaded.classes
    assert sum(chance for _, chance in ranked) == pytest.approx(1, abs=1e-5)


def test_embed_writes_what_the_function_returns_and_verify_enrols_by_the_mean(verified, tmp_path):
    run = verified[0] / "run"
    files = [str(verified[0] / f"root/class{name}.wav") for name in ("0/0", "0/1", "1/0")]
    told("embed", run, *files, "--out", tmp_path / "out")
    assert (tmp_path / "out/names.txt").read_text().split() == files
    unit = np.load(tmp_path / "out/embeddings.npy")
    function = train.embed(train.load_run(run / "best.pt"), files[2])
    assert_close(torch.from_numpy(unit[2]), function, atol=1e-6, rtol=0)
    mean = unit[:2].mean(0)
    score = mean @ unit[2] / np.linalg.norm(mean)
    assert f"score {score:.4f}, threshold" in told("verify", run, *files)


def test_without_validation_trials_there_is_no_threshold(verified, tmp_path):
    results = run(verified[1], tmp_path / "run", valid=False, epochs=1)
    assert "eer" in results and "miss" not in results


@pytest.mark.parametrize("kind", ["classifier", "verified"])
def test_a_sound_repeated_thirty_times_is_near_itself(request, monkeypatch, kind):
    """A longer recording than a minute, for an AST than its segments, is a mean of windows."""
    made = request.getfixturevalue(kind)
    loaded = train.load_run(made[0].parent if kind == "classifier" else made[0] / "run")
    monkeypatch.setattr(train, "MINUTE", 200)
    wave = data.sound("sounds/rain/test-0")  # a second
    once = train.embed(loaded, wave, 16000)
    often = train.embed(loaded, np.tile(wave, 30), 16000)
    assert once @ often > 0.9, f"cosine {once @ often:.3f}"


def test_a_speaker_model_starts_from_another_run_and_its_speakers_at_their_own_speed(verified):
    changes = dict(init=str(verified[0] / "run"), margin=0.5, speed_perturb=False)
    cfg = train.with_recipe(train.Config(**verified[1] | changes))
    corpus = train.open_corpus(cfg)
    model = train.build_model(cfg, corpus)
    saved = train.load_run(verified[0] / "run").saved
    assert_close(model.encoder.state_dict(), saved["encoder"], atol=0, rtol=0)
    assert torch.equal(model.head.weight, saved["head"]["weight"][:4])
    with pytest.raises(ValueError, match="holds another model"):
        train.build_model(replace(cfg, width=32), corpus)


def test_a_cohort_holds_the_mean_embedding_of_each_training_speaker(verified):
    loaded = train.load_run(verified[0] / "run")
    corpus = train.open_corpus(loaded.settings)
    clips = np.flatnonzero((corpus.labels == 0) & (corpus.splits == "train"))
    expected = train.embeddings(loaded.settings, corpus, loaded.model, clips).mean(0)
    assert_close(train.cohort(loaded.settings, corpus, loaded.model)[0], expected)


# A pretended GPU: FakeTensorMode makes CUDA tensors without a device, of shapes but no values. A
# tensor left on the CPU raises. AMCRN (cuDNN's LSTM), speeds (`nonzero`), noises of a folder (their
# places are numbers) and backward passes cannot run so and are left out.


def pretend_gpu(module):
    """Replace all parameters and buffers by tensors on the pretended GPU."""
    for part in module.modules():
        for tensors in (part._parameters, part._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    tensors[name] = torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")
    return module


@contextlib.contextmanager
def pretended_gpu():
    data.mel_triangles.cache_clear()
    try:
        with FakeTensorMode(), torch.no_grad():
            yield
    finally:
        data.mel_triangles.cache_clear()  # it holds pretended triangles


def pretended_batch():
    draw = partial(torch.zeros, 4, dtype=torch.long, device="cuda")
    waves = torch.zeros(4, 16000, dtype=torch.int16, device="cuda")
    return data.Batch(waves, draw(), draw(), draw())


def on_pretended_gpu(model):
    """Return logits that a model on the pretended GPU makes of waves."""
    with pretended_gpu():
        batch = pretended_batch()
        x = data.features(batch, pretend_gpu(model).encoder)
        return model(x, batch.labels)


@pytest.mark.parametrize("method", METHODS)
def test_a_method_runs_on_a_pretended_gpu(method):
    model = train.Model(adapt(AST("nano"), method), ast_adapters.LinearHead(64, 3))
    assert on_pretended_gpu(model).device.type == "cuda"


@pytest.mark.parametrize("host", [name for name in sv.MODELS if name != "amcrn"])
@pytest.mark.parametrize("options", LIGHT.values(), ids=LIGHT)
def test_a_host_runs_on_a_pretended_gpu(host, options):
    encoder = sv.MODELS[host](width=16, embed_dim=12, **options)
    model = train.Model(encoder, sv.AAMSoftmax(12, 3))
    assert on_pretended_gpu(model).device.type == "cuda"


@pytest.mark.parametrize("options", [
    dict(gain=6.0), dict(noise="generated"), dict(rooms="generated"),
    dict(gain=6.0, noise="generated", rooms="generated")], ids=str)
def test_waves_and_features_are_augmented_on_a_pretended_gpu(options):
    with pretended_gpu():
        batch = data.augment_waves(pretended_batch(), classes=3, frames=98, share=1.0, **options)
        x = data.augment_features(torch.zeros(4, 98, 128, device="cuda"), 10, 24, 20)
    assert batch.x.device.type == x.device.type == "cuda"


def test_a_tensor_left_on_the_cpu_fails_on_a_pretended_gpu():
    model = train.Model(AST("nano"), ast_adapters.LinearHead(64, 3))
    ones = torch.ones(64)  # neither a parameter nor a buffer
    model.encoder.norm.register_forward_hook(lambda module, inputs, out: out * ones)
    with pytest.raises(Exception, match="(?i)device|FakeTensor"):
        on_pretended_gpu(model)


def quick_source(patch):
    """Let the nano AST of the quick start be made in two steps, of few clips."""
    patch.setattr(data, "COUNTS", dict(train=2, valid=1, test=1))
    recipe = dict(frames=100, epochs=1, steps=2)
    patch.setitem(train.RECIPES, ("sounds-source", "*", "*"), recipe)


def test_two_runs_on_one_cache_both_get_the_nano_ast_and_draw_the_same(tmp_path, monkeypatch):
    quick_source(monkeypatch)
    cfg = train.with_recipe(train.Config(method="adapter", cache=str(tmp_path), device="cpu"))
    corpus = corpus_of([np.zeros(16000)], [0], ["train"])
    first = train.build_model(cfg, corpus).state_dict()
    monkeypatch.setattr(train, "run", lambda cfg: pytest.fail("it is made again"))
    assert_close(first, train.build_model(cfg, corpus).state_dict(), atol=0, rtol=0)


README_BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.M | re.S)
SHELL = re.compile(r"^(?:python|torchrun \S+) train\.py(.*?)(?:\s+#.*)?$", re.M)
LINES = re.findall(r"`python train\.py([^`]*)`", README) + SHELL.findall(README)
ONE_SPACE = [" ".join(line.split()) for line in LINES if "--help" not in line]
TYPED = sorted({re.sub(r"\bN\b", "1", line) for line in ONE_SPACE})  # N is a number
NOT_HERE = ("--root", "RUN", "CHECKPOINT", "profile", "compare", "sweep", "--seeds", "evaluate",
            "predict", "verify", "embed", "--help", "ast-base", "--figure", "glu")
OFFLINE = [line for line in TYPED if line and not set(NOT_HERE) & set(line.split())]


@pytest.mark.parametrize("arguments", TYPED)
def test_a_command_of_the_readme_is_understood(arguments, monkeypatch):
    monkeypatch.setattr(train, "study", lambda *_: {})  # what trains
    monkeypatch.setitem(METHODS, "glu", METHODS["adapter"])  # the workshop's own
    command, typed, own = train.parse(shlex.split(arguments))
    if command == "profile":
        train.check_training(train.Config(**typed), typed.keys())
    if command in ("train", "compare", "sweep"):  # these check all rows before anything is opened
        train.COMMANDS[command][0](train.Config(**typed), typed.keys(), own)


def test_the_readme_shows_every_command():
    shown = {train.parse(shlex.split(line))[0] for line in TYPED if "glu" not in line}
    assert shown == train.COMMANDS.keys()
    assert "load_run" in README, "it has no script of one's own"


@pytest.fixture(scope="module")
def nano_cache(cache):
    """A cache with the nano AST of the quick start, made in two steps."""
    with pytest.MonkeyPatch.context() as patch:
        quick_source(patch)
        train.pretrained_file(train.Config(cache=cache, device="cpu"))
    return cache


@pytest.mark.parametrize("arguments", OFFLINE)
def test_a_command_of_the_readme_runs(nano_cache, here, monkeypatch, arguments):
    """As it stands, but for a short training."""
    monkeypatch.setattr(data, "VOICES", dict.fromkeys(("train", "valid", "test"), (4, 4)))
    short = ["--epochs", "1", "--steps", "2", "--cache", nano_cache]
    printed = told(*shlex.split(arguments), *short)
    assert "tested once" in printed and "ended with" not in printed, printed


def cells(table):
    """Its columns, each a list from the top down, of a table of README or compare.md."""
    rows = [line.strip().strip("|").split("|") for line in table.strip().splitlines()]
    return [[cell.strip(" -:") for cell in column] for column in zip(*rows)]


def test_the_quick_start_prints_what_the_readme_shows(nano_cache, here, monkeypatch):
    """Shortened: its words, and those columns of its table that this does not change."""
    monkeypatch.setattr(data, "COUNTS", dict(train=2, valid=1, test=1))
    printed = told("--epochs", "1", "--steps", "2", "--cache", nano_cache)
    for words in ("1 of 3: linear, about", "hears the order: ", "Try next: python train.py"):
        assert words in printed, (words, printed)
    table = (here / "out/quick-start/compare.md").read_text(encoding="utf-8")
    found = {column[0]: column for column in cells(table)}
    block = next(block for _, block in README_BLOCKS if re.search(r"^\| +\| +accuracy", block))
    said = cells("".join(line for line in block.splitlines(True) if line.startswith("|")))
    for title in ("", "trainable", "share %"):
        assert found[title] in said, found[title]


def test_the_last_words_of_the_quick_start_follow_its_numbers():
    table = {name: [dict(order=order - 2), dict(order=order + 2)]
             for name, order in dict(linear=54, conformer=94, full=61).items()}
    words = train.closing_words(table)
    assert "hears the order: conformer, full\n" in words and "less than 60 %: linear\n" in words


def test_the_workshops_shapes_are_those_of_its_answers(nano_cache, here, monkeypatch):
    monkeypatch.setattr(data, "COUNTS", dict(train=2, valid=1, test=1))
    (here / "cache").symlink_to(nano_cache, target_is_directory=True)
    shapes = next(block for _, block in README_BLOCKS if "train.prepare" in block)
    with pytest.raises(AssertionError, match="it is not"):
        exec(shapes, {})  # before it is filled in
    behind = README[README.index(shapes) + len(shapes) :]
    answers = iter(re.findall(r"\(16, [\d, ]+\)", behind))
    exec(re.sub(r"\(\)(?=\)[,)])", lambda gap: next(answers), shapes), {})


@pytest.mark.parametrize("script", [block for _, block in README_BLOCKS if "load_run" in block])
def test_a_script_of_the_readme_runs(small, classifier, verified, here, script):
    """In a folder where the runs and the sounds that it names are there."""
    for path in re.findall(r'load_run\("([^"]+)"', script):
        made = verified[0] / "run" if "voice" in path or "speaker" in path else classifier[0].parent
        where = Path(path)
        if where.suffix:  # a file of the run
            made = made / where.name
        where.parent.mkdir(parents=True, exist_ok=True)
        where.symlink_to(made)
    for path in re.findall(r'backbone="([^"]+)"', script):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).symlink_to(small[0] / "nano.pt")
    save_clips(here, *re.findall(r'"([^"]+\.wav)"', script), wave=tone(1))
    exec(script, {})


def test_the_readmes_counts_of_p1s_methods_are_those_that_are_printed(capsys):
    ast_adapters.main()
    printed = capsys.readouterr().out
    rows = re.findall(r"^\| `([\w-]+)` \| .* \| ([\d,]+) \| [\d.]+ % \|$", README, re.M)
    assert len(rows) >= 15, "a method of P1 has no row"  # one of yours needs none
    for method, trainable in rows:
        assert re.search(rf"^{method} +{trainable} ", printed, re.M), (method, trainable, printed)


def test_the_examples_in_docstrings_are_true():
    failed, tried = doctest.testmod(sv)
    assert tried and not failed
