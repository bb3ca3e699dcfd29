"""How fast the six scripts are, each figure as a ratio against a peer in the same run. Prints tables; asserts nothing.

    python tests/bench.py                       # everything but the long ones: minutes
    python tests/bench.py training beam         # some parts
    python tests/bench.py quality scale         # the long ones, by name: hours, half an hour
    python tests/bench.py lookahead             # what --lookahead costs in small and large shops
    python tests/bench.py gpu                   # by name, on a machine with a CUDA GPU: at most eight minutes
    python tests/bench.py gpu --device cpu --smoke    # the same where there is none: does the command work?

Peers are installed by hand (pip install transformers faiss-cpu pandas recbole torchvision); those that are no
package are looked for in folders of $PEERS: dino (facebookresearch/dino), SASRec.pytorch (pmixer/SASRec.pytorch).
A missing one is named and skipped. Times are those of the wall clock, the best of a few runs after one uncounted, if
nothing else is said; `quality` counts the processor's seconds (OMP_NUM_THREADS=1), `data` and `scale` run once.
`gpu` needs no data and no peer: it prints what one card does in the steps of 02, 03 and 05, beside what it does in
products of matrices, how much memory they take, and how far its answers are from those of the CPU.

letters  B users in a batch, T items of history, D modalities, L codes of an item in one modality, K values of a code,
         M = D * L tokens of an item, N items, U users, E width of a model, H heads, S side of a picture, W windows cut
         from histories, d width of a vector that is cut into codes
"""
import argparse
import contextlib
import ctypes
import functools
import gc
import gzip
import importlib.util
import io
import itertools
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path
from typing import Callable, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch.optim.optimizer import register_optimizer_step_post_hook

from conftest import ROOT, SCRIPTS, command, run_script, script

PEERS = Path(os.environ.get("PEERS", "peers")).resolve()
MODALITIES = ["image", "text", "collab"]


# --- What all parts share ---------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """A line of the table."""
    what: str
    ours: str
    peer: str = ""
    ratio: str = ""
    asked: str = ""  # which ratio, or which figure of ours, was asked for


def compared(what, ours, peer, unit="", asked="", form=",.0f", missing="not installed"):
    """The row of two speeds. peer: None where there is none, and `missing` says why."""
    if peer is None:
        return Row(what, f"{ours:{form}}{unit}", missing, "", asked)
    return Row(what, f"{ours:{form}}{unit}", f"{peer:{form}}", f"{ours / peer:.1f} x", asked)


def best(work, runs, device="cpu", at_most=math.inf):
    """Seconds of the fastest of some runs, after one that warms up. at_most: seconds, then no run is begun any more"""
    work()
    seconds = []
    while len(seconds) < runs and sum(seconds) < at_most:
        finish(device)
        began = time.perf_counter()
        work()
        finish(device)
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def finish(device):
    """A GPU is told what to do, and does it later: waits until it is done."""
    if device == "cuda":
        torch.cuda.synchronize()


def dataset(folder, name, *options):
    """Puts a real dataset of ../shared/data into a run. -> its data.pt, or None where it is not there"""
    source = ROOT.parent / "shared" / "data" / name
    if not source.exists():
        print(f"{source} is not there: what needs it is skipped")
        return None
    run_script(1, "--run", folder, "--dataset", source, *options).check_returncode()
    return torch.load(Path(folder) / "data.pt", weights_only=True)


LIBRARIES = []  # what is defined below lasts as long as somebody holds it


def torchvision_without_operators():
    """A torchvision whose compiled part does not load (built for another torch) still has its transforms."""
    library = torch.library.Library("torchvision", "FRAGMENT")
    LIBRARIES.append(library)
    for name in ("nms", "qnms"):
        with contextlib.suppress(RuntimeError):  # it is there already
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


# --- 05: training, beam search, tree ----------------------------------------------------------------------------------


SHAPE = {  # of public reimplementations
    "width": 128,
    "heads": 6,
    "head": 64,
    "inner": 1024,
    "layers": 4,
    "dropout": 0.1,
}
T = 20
D = len(MODALITIES)
L = 4
K = 256
M = D * L
BATCH = 16  # histories in a step of training


def unique_codes(N):
    """Three random codes an item, the fourth tells apart those that share them. -> (N+1, L)"""
    codes = torch.randint(K, (N + 1, L))                                # (N+1, L)
    prefix = (codes[:, :3] * torch.tensor([K * K, K, 1])).sum(1)        # (N+1,)
    codes[:, 3] = script(2).number_in_group(prefix, torch.arange(N + 1))
    return codes


def random_sources(N):
    """Random codes of all modalities with random centroids, as their files hold them; all items are known."""
    sources = {}
    for modality in MODALITIES:
        sources[modality] = {
            "codes": unique_codes(N),                                   # (N+1, L)
            "known": torch.ones(N + 1, dtype=torch.bool),               # (N+1,)
            "codebooks": torch.randn(3, K, 64),                         # (3, K, d)
        }
    return sources


def some_generator(five, N):
    """An untrained generator of that SHAPE, and its tree."""
    torch.manual_seed(0)
    sources = random_sources(N)
    trie = five.Trie(sources["collab"]["codes"], K)
    model = five.Generator(sources, MODALITIES, "collab", trie, argparse.Namespace(**SHAPE))
    return model, trie


def matmul_rate(dtype, side=1024, device="cpu"):
    """GFLOPS of side x side matrix products, the best of 5 runs of 20: what this machine can do."""
    a = torch.randn(side, side, device=device).to(dtype)                # (side, side)

    def twenty_products():
        for _ in range(20):
            a @ a

    operations = 20 * 2 * side ** 3  # a product has side^3 multiplications and as many additions
    return operations / best(twenty_products, 5, device) / 1e9


def multiply_adds(T, shape=SHAPE, slots=M):
    """Of one history of T items on its way forward through the model, counted from the shapes.

    The masked half of attention is counted as well, as it is computed; softmax, norms, ReLU and dropout are not.
    slots: tokens of an item of history
    """
    E = shape["width"]
    inner = shape["inner"]
    wide = shape["heads"] * shape["head"]  # queries, keys or values of all heads
    tokens = T * slots                     # that the encoder reads
    codes = T * L                          # that the decoder writes: an item after each place

    # A layer of the encoder. Each token has a query, key, value and output, and a feed-forward layer of two matrices;
    # each pair of tokens has a score, and a part of the mean of the values.
    projections = tokens * 4 * E * wide
    feed_forward = tokens * 2 * E * inner
    attention = tokens * tokens * 2 * wide
    encoder = projections + feed_forward + attention

    # A layer of the decoder. A code has query, key, value, output for the codes before it, and query and output for
    # the history; the history's keys and values are made once for all codes.
    projections = codes * 6 * E * wide
    memory = tokens * 2 * E * wide
    feed_forward = codes * 2 * E * inner
    self_attention = codes * L * 2 * wide
    cross_attention = codes * tokens * 2 * wide
    decoder = projections + memory + feed_forward + self_attention + cross_attention

    scores = codes * E * K
    return shape["layers"] * (encoder + decoder) + scores


def bench_training(N=10_000):
    """Steps of 05 on full-length histories, against what the machine can do and against HF's T5."""
    five = script(5)
    model, trie = some_generator(five, N)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    events = torch.randint(1, N + 1, (BATCH, T + 1))                    # (B, T+1)

    def step(events, bf16=False, unconstrained=False):
        args = argparse.Namespace(
            bf16=bf16,
            unconstrained=unconstrained,
            masking=0.2,
            batch=BATCH * T,
            device="cpu",
        )
        five.train_step(model, trie, optimizer, events, args)

    fp32 = BATCH * T / best(lambda: step(events), 5)  # targets/s
    bf16 = BATCH * T / best(lambda: step(events, bf16=True), 5)
    all_codes = BATCH * T / best(lambda: step(events, unconstrained=True), 5)

    # Backward costs twice as much as forward, and a multiply-add is two operations.
    operations = 2 * 3 * multiply_adds(T) / T / 1e9  # of a target, in thousand millions
    rate = matmul_rate(torch.float32)
    rate16 = matmul_rate(torch.bfloat16)
    rows = [
        Row("multiply-adds of training in fp32, share of the matmul rate", f"{operations * fp32:.0f} GFLOPS",
            f"{rate:.0f} GFLOPS", f"{operations * fp32 / rate:.0%}", ">= 45 %"),
        Row("the same in bf16", f"{operations * bf16:.0f} GFLOPS",
            f"{rate16:.0f} GFLOPS", f"{operations * bf16 / rate16:.0%}"),
        Row("a step with the constrained loss : unconstrained", f"{1e3 / fp32:.2f} ms a target",
            f"{1e3 / all_codes:.2f}", f"{all_codes / fp32:.2f}", "<= 1.15"),
    ]

    histories = real_histories(five)
    if histories:
        targets = sum(events[:, 1:].numel() for events in histories)

        def epoch():
            for events in histories:
                step(events)

        seconds = best(epoch, 2) / targets
        rows.append(Row("cost of a target, real lengths : full length (fp32)", f"{1e3 * seconds:.2f} ms",
                        f"{1e3 / fp32:.2f} ms", f"{seconds * fp32:.2f}", "<= 1.3"))

    t5 = hf_t5_training_speed(bf16=False)
    t5_16 = hf_t5_training_speed(bf16=True)
    missing = "transformers not installed"
    return rows + [
        compared("training against HF T5, fp32", fp32, t5, " targets/s", form=".1f", missing=missing),
        compared("training against HF T5, bf16", bf16, t5_16, " targets/s", form=".1f", missing=missing),
        compared("training against HF T5, ours in bf16, T5 in fp32, as it is trained", bf16, t5, " targets/s",
                 ">= 50 x", form=".1f", missing=missing),
    ]


def real_histories(five):
    """24 batches of real lengths: each of one length, no padding. -> list of (B, T+1), empty without the data"""
    with tempfile.TemporaryDirectory() as folder:
        data = dataset(folder, "movietweetings-2013", "--image-size", 8)
    if data is None:
        return []
    torch.manual_seed(0)
    start, length = five.training_windows(data["offsets"], T)           # (W,) both
    histories = []
    for batch in five.equal_length_batches(length, BATCH * T)[:24]:
        place = torch.arange(length[batch[0]] + 1)                      # (T+1,)
        histories.append(data["events"][start[batch, None] + place].long())  # (B, T+1)
    return histories


def hf_t5():
    """The T5 of `transformers` at the same shape, or None."""
    try:
        torchvision_without_operators()  # transformers imports it if it is there
        from transformers import T5Config, T5ForConditionalGeneration
    except ImportError:
        return None
    config = T5Config(
        vocab_size=M * K + 5,
        d_model=SHAPE["width"],
        d_kv=SHAPE["head"],
        d_ff=SHAPE["inner"],
        num_layers=SHAPE["layers"],
        num_decoder_layers=SHAPE["layers"],
        num_heads=SHAPE["heads"],
        dropout_rate=SHAPE["dropout"],
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    return T5ForConditionalGeneration(config)


def hf_t5_training_speed(bf16, device="cpu", batch=32):
    """Targets a second: it learns one item after each history, as its public trainers do. -> float, or None"""
    model = hf_t5()
    if model is None:
        return None
    model.to(device)
    optimizer = torch.optim.AdamW(model.parameters())
    history = torch.randint(2, M * K, (batch, T * M), device=device)    # (B, T * M)
    written = torch.randint(2, M * K, (batch, L + 1), device=device)    # (B, L+1), and the end of the sequence

    def step():
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            loss = model(input_ids=history, attention_mask=torch.ones_like(history), labels=written).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return batch / best(step, 3, device)


def keep_freed_memory():
    """glibc gives large blocks back to the system, and half of HF's time goes into getting them again. From here on it
    keeps them, for both sides: HF's best."""
    M_TRIM_THRESHOLD = -1
    M_MMAP_MAX = -4
    with contextlib.suppress(AttributeError):  # another libc
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, 2 ** 31 - 1)


def bench_beam(N=10_000):
    """Beam 20 on full-length histories. HF gets a dictionary of prefixes as prefix_allowed_tokens_fn, as peers do."""
    keep_freed_memory()
    five = script(5)
    model, trie = some_generator(five, N)
    model.eval()
    history = torch.randint(1, N + 1, (24, T))                          # (B, T)

    def search(bf16):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            items, _ = five.beam_search(model, trie, history, 20)       # (B, 20)
        return items

    same = (search(bf16=True) == search(bf16=False)).float().mean()
    fp32 = 24 / best(lambda: search(bf16=False), 3)
    bf16 = 24 / best(lambda: search(bf16=True), 3)
    hf = hf_beam_speed(trie.codes, bf16=False)
    hf16 = hf_beam_speed(trie.codes, bf16=True)
    missing = "transformers not installed"
    return [
        compared("beam 20 against HF generate, fp32", fp32, hf, " users/s", ">= 20 x", ".1f", missing),
        compared(f"the same in bf16 ({same:.1%} of places hold the item of fp32)", bf16, hf16, " users/s", "", ".1f",
                 missing),
        compared("ours in bf16, HF in fp32", bf16, hf, " users/s", "", ".1f", missing),
    ]


def hf_beam_speed(codes, bf16, device="cpu", users=8):
    """Users a second of HF `generate`. codes: (N+1, L), users: at once; on a CPU 8 are faster for it than 16

    -> float, or None
    """
    model = hf_t5()
    if model is None:
        return None
    model.to(device).eval()
    history = torch.randint(2, M * K, (users, T * M), device=device)    # (B, T * M)
    follows = tokens_by_prefix(codes)

    def allowed(_, written):
        return follows.get(tuple(written.tolist()), [1])  # after a whole item: 1, the end

    @torch.no_grad()
    def generate():
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            model.generate(
                input_ids=history,
                attention_mask=torch.ones_like(history),
                num_beams=20,
                num_return_sequences=20,
                max_new_tokens=L + 1,
                prefix_allowed_tokens_fn=allowed,
            )

    return users / best(generate, 2, device)


def tokens_by_prefix(codes):
    """Which tokens may follow a prefix of HF's. (N+1, L) -> dict: (0, token, ..) -> sorted list of tokens"""
    # HF's T5 has its own tokens 0 (padding, and what a sequence begins with) and 1 (its end). Code k of level l is
    # token 2 + l * K + k.
    tokens = 2 + K * torch.arange(L) + codes[1:]                        # (N, L)
    follows = {}
    for item in tokens.tolist():
        for l in range(L):
            prefix = (0, *item[:l])
            follows.setdefault(prefix, set()).add(item[l])
    return {prefix: sorted(tokens) for prefix, tokens in follows.items()}


def bench_trie(N=1_000_000):
    """The tree of a million items at K 256, and the loss on it."""
    five = script(5)
    torch.manual_seed(0)
    codes = unique_codes(N)                                             # (N+1, L)
    seconds = best(lambda: five.Trie(codes, K), 3)
    trie = five.Trie(codes, K)
    tensors = [*trie.edges, *trie.allowed, trie.path, trie.codes, trie.leaf_item]
    mebibytes = sum(tensor.nbytes for tensor in tensors) / 2 ** 20

    targets = torch.randint(1, N + 1, (2560,))                          # (n,)
    logits = torch.randn(2560, L, K, requires_grad=True)                # (n, L, K)

    def loss(constrained):
        five.code_losses(logits, targets, trie, constrained).sum().backward()

    children = best(lambda: loss(constrained=True), 20)
    all_codes = best(lambda: loss(constrained=False), 20)
    return [
        Row(f"tree of {N:,} items", f"{seconds:.2f} s", asked="<= 10 s"),
        Row("its tensors", f"{mebibytes:.0f} MiB", asked="<= 200 MB"),
        Row("the loss alone, without the model: constrained : unconstrained", f"{1e3 * children:.1f} ms",
            f"{1e3 * all_codes:.1f} ms", f"{children / all_codes:.2f}"),
    ]


# --- 05: time to equal quality ----------------------------------------------------------------------------------------
# Public trainers learn one target of a history at a time, with an encoder in which every item sees all others. Ours
# learns the targets after all places at once, for which no item may see a later one. Which is sooner as good?


def make_bidirectional(five, model):
    """Changes a generator: every item of the history sees all others, and only the item after the last is written."""

    class BothWays(five.RelativeBias):
        def forward(self, T, first=0):
            # As in RelativeBias, but nothing is barred: one half of the distances is for what comes later.
            half = self.item.shape[1] // 2
            place = torch.arange(T)                                     # (T,)
            distance = place.unsqueeze(1) - place                       # (T, T)
            column = distance.abs().clamp(max=half - 1)                 # (T, T)
            column = column + half * (distance < 0)                     # (T, T)
            item = self.item[:, column]                                 # (H, T, T)
            item = item[:, :, None, :, None]                            # (H, T, 1, T, 1)
            slot = self.slot[:, None, :, None, :]                       # (H, 1, slots, 1, slots)
            return (item + slot).flatten(3).flatten(1, 2)               # (H, T * slots, T * slots)

    class LastAsks(five.RelativeBias):
        def forward(self, T, first=0):
            return super().forward(T, first=T - 1)                      # (H, L, T * M)

    model.encoder_bias = BothWays(*model.encoder_bias.slot.shape)
    model.cross_bias = LastAsks(*model.cross_bias.slot.shape)


def training_pairs(offsets, T):
    """Each target of training for itself. The history is events[start:start+length], the target the event after it.

    -> start, length (pairs,) both
    """
    starts = []
    lengths = []
    for begin, end in itertools.pairwise(offsets.tolist()):
        # A user's first event has nothing before it, the last two are held out.
        for target in range(begin + 1, end - 2):
            start = max(begin, target - T)
            starts.append(start)
            lengths.append(target - start)
    return torch.tensor(starts), torch.tensor(lengths)


def epoch_of_pairs(five, model, trie, optimizer, epoch, data, pairs, args):
    """As train_epoch of 05, but a step has as many pairs as ours has targets."""
    torch.manual_seed(1000 * args.seed + epoch)
    model.train()
    start, length = pairs                                               # (pairs,) both
    batches = []
    for one_length in five.equal_length_batches(length, batch_events=10 ** 9):  # all pairs of that length
        batches += one_length.split(args.batch)
    order = torch.randperm(len(batches))
    for i, number in enumerate(order):
        batch = batches[number]                                         # (B,)
        done = (epoch + i / len(batches)) / args.epochs
        optimizer.param_groups[0]["lr"] = five.learning_rate(done, args.lr)
        place = torch.arange(length[batch[0]] + 1)                      # (T+1,)
        events = data["events"][start[batch, None] + place].long()      # (B, T+1)
        step_of_pairs(five, model, trie, optimizer, events, args)


def step_of_pairs(five, model, trie, optimizer, events, args):
    """As train_step of 05, but only the last event is a target. events: (B, T+1)"""
    history = events[:, :-1]                                            # (B, T)
    target = events[:, -1:]                                             # (B, 1)
    logits = model(history, target, args.masking)                       # (B, 1, L, K)
    losses = five.code_losses(logits.flatten(0, 1), target.flatten(), trie)  # (L,)
    (losses.sum() / args.batch).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), five.CLIP)
    optimizer.step()
    optimizer.zero_grad()


def quality_over_time(folder, seed, epochs, both_ways):
    """Trains 05 with its defaults but for the epochs. -> [(seconds of training, validation NDCG@10)], one an epoch

    Seconds are the processor's (OMP_NUM_THREADS=1: of one core): other work does not lengthen them.
    """
    five = script(5)
    line = ["--run", folder, "--seed", seed, "--epochs", epochs, "--device", "cpu"]
    args = five.options([str(part) for part in line])
    args.rank = 0
    args.world = 1
    run = five.Run(folder)
    data = run.load("data.pt", "01_data.py")
    sources = five.read_codes(run, data, args)

    torch.manual_seed(seed)
    model, trie = five.build(sources, data, args)
    if both_ways:
        make_bidirectional(five, model)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=five.WEIGHT_DECAY, fused=True)
    users = torch.randperm(len(data["user_ids"]))[:five.VALIDATION_USERS]  # (n,)
    pairs = training_pairs(data["offsets"], args.length)
    state = {"losses": [], "ndcg": []}
    spent = 0.0
    curve = []
    for epoch in range(epochs):
        began = time.process_time()
        if both_ways:
            epoch_of_pairs(five, model, trie, optimizer, epoch, data, pairs, args)
        else:
            losses = five.train_epoch(model, trie, optimizer, state, epoch, data, args)  # (L,)
            state["losses"].append(losses)
        spent += time.process_time() - began

        ndcg = five.validate(model, trie, data, users, args)
        state["ndcg"].append(ndcg)
        curve.append((spent, ndcg))
        way = "both ways" if both_ways else "one pass"
        print(f"{way} seed {seed}, epoch {epoch}: {spent:.0f} s, NDCG@10 {ndcg:.4f}", file=sys.stderr, flush=True)
    return curve


def seconds_until(curve, goal):
    """When a curve is as high as the goal for the first time; infinite if never."""
    for seconds, ndcg in curve:
        if ndcg >= goal:
            return seconds
    return math.inf


def bench_quality(name="movietweetings-2013", seeds=3, slow_epochs=5, epochs=8, options=()):
    """Validation NDCG@10 over seconds of training, both ways. The codes are made by the scripts' defaults."""
    rows = []
    for seed in range(seeds):
        with tempfile.TemporaryDirectory() as folder:
            if dataset(folder, name, *options) is None:
                return [Row(f"time to equal quality on {name}", "skipped", asked=">= 5 x sooner")]
            for number in (2, 3, 4):
                run_script(number, "--run", folder, "--seed", seed).check_returncode()
            slow = quality_over_time(folder, seed, slow_epochs, both_ways=True)
            quick = quality_over_time(folder, seed, epochs, both_ways=False)
        goal = max(ndcg for _, ndcg in slow)
        best_of_ours = max(ndcg for _, ndcg in quick)
        ours = seconds_until(quick, goal)
        theirs = seconds_until(slow, goal)
        what = (f"seed {seed}: seconds to NDCG@10 {goal:.4f}, the best of a pair at a time; best of ours "
                f"{best_of_ours:.4f}")
        rows.append(Row(what, f"{ours:.0f} s", f"{theirs:.0f} s", f"{theirs / ours:.1f} x", ">= 5 x sooner"))
    return rows


# --- 02: SASRec -------------------------------------------------------------------------------------------------------


def sasrec_ours(folder, batch, steps, precision="fp32", sampled_from=None):
    """train_epoch of 02_sasrec.py on a real run, its first 10 steps not counted. -> targets/s, s/step

    sampled_from: in larger catalogues the softmax is sampled; None: as the script has it
    """
    two = script(2)
    if sampled_from is not None:
        two.SAMPLED_FROM = sampled_from

    # The epoch is the script's own; each of its steps notes when it ended, and how many targets it had.
    ends = []
    targets = []
    train_step = two.train_step

    def noted_step(model, replica, optimizer, lr, events, log_q, args):
        loss = train_step(model, replica, optimizer, lr, events, log_q, args)
        ends.append(time.perf_counter())
        targets.append(events[:, 1:].numel())
        return loss

    two.train_step = noted_step
    line = ["--run", folder, "--batch", batch, "--max-steps", steps, "--precision", precision, "--device", "cpu"]
    args = two.options([str(part) for part in line])
    args.rank = 0
    args.world = 1
    run = two.Run(folder)
    data = run.load("data.pt", "01_data.py")
    with contextlib.redirect_stdout(io.StringIO()):
        model = two.build(run, data, args)
        optimizer = torch.optim.Adam(model.parameters(), fused=True)
        state = {"losses": [], "ndcg": [], "step": 0}
        two.train_epoch(model, model, optimizer, state, 0, data, args)

    seconds = ends[-1] - ends[9]
    counted = targets[10:]
    return sum(counted) / seconds, seconds / len(counted)


def sasrec_recbole(data, batch):
    """Its Trainer._train_epoch with its DataLoader: each prefix of a history is a sample. Yields targets of a step."""
    np.float_ = np.float64  # gone from numpy 2
    np.complex_ = np.complex128
    np.unicode_ = np.str_
    from recbole.config import Config
    from recbole.data import create_dataset, data_preparation
    from recbole.model.sequential_recommender import SASRec
    from recbole.trainer import Trainer
    torch.autograd.set_detect_anomaly(False)  # a model of RecBole's turns it on for the whole process

    folder = Path(tempfile.mkdtemp()) / "real"
    folder.mkdir()
    os.chdir(folder)    # it writes logs where it stands
    sys.argv[1:] = []   # it reads the command line
    lines = ["user_id:token\titem_id:token\ttimestamp:float"]
    events = data["events"].tolist()
    for user, (begin, end) in enumerate(itertools.pairwise(data["offsets"].tolist())):
        for i in range(begin, end):
            lines.append(f"{user}\t{events[i]}\t{i - begin}")
    (folder / "real.inter").write_text("\n".join(lines))

    config = Config("SASRec", "real", config_dict={
        "data_path": str(folder.parent),
        "MAX_ITEM_LIST_LENGTH": 20,
        "train_batch_size": batch,
        "loss_type": "CE",
        "train_neg_sample_args": None,
        "use_gpu": False,
        "show_progress": False,
        "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
        "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "mode": "full"},
    })
    train, _, _ = data_preparation(config, create_dataset(config))
    trainer = Trainer(config, SASRec(config, train.dataset))
    while True:
        for interaction in train:
            trainer._train_epoch([interaction], 0)  # a list of one batch is an epoch of one step
            yield len(interaction)


def sasrec_pmixer(data, batch):
    """Its sampler (3 processes), model and optimizer; its binary loss replaced by the softmax. Yields targets."""
    sys.path[:0] = [str(PEERS / "SASRec.pytorch" / "python"), str(PEERS / "SASRec.pytorch")]
    for name in ("model", "utils"):  # names that another peer has as well
        sys.modules.pop(name, None)
    from model import SASRec
    from utils import WarpSampler

    events = data["events"].tolist()
    train = {}  # user, from 1 -> events of training
    for begin, end in itertools.pairwise(data["offsets"].tolist()):
        train[len(train) + 1] = events[begin:end - 2]
    U = len(train)
    N = len(data["item_ids"]) - 1
    sampler = WarpSampler(train, U, N, batch_size=batch, maxlen=20, n_workers=3)
    size = types.SimpleNamespace(
        device="cpu",
        hidden_units=64,
        maxlen=20,
        dropout_rate=0.5,
        num_blocks=2,
        num_heads=2,
        norm_first=True,
    )
    model = SASRec(U, N, size).train()
    for layer in model.forward_layers:  # its own have 64 hidden units, not 4 x 64
        layer.conv1 = torch.nn.Conv1d(64, 256, 1)
        layer.conv2 = torch.nn.Conv1d(256, 64, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, betas=(0.9, 0.98))
    while True:
        _, history, target, _ = sampler.next_batch()
        target = np.array(target)                                       # (B, T), 0: padding
        place = np.where(target != 0)
        hidden = model.log2feats(np.array(history))[place]              # (n, E)
        scores = hidden @ model.item_emb.weight.T                       # (n, N+1)
        optimizer.zero_grad()
        F.cross_entropy(scores, torch.LongTensor(target[place])).backward()
        optimizer.step()
        yield len(hidden)


def speed_of(loop, seconds=5):
    """Targets a second of a peer, which makes a step each time it is asked."""
    next(loop)  # it warms up
    targets = 0
    began = time.time()
    while time.time() - began < seconds:
        targets += next(loop)
    return targets / (time.time() - began)


def sasrec_speeds(folder, data, rounds=3):
    """Targets a second at several sizes of batch; the best of some rounds counts. -> dict: who -> number"""
    peers = []  # who, and a loop that makes a step each time it is asked
    for who, begin, batches in (("recbole", sasrec_recbole, (2048, 128)), ("pmixer", sasrec_pmixer, (128, 16))):
        try:
            for batch in batches:
                loop = begin(data, batch)
                next(loop)
                peers.append((who, loop))
        except ImportError as error:
            print(f"{who} is left out: {error} (pip, or {PEERS}/SASRec.pytorch)")

    fastest = {}
    for _ in range(rounds):  # one after another, so that a busy moment hits all
        for precision in ("fp32", "bf16"):
            for batch in (256, 512, 1024, 2048):
                speed, _ = sasrec_ours(folder, batch, 30_000 // batch, precision)
                fastest[precision] = max(speed, fastest.get(precision, 0))
        for who, loop in peers:
            fastest[who] = max(speed_of(loop), fastest.get(who, 0))
    return fastest


def bench_sasrec():
    """Training on real data, everybody at several sizes of batch."""
    rows = []
    for name in ("movietweetings-2013", "amazon-beauty-2014"):
        folder = Path(tempfile.mkdtemp())
        data = dataset(folder, name, "--image-size", 8)
        if data is None:
            continue
        speed = sasrec_speeds(folder, data)
        for who, called in (("recbole", "RecBole"), ("pmixer", "pmixer")):
            for precision in ("fp32", "bf16"):
                what = f"SASRec, {name}, ours in {precision} against {called}: targets/s"
                rows.append(compared(what, speed[precision], speed.get(who), asked=">= 3x"))
    return rows


class Trial(NamedTuple):
    """Some steps of 02 on a large catalogue."""
    batch: int
    steps: int
    softmax: str


def bench_sasrec_scale(N=400_000, U=700_000):
    """400,000 items, 700,000 users, 6.5 million random events: seconds a step and hours an epoch."""
    folder = Path(tempfile.mkdtemp())
    rng = torch.Generator().manual_seed(0)
    lengths = 5 + torch.poisson(torch.full((U,), 4.3), generator=rng).long()  # (U,)
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])  # (U+1,)
    # A cube makes low numbers frequent: an eighth of the events are of 1/512 of the items.
    share = torch.rand(int(offsets[-1]), generator=rng) ** 3            # (events,)
    events = 1 + (N * share).int().clamp(0, N - 1)                      # (events,)
    data = {
        "made_from": {},
        "item_ids": [""] * (N + 1),
        "user_ids": [""] * U,
        "events": events,
        "offsets": offsets,
        "train_counts": torch.bincount(events, minlength=N + 1),        # (N+1,)
    }
    torch.save(data, folder / "data.pt")

    targets = (lengths - 3).sum().item()
    rows = []
    for trial in (Trial(128, 30, "sampled"), Trial(4096, 20, "sampled"), Trial(128, 16, "full")):
        sampled_from = 0 if trial.softmax == "sampled" else N
        speed, step = sasrec_ours(folder, trial.batch, trial.steps, sampled_from=sampled_from)
        what = f"SASRec, {N:,} items, {trial.softmax} softmax, batch {trial.batch}: s/step, hours/epoch"
        rows.append(Row(what, f"{step:.3f}, {targets / speed / 3600:.2f}"))
    return rows


# --- 03: RQ-DINO and residual k-means ---------------------------------------------------------------------------------


class Shape(NamedTuple):
    """Of one comparison with DINO."""
    name: str
    size: int    # pixels along a global crop
    local: int   # and along a local one
    patch: int
    width: int
    depth: int
    crops: int   # local ones
    batch: int
    steps: int


DINO_SHAPES = [
    Shape("32 px, ViT 96 x 3, 2 + 2 crops", size=32, local=16, patch=8, width=96, depth=3, crops=2, batch=64, steps=12),
    Shape("64 px, ViT-S/16, 2 + 8 crops", size=64, local=32, patch=16, width=384, depth=12, crops=8, batch=4, steps=5),
]

WAYS = {  # ours, options of 03
    "quantiser": "",
    "--plain": "--plain",
    "quantiser, bf16": "--precision bf16",
}


def pace(run, batch):
    """Pictures a second by the median step of a training, after two to warm up, silently."""
    ends = []

    def note(*_):
        ends.append(time.perf_counter())

    hook = register_optimizer_step_post_hook(note)
    with contextlib.redirect_stdout(io.StringIO()):
        run()
    hook.remove()
    steps = [after - before for before, after in itertools.pairwise(ends[1:])]
    return batch / statistics.median(steps)


def dino_ours(images, shape, options):
    """The real loop of 03 on a folder of its own. images: (n, 3, S, S) -> pictures/s"""
    three = script(3)
    known = torch.arange(len(images) + 1) > 0                           # (N+1,)
    with tempfile.TemporaryDirectory() as folder:
        with_padding = torch.cat([images[:1], images])                  # (N+1, 3, S, S)
        torch.save({"made_from": {}, "images": with_padding}, f"{folder}/images.pt")
        torch.save({"made_from": {}, "has_image": known}, f"{folder}/data.pt")
        line = ["--run", folder, "--device", "cpu", "--batch", shape.batch, "--max-steps", shape.steps,
                "--width", shape.width, "--depth", shape.depth, "--local-crops", shape.crops, "--epochs", 99,
                "--out-dim", 1024]
        argv = [str(part) for part in line] + options.split()
        return pace(lambda: three.main(argv), shape.batch)


def dino_theirs(images, shape, workers):
    """train_one_epoch of facebookresearch/dino as it stands; same ViT and head, pictures decoded already."""
    import main_dino
    import utils
    import vision_transformer
    augment = main_dino.DataAugmentationDINO((0.4, 1.0), (0.1, 0.4), shape.crops)
    augment.global_transfo1.transforms[0].size = (shape.size, shape.size)
    augment.global_transfo2.transforms[0].size = (shape.size, shape.size)
    augment.local_transfo.transforms[0].size = (shape.local, shape.local)
    decoded = [Image.fromarray(x.permute(1, 2, 0).numpy()) for x in images]

    class Pictures(torch.utils.data.Dataset):
        def __len__(self):
            return shape.steps * shape.batch

        def __getitem__(self, i):
            return augment(decoded[i % len(decoded)]), 0

    def network():
        vit = vision_transformer.VisionTransformer(
            img_size=[shape.size],
            patch_size=shape.patch,
            embed_dim=shape.width,
            depth=shape.depth,
            num_heads=max(3, shape.width // 64),
            qkv_bias=True,
            norm_layer=functools.partial(torch.nn.LayerNorm, eps=1e-6),
        )
        head = vision_transformer.DINOHead(
            shape.width, 1024, hidden_dim=4 * shape.width, bottleneck_dim=shape.width)
        return utils.MultiCropWrapper(vit, head)

    student = network()
    teacher = network()
    teacher.load_state_dict(student.state_dict())
    teacher.requires_grad_(False)
    student = torch.nn.parallel.DistributedDataParallel(student)
    loader = torch.utils.data.DataLoader(
        Pictures(), shape.batch, shuffle=True, num_workers=workers, drop_last=True)
    loss = main_dino.DINOLoss(1024, shape.crops + 2, 0.04, 0.04, 0, 1)
    optimizer = torch.optim.AdamW(utils.get_params_groups(student))
    constant = [1e-3] * shape.steps  # learning rate, weight decay, momentum: they cost nothing
    args = argparse.Namespace(epochs=1, clip_grad=3.0, freeze_last_layer=1)

    def epoch():
        main_dino.train_one_epoch(student, teacher, teacher, loss, loader, optimizer,
                                  constant, constant, constant, 0, None, args)

    return pace(epoch, shape.batch)


def make_dino_run_on_a_cpu():
    """The peer expects CUDA, several processes, and a torchvision whose operators load: none of it is timed."""
    sys.path.insert(0, str(PEERS / "dino"))
    torchvision_without_operators()

    def stays(tensor, **_):
        return tensor

    def nothing(*_):
        pass

    torch.Tensor.cuda = stays
    torch.cuda.synchronize = nothing
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    import utils
    utils.MetricLogger.synchronize_between_processes = nothing


def bench_dino(shapes=DINO_SHAPES):
    """Pictures a second of training on CPU; the peer may choose how many processes load pictures."""
    workers = []
    missing = "PEERS/dino: facebookresearch/dino"
    if (PEERS / "dino" / "main_dino.py").exists():
        workers = [0, 1, 2]
        make_dino_run_on_a_cpu()

    rows = []
    for shape in shapes:
        rng = torch.Generator().manual_seed(0)
        images = torch.randint(256, (shape.steps * shape.batch, 3, 8, 8), generator=rng).float()  # (n, 3, 8, 8)
        images = F.interpolate(images, (shape.size, shape.size), mode="bilinear").byte()  # (n, 3, S, S)
        fastest = {}
        peer = None
        for _ in range(2):  # one after another, so that a busy moment hits all
            for way, options in WAYS.items():
                speed = dino_ours(images, shape, options)
                fastest[way] = max(speed, fastest.get(way, 0))
            for number in workers:
                speed = dino_theirs(images, shape, number)
                peer = max(speed, peer or 0)
        for way in WAYS:
            what = f"03, pictures/s in training, {shape.name}, {way}"
            rows.append(compared(what, fastest[way], peer, asked=">= 2", form=".1f", missing=missing))
    return rows


def bench_residual_kmeans(n=100_000):
    """Seconds to learn and apply 3 x 256 codes of 100,000 vectors of 64, and the error that is left."""
    two = script(2)
    rng = torch.Generator().manual_seed(0)
    centres = torch.randn(400, 64, generator=rng)                       # (400, d)
    x = centres[torch.randint(400, (n,), generator=rng)]                # (n, d)
    deviation = 0.3 * torch.rand(64, generator=rng)                     # (d,)
    x = x + deviation * torch.randn(x.shape, generator=rng)             # (n, d)

    def ours():
        codebooks = two.residual_kmeans(x, 256, torch.Generator().manual_seed(0))  # (3, K, d)
        _, left = two.quantise(x, codebooks)                            # (n, d)
        return x - left                                                 # (n, d)

    def with_faiss(beam):
        quantizer = faiss.ResidualQuantizer(64, 3, 8)  # 8 bits a level: 256 centroids
        quantizer.max_beam_size = beam
        quantizer.train(x.numpy())
        return torch.from_numpy(quantizer.decode(quantizer.compute_codes(x.numpy())))  # (n, d)

    ways = {"ours": ours}
    try:
        import faiss
        ways["faiss, beam 1"] = functools.partial(with_faiss, 1)
        ways["faiss, beam 5"] = functools.partial(with_faiss, 5)
    except ImportError:
        faiss = None

    rows = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        if faiss is not None:
            faiss.omp_set_num_threads(threads)
        seconds = {}
        shown = {}
        for way, work in [*ways.items()] * 2:  # twice, one after another
            began = time.perf_counter()
            decoded = work()                                            # (n, d)
            took = time.perf_counter() - began
            seconds[way] = min(took, seconds.get(way, math.inf))
            error = (x - decoded).square().sum(1).mean()                # ()
            shown[way] = f"{seconds[way]:.2f} s, error {error:.3f}"

        what = f"residual k-means, {threads} threads"
        if faiss is None:
            rows.append(Row(what, shown["ours"], "faiss not installed", "", ">= 1"))
        for way in list(ways)[1:]:
            ratio = seconds[way] / seconds["ours"]
            rows.append(Row(f"{what}, against {way}", shown["ours"], shown[way], f"{ratio:.2f}",
                            ">= 1, error no larger"))
    return rows


# --- 01: five million reviews -----------------------------------------------------------------------------------------


def scrambled(number, prime):
    """Another number for each one below 2^32: ids come in another order than popularity."""
    return number * prime % 2 ** 32


def make_reviews(folder, n, seed=0):
    """reviews.jsonl.gz, about 540 bytes a line; few users and items have many events, 1 % repeat."""
    rng = np.random.default_rng(seed)
    words = []
    for letters in rng.integers(2, 10, 5000):
        words.append(bytes(rng.integers(97, 123, letters, np.uint8)).decode())
    texts = []
    for _ in range(5000):
        text = " ".join(rng.choice(words, rng.integers(20, 80)))
        texts.append(text.replace("aa", "\u00e9 \\\"n\\\""))  # what JSON must undo
    user = (n // 6 * rng.random(n) ** 3).astype(int)                    # (n,)
    item = (n // 20 * rng.random(n) ** 3).astype(int)                   # (n,)
    again = rng.integers(0, n, n // 100)                                # (n / 100,)
    user[again[1:]] = user[again[:-1]]
    item[again[1:]] = item[again[:-1]]
    times = rng.integers(10 ** 12, 16 * 10 ** 11, n)                    # (n,)

    folder.mkdir(parents=True, exist_ok=True)
    with gzip.open(folder / "reviews.jsonl.gz", "wb", 1) as file:
        for e in range(n):
            asin = f"B{scrambled(item[e], 2654435761):010X}"
            verified = "true" if e % 9 else "false"
            line = (
                f'{{"rating": {e % 5 + 1}.0, "title": "{words[e % 5000]} {words[e * 7 % 5000]}", '
                f'"text": "{texts[e * 11 % 5000]}", "images": [], "asin": "{asin}", '
                f'"parent_asin": "{asin}", "user_id": "AG{scrambled(user[e], 2246822519):026X}", '
                f'"timestamp": {times[e]}, "helpful_vote": {e % 3}, "verified_purchase": {verified}}}\n'
            )
            file.write(line.encode())
    (folder / "meta.jsonl").write_text(json.dumps({"parent_asin": asin, "title": "an item"}) + "\n")


# What a practitioner writes: types not guessed, three columns kept of each chunk, ids numbered
# once, then the rules on integers. Equal times stay in the file's order (--ties file). It runs with
# an interpreter of its own, which counts, like ours, from its start to the written file.
PANDAS_SIDE = """
import sys
import numpy as np, pandas as pd
chunks = pd.read_json(sys.argv[1], lines=True, chunksize=100_000, dtype=False)
x = pd.concat([c[["user_id", "parent_asin", "timestamp"]] for c in chunks], ignore_index=True)
user, users = pd.factorize(x.user_id, sort=True)
item, items = pd.factorize(x.parent_asin, sort=True)
x = pd.DataFrame({"user": user, "item": item, "time": x.timestamp})
x = x.sort_values(["user", "time"], kind="stable").drop_duplicates(["user", "item"])
before = -1
while len(x) != before:
    before = len(x)
    of_user, of_item = x.groupby("user").item.transform("size"), x.groupby("item").user.transform("size")
    x = x[(of_user >= 5) & (of_item >= 5)]
user, left_users = pd.factorize(x.user, sort=True)
item, left_items = pd.factorize(x["item"], sort=True)
np.savez(sys.argv[2], events=item + 1, offsets=np.r_[0, np.bincount(user).cumsum()],
         user_ids=np.array(users[left_users], str), item_ids=np.array(items[left_items], str))
"""


class Watched(NamedTuple):
    """How a command went."""
    code: int
    seconds: float
    peak: float       # GiB, pages of mapped files as well, which the system may drop at any time
    anonymous: float  # GiB of anonymous memory
    printed: str


def watch(line):
    """Runs a command line. -> Watched"""
    began = time.time()
    most = {"VmHWM": 0, "RssAnon": 0}  # KiB
    with tempfile.TemporaryFile("w+") as printed:
        child = subprocess.Popen(line, stdout=printed, stderr=subprocess.STDOUT)
        while child.poll() is None:
            with contextlib.suppress(OSError):  # it has ended by now
                status = Path(f"/proc/{child.pid}/status").read_text()
                fields = dict(entry.split(":", 1) for entry in status.splitlines())
                for key in most:
                    now = int(fields.get(key, "0").split()[0])
                    most[key] = max(most[key], now)
            time.sleep(0.2)
        seconds = time.time() - began
        printed.seek(0)
        return Watched(child.returncode, seconds, most["VmHWM"] / 2 ** 20, most["RssAnon"] / 2 ** 20, printed.read())


def watch_success(line):
    """The same, of a command that must work."""
    watched = watch(line)
    if watched.code != 0:
        sys.exit(f"{line} ends with exit code {watched.code}:\n{watched.printed}")
    return watched


def same_data(ours, pandas):
    """Have data.pt and what pandas wrote the same events, offsets and ids?"""
    ours = torch.load(ours, weights_only=True)
    theirs = np.load(pandas)
    pairs = [
        (ours["events"], theirs["events"]),
        (ours["offsets"], theirs["offsets"]),
        (ours["item_ids"][1:], theirs["item_ids"]),
        (ours["user_ids"], theirs["user_ids"]),
    ]
    return all(np.array_equal(a, b) for a, b in pairs)


def bench_data(n=5_000_000):
    """Ours, pandas, ours again after a kill: seconds, memory, and whether the results are equal."""
    with tempfile.TemporaryDirectory() as temporary:
        home = Path(os.environ.get("BENCH_DATA", temporary))  # to use the same reviews again
        reviews = home / "reviews" / "reviews.jsonl.gz"
        if not reviews.exists():
            make_reviews(reviews.parent, n)
        data = home / "run" / "data.pt"
        line = command(1, "--run", data.parent, "--dataset", reviews.parent, "--ties", "file", "--image-size", 8)
        ours = watch_success(line)
        whole = data.read_bytes()

        what = f"01_data.py: {n:,} reviews, seconds"
        if importlib.util.find_spec("pandas"):
            written = home / "pandas.npz"
            peer = watch_success([sys.executable, "-c", PANDAS_SIDE, str(reviews), str(written)])
            ratio = peer.seconds / ours.seconds
            rows = [
                Row(what, f"{ours.seconds:.1f}", f"{peer.seconds:.1f}", f"{ratio:.2f}", ">= 2x"),
                Row("  peak GiB", f"{ours.peak:.2f}", f"{peer.peak:.2f}", "", "<= 1.5 (GB)"),
                Row("  events, offsets, ids equal to pandas'", str(same_data(data, written)), asked="True"),
            ]
        else:
            rows = [Row(what, f"{ours.seconds:.1f}", "pandas not installed", "", ">= 2x")]

        data.unlink()
        child = subprocess.Popen(line, stdout=subprocess.DEVNULL)
        time.sleep(ours.seconds / 2)
        child.kill()
        was_killed = child.wait() != 0 and not data.exists()
        again = watch_success(line)
        same = was_killed and data.read_bytes() == whole
        rows.append(Row("  killed half-way, run again: the same bytes", str(same), f"({again.seconds:.1f} s)",
                        asked="True"))
    return rows


# --- All: the paper's scale -------------------------------------------------------------------------------------------


def make_shop(folder, N=400_000, U=700_000, events=6_500_000, seed=0):
    """A folder for 01_data.py. Items are in hidden groups of 200 with words and pictures of their own; four of five
    events of a user are in one group. The 5-core keeps nearly everything."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    groups = max(1, N // 200)
    events = int(1.068 * events)  # 6.4 % repeat what the user had, and are dropped
    user, item, when = draw_purchases(rng, N, U, events, groups)
    write_items(folder, rng, N, groups)
    write_pictures(folder, rng)
    write_purchases(folder, user, item, when)  # last: where it is, all is there


def draw_purchases(rng, N, U, events, groups):
    """Who bought what, and when. -> user, item, when (events,) each"""
    # Six events each; the rest unevenly, as a square makes low numbers frequent.
    rest = (U * rng.random(events - 6 * U) ** 2).astype(int)            # (events - 6 U,)
    user = np.repeat(np.arange(U), 6 + np.bincount(rest, minlength=U))  # (events,)

    in_own_group = rng.random(events) < 0.8                             # (events,)
    own_group = rng.integers(0, groups, U)[user]                        # (events,)
    any_group = rng.integers(0, groups, events)                         # (events,)
    group = np.where(in_own_group, own_group, any_group)                # (events,)

    # Spread the events of each group over its items: number them from 0 in any order, and divide by how many there
    # are. These shares lie evenly between 0 and 1, so that no item of a group is left out.
    order = np.lexsort((rng.random(events), group))                     # (events,)
    sorted_group = group[order]                                         # (events,)
    size = np.bincount(group, minlength=groups)[sorted_group]           # (events,)
    first = np.searchsorted(sorted_group, sorted_group)                 # (events,) where the event's group begins
    number = np.arange(events) - first                                  # (events,)
    share = (number + rng.random(events)) / size                        # (events,)

    # 45 % of the events fall on all items alike, 55 % on few: the fourth power makes low shares frequent.
    even = share / 0.45                                                 # (events,)
    popular = ((share - 0.45) / 0.55) ** 4                              # (events,)
    share = np.where(share < 0.45, even, popular)                       # (events,)
    in_group = (share * (N // groups)).astype(int)                      # (events,)
    item = np.empty(events, int)                                        # (events,)
    item[order] = sorted_group + groups * in_group                      # item i is in group i % groups
    when = 1_300_000_000_000 + rng.integers(0, 3 * 10 ** 11, events)    # (events,), ms
    return user, item, when


def write_items(folder, rng, N, groups):
    """meta.jsonl.gz: 40 words an item, of which some are those of its group, two categories, a picture."""
    words = []
    for letters in rng.integers(3, 10, 30_000):
        words.append("".join(chr(letter) for letter in rng.integers(97, 123, letters)))
    words = np.array(words)                                             # (30000,)
    with gzip.open(folder / "meta.jsonl.gz", "wt", compresslevel=1) as file:
        for part in np.array_split(np.arange(N), max(1, N // 10_000)):  # (part,)
            word = (30_000 ** rng.random((len(part), 40))).astype(int)  # (part, 40): Zipf's law
            of_group = (part % groups * 7919)[:, None] + word % 31      # (part, 40): 31 words of its own
            word = np.where(rng.random(word.shape) < 0.3, of_group, word) % 30_000  # (part, 40)
            for i, line in zip(part.tolist(), words[word].tolist()):
                group = i % groups
                file.write(
                    f'{{"parent_asin": "B{i:09d}", "title": "{" ".join(line[:6])}", '
                    f'"description": ["{" ".join(line[6:])}."], '
                    f'"categories": ["kind {group % 40}", "group {group}"], "images": '
                    f'[{{"large": "images/p{(group + i) % 1000}.jpg", "variant": "MAIN"}}]}}\n'
                )


def write_pictures(folder, rng):
    """A thousand of them: coloured grids of a few cells."""
    for k in range(1000):
        grid = rng.integers(0, 256, (2 + k % 5, 2 + k % 3, 3), np.uint8)
        Image.fromarray(grid).resize((96, 96)).save(folder / f"images/p{k}.jpg")


def write_purchases(folder, user, item, when):
    """reviews.jsonl.gz, under another name until it is complete."""
    with gzip.open(folder / "reviews.partial", "wt", compresslevel=1) as file:
        for u, i, t in zip(user.tolist(), item.tolist(), when.tolist()):
            file.write(
                f'{{"rating": {t % 5 + 1}.0, "title": "Five stars", "text": "It does what it '
                f'should, and came in time.", "images": [], "asin": "B{i:09d}", "parent_asin": '
                f'"B{i:09d}", "user_id": "AE{u:026d}", "timestamp": {t}, "helpful_vote": 0, '
                f'"verified_purchase": true}}\n'
            )
    os.replace(folder / "reviews.partial", folder / "reviews.jsonl.gz")


def bench_scale(scripts=(1, 2, 3, 4, 5, 6), steps=50):
    """All scripts in order; training for some steps. $BENCH_DIR keeps the shop and the run."""
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        home = Path(os.environ.get("BENCH_DIR", temporary))
        run = home / "run"
        if not (home / "shop" / "reviews.jsonl.gz").exists():
            make_shop(home / "shop")
        for number in scripts:
            options = []
            if number == 1:
                options = ["--dataset", home / "shop"]
            if number in (2, 3, 5):
                options = ["--max-steps", steps]
            if number == 5:
                # A trial of 02 or 03 makes no codes: 05 takes those of the texts for them.
                shutil.copy(run / "text_codes.pt", run / "image_codes.pt")
                shutil.copy(run / "text_codes.pt", run / "collab_codes.pt")
            watched = watch(command(number, "--run", run, *options))

            said = watched.printed.splitlines()
            if watched.code == 0:
                said = [line for line in said if "an epoch" in line]
            what = f"{SCRIPTS[number - 1].name} at the paper's scale; " + " ".join(said[-3:])
            cost = (f"{watched.seconds:.0f} s, {watched.anonymous:.1f} GiB, {watched.peak:.1f} with mapped files")
            rows.append(Row(what, cost, asked="<= 16 GB"))
    return rows


# --- 02, 03, 05: on a GPU ---------------------------------------------------------------------------------------------
# One command for whoever has a card. What is timed are the scripts' own steps and their own search, on random events:
# how long a step takes depends on shapes, not on what the numbers mean. What does not fit into the card's memory, or
# into the seconds of its part, is a row that says so.


class Sizes(NamedTuple):
    """What is measured on a GPU."""
    side: int        # of the matrices whose products are the peak
    N: int           # a small catalogue: 02 has a softmax over all items
    many: int        # a large one: 02 samples
    shapes: dict     # of 05, by name; the last is that of the check and of the search
    targets: tuple   # in a step of 02 and 05
    users: tuple     # searched at once; the first also in the check
    pictures: tuple  # in a step of 03
    vit: dict        # of 03
    pairs: tuple     # of a history and its target, in a step of HF's T5
    generated: tuple  # users at once in HF's search
    seconds: float   # of a size, after which no more runs are begun


FULL = Sizes(
    side=8192,
    N=10_000,
    many=400_000,
    shapes={
        "E 64": {"width": 64, "heads": 4, "head": 16, "inner": 256, "layers": 4, "dropout": 0.1},
        "E 128": SHAPE,
    },
    targets=(128, 1024, 4096, 16_384),
    users=(16, 64, 256, 1024),
    pictures=(16, 64, 128, 256),
    vit={"size": 224, "patch": 16, "E": 384, "depth": 12},  # ViT-S/16
    pairs=(32, 256, 1024),
    generated=(8, 64),
    seconds=1.0,
)
SMOKE = Sizes(
    side=256,
    N=500,
    many=60_000,
    shapes={
        "E 8": {"width": 8, "heads": 2, "head": 8, "inner": 16, "layers": 1, "dropout": 0.1},
        "E 16": {"width": 16, "heads": 2, "head": 8, "inner": 32, "layers": 1, "dropout": 0.1},
    },
    targets=(40, 80),
    users=(2, 4),
    pictures=(2, 4),
    vit={"size": 32, "patch": 16, "E": 48, "depth": 2},
    pairs=(2,),
    generated=(1,),
    seconds=0.2,
)
LOCAL_CROPS = 8
STEPS = 4  # timed together, so that the card need not wait for Python after each

# The paper's scale is the shop that `scale` makes, after its 5-core.
PAPER_ITEMS = 400_000
PAPER_USERS = 697_797
PAPER_EVENTS = 6_460_258
PAPER_TARGETS = PAPER_EVENTS - 3 * PAPER_USERS  # an epoch; no targets are a user's first event and the last two


class Machine(NamedTuple):
    """Where it is measured."""
    device: str
    peak: float  # operations a second in products of matrices
    sizes: Sizes


class Fact(NamedTuple):
    """A line of the table of the machine."""
    what: str
    value: str


class Agreement(NamedTuple):
    """A line of the table of the CPU against the GPU."""
    what: str
    largest_difference: str
    asked: str


class Speed(NamedTuple):
    """A line of the table of speeds."""
    what: str
    batch: str
    speed: str
    precision: str = ""
    TFLOPS: str = ""
    share_of_peak: str = ""
    peak_GiB: str = ""
    hours_at_paper_scale: str = ""


class Work(NamedTuple):
    """Something that is timed at several sizes."""
    rate: Callable         # of a size -> how many units a second
    unit: str
    bf16: bool
    operations: float = 0  # of a unit, as far as they are counted
    training: float = 0    # units of a whole training at the paper's scale


def bench_gpu(device="cuda", smoke=False):
    """Yields rows and lines while they are measured, which takes at most eight minutes on a GPU."""
    began = time.perf_counter()
    sizes = SMOKE if smoke else FULL
    bf16 = matmul_rate(torch.bfloat16, sizes.side, device)
    fp32 = matmul_rate(torch.float32, sizes.side, device)
    peak = 1e9 * max(bf16, fp32)  # bf16, but on some CPUs
    machine = Machine(device, peak, sizes)
    yield Fact("device", device_name(device))
    yield Fact("torch, CUDA", f"{torch.__version__}, {torch.version.cuda}")
    yield Fact(f"peak: products of {sizes.side:,} x {sizes.side:,} matrices in bf16", f"{bf16 / 1e3:.2f} TFLOPS")
    yield Fact("the same in fp32", f"{fp32 / 1e3:.2f} TFLOPS")

    yield "The same weights and fp32 (no TF32) on the CPU and on the device; asked: 1e-4 at most."
    yield from check_rows(machine, began + 40)

    yield (f"Hours: of training alone, on this device, of {PAPER_ITEMS:,} items with a picture each, {PAPER_USERS:,} "
           f"users and {PAPER_EVENTS:,} events (the shop of `scale`), so {PAPER_TARGETS:,} targets an epoch, with the "
           "scripts' default epochs.")
    yield ("Operations: of products of matrices, twice their multiply-adds; training has three times those of the way "
           "forward. Not counted: tables of items that AdamW changes in every step; with --lookahead in a small shop "
           "the product that brings the vectors of all items to the width of the model, once a step.")
    yield (f"Batch: targets (whole histories of {T}, so 128 are 120), users, pictures, pairs. Peak GiB: what "
           "PyTorch held at most, of model, optimizer and step. In 02 bf16 is for the scores of items alone.")
    # The seconds of each; what it has begun by then is measured still.
    parts = [
        (generator_rows, 120),
        (sasrec_rows, 30),
        (beam_rows, 70),
        (dino_rows, 30),
        (hf_rows, 50),
    ]
    for part, seconds in parts:
        yield from part(machine, time.perf_counter() + seconds)
    yield f"all in all {time.perf_counter() - began:.0f} s; asked: at most 480"


def device_name(device):
    """What it is called, and how much memory it has."""
    if device == "cpu":
        return "cpu"
    card = torch.cuda.get_device_properties(0)
    return f"{card.name}, {card.total_memory / 2 ** 30:.0f} GiB"


def speeds(machine, until, what, sizes, begin):
    """A row for each size. begin: makes the model -> Work; until: the time from which nothing more is begun"""
    over = "not measured: the seconds of its part are over"
    if time.perf_counter() > until:
        yield Speed(what, "all", over)
        return
    forget(machine.device)
    work = attempt(begin)
    if isinstance(work, str):
        yield Speed(what, "all", work)
        return
    for size in sizes:
        if time.perf_counter() > until:
            yield Speed(what, f"{size:,}", over)
        else:
            yield speed_at(machine, what, size, work)


def speed_at(machine, what, size, work):
    """The row of one size."""
    precision = "bf16" if work.bf16 else "fp32"
    forget(machine.device)
    rate = attempt(functools.partial(work.rate, size))
    if isinstance(rate, str):
        return Speed(what, f"{size:,}", rate, precision)
    form = ",.0f" if rate >= 100 else ",.1f"
    row = Speed(what, f"{size:,}", f"{rate:{form}} {work.unit}/s", precision)
    if work.operations:
        flops = work.operations * rate
        row = row._replace(TFLOPS=f"{flops / 1e12:.3g}", share_of_peak=f"{flops / machine.peak:.1%}")
    if work.training:
        row = row._replace(hours_at_paper_scale=f"{work.training / rate / 3600:,.1f}")
    if machine.device == "cuda":
        row = row._replace(peak_GiB=f"{torch.cuda.max_memory_allocated() / 2 ** 30:.2f}")
    return row


def attempt(work):
    """What it returns, or, as a str, why it could not be done: too little memory, say."""
    try:
        return work()
    except torch.OutOfMemoryError:
        return "out of memory"
    except RuntimeError as error:
        return f"{type(error).__name__}: {error}".splitlines()[0][:100]


def forget(device):
    """Gives back the memory of what was measured before, and counts the peak anew."""
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def best_step(machine, step):
    """Seconds of a step, the best of 5 times STEPS steps in a row, or of fewer where they take long."""

    def steps():
        for _ in range(STEPS):
            step()

    return best(steps, 5, machine.device, at_most=machine.sizes.seconds) / STEPS


def options_of(module, device, *line):
    """The options of a script as its command line gives them, in a single process."""
    args = module.options([str(part) for part in ("--device", device, *line)])
    args.rank = 0
    args.world = 1
    return args


def random_shop(N, U=1000):
    """What data.pt holds of U users with full-length histories: T + 1 random events, and two that are held out."""
    events = T + 3
    counts = torch.ones(N + 1)                                          # (N+1,)
    counts[0] = 0
    return {
        "events": torch.randint(1, N + 1, (U * events,), dtype=torch.int32),
        "offsets": events * torch.arange(U + 1),
        "item_ids": [""] * (N + 1),
        "user_ids": [""] * U,
        "train_counts": counts,
    }


def random_events(N, batch, device):
    """Full-length histories with that many targets, or with a few less. -> (B, T+1)"""
    return torch.randint(1, N + 1, (max(1, batch // T), T + 1), device=device)


# 05 with its own sizes: on a GPU, and what --lookahead costs on this machine


class Five(NamedTuple):
    """What 05 needs for its steps."""
    module: types.ModuleType
    args: argparse.Namespace
    data: dict
    trie: object
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer


def generator_on(device, N, shape, *options):
    """05 with its own options and its own build, on a random shop. -> Five"""
    five = script(5)
    line = list(options)
    for name, value in shape.items():
        line += [f"--{name}", value]
    args = options_of(five, device, *line)
    torch.manual_seed(0)
    data = random_shop(N)
    sources = random_sources(N)
    for source in sources.values():
        source["embeddings"] = torch.randn(N + 1, 64)                   # (N+1, d)
    model, trie = five.build(sources, data, args)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=five.WEIGHT_DECAY, fused=True)
    return Five(five, args, data, trie, model, optimizer)


def bench_lookahead():
    """What --lookahead costs by the size of the catalogue, against the plain model, with the defaults of 05."""
    for N in (2_500, 10_000, 50_000, 100_000, 400_000):
        plain = lookahead_costs(N)
        ours = lookahead_costs(N, "--lookahead")
        yield Row(f"{N:,} items: a step of 120 targets", f"{ours.step:,.0f} ms", f"{plain.step:,.0f} ms",
                  f"{ours.step / plain.step:.1f}", "<= 1.3")
        yield Row(f"{N:,} items: beam 20, a user", f"{ours.search:,.1f} ms", f"{plain.search:,.1f} ms",
                  f"{ours.search / plain.search:.1f}")
        yield Row(f"{N:,} items: tables besides weights, codes and tree", f"{ours.tables:,.0f} MB", "0 MB")


class Costs(NamedTuple):
    """Of a generator."""
    step: float    # ms
    search: float  # ms a user
    tables: float  # MB


def lookahead_costs(N, *options):
    """Steps and searches of 05 on full-length histories of a random shop. -> Costs"""
    five, args, _, trie, model, optimizer = generator_on("cpu", N, {}, *options)
    events = random_events(N, 128, "cpu")                               # (B, T+1)
    model.train()
    step = best(lambda: five.train_step(model, trie, optimizer, events, args), 3)
    model.eval()
    if options:
        model.trust.fill_(0.5)  # counts are in use
    history = events[:, 1:].repeat(5, 1)                                # (5B, T)
    search = best(lambda: five.beam_search(model, trie, history, 20), 3) / len(history)
    tables = sum(table.nbytes for table in model.tables()) / 1e6
    return Costs(1e3 * step, 1e3 * search, tables)


def generator_rows(machine, until):
    """Steps of 05, plain and --lookahead."""
    sizes = machine.sizes
    for N in (sizes.many, sizes.N):
        for name, shape in sizes.shapes.items():
            for options in ((), ("--lookahead",)):
                layers = shape["layers"]
                what = " ".join(["05", *options]) + f", {name}, {layers} + {layers} layers, {N:,} items"
                begin = functools.partial(generator_training, machine, N, shape, *options)
                yield from speeds(machine, until, what, sizes.targets, begin)


def generator_training(machine, N, shape, *options):
    """train_step of 05. -> Work"""
    five, args, _, trie, model, optimizer = generator_on(machine.device, N, shape, *options)
    model.train()

    def rate(batch):
        args.batch = batch
        events = random_events(N, batch, machine.device)                # (B, T+1)
        seconds = best_step(machine, lambda: five.train_step(model, trie, optimizer, events, args))
        return events[:, 1:].numel() / seconds

    slots = D if args.lookahead else M
    forward = multiply_adds(T, shape, slots) / T
    if args.lookahead:
        # At each level a question, and its products with the items that can lie under a node.
        E = shape["width"]
        items = sum(beneath.item.shape[1] for beneath in model.beneath[1:])
        if N > five.DRAWN_FROM:  # questions are brought to the vectors, and the root draws some items
            X = model.table.shape[1]
            forward += L * (E * E + E * X) + (items + K * five.DRAWN) * X
        else:
            forward += L * E * E + (items + N) * E
    training = args.epochs * PAPER_TARGETS if N == machine.sizes.many else 0
    return Work(rate, "targets", args.bf16, 2 * 3 * forward, training)


def beam_rows(machine, until):
    """Beam searches of 05 on full-length histories; with --lookahead as after a training, which picks a trust."""
    sizes = machine.sizes
    name, shape = list(sizes.shapes.items())[-1]
    for N in (sizes.N, sizes.many):
        for options in ((), ("--lookahead",)):
            what = " ".join(["beam 20, 05", *options]) + f", {name}, {N:,} items"
            begin = functools.partial(generator_search, machine, N, shape, *options)
            yield from speeds(machine, until, what, sizes.users, begin)


def generator_search(machine, N, shape, *options):
    """beam_search of 05. -> Work"""
    five, args, _, trie, model, _ = generator_on(machine.device, N, shape, *options)
    model.eval()
    if args.lookahead:
        model.trust.fill_(0.5)

    def rate(users):
        history = random_events(N, users * T, machine.device)[:, 1:]    # (B, T)

        def search():
            with five.autocast(args):
                items, _ = five.beam_search(model, trie, history, 20)   # (B, 20)
            return items.cpu()

        return users / best(search, 5, machine.device, at_most=machine.sizes.seconds)

    return Work(rate, "users", args.bf16)


# 02 on a GPU


class Two(NamedTuple):
    """What 02 needs for its steps."""
    module: types.ModuleType
    args: argparse.Namespace
    data: dict
    log_q: torch.Tensor  # (N+1,), or None
    model: torch.nn.Module
    optimizer: torch.optim.Optimizer


def sasrec_on(device, N, E, *options):
    """02 with its own options and its own build, on a random shop. -> Two"""
    two = script(2)
    args = options_of(two, device, "--width", E, *options)
    torch.manual_seed(0)
    data = random_shop(N)
    with contextlib.redirect_stdout(io.StringIO()):
        model = two.build(None, data, args)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=two.WEIGHT_DECAY, fused=True)
    log_q = None
    if N > two.SAMPLED_FROM:
        counts = data["train_counts"].to(device)                        # (N+1,)
        log_q = (counts / counts.sum()).log()                           # (N+1,)
    return Two(two, args, data, log_q, model, optimizer)


def sasrec_rows(machine, until):
    """Steps of 02."""
    sizes = machine.sizes
    for N in (sizes.many, sizes.N):
        for shape in sizes.shapes.values():
            E = shape["width"]
            what = f"02, E {E}, {N:,} items"
            begin = functools.partial(sasrec_training, machine, N, E)
            yield from speeds(machine, until, what, sizes.targets, begin)


def sasrec_training(machine, N, E):
    """train_step of 02. -> Work"""
    two, args, _, log_q, model, optimizer = sasrec_on(machine.device, N, E)
    model.train()

    def rate(batch):
        args.batch = batch
        events = random_events(N, batch, machine.device)                # (B, T+1)
        seconds = best_step(machine, lambda: two.train_step(model, model, optimizer, args.lr, events, log_q, args))
        return events[:, 1:].numel() / seconds

    scored = N if log_q is None else 1 + two.NEGATIVES
    training = args.epochs * PAPER_TARGETS if N == machine.sizes.many else 0
    return Work(rate, "targets", args.bf16, 2 * 3 * sasrec_multiply_adds(args, scored), training)


def sasrec_multiply_adds(args, scored):
    """Of one target of 02 on its way forward, counted as in multiply_adds. scored: items in its softmax"""
    E = args.width
    projections = 4 * E * E  # query, key, value, output
    feed_forward = 2 * E * 4 * E
    attention = 2 * T * E    # a score for each place, and a part of the mean of the values
    return args.layers * (projections + feed_forward + attention) + scored * E


# 03 on a GPU


def dino_rows(machine, until):
    """Steps of 03 with a ViT that --init reads, as it would read the public weights."""
    vit = machine.sizes.vit
    what = (f"03, ViT {vit['E']} x {vit['depth']}, patches of {vit['patch']}, {vit['size']} px, "
            f"2 + {LOCAL_CROPS} crops")
    yield from speeds(machine, until, what, machine.sizes.pictures, functools.partial(dino_training, machine))


def dino_training(machine):
    """read_ahead, views_of and train_step of 03. -> Work"""
    three = script(3)
    vit = machine.sizes.vit
    n = max(machine.sizes.pictures)
    rng = torch.manual_seed(0)
    images = torch.randint(256, (n + 1, 3, vit["size"], vit["size"]), dtype=torch.uint8)  # (N+1, 3, S, S)
    with tempfile.TemporaryDirectory() as folder:
        torch.save(three.VisionTransformer(**vit).state_dict(), f"{folder}/vit.pth")
        args = options_of(three, machine.device, "--init", f"{folder}/vit.pth", "--local-crops", LOCAL_CROPS)
        student, teacher = three.build(images, torch.arange(1, n + 1), K, args, rng)
    optimizer = three.make_optimizer(student)

    def rate(batch):
        items = torch.arange(1, batch + 1)                              # (B,)
        pictures = three.read_ahead([items] * 1000, images)  # more than are timed

        def step():
            views = three.views_of(next(pictures), batch, 2 + LOCAL_CROPS, student.backbone, rng)
            # Step 1 of 100, in the second epoch: all weights learn.
            three.train_step(student, student, teacher, optimizer, views, batch, 1, 100, 1)

        return batch / best_step(machine, step)

    return Work(rate, "pictures", args.bf16, training=args.epochs * PAPER_ITEMS)


# HF's T5 on a GPU


def hf_rows(machine, until):
    """HF's T5 at SHAPE: training a pair at a time, and `generate` with a dictionary of prefixes."""
    if hf_t5() is None:
        yield "HF's T5: transformers is not installed"
        return
    sizes = machine.sizes
    codes = unique_codes(sizes.N)                                       # (N+1, L)
    precisions = [False]
    if machine.device == "cuda":
        precisions.append(True)
    for bf16 in precisions:
        train = functools.partial(hf_t5_training_speed, bf16, machine.device)
        search = functools.partial(hf_beam_speed, codes, bf16, machine.device)
        training = functools.partial(Work, train, "targets", bf16)
        searching = functools.partial(Work, search, "users", bf16)
        what = "HF T5 at the shape of E 128, pairs of a history and its target"
        yield from speeds(machine, until, what, sizes.pairs, training)
        yield from speeds(machine, until, "HF generate, 20 beams", sizes.generated, searching)


# The same answers on a GPU as on a CPU?


class Answers(NamedTuple):
    """What a model says."""
    losses: torch.Tensor  # (L,) or (), nats a target
    items: torch.Tensor   # (n, 20)
    scores: torch.Tensor  # (n, 20)
    weights: dict         # that it says it with


@contextlib.contextmanager
def without_tf32():
    """Products of fp32 matrices in fp32: a card may round them to 10 bits."""
    products = torch.get_float32_matmul_precision()
    convolutions = torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(products)
        torch.backends.cudnn.allow_tf32 = convolutions


def check_rows(machine, until):
    """Losses of a batch and recommendations, on the CPU and on the device."""
    sizes = machine.sizes
    shape = list(sizes.shapes.values())[-1]
    n = sizes.users[0]
    ways = {
        "02": functools.partial(sasrec_answers, n, sizes.N, shape["width"]),
        "05": functools.partial(generator_answers, n, sizes.N, shape, ()),
        "05 --lookahead": functools.partial(generator_answers, n, sizes.N, shape, ("--lookahead",)),
    }
    for what, ask in ways.items():
        if time.perf_counter() > until:
            yield Agreement(what, "not measured: the seconds of its part are over", "")
            continue
        rows = attempt(functools.partial(agreement, what, ask, machine.device))
        if isinstance(rows, str):
            rows = [Agreement(what, rows, "<= 1e-4")]
        yield from rows


def agreement(what, ask, device):
    """Trains some steps on the CPU, and brings the weights to the device. -> list of Agreement"""
    cpu = ask("cpu", None)
    there = ask(device, cpu.weights)
    losses = (cpu.losses - there.losses).abs().max()                    # ()
    scores = (cpu.scores - there.scores).abs().max()                    # ()
    other = (cpu.items != there.items).sum()                            # ()
    return [
        Agreement(f"{what}: losses of a batch, nats a target", f"{losses:.1e}", "<= 1e-4"),
        Agreement(f"{what}: scores of 20 items of {len(cpu.items)} users", f"{scores:.1e}", "<= 1e-4"),
        Agreement(f"{what}: these items", f"{other} of {cpu.items.numel()} are others", "0, or equal scores"),
    ]


def sasrec_answers(n, N, E, device, weights):
    """Of n users, by 02. weights: None: those after some steps -> Answers"""
    two, args, data, log_q, model, optimizer = sasrec_on(device, N, E, "--precision", "fp32")
    events = first_events(data, n, device)                              # (n, T+1)
    with without_tf32():
        if weights is None:
            for _ in range(STEPS):
                two.train_step(model, model, optimizer, args.lr, events, log_q, args)
        else:
            model.load_state_dict(weights)
        model.eval()
        with torch.no_grad():
            loss = model.loss(model(events[:, :-1]), events, log_q, args)  # ()
        items, scores = two.recommend(model, data, "test", torch.arange(n), 20, args)  # (n, 20) both
    return Answers(loss.cpu() / (n * T), items, scores, on_cpu(model))


def generator_answers(n, N, shape, options, device, weights):
    """Of n users, by 05. weights: None: those after some steps -> Answers"""
    five, args, data, trie, model, optimizer = generator_on(device, N, shape, "--precision", "fp32", *options)
    events = first_events(data, n, device)                              # (n, T+1)
    if args.lookahead:
        model.trust.fill_(0.5)
    with without_tf32():
        if weights is None:
            for _ in range(STEPS):
                five.train_step(model, trie, optimizer, events, args)
        else:
            model.load_state_dict(weights)
        model.eval()
        args.masking = 0  # what is hidden is drawn by the device
        with torch.no_grad():
            losses = five.batch_losses(model, trie, events, args)       # (L,)
        users = torch.arange(n)                                         # (n,)
        items, scores = five.recommend(model, trie, data, "test", users, args)  # (n, 20) both
    return Answers(losses.cpu() / (n * T), items, scores, on_cpu(model))


def first_events(data, n, device):
    """The events of training of the first n users. -> (n, T+1)"""
    events = data["events"].view(-1, T + 3)                             # (U, T+3)
    return events[:n, :-2].long().to(device)                            # (n, T+1)


def on_cpu(model):
    """Its weights, by name."""
    return {name: weight.cpu() for name, weight in model.state_dict().items()}


BENCHES = {
    "training": bench_training,
    "beam": bench_beam,
    "trie": bench_trie,
    "quality": bench_quality,
    "sasrec": bench_sasrec,
    "sasrec_scale": bench_sasrec_scale,
    "dino": bench_dino,
    "residual_kmeans": bench_residual_kmeans,
    "data": bench_data,
    "lookahead": bench_lookahead,
    "scale": bench_scale,
    "gpu": bench_gpu,
}
BY_NAME = ["quality", "scale", "gpu"]  # they take long, or need a GPU


def show(rows):
    """Prints rows as they come, a table for each kind of them; a str is a line between two tables."""
    kind = None
    for row in rows:
        if isinstance(row, str):
            print(f"\n{row}", flush=True)
        else:
            if type(row) is not kind:
                columns = [field.replace("_", " ") for field in row._fields]
                print("\n| " + " | ".join(columns) + " |")
                print("|---" * len(columns) + "|")
            print("| " + " | ".join(row) + " |", flush=True)
        kind = type(row)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="*", help=f"some of {', '.join(BENCHES)} (default: all but {', '.join(BY_NAME)})")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="of the part gpu")
    parser.add_argument("--smoke", action="store_true", help="the part gpu with tiny sizes: does it work?")
    args = parser.parse_args()
    chosen = args.part
    unknown = [name for name in chosen if name not in BENCHES]
    if unknown:
        sys.exit(f"There is no {', '.join(unknown)}: choose from {', '.join(BENCHES)}.")
    if not chosen:
        chosen = [name for name in BENCHES if name not in BY_NAME]
    if "gpu" in chosen and args.device == "cuda" and not torch.cuda.is_available():
        sys.exit("No CUDA GPU is here. gpu --device cpu --smoke shows that the command works.")
    if "gpu" in chosen and args.device == "cpu" and not args.smoke:
        sys.exit("gpu --device cpu goes with --smoke: its sizes are for GPUs.")

    # Each in a process of its own: peers change torch, modules and the allocator for what follows.
    if len(chosen) > 1:
        options = ["--device", args.device] + ["--smoke"] * args.smoke
        codes = [subprocess.run([sys.executable, __file__, name, *options]).returncode for name in chosen]
        sys.exit(1 if any(codes) else 0)
    torch.set_num_threads(1)  # where a part says nothing else
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads")
    if chosen == ["gpu"]:
        show(bench_gpu(args.device, args.smoke))
    else:
        show(BENCHES[chosen[0]]())


if __name__ == "__main__":
    main()
