"""01: the events, texts and pictures of a shop, in one form for the five scripts that follow.

Draws a toy shop, reads a folder, or downloads a category of Amazon Reviews 2023; drops malformed
lines and repeats, keeps the 5-core, puts every user's events in order of time: the last one is
for the test, the last but one for validation, the rest for training.

    python 01_data.py                                       # the toy shop
    python 01_data.py --run runs/beauty --dataset Beauty_and_Personal_Care
    python 01_data.py --run runs/mine --dataset my_folder   # reviews.jsonl, meta.jsonl, images/

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
import argparse, array, collections, colorsys, csv, functools, gzip, hashlib, io, ipaddress, json
import mmap, multiprocessing.pool, os, re, socket, sys, tempfile, textwrap, time, zlib
from pathlib import Path
import numpy as np
import requests, torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from tqdm import tqdm

MIN_EVENTS = 3                      # a user needs one event each to train, validate and test
FETCHERS, DECODERS = 32, 4          # threads; decoding takes memory, which each of them keeps
Image.MAX_IMAGE_PIXELS = 12_500_000  # Pillow refuses twice as many: an attack on memory
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP")     # Pillow would run a program for PostScript
HOSTS = ["https://mcauleylab.ucsd.edu/public_datasets/data/amazon_2023/raw",
         "https://datarepo.eng.ucsd.edu/mcauley_group/data/amazon_2023/raw"]
BROKEN = requests.packages.urllib3.exceptions.HTTPError     # a transfer that may go on
TRIES, PAUSE, PATIENCE, TIMEOUT = 6, 0.25, 60, (10, 60)  # seconds: the last to connect, to go on
LONGEST = {".gz": 100 << 30, ".jpg": 50 << 20, "line": 1 << 24}     # bytes; no host is trusted
RANGES = {"k_core": range(1, 10 ** 6), "image_size": range(1025)}
LAST_TIME = 4_102_444_800_000       # the year 2100 in milliseconds; seconds and ranks are less
MADE_FROM = {}  # SHA-256 of every file that was read; all that is saved carries them
def fail(message):
    """Ends the script with one sentence and exit code 2: no traceback, nothing half-written."""
    print(message, file=sys.stderr)
    sys.exit(2)

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

# --- The toy shop --------------------------------------------------------------------------------
# Colour and pattern are seen only in the picture, the material is named only in the text, the
# circle shows only in what follows what. The next item is drawn from a softmax of the sum of:
POPULARITY = 0.5    # -POPULARITY * log(rank): Zipf's law, a few items sell and most are rare
TASTE = {"colour": 3.0, "pattern": 1.5, "material": 3.0}    # the item has the customer's favourite
COMPANION, FOLLOWING = 4.5, 0.5     # it is of the circle, the category, that follows the last one
WHIM = 0.1          # share of events that ignore all this: any item, equally likely
INCOMPLETE, CIRCLES = 0.05, 25      # share without picture, without text; circles of items
COLOURS = "red amber lime green cyan blue violet magenta".split()   # eight hues, evenly spaced
PATTERNS = {"plain": lambda x, y: x < 0, "stripes": lambda x, y: y % 1 < 0.5,  # where to paint pale
            "bars": lambda x, y: x % 1 < 0.5, "diagonals": lambda x, y: (x + y) % 1 < 0.5,
            "checks": lambda x, y: (x % 1 < 0.5) ^ (y % 1 < 0.5),
            "dots": lambda x, y: (x % 1 - 0.5) ** 2 + (y % 1 - 0.5) ** 2 < 0.1}
SHAPES = {"bag": "04 24 31 61 74 94 99 09", "bottle": "40 50 53 73 79 29 23 43",  # corners: x, y
          "bowl": "03 93 86 69 39 16", "chair": "10 30 35 85 89 69 67 37 39 19",   # in ninths
          "clock": "20 70 92 97 79 29 07 02", "cushion": "00 52 90 75 99 57 09 25",
          "hat": "20 70 76 96 99 09 06 26", "lamp": "30 60 95 55 58 79 29 48 45 05",
          "mug": "00 60 61 91 97 67 66 86 82 62 69 09", "stool": "02 92 99 79 75 25 29 09",
          "tray": "02 92 87 17", "vase": "20 70 63 96 79 29 06 33"}
MATERIALS = "cotton wool linen leather oak bamboo steel brass glass ceramic".split()
MAKERS = "Alder Brook Calder Dunmore Elmway Fenwick Garrow Hollis Ivesen Kestrel".split()
TITLES = ("{maker} {material} {category}", "A {category} by {maker}", "The {maker} {category}")
ABOUT = ("{maker} makes this {category} from chosen {material}. It ships within two days.",
         "A {category} of {material}, made to be used every day.", "Finished by hand: {material}.")

def draw(look, S):
    """Draws, say, "bag red dots 17" at 3 S; 17 seeds what is chance: size, place, tint, noise."""
    category, colour, pattern, seed = look.split()
    rng, side = np.random.default_rng(int(seed)), 3 * S
    size, left, top = rng.uniform((0.7, 0, 0), (0.9, 0.1, 0.1))
    corners = [(side * (left + size * int(x) / 9), side * (top + size * int(y) / 9))
               for x, y in SHAPES[category].split()]
    ImageDraw.Draw(mask := Image.new("L", (side, side))).polygon(corners, fill=255)
    y, x = np.mgrid[:side, :side] * rng.uniform(3.5, 4.5) / side + rng.uniform(0, 1, (2, 1, 1))
    hue = (COLOURS.index(colour) / len(COLOURS) + rng.normal(0, 0.01)) % 1
    ink = 255 * np.array(colorsys.hsv_to_rgb(hue, rng.uniform(0.75, 1), rng.uniform(0.7, 0.95)))
    paper = 255 * np.array(colorsys.hsv_to_rgb(rng.random(), rng.uniform(0, 0.15), 0.95))
    pixels = np.where(PATTERNS[pattern](x, y)[..., None], 0.4 * ink + 0.6 * 255, ink)
    pixels = np.where(np.array(mask)[..., None] > 0, pixels, paper)  # (3S, 3S, 3)
    return Image.fromarray((pixels + rng.normal(0, 8, pixels.shape)).clip(0, 255).astype(np.uint8))

def toy_shop(n, U, seed):
    """-> events and catalogue as a shop would log them, and the truth behind them."""
    rng = np.random.default_rng(seed)
    words = dict(category=list(SHAPES), colour=COLOURS, pattern=list(PATTERNS),
                 material=MATERIALS, circle=range(CIRCLES))
    truth = {name: rng.integers(len(values), size=n) for name, values in words.items()}  # (n,) each
    taste = np.tile(-POPULARITY * np.log(1 + rng.permutation(n)), (U, 1))  # (U, n)
    for name, weight in TASTE.items():
        taste += weight * (truth[name] == rng.integers(len(words[name]), size=(U, 1)))
    companion, following = rng.permutation(CIRCLES), rng.permutation(len(SHAPES))
    lengths = np.minimum(4 + rng.geometric(1 / 4.5, U), min(20, n))  # (U,)
    walked = np.full((U, 20), -1)  # (U, 20)
    for t in range(lengths.max()):          # all customers take their step t at once
        active = np.flatnonzero(lengths > t)  # (active,)
        score = taste[active]  # (active, n)
        if t > 0:
            previous = walked[active, t - 1, None]  # (active, 1)
            score += COMPANION * (truth["circle"] == companion[truth["circle"][previous]])
            score += FOLLOWING * (truth["category"] == following[truth["category"][previous]])
        score[rng.random(len(active)) < WHIM] *= 1e-9   # all alike; what was taken stays -inf
        score += rng.gumbel(size=score.shape)   # argmax of score + Gumbel noise ~ softmax(score)
        walked[active, t] = score.argmax(1)
        taste[active, walked[active, t]] = -np.inf      # nobody takes an item twice
    events = ({"user_id": f"user{u:06d}", "asin": f"item{walked[u, t]:06d}", "timestamp": t}
              for u, t in np.argwhere(walked >= 0))
    catalogue = []
    for i in range(n):
        word = {name: values[truth[name][i]] for name, values in words.items()}
        word |= {"maker": rng.choice(MAKERS), "seed": rng.integers(1 << 30)}
        title, about, look = (template.format(**word) for template in (
            rng.choice(TITLES), rng.choice(ABOUT), "{category} {colour} {pattern} {seed}"))
        catalogue.append({"asin": f"item{i:06d}", "title": title, "categories": [word["category"]],
                          "description": [about] * (rng.random() > INCOMPLETE),
                          "images": [{"large": look}] * (rng.random() > INCOMPLETE)})
    return events, catalogue, {name: values.tolist() for name, values in truth.items()}

# --- Reading: one dict a line, whatever the format -----------------------------------------------
def rows(path, counts):
    """Yields the records of a .jsonl or .csv, perhaps packed as .gz; counts malformed lines."""
    with open(path, "rb") as raw, tqdm.wrapattr(raw, "read", total=path.stat().st_size,
                                                desc=path.name, disable=None, leave=False) as file:
        lines = io.TextIOWrapper(gzip.open(file) if path.suffix == ".gz" else file, "utf-8-sig",
                                 "surrogateescape", newline="")
        lines = iter(functools.partial(lines.readline, LONGEST["line"]), "")
        csv.field_size_limit(LONGEST["line"])
        table = csv.DictReader(lines, strict=True) if ".csv" in path.name else None
        decode, bad = json.JSONDecoder().raw_decode, f"{path.name}: malformed line"
        while begin := max(1, table.reader.line_num if table else 0):  # lines read, or the header
            try:
                row, end = (next(table), 0) if table else decode(line := next(lines).lstrip())
                assert isinstance(row, dict) and not (None in row if table else line[end:].strip())
                yield row
            except StopIteration:
                return
            except (OSError, EOFError, zlib.error) as error:
                fail(f"{path} breaks off ({error}): delete it and get it again.")
            except (AssertionError, ValueError, RecursionError, csv.Error):
                counts[bad] += table.reader.line_num - begin if table else 1  # a lost quote: many

item_of = lambda row: row.get("parent_asin", row.get("asin", row.get("item_id")))  # or PixelRec's

class Numbers(dict):
    """id -> 0, 1, 2, ... in order of appearance. AssertionError, TypeError: that is none."""
    def __missing__(self, value):
        name = str(value)
        assert type(value) in (str, int) and 0 < len(name) < 256 and name.isprintable()
        return self.setdefault(name, len(self))

def read_events(source, counts):
    """Three numbers an event: -> user, item int32 (events), time float64 (events), both ids."""
    users, items, user, item, time = Numbers(), Numbers(), *map(array.array, "iid")
    for row in source:
        u = i = None
        try:
            u = users[row["user_id"]]
            i = items[item_of(row)]
            assert 0 <= (t := float(row["timestamp"])) < LAST_TIME
            user.append(u), item.append(i), time.append(t)
        except (AssertionError, KeyError, TypeError, ValueError, OverflowError):
            why = "no user" if u is None else "no item" if i is None else "bad time"
            counts[f"events: {why}"] += 1
    counts["events: well-formed"] = len(time)
    return np.array(user), np.array(item), np.array(time), list(users), list(items)

def download(session, url, path):
    """Fetches url, going on where an earlier try broke off. Raises requests.RequestException."""
    partial, tag = (path.with_name(path.name + end) for end in (".partial", ".etag"))
    for n in range(TRIES):
        time.sleep(PAUSE * (2 ** n - 1))
        version = tag.read_text() if tag.exists() and partial.exists() else ""
        have, headers = partial.stat().st_size if version else 0, {"Accept-Encoding": "identity"}
        if have:                     # the rest; or all of it if the file has changed since
            headers |= {"Range": f"bytes={have}-", "If-Range": version}
        try:
            with session.get(url, headers=headers, stream=True, timeout=TIMEOUT,
                             allow_redirects=path.suffix == ".gz") as reply:
                get, status = reply.headers.get, reply.status_code
                now = get("ETag") or get("Last-Modified") or version * (status == 206)
                if status in (416, 429) or status >= 500 or status == 206 and now != version:
                    tag.write_text("" if status < 429 else version)     # no rest of it: anew
                    time.sleep(min(float(re.sub(r"\D", "", get("Retry-After", "")) or 0), PATIENCE))
                    raise BROKEN(f"status {status}")
                reply.raise_for_status()
                have, kind = have * (status == 206), get("Content-Type", "")
                tag.write_text(now)
                with open(partial, "ab" if have else "wb") as file, tqdm.wrapattr(
                        file, "write", have + (reply.raw.length_remaining or 0), desc=path.name,
                        initial=have, disable=path.suffix != ".gz" or None) as progress:
                    while have <= LONGEST[path.suffix] and (part := reply.raw.read(1 << 18)):
                        have += progress.write(part)    # raw: a .gz stays packed
            tag.unlink()
            if have <= LONGEST[path.suffix] and status < 300 and "html" not in kind:
                return os.replace(partial, path)        # it gets its name when it is complete
            partial.unlink()
            raise requests.RequestException(f"{url} is endless, or no file")
        except (requests.ConnectionError, requests.Timeout, BROKEN) as error:
            problem = error
    raise requests.RequestException(f"{url} failed {TRIES} times: {problem}")

def fetch_category(category, session, hosts, folder):
    """Downloads what the folder lacks of the two files of a category of Amazon Reviews 2023."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for name, kind in ("reviews", "review_categories/"), ("meta", "meta_categories/meta_"):
        path = folder / f"{name}.jsonl.gz"
        for host in [] if path.exists() else hosts:
            try:
                download(session, f"{host.rstrip('/')}/{kind}{category}.jsonl.gz", path)
                break
            except (OSError, ValueError) as error:
                problem = error
        if not path.exists():
            fail(f"{path} cannot be had ({problem}): check the category, the network, --base-url.")

def open_folder(folder, session, hosts, counts):
    """-> events and catalogue (one dict a line), and what opens an item's picture."""
    tables = [p for k in ("*.jsonl", "*.jsonl.gz", "*.csv", "*/*.csv") for p in folder.glob(k)]
    events = [path for path in tables       # told by its fields: PixelRec's two have one name
              if any("user_id" in row for row, _ in zip(rows(path, counts.copy()), range(20)))]
    if len(events) != 1 or len(tables) != 2:
        fail(f"{folder} needs one file of events (with user_id), one of items: .jsonl(.gz), .csv.")
    for path in tables:
        name = str(path.relative_to(folder))
        MADE_FROM[name] = hashlib.file_digest(open(path, "rb"), "sha256").hexdigest()
    tables.remove(events[0])
    def find(item_id, picture):
        path = folder / "images" / f"{hashlib.sha256(item_id.encode()).hexdigest()}.jpg"
        if session and picture and not path.exists():
            host = requests.compat.urlsplit(picture)    # anybody may have written a data file
            if host.netloc not in hosts and not all(ipaddress.ip_address(ip).is_global for *_, (
                    ip, *_) in socket.getaddrinfo(host.hostname, None)):
                raise PermissionError("a host of this machine or its network")
            download(session, picture, path)
        for at in (f"images/{path.name}", picture, f"images/{item_id}.jpg", f"cover/{item_id}.jpg"):
            if ".." not in Path(at).parts and os.path.isfile(f"{folder}/{at}"):
                return Image.open(f"{folder}/{at}", formats=FORMATS)
    return rows(events[0], counts), rows(tables[0], counts), find

# --- The rules -----------------------------------------------------------------------------------
def k_core(user, item, k):
    """Drops users and items with too few events until none is left. -> the events that stay."""
    kept, before = np.arange(len(user)), -1
    while len(kept) != before:              # [3]
        before, u, i = len(kept), user[kept], item[kept]
        kept = kept[(np.bincount(u)[u] >= max(k, MIN_EVENTS)) & (np.bincount(i)[i] >= k)]
    return kept

def renumber(number, names):
    """Counts those that are left from 0, in sorted order of their id. -> numbers (events,), ids."""
    left, number = np.unique(number, return_inverse=True)
    order = sorted(range(len(left)), key=lambda i: names[left[i]])
    return np.argsort(order)[number], [names[left[i]] for i in order]

def arrange(user, item, time, user_ids, item_ids, args, counts):
    """Order, repeats, sample, k-core. -> events int32 (events), offsets int64 (U+1), both ids."""
    rng = np.random.default_rng(args.seed)
    ties = np.arange(len(user)) if args.ties == "file" else rng.permutation(len(user))
    order = np.lexsort((ties, time, user))              # file order can leak the test item [1]
    user, item = user[order].astype(np.int64), item[order]
    def keep(reason, chosen):
        nonlocal user, item
        counts[f"events: {reason}"] = len(user) - len(user[chosen])
        user, item = user[chosen], item[chosen]
    keep("repeats", np.sort(np.unique(user * len(item_ids) + item, return_index=True)[1]))
    frequent = np.argsort(-np.bincount(item), kind="stable")[:args.max_items or None]
    keep("beyond --max-items", np.isin(item, frequent))
    able = rng.permutation(np.flatnonzero(np.bincount(user) >= max(args.k_core, MIN_EVENTS)))
    keep("short history, or beyond --max-users", np.isin(user, able[:args.max_users or None]))
    from_end = np.bincount(user).cumsum()[user] - np.arange(len(user))             # 1 is the last
    keep("beyond --max-events", from_end <= (args.max_events or len(user)))
    keep(f"outside the {args.k_core}-core", k_core(user, item, args.k_core))
    if not len(user):
        fail(f"{args.dataset}: no event is left in the {args.k_core}-core of {dict(+counts)}.")
    user, user_ids = renumber(user, user_ids)
    item, item_ids = renumber(item, item_ids)
    by_user = np.argsort(user, kind="stable")
    offsets = np.concatenate([[0], np.bincount(user).cumsum()])  # (U+1,)
    return (1 + item[by_user]).astype(np.int32), offsets, user_ids, item_ids

# --- Texts and pictures of the items that are left -----------------------------------------------
def strings(value, deep=4):
    """A real catalogue holds null, a string, a list or a list of lists in one field."""
    if isinstance(value, list):
        return [text for part in value[:2000 * deep] for text in strings(part, deep - 1)]
    text = " ".join(str(value)[:10_000].split()) if type(value) in (str, int) else ""
    text = re.sub(r"[\0-\x1f\x7f-\x9f]", "", text).encode("utf-8", "replace").decode()
    return [text] if text else []

def read_catalogue(source, item_ids, counts):
    """-> titles, texts, categories, pictures (address, path or look; "": none): lists (N+1)."""
    number = {item_id: i for i, item_id in enumerate(item_ids, 1)}
    titles, texts, pictures = ([""] * (len(item_ids) + 1) for _ in range(3))
    categories = [[] for _ in titles]
    for row in source:
        if not (i := number.pop(str(item_of(row)), 0)):
            counts["catalogue: line of an item not kept, or its second"] += 1
            continue
        titles[i] = " ".join(strings(row.get("title")))[:500]
        texts[i] = " ".join(strings([row.get("features"), row.get("description")]))[:2000]
        categories[i] = strings(row.get("categories") or row.get("main_category") or row.get("tag"))
        images = row.get("images") if isinstance(row.get("images"), list) else []
        images = sorted((image for image in images if isinstance(image, dict)),
                        key=lambda image: image.get("variant") != "MAIN")   # stable: else the first
        sizes = [image.get(size) for image in images for size in ("large", "hi_res", "thumb")]
        pictures[i] = (strings(sizes) + [""])[0]
    counts["items: not in the catalogue"] = len(number)
    return titles, texts, categories, pictures

def write_images(path, find, item_ids, pictures, S, counts):
    """Squeezes every picture to S x S, into a file rather than into memory. -> has_image (N+1,)"""
    def squeeze(image):
        image.draft("RGB", (2 * S, 2 * S))              # a JPEG decodes at 1/2, 1/4, 1/8 for less
        if image.mode[0] == "I":                        # 16 bits, which Pillow would cut to 8
            image = image.point(lambda value: value * (1 / 256)).convert("L")
        image = ImageOps.exif_transpose(image).convert("RGBA").resize((S, S), Image.LANCZOS)
        image = Image.alpha_composite(Image.new("RGBA", (S, S), "white"), image)
        return np.array(image)[..., :3].transpose(2, 0, 1).tobytes()  # (3, S, S)
    def fetch(i):
        try:
            image = find(item_ids[i - 1], pictures[i])
            return ("picture", decoders.apply(squeeze, [image])) if image else ("no picture", blank)
        except Exception as error:          # Pillow has no one error for a broken picture
            return f"picture lost ({type(error).__name__})", blank

    pool, blank = multiprocessing.pool.ThreadPool, bytes(3 * S * S)  # a write tells of a full disk
    with (tempfile.TemporaryFile(dir=path.parent) as file, pool(DECODERS) as decoders,
          pool(FETCHERS) as fetchers):
        states, done = [file.write(blank)], fetchers.imap(fetch, range(1, len(pictures)), 16)
        for state, pixels in tqdm(done, "pictures", len(item_ids), disable=None):  # after padding
            states.append(state), file.write(pixels)
        file.flush()
        images = torch.frombuffer(mmap.mmap(file.fileno(), 0), dtype=torch.uint8)
        save({"images": images.view(-1, 3, S, S)}, path)  # (N+1, 3, S, S)
    counts.update(f"items: {state}" for state in states[1:])
    return torch.tensor([state == "picture" for state in states])  # (N+1,)

def draw_sheet(path, images, has_image, names, shown, history):
    """24 items and, below, a history of 8: S x S pixels, all that the models see of a picture."""
    pen = ImageDraw.Draw(page := Image.new("RGB", (900, 607), "white"))
    pen.font = ImageFont.load_default(12)
    pen.text((12, 448), "A user's history, the last two for validation and test:", "black")
    for n, i in [*enumerate(shown), *enumerate(history, 24)]:
        x, y = 12 + n % 8 * 111, 12 + n // 8 * 145 + n // 24 * 22
        tile = Image.fromarray(images[i].permute(1, 2, 0).numpy()).resize((100, 100))
        page.paste(tile if has_image[i] else "#ccc", (x, y, x + 100, y + 100))
        pen.text((x, y + 103), textwrap.fill(names[i], 16, max_lines=2, placeholder="..."), 0)
    page.save(path.with_suffix(".partial"), "PNG")
    os.replace(path.with_suffix(".partial"), path)

# --- The script ----------------------------------------------------------------------------------
def main(argv=None):
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--run", type=Path, default=Path("runs/toy"), help="folder of this run")
    add("--dataset", default="toy", help="toy, a folder, or a category of Amazon Reviews 2023")
    add("--cache", type=Path, default=Path("~/.cache/mscgrec"), help="folder for downloads")
    add("--base-url", nargs="+", default=HOSTS, help="hosts or mirrors, tried one after another")
    add("--k-core", type=int, default=5, help="least events of a user and of an item")
    add("--max-events", type=int, default=0, help="keep a user's last ones only (0: all)")
    add("--max-items", type=int, default=0, help="keep the most frequent ones (0: all)")
    add("--max-users", type=int, default=0, help="keep some, drawn by the seed (0: all)")
    add("--ties", choices=("shuffle", "file"), default="shuffle", help="order of equal times")
    add("--image-size", type=int, default=0, help="S (0: 32 for toy, 64 for others)")
    add("--seed", type=int, default=0, help="of the toy shop, of ties, of --max-users")
    add("--device", default="auto", help="as in the other scripts; this one needs the CPU only")
    add("--smoke", action="store_true", help="seconds: 60 items, 200 users")
    if parser.parse_known_args(argv)[0].smoke:
        parser.set_defaults(max_items=60, max_users=200)
    args = parser.parse_args(argv)
    for name, value in vars(args).items():
        if isinstance(value, int) and value not in RANGES.get(name, range(2 ** 32)):
            fail(f"--{name.replace('_', '-')} {value} is too small or too large.")
    if args.dataset == "toy" and (args.max_items or 1050) * (args.max_users or 4000) > 10 ** 8:
        fail("The toy shop ends at 100,000,000 pairs: lower --max-items or --max-users.")
    S = args.image_size or (32 if args.dataset == "toy" else 64)
    counts, session, truth = collections.Counter(), None, {}
    if args.dataset == "toy":
        events, items, truth = toy_shop(args.max_items or 1050, args.max_users or 4000, args.seed)
        find = lambda item_id, look: look and draw(look, S)
    else:
        if not (folder := Path(args.dataset).expanduser()).is_dir():
            if not re.fullmatch(r"[A-Z][A-Za-z_]+", args.dataset):
                fail(f"{args.dataset} is neither toy, nor a folder here, nor an Amazon category.")
            session, folder = requests.Session(), args.cache.expanduser() / args.dataset
            session.mount("https://", requests.adapters.HTTPAdapter(FETCHERS, FETCHERS))
            fetch_category(args.dataset, session, args.base_url, folder)
        hosts = [requests.compat.urlsplit(url).netloc for url in args.base_url]
        events, items, find = open_folder(folder, session, hosts, counts)
    events, offsets, user_ids, item_ids = arrange(*read_events(events, counts), args, counts)
    titles, texts, categories, pictures = read_catalogue(items, item_ids, counts)
    U, N = len(user_ids), len(item_ids)
    last_two = np.concatenate([offsets[1:] - 1, offsets[1:] - 2])  # (2U,)
    train_counts = np.bincount(np.delete(events, last_two), minlength=N + 1)  # (N+1,)  [2]
    truth = {name: [-1] + [of[int(i[4:])] for i in item_ids] for name, of in truth.items()}

    args.run.mkdir(parents=True, exist_ok=True)
    (args.run / "data.pt").unlink(missing_ok=True)      # an old one must not meet new images
    has_image = write_images(args.run / "images.pt", find, item_ids, pictures, S, counts)
    with open(args.run / "images.pt", "rb") as file:    # data.pt belongs to these pictures
        MADE_FROM["images.pt"] = hashlib.file_digest(file, "sha256").hexdigest()
    popular = 1 + np.argsort(-train_counts[1:], kind="stable")  # (N,)
    history = events[offsets[U // 2]:offsets[U // 2 + 1]][-8:]
    names = [title or item_id for title, item_id in zip(titles, [""] + item_ids)]
    images = torch.load(args.run / "images.pt", weights_only=True, mmap=True)["images"]
    shown = popular[np.unique(np.linspace(0, N - 1, 24).astype(int))]   # from the most bought on
    draw_sheet(args.run / "items.png", images, has_image, names, shown, history)
    options = {k: v if isinstance(v, (int, str)) else str(v) for k, v in vars(args).items()}
    meta = {"source": args.dataset, "counts": dict(counts), "options": options, "truth": truth}
    save({"events": torch.from_numpy(events), "offsets": torch.from_numpy(offsets),
          "titles": titles, "texts": texts, "categories": categories, "has_image": has_image,
          "item_ids": [""] + item_ids, "user_ids": user_ids,
          "train_counts": torch.from_numpy(train_counts).int(), "meta": meta}, args.run / "data.pt")
    print("\n".join(f"{reason:52}{number:12,}" for reason, number in counts.items()))
    top_tenth = train_counts[popular[:max(1, N // 10)]].sum() / train_counts.sum()
    hits = np.isin(events[offsets[1:] - 1], popular[:10]).mean()
    print(f"\nU {U:,} users, N {N:,} items, {len(events):,} events: {len(events) / U:.1f} a user, "
          f"{len(events) / N:.1f} an item, density {len(events) / U / N:.3%}; items with a picture "
          f"{has_image.sum() / N:.1%}, a text {sum(map(bool, texts)) / N:.1%}\ntraining events on "
          f"the most popular tenth {top_tenth:.1%}; the top ten for all: Recall@10 {hits:.4f}")

if __name__ == "__main__":
    try:
        main()
    except (OSError, MemoryError, KeyboardInterrupt) as error:      # disk full, read-only, Ctrl-C
        fail(f"stopped ({type(error).__name__} {error}): the same command begins again.")
