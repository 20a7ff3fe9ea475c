"""Train, compare, evaluate and use every model of this project: one Config, one loop.

    python train.py                     # quick start: a nano AST learns new sounds, offline
    python train.py --compare           # every method on the same data, one table
    python train.py --data fsdd --root DIR --method lora --rank 4
    python train.py --model ecapa-tdnn --subsets 4 --data features --root DIR
    python train.py --evaluate out/RUN/best.pt
    python train.py --predict a.wav DIR --checkpoint out/RUN/best.pt
    torchrun --nproc_per_node=2 train.py ...            # the same loop in several processes

Sections  1 settings, 2 the loop, 3 evaluation, 4 the model, 5 files of a run, 6 a run, 7 tables of
          runs, 8 using a checkpoint, 9 machines, 10 the command line
Axes      B batch, T frames, F mel bins, D width, E embedding, C classes or speakers

Every setting is a field of Config, hence a flag. A setting left out comes from the preset of its
method and corpus (section 6), which is printed at the start.

A run leaves in its folder: config.json, log.jsonl, last.pt (everything `--resume` needs), best.pt
(the weights that validated best: all that `--predict` needs), results.json, for an AST adapter.pt
(only what was trained), for verification scores.txt.

Differs from P1's code: validation selects, the test split is scored once, with a copy of the best
weights; switches are `--flag/--no-flag`, because argparse's type=bool takes "False" for True;
scales, biases and norms have no weight decay, which would pull scales of one towards zero.

Does not: split one model over several GPUs, search hyper-parameters, log to a service, or keep more
than two checkpoints.
"""

import argparse
import contextlib
import csv
import hashlib
import inspect
import json
import math
import os
import re
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from functools import partial
from pathlib import Path

# Threads that wait for each other spin, and so take the cores from other programs: beside one, a
# nano step took 400 ms instead of 25. Let them spin shortly, then sleep (GNU; Intel and LLVM).
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
os.environ.setdefault("KMP_BLOCKTIME", "1")

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

import ast_adapters
import data
import lightweight_sv
from ast_adapters import AST, METHODS, SIZES, LinearHead, adapt

LAUNCHED = dist.is_available() and dist.is_torchelastic_launched()  # by torchrun
RANK = int(os.environ["RANK"]) if LAUNCHED else 0  # the number of this process
WORLD = int(os.environ["WORLD_SIZE"]) if LAUNCHED else 1  # how many there are
QUIET = True if RANK else None  # tqdm's None: a bar in a terminal, nothing in a file

# --------------------------------------------------------------------------------------------------
# 1. Settings: one Config is their only source; `--help` prints the comments behind its fields

MODELS = [f"ast-{size}" for size in SIZES] + list(lightweight_sv.MODELS)
DEVICES, FOLDS = ("auto", "cpu", "cuda", "mps"), ("all", *map(str, range(1, 11)))
MODES = ("compare", "sweep", "evaluate", "predict", "verify", "embed")  # else: one training
TRAINING = ("train", "compare", "sweep")  # who reads a setting: these, or
TEST, ANY = (*TRAINING, "evaluate"), ("train", *MODES)


def opt(default, **rules):
    """A field of Config with rules, which `check` applies to what is typed: `choices`, `least` and
    `most` (its values), `modes` that read it (else TRAINING), the kind of `model` that reads it,
    `needs` (flags of which one must be set), `waves` (it needs a corpus of audio), `passing` (it
    may differ between a run and its continuation)."""
    return field(default=default, metadata=rules)


@dataclass(frozen=True)
class Config:
    """Every setting of a run. None: the preset of method and corpus, or the model, decides."""

    # What to train
    model: str = opt("ast-nano", choices=MODELS)  # the encoder
    method: str = opt("conformer", choices=METHODS, model="ast")  # how to adapt an AST
    init: str = ""  # checkpoint to start from; audioset, audioset-16: downloaded; none: random
    compare: bool = False  # run every method and print one table
    sweep: str = ""  # FIELD=v1,v2,...: one run a value, one table
    seeds: int = opt(1, least=1, passing=True)  # repeat with so many seeds: mean and deviation
    out: str = opt("", modes=(*TRAINING, "embed"), passing=True)  # folder; empty: out/ and a name
    resume: bool = opt(False, passing=True)  # go on where the run in --out stopped
    # Data
    data: str = opt("sounds", choices=data.CORPORA, modes=TEST)  # the corpus
    root: str = opt("", modes=TEST, passing=True)  # folder of the corpus
    download: bool = opt(False, passing=True)  # bring it to --root first, where that is free
    cache: str = opt("cache", modes=TEST, passing=True)  # for packed corpora and the nano AST
    fold: str = opt(None, choices=FOLDS, modes=TEST)  # test fold of a corpus with folds
    valid: bool = True  # select the best epoch on validation clips; else these train too
    trials: str = opt("o", choices=("o", "e", "h"), modes=TEST)  # VoxCeleb's list of trials
    few_shot: int = opt(0, least=0)  # train on so many clips a class, drawn by the seed; 0: all
    skip_bad: bool = opt(False, modes=TEST)  # go on without clips that cannot be read
    # Training
    epochs: int = opt(None, least=1)  # passes over the training clips
    steps: int = opt(None, least=1)  # end every epoch after so many batches, not after all clips
    batch_size: int = opt(None, least=1)  # clips a step, over all processes
    lr: float = opt(None, least=0, most=10)  # highest learning rate
    warmup: float = opt(None, least=0, most=0.9)  # share of the steps in which the rate rises
    weight_decay: float = opt(None, least=0)  # AdamW's, of matrices and kernels
    frames: int = opt(None, least=16)  # length of a training segment, in frames of 10 ms
    seed: int = opt(0, least=0)  # of weights, order, crops and drawn splits
    # Augmentation of training clips
    spec_f: int = opt(None, least=0)  # SpecAugment: widest mask, in mel bins
    spec_t: int = opt(None, least=0)  # SpecAugment: widest mask, in frames
    shift: int = opt(None, least=0)  # roll by up to so many frames
    gain: float = opt(None, least=0, most=60, model="ast", waves=True)  # up to so many dB louder
    speed_perturb: bool = opt(False, waves=True)  # play x1, x0.9 and x1.1, as other speakers
    noise: str = opt("", waves=True)  # a folder of noises, such as MUSAN's, or generated
    reverb: str = opt("", waves=True)  # a folder of impulse responses of rooms, or generated
    distorted: float = opt(0.6, least=0, most=1, needs="noise reverb")  # share with either
    snr_low: float = opt(0.0, needs="noise")  # least signal-to-noise ratio in dB
    snr_high: float = opt(15.0, needs="noise")  # greatest
    # Options of AST and its methods
    rank: int = opt(None, model="ast")  # adapters, LoRA: width of the bottleneck
    where: str = opt(None, model="ast")  # adapters: ffn, mhsa or both
    form: str = opt(None, model="ast")  # adapters: parallel or sequential
    at: str = opt(None, model="ast")  # sequential adapters: before or after the sub-layer
    residual: bool = opt(None, model="ast")  # sequential adapters: add their input
    kernel: int = opt(None, model="ast")  # Conformer adapter: taps of the depthwise convolution
    tokens: int = opt(None, model="ast")  # prompts a layer; prefix: keys and values together
    alpha: float = opt(None, model="ast")  # LoRA: scale is alpha / rank
    targets: str = opt(None, model="ast")  # LoRA: which of q, k, v, o, such as qv
    experts: int = opt(None, model="ast")  # mixtures: adapters a layer
    slots: int = opt(None, model="ast")  # Soft-MoA: slots an expert
    pos_embed: str = opt("crop", choices=("crop", "zero"), model="ast")  # zero: as P1's code has it
    pool: str = opt("mean", choices=("mean", "cls"), model="ast")  # embedding: of all tokens or two
    # Speaker models
    subsets: int = opt(1, least=1, model="speaker")  # feature subsets S; 1 is the plain host
    share: bool = opt(False, model="speaker")  # one set of weights for all subsets
    fusion: str = opt("module", choices=lightweight_sv.FUSIONS, model="speaker")  # between subsets
    width: int = opt(None, least=1, model="speaker")  # channels
    embed_dim: int = opt(None, least=1, model="speaker")  # size of the embedding
    margin: float = opt(0.2, least=0, most=1.5)  # AAM-softmax: angular margin in radians
    margin_rise: float = opt(0.0, least=0, most=1)  # share of the steps in which it rises from 0
    # Machine
    device: str = opt("auto", choices=DEVICES, modes=ANY, passing=True)  # where to compute
    bf16: bool = opt(None, modes=ANY)  # autocast to bfloat16, where it is safe
    compile: bool = opt(False, passing=True)  # torch.compile: slow first step, faster epochs
    # Use of a checkpoint
    evaluate: str = ""  # test this best.pt
    durations: list = opt((), modes=("evaluate",))  # test segments of so many seconds, or full
    as_norm: bool = opt(False, modes=("evaluate",))  # s-norm, its cohort from training speakers
    predict: list = ()  # name the classes of these files or folders
    verify: list = ()  # is the last of these files the speaker of all before it?
    embed: list = ()  # write the embeddings of these files or folders
    checkpoint: str = opt("", modes=("predict", "verify", "embed"))  # the best.pt they use
    csv: str = opt("", modes=("predict",))  # write the predictions to this file too


# --------------------------------------------------------------------------------------------------
# 2. The loop: batch -> features -> forward -> loss -> backward -> step -> log -> evaluate -> save


def fit(cfg, corpus, model, augment_waves, out, device):
    """Train `model`; leave last.pt, best.pt and log.jsonl in `out`. Return the seconds it took."""
    optimiser = make_optimiser(cfg, model, device)
    state = load_last(out, corpus, model, optimiser)  # a new run's, or where --resume goes on
    inputs, frames = cache_inputs(cfg, corpus, model, device)  # the corpus, or its features
    forward, clips = parallel_model(cfg, model, device), corpus.pick("train")
    per_epoch = min(cfg.steps or 10**9, max(1, len(clips) // cfg.batch_size))
    for epoch in range(state["epoch"], cfg.epochs):
        # A resumed epoch draws what it would have drawn; each process draws its own.
        torch.manual_seed(1000 * cfg.seed + epoch + 10**9 * RANK)
        model.train()
        start, losses, seen = time.time(), [], 0
        batches = data.batches(inputs, clips, cfg.batch_size, frames, cfg.seed, epoch,
                               repeat=repeats(cfg), shard=(RANK, WORLD), steps=cfg.steps)
        for i, batch in enumerate(tqdm(batches, f"epoch {epoch + 1}", per_epoch, leave=False,
                                       disable=QUIET)):
            step, steps = epoch * per_epoch + i, cfg.epochs * per_epoch
            for group in optimiser.param_groups:
                group["lr"] = learning_rate(cfg, step, steps)
            model.head.margin = cfg.margin * min(1, (step + 1) / max(1, cfg.margin_rise * steps))

            batch = augment_waves(batch.to(device))  # speed, gain, noise, rooms
            x, y = data.features(batch, model.encoder), batch.labels  # (B, T, F), (B,)
            x = data.augment_features(x, cfg.shift, cfg.spec_f, cfg.spec_t)
            with autocast(cfg, device):
                loss = F.cross_entropy(forward(x, y), y)
            check_loss(loss, batch, corpus)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
            seen += len(y) * WORLD
        speed = seen / (time.time() - start)
        valid = evaluate(cfg, inputs, model, "valid", device, frames)
        score = valid.get("score", epoch)  # nothing to select on: the last epoch is the best
        if score > state["best"]:
            state["best"] = float(score)
            save(out / "best.pt", checkpoint(cfg, corpus, model, epoch + 1, valid))
        state["seconds"] += time.time() - start
        line = dict(epoch=epoch + 1, loss=mean_over_ranks(losses), valid=valid.get("score"),
                    best=state["best"], lr=group["lr"], clips_per_second=speed,
                    eta=state["seconds"] / (epoch + 1) * (cfg.epochs - epoch - 1))
        state["epoch"], state["log"] = epoch + 1, state["log"] + [line]
        save_last(out, model, optimiser, state)
        print(numbers(line), flush=True)
    return state["seconds"]


def learning_rate(cfg, step, steps):
    """Rise in a line over the first `warmup` of the steps, then fall to zero in half a cosine."""
    warm = int(cfg.warmup * steps)
    if step < warm:
        return cfg.lr * (step + 1) / warm
    return cfg.lr * 0.5 * (1 + math.cos(math.pi * (step - warm) / (steps - warm)))


def make_optimiser(cfg, model, device):
    """AdamW on what trains. Only matrices, kernels and the like decay: weight decay would pull
    scales that start at one (LayerNorm, SSF, IA3, DoRA's magnitude) towards zero."""
    decays = {True: [], False: []}
    for p in model.parameters():
        if p.requires_grad:
            decays[sum(size > 1 for size in p.shape) > 1].append(p)
    groups = [dict(params=decays[True]), dict(params=decays[False], weight_decay=0.0)]
    return torch.optim.AdamW(groups, cfg.lr, betas=(0.9, 0.98), eps=1e-6,
                             weight_decay=cfg.weight_decay, fused=device.type != "mps")


def check_loss(loss, batch, corpus):
    """Stop at a loss that is not finite, with the names of the clips."""
    if not loss.isfinite():
        names = ", ".join(corpus.ids[i] for i in batch.clips[:5])
        raise ValueError(f"the loss became {loss.item()} in a batch with {names}, ...: lower --lr, "
                         "or look at these clips; the last epoch's checkpoint is whole")


def autocast(cfg, device):
    """bfloat16 for products, float32 for what needs it; nothing where bfloat16 is not wanted."""
    wanted = cfg.bf16 and has_bf16(device)  # a model trained with it is used without it elsewhere
    return torch.autocast(device.type, torch.bfloat16) if wanted else contextlib.nullcontext()


def repeats(cfg):
    """Whether a short clip is repeated (speaker models) or padded (AST)."""
    return cfg.model in lightweight_sv.MODELS


@torch.inference_mode()
def cache_inputs(cfg, corpus, model, device):
    """Return the corpus and crop that the loop reads: as they are, or with inputs computed once.

    For `linear` all that is frozen is computed once, if no augmentation comes before it; else the
    features, while they fit in half a gigabyte. Not where it would change what is drawn: for clips
    longer than the crop, whose place is random, and where waves are augmented.
    """
    if cfg.speed_perturb:  # the crop is cut after the speed is changed
        return corpus, data.frames_at_speed(cfg.frames)
    encoder, clips, frozen = model.encoder.eval(), len(corpus.ids), cfg.method == "linear" and (
        "ast" in cfg.model and not (cfg.spec_f or cfg.spec_t or cfg.shift))
    rows, width = (1, encoder.embed_dim) if frozen else (cfg.frames, encoder.mels)
    size = cfg.frames if corpus.mels else data.samples_of(cfg.frames)
    if (cfg.gain or cfg.noise or cfg.reverb or corpus.trials or corpus.length.max() > size
            or 4 * clips * rows * width > 2**29):
        return corpus, cfg.frames
    store = np.zeros((clips, rows, width), np.float32)
    for batch in tqdm(data.batches(corpus, np.arange(clips), 64, cfg.frames, train=False,
                                   repeat=repeats(cfg)), "once", leave=False, disable=QUIET):
        x = data.features(batch.to(device), encoder)  # (B, T, F)
        with autocast(cfg, device):
            store[batch.clips] = (encoder.pooled(x).float()[:, None] if frozen else x).cpu()
    return replace(corpus, store=store.reshape(-1, width), start=rows * np.arange(clips),
                   length=np.full(clips, rows)), rows


# --------------------------------------------------------------------------------------------------
# 3. Evaluation: accuracy of a split, or error rates of its trials; processes share the work


def evaluate(cfg, corpus, model, split, device, frames=None, threshold=None):
    """Return the results of one split, {} of an empty one; "score" is what selection maximises."""
    clips = corpus.pick(split)
    if corpus.trials and split in corpus.trials:
        return evaluate_trials(cfg, corpus, model, split, device, None, threshold)
    if corpus.trials or not len(clips):
        return {}
    chances = class_probabilities(cfg, corpus, model, clips, device, frames or cfg.frames)
    right = chances.argmax(1).numpy() == corpus.labels[clips]
    results = dict(accuracy=100 * float(right.mean()), score=100 * float(right.mean()))
    ordered = np.array([">" in corpus.classes[label] for label in corpus.labels[clips]])
    if ordered.any():  # `sounds`: classes told apart only by order in time
        results |= dict(content=100 * right[~ordered].mean(), order=100 * right[ordered].mean())
    return results


@torch.inference_mode()
def class_probabilities(cfg, corpus, model, clips, device, frames):
    """Return (clips, C): the mean over a clip's windows of `frames` frames, side by side."""
    windows, owner = data.cut_windows(corpus, clips, frames)  # owner (windows,): row of the clip
    total = torch.zeros(len(clips), len(model.eval().head.weight))  # (clips, C)
    for batch in data.batches(windows, np.arange(len(owner)), 128, frames, train=False,
                              repeat=repeats(cfg), shard=(RANK, WORLD)):
        with autocast(cfg, device):
            logits = model(data.features(batch.to(device), model.encoder))  # (B, C)
        total.index_add_(0, owner[batch.clips], logits.float().softmax(1).cpu())
    return sum_over_ranks(total) / owner.bincount()[:, None]


def evaluate_trials(cfg, corpus, model, split, device, frames, threshold=None, strangers=None):
    """Return EER and minDCF of the cosine scores of a split's trials, of utterances cut to `frames`
    (None: whole). Validation trials give a threshold; test trials are judged by it: the errors, in
    %. strangers: the cohort of --as-norm, whose scores are no cosines and so have no threshold."""
    labels, left, right = (np.array(column) for column in zip(*corpus.trials[split]))
    clips, rows = np.unique([left, right], return_inverse=True)  # each is embedded once
    pairs = rows.reshape(2, -1).T  # (trials, 2) rows of the embeddings
    unit = embeddings(cfg, corpus, model, clips, device, frames)  # (clips, E)
    scores = (unit[pairs[:, 0]] * unit[pairs[:, 1]]).sum(1).double().numpy()
    if strangers is not None:
        scores = lightweight_sv.adaptive_s_norm(scores, pairs, unit, strangers)
    eer = 100 * lightweight_sv.equal_error_rate(scores, labels)
    costs = {f"min_dcf_{p}": lightweight_sv.min_dcf(scores, labels, p) for p in (0.01, 0.05)}
    results = {"eer": eer, **costs, "score": -eer, "scores": scores}
    if split == "valid":
        results["threshold"] = lightweight_sv.threshold_at(scores, labels)
    elif threshold is not None and strangers is None:
        miss, alarm = lightweight_sv.error_rates_at(scores, labels, threshold)
        results |= dict(threshold=threshold, miss=100 * miss, false_alarm=100 * alarm)
    return results


@torch.inference_mode()
def embeddings(cfg, corpus, model, clips, device, frames=None):
    """Return unit embeddings (clips, E), on the CPU; utterances of one length share a batch.

    frames: cut longer utterances; None: whole ones. An AST needs 16, so shorter ones are padded.
    """
    unit = torch.zeros(len(clips), model.eval().encoder.embed_dim)
    whole = corpus.length[clips] if corpus.mels else data.frames_of(corpus.length[clips])
    lengths = np.clip(whole, 16, frames)
    groups = [np.flatnonzero(lengths == length) for length in np.unique(lengths)]
    parts = [part for rows in groups for part in np.split(rows, range(64, len(rows), 64))]
    for part in parts[RANK::WORLD]:
        batch = data.load_batch(corpus, clips[part], int(lengths[part[0]]), repeat=repeats(cfg))
        with autocast(cfg, device):
            x = model.encoder(data.features(batch.to(device), model.encoder))  # (B, E)
        unit[part] = F.normalize(x.float(), dim=1).cpu()
    return sum_over_ranks(unit)


def cohort(cfg, corpus, model, device, each=20):
    """Return one mean embedding for every training speaker, of up to `each` utterances: (C, E)."""
    train = np.random.default_rng(cfg.seed).permutation(corpus.pick("train"))
    clips = np.concatenate([train[corpus.labels[train] == c][:each]
                            for c in range(len(corpus.classes))])
    labels = torch.from_numpy(corpus.labels[clips])
    unit = embeddings(cfg, corpus, model, clips, device)
    sums = torch.zeros(len(corpus.classes), unit.shape[1]).index_add(0, labels, unit)
    return sums / labels.bincount()[:, None]


# --------------------------------------------------------------------------------------------------
# 4. The model: an encoder and a head, new or out of a checkpoint

METHOD_OPTIONS = sorted({name for _, options in METHODS.values() for name in options})


class Model(nn.Module):
    """Encoder and head: (B, T, F), or frozen outputs (B, D), and labels (B,) -> logits (B, C)."""

    def __init__(self, encoder, head):
        super().__init__()
        self.encoder, self.head = encoder, head

    def forward(self, x, labels=None):
        embedding = self.encoder.rescale(x) if x.ndim == 2 else self.encoder(x)  # (B, E)
        return self.head(embedding, labels)


def build_model(cfg, corpus):
    """Return a new model for a corpus: an adapted pretrained AST, or a speaker model, with a head.

    A speaker model takes over the weights of --init best.pt, and its head's for equal classes."""
    torch.manual_seed(cfg.seed)
    if cfg.model in lightweight_sv.MODELS:
        encoder = speaker_encoder(cfg, corpus.mels or 80)
    else:
        encoder = AST(cfg.model.removeprefix("ast-"), pos_embed=cfg.pos_embed, pool=cfg.pool)
        if cfg.init != "none":
            print(ast_adapters.load_pretrained(encoder, pretrained_file(cfg)))
        adapt(encoder, cfg.method, **method_options(cfg))
    torch.manual_seed(cfg.seed)  # so every method starts from the same head
    model = Model(encoder, make_head(cfg, encoder, len(corpus.classes), corpus.trials))
    if cfg.model in lightweight_sv.MODELS and cfg.init not in ("", "none"):
        _, before, saved = load_checkpoint(cfg.init, "cpu")
        try:
            encoder.load_state_dict(before.encoder.state_dict())
        except RuntimeError as error:
            raise ValueError(f"--init {cfg.init} holds another model than --model {cfg.model} with "
                             "these sizes") from error
        if saved["classes"] == corpus.classes:  # of speakers at three speeds, those at their own
            for ours, theirs in zip(model.head.parameters(), before.head.parameters()):
                ours.data[: len(theirs)] = theirs.data[: len(ours)]
    return model


def method_options(cfg):
    """The options of an AST's method that are set."""
    return {name: getattr(cfg, name) for name in METHOD_OPTIONS if getattr(cfg, name) is not None}


def speaker_encoder(cfg, mels):
    sizes = {k: getattr(cfg, k) for k in ("width", "embed_dim") if getattr(cfg, k)}
    return lightweight_sv.MODELS[cfg.model](mels=mels, subsets=cfg.subsets, share=cfg.share,
                                            fusion=cfg.fusion, **sizes)


def make_head(cfg, encoder, classes, trials):
    """AAM-softmax for a corpus with trials, where each speed of a speaker is a class; else a Linear
    layer."""
    if not trials:
        return LinearHead(encoder.embed_dim, classes)
    classes *= len(data.SPEEDS) if cfg.speed_perturb else 1
    return lightweight_sv.AAMSoftmax(encoder.embed_dim, classes, margin=cfg.margin)


def load_checkpoint(path, device):
    """best.pt -> (the Config it was trained with, its model in eval mode, what it holds).

    Raises ValueError, with the reason, for a file that is absent, damaged or holds something else.
    """
    if not Path(path).is_file():
        raise ValueError(f"no checkpoint at {path!r}")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        cfg, adaptation = Config(**saved["config"]), saved["adaptation"]
        if cfg.model in lightweight_sv.MODELS:
            encoder = speaker_encoder(cfg, saved["mels"] or 80)
        else:
            encoder = adapt(AST(**saved["settings"]), adaptation["method"], **adaptation["options"])
            encoder.adaptation = adaptation  # with the fingerprint of the real backbone
        model = Model(encoder, make_head(cfg, encoder, len(saved["classes"]), saved["trials"]))
        model.encoder.load_state_dict(saved["encoder"])
        model.head.load_state_dict(saved["head"])
        saved["epoch"], saved["threshold"]
    except Exception as error:  # what a wrong file raises depends on what it holds
        reason = f"{type(error).__name__}: {error}".partition("\n")[0]
        raise ValueError(f"{path} is no best.pt of this program: it is damaged, of another one, or "
                         f"holds code, which is never run ({reason})") from error
    return cfg, model.to(device).eval(), saved


def pretrained_file(cfg):
    """Return the checkpoint an AST starts from: a file, AudioSet's (downloaded once), or ours."""
    if cfg.init in ast_adapters.AUDIOSET:
        address, sha256 = ast_adapters.AUDIOSET[cfg.init]
        path = str(Path(cfg.cache) / f"{cfg.init}.pth")
        return on_first_rank(lambda: str(data.download(address, path, sha256)))
    if cfg.init:
        return cfg.init
    batch = math.ceil(NANO_RECIPE["batch_size"] / WORLD) * WORLD  # three processes: 18
    file = Path(cfg.cache) / f"ast-nano-v{data.VERSION}-{batch}.pt"  # another one for other sounds
    if not on_first_rank(file.exists):
        print("making the nano AST: training on the source classes of `sounds`, once")
        # In a folder of its own, so that two programs can make it at once; drawing what it draws
        # must not move what `adapt` draws.
        with tempfile.TemporaryDirectory(dir=cfg.cache) as out, torch.random.fork_rng(devices=[]):
            out = Path(on_first_rank(lambda: out))
            run(Config(data="sounds-source", method="full", init="none", out=str(out), resume=True,
                       cache=cfg.cache, device=cfg.device, batch_size=batch))
            on_first_rank(lambda: os.replace(out / "best.pt", file))
    return file


# --------------------------------------------------------------------------------------------------
# 5. Files of a run: written to a temporary name and renamed, read without running code


def save(path, value):
    """Write text or tensors, in the first process alone. Whatever happens on the way, a full disk
    or kill -9, `path` is the old file or the new one, whole."""
    part = path.with_suffix(path.suffix + ".part")
    if RANK:
        return
    try:
        with open(part, "wb") as file:  # as text, Windows would write other line ends
            file.write(value.encode()) if isinstance(value, str) else torch.save(value, file)
        os.replace(part, path)
    except (OSError, RuntimeError) as error:  # out of torch.save a full disk is a RuntimeError
        reason = error if isinstance(error, OSError) else error.__context__ or error
        raise OSError(f"{path} could not be written ({reason}): what was there before is whole; "
                      "make room and go on with --resume") from error
    finally:
        part.unlink(missing_ok=True)


def checkpoint(cfg, corpus, model, epoch, valid):
    """Return everything that using the model needs, no more: plain values and tensors."""
    encoder = model.encoder
    return dict(config=asdict(cfg), classes=corpus.classes, mels=corpus.mels,
                trials=bool(corpus.trials), settings=getattr(encoder, "settings", {}),
                adaptation=getattr(encoder, "adaptation", {}), encoder=encoder.state_dict(),
                head=model.head.state_dict(), epoch=epoch, threshold=valid.get("threshold"))


def save_last(out, model, optimiser, state):
    """Write the log, then last.pt: killed in between, the epoch is done again, to the same end."""
    save(out / "log.jsonl", "".join(json.dumps(line) + "\n" for line in state["log"]))
    save(out / "last.pt", dict(state, model=model.state_dict(), optimiser=optimiser.state_dict()))


def load_last(out, corpus, model, optimiser):
    """Return the state of last.pt, its weights now in the model; without the file a new run's."""
    state = dict(epoch=0, best=-math.inf, seconds=0.0, log=[], corpus=hash_of(corpus))
    if not (out / "last.pt").exists():
        return state
    saved = torch.load(out / "last.pt", map_location="cpu", weights_only=True)
    if saved["corpus"] != state["corpus"]:
        raise ValueError(f"{out} was begun on other clips: their list, lengths, splits or sound "
                         "have changed; restore them, or begin anew in another --out")
    model.load_state_dict(saved.pop("model"))
    optimiser.load_state_dict(saved.pop("optimiser"))
    return saved


def hash_of(corpus):
    """Hash what training sees of a corpus: names, lengths, labels, splits, and some ten thousand
    samples. All of the sound would take minutes."""
    columns = [corpus.ids, *(c.tolist() for c in (corpus.splits, corpus.length, corpus.labels))]
    samples = corpus.store[:: math.ceil(len(corpus.store) / 10_000)].tobytes()
    return hashlib.sha256(json.dumps(columns).encode() + samples).hexdigest()


def run_folder(cfg, name):
    """Make the folder of a run. Raises ValueError where it holds another one, or this one already
    without --resume: nothing is overwritten."""
    name = f"out/{name}" if cfg.resume else on_first_rank(lambda: free_name(f"out/{name}"))
    out = Path(cfg.out or name)
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file: expected a folder, or a new name")
    if not RANK and (out / "config.json").exists():
        theirs = json.loads((out / "config.json").read_text(encoding="utf-8"))
        mine = json.loads(json.dumps(asdict(cfg)))
        changes = ", ".join(f"{f.name} {theirs.get(f.name)!r} -> {mine[f.name]!r}"
                            for f in fields(Config) if not f.metadata.get("passing")
                            and mine[f.name] != theirs.get(f.name, mine[f.name]))
        if changes:
            raise ValueError(f"--out {out} holds a run with another configuration ({changes}): "
                             "choose another --out")
        if not cfg.resume:
            raise ValueError(f"--out {out} holds this run already: --resume goes on with it, or "
                             "choose another --out")
    on_first_rank(lambda: out.mkdir(parents=True, exist_ok=True))
    save(out / "config.json", json.dumps(asdict(cfg), indent=1))
    return out


def free_name(name):
    """Return `name`, or with the first number behind it that no earlier run has taken."""
    names = [name, *(f"{name}-{number}" for number in range(2, 10_000))]
    return next(path for path in names if not Path(path).exists())


# --------------------------------------------------------------------------------------------------
# 6. A run: the papers' recipes, the corpus, the model; train, select, test once

PLAIN = dict(spec_f=0, spec_t=0, shift=0, gain=0.0)  # no augmentation
RECIPE = PLAIN | dict(epochs=30, batch_size=32, frames=500, warmup=0.0, weight_decay=0.1)
# P1, section 3.1: learning rate by method, the rest by corpus
LEARNING_RATE = {"full": 5e-5, "linear": 1e-3, "prompt-shallow": 1e-2, "prompt-deep": 1e-2,
                 "prefix": 1e-2, "other": 5e-3}
CORPUS_RECIPE = {
    "sounds": dict(frames=100, epochs=6),
    "sounds-source": dict(frames=100, epochs=7),
    "voices": dict(frames=150, epochs=6, batch_size=32),
    "esc50": dict(frames=500, epochs=50, spec_f=24, spec_t=80),
    "urbansound8k": dict(frames=400, epochs=30, spec_f=24, spec_t=80),
    "speechcommands": dict(frames=100, epochs=75, batch_size=128),
    "fluentspeech": dict(frames=400, epochs=75),
    "voxceleb": dict(frames=200),
    "fsdd": dict(frames=64, epochs=40, spec_f=16, spec_t=8, shift=6, gain=10.0),
}
# Ours: a model four hundred times smaller than AST-base wants larger and more steps.
NANO_RECIPE = dict(batch_size=16, warmup=0.1)
NANO_TOKENS = {"prompt-shallow": 32, "prompt-deep": 8, "prefix": 8}  # P1's 300 would be its input
NANO_LEARNING_RATE = {"full": 1.5e-3, "other": 1e-2}
SPEAKER_RECIPE = PLAIN | dict(epochs=10, batch_size=64, frames=200, lr=2e-3, warmup=0.3,
                              weight_decay=0.05)
# `voices` is small: hosts of two hundred thousand parameters learn it in two minutes.
VOICES_WIDTH = {"ecapa-tdnn": 64, "amcrn": 32, "resnet34": 8}


def with_preset(cfg):
    """Fill every None that has a preset; what is typed wins."""
    if cfg.model in lightweight_sv.MODELS:
        preset = SPEAKER_RECIPE | CORPUS_RECIPE.get(cfg.data, {})
        preset["gain"] = 0.0  # their features have no level: each bin's mean is removed
        if cfg.data == "voices":
            preset |= dict(width=VOICES_WIDTH[cfg.model], embed_dim=128)
    else:
        nano = cfg.model == "ast-nano"
        rates = NANO_LEARNING_RATE if nano else LEARNING_RATE
        preset = RECIPE | dict(lr=rates.get(cfg.method, rates["other"]))
        # frames: the columns it has positions for
        preset |= CORPUS_RECIPE.get(cfg.data, dict(frames=100) if nano else {})
        preset |= NANO_RECIPE | dict(tokens=NANO_TOKENS.get(cfg.method)) if nano else {}
    return replace(cfg, **{k: v for k, v in preset.items() if getattr(cfg, k) is None})


def run(cfg):
    """Train, select, test once; return the flat results, which results.json holds too."""
    cfg, device = with_preset(cfg), find_device(cfg.device)
    corpus, augment_waves = open_data(cfg)
    check_corpus(cfg, corpus)
    model = build_model(cfg, corpus).to(device)
    name = f"{cfg.data}-{cfg.model}" + (f"-{cfg.method}" if "ast" in cfg.model else "")
    out = run_folder(cfg, name)
    if (out / "results.json").exists():
        print(f"{out} is finished already")
        return json.loads((out / "results.json").read_text(encoding="utf-8"))
    print_plan(cfg, corpus, model, out, device)
    seconds = fit(cfg, corpus, model, augment_waves, out, device)
    results = test_once(cfg, corpus, out, device) | dict(seconds=round(seconds, 2))
    save(out / "results.json", json.dumps(results, indent=1))
    return results


def open_corpus(cfg, train=True):
    return data.open_corpus(cfg.data, cfg.root, cfg.cache, cfg.seed, cfg.fold and int(cfg.fold),
                            cfg.few_shot, cfg.skip_bad, cfg.valid, cfg.trials, train)


def open_data(cfg):
    """Return the corpus and the function that augments the waves of its training batches. The first
    process packs what is new; the others wait, then find it packed."""
    if RANK:
        dist.barrier()
    noise, rooms = (name if name in ("", "generated") else
                    data.open_sounds(name, cfg.cache, cfg.skip_bad)
                    for name in (cfg.noise, cfg.reverb))
    corpus = open_corpus(cfg)
    if WORLD > 1 and not RANK:
        dist.barrier()
    return corpus, partial(data.augment_waves, classes=len(corpus.classes), frames=cfg.frames,
                           speeds=cfg.speed_perturb, gain=cfg.gain, noise=noise, rooms=rooms,
                           share=cfg.distorted, snr=(cfg.snr_low, cfg.snr_high))


def check_corpus(cfg, corpus):
    """Refuse settings that this corpus cannot follow; note how many clips are short."""
    length = corpus.length[corpus.pick("train")]
    frames = length if corpus.mels else data.frames_of(length)
    if (1 if corpus.mels else 10) * frames.max() < cfg.frames:
        raise ValueError(f"--frames {cfg.frames}: the longest training clip of --data {cfg.data} "
                         f"has {frames.max()} frames")
    if corpus.mels not in (None, 128) and "ast" in cfg.model:
        raise ValueError(f"--model {cfg.model} expects 128 mel bins, --data {cfg.data} has "
                         f"{corpus.mels}: take a speaker model, which is built with as many")
    for name in ("speed_perturb", "margin", "margin_rise"):
        if getattr(cfg, name) != getattr(Config, name) and not corpus.trials:
            raise ValueError(f"{flag_of(name)} is for verification: it needs a corpus with trials, "
                             f"and --data {cfg.data} has none")
    size = min(cfg.batch_size, len(length))
    if size % WORLD:  # in the mean over the processes some clips would weigh more
        raise ValueError(f"{size} clips a step do not divide among {WORLD} processes: --batch-size "
                         f"is of all processes together; take a multiple of {WORLD}, and of the "
                         f"{len(length)} training clips at most all")
    if (short := (frames < cfg.frames - 2).sum()):  # 1 s has 98 frames: not worth a word
        corpus.notes.append(f"{short} of {len(length)} training clips are shorter than {cfg.frames}"
                            f" frames and are {'repeated' if repeats(cfg) else 'padded'}")


def print_plan(cfg, corpus, model, out, device):
    """Print what the run will do: device, versions, seed, sizes, preset, notes on the data."""
    trainable, _, total = ast_adapters.count(model.encoder)
    sizes = ", ".join(f"{len(corpus.pick(split))} {split}" for split in ("train", "valid", "test"))
    print(f"\n{out}: {cfg.model}" + (f", {cfg.method}" if "ast" in cfg.model else "")
          + f" on {cfg.data}, seed {cfg.seed}, {device}, torch {torch.__version__}, "
          f"{torch.get_num_threads()} threads" + f", {WORLD} processes" * (WORLD > 1))
    print(f"  {sizes} clips, {len(corpus.classes)} classes; trains {trainable:,} of {total:,} "
          f"parameters ({trainable / total:.2%}) and the head")
    print("  " + ", ".join(f"{k} {getattr(cfg, k)}" for k in
                           ("epochs", "batch_size", "frames", "lr", "warmup", "weight_decay")))
    last = ["no validation clips, so the last epoch is tested"] * (not len(corpus.pick("valid")))
    for note in last + corpus.notes:
        print(f"  note: {note}")


def test_once(cfg, corpus, out, device):
    """Test the best weights; write adapter.pt or scores.txt; return all results but the time."""
    _, model, best = load_checkpoint(out / "best.pt", device)
    tested = evaluate(cfg, corpus, model, "test", device, threshold=best["threshold"])
    if corpus.trials:
        save(out / "scores.txt", "".join(
            f"{corpus.ids[a]} {corpus.ids[b]} {score:.6f} {label}\n"
            for (label, a, b), score in zip(corpus.trials["test"], tested["scores"])))
    results = {k: float(v) for k, v in tested.items() if k not in ("score", "scores")}
    print(f"tested once, with the weights of epoch {best['epoch']}: {numbers(results)}")
    trainable, _, total = ast_adapters.count(model.encoder)
    results |= dict(trainable=trainable, parameters=total, share=100 * trainable / total,
                    epochs=cfg.epochs, seed=cfg.seed, fold=int(cfg.fold or 1),
                    memory_mb=training_memory(cfg, corpus, model, device))
    if cfg.model in lightweight_sv.MODELS:
        return results | lightweight_sv.complexity(model.encoder, cfg.frames)
    # An AST has no count of multiply-accumulates, for LoRA's products are no layers.
    save(out / "adapter.pt", dict(adapter=ast_adapters.adapter_state(model.encoder),
                                  head=model.head.state_dict(), classes=corpus.classes,
                                  config=asdict(cfg)))
    size = on_first_rank(lambda: (out / "adapter.pt").stat().st_size)
    return results | dict(adapter_kb=round(size / 1024))


def training_memory(cfg, corpus, model, device):
    """Return the MB that training needs beside the weights: what one step keeps for the backward
    pass, gradients and AdamW's two moments. Counted, so the same on every device."""
    kept, weights = {}, {p.untyped_storage().data_ptr() for p in model.parameters()}

    def note(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor.detach()  # the tensor itself holds the graph that holds it: never freed

    clips = corpus.pick("train")[: cfg.batch_size]
    batch = data.load_batch(corpus, clips, cfg.frames, repeat=repeats(cfg)).to(device)
    hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
    with hooks, autocast(cfg, device):
        model.train()(data.features(batch, model.encoder), batch.labels)
    activations = sum(size for place, size in kept.items() if place not in weights)
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    return round((activations + 3 * trained) / 2**20, 2)


def numbers(values):
    """Return "loss 0.512  valid 83.3  ..." for a person; the files have every digit."""
    return "  ".join(f"{name} {value:.4g}" for name, value in values.items()
                     if value is not None and name not in ("score", "scores"))


# --------------------------------------------------------------------------------------------------
# 7. Tables of runs: methods, values, folds, seeds

QUICK = ("linear", "conformer", "full")  # what the quick start compares
SCORES = ("accuracy", "content", "order", "eer", "min_dcf_0.01", "min_dcf_0.05")
COLUMNS = [(key, key, "") for key in SCORES] + [  # header, key, format; of a score with deviation
    ("trainable", "trainable", "{:,.0f}"), ("share %", "share", "{:.2f}"),
    ("MACs", "macs", "{:,.0f}"), ("ms", "latency_ms", "{:.1f}"), ("seconds", "seconds", "{:.1f}"),
    ("memory MB", "memory_mb", "{:.1f}"), ("file KB", "adapter_kb", "{:.0f}")]


def variants(cfg, typed):
    """Return (name of the table, {row: Config}): a row a method or value, or only one."""
    rows = {}
    if cfg.compare:
        if cfg.model in lightweight_sv.MODELS:
            raise ValueError(f"--compare is for AST's methods; for {cfg.model} take --sweep, such "
                             "as --sweep subsets=1,2,4")
        return f"compare-{cfg.data}", {
            method: replace(cfg, method=method, **{  # without the options it does not have
                name: None for name in METHOD_OPTIONS if name not in options})
            for method, (_, options) in METHODS.items()}
    if cfg.sweep:
        name, _, values = cfg.sweep.partition("=")
        for text in values.split(","):
            words = {"true": [f"--{name}"], "false": [f"--no-{name}"]}
            value, names = parse(words.get(text, [f"--{name}={text}"]))
            rows[f"{name}={text}"] = replace(cfg, **{k: getattr(value, k) for k in names})
            check(rows[f"{name}={text}"], names)
        return f"compare-{cfg.data}", rows
    if not typed & {"data", "model", "method", "init", *METHOD_OPTIONS}:
        return "quick-start", {method: replace(cfg, method=method) for method in QUICK}
    label = cfg.method if "ast" in cfg.model else cfg.model
    return f"{cfg.data}-{label}", {label: cfg}


def study(cfg, typed):
    """Do what the command line asks for: one run, or a table of rows, folds and seeds."""
    title, rows = variants(cfg, typed)
    for label, variant in rows.items():
        check(variant, typed)
        folds = [variant.fold] if variant.fold != "all" else (
            FOLDS[1 : 1 + data.CORPORA[variant.data].folds])
        if not folds:
            raise ValueError(f"--fold all: --data {cfg.data} has no folds but one split; repeat it "
                             "with --seeds N")
        rows[label] = [replace(variant, fold=fold, seed=variant.seed + n) for fold in folds
                       for n in range(cfg.seeds)]
    if [len(configs) for configs in rows.values()] == [1]:
        return run(*rows[label])
    table, one_row = {}, len(rows) == 1 and cfg.fold == "all"
    folder = run_folder(cfg, title)
    for label, configs in rows.items():
        for each in configs:
            name = label + (f"-fold{each.fold}" if cfg.fold == "all" else "")
            name += f"-seed{each.seed}" if cfg.seeds > 1 else ""
            out = folder / re.sub(r'[<>:"/\\|?*]', "_", name)  # Windows refuses these in names
            result = run(replace(each, out=str(out), resume=True))
            table.setdefault(f"fold {each.fold}" if one_row else label, []).append(result)
    if one_row:
        table["all folds"] = sum(table.values(), [])
    save(folder / "compare.json", json.dumps(table, indent=1))
    print_table(table, folder)


def print_table(table, folder):
    """Print the closing table of {label: results}, and write it to compare.md for a README."""
    keys = {key for results in table.values() for key in results[0]}  # models may differ in these
    columns = [column for column in COLUMNS if column[1] in keys]
    rows = [["", *(header for header, _, _ in columns)]]
    for label, results in table.items():
        values = ([r[key] for r in results if key in r] for _, key, _ in columns)
        rows.append([label, *(cell(v, form) for v, (_, _, form) in zip(values, columns))])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["| " + " | ".join(text.rjust(w) for text, w in zip(row, widths)) + " |"
             for row in rows]
    lines.insert(1, "|" + "|".join("-" * (w + 1) + ":" for w in widths) + "|")
    save(folder / "compare.md", "\n".join(lines) + "\n")
    print("\n" + "\n".join(lines) + f"\n\n{folder}")


def cell(values, form):
    """The mean, of a score (no form) with its deviation over the runs; nothing of nothing."""
    if form or not values:
        return form.format(np.mean(values)) if values else ""
    deviation = f" ± {np.std(values, ddof=1):.2f}" if len(values) > 1 else ""
    return f"{np.mean(values):.2f}{deviation}"


# --------------------------------------------------------------------------------------------------
# 8. Using a checkpoint: test it, or give it audio files


def evaluate_checkpoint(cfg, typed):
    """--evaluate: test a best.pt on its own corpus, or on another with the same classes or with
    trials of any speakers."""
    device = find_device(cfg.device)
    trained, model, saved = load_checkpoint(cfg.evaluate, device)
    if "data" not in typed and typed & {"fold", "trials"}:
        raise ValueError(f"--evaluate {cfg.evaluate} is tested as it was trained, with --fold "
                         f"{trained.fold or 1} --trials {trained.trials}: others' test clips "
                         "trained it")
    elsewhere = {f.name for f in fields(Config) if "evaluate" in f.metadata.get("modes", ())}
    tested = replace(trained, **{"few_shot": 0, "fold": None if "data" in typed else trained.fold}
                     | {name: getattr(cfg, name) for name in elsewhere & typed})
    corpus = open_corpus(tested, train="data" not in typed)
    if not (saved["trials"] and corpus.trials) and corpus.classes != saved["classes"]:
        raise ValueError(f"--evaluate {cfg.evaluate} knows {len(saved['classes'])} classes "
                         f"({', '.join(saved['classes'][:3])}, ...), --data {tested.data} has "
                         f"{len(corpus.classes)} ({', '.join(corpus.classes[:3])}, ...)")
    print(f"{cfg.evaluate} on the test split of {tested.data}:")
    if not corpus.trials:
        if cfg.durations or cfg.as_norm:
            raise ValueError("--durations and --as-norm are for verification: "
                             f"--data {tested.data} has no trials")
        return print("  " + numbers(evaluate(tested, corpus, model, "test", device)))
    strangers, segments = None, {name: read_duration(name) for name in cfg.durations or ["full"]}
    if cfg.as_norm:  # the cohort are speakers that trained the model
        try:
            home = open_corpus(trained) if "data" in typed else corpus
        except ValueError as error:
            raise ValueError(f"--as-norm needs what trained the model: {error}") from error
        strangers = cohort(trained, home, model, device)
        print(f"  s-norm: {min(300, len(strangers))} of {len(strangers)} means of training "
              f"speakers of {trained.data}, ddof 0")
    for name, frames in segments.items():
        print(f"  {name:>6}  " + numbers(evaluate_trials(
            tested, corpus, model, "test", device, frames, saved["threshold"], strangers)))


def read_duration(text):
    """Seconds, or full -> frames, or None for whole utterances."""
    try:
        frames = None if text == "full" else round(float(text) * 100)
    except (ValueError, OverflowError):
        raise ValueError(f"--durations {text!r}: expected seconds, or full") from None
    if frames is not None and frames < 16:  # an AST reads no less
        raise ValueError(f"--durations {text}: shorter than 0.16 seconds")
    return frames


def use_checkpoint(cfg, paths):
    """--predict, --verify, --embed: give the files, and those below the folders, to the model."""
    device = find_device(cfg.device)
    if not cfg.checkpoint:
        raise ValueError(f"{flag_of(mode_of(cfg))} needs --checkpoint RUN/best.pt")
    trained, model, saved = load_checkpoint(cfg.checkpoint, device)
    if saved["mels"]:
        raise ValueError(f"{cfg.checkpoint} was trained on ready features of {saved['mels']} bins: "
                         "how they were made of audio is not known here, so it reads no files")
    if cfg.verify and not saved["trials"]:
        raise ValueError(f"--verify: {cfg.checkpoint} tells {len(saved['classes'])} classes apart, "
                         "not speakers: train on a corpus with trials, such as --data voices")
    files = [file for path in map(Path, paths) for file in
             ([path / name for name in data.find_audio(path)] if path.is_dir() else [path])]
    if len(files) < 1 + bool(cfg.verify):
        raise ValueError(f"expected {'two files or more' if cfg.verify else 'audio files'}, got "
                         f"{len(files)} of {', '.join(map(str, paths))}")
    corpus, clips = data.corpus_of_files(files), np.arange(len(files))
    if cfg.predict:
        chances = class_probabilities(trained, corpus, model, clips, device, trained.frames)
        return predict(cfg, files, chances, saved["classes"])
    unit = embeddings(trained, corpus, model, clips, device)  # (files, E)
    return verify(unit, saved["threshold"]) if cfg.verify else write_embeddings(cfg, files, unit)


def predict(cfg, files, chances, classes):
    """Print, and write to --csv, the three likeliest classes of each file; chances (files, C)."""
    chances = chances.unflatten(1, (-1, len(classes))).sum(1)  # the speeds of a speaker are one
    rows = []
    for file, row in zip(files, chances):
        named = [(classes[i], float(p)) for p, i in zip(*row.topk(min(3, len(classes))))]
        rows.append([str(file)] + [cell for name, p in named for cell in (name, f"{p:.4f}")])
        print(f"{file}: " + ", ".join(f"{name} {p:.1%}" for name, p in named))
    if cfg.csv and not RANK:
        with open(cfg.csv, "w", newline="", encoding="utf-8") as out:
            csv.writer(out).writerows(rows)


def verify(unit, threshold):
    """Print whether the last file and the others, whose mean embedding enrols, are one speaker."""
    score = float(F.normalize(unit[:-1].mean(0), dim=0) @ unit[-1])  # (E,) @ (E,)
    print(f"score {score:.4f}" + (
        "; no threshold: this model had no validation trials" if threshold is None else
        f", threshold {threshold:.4f}: {'same' if score >= threshold else 'different'} speaker"))


def write_embeddings(cfg, files, unit):
    """Write embeddings.npy (files, E), unit length, and names.txt, a line a row."""
    out = Path(cfg.out or free_name("out/embeddings"))
    if (out / "embeddings.npy").exists():
        raise ValueError(f"{out} holds embeddings already: choose another --out")
    if not RANK:
        out.mkdir(parents=True, exist_ok=True)
        save(out / "names.txt", "".join(f"{file}\n" for file in files))
        np.save(out / "embeddings.npy", unit.numpy())
    print(f"{out}: embeddings.npy {tuple(unit.shape)}, names.txt")


# --------------------------------------------------------------------------------------------------
# 9. Machines: the device, and the processes that torchrun starts


def find_device(name):
    """Return the device of --device; of several processes each has the GPU of its number."""
    there = {"cuda": torch.cuda.is_available(), "cpu": True,
             "mps": torch.backends.mps.is_available() and WORLD == 1}  # gloo reaches CPUs alone
    if name == "auto":
        name = next(kind for kind in ("cuda", "mps", "cpu") if there[kind])
    if not there[name]:
        raise ValueError(f"--device {name} is not here, or not in this build of torch: take auto")
    if name == "cuda" and WORLD > 1:
        torch.cuda.set_device(name := f"cuda:{os.environ['LOCAL_RANK']}")
    return torch.device(name)


def has_bf16(device):
    """Whether bfloat16 is computed here: on every CPU, on GPUs that have it; untried on Macs'."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return device.type == "cpu"


def parallel_model(cfg, model, device):
    """Return what the loop calls: the model, compiled if asked, with gradients that are the mean
    over all processes. Evaluation and checkpoints use the plain model, whose weights these are."""
    cuda = device.type == "cuda"
    if WORLD > 1 and cuda:  # on CPUs each process has its own BatchNorm: torch's takes GPUs alone
        nn.SyncBatchNorm.convert_sync_batchnorm(model)
    forward = torch.compile(model) if cfg.compile else model
    if WORLD == 1:
        return forward
    return nn.parallel.DistributedDataParallel(forward, [device] if cuda else None)


def join_processes():
    """Join the processes of torchrun, if it started this one; all but the first print nothing."""
    if WORLD > 1:
        nccl = torch.cuda.is_available() and dist.is_nccl_available()  # not on Windows
        # One that dies ends the others at once. The limit is generous, for the others wait while
        # the first one packs a corpus, which may take hours.
        dist.init_process_group("cpu:gloo,cuda:nccl" if nccl else "gloo", timeout=timedelta(days=1))
    if RANK:
        sys.stdout = open(os.devnull, "w")


def on_first_rank(work):
    """Return, in all processes, what work() returns in the first one."""
    result = [None if RANK else work()]
    if WORLD > 1:
        dist.broadcast_object_list(result)
    return result[0]


def sum_over_ranks(total):
    """Return the sum of a tensor over all processes."""
    if WORLD > 1:
        dist.all_reduce(total)
    return total


def mean_over_ranks(values):
    return sum_over_ranks(torch.tensor(np.mean(values))).item() / WORLD


# --------------------------------------------------------------------------------------------------
# 10. The command line


def flag_of(name):
    return "--" + name.replace("_", "-")


def parse(argv=None):
    """Command line -> (Config, names of the flags that were typed)."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], allow_abbrev=False,
        epilog="Without any argument: the quick start. README.md tells the rest.")
    settings = {f.name: f for f in fields(Config)}
    for line in inspect.getsource(Config).splitlines():  # its comments are groups and helps
        if title := re.fullmatch(r"    # (.+)", line):
            group = parser.add_argument_group(title[1])
        elif found := re.match(r"    (\w+): .*?  # (.+)", line):
            f, text = settings[found[1]], found[2]
            text += ": " + ", ".join(f.metadata["choices"]) if "choices" in f.metadata else ""
            default = {"None": "the preset's, the method's or the model's", "True": "on",
                       "False": "off", "": "empty", "()": "none"}.get(str(f.default), f.default)
            rules = {bool: dict(action=argparse.BooleanOptionalAction), list: dict(
                nargs="+", metavar="SECONDS" if f.name == "durations" else "FILE")}.get(
                f.type, dict(type=f.type, metavar=f.type.__name__.upper()))
            group.add_argument(flag_of(f.name), default=argparse.SUPPRESS, **rules,
                               help=f"{text} (default: {default})".replace("%", "%%"))
    typed = vars(parser.parse_args(argv))
    return Config(**typed), set(typed)


def mode_of(cfg):
    """Return the one of MODES that the command line asks for, or "train"."""
    asked = [mode for mode in MODES if getattr(cfg, mode)] or ["train"]
    if len(asked) > 1:
        raise ValueError(f"{flag_of(asked[0])} and {flag_of(asked[1])} exclude each other")
    return asked[0]


def check(cfg, typed):
    """Refuse, before anything is opened, what is typed and breaks the rules of `opt`."""
    mode, kind = mode_of(cfg), "speaker" if cfg.model in lightweight_sv.MODELS else "ast"
    for f in [f for f in fields(Config) if f.name in typed and getattr(cfg, f.name) is not None]:
        value, rule = getattr(cfg, f.name), f.metadata
        least, most = rule.get("least", value), rule.get("most", value)
        modes, needs = rule.get("modes", TRAINING), rule.get("needs", "model").split()
        for broken, expected in (
                (value not in rule.get("choices", [value]),
                 f"unknown; choose from {', '.join(rule.get('choices', ()))}"),
                (not least <= value <= most,  # nan is refused too
                 f"expected at least {least}" + f" and at most {most}" * ("most" in rule)),
                (mode not in modes and f.name != mode,
                 f"does nothing with {flag_of(mode)}" if mode != "train" else
                 f"does nothing without {' or '.join(map(flag_of, modes))}"),
                (mode in TRAINING and rule.get("model", kind) != kind,
                 f"{cfg.model} does not read it, being {'no' if kind == 'speaker' else 'an'} AST"),
                (not any(getattr(cfg, name) for name in needs),
                 f"does nothing without {' or '.join(map(flag_of, needs))}"),
                (value and "waves" in rule and not data.CORPORA[cfg.data].rows,
                 f"changes waves, and --data {cfg.data} holds ready features")):
            if broken:
                raise ValueError(f"{flag_of(f.name)} {value}: {expected}")
    if {"trials", "data"} <= typed and not data.CORPORA[cfg.data].lists:
        raise ValueError(f"--trials chooses among VoxCeleb's lists; --data {cfg.data} has none")
    if cfg.snr_low > cfg.snr_high:
        raise ValueError(f"--snr-low {cfg.snr_low} is above --snr-high {cfg.snr_high}")
    if cfg.bf16 and not has_bf16(find_device(cfg.device)):
        raise ValueError(f"--bf16: {find_device(cfg.device)} has no bfloat16 that is known to work")
    if mode in TRAINING and kind == "ast":
        check_start(cfg)


def check_start(cfg):
    """Refuse what an AST cannot start from, and options that its method or size does not take."""
    if cfg.init in ast_adapters.AUDIOSET and cfg.model != "ast-base":
        raise ValueError(f"--init {cfg.init} is an AST-base: add --model ast-base")
    if not cfg.init and cfg.model != "ast-nano":
        raise ValueError(f"--model {cfg.model} needs --init CHECKPOINT, or --init none to start "
                         "from random weights")
    with torch.device("meta"):  # shapes without memory
        ast = AST(cfg.model.removeprefix("ast-"))
    ast_adapters.check_options(ast, cfg.method, method_options(cfg))


def main(argv=None):
    cfg, typed = parse(argv)
    try:
        join_processes()
        check(cfg, typed)
        if cfg.download:
            on_first_rank(lambda: data.download_corpus(cfg.data, cfg.root, cfg.cache))
        if cfg.evaluate:
            evaluate_checkpoint(cfg, typed)
        elif paths := cfg.predict or cfg.verify or cfg.embed:
            use_checkpoint(cfg, paths)
        else:
            study(cfg, typed)
    except (ValueError, OSError) as error:
        sys.exit(f"error{f' in process {RANK}' * bool(RANK)}: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; the same command with --resume and this run's --out goes on from the "
                 "last whole epoch" * (not RANK))


if __name__ == "__main__":
    main()
