"""The generator: a T5-style transformer reads the codes of a history and writes the next item's.

An item of the history is M = D * L tokens: its image, text and collaborative codes. The encoder
reads them, the decoder writes the L codes of one modality of the next item. The training softmax
runs only over codes that continue a real item (constrained sequence learning; MSCGRec, arXiv
2602.03713); beam search walks the same tree. Left out: T5's tied output, half of its dropout.

    python 05_generator.py                                               # MSCGRec
    python 05_generator.py --name tiger --modalities text --target text  # TIGER-like: text alone
    python 05_generator.py --history "part of a title, another title"    # and then? history.png

reads   data.pt, image_codes.pt, text_codes.pt, collab_codes.pt
writes  generator-mscgrec.pt
          weights      dict                 the best epoch's parameters, by name
          losses       float32 (epochs, L)  mean training loss of each code, nats
          ndcg         float32 (epochs)     validation NDCG@10
          seconds      float                of training
          options      dict                 the options of this run
        predictions-mscgrec-s0.pt           as 06_eval.py describes

On the toy shop: 3.3 minutes, 0.5 GiB (2 cores of an AMD EPYC).
"""
import argparse, atexit, hashlib, math, os, pathlib, resource, signal, sys, textwrap, time, zipfile

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw
from tqdm import tqdm

TOKEN_SCALE = 0.3  # standard deviation of token embeddings at the start
WARM_UP, WEIGHT_DECAY = 0.04, 0.01  # share of training in which --lr rises; then a cosine to 0
JUDGES, FARTHEST = 2000, 31  # users that validate an epoch; distances from FARTHEST on are one

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

# --- The prefix tree of all item codes -----------------------------------------------------------
class Trie:
    """Which codes continue a prefix so that a real item can come of it. From codes (N+1, L), once:
    keys[l]     int64 (nodes_l,)        the prefixes of l codes, each packed into a number, sorted
    allowed[l]  uint8 (nodes_l, K / 8)  A(c_<l): the codes that continue each prefix, one bit a code
    path        int64 (N+1, L)          the node of an item's prefix of l codes, l = 0..L-1
    leaf_item   int64 (N,)              the item of each leaf"""
    def __init__(self, codes, K):
        codes, self.K, self.L, self.allowed = codes[1:].long(), K, codes.shape[1], []
        key = torch.zeros_like(codes[:, 0])  # (N,)
        self.keys, path = [key[:1]], [key]  # the root is the only prefix of no codes
        for l in range(self.L):
            key = key * K + codes[:, l]  # (N,)
            child, node = key.unique(return_inverse=True)  # (nodes_l+1,), (N,)
            parent = torch.searchsorted(self.keys[l], child // K)  # (nodes_l+1,)
            bits = torch.zeros(len(self.keys[l]) * K // 8, dtype=torch.uint8, device=key.device)
            byte, bit = parent * (K // 8) + child % K // 8, 1 << child % 8  # (nodes_l+1,) both
            self.allowed.append(bits.index_add_(0, byte, bit.to(torch.uint8)).view(-1, K // 8))
            self.keys.append(child)
            path.append(node)
        if len(child) < len(codes):
            fail("two items have the same code: make the codes of the target modality again.")
        self.path = F.pad(torch.stack(path[:-1], 1), (0, 0, 1, 0))  # (N+1, L)
        self.leaf_item = node.argsort() + 1  # (N,)
        bits = torch.arange(256).unsqueeze(1) >> torch.arange(8) & 1  # (256, 8)
        self.unpacked = bits.log().to(key.device)  # (256, 8): 0 or -inf for every bit of a byte
    def barred(self, l, node):  # 0 for A(c_<l), -inf for all other codes. (...) -> (..., K)
        return F.embedding(self.allowed[l][node].int(), self.unpacked).flatten(-2)
    def descend(self, l, node, code):  # where a code leads: a node of level l+1. (...) -> (...)
        child = torch.searchsorted(self.keys[l + 1], self.keys[l][node] * self.K + code)  # (...)
        return child.clamp(max=len(self.keys[l + 1]) - 1)  # a code not allowed leads anywhere

def code_losses(logits, codes, items, trie, constrained=True):
    """loss_l = -[z_l(c_l) - log sum_{k in A(c_<l)} exp z_l(k)], summed over n targets -> (L,)
    The softmax may be cut to the children: what continues no real item can never be right, and
    the tree knows it already [18]. logits: (n, L, K), codes: (n, L), items: (n,)"""
    barred = [trie.barred(l, trie.path[items, l]) if constrained else 0 for l in range(trie.L)]
    return torch.stack([F.cross_entropy(z + barred[l], codes[:, l], reduction="sum")
                        for l, z in enumerate(logits.float().unbind(1))])  # (L,); z: (n, K)

# --- The model: T5 (RMSNorm first, no biases in linear layers, ReLU, unscaled attention) ---------
class RelativeBias(nn.Module):
    """Added to attention scores, a head each: b1[s - t] + b2[slot of query, slot of key]. [20]
    s and t are the places of the query's and the key's item; a slot is a (modality, level) inside
    an item. Later items get -inf [23], so that one pass trains on all prefixes of a history."""
    def __init__(self, H, query_slots, key_slots):
        super().__init__()
        self.item = nn.Parameter(torch.zeros(H, FARTHEST + 1))
        self.slot = nn.Parameter(torch.zeros(H, query_slots, key_slots))
    def forward(self, T, first=0):  # items first..T-1 ask: (H, (T - first) * slots, T * slots)
        place = torch.arange(T, device=self.item.device)  # (T,)
        distance = place[first:].unsqueeze(1) - place  # (Q, T)
        item = self.item[:, distance.clamp(0, FARTHEST)].masked_fill(distance < 0, -torch.inf)
        return (item[:, :, None, :, None] + self.slot[:, None, :, None, :]).flatten(3).flatten(1, 2)

class Attention(nn.Module):
    def __init__(self, E, H, head):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(E, H * head, bias=False) for _ in range(3))
        self.out, self.H = nn.Linear(H * head, E, bias=False), H
        self.q.weight.data /= head ** 0.5  # where others divide the scores by sqrt(head)
    def keys_values(self, x):  # (..., m, E) -> keys and values (..., H, m, head)
        return [y.unflatten(-1, (self.H, -1)).transpose(-2, -3) for y in (self.k(x), self.v(x))]
    def forward(self, x, keys, values, bias):  # x: (..., n, E), bias: to (..., H, n, m)
        queries = self.q(x).unflatten(-1, (self.H, -1)).transpose(-2, -3)  # (..., H, n, head)
        scores = queries @ keys.transpose(-1, -2)  # (..., H, n, m)
        weights = scores.add_(bias.to(scores.dtype)).softmax(-1, dtype=scores.dtype)  # the same
        return self.out((weights @ values).transpose(-2, -3).flatten(-2))  # (..., n, E)

class Layer(nn.Module):
    """Attention to itself, in the decoder also to the encoder's output, and a feed-forward layer.
    x: (B, T * M, E) in the encoder; (B, Q, l, E) in the decoder, which writes Q items at once: one
    after each item (training) or one a beam. memory, past: keys, values of history, codes before"""
    def __init__(self, size, decoder):
        super().__init__()
        E, self.dropout = size.width, nn.Dropout(size.dropout)
        self.norms = nn.ModuleList(nn.RMSNorm(E) for _ in range(3 if decoder else 2))
        self.attention = Attention(E, size.heads, size.head)
        self.cross_attention = Attention(E, size.heads, size.head) if decoder else None
        self.up = nn.Linear(E, size.inner, bias=False)
        self.down = nn.Linear(size.inner, E, bias=False)
    def forward(self, x, bias, past=None, memory=None, cross_bias=None):
        y = self.norms[0](x)
        keys_values = self.attention.keys_values(y)  # (..., H, n, head) twice
        if past:
            keys_values = [torch.cat(pair, -2) for pair in zip(past, keys_values)]
        x = x + self.dropout(self.attention(y, *keys_values, bias))
        if memory:
            y = self.norms[1](x).flatten(1, 2)  # (B, Q * l, E)
            x = x + self.dropout(self.cross_attention(y, *memory, cross_bias)).view_as(x)
        return x + self.dropout(self.down(F.relu(self.up(self.norms[-1](x))))), keys_values

class Generator(nn.Module):
    """Row (d * L + l) * K + k of the token table is code k of level l of modality d; then come a
    mask token for each modality, and the start token. codes: (N+1, D, L); known: (N+1, D), False
    where an item lacks a modality; target: the one that is written; codebooks: D of (3, K, d)."""
    def __init__(self, codes, known, target, codebooks, size):
        super().__init__()
        (_, D, L), K, E, H = codes.shape, codebooks[0].shape[1], size.width, size.heads
        tokens = codes + K * torch.arange(D * L).view(D, L)  # (N+1, D, L)
        masks = D * L * K + torch.arange(D).unsqueeze(1)  # (D, 1)
        shown = torch.where(known.unsqueeze(2), tokens, masks)  # (N+1, D, L), in histories
        for name, x in dict(shown=shown, written=tokens[:, target], masks=masks).items():
            self.register_buffer(name, x, persistent=False)
        self.start_token = D * L * K + D
        self.tokens, self.dropout = nn.Embedding(D * L * K + D + 1, E), nn.Dropout(size.dropout)
        nn.init.normal_(self.tokens.weight, std=TOKEN_SCALE)
        for d, codebook in enumerate(codebooks):  # similar codes start with similar tokens  [22]
            U, S, _ = torch.linalg.svd(codebook.flatten(0, 1), full_matrices=False)
            x = F.pad(U * S, (0, E))[:, :E]  # centroids, along their principal directions; (3K, E)
            self.tokens.weight.data[d * L * K:][:len(x)] = TOKEN_SCALE * x / x.std().clamp(1e-6)
        self.encoder_bias, self.cross_bias = (RelativeBias(H, n, D * L) for n in (D * L, L))
        self.self_bias = nn.Parameter(torch.zeros(H, L, L))
        self.encoder = nn.ModuleList(Layer(size, decoder=False) for _ in range(size.layers))
        self.decoder = nn.ModuleList(Layer(size, decoder=True) for _ in range(size.layers))
        self.encoder_norm, self.decoder_norm = nn.RMSNorm(E), nn.RMSNorm(E)
        self.output = nn.Parameter(torch.randn(L, E, K) * E ** -0.5)
    def encode(self, history, masking=0.0):  # (B, T) -> keys, values (B, H, T * M, head) a layer
        tokens, D = self.shown[history], len(self.masks)  # (B, T, D, L)
        if masking:  # hide one modality of some items, as if they lacked it: the others must do
            which = torch.rand(*history.shape, 1, device=history.device) * D / masking  # (B, T, 1)
            hidden = which.long() == torch.arange(D, device=history.device)  # (B, T, D)
            tokens = torch.where(hidden.unsqueeze(3), self.masks, tokens)  # (B, T, D, L)  [21]
        x = self.dropout(self.tokens(tokens.flatten(1)))  # (B, T * M, E)
        bias = self.encoder_bias(history.shape[1])  # (H, T * M, T * M)
        for layer in self.encoder:
            x, _ = layer(x, bias)
        x = self.dropout(self.encoder_norm(x))  # (B, T * M, E)
        return [layer.cross_attention.keys_values(x) for layer in self.decoder]
    def decode(self, tokens, memory, cross_bias, past=None):
        """Scores of the code after each token. tokens: (B, Q, l), those after `past` -> logits
        (B, Q, l, K) and the new past: keys and values of all tokens, for each layer."""
        first = past[0][0].shape[-2] if past else 0  # level that the first of these tokens predicts
        last = first + tokens.shape[2]
        later = torch.full((last, last), -torch.inf, device=tokens.device).triu(1)  # (last, last)
        bias = (self.self_bias[:, :last, :last] + later)[:, first:]  # (H, l, last)
        x, past = self.dropout(self.tokens(tokens)), past or [None] * len(memory)  # (B, Q, l, E)
        for i, layer in enumerate(self.decoder):
            x, past[i] = layer(x, bias, past[i], memory[i], cross_bias)
        x = self.dropout(self.decoder_norm(x))  # (B, Q, l, E)
        return torch.einsum("bqle,lek->bqlk", x, self.output[first:last]), past
    def forward(self, history, target, masking=0.0):
        """For all t at once: target[:, t] after history[:, :t+1]. (B, T) -> logits (B, T, L, K)"""
        written = F.pad(self.written[target, :-1], (1, 0), value=self.start_token)  # (B, T, L)
        bias = self.cross_bias(history.shape[1])  # (H, T * L, T * M)
        return self.decode(written, self.encode(history, masking), bias)[0]

@torch.no_grad()
def beam_search(model, trie, history, beam):
    """The `beam` likeliest items after each history (B, T), best first; exact with beam >= N.
    -> items, log-probabilities (B, beam); item 0 and -inf where there are fewer"""
    (B, T), K, device = history.shape, trie.K, history.device
    memory = model.encode(history)  # once a user: all beams share its keys and values
    cross_bias = model.cross_bias(T, first=T - 1)  # (H, L, T * M)
    node = torch.zeros(B, 1, dtype=torch.long, device=device)  # (B, beams); one beam at the root
    score, token, past = 0.0 * node, node + model.start_token, None  # (B, beams) both
    rows = torch.arange(B, device=device).unsqueeze(1)  # (B, 1)
    for l in range(trie.L):
        z, past = model.decode(token.unsqueeze(2), memory, cross_bias[:, l:l + 1], past)
        z = (z[:, :, 0].float() + trie.barred(l, node)).log_softmax(-1)  # (B, beams, K)  [19]
        total = (score.unsqueeze(2) + z).flatten(1)  # (B, beams * K)
        score, best = total.topk(min(beam, total.shape[1]))  # (B, beams) both, beams <= beam
        parent, code = best // K, best % K  # (B, beams)
        node = trie.descend(l, node.gather(1, parent), code)  # (B, beams)
        past = [[part[rows, parent] for part in keys_values] for keys_values in past]
        token = model.written[1, l] // K * K + code  # table rows of this level; (B, beams)
    return trie.leaf_item[node].masked_fill(score == -torch.inf, 0), score

def recommend(model, trie, data, split, users, args, device):
    """Beam search for some users: items int32 (n, beam), best first, and their scores (n, beam)"""
    model.eval()
    start, length = (part[users] for part in windows(split, data["offsets"], args.length))
    items = torch.zeros(len(users), args.beam, dtype=torch.int32)  # (n, beam)
    scores = torch.zeros(len(users), args.beam)  # (n, beam)
    torch.manual_seed(0)  # the same batches in all processes
    batches = equal_length_batches(length, 1024)
    for rows in tqdm(batches[args.rank::args.world], split, leave=False, disable=None):
        history = data["events"][start[rows, None] + torch.arange(length[rows[0]])]  # (B, T)
        with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
            best, score = beam_search(model, trie, history.long().to(device), args.beam)
        items[rows, :best.shape[1]], scores[rows, :best.shape[1]] = best.int().cpu(), score.cpu()
    return add_up(items), add_up(scores)

def main(argv=None):
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--run", default="runs/toy", help="folder of this experiment's .pt files")
    add("--seed", type=int, default=0, help="of every random choice")
    device = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")  # cuda, mps
    add("--device", default="auto", choices=sorted({"auto", "cpu", device}), help="auto: the best")
    add("--smoke", action="store_true", help="tiny sizes: is everything in place?")
    add("--name", default="mscgrec", help="of this model's files and of its row in the table")
    add("--modalities", default="image,text,collab", help="whose codes a history shows")
    add("--target", default="collab", help="the modality whose code is written")
    add("--unconstrained", action="store_true", help="train with the softmax over all K codes")
    add("--history", help="only print what --name recommends after these titles or ids, ...")
    add("--masking", type=float, default=0.2, help="share of history items with a modality hidden")
    add("--length", type=int, default=20, help="T: items of history that the model sees")
    add("--width", type=int, default=64, help="E: width of the model")
    add("--layers", type=int, default=2, help="encoder layers, and as many decoder layers")
    add("--heads", type=int, default=4, help="H: attention heads")
    add("--head", type=int, default=16, help="width of a head")
    add("--inner", type=int, default=256, help="width inside the feed-forward layers")
    add("--dropout", type=float, default=0.1, help="share of activations dropped in training")
    add("--lr", type=float, default=2e-3, help="learning rate of AdamW")
    add("--batch", type=int, default=128, help="targets a training step")
    add("--epochs", type=int, default=30, help="passes over the training events")
    add("--beam", type=int, default=20, help="prefixes kept in the search = items recommended")
    add("--max-steps", type=int, default=0, help="a trial: only so many, of one epoch")
    add("--fresh", action="store_true", help="start over: leave a stopped run's checkpoint aside")
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="auto: bf16 on GPUs")
    if parser.parse_known_args(argv)[0].smoke:
        parser.set_defaults(epochs=1, width=16, layers=1, heads=2, inner=32)
    args = parser.parse_args(argv)
    run, history = pathlib.Path(args.run), []
    if args.history is not None:  # the model as it was trained
        saved = load(run / f"generator-{args.name}.pt", "this script without --history")["options"]
        images = load(run / "images.pt", "01_data.py", mmap=True)["images"]  # (N+1, 3, S, S)
        vars(args).update(saved | {"run": args.run, "history": args.history, "device": args.device})
    modalities = args.modalities.split(",")
    if not (args.target in modalities and args.lr > 0 and 0 <= args.masking <= 1 > args.dropout >= 0
            and 0 <= args.seed < 2 ** 32 and min(args.length, args.width, args.layers, args.heads,
            args.head, args.inner, args.batch, args.epochs, args.beam, args.max_steps + 1) > 0):
        fail("--target is one of --modalities; sizes start at 1, --seed at 0, shares end below 1.")
    device = torch.device(device if args.device == "auto" else args.device)
    args.rank, args.world = join()
    args.bf16 = args.precision == "bf16" or (args.precision, device.type) == ("auto", "cuda")
    torch.manual_seed(args.seed)
    data = load(run / "data.pt", "01_data.py")
    sources = [load(run / f"{m}_codes.pt", f"the script of {m} codes") for m in modalities]
    N, U, D = len(data["item_ids"]) - 1, len(data["user_ids"]), len(modalities)
    K, L = sources[0]["codebooks"].shape[1], sources[0]["codes"].shape[1]
    if any(s["codes"].shape != (N + 1, L) or s["codebooks"].shape[1] != K for s in sources):
        fail(f"codes of {args.modalities} are not of the {N} items of data.pt: make them again.")
    codes = torch.stack([source["codes"] for source in sources], 1).long()  # (N+1, D, L)
    known = torch.stack([source["known"] for source in sources], 1)  # (N+1, D)
    target = modalities.index(args.target)
    model = Generator(codes, known, target, [s["codebooks"] for s in sources], args).to(device)
    codes = codes[:, target].to(device)  # (N+1, L)
    trie, parameters = Trie(codes, K), sum(p.numel() for p in model.parameters())
    if args.history is not None:
        model.load_state_dict(load(run / f"generator-{args.name}.pt", "this script")["weights"])
        names = [f"{title} [{key}]" for title, key in zip(data["titles"], data["item_ids"])]
        for part in args.history.split(";" if ";" in args.history else ","):
            found = [i for i, name in enumerate(names) if part.strip().lower() in name.lower()]
            if len(found) != 1:
                fail(f"--history: {len(found)} titles have '{part}': give more of it, or an [id]."
                     + "".join(f"\n  {names[i]}" for i in found[:10]))
            history += found
        history = torch.tensor([history[-args.length:]], device=device)  # (1, T)
        pairs = zip(*(x[0].tolist() for x in beam_search(model.eval(), trie, history, args.beam)))
        new = {i: f"{math.exp(s):6.1%}  {names[i]}" for i, s in pairs if i not in [0, *history[0]]}
        pen = ImageDraw.Draw(page := Image.new("RGB", (1005, 290), "white"))
        for n, i in [*enumerate(history[0, -10:].tolist()), *enumerate([*new][:10], 10)]:
            x, y = 5 + n % 10 * 100, 5 + n // 10 * 145  # above the history, below what follows
            page.paste(Image.fromarray(images[i].permute(1, 2, 0).numpy()).resize((95, 95)), (x, y))
            pen.text((x, y + 97), textwrap.fill(names[i], 16, max_lines=3, placeholder=".."), 0)
        page.save(run / "history.png")
        return print("after", *(names[i] for i in history[0]), "probably", *new.values(), sep="\n")
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=WEIGHT_DECAY, fused=True)
    parallel = model if args.world == 1 else \
        nn.parallel.DistributedDataParallel(model, forward_sync_buffers=False)
    judges = torch.randperm(U)[:JUDGES]  # (judges,)
    truth = data["events"][data["offsets"][1 + judges] - 2].unsqueeze(1)  # (judges, 1)
    print(f"{args.name}: {parameters:,} parameters; a uniform guess has loss {math.log(N):.3f}")
    checkpoint = run / f"generator-{args.name}.checkpoint"
    state = resume(checkpoint, args, model=model, optimizer=optimizer)
    losses, ndcg, began = state["losses"], state["ndcg"], time.time() - state["seconds"]
    for epoch in range(len(losses), args.epochs):
        torch.manual_seed(1000 * args.seed + epoch)  # the same batches in all processes
        start, length = windows("train", data["offsets"], args.length)  # (W,) both
        batches = equal_length_batches(length, args.batch * args.world)
        model.train()
        todo, seen = batches[:args.max_steps or None], 0
        total = torch.zeros(L, device=device)  # (L,)
        for i, batch in enumerate(tqdm(todo, f"epoch {epoch}", leave=False, disable=None)):
            T = int(length[batch[0]])
            done = (epoch + i / len(batches)) / args.epochs  # 0 to 1
            lr = args.lr * min(1, done / WARM_UP) * (1 + math.cos(math.pi * done)) / 2
            optimizer.param_groups[0]["lr"] = lr
            share = start[batch[args.rank::args.world], None]  # (B, 1), of this process
            events = data["events"][share + torch.arange(T + 1)].long().to(device)  # (B, T+1)
            items = events[:, 1:].flatten()  # (B * T,)
            with torch.autocast(device.type, torch.bfloat16, enabled=args.bf16):
                logits = parallel(events[:, :-1], events[:, 1:], args.masking * (D > 1))
            by_level = code_losses(logits.flatten(0, 1), codes[items], items, trie,
                                   not args.unconstrained)  # (L,)
            if not by_level.isfinite().all():
                fail(f"step {i}: the loss is no number, lower --lr; whole epochs: {checkpoint}")
            # Every target weighs the same, also in a batch that its length left small.
            (by_level.sum() / args.batch).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            total, seen = total + by_level.detach(), seen + len(batch) * T
        losses.append(add_up(total).cpu() / max(1, seen))
        if args.max_steps:
            hours = (time.time() - began) / 3600 * len(batches) / max(1, len(todo))
            return print(f"{len(todo)} steps; an epoch has {len(batches):,}: {hours:.3g} hours")
        top = recommend(model, trie, data, "valid", judges, args, device)[0][:, :10]  # (judges, 10)
        gain = (top == truth) / torch.log2(2.0 + torch.arange(top.shape[1]))  # (judges, 10)
        ndcg.append(gain.sum(1).mean().item())
        print(f"epoch {epoch:3d}  loss {losses[-1].sum():.3f} = sum {losses[-1].numpy().round(2)}"
              f"  validation NDCG@10 {ndcg[-1]:.4f}  {time.time() - began:.0f} s")
        if ndcg[-1] >= max(ndcg):  # [6]
            state["best"] = {name: w.cpu().clone() for name, w in model.state_dict().items()}
        state |= {"model": model.state_dict(), "optimizer": optimizer.state_dict(),
                  "seconds": time.time() - began, "options": vars(args)}
        save(state, checkpoint)
    model.load_state_dict(state["best"])
    save({"weights": state["best"], "losses": torch.stack(losses), "ndcg": torch.tensor(ndcg),
          "seconds": state["seconds"], "options": vars(args)}, run / f"generator-{args.name}.pt")
    everyone, began = torch.arange(U), time.time()  # (U,)
    test, scores = recommend(model, trie, data, "test", everyone, args, device)  # (U, beam) both
    predict, peak = time.time() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    valid, _ = recommend(model, trie, data, "valid", everyone, args, device)  # (U, beam)
    size = sum(t.nbytes for t in [*model.parameters(), *trie.keys, *trie.allowed, trie.leaf_item])
    save({"name": args.name, "seed": args.seed, "valid": valid, "test": test, "scores": scores,
          "seconds": {"train": state["seconds"], "predict": predict}, "parameters": parameters,
          "bytes": size + 2 * N * D * L, "options": vars(args), "peak_memory": peak * 1024 ** (
              sys.platform != "darwin")}, run / f"predictions-{args.name}-s{args.seed}.pt")
    args.rank or checkpoint.unlink(missing_ok=True)

if __name__ == "__main__":
    main()
