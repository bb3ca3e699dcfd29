"""Text codes: a sentence embedding of title, categories and description, cut into codes.

The embedding comes through one of three doors: a built-in encoder (tf-idf, then a randomised SVD;
nothing to download), a file of vectors that you made, or an OpenAI-compatible embeddings endpoint
(Ollama, vLLM, llama.cpp, text-embeddings-inference). The codes are made like those of 02: r_0 =
e_i; c_l = argmin_k ||r_{l-1} - C_l[k]||^2; r_l = r_{l-1} - C_l[c_l] (MSCGRec, arXiv 2602.03713).

    python 04_text_codes.py                            # after 01_data.py
    python 04_text_codes.py --embeddings vectors.npy   # (N, any width), a row for each item
    python 04_text_codes.py --embed-url http://localhost:11434/v1/embeddings

reads   data.pt
writes  text_codes.pt
          codes        int16 (N+1, L)     row 0 = -1; level 4 separates collisions
          codebooks    float32 (3, K, d)
          embeddings   float32 (N+1, d)   standardised; zero where there is no text
          known        bool (N+1)         the item has a text, or a vector in --embeddings
          moved        int                items that redistribution moved
          options      dict               the options of this run

On the toy shop: 1 second, 0.3 GiB (2 cores of an AMD EPYC).
"""
import argparse, functools, hashlib, math, os, pathlib, re, sys, time, zipfile, zlib
from collections import Counter

import numpy as np
import requests
import torch
import torch.nn.functional as F
from tqdm import tqdm

WIDTH = 64         # dimensions of the built-in embedding; with 256, k-means piles up short texts
BUCKETS = 2 ** 20  # features are numbered by a hash: no vocabulary to keep
SAMPLE = 20_000    # texts whose features and principal directions stand for all
WHITENED = 128     # principal directions kept of a language model's vectors, at the most
RETRIES = 50       # failed requests that one run forgives an endpoint, at most four in a row

# --- Files ---------------------------------------------------------------------------------------
MADE_FROM = {}  # SHA-256 of every file that was read; all that is saved carries them
def fail(message):
    """Ends the script with one sentence and exit code 2: no traceback, nothing half-written."""
    print(message, file=sys.stderr)
    sys.exit(2)

def load(path, maker, mmap=False):
    """Reads what `maker` wrote. Refuses a damaged or foreign file, and one of other inputs."""
    try:
        assert zipfile.ZipFile(path).testzip() is None  # all checksums are right
        artifact = torch.load(path, weights_only=True, map_location="cpu", mmap=mmap)
        for name, digest in artifact.get("made_from", None if maker[:3] == "01_" else {}).items():
            if MADE_FROM.get(name, digest) != digest:
                fail(f"{path} was made from another {path.with_name(name)}: run {maker} again.")
        MADE_FROM[path.name] = hashlib.file_digest(open(path, "rb"), "sha256").hexdigest()
        return artifact
    except Exception as error:
        fail(f"{path} is missing or damaged ({type(error).__name__}): run {maker} with this --run.")

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

# --- Three doors to an embedding -----------------------------------------------------------------
@functools.lru_cache(maxsize=100_000)
def letters(word):
    """Feature numbers of a word and its letter n-grams, n = 3..5: `stripe` is near `striped`."""
    marked = f"<{word}>"
    grams = {marked[i:i + n] for n in (3, 4, 5) for i in range(len(marked) - n + 1)}
    # Sorted: Python's sets of strings change their order with every start, and sums with it.
    return [zlib.crc32(gram.encode()) % BUCKETS for gram in sorted({word, *grams})]

def tf_idf(texts, idf=None):
    """Sublinear tf-idf, rows of unit length: (1 + log tf) * (log((1 + n) / (1 + df)) + 1).
    Features: words, pairs of neighbours, letter n-grams; those with idf > 0 are columns.
    n strings -> sparse (n, features), idf (BUCKETS,): of these texts if none is given"""
    row, column, tf = [], [], []
    for i, text in enumerate(texts):
        words = re.findall(r"\w+", text.lower())
        pairs = [zlib.crc32(" ".join(p).encode()) % BUCKETS for p in zip(words, words[1:])]
        counts = Counter(pairs + [feature for word in words for feature in letters(word)])
        row.append(np.full(len(counts), i))
        column.append(np.fromiter(counts.keys(), np.int64, len(counts)))
        tf.append(np.fromiter(counts.values(), np.float32, len(counts)))
    row, column, tf = (torch.from_numpy(np.concatenate(part)) for part in (row, column, tf))
    if idf is None:
        df = column.bincount(minlength=BUCKETS)  # (BUCKETS,)
        # What only one text has makes no two alike, and is most of all features: left out.
        idf = (((1 + len(texts)) / (1 + df)).log() + 1) * (df > min(1, df.max() - 1))
    row, column, tf = (part[idf[column] > 0] for part in (row, column, tf))  # (entries,) each
    weight = (1 + tf.log()) * idf[column]  # (entries,)
    norm = torch.zeros(len(texts)).index_add_(0, row, weight.square()).sqrt()  # (n,)
    number = (idf > 0).cumsum(0) - 1  # (BUCKETS,): the column of a feature
    return torch.sparse_coo_tensor(torch.stack([row, number[column]]), weight / norm[row],
                                   (len(texts), number[-1] + 1), check_invariants=True), idf

def built_in(texts):
    """Latent semantic analysis: the tf-idf rows in their d principal directions. -> (n, d)"""
    sample = [texts[i] for i in torch.randperm(len(texts))[:SAMPLE]]
    matrix, idf = tf_idf(sample)  # (sample, features)
    V = torch.randn(matrix.shape[1], min(WIDTH, *matrix.shape))  # (features, d)
    for _ in range(5):  # randomised SVD: powers of M M^T turn any basis to the principal one
        basis = torch.linalg.qr(matrix @ V).Q  # (sample, d): orthogonal where that is cheaper
        V = matrix.T @ basis  # (features, d)
    V = torch.linalg.qr(V).Q  # (features, d)
    parts = tqdm(range(0, len(texts), 1000), "embedding texts", leave=False, disable=None)
    return F.normalize(torch.cat([tf_idf(texts[i:i + 1000], idf)[0] @ V for i in parts]))

def from_file(path, N):
    """Vectors that somebody else made, a row an item; zeros: nothing is known. -> (N, width)"""
    try:
        x = torch.from_numpy(np.load(path, allow_pickle=False)) if path.suffix == ".npy" else \
            torch.load(path, weights_only=True, map_location="cpu")
        x = x.detach().to_dense().float() if torch.is_tensor(x) and not x.is_complex() else None
    except Exception as error:
        fail(f"--embeddings {path} cannot be read ({type(error).__name__}): give a .npy or .pt.")
    if x is None or x.ndim != 2 or len(x) != N or not x.shape[1]:
        fail(f"--embeddings {path} must be {N} rows of numbers, in data.pt's order: item_ids[1:].")
    return x

def from_endpoint(url, model, texts, batch):
    """Asks an OpenAI-compatible endpoint: POST {model, input: [texts]}
    -> {data: [{index, embedding}, ...]}, in any order. -> (n, width)"""
    headers = {"Authorization": f"Bearer {os.environ.get('OPENAI_API_KEY', 'none')}"}
    vectors, failures = [], 0
    for i in tqdm(range(0, len(texts), batch), "embedding texts", leave=False, disable=None):
        ask = {"model": model, "input": texts[i:i + batch]}
        for wait in (1, 2, 4, 8, 0):  # seconds; 0: give up
            try:
                reply = requests.post(url, json=ask, headers=headers, timeout=(10, 120))
                if reply.ok:
                    break
                problem = f"{reply.status_code} {' '.join(reply.text[:200].split())}"
                transient = reply.status_code == 429 or reply.status_code >= 500
            except requests.RequestException as error:  # a ValueError: the address makes no sense
                problem, transient = type(error).__name__, not isinstance(error, ValueError)
            failures += 1
            if not transient or not wait or failures > RETRIES:
                fail(f"--embed-url {url} does not answer ({problem}): is the server running?")
            time.sleep(wait)
        try:
            answer = {row["index"]: row["embedding"] for row in reply.json()["data"]}
            x = torch.tensor([answer[j] for j in range(len(answer))]).float()  # (batch, width)
        except (ValueError, KeyError, TypeError, RuntimeError, OverflowError):
            x = torch.zeros(0)
        if not x.numel() or x.shape != (len(ask["input"]), (vectors or [x])[0].shape[-1]):
            fail(f"--embed-url {url} did not give a vector for each text: check --embed-model.")
        vectors.append(x)
    return torch.cat(vectors)

def whiten(x):
    """PCA to at most WHITENED directions, each of variance 1. A language model's vectors lie in a
    narrow cone, a few directions holding most of the variance: k-means would cut those again and
    again, and unlike items would share codes. (n, width) -> (n, d)"""
    x = x / x.abs().max().clamp(min=1e-38)  # whose squares neither overflow nor vanish
    _, S, V = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    keep = S[:WHITENED] > max(1e-4 * S[0], 1e-6 * x.norm())  # less is rounding
    if not keep.any():  # one item, or all vectors equal
        return torch.zeros(len(x), 1)
    return (x - x.mean(0)) @ V[:WHITENED][keep].T * (len(x) - 1) ** 0.5 / S[:WHITENED][keep]

# --- Codes: residual k-means of any vectors (the same text in 02, 03 and 04) ---------------------
def codebook_size(N):
    """K, our rule: the power of two nearest (in ratio) to sqrt(N), from 8 to 256, the paper's."""
    return 2 ** min(8, max(3, round(math.log2(max(N, 1)) / 2)))

def nearest(x, codebook):
    """argmin_k ||x - C[k]||^2 for every row. x: (n, d), codebook: (K, d) -> (n,)"""
    half_norm = codebook.square().sum(1) / 2  # (K,)
    return torch.cat([torch.addmm(half_norm, part, codebook.T, alpha=-1).argmin(1)  # (part, K)
                      for part in x.split(4096)])  # few enough rows to stay in the cache

def kmeans(x, K, rng, steps=15):
    """Lloyd's algorithm; a centroid without members restarts at the vector that is served worst.
    1,024 vectors a centroid find it as well as more would. x: (n, d) -> codebook (K, d)"""
    x = x[torch.randperm(max(len(x), K), generator=rng)[:1024 * K] % len(x)]  # (n, d)
    codebook = x[:K]  # (K, d)
    for _ in range(steps):
        codes = nearest(x, codebook)  # (n,)
        members = torch.bincount(codes, minlength=K).unsqueeze(1)  # (K, 1)
        sums = torch.zeros_like(codebook).index_add_(0, codes, x)  # (K, d)
        empty = (members[:, 0] == 0).nonzero()[:, 0]  # (empty,)  [8]
        if len(empty):
            worst = (x - codebook[codes]).square().sum(1).topk(len(empty)).indices  # (empty,)
            sums[empty], members[empty] = x[worst], 1
        codebook = sums / members  # (K, d)
    return codebook

def residual_kmeans(x, K, rng):
    """A codebook for x, one for what it leaves, one for what that leaves: (n, d) -> (3, K, d)"""
    codebooks = []
    for _ in range(3):
        codebooks.append(kmeans(x, K, rng))  # (K, d)
        x = x - codebooks[-1][nearest(x, codebooks[-1])]  # (n, d)
    return torch.stack(codebooks)  # (3, K, d)

def quantise(x, codebooks):
    """r_0 = x; c_l = argmin_k ||r_{l-1} - C_l[k]||^2; r_l = r_{l-1} - C_l[c_l].
    x: (n, d), codebooks: (3, K, d) -> codes (n, 3), what they leave, r_3 (n, d)"""
    codes, residual = [], x
    for codebook in codebooks:
        codes.append(nearest(residual, codebook))  # (n,)
        residual = residual - codebook[codes[-1]]  # (n, d)  [7]
    return torch.stack(codes, 1), residual  # (n, 3), (n, d)

def number_in_group(group, order):
    """Numbers the members of each group from 0, in the given order. (n,), (n,) -> (n,)"""
    order = order[group[order].argsort(stable=True)]  # (n,)
    _, size = group[order].unique_consecutive(return_counts=True)  # (groups,)
    number = torch.empty_like(group)  # (n,)
    number[order] = torch.arange(len(group)) - (size.cumsum(0) - size).repeat_interleave(size)
    return number

def finish_codes(embeddings, known, codebooks, train_counts, rng):
    """Semantic levels 1-3 and the collision level 4: every item gets a code that no other has.
    An item without this modality gets a random place in the tree: it may still be a target.
    Items that share (c_1, c_2, c_3) are numbered, the most bought first. Where more than K share
    it, those with the largest residual walk down the tree anew, at each level into the nearest
    branch with room (empty-leaf redistribution).
    embeddings: (N+1, d), known: (N+1,), codebooks: (3, K, d) -> int16 (N+1, 4), items moved"""
    K = codebooks.shape[1]
    codes, residual = quantise(embeddings, codebooks)  # (N+1, 3), (N+1, d)
    codes[~known] = torch.randint(K, codes[~known].shape, generator=rng)
    prefix = (codes * torch.tensor([K * K, K, 1])).sum(1)  # (N+1,)
    prefix[0] = -1  # padding shares its place with nobody
    # Of a full prefix those move that are served worst.  [10]
    moved = number_in_group(prefix, residual.square().sum(1).argsort(stable=True)) >= K  # (N+1,)
    size = [torch.bincount(prefix[1:][~moved[1:]] // K ** (2 - l), minlength=K ** (l + 1))
            for l in range(3)]  # (K,), (K*K,), (K*K*K,): items behind each prefix
    for item in moved.nonzero()[:, 0].tolist():
        residual, place = embeddings[item], 0  # (d,)
        for l, C in enumerate(codebooks):  # the nearest branch that is not full
            full = size[l].view(-1, K)[place] == K ** (3 - l)  # (K,)
            k = (residual - C).square().sum(1).masked_fill(full, math.inf).argmin().item()
            codes[item, l], residual, place = k, residual - C[k], place * K + k
            size[l][place] += 1
        prefix[item] = place
    most_bought = (-train_counts.long()).argsort(stable=True)  # (N+1,)  [9]
    codes = torch.cat([codes, number_in_group(prefix, most_bought).unsqueeze(1)], 1)  # (N+1, 4)
    codes[0] = -1
    alone = (prefix[known].unique(return_counts=True)[1] == 1).sum() / known.sum().clamp(1)  # ()
    print(f"codes: K = {K}, {alone:.0%} of the items are alone after level 3")
    return codes.to(torch.int16), moved.sum().item()

# -------------------------------------------------------------------------------------------------
def main(argv=None):
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
    if args.embed_batch < 1 or not 0 <= args.seed < 2 ** 32 or args.embeddings and args.embed_url:
        fail("--embed-batch starts at 1, --seed at 0; give --embeddings or --embed-url, not both.")
    run, rng = pathlib.Path(args.run), torch.Generator().manual_seed(args.seed)
    torch.manual_seed(args.seed)
    data = load(run / "data.pt", "01_data.py")
    N = len(data["item_ids"]) - 1
    texts = [". ".join(filter(None, [title, ", ".join(categories), text])) for title, categories,
             text in zip(data["titles"], data["categories"], data["texts"])]  # N+1
    known = torch.tensor([bool(re.search(r"\w", text)) for text in texts])  # (N+1,)
    if args.embeddings:
        x = F.pad(from_file(pathlib.Path(args.embeddings), N), (0, 0, 1, 0))  # (N+1, width)
        known = (x != 0).any(1)  # (N+1,); true of NaN too, which is refused below
    items = known.nonzero()[:, 0]  # (n,)
    texts = [texts[i] for i in items]  # n
    print(f"{len(items)} of {N} items are known, for example: {texts[:1]!r:.150}")
    if not len(items):
        x = torch.zeros(0, 1)  # (n, d)
    elif args.embeddings:
        x = x[items]  # (n, width)
    elif args.embed_url:
        x = from_endpoint(args.embed_url, args.embed_model, texts, args.embed_batch)  # (n, width)
    else:
        x = built_in(texts)  # (n, d)
    bad = items[~x.isfinite().all(1)]  # (bad,)
    if len(bad):
        fail(f"The vector of item {data['item_ids'][bad[0]]} holds NaN or infinity: make it again.")
    if len(items) and (args.embeddings or args.embed_url):
        x = whiten(x)  # (n, d)  [17]

    x, K = x - x.mean(0), codebook_size(N)  # (n, d)
    embeddings = torch.zeros(N + 1, x.shape[1])  # (N+1, d)
    embeddings[items] = x / x.square().mean().sqrt().clamp(min=1e-6)  # one scale: codes stay
    codebooks = residual_kmeans(embeddings[items], K, rng) if len(items) else torch.zeros(3, K, 1)
    codes, moved = finish_codes(embeddings, known, codebooks, data["train_counts"], rng)  # (N+1, L)
    save({"codes": codes, "codebooks": codebooks, "embeddings": embeddings, "known": known,
          "moved": moved, "options": vars(args)}, run / "text_codes.pt")

if __name__ == "__main__":
    try:
        main()
    except (OSError, MemoryError, KeyboardInterrupt) as error:      # read-only, too large, Ctrl-C
        fail(f"stopped ({type(error).__name__} {error}): the same command begins again.")
