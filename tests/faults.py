"""Long checks by hand: what is done to the scripts, and whether they survive it. Prints a table.

    python tests/faults.py                     # all, a quarter of an hour
    python tests/faults.py network records     # some parts

"Survived" means: it works and means what it should, or one sentence says why not and the exit code is 2; nothing is
half-written. Where a fault must be refused, "works" is no survival, and the sentence must name what is wrong: so no
row passes for another reason. What this machine does not allow (to mount a small disk, say) is "not tried".

Exit code 0: all were tried and survived. 1: something did not survive. 3: all that was tried survived, but not all was.
"""
import argparse
import contextlib
import functools
import gzip
import http.server
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from conftest import command, script

os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)
os.environ["NO_PROXY"] = "127.0.0.1,localhost"
os.environ["no_proxy"] = "127.0.0.1,localhost"

OWNED = Path("/tmp/owned")  # code that is hidden in our files makes this one, if somebody runs it

# How much of each: less makes a trial shorter.
LINES = 10_000        # fuzzed lines
PICTURES = 1000       # fuzzed pictures
LONG_TITLE = 10_000_000
LONG_LINE = 100_000_000
LONG_HISTORY = 100_000
KILLS = 20


class Row(NamedTuple):
    """A line of the table."""
    what: str               # was done
    happened: str
    survived: bool | None   # None: not tried


# --- Running a script and judging how it ended ------------------------------------------------------------------------


class Ended(NamedTuple):
    """How a script ended."""
    returncode: int
    stdout: str
    stderr: str
    peak: float = 0.0     # GiB of memory
    seconds: float = 0.0  # of the processor


def start(number, *options, **how):
    """Runs a script in a process of its own. how: options of subprocess.Popen. -> Ended"""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        child = subprocess.Popen(command(number, *options), stdout=out, stderr=err, **how)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)  # else Popen would wait for it once more
        out.seek(0)
        err.seek(0)
        seconds = usage.ru_utime + usage.ru_stime
        return Ended(child.returncode, out.read(), err.read(), usage.ru_maxrss / 2 ** 20, seconds)


def start_here(module, *options):
    """Runs a script that is loaded already, so that its constants can be made small before. -> Ended"""
    out = io.TextIOWrapper(io.BytesIO(), "utf-8")
    err = io.TextIOWrapper(io.BytesIO(), "utf-8")
    code = 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            module.start(functools.partial(module.main, [str(option) for option in options]))
        except SystemExit as stop:
            code = stop.code
        except Exception as error:
            code = 1
            print(f"Traceback: {type(error).__name__} {error}", file=err)
    out.seek(0)
    err.seek(0)
    return Ended(code, out.read(), err.read())


def must_work(number, *options):
    """Makes what the faults of a part need. Ends the program if that fails."""
    ended = start(number, *options)
    if ended.returncode != 0:
        sys.exit(f"0{number} must work before anything can be done to it:\n{ended.stderr}")
    return ended


def says(ended):
    """The sentence with which a script ended. -> str"""
    said = ended.stderr.strip()
    last = said.split("\n")[-1]
    if ": error: argument" in last:  # argparse shows the options above its sentence
        return last
    return said


def is_refused(ended, words=""):
    """Did it end with exit code 2 and one sentence, which has these words (a regular expression)?"""
    said = says(ended)
    one_sentence = 0 < len(said) < 1000 and "\n" not in said and "Traceback" not in said
    return ended.returncode == 2 and one_sentence and re.search(words, said) is not None


def judge(ended, words=None):
    """Did a script end as it should? words: the sentence must refuse and have them; None: it must work

    -> what happened, in words; whether that is right
    """
    said = says(ended)
    last = said.split("\n")[-1][:200] or "no word"
    if ended.returncode == 0:
        return "works", words is None and "Traceback" not in said
    if ended.returncode != 2:
        last = f"CODE {ended.returncode}: {last}"
    if words is None:
        return last, False
    return last, is_refused(ended, words)


def yes_or_no(what, is_so):
    """The row of something that is so or not."""
    return Row(what, "yes" if is_so else "no", is_so)


def nothing_ran():
    """The row about code that is hidden in data."""
    return yes_or_no("code in a .pt, in --embeddings, in a picture did not run", not OWNED.exists())


# --- Shops and pictures to do it to -----------------------------------------------------------------------------------


def dense(users=6, items=6):
    """Everybody bought everything. -> list of dict"""
    events = []
    for u in range(users):
        for i in range(items):
            events.append({"user_id": f"u{u}", "parent_asin": f"i{i}", "timestamp": 1000 * i})
    return events


def shop(folder, events, items=()):
    """A folder in the layout of Amazon Reviews 2023; a line is a dict, or bytes as they are."""
    folder.mkdir(parents=True)
    write_lines(folder / "reviews.jsonl", events)
    write_lines(folder / "meta.jsonl", items)
    return folder


def write_lines(path, lines):
    with open(path, "wb") as file:
        for line in lines:
            if not isinstance(line, bytes):
                line = json.dumps(line).encode()
            file.write(line + b"\n")


def packed(lines):
    """Lines as a .jsonl.gz. -> bytes"""
    return gzip.compress(b"\n".join(json.dumps(line).encode() for line in lines))


def data_of(run):
    return torch.load(run / "data.pt", weights_only=True)


def counts_of_items(data):
    """What 01 counted of the items' pictures. -> dict"""
    counts = data["meta"]["counts"]
    return {reason: n for reason, n in counts.items() if reason.startswith("items: p") or reason == "items: no picture"}


def same(a, b):
    """Are two artifacts equal, but for the options, which name the folder of the run, and the hashes of the inputs?"""
    if torch.is_tensor(a):
        return torch.equal(a, b)
    if not isinstance(a, dict):
        return a == b
    if a.keys() != b.keys():
        return False
    for key in a:
        if key not in ("options", "made_from") and not same(a[key], b[key]):
            return False
    return True


def jpeg(colour="red"):
    file = io.BytesIO()
    Image.new("RGB", (40, 60), colour).save(file, "JPEG")
    return file.getvalue()


class Evil:
    """Pickled, it is code that runs when the file is read."""

    def __reduce__(self):
        return os.system, (f"touch {OWNED}",)


# --- network: a host that does all that hosts do ----------------------------------------------------------------------

# What a host does, and what 01 makes of a large file that comes so: None where it has the file in the end, else words
# of the sentence. With -once it happens to the first request for an address only.
NETWORK = {
    "500-once": None,               # an error of the server
    "500": "cannot be had",
    "429-1-once": None,             # too busy: again in a second
    "429-100000": "cannot be had",  # .. in a day
    "403": "cannot be had",         # not for you
    "404": "cannot be had",         # not there
    "early-once": None,             # breaks off after an eighth
    "early": "cannot be had",
    "stall-once": None,             # falls silent after an eighth
    "stall": "cannot be had",
    "long": "cannot be had",        # says that the file is longer than it is
    "short": "breaks off",          # .. shorter: what is there is not all of the .gz
    "nolength": "breaks off",       # does not say how long it is, and breaks off
    "norange": None,                # breaks off once, then begins anew whatever it is asked for
    "changes": None,                # the file changes when it has broken off, and If-Range is heeded
    "changesbadly": None,           # the same, and If-Range is not heeded
    "html": "cannot be had",        # the log-in page of a hotel
    "loop": "cannot be had",        # redirects to itself
    "elsewhere": "this machine",    # redirects to a host of this network, which the user has not named
    "endless": "cannot be had",     # never comes to an end
}


class Host:
    """Serves `files`; what is done to a request is the first part of its path: /FAULT/name, or /FAULT-once/name."""

    def __init__(self, files, elsewhere=""):
        self.files = files          # name -> bytes
        self.elsewhere = elsewhere  # where the fault of that name leads
        self.asked = []             # paths of all requests
        host = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_GET(self):
                host.asked.append(self.path)
                with contextlib.suppress(OSError):  # the other side has hung up
                    host.answer(self)

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.port = self.server.server_port
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def answer(self, to):
        """to: the handler of one request"""
        fault, _, name = to.path[1:].partition("/")
        again = self.asked.count(to.path) > 1
        if fault.endswith("-once"):
            fault = "" if again else fault.removesuffix("-once")

        if fault.isdigit():
            self.head(to, int(fault), {"Content-Length": 0})
        elif fault.startswith("429-"):
            self.head(to, 429, {"Content-Length": 0, "Retry-After": fault.removeprefix("429-")})
        elif fault == "loop":
            self.head(to, 302, {"Content-Length": 0, "Location": to.path})
        elif fault == "elsewhere":
            self.head(to, 302, {"Content-Length": 0, "Location": self.elsewhere})
        elif fault == "html":
            page = b"<html>Log in to the network of the hotel</html>"
            self.head(to, 200, {"Content-Length": len(page), "Content-Type": "text/html"})
            to.wfile.write(page)
        elif fault == "endless":
            self.head(to, 200, {})
            while True:
                to.wfile.write(bytes(1 << 16))
        elif name not in self.files:
            self.head(to, 404, {"Content-Length": 0})
        else:
            self.send(to, fault, self.files[name], again)

    def head(self, to, status, headers):
        to.send_response(status)
        for name, value in headers.items():
            to.send_header(name, str(value))
        to.end_headers()

    def send(self, to, fault, body, again):
        """The file, or what the fault leaves of it; from the byte on that Range asks for."""
        half = len(body) // 2
        version = '"v1"'
        if fault.startswith("changes") and not again:  # what the file was before it changed
            body = body[:half][::-1] + body[half:]
            version = '"v0"'

        begin = 0
        range_of_bytes = to.headers.get("Range")
        if range_of_bytes:
            begin = int(re.match(r"bytes=(\d+)-", range_of_bytes)[1])
        if fault == "norange":
            begin = 0
        if fault == "changes" and to.headers["If-Range"] != version:
            begin = 0
        if begin >= len(body):
            self.head(to, 416, {"Content-Length": 0})
            return

        part = body[begin:]
        headers = {"ETag": version, "Content-Length": len(part)}
        if fault == "long":
            headers["Content-Length"] += 99
        if fault == "short":
            headers["Content-Length"] -= 99
        if fault == "nolength":
            del headers["Content-Length"]
        status = 200
        if begin:
            status = 206  # what comes is a part
            headers["Content-Range"] = f"bytes {begin}-{len(body) - 1}/{len(body)}"
        self.head(to, status, headers)

        breaks_off = fault in ("early", "nolength", "stall")
        if fault in ("norange", "changes", "changesbadly") and not again:
            breaks_off = True
        if breaks_off:
            part = part[:half // 4]
        to.wfile.write(part)
        if fault == "stall":
            to.wfile.flush()
            time.sleep(3)


def network(tmp):
    """One fault each on the file of reviews, then one on each picture."""
    one = script(1)
    one.TIMEOUT = (2, 1)
    one.PAUSE = 0.01
    one.LONGEST_PAUSE = 0.1
    one.PATIENCE = 2
    one.LARGEST_FILE = 2 << 20
    one.LARGEST_PICTURE = 1 << 20
    private = Host({"x.jpg": jpeg()})

    # A file that cannot be squeezed, so that each part of it is some bytes long.
    events = [event | {"text": os.urandom(40).hex()} for event in dense()]
    files = {
        "review_categories/Shop.jsonl.gz": packed(events),
        "meta_categories/meta_Shop.jsonl.gz": packed([]),
        "x.jpg": jpeg(),
    }
    host = Host(files, elsewhere=f"{private.url}/ok/x.jpg")
    rows = []
    for fault, words in NETWORK.items():
        rows += large_file(one, host, tmp, fault, words)
    rows.append(complete_but_not_named(one, host, tmp))
    rows.append(pictures_with_faults(one, host, private, tmp))
    rows.append(Row("requests to a host of this network that the user has not named", f"{len(private.asked)}",
                    not private.asked))
    host.close()
    private.close()
    return rows


def large_file(one, host, tmp, fault, words):
    """Both files of a category meet the fault; the file of items first or later. -> list of Row"""
    reviews = host.files["review_categories/Shop.jsonl.gz"]
    cache = tmp / fault
    got = cache / "Shop" / "reviews.jsonl.gz"
    run = tmp / f"run-{fault}"
    options = ["--run", run, "--dataset", "Shop", "--cache", cache, "--base-url", f"{host.url}/{fault}"]

    host.asked.clear()
    began = time.time()
    ended = start_here(one, *options)
    seconds = time.time() - began
    happened, right = judge(ended, words)
    if words is None and right:
        # It is the file, and what was made of it carries its hash.
        right = got.read_bytes() == reviews and "reviews.jsonl.gz" in data_of(run)["made_from"]
    if words is not None and run.exists():
        right = False  # nothing was made
    rows = [Row(f"a host: {fault}", f"{happened} ({seconds:.0f} s, {len(host.asked)} requests)", right)]

    if fault == "early":  # an eighth of the file each time: the next run goes on
        start_here(one, *options)
        goes_on = got.exists() and got.read_bytes() == reviews
        rows.append(yes_or_no("  early, run again: it goes on", goes_on))
    return rows


def complete_but_not_named(one, host, tmp):
    """Killed when all had come, before the file got its name. -> Row"""
    cache = tmp / "killed"
    folder = cache / "Shop"
    folder.mkdir(parents=True)
    (folder / "reviews.jsonl.gz.partial").write_bytes(host.files["review_categories/Shop.jsonl.gz"])
    (folder / "reviews.jsonl.gz.etag").write_text('"v1"')
    ended = start_here(one, "--run", tmp / "run-416", "--dataset", "Shop", "--cache", cache,
                       "--base-url", f"{host.url}/ok")
    return Row("killed when all had come, before it got its name", *judge(ended))


def forbidden_addresses(host, private):
    """What a data file may say of where a picture lies, and nothing must be fetched. -> list of str"""
    here = f"127.0.0.1:{private.port}"
    trusted = host.url.removeprefix("http://")
    return [
        # This machine and its network, under their various names.
        f"http://{here}/ok/x.jpg",
        f"http://localhost:{private.port}/ok/x.jpg",
        f"http://2130706433:{private.port}/ok/x.jpg",
        f"http://0.0.0.0:{private.port}/ok/x.jpg",
        f"http://[::1]:{private.port}/ok/x.jpg",
        f"http://[::ffff:127.0.0.1]:{private.port}/ok/x.jpg",
        "http://169.254.169.254/latest/meta-data",
        "http://10.0.0.1/x.jpg",
        "http://[fe80::1]/x.jpg",
        # Two readers may understand these differently.
        f"http://{trusted}@{here}/ok/x.jpg",
        f"http://{here}#{trusted}",
        f"http://{here}\\@{trusted}/ok/x.jpg",
        f"http://{trusted}\\@{here}/ok/x.jpg",
        # No addresses of pictures.
        "file:///etc/hostname",
        "ftp://127.0.0.1/x.jpg",
        "gopher://127.0.0.1/",
        "httpx://127.0.0.1/",
        "http://",
        "http://[",
        "data:image/png;base64,AAAA",
        "//127.0.0.1/x.jpg",
        "http://" + "a" * 5000,
        "http://a\u0000b/x.jpg",
    ]


def pictures_with_faults(one, host, private, tmp):
    """A catalogue whose pictures meet each fault, or are said to lie where none must be fetched. -> Row"""
    # Address -> does the picture come? None: it was cut short, and shows its upper part or is lost.
    comes = {}
    for fault, words in NETWORK.items():
        comes[f"{host.url}/{fault}/x.jpg"] = words is None
    comes[f"{host.url}/short/x.jpg"] = None
    comes[f"{host.url}/nolength/x.jpg"] = None

    for address in forbidden_addresses(host, private):
        comes[address] = False

    items = []
    for i, address in enumerate(comes):
        items.append({"parent_asin": f"i{i}", "images": [{"large": address}]})
    host.files["review_categories/Shop.jsonl.gz"] = packed(dense(6, len(items)))
    host.files["meta_categories/meta_Shop.jsonl.gz"] = packed(items)
    ended = start_here(one, "--run", tmp / "pictures", "--dataset", "Shop", "--cache", tmp / "p",
                       "--base-url", f"{host.url}/ok")
    happened, right = judge(ended)
    if ended.returncode == 0:
        data = data_of(tmp / "pictures")
        has = dict(zip(data["item_ids"][1:], data["has_image"][1:].tolist()))
        wrong = []
        for i, (address, expected) in enumerate(comes.items()):
            if expected is not None and has[f"i{i}"] != expected:
                wrong.append(address[:60])
        counts = counts_of_items(data)
        happened = f"{counts}"
        if wrong:
            happened += f" WRONG: {', '.join(wrong)}"
        right = not wrong and sum(counts.values()) == len(comes)
    return Row(f"{len(comes)} addresses of pictures, each with a fault", happened, right)


# --- records: fuzzed lines and pictures -------------------------------------------------------------------------------

ODD_VALUES = [
    # No number of a user, an item or a time.
    None, True, False, 3.5, float("nan"), float("inf"), 1e308,
    # Times before 1970 or after 2100, and what 64 bits do not hold.
    0, -1, -5 * 10 ** 12, 99 * 10 ** 12, 10 ** 30, 2 ** 63, -2 ** 63,
    # Texts that are nearly nothing, nearly numbers, or very long.
    "", " ", "x", "nan", "1_0", " 7 ", "1e3", "x" * 4000,
    # Letters that end texts, are half a letter, colour a screen, turn the direction of writing, are a picture.
    "\u0000", "\ud800", "\x1b[31mred", "\u202egnp", "\U0001f600",
    # Names of files that are none of ours.
    "../../x", "/etc/passwd", "C:\\x", "CON",
    # Lists and dicts, empty and nested.
    [], {}, [[]], [None, [1, "a"]], {"a": {}},
]

ODD_LINES = [
    b"",
    b"[]",
    b"null",
    b"1",
    b'"x"',
    b"NaN",
    b"[" * 100_000,
    b'{"a":' * 5000,
    b"{" + b" " * 999,
    b'{"user_id": "u1", "parent_asin": "i1", "timestamp": ' + b"9" * 5000 + b"}",
]


def fuzzed_line(rng):
    """One line, bytes: of an event or an item, nearly right."""
    row = {
        "user_id": f"u{rng.randrange(30)}",
        "parent_asin": f"i{rng.randrange(30)}",
        "timestamp": rng.randrange(10 ** 12, 10 ** 12 + 50),
        "rating": rng.choice([5.0, None, float("nan"), "x"]),
        "title": "a title",
        "description": ["words"],
        "categories": ["A"],
        "images": [],
    }
    # One or two fields of most lines hold what nobody expects.
    for key in rng.sample(sorted(row), rng.choice((0, 0, 1, 1, 2))):
        row[key] = rng.choice(ODD_VALUES)
    if rng.random() < 0.1:
        row["images"] = rng.choice([
            [{"large": rng.choice(ODD_VALUES)}],
            [{"thumb": [rng.choice(ODD_VALUES)]}],
            [rng.choice(ODD_VALUES), {"hi_res": rng.choice(ODD_VALUES), "variant": rng.choice(ODD_VALUES)}],
        ])
    line = bytearray(json.dumps(row).encode())

    # Of a thousand lines 30 are cut, 30 have one wrong byte, 20 are noise, 10 are odd, 5 are nested deeply.
    kind = rng.random()
    if kind < 0.03:
        line = line[:rng.randrange(len(line))]
    elif kind < 0.06:
        line[rng.randrange(len(line))] = rng.randrange(256)
    elif kind < 0.08:
        line = rng.randbytes(99).replace(b"\n", b"")
    elif kind < 0.09:
        line = rng.choice(ODD_LINES)
    elif kind < 0.095:
        depth = rng.randrange(1, 3000)
        line = b'{"parent_asin": "i1", "title": ' + b"[" * depth + b'"deep"' + b"]" * depth + b"}"
    return bytes(line)


def records(tmp):
    """Lines and pictures that are nearly right, too long, or made to harm."""
    rng = random.Random(0)
    lines = [fuzzed_line(rng).replace(b"\r", b"") for _ in range(LINES)]
    large = []
    for i in range(20):
        large.append({
            "user_id": "u1",
            "parent_asin": f"i{i}",
            "timestamp": 1,
            "title": "T" * LONG_TITLE,
            "categories": ["c" * 1_000_000] * 3,
        })
    endless = [b'{"title": "' + b"x" * LONG_LINE + b'"}']
    items = [line.replace(b'"user_id"', b'"writer"') for line in lines]
    items_large = [{**item, "writer": item["user_id"]} for item in large]
    for item in items_large:
        del item["user_id"]
    folder = shop(tmp / "fuzz", lines + dense(30, 30) + large + endless, items_large + endless + items)

    before = times_of_files(tmp)
    ended = start(1, "--run", tmp / "run", "--dataset", folder, "--image-size", 8)
    happened, right = judge(ended)
    if ended.returncode == 0:
        happened, right = all_lines_count(data_of(tmp / "run"), ended, len(lines) + 900 + len(large))
    rows = [Row(f"{LINES:,} fuzzed lines, 20 titles of {LONG_TITLE:,} bytes, a line of {LONG_LINE:,}, in both files",
                happened, right)]
    rows.append(Row("  peak memory", f"{ended.peak:.2f} GiB", ended.peak < 1))

    after = times_of_files(tmp)
    wrote = [path for path in after if before.get(path) != after[path]]
    inside = all(path.parent == tmp / "run" for path in wrote)
    rows.append(Row("  files written", f"{sorted(path.name for path in wrote)}", inside))
    rows.append(Row("  04 after them", *judge(start(4, "--run", tmp / "run"))))

    nothing = shop(tmp / "nothing", [b'{"user_id": "u", "item_id": "", "timestamp": 1}'] * 50 + [b"x"] * 50)
    ended = start(1, "--run", tmp / "none", "--dataset", nothing)
    rows.append(Row("not one good line", *judge(ended, "no event is left")))
    return rows + fuzzed_pictures(tmp) + [nothing_ran()]


def times_of_files(folder):
    """When each file was written. -> dict"""
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


def all_lines_count(data, ended, lines):
    """Is every line read or counted as bad, is nothing endless kept, and no letter that a screen obeys?

    lines: how many there are, but for the one that is too long -> what happened, whether that is right
    """
    counts = data["meta"]["counts"]
    read = 0
    for reason, n in counts.items():
        of_events = reason in ("events: well-formed", "events: no user", "events: no item", "events: bad time")
        if of_events or reason.startswith("reviews.jsonl"):
            read += n
    users = set(data["user_ids"])
    texts = [data[key] for key in ("titles", "texts", "categories", "item_ids", "user_ids")]
    letters = json.dumps(texts, ensure_ascii=False)

    # A byte changed to a new line makes two lines of one; the line that is too long comes in pieces.
    right = lines <= read <= lines + 40
    right = right and all(reason in ended.stdout for reason in counts)
    right = right and sum(len(title) for title in data["titles"]) < 100_000
    right = right and {f"u{u}" for u in range(30)} <= users
    right = right and not re.search("[\x00-\x1f\x7f-\x9f\ud800-\udfff]", letters)
    return f"{read:,} lines accounted for, U {len(users)}, N {len(data['item_ids']) - 1}", right


def fuzzed_pictures(tmp):
    """Pictures of many kinds, damaged or made to harm. -> list of Row"""
    events = []
    items = []
    for i in range(PICTURES):
        events.append({"user_id": f"u{i // 10}", "parent_asin": f"i{i}", "timestamp": i})
        items.append({"parent_asin": f"i{i}"})
    folder = shop(tmp / "pictures", events, items)
    (folder / "images").mkdir()
    whole = 0
    for i in range(PICTURES):
        whole += fuzzed_picture(i, random.Random(i), folder / "images" / f"i{i}.jpg")

    ended = start(1, "--run", tmp / "run2", "--dataset", folder, "--k-core", 1, "--image-size", 16)
    happened, right = judge(ended)
    if ended.returncode == 0:
        counts = counts_of_items(data_of(tmp / "run2"))
        happened = f"{counts}; {whole} must be read"
        right = sum(counts.values()) == PICTURES and counts["items: picture"] >= whole
    return [
        Row(f"{PICTURES:,} fuzzed pictures", happened, right),
        Row("  peak memory", f"{ended.peak:.2f} GiB", ended.peak < 1.5),
    ]


PICTURE_KINDS = [
    "truncated",
    "empty",
    "GIF",         # three frames
    "CMYK",        # the colours of printers
    "16 bit",
    "alpha",       # transparent in places
    "bomb",        # 50 kB that become 400 million pixels
    "thin",        # 60,000 pixels along one side, 1 along the other
    "bits",        # one bit is wrong
    "PNG",
    "noise",
    "postscript",  # a program that writes a file
    "BMP",
    "WEBP",
    "big",         # 24 million pixels, as a camera's
]


def fuzzed_picture(i, rng, path):
    """Writes one. -> whether it is whole and must be read"""
    kind = PICTURE_KINDS[i % len(PICTURE_KINDS)]
    damaged = damaged_picture(kind, rng)
    if damaged is not None:
        path.write_bytes(damaged)
        return False

    frames = []
    for _ in range(3):
        colour = tuple(rng.randrange(256) for _ in range(3))
        frames.append(Image.new("RGB", (30, 20), colour))
    file = io.BytesIO()
    if kind == "GIF":
        frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    elif kind == "CMYK":
        frames[0].convert("CMYK").save(file, "JPEG")
    elif kind == "16 bit":
        grey = np.linspace(0, 65535, 900).reshape(30, 30).astype(np.uint16)
        Image.fromarray(grey).save(file, "PNG")
    elif kind == "alpha":
        frames[0].quantize(4).save(file, "PNG", transparency=0)
    elif kind == "thin":
        size = (1, 60_000)
        if i % 2 == 0:
            size = (60_000, 1)
        Image.new("RGB", size).save(file, "JPEG")
    elif kind == "big":
        Image.new("RGB", (5000, 4800), "red").save(file, "PNG")
    else:
        frames[0].save(file, kind)
    path.write_bytes(file.getvalue())
    return True


def damaged_picture(kind, rng):
    """The bytes of a picture that need not be read, or None where the kind is another one."""
    if kind in ("truncated", "bits"):
        file = io.BytesIO()
        Image.effect_noise((90, 90), 50).save(file, rng.choice(["JPEG", "PNG", "GIF", "WEBP"]))
        raw = bytearray(file.getvalue())
        raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
        if kind == "truncated":
            raw = raw[:rng.randrange(len(raw))]
        return bytes(raw)
    if kind == "empty":
        return b""
    if kind == "noise":
        return rng.randbytes(999)
    if kind == "postscript":
        return f"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(%pipe%touch {OWNED}) (w) file\n".encode()
    if kind == "bomb":
        header = struct.pack(">IIBBBBB", 20_000, 20_000, 1, 0, 0, 0, 0)
        rows = zlib.compress(bytes(2501) * 20_000)
        return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    return None


def chunk(name, body):
    """A part of a PNG: its length, name, body and checksum."""
    return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))


# --- small: odd shops through all six ---------------------------------------------------------------------------------


def all_buy_all(users, items):
    """-> list of (user, item, time)"""
    return [(f"u{u}", f"i{i}", i) for u in range(users) for i in range(items)]


def catalogue(n, **same):
    """n items with titles and texts of their own. same: fields that are equal for all"""
    items = []
    for i in range(n):
        item = {
            "parent_asin": f"i{i}",
            "title": f"item {i} of {'abcdefg'[i % 7]}",
            "categories": ["one"],
            "description": f"text {i % 11}",
        }
        items.append(item | same)
    return items


class Shop(NamedTuple):
    """An odd shop, and how far it comes."""
    events: list
    items: list
    refused: str | None = None  # words of the sentence with which 01 refuses it; None: it goes through all six
    k_core: int = 5
    skip: tuple = ()            # scripts that would take hours on it
    moves: bool = False         # 04 must move items to other prefixes


def odd_shops():
    """-> dict: name -> Shop"""
    long_history = all_buy_all(1, LONG_HISTORY) + all_buy_all(9, 9)
    return {
        "one user": Shop(all_buy_all(1, 5), catalogue(5), k_core=1),
        "one user, in a 5-core": Shop(all_buy_all(1, 5), catalogue(5), "no event is left"),
        "two items": Shop(all_buy_all(9, 2), catalogue(2), "no event is left", k_core=1),
        "three items": Shop(all_buy_all(9, 3), catalogue(3), k_core=1),
        "all users of one item": Shop(all_buy_all(9, 1), catalogue(1), "no event is left", k_core=1),
        "no event": Shop([], [], "has no table of events"),
        "all texts equal": Shop(all_buy_all(9, 30), catalogue(30, title="a mug", description="")),
        "no picture, no text": Shop(all_buy_all(9, 30), []),
        "a single category": Shop(all_buy_all(20, 12), catalogue(12)),
        f"a user with {LONG_HISTORY:,} events": Shop(long_history, catalogue(9), k_core=1, skip=(3, 5)),
        "the same event 1,000 times": Shop(all_buy_all(9, 9) * 1000, catalogue(9)),
        "fewer items than codes": Shop(all_buy_all(8, 6), catalogue(6)),
        "more items than places behind a prefix": Shop(
            all_buy_all(6, 300), catalogue(300, title="mug", description=""), moves=True),
    }


def small(tmp):
    """Odd shops through all six scripts, then vectors of all kinds for one of them."""
    rows = []
    for name, odd in odd_shops().items():
        events = []
        for user, item, when in odd.events:
            events.append({"user_id": user, "parent_asin": item, "timestamp": when})
        folder = shop(tmp / name / "shop", events, odd.items)
        run = tmp / name / "run"
        from_folder = ["--dataset", folder, "--max-items", 0, "--max-users", 0, "--k-core", odd.k_core]
        ended = start(1, "--run", run, "--smoke", *from_folder)
        rows.append(Row(f"{name}: 01", *judge(ended, odd.refused)))
        if ended.returncode != 0:
            continue
        for number in range(2, 7):
            if number not in odd.skip:
                rows.append(Row(f"{name}: 0{number}", *judge(start(number, "--run", run, "--smoke"))))
        if odd.moves:
            moved = torch.load(run / "text_codes.pt", weights_only=True)["moved"]
            rows.append(Row("  items that had to move", f"{moved}", moved > 0))
    return rows + vectors(tmp, tmp / "all texts equal" / "run") + [nothing_ran()]


def vectors(tmp, run):
    """04 --embeddings with files of all kinds. -> list of Row"""
    N = len(data_of(run)["item_ids"]) - 1
    normal = np.random.default_rng(0).normal(size=(N, 9))               # (N, 9)
    arrays = {  # name -> what it holds, words of the sentence that refuses it (None: it works)
        "NaN": (np.full((N, 3), np.nan), "NaN"),
        "infinite": (np.full((N, 3), 1e39), "infinity"),
        "short": (np.ones((N - 1, 3)), "rows of numbers"),
        "words": (np.full((N, 2), "x"), "cannot be read"),
        "flat": (np.ones(N), "rows of numbers"),
        "complex": (np.ones((N, 2), complex) * 1j, "rows of numbers"),
        "whole": (np.arange(2 * N).reshape(N, 2), None),
        "wide": (np.ones((N, 20_000), "f4"), None),
        "huge": (normal * 1e30, None),
        "tiny": (normal * 1e-30, None),
    }
    rows = []
    codes = {}
    for name, (array, words) in arrays.items():
        np.save(tmp / f"{name}.npy", array)
        ended = start(4, "--run", run, "--embeddings", tmp / f"{name}.npy")
        rows.append(Row(f"--embeddings {name}.npy", *judge(ended, words)))
        if ended.returncode == 0:
            codes[name] = torch.load(run / "text_codes.pt", weights_only=True)["codes"]
    alike = "huge" in codes and "tiny" in codes and torch.equal(codes["huge"], codes["tiny"])
    rows.append(yes_or_no("vectors of 1e30 and of 1e-30 mean the same", alike))

    torch.save(torch.ones(N, 3).to_sparse(), tmp / "sparse.pt")
    flat = (tmp / "flat.npy").read_bytes()
    (tmp / "lies.npy").write_bytes(flat.replace(f"({N},)".encode(), b"(9999999999999, 3)"))
    (tmp / "cut.npy").write_bytes((tmp / "wide.npy").read_bytes()[:999])
    torch.save({"a": Evil()}, tmp / "evil.pt")
    files = {
        "sparse.pt": None,
        "lies.npy": "cannot be read",
        "cut.npy": "cannot be read",
        "evil.pt": "cannot be read",
        ".": "cannot be read",
    }
    for name, words in files.items():
        ended = start(4, "--run", run, "--embeddings", tmp / name)
        rows.append(Row(f"--embeddings {name}", *judge(ended, words)))
    return rows


# --- endpoint: a server of embeddings that answers nonsense -----------------------------------------------------------


def answer(n, second="1.0", third="2.0"):
    """What an OpenAI-compatible endpoint says to n texts: vectors of three numbers."""
    rows = []
    for i in range(n):
        rows.append(f'{{"index": {i}, "embedding": [{i}.0, {second}, {third}]}}')
    return f'{{"data": [{", ".join(rows)}]}}'


def growing(n):
    """Vectors of 1, 2, 3, .. numbers."""
    rows = []
    for i in range(n):
        rows.append({"index": i, "embedding": [1.0] * (i + 1)})
    return json.dumps({"data": rows})


class Reply(NamedTuple):
    """What a server makes of n texts."""
    status: int
    body: object         # str, or a function of n that gives one
    words: str | None    # of 04's sentence; None: it works


REPLIES = {
    "as it should": Reply(200, answer, None),
    "silence": Reply(0, "", "does not answer"),
    "401": Reply(401, "{}", "answers 401"),
    "503 always": Reply(503, "", "answers 503"),
    "redirect loop": Reply(302, "", "does not answer"),
    "wrong count": Reply(200, answer(3), "did not give a vector for each text"),
    "another width for each": Reply(200, growing, "did not give a vector for each text"),
    "NaN": Reply(200, functools.partial(answer, second="NaN"), "NaN"),
    "10^400": Reply(200, functools.partial(answer, third="1" + "0" * 400), "did not give a vector for each text"),
    "HTML": Reply(200, "<html>", "did not give a vector for each text"),
    "[[[[...": Reply(200, "[" * 100_000, "did not give a vector for each text"),
    "null": Reply(200, "null", "did not give a vector for each text"),
    "cut short": Reply(200, '{"data": [', "did not give a vector for each text"),
}


class Endpoint(http.server.BaseHTTPRequestHandler):
    """Answers each question with the reply whose number is the first part of its path."""

    def log_message(self, *_):
        pass

    def do_POST(self):
        length = int(self.headers["Content-Length"] or 0)
        question = json.loads(self.rfile.read(length) or b'{"input": []}')
        number = int(self.path.split("/")[1])
        reply = list(REPLIES.values())[number]
        if reply.status == 0:
            time.sleep(2)
            return
        body = reply.body
        if callable(body):
            body = body(len(question["input"]))
        body = body.encode()
        with contextlib.suppress(OSError):
            self.send_response(reply.status)
            self.send_header("Content-Length", str(len(body)))
            if reply.status == 302:
                self.send_header("Location", self.path)
            self.end_headers()
            self.wfile.write(body)

    do_GET = do_POST


def endpoint(tmp):
    """04 asks a server that answers nonsense."""
    run = tmp / "run"
    must_work(1, "--run", run, "--smoke")
    four = script(4)
    four.TIMEOUT = (1, 1)

    def at_once(patience):
        return 0  # seconds before it asks again

    four.Patience.get_backoff_time = at_once
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Endpoint)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    rows = []
    for number, (name, reply) in enumerate(REPLIES.items()):
        (run / "text_codes.pt").unlink(missing_ok=True)
        url = f"http://127.0.0.1:{server.server_port}/{number}/v1/embeddings"
        happened, right = judge(start_here(four, "--run", run, "--embed-url", url), reply.words)
        wrote = (run / "text_codes.pt").exists()
        rows.append(Row(f"an endpoint: {name}", happened, right and wrote == (reply.words is None)))
    server.shutdown()
    server.server_close()
    return rows


# --- kill: SIGKILL at any moment, then the same command again ---------------------------------------------------------


def content(path):
    """The bytes of a file; of an artifact without the readings of the clock and of memory."""
    if not path.is_file():
        return None
    if path.suffix != ".pt":
        return path.read_bytes()
    saved = torch.load(path, weights_only=True)
    for key in ("seconds", "peak_memory"):
        saved.pop(key, None)
    file = io.BytesIO()
    torch.save(saved, file)
    return file.getvalue()


def contents(folder):
    return {path.name: content(path) for path in folder.iterdir()}


def copy_to(folder, inputs):
    """A fresh folder with the files of another one, or with none."""
    shutil.rmtree(folder, ignore_errors=True)
    if inputs:
        shutil.copytree(inputs, folder)
    else:
        folder.mkdir()


def killed(number, tmp, *options, inputs=None):
    """Whatever a killed run left is whole, and what the next run writes is to the byte what an undisturbed run wrote;
    nothing else is left. -> Row, and the folder of the undisturbed run
    """
    run = tmp / "same-place"  # as the options in an artifact name the folder
    whole = tmp / f"whole{number}"
    rng = random.Random(number)
    copy_to(run, inputs)
    began = time.time()
    must_work(number, "--run", run, *options)
    seconds = time.time() - began
    run.rename(whole)
    expected = contents(whole)

    bad = []
    for _ in range(KILLS):
        copy_to(run, inputs)
        after = rng.uniform(0.3, 1) * seconds
        child = subprocess.Popen(command(number, "--run", run, *options), stdout=subprocess.DEVNULL,
                                 stderr=subprocess.DEVNULL)
        time.sleep(after)
        child.send_signal(signal.SIGKILL)
        child.wait()
        for name, now in contents(run).items():
            finished = name.endswith((".pt", ".png", ".md"))  # others are begun files and checkpoints
            if finished and now != expected.get(name):
                bad.append(f"{name} at {after:.2f} s")

        start(number, "--run", run, *options)
        now = contents(run)
        for name in sorted({*now, *expected}):
            if now.get(name) != expected.get(name):
                bad.append(f"{name} after the second run")
    what = f"0{number} killed {KILLS} times within {seconds:.1f} s, run again"
    return Row(what, "; ".join(bad) or "the same bytes", not bad), whole


def kill(tmp):
    """Each script, on the toy shop where it is quick, else six epochs on a small one."""
    row, whole = killed(1, tmp)
    rows = [row]
    data = tmp / "data"
    data.mkdir()
    shutil.copy(whole / "data.pt", data)
    row, _ = killed(4, tmp, inputs=data)
    rows.append(row)

    small_shop = tmp / "small"
    must_work(1, "--run", small_shop, "--smoke")
    must_work(4, "--run", small_shop, "--smoke")
    for number in (2, 3, 5):
        options = ["--smoke", "--epochs", 6]
        row, _ = killed(number, tmp, *options, inputs=small_shop)
        rows.append(row)
        must_work(number, "--run", small_shop, *options)
    return rows


# --- files: disk full, read-only, damaged, malicious ------------------------------------------------------------------


@contextlib.contextmanager
def mounted(folder, *commands):
    """Within `with`, something is mounted on the folder. commands: options of mount -> does this machine allow that?"""
    done = []
    for line in commands:
        if shutil.which("mount"):
            ended = subprocess.run(["mount", *line.split(), folder], capture_output=True)
            done.append(ended.returncode == 0)
    try:
        yield len(done) == len(commands) and all(done)
    finally:
        if any(done):
            subprocess.run(["umount", folder], check=True)


def files(tmp):
    """What can be wrong with a disk or with a file on it."""
    run = tmp / "run"
    must_work(1, "--run", run, "--smoke")
    must_work(4, "--run", run, "--smoke")
    rows = full_disks(tmp, run)
    rows += limited_files(tmp, run)
    rows += read_only_folder(tmp, run)
    (tmp / "file").write_text("")
    for number in (1, 4):
        ended = start(number, "--run", tmp / "file", "--smoke")
        rows.append(Row(f"0{number}, --run is a file", *judge(ended, f"{tmp / 'file'}")))
    return rows + damaged_files(tmp, run) + [nothing_ran()]


def full_disks(tmp, run):
    """Disks on which something, but not all, has room. -> list of Row"""
    disk = tmp / "full"
    disk.mkdir()
    rows = []
    for number, kilobytes in ((1, 100), (1, 400), (1, 1000), (1, 2000), (4, 32), (4, 40)):
        what = f"0{number}, a disk of {kilobytes} kB"
        with mounted(disk, f"-t tmpfs -o size={kilobytes}k tmpfs") as allowed:
            if allowed:
                rows.append(Row(what, *on_a_full_disk(number, disk, run)))
            else:
                rows.append(Row(what, "mount is not allowed here", None))
    return rows


def on_a_full_disk(number, disk, run):
    """-> what happened, whether that is right"""
    options = ["--max-items", 500]
    inputs = []
    if number == 4:
        options = ["--smoke"]
        inputs = ["data.pt"]
        shutil.copy(run / "data.pt", disk)
    ended = start(number, "--run", disk, *options)
    happened, right = judge(ended, "No space left|cannot be written .*make room")

    # What was finished before may stay, but nothing half-written, and not what is written last.
    left = sorted(path.name for path in disk.iterdir() if path.name not in inputs)
    half_written = [name for name in left if "partial" in name or name in ("data.pt", "text_codes.pt")]
    return f"{happened} Left: {left}", right and not half_written


def limited_files(tmp, run):
    """No file may become larger than a limit. -> list of Row"""
    rows = []
    for number, limit in ((1, 50_000), (4, 20_000)):
        folder = tmp / f"limit{number}"
        folder.mkdir()
        if number == 4:
            shutil.copy(run / "data.pt", folder)
        set_limit = functools.partial(resource.setrlimit, resource.RLIMIT_FSIZE, (limit, limit))
        ended = start(number, "--run", folder, "--smoke", preexec_fn=set_limit)
        happened, right = judge(ended, "File too large")
        partial = list(folder.glob("*.partial"))
        rows.append(Row(f"0{number}, no file above {limit} bytes", happened, right and not partial))
    return rows


def read_only_folder(tmp, run):
    """A folder that nobody may write to, not even root. -> list of Row"""
    folder = tmp / "read-only"
    shutil.copytree(run, folder)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    rows = []
    with mounted(folder, f"--bind {folder}", "-o remount,ro,bind") as allowed:
        if not allowed:
            return [Row("01 and 04, a read-only folder", "mount is not allowed here", None)]
        for number in (1, 4):
            ended = start(number, "--run", folder, "--smoke")
            rows.append(Row(f"0{number}, a read-only folder", *judge(ended, "Read-only file system")))
    after = {path.name: path.read_bytes() for path in folder.iterdir()}
    rows.append(yes_or_no("  the folder is as before", after == before))
    return rows


def damaged_files(tmp, run):
    """04 reads a data.pt that is damaged, foreign or made to harm. -> list of Row"""
    raw = (run / "data.pt").read_bytes()
    damaged = {}
    for at in (0, 1, 100, len(raw) // 2, len(raw) - 1):
        damaged[f"cut at {at} of {len(raw)} bytes"] = raw[:at]
    rng = random.Random(0)
    for _ in range(20):
        at = rng.randrange(len(raw))
        flipped = bytearray(raw)
        flipped[at] ^= 1 << rng.randrange(8)
        damaged[f"bit flipped at {at}"] = bytes(flipped)
    damaged["not .pt at all"] = b"hello"
    for name, saved in (("other", {"item_ids": ["", "x"]}), ("list", [1, 2]), ("evil", {"a": Evil()})):
        file = io.BytesIO()
        torch.save(saved, file)
        damaged[name] = file.getvalue()

    undamaged = torch.load(run / "text_codes.pt", weights_only=True)
    folder = tmp / "damaged"
    folder.mkdir()
    rows = []
    for name, damage in damaged.items():
        (folder / "data.pt").write_bytes(damage)
        ended = start(4, "--run", folder, "--smoke")
        happened, right = judge(ended, "missing or damaged")
        codes = folder / "text_codes.pt"
        if ended.returncode == 0:
            # Some bytes of a .pt say nothing: then the result is the same.
            right = name.startswith("bit") and same(torch.load(codes, weights_only=True), undamaged)
            codes.unlink()
        rows.append(Row(f"04, data.pt {name}", happened, right and not list(folder.glob("text_codes*"))))
    return rows


# --- options: ranges --------------------------------------------------------------------------------------------------

# Script, options that make no sense, words of the sentence that refuses them.
OPTIONS = [
    (1, "--k-core 0", "--k-core 0"),
    (1, f"--k-core {10 ** 30}", "--k-core"),
    (1, "--seed -1", "--seed -1"),
    (1, f"--seed {10 ** 30}", "--seed"),
    (1, f"--image-size {10 ** 6}", "--image-size"),
    (1, "--max-items 30000", "lower --max-items"),
    (1, "--max-users 100000", "or --max-users"),
    (1, "--max-events -1", "--max-events -1"),
    (1, "--dataset nowhere", "nowhere is neither"),
    (1, "--dataset All_Beauty --base-url ftp://x", "check the category, the network, --base-url"),
    (1, "--max-items 1", "no event is left"),
    (1, "--max-items 2 --k-core 1", "no event is left"),
    (2, "--dropout 1", "--dropout 1"),
    (2, "--width 7", "--width 7"),
    (2, "--lr 0", "--lr 0"),
    (2, "--loss none", "argument --loss"),
    (2, "--top 0", "--top 0"),
    (2, "--name other", "--name other"),
    (3, "--width 7", "a width of 7"),
    (3, "--crop-size 33", "crops of 33"),
    (3, "--out-dim 0", "--out-dim"),
    (3, "--local-crops -1", "--local-crops"),
    (4, "--seed -1", "--seed"),
    (4, f"--seed {10 ** 30}", "--seed"),
    (4, "--embed-batch 0", "--embed-batch"),
    (4, f"--embed-batch {10 ** 12} --embed-url nonsense", "--embed-url nonsense"),
    (4, "--embed-url file:///etc/passwd", "--embed-url file:///etc/passwd"),
    (4, "--embed-url http://127.0.0.1:1 --embeddings x.npy", "not both"),
    (5, "--target scent", "scent_codes.pt"),
    (5, "--modalities image,scent", "scent_codes.pt"),
    (5, "--masking 2", "--masking 2"),
    (5, "--beam 0", "--beam 0"),
    (5, "--dropout 1", "--dropout 1"),
    (5, "--heads 0", "--heads 0"),
    (6, "--seed -1", "--seed -1"),
    (6, f"--seed {10 ** 30}", "--seed"),
    (6, "--against nobody", "--against nobody"),
]
for trainer in (2, 3, 5):  # these have some options in common
    OPTIONS += [
        (trainer, "--seed -1", "--seed"),
        (trainer, f"--seed {10 ** 30}", "--seed"),
        (trainer, "--device abacus", "argument --device"),
        (trainer, "--epochs 0", "--epochs"),
        (trainer, "--batch -1", "--batch"),
        (trainer, "--max-steps -1", "--max-steps"),
    ]


def options(tmp):
    """Each is refused at once, by a sentence that names it, and nothing is written."""
    run = tmp / "run"
    for number in (1, 2, 3, 4):  # else 05 would only miss the codes
        must_work(number, "--run", run, "--smoke")
    before = times_of_files(run)
    rows = []
    for number, line, words in OPTIONS:
        folder = run
        more = []
        if number == 1:
            folder = tmp / "new"  # 01 must not even make the folder
            more = ["--cache", tmp / "cache"]
        ended = start(number, "--run", folder, *more, *line.split())
        happened, right = judge(ended, words)
        nothing_written = not (tmp / "new").exists() and times_of_files(run) == before
        # Of these seconds of the processor most go into the import of torch.
        rows.append(Row(f"0{number} {line}", happened, right and nothing_written and ended.seconds < 10))
        shutil.rmtree(tmp / "new", ignore_errors=True)
    return rows


PARTS = {
    "network": network,
    "records": records,
    "small": small,
    "endpoint": endpoint,
    "kill": kill,
    "files": files,
    "options": options,
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="*", help=f"some of {', '.join(PARTS)} (default: all)")
    chosen = parser.parse_args().part
    unknown = [name for name in chosen if name not in PARTS]
    if unknown:
        sys.exit(f"There is no {', '.join(unknown)}: choose from {', '.join(PARTS)}.")

    OWNED.unlink(missing_ok=True)
    shown = {True: "yes", False: "NO", None: "not tried"}
    how_many = {True: 0, False: 0, None: 0}
    for part in chosen or PARTS:
        began = time.time()
        with tempfile.TemporaryDirectory() as tmp:
            rows = PARTS[part](Path(tmp))
        print(f"\n| {part} ({time.time() - began:.0f} s) | what happened | survived |\n|---|---|---|")
        for row in rows:
            happened = row.happened.replace(tmp, "...").replace("|", "/")
            print(f"| {row.what} | {happened} | {shown[row.survived]} |", flush=True)
            how_many[row.survived] += 1

    print(f"\n{how_many[True]} survived, {how_many[False]} not survived, {how_many[None]} not tried")
    if how_many[False]:
        sys.exit(1)
    if how_many[None]:
        sys.exit(3)


if __name__ == "__main__":
    main()
