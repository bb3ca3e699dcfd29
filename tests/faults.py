"""Long checks by hand: what is done to the scripts, and whether they survive it. Prints a table; exit code 1 if one does not.

    python tests/faults.py                     # all, a quarter of an hour
    python tests/faults.py network records     # some, by the name of the function below

"Survived" means: it works and means what it should, or one sentence says why not and the exit code is 2; nothing is
half-written. A fault is a row (what was done, what happened, survived).
"""
import contextlib, gzip, http.server, io, json, os, pathlib, random, re, shutil, signal, struct, subprocess
import sys, tempfile, threading, time, types, zlib

import numpy as np
import torch
from PIL import Image

from conftest import command, script

os.environ |= {"OMP_NUM_THREADS": "1", "NO_PROXY": "127.0.0.1,localhost", "no_proxy": "127.0.0.1,localhost"}


# --- Running a script and judging how it ended ------------------------------------------------------------------------
def start(number, *options, **how):
    """-> the finished process, with its peak memory in GiB as .peak"""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        child = subprocess.Popen(command(number, *options), stdout=out, stderr=err, **how)
        _, status, usage = os.wait4(child.pid, 0)
        child.returncode, child.peak = os.waitstatus_to_exitcode(status), usage.ru_maxrss / 2 ** 20
        out.seek(0), err.seek(0)
        child.stdout, child.stderr = out.read(), err.read()
    return child


def ended(child):
    """-> what happened, in words, and whether that is how a script may end"""
    said = child.stderr.strip()
    if child.returncode == 0:
        return "works", "Traceback" not in said
    if ": error: argument" in said:  # argparse shows the options above its sentence
        said = said.split("\n")[-1]
    good = child.returncode == 2 and 0 < len(said) < 1000 and "\n" not in said and "Traceback" not in said
    return ("" if good else f"CODE {child.returncode}: ") + (said.split("\n")[-1][:200] or "no word"), good


def here(module, *options):
    """The same in this process, so that its constants can be made small."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            module.main([*map(str, options)])
        except SystemExit as stop:
            code = stop.code
        except Exception as error:
            code = 1
            print(f"Traceback: {type(error).__name__} {error}", file=err)
    return subprocess.CompletedProcess([], code, out.getvalue(), err.getvalue())


def dense(users=6, items=6):
    return [{"user_id": f"u{u}", "parent_asin": f"i{i}", "timestamp": 1000 * i} for u in range(users)
            for i in range(items)]


def shop(folder, events, items=()):
    """A folder in the layout of Amazon Reviews 2023; a line is a dict, or bytes as they are."""
    folder.mkdir(parents=True)
    for name, lines in (("reviews", events), ("meta", items)):
        with open(folder / f"{name}.jsonl", "wb") as file:
            file.writelines((line if isinstance(line, bytes) else json.dumps(line).encode()) + b"\n" for line in lines)
    return folder


def data_of(run):
    return torch.load(run / "data.pt", weights_only=True)


def same(a, b):
    """Two artifacts, but for the options, which name the folder of the run, and the hashes of the inputs."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a if k not in ("options", "made_from"))
    return torch.equal(a, b) if torch.is_tensor(a) else a == b


def jpeg(colour="red"):
    file = io.BytesIO()
    Image.new("RGB", (40, 60), colour).save(file, "JPEG")
    return file.getvalue()


# --- network: a host that does all that hosts do ----------------------------------------------------------------------
class Host:
    """Serves `files`; what is done to a request is the first part of its path: /FAULT/rest, or /FAULT-once/rest."""

    def __init__(self, files, elsewhere=""):
        host = self
        self.asked = []

        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_GET(self):
                host.asked.append(self.path)
                fault, _, name = self.path[1:].partition("/")
                once = fault.endswith("-once")
                again = host.asked.count(self.path) > 1
                with contextlib.suppress(OSError):
                    host.answer(self, "" if once and again else fault.removesuffix("-once"), files.get(name), again,
                                elsewhere)

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.port = self.server.server_port
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()

    def answer(self, to, fault, body, again, elsewhere):
        def head(status, length=None, **headers):
            to.send_response(status)
            if length is not None:
                to.send_header("Content-Length", str(length))
            for key, value in headers.items():
                to.send_header(key.replace("_", "-"), value)
            to.end_headers()

        if fault.isdigit():
            return head(int(fault), 0)
        if fault.startswith("429"):
            return head(429, 0, Retry_After=fault.partition("-")[2])
        if fault == "loop":
            return head(302, 0, Location=to.path)
        if fault == "elsewhere":
            return head(302, 0, Location=elsewhere)
        if fault == "html":
            page = b"<html>Log in to the network of the hotel</html>"
            head(200, len(page), Content_Type="text/html")
            return to.wfile.write(page)
        if fault == "endless":
            head(200)
            while True:
                to.wfile.write(bytes(1 << 16))
        if body is None:
            return head(404, 0)
        tag, half, asked = '"v1"', len(body) // 2, to.headers.get("Range", "")
        begin = int(re.match(r"bytes=(\d+)-", asked)[1]) if asked else 0
        if fault.startswith("changes") and not again:
            body, tag = body[:half][::-1] + body[half:], '"v0"'       # what it was before it changed
        if not asked or fault == "norange" or fault == "changes" and to.headers["If-Range"] != tag:
            begin = 0
        if begin >= len(body):
            return head(416, 0)
        part = body[begin:]
        length = {"long": len(part) + 99, "short": len(part) - 99, "nolength": None}.get(fault, len(part))
        span = {"Content_Range": f"bytes {begin}-{len(body) - 1}/{len(body)}"} if begin else {}
        head(206 if begin else 200, length, ETag=tag, **span)
        breaks = fault in ("early", "nolength") or fault in ("norange", "changes", "changesbadly") and not again
        to.wfile.write(part[:half // 4] if breaks or fault == "stall" else part)
        if fault == "stall":
            to.wfile.flush()
            time.sleep(3)

    def close(self):
        self.server.shutdown()
        self.server.server_close()


def network(tmp):
    """One fault each on the file of reviews, then one on each picture."""
    d = script(1)
    d.TIMEOUT, d.PAUSE, d.PATIENCE = (2, 1), 0.01, 2
    d.LONGEST |= {".gz": 2 << 20, ".jpg": 1 << 20}
    private = Host({"x.jpg": jpeg()})
    files = {"review_categories/Shop.jsonl.gz": gzip.compress(b"\n".join(
                 json.dumps(e | {"text": os.urandom(40).hex()}).encode() for e in dense())),
             "meta_categories/meta_Shop.jsonl.gz": gzip.compress(b""), "x.jpg": jpeg()}
    host = Host(files, elsewhere=f"{private.url}/ok/x.jpg")
    expected = {"500-once": 1, "500": 0, "429-1-once": 1, "429-100000": 0, "403": 0, "404": 0, "early-once": 1,
                "early": 0, "stall-once": 1, "stall": 0, "long": 0, "short": 0, "nolength": 0, "norange": 1,
                "changes": 1, "changesbadly": 1, "html": 0, "loop": 0, "elsewhere": 0, "endless": 0}
    rows, rest = [], files["review_categories/Shop.jsonl.gz"]
    for fault, works in expected.items():
        host.asked.clear()
        cache, run, began, before = tmp / fault, tmp / f"run-{fault}", time.time(), len(host.asked)
        child = here(d, "--run", run, "--dataset", "Shop", "--cache", cache, "--base-url", f"{host.url}/{fault}")
        # The file of items meets the same fault first or later; what counts is what the script makes of both.
        got = cache / "Shop" / "reviews.jsonl.gz"
        whole = not got.exists() or got.read_bytes() == rest or not works
        happened, good = ended(child)
        hashed = not works or child.returncode == 0 and "reviews.jsonl.gz" in data_of(run)["made_from"]
        rows.append((f"a host: {fault}", f"{happened} ({time.time() - began:.0f} s, {len(host.asked) - before} requests)",
                     good and whole and hashed and (child.returncode == 0) == bool(works)))
        if fault == "early":                    # an eighth of the file each time: the next run goes on
            child = here(d, "--run", run, "--dataset", "Shop", "--cache", cache, "--base-url", f"{host.url}/{fault}")
            rows.append((f"  {fault}, run again", "it goes on", got.exists() and got.read_bytes() == rest))
    cache, finished = tmp / "killed", tmp / "killed" / "Shop" / "reviews.jsonl.gz.partial"
    finished.parent.mkdir(parents=True)
    finished.write_bytes(rest), finished.with_name("reviews.jsonl.gz.etag").write_text('"v1"')
    child = here(d, "--run", tmp / "run-416", "--dataset", "Shop", "--cache", cache, "--base-url", f"{host.url}/ok")
    rows.append(("killed when all had come, before it got its name", *ended(child)))
    rows[-1] = (*rows[-1][:2], rows[-1][2] and child.returncode == 0)

    urls = [f"{host.url}/{fault}/x.jpg" for fault in expected] + [
        f"http://127.0.0.1:{private.port}/ok/x.jpg", f"http://localhost:{private.port}/ok/x.jpg",
        f"http://2130706433:{private.port}/ok/x.jpg", f"http://0.0.0.0:{private.port}/ok/x.jpg",
        f"http://[::1]:{private.port}/ok/x.jpg", f"http://[::ffff:127.0.0.1]:{private.port}/ok/x.jpg",
        "http://169.254.169.254/latest/meta-data", "http://10.0.0.1/x.jpg", "http://[fe80::1]/x.jpg",
        f"http://{host.url[7:]}@127.0.0.1:{private.port}/ok/x.jpg", f"http://127.0.0.1:{private.port}#{host.url[7:]}",
        "file:///etc/hostname", "ftp://127.0.0.1/x.jpg", "gopher://127.0.0.1/", "httpx://127.0.0.1/", "http://", "http://[",
        "data:image/png;base64,AAAA", "//127.0.0.1/x.jpg", "http://" + "a" * 5000, "http://a\u0000b/x.jpg"]
    N = len(urls)
    private.asked.clear()       # before this, the host that the user named has sent us there
    files |= {"review_categories/Shop.jsonl.gz": gzip.compress(b"\n".join(
                  json.dumps(e).encode() for e in dense(6, N))),
              "meta_categories/meta_Shop.jsonl.gz": gzip.compress(b"\n".join(json.dumps(
                  {"parent_asin": f"i{i}", "images": [{"large": url}]}).encode() for i, url in enumerate(urls)))}
    child = here(d, "--run", tmp / "pictures", "--dataset", "Shop", "--cache", tmp / "p", "--base-url", f"{host.url}/ok")
    happened, good = ended(child)
    if child.returncode == 0:
        data = data_of(tmp / "pictures")
        counts = {k: n for k, n in data["meta"]["counts"].items() if k.startswith("items: ")}
        happened, has = f"{counts}", dict(zip(data["item_ids"][1:], data["has_image"][1:].tolist()))
        right = [has[f"i{i}"] == bool(expected.get(url.split("/")[3]) if url.startswith(host.url) else 0)
                 for i, url in enumerate(urls)]
        good &= sum(counts.values()) == N
        happened += " WRONG: " + ", ".join(u[:60] for u, r in zip(urls, right) if not r) if not all(right) else ""
        # A picture that was cut short may show its upper part or be lost: both are counted.
        good &= all(r for u, r in zip(urls, right) if "/short/" not in u and "/nolength/" not in u)
    rows.append((f"{N} addresses of pictures, each with a fault", happened, good))
    rows.append(("requests to a host of this network that only a data file names", str(len(private.asked)),
                 not private.asked))
    host.close(), private.close()
    return rows


# --- records: 10,000 lines and 1,000 pictures -------------------------------------------------------------------------
def fuzzed_line(rng):
    """One line, bytes: of an event or an item, nearly right."""
    odd = lambda: rng.choice([
        None, True, False, 0, -1, 3.5, 1e308, float("nan"), float("inf"), 10 ** 30, "", " ", "x", "\u0000", "\ud800",
        "\x1b[31mred", "../../x", "/etc/passwd", "C:\\x", "CON", "x" * 4000, [], {}, [[]], [None, [1, "a"]], {"a": {}},
        "\u202egnp", "\U0001f600", "nan", "1_0", " 7 ", "1e3", -5 * 10 ** 12, 99 * 10 ** 12, 2 ** 63, -2 ** 63])
    row = {"user_id": f"u{rng.randrange(30)}", "parent_asin": f"i{rng.randrange(30)}",
           "timestamp": rng.randrange(10 ** 12, 10 ** 12 + 50), "rating": rng.choice([5.0, None, float("nan"), "x"]),
           "title": "a title", "description": ["words"], "categories": ["A"], "images": []}
    for key in rng.sample(sorted(row), rng.choice((0, 0, 1, 1, 2))):
        row[key] = odd()
    if rng.random() < 0.1:
        row["images"] = rng.choice([[{"large": odd()}], [{"thumb": [odd()]}], [odd(), {"hi_res": odd(), "variant": odd()}]])
    line = bytearray(json.dumps(row).encode())
    kind = rng.random()
    if kind < 0.03:
        line = line[:rng.randrange(len(line))]
    elif kind < 0.06:
        line[rng.randrange(len(line))] = rng.randrange(256)
    elif kind < 0.08:
        line = bytes(rng.randrange(256) for _ in range(99)).replace(b"\n", b"")
    elif kind < 0.09:
        line = rng.choice([b"", b"[]", b"null", b"1", b'"x"', b"NaN", b"[" * 100_000, b'{"a":' * 5000, b"{" + b" " * 999,
                           b'{"user_id": "u1", "parent_asin": "i1", "timestamp": ' + b"9" * 5000 + b"}"])
    elif kind < 0.095:
        depth = rng.randrange(1, 3000)
        line = b'{"parent_asin": "i1", "title": ' + b"[" * depth + b'"deep"' + b"]" * depth + b"}"
    return bytes(line)


def records(tmp):
    rng, rows = random.Random(0), []
    lines = [fuzzed_line(rng).replace(b"\r", b"") for _ in range(10_000)]
    big = [json.dumps({"user_id": "u1", "parent_asin": f"i{i}", "timestamp": 1, "title": "T" * 10_000_000,
                       "categories": ["c" * 1_000_000] * 3}).encode() for i in range(20)]
    endless = [b'{"title": "' + b"x" * 100_000_000 + b'"}']
    folder = shop(tmp / "fuzz", lines + dense(30, 30) + big + endless,
                  [line.replace(b'"user_id"', b'"user"') for line in big + endless + lines])
    before = {p: p.stat().st_mtime_ns for p in tmp.rglob("*") if p.is_file()}
    child = start(1, "--run", tmp / "run", "--dataset", folder, "--image-size", 8)
    (happened, good), U = ended(child), 0
    if child.returncode == 0:
        data = data_of(tmp / "run")
        counts, U = data["meta"]["counts"], len(data["user_ids"])
        reasons = {k: n for k, n in counts.items() if k.startswith("reviews.jsonl") or k in (
            "events: well-formed", "events: no user", "events: no item", "events: bad time")}
        total, read = len(lines) + 900 + len(big), sum(reasons.values())
        # A byte changed to a new line makes two of one; the endless line comes in pieces.
        good &= total <= read <= total + 40 and all(reason.split(":")[0] in child.stdout for reason in counts)
        good &= sum(map(len, data["titles"])) < 100_000 and {f"u{u}" for u in range(30)} <= set(data["user_ids"])
        everything = json.dumps([data[k] for k in ("titles", "texts", "categories", "item_ids", "user_ids")],
                                ensure_ascii=False)
        good &= not re.search("[\x00-\x1f\x7f-\x9f\ud800-\udfff]", everything)
        happened = f"{read:,} lines accounted for, U {U}, N {len(data['item_ids']) - 1}"
    rows.append(("10,000 fuzzed lines, 20 titles of 10 MB, a line of 100 MB, twice", happened, good))
    rows.append(("  peak memory", f"{child.peak:.2f} GiB", child.peak < 1))
    after = {p: p.stat().st_mtime_ns for p in tmp.rglob("*") if p.is_file()}
    wrote = [p for p, when in after.items() if before.get(p) != when]
    rows.append(("  files written", f"{sorted(p.name for p in wrote)}", all(p.parent == tmp / "run" for p in wrote)))
    if child.returncode == 0:
        rows.append(("  04 after them", *ended(start(4, "--run", tmp / "run"))))
    nothing = shop(tmp / "nothing", [b'{"user_id": "u", "timestamp": 1}'] * 50 + [b"x"] * 50)
    rows.append(("not one good line", *ended(start(1, "--run", tmp / "none", "--dataset", nothing))))

    pictures = shop(tmp / "pictures", [{"user_id": f"u{e // 10}", "parent_asin": f"i{e}", "timestamp": e}
                                       for e in range(1000)], [{"parent_asin": f"i{e}"} for e in range(1000)])
    (pictures / "images").mkdir()
    expected = sum(fuzzed_picture(i, random.Random(i), pictures / "images" / f"i{i}.jpg") for i in range(1000))
    child = start(1, "--run", tmp / "run2", "--dataset", pictures, "--k-core", 1, "--image-size", 16)
    happened, good = ended(child)
    if child.returncode == 0:
        counts = {k: n for k, n in data_of(tmp / "run2")["meta"]["counts"].items() if k.startswith("items: ")}
        happened, good = f"{counts}", good and sum(counts.values()) == 1000 and counts["items: picture"] >= expected
    rows.append(("1,000 fuzzed pictures", happened, good))
    rows.append(("  peak memory", f"{child.peak:.2f} GiB", child.peak < 1.5))
    return rows


def fuzzed_picture(i, rng, path):
    """Writes one; -> whether it is whole and must be read."""
    kinds = ["truncated", "empty", "GIF", "CMYK", "16 bit", "alpha", "bomb", "thin", "bits", "PNG", "noise", "postscript",
             "BMP", "WEBP", "big"]
    kind, file = kinds[i % len(kinds)], io.BytesIO()
    colour = [Image.new("RGB", (30, 20), tuple(rng.randrange(256) for _ in range(3))) for _ in range(3)]
    if kind in ("truncated", "bits"):
        Image.effect_noise((90, 90), 50).save(file, rng.choice(["JPEG", "PNG", "GIF", "WEBP"]))
        raw = bytearray(file.getvalue())
        raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
        return bool(path.write_bytes(raw[:rng.randrange(len(raw))] if kind == "truncated" else raw)) and False
    if kind in ("empty", "noise", "postscript"):
        return bool(path.write_bytes({"empty": b"", "noise": rng.randbytes(999), "postscript": (
            b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(%pipe%touch /tmp/owned) (w) file\n")}[kind])) and False
    if kind == "bomb":      # 400 million pixels in 50 kB
        chunk = lambda name, body: struct.pack(">I", len(body)) + name + body + struct.pack(
            ">I", zlib.crc32(name + body))
        path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 20000, 20000, 1, 0, 0, 0, 0)) +
                         chunk(b"IDAT", zlib.compress(bytes(2501) * 20000)) + chunk(b"IEND", b""))
        return False
    if kind == "GIF":
        colour[0].save(file, "GIF", save_all=True, append_images=colour[1:])
    elif kind == "CMYK":
        colour[0].convert("CMYK").save(file, "JPEG")
    elif kind == "16 bit":
        Image.fromarray(np.linspace(0, 65535, 900).reshape(30, 30).astype(np.uint16)).save(file, "PNG")
    elif kind == "alpha":
        colour[0].quantize(4).save(file, "PNG", transparency=0)
    elif kind == "thin":
        Image.new("RGB", (1, 60_000) if i % 2 else (60_000, 1)).save(file, "JPEG")
    elif kind == "big":
        Image.new("RGB", (5000, 4800), "red").save(file, "PNG")
    else:
        colour[0].save(file, kind)
    path.write_bytes(file.getvalue())
    return True


# --- small: odd shops through all six ---------------------------------------------------------------------------------
def small(tmp):
    events = lambda users, items: [(f"u{u}", f"i{i}", i) for u in range(users) for i in range(items)]
    words = lambda n, **same: [{"parent_asin": f"i{i}", "title": f"item {i} of {'abcdefg'[i % 7]}", "categories":
                                ["one"], "description": f"text {i % 11}"} | same for i in range(n)]
    one = ("--k-core", 1)
    shops = {"one user": (events(1, 5), words(5), one), "one user, in a 5-core": (events(1, 5), words(5)),
             "two items": (events(9, 2), words(2), one), "three items": (events(9, 3), words(3), one),
             "all users of one item": (events(9, 1), words(1), one), "no event": ([], []),
             "all texts equal": (events(9, 30), words(30, title="a mug", description="")),
             "no picture, no text": (events(9, 30), []), "a single category": (events(20, 12), words(12)),
             "a user with 100,000 events": (events(1, 100_000) + events(9, 9), words(9), one),
             "the same event 1,000 times": (events(9, 9) * 1000, words(9)),
             "fewer items than codes": (events(8, 6), words(6)), "more items than places behind a prefix": (
                 events(6, 300), words(300, title="mug", description=""))}
    rows = []
    for name, (log, items, *options) in shops.items():
        folder = shop(tmp / name / "shop", [dict(zip(("user_id", "parent_asin", "timestamp"), e)) for e in log], items)
        run, options = tmp / name / "run", options[0] if options else ()
        for number in range(1, 7):
            if number in (3, 5) and len(log) > 50_000:
                continue
            child = start(number, "--run", run, "--smoke", *(("--dataset", folder, "--max-items", 0, "--max-users", 0,
                                                             *options) if number == 1 else ()))
            happened, good = ended(child)
            rows.append((f"{name}: 0{number}", happened, good))
            if child.returncode:
                break

    run = tmp / "all texts equal" / "run"
    N = len(data_of(run)["item_ids"]) - 1
    files = {"NaN.npy": np.full((N, 3), np.nan), "infinite.npy": np.full((N, 3), 1e39), "short.npy": np.ones((N - 1, 3)),
             "words.npy": np.full((N, 2), "x"), "flat.npy": np.ones(N), "complex.npy": np.ones((N, 2), complex) * 1j,
             "whole.npy": np.arange(2 * N).reshape(N, 2), "huge.npy": np.random.default_rng(0).normal(size=(N, 9)) * 1e30,
             "tiny.npy": np.random.default_rng(0).normal(size=(N, 9)) * 1e-30, "wide.npy": np.ones((N, 20_000), "f4")}
    for name, array in files.items():
        np.save(tmp / name, array)
        rows.append((f"--embeddings {name}", *ended(start(4, "--run", run, "--embeddings", tmp / name))))
    torch.save(torch.ones(N, 3).to_sparse(), tmp / "sparse.pt")
    (tmp / "lies.npy").write_bytes((tmp / "flat.npy").read_bytes().replace(f"({N},)".encode(), b"(9999999999999, 3)"))
    (tmp / "cut.npy").write_bytes((tmp / "wide.npy").read_bytes()[:999])
    torch.save({"a": Evil()}, tmp / "evil.pt")
    for name in ("sparse.pt", "lies.npy", "cut.npy", "evil.pt", "."):
        rows.append((f"--embeddings {name}", *ended(start(4, "--run", run, "--embeddings", tmp / name))))
    codes = [torch.load(run / "text_codes.pt", weights_only=True) for name in ("huge.npy", "tiny.npy")
             if start(4, "--run", run, "--embeddings", tmp / name).returncode == 0]
    rows.append(("vectors of 1e30 and of 1e-30 mean the same", f"{len(codes)} runs",
                 len(codes) == 2 and torch.equal(codes[0]["codes"], codes[1]["codes"])))
    return rows + endpoint(run)


class Evil:
    def __reduce__(self):
        return os.system, ("touch /tmp/owned",)


def endpoint(run):
    """04 asks a server that answers nonsense."""
    t, rows = script(4), []
    t.time, ask = types.SimpleNamespace(sleep=lambda seconds: None), t.requests.post  # 04 need not wait
    t.requests.post = lambda *a, **k: ask(*a, **k | {"timeout": (1, 1)})
    good = lambda n: {"data": [{"index": i, "embedding": [float(i), 1.0, 2.0]} for i in range(n)]}
    answers = {"time-out": None, "401": (401, b"{}"), "wrong count": (200, good(3)), "503 always": (503, b""),
               "NaN": (200, lambda n: json.dumps(good(n)).replace(" 1.0,", " NaN,").encode()), "HTML": (200, b"<html>"),
               "10**400": (200, lambda n: json.dumps(good(n)).replace("2.0", "1" + "0" * 400).encode()),
               "[[[[...": (200, b"[" * 100_000), "null": (200, b"null"), "cut short": (200, b'{"data": ['),
               "another width for each": (200, lambda n: json.dumps({"data": [
                   {"index": i, "embedding": [1.0] * (i + 1)} for i in range(n)]}).encode()),
               "redirect loop": (302, b""), "as it should": (200, lambda n: json.dumps(good(n)).encode())}
    for name, answer in answers.items():
        class Handler(http.server.BaseHTTPRequestHandler):
            def log_message(self, *_):
                pass

            def do_POST(self):
                texts = json.loads(self.rfile.read(int(self.headers["Content-Length"] or 0)) or b'{"input": []}')["input"]
                if answer is None:
                    return time.sleep(2)
                status, body = answer
                body = body(len(texts)) if callable(body) else body if isinstance(body, bytes) else json.dumps(body).encode()
                with contextlib.suppress(OSError):
                    self.send_response(status)
                    self.send_header("Content-Length", str(len(body)))
                    if status == 302:
                        self.send_header("Location", self.path)
                    self.end_headers()
                    self.wfile.write(body)

            do_GET = do_POST

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        child = here(t, "--run", run, "--embed-url", f"http://127.0.0.1:{server.server_port}/v1/embeddings")
        happened, fine = ended(child)
        rows.append((f"an endpoint: {name}", happened, fine and (child.returncode == 0) == (name == "as it should")))
        server.shutdown(), server.server_close()
    return rows


# --- kill: SIGKILL at any moment, then the same command again ---------------------------------------------------------
def content(path):
    """The bytes of a file; of an artifact without the readings of the clock and of memory."""
    if path.suffix != ".pt":
        return path.read_bytes()
    saved, file = torch.load(path, weights_only=True), io.BytesIO()
    torch.save({key: saved[key] for key in saved if key not in ("seconds", "peak_memory")}, file)
    return file.getvalue()


def killed(number, tmp, *options, times=20, inputs=None):
    """-> row. What the next run writes is to the byte what an undisturbed run wrote; nothing else is left."""
    whole, run, rng = tmp / f"whole{number}", tmp / "same-place", random.Random(number)
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(inputs, run) if inputs else run.mkdir()
    began = time.time()
    assert start(number, "--run", run, *options).returncode == 0
    seconds = time.time() - began
    run.rename(whole)
    expected, bad = {p.name: content(p) for p in whole.iterdir()}, []
    for _ in range(times):
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(inputs, run) if inputs else run.mkdir()
        child = subprocess.Popen(command(number, "--run", run, *options), stdout=-3, stderr=-3)
        after = rng.uniform(0.3, 1) * seconds
        time.sleep(after)
        child.send_signal(signal.SIGKILL), child.wait()
        bad += [f"{p.name} at {after:.2f} s" for p in run.glob("*") if p.suffix in (".pt", ".png", ".md") and
                content(p) != expected.get(p.name)]
        start(number, "--run", run, *options)
        now = {p.name: content(p) if p.is_file() else None for p in run.iterdir()}
        bad += [f"{name} after the second run" for name in {*now, *expected} if now.get(name) != expected.get(name)]
    return f"0{number} killed {times} times within {seconds:.1f} s, run again", "; ".join(bad) or "the same bytes", not bad


def kill(tmp):
    rows = [killed(1, tmp)]
    data = tmp / "data"
    data.mkdir()
    shutil.copy(tmp / "whole1" / "data.pt", data)
    rows.append(killed(4, tmp, inputs=data))
    small = tmp / "small"
    assert start(1, "--run", small, "--smoke").returncode == 0
    for number in (2, 3, 4, 5):  # the long trainings, made short: six epochs of a small shop
        options = ("--smoke", "--epochs", 6) if number != 4 else ()
        if number != 4:
            rows.append(killed(number, tmp, *options, inputs=small))
        assert start(number, "--run", small, *options).returncode == 0
    return rows


# --- files: disk full, read-only, damaged, malicious ------------------------------------------------------------------
def files(tmp):
    rows, run = [], tmp / "run"
    assert start(1, "--run", run, "--smoke").returncode == 0
    full = tmp / "full"
    for number, megabytes in ((1, 0.1), (1, 0.4), (1, 1), (4, 0.03), (4, 0.04)):
        full.mkdir()
        size = int(megabytes * 2 ** 20)
        if subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", full], capture_output=True).returncode:
            rows.append(("disk full", "mount is not allowed here: not tried", True))
            full.rmdir()
            break
        if number == 4:
            shutil.copy(run / "data.pt", full)
        child = start(number, "--run", full, *["--smoke"] * (number == 4), *["--max-items", 500] * (number == 1))
        happened, good = ended(child)
        left = [p.name for p in full.iterdir() if p.name != "data.pt" or number == 1]
        rows.append((f"0{number}, a disk of {megabytes} MB", f"{happened} Left: {left}", good and not any(
            "partial" in name or name == "data.pt" for name in left)))
        subprocess.run(["umount", full], check=True)
        full.rmdir()
    for number, limit in ((1, 50_000), (4, 20_000)):
        import resource
        place = tmp / f"limit{number}"
        shutil.copytree(run, place) if number == 4 else place.mkdir()
        child = start(number, "--run", place, "--smoke", preexec_fn=lambda: resource.setrlimit(
            resource.RLIMIT_FSIZE, (limit, limit)))
        happened, good = ended(child)
        rows.append((f"0{number}, no file above {limit} bytes", happened, good and not [*place.glob("*.partial")]))
    shutil.copytree(run, full)
    if subprocess.run(["mount", "--bind", full, full], capture_output=True).returncode == 0:
        subprocess.run(["mount", "-o", "remount,ro,bind", full], check=True)
        before = {p.name: p.read_bytes() for p in full.iterdir()}
        for number in (1, 4):
            happened, good = ended(start(number, "--run", full, "--smoke"))
            rows.append((f"0{number}, a read-only folder", happened, good and happened != "works"))
        rows.append(("  the folder", "as before", before == {p.name: p.read_bytes() for p in full.iterdir()}))
        subprocess.run(["umount", full], check=True)
    (tmp / "file").write_text("")
    rows.append(("01, --run is a file", *ended(start(1, "--run", tmp / "file", "--smoke"))))
    rows.append(("04, --run is a file", *ended(start(4, "--run", tmp / "file", "--smoke"))))

    raw, rng = (run / "data.pt").read_bytes(), random.Random(0)
    place = tmp / "damaged"
    place.mkdir()
    assert start(4, "--run", run, "--smoke").returncode == 0
    codes = torch.load(run / "text_codes.pt", weights_only=True)
    damages = {f"cut at {at} of {len(raw)} bytes": raw[:at] for at in (0, 1, 100, len(raw) // 2, len(raw) - 1)}
    damages |= {"not .pt at all": b"hello"}
    for _ in range(20):
        at = rng.randrange(len(raw))
        damages[f"bit flipped at {at}"] = raw[:at] + bytes([raw[at] ^ 1 << rng.randrange(8)]) + raw[at + 1:]
    torch.save({"item_ids": ["", "x"]}, tmp / "other.pt")
    torch.save([1, 2], tmp / "list.pt")
    torch.save({"a": Evil()}, tmp / "evil.pt")
    damages |= {name: (tmp / f"{name}.pt").read_bytes() for name in ("other", "list", "evil")}
    for name, content in damages.items():
        (place / "data.pt").write_bytes(content)
        child = start(4, "--run", place, "--smoke")
        happened, good = ended(child)
        if child.returncode == 0:           # then the damage was where nothing is read
            good &= same(torch.load(place / "text_codes.pt", weights_only=True), codes)
            (place / "text_codes.pt").unlink()
        rows.append((f"04, data.pt {name}", happened, good and not list(place.glob("text_codes*"))))
    rows.append(("code in a .pt, in --embeddings, in a picture", "ran" if os.path.exists("/tmp/owned") else "did not run",
                 not os.path.exists("/tmp/owned")))
    return rows


# --- options: ranges --------------------------------------------------------------------------------------------------
def options(tmp):
    rows = []
    start(1, "--run", tmp / "run", "--smoke")
    for number, *bad in ((1, "--k-core", 0), (1, "--k-core", 10 ** 30), (1, "--seed", -1), (1, "--seed", 10 ** 30),
                         (1, "--image-size", 10 ** 6), (1, "--max-items", 30_000), (1, "--max-users", 100_000),
                         (1, "--max-events", -1), (1, "--dataset", "nowhere"), (1, "--base-url", "ftp://x", "--dataset",
                         "All_Beauty"), (1, "--max-items", 1), (1, "--max-items", 2, "--k-core", 1),
                         (4, "--seed", -1), (4, "--seed", 10 ** 30), (4, "--embed-batch", 0),
                         (4, "--embed-batch", 10 ** 12, "--embed-url", "nonsense"), (4, "--embed-url", "file:///etc/passwd"),
                         *((number, *bad) for number in (2, 3, 5) for bad in (
                             ("--seed", -1), ("--seed", 10 ** 30), ("--device", "abacus"), ("--epochs", 0),
                             ("--batch", -1), ("--max-steps", -1))),
                         (2, "--dropout", 1), (2, "--width", 7), (2, "--lr", 0), (2, "--loss", "none"), (2, "--top", 0),
                         (3, "--width", 7), (3, "--crop-size", 33), (3, "--out-dim", 0), (3, "--local-crops", -1),
                         (5, "--target", "scent"), (5, "--modalities", "image,scent"), (5, "--masking", 2),
                         (5, "--beam", 0), (5, "--dropout", 1), (6, "--draws", 0), (6, "--against", "nobody")):
        shutil.rmtree(tmp / "new", ignore_errors=True)
        began, run = time.time(), tmp / ("run" if number > 1 else "new")
        happened, good = ended(start(number, "--run", run, *(("--cache", tmp / "c") if number == 1 else ()), *bad))
        rows.append((f"0{number} {' '.join(map(str, bad))}", happened, good and happened != "works" and
                     time.time() - began < 10 and not (tmp / "new").exists()))
    return rows


if __name__ == "__main__":
    failed = 0
    for part in sys.argv[1:] or ["network", "records", "small", "kill", "files", "options"]:
        with tempfile.TemporaryDirectory() as tmp:
            began, rows = time.time(), globals()[part](pathlib.Path(tmp))
        print(f"\n| {part} ({time.time() - began:.0f} s) | what happened | survived |\n|---|---|---|")
        for what, happened, good in rows:
            print(f"| {what} | {happened.replace(str(tmp), '...').replace('|', '/')} | {'yes' if good else 'NO'} |", flush=True)
            failed += not good
    print(f"\n{failed} not survived" if failed else "\nall survived")
    sys.exit(failed > 0)
