"""04_text_codes.py: tf-idf by hand, three doors to one result, codes that are the argmin chain and a bijection."""

import http.server
import json
import math
import os
import subprocess
import threading

import numpy as np
import pytest
import torch
from conftest import command, script

text = script(4)

COLOURS, THINGS = "red blue green amber".split(), "mug lamp chair bowl vase tray".split()


def write_run(run, titles=None, counts=None):
    """A run folder as 01_data.py leaves it: 24 short texts, or those given."""
    titles = [f"{c} {t}" for c in COLOURS for t in THINGS] if titles is None else titles
    N = len(titles)
    run.mkdir(exist_ok=True)
    torch.save({"made_from": {}, "titles": [""] + titles,
                "texts": [""] + [f"{t} by hand" if t[:1].isalpha() else "" for t in titles],
                "categories": [[]] + [t.split()[-1:] for t in titles],
                "item_ids": [""] + [f"id{i}" for i in range(1, N + 1)],
                "train_counts": torch.arange(N + 1, dtype=torch.int32) if counts is None else counts},
               run / "data.pt")
    return run


def codes_of(run, *options):
    text.main(["--run", str(run), *map(str, options)])
    return torch.load(run / "text_codes.pt", weights_only=True)


def refused(capsys, run, *options):
    """The script ends with code 2 and one sentence, and has written nothing; returns the sentence."""
    with pytest.raises(SystemExit) as end:
        text.main(["--run", str(run), *map(str, options)])
    said = capsys.readouterr().err.strip()
    assert end.value.code == 2 and said and "\n" not in said
    assert not list(run.glob("text_codes*"))
    return said


def check(saved, N):
    """What holds of every run: types, shapes, a bijection, and the argmin chain of all items that were not moved."""
    codes, codebooks, embeddings, known = (saved[k] for k in ("codes", "codebooks", "embeddings", "known"))
    K, d = codebooks.shape[1:]
    assert codes.dtype == torch.int16 and codes.shape == (N + 1, 4) and codebooks.shape == (3, K, d) and d > 0
    assert embeddings.shape == (N + 1, d) and known.dtype == torch.bool and known.shape == (N + 1,)
    assert (codes[0] == -1).all() and codes[1:].min() >= 0 and codes.max() < K
    assert len(codes[1:].unique(dim=0)) == N
    assert not known[0] and not embeddings[~known].any()
    assert embeddings.isfinite().all() and codebooks.isfinite().all()
    agree, residual = known.clone(), embeddings
    for level in range(3):
        chosen = codes[:, level].long()
        distance = torch.cdist(residual.double(), codebooks[level].double())  # (N+1, K)
        agree &= distance.gather(1, chosen.clamp(min=0).unsqueeze(1))[:, 0] <= distance.min(1).values + 1e-5
        residual = residual - codebooks[level, chosen]
    assert agree.sum() >= known.sum() - saved["moved"]


def vectors(texts, width=20):
    """What a language model might answer: seeded by the text, in a narrow cone."""
    rows = [np.random.default_rng(list(t.encode())).normal(0, 1, width) + 10 for t in texts]
    return np.array(rows, dtype=np.float32).reshape(len(texts), width)


@pytest.fixture
def endpoint(monkeypatch):
    """An embeddings endpoint on this machine. `change(number, status, data)` may spoil an answer."""
    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            ask = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            server.asked.append({**ask, "key": self.headers["Authorization"]})
            data = [{"object": "embedding", "index": i, "embedding": v.tolist()}
                    for i, v in enumerate(vectors(ask["input"]))][::-1]  # out of order
            status, data = server.change(len(server.asked), 200, data)
            body = json.dumps({"object": "list", "model": ask["model"], "data": data}).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    monkeypatch.setattr(text.time, "sleep", lambda seconds: server.slept.append(seconds))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked, server.slept, server.change = [], [], lambda number, status, data: (status, data)
    server.url = f"http://127.0.0.1:{server.server_port}/v1/embeddings"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_tf_idf_of_four_documents():
    """A word of three letters has six features: <ca cat at> <cat cat> <cat>. What one text alone has is left out."""
    x, idf = text.tf_idf(["cat cat", "Cat, dog!", "dog", "owl"])
    twice, third = 1 + math.log(2), 1 + math.log(5 / 3)  # tf 2; idf of what two of four have
    expected = torch.zeros(4, 12)  # the pairs of words and all of `owl` are in one text only
    expected[0, :6], expected[1], expected[2, 6:] = 6 ** -0.5, 12 ** -0.5, 6 ** -0.5
    cat_first = x.to_dense()[:, (-x.to_dense()[0]).argsort(stable=True)]  # (4, 12)
    torch.testing.assert_close(cat_first, expected)
    assert sorted(idf[idf > 0].tolist()) == pytest.approx([third] * 12)
    again = text.tf_idf(["dog dog cat", "emu"], idf)[0].to_dense()  # (2, 12): the same columns, of other texts
    assert again.shape == (2, 12) and not again[1].any()
    assert (again[0] / again[0].min()).sort().values.tolist() == pytest.approx([1] * 6 + [twice] * 6)
    alone, _ = text.tf_idf(["cat"])
    assert alone.shape == (1, 6), "nothing is shared: all stays"


def test_a_sample_stands_for_all_texts(monkeypatch):
    """What a part of the texts has taught places the others: the same thing in other colours is the nearest."""
    monkeypatch.setattr(text, "SAMPLE", 60)
    torch.manual_seed(0)
    texts = [f"{'red blue green amber'.split()[i % 4]} {t} made of {m}" for i in range(10)
             for t, m in zip("mug lamp chair bowl vase tray".split(), "clay steel oak tin glass pine".split())] * 2
    x = text.built_in(texts)
    assert x.shape == (120, 60) and torch.equal(x[:60], x[60:])
    near = (x[:60] @ x[:60].T).fill_diagonal_(-1).argmax(1)
    assert ((near - torch.arange(60)) % 6 == 0).all()


def test_texts_of_the_same_words_are_near():
    torch.manual_seed(0)
    x = text.built_in(["striped mug of glass", "a mug of glass, stripes", "oak chair", "striped mug of glass",
                       "an oak chair", "linen cushion", "wool hat", "steel lamp"])
    near = x @ x.T
    assert near[0, 3] == pytest.approx(1, abs=1e-4)
    assert near[0, 1] > 0.5 and near[2, 4] > 0.5 and near[0, 2] < 0.2
    # The cushion and the hat share nothing with any other text: they have no direction.
    torch.testing.assert_close(x.norm(dim=1), torch.tensor([1.0, 1, 1, 1, 1, 0, 0, 1]), atol=1e-4, rtol=0)


def test_whitening_gives_unit_variance_to_every_direction():
    x = torch.randn(300, 160, generator=torch.Generator().manual_seed(0)) * torch.logspace(-6, 1, 160) + 100
    white = text.whiten(x)
    assert 50 < white.shape[1] <= text.WHITENED
    covariance = white.T @ white / 299
    torch.testing.assert_close(covariance, torch.eye(len(covariance)), atol=1e-2, rtol=0)


def test_built_in_codes(tmp_path):
    saved = codes_of(write_run(tmp_path / "run"))
    check(saved, 24)
    assert saved["known"].sum() == 24 and saved["codebooks"].shape[1] == 8
    assert saved["options"]["seed"] == 0 and saved["moved"] >= 0
    torch.testing.assert_close(saved["embeddings"][1:].mean(0), torch.zeros(saved["embeddings"].shape[1]),
                               atol=1e-5, rtol=0)
    assert saved["embeddings"][1:].square().mean().item() == pytest.approx(1, rel=1e-4)


def test_a_seed_gives_the_same_file_in_every_process(tmp_path):
    """Python orders sets of strings anew in every process: sums must not follow that order."""
    here = codes_of(write_run(tmp_path / "run"))
    environment = {**os.environ, "PYTHONHASHSEED": "7", "OMP_NUM_THREADS": str(torch.get_num_threads())}
    subprocess.run(command(4, "--run", tmp_path / "run"), env=environment, check=True,
                   capture_output=True)
    there = torch.load(tmp_path / "run" / "text_codes.pt", weights_only=True)
    assert torch.equal(here["codes"], there["codes"]) and torch.equal(here["embeddings"], there["embeddings"])


def test_three_doors_lead_to_one_result(tmp_path, endpoint, monkeypatch):
    titles = [f"{c} {t}" for c in COLOURS for t in THINGS]
    titles[4] = ""  # nothing is known of item 5
    run = write_run(tmp_path / "run", titles)
    monkeypatch.setenv("OPENAI_API_KEY", "sesame")
    endpoint.change = lambda number, status, data: (503 if number == 2 else 200, data)
    asked = codes_of(run, "--embed-url", endpoint.url, "--embed-model", "tiny", "--embed-batch", 10)
    check(asked, 24)
    assert [len(a["input"]) for a in endpoint.asked] == [10, 10, 10, 3] and endpoint.slept == [1]
    assert {(a["model"], a["key"]) for a in endpoint.asked} == {("tiny", "Bearer sesame")}
    assert endpoint.asked[0]["input"][0] == "red mug. mug. red mug by hand"
    assert asked["known"].tolist() == [False] + [i != 4 for i in range(24)]

    x = vectors([t for a in (0, 1, 3) for t in endpoint.asked[a]["input"]])
    x = np.insert(x, 4, 0, axis=0)  # (24, 20): a row of zeros where nothing is known
    np.save(tmp_path / "x.npy", x)
    torch.save(torch.nn.Parameter(torch.tensor(x)), tmp_path / "x.pt")
    for name in ("x.npy", "x.pt"):
        saved = codes_of(run, "--embeddings", tmp_path / name)
        for key in ("codes", "codebooks", "embeddings", "known"):
            assert torch.equal(saved[key], asked[key]), (name, key)
    assert saved["options"]["embeddings"].endswith("x.pt")


def spoil(**keys):
    return lambda number, status, data: (status, [{**row, **keys} for row in data])


@pytest.mark.parametrize("change, says", [
    (lambda number, status, data: (status, data[1:]), "a vector for each text"),
    (lambda number, status, data: (status, data + [{**data[0], "index": 24}]), "a vector for each text"),
    (spoil(index=0), "a vector for each text"),
    (spoil(embedding=[10 ** 400]), "a vector for each text"),
    (spoil(embedding=[]), "a vector for each text"),
    (spoil(embedding=[[1.0, 2.0]]), "a vector for each text"),
    (spoil(embedding="AAAA"), "a vector for each text"),
    (lambda number, status, data: (status, [{**row, "embedding": [0.0] * (1 + row["index"] % 2)} for row in data]),
     "a vector for each text"),
    (lambda number, status, data: (status, None), "a vector for each text"),
    (spoil(embedding=[1.0, float("nan")]), "NaN")])
def test_an_endpoint_that_answers_nonsense(tmp_path, endpoint, capsys, change, says):
    endpoint.change = change
    assert says in refused(capsys, write_run(tmp_path / "run"), "--embed-url", endpoint.url)
    assert len(endpoint.asked) == 1, "to ask again would not help"


def test_widths_that_change_between_requests(tmp_path, endpoint, capsys):
    endpoint.change = lambda number, status, data: (status, [{**row, "embedding": [1.0] * number} for row in data])
    said = refused(capsys, write_run(tmp_path / "run"), "--embed-url", endpoint.url, "--embed-batch", 8)
    assert "a vector for each text" in said and len(endpoint.asked) == 2


@pytest.mark.parametrize("status, requests", [(500, 5), (429, 5), (401, 1), (404, 1)])
def test_an_endpoint_that_fails(tmp_path, endpoint, capsys, status, requests):
    endpoint.change = lambda number, _, data: (status, data)
    said = refused(capsys, write_run(tmp_path / "run"), "--embed-url", endpoint.url)
    assert str(status) in said and len(endpoint.asked) == requests


def test_all_retries_together_are_bounded(tmp_path, endpoint, capsys, monkeypatch):
    """Each text needs a second request: never five failures in a row, and yet the script ends."""
    monkeypatch.setattr(text, "RETRIES", 3)
    endpoint.change = lambda number, status, data: (500 if number % 2 else 200, data)
    refused(capsys, write_run(tmp_path / "run"), "--embed-url", endpoint.url, "--embed-batch", 1)
    assert len(endpoint.asked) == 7 and endpoint.slept == [1, 1, 1]


@pytest.mark.parametrize("url, says", [("localhost/v1/embeddings", "MissingSchema"),
                                       ("http://127.0.0.1:9/v1", "ConnectionError")])
def test_no_endpoint_there(tmp_path, capsys, monkeypatch, url, says):
    monkeypatch.setattr(text.time, "sleep", lambda seconds: None)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    assert says in refused(capsys, write_run(tmp_path / "run"), "--embed-url", url)


def test_files_of_vectors_that_do_not_fit(tmp_path, capsys):
    run, x = write_run(tmp_path / "run"), np.ones((24, 3), dtype=np.float32)
    x[3, 1], broken = np.nan, tmp_path / "broken.npy"
    broken.write_bytes(b"no array")
    for name, array, says in (("nan.npy", x, "id4 holds NaN"), ("short.npy", x[:5], "24 rows"),
                              ("flat.npy", x[:, 0], "24 rows"), ("words.npy", np.array([["a"]]), "TypeError")):
        np.save(tmp_path / name, array)
        assert says in refused(capsys, run, "--embeddings", tmp_path / name)
    torch.save({"x": torch.ones(24, 3)}, tmp_path / "dict.pt")
    assert "24 rows" in refused(capsys, run, "--embeddings", tmp_path / "dict.pt")
    assert "cannot be read" in refused(capsys, run, "--embeddings", broken)
    assert "FileNotFoundError" in refused(capsys, run, "--embeddings", tmp_path / "nowhere.npy")


def test_scale_does_not_matter(tmp_path):
    """Squares of 1e30 overflow, those of 1e-30 vanish: both must give the codes of the vectors themselves."""
    run, x = write_run(tmp_path / "run"), np.random.default_rng(0).normal(size=(24, 9))
    codes = []
    for scale in (1, 2.0 ** 100, 2.0 ** -100):
        np.save(tmp_path / "x.npy", x * scale)
        saved = codes_of(run, "--embeddings", tmp_path / "x.npy")
        check(saved, 24)
        codes.append(saved["codes"])
    assert torch.equal(codes[0], codes[1]) and torch.equal(codes[0], codes[2])


def test_tensors_of_other_kinds(tmp_path, capsys):
    run = write_run(tmp_path / "run")
    torch.save(torch.eye(24).to_sparse(), tmp_path / "sparse.pt")
    check(codes_of(run, "--embeddings", tmp_path / "sparse.pt"), 24)
    (run / "text_codes.pt").unlink()
    np.save(tmp_path / "complex.npy", np.ones((24, 2)) * 1j)
    assert "24 rows of numbers" in refused(capsys, run, "--embeddings", tmp_path / "complex.npy")
    (tmp_path / "lies.npy").write_bytes((tmp_path / "complex.npy").read_bytes().replace(b"(24, 2)", b"(9999999, 9999999)"))
    assert "cannot be read" in refused(capsys, run, "--embeddings", tmp_path / "lies.npy")


@pytest.mark.parametrize("options", [["--embed-batch", 0], ["--seed", -1], ["--seed", 2 ** 32], ["--embeddings", "x.npy", "--embed-url", "http://x"]])
def test_bad_options_are_one_sentence(tmp_path, capsys, options):
    refused(capsys, write_run(tmp_path / "run"), *options)


def test_no_data_is_one_sentence(tmp_path, capsys):
    (tmp_path / "run").mkdir()
    assert "01_data.py" in refused(capsys, tmp_path / "run")


def test_no_text_at_all(tmp_path, capsys):
    run = write_run(tmp_path / "run", ["", "!?", ""])
    np.save(tmp_path / "zeros.npy", np.zeros((3, 7), dtype=np.float32))
    for options in ([], ["--embed-url", "http://127.0.0.1:9"], ["--embeddings", tmp_path / "zeros.npy"]):
        saved = codes_of(run, *options)
        check(saved, 3)
        assert not saved["known"].any() and saved["embeddings"].shape == (4, 1)
        assert saved["codebooks"].shape == (3, 8, 1) and "0 of 3 items are known" in capsys.readouterr().out


@pytest.mark.parametrize("titles", [["one mug"], ["one mug", "", ""], ["mug", "lamp"], ["x", "x", ""]])
def test_very_few_texts(tmp_path, titles):
    run, N = write_run(tmp_path / "run", titles), len(titles)
    check(codes_of(run), N)
    np.save(tmp_path / "x.npy", vectors(titles) * np.array([[bool(t)] for t in titles]))
    saved = codes_of(run, "--embeddings", tmp_path / "x.npy")
    check(saved, N)
    assert saved["known"].tolist() == [False] + [bool(t) for t in titles]


def test_equal_texts_overflow_into_free_places(tmp_path):
    """24 equal items at K = 8: eight fit behind one prefix, sixteen move to the nearest places with room."""
    run = write_run(tmp_path / "run", ["a mug"] * 24)
    saved = codes_of(run)
    check(saved, 24)
    assert saved["moved"] == 16
    assert saved["codes"][1:, :3].unique(dim=0, return_counts=True)[1].tolist() == [8, 8, 8]
    np.save(tmp_path / "x.npy", np.ones((24, 3)))
    check(codes_of(run, "--embeddings", tmp_path / "x.npy"), 24)


def test_a_full_tree_is_still_a_bijection(tmp_path, monkeypatch):
    """K = 2 has 16 codes; all 16 items get one, whatever their vectors."""
    monkeypatch.setattr(text, "codebook_size", lambda N: 2)
    saved = codes_of(write_run(tmp_path / "run", ["a mug"] * 10 + [f"{c} lamp" for c in COLOURS] + ["", ""]))
    check(saved, 16)
    assert saved["moved"] > 0


def test_level_four_counts_by_popularity(tmp_path):
    counts = torch.tensor([0, 3, 9, 1, 9, 4, 0, 2, 2], dtype=torch.int32)
    saved = codes_of(write_run(tmp_path / "run", ["a mug"] * 4 + ["an oak chair"] * 4, counts))
    check(saved, 8)
    assert saved["codes"][1:5, 3].tolist() == [2, 0, 3, 1], "equally bought: the lower number first"
    assert saved["codes"][5:, 3].tolist() == [0, 3, 1, 2]
    assert len(saved["codes"][1:5, :3].unique(dim=0)) == 1
