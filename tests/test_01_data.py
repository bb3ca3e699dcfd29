"""01_data.py: the toy shop keeps its secrets where they belong, the rules hold on any source, and neither hosts nor
files nor disks are trusted."""
import contextlib
import csv
import gzip
import hashlib
import http.server
import io
import json
import os
import random
import re
import resource
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import faults
from conftest import SCRIPTS, command, script

SHARED = SCRIPTS[0].parent.parent / "shared" / "data"
data_script = script(1)


def run(run_dir, *options, ok=True):
    """In this process, which saves the seconds of importing torch."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            data_script.main(["--run", str(run_dir), *map(str, options)])
        except SystemExit as stop:
            code = stop.code
    assert not ok or code == 0, err.getvalue()
    return subprocess.CompletedProcess([], code, out.getvalue(), err.getvalue())


def spawn(run_dir, *options, ok=True, flags=()):
    """As a user runs it."""
    python, *line = command(1, "--run", run_dir, *options)
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([python, *flags, *line], env=env, capture_output=True, text=True, cwd=run_dir.parent)
    assert not ok or done.returncode == 0, done.stderr
    return done


def one_sentence(done):
    """Exit code 2, and one line that is no traceback. -> that line"""
    assert done.returncode == 2, done.stderr
    assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr, done.stderr
    return done.stderr.strip()


def read(run_dir):
    data = torch.load(run_dir / "data.pt", weights_only=True)
    images = torch.load(run_dir / "images.pt", weights_only=True, mmap=True)["images"]
    return data, images


def histories(data):
    """-> of each user's id the ids of the items, in order"""
    events = data["events"].tolist()
    offsets = data["offsets"].tolist()
    found = {}
    for user, begin, end in zip(data["user_ids"], offsets, offsets[1:]):
        found[user] = [data["item_ids"][i] for i in events[begin:end]]
    return found


def lost_pictures(data):
    return sum(n for reason, n in data["meta"]["counts"].items() if "picture lost" in reason)


def has_picture(data):
    return dict(zip(data["item_ids"], data["has_image"].tolist()))


def jpeg(colour, size=(40, 60)):
    file = io.BytesIO()
    Image.new("RGB", size, colour).save(file, "JPEG")
    return file.getvalue()


def shop(folder, events, items=(), extra=()):
    """A folder in the layout of Amazon Reviews 2023; events: (user, item, time)."""
    folder.mkdir()
    lines = [json.dumps({"user_id": u, "parent_asin": i, "timestamp": t}) for u, i, t in events]
    (folder / "reviews.jsonl").write_text("\n".join([*lines, *extra]) + "\n")
    (folder / "meta.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    return folder


def dense(users=6, items=6, time=lambda u, i: 100 + i):
    return [(f"u{u}", f"i{i}", time(u, i)) for u in range(users) for i in range(items)]


# --- The toy shop -----------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("toy") / "run"
    spawn(run_dir)
    data, images = read(run_dir)
    truth = {name: torch.tensor(values) for name, values in data["meta"]["truth"].items()}
    return data, images, truth


def test_the_toy_shop_has_its_sizes_and_counts_training_events_only(toy):
    data, images, truth = toy
    U = len(data["user_ids"])
    N = len(data["item_ids"]) - 1
    events = data["events"]
    offsets = data["offsets"]
    assert 3900 <= U <= 4000 and 2350 <= N <= 2500
    assert images.shape == (N + 1, 3, 32, 32) and images.dtype == torch.uint8
    assert events.dtype == torch.int32 and offsets.dtype == torch.int64
    assert int(events.min()) == 1 and int(events.max()) == N and offsets[-1] == len(events)

    lengths = offsets.diff()
    assert 8 <= lengths.float().mean() <= 9 and lengths.min() >= 5 and 15 <= lengths.max() <= 20
    assert torch.bincount(events)[1:].min() >= 5
    assert all(len(set(history)) == len(history) for history in histories(data).values())

    lists = [data[name] for name in ("titles", "texts", "item_ids", "categories")]
    assert [values[0] for values in lists] == ["", "", "", []]
    assert {len(values) for values in lists} == {N + 1}
    assert data["has_image"].shape == data["train_counts"].shape == (N + 1,)
    assert data["has_image"].dtype == torch.bool
    assert all(len(values) == N + 1 and values[0] == -1 for values in truth.values())

    training = torch.cat([events[a:b - 2] for a, b in zip(offsets[:-1], offsets[1:])])
    assert torch.equal(torch.bincount(training, minlength=N + 1).int(), data["train_counts"])

    drawn = images.flatten(1).any(1)
    assert torch.equal(drawn, data["has_image"])
    assert 0.92 < drawn[1:].float().mean() < 0.98
    assert 0.92 < np.mean([bool(text) for text in data["texts"][1:]]) < 0.98


def test_colour_and_pattern_are_in_the_picture(toy):
    data, images, truth = toy
    correct = []
    edges = {pattern: [] for pattern in range(len(data_script.PATTERNS))}
    for i in data["has_image"].nonzero()[:, 0].tolist():
        picture = Image.fromarray(images[i].permute(1, 2, 0).numpy())
        hsv = np.array(picture.convert("HSV"), float) / 255
        hue = hsv[..., 0][hsv[..., 1] > 0.5] * 2 * np.pi
        mean = np.angle(np.exp(1j * hue).mean()) / 2 / np.pi % 1
        correct.append(round(mean * 8) % 8 == truth["colour"][i])
        edge = images[i].float().mean(0).diff(dim=0).abs().mean()
        edges[int(truth["pattern"][i])].append(float(edge))
    assert np.mean(correct) > 0.95
    plain = data_script.PATTERNS.index("plain")
    stripes = data_script.PATTERNS.index("stripes")
    assert np.mean(edges[stripes]) > 1.5 * np.mean(edges[plain])


def test_material_is_in_the_text_only_and_looks_never(toy):
    data, _, truth = toy
    looks = {*data_script.COLOURS, *data_script.PATTERNS, "striped", "dotted", "checked"}
    for i in range(1, len(data["item_ids"])):
        text = data["titles"][i] + " " + data["texts"][i]
        words = set(re.findall(r"[a-z]+", text.lower()))
        assert not words & looks
        material = data_script.MATERIALS[truth["material"][i]]
        category = list(data_script.SHAPES)[truth["category"][i]]
        assert not words & (set(data_script.MATERIALS) - {material})
        assert material in words or not data["texts"][i]
        assert category in data["titles"][i].lower() and data["categories"][i][-1] == category


def test_the_circle_is_known_from_purchases_only(toy):
    data, images, truth = toy
    following = Counter()
    offsets = data["offsets"].tolist()
    for begin, end in zip(offsets, offsets[1:]):
        training = data["events"][begin:end - 2].long()
        circles = truth["circle"][training].tolist()
        following.update(zip(circles, circles[1:]))
    table = np.zeros((40, 40))
    for (before, after), n in following.items():
        table[before, after] = n
    companions = table.max(1).sum() / table.sum()
    assert companions > 8 / 40, companions  # chance: about 1.5 / 25, were circles drawn anew

    kept = data["has_image"].nonzero()[:, 0]
    texts = [f"{title} {text}".lower().split() for title, text in zip(data["titles"], data["texts"])]
    column = {word: n for n, word in enumerate(sorted({word for text in texts for word in text}))}
    bags = torch.zeros(len(texts), len(column))
    for i, text in enumerate(texts):
        bags[i, [column[word] for word in text]] = 1
    for feature in (bags[kept], images[kept].flatten(1).float() / 255):
        distance = torch.cdist(feature, feature).fill_diagonal_(float("inf"))
        circle = truth["circle"][kept]
        assert (circle[distance.argmin(1)] == circle).float().mean() < 0.06  # chance 1 / 25


def test_the_gumbel_trick_draws_from_the_softmax():
    score = np.array([1.0, 0.0, -1.0, -np.inf])
    rng = np.random.default_rng(0)
    drawn = data_script.draw_from_softmax(np.tile(score, (100_000, 1)), rng)
    share = np.bincount(drawn, minlength=4) / len(drawn)
    softmax = np.exp(score) / np.exp(score).sum()
    assert np.abs(share - softmax).max() < 0.005 and share[3] == 0


def test_the_same_seed_gives_the_same_bits_and_another_seed_another_shop(tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        run(tmp_path / name, "--smoke", "--seed", seed)
    (a, a_images), (b, b_images), (c, _) = [read(tmp_path / name) for name in "abc"]
    a["meta"].pop("options")
    b["meta"].pop("options")
    assert a.keys() == b.keys() and torch.equal(a_images, b_images)
    for name in a:
        assert torch.equal(a[name], b[name]) if torch.is_tensor(a[name]) else a[name] == b[name]
    assert len(a["user_ids"]) == 200 and 56 <= len(a["item_ids"]) <= 61
    assert len(a["events"]) != len(c["events"]) or not torch.equal(a["events"], c["events"])


def test_the_toy_shop_s_levels_say_what_was_a_whim_in_nine_of_ten_cases(toy):
    data, _, _ = toy
    rng = np.random.default_rng(0)
    rules = data_script.toy_rules(data_script.TOY_ITEMS, data_script.TOY_USERS, rng)
    walks, whims = data_script.toy_walks(rules, rng)
    drawn = {}
    for user, step in np.argwhere(walks >= 0):
        drawn[f"user{user:06d}", f"item{walks[user, step]:06d}"] = whims[user, step]
    found = histories(data)
    whim = torch.tensor([drawn[user, item] for user in data["user_ids"] for item in found[user]])
    level = data["levels"]
    assert level.dtype == torch.int8 and set(level.tolist()) == {0, 1}
    assert 0.08 < whim.float().mean() < 0.12
    wrong = (level == 1) == whim
    assert 0.09 < wrong.float().mean() < 0.11
    assert 0.07 < wrong[whim].float().mean() < 0.13  # a level tells nothing of whether it is wrong


# --- The rules --------------------------------------------------------------------------------------------------------
def test_levels_are_bands_of_the_rating_whatever_its_scale():
    levels_of = data_script.levels_of
    assert levels_of(np.arange(11.0)).tolist() == [0] * 7 + [1] * 2 + [2] * 2
    assert levels_of(np.arange(0.5, 5.5, 0.5)).tolist() == [0] * 6 + [1] * 2 + [2] * 2
    assert levels_of(np.array([1.0, np.nan, 5.0, 4.0])).tolist() == [0, 0, 2, 1]
    assert levels_of(np.array([np.nan, np.nan])).tolist() == [0, 0]


def test_an_event_keeps_its_level_through_all_rules(tmp_path):
    """Users' events in another order than the file's, a repeat, a user and an item outside the core."""
    events = []
    for u, i, when in dense(time=lambda u, i: 1000 - i):
        events.append({"user_id": f"{u}", "asin": i, "overall": 1 + (int(u[1]) + int(i[1])) % 5, "timestamp": when})
    events.append({"user_id": "u0", "asin": "i5", "overall": 5, "timestamp": 5000})
    events.append({"user_id": "rare", "asin": "i0", "overall": 5, "timestamp": 3})
    events.append({"user_id": "u1", "asin": "rare", "overall": 5, "timestamp": 3})
    events[7]["overall"] = None  # u1, i1
    random.Random(0).shuffle(events)
    folder = tmp_path / "shop"
    folder.mkdir()
    (folder / "reviews.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    done = run(tmp_path / "run", "--dataset", folder)
    assert "overall is rating" in done.stdout and "events of level 0, 1, ..:" in done.stdout
    data, _ = read(tmp_path / "run")
    level = iter(data["levels"].tolist())
    for user, items in histories(data).items():
        for item in items:
            stars = 1 + (int(user[1]) + int(item[1])) % 5
            expected = 0 if (user, item) == ("u1", "i1") else max(0, stars - 3)
            assert next(level) == expected, (user, item)
    assert next(level, None) is None


@pytest.mark.parametrize("stars, levels", [((None,), None), (("x",), None), ((4.0,), None), ((-1, 3), [0, 1]),
                                           ((0, 1), [0, 1]), ((1, 2, 3, 4, 5), [0, 1, 2])])
def test_levels_have_no_gaps_and_where_all_events_are_alike_there_are_none(tmp_path, stars, levels):
    lines = ["user_id,item_id,rating,timestamp"]
    for n, (u, i, when) in enumerate(dense()):
        lines.append(f"{u},{i},{'' if stars[n % len(stars)] is None else stars[n % len(stars)]},{when}")
    (tmp_path / "ratings.csv").write_text("\n".join(lines) + "\n")
    run(tmp_path / "run", "--dataset", tmp_path)
    data, _ = read(tmp_path / "run")
    if levels is None:
        assert "levels" not in data
    else:
        assert data["levels"].unique().tolist() == levels


def test_k_core_is_the_largest_set_in_which_all_have_enough():
    rng = np.random.default_rng(0)
    user = rng.integers(0, 80, 440)
    item = rng.integers(0, 90, 440)
    kept = set(data_script.k_core(user, item, 4).tolist())
    left = set(range(440))
    while True:  # the slow definition
        of_user = Counter(user[e] for e in left)
        of_item = Counter(item[e] for e in left)
        enough = {e for e in left if of_user[user[e]] >= 4 and of_item[item[e]] >= 4}
        if enough == left:
            break
        left = enough
    assert kept == left and 0 < len(kept) < 440


def test_a_user_has_three_events_whatever_k_is():
    user = np.array([0, 0, 0, 1, 1])
    item = np.array([0, 1, 2, 0, 1])
    assert data_script.k_core(user, item, 1).tolist() == [0, 1, 2]


def test_the_examples_in_the_comments_of_the_rules_are_right():
    user = np.array([0, 0, 0, 1, 1, 2])
    assert data_script.last_events(user, 2).tolist() == [False, True, True, True, True, True]
    assert data_script.last_events(user, 1).tolist() == [False, False, True, False, True, True]
    new, ids = data_script.renumber(np.array([1, 0, 3, 0]), ["d", "b", "a", "c"])
    assert ids == ["b", "c", "d"] and new.tolist() == [0, 2, 1, 2]
    first = data_script.first_of_repeats(np.array([0, 0, 0, 1]), np.array([7, 5, 7, 7]), 100)
    assert first.tolist() == [0, 1, 3]


def test_events_are_in_order_of_time_without_repeats_and_ids_are_sorted(tmp_path):
    events = dense(time=lambda u, i: 1000 - i)
    events += [("u0", "i5", 5000), ("u0", "i4", 1), ("rare", "i0", 3)]
    folder = shop(tmp_path / "shop", events)
    run(tmp_path / "run", "--dataset", folder)
    data, images = read(tmp_path / "run")
    assert data["user_ids"] == [f"u{u}" for u in range(6)]
    assert data["item_ids"][1:] == [f"i{i}" for i in range(6)]
    found = histories(data)
    assert found["u0"] == ["i4", "i5", "i3", "i2", "i1", "i0"]  # the earliest of a repeat counts
    assert found["u1"] == ["i5", "i4", "i3", "i2", "i1", "i0"]
    assert data["meta"]["counts"]["events: repeats"] == 2
    assert not images.any() and not data["has_image"].any() and data["titles"] == [""] * 7


def test_the_seed_decides_the_order_of_equal_times_or_the_file_where_that_is_asked(tmp_path):
    folder = shop(tmp_path / "shop", dense(20, 8, time=lambda u, i: 7))
    found = []
    for name, *options in (("a",), ("b",), ("c", "--seed", 1), ("d", "--ties", "file")):
        run(tmp_path / name, "--dataset", folder, *options)
        found.append(histories(read(tmp_path / name)[0]))
    in_file = [f"i{i}" for i in range(8)]
    assert found[0] == found[1] != found[2]
    assert all(history == in_file for history in found[3].values())
    assert sum(history == in_file for history in found[0].values()) < 3 and len(found[0]) == 20


def test_max_events_keeps_the_last_and_max_items_the_most_frequent(tmp_path):
    folder = shop(tmp_path / "shop", dense(12, 9) + [("extra", "i3", 1), ("other", "i3", 1)])
    run(tmp_path / "a", "--dataset", folder, "--max-events", 5)
    found = histories(read(tmp_path / "a")[0])
    assert all(history == ["i4", "i5", "i6", "i7", "i8"] for history in found.values()) and len(found) == 12
    run(tmp_path / "b", "--dataset", folder, "--max-users", 7, "--max-items", 6)
    found = histories(read(tmp_path / "b")[0])
    assert len(found) == 7 and all(len(history) == 6 and "i3" in history for history in found.values())


# --- Reading ----------------------------------------------------------------------------------------------------------
def test_malformed_lines_are_counted_by_reason_and_said(tmp_path):
    extra = ['{"user_id": "u0", ', "[1, 2]",
             '{"parent_asin": "i0", "timestamp": 1}',
             '{"user_id": "u0", "timestamp": 1}',
             '{"user_id": "u0", "parent_asin": "i0"}',
             '{"user_id": "u0", "parent_asin": "i0", "timestamp": "noon"}',
             '{"user_id": "", "parent_asin": "i0", "timestamp": 1}',
             '{"user_id": "u0", "parent_asin": "i0", "timestamp": 1e400}',
             '{"user_id": "u0", "parent_asin": "i0", "timestamp": 99999999999999999999}']
    items = [{"parent_asin": "i0", "title": None, "features": None, "description": "plain words",
              "categories": [["A", "B"], "C"], "images": None},
             {"parent_asin": "i1", "title": "\ud800 odd", "features": ["one", None, 2],
              "description": ["three"] * 2000, "categories": [], "main_category": "Main",
              "images": [{"large": "../../outside.jpg"}]},
             {"title": "nobody"}]
    folder = shop(tmp_path / "shop", dense(), items, extra)
    Image.new("RGB", (9, 9), "red").save(tmp_path / "outside.jpg")
    printed = run(tmp_path / "run", "--dataset", folder).stdout
    data, _ = read(tmp_path / "run")
    counts = data["meta"]["counts"]
    assert counts["reviews.jsonl: malformed line"] == 2 and counts["events: well-formed"] == 36
    assert counts["events: no user"] == 2 and counts["events: no item"] == 1
    assert counts["events: bad time"] == 4 and counts["items: not in the catalogue"] == 4
    assert "events: bad time" in printed and "reviews.jsonl: malformed line" in printed
    assert data["titles"][1] == "" and data["texts"][1] == "plain words"
    assert data["categories"][1] == ["A", "B", "C"] and data["categories"][2] == ["Main"]
    assert data["titles"][2] == "? odd" and data["texts"][2].startswith("one 2 three")
    assert len(data["texts"][2]) == 2000 and not data["has_image"].any()


def test_pictures_of_all_kinds_are_read_and_broken_ones_are_missing(tmp_path):
    items = [{"parent_asin": f"i{i}", "images": []} for i in range(5)]
    items[0]["images"] = [{"large": "images/back.jpg"}, {"large": "images/front.jpg", "variant": "MAIN"}]
    items[3]["images"] = [{"large": "images/clear.png"}]
    items[4]["images"] = [{"thumb": "images/bomb.png", "large": None}]
    folder = shop(tmp_path / "shop", dense(5, 6), items)
    (folder / "images").mkdir()
    (folder / "images" / "front.jpg").write_bytes(jpeg("red", (900, 300)))
    (folder / "images" / "back.jpg").write_bytes(jpeg("blue"))
    (folder / "images" / "i1.jpg").write_bytes(jpeg("lime"))
    (folder / "images" / "i2.jpg").write_bytes(jpeg("lime")[:400])  # breaks off
    Image.new("RGBA", (50, 50), (0, 0, 0, 0)).save(folder / "images" / "clear.png")
    Image.new("1", (8000, 8000)).save(folder / "images" / "bomb.png")  # 64 million pixels
    run(tmp_path / "run", "--dataset", folder, "--image-size", 16)
    data, images = read(tmp_path / "run")
    assert data["has_image"].tolist() == [False, True, True, False, True, False, False]
    colours = images.float().mean((2, 3)).round().int().tolist()
    assert images.shape == (7, 3, 16, 16) and colours[1][0] > 250 and colours[2][1] > 250
    assert colours[4] == [255] * 3 and colours[0] == colours[3] == colours[5] == [0] * 3
    assert lost_pictures(data) == 2
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["data.pt", "images.pt", "items.png"]


def test_a_picture_is_turned_as_the_camera_was_held(tmp_path):
    picture = Image.new("RGB", (60, 40), "red")
    picture.paste("blue", (0, 0, 60, 20))  # the upper half; orientation 6 says: turn right
    exif = Image.Exif()
    exif[0x0112] = 6
    folder = shop(tmp_path / "shop", dense(5, 5))
    (folder / "images").mkdir()
    picture.save(folder / "images" / "i0.jpg", exif=exif)
    run(tmp_path / "run", "--dataset", folder, "--image-size", 16)
    _, images = read(tmp_path / "run")
    left = images[1, :, :, :6].float().mean((1, 2))
    right = images[1, :, :, 10:].float().mean((1, 2))
    assert right[2] > 240 > 15 > left[2] and left[0] > 240 > 15 > right[0]


def pixelrec(folder, events, items):
    """Two tables of one name in two folders. events, items: lines of csv"""
    tables = (("interactions", "item_id,user_id,timestamp", events),
              ("items", "item_id,view_number,tag,title,description", items))
    for name, header, lines in tables:
        (folder / name).mkdir(parents=True)
        (folder / name / "Pixel200K.csv").write_text("\n".join([header, *lines]) + "\n")
    return folder


def test_the_layout_of_pixelrec_is_read(tmp_path):
    events = [f"{i},{u},{t}" for u, i, t in [*dense(), ("u0", "i0", "x")]]
    items = io.StringIO()
    csv.writer(items).writerows([("i0", 3, "music", 'a "song", sung', "two\nlines"), ("i1", 4, "", "", "")])
    folder = pixelrec(tmp_path / "pixel", events, [items.getvalue()])
    (folder / "cover").mkdir()
    (folder / "cover" / "i0.jpg").write_bytes(jpeg("blue"))
    run(tmp_path / "run", "--dataset", folder)
    data, images = read(tmp_path / "run")
    assert len(data["user_ids"]) == 6 and data["titles"][1] == 'a "song", sung'
    assert data["texts"][1] == "two lines" and data["categories"][1] == ["music"]
    assert data["has_image"].tolist() == [False, True] + [False] * 5
    assert images[1, 2].float().mean() > 240
    assert data["meta"]["counts"]["events: bad time"] == 1


def test_every_line_of_a_csv_is_read_or_counted(tmp_path):
    """A quote that is never closed swallows lines; a comma too many shifts a row. Times may have fractions."""
    lines = [f"{i},{u},{t}" for u, i, t in dense(12, 8, lambda u, i: 1_600_000_000 + (8 - i) / 20)]
    lines[0] = f'"{lines[0]}'
    lines[20] = f'"{lines[20]}'
    lines[41] = f"{lines[41]},more"
    run(tmp_path / "run", "--dataset", pixelrec(tmp_path / "pixel", lines, []))
    data, _ = read(tmp_path / "run")
    counts = data["meta"]["counts"]
    assert counts["Pixel200K.csv: malformed line"] == 22 and counts["events: well-formed"] == len(lines) - 22
    assert all(items == sorted(items, reverse=True) for items in histories(data).values())


def test_a_folder_without_events_is_refused_with_its_tables_and_their_columns(tmp_path):
    folder = shop(tmp_path / "shop", [])
    (folder / "more.csv").write_text("user_id,item_id,when\nu,i,1\n")
    said = one_sentence(run(tmp_path / "run", "--dataset", folder, ok=False))
    assert str(folder) in said and "the nearest lacks time (timestamp, " in said
    assert "meta.jsonl (no row); more.csv (user_id, item_id, when); reviews.jsonl (no row)" in said
    assert not (tmp_path / "run").exists()


# --- Runs that end early, and runs in one process ---------------------------------------------------------------------
def test_an_interrupted_run_leaves_nothing_half_and_the_next_one_is_the_same(tmp_path, monkeypatch):
    folder = shop(tmp_path / "shop", dense(12, 9))
    options = ("--dataset", folder, "--image-size", 8)
    run(tmp_path / "run", *options)
    whole = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}

    def interrupt(*_):
        raise KeyboardInterrupt

    steps = [(data_script, "k_core"), (data_script, "read_catalogue"), (data_script, "draw_sheet"),
             (data_script.Run, "save")]
    for where, name in steps:
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(where, name, interrupt)
            run(tmp_path / "run", *options)
        assert not [path for path in (tmp_path / "run").iterdir() if path.name not in whole]
        run(tmp_path / "run", *options)
        assert whole == {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}


def test_control_c_ends_in_a_sentence(tmp_path):
    slow = command(1, "--run", tmp_path / "run", "--image-size", 200)

    def heard():  # a job in the background is deaf to it otherwise
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    child = subprocess.Popen(slow, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, preexec_fn=heard,
                             env={**os.environ, "OMP_NUM_THREADS": "1"})
    while child.poll() is None and not (tmp_path / "run").exists():  # it draws pictures from then on
        time.sleep(0.01)
    child.send_signal(signal.SIGINT)
    child.stdout, child.stderr = child.communicate(timeout=60)
    assert "the same command" in one_sentence(child)
    assert child.stdout == "" and not list((tmp_path / "run").iterdir())


def test_a_full_disk_and_a_run_that_is_a_file_end_in_a_sentence(tmp_path):
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    assert "too large" in one_sentence(faults.start(1, "--run", tmp_path / "run", "--smoke", preexec_fn=limit))
    assert not list((tmp_path / "run").iterdir())
    (tmp_path / "file").touch()
    assert "file" in one_sentence(faults.start(1, "--run", tmp_path / "file", "--smoke"))


def test_a_sheet_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    run(tmp_path / "run", "--smoke")
    before = (tmp_path / "run" / "items.png").read_bytes()

    def save(self, file, *_):
        file.write(b"half a picture")
        raise OSError("No space left on device")

    monkeypatch.setattr(Image.Image, "save", save)
    said = one_sentence(run(tmp_path / "run", "--smoke", "--seed", 1, ok=False))
    assert "items.png" in said and "No space left" in said
    assert (tmp_path / "run" / "items.png").read_bytes() == before
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["images.pt", "items.png"]


def test_two_runs_in_one_process_know_nothing_of_each_other(tmp_path):
    folder = shop(tmp_path / "shop", dense(12, 9), [{"parent_asin": "i0", "title": "one"}])
    run(tmp_path / "mine", "--dataset", folder)
    run(tmp_path / "toy", "--smoke")
    run(tmp_path / "again", "--dataset", folder)
    mine, toy, again = [read(tmp_path / name)[0]["made_from"] for name in ("mine", "toy", "again")]
    assert mine.keys() == {"reviews.jsonl", "meta.jsonl", "images.pt"} and toy.keys() == {"images.pt"}
    assert mine == again
    images = (tmp_path / "toy" / "images.pt").read_bytes()
    assert toy["images.pt"] == hashlib.sha256(images).hexdigest()


def test_without_assertions_it_writes_the_same(tmp_path):
    run(tmp_path / "with", "--smoke")
    spawn(tmp_path / "without", "--smoke", flags=["-O"])
    for name in ("images.pt", "items.png"):
        assert (tmp_path / "with" / name).read_bytes() == (tmp_path / "without" / name).read_bytes()


def test_an_old_python_is_told_so(monkeypatch, capsys):
    monkeypatch.setattr(sys, "version_info", (3, 10, 0))
    with pytest.raises(SystemExit) as stop:
        data_script.start(lambda: None)
    assert stop.value.code == 2 and capsys.readouterr().err.startswith("Python 3.11 or later is needed")


@pytest.mark.parametrize("options", [
    ["--dataset", "no/such/folder"], ["--dataset", "nothing"], ["--k-core", "0"],
    ["--max-items", "-1"], ["--image-size", "-8"], ["--image-size", "1025"], ["--seed", "-1"],
    ["--seed", str(2 ** 32)], ["--max-items", "30000"], ["--max-users", "100000"],
    ["--dataset", "Tiny_Shop", "--base-url", "http://127.0.0.1:9"],
    ["--dataset", "Tiny_Shop", "--base-url", "ftp://127.0.0.1"],
    ["--dataset", "Tiny_Shop", "--base-url", "nonsense"], ["--dataset", "."]])
def test_what_cannot_be_is_one_clear_sentence(tmp_path, options, monkeypatch):
    monkeypatch.setattr(data_script, "PAUSE", 0)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    done = run(tmp_path / "run", *options, ok=False)
    assert one_sentence(done).endswith(".")
    assert done.stdout == "" and not (tmp_path / "run").exists()


def test_a_missing_dataset_ends_without_traceback(tmp_path):
    done = spawn(tmp_path / "run", "--dataset", "no_such_folder", ok=False)
    assert "no_such_folder" in one_sentence(done)
    assert done.stdout == "" and not (tmp_path / "run").exists()


def test_a_broken_file_and_an_empty_core_are_named(tmp_path):
    folder = shop(tmp_path / "shop", dense(3, 3))
    assert "5-core" in one_sentence(run(tmp_path / "run", "--dataset", folder, ok=False))
    packed = gzip.compress((folder / "reviews.jsonl").read_bytes())
    (folder / "reviews.jsonl").unlink()
    (folder / "reviews.jsonl.gz").write_bytes(packed[:-20])
    said = one_sentence(run(tmp_path / "run", "--dataset", folder, ok=False))
    assert "breaks off" in said and "reviews.jsonl.gz" in said
    assert not (tmp_path / "run").exists()


# --- From the network: only 127.0.0.1 is asked ------------------------------------------------------------------------
@pytest.fixture
def impatient(monkeypatch):
    """Waits for nothing, and asks 127.0.0.1 without a proxy."""
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(data_script, "PAUSE", 0.01)
    monkeypatch.setattr(data_script, "LONGEST_PAUSE", 0.1)
    monkeypatch.setattr(data_script, "TIMEOUT", (2, 1))
    monkeypatch.setattr(data_script, "LARGEST_FILE", 1 << 20)
    monkeypatch.setattr(data_script, "LARGEST_PICTURE", 1 << 20)


@pytest.fixture
def server():
    """Fails as real hosts do: one 500, one transfer that breaks off, one picture that is gone."""
    files = {}
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_GET(self):
            first = self.path not in [path for path, _ in asked]
            asked.append((self.path, dict(self.headers)))
            body = files.get(self.path)
            status = 404 if body is None else 200
            if first and self.path.endswith(("meta_Tiny_Shop.jsonl.gz", "i1.jpg")):
                status = 500
            start = 0
            if status == 200 and self.headers.get("If-Range") == '"v1"':
                start = int(re.match(r"bytes=(\d+)-", self.headers["Range"])[1])
                status = 206
            part = body[start:] if status in (200, 206) else b""
            self.send_response(status)
            if status == 206:
                self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
            self.send_header("Content-Length", str(len(part)))
            self.send_header("ETag", '"v1"')
            self.end_headers()
            breaks = first and self.path.endswith("/Tiny_Shop.jsonl.gz")
            self.wfile.write(part[:len(part) // 2] if breaks else part)

    with serving(Handler) as url:
        yield url, files, asked


@contextlib.contextmanager
def serving(handler):
    host = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    host.daemon_threads = True
    threading.Thread(target=host.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{host.server_port}"
    host.shutdown()
    host.server_close()


def test_a_category_comes_from_a_server_and_goes_on_where_it_broke_off(tmp_path, server, impatient):
    url, files, asked = server
    names = {f"i{i}": f"i{i}" for i in range(5)} | {"i5": "../../i5"}
    events = [{"user_id": u, "parent_asin": names[i], "timestamp": t, "text": os.urandom(40).hex()}
              for u, i, t in dense()]
    items = [{"parent_asin": name, "title": f"Item {i}", "images": [{"large": f"{url}/pictures/{i}.jpg"}]}
             for i, name in names.items()]
    items[0]["images"] = [{"large": "file:///etc/hostname", "variant": "MAIN"}]
    packed = [gzip.compress("\n".join(map(json.dumps, rows)).encode()) for rows in (events, items)]
    files["/review_categories/Tiny_Shop.jsonl.gz"] = packed[0]
    files["/meta_categories/meta_Tiny_Shop.jsonl.gz"] = packed[1]
    files |= {f"/pictures/i{i}.jpg": jpeg("red") for i in (1, 2, 3, 5)}  # i4: 404
    options = "--dataset", "Tiny_Shop", "--base-url", url, "--cache", tmp_path / "cache"
    run(tmp_path / "run", *options)
    data, images = read(tmp_path / "run")
    assert data["item_ids"][1] == "../../i5" and data["titles"][1] == "Item i5"
    assert data["has_image"].tolist() == [False, True, False, True, True, True, False]
    assert all(images[i, 0].float().mean() > 240 for i in (1, 3, 4, 5))
    assert lost_pictures(data) == 2
    made_from = [data["made_from"][f"{name}.jsonl.gz"] for name in ("reviews", "meta")]
    assert made_from == [hashlib.sha256(part).hexdigest() for part in packed]

    tries = [headers for path, headers in asked if path.endswith("/Tiny_Shop.jsonl.gz")]
    assert len(tries) == 2 and "Range" not in tries[0]
    assert tries[1]["Range"] == f"bytes={len(packed[0]) // 2}-" and tries[1]["If-Range"] == '"v1"'
    cached = [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]
    assert len(cached) == 6 and not [p for p in cached if p.suffix in (".partial", ".etag")]
    assert {p.read_bytes() for p in cached if p.suffix == ".gz"} == set(packed)

    before = len(asked)
    run(tmp_path / "again", *options)  # the cache has all but i4
    assert [path for path, _ in asked[before:]] == ["/pictures/i4.jpg"]
    assert torch.equal(read(tmp_path / "again")[0]["events"], data["events"])


def category(events, items):
    rows = [event | {"text": os.urandom(40).hex()} for event in events]
    packed = [gzip.compress("\n".join(map(json.dumps, lines)).encode()) for lines in (rows, items)]
    return {"review_categories/Shop.jsonl.gz": packed[0], "meta_categories/meta_Shop.jsonl.gz": packed[1]}


@pytest.mark.parametrize("fault, works", [
    ("500-once", True), ("429-1-once", True), ("early-once", True), ("norange", True),
    ("changes", True), ("changesbadly", True), ("500", False), ("403", False), ("html", False),
    ("loop", False), ("endless", False), ("short", False), ("nolength", False), ("429-100000", False)])
def test_a_download_is_complete_or_refused(tmp_path, impatient, fault, works):
    files = category(faults.dense(), [])
    host = faults.Host(files)
    done = run(tmp_path / "run", "--dataset", "Shop", "--cache", tmp_path / "cache", "--base-url",
               f"{host.url}/{fault}", ok=False)
    host.close()
    assert (done.returncode, done.stderr.count("\n")) == ((0, 0) if works else (2, 1)), done.stderr
    assert (tmp_path / "run").exists() == works
    assert not list((tmp_path / "cache").rglob("*.partial")) or fault == "500"
    if works:
        got = tmp_path / "cache" / "Shop" / "reviews.jsonl.gz"
        assert got.read_bytes() == files["review_categories/Shop.jsonl.gz"]


def shop_with_pictures(urls):
    """The two files of a category: item i's picture is said to be at urls[i]; five items at least, for the 5-core."""
    items = [{"parent_asin": f"i{i}", "images": [{"large": url}]} for i, url in enumerate(urls)]
    return category(faults.dense(6, max(5, len(urls))), items)


def test_no_data_file_sends_us_to_a_private_host(tmp_path, impatient):
    private = faults.Host({"x.jpg": jpeg("red")})
    files = {"x.jpg": jpeg("red")}
    host = faults.Host(files, elsewhere=f"{private.url}/ok/x.jpg")
    here = f"127.0.0.1:{private.port}"
    trusted = host.url.removeprefix("http://")
    urls = [f"{host.url}/ok/x.jpg", f"{host.url}/elsewhere/x.jpg", f"{private.url}/ok/x.jpg",
            f"http://localhost:{private.port}/ok/x.jpg", f"http://0.0.0.0:{private.port}/ok/x.jpg",
            f"http://2130706433:{private.port}/ok/x.jpg", f"http://[::1]:{private.port}/ok/x.jpg",
            f"http://[::ffff:127.0.0.1]:{private.port}/ok/x.jpg",
            f"http://{trusted}@{here}/ok/x.jpg", f"http://{here}\\@8.8.8.8/ok/x.jpg",
            f"http://{here}\\@{trusted}/ok/x.jpg", f"http://8.8.8.8\\@{here}/ok/x.jpg", f"http:\\\\{here}/ok/x.jpg",
            f"http://8.8.8.8@{here}/ok/x.jpg", f"http://{here}#@8.8.8.8/ok/x.jpg", f"http://{here}?@8.8.8.8/ok/x.jpg",
            "http://[fe80::1]/x.jpg", "http://169.254.169.254/latest/meta-data", "http://10.0.0.1/x.jpg",
            "ftp://10.0.0.1/x"]
    files |= shop_with_pictures(urls)
    run(tmp_path / "run", "--dataset", "Shop", "--cache", tmp_path / "c", "--base-url", f"{host.url}/ok")
    data, _ = read(tmp_path / "run")
    host.close()
    private.close()
    has = has_picture(data)
    assert [i for i in has if has[i]] == ["i0"] and not private.asked
    assert lost_pictures(data) == len(urls) - 1


@pytest.mark.parametrize("address", ["http://127.0.0.1\\@8.8.8.8/x.jpg", "http://8.8.8.8\\@127.0.0.1/x.jpg",
                                     "http://name@8.8.8.8/x.jpg", "http://name:word@8.8.8.8/x.jpg", "http:\\8.8.8.8"])
def test_an_address_in_which_two_readers_see_two_hosts_is_refused(address):
    with pytest.raises(data_script.Forbidden):
        data_script.check_address(address)
    data_script.check_address("https://m.media-amazon.com/images/I/71@2.jpg?a=b@c")  # no user: a path and a query


def resolver(answers):
    """A resolver that gives a name its answers one after another, and everything else as ever."""
    true = socket.getaddrinfo
    left = {name: list(addresses) for name, addresses in answers.items()}

    def getaddrinfo(host, port, *args, **options):
        addresses = left.get(host)
        if addresses:
            host = addresses.pop(0) if len(addresses) > 1 else addresses[0]
        return true(host, port, *args, **options)

    return getaddrinfo


def test_a_resolver_that_changes_its_answer_does_not_lead_to_a_private_host(tmp_path, impatient, monkeypatch):
    private = faults.Host({"x.jpg": jpeg("red")})
    host = faults.Host(shop_with_pictures([f"http://changes.example:{private.port}/ok/x.jpg"]))
    monkeypatch.setattr(socket, "getaddrinfo", resolver({"changes.example": ["8.8.8.8", "127.0.0.1"]}))
    run(tmp_path / "run", "--dataset", "Shop", "--cache", tmp_path / "c", "--base-url", f"{host.url}/ok")
    data, _ = read(tmp_path / "run")
    host.close()
    private.close()
    assert not private.asked and not data["has_image"].any()
    assert data["meta"]["counts"]["items: picture lost (Forbidden)"] == 1


def test_a_host_that_is_not_private_is_asked_in_the_same_way(tmp_path, impatient, monkeypatch):
    """The guard does not refuse everything: where 127.0.0.1 passes for public, the picture comes."""
    public = faults.Host({"x.jpg": jpeg("red")})
    host = faults.Host(shop_with_pictures([f"http://far.example:{public.port}/ok/x.jpg"]))
    monkeypatch.setattr(socket, "getaddrinfo", resolver({"far.example": ["127.0.0.1"]}))
    monkeypatch.setattr(data_script, "check_peer", lambda ip: None)
    run(tmp_path / "run", "--dataset", "Shop", "--cache", tmp_path / "c", "--base-url", f"{host.url}/ok")
    data, _ = read(tmp_path / "run")
    host.close()
    public.close()
    assert [i for i, has in has_picture(data).items() if has] == ["i0"]


def test_a_proxy_of_this_network_is_used_but_not_asked_for_its_hosts(tmp_path, impatient, monkeypatch):
    asked = []

    class Proxy(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_GET(self):
            asked.append(self.path)
            body = jpeg("red")
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

    host = faults.Host(shop_with_pictures(["http://8.8.8.8/x.jpg", "http://10.0.0.1/x.jpg", "http://localhost/x.jpg"]))
    with serving(Proxy) as url:
        monkeypatch.setenv("http_proxy", url)
        run(tmp_path / "run", "--dataset", "Shop", "--cache", tmp_path / "c", "--base-url", f"{host.url}/ok")
    host.close()
    data, _ = read(tmp_path / "run")
    assert asked == ["http://8.8.8.8/x.jpg"]
    assert [i for i, has in has_picture(data).items() if has] == ["i0"]


class Dripping(http.server.BaseHTTPRequestHandler):
    """Sends a byte again and again, each before a timeout: of headers, of a body, or of an error that has no end."""

    def log_message(self, *_):
        pass

    def do_GET(self):
        with contextlib.suppress(OSError):
            if self.path == "/headers":
                self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Long: ")
            elif self.path == "/body":
                self.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n")
            else:
                self.wfile.write(b"HTTP/1.1 503 Busy\r\n\r\n")
            for _ in range(200):
                self.wfile.write(b"x")
                time.sleep(0.1)


@pytest.fixture
def drips(impatient, monkeypatch):
    """-> a session on its guard with a host of this machine that drips"""
    monkeypatch.setattr(data_script, "PATIENCE", 0.5)
    monkeypatch.setattr(data_script, "SLOWEST", 1000)
    monkeypatch.setattr(data_script, "TRIES", 2)
    monkeypatch.setattr(data_script, "check_peer", lambda ip: None)
    with serving(Dripping) as url:
        yield data_script.open_session([]), url


@pytest.mark.parametrize("part", ["headers", "body"])
def test_a_picture_that_comes_byte_by_byte_is_given_up(tmp_path, drips, part):
    session, url = drips
    begin = time.monotonic()
    with pytest.raises(data_script.TooSlow):
        data_script.download(session, f"{url}/{part}", tmp_path / "x.jpg", picture=True)
    assert time.monotonic() - begin < 5 and not (tmp_path / "x.jpg").exists()


def test_a_large_file_that_comes_byte_by_byte_counts_as_broken_off(tmp_path, drips):
    session, url = drips
    begin = time.monotonic()
    with pytest.raises(OSError, match="broke off 2 times: . bytes in 0.5 s"):
        data_script.download(session, f"{url}/body", tmp_path / "x.gz")
    assert time.monotonic() - begin < 5 and not (tmp_path / "x.gz").exists()


def test_what_comes_with_an_error_is_not_waited_for(tmp_path, drips):
    session, url = drips
    begin = time.monotonic()
    with pytest.raises(OSError, match="503"):
        data_script.download(session, f"{url}/error", tmp_path / "x.jpg", picture=True)
    assert time.monotonic() - begin < 5


def test_a_picture_that_is_slow_but_sure_is_kept(tmp_path, drips, monkeypatch):
    monkeypatch.setattr(data_script, "PATIENCE", 60)
    monkeypatch.setattr(Dripping, "do_GET", lambda self: self.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n" + jpeg("red")))
    session, url = drips
    data_script.download(session, f"{url}/x.jpg", tmp_path / "x.jpg", picture=True)
    assert (tmp_path / "x.jpg").read_bytes() == jpeg("red")
    assert [p.name for p in tmp_path.iterdir()] == ["x.jpg"]


# --- What files hold (tests/faults.py has more, and takes minutes) ----------------------------------------------------
def test_hostile_lines_are_dropped_and_counted(tmp_path):
    rng = random.Random(1)
    lines = [re.sub(rb"[\r\n]", b"", faults.fuzzed_line(rng)) for _ in range(1500)]
    ids = ["", None, "x" * 4000, "a\nb", "\ud800", True, 1.5, ["i0"], {}, "../../x", "CON", 7]
    named = [{"user_id": "u0", "parent_asin": name, "timestamp": 5} for name in ids]
    times = [{"user_id": "u0", "parent_asin": "i0", "timestamp": t}
             for t in (-1, 5 * 10 ** 12, float("nan"), float("inf"), None, [], "noon")]
    folder = faults.shop(tmp_path / "shop", lines + faults.dense(30, 30) + named + times, [
        {"parent_asin": "i0", "title": "T" * 600_000 + "\x1b[31m", "description": [[[[[["deep"]]]]]]},
        *(line.replace(b'"user_id"', b'"writer"') for line in lines)])
    run(tmp_path / "run", "--dataset", folder, "--image-size", 8)
    data, _ = read(tmp_path / "run")
    counts = data["meta"]["counts"]
    reasons = ("well-formed", "no user", "no item", "bad time")
    read_all = counts["reviews.jsonl: malformed line"] + sum(counts[f"events: {r}"] for r in reasons)
    assert read_all == len(lines) + 900 + len(named) + len(times)
    assert counts["events: no item"] >= 9 and counts["events: bad time"] >= 7
    assert len(data["item_ids"]) - 1 >= 30
    assert len(data["titles"][data["item_ids"].index("i0")]) == 500
    assert not re.search("[\x00-\x1f\x7f\ud800-\udfff]", "".join(data["titles"] + data["texts"]))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run", "shop"]


def test_hostile_pictures_are_missing_and_counted(tmp_path):
    n = 45
    items = [{"parent_asin": f"i{i}"} for i in range(n)]
    folder = faults.shop(tmp_path / "shop", faults.dense(5, n), items)
    (folder / "images").mkdir()
    whole = [faults.fuzzed_picture(i, random.Random(i), folder / "images" / f"i{i}.jpg") for i in range(n)]
    run(tmp_path / "run", "--dataset", folder, "--image-size", 16)
    data, _ = read(tmp_path / "run")
    has = has_picture(data)
    assert all(has[f"i{i}"] for i in range(n) if whole[i]) and sum(has.values()) < n
    assert sum(k for why, k in data["meta"]["counts"].items() if why.startswith("items: p")) == n
    assert not Path("/tmp/owned").exists(), "PostScript was run"


def test_an_endless_line_is_read_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(data_script, "LONGEST_LINE", 1000)
    folder = faults.shop(tmp_path / "shop", [b"x" * 10_000, *faults.dense()])
    run(tmp_path / "run", "--dataset", folder)
    counts = read(tmp_path / "run")[0]["meta"]["counts"]
    assert counts["reviews.jsonl: malformed line"] == 10
    assert counts["reviews.jsonl: line inside a quoted text, or blank"] == 1  # its end


# --- What is shown, and real data -------------------------------------------------------------------------------------
@pytest.mark.parametrize("items", [3, 30])
def test_the_sheet_shows_items_and_a_history(tmp_path, items):
    folder = shop(tmp_path / "shop", dense(6, items), [
        {"parent_asin": f"i{i}", "title": "A title " * 20} for i in range(items)])
    (folder / "images").mkdir()
    (folder / "images" / "i0.jpg").write_bytes(jpeg("red"))
    run(tmp_path / "run", "--dataset", folder, "--k-core", 3)
    sheet = np.array(Image.open(tmp_path / "run" / "items.png").convert("RGB")).astype(int)
    assert sheet.shape[1] == 900
    red = np.abs(sheet - (254, 0, 0)).max(2) < 9
    grey = np.abs(sheet - (204, 204, 204)).max(2) < 9
    assert 10_000 <= red.sum() < 100_000 and grey.sum() >= 40_000


def test_real_films_have_the_sizes_that_were_counted_once(tmp_path):
    folder = SHARED / "movietweetings-2013"
    if not folder.is_dir() and not os.environ.get("CI"):
        pytest.skip(f"{folder} is not here: the data is measured on, not part of the product")
    run(tmp_path / "run", "--dataset", folder, "--image-size", 32)
    data, images = read(tmp_path / "run")
    sizes = len(data["user_ids"]), len(data["item_ids"]) - 1, len(data["events"])
    assert sizes == (5973, 3119, 102461)
    assert int(data["has_image"].sum()) == 2298 and images.shape == (3120, 3, 32, 32)
    assert all(data["titles"][1:]) and data["meta"]["truth"] == {}
    shares = torch.bincount(data["levels"].int()) / len(data["events"])  # of level 0, 1, 2
    assert [round(share, 2) for share in shares.tolist()] == [0.29, 0.48, 0.23]
