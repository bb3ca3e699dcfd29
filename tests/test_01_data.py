"""01_data.py: the toy shop keeps its secrets where they belong; the rules hold on any source."""
import contextlib, csv, gzip, hashlib, http.server, importlib.util, io, json, os, random, re
import resource, subprocess, sys, threading
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import faults

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "01_data.py"
SHARED = ROOT.parent / "shared" / "data"
spec = importlib.util.spec_from_file_location("data_script", SCRIPT)
data_script = importlib.util.module_from_spec(spec)
spec.loader.exec_module(data_script)


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


def spawn(run_dir, *options, ok=True):
    """As a user runs it."""
    env = os.environ | {"OMP_NUM_THREADS": "1", "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    done = subprocess.run([sys.executable, SCRIPT, "--run", run_dir, *map(str, options)], env=env,
                          capture_output=True, text=True, cwd=run_dir.parent)
    assert not ok or done.returncode == 0, done.stderr
    return done


def read(run_dir):
    data = torch.load(run_dir / "data.pt", weights_only=True)
    return data, torch.load(run_dir / "images.pt", weights_only=True, mmap=True)["images"]


def histories(data):
    events, offsets = data["events"].tolist(), data["offsets"].tolist()
    return {user: [data["item_ids"][i] for i in events[a:b]]
            for user, a, b in zip(data["user_ids"], offsets, offsets[1:])}


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


# --- the toy shop -------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    run_dir = tmp_path_factory.mktemp("toy") / "run"
    spawn(run_dir)
    data, images = read(run_dir)
    return data, images, {k: torch.tensor(v) for k, v in data["meta"]["truth"].items()}


def test_toy_form_and_split(toy):
    data, images, truth = toy
    U, N = len(data["user_ids"]), len(data["item_ids"]) - 1
    events, offsets = data["events"], data["offsets"]
    assert U == 4000 and 1000 <= N <= 1100 and images.shape == (N + 1, 3, 32, 32)
    assert events.dtype == torch.int32 and offsets.dtype == torch.int64
    assert data["has_image"].dtype == torch.bool and images.dtype == torch.uint8
    assert int(events.min()) == 1 and int(events.max()) == N and offsets[-1] == len(events)
    lengths = offsets.diff()
    assert 8 <= lengths.float().mean() <= 9 and lengths.min() >= 5 and 15 <= lengths.max() <= 20
    lists = [data[k] for k in ("titles", "texts", "item_ids", "categories")]
    assert [values[0] for values in lists] == ["", "", "", []] and {*map(len, lists)} == {N + 1}
    assert data["has_image"].shape == data["train_counts"].shape == (N + 1,)
    assert all(len(values) == N + 1 and values[0] == -1 for values in truth.values())
    train = torch.cat([events[a:b - 2] for a, b in zip(offsets[:-1], offsets[1:])])
    assert torch.equal(torch.bincount(train, minlength=N + 1).int(), data["train_counts"])
    assert all(len(set(h)) == len(h) for h in histories(data).values())
    drawn = images.flatten(1).any(1)
    assert torch.equal(drawn, data["has_image"]) and 0.92 < drawn[1:].float().mean() < 0.98
    assert 0.92 < np.mean([bool(text) for text in data["texts"][1:]]) < 0.98
    assert torch.bincount(events)[1:].min() >= 5


def test_colour_and_pattern_are_in_the_picture(toy):
    data, images, truth = toy
    items = data["has_image"].nonzero()[:, 0].tolist()
    correct, pale = [], {p: [] for p in range(len(data_script.PATTERNS))}
    for i in items:
        picture = Image.fromarray(images[i].permute(1, 2, 0).numpy())
        hsv = np.array(picture.convert("HSV"), float) / 255
        hue = hsv[..., 0][hsv[..., 1] > 0.5] * 2 * np.pi
        mean = np.angle(np.exp(1j * hue).mean()) / 2 / np.pi % 1
        correct.append(round(mean * 8) % 8 == truth["colour"][i])
        edges = images[i].float().mean(0).diff(dim=0).abs().mean()
        pale[int(truth["pattern"][i])].append(float(edges))
    assert np.mean(correct) > 0.95
    plain, stripes = map(list(data_script.PATTERNS).index, ("plain", "stripes"))
    assert np.mean(pale[stripes]) > 1.5 * np.mean(pale[plain])


def test_material_is_in_the_text_only_and_looks_never(toy):
    data, _, truth = toy
    looks = {*data_script.COLOURS, *data_script.PATTERNS, "striped", "dotted", "checked"}
    for i in range(1, len(data["item_ids"])):
        words = set(re.findall(r"[a-z]+", (data["titles"][i] + " " + data["texts"][i]).lower()))
        assert not words & looks
        material = data_script.MATERIALS[truth["material"][i]]
        category = list(data_script.SHAPES)[truth["category"][i]]
        assert not words & (set(data_script.MATERIALS) - {material})
        assert material in words or not data["texts"][i]
        assert category in data["titles"][i].lower() and data["categories"][i][-1] == category


def test_circle_is_known_from_purchases_only(toy):
    data, images, truth = toy
    following = Counter()
    for a, b in zip(data["offsets"].tolist(), data["offsets"].tolist()[1:]):
        circles = truth["circle"][data["events"][a:b - 2].long()].tolist()      # training only
        following.update(zip(circles, circles[1:]))
    table = np.zeros((40, 40))
    for (before, after), n in following.items():
        table[before, after] = n
    companions = table.max(1).sum() / table.sum()
    assert companions > 8 / 40, companions                      # chance: about 1.5 / 25, were circles drawn anew
    kept = data["has_image"].nonzero()[:, 0]
    words = sorted({w for t in data["titles"] + data["texts"] for w in t.lower().split()})
    where = {w: k for k, w in enumerate(words)}
    text = torch.zeros(len(data["titles"]), len(words))
    for i, (title, body) in enumerate(zip(data["titles"], data["texts"])):
        text[i, [where[w] for w in (title + " " + body).lower().split()]] = 1
    for feature in (text[kept], images[kept].flatten(1).float() / 255):
        distance = torch.cdist(feature, feature).fill_diagonal_(float("inf"))
        circle = truth["circle"][kept]
        assert (circle[distance.argmin(1)] == circle).float().mean() < 0.06     # chance 1 / 25


def test_same_seed_same_bits(tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        spawn(tmp_path / name, "--smoke", "--seed", seed)
    (a, pa), (b, pb), (c, _) = (read(tmp_path / name) for name in "abc")
    a["meta"].pop("options"), b["meta"].pop("options")
    assert a.keys() == b.keys() and torch.equal(pa, pb)
    assert all(torch.equal(a[k], b[k]) if torch.is_tensor(a[k]) else a[k] == b[k] for k in a)
    assert len(a["user_ids"]) == 200 and 56 <= len(a["item_ids"]) <= 61
    assert len(a["events"]) != len(c["events"]) or not torch.equal(a["events"], c["events"])


# --- the rules ----------------------------------------------------------------------------------
def test_k_core_is_the_largest_set_in_which_all_have_enough():
    rng = np.random.default_rng(0)
    user, item = rng.integers(0, 80, 440), rng.integers(0, 90, 440)
    kept = set(data_script.k_core(user, item, 4).tolist())
    left = set(range(440))
    while True:                                                 # the slow definition
        u, i = Counter(user[e] for e in left), Counter(item[e] for e in left)
        fewer = {e for e in left if u[user[e]] >= 4 and i[item[e]] >= 4}
        if fewer == left:
            break
        left = fewer
    assert kept == left and 0 < len(kept) < 440
    pairs = np.array([0, 0, 0, 1, 1]), np.array([0, 1, 2, 0, 1])
    assert data_script.k_core(*pairs, 1).tolist() == [0, 1, 2]  # three events a user whatever k is


def test_order_repeats_and_sorted_ids(tmp_path):
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
    counts = data["meta"]["counts"]
    assert counts["events: repeats"] == 2 and not images.any()
    assert not data["has_image"].any() and data["titles"] == [""] * 7


def test_ties(tmp_path):
    folder = shop(tmp_path / "shop", dense(20, 8, time=lambda u, i: 7))
    found = []
    for name, *options in (("a",), ("b",), ("c", "--seed", 1), ("d", "--ties", "file")):
        run(tmp_path / name, "--dataset", folder, *options)
        found.append(histories(read(tmp_path / name)[0]))
    in_file = [f"i{i}" for i in range(8)]
    assert found[0] == found[1] != found[2]
    assert all(h == in_file for h in found[3].values())
    assert sum(h == in_file for h in found[0].values()) < 3 and len(found[0]) == 20


def test_max_events_users_items(tmp_path):
    folder = shop(tmp_path / "shop", dense(12, 9) + [("extra", "i3", 1), ("other", "i3", 1)])
    run(tmp_path / "a", "--dataset", folder, "--max-events", 5)
    found = histories(read(tmp_path / "a")[0])
    assert all(h == ["i4", "i5", "i6", "i7", "i8"] for h in found.values()) and len(found) == 12
    run(tmp_path / "b", "--dataset", folder, "--max-users", 7, "--max-items", 6)
    found = histories(read(tmp_path / "b")[0])
    assert len(found) == 7 and all(len(h) == 6 and "i3" in h for h in found.values())


def test_malformed_lines_are_counted_by_reason(tmp_path):
    extra = ['{"user_id": "u0", ', "[1, 2]", '{"parent_asin": "i0", "timestamp": 1}',
             '{"user_id": "u0", "timestamp": 1}', '{"user_id": "u0", "parent_asin": "i0"}',
             '{"user_id": "u0", "parent_asin": "i0", "timestamp": "noon"}',
             '{"user_id": "", "parent_asin": "i0", "timestamp": 1}',
             '{"user_id": "u0", "parent_asin": "i0", "timestamp": 1e400}',
             '{"user_id": "u0", "parent_asin": "i0", "timestamp": 99999999999999999999}']
    items = [{"parent_asin": "i0", "title": None, "features": None, "description": "plain words",
              "categories": [["A", "B"], "C"], "images": None},
             {"parent_asin": "i1", "title": "\ud800 odd", "features": ["one", None, 2],
              "description": ["three"] * 2000, "categories": [], "main_category": "Main",
              "images": [{"large": "../../outside.jpg"}]}, {"title": "nobody"}]
    folder = shop(tmp_path / "shop", dense(), items, extra)
    Image.new("RGB", (9, 9), "red").save(tmp_path / "outside.jpg")
    printed = run(tmp_path / "run", "--dataset", folder).stdout
    data, _ = read(tmp_path / "run")
    counts = data["meta"]["counts"]
    assert counts["reviews.jsonl: malformed line"] == 2 and counts["events: well-formed"] == 36
    assert counts["events: no user"] == 2 and counts["events: no item"] == 1
    assert counts["events: bad time"] == 4 and counts["items: not in the catalogue"] == 4
    assert "events: bad time" in printed
    assert data["titles"][1] == "" and data["texts"][1] == "plain words"
    assert data["categories"][1] == ["A", "B", "C"] and data["categories"][2] == ["Main"]
    assert data["titles"][2] == "? odd" and data["texts"][2].startswith("one 2 three")
    assert len(data["texts"][2]) == 2000 and not data["has_image"].any()


def test_pictures_of_all_kinds(tmp_path):
    items = [{"parent_asin": f"i{i}", "images": []} for i in range(5)]
    items[0]["images"] = [{"large": "images/back.jpg"},
                          {"large": "images/front.jpg", "variant": "MAIN"}]
    items[3]["images"] = [{"large": "images/clear.png"}]
    items[4]["images"] = [{"thumb": "images/bomb.png", "large": None}]
    folder = shop(tmp_path / "shop", dense(5, 6), items)
    (folder / "images").mkdir()
    (folder / "images" / "front.jpg").write_bytes(jpeg("red", (900, 300)))
    (folder / "images" / "back.jpg").write_bytes(jpeg("blue"))
    (folder / "images" / "i1.jpg").write_bytes(jpeg("lime"))
    (folder / "images" / "i2.jpg").write_bytes(jpeg("lime")[:400])          # breaks off
    Image.new("RGBA", (50, 50), (0, 0, 0, 0)).save(folder / "images" / "clear.png")
    Image.new("1", (8000, 8000)).save(folder / "images" / "bomb.png")       # 64 million pixels
    run(tmp_path / "run", "--dataset", folder, "--image-size", 16)
    data, images = read(tmp_path / "run")
    assert data["has_image"].tolist() == [False, True, True, False, True, False, False]
    colours = images.float().mean((2, 3)).round().int().tolist()
    assert images.shape == (7, 3, 16, 16) and colours[1][0] > 250 and colours[2][1] > 250
    assert colours[4] == [255] * 3 and colours[0] == colours[3] == colours[5] == [0] * 3
    assert sum(n for reason, n in data["meta"]["counts"].items() if "picture lost" in reason) == 2
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["data.pt", "images.pt", "items.png"]


def test_pixelrec_layout(tmp_path):
    folder = tmp_path / "pixel"
    for name, header, rows in (
            ("interactions", "item_id,user_id,timestamp",
             [(i, u, t) for u, i, t in [*dense(), ("u0", "i0", "x")]]),
            ("items", "item_id,view_number,tag,title,description",
             [("i0", 3, "music", 'a "song", sung', "two\nlines"), ("i1", 4, "", "", "")])):
        (folder / name).mkdir(parents=True)
        with open(folder / name / "Pixel200K.csv", "w", newline="") as file:
            csv.writer(file).writerows([header.split(","), *rows])
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
    lines[0], lines[20], lines[41] = f'"{lines[0]}', f'"{lines[20]}', f"{lines[41]},more"
    for name, header, rows in ("interactions", "item_id,user_id,timestamp", lines), ("items", "item_id,title", []):
        (tmp_path / "pixel" / name).mkdir(parents=True)
        (tmp_path / "pixel" / name / "all.csv").write_text("\n".join([header, *rows]) + "\n")
    run(tmp_path / "run", "--dataset", tmp_path / "pixel")
    data, _ = read(tmp_path / "run")
    counts = data["meta"]["counts"]
    assert counts["all.csv: malformed line"] == 22 and counts["events: well-formed"] == len(lines) - 22
    assert all(items == sorted(items, reverse=True) for items in histories(data).values())


def test_an_interrupted_run_leaves_nothing_half_and_the_next_one_is_the_same(tmp_path, monkeypatch):
    folder, options = shop(tmp_path / "shop", dense(12, 9)), ("--image-size", 8)
    run(tmp_path / "run", "--dataset", folder, *options)
    whole = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}

    def interrupt(*_):
        raise KeyboardInterrupt
    for where, name in ((data_script, "k_core"), (data_script, "read_catalogue"), (data_script.Run, "save")):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(where, name, interrupt)
            run(tmp_path / "run", "--dataset", folder, *options)
        assert not [path for path in (tmp_path / "run").iterdir() if path.name not in whole]
        run(tmp_path / "run", "--dataset", folder, *options)
        assert whole == {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}


# --- from the network ---------------------------------------------------------------------------
@pytest.fixture
def server():
    """Fails as real hosts do: one 500, one transfer that breaks off, one picture that is gone."""
    files, asked = {}, []

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

    host = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=host.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{host.server_port}", files, asked
    host.shutdown()
    host.server_close()


def test_category_from_a_server(tmp_path, server, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    url, files, asked = server
    names = {f"i{i}": f"i{i}" for i in range(5)} | {"i5": "../../i5"}
    events = [{"user_id": u, "parent_asin": names[i], "timestamp": t, "text": os.urandom(40).hex()}
              for u, i, t in dense()]
    items = [{"parent_asin": name, "title": f"Item {i}",
              "images": [{"large": f"{url}/pictures/{i}.jpg"}]} for i, name in names.items()]
    items[0]["images"] = [{"large": "file:///etc/hostname", "variant": "MAIN"}]
    packed = [gzip.compress("\n".join(map(json.dumps, rows)).encode()) for rows in (events, items)]
    files["/review_categories/Tiny_Shop.jsonl.gz"] = packed[0]
    files["/meta_categories/meta_Tiny_Shop.jsonl.gz"] = packed[1]
    files |= {f"/pictures/i{i}.jpg": jpeg("red") for i in (1, 2, 3, 5)}         # i4: 404
    options = "--dataset", "Tiny_Shop", "--base-url", url, "--cache", tmp_path / "cache"
    run(tmp_path / "run", *options)
    data, images = read(tmp_path / "run")
    assert data["item_ids"][1] == "../../i5" and data["titles"][1] == "Item i5"
    assert data["has_image"].tolist() == [False, True, False, True, True, True, False]
    assert all(images[i, 0].float().mean() > 240 for i in (1, 3, 4, 5))
    assert sum(n for reason, n in data["meta"]["counts"].items() if "picture lost" in reason) == 2
    made_from = [data["made_from"][f"{name}.jsonl.gz"] for name in ("reviews", "meta")]
    assert made_from == [hashlib.sha256(part).hexdigest() for part in packed]
    tries = [headers for path, headers in asked if path.endswith("/Tiny_Shop.jsonl.gz")]
    assert len(tries) == 2 and "Range" not in tries[0]
    assert tries[1]["Range"] == f"bytes={len(packed[0]) // 2}-" and tries[1]["If-Range"] == '"v1"'
    cached = [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]
    assert len(cached) == 6 and not [p for p in cached if p.suffix in (".partial", ".etag")]
    assert {p.read_bytes() for p in cached if p.suffix == ".gz"} == set(packed)
    before = len(asked)
    run(tmp_path / "again", *options)               # the cache has all but i4
    assert [path for path, _ in asked[before:]] == ["/pictures/i4.jpg"]
    assert torch.equal(read(tmp_path / "again")[0]["events"], data["events"])


@pytest.mark.parametrize("options", [
    ["--dataset", "no/such/folder"], ["--dataset", "nothing"], ["--k-core", "0"],
    ["--max-items", "-1"], ["--image-size", "-8"], ["--image-size", "1025"], ["--seed", "-1"],
    ["--seed", str(2 ** 32)], ["--max-items", "30000"], ["--max-users", "100000"],
    ["--dataset", "Tiny_Shop", "--base-url", "http://127.0.0.1:9"], ["--dataset", "."]])
def test_one_clear_sentence(tmp_path, options, monkeypatch):
    monkeypatch.setattr(data_script, "PAUSE", 0)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    done = run(tmp_path / "run", *options, ok=False)
    assert done.returncode == 2 and done.stdout == "" and not (tmp_path / "run").exists()
    assert len(done.stderr.strip().split("\n")) == 1 and done.stderr.strip().endswith(".")


def test_a_missing_dataset_ends_without_traceback(tmp_path):
    done = spawn(tmp_path / "run", "--dataset", "no_such_folder", ok=False)
    assert done.returncode == 2 and done.stdout == "" and not (tmp_path / "run").exists()
    assert done.stderr.count("\n") == 1 and "no_such_folder" in done.stderr


def test_a_broken_file_and_an_empty_core(tmp_path):
    folder = shop(tmp_path / "shop", dense(3, 3))
    done = run(tmp_path / "run", "--dataset", folder, ok=False)
    assert done.returncode == 2 and "5-core" in done.stderr and "Traceback" not in done.stderr
    packed = gzip.compress((folder / "reviews.jsonl").read_bytes())
    (folder / "reviews.jsonl").unlink()
    (folder / "reviews.jsonl.gz").write_bytes(packed[:-20])
    done = run(tmp_path / "run", "--dataset", folder, ok=False)
    assert done.returncode == 2 and "breaks off" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


# --- what hosts, files and disks do (tests/faults.py has more, and takes minutes) ------------------
@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(data_script, "PAUSE", 0.01)
    monkeypatch.setattr(data_script, "LONGEST_PAUSE", 1)
    monkeypatch.setattr(data_script, "TIMEOUT", (2, 1))
    monkeypatch.setattr(data_script, "LARGEST_FILE", 1 << 20)
    monkeypatch.setattr(data_script, "LARGEST_PICTURE", 1 << 20)


def category(events, items):
    return {"review_categories/Shop.jsonl.gz": gzip.compress(b"\n".join(
                json.dumps(e | {"text": os.urandom(40).hex()}).encode() for e in events)),
            "meta_categories/meta_Shop.jsonl.gz": gzip.compress(b"\n".join(
                json.dumps(item).encode() for item in items))}


@pytest.mark.parametrize("fault, works", [
    ("500-once", True), ("429-1-once", True), ("early-once", True), ("norange", True),
    ("changes", True), ("changesbadly", True), ("500", False), ("403", False), ("html", False),
    ("loop", False), ("endless", False), ("short", False), ("nolength", False)])
def test_a_download_is_complete_or_refused(tmp_path, impatient, fault, works):
    files = category(faults.dense(), [])
    host = faults.Host(files)
    done = run(tmp_path / "run", "--dataset", "Shop", "--cache", tmp_path / "cache", "--base-url",
               f"{host.url}/{fault}", ok=False)
    host.close()
    assert (done.returncode, done.stderr.count("\n")) == ((0, 0) if works else (2, 1)), done.stderr
    assert (tmp_path / "run").exists() == works
    if works:
        got = tmp_path / "cache" / "Shop" / "reviews.jsonl.gz"
        assert got.read_bytes() == files["review_categories/Shop.jsonl.gz"]


def test_no_data_file_sends_us_to_a_private_host(tmp_path, impatient):
    private = faults.Host({"x.jpg": jpeg("red")})
    files = {"x.jpg": jpeg("red")}
    host = faults.Host(files, elsewhere=f"{private.url}/ok/x.jpg")
    urls = [f"{host.url}/ok/x.jpg", f"{host.url}/elsewhere/x.jpg", f"{private.url}/ok/x.jpg",
            f"http://localhost:{private.port}/ok/x.jpg", f"http://0.0.0.0:{private.port}/ok/x.jpg",
            f"http://2130706433:{private.port}/ok/x.jpg", f"http://[::1]:{private.port}/ok/x.jpg",
            f"http://{host.url[7:]}@127.0.0.1:{private.port}/ok/x.jpg", "http://[fe80::1]/x.jpg",
            "http://169.254.169.254/latest/meta-data", "http://10.0.0.1/x.jpg", "ftp://10.0.0.1/x"]
    items = [{"parent_asin": f"i{i}", "images": [{"large": url}]} for i, url in enumerate(urls)]
    files |= category(faults.dense(6, len(urls)), items)
    run(tmp_path / "run", "--dataset", "Shop", "--cache", tmp_path / "c", "--base-url", f"{host.url}/ok")
    data, _ = read(tmp_path / "run")
    has = dict(zip(data["item_ids"], data["has_image"].tolist()))
    host.close(), private.close()
    assert [i for i in has if has[i]] == ["i0"] and not private.asked
    assert sum(n for why, n in data["meta"]["counts"].items() if "lost" in why) == len(urls) - 1


def test_hostile_lines_are_dropped_and_counted(tmp_path):
    rng = random.Random(1)
    lines = [re.sub(rb"[\r\n]", b"", faults.fuzzed_line(rng)) for _ in range(1500)]
    ids = ["", None, "x" * 4000, "a\nb", "\ud800", True, 1.5, ["i0"], {}, "../../x", "CON", 7]
    named = [{"user_id": "u0", "parent_asin": name, "timestamp": 5} for name in ids]
    times = [{"user_id": "u0", "parent_asin": "i0", "timestamp": t}
             for t in (-1, 5 * 10 ** 12, float("nan"), float("inf"), None, [], "noon")]
    folder = faults.shop(tmp_path / "shop", lines + faults.dense(30, 30) + named + times, [
        {"parent_asin": "i0", "title": "T" * 600_000 + "\x1b[31m", "description": [[[[[["deep"]]]]]]},
        *(line.replace(b'"user_id"', b'"user"') for line in lines)])
    run(tmp_path / "run", "--dataset", folder, "--image-size", 8)
    data, _ = read(tmp_path / "run")
    counts, N = data["meta"]["counts"], len(data["item_ids"]) - 1
    reasons = ("well-formed", "no user", "no item", "bad time")
    read_all = counts["reviews.jsonl: malformed line"] + sum(counts[f"events: {r}"] for r in reasons)
    assert read_all == len(lines) + 900 + len(named) + len(times)
    assert counts["events: no item"] >= 9 and counts["events: bad time"] >= 7 and N >= 30
    assert len(data["titles"][data["item_ids"].index("i0")]) == 500
    assert not re.search("[\x00-\x1f\x7f\ud800-\udfff]", "".join(data["titles"] + data["texts"]))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run", "shop"]


def test_hostile_pictures_are_missing_and_counted(tmp_path):
    n = 45
    folder = faults.shop(tmp_path / "shop", faults.dense(5, n), [{"parent_asin": f"i{i}"} for i in range(n)])
    (folder / "images").mkdir()
    whole = [faults.fuzzed_picture(i, random.Random(i), folder / "images" / f"i{i}.jpg") for i in range(n)]
    run(tmp_path / "run", "--dataset", folder, "--image-size", 16)
    data, _ = read(tmp_path / "run")
    has = dict(zip(data["item_ids"], data["has_image"].tolist()))
    assert all(has[f"i{i}"] for i in range(n) if whole[i]) and sum(has.values()) < n
    assert sum(k for why, k in data["meta"]["counts"].items() if why.startswith("items: p")) == n
    assert not Path("/tmp/owned").exists(), "PostScript was run"


def test_an_endless_line_is_read_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(data_script, "LONGEST_LINE", 1000)
    folder = faults.shop(tmp_path / "shop", [b"x" * 10_000, *faults.dense()])
    run(tmp_path / "run", "--dataset", folder)
    assert read(tmp_path / "run")[0]["meta"]["counts"]["reviews.jsonl: malformed line"] == 11


def test_a_full_disk_and_a_run_that_is_a_file(tmp_path):
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))
    done = faults.start(1, "--run", tmp_path / "run", "--smoke", preexec_fn=limit)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "too large" in done.stderr
    assert not [*(tmp_path / "run").iterdir()]
    (tmp_path / "file").touch()
    done = faults.start(1, "--run", tmp_path / "file", "--smoke")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "file" in done.stderr


@pytest.mark.parametrize("items", [3, 30])
def test_the_sheet_shows_items_and_a_history(tmp_path, items):
    folder = shop(tmp_path / "shop", dense(6, items), [
        {"parent_asin": f"i{i}", "title": "A title " * 20} for i in range(items)])
    (folder / "images").mkdir()
    (folder / "images" / "i0.jpg").write_bytes(jpeg("red"))
    run(tmp_path / "run", "--dataset", folder, "--k-core", 3)
    sheet = np.array(Image.open(tmp_path / "run" / "items.png").convert("RGB"))
    assert sheet.shape[1] == 900
    red, grey = (np.abs(sheet.astype(int) - colour).max(2) < 9 for colour in ((254, 0, 0), (204, 204, 204)))
    assert 10_000 <= red.sum() < 100_000 and grey.sum() >= 40_000


# --- real data ----------------------------------------------------------------------------------
def test_movietweetings(tmp_path):
    folder = SHARED / "movietweetings-2013"
    if not folder.is_dir() and not os.environ.get("CI"):
        pytest.skip(f"{folder} is not here: the data is measured on, not part of the product")
    run(tmp_path / "run", "--dataset", folder, "--image-size", 32)
    data, images = read(tmp_path / "run")
    sizes = len(data["user_ids"]), len(data["item_ids"]) - 1, len(data["events"])
    assert sizes == (5973, 3119, 102461)
    assert int(data["has_image"].sum()) == 2298 and images.shape == (3120, 3, 32, 32)
    assert all(data["titles"][1:]) and data["meta"]["truth"] == {}
