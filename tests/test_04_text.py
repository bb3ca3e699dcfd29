"""04_text_codes.py: tf-idf by hand, three doors to one result, and codes that are the argmin chain
and a bijection."""
import ast
import hashlib
import http.server
import io
import json
import math
import os
import subprocess
import sys
import threading
import time
import types

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from conftest import SCRIPTS, command, script

text = script(4)

COLOURS = "red blue green amber".split()
THINGS = "mug lamp chair bowl vase tray".split()
TITLES = [f"{colour} {thing}" for colour in COLOURS for thing in THINGS]  # 24 of them


# --- A run folder, and what holds of every result ------------------------------------------------


def write_run(run, titles=TITLES, counts=None):
    """A run folder as 01_data.py leaves it: 24 short texts, or those given."""
    N = len(titles)
    texts = []
    for title in titles:
        has_words = title[:1].isalpha()
        texts.append(f"{title} by hand" if has_words else "")
    if counts is None:
        counts = torch.arange(N + 1, dtype=torch.int32)
    data = {
        "made_from": {},
        "titles": ["", *titles],
        "texts": ["", *texts],
        "categories": [[], *[title.split()[-1:] for title in titles]],
        "item_ids": ["", *[f"id{item}" for item in range(1, N + 1)]],
        "train_counts": counts,
    }
    run.mkdir(exist_ok=True)
    torch.save(data, run / "data.pt")
    return run


def load(run):
    return torch.load(run / "text_codes.pt", weights_only=True)


def codes_of(run, *options):
    text.main(["--run", str(run), *map(str, options)])
    return load(run)


def refused(capsys, run, *options):
    """The script ends with code 2 and one sentence, and writes nothing. -> the sentence"""
    with pytest.raises(SystemExit) as end:
        text.main(["--run", str(run), *map(str, options)])
    said = capsys.readouterr().err.strip()
    assert end.value.code == 2
    assert said and "\n" not in said
    assert not list(run.glob("text_codes*"))
    return said


def check(saved, N):
    """Types, shapes, a bijection, and the argmin chain of all items that were not moved."""
    codes = saved["codes"]
    codebooks = saved["codebooks"]
    embeddings = saved["embeddings"]
    known = saved["known"]
    K, d = codebooks.shape[1:]

    assert codes.dtype == torch.int16 and codes.shape == (N + 1, 4)
    assert codebooks.shape == (3, K, d) and d > 0
    assert embeddings.shape == (N + 1, d)
    assert known.dtype == torch.bool and known.shape == (N + 1,)
    assert embeddings.isfinite().all() and codebooks.isfinite().all()
    assert not known[0] and not embeddings[~known].any()

    assert (codes[0] == -1).all()
    assert codes[1:].min() >= 0 and codes.max() < K
    assert len(codes[1:].unique(dim=0)) == N

    agree = known.clone()                                                     # (N+1,)
    residual = embeddings                                                     # (N+1, d)
    for level in range(3):
        chosen = codes[:, level].long()                                       # (N+1,)
        distance = torch.cdist(residual.double(), codebooks[level].double())  # (N+1, K)
        of_chosen = distance.gather(1, chosen.clamp(min=0).unsqueeze(1))[:, 0]
        agree &= of_chosen <= distance.min(1).values + 1e-5
        residual = residual - codebooks[level, chosen]
    assert agree.sum() >= known.sum() - saved["moved"]


# --- The built-in encoder ------------------------------------------------------------------------


def test_tf_idf_of_four_documents_is_what_the_formula_says():
    """cat has six features: <ca cat at> <cat cat> <cat>. What one text alone has is left out."""
    x, idf = text.tf_idf(["cat cat", "Cat, dog!", "dog", "owl"])
    expected = torch.zeros(4, 12)  # pairs of words and all of `owl` are in one text only
    expected[0, :6] = 6 ** -0.5
    expected[1] = 12 ** -0.5
    expected[2, 6:] = 6 ** -0.5
    x = x.to_dense()                                            # (4, 12)
    cat_first = (-x[0]).argsort(stable=True)                    # (12,)
    torch.testing.assert_close(x[:, cat_first], expected)

    in_two_of_four = 1 + math.log(5 / 3)
    assert sorted(idf[idf > 0].tolist()) == pytest.approx([in_two_of_four] * 12)


def test_other_texts_get_the_same_columns_and_a_logarithm_of_tf():
    _, idf = text.tf_idf(["cat cat", "Cat, dog!", "dog", "owl"])
    x, _ = text.tf_idf(["dog dog cat", "emu"], idf)
    x = x.to_dense()
    assert x.shape == (2, 12) and not x[1].any()
    twice = 1 + math.log(2)
    ratio = (x[0] / x[0].min()).sort().values.tolist()
    assert ratio == pytest.approx([1] * 6 + [twice] * 6)


def test_pairs_of_neighbouring_words_are_features():
    """Both words, of six features each, are in all texts; of the two pairs, each is in two."""
    x, _ = text.tf_idf(["cat dog", "dog cat", "dog cat", "cat dog"])
    x = x.to_dense()                                            # (4, 14)
    assert x.shape == (4, 12 + 2)
    assert torch.equal(x[0] > 0, x[3] > 0) and torch.equal(x[1] > 0, x[2] > 0)
    assert ((x[0] > 0) != (x[1] > 0)).sum() == 2


def test_where_no_feature_is_shared_all_stay():
    alone, _ = text.tf_idf(["cat"])
    assert alone.shape == (1, 6)


def test_a_sample_stands_for_all_texts(monkeypatch):
    """What some texts taught places the others: the same thing in other colours is the nearest."""
    monkeypatch.setattr(text, "SAMPLE", 60)
    materials = "clay steel oak tin glass pine".split()
    texts = []
    for i in range(10):
        for thing, material in zip(THINGS, materials):
            texts.append(f"{COLOURS[i % 4]} {thing} made of {material}")
    x = text.built_in(texts * 2, torch.Generator().manual_seed(0))
    assert x.shape == (120, 60) and torch.equal(x[:60], x[60:])
    near = (x[:60] @ x[:60].T).fill_diagonal_(-1).argmax(1)     # (60,)
    assert ((near - torch.arange(60)) % 6 == 0).all()


def test_texts_of_the_same_words_are_near():
    texts = ["striped mug of glass", "a mug of glass, stripes", "oak chair",
             "striped mug of glass", "an oak chair", "linen cushion", "wool hat", "steel lamp"]
    x = text.built_in(texts, torch.Generator().manual_seed(0))
    near = x @ x.T                                              # (8, 8)
    assert near[0, 3] == pytest.approx(1, abs=1e-4)
    assert near[0, 1] > 0.5 and near[2, 4] > 0.5 and near[0, 2] < 0.2
    # The cushion and the hat share nothing with any other text: they have no direction.
    expected = torch.tensor([1.0, 1, 1, 1, 1, 0, 0, 1])
    torch.testing.assert_close(x.norm(dim=1), expected, atol=1e-4, rtol=0)


def test_what_the_kept_directions_lack_of_a_text_does_not_shorten_it(monkeypatch):
    monkeypatch.setattr(text, "WIDTH", 3)
    x = text.built_in(TITLES, torch.Generator().manual_seed(0))
    assert x.shape == (24, 3)
    torch.testing.assert_close(x.norm(dim=1), torch.ones(24))


def test_the_randomised_svd_finds_what_the_exact_one_finds():
    """Six directions stand out of fifty, one far above all: d vectors turn to what all six span."""
    rng = torch.Generator().manual_seed(0)
    dense = torch.randn(80, 50, generator=rng)                  # (80, 50)
    dense[:, :6] *= torch.tensor([1000, 30, 7, 6, 5, 4])        # (80, 6)
    found = text.principal_directions(dense.to_sparse(), 6, rng)    # (50, 6)
    torch.testing.assert_close(found.T @ found, torch.eye(6), atol=1e-5, rtol=0)

    _, _, right = torch.linalg.svd(dense)                       # (50, 50)
    cosines = torch.linalg.svdvals(right[:6] @ found)           # (6,), of angles between the spans
    assert cosines.min() > 0.9999


def test_built_in_codes_are_complete_and_standardised(tmp_path):
    saved = codes_of(write_run(tmp_path / "run"))
    check(saved, 24)
    assert saved["known"].sum() == 24
    assert saved["codebooks"].shape[1] == 8
    assert saved["options"]["seed"] == 0 and saved["moved"] >= 0
    embeddings = saved["embeddings"][1:]                        # (24, d)
    zero = torch.zeros(embeddings.shape[1])
    torch.testing.assert_close(embeddings.mean(0), zero, atol=1e-5, rtol=0)
    assert embeddings.square().mean().item() == pytest.approx(1, rel=1e-4)


def test_a_seed_gives_the_same_file_in_every_process(tmp_path):
    """Python orders sets of strings anew in every process: sums must not follow that order."""
    run = write_run(tmp_path / "run")
    here = codes_of(run)
    threads = str(torch.get_num_threads())
    environment = {**os.environ, "PYTHONHASHSEED": "7", "OMP_NUM_THREADS": threads}
    subprocess.run(command(4, "--run", run), env=environment, check=True, capture_output=True)
    there = load(run)
    assert torch.equal(here["codes"], there["codes"])
    assert torch.equal(here["embeddings"], there["embeddings"])


def test_another_seed_starts_the_encoder_and_k_means_elsewhere(tmp_path):
    run = write_run(tmp_path / "run")
    vectors = [codes_of(run, "--seed", seed)["embeddings"] for seed in (0, 1)]
    assert not torch.equal(vectors[0], vectors[1])

    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(24, 9)))
    door = ("--embeddings", tmp_path / "x.npy")
    saved = [codes_of(run, *door, "--seed", seed) for seed in (0, 1)]
    assert torch.equal(saved[0]["embeddings"], saved[1]["embeddings"])
    assert not torch.equal(saved[0]["codebooks"], saved[1]["codebooks"])


# --- An endpoint ---------------------------------------------------------------------------------


def vectors(texts, width=20):
    """What a language model might answer: seeded by the text, in a narrow cone. -> (n, width)"""
    rows = []
    for each in texts:
        rng = np.random.default_rng(list(each.encode()))
        rows.append(rng.normal(0, 1, width) + 10)
    return np.array(rows, dtype=np.float32).reshape(len(texts), width)


@pytest.fixture
def endpoint(monkeypatch):
    """An embeddings endpoint on this machine.

    `change(number, status, data)` may spoil an answer; `headers` are sent with it, and of the
    requests that `cut_off` numbers, only half of the answer is.
    """
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            question = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            server.asked.append({**question, "key": self.headers["Authorization"]})
            number = len(server.asked)
            data = []
            for index, vector in enumerate(vectors(question["input"])):
                data.append({"object": "embedding", "index": index, "embedding": vector.tolist()})
            data.reverse()  # out of order
            status, data = server.change(number, 200, data)
            answer = {"object": "list", "model": question["model"], "data": data}
            body = json.dumps(answer).encode()

            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            for name, value in server.headers.items():
                self.send_header(name, value)
            self.end_headers()
            if number in server.cut_off:
                body = body[:len(body) // 2]
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked = []
    server.slept = []
    server.headers = {}
    server.cut_off = ()
    server.change = lambda number, status, data: (status, data)
    server.url = f"http://127.0.0.1:{server.server_port}/v1/embeddings"
    monkeypatch.setattr(time, "sleep", server.slept.append)  # urllib3 sleeps through this name
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_three_doors_lead_to_one_result(tmp_path, endpoint, monkeypatch):
    titles = list(TITLES)
    titles[4] = ""  # nothing is known of item 5
    run = write_run(tmp_path / "run", titles)
    monkeypatch.setenv("OPENAI_API_KEY", "sesame")
    endpoint.change = lambda number, status, data: (503 if number == 2 else 200, data)
    asked = codes_of(run, "--embed-url", endpoint.url, "--embed-model", "tiny", "--embed-batch", 10)
    check(asked, 24)
    assert [len(each["input"]) for each in endpoint.asked] == [10, 10, 10, 3]
    assert endpoint.slept == []  # the first time at once
    assert {each["model"] for each in endpoint.asked} == {"tiny"}
    assert {each["key"] for each in endpoint.asked} == {"Bearer sesame"}
    assert endpoint.asked[0]["input"][0] == "red mug. mug. red mug by hand"
    assert asked["known"].tolist() == [False] + [i != 4 for i in range(24)]

    answered = [endpoint.asked[i]["input"] for i in (0, 1, 3)]
    x = np.concatenate([vectors(texts) for texts in answered])  # (23, 20)
    x = np.insert(x, 4, 0, axis=0)                              # (24, 20): zeros, nothing is known
    np.save(tmp_path / "x.npy", x)
    torch.save(torch.nn.Parameter(torch.tensor(x)), tmp_path / "x.pt")
    for name in ("x.npy", "x.pt"):
        saved = codes_of(run, "--embeddings", tmp_path / name)
        for key in ("codes", "codebooks", "embeddings", "known"):
            assert torch.equal(saved[key], asked[key]), (name, key)
    assert saved["options"]["embeddings"].endswith("x.pt")


def spoil(**keys):
    """A change of an answer: each row says this instead."""
    return lambda number, status, data: (status, [{**row, **keys} for row in data])


def lose_a_row(number, status, data):
    return status, data[1:]


def add_a_row(number, status, data):
    return status, data + [{**data[0], "index": 24}]


def lose_all_rows(number, status, data):
    return status, None


def mix_widths(number, status, data):
    for row in data:
        row["embedding"] = [0.0] * (1 + row["index"] % 2)
    return status, data


NO_VECTORS = "a vector for each text"


@pytest.mark.parametrize("change, says", [
    (lose_a_row, NO_VECTORS),
    (add_a_row, NO_VECTORS),
    (lose_all_rows, NO_VECTORS),
    (mix_widths, NO_VECTORS),
    (spoil(index=0), NO_VECTORS),
    (spoil(embedding=[10 ** 400]), NO_VECTORS),
    (spoil(embedding=[]), NO_VECTORS),
    (spoil(embedding=[[1.0, 2.0]]), NO_VECTORS),
    (spoil(embedding="AAAA"), NO_VECTORS),
    (spoil(embedding=[1.0, float("nan")]), "NaN"),
])
def test_an_endpoint_of_nonsense_is_not_asked_again(tmp_path, endpoint, capsys, change, says):
    endpoint.change = change
    said = refused(capsys, write_run(tmp_path / "run"), "--embed-url", endpoint.url)
    assert says in said
    assert len(endpoint.asked) == 1


def test_widths_that_change_between_requests_are_refused(tmp_path, endpoint, capsys):
    def change(number, status, data):
        return status, [{**row, "embedding": [1.0] * number} for row in data]

    endpoint.change = change
    run = write_run(tmp_path / "run")
    said = refused(capsys, run, "--embed-url", endpoint.url, "--embed-batch", 8)
    assert NO_VECTORS in said
    assert len(endpoint.asked) == 2


@pytest.mark.parametrize("status, requests", [(500, 5), (429, 5), (401, 1), (404, 1)])
def test_a_failing_endpoint_is_given_up_by_its_status(tmp_path, endpoint, capsys, status, requests):
    endpoint.change = lambda number, _, data: (status, data)
    said = refused(capsys, write_run(tmp_path / "run"), "--embed-url", endpoint.url)
    assert str(status) in said and "check" in said
    assert len(endpoint.asked) == requests
    assert endpoint.slept == [2, 4, 8][:requests - 1]


@pytest.mark.parametrize("header, slept", [("7", [7]), ("3600", [60]), ("1.5", [])])
def test_retry_after_is_respected_up_to_a_minute(tmp_path, endpoint, header, slept):
    endpoint.headers = {"Retry-After": header}
    endpoint.change = lambda number, _, data: (429 if number == 1 else 200, data)
    check(codes_of(write_run(tmp_path / "run"), "--embed-url", endpoint.url), 24)
    assert len(endpoint.asked) == 2
    assert endpoint.slept == slept


def test_an_answer_that_is_cut_off_is_asked_for_again(tmp_path, endpoint):
    run = write_run(tmp_path / "run")
    whole = codes_of(run, "--embed-url", endpoint.url)
    endpoint.asked.clear()
    endpoint.cut_off = (1, 2)
    again = codes_of(run, "--embed-url", endpoint.url)
    assert len(endpoint.asked) == 3
    assert torch.equal(again["codes"], whole["codes"])


def test_an_endpoint_that_cuts_all_answers_off_is_given_up(tmp_path, endpoint, capsys):
    endpoint.cut_off = range(100)
    said = refused(capsys, write_run(tmp_path / "run"), "--embed-url", endpoint.url)
    assert "ChunkedEncodingError" in said
    assert len(endpoint.asked) == 5


def test_all_retries_together_are_bounded(tmp_path, endpoint, capsys, monkeypatch):
    """Each text needs a second request: never five failures in a row, and yet the script ends."""
    monkeypatch.setattr(text, "RETRIES", 3)
    endpoint.change = lambda number, status, data: (500 if number % 2 else 200, data)
    refused(capsys, write_run(tmp_path / "run"), "--embed-url", endpoint.url, "--embed-batch", 1)
    assert len(endpoint.asked) == 7


@pytest.mark.parametrize("url, says", [
    ("localhost/v1/embeddings", "MissingSchema"),
    ("http://127.0.0.1:9/v1", "ConnectionError"),
])
def test_no_endpoint_there_is_one_sentence(tmp_path, capsys, monkeypatch, url, says):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    assert says in refused(capsys, write_run(tmp_path / "run"), "--embed-url", url)


# --- A file of vectors ---------------------------------------------------------------------------


def test_files_of_vectors_that_do_not_fit_are_refused(tmp_path, capsys):
    run = write_run(tmp_path / "run")

    def said_of(name, array):
        np.save(tmp_path / name, array)
        return refused(capsys, run, "--embeddings", tmp_path / name)

    x = np.ones((24, 3), dtype=np.float32)
    for wrong in (np.nan, np.inf, -np.inf):
        x[3, 1] = wrong
        assert "id4 holds NaN" in said_of("wrong.npy", x)
    assert "24 rows" in said_of("short.npy", x[:5])
    assert "24 rows" in said_of("flat.npy", x[:, 0])
    assert "TypeError" in said_of("words.npy", np.array([["a"]]))

    torch.save({"x": torch.ones(24, 3)}, tmp_path / "dict.pt")
    assert "24 rows" in refused(capsys, run, "--embeddings", tmp_path / "dict.pt")
    (tmp_path / "broken.npy").write_bytes(b"no array")
    assert "cannot be read" in refused(capsys, run, "--embeddings", tmp_path / "broken.npy")
    assert "FileNotFoundError" in refused(capsys, run, "--embeddings", tmp_path / "nowhere.npy")


class Intruder:
    """Whoever unpickles it calls open(path, "w")."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_a_file_of_vectors_runs_no_code(tmp_path, capsys):
    run = write_run(tmp_path / "run")
    trace = tmp_path / "trace"
    np.save(tmp_path / "x.npy", np.array([[Intruder(trace)]] * 24), allow_pickle=True)
    torch.save([Intruder(trace)], tmp_path / "x.pt")
    for name in ("x.npy", "x.pt"):
        assert "cannot be read" in refused(capsys, run, "--embeddings", tmp_path / name)
        assert not trace.exists()


def test_scale_does_not_matter(tmp_path):
    """Squares of 1e30 overflow, those of 1e-30 vanish: all give the codes of the vectors."""
    run = write_run(tmp_path / "run")
    x = np.random.default_rng(0).normal(size=(24, 9))
    codes = []
    for scale in (1, 2.0 ** 100, 2.0 ** -100):
        np.save(tmp_path / "x.npy", x * scale)
        saved = codes_of(run, "--embeddings", tmp_path / "x.npy")
        check(saved, 24)
        codes.append(saved["codes"])
    assert torch.equal(codes[0], codes[1])
    assert torch.equal(codes[0], codes[2])


def test_sparse_tensors_are_read_complex_and_lying_ones_refused(tmp_path, capsys):
    run = write_run(tmp_path / "run")
    torch.save(torch.eye(24).to_sparse(), tmp_path / "sparse.pt")
    check(codes_of(run, "--embeddings", tmp_path / "sparse.pt"), 24)
    (run / "text_codes.pt").unlink()

    np.save(tmp_path / "complex.npy", np.ones((24, 2)) * 1j)
    said = refused(capsys, run, "--embeddings", tmp_path / "complex.npy")
    assert "24 rows of numbers" in said

    honest = (tmp_path / "complex.npy").read_bytes()
    lies = honest.replace(b"(24, 2)", b"(9999999, 9999999)")
    (tmp_path / "lies.npy").write_bytes(lies)
    assert "cannot be read" in refused(capsys, run, "--embeddings", tmp_path / "lies.npy")


# --- Whitening -----------------------------------------------------------------------------------


def draw(n, width):
    """Vectors whose directions differ in variance. -> float32 (n, width)"""
    rng = torch.Generator().manual_seed(0)
    return torch.randn(n, width, generator=rng) * torch.logspace(0, -2, width)


def test_whitening_gives_unit_variance_to_every_direction():
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(300, 160, generator=rng) * torch.logspace(-6, 1, 160) + 100
    white = text.whiten(x)
    assert 50 < white.shape[1] <= text.WHITENED
    covariance = white.T @ white / 299
    identity = torch.eye(len(covariance))
    torch.testing.assert_close(covariance, identity, atol=1e-2, rtol=0)


@pytest.mark.parametrize("x", [
    pytest.param(draw(300, 40), id="more rows than columns"),
    pytest.param(draw(40, 40), id="as many rows as columns"),
    pytest.param(draw(30, 200), id="fewer rows than columns"),
    pytest.param(draw(9000, 20), id="several blocks"),
    pytest.param(draw(500, 300), id="more directions than are kept"),
    pytest.param(draw(300, 40) + 1000, id="a narrow cone"),
    pytest.param(draw(300, 40) * 1e37, id="huge"),
    pytest.param(draw(300, 40) * 1e-37, id="tiny"),
    pytest.param(draw(300, 40).clamp(-0.01, 0.01), id="columns of few values"),
    pytest.param(torch.cat([draw(300, 9), torch.full((300, 4), 7.0)], 1), id="constant columns"),
    pytest.param(draw(300, 40) ** 3, id="directions of almost no variance"),
    pytest.param(draw(300, 3) @ draw(3, 40), id="three directions"),
    pytest.param(draw(30, 3) @ draw(3, 400), id="three directions, few rows"),
])
def test_whitening_is_that_of_the_singular_value_decomposition(x):
    """Up to the signs of the columns, which no one fixes."""
    white = text.whiten(x)                                      # (n, d)
    d = white.shape[1]

    n = len(x)
    centred = x.double() - x.double().mean(0)                   # (n, width)
    left, singular, _ = torch.linalg.svd(centred, full_matrices=False)
    kept = singular[:128] > max(1e-4 * singular[0], 1e-6 * x.double().norm())
    assert d == kept.sum()

    expected = left[:, :d].float() * (n - 1) ** 0.5             # (n, d)
    sign = (white * expected).sum(0).sign()                     # (d,)
    torch.testing.assert_close(white * sign, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("x", [
    pytest.param(torch.ones(1, 1), id="one number"),
    pytest.param(draw(1, 9), id="one item"),
    pytest.param(draw(1, 9).repeat(24, 1), id="equal items"),
    pytest.param(draw(1, 90).repeat(24, 1), id="equal items, fewer than columns"),
    pytest.param(draw(1, 9).repeat(5000, 1) * 1e37, id="equal huge items"),
    pytest.param(torch.zeros(4, 3), id="zeros"),
])
def test_whitening_of_vectors_without_variance_is_a_column_of_zeros(x):
    assert torch.equal(text.whiten(x), torch.zeros(len(x), 1))


class LargestTensor(TorchDispatchMode):
    """Within it: `bytes`, the size of the largest tensor that is made; views of x are none."""

    def __init__(self, x):
        super().__init__()
        self.x = x
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        tensors = [leaf for leaf in tree_leaves(made) if torch.is_tensor(leaf)]
        for tensor in tensors:
            memory = tensor.untyped_storage()
            if memory.data_ptr() != self.x.untyped_storage().data_ptr():
                self.bytes = max(self.bytes, memory.nbytes())
        return made


def test_whitening_makes_no_copy_of_its_input():
    x = draw(20_000, 256)
    with LargestTensor(x) as largest:
        text.whiten(x)
    assert 0 < largest.bytes <= x.nbytes / 2  # half of it is the result: 128 of 256 columns


def test_whitening_of_few_long_vectors_makes_no_matrix_of_width_by_width():
    x = draw(24, 5000)
    with LargestTensor(x) as largest:
        text.whiten(x)
    assert 0 < largest.bytes <= 4 * x.nbytes  # in double precision: 200 MB if it did


# --- The command line, and little data -----------------------------------------------------------


@pytest.mark.parametrize("options, says", [
    (["--embed-batch", 0], "--embed-batch starts at 1"),
    (["--seed", -1], "--seed is"),
    (["--seed", 2 ** 32], "--seed is"),
    (["--embeddings", "x.npy", "--embed-url", "http://x"], "not both"),
])
def test_bad_options_are_one_sentence(tmp_path, capsys, options, says):
    assert says in refused(capsys, write_run(tmp_path / "run"), *options)


def test_no_data_is_one_sentence(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    assert "01_data.py" in refused(capsys, tmp_path / "run")


def test_without_any_text_all_items_get_random_places(tmp_path, capsys):
    run = write_run(tmp_path / "run", ["", "!?", ""])
    np.save(tmp_path / "zeros.npy", np.zeros((3, 7), dtype=np.float32))
    doors = ([], ["--embed-url", "http://127.0.0.1:9"], ["--embeddings", tmp_path / "zeros.npy"])
    for options in doors:
        saved = codes_of(run, *options)
        check(saved, 3)
        assert not saved["known"].any()
        assert saved["embeddings"].shape == (4, 1)
        assert saved["codebooks"].shape == (3, 8, 1)
        assert "0 of 3 items are known" in capsys.readouterr().out


@pytest.mark.parametrize("titles", [
    ["one mug"],
    ["one mug", "", ""],
    ["mug", "lamp"],
    ["x", "x", ""],
])
def test_very_few_texts_get_codes(tmp_path, titles):
    run = write_run(tmp_path / "run", titles)
    N = len(titles)
    check(codes_of(run), N)

    has_text = np.array([[bool(title)] for title in titles])    # (N, 1)
    np.save(tmp_path / "x.npy", vectors(titles) * has_text)
    saved = codes_of(run, "--embeddings", tmp_path / "x.npy")
    check(saved, N)
    assert saved["known"].tolist() == [False] + [bool(title) for title in titles]


# --- Codes ---------------------------------------------------------------------------------------


def test_ten_starts_find_what_one_start_misses():
    """Nine heaps on a grid, nine centroids: where two of them start in one heap, they mostly stay there."""
    found = {"one": 0, "ten": 0}
    for seed in range(8):
        rng = torch.Generator().manual_seed(seed)
        heaps = 10 * torch.cartesian_prod(*[torch.arange(3.0)] * 2).repeat(40, 1)  # (360, 2)
        x = heaps + torch.randn(360, 2, generator=rng)                             # (360, 2)
        start = torch.randperm(360, generator=rng)[:9]                             # (9,)
        ends = {"one": text.lloyd(x, x[start], 15), "ten": text.kmeans(x, 9, rng)}
        for name, codebook in ends.items():
            found[name] += text.squared_error(x, codebook).mean() < 3  # variance 1 in each of two directions
    assert found["one"] <= 2 and found["ten"] >= 6


def test_each_level_cuts_what_the_one_before_has_left():
    """Sums of one of +-100, one of +-10 and one of +-1: three codebooks of two find all three."""
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 3)                 # (8, 3)
    x = (signs * torch.tensor([100, 10, 1])).sum(1, keepdim=True).repeat(9, 1)     # (72, 1)
    codebooks = text.residual_kmeans(x, 2, torch.Generator().manual_seed(0))       # (3, 2, 1)
    found = codebooks.abs()[:, :, 0]                                               # (3, 2)
    torch.testing.assert_close(found, torch.tensor([[100.0, 100], [10, 10], [1, 1]]))
    codes, residual = text.quantise(x, codebooks)
    assert len(codes.unique(dim=0)) == 8
    torch.testing.assert_close(residual, torch.zeros(72, 1))


def test_items_without_a_vector_make_room_first():
    """K = 2: all 16 places are taken, and only items that lack a vector are moved, wherever chance put them."""
    codebooks = torch.tensor([[0.0, 8], [0, 4], [0, 2]]).unsqueeze(2)       # (3, 2, 1)
    embeddings = torch.zeros(17, 1)                                         # (N+1, 1): N = 16
    embeddings[1:5] = torch.tensor([[1.0], [1], [15], [15]])
    known = torch.tensor([False] + [True] * 4 + [False] * 12)               # (N+1,)
    for seed in range(10):
        codes, moved = text.finish_codes(embeddings, known, codebooks, torch.zeros(17, dtype=torch.int32),
                                         torch.Generator().manual_seed(seed))
        assert codes[1:5, :3].tolist() == [[0, 0, 0], [0, 0, 0], [1, 1, 1], [1, 1, 1]] and moved > 0
        assert len(codes[1:].unique(dim=0)) == 16


def test_those_that_are_served_worst_move_to_the_nearest_room():
    """K = 2: prefix (1, 1, 1) serves 8 + 4 + 2 = 14, and of five items near 14 two may stay."""
    codebooks = torch.tensor([[0.0, 8], [9, 4], [0, 2]]).unsqueeze(2)       # (3, 2, 1)
    embeddings = torch.tensor([0, 14.2, 14.3, 14, 14.1, 14.4]).unsqueeze(1)  # (N+1, 1): N = 5
    known = torch.arange(6) > 0                                             # (N+1,)
    counts = torch.tensor([0, 1, 2, 3, 4, 5])                               # (N+1,)
    rng = torch.Generator().manual_seed(0)
    codes, moved = text.finish_codes(embeddings, known, codebooks, counts, rng)
    assert moved == 3
    assert codes.tolist() == [
        [-1, -1, -1, -1],
        [1, 1, 0, 1],  # moves one leaf on; it is bought less than item 2
        [1, 1, 0, 0],  # moves there too, and (1, 1) is full
        [1, 1, 1, 1],  # nothing is left of it: it stays
        [1, 1, 1, 0],  # 0.1 is left: it stays, and is bought more
        [1, 0, 0, 0],  # moves one branch on, to 8 + 9: of the -2.6 left, 0 is nearer than 2
    ]


def test_items_without_text_are_spread_over_the_tree(tmp_path):
    saved = codes_of(write_run(tmp_path / "run", [""] * 100))
    for level in range(3):
        _, items = saved["codes"][1:, level].unique(return_counts=True)
        assert len(items) == 8 and items.max() < 30


def test_equal_texts_overflow_into_free_places(tmp_path):
    """24 equal items at K = 8: eight fit behind one prefix, sixteen move to the nearest room."""
    run = write_run(tmp_path / "run", ["a mug"] * 24)
    saved = codes_of(run)
    check(saved, 24)
    assert saved["moved"] == 16
    _, sharing = saved["codes"][1:, :3].unique(dim=0, return_counts=True)
    assert sharing.tolist() == [8, 8, 8]
    np.save(tmp_path / "x.npy", np.ones((24, 3)))
    check(codes_of(run, "--embeddings", tmp_path / "x.npy"), 24)


def test_a_full_tree_is_still_a_bijection(tmp_path, monkeypatch):
    """K = 2 has 16 codes; all 16 items get one, whatever their vectors."""
    monkeypatch.setattr(text, "codebook_size", lambda N: 2)
    lamps = [f"{colour} lamp" for colour in COLOURS]
    saved = codes_of(write_run(tmp_path / "run", ["a mug"] * 10 + lamps + ["", ""]))
    check(saved, 16)
    assert saved["moved"] > 0


def test_level_four_counts_by_popularity(tmp_path):
    counts = torch.tensor([0, 3, 9, 1, 9, 4, 0, 2, 2], dtype=torch.int32)
    saved = codes_of(write_run(tmp_path / "run", ["a mug"] * 4 + ["an oak chair"] * 4, counts))
    check(saved, 8)
    assert saved["codes"][1:5, 3].tolist() == [2, 0, 3, 1], "equally bought: the lower number first"
    assert saved["codes"][5:, 3].tolist() == [0, 3, 1, 2]
    assert len(saved["codes"][1:5, :3].unique(dim=0)) == 1


# --- The process ---------------------------------------------------------------------------------


def test_there_is_no_assert_which_optimised_python_would_leave_out():
    tree = ast.parse(SCRIPTS[3].read_text(encoding="utf-8"))
    assert not any(isinstance(node, ast.Assert) for node in ast.walk(tree))


def test_a_changed_letter_in_data_is_refused_by_optimised_python_too(tmp_path, monkeypatch, capsys):
    source = SCRIPTS[3].read_text(encoding="utf-8")
    optimised = types.ModuleType("optimised")
    exec(compile(source, "04", "exec", optimize=1), vars(optimised))  # as python -O does
    monkeypatch.setitem(globals(), "text", optimised)

    run = write_run(tmp_path / "run")
    check(codes_of(run), 24)
    (run / "text_codes.pt").unlink()

    good = (run / "data.pt").read_bytes()
    assert good.count(b"green chair by hand") == 1
    damaged = good.replace(b"green chair by hand", b"green chain by hand")
    (run / "data.pt").write_bytes(damaged)
    assert "data.pt is missing or damaged" in refused(capsys, run)


def test_two_runs_in_one_process_know_nothing_of_each_other(tmp_path):
    """As in a notebook: what one run has read and drawn is not in the file of the next."""
    second = write_run(tmp_path / "second", TITLES[::-1])
    alone = codes_of(second)

    first = write_run(tmp_path / "first")
    torch.save({"made_from": {}}, first / "other.pt")
    text.Run(first).load("other.pt", "01_data.py")
    codes_of(first)
    torch.rand(5)
    after = codes_of(second)
    digest = hashlib.sha256((second / "data.pt").read_bytes()).hexdigest()
    assert after["made_from"] == {"data.pt": digest}
    for key in ("codes", "codebooks", "embeddings"):
        assert torch.equal(after[key], alone[key]), key


def test_a_run_leaves_the_random_numbers_of_a_notebook_alone(tmp_path):
    run = write_run(tmp_path / "run")
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    codes_of(run)
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252", "latin-1"])
def test_a_console_without_a_letter_shows_a_question_mark(tmp_path, monkeypatch, encoding):
    run = write_run(tmp_path / "run", ["żółta mug", *TITLES])
    console = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(console, encoding, write_through=True))
    text.start(lambda: text.main(["--run", str(run)]))
    assert b"ta mug" in console.getvalue() and b"?" in console.getvalue()
    check(load(run), 25)
