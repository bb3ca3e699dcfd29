"""SASRec: a sequence model over item ids, and the collaborative codes that its item embeddings give.

Trains SASRec (Kang and McAuley, 2018) with the full-softmax cross-entropy over all items, writes its
recommendations and those of popularity, and cuts its item embeddings into codes by residual k-means:
r_0 = e_i, c_l = argmin_k ||r_{l-1} - C_l[k]||^2, r_l = r_{l-1} - C_l[c_l]  (MSCGRec, arXiv 2602.03713, the
collaborative modality). Only training events are seen: of each user all but the last two.

    python 02_sasrec.py                    # after 01_data.py; TODO minutes on 2 CPU cores

reads   data.pt
writes  sasrec.pt
          weights           dict                    the best epoch's parameters, by name
          item_embeddings   float32 (N+1, E)        row 0 is padding
          losses            float32 (epochs)        mean training loss, nats per target
          ndcg              float32 (epochs)        validation NDCG@10
          seconds           float                   of training
          options           dict                    the options of this run
        collab_codes.pt
          codes             int16 (N+1, L)          row 0 = -1; level 4 separates collisions
          codebooks         float32 (3, K, E)
          embeddings        float32 (N+1, E)        standardised; zero where nothing is known
          known             bool (N+1)              the item occurs in training
          stats             dict                    use, perplexity, uniqueness, moved items
        predictions-sasrec-s0.pt, predictions-popularity-s0.pt
          name              str
          seed              int
          valid             int32 (U, top)          recommended items for the validation event, best first
          test              int32 (U, top)          the same for the test event, validation event in the history
          scores            float32 (U, top)        of `test`
          seconds           dict                    train, predict: seconds for U users
          parameters        int                     trained numbers
          bytes             int                     of parameters and item state
          peak_memory       int                     bytes, the process's largest resident set
          options           dict
"""

import argparse
import math
import os
import pathlib
import resource
import sys
import time

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

L = 4              # code levels: 3 semantic ones and one that separates collisions
SAMPLED_FROM = 50_000  # catalogues above this train with sampled softmax
NEGATIVES = 1024   # sampled softmax: negatives drawn once a step and shared by its targets

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
        fail(f"{path} cannot be read ({type(error).__name__}): delete it and run {maker} again.")


def save(artifact, path):
    """Writes beside the file, flushes, renames: nobody ever sees half an artifact."""
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        torch.save(artifact, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def pick_device(name):
    """`auto` takes the GPU where there is one."""
    if name != "auto":
        return torch.device(name)
    mps = torch.backends.mps.is_available()
    return torch.device("cuda" if torch.cuda.is_available() else "mps" if mps else "cpu")


# ---------------------------------------------------------------------------------------------------
# Data: sequences cut from the flat array of events


def training_windows(offsets, T, rng):
    """Cuts the users' training events into windows of at most T inputs; each event but a user's first is a
    target once. Window w has inputs events[start:start+length] and targets one event later; where a
    history is longer than T, the cuts move by a random phase every time.

    offsets: (U+1,) -> start (W,), length (W,)."""
    U, targets = len(offsets) - 1, (offsets.diff() - 3).clamp(min=0)  # last two events are not for training; (U,)
    phase = torch.randint(T, (U,), generator=rng) * (targets > T)  # (U,)
    windows = (targets + phase + T - 1) // T  # (U,)
    user = torch.arange(U).repeat_interleave(windows)  # (W,)
    number = torch.arange(len(user)) - (windows.cumsum(0) - windows)[user]  # (W,)
    begin = (number * T - phase[user]).clamp(min=0)  # (W,)
    end = torch.minimum((number + 1) * T - phase[user], targets[user])  # (W,)
    return offsets[user] + begin, end - begin


def equal_length_batches(lengths, tokens, rng=None):
    """Batches of sequences of one length, about `tokens` items in each: nothing is padded, nothing masked.

    lengths: (W,) -> list of index tensors; shuffled by rng, in order of length without it."""
    order = torch.randperm(len(lengths), generator=rng) if rng else torch.arange(len(lengths))  # (W,)
    order = order[lengths[order].argsort(stable=True)]  # (W,)
    batches = []
    for group in order.split(lengths.bincount()[lengths.unique()].tolist()):
        batches += group.split(max(1, tokens // int(lengths[group[0]])))
    return [batches[i] for i in torch.randperm(len(batches), generator=rng)] if rng else batches


def take(events, start, length):
    """The slices events[start:start+length], all of one length. start: (B,) -> (B, length)."""
    return events[start.unsqueeze(1) + torch.arange(length)].long()


def histories(offsets, split, T):
    """Where each user's history lies: up to T events before the validation or the test event.

    offsets: (U+1,) -> start (U,), length (U,), target (U,): an index into events."""
    target = offsets[1:] - (1 if split == "test" else 2)  # (U,)
    start = torch.maximum(offsets[:-1], target - T)  # (U,)
    return start, target - start, target


def recall_ndcg(top, target):
    """Recall@10 and NDCG@10 with one relevant item: 1 / log2(rank + 1) if it is among the first ten.

    top: (U, top) item ids, best first; target: (U,)."""
    hit = top[:, :10] == target.unsqueeze(1)  # (U, 10)
    gain = 1 / torch.log2(torch.arange(2.0, 12))[:hit.shape[1]]  # (10,)
    return hit.any(1).float().mean().item(), (hit * gain).sum(1).mean().item()


# ---------------------------------------------------------------------------------------------------
# Model


class Block(nn.Module):
    """Causal self-attention and a feed-forward layer, each added to what comes in, norm first."""

    def __init__(self, E, H, dropout):
        super().__init__()
        self.H, self.dropout = H, nn.Dropout(dropout)
        self.norm1, self.norm2 = nn.LayerNorm(E), nn.LayerNorm(E)
        self.qkv, self.out = nn.Linear(E, 3 * E), nn.Linear(E, E)
        self.up, self.down = nn.Linear(E, 4 * E), nn.Linear(4 * E, E)

    def forward(self, x):
        B, T, E = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(B, T, 3, self.H, E // self.H).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, H, T, E/H)
        x = x + self.dropout(self.out(mixed.transpose(1, 2).reshape(B, T, E)))  # (B, T, E)
        return x + self.dropout(self.down(F.gelu(self.up(self.norm2(x)))))  # (B, T, E)


class SASRec(nn.Module):
    """Reads item ids (B, T), returns for each position the vector (B, T, E) whose inner product with an
    item's embedding is the score of that item as the next one."""

    def __init__(self, N, T, E, H, layers, dropout):
        super().__init__()
        self.items, self.positions = nn.Embedding(N + 1, E), nn.Embedding(T, E)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList(Block(E, H, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(E)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, history):
        place = torch.arange(history.shape[1], device=history.device)  # (T,)
        x = self.dropout(self.items(history) + self.positions(place))  # (B, T, E)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


def cross_entropy(hidden, embeddings, target, log_q=None):
    """Next-item loss, mean nats a target: the softmax runs over all items.

    This loss decides every comparison with SASRec. The original trains with one sampled negative and binary
    cross-entropy, and reaches about two thirds of the recall ("Turning Dross into Gold", RecSys 2023).
    With log_q (N+1,), the log-frequency of items in training, the softmax runs over the target and NEGATIVES items
    drawn with that frequency q; subtracting log q from their scores makes its gradient that of the full one in
    expectation (Bengio and Senecal, 2008). A negative that happens to be the target does not count.
    hidden: (n, E), embeddings: (N+1, E), target: (n,)."""
    if log_q is None:
        return F.cross_entropy(hidden @ embeddings[1:].T, target - 1)
    drawn = torch.multinomial(log_q.exp(), NEGATIVES, replacement=True)  # (NEGATIVES,)
    negative = hidden @ embeddings[drawn].T - log_q[drawn]  # (n, NEGATIVES)
    negative = negative.masked_fill(drawn == target.unsqueeze(1), -torch.inf)  # (n, NEGATIVES)
    positive = (hidden * embeddings[target]).sum(1) - log_q[target]  # (n,)
    return (torch.cat([positive.unsqueeze(1), negative], 1).logsumexp(1) - positive).mean()


@torch.no_grad()
def recommend(model, data, split, users, T, top, device):
    """Ranks all N items for the chosen users: items int32 (n, top), best first, and their scores (n, top).

    Items seen before are not taken out: a good model knows that they do not come again."""
    model.eval()
    start, length, _ = (part[users] for part in histories(data["offsets"], split, T))
    items = torch.zeros(len(users), top, dtype=torch.int32)  # (n, top)
    scores = torch.full((len(users), top), -torch.inf)  # (n, top)
    for batch in equal_length_batches(length, 8192):
        history = take(data["events"], start[batch], int(length[batch[0]])).to(device)  # (B, T)
        for rows, hidden in zip(batch.split(256), model(history)[:, -1].split(256)):
            ranking = hidden @ model.items.weight[1:].T  # (256, N)
            value, index = ranking.topk(min(top, ranking.shape[1]))  # (256, top)
            items[rows, :index.shape[1]] = (index + 1).int().cpu()                  # item 0 is padding
            scores[rows, :index.shape[1]] = value.float().cpu()
    return items, scores


# ---------------------------------------------------------------------------------------------------
# Codes: residual k-means of any vectors (the same text in 02, 03 and 04)


def codebook_size(N):
    """K, our rule: the power of two nearest to sqrt(N), from 8 to 256 (the paper's, from 33,000 items on)."""
    return 2 ** min(8, max(3, round(math.log2(max(N, 1)) / 2)))


def nearest(x, codebook, chunk=65536):
    """argmin_k ||x - C[k]||^2 for every row. x: (n, d), codebook: (K, d) -> (n,)."""
    half_norm = codebook.square().sum(1) / 2  # (K,)
    return torch.cat([(half_norm - part @ codebook.T).argmin(1) for part in x.split(chunk)])  # (n,)


def kmeans(x, K, rng, steps=30):
    """Lloyd's k-means; a centroid that lost all members restarts at the vector that is served worst.

    x: (n, d) -> codebook (K, d)."""
    codebook = x[torch.randint(len(x), (K,), generator=rng)].clone() if len(x) < K else \
        x[torch.randperm(len(x), generator=rng)[:K]].clone()  # (K, d)
    for _ in range(steps):
        codes = nearest(x, codebook)  # (n,)
        members = torch.bincount(codes, minlength=K).unsqueeze(1)  # (K, 1)
        sums = torch.zeros_like(codebook).index_add_(0, codes, x)  # (K, d)
        codebook = torch.where(members > 0, sums / members.clamp(min=1), codebook)  # (K, d)
        empty = (members[:, 0] == 0).nonzero()[:, 0]  # (empty,)
        if 0 < len(empty) <= len(x):
            worst = (x - codebook[codes]).square().sum(1).topk(len(empty)).indices  # (empty,)
            codebook[empty] = x[worst]
    return codebook


def residual_kmeans(x, K, rng):
    """A codebook for x, one for what it leaves, one for what that leaves. (n, d) -> codebooks (3, K, d)."""
    codebooks = []
    for _ in range(3):
        codebooks.append(kmeans(x, K, rng))  # (K, d)
        x = x - codebooks[-1][nearest(x, codebooks[-1])]  # (n, d)
    return torch.stack(codebooks)  # (3, K, d)


def quantise(x, codebooks):
    """r_0 = x; c_l = argmin_k ||r_{l-1} - C_l[k]||^2; r_l = r_{l-1} - C_l[c_l] (METHOD: section 2).

    x: (n, d), codebooks: (3, K, d) -> codes (n, 3)."""
    codes, residual = [], x
    for codebook in codebooks:
        codes.append(nearest(residual, codebook))  # (n,)
        residual = residual - codebook[codes[-1]]  # (n, d)
    return torch.stack(codes, 1)  # (n, 3)


def nearest_first(x, codebooks, prefix=()):
    """The places of the tree, those near the vector x (d,) first: its own, then other last codes, ..."""
    if len(prefix) == len(codebooks):
        yield prefix
        return
    codebook = codebooks[len(prefix)]
    for k in (x - codebook).square().sum(1).argsort(stable=True).tolist():
        yield from nearest_first(x - codebook[k], codebooks, prefix + (k,))


def finish_codes(embeddings, known, codebooks, train_counts, rng):
    """Semantic levels 1-3 and the collision level 4: every item gets a code that no other item has.

    An item that lacks the modality gets a random place in the tree (it may still be a target).
    Items that share (c_1, c_2, c_3) are numbered, the most bought first. Where more than K share them,
    those with the largest residual move to the nearest prefix with room (empty-leaf redistribution).
    embeddings: (N+1, d), known: bool (N+1,), codebooks: (3, K, d) -> codes int16 (N+1, 4), stats dict.
    """
    N, K = len(embeddings) - 1, codebooks.shape[1]
    codes = quantise(embeddings, codebooks)  # (N+1, 3)
    unknown = (~known).nonzero()[:, 0]  # (unknown,)
    codes[unknown] = torch.randint(K, (len(unknown), 3), generator=rng)  # (unknown, 3)
    place = torch.tensor([K * K, K, 1])  # (3,)
    prefix = (codes * place).sum(1)  # (N+1,)
    prefix[0] = -1                                                                  # padding is nobody
    residual = embeddings - sum(C[codes[:, l]] for l, C in enumerate(codebooks))  # (N+1, d)

    # Redistribution: keep the K best served items of an overflowing prefix, move the others.
    by_residual = residual.square().sum(1).argsort()  # (N+1,)
    room, moved = dict(), []
    for item in by_residual[prefix[by_residual].argsort(stable=True)].tolist()[1:]:
        leaf = int(prefix[item])
        room[leaf] = room.get(leaf, K) - 1
        if room[leaf] < 0:
            moved.append(item)
    for item in moved:
        for code in nearest_first(embeddings[item], codebooks):
            leaf = (code[0] * K + code[1]) * K + code[2]
            if room.get(leaf, K) > 0:
                room[leaf] = room.get(leaf, K) - 1
                codes[item], prefix[item] = torch.tensor(code), leaf
                break

    # Level 4 counts the items of a prefix from 0, the most bought first, equal ones by item id.
    order = (-train_counts.long()).argsort(stable=True)  # (N+1,)
    order = order[prefix[order].argsort(stable=True)]  # (N+1,)
    _, size = prefix[order].unique_consecutive(return_counts=True)  # (prefixes,)
    start = (size.cumsum(0) - size).repeat_interleave(size)  # (N+1,)
    number = torch.empty(N + 1, dtype=torch.long)  # (N+1,)
    number[order] = torch.arange(N + 1) - start
    codes = torch.cat([codes, number.unsqueeze(1)], 1)  # (N+1, 4)
    codes[0] = -1

    used = [codes[known, l].unique(return_counts=True)[1] for l in range(4)]
    entropy = [-(n / n.sum() * (n / n.sum()).log()).sum() for n in used]
    groups = [codes[known, :l].unique(dim=0, return_counts=True)[1] for l in (1, 2, 3)]
    stats = {"used": [len(n) / K for n in used], "perplexity": [math.exp(h) for h in entropy],
             "unique": [float((n == 1).sum() / max(1, n.sum())) for n in groups],
             "largest": [int(n.max()) if len(n) else 0 for n in groups], "moved": len(moved)}
    return codes.to(torch.int16), stats


def describe_codes(stats):
    """What finish_codes counted, as one readable line."""
    percent = lambda shares: ", ".join(f"{100 * share:.0f}" for share in shares)
    return (f"codes: {percent(stats['used'][:3])} % of levels 1-3 in use, {percent(stats['unique'])} % of items alone "
            f"after level 1, 2, 3; at most {stats['largest'][2]} share three levels; {stats['moved']} moved")


# ---------------------------------------------------------------------------------------------------


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[1],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--run", default="runs/toy", help="folder of this experiment's .pt files")
    add("--seed", type=int, default=0, help="of every random choice")
    add("--device", default="auto", help="cuda, mps, cpu, or auto: the best there is")
    add("--smoke", action="store_true", help="tiny sizes: is everything in place?")
    add("--length", type=int, default=20, help="T: events of history that the model sees")
    add("--width", type=int, default=64, help="E: width of the model, and of the collaborative embedding")
    add("--layers", type=int, default=2, help="transformer blocks")
    add("--heads", type=int, default=2, help="H: attention heads")
    add("--dropout", type=float, default=0.3, help="share of activations dropped in training")
    add("--lr", type=float, default=1e-3, help="learning rate of AdamW")
    add("--weight-decay", type=float, default=0.0, help="of AdamW")
    add("--batch", type=int, default=2048, help="targets a training step")
    add("--epochs", type=int, default=200, help="at the most")
    add("--patience", type=int, default=10, help="epochs without a better validation NDCG@10 before it stops")
    add("--valid-users", type=int, default=20000, help="users whose validation event decides when to stop")
    add("--top", type=int, default=20, help="items recommended to a user")
    if parser.parse_known_args(argv)[0].smoke:
        parser.set_defaults(epochs=2, width=16, layers=1)
    args = parser.parse_args(argv)
    if args.width % args.heads or min(args.length, args.layers, args.epochs, args.top, args.batch) < 1:
        fail("--width must be a multiple of --heads; --length, --layers, --epochs, --top and --batch at least 1.")

    run, device = pathlib.Path(args.run), pick_device(args.device)
    torch.manual_seed(args.seed)
    rng = torch.Generator().manual_seed(args.seed)
    data = load(run / "data.pt", "01_data.py")
    N, U, T = len(data["item_ids"]) - 1, len(data["user_ids"]), args.length
    counts = data["train_counts"]  # (N+1,)
    log_q = (counts / counts.sum()).log().to(device) if N > SAMPLED_FROM else None  # (N+1,)
    everyone = torch.arange(U)  # (U,)
    judges = torch.randperm(U, generator=rng)[:args.valid_users]  # (judges,)
    truth = {split: data["events"][histories(data["offsets"], split, T)[2]] for split in ("valid", "test")}

    def save_predictions(name, model_recommends, train_seconds, parameters, size):
        """Writes predictions-NAME-sSEED.pt, which is all that 06 knows of a model."""
        began = time.time()
        valid, (test, scores) = model_recommends("valid")[0], model_recommends("test")
        seconds = {"train": train_seconds, "predict": (time.time() - began) / 2}
        print(f"{name:12s} Recall@10, NDCG@10: validation {recall_ndcg(valid, truth['valid'])}")
        save({"name": name, "seed": args.seed, "valid": valid, "test": test, "scores": scores, "seconds": seconds,
              "parameters": parameters, "bytes": size, "options": vars(args),
              "peak_memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024},
             run / f"predictions-{name}-s{args.seed}.pt")

    # Popularity: everybody gets the items most often seen in training.
    value, index = counts[1:].float().topk(min(args.top, N))
    popular = F.pad(index + 1, (0, args.top - len(index))).int().expand(U, -1)  # (U, top)
    popular_score = F.pad(value, (0, args.top - len(index))).expand(U, -1)  # (U, top)
    save_predictions("popularity", lambda split: (popular.clone(), popular_score.clone()), 0.0, N, 4 * N)

    # Training.
    model = SASRec(N, T, args.width, args.heads, args.layers, args.dropout).to(device)
    decay = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW([{"params": decay}, {"params": rest, "weight_decay": 0.0}],
                                  lr=args.lr, weight_decay=args.weight_decay)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"SASRec: {N} items, {U} users, {parameters:,} parameters, "
          f"loss of a uniform guess {math.log(N):.3f}, {'sampled' if N > SAMPLED_FROM else 'full'} softmax")
    losses, ndcg, best, began = [], [], None, time.time()
    for epoch in range(args.epochs):
        model.train()
        start, length = training_windows(data["offsets"], T, rng)
        total = 0.0
        for batch in tqdm(equal_length_batches(length, args.batch, rng), f"epoch {epoch}", leave=False):
            events = take(data["events"], start[batch], int(length[batch[0]]) + 1).to(device)  # (B, T+1)
            hidden = model(events[:, :-1])  # (B, T, E)
            loss = cross_entropy(hidden.flatten(0, 1), model.items.weight, events[:, 1:].flatten(), log_q)
            # Every target weighs the same, also in a batch that its length left small.
            (loss * min(1, events[:, 1:].numel() / args.batch)).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            total += loss.item() * events[:, 1:].numel()
        losses.append(total / length.sum().item())
        recall, score = recall_ndcg(recommend(model, data, "valid", judges, T, 10, device)[0], truth["valid"][judges])
        ndcg.append(score)
        print(f"epoch {epoch:3d}  loss {losses[-1]:.3f}  validation Recall@10 {recall:.4f}  NDCG@10 {score:.4f}")
        if score >= max(ndcg):
            best = {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}
        if epoch - ndcg.index(max(ndcg)) >= args.patience:
            break
    model.load_state_dict(best)
    seconds = time.time() - began
    save_predictions("sasrec", lambda split: recommend(model, data, split, everyone, T, args.top, device),
                     seconds, parameters, 4 * parameters)

    # Collaborative codes.
    items = best["items.weight"]  # (N+1, E)
    known = counts > 0  # (N+1,)
    embeddings = (items - items[known].mean(0)) / items[known].std()  # (N+1, E)
    embeddings[~known] = 0
    codebooks = residual_kmeans(embeddings[known], codebook_size(N), rng)  # (3, K, E)
    codes, stats = finish_codes(embeddings, known, codebooks, counts, rng)
    items[0] = 0
    save({"weights": best, "item_embeddings": items, "losses": torch.tensor(losses), "ndcg": torch.tensor(ndcg),
          "seconds": seconds, "options": vars(args)}, run / "sasrec.pt")
    save({"codes": codes, "codebooks": codebooks, "embeddings": embeddings, "known": known, "stats": stats},
         run / "collab_codes.pt")
    print(describe_codes(stats))


if __name__ == "__main__":
    main()
