"""UTGRec: text codes of which items that people take one after the other have more in common.

UTGRec (Zheng et al., arXiv 2504.04405) makes one tokenizer for many shops. Its codes have to
rebuild an item's content and that of a neighbour, which somebody took right before or after it, so
that content codes learn behaviour. Tried here is this idea on the text vectors x of 04, with linear
maps f and g around the residual quantiser of 03. Of item a, a neighbour b, z = f(x), and z_q, which
is z_a quantised,

    loss = ||g(z_q) - x_a||^2 / d + beta commitment
           + eta [ ||g(z_q) - x_b||^2 / d - log( exp(z_a.z_b / tau) / sum_j exp(z_a.z_j / tau) ) ]

where z_j are the neighbours of all items in the batch, and products are cosines. In another shop
the codebooks are kept, and f and g are tuned: utgrec-transfer. Left out: the multimodal language
model, pictures, the rebuilding of words and pixels, one codebook for all deeper levels, training on
several shops at once. 04 gives each shop axes of its own, so that codebooks bring along only how
centroids lie to each other: utgrec-noise, with centroids drawn at random, shows what that is worth.

    python tests/related/utgrec.py --run runs/toy
    python tests/related/utgrec.py --run runs/toy --variant utgrec-base      # and utgrec-control
    python tests/related/utgrec.py --run runs/new --variant utgrec-transfer --codebooks-of runs/toy

letters  N items, K values of a code, d width of a vector that is cut into codes, P pairs of
         neighbours, B pairs in a batch
"""
import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))
from conftest import script

three = script(3)
four = script(4)
five = script(5)
six = script(6)

VARIANTS = {
    "utgrec": "codes rebuild a neighbour too, and neighbours are pulled together",
    "utgrec-base": "eta = 0: the same without neighbours",
    "utgrec-control": "neighbours permuted over the pairs: as popular, but of nobody",
    "utgrec-transfer": "the codebooks that utgrec has in the run --codebooks-of are kept",
    "utgrec-noise": "as transfer, but with centroids drawn at random",
}
BASE = "utgrec-base"
ETA = 0.3
TAU = 0.1
STEPS = 1000
BATCH = 256


def neighbours(data, known):
    """Pairs of known items one after the other in training, both ways, each once. -> (P, 2)"""
    pairs = torch.stack(six.training_pairs(data, 1), 1).long()  # (pairs, 2)
    pairs = torch.cat([pairs, pairs.flip(1)]).unique(dim=0)     # (P, 2)
    return pairs[known[pairs].all(1)]                           # (P, 2)


def tune(text, kept, pairs, eta, steps, rng):
    """Trains f and g. text: what 04 wrote -> f(x) (N+1, d)

    kept: codebooks that stay as they are, (3, K, d), or None: then those of 04 follow f(x)
    """
    x = text["embeddings"]                                      # (N+1, width)
    codebooks = text["codebooks"].clone() if kept is None else kept  # (3, K, d)
    f = torch.eye(x.shape[1], codebooks.shape[2], requires_grad=True)  # (width, d)
    g = torch.eye(codebooks.shape[2], x.shape[1], requires_grad=True)  # (d, width)
    quantiser = three.ResidualQuantiser(codebooks)
    optimizer = torch.optim.Adam([f, g])
    # All items that have neighbours are as likely as each other, and so are an item's neighbours.
    chance = 1 / pairs[:, 0].bincount()[pairs[:, 0]]            # (P,)

    for _ in range(steps):
        some = torch.multinomial(chance, BATCH, replacement=True, generator=rng)  # (B,)
        a, b = pairs[some].unbind(1)                            # (B,) both
        z = x[a] @ f                                            # (B, d)
        z_q, commitment = quantiser(z)                          # (B, d), ()
        own = F.mse_loss(z_q @ g, x[a]) + three.BETA * commitment / BATCH  # ()

        # A neighbour that was drawn twice is no wrong answer.
        cosine = F.normalize(z, dim=1) @ F.normalize(x[b] @ f, dim=1).T  # (B, B)
        twice = (b == b.unsqueeze(1)).fill_diagonal_(False)     # (B, B)
        logits = (cosine / TAU).masked_fill(twice, -torch.inf)  # (B, B)
        pull = F.cross_entropy(logits, torch.arange(BATCH))     # ()
        loss = own + eta * (F.mse_loss(z_q @ g, x[b]) + pull)   # ()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if kept is None:
            quantiser.update(z.detach())
    return (x @ f).detach()                                     # (N+1, d)


def main(argv=None):
    """Makes the codes of a variant, then calls 05, which shows and writes them alone."""
    parser = argparse.ArgumentParser(usage=__doc__, allow_abbrev=False)
    parser.add_argument("--variant", choices=VARIANTS, default="utgrec")
    parser.add_argument("--codebooks-of", default="runs/toy", help="a run, for utgrec-transfer")
    ours, rest = parser.parse_known_args(argv)
    name = ours.variant
    args = five.options(rest)
    rng = torch.manual_seed(args.seed)
    run = four.Run(args.run)
    data = run.load("data.pt", "01_data.py")
    text = run.load("text_codes.pt", "04_text_codes.py")
    pairs = neighbours(data, text["known"])                     # (P, 2)
    if len(pairs) == 0:
        five.fail(f"{name} needs items with texts, one after the other: {run.folder} has none.")
    if name == "utgrec-control":
        pairs[:, 1] = pairs[torch.randperm(len(pairs)), 1]      # (P,)

    kept = None
    if name in ("utgrec-transfer", "utgrec-noise"):
        kept = four.Run(ours.codebooks_of).load("utgrec_codes.pt", "utgrec.py")["codebooks"]
    if name == "utgrec-noise":
        kept = kept.std((1, 2), keepdim=True) * torch.randn(kept.shape)  # (3, K, d)
    eta = 0 if name == "utgrec-base" else ETA
    steps = 20 if args.smoke else STEPS
    z = tune(text, kept, pairs, eta, steps, rng)                # (N+1, d)
    # Where none are kept, codebooks are those of k-means, as in 04.
    four.save_codes(f"{name}_codes.pt", z, text["known"], data, run, args, kept)
    five.main(["--name", name, "--modalities", name, "--target", name, *rest])


if __name__ == "__main__":
    five.start(main)
