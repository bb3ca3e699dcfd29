"""The properties that make the generator right: the tree, the loss, the search, one pass = many."""
import argparse
import itertools
import os

import pytest
import torch
from conftest import run_script

N, K, L, D, T = 60, 8, 4, 2, 5


def source(codes, K=K):
    """What the file of a modality holds: all items are known, and the centroids are random."""
    known = torch.arange(len(codes)) > 0
    return {"codes": codes, "known": known, "codebooks": torch.randn(3, K, 6)}


@pytest.fixture()
def parts(scripts):
    """A small random catalogue with its tree, and an untrained generator with some life in it."""
    generator = scripts[5]
    torch.manual_seed(0)
    every = torch.tensor(list(itertools.product(range(K), repeat=L)))
    # Few different prefixes, so that the tree has nodes with one child and nodes with many.
    every = every[(every[:, 0] < 4) & (every[:, 1] < 3)]
    codes = torch.full((N + 1, L), -1)
    codes[1:] = every[torch.randperm(len(every))[:N]]
    trie = generator.Trie(codes, K)
    other = torch.randint(K, (N + 1, L))
    sources = {"other": source(other), "written": source(codes)}
    size = argparse.Namespace(width=16, heads=2, head=8, inner=32, layers=2, dropout=0.0)
    model = generator.Generator(sources, ["other", "written"], "written", size).eval()
    for p in model.parameters():
        p.data += 0.2 * torch.randn_like(p)  # biases start at zero: give each parameter a say
    return generator, codes, trie, model


def brute_force_children(codes, prefix):
    """The codes that continue a prefix, by looking at every item."""
    allowed = torch.zeros(K, dtype=torch.bool)
    for code in codes[1:].tolist():
        if code[:len(prefix)] == list(prefix):
            allowed[code[len(prefix)]] = True
    return allowed


def test_mask_equals_brute_force(parts):
    _, codes, trie, _ = parts
    for item in range(1, N + 1):
        node = torch.tensor(0)
        for l in range(L):
            prefix = codes[item, :l].tolist()
            assert torch.equal(trie.log_allowed(l, trie.path[item, l]) == 0, brute_force_children(codes, prefix))
            assert trie.path[item, l] == node
            node = trie.descend(l, node, codes[item, l])
        assert trie.leaf_item[node] == item


def test_constrained_loss_is_a_softmax_over_the_valid_children(parts):
    generator, codes, trie, _ = parts
    items = torch.randint(1, N + 1, (17,))
    logits = torch.randn(17, L, K)
    losses = generator.code_losses(logits, items, trie)
    plain = generator.code_losses(logits, items, trie, constrained=False)
    for l in range(L):
        by_hand, by_hand_plain = [], []
        for n, item in enumerate(items.tolist()):
            children = brute_force_children(codes, codes[item, :l].tolist()).nonzero()[:, 0]
            z, right = logits[n, l], logits[n, l, codes[item, l]]
            by_hand.append(-(right - torch.log(sum(torch.exp(z[k]) for k in children))))
            by_hand_plain.append(-(right - torch.log(torch.exp(z).sum())))
        assert torch.allclose(losses[l], torch.stack(by_hand).sum(), atol=1e-4)
        assert torch.allclose(plain[l], torch.stack(by_hand_plain).sum(), atol=1e-4)


def exhaustive(generator, codes, trie, model, history):
    """log p of every item, each written out alone through the training pass. -> (N,)"""
    scores = []
    for item in range(1, N + 1):
        target = torch.full_like(history, item)
        logits = model(history, target)[:, -1]  # only the last position counts
        losses = generator.code_losses(logits, torch.tensor([item]), trie)
        scores.append(-losses.sum())
    return torch.stack(scores)


def test_a_wide_beam_ranks_as_scoring_every_item(parts):
    generator, codes, trie, model = parts
    for T in (1, 3, 7):
        history = torch.randint(1, N + 1, (1, T))
        with torch.no_grad():
            scores = exhaustive(generator, codes, trie, model, history)
        items, found = generator.beam_search(model, trie, history, N)
        assert sorted(items[0].tolist()) == list(range(1, N + 1))
        assert torch.allclose(found[0], scores[items[0] - 1], atol=1e-4)
        assert torch.allclose(scores.exp().sum(), torch.tensor(1.0), atol=1e-4)  # a distribution over items
        assert (found[0].diff() <= 1e-6).all()


def test_beams_are_real_items_and_users_do_not_mix(parts):
    generator, codes, trie, model = parts
    history = torch.randint(1, N + 1, (6, T))
    items, scores = generator.beam_search(model, trie, history, 10)
    assert items.min() >= 1 and items.max() <= N
    assert all(len(set(row)) == 10 for row in items.tolist())
    for user in range(6):
        alone, _ = generator.beam_search(model, trie, history[user:user + 1], 10)
        assert torch.equal(alone[0], items[user])


def test_a_beam_wider_than_the_catalogue_is_filled_with_nothing(parts):
    generator, codes, trie, model = parts
    items, scores = generator.beam_search(model, trie, torch.tensor([[1, 2]]), N + 5)
    assert (items[0, :N] > 0).all() and (items[0, N:] == 0).all()
    assert scores[0, N:].eq(-torch.inf).all()


def test_one_pass_equals_every_prefix_alone(parts):
    """The encoder's mask at work: position t of the long pass is the short pass over t + 1 items."""
    _, _, _, model = parts
    history, target = torch.randint(1, N + 1, (2, 3, T))
    together = model(history, target)
    for t in range(T):
        alone = model(history[:, :t + 1], target[:, :t + 1])[:, -1]
        assert torch.allclose(together[:, t], alone, atol=1e-5)


def test_a_later_item_changes_nothing_before_it(parts):
    _, _, _, model = parts
    history, target = torch.randint(1, N + 1, (2, 3, T))
    changed = history.clone()
    changed[:, -1] = changed[:, -1] % N + 1
    assert torch.equal(model(history, target)[:, :-1], model(changed, target)[:, :-1])
    assert not torch.allclose(model(history, target)[:, -1], model(changed, target)[:, -1])


def test_masking_hides_one_modality_of_an_item(parts):
    """With masking 1 every item shows exactly one mask token set, and the others unchanged."""
    _, _, _, model = parts
    seen = []
    model.tokens.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    history = torch.randint(1, N + 1, (40, T))
    model.encode(history, masking=1.0)
    tokens = seen[0].view(40, T, D, L)
    hidden = tokens >= D * L * K
    assert (hidden.all(3).sum(2) == 1).all() and torch.equal(hidden.all(3), hidden.any(3))
    assert torch.equal(tokens[~hidden], model.shown[history][~hidden])


def test_token_embeddings_start_as_their_centroids(scripts):
    """Distances between token embeddings are those between centroids, up to one scale."""
    codebook = torch.randn(3, K, 6)
    size = argparse.Namespace(width=16, layers=1, heads=2, head=8, inner=16, dropout=0.0)
    only = source(torch.zeros(2, 4, dtype=torch.long)) | {"codebooks": codebook}
    model = scripts[5].Generator({"only": only}, ["only"], "only", size)
    x = model.tokens.weight[:3 * K].detach()
    ratio = torch.cdist(x, x) / torch.cdist(codebook.flatten(0, 1), codebook.flatten(0, 1))
    off_diagonal = ratio[~torch.eye(3 * K, dtype=torch.bool)]
    assert torch.allclose(off_diagonal, off_diagonal[0].expand_as(off_diagonal), rtol=1e-3)


def test_duplicate_codes_are_refused(scripts):
    codes = torch.tensor([[-1] * 4, [1, 2, 3, 0], [1, 2, 3, 0]])
    with pytest.raises(SystemExit) as stop:
        scripts[5].Trie(codes, K)
    assert stop.value.code == 2


@pytest.mark.parametrize("number", (2, 5))
def test_windows_cover_each_training_target_once(scripts, number):
    lengths = torch.tensor([3, 4, 5, 9, 40, 23])
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
    for seed in range(5):
        torch.manual_seed(seed)
        start, length = scripts[number].training_windows(offsets, 7)
        targets = [s + 1 + i for s, n in zip(start.tolist(), length.tolist()) for i in range(n)]
        expected = [i for a, b in zip(offsets[:-1].tolist(), offsets[1:].tolist()) for i in range(a + 1, b - 2)]
        assert sorted(targets) == expected and 1 <= length.min() and length.max() <= 7


@pytest.mark.parametrize("number", (2, 5))
def test_batches_hold_every_sequence_once_and_one_length_each(scripts, number):
    lengths = torch.randint(1, 9, (200,), generator=torch.Generator().manual_seed(0))
    batches = scripts[number].equal_length_batches(lengths, 16)
    assert sorted(torch.cat(batches).tolist()) == list(range(200))
    for batch in batches:
        assert len(lengths[batch].unique()) == 1 and len(batch) * lengths[batch[0]] <= 16


def test_two_processes_learn_what_one_learns_with_twice_the_batch(smoke, tmp_path):
    """torchrun: the same losses to 1e-4, one file each, and what is printed is printed once."""
    for file in ("data.pt", "image_codes.pt", "text_codes.pt", "collab_codes.pt"):
        os.symlink(smoke[0] / file, tmp_path / file)
    options = ("--run", tmp_path, "--smoke", "--device", "cpu", "--dropout", 0, "--masking", 0, "--epochs", 2)
    process = run_script(5, *options, "--batch", 64, "--name", "one")
    assert process.returncode == 0, process.stderr
    process = run_script(5, *options, "--batch", 32, "--name", "two", processes=2)
    assert process.returncode == 0 and process.stdout.count("epoch   0") == 1, process.stderr
    one, two = (torch.load(tmp_path / f"generator-{name}.pt", weights_only=True) for name in ("one", "two"))
    assert torch.allclose(one["losses"], two["losses"], atol=1e-4), (one["losses"], two["losses"])
    one, two = (torch.load(tmp_path / f"predictions-{name}-s0.pt", weights_only=True) for name in ("one", "two"))
    assert torch.allclose(one["scores"], two["scores"], atol=1e-2)


def test_max_steps_ends_training_and_tells_what_an_epoch_takes(smoke, tmp_path):
    for file in ("data.pt", "image_codes.pt", "text_codes.pt", "collab_codes.pt"):
        os.symlink(smoke[0] / file, tmp_path / file)
    process = run_script(5, "--run", tmp_path, "--smoke", "--max-steps", 2)
    assert process.returncode == 0 and "2 steps; an epoch has" in process.stdout, process.stderr
