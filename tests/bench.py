"""How fast the six scripts are, each figure as a ratio against a peer in the same run. Prints tables; asserts nothing.

    python tests/bench.py                       # everything but the long ones: minutes
    python tests/bench.py training beam         # some parts: the names are those of the functions below
    python tests/bench.py quality scale         # the long ones, by name: hours, half an hour

Peers are installed by hand (pip install transformers faiss-cpu pandas recbole torchvision); those that are no
package are looked for in folders of $PEERS: dino (facebookresearch/dino), SASRec.pytorch (pmixer/SASRec.pytorch).
A missing one is named and skipped. Times are those of the wall clock, the best of a few runs after one uncounted, if
nothing else is said; `quality` counts the processor's seconds (OMP_NUM_THREADS=1), `data` and `scale` run once.
"""
import argparse
import contextlib
import ctypes
import functools
import gzip
import importlib.util
import io
import itertools
import json
import math
import os
import pathlib
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import types

import numpy as np
import torch
from PIL import Image
from torch.optim.optimizer import register_optimizer_step_post_hook

from conftest import ROOT, SCRIPTS, command, run_script, script

PEERS = pathlib.Path(os.environ.get("PEERS", "peers")).resolve()
LONG = ("quality", "scale")
LIBRARIES = []


def torchvision_without_operators():
    """A torchvision whose compiled part does not load (built for another torch) still has its transforms."""
    LIBRARIES.append(torch.library.Library("torchvision", "FRAGMENT"))  # it lasts as long as somebody holds it
    for name in ("nms", "qnms"):
        with contextlib.suppress(RuntimeError):
            LIBRARIES[-1].define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def best(work, runs):
    """Seconds of the fastest of some runs, after one that warms up."""
    work()
    seconds = []
    for _ in range(runs):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def dataset(run, name, *options):
    """Puts a real dataset of ../shared/data into a run. -> its data.pt, or None where it is not there"""
    folder = ROOT.parent / "shared" / "data" / name
    if not folder.exists():
        print(f"{folder} is not there: what needs it is skipped")
        return None
    run_script(1, "--run", run, "--dataset", folder, *options).check_returncode()
    return torch.load(f"{run}/data.pt", weights_only=True)


# --- 05: training, beam search, tree ----------------------------------------------------------------------------------
SHAPE = dict(width=128, heads=6, head=64, inner=1024, layers=4, dropout=0.1)  # of public reimplementations
S, D, L, K, TOKENS = 20, 3, 4, 256, 12


def matmul_rate(dtype):
    """GFLOPS of 1,024 x 1,024 matrix products, the best of 5 runs of 20: what this machine can do."""
    a = torch.randn(1024, 1024).to(dtype)
    return 20 * 2 * 1024 ** 3 / best(lambda: [a @ a for _ in range(20)], 5) / 1e9


def multiply_adds(S):
    """Of one training pass over S items (forward), counted from the shapes: the masked half of attention is counted
    as well, as it is computed; softmax, norms, ReLU and dropout are not."""
    E, F, A = SHAPE["width"], SHAPE["inner"], SHAPE["heads"] * SHAPE["head"]
    m, q = S * TOKENS, S * L
    encoder = m * (4 * E * A + 2 * E * F) + 2 * m * m * A
    decoder = q * (6 * E * A + 2 * E * F) + m * 2 * E * A + 2 * q * L * A + 2 * q * m * A
    return SHAPE["layers"] * (encoder + decoder) + q * E * K


def unique_codes(N):
    """Three random codes an item, the fourth tells apart those that share them. -> (N+1, L)"""
    codes = torch.randint(K, (N + 1, L))
    prefix = (codes[:, :3] * torch.tensor([K * K, K, 1])).sum(1)  # (N+1,)
    codes[:, 3] = script(2).number_in_group(prefix, torch.arange(N + 1))
    return codes


def some_generator(g, N=10_000):
    torch.manual_seed(0)
    codes = torch.stack([torch.randint(K, (N + 1, L)), torch.randint(K, (N + 1, L)), unique_codes(N)], 1)
    model = g.Generator(codes, torch.ones(N + 1, D, dtype=torch.bool), 2, [torch.randn(3, K, 64) for _ in range(D)],
                        argparse.Namespace(**SHAPE))
    return model, codes[:, 2], g.Trie(codes[:, 2], K)


def bench_training():
    g = script(5)
    model, codes, trie = some_generator(g)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def step(events, bf16=False, constrained=True):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            logits = model(events[:, :-1], events[:, 1:], 0.2)
        items = events[:, 1:].flatten()
        g.code_losses(logits.flatten(0, 1), codes[items], items, trie, constrained).sum().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    full = torch.randint(1, len(codes), (16, S + 1))
    rate, rate16 = matmul_rate(torch.float32), matmul_rate(torch.bfloat16)
    fp32, bf16, free = (16 * S / best(lambda: step(full, *how), 5) for how in ((), (True,), (False, False)))
    work = 6 * multiply_adds(S) / S / 1e9  # forward and twice as much backward, two operations each
    rows = [("multiply-adds of training in fp32, share of the matmul rate", f"{work * fp32:.0f} GFLOPS",
             f"{rate:.0f} GFLOPS", f"{work * fp32 / rate:.0%}", ">= 45 %"),
            ("the same in bf16", f"{work * bf16:.0f} GFLOPS", f"{rate16:.0f} GFLOPS",
             f"{work * bf16 / rate16:.0%}", ""),
            ("a step with the constrained loss : unconstrained", f"{1e3 / fp32:.2f} ms a target", f"{1e3 / free:.2f}",
             f"{free / fp32:.2f}", "<= 1.15")]

    with tempfile.TemporaryDirectory() as run:
        data = dataset(run, "movietweetings-2013", "--image-size", 8)
    if data is not None:  # real lengths: batches of one length each, no padding
        torch.manual_seed(0)
        start, length = g.windows("train", data["offsets"], S)
        batches = g.equal_length_batches(length, 16 * S)[:24]
        real = [data["events"][start[b, None] + torch.arange(length[b[0]] + 1)].long() for b in batches]
        targets = sum(x[:, 1:].numel() for x in real)
        ragged = best(lambda: [step(x) for x in real], 2) / targets
        rows.append(("cost of a target, real lengths : full length (fp32)", f"{1e3 * ragged:.2f} ms",
                     f"{1e3 / fp32:.2f} ms", f"{ragged * fp32:.2f}", "<= 1.3"))

    peer = hf_t5()
    if peer is None:
        return rows + [("training against HF T5", f"{fp32:.0f} targets/s", "transformers not installed", "", ">= 50 x")]
    adam = torch.optim.AdamW(peer.parameters())
    history, code = torch.randint(2, 3000, (32, S * TOKENS)), torch.randint(2, 3000, (32, L + 1))

    def pairs(bf16):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = peer(input_ids=history, attention_mask=torch.ones_like(history), labels=code).loss
        loss.backward()
        adam.step()
        adam.zero_grad()

    t5, t5_16 = 32 / best(lambda: pairs(False), 3), 32 / best(lambda: pairs(True), 3)
    for what, ours, theirs, asked in (("fp32", fp32, t5, ""), ("bf16", bf16, t5_16, ""),
                                      ("ours in bf16, T5 in fp32, as it is trained", bf16, t5, ">= 50 x")):
        rows.append((f"training against HF T5, {what}", f"{ours:.0f} targets/s", f"{theirs:.1f}",
                     f"{ours / theirs:.1f} x", asked))
    return rows


def hf_t5():
    """The T5 of `transformers` at the same shape, or None."""
    try:
        torchvision_without_operators()  # transformers imports it if it is there
        from transformers import T5Config, T5ForConditionalGeneration
    except ImportError:
        return None
    return T5ForConditionalGeneration(T5Config(
        vocab_size=TOKENS * K + 5, d_model=128, d_kv=64, d_ff=1024, num_layers=4, num_decoder_layers=4, num_heads=6,
        dropout_rate=0.1, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0))


def bench_beam():
    """Beam 20 on full-length histories. HF gets a dictionary of prefixes as prefix_allowed_tokens_fn, as peers do.

    glibc gives large blocks back to the system, and half of HF's time goes into getting them again. Here it keeps
    them (M_MMAP_MAX 0, M_TRIM_THRESHOLD at its largest), for both sides: HF's best."""
    with contextlib.suppress(AttributeError):  # another libc
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(-4, 0), mallopt(-1, 2 ** 31 - 1)
    g = script(5)
    model, codes, trie = some_generator(g)
    history = torch.randint(1, len(codes), (24, S))
    model.eval()

    def search(bf16):
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            return g.beam_search(model, trie, history, 20)[0]

    same = (search(True) == search(False)).float().mean()
    ours, ours16 = (24 / best(lambda: search(bf16), 3) for bf16 in (False, True))
    peer = hf_t5()
    if peer is None:
        return [("beam 20 against HF generate", f"{ours:.0f} users/s", "transformers not installed", "", ">= 20 x")]
    tree, tokens = {}, (2 + codes[1:] + K * torch.arange(L)).tolist()
    for code in tokens:
        for l in range(L):
            tree.setdefault((0, *code[:l]), set()).add(code[l])
    tree = {prefix: sorted(children) for prefix, children in tree.items()}
    peer.eval()
    x = torch.randint(2, 3000, (8, S * TOKENS))  # faster for it than 16

    def generate(bf16):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            peer.generate(input_ids=x, attention_mask=torch.ones_like(x), num_beams=20, num_return_sequences=20,
                          max_new_tokens=L + 1, prefix_allowed_tokens_fn=lambda _, s: tree.get(tuple(s.tolist()), [1]))

    hf, hf16 = (8 / best(lambda: generate(bf16), 2) for bf16 in (False, True))
    return [("beam 20 against HF generate, fp32", f"{ours:.0f} users/s", f"{hf:.1f}", f"{ours / hf:.1f} x", ">= 20 x"),
            (f"the same in bf16 ({same:.1%} of places hold the item of fp32)", f"{ours16:.0f} users/s", f"{hf16:.1f}",
             f"{ours16 / hf16:.1f} x", ""),
            ("ours in bf16, HF in fp32", f"{ours16:.0f} users/s", f"{hf:.1f}", f"{ours16 / hf:.1f} x", "")]


def bench_trie():
    """A million items at K 256."""
    g, N, n = script(5), 1_000_000, 2560
    torch.manual_seed(0)
    codes = unique_codes(N)
    seconds = best(lambda: g.Trie(codes, K), 3)
    trie = g.Trie(codes, K)
    size = sum(t.nbytes for t in [*trie.keys, *trie.allowed, trie.path, trie.leaf_item]) / 2 ** 20
    items, logits = torch.randint(1, N + 1, (n,)), torch.randn(n, L, K, requires_grad=True)
    cut, free = (best(lambda: g.code_losses(logits, codes[items], items, trie, how).sum().backward(), 20)
                 for how in (True, False))
    return [("tree of 1,000,000 items", f"{seconds:.2f} s", "", "", "<= 10 s"),
            ("its tensors", f"{size:.0f} MiB", "", "", "<= 200 MB"),
            ("the loss alone, without the model: constrained : unconstrained", f"{1e3 * cut:.1f} ms",
             f"{1e3 * free:.1f} ms", f"{cut / free:.2f}", "")]


# --- 05: time to equal quality ----------------------------------------------------------------------------------------
def bidirectional(g):
    """The same generator, with an encoder in which every item sees all items of the history."""
    class BothWays(g.RelativeBias):
        def forward(self, S, first=0):
            half = (g.FARTHEST + 1) // 2  # one half of the biases for what comes later
            distance = torch.arange(S).unsqueeze(1) - torch.arange(S)  # (S, S)
            item = self.item[:, distance.abs().clamp(max=half - 1) + half * (distance < 0)]  # (H, S, S)
            bias = item[:, :, None, :, None] + self.slot[:, None, :, None, :]  # (H, S, slots, S, slots)
            return bias.flatten(3).flatten(1, 2)

    class Bidirectional(g.Generator):
        def __init__(self, *args):
            super().__init__(*args)
            H, slots, _ = self.encoder_bias.slot.shape
            self.encoder_bias = BothWays(H, slots, slots)

        def forward(self, history, target, masking=0.0):
            """history (B, S), target (B, 1): the item after all of it -> logits (B, 1, L, K)"""
            written = torch.nn.functional.pad(self.written[target, :-1], (1, 0), value=self.start_token)
            bias = self.cross_bias(history.shape[1], first=history.shape[1] - 1)
            return self.decode(written, self.encode(history, masking), bias)[0]
    return Bidirectional


def train(g, run, seed, both_ways, epochs, batch=128, length=20, lr=2e-3):
    """The loop of 05_generator.py, its defaults but for the epochs. -> [(seconds of training, validation NDCG@10)], one
    an epoch. Seconds are the processor's (OMP_NUM_THREADS=1: of one core): other work does not lengthen them."""
    args = argparse.Namespace(width=64, layers=2, heads=4, head=16, inner=256, dropout=0.1, length=length, beam=20,
                              rank=0, world=1, bf16=False)
    torch.manual_seed(seed)
    data = torch.load(run / "data.pt", weights_only=True)
    sources = [torch.load(run / f"{m}_codes.pt", weights_only=True) for m in ("image", "text", "collab")]
    books, device = [s["codebooks"] for s in sources], torch.device("cpu")
    codes = torch.stack([s["codes"] for s in sources], 1).long()  # (N+1, D, L)
    known = torch.stack([s["known"] for s in sources], 1)  # (N+1, D)
    model = (bidirectional(g) if both_ways else g.Generator)(codes, known, 2, books, args)
    trie, codes = g.Trie(codes[:, 2], books[0].shape[1]), codes[:, 2]
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=g.WEIGHT_DECAY, fused=True)
    offsets, events = data["offsets"], data["events"]
    judges = torch.randperm(len(offsets) - 1)[:g.JUDGES]
    truth, spent, curve = events[offsets[1 + judges] - 2].unsqueeze(1), 0.0, []
    for epoch in range(epochs):
        torch.manual_seed(1000 * seed + epoch)
        model.train()
        if both_ways:  # every training event but a user's first is a target, after at most T events
            targets = (offsets.diff() - 3).clamp(min=0)  # (U,)
            user = torch.arange(len(targets)).repeat_interleave(targets)  # (pairs,)
            place = torch.arange(len(user)) - (targets.cumsum(0) - targets)[user]  # (pairs,)
            end = offsets[user] + place + 1  # (pairs,)
            start = torch.maximum(offsets[user], end - length)  # (pairs,)
            count = end - start  # (pairs,)
            batches = [b for group in g.equal_length_batches(count, 10 ** 9) for b in group.split(batch)]
            batches = [batches[i] for i in torch.randperm(len(batches))]
        else:
            start, count = g.windows("train", offsets, length)
            batches = g.equal_length_batches(count, batch)
        began = time.process_time()
        for i, rows in enumerate(batches):
            done = (epoch + i / len(batches)) / epochs
            for group in optimizer.param_groups:
                group["lr"] = lr * min(1, done / g.WARM_UP) * (1 + math.cos(math.pi * done)) / 2
            x = events[start[rows, None] + torch.arange(count[rows[0]] + 1)].long()
            y = x[:, -1:] if both_ways else x[:, 1:]
            items = y.flatten()
            logits = model(x[:, :-1], y, 0.2)
            loss = g.code_losses(logits.flatten(0, 1), codes[items], items, trie).sum()
            (loss / max(batch, len(items))).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        spent += time.process_time() - began
        top = g.recommend(model, trie, data, "valid", judges, args, device)[0][:, :10]
        curve.append((spent, ((top == truth) / torch.log2(2.0 + torch.arange(10))).sum(1).mean().item()))
        print("both ways" if both_ways else "one pass", f"seed {seed}, epoch {epoch}: {spent:.0f} s, "
              f"NDCG@10 {curve[-1][1]:.4f}", file=sys.stderr, flush=True)
    return curve


def bench_quality(name="movietweetings-2013", seeds=3, slow_epochs=5, epochs=8, limits=()):
    """Validation NDCG@10 over seconds of training, both ways. The codes are made by the scripts' defaults."""
    rows = []
    for seed in range(seeds):
        with tempfile.TemporaryDirectory() as run:
            if dataset(run, name, *limits) is None:
                return [(f"time to equal quality on {name}", "skipped", "", "", ">= 5 x sooner")]
            for n in (2, 3, 4):
                run_script(n, "--run", run, "--seed", seed).check_returncode()
            slow = train(script(5), pathlib.Path(run), seed, True, slow_epochs)
            quick = train(script(5), pathlib.Path(run), seed, False, epochs)
        goal = max(ndcg for _, ndcg in slow)
        at = lambda curve: next((seconds for seconds, ndcg in curve if ndcg >= goal), math.inf)
        rows.append((f"seed {seed}: seconds to NDCG@10 {goal:.4f}, the best of a pair at a time; best of ours "
                     f"{max(ndcg for _, ndcg in quick):.4f}", f"{at(quick):.0f} s", f"{at(slow):.0f} s",
                     f"{at(slow) / at(quick):.1f} x", ">= 5 x sooner"))
    return rows


# --- 02: SASRec -------------------------------------------------------------------------------------------------------
def sasrec_ours(run, batch, steps, sampled_from=50_000, precision="fp32"):
    """The loop of 02_sasrec.py itself, its first 10 steps not counted. -> targets/s, s/step"""
    module, length, result = script(2), [], []

    def windows(*args, windows=module.windows):
        result[:] = windows(*args)
        length[:] = result[1].tolist()
        return result[0], result[1]

    def timed(batches, *_, **__):
        yield from batches[:10]
        began = time.perf_counter()
        yield from batches[10:]
        seconds = time.perf_counter() - began
        result[:] = sum(len(b) * length[b[0]] for b in batches[10:]) / seconds, seconds / len(batches[10:])
        raise InterruptedError  # before validation

    module.tqdm, module.windows, module.SAMPLED_FROM = timed, windows, sampled_from
    with contextlib.suppress(InterruptedError), contextlib.redirect_stdout(io.StringIO()):
        module.main(["--run", str(run), "--batch", str(batch), "--max-steps", str(steps),
                     "--precision", precision])
    return result


def sasrec_recbole(data, batch):
    """Its Trainer._train_epoch with its DataLoader: each prefix of a history is a sample."""
    np.float_, np.complex_, np.unicode_ = np.float64, np.complex128, np.str_  # gone from numpy 2
    from recbole.config import Config
    from recbole.data import create_dataset, data_preparation
    from recbole.model.sequential_recommender import SASRec
    from recbole.trainer import Trainer
    torch.autograd.set_detect_anomaly(False)  # a model of RecBole's turns it on for the whole process
    folder = pathlib.Path(tempfile.mkdtemp()) / "real"
    folder.mkdir()
    os.chdir(folder)  # it writes logs where it stands
    events, lines = data["events"].tolist(), ["user_id:token\titem_id:token\ttimestamp:float"]
    for user, (begin, end) in enumerate(itertools.pairwise(data["offsets"].tolist())):
        lines += [f"{user}\t{events[i]}\t{i - begin}" for i in range(begin, end)]
    (folder / "real.inter").write_text("\n".join(lines))
    sys.argv[1:] = []
    config = Config("SASRec", "real", config_dict={
        "data_path": str(folder.parent), "MAX_ITEM_LIST_LENGTH": 20, "train_batch_size": batch,
        "loss_type": "CE", "train_neg_sample_args": None, "use_gpu": False, "show_progress": False,
        "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
        "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "mode": "full"}})
    train = data_preparation(config, create_dataset(config))[0]
    trainer = Trainer(config, SASRec(config, train.dataset))
    for _ in iter(int, 1):  # for ever; an iterator of one batch is an epoch of one step
        for interaction in train:
            trainer._train_epoch([interaction], 0)
            yield len(interaction)


def sasrec_pmixer(data, batch):
    """Its sampler (3 processes), model and optimizer; its binary loss replaced by the softmax."""
    sys.path[:0] = [str(PEERS / "SASRec.pytorch" / folder) for folder in ("python", ".")]
    for name in ("model", "utils"):  # names that another peer has as well
        sys.modules.pop(name, None)
    from model import SASRec
    from utils import WarpSampler
    events, offsets = data["events"].tolist(), data["offsets"].tolist()
    train = {u: events[a:b - 2] for u, (a, b) in enumerate(itertools.pairwise(offsets), 1)}
    U, N = len(train), len(data["item_ids"]) - 1
    sampler = WarpSampler(train, U, N, batch_size=batch, maxlen=20, n_workers=3)
    model = SASRec(U, N, types.SimpleNamespace(
        device="cpu", hidden_units=64, maxlen=20, dropout_rate=0.5, num_blocks=2, num_heads=2,
        norm_first=True)).train()
    for layer in model.forward_layers:  # its own have 64 hidden units, not 4 x 64
        layer.conv1, layer.conv2 = torch.nn.Conv1d(64, 256, 1), torch.nn.Conv1d(256, 64, 1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, betas=(0.9, 0.98))
    for _ in iter(int, 1):
        _, seq, pos, _ = (np.array(x) for x in sampler.next_batch())
        place = np.where(pos != 0)
        scores = model.log2feats(seq)[place] @ model.item_emb.weight.T
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(scores, torch.LongTensor(pos[place])).backward()
        optimizer.step()
        yield len(place[0])


def bench_sasrec():
    """Training on real data, everybody at several sizes of batch; the fastest of 3 rounds counts."""
    rows = []
    for name in ("movietweetings-2013", "amazon-beauty-2014"):
        run, fastest = pathlib.Path(tempfile.mkdtemp()), {}
        data = dataset(run, name, "--image-size", 8)
        if data is None:
            continue
        loops = {("recbole", batch): sasrec_recbole(data, batch) for batch in (2048, 128)}
        loops |= {("pmixer", batch): sasrec_pmixer(data, batch) for batch in (128, 16)}
        mine = list(itertools.product(("fp32", "bf16"), (256, 512, 1024, 2048)))
        for key in [*mine, *loops] * 3:
            try:
                if key in mine:
                    speed = sasrec_ours(run, key[1], 30_000 // key[1], precision=key[0])[0]
                else:
                    next(loops[key])
                    count, began = 0, time.time()
                    while time.time() - began < 5:
                        count += next(loops[key])
                    speed = count / (time.time() - began)
                fastest[key] = max(fastest.get(key, 0), speed)
            except (ImportError, StopIteration) as error:
                print(f"{key[0]} is left out: {error} (pip, or {PEERS}/SASRec.pytorch)")
        fp32, bf16, *peers = (max([fastest[key] for key in fastest if key[0] == who], default=0)
                              for who in ("fp32", "bf16", "recbole", "pmixer"))
        rows += [(f"SASRec, {name}, against {who}: targets/s", f"{fp32:,.0f} (bf16: {bf16:,.0f})",
                  f"{peer:,.0f}" if peer else "not installed",
                  f"{fp32 / peer:.1f} ({bf16 / peer:.1f})" if peer else "", ">= 3x")
                 for who, peer in zip(("RecBole", "pmixer"), peers)]
    return rows


def bench_sasrec_scale():
    """400,000 items, 700,000 users, 6.5 million random events: seconds a step and hours an epoch."""
    run, rng = pathlib.Path(tempfile.mkdtemp()), torch.Generator().manual_seed(0)
    N, U, rows = 400_000, 700_000, []
    lengths = 5 + torch.poisson(torch.full((U,), 4.3), generator=rng).long()  # (U,)
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])  # (U+1,)
    events = (N * torch.rand(int(offsets[-1]), generator=rng) ** 3).int().clamp(0, N - 1) + 1
    torch.save({"made_from": {}, "item_ids": [""] * (N + 1), "user_ids": [""] * U, "events": events,
                "offsets": offsets, "train_counts": torch.bincount(events, minlength=N + 1)},
               run / "data.pt")
    for batch, steps, sampled_from in ((128, 30, 50_000), (4096, 20, 50_000), (128, 16, N)):
        speed, step = sasrec_ours(run, batch, steps, sampled_from)
        kind, targets = "sampled" if sampled_from < N else "full", (lengths - 3).sum().item()
        rows.append((f"SASRec, 400,000 items, {kind} softmax, batch {batch}: s/step, hours/epoch",
                     f"{step:.3f}, {targets / speed / 3600:.2f}", "", "", ""))
    return rows


# --- 03: RQ-DINO and residual k-means ---------------------------------------------------------------------------------
def pace(run, batch):
    """Pictures a second by the median step of a training, after two to warm up, silently."""
    ends = []
    hook = register_optimizer_step_post_hook(lambda *_: ends.append(time.perf_counter()))
    with contextlib.redirect_stdout(io.StringIO()):
        run()
    hook.remove()
    return batch / statistics.median(b - a for a, b in itertools.pairwise(ends[1:]))


def ours(dino, images, batch, steps, *options):
    """The real loop of 03 on a folder of its own."""
    with tempfile.TemporaryDirectory() as run:
        N, known = len(images), torch.arange(len(images) + 1) > 0
        torch.save({"made_from": {}, "images": torch.cat([images[:1], images])}, f"{run}/images.pt")
        torch.save({"made_from": {}, "has_image": known, "titles": [""] * (N + 1), "train_counts": known.int()},
                   f"{run}/data.pt")
        return pace(lambda: dino.main(["--run", run, "--device", "cpu", "--batch", f"{batch}", "--epochs", "99",
                                       "--max-steps", f"{steps}", *options]), batch)


def theirs(images, batch, steps, workers, sizes, patch, width, depth, crops):
    """train_one_epoch of facebookresearch/dino as it stands; same ViT and head, pictures decoded already."""
    import main_dino, utils, vision_transformer as vits
    utils.MetricLogger.synchronize_between_processes = lambda self: None  # asks for CUDA
    augment = main_dino.DataAugmentationDINO((0.4, 1.0), (0.1, 0.4), crops)
    for name, size in zip(("global_transfo1", "global_transfo2", "local_transfo"), (sizes[0], *sizes)):
        getattr(augment, name).transforms[0].size = (size, size)
    pil = [Image.fromarray(x.permute(1, 2, 0).numpy()) for x in images]
    class Pictures(torch.utils.data.Dataset):
        __len__ = lambda self: steps * batch
        __getitem__ = lambda self, i: (augment(pil[i % len(pil)]), 0)
    loader = torch.utils.data.DataLoader(Pictures(), batch, shuffle=True, num_workers=workers, drop_last=True)
    vit = functools.partial(vits.VisionTransformer, img_size=[sizes[0]], patch_size=patch, embed_dim=width,
                            depth=depth, num_heads=max(3, width // 64), qkv_bias=True,
                            norm_layer=functools.partial(torch.nn.LayerNorm, eps=1e-6))
    head = functools.partial(vits.DINOHead, width, 1024, hidden_dim=4 * width, bottleneck_dim=width)
    student, teacher = (utils.MultiCropWrapper(vit(), head()) for _ in range(2))
    teacher.load_state_dict(student.state_dict())
    teacher.requires_grad_(False)
    student = torch.nn.parallel.DistributedDataParallel(student)
    loss = main_dino.DINOLoss(1024, crops + 2, 0.04, 0.04, 0, 1)
    optimizer, constant = torch.optim.AdamW(utils.get_params_groups(student)), [1e-3] * steps
    args = type("args", (), {"epochs": 1, "clip_grad": 3.0, "freeze_last_layer": 1})
    return pace(lambda: main_dino.train_one_epoch(student, teacher, teacher, loss, loader, optimizer, constant,
                                                  constant, constant, 0, None, args), batch)


def bench_dino():
    """Pictures a second of training on CPU; the peer may choose how many processes load pictures."""
    peers, workers = PEERS / "dino", ()
    if (peers / "main_dino.py").exists():
        workers, sys.path[:0] = (0, 1, 2), [str(peers)]
        # The peer expects CUDA, and a torchvision whose compiled operators load: neither is timed.
        torchvision_without_operators()
        torch.Tensor.cuda, torch.cuda.synchronize = lambda self, **given: self, lambda: None
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    dino, rows = script(3), []
    ways = {"quantiser": [], "--plain": ["--plain"], "quantiser, bf16": ["--precision", "bf16"]}
    for what, sizes, patch, width, depth, crops, batch, steps in (
            ("32 px, ViT 96 x 4, 2 + 2 crops", (32, 16), 4, 96, 4, 2, 32, 12),
            ("64 px, ViT-S/8, 2 + 8 crops", (64, 32), 8, 384, 12, 8, 4, 5)):
        images = torch.randint(256, (steps * batch, 3, 8, 8), generator=torch.Generator().manual_seed(0)).float()
        images = torch.nn.functional.interpolate(images, (sizes[0],) * 2, mode="bilinear").byte()
        options = ["--width", width, "--depth", depth, "--local-crops", crops]
        fastest = {}
        for _ in range(2):  # interleaved: a busy moment hits all
            for way in (*ways, *workers):
                speed = theirs(images, batch, steps, way, sizes, patch, width, depth, crops) if way in workers else \
                    ours(dino, images, batch, steps, *map(str, options), *ways[way])
                fastest[way] = max(speed, fastest.get(way, 0))
        peer = max((fastest[n] for n in workers), default=0)
        rows += [(f"03, pictures/s in training, {what}, {way}", f"{fastest[way]:.1f}",
                  f"{peer:.1f}" if peer else "PEERS/dino: facebookresearch/dino",
                  f"{fastest[way] / peer:.2f}" if peer else "", ">= 2") for way in ways]
    return rows


def bench_residual_kmeans():
    """Seconds to learn and apply 3 x 256 codes of 100,000 vectors of 64, and the error that is left."""
    dino, rows, rng = script(3), [], torch.Generator().manual_seed(0)
    x = torch.randn(400, 64, generator=rng)[torch.randint(400, (100_000,), generator=rng)]
    x = x + 0.3 * torch.randn(x.shape, generator=rng) * torch.rand(64, generator=rng)
    def run_ours():
        codebooks = dino.residual_kmeans(x, 256, torch.Generator().manual_seed(0))
        codes, _ = dino.quantise(x, codebooks)
        return sum(C[codes[:, l]] for l, C in enumerate(codebooks))
    def run_faiss(beam):
        quantizer = faiss.ResidualQuantizer(64, 3, 8)
        quantizer.max_beam_size = beam
        quantizer.train(x.numpy())
        return torch.from_numpy(quantizer.decode(quantizer.compute_codes(x.numpy())))
    ways = {"ours": run_ours}
    with contextlib.suppress(ImportError):
        import faiss
        ways |= {f"faiss, beam {beam}": functools.partial(run_faiss, beam) for beam in (1, 5)}
    for threads in (1, 2):
        torch.set_num_threads(threads)
        if len(ways) > 1:
            faiss.omp_set_num_threads(threads)
        fastest, error = {}, {}
        for way in [*ways] * 2:
            start = time.perf_counter()
            error[way] = (x - ways[way]()).square().sum(1).mean()
            fastest[way] = min(time.perf_counter() - start, fastest.get(way, 9e9))
        shown = {way: f"{fastest[way]:.2f} s, error {error[way]:.3f}" for way in ways}
        rows += [(f"residual k-means, {threads} threads, against {way}", shown["ours"], shown[way],
                  f"{fastest[way] / fastest['ours']:.2f}", ">= 1, error no larger") for way in list(ways)[1:]] or [
                 (f"residual k-means, {threads} threads", shown["ours"], "faiss not installed", "", ">= 1")]
    return rows


# --- 01: five million reviews -----------------------------------------------------------------------------------------
def make_reviews(folder, n=5_000_000, seed=0):
    """reviews.jsonl.gz, about 540 bytes a line; few users and items have many events, 1 % repeat."""
    rng, folder = np.random.default_rng(seed), pathlib.Path(folder)
    words = [bytes(rng.integers(97, 123, k, np.uint8)).decode() for k in rng.integers(2, 10, 5000)]
    texts = [" ".join(rng.choice(words, rng.integers(20, 80))) for _ in range(5000)]
    texts = [text.replace("aa", "\u00e9 \\\"n\\\"") for text in texts]  # what JSON must undo
    user = (n // 6 * rng.random(n) ** 3).astype(int)
    item = (n // 20 * rng.random(n) ** 3).astype(int)
    again = rng.integers(0, n, n // 100)
    user[again[1:]], item[again[1:]] = user[again[:-1]], item[again[:-1]]
    times = rng.integers(10 ** 12, 16 * 10 ** 11, n)
    scramble = lambda x, prime: x * prime % 2 ** 32  # ids in another order than popularity
    folder.mkdir(parents=True, exist_ok=True)
    with gzip.open(folder / "reviews.jsonl.gz", "wb", 1) as file:
        for e in range(n):
            asin = f"B{scramble(item[e], 2654435761):010X}"
            file.write(
                f'{{"rating": {e % 5 + 1}.0, "title": "{words[e % 5000]} {words[e * 7 % 5000]}", '
                f'"text": "{texts[e * 11 % 5000]}", "images": [], "asin": "{asin}", '
                f'"parent_asin": "{asin}", "user_id": "AG{scramble(user[e], 2246822519):026X}", '
                f'"timestamp": {times[e]}, "helpful_vote": {e % 3}, '
                f'"verified_purchase": {"true" if e % 9 else "false"}}}\n'.encode())
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


def watch(line):
    """Runs a command line. -> exit code, seconds, peak GiB, peak GiB of anonymous memory, what it printed.

    The first peak counts pages of mapped files too, which the system may drop at any time."""
    start, most = time.time(), {"VmHWM": 0, "RssAnon": 0}  # KiB
    with tempfile.TemporaryFile("w+") as printed:
        child = subprocess.Popen(line, stdout=printed, stderr=subprocess.STDOUT)
        while child.poll() is None:
            with contextlib.suppress(OSError):  # it has ended by now
                status = pathlib.Path(f"/proc/{child.pid}/status").read_text()
                fields = dict(x.split(":", 1) for x in status.splitlines())
                most = {key: max(peak, int(fields.get(key, "0").split()[0])) for key, peak in most.items()}
            time.sleep(0.2)
        printed.seek(0)
        return (child.returncode, time.time() - start, most["VmHWM"] / 2 ** 20, most["RssAnon"] / 2 ** 20,
                printed.read())


def bench_data(n=5_000_000):
    """Ours, pandas, ours again after a kill: seconds, memory, and whether the results are equal."""
    with tempfile.TemporaryDirectory() as tmp:
        tmp = pathlib.Path(os.environ.get("BENCH_DATA", tmp))  # to use the same reviews again
        path, data = tmp / "reviews/reviews.jsonl.gz", tmp / "run/data.pt"
        if not path.exists():
            make_reviews(path.parent, n)
        line = command(1, "--run", data.parent, "--dataset", path.parent, "--ties", "file", "--image-size", 8)
        code, ours, peak, *_ = watch(line)
        assert code == 0, line
        whole, asked = data.read_bytes(), ">= 2x"
        what = f"01_data.py: {n:,} reviews, seconds"
        rows = [(what, f"{ours:.1f}", "not installed", "", asked)]
        if importlib.util.find_spec("pandas"):
            code, peer, peer_peak, *_ = watch([sys.executable, "-c", PANDAS_SIDE, str(path), str(tmp / "pandas.npz")])
            assert code == 0, "pandas failed"
            d, p = torch.load(data, weights_only=True), np.load(tmp / "pandas.npz")
            same = all(np.array_equal(a, b) for a, b in (
                (d["events"], p["events"]), (d["offsets"], p["offsets"]),
                (d["item_ids"][1:], p["item_ids"]), (d["user_ids"], p["user_ids"])))
            rows = [(what, f"{ours:.1f}", f"{peer:.1f}", f"{peer / ours:.2f}", asked),
                    ("  peak GiB", f"{peak:.2f}", f"{peer_peak:.2f}", "", "<= 1.5 (GB)"),
                    ("  events, offsets, ids equal to pandas'", str(same), "", "", "True")]
        data.unlink()
        child = subprocess.Popen(line, stdout=subprocess.DEVNULL)
        time.sleep(ours / 2)
        child.kill()
        killed = child.wait() != 0 and not data.exists()
        code, again, *_ = watch(line)
        assert code == 0, line
        rows += [("  killed half-way, run again: the same bytes",
                  str(killed and data.read_bytes() == whole), f"({again:.1f} s)", "", "True")]
    return rows


# --- All: the paper's scale -------------------------------------------------------------------------------------------
def make_shop(folder, N=400_000, U=700_000, events=6_500_000, seed=0):
    """A folder for 01_data.py. Items are in hidden groups of 200 with words and pictures of their
    own; four of five events of a user are in one group. The 5-core keeps nearly everything."""
    rng, folder, G = np.random.default_rng(seed), pathlib.Path(folder), max(1, N // 200)
    (folder / "images").mkdir(parents=True, exist_ok=True)
    events = int(1.068 * events)  # 6.4 % repeat what the user had, and are dropped
    more = (U * rng.random(events - 6 * U) ** 2).astype(int)  # six events each; the rest unevenly
    user = np.repeat(np.arange(U), 6 + np.bincount(more, minlength=U))  # (events,)
    group = np.where(rng.random(events) < 0.8, rng.integers(0, G, U)[user],
                     rng.integers(0, G, events))  # (events,)
    order = np.lexsort((rng.random(events), group))  # (events,), of a group in any order
    size = np.bincount(group, minlength=G)[group[order]]  # (events,)
    first = np.searchsorted(group[order], group[order])  # (events,)
    v = (np.arange(events) - first + rng.random(events)) / size  # (events,), even over [0, 1)
    v = np.where(v < 0.45, v / 0.45, ((v - 0.45) / 0.55) ** 4)  # 45 % alike, 55 % Zipf-like
    item = np.empty(events, int)  # (events,)
    item[order] = group[order] + G * (v * (N // G)).astype(int)
    when = 1_300_000_000_000 + rng.integers(0, 3 * 10 ** 11, events)  # (events,), ms

    words = np.array(["".join(map(chr, rng.integers(97, 123, k))) for k in rng.integers(3, 10, 30_000)])
    with gzip.open(folder / "meta.jsonl.gz", "wt", compresslevel=1) as file:
        for part in np.array_split(np.arange(N), max(1, N // 10_000)):
            word = (30_000 ** rng.random((len(part), 40))).astype(int)  # (part, 40): Zipf's law
            of_group = rng.random(word.shape) < 0.3
            word = np.where(of_group, (part % G * 7919)[:, None] + word % 31, word) % 30_000
            for i, line in zip(part.tolist(), words[word].tolist()):
                file.write(f'{{"parent_asin": "B{i:09d}", "title": "{" ".join(line[:6])}", '
                           f'"description": ["{" ".join(line[6:])}."], '
                           f'"categories": ["kind {i % G % 40}", "group {i % G}"], "images": '
                           f'[{{"large": "images/p{(i % G + i) % 1000}.jpg", "variant": "MAIN"}}]}}\n')
    for k in range(1000):
        grid = rng.integers(0, 256, (2 + k % 5, 2 + k % 3, 3), np.uint8)
        Image.fromarray(grid).resize((96, 96)).save(folder / f"images/p{k}.jpg")
    with gzip.open(folder / "reviews.partial", "wt", compresslevel=1) as file:
        for u, i, t in zip(user.tolist(), item.tolist(), when.tolist()):
            file.write(f'{{"rating": {t % 5 + 1}.0, "title": "Five stars", "text": "It does what it '
                       f'should, and came in time.", "images": [], "asin": "B{i:09d}", "parent_asin": '
                       f'"B{i:09d}", "user_id": "AE{u:026d}", "timestamp": {t}, "helpful_vote": 0, '
                       f'"verified_purchase": true}}\n')
    os.replace(folder / "reviews.partial", folder / "reviews.jsonl.gz")  # written last: complete


def bench_scale(scripts=(1, 2, 3, 4, 5, 6), steps=50):
    """All scripts in order; training for some steps. $BENCH_DIR keeps the shop and the run."""
    rows = []
    with tempfile.TemporaryDirectory() as tmp:
        home = pathlib.Path(os.environ.get("BENCH_DIR", tmp))
        if not (home / "shop/reviews.jsonl.gz").exists():
            make_shop(home / "shop")
        for n in scripts:
            options = {1: ["--dataset", home / "shop"]}.get(n, ["--max-steps", steps] * (n in (2, 3, 5)))
            for modality in ("image", "collab"):  # 05 takes the texts' codes for those that a trial does not make
                if n == 5:
                    shutil.copy(home / "run/text_codes.pt", home / f"run/{modality}_codes.pt")
            code, seconds, peak, anonymous, printed = watch(command(n, "--run", home / "run", *options))
            said = [line for line in printed.splitlines() if "an epoch" in line or code]
            rows.append((f"{SCRIPTS[n - 1].name} at the paper's scale; " + " ".join(said[-3:]),
                         f"{seconds:.0f} s, {anonymous:.1f} GiB, {peak:.1f} with mapped files", "", "", "<= 16 GB"))
    return rows


def main():
    benches = {name[6:]: function for name, function in globals().items() if name.startswith("bench_")}
    chosen = sys.argv[1:] or [name for name in benches if name not in LONG]
    if unknown := set(chosen) - set(benches):
        sys.exit(f"There is no {', '.join(sorted(unknown))}: choose from {', '.join(benches)}.")
    if len(chosen) > 1:  # each in a process of its own: peers change torch, modules and the allocator for what follows
        sys.exit(any([subprocess.run([sys.executable, __file__, name]).returncode for name in chosen]))
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads\n")
    print("| what | ours | peer | ratio | asked |\n|---|---|---|---|---|")
    for row in benches[chosen[0]]():
        print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
