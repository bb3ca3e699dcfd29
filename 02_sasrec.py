"""SASRec: a sequence model over item ids, and the collaborative codes that its embeddings give.

SASRec (Kang and McAuley, 2018) turns a history into a vector, whose inner product with the
embedding e_i of item i is the score of i as the next item; it learns from the training events,
which are all of a user's but the last two. The learning rate ends at zero after a stated number of
epochs; the epoch is kept that is best on validation. Its recommendations are the baseline of this
repository. Residual k-means then cuts each embedding into codes, the collaborative modality of
MSCGRec (arXiv 2602.03713): r_0 = e_i;  c_l = argmin_k ||r_{l-1} - C_l[k]||^2;
r_l = r_{l-1} - C_l[c_l].

    python 02_sasrec.py                          # after 01_data.py
    torchrun --nproc_per_node=2 -- 02_sasrec.py  # several GPUs; "--": torchrun would take --run

Numbers in brackets, as [4], are the details that tests/README.md lists.

letters  B users in a batch, T items of history, N items, U users, W windows cut from histories,
         E width of the model, H heads, L codes of an item in one modality, K values of a code,
         d width of a vector that is cut into codes
reads   data.pt; with --content also text_codes.pt, image_codes.pt, ..
writes  sasrec.pt
          weights           dict                 the best epoch's parameters, by name
          item_embeddings   float32 (N+1, E)     row 0 is padding
          losses            float32 (epochs)     mean training loss, nats a target
          ndcg              float32 (epochs)     validation NDCG@10, as 06_eval.py describes
          seconds           float                of training and validation
          options           dict                 the options of this run
        collab_codes.pt
          codes             int16 (N+1, L)       row 0 = -1; level 4 separates collisions
          codebooks         float32 (3, K, E)
          embeddings        float32 (N+1, E)     mean 0, one scale for all; zero where not known
          known             bool (N+1)           the item occurs in training
          moved             int                  items that redistribution moved
        predictions-sasrec-s0.pt                 as 06_eval.py describes

On the toy shop: 1.6 minutes, 0.4 GiB (2 cores of an AMD EPYC).
"""
import argparse
import atexit
import contextlib
import hashlib
import math
import os
import sys
import time
import zipfile
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

try:
    import resource
except ImportError:  # Windows
    resource = None

SAMPLED_FROM = 50_000      # items; larger catalogues train with a sampled softmax
NEGATIVES = 4096           # items that it draws, once a step, for all targets of the step
WEIGHT_DECAY = 0.5         # of AdamW: each step shortens all weights by this times its rate
WARM_UP = 0.02             # share of the training in which the learning rate rises
COOL_DOWN = 0.3            # share, the last one, in which it falls to zero
VALIDATION_USERS = 20_000  # at the most; their validation events decide which epoch is kept
RANKED_EVENTS = 8192       # events read at once when users are ranked
NAMED = "sasrec"           # every --name has it: no file of another script is replaced


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


# --- The model -----------------------------------------------------------------------------------
# A causal transformer: the vector at place t has seen the items up to t, and nothing later.


class Dropout(nn.Dropout):
    """As in torch, but from uniform numbers: on a CPU that takes about half the time."""

    def forward(self, x):
        if not self.training:
            return x
        kept = torch.rand_like(x) >= self.p     # as x, each with probability 1 - p
        return x * (kept / (1 - self.p))        # as x; the mean stays what it was


class Block(nn.Module):
    """Causal self-attention, then a feed-forward layer; each is added to what comes in."""

    def __init__(self, E, H, dropout):
        super().__init__()
        self.H = H
        self.dropout = Dropout(dropout)
        self.norm1 = nn.LayerNorm(E)
        self.norm2 = nn.LayerNorm(E)
        self.qkv = nn.Linear(E, 3 * E)
        self.out = nn.Linear(E, E)
        self.up = nn.Linear(E, 4 * E)
        self.down = nn.Linear(4 * E, E)

    def attend(self, x):
        # torch's fused attention does all that is needed here: scores, causal mask, softmax, mean.
        # 05 writes them out, because it adds a learnt bias and keeps the keys of earlier codes.
        B, T, E = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.H, E // self.H)            # (B, T, 3, H, E/H)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                            # (B, H, T, E/H) each
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, H, T, E/H)
        mixed = mixed.transpose(1, 2).reshape(B, T, E)                  # (B, T, E)
        return self.dropout(self.out(mixed))                            # (B, T, E)

    def feed_forward(self, x):
        inner = F.gelu(self.up(x))                                      # (B, T, 4E)
        return self.dropout(self.down(inner))                           # (B, T, E)

    def forward(self, x):
        x = x + self.attend(self.norm1(x))                              # (B, T, E)
        return x + self.feed_forward(self.norm2(x))                     # (B, T, E)


def normed(x):
    """Mean 0 and variance 1 in every row (a row of zeros stays so). x: (.., E) -> (.., E)"""
    return F.layer_norm(x, x.shape[-1:])                                # (.., E)


class SASRec(nn.Module):
    """Reads histories and says at each place which item may come next.

    The score of an item is the inner product of the output there with the item's vector, the same
    that goes in (there normed). content: (N+1, d), what else is known of the items (`--content`); a
    projection of it is added to their embeddings.
    """
    block = Block  # PostNormSASRec takes another one

    def __init__(self, N, T, E, H, layers, dropout, content=None):
        super().__init__()
        self.items = nn.Embedding(N + 1, E)  # ids start at 1; row 0 is never used
        self.positions = nn.Embedding(T, E)
        self.content = content  # no buffer, which several processes would send at every step
        self.project = None
        if content is not None:
            self.project = nn.Linear(content.shape[1], E, bias=False)
        self.dropout = Dropout(dropout)
        self.blocks = nn.ModuleList(self.block(E, H, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(E)

    def vectors(self):
        """The vector of every item. -> (N+1, E)"""
        if self.project is None:
            return self.items.weight                                    # (N+1, E)
        return self.items.weight + self.project(self.content)           # (N+1, E)

    def embed(self, history):
        """Which item and at which place. (B, T) -> (B, T, E)

        The item's vector goes in normed: how long it is says how readily the item is recommended,
        and weight decay keeps it short. What goes in depends on neither.
        """
        place = torch.arange(history.shape[1], device=history.device)   # (T,)
        x = self.items(history)                                         # (B, T, E)
        if self.project is not None:
            x = x + self.project(self.content[history])                 # (B, T, E)
        return normed(x) + self.positions(place)                        # (B, T, E)

    def forward(self, history):
        """Item ids (B, T) -> what is wanted after each of them (B, T, E)"""
        x = self.dropout(self.embed(history))                           # (B, T, E)
        for block in self.blocks:
            x = block(x)                                                # (B, T, E)
        return self.norm(x)                                             # (B, T, E)

    def score(self, hidden, table):
        """Scores of all items, for rankings. hidden: (n, E), table: their vectors (E, N) -> (n, N)

        The losses below have this product too, each where it serves them.
        """
        return hidden @ table                                           # (n, N)

    def loss(self, hidden, events, log_q, args):
        """What training makes smaller. Each of the events but the first is a target.

        hidden: (B, T, E) of the events before them, events: (B, T+1), log_q: (N+1,) for the sampled
        softmax, else None -> nats (), a sum over the targets
        """
        target = events[:, 1:].flatten()                                # (n,), n = B * T
        return chosen_loss(hidden.flatten(0, 1), self.vectors(), target, log_q, args)


def initialise(module):
    """Small random weights: the first loss is near that of a uniform guess. Biases: PyTorch's."""
    if isinstance(module, (nn.Linear, nn.Embedding)):
        nn.init.normal_(module.weight, std=0.02)


# A variant (`--post-norm`), another baseline: norms as in the first transformer, and a last layer,
# as BERT4Rec has one (there with a GELU, and nothing added to it).


class PostNormBlock(Block):
    """The norm stands behind each sum, not before each part."""

    def forward(self, x):
        x = self.norm1(x + self.attend(x))                              # (B, T, E)
        return self.norm2(x + self.feed_forward(x))                     # (B, T, E)


class PostNormSASRec(SASRec):
    """What comes in is normed too, and a linear layer is added to what comes out."""
    block = PostNormBlock

    def __init__(self, N, T, E, *rest):
        super().__init__(N, T, E, *rest)
        self.head = nn.Linear(E, E)

    def forward(self, history):
        x = self.norm(self.embed(history))                              # (B, T, E)
        x = self.dropout(x)                                             # (B, T, E)
        for block in self.blocks:
            x = block(x)                                                # (B, T, E)
        return x + self.head(x)                                         # (B, T, E)


# --- The loss ------------------------------------------------------------------------------------
# It decides every comparison with SASRec. The original trains with binary cross-entropy against one
# random item and reaches half to four fifths of the recall (tests/README.md; "Turning Dross into
# Gold", RecSys 2023). Here the item that came is compared with all others.


def cross_entropy(hidden, vectors, target):
    """-log softmax(hidden . vectors)[target], over all items but the padding, summed.  [4]

    hidden: (n, E), vectors: (N+1, E), target: item ids (n,) -> nats ()
    """
    table = vectors[1:].T                                               # (E, N)
    total = hidden.new_zeros(())                                        # ()
    # In parts of 256 targets (a large --batch has many): their scores stay in the cache.
    for part, wanted in zip(hidden.split(256), target.split(256)):
        scores = (part @ table).float()                                 # (256, N)
        total = total + F.cross_entropy(scores, wanted - 1, reduction="sum")
    return total


def sampled_cross_entropy(hidden, vectors, target, log_q):
    """The same with an estimate of the softmax's denominator, for large catalogues.

    The denominator is the target's own term plus the terms of all other items. Their sum is
    estimated from NEGATIVES items j, drawn with the probability q_j, their share of the training
    events: the mean of exp(score_j) / q_j over the draws is on average the sum over all of them.
    Without 1 / q_j popular items, which are drawn more often, would be pushed down more often
    (log-Q correction: importance sampling, Bengio and Senecal, 2008). An item without training
    events is never drawn: it is not in the sum.

    hidden: (n, E), vectors: (N+1, E), target: (n,), log_q: (N+1,) -> nats (), a sum
    """
    drawn = torch.multinomial(log_q.exp(), NEGATIVES, replacement=True)  # (NEGATIVES,)
    # One look-up for both: the gradient of each would be a whole (N+1, E) tensor.
    both = vectors[torch.cat([target, drawn])]                          # (n + NEGATIVES, E)
    right, wrong = both.split([len(target), NEGATIVES])                 # (n, E), (NEGATIVES, E)

    positive = (hidden * right).sum(1)                                  # (n,)
    # exp(score) / (NEGATIVES q), in logarithms.  [5]
    negative = hidden @ wrong.T - log_q[drawn] - math.log(NEGATIVES)    # (n, NEGATIVES)
    # Where the target itself was drawn, it is no negative.
    is_target = drawn == target.unsqueeze(1)                            # (n, NEGATIVES)
    negative = negative.masked_fill(is_target, -torch.inf)              # (n, NEGATIVES)

    scores = torch.cat([positive.unsqueeze(1), negative], 1)            # (n, 1 + NEGATIVES)
    return (scores.logsumexp(1) - positive).sum()                       # ()


def binary_cross_entropy(hidden, vectors, target):
    """The loss of the original SASRec, for comparison: one random item against each target.

    -log sigmoid(right) - log(1 - sigmoid(wrong)), as softplus(x) = log(1 + exp(x)). The original
    draws until the user never had the item; this takes any.
    hidden: (n, E), vectors: (N+1, E), target: (n,) -> nats (), a sum
    """
    random = torch.randint_like(target, 1, len(vectors))                # (n,)
    right = (hidden * vectors[target]).sum(1)                           # (n,)
    wrong = (hidden * vectors[random]).sum(1)                           # (n,)
    return (F.softplus(-right) + F.softplus(wrong)).sum()               # ()


def chosen_loss(hidden, vectors, target, log_q, args):
    """One of the three. hidden: (n, E), vectors: (N+1, E), target: (n,) -> nats (), a sum"""
    # In a large catalogue most of the work is hidden times all items: it may be in bfloat16.
    with torch.autocast(hidden.device.type, torch.bfloat16, enabled=args.bf16):
        if args.loss == "bce":
            return binary_cross_entropy(hidden, vectors, target)        # ()
        if log_q is None:
            return cross_entropy(hidden, vectors, target)               # ()
        return sampled_cross_entropy(hidden, vectors, target, log_q)    # ()


# --- A step of training, and its rate ------------------------------------------------------------
# The learning rate ends at zero after a number of epochs that is known before. To stop when
# validation no longer gets better saves time, but it takes a plateau for the end: a model may stand
# still for many epochs before it finds what the data hold (tests/README.md), and a baseline that is
# stopped there is none.


def learning_rate(done, peak):
    """peak * min(1, done / WARM_UP, (1 - done) / COOL_DOWN). done: share of the training, 0 to 1

    It rises at first, as Adam divides by a mean of squared gradients that it does not know yet.
    It is high for long, to get far. Then it falls: each batch pulls the weights its own way, and
    small steps settle in the middle of these pulls, where large ones jump about. (A cosine, which
    falls from the start, got less far here: tests/README.md.)
    """
    rise = done / WARM_UP
    fall = (1 - done) / COOL_DOWN
    return peak * min(1, rise, fall)


def train_step(model, replica, optimizer, lr, events, log_q, args):
    """One step of AdamW. events: (B, T+1), each of them but the first is a target.

    log_q: (N+1,) for the sampled softmax, else None
    -> this process's loss, summed over targets ()
    """
    hidden = replica(events[:, :-1])                                    # (B, T, E)
    loss = model.loss(hidden, events, log_q, args)                      # ()
    # Divided by --batch, not by n: a target weighs the same in a batch that is smaller.
    (loss / args.batch).backward()
    optimizer.param_groups[0]["lr"] = lr
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()                                                # ()


# --- Ranking -------------------------------------------------------------------------------------
# All N items are ranked for every user, never a sample of them. What a user had before stays in the
# ranking, as in most papers on codes (what that costs: tests/README.md).


@torch.no_grad()
def recommend(model, data, split, users, top, args):
    """The best items for the held-out event of some users; processes share the work.

    split: "valid" or "test", users: (n,), top: how many items
    -> items int32 (n, top), best first; their scores float32 (n, top)
    """
    model.eval()
    items = torch.zeros(len(users), top, dtype=torch.int32)             # (n, top)
    scores = torch.zeros(len(users), top)                               # (n, top)
    table = model.vectors()[1:].T                                       # (E, N)
    # 256 users at once: their scores stay in the cache. A GPU has more to do at once.
    at_once = 2048 if args.device == "cuda" else 256

    start, length = held_out_windows(split, data["offsets"], args.length)  # (U,) both
    start, length = start[users], length[users]                         # (n,) both
    torch.manual_seed(0)  # the same batches each time, so the same rounding and the same bits
    batches = equal_length_batches(length, RANKED_EVENTS)
    for batch in batches[args.rank::args.world]:
        T = int(length[batch[0]])
        history = events_at(data, start[batch], T, args)                # (B, T)
        last = model(history)[:, -1]                                    # (B, E)
        for rows, hidden in zip(batch.split(at_once), last.split(at_once)):
            best = model.score(hidden, table).topk(top)                 # (256, top)
            items[rows] = (best.indices + 1).int().cpu()  # item 0 is padding
            scores[rows] = best.values.cpu()
    # Each process filled the rows of its own users, the rest are 0: the sum has all rows.
    return add_up(items), add_up(scores)


# --- Codes: residual k-means of any vectors (the same text in 02, 03 and 04) ---------------------
# A codebook holds K centroids. Three numbers stand for a vector: its nearest centroid in the first
# codebook, the centroid of the second that is nearest to what the first one leaves, and once more.
# A fourth number tells apart the items that share all three.


def codebook_size(N):
    """K, our rule: the power of two nearest (in ratio) to sqrt(N), from 8 to 256, the paper's."""
    exponent = round(math.log2(max(N, 1)) / 2)
    return 2 ** min(8, max(3, exponent))


def nearest(x, codebook):
    """argmin_k ||x - C[k]||^2 for every row of x. x: (n, d), codebook: (K, d) -> (n,)"""
    # ||x - C[k]||^2 = ||x||^2 - 2 x . C[k] + ||C[k]||^2, and the first term is the same for all k.
    # So the nearest centroid has the least ||C[k]||^2 / 2 - x . C[k]: one product of matrices.
    half_norm = codebook.square().sum(1) / 2                        # (K,)
    codes = []
    for part in x.split(4096):  # few enough rows to stay in the processor's cache
        score = half_norm - part @ codebook.T                       # (part, K)
        codes.append(score.argmin(1))                               # (part,)
    return torch.cat(codes)                                         # (n,)


STEPS = 15  # of Lloyd's algorithm: after them centroids hardly move


def kmeans(x, K, rng):
    """K centroids for x. Where they end depends on where they start. So ten starts are tried on a
    part of x, and the one that ends with the least error goes on with more of it.

    x: (n, d), rng: torch.Generator -> codebook (K, d)
    """
    # 1,024 vectors a centroid find it as well as more would. Fewer than K vectors are repeated:
    # of 3 vectors and K = 5, the order 4 1 0 3 2 takes the vectors 1 1 0 0 2.
    order = torch.randperm(max(len(x), K), generator=rng)           # (max(n, K),)
    x = x[order[:1024 * K] % len(x)]                                # (sample, d)

    few = x[:64 * K]                                                # (few, d)
    candidates = []
    for _ in range(10):
        start = torch.randperm(len(few), generator=rng)[:K]         # (K,)
        candidates.append(lloyd(few, few[start], STEPS))
    best = min(candidates, key=lambda codebook: squared_error(few, codebook).sum())  # (K, d)
    return lloyd(x, best, STEPS)


def squared_error(x, codebook):
    """How far each vector is from its nearest centroid, squared. x: (n, d) -> (n,)"""
    return (x - codebook[nearest(x, codebook)]).square().sum(1)     # (n,)


def lloyd(x, codebook, steps):
    """Lloyd's algorithm: vectors join the nearest centroid, centroids move to their members' mean.

    x: (n, d), codebook: (K, d), where it starts -> (K, d)
    """
    for _ in range(steps):
        codes = nearest(x, codebook)                                # (n,)
        members = torch.bincount(codes, minlength=len(codebook))    # (K,)
        sums = torch.zeros_like(codebook).index_add_(0, codes, x)   # (K, d)

        # A centroid without members restarts at the vector that is served worst.  [8]
        empty = (members == 0).nonzero()[:, 0]                      # (empty,)
        if len(empty):
            error = (x - codebook[codes]).square().sum(1)           # (n,)
            worst = error.topk(len(empty)).indices                  # (empty,)
            sums[empty] = x[worst]                                  # (empty, d)
            members[empty] = 1                                      # (empty,)

        codebook = sums / members.unsqueeze(1)                      # (K, d)
    return codebook


def residual_kmeans(x, K, rng):
    """A codebook for x, one for what it leaves, one for what that leaves. (n, d) -> (3, K, d)"""
    codebooks = []
    for _ in range(3):
        codebook = kmeans(x, K, rng)                                # (K, d)
        codebooks.append(codebook)
        x = x - codebook[nearest(x, codebook)]                      # (n, d)
    return torch.stack(codebooks)                                   # (3, K, d)


def quantise(x, codebooks):
    """r_0 = x;  c_l = argmin_k ||r_{l-1} - C_l[k]||^2;  r_l = r_{l-1} - C_l[c_l],  l = 1, 2, 3.

    x: (n, d), codebooks: (3, K, d) -> codes (n, 3), what they leave of x, r_3 (n, d)
    """
    codes = []
    residual = x                                                    # (n, d)
    for codebook in codebooks:
        code = nearest(residual, codebook)                          # (n,)
        codes.append(code)
        residual = residual - codebook[code]                        # (n, d)  [7]
    return torch.stack(codes, 1), residual                          # (n, 3), (n, d)


def number_in_group(group, order):
    """Numbers the members of each group from 0: who comes first in `order` gets 0.

    group: (n,) the group of each member, order: (n,) a permutation of the members -> (n,)
    """
    # Bring each group together, its members in the given order.
    together = order[group[order].argsort(stable=True)]             # (n,)
    _, size = group[together].unique_consecutive(return_counts=True)  # (groups,)

    # A member's number is its place minus the place where its group begins:
    #   group   a a a b c c
    #   place   0 1 2 3 4 5
    #   begin   0 0 0 3 4 4
    #   number  0 1 2 0 0 1
    place = torch.arange(len(group))                                # (n,)
    begin = (size.cumsum(0) - size).repeat_interleave(size)         # (n,)
    number = torch.empty_like(group)                                # (n,)
    number[together] = place - begin                                # (n,)
    return number


def finish_codes(embeddings, known, codebooks, train_counts, rng):
    """Three codes by meaning and a fourth against collisions: no two items share all four.

    embeddings: (N+1, d); known: bool (N+1,), False where an item lacks this modality;
    codebooks: (3, K, d); train_counts: (N+1,), events in training
    -> codes int16 (N+1, L), row 0 = -1; how many items were moved to make room
    """
    K = codebooks.shape[1]
    codes, residual = quantise(embeddings, codebooks)               # (N+1, 3), (N+1, d)
    # An item without a vector gets random codes, as it may still be a target. Nothing serves it
    # well, so that it is the first to move where there is no room.
    codes[~known] = torch.randint(K, codes[~known].shape, generator=rng)  # (unknown, 3)
    residual[~known] = math.inf                                     # (unknown, d)

    # A prefix as one number, in base K: (3, 1, 4) is 3 K^2 + 1 K + 4.
    prefix = (codes * torch.tensor([K * K, K, 1])).sum(1)           # (N+1,)
    prefix[0] = -1  # padding shares its place with nobody

    # Level 4 has room for K items. Of a fuller prefix those move that are served worst.  [10]
    best_served_first = residual.square().sum(1).argsort(stable=True)  # (N+1,)
    moved = number_in_group(prefix, best_served_first) >= K         # (N+1,)
    if moved.any():
        redistribute(codes, prefix, moved, embeddings, codebooks)

    # Items of one prefix are numbered, the most bought first, so that 0 is the likeliest.  [9]
    most_bought_first = (-train_counts.long()).argsort(stable=True)  # (N+1,)
    collision = number_in_group(prefix, most_bought_first)          # (N+1,)
    codes = torch.cat([codes, collision.unsqueeze(1)], 1)           # (N+1, L)
    codes[0] = -1

    # Of the items that have a vector: how many codes do they use, how many share three codes?
    _, sharing = prefix[known].unique(return_counts=True)           # (prefixes,)
    alone = (sharing == 1).sum() / known.sum().clamp(1)             # ()
    used = [len(level.unique()) for level in codes[known].T]        # one number a level
    print(f"codes: K = {K}, in use at each level {used}; {alone:.0%} of the known items share "
          f"three codes with no other known one, {moved.sum()} items were moved")
    return codes.to(torch.int16), moved.sum().item()


def redistribute(codes, prefix, moved, embeddings, codebooks):
    """The paper's "empty-leaf redistribution": items of a full prefix find another with room.

    Each item in `moved` (N+1,) walks down the tree of prefixes once more, at each level into the
    nearest branch that has room. Changes codes (N+1, 3) and prefix (N+1,) in place.
    """
    # Entry p of behind[l] counts the items behind the prefix p of l + 1 codes. Were K = 10, then
    # behind[1][31] would count the items whose codes begin 3 1, with the branches 310, .. 319.
    K = codebooks.shape[1]
    stays = prefix[1:][~moved[1:]]                                  # (stays,)
    behind = [torch.bincount(stays // (K * K), minlength=K),        # (K,)
              torch.bincount(stays // K, minlength=K ** 2),         # (K^2,)
              torch.bincount(stays, minlength=K ** 3)]              # (K^3,)

    for item in moved.nonzero()[:, 0].tolist():
        residual = embeddings[item]                                 # (d,)
        node = 0  # the root
        for l, codebook in enumerate(codebooks):
            branches = behind[l][node * K:(node + 1) * K]           # (K,) a view
            full = branches == K ** (3 - l)                         # (K,) no room behind it
            distance = (residual - codebook).square().sum(1)        # (K,)
            k = distance.masked_fill(full, math.inf).argmin().item()
            branches[k] += 1
            codes[item, l] = k
            residual = residual - codebook[k]                       # (d,)
            node = node * K + k
        prefix[item] = node


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
    add("--name", default="sasrec", help="of its row and files (its codes: collab for sasrec)")
    add("--content", default="", help="add the vectors of these codes' files, as text,image")
    add("--loss", choices=("softmax", "bce"), default="softmax",
        help="over all items (of a large catalogue sampled), or the original one")
    add("--post-norm", action="store_true", help="norms as in the first transformer, a last layer")
    add("--length", type=int, default=20, help="T: events of history that the model sees")
    add("--width", type=int, default=64, help="E: width of the model, and of the item embeddings")
    add("--layers", type=int, default=2, help="transformer blocks")
    add("--heads", type=int, default=2, help="H: attention heads")
    add("--dropout", type=float, default=0.5, help="share of activations dropped in training")
    add("--lr", type=float, default=4e-3, help="the highest learning rate of AdamW")
    add("--batch", type=int, default=512, help="targets a training step, of each process")
    add("--epochs", type=int, default=60, help="passes over the training events, all are made")
    add("--max-steps", type=int, default=0, help="a trial: only so many, of one epoch")
    add("--fresh", action="store_true", help="start over: leave a stopped run's checkpoint aside")
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto",
        help="auto: bf16 on CUDA GPUs")
    add("--top", type=int, default=20, help="items recommended to a user")
    # --smoke changes defaults only: what is given on the command line outweighs it.
    given, _ = parser.parse_known_args(argv)
    if given.smoke:
        parser.set_defaults(epochs=2, width=16, layers=1)
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
    for name in ("length", "width", "layers", "heads", "batch", "epochs", "top"):
        if getattr(args, name) < 1:
            fail(f"--{name} {getattr(args, name)}: it starts at 1.")
    if args.width % args.heads:
        fail(f"--heads {args.heads} must divide --width {args.width}.")
    if not 0 <= args.dropout < 1:
        fail(f"--dropout {args.dropout}: from 0 to below 1.")
    if not 0 < args.lr < math.inf:
        fail(f"--lr {args.lr}: above 0.")
    if not 0 <= args.seed < 2 ** 32:
        fail(f"--seed {args.seed}: from 0 to below 2^32.")
    if args.max_steps < 0:
        fail(f"--max-steps {args.max_steps}: it starts at 0, which is no trial.")
    if NAMED not in args.name:
        fail(f"--name {args.name}: a --name has {NAMED} in it.")


def main(argv=None):
    """Trains SASRec, then writes its recommendations and the collaborative codes."""
    args = options(argv)
    run = Run(args.run)
    args.rank, args.world = join(run)
    torch.manual_seed(args.seed)

    data = run.load("data.pt", "01_data.py")
    model = build(run, data, args)
    state = train(model, run, data, args)  # goes on where a stopped run left off
    if args.max_steps:
        return
    model.load_state_dict(state["best"])
    write_recommendations(model, state, run, data, args)
    write_codes(model, state, run, data, args)
    if run.writes:
        (run.folder / f"{args.name}.checkpoint").unlink(missing_ok=True)


def build(run, data, args):
    """The model, on its device, with its first random weights. -> SASRec"""
    content = None
    if args.content:
        parts = []
        for modality in args.content.split(","):
            codes = run.load(f"{modality}_codes.pt", f"the script of {modality}_codes.pt")
            parts.append(codes["embeddings"])                           # (N+1, d) of this modality
        content = torch.cat(parts, 1)                                   # (N+1, d) of all
        # Adam moves every weight by as much, so long vectors would make content learn faster than
        # single items: they get length 1, not sqrt(d).
        content = content.to(args.device) / math.sqrt(content.shape[1])  # (N+1, d)

    kind = PostNormSASRec if args.post_norm else SASRec
    N = len(data["item_ids"]) - 1
    model = kind(N, args.length, args.width, args.heads, args.layers, args.dropout, content)
    model.apply(initialise)
    uniform = math.log(N)
    if args.loss == "bce":
        uniform = 2 * math.log(2)
    print(f"{args.name}: {count_parameters(model):,} parameters; "
          f"a uniform guess has loss {uniform:.3f}")
    return model.to(args.device)


def count_parameters(model):
    """How many numbers the model has. -> int"""
    return sum(weight.numel() for weight in model.parameters())


def train(model, run, data, args):
    """All epochs, each followed by validation. -> state, with the best one

    state: losses and ndcg of each epoch, seconds, best (weights by name).
    """
    validation_users = torch.randperm(len(data["user_ids"]))[:VALIDATION_USERS]  # (n,)
    replica = model  # the model itself, or what makes several processes agree on its gradients
    if args.world > 1:
        replica = nn.parallel.DistributedDataParallel(model)
    # Each step sets its rate. The decay is strong: without it the vectors learn the training events
    # by heart, and codes that are cut from them carry that on (tests/README.md).
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=WEIGHT_DECAY, fused=True)
    checkpoint = f"{args.name}.checkpoint"
    state = resume(run, checkpoint, args, model=model, optimizer=optimizer)
    began = time.time() - state["seconds"]  # the time of a stopped run counts

    for epoch in range(len(state["losses"]), args.epochs):
        loss = train_epoch(model, replica, optimizer, state, epoch, data, args)
        if args.max_steps:
            break
        ndcg = validate(model, data, validation_users, args)
        # The epoch is chosen on validation, never on test.  [6]
        if ndcg > max(state["ndcg"], default=-1):
            weights = model.state_dict().items()
            state["best"] = {name: weight.cpu().clone() for name, weight in weights}
        state["losses"].append(loss)
        state["ndcg"].append(ndcg)
        state["seconds"] = time.time() - began
        if epoch % 10 == 0:
            print(f"epoch {epoch:3d}  loss {loss:.3f}  validation NDCG@10 {ndcg:.4f}  "
                  f"{state['seconds']:.0f} s")
        run.save({**state, "model": model.state_dict(), "optimizer": optimizer.state_dict(),
                  "options": vars(args)}, checkpoint)

    if not args.max_steps:
        best = max(state["ndcg"])
        print(f"{len(state['ndcg'])} epochs, {state['seconds']:.0f} s; the best is epoch "
              f"{state['ndcg'].index(best)}: validation NDCG@10 {best:.4f}")
    return state


def train_epoch(model, replica, optimizer, state, epoch, data, args):
    """One pass over the training events. replica: the model, as several processes train it.

    -> mean loss, nats a target
    """
    torch.manual_seed(1000 * args.seed + epoch)  # the same batches in all processes
    start, length = training_windows(data["offsets"], args.length)      # (W,) both
    batches = equal_length_batches(length, args.batch * args.world)
    if args.rank > 0:  # but dropout of its own in each: process 3 takes the third number as seed
        own_seed = torch.randint(2 ** 31, (args.rank,))[-1]             # ()
        torch.manual_seed(own_seed.item())
    counts = data["train_counts"].to(args.device)                       # (N+1,)
    log_q = None
    if len(counts) - 1 > SAMPLED_FROM:
        log_q = (counts / counts.sum()).log()                           # (N+1,)

    model.train()
    total = torch.zeros((), device=args.device)                         # ()
    targets = 0
    todo = batches
    if args.max_steps:
        todo = batches[:args.max_steps]
    shown = f"epoch {epoch}, best NDCG@10 {max(state['ndcg'], default=0):.4f}"
    began = time.time()
    bar = tqdm(todo, shown, leave=False, disable=None)  # None: only on a terminal
    for number, batch in enumerate(bar):
        T = int(length[batch[0]])
        share = batch[args.rank::args.world]                            # (B,) of this process
        events = events_at(data, start[share], T + 1, args)             # (B, T+1)
        # The cuts of long histories move, so epochs differ in steps: count within this epoch.
        done = (epoch + (number + 0.5) / len(batches)) / args.epochs
        lr = learning_rate(done, args.lr)
        total += train_step(model, replica, optimizer, lr, events, log_q, args)  # ()
        targets += len(batch) * T
        # What is no number once stays none. To look, the processor waits for the GPU: so seldom.
        if number % 100 == 0 or number == len(todo) - 1:
            if not total.isfinite():
                fail(f"by step {number} the loss is no number: start over with a lower --lr and "
                     "--fresh.")

    if args.max_steps:
        hours = (time.time() - began) / 3600 * len(batches) / max(1, len(todo))
        print(f"{len(todo)} steps; an epoch has {len(batches):,}: {hours:.3g} hours")
    # A very small shop may have no training target.
    return add_up(total).item() / max(1, targets)


def validate(model, data, users, args):
    """NDCG@10 on the validation events of some users. -> float"""
    N = len(data["item_ids"]) - 1
    top, _ = recommend(model, data, "valid", users, min(10, N), args)   # (n, 10)
    target = data["events"][data["offsets"][1 + users] - 2]             # (n,)
    hit = top == target.unsqueeze(1)                                    # (n, 10)
    # The item at place 0 counts 1 / log2(2), at place 1 1 / log2(3), ..
    discount = torch.log2(2.0 + torch.arange(top.shape[1]))             # (10,)
    gain = hit / discount                                               # (n, 10)
    return gain.sum(1).mean().item()


def write_recommendations(model, state, run, data, args):
    """The best items for every user's test event and validation event."""
    everyone = torch.arange(len(data["user_ids"]))                      # (U,)
    top = min(args.top, len(data["item_ids"]) - 1)
    began = time.time()
    test, scores = recommend(model, data, "test", everyone, top, args)  # (U, top) both
    seconds = {"train": state["seconds"], "predict": time.time() - began}
    valid, _ = recommend(model, data, "valid", everyone, top, args)  # (U, top)
    show_example(test, data)
    run.save({
        "name": args.name,
        "seed": args.seed,
        "valid": valid,
        "test": test,
        "scores": scores,
        "seconds": seconds,
        "parameters": count_parameters(model),
        "bytes": 4 * count_parameters(model),
        "peak_memory": peak_memory(args.device),
        "options": vars(args),
    }, f"predictions-{args.name}-s{args.seed}.pt")


def show_example(test, data):
    """Prints one user's history and what is recommended to that user."""
    user = len(test) // 2
    history = data["events"][data["offsets"][user]:data["offsets"][user + 1]]  # (events,)
    names = [title or item_id for title, item_id in zip(data["titles"], data["item_ids"])]
    print(f"for example user {data['user_ids'][user]}, who at last took {names[history[-1]]}")
    print("  before that:", "; ".join(names[item] for item in history[-4:-1]))
    print("  recommended:", "; ".join(names[item] for item in test[user, :3]))


def write_codes(model, state, run, data, args):
    """The item embeddings, and the collaborative codes that are cut from them."""
    counts = data["train_counts"]                                       # (N+1,)
    known = counts > 0                                                  # (N+1,)
    items = model.vectors().detach().cpu()                              # (N+1, E)
    items[0] = 0  # the padding was never trained and never is an item

    # Mean 0, and one scale for all coordinates, which leaves every nearest centroid as it is.
    embeddings = (items - items[known].mean(0)) / items[known].std()    # (N+1, E)
    embeddings[~known] = 0

    rng = torch.Generator().manual_seed(args.seed)
    K = codebook_size(len(counts) - 1)
    codebooks = residual_kmeans(embeddings[known], K, rng)              # (3, K, E)
    codes, moved = finish_codes(embeddings, known, codebooks, counts, rng)  # (N+1, L)
    run.save({
        "weights": state["best"],
        "item_embeddings": items,
        "losses": torch.tensor(state["losses"]),                        # (epochs,)
        "ndcg": torch.tensor(state["ndcg"]),                            # (epochs,)
        "seconds": state["seconds"],
        "options": vars(args),
    }, f"{args.name}.pt")
    run.save({
        "codes": codes,
        "codebooks": codebooks,
        "embeddings": embeddings,
        "known": known,
        "moved": moved,
    }, f"{args.name.replace('sasrec', 'collab')}_codes.pt")  # collab-x for the name sasrec-x


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
