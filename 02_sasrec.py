"""SASRec: a sequence model over item ids, and the collaborative codes that its embeddings give.

Trains SASRec (Kang and McAuley, 2018) with the full-softmax cross-entropy over all items, writes
its recommendations, and cuts its item embeddings e_i into codes by residual k-means: r_0 = e_i;
c_l = argmin_k ||r_{l-1} - C_l[k]||^2; r_l = r_{l-1} - C_l[c_l] (MSCGRec, arXiv 2602.03713, the
collaborative modality). It sees training events only: of each user all but the last two.

    python 02_sasrec.py                          # after 01_data.py
    torchrun --nproc_per_node=2 -- 02_sasrec.py  # several GPUs; "--": torchrun would take --run

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
          moved             int                  items that redistribution moved
        predictions-sasrec-s0.pt                 as 06_eval.py describes

On the toy shop: 1.5 minutes, 0.4 GiB (2 cores of an AMD EPYC).
"""
import argparse, atexit, hashlib, math, os, pathlib, resource, signal, sys, time, zipfile

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

SAMPLED_FROM = 50_000  # larger catalogues train with a sampled softmax of
NEGATIVES = 4096       # items, drawn once a step and shared by its targets
WARM_UP = 100          # steps in which the learning rate rises to its value
JUDGES = 20_000        # users whose validation events decide when training stops

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

# --- Stopped runs; several processes -------------------------------------------------------------
def resume(path, args, **parts):
    """The state of a stopped run after its last epoch, its parts (model, optimizer) restored; or a
    new one. Every epoch has random numbers of its own: a resumed run ends in the very same bits."""
    signal.signal(signal.SIGINT, lambda *_: fail("stopped: run it again without --fresh to go on"))
    if args.fresh or args.max_steps or not path.exists():
        return {"losses": [], "ndcg": [], "step": 0, "seconds": 0.0}
    state, now = load(path, "this script with --fresh"), vars(args)
    del MADE_FROM[path.name]  # results are not made from it
    for name, then in state["options"].items():
        if name not in ("run", "device", "rank", "fresh", "bf16") and then != now[name]:
            fail(f"{path} began with --{name} {then}, not {now[name]}: go on so, or use --fresh.")
    for name, part in parts.items():
        part.load_state_dict(state[name])
    return state

def join():
    """Under torchrun, meets the other processes -> rank, the number of this one, world, of all."""
    if not dist.is_torchelastic_launched():
        return 0, 1
    dist.init_process_group()
    atexit.register(dist.destroy_process_group)
    atexit.register(time.sleep, 0.5)  # first: gloo's threads still give tensors back to Python
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    if dist.get_rank():  # only one prints and writes
        sys.stdout, globals()["save"] = open(os.devnull, "w"), lambda *_: None
    return dist.get_rank(), dist.get_world_size()
def add_up(x):  # the sum over all processes, in place (all_reduce returns None)
    return dist.all_reduce(x) or x if dist.is_initialized() else x

# --- Data: sequences cut from the flat array of events -------------------------------------------
def windows(split, offsets, T):
    """What a model sees: slices events[start:start+length], at most T long; start, length: (W,).
    Training: inputs whose targets are one event later, each event but a user's first once; a random
    phase moves the cuts of long histories. Else: what precedes a user's held-out event."""
    if split != "train":
        target = offsets[1:] - (1 if split == "test" else 2)  # (U,)
        start = torch.maximum(offsets[:-1], target - T)  # (U,)
        return start, target - start
    U, targets = len(offsets) - 1, (offsets.diff() - 3).clamp(min=0)  # (U,); two are held out
    phase = torch.randint(T, (U,)) * (targets > T)  # (U,)
    count = (targets + phase + T - 1) // T  # (U,)
    user = torch.arange(U).repeat_interleave(count)  # (W,)
    number = torch.arange(len(user)) - (count.cumsum(0) - count)[user]  # (W,)
    begin = (number * T - phase[user]).clamp(min=0)  # (W,)
    end = torch.minimum((number + 1) * T - phase[user], targets[user])  # (W,)
    return offsets[user] + begin, end - begin

def equal_length_batches(lengths, tokens):
    """Batches of one length each, of about `tokens` items: no padding. (W,) -> list of indices"""
    order, batches = torch.randperm(len(lengths)), []  # (W,)
    order = order[lengths[order].argsort(stable=True)]  # (W,)
    for group in order.split(lengths.bincount()[lengths.unique()].tolist()):
        batches += group.split(max(1, tokens // int(lengths[group[0]])))
    return [batches[i] for i in torch.randperm(len(batches))]

# --- The model -----------------------------------------------------------------------------------
class Dropout(nn.Dropout):
    """As in torch, whose draw of booleans takes three times as long on a CPU as these numbers."""
    def forward(self, x):
        return x * ((torch.rand_like(x) >= self.p) / (1 - self.p)) if self.training else x

class Block(nn.Module):
    """Causal self-attention and a feed-forward layer, each added to what comes in. The norm stands
    before each of them, or behind the sum (post), as in the first transformer."""
    def __init__(self, E, H, dropout, post):
        super().__init__()
        self.H, self.post, self.dropout = H, post, Dropout(dropout)
        self.norm1, self.norm2 = nn.LayerNorm(E), nn.LayerNorm(E)
        self.qkv, self.out = nn.Linear(E, 3 * E), nn.Linear(E, E)
        self.up, self.down = nn.Linear(E, 4 * E), nn.Linear(4 * E, E)
    def attend(self, x):
        B, T, E = x.shape
        q, k, v = self.qkv(x).view(B, T, 3, self.H, E // self.H).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, H, T, E/H)
        return self.dropout(self.out(mixed.transpose(1, 2).reshape(B, T, E)))  # (B, T, E)
    def feed(self, x):
        return self.dropout(self.down(F.gelu(self.up(x))))  # (B, T, E)
    def forward(self, x):
        for norm, part in (self.norm1, self.attend), (self.norm2, self.feed):
            x = norm(x + part(x)) if self.post else x + part(norm(x))  # (B, T, E)
        return x

class SASRec(nn.Module):
    """Item ids (B, T) -> for each position the vector (B, T, E) whose inner product with an item's
    vector is the score of that item as the next one. content: what else is known of the items,
    (N+1, d); its projection is added to the item embeddings. post: norms as in the first
    transformer, also of what comes in, and a last layer, as in BERT4Rec: what comes out is no
    longer held near the last item, whose embedding went in."""
    def __init__(self, N, T, E, H, layers, dropout, content=None, post=False):
        super().__init__()
        self.items, self.positions = nn.Embedding(N + 1, E), nn.Embedding(T, E)
        self.content = content  # no buffer: all processes have it, nobody need send it
        self.project = None if content is None else nn.Linear(content.shape[1], E, bias=False)
        self.dropout = Dropout(dropout)
        self.blocks = nn.ModuleList(Block(E, H, dropout, post) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(E), nn.Linear(E, E) if post else None
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
    def vectors(self):  # (N+1, E)
        return self.items.weight + self.project(self.content) if self.project else self.items.weight
    def forward(self, history):
        place = torch.arange(history.shape[1], device=history.device)  # (T,)
        x = F.embedding(history, self.vectors()) + self.positions(place)  # (B, T, E)
        x = self.dropout(self.norm(x) if self.head else x)  # (B, T, E)
        for block in self.blocks:
            x = block(x)
        return x + self.head(x) if self.head else self.norm(x)  # (B, T, E)

def cross_entropy(hidden, embeddings, target, log_q=None):
    """Next-item loss, the sum of nats: the softmax runs over all items [4].
    This loss decides every comparison with SASRec. The original trains with binary cross-entropy
    and one sampled negative, and reaches half to four fifths of the recall (README; "Turning Dross
    into Gold", RecSys 2023).
    With log_q (N+1,), the items' log-frequency in training, the softmax's denominator is the
    target's own term and, for all others, an estimate from NEGATIVES items drawn with frequency q:
    each counts 1 / (NEGATIVES * q), or popular items, drawn more often, would be pushed down more
    often (importance sampling, Bengio and Senecal, 2008). Its mean is the sum over all items.
    hidden: (n, E), embeddings: (N+1, E), target: (n,)"""
    if log_q is None:
        # A part's scores stay in the cache, and in memory that the process has already.
        items, parts = embeddings[1:].T, zip(hidden.split(256), target.split(256))
        return sum(F.cross_entropy((h @ items).float(), t - 1, reduction="sum") for h, t in parts)
    drawn = torch.multinomial(log_q.exp(), NEGATIVES, replacement=True)  # (NEGATIVES,)
    # One look-up for both: the gradient of each look-up is as large as the table.
    right, wrong = embeddings[torch.cat([target, drawn])].split([len(target), NEGATIVES])
    negative = hidden @ wrong.T - log_q[drawn] - math.log(NEGATIVES)  # (n, NEGATIVES)  [5]
    negative = negative.masked_fill(drawn == target.unsqueeze(1), -torch.inf)  # (n, NEGATIVES)
    positive = (hidden * right).sum(1)  # (n,)
    return (torch.cat([positive.unsqueeze(1), negative], 1).logsumexp(1) - positive).sum()

def binary_cross_entropy(hidden, embeddings, target):
    """The loss of the original SASRec, for comparison: a random item against each target. Sum."""
    score = lambda items: (hidden * embeddings[items]).sum(1)  # (n,) -> (n,)
    wrong = torch.randint_like(target, 1, len(embeddings))  # (n,)
    return (F.softplus(-score(target)) + F.softplus(score(wrong))).sum()

@torch.no_grad()
def recommend(model, data, split, users, T, top, device):
    """Ranks all N items for some users: items int32 (n, top), best first, and scores (n, top).
    What a user had before is not taken out, as with other generators of codes: see the README."""
    model.eval()
    torch.manual_seed(0)  # the same batches, also where a stopped run goes on here
    start, length = (part[users] for part in windows(split, data["offsets"], T))  # (n,) both
    items, scores = torch.zeros(len(users), top).int(), torch.zeros(len(users), top)  # (n, top)
    vectors = model.vectors()[1:].T  # (E, N)
    for batch in equal_length_batches(length, 8192):
        history = data["events"][start[batch, None] + torch.arange(length[batch[0]])]  # (B, T)
        for rows, hidden in zip(batch.split(256), model(history.to(device))[:, -1].split(256)):
            best = (hidden @ vectors).topk(top)  # (256, top)
            items[rows] = (best.indices + 1).int().cpu()  # item 0 is padding
            scores[rows] = best.values.cpu()
    return items, scores

# --- Codes: residual k-means of any vectors (the same text in 02, 03 and 04) ---------------------
def codebook_size(N):
    """K, our rule: the power of two nearest (in ratio) to sqrt(N), from 8 to 256, the paper's."""
    return 2 ** min(8, max(3, round(math.log2(max(N, 1)) / 2)))

def nearest(x, codebook):
    """argmin_k ||x - C[k]||^2 for every row. x: (n, d), codebook: (K, d) -> (n,)"""
    half_norm = codebook.square().sum(1) / 2  # (K,)
    return torch.cat([torch.addmm(half_norm, part, codebook.T, alpha=-1).argmin(1)  # (part, K)
                      for part in x.split(4096)])  # few enough rows to stay in the cache

def kmeans(x, K, rng, steps=15):
    """Lloyd's algorithm; a centroid without members restarts at the vector that is served worst.
    1,024 vectors a centroid find it as well as more would. x: (n, d) -> codebook (K, d)"""
    x = x[torch.randperm(max(len(x), K), generator=rng)[:1024 * K] % len(x)]  # (n, d)
    codebook = x[:K]  # (K, d)
    for _ in range(steps):
        codes = nearest(x, codebook)  # (n,)
        members = torch.bincount(codes, minlength=K).unsqueeze(1)  # (K, 1)
        sums = torch.zeros_like(codebook).index_add_(0, codes, x)  # (K, d)
        empty = (members[:, 0] == 0).nonzero()[:, 0]  # (empty,)  [8]
        if len(empty):
            worst = (x - codebook[codes]).square().sum(1).topk(len(empty)).indices  # (empty,)
            sums[empty], members[empty] = x[worst], 1
        codebook = sums / members  # (K, d)
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
    x: (n, d), codebooks: (3, K, d) -> codes (n, 3), what they leave, r_3 (n, d)"""
    codes, residual = [], x
    for codebook in codebooks:
        codes.append(nearest(residual, codebook))  # (n,)
        residual = residual - codebook[codes[-1]]  # (n, d)  [7]
    return torch.stack(codes, 1), residual  # (n, 3), (n, d)

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
    it, those with the largest residual walk down the tree anew, at each level into the nearest
    branch with room (empty-leaf redistribution).
    embeddings: (N+1, d), known: (N+1,), codebooks: (3, K, d) -> int16 (N+1, 4), items moved"""
    K = codebooks.shape[1]
    codes, residual = quantise(embeddings, codebooks)  # (N+1, 3), (N+1, d)
    codes[~known] = torch.randint(K, codes[~known].shape, generator=rng)
    prefix = (codes * torch.tensor([K * K, K, 1])).sum(1)  # (N+1,)
    prefix[0] = -1  # padding shares its place with nobody
    # Of a full prefix those move that are served worst.  [10]
    moved = number_in_group(prefix, residual.square().sum(1).argsort(stable=True)) >= K  # (N+1,)
    size = [torch.bincount(prefix[1:][~moved[1:]] // K ** (2 - l), minlength=K ** (l + 1))
            for l in range(3)]  # (K,), (K*K,), (K*K*K,): items behind each prefix
    for item in moved.nonzero()[:, 0].tolist():
        residual, place = embeddings[item], 0  # (d,)
        for l, C in enumerate(codebooks):  # the nearest branch that is not full
            full = size[l].view(-1, K)[place] == K ** (3 - l)  # (K,)
            k = (residual - C).square().sum(1).masked_fill(full, math.inf).argmin().item()
            codes[item, l], residual, place = k, residual - C[k], place * K + k
            size[l][place] += 1
        prefix[item] = place
    most_bought = (-train_counts.long()).argsort(stable=True)  # (N+1,)  [9]
    codes = torch.cat([codes, number_in_group(prefix, most_bought).unsqueeze(1)], 1)  # (N+1, 4)
    codes[0] = -1
    alone = (prefix[known].unique(return_counts=True)[1] == 1).sum() / known.sum().clamp(1)  # ()
    print(f"codes: K = {K}, {alone:.0%} of the items are alone after level 3")
    return codes.to(torch.int16), moved.sum().item()

# -------------------------------------------------------------------------------------------------
def main(argv=None):
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--run", default="runs/toy", help="folder of this experiment's .pt files")
    add("--seed", type=int, default=0, help="of every random choice")
    device = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")  # cuda, mps
    add("--device", default="auto", choices=sorted({"auto", "cpu", device}), help="auto: the best")
    add("--smoke", action="store_true", help="tiny sizes: is everything in place?")
    add("--name", default="sasrec", help="of its row and files (its codes: collab for sasrec)")
    add("--content", default="", help="codes' files whose embeddings items have too, as text,image")
    add("--loss", choices=("softmax", "bce"), default="softmax", help="over all items, or original")
    add("--post-norm", action="store_true", help="norms as in the first transformer, a last layer")
    add("--length", type=int, default=20, help="T: events of history that the model sees")
    add("--width", type=int, default=64, help="E: width of the model, and of the item embeddings")
    add("--layers", type=int, default=2, help="transformer blocks")
    add("--heads", type=int, default=2, help="H: attention heads")
    add("--dropout", type=float, default=0.5, help="share of activations dropped in training")
    add("--lr", type=float, default=1e-3, help="learning rate of Adam")
    add("--batch", type=int, default=128, help="targets a training step, of each process")
    add("--epochs", type=int, default=200, help="at the most")
    add("--patience", type=int, default=12, help="epochs without a better NDCG@10 before it stops")
    add("--max-steps", type=int, default=0, help="a trial: only so many, of one epoch")
    add("--fresh", action="store_true", help="start over: leave a stopped run's checkpoint aside")
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="auto: bf16 on GPUs")
    add("--top", type=int, default=20, help="items recommended to a user")
    if parser.parse_known_args(argv)[0].smoke:
        parser.set_defaults(epochs=2, width=16, layers=1)
    args = parser.parse_args(argv)
    if (min(args.length, args.layers, args.heads, args.batch, args.epochs, args.top) < 1 or
            args.width % args.heads or not 0 <= args.dropout < 1 or not 0 < args.lr < math.inf or
            not 0 <= args.seed < 2 ** 32 or args.max_steps < 0 or "sasrec" not in args.name):
        fail("Sizes >= 1, --seed >= 0, --lr > 0, --dropout < 1, --name has sasrec; heads divide E.")
    args.rank, args.world = join()
    run, rng = pathlib.Path(args.run), torch.Generator().manual_seed(args.seed)
    device = torch.device(device if args.device == "auto" else args.device)
    bf16 = args.precision == "bf16" or (args.precision, device.type) == ("auto", "cuda")
    torch.manual_seed(args.seed)
    data = load(run / "data.pt", "01_data.py")
    N, U, T = len(data["item_ids"]) - 1, len(data["user_ids"]), args.length
    counts = data["train_counts"]  # (N+1,)
    content = [load(run / f"{m}_codes.pt", f"the script of {m}_codes.pt")["embeddings"]
               for m in args.content.split(",") if m]  # (N+1, d) each
    content = torch.cat(content, 1).to(device) if content else None  # (N+1, d)
    model = SASRec(N, T, args.width, args.heads, args.layers, args.dropout, content, args.post_norm)
    model.to(device)
    replica = nn.parallel.DistributedDataParallel(model) if args.world > 1 else model
    optimizer = torch.optim.Adam(model.parameters(), fused=True)
    log_q = (counts / counts.sum()).log().to(device) if N > SAMPLED_FROM else None  # (N+1,)
    judges = torch.randperm(U)[:JUDGES][args.rank::args.world]  # (judges,): a process's share
    truth = data["events"][data["offsets"][1 + judges] - 2].unsqueeze(1)  # (judges, 1)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{args.name}: {parameters:,} parameters; a uniform guess has loss {math.log(N):.3f}")
    checkpoint = run / f"{args.name}.checkpoint"
    state = resume(checkpoint, args, model=model, optimizer=optimizer)
    losses, ndcg, step = state["losses"], state["ndcg"], state["step"]
    began = time.time() - state["seconds"]
    for epoch in range(len(losses), args.epochs):
        if epoch and epoch - 1 - ndcg.index(max(ndcg)) >= args.patience:
            break
        torch.manual_seed(1000 * args.seed + epoch)  # the same batches in all processes
        start, length = windows("train", data["offsets"], T)  # (W,) both
        batches = equal_length_batches(length, args.batch * args.world)
        model.train()
        total, targets, todo = 0.0, 0, batches[:args.max_steps or None]
        for batch in tqdm(todo, f"epoch {epoch}", leave=False, disable=args.rank > 0 or None):
            window, mine = int(length[batch[0]]), batch[args.rank::args.world]  # (B,): its share
            n = window * len(batch)
            events = data["events"][start[mine, None] + torch.arange(window + 1)]  # (B, window+1)
            events = events.long().to(device)  # (B, window+1)
            hidden = replica(events[:, :-1]).flatten(0, 1)  # (B * window, E)
            vectors, target = model.vectors(), events[:, 1:].flatten()  # (N+1, E), (n,)
            # Most of the work is the products of `hidden` with all items: they may be bfloat16.
            with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
                loss = binary_cross_entropy(hidden, vectors, target) if args.loss == "bce" else \
                    cross_entropy(hidden, vectors, target, log_q)
            total, targets, step = total + loss.item(), targets + n, step + 1
            if not math.isfinite(total):
                fail(f"step {step}: the loss is no number, lower --lr; whole epochs: {checkpoint}")
            # Every target weighs the same, also in a batch that its length left small.
            (loss / args.batch).backward()
            optimizer.param_groups[0]["lr"] = args.lr * min(1, step / WARM_UP)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        losses.append(add_up(torch.tensor(total, device=device)).item() / max(1, targets))
        if args.max_steps:
            hours = (time.time() - began) / 3600 * len(batches) / max(1, step)
            return print(f"{step} steps; an epoch has {len(batches):,}: {hours:.3g} hours")
        shown = recommend(model, data, "valid", judges, T, min(10, N), device)[0]  # (judges, 10)
        gain = (shown == truth) / torch.log2(2.0 + torch.arange(shown.shape[1]))  # (judges, 10)
        ndcg.append(add_up(gain.sum().to(device)).item() / min(U, JUDGES))
        print(f"epoch {epoch:3d}  loss {losses[-1]:.3f}  validation NDCG@10 {ndcg[-1]:.4f}  "
              f"{time.time() - began:.0f} s")
        if ndcg[-1] >= max(ndcg):  # [6]
            state["best"] = {name: w.cpu().clone() for name, w in model.state_dict().items()}
        state |= {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step,
                  "seconds": time.time() - began, "options": vars(args)}
        save(state, checkpoint)
    model.load_state_dict(state["best"])
    everyone, top, began = torch.arange(U), min(args.top, N), time.time()  # (U,)
    test, scores = recommend(model, data, "test", everyone, T, top, device)  # (U, top) both
    seconds = {"train": state["seconds"], "predict": time.time() - began}
    valid, _ = recommend(model, data, "valid", everyone, T, top, device)  # (U, top)
    # Memory is counted in KiB, by macOS in bytes.
    save({"name": args.name, "seed": args.seed, "valid": valid, "test": test, "scores": scores,
          "seconds": seconds, "parameters": parameters, "bytes": 4 * parameters, "peak_memory":
          1024 ** (sys.platform != "darwin") * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
          "options": vars(args)}, run / f"predictions-{args.name}-s{args.seed}.pt")

    # Collaborative codes. Row 0, the padding, was never trained and never is an item.
    items, known = model.vectors().detach().cpu(), counts > 0  # (N+1, E), (N+1,)
    embeddings = (items - items[known].mean(0)) / items[known].std()  # (N+1, E)
    embeddings[~known], items[0] = 0, 0
    codebooks = residual_kmeans(embeddings[known], codebook_size(N), rng)  # (3, K, E)
    codes, moved = finish_codes(embeddings, known, codebooks, counts, rng)  # (N+1, L)
    save({"weights": state["best"], "item_embeddings": items, "losses": torch.tensor(losses),
          "ndcg": torch.tensor(ndcg), "seconds": state["seconds"], "options": vars(args)},
         run / f"{args.name}.pt")
    save({"codes": codes, "codebooks": codebooks, "embeddings": embeddings, "known": known,
          "moved": moved}, run / f"{args.name.replace('sasrec', 'collab')}_codes.pt")
    args.rank or checkpoint.unlink(missing_ok=True)

if __name__ == "__main__":
    main()
