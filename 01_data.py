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
          meta           dict             source, its files' SHA-256, what was dropped and why,
                                          options; truth of the toy shop
writes  images.pt
          images         uint8 (N+1, 3, S, S)   all zero where there is no picture
writes  items.png        what 24 items and one user's history look like at this size

On the toy shop: 3 seconds, 0.3 GiB (2 cores of an AMD EPYC).
"""
import argparse, array, colorsys, contextlib, csv, functools, gzip, hashlib, io, ipaddress, json
import mmap, multiprocessing.pool, os, re, socket, sys, tempfile, textwrap, threading, time, zlib
from collections import Counter
from itertools import islice
from pathlib import Path
from urllib.parse import urlsplit
import numpy as np
import requests
import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

MIN_EVENTS = 3                      # a user needs one event each to train, validate and test
WORKERS, DECODE = 32, threading.Semaphore(4)    # threads that fetch pictures, that decode them
Image.MAX_IMAGE_PIXELS = 12_500_000  # Pillow refuses twice as many: an attack on memory
FORMATS = ("JPEG", "PNG", "GIF", "WEBP", "BMP")     # Pillow would run a program for PostScript
HOSTS = ["https://mcauleylab.ucsd.edu/public_datasets/data/amazon_2023/raw",
         "https://datarepo.eng.ucsd.edu/mcauley_group/data/amazon_2023/raw"]
TRIES, PAUSES, TIMEOUT = 6, (0.5, 60), (10, 60)     # seconds: first, longest; connect, next bytes
LONGEST = {".gz": 100 << 30, ".jpg": 50 << 20}      # bytes of a download: no body is endless
LONGEST_LINE, LATEST = 1 << 24, 4_102_444_800_000   # characters; 2100 in ms (s are below it)

MADE_FROM = {}  # SHA-256 of every file that was read; all that is saved carries them

def fail(message):
    """Ends the script with one sentence and exit code 2: no traceback, nothing half-written."""
    print(message, file=sys.stderr)
    sys.exit(2)

def save(artifact, path):
    """Writes beside the file, flushes, renames: nobody ever sees half an artifact."""
    if os.environ.get("RANK", "0") != "0":
        return  # of the processes of torchrun only one writes
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "wb") as file:
            torch.save(artifact | {"made_from": MADE_FROM}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:  # a full disk, a folder that is read-only
        partial.unlink(missing_ok=True)
        fail(f"{path} cannot be written ({error}): make room, or choose another --run.")

# --- The toy shop --------------------------------------------------------------------------------
# Colour and pattern are seen only in the picture, the material is named only in the text, the
# circle shows only in what follows what. The next item is drawn from a softmax of the sum of:
POPULARITY = 0.5    # -POPULARITY * log(rank): Zipf's law, a few items sell and most are rare
TASTE = {"colour": 3.0, "pattern": 1.5, "material": 3.0}    # the item has the customer's favourite
COMPANION = 4.5     # the item is of the circle that goes with the circle of the previous item
FOLLOWING = 0.5     # the item is of the category that follows the previous item's category
WHIM = 0.1          # share of events that ignore all this: any item, equally likely
INCOMPLETE = 0.05   # share of items without picture; the same share has no description
CIRCLES = 25        # hidden groups of companions

COLOURS = "red amber lime green cyan blue violet magenta".split()   # eight hues, evenly spaced
PATTERNS = {"plain": lambda x, y: x < 0, "stripes": lambda x, y: y % 1 < 0.5,  # where to paint pale
            "bars": lambda x, y: x % 1 < 0.5, "diagonals": lambda x, y: (x + y) % 1 < 0.5,
            "checks": lambda x, y: (x % 1 < 0.5) ^ (y % 1 < 0.5),
            "dots": lambda x, y: (x % 1 - 0.5) ** 2 + (y % 1 - 0.5) ** 2 < 0.1}
# The corners of each category's drawing: x and y in ninths of its size.
SHAPES = {"bag": "04 24 31 61 74 94 99 09", "bottle": "40 50 53 73 79 29 23 43",
          "bowl": "03 93 86 69 39 16", "chair": "10 30 35 85 89 69 67 37 39 19",
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
                                 "replace", newline="")
        lines = iter(functools.partial(lines.readline, LONGEST_LINE), "")
        table = csv.DictReader(lines) if ".csv" in path.name else None
        decode = json.JSONDecoder().decode      # json.loads looks at its options at every line
        while True:
            try:
                row = next(table) if table else decode(next(lines))
                if not isinstance(row, dict):
                    raise ValueError("not a record")
                yield row
            except StopIteration:
                return
            except (OSError, EOFError, zlib.error) as error:
                fail(f"{path} breaks off ({error}): delete it and get it again.")
            except (ValueError, RecursionError, csv.Error):
                counts[f"{path.name}: malformed line"] += 1

def item_of(row):
    """The item's id, as Amazon Reviews 2023, its older releases and PixelRec name it."""
    return row.get("parent_asin", row.get("asin", row.get("item_id")))

class Numbers(dict):
    """id -> 0, 1, 2, ... in order of appearance. KeyError: empty, of another type, unprintable."""
    def __missing__(self, value):
        name = str(value) if type(value) in (str, int) else ""
        if not 0 < len(name) < 256 or not name.isprintable():
            raise KeyError(value)
        return self.setdefault(name, len(self))

def read_events(source, counts):
    """Of each event three integers stay in memory, of each id one string. -> user, item int32
    (events), time int64 (events), user ids, item ids in order of appearance."""
    users, items = Numbers(), Numbers()
    user, item, time = array.array("i"), array.array("i"), array.array("q")
    for row in source:
        try:
            reason = "no user"
            u = users[row["user_id"]]
            reason = "no item"
            i = items[item_of(row)]
            reason = "bad time"
            t = int(row["timestamp"])
            if not 0 <= t < LATEST:
                raise ValueError
        except (KeyError, TypeError, ValueError, OverflowError):
            counts[f"events: {reason}"] += 1
            continue
        user.append(u), item.append(i), time.append(t)
    counts["events: well-formed"] = len(time)
    return np.array(user), np.array(item), np.array(time), list(users), list(items)

def public(url):
    """False for hosts of this machine and its network: anybody may have written a data file."""
    with contextlib.suppress(OSError):          # a name unknown here: a proxy may know it
        found = socket.getaddrinfo(urlsplit(url).hostname, None)
        return all(ipaddress.ip_address(ip).is_global for *_, (ip, *_) in found)
    return True

def download(session, url, path):
    """Fetches url, going on where an earlier try broke off. Raises requests.RequestException."""
    partial, tag = (path.with_name(path.name + end) for end in (".partial", ".etag"))
    for n in range(TRIES):
        time.sleep(PAUSES[0] * (2 ** n - 1))
        version = tag.read_text() if tag.exists() and partial.exists() else ""
        have, headers = partial.stat().st_size if version else 0, {"Accept-Encoding": "identity"}
        if have:                     # the rest; or all of it if the file has changed since
            headers |= {"Range": f"bytes={have}-", "If-Range": version}
        try:
            with session.get(url, headers=headers, stream=True, timeout=TIMEOUT,
                             allow_redirects=path.suffix == ".gz") as reply:
                status, header = reply.status_code, reply.headers.get
                now = header("ETag") or header("Last-Modified") or version * (status == 206)
                rest = status == 206 and now == version
                if not rest and status in (206, 416):
                    tag.unlink(missing_ok=True)         # not the rest of what is here: anew
                if not rest and status in (206, 416, 429) or status >= 500:
                    time.sleep(min(int("0" + header("Retry-After", "")[:9]), PAUSES[1]))
                    raise requests.ConnectionError(f"status {status}")
                reply.raise_for_status()
                have *= rest
                tag.write_text(now)
                with open(partial, "ab" if have else "wb") as file, tqdm.wrapattr(
                        file, "write", desc=path.name, initial=have,
                        total=have + (reply.raw.length_remaining or 0),
                        disable=None if path.suffix == ".gz" else True) as progress:
                    while have <= LONGEST[path.suffix] and (part := reply.raw.read(1 << 18)):
                        have += progress.write(part)    # raw: a .gz stays packed
            tag.unlink()
            if have <= LONGEST[path.suffix] and "html" not in header("Content-Type", ""):
                return os.replace(partial, path)        # it gets its name when it is complete
            partial.unlink()
            raise requests.RequestException(f"{url} is endless, or a page instead of a file")
        except (requests.ConnectionError, requests.Timeout, ValueError,
                requests.packages.urllib3.exceptions.HTTPError) as error:
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
    """-> events, catalogue (one dict a line), what opens an item's picture, both files"""
    tables = [p for k in ("*.jsonl", "*.jsonl.gz", "*.csv", "*/*.csv") for p in folder.glob(k)]
    events = [path for path in tables       # told by its fields: PixelRec's two have one name
              if any("user_id" in row for row in islice(rows(path, Counter()), 20))]
    if len(events) != 1 or len(tables) != 2:
        fail(f"{folder} needs one file of events (with user_id), one of items: .jsonl(.gz), .csv.")
    tables.remove(events[0])

    def find(item_id, picture):
        path = folder / "images" / f"{hashlib.sha256(item_id.encode()).hexdigest()}.jpg"
        if session and picture and not path.exists():
            if not (urlsplit(picture).netloc in hosts or public(picture)):
                raise PermissionError(f"{picture} is of no public host")
            download(session, picture, path)
        for at in (f"images/{path.name}", picture, f"images/{item_id}.jpg", f"cover/{item_id}.jpg"):
            if ".." not in Path(at).parts and os.path.isfile(f"{folder}/{at}"):
                return Image.open(f"{folder}/{at}", formats=FORMATS)

    return rows(events[0], counts), rows(tables[0], counts), find, events + tables

# --- The rules -----------------------------------------------------------------------------------
def k_core(user, item, k):
    """Drops users and items with too few events until none is left. -> the events that stay."""
    kept, before = np.arange(len(user)), -1
    while len(kept) != before:
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
    order = np.lexsort((ties, time, user))              # order in the file can leak the test item
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
        why = ", ".join(f"{number:,} {reason}" for reason, number in counts.items() if number)
        fail(f"{args.dataset} has no event left in its {args.k_core}-core ({why}): --k-core 1?")

    user, user_ids = renumber(user, user_ids)
    item, item_ids = renumber(item, item_ids)
    by_user = np.argsort(user, kind="stable")
    offsets = np.concatenate([[0], np.bincount(user).cumsum()])  # (U+1,)
    return (1 + item[by_user]).astype(np.int32), offsets, user_ids, item_ids

# --- Texts and pictures of the items that are left -----------------------------------------------
def strings(value, deep=4):
    """A real catalogue holds null, a string, a list or a list of lists in one field."""
    if isinstance(value, list):
        return [text for part in value[:99 * deep] for text in strings(part, deep - 1)]
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
        sorts = strings(row.get("categories") or row.get("main_category") or row.get("tag"))
        categories[i] = [sort[:100] for sort in sorts[:20]]
        images = row.get("images") if isinstance(row.get("images"), list) else []
        images = sorted((image for image in images if isinstance(image, dict)),
                        key=lambda image: image.get("variant") != "MAIN")   # stable: else the first
        sizes = [image.get(size) for image in images for size in ("large", "hi_res", "thumb")]
        pictures[i] = (strings(sizes) + [""])[0]
    counts["items: not in the catalogue"] = len(number)
    return titles, texts, categories, pictures

def write_images(path, find, item_ids, pictures, S, counts):
    """Squeezes every picture to S x S, into a file rather than into memory. -> has_image (N+1,)"""
    def squeeze(i):
        try:
            image = find(item_ids[i - 1], pictures[i])
            if not image:
                return "no picture", bytes(3 * S * S)
            with DECODE:
                image.draft("RGB", (2 * S, 2 * S))      # a JPEG decodes at 1/2, 1/4, 1/8 for less
                if image.mode[0] == "I":                # 16 bits: Pillow would cut, not scale
                    image = image.point(lambda value: value * (1 / 256)).convert("L")
                image = image.convert("RGBA").resize((S, S), Image.Resampling.LANCZOS)
            image = Image.alpha_composite(Image.new("RGBA", (S, S), "white"), image)
            return "picture", np.array(image)[..., :3].transpose(2, 0, 1).tobytes()  # (3, S, S)
        except Exception as error:          # Pillow has no one error for a broken picture
            return f"picture lost ({type(error).__name__})", bytes(3 * S * S)

    with tempfile.TemporaryFile(dir=path.parent) as file, \
            multiprocessing.pool.ThreadPool(WORKERS) as pool:
        states = [file.write(bytes(3 * S * S))]     # padding. Unlike a map, it tells of a full disk
        squeezed = pool.imap(squeeze, range(1, len(pictures)), chunksize=16)
        for state, pixels in tqdm(squeezed, "pictures", len(item_ids), disable=None):
            states.append(state), file.write(pixels)
        file.flush()
        images = torch.frombuffer(mmap.mmap(file.fileno(), 0), dtype=torch.uint8)
        save({"images": images.view(-1, 3, S, S)}, path)  # (N+1, 3, S, S)
    counts.update(f"items: {state}" for state in states[1:])
    return torch.tensor([state == "picture" for state in states])  # (N+1,)

def draw_sheet(path, images, has_image, names, shown, history):
    """24 items, the most bought first; below, a user's last 8: S x S, as the models see them."""
    page, font = Image.new("RGB", (900, 607), "white"), ImageFont.load_default(12)
    pen = ImageDraw.Draw(page)
    pen.text((12, 448), "A user's history, the last two for validation and test:", "black", font)
    for n, i in [*enumerate(shown), *enumerate(history[-8:], 24)]:
        x, y = 12 + n % 8 * 111, 12 + n // 8 * 145 + n // 24 * 22
        tile = Image.fromarray(images[i].permute(1, 2, 0).numpy()).resize((100, 100))
        page.paste(tile if has_image[i] else "#ccc", (x, y, x + 100, y + 100))
        words = textwrap.fill(names[i], 16, max_lines=2, placeholder="...")
        pen.text((x, y + 103), words, "black", font)
    page.save(path.with_name("items.png.partial"), "PNG")
    os.replace(path.with_name("items.png.partial"), path)

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
        low, high = int(name == "k_core"), 1024 if name == "image_size" else 2 ** 32 - 1
        if isinstance(value, int) and not low <= value <= high:
            fail(f"--{name.replace('_', '-')} {value} is not between {low} and {high}.")
    n, n_users = args.max_items or 1050, args.max_users or 4000
    if args.dataset == "toy" and n * n_users > 10 ** 8:
        fail("The toy shop is too large: --max-items times --max-users may be 100,000,000.")
    S = args.image_size or (32 if args.dataset == "toy" else 64)
    counts, session, truth, folder = Counter(), None, {}, Path(args.dataset).expanduser()
    if args.dataset == "toy":
        events, items, truth = toy_shop(n, n_users, args.seed)
        find, files = lambda item_id, look: look and draw(look, S), []
    else:
        if not folder.is_dir():
            if not re.fullmatch(r"[A-Z][A-Za-z_]+", args.dataset):
                fail(f"{args.dataset} is neither toy, nor a folder here, nor an Amazon category.")
            session, folder = requests.Session(), args.cache.expanduser() / args.dataset
            session.mount("https://", requests.adapters.HTTPAdapter(WORKERS, WORKERS))
            fetch_category(args.dataset, session, args.base_url, folder)
        events, items, find, files = open_folder(
            folder, session, [urlsplit(url).netloc for url in args.base_url], counts)

    events, offsets, user_ids, item_ids = arrange(*read_events(events, counts), args, counts)
    titles, texts, categories, pictures = read_catalogue(items, item_ids, counts)
    U, N = len(user_ids), len(item_ids)
    last_two = np.concatenate([offsets[1:] - 1, offsets[1:] - 2])  # (2U,)
    train_counts = np.bincount(np.delete(events, last_two), minlength=N + 1)  # (N+1,)
    truth = {name: [-1] + [of[int(i[4:])] for i in item_ids] for name, of in truth.items()}

    args.run.mkdir(parents=True, exist_ok=True)
    (args.run / "data.pt").unlink(missing_ok=True)      # an old one must not meet new images
    has_image = write_images(args.run / "images.pt", find, item_ids, pictures, S, counts)
    popular = np.argsort(-train_counts, kind="stable")[:N]  # (N,): the item bought most is the first
    history = events[offsets[U // 2]:offsets[U // 2 + 1]][-12:]
    names = [title or item_id for title, item_id in zip(titles, [""] + item_ids)]
    images = torch.load(args.run / "images.pt", weights_only=True, mmap=True)["images"]
    shown = popular[np.linspace(0, N - 1, min(N, 24)).astype(int)]
    draw_sheet(args.run / "items.png", images, has_image, names, shown, history)
    options = {k: v if isinstance(v, (int, str)) else str(v) for k, v in vars(args).items()}
    meta = {"source": args.dataset, "counts": dict(counts), "options": options, "truth": truth,
            "sha256": {path.name: hashlib.file_digest(open(path, "rb"), "sha256").hexdigest()
                       for path in files}}
    save({"events": torch.from_numpy(events), "offsets": torch.from_numpy(offsets),
          "titles": titles, "texts": texts, "categories": categories, "has_image": has_image,
          "item_ids": [""] + item_ids, "user_ids": user_ids,
          "train_counts": torch.from_numpy(train_counts).int(), "meta": meta}, args.run / "data.pt")

    print("\n".join(f"{reason:40}{number:12,}" for reason, number in counts.items()))
    top_tenth = train_counts[popular[:max(1, N // 10)]].sum() / train_counts.sum()
    hits = np.isin(events[offsets[1:] - 1], popular[:10]).mean()
    print(f"\nU {U:,} users, N {N:,} items, {len(events):,} events: {len(events) / U:.1f} a user, "
          f"{len(events) / N:.1f} an item, density {len(events) / U / N:.3%}; items with a picture "
          f"{has_image.sum() / N:.1%}, a text {sum(map(bool, texts)) / N:.1%}\ntraining events on "
          f"the most popular tenth {top_tenth:.1%}; the top ten for all: Recall@10 {hits:.4f}")
    print(f"\nitem {history[0]}: {names[history[0]]} | {', '.join(categories[history[0]])} | "
          f"{'picture' if has_image[history[0]] else 'no picture'} | {texts[history[0]][:150]}")
    print(f"\nuser {U // 2}, in order of time (the last two are for validation and test):",
          *(names[i] for i in history), sep="\n  ")

if __name__ == "__main__":
    try:
        main()
    except (OSError, MemoryError, KeyboardInterrupt) as error:      # disk full, read-only, Ctrl-C
        fail(f"stopped by {error!r}: the same command begins again.")
