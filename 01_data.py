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
          titles         list (N+1)       str; row 0 is padding here and below
          texts          list (N+1)       str, features and description
          categories     list (N+1)       list of str
          has_image      bool (N+1)       False: no picture, or one that cannot be read
          item_ids       list (N+1)       str, the ids of the source, sorted
          user_ids       list (U)         str, sorted
          train_counts   int32 (N+1)      events of the item in training
          meta           dict             source, counts by reason, options; truth of the toy shop
writes  images.pt
          images         uint8 (N+1, 3, S, S)   all zero where there is no picture
writes  items.png        what 24 items and one user's history look like at this size

On the toy shop: 3 seconds, 0.3 GiB (2 cores of an AMD EPYC).
"""
import argparse
import array
import collections
import colorsys
import contextlib
import csv
import gzip
import hashlib
import io
import ipaddress
import itertools
import json
import os
import re
import socket
import sys
import tempfile
import textwrap
import threading
import time
import zipfile
import zlib
from multiprocessing.pool import ThreadPool
from pathlib import Path
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
CIRCLES = 25        # groups, not shapes: each item is dealt into one, and nothing in it shows which
TOY_ITEMS = 1050    # before the 5-core
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

    # Every property of every item is drawn on its own: no colour goes with a category.
    truth = {}
    for name, values in PROPERTIES.items():
        truth[name] = rng.integers(len(values), size=n)         # (n,)
    walks = toy_walks(truth, U, rng)                            # (U, LONGEST_WALK)
    items = toy_items(truth, rng)

    def open_picture(item_id, look):
        return draw(look, S) if look else None

    return toy_events(walks), items, open_picture, truth


def toy_walks(truth, U, rng):
    """Each customer takes one item after another. -> (U, LONGEST_WALK) items, -1 where it ended"""
    n = len(truth["circle"])

    # What a customer likes whatever came before: best sellers, and one colour, one pattern and
    # one material of the customer's own. These are the first four lines of the score.
    rank = 1 + rng.permutation(n)                               # (n,)
    taste = np.tile(-POPULARITY * np.log(rank), (U, 1))         # (U, n)
    for name, weight in TASTE.items():
        favourite = rng.integers(len(PROPERTIES[name]), size=(U, 1))  # (U, 1)
        taste += weight * (truth[name] == favourite)            # (U, n)

    # After an item of one circle people like those of its companion circle, whatever they look
    # like. A category is followed by another in the same way, but weakly. The last two lines.
    companion = rng.permutation(CIRCLES)                        # (circles,)
    following = rng.permutation(len(SHAPES))                    # (categories,)

    # 5 to 20 events a customer, 8.4 on average; never more than there are items.
    lengths = 4 + rng.geometric(1 / 4.5, U)                     # (U,)
    lengths = np.minimum(lengths, min(LONGEST_WALK, n))         # (U,)

    # All customers take their first item, then all take their second, and so on.
    walks = np.full((U, LONGEST_WALK), -1)                      # (U, LONGEST_WALK)
    for step in tqdm(range(lengths.max()), "customers", disable=None, leave=False):
        active = np.flatnonzero(lengths > step)                 # (active,)
        score = taste[active]                                   # (active, n), a copy
        if step > 0:
            previous = walks[active, step - 1]                  # (active,)
            circle = companion[truth["circle"][previous]]       # (active,)
            category = following[truth["category"][previous]]   # (active,)
            score += COMPANION * (truth["circle"] == circle[:, None])
            score += FOLLOWING * (truth["category"] == category[:, None])

        # On a whim all scores are 0, so that the softmax below is the same for all items;
        # an item that the customer has already stays at minus infinity.
        whim = rng.random(len(active)) < WHIM                   # (active,)
        had = np.isinf(score[whim])                             # (whims, n)
        score[whim] = np.where(had, -np.inf, 0)

        choice = draw_from_softmax(score, rng)                  # (active,)
        walks[active, step] = choice
        taste[active, choice] = -np.inf
    return walks


def draw_from_softmax(score, rng):
    """Draws a column for each row: column i with probability exp(score[i]) / sum_k exp(score[k]).

    score: (rows, n), is overwritten -> (rows,)
    """
    # The Gumbel trick: argmax_i (score[i] + g_i), where g_i = -log(-log u_i) and each u_i is
    # uniform in (0, 1), is i with exactly that probability. No sum of exponentials is needed.
    score += rng.gumbel(size=score.shape)                       # (rows, n)
    return score.argmax(1)                                      # (rows,)


def toy_events(walks):
    """The walks as a shop's log: (user, item, time), where the time is the step."""
    for user, step in np.argwhere(walks >= 0):
        yield f"user{user:06d}", f"item{walks[user, step]:06d}", step


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
# change more pixels than what matters does: who compares pixels, compares them.


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
    """Where a pattern is painted pale. x, y: (n, n) places, its period is 1 -> bool (n, n)"""
    x = x % 1                                                   # (n, n)
    y = y % 1                                                   # (n, n)
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
# The log is three columns, one row an event: user and item as numbers from 0, and a time. A rule is
# a function that says which rows stay. The same rules hold for every source.


def arrange(log, args, counts):
    """Applies the rules one after another, and counts what each of them drops.

    log: what read_events gives
    -> events int32 (events,), offsets int64 (U+1,), user_ids (U), item_ids (N)
    """
    user, item, when, user_ids, item_ids = log
    rng = np.random.default_rng(args.seed)

    # From here on users stand one after another, and time is only in the order of their rows.
    order = order_of_time(user, when, args.ties, rng)           # (events,)
    user = user[order]                                          # (events,)
    item = item[order]                                          # (events,)

    # Repeats go first, so that an item is frequent if many people take it. The k-core comes last:
    # what any other rule drops can leave a user or an item with too few.
    rows = first_of_repeats(user, item, len(item_ids))
    user, item = keep(rows, user, item, "repeats", counts)
    rows = most_frequent(item, args.max_items)
    user, item = keep(rows, user, item, "beyond --max-items", counts)
    rows = drawn_users(user, args, rng)
    user, item = keep(rows, user, item, "short history, or beyond --max-users", counts)
    rows = last_events(user, args.max_events)
    user, item = keep(rows, user, item, "beyond --max-events", counts)
    rows = k_core(user, item, args.k_core)
    user, item = keep(rows, user, item, f"outside the {args.k_core}-core", counts)
    if len(user) == 0:
        # +counts is the Counter without its zeros.
        fail(f"{args.dataset}: no event is left in the {args.k_core}-core, the counts are "
             f"{dict(+counts)}: lower --k-core, or see what was dropped.")

    # Numbers without gaps, in sorted order of the ids. Items begin at 1: row 0 is padding.
    user, user_ids = renumber(user, user_ids)
    item, item_ids = renumber(item, item_ids)
    by_user = np.argsort(user, kind="stable")                   # (events,), still in order of time
    events = (1 + item[by_user]).astype(np.int32)               # (events,)
    lengths = np.bincount(user)                                 # (U,)
    offsets = np.concatenate([[0], lengths.cumsum()])           # (U+1,)
    return events, offsets, user_ids, item_ids


def keep(rows, user, item, reason, counts):
    """Keeps these rows of the log, counts the others. rows: numbers (kept,) or bool (events,)"""
    kept = user[rows]
    counts[f"events: {reason}"] = len(user) - len(kept)
    return kept, item[rows]


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
    """Users too short for the k-core go first, so that --max-users draws fewer in vain.

    -> bool (events,)
    """
    enough = np.bincount(user) >= max(args.k_core, MIN_EVENTS)  # (n,)
    drawn = rng.permutation(np.flatnonzero(enough))             # (users,)
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
    """Drops users and items with fewer than k events, again and again until none is left.

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
    add("--k-core", type=int, default=5, help="least events of a user and of an item")
    add("--max-events", type=int, default=0, help="keep a user's last ones only (0: all)")
    add("--max-items", type=int, default=0,
        help="keep the most frequent ones (0: all); of the toy shop: draw so many (0: 1050)")
    add("--max-users", type=int, default=0,
        help="keep some, drawn by the seed (0: all); of the toy shop: draw so many (0: 4000)")
    add("--ties", choices=("shuffle", "file"), default="shuffle", help="order of equal times")
    add("--image-size", type=int, default=0, help="S (0: 32 for toy, 64 for others)")
    add("--seed", type=int, default=0, help="of the toy shop, of ties, of --max-users")
    add("--device", default="auto", help="as in the other scripts; this one needs the CPU only")
    add("--smoke", action="store_true", help="60 items, 200 users")
    if parser.parse_args(argv).smoke:
        parser.set_defaults(max_items=60, max_users=200)
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
    events, offsets, user_ids, item_ids = arrange(log, args, counts)
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
        return open_folder(folder, run, counts)
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


def print_summary(data):
    """What was read and dropped, how large the shop is, and what every model has to beat."""
    for reason, number in data["meta"]["counts"].items():
        print(f"{reason:52}{number:12,}")
    U = len(data["user_ids"])
    N = len(data["item_ids"]) - 1
    events = len(data["events"])
    with_picture = data["has_image"].sum().item() / N
    with_text = sum(1 for text in data["texts"] if text) / N
    # Density: the share of all pairs of user and item that are events.
    print(f"\nU {U:,} users, N {N:,} items, {events:,} events: {events / U:.1f} a user, "
          f"{events / N:.1f} an item, density {events / U / N:.3%}; items with a picture "
          f"{with_picture:.1%}, a text {with_text:.1%}")

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
# A door turns one layout into four things, and nothing else below knows of the source:
#
#     events         yields (user id, item id, time), in the order of the file
#     items          yields dicts: item_id, and of title, text, categories, picture what is known
#     open_picture   (item id, picture) -> an opened image, or None; it may fail in any way
#     truth          {}, as nobody knows the truth of a real shop
#
# A door hands on what it finds. What of it can be used is decided once, in read_events,
# read_catalogue and write_images.

ITEM_ID = ("parent_asin", "asin", "item_id")  # what tables call it; the first that a row has counts
LONGEST_LINE = 1 << 24         # characters; no file is trusted
LAST_TIME = 4_102_444_800_000  # the year 2100 in milliseconds; seconds and ranks are less


def open_folder(folder, run, counts):
    """The door for two tables in the columns of Amazon Reviews 2023 or of PixelRec."""
    tables = []
    for pattern in ("*.jsonl", "*.jsonl.gz", "*.csv", "*/*.csv"):
        tables += sorted(folder.glob(pattern))
    logs = [path for path in tables if has_users(path)]
    if len(tables) != 2 or len(logs) != 1:
        names = ", ".join(str(path.relative_to(folder)) for path in tables)
        fail(f"{folder} needs two tables, .jsonl, .jsonl.gz or .csv: one of events (with user_id) "
             f"and one of items. Found: {names or 'none'}; with user_id: {len(logs)}.")
    log = logs[0]
    tables.remove(log)
    catalogue = tables[0]

    # data.pt remembers which files it was made of.
    for path in (log, catalogue):
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        run.made_from[str(path.relative_to(folder))] = digest

    def events():
        for row in read_table(log, counts):
            yield row.get("user_id"), item_id_of(row), row.get("timestamp")

    def items():
        for row in read_table(catalogue, counts):
            yield {
                "item_id": item_id_of(row),
                "title": row.get("title"),
                "text": [row.get("features"), row.get("description")],
                "categories": row.get("categories") or row.get("main_category") or row.get("tag"),
                "picture": addresses(row.get("images")),
            }

    def open_picture(item_id, picture):
        # The first is where open_category puts what it fetches.
        names = [cached_name(item_id), picture, f"images/{item_id}.jpg", f"cover/{item_id}.jpg"]
        for name in names:
            # Joined as texts, as Path(folder) / "/etc/x" leaves the folder; ".." would, too.
            path = f"{folder}/{name}"
            if ".." not in Path(name).parts and os.path.isfile(path):
                return Image.open(path, formats=FORMATS)
        return None

    return events(), items(), open_picture, {}


def has_users(path):
    """Is it the table of events? PixelRec's two have one name, but only events name a user."""
    first = itertools.islice(read_table(path, collections.Counter()), 20)
    return any("user_id" in row for row in first)


def item_id_of(row):
    """The first of the names that the row has. -> str or int; None, or anything, in a bad row"""
    for name in ITEM_ID:
        if name in row:
            return row[name]
    return None


def addresses(images):
    """Amazon's pictures of an item, the likeliest first. -> list of addresses or paths

    images: a list of {"variant": "MAIN", "large": .., "hi_res": .., "thumb": ..}
    """
    if not isinstance(images, list):
        return []
    images = [image for image in images if isinstance(image, dict)]
    images.sort(key=lambda image: image.get("variant") != "MAIN")  # MAIN first, else as they come
    found = []
    for image in images:
        found += [image.get("large"), image.get("hi_res"), image.get("thumb")]
    return found


def read_table(path, counts):
    """Yields the rows of a .jsonl, .jsonl.gz or .csv as dicts; counts lines that are no row."""
    # utf-8-sig: a mark that some programs put in front is no text. surrogateescape: what is not
    # UTF-8 is carried along; an id that holds it is refused, as it cannot be printed.
    size = path.stat().st_size
    # disable=None: no bar where the output is no terminal.
    bar = tqdm(total=size, desc=path.name, unit="B", unit_scale=True, disable=None, leave=False)
    try:
        with open(path, "rb") as raw, bar:
            file = gzip.open(raw) if path.suffix == ".gz" else raw
            text = io.TextIOWrapper(file, "utf-8-sig", "surrogateescape", newline="")
            rows = csv_rows if path.suffix == ".csv" else json_rows
            for n, row in enumerate(rows(text, path.name, counts)):
                if n % 1000 == 0:
                    bar.update(raw.tell() - bar.n)  # how far we are in the file as it lies there
                yield row
    except (OSError, EOFError, zlib.error) as error:
        fail(f"{path} breaks off ({error}): delete it and get it again.")


def lines_of(text):
    """The lines of a file; one that never ends comes in pieces."""
    while line := text.readline(LONGEST_LINE):
        yield line


def json_rows(text, name, counts):
    """One JSON object a line."""
    for line in lines_of(text):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict):
            yield row
        else:
            counts[f"{name}: malformed line"] += 1


def csv_rows(text, name, counts):
    """A header, then rows: one line each, or more where a quoted text has line breaks."""
    csv.field_size_limit(LONGEST_LINE)
    table = csv.DictReader(lines_of(text), strict=True)
    while True:
        # Lines read so far; the first call of next() reads the header too.
        begin = max(1, table.reader.line_num)
        try:
            row = next(table)
        except StopIteration:
            return
        except csv.Error:
            row = None
        # A quote that is never closed swallows lines. What is beyond the columns is under None.
        # Blank lines before a malformed row are counted with it.
        if row is None or None in row:
            counts[f"{name}: malformed line"] += table.reader.line_num - begin
        else:
            yield row


def read_events(source, counts):
    """Three numbers an event, whatever the source. Events that lack one are counted, and dropped.

    -> user, item int32 (events,), time float64 (events,), and what the numbers mean: ids of users,
    ids of items (lists), in order of appearance
    """
    user_number = {}  # id -> 0, 1, 2, ..
    item_number = {}
    user_column = array.array("i")  # numbers without a Python object for each
    item_column = array.array("i")
    time_column = array.array("d")
    for user_id, item_id, when in source:
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
        time_column.append(when)
    counts["events: well-formed"] = len(time_column)
    return (np.array(user_column), np.array(item_column), np.array(time_column),
            list(user_number), list(item_number))


def number_of(value, numbers):
    """The number of an id, a new one where it is new; None for what can be no id."""
    if type(value) not in (str, int):  # isinstance would let True pass, which is an int
        return None
    name = str(value)
    if name not in numbers:
        if not 0 < len(name) < 256 or not name.isprintable():
            return None
        numbers[name] = len(numbers)
    return numbers[name]


def readable_time(value):
    """Seconds, milliseconds, or any number that rises. -> float, or None"""
    try:
        when = float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    if 0 <= when < LAST_TIME:  # not so for "nan", which is a float
        return when
    return None


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
    for item in source:
        i = None
        if item["item_id"] is not None:
            i = row_of.pop(str(item["item_id"]), None)  # so that a second line finds none
        if i is None:
            counts["catalogue: line of an item not kept, or its second"] += 1
            continue
        titles[i] = " ".join(strings(item.get("title")))[:500]
        texts[i] = " ".join(strings(item.get("text")))[:2000]
        categories[i] = strings(item.get("categories"))
        candidates = strings(item.get("picture"))
        if candidates:  # the likeliest that is there; the others are not tried
            pictures[i] = candidates[0]
    counts["items: not in the catalogue"] = len(row_of)
    return titles, texts, categories, pictures


def strings(value, depth=4):
    """The texts in a value: a real catalogue holds null, a string, a list or a list of lists in one
    field. -> list of str
    """
    if isinstance(value, list) and depth > 0:
        found = []
        for part in value[:2000]:  # none that is real has so many
            found += strings(part, depth - 1)
        return found
    if type(value) not in (str, int):
        return []
    # One line, without control characters. A byte that was no UTF-8 came along as half a letter
    # (a lone surrogate): it becomes a question mark.
    text = " ".join(str(value)[:10_000].split())
    text = re.sub(r"[\0-\x1f\x7f-\x9f]", "", text)
    text = text.encode("utf-8", "replace").decode()
    return [text] if text else []


# --- Pictures: every one squeezed to S x S --------------------------------------------------------
# The models see nothing else of a picture. They go through a file on the disk, as the pictures of a
# large catalogue are more than memory holds.

FETCHERS = 32  # pictures that are fetched at once: each waits for its host
DECODERS = 4   # pictures that are decoded at once: a large one takes 200 MB, and what a thread has
#                had of memory it keeps, so that these are threads of their own
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP")  # Pillow would run a program for PostScript
Image.MAX_IMAGE_PIXELS = 12_500_000  # Pillow warns above this, and refuses above twice as many: a
#                                      small file can unpack to fill the memory


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


def squeeze(image, S):
    """An opened image of any size and kind. -> the bytes of uint8 (3, S, S)"""
    image.draft("RGB", (2 * S, 2 * S))  # a JPEG decodes at 1/2, 1/4 or 1/8 of its size for less
    if image.mode.startswith("I"):  # 16 bits: Pillow would make white of all above 255
        image = image.point(lambda value: value * (1 / 256)).convert("L")
    ImageOps.exif_transpose(image, in_place=True)  # turned as the camera was; no second copy
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
    (folder / "images").mkdir(parents=True, exist_ok=True)
    session = open_session(args.base_url)
    for name, place in (("reviews", "review_categories/"), ("meta", "meta_categories/meta_")):
        path = folder / f"{name}.jsonl.gz"
        if not path.exists():
            urls = [f"{url.rstrip('/')}/{place}{args.dataset}.jsonl.gz" for url in args.base_url]
            download_from_any(session, urls, path)
    events, items, open_cached, truth = open_folder(folder, run, counts)

    def open_picture(item_id, address):
        path = folder / cached_name(item_id)
        if address and not path.exists():
            check_address(address)
            download(session, address, path, picture=True)
        return open_cached(item_id, address)

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
        fail("stopped: the same command (without --fresh) goes on with what is written already.")
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
