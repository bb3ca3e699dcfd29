"""Text codes: a sentence embedding of title, categories and description, cut into codes.

The embedding comes through one of three doors: a built-in encoder (tf-idf, then a randomised SVD;
nothing to download), a file of vectors that you made, or an OpenAI-compatible embeddings endpoint
(Ollama, vLLM, llama.cpp, text-embeddings-inference). Vectors of the last two are whitened first.
Then residual k-means cuts the vector e_i of item i, as in 02 (MSCGRec, arXiv 2602.03713), with the
codebook C_l of level l; a fourth code tells apart items that share these three:

    r_0 = e_i;  c_l = argmin_k ||r_{l-1} - C_l[k]||^2;  r_l = r_{l-1} - C_l[c_l],  l = 1, 2, 3

    python 04_text_codes.py                            # after 01_data.py
    python 04_text_codes.py --embeddings vectors.npy   # (N, any width), a row for each item
    python 04_text_codes.py --embed-url http://localhost:11434/v1/embeddings

Numbers in brackets, as [17], are the details that tests/README.md lists.

letters  N items, L codes of an item in one modality, K values of a code, d width of a vector
         that is cut into codes
reads   data.pt
writes  text_codes.pt
          codes        int16 (N+1, L)     row 0 = -1; level 4 separates collisions
          codebooks    float32 (3, K, d)
          embeddings   float32 (N+1, d)   mean 0, one scale for all; zero where not known
          known        bool (N+1)         the item has a word in title, categories or text; with
                                          --embeddings, a vector that is not zero
          moved        int                items that redistribution moved
          options      dict               the options of this run

On the toy shop: 5 seconds, 0.3 GiB (2 cores of an AMD EPYC).
"""
import argparse
import contextlib
import functools
import hashlib
import math
import os
import re
import sys
import zipfile
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import requests
import torch
import torch.nn.functional as F
from requests.adapters import HTTPAdapter, Retry
from tqdm import tqdm

WIDTH = 64         # dimensions of the built-in embedding; 256 put most short texts into a few codes
BUCKETS = 2 ** 20  # features are numbered by a hash; two that meet in a column count as one
SAMPLE = 20_000    # texts whose features and principal directions stand for all
WHITENED = 128     # principal directions kept of a language model's vectors, at the most


# --- Door one: the built-in encoder, features and their weights ----------------------------------
# A text becomes a long row, mostly zeros: a weight for each feature that stands in the text.
# Features are words, pairs of neighbouring words, and the groups of letters within a word.


def bucket(feature):
    """The column of a feature: a hash of its letters, the same in every process. str -> int"""
    return zlib.crc32(feature.encode()) % BUCKETS


# A shop has few words and says each of them often: each is taken apart once, and remembered.


@functools.lru_cache(maxsize=100_000)
def features_of_word(word):
    """The word and its letter n-grams, n = 3, 4, 5: they make `stripe` near `striped`.

    cat -> <ca <cat <cat> at> cat cat>, where < and > mark the ends of a word (the whole word and
    its three letters are one feature)
    -> the column of each, a list
    """
    marked = f"<{word}>"
    features = {word}
    for n in (3, 4, 5):
        for begin in range(len(marked) - n + 1):
            features.add(marked[begin:begin + n])
    # Sorted: Python's sets of strings change their order with every start, and sums with it.
    return [bucket(feature) for feature in sorted(features)]


def count_features(text):
    """How often each feature stands in a text; letter groups count once a word. -> Counter"""
    words = re.findall(r"\w+", text.lower())
    counts = Counter()
    for word, next_word in zip(words, words[1:]):
        counts[bucket(f"{word} {next_word}")] += 1
    for word in words:
        counts.update(features_of_word(word))
    return counts


def inverse_document_frequency(column, n):
    """How much a feature tells: log((1 + n) / (1 + df)) + 1, where df of the n texts have it.

    column: (entries,), each text's features once -> (BUCKETS,), 0 for a feature that is left out
    """
    df = column.bincount(minlength=BUCKETS)                     # (BUCKETS,)
    idf = ((1 + n) / (1 + df)).log() + 1                        # (BUCKETS,)

    # What only one text has makes no two alike, and on a real shop is most of all features: left
    # out.
    least = 2
    if df.max() < 2:  # nothing is shared: all stays
        least = 1
    return idf * (df >= least)                                  # (BUCKETS,)


def count_entries(texts):
    """How often each text has each feature, as a sparse matrix: three lists, of an entry its row
    (the text), its column (the feature) and its value.

    n texts -> row, column, tf: (entries,) each
    """
    row_parts = []
    column_parts = []
    tf_parts = []
    for text_number, text in enumerate(texts):
        counts = count_features(text)
        row_parts.append(np.full(len(counts), text_number))
        column_parts.append(np.fromiter(counts.keys(), np.int64, len(counts)))
        tf_parts.append(np.fromiter(counts.values(), np.float32, len(counts)))
    row = torch.from_numpy(np.concatenate(row_parts))           # (entries,)
    column = torch.from_numpy(np.concatenate(column_parts))     # (entries,)
    tf = torch.from_numpy(np.concatenate(tf_parts))             # (entries,)
    return row, column, tf


def tf_idf(texts, idf=None):
    """Sublinear tf-idf (Manning et al. 2008, section 6.4.1), rows of unit length (0 if empty).

        weight = (1 + log tf) * idf,  where tf is how often the text has the feature

    texts: n strings, idf: (BUCKETS,) of other texts, or None: of these
    -> sparse (n, features), one column for each feature whose idf is not 0; idf (BUCKETS,)
    """
    row, column, tf = count_entries(texts)                      # (entries,) each
    if idf is None:
        idf = inverse_document_frequency(column, len(texts))    # (BUCKETS,)

    # A feature that is left out has idf 0: its entries go.
    stays = idf[column] > 0                                     # (entries,)
    row = row[stays]                                            # (kept,)
    column = column[stays]                                      # (kept,)
    weight = (1 + tf[stays].log()) * idf[column]                # (kept,)

    # Of unit length, a long description is not farther from the others than a short title.
    squared_length = torch.zeros(len(texts))                    # (n,)
    squared_length.index_add_(0, row, weight.square())
    value = weight / squared_length.sqrt()[row]                 # (kept,)

    # The features that stay are numbered anew, without gaps:
    #   stays       no yes  no yes yes
    #   new column  -1   0   0   1   2
    new_column = (idf > 0).cumsum(0) - 1                        # (BUCKETS,)
    place = torch.stack([row, new_column[column]])              # (2, kept)
    features = new_column[-1].item() + 1
    size = (len(texts), features)
    # Without check_invariants torch warns that nothing is checked.
    return torch.sparse_coo_tensor(place, value, size, check_invariants=True), idf


# --- Door one: the built-in encoder, latent semantic analysis ------------------------------------
# Two texts of one thing may share no word: one says `mug`, the other `cup`. But both words stand
# beside `tea` and `glazed`. The singular value decomposition of the tf-idf matrix X
# (texts, features) finds features that keep the same company:
#
#     X = sum_j s_j left_j right_j^T,   s_1 >= s_2 >= ... >= 0
#
# right_j (features,) is a direction: a list of weights, large for features that go together;
# left_j (texts,) says how much of it each text has. (X is not centred, which would fill its zeros.)
# All directions are at right angles, and s_j^2 is how much of the rows' squared length lies along
# right_j. The first d keep more of it than any other d directions could. A text's coordinates along
# them, X right_1 .. X right_d, give its embedding (turned within their span, and of unit length),
# in which texts of mugs and of cups come to be near (Deerwester et al. 1990).


def principal_directions(matrix, d, rng):
    """What right_1 .. right_d span, by a randomised SVD (Halko et al. 2011, algorithm 4.4).

    An exact SVD of a large shop's matrix takes too long. But X is mostly zeros, so X^T (X v), two
    products, is cheap, and since (X^T X) right_j = s_j^2 right_j, p such rounds stretch each part
    of any vector v by its own factor:

        (X^T X)^p v = sum_j s_j^(2p) (right_j . v) right_j

    A random v has a part along every right_j, and the first ones outgrow the others. So d random
    vectors turn towards right_1 .. right_d: of a right_j whose s_j is half of s_d, five rounds
    leave (1/2)^10, a thousandth. Where s_j is hardly below s_d, right_j would do as well.

    matrix: sparse (n, features), the X above -> (features, d), columns of length 1 at right angles
    """
    directions = torch.randn(matrix.shape[1], d, generator=rng)     # (features, d)
    for _ in range(5):
        # Left alone, all d vectors would turn to right_1. QR sets them at right angles again and
        # keeps what they span; here, after X, where they are mostly shorter: n < features.
        basis = torch.linalg.qr(matrix @ directions).Q              # (n, d)
        directions = matrix.T @ basis                               # (features, d)

    # Which axes are used within the span does not matter: distances are the same, and k-means
    # sees nothing else.
    return torch.linalg.qr(directions).Q                            # (features, d)


def built_in(texts, rng):
    """Latent semantic analysis: each tf-idf row in its d principal directions. n texts -> (n, d)"""
    order = torch.randperm(len(texts), generator=rng)               # (n,)
    sample = [texts[i] for i in order[:SAMPLE]]
    matrix, idf = tf_idf(sample)                                    # (sample, features)
    features = matrix.shape[1]
    d = min(WIDTH, len(sample), features)
    directions = principal_directions(matrix, d, rng)               # (features, d)

    kept = (matrix @ directions).norm() / matrix.norm()             # ()
    print(f"built-in encoder: {features} features, {d} principal directions keep "
          f"{kept.square():.0%} of the rows' squared length")

    # A thousand rows at a time: memory stays small however many items there are. Rows of unit
    # length again: what counts is what a text speaks of, not how much of that is known here.
    parts = []
    for first in tqdm(range(0, len(texts), 1000), "embedding texts", leave=False, disable=None):
        rows, _ = tf_idf(texts[first:first + 1000], idf)            # (1000, features)
        parts.append(rows @ directions)                             # (1000, d)
    return F.normalize(torch.cat(parts))                            # (n, d)


# --- Door two: a file of vectors -----------------------------------------------------------------
# Any encoder will do: whoever has vectors saves them, a row for each item, and this script cuts
# them. A row of zeros says that nothing is known of that item.


def from_file(path, N):
    """Reads a .npy or .pt file of numbers. -> (N, width)"""
    try:
        if path.suffix == ".npy":
            x = torch.from_numpy(np.load(path, allow_pickle=False))
        else:
            x = torch.load(path, weights_only=True, map_location="cpu")
        is_numeric = torch.is_tensor(x) and not x.is_complex()
        if is_numeric:
            # A .pt file may hold a sparse tensor, or one that has a gradient.
            x = x.detach().to_dense().float()                       # (N, width)
    except Exception as error:
        fail(f"--embeddings {path} cannot be read ({type(error).__name__}): give a .npy or .pt.")
    if not is_numeric or x.ndim != 2 or len(x) != N or x.shape[1] == 0:
        fail(f"--embeddings {path} must be {N} rows of numbers, in data.pt's order: item_ids[1:].")
    return x                                                        # (N, width)


# --- Door three: an embeddings endpoint ----------------------------------------------------------
# A server, on this machine or elsewhere, runs a language model: texts go there, vectors come back.


def read_answer(reply, n):
    """The vectors of {data: [{index, embedding}, ..]}, in any order. -> (n, width)

    None where the answer is not n vectors of one width.
    """
    try:
        vectors = {}
        for row in reply.json()["data"]:
            vectors[row["index"]] = row["embedding"]
        x = torch.tensor([vectors[index] for index in range(n)]).float()  # (n, width)
    except (ValueError, KeyError, TypeError, RuntimeError, OverflowError):
        return None
    if len(vectors) != n or x.ndim != 2 or x.shape[1] == 0:
        return None
    return x


def from_endpoint(url, model, texts, batch):
    """Asks an OpenAI-compatible endpoint: POST {model, input: [text, ..]}. n texts -> (n, width)"""
    retries = RETRIES
    parts = []
    for first in tqdm(range(0, len(texts), batch), "embedding texts", leave=False, disable=None):
        part = texts[first:first + batch]
        question = {"model": model, "input": part}
        reply = ask(url, question, min(ATTEMPTS - 1, retries))
        retries -= len(reply.raw.retries.history)  # an entry for each failed request

        x = read_answer(reply, len(part))                           # (batch, width)
        if x is None or (parts and x.shape[1] != parts[0].shape[1]):
            fail(f"--embed-url {url} did not give a vector for each text, all of one width: check "
                 "--embed-model.")
        parts.append(x)
    return torch.cat(parts)                                         # (n, width)


# --- Whitening -----------------------------------------------------------------------------------
# A language model's vectors share a large mean, so that they lie in a narrow cone, and a few
# directions hold most of their variance and say little of the item. k-means goes by distances, so
# all three levels would cut those directions again and again, and unlike items would share codes.
# Whitening gives each direction the same say. The principal directions are the eigenvectors of the
# covariance:
#
#     covariance = sum_i (x_i - mean) (x_i - mean)^T / (n - 1)
#     covariance right_j = variance_j right_j,   variance_1 >= variance_2 >= ...
#
# Coordinate j of item i becomes (x_i - mean) . right_j / sqrt(variance_j), of variance 1.


def mean_and_covariance(x):
    """Of the rows of x, in double precision: (n, width) -> (width,), (width, width)

    4,096 rows at a time, as a copy of x would take as much memory again. Double, as a variance of
    1e-8 times the largest is beyond the seven digits of float32.
    """
    n, width = x.shape
    mean = torch.zeros(width, dtype=torch.float64)                  # (width,)
    for part in x.split(4096):
        mean += part.double().sum(0) / n                            # (width,)

    covariance = torch.zeros(width, width, dtype=torch.float64)     # (width, width)
    for part in tqdm(x.split(4096), "whitening", leave=False, disable=None):
        centred = part.double() - mean                              # (4096, width)
        covariance += centred.T @ centred                           # (width, width)
    return mean, covariance / max(n - 1, 1)  # of one item: 0


def whiten(x):
    """Principal coordinates, each of variance 1, at most WHITENED of them. (n, width) -> (n, d)"""
    n, width = x.shape
    if n < width:
        # n vectors need n coordinates at the most. With x^T = Q R, the rows of R^T are the same
        # vectors along the columns of Q: all lengths and angles stay, the covariance is small.
        x = torch.linalg.qr(x.T.double(), mode="r").R.T             # (n, n): width is n now

    mean, covariance = mean_and_covariance(x)                       # (width,), (width, width)
    variance, right = torch.linalg.eigh(covariance)                 # (width,), (width, width)
    variance = variance.flip(0)[:WHITENED]                          # (d,), largest first
    right = right.flip(1)[:, :WHITENED]                             # (width, d)

    # Directions of almost no variance may be rounding errors: to blow them up would add noise.
    square = covariance.trace() + mean.square().sum()               # (), about ||x_i||^2
    least = max(1e-8 * variance[0], 1e-12 * square)                 # ()
    keep = variance > least                                         # (d,)
    if not keep.any():  # one item, or all vectors equal
        return torch.zeros(n, 1)
    right = right[:, keep] / variance[keep].sqrt()                  # (width, d)

    parts = []
    for part in x.split(4096):
        coordinates = (part.double() - mean) @ right                # (4096, d)
        parts.append(coordinates.float())
    return torch.cat(parts)                                         # (n, d)


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
# One of the doors gives each item its vector, residual k-means cuts the vectors into codes.


def options(argv):
    """The command line. -> argparse.Namespace"""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--run", default="runs/toy", help="folder of this experiment's .pt files")
    add("--seed", type=int, default=0, help="of every random choice")
    add("--device", default="auto", help="as in the other scripts; this one computes on the CPU")
    add("--smoke", action="store_true", help="tiny sizes: nothing to make smaller here")
    add("--embeddings", help="file of ready vectors: .npy or .pt, N rows")
    add("--embed-url", help="OpenAI-compatible endpoint; its key is read from OPENAI_API_KEY")
    add("--embed-model", default="nomic-embed-text", help="model that the endpoint is asked for")
    add("--embed-batch", type=int, default=64, help="texts in one request")
    args = parser.parse_args(argv)
    if args.embed_batch < 1:
        fail("--embed-batch starts at 1.")
    if not 0 <= args.seed < 2 ** 32:
        fail("--seed is a number from 0 to 4294967295.")
    if args.embeddings and args.embed_url:
        fail("Give --embeddings or --embed-url, not both.")
    return args


def main(argv=None):
    """Each item's text or vector in, text_codes.pt out."""
    args = options(argv)
    run = Run(args.run)
    data = run.load("data.pt", "01_data.py")

    vectors, known = embed_items(data, args)                        # (n, d), (N+1,)
    embeddings = standard_embeddings(vectors, known)                # (N+1, d)
    save_codes("text_codes.pt", embeddings, known, data, run, args)


def save_codes(name, embeddings, known, data, run, args, codebooks=None):
    """Cuts vectors into codes, and writes both as a file whose codes 05 can read and write.

    embeddings: (N+1, d), as standard_embeddings gives them; known: (N+1,); codebooks: (3, K, d) of
    tests/related, or None: those of residual k-means
    """
    rng = torch.Generator().manual_seed(args.seed)
    K = codebook_size(len(known) - 1)
    if codebooks is None and known.any():
        codebooks = residual_kmeans(embeddings[known], K, rng)      # (3, K, d)
    elif codebooks is None:
        codebooks = torch.zeros(3, K, 1)                            # (3, K, d)
    codes, moved = finish_codes(embeddings, known, codebooks, data["train_counts"], rng)

    artifact = {
        "codes": codes,                                             # (N+1, L)
        "codebooks": codebooks,                                     # (3, K, d)
        "embeddings": embeddings,                                   # (N+1, d)
        "known": known,                                             # (N+1,)
        "moved": moved,
        "options": vars(args),
    }
    run.save(artifact, name)


def item_text(title, categories, description):
    """What is known of an item as one text: `Red mug. Mugs, Kitchen. Made by hand.` -> str"""
    parts = [title, ", ".join(categories), description]
    return ". ".join(part for part in parts if part)


def embed_items(data, args):
    """Goes through the door that args names. -> vectors (n, d) of the known items, known (N+1,)"""
    fields = zip(data["titles"], data["categories"], data["texts"])
    all_texts = [item_text(*field) for field in fields]  # N+1 of them; that of item 0 is empty
    N = len(all_texts) - 1

    # Which items are known: by a vector that is not zero, or by a text that has a word.
    if args.embeddings:
        x = from_file(Path(args.embeddings), N)                     # (N, width)
        known = F.pad((x != 0).any(1), (1, 0))                      # (N+1,), item 0 is not
    else:
        has_word = [re.search(r"\w", text) is not None for text in all_texts]
        known = torch.tensor(has_word)                              # (N+1,)
    items = known.nonzero()[:, 0]                                   # (n,)
    texts = [all_texts[item] for item in items]  # n of them

    print(f"{len(items)} of {N} items are known")
    if len(items) == 0:
        return torch.zeros(0, 1), known
    print(f"the first of them: {texts[0][:150]!r}")

    # Their vectors, through one of the three doors.
    if args.embeddings:
        x = x[items - 1]                                            # (n, width)
    elif args.embed_url:
        x = from_endpoint(args.embed_url, args.embed_model, texts, args.embed_batch)
    else:
        rng = torch.Generator().manual_seed(args.seed)
        return built_in(texts, rng), known                          # (n, d), (N+1,)

    # Vectors that were made elsewhere may be broken, and lie in a cone.
    refuse_nan(x, [data["item_ids"][item] for item in items])
    return whiten(x), known                                         # (n, d), (N+1,)  [17]


def refuse_nan(x, item_ids):
    """Ends the script where a vector holds NaN or infinity: one would make all of them NaN.

    x: (n, width), item_ids: n of them
    """
    # The least of some numbers that hold a NaN is NaN.
    least, greatest = x.aminmax(dim=1)                              # (n,), (n,)
    finite = least.isfinite() & greatest.isfinite()                 # (n,)
    for item_id, is_finite in zip(item_ids, finite.tolist()):
        if not is_finite:
            fail(f"The vector of item {item_id} holds NaN or infinity: make it again.")


def standard_embeddings(vectors, known):
    """Mean 0 in each column, mean square 1 over all: a row for each item. (n, d) -> (N+1, d)

    05's tokens start from the centroids, and what all items share would drown what tells them
    apart. No code is changed, as centroids move and grow with the vectors. (Whitened vectors have
    almost this form already.)
    """
    centred = vectors - vectors.mean(0)                             # (n, d)
    scale = centred.square().mean().sqrt().clamp(min=1e-6)          # ()
    embeddings = torch.zeros(len(known), centred.shape[1])          # (N+1, d)
    embeddings[known] = centred / scale                             # (n, d)
    return embeddings


# --- Requests that are repeated ------------------------------------------------------------------
# Door three: an endpoint may be busy, restarting, or gone. Nothing here belongs to the method.

TIMEOUT = (10, 120)  # seconds to connect, seconds to wait for an answer
ATTEMPTS = 5         # at one request; after an answer that is cut off, one less
RETRIES = 50         # failures that one run forgives, all together; answers cut off, and what
#                      failed before them in a request, are bounded by ATTEMPTS only
LONGEST_WAIT = 60    # seconds, whatever the endpoint asks for
TRY_AGAIN = [429, *range(500, 600)]  # "too many requests", and the server's own errors


class Patience(Retry):
    """urllib3's rules of asking again, with an end to what Retry-After may ask for."""

    def parse_retry_after(self, header):
        try:
            seconds = super().parse_retry_after(header)
        except Exception:  # neither a whole number nor a date
            seconds = 0
        return min(seconds, LONGEST_WAIT)


def patient_session(retries):
    """A requests session that asks up to `retries` times more where the endpoint is busy or gone.

    It waits as long as Retry-After says, else 0, 2, 4, then 8 seconds.
    """
    patience = Patience(
        retries,
        allowed_methods=["POST"],  # not by default: to post an order twice would do harm
        status_forcelist=TRY_AGAIN,
        raise_on_status=False,     # the last answer comes back, so that it can be shown
        backoff_factor=1,
    )
    session = requests.Session()
    session.mount("http://", HTTPAdapter(max_retries=patience))
    session.mount("https://", HTTPAdapter(max_retries=patience))
    return session


def ask(url, question, retries):
    """Posts one question, a dict. -> requests.Response; ends the script where none comes"""
    key = os.environ.get("OPENAI_API_KEY", "none")
    headers = {"Authorization": f"Bearer {key}"}
    try:
        with patient_session(retries) as session:
            reply = session.post(url, json=question, headers=headers, timeout=TIMEOUT)
    except requests.RequestException as error:
        # Retry watches how an answer begins. One that is cut off in its middle is asked for here.
        cut_off = isinstance(error, requests.exceptions.ChunkedEncodingError)
        if cut_off and retries > 0:
            return ask(url, question, retries - 1)
        fail(f"--embed-url {url} does not answer ({type(error).__name__}): is the server running, "
             "and is the address complete?")
    if not reply.ok:
        says = " ".join(reply.text[:200].split())
        fail(f"--embed-url {url} answers {reply.status_code} {says}: check the server, the "
             "address, --embed-model and OPENAI_API_KEY.")
    return reply


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
