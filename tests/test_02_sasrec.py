"""SASRec: causal, its loss the full softmax, its ranking complete; the sampled softmax agrees with the full one."""
import torch


def model_of(scripts, N=30, T=6):
    torch.manual_seed(0)
    return scripts[2].SASRec(N, T, 16, 2, 2, 0.0).eval()


def test_later_items_change_nothing_before_them(scripts):
    model = model_of(scripts)
    history = torch.randint(1, 31, (4, 6))
    changed = history.clone()
    changed[:, -1] = changed[:, -1] % 30 + 1
    assert torch.allclose(model(history)[:, :-1], model(changed)[:, :-1], atol=1e-6)


def test_loss_is_the_softmax_over_all_real_items(scripts):
    hidden, embeddings, target = torch.randn(5, 8), torch.randn(31, 8), torch.randint(1, 31, (5,))
    embeddings[0] = 1e6  # padding takes no part, whatever it holds
    scores = hidden @ embeddings[1:].T
    by_hand = (scores.exp().sum(1).log() - scores[torch.arange(5), target - 1]).mean()
    assert torch.allclose(scripts[2].cross_entropy(hidden, embeddings, target), by_hand, atol=1e-4)


def test_sampled_softmax_has_the_gradient_of_the_full_one(scripts):
    """log-Q correction: averaged over many draws, the gradient is that of the full softmax, though q is skewed."""
    torch.manual_seed(0)
    N, n = 200, 40
    hidden, target = torch.randn(n, 8), torch.randint(1, N + 1, (n,))
    embeddings = (0.3 * torch.randn(N + 1, 8)).requires_grad_()
    counts = torch.cat([torch.zeros(1), 1000 / torch.arange(1.0, N + 1)])
    log_q = (counts / counts.sum()).log()
    full, = torch.autograd.grad(scripts[2].cross_entropy(hidden, embeddings, target), embeddings)
    corrected = torch.zeros_like(full)
    for _ in range(200):
        loss = scripts[2].cross_entropy(hidden, embeddings, target, log_q)
        corrected += torch.autograd.grad(loss, embeddings)[0] / 200
    cosine = torch.nn.functional.cosine_similarity(full.flatten(), corrected.flatten(), dim=0)
    assert cosine > 0.98, cosine


def test_recommendations_are_the_whole_ranking(scripts):
    model = model_of(scripts)
    events = torch.randint(1, 31, (24,), dtype=torch.int32)
    data = {"events": events, "offsets": torch.tensor([0, 5, 14, 24])}
    top, scores = scripts[2].recommend(model, data, "test", torch.arange(3), 6, 30, torch.device("cpu"))
    assert all(sorted(row) == list(range(1, 31)) for row in top.tolist())
    history = events[17:23][None].long()[:, -6:]
    expected = (model(history)[0, -1] @ model.items.weight[1:].T).argsort(descending=True) + 1
    assert top[2].tolist() == expected.tolist()


def test_histories_end_before_their_event(scripts):
    offsets = torch.tensor([0, 5, 14])
    start, length, target = scripts[2].histories(offsets, "valid", 4)
    assert (start.tolist(), length.tolist(), target.tolist()) == ([0, 8], [3, 4], [3, 12])
    start, length, target = scripts[2].histories(offsets, "test", 4)
    assert (start.tolist(), length.tolist(), target.tolist()) == ([0, 9], [4, 4], [4, 13])
