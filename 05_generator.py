"""The generator: a T5-style transformer that reads the codes of a history and writes the next item's code.

Every item of a history is M = D * L tokens: its image, text and collaborative codes, one after another. The encoder
reads them; the decoder writes the L codes of one modality of the item that the user wants next. The training
softmax runs only over codes that continue a real item (constrained sequence learning, MSCGRec, arXiv 2602.03713),
and beam search walks the same prefix tree, so each of its beams is a real item.

    python 05_generator.py                                                 # MSCGRec; TODO minutes on 2 CPU cores
    python 05_generator.py --name tiger --modalities text --target text    # TIGER-like: text codes alone
    python 05_generator.py --history "part of a title, another title"      # what would it recommend?

reads   data.pt
        image_codes.pt
        text_codes.pt
        collab_codes.pt
writes  generator-mscgrec.pt
          weights           dict                    the best epoch's parameters, by name
          losses            float32 (epochs, L)     mean training loss of each code, nats
          ndcg              float32 (epochs)        validation NDCG@10
          seconds           float                   of training
          options           dict                    the options of this run
        predictions-mscgrec-s0.pt
          name              str
          seed              int
          valid             int32 (U, top)          recommended items for the validation event, best first
          test              int32 (U, top)          the same for the test event, validation event in the history
          scores            float32 (U, top)        of `test`, log-probabilities
          seconds           dict                    train, predict: seconds for U users
          parameters        int                     trained numbers
          bytes             int                     of parameters, codes and prefix tree
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

TOKEN_SCALE = 0.3  # standard deviation of token embeddings at the start
WARM_UP = 100      # steps in which the learning rate rises to its value

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
# The prefix tree of all item codes


class Trie:
    """Which codes continue a prefix so that a real item can still come of it; tensors only, built once.

    A node of level l is a prefix of l codes; the nodes of a level are numbered in the order of their codes.
    keys[l]     int64 (nodes_l,)         the prefix packed into one number, sorted; keys[0] is the root
    allowed[l]  uint8 (nodes_l, K / 8)   A(c_<l), one bit a code
    path        int64 (N+1, L)           the node of an item's prefix, for each level 0..L-1; row 0 unused
    leaf_item   int64 (N,)               the item at each leaf
    """

    def __init__(self, codes, K):
        """codes: (N+1, L), row 0 is ignored; every row below must be different."""
        codes = codes[1:].long()  # (N, L)
        self.K, self.L = K, codes.shape[1]
        self.keys, self.allowed, path = [], [], []
        key = torch.zeros(len(codes), dtype=torch.long, device=codes.device)  # (N,)
        for l in range(self.L):
            keys, node = key.unique(return_inverse=True)  # (nodes_l,), (N,)
            key = key * K + codes[:, l]  # (N,)
            child = key.unique()  # (nodes_l+1,)
            parent, code = torch.searchsorted(keys, child // K), child % K
            bits = torch.zeros(len(keys) * K // 8, dtype=torch.uint8, device=codes.device)  # (nodes_l * K / 8,)
            bits.index_add_(0, parent * (K // 8) + code // 8, (1 << code % 8).to(torch.uint8))
            self.keys.append(keys)
            self.allowed.append(bits.view(-1, K // 8))
            path.append(node)
        self.keys.append(child)
        if len(child) != len(codes):
            fail("two items have the same code: the codes file is broken, write it again (02, 03 or 04).")
        self.leaf_item = key.argsort() + 1  # (N,)
        self.path = F.pad(torch.stack(path, 1), (0, 0, 1, 0))  # (N+1, L)

    def children(self, l, node):
        """The mask A(c_<l): node (...) -> bool (..., K)."""
        bit = torch.arange(8, device=node.device, dtype=torch.uint8)  # (8,)
        return (self.allowed[l][node].unsqueeze(-1) >> bit & 1).flatten(-2).bool()  # (..., K)

    def descend(self, l, node, code):
        """The node of level l+1 that `code` leads to; must be a child. Both (...) -> (...)."""
        child = torch.searchsorted(self.keys[l + 1], self.keys[l][node] * self.K + code)  # (...)
        return child.clamp(max=len(self.keys[l + 1]) - 1)

    def bytes(self):
        """Of the tensors that decoding needs."""
        return sum(t.nbytes for t in [*self.keys, *self.allowed, self.leaf_item])


def code_losses(logits, codes, items, trie, constrained=True):
    """loss_l = -[z_l(c_l) - log sum_{k in A(c_<l)} exp z_l(k)], mean over n targets (METHOD: constrained sequence learning).

    Codes that continue no real item get no part of the softmax: no capacity is spent on learning what the
    tree knows already. `constrained=False` is the plain softmax over all K, the ablation.
    logits: (n, L, K), codes: (n, L), items: (n,) -> (L,)."""
    losses = []
    for l in range(trie.L):
        z = logits[:, l]  # (n, K)
        if constrained:
            z = z.masked_fill(~trie.children(l, trie.path[items, l]), -torch.inf)  # (n, K)
        losses.append(F.cross_entropy(z, codes[:, l]))
    return torch.stack(losses)  # (L,)


# ---------------------------------------------------------------------------------------------------
# Model: T5's encoder and decoder (pre-RMSNorm, no biases in linear layers, ReLU, unscaled attention)


class RelativeBias(nn.Module):
    """What is added to attention scores: b_item[bucket(i - j)] + b_slot[query's slot, key's slot], a head each.

    i, j: the history items of query and key; a slot is a (modality, level) inside an item. T5's buckets are exact
    for small distances, logarithmic for large ones. A key of a later item gets -inf: an item sees itself and
    earlier items only, so one pass trains every prefix of a history."""

    def __init__(self, H, query_slots, key_slots, buckets=32, farthest=128):
        super().__init__()
        self.buckets, self.farthest = buckets, farthest
        self.item = nn.Parameter(torch.zeros(H, buckets))
        self.slot = nn.Parameter(torch.zeros(H, query_slots, key_slots))

    def forward(self, query_items, key_items):
        """Positions (Q,), (S,) -> (H, Q * query_slots, S * key_slots)."""
        distance = query_items.unsqueeze(1) - key_items  # (Q, S)
        exact = self.buckets // 2
        log = (distance.clamp(min=1) / exact).log() / math.log(self.farthest / exact)  # (Q, S)
        bucket = torch.where(distance < exact, distance, exact + (log * exact).long())  # (Q, S)
        item = self.item[:, bucket.clamp(0, self.buckets - 1)]  # (H, Q, S)
        item = item.masked_fill(distance < 0, -torch.inf)
        both = item[:, :, None, :, None] + self.slot[:, None, :, None, :]  # (H, Q, query_slots, S, key_slots)
        return both.flatten(3).flatten(1, 2)


class Attention(nn.Module):
    def __init__(self, E, H, head):
        super().__init__()
        self.H = H
        self.q, self.k, self.v = (nn.Linear(E, H * head, bias=False) for _ in range(3))
        self.out = nn.Linear(H * head, E, bias=False)
        nn.init.normal_(self.q.weight, std=(E * head) ** -0.5)  # T5: scores start at unit scale, no 1 / sqrt(d)
        for layer in (self.k, self.v):
            nn.init.normal_(layer.weight, std=E ** -0.5)
        nn.init.normal_(self.out.weight, std=(H * head) ** -0.5)

    def heads(self, x):
        return x.unflatten(-1, (self.H, -1)).transpose(-2, -3)  # (..., n, H * head) -> (..., H, n, head)

    def keys_values(self, x):
        return self.heads(self.k(x)), self.heads(self.v(x))  # (..., H, n, head) each

    def forward(self, x, keys, values, bias):
        """x: (..., n, E); keys, values: (..., H, m, head); bias broadcasts to (..., H, n, m)."""
        scores = self.heads(self.q(x)) @ keys.transpose(-1, -2) + bias  # (..., H, n, m)
        mixed = scores.softmax(-1) @ values  # (..., H, n, head)
        return self.out(mixed.transpose(-2, -3).flatten(-2))  # (..., n, E)


class FeedForward(nn.Sequential):
    def __init__(self, E, inner, dropout):
        super().__init__(nn.Linear(E, inner, bias=False), nn.ReLU(), nn.Dropout(dropout),
                         nn.Linear(inner, E, bias=False))
        nn.init.normal_(self[0].weight, std=E ** -0.5)
        nn.init.normal_(self[3].weight, std=inner ** -0.5)


class EncoderLayer(nn.Module):
    def __init__(self, E, H, head, inner, dropout):
        super().__init__()
        self.attention, self.feed_forward = Attention(E, H, head), FeedForward(E, inner, dropout)
        self.norm1, self.norm2, self.dropout = nn.RMSNorm(E), nn.RMSNorm(E), nn.Dropout(dropout)

    def forward(self, x, bias):
        """x: (B, S * M, E)."""
        y = self.norm1(x)
        x = x + self.dropout(self.attention(y, *self.attention.keys_values(y), bias))
        return x + self.dropout(self.feed_forward(self.norm2(x)))


class DecoderLayer(nn.Module):
    def __init__(self, E, H, head, inner, dropout):
        super().__init__()
        self.self_attention, self.cross_attention = Attention(E, H, head), Attention(E, H, head)
        self.feed_forward, self.dropout = FeedForward(E, inner, dropout), nn.Dropout(dropout)
        self.norm1, self.norm2, self.norm3 = nn.RMSNorm(E), nn.RMSNorm(E), nn.RMSNorm(E)

    def forward(self, x, past, self_bias, memory, cross_bias):
        """x: (B, Q, l, E), Q codes being written side by side for one user (training: one for each position of the
        history; decoding: one for each beam). They do not see each other, but share the keys and values of the
        encoder, memory: (B, H, S * M, head) each. past: keys and values of the codes written before, or None."""
        B, Q, l, E = x.shape
        y = self.norm1(x)
        keys, values = self.self_attention.keys_values(y)  # (B, Q, H, l, head)
        if past is not None:
            keys, values = torch.cat([past[0], keys], 3), torch.cat([past[1], values], 3)
        x = x + self.dropout(self.self_attention(y, keys, values, self_bias))  # (B, Q, l, E)
        y = self.norm2(x).view(B, Q * l, E)
        x = x + self.dropout(self.cross_attention(y, *memory, cross_bias)).view(B, Q, l, E)
        return x + self.dropout(self.feed_forward(self.norm3(x))), (keys, values)


class Generator(nn.Module):
    """Reads the codes of a history in all modalities, writes the next item's code in the target modality.

    item_tokens: (N+1, D, L), the row of the embedding table for each code of an item. Row (d * L + l) * K + k stands
    for code k of level l of modality d; after these come one mask token a modality, and the start token.
    codes: (N+1, L), of the target modality."""

    def __init__(self, item_tokens, codes, K, target, E, H, head, inner, layers, dropout, centroids=None):
        super().__init__()
        (_, D, self.L), self.K, self.target = item_tokens.shape, K, target
        self.register_buffer("item_tokens", item_tokens, persistent=False)
        written = (target * self.L + torch.arange(self.L, device=codes.device)) * K + codes  # (N+1, L)
        self.register_buffer("written", written, persistent=False)
        self.mask_token, self.start_token = D * self.L * K, D * self.L * K + D
        self.tokens = nn.Embedding(self.start_token + 1, E)
        self.encoder_bias = RelativeBias(H, D * self.L, D * self.L)
        self.cross_bias = RelativeBias(H, self.L, D * self.L)
        self.self_bias = nn.Parameter(torch.zeros(H, self.L, self.L))
        self.encoder = nn.ModuleList(EncoderLayer(E, H, head, inner, dropout) for _ in range(layers))
        self.decoder = nn.ModuleList(DecoderLayer(E, H, head, inner, dropout) for _ in range(layers))
        self.encoder_norm, self.decoder_norm, self.dropout = nn.RMSNorm(E), nn.RMSNorm(E), nn.Dropout(dropout)
        nn.init.normal_(self.tokens.weight, std=TOKEN_SCALE)
        self.output = nn.Parameter(torch.randn(self.L, E, K) * E ** -0.5)
        for d, codebooks in enumerate(centroids or []):
            start = d * self.L * K
            self.tokens.weight.data[start:start + codebooks.shape[0] * K] = project(codebooks, E).flatten(0, 1)

    def encode(self, history, masking=0.0):
        """history: (B, S) item ids -> what each decoder layer attends to, keys and values (B, H, S * M, head)."""
        tokens = self.item_tokens[history]  # (B, S, D, L)
        B, S, D, _ = tokens.shape
        if masking:  # one modality of some items is hidden: the others must do
            hidden = torch.rand(B, S, 1, 1, device=tokens.device) < masking  # (B, S, 1, 1)
            which = torch.randint(D, (B, S, 1, 1), device=tokens.device)  # (B, S, 1, 1)
            modality = torch.arange(D, device=tokens.device).view(D, 1)  # (D, 1)
            tokens = torch.where(hidden & (modality == which), self.mask_token + modality, tokens)  # (B, S, D, L)
        x = self.dropout(self.tokens(tokens.flatten(1)))  # (B, S * M, E)
        place = torch.arange(S, device=tokens.device)  # (S,)
        bias = self.encoder_bias(place, place)  # (H, S * M, S * M)
        for layer in self.encoder:
            x = layer(x, bias)
        x = self.dropout(self.encoder_norm(x))
        return [layer.cross_attention.keys_values(x) for layer in self.decoder]

    def decode(self, tokens, memory, cross_bias, past=None):
        """The next codes' scores. tokens: (B, Q, l), written after `past` -> logits (B, Q, l, K), new past."""
        before = past[0][0].shape[3] if past else 0  # codes written before
        l = tokens.shape[2]
        x = self.dropout(self.tokens(tokens))  # (B, Q, l, E)
        later = torch.ones(l, before + l, dtype=torch.bool, device=x.device).triu(before + 1)  # (l, before + l)
        bias = self.self_bias[:, before:before + l, :before + l].masked_fill(later, -torch.inf)
        present = []
        for i, layer in enumerate(self.decoder):
            x, keys_values = layer(x, past[i] if past else None, bias, memory[i], cross_bias)
            present.append(keys_values)
        x = self.dropout(self.decoder_norm(x))
        return torch.einsum("bqle,lek->bqlk", x, self.output[before:before + l]), present

    def forward(self, history, target, masking=0.0):
        """Scores of the codes of target[:, t] after history[:, :t+1], for all t in one pass.

        history, target: (B, S) -> logits (B, S, L, K)."""
        S, L = history.shape[1], self.L
        start = torch.full_like(target, self.start_token).unsqueeze(-1)  # (B, S, 1)
        written = torch.cat([start, self.written[target, :-1]], 2)  # (B, S, L)
        place = torch.arange(S, device=history.device)  # (S,)
        return self.decode(written, self.encode(history, masking), self.cross_bias(place, place))[0]


def project(codebooks, E):
    """Centroids in E dimensions, as the first look of their tokens: codes of similar items begin similar.

    The directions are the principal ones of the codebooks. (levels, K, d) -> (levels, K, E)."""
    flat = codebooks.flatten(0, 1)  # (levels * K, d)
    directions = torch.linalg.svd(flat, full_matrices=False)[2][:E]  # (min(d, E), d)
    flat = F.pad(flat @ directions.T, (0, E - len(directions)))  # (levels * K, E)
    flat = flat @ torch.linalg.qr(torch.randn(E, E))[0]  # spread over all E; (levels * K, E)
    return (flat * TOKEN_SCALE / flat.std().clamp(min=1e-6)).view(*codebooks.shape[:2], E)


@torch.no_grad()
def beam_search(model, trie, history, beam, constrained=True):
    """The `beam` likeliest items after each history, best first; every one is a real item, by construction.

    The encoder runs once a user; its keys and values serve all beams. With beam >= N the ranking is exact.
    history: (B, S) -> items (B, beam), log-probabilities (B, beam); item 0 and -inf where N < beam."""
    B, S = history.shape
    K, device = trie.K, history.device
    memory = model.encode(history)
    place = torch.arange(S, device=device)  # (S,)
    cross_bias = model.cross_bias(place[-1:], place)  # (H, L, S * M)
    score = torch.zeros(B, 1, device=device)  # (B, beams)
    node = torch.zeros(B, 1, dtype=torch.long, device=device)  # (B, beams)
    token, past = torch.full_like(node, model.start_token), None
    for l in range(trie.L):
        logits, past = model.decode(token.unsqueeze(2), memory, cross_bias[:, l:l + 1], past)
        allowed, z = trie.children(l, node), logits[:, :, 0].float()  # (B, beams, K)
        if constrained:
            z = z.masked_fill(~allowed, -torch.inf).log_softmax(-1)
        else:
            z = z.log_softmax(-1).masked_fill(~allowed, -torch.inf)
        total = (score.unsqueeze(2) + z).flatten(1)  # (B, beams * K)
        score, best = total.topk(min(beam, total.shape[1]))  # (B, beams)
        parent, code = best // K, best % K  # (B, beams)
        node = trie.descend(l, node.gather(1, parent), code)
        token = (model.target * trie.L + l) * K + code  # (B, beams)
        rows = torch.arange(B, device=device).unsqueeze(1)  # (B, 1)
        past = [(keys[rows, parent], values[rows, parent]) for keys, values in past]
    return trie.leaf_item[node].masked_fill(score == -torch.inf, 0), score


@torch.no_grad()
def recommend(model, trie, data, split, users, args, device):
    """Beam search for the chosen users: items int32 (n, top), best first, and their log-probabilities (n, top)."""
    model.eval()
    start, length, _ = (part[users] for part in histories(data["offsets"], split, args.length))
    items = torch.zeros(len(users), args.top, dtype=torch.int32)  # (n, top)
    scores = torch.full((len(users), args.top), -torch.inf)  # (n, top)
    for batch in tqdm(equal_length_batches(length, args.decode_batch), f"beam search, {split}", leave=False):
        history = take(data["events"], start[batch], int(length[batch[0]])).to(device)  # (B, S)
        best, score = beam_search(model, trie, history, args.beam, not args.unconstrained)
        n = min(args.top, best.shape[1])
        items[batch, :n], scores[batch, :n] = best[:, :n].int().cpu(), score[:, :n].cpu()
    return items, scores


# ---------------------------------------------------------------------------------------------------


def find_items(words, data):
    """Item numbers for "title or id, ...": an id, a title, or a part that only one title has."""
    items, titles = [], [title.lower() for title in data["titles"]]
    for word in filter(None, (part.strip().lower() for part in words.split(","))):
        same = [i for i, title in enumerate(titles) if i and word in (title, data["item_ids"][i].lower())]
        found = same or [i for i, title in enumerate(titles) if i and word in title]
        if len(found) != 1 and not same:
            some = "; ".join(f"{data['item_ids'][i]}: {data['titles'][i]}" for i in found[:10])
            fail(f"--history: {len(found)} titles contain '{word}'" + (f", choose one: {some}" if some else "."))
        items.append(found[0])
    return items or fail("--history needs at least one title or item id.")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[1],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--run", default="runs/toy", help="folder of this experiment's .pt files")
    add("--seed", type=int, default=0, help="of every random choice")
    add("--device", default="auto", help="cuda, mps, cpu, or auto: the best there is")
    add("--smoke", action="store_true", help="tiny sizes: is everything in place?")
    add("--name", default="mscgrec", help="name of this model's files and of its row in the table")
    add("--modalities", default="image,text,collab", help="whose codes the history shows, in this order")
    add("--target", default="collab", help="the modality whose code is written")
    add("--unconstrained", action="store_true", help="train with the softmax over all K codes (ablation)")
    add("--history", help="train nothing: print what --name recommends after these titles or ids, a comma between")
    add("--masking", type=float, default=0.2, help="probability that a history item hides one modality in training")
    add("--length", type=int, default=20, help="T: items of history that the model sees")
    add("--width", type=int, default=64, help="E: width of the model")
    add("--layers", type=int, default=2, help="encoder layers, and decoder layers")
    add("--heads", type=int, default=4, help="H: attention heads")
    add("--head-width", type=int, default=16, help="width of one head")
    add("--inner", type=int, default=256, help="width of the feed-forward layers")
    add("--dropout", type=float, default=0.1, help="share of activations dropped in training")
    add("--lr", type=float, default=2e-3, help="learning rate of AdamW")
    add("--weight-decay", type=float, default=0.01, help="of AdamW")
    add("--batch", type=int, default=512, help="targets a training step")
    add("--epochs", type=int, default=60, help="at the most")
    add("--patience", type=int, default=5, help="epochs without a better validation NDCG@10 before it stops")
    add("--valid-users", type=int, default=5000, help="users whose validation event decides when to stop")
    add("--beam", type=int, default=20, help="prefixes kept at each step of the search")
    add("--top", type=int, default=20, help="items recommended to a user")
    add("--decode-batch", type=int, default=4096, help="history items decoded at once")
    if parser.parse_known_args(argv)[0].smoke:
        parser.set_defaults(epochs=1, width=16, layers=1, heads=2, inner=32)
    args = parser.parse_args(argv)
    modalities = args.modalities.split(",")
    if args.target not in modalities:
        fail(f"--target {args.target} is not among --modalities {args.modalities}: add it there or choose another.")

    run, device = pathlib.Path(args.run), pick_device(args.device)
    torch.manual_seed(args.seed)
    rng = torch.Generator().manual_seed(args.seed)
    data = load(run / "data.pt", "01_data.py")
    makers = {"image": "03_dino_quantizer.py", "text": "04_text_codes.py", "collab": "02_sasrec.py"}
    sources = [load(run / f"{m}_codes.pt", makers.get(m, "the script that makes it")) for m in modalities]
    N, U, D, L = len(data["item_ids"]) - 1, len(data["user_ids"]), len(sources), sources[0]["codes"].shape[1]
    K = max(source["codebooks"].shape[1] for source in sources)
    target = modalities.index(args.target)
    for m, source in zip(modalities, sources):
        if source["codes"].shape != (N + 1, L):
            fail(f"{run / f'{m}_codes.pt'} has {len(source['codes']) - 1} items, data.pt has {N}: run {makers[m]} again.")

    # An item's tokens: table row (d * L + l) * K + code, or modality d's mask token where it has none.
    tokens = torch.empty(N + 1, D, L, dtype=torch.long)  # (N+1, D, L)
    for d, source in enumerate(sources):
        tokens[:, d] = (d * L + torch.arange(L)) * K + source["codes"].long()  # (N+1, L)
        tokens[~source["known"], d] = D * L * K + d
    codes = sources[target]["codes"].long().to(device)  # (N+1, L)
    trie = Trie(codes, K)
    model = Generator(tokens, codes, K, target, args.width, args.heads, args.head_width, args.inner, args.layers,
                      args.dropout, [source["codebooks"] for source in sources]).to(device)
    parameters = sum(p.numel() for p in model.parameters())

    if args.history is not None:
        saved = load(run / f"generator-{args.name}.pt", f"05_generator.py --name {args.name}")
        try:
            model.load_state_dict(saved["weights"])
        except RuntimeError:
            fail(f"generator-{args.name}.pt was made with other options: pass the same ones ({saved['options']}).")
        items = find_items(args.history, data)[-args.length:]
        best, score = beam_search(model.eval(), trie, torch.tensor([items], device=device), args.beam)
        print("after  " + "\n       ".join(data["titles"][i] for i in items))
        for item, s in zip(best[0].tolist()[:10], score[0].exp().tolist()):
            print(f"{100 * s:5.1f} %  {data['titles'][item]}  [{data['item_ids'][item]}]")
        return

    # Training.
    decay = [p for p in model.parameters() if p.ndim > 1]
    rest = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW([{"params": decay}, {"params": rest, "weight_decay": 0.0}],
                                  lr=args.lr, weight_decay=args.weight_decay)
    judges = torch.randperm(U, generator=rng)[:args.valid_users]  # (judges,)
    truth = {split: data["events"][histories(data["offsets"], split, args.length)[2]] for split in ("valid", "test")}
    print(f"{args.name}: {N} items as {D} x {L} codes of {K}, target {args.target}, {parameters:,} parameters, prefix "
          f"tree of {sum(map(len, trie.keys)):,} nodes; a uniform guess among real items has loss {math.log(N):.3f}")
    losses, ndcg, best, began, step = [], [], None, time.time(), 0
    for epoch in range(args.epochs):
        model.train()
        start, length = training_windows(data["offsets"], args.length, rng)
        total = torch.zeros(L)
        for batch in tqdm(equal_length_batches(length, args.batch, rng), f"epoch {epoch}", leave=False):
            events = take(data["events"], start[batch], int(length[batch[0]]) + 1).to(device)  # (B, S+1)
            logits = model(events[:, :-1], events[:, 1:], args.masking if D > 1 else 0.0)  # (B, S, L, K)
            items = events[:, 1:].flatten()  # (B * S,)
            by_level = code_losses(logits.flatten(0, 1), codes[items], items, trie, not args.unconstrained)  # (L,)
            # Every target weighs the same, also in a batch that its length left small.
            (by_level.sum() * min(1, len(items) / args.batch)).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            step += 1
            for group in optimizer.param_groups:
                group["lr"] = args.lr * min(1, step / WARM_UP)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            total += by_level.detach().cpu() * len(items)
        losses.append(total / length.sum())
        recommended = recommend(model, trie, data, "valid", judges, args, device)[0]
        recall, score = recall_ndcg(recommended, truth["valid"][judges])
        ndcg.append(score)
        print(f"epoch {epoch:3d}  loss {losses[-1].sum():.3f} = " + " + ".join(f"{x:.2f}" for x in losses[-1]) +
              f"  validation Recall@10 {recall:.4f}  NDCG@10 {score:.4f}  ({time.time() - began:.0f} s)", flush=True)
        if score >= max(ndcg):
            best = {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}
        if epoch - ndcg.index(max(ndcg)) >= args.patience:
            break
    model.load_state_dict(best)
    seconds = time.time() - began
    save({"weights": best, "losses": torch.stack(losses), "ndcg": torch.tensor(ndcg), "seconds": seconds,
          "options": vars(args)}, run / f"generator-{args.name}.pt")

    # Predictions: all that 06 knows of this model.
    everyone, began = torch.arange(U), time.time()
    valid = recommend(model, trie, data, "valid", everyone, args, device)[0]
    test, scores = recommend(model, trie, data, "test", everyone, args, device)
    predict = (time.time() - began) / 2
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    save({"name": args.name, "seed": args.seed, "valid": valid, "test": test, "scores": scores,
          "seconds": {"train": seconds, "predict": predict}, "parameters": parameters,
          "bytes": 4 * parameters + 2 * N * D * L + trie.bytes(), "peak_memory": peak, "options": vars(args)},
         run / f"predictions-{args.name}-s{args.seed}.pt")
    print(f"{args.name}  Recall@10, NDCG@10: validation {recall_ndcg(valid, truth['valid'])}")
    print(f"{seconds:.0f} s of training, {1000 * predict / U:.2f} s per 1,000 users, peak memory {peak / 2**30:.1f} GiB")


if __name__ == "__main__":
    main()
