"""What the paper's reviewers asked, each question with a command that answers it. Minutes to hours; pytest runs a few.

    python tests/questions.py rows --run runs/films --seeds 0 1 2        # the README's tables: all models, every seed
    python tests/questions.py ablations --run runs/films --seeds 0 1 2   # a part of the method less, one at a time
    python tests/questions.py related --run runs/films --seeds 0 1 2     # ten related systems, one idea of each
    python tests/questions.py fusion --run runs/films --seeds 0 1 2      # SASRec's and MSCGRec's lists in one
    python tests/questions.py seen --run runs/films                      # the table without what users had before
    python tests/questions.py hole --run runs/films                      # what the last events of a history tell
    python tests/questions.py lost missing --run runs/films              # of the models that lie in the run
    python tests/questions.py unseen --run runs/toy                      # items that no training event shows
    python tests/questions.py ceiling --run runs/toy                     # the best that any model could do
    python tests/questions.py probe --run runs/toy                       # what image vectors and codes know of the shop
    python tests/questions.py memory --run runs/toy                      # what SASRec's vectors learnt by heart
    python tests/questions.py growth                                     # costs by the size of the catalogue

A run holds the codes of one seed at a time: `hole`, `lost` and `missing` speak of the seed that was run last, and a
generator whose codes were replaced since is refused. What a table needs and is there already
(predictions-NAME-sSEED.pt) is not trained again.

letters  B users in a batch, T items of history, L codes of an item in one modality, K values of a code, N items,
         U users, E width of a model, S side of a picture, d width of a vector that is cut into codes, n items of a toy
         shop before the 5-core, F combinations of a customer's favourites
"""
import argparse
import contextlib
import copy
import importlib
import io
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from bench import MODALITIES, K, best, random_sources
from conftest import ROOT, command, script

sys.path.append(str(ROOT / "tests" / "related"))


class Maker(NamedTuple):
    """How something is made that 05 reads, and how to see of which seed the one in the run is."""
    number: int    # of the script
    options: str
    file: str      # one of those that it writes: it holds the options of its run


# In the order in which they can be made: the last one reads the codes of the two before it.
MAKERS = {
    "sasrec": Maker(2, "", "sasrec.pt"),
    "dino": Maker(3, "", "dino.pt"),
    "text": Maker(4, "", "text_codes.pt"),
    "sasrec-content": Maker(2, "--name sasrec-content --content text,image", "sasrec-content.pt"),
}

# Rows of the table: options of 05.
ROWS = {
    "mscgrec": "",
    "tiger": "--modalities text --target text",
    "mscgrec-content": "--modalities image,text,collab-content --target collab-content",
    "lookahead": "--lookahead",
    "lookahead-content": "--lookahead --modalities image,text,collab-content --target collab-content",
}

# MSCGRec with something less or another: options of 05. Without an option it has all three modalities and writes the
# collaborative one.
ABLATIONS = {
    "no-image": "--modalities text,collab",
    "no-text": "--modalities image,collab",
    "no-collab": "--modalities image,text --target text",
    "no-collab-shown": "--modalities image,text --target collab",
    "only-image": "--modalities image --target image",
    "only-text": "--modalities text --target text",
    "only-collab": "--modalities collab",
    "to-text": "--target text",
    "to-image": "--target image",
    "plain-softmax": "--unconstrained",
    "no-masking": "--masking 0",
    "bf16": "--precision bf16",
    "plain-dino": "--modalities plain,text,collab",
    "raw-pixels": "--modalities pixels,text,collab",
    "no-distance": "",
    "no-slots": "",
    "lookahead": "--lookahead",
    "lookahead-no-image": "--lookahead --modalities text,collab",
    "lookahead-no-text": "--lookahead --modalities image,collab",
    "lookahead-no-collab-shown": "--lookahead --modalities image,text --target collab",
    "lookahead-only-collab": "--lookahead --modalities collab",
    "lookahead-raw-pixels": "--lookahead --modalities pixels,text,collab",
    "lookahead-not-shrunk": "--lookahead --shrunk none",
    "lookahead-no-neighbours": "--lookahead --neighbours 0",
}

# Of two ablations: which table of the position biases stays at 0. 05 has no option for that.
HELD_AT_ZERO = {
    "no-distance": "item",
    "no-slots": "slot",
}

# The files in tests/related, and what each is told in a shop without pictures; None: it needs them.
RELATED = {
    "liger": "--modalities text,collab",
    "mtgrec": "--modalities text,collab",
    "mmgrec": "",
    "lamia": "",
    "ccfrec": "--content text",
    "missrec": "--content text",
    "macrec": None,
    "utgrec": "",
    "gamer": "--modalities text,collab",
    "hymirec": "",
}

# Lists put into one: each is a model, and by how many seeds it is further than the row's own seed.
FUSED = {
    "sasrec+mscgrec": [("sasrec", 0), ("mscgrec", 0)],
    "two-sasrecs": [("sasrec", 0), ("sasrec-content", 0)],
    "two-mscgrecs": [("mscgrec", 0), ("mscgrec-content", 0)],
    "four-sasrecs": [("sasrec", 0), ("sasrec-content", 0), ("sasrec", 1), ("sasrec-content", 1)],
    "all-four": [("sasrec", 0), ("sasrec-content", 0), ("mscgrec", 0), ("mscgrec-content", 0)],
}


def load(path):
    return torch.load(path, weights_only=True)


def call(number, *options):
    """Runs a script, its output on the screen; ends with it where it fails."""
    code = show(command(number, *options))
    if code != 0:
        sys.exit(code)


def show(line):
    """Runs a command line, its output on the screen. line: list of str -> its exit code"""
    print("$", " ".join(line[1:]), flush=True)
    return subprocess.run(line).returncode


def link(name, run, folder):
    """Shows a file of the run in another folder, without a copy."""
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to((run / name).resolve())


def table(header, rows):
    print("\n" + script(6).markdown(header, rows) + "\n", flush=True)


def decimals(numbers, form=".4f"):
    """Numbers as the cells of a table. -> list of str"""
    return [format(float(number), form) for number in numbers]


def hits(top, data):
    """Each user's Recall@10: 1 where the last event is among the first ten. (U, top) -> (U,)"""
    target = data["events"][data["offsets"][1:] - 1]                    # (U,)
    rank = script(6).rank_of(target, top)                               # (U,)
    return (rank <= 10).float()                                         # (U,)


def had_before(data, left_out):
    """Which items a user had, the last `left_out` events not counted. -> bool (U, N+1)

    A byte for each pair of user and item: 270 MB for Amazon Beauty of 2014.
    """
    events = data["events"].long()                                      # (events,)
    offsets = data["offsets"]                                           # (U+1,)
    U = len(data["user_ids"])
    user = torch.arange(U).repeat_interleave(offsets.diff())            # (events,)
    end = offsets[1:][user] - left_out                                  # (events,) of that user's counted events
    counts = torch.arange(len(events)) < end                            # (events,)

    had = torch.zeros(U, len(data["item_ids"]), dtype=torch.bool)       # (U, N+1)
    had[user[counts], events[counts]] = True
    return had


# --- Tables of 06_eval.py: models are trained, or their lists changed, and 06 compares them ---------------------------


def chosen(only, names):
    """The names that --only has, or all of them. Ends where there is no such name."""
    unknown = [name for name in only if name not in names]
    if unknown:
        sys.exit(f"There is no {', '.join(unknown)}: --only takes some of {', '.join(names)}.")
    return only or list(names)


def lacking(run, seed, names):
    """Those that have no predictions of this seed yet."""
    return [name for name in names if not (run / f"predictions-{name}-s{seed}.pt").exists()]


def prepare(run, seed, names, pictures=True):
    """SASRec and codes of this seed, where the run has none or those of another."""
    for name in names:
        maker = MAKERS[name]
        if not pictures:
            if name == "dino":
                continue
            maker = maker._replace(options=maker.options.replace("text,image", "text"))
        made_with = {}
        if (run / maker.file).exists():
            made_with = load(run / maker.file)["options"]
        # Somebody may have made image codes with 03 --plain: they are not those of the method.
        if made_with.get("seed") != seed or made_with.get("plain"):
            call(maker.number, "--run", run, "--seed", seed, *maker.options.split())


def generator_options(args, seed, name, options):
    """The command line of 05 for one row. -> list of str"""
    line = ["--run", args.run, "--seed", seed, "--name", name, *options.split()]
    if args.epochs is not None:
        line += ["--epochs", args.epochs]
    return [str(part) for part in line]


def rows(args):
    """SASRec, SASRec with content, MSCGRec, its row with other codes, and the TIGER-like model, with each seed."""
    names = chosen(args.only, ROWS)
    for seed in args.seeds:
        todo = lacking(args.run, seed, names)
        if todo:
            prepare(args.run, seed, MAKERS)
        for name in todo:
            call(5, *generator_options(args, seed, name, ROWS[name]))
    call(6, "--run", args.run)


def ablations(args):
    """MSCGRec with one part less."""
    names = chosen(args.only, ["mscgrec", *ABLATIONS])
    for seed in args.seeds:
        todo = lacking(args.run, seed, names)
        if todo:
            prepare(args.run, seed, ["sasrec", "dino", "text"])
        if "plain-dino" in todo:
            make_plain_codes(args.run, seed)
        if "raw-pixels" in todo or "lookahead-raw-pixels" in todo:
            make_pixel_codes(args.run, seed)
        for name in todo:
            options = generator_options(args, seed, name, ABLATIONS.get(name, ""))
            if name in HELD_AT_ZERO:
                train_without_bias(HELD_AT_ZERO[name], options)
            else:
                call(5, *options)
    call(6, "--run", args.run, "--against", "mscgrec")


def make_plain_codes(run, seed):
    """plain_codes.pt: k-means after DINO without a quantiser. In a folder of its own, as 03 writes image_codes.pt."""
    folder = run / "plain"
    folder.mkdir(exist_ok=True)
    link("data.pt", run, folder)
    link("images.pt", run, folder)
    call(3, "--run", folder, "--seed", seed, "--plain")
    os.replace(folder / "image_codes.pt", run / "plain_codes.pt")


def make_pixel_codes(run, seed):
    """pixels_codes.pt: k-means of the pixels themselves, of which no network has learnt anything."""
    text = script(4)
    data = load(run / "data.pt")
    known = data["has_image"]                                           # (N+1,)
    images = load(run / "images.pt")["images"]                          # (N+1, 3, S, S)
    pixels = images[known].flatten(1).float()                           # (n, 3 * S * S)

    # Their principal coordinates, as many as the embeddings of RQ-DINO have.
    torch.manual_seed(seed)
    width = min(96, *pixels.shape)
    _, _, directions = torch.pca_lowrank(pixels, width)                 # (3 * S * S, width)
    x = (pixels - pixels.mean(0)) @ directions                          # (n, width)

    # From here on as 04 does it with the vectors of texts.
    embeddings = text.standard_embeddings(x, known)                     # (N+1, width)
    rng = torch.Generator().manual_seed(seed)
    K = text.codebook_size(len(known) - 1)
    codebooks = text.residual_kmeans(embeddings[known], K, rng)         # (3, K, width)
    codes, moved = text.finish_codes(embeddings, known, codebooks, data["train_counts"], rng)  # (N+1, L)
    artifact = {
        "codes": codes,
        "codebooks": codebooks,
        "embeddings": embeddings,
        "known": known,
        "moved": moved,
    }
    torch.save(artifact, run / "pixels_codes.pt")


def train_without_bias(which, options):
    """Runs 05 with one table of its position biases held at 0. which: "item" or "slot", options: list of str"""
    print("$ 05_generator.py", *options, f"# the bias `{which}` stays 0", flush=True)
    five = script(5)
    build = five.build

    def build_without(sources, data, args):
        # The tables start at 0, so what is not trained adds nothing.
        model, trie = build(sources, data, args)
        for bias in (model.encoder_bias, model.cross_bias):
            getattr(bias, which).requires_grad_(False)
        return model, trie

    five.build = build_without
    five.main(options)


def related(args):
    """One idea of each of ten related systems: its base, the variation, and controls that must fail."""
    data = load(args.run / "data.pt")
    pictures = bool(data["has_image"].any())
    for name in chosen(args.only, RELATED):
        options = "" if pictures else RELATED[name]
        if options is None:
            print(f"{name}: needs pictures, which this shop has not: skipped")
            continue
        system = importlib.import_module(name)
        names = list(dict.fromkeys([system.BASE, *system.VARIANTS]))  # some bases are a variant, too
        done = all([train_related(args, name, system, seed, names, options.split()) for seed in args.seeds])
        if done:
            compare_related(args, name, system, data)


def train_related(args, name, system, seed, names, options):
    """The rows of a system that a seed lacks. -> is it a system for this shop?"""
    todo = lacking(args.run, seed, names)
    if todo:
        pictures = bool(load(args.run / "data.pt")["has_image"].any())
        prepare(args.run, seed, MAKERS, pictures)
    # --epochs is of 05: a variation of 02 has as many as its base.
    epochs = []
    if args.epochs is not None and hasattr(system, "five"):
        epochs = ["--epochs", str(args.epochs)]
    for row in lacking(args.run, seed, names):  # SASRec's rows are there now
        line = ["--run", str(args.run), "--seed", str(seed), *epochs, *options]
        if row in system.VARIANTS:
            path = ROOT / "tests" / "related" / f"{name}.py"
            code = show([sys.executable, str(path), *line, "--variant", row])
        else:
            code = show(command(5, *line, "--name", row))
        if code == 2:
            print(f"{name}: not for this shop (see the line above): skipped")
            return False
        if code != 0:
            sys.exit(code)
    return True


def compare_related(args, name, system, data):
    """The table of one system, each variant less the base."""
    six = script(6)
    rows = {}
    for row in [system.BASE, *system.VARIANTS]:
        files = [load(args.run / f"predictions-{row}-s{seed}.pt") for seed in args.seeds]
        rows[row] = [six.measure(saved, data) for saved in files]
    base = six.gains_by_seed(rows[system.BASE])                         # (seeds, U, metrics)
    answers = []
    for row, seeds in rows.items():
        ours = six.gains_by_seed(seeds)                                 # (seeds, U, metrics)
        recall, ndcg = ours.mean((0, 1))[[six.RECALL_10, six.NDCG_10]]  # () both
        low, high = six.interval_of_difference(ours, base, True)[:, six.NDCG_10]  # () both
        answers.append([
            row,
            system.VARIANTS.get(row, "its base"),
            *decimals([recall, ndcg]),
            "" if row == system.BASE else f"[{low:+.4f}, {high:+.4f}]",
            f"{seeds[0]['parameters']:,}",
            f"{sum(one['train'] for one in seeds) / len(seeds):.0f}",
        ])
    header = [name, "what changes", "Recall@10", "NDCG@10", "NDCG@10 - base", "parameters", "s, training"]
    table(header, answers)


def fusion(args):
    """Several models' lists in one. Any fusion helps: its control is one of as many SASRecs (four: of two seeds)."""
    for place, seed in enumerate(args.seeds):
        for name, parts in FUSED.items():
            paths = []
            for model, further in parts:
                # The seeds are a ring: after the last one comes the first.
                other = args.seeds[(place + further) % len(args.seeds)]
                paths.append(args.run / f"predictions-{model}-s{other}.pt")

            # With one seed, the next one is the same: nothing to put together.
            distinct = len(set(paths)) == len(paths)
            if distinct and all(path.exists() for path in paths):
                lists = [load(path) for path in paths]
                fused = {"name": name, "seed": seed}
                for split in ("valid", "test"):
                    fused[split] = fuse([one[split] for one in lists])  # (U, top)
                torch.save(fused, args.run / f"predictions-{name}-s{seed}.pt")
    call(6, "--run", args.run)


def fuse(lists, k=20):
    """Reciprocal rank fusion (Cormack et al., SIGIR 2009): the best items of several lists together.

        score(item) = sum over the lists that hold it of 1 / (k + items above it)

    k was chosen on validation. lists: each (U, top), best first, 0: no item -> (U, top)
    """
    # All lists of a user in one row. An entry has points for its place in the list that it comes from.
    items = torch.cat(lists, 1).long()                                  # (U, all)
    top = lists[0].shape[1]
    above = torch.arange(top).repeat(len(lists))                        # (all,)
    points = 1 / (k + above) * (items > 0)                              # (U, all)

    # An entry's score: the points of all entries of the row that hold the same item.
    #   items    5   3   3   8        two lists, 5 3 and 3 8
    #   points  1/20 1/21 1/20 1/21
    #   score   1/20 1/20 + 1/21, twice  1/21
    same = items.unsqueeze(2) == items.unsqueeze(1)                     # (U, all, all): entry, other entry
    score = (same * points.unsqueeze(1)).sum(2)                         # (U, all)

    # Each item must come once: an entry falls out if one before it holds the same item. tril(-1) keeps the pairs below
    # the diagonal, where the other entry stands before.
    repeats = same.tril(-1).any(2)                                      # (U, all)
    score[repeats] = -1
    best_entries = score.topk(top).indices                              # (U, top)
    return items.gather(1, best_entries).int()                          # (U, top)


def seen(args):
    """What users had already cannot come again (01 drops repeats), and is still recommended: how much of the first tens
    it is, and the table of 06 without it. All models alike, from their files, into RUN/new."""
    data = load(args.run / "data.pt")
    new = args.run / "new"
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir()
    link("data.pt", args.run, new)

    had = had_before(data, left_out=1)                                  # (U, N+1), all but the item to be found
    answers = []
    for path in sorted(args.run.glob("predictions-*.pt")):
        saved = load(path)
        top = saved["test"].long()                                      # (U, top)
        again = had.gather(1, top)                                      # (U, top); nobody had item 0

        # What the user had goes, the others move up, and the end of the list is empty: 7 3 9 becomes 7 9 0 without
        # 3. A stable sort by "had it" brings the others to the front and leaves them in their order.
        order = again.int().argsort(dim=1, stable=True)                 # (U, top)
        left = top.masked_fill(again, 0).gather(1, order)               # (U, top)
        torch.save({**saved, "test": left.int()}, new / path.name)

        name = path.stem.removeprefix("predictions-")
        of_first_ten = again[:, :10].float().mean()
        ten_are_left = (left[:, :10] > 0).all(1).float().mean()
        answers.append([name, f"{of_first_ten:.1%}", f"{ten_are_left:.1%}"])
    table(["predictions", "of the first ten the user had before", "users with ten others in the list"], answers)
    call(6, "--run", new)


# --- Questions to models that lie in the run --------------------------------------------------------------------------


def trained_generator(folder, name, hidden=None):
    """The generator of that name. hidden: a modality that all items of all histories lack.

    -> the script as a module, model, tree, options of its run
    """
    five = script(5)
    run = five.Run(folder)
    data = run.load("data.pt", "01_data.py")
    args = argparse.Namespace(**load(folder / f"generator-{name}.pt")["options"])
    args.device = "cpu"
    sources = five.read_codes(run, data, args)
    # Read once more, after the codes: now `load` refuses it if it was made from others.
    saved = run.load(f"generator-{name}.pt", "05_generator.py")

    if hidden in sources:
        sources[hidden]["known"][:] = False
    model, trie = five.build(sources, data, args)
    model.load_state_dict(saved["weights"])
    return five, model.eval(), trie, args


def missing(args):
    """Test histories without a modality, of models trained with masking and (row no-masking) without."""
    data = load(args.run / "data.pt")
    everyone = torch.arange(len(data["user_ids"]))                      # (U,)
    answers = []
    for name in args.only or ["mscgrec", "no-masking"]:
        if not (args.run / f"generator-{name}.pt").exists():
            print(f"{args.run}/generator-{name}.pt is not there: skipped")
            continue
        recall = []
        for hidden in [None, *MODALITIES]:
            five, model, trie, trained = trained_generator(args.run, name, hidden)
            top, _ = five.recommend(model, trie, data, "test", everyone, trained)  # (U, beam)
            recall.append(hits(top, data).mean())
        answers.append([name, *decimals(recall)])
    without = [f"no {modality} at test time" for modality in MODALITIES]
    table(["Recall@10", "all", *without], answers)


@torch.no_grad()
def sasrec_scores(folder, data, split, unknown=0):
    """What the run's SASRec gives to every item, if it does not know the last `unknown` events of the history (a
    history keeps its first event in any case). -> (U, N)
    """
    two = script(2)
    run = two.Run(folder)
    saved = run.load("sasrec.pt", "02_sasrec.py")
    args = argparse.Namespace(**saved["options"])
    args.device = "cpu"
    with contextlib.redirect_stdout(io.StringIO()):  # it would print how large the model is
        model = two.build(run, data, args)
    model.load_state_dict(saved["weights"])
    model.eval()

    start, length = two.held_out_windows(split, data["offsets"], args.length)  # (U,) both
    length = (length - unknown).clamp(min=1)                            # (U,)
    hidden = torch.zeros(len(start), args.width)                        # (U, E)
    for batch in two.equal_length_batches(length, two.RANKED_EVENTS):
        place = torch.arange(length[batch[0]])                          # (T,)
        history = data["events"][start[batch, None] + place]            # (B, T)
        hidden[batch] = model(history.long())[:, -1]                    # (B, E)
    return hidden @ model.vectors()[1:].T                               # (U, N)


def hole(args):
    """What a hole in the history costs: SASRec on validation, if it does not know the last events before the one to be
    found. With and without the items of the known history: nobody has one twice, and others leave them out."""
    six = script(6)
    data = load(args.run / "data.pt")
    target = data["events"][data["offsets"][1:] - 2]                    # (U,)
    answers = []
    for unknown in (0, 1, 2):
        scores = sasrec_scores(args.run, data, "valid", unknown)        # (U, N)
        # The last two events are those to be found, for validation and for the test.
        had = had_before(data, left_out=2 + unknown)[:, 1:]             # (U, N)
        new = scores.masked_fill(had, -torch.inf)                       # (U, N)
        cells = [str(unknown)]
        for some in (scores, new):
            top = some.topk(10).indices + 1                             # (U, 10)
            mean = six.gains(six.rank_of(target, top)).mean(0)          # (metrics,)
            cells += decimals([mean[six.RECALL_10], mean[six.NDCG_10]])
        answers.append(cells)
    table(["events not known", "Recall@10", "NDCG@10", "without the history's items: Recall@10", "NDCG@10"], answers)


def lost(args):
    """Where recall is lost: in the codes, in the beam, or in what the generator has learnt?"""
    data = load(args.run / "data.pt")
    what_codes_lose(args.run, data)
    five, model, trie, trained = trained_generator(args.run, "mscgrec")
    what_the_beam_loses(five, model, trie, trained, data)
    what_does_not_last(five, model, trie, trained, data, args.run)


def what_codes_lose(run, data):
    """SASRec's own recall if all items that share a prefix get the mean of their scores."""
    scores = sasrec_scores(run, data, "test")                           # (U, N)
    U, N = scores.shape
    answers = []
    for modality in MODALITIES:
        codes = load(run / f"{modality}_codes.pt")["codes"][1:]         # (N, L)
        recall = []
        for l in (1, 2, 3, 4):
            # Items of one prefix are a group, and the scores of a group are put together.
            _, group = codes[:, :l].unique(dim=0, return_inverse=True)  # (N,)
            size = torch.bincount(group)                                # (groups,)
            total = torch.zeros(U, len(size)).index_add_(1, group, scores)  # (U, groups)
            mean = total / size                                         # (U, groups)

            # Within a group chance decides: the order of the items' numbers must not.
            torch.manual_seed(0)
            luck = 1e-6 * torch.rand(N)                                 # (N,)
            top = (mean[:, group] + luck).topk(10).indices + 1          # (U, 10)
            recall.append(hits(top, data).mean())
        answers.append([modality, *decimals(recall)])
    table(["SASRec's Recall@10 by means over", "1 code", "2 codes", "3 codes", "all 4: its own"], answers)


def what_the_beam_loses(five, model, trie, args, data):
    """How much of the first tens by exhaustive scoring the beam finds: a beam of N is that."""
    torch.manual_seed(0)
    users = torch.randperm(len(data["user_ids"]))[:200]                 # (200,)
    exhaustive = copy.copy(args)
    exhaustive.beam = len(data["item_ids"]) - 1
    found, _ = five.recommend(model, trie, data, "test", users, args)   # (200, beam)
    best_of_all, _ = five.recommend(model, trie, data, "test", users, exhaustive)  # (200, N)

    found = found[:, :10].unsqueeze(1)                                  # (200, 1, 10)
    best_ten = best_of_all[:, :10].unsqueeze(2)                         # (200, 10, 1)
    share = (best_ten == found).any(2).float().mean()                   # ()
    print(f"{len(users)} users: {share:.1%} of the first ten by exhaustive scoring are among the first ten of "
          f"beam {args.beam}")


@torch.no_grad()
def what_does_not_last(five, model, trie, args, data, run):
    """The loss of each code, in training and on the test events."""
    start, length = five.held_out_windows("test", data["offsets"], args.length)  # (U,) both
    total = torch.zeros(trie.L)                                         # (L,)
    for batch in five.equal_length_batches(length, five.RANKED_EVENTS):
        place = torch.arange(length[batch[0]] + 1)                      # (T+1,)
        events = data["events"][start[batch, None] + place].long()      # (B, T+1)
        # The generator writes an item after each place of the history. Here only the last one is asked for.
        logits = model(events[:, :-1], events[:, 1:])[:, -1]            # (B, L, K)
        total += five.code_losses(logits, events[:, -1], trie)          # (L,)
    on_test = total / len(start)                                        # (L,)
    in_training = load(run / "generator-mscgrec.pt")["losses"][-1]      # (L,)

    answers = []
    for what, losses in (("training, last epoch (with dropout)", in_training), ("test events", on_test)):
        answers.append([what, *decimals([*losses, losses.sum()], ".2f")])
    codes = [f"code {l + 1}" for l in range(trie.L)]
    table(["mscgrec's loss, nats", *codes, "sum"], answers)


# --- Unseen items -----------------------------------------------------------------------------------------------------


WRITERS = {  # rows of the table: the options of 05; SASRec writes nothing
    "sasrec": None,
    "to-collab": ["--target", "collab"],
    "to-text": ["--target", "text"],
    "to-image": ["--target", "image"],
    "lookahead": ["--lookahead"],
    "lookahead-to-text": ["--lookahead", "--target", "text"],
}


def unseen(args):
    """A twentieth of the items lose all events but those to be found; the models are trained without them."""
    data = load(args.run / "data.pt")
    N = len(data["item_ids"]) - 1
    rows = list(WRITERS)
    if data["meta"]["source"] == "toy":
        rows.append("best-possible")
    recall = {name: [] for name in rows}
    for seed in args.seeds:
        torch.manual_seed(seed)
        held = torch.zeros(N + 1, dtype=torch.bool)                     # (N+1,)
        held[1 + torch.randperm(N)[:N // 20]] = True
        new = without_training_events(data, held)

        folder = args.run / f"unseen-{seed}"
        folder.mkdir(exist_ok=True)
        torch.save(new, folder / "data.pt")
        link("images.pt", args.run, folder)
        for number in (2, 3, 4):
            call(number, "--run", folder, "--seed", seed)
        for name, options in WRITERS.items():
            if options:
                line = argparse.Namespace(run=folder, epochs=args.epochs)
                call(5, *generator_options(line, seed, name, " ".join(options)))
        if "best-possible" in rows:
            best_possible(folder, seed)

        to_be_found = new["events"][new["offsets"][1:] - 1].long()      # (U,)
        looks_for_unseen = held[to_be_found]                            # (U,)
        for name in rows:
            top = load(folder / f"predictions-{name}-s{seed}.pt")["test"]  # (U, top)
            hit = hits(top, new)                                        # (U,)
            both = [hit[looks_for_unseen].mean(), hit[~looks_for_unseen].mean()]
            recall[name].append(torch.stack(both))                      # (2,)

    print(f"{looks_for_unseen.sum()} of {len(looks_for_unseen)} users (last seed) are to find an unseen item; "
          f"chance {10 / N:.4f}")
    answers = []
    for name, by_seed in recall.items():
        mean = torch.stack(by_seed).mean(0)                             # (2,)
        answers.append([name, *decimals(mean)])
    table(["Recall@10, mean of the seeds", "unseen items", "all others"], answers)


def without_training_events(data, held):
    """A shop in which the held items have no events, but where they are the last one of a user.

    held: bool (N+1,) -> data, as 01 writes it
    """
    events = data["events"]                                             # (events,)
    offsets = data["offsets"]                                           # (U+1,)
    U = len(data["user_ids"])
    N = len(data["item_ids"]) - 1
    user = torch.arange(U).repeat_interleave(offsets.diff())            # (events,)
    last = torch.zeros(len(events), dtype=torch.bool)                   # (events,)
    last[offsets[1:] - 1] = True
    stays = last | ~held[events.long()]                                 # (events,)

    # A user needs one event each to train, validate and test: who has fewer left goes.
    left = torch.bincount(user[stays], minlength=U)                     # (U,)
    enough = left >= 3                                                  # (U,)
    stays = stays & enough[user]                                        # (events,)

    # Those who stay are numbered anew: their events, one user after another, and where each user begins.
    events = events[stays]                                              # (events,)
    lengths = left[enough]                                              # (U,)
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])  # (U+1,)
    training = torch.ones(len(events), dtype=torch.bool)                # (events,)
    training[offsets[1:] - 1] = False  # test
    training[offsets[1:] - 2] = False  # validation
    train_counts = torch.bincount(events[training].long(), minlength=N + 1).int()  # (N+1,)
    if train_counts[held].any():
        sys.exit("A training event shows an item that should be unseen.")

    user_ids = [data["user_ids"][u] for u in enough.nonzero()[:, 0]]
    new = {**data, "events": events, "offsets": offsets, "train_counts": train_counts, "user_ids": user_ids}
    if "levels" in data:
        new["levels"] = data["levels"][stays]                           # (events,)
    return new


# --- The best that any model could do in the toy shop -----------------------------------------------------------------
# Whoever knows the rules of the shop, but not what a customer likes, can work it out from what the customer took. With
# f for a combination of favourites (red, stripes, wool; red, stripes, oak; ..), each as likely at first, Bayes' rule is
#
#   p(f | i_1 .. i_T)        is proportional to   p(i_1 | f) p(i_2 | f, i_1) .. p(i_T | f, i_1 .. i_(T-1))
#   p(i_(T+1) | i_1 .. i_T)  = sum over f of p(f | i_1 .. i_T) p(i_(T+1) | f, i_1 .. i_T)
#
# where p(i | f, ..) is that of 01: mostly the softmax of the score, and with probability WHIM any item not yet taken.
# To list items by p(i_(T+1) | ..) is best: any other list of ten holds the item to be found with less probability.


def ceiling(args):
    """The row `best-possible`, and the table with it."""
    best_possible(args.run, seed=0)
    call(6, "--run", args.run)


def best_possible(folder, seed):
    """The list that Bayes' rule gives to each user of a toy shop, as predictions of this seed. It also knows what the
    5-core dropped of a history, so that it is a bound from above; but not in which circle an item is that no training
    event shows."""
    one = script(1)
    run = one.Run(folder)
    data = run.load("data.pt", "01_data.py")
    began = time.time()
    rules, walks, target = redraw_toy_shop(one, data)                   # .., (U, LONGEST_WALK), (U,)
    shop = catalogue_numbers(data["item_ids"][1:])                      # (N,)
    rules = forget_circles(rules, shop[data["train_counts"][1:].numpy() == 0])

    # Users of whom equally much is known are asked about together.
    known = (walks == target[:, None]).argmax(1)                        # (U,) events before the one to be found
    top = torch.zeros(len(walks), 20, dtype=torch.int32)                # (U, top)
    promised = torch.zeros(len(walks))                                  # (U,)
    for T in np.unique(known):
        users = np.flatnonzero(known == T)                              # (users,)
        for batch in np.array_split(users, 1 + len(users) // 500):
            chance = next_item(one, rules, walks[batch, :T])            # (B, n)
            chance = torch.from_numpy(chance[:, shop])                  # (B, N)
            likeliest, place = chance.topk(20)                          # (B, top)
            top[batch] = 1 + place.int()                                # (B, top)
            share = likeliest[:, :10].sum(1) / chance.sum(1)            # (B,)
            promised[batch] = share.float()                             # (B,)

    seconds = {"predict": time.time() - began}
    run.save({"name": "best-possible", "seed": seed, "test": top, "seconds": seconds},
             f"predictions-best-possible-s{seed}.pt")
    print(f"The first tens promise a Recall@10 of {promised.mean():.4f} and keep {hits(top, data).mean():.4f}.")


def catalogue_numbers(item_ids):
    """Ids such as "item000123" of a toy shop, or of its users, as numbers. -> (ids,)"""
    return np.array([int(item_id[4:]) for item_id in item_ids])


def redraw_toy_shop(one, data):
    """Draws the shop of data.pt again, which its seed allows, to see what no model is told.

    -> Rules; what data's users took, (U, LONGEST_WALK), -1 where it ended; the items to be found, (U,)
    """
    if data["meta"]["source"] != "toy":
        sys.exit("The best possible is known of a toy shop only: of no other the rules are known.")
    made_with = data["meta"]["options"]
    n = made_with["max_items"] or one.TOY_ITEMS
    U = made_with["max_users"] or one.TOY_USERS
    rng = np.random.default_rng(made_with["seed"])
    rules = one.toy_rules(n, U, rng)
    walks, _ = one.toy_walks(rules, rng)                                # (customers, LONGEST_WALK)
    walks = walks[catalogue_numbers(data["user_ids"])]                  # (U, LONGEST_WALK)

    # Each event of data.pt must be one of its user's walk.
    shop = catalogue_numbers(data["item_ids"][1:])                      # (N,)
    item = shop[data["events"].numpy() - 1]                             # (events,)
    offsets = data["offsets"].numpy()                                   # (U+1,)
    user = np.repeat(np.arange(len(walks)), np.diff(offsets))           # (events,)
    if not (walks[user] == item[:, None]).any(1).all():
        sys.exit("data.pt is of another version of 01_data.py, with other rules: make it again.")
    return rules, walks, item[offsets[1:] - 1]


def forget_circles(rules, items):
    """Rules without the circles of some items: -1. Only purchases tell them, and these items have no training event."""
    circle = rules.truth["circle"].copy()                               # (n,)
    circle[items] = -1
    # companion[-1], the last one, is what follows them: no circle at all.
    return rules._replace(truth={**rules.truth, "circle": circle}, companion=np.append(rules.companion, -2))


def next_item(one, rules, history):
    """p(next item | history) of customers whose favourites nobody knows. history: (B, T), all they took -> (B, n)"""
    B, T = history.shape
    n = len(rules.rank)

    # exp(score) is a product: what the favourites say of an item, times what the item before says of it.
    sizes = [len(one.PROPERTIES[name]) for name in one.TASTE]
    combinations = np.indices(sizes).reshape(len(sizes), -1)            # (tastes, F)
    taste = np.exp(one.taste_of(dict(zip(one.TASTE, combinations)), rules))  # (F, n)
    F = len(taste)

    belief = np.full((B, F), 1 / F)                                     # (B, F) p(f | what is known by now)
    for t in range(T):
        follows = what_follows(one, rules, history[:, :t])              # (B, n)
        total = follows @ taste.T                                       # (B, F) the sum under the softmax
        item = history[:, t]                                            # (B,)
        softmax = follows[range(B), item][:, None] * taste[:, item].T / total  # (B, F)
        belief *= (1 - one.WHIM) * softmax + one.WHIM / (n - t)         # (B, F)
        belief /= belief.sum(1, keepdims=True)                          # (B, F)

    follows = what_follows(one, rules, history)                         # (B, n)
    total = follows @ taste.T                                           # (B, F)
    softmax = follows * ((belief / total) @ taste)                      # (B, n) its mean over f
    whim = (follows > 0) / (n - T)                                      # (B, n)
    return (1 - one.WHIM) * softmax + one.WHIM * whim


def what_follows(one, rules, history):
    """exp of what the last item adds to the score; 0 for items that are taken. history: (B, t) -> (B, n)"""
    B, t = history.shape
    score = np.zeros((B, len(rules.rank)))                              # (B, n)
    if t > 0:
        one.add_what_follows(score, history[:, -1], rules)
        # An item whose circle nobody knows has the right one in one of CIRCLES cases: the mean of exp(score). (With
        # many such items the sum under the softmax is hardly another one, whatever their circles are.)
        circle = rules.truth["circle"]                                  # (n,)
        mean = (np.exp(one.COMPANION) + one.CIRCLES - 1) / one.CIRCLES
        score += np.log(mean) * ((circle[history[:, -1:]] >= 0) & (circle < 0))  # (B, n)
    score[np.arange(B)[:, None], history] = -np.inf
    return np.exp(score)


# --- What image vectors and codes know of the toy shop ----------------------------------------------------------------


def probe(args):
    """A softmax regression reads each property from the vectors of 03 and from raw pixels cut to the same width.

    It learns on half of the items, and answers for the others. What codes know is their NMI, less that of shuffled
    codes: of many groups with few items each, those seem to know something, too.
    """
    data = load(args.run / "data.pt")
    make_pixel_codes(args.run, args.seeds[0])
    items = data["has_image"].nonzero()[:, 0]                           # (n,)
    items = items[torch.randperm(len(items), generator=torch.Generator().manual_seed(0))]
    answers = []
    for source, name in (("RQ-DINO", "image"), ("raw pixels", "pixels")):
        artifact = load(args.run / f"{name}_codes.pt")
        x = artifact["embeddings"][items]                               # (n, d)
        codes = artifact["codes"][items]                                # (n, L)
        for key in ("colour", "pattern", "category"):
            y = torch.as_tensor(data["meta"]["truth"][key])[items].long()  # (n,)
            chance = torch.bincount(y).max() / len(y)                   # ()
            told = script(6).meaning(codes, y)["nmi"]
            shuffled = script(6).meaning(codes.roll(1, 0), y)["nmi"]
            known = [chance, linear_probe(x, y), told[0] - shuffled[0], told[1] - shuffled[1]]
            answers.append([source, key, *decimals(known, ".2f")])
    table(["source", "property", "chance", "linear probe", "NMI of code 1", "NMI of codes 1, 2"], answers)


def linear_probe(x, y):
    """Share of the second half whose property a softmax regression of the first half names. x: (n, d), y: (n,)"""
    x = (x - x.mean(0)) / x.std(0).clamp(min=1e-6)                      # (n, d)
    weight = torch.zeros(x.shape[1] + 1, int(y.max()) + 1, requires_grad=True)  # (d + 1, values)
    optimizer = torch.optim.LBFGS([weight], max_iter=100, line_search_fn="strong_wolfe")
    half = len(x) // 2

    def loss():
        optimizer.zero_grad()
        logits = x[:half] @ weight[1:] + weight[0]                      # (half, values)
        misfit = torch.nn.functional.cross_entropy(logits, y[:half])    # ()
        value = misfit + 0.0001 * weight[1:].square().sum()             # ()
        value.backward()
        return value

    optimizer.step(loss)
    named = (x[half:] @ weight[1:] + weight[0]).argmax(1)               # (n - half,)
    return (named == y[half:]).float().mean()                           # ()


# --- What vectors learnt by heart -------------------------------------------------------------------------------------


class LinearModel(torch.nn.Module):
    """The score of item i: (W v of the last item + W' sum of the v of the history / root of T) . v_i + b_i.

    v is the sum of all modalities' vectors, brought to one width as by 05's Lookahead. known: their files' contents, by
    name; counts: (N+1,) training events
    """

    def __init__(self, known, counts, E=64):
        super().__init__()
        five = script(5)
        self.carry = torch.nn.ModuleList()
        self.tables = []
        for name, source in known.items():
            shrunk = name.startswith("collab")
            self.carry.append(five.Carry(source["embeddings"].shape[1], E, shrunk))
            self.tables.append(five.columns_of(source, shrunk))         # (N+1, d or 2d)
        self.last = torch.nn.Linear(E, E, bias=False)
        self.all = torch.nn.Linear(E, E, bias=False)
        self.bias = torch.nn.Parameter((counts[1:] + 1.0).log())        # (N,)

    def forward(self, history, kept):
        """history: (B, T), kept: as in 05, () -> after each place a score for each item, (B, T, N)"""
        v = sum(table @ carry(kept).T for table, carry in zip(self.tables, self.carry))  # (N+1, E)
        read = v[history]                                               # (B, T, E)
        length = torch.arange(1, 1 + history.shape[1]).unsqueeze(1)     # (T, 1)
        wanted = self.last(read) + self.all(read.cumsum(1) / length.sqrt())  # (B, T, E)
        return wanted @ v[1:].T + self.bias                             # (B, T, N)


def memory(args):
    """Two linear models, with all of SASRec's vectors in training and with a share that is drawn for each step; asked
    with shares. And, of the toy shop, one that is told each item's circle instead."""
    data = load(args.run / "data.pt")
    known = {}
    for name in ("image", "text", "collab"):
        if (args.run / f"{name}_codes.pt").exists():
            known[name] = load(args.run / f"{name}_codes.pt")
    shares = (0.0, 0.25, 0.5, 0.75, 1.0)
    answers = []
    for title, share in (("all", 1.0), ("a share that is drawn", None)):
        model, loss = fit(known, data, share)
        answers.append([title, f"{loss:.2f}", *decimals([ndcg(model, data, kept) for kept in shares])])
    if "truth" in data["meta"]:
        circle = torch.as_tensor(data["meta"]["truth"]["circle"]).long()  # (N+1,)
        told = torch.nn.functional.one_hot(circle.clamp(min=0)).float()  # (N+1, circles)
        known["circle"] = known.pop("collab") | {"embeddings": told - told[1:].mean(0)}
        model, loss = fit(known, data, 1.0)
        answers.append(["the circle instead", f"{loss:.2f}", "", "", "", "", *decimals([ndcg(model, data, 1.0)])])
    table(["in training", "its loss", *[f"validation, {kept:.0%}" for kept in shares]], answers)


def fit(known, data, share, epochs=12, batch=256, lr=3e-3):
    """Trains a linear model. share: of the collaborative vector, or None: drawn -> model, loss of the last epoch"""
    five = script(5)
    torch.manual_seed(0)
    model = LinearModel(known, data["train_counts"])
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.3)
    for epoch in range(epochs):
        start, length = five.training_windows(data["offsets"], 20)      # (W,) both
        total = targets = 0
        batches = five.equal_length_batches(length, batch)
        for i, rows in enumerate(batches):
            optimizer.param_groups[0]["lr"] = five.learning_rate((epoch + i / len(batches)) / epochs, lr)
            place = torch.arange(1 + length[rows[0]])                   # (T+1,)
            events = data["events"][start[rows, None] + place].long()   # (B, T+1)
            kept = torch.rand(()) if share is None else torch.tensor(share)  # ()
            scores = model(events[:, :-1], kept).flatten(0, 1)          # (B * T, N)
            loss = torch.nn.functional.cross_entropy(scores, events[:, 1:].flatten() - 1, reduction="sum")
            (loss / batch).backward()
            optimizer.step()
            optimizer.zero_grad()
            total += loss.item()
            targets += len(scores)
    return model, total / targets


@torch.no_grad()
def ndcg(model, data, kept):
    """NDCG@10 on the validation events of all users. -> float"""
    five, six = script(5), script(6)
    start, length = five.held_out_windows("valid", data["offsets"], 20)  # (U,) both
    target = data["events"][data["offsets"][1:] - 2]                    # (U,)
    top = torch.zeros(len(target), 10, dtype=torch.int64)               # (U, 10)
    for rows in five.equal_length_batches(length, 2048):
        history = data["events"][start[rows, None] + torch.arange(length[rows[0]])].long()  # (B, T)
        top[rows] = 1 + model(history, torch.tensor(kept))[:, -1].topk(10).indices  # (B, 10)
    gain = six.gains(six.rank_of(target, top))[:, six.NDCG_10]  # (U,)
    return gain.mean()


# --- Costs by the size of the catalogue -------------------------------------------------------------------------------


CATALOGUES = [10_000, 100_000, 1_000_000]  # items
SIZE = argparse.Namespace(width=64, layers=2, heads=4, head=16, inner=256, dropout=0.1)  # 05's defaults


@torch.no_grad()
def growth(args):
    """Default sizes, random codes: what an item costs, and what a recommendation costs one core."""
    torch.set_num_threads(1)
    answers = []
    for N in CATALOGUES:
        torch.manual_seed(0)
        sasrec = script(2).SASRec(N, T=20, E=64, H=2, layers=2, dropout=0.5).eval()
        five = script(5)
        sources = random_sources(N)
        trie = five.Trie(sources["collab"]["codes"], K)
        generator = five.Generator(sources, MODALITIES, "collab", trie, SIZE).eval()

        megabytes = [sasrec.items.weight[1:].nbytes / 1e6, bytes_of_items(generator, trie) / 1e6]
        seconds = []
        for B in (1, 256):
            history = torch.randint(1, N + 1, (B, 20))                  # (B, T)

            def score_all_items():
                wanted = sasrec(history)[:, -1]                         # (B, E)
                return (wanted @ sasrec.vectors()[1:].T).topk(20)       # (B, 20)

            def search():
                return five.beam_search(generator, trie, history, 20)   # (B, 20)

            for recommend in (score_all_items, search):
                seconds.append(1000 / B * best(recommend, 3))
        answers.append([f"{N:,}", *decimals(megabytes, ".1f"), *decimals(seconds, ".2f")])
    header = [
        "items",
        "MB, SASRec's table",
        "MB, codes, tokens, tree",
        "s / 1,000 users one by one: SASRec",
        "MSCGRec",
        "256 at once: SASRec",
        "MSCGRec",
    ]
    table(header, answers)


def bytes_of_items(model, trie):
    """What the generator keeps of items: codes in int16, the table of tokens, the tree as the search needs it."""
    codes = 2 * model.shown[1:].numel()
    tokens = model.tokens.weight.nbytes
    tree = sum(tensor.nbytes for tensor in [*trie.edges, *trie.allowed, trie.leaf_item])
    return codes + tokens + tree


PARTS = {
    "rows": rows,
    "ablations": ablations,
    "related": related,
    "fusion": fusion,
    "seen": seen,
    "hole": hole,
    "lost": lost,
    "missing": missing,
    "unseen": unseen,
    "ceiling": ceiling,
    "probe": probe,
    "memory": memory,
    "growth": growth,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("part", nargs="+", choices=PARTS, help="questions, answered one after another")
    add("--run", type=Path, default=Path("runs/toy"), help="folder of the experiment (default: runs/toy)")
    add("--seeds", type=int, nargs="+", default=[0], help="of rows, ablations, related, fusion, unseen (default: 0)")
    add("--only", nargs="+", default=[], help="of rows, ablations, related, missing: some names")
    add("--epochs", type=int, help="of 05 in rows, ablations, related, unseen (default: the script's own)")
    args = parser.parse_args()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, {os.cpu_count()} cores")
    for part in args.part:
        began = time.time()
        PARTS[part](args)
        print(f"{part}: {(time.time() - began) / 60:.1f} minutes", flush=True)


if __name__ == "__main__":
    main()
