"""The generator: a T5-style transformer reads the codes of a history and writes the next item's.

An item of the history is M = D * L tokens: its image, text and collaborative codes. An encoder
reads them, and a decoder writes the L codes c_1 .. c_L of the next item in one of the modalities,
one after another. With z_l its scores of the codes of level l, code c_l competes only with A(c_<l):
the codes that lead from those before it, c_<l, on to some real item (constrained sequence
learning; MSCGRec, arXiv 2602.03713), in training

    loss = - sum_l [ z_l(c_l) - log sum_{k in A(c_<l)} exp z_l(k) ]

and in beam search, which finds the likeliest items. Unlike T5: an item sees no later one,
cross-attention has biases too, distances have no buckets; the output is not tied to the token
embeddings, attention weights and the inside of the feed-forward layers have no dropout.

    python 05_generator.py                                               # MSCGRec
    python 05_generator.py --name lookahead --lookahead                  # ours: see "Looking ahead"
    python 05_generator.py --name tiger --modalities text --target text  # TIGER-like: text alone
    python 05_generator.py --history "part of a title; another title"    # and then? history.png
    torchrun --nproc_per_node=2 -- 05_generator.py                       # several GPUs

Numbers in brackets, as [18], are the details that tests/README.md lists.

letters  B users in a batch, T items of history, D modalities that a history shows,
         L codes of an item in one modality, K values of a code, M tokens of an item of history
         (D * L; with --lookahead D), N items, U users, W windows cut from histories,
         E width of the model, H heads, Q items written at once for a user,
         d width of a vector that is cut into codes, X columns of the table of all vectors,
         l level of a code, k code,
         S side of a picture, C items under a node at the most, R neighbours kept of an item
reads   data.pt, image_codes.pt, text_codes.pt, collab_codes.pt
        with --history also images.pt, generator-mscgrec.pt
writes  generator-mscgrec.pt
          weights      dict                 the best epoch's parameters, by name
          losses       float32 (epochs, L)  mean training loss of each code, nats
          ndcg         float32 (epochs)     validation NDCG@10
          seconds      float                of training and validation
          options      dict                 the options of this run
        predictions-mscgrec-s0.pt           as 06_eval.py describes, with a `trace`
        history.png                         only with --history

On the toy shop: 4.2 minutes, 0.5 GiB (2 cores of an AMD EPYC).
"""
import argparse
import atexit
import contextlib
import hashlib
import math
import os
import sys
import textwrap
import time
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image, ImageDraw
from tqdm import tqdm

try:
    import resource
except ImportError:  # Windows
    resource = None

TOKEN_SCALE = 0.3        # standard deviation of the token embeddings at the start
FARTHEST = 31            # items; all that lie so far back or farther share one bias
WARM_UP = 0.04           # share of the training in which the learning rate rises to --lr
WEIGHT_DECAY = 0.01      # of AdamW
LOOK_SCALE = 0.25        # --lookahead: W starts as this times the identity
DRAWN_FROM = 20_000      # in shops of more items a step of training draws some of them,
DRAWN = 8                # so many for each first code
NEAR = 5                 # counts are of pairs up to 5 places apart; the last 5 items ask for them
CLIP = 1.0               # a gradient that is longer is shortened to this
VALIDATION_USERS = 2000  # at the most; their validation events decide which epoch is the best
RANKED_EVENTS = 1024     # of histories that are searched at once, about
TRACED_USERS = 1000      # at the most; 06 draws what the search for one of them held
TRACED_BEAMS = 5         # of each level: its likeliest prefixes


# --- Data: pieces of histories, cut from the flat array of events (the same text in 02 and 05) ---
# User u's events are events[offsets[u]:offsets[u+1]], in order of time. The last one is for the
# test, the last but one for validation, and a model reads at most T events at once.


def held_out_windows(split, offsets, T):
    """The history before each user's held-out event: events[start:start+length], at most T long.

    split: "valid" or "test", offsets: (U+1,) -> start, length: (U,) both
    """
    back = {"test": 1, "valid": 2}[split]
    target = offsets[1:] - back                                     # (U,) the held-out event
    start = torch.maximum(offsets[:-1], target - T)                 # (U,)
    return start, target - start


def training_windows(offsets, T):
    """Cuts the training events into windows. A model reads events[start:start+length]; the target
    of each is the event after it. Every training event but a user's first is a target once.

    offsets: (U+1,) -> start, length: (W,) both, 1 <= length <= T
    """
    # The last two events are held out, and the first one has nothing before it.
    targets = offsets.diff() - 3                                    # (U,) at least 0

    # Longer histories are cut every T events. A phase, drawn each epoch, moves the cuts: else
    # the same events would stand first in their window each time, and see little before them.
    # Twelve events, so nine targets (1 to 9), with T = 4 and phase 1:
    #   events   0 1 2 3 4 5 6 7 8 9 v t
    #   read     0 1 2|3 4 5 6|7 8            three windows
    #   targets    1 2 3|4 5 6 7|8 9
    phase = torch.randint(T, targets.shape) * (targets > T)         # (U,)
    windows = (targets + phase + T - 1) // T                        # (U,) how many, rounded up

    # Number the windows of each user from 0: a window's place among all of them, minus the place
    # where those of its user begin. Two users with one and three windows:
    #   place   0 1 2 3
    #   user    0 1 1 1
    #   first   0 1 1 1
    #   number  0 0 1 2
    user = torch.arange(len(windows)).repeat_interleave(windows)    # (W,)
    first = windows.cumsum(0) - windows                             # (U,)
    number = torch.arange(len(user)) - first[user]                  # (W,)

    begin = (number * T - phase[user]).clamp(min=0)                 # (W,)
    end = torch.minimum((number + 1) * T - phase[user], targets[user])  # (W,)
    return offsets[user] + begin, end - begin


def equal_length_batches(lengths, batch_events):
    """Batches of windows of one length each, in random order: nothing is padded.

    lengths: (W,), batch_events: events in a batch, at the most (but at least one window)
    -> list of index tensors (B,)
    """
    # Shuffle, then sort by length; a stable sort leaves windows of one length in random order.
    order = torch.randperm(len(lengths))                            # (W,)
    order = order[lengths[order].argsort(stable=True)]              # (W,)

    batches = []
    _, size = lengths[order].unique_consecutive(return_counts=True)  # (groups,)
    for group in order.split(size.tolist()):
        length = int(lengths[group[0]])
        batches += group.split(max(1, batch_events // length))            # (B,) each
    return [batches[i] for i in torch.randperm(len(batches))]


def events_at(data, start, T, args):
    """T events in a row, from each of B places. start: (B,), the first of them -> items (B, T)"""
    place = torch.arange(T)                                         # (T,)
    events = data["events"][start.unsqueeze(1) + place]             # (B, T)
    # The processor does not wait for a CUDA GPU: it goes on to plan its next work.
    return events.long().to(args.device, non_blocking=args.device == "cuda")  # (B, T)


# --- The prefix tree of all item codes -----------------------------------------------------------
# Most sequences of codes belong to no item. The tree (a trie) knows which ones do.
#
#         root            Three items with the codes (0, 2), (0, 5) and (7, 2), so L = 2.
#        /    \           Level 0 has one node, the root: A() = {0, 7}.
#       0      7          Level 1 has two nodes: A(0) = {2, 5} and A(7) = {2}.
#      / \      \         Level 2 has a node for each item: the leaves.
#     2   5      2
#
# The nodes of a level are numbered 0, 1, 2, .. from left to right. So every question (which codes
# may follow? where does a code lead?) is one look-up in a table, for all beams of a batch at once.


class Trie:
    """Which codes continue a prefix so that a real item can come of it; built once from all codes.

    codes: int (N+1, L) of the modality that is written, row 0 unused; K: values of a code
    In code l counts from 0: codes[:, l] is c_(l+1), which leads from level l to level l + 1.

    edges[l]    int64 (nodes of level l+1,)       what leads from level l to level l+1, see below
    allowed[l]  uint8 (nodes of level l, K / 8)   A(the codes that lead there), a bit a code: pack
    path        int64 (N+1, L)                    the node of an item's first l codes, l = 0..L-1
    leaf_item   int64 (N,)                        the item of each leaf
    """

    def __init__(self, codes, K, device="cpu"):
        codes = codes.cpu().long()                                  # (N+1, L)
        N = len(codes) - 1
        self.K = K
        self.L = codes.shape[1]
        self.codes = codes.to(device)                               # (N+1, L)
        self.edges = []
        self.allowed = []
        path = torch.zeros_like(codes)                              # (N+1, L)

        # All items walk down from the root together, a level at a time.
        node = torch.zeros(N, dtype=torch.long)                     # (N,) where each item stands
        nodes = 1  # of this level
        for l in range(self.L):
            path[1:, l] = node

            # Code k leads from node n along the edge n * K + k, whose last digit in base K is k. In
            # the tree above, with K = 10, level 0 has the edges 0 and 7, and level 1, whose nodes
            # are 0 and 1, has the edges 02, 05 and 12. Sorted, edge i leads to node i.
            edge = node * K + codes[1:, l]                          # (N,)
            edges, node = edge.unique(return_inverse=True)          # (nodes below,), (N,)
            self.edges.append(edges.to(device))

            # A(c_<l) as a table of yes and no: which codes may follow each node.
            allowed = torch.zeros(nodes, K, dtype=torch.bool)       # (nodes, K)
            allowed[edges // K, edges % K] = True
            self.allowed.append(pack(allowed).to(device))           # (nodes, K / 8)
            nodes = len(edges)

        if nodes < N:
            fail("two items have the same code: make the codes of the target modality again.")
        leaf_item = torch.empty(N, dtype=torch.long)                # (N,)
        leaf_item[node] = torch.arange(1, N + 1)
        self.leaf_item = leaf_item.to(device)                       # (N,)
        self.path = path.to(device)                                 # (N+1, L)
        self.log_bits = log_bits().to(device)                       # (256, 8)

    def log_allowed(self, l, node):
        """What is added to the scores of level l, so that only the children of a node compete.

        log 1 = 0 changes nothing, log 0 = -inf makes a probability of 0. With K = 4, A = {0, 2}:
            allowed          1     0     1     0
            log_allowed      0  -inf     0  -inf
        node: (...) -> (..., K)
        """
        packed = self.allowed[l][node].int()                        # (..., K / 8)
        # `embedding` looks up rows: a byte is the number of its row in log_bits.
        bits = F.embedding(packed, self.log_bits)                   # (..., K / 8, 8)
        return bits.flatten(-2)[..., :self.K]                       # (..., K)

    def descend(self, l, node, code):
        """Where a code leads from a node of level l. (...), (...) -> nodes of level l+1 (...)"""
        edge = node * self.K + code                                 # (...)
        child = torch.searchsorted(self.edges[l], edge)             # (...)
        # A code that is not allowed leads anywhere: its beam has the probability 0 already.
        return child.clamp(max=len(self.edges[l]) - 1)              # (...)

    def prefix(self, l, node):
        """The l codes that lead to a node of level l, from the root on. (...) -> (..., l)"""
        codes = []
        for above in reversed(range(l)):
            edge = self.edges[above][node]                          # (...)
            codes.append(edge % self.K)
            node = edge // self.K                                   # (...)
        return torch.stack(codes[::-1], -1)                         # (..., l)


# Why bits: torch keeps a yes or no in a byte. A million items with K = 256 have about as many nodes
# above the leaves, so 256 MB, looked up at random. With eight yes or no in a byte it is 32 MB.


def pack(allowed):
    """Eight yes or no in a byte, the first one in its lowest bit. bool (n, K) -> uint8 (n, K/8)"""
    packed = np.packbits(allowed.numpy(), axis=1, bitorder="little")
    return torch.from_numpy(packed)                                 # (n, K / 8), rounded up


def log_bits():
    """The logarithms (0, -inf) of the eight bits of each byte, the lowest first. -> (256, 8)"""
    byte = np.arange(256, dtype=np.uint8)[:, None]                  # (256, 1)
    bits = np.unpackbits(byte, axis=1, bitorder="little")           # (256, 8)
    return torch.from_numpy(bits).log()                             # (256, 8)


# --- The loss: constrained sequence learning -----------------------------------------------------
# A code that continues no real item can never be right, and the tree knows it already. The softmax
# is cut to the children, so that the model need not learn which codes exist.


def code_losses(logits, items, trie, constrained=True):
    """loss_l = - [ z_l(c_l) - log sum_{k in A(c_<l)} exp z_l(k) ], summed over the targets.  [18]

    logits: z, (n, L, K), items: the targets (n,), constrained: False: over all K codes -> (L,)
    """
    losses = []
    for l in range(trie.L):
        z = logits[:, l].float()                                    # (n, K)
        if constrained:
            node = trie.path[items, l]                              # (n,) the prefix c_<l
            z = z + trie.log_allowed(l, node)                       # (n, K)
        code = trie.codes[items, l]                                 # (n,)
        losses.append(F.cross_entropy(z, code, reduction="sum"))    # ()
    return torch.stack(losses)                                      # (L,)


# --- The model: T5 (Raffel et al., JMLR 2020) ----------------------------------------------------
# RMSNorm before each part, no biases in linear layers, ReLU, positions as biases of the attention.


class RelativeBias(nn.Module):
    """b1[s - t] + b2[i, j], added to the score of a query for a key, a table for each head. [20]

    s is the query's place in the history, t the key's; of the decoder, a query that writes the item
    after place s counts as standing at s. i and j are their slots: which modality and level, of the
    D * L inside an item (the decoder's queries have L slots). A query sees no later item: there the
    bias is -inf. So one pass trains on all prefixes of a history.  [23]
    """

    def __init__(self, H, query_slots, key_slots):
        super().__init__()
        self.item = nn.Parameter(torch.zeros(H, FARTHEST + 1))      # b1
        self.slot = nn.Parameter(torch.zeros(H, query_slots, key_slots))  # b2

    def forward(self, T, first=0):
        """The biases where the places first .. T-1 ask, Q of them, and all T answer.

        In beam search only the last place asks. -> (H, Q * query slots, T * key slots)
        """
        place = torch.arange(T, device=self.item.device)            # (T,) t
        asking = place[first:].unsqueeze(1)                         # (Q, 1) s
        distance = asking - place                                   # (Q, T) s - t
        item = self.item[:, distance.clamp(0, FARTHEST)]            # (H, Q, T)
        item = item.masked_fill(distance < 0, -torch.inf)           # (H, Q, T)

        # One axis for each: head, place and slot of the query, place and slot of the key.
        item = item[:, :, None, :, None]                            # (H, Q, 1, T, 1)
        slot = self.slot[:, None, :, None, :]                       # (H, 1, slots, 1, slots)
        bias = item + slot                                          # (H, Q, slots, T, slots)
        return bias.flatten(3).flatten(1, 2)                        # (H, Q * slots, T * slots)


class Attention(nn.Module):
    """softmax(q k^T + bias) v in each of H heads: n tokens ask, m tokens answer."""

    def __init__(self, E, H, head):
        super().__init__()
        self.H = H
        self.query = nn.Linear(E, H * head, bias=False)
        self.key = nn.Linear(E, H * head, bias=False)
        self.value = nn.Linear(E, H * head, bias=False)
        self.out = nn.Linear(H * head, E, bias=False)
        # Others divide the scores by sqrt(head). T5 starts with queries that much smaller.
        self.query.weight.data /= head ** 0.5

    def split(self, x):
        """(..., n, H * head) -> (..., H, n, head)"""
        return x.unflatten(-1, (self.H, -1)).transpose(-2, -3)

    def keys_values(self, x):
        """x: (..., m, E) -> keys, values, both (..., H, m, head)"""
        keys = self.split(self.key(x))                              # (..., H, m, head)
        values = self.split(self.value(x))                          # (..., H, m, head)
        return keys, values

    def forward(self, x, keys, values, bias):
        """x: (..., n, E), bias: as (..., H, n, m), or broadcast to it -> (..., n, E)"""
        queries = self.split(self.query(x))                         # (..., H, n, head)
        attend = fused_attention if x.is_cuda else attention
        mixed = attend(queries, keys, values, bias)                 # (..., H, n, head)
        return self.out(mixed.transpose(-2, -3).flatten(-2))        # (..., n, E)


def attention(queries, keys, values, bias):
    """By hand, to show where the bias comes in.

    queries: (..., H, n, head), keys, values: (..., H, m, head) -> (..., H, n, head)
    """
    scores = queries @ keys.transpose(-1, -2)                       # (..., H, n, m)
    # The largest tensors of all: no copy for the sum, no float32 where the rest is bfloat16.
    scores = scores.add_(bias.to(scores.dtype))                     # (..., H, n, m)
    weights = scores.softmax(-1, dtype=scores.dtype)                # (..., H, n, m)
    return weights @ values                                         # (..., H, n, head)


def fused_attention(queries, keys, values, bias):
    """The same by a kernel of torch's, as in 02. On a GPU its way forward never writes the scores,
    n by m, to memory. With a bias that learns torch has none for CPUs: this is slower there.
    """
    bias = bias.to(queries.dtype)                                   # (..., H, n, m)
    return F.scaled_dot_product_attention(queries, keys, values, attn_mask=bias, scale=1.0)


class FeedForward(nn.Module):
    """max(0, x W_up) W_down, for each token alone."""

    def __init__(self, E, inner):
        super().__init__()
        self.up = nn.Linear(E, inner, bias=False)
        self.down = nn.Linear(inner, E, bias=False)

    def forward(self, x):
        return self.down(F.relu(self.up(x)))                        # (..., E)


class EncoderLayer(nn.Module):
    """The tokens of the history look at each other, then each is worked on alone."""

    def __init__(self, size):
        super().__init__()
        E = size.width
        self.dropout = nn.Dropout(size.dropout)
        self.attention_norm = nn.RMSNorm(E)
        self.feed_forward_norm = nn.RMSNorm(E)
        self.attention = Attention(E, size.heads, size.head)
        self.feed_forward = FeedForward(E, size.inner)

    def forward(self, x, bias):
        """x: (B, T * M, E), bias: (H, T * M, T * M) -> (B, T * M, E)"""
        y = self.attention_norm(x)                                  # (B, T * M, E)
        keys, values = self.attention.keys_values(y)                # (B, H, T * M, head) both
        y = self.attention(y, keys, values, bias)                   # (B, T * M, E)
        x = x + self.dropout(y)                                     # (B, T * M, E)

        y = self.feed_forward_norm(x)                               # (B, T * M, E)
        return x + self.dropout(self.feed_forward(y))               # (B, T * M, E)


class DecoderLayer(nn.Module):
    """The codes of an item that is written look at its earlier codes, then at the history.

    For each user Q items are written at once: in training one after each place of the history, in
    beam search one a beam. They do not see each other, and all of them look at the same history.
    """

    def __init__(self, size):
        super().__init__()
        E = size.width
        self.dropout = nn.Dropout(size.dropout)
        self.attention_norm = nn.RMSNorm(E)
        self.cross_attention_norm = nn.RMSNorm(E)
        self.feed_forward_norm = nn.RMSNorm(E)
        self.attention = Attention(E, size.heads, size.head)
        self.cross_attention = Attention(E, size.heads, size.head)
        self.feed_forward = FeedForward(E, size.inner)

    def forward(self, x, bias, memory, cross_bias, cache=None):
        """x: (B, Q, l, E), l codes of each item; bias: (H, l, l); memory: keys and values of the
        history, both (B, H, T * M, head); cross_bias: (H, Q * l, T * M), or broadcast to it
        -> (B, Q, l, E)

        cache: only in beam search, see there. Then x and bias are of the newest code alone.
        """
        y = self.attention_norm(x)                                  # (B, Q, l, E)
        keys, values = self.attention.keys_values(y)                # (B, Q, H, l, head) both
        if cache is not None:
            keys, values = cache.append(keys, values)
        y = self.attention(y, keys, values, bias)                   # (B, Q, l, E)
        x = x + self.dropout(y)                                     # (B, Q, l, E)

        # One product for all codes of all Q items: they ask the same keys.
        y = self.cross_attention_norm(x).flatten(1, 2)              # (B, Q * l, E)
        keys, values = memory                                       # (B, H, T * M, head) both
        y = self.cross_attention(y, keys, values, cross_bias)       # (B, Q * l, E)
        x = x + self.dropout(y).view_as(x)                          # (B, Q, l, E)

        y = self.feed_forward_norm(x)                               # (B, Q, l, E)
        return x + self.dropout(self.feed_forward(y))               # (B, Q, l, E)


# --- The generator: history in, scores of the next codes out -------------------------------------
# All tokens have their embeddings in one table: each code of each level of each modality, a mask
# for each modality, and a start token.


def centroid_embeddings(codebooks, E):
    """Embeddings for the codes of a modality: similar codes start with similar embeddings. [22]

    A centroid has d numbers, an embedding E. Along their principal directions the centroids differ
    most, so the first E of these coordinates keep most of what tells the centroids apart. The last
    of the L codes only numbers items that share the others: it has no centroid, and a random start.
    codebooks: (3, K, d) -> (3 * K, E), code k of level l in row l * K + k
    """
    centroids = codebooks.flatten(0, 1).float()                     # (3K, d)
    # centroids = left diag(singular) directions, so left diag(singular) are the coordinates.
    left, singular, _ = torch.linalg.svd(centroids, full_matrices=False)
    coordinates = left * singular                                   # (3K, directions)
    x = F.pad(coordinates, (0, E))[:, :E]                           # (3K, E), zeros for none
    return TOKEN_SCALE * x / x.std().clamp(1e-6)                    # (3K, E)


def hidden_modalities(history, D, masking):
    """Which modality of which item is hidden in this step, as if the item lacked it.

    A share `masking` of the items hides one modality, so that the model learns to do without it.
    history: (B, T) -> bool (B, T, D)
    """
    device = history.device
    if masking == 0 or D == 1:  # a single modality has no others that could do
        return torch.zeros(*history.shape, D, dtype=torch.bool, device=device)  # (B, T, D)
    hides = torch.rand(history.shape, device=device) < masking      # (B, T) does this item?
    which = torch.randint(D, history.shape, device=device)          # (B, T) which one, if it does
    one = which.unsqueeze(2) == torch.arange(D, device=device)      # (B, T, D)
    return hides.unsqueeze(2) & one                                 # (B, T, D)


class Generator(nn.Module):
    """The encoder-decoder.

    sources: what the file of each modality holds, by its name: codes (N+1, L); known (N+1,), has
    the item this modality?; codebooks (3, K, d), with a K of its own; for --lookahead embeddings
    (N+1, d)
    modalities: the names of the D that a history shows
    target: the name of the one that is written, which may be another one
    trie: of the codes of the target
    size: an object with the numbers width, heads, head, inner, layers, dropout (the options)
    """

    def __init__(self, sources, modalities, target, trie, size):
        super().__init__()
        self.trie = trie
        E = size.width
        H = size.heads
        D = len(modalities)
        L = sources[target]["codes"].shape[1]
        K = sources[target]["codebooks"].shape[1]
        self.number_tokens(sources, modalities, target)

        self.tokens = nn.Embedding(self.start_token + 1, E)
        nn.init.normal_(self.tokens.weight, std=TOKEN_SCALE)
        for name, source in sources.items():
            rows = centroid_embeddings(source["codebooks"], E)      # (3K, E)
            first = self.first_token[name]
            self.tokens.weight.data[first:first + len(rows)] = rows

        self.dropout = nn.Dropout(size.dropout)
        M = self.tokens_of_an_item(D, L)
        self.encoder_bias = RelativeBias(H, M, M)
        self.cross_bias = RelativeBias(H, L, M)
        # Among the codes of the item that is written there is no distance of items: its attention
        # has a table for pairs of levels. (T5 has distances there too; this table is our choice.)
        self.self_bias = nn.Parameter(torch.zeros(H, L, L))
        self.encoder = nn.ModuleList(EncoderLayer(size) for _ in range(size.layers))
        self.decoder = nn.ModuleList(DecoderLayer(size) for _ in range(size.layers))
        self.encoder_norm = nn.RMSNorm(E)
        self.decoder_norm = nn.RMSNorm(E)
        # Level l has a vector for each code. So small that scores begin with a variance of 1.
        self.output = nn.Parameter(torch.randn(L, E, K) * E ** -0.5)

    def number_tokens(self, sources, modalities, target):
        """Gives every code its row in the table of embeddings.

        The rows of a modality begin at first_token. Its code k of level l is l * K + k rows
        further. Behind all codes come the masks, and last the start token.
        """
        self.first_token = {}
        tokens = {}
        rows = 0
        for name, source in sources.items():
            L = source["codes"].shape[1]
            K = source["codebooks"].shape[1]
            level = rows + K * torch.arange(L)                      # (L,) code 0 of each level
            tokens[name] = level + source["codes"].long()           # (N+1, L)
            self.first_token[name] = rows
            rows += L * K
            if name == target:  # for the search: code k of level l is token target_level[l] + k
                self.register_buffer("target_level", level, persistent=False)

        masks = rows + torch.arange(len(modalities))                # (D,)
        self.start_token = rows + len(modalities)

        # In a history the mask stands for a modality that an item lacks.
        shown = []
        for name, mask in zip(modalities, masks):
            known = sources[name]["known"].unsqueeze(1)             # (N+1, 1)
            shown.append(torch.where(known, tokens[name], mask))    # (N+1, L)
        shown = torch.stack(shown, 1)                               # (N+1, D, L)

        # Not among the weights that are saved: the files of codes hold them.
        self.register_buffer("masks", masks.unsqueeze(1), persistent=False)  # (D, 1)
        self.register_buffer("shown", shown, persistent=False)      # (N+1, D, L)
        self.register_buffer("written", tokens[target], persistent=False)  # (N+1, L)

    def tokens_of_an_item(self, D, L):
        """M, how long a history is for each of its items: here a token is a code."""
        return D * L

    def carried(self, history):
        """What is known of the items besides codes: nothing here; only Lookahead has any."""
        return None

    def encode(self, history, hidden, carried):
        """What the encoder makes of a history.

        history: (B, T), hidden: bool (B, T, D), modalities to hide -> (B, T * M, E)
        """
        x = self.embed(history, hidden, carried)                    # (B, T, M, E)
        x = self.dropout(x.flatten(1, 2))                           # (B, T * M, E)
        bias = self.encoder_bias(history.shape[1])                  # (H, T * M, T * M)
        for layer in self.encoder:
            x = layer(x, bias)                                      # (B, T * M, E)
        return self.dropout(self.encoder_norm(x))                   # (B, T * M, E)

    def embed(self, history, hidden, carried):
        """What the encoder begins with: a vector for each token. -> (B, T, M, E)"""
        return self.embed_codes(history, hidden).flatten(2, 3)      # (B, T, D * L, E)

    def embed_codes(self, history, hidden):
        """The embedding of each code of a history, or that of the mask. -> (B, T, D, L, E)"""
        tokens = self.shown[history]                                # (B, T, D, L)
        tokens = torch.where(hidden.unsqueeze(3), self.masks, tokens)  # (B, T, D, L)  [21]
        return self.tokens(tokens)                                  # (B, T, D, L, E)

    def begin(self, history, hidden, carried):
        """What the decoder begins with, besides codes: nothing here. -> zeros (1, 1, 1, 1)"""
        return torch.zeros(1, 1, 1, 1, device=history.device)

    def memory(self, x):
        """What the decoder looks up: keys and values of the history, made once for all who ask.

        x: (B, T * M, E) -> for each layer keys and values, both (B, H, T * M, head)
        """
        return [layer.cross_attention.keys_values(x) for layer in self.decoder]

    def decode(self, tokens, begin, bias, memory, cross_bias, caches):
        """The decoder. tokens: (B, Q, l), begin: (B, Q, 1, E), or broadcast to it, caches: for each
        layer one or None -> (B, Q, l, E)
        """
        x = self.dropout(self.tokens(tokens) + begin)               # (B, Q, l, E)
        for layer, of_layer, cache in zip(self.decoder, memory, caches):
            x = layer(x, bias, of_layer, cross_bias, cache)         # (B, Q, l, E)
        return self.dropout(self.decoder_norm(x))                   # (B, Q, l, E)

    def scores(self, x, l, node, carried):
        """z_l, the scores of all K codes of level l. x: (..., E) -> (..., K)

        node: (...), where in the tree the codes before lead; only Lookahead asks.
        """
        return x @ self.output[l]                                   # (..., K)

    def tables(self):
        """What a recommendation looks up, besides weights, tree and codes. -> list of tensors"""
        return []

    def forward(self, history, target, masking=0.0):
        """Training: all codes after all places at once. target[:, t] follows history[:, :t+1].

        history, target: items, (B, T) both -> scores (B, T, L, K)
        """
        # Code l is written after the codes before it, the first one after the start token.
        before = self.written[target, :-1]                          # (B, T, L-1)
        before = F.pad(before, (1, 0), value=self.start_token)      # (B, T, L)
        L = before.shape[2]
        # No code sees a later one: above the diagonal the bias is -inf.
        later = torch.full((L, L), -torch.inf, device=before.device).triu(1)  # (L, L)
        bias = self.self_bias + later                               # (H, L, L)
        cross_bias = self.cross_bias(history.shape[1])              # (H, T * L, T * M)

        D = len(self.masks)
        hidden = hidden_modalities(history, D, masking)             # (B, T, D)
        carried = self.carried(history)
        begin = self.begin(history, hidden, carried)                # (B, T, 1, E), or (1, 1, 1, 1)
        memory = self.memory(self.encode(history, hidden, carried))
        none = [None] * len(self.decoder)  # no cache: all codes are there at once
        x = self.decode(before, begin, bias, memory, cross_bias, none)  # (B, T, L, E)
        by_level = x.movedim(2, 0)                                  # (L, B, T, E)
        logits = []
        for l in range(L):
            node = self.trie.path[target, l]                        # (B, T)
            logits.append(self.scores(by_level[l], l, node, carried))  # (B, T, K)
        return torch.stack(logits, 2)                               # (B, T, L, K)


# --- Looking ahead: scores that know what lies under a code (ours; --lookahead) ------------------
# The generator above scores code k after a prefix by a vector of its own, column k of `output`.
# What it knows of an item it has learnt from the events of the items that share its codes. A rare
# item has few events and a new one none, although its picture and its text are known. So here the
# score also looks ahead, at the items that lie under the code in the tree:
#
#     z_l(k) = x . output_l[k] + log sum_{items i under k} exp s_i,    s_i = (W_l x) . P v_i
#
# v_i are the vectors of item i that 02, 03 and 04 cut into its codes, one behind the other, and P
# brings them to the width of the model. The sum says: a code is as good as the items that it still
# leads to, and one that fits very well is enough.
#
#              root                   code 0 is scored by a and b: log(exp s_a + exp s_b)
#            /      \                 code 7 is scored by c: s_c
#          0          7               After code 0: code 2 is scored by a, code 5 by b.
#        /   \          \
#      2: a   5: b       2: c
#
# Were W_l x the same at all levels, so that an item has one s_i, and `output` zero, then
# p(0) p(2 | 0) would be
#
#     (exp s_a + exp s_b) / (exp s_a + exp s_b + exp s_c)  *  exp s_a / (exp s_a + exp s_b),
#
# which is exp s_a / (exp s_a + exp s_b + exp s_c): the softmax over all items, as SASRec has it.
# So this model can do what SASRec does with vectors, and what codes do besides.
#
# The history goes through P as well. An item has one token for each modality there: its vector
# and its codes' embeddings, added up. (So a history is L times as short.) And the decoder begins
# with the vector of the last item. What was taken and what is wanted lie in one space from the
# start, as in SASRec, which has one table for both.
#
# A collaborative vector needs care. SASRec learnt it from the very histories that the generator
# learns from: in training it tells what came next, at the test it does not. Codes forget that: the
# first code is shared by dozens of items. So a history shows the first collaborative code alone,
# and the vector is shrunk to the mean of the items that share this code (partial pooling):
#
#     v = mean + kept * own,    own = whole vector - mean,    0 <= kept <= 1
#
# In training `kept` is drawn for each step, so that all shares are known. Validation picks one.
#
# (W x) . P v = (P^T W x) . v, so either side may be multiplied with P. In a large shop a step of
# training has fewer questions W x than there are items: it multiplies the questions and leaves the
# table of vectors as it is. All else multiplies the table, once, and asks with as many as it likes.


class Carried(NamedTuple):
    """What is known of the items besides codes, and P.

    Questions are multiplied with `table`. It holds P v of all items, (N+1, E), and `bring` is None;
    or it holds v, (N+1, X), and questions are multiplied with `bring`, which is P, (E, X), first.
    """
    parts: list          # P of each modality: (E, its columns of v)
    table: torch.Tensor
    bring: torch.Tensor
    near: torch.Tensor   # (B, 1, N+1), trust * log(1 + 10 n) after each history; or None


def columns_of(source, shrunk):
    """The vectors of a modality. One that is shrunk has two parts: v = mean + kept * own.

    shrunk: was it learnt from the histories? -> (N+1, d), or, mean and own side by side, (N+1, 2d)
    """
    x = source["embeddings"].float()                                # (N+1, d), row 0 is padding
    length = x[1:].square().sum(1).mean().sqrt()                    # ()
    x = x / length.clamp(min=1e-6)                                  # (N+1, d), of length 1 or so
    if not shrunk:
        return x
    known = source["known"].nonzero()[:, 0]                         # (n,) others have no vector
    code = source["codes"][known, 0].long()                         # (n,)
    K = source["codebooks"].shape[1]
    members = code.bincount(minlength=K).clamp(min=1)               # (K,)
    sums = torch.zeros(K, x.shape[1]).index_add(0, code, x[known])  # (K, d)
    mean = x.clone()                                                # (N+1, d)
    mean[known] = (sums / members.unsqueeze(1))[code]               # (n, d)
    return torch.cat([mean, x - mean], 1)                           # (N+1, 2d)


class Carry(nn.Module):
    """The part of P that brings the vectors of one modality to the width of the model. d: theirs"""

    def __init__(self, d, E, shrunk):
        super().__init__()
        self.shrunk = shrunk
        self.project = nn.Linear(d, E, bias=False)
        nn.init.normal_(self.project.weight, std=TOKEN_SCALE)

    def forward(self, kept):
        """P (mean + kept * own) = [P, kept * P] [mean, own].

        kept: () -> a matrix for the columns of the modality, (E, d) or, if it is shrunk, (E, 2d)
        """
        P = self.project.weight                                     # (E, d)
        if self.shrunk:
            P = torch.cat([P, kept * P], 1)                         # (E, 2d)
        return P


# Counts. That people take i along with j again and again, a vector of E numbers tells only roughly;
# to count is exact. With j_0 the last item of a history, j_1 the one before it, and so on,
#
#     n_i = near(i, j_0) + near(i, j_1) / 2 + .. + near(i, j_4) / 16
#
# near(i, j) adds 1 / gap for each time that i and j stood gap <= 5 places apart in a training
# history, in either order. (So does 06's row co-occurrence, but with 50 neighbours of an item, and
# with what the history holds.) In the search, and only there,
#
#     s_i = (W_l x) . P v_i + trust * log(1 + 10 n_i)
#
# While we train, n would give the answer away: the event to be found has been counted. So `trust`
# is no weight that is learnt. Validation picks it at the end, as nobody counts its events.


class Neighbours(nn.Module):
    """Of each item the R others that stood near it most often in the training events.

    data: what data.pt holds
    """

    def __init__(self, data, R):
        super().__init__()
        events = data["events"].long()                              # (events,)
        offsets = data["offsets"]                                   # (U+1,)
        n = len(data["item_ids"])                                   # N + 1

        # Two events of one user are a pair, if the later one is in training, too. A pair as one
        # number: of N = 100 items, 3 and 7 are 3 * 101 + 7.
        end = (offsets[1:] - 2).repeat_interleave(offsets.diff())   # (events,)
        pairs = []
        weights = []
        for gap in range(1, NEAR + 1):
            row = torch.arange(len(events))                         # (events,)
            row = row[row + gap < end]                              # (pairs,)
            one = events[row]                                       # (pairs,)
            other = events[row + gap]                               # (pairs,)
            pairs += [one * n + other, other * n + one]             # in either order
            weights.append(torch.full((2 * len(row),), 1 / gap))    # (2 * pairs,)
        pairs, same = torch.cat(pairs).unique(return_inverse=True)  # (different,), (all,)
        total = torch.zeros(len(pairs)).index_add(0, same, torch.cat(weights))  # (different,)

        # Sort by weight, then by item: the heaviest neighbours of each item stand first.
        order = total.argsort(descending=True, stable=True)         # (different,)
        order = order[(pairs[order] // n).argsort(stable=True)]     # (different,)
        item = pairs[order] // n                                    # (different,)
        place = torch.arange(len(item)) - torch.searchsorted(item, item)  # (different,)
        kept = place < R                                            # (different,)
        cell = (item[kept], place[kept])
        neighbour = torch.zeros(n, R, dtype=torch.int32)            # (N+1, R), 0: none
        neighbour[cell] = (pairs[order][kept] % n).int()
        weight = torch.zeros(n, R)                                  # (N+1, R)
        weight[cell] = total[order][kept]
        self.register_buffer("neighbour", neighbour, persistent=False)
        self.register_buffer("weight", weight, persistent=False)

    def forward(self, history):
        """n of all items after a history, 0 for those that it holds. (B, T) -> (B, N+1)"""
        B, T = history.shape
        counts = self.weight.new_zeros(B, len(self.weight))         # (B, N+1)
        for a in range(min(NEAR, T)):
            item = history[:, T - 1 - a]                            # (B,)
            neighbour = self.neighbour[item].long()                 # (B, R)
            counts.scatter_add_(1, neighbour, 0.5 ** a * self.weight[item])
        counts.scatter_(1, history, 0)  # none for its own: this very user's events are among them
        counts[:, 0] = 0                # no item
        return counts                                               # (B, N+1)


class Root(nn.Module):
    """Beneath, at level 0. All N items lie there, so that one product serves every question; of a
    large shop a step of training draws some items of each code.
    """

    def __init__(self, trie):
        super().__init__()
        self.trie = trie
        self.code = trie.codes[1:, 0]                               # (N,)
        # The leaves of a first code stand side by side: so many `members`, from `begin` on.
        members = self.code.bincount(minlength=trie.K)              # (K,)
        self.register_buffer("members", members, persistent=False)
        self.register_buffer("begin", members.cumsum(0) - members, persistent=False)

    def forward(self, question, node, carried):
        """log sum exp s over the items under each first code.

        question: as wide as the table, (..., X or E), node: not used -> (..., K), very low for none
        """
        K = self.trie.K
        if self.training and len(self.code) > DRAWN_FROM:
            # A sum over n items is n times the mean over some of them, drawn by chance.
            by_chance = torch.rand(K, DRAWN, device=question.device)  # (K, DRAWN)
            members = self.members.unsqueeze(1)                     # (K, 1)
            among = (by_chance * members).long()                    # (K, DRAWN)
            place = self.begin.unsqueeze(1) + torch.minimum(among, members - 1)  # (K, DRAWN)
            # A code without items draws another one's, and counts none.
            item = self.trie.leaf_item[place.clamp(min=0)]          # (K, DRAWN)
            score = question @ carried.table[item.flatten()].T      # (..., K * DRAWN)
            score = score.float().unflatten(-1, item.shape)         # (..., K, DRAWN)
            times = self.members.float().clamp(min=1e-30) / DRAWN   # (K,)
            return score.logsumexp(-1) + times.log()                # (..., K)

        score = question @ carried.table[1:].T                      # (..., N)
        if carried.near is not None:
            score = score + carried.near[..., 1:]                   # (..., N)
        return log_sums(score, self.code.expand(score.shape), K)    # (..., K)


class Beneath(nn.Module):
    """The items that lie under each node of level l, and the code that leads to each of them."""

    def __init__(self, trie, l):
        super().__init__()
        # The leaves are numbered from left to right: those under a node stand side by side. How
        # many stand before each of them? C is the most that a node has. Where one has fewer, the
        # row is filled with item 0.
        items = trie.leaf_item.cpu()                                # (N,)
        node = trie.path.cpu()[items, l]                            # (N,) sorted
        place = torch.arange(len(items)) - torch.searchsorted(node, node)  # (N,)
        item = torch.zeros(node[-1] + 1, place.max() + 1).long()    # (nodes of l, C)
        item[node, place] = items
        code = torch.zeros_like(item)                               # (nodes of l, C)
        code[node, place] = trie.codes.cpu()[items, l]
        self.K = trie.K
        # As few bytes as hold them: in a large shop these tables are large.
        self.register_buffer("item", item.int(), persistent=False)
        self.register_buffer("code", code.int(), persistent=False)

    def forward(self, question, node, carried):
        """log sum exp s over the items under each child of a node.

        question: as wide as the table, (..., X or E), node: (...) -> (..., K), very low for none
        """
        item = self.item[node]                                      # (..., C)
        score = F.embedding(item, carried.table) @ question.unsqueeze(-1)  # (..., C, 1)
        score = score.squeeze(-1).masked_fill(item == 0, -torch.inf)  # (..., C)
        if carried.near is not None:
            score = score + carried.near.take_along_dim(item.long(), -1)  # (..., C)
        return log_sums(score, self.code[node].long(), self.K)      # (..., K)


def log_sums(score, code, K):
    """log sum exp of the scores of each code. score, code: (..., n) -> (..., K), low for none"""
    # exp of large numbers overflows: the largest is taken out, and added again at the end.
    score = score.float()                                           # (..., n)
    most = score.detach().amax(-1, keepdim=True)                    # (..., 1)
    total = score.new_zeros(*score.shape[:-1], K)                   # (..., K)
    total = total.scatter_add(-1, code, (score - most).exp())       # (..., K)
    return total.clamp(min=1e-30).log() + most                      # (..., K)


class Lookahead(Generator):
    """The generator, with vectors in its history and with scores that look ahead.

    size.shrunk: names of the modalities that were learnt from the histories, with commas between
    neighbours: a Neighbours
    """

    def __init__(self, sources, modalities, target, trie, size, neighbours):
        super().__init__(sources, modalities, target, trie, size)
        self.neighbours = neighbours
        E = size.width
        self.carry = nn.ModuleList()
        tables = []
        for m, name in enumerate(modalities):
            shrunk = name in size.shrunk.split(",")
            self.carry.append(Carry(sources[name]["embeddings"].shape[1], E, shrunk))
            tables.append(columns_of(sources[name], shrunk))        # (N+1, d or 2d)
            if shrunk:
                self.shown[:, m, 1:] = self.masks[m]
        self.columns = [table.shape[1] for table in tables]  # of each modality
        self.register_buffer("table", torch.cat(tables, 1), persistent=False)  # (N+1, X)
        self.beneath = nn.ModuleList([Root(trie)])
        for l in range(1, trie.L):
            self.beneath.append(Beneath(trie, l))
        # W of each level, transposed: the vectors x are rows.
        self.look = nn.Parameter(LOOK_SCALE * torch.eye(E).repeat(trie.L, 1, 1))  # (L, E, E)
        # Set after training, on validation: how much of `own` a search keeps, and the weight of n.
        self.register_buffer("kept", torch.tensor(0.5))             # ()
        self.register_buffer("trust", torch.tensor(0.0))            # ()

    def tokens_of_an_item(self, D, L):
        """M: here a token is a modality."""
        return D

    def carried(self, history):
        """The vectors of all items, and the counts after each history. -> Carried"""
        kept = self.kept                                            # ()
        if self.training:
            kept = torch.rand_like(kept)                            # ()
        parts = [carry(kept) for carry in self.carry]               # (E, columns) each
        whole = torch.cat(parts, 1)                                 # (E, X)
        if self.training and len(self.table) > DRAWN_FROM:
            return Carried(parts, self.table, whole, None)

        table = self.table @ whole.T                                # (N+1, E)
        near = None
        if not self.training and self.trust > 0:
            counts = self.neighbours(history).unsqueeze(1)          # (B, 1, N+1)
            near = self.trust * (10 * counts).log1p()               # (B, 1, N+1)
        return Carried(parts, table, None, near)

    def embed(self, history, hidden, carried):
        """The vector of each item and modality, and its codes' embeddings. -> (B, T, D, E)"""
        x = self.embed_codes(history, hidden)                       # (B, T, D, L, E)
        x = x.sum(3) / x.shape[3] ** 0.5                            # (B, T, D, E)
        return x + self.gather(history, hidden, carried)            # (B, T, D, E)

    def begin(self, history, hidden, carried):
        """After each place of the history: the vector of the item there. -> (B, T, 1, E)"""
        return self.gather(history, hidden, carried).sum(2, keepdim=True)  # (B, T, 1, E)

    def gather(self, history, hidden, carried):
        """P v of the items of a history, 0 for what is hidden. -> (B, T, D, E)"""
        v = self.table[history].split(self.columns, -1)             # (B, T, columns) each
        brought = [x @ P.T for x, P in zip(v, carried.parts)]       # (B, T, E) each
        return torch.stack(brought, 2).masked_fill(hidden.unsqueeze(3), 0)  # (B, T, D, E)

    def scores(self, x, l, node, carried):
        """z_l of Generator, plus log sum exp s over the items under k. -> (..., K)"""
        question = x @ self.look[l]                                 # (..., E), W_l x
        if carried.bring is not None:
            question = question @ carried.bring                     # (..., X)
        z = super().scores(x, l, node, carried)                     # (..., K)
        return z + self.beneath[l](question, node, carried)         # (..., K)

    def tables(self):
        """Besides: the vectors of the items, which items lie under the nodes, and neighbours."""
        parts = (self.beneath, self.neighbours)
        return [self.table, *[table for part in parts for table in part.buffers()]]


# --- A step of training ---------------------------------------------------------------------------


def batch_losses(model, trie, events, args):
    """What a step makes smaller: the loss of each code, summed over the targets.

    events: (B, T+1), each of them but the first is a target -> (L,)
    """
    history = events[:, :-1]                                        # (B, T)
    target = events[:, 1:]                                          # (B, T)
    with autocast(args):
        logits = model(history, target, args.masking)               # (B, T, L, K)
    logits = logits.flatten(0, 1)                                   # (B * T, L, K)
    constrained = not args.unconstrained
    return code_losses(logits, target.flatten(), trie, constrained)  # (L,)


def train_step(model, trie, optimizer, events, args):
    """One step of AdamW. -> this process's loss of each code, summed over its targets (L,)"""
    losses = batch_losses(model, trie, events, args)                # (L,)
    # Divided by --batch, not by B * T: a target weighs the same in a batch that is smaller.
    (losses.sum() / args.batch).backward()
    nn.utils.clip_grad_norm_(model.parameters(), CLIP)
    optimizer.step()
    optimizer.zero_grad()
    return losses.detach()                                          # (L,)


def learning_rate(done, peak):
    """It rises at first, and falls along half a cosine to 0. done: share of the training, 0 to 1"""
    rise = min(1, done / WARM_UP)
    fall = (1 + math.cos(math.pi * done)) / 2
    return peak * rise * fall


# --- Beam search: the likeliest items ------------------------------------------------------------
# log p(item) = sum_l log p(c_l | c_<l), with the softmax over the children. It would take N such
# sums to rank all items. The search walks down the tree instead, and keeps the best prefixes, the
# beams.


class Cache:
    """Keys and values of the codes that the beams have so far, in one layer of the decoder.

    A code asks for the keys and values of the codes before it. These do not change any more when a
    beam grows, so that each is computed once and kept.
    """

    def __init__(self):
        self.keys = None                                            # (B, beams, H, l, head)
        self.values = None                                          # (B, beams, H, l, head)

    def append(self, keys, values):
        """Adds those of the newest code, (B, beams, H, 1, head). -> those of all codes so far"""
        if self.keys is not None:
            keys = torch.cat([self.keys, keys], -2)                 # (B, beams, H, l, head)
            values = torch.cat([self.values, values], -2)           # (B, beams, H, l, head)
        self.keys = keys
        self.values = values
        return keys, values

    def follow(self, parent):
        """Beam i goes on from the codes of beam parent[i]. parent: (B, beams)"""
        user = torch.arange(len(parent), device=parent.device).unsqueeze(1)  # (B, 1)
        self.keys = self.keys[user, parent]                         # (B, beams, H, l, head)
        self.values = self.values[user, parent]                     # (B, beams, H, l, head)


@torch.no_grad()
def beam_search(model, trie, history, beam, trace=None):
    """The `beam` likeliest items after each history, best first; exact where beam >= N.

    history: items (B, T) -> items (B, beams), log-probabilities (B, beams): beams = `beam`, or K^L
    where that is less; item 0 and -inf where the catalogue has fewer items
    trace: a list that is to get, of each level, the beams' nodes and log-probabilities; or None
    """
    B, T = history.shape
    device = history.device
    hidden = hidden_modalities(history, len(model.masks), masking=0)  # (B, T, D)
    carried = model.carried(history)
    begin = model.begin(history, hidden, carried)[:, -1:]           # (B, 1, 1, E), or (1, 1, 1, 1)
    memory = model.memory(model.encode(history, hidden, carried))  # once a user: all beams ask it
    cross_bias = model.cross_bias(T, first=T - 1)                   # (H, L, T * M)
    caches = [Cache() for _ in model.decoder]

    # One beam stands at the root. From level to level there are more of them, up to `beam`.
    node = torch.zeros(B, 1, dtype=torch.long, device=device)       # (B, beams)
    score = torch.zeros(B, 1, device=device)                        # (B, beams)
    token = torch.full_like(node, model.start_token)                # (B, beams)
    for l in range(trie.L):
        # Each beam's newest code goes in alone, and asks for all codes so far.
        newest = token.unsqueeze(2)                                 # (B, beams, 1)
        bias = model.self_bias[:, l:l + 1, :l + 1]                  # (H, 1, l+1)
        at_level = cross_bias[:, l:l + 1]                           # (H, 1, T * M), all beams
        x = model.decode(newest, begin, bias, memory, at_level, caches)  # (B, beams, 1, E)

        # log p(k | prefix): a softmax over the children of each beam's node.  [19]
        z = model.scores(x[:, :, 0], l, node, carried).float()      # (B, beams, K)
        z = z + trie.log_allowed(l, node)                           # (B, beams, K)
        log_p = z.log_softmax(-1)                                   # (B, beams, K)

        # The best of all beams' children: of which beam, by which code?
        total = (score.unsqueeze(2) + log_p).flatten(1)             # (B, beams * K)
        score, best = total.topk(min(beam, total.shape[1]))         # (B, beams) both
        parent = best // trie.K                                     # (B, beams)
        code = best % trie.K                                        # (B, beams)

        node = trie.descend(l, node.gather(1, parent), code)        # (B, beams)
        token = model.target_level[l] + code                        # (B, beams)
        for cache in caches:
            cache.follow(parent)
        if trace is not None:
            trace.append((node, score))

    items = trie.leaf_item[node].masked_fill(score == -torch.inf, 0)  # (B, beams)
    return items, score


# --- Ranking -------------------------------------------------------------------------------------
# As in most papers on codes, what users had before stays in their lists (what that costs:
# tests/README.md).


def recommend(model, trie, data, split, users, args):
    """The best items for the held-out event of some users; processes share the work.

    split: "valid" or "test", users: (n,) -> items int32 (n, beam), best first; scores (n, beam)
    """
    model.eval()
    start, length = held_out_windows(split, data["offsets"], args.length)  # (U,) both
    start = start[users]                                            # (n,)
    length = length[users]                                          # (n,)
    items = torch.zeros(len(users), args.beam, dtype=torch.int32)   # (n, beam)
    scores = torch.zeros(len(users), args.beam)                     # (n, beam)

    # All processes must cut the same batches, and so must a run that goes on after a stop: sums
    # are rounded alike only in batches that are alike, and then they have the same bits.
    torch.manual_seed(0)
    at_once = RANKED_EVENTS
    if args.device == "cuda":
        at_once = 16 * RANKED_EVENTS  # else most of its cores would have nothing to do
        if args.lookahead:  # N scores for each user, a few times
            at_once = min(at_once, max(1, 2 ** 28 // len(trie.leaf_item)))
    batches = equal_length_batches(length, at_once)
    for rows in progress(batches[args.rank::args.world], split, args):
        T = int(length[rows[0]])
        history = events_at(data, start[rows], T, args)             # (B, T)
        with autocast(args):
            best, score = beam_search(model, trie, history, args.beam)
        found = best.shape[1]  # fewer than `beam` where K^L is smaller
        items[rows, :found] = best.int().cpu()
        scores[rows, :found] = score.cpu()
        scores[rows, found:] = -torch.inf
    # Each process filled the rows of its own users, the rest are 0: the sum has all rows.
    return add_up(items), add_up(scores)


def trace_searches(model, trie, data, args):
    """What the search for the test event held, level by level, of the first n users.

    -> codes int16 (n, L, beams, L), prefixes of each level, best first: -1 behind a prefix and
    where there are fewer; log_p (n, L, beams), of the whole prefix: -inf where there are fewer
    """
    model.eval()
    start, length = held_out_windows("test", data["offsets"], args.length)  # (U,) both
    n = min(TRACED_USERS, len(start))
    codes = torch.full((n, trie.L, TRACED_BEAMS, trie.L), -1, dtype=torch.int16)
    log_p = torch.full((n, trie.L, TRACED_BEAMS), -torch.inf)       # (n, L, beams)
    for rows in equal_length_batches(length[:n], RANKED_EVENTS):
        T = int(length[rows[0]])
        history = events_at(data, start[rows], T, args)             # (B, T)
        levels = []
        with autocast(args):
            beam_search(model, trie, history, args.beam, levels)
        for l, (node, score) in enumerate(levels):
            node = node[:, :TRACED_BEAMS]                           # (B, beams)
            score = score[:, :TRACED_BEAMS]                         # (B, beams)
            found = node.shape[1]
            prefix = trie.prefix(l + 1, node).short()               # (B, beams, l+1)
            codes[rows, l, :found, :l + 1] = prefix.cpu()
            log_p[rows, l, :found] = score.cpu()
    codes[log_p == -torch.inf] = -1
    return codes, log_p


def progress(steps, title, args):
    """A bar that moves in a terminal while the steps are taken. -> what the loop runs over"""
    hidden = True if args.rank > 0 else None  # None: hidden where no terminal is
    return tqdm(steps, title, leave=False, disable=hidden)


def autocast(args):
    """Where --precision says so, products of matrices are computed in bfloat16."""
    kind = torch.device(args.device).type
    return torch.autocast(kind, torch.bfloat16, enabled=args.bf16)


# --- The script ----------------------------------------------------------------------------------


def options(argv):
    """The command line. -> argparse.Namespace"""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--run", default="runs/toy", help="folder of this experiment's .pt files")
    add("--seed", type=int, default=0, help="of every random choice")
    add("--device", default="auto", choices=sorted({"auto", "cpu", best_device()}),
        help="auto: the best")
    add("--smoke", action="store_true", help="tiny sizes: is everything in place?")
    add("--name", default="mscgrec", help="of this model's files and of its row in the table")
    add("--modalities", default="image,text,collab", help="whose codes a history shows")
    add("--target", default="collab", help="the modality whose code is written")
    add("--lookahead", action="store_true", help="ours: scores that know what lies under a code")
    add("--shrunk", default="collab,collab-content", help="with --lookahead: modalities that were "
        "learnt from the histories, of which it shows the first code and a shrunk vector")
    add("--neighbours", type=int, default=200, help="R: with --lookahead, so many items are "
        "remembered for each, which stood near it in training; 0: none")
    add("--unconstrained", action="store_true", help="train with the softmax over all K codes")
    add("--history", help="only print what --name recommends after some titles, parts of titles or "
        "[ids], with ; between them (or commas, where no title has one)")
    add("--masking", type=float, default=0.2, help="share of history items with a modality hidden")
    add("--length", type=int, default=20, help="T: items of history that the model sees")
    add("--width", type=int, default=64, help="E: width of the model")
    add("--layers", type=int, default=2, help="encoder layers, and as many decoder layers")
    add("--heads", type=int, default=4, help="H: attention heads")
    add("--head", type=int, default=16, help="width of a head")
    add("--inner", type=int, default=256, help="width inside the feed-forward layers")
    add("--dropout", type=float, default=0.1, help="share of activations dropped in training")
    add("--lr", type=float, default=2e-3, help="learning rate of AdamW")
    add("--batch", type=int, default=128, help="targets a training step, of each process")
    add("--epochs", type=int, default=15, help="passes over the training events")
    add("--beam", type=int, default=20, help="prefixes kept in the search = items recommended")
    add("--max-steps", type=int, default=0, help="a trial: only so many, of one epoch")
    add("--fresh", action="store_true", help="start over: leave a stopped run's checkpoint aside")
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto",
        help="auto: bf16 on CUDA GPUs")
    # --smoke changes defaults only: what is given on the command line outweighs it.
    given, _ = parser.parse_known_args(argv)
    if given.smoke:
        parser.set_defaults(epochs=1, width=16, layers=1, heads=2, inner=32)
    args = parser.parse_args(argv)
    check(args)
    if args.device == "auto":
        args.device = best_device()
    args.bf16 = args.precision == "bf16"
    if args.precision == "auto":
        args.bf16 = args.device == "cuda"
    return args


def check(args):
    """Ends the script where an option makes no sense."""
    sizes = ("length", "width", "layers", "heads", "head", "inner", "batch", "epochs", "beam")
    for name in sizes:
        if getattr(args, name) < 1:
            fail(f"--{name} {getattr(args, name)}: it starts at 1.")
    if not 0 <= args.masking <= 1:
        fail(f"--masking {args.masking}: from 0 to 1.")
    if not 0 <= args.dropout < 1:
        fail(f"--dropout {args.dropout}: from 0 to below 1.")
    if not 0 < args.lr < math.inf:
        fail(f"--lr {args.lr}: above 0.")
    if not 0 <= args.seed < 2 ** 32:
        fail(f"--seed {args.seed}: from 0 to below 2^32.")
    if args.neighbours < 0:
        fail(f"--neighbours {args.neighbours}: it starts at 0, which counts none.")
    if args.max_steps < 0:
        fail(f"--max-steps {args.max_steps}: it starts at 0, which is no trial.")


def main(argv=None):
    """Trains the generator, then writes it and its recommendations; or --history."""
    args = options(argv)
    run = Run(args.run)
    args.rank, args.world = join(run)
    if args.history is not None:
        show_recommendations(run, args)
        return

    torch.manual_seed(args.seed)
    data = run.load("data.pt", "01_data.py")
    sources = read_codes(run, data, args)
    model, trie = build(sources, data, args)
    state = train(model, trie, run, data, args)  # goes on where a stopped run left off
    if args.max_steps:
        return
    write_model(state, run, args)
    model.load_state_dict(state["best"])
    write_recommendations(model, trie, state, run, data, args)
    if run.writes:
        (run.folder / f"generator-{args.name}.checkpoint").unlink(missing_ok=True)


def read_codes(run, data, args):
    """What the files of the modalities hold, by name; codes may come from anywhere. -> dict"""
    makers = {"image": "03_dino_quantizer.py", "text": "04_text_codes.py", "collab": "02_sasrec.py"}
    names = args.modalities.split(",")
    if args.target not in names:
        names.append(args.target)  # written, but not shown

    N = len(data["item_ids"]) - 1
    sources = {}
    for name in names:
        maker = makers.get(name, f"the script of {name} codes")
        sources[name] = run.load(f"{name}_codes.pt", maker)
        wrong = what_is_wrong(sources[name], N, args.lookahead)
        if wrong:
            fail(f"{run.folder / name}_codes.pt does not hold the codes of {N} items: {wrong}.")

    levels = {name: source["codes"].shape[1] for name, source in sources.items()}
    if len(set(levels.values())) > 1:
        fail(f"Every modality needs as many codes an item as the others; these have {levels}.")
    return sources


def what_is_wrong(source, N, lookahead):
    """What keeps a file from being the codes of N items. -> in words, "" if nothing does

    lookahead: are the vectors needed, which the codes were cut from?
    """
    for key in ("codes", "known", "codebooks"):
        if not torch.is_tensor(source.get(key)):
            return f"it has no tensor '{key}'"
    codes = source["codes"]                                         # (N+1, L)
    codebooks = source["codebooks"]                                 # (3, K, d)
    if codes.dim() != 2 or len(codes) != N + 1 or codes.is_floating_point():
        return f"'codes' is {codes.dtype} {tuple(codes.shape)}, not int16 ({N + 1}, L)"
    if source["known"].shape != (N + 1,) or source["known"].dtype != torch.bool:
        return f"'known' is not bool ({N + 1},)"
    if codebooks.dim() != 3 or len(codebooks) > codes.shape[1] or not codebooks.isfinite().all():
        return "'codebooks' is not (levels, K, d), of numbers, with at most L levels"
    K = codebooks.shape[1]
    least = codes[1:].min().item()
    most = codes[1:].max().item()
    if least < 0 or most >= K:
        return f"there are codes from {least} to {most}, and codebooks for 0 to {K - 1}"
    vectors = source.get("embeddings")                              # (N+1, d)
    if lookahead and (not torch.is_tensor(vectors) or vectors.dim() != 2
                      or len(vectors) != N + 1 or not vectors.isfinite().all()):
        return f"'embeddings' is not ({N + 1}, d), of numbers, as --lookahead needs it"
    return ""


def build(sources, data, args):
    """The model, with its first random weights, and the tree of the codes that it writes."""
    modalities = args.modalities.split(",")
    target = sources[args.target]
    trie = Trie(target["codes"], target["codebooks"].shape[1], args.device)
    if args.lookahead:
        neighbours = Neighbours(data, args.neighbours)
        model = Lookahead(sources, modalities, args.target, trie, args, neighbours)
    else:
        model = Generator(sources, modalities, args.target, trie, args)
    return model.to(args.device), trie


def count_parameters(model):
    """How many numbers are trained. -> int"""
    return sum(weight.numel() for weight in model.parameters())


def train(model, trie, run, data, args):
    """All epochs; the best one is chosen on validation. -> state

    state: losses and ndcg of each epoch, seconds, best (weights by name).
    """
    describe(model, trie, args)
    U = len(data["user_ids"])
    validation_users = torch.randperm(U)[:VALIDATION_USERS]         # (n,)
    replica = model  # the model itself, or what makes several processes agree on its gradients
    if args.world > 1:
        # The buffers are tables of codes, which every process has read: none need be sent.
        replica = nn.parallel.DistributedDataParallel(model, forward_sync_buffers=False)
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=WEIGHT_DECAY, fused=True)
    checkpoint = f"generator-{args.name}.checkpoint"
    state = resume(run, checkpoint, args, model=model, optimizer=optimizer)
    began = time.time() - state["seconds"]  # the time of a stopped run counts
    every = min(10, max(1, args.epochs // 8))  # so many epochs, a line is printed

    for epoch in range(len(state["losses"]), args.epochs):
        losses = train_epoch(replica, trie, optimizer, state, epoch, data, args)  # (L,)
        if args.max_steps:
            return state
        ndcg = validate(model, trie, data, validation_users, args)
        if ndcg > max(state["ndcg"], default=-1):  # chosen on validation, never on test  [6]
            weights = model.state_dict().items()
            state["best"] = {name: weight.cpu().clone() for name, weight in weights}
        state["losses"].append(losses)
        state["ndcg"].append(ndcg)
        state["seconds"] = time.time() - began
        if epoch % every == 0:
            report(epoch, state)
        run.save({**state, "model": model.state_dict(), "optimizer": optimizer.state_dict(),
                  "options": vars(args)}, checkpoint)

    best = max(state["ndcg"])
    print(f"{len(state['ndcg'])} epochs, {state['seconds']:.0f} s; the best is epoch "
          f"{state['ndcg'].index(best)}: validation NDCG@10 {best:.4f}")
    if args.lookahead:
        settle(model, trie, state, data, validation_users, args)
        state["seconds"] = time.time() - began
    return state


def settle(model, trie, state, data, users, args):
    """The two numbers of Lookahead that are not learnt: those that validate best, one by one."""
    model.load_state_dict(state["best"])
    choices = {"kept": (0.0, 0.25, 0.5, 0.75, 1.0), "trust": (0.0, 0.1, 0.25, 0.5, 1.0, 2.0, 4.0)}
    if not any(carry.shrunk for carry in model.carry):
        del choices["kept"]  # nothing is shrunk
    if args.neighbours == 0:
        del choices["trust"]  # nothing is counted
    for name, values in choices.items():
        number = getattr(model, name)                               # ()
        ndcg = {}
        for value in values:
            number.fill_(value)
            ndcg[value] = validate(model, trie, data, users, args)
        number.fill_(max(ndcg, key=ndcg.get))
        state["best"][name] = number.cpu().clone()
        print(f"validation NDCG@10 by {name}: "
              + ", ".join(f"{value:g} {then:.4f}" for value, then in ndcg.items()))


def describe(model, trie, args):
    """Prints the sizes of model and tree, and the loss of one who knows nothing."""
    nodes = [len(edges) for edges in trie.edges]
    guess = math.log(nodes[-1])  # all items alike
    if args.unconstrained:
        guess = trie.L * math.log(trie.K)  # all sequences of codes alike
    print(f"{args.name}: {count_parameters(model):,} parameters; a tree with {nodes} nodes on its "
          f"levels; a uniform guess has loss {guess:.3f}")


def report(epoch, state):
    """Prints a line: how far the loss of each code is, and what that is worth on validation."""
    losses = state["losses"][epoch]                                 # (L,)
    parts = " + ".join(f"{loss:.2f}" for loss in losses)
    print(f"epoch {epoch:3d}  loss {losses.sum():.3f} = {parts}  "
          f"validation NDCG@10 {state['ndcg'][epoch]:.4f}  {state['seconds']:.0f} s")


def train_epoch(model, trie, optimizer, state, epoch, data, args):
    """One pass over the training events. -> mean loss of each code, nats (L,)"""
    torch.manual_seed(1000 * args.seed + epoch)  # the same batches in all processes
    start, length = training_windows(data["offsets"], args.length)  # (W,) both
    batches = equal_length_batches(length, args.batch * args.world)
    todo = batches
    if args.max_steps:
        todo = batches[:args.max_steps]
    if args.rank > 0:  # but dropout and hidden modalities of its own in each
        own_seed = torch.randint(2 ** 31, (args.rank,))[-1]         # ()
        torch.manual_seed(own_seed.item())

    model.train()
    total = torch.zeros(trie.L, device=args.device)                 # (L,)
    targets = 0
    began = time.time()
    title = f"epoch {epoch}"
    if epoch > 0:
        title += f" (before: loss {state['losses'][-1].sum():.3f}, NDCG@10 {state['ndcg'][-1]:.4f})"
    for i, batch in enumerate(progress(todo, title, args)):
        share = batch[args.rank::args.world]                        # (B,) of this process
        T = int(length[batch[0]])
        events = events_at(data, start[share], T + 1, args)         # (B, T+1)

        done = (epoch + i / len(batches)) / args.epochs
        optimizer.param_groups[0]["lr"] = learning_rate(done, args.lr)
        total += train_step(model, trie, optimizer, events, args)   # (L,)
        targets += len(batch) * T
        # What is no number once stays none. To look, the processor waits for the GPU: so seldom.
        if i % 100 == 0 or i == len(todo) - 1:
            if not total.isfinite().all():
                fail(f"by step {i} the loss is no number: start over with a lower --lr and "
                     "--fresh.")

    if args.max_steps:
        hours = (time.time() - began) / 3600 * len(batches) / max(1, len(todo))
        print(f"{len(todo)} steps; an epoch has {len(batches):,}: {hours:.3g} hours")
    return add_up(total).cpu() / max(1, targets)  # a very small shop may have no target


def validate(model, trie, data, users, args):
    """NDCG@10 on the validation events of some users. -> float"""
    # A search of ten beams, not of twenty, saves time.
    narrow = argparse.Namespace(**vars(args) | {"beam": min(10, args.beam)})
    top, _ = recommend(model, trie, data, "valid", users, narrow)   # (n, 10)
    target = data["events"][data["offsets"][1 + users] - 2]         # (n,)
    hit = top == target.unsqueeze(1)                                # (n, 10)
    # The item at place 0 counts 1 / log2(2), at place 1 1 / log2(3), ..
    discount = torch.log2(2.0 + torch.arange(top.shape[1]))         # (10,)
    gain = hit / discount                                           # (n, 10)
    return gain.sum(1).mean().item()


def write_model(state, run, args):
    """The best epoch's weights, and the curves of the training."""
    run.save({
        "weights": state["best"],
        "losses": torch.stack(state["losses"]),                     # (epochs, L)
        "ndcg": torch.tensor(state["ndcg"]),                        # (epochs,)
        "seconds": state["seconds"],
        "options": vars(args),
    }, f"generator-{args.name}.pt")


def write_recommendations(model, trie, state, run, data, args):
    """The best items for every user's test event and validation event."""
    everyone = torch.arange(len(data["user_ids"]))                  # (U,)
    began = time.time()
    test, scores = recommend(model, trie, data, "test", everyone, args)  # (U, beam) both
    seconds = {"train": state["seconds"], "predict": time.time() - began}
    peak = peak_memory(args.device)  # of training and of one ranking
    valid, _ = recommend(model, trie, data, "valid", everyone, args)  # (U, beam)
    codes, log_p = trace_searches(model, trie, data, args)

    # What is needed to recommend: weights, tree, and the codes that histories show, in int16.
    tensors = [*model.parameters(), *trie.edges, *trie.allowed, trie.leaf_item, *model.tables()]
    bytes_of_codes = 2 * model.shown[1:].numel()
    run.save({
        "name": args.name,
        "seed": args.seed,
        "valid": valid,
        "test": test,
        "scores": scores,
        "seconds": seconds,
        "parameters": count_parameters(model),
        "bytes": sum(tensor.nbytes for tensor in tensors) + bytes_of_codes,
        "peak_memory": peak,
        "options": vars(args),
        "trace": {"target": args.target, "codes": codes, "log_p": log_p},
    }, f"predictions-{args.name}-s{args.seed}.pt")


# --- And then? What it recommends after some titles (--history) ----------------------------------


def show_recommendations(run, args):
    """Prints what a trained model recommends after the titles in --history; draws history.png."""
    saved = run.load(f"generator-{args.name}.pt", "this script without --history")
    images = run.load("images.pt", "01_data.py", mmap=True)["images"]  # (N+1, 3, S, S)
    data = run.load("data.pt", "01_data.py")
    trained = argparse.Namespace(**saved["options"])
    trained.device = args.device  # it may have been trained elsewhere
    sources = read_codes(run, data, trained)
    # Once more, now that the codes are read: made from others than these, it is refused.
    saved = run.load(f"generator-{args.name}.pt", "this script without --history")
    model, trie = build(sources, data, trained)
    if saved["weights"].keys() != model.state_dict().keys():
        fail(f"{run.folder}/generator-{args.name}.pt holds another model than this script's: ask "
             "the script that trained it.")
    model.load_state_dict(saved["weights"])
    model.eval()

    names = [f"{title} [{key}]" for title, key in zip(data["titles"], data["item_ids"])]
    history = find_items(args.history, data)[-trained.length:]
    batch = torch.tensor([history], device=args.device)             # (1, T)
    items, scores = beam_search(model, trie, batch, trained.beam)   # (1, beam) both

    print("after")
    for item in history:
        print(names[item])
    print("probably")
    new = []  # here, for a reader, what the history holds is left out
    for item, score in zip(items[0].tolist(), scores[0].tolist()):
        if item != 0 and item not in history:
            print(f"{math.exp(score):6.1%}  {names[item]}")
            new.append(item)

    page = draw_history(history[-10:], new[:10], images, names)
    with run.writing("history.png") as file:
        page.save(file, "PNG")


def find_items(wanted, data):
    """The items that --history means. -> list of item numbers"""
    # A title may hold the separator: then it is the whole of --history.
    if meant_by(wanted, data):
        parts = [wanted]
    elif ";" in wanted:
        parts = wanted.split(";")
    else:
        parts = wanted.split(",")

    history = []
    for part in parts:
        if not part.strip():  # behind a last ;
            continue
        found = meant_by(part, data)
        if len(found) != 1:
            some = [f"\n  {data['titles'][i]} [{data['item_ids'][i]}]" for i in found[:10]]
            fail(f"--history: {len(found)} titles have '{part.strip()}': give more of it, or an "
                 f"[id].{''.join(some)}")
        history += found
    if not history:
        fail("--history names no title: give titles, parts of titles or [ids], with ; between.")
    return history


def meant_by(part, data):
    """The items with this id; if there is none, with this title; else with this in their title.

    -> list of item numbers
    """
    part = part.strip().lower()
    if not part:
        return []
    items = range(1, len(data["item_ids"]))  # 0 is padding
    ids = [key.lower() for key in data["item_ids"]]
    titles = [title.lower() for title in data["titles"]]
    same_id = [i for i in items if part in (ids[i], f"[{ids[i]}]")]
    if same_id:
        return same_id
    same_title = [i for i in items if part == titles[i]]
    if same_title:
        return same_title
    return [i for i in items if part in f"{titles[i]} [{ids[i]}]"]


def draw_history(history, new, images, names):
    """The pictures of the history, and below them those of what may come next. -> Image"""
    page = Image.new("RGB", (1005, 290), "white")
    pen = ImageDraw.Draw(page)
    for row, items in enumerate((history, new)):
        for column, item in enumerate(items):
            x = 5 + 100 * column
            y = 5 + 145 * row
            pixels = images[item].permute(1, 2, 0).numpy()          # (S, S, 3)
            page.paste(Image.fromarray(pixels).resize((95, 95)), (x, y))
            title = textwrap.fill(names[item], 16, max_lines=3, placeholder="..")
            pen.text((x, y + 97), title, "black")
    return page


# --- Files, stopped runs, several processes (the same text in every script that has it) ----------
# Nothing below belongs to the method.


def fail(message):
    """Ends the script with one sentence and exit code 2: no traceback, nothing half-written."""
    print(message, file=sys.stderr)
    sys.exit(2)


def start(main):
    """Calls main(). Ctrl-C, a full disk, too little memory (of Python, of a GPU): one sentence."""
    if sys.version_info < (3, 11):
        fail(f"Python 3.11 or later is needed, this is {sys.version.split()[0]}.")
    sys.stdout.reconfigure(errors="replace")  # a console that lacks a letter shows ? in its place
    try:
        main()
    except KeyboardInterrupt:
        fail("stopped: give the same command again (never --fresh): it takes what is written.")
    except (OSError, MemoryError, torch.OutOfMemoryError) as error:  # OSError: a full disk, say
        fail(f"stopped ({type(error).__name__}: {error}): mend that, then run the same command.")


class Run:
    """The folder of one experiment: here the scripts meet, and nowhere else.

    It remembers the SHA-256 of every file that this script has read. Whatever the script saves
    carries them as `made_from`, so that codes of one shop never meet the events of another.
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        self.made_from = {}  # name of a file -> its SHA-256
        self.writes = True   # of several processes only the first one writes

    def load(self, name, maker, mmap=False):
        """Reads what the script `maker` wrote. -> dict of tensors, numbers, strings, lists, dicts

        Ends the script where the file is missing, damaged, foreign, or made from other files than
        those that were read before. mmap: tensors stay on the disk until they are used.
        """
        path = self.folder / name
        try:
            with zipfile.ZipFile(path) as parts:
                if parts.testzip() is not None:
                    raise ValueError("a checksum is wrong")
            artifact = torch.load(path, weights_only=True, map_location="cpu", mmap=mmap)
            if maker == "01_data.py":
                made_from = artifact["made_from"]  # KeyError: a foreign file of that name
            else:
                made_from = artifact.get("made_from", {})  # anybody may make codes, predictions
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except Exception as error:
            fail(f"{path} is missing or damaged ({type(error).__name__}): "
                 f"run {maker} with this --run.")
        for other, then in made_from.items():
            if self.made_from.get(other, then) != then:
                fail(f"{path} was made from another {path.with_name(other)}: run {maker} again.")
        self.made_from[name] = digest
        return artifact

    def save(self, artifact, name):
        """Writes a dict of tensors, numbers, strings, lists and dicts as a .pt file."""
        if self.writes:
            with self.writing(name) as file:
                torch.save({**artifact, "made_from": self.made_from}, file)

    @contextlib.contextmanager
    def writing(self, name):
        """Opens a file beside `name`, flushes it and renames it: nobody ever sees half a file."""
        path = self.folder / name
        partial = self.folder / f"{name}.partial"
        try:
            with open(partial, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except OSError as error:  # a full disk, a folder that is read-only
            fail(f"{path} cannot be written ({error}): make room, or choose another --run.")
        except RuntimeError:  # torch's word for a full disk
            fail(f"{path} cannot be written to its end: make room, or choose another --run.")
        finally:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)


def resume(run, name, args, **parts):
    """The state that a stopped run saved after its last whole epoch, or that of a new run.

    parts (model, optimizer, ..) are restored in place. Every epoch draws its own random numbers,
    so a run that goes on ends in the same bits as one that was never stopped.
    """
    path = run.folder / name
    if args.fresh or args.max_steps or not path.exists():
        return {"losses": [], "ndcg": [], "seconds": 0.0}
    state = run.load(name, "this script with --fresh")
    del run.made_from[name]  # results are not made from a checkpoint

    before = state["options"]
    if before["world"] != args.world:
        fail(f"{path} was begun by {before['world']} processes, not {args.world}: go on with as "
             "many, or use --fresh.")
    for option, now in vars(args).items():
        free = option in ("run", "device", "rank", "world", "fresh", "bf16")
        if not free and before.get(option) != now:
            fail(f"{path} began with --{option.replace('_', '-')} {before.get(option)}, not {now}: "
                 "go on so, or use --fresh.")
    for part_name, part in parts.items():
        part.load_state_dict(state[part_name])
    return state


def join(run):
    """Meets the other processes that torchrun started. -> number of this one, number of all"""
    if not dist.is_torchelastic_launched():
        return 0, 1
    dist.init_process_group()
    # At the end Python calls these from the last to the first: wait, as gloo's threads still hand
    # tensors back, then leave.
    atexit.register(dist.destroy_process_group)
    atexit.register(time.sleep, 0.5)
    if torch.cuda.is_available():
        local = int(os.environ["LOCAL_RANK"])
        torch.cuda.set_device(local % torch.cuda.device_count())
    rank = dist.get_rank()
    if rank > 0:  # only the first process prints and writes
        sys.stdout = open(os.devnull, "w")
        run.writes = False
    return rank, dist.get_world_size()


def add_up(x):
    """The sum of a tensor over all processes, in place. x: any shape -> the same tensor"""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def best_device():
    """cuda, mps or another accelerator of this machine, else cpu. -> str"""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator.type if accelerator else "cpu"


def peak_memory(device):
    """Most memory in use so far: the GPU's if it computes, else this process's. -> bytes, or nan"""
    if torch.device(device).type == "cuda":
        return torch.cuda.max_memory_allocated()
    if resource is None:  # Windows
        return math.nan
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if sys.platform == "darwin":
        return peak  # macOS counts in bytes
    return 1024 * peak  # Linux in KiB


if __name__ == "__main__":
    start(main)
