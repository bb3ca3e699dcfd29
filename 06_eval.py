"""The table: how good is every model of the run, how sure is that, what does it cost; in pictures.

Makes three rows itself, baselines that need no training; of other models it reads predictions, so
anybody's model joins by writing a file. It needs `name` and `test`; what else it lacks shows as a
dash. Each user's last event is the one item to be found among all N (leave-one-out, full ranking,
no sampled negatives). With rank_u its place in the list of user u, from 1:

    Recall@k = mean over users of  1 if rank_u <= k else 0
    NDCG@k   = mean over users of  1 / log2(rank_u + 1) if rank_u <= k else 0

    python 06_eval.py                    # after 02 to 05

Numbers in brackets, as [24], are the details that tests/README.md lists.

letters  U users, B users in a batch, N items, L codes of an item in one modality,
         K values of a code, S side of a picture, d width of a vector that is cut into codes
reads   data.pt, *_codes.pt; for pictures images.pt, sasrec.pt, generator-*.pt
        predictions-NAME-sSEED.pt
          name          str                the model's row in the table
          seed          int                of the training; 0 if it is missing
          valid         int32 (U, top)     items recommended for the validation event, best first
          test          int32 (U, top)     for the test event, the validation event known; 0: none
          scores        float32 (U, top)   of `test`
          seconds       dict               train; predict: for the test events of U users
          parameters    int                trained numbers
          bytes         int                of parameters, codes and prefix tree
          peak_memory   int                bytes, at the most; of the GPU where one computes
          options       dict               the options of that run
          trace         dict               what the search for `test` held, for the first n users;
                                           target: str, the modality whose codes are searched
                                           codes: int16 (n, L, beams, L), the likeliest prefixes
                                           of each level l, best first: l codes, then -1; -1: none
                                           log_p: float32 (n, L, beams), of a prefix; -inf: none
writes  results.md
        results.pt
          rows          dict               one a model: metrics, intervals, costs, seeds
          codes         dict               one a modality: use of its codes, what they mean
          options       dict               the options of this run
        recall.png, rarity.png             Recall@10 and intervals; by how rare the target is
        curves.png, codes.png              loss and validation over time; use of the codebooks
        tree-MODALITY.png                  items that share level 1, and levels 1 and 2
        neighbours.png                     what is next to an item by 03's vectors, and by pixels
        histories.png                      what six users had, and what is recommended to them
        one-item.png                       an item, its codes, and the search that finds it

On the toy shop: 8 seconds, 0.3 GiB (2 cores of an AMD EPYC).
"""
import argparse
import contextlib
import functools
import hashlib
import math
import os
import sys
import textwrap
import time
import unicodedata
import zipfile
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

METRICS = [("Recall", 1), ("Recall", 5), ("Recall", 10), ("NDCG", 5), ("NDCG", 10)]
RECALL_10 = 2   # its place in METRICS
NDCG_10 = 4     # and that of NDCG@10

# Columns of two tables: key of a row, heading, factor, format.
COSTS = [
    ("parameters", "parameters", 1, ",.0f"),
    ("bytes", "MB with codes, tree", 1e-6, ".1f"),
    ("train", "training s", 1, ".0f"),
    ("predict", "s / 1,000 users", 1, ".2f"),
    ("peak_memory", "peak GiB", 2**-30, ".1f"),
]
SHOWN = [
    ("coverage", "items shown", 1, ".0%"),
    ("gini", "Gini", 1, ".2f"),
    ("top_tenth", "best sellers among them", 1, ".0%"),
    ("popularity", "mean events", 1, ".0f"),
]


# --- Metrics -------------------------------------------------------------------------------------
# Two users, who bought item 7 and item 4 next, and the lists that they were shown:
#
#   target 7   top 7 2 9   rank 1
#   target 4   top 5 4 8   rank 2
#
# Over both, Recall@1 = (1 + 0) / 2 = .5 and NDCG@5 = (1 / log2(2) + 1 / log2(3)) / 2 = .815.
#
# DCG, discounted cumulative gain, adds up 1 / log2(rank + 1) of the items found; NDCG divides it by
# that of the best list possible. With one item to be found that is 1 / log2(2) = 1, so that NDCG
# is DCG here (Jarvelin and Kekalainen, ACM TOIS 2002).


def targets(data):
    """The items to be found: each user's last event. -> (U,)"""
    return data["events"][data["offsets"][1:] - 1]


def rank_of(target, top):
    """The place of each user's item in the list, from 1; infinite if it is not there.

    target: (U,), top: (U, top) -> (U,)
    """
    hit = top == target.unsqueeze(1)                                # (U, top)  [24]
    place = hit.float().argmax(1) + 1.0                             # (U,)
    return torch.where(hit.any(1), place, torch.inf)                # (U,)


def gains(rank):
    """What each user adds to each of METRICS. rank: (U,) -> (U, metrics)"""
    columns = []
    for name, k in METRICS:
        gain = torch.ones_like(rank)                                # (U,)
        if name == "NDCG":
            gain = 1 / torch.log2(rank + 1)                         # (U,)
        columns.append(gain * (rank <= k))                          # (U,)
    return torch.stack(columns, 1).double()                         # (U, metrics)


# --- Uncertainty ---------------------------------------------------------------------------------
# Had other users come and other seeds been drawn, by how much might a mean be another? What user u
# gains with the networks of seed s is thought of as a sum of four:
#
#   x[s, u] = mean + user[u] + seed[s] + rest[s, u]
#
#   user[u]       how easy this user is, whatever the seed
#   seed[s]       how good the networks of this seed are, whoever the user
#   rest[s, u]    the luck of this user with these networks
#
# The mean over U users and n seeds then has the variance
#
#   var(user) / U   +   var(seed) / n + var(rest) / (n U)
#   users' part         seeds' part
#
# Seeds' part: the means of the seeds have the variance var(seed) + var(rest) / U. Divided by n,
# that is the seeds' part.
# Users' part: the means of the users have the variance var(user) + var(rest) / n. Divided by U,
# that is the users' part plus var(rest) / (n U), which the seeds' part has already: it is taken
# off.
#
# The variance of thousands of users is well known, that of three seeds is not. For such cases
# Student found that 1.96 deviations, where 95 % of a normal distribution lie, must become a larger
# number t: 12.71, 4.30, 3.18, 2.78 for 2, 3, 4, 5 seeds. One number for each part,
#
#   (half the interval)^2 = 1.96^2 users' part + t^2 seeds' part
#
# (two models of other seeds have a seeds' part and a t each) gives an interval that holds the truth
# in 95 of 100 repetitions or more, however large either part is (Banerjee, Sankhya 22, 1960; a test
# counts). Seeds that agree by luck make no users sure: it is never narrower than for other users
# only, whose variance is (var(user) + var(rest) / n) / U. Of one seed nothing more can be known.


def student_t(degrees):
    """Student's t: with so many degrees of freedom T lies between -t and t in 95 of 100 cases.

    Neither Python nor PyTorch knows it, so its density is added up here.
    """
    # The density of T is proportional to (1 + T^2 / degrees)^(-(degrees + 1) / 2). To look at the
    # angle x with T = sqrt(degrees) tan(x) makes it short: x has the density cos(x)^(degrees - 1),
    # from -pi/2 to pi/2. It is the same on both sides: of the half from 0 on, thin strips are added
    # up until 95 % are together.
    strips = 100_000
    width = math.pi / 2 / strips
    middle = (torch.arange(strips, dtype=torch.double) + 0.5) * width  # (strips,)
    area = (middle.cos() ** (degrees - 1)).cumsum(0)                # (strips,)
    enough = torch.searchsorted(area, 0.95 * area[-1]).item() + 1
    return math.sqrt(degrees) * math.tan(enough * width)


def half_interval(*models):
    """Half the 95 % interval of a mean over users and seeds, or of the sum of several such means.

    For a difference hand in the second model with its sign changed: x - y = x + (-y), and
    variances are added either way.
    models: (seeds, U, metrics) each, of the same users, of seeds of its own -> (metrics,)
    """
    U = models[0].shape[1]
    by_user = sum(x.mean(0) for x in models)                        # (U, metrics)
    users_only = by_user.var(0, correction=0) / U  # 0, not nan, of a single user  # (metrics,)

    users_part = users_only.clone()                                 # (metrics,)
    squared = torch.zeros_like(users_only)                          # (metrics,)
    for x in models:
        n = len(x)
        if n > 1:
            by_seed = x.mean(1)                                     # (n, metrics)
            seeds_part = by_seed.var(0) / n                         # (metrics,)
            squared += student_t(n - 1) ** 2 * seeds_part           # (metrics,)

            # The gains of one user vary from seed to seed by var(seed) + var(rest).
            rest = x.var(0).mean(0) - by_seed.var(0)                # (metrics,)
            users_part -= rest / (n * U)                            # (metrics,)
    squared += 1.96 ** 2 * users_part                               # (metrics,)
    return torch.maximum(squared, 1.96 ** 2 * users_only).sqrt()


def interval_of_difference(ours, theirs, same_seeds):
    """95 % interval of mean(ours) - mean(theirs).  [24]

    Both models answer the same users, and models of one seed may share codes, or one made the
    other's (SASRec): what makes a user or a seed easy for both cancels in each difference x[s, u].
    If the seeds are not the same, only users are paired.

    ours, theirs: (seeds, U, metrics) -> low, high (2, metrics)
    """
    difference = ours.mean((0, 1)) - theirs.mean((0, 1))            # (metrics,)
    if same_seeds:
        half = half_interval(ours - theirs)                         # (metrics,)
    else:
        half = half_interval(ours, -theirs)                         # (metrics,)
    return torch.stack([difference - half, difference + half])      # (2, metrics)


# --- What the first tens favour ------------------------------------------------------------------
# A model may be right for many and yet show everybody the same few items.


def shown_items(top, rank, target, train_counts):
    """What the users' first tens favour.

    top: (U, top), rank, target: (U,), train_counts: (N+1,)
    -> coverage, gini, top_tenth, popularity: float; deciles: ten of them
    """
    first = top[:, :10]                                             # (U, 10)
    items = first[first > 0].long()                                 # (shown,)
    bought = train_counts[1:]                                       # (N,)
    N = len(bought)
    times = torch.bincount(items, minlength=N + 1)[1:].double()     # (N,) how often each is shown

    # The best-selling tenth of the items, and the share of all that is shown which is theirs.
    most_bought_first = bought.argsort(descending=True, stable=True)  # (N,)
    best = most_bought_first[:max(1, N // 10)]                      # (N / 10,)
    top_tenth = times[best].sum() / times.sum()                     # ()

    # Recall@10 of ten groups of users: those who look for the rarest items come first.
    rare_first = train_counts[target.long()].argsort(stable=True)   # (U,)
    deciles = []
    for part in rank[rare_first].tensor_split(10):                  # (U / 10,)
        deciles.append((part <= 10).double().mean().item())

    return {"coverage": (times > 0).double().mean().item(),
            "gini": gini(times),
            "top_tenth": top_tenth.item(),
            "popularity": train_counts[items].double().mean().item(),
            "deciles": deciles}


def gini(x):
    """How unevenly a sum is spread: 0 all have the same, near 1 one has it all. x: (n,) -> float

    Half the mean difference of two members, in units of the mean (Gini, 1912):
        gini = sum over i, j of |x_i - x_j| / (2 n^2 mean(x))
    """
    # Of n sorted numbers the i-th is the larger one in i - 1 pairs, the smaller one in n - i. So
    #   gini = sum_i (2 i - n - 1) x_i / (n sum(x)) = 2 sum_i i x_i / (n sum(x)) - 1 - 1 / n
    n = len(x)
    i = torch.arange(1, n + 1)                                      # (n,)
    weighted = (i * x.sort().values).sum()                          # ()
    return (weighted * 2 / x.sum() / n - 1 - 1 / n).item()


# --- What codes know -----------------------------------------------------------------------------
# Each of n items has a label x, such as its first code, and a label y, such as its colour. p(x) is
# the share of items with label x, count(x, y) how many have both. Then
#
#   entropy(x)    = - sum over x of p(x) log p(x)    0 if all are alike, log K if K are as frequent
#   perplexity(x) = exp(entropy(x))    so many equally frequent labels would have this entropy
#   information   = entropy(x) + entropy(y) - entropy(x, y)       what one label tells of the other
#   NMI           = 2 information / (entropy(x) + entropy(y))     0 nothing, 1 all, both ways
#   purity        = (1 / n) sum over x of max over y of count(x, y)
#
# NMI and purity: Manning, Raghavan and Schuetze, Introduction to Information Retrieval, 16.3.


def entropy(labels):
    """Of a column of labels, or of several columns together. (n, columns) -> nats"""
    _, count = labels.unique(dim=0, return_counts=True)             # (different,)
    share = count / len(labels)                                     # (different,)
    return torch.special.entr(share).sum().item()


def prefix_lengths(L):
    """The lengths of prefixes: 1, 2, 3 where L is 4. All L codes belong to one item alone."""
    return range(1, max(L, 2))


def use(codes, K):
    """How much of a codebook is in use, and how many items share a prefix.

    codes: (n, L) -> used: share of the K codes, perplexity: a number a level; unique: share of
    items alone, largest: items on the fullest prefix, a number for each of prefix_lengths(L)
    """
    stats = {"used": [], "perplexity": [], "unique": [], "largest": []}
    for level in codes.T:                                           # (n,)
        stats["used"].append(len(level.unique()) / K)
        stats["perplexity"].append(math.exp(entropy(level.unsqueeze(1))))
    for l in prefix_lengths(codes.shape[1]):
        _, sharing = codes[:, :l].unique(dim=0, return_counts=True)  # (prefixes,)
        alone = (sharing == 1).sum().item()
        stats["unique"].append(alone / max(1, len(codes)))
        stats["largest"].append(max(sharing.tolist(), default=0))
    return stats


def meaning(codes, category):
    """What prefixes of codes say of categories: NMI and purity.

    More prefixes raise both by chance, so that they are to be seen beside those of shuffled codes.
    codes: (n, L), category: (n,) -> nmi, purity: a number for each of prefix_lengths(L)
    """
    category = category.unsqueeze(1)                                # (n, 1)
    told = {"nmi": [], "purity": []}
    for l in prefix_lengths(codes.shape[1]):
        both = torch.cat([codes[:, :l], category], 1)               # (n, l + 1)
        apart = entropy(codes[:, :l]) + entropy(category)
        information = apart - entropy(both)
        told["nmi"].append(2 * information / max(apart, 1e-9))

        # count(x, y): how often a prefix x and a category y meet. Then the largest of each x.
        pairs, count = both.unique(dim=0, return_counts=True)       # (pairs, l + 1), (pairs,)
        prefixes, prefix = pairs[:, :l].unique(dim=0, return_inverse=True)  # .., (pairs,)
        commonest = torch.zeros(len(prefixes), dtype=torch.long)    # (prefixes,)
        commonest.scatter_reduce_(0, prefix, count, "amax")         # (prefixes,)
        told["purity"].append(commonest.sum().item() / len(codes))
    return told


# --- Baselines that need no training -------------------------------------------------------------
# A model that learns has to be ahead of those that only count. Three rows are made here, of the
# training events alone [2]: no count knows an event that is to be found, as validation or as test.
#
#   popularity      everybody gets the best sellers
#   last-item       what came next most often after the user's last item
#   co-occurrence   what anybody, this user too, had near the user's last items
#
# The last two add up the same sum. Of an item j that the user had, a places before the last one,
#
#   score(i) = sum over j of 0.5^a strength(j, i)
#
#   last-item       a is 0 only          strength(j, i) counts how often i came right after j
#   co-occurrence   a from 0 to 4        each time that i and j are gap <= 5 places apart in a
#                                        history, in either order, adds 1 / gap to strength(j, i)
#
# This form of co-occurrence was chosen by NDCG@10 on validation: on the toy shop of 1,050 and of
# 2,412 items, on Office and on MovieTweetings. To count near pairs for more (1 / gap, 0.5^a) was
# ahead on all four of counting all alike; sums were ahead of cosines on all but MovieTweetings.
# What a user had stays in the lists, as in 02.

LISTED = 20        # items that each of these baselines recommends
NEAR = 5           # places apart that co-occurrence looks at, and items of a history
NEIGHBOURS = 50    # kept of each item, the strongest


def popularity(data):
    """The baseline that knows no user: everybody gets the best sellers of the training events."""
    N = len(data["item_ids"]) - 1
    U = len(data["user_ids"])
    top = best_sellers(data)                                        # (top,)
    return {"name": "popularity", "test": top.expand(U, -1), "parameters": N,
            "bytes": 4 * N, "seconds": {"train": 0.0, "predict": 0.0}}


def last_item(data):
    """The baseline that knows the last item only: what came next in training."""
    before, after = training_pairs(data, 1)                         # (pairs,) both
    strength = torch.ones(len(before))                              # (pairs,)
    return by_neighbours("last-item", data, before, after, strength, length=1)


def co_occurrence(data):
    """The baseline that knows the last five items, and what anybody had near them."""
    before = []
    after = []
    strength = []
    for places in range(1, NEAR + 1):
        one, other = training_pairs(data, places)                   # (pairs,) both
        before += [one, other]
        after += [other, one]
        strength.append(torch.full((2 * len(one),), 1 / places))
    return by_neighbours("co-occurrence", data, torch.cat(before), torch.cat(after),
                         torch.cat(strength), length=NEAR)


def best_sellers(data):
    """-> int32 (top,) items with the most events in training, best first"""
    bought = data["train_counts"][1:]                               # (N,)
    order = bought.argsort(descending=True, stable=True)            # (N,)
    return order[:LISTED].int() + 1                                 # (top,)


def training_pairs(data, places):
    """Items that stand so many places apart in somebody's training events. -> (pairs,) both"""
    events = data["events"]                                         # (events,)
    offsets = data["offsets"]                                       # (U+1,)

    # Two rows of the log are a pair if the later one is in training of the earlier one's user.
    #   user         a a a a a b b b b         a's training ends before row 3, b's before row 7
    #   row          0 1 2 3 4 5 6 7 8         pairs one place apart: 0 1, 1 2, 5 6
    end = (offsets[1:] - 2).repeat_interleave(offsets.diff())       # (events,)
    later = torch.arange(len(events)) + places                      # (events,)
    earlier = (later < end).nonzero()[:, 0]                         # (pairs,)
    return events[earlier], events[earlier + places]                # (pairs,) both


def by_neighbours(name, data, before, after, strength, length):
    """Adds up strengths over the last `length` items of each user. -> as a file of predictions

    before, after, strength: (pairs,), a pair may come again
    """
    began = time.time()
    neighbours, strengths = strongest(data, before, after, strength)  # (N+1, kept) both
    counted = time.time()
    top = torch.zeros(len(data["user_ids"]), LISTED, dtype=torch.int32)  # (U, top)
    for users in torch.arange(len(top)).split(1000):
        history = newest_first(data, users, length)                  # (B, length)
        weight = 0.5 ** torch.arange(length)                        # (length,)
        items = neighbours[history].flatten(1)                      # (B, length * kept)
        score = strengths[history] * weight[:, None]                # (B, length, kept)
        top[users] = largest_sums(items, score.flatten(1))          # (B, top)
    top = fill_up(top, best_sellers(data))                          # (U, top)

    kept = (neighbours > 0).sum().item()
    return {"name": name, "test": top, "parameters": kept,
            "bytes": 8 * kept,  # the number of an item, and a strength
            "seconds": {"train": counted - began, "predict": time.time() - counted}}


def strongest(data, before, after, strength):
    """The strengths of equal pairs together, and of each item the neighbours with the largest.

    -> items, strengths (N+1, NEIGHBOURS) both, 0: none. There are no N x N numbers: most pairs of
    items never meet.
    """
    # A pair as one number: of N = 100 items, 3 and 7 are 3 * 101 + 7.
    N = len(data["item_ids"]) - 1
    pair = before.long() * (N + 1) + after                          # (pairs,)
    different, place = pair.unique(return_inverse=True)             # (different,), (pairs,)
    total = torch.zeros(len(different)).index_add_(0, place, strength)  # (different,)
    item = different // (N + 1)                                     # (different,)
    neighbour = different % (N + 1)                                 # (different,)

    # Among equally strong ones the best seller counts a little more.
    bought = data["train_counts"].float()                           # (N+1,)
    total += 0.01 * bought[neighbour] / bought.max().clamp(min=1)   # (different,)

    # By strength, then by item: a stable sort keeps the strongest of each item first.
    order = total.argsort(descending=True, stable=True)             # (different,)
    order = order[item[order].argsort(stable=True)]                 # (different,)
    item = item[order]                                              # (different,)

    # A neighbour's column is its place minus the place where those of its item begin:
    #   item    3 3 3 5 8 8
    #   place   0 1 2 3 4 5
    #   begin   0 0 0 3 4 4
    #   column  0 1 2 0 0 1
    size = torch.bincount(item, minlength=N + 1)                    # (N+1,) neighbours of each
    begin = size.cumsum(0) - size                                   # (N+1,)
    column = torch.arange(len(item)) - begin[item]                  # (different,)

    strong = column < NEIGHBOURS                                    # (different,)
    cell = (item[strong], column[strong])
    items = torch.zeros(N + 1, NEIGHBOURS, dtype=torch.int32)       # (N+1, NEIGHBOURS)
    items[cell] = neighbour[order][strong].int()
    strengths = torch.zeros(N + 1, NEIGHBOURS)                      # (N+1, NEIGHBOURS)
    strengths[cell] = total[order][strong]
    return items, strengths


def newest_first(data, users, length):
    """What users had before the item to be found, the last one first; 0: none. -> (B, length)"""
    begin = data["offsets"][users, None]                            # (B, 1)
    last = data["offsets"][users + 1, None] - 2                     # (B, 1) of the known events
    row = last - torch.arange(length)                               # (B, length)
    events = data["events"][row.clamp(min=0)]                       # (B, length)
    return torch.where(row >= begin, events, 0)                     # (B, length)


def largest_sums(items, score):
    """Adds up the scores of an item within a row. items, score: (B, n) -> (B, top), 0: none"""
    # Sorted, equal items stand together, and each different one gets a number:
    #   items    7 3 7 0           sorted   0 3 7 7       different   0 3 7 .
    #   scores   1 2 4 0           number   0 1 2 2       total       0 2 5 .      (. unused: 0)
    ordered, place = items.sort(1)                                  # (B, n) both
    new = torch.zeros_like(place)                                   # (B, n)
    new[:, 1:] = ordered.diff() > 0
    number = new.cumsum(1)                                          # (B, n)
    total = torch.zeros_like(score)                                 # (B, n)
    total.scatter_add_(1, number, score.gather(1, place))
    different = torch.zeros_like(items)                             # (B, n)
    different.scatter_(1, number, ordered)

    best = total.argsort(dim=1, descending=True, stable=True)[:, :LISTED]  # (B, top)
    return different.gather(1, best)                                # (B, top)


def fill_up(top, popular):
    """Puts best sellers where a list names nothing. top: (U, top), popular: (top,) -> (U, top)"""
    filled = []
    for part in top.split(10_000):  # as `repeats` looks at B * top * top pairs
        more = popular.expand(len(part), -1)                        # (B, top)
        repeats = (more.unsqueeze(2) == part.unsqueeze(1)).any(2)   # (B, top)
        both = torch.cat([part, more.masked_fill(repeats, 0)], 1)   # (B, 2 top)
        empty = (both == 0).int()                                   # (B, 2 top)
        order = empty.argsort(dim=1, stable=True)                   # (B, 2 top) named ones first
        filled.append(both.gather(1, order)[:, :LISTED])            # (B, top)
    return torch.cat(filled)                                        # (U, top)


def seen_pairs(data):
    """Of which users did the item to be found follow their last item in somebody's training?

    -> bool (U,)
    """
    N = len(data["item_ids"]) - 1
    before, after = training_pairs(data, 1)                         # (pairs,) both
    last = data["events"][data["offsets"][1:] - 2]                  # (U,)
    asked = last.long() * (N + 1) + targets(data)                   # (U,)
    return torch.isin(asked, before.long() * (N + 1) + after)       # (U,)


# --- The script ----------------------------------------------------------------------------------
# Reads what the other scripts and anybody else left in the folder of the run, writes tables, draws.


def options(argv):
    """The command line. -> argparse.Namespace"""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--run", default="runs/toy", help="folder of this experiment's .pt files")
    add("--seed", type=int, default=0, help="of shuffled codes, and of neighbours.png's candidates")
    # Two options that one loop over all six scripts can give.
    add("--device", default="auto", help="as in the other scripts; this one computes on the CPU")
    add("--smoke", action="store_true", help="as in the other scripts; nothing to make smaller")
    add("--against", default="sasrec", help="the model that the others are compared with")
    args = parser.parse_args(argv)
    if not 0 <= args.seed < 2 ** 32:
        fail(f"--seed {args.seed}: from 0 to below 2^32.")
    return args


def main(argv=None):
    """Reads everybody's predictions and codes, writes the tables, draws the pictures."""
    args = options(argv)
    run = Run(args.run)
    rng = torch.Generator().manual_seed(args.seed)
    data = run.load("data.pt", "01_data.py")

    models = read_predictions(run, data)
    seen = seen_pairs(data)                                         # (U,)
    rows = compare(models, args.against, seen)
    # Curves before codes: the codes that a model was made from may have been replaced since by
    # another seed's, and a file made from others than those that were read is refused.
    curves = read_curves(run)
    trees = read_codes(run, data)
    labels = labels_of_items(data)
    codes = describe_codes(trees, labels, rng)
    run.save({"rows": rows, "codes": codes, "options": vars(args)}, "results.pt")

    text = report(data, rows, seen, codes, trees, labels, args)
    with run.writing("results.md") as file:
        file.write(f"{text}\n".encode())
    print(text)

    # Pictures last: they need files that a run may lack.
    draw_recall(run, rows)
    draw_rarity(run, rows, data)
    draw_curves(run, rows, curves, data)
    draw_codes(run, codes)
    images = read_images(run, data)
    draw_trees(run, trees, labels, data, images)
    draw_neighbours(run, trees, data, images, rng)
    example = find_example(run, models, trees, data)
    draw_histories(run, models, example, data, images)
    draw_one_item(run, trees, example, data, images)


def read_predictions(run, data):
    """Everybody's recommendations, checked and measured. -> dict: name -> entries, one a seed"""
    models = {}
    for baseline in (popularity, last_item, co_occurrence):
        saved = baseline(data)
        models[saved["name"]] = [measure(saved, data)]
    paths = sorted(run.folder.glob("predictions-*.pt"))
    for path in tqdm(paths, "predictions", leave=False, disable=None):
        if path.name == "predictions-popularity-s0.pt":  # left by an older version of 02
            continue
        saved = run.load(path.name, "the script that made it", mmap=True)
        check_predictions(saved, path, data)
        entry = measure(saved, data)
        seeds = models.setdefault(str(saved["name"]), [])
        if entry["seed"] in [other["seed"] for other in seeds]:
            fail(f"{path} is a second file of {saved['name']} with seed {entry['seed']}: "
                 "delete one.")
        seeds.append(entry)
    for seeds in models.values():  # in order, so that seeds of two models meet
        seeds.sort(key=lambda entry: entry["seed"])
    print(f"checked: {len(paths)} files, {len(data['user_ids']):,} users: "
          "all ids of `test` are items of data.pt, none comes twice")
    return models


def check_predictions(saved, path, data):
    """Ends the script where a file holds no predictions, or none that fit data.pt."""
    N = len(data["item_ids"]) - 1
    U = len(data["user_ids"])
    if not {"name", "test"} <= saved.keys():
        fail(f"{path} lacks `name` or `test`: the docstring of 06_eval.py describes the file.")

    top = saved["test"]                                             # (U, top)
    good = torch.is_tensor(top) and not top.is_floating_point()
    good = good and top.ndim == 2 and len(top) == U and top.numel() > 0
    if not good or top.min() < 0 or top.max() > N:
        fail(f"{path}: `test` must hold item ids 1 to {N} (0: none) for {U} users, as data.pt "
             "does; it was made from other data: make it again or delete it.")

    if not isinstance(saved.get("seed", 0), int):
        fail(f"{path}: `seed` must be a whole number.")
    # In order of their ids, an item that comes twice stands beside itself.
    ordered = top.sort(1).values                                    # (U, top)
    twice = (ordered.diff() == 0) & (ordered[:, 1:] > 0)            # (U, top - 1)
    if twice.any():
        user = twice.any(1).nonzero()[0].item()
        fail(f"{path} recommends an item twice to user {user}.")


def measure(saved, data):
    """What the table says of one file of predictions: of one model, trained with one seed."""
    target = targets(data)                                          # (U,)
    top = saved["test"]                                             # (U, top)
    rank = rank_of(target, top)                                     # (U,)
    entry = {"seed": saved.get("seed", 0), "top": top, "gain": gains(rank)}
    entry |= {"trace": saved.get("trace", {}), "made_from": saved.get("made_from", {})}
    entry |= shown_items(top, rank, target, data["train_counts"])

    # What a file does not say is no number here, and a dash in the tables.
    seconds = saved.get("seconds", {})
    entry["train"] = seconds.get("train", math.nan)
    entry["predict"] = seconds.get("predict", math.nan) * 1000 / len(target)
    for key in ("parameters", "bytes", "peak_memory"):
        entry[key] = saved.get(key, math.nan)
    return entry


def compare(models, against, seen):
    """Means over seeds, and intervals. -> dict: name of a model -> dict, a row of the tables"""
    # sasrec is the default: a run without it has a table without differences.
    if against not in {"sasrec", *models}:
        fail(f"--against {against}: the run has predictions of {', '.join(models)}.")
    rows = {name: mean_of_seeds(seeds, seen) for name, seeds in models.items()}
    if against in models:
        theirs = gains_by_seed(models[against])                     # (seeds, U, metrics)
        for name, row in rows.items():
            if name != against:
                ours = gains_by_seed(models[name])                  # (seeds, U, metrics)
                # Both lists are in order, so seeds of one place are the same or none are paired.
                same_seeds = row["seeds"] == rows[against]["seeds"]
                interval = interval_of_difference(ours, theirs, same_seeds)
                row["interval"] = interval.tolist()                 # (2, metrics)
    return rows


def gains_by_seed(seeds):
    """The gains of a model's entries in one tensor. -> (seeds, U, metrics)"""
    return torch.stack([one["gain"] for one in seeds])


def mean_of_seeds(seeds, seen):
    """One row of the tables from a model's entries, one a seed. seen: bool (U,) -> dict"""
    # Users first: a seed has one Recall@10, and the deviation is that of the seeds.
    gain = gains_by_seed(seeds)                                     # (seeds, U, metrics)
    by_seed = gain.mean(1)                                          # (seeds, metrics)
    row = {"seeds": [one["seed"] for one in seeds],
           "mean": by_seed.mean(0).tolist(),
           "std": by_seed.std(0).tolist() if len(seeds) > 1 else None,
           "half": half_interval(gain).tolist(),
           "seen pairs": gain[:, seen].mean((0, 1)).tolist(),
           "new pairs": gain[:, ~seen].mean((0, 1)).tolist()}
    for key, *_ in COSTS + SHOWN:
        row[key] = sum(one[key] for one in seeds) / len(seeds)
    deciles = torch.tensor([one["deciles"] for one in seeds])       # (seeds, 10)
    row["deciles"] = deciles.mean(0).tolist()
    return row


def read_curves(run):
    """What training wrote down, epoch by epoch. -> dict: name of a model -> its artifact

    Of 02 SASRec alone: beside it, its variants would hide what the generators do.
    """
    paths = list(run.folder.glob("sasrec.pt"))  # an empty list where it is missing
    paths += sorted(run.folder.glob("generator-*.pt"))
    curves = {}
    for path in paths:
        name = path.stem.removeprefix("generator-")
        curves[name] = run.load(path.name, "02 or 05", mmap=True)
    return curves


def read_codes(run, data):
    """Everybody's codes: modalities may differ in K and in L. -> dict: modality -> its artifact"""
    trees = {}
    for path in sorted(run.folder.glob("*_codes.pt")):
        tree = run.load(path.name, "the script that made it", mmap=True)
        if not {"codes", "codebooks", "known"} <= tree.keys():
            fail(f"{path} lacks `codes`, `codebooks` or `known`: 04_text_codes.py describes them.")
        if len(tree["codes"]) != len(data["item_ids"]):
            fail(f"{path} has codes of {len(tree['codes']) - 1} items, data.pt has "
                 f"{len(data['item_ids']) - 1}: it was made from other data.")
        trees[path.name.removesuffix("_codes.pt")] = tree
    return trees


def labels_of_items(data):
    """What items may have in common: their category and, in the toy shop, what they were made of.

    -> dict: name -> int64 (N+1,), a number for each different label, -1: none (row 0 is not used)
    """
    # A category: the first of an item's own that fewer than half of the items have, as one that
    # all have ("Beauty" in a shop of cosmetics) would say nothing.
    N = len(data["item_ids"]) - 1
    frequent = Counter()
    for names in data["categories"]:
        frequent.update(set(names))
    categories = []
    for names in data["categories"]:
        rare = [name for name in names if 2 * frequent[name] < N]
        categories.append(rare[0] if rare else "")

    # Labels are numbered as they first occur, an empty one is -1: of hat, (none), bag, hat the
    # numbers are 0, -1, 1, 0. The toy shop's own categories take the place of the first ones.
    truth = data.get("meta", {}).get("truth", {})
    labels = {}
    for name, values in {"category": categories, **truth}.items():
        number = {"": -1}
        for value in values:
            number.setdefault(value, len(number) - 1)
        labels[name] = torch.tensor([number[value] for value in values])  # (N+1,)
    return labels


def describe_codes(trees, labels, rng):
    """Of each modality: use of its codes, what they say of each label, and shuffled codes beside.

    -> dict: modality -> dict
    """
    codes = {}
    for modality, tree in trees.items():
        K = tree["codebooks"].shape[1]
        stats = use(tree["codes"][tree["known"]], K)
        for name, label in labels.items():
            # Shuffled codes are dealt to items at random: as many items share a prefix as before,
            # but for no reason. What real codes say beyond that is not chance.
            some = tree["known"] & (label >= 0)                     # (N+1,)
            if some.any():
                of_items = tree["codes"][some].long()               # (n, L)
                order = torch.randperm(len(of_items), generator=rng)  # (n,)
                stats[name] = meaning(of_items, label[some])
                stats[f"{name}, shuffled"] = meaning(of_items[order], label[some])
        codes[modality] = stats
    return codes


# --- Tables --------------------------------------------------------------------------------------
# Each table is a header and rows of cells, all of them text.


def report(data, rows, seen, codes, trees, labels, args):
    """All tables and the sentences between them. -> str, as results.md has it"""
    # The best model stands last, next to the sentences.
    worst_first = sorted(rows, key=lambda name: rows[name]["mean"][NDCG_10])
    rows = {name: rows[name] for name in worst_first}
    U = len(data["user_ids"])
    N = len(data["item_ids"]) - 1
    return "\n".join([
        f"{U:,} users, {N:,} items, {len(data['events']):,} events; the item to find is each "
        "user's last, among all items.\n",
        quality_table(rows, args.against),
        "\n± standard deviation over seeds; [..] 95 % interval of the difference, for other users "
        "and other seeds\n(a model with one seed adds nothing for seeds: of two such models, for "
        "other users only). Where it holds zero,\nthese data do not tell the two apart.\n",
        pairs_table(rows, seen),
        "\nA pair is seen if the item to find came right after the user's last one in somebody's "
        "training events, else new.\n",
        cost_table(rows),
        "",
        shown_table(rows),
        "\nOf all first tens: share of the catalogue; Gini, 0 all alike, 1 one item; share of the "
        "best-selling tenth;\nmean of the events in training of what is shown.\n",
        codes_table(codes, trees),
        "",
        meaning_table(codes, labels)])


def markdown(header, rows):
    """A table that is readable both on the screen and on a web page: columns of one width."""
    width = [max(map(len, column)) for column in zip(header, *rows)]
    lines = []
    for row in [header, *rows]:
        cells = [cell.ljust(w) for cell, w in zip(row, width)]
        lines.append("| " + " | ".join(cells) + " |")
    rule = "|" + "|".join("-" * (w + 2) for w in width) + "|"
    return "\n".join([lines[0], rule, *lines[1:]])


def numbers(values, unit=1):
    """(0.25, 0.5) in per cent, unit = 100: "25, 50"."""
    return ", ".join(f"{unit * value:.0f}" for value in values)


def figures(row, columns):
    """The cells of a row for COSTS or SHOWN; a dash for what a file does not say."""
    cells = []
    for key, _, factor, form in columns:
        value = row[key] * factor
        cells.append("-" if math.isnan(value) else format(value, form))
    return cells


def quality_table(rows, against):
    """How good each model is, and whether it differs from the one called `against`. -> str"""
    header = ["model", "seeds"]
    header += [f"{name}@{k}" for name, k in METRICS]
    header += [f"Recall@10 - {against}", f"NDCG@10 - {against}"]
    # The best that any model could do is known of a toy shop: tests/questions.py ceiling.
    best = rows.get("best-possible")
    if best:
        header.append("share of best")
    table = []
    for name, row in rows.items():
        cells = [name, str(len(row["seeds"]))]
        for m, mean in enumerate(row["mean"]):
            spread = f" ± {row['std'][m]:.4f}" if row["std"] else ""
            cells.append(f"{mean:.4f}{spread}")
        for m in (RECALL_10, NDCG_10):
            if "interval" in row:
                low, high = row["interval"]
                cells.append(f"[{low[m]:+.4f}, {high[m]:+.4f}]")
            else:
                cells.append("")
        if best:
            cells.append(f"{row['mean'][NDCG_10] / best['mean'][NDCG_10]:.0%}")
        table.append(cells)
    return markdown(header, table)


def pairs_table(rows, seen):
    """How good each model is where counting could have known the pair, and where not. -> str"""
    header = ["model"]
    for group, users in (("seen pairs", seen), ("new pairs", ~seen)):
        header += [f"Recall@10, {group} ({users.sum():,} users)", "NDCG@10"]
    table = []
    for name, row in rows.items():
        cells = [name]
        for group in ("seen pairs", "new pairs"):
            for m in (RECALL_10, NDCG_10):
                mean = row[group][m]
                cells.append("-" if math.isnan(mean) else f"{mean:.4f}")
        table.append(cells)
    return markdown(header, table)


def cost_table(rows):
    """What each model costs. -> str"""
    header = ["model", *(column for _, column, _, _ in COSTS)]
    return markdown(header, [[name, *figures(row, COSTS)] for name, row in rows.items()])


def shown_table(rows):
    """What each model's first tens favour. -> str"""
    header = ["model", *(column for _, column, _, _ in SHOWN)]
    header.append("% Recall@10 by decile of the target's events, rare first")
    table = []
    for name, row in rows.items():
        table.append([name, *figures(row, SHOWN), numbers(row["deciles"], 100)])
    return markdown(header, table)


def deepest(codes):
    """L of the modality that has most levels."""
    return max((len(stats["perplexity"]) for stats in codes.values()), default=4)


def codes_table(codes, trees):
    """How each modality uses its codes; of the last level, against collisions, little. -> str"""
    L = deepest(codes)
    header = ["codes", "items known", "K", f"% of K used, levels 1-{L - 1}", f"perplexity, 1-{L}",
              f"% items alone after {numbers(prefix_lengths(L))}", "most items on one prefix",
              "moved"]
    table = []
    for modality, stats in codes.items():
        tree = trees[modality]
        known = tree["known"][1:].float().mean()                    # ()
        table.append([modality,
                      f"{known:.0%}",
                      str(tree["codebooks"].shape[1]),
                      numbers(stats["used"][:len(stats["unique"])], 100),
                      numbers(stats["perplexity"]),
                      numbers(stats["unique"], 100),
                      numbers(stats["largest"]),
                      str(tree.get("moved", "-"))])
    return markdown(header, table)


def meaning_table(codes, labels):
    """What codes and shuffled codes say of each kind of label. -> str"""
    lengths = numbers(prefix_lengths(deepest(codes)))
    header = ["codes", "and", f"NMI of prefixes of {lengths} levels", "if shuffled",
              "purity", "if shuffled"]
    table = []
    for modality, stats in codes.items():
        for label in labels:
            if label not in stats:  # no item of this modality has such a label
                continue
            cells = [modality, label]
            for key in ("nmi", "purity"):
                for told in (stats[label], stats[f"{label}, shuffled"]):
                    cells.append(", ".join(f"{x:.2f}" for x in told[key]))
            table.append(cells)
    return markdown(header, table)


# --- Charts --------------------------------------------------------------------------------------
# From here on pictures are drawn, with nothing but lines, polygons and letters. Whoever wants to
# know how models are compared need not read on.

WIDTH = 900     # of a PNG, in pixels
HEIGHT = 280    # of a panel

# How series look: ink, corners of the mark, degrees by which the mark is turned.
STYLES = [
    ("#1f3b5c", 30, 0),
    ("#d55e00", 4, 0),
    ("#7db8e8", 3, 0),
    ("#009e73", 4, 45),
    ("#b35c9e", 3, 180),
    ("#e0a000", 5, 0),
    ("#5b3a1e", 6, 0),
    ("#808080", 4, 20),
]


class Series(NamedTuple):
    """One line, or the bars of one ink."""
    style: int
    name: str
    points: list  # (x, y, low, high): the interval of y, or y itself


class Panel(NamedTuple):
    """A chart before it is drawn."""
    kind: str     # "lines" or "bars"
    title: str    # what y is, with its unit
    unit: str     # what x is
    labels: list  # of x = 0, 1, ..; None: x is a number
    series: list


class Axes:
    """Where the numbers of a panel lie on the canvas.

    left, top: of the panel, wide: with its margins, keys: names in a row of the legend
    """

    def __init__(self, panel, left, top, wide, keys):
        # From top to bottom: title, legend, the chart, labels and unit of x. All in pixels.
        self.wide = wide
        self.left = left + 120
        self.right = left + wide - 40
        self.title = top + 20
        self.legend = top + 84
        self.keys = keys
        more_rows = (len(panel.series) - 1) // keys  # of the legend
        self.top = top + 120 + 34 * more_rows
        self.bottom = top + 450

        # y begins at 0, but for lines that would then lie far up and flat.
        points = []
        for series in panel.series:
            points += series.points
        self.low = min(y for _, y, _, _ in points)
        self.high = 1.05 * max(high for _, _, _, high in points) + 1e-3
        if panel.kind == "bars" or self.low <= self.high / 2:
            self.low = 0

        # Labels stand at 0, 1, .., each in the middle of its room.
        if panel.labels:
            self.first = -0.5
            self.last = len(panel.labels) - 0.5
        else:
            self.first = 0
            self.last = max(x for x, _, _, _ in points)

    def place(self, x, y):
        """Numbers -> pixels."""
        right = (x - self.first) / (self.last - self.first)
        up = (y - self.low) / (self.high - self.low)
        return (self.left + right * (self.right - self.left),
                self.bottom - up * (self.bottom - self.top))


def chart(run, name, columns, panels):
    """Draws panels into one PNG, twice as large and then halved: so lines become smooth."""
    if not panels[0].series:
        print(f"{name} is not drawn: the run lacks what it shows")
        return
    # Panels fill the page row by row; a legend as wide as the page has room for six names.
    rows = math.ceil(len(panels) / columns)
    canvas = Image.new("RGB", (2 * WIDTH, 2 * HEIGHT * rows), "white")
    draw = ImageDraw.Draw(canvas)
    wide = 2 * WIDTH // columns
    for n, panel in enumerate(panels):
        left = n % columns * wide
        top = n // columns * 2 * HEIGHT
        axes = Axes(panel, left, top, wide, 6 // columns)
        draw_axes(draw, panel, axes)
        draw_legend(draw, panel, axes)
        if panel.kind == "lines":
            draw_lines(draw, panel, axes)
        else:
            draw_bars(draw, panel, axes)
    with run.writing(name) as file:
        canvas.reduce(2).save(file, "PNG")


def draw_axes(draw, panel, axes):
    """A grid line for each round number of y, marks of x, the title and the unit.

    Two letters say which point of a text is meant: "rm" is the middle of its right side.
    """
    for y in ticks(axes.low, axes.high):
        draw.line((axes.place(axes.first, y), axes.place(axes.last, y)), "#d0d0d0", 2)
        _, height = axes.place(0, y)
        draw.text((axes.left - 12, height), f"{y:.4g}", "black", font(24), "rm")

    # Below the axis: names, in the room that each has, or round numbers.
    marks = {}  # x -> what stands there
    if panel.labels:
        room = (axes.right - axes.left) / len(panel.labels)
        for x, label in enumerate(panel.labels):
            marks[x] = cut(label, room, 24, 2)
    else:
        for x in ticks(axes.first, axes.last):
            marks[x] = f"{x:.4g}"
    for x, mark in marks.items():
        side, _ = axes.place(x, 0)
        draw.text((side, axes.bottom + 14), mark, "black", font(24), "ma", align="center")

    corner = (axes.left, axes.bottom)
    draw.line(((axes.left, axes.top), corner, (axes.right, axes.bottom)), "black", 3)
    middle = (axes.left + axes.right) / 2
    draw.text((middle, axes.bottom + 100), panel.unit, "black", font(24), "md")
    draw.text((axes.left, axes.title), panel.title, "black", font(28))


def draw_legend(draw, panel, axes):
    """The mark and the name of each series, above the panel."""
    room = 240
    if len(panel.series) == 1:
        room = axes.right - axes.left  # a name alone has the row
    for i, series in enumerate(panel.series):
        x = axes.left + i % axes.keys * 275
        y = axes.legend + i // axes.keys * 34
        draw_mark(draw, panel, series, x + 12, y)
        name = cut(series.name, room, 24, 1)
        draw.text((x + 32, y), name, "black", font(24), "lm")


def draw_mark(draw, panel, series, x, y):
    """A polygon where lines cross it, a square in the legend of bars."""
    ink, corners, turn = look(series.style)
    if panel.kind == "bars":
        draw.regular_polygon((x, y, 12), 4, 0, ink)
    else:
        draw.regular_polygon((x, y, 12), corners, turn, ink)


def look(style):
    """The ink and the mark of a series. -> ink, corners, turn"""
    # After eight series the inks come again, each with the mark of the next one.
    again = style // len(STYLES)
    ink, _, _ = STYLES[style % len(STYLES)]
    _, corners, turn = STYLES[(style + again) % len(STYLES)]
    return ink, corners, turn


def draw_lines(draw, panel, axes):
    """Lines with marks, so that they can be told apart without colours too."""
    for series in panel.series:
        ink, _, _ = look(series.style)
        places = [axes.place(x, y) for x, y, _, _ in series.points]
        draw.line(places, ink, 4)
        each = math.ceil(len(places) / 15)  # of many points only some have a mark
        for x, y in places[::each]:
            draw_mark(draw, panel, series, x, y)


def draw_bars(draw, panel, axes):
    """Bars of one x stand side by side; a black line from low to high is the interval."""
    count = len(panel.series)
    half_bar = 0.4 / count  # in units of x
    has_room = axes.wide * half_bar > 26 * len(panel.labels)  # for numbers
    for i, series in enumerate(panel.series):
        ink, _, _ = look(series.style)
        for x, y, low, high in series.points:
            x += (2 * i + 1 - count) * half_bar
            box = (axes.place(x - half_bar, y), axes.place(x + half_bar, axes.low))
            draw.rectangle(box, ink, "black", 2)
            draw.line((axes.place(x, low), axes.place(x, high)), "black", 5)
            if has_room:
                number = f"{y:.3f}" if axes.high < 2 else f"{y:.0f}"
                draw.text(axes.place(x, high), number, "black", font(24), "md")


@functools.cache
def font(size):
    """The letters that come with Pillow. To read them takes longer than to draw with them."""
    return ImageFont.load_default(size)


def cut(text, width, size, most):
    """A text in at most `most` lines of about `width` pixels, in letters that the font has."""
    # NFKD takes letters and their accents apart; the accents are no ASCII and go.
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode().strip()
    length = font(size).getlength(plain)
    letters = width * len(plain) / max(1, length)
    lines = textwrap.wrap(plain, max(3, int(letters)), max_lines=most, placeholder="…")
    return "\n".join(lines)


def ticks(low, high):
    """At most seven round numbers from low to high: 1, 2 or 5 times a power of ten apart."""
    # The first step of .., 1, 2, 5, 10, 20, .. that makes at most six intervals.
    steps = []
    for power in range(-9, 9):
        steps += [digit * 10.0**power for digit in (1, 2, 5)]
    step = next(step for step in steps if step >= (high - low) / 6)
    first = math.ceil(low / step - 0.01)
    last = int(high / step + 0.01)
    return [i * step for i in range(first, last + 1)]


def best_first(rows):
    """The models' names, by Recall@10."""
    return sorted(rows, key=lambda name: rows[name]["mean"][RECALL_10], reverse=True)


def finite(xs, ys):
    """The points of a series without intervals; where y is no number there is none."""
    points = []
    for x, y in zip(xs, ys):
        y = float(y)
        if math.isfinite(y):
            points.append((x, y, y, y))
    return points


def draw_recall(run, rows):
    """recall.png: how good is every model, how sure is that."""
    names = best_first(rows)
    points = []
    for x, name in enumerate(names):
        mean = rows[name]["mean"][RECALL_10]
        half = rows[name]["half"][RECALL_10]
        # Two seeds far apart may make the interval wider than all that recall can be.
        low = max(0, mean - half)
        high = min(1, mean + half)
        points.append((x, mean, low, high))
    name = ("mean; black: its 95 % interval, for other users and other seeds "
            "(with one seed: for other users only)")
    series = Series(2, name, points)
    chart(run, "recall.png", 1, [Panel("bars", "Recall@10", "model", names, [series])])


def draw_rarity(run, rows, data):
    """rarity.png: Recall@10 of ten groups of users, by how rare the item is that they look for."""
    # Each group is named after its rarest and its most frequent item.
    bought = data["train_counts"][targets(data).long()]             # (U,)
    groups = []
    for part in bought.sort().values.tensor_split(10):              # (U / 10,)
        if len(part):
            groups.append(f"{part[0]}-{part[-1]}")

    series = []
    for style, name in enumerate(best_first(rows)):
        points = finite(range(10), rows[name]["deciles"])
        series.append(Series(style, name, points))
    title = "Recall@10 by how often the item to be found was bought in training"
    unit = "training events of that item: ten groups of users, as many in each"
    chart(run, "rarity.png", 1, [Panel("lines", title, unit, groups, series)])


def draw_curves(run, rows, curves, data):
    """curves.png: loss and validation over time, and the loss of each code."""
    losses = []
    ndcg = []
    by_code = []
    styles = {name: style for style, name in enumerate(best_first(rows))}
    for name, saved in curves.items():
        style = styles.get(name, len(styles))
        epochs = range(1, len(saved["ndcg"]) + 1)
        minutes = [saved["seconds"] / 60 * epoch / len(epochs) for epoch in epochs]
        # Of SASRec one loss an epoch, of a generator one for each of its L codes, whose sum is the
        # loss of an item: only those can be compared. All epochs are taken to be equally long.
        by_level = saved["losses"].view(len(epochs), -1)            # (epochs, L)
        losses.append(Series(style, name, finite(minutes, by_level.sum(1))))
        ndcg.append(Series(style, name, finite(minutes, saved["ndcg"])))
        if name in ("mscgrec", "plain-softmax"):
            levels = []
            for l, level in enumerate(by_level.T):                  # (epochs,)
                levels.append(Series(l, f"level {l + 1}", finite(epochs, level)))
            title = f"{name}: loss of each code, nats"
            by_code.append(Panel("lines", title, "epoch", None, levels))

    N = len(data["item_ids"]) - 1
    title = f"loss, nats (uniform over items: {math.log(N):.2f})"
    unit = "minutes of training and validation"
    panels = [Panel("lines", title, unit, None, losses),
              Panel("lines", "validation NDCG@10", unit, None, ndcg)]
    chart(run, "curves.png", 2, panels + by_code)


def draw_codes(run, codes):
    """codes.png: how much of each level's codebook is in use."""
    # With as many levels everywhere the last one is that of the collisions in each modality.
    L = deepest(codes)
    labels = [str(level) for level in range(1, L + 1)]
    if L > 1 and all(len(stats["used"]) == L for stats in codes.values()):
        labels[-1] += ": collisions"
    panels = []
    for title, key, unit in (("codes in use, % of K", "used", 100),
                             ("perplexity of the codes", "perplexity", 1)):
        series = []
        for style, (modality, stats) in enumerate(codes.items()):
            values = [unit * x for x in stats[key]]
            series.append(Series(style, modality, finite(range(L), values)))
        panels.append(Panel("bars", title, "level", labels, series))
    chart(run, "codes.png", 2, panels)


# --- Sheets of items -----------------------------------------------------------------------------
# Pictures with titles, in rows: what do items share whose codes begin alike?

COLUMNS = 11        # items in a row
CANDIDATES = 2000   # items that may be neighbours
GREY = 208          # instead of a picture


class Strip(NamedTuple):
    """A row of items; without items the label is a heading."""
    label: str
    items: list = ()
    framed: list = ()  # those that get a frame


def read_images(run, data):
    """-> uint8 (N+1, 3, S, S); a run without pictures has grey ones of one pixel"""
    if (run.folder / "images.pt").exists():
        return run.load("images.pt", "01_data.py", mmap=True)["images"]
    grey = torch.tensor(GREY, dtype=torch.uint8)                    # ()
    return grey.expand(len(data["item_ids"]), 3, 1, 1)              # (N+1, 3, 1, 1)


def sheet(run, name, strips, data, images):
    """Draws strips below one another into a PNG, a grey tile for an item without picture.

    images: uint8 (N+1, 3, S, S)
    """
    if not strips:
        print(f"{name} is not drawn: the run lacks what it shows")
        return
    # As high as if each strip had items; what headings do not need is cut off in the end.
    canvas = Image.new("RGB", (WIDTH, 100 * len(strips) + 8), "white")
    draw = ImageDraw.Draw(canvas)
    y = 8
    for strip in strips:
        size = 12 if strip.items else 15
        draw.text((8, y), strip.label, "black", font(size), spacing=5)
        for column, item in enumerate(strip.items):
            draw_item(canvas, 112 + 72 * column, y, item, data, images)
            if item in strip.framed:
                x = 108 + 72 * column
                draw.rectangle((x, y - 4, x + 71, y + 67), None, "#d55e00", 4)
        y += 100 if strip.items else 30
    with run.writing(name) as file:
        canvas.crop((0, 0, WIDTH, y)).save(file, "PNG")


def draw_item(canvas, x, y, item, data, images):
    """One item's picture, and below it the first words of its title."""
    canvas.paste(picture(item, 64, data, images), (x, y))
    title = cut(data["titles"][item] or data["item_ids"][item], 67, 11, 2)
    draw = ImageDraw.Draw(canvas)
    draw.text((x + 32, y + 68), title, "black", font(11), "ma", 2, "center")


def picture(item, side, data, images):
    """An item's picture, so many pixels wide and high; grey if it has none. -> Image"""
    if not data["has_image"][item]:
        return Image.new("RGB", (side, side), (GREY, GREY, GREY))
    pixels = images[item].permute(1, 2, 0)                          # (S, S, 3)
    return Image.fromarray(pixels.numpy()).resize((side, side), Image.Resampling.LANCZOS)


def most_bought(items, data):
    """Items by their events in training. (n,) -> (n,)"""
    bought = data["train_counts"][items]                            # (n,)
    return items[bought.argsort(descending=True, stable=True)]      # (n,)


def draw_trees(run, trees, labels, data, images):
    """tree-MODALITY.png: the four fullest first codes, and the two fullest branches of each."""
    for modality, tree in trees.items():
        strips = tree_strips(modality, tree, labels, data)
        sheet(run, f"tree-{modality}.png", strips, data, images)


def tree_strips(modality, tree, labels, data):
    """-> list of Strip"""
    # The most bought items first: of a long row only those are shown.
    known = most_bought(tree["known"].nonzero()[:, 0], data)        # (n,)
    codes = tree["codes"][known].long()                             # (n, L)
    strips = []
    for first, _ in Counter(codes[:, 0].tolist()).most_common(4):
        strips.append(Strip(f"{modality} codes that begin with {first}, two largest branches"))
        # The first code alone, then with each of the two second codes that most items have.
        prefixes = [[first]]
        if codes.shape[1] > 1:
            second = codes[codes[:, 0] == first, 1]                 # (that begin so,)
            for code, _ in Counter(second.tolist()).most_common(2):
                prefixes.append([first, code])

        for prefix in prefixes:
            begins_so = (codes[:, :len(prefix)] == torch.tensor(prefix)).all(1)  # (n,)
            items = known[begins_so]                                # (that begin so,)
            share, label = commonest_label(items, labels)
            strips.append(Strip(f"{', '.join(map(str, prefix))}, ..\n{len(items):,} items\n"
                                f"{share:.0%} one\n{label}", items[:COLUMNS].tolist()))
    return strips


def commonest_label(items, labels):
    """The kind of label that most of the items share: 90 % one colour, say. -> share, its name"""
    # Of each kind of label: how many items have the commonest one.
    counts = []
    for name, label in labels.items():
        number = label[items] + 1                                   # (n,) 0: none
        count = number.bincount(minlength=2)[1:].max().item()
        counts.append((count, name))
    count, name = max(counts)
    return count / len(items), name


def draw_neighbours(run, trees, data, images, rng):
    """neighbours.png: what is next to five best sellers of a sample, by 03's vectors, by pixels."""
    strips = []
    tree = trees.get("image", {})
    if images.shape[2] > 1 and "embeddings" in tree:
        strips = neighbour_strips(tree, data, images, rng)
    sheet(run, "neighbours.png", strips, data, images)


def neighbour_strips(tree, data, images, rng):
    """-> list of Strip"""
    # Distances to all items of a large catalogue would take long: a sample will do.
    known = tree["known"].nonzero()[:, 0]                           # (n,)
    some = torch.randperm(len(known), generator=rng)[:CANDIDATES]
    known = most_bought(known[some], data)                          # (n,)
    views = {"RQ-DINO": tree["embeddings"][known],                  # (n, d)
             "raw pixels": images[known].flatten(1).float()}        # (n, 3 * S * S)

    strips = []
    for i, item in enumerate(known[:5].tolist()):
        for name, x in views.items():
            distance = torch.cdist(x[i:i + 1], x)[0]                # (n,)
            closest = distance.argsort(stable=True)[:COLUMNS]       # (columns,)
            label = f"{name}:\nnearest to\nthe framed"
            strips.append(Strip(label, known[closest].tolist(), [item]))
    return strips


def draw_histories(run, models, example, data, images):
    """histories.png: of six users what they bought, and the first tens of five models.

    example: an Example, whose user comes first; or None
    """
    U = len(data["offsets"]) - 1
    # Five users, spread over all; of very few users some are the same.
    users = {f"user {user}": user for user in sorted({U * i // 10 for i in (1, 3, 5, 7, 9)})}
    if example:
        users = {f"user {example.user}, whom one-item.png is about": example.user} | users
    strips = history_strips(users, models, data)
    sheet(run, "histories.png", strips, data, images)


def history_strips(users, models, data):
    """users: dict, heading -> user -> list of Strip"""
    events = data["events"]
    offsets = data["offsets"]
    strips = []
    for heading, user in users.items():
        history = events[offsets[user]:offsets[user + 1]][-COLUMNS:].tolist()
        target = history[-1:]
        strips.append(Strip(f"{heading}; framed: the last item, to be found"))
        strips.append(Strip("history", history, target))
        for name in ("popularity", "sasrec", "tiger", "mscgrec", "lookahead"):
            if name in models:
                top = models[name][0]["top"][user, :10]             # (10,)
                strips.append(Strip(name, top[top > 0].tolist(), target))
    return strips


# --- One item, all the way through ---------------------------------------------------------------
# A slide for a lecture: an item, its vectors, its codes, and the search that finds it for a user.
# It is drawn twice as large as README shows it. All numbers are pixels.

SLIDE = 1520        # width
MARGIN = 24
TILE = 58           # a picture, wide and high
STEP = 62           # from one picture to the next
ROW = 116           # a node of the tree: its prefix, and pictures of what lies under it
MARK = "#d55e00"    # what is right


class Example(NamedTuple):
    """A user, and the search for what this user wants."""
    user: int
    places: str  # of the item to be found, in the lists of models
    rule: str    # by which the user was picked
    trace: dict  # of predictions, as the contract above says


def find_example(run, models, trees, data):
    """The first predictions that say what a search held give one. -> Example, or None"""
    for name in ("lookahead", "mscgrec"):
        for entry in models.get(name, []):
            if fits(entry, run, trees):
                return Example(*pick_user(name, entry, models, data), entry["trace"])
    return None


def fits(entry, run, trees):
    """Have these predictions the trace of a search in codes of this run?"""
    trace = entry["trace"]
    if not isinstance(trace, dict) or str(trace.get("target")) not in trees:
        return False
    # Of several seeds one has the codes that lie in the run.
    file = f"{trace['target']}_codes.pt"
    now = run.made_from[file]
    if entry["made_from"].get(file, now) != now:
        return False
    codes = trace.get("codes")                                      # (n, L, beams, L)
    log_p = trace.get("log_p")                                      # (n, L, beams)
    if not torch.is_tensor(codes) or codes.ndim != 4 or not torch.is_tensor(log_p):
        return False
    L = trees[trace["target"]]["codes"].shape[1]
    if codes.shape[1] != L or codes.shape[3] != L or codes.shape[:3] != log_p.shape:
        return False
    return 0 < len(codes) <= len(entry["top"])


def draw_one_item(run, trees, example, data, images):
    """one-item.png: an item, its vectors and codes, and the search that finds it for a user.

    example: an Example, or None
    """
    if example is None:
        print("one-item.png is not drawn: no predictions of lookahead or mscgrec have the `trace` "
              "of a search in the codes of this run")
        (run.folder / "one-item.png").unlink(missing_ok=True)  # it would be of other ones
        return
    user, places, rule, trace = example
    item = targets(data)[user].item()
    print(f"one-item.png: user {user}, item {item}. {rule}")

    slide = Slide(data, images)
    y = draw_buyers(slide, 8, item)
    y = draw_vectors(slide, y, item, trees)
    y = draw_search(slide, y, user, trace["codes"][user], trace["log_p"][user],
                    trees[trace["target"]])
    y = slide.heading(y, f"5  Place of the item in the list of recommendations: {places}")
    slide.write(MARGIN, y, rule, SLIDE - 2 * MARGIN, lines=4)
    with run.writing("one-item.png") as file:
        slide.page.crop((0, 0, SLIDE, y + 100)).save(file, "PNG")


RULE = ("{} those with the best place in {}'s list; of these those whose items all have a picture; "
        "of these the one whose item has the most training events. (A condition that no user meets "
        "is left out.)")


def pick_user(name, entry, models, data):
    """The user whose item is drawn. -> user, places of the item in lists, the rule; both in words

    name, entry: of the generator
    """
    n = len(entry["trace"]["codes"])
    target = targets(data)[:n].long()                               # (n,)
    places = {name: rank_of(target, entry["top"][:n])}
    for beside in ("mscgrec", "sasrec"):
        for other in models.get(beside, []):
            if other["seed"] == entry["seed"]:
                places[beside] = rank_of(target, other["top"][:n])  # (n,)

    # Step by step fewer users are left; the rule says in words what is done.
    users = torch.arange(n)                                         # (n,)
    begin = f"Of the first {n:,} users"
    if "sasrec" in places:
        users = keep_if_any(users, places["sasrec"] > 10)
        begin += " those whose item is not in sasrec's first ten; of these"
    if "mscgrec" in places and name != "mscgrec":
        users = keep_if_any(users, places["mscgrec"] <= 10)
        begin += " those whose item is in mscgrec's; of these"
    users = keep_if_any(users, places[name] == places[name][users].min())
    pictured = [data["has_image"][events_of(user, data)].all() for user in range(n)]
    users = keep_if_any(users, torch.stack(pictured))
    bought = data["train_counts"][target]                           # (n,)
    user = users[bought[users].argmax()].item()

    words = []
    for model, place in places.items():
        place = place[user].item()
        words.append(f"{model} {place:.0f}" if place < math.inf else f"{model} none")
    return user, ", ".join(words), RULE.format(begin, name)


def keep_if_any(users, good):
    """The users for whom this holds; all of them if it holds for none. good: bool (n,)"""
    kept = users[good[users]]                                       # (kept,)
    return kept if len(kept) else users


def events_of(user, data):
    """All events of a user, the last one is to be found. -> (events,)"""
    return data["events"][data["offsets"][user]:data["offsets"][user + 1]]


def bought_before(item, data):
    """Up to five items that each of three users took just before this one, in training.

    -> list of lists
    """
    # Of a best seller a thousand events will do.
    rows = (data["events"] == item).nonzero()[:1000, 0]             # (n,)
    users = torch.searchsorted(data["offsets"], rows, right=True) - 1  # (n,)
    histories = []
    for row, user in zip(rows.tolist(), users.tolist()):
        begin = max(row - 5, data["offsets"][user].item())
        end = data["offsets"][user + 1].item() - 2  # of training
        if begin < row < end:
            histories.append(data["events"][begin:row].tolist())
    # Those with the most pictures say most.
    histories.sort(key=lambda history: -data["has_image"][history].sum().item())
    return histories[:3]


class Slide:
    """What is drawn on, and where the pictures of items come from. images: uint8 (N+1, 3, S, S)"""

    def __init__(self, data, images):
        self.data = data
        self.images = images
        # Higher than it becomes with five beams; what is not needed is cut off in the end.
        self.page = Image.new("RGB", (SLIDE, 3000), "white")
        self.draw = ImageDraw.Draw(self.page)

    def write(self, x, y, text, width=SLIDE, size=22, lines=1, anchor="la"):
        """A text, cut to so many lines of this width. -> y of what follows"""
        text = cut(text, width, size, lines)
        self.draw.text((x, y), text, "black", font(size), anchor, 8)
        return y + (size + 10) * (1 + text.count("\n"))

    def heading(self, y, text):
        """A line across the slide, and a text below. -> y of what follows"""
        self.draw.line((MARGIN, y, SLIDE - MARGIN, y), "#a0a0a0", 2)
        self.write(MARGIN, y + 12, text, size=28)
        return y + 60

    def tiles(self, x, y, items, side=TILE):
        """Pictures side by side. -> x of what follows"""
        for item in items:
            self.page.paste(picture(item, side, self.data, self.images), (x, y))
            x += side + STEP - TILE
        return x

    def then(self, x, y, items, item):
        """Pictures of a history, an arrow, and the item that came next, framed."""
        x = self.tiles(x, y, items)
        middle = y + TILE // 2
        self.draw.line((x + 8, middle, x + 40, middle), "black", 4)
        self.draw.regular_polygon((x + 44, middle, 11), 3, 270, "black")
        self.tiles(x + 68, y, [item])
        self.draw.rectangle((x + 64, y - 4, x + 71 + TILE, y + TILE + 3), None, MARK, 5)

    def node(self, x, y, width, tree, prefix, among, noun):
        """A prefix, and some items whose codes begin so. among: bool (N+1,), those that count"""
        same = (tree["codes"][:, :len(prefix)] == torch.tensor(prefix)).all(1)  # (N+1,)
        items = most_bought((same & among).nonzero()[:, 0], self.data)  # (n,)
        # Pictures say more than grey: items that have one come first.
        grey = (~self.data["has_image"][items]).int()               # (n,)
        row = width - 76  # beside the prefix a probability may stand, beside pictures a number
        shown = items[grey.argsort(stable=True)][:max(0, row // STEP)]  # (shown,)

        self.write(x, y, ", ".join(map(str, prefix)), row)
        after = self.tiles(x, y + 32, shown.tolist())
        ending = "" if len(items) == 1 else "s"
        rest = x + width - after - 6
        self.write(after + 4, y + 34, f"{len(items):,} {noun}{ending}", rest, 20, 2)

    def bars(self, x, y, vector):
        """A bar for each coordinate, up or down from y. vector: (coordinates,)"""
        most = vector.abs().max().clamp(min=1e-9)                   # ()
        for up in (30 * vector / most).tolist():
            self.draw.rectangle((x, y - max(up, 0), x + 6, y - min(up, 0)), "#1f3b5c")
            x += 9


def draw_buyers(slide, y, item):
    """The item: picture, title, text, and what was bought before it. -> y of what follows"""
    data = slide.data
    y = slide.heading(y, "1  An item, and what was bought before it (training events)")
    slide.tiles(MARGIN, y, [item], 216)
    x = MARGIN + 240
    title = data["titles"][item] or data["item_ids"][item]
    below = slide.write(x, y, title, 700, 32, 2) + 8
    below = slide.write(x, below, data["texts"][item], 700, lines=3) + 8
    slide.write(x, below, f"bought {data['train_counts'][item]:,} times in training")
    for i, history in enumerate(bought_before(item, data)):
        left = SLIDE - MARGIN - 134 - STEP * len(history)
        slide.then(left, y + 4 + 75 * i, history, item)
    return y + 236


def draw_vectors(slide, y, item, trees):
    """The item's vectors, and its codes with the others that begin so. -> y of what follows"""
    left = 350  # of the codes
    y = slide.heading(y, "2  Its vectors")
    slide.write(left, y - 48, "3  Its codes, level by level, and the others that begin so", size=28)
    for name in ("image", "text", "collab"):
        tree = trees.get(name)
        if tree is None or not tree["known"][item]:
            slide.write(MARGIN, y, f"{name}: the item has none")
            y += ROW
            continue
        words = name
        if "embeddings" in tree:
            vector = tree["embeddings"][item]                       # (d,)
            words += f": {len(vector[:32])} of {len(vector)} numbers"
            slide.bars(MARGIN, y + 62, vector[:32])
        slide.write(MARGIN, y, words)

        others = tree["known"].clone()                              # (N+1,)
        others[item] = False
        code = tree["codes"][item].tolist()
        room = (SLIDE - MARGIN - left) // len(code)
        for l in range(len(code)):
            slide.node(left + room * l, y, room - 14, tree, code[:l + 1], others, "other")
        y += ROW
    return y + 8


def draw_search(slide, y, user, codes, log_p, tree):
    """A user's history, and the likeliest prefixes of each level. -> y of what follows

    codes: (L, beams, L), log_p: (L, beams), of the trace
    """
    *history, item = events_of(user, slide.data).tolist()
    y = slide.heading(y, f"4  User {user}'s history, and the search: each level's likeliest "
                         "prefixes, their probability, what begins so")
    most = (SLIDE - 2 * MARGIN - 140) // STEP
    slide.then(MARGIN, y + 4, history[-most:], item)
    y += TILE + 30

    L, beams, _ = codes.shape
    right = tree["codes"][item].tolist()
    all_items = torch.arange(len(tree["codes"])) > 0                # (N+1,)
    room = (SLIDE - 2 * MARGIN + 44) // L
    width = room - 60
    above = []  # the prefixes of the level before
    for l in range(L):
        x = MARGIN + 8 + room * l
        prefixes = codes[l, :, :l + 1].tolist()
        missing = "" if right[:l + 1] in prefixes else ": right one not here"
        slide.write(x, y, f"level {l + 1}{missing}", room)
        for i, prefix in enumerate(prefixes):
            if log_p[l, i] == -torch.inf:  # the tree has fewer
                continue
            marked = prefix == right[:l + 1]
            ink = MARK if marked else "#a0a0a0"
            thick = 5 if marked else 2
            top = y + 44 + ROW * i
            slide.draw.rectangle((x - 10, top - 8, x + width + 10, top + 98), None, ink, thick)
            slide.node(x, top, width, tree, prefix, all_items, "item")
            slide.write(x + width, top, f"{log_p[l, i].exp():.1%}", anchor="ra")
            if prefix[:l] in above:  # a line from what it continues
                start = (x + width + 10 - room, y + 90 + ROW * above.index(prefix[:l]))
                slide.draw.line((start, (x - 10, top + 46)), ink, thick)
        above = prefixes
    return y + 52 + ROW * beams


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


if __name__ == "__main__":
    start(main)
