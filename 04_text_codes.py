"""Text codes: a sentence embedding of title, categories and description, cut into codes by residual k-means.

The embedding comes through one of three doors: a built-in encoder (tf-idf over words, word pairs and letter n-grams,
then a randomised SVD; nothing to download), a file of vectors that you made, or an OpenAI-compatible embeddings
endpoint (Ollama, vLLM, llama.cpp, text-embeddings-inference). The codes are those of 02: r_0 = e_i,
c_l = argmin_k ||r_{l-1} - C_l[k]||^2, r_l = r_{l-1} - C_l[c_l]  (MSCGRec, arXiv 2602.03713, the text modality).

    python 04_text_codes.py                                       # TODO seconds on 2 CPU cores
    python 04_text_codes.py --embeddings vectors.npy              # (N, any width), in the order of data.pt's item_ids
    python 04_text_codes.py --embed-url http://localhost:11434/v1/embeddings --embed-model nomic-embed-text

reads   data.pt
writes  text_codes.pt
          codes             int16 (N+1, L)          row 0 = -1; level 4 separates collisions
          codebooks         float32 (3, K, d)
          embeddings        float32 (N+1, d)        standardised; zero where there is no text
          known             bool (N+1)              the item has a text
          stats             dict                    use, perplexity, uniqueness, moved items
          options           dict                    the options of this run
"""

import argparse, math, os, pathlib, re, sys, time, zlib
from collections import Counter
from functools import lru_cache

import numpy as np
import requests
import torch
import torch.nn.functional as F
from tqdm import tqdm

WIDTH = 64         # dimensions of the built-in embedding, at the most: in 256 k-means piles up the short texts
BUCKETS = 2 ** 20  # features are numbered by a hash: no vocabulary to keep
WHITENED = 128     # principal directions kept of a language model's vectors

# ---------------------------------------------------------------------------------------------------
# Files

def fail(message):
    """Ends the script with one sentence and exit code 2: no traceback, nothing half-written."""
    print(message, file=sys.stderr)
    sys.exit(2)

def load(path, maker, mmap=False):
    """Reads one artifact of the run; `maker` is the script that writes it."""
    if not path.exists():
        fail(f"{path} is missing: run {maker} with the same --run first.")
    try:
        return torch.load(path, weights_only=True, map_location="cpu", mmap=mmap)
    except Exception as error:
        fail(f"{path} cannot be read ({type(error).__name__}): delete it, run {maker} again.")

def save(artifact, path):
    """Writes beside the file, flushes, renames: nobody ever sees half an artifact."""
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        torch.save(artifact, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)

# ---------------------------------------------------------------------------------------------------
# Three doors to an embedding

@lru_cache(maxsize=1_000_000)
def letters(word):
    """A word and its letter n-grams, n = 3..5, as feature numbers: `stripe` and `striped` share most of them."""
    marked = f"<{word}>"
    grams = {marked[i:i + n] for n in (3, 4, 5) for i in range(len(marked) - n + 1)}
    return [zlib.crc32(gram.encode()) % BUCKETS for gram in {word, *grams}]

def tf_idf(texts):
    """Sublinear tf-idf, rows of unit length: weight = (1 + log tf) * (log((1 + n) / (1 + df)) + 1).

    Features: words, pairs of neighbours, letter n-grams. texts: n strings -> sparse (n, features)."""
    row, column, tf = [], [], []
    for i, text in enumerate(tqdm(texts, "counting words", leave=False)):
        words = re.findall(r"\w+", text.lower())
        features = [f for word in words for f in letters(word)]
        features += [zlib.crc32(" ".join(pair).encode()) % BUCKETS for pair in zip(words, words[1:])]
        counts = Counter(features)
        row.append(np.full(len(counts), i))
        column.append(np.fromiter(counts.keys(), np.int64, len(counts)))
        tf.append(np.fromiter(counts.values(), np.float32, len(counts)))
    row, column, tf = (torch.from_numpy(np.concatenate(part)) for part in (row, column, tf))  # (entries,) each
    _, column, df = column.unique(return_inverse=True, return_counts=True)  # (entries,), (features,)
    weight = (1 + tf.log()) * (((1 + len(texts)) / (1 + df)).log() + 1)[column]  # (entries,)
    norm = torch.zeros(len(texts)).index_add_(0, row, weight.square()).sqrt()  # (n,)
    return torch.sparse_coo_tensor(torch.stack([row, column]), weight / norm[row], (len(texts), len(df)))

def built_in(texts):
    """Latent semantic analysis: texts -> (n, d), the tf-idf rows in their d principal directions."""
    matrix = tf_idf(texts)  # (n, features)
    d = min(WIDTH, *matrix.shape)
    U, S, _ = torch.svd_lowrank(matrix, q=min(d + 10, *matrix.shape), niter=4)  # randomised SVD
    return F.normalize((U * S)[:, :d], dim=1)  # (n, d)

def from_file(path, N):
    """Vectors that somebody else made, a row an item. -> (N, width)."""
    try:
        x = torch.from_numpy(np.load(path, allow_pickle=False)) if path.suffix == ".npy" else \
            torch.load(path, weights_only=True, map_location="cpu")
    except Exception as error:
        fail(f"--embeddings {path} cannot be read ({type(error).__name__}): it must be a .npy array or a .pt tensor.")
    if not torch.is_tensor(x) or x.ndim != 2 or len(x) != N:
        fail(f"--embeddings {path} must hold one array of {N} rows, one for each of data.pt's item_ids[1:], in order.")
    return x.float()

def from_endpoint(url, model, texts, batch):
    """Asks an OpenAI-compatible endpoint: POST {model, input: [texts]} -> {data: [{index, embedding}]}. -> (n, width)."""
    headers = {"Authorization": f"Bearer {os.environ['OPENAI_API_KEY']}"} if "OPENAI_API_KEY" in os.environ else {}
    vectors = []
    for i in tqdm(range(0, len(texts), batch), "asking for embeddings", leave=False):
        part = texts[i:i + batch]
        for attempt in range(5):
            try:
                reply = requests.post(url, json={"model": model, "input": part}, headers=headers, timeout=(10, 120))
                if reply.status_code != 429 and reply.status_code < 500:
                    break
                problem = f"status {reply.status_code}"
            except requests.RequestException as error:
                reply, problem = None, type(error).__name__
            time.sleep(2 ** attempt)
        else:
            fail(f"--embed-url {url} did not answer five times ({problem}): is the server running?")
        if not reply.ok:
            fail(f"--embed-url {url} refused (status {reply.status_code}): {reply.text[:200]}")
        try:
            rows = sorted(reply.json()["data"], key=lambda entry: entry["index"])
            vectors.append(torch.tensor([entry["embedding"] for entry in rows], dtype=torch.float32))  # (batch, width)
            assert len(rows) == len(part)
        except (ValueError, KeyError, TypeError, AssertionError):
            fail(f"--embed-url {url} answered something else than {len(part)} embeddings of equal width: check --embed-model.")
    return torch.cat(vectors)

def whiten(x):
    """PCA to at most WHITENED directions, each of variance 1. (n, width) -> (n, d).

    A language model's vectors lie in a narrow cone, a few directions holding most of the variance: k-means would
    cut those again and again, and unlike items would share codes."""
    _, S, V = torch.linalg.svd(x - x.mean(0), full_matrices=False)
    keep = S[:WHITENED] > 1e-4 * S[0]  # (d,)
    return (x - x.mean(0)) @ V[:WHITENED][keep].T / (S[:WHITENED][keep] / max(1, len(x) - 1) ** 0.5)

# ---------------------------------------------------------------------------------------------------
# Codes: residual k-means of any vectors (the same text in 02, 03 and 04)

def codebook_size(N):
    """K, our rule: the power of two nearest to sqrt(N), from 8 to 256, the paper's."""
    return 2 ** min(8, max(3, round(math.log2(max(N, 1)) / 2)))

def nearest(x, codebook):
    """argmin_k ||x - C[k]||^2 for every row. x: (n, d), codebook: (K, d) -> (n,)"""
    half_norm = codebook.square().sum(1) / 2  # (K,)
    return torch.cat([(half_norm - part @ codebook.T).argmin(1) for part in x.split(65536)])

def kmeans(x, K, rng, steps=30):
    """Lloyd's algorithm; a centroid without members restarts at the vector that is served worst.

    x: (n, d) -> codebook (K, d)"""
    start = torch.randperm(max(len(x), K), generator=rng)[:K] % len(x)  # (K,)
    codebook = x[start].clone()  # (K, d)
    for _ in range(steps):
        codes = nearest(x, codebook)  # (n,)
        members = torch.bincount(codes, minlength=K).unsqueeze(1)  # (K, 1)
        sums = torch.zeros_like(codebook).index_add_(0, codes, x)  # (K, d)
        codebook = torch.where(members > 0, sums / members.clamp(min=1), codebook)  # (K, d)
        empty = (members[:, 0] == 0).nonzero()[:len(x), 0]  # (empty,)
        worst = (x - codebook[codes]).square().sum(1).topk(len(empty)).indices  # (empty,)
        codebook[empty] = x[worst]
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

    x: (n, d), codebooks: (3, K, d) -> codes (n, 3)"""
    codes, residual = [], x
    for codebook in codebooks:
        codes.append(nearest(residual, codebook))  # (n,)
        residual = residual - codebook[codes[-1]]  # (n, d)
    return torch.stack(codes, 1)  # (n, 3)

def nearest_first(x, codebooks, prefix=()):
    """All (c_1, c_2, c_3), the nearest to x (d,) first, level by level."""
    if len(prefix) == len(codebooks):
        yield prefix
        return
    distance = (x - codebooks[len(prefix)]).square().sum(1)  # (K,)
    for k in distance.argsort(stable=True).tolist():
        yield from nearest_first(x - codebooks[len(prefix)][k], codebooks, prefix + (k,))

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
    it, those with the largest residual move to the nearest one with room (empty-leaf
    redistribution). embeddings: (N+1, d), known: bool (N+1,), codebooks: (3, K, d)
    -> codes int16 (N+1, 4), row 0 = -1, and statistics of the known items' codes."""
    K = codebooks.shape[1]
    codes = quantise(embeddings, codebooks)  # (N+1, 3)
    codes[~known] = torch.randint(K, codes[~known].shape, generator=rng)
    residual = embeddings - sum(C[codes[:, l]] for l, C in enumerate(codebooks))  # (N+1, d)
    worst_last = residual.square().sum(1).argsort(stable=True)  # (N+1,)
    prefix = (codes * torch.tensor([K * K, K, 1])).sum(1)  # (N+1,)
    prefix[0] = -1  # padding shares its place with nobody
    moved = (number_in_group(prefix, worst_last) >= K).nonzero()[:, 0].tolist()
    size = Counter(prefix.tolist()) if moved else {}
    for item in moved:
        for code in nearest_first(embeddings[item], codebooks):
            place = (code[0] * K + code[1]) * K + code[2]
            if size[place] < K:
                size[place] += 1
                codes[item], prefix[item] = torch.tensor(code), place
                break

    most_bought = (-train_counts.long()).argsort(stable=True)  # (N+1,)
    codes = torch.cat([codes, number_in_group(prefix, most_bought).unsqueeze(1)], 1)  # (N+1, 4)
    codes[0] = -1
    use = [torch.bincount(codes[known, l], minlength=K).float() for l in range(4)]
    entropy = [torch.special.entr(n / n.sum().clamp(min=1)).sum().item() for n in use]
    shared = [codes[known, :l].unique(dim=0, return_counts=True)[1] for l in (1, 2, 3)]
    stats = {"used": [(n > 0).float().mean().item() for n in use],
             "perplexity": [math.exp(h) for h in entropy], "moved": len(moved),
             "unique": [(n == 1).sum().item() / max(1, n.sum().item()) for n in shared],
             "largest": [max(n.tolist(), default=0) for n in shared]}
    print(f"codes: {min(stats['used'][:3]):.0%} or more of {K} in use, {stats['unique'][2]:.0%} of "
          f"the items alone after level 3, at most {stats['largest'][2]} together")
    return codes.to(torch.int16), stats

# ---------------------------------------------------------------------------------------------------

def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[1],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--run", default="runs/toy", help="folder of this experiment's .pt files")
    add("--seed", type=int, default=0, help="of every random choice")
    add("--device", default="auto", help="accepted like in the other scripts; this one computes on the CPU")
    add("--smoke", action="store_true", help="tiny sizes: nothing to make smaller here")
    add("--embeddings", type=pathlib.Path, help="file of ready vectors, .npy or .pt, (N, any width)")
    add("--embed-url", help="address of an OpenAI-compatible embeddings endpoint; its key is read from OPENAI_API_KEY")
    add("--embed-model", default="nomic-embed-text", help="model that the endpoint is asked for")
    add("--embed-batch", type=int, default=64, help="texts in one request")
    args = parser.parse_args(argv)

    run, rng = pathlib.Path(args.run), torch.Generator().manual_seed(args.seed)
    torch.manual_seed(args.seed)
    data = load(run / "data.pt", "01_data.py")
    N = len(data["item_ids"]) - 1
    texts = [". ".join(filter(None, [title, ", ".join(categories), text]))
             for title, categories, text in zip(data["titles"], data["categories"], data["texts"])]
    known = torch.tensor([bool(re.search(r"\w", text)) for text in texts])  # (N+1,)
    items = known.nonzero()[:, 0]  # items that have a text; (n,)
    print(f"{len(items)} of {N} items have a text, for example: {texts[items[0]][:150]!r}" if len(items) else
          "no item has a text: every code is a random place in the tree, and the modality counts as missing.")

    if args.embeddings:
        x = from_file(args.embeddings, N)  # (N, width)
        known = F.pad(x.abs().sum(1) > 0, (1, 0))  # a row of zeros: nothing is known of this item; (N+1,)
        items = known.nonzero()[:, 0]  # (n,)
        x = x[items - 1]  # (n, width)
    elif not len(items):
        x = torch.zeros(0, 1)  # (n, 1)
    elif args.embed_url:
        x = from_endpoint(args.embed_url, args.embed_model, [texts[i] for i in items], args.embed_batch)  # (n, width)
    else:
        x = built_in([texts[i] for i in items])  # (n, d)
    bad = (~x.isfinite()).any(1).nonzero()[:, 0]  # (bad,)
    if len(bad):
        fail(f"the embedding of item {data['item_ids'][items[bad[0]]]} is not finite, and {len(bad) - 1} others: mend them.")
    if len(x) and (args.embeddings or args.embed_url):
        x = whiten(x)  # (n, d)

    embeddings = torch.zeros(N + 1, x.shape[1])  # (N+1, d)
    embeddings[items] = (x - x.mean(0)) / x.std().clamp(min=1e-6)
    K = codebook_size(N)
    codebooks = residual_kmeans(embeddings[items], K, rng) if len(items) else torch.zeros(3, K, 1)  # (3, K, d)
    codes, stats = finish_codes(embeddings, known, codebooks, data["train_counts"], rng)
    save({"codes": codes, "codebooks": codebooks, "embeddings": embeddings, "known": known, "stats": stats,
          "options": {**vars(args), "embeddings": str(args.embeddings)}}, run / "text_codes.pt")
    if len(items):  # what the first code means: items that share it
        same = items[codes[items, 0] == codes[items[0], 0]][:6]
        print(f"first code {codes[items[0], 0]}:\n  " + "\n  ".join(data["titles"][i] for i in same))

if __name__ == "__main__":
    main()
