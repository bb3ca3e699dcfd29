"""01: the events, texts and pictures of a shop, in one form for the five scripts that follow.

Draws a toy shop, reads a folder, or downloads a category of Amazon Reviews 2023. Drops malformed
lines and repeats, and keeps the 5-core: users and items that have at least five events each. Puts
every user's events e_1 .. e_n in order of time, of which each part of the work gets its own:

    training  e_1 .. e_(n-2)          validation  e_(n-1)          test  e_n

    python 01_data.py                                       # the toy shop
    python 01_data.py --run runs/beauty --dataset Beauty_and_Personal_Care
    python 01_data.py --run runs/mine --dataset my_folder   # reviews.jsonl, meta.jsonl, images/

Numbers in brackets, as [1], are the details that tests/README.md lists.

letters  U users, N items, S side of a picture, n rows of anything (in the toy shop: items before
         the 5-core)
reads   nothing; or the tables and pictures of a folder, or of a category that it downloads

writes  data.pt
          events         int32 (events)   item ids, users one after another, each in order of time
          offsets        int64 (U+1)      user u: events[offsets[u]:offsets[u+1]]
          levels         int8 (events)    by rating: 0 up to 60 % of the source's highest, or no
                                          rating; 1 up to 80 %; 2 above; numbered without gaps; no
                                          such key if all events are alike
          titles         list (N+1)       str, 500 letters at most; row 0 is padding here and below
          texts          list (N+1)       str, features and description, 2,000 letters at most
          categories     list (N+1)       list of str
          has_image      bool (N+1)       False: no picture, or one that cannot be read
          item_ids       list (N+1)       str, the ids of the source, sorted
          user_ids       list (U)         str, sorted
          train_counts   int32 (N+1)      events of the item in training
          meta           dict             source, counts by reason, options; truth of the toy shop
writes  images.pt
          images         uint8 (N+1, 3, S, S)   all zero where there is no picture
writes  items.png        what 24 items and one user's history look like at this size

On the toy shop: 16 seconds, 0.3 GiB (2 cores of an AMD EPYC).
"""
import argparse
import array
import ast
import collections
import colorsys
import contextlib
import csv
import datetime
import gzip
import hashlib
import io
import ipaddress
import itertools
import json
import math
import os
import re
import socket
import sys
import tempfile
import textwrap
import threading
import time
import warnings
import zipfile
import zlib
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import numpy as np
import requests
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from requests.packages import urllib3  # requests brings it
from tqdm import tqdm

MIN_EVENTS = 3  # a user needs one event each to train, validate and test


# --- The toy shop: what its customers take --------------------------------------------------------
# It needs no download, and its truth is known: what a model finds can be compared with it. After
# item j, customer u takes item i with the probability that the softmax of a score gives it,
#
#   p(i | u, j) = exp(score(u, i, j)) / sum over all items k of exp(score(u, k, j))
#
#   score(u, i, j) = - 0.5 log rank(i)                              some items sell better
#                    + 3.0 [colour(i) is the favourite of u]        seen only in the picture
#                    + 1.5 [pattern(i) is the favourite of u]       seen only in the picture
#                    + 3.0 [material(i) is the favourite of u]      mostly named in title or text
#                    + 4.5 [circle(i) = companion(circle(j))]       known only from purchases
#                    + 0.5 [category(i) = following(category(j))]   in picture and title
#
# where [..] is 1 if what it says is true, else 0; a first item lacks the last two lines. Nobody
# takes an item twice.

POPULARITY = 0.5    # Zipf's law: the item of rank r sells like 1 / r to this power
TASTE = {"colour": 3.0, "pattern": 1.5, "material": 3.0}  # what a favourite adds to the score
COMPANION = 4.5     # what the right circle adds
FOLLOWING = 0.5     # what the right category adds
WHIM = 0.1          # share of events that ignore all this: any item not yet taken, equally likely
FLIPPED = 0.1       # share of ratings that are wrong; right are 0 for a whim and 1 for all else
CIRCLES = 25        # groups, not shapes: each item is dealt into one, and nothing in it shows which
TOY_ITEMS = 2500    # before the 5-core
TOY_USERS = 4000
LONGEST_WALK = 20   # events of the busiest customer
INCOMPLETE = 0.05   # share of items without a picture, and of items without a text

COLOURS = "red amber lime green cyan blue violet magenta".split()  # eight hues, evenly spaced
PATTERNS = "plain stripes bars diagonals checks dots".split()
SHAPES = {  # the corners of each category's outline, x and y in ninths of its size
    "bag": "04 24 31 61 74 94 99 09",
    "bottle": "30 60 63 83 89 19 13 33",
    "bowl": "02 92 87 69 39 17",
    "chair": "00 40 44 94 99 69 66 36 39 09",
    "clock": "20 70 92 97 79 29 07 02",
    "cushion": "00 41 90 84 99 58 09 15",
    "hat": "20 70 76 96 99 09 06 26",
    "lamp": "20 70 95 65 68 89 19 38 35 05",
    "mug": "00 60 61 91 97 67 66 86 82 62 69 09",
    "stool": "02 92 99 69 65 35 39 09",
    "tray": "01 91 88 18",
    "vase": "20 70 63 96 79 29 06 33",
}
MATERIALS = "cotton wool linen leather oak bamboo steel brass glass ceramic".split()
MAKERS = "Alder Brook Calder Dunmore Elmway Fenwick Garrow Hollis Ivesen Kestrel".split()
TITLES = ["{maker} {material} {category}", "A {category} by {maker}", "The {maker} {category}"]
ABOUT = [
    "{maker} makes this {category} from chosen {material}. It ships within two days.",
    "A {category} of {material}, made to be used every day.",
    "Finished by hand: {material}.",
]
PROPERTIES = {  # what is true of an item; the order is that of the random draws
    "category": list(SHAPES),
    "colour": COLOURS,
    "pattern": PATTERNS,
    "material": MATERIALS,
    "circle": range(CIRCLES),
}


def toy_shop(n, U, S, seed):
    """Draws n items and what U customers take of them. The same seed gives the same shop.

    -> events and items, which yield what a shop has in its files; open_picture, which gives the
    picture of an item (see "Reading what people have"); and the truth: for each property the number
    of its value, (n,)
    """
    rng = np.random.default_rng(seed)
    rules = toy_rules(n, U, rng)
    walks, whims = toy_walks(rules, rng)                        # (U, LONGEST_WALK) both
    items = toy_items(rules.truth, rng)
    ratings = toy_ratings(whims, seed)                          # (U, LONGEST_WALK)

    def open_picture(item_id, look):
        return draw(look, S) if look else None

    return toy_events(walks, ratings), items, open_picture, rules.truth


class Rules(NamedTuple):
    """What decides who takes what: all that is in the score, and that no model is told."""
    truth: dict             # for each of PROPERTIES the number of its value, (n,)
    rank: np.ndarray        # (n,) 1: what sells best
    favourites: dict        # for each of TASTE the value that a customer likes, (U,)
    companion: np.ndarray   # (circles,) the circle that follows a circle
    following: np.ndarray   # (categories,) the category that follows a category


def toy_rules(n, U, rng):
    """Draws the rules of a shop of n items and U customers. -> Rules"""
    # Every property of every item is drawn on its own: no colour goes with a category.
    truth = {}
    for name, values in PROPERTIES.items():
        truth[name] = rng.integers(len(values), size=n)         # (n,)
    rank = 1 + rng.permutation(n)                               # (n,)
    favourites = {}
    for name in TASTE:
        favourites[name] = rng.integers(len(PROPERTIES[name]), size=U)  # (U,)
    companion = rng.permutation(CIRCLES)                        # (circles,)
    following = rng.permutation(len(SHAPES))                    # (categories,)
    return Rules(truth, rank, favourites, companion, following)


def taste_of(favourites, rules):
    """What somebody with these favourites likes whatever came before: four lines of the score.

    favourites: for each of TASTE a value, (rows,) -> (rows, n)
    """
    taste = -POPULARITY * np.log(rules.rank)                    # (n,)
    for name, weight in TASTE.items():
        favourite = favourites[name][:, None]                   # (rows, 1)
        taste = taste + weight * (rules.truth[name] == favourite)  # (rows, n)
    return taste


def add_what_follows(score, previous, rules):
    """Adds the last two lines of the score. score: (rows, n), previous: (rows,) items"""
    # After an item of one circle people like those of its companion circle, whatever they look
    # like. A category is followed by another in the same way, but weakly.
    circle = rules.companion[rules.truth["circle"][previous]]   # (rows,)
    category = rules.following[rules.truth["category"][previous]]  # (rows,)
    score += COMPANION * (rules.truth["circle"] == circle[:, None])  # (rows, n)
    score += FOLLOWING * (rules.truth["category"] == category[:, None])  # (rows, n)


def toy_walks(rules, rng):
    """Each customer takes one item after another.

    -> items, -1 where it ended; bool, was it a whim? (U, LONGEST_WALK) both
    """
    taste = taste_of(rules.favourites, rules)                   # (U, n)
    U, n = taste.shape

    # 5 to 20 events a customer, 8.4 on average; never more than there are items.
    lengths = 4 + rng.geometric(1 / 4.5, U)                     # (U,)
    lengths = np.minimum(lengths, min(LONGEST_WALK, n))         # (U,)

    # All customers take their first item, then all take their second, and so on.
    walks = np.full((U, LONGEST_WALK), -1)                      # (U, LONGEST_WALK)
    whims = np.full((U, LONGEST_WALK), False)                   # (U, LONGEST_WALK)
    for step in tqdm(range(lengths.max()), "customers", disable=None, leave=False):
        active = np.flatnonzero(lengths > step)                 # (active,)
        score = taste[active]                                   # (active, n), a copy
        if step > 0:
            add_what_follows(score, walks[active, step - 1], rules)

        # On a whim all scores are 0, so that the softmax below is the same for all items;
        # an item that the customer has already stays at minus infinity.
        whim = rng.random(len(active)) < WHIM                   # (active,)
        had = np.isinf(score[whim])                             # (whims, n)
        score[whim] = np.where(had, -np.inf, 0)

        choice = draw_from_softmax(score, rng)                  # (active,)
        walks[active, step] = choice
        whims[active, step] = whim
        taste[active, choice] = -np.inf
    return walks, whims


def draw_from_softmax(score, rng):
    """Draws a column for each row: column i with probability exp(score[i]) / sum_k exp(score[k]).

    score: (rows, n), is overwritten -> (rows,)
    """
    # The Gumbel trick: argmax_i (score[i] + g_i), where g_i = -log(-log u_i) and each u_i is
    # uniform in (0, 1), is i with exactly that probability. No sum of exponentials is needed.
    score += rng.gumbel(size=score.shape)                       # (rows, n)
    return score.argmax(1)                                      # (rows,)


def toy_ratings(whims, seed):
    """What customers say later: 0 of a whim, 1 of all else, and one time in ten the opposite.

    whims: bool (U, LONGEST_WALK) -> (U, LONGEST_WALK)
    """
    # Random numbers of their own: without ratings the shop would have the same events and items.
    rng = np.random.default_rng([seed, 1])
    flipped = rng.random(whims.shape) < FLIPPED                 # (U, LONGEST_WALK)
    return np.where(flipped, whims, ~whims).astype(int)         # (U, LONGEST_WALK)


def toy_events(walks, ratings):
    """The walks as a shop's log: (user, item, time, rating), where the time is the step."""
    for user, step in np.argwhere(walks >= 0):
        yield f"user{user:06d}", f"item{walks[user, step]:06d}", step, ratings[user, step]


def toy_items(truth, rng):
    """Writes the catalogue: title, text and what the picture will show. -> n dicts"""
    items = []
    for i in range(len(truth["circle"])):
        # What may be said of the item. 17 in "bag red dots 17" is the seed of its picture.
        words = {}
        for name, values in PROPERTIES.items():
            words[name] = values[truth[name][i]]
        words["maker"] = rng.choice(MAKERS)
        words["seed"] = rng.integers(1 << 30)

        # Colour and pattern go into the look, and into no word that a text model could read.
        title = rng.choice(TITLES).format(**words)
        text = rng.choice(ABOUT).format(**words)
        look = "{category} {colour} {pattern} {seed}".format(**words)
        has_text = rng.random() > INCOMPLETE
        has_picture = rng.random() > INCOMPLETE
        items.append({
            "item_id": f"item{i:06d}",
            "title": title,
            "text": text if has_text else "",
            "categories": [words["category"]],
            "picture": look if has_picture else "",
        })
    return items


# --- The toy shop: what its pictures show ---------------------------------------------------------
# An outline says the category, its colour and pattern say themselves. Size, place, light,
# background and tint differ from picture to picture and mean nothing, as in photographs. They
# change more pixels than what matters does: a model that compares pixels finds these.


def draw(look, S):
    """Draws, say, "bag red dots 17"; 17 is the seed of what means nothing. -> Image, 3 S x 3 S"""
    category, colour, pattern, seed = look.split()
    rng = np.random.default_rng(int(seed))
    side = 3 * S  # drawn larger, so that edges are smooth when it is squeezed to S

    # The outline, somewhere in the picture. A corner "04" is at x = 0/9, y = 4/9 of its size.
    size = rng.uniform(0.65, 0.95)
    left = rng.uniform(0, 1 - size)
    top = rng.uniform(0, 1 - size)
    corners = []
    for corner in SHAPES[category].split():
        x = left + size * int(corner[0]) / 9
        y = top + size * int(corner[1]) / 9
        corners.append((side * x, side * y))
    mask = Image.new("L", (side, side))
    ImageDraw.Draw(mask).polygon(corners, fill=255)
    inside = np.array(mask)[..., None] > 0                      # (3S, 3S, 1)

    # Its pattern: about five periods across the picture, begun anywhere, turned a little. x and y
    # count periods.
    row, column = np.mgrid[:side, :side] / side                 # (3S, 3S) each
    periods = rng.uniform(4.5, 5.5)
    turn = rng.uniform(-0.15, 0.15)  # radians: 9 degrees at most
    y = periods * (row * np.cos(turn) - column * np.sin(turn)) + rng.random()  # (3S, 3S)
    x = periods * (row * np.sin(turn) + column * np.cos(turn)) + rng.random()  # (3S, 3S)
    pale = pale_places(pattern, x, y)[..., None]                # (3S, 3S, 1)

    # Its colour, and another for the background. hsv is hue, saturation and brightness.
    hue = COLOURS.index(colour) / len(COLOURS) + rng.normal(0, 0.01)
    ink = colorsys.hsv_to_rgb(hue % 1, rng.uniform(0.75, 1), rng.uniform(0.6, 1))
    ink = 255 * np.array(ink)                                   # (3,)
    paper = colorsys.hsv_to_rgb(rng.random(), rng.uniform(0, 0.4), rng.uniform(0.3, 1))
    paper = 255 * np.array(paper)                               # (3,)

    # From the inside out: the pattern in two tones of the ink, the outline, the light, which falls
    # off to one side and has a tint, the noise.
    pixels = np.where(pale, 0.15 * ink + 0.85 * 255, ink)       # (3S, 3S, 3)
    pixels = np.where(inside, pixels, paper)                    # (3S, 3S, 3)
    across, down = rng.uniform(-0.4, 0.4, 2)
    light = 0.8 + across * (column - 0.5) + down * (row - 0.5)  # (3S, 3S)
    tint = rng.uniform(0.9, 1.1, 3)  # of red, green and blue   # (3,)
    pixels = light[..., None] * tint * pixels                   # (3S, 3S, 3)
    pixels = pixels + rng.normal(0, 8, pixels.shape)            # (3S, 3S, 3)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def pale_places(pattern, x, y):
    """Where a pattern is painted pale. x, y: (3S, 3S) places, its period is 1 -> bool (3S, 3S)"""
    x = x % 1                                                   # (3S, 3S)
    y = y % 1                                                   # (3S, 3S)
    painted = {
        "plain": np.zeros(x.shape, dtype=bool),
        "stripes": y < 0.5,
        "bars": x < 0.5,
        "diagonals": (x + y) % 1 < 0.5,
        "checks": (x < 0.5) != (y < 0.5),
        "dots": (x - 0.5) ** 2 + (y - 0.5) ** 2 < 0.1,
    }
    return painted[pattern]


# --- The rules: which events count, and in which order --------------------------------------------
# The log is four columns, one row an event: user and item as numbers from 0, a time, a rating. A
# rule is a function that says which rows stay, by their numbers or by a mask. The same rules hold
# for every source.


def arrange(log, args, counts):
    """Applies the rules one after another, and counts what each of them drops.

    log: what read_events gives
    -> events int32 (events,), levels int8 (events,), offsets int64 (U+1,), user_ids (U),
    item_ids (N)
    """
    user, item, when, rating, user_ids, item_ids = log
    rng = np.random.default_rng(args.seed)

    # From here on users stand one after another, and time is only in the order of their rows.
    order = order_of_time(user, when, args.ties, rng)           # (events,)
    user = user[order]                                          # (events,)
    item = item[order]                                          # (events,)
    level = levels_of(rating)[order]                            # (events,)

    # Repeats go first, so that an item is frequent if many people take it. The k-core comes last:
    # what any other rule drops can leave a user or an item with too few.
    rows = first_of_repeats(user, item, len(item_ids))
    user, item, level = keep(rows, [user, item, level], "repeats", counts)
    rows = most_frequent(item, args.max_items)
    user, item, level = keep(rows, [user, item, level], "beyond --max-items", counts)
    rows = drawn_users(user, args, rng)
    short = "short history, or beyond --max-users"
    user, item, level = keep(rows, [user, item, level], short, counts)
    rows = last_events(user, args.max_events)
    user, item, level = keep(rows, [user, item, level], "beyond --max-events", counts)
    rows = k_core(user, item, args.k_core)
    outside = f"outside the {args.k_core}-core"
    user, item, level = keep(rows, [user, item, level], outside, counts)
    if len(user) == 0:
        # +counts is the Counter without its zeros.
        fail(f"{args.dataset}: no event is left in the {args.k_core}-core, the counts are "
             f"{dict(+counts)}: lower --k-core, or see what was dropped.")

    # Numbers without gaps, in sorted order of the ids. Items begin at 1: row 0 is padding.
    user, user_ids = renumber(user, user_ids)
    item, item_ids = renumber(item, item_ids)
    by_user = np.argsort(user, kind="stable")                   # (events,), still in order of time
    events = (1 + item[by_user]).astype(np.int32)               # (events,)
    _, levels = np.unique(level[by_user], return_inverse=True)  # (events,), 0, 2 becomes 0, 1
    lengths = np.bincount(user)                                 # (U,)
    offsets = np.concatenate([[0], lengths.cumsum()])           # (U+1,)
    return events, levels.astype(np.int8), offsets, user_ids, item_ids


def keep(rows, columns, reason, counts):
    """Keeps these rows of the log, counts the others. rows: numbers (kept,) or bool (events,)"""
    kept = [column[rows] for column in columns]
    counts[f"events: {reason}"] = len(columns[0]) - len(kept[0])
    return kept


def levels_of(rating):
    """Three levels, cut at 60 % and 80 % of the highest rating. Of ratings from 0 to 10: 0 to 6, 7
    and 8, 9 and 10; of five stars: one to three, four, five. An event without a rating: level 0.

    rating: (events,), nan where there is none -> (events,) 0, 1, 2
    """
    most = rating[rating >= 0].max(initial=0)  # nan is not >= 0
    above_60 = 10 * rating > 6 * most                           # (events,)
    above_80 = 10 * rating > 8 * most                           # (events,)
    return above_60.astype(int) + above_80                      # (events,)


def order_of_time(user, when, ties, rng):
    """Sorts by user, then by time. user, when: (events,) -> (events,) the rows in that order"""
    # Logs often give several events of a user the same time, and files are often sorted by item.
    # If such ties kept the order of the file, a model could learn it and find the test item by
    # its number: recall would grow and mean nothing. So chance decides. [1]
    if ties == "file":
        tie = np.arange(len(user))                              # (events,)
    else:
        tie = rng.permutation(len(user))                        # (events,)
    return np.lexsort((tie, when, user))  # the last key counts most


def first_of_repeats(user, item, n):
    """Of a user's events with one item only the first counts. -> (kept,) rows"""
    # One number for a pair: with n = 100 items, user 3 and item 7 are pair 307.
    pair = user.astype(np.int64) * n + item                     # (events,), may be beyond int32
    _, first = np.unique(pair, return_index=True)               # (kept,)
    return np.sort(first)


def most_frequent(item, most):
    """Only the most frequent items (most = 0: all). item: (events,) -> bool (events,)"""
    frequency = np.bincount(item)                               # (n,)
    order = np.argsort(-frequency, kind="stable")               # (n,)
    return np.isin(item, order[:most or len(order)])


def drawn_users(user, args, rng):
    """The events of --max-users users. Those too short for the k-core would be drawn in vain.

    -> bool (events,)
    """
    lengths = np.bincount(user)                                 # (n,)
    enough = lengths >= max(args.k_core, MIN_EVENTS)            # (n,)
    drawn = rng.permutation(np.flatnonzero(enough))             # (users,)
    if args.smoke:  # those with the most events, so that their k-core is not empty
        drawn = drawn[np.argsort(-lengths[drawn], kind="stable")]   # (users,)
    return np.isin(user, drawn[:args.max_users or len(drawn)])


def last_events(user, most):
    """A user's last events only (most = 0: all). user: (events,), sorted -> bool (events,)"""
    # How far is an event from the end of its user's events?
    #   user       a a a b b c
    #   row        0 1 2 3 4 5
    #   end        3 3 3 5 5 6    the row behind the user's last event
    #   from end   3 2 1 2 1 1
    row = np.arange(len(user))                                  # (events,)
    end = np.bincount(user).cumsum()[user]                      # (events,)
    return end - row <= (most or len(user))


def k_core(user, item, k):
    """Drops users and items with fewer than k events, again and again until all have k.

    Once is not enough: an item that goes takes events away from users who had just enough. [3]
    user, item: (events,) -> (kept,) rows
    """
    kept = np.arange(len(user))                                 # (kept,)
    before = -1
    while len(kept) != before:
        before = len(kept)
        of_user = np.bincount(user[kept])[user[kept]]           # (kept,) events of that user
        of_item = np.bincount(item[kept])[item[kept]]           # (kept,) events of that item
        enough = (of_user >= max(k, MIN_EVENTS)) & (of_item >= k)
        kept = kept[enough]                                     # (kept,)
    return kept


def renumber(number, ids):
    """Gives the ids that are left new numbers, 0, 1, 2, .., in sorted order of the ids.

    number: (events,) rows of ids -> (events,) rows of the new ids, the new ids
    """
    # Say that of ids [d, b, a, c] the numbers 1, 0, 3 are left: b, d, c.
    left, place = np.unique(number, return_inverse=True)        # left [0, 1, 3]: ids d, b, c
    old_ids = [ids[i] for i in left]
    order = sorted(range(len(left)), key=old_ids.__getitem__)   # [1, 2, 0]: b, c, d
    new = np.empty(len(left), dtype=np.int64)                   # (left,)
    new[order] = np.arange(len(left))                           # [2, 0, 1]: d is now 2
    return new[place], [old_ids[i] for i in order]


def count_training(events, offsets, N):
    """How often each item is bought in training. events: (events,), offsets: (U+1,) -> (N+1,)"""
    # Leave-one-out: the last two events of every user are asked for later, so no training and no
    # count of a baseline, not even an item's popularity, may use them. (The k-core does.)  [2]
    test = offsets[1:] - 1                                      # (U,)
    validation = offsets[1:] - 2                                # (U,)
    training = np.delete(events, np.concatenate([test, validation]))
    return np.bincount(training, minlength=N + 1)               # (N+1,)


def most_bought(train_counts):
    """Items from the most bought in training to the least. train_counts: (N+1,) -> (N,)"""
    return 1 + np.argsort(-train_counts[1:], kind="stable")


# --- The script -----------------------------------------------------------------------------------
# main says in which order things happen. The rest of the file is how files are read and fetched.

RANGES = {  # least and most of the options that are numbers
    "k_core": (1, 1_000_000),
    "max_events": (0, 2 ** 32 - 1),
    "max_items": (0, 2 ** 32 - 1),
    "max_users": (0, 2 ** 32 - 1),
    "image_size": (0, 1024),
    "seed": (0, 2 ** 32 - 1),
}


def options(argv):
    """The options, checked. --smoke changes defaults only: what is given beside it still holds."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--run", type=Path, default=Path("runs/toy"), help="folder of this run")
    add("--dataset", default="toy", help="toy, a folder, or a category of Amazon Reviews 2023")
    add("--cache", type=Path, default=Path("~/.cache/mscgrec"), help="folder for downloads")
    add("--base-url", nargs="+", default=HOSTS, help="hosts or mirrors, tried one after another")
    add("--fetch-images", action="store_true",
        help="of a folder whose pictures are URLs: fetch them into its images/")
    add("--k-core", type=int, default=5, help="least events of a user and of an item")
    add("--max-events", type=int, default=0, help="keep a user's last ones only (0: all)")
    add("--max-items", type=int, default=0,
        help="keep the most frequent ones (0: all); of the toy shop: draw so many (0: 2500)")
    add("--max-users", type=int, default=0,
        help="keep some, drawn by the seed (0: all); of the toy shop: draw so many (0: 4000)")
    add("--ties", choices=("shuffle", "file"), default="shuffle", help="order of equal times")
    add("--image-size", type=int, default=0, help="S (0: 32 for toy, 64 for others)")
    add("--seed", type=int, default=0, help="of the toy shop, of ties, of --max-users")
    add("--device", default="auto", help="as in the other scripts; this one needs the CPU only")
    add("--smoke", action="store_true", help="60 items, 200 users; of a folder the busiest ones")
    first = parser.parse_args(argv)
    if first.smoke:
        parser.set_defaults(max_items=60, max_users=200)
        if first.dataset != "toy":  # 60 items are a small part of most shops
            parser.set_defaults(k_core=1)
    args = parser.parse_args(argv)

    for name, (least, most) in RANGES.items():
        value = getattr(args, name)
        if not least <= value <= most:
            option = name.replace("_", "-")
            fail(f"--{option} {value} is out of range: give a number from {least} to {most}.")
    if args.image_size == 0:
        args.image_size = 32 if args.dataset == "toy" else 64
    return args


def main(argv=None):
    """Any source in; data.pt, images.pt and items.png out."""
    args = options(argv)
    run = Run(args.run)
    counts = collections.Counter()  # why -> how many lines, events, pictures
    events_of_source, items, open_picture, truth = open_source(args, run, counts)

    # The events decide which items are left; then the catalogue is read for these.
    log = read_events(events_of_source, counts)
    events, levels, offsets, user_ids, item_ids = arrange(log, args, counts)
    titles, texts, categories, pictures = read_catalogue(items, item_ids, counts)
    train_counts = count_training(events, offsets, len(item_ids))

    # data.pt is written last: where it is, all is there.
    images, has_image = write_images(run, item_ids, pictures, open_picture, args, counts)
    data = {
        "events": torch.from_numpy(events),                     # (events,)
        "offsets": torch.from_numpy(offsets),                   # (U+1,)
        "titles": titles,
        "texts": texts,
        "categories": categories,
        "has_image": has_image,                                 # (N+1,)
        "item_ids": ["", *item_ids],
        "user_ids": user_ids,
        "train_counts": torch.from_numpy(train_counts).int(),   # (N+1,)
        "meta": describe_run(args, counts, truth, item_ids),
    }
    if levels.any():  # else nobody rated anything, or all alike
        data["levels"] = torch.from_numpy(levels)               # (events,)
    draw_sheet(run, data, images)
    run.save(data, "data.pt")
    print_summary(data)


def open_source(args, run, counts):
    """What --dataset names. -> events, items, open_picture, truth, as every door gives them"""
    if args.dataset == "toy":
        n = args.max_items or TOY_ITEMS
        U = args.max_users or TOY_USERS
        if n * U > 10 ** 8:
            fail("The toy shop ends at 100,000,000 pairs: lower --max-items or --max-users.")
        return toy_shop(n, U, args.image_size, args.seed)
    folder = Path(args.dataset).expanduser()
    if folder.is_dir():
        source = open_folder(folder, run, counts)
        if args.fetch_images:
            return fetch_pictures(source, folder, open_session([]))
        return source
    if re.fullmatch(r"[A-Z][A-Za-z_]+", args.dataset):
        return open_category(args, run, counts)
    fail(f"{args.dataset} is neither toy, nor a folder here, nor an Amazon category.")


def describe_run(args, counts, truth, item_ids):
    """Where the data comes from and what was dropped. -> dict of what torch.load lets pass"""
    settings = {}
    for name, value in vars(args).items():
        simple = isinstance(value, (int, str))
        settings[name] = value if simple else str(value)

    # The toy shop's "item000123" is row 123 of its truth; padding gets -1.
    truth_of_item = {}
    for name, values in truth.items():
        kept = [int(values[int(item_id[4:])]) for item_id in item_ids]
        truth_of_item[name] = [-1, *kept]
    return {"source": args.dataset, "counts": dict(counts), "options": settings,
            "truth": truth_of_item}


def draw_sheet(run, data, images):
    """items.png: 24 items and the end of a user's history, in the S x S pixels that models see."""
    page = Image.new("RGB", (900, 607), "white")
    pen = ImageDraw.Draw(page)
    pen.font = ImageFont.load_default(12)

    def show(i, place, y):
        """Item i with its title at that place, 0 to 7, of the strip that begins at y."""
        x = 12 + 111 * place
        tile = "#ccc"  # grey where there is no picture
        if data["has_image"][i]:
            pixels = images[i].permute(1, 2, 0).numpy()         # (S, S, 3)
            tile = Image.fromarray(pixels).resize((100, 100))
        page.paste(tile, (x, y, x + 100, y + 100))
        name = data["titles"][i] or data["item_ids"][i]
        name = textwrap.fill(name, 16, max_lines=2, placeholder="...")
        pen.text((x, y + 103), name, "black")

    # 24 items, evenly from the most bought to the least; fewer where there are fewer.
    popular = most_bought(data["train_counts"].numpy())         # (N,)
    places = np.linspace(0, len(popular) - 1, 24).astype(int)   # (24,)
    for n, i in enumerate(popular[np.unique(places)]):
        show(i, place=n % 8, y=12 + 145 * (n // 8))

    # The history of a user in the middle.
    user = len(data["user_ids"]) // 2
    begin, end = data["offsets"][user:user + 2].tolist()
    heading = "The end of a user's history, the last two for validation and test:"
    pen.text((12, 448), heading, "black")
    for n, i in enumerate(data["events"][begin:end][-8:]):
        show(i, place=n, y=469)

    with run.writing("items.png") as file:
        page.save(file, "PNG")


WHAT_TO_DO = {  # about what is lost
    "malformed line": "a quote or bracket is missing or too many, or a separator too many",
    "line with fewer columns than the header": "read as it is: is a separator missing?",
    "no user": "the column of users is empty, or holds no id",
    "no item": "the column of items is empty, or holds no id",
    "bad time": "missing, or neither a number from 0 nor a date as 2020-09-13 12:26:40",
    "rating not understood, level 0": "neither a number from 0 to 1,000 nor empty",
    "not in the catalogue": "they have neither title nor text",
    "title or text cut": "to 500 and 2,000 letters",
    "picture is named, but no such file": "a path begins in the folder, or in its images/",
    "picture is a URL, not fetched": "--fetch-images fetches them into the folder",
}


def print_summary(data):
    """What was read and dropped, how large the shop is, and what every model has to beat."""
    for reason, number in data["meta"]["counts"].items():
        advice = WHAT_TO_DO.get(reason.split(": ")[-1], "")
        print(f"{reason:52}{number:12,}  {advice if number else ''}".rstrip())
    U = len(data["user_ids"])
    N = len(data["item_ids"]) - 1
    events = len(data["events"])
    with_picture = data["has_image"].sum().item() / N
    with_title = sum(1 for title in data["titles"] if title) / N
    with_text = sum(1 for text in data["texts"] if text) / N
    with_words = 0
    for title, text, categories in zip(data["titles"], data["texts"], data["categories"]):
        if re.search(r"\w", title + text + "".join(categories)):
            with_words += 1
    # Density: the share of all pairs of user and item that are events.
    print(f"\nU {U:,} users, N {N:,} items, {events:,} events: {events / U:.1f} a user, "
          f"{events / N:.1f} an item, density {events / U / N:.3%}")
    print(f"items with a picture, for 03: {with_picture:.1%}; with words, for 04: "
          f"{with_words / N:.1%} (a title {with_title:.1%}, a text {with_text:.1%})")
    if "levels" in data:
        shares = torch.bincount(data["levels"].int()) / events  # (levels,)
        print(f"events of level 0, 1, ..: {', '.join(f'{share:.1%}' for share in shares)}")

    train_counts = data["train_counts"].numpy()                 # (N+1,)
    popular = most_bought(train_counts)                         # (N,)
    tenth = popular[:max(1, N // 10)]                           # (N / 10,)
    share = train_counts[tenth].sum() / train_counts.sum()
    last = data["offsets"][1:] - 1                              # (U,)
    test = data["events"][last].numpy()                         # (U,)
    recall = np.isin(test, popular[:10]).mean()
    # Recall@10: the share of users whose test item is among ten items, here the same ten for all.
    print(f"training events on the most popular tenth {share:.1%}; "
          f"the ten best sellers for everybody: Recall@10 {recall:.4f}")


# --- Reading what people have ---------------------------------------------------------------------
# A door turns one source into four things, and nothing else below knows of the source:
#
#     events         yields (user id, item id, time, rating), in the order of the file
#     items          yields dicts: item_id, and of title, text, categories, picture what is known
#     open_picture   (item id, picture) -> an opened image, or None; it may fail in any way
#     truth          {}, as nobody knows the truth of a real shop
#
# All folders come through one door. Whoever made them, they hold tables: rows of named columns. The
# table with users, items and times is the log; one with items and titles is the catalogue.
#
# A door hands on what it finds. What of it can be used is decided once, in read_events,
# read_catalogue and write_images.

COLUMNS = {  # field: what tables call it. Where a row has several, the first that is not empty;
    #           of "text" all of them
    "user": "user_id user reviewer_id uid customer_id visitor_id",
    "item": "parent_asin asin item_id item movie_id product_id business_id book_id video_id sku",
    "time": "timestamp unix_review_time time event_time datetime date",
    "rating": "rating overall stars score",
    "title": "title movie_title item_title product_title product_name item_name name",
    "text": "features feature description text overview abstract",
    "categories": "categories category genres genre main_category main_cat tag class",
    "picture": "images image_url_high_res image_url im_url image image_path",
}
EVENT = ("user", "item", "time")  # the fields without which there is no event
GENRES = ("unknown Action Adventure Animation Children's Comedy Crime Documentary Drama Fantasy "
          "Film-Noir Horror Musical Mystery Romance Sci-Fi Thriller War Western").split()
HEADERLESS = {  # the tables of MovieLens 1M and 100K: what is between columns, and their names
    "ratings.dat": ("::", ["user_id", "item_id", "rating", "timestamp"]),
    "movies.dat": ("::", ["item_id", "title", "genres"]),
    "u.data": ("\t", ["user_id", "item_id", "rating", "timestamp"]),
    "u.item": ("|", ["item_id", "title", "released", "video", "url", *GENRES]),
}
JSON_ENDINGS = (".jsonl", ".json", ".ndjson")
CSV_ENDINGS = (".csv", ".tsv", ".inter", ".item")
UNQUOTED = (".inter", ".item", ".dat", ".data")  # a quotation mark is a letter as any other
FOREIGN_ENDINGS = (".parquet", ".xlsx", ".xls", ".zip")  # looked for, to say what can be done
FIRST_LINES = 1000             # what is looked at before a table is chosen
LONGEST_LINE = 1 << 24         # characters; no file is trusted
LONGEST_DICT = 200_000         # characters of a line that is no JSON, but a dict of Python
LONGEST_TITLE = 500            # letters
LONGEST_TEXT = 2000
HIGHEST_RATING = 1000          # of any scale; what is above is no rating
LAST_TIME = 4_102_444_800_000_000_000  # the year 2100 in nanoseconds; in other units it is less


class Table(NamedTuple):
    """What the first lines of a file say of it."""
    path: Path
    names: list     # of its columns
    columns: dict   # field: those of the names that mean it, the preferred one first
    problem: str    # why it cannot be read, or ""


def open_folder(folder, run, counts):
    """The door for a folder with a table of events and, mostly, one of items."""
    tables = [look_at(path) for path in find_tables(folder)]
    log = choose_log(folder, tables)
    catalogue = choose_catalogue(folder, tables, log)
    join_by_common_ids(log, catalogue)
    say_what_is_read(folder, log, catalogue, tables)

    # data.pt remembers which files it was made of.
    for table in (log, catalogue):
        if table is not None:
            with open(table.path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
            run.made_from[str(table.path.relative_to(folder))] = digest
    return events_of(log, counts), items_of(catalogue, counts), picture_finder(folder), {}


def events_of(log, counts):
    """Yields (user id, item id, time, rating), as the rows of the log have them."""
    columns = [log.columns.get(field, []) for field in (*EVENT, "rating")]
    for row in read_table(log.path, counts):
        yield [first_filled(row, names) for names in columns]


def items_of(catalogue, counts):
    """Yields what the rows of the catalogue say of an item, as dicts of the fields."""
    if catalogue is None:
        return
    columns = collections.defaultdict(list, catalogue.columns)
    for row in read_table(catalogue.path, counts):
        yield {
            "item_id": first_filled(row, columns["item"]),
            "title": first_filled(row, columns["title"]),
            "text": [row.get(name) for name in columns["text"]],
            "categories": categories_of(row, columns["categories"]),
            "picture": addresses(first_filled(row, columns["picture"])),
        }


def first_filled(row, names):
    """Amazon's parent_asin may be null: then its asin says the item. -> a value, or None"""
    for name in names:
        if row.get(name) not in (None, "", []):
            return row[name]
    return None


def categories_of(row, names):
    """MovieLens writes Comedy|Drama, or has a column of 0 and 1 for each genre. -> any value"""
    value = first_filled(row, names)
    if isinstance(value, str):
        return value.split("|")
    if value is None:
        return [genre for genre in GENRES if row.get(genre) == "1"]
    return value


def addresses(images):
    """The pictures of an item, the likeliest first. -> list of addresses or paths

    images: an address, a list of addresses, or as in Amazon Reviews 2023 a list of
    {"variant": "MAIN", "large": .., "hi_res": .., "thumb": ..}; its Parquet files have
    {"variant": ["MAIN", ..], "large": [..], ..} instead
    """
    if isinstance(images, dict):
        columns = {key: value for key, value in images.items() if isinstance(value, list)}
        if columns:
            images = [dict(zip(columns, row)) for row in zip(*columns.values())]
        else:  # one picture
            images = [images]
    if not isinstance(images, list):
        return [images]
    first = []
    others = []
    for image in images:
        if not isinstance(image, dict):
            others.append(image)
            continue
        found = first if image.get("variant") == "MAIN" else others
        found += [image.get("large"), image.get("hi_res"), image.get("thumb")]
    return first + others


def picture_finder(folder):
    """-> open_picture for pictures that lie in a folder: where the catalogue says, or by item id"""
    places = []
    for path in sorted(folder.iterdir(), reverse=True):  # reverse: images before cover
        if path.is_dir() and path.name.lower().endswith(("images", "cover", "covers")):
            places.append(path.name)

    def open_picture(item_id, picture):
        names = [cached_name(item_id), picture]  # the first is where fetched ones are put
        for place in places:
            names.append(f"{place}/{picture}")
            names += [f"{place}/{item_id}.{kind}" for kind in PICTURE_ENDINGS]
        for name in names:
            # Joined as texts, as Path(folder) / "/etc/x" leaves the folder; ".." would, too.
            path = f"{folder}/{name}"
            if ".." not in Path(name).parts and os.path.isfile(path):
                return Image.open(path, formats=FORMATS)
        return None

    return open_picture


# --- Reading what people have: which tables there are, and which of them is what ------------------

# What a file is that is no table, and the Python that makes a table of it.
PARQUET = (
    "is Parquet: import pandas; "
    "pandas.read_parquet('{name}').to_json('{name}.jsonl', orient='records', lines=True)")
EXCEL = (
    "is Excel: import pandas; "
    "pandas.read_excel('{name}', dtype=str).to_csv('{name}.csv', index=False)")
UTF_16 = (
    "is UTF-16: text = open('{name}', encoding='utf-16').read(); "
    "open('{name}', 'w', encoding='utf-8').write(text)")
NO_OBJECTS = (
    "has no JSON object a line, it may be a JSON array: import json; "
    "text = open('{name}').read(); rows = json.loads('[' + text.strip('[], \\n') + ']'); "
    "open('lines-{name}', 'w').writelines(json.dumps(row) + '\\n' for row in rows)")
NO_ROWS = "has no row with as many columns as its header: {first}"
NO_HEADER = (
    "has no header, its first line is {first}: text = open('{name}').read(); "
    "open('{name}', 'w').write('user_id,item_id,timestamp\\n' + text), with a name for each column")
FIRST_BYTES = {
    b"PAR1": PARQUET,
    b"PK\3\4": EXCEL,  # .xlsx
    b"\xd0\xcf\x11\xe0": EXCEL,  # .xls
    b"\xff\xfe": UTF_16,
    b"\xfe\xff": UTF_16,
}


def find_tables(folder):
    """The files that may be tables, in the folder and in the folders in it. -> list of Path"""
    places = [folder]
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not is_debris(path):
            places.append(path)
    found = []
    for place in places:
        for path in place.iterdir():
            known = ending(path) in JSON_ENDINGS + CSV_ENDINGS + FOREIGN_ENDINGS
            if (known or unpacked_name(path) in HEADERLESS) and not is_debris(path):
                found.append(path)
    # `gunzip -k` leaves x.csv beside x.csv.gz; a link may lead to a file that is here already.
    twice = {path.with_name(path.name + ".gz") for path in found}
    files = {}
    for path in sorted(found, key=lambda path: (len(path.parts), path)):
        if path not in twice and path.is_file():
            files.setdefault(path.resolve(), path)
    return list(files.values())


def is_debris(path):
    """Hidden files, as ._x of a Mac and .ipynb_checkpoints, and what a Mac puts into archives."""
    return path.name.startswith((".", "__MACOSX"))


def unpacked_name(path):
    return path.name.lower().removesuffix(".gz")


def ending(path):
    return Path(unpacked_name(path)).suffix


def look_at(path):
    """Reads the first lines of a file that may be a table. -> Table"""
    with unpacked(path) as (_, file):
        head = file.read(200)
    names = {}  # a dict, as a set would forget their order
    problem = foreign(path, head)
    if not problem:
        lost = collections.Counter()
        for row in read_table(path, lost, FIRST_LINES):
            names.update(dict.fromkeys(str(name) for name in row))
        problem = doubt(path, names, bool(lost and head.strip()))
    first = listed(head.decode("utf-8", "replace").splitlines()[:1])
    problem = problem.format(name=path.name.removesuffix(".gz"), first=first)
    return Table(path, list(names), columns_of(names), problem)


def foreign(path, head):
    """What a file is that begins with these bytes; "" if it may be a table."""
    if ending(path) == ".zip":
        return "is a zip archive: unpack it"
    for first_bytes, problem in FIRST_BYTES.items():
        if head.startswith(first_bytes):
            return problem
    return ""


def doubt(path, names, lost):
    """Why a file is no table for us, though it looks like one; "" if it is.

    lost: some of the first lines were no rows
    """
    if ending(path) in JSON_ENDINGS:
        return NO_OBJECTS if lost and not names else ""
    if lost and not names:
        return NO_ROWS
    if not columns_of(names) and any(name.isdigit() for name in names):
        return NO_HEADER
    return ""


def columns_of(names):
    """Which columns mean which field. -> {field: names, the preferred one first}"""
    names_of = collections.defaultdict(list)
    for name in names:
        names_of[folded(name)].append(name)
    columns = {}
    for field, synonyms in COLUMNS.items():
        found = []
        for synonym in synonyms.split():
            found += names_of.get(folded(synonym), [])
        if found:
            columns[field] = found
    return columns


def folded(name):
    """userid, for User_ID, userId, " user id" and RecBole's user_id:token."""
    return re.sub(r"[\W_]", "", name.split(":")[0]).lower()


def choose_log(folder, tables):
    """The table of events. Ends the script where there is none."""
    logs = [table for table in tables if holds_events(table)]
    if logs:
        log = largest(folder, logs, "events")
        check_times(log)
        return log
    lacking = EVENT  # what the nearest table lacks
    for table in tables:
        lacks = [field for field in EVENT if field not in table.columns]
        if len(lacks) < len(lacking):
            lacking = lacks
            nearest = table.path.relative_to(folder)
    needed = "all of user_id, item_id, timestamp"
    if len(lacking) < len(EVENT):
        needed = "; ".join(f"{field} ({', '.join(COLUMNS[field].split())})" for field in lacking)
        needed += f": rename columns of {nearest}"
    fail(f"{folder} has no table of events; the nearest lacks {needed}. "
         f"Found: {found_tables(folder, tables)}.")


def choose_catalogue(folder, tables, log):
    """The table of items; None where there is none, which is a shop without texts."""
    others = [table for table in tables if not holds_events(table)]
    for field in ("title", "text", "categories", "picture"):
        catalogues = []
        for table in others:
            if "item" in table.columns and field in table.columns:
                catalogues.append(table)
        if catalogues:
            return largest(folder, catalogues, "items")
    unused = []
    for table in others:
        # events.parquet may stay beside events.parquet.jsonl, which was made of it as we asked.
        done = unpacked_name(log.path).startswith(unpacked_name(table.path))
        if not done and (table.problem or "title" in table.columns):
            unused.append(table)
    if unused:
        known = ", ".join(COLUMNS["item"].split())
        fail(f"{folder} has events in {log.path.name}, but no table of items, with their ids "
             f"({known}): rename their column, or take away what is no table of items. "
             f"Found: {found_tables(folder, unused)}.")
    return None


def holds_events(table):
    return all(field in table.columns for field in EVENT)


def largest(folder, tables, what):
    """The largest file: MovieLens has ratings and, fewer, tags. But where several are parts of one
    table, with the same columns, none is to be lost: the script ends.
    """
    best = max(tables, key=lambda table: table.path.stat().st_size)
    parts = [table for table in tables if set(table.names) == set(best.names)]
    if len(parts) > 1:
        names = listed(table.path.relative_to(folder) for table in parts)
        fail(f"{folder} has {len(parts)} tables of {what} with the same columns: {names}. "
             f"Join them into one file, or leave one.")
    return best


def join_by_common_ids(log, catalogue):
    """Where tables have ids of several kinds, those that both have are preferred."""
    if catalogue is None:
        return
    of_log = {folded(name) for name in log.columns["item"]}
    of_catalogue = {folded(name) for name in catalogue.columns["item"]}
    for table in (log, catalogue):
        # False sorts before True; else the order stays.
        table.columns["item"].sort(key=lambda name: folded(name) not in of_log & of_catalogue)


def check_times(log):
    """Ends the script where none of the first rows has a time that is understood."""
    strange = None
    for row in read_table(log.path, collections.Counter(), FIRST_LINES):
        value = first_filled(row, log.columns["time"])
        if readable_time(value) is not None:
            return
        if value is not None:
            strange = str(value)[:60]
    if strange is not None:
        fail(f"{log.path}: column {log.columns['time'][0]} has no time that is understood, but "
             f"{strange!r}: write seconds since 1970 (or milli-, micro-, nanoseconds, or any "
             f"numbers from 0 that rise), or 2020-09-13, or 2020-09-13 12:26:40.")


def say_what_is_read(folder, log, catalogue, tables):
    """Nothing is chosen in silence."""
    print(f"events: {meanings(folder, log, (*EVENT, 'rating'))}")
    if catalogue is None:
        print("items: no table says more of them than their ids")
        unread = [name for field in ("title", "text", "categories", "picture")
                  for name in log.columns.get(field, [])]
        if unread:
            print(f"not read of {log.path.name}: {listed(unread)}. If they are of items, not of "
                  "events: put them into a table of their own, a row an item")
    else:
        fields = [field for field in COLUMNS if field not in ("user", "time", "rating")]
        print(f"items: {meanings(folder, catalogue, fields)}")
    others = [table for table in tables if table not in (log, catalogue)]
    if others:
        print(f"not read: {listed(table.path.relative_to(folder) for table in others)}")


def meanings(folder, table, fields):
    """-> "ratings.csv, where userId is user, .." """
    found = []
    for field in fields:
        if field in table.columns:
            found.append(f"{' or '.join(table.columns[field])} is {field}")
    name = table.path.relative_to(folder)
    return listed([f"{name}, where {listed(found)}"])


def found_tables(folder, tables):
    """What there is, for people who look for a mistake."""
    found = []
    for table in tables[:9]:
        name = table.path.relative_to(folder)
        columns = listed(table.names) or "no row"
        found.append(f"{name} {table.problem or f'({columns})'}")
    if len(tables) > len(found):
        found.append(f"and {len(tables) - len(found)} more")
    return "; ".join(found) or "no file that ends in " + ", ".join(JSON_ENDINGS + CSV_ENDINGS)


def listed(names):
    """a, b, c; of long lists the beginning, and nothing that a screen obeys."""
    names = ", ".join(strings([str(name) for name in names]))
    return textwrap.shorten(names, 300, placeholder=" ...")


# --- Reading what people have: the rows of a table ------------------------------------------------


@contextlib.contextmanager
def unpacked(path):
    """Opens a file, be it gzip or not. -> the file as it lies there, and the file unpacked"""
    try:
        with open(path, "rb") as raw:
            is_gzip = raw.peek(2).startswith(b"\x1f\x8b")
            yield raw, gzip.open(raw) if is_gzip else raw
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        fail(f"{path} breaks off ({error}): delete it and get it again.")


def read_table(path, counts, most=None):
    """Yields the rows of a table as dicts; counts lines that are no row. most: of so many lines"""
    size = path.stat().st_size
    # disable=None: no bar where the output is no terminal.
    bar = tqdm(total=size, desc=path.name, unit="B", unit_scale=True, disable=None, leave=False)
    with unpacked(path) as (raw, file), bar:
        # utf-8-sig: a mark that some programs put in front is no text.
        text = io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline="")
        lines = itertools.islice(lines_of(text, path.name, counts), most)
        rows = json_rows if ending(path) in JSON_ENDINGS else csv_rows
        for n, row in enumerate(rows(lines, path, counts)):
            if n % 1000 == 0:
                bar.update(raw.tell() - bar.n)  # how far we are in the file as it lies there
            yield row


# "surrogateescape" leaves 0xDC00 + byte of a byte that is no UTF-8. Most often such a file is of
# Windows: Latin-1, and some letters more.
LATIN_1 = {0xDC00 + byte: bytes([byte]).decode("cp1252", "replace") for byte in range(128, 256)}


def lines_of(text, name, counts):
    """The lines of a file; one that never ends comes in pieces."""
    while line := text.readline(LONGEST_LINE):
        if not line.isascii():
            letters = line.translate(LATIN_1)
            if letters != line:
                counts[f"not UTF-8, read as Latin-1: lines of {name}"] += 1
            line = letters
        yield line


def json_rows(lines, path, counts):
    """One JSON object a line."""
    for line in lines:
        if not line.strip():
            counts[f"{path.name}: line inside a quoted text, or blank"] += 1
            continue
        row = json_value(line)
        if isinstance(row, dict):
            yield row
        else:
            counts[f"{path.name}: malformed line"] += 1


def json_value(line):
    """Amazon's catalogue of 2014 has dicts of Python, {'asin': ..}. -> a value; None if neither"""
    with contextlib.suppress(ValueError, RecursionError):
        return json.loads(line)
    if line.startswith("{'") and len(line) < LONGEST_DICT:
        with contextlib.suppress(ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
            with warnings.catch_warnings(action="ignore"):  # of a \d that Python would write \\d
                return ast.literal_eval(line)
    return None


def csv_rows(lines, path, counts):
    """A header, then rows: one line each, or more where a quoted text has line breaks."""
    csv.field_size_limit(LONGEST_LINE)
    if unpacked_name(path) in HEADERLESS:
        separator, header = HEADERLESS[unpacked_name(path)]
    else:
        first = next((line for line in lines if line.strip()), "")
        separator = max(",;\t", key=first.count)
        header = None
        lines = itertools.chain([first], lines)
    if len(separator) > 1:  # the csv module wants one character: this one is for nothing else
        lines = (line.replace("::", "\x1f") for line in lines)
        separator = "\x1f"
    quoting = csv.QUOTE_NONE if ending(path) in UNQUOTED else csv.QUOTE_MINIMAL
    table = csv.DictReader(lines, header, delimiter=separator, quoting=quoting, strict=True,
                           skipinitialspace=True)
    header_lines = 0 if header else 1

    with contextlib.suppress(csv.Error):  # of a header that is malformed
        table.fieldnames = told_apart(table.fieldnames, path, counts)
    while True:
        # Lines read so far; the first call of next() reads the header too.
        begin = max(header_lines, table.reader.line_num)
        try:
            row = next(table)
        except StopIteration:
            return
        except csv.Error:
            row = None
        # A quote that is never closed swallows lines. What is beyond the columns is under None.
        # Blank lines before a row are counted with it.
        lines_of_row = table.reader.line_num - begin
        if row is None or None in row:
            counts[f"{path.name}: malformed line"] += lines_of_row
            continue
        if lines_of_row > 1:
            counts[f"{path.name}: line inside a quoted text, or blank"] += lines_of_row - 1
        if None in row.values():
            counts[f"{path.name}: line with fewer columns than the header"] += 1
        yield row


def told_apart(names, path, counts):
    """A join of tables may name a column twice, and a dict would keep the last: we keep the first.

    names: list, or None of an empty file -> names without repeats, or None
    """
    if names is None:
        return None
    unlike = []
    for name in names:
        if name in unlike:
            counts[f"{path.name}: columns named {name} again, not read"] = names.count(name) - 1
            while name in unlike:
                name = f"{name}, again"
        unlike.append(name)
    return unlike


def read_events(source, counts):
    """Numbers of an event, whatever the source. Events that lack one of the first three are
    counted, and dropped.

    -> user, item int32 (events,), time, rating float64 (events,), and what the numbers mean: ids of
    users, ids of items (lists), in order of appearance
    """
    user_number = {}  # id -> 0, 1, 2, ..
    item_number = {}
    user_column = array.array("i")  # numbers without a Python object for each
    item_column = array.array("i")
    time_column = array.array("d")
    rating_column = array.array("d")
    for user_id, item_id, when, rating in source:
        user = number_of(user_id, user_number)
        if user is None:
            counts["events: no user"] += 1
            continue
        item = number_of(item_id, item_number)
        if item is None:
            counts["events: no item"] += 1
            continue
        when = readable_time(when)
        if when is None:
            counts["events: bad time"] += 1
            continue
        user_column.append(user)
        item_column.append(item)
        rating = readable_rating(rating)
        if rating is None:
            counts["events: rating not understood, level 0"] += 1
            rating = math.nan
        time_column.append(when)
        rating_column.append(rating)
    counts["events: well-formed"] = len(time_column)
    return (np.array(user_column), np.array(item_column), np.array(time_column),
            np.array(rating_column), list(user_number), list(item_number))


def number_of(value, numbers):
    """The number of an id, a new one where it is new; None for what can be no id."""
    name = id_of(value)
    if name is None:
        return None
    if name not in numbers:
        if not 0 < len(name) < 256 or not name.isprintable():
            return None
        numbers[name] = len(numbers)
    return numbers[name]


def id_of(value):
    """A text, or a whole number. -> str; None for what can be no id"""
    if type(value) is float and value.is_integer():
        value = int(value)  # a column of numbers with gaps in it is floats to pandas
    if type(value) not in (str, int):  # isinstance would let True pass, which is an int
        return None
    return str(value).strip()


def readable_time(value):
    """A number that rises, in any unit (20200913122640, too), or a date. -> float, or None"""
    # Only the order counts. So numbers stay as they are: were seconds told from milliseconds by
    # size, a log that counts from 0 would change its unit in the middle.
    try:
        when = float(value)
    except (TypeError, ValueError, OverflowError):
        return seconds_of_date(value)
    if 0 <= when < LAST_TIME:  # not so for "nan", which is a float
        return when
    return None


def readable_rating(value):
    """A number from 0; some sources write -1 where there is none.

    -> float, nan for none; None where it is not understood
    """
    if value is None:
        return math.nan
    try:
        rating = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    if not rating >= 0:  # nan, too
        return math.nan
    return rating if rating <= HIGHEST_RATING else None


def seconds_of_date(value):
    """2020-09-13, 2020-09-13 12:26:40, 2020-09-13T12:26:40+02:00. -> float, or None"""
    try:
        date = datetime.datetime.fromisoformat(value.strip().removesuffix(" UTC"))
    except (AttributeError, ValueError):
        return None
    if date.tzinfo is None:
        date = date.replace(tzinfo=datetime.timezone.utc)  # not local: an hour would come twice
    return date.timestamp()


def read_catalogue(source, item_ids, counts):
    """What is known of the items that are kept.

    -> titles, texts, categories, pictures (an address, a path, a look; "": none), each (N+1)
    """
    row_of = {item_id: i for i, item_id in enumerate(item_ids, 1)}
    rows = len(item_ids) + 1  # row 0 is padding
    titles = [""] * rows
    texts = [""] * rows
    categories = [[] for _ in range(rows)]
    pictures = [""] * rows
    strangers = []  # some ids of lines that find no item
    for item in source:
        item_id = id_of(item["item_id"])
        i = row_of.pop(item_id, None)  # so that a second line finds none
        if i is None:
            counts["catalogue: line of an item not kept, or its second"] += 1
            if item_id is not None and len(strangers) < 3:
                strangers.append(item_id[:40])
            continue
        title = " ".join(strings(item.get("title")))
        text = " ".join(strings(item.get("text")))
        if len(title) > LONGEST_TITLE or len(text) > LONGEST_TEXT:
            counts["items: title or text cut"] += 1
        titles[i] = title[:LONGEST_TITLE]
        texts[i] = text[:LONGEST_TEXT]
        categories[i] = strings(item.get("categories"))
        candidates = strings(item.get("picture"))
        if candidates:  # the likeliest that is there; the others are not tried
            pictures[i] = candidates[0]
    counts["items: not in the catalogue"] = len(row_of)
    compare_ids(list(row_of), strangers, len(item_ids))
    return titles, texts, categories, pictures


def compare_ids(missing, strangers, N):
    """Stops where the catalogue is of other items, or writes their ids in another way.

    missing: ids of kept items that have no line, strangers: ids of lines that no kept item has
    """
    if len(missing) <= N / 2 or not strangers:
        return
    found = N - len(missing)
    examples = (f"events have the items {listed(missing[:3])}; lines of the catalogue are of "
                f"{listed(strangers)}")
    if found == 0:
        fail(f"No line of the catalogue fits an event that is kept: {examples}. Write the ids "
             "alike in both, not 1.0 and 1, not 0012 and 12; or take the catalogue out, which "
             "leaves no titles.")
    print(f"Only {found:,} of {N:,} items are in the catalogue: {examples}.")


def strings(value, depth=4):
    """The texts in a value: a real catalogue holds null, a string, a list or a list of lists in one
    field. -> list of str
    """
    if isinstance(value, list) and depth > 0:
        found = []
        for part in value[:2000]:  # none that is real has so many
            found += strings(part, depth - 1)
        return found
    if type(value) is float and value.is_integer():
        value = int(value)  # as in id_of: the film "1984"
    if type(value) not in (str, int):
        return []
    # One line, without control characters. JSON may hold half a letter, "\\ud800" (a lone
    # surrogate), which cannot be written: it becomes a question mark.
    text = " ".join(str(value)[:10_000].split())
    text = re.sub(r"[\0-\x1f\x7f-\x9f]", "", text)
    text = text.encode("utf-8", "replace").decode()
    return [text] if text else []


# --- Pictures: every one squeezed to S x S --------------------------------------------------------
# The models see nothing else of a picture. They go through a file on the disk, as the pictures of a
# large catalogue are more than memory holds.

FETCHERS = 32  # pictures that are fetched at once: each waits for its host
DECODERS = 4   # pictures that are decoded at once: a large one takes 200 MB. A thread keeps the
#                memory that it once took: so four decode, and 32 others fetch
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP")  # Pillow would run a program for PostScript
PICTURE_ENDINGS = []
for word in ("jpg", "jpeg", "png", "webp"):
    PICTURE_ENDINGS += [word, word.upper(), word.title()]

# A small file can unpack to fill the memory. Pillow refuses to open what has more than twice
# MAX_IMAGE_PIXELS, and warns of half of that; a phone's photos have 48 or 50 million. What is to be
# decoded must be smaller: a JPEG that large is, as it is decoded at 1/8 of its size.
Image.MAX_IMAGE_PIXELS = 32_000_000
MOST_PIXELS = 25_000_000  # decoded
warnings.simplefilter("ignore", Image.DecompressionBombWarning)


def write_images(run, item_ids, pictures, open_picture, args, counts):
    """Writes images.pt. -> images uint8 (N+1, 3, S, S), on the disk; has_image (N+1,)"""
    run.folder.mkdir(parents=True, exist_ok=True)
    (run.folder / "data.pt").unlink(missing_ok=True)  # an old one must not meet new pictures
    S = args.image_size
    N = len(item_ids)
    blank = bytes(3 * S * S)  # of an item without a picture, and of padding

    def fetch(i):
        """-> what became of item i's picture, and its pixels"""
        try:
            image = open_picture(item_ids[i - 1], pictures[i])
            if image is None and is_url(pictures[i]):
                return "picture is a URL, not fetched", blank
            if image is None and pictures[i]:
                return "picture is named, but no such file", blank
            if image is None:
                return "no picture", blank
            return "picture", decoders.apply(squeeze, [image, S])
        except Exception as error:  # Pillow has no one error for a broken picture
            return f"picture lost ({type(error).__name__})", blank

    # Many at once, but written in the order of the items. (A full disk shows here, in write.)
    has_image = [False]
    with tempfile.TemporaryFile(dir=run.folder) as file:
        file.write(blank)
        with ThreadPool(DECODERS) as decoders, ThreadPool(FETCHERS) as fetchers:
            results = fetchers.imap(fetch, range(1, N + 1), chunksize=16)  # 16: less to hand about
            for state, pixels in tqdm(results, "pictures", N, disable=None):
                counts[f"items: {state}"] += 1
                has_image.append(state == "picture")
                file.write(pixels)
        file.flush()
        # "r+", though nothing is written: torch warns of arrays that are read-only.
        images = np.memmap(file, np.uint8, "r+", shape=(N + 1, 3, S, S))
        run.save({"images": torch.from_numpy(images)}, "images.pt")

    # Read back, so that data.pt carries its hash: data.pt belongs to these pictures.
    images = run.load("images.pt", "01_data.py", mmap=True)["images"]  # (N+1, 3, S, S)
    return images, torch.tensor(has_image)                      # (N+1,)


def is_url(picture):
    return picture.startswith(("http://", "https://"))


def squeeze(image, S):
    """An opened image of any size and kind. -> the bytes of uint8 (3, S, S)"""
    image.draft("RGB", (2 * S, 2 * S))  # a JPEG decodes at 1/2, 1/4 or 1/8 of its size for less
    if image.width * image.height > MOST_PIXELS:
        raise Image.DecompressionBombError
    if image.mode.startswith("I"):  # 16 bits: Pillow would make white of all above 255
        image = image.point(lambda value: value * (1 / 256)).convert("L")
    # Turned as the camera was; in place, without a second copy. What a camera or an editor wrote
    # of this may be broken (a fraction x/0): then the picture is taken as it is.
    with contextlib.suppress(Exception):
        ImageOps.exif_transpose(image, in_place=True)
    image = image.convert("RGBA").resize((S, S), Image.LANCZOS)
    white = Image.new("RGBA", (S, S), "white")
    image = Image.alpha_composite(white, image)  # what is transparent becomes white
    pixels = np.array(image)[..., :3]                           # (S, S, 3)
    return pixels.transpose(2, 0, 1).tobytes()                  # (3, S, S)


# --- Fetching: a category of Amazon Reviews 2023 and its pictures ---------------------------------
# Large files go on where they broke off. The addresses of pictures stand in a data file, which
# anybody may have written: none of them may lead to this machine or its network, and no host may
# keep us waiting for ever. Hosts that --base-url names are trusted.

HOSTS = [
    "https://mcauleylab.ucsd.edu/public_datasets/data/amazon_2023/raw",
    "https://datarepo.eng.ucsd.edu/mcauley_group/data/amazon_2023/raw",
]
TRIES = 6
PAUSE = 0.5         # seconds; between tries we wait 0, 2, 4, 8 and 16 times as long
LONGEST_PAUSE = 60  # seconds, even if a host asks for more
TIMEOUT = (10, 60)  # seconds to connect, and until the next byte comes
PATIENCE = 60       # seconds for a picture's body, and for a reply of an untrusted host to begin
SLOWEST = 1 << 16   # bytes of a large file that must come in PATIENCE seconds, else it broke off
LARGEST_FILE = 100 << 30    # bytes; no host is trusted to come to an end
LARGEST_PICTURE = 50 << 20


def open_category(args, run, counts):
    """The door for a category: two files into the cache, then as any folder."""
    folder = args.cache.expanduser() / args.dataset
    folder.mkdir(parents=True, exist_ok=True)
    session = open_session(args.base_url)
    for name, place in (("reviews", "review_categories/"), ("meta", "meta_categories/meta_")):
        path = folder / f"{name}.jsonl.gz"
        if not path.exists():
            urls = [f"{url.rstrip('/')}/{place}{args.dataset}.jsonl.gz" for url in args.base_url]
            download_from_any(session, urls, path)
    return fetch_pictures(open_folder(folder, run, counts), folder, session)


def fetch_pictures(source, folder, session):
    """What a door gives, but a picture that is not there is fetched from its address."""
    events, items, open_cached, truth = source
    (folder / "images").mkdir(exist_ok=True)

    def open_picture(item_id, address):
        image = open_cached(item_id, address)
        if image is None and re.match(r"\w+:", address):  # no path: http: or another scheme
            check_address(address)
            download(session, address, folder / cached_name(item_id), picture=True)
            image = open_cached(item_id, address)
        return image

    return events, items, open_picture, truth


def cached_name(item_id):
    """Where a fetched picture lies in its folder. An id such as "../../x" is no name of a file."""
    return f"images/{hashlib.sha256(item_id.encode()).hexdigest()}.jpg"


def download_from_any(session, urls, path):
    """Takes a file from the first host that has it."""
    for url in urls:
        try:
            return download(session, url, path)
        except (OSError, ValueError) as error:  # those of requests are OSErrors
            problem = error
    fail(f"{path} cannot be had ({problem}): check the category, the network, --base-url.")


def download(session, url, path, picture=False):
    """Brings url to path, which exists only when it is complete. Raises OSError or ValueError."""
    # Until a reply begins, the session tries again by itself. If it breaks off, we go on here.
    for _ in range(TRIES):
        try:
            return go_on(session, url, path, picture)
        except urllib3.exceptions.HTTPError as error:
            problem = error
    raise requests.ConnectionError(f"{url} broke off {TRIES} times: {problem}")


def go_on(session, url, path, picture):
    """Fetches what is missing of a file that may have been begun; named when it is complete."""
    partial = path.with_name(f"{path.name}.partial")
    tag = path.with_name(f"{path.name}.etag")  # says of which version the partial file is
    have = 0
    version = ""
    if tag.exists() and partial.exists():
        version = tag.read_text()
        have = partial.stat().st_size

    # Range asks for what follows the bytes that we have. If-Range: only if the file is still that
    # version, else for all of it. The status of the reply says which: 206 the rest, 200 all.
    headers = {"Accept-Encoding": "identity"}  # lengths and places are those of the file itself
    if have and version:
        headers["Range"] = f"bytes={have}-"
        headers["If-Range"] = version

    # A picture's host might send us on to an address that was not checked: no redirects.
    largest = LARGEST_PICTURE if picture else LARGEST_FILE
    with session.get(url, headers=headers, stream=True, timeout=TIMEOUT,
                     allow_redirects=not picture) as reply:
        rest = reply.status_code == 206
        now = reply.headers.get("ETag") or reply.headers.get("Last-Modified") or ""
        other = rest and now not in ("", version)
        if reply.status_code == 416 or other:
            tag.write_text("")  # 416: there is no such rest. The next try begins anew
            raise urllib3.exceptions.HTTPError("the file has changed")
        reply.raise_for_status()
        page = "html" in reply.headers.get("Content-Type", "")  # the log-in of a hotel, say
        if reply.status_code not in (200, 206) or page:
            raise requests.RequestException(f"{url} is no file")
        if not rest:
            have = 0
            partial.unlink(missing_ok=True)  # first: a tag never stands beside another version
            tag.write_text(now)
        with open(partial, "ab" if rest else "wb") as file:
            have = copy(reply.raw, file, path.name, have, largest, picture)
    tag.unlink()
    if have > largest:
        partial.unlink()
        raise requests.RequestException(f"{url} has no end")
    os.replace(partial, path)


def copy(body, file, name, have, largest, picture):
    """Copies the body of a reply as it is: a .gz stays packed. -> bytes that are there now"""
    # The timeout of a reply starts anew with every byte, so it does not end what comes byte by
    # byte. A picture has its time, and a large file has to get on in each PATIENCE seconds.
    since = time.monotonic()
    before = have
    with tqdm(total=have + (body.length_remaining or 0), initial=have, desc=name, unit="B",
              unit_scale=True, disable=picture or None) as bar:
        # read1 returns what has come, be it one byte; read would wait for all that it is asked for.
        while have <= largest and (part := body.read1(1 << 18)):
            file.write(part)
            bar.update(len(part))
            have += len(part)
            if time.monotonic() - since > PATIENCE:
                if picture:
                    raise TooSlow(name)
                if have - before < SLOWEST:
                    raise urllib3.exceptions.HTTPError(f"{have - before} bytes in {PATIENCE} s")
                since = time.monotonic()
                before = have
    return have


def open_session(trusted):
    """-> a session that tries again what fails, and is on its guard with hosts not trusted"""
    busy = [429, *range(500, 600)]  # what a host says that may work another time
    retry = Again(total=TRIES - 1, backoff_factor=PAUSE, status_forcelist=busy)
    session = requests.Session()

    # An adapter makes the connections to all addresses that begin in one way. Where several fit,
    # the longest beginning decides.
    for beginning in ("http://", "https://"):
        adapter = GuardedAdapter(FETCHERS, FETCHERS, max_retries=retry)
        session.mount(beginning, adapter)
    for url in trusted:
        parts = urlsplit(url)
        adapter = requests.adapters.HTTPAdapter(FETCHERS, FETCHERS, max_retries=retry)
        session.mount(f"{parts.scheme}://{parts.netloc}/", adapter)
    return session


class Again(urllib3.util.Retry):
    """When to try again: after longer and longer pauses, or when the host says, within limits."""

    def get_retry_after(self, response):
        seconds = super().get_retry_after(response) or 0
        return min(seconds, LONGEST_PAUSE)

    def increment(self, *args, response=None, **options):
        # urllib3 would read what comes with an error to its end, which may never come.
        if response is not None:
            response.close()
        return super().increment(*args, response=response, **options)


class Forbidden(ValueError):
    """An address of this machine or its network, or one that two readers understand differently."""


class TooSlow(ValueError):
    """A host that would keep us waiting."""


def check_address(address):
    """Refuses http://8.8.8.8\\@127.0.0.1/, of which some see the first host and some the second."""
    if "\\" in address or "@" in urlsplit(address).netloc:
        raise Forbidden(address)


def check_peer(ip):
    """Refuses addresses that only this machine or its network has."""
    address = ipaddress.ip_address(ip)
    if address.is_multicast or not address.is_global:
        raise Forbidden(f"{ip} is of this machine or its network")


class Guarded:
    """A connection that knows where it leads, and that does not wait for ever."""

    def connect(self):
        # What counts is who is at the other end, before anything is asked. A resolver may give a
        # name another address each time, so that looking the name up beforehand proves nothing.
        super().connect()
        check_peer(self.sock.getpeername()[0])

    def getresponse(self):
        # As in copy(): the timeout starts anew with every byte, and nothing is returned before the
        # headers end. So if they have not ended after PATIENCE seconds, a thread hangs up.
        sock = self.sock

        def hang_up():
            with contextlib.suppress(OSError):  # it has ended by itself
                sock.shutdown(socket.SHUT_RDWR)

        begin = time.monotonic()
        timer = threading.Timer(PATIENCE, hang_up)
        timer.daemon = True  # does not keep the script from ending
        timer.start()
        try:
            return super().getresponse()
        finally:
            timer.cancel()
            if time.monotonic() - begin > PATIENCE:
                raise TooSlow(self.host)


class GuardedHTTP(Guarded, urllib3.connection.HTTPConnection):
    pass


class GuardedHTTPS(Guarded, urllib3.connection.HTTPSConnection):
    pass


class GuardedHTTPPool(urllib3.HTTPConnectionPool):
    ConnectionCls = GuardedHTTP


class GuardedHTTPSPool(urllib3.HTTPSConnectionPool):
    ConnectionCls = GuardedHTTPS


class GuardedAdapter(requests.adapters.HTTPAdapter):
    """Makes guarded connections."""

    def init_poolmanager(self, *args, **options):
        super().init_poolmanager(*args, **options)
        pools = {"http": GuardedHTTPPool, "https": GuardedHTTPSPool}
        self.poolmanager.pool_classes_by_scheme = pools

    def send(self, request, **options):
        # A proxy, where there is one, connects in our place, and all that we see is its own
        # address. So the name is looked up all the same.
        host = urlsplit(request.url).hostname
        for *_, address in socket.getaddrinfo(host, None):
            check_peer(address[0])
        return super().send(request, **options)


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
