"""03_dino_quantizer.py: the ViT has the public names; quantiser, loss and step do what the equations say."""

import argparse
import copy
import hashlib
import itertools
import json
import math
import os
import signal
import subprocess

import pytest
import torch

from conftest import command, script

dino = script(3)

TINY = ["--smoke", "--device", "cpu", "--batch", "8", "--width", "12"]


def write_run(run, N=24, without=(3, 7), S=16, seed=0):
    """A run folder as 01_data.py leaves it: N items of flat colour with a bar, some without a picture."""
    rng = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (N + 1, 3, 1, 1), generator=rng).expand(-1, -1, S, S).to(torch.uint8).clone()
    images[::2, :, S // 4:S // 2] = 255
    has_image = torch.ones(N + 1, dtype=torch.bool)
    has_image[[0, *without]] = False
    images[~has_image] = 0
    run.mkdir(exist_ok=True)
    torch.save({"made_from": {}, "images": images}, run / "images.pt")
    torch.save({"made_from": {}, "has_image": has_image, "titles": [""] + [f"item {i}" for i in range(1, N + 1)],
                "train_counts": torch.arange(N + 1, dtype=torch.int32)}, run / "data.pt")
    return run


def read(run):
    return [torch.load(run / name, weights_only=True) for name in ("dino.pt", "image_codes.pt")]


def check_codes(codes, N):
    assert codes["codes"].dtype == torch.int16 and codes["codes"].shape == (N + 1, 4)
    assert (codes["codes"][0] == -1).all() and (codes["codes"][1:] >= 0).all()
    assert len(codes["codes"][1:].unique(dim=0)) == N
    assert not codes["embeddings"][~codes["known"]].any()


def expected_shapes(width, depth, patch, places):
    """The table of the public ViT: what its checkpoint holds, written by hand."""
    block = {"norm1.weight": (width,), "norm1.bias": (width,),
             "attn.qkv.weight": (3 * width, width), "attn.qkv.bias": (3 * width,),
             "attn.proj.weight": (width, width), "attn.proj.bias": (width,),
             "norm2.weight": (width,), "norm2.bias": (width,),
             "mlp.fc1.weight": (4 * width, width), "mlp.fc1.bias": (4 * width,),
             "mlp.fc2.weight": (width, 4 * width), "mlp.fc2.bias": (width,)}
    return {"cls_token": (1, 1, width), "pos_embed": (1, places, width),
            "patch_embed.proj.weight": (width, 3, patch, patch), "patch_embed.proj.bias": (width,),
            "norm.weight": (width,), "norm.bias": (width,),
            **{f"blocks.{i}.{name}": shape for i in range(depth) for name, shape in block.items()}}


def test_vit_small_has_the_public_names_and_shapes():
    vit = dino.VisionTransformer(224, 16, 384, 12)
    assert {n: tuple(w.shape) for n, w in vit.state_dict().items()} == expected_shapes(384, 12, 16, 197)
    assert vit.blocks[0].heads == 6
    assert sum(w.numel() for w in vit.parameters()) == 21_665_664
    assert [dino.Block(w).heads for w in (96, 192, 768)] == [3, 3, 12]


def test_block_is_softmax_attention_and_an_mlp():
    torch.manual_seed(0)
    block, x = dino.Block(12), torch.randn(2, 5, 12)
    q, k, v = block.attn["qkv"](block.norm1(x)).view(2, 5, 3, 3, 4).permute(2, 0, 3, 1, 4)
    weights = (q @ k.transpose(2, 3) / 4 ** 0.5).softmax(-1)
    middle = x + block.attn["proj"]((weights @ v).transpose(1, 2).reshape(2, 5, 12))
    hidden = torch.nn.functional.gelu(block.mlp["fc1"](block.norm2(middle)))
    torch.testing.assert_close(block(x), middle + block.mlp["fc2"](hidden))


@pytest.mark.parametrize("wrap", [lambda s: s,
                                  lambda s: {"teacher": {f"backbone.{n}": w for n, w in s.items()}},
                                  lambda s: {"student": {f"module.backbone.{n}": w for n, w in s.items()}
                                             | {"module.head.mlp.0.weight": torch.zeros(2, 2)}}])
def test_init_reads_what_was_saved(tmp_path, wrap):
    torch.manual_seed(0)
    vit, x = dino.VisionTransformer(16, 4, 12, 2), torch.rand(2, 3, 16, 16)
    torch.save(wrap(vit.state_dict()), tmp_path / "vit.pth")
    torch.testing.assert_close(dino.load_backbone(tmp_path / "vit.pth", 16)(x), vit(x))
    larger = dino.load_backbone(tmp_path / "vit.pth", 32)
    assert larger.pos_embed.shape == (1, 65, 12) and larger(torch.rand(1, 3, 32, 32)).shape == (1, 12)
    assert vit(torch.rand(1, 3, 8, 8)).shape == (1, 12)


def test_init_reads_a_whole_checkpoint_of_the_release(tmp_path):
    """It has the options of its command beside the networks, an argparse.Namespace."""
    torch.manual_seed(0)
    vit, x = dino.VisionTransformer(16, 4, 12, 2), torch.rand(2, 3, 16, 16)
    teacher = {f"backbone.{n}": w for n, w in vit.state_dict().items()} | {"head.last_layer.weight_g": torch.ones(3, 1)}
    options = argparse.Namespace(arch="vit_small", patch_size=4)
    torch.save({"teacher": teacher, "student": {}, "epoch": 100, "args": options}, tmp_path / "checkpoint.pth")
    torch.testing.assert_close(dino.load_backbone(tmp_path / "checkpoint.pth", 16)(x), vit(x))


def foreign_weights(kind, path):
    """A file that people may try to give as --init."""
    vit = dino.VisionTransformer(16, 4, 12, 1).state_dict()
    if kind == "DINOv2":  # the same names, and some more
        torch.save(vit | {"mask_token": torch.zeros(1, 12), "blocks.0.ls1.gamma": torch.ones(12)}, path)
    if kind == "transformers":  # other names
        torch.save({f"vit.encoder.{name}": weight for name, weight in vit.items()}, path)
    if kind == "safetensors":
        header = json.dumps({"cls_token": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
        path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    if kind == "a tensor":
        torch.save(torch.zeros(2), path)
    if kind == "no vit":
        torch.save({"weights": torch.zeros(2)}, path)
    if kind == "text":
        path.write_text("version https://git-lfs.github.com/spec/v1")


@pytest.mark.parametrize("kind", ("DINOv2", "transformers", "safetensors", "a tensor", "no vit", "text", "missing"))
def test_init_that_does_not_fit_is_one_sentence_that_says_what_fits(tmp_path, kind, capsys):
    foreign_weights(kind, tmp_path / "no.pth")
    with pytest.raises(SystemExit) as end:
        dino.load_backbone(tmp_path / "no.pth", 16)
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.count("\n") == 1 and "no.pth" in said
    assert "facebookresearch/dino" in said and "dino.pt" in said and "DINOv2" in said and ".safetensors" in said


def test_init_whose_patches_do_not_tile_the_crops_is_one_sentence(tmp_path, capsys):
    torch.save(dino.VisionTransformer(16, 4, 12, 1).state_dict(), tmp_path / "vit.pth")
    with pytest.raises(SystemExit) as end:
        dino.load_backbone(tmp_path / "vit.pth", 18)
    assert end.value.code == 2 and "Patches of 4 must tile crops of 18" in capsys.readouterr().err


def test_quantiser_is_the_brute_force_argmin():
    torch.manual_seed(0)
    z, codebooks = torch.randn(40, 6), torch.randn(3, 8, 6)
    z_q, commitment = dino.ResidualQuantiser(codebooks.clone())(z)
    codes, left = dino.quantise(z, codebooks)
    lost = 0
    for n in range(40):
        residual = z[n]
        for level in range(3):
            distances = torch.stack([(residual - c).square().sum() for c in codebooks[level]])
            assert codes[n, level] == distances.argmin()
            residual = residual - codebooks[level, codes[n, level]]
            lost = lost + residual.square().mean()
        torch.testing.assert_close(z_q[n], z[n] - residual)
        torch.testing.assert_close(left[n], residual)
    torch.testing.assert_close(commitment, lost)


def test_gradient_is_straight_through_plus_commitment():
    torch.manual_seed(0)
    z, upstream = torch.randn(5, 6, requires_grad=True), torch.randn(5, 6)
    quantiser = dino.ResidualQuantiser(torch.randn(3, 8, 6))
    z_q, commitment = quantiser(z)
    codes, _ = dino.quantise(z.detach(), quantiser.codebooks)
    (z_q * upstream).sum().backward(retain_graph=True)
    torch.testing.assert_close(z.grad, upstream)
    z.grad = None
    commitment.backward()
    said = torch.stack([C[c] for C, c in zip(quantiser.codebooks, codes.T)]).cumsum(0)  # (3, 5, 6)
    torch.testing.assert_close(z.grad, 2 * (z.detach() - said).sum(0) / 6)


def test_codebooks_follow_their_members_and_dead_codes_restart():
    codebooks = torch.tensor([[0.0, 10, 99]]).view(1, 3, 1).repeat(3, 1, 1)
    quantiser = dino.ResidualQuantiser(codebooks)
    z = torch.tensor([[0.0], [2], [10], [14]])
    quantiser.update(z, decay=0)
    assert quantiser.codebooks[0, :2].flatten().tolist() == [1, 12]
    assert quantiser.codebooks[0, 2] in z, "99 had no member, so it restarts at a vector of the batch"
    far = dino.ResidualQuantiser(torch.tensor([[0.0, 99]]).view(1, 2, 1).repeat(3, 1, 1))
    for _ in range(100):
        far.update(z)
    assert far.codebooks[0].max() < 20


def test_loss_leaves_out_pairs_of_one_view():
    torch.manual_seed(0)
    p_t, logits = torch.randn(2, 3, 7).softmax(2), torch.randn(5, 3, 7)
    terms = []
    for t in range(2):
        for v in range(5):
            if t != v:
                log_p = (logits[v] / 0.1).log_softmax(1)
                terms += [-(p_t[t, b] * log_p[b]).sum() for b in range(3)]
    assert len(terms) == 8 * 3
    torch.testing.assert_close(dino.dino_loss(p_t, logits), 3 * torch.stack(terms).mean())


# --- One step of training, against its equations ----------------------------------------------------------------------
def tiny_model(seed, bf16=False):
    torch.manual_seed(seed)
    return dino.Model(dino.VisionTransformer(8, 4, 12, 1), dino.Head(12, 10), bf16)


def one_step(epoch, step=6, steps=20):
    """A step of a tiny student, and all that there was before it and is after it. Three pictures, two crops of
    8 px and two of 4, a teacher that is another network."""
    student, teacher = tiny_model(0), tiny_model(1).requires_grad_(False)
    student.quantiser = dino.ResidualQuantiser(0.5 * torch.randn(3, 4, 12))
    views = (torch.rand(2, 3, 3, 8, 8), torch.rand(2, 3, 3, 4, 4))
    before = copy.deepcopy((student, teacher))
    losses = dino.train_step(student, student, teacher, dino.make_optimizer(student), views, 3,
                             step, steps, epoch)
    return before, (student, teacher), views, losses


def hand_made_p_t(out):
    """Sinkhorn without logarithms: of a table of crops and prototypes columns and rows are divided by their sums."""
    q = (out.double() / 0.015).exp()
    for _ in range(3):
        q = q / q.sum(1, keepdim=True)
        q = q / q.sum(0)
    return (q / q.sum(1, keepdim=True)).float()


def hand_made_koleo(z):
    """z: (b, E), one crop of each picture"""
    z, terms = z / z.norm(dim=1, keepdim=True), []
    for i in range(len(z)):
        others = z[[j for j in range(len(z)) if j != i]].detach()
        terms.append(-(z[i] - others).norm(dim=1).min().log())
    return torch.stack(terms).mean()


def hand_made_losses(student, teacher, views):
    """L_DINO, its entropy, the commitment and KoLeo, each a mean over what it is said of, crop by crop."""
    crops = [*views[0], *views[1]]  # V of (B, 3, side, side)
    p_t = hand_made_p_t(torch.cat([teacher.head(teacher.backbone(x)) for x in crops[:2]])).chunk(2)
    koleo = torch.stack([hand_made_koleo(student.backbone(x)) for x in crops[:2]]).mean()
    log_p_s, commitment = [], []
    for x in crops:
        z = student.backbone(x)
        z_q = torch.zeros_like(z)
        for codebook in student.quantiser.codebooks:
            z_q = z_q + codebook[torch.cdist(z.detach() - z_q, codebook).argmin(1)]
            commitment.append((z - z_q).square().mean(1))
        log_p_s.append((student.head(z + (z_q - z).detach()) / 0.1).log_softmax(1))
    pairs = [-(p_t[t] * log_p_s[v]).sum(1).mean() for t in range(2) for v in range(4) if t != v]
    entropy = -(torch.stack(p_t) * torch.stack(p_t).log()).nansum(2).mean()
    return torch.stack(pairs).mean(), entropy, 3 * torch.stack(commitment).mean(), koleo


def test_a_step_returns_the_loss_and_the_entropy_of_its_equations():
    """No centring, or another temperature, would be another p_t."""
    before, _, views, losses = one_step(epoch=1)
    l_dino, entropy, _, _ = hand_made_losses(*before, views)
    torch.testing.assert_close(losses, torch.stack([l_dino, entropy]).detach())


def test_centring_gives_every_prototype_its_share_where_softmax_gives_all_to_one():
    torch.manual_seed(0)
    out = 0.02 * torch.randn(64, 8) + torch.tensor([0.5] + 7 * [0])  # all crops are nearest to prototype 0
    assert (out / 0.015).softmax(1).mean(0)[0] > 0.99
    p_t = dino.sinkhorn(out)
    torch.testing.assert_close(p_t, hand_made_p_t(out))
    torch.testing.assert_close(p_t.sum(1), torch.ones(64))
    torch.testing.assert_close(p_t.mean(0), torch.full((8,), 1 / 8), atol=0.01, rtol=0)
    assert torch.special.entr(p_t).sum(1).mean() < 1.7, "of log 8 = 2.08: a crop is still sure of what it shows"
    assert dino.sinkhorn(torch.tensor([[1.0, -1], [1, -1]])).isfinite().all()


def test_koleo_pushes_a_picture_off_its_nearest_and_bears_equal_ones():
    z = torch.tensor([[[3.0, 0], [0.8, 0.6], [-2, 0]]]).repeat(2, 1, 1).requires_grad_()
    value = dino.koleo(z, z.detach())
    torch.testing.assert_close(value / 3, hand_made_koleo(z[0]))
    value.backward()
    assert z.grad[0, 1, 1] < 0 and z.grad[0, 0, 1] > 0, "a step against the gradient turns the first two apart"
    assert z.grad[0, 0, 0].abs() < 1e-6, "lengths are free"
    same = torch.ones(2, 3, 2, requires_grad=True)
    dino.koleo(same, same.detach()).backward()
    assert same.grad.isfinite().all() and dino.koleo(z[:, :1], z[:, :1].detach()) == 0


@pytest.mark.parametrize("epoch", (0, 1))
def test_a_step_is_adamw_on_the_clipped_gradient_of_the_three_terms(epoch):
    """The first step of AdamW is lr g / (|g| + eps), after the weight has lost lr times decay of itself."""
    (student, teacher), (after, _), views, _ = one_step(epoch)
    l_dino, _, commitment, koleo = hand_made_losses(student, teacher, views)
    (l_dino + 0.25 * commitment + 0.1 * koleo).backward()
    if epoch == 0:
        student.head.last_layer.weight.grad = None
    gradients = [w.grad for w in student.parameters() if w.grad is not None]
    norm = torch.stack([g.square().sum() for g in gradients]).sum().sqrt()
    cosine = (1 + math.cos(0.3 * math.pi)) / 2
    lr, decay = 3e-3 * cosine, 0.4 - 0.36 * cosine
    for (name, old), new in zip(student.named_parameters(), after.parameters()):
        if old.grad is None:
            assert epoch == 0 and name == "head.last_layer.weight" and torch.equal(old, new)
            continue
        g = old.grad * min(1, 3 / norm)
        expected = old * (1 - lr * decay * (old.ndim > 1)) - lr * g / (g.abs() + 1e-8)
        clear = g.abs() > 1e-5  # the gradient of the keys' bias is 0 but for rounding
        torch.testing.assert_close(new[clear], expected[clear], atol=1e-6, rtol=0)


def test_the_gradient_of_a_step_is_clipped_at_3_all_together():
    """AdamW's first step does not show it, but its mean of gradients does: a tenth of this one."""
    student, teacher = tiny_model(0), tiny_model(1).requires_grad_(False)
    optimizer, views = dino.make_optimizer(student), (torch.rand(2, 3, 3, 8, 8), torch.rand(2, 3, 3, 4, 4))
    with torch.no_grad():
        for weight in (student.head.mlp[0].weight, student.head.mlp[4].weight, student.head.mlp[4].bias):
            weight.mul_(1e-3)  # of a short vector the direction is easily changed: a large gradient
    dino.train_step(student, student, teacher, optimizer, views, 3, 6, 20, 1)
    means = [optimizer.state[w]["exp_avg"] for w in student.parameters()]
    norm = 10 * torch.stack([m.square().sum() for m in means]).sum().sqrt()
    torch.testing.assert_close(norm, torch.tensor(3.0), atol=1e-3, rtol=0)


def test_a_step_moves_teacher_and_codebooks():
    """teacher = m teacher + (1 - m) student; centroids follow the z of all crops."""
    (student, teacher), (new_student, new_teacher), views, _ = one_step(epoch=1)
    m = 1 - (1 - (1 - 1 / 2)) * (1 + math.cos(0.3 * math.pi)) / 2  # 20 steps: from 1/2, of an average over 2
    for old, new, weight in zip(teacher.parameters(), new_teacher.parameters(), new_student.parameters()):
        torch.testing.assert_close(new, m * old + (1 - m) * weight)
    z = torch.cat([student.backbone(x) for x in (*views[0], *views[1])]).detach()
    student.quantiser.update(z)
    torch.testing.assert_close(new_student.quantiser.codebooks, student.quantiser.codebooks)
    assert not torch.equal(new_student.quantiser.codebooks, one_step(epoch=1)[0][0].quantiser.codebooks)


def test_rates_warm_up_and_follow_a_cosine():
    quarter = (1 + math.cos(math.pi / 4)) / 2
    for done, lr, decay in ((0, 3e-5, 0.04), (0.05, 1.53e-3, 0.04222), (0.25, quarter * 3e-3, 0.4 - 0.36 * quarter),
                            (0.5, 1.5e-3, 0.22), (1, 0, 0.4)):
        assert dino.learning_rate(done) == pytest.approx(lr)
        assert dino.weight_decay(done) == pytest.approx(decay, rel=1e-3)
    for steps, first in ((100_000, 0.996), (2_500, 0.99), (10, 0.5)):
        assert dino.teacher_momentum(0, steps) == pytest.approx(first)
        assert dino.teacher_momentum(0.5, steps) == pytest.approx(1 - (1 - first) / 2)
        assert dino.teacher_momentum(1, steps) == 1


# --- Crops and what chance decides ------------------------------------------------------------------------------------
def test_every_epoch_shuffles_and_draws_anew_and_from_its_own_seed(tmp_path, monkeypatch):
    """Three epochs with seed 5: the views of epoch e follow from 5000 + e alone, whatever came before."""
    seen = []

    def spy(student, replica, teacher, optimizer, views, B, step, steps, epoch):
        seen.append((views, B, step, steps, epoch))
        torch.rand(step)  # what a step draws must not reach the next epoch
        return torch.zeros(2)
    monkeypatch.setattr(dino, "train_step", spy)
    run = write_run(tmp_path / "run")
    dino.main(["--run", str(run), *TINY, "--epochs", "3", "--seed", "5"])
    assert [(B, step, steps, epoch) for _, B, step, steps, epoch in seen] == [
        ((8, 8, 6)[step % 3], step, 9, step // 3) for step in range(9)]
    images, items = torch.load(run / "images.pt")["images"], torch.load(run / "data.pt")["has_image"].nonzero()[:, 0]
    for epoch in range(3):
        rng = torch.Generator().manual_seed(5000 + epoch)
        batch = items[torch.randperm(22, generator=rng)][:8]
        expected = dino.make_views(images[batch] / 255, 2 * torch.rand(4, 8, 12, generator=rng) - 1, 16, 4)
        for view, other in zip(seen[3 * epoch][0], expected):
            assert torch.equal(view, other)
    assert not torch.equal(seen[0][0][0], seen[3][0][0])


def test_a_share_of_a_batch_has_the_views_that_it_has_in_the_whole(monkeypatch):
    """Several processes: each draws for all, so the same numbers, and takes its own."""
    images = torch.randint(256, (8, 3, 16, 16), dtype=torch.uint8)
    batch, vit = torch.tensor([5, 1, 7, 2, 3]), dino.VisionTransformer(16, 4, 12, 1)
    rng = torch.Generator().manual_seed(0)
    whole, after = dino.views_of(images[batch], 5, 5, vit, rng), rng.get_state()
    for rank in range(2):
        monkeypatch.setattr(dino, "my_share", lambda rank=rank: slice(rank, None, 2))
        share = dino.views_of(next(dino.read_ahead([batch], images)), 5, 5, vit, rng.manual_seed(0))
        assert [view.shape[:2] for view in share] == [(2, 3 - rank), (3, 3 - rank)]
        for view, of_whole in zip(share, whole):
            torch.testing.assert_close(view, of_whole[:, rank::2])
        assert torch.equal(rng.get_state(), after)


def test_crops_are_pictures_of_their_own():
    torch.manual_seed(0)
    x, luck = torch.rand(6, 3, 16, 16), 2 * torch.rand(6, 12) - 1
    view = dino.crops(x, 8, (0.3, 0.7), luck)
    assert view.shape == (6, 3, 8, 8) and 0 <= view.min() and view.max() <= 1
    same = dino.crops(x[:1].repeat(6, 1, 1, 1), 8, (0.3, 0.7), luck)
    assert len(same.flatten(1).unique(dim=0)) == 6
    torch.testing.assert_close(dino.crops(x, 8, (0.3, 0.7), luck)[1::2],
                               dino.crops(x[1::2], 8, (0.3, 0.7), luck[1::2]))
    plain = torch.zeros(6, 12)
    plain[:, [4, 11]] = 1  # not mirrored, not grey
    torch.testing.assert_close(dino.crops(x, 16, (1, 1), plain), x)
    torch.testing.assert_close(dino.crops(x, 16, (1, 1), plain * torch.tensor([-1] * 11 + [1])), x.flip(3))
    assert dino.crops(x[:0], 8, (0.3, 0.7), luck[:0]).shape == (0, 3, 8, 8)


def view_of(colour, **draws):
    """The colour that a flat picture has in a view: only the named draws are not 0. -> (3,)"""
    names = "area stretch left top mirror light contrast saturation red green blue grey".split()
    luck = torch.zeros(1, 12)
    luck[0, 11] = 1  # not grey
    for name, draw in draws.items():
        luck[0, names.index(name)] = draw
    flat = torch.tensor(colour).view(1, 3, 1, 1).expand(-1, -1, 8, 8)
    return dino.crops(flat, 8, (1, 1), luck)[0, :, 4, 4]


def test_white_balance_gives_a_pale_background_any_tint_but_leaves_a_strong_colour_its_name():
    torch.testing.assert_close(view_of([0.5, 0.5, 0.5], red=1, blue=-1), torch.tensor([0.6, 0.5, 0.4]))
    for red, green, blue in itertools.product((-1, 1), repeat=3):
        strong = view_of([0.7, 0.1, 0.1], red=red, green=green, blue=blue)
        assert strong.argmax() == 0 and strong[0] > 4 * strong[1:].max()


def test_three_of_ten_views_are_grey():
    torch.testing.assert_close(view_of([0.9, 0.3, 0.3], grey=-0.41), torch.full((3,), 0.5))
    torch.testing.assert_close(view_of([0.9, 0.3, 0.3], grey=-0.39), torch.tensor([0.9, 0.3, 0.3]))


def test_the_last_block_may_answer_for_its_first_token_only():
    torch.manual_seed(0)
    block, x = dino.Block(12), torch.randn(2, 5, 12)
    torch.testing.assert_close(block(x, 1), block(x)[:, :1])


def test_overflow_moves_to_the_nearest_place_with_room():
    """15 equal items at K = 2, where a place holds 2: the walk over all places says where each goes."""
    codebooks, x = torch.tensor([[[0.0], [8]], [[0.0], [3]], [[0.0], [1]]]), torch.tensor([0.2])
    embeddings, known = x.repeat(16, 1), torch.arange(16) > 0
    codes, moved = dino.finish_codes(embeddings, known, codebooks, torch.zeros(16, dtype=torch.int32),
                                     torch.Generator().manual_seed(0))
    order = []  # depth first: the nearest at level 1, there the nearest at level 2, there at level 3
    for one in sorted(range(2), key=lambda k: abs(x - codebooks[0, k]).item()):
        for two in sorted(range(2), key=lambda k: abs(x - codebooks[0, one] - codebooks[1, k]).item()):
            rest = x - codebooks[0, one] - codebooks[1, two]
            order += [(one, two, k) for k in sorted(range(2), key=lambda k: abs(rest - codebooks[2, k]).item())]
    expected = sorted(list(itertools.islice((p for p in order for _ in range(2)), 15)))
    assert sorted(map(tuple, codes[1:, :3].tolist())) == expected and moved == 13
    assert len(codes[1:].unique(dim=0)) == 15


def test_who_is_served_worst_moves_and_the_most_bought_is_numbered_first():
    """Three items at the prefix 0 0 0, which has room for two: the one that is .2 away goes to 0 0 1."""
    codebooks, x = torch.tensor([[[0.0], [8]], [[0.0], [3]], [[0.0], [1]]]), torch.tensor([[0.0], [0.1], [0.2], [0.05]])
    counts = torch.tensor([0, 3, 4, 5], dtype=torch.int32)
    codes, moved = dino.finish_codes(x, torch.arange(4) > 0, codebooks, counts, torch.Generator())
    assert codes[1:].tolist() == [[0, 0, 0, 1], [0, 0, 1, 0], [0, 0, 0, 0]] and moved == 1


def test_kmeans_ends_at_means_and_survives_few_vectors():
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(40, 5, generator=rng)
    codebook = dino.kmeans(x, 4, rng)
    codes = dino.nearest(x, codebook)
    torch.testing.assert_close(codebook, torch.stack([x[codes == k].mean(0) for k in range(4)]))
    few = dino.kmeans(x[:3], 8, rng)
    assert (x[:3] - few[dino.nearest(x[:3], few)]).abs().max() < 1e-6


def test_codes_are_the_argmin_chain_and_seeded(tmp_path):
    runs = [write_run(tmp_path / name) for name in "ab"]
    for run in runs:
        dino.main(["--run", str(run), *TINY, "--epochs", "2"])
    curves, codes = read(runs[0])
    check_codes(codes, 24)
    residual, agree = codes["embeddings"], codes["known"].clone()
    for level, codebook in enumerate(codes["codebooks"]):
        nearest = torch.cdist(residual, codebook).argmin(1)
        agree &= nearest == codes["codes"][:, level]
        residual = residual - codebook[nearest]
    assert agree.sum() == codes["known"].sum() - codes["moved"] and codes["known"].sum() == 22
    assert torch.equal(codes["codes"], read(runs[1])[1]["codes"])
    assert curves["losses"].shape == (2,) and curves["teacher_entropy"].shape == (2,)
    assert curves["losses"].isfinite().all() and (curves["losses"] >= curves["teacher_entropy"]).all()
    assert {n.split(".")[0] for n in curves["teacher"]} == {"backbone", "head"}
    dino.main(["--run", str(runs[1]), *TINY, "--init", str(runs[0] / "dino.pt"), "--local-crops", "0"])
    check_codes(read(runs[1])[1], 24)


def test_plain_is_dino_and_k_means(tmp_path):
    run = write_run(tmp_path / "run")
    dino.main(["--run", str(run), *TINY, "--plain"])
    curves, codes = read(run)
    check_codes(codes, 24)
    assert curves["options"]["plain"] and codes["codebooks"].abs().sum() > 0


@pytest.mark.parametrize("pictures", [0, 1, 2])
def test_few_pictures_or_none(tmp_path, pictures, capsys):
    run = write_run(tmp_path / "run", N=12, without=range(1 + pictures, 13))
    for extra in ([], ["--plain"]):
        dino.main(["--run", str(run), *TINY, *extra])
        curves, codes = read(run)
        check_codes(codes, 12)
        assert codes["known"].sum() == pictures and codes["embeddings"].isfinite().all()
    if not pictures:
        assert codes["embeddings"].shape == (13, 1) and codes["codebooks"].shape == (3, 8, 1)
        assert "0 pictures" in capsys.readouterr().out


@pytest.mark.parametrize("options", [["--epochs", "0"], ["--max-steps", "-1"], ["--width", "10"], ["--out-dim", "0"],
                                     ["--init", "nowhere.pth"]])
def test_bad_options_are_one_sentence(tmp_path, options, capsys):
    run = write_run(tmp_path / "run")
    with pytest.raises(SystemExit) as end:
        dino.main(["--run", str(run), *TINY, *options])
    assert end.value.code == 2 and len(capsys.readouterr().err.strip().split("\n")) == 1
    assert not (run / "image_codes.pt").exists()


# --- The script -------------------------------------------------------------------------------------------------------
def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def same_results(a, b):
    for one, other in zip(read(a), read(b)):
        for key, value in one.items():
            if torch.is_tensor(value):
                assert torch.equal(value, other[key]), key
    for name, weight in read(a)[0]["teacher"].items():
        assert torch.equal(weight, read(b)[0]["teacher"][name]), name


def test_main_may_be_called_for_one_run_after_another(tmp_path):
    """As in a notebook: a run is the same before and after another one, and knows only its own files."""
    runs = [write_run(tmp_path / name, seed=seed) for name, seed in (("a", 0), ("b", 1), ("c", 0))]
    for run in runs:
        dino.main(["--run", str(run), *TINY, "--epochs", "2"])
        for saved in read(run):
            assert saved["made_from"] == {name: digest(run / name) for name in ("images.pt", "data.pt")}
    same_results(runs[0], runs[2])


def interrupt(run, options, monkeypatch, name, at_step=None):
    """Runs main, and presses Ctrl-C where it calls the function of that name, train_step at that step."""
    real = getattr(dino, name)

    def pressed(*args):
        if at_step is None or args[6] == at_step:
            raise KeyboardInterrupt
        return real(*args)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(dino, name, pressed)
        dino.main(["--run", str(run), *options])


def test_an_interrupted_run_goes_on_and_ends_in_the_same_bits(tmp_path, monkeypatch):
    """Interrupted in the second epoch, and once more when all epochs are over and codes are read."""
    runs = [write_run(tmp_path / name) for name in ("whole", "interrupted")]
    options = [*TINY, "--epochs", "3"]
    dino.main(["--run", str(runs[0]), *options])
    interrupt(runs[1], options, monkeypatch, "train_step", at_step=4)
    interrupt(runs[1], options, monkeypatch, "read_image_codes")
    dino.main(["--run", str(runs[1]), *options])
    assert not (runs[1] / "dino.checkpoint").exists()
    same_results(*runs)


def test_a_run_of_other_processes_is_not_gone_on_with(tmp_path, monkeypatch, capsys):
    run = write_run(tmp_path / "run")
    interrupt(run, [*TINY, "--epochs", "3"], monkeypatch, "train_step", at_step=4)
    state = torch.load(run / "dino.checkpoint", weights_only=True)
    torch.save(state | {"options": state["options"] | {"world": 4}}, run / "dino.checkpoint")
    with pytest.raises(SystemExit) as end:
        dino.main(["--run", str(run), *TINY, "--epochs", "3"])
    said = capsys.readouterr().err
    assert end.value.code == 2 and "was begun by 4 processes, not 1" in said and said.count("\n") == 1


def test_the_teacher_begins_as_the_student_and_the_codebooks_as_its_k_means(tmp_path):
    run = write_run(tmp_path / "run")
    images = torch.load(run / "images.pt", weights_only=True)["images"]
    items = torch.load(run / "data.pt", weights_only=True)["has_image"].nonzero()[:, 0]
    student, teacher = dino.build(images, items, 2, dino.options([*TINY]), torch.manual_seed(0))
    assert teacher.quantiser is None and not any(w.requires_grad for w in teacher.parameters())
    assert all(map(torch.equal, student.parameters(), teacher.parameters()))
    z = dino.embed(teacher.backbone, images, items)
    codes = dino.nearest(z, student.quantiser.codebooks[0])
    means = torch.stack([z[codes == k].mean(0) for k in range(2)])
    torch.testing.assert_close(student.quantiser.codebooks[0], means, atol=1e-5, rtol=0)


def test_codes_are_those_of_whole_pictures_by_the_teacher(tmp_path):
    """Vectors are the teacher's, standardised; codebooks have moved to the means of these vectors."""
    run = write_run(tmp_path / "run")
    images = torch.load(run / "images.pt", weights_only=True)["images"]
    data = torch.load(run / "data.pt", weights_only=True)
    items, teacher = data["has_image"].nonzero()[:, 0], tiny_model(1)
    student = tiny_model(0)
    student.quantiser = dino.ResidualQuantiser(torch.randn(3, 8, 12))
    saved = dino.read_image_codes(student, teacher, images, data, torch.Generator().manual_seed(0))
    whole = torch.nn.functional.interpolate(images[items] / 255, (8, 8), mode="bilinear", antialias=True)
    z = teacher.backbone(whole).detach()
    expected = (z - z.mean(0)) / (z - z.mean(0)).square().mean().sqrt()
    torch.testing.assert_close(saved["embeddings"][items], expected, atol=1e-4, rtol=1e-4)
    codes = dino.nearest(expected, saved["codebooks"][0])
    for k in codes.unique():
        torch.testing.assert_close(saved["codebooks"][0, k], expected[codes == k].mean(0), atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("epochs, told", ((3, [1, 2, 3]), (8, [*range(1, 9)]), (20, [1, 3, 6, 9, 12, 15, 18, 20]),
                                          (100, [1, *range(10, 101, 10)])))
def test_of_many_epochs_the_first_and_each_tenth_get_a_line(epochs, told, capsys):
    for epoch in range(epochs):
        dino.print_epoch(epoch, torch.tensor([2.5, 2.25]), epochs)
    lines = capsys.readouterr().out.splitlines()
    assert lines == [f"epoch {number}: loss 2.50 = entropy of p_t 2.25 + KL 0.25" for number in told]


def test_a_loss_that_is_no_number_ends_the_run(tmp_path, monkeypatch, capsys):
    run = write_run(tmp_path / "run")
    monkeypatch.setattr(dino, "train_step", lambda *args: torch.tensor([math.nan, 0]))
    with pytest.raises(SystemExit) as end:
        dino.main(["--run", str(run), *TINY])
    assert end.value.code == 2 and "step 0 the loss is no number" in capsys.readouterr().err
    assert not (run / "dino.pt").exists()


def test_max_steps_ends_early_and_says_what_an_epoch_takes(tmp_path, capsys):
    run = write_run(tmp_path / "run")
    dino.main(["--run", str(run), *TINY, "--epochs", "5", "--max-steps", "4"])
    assert "3 steps; an epoch has 3: " in capsys.readouterr().out
    assert not (run / "image_codes.pt").exists() and not (run / "dino.checkpoint").exists()


def test_bfloat16_is_close(tmp_path):
    runs = [write_run(tmp_path / name) for name in ("fp32", "bf16")]
    for run in runs:
        dino.main(["--run", str(run), *TINY, "--precision", run.name])
    (full, _), (half, codes) = map(read, runs)
    check_codes(codes, 24)
    assert not torch.equal(full["losses"], half["losses"])
    torch.testing.assert_close(full["losses"], half["losses"], atol=0.1, rtol=0.05)


def torchrun(run, *options, **given):
    line = command(3, "--run", run, "--smoke", "--device", "cpu", "--width", "12", *options, processes=2)
    return subprocess.Popen(line, env={**os.environ, "OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE,
                            stderr=subprocess.PIPE, text=True, **given)


def test_two_processes_are_one_of_the_doubled_batch(tmp_path):
    """17 pictures, 2 + 3 crops of each: the last batch holds one, and one of the two processes nothing."""
    runs = [write_run(tmp_path / name, N=19) for name in "ab"]
    options = ("--epochs", "2", "--local-crops", "3")
    process = torchrun(runs[0], "--batch", "4", *options)
    dino.main(["--run", str(runs[1]), *TINY, *options])
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert out.count("codes:") == 1 and not list(runs[0].glob("*.partial"))
    (two, codes), (one, expected) = map(read, runs)
    for key in ("losses", "teacher_entropy"):
        torch.testing.assert_close(two[key], one[key], atol=1e-4, rtol=0)
    torch.testing.assert_close(codes["embeddings"], expected["embeddings"], atol=1e-3, rtol=0)
    assert (codes["codes"] == expected["codes"]).float().mean() > 0.9
    check_codes(codes, 19)


def test_a_killed_process_ends_the_run(tmp_path):
    run = write_run(tmp_path / "run")
    process = torchrun(run, "--epochs", "100000", start_new_session=True)
    try:
        for line in process.stdout:
            if line.startswith("epoch 1:"):
                break
        children = subprocess.run(["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True)
        os.kill(int(children.stdout.split()[-1]), signal.SIGKILL)
        _, err = process.communicate(timeout=120)
        assert process.returncode and "SIGKILL" in err and not list(run.glob("image_codes.pt*"))
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
