"""What the paper's reviewers asked, each question with a command that answers it. Minutes to hours; pytest runs a few parts.

    python tests/questions.py rows --run runs/films --seeds 0 1 2        # the README's tables: all models, every seed
    python tests/questions.py ablations --run runs/films --seeds 0 1 2   # a part of the method less, one at a time
    python tests/questions.py fusion --run runs/films --seeds 0 1 2      # SASRec's and MSCGRec's lists in one
    python tests/questions.py seen --run runs/films                      # the table without what users had before
    python tests/questions.py hole --run runs/films                      # what the last events of a history tell
    python tests/questions.py ceiling missing --run runs/films           # of the models that lie in the run
    python tests/questions.py unseen --run runs/toy                      # items that no training event shows
    python tests/questions.py growth                                     # costs by the size of the catalogue

A run holds the codes of one seed at a time: `hole`, `ceiling` and `missing` speak of the last seed that was run. What a
table needs and is there already (predictions-NAME-sSEED.pt) is not trained again.
"""
import argparse
import itertools
import os
import pathlib
import shutil
import subprocess
import sys
import time

import torch
from bench import best, unique_codes
from conftest import command, script

MODALITIES, FULL = ["image", "text", "collab"], ["--modalities", "image,text,collab", "--target"]
CODES = {"sasrec": (2, "sasrec.pt", []), "dino": (3, "dino.pt", []), "text": (4, "text_codes.pt", []),
         "sasrec-content": (2, "sasrec-content.pt", ["--name", "sasrec-content", "--content", "text,image"])}
ROWS = {"mscgrec": [], "tiger": ["--modalities", "text", "--target", "text"],
        "mscgrec-content": ["--modalities", "image,text,collab-content", "--target", "collab-content"]}
FUSED = {"sasrec+mscgrec": ["sasrec", "mscgrec"], "two-sasrecs": ["sasrec", "sasrec-content"],
         "two-mscgrecs": ["mscgrec", "mscgrec-content"],  # *: the next seed's
         "four-sasrecs": ["sasrec", "sasrec-content", "sasrec*", "sasrec-content*"],
         "all-four": ["sasrec", "sasrec-content", "mscgrec", "mscgrec-content"]}
ABLATIONS = {"no-image": ["--modalities", "text,collab"], "no-text": ["--modalities", "image,collab"],
             "no-collab": ["--modalities", "image,text", "--target", "text"],
             "only-image": ["--modalities", "image", "--target", "image"],
             "only-text": ["--modalities", "text", "--target", "text"], "only-collab": ["--modalities", "collab"],
             "to-text": [*FULL, "text"], "to-image": [*FULL, "image"], "plain-softmax": ["--unconstrained"],
             "no-masking": ["--masking", "0"], "bf16": ["--precision", "bf16"],
             "plain-dino": ["--modalities", "plain,text,collab"],
             "raw-pixels": ["--modalities", "pixels,text,collab"], "no-distance": [], "no-slots": []}


def load(path):
    return torch.load(path, weights_only=True)


def call(number, *options):
    """Runs a script, its output on the screen; ends with it where it fails."""
    print("$", " ".join(command(number, *options)[1:]), flush=True)
    if code := subprocess.run(command(number, *options)).returncode:
        sys.exit(code)


def hits(top, data):
    """Recall@10, a user each: (U, top) -> (U,)"""
    return (script(6).rank_of(data["events"][data["offsets"][1:] - 1], top) <= 10).float()


def table(header, rows):
    print("\n" + script(6).markdown(header, rows) + "\n", flush=True)


# --- Tables of 06_eval.py ---------------------------------------------------------------------------------------------
def prepare(run, seed, names):
    """SASRec and codes of this seed, where the run has none or those of another."""
    for number, file, options in (CODES[name] for name in names):
        made = load(run / file)["options"] if (run / file).exists() else {}
        if made.get("seed") != seed or made.get("plain"):
            call(number, "--run", run, "--seed", seed, *options)


def lacking(run, seed, names):
    return [name for name in names if not (run / f"predictions-{name}-s{seed}.pt").exists()]


def rows(run, seeds, only, epochs):
    """SASRec, SASRec with content, MSCGRec, its row with other codes, and the TIGER-like model, with each seed."""
    for seed in seeds:
        if todo := lacking(run, seed, only or ROWS):
            prepare(run, seed, CODES)
        for name in todo:
            call(5, "--run", run, "--seed", seed, "--epochs", epochs, "--name", name, *ROWS[name])
    call(6, "--run", run)


def more_codes(run, seed):
    """Codes of the same pictures by DINO without a quantiser, and by the pixels themselves."""
    folder = run / "plain"
    folder.mkdir(exist_ok=True)
    for name in ("data.pt", "images.pt"):
        if not (folder / name).exists():
            (folder / name).symlink_to((run / name).resolve())
    call(3, "--run", folder, "--seed", seed, "--plain")
    shutil.move(folder / "image_codes.pt", run / "plain_codes.pt")
    text, data, rng = script(4), load(run / "data.pt"), torch.Generator().manual_seed(seed)
    known, pixels = data["has_image"], load(run / "images.pt")["images"].flatten(1)  # (N+1,), (N+1, 3 * S * S)
    x = pixels[known].float()  # (n, 3 * S * S)
    x = (x - x.mean(0)) @ torch.pca_lowrank(x, 96)[2]  # (n, 96): as wide as RQ-DINO's
    embeddings = torch.zeros(len(known), 96)  # (N+1, 96)
    embeddings[known] = x / x.square().mean().sqrt()
    codebooks = text.residual_kmeans(embeddings[known], text.codebook_size(len(known) - 1), rng)  # (3, K, 96)
    codes, moved = text.finish_codes(embeddings, known, codebooks, data["train_counts"], rng)  # (N+1, L)
    torch.save({"codes": codes, "codebooks": codebooks, "embeddings": embeddings, "known": known, "moved": moved},
               run / "pixels_codes.pt")


def ablations(run, seeds, only, epochs):
    """MSCGRec with one part less. Position biases are held at 0 from here: 05 has no option for that."""
    for seed in seeds:
        if todo := lacking(run, seed, only or ("mscgrec", *ABLATIONS)):
            prepare(run, seed, ("sasrec", "dino", "text"))
        if {"plain-dino", "raw-pixels"} & set(todo):
            more_codes(run, seed)
        for name in todo:
            options = ["--run", run, "--seed", seed, "--epochs", epochs, "--name", name, *ABLATIONS.get(name, [])]
            if name not in ("no-distance", "no-slots"):
                call(5, *options)
                continue
            print(f"05_generator.py, {name}: this bias stays 0", flush=True)
            g = script(5)

            class Without(g.RelativeBias):
                def __init__(self, *args):
                    super().__init__(*args)
                    (self.item if name == "no-distance" else self.slot).requires_grad_(False)
            g.RelativeBias = Without
            g.main([str(option) for option in options])
    call(6, "--run", run, "--against", "mscgrec")


def fuse(lists, k=20):
    """Reciprocal rank fusion (Cormack et al., SIGIR 2009): an item's score is the sum over lists that hold it of
    1 / (k + items above it); k was chosen on validation. Lists of (U, top), best first, 0: none -> (U, top)"""
    top = lists[0].shape[1]
    items = torch.cat(lists, 1).long()  # (U, all)
    points = (1 / (k + torch.arange(top))).repeat(len(lists)) * (items > 0)  # (U, all)
    same = items.unsqueeze(2) == items.unsqueeze(1)  # (U, all, all)
    score = (same * points.unsqueeze(1)).sum(2)  # (U, all)
    score[(same.tril(-1)).any(2)] = -1  # only an item's first place counts
    return items.gather(1, score.topk(top).indices).int()  # (U, top)


def fusion(run, seeds, only, epochs):
    """Several models' lists in one. Any fusion helps: its control is one of as many SASRecs (four: of two seeds)."""
    after = dict(zip(seeds, seeds[1:] + seeds[:1]))
    for seed in seeds:
        for name, parts in FUSED.items():
            paths = [run / f"predictions-{part.strip('*')}-s{after[seed] if '*' in part else seed}.pt"
                     for part in parts]
            if all(path.exists() for path in paths) and len(set(paths)) == len(paths):
                lists = [load(path) for path in paths]
                new = {split: fuse([one[split] for one in lists]) for split in ("valid", "test")}  # (U, top) each
                torch.save({"name": name, "seed": seed, **new}, run / f"predictions-{name}-s{seed}.pt")
    call(6, "--run", run)


def seen(run, seeds, only, epochs):
    """What users had already cannot come again (01 drops repeats), and is still recommended: how much of the first tens
    it is, and the table of 06 without it. All models alike, from their files, into RUN/new."""
    data, new, answers = load(run / "data.pt"), run / "new", []
    new.mkdir(exist_ok=True)
    for old in new.glob("*"):
        old.unlink()
    (new / "data.pt").symlink_to((run / "data.pt").resolve())
    U, N = len(data["user_ids"]), len(data["item_ids"]) - 1
    user = torch.arange(U).repeat_interleave(data["offsets"].diff())  # (events,)
    key = user * (N + 1) + data["events"]  # (events,): a number for each pair of user and item
    key[data["offsets"][1:] - 1] = 0  # of user 0 and padding
    for path in sorted(run.glob("predictions-*.pt")):
        saved = load(path)
        top = saved["test"].long()  # (U, top)
        again = torch.isin(torch.arange(U).unsqueeze(1) * (N + 1) + top, key) & (top > 0)  # (U, top)
        top = top.masked_fill(again, 0).gather(1, again.int().argsort(dim=1, stable=True))  # (U, top), zeros last
        torch.save(saved | {"test": top.int()}, new / path.name)
        answers.append([path.stem[12:], f"{again[:, :10].float().mean():.1%}", f"{(top[:, 9] > 0).float().mean():.1%}"])
    table(["predictions", "of the first ten the user had before", "users with ten others in the list"], answers)
    call(6, "--run", new)


# --- Questions to models that lie in the run --------------------------------------------------------------------------
def generator(run, name, hidden=()):
    """The trained model; modalities in `hidden` are those that all items of a history lack. -> model, tree, args"""
    g, saved = script(5), load(run / f"generator-{name}.pt")
    args = argparse.Namespace(**saved["options"])
    modalities = args.modalities.split(",")
    sources = [load(run / f"{m}_codes.pt") for m in modalities]
    codes, known = (torch.stack([s[key] for s in sources], 1) for key in ("codes", "known"))  # (N+1, D, L), (N+1, D)
    for m in set(hidden) & set(modalities):
        known[:, modalities.index(m)] = False
    target, books = modalities.index(args.target), [s["codebooks"] for s in sources]
    model = g.Generator(codes.long(), known, target, books, args)
    model.load_state_dict(saved["weights"])
    return g, model, g.Trie(codes[:, target], books[0].shape[1]), args


def missing(run, seeds, only, epochs):
    """Test histories without a modality, of models trained with masking and (row no-masking) without."""
    data, answers = load(run / "data.pt"), []
    everyone = torch.arange(len(data["user_ids"]))
    for name in only or ("mscgrec", "no-masking"):
        if not (run / f"generator-{name}.pt").exists():
            print(f"{run}/generator-{name}.pt is not there: skipped")
            continue
        cells = []
        for hidden in ([], *([m] for m in MODALITIES)):
            g, model, trie, args = generator(run, name, hidden)
            top = g.recommend(model, trie, data, "test", everyone, args, torch.device("cpu"))[0]
            cells.append(f"{hits(top, data).mean():.4f}")
        answers.append([name, *cells])
    table(["Recall@10", "all", *(f"no {m} at test time" for m in MODALITIES)], answers)


@torch.no_grad()
def sasrec_scores(run, data, split, gap=0):
    """All items' scores (U, N) by the run's SASRec, if it does not know the last `gap` events (the first it does)."""
    saved, s, N = load(run / "sasrec.pt"), script(2), len(data["item_ids"]) - 1
    options = argparse.Namespace(**saved["options"])
    model = s.SASRec(N, options.length, options.width, options.heads, options.layers, 0.0,
                     post=getattr(options, "post_norm", False))
    model.load_state_dict(saved["weights"])
    model.eval()
    start, length = s.windows(split, data["offsets"], options.length)  # (U,) both
    length, hidden = (length - gap).clamp(min=1), torch.zeros(len(start), options.width)  # (U,), (U, E)
    for batch in s.equal_length_batches(length, 8192):
        history = data["events"][start[batch, None] + torch.arange(length[batch[0]])]  # (B, T)
        hidden[batch] = model(history.long())[:, -1]
    return hidden @ model.vectors()[1:].T


def hole(run, seeds, only, epochs):
    """What a hole in the history costs: SASRec on validation, if it does not know the last events before the one to be
    found. With and without the items of the known history: nobody has one twice, and others leave them out."""
    six, data, answers = script(6), load(run / "data.pt"), []
    truth = data["events"][data["offsets"][1:] - 2]  # (U,)
    for gap in (0, 1, 2):
        scores, cells = sasrec_scores(run, data, "valid", gap), []  # (U, N)
        new = scores.clone()  # (U, N)
        for u, (begin, end) in enumerate(itertools.pairwise(data["offsets"].tolist())):
            new[u, data["events"][begin:end - 2 - gap].long() - 1] = -torch.inf
        for some in (scores, new):
            top = some.topk(10).indices + 1  # (U, 10)
            cells += [f"{x:.4f}" for x in six.gains(six.rank_of(truth, top)).mean(0)[[2, 4]]]
        answers.append([str(gap), *cells])
    table(["events not known", "Recall@10", "NDCG@10", "without the history's items: Recall@10", "NDCG@10"], answers)


def ceiling(run, seeds, only, epochs):
    """Where recall is lost. Codes: SASRec's own recall if all items that share a prefix get its mean score (ties at
    random). Beam: what it finds of the first tens by exhaustive scoring. Fit: the loss of each code on test events."""
    data, answers = load(run / "data.pt"), []
    scores, N = sasrec_scores(run, data, "test"), len(data["item_ids"]) - 1  # scores: (U, N)
    for modality in MODALITIES:
        codes, cells = load(run / f"{modality}_codes.pt")["codes"][1:], []  # (N, L)
        for l in (1, 2, 3, 4):
            group = codes[:, :l].unique(dim=0, return_inverse=True)[1]  # (N,)
            size = torch.bincount(group)  # (groups,)
            mean = torch.zeros(len(scores), len(size)).index_add_(1, group, scores) / size  # (U, groups)
            torch.manual_seed(0)
            top = (mean[:, group] + 1e-6 * torch.rand(N)).topk(10).indices + 1  # (U, 10)
            cells.append(f"{hits(top, data).mean():.4f}")
        answers.append([modality, *cells])
    table(["SASRec's Recall@10 by means over", "1 code", "2 codes", "3 codes", "all 4: its own"], answers)

    g, model, trie, args = generator(run, "mscgrec")
    users = torch.randperm(len(scores))[:200]
    narrow, wide = (g.recommend(model.eval(), trie, data, "test", users, argparse.Namespace(
        **{**vars(args), "beam": beam}), torch.device("cpu"))[0][:, :10] for beam in (args.beam, N))  # (200, 10) both
    found = (wide.unsqueeze(2) == narrow.unsqueeze(1)).any(2).float().mean()
    print(f"200 users: {found:.1%} of the first ten by exhaustive scoring are among the first ten of beam {args.beam}")
    start, length = g.windows("test", data["offsets"], args.length)  # (U,) both
    total, codes = torch.zeros(trie.L), load(run / f"{args.target}_codes.pt")["codes"].long()  # (L,), (N+1, L)
    with torch.no_grad():
        for batch in g.equal_length_batches(length, 1024):
            events = data["events"][start[batch, None] + torch.arange(length[batch[0]] + 1)].long()  # (B, S+1)
            logits, items = model(events[:, :-1], events[:, 1:])[:, -1], events[:, -1]  # (B, L, K), (B,)
            total += g.code_losses(logits, codes[items], items, trie)
    losses = load(run / "generator-mscgrec.pt")["losses"]  # (epochs, L)
    shown = lambda x: [f"{y:.2f}" for y in (*x, x.sum())]
    table(["mscgrec's loss, nats", "code 1", "code 2", "code 3", "code 4", "sum"],
          [["training, last epoch (with dropout)", *shown(losses[-1])], ["test events", *shown(total / len(start))]])


def unseen(run, seeds, only, epochs):
    """A twentieth of the items lose all events but those to be found; the models are trained without them."""
    target_of = {"sasrec": None, "to-collab": "collab", "to-text": "text", "to-image": "image"}
    data, totals = load(run / "data.pt"), {}
    for seed in seeds:
        torch.manual_seed(seed)
        N, folder = len(data["item_ids"]) - 1, run / f"unseen-{seed}"
        folder.mkdir(exist_ok=True)
        held = torch.zeros(N + 1, dtype=torch.bool)  # (N+1,)
        held[1 + torch.randperm(N)[:N // 20]] = True
        last = torch.zeros(len(data["events"]), dtype=torch.bool)  # (events,)
        last[data["offsets"][1:] - 1] = True
        stays = ~held[data["events"].long()] | last  # (events,)
        user = torch.arange(len(data["user_ids"])).repeat_interleave(data["offsets"].diff())  # (events,)
        stays &= (torch.bincount(user[stays], minlength=len(data["user_ids"])) >= 3)[user]
        users, events = user[stays].unique(return_counts=True), data["events"][stays]
        offsets = torch.cat([torch.zeros(1).long(), users[1].cumsum(0)])  # (U+1,)
        training = torch.ones(len(events), dtype=torch.bool)  # (events,)
        training[torch.cat([offsets[1:] - 1, offsets[1:] - 2])] = False
        counts = torch.bincount(events[training].long(), minlength=N + 1).int()  # (N+1,)
        assert not counts[held].any()
        new = data | {"events": events, "offsets": offsets, "train_counts": counts,
                      "user_ids": [data["user_ids"][u] for u in users[0]]}
        torch.save(new, folder / "data.pt")
        if not (folder / "images.pt").exists():
            (folder / "images.pt").symlink_to((run / "images.pt").resolve())
        for number in (2, 3, 4):
            call(number, "--run", folder, "--seed", seed)
        rare = held[events[offsets[1:] - 1].long()]  # (U,): users whose item to be found is unseen
        for name, target in target_of.items():
            if target:
                call(5, "--run", folder, "--seed", seed, "--epochs", epochs, "--name", name, "--target", target)
            hit = hits(load(folder / f"predictions-{name}-s{seed}.pt")["test"], new)  # (U,)
            totals.setdefault(name, []).append(torch.stack([hit[rare].mean(), hit[~rare].mean()]))
    print(f"{int(rare.sum())} of {len(rare)} users (last seed) are to find an unseen item; chance {10 / N:.4f}")
    table(["Recall@10, mean of the seeds", "unseen items", "all others"],
          [[name, *(f"{x:.4f}" for x in torch.stack(some).mean(0))] for name, some in totals.items()])


def growth(run, seeds, only, epochs):
    """Default sizes, random codes: what an item costs, and what a recommendation costs."""
    g, s, answers = script(5), script(2), []
    args = argparse.Namespace(width=64, layers=2, heads=4, head=16, inner=256, dropout=0.1)
    known, books = torch.ones(1_000_001, 3, dtype=torch.bool), [torch.randn(3, 256, 64)] * 3
    for N in (10_000, 100_000, 1_000_000):
        torch.manual_seed(0)
        codes = torch.stack([unique_codes(N) for _ in MODALITIES], 1)  # (N+1, D, L)
        model = g.Generator(codes, known[:N + 1], 2, books, args).eval()
        trie, baseline = g.Trie(codes[:, 2], 256), s.SASRec(N, 20, 64, 2, 2, 0.5).eval()
        tree = sum(t.nbytes for t in [*trie.keys, *trie.allowed, trie.leaf_item])
        sizes = [4 * N * 64, 2 * codes[1:].numel() + 4 * model.tokens.weight.numel() + tree]
        with torch.no_grad():
            for B in (1, 256):
                x = torch.randint(1, N + 1, (B, 20))  # (B, T)
                sizes += [1000 / B * best(work, 3) for work in (
                    lambda: (baseline(x)[:, -1] @ baseline.vectors()[1:].T).topk(20),
                    lambda: g.beam_search(model, trie, x, 20))]
        answers.append([f"{N:,}", *(f"{x / 1e6:.1f}" for x in sizes[:2]), *(f"{x:.2f}" for x in sizes[2:])])
    table(["items", "MB, SASRec's table", "MB, codes, tokens, tree", "s / 1,000 users one by one: SASRec", "MSCGRec",
           "256 at once: SASRec", "MSCGRec"], answers)


def main():
    parts = {f.__name__: f for f in (rows, ablations, fusion, seen, hole, ceiling, missing, unseen, growth)}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="+", choices=parts)
    parser.add_argument("--run", type=pathlib.Path, default=pathlib.Path("runs/toy"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", nargs="+", default=[], help="of rows, ablations, missing: some names")
    parser.add_argument("--epochs", type=int, default=30, help="of 05 in rows, ablations, unseen")
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {os.cpu_count()} cores")
    for part in args.part:
        began = time.time()
        parts[part](args.run, args.seeds, args.only, args.epochs)
        print(f"{part}: {(time.time() - began) / 60:.1f} minutes", flush=True)


if __name__ == "__main__":
    main()
