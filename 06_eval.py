"""The table: how good are the recommendations of every model in the run, how sure is that, what do they cost.

Knows no model: it compares prediction files, so anybody's model joins by writing one (README, "Your own model").
Each user's last event is the one item to be found among all N (leave-one-out, full ranking, no sampled negatives).
Recall@k = share of users whose item is among the first k; NDCG@k = mean of 1 / log2(rank + 1), 0 beyond k.

    python 06_eval.py                    # after 02 to 05; seconds

reads   data.pt
        predictions-*.pt
        collab_codes.pt
        image_codes.pt
        text_codes.pt
writes  results.md
        results.pt
          rows              dict    one a model: metrics, intervals, costs, seeds
          codes             dict    one a modality: use and perplexity of levels, uniqueness, largest group
          options           dict    the options of this run
"""

import argparse, os, pathlib, sys

import torch
from tqdm import tqdm

METRICS = [("Recall", 1), ("Recall", 5), ("Recall", 10), ("NDCG", 5), ("NDCG", 10)]

# ---------------------------------------------------------------------------------------------------
# Files

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

# ---------------------------------------------------------------------------------------------------
# Metrics

def rank_of(target, top):
    """The place of each user's item in the list, from 1; infinite if it is not there. (U,), (U, top) -> (U,)."""
    hit = top == target.unsqueeze(1)  # (U, top)
    return torch.where(hit.any(1), hit.float().argmax(1) + 1.0, torch.inf)  # (U,)

def gains(rank):
    """What each user adds to each of METRICS. rank: (U,) -> (U, metrics)."""
    columns = [(rank <= k).double() if name == "Recall" else (rank <= k) / torch.log2(rank + 1.0)
               for name, k in METRICS]
    return torch.stack([column.double() for column in columns], 1)  # (U, metrics)

def paired_bootstrap(ours, theirs, draws, rng):
    """95 % interval of mean(ours) - mean(theirs), each draw resampling users and, on each side, seeds.

    Paired: both models answer the same users, so that what makes a user easy or hard cancels out. Each user's weight in
    a draw is Poisson(1), which for many users is resampling with replacement. ours, theirs: (seeds, U, metrics)
    -> low, high (metrics,)."""
    differences = []
    for _ in range(draws):
        weight = torch.poisson(torch.ones(ours.shape[1], dtype=torch.double), generator=rng)  # (U,)
        means = []
        for side in (ours, theirs):
            seeds = torch.randint(len(side), (len(side),), generator=rng)  # (seeds,)
            means.append(torch.einsum("u,sum->m", weight, side[seeds]) / len(seeds))  # (metrics,)
        differences.append((means[0] - means[1]) / weight.sum().clamp(min=1))  # (metrics,)
    tails = torch.tensor([0.025, 0.975], dtype=torch.double)  # (2,)
    return torch.quantile(torch.stack(differences), tails, dim=0)  # (2, metrics)

def markdown(header, rows):
    """A table that is readable both on the screen and on a web page: columns padded to one width."""
    cells = [header, *rows]
    width = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, width)) + " |" for row in cells]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in width) + "|", *lines[1:]])

# ---------------------------------------------------------------------------------------------------

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[1],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--run", default="runs/toy", help="folder of this experiment's .pt files")
    add("--seed", type=int, default=0, help="of the bootstrap")
    add("--device", default="auto", help="accepted like in the other scripts; this one computes on the CPU")
    add("--smoke", action="store_true", help="fewer bootstrap draws")
    add("--against", default="sasrec", help="the model that the others are compared with")
    add("--draws", type=int, default=1000, help="of the bootstrap")
    if parser.parse_known_args(argv)[0].smoke:
        parser.set_defaults(draws=50)
    args = parser.parse_args(argv)

    run, rng = pathlib.Path(args.run), torch.Generator().manual_seed(args.seed)
    data = load(run / "data.pt", "01_data.py")
    N, U = len(data["item_ids"]) - 1, len(data["user_ids"])
    target = data["events"][data["offsets"][1:] - 1]  # each user's last event; (U,)
    files = sorted(run.glob("predictions-*.pt"))
    if not files:
        fail(f"{run} holds no predictions-*.pt: run 02_sasrec.py or 05_generator.py with the same --run first.")

    # One entry a model: a list over its seeds.
    models = {}
    for path in files:
        saved = load(path, "the script that made it")
        top = saved["test"]  # (U, top)
        if len(top) != U or top.min() < 0 or top.max() > N:
            fail(f"{path} has {len(top)} users and item ids up to {top.max()}, data.pt has {U} users and {N} items: "
                 "it was made from other data; make it again or delete it.")
        twice = top.sort(1).values.diff().eq(0) & (top.sort(1).values[:, 1:] > 0)  # (U, top - 1)
        if twice.any():
            fail(f"{path} recommends an item twice to one user (user {int(twice.any(1).nonzero()[0, 0])}).")
        models.setdefault(saved["name"], []).append(saved)
    gain = {name: torch.stack([gains(rank_of(target, one["test"])) for one in seeds])  # (seeds, U, metrics)
            for name, seeds in models.items()}

    popularity, rows = data["train_counts"].float(), {}
    for name, seeds in tqdm(models.items(), "bootstrap", leave=False):
        by_seed, one = gain[name].mean(1), seeds[0]  # (seeds, metrics)
        shown = [saved["test"][:, :10][saved["test"][:, :10] > 0].long() for saved in seeds]
        average = lambda values: sum(values) / len(seeds)
        rows[name] = {
            "seeds": [saved["seed"] for saved in seeds],
            "mean": by_seed.mean(0).tolist(), "std": by_seed.std(0).tolist() if len(seeds) > 1 else None,
            "coverage": average([len(items.unique()) / N for items in shown]),
            "popularity": average([popularity[items].mean().item() for items in shown]),
            "parameters": one["parameters"], "bytes": one["bytes"],
            "peak_memory": max(saved["peak_memory"] for saved in seeds),
            "train": average([saved["seconds"]["train"] for saved in seeds]),
            "predict": average([saved["seconds"]["predict"] for saved in seeds]) * 1000 / U}
        if args.against in gain and name != args.against:
            rows[name]["interval"] = paired_bootstrap(gain[name], gain[args.against], args.draws, rng).tolist()

    order = sorted(rows, key=lambda name: rows[name]["mean"][-1])
    quality, cost = [], []
    for name in order:
        row = rows[name]
        spread = [f" ± {s:.4f}" for s in row["std"]] if row["std"] else [""] * len(METRICS)
        signed = [f"[{row['interval'][0][m]:+.4f}, {row['interval'][1][m]:+.4f}]" for m in (2, 4)] \
            if "interval" in row else ["", ""]
        quality.append([name, str(len(row["seeds"])), *(f"{x:.4f}{s}" for x, s in zip(row["mean"], spread)), *signed])
        cost.append([name, f"{100 * row['coverage']:.0f} %", f"{row['popularity']:.0f}", f"{row['parameters']:,}",
                     f"{row['bytes'] / 1e6:.1f}", f"{row['train']:.0f}", f"{row['predict']:.2f}",
                     f"{row['peak_memory'] / 2**30:.1f}"])
    codes, code_rows = {}, []
    for modality in ("image", "text", "collab"):
        if (run / f"{modality}_codes.pt").exists():
            saved = load(run / f"{modality}_codes.pt", "02, 03 or 04")
            codes[modality] = stats = saved["stats"]
            percent = lambda shares: ", ".join(f"{100 * share:.0f}" for share in shares)
            code_rows.append([modality, f"{100 * saved['known'][1:].float().mean():.0f} %",
                              str(saved["codebooks"].shape[1]), percent(stats["used"][:3]),
                              ", ".join(f"{x:.0f}" for x in stats["perplexity"][:3]), percent(stats["unique"]),
                              ", ".join(map(str, stats["largest"])), str(stats["moved"])])

    text = "\n".join([
        f"{U:,} users, {N:,} items, {len(data['events']):,} events; the item to find is each user's last, among all items.\n",
        markdown(["model", "seeds", *(f"{name}@{k}" for name, k in METRICS),
                  f"Recall@10 - {args.against}", f"NDCG@10 - {args.against}"], quality),
        f"\n± standard deviation over seeds; [..] 95 % interval of the difference, {args.draws:,} paired bootstrap draws over "
        "users and seeds.\nAn interval that holds zero: these data do not tell the two apart.\n",
        markdown(["model", "items shown", "their events", "parameters", "MB", "training s", "s / 1,000 users",
                  "peak GiB"], cost),
        "\nitems shown: share of the catalogue among all first tens; their events: training events of a recommended item, "
        "mean;\nMB: of parameters, codes and prefix tree.\n",
        markdown(["codes", "items known", "K", "% of K used, levels 1-3", "perplexity", "% items alone after 1, 2, 3",
                  "most items on one prefix", "moved"], code_rows)])
    print(text)
    save({"rows": rows, "codes": codes, "options": vars(args)}, run / "results.pt")
    partial = run / "results.md.partial"
    partial.write_text(text + "\n")
    os.replace(partial, run / "results.md")

if __name__ == "__main__":
    main()
