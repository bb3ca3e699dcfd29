"""The table: how good is every model of the run, how sure is that, what does it cost.

Knows no model: it compares prediction files, so anybody's model joins by writing one. Such a file
needs `name` and `test`; what else it lacks shows as a dash. Each user's last event is the one item
to be found among all N (leave-one-out, full ranking, no sampled negatives). Recall@k = share of
users whose item is among the first k; NDCG@k = mean of 1 / log2(rank + 1), 0 beyond k.

    python 06_eval.py                    # after 02 to 05

reads   data.pt, collab_codes.pt, image_codes.pt, text_codes.pt
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
          codes         dict               one a modality: the stats of its codes, what they mean
          options       dict               the options of this run

On the toy shop: 2 seconds, 0.2 GiB (2 cores of an AMD EPYC).
"""
import argparse, math, os, pathlib, sys
from collections import Counter

import torch
from tqdm import tqdm

METRICS = [("Recall", 1), ("Recall", 5), ("Recall", 10), ("NDCG", 5), ("NDCG", 10)]
COSTS = [("parameters", "parameters", 1, ",.0f"), ("bytes", "MB", 1e-6, ".1f"),
         ("train", "training s", 1, ".0f"), ("predict", "s / 1,000 users", 1, ".2f"),
         ("peak_memory", "peak GiB", 2**-30, ".1f")]  # key, column, factor, format
SHOWN = [("coverage", "items shown", 1, ".0%"), ("gini", "Gini", 1, ".2f"),
         ("top_tenth", "of the top tenth", 1, ".0%"), ("popularity", "their events", 1, ".0f")]

# --- Files ---------------------------------------------------------------------------------------
def fail(message):
    """Ends the script with one sentence and exit code 2: no traceback, nothing half-written."""
    print(message, file=sys.stderr)
    sys.exit(2)

def load(path, maker, mmap=False):
    """Reads one artifact of the run; `maker` is the script that writes it."""
    if not path.exists():
        fail(f"{path} is missing: run {maker} with the same --run first.")
    try:
        return torch.load(path, weights_only=True, map_location="cpu", mmap=mmap)
    except Exception as error:
        fail(f"{path} cannot be read ({type(error).__name__}): delete it, run {maker} again.")

def save(artifact, path):
    """Writes beside the file, flushes, renames: nobody ever sees half an artifact."""
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        torch.save(artifact, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)

# --- Metrics -------------------------------------------------------------------------------------
def rank_of(target, top):
    """The place of each user's item in the list, from 1; infinite if it is not there.
    target (U,), top (U, top) -> (U,)"""
    hit = top == target.unsqueeze(1)  # (U, top)
    return torch.where(hit.any(1), hit.float().argmax(1) + 1.0, torch.inf)  # (U,)

def gains(rank):
    """What each user adds to each of METRICS. rank (U,) -> (U, metrics)"""
    gain = {"Recall": torch.ones_like(rank), "NDCG": 1 / torch.log2(rank + 1)}  # (U,) each
    return torch.stack([gain[name] * (rank <= k) for name, k in METRICS], 1).double()

def shown_items(top, rank, target, train_counts):
    """Whom the first tens favour: items shown at all, how unevenly (Gini: 0 all alike, 1 one item
    only), the share of the tenth that sells best, and Recall@10 by decile of the target's events.
    top (U, top), rank (U,), target (U,), train_counts (N+1,) -> dict"""
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

def entropy(labels):
    """Of a column of labels, or of the joint of several. (n, columns) -> nats"""
    share = labels.unique(dim=0, return_counts=True)[1] / len(labels)  # (different,)
    return torch.special.entr(share).sum().item()

def meaning(codes, category):
    """What codes say of categories: of every prefix of 1 to 3 levels the normalised mutual
    information, 2 I / (H + H), and the purity, the share of items in their prefix's commonest
    category. More prefixes raise both by chance: compare them with those of shuffled codes.
    codes (n, L), category (n,) -> nmi, purity: a list of 3 each"""
    nmi, purity, H_category = [], [], entropy(category.unsqueeze(1))
    for l in (1, 2, 3):
        both = torch.cat([codes[:, :l], category.unsqueeze(1)], 1)  # (n, l + 1)
        H_prefix = entropy(codes[:, :l])
        shared = H_prefix + H_category - entropy(both)
        nmi.append(2 * shared / max(H_prefix + H_category, 1e-9))
        pairs, count = both.unique(dim=0, return_counts=True)  # (pairs, l + 1), (pairs,)
        prefix = pairs[:, :l].unique(dim=0, return_inverse=True)[1]  # (pairs,)
        most = torch.zeros(prefix.max() + 1, dtype=torch.long).scatter_reduce_(
            0, prefix, count, "amax")  # (prefixes,)
        purity.append(most.sum().item() / len(codes))
    return {"nmi": nmi, "purity": purity}

def paired_bootstrap(ours, theirs, draws, rng, same_seeds=False):
    """95 % interval of mean(ours) - mean(theirs); each draw resamples users and seeds. Paired: both
    models answer the same users, and models of one seed share its codes, so what makes a user or
    a seed easy or hard cancels out; seeds are drawn apart where the models were run with others.
    A user's weight in a draw is Poisson(1): for many users, resampling with replacement.
    ours, theirs (seeds, U, metrics) -> low, high (2, metrics)"""
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

# -------------------------------------------------------------------------------------------------
def main(argv=None):
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--run", default="runs/toy", help="folder of this experiment's .pt files")
    add("--seed", type=int, default=0, help="of the bootstrap")
    add("--device", default="auto", help="as in the other scripts; this one computes on the CPU")
    add("--smoke", action="store_true", help="fewer bootstrap draws")
    add("--against", default="sasrec", help="the model that the others are compared with")
    add("--draws", type=int, default=1000, help="of the bootstrap")
    if parser.parse_known_args(argv)[0].smoke:
        parser.set_defaults(draws=50)
    args = parser.parse_args(argv)
    if args.draws < 1:
        fail("--draws starts at 1.")
    run, rng = pathlib.Path(args.run), torch.Generator().manual_seed(args.seed)
    data = load(run / "data.pt", "01_data.py")
    N, U = len(data["item_ids"]) - 1, len(data["user_ids"])
    target = data["events"][data["offsets"][1:] - 1]  # each user's last event; (U,)
    files = sorted(run.glob("predictions-*.pt"))
    if not files:
        fail(f"{run} holds no predictions-*.pt: run 02_sasrec.py with the same --run first.")
    models, rows, widths, nothing = {}, {}, set(), 0  # models: name -> one entry a seed
    for path in files:
        saved = load(path, "the script that made it", mmap=True)
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
            "seed": seed, "gain": gains(rank),  # (U, metrics)
            **shown_items(top, rank, target, data["train_counts"]),
            "train": seconds.get("train", math.nan),
            "predict": seconds.get("predict", math.nan) * 1000 / U,
            **{key: saved.get(key, math.nan) for key in ("parameters", "bytes", "peak_memory")}})
        widths, nothing = widths | {top.shape[1]}, nothing + (top == 0).sum().item()
    print(f"checked: {len(files)} files, {U:,} users x {', '.join(map(str, sorted(widths)))}, "
          f"every recommended id is a real item, none twice; {nothing:,} places are empty")

    gain = {m: torch.stack([one["gain"] for one in models[m]]) for m in models}
    for name, seeds in tqdm(models.items(), "bootstrap", leave=False, disable=None):
        by_seed = gain[name].mean(1)  # (seeds, U, metrics) -> (seeds, metrics)
        rows[name] = {"seeds": [one["seed"] for one in seeds], "mean": by_seed.mean(0).tolist(),
                      "std": by_seed.std(0).tolist() if len(seeds) > 1 else None,
                      **{key: sum(one[key] for one in seeds) / len(seeds)
                         for key, *_ in COSTS + SHOWN},
                      "deciles": torch.tensor([one["deciles"] for one in seeds]).mean(0).tolist()}
        if args.against in gain and name != args.against:
            same = rows[name]["seeds"] == [one["seed"] for one in models[args.against]]
            interval = paired_bootstrap(gain[name], gain[args.against], args.draws, rng, same)
            rows[name]["interval"] = interval.tolist()  # (2, metrics)

    numbers = lambda values, unit=1: ", ".join(f"{unit * x:.0f}" for x in values)
    quality, cost, shown, codes, code_rows, meanings = [], [], [], {}, [], []
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
    for modality in ("image", "text", "collab"):
        if (run / f"{modality}_codes.pt").exists():
            saved = load(run / f"{modality}_codes.pt", "02, 03 or 04")
            codes[modality] = stats = saved["stats"]
            code_rows.append([modality, f"{saved['known'][1:].float().mean():.0%}",
                              str(saved["codebooks"].shape[1]), numbers(stats["used"][:3], 100),
                              numbers(stats["perplexity"][:3]), numbers(stats["unique"], 100),
                              numbers(stats["largest"]), str(stats["moved"])])
            for name, label in labels.items():
                some = saved["known"] & (label >= 0)  # (N+1,)
                if some.any():
                    of_items = saved["codes"][some].long()  # (n, L)
                    mixed = of_items[torch.randperm(len(of_items), generator=rng)]  # (n, L)
                    told = [meaning(x, label[some]) for x in (of_items, mixed)]
                    stats |= {name: told[0], f"{name}, shuffled": told[1]}
                    meanings.append([modality, name, *(
                        ", ".join(f"{x:.2f}" for x in one[key])
                        for key in ("nmi", "purity") for one in told)])

    text = "\n".join([
        f"{U:,} users, {N:,} items, {len(data['events']):,} events; the item to find is each "
        "user's last, among all items.\n",
        markdown(["model", "seeds", *(f"{name}@{k}" for name, k in METRICS),
                  f"Recall@10 - {args.against}", f"NDCG@10 - {args.against}"], quality),
        f"\n± standard deviation over seeds; [..] 95 % interval of the difference, {args.draws:,} "
        "paired bootstrap draws over\nusers and seeds. An interval that holds zero: these data do "
        "not tell the two apart.\n",
        markdown(["model", *(column for _, column, _, _ in COSTS)], cost),
        "\nMB: of parameters, codes and prefix tree.\n",
        markdown(["model", *(column for _, column, _, _ in SHOWN),
                  "% Recall@10 by decile of the target's events, rare first"], shown),
        "\nOf all first tens. items shown: share of the catalogue; Gini: 0 all alike, 1 one item; "
        "of the top tenth:\nshare of the best-selling tenth of items; their events: in training, "
        "mean of what is shown.\n",
        markdown(["codes", "items known", "K", "% of K used, levels 1-3", "perplexity",
                  "% items alone after 1, 2, 3", "most items on one prefix", "moved"], code_rows),
        "\n" + markdown(["codes", "and", "NMI of prefixes of 1, 2, 3 levels", "if shuffled",
                         "purity", "if shuffled"], meanings)])
    save({"rows": rows, "codes": codes, "options": vars(args)}, run / "results.pt")
    partial = run / "results.md.partial"
    partial.write_text(text + "\n", encoding="utf-8")
    os.replace(partial, run / "results.md")
    print(text)

if __name__ == "__main__":
    main()
