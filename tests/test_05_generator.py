"""The properties that make the generator right: the tree, the loss, the search, one pass = many, and its training."""
import argparse
import hashlib
import itertools
import math
import os
import subprocess
import sys
import threading

import pytest
import torch
import torch.nn as nn
from PIL import Image

from conftest import ROOT, SCRIPTS, run_script

N, K, L, D, T = 60, 8, 4, 2, 5
INPUTS = ("data.pt", "images.pt", "image_codes.pt", "text_codes.pt", "collab_codes.pt")


def source(codes, K=K):
    """What the file of a modality holds: all items are known, and the centroids are random."""
    known = torch.arange(len(codes)) > 0
    return {"codes": codes, "known": known, "codebooks": torch.randn(3, K, 6),
            "embeddings": torch.randn(len(codes), 6)}


def shop_of(U, longest=9):
    """Histories of three or more random items, none of which comes twice."""
    lengths = torch.randint(3, longest + 1, (U,))
    events = torch.cat([1 + torch.randperm(N)[:length] for length in lengths])
    return {"item_ids": [""] * (N + 1), "events": events.int(),
            "offsets": torch.cat([torch.zeros(1), lengths.cumsum(0)]).long()}


@pytest.fixture(params=("Generator", "Lookahead"))
def parts(scripts, request):
    """A small random catalogue with its tree, and an untrained generator of each kind with some life in it."""
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
    size = argparse.Namespace(width=16, heads=2, head=8, inner=32, layers=2, dropout=0.0, shrunk="")
    if request.param == "Lookahead":
        neighbours = generator.Neighbours(shop_of(40), R=N)
        model = generator.Lookahead(sources, ["other", "written"], "written", trie, size, neighbours).eval()
    else:
        model = generator.Generator(sources, ["other", "written"], "written", trie, size).eval()
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


@pytest.mark.parametrize("K", (2, 5, 12, 300, 32_768))
def test_the_tree_takes_any_number_of_codes(scripts, K):
    """Also one that 8 does not divide, and the largest that int16 holds."""
    torch.manual_seed(0)
    codes = torch.randint(K, (40, L))
    codes[0] = K - 1
    codes = torch.cat([torch.full((1, L), -1), codes.unique(dim=0)]).to(torch.int16)
    trie = scripts[5].Trie(codes, K)
    for item in range(1, len(codes)):
        node = torch.tensor(0)
        for l in range(L):
            same_prefix = (codes[1:, :l] == codes[item, :l]).all(1)
            allowed = torch.full((K,), -torch.inf)
            allowed[codes[1:, l][same_prefix].long()] = 0.0
            assert torch.equal(trie.log_allowed(l, node), allowed)
            node = trie.descend(l, node, codes[item, l].long())
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


def test_the_fused_attention_of_gpus_gives_the_same_numbers(parts, monkeypatch):
    """Losses, gradients and scores of a search, all to 1e-5."""
    generator, _, trie, model = parts
    history, target = torch.randint(1, N + 1, (2, 3, 6))                # (3, 6) both
    by_hand, fused = [], []
    for numbers, attend in ((by_hand, generator.attention), (fused, generator.fused_attention)):
        monkeypatch.setattr(generator, "attention", attend)
        model.zero_grad()
        torch.manual_seed(0)
        losses = generator.code_losses(model(history, target).flatten(0, 1), target.flatten(), trie)
        losses.sum().backward()
        _, score = generator.beam_search(model, trie, history, 10)
        numbers += [losses, score, *[weight.grad.clone() for weight in model.parameters()]]
    for ours, theirs in zip(by_hand, fused, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def test_a_wide_beam_ranks_as_scoring_every_item(parts):
    generator, codes, trie, model = parts
    if hasattr(model, "trust"):
        model.trust.fill_(0.7)
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


def test_the_prefix_of_a_node_is_that_of_every_item_below_it(parts):
    _, codes, trie, _ = parts
    for l in range(1, L):
        assert torch.equal(trie.prefix(l, trie.path[1:, l]), codes[1:, :l])
    assert torch.equal(trie.prefix(L, torch.arange(N)), codes[trie.leaf_item])


def traced(parts, beam, U=12):
    """What trace_searches writes down of some users, and their lists and scores."""
    generator, _, trie, model = parts
    data = shop_of(U)
    args = argparse.Namespace(length=4, beam=beam, device="cpu", bf16=False, rank=0, world=1)
    everyone = torch.arange(U)
    trace = generator.trace_searches(model, trie, data, args)
    return trace, generator.recommend(model, trie, data, "test", everyone, args)


def test_a_traced_prefix_is_as_likely_as_the_items_below_it_together(parts):
    """Level by level the likeliest first, of a search that finds all items; the last level is the list itself."""
    generator, codes, _, _ = parts
    (prefixes, log_p), (items, scores) = traced(parts, beam=N)
    assert prefixes.dtype == torch.int16 and prefixes.shape == (12, L, generator.TRACED_BEAMS, L)
    assert torch.equal(prefixes[:, -1], codes[items[:, :generator.TRACED_BEAMS].long()].short())
    assert torch.equal(log_p[:, -1], scores[:, :generator.TRACED_BEAMS])
    for user in range(12):
        p = torch.zeros(N + 1).index_add(0, items[user].long(), scores[user].exp())  # (N+1,)
        for l in range(1, L + 1):
            different, node = codes[1:, :l].unique(dim=0, return_inverse=True)
            together = torch.zeros(len(different)).index_add(0, node, p[1:])
            best, which = together.topk(min(generator.TRACED_BEAMS, len(different)))
            found = len(best)
            assert torch.allclose(log_p[user, l - 1, :found].exp(), best, atol=1e-5)
            assert torch.equal(prefixes[user, l - 1, :found, :l], different[which].short())


def test_where_the_tree_has_fewer_prefixes_the_trace_is_filled_with_nothing(parts):
    """The tree has four first codes; behind a prefix of level l stands nothing either."""
    (prefixes, log_p), _ = traced(parts, beam=N)
    assert (prefixes[:, 0, :4, 0] >= 0).all()
    assert (prefixes[:, 0, 4] == -1).all() and (log_p[:, 0, 4] == -torch.inf).all()
    for l in range(L):
        assert (prefixes[:, l, :, l + 1:] == -1).all()
    (narrow, log_p), _ = traced(parts, beam=2)
    assert (narrow[:, :, :2, 0] >= 0).all() and (narrow[:, :, 2:] == -1).all() and (log_p[:, :, 2:] == -torch.inf).all()


def test_of_many_users_the_first_ones_are_traced(parts, monkeypatch):
    monkeypatch.setattr(parts[0], "TRACED_USERS", 3)
    (prefixes, log_p), (items, scores) = traced(parts, beam=N)
    assert len(prefixes) == len(log_p) == 3
    assert torch.allclose(log_p[:, -1, 0], scores[:3, 0], atol=1e-5)


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


def hidden_in(model, step):
    """Which modalities of which items are hidden while step() runs. -> bool (items, D)"""
    seen = []
    hook = model.tokens.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    step()
    hook.remove()
    tokens = seen[0].view(-1, D, L)  # the encoder's come first
    hidden = tokens >= D * L * K
    assert torch.equal(hidden.all(2), hidden.any(2)), "a modality is hidden with all its codes, or not at all"
    return hidden.all(2)


def test_masking_hides_one_modality_of_an_item(parts):
    """With masking 1 every item shows exactly one mask token set, and the others unchanged."""
    generator, _, _, model = parts
    seen = []
    model.tokens.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    history = torch.randint(1, N + 1, (40, T))
    model.encode(history, generator.hidden_modalities(history, D, 1.0), model.carried(history))
    tokens = seen[0].view(40, T, D, L)
    hidden = tokens >= D * L * K
    assert (hidden.all(3).sum(2) == 1).all() and torch.equal(hidden.all(3), hidden.any(3))
    assert torch.equal(tokens[~hidden], model.shown[history][~hidden])


def test_a_share_of_the_items_hides_one_modality_and_each_as_often(parts):
    """In a training step with --masking .2: a fifth of the items, never two modalities of one, half of them each."""
    generator, _, trie, model = parts
    optimizer = torch.optim.SGD(model.parameters())
    events = torch.randint(1, N + 1, (400, T + 1))
    torch.manual_seed(0)
    hidden = hidden_in(model, lambda: generator.train_step(model, trie, optimizer, events, step_options()))
    assert len(hidden) == 2000 and hidden.sum(1).max() == 1
    share = hidden.any(1).float().mean()
    assert abs(share - 0.2) < 4 * math.sqrt(0.2 * 0.8 / 2000)
    first = hidden[:, 0].sum() / hidden.sum()
    assert abs(first - 0.5) < 4 * math.sqrt(0.5 * 0.5 / hidden.sum())


def test_a_single_modality_is_never_hidden(scripts):
    size = argparse.Namespace(width=16, layers=1, heads=2, head=8, inner=16, dropout=0.0)
    codes = torch.randint(K, (N + 1, L))
    codes[1:, 3] = torch.arange(N) % K
    codes[1:, 2] = torch.arange(N) // K
    trie = scripts[5].Trie(codes, K)
    model = scripts[5].Generator({"only": source(codes)}, ["only"], "only", trie, size)
    history = torch.randint(1, N + 1, (9, T))
    assert not scripts[5].hidden_modalities(history, D=1, masking=1.0).any()
    assert torch.equal(model(history, history, masking=1.0), model(history, history))


def test_token_embeddings_start_as_their_centroids(scripts):
    """Distances between token embeddings are those between centroids, up to one scale."""
    codebook = torch.randn(3, K, 6)
    size = argparse.Namespace(width=16, layers=1, heads=2, head=8, inner=16, dropout=0.0)
    only = source(torch.zeros(2, 4, dtype=torch.long)) | {"codebooks": codebook}
    trie = scripts[5].Trie(only["codes"], K)
    model = scripts[5].Generator({"only": only}, ["only"], "only", trie, size)
    x = model.tokens.weight[:3 * K].detach()
    ratio = torch.cdist(x, x) / torch.cdist(codebook.flatten(0, 1), codebook.flatten(0, 1))
    off_diagonal = ratio[~torch.eye(3 * K, dtype=torch.bool)]
    assert torch.allclose(off_diagonal, off_diagonal[0].expand_as(off_diagonal), rtol=1e-3)


# --- Looking ahead --------------------------------------------------------------------------------------------------
@pytest.fixture()
def ahead(scripts):
    """A Lookahead, the codes it writes, and its sources: modality a, which is written, b, and c, which is shrunk."""
    generator = scripts[5]
    torch.manual_seed(1)
    every = torch.tensor(list(itertools.product(range(K), repeat=L)))
    codes = torch.cat([torch.full((1, L), -1), every[torch.randperm(len(every))[:N]]])
    sources = {"a": source(codes), "b": source(torch.randint(K, (N + 1, L))), "c": source(torch.randint(K, (N + 1, L)))}
    sources["b"]["embeddings"] *= 100  # a modality with long vectors has no more to say
    sources["c"]["embeddings"][:2] = 0
    sources["c"]["known"][1] = False  # the first item has no vector, and its code is anything
    trie = generator.Trie(codes, K)
    size = argparse.Namespace(width=16, heads=2, head=8, inner=32, layers=1, dropout=0.0, shrunk="c,d")
    neighbours = generator.Neighbours(shop_of(40), R=N)
    model = generator.Lookahead(sources, ["a", "b", "c"], "a", trie, size, neighbours).eval()
    return generator, codes, model, sources


def scaled(source):
    """The vectors of a modality, of length 1 on average. -> (N+1, d)"""
    x = source["embeddings"]
    return x / x[1:].square().sum(1).mean().sqrt()


def test_a_code_is_scored_by_all_items_under_it(ahead):
    """z_l(k) = x . output_l[k] + log sum exp s for every prefix of every item, by looking at every item."""
    _, codes, model, sources = ahead
    history = torch.randint(1, N + 1, (1, T))
    with torch.no_grad():
        model.kept.fill_(1)
        model.trust.fill_(0.7)
        near = 0.7 * (1 + 10 * model.neighbours(history)[0]).log()  # (N+1,)
        assert (near > 0).sum() > 3
        v = sum(carry.project(scaled(sources[name])) for carry, name in zip(model.carry, "abc"))  # (N+1, E)
        carried = model.carried(history)
    for item in range(1, N + 1):
        for l in range(L):
            x = torch.randn(16)
            z = model.scores(x.expand(1, 1, -1), l, model.trie.path[item, l].expand(1, 1), carried)[0, 0]
            score = v @ (x @ model.look[l]) + near
            same_prefix = (codes[:, :l] == codes[item, :l]).all(1)
            same_prefix[0] = False  # padding
            for k in range(K):
                under = score[same_prefix & (codes[:, l] == k)]
                if len(under):
                    right = x @ model.output[l][:, k] + under.logsumexp(0)
                    assert torch.allclose(z[k], right, atol=1e-4)
                else:
                    assert z[k] < -50


def test_with_one_question_for_all_levels_the_tree_gives_the_softmax_over_all_items(ahead):
    """The levels' probabilities multiply to exp s_i / sum exp s: the model can do what SASRec does."""
    generator, codes, model, _ = ahead
    x = torch.randn(16)
    with torch.no_grad():
        model.output.zero_()
        model.look.copy_(model.look[:1].expand_as(model.look))
        carried = model.carried(torch.randint(1, N + 1, (1, T)))
        logits = [model.scores(x.expand(1, N, 16), l, model.trie.path[None, 1:, l], carried)[0] for l in range(L)]
        losses = [generator.code_losses(torch.stack(logits, 1)[i:i + 1], torch.tensor([i + 1]), model.trie).sum()
                  for i in range(N)]
        flat = (carried.table[1:] @ (x @ model.look[0])).log_softmax(0)
    assert torch.allclose(-torch.stack(losses), flat, atol=1e-4)


def test_training_brings_questions_to_the_vectors_and_a_search_the_vectors_to_questions(ahead, monkeypatch):
    """In a large shop; the same scores either way, but of the root, where training draws."""
    generator, _, model, _ = ahead
    monkeypatch.setattr(torch, "rand_like", lambda kept: kept)  # training keeps what the search keeps
    history, target = torch.randint(1, N + 1, (2, 3, T))                # (3, T) both
    search = model(history, target)                                     # (3, T, L, K)
    small = model.train()(history, target)                              # (3, T, L, K)
    monkeypatch.setattr(generator, "DRAWN_FROM", N - 1)
    large = model(history, target)                                      # (3, T, L, K)
    torch.testing.assert_close(small, search, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(large[:, :, 1:], search[:, :, 1:], atol=1e-4, rtol=1e-4)
    assert model.carried(history).table is model.table


def test_of_a_large_shop_training_draws_some_items_of_each_first_code(ahead, monkeypatch):
    """The mean over many draws is that over all of them; the search still takes all."""
    generator, codes, model, _ = ahead
    node = torch.zeros(1, 1, dtype=torch.long)
    question = torch.randn(1, 1, model.table.shape[1])                  # (1, 1, X)
    carried = generator.Carried([], model.table, None, None)
    root = model.train().beneath[0]
    exact = root(question, node, carried)[0, 0]                         # (K,)
    monkeypatch.setattr(generator, "DRAWN_FROM", N - 1)
    monkeypatch.setattr(generator, "DRAWN", 50_000)
    drawn = root(question, node, carried)[0, 0]                         # (K,)
    used = codes[1:, 0].bincount(minlength=K) > 0                       # (K,)
    assert torch.allclose(drawn[used], exact[used], atol=0.05) and not torch.equal(drawn, exact)
    assert (drawn[~used] < -50).all()
    assert torch.equal(model.eval().beneath[0](question, node, carried)[0, 0], exact)


def test_a_shrunk_vector_lies_between_the_mean_of_its_first_code_and_itself(ahead):
    """And only the first code is shown; the other modalities are as they were. In training the share is drawn anew."""
    _, _, model, sources = ahead
    some = torch.randint(1, N + 1, (1, T))
    x = scaled(sources["c"])
    first = sources["c"]["codes"][:, 0]
    mean = torch.stack([x[2:][first[2:] == k].mean(0) for k in first[2:]])
    mean = torch.cat([torch.zeros(1, 6), mean])  # nothing is known of the first item: no mean of others for it
    shown = torch.zeros(1, N, 3, dtype=torch.bool)
    for kept in (0.0, 0.25, 1.0):
        with torch.no_grad():
            model.kept.fill_(kept)
            right = [scaled(sources["a"])[1:], scaled(sources["b"])[1:], mean + kept * (x[1:] - mean)]
            for d, v in enumerate(right):
                found = model.gather(torch.arange(1, N + 1)[None], shown, model.carried(some))[0, :, d]  # (N, E)
                assert torch.allclose(found, model.carry[d].project(v), atol=1e-5)
    assert (model.shown[1:, 2, 1:] == model.masks[2]).all() and (model.shown[2:, 2, 0] != model.masks[2]).all()
    assert (model.shown[1:, :2] != model.masks[:2]).all()
    model.train()
    one, other = model.carried(some).parts, model.carried(some).parts
    assert not torch.equal(one[2], other[2])
    assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])


def test_looking_ahead_a_history_has_one_token_for_each_modality(ahead):
    """L times shorter than MSCGRec's: the vector, and the sum of its codes' embeddings in any order of levels."""
    generator, _, model, sources = ahead
    history = torch.randint(2, N + 1, (4, T))
    hidden = torch.zeros(4, T, 3, dtype=torch.bool)
    carried = model.carried(history)
    x = model.embed(history, hidden, carried)
    assert x.shape == (4, T, 3, 16)
    assert model.encode(history, hidden, carried).shape == (4, T * 3, 16)
    assert generator.Generator.embed(model, history, hidden, None).shape == (4, T, 3 * L, 16)
    for d, name in enumerate("ab"):  # the third is shrunk: it shows its first code alone
        codes = [model.tokens.weight[model.first_token[name] + l * K + sources[name]["codes"][history, l].long()]
                 for l in range(L)]
        right = sum(codes) / L ** 0.5 + model.carry[d].project(scaled(sources[name]))[history]
        assert torch.allclose(x[:, :, d], right, atol=1e-5)


def test_counts_are_for_the_search_alone(ahead):
    """What training is about has been counted, too: n would tell it. With any trust, training's scores are the same."""
    _, _, model, _ = ahead
    history = torch.randint(1, N + 1, (2, T))
    assert model.carried(history).near is None  # nothing is trusted yet
    model.trust.fill_(0.5)
    near = model.carried(history).near
    assert near.shape == (2, 1, N + 1) and (near.sum(2) > 0).all()
    assert (near[:, 0].gather(1, history) == 0).all()  # a history has paired its own items itself
    assert model.train().carried(history).near is None


def test_neighbours_are_counted_as_co_occurrence_counts_them(scripts):
    """Without a limit of neighbours, 05 counts as much as the row co-occurrence for what that row recommends first."""
    torch.manual_seed(0)
    data = shop_of(25) | {"user_ids": [""] * 25}
    data["train_counts"] = data["events"].bincount(minlength=N + 1)
    scripts[6].NEIGHBOURS = N
    top = scripts[6].co_occurrence(data)["test"].long()
    neighbours = scripts[5].Neighbours(data, R=N)
    for user in range(25):
        begin, end = data["offsets"][user], data["offsets"][user + 1]
        history = data["events"][begin:end - 1].long()
        counts = neighbours(history[None])[0]
        new = [item for item in top[user].tolist() if item not in history]
        listed = counts[new][counts[new] > 0]
        assert len(listed) == min(len(new), int((counts > 0).sum()))
        assert torch.allclose(listed, counts.sort(descending=True).values[:len(listed)], atol=0.1)  # ties: best sellers


def test_an_item_that_is_never_bought_is_told_from_another_by_its_vector(ahead):
    """Two leaves of one prefix that training has not seen: with equal tables only the vectors differ."""
    generator, _, model, _ = ahead
    with torch.no_grad():
        model.output.zero_()
    history = torch.randint(1, N + 1, (1, T))
    _, scores = generator.beam_search(model, model.trie, history, N)
    assert len(scores[0].unique()) == N
    with torch.no_grad():
        model.look.zero_()
    items, scores = generator.beam_search(model, model.trie, history, N)
    assert sorted(items[0].tolist()) == list(range(1, N + 1))
    assert torch.allclose(scores, torch.full_like(scores, -math.log(N)), atol=1e-5)  # nothing known: all items alike


def test_a_hidden_modality_carries_no_vector(ahead):
    """Masked in training, it tells nothing at all: neither by its codes nor by its vector."""
    _, _, model, _ = ahead
    history = torch.randint(1, N + 1, (3, T))
    hidden = torch.zeros(3, T, 3, dtype=torch.bool)
    hidden[:, :, 1] = True
    for what in (model.embed, model.begin):
        before = what(history, hidden, model.carried(history))
        columns = model.table.split(model.columns, 1)
        columns[1].normal_()
        assert torch.equal(what(history, hidden, model.carried(history)), before)
        columns[0].normal_()
        assert not torch.equal(what(history, hidden, model.carried(history)), before)


@pytest.mark.parametrize("shrunk, neighbours, best", (
    (True, 200, (0.75, 0.25)), (True, 0, (0.75, 0.0)), (False, 200, (0.5, 0.25))))
def test_what_is_kept_and_how_far_counts_are_trusted_is_chosen_on_validation(
        scripts, monkeypatch, shrunk, neighbours, best):
    """One after the other; what has nothing to say, because nothing is shrunk or counted, stays as it was."""
    generator = scripts[5]
    model = nn.Module()
    model.carry = [argparse.Namespace(shrunk=False), argparse.Namespace(shrunk=shrunk)]
    model.register_buffer("kept", torch.tensor(0.5))
    model.register_buffer("trust", torch.tensor(0.0))
    state = {"best": {"kept": torch.tensor(0.5), "trust": torch.tensor(0.0)}}
    monkeypatch.setattr(generator, "validate",
                        lambda model, *_: -abs(model.kept.item() - 0.75) - abs(model.trust.item() - 0.25))
    generator.settle(model, None, state, None, None, argparse.Namespace(neighbours=neighbours))
    assert (state["best"]["kept"], state["best"]["trust"]) == best


def test_lookahead_runs_from_files_and_needs_their_vectors(scripts, smoke, tmp_path, capsys):
    run = links(smoke, tmp_path / "run")
    scripts[5].main(["--run", str(run), "--smoke", "--lookahead", "--name", "lookahead"])
    top = load(run / "predictions-lookahead-s0.pt")["test"]
    assert 1 <= top.min() and all(len(set(row)) == len(row) for row in top.tolist())
    scripts[5].main(["--run", str(run), "--name", "lookahead", "--history", load(run / "data.pt")["item_ids"][3]])
    saved = load(run / "text_codes.pt")
    (run / "text_codes.pt").unlink()
    for change in ({"embeddings": saved["embeddings"][1:]}, {"embeddings": saved["embeddings"] * math.nan}):
        torch.save(saved | change, run / "text_codes.pt")
        with pytest.raises(SystemExit) as stop:
            scripts[5].main(["--run", str(run), "--smoke", "--lookahead"])
        error = capsys.readouterr().err
        assert stop.value.code == 2 and "text_codes.pt" in error and "'embeddings'" in error


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


# --- Training -------------------------------------------------------------------------------------------------------
def step_options(**other):
    """The options that a step, an epoch and validation look at."""
    options = dict(device="cpu", bf16=False, masking=0.2, unconstrained=False, batch=32, length=T, seed=3, epochs=4,
                   lr=0.01, max_steps=0, rank=0, world=1, beam=10, name="test")
    return argparse.Namespace(**{**options, **other})


def some_events(U=50):
    """A shop of U users with 3 to 20 events. -> as data.pt"""
    torch.manual_seed(5)
    lengths = torch.randint(3, 21, (U,))
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
    events = torch.randint(1, N + 1, (int(offsets[-1]),), dtype=torch.int32)
    return {"events": events, "offsets": offsets, "user_ids": ["u"] * U, "item_ids": [""] + ["i"] * N}


def watch_epoch(generator, monkeypatch, epoch, **options):
    """Runs an epoch whose steps only write down what they see. -> [(events, learning rate, a random number)]"""
    seen = []

    def watch(model, trie, optimizer, events, args):
        seen.append((events, optimizer.param_groups[0]["lr"], torch.rand(1).item()))
        return torch.ones(L)
    monkeypatch.setattr(generator, "train_step", watch)
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters())
    trie = argparse.Namespace(L=L)
    state = {"losses": [torch.ones(L)] * epoch, "ndcg": [0.1] * epoch}
    losses = generator.train_epoch(model, trie, optimizer, state, epoch, some_events(), step_options(**options))
    return seen, losses


def test_a_step_moves_every_parameter(parts):
    """Biases too, which begin at zero: without weight decay only a gradient can move them."""
    generator, _, trie, model = parts
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.0)
    events = torch.randint(1, N + 1, (20, T + 1))
    losses = generator.train_step(model, trie, optimizer, events, step_options())
    assert losses.shape == (L,) and not losses.requires_grad
    for name, parameter in model.named_parameters():
        assert not torch.equal(parameter, before[name]), name
    biases = [name for name in before if "bias" in name]
    assert len(biases) == 5  # items and slots of encoder and cross-attention, and self_bias


def test_steps_on_one_batch_lower_its_loss(parts):
    generator, _, trie, model = parts
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    events = torch.randint(1, N + 1, (20, T + 1))
    options = step_options(masking=0.0)
    first = generator.train_step(model, trie, optimizer, events, options).sum()
    for _ in range(20):
        last = generator.train_step(model, trie, optimizer, events, options).sum()
    assert last < 0.7 * first


def test_every_epoch_has_batches_of_its_own_and_the_same_again(scripts, monkeypatch):
    generator = scripts[5]
    first, again, second = (watch_epoch(generator, monkeypatch, epoch)[0] for epoch in (0, 0, 1))
    assert all(torch.equal(a[0], b[0]) and a[2] == b[2] for a, b in zip(first, again, strict=True))
    assert not all(a[0].equal(b[0]) for a, b in zip(first, second))
    other_seed, _ = watch_epoch(generator, monkeypatch, 0, seed=4)
    assert not all(a[0].equal(b[0]) for a, b in zip(first, other_seed))


def test_processes_share_the_batches_and_draw_numbers_of_their_own(scripts, monkeypatch):
    """Else all of them would drop the same activations and hide the same modalities."""
    generator = scripts[5]
    alone, _ = watch_epoch(generator, monkeypatch, 1, batch=96)
    ranks = [watch_epoch(generator, monkeypatch, 1, batch=32, rank=rank, world=3)[0] for rank in range(3)]
    for whole, *parts in zip(alone, *ranks, strict=True):
        for rank, part in enumerate(parts):
            assert torch.equal(whole[0][rank::3], part[0])
        assert whole[2] == parts[0][2] and len({part[2] for part in parts}) == 3


def test_the_learning_rate_rises_then_falls_along_a_cosine(scripts, monkeypatch):
    generator = scripts[5]
    rate = generator.learning_rate
    assert rate(0.0, 3.0) == 0.0 and rate(1.0, 3.0) == pytest.approx(0.0)
    assert rate(generator.WARM_UP / 2, 3.0) == pytest.approx(1.5, rel=0.01)
    assert rate(0.5, 3.0) == pytest.approx(1.5) and rate(0.75, 3.0) == pytest.approx(1.5 - 1.5 * math.sqrt(0.5))
    seen, _ = watch_epoch(generator, monkeypatch, 2)
    for i, (_, lr, _) in enumerate(seen):
        assert lr == rate((2 + i / len(seen)) / 4, 0.01)


def test_the_loss_of_an_epoch_is_a_mean_over_targets(scripts, monkeypatch):
    seen, losses = watch_epoch(scripts[5], monkeypatch, 0)  # each step says 1 for each level
    targets = sum(events[:, 1:].numel() for events, _, _ in seen)
    assert torch.allclose(losses, torch.full((L,), len(seen) / targets))


@pytest.mark.parametrize("number", (2, 5))
def test_the_cuts_of_long_histories_move_from_epoch_to_epoch(scripts, number):
    offsets = torch.tensor([0, 40])
    starts = set()
    for seed in range(20):
        torch.manual_seed(seed)
        start, _ = scripts[number].training_windows(offsets, 7)
        starts.add(start[1].item())
    assert starts == set(range(1, 8))


# --- Which epoch is the best ------------------------------------------------------------------------------------------
def links(smoke, folder, *more):
    """A new run with what scripts 1 to 4 made."""
    folder.mkdir(exist_ok=True)
    for name in (*INPUTS, *more):
        os.symlink(smoke[0] / name, folder / name)
    return folder


def load(path):
    return torch.load(path, weights_only=True)


def test_the_epoch_is_chosen_on_validation(scripts, smoke, tmp_path):
    """Three epochs, only the test events changed: the same curve, the same best weights."""
    run = links(smoke, tmp_path / "run")
    other = tmp_path / "other"
    other.mkdir()
    data = load(smoke[0] / "data.pt")
    last = data["offsets"][1:] - 1
    data["events"][last] = data["events"][last.flip(0)]
    torch.save(data, other / "data.pt")
    for name in ("image_codes.pt", "text_codes.pt", "collab_codes.pt"):
        torch.save(load(smoke[0] / name) | {"made_from": {}}, other / name)
    for folder in (run, other):
        scripts[5].main(["--run", str(folder), "--smoke", "--epochs", "3", "--lr", "0.01", "--beam", "10"])
    ours, theirs = (load(folder / "generator-mscgrec.pt") for folder in (run, other))
    assert torch.equal(ours["ndcg"], theirs["ndcg"]) and ours["ndcg"].unique().numel() == 3
    assert all(torch.equal(ours["weights"][name], theirs["weights"][name]) for name in ours["weights"])

    # And the curve is that of the lists for the validation event: its best value is that of the lists that are saved.
    lists = load(run / "predictions-mscgrec-s0.pt")["valid"][:, :10]
    data = load(run / "data.pt")
    target = data["events"][data["offsets"][1:] - 2].unsqueeze(1)
    assert len(target) <= scripts[5].VALIDATION_USERS  # so all users validate
    rank = torch.arange(1, 11)
    ndcg = ((lists == target) / torch.log2(1.0 + rank)).sum(1).mean()
    assert ndcg == pytest.approx(ours["ndcg"].max().item(), abs=1e-6)


# --- Codes from anywhere ----------------------------------------------------------------------------------------------
def recut(codes, K):
    """The same items with other codes, below K: any that tell the items apart."""
    order = torch.randperm(len(codes) - 1)
    digits = [order // K ** place % K for place in (2, 1, 0)]
    return torch.cat([codes[:1], torch.stack([torch.zeros_like(order), *digits], 1).to(codes.dtype)])


def test_each_modality_may_have_a_number_of_codes_of_its_own(scripts, smoke, tmp_path):
    """K of 13, 301 and 8, the second one written: it trains, and recommends real items."""
    run = links(smoke, tmp_path / "run")
    for name, K in (("image", 13), ("text", 301)):
        saved = load(run / f"{name}_codes.pt")
        saved |= {"codes": recut(saved["codes"], K), "codebooks": torch.randn(3, K, 7)}
        (run / f"{name}_codes.pt").unlink()
        torch.save(saved, run / f"{name}_codes.pt")
    scripts[5].main(["--run", str(run), "--smoke", "--target", "text"])
    weights = load(run / "generator-mscgrec.pt")["weights"]
    K = load(run / "collab_codes.pt")["codebooks"].shape[1]
    assert len(weights["tokens.weight"]) == 4 * (13 + 301 + K) + 3 + 1
    test = load(run / "predictions-mscgrec-s0.pt")["test"]
    assert 1 <= test.min() and test.max() <= len(load(run / "data.pt")["item_ids"]) - 1
    assert all(len(set(row)) == len(row) for row in test.tolist())


def test_tokens_of_modalities_do_not_overlap(scripts):
    """With another K for each: every code, every mask and the start token has a row of its own."""
    sizes = {"a": 5, "b": 12, "c": 8}
    sources = {name: source(torch.randint(K, (N + 1, L)), K) for name, K in sizes.items()}
    size = argparse.Namespace(width=16, layers=1, heads=2, head=8, inner=16, dropout=0.0)
    model = scripts[5].Generator(sources, ["b", "a"], "c", None, size)
    rows = [set(model.shown[1:, d, l].tolist()) for d in range(2) for l in range(L)]
    rows += [set(model.written[1:, l].tolist()) for l in range(L)] + [set(model.masks.flatten().tolist())]
    rows.append({model.start_token})
    assert sum(map(len, rows)) == len(set.union(*rows)) and max(set.union(*rows)) == len(model.tokens.weight) - 1
    assert torch.equal(model.written[1:] - model.target_level, sources["c"]["codes"][1:])
    assert torch.equal(model.shown[0], model.masks.expand(2, L))  # padding is an item that lacks everything


def test_the_target_may_be_a_modality_that_the_history_does_not_show(scripts, smoke, tmp_path):
    run = links(smoke, tmp_path / "run")
    scripts[5].main(["--run", str(run), "--smoke", "--modalities", "image,text", "--target", "collab"])
    saved = load(run / "generator-mscgrec.pt")
    assert saved["weights"]["encoder_bias.slot"].shape[1:] == (2 * L, 2 * L)
    test = load(run / "predictions-mscgrec-s0.pt")["test"]
    assert 1 <= test.min() and all(len(set(row)) == len(row) for row in test.tolist())

    # What is written is collab's: its tree, and none of its tokens in a history.
    args = scripts[5].options(["--run", str(run), "--smoke", "--modalities", "image,text"])
    sources = scripts[5].read_codes(scripts[5].Run(run), load(run / "data.pt"), args)
    model, trie = scripts[5].build(sources, load(run / "data.pt"), args)
    assert torch.equal(trie.codes, load(run / "collab_codes.pt")["codes"].long())
    collab = range(model.first_token["collab"], model.first_token["collab"] + L * trie.K)
    assert not any(token in collab for token in model.shown.unique().tolist())


@pytest.mark.parametrize("change, said", (
    (lambda saved: saved.pop("codebooks"), "no tensor 'codebooks'"),
    (lambda saved: saved.update(codes=saved["codes"].tolist()), "no tensor 'codes'"),
    (lambda saved: saved.update(codes=saved["codes"][:-1]), "not int16"),
    (lambda saved: saved.update(codes=saved["codes"].float()), "not int16"),
    (lambda saved: saved["codes"][3].fill_(32_000), "codes from 0 to 32000"),
    (lambda saved: saved["codes"][3].fill_(-2), "codes from -2"),
    (lambda saved: saved.update(known=saved["known"].int()), "'known' is not bool"),
    (lambda saved: saved.update(codebooks=torch.zeros(5, *saved["codebooks"].shape[1:])), "'codebooks' is not"),
    (lambda saved: saved.update(codebooks=saved["codebooks"] * math.nan), "'codebooks' is not"),
    (lambda saved: saved.update(codes=saved["codes"][:, :3]), "as many codes an item"),
))
def test_a_file_of_codes_that_is_none_gets_a_sentence(scripts, smoke, tmp_path, capsys, change, said):
    run = links(smoke, tmp_path / "run")
    saved = load(run / "text_codes.pt")
    change(saved)
    (run / "text_codes.pt").unlink()
    torch.save(saved, run / "text_codes.pt")
    with pytest.raises(SystemExit) as stop:
        scripts[5].main(["--run", str(run), "--smoke"])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and said in error and "text" in error and error.count("\n") == 1
    assert not list(run.glob("generator*"))


# --- The run: two in one process, several processes for one, stopped, in a thread -------------------------------------
def test_two_runs_in_one_process_know_nothing_of_each_other(scripts, smoke, tmp_path):
    """As in a notebook: another shop is not refused, and each file names its own sources."""
    run = links(smoke, tmp_path / "run")
    other = tmp_path / "other"
    assert run_script(1, "--run", other, "--smoke", "--seed", 1).returncode == 0
    data = load(other / "data.pt")
    assert data["item_ids"][3] in load(run / "data.pt")["item_ids"]
    for name in ("image", "text", "collab"):
        codes = recut(torch.full((len(data["item_ids"]), L), -1, dtype=torch.int16), 16)
        torch.save({**source(codes, 16), "made_from": {}}, other / f"{name}_codes.pt")
    losses = []
    for folder in (run, other, run):
        scripts[5].main(["--run", str(folder), "--smoke"])
        scripts[5].main(["--run", str(folder), "--history", data["item_ids"][3]])  # it has read the pictures too
        saved = load(folder / "generator-mscgrec.pt")
        losses.append(saved["losses"])
        sources = ("data.pt", "image_codes.pt", "text_codes.pt", "collab_codes.pt")
        digests = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in sources}
        assert saved["made_from"] == digests
    assert torch.equal(losses[0], losses[2])


def test_it_runs_in_a_thread_too(scripts, smoke, tmp_path):
    """A web demo answers in threads, where no signal can be caught."""
    run = links(smoke, tmp_path / "run")
    failed = []

    def work():
        try:
            scripts[5].main(["--run", str(run), "--smoke"])
        except BaseException as error:
            failed.append(error)
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert not failed and (run / "predictions-mscgrec-s0.pt").exists()


def test_a_run_that_several_processes_began_is_not_gone_on_with_by_one(scripts, smoke, tmp_path, capsys):
    run = links(smoke, tmp_path / "run")
    args = scripts[5].options(["--run", str(run), "--smoke"])
    options = {**vars(args), "rank": 0, "world": 2}
    torch.save({"options": options, "made_from": {}}, run / "generator-mscgrec.checkpoint")
    with pytest.raises(SystemExit) as stop:
        scripts[5].main(["--run", str(run), "--smoke"])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "begun by 2 processes, not 1" in error and "--world" not in error


def test_without_the_module_resource_it_runs_and_knows_no_peak_memory(smoke, tmp_path):
    """As on Windows."""
    run = links(smoke, tmp_path / "run")
    program = (f"import sys, runpy; sys.modules['resource'] = None; sys.argv = ['05', '--run', {str(run)!r}, "
               f"'--smoke', '--device', 'cpu']; runpy.run_path({str(SCRIPTS[4])!r}, run_name='__main__')")
    process = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT)
    assert process.returncode == 0, process.stderr
    assert math.isnan(load(run / "predictions-mscgrec-s0.pt")["peak_memory"])


def test_two_processes_learn_what_one_learns_with_twice_the_batch(smoke, tmp_path):
    """torchrun: the same losses to 1e-4, one file each, and what is printed is printed once."""
    links(smoke, tmp_path)
    options = ("--run", tmp_path, "--smoke", "--device", "cpu", "--dropout", 0, "--masking", 0, "--epochs", 2)
    process = run_script(5, *options, "--batch", 64, "--name", "one")
    assert process.returncode == 0, process.stderr
    process = run_script(5, *options, "--batch", 32, "--name", "two", processes=2)
    assert process.returncode == 0 and process.stdout.count("epoch   0") == 1, process.stderr
    one, two = (load(tmp_path / f"generator-{name}.pt") for name in ("one", "two"))
    assert torch.allclose(one["losses"], two["losses"], atol=1e-4), (one["losses"], two["losses"])
    one, two = (load(tmp_path / f"predictions-{name}-s0.pt") for name in ("one", "two"))
    assert torch.allclose(one["scores"], two["scores"], atol=1e-2)


def test_two_processes_look_ahead(smoke, tmp_path):
    """Its tables are of types that processes can send each other, and each user gets a list."""
    run = links(smoke, tmp_path / "run")
    process = run_script(5, "--run", run, "--smoke", "--device", "cpu", "--name", "lookahead", "--lookahead",
                         processes=2)
    assert process.returncode == 0, process.stderr
    assert load(run / "predictions-lookahead-s0.pt")["test"][:, 0].min() > 0


def test_two_processes_with_dropout_and_masking_learn_as_well_as_one(smoke, tmp_path):
    """Other random numbers, so other losses, but within noise of each other."""
    links(smoke, tmp_path)
    options = ("--run", tmp_path, "--smoke", "--device", "cpu", "--dropout", 0.1, "--masking", 0.2, "--epochs", 3)
    for name, batch, processes in (("one", 64, 1), ("two", 32, 2)):
        process = run_script(5, *options, "--batch", batch, "--name", name, processes=processes)
        assert process.returncode == 0, process.stderr
    one, two = (load(tmp_path / f"generator-{name}.pt")["losses"].sum(1) for name in ("one", "two"))
    assert not torch.equal(one, two)
    # Seeds 0 and 1 differ by .005 and .034 between one process and two; one epoch more is worth .3 at first.
    assert abs(one.mean() - two.mean()) < 0.08, (one, two)


def test_max_steps_ends_training_and_tells_what_an_epoch_takes(smoke, tmp_path):
    links(smoke, tmp_path)
    process = run_script(5, "--run", tmp_path, "--smoke", "--max-steps", 2)
    assert process.returncode == 0 and "2 steps; an epoch has" in process.stdout, process.stderr


# --- --history --------------------------------------------------------------------------------------------------------
SHOP = {"item_ids": ["", "7", "70", "b/7", "A1", "a;2"],
        "titles": ["", "Alien", "Aliens", "Good, Bad and Ugly", "A lamp, green", "Steins;Gate"]}


@pytest.mark.parametrize("wanted, items", (
    ("Alien", [1]),                                 # the whole title, although another one holds it
    ("aliens", [2]),
    ("[7]", [1]), ("7", [1]), ("70;[A1]", [2, 4]),  # an id is exact
    ("good, bad and ugly", [3]), ("Bad and", [3]),
    ("lamp, green", [4]),                           # a comma of a title
    ("7, 70", [1, 2]), ("Bad, green", [3, 4]),      # a comma between titles
    ("lamp, green; 7", [4, 1]),                     # where there is a ; it separates
    ("Alien;", [1]), (";7 ; ;70;", [1, 2]),         # nothing is no title
    ("Steins;Gate", [5]), ("7;7", [1, 1]),
))
def test_history_means_ids_then_titles_then_parts(scripts, wanted, items):
    assert scripts[5].find_items(wanted, SHOP) == items


@pytest.mark.parametrize("wanted, said", (
    ("", "no title"), (" ; ;", "no title"), ("[]", "0 titles have '[]'"), ("[b]", "0 titles"), ("a", "5 titles"),
    ("7;no such", "0 titles have 'no such'"), ("lien", "2 titles have 'lien'"),
))
def test_history_that_is_unclear_gets_a_sentence(scripts, capsys, wanted, said):
    with pytest.raises(SystemExit) as stop:
        scripts[5].find_items(wanted, SHOP)
    assert stop.value.code == 2 and said in capsys.readouterr().err


def test_history_of_a_model_that_another_script_trained_gets_a_sentence(scripts, smoke, tmp_path, capsys):
    run = links(smoke, tmp_path / "run", "generator-mscgrec.pt")
    saved = load(run / "generator-mscgrec.pt")
    (run / "generator-mscgrec.pt").unlink()
    torch.save(saved | {"weights": saved["weights"] | {"more": torch.zeros(1)}}, run / "generator-mscgrec.pt")
    with pytest.raises(SystemExit) as stop:
        scripts[5].main(["--run", str(run), "--history", load(run / "data.pt")["item_ids"][3]])
    assert stop.value.code == 2 and "another model than this script's" in capsys.readouterr().err


def test_a_full_disk_leaves_the_old_history_png(scripts, smoke, tmp_path, monkeypatch, capsys):
    run = links(smoke, tmp_path / "run", "generator-mscgrec.pt")
    (run / "history.png").write_bytes(b"the old one")
    ask = ["--run", str(run), "--history", load(run / "data.pt")["item_ids"][3]]

    def half(page, file, *rest):
        file.write(b"half")
        raise OSError(28, "No space left on device")
    with monkeypatch.context() as patch:
        patch.setattr(Image.Image, "save", half)
        with pytest.raises(SystemExit) as stop:
            scripts[5].main(ask)
    assert stop.value.code == 2 and "history.png cannot be written" in capsys.readouterr().err
    assert (run / "history.png").read_bytes() == b"the old one" and not list(run.glob("*.partial"))
    scripts[5].main(ask)
    with Image.open(run / "history.png") as page:
        assert page.size == (1005, 290)


def test_a_console_that_lacks_letters_shows_question_marks(smoke, tmp_path):
    run = links(smoke, tmp_path / "run", "generator-mscgrec.pt")
    data = load(run / "data.pt")
    data["titles"][3] = "Caf\u00e9 \u00b1"
    for name in ("data.pt", "image_codes.pt", "text_codes.pt", "collab_codes.pt", "generator-mscgrec.pt"):
        saved = data if name == "data.pt" else load(run / name)
        (run / name).unlink()
        torch.save(saved | {"made_from": {}}, run / name)  # else it would be refused: made from other titles
    command = [sys.executable, SCRIPTS[4], "--run", run, "--history", data["item_ids"][3]]
    process = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert process.returncode == 0 and "Caf? ?" in process.stdout, process.stderr
