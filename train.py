"""Train, compare, test and use every model of this project: one Config, one loop.

    python train.py                     # quick start: a nano AST learns new sounds, offline
    python train.py --compare           # every method on the same data, one table
    python train.py --data fsdd --root DIR --method lora --rank 4
    python train.py --model ecapa-tdnn --subsets 4 --data features --root DIR
    python train.py --evaluate out/RUN/best.pt
    python train.py --predict a.wav DIR --checkpoint out/RUN/best.pt
    torchrun --nproc_per_node=2 train.py ...            # the same loop in several processes

Sections  1 settings, 2 the loop, 3 evaluation, 4 the model, 5 a run and its files, 6 tables of
          runs, 7 using a checkpoint, 8 the machine, 9 the command line
Axes      B batch, T frames, F mel bins, D width, E embedding, C classes or speakers

Differs from P1's code: validation selects, the test split is scored once, with a copy of the best
weights; scales, biases and norms have no weight decay, which would shrink scales that start at one.
Does not: split one model over several GPUs, search hyper-parameters, or log to a service.
"""

import argparse
import csv
import ctypes
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

# Threads that wait for each other spin, and so take the cores from other programs: beside one, a
# nano step took 400 ms instead of 25. Let them spin shortly, then sleep (GNU; Intel and LLVM).
os.environ.setdefault("GOMP_SPINCOUNT", "1000")
os.environ.setdefault("KMP_BLOCKTIME", "1")
# glibc gives big blocks back to the system at once and gets new ones, page by page, at each step:
# with these two (M_MMAP_MAX, M_TRIM_THRESHOLD) a light ResNet34's step takes 0.75 of the time.
if sys.platform == "linux":
    for option, value in ((-4, 0), (-1, 2**31 - 1)):
        ctypes.CDLL(None).mallopt(option, value)

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import ast_adapters
import data
import lightweight_sv
from ast_adapters import AST, METHODS, LinearHead, Model, adapt, training_memory

RANK = int(os.environ.get("RANK", 0))  # the number of this process; torchrun sets both
WORLD = int(os.environ.get("WORLD_SIZE", 1))  # how many there are
# tqdm's None shows a bar in a terminal and nothing in a file; only the first process shows one.
progress = partial(tqdm, leave=False, disable=True if RANK else None)

# --------------------------------------------------------------------------------------------------
# 1. Settings: one Config is their only source; `--help` prints the comments behind its fields

MODELS = [f"ast-{size}" for size in ast_adapters.SIZES] + list(lightweight_sv.MODELS)
ACCELERATOR = torch.accelerator.current_accelerator(check_available=True)  # None: only a CPU
DEVICES = ["auto", "cpu"] + ([ACCELERATOR.type] if ACCELERATOR else [])
FOLDS = ("all", *map(str, range(1, 11)))
METHOD_OPTIONS = sorted({name for _, options in METHODS.values() for name in options})
SPEAKER_OPTIONS = ("subsets", "share", "fusion", "width", "embed_dim")
MODES = ("compare", "sweep", "profile", "evaluate", "predict", "verify", "embed")  # or: train
RUNS = ("train", "compare", "sweep")
TRAINING, TEST, ANY = (*RUNS, "profile"), (*RUNS, "profile", "evaluate"), ("train", *MODES)


def opt(default, **rules):
    """A field of Config with rules for what is typed: `choices`, `least`, `most`, `item` (type in a
    list), `modes` that read it (else TRAINING), the kind of `model` that reads it, `needs` (one of
    these flags), `corpus` (what that must have), `passing` (may differ when a run goes on)."""
    return field(default=default, metadata=rules)


@dataclass(frozen=True)
class Config:
    """Every setting of a run. None: the preset of method and corpus, or the model, decides. The
    comment behind a field is its help: a field without one is no flag."""

    # What to train: the model, and whether one run or a table of runs
    model: str = opt("ast-nano", choices=MODELS)  # the encoder
    method: str = opt("conformer", choices=METHODS, model="ast")  # how to adapt an AST
    init: str = ""  # start from this checkpoint, audioset, audioset-16 or none; empty: our nano
    compare: bool = opt(False, model="ast")  # run every method and print one table
    sweep: str = ""  # FIELD=v1,v2,...: one run a value, one table
    profile: bool = False  # print where the time of a training step goes; nothing is written
    seeds: int = opt(1, least=1, modes=RUNS, passing=True)  # so many runs: mean and deviation
    out: str = opt("", modes=(*RUNS, "embed"), passing=True)  # folder; empty: out/ and a name
    resume: bool = opt(False, modes=RUNS, passing=True)  # go on where the run in --out stopped
    # Data: needed for every corpus but the built-in sounds
    data: str = opt("sounds", choices=data.CORPORA, modes=TEST)  # the corpus
    root: str = opt("", modes=TEST, passing=True)  # folder of the corpus
    download: bool = opt(False, passing=True)  # bring it to --root first, where that is free
    cache: str = opt("cache", modes=TEST, passing=True)  # for packed corpora and the nano AST
    fold: str = opt(None, choices=FOLDS, modes=TEST, corpus="folds")  # the one that tests
    valid: bool = True  # select the best epoch on validation clips; else these train too
    trials: str = opt("o", choices=("o", "e", "h"), modes=TEST, corpus="lists")  # VoxCeleb's list
    few_shot: int = opt(0, least=0)  # train on so many clips a class, drawn by the seed; 0: all
    skip_bad: bool = opt(False, modes=TEST)  # go on without clips that cannot be read
    # Training: leave these out to get the paper's recipe, or ours
    epochs: int = opt(None, least=1)  # passes over the training clips
    steps: int = opt(None, least=1)  # end every epoch after so many batches, not after all clips
    batch_size: int = opt(None, least=1)  # clips a step, over all processes
    lr: float = opt(None, least=0, most=10)  # highest learning rate
    warmup: float = opt(None, least=0, most=0.9)  # share of the steps in which the rate rises
    weight_decay: float = opt(None, least=0)  # AdamW's, of matrices and kernels
    frames: int = opt(None, least=16)  # length of a training segment, in frames of 10 ms
    seed: int = opt(0, least=0)  # of weights, order, crops and drawn splits
    # Augmentation of training clips: against learning them by heart
    spec_f: int = opt(None, least=0)  # SpecAugment: widest mask, in mel bins
    spec_t: int = opt(None, least=0)  # SpecAugment: widest mask, in frames
    shift: int = opt(None, least=0)  # roll by up to so many frames
    gain: float = opt(None, least=0, most=60, model="ast", corpus="rows")  # up to so many dB
    speed_perturb: bool = opt(False, corpus="rows")  # play x1, x0.9 and x1.1, as other speakers
    noise: str = opt("", corpus="rows")  # a folder of noises, such as MUSAN's, or generated
    reverb: str = opt("", corpus="rows")  # a folder of impulse responses of rooms, or generated
    distorted: float = opt(0.6, least=0, most=1, needs="noise reverb")  # share of clips with either
    snr: list = opt((0.0, 15.0), item=float, needs="noise")  # signal-to-noise ratio in dB: from, to
    # Options of AST and its methods: for ablations
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
    # Speaker models: how light, and how hard the training task
    subsets: int = opt(1, least=1, model="speaker")  # feature subsets S; 1 is the plain host
    share: bool = opt(False, model="speaker")  # one set of weights for all subsets
    fusion: str = opt("module", choices=lightweight_sv.FUSIONS, model="speaker")  # between subsets
    width: int = opt(None, least=1, model="speaker")  # channels
    embed_dim: int = opt(None, least=1, model="speaker")  # size of the embedding
    margin: float = opt(0.2, least=0, most=1.5)  # AAM-softmax: angular margin in radians
    margin_rise: float = opt(0.0, least=0, most=1)  # share of the steps in which it rises from 0
    # Machine: seldom needed, for the fastest that is safe is chosen
    device: str = opt("auto", choices=DEVICES, modes=ANY, passing=True)  # where to compute
    bf16: bool = opt(None, modes=TEST)  # autocast to bfloat16; left out: where it is fast
    compile: bool = opt(False, passing=True)  # torch.compile: slow first step, faster epochs
    checkpointing: bool = opt(False, model="ast")  # less memory: compute blocks again, 1.4 x time
    # Use of a checkpoint: after training
    evaluate: str = ""  # test this best.pt
    durations: list = opt((), modes=("evaluate",))  # seconds of a test; full: whole utterances
    as_norm: bool = opt(False, modes=("evaluate",))  # s-norm, its cohort from training speakers
    predict: list = opt((), needs="checkpoint")  # name the classes of these files or folders
    verify: list = opt((), needs="checkpoint")  # is the last of these files the others' speaker?
    embed: list = opt((), needs="checkpoint")  # write the embeddings of these files or folders
    checkpoint: str = opt("", modes=("predict", "verify", "embed"))  # the best.pt they use
    csv: str = opt("", modes=("predict",))  # write the predictions to this file too
    figure: str = opt("", modes=(*RUNS, "evaluate", "predict"), passing=True)  # draw the result

    @property
    def speaker(self):
        return self.model in lightweight_sv.MODELS

    @property
    def name(self):
        return self.model if self.speaker else f"{self.model}-{self.method}"


# --------------------------------------------------------------------------------------------------
# 2. The loop: batch -> features -> forward -> loss -> backward -> step -> log -> evaluate -> save


def fit(cfg, corpus, model, augment_waves, out):
    """Train `model`; leave last.pt, best.pt and log.jsonl in `out`. Return the seconds it took."""
    optimiser = make_optimiser(cfg, model)
    state = load_last(out, corpus, model, optimiser)  # a new run's, or where --resume goes on
    inputs, frames = cache_inputs(cfg, corpus, model)  # the corpus, or its features
    forward, clips = parallel_model(cfg, model), corpus.pick("train")
    per_epoch = min(cfg.steps or 10**9, max(1, len(clips) // cfg.batch_size))
    for epoch in range(state["epoch"], cfg.epochs):
        # A resumed epoch draws what it would have drawn; each process draws its own.
        torch.manual_seed(1000 * cfg.seed + epoch + 10**9 * RANK)
        model.train()
        start, losses = time.time(), []
        batches = data.batches(inputs, clips, cfg.batch_size, frames, cfg.seed, epoch,
                               repeat=cfg.speaker, shard=(RANK, WORLD), steps=cfg.steps)
        for i, batch in enumerate(progress(batches, f"epoch {epoch + 1}", per_epoch)):
            step, steps = epoch * per_epoch + i, cfg.epochs * per_epoch
            for group in optimiser.param_groups:
                group["lr"] = learning_rate(cfg, step, steps)
            model.head.margin = cfg.margin * min(1, (step + 1) / max(1, cfg.margin_rise * steps))

            batch = augment_waves(batch.to(cfg.device))  # speed, gain, noise, rooms
            x, y = data.features(batch, model.encoder), batch.labels  # (B, T, F), (B,)
            x = data.augment_features(x, cfg.shift, cfg.spec_f, cfg.spec_t)
            with torch.autocast(cfg.device, torch.bfloat16, enabled=cfg.bf16):
                loss = F.cross_entropy(forward(x, y), y)
            check_loss(loss, batch, corpus)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
            losses.append(loss.item())
        speed = per_epoch * min(cfg.batch_size, len(clips)) / (time.time() - start)
        valid = evaluate(cfg, inputs, model, "valid")
        score = valid.get("score", epoch)  # nothing to select on: the last epoch is the best
        if score > state["best"]:
            state["best"] = score
            save(out / "best.pt", checkpoint(cfg, corpus, model, epoch + 1, valid))
        state["seconds"] += time.time() - start
        loss = float(sum_over_ranks(torch.tensor(losses)).mean()) / WORLD
        line = dict(epoch=epoch + 1, loss=loss, valid=valid.get("score"), best=state["best"],
                    lr=group["lr"], clips_per_second=speed,
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


def make_optimiser(cfg, model):
    """AdamW on what trains. Only matrices, kernels and the like decay: weight decay would pull
    scales that start at one (LayerNorm, SSF, IA3, DoRA's magnitude) towards zero."""
    trained = [p for p in model.parameters() if p.requires_grad]
    groups = [dict(params=[p for p in trained if p.squeeze().ndim > 1]),
              dict(params=[p for p in trained if p.squeeze().ndim < 2], weight_decay=0.0)]
    return torch.optim.AdamW(groups, cfg.lr, betas=(0.9, 0.98), eps=1e-6,
                             weight_decay=cfg.weight_decay, fused=True)


def check_loss(loss, batch, corpus):
    """Stop at a loss that is not finite, with the names of the clips."""
    if not loss.isfinite():
        names = ", ".join(corpus.ids[i] for i in batch.clips[:5])
        raise ValueError(f"the loss became {loss.item()} in a batch with {names}: lower --lr?")


def cache_inputs(cfg, corpus, model):
    """Return (what the loop reads, its frames): the corpus, or inputs that no epoch changes. For
    `linear` these are all frozen outputs (46 times as fast), if no feature is augmented; else
    the features, up to half a gigabyte. Crops and waves that are drawn anew are not kept."""
    size = cfg.frames if corpus.mels else data.samples_of(cfg.frames)
    encoder, clips = model.encoder.eval(), len(corpus.ids)
    frozen = cfg.method == "linear" and not (cfg.speaker or cfg.spec_f or cfg.spec_t or cfg.shift)
    rows, width = (1, encoder.embed_dim) if frozen else (cfg.frames, encoder.mels)
    if (cfg.speed_perturb or cfg.gain or cfg.noise or cfg.reverb or corpus.trials
            or corpus.length.max() > size or 4 * clips * rows * width > 2**29):
        return corpus, math.ceil(1.1 * size / data.HOP) if cfg.speed_perturb else cfg.frames
    store = np.zeros((clips, rows, width), np.float32)
    for batch in progress(data.batches(corpus, np.arange(clips), 64, cfg.frames, train=False,
                                       repeat=cfg.speaker), "features, once"):
        x = infer(cfg, encoder, encoder.pooled if frozen else torch.nn.Identity(), batch)
        store[batch.clips] = x.reshape(-1, rows, width)  # (B, D) or (B, T, F)
    return replace(corpus, store=store.reshape(-1, width), start=rows * np.arange(clips),
                   length=np.full(clips, rows)), rows


# --------------------------------------------------------------------------------------------------
# 3. Evaluation: accuracy of a split, or error rates of its trials; processes share the work


def evaluate(cfg, corpus, model, split, frames=None, threshold=None, strangers=None):
    """Return the results of one split, {} of an empty one; "score" is what selection maximises.
    `frames` cuts clips into windows of so many, utterances of trials to so many (None: whole).
    `threshold` judges test trials (validation trials give one); `strangers` are a cohort."""
    clips = corpus.pick(split)
    if not corpus.trials and len(clips):
        chances = class_probabilities(cfg, corpus, model, clips, frames or cfg.frames)  # (clips, C)
        right = 100.0 * (chances.argmax(1).numpy() == corpus.labels[clips])
        results = dict(accuracy=right.mean(), score=right.mean())
        ordered = np.array([">" in corpus.classes[label] for label in corpus.labels[clips]])
        if ordered.any():  # `sounds`: classes told apart only by order in time
            results |= dict(content=right[~ordered].mean(), order=right[ordered].mean())
        return {name: float(value) for name, value in results.items()}
    if split not in corpus.trials:
        return {}
    labels, left, right = (np.array(column) for column in zip(*corpus.trials[split]))
    clips, rows = np.unique([left, right], return_inverse=True)  # each is embedded once
    pairs = rows.reshape(2, -1).T  # (trials, 2) rows of the embeddings
    unit = embeddings(cfg, corpus, model, clips, frames)  # (clips, E)
    scores = (unit[pairs[:, 0]] * unit[pairs[:, 1]]).sum(1).double().numpy()  # cosines
    if strangers is not None:  # a threshold is one of cosines
        scores, threshold = lightweight_sv.adaptive_s_norm(scores, pairs, unit, strangers), None
    if split == "valid":
        threshold = lightweight_sv.threshold_at(scores, labels)
    results = lightweight_sv.error_rates(scores, labels, threshold)
    return results | dict(score=-results["eer"], scores=scores)


def infer(cfg, encoder, layer, batch):
    """Return what `layer` makes of the features of a batch, (B, ...) float32 on the CPU."""
    x = data.features(batch.to(cfg.device), encoder)  # (B, T, F)
    with torch.inference_mode(), torch.autocast(cfg.device, torch.bfloat16, enabled=cfg.bf16):
        return layer(x).float().cpu()


def class_probabilities(cfg, corpus, model, clips, frames):
    """Return (clips, C): the mean over a clip's windows of `frames` frames, side by side."""
    frames = frames if corpus.length.max() > 1 else 1  # a frozen output is one frame
    windows, owner = data.cut_windows(corpus, clips, frames)  # owner (windows,): row of the clip
    total = torch.zeros(len(clips), len(model.eval().head.weight))  # (clips, C)
    for batch in data.batches(windows, np.arange(len(owner)), 128, frames, train=False,
                              repeat=cfg.speaker, shard=(RANK, WORLD)):
        logits = infer(cfg, model.encoder, model, batch)  # (B, C)
        total.index_add_(0, owner[batch.clips], logits.softmax(1))
    return sum_over_ranks(total) / owner.bincount()[:, None]


def embeddings(cfg, corpus, model, clips, frames=None):
    """Return unit embeddings (clips, E) of utterances, cut to `frames` if they are longer (None:
    whole), padded to the 16 that an AST needs. Those of one length share a batch."""
    unit = torch.zeros(len(clips), model.eval().encoder.embed_dim)
    whole = corpus.length[clips] if corpus.mels else data.frames_of(corpus.length[clips])
    lengths = np.clip(whole, 16, frames)
    groups = [np.flatnonzero(lengths == length) for length in np.unique(lengths)]
    parts = [part for rows in groups for part in np.split(rows, range(64, len(rows), 64))]
    for part in parts[RANK::WORLD]:
        batch = data.load_batch(corpus, clips[part], int(lengths[part[0]]), repeat=cfg.speaker)
        unit[part] = F.normalize(infer(cfg, model.encoder, model.encoder, batch), dim=1)  # (B, E)
    return sum_over_ranks(unit)


def cohort(cfg, corpus, model, each=20):
    """Return one mean embedding for every training speaker, of up to `each` utterances: (C, E)."""
    train = np.random.default_rng(cfg.seed).permutation(corpus.pick("train"))
    chosen = [train[corpus.labels[train] == c][:each] for c in range(len(corpus.classes))]
    unit = embeddings(cfg, corpus, model, np.concatenate(chosen))
    return torch.stack([own.mean(0) for own in unit.split([len(clips) for clips in chosen])])


# --------------------------------------------------------------------------------------------------
# 4. The model: an encoder and a head, new or out of a checkpoint


def make_model(cfg, classes, mels, trials, settings, start=None):
    """Return an encoder and a head, with new weights or, of an AST, those of the file `start`. The
    other arguments are as best.pt has them: what the corpus has, and the `settings` of an AST.
    With trials the head is AAM-softmax, where each speed of a speaker is a class."""
    names = SPEAKER_OPTIONS if cfg.speaker else METHODS[cfg.method][1]
    options = {name: getattr(cfg, name) for name in names if getattr(cfg, name) is not None}
    torch.manual_seed(cfg.seed)
    if cfg.speaker:
        encoder = lightweight_sv.MODELS[cfg.model](mels=mels or 80, **options)
    else:
        encoder = AST(**settings)
        if start:
            print(ast_adapters.load_pretrained(encoder, start))
        adapt(encoder, cfg.method, **options)
        encoder.checkpointing = cfg.checkpointing
    size = encoder.embed_dim, len(classes) * (len(data.SPEEDS) if cfg.speed_perturb else 1)
    torch.manual_seed(cfg.seed)  # so every method starts from the same head
    return Model(encoder, lightweight_sv.AAMSoftmax(*size) if trials else LinearHead(*size))


def build_model(cfg, corpus):
    """Return the model that a training starts with. A speaker model takes over the weights of
    --init best.pt, for equal classes those of its head too."""
    settings = dict(size=cfg.model.removeprefix("ast-"), pos_embed=cfg.pos_embed, pool=cfg.pool)
    start = pretrained_file(cfg)
    model = make_model(cfg, corpus.classes, corpus.mels, corpus.trials, settings, start)
    if cfg.speaker and start:
        saved = load_checkpoint(start)[2]
        try:
            model.encoder.load_state_dict(saved["encoder"])
        except RuntimeError as error:
            raise ValueError(f"--init {start} holds another model or width") from error
        if saved["classes"] == corpus.classes:  # of speakers at three speeds, those at their own
            for ours, theirs in zip(model.head.parameters(), saved["head"].values()):
                ours.data[: len(theirs)] = theirs[: len(ours)]
    return model


def load_checkpoint(path, device="cpu"):
    """Read best.pt; return the Config of its training (bfloat16 only where that is fast here), its
    model in eval mode, and what it holds."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        cfg = Config(**saved["config"])
        model = make_model(cfg, *(saved[k] for k in ("classes", "mels", "trials", "settings")))
        model.encoder.adaptation = saved["adaptation"]  # with the real backbone's fingerprint
        model.encoder.load_state_dict(saved["encoder"])
        model.head.load_state_dict(saved["head"])
        saved["epoch"], saved["threshold"]  # read later; if they lack, refused here
    except Exception as error:  # what a wrong file raises depends on what it holds
        raise ValueError(f"{path} is no best.pt of this program, or damaged, or holds code, which "
                         f"is never run ({error!r:.99})") from error
    cfg = on_this_machine(replace(cfg, bf16=None if cfg.bf16 else False), device)
    return cfg, model.to(cfg.device).eval(), saved


def pretrained_file(cfg):
    """Return the checkpoint a model starts from: a file, AudioSet's, our nano AST, or None."""
    if cfg.init in ast_adapters.AUDIOSET and not cfg.speaker:  # downloaded once
        url, sha256 = ast_adapters.AUDIOSET[cfg.init]
        return on_first_rank(lambda: data.download(url, Path(cfg.cache, f"{cfg.init}.pth"), sha256))
    if cfg.init or cfg.speaker:
        return None if cfg.init in ("", "none") else cfg.init
    file = Path(cfg.cache) / f"ast-nano-v{data.VERSION}.pt"
    if not on_first_rank(file.exists):
        print("making the nano AST: training on the source classes of `sounds`, once")
        with tempfile.TemporaryDirectory(dir=cfg.cache) as out:  # two programs may make it at once
            run(Config(data="sounds-source", method="full", init="none", cache=cfg.cache,
                       out=on_first_rank(lambda: out), device=cfg.device,
                       batch_size=math.ceil(16 / WORLD) * WORLD))
            on_first_rank(lambda: os.replace(f"{out}/best.pt", file))
    return file


# --------------------------------------------------------------------------------------------------
# 5. A run: its files, the papers' recipes, corpus and model; train, select, test once


def save(path, value):
    """Write text or tensors, in the first process; kill -9 leaves the old file or the new one."""
    if not RANK:
        content, part = io.BytesIO(), path.with_suffix(path.suffix + ".part")
        content.write(value.encode()) if isinstance(value, str) else torch.save(value, content)
        try:
            part.write_bytes(content.getbuffer())
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)  # of a full disk


def checkpoint(cfg, corpus, model, epoch, valid):
    """Return everything that using the model needs, no more: plain values and tensors."""
    about = {name: getattr(model.encoder, name, {}) for name in ("settings", "adaptation")}
    return dict(about, config=asdict(cfg), classes=corpus.classes, mels=corpus.mels,
                trials=bool(corpus.trials), encoder=model.encoder.state_dict(),
                head=model.head.state_dict(), epoch=epoch, threshold=valid.get("threshold"))


def save_last(out, model, optimiser, state):
    """Write the log, then last.pt: killed in between, the epoch is done again, to the same end."""
    save(out / "log.jsonl", "".join(json.dumps(line) + "\n" for line in state["log"]))
    save(out / "last.pt", dict(state, model=model.state_dict(), optimiser=optimiser.state_dict()))


def load_last(out, corpus, model, optimiser):
    """Return the state of last.pt, its weights now in the model; without the file a new run's."""
    if not (out / "last.pt").exists():
        return dict(epoch=0, best=-math.inf, seconds=0.0, log=[], corpus=corpus.fingerprint())
    saved = torch.load(out / "last.pt", map_location="cpu", weights_only=True)
    if saved["corpus"] != corpus.fingerprint():
        raise ValueError(f"{out} was begun on other clips: their list, splits or sound changed")
    model.load_state_dict(saved.pop("model"))
    optimiser.load_state_dict(saved.pop("optimiser"))
    return saved


def run_folder(cfg, name):
    """Make the folder of a run and return it: --out, or out/ and the first free name. Raises
    ValueError where it holds another run, or this one without --resume: nothing is overwritten."""
    names = (f"out/{name}" + f"-{n}" * (n > 1) for n in itertools.count(1))
    free = next(path for path in names if cfg.resume or not Path(path).exists())
    out = Path(cfg.out or on_first_rank(lambda: free))
    if out.exists() and not out.is_dir():
        raise ValueError(f"--out {out} is a file: expected a folder, or a new name")
    if not RANK and (out / "config.json").exists():
        theirs = json.loads((out / "config.json").read_text(encoding="utf-8"))
        mine = json.loads(json.dumps(asdict(cfg)))  # JSON makes lists of tuples
        changes = [f"{f.name} {theirs.get(f.name)!r} -> {mine[f.name]!r}" for f in fields(Config)
                   if not f.metadata.get("passing") and theirs.get(f.name) != mine[f.name]]
        if changes or not cfg.resume:
            raise ValueError(f"--out {out} holds a run already: --resume goes on with it, in the "
                             f"same configuration ({', '.join(changes) or 'as here'})")
    out.mkdir(parents=True, exist_ok=True)
    save(out / "config.json", json.dumps(asdict(cfg), indent=1))
    return out


# What an AST's size and method change stands in ast_adapters.recipe, a corpus in data.CORPORA.
RECIPE = dict(spec_f=0, spec_t=0, shift=0, gain=0.0, epochs=30, batch_size=32, frames=500,
              warmup=0.0, weight_decay=0.1)
SPEAKER_RECIPE = dict(epochs=10, batch_size=64, frames=200, lr=2e-3, warmup=0.3, weight_decay=0.05)


def with_preset(cfg):
    """Fill every None that has a preset; what is typed wins."""
    preset = RECIPE | (SPEAKER_RECIPE if cfg.speaker else ast_adapters.recipe(
        cfg.model.removeprefix("ast-"), cfg.method)) | data.CORPORA[cfg.data].recipe
    if cfg.speaker and cfg.data == "voices":  # hosts of 200,000 parameters learn it in two minutes
        preset |= dict(width=dict(amcrn=32, resnet34=8).get(cfg.model, 64), embed_dim=128)
    preset["gain"] *= not cfg.speaker  # its features have no level: each bin's mean is removed
    return replace(cfg, **{k: v for k, v in preset.items() if getattr(cfg, k) is None})


def run(cfg):
    """Train, select, test once; return the flat results, which results.json holds too."""
    cfg, corpus, augment_waves, model = prepare(cfg)
    out = run_folder(cfg, f"{cfg.data}-{cfg.name}")
    if (out / "results.json").exists():
        print(f"{out} is finished already")
        results = json.loads((out / "results.json").read_text(encoding="utf-8"))
    else:
        trainable, _, total = ast_adapters.count(model.encoder)
        clips = {split: len(corpus.pick(split)) for split in ("train", "valid", "test")}
        print(f"\n{out}: {cfg.name} on {cfg.data}, seed {cfg.seed}, {cfg.device} x {WORLD}, torch "
              f"{torch.__version__}; trains {trainable:,} of {total:,} parameters and the head",
              f"{len(corpus.classes)} classes, clips {clips}",
              ", ".join(f"{k} {getattr(cfg, k)}" for k in ("lr", "bf16", *RECIPE)),
              *corpus.notes, sep="\n  ")
        seconds = fit(cfg, corpus, model, augment_waves, out)
        results = test_once(cfg, corpus, out) | dict(
            trainable=trainable, parameters=total, share=100 * trainable / total,
            seconds=round(seconds, 2), epochs=cfg.epochs, seed=cfg.seed, fold=int(cfg.fold or 1))
        save(out / "results.json", json.dumps(results, indent=1))
    if cfg.figure:
        log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        with data.figure(cfg.figure, 2) as axes:
            for axis, key, name in zip(axes, ("loss", "valid"), ("loss", "validation score, %")):
                axis.plot([line["epoch"] for line in log], [line[key] for line in log], "o-")
                axis.set(xlabel="epoch", ylabel=name)
    return results


def prepare(cfg):
    """Return what `fit` takes: settings with their preset, corpus, augmentation, model."""
    cfg = on_this_machine(with_preset(cfg), cfg.device)
    if RANK:
        dist.barrier()  # the first process packs what is new; the others find it packed
    corpus = open_corpus(cfg)
    noise, rooms = (data.open_sounds(of, cfg.cache, cfg.skip_bad) for of in (cfg.noise, cfg.reverb))
    if WORLD > 1 and not RANK:
        dist.barrier()
    check_corpus(cfg, corpus)
    augment_waves = partial(data.augment_waves, classes=len(corpus.classes), frames=cfg.frames,
                            speeds=cfg.speed_perturb, gain=cfg.gain, noise=noise, rooms=rooms,
                            share=cfg.distorted, snr=(min(cfg.snr), max(cfg.snr)))
    return cfg, corpus, augment_waves, build_model(cfg, corpus).to(cfg.device)


def open_corpus(cfg, train=True):
    """Return the corpus of --data, as the settings want it."""
    return data.open_corpus(cfg.data, cfg.root, cfg.cache, cfg.seed, cfg.fold and int(cfg.fold),
                            cfg.few_shot, cfg.skip_bad, cfg.valid, cfg.trials, train)


def check_corpus(cfg, corpus):
    """Refuse settings that this corpus cannot follow."""
    lengths = corpus.length[corpus.pick("train")]
    longest = lengths.max() if corpus.mels else data.frames_of(lengths.max())
    if longest < cfg.frames / 10:  # clips may be padded, within reason
        raise ValueError(f"--frames {cfg.frames}: the longest training clip has {longest} frames")
    if not corpus.trials and (cfg.speed_perturb, cfg.margin, cfg.margin_rise) != (False, 0.2, 0):
        raise ValueError(f"--speed-perturb and --margin: --data {cfg.data} has no trials")
    if (clips := min(cfg.batch_size, len(lengths))) % WORLD:  # else some would weigh more
        raise ValueError(f"{clips} clips a step do not divide among {WORLD} processes")


def test_once(cfg, corpus, out):
    """Test the best weights; write adapter.pt or scores.txt; return what was measured."""
    _, model, best = load_checkpoint(out / "best.pt", cfg.device)
    results = evaluate(cfg, corpus, model, "test", threshold=best["threshold"])
    print(f"tested once, with the weights of epoch {best['epoch']}: {numbers(results)}")
    if corpus.trials:
        save(out / "scores.txt", "".join(
            f"{corpus.ids[a]} {corpus.ids[b]} {score:.6f} {label}\n"
            for (label, a, b), score in zip(corpus.trials["test"], results.pop("scores"))))
    if cfg.speaker:
        results |= lightweight_sv.complexity(model.encoder, cfg.frames)
    else:
        save(out / "adapter.pt", dict(adapter=ast_adapters.adapter_state(model.encoder),
                                      head=model.head.state_dict(), classes=corpus.classes,
                                      config=asdict(cfg)))
        results["adapter_kb"] = round(on_first_rank((out / "adapter.pt").stat).st_size / 1024)
    clips = min(cfg.batch_size, len(corpus.pick("train")))  # the count is last: it moves BatchNorm
    return results | dict(memory_mb=training_memory(model, clips, cfg.frames, cfg.bf16))


def numbers(values):
    """Return "loss 0.512  valid 83.3  ..." for a person; the files have every digit."""
    return "  ".join(f"{name} {value:.4g}" for name, value in values.items()
                     if value is not None and name not in ("score", "scores"))


# --------------------------------------------------------------------------------------------------
# 6. Tables of runs: methods, values, folds, seeds

COLUMNS = {"accuracy": 2, "content": 2, "order": 2, "eer": 2, "min_dcf_0.01": 3, "min_dcf_0.05": 3,
           "trainable": 0, "share": 2, "macs": 0, "latency_ms": 1, "seconds": 1, "memory_mb": 1,
           "adapter_kb": 0}  # key of the results: digits behind the point


def variants(cfg, typed):
    """Return (name of the table, {row: Config}): a row a method or value, or only one."""
    quick = not typed & {"compare", "sweep", "data", "model", "method", "init", *METHOD_OPTIONS}
    sweep = ("method=linear,conformer,full" if quick else
             "method=" + ",".join(METHODS) if cfg.compare else cfg.sweep)
    if not sweep:
        return f"{cfg.data}-{cfg.name}", {cfg.name: cfg}
    (name, _, values), rows = sweep.partition("="), {}
    for text in values.split(","):
        words = {"true": [f"--{name}"], "false": [f"--no-{name}"]}
        value, swept = parse(words.get(text, [f"--{name}={text}"]))
        row = replace(cfg, **{k: getattr(value, k) for k in swept})
        check(row, swept | typed - (set(METHOD_OPTIONS) - set(METHODS[row.method][1])))
        rows[text if name == "method" else f"{name}={text}"] = row
    return "quick-start" if quick else f"compare-{cfg.data}", rows


def study(cfg, typed):
    """Do what the command line asks for: one run, or a table of rows, each of folds and seeds."""
    title, rows = variants(cfg, typed)
    folds = [cfg.fold] if cfg.fold != "all" else FOLDS[1 : 1 + data.CORPORA[cfg.data].folds]
    if len(rows) == len(folds) == cfg.seeds == 1:
        return run(*rows.values())
    table, folder = {label: [] for label in rows}, run_folder(cfg, title)
    for (label, row), fold, n in itertools.product(rows.items(), folds, range(cfg.seeds)):
        row = replace(row, seed=row.seed + n, fold=fold, resume=True, figure="")
        name = label + f"-fold{fold}" * (len(folds) > 1) + f"-seed{row.seed}" * (cfg.seeds > 1)
        out = folder / re.sub(r'[<>:"/\\|?*]', "_", name)  # Windows refuses these in names
        table[label].append(run(replace(row, out=str(out))))
    save(folder / "compare.json", json.dumps(table, indent=1))
    save(folder / "compare.md", markdown(table))
    print(f"\n{markdown(table)}\n{folder}")
    if cfg.figure:
        draw_table(table, cfg.figure, f"{folder.name}, {(cfg.model, cfg.name)['method' in typed]}")
    else:  # a bar a row, of the first score
        for label, results in table.items():
            print(f"{label:>24}", "#" * round(np.mean([[*r.values()][0] for r in results]) / 2))


def mean_and_deviation(values, digits):
    """Return "93.12 ± 1.04"; of equal values the mean alone, of none nothing."""
    mean = f"{np.mean(values):,.{digits}f}" if values else ""
    return mean + (f" ± {np.std(values, ddof=1):.{digits}f}" if len(set(values)) > 1 else "")


def markdown(table):
    """Return {label: results} as a table for a README."""
    keys = [key for key in COLUMNS if any(key in r for results in table.values() for r in results)]
    rows = [["", *keys]] + [
        [label, *(mean_and_deviation([r[key] for r in results if key in r], COLUMNS[key])
                  for key in keys)] for label, results in table.items()]
    widths = [max(map(len, column)) for column in zip(*rows)]
    rows.insert(1, ["-" * (width - 1) + ":" for width in widths])
    return "".join("| " + " | ".join(cell.rjust(w) for cell, w in zip(row, widths)) + " |\n"
                   for row in rows)


def draw_table(table, path, title):
    """Draw each row's score: over its number or, with its name, over its trainable parameters."""
    swept = all(re.fullmatch(r"[a-z-]+=([\d.]+|inf)", label) for label in table)
    points = []  # (score, deviation, place, label)
    for label, results in table.items():
        key = "eer" if "eer" in results[0] else "accuracy"
        scores = [result[key] for result in results]
        place = float(label.partition("=")[2]) if swept else results[0]["trainable"]
        points.append((np.mean(scores), np.std(scores, ddof=len(scores) > 1), place, label))
    y, deviations, x, _ = zip(*points)
    with data.figure(path) as axes:
        axes.errorbar(x, y, deviations, fmt="o-" if swept else "o", capsize=3)
        axes.set(xscale="linear" if swept else "log", ylabel=f"{key}, %", title=title,
                 xlabel=label.partition("=")[0] if swept else "trainable parameters, no head")
        for n, (score, _, place, label) in enumerate(named := [] if swept else sorted(points)):
            left = place < named[min(n ^ 1, len(named) - 1)][2] + n % 2  # so that few labels meet
            axes.annotate(f"  {label}  ", (place, score), ha=("left", "right")[left], fontsize=8)


# --------------------------------------------------------------------------------------------------
# 7. Using a checkpoint: test it, or give it audio files


def evaluate_checkpoint(cfg, typed):
    """--evaluate: test a best.pt on its corpus, on another of equal classes, or on any trials."""
    trained, model, saved = load_checkpoint(cfg.evaluate, cfg.device)
    tested = replace(trained, few_shot=0, **{k: getattr(cfg, k) for k in typed - {"device"}})
    corpus, table, strangers = open_corpus(tested, train="data" not in typed), {}, None
    if not (saved["trials"] and corpus.trials) and corpus.classes != saved["classes"]:
        raise ValueError(f"{cfg.evaluate} knows {len(saved['classes'])} classes, --data "
                         f"{tested.data} has {len(corpus.classes)}, or others: they must be equal")
    if (cfg.figure or cfg.as_norm) and not corpus.trials:
        raise ValueError(f"--figure, --as-norm: --data {tested.data} has no trials, but classes")
    if cfg.as_norm:  # speakers that trained the model, wherever it is tested
        strangers = cohort(trained, open_corpus(trained) if "data" in typed else corpus, model)
    for length in cfg.durations or ["full"]:
        frames = None if length == "full" else max(1, round(100 * float(length)))
        results = evaluate(tested, corpus, model, "test", frames, saved["threshold"], strangers)
        print(f"  {f'{length} s' if frames else length:>6}  {numbers(results)}")
        table |= {f"seconds={length}": [results]} if frames else {}
    if cfg.figure and table:
        draw_table(table, cfg.figure, f"{cfg.evaluate} on {tested.data}")
    elif cfg.figure:
        with data.figure(cfg.figure, size=(5, 5)) as axes:
            lightweight_sv.draw_det(axes, results["scores"], [t[0] for t in corpus.trials["test"]])


def use_checkpoint(cfg):
    """--predict, --verify, --embed: give the files, and those below the folders, to the model."""
    trained, model, saved = load_checkpoint(cfg.checkpoint, cfg.device)
    if saved["mels"] or (cfg.figure and trained.speaker):
        raise ValueError(f"{cfg.checkpoint} reads no audio, or holds no AST for --figure to draw")
    corpus, rows = data.corpus_of_files(cfg.predict or cfg.verify or cfg.embed), []
    clips, classes, threshold = np.arange(len(corpus.ids)), saved["classes"], saved["threshold"]
    if cfg.predict:
        chances = class_probabilities(trained, corpus, model, clips, trained.frames)
        chances = chances.unflatten(1, (-1, len(classes))).sum(1)  # (files, C): at all speeds
        for file, row in zip(corpus.ids, chances):
            best = zip(*row.topk(min(3, len(classes))))  # (chance, class), the likeliest first
            rows.append([file, *(text for p, c in best for text in (classes[c], f"{p:.4f}"))])
            print(*rows[-1], sep="  ")
        if cfg.csv:
            with open(cfg.csv, "w", newline="", encoding="utf-8") as out:
                csv.writer(out).writerows(rows)
        if cfg.figure:
            batch = data.load_batch(corpus, clips[:1], trained.frames).to(trained.device)
            x = data.features(batch, model.encoder)  # (1, T, F)
            with data.figure(cfg.figure, 2) as axes:
                ast_adapters.draw_attention(axes, model.encoder, x, corpus.ids[0])
        return
    unit = embeddings(trained, corpus, model, clips)  # (files, E)
    if cfg.embed:
        out = run_folder(cfg, "embeddings")
        save(out / "names.txt", "".join(f"{file}\n" for file in corpus.ids))
        on_first_rank(lambda: np.save(out / "embeddings.npy", unit.numpy()))
        return print(f"{out}: embeddings.npy {tuple(unit.shape)}, of unit length; names.txt")
    if len(unit) < 2:
        raise ValueError("--verify: expected two files or more, the last of them to be judged")
    score = float(F.normalize(unit[:-1].mean(0), dim=0) @ unit[-1])
    print(f"score {score:.4f}, " + ("no threshold: no validation trials" if threshold is None else
          f"threshold {threshold:.4f}: {'same' if score >= threshold else 'different'} speaker"))


# --------------------------------------------------------------------------------------------------
# 8. The machine: its device, the processes that torchrun starts, and the time of each line


def on_this_machine(cfg, device):
    """Fill in the device (auto: a GPU; of several processes each has the one of its number) and,
    where it is open, whether bfloat16 is fast there: neither emulated nor, as on Macs, untried."""
    if device == "cpu" or not ACCELERATOR or (WORLD > 1 and ACCELERATOR.type == "mps"):
        device, able = "cpu", torch.cpu.get_capabilities()
        fast = able.get("avx512_bf16", False) or able.get("amx_bf16", False)
    else:
        device = ACCELERATOR.type
        fast = device == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        if cfg.bf16 and not fast:
            raise ValueError(f"--bf16: {device} has no bfloat16 that is known to work")
        torch.accelerator.set_device_index(int(os.environ.get("LOCAL_RANK", -1)))  # -1: as is
    return replace(cfg, device=device, bf16=fast if cfg.bf16 is None else cfg.bf16)


def parallel_model(cfg, model):
    """Return what the loop calls: the model, compiled if asked, with gradients that are the mean
    over all processes. Evaluation and checkpoints use the plain model, whose weights these are."""
    if WORLD > 1 and cfg.device == "cuda":  # on CPUs each process has its own BatchNorm
        torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    forward = torch.compile(model) if cfg.compile else model
    return torch.nn.parallel.DistributedDataParallel(forward) if WORLD > 1 else forward


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


def profile(cfg):
    """--profile: print the milliseconds of each line of `fit`, and the floor: a step's
    multiply-accumulates over the rate of this machine's own product of two matrices. Each line
    waits for the device, so a GPU's lines do not overlap. Three of 13 times warm up."""
    cfg, corpus, augment_waves, model = prepare(cfg)
    clips = min(cfg.batch_size, len(corpus.pick("train")))  # in a step
    epochs = math.ceil(13 / min(13, len(corpus.pick("train")) // clips))
    code, first = inspect.getsourcelines(fit)
    spent, last = {}, [first, time.perf_counter()]  # {line: ms of each time}; a line, its start

    def trace(frame, event, _):
        """Python calls this where a function begins and, if it returns itself, at each line."""
        if frame.f_code is not fit.__code__:
            return None
        if ACCELERATOR:
            torch.accelerator.synchronize()
        spent.setdefault(last[0], []).append(1000 * (time.perf_counter() - last[1]))
        last[:] = frame.f_lineno, time.perf_counter()
        return trace

    with tempfile.TemporaryDirectory() as out:
        sys.settrace(trace)
        try:
            fit(replace(cfg, steps=13, epochs=epochs), corpus, model, augment_waves, Path(out))
        finally:
            sys.settrace(None)
    ms = {line: np.mean(times[len(times) // 4 :]) for line, times in spent.items()}
    step = sum(ms[line] for line, times in spent.items() if len(times) >= 13)
    with FlopCounterMode(display=False) as counter:
        memory = training_memory(model, clips, cfg.frames, cfg.bf16)
    square = torch.randn(2048, 2048, device=cfg.device, dtype=torch.bfloat16 if cfg.bf16 else None)
    taken = timeit.repeat(lambda: (square @ square)[0, 0].item(), number=1, repeat=7)  # it waits
    floor = counter.get_total_flops() / 2 / 2048**3 * 1000 * np.median(taken)
    for line, mean in sorted(ms.items()):
        if mean > step / 200:
            share = f"{mean / step:6.1%}" if len(spent[line]) >= 13 else "epoch "
            print(f"{mean:9.2f} ms {share}  {code[line - first].strip()}")
    print(f"{step:9.2f} ms 100.0%  a step; {1000 * clips / step:.1f} clips a second\n"
          f"{floor:9.2f} ms {floor / step:6.1%}  its products alone, at this machine's rate\n"
          f"memory: {memory} MB for the backward pass, gradients and moments"
          + f"; peak {torch.cuda.max_memory_allocated() / 2**20:.0f} MB" * (cfg.device == "cuda"))


# --------------------------------------------------------------------------------------------------
# 9. The command line


def parse(argv=None):
    """Return (Config, names of the flags that were typed) of a command line."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], usage="python train.py [--FLAG VALUE ...], or --help",
        epilog="examples:\n" + __doc__.split("\n\n")[1], allow_abbrev=False,
        argument_default=argparse.SUPPRESS, formatter_class=argparse.RawDescriptionHelpFormatter)
    for line in inspect.getsource(Config).splitlines():  # its comments are groups and helps
        if title := re.fullmatch(r"    # (.+): (.+)", line):
            group = parser.add_argument_group(*title.groups())
        elif found := re.match(r"    (\w+): .*?  # (.+)", line):
            f = Config.__dataclass_fields__[found[1]]
            rules = {bool: dict(action=argparse.BooleanOptionalAction),
                     list: dict(type=f.metadata.get("item", str), nargs="+")}.get(
                         f.type, dict(type=f.type, choices=f.metadata.get("choices")))
            words = {None: "of preset, method or model", "": "empty", (): "none"}
            group.add_argument("--" + f.name.replace("_", "-"), **rules,
                               help=f"{found[2]} (default: {words.get(f.default, f.default)})")
    typed = vars(parser.parse_args(argv))
    return Config(**typed), set(typed)


def check(cfg, typed):
    """Refuse, before anything is opened, what is typed and breaks a rule of `opt` or of an AST."""
    mode = next((mode for mode in MODES if getattr(cfg, mode)), "train")
    for f in (f for f in fields(Config) if f.name in typed):
        value, rule, broken = getattr(cfg, f.name), f.metadata, None
        modes = [f.name] if f.name in MODES else rule.get("modes", TRAINING)
        if mode not in modes:
            broken = f"read by {', '.join(modes)}, not by {mode}"
        elif mode in TRAINING and "model" in rule and (rule["model"] == "speaker") != cfg.speaker:
            broken = f"{cfg.model} does not read it, being {'no' if cfg.speaker else 'an'} AST"
        elif "least" in rule and not rule["least"] <= value <= rule.get("most", math.inf):
            broken = f"expected at least {rule['least']} and at most {rule.get('most', 'infinity')}"
        elif f.name == "durations" and not all(0 < float(s) < 1e6 for s in {*value} - {"full"}):
            broken = "expected seconds above 0, or full"
        elif "needs" in rule and not any(getattr(cfg, other) for other in rule["needs"].split()):
            broken = "does nothing without --" + " or --".join(rule["needs"].split())
        elif "corpus" in rule and value and not getattr(data.CORPORA[cfg.data], rule["corpus"]):
            broken = f"--data {cfg.data} has no {rule['corpus'].replace('rows', 'audio')}"
        if broken:
            raise ValueError(f"--{f.name.replace('_', '-')} {value}: {broken}")
    if cfg.figure:
        data.check_figure(cfg.figure)
    if mode in TRAINING and not cfg.speaker:
        known = dict.fromkeys(ast_adapters.AUDIOSET, "ast-base") | {"": "ast-nano"}
        if cfg.model != (fits := known.get(cfg.init, cfg.model)):
            raise ValueError(f"--model {cfg.model} needs --init FILE (none: random weights); to "
                             f"start from {cfg.init or 'our nano AST'}, add --model {fits}")
        options = {name: getattr(cfg, name) for name in METHOD_OPTIONS if name in typed}
        ast_adapters.check_options(cfg.model.removeprefix("ast-"), cfg.method, options)


def main(argv=None):
    cfg, typed = parse(argv)
    try:
        if WORLD > 1:  # torchrun started this; a process that dies ends the others at once
            nccl = torch.cuda.is_available() and dist.is_nccl_available()  # not on Windows
            dist.init_process_group("cpu:gloo,cuda:nccl" if nccl else "gloo",
                                    timeout=timedelta(days=1))  # while the first packs a corpus
        check(cfg, typed)
        if RANK:  # the first process alone prints, draws and writes
            sys.stdout, cfg = open(os.devnull, "w"), replace(cfg, figure="", csv="")
        if cfg.download:
            on_first_rank(lambda: data.download_corpus(cfg.data, cfg.root, cfg.cache))
        if cfg.evaluate:
            evaluate_checkpoint(cfg, typed)
        elif cfg.checkpoint:
            use_checkpoint(cfg)
        elif cfg.profile:
            profile(cfg)
        else:
            study(cfg, typed)
    except (ValueError, OSError) as error:
        sys.exit(f"error{f' in process {RANK}' * bool(RANK)}: {error}")
    except KeyboardInterrupt:
        sys.exit("stopped; the same command with --resume and --out RUN goes on" * (not RANK))


if __name__ == "__main__":
    main()
