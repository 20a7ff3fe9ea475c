"""Train, compare, test and use every model of this project: one Config, one loop.

    python train.py                     # quick start: a nano AST learns new sounds, offline
    python train.py compare             # every method on the same data, one table
    python train.py --data fsdd --root DIR --method lora --rank 4
    python train.py --model ecapa-tdnn --subsets 4 --data voices
    python train.py evaluate out/RUN
    python train.py predict out/RUN a.wav DIR
    torchrun --nproc_per_node=2 train.py ...            # the same loop in several processes

Sections  1 settings, 2 recipes, 3 the loop, 4 evaluation, 5 the model, 6 a run and its files,
          7 tables of runs, 8 using a run, 9 the machine, 10 commands
Axes      B batch, T frames, F mel bins, D width, E embedding, C classes or speakers

P1 is the paper on adapters of the AST (arXiv 2312.03694). Unlike its code, this program selects the
best epoch by validation clips, and scores the test split once, with the weights of that epoch.
Weight decay leaves scales, biases and norms alone: many scales start at one.
Not in this program: one model over several GPUs, a search of hyper-parameters, logs to a service.
"""

import argparse
import copy
import csv
import ctypes
import difflib
import hashlib
import inspect
import io
import itertools
import json
import math
import os
import re
import sys
import tempfile
import time
import timeit
from dataclasses import asdict, dataclass, field, fields, replace
from datetime import timedelta
from functools import partial
from pathlib import Path

# torch computes in threads. A thread that waits for another one spins: it keeps its core busy, and
# beside a second program a nano step took 400 ms instead of 25. Let threads spin shortly, then
# sleep. One line is for GNU's OpenMP, one for Intel's and LLVM's; torch reads them at its import.
os.environ.setdefault("GOMP_SPINCOUNT", "5000")
os.environ.setdefault("KMP_BLOCKTIME", "1")

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.profiler import record_function
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import ast_adapters
import data
import lightweight_sv
from ast_adapters import AST, METHODS, LinearHead, adapt

RANK = int(os.environ.get("RANK", 0))  # the number of this process; torchrun sets both
WORLD = int(os.environ.get("WORLD_SIZE", 1))  # how many there are
# A bar in the first process alone. tqdm's None: shown in a terminal, not in a file.
progress = partial(tqdm, leave=False, disable=True if RANK else None)

# --------------------------------------------------------------------------------------------------
# 1. Settings: one Config is their only source; each field has its default, its help and its rules

MODELS = [f"ast-{size}" for size in ast_adapters.SIZES] + list(lightweight_sv.MODELS)
ACCELERATOR = torch.accelerator.current_accelerator(check_available=True)  # None: only a CPU
DEVICES = ["auto", "cpu"]
if ACCELERATOR:
    DEVICES.append(ACCELERATOR.type)
FOLDS = ("all", *map(str, range(1, 11)))
# What may differ when --resume goes on with a run: the last group of Config.
PLACES = "root download cache out resume seeds figure device compile".split()


def flag(default, help, **rules):
    """A field of Config, with the rules that a typed value must keep:
    choices, least, most    which values are allowed; `item`: the type of each in a list
    model                   the kind of model that reads it: "ast" or "speaker"
    needs                   other flags; if none of them is typed, this does nothing
    corpus                  what the corpus must have: "folds" or "lists"
    For --help: `shown` is the default to print, `group` the title of this field and the next."""
    return field(default=default, metadata=dict(rules, help=help))


@dataclass(frozen=True)
class Config:
    """Every setting of a training. None: the recipe, method, model or machine decides."""

    model: str = flag("ast-nano", "the encoder", choices=MODELS, group="What to train")
    method: str = flag("conformer", "how to adapt an AST", choices=METHODS, model="ast")
    init: str = flag("", "start: FILE, audioset, audioset-16, dinov2, none",
                     shown="our nano AST; of a speaker model none")

    data: str = flag("sounds", "the corpus", choices=data.CORPORA, group="Data")
    fold: str = flag("1", "the fold that tests", choices=FOLDS, corpus="folds")
    trials: str = flag("o", "VoxCeleb's list", choices=("o", "e", "h"), corpus="lists")
    valid: bool = flag(True, "select the best epoch on validation clips; no: train on them too")
    few_shot: int = flag(0, "train on so many clips a class, drawn by the seed; 0: all", least=0)
    skip_bad: bool = flag(False, "go on without clips that cannot be read")

    epochs: int = flag(None, "passes over the training clips", least=1, group="Training")
    steps: int = flag(None, "end every epoch after so many batches", least=1, shown="all clips")
    batch_size: int = flag(None, "clips a step, over all processes", least=1)
    lr: float = flag(None, "highest learning rate", least=1e-9, most=10)
    head_lr: float = flag(None, "the head's own highest rate", least=1e-9, most=10,
                          shown="the recipe's, or --lr")
    warmup: float = flag(None, "share of the steps in which the rate rises", least=0, most=0.9)
    weight_decay: float = flag(None, "how AdamW shrinks matrices", least=0, most=10)
    frames: int = flag(None, "length of a training segment, in frames of 10 ms", least=16)
    seed: int = flag(0, "of weights, order, crops and drawn splits", least=0, most=10**9)
    bf16: bool = flag(None, "autocast to bfloat16", shown="where it is fast")
    checkpointing: bool = flag(False, "less memory: compute blocks again, 1.4 x time", model="ast")

    spec_f: int = flag(None, "SpecAugment: widest mask, in mel bins", least=0,
                       group="Augmentation of training clips: against learning them by heart")
    spec_t: int = flag(None, "SpecAugment: widest mask, in frames", least=0)
    shift: int = flag(None, "roll by up to so many frames", least=0)
    gain: float = flag(None, "louder or softer by up to so many dB", least=0, most=60, model="ast")
    speed_perturb: bool = flag(False, "play x1, x0.9 and x1.1; each speed is a speaker of its own")
    noise: str = flag("", "a folder of noises, such as MUSAN's, or: generated")
    reverb: str = flag("", "a folder of rooms' impulse responses, or: generated")
    distorted: float = flag(0.6, "share of clips with either", least=0, most=1,
                            needs=["noise", "reverb"])
    snr: tuple = flag((0.0, 15.0), "lowest and highest dB", item=float, needs=["noise"])

    rank: int = flag(None, "adapters, LoRA: width of the bottleneck", model="ast",
                     group="Options of AST and its methods: for ablations")
    where: str = flag(None, "adapters: ffn, mhsa or both", model="ast")
    form: str = flag(None, "adapters: parallel or sequential", model="ast")
    at: str = flag(None, "sequential adapters: before or after the sub-layer", model="ast")
    residual: bool = flag(None, "sequential adapters: add their input", model="ast")
    kernel: int = flag(None, "Conformer adapter: taps of the depthwise convolution", model="ast")
    tokens: int = flag(None, "prompts in each layer; prefix: half keys, half values", model="ast")
    alpha: float = flag(None, "LoRA: scale is alpha / rank", model="ast")
    targets: str = flag(None, "LoRA: which of q, k, v, o, such as qv", model="ast")
    experts: int = flag(None, "mixtures: adapters a layer", model="ast")
    slots: int = flag(None, "Soft-MoA: slots an expert", model="ast")
    pos_embed: str = flag("crop", "positions: cut to the clip; zero: none, as in P1's code",
                          choices=("crop", "zero"), model="ast")
    pool: str = flag("mean", "mean of all tokens, or of CLS and DIST alone",
                     choices=("mean", "cls"), model="ast")

    subsets: int = flag(1, "feature subsets S; 1: the model as it is", least=1, model="speaker",
                        group="Speaker models: how light, and how hard the training task")
    share: bool = flag(False, "one set of weights for all subsets", model="speaker",
                       needs=["subsets"])
    fusion: str = flag("module", "between subsets", choices=lightweight_sv.FUSIONS, model="speaker",
                       needs=["subsets"])
    width: int = flag(None, "channels", least=1, model="speaker", shown="the model's")
    embed_dim: int = flag(None, "size of the embedding", least=1, model="speaker",
                          shown="the model's")
    margin: float = flag(0.2, "AAM-softmax: angular margin in radians", least=0, most=1.5)
    margin_rise: float = flag(0.0, "share of the steps in which it rises from 0", least=0, most=1)

    root: str = flag("", "folder of the corpus; the built-in ones need none",
                     group="Places and machine: these may differ when a run goes on")
    download: bool = flag(False, "bring the corpus to --root first, where that is free")
    cache: str = flag("cache", "folder for packed corpora and the nano AST")
    out: str = flag("", "folder of the run", shown="out/ and a name")
    resume: bool = flag(False, "go on where the run in --out stopped")
    seeds: int = flag(1, "so many runs, from --seed on: mean and deviation", least=1)
    figure: str = flag("", "draw the result into this .png, .svg or .pdf (profile: .json)")
    device: str = flag("auto", "where to compute", choices=DEVICES)
    compile: bool = flag(False, "torch.compile: slow first step, faster epochs")

    @property
    def speaker(self):
        return self.model in lightweight_sv.MODELS

    @property
    def crop(self):
        """Frames to cut for training. A crop that is played 1.1 times as fast gets shorter."""
        if not self.speed_perturb:
            return self.frames
        samples = 1.1 * data.samples_of(self.frames)
        return math.ceil(samples / data.HOP)  # n frames hold n hops of samples and more: enough

    @property
    def kind(self):
        return "speaker" if self.speaker else "ast"

    @property
    def name(self):
        return self.model if self.speaker else f"{self.model}-{self.method}"


FIELDS = {f.name: f for f in fields(Config)}
METHOD_OPTIONS = sorted({name for _, options in METHODS.values() for name in options})  # rank, ...


def host_options(model):
    """Return the keywords of a speaker model; each is a field of Config."""
    names = inspect.signature(lightweight_sv.MODELS[model]).parameters
    return [name for name in names if name != "mels"]


def as_config(values):
    """Return the Config of a saved run. An older run may lack a field, which then has its default,
    or have one that is gone, which is left out."""
    return Config(**{name: value for name, value in values.items() if name in FIELDS})


def check(cfg, typed):
    """Refuse a typed value that breaks a rule of its field, before anything is opened."""
    source = data.CORPORA[cfg.data]
    for name in sorted(typed):
        rules = FIELDS[name].metadata
        value = getattr(cfg, name)
        most = rules.get("most", math.inf)
        needs = rules.get("needs", [])
        broken = None
        if "model" in rules and rules["model"] != cfg.kind:
            broken = f"{cfg.model} does not read it: it is for {rules['model']} models"
        elif "least" in rules and not (rules["least"] <= value <= most):  # true for nan too
            broken = f"expected at least {rules['least']}"
            if "most" in rules:
                broken += f" and at most {most}"
        elif needs and not typed & set(needs):
            broken = "does nothing without --" + " or --".join(needs)
        elif "corpus" in rules and not getattr(source, rules["corpus"]):
            broken = f"--data {cfg.data} has no {rules['corpus']}"
        elif name == "fold" and value != "all" and int(value) > source.folds:
            broken = f"--data {cfg.data} has folds 1 to {source.folds}"
        elif name == "root" and value and not source.tree:
            broken = f"--data {cfg.data} is built in; name your corpus, as with --data folder"
        if broken:
            raise ValueError(f"--{name.replace('_', '-')} {value}: {broken}")


def check_training(cfg, typed):
    """Refuse a start, a method or a batch that is not possible, before the corpus is opened."""
    check(cfg, typed)
    if not cfg.speaker:
        size = cfg.model.removeprefix("ast-")
        starts = [*ast_adapters.DOWNLOADS, ("", "nano")]  # (--init, size of the AST that it has)
        # Empty for a FILE and for `none`: any size may fit.
        sizes = [own for init, own in starts if init == cfg.init]
        if sizes and size not in sizes:
            raise ValueError(
                f"--model {cfg.model} needs --init FILE (none: random weights); to start from "
                f"{cfg.init or 'our nano AST'}, take --model ast-{sizes[0]}")
        options = {name: getattr(cfg, name) for name in METHOD_OPTIONS if name in typed}
        ast_adapters.check_options(size, cfg.method, options)
    cfg = with_recipe(cfg)
    check_batch(cfg, cfg.batch_size)


def check_batch(cfg, clips):
    """Refuse one clip a process if the model has a BatchNorm over embeddings: it needs two values
    of a channel. On several GPUs BatchNorm is synchronised, and sees the clips of all."""
    gpu = cfg.device == "cuda" or (cfg.device == "auto" and torch.cuda.is_available())
    synchronised = gpu and WORLD > 1
    if cfg.speaker and clips // WORLD == 1 and not synchronised:
        if any(isinstance(layer, nn.BatchNorm1d) for layer in make_encoder(cfg).modules()):
            raise ValueError(f"--batch-size {cfg.batch_size}: one clip a process cannot train "
                             f"{cfg.model}, whose BatchNorm needs two or more")


# --------------------------------------------------------------------------------------------------
# 2. Recipes: what a setting is if nobody types it; what is typed wins

# A row fits if each part of its key, (corpus, methods, model or its kind), is "*" or names what is
# trained. All rows that fit are read from top to bottom: a later one changes an earlier one.
RECIPES = {
    ("*", "*", "*"): dict(epochs=30, batch_size=32, frames=500, warmup=0.0, weight_decay=0.1,
                          spec_f=0, spec_t=0, shift=0, gain=0.0),
    # ASTs: P1's rates (section 3.1).
    ("*", "*", "ast"): dict(lr=5e-3),
    ("*", "full", "ast"): dict(lr=5e-5),
    ("*", "linear", "ast"): dict(lr=1e-3),
    ("*", "prompt-shallow prompt-deep prefix", "ast"): dict(lr=1e-2),
    # The nano AST is four hundred times smaller than AST-base. It has 26 tokens, for which P1's 300
    # prompts are too many. Rates and epochs were chosen on validation clips of `sounds`.
    ("*", "*", "ast-nano"): dict(lr=2e-2, warmup=0.1, frames=100),
    ("*", "full", "ast-nano"): dict(lr=2e-3),
    ("*", "prompt-shallow", "ast-nano"): dict(tokens=16),
    ("*", "prompt-deep prefix", "ast-nano"): dict(tokens=8),
    # Speaker models: ours.
    ("*", "*", "speaker"): dict(epochs=10, batch_size=64, frames=200, lr=2e-3, warmup=0.3,
                                weight_decay=0.05),
    # Corpora: P1's four, then ours.
    ("esc50", "*", "*"): dict(frames=500, epochs=50, spec_f=24, spec_t=80),
    ("urbansound8k", "*", "*"): dict(frames=400, epochs=30, spec_f=24, spec_t=80),
    ("speechcommands", "*", "*"): dict(frames=100, epochs=75, batch_size=128),
    ("fluentspeech", "*", "*"): dict(frames=400, epochs=75),
    ("fsdd", "*", "*"): dict(frames=64, epochs=40, spec_f=16, spec_t=8, shift=6, gain=10.0),
    ("fsdd", "*", "speaker"): dict(gain=0.0),  # no use: their features have no loudness
    ("voxceleb", "*", "*"): dict(frames=200),
    ("sounds", "*", "*"): dict(frames=100, epochs=9),
    ("sounds-source", "*", "*"): dict(frames=100, epochs=7),
    ("voices", "*", "*"): dict(frames=150, epochs=6, batch_size=32),
    # A small AST starts from a model of pictures (--init dinov2). Rates were chosen on validation
    # clips of 40 spoken words, 8 clips a word. `full`: 5e-5 is too low for the new head, so
    # the head has its own rate; at 1.5e-4 or more, the other layers forget what they knew.
    ("*", "*", "ast-small"): dict(epochs=8, batch_size=16, warmup=0.1, lr=2e-3),
    ("*", "full", "ast-small"): dict(lr=5e-5, head_lr=5e-3),
    ("*", "lora dora convpass", "ast-small"): dict(lr=5e-3),
    ("*", "linear prompt-shallow prompt-deep prefix", "ast-small"): dict(lr=1e-2),
    ("*", "prompt-shallow", "ast-small"): dict(tokens=50),  # as many as a second of sound has
    # On ESC-50 the loss of these three began above that of chance, and fell slowly, at the rates
    # for words. Lower ones were better: `adapter` on validation clips, the others by training
    # loss. For the other methods none were tried there.
    ("esc50", "adapter", "ast-small"): dict(lr=5e-4),
    ("esc50", "convpass", "ast-small"): dict(lr=1e-3),
    ("esc50", "prompt-deep", "ast-small"): dict(lr=2e-3),
    # Hosts of 250,000 to 500,000 parameters learn `voices` in two minutes.
    ("voices", "*", "speaker"): dict(width=64, embed_dim=128),
    ("voices", "*", "amcrn"): dict(width=32),
    ("voices", "*", "resnet34"): dict(width=8),
}


def with_recipe(cfg):
    """Fill in each setting that nobody typed and that RECIPES has."""
    trained = [{"*", cfg.data}, {"*", cfg.method}, {"*", cfg.kind, cfg.model}]
    recipe = {}
    for key, settings in RECIPES.items():
        common = [names & set(part.split()) for names, part in zip(trained, key)]
        if all(common):  # each part of the key shares a word with what is trained
            recipe |= settings
    missing = {name: value for name, value in recipe.items() if getattr(cfg, name) is None}
    return replace(cfg, **missing)


# --------------------------------------------------------------------------------------------------
# 3. The loop: batch -> features -> forward -> loss -> backward -> step -> log -> evaluate -> save


def fit(cfg, corpus, model, augment_waves, out):
    """Train `model`; leave last.pt, best.pt and log.jsonl in `out`. Return the seconds it took."""
    optimiser = make_optimiser(cfg, model)
    state = load_last(out, corpus, model, optimiser)  # epoch 0, or where this run stopped
    forward = parallel_model(cfg, model)  # the same weights, for several processes
    bf16 = torch.autocast(cfg.device, torch.bfloat16, enabled=cfg.bf16)
    per_epoch = steps_an_epoch(cfg, corpus)
    steps = cfg.epochs * per_epoch
    for epoch in range(state["epoch"], cfg.epochs):
        # A seed for each epoch and process, so a resumed epoch draws what it would have drawn.
        torch.manual_seed(1000 * cfg.seed + epoch + 10**9 * RANK)
        model.train()
        start = time.time()
        losses = []  # [(loss, clips of its batch)]
        batches = data.batches(corpus, corpus.pick("train"), cfg.batch_size, cfg.crop, cfg.seed,
                               epoch, repeat=cfg.speaker, shard=(RANK, WORLD), steps=cfg.steps)
        for i in progress(range(per_epoch), f"epoch {epoch + 1}"):
            # 1. The next clips of the packed corpus. (`profile` reads the names of these ranges.)
            with record_function("data"):
                batch = next(batches)
            # 2. The learning rate rises and falls; the margin, for heads of speakers alone, rises.
            step = epoch * per_epoch + i
            lr = learning_rate(cfg, step, steps)
            for group in optimiser.param_groups:
                group["lr"] = lr * group["times"]  # 1, or for the head --head-lr / --lr
            model.head.margin = head_margin(cfg, step, steps)  # a LinearHead does not read it
            # 3. Waves become features, on the device that trains; both are augmented.
            with record_function("augmentation"):
                batch = augment_waves(batch.to(cfg.device))  # speed, gain, noise, rooms
            with record_function("features"):
                x = data.features(batch, model.encoder)  # (B, T, F)
                x = data.augment_features(x, cfg.shift, cfg.spec_f, cfg.spec_t)
            # 4. (B, T, F) -> logits (B, C) -> loss. (A head for speakers needs the labels.)
            with record_function("forward"), bf16:
                loss = F.cross_entropy(forward(x, batch.labels), batch.labels)
            with record_function("backward"):
                optimiser.zero_grad()
                loss.backward()
            with record_function("optimiser"):
                optimiser.step()
            check_loss(losses, corpus)  # of the step before: this one's loss is not ready on a GPU
            losses.append((loss.detach(), batch.clips))
        # 5. Validate, keep the best weights, log, save.
        end_epoch(cfg, corpus, model, optimiser, out, state, losses, lr, start)
    return state["seconds"]


def end_epoch(cfg, corpus, model, optimiser, out, state, losses, lr, start):
    """Validate, keep the best weights, write the log and last.pt, print a line."""
    check_loss(losses, corpus)
    total = sum_over_ranks(torch.stack([loss for loss, _ in losses]).mean())
    mean = total.item() / WORLD  # waits for the GPU; only then is the clock read
    speed = WORLD * sum(len(clips) for _, clips in losses) / (time.time() - start)
    epoch = state["epoch"] + 1
    valid = evaluate(cfg, corpus, model, "valid")
    score = valid.get("score", epoch)  # without validation clips a later epoch is a better one
    if score >= state["best"]:  # of equal epochs the later one has seen more
        state["best"] = score
        save(out / "best.pt", checkpoint(cfg, corpus, model, epoch, valid))
    state["seconds"] += time.time() - start
    left = state["seconds"] / epoch * (cfg.epochs - epoch)
    line = dict(epoch=epoch, loss=mean, valid=valid.get("score"), best=state["best"], lr=lr,
                clips_per_second=speed, eta=left)
    state["epoch"] = epoch
    state["log"].append(line)
    save_last(out, model, optimiser, state)
    told = f"  validation {numbers(valid)}" if valid else ""
    print(f"epoch {epoch} of {cfg.epochs}  loss {mean:.4g}{told}  {speed:,.0f} clips/s  "
          f"{left:.0f} s left", flush=True)


def steps_an_epoch(cfg, corpus):
    """Return the number of whole batches, at least one, at most --steps."""
    steps = max(1, len(corpus.pick("train")) // cfg.batch_size)
    return min(steps, cfg.steps or steps)


def clips_a_step(cfg, corpus):
    """Return the clips of a step, over all processes: a small corpus is one batch."""
    return min(cfg.batch_size, len(corpus.pick("train")))


def learning_rate(cfg, step, steps):
    """Rise in a line over the first `warmup` of the steps, then fall to zero in half a cosine."""
    warm = int(cfg.warmup * steps)
    if step < warm:
        return cfg.lr * (step + 1) / warm
    fallen = (step - warm) / (steps - warm)  # 0 at the top, near 1 in the last step
    return cfg.lr * 0.5 * (1 + math.cos(math.pi * fallen))


def head_margin(cfg, step, steps):
    """Rise in a line to --margin over the first `margin_rise` of the steps: easy tasks first."""
    rising = cfg.margin_rise * steps
    return cfg.margin * min(1, (step + 1) / max(1, rising))


# Vectors that are stored with more axes: CLS and DIST of an AST, the magnitudes of DoRA.
VECTORS = ("cls_token", "dist_token", "m")


def make_optimiser(cfg, model):
    """Return AdamW for what trains. Matrices, kernels, positions and prompts decay; biases do not,
    nor do scales that start at one (LayerNorm, SSF, IA3, DoRA): decay would pull them to zero."""
    groups = {}  # (factor of the learning rate, weight decay): parameters
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        factor = 1.0
        if name.startswith("head.") and cfg.head_lr:
            factor = cfg.head_lr / cfg.lr
        decay = 0.0
        # What has two axes is a matrix: LoRA's A too, whose shape at rank 1 is (1, D).
        if p.ndim > 1 and name.rpartition(".")[2] not in VECTORS:
            decay = cfg.weight_decay
        groups.setdefault((factor, decay), []).append(p)
    settings = [dict(params=params, times=factor, weight_decay=decay)
                for (factor, decay), params in groups.items()]
    return torch.optim.AdamW(settings, cfg.lr, betas=(0.9, 0.98), eps=1e-6, fused=True)


def check_loss(losses, corpus):
    """Stop if the last of the losses is not finite, and name the clips of its batch."""
    if losses:
        loss, clips = losses[-1]
        if not loss.isfinite():
            names = ", ".join(corpus.ids[i] for i in clips[:5])
            raise ValueError(f"the loss became {loss.item()} in a batch with {names}: lower --lr?")


# --------------------------------------------------------------------------------------------------
# 4. Evaluation: accuracy of a split, or error rates of its trials; processes share the work


def evaluate(cfg, corpus, model, split, frames=None, threshold=None, strangers=None):
    """Return the results of one split, {} if it is empty. The best epoch has the highest "score".
    For classes each clip is cut into windows of `frames`; for trials only the first `frames` of
    each utterance are heard."""
    if split in corpus.trials:
        return evaluate_trials(cfg, corpus, model, split, frames, threshold, strangers)
    if len(corpus.pick(split)) and not corpus.trials:
        return evaluate_classes(cfg, corpus, model, split, frames or cfg.frames)
    return {}  # also for speakers without trials in this split: they are no classes of the head


def evaluate_classes(cfg, corpus, model, split, frames):
    """Return the accuracy in %. For `sounds` also return two parts of it: `order`, the accuracy on
    classes that only the order of their parts tells apart ("ping>thud" and "thud>ping"), and
    `content`, that on all others."""
    clips = corpus.pick(split)
    labels = corpus.labels[clips]
    chances = class_probabilities(cfg, corpus, model, clips, frames)  # (clips, C)
    right = np.where(chances.argmax(1).numpy() == labels, 100.0, 0.0)
    results = dict(accuracy=right.mean(), score=right.mean())
    ordered = np.array([">" in corpus.classes[label] for label in labels])
    if ordered.any() and not ordered.all():
        results |= dict(content=right[~ordered].mean(), order=right[ordered].mean())
    return {name: float(value) for name, value in results.items()}


def evaluate_trials(cfg, corpus, model, split, frames, threshold, strangers):
    """Return error rates of the trials, and their scores. Validation trials give a threshold, at
    which test trials are judged. With `strangers`, the embeddings of training speakers, each score
    is compared with those of strangers (s-norm)."""
    trials = np.array(corpus.trials[split])  # (trials, 3): label, clip, clip
    labels = trials[:, 0]
    # A clip is in many trials, and embedded once: pairs are rows of the embeddings.
    clips, rows = np.unique(trials[:, 1:], return_inverse=True)
    pairs = rows.reshape(-1, 2)  # (trials, 2)
    unit = embeddings(cfg, corpus, model, clips, frames)  # (clips, E)
    scores = (unit[pairs[:, 0]] * unit[pairs[:, 1]]).sum(1).double().numpy()  # cosines
    if strangers is not None:
        scores = lightweight_sv.adaptive_s_norm(scores, pairs, unit, strangers)
        threshold = None  # it was for cosines
    if split == "valid":
        threshold = lightweight_sv.threshold_at(scores, labels)
    results = lightweight_sv.error_rates(scores, labels, threshold)
    return results | dict(score=-results["eer"], scores=scores)


def infer(cfg, model, layer, batch):
    """Return the output of `layer` (the model, or its encoder alone), in float32 on the CPU."""
    x = data.features(batch.to(cfg.device), model.encoder)  # (B, T, F)
    with torch.inference_mode(), torch.autocast(cfg.device, torch.bfloat16, enabled=cfg.bf16):
        return layer(x).float().cpu()


def class_probabilities(cfg, corpus, model, clips, frames):
    """Return (clips, C): the mean over a clip's windows of `frames` frames, side by side."""
    model.eval()
    # In `windows` each window is a clip; window w was cut from the clip in row owner[w] of `clips`.
    windows, owner = data.cut_windows(corpus, clips, frames)
    total = torch.zeros(len(clips), len(model.head.weight))  # (clips, C)
    for batch in data.batches(windows, np.arange(len(owner)), 128, frames, train=False,
                              repeat=cfg.speaker, shard=(RANK, WORLD)):
        logits = infer(cfg, model, layer=model, batch=batch)  # (B, C)
        total.index_add_(0, owner[batch.clips], logits.softmax(1))  # batch.clips: w
    return sum_over_ranks(total) / owner.bincount()[:, None]  # (clips, 1): windows of each


MINUTE = 6000  # frames


def embeddings(cfg, corpus, model, clips, frames=None):
    """Return unit embeddings (clips, E) of utterances, or of their first `frames`. A speaker model
    hears up to a minute at once, an AST as much as in training. A longer utterance is cut into
    windows of this length; it has the mean of their embeddings."""
    model.eval()
    if frames:
        corpus = replace(corpus, length=np.minimum(corpus.length, data.samples_of(frames)))
    longest = MINUTE if cfg.speaker else cfg.frames
    windows, owner = data.cut_windows(corpus, clips, longest)  # as in class_probabilities
    lengths = np.maximum(16, data.frames_of(windows.length))  # an AST needs 16
    total = torch.zeros(len(clips), model.encoder.embed_dim)  # (clips, E)
    # A batch has windows of one length, so that none is padded.
    batches = []
    for length in np.unique(lengths):
        size = max(1, min(64, MINUTE // length))  # a batch is a minute of sound at most
        same = np.flatnonzero(lengths == length)
        batches += np.split(same, range(size, len(same), size))  # cut after every `size` windows
    for part in batches[RANK::WORLD]:
        batch = data.load_batch(windows, part, int(lengths[part[0]]), repeat=cfg.speaker)
        total.index_add_(0, owner[part], infer(cfg, model, layer=model.encoder, batch=batch))
    return F.normalize(sum_over_ranks(total), dim=1)  # a sum has the direction of the mean


def cohort(cfg, corpus, model):
    """Return (C, E): for each training speaker the mean embedding of up to twenty utterances."""
    train = np.random.default_rng(cfg.seed).permutation(corpus.pick("train"))
    chosen = [train[corpus.labels[train] == c][:20] for c in range(len(corpus.classes))]
    unit = embeddings(cfg, corpus, model, np.concatenate(chosen))
    sizes = [len(clips) for clips in chosen]
    return torch.stack([own.mean(0) for own in unit.split(sizes)])


# --------------------------------------------------------------------------------------------------
# 5. The model: an encoder and a head, new or out of a checkpoint


class Model(nn.Module):
    """Encoder and head: (B, T, F) and, for a head of speakers, labels (B,) -> logits (B, C)."""

    def __init__(self, encoder, head):
        super().__init__()
        self.encoder = encoder
        self.head = head

    def forward(self, x, labels=None):
        return self.head(self.encoder(x), labels)


def training_memory(model, clips, frames, bf16):
    """Return the MB that a training step of so many clips needs beside the weights: what autograd
    keeps for the backward pass, the gradients, and AdamW's two moments. The sizes of tensors are
    added up: in one precision the sum is the same on every device."""
    x = model.head.weight.new_zeros(clips, frames, model.encoder.mels)  # (B, T, F)
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}  # address: bytes; two tensors that share their storage count once

    def note(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor.detach()  # with its graph it would be part of a circle, and never freed

    # autograd keeps what `note` returns, and puts it through the other function on its way back.
    hooks = torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor)
    model.train()
    with hooks, torch.autocast(x.device.type, torch.bfloat16, enabled=bf16):
        logits = model(x, x.new_zeros(clips, dtype=torch.long))
    logits.sum().backward()  # adds no MB: measure_step times it, profile counts its products
    activations = sum(size for address, size in kept.items() if address not in weights)
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    return round((activations + 3 * trained) / 2**20, 2)


def ast_settings(cfg):
    """Return what AST(...) takes."""
    return dict(size=cfg.model.removeprefix("ast-"), pos_embed=cfg.pos_embed, pool=cfg.pool)


def make_encoder(cfg, settings=None, start=None):
    """Return an encoder with new weights; an AST with its method inserted. An AST may have the
    `settings` of a saved one, and take over the weights of the file `start`."""
    names = host_options(cfg.model) if cfg.speaker else METHODS[cfg.method][1]
    options = {name: getattr(cfg, name) for name in names if getattr(cfg, name) is not None}
    torch.manual_seed(cfg.seed)
    if cfg.speaker:
        return lightweight_sv.MODELS[cfg.model](**options)
    settings = settings or ast_settings(cfg)
    encoder = AST(**settings)
    if start:
        encoder, sentence = ast_adapters.load_pretrained(encoder, start)
        if cfg.init:  # of our nano AST there is nothing to tell
            print(sentence)
    adapt(encoder, cfg.method, **options)
    encoder.checkpointing = cfg.checkpointing
    return encoder


def make_head(cfg, size, classes, trials):
    """Return a Linear for classes. With trials it is AAM-softmax, where each speed of a speaker is
    a class."""
    torch.manual_seed(cfg.seed)  # so every method starts from the same head
    if not trials:
        return LinearHead(size, len(classes))
    speeds = len(data.SPEEDS) if cfg.speed_perturb else 1
    return lightweight_sv.AAMSoftmax(size, speeds * len(classes))


def build_model(cfg, corpus):
    """Return the model that a training starts with. A speaker model takes over the encoder of
    --init best.pt and, if the classes are the same, its head."""
    start = pretrained_file(cfg)
    encoder = make_encoder(cfg, start=start)
    model = Model(encoder, make_head(cfg, encoder.embed_dim, corpus.classes, corpus.trials))
    if cfg.speaker and start:
        saved = load_run(start).saved
        try:
            model.encoder.load_state_dict(saved["encoder"])
        except RuntimeError as error:
            raise ValueError(f"--init {start} holds another model or width") from error
        if saved["classes"] == corpus.classes:
            # A head that was trained with --speed-perturb has 3 C rows, of which the first C are
            # the speakers at their own speed. Copy the rows that both heads have.
            for ours, theirs in zip(model.head.parameters(), saved["head"].values()):
                ours.data[: len(theirs)] = theirs[: len(ours)]
    return model


def pretrained_file(cfg):
    """Return the checkpoint that a model starts from, or None for new weights."""
    size = cfg.model.removeprefix("ast-")
    if cfg.init == "none" or (cfg.speaker and not cfg.init):
        return None
    if (cfg.init, size) in ast_adapters.DOWNLOADS:  # a published one, brought once
        address, sha256 = ast_adapters.DOWNLOADS[cfg.init, size]
        file = Path(cfg.cache, f"{cfg.init}-{size}.pth")
        return on_first_rank(lambda: data.download(address, file, sha256))
    if cfg.init:
        return Path(cfg.init, "best.pt") if Path(cfg.init).is_dir() else cfg.init
    # Our nano AST: made by a training like any other, and kept in the cache.
    file = Path(cfg.cache) / f"ast-nano-v{data.VERSION}-64.pt"  # 64: its mel bins
    if not on_first_rank(file.exists):
        print("making the nano AST: training on the source classes of `sounds`, once")
        # A folder of its own, and one move: two programs may make the file at the same time.
        with tempfile.TemporaryDirectory(dir=cfg.cache) as made:
            folder = on_first_rank(lambda: made)  # all processes use that of the first
            batch = math.ceil(32 / WORLD) * WORLD  # 32 clips, or the next multiple of WORLD
            # In float32, so that it is nearly the same on all processors.
            run(Config(data="sounds-source", method="full", init="none", cache=cfg.cache,
                       out=folder, device=cfg.device, batch_size=batch, bf16=False))
            on_first_rank(lambda: os.replace(f"{folder}/best.pt", file))
    return file


@dataclass
class Run:
    """A trained model, ready for use."""

    settings: Config
    model: Model  # in eval mode
    classes: list
    threshold: float  # of cosines, between two speakers; None without validation trials
    saved: dict  # all that its file holds


def load_run(path, backbone=None, device="cpu"):
    """Return the Run of a folder, of its best.pt, or of an adapter.pt and the checkpoint it started
    from, `backbone`."""
    path = Path(path)
    runs = [best.parent.name for best in path.glob("*/best.pt")]
    if runs:
        raise ValueError(f"{path} is a table's folder: name one of its runs, {', '.join(runs)}")
    if path.is_dir():
        path = path / "best.pt"
    if not path.exists():
        raise ValueError(f"no such file: {path} (expected a run's folder, or its best.pt)")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        cfg = as_config(saved["config"])
        classes = saved["classes"]
        encoder = saved_encoder(cfg, saved, path, backbone)
        head = make_head(cfg, encoder.embed_dim, classes, saved["trials"])
        head.load_state_dict(saved["head"])
        run = Run(cfg, Model(encoder, head).eval(), classes, saved["threshold"], saved)
    except ValueError:  # it has a clear message already
        raise
    except Exception as error:  # a wrong file can raise anything
        raise ValueError(f"{path} is no best.pt of this program, or damaged, or holds code, which "
                         f"is never run ({error!r:.99})") from error
    # What was trained in float32 stays in float32; else on_this_machine decides (None).
    bf16 = None if cfg.bf16 else False
    run.settings = on_this_machine(replace(cfg, device=device, bf16=bf16))
    run.model.to(run.settings.device)
    return run


def saved_encoder(cfg, saved, path, backbone):
    """Return the encoder of a best.pt or, with its backbone, of an adapter.pt."""
    if "adapter" not in saved:
        encoder = make_encoder(cfg, saved["settings"])
        # `adapt` noted the fingerprint of random weights; this is that of the real backbone.
        encoder.adaptation = saved["adaptation"]
        encoder.load_state_dict(saved["encoder"])
        return encoder
    if not backbone:
        raise ValueError(f"{path} holds an adapter alone: commands take best.pt; in Python say "
                         "backbone=, the checkpoint it started from (ast-nano: in cache/)")
    plain, _ = ast_adapters.load_pretrained(AST(**ast_settings(cfg)), backbone)
    return ast_adapters.load_adapter(plain, saved["adapter"])


# --------------------------------------------------------------------------------------------------
# 6. A run: its files, its corpus and model; train, select, test once


def save(path, value):
    """Write text or tensors, in the first process; kill -9 leaves the old file or the new one."""
    if RANK:
        return
    content = io.BytesIO()
    if isinstance(value, str):
        content.write(value.encode())
    else:
        torch.save(value, content)
    part = path.with_suffix(path.suffix + ".part")
    try:
        part.write_bytes(content.getbuffer())
        os.replace(part, path)
    except OSError as error:
        raise OSError(f"{part}: {error.strerror or error}") from error
    finally:
        part.unlink(missing_ok=True)  # what is left if the disk was full


def checkpoint(cfg, corpus, model, epoch, valid):
    """Return everything that using the model needs, no more: plain values and tensors."""
    return dict(
        config=asdict(cfg), classes=corpus.classes, trials=bool(corpus.trials), epoch=epoch,
        clips=training_clips(corpus),
        encoder=model.encoder.state_dict(), head=model.head.state_dict(),
        settings=getattr(model.encoder, "settings", {}),  # an AST's
        adaptation=getattr(model.encoder, "adaptation", {}), threshold=valid.get("threshold"))


def training_clips(corpus):
    """Return a hash of the names of the clips that train."""
    names = [corpus.ids[i] for i in corpus.pick("train")]
    return hashlib.sha256(json.dumps(names).encode()).hexdigest()


def save_last(out, model, optimiser, state):
    """Write the log, then last.pt: killed in between, the epoch is done again, to the same end."""
    save(out / "log.jsonl", "".join(json.dumps(line) + "\n" for line in state["log"]))
    save(out / "last.pt", dict(state, model=model.state_dict(), optimiser=optimiser.state_dict()))


def load_last(out, corpus, model, optimiser):
    """Load the weights of last.pt and return its state; without such a file, that of a new run."""
    if not (out / "last.pt").exists():
        return dict(epoch=0, best=-math.inf, seconds=0.0, log=[], corpus=corpus.fingerprint())
    saved = read_back(out / "last.pt")
    if saved["corpus"] != corpus.fingerprint():
        raise ValueError(f"{out} was begun on other clips: their list, splits or sound changed")
    model.load_state_dict(saved.pop("model"))
    optimiser.load_state_dict(saved.pop("optimiser"))
    return saved


def read_back(path):
    """Return what a file of a run holds, tensors or JSON; a sentence names one that is damaged."""
    try:
        if path.suffix == ".pt":
            return torch.load(path, map_location="cpu", weights_only=True)
        return json.loads(path.read_text(encoding="utf-8"))
    except Exception as error:  # what torch raises depends on what the file holds
        raise ValueError(f"{path} is damaged; delete it, and the same command makes it anew "
                         f"({error!r:.99})") from error


def run_folder(cfg, name, table=None):
    """Make the folder of a run and return it: --out, or out/ and the first free name. `table`: the
    labels of its rows, if it is for a table of runs. A run that is there is never overwritten."""
    out = Path(cfg.out or f"out/{name}")
    if not (cfg.out or cfg.resume):  # --resume without --out goes on in out/NAME
        taken = 1
        while on_first_rank(out.exists):
            taken += 1
            out = Path(f"out/{name}-{taken}")
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file: expected a folder, or a new name")
    # Only the first process looks: the others might find the file that it writes below.
    if not RANK and (out / "config.json").exists():
        saved = read_back(out / "config.json")
        theirs = asdict(with_recipe(as_config(saved))) | dict(table=saved.get("table"))
        mine = asdict(with_recipe(cfg)) | dict(table=table)
        changes = []
        for key, value in mine.items():
            # Compared as JSON, where a list and a tuple are the same: a file has no tuples.
            if key not in PLACES and json.dumps(theirs[key]) != json.dumps(value):
                changes.append(f"{key} {theirs[key]!r} -> {value!r}")
        if changes or not cfg.resume:
            raise ValueError(f"--out {out} holds a run already: give another name; or, for a "
                             "training, --resume goes on with it, in the same configuration "
                             f"({', '.join(changes) or 'nothing differs'})")
    out.mkdir(parents=True, exist_ok=True)
    save(out / "config.json", json.dumps(asdict(cfg) | dict(table=table), indent=1))
    return out


def run(cfg, position=""):
    """Train and test, unless that is done; return the results of results.json. `position` says
    where in a table it stands, as "2 of 3: conformer"."""
    cfg, corpus, augment_waves, model = prepare(cfg)
    out = run_folder(cfg, f"{cfg.data}-{cfg.name}")
    if cfg.resume and not position and not (out / "last.pt").exists():
        print(f"{out} holds no stopped run: training starts with epoch 1")
    if (out / "results.json").exists():
        print(f"{out} is finished already")
        results = read_back(out / "results.json")
    else:
        try:
            results = train_and_test(cfg, corpus, augment_waves, model, out, position)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(out) from None  # `main` says how to go on in this folder
    if cfg.figure:
        draw_log(out, cfg.figure)
    return results


def train_and_test(cfg, corpus, augment_waves, model, out, position):
    """Print what will be trained; train, test once, and return the results."""
    memory, expected = measure_step(cfg, corpus, model)
    trainable, total = ast_adapters.count(model.encoder)
    clips = {split: len(corpus.pick(split)) for split in ("train", "valid", "test")}
    plan = [f"\n{position or cfg.name}, about {expected:.0f} s",
            f"{cfg.name} on {cfg.data}: {len(corpus.classes)} classes, clips {clips}",
            f"trains {trainable:,} of {total:,} parameters and the head",
            f"seed {cfg.seed}, {cfg.device}, processes: {WORLD}, threads: "
            f"{torch.get_num_threads()}, torch {torch.__version__}",
            f"all settings: {out / 'config.json'}"]
    print("\n  ".join(plan + corpus.notes))
    seconds = fit(cfg, corpus, model, augment_waves, out)
    # A table prints those of these that COLUMNS names.
    results = test_once(cfg, corpus, out) | dict(
        trainable=trainable, parameters=total, share=100 * trainable / total,
        seconds=round(seconds, 2), epochs=cfg.epochs, seed=cfg.seed, fold=int(cfg.fold),
        memory_mb=memory, peak_mb=peak_memory(cfg.device))
    save(out / "results.json", json.dumps(results, indent=1))
    return results


def measure_step(cfg, corpus, model):
    """Return the MB of a training step, and the seconds that all steps will take."""
    clips = clips_a_step(cfg, corpus)
    # Of this process; at least two if there are, since BatchNorm is not yet synchronised.
    clips = max(min(2, clips), clips // WORLD)
    twin = copy.deepcopy(model)  # a step moves BatchNorm's means
    for _ in range(2):  # the first is slower than those that follow: the second counts
        start = time.perf_counter()
        memory = training_memory(twin, clips, cfg.frames, cfg.bf16)
        if cfg.device != "cpu":
            torch.accelerator.synchronize()  # a GPU is not ready when the call returns
        seconds = time.perf_counter() - start
    return memory, seconds * cfg.epochs * steps_an_epoch(cfg, corpus)


def peak_memory(device):
    """Return the most MB that this program has held, on the GPU if it trains there. Windows has no
    such count: None."""
    if device == "cuda":
        return round(torch.cuda.max_memory_allocated() / 2**20)
    if sys.platform == "win32":
        return None
    import resource
    unit = 2**20 if sys.platform == "darwin" else 2**10  # macOS counts bytes, Linux KB
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit)


def prepare(cfg):
    """Return what `fit` takes: settings with their recipe, corpus, augmentation, model."""
    cfg = on_this_machine(with_recipe(cfg))
    # The first process packs what is new. The others wait at this barrier until it comes to the one
    # below; then they find it packed.
    if RANK:
        dist.barrier()
    corpus = open_corpus(cfg)
    noise = data.open_sounds(cfg.noise, cfg.cache, cfg.skip_bad)
    rooms = data.open_sounds(cfg.reverb, cfg.cache, cfg.skip_bad)
    if WORLD > 1 and not RANK:
        dist.barrier()  # those that wait go on when the first one arrives here
    check_corpus(cfg, corpus)
    for sounds in (noise, rooms):
        corpus.notes += getattr(sounds, "notes", [])  # only a folder's sounds have notes
    augment_waves = partial(data.augment_waves, classes=len(corpus.classes), frames=cfg.frames,
                            speeds=cfg.speed_perturb, gain=cfg.gain, noise=noise, rooms=rooms,
                            share=cfg.distorted, snr=(min(cfg.snr), max(cfg.snr)))
    return cfg, corpus, augment_waves, build_model(cfg, corpus).to(cfg.device)


def open_corpus(cfg, train=True):
    """Return the corpus of --data. With train=False only its test clips will be used."""
    if cfg.fold == "all":
        raise ValueError("--fold all is for a table of trainings: here expected one number")
    return data.open_corpus(cfg.data, cfg.root, cache=cfg.cache, seed=cfg.seed,
                            fold=int(cfg.fold), few_shot=cfg.few_shot, skip_bad=cfg.skip_bad,
                            valid=cfg.valid, trials=cfg.trials, train=train)


def check_corpus(cfg, corpus):
    """Refuse settings that this corpus cannot follow."""
    lengths = corpus.length[corpus.pick("train")]
    longest = data.frames_of(lengths.max())
    if longest < cfg.frames / 10:  # clips may be padded, within reason
        raise ValueError(f"--frames {cfg.frames}: the longest training clip has {longest} frames")
    new_margin = cfg.margin != FIELDS["margin"].default
    for_speakers = cfg.speed_perturb or new_margin or cfg.margin_rise
    if for_speakers and not corpus.trials:
        raise ValueError("--speed-perturb, --margin and --margin-rise are for speakers: --data "
                         f"{cfg.data} has no trials")
    clips = clips_a_step(cfg, corpus)
    if clips % WORLD:  # a clip in a smaller part would weigh more than the others
        raise ValueError(f"{clips} clips a step do not divide among {WORLD} processes")
    check_batch(cfg, clips)


def test_once(cfg, corpus, out):
    """Test the best weights; write adapter.pt or scores.txt; return what was measured."""
    on_first_rank(lambda: None)  # all wait here until the first process has written best.pt
    best = load_run(out, device=cfg.device)
    model = best.model
    results = evaluate(cfg, corpus, model, "test", threshold=best.threshold)
    print(f"tested once, with the weights of epoch {best.saved['epoch']}: {numbers(results)}")
    if corpus.trials:
        rows = zip(corpus.trials["test"], results.pop("scores"))
        save(out / "scores.txt", "".join(f"{corpus.ids[a]} {corpus.ids[b]} {score:.6f} {label}\n"
                                         for (label, a, b), score in rows))
    else:
        results["chance"] = 100 / len(corpus.classes)
    if cfg.speaker:
        return results | lightweight_sv.complexity(model.encoder, cfg.frames)
    saved = dict(best.saved, adapter=ast_adapters.adapter_state(model.encoder))
    del saved["encoder"], saved["adaptation"]  # in their place: what was trained, and how
    save(out / "adapter.pt", saved)
    size = on_first_rank(lambda: (out / "adapter.pt").stat().st_size)
    return results | dict(adapter_kb=round(size / 1024))


PERCENT = ("accuracy", "content", "order", "eer", "miss", "false_alarm")


def numbers(values):
    """Return "accuracy 83.3 %  content 91.2 %  ..." for a person; the files have every digit."""
    told = []
    for name, value in values.items():
        unit = " %" if name in PERCENT else ""
        if name not in ("score", "scores"):
            told.append(f"{name} {value:.4g}{unit}")
    return "  ".join(told)


def draw_log(out, figure):
    """Draw loss and validation score of each epoch."""
    path = out / "log.jsonl"
    try:
        log = [json.loads(line) for line in path.read_text().splitlines()]
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    with data.figure(figure, 2) as axes:
        for axis, key, name in zip(axes, ("loss", "valid"), ("loss", "validation score, %")):
            # An older log may lack a key: None becomes nan, which is not drawn.
            values = np.array([line.get(key) for line in log], float)
            axis.plot(range(1, len(log) + 1), values, "o-")
            axis.set(xlabel="epoch", ylabel=name)


# --------------------------------------------------------------------------------------------------
# 7. Tables of runs: methods, values, folds, seeds

COLUMNS = {  # key of the results: (title, digits behind the point)
    "accuracy": ("accuracy %", 2), "content": ("content %", 2), "order": ("order %", 2),
    "eer": ("EER %", 2), "min_dcf_0.01": ("minDCF 0.01", 3), "min_dcf_0.05": ("minDCF 0.05", 3),
    "trainable": ("trainable", 0), "share": ("share %", 2), "macs": ("MACs", 0),
    "latency_ms": ("latency ms", 1), "seconds": ("seconds", 1), "memory_mb": ("memory MB", 1),
    "peak_mb": ("peak MB", 0), "adapter_kb": ("adapter KB", 0)}
MEMORY = ("memory: what a training step keeps for its backward pass, gradients, AdamW's moments; "
          "peak: all that this program has held so far")


def table_rows(cfg, typed, values):
    """Return {label: Config}, a row for each value of FIELD=v1,v2,... A value is read as if typed
    behind `train`: so it has the same type, and is refused with the same sentence."""
    field_name, equals, texts = values.partition("=")
    if not equals:
        raise ValueError(f"sweep {values}: expected FIELD=v1,v2,..., such as rank=1,4,16")
    name = field_name.replace("_", "-")
    if name in ("data", "root", "fold", "seeds", "out", "resume", "download", "figure"):
        raise ValueError(f"sweep {name}: it is for the whole table, so type --{name}")
    switches = {"true": f"--{name}", "false": f"--no-{name}"}  # how a bool is typed
    rows = {}
    for text in texts.split(","):
        _, swept, _ = parse(["train", switches.get(text, f"--{name}={text}")])
        rows[text if name == "method" else f"{name}={text}"] = replace(cfg, **swept)
    options = {option for row in rows.values() for option in METHODS[row.method][1]}
    for row in rows.values():
        # A typed option that this row's method lacks is meant for other rows of the table, and is
        # not refused here. The swept field must fit every row.
        of_others = options - set(METHODS[row.method][1])
        check_training(row, (typed - of_others) | {field_name.replace("-", "_")})
    return rows


def study(cfg, title, rows):
    """Do one run, or fill a table and return it: each row in all folds and with all seeds."""
    folds = [cfg.fold]
    if cfg.fold == "all":
        folds = [str(n + 1) for n in range(data.CORPORA[cfg.data].folds)]
    # The last part runs fastest: all seeds of a fold, all folds of a row, then the next row.
    plan = list(itertools.product(rows, folds, range(cfg.seeds)))
    if len(plan) == 1:
        [row] = rows.values()
        run(row)
        return
    folder = run_folder(cfg, title, list(rows))
    table = {label: [] for label in rows}  # label: results of its runs
    for number, (label, fold, n) in enumerate(plan, 1):
        seed = rows[label].seed + n
        name = label
        if len(folds) > 1:
            name += f"-fold{fold}"
        if cfg.seeds > 1:
            name += f"-seed{seed}"
        out = folder / re.sub(r'[<>:"/\\|?*]', "_", name)  # Windows refuses these in names
        # resume: in a table that goes on, finished rows are only read.
        row = replace(rows[label], fold=fold, seed=seed, out=str(out), resume=True, figure="")
        try:
            table[label].append(run(row, f"{number} of {len(plan)}: {name}"))
        except KeyboardInterrupt:
            raise KeyboardInterrupt(folder) from None  # go on in the table's, not in the run's
    save(folder / "compare.json", json.dumps(table, indent=1))
    save(folder / "compare.md", markdown(table))
    print(f"\n{markdown(table)}\n{MEMORY}\n{folder}")
    if cfg.figure:
        models = sorted({row.model for row in rows.values()})
        draw_table(table, cfg.figure, f"{', '.join(models)} on {cfg.data}")
    return table


def mean_and_deviation(values, digits):
    """Return "93.12 ± 1.04"; of equal values the mean alone, of none nothing."""
    if not values:
        return ""
    mean = f"{np.mean(values):,.{digits}f}"
    if len(set(values)) == 1:
        return mean
    return f"{mean} ± {np.std(values, ddof=1):.{digits}f}"


def markdown(table):
    """Return {label: results} as a table for a README."""
    columns = [["", *table]]  # cells from the top down
    for key, (title, digits) in COLUMNS.items():
        cells = []
        for results in table.values():
            values = [r[key] for r in results if r.get(key) is not None]
            cells.append(mean_and_deviation(values, digits))
        if any(cells):
            columns.append([title, *cells])
    for column in columns:  # all its cells get one width, and a rule below the title
        width = max(map(len, column))
        column.insert(1, "-" * (width - 1) + ":")
        column[:] = [cell.rjust(width) for cell in column]
    return "".join("| " + " | ".join(row) + " |\n" for row in zip(*columns))


def draw_table(table, path, title):
    """Draw the score of each row over the number in its label ("rank=4"), if all labels have one,
    else over its trainable parameters."""
    first_results = [results[0] for results in table.values()]
    key = "eer" if "eer" in first_results[0] else "accuracy"
    labels = list(table)
    x_label = labels[0].partition("=")[0]
    swept = True
    try:
        x = [float(label.partition("=")[2]) for label in labels]
    except ValueError:  # a label without a number
        swept = False
        x = [result.get("trainable") for result in first_results]
        x_label = "trainable parameters, without the head"
    scores = [[result[key] for result in results] for results in table.values()]
    y = [np.mean(values) for values in scores]
    # Of one run there is no deviation: 0. Of more, n - 1 as in the table.
    deviations = [np.std(values, ddof=min(1, len(values) - 1)) for values in scores]
    with data.figure(path) as axes:
        axes.errorbar(x, y, deviations, fmt="o-" if swept else "o", capsize=3)
        axes.set(ylabel=COLUMNS[key][0], title=title, xlabel=x_label)
        if 0 < 8 * min(x) < max(x):  # positive and far apart
            axes.set_xscale("log")
        if swept:
            axes.set_xticks(x, [f"{value:g}" for value in x])
            axes.minorticks_off()
        if "full" in table:
            axes.axhline(y[labels.index("full")], color="grey", linestyle="--", label="full")
        if "chance" in first_results[0]:
            axes.axhline(first_results[0]["chance"], color="grey", linestyle=":", label="chance")
        if "full" in table or "chance" in first_results[0]:
            axes.legend()
        if not swept:
            # Names stand in a column beside the frame, ordered by score: so no two names meet.
            for n, i in enumerate(np.argsort(y)):
                axes.annotate(labels[i], (x[i], y[i]), (1.03, (n + 0.5) / len(y)), fontsize=8,
                              textcoords="axes fraction", va="center",
                              arrowprops=dict(arrowstyle="-", color="lightgrey"))


# --------------------------------------------------------------------------------------------------
# 8. Using a run: from a script of one's own, or by commands. A command gets a Config, the names of
# the fields that were typed, and {name: value} of its own arguments. It may return a complaint.


def corpus_of(sound, rate):
    """Return a corpus of one sound: a path; or samples, (n,) or (channels, n), and their rate."""
    if isinstance(sound, (str, os.PathLike)):
        corpus = data.corpus_of_files([sound])
    else:
        corpus = data.corpus_of_waves({"the array": (np.asarray(sound), rate)})
    if corpus.bad:
        raise ValueError("\n".join(corpus.bad))
    return corpus


def classify(run, sound, rate=None):
    """Return [(class, chance)] of a file or an array, the likeliest first."""
    return likeliest(run, corpus_of(sound, rate))[0]


def embed(run, sound, rate=None):
    """Return the unit embedding (E,) of a file or an array."""
    return embed_all(run, corpus_of(sound, rate))[0]


def likeliest(run, corpus):
    """Return [(class, chance)] of each clip, the likeliest first."""
    clips = np.arange(len(corpus.ids))
    chances = class_probabilities(run.settings, corpus, run.model, clips, run.settings.frames)
    # A speaker at three speeds is three classes of the head: their chances are added.
    chances = chances.unflatten(1, (-1, len(run.classes)))  # (clips, speeds, C)
    chances = chances.sum(1)  # (clips, C)
    ranked = []
    for row in chances.tolist():
        ranked.append(sorted(zip(run.classes, row), key=lambda pair: -pair[1]))
    return ranked


def embed_all(run, corpus):
    """Return the unit embeddings (clips, E)."""
    return embeddings(run.settings, corpus, run.model, np.arange(len(corpus.ids)))


def open_files(paths):
    """Return audio files as a corpus, and print its notes, as on files that are left out."""
    corpus = data.corpus_of_files(paths)
    for note in corpus.notes:
        print(f"note: {note}")
    return corpus


def evaluate_run(cfg, typed, own):
    """Test a run on its corpus, on another of equal classes, or on any trials."""
    path = own["run"]
    run = load_run(path, device=cfg.device)
    changes = {name: getattr(cfg, name) for name in typed - {"device"}}  # load_run has set it
    tested = on_this_machine(replace(run.settings, **changes))
    check(tested, typed)
    another = "data" in typed  # another corpus than that of the run: it only tests
    corpus = open_corpus(tested, train=not another)
    for note in corpus.notes:
        print(f"  {note}")
    # A run of an older version has not noted its clips.
    if not another and run.saved.get("clips") not in (None, training_clips(corpus)):
        raise ValueError(f"{path} trained on other clips: its folder has changed since, or another "
                         "fold or list is named; so clips that trained it might test it now. A "
                         "corpus that is new to it is named by --data too")
    any_speakers = run.saved["trials"] and corpus.trials  # embeddings need no equal classes
    if not any_speakers and corpus.classes != run.classes:
        raise ValueError(f"{path} knows {len(run.classes)} classes, --data {tested.data} has "
                         f"{len(corpus.classes)}, or others: they must be equal")
    if (cfg.figure or own["as_norm"]) and not corpus.trials:
        raise ValueError(f"--figure, --as-norm: --data {tested.data} has no trials, but classes")
    strangers = None
    if own["as_norm"]:  # of the corpus that trained the model, also if another one tests it
        trained = open_corpus(run.settings) if another else corpus
        strangers = cohort(run.settings, trained, run.model)
    table = {}
    for seconds in own["durations"]:
        frames = round(100 * seconds) if seconds else None
        title = f"{seconds:g} s" if seconds else "full"
        results = evaluate(tested, corpus, run.model, "test", frames, run.threshold, strangers)
        print(f"  {title:>6}  {numbers(results)}")
        if seconds:
            table[f"seconds={seconds:g}"] = [results]
    if cfg.figure and table:
        draw_table(table, cfg.figure, f"{path} on {tested.data}")
    elif cfg.figure:  # of whole utterances: how one error falls as the other rises
        with data.figure(cfg.figure, size=(5, 5)) as axes:
            lightweight_sv.draw_det(axes, results["scores"], [t[0] for t in corpus.trials["test"]])


def predict_files(cfg, typed, own):
    """Name the three likeliest classes of each file; those that cannot be read are named too."""
    if own["csv"]:
        table = Path(own["csv"])
        sound = table.suffix[1:].lower() in data.AUDIO  # which it would overwrite
        if sound or table.is_dir() or not table.parent.is_dir():
            raise ValueError(f"--csv {table}: expected a file for a table, in a folder that is "
                             "there")
    run = load_run(own["run"], device=cfg.device)
    if cfg.figure and run.settings.speaker:
        raise ValueError(f"--figure draws an AST's attention; {own['run']} holds no AST")
    corpus = open_files(own["files"])
    ranked = likeliest(run, corpus) if corpus.ids else []  # no file could be read
    rows = []
    for file, classes in zip(corpus.ids, ranked):
        row = [file]
        for name, chance in classes[:3]:
            row += [name, f"{chance:.4f}"]
        print(*row, sep="  ")
        rows.append(row)
    if own["csv"] and not RANK:
        with open(own["csv"], "w", newline="", encoding="utf-8") as file:
            header = ["file", "class", "chance", "class2", "chance2", "class3", "chance3"]
            csv.writer(file).writerows([header, *rows])
    if cfg.figure and rows:
        first = np.array([0])  # of the first file
        batch = data.load_batch(corpus, first, run.settings.frames)
        x = data.features(batch.to(run.settings.device), run.model.encoder)  # (1, T, F)
        with data.figure(cfg.figure, 2) as axes:
            ast_adapters.draw_attention(axes, run.model.encoder, x, corpus.ids[0])
    return "\n".join(corpus.bad)


def verify_files(cfg, typed, own):
    """Is the last of these files the speaker of the others?"""
    run = load_run(own["run"], device=cfg.device)
    if not run.saved["trials"]:
        raise ValueError(f"verify: {own['run']} learned classes, not speakers; try predict")
    corpus = open_files(own["files"])
    if corpus.bad or len(corpus.ids) < 2:
        expected = "verify: expected two readable files or more, the last of them to be judged"
        raise ValueError("\n".join([*corpus.bad, expected]))
    unit = embed_all(run, corpus)  # (files, E)
    # Several recordings of a speaker are one point: the mean of their embeddings.
    speaker = F.normalize(unit[:-1].mean(0), dim=0)  # (E,): of all files but the last
    score = float(speaker @ unit[-1])
    if run.threshold is None:
        print(f"score {score:.4f}, no threshold: no validation trials")
    else:
        verdict = "same" if score >= run.threshold else "different"
        print(f"score {score:.4f}, threshold {run.threshold:.4f}: {verdict} speaker")


def embed_files(cfg, typed, own):
    """Write the embeddings of the files, and their names."""
    run = load_run(own["run"], device=cfg.device)
    corpus = open_files(own["files"])
    if corpus.ids:
        unit = embed_all(run, corpus)
        out = run_folder(replace(run.settings, out=cfg.out, resume=False), "embeddings")
        save(out / "names.txt", "".join(f"{file}\n" for file in corpus.ids))
        on_first_rank(lambda: np.save(out / "embeddings.npy", unit.numpy()))
        print(f"{out}: embeddings.npy {tuple(unit.shape)}, of unit length; names.txt")
    return "\n".join(corpus.bad)


# --------------------------------------------------------------------------------------------------
# 9. The machine: its memory and device, the processes that torchrun starts, where the time goes


def keep_freed_memory():
    """Tell Linux' malloc to keep the memory of freed tensors for the next step. It would return
    large blocks to the system and fetch them again: a light ResNet34 then needs 1.33 x the time."""
    if sys.platform == "linux" and hasattr(ctypes.CDLL(None), "mallopt"):
        libc = ctypes.CDLL(None)
        libc.mallopt(-4, 0)  # M_MMAP_MAX: no block comes straight from the system
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: nor goes back to it


def on_this_machine(cfg):
    """Fill in the device, and bf16 if it is None: yes where bfloat16 is fast and known to work, so
    not on a Mac's GPU. Of several processes each has the GPU of its number."""
    # A Mac's GPU ("mps") trains in one process: torch cannot join several there.
    if cfg.device == "cpu" or not ACCELERATOR or (WORLD > 1 and ACCELERATOR.type == "mps"):
        device = "cpu"
        able = torch.cpu.get_capabilities()
        fast = able.get("avx512_bf16", False) or able.get("amx_bf16", False)
        if cfg.bf16 and not fast:
            print("--bf16: this CPU has no bfloat16; emulated, a step takes about 8 times as long")
    else:
        device = ACCELERATOR.type
        fast = device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        if cfg.bf16 and not fast:
            raise ValueError(f"--bf16: {device} has no bfloat16 that is known to work")
        torch.accelerator.set_device_index(int(os.environ.get("LOCAL_RANK", -1)))  # -1: as is
    return replace(cfg, device=device, bf16=fast if cfg.bf16 is None else cfg.bf16)


def parallel_model(cfg, model):
    """Return what the loop calls: the model, compiled if asked, with gradients that are the mean
    over all processes. It trains the weights of `model`, which evaluation and files use."""
    if WORLD > 1 and cfg.device == "cuda":  # on CPUs each process has its own BatchNorm
        nn.SyncBatchNorm.convert_sync_batchnorm(model)  # it changes the layers inside `model`
    forward = torch.compile(model) if cfg.compile else model
    return nn.parallel.DistributedDataParallel(forward) if WORLD > 1 else forward


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


PHASES = ("data", "augmentation", "features", "forward", "backward", "optimiser")


def profile(cfg, typed, own):
    """Print where the time of a training step goes; with --figure trace.json, all for a browser."""
    check_training(cfg, typed)
    cfg, corpus, augment_waves, model = prepare(replace(cfg, steps=10, epochs=1))
    activities = [torch.profiler.ProfilerActivity.CPU]
    if cfg.device == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    profiler = torch.profiler.profile(activities=activities, acc_events=True)
    # Two folders: in the first one `fit` would find that it has trained already.
    with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
        fit(cfg, corpus, model, augment_waves, Path(first))  # warms up
        with profiler:
            fit(cfg, corpus, model, augment_waves, Path(second))
    clips = clips_a_step(cfg, corpus) // WORLD  # of this process
    steps = steps_an_epoch(cfg, corpus)
    spent = dict.fromkeys(PHASES, 0.0)  # ms in a step
    for event in profiler.key_averages():
        if event.key in spent:
            # With a GPU each phase is there twice, with the GPU's time and the CPU's: the larger
            # counts.
            taken = max(event.cpu_time_total, event.device_time_total) / 1000 / steps  # us -> ms
            spent[event.key] = max(spent[event.key], taken)
    step = sum(spent.values())
    # The least that a step could take: all its products at the speed of one large matrix product,
    # which has n³ of them.
    n = 2048
    matrix = torch.randn(n, n, device=cfg.device, dtype=torch.bfloat16 if cfg.bf16 else None)
    product = lambda: (matrix @ matrix)[0, 0].item()  # .item() waits for the GPU
    times = timeit.repeat(product, number=1, repeat=7)  # seconds
    with FlopCounterMode(display=False) as counter:
        memory = training_memory(model, clips, cfg.frames, cfg.bf16)
    products = counter.get_total_flops() / 2  # it counts a product and its addition as two
    floor = 1000 * np.median(times) * products / n**3  # ms
    for phase, ms in [*spent.items(), ("a step", step), ("its products alone", floor)]:
        print(f"{ms:9.2f} ms {ms / step:6.1%}  {phase}")
    print(f"{1000 * clips / step:.1f} clips a second; memory {memory} MB, peak "
          f"{peak_memory(cfg.device)} MB\n{MEMORY}")
    if cfg.figure:
        profiler.export_chrome_trace(cfg.figure)


# --------------------------------------------------------------------------------------------------
# 10. Commands: `train` is meant where none is typed

CLOSING_WORDS = """
What you see: `order` counts sounds that differ only in the order of their two parts. Who does not
hear the order guesses between two of them: 50 %, or some points more by luck.
  60 % or more, hears the order: {hears}
  less than 60 %: {deaf}
`linear` trains only a last layer, `conformer` an adapter with a convolution in time, `full` all.
Try next: python train.py sweep rank=1,4,16 --method lora --lr 0.01"""
TASK = {"data", "model", "method", "init", *METHOD_OPTIONS}


def closing_words(table):
    """Return what the table of the quick start shows, and what to try next."""
    hears = []
    deaf = []
    for name, results in table.items():
        order = np.mean([result["order"] for result in results])
        if order >= 60:
            hears.append(name)
        else:
            deaf.append(name)
    return CLOSING_WORDS.format(hears=", ".join(hears) or "none", deaf=", ".join(deaf) or "none")


def train(cfg, typed, own):
    """Train a model; with nothing typed, do the quick start."""
    check_training(cfg, typed)
    # `python train.py --epochs 2` is the quick start too: it names no command and no task.
    if own["bare"] and not typed & TASK:
        table = study(cfg, "quick-start", table_rows(cfg, typed, "method=linear,conformer,full"))
        print(closing_words(table))
    else:
        study(cfg, f"{cfg.data}-{cfg.name}", {cfg.name: cfg})


def compare(cfg, typed, own):
    """Train every method on the same data, for one table."""
    if cfg.speaker:
        raise ValueError(f"compare: {cfg.model} has no methods, being no AST; try sweep")
    study(cfg, f"compare-{cfg.data}", table_rows(cfg, typed, "method=" + ",".join(METHODS)))


def sweep(cfg, typed, own):
    """Train once for each value of a setting, for one table."""
    study(cfg, f"sweep-{cfg.data}", table_rows(cfg, typed, own["values"]))


def duration(text):
    """A duration that is typed: seconds, or None for "full"."""
    if text == "full":
        return None
    value = float(text)
    if not 0.16 <= value < 1e6:  # 16 frames: a patch of an AST
        raise argparse.ArgumentTypeError(f"{text}: expected seconds, at least 0.16, or full")
    return value


RUN = ("run", dict(metavar="RUN", help="a run's folder, or its best.pt"))
FILES = ("files", dict(metavar="FILE", nargs="+", help="sound files, or folders of them"))
DURATIONS = ("--durations", dict(type=duration, nargs="+", default=[None], metavar="SECONDS",
                                 help="of a test recording; full: all of it, for classes windows "
                                 "as long as in training (default: full)"))
AS_NORM = ("--as-norm", dict(action="store_true", help="adaptive s-norm: each score is compared "
                             "with those of strangers, the training speakers"))
VALUES = ("values", dict(metavar="FIELD=v1,v2,...", help="a setting and its values"))
CSV = ("--csv", dict(default="", help="write the predictions to this file too"))
TESTED = ("data", "root", "cache", "fold", "trials", "skip_bad", "bf16", "device", "figure")
COMMANDS = {  # name: (function, example, its own arguments, the fields of Config that it reads)
    "train": (train, "--data fsdd --root DIR --method lora --rank 4", [], FIELDS),
    "compare": (compare, "--data fsdd --root DIR --seeds 3", [], FIELDS.keys() - {"method"}),
    "sweep": (sweep, "rank=1,4,16 --method lora", [VALUES], FIELDS),
    "profile": (profile, "--model ast-base --init none --method lora", [],
                FIELDS.keys() - {"epochs", "steps", "seeds", "out", "resume"}),
    "evaluate": (evaluate_run, "out/RUN --durations 1 2 3 full", [RUN, DURATIONS, AS_NORM], TESTED),
    "predict": (predict_files, "out/RUN a.wav DIR", [RUN, FILES, CSV], ("device", "figure")),
    "verify": (verify_files, "out/RUN mine1.wav mine2.wav whose.wav", [RUN, FILES], ("device",)),
    "embed": (embed_files, "out/RUN DIR", [RUN, FILES], ("device", "out"))}


def add_field(parser, f, command):
    """Add the flag of a field of Config; --help says its default, or who decides it."""
    rules = dict(type=f.type, choices=f.metadata.get("choices"))
    if f.type is bool:
        rules = dict(action=argparse.BooleanOptionalAction)
    elif f.type is tuple:
        rules = dict(type=f.metadata["item"], nargs="+")
    words = {"None": "the recipe's", "": "none", "True": "yes", "False": "no"}
    shown = words.get(str(f.default), f.default)  # what --help prints as the default
    if f.name in METHOD_OPTIONS:
        shown = "the method's"
    shown = f.metadata.get("shown", shown)
    if command == "evaluate" and f.name not in ("device", "figure"):
        shown = "the run's"
    parser.add_argument("--" + f.name.replace("_", "-"), **rules, default=argparse.SUPPRESS,
                        help=f"{f.metadata['help']} (default: {shown})")


def parse(argv):
    """Return the command, {field of Config: value} of what is typed, and {name: value} of the
    command's own arguments, with "bare": no command was typed, so `train` is meant."""
    bare = not argv or argv[0].startswith("-")
    if bare:
        argv = ["train", *argv]
    command, *rest = argv
    if command not in COMMANDS:
        raise ValueError(f"unknown command {command!r}{nearest(command, COMMANDS)}; the commands "
                         f"are {', '.join(COMMANDS)}")
    function, example, arguments, names = COMMANDS[command]
    parser = argparse.ArgumentParser(
        description=function.__doc__, usage=f"python train.py {command} ...", allow_abbrev=False,
        epilog=f"example: python train.py {command} {example}")
    for name, rules in arguments:
        parser.add_argument(name, **rules)
    for f in fields(Config):
        if "group" in f.metadata:  # one that stays empty is not printed
            group = parser.add_argument_group(f.metadata["group"])
        if f.name in names:
            add_field(group, f, command)
    # argparse refuses a wrong value itself; of a flag that it does not know we name the nearest.
    found, unknown = parser.parse_known_args(rest)
    values = vars(found)  # of the fields only what is typed: their default is SUPPRESS
    if unknown:
        flags = ["--" + name.replace("_", "-") for name in sorted(values.keys() | names)]
        hint = nearest(unknown[0].partition("=")[0], [*flags, *COMMANDS])
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
    typed = {name: value for name, value in values.items() if name in names}
    own = {name: value for name, value in values.items() if name not in names}
    return command, typed, dict(own, bare=bare)


def nearest(word, known):
    """Return " (did you mean ...?)" if something known is near."""
    near = difflib.get_close_matches(word, known, 3, 0.7)  # at most 3, at least 70 % alike
    return f" (did you mean {' or '.join(near)}?)" if near else ""


def check_fields():
    """Check that each option of a method or of a speaker model is a field of Config, so a flag."""
    hosts = [name for model in lightweight_sv.MODELS for name in host_options(model)]
    missing = {*METHOD_OPTIONS, *hosts} - FIELDS.keys()
    if missing:
        raise ValueError(f"METHODS or MODELS has an option {min(missing)!r} that is no flag: add a "
                         "field of this name to Config")


def main(argv=None):
    argv = sys.argv[1:] if argv is None else argv
    keep_freed_memory()
    for stream in (sys.stdout, sys.stderr):
        # A letter that this terminal cannot show is printed as a number, and is no error.
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    if argv in (["-h"], ["--help"]):
        print(__doc__.partition("\n\nSections")[0], "\n\ncommands, each with --help:")
        for name, (function, *_) in COMMANDS.items():
            print(f"    {name:10s} {function.__doc__}")
        return
    try:
        check_fields()
        command, typed, own = parse(argv)
        cfg = Config(**typed)
        if WORLD > 1:  # torchrun started this; a process that dies ends the others at once
            backend = "gloo"  # for tensors on CPUs; nccl, for those on GPUs, is not on Windows
            if torch.cuda.is_available() and dist.is_nccl_available():
                backend = "cpu:gloo,cuda:nccl"
            # A long time, since the others wait while the first process packs a corpus.
            dist.init_process_group(backend, timeout=timedelta(days=1))
        if RANK:  # the first process alone prints and draws; `save` writes in it alone
            sys.stdout = open(os.devnull, "w")
            cfg = replace(cfg, figure="")
        if command == "profile":
            fine = cfg.figure.endswith(".json") and Path(cfg.figure).parent.is_dir()
            if cfg.figure and not fine:
                raise ValueError(f"profile --figure {cfg.figure}: expected a name that ends in "
                                 ".json, in a folder that is there")
        elif cfg.figure:
            data.check_figure(cfg.figure)
        if cfg.download:
            on_first_rank(lambda: data.download_corpus(cfg.data, cfg.root, cfg.cache))
        function = COMMANDS[command][0]
        complaint = function(cfg, typed.keys(), own)  # files that could not be read
    except (ValueError, OSError) as error:
        where = f" in process {RANK}" if RANK else ""
        sys.exit(f"error{where}: {error}")
    except KeyboardInterrupt as stop:  # its argument: the folder of a run that had begun
        if stop.args and Path(stop.args[0]).exists():  # that of the nano AST is temporary
            sys.exit(f"stopped; the same command with --resume --out {stop} goes on")
        sys.exit("stopped")
    if complaint:
        sys.exit(complaint)


if __name__ == "__main__":
    main()
