"""SASRec: causal, its loss the full softmax, its ranking complete; the sampled softmax agrees with the full one."""
import argparse
import hashlib
import os
import shutil
import signal
import subprocess
import time

import pytest
import torch

from conftest import command, run_script, script


def model_of(scripts, kind="SASRec", layers=2):
    """An untrained model of 30 items and 6 places."""
    torch.manual_seed(0)
    model = getattr(scripts[2], kind)(30, 6, 16, 2, layers, 0.0)
    return model.apply(scripts[2].initialise).eval()


@pytest.mark.parametrize("kind", ["SASRec", "PostNormSASRec"])
def test_later_items_change_nothing_before_them(scripts, kind):
    model = model_of(scripts, kind)
    history = torch.randint(1, 31, (4, 6))
    changed = history.clone()
    changed[:, -1] = changed[:, -1] % 30 + 1
    assert torch.allclose(model(history)[:, :-1], model(changed)[:, :-1], atol=1e-6)


def test_the_post_norm_variant_norms_what_comes_in_and_adds_its_head_to_what_comes_out(scripts):
    model = model_of(scripts, "PostNormSASRec", layers=0)
    history = torch.randint(1, 31, (4, 6))
    vectors = scripts[2].normed(model.items.weight[history]) + model.positions.weight[:6]
    normed = torch.nn.functional.layer_norm(vectors, (16,))
    torch.testing.assert_close(model(history), normed + normed @ model.head.weight.T + model.head.bias)


def test_loss_is_the_softmax_over_all_real_items(scripts):
    hidden, embeddings, target = torch.randn(5, 8), torch.randn(31, 8), torch.randint(1, 31, (5,))
    embeddings[0] = 1e6  # padding takes no part, whatever it holds
    scores = hidden @ embeddings[1:].T
    by_hand = (scores.exp().sum(1).log() - scores[torch.arange(5), target - 1]).sum()
    assert torch.allclose(scripts[2].cross_entropy(hidden, embeddings, target), by_hand, atol=1e-4)


@pytest.mark.parametrize("n", [600, 40, 0])
def test_loss_of_parts_is_the_loss_of_all(scripts, n):
    """600 targets are three parts. None at all: a process's share of a small batch may be empty."""
    torch.manual_seed(0)
    hidden, target = torch.randn(n, 8, requires_grad=True), torch.randint(1, 201, (n,))
    embeddings = (5 * torch.randn(201, 8)).requires_grad_()
    plain = torch.nn.functional.cross_entropy(hidden @ embeddings[1:].T, target - 1, reduction="sum")
    ours = scripts[2].cross_entropy(hidden, embeddings, target)
    torch.testing.assert_close(ours, plain)
    for a, b in zip(*(torch.autograd.grad(3 * loss, (hidden, embeddings)) for loss in (ours, plain))):
        assert torch.allclose(a, b, atol=1e-4)


def test_bfloat16_is_close(smoke, tmp_path):
    losses = []
    for precision in ("fp32", "bf16"):
        run = tmp_path / precision
        run.mkdir()
        os.symlink(smoke[0] / "data.pt", run / "data.pt")
        process = run_script(2, "--run", run, "--smoke", "--precision", precision)
        assert process.returncode == 0, process.stderr
        losses.append(torch.load(run / "sasrec.pt", weights_only=True)["losses"])
    assert not torch.equal(*losses)
    torch.testing.assert_close(*losses, atol=0.01, rtol=0.01)


def test_dropout_keeps_the_mean_and_is_off_in_evaluation(scripts):
    torch.manual_seed(0)
    layer, x = scripts[2].Dropout(0.25), torch.ones(400, 100)
    kept = layer(x)
    assert set(kept.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert abs(kept.mean() - 1) < 0.01 and torch.equal(layer.eval()(x), x)


def test_sampled_softmax_has_the_gradient_of_the_full_one(scripts):
    """Averaged over many draws, gradient and loss are those of the full softmax, though q is skewed."""
    torch.manual_seed(0)
    N, n = 200, 40
    hidden, target = torch.randn(n, 8), torch.randint(1, N + 1, (n,))
    embeddings = (0.3 * torch.randn(N + 1, 8)).requires_grad_()
    counts = torch.cat([torch.zeros(1), 1000 / torch.arange(1.0, N + 1)])
    log_q = (counts / counts.sum()).log()
    right = scripts[2].cross_entropy(hidden, embeddings, target)
    full, = torch.autograd.grad(right, embeddings)
    mean = 0
    gradient = torch.zeros_like(full)
    for _ in range(200):
        loss = scripts[2].sampled_cross_entropy(hidden, embeddings, target, log_q)
        mean += loss.item() / 200
        gradient += torch.autograd.grad(loss, embeddings)[0] / 200
    assert abs(mean / right - 1) < 0.01, (mean, right)
    assert (gradient - full).norm() < 0.05 * full.norm()


def test_a_target_that_is_drawn_against_itself_does_not_count(scripts):
    """A shop of one item: every draw is the target, nothing is left to compare with, the loss is 0."""
    hidden, vectors = torch.randn(5, 8), torch.randn(2, 8)
    log_q = torch.tensor([0.0, 1.0]).log()
    loss = scripts[2].sampled_cross_entropy(hidden, vectors, torch.ones(5, dtype=torch.long), log_q)
    assert loss.abs() < 1e-5


def alone(length):
    """The options of a ranking by one process."""
    return argparse.Namespace(length=length, rank=0, world=1, device="cpu")


def test_recommendations_are_the_whole_ranking(scripts):
    model = model_of(scripts)
    events = torch.randint(1, 31, (24,), dtype=torch.int32)
    data = {"events": events, "offsets": torch.tensor([0, 5, 14, 24])}
    top, scores = scripts[2].recommend(model, data, "test", torch.arange(3), 30, alone(6))
    assert all(sorted(row) == list(range(1, 31)) for row in top.tolist())
    history = events[17:23][None].long()[:, -6:]
    expected = (model(history)[0, -1] @ model.items.weight[1:].T).argsort(descending=True) + 1
    assert top[2].tolist() == expected.tolist()


def test_histories_end_before_their_event(scripts):
    offsets = torch.tensor([0, 5, 14])
    start, length = scripts[2].held_out_windows("valid", offsets, 4)
    assert (start.tolist(), length.tolist()) == ([0, 8], [3, 4])  # the events held out are 3 and 12
    start, length = scripts[2].held_out_windows("test", offsets, 4)
    assert (start.tolist(), length.tolist()) == ([0, 9], [4, 4])


def test_a_run_that_goes_on_at_its_recommendations_makes_the_same_batches(scripts, smoke, monkeypatch):
    """They must not depend on what training drew before: batches of other users round other bits."""
    s, data, made = scripts[2], torch.load(smoke[0] / "data.pt", weights_only=True), []
    batches = s.equal_length_batches
    monkeypatch.setattr(s, "equal_length_batches", lambda *given: made.append(batches(*given)) or made[-1])
    model = s.SASRec(len(data["item_ids"]) - 1, 20, 16, 2, 1, 0.5)
    for seed in (1, 2):
        torch.manual_seed(seed)
        s.recommend(model, data, "test", torch.arange(len(data["user_ids"])), 5, alone(20))
    assert all(torch.equal(*pair) for pair in zip(*made, strict=True))


def test_two_processes_learn_what_one_learns_with_twice_the_batch(smoke, tmp_path):
    losses, ndcg = [], []
    for name, batch, processes in (("one", 64, 1), ("two", 32, 2)):
        run = tmp_path / name
        run.mkdir()
        os.symlink(smoke[0] / "data.pt", run / "data.pt")
        process = run_script(2, "--run", run, "--smoke", "--device", "cpu", "--dropout", 0, "--epochs", 3,
                             "--batch", batch, processes=processes)
        assert process.returncode == 0, process.stderr
        saved = torch.load(run / "sasrec.pt", weights_only=True)
        losses.append(saved["losses"])
        ndcg.append(saved["ndcg"])
        ranking = torch.load(run / "predictions-sasrec-s0.pt", weights_only=True)["test"]
        assert ranking.min() > 0, "each process ranks for its share of the users, and all are put together"
    assert torch.allclose(*losses, atol=1e-4), losses
    assert torch.allclose(*ndcg, atol=0.02), ndcg  # equal scores may change places
    assert process.stdout.count("epoch   0") == 1 and not list(run.glob("*.partial"))
    assert {path.name for path in run.iterdir()} == {
        "data.pt", "sasrec.pt", "collab_codes.pt", "predictions-sasrec-s0.pt"}


def test_the_death_of_a_process_ends_the_run(smoke, tmp_path):
    os.symlink(smoke[0] / "data.pt", tmp_path / "data.pt")
    process = subprocess.Popen(command(2, "--run", tmp_path, "--smoke", "--device", "cpu", "--epochs", 100_000,
                                       processes=2),
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                               env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"})
    while not (tmp_path / "sasrec.checkpoint").exists():
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    ranks = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(ranks[-1]), signal.SIGKILL)
    _, message = process.communicate(timeout=60)
    assert process.returncode != 0 and "SIGKILL" in message
    assert {path.name for path in tmp_path.iterdir()} == {"data.pt", "sasrec.checkpoint"}


def test_max_steps_ends_training_and_says_what_an_epoch_takes(smoke, tmp_path):
    os.symlink(smoke[0] / "data.pt", tmp_path / "data.pt")
    process = run_script(2, "--run", tmp_path, "--smoke", "--max-steps", 3)
    assert process.returncode == 0, process.stderr
    assert "3 steps; an epoch has" in process.stdout and "hours" in process.stdout
    assert {path.name for path in tmp_path.iterdir()} == {"data.pt"}


def test_other_rows_of_the_table_leave_the_collaborative_codes_alone(smoke, tmp_path):
    """SASRec + content, SASRec with its original loss, with other norms: they have files of their own."""
    for file in ("data.pt", "text_codes.pt"):
        os.symlink(smoke[0] / file, tmp_path / file)
    rows = {"content": ("--content", "text"), "bce": ("--loss", "bce"), "post": ("--post-norm",)}
    refused = run_script(2, "--run", tmp_path, "--smoke", "--name", "text")  # its codes would replace those of 04
    assert refused.returncode == 2 and "a --name has sasrec" in refused.stderr
    for name, options in rows.items():
        process = run_script(2, "--run", tmp_path, "--smoke", "--name", f"sasrec-{name}", *options)
        assert process.returncode == 0, process.stderr
    assert {path.name for path in tmp_path.iterdir()} == {
        "data.pt", "text_codes.pt", *(f"sasrec-{name}.pt" for name in rows),
        *(f"collab-{name}_codes.pt" for name in rows), *(f"predictions-sasrec-{name}-s0.pt" for name in rows)}


def test_content_moves_an_item_that_was_never_bought(scripts):
    """Items of equal content and equal embedding are one item to the model; other content, another vector."""
    content = torch.randn(31, 5)
    content[7] = content[8]
    model = scripts[2].SASRec(30, 6, 16, 2, 1, 0.0, content).eval()
    with torch.no_grad():
        model.items.weight[6:9] = 0.0
        vectors = model.vectors()
    assert torch.equal(vectors[7], vectors[8]) and not torch.allclose(vectors[6], vectors[7])


def test_how_long_a_vector_is_tells_the_model_nothing_of_the_history(scripts):
    """It counts where the item is recommended, and there alone."""
    model = scripts[2].SASRec(30, 6, 16, 2, 1, 0.0).eval()
    history = torch.tensor([[1, 9, 3]])
    before = model(history)
    with torch.no_grad():
        model.items.weight[9] *= 100
    torch.testing.assert_close(model(history), before, atol=1e-3, rtol=1e-3)


# --- The loops: epochs, validation, processes -------------------------------------------------------------------------
def small_run(smoke, tmp_path, name):
    """A new run folder that holds the small shop, and that shop."""
    folder = tmp_path / name
    folder.mkdir()
    shutil.copy(smoke[0] / "data.pt", folder)
    return folder, torch.load(folder / "data.pt", weights_only=True)


def test_the_best_epoch_is_chosen_on_validation_never_on_test(smoke, tmp_path):
    """Three epochs on two shops that differ in their test events only: equal curves, equal best weights."""
    saved = []
    for name in ("real", "other"):
        folder, data = small_run(smoke, tmp_path, name)
        if name == "other":
            last = data["offsets"][1:] - 1
            data["events"][last] = data["events"][last].roll(7)
            torch.save(data, folder / "data.pt")
        process = run_script(2, "--run", folder, "--smoke", "--epochs", 3, "--lr", 0.01)
        assert process.returncode == 0, process.stderr
        saved.append(torch.load(folder / "sasrec.pt", weights_only=True))
    real, other = saved
    assert torch.equal(real["losses"], other["losses"]) and torch.equal(real["ndcg"], other["ndcg"])
    assert all(torch.equal(real["weights"][name], other["weights"][name]) for name in real["weights"])


def test_validation_is_the_mean_ndcg_of_the_last_but_one_event(scripts, smoke):
    """By hand, from the whole ranking: 1 / log2(place + 1), or 0 beyond the tenth place."""
    s, data = scripts[2], torch.load(smoke[0] / "data.pt", weights_only=True)
    args = s.options(["--smoke", "--device", "cpu"])
    args.rank, args.world = 0, 1
    N = len(data["item_ids"]) - 1
    torch.manual_seed(0)
    model = s.SASRec(N, 20, 16, 2, 1, 0.0)
    users = torch.arange(0, 200, 3)
    ranking, _ = s.recommend(model, data, "valid", users, N, args)
    target = data["events"][data["offsets"][users + 1] - 2]
    place = (ranking == target.unsqueeze(1)).float().argmax(1) + 1
    gain = torch.where(place <= 10, 1 / torch.log2(place + 1.0), 0.0)
    assert abs(s.validate(model, data, users, args) - gain.mean().item()) < 1e-6


def epoch_of(s, data, monkeypatch, epoch, rank=0):
    """What an epoch draws in one of four processes: its batches, and the first number after them."""
    made, drawn = [], []
    batches = s.equal_length_batches
    monkeypatch.setattr(s, "equal_length_batches", lambda *given: made.extend(batches(*given)) or made)
    monkeypatch.setattr(s, "train_step", lambda *given: drawn.append(torch.rand(()).item()) or 0.0)
    args = s.options(["--smoke", "--device", "cpu"])
    args.rank, args.world = rank, 4
    model = s.SASRec(len(data["item_ids"]) - 1, 20, 16, 2, 1, 0.5)
    s.train_epoch(model, model, None, {"ndcg": []}, epoch, data, args)
    monkeypatch.undo()
    return torch.cat(made).tolist(), drawn[0]


def test_each_epoch_draws_anew_and_each_process_its_own_dropout(scripts, smoke, monkeypatch):
    s, data = scripts[2], torch.load(smoke[0] / "data.pt", weights_only=True)
    batches, drawn = epoch_of(s, data, monkeypatch, 3)
    assert epoch_of(s, data, monkeypatch, 3) == (batches, drawn), "an epoch is the same when it is repeated"
    assert epoch_of(s, data, monkeypatch, 4)[0] != batches, "another epoch has other batches"
    others = [epoch_of(s, data, monkeypatch, 3, rank) for rank in (1, 2, 3)]
    assert all(of_other == batches for of_other, _ in others), "processes share their batches"
    assert len({drawn, *(by_other for _, by_other in others)}) == 4, "processes do not share their dropout"


def test_the_learning_rate_rises_then_falls_and_ends_at_nothing(scripts):
    """By hand: half of the rise, its end, the middle of the training, half of the fall, its end."""
    s = scripts[2]
    for done, share in ((s.WARM_UP / 2, 0.5), (s.WARM_UP, 1), (0.5, 1), (1 - s.COOL_DOWN / 2, 0.5), (1, 0)):
        assert s.learning_rate(done, 0.01) == pytest.approx(0.01 * share, abs=1e-12)


def test_each_step_takes_its_place_in_the_schedule_however_many_steps_an_epoch_has(scripts, smoke, monkeypatch):
    """Three epochs, their rates in a row: one rise, one fall, no jump between epochs, at last next to nothing."""
    s, data, rates = scripts[2], torch.load(smoke[0] / "data.pt", weights_only=True), []
    monkeypatch.setattr(s, "train_step", lambda *given: rates.append(given[3]) or 0.0)
    args = s.options(["--smoke", "--device", "cpu", "--epochs", "3", "--batch", "16"])
    args.rank, args.world = 0, 1
    model = s.SASRec(len(data["item_ids"]) - 1, 20, 16, 2, 1, 0.5)
    for epoch in range(3):
        s.train_epoch(model, model, None, {"ndcg": []}, epoch, data, args)
    rates = torch.tensor(rates)
    highest = rates.argmax()
    assert (rates[:highest + 1].diff() >= 0).all() and (rates[highest:].diff() <= 0).all()
    assert 0 < rates[-1] < 0.1 * args.lr and rates.max() == args.lr
    assert rates[highest:].diff().abs().max() < 0.2 * args.lr


def test_validation_that_stands_still_ends_nothing_and_the_best_epoch_is_kept(scripts, smoke, tmp_path, monkeypatch):
    """A plateau of twenty epochs, then a better one, then worse: all are made, and that one is kept."""
    s, weights = script(2), []
    figures = [0.1, *[0.05] * 20, 0.3, 0.2]
    monkeypatch.setattr(s, "validate", lambda model, *rest: (
        weights.append(model.items.weight.detach().clone()), figures[len(weights) - 1])[1])
    folder, _ = small_run(smoke, tmp_path, "plateau")
    s.main(["--run", str(folder), "--smoke", "--device", "cpu", "--epochs", str(len(figures)), "--lr", "0.01"])
    saved = torch.load(folder / "sasrec.pt", weights_only=True)
    torch.testing.assert_close(saved["ndcg"], torch.tensor(figures))
    assert torch.equal(saved["weights"]["items.weight"], weights[21])


def test_a_target_weighs_the_same_in_every_batch(scripts):
    """One step of plain gradient descent is lr * the gradient of the summed loss / --batch."""
    s = scripts[2]
    args = s.options(["--device", "cpu", "--batch", "64"])
    model = model_of(scripts)
    events = torch.randint(1, 31, (3, 5))
    hidden = model(events[:, :-1]).flatten(0, 1)
    loss = s.cross_entropy(hidden, model.vectors(), events[:, 1:].flatten())
    gradient, = torch.autograd.grad(loss, model.items.weight)
    before = model.items.weight.detach().clone()
    optimizer = torch.optim.SGD(model.parameters())
    returned = s.train_step(model, model, optimizer, 0.1, events, None, args)
    assert returned == pytest.approx(loss.item())
    torch.testing.assert_close(model.items.weight.detach(), before - 0.1 * gradient / 64)


def test_two_runs_in_one_process_do_not_mix(scripts, smoke, tmp_path):
    """A notebook that trains on one shop and then on another: each run remembers its own files only."""
    for name in ("one", "two"):
        folder, data = small_run(smoke, tmp_path, name)
        data["titles"][1] = name  # another shop, so another hash
        torch.save(data, folder / "data.pt")
        scripts[2].main(["--run", str(folder), "--smoke", "--epochs", "1", "--device", "cpu"])
    ours = torch.load(folder / "sasrec.pt", weights_only=True)["made_from"]
    with open(folder / "data.pt", "rb") as file:
        assert ours == {"data.pt": hashlib.file_digest(file, "sha256").hexdigest()}


def test_two_processes_with_dropout_learn_as_fast_as_one(smoke, tmp_path):
    """Each draws its own dropout, so nothing is equal, but the mean loss of the epochs is, within noise."""
    losses = []
    for name, batch, processes in (("one", 64, 1), ("two", 32, 2)):
        folder, _ = small_run(smoke, tmp_path, name)
        process = run_script(2, "--run", folder, "--smoke", "--device", "cpu", "--epochs", 20,
                             "--batch", batch, processes=processes)
        assert process.returncode == 0, process.stderr
        losses.append(torch.load(folder / "sasrec.pt", weights_only=True)["losses"])
    one, two = losses
    assert not torch.equal(one, two)
    assert abs(one[-5:].mean() - two[-5:].mean()) < 0.05, losses
