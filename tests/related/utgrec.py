"""UTGRec: text codes of which items that people take one after the other have more in common.

UTGRec (Zheng et al., arXiv 2504.04405) makes one tokenizer for many shops. Its codes have to
rebuild an item's content and that of a neighbour, which somebody took right before or after it, so
that content codes learn behaviour. Tried here is this idea on the text vectors x of 04, with linear
maps f and g around the residual quantiser of 03. Of item a, a neighbour b, z = f(x), and z_q, which
is z_a quantised,

    loss = ||g(z_q) - x_a||^2 / d + beta commitment
           + eta [ ||g(z_q) - x_b||^2 / d - log( exp(z_a.z_b / tau) / sum_j exp(z_a.z_j / tau) ) ]

where j runs over the neighbours of all items in the batch, without copies of b and without a
itself, and products are cosines. The quantiser's codebooks serve this training alone: codes are cut
from f(x) by new k-means, as in 04. Only utgrec-transfer keeps codebooks, those that utgrec wrote
for another shop, and tunes f and g around them. Left out: the multimodal language model, pictures,
the rebuilding of words and pixels, one codebook for all deeper levels, training on several shops at
once. 04 turns each shop's vectors in a way of its own, so a centroid of one shop means nothing in
another: kept codebooks bring along the distances between centroids, and no more. utgrec-noise, with
centroids drawn at random, shows what that is worth.

    python tests/related/utgrec.py --run runs/toy
    python tests/related/utgrec.py --run runs/toy --variant utgrec-base      # and utgrec-control
    python tests/related/utgrec.py --run runs/new --variant utgrec-transfer --codebooks-of runs/toy

letters  N items, K values of a code, d width of a vector that is cut into codes, P pairs of
         neighbours, B pairs in a batch
"""
import torch
import torch.nn.functional as F

from variation import makes_codes, only_seed, own_options, script

three = script(3)
four = script(4)
five = script(5)
six = script(6)

VARIANTS = {
    "utgrec": "codes rebuild a neighbour too, and neighbours are pulled together",
    "utgrec-base": "eta = 0: the same without neighbours",
    "utgrec-control": "neighbours permuted over the pairs: as popular, but of nobody",
}
TRANSFERS = {  # they need another run, in which utgrec was made
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


def pull(z_a, z_b, a, b):
    """- log of the softmax above, a mean. z_a, z_b: (B, d); a, b: which items, (B,) -> ()"""
    cosine = F.normalize(z_a, dim=1) @ F.normalize(z_b, dim=1).T  # (B, B)
    # A neighbour that was drawn twice is no wrong answer, and neither is the item itself.
    right = ((b == b.unsqueeze(1)) | (b == a.unsqueeze(1))).fill_diagonal_(False)  # (B, B)
    logits = (cosine / TAU).masked_fill(right, -torch.inf)      # (B, B)
    return F.cross_entropy(logits, torch.arange(len(b)))        # ()


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

        pulled = pull(z, x[b] @ f, a, b)                        # ()
        loss = own + eta * (F.mse_loss(z_q @ g, x[b]) + pulled)  # ()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if kept is None:
            quantiser.update(z.detach())
    return (x @ f).detach()                                     # (N+1, d)


def make_codes(name, run, other, args):
    """Writes NAME_codes.pt. other: the run whose codebooks are kept; run itself: none was given"""
    rng = torch.manual_seed(args.seed)
    data = run.load("data.pt", "01_data.py")
    text = run.load("text_codes.pt", "04_text_codes.py")
    pairs = neighbours(data, text["known"])                     # (P, 2)
    if len(pairs) == 0:
        five.fail(f"{name} needs items with texts, one after the other: {run.folder} has none.")
    if name == "utgrec-control":
        pairs[:, 1] = pairs[torch.randperm(len(pairs)), 1]      # (P,)

    kept = None
    if name in TRANSFERS:
        if other.folder.resolve() == run.folder.resolve():
            five.fail(f"{name} needs --codebooks-of: another run, in which utgrec was made.")
        kept = other.load("utgrec_codes.pt", "utgrec.py")["codebooks"]  # (3, K, d)
    if name == "utgrec-noise":
        kept = kept.std((1, 2), keepdim=True) * torch.randn(kept.shape)  # (3, K, d)
    eta = 0 if name == "utgrec-base" else ETA
    steps = 20 if args.smoke else STEPS
    z = tune(text, kept, pairs, eta, steps, rng)                # (N+1, d)
    # Where none are kept, codebooks are those of k-means, as in 04.
    four.save_codes(f"{name}_codes.pt", z, text["known"], data, run, only_seed(args), kept)


def main(argv=None):
    """Makes the codes of a variant, then calls 05, which shows and writes them alone."""
    name, line, other = own_options(argv, __doc__, VARIANTS | TRANSFERS, codebooks_of="another run")
    args = five.options(line)
    if makes_codes(args):
        make_codes(name, four.Run(args.run), four.Run(other or args.run), args)
    # With --lookahead the vectors are shown whole, as those of 04 (see --shrunk): f is one map for
    # all items, with no number of an item's own that could learn its events by heart.
    five.main(["--modalities", name, "--target", name, *line])


if __name__ == "__main__":
    five.start(main)
