"""The table: how good is every model of the run, how sure is that, what does it cost; in pictures.

Knows one model, popularity; of others it reads predictions, so anybody's model joins by writing a
file. It needs `name` and `test`; what else it lacks shows as a dash. Each user's last event is the
one item to be found among all N (leave-one-out, full ranking, no sampled negatives). Recall@k =
share of users whose item is among the first k; NDCG@k = mean of 1 / log2(rank + 1), 0 beyond k.

    python 06_eval.py                    # after 02 to 05

reads   data.pt, *_codes.pt; for pictures images.pt, sasrec.pt, generator-*.pt
        predictions-NAME-sSEED.pt
          name          str                the model's row in the table
          seed          int                of the training; 0 if it is missing
          valid         int32 (U, top)     items recommended for the validation event, best first
          test          int32 (U, top)     the same for the test event, the validation event known
          scores        float32 (U, top)   of `test`
          seconds       dict               train; predict: for the test events of U users
          parameters    int                trained numbers
          bytes         int                of parameters, codes and prefix tree
          peak_memory   int                bytes, largest resident set
          options       dict               the options of that run
writes  results.md
        results.pt
          rows          dict               one a model: metrics, intervals, costs, seeds
          codes         dict               one a modality: use of its codes, what they mean
          options       dict               the options of this run
        recall.png, rarity.png             Recall@10 and intervals; by how rare the target is
        curves.png, codes.png              loss and validation over time; use of the codebooks
        tree-MODALITY.png                  items that share level 1, and levels 1 and 2
        neighbours.png, histories.png      by RQ-DINO and pixels; five users' recommendations

On the toy shop: 3 seconds, 0.3 GiB (2 cores of an AMD EPYC).
"""
import argparse, hashlib, math, os, pathlib, sys, textwrap, unicodedata, zipfile
from collections import Counter

import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

METRICS = [("Recall", 1), ("Recall", 5), ("Recall", 10), ("NDCG", 5), ("NDCG", 10)]
COSTS = [("parameters", "parameters", 1, ",.0f"), ("bytes", "MB with codes, tree", 1e-6, ".1f"),
         ("train", "training s", 1, ".0f"), ("predict", "s / 1,000 users", 1, ".2f"),
         ("peak_memory", "peak GiB", 2**-30, ".1f")]  # key, column, factor, format
SHOWN = [("coverage", "items shown", 1, ".0%"), ("gini", "Gini", 1, ".2f"),
         ("top_tenth", "of the top tenth", 1, ".0%"), ("popularity", "their events", 1, ".0f")]
WIDTH, COLUMNS, CANDIDATES = 900, 11, 2000  # of a PNG; items in a row; items that may be neighbours
STYLES = [("#1f3b5c", 30, 0), ("#d55e00", 4, 0), ("#7db8e8", 3, 0), ("#009e73", 4, 45),  # ink and
          ("#b35c9e", 3, 180), ("#e0a000", 5, 0), ("#5b3a1e", 6, 0), ("#808080", 4, 20)]  # mark
GREY = torch.full((3, 1, 1), 208, dtype=torch.uint8)  # instead of a picture

# --- Files ---------------------------------------------------------------------------------------
MADE_FROM = {}  # SHA-256 of every file that was read; all that is saved carries them
def fail(message):
    """Ends the script with one sentence and exit code 2: no traceback, nothing half-written."""
    print(message, file=sys.stderr)
    sys.exit(2)

def load(path, maker, mmap=False):
    """Reads what `maker` wrote. Refuses a damaged or foreign file, and one of other inputs."""
    try:
        assert zipfile.ZipFile(path).testzip() is None  # all checksums are right
        artifact = torch.load(path, weights_only=True, map_location="cpu", mmap=mmap)
        for name, digest in artifact.get("made_from", None if maker[:3] == "01_" else {}).items():
            if MADE_FROM.get(name, digest) != digest:
                fail(f"{path} was made from another {path.with_name(name)}: run {maker} again.")
        MADE_FROM[path.name] = hashlib.file_digest(open(path, "rb"), "sha256").hexdigest()
        return artifact
    except Exception as error:
        fail(f"{path} is missing or damaged ({type(error).__name__}): run {maker} with this --run.")

def save(artifact, path):
    """Writes beside the file, flushes, renames: nobody ever sees half an artifact."""
    partial = path.with_name(path.name + ".partial")
    try:
        torch.save(artifact | {"made_from": MADE_FROM}, partial)
        with open(partial, "rb+") as file:
            os.fsync(file)
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:  # a full disk, a folder that is read-only
        partial.unlink(missing_ok=True)
        fail(f"{path} cannot be written ({error}): make room, or choose another --run.")

# --- Metrics -------------------------------------------------------------------------------------
def rank_of(target, top):
    """The place of each user's item in the list, from 1; infinite if it is not there.
    target (U,), top (U, top) -> (U,)"""
    hit = top == target.unsqueeze(1)  # (U, top)  [24]
    return torch.where(hit.any(1), hit.float().argmax(1) + 1.0, torch.inf)  # (U,)

def gains(rank):
    """What each user adds to each of METRICS. rank (U,) -> (U, metrics)"""
    gain = {"Recall": torch.ones_like(rank), "NDCG": 1 / torch.log2(rank + 1)}  # (U,) each
    return torch.stack([gain[name] * (rank <= k) for name, k in METRICS], 1).double()

def shown_items(top, rank, target, train_counts):
    """What first tens favour: items shown at all, how unevenly, the share of the tenth that sells
    best, Recall@10 by decile of the target's events. top: (U, top), train_counts: (N+1,) -> dict"""
    items = top[:, :10][top[:, :10] > 0].long()  # (shown,)
    times = torch.bincount(items, minlength=len(train_counts))[1:].double()  # (N,)
    bought, place = train_counts[1:], torch.arange(1, len(times) + 1)  # (N,) both
    gini = (place * times.sort().values).sum() * 2 / times.sum() / len(times) - 1 - 1 / len(times)
    best = bought.argsort(descending=True, stable=True)[:max(1, len(bought) // 10)]  # (N / 10,)
    rare_first = train_counts[target.long()].argsort(stable=True)  # (U,)
    return {"coverage": (times > 0).double().mean().item(), "gini": gini.item(),
            "top_tenth": (times[best].sum() / times.sum()).item(),
            "popularity": train_counts[items].double().mean().item(),
            "deciles": [(part <= 10).double().mean().item() if len(part) else math.nan
                        for part in rank[rare_first].tensor_split(10)]}

def use(codes, K):
    """Share of the K codes in use and perplexity of each level; share of items alone and number
    of items on the fullest prefix after levels 1, 2, 3. codes (n, L) -> dict of lists"""
    shared = [codes[:, :l].unique(dim=0, return_counts=True)[1] for l in (1, 2, 3)]
    return {"used": [len(level.unique()) / K for level in codes.T],
            "perplexity": [math.exp(entropy(level.unsqueeze(1))) for level in codes.T],
            "unique": [(n == 1).sum().item() / max(1, len(codes)) for n in shared],
            "largest": [max(n.tolist(), default=0) for n in shared]}

def entropy(labels):
    """Of a column of labels, or of the joint of several. (n, columns) -> nats"""
    share = labels.unique(dim=0, return_counts=True)[1] / len(labels)  # (different,)
    return torch.special.entr(share).sum().item()

def meaning(codes, category):
    """What prefixes of 1 to 3 codes say of categories: normalised mutual information 2 I / (H + H)
    and purity, the share of items in their prefix's commonest category. More prefixes raise both by
    chance: see shuffled codes. codes (n, L), category (n,) -> nmi, purity: a list of 3 each"""
    nmi, purity, H_category = [], [], entropy(category.unsqueeze(1))
    for l in (1, 2, 3):
        both = torch.cat([codes[:, :l], category.unsqueeze(1)], 1)  # (n, l + 1)
        H_prefix = entropy(codes[:, :l])
        nmi.append(2 * (H_prefix + H_category - entropy(both)) / max(H_prefix + H_category, 1e-9))
        pairs, count = both.unique(dim=0, return_counts=True)  # (pairs, l + 1), (pairs,)
        prefix = pairs[:, :l].unique(dim=0, return_inverse=True)[1]  # (pairs,)
        most = prefix.new_zeros(prefix.max() + 1).scatter_reduce_(0, prefix, count, "amax")  # (p,)
        purity.append(most.sum().item() / len(codes))
    return {"nmi": nmi, "purity": purity}

def paired_bootstrap(ours, theirs, draws, rng, same_seeds=False):
    """95 % interval of mean(ours) - mean(theirs); each draw resamples users and seeds. Paired: both
    models answer the same users, and models of one seed share its codes, so that what makes either
    easy cancels out (seeds are drawn apart where they differ). A user weighs Poisson(1) in a draw:
    resampling with replacement [24]. ours, theirs (seeds, U, metrics) -> low, high (2, metrics)"""
    differences = []
    for _ in range(draws):
        weight = torch.poisson(torch.ones(ours.shape[1], dtype=torch.double), generator=rng)  # (U,)
        means, seeds = [], None
        for side in (ours, theirs):
            if seeds is None or not same_seeds:
                seeds = torch.randint(len(side), (len(side),), generator=rng)  # (seeds,)
            means.append(torch.einsum("u,sum->sm", weight, side)[seeds].mean(0))  # (metrics,)
        differences.append((means[0] - means[1]) / weight.sum().clamp(min=1))  # (metrics,)
    tails = torch.tensor([0.025, 0.975], dtype=torch.double)  # (2,)
    return torch.quantile(torch.stack(differences), tails, dim=0)  # (2, metrics)

def markdown(header, rows):
    """A table that is readable both on the screen and on a web page: columns of one width."""
    cells = [header, *rows]
    width = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = ["| " + " | ".join(map(str.ljust, row, width)) + " |" for row in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in width) + "|", *lines[1:]])

# --- Pictures ------------------------------------------------------------------------------------
def cut(text, width, size, most):
    """A text in at most `most` lines of about `width` pixels, in letters that the font has."""
    text = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().strip()
    letters = width * len(text) / max(1, ImageFont.load_default(size).getlength(text))
    return "\n".join(textwrap.wrap(text, max(3, int(letters)), max_lines=most, placeholder="…"))

def ticks(low, high):
    """At most seven round numbers from low to high."""
    steps = (digit * 10.0 ** power for power in range(-9, 9) for digit in (1, 2, 5))
    step = next(step for step in steps if step >= (high - low) / 6)
    return [i * step for i in range(math.ceil(low / step - 0.01), int(high / step + 0.01) + 1)]

def chart(path, columns, panels):
    """Panels of lines or bars. A panel: its kind, its title with the unit of y, the unit of x,
    labels of x = 0, 1, .. (None: x is a number), series: style, name, points (x, y, half the
    interval of y). It is drawn twice as large and then halved: lines become smooth."""
    if not panels[0][-1]:
        return print(f"{path.name} is not drawn: the run lacks what it shows")
    wide, high, keys = 2 * WIDTH // columns, 560, 6 // columns  # keys: of the legend, in a row
    canvas = Image.new("RGB", (2 * WIDTH, high * math.ceil(len(panels) / columns)), "white")
    draw, font = ImageDraw.Draw(canvas), ImageFont.load_default(24)
    for n, (kind, title, unit, labels, series) in enumerate(panels):
        left, top = n % columns * wide + 120, n // columns * high + 20
        right, bottom = left + wide - 160, top + 430
        upper = top + 100 + (len(series) - 1) // keys * 34
        points = [point for _, _, some in series for point in some]
        low, most = min(y for _, y, _ in points), 1.05 * max(y + e for _, y, e in points) + 1e-3
        low = low if kind == "lines" and low > most / 2 else 0  # else the axis begins at 0
        first, last = (-0.5, len(labels) - 0.5) if labels else (0, max(x for x, _, _ in points))
        place = lambda x, y: (left + (x - first) / (last - first) * (right - left),
                              bottom - (y - low) / (most - low) * (bottom - upper))
        for y in ticks(low, most):
            draw.line((place(first, y), place(last, y)), "#d0d0d0", 2)
            draw.text((left - 12, place(0, y)[1]), f"{y:.4g}", "black", font, "rm")
        for x in range(len(labels)) if labels else ticks(first, last):
            label = cut(labels[x], (right - left) / len(labels), 24, 2) if labels else f"{x:.4g}"
            draw.text((place(x, 0)[0], bottom + 14), label, "black", font, "ma", align="center")
        draw.line((left, upper, left, bottom, right, bottom), "black", 3)
        draw.text(((left + right) / 2, bottom + 100), unit, "black", font, "md")
        draw.text((left, top), title, "black", ImageFont.load_default(28))
        for i, (style, name, some) in enumerate(series):
            (ink, *mark), half = STYLES[style % len(STYLES)], 0.4 / len(series)
            mark = mark if kind == "lines" else (4, 0)
            x, y = left + i % keys * 275, top + 64 + i // keys * 34
            draw.regular_polygon((x + 12, y, 12), *mark, ink)
            room = 240 if len(series) > 1 else right - left  # a name alone has the row
            draw.text((x + 32, y), cut(name, room, 24, 1), "black", font, "lm")
            if kind == "lines":
                draw.line([place(x, y) for x, y, _ in some], ink, 4)
                for x, y, _ in some[::math.ceil(len(some) / 15)]:
                    draw.regular_polygon((*place(x, y), 12), *mark, ink)
                continue
            for x, y, e in some:  # bars of one x stand side by side, each twice `half` wide
                x += (2 * i + 1 - len(series)) * half
                draw.rectangle((place(x - half, y), place(x + half, low)), ink, "black", 2)
                draw.line((place(x, y - e), place(x, y + e)), "black", 5)
                if wide * half > 26 * len(labels):  # there is room for its number
                    draw.text(place(x, y + e), f"{y:.{3 * (most < 2)}f}", "black", font, "md")
    canvas.reduce(2).save(path)

def sheet(path, rows, data, images):
    """Rows of items, a grey tile for one without picture. A row: label, items, items to frame;
    without items the label is a heading. images: uint8 (N+1, 3, S, S)"""
    if not rows:
        return print(f"{path.name} is not drawn: the run lacks what it shows")
    canvas = Image.new("RGB", (WIDTH, 100 * len(rows) + 8), "white")
    draw, y, font = ImageDraw.Draw(canvas), 8, ImageFont.load_default(11)
    for label, items, framed in rows:
        draw.text((8, y), label, "black", ImageFont.load_default(12 if items else 15), spacing=5)
        for x, item in zip(range(112, WIDTH, 72), items):
            pixels = images[item] if data["has_image"][item] else GREY  # (3, S, S)
            tile = Image.fromarray(pixels.permute(1, 2, 0).numpy())
            canvas.paste(tile.resize((64, 64), Image.Resampling.LANCZOS), (x, y))
            title = cut(data["titles"][item] or data["item_ids"][item], 67, 11, 2)
            draw.text((x + 32, y + 68), title, "black", font, "ma", 2, "center")
            if item in framed:
                draw.rectangle((x - 4, y - 4, x + 67, y + 67), None, "#d55e00", 4)
        y += 100 if items else 30
    canvas.crop((0, 0, WIDTH, y)).save(path)

def pictures(run, data, models, rows, curves, trees, labels, rng):
    """Every PNG of the docstring above for which the run has the files. rows, curves: by model;
    trees: the codes, by modality; labels: name -> (N+1,), what items may have in common"""
    bought, events, offsets = data["train_counts"], data["events"], data["offsets"]  # (N+1,), ..
    line = lambda x, y: [(a, float(b), 0) for a, b in zip(x, y) if math.isfinite(b)]
    best = sorted(rows, key=lambda name: rows[name]["mean"][2], reverse=True)
    bars = [(i, rows[name]["mean"][2], rows[name]["error"][2]) for i, name in enumerate(best)]
    chart(run / "recall.png", 1, [("bars", "Recall@10", "model", best, [
        (2, "mean over users and seeds; black: its 95 % interval", bars)])])
    rare_first = bought[events[offsets[1:] - 1].long()].sort().values  # (U,)
    groups = [f"{part[0]}-{part[-1]}" for part in rare_first.tensor_split(10) if len(part)]
    chart(run / "rarity.png", 1, [(
        "lines", "Recall@10 by how often the item to be found was bought in training",
        "training events of that item: ten groups of users, as many in each", groups,
        [(i, name, line(range(10), rows[name]["deciles"])) for i, name in enumerate(best)])])
    loss, ndcg, levels = [], [], []
    for name, saved in curves.items():
        epochs, i = range(1, len(saved["ndcg"]) + 1), [*best, name].index(name)
        minutes = [saved["seconds"] / 60 * epoch / len(epochs) for epoch in epochs]
        by_level = saved["losses"].view(len(epochs), -1)  # (epochs, L), SASRec's (epochs, 1)
        loss.append((i, name, line(minutes, by_level.sum(1))))
        ndcg.append((i, name, line(minutes, saved["ndcg"])))
        if name in ("mscgrec", "plain-softmax"):
            levels.append(("lines", f"{name}: loss of each code, nats", "epoch", None, [
                (l, f"level {l + 1}", line(epochs, one)) for l, one in enumerate(by_level.T)]))
    title, unit = f"loss, nats (uniform: {math.log(len(bought) - 1):.2f})", "minutes of training"
    chart(run / "curves.png", 2, [("lines", title, unit, None, loss),
                                  ("lines", "validation NDCG@10", unit, None, ndcg), *levels])
    chart(run / "codes.png", 2, [("bars", title, "level", ["1", "2", "3", "4: collisions"], [
        (i, modality, line(range(4), [unit * x for x in tree["stats"][key]]))
        for i, (modality, tree) in enumerate(trees.items())]) for title, key, unit in (
            ("codes in use, % of K", "used", 100), ("perplexity of the codes", "perplexity", 1))])

    images = load(run / "images.pt", "01_data.py", mmap=True)["images"] \
        if (run / "images.pt").exists() else GREY.expand(len(bought), 3, 1, 1)  # (N+1, 3, S, S)
    most_bought = lambda items: items[bought[items].argsort(descending=True, stable=True)]  # (n,)
    for modality, tree in trees.items():
        known, strips = most_bought(tree["known"].nonzero()[:, 0]), []  # (n,)
        codes = tree["codes"][known].long()  # (n, L)
        for a, _ in Counter(codes[:, 0].tolist()).most_common(4):
            strips.append((f"{modality} codes that begin with {a}, two largest branches", [], []))
            second = Counter(codes[codes[:, 0] == a, 1].tolist()).most_common(2)
            for prefix in [a], *([a, b] for b, _ in second):
                same = known[(codes[:, :len(prefix)] == torch.tensor(prefix)).all(1)]  # (same,)
                most, name = max(((label[same] + 1).bincount(minlength=2)[1:].max().item(), name)
                                 for name, label in labels.items())  # which label they share
                strips.append((f"{', '.join(map(str, prefix))}, ..\n{len(same):,} items\n"
                               f"{most / len(same):.0%} one\n{name}", same[:COLUMNS].tolist(), []))
        sheet(run / f"tree-{modality}.png", strips, data, images)

    strips = []
    if images.shape[2] > 1 and "image" in trees:
        known = trees["image"]["known"].nonzero()[:, 0]  # (n,)
        known = most_bought(known[torch.randperm(len(known), generator=rng)[:CANDIDATES]])  # (n,)
        views = {"RQ-DINO": trees["image"]["embeddings"][known],  # (n, d)
                 "raw pixels": images[known].flatten(1).float()}  # (n, 3 * S * S)
        for i, item in enumerate(known[:5].tolist()):
            for name, x in views.items():
                order = torch.cdist(x[i:i + 1], x)[0].argsort(stable=True)[:COLUMNS]  # (columns,)
                strips.append((f"{name}:\nnearest to\nthe framed", known[order].tolist(), [item]))
    sheet(run / "neighbours.png", strips, data, images)

    strips = []
    for user in sorted({(len(offsets) - 1) * i // 10 for i in (1, 3, 5, 7, 9)}):
        history = events[offsets[user]:offsets[user + 1]][-COLUMNS:].tolist()
        strips.append((f"user {user}; framed: the last item, to be found", [], []))
        strips.append(("history", history, history[-1:]))
        for name in filter(models.get, ("popularity", "sasrec", "tiger", "mscgrec")):
            top = models[name][0]["top"][user, :10]  # (10,)
            strips.append((name, top[top > 0].tolist(), history[-1:]))
    sheet(run / "histories.png", strips, data, images)

def main(argv=None):
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--run", default="runs/toy", help="folder of this experiment's .pt files")
    add("--seed", type=int, default=0, help="of the bootstrap")
    add("--device", default="auto", help="as in the other scripts; this one computes on the CPU")
    add("--smoke", action="store_true", help="as in the other scripts; nothing to make smaller")
    add("--against", default="sasrec", help="the model that the others are compared with")
    add("--draws", type=int, default=1000, help="of the bootstrap")
    args = parser.parse_args(argv)
    if args.draws < 1 or not 0 <= args.seed < 2 ** 32:
        fail("--draws starts at 1, --seed at 0.")
    run, rng = pathlib.Path(args.run), torch.Generator().manual_seed(args.seed)
    data = load(run / "data.pt", "01_data.py")
    N, U = len(data["item_ids"]) - 1, len(data["user_ids"])
    target = data["events"][data["offsets"][1:] - 1]  # each user's last event; (U,)
    popular = data["train_counts"][1:].argsort(descending=True, stable=True)[:20] + 1  # (top,)
    popular = {"name": "popularity", "test": popular.int().expand(U, -1), "parameters": N,
               "bytes": 4 * N, "seconds": {"train": 0.0, "predict": 0.0}}
    files = sorted({*run.glob("predictions-*.pt")} - {run / "predictions-popularity-s0.pt"})
    models, rows = {}, {}  # models: name -> one entry a seed
    for path in [None, *files]:
        saved = load(path, "the script that made it", mmap=True) if path else popular
        if not isinstance(saved, dict) or not {"name", "test"} <= saved.keys():
            fail(f"{path} lacks `name` or `test`: the docstring of 06_eval.py describes the file.")
        top, seconds, seed = saved["test"], saved.get("seconds", {}), saved.get("seed", 0)
        if not torch.is_tensor(top) or top.is_floating_point() or top.ndim != 2 or len(top) != U \
                or not top.numel() or top.min() < 0 or top.max() > N:
            fail(f"{path}: `test` must hold item ids 1 to {N} (0: none) for {U} users, as data.pt "
                 "does; it was made from other data: make it again or delete it.")
        ordered = top.sort(1).values  # (U, top)
        twice = (ordered.diff() == 0) & (ordered[:, 1:] > 0)  # (U, top - 1)
        if twice.any():
            fail(f"{path} recommends an item twice to user {int(twice.any(1).nonzero()[0])}.")
        seeds = models.setdefault(str(saved["name"]), [])
        if seed in [one["seed"] for one in seeds]:
            fail(f"{path} is a second file of {saved['name']} with seed {seed}: delete one.")
        rank = rank_of(target, top)  # (U,)
        seeds.append({
            "seed": seed, "top": top, "gain": gains(rank),  # (U, top), (U, metrics)
            **shown_items(top, rank, target, data["train_counts"]),
            "train": seconds.get("train", math.nan),
            "predict": seconds.get("predict", math.nan) * 1000 / U,
            **{key: saved.get(key, math.nan) for key in ("parameters", "bytes", "peak_memory")}})
    if args.against not in {"sasrec", *models}:
        fail(f"--against {args.against}: the run has predictions of {', '.join(models)}.")
    print(f"checked: {len(files)} files, {U:,} users: all ids are real items, none comes twice")

    gain = {m: torch.stack([one["gain"] for one in models[m]]) for m in models}
    for name, seeds in tqdm(models.items(), "bootstrap", leave=False, disable=None):
        by_seed = gain[name].mean(1)  # (seeds, U, metrics) -> (seeds, metrics)
        spread = gain[name].mean(0).var(0, correction=0) / U  # squared error, users; (metrics,)
        spread += by_seed.var(0) / len(seeds) if len(seeds) > 1 else 0  # and seeds; (metrics,)
        rows[name] = {"seeds": [one["seed"] for one in seeds], "mean": by_seed.mean(0).tolist(),
                      "std": by_seed.std(0).tolist() if len(seeds) > 1 else None,
                      "error": (1.96 * spread.sqrt()).tolist(),  # half a 95 % interval
                      **{key: sum(one[key] for one in seeds) / len(seeds)
                         for key, *_ in COSTS + SHOWN},
                      "deciles": torch.tensor([one["deciles"] for one in seeds]).mean(0).tolist()}
        if args.against in gain and name != args.against:
            same = rows[name]["seeds"] == [one["seed"] for one in models[args.against]]
            interval = paired_bootstrap(gain[name], gain[args.against], args.draws, rng, same)
            rows[name]["interval"] = interval.tolist()  # (2, metrics)

    numbers = lambda values, unit=1: ", ".join(f"{unit * x:.0f}" for x in values)
    quality, cost, shown, codes, trees, code_rows, meanings = [], [], [], {}, {}, [], []
    for name, row in sorted(rows.items(), key=lambda pair: pair[1]["mean"][-1]):
        spread = [f" ± {s:.4f}" for s in row["std"]] if row["std"] else [""] * len(METRICS)
        low, high = row.get("interval", (None, None))
        signed = [f"[{low[m]:+.4f}, {high[m]:+.4f}]" if low else "" for m in (2, 4)]
        quality.append([name, str(len(row["seeds"])),
                        *(f"{x:.4f}{s}" for x, s in zip(row["mean"], spread)), *signed])
        cells = lambda columns: ["-" if math.isnan(row[key]) else format(row[key] * factor, form)
                                 for key, _, factor, form in columns]
        cost.append([name, *cells(COSTS)])
        shown.append([name, *cells(SHOWN), numbers(row["deciles"], 100)])
    # An item's category: the first of its own that fewer than half of the items have.
    count = Counter(name for names in data["categories"] for name in set(names))
    category = [next((c for c in names if 2 * count[c] < N), "") for names in data["categories"]]
    labels = {"category": category, **data.get("meta", {}).get("truth", {})}  # name -> list (N+1)
    for name, values in labels.items():
        number = {"": -1} | {v: i for i, v in enumerate(dict.fromkeys(values)) if v != ""}
        labels[name] = torch.tensor([number[value] for value in values])  # (N+1,); -1: none
    # Curves before codes: those that a model was made from may be replaced by another seed's.
    curves = {path.stem.removeprefix("generator-"): load(path, "02 or 05", mmap=True)
              for path in [*run.glob("sasrec.pt"), *sorted(run.glob("generator-*.pt"))]}
    for path in sorted(run.glob("*_codes.pt")):
        modality, saved = path.name[:-9], load(path, "the script that made it", mmap=True)
        stats = use(saved["codes"][saved["known"]], K := saved["codebooks"].shape[1])
        codes[modality], trees[modality] = stats, saved | {"stats": stats}
        code_rows.append([modality, f"{saved['known'][1:].float().mean():.0%}", str(K),
                          numbers(stats["used"][:3], 100), numbers(stats["perplexity"]),
                          numbers(stats["unique"], 100), numbers(stats["largest"]),
                          str(saved.get("moved", "-"))])
        for name, label in labels.items():
            some = saved["known"] & (label >= 0)  # (N+1,)
            if some.any():
                of_items = saved["codes"][some].long()  # (n, L)
                mixed = of_items[torch.randperm(len(of_items), generator=rng)]  # (n, L)
                told = [meaning(x, label[some]) for x in (of_items, mixed)]
                stats |= {name: told[0], f"{name}, shuffled": told[1]}
                meanings.append([modality, name, *(", ".join(f"{x:.2f}" for x in one[key])
                                                   for key in ("nmi", "purity") for one in told)])

    text = "\n".join([
        f"{U:,} users, {N:,} items, {len(data['events']):,} events; the item to find is each "
        "user's last, among all items.\n",
        markdown(["model", "seeds", *(f"{name}@{k}" for name, k in METRICS),
                  f"Recall@10 - {args.against}", f"NDCG@10 - {args.against}"], quality),
        "\n± standard deviation over seeds; [..] 95 % interval of the difference, paired bootstrap"
        " over users and\nseeds: where it holds zero, these data do not tell the two apart.\n",
        markdown(["model", *(column for _, column, _, _ in COSTS)], cost), "",
        markdown(["model", *(column for _, column, _, _ in SHOWN),
                  "% Recall@10 by decile of the target's events, rare first"], shown),
        "\nOf all first tens: share of the catalogue; Gini, 0 all alike, 1 one item; share of the "
        "best-selling tenth;\nmean of the events in training of what is shown.\n",
        markdown(["codes", "items known", "K", "% of K used, levels 1-3", "perplexity, 1-4",
                  "% items alone after 1, 2, 3", "most items on one prefix", "moved"], code_rows),
        "\n" + markdown(["codes", "and", "NMI of prefixes of 1, 2, 3 levels", "if shuffled",
                         "purity", "if shuffled"], meanings)])
    save({"rows": rows, "codes": codes, "options": vars(args)}, run / "results.pt")
    (run / "results.md").write_text(text + "\n", encoding="utf-8")
    print(text)
    pictures(run, data, models, rows, curves, trees, labels, rng)

if __name__ == "__main__":
    main()
