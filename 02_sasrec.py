"""SASRec: a sequence model over item ids, and the collaborative codes that its embeddings give.

Trains SASRec (Kang and McAuley, 2018) with the full-softmax cross-entropy over all items, writes
its recommendations and those of popularity, and cuts its item embeddings e_i into codes by
residual k-means: r_0 = e_i; c_l = argmin_k ||r_{l-1} - C_l[k]||^2; r_l = r_{l-1} - C_l[c_l]
(MSCGRec, arXiv 2602.03713, the collaborative modality). It sees training events only: of each
user all but the last two.

    python 02_sasrec.py                    # after 01_data.py

reads   data.pt
writes  sasrec.pt
          weights           dict                 the best epoch's parameters, by name
          item_embeddings   float32 (N+1, E)     row 0 is padding
          losses            float32 (epochs)     mean training loss, nats a target
          ndcg              float32 (epochs)     validation NDCG@10
          seconds           float                of training
          options           dict                 the options of this run
        collab_codes.pt
          codes             int16 (N+1, L)       row 0 = -1; level 4 separates collisions
          codebooks         float32 (3, K, E)
          embeddings        float32 (N+1, E)     standardised; zero where nothing is known
          known             bool (N+1)           the item occurs in training
          stats             dict                 use, perplexity, uniqueness, moved items
        predictions-sasrec-s0.pt                 as 06_eval.py describes
        predictions-popularity-s0.pt

On the toy shop: 2.6 minutes, 0.4 GiB (2 cores of an AMD EPYC).
"""
import argparse, math, os, pathlib, resource, sys, time
from collections import Counter

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

SAMPLED_FROM = 50_000  # larger catalogues train with a sampled softmax of
NEGATIVES = 1024       # items, drawn once a step and shared by its targets
WARM_UP = 100          # steps in which the learning rate rises to its value
JUDGES = 20_000        # users whose validation events decide when training stops

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

# --- Data: sequences cut from the flat array of events -------------------------------------------
def training_windows(offsets, T, rng):
    """Cuts the users' training events into windows: inputs events[start:start+length], at most T,
    and targets one event later. Each event but a user's first is a target once; where a history
    is longer than T, the cuts move by a random phase. offsets (U+1,) -> start, length (W,)"""
    U, targets = len(offsets) - 1, (offsets.diff() - 3).clamp(min=0)  # (U,); two are held out
    phase = torch.randint(T, (U,), generator=rng) * (targets > T)  # (U,)
    windows = (targets + phase + T - 1) // T  # (U,)
    user = torch.arange(U).repeat_interleave(windows)  # (W,)
    number = torch.arange(len(user)) - (windows.cumsum(0) - windows)[user]  # (W,)
    begin = (number * T - phase[user]).clamp(min=0)  # (W,)
    end = torch.minimum((number + 1) * T - phase[user], targets[user])  # (W,)
    return offsets[user] + begin, end - begin

def equal_length_batches(lengths, tokens, rng=None):
    """Batches of sequences of one length, about `tokens` items in each, in random order: nothing
    is padded, nothing masked. lengths (W,) -> list of index tensors"""
    order, batches = torch.randperm(len(lengths), generator=rng), []  # (W,)
    order = order[lengths[order].argsort(stable=True)]  # (W,)
    for group in order.split(lengths.bincount()[lengths.unique()].tolist()):
        batches += group.split(max(1, tokens // int(lengths[group[0]])))
    return [batches[i] for i in torch.randperm(len(batches), generator=rng)]

def take(events, start, length):
    """The slices events[start:start+length], all of one length. start: (B,) -> (B, length)"""
    return events[start.unsqueeze(1) + torch.arange(length)].long()

def histories(offsets, split, T):
    """Up to T events before each user's validation or test event: start, length, and the place of
    that event. offsets (U+1,) -> (U,) each"""
    target = offsets[1:] - (1 if split == "test" else 2)  # (U,)
    start = torch.maximum(offsets[:-1], target - T)  # (U,)
    return start, target - start, target

# --- The model -----------------------------------------------------------------------------------
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
    """Item ids (B, T) -> for each position the vector (B, T, E) whose inner product with an item's
    embedding is the score of that item as the next one."""

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

    This loss decides every comparison with SASRec. The original trains with binary cross-entropy
    and one sampled negative, and reaches about two thirds of the recall ("Turning Dross into
    Gold", RecSys 2023). With log_q (N+1,), the items' log-frequency in training, the softmax runs
    over the target and NEGATIVES items drawn with frequency q; log q is subtracted from all scores,
    or popular items, drawn more often, would be pushed down more often (Bengio and Senecal, 2008).
    hidden: (n, E), embeddings: (N+1, E), target: (n,)"""
    if log_q is None:
        return F.cross_entropy(hidden @ embeddings[1:].T, target - 1)
    drawn = torch.multinomial(log_q.exp(), NEGATIVES, replacement=True)  # (NEGATIVES,)
    negative = hidden @ embeddings[drawn].T - log_q[drawn]  # (n, NEGATIVES)
    negative = negative.masked_fill(drawn == target.unsqueeze(1), -torch.inf)  # (n, NEGATIVES)
    positive = (hidden * embeddings[target]).sum(1) - log_q[target]  # (n,)
    return (torch.cat([positive.unsqueeze(1), negative], 1).logsumexp(1) - positive).mean()

@torch.no_grad()
def recommend(model, data, split, users, T, top, device):
    """Ranks all N items for some users: items int32 (n, top), best first, and scores (n, top).

    Items seen before are not taken out: a good model knows that they do not come again."""
    model.eval()
    start, length, _ = (part[users] for part in histories(data["offsets"], split, T))
    items = torch.zeros(len(users), top, dtype=torch.int32)  # (n, top)
    scores = torch.zeros(len(users), top)  # (n, top)
    for batch in equal_length_batches(length, 8192):
        history = take(data["events"], start[batch], int(length[batch[0]])).to(device)  # (B, T)
        for rows, hidden in zip(batch.split(256), model(history)[:, -1].split(256)):
            best = (hidden @ model.items.weight[1:].T).topk(top)  # (256, top)
            items[rows] = (best.indices + 1).int().cpu()  # item 0 is padding
            scores[rows] = best.values.cpu()
    return items, scores

# --- Codes: residual k-means of any vectors (the same text in 02, 03 and 04) ---------------------
def codebook_size(N):
    """K, our rule: the power of two nearest to sqrt(N), from 8 to 256, the paper's."""
    return 2 ** min(8, max(3, round(math.log2(max(N, 1)) / 2)))

def nearest(x, codebook):
    """argmin_k ||x - C[k]||^2 for every row. x: (n, d), codebook: (K, d) -> (n,)"""
    half_norm = codebook.square().sum(1) / 2  # (K,)
    return torch.cat([(half_norm - part @ codebook.T).argmin(1) for part in x.split(65536)])

def kmeans(x, K, rng, steps=30):
    """Lloyd's algorithm; a centroid without members restarts at the vector that is served worst.

    x: (n, d) -> codebook (K, d)"""
    start = torch.randperm(max(len(x), K), generator=rng)[:K] % len(x)  # (K,)
    codebook = x[start].clone()  # (K, d)
    for _ in range(steps):
        codes = nearest(x, codebook)  # (n,)
        members = torch.bincount(codes, minlength=K).unsqueeze(1)  # (K, 1)
        sums = torch.zeros_like(codebook).index_add_(0, codes, x)  # (K, d)
        codebook = torch.where(members > 0, sums / members.clamp(min=1), codebook)  # (K, d)
        empty = (members[:, 0] == 0).nonzero()[:len(x), 0]  # (empty,)
        worst = (x - codebook[codes]).square().sum(1).topk(len(empty)).indices  # (empty,)
        codebook[empty] = x[worst]
    return codebook

def residual_kmeans(x, K, rng):
    """A codebook for x, one for what it leaves, one for what that leaves: (n, d) -> (3, K, d)"""
    codebooks = []
    for _ in range(3):
        codebooks.append(kmeans(x, K, rng))  # (K, d)
        x = x - codebooks[-1][nearest(x, codebooks[-1])]  # (n, d)
    return torch.stack(codebooks)  # (3, K, d)

def quantise(x, codebooks):
    """r_0 = x; c_l = argmin_k ||r_{l-1} - C_l[k]||^2; r_l = r_{l-1} - C_l[c_l].

    x: (n, d), codebooks: (3, K, d) -> codes (n, 3)"""
    codes, residual = [], x
    for codebook in codebooks:
        codes.append(nearest(residual, codebook))  # (n,)
        residual = residual - codebook[codes[-1]]  # (n, d)
    return torch.stack(codes, 1)  # (n, 3)

def nearest_first(x, codebooks, prefix=()):
    """All (c_1, c_2, c_3), the nearest to x (d,) first, level by level."""
    if len(prefix) == len(codebooks):
        yield prefix
        return
    distance = (x - codebooks[len(prefix)]).square().sum(1)  # (K,)
    for k in distance.argsort(stable=True).tolist():
        yield from nearest_first(x - codebooks[len(prefix)][k], codebooks, prefix + (k,))

def number_in_group(group, order):
    """Numbers the members of each group from 0, in the given order. (n,), (n,) -> (n,)"""
    order = order[group[order].argsort(stable=True)]  # (n,)
    _, size = group[order].unique_consecutive(return_counts=True)  # (groups,)
    number = torch.empty_like(group)  # (n,)
    number[order] = torch.arange(len(group)) - (size.cumsum(0) - size).repeat_interleave(size)
    return number

def finish_codes(embeddings, known, codebooks, train_counts, rng):
    """Semantic levels 1-3 and the collision level 4: every item gets a code that no other has.

    An item without this modality gets a random place in the tree: it may still be a target.
    Items that share (c_1, c_2, c_3) are numbered, the most bought first. Where more than K share
    it, those with the largest residual move to the nearest one with room (empty-leaf
    redistribution). embeddings: (N+1, d), known: bool (N+1,), codebooks: (3, K, d)
    -> codes int16 (N+1, 4), row 0 = -1, and statistics of the known items' codes."""
    K = codebooks.shape[1]
    codes = quantise(embeddings, codebooks)  # (N+1, 3)
    codes[~known] = torch.randint(K, codes[~known].shape, generator=rng)
    residual = embeddings - sum(C[codes[:, l]] for l, C in enumerate(codebooks))  # (N+1, d)
    worst_last = residual.square().sum(1).argsort(stable=True)  # (N+1,)
    prefix = (codes * torch.tensor([K * K, K, 1])).sum(1)  # (N+1,)
    prefix[0] = -1  # padding shares its place with nobody
    moved = (number_in_group(prefix, worst_last) >= K).nonzero()[:, 0].tolist()
    size = Counter(prefix.tolist()) if moved else {}
    for item in moved:
        for code in nearest_first(embeddings[item], codebooks):
            place = (code[0] * K + code[1]) * K + code[2]
            if size[place] < K:
                size[place] += 1
                codes[item], prefix[item] = torch.tensor(code), place
                break

    most_bought = (-train_counts.long()).argsort(stable=True)  # (N+1,)
    codes = torch.cat([codes, number_in_group(prefix, most_bought).unsqueeze(1)], 1)  # (N+1, 4)
    codes[0] = -1
    use = [torch.bincount(codes[known, l], minlength=K).float() for l in range(4)]
    entropy = [torch.special.entr(n / n.sum().clamp(min=1)).sum().item() for n in use]
    shared = [codes[known, :l].unique(dim=0, return_counts=True)[1] for l in (1, 2, 3)]
    stats = {"used": [(n > 0).float().mean().item() for n in use],
             "perplexity": [math.exp(h) for h in entropy], "moved": len(moved),
             "unique": [(n == 1).sum().item() / max(1, n.sum().item()) for n in shared],
             "largest": [max(n.tolist(), default=0) for n in shared]}
    print(f"codes: {min(stats['used'][:3]):.0%} or more of {K} in use, {stats['unique'][2]:.0%} of "
          f"the items alone after level 3, at most {stats['largest'][2]} together")
    return codes.to(torch.int16), stats

# -------------------------------------------------------------------------------------------------
def main(argv=None):
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--run", default="runs/toy", help="folder of this experiment's .pt files")
    add("--seed", type=int, default=0, help="of every random choice")
    add("--device", default="auto", help="cuda, mps, cpu, or auto: the best there is")
    add("--smoke", action="store_true", help="tiny sizes: is everything in place?")
    add("--length", type=int, default=20, help="T: events of history that the model sees")
    add("--width", type=int, default=64, help="E: width of the model, and of the item embeddings")
    add("--layers", type=int, default=2, help="transformer blocks")
    add("--heads", type=int, default=2, help="H: attention heads")
    add("--dropout", type=float, default=0.5, help="share of activations dropped in training")
    add("--lr", type=float, default=1e-3, help="learning rate of Adam")
    add("--batch", type=int, default=128, help="targets a training step")
    add("--epochs", type=int, default=200, help="at the most")
    add("--patience", type=int, default=12, help="epochs without a better NDCG@10 before it stops")
    add("--top", type=int, default=20, help="items recommended to a user")
    if parser.parse_known_args(argv)[0].smoke:
        parser.set_defaults(epochs=2, width=16, layers=1)
    args = parser.parse_args(argv)
    if min(args.length, args.layers, args.heads, args.batch, args.epochs, args.top) < 1:
        fail("--length, --layers, --heads, --batch, --epochs and --top start at 1.")
    if args.width % args.heads or not 0 <= args.dropout < 1:
        fail("--width must be a multiple of --heads, --dropout from 0 to below 1.")

    run, rng = pathlib.Path(args.run), torch.Generator().manual_seed(args.seed)
    device = torch.device(args.device if args.device != "auto" else
                          torch.accelerator.current_accelerator(check_available=True) or "cpu")
    torch.manual_seed(args.seed)
    data = load(run / "data.pt", "01_data.py")
    N, U, T = len(data["item_ids"]) - 1, len(data["user_ids"]), args.length
    counts, top, everyone = data["train_counts"], min(args.top, N), torch.arange(U)  # (N+1,), (U,)

    def save_predictions(name, recommended, train_seconds, parameters):
        """recommended: split -> items, scores. Peak memory: the process's so far, of all models."""
        valid, began = recommended("valid")[0], time.time()  # (U, top)
        test, scores = recommended("test")  # (U, top) both
        seconds = {"train": train_seconds, "predict": time.time() - began}
        save({"name": name, "seed": args.seed, "valid": valid, "test": test, "scores": scores,
              "seconds": seconds, "parameters": parameters, "bytes": 4 * parameters,
              "peak_memory": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
              "options": vars(args)}, run / f"predictions-{name}-s{args.seed}.pt")

    popular = counts[1:].float().topk(top)  # (top,)
    popular = (popular.indices + 1).int().repeat(U, 1), popular.values.repeat(U, 1)  # (U, top) both
    save_predictions("popularity", lambda split: popular, 0.0, N)

    model = SASRec(N, T, args.width, args.heads, args.layers, args.dropout).to(device)
    optimizer = torch.optim.Adam(model.parameters())
    log_q = (counts / counts.sum()).log().to(device) if N > SAMPLED_FROM else None  # (N+1,)
    judges = torch.randperm(U, generator=rng)[:JUDGES]  # (judges,)
    truth = data["events"][histories(data["offsets"], "valid", T)[2]]  # (U,)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"sasrec: {parameters:,} parameters; a uniform guess has loss {math.log(N):.3f}")
    losses, ndcg, best, step, began = [], [], None, 0, time.time()
    for epoch in range(args.epochs):
        model.train()
        start, length = training_windows(data["offsets"], T, rng)  # (W,) both
        batches, total = equal_length_batches(length, args.batch, rng), 0.0
        for batch in tqdm(batches, f"epoch {epoch}", leave=False, disable=None):
            events = take(data["events"], start[batch], int(length[batch[0]]) + 1).to(device)
            hidden, target = model(events[:, :-1]), events[:, 1:].flatten()  # (B, T, E), (B * T,)
            loss = cross_entropy(hidden.flatten(0, 1), model.items.weight, target, log_q)
            # The factor: every target weighs the same, also in a batch that its length left small.
            (loss * min(1, len(target) / args.batch)).backward()
            step += 1
            for group in optimizer.param_groups:
                group["lr"] = args.lr * min(1, step / WARM_UP)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            total += loss.item() * len(target)
        losses.append(total / max(1, length.sum().item()))
        shown = recommend(model, data, "valid", judges, T, min(10, N), device)[0]  # (judges, 10)
        hit = (shown == truth[judges].unsqueeze(1)).float()  # (judges, 10)
        ndcg.append((hit / torch.log2(2.0 + torch.arange(hit.shape[1]))).sum(1).mean().item())
        print(f"epoch {epoch:3d}  loss {losses[-1]:.3f}  validation Recall@10 "
              f"{hit.sum(1).mean():.4f}  NDCG@10 {ndcg[-1]:.4f}  {time.time() - began:.0f} s")
        if ndcg[-1] >= max(ndcg):
            best = {name: w.detach().cpu().clone() for name, w in model.state_dict().items()}
        if epoch - ndcg.index(max(ndcg)) >= args.patience:
            break
    model.load_state_dict(best)
    seconds = time.time() - began
    recommended = lambda split: recommend(model, data, split, everyone, T, top, device)
    save_predictions("sasrec", recommended, seconds, parameters)

    # Collaborative codes. Row 0, the padding, was never trained and never is an item.
    items, known = best["items.weight"], counts > 0  # (N+1, E), (N+1,)
    embeddings = (items - items[known].mean(0)) / items[known].std()  # (N+1, E)
    embeddings[~known], items[0] = 0, 0
    codebooks = residual_kmeans(embeddings[known], codebook_size(N), rng)  # (3, K, E)
    codes, stats = finish_codes(embeddings, known, codebooks, counts, rng)  # (N+1, L)
    save({"weights": best, "item_embeddings": items, "losses": torch.tensor(losses),
          "ndcg": torch.tensor(ndcg), "seconds": seconds, "options": vars(args)}, run / "sasrec.pt")
    save({"codes": codes, "codebooks": codebooks, "embeddings": embeddings, "known": known,
          "stats": stats}, run / "collab_codes.pt")

if __name__ == "__main__":
    main()
