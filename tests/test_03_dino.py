"""03_dino_quantizer.py: the ViT has the public names, the quantiser and the loss do what the equations say."""

import itertools
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


def test_init_that_holds_no_vit_is_one_sentence(tmp_path, capsys):
    torch.save({"weights": torch.zeros(2)}, tmp_path / "no.pth")
    with pytest.raises(SystemExit) as end:
        dino.load_backbone(tmp_path / "no.pth", 16)
    assert end.value.code == 2 and "no.pth" in capsys.readouterr().err


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
    rng = torch.Generator().manual_seed(0)
    codebooks = torch.tensor([[0.0, 10, 99]]).view(1, 3, 1).repeat(3, 1, 1)
    quantiser = dino.ResidualQuantiser(codebooks)
    z = torch.tensor([[0.0], [2], [10], [14]])
    quantiser.update(z, rng, decay=0)
    assert quantiser.codebooks[0, :2].flatten().tolist() == [1, 12]
    assert quantiser.codebooks[0, 2] in z, "99 had no member, so it restarts at a vector of the batch"
    far = dino.ResidualQuantiser(torch.tensor([[0.0, 99]]).view(1, 2, 1).repeat(3, 1, 1))
    for step in range(100):
        far.update(z, rng)
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


def test_crops_are_pictures_of_their_own():
    torch.manual_seed(0)
    x, luck = torch.rand(6, 3, 16, 16), 2 * torch.rand(6, 8) - 1
    view = dino.crops(x, 8, (0.3, 0.7), luck)
    assert view.shape == (6, 3, 8, 8) and 0 <= view.min() and view.max() <= 1
    same = dino.crops(x[:1].repeat(6, 1, 1, 1), 8, (0.3, 0.7), luck)
    assert len(same.flatten(1).unique(dim=0)) == 6
    torch.testing.assert_close(dino.crops(x, 8, (0.3, 0.7), luck)[1::2],
                               dino.crops(x[1::2], 8, (0.3, 0.7), luck[1::2]))
    plain = torch.zeros(6, 8)
    plain[:, 4] = 1
    torch.testing.assert_close(dino.crops(x, 16, (1, 1), plain), x)
    torch.testing.assert_close(dino.crops(x, 16, (1, 1), -plain), x.flip(3))
    assert dino.crops(x[:0], 8, (0.3, 0.7), luck[:0]).shape == (0, 3, 8, 8)


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
    """17 pictures: the last batch holds one, and one of the two processes nothing."""
    runs = [write_run(tmp_path / name, N=19) for name in "ab"]
    process = torchrun(runs[0], "--batch", "4", "--epochs", "2")
    dino.main(["--run", str(runs[1]), *TINY, "--epochs", "2"])
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
