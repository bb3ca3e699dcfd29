"""MACRec: codes of texts and pictures whose deep levels have heard of the other modality.

MACRec (Zhang et al., AAAI 2026, arXiv 2511.15122) quantises texts and pictures apart. After some
codes little is left to tell items apart. What is left of two items is pulled together if the other
modality puts them in one cluster; so deep codes carry that, and fewer items share all codes. Tried
here is this contrast. In an autoencoder around the residual quantiser of 03, with f_i the direction
of what two codes leave of z_i, and P(i) the other items of the batch that have i's first code in
the other modality,

    loss = ||decode(z_q) - x||^2 / d + beta commitment + weight * mean over i of L_i
    L_i = mean over p in P(i) of - log [exp(f_i.f_p / tau) / sum over j != i of exp(f_i.f_j / tau)]

and L_i = 0 where P(i) is empty. With sg(y) for y without its gradient: the public code subtracts
z + sg(z_q - z) from z, so that what is left has no gradient, and the contrast trains nothing. Here
z - sg(C[c]) is left, with C[c] the centroid of the item's code, as in 03. Left out: what
aligns both modalities' codes, in the quantiser and in the generator, lists of both put together,
and a fourth level that is learnt; theirs draws one p, we take the mean of all.

    python tests/related/macrec.py --run runs/films
    python tests/related/macrec.py --run runs/films --variant macrec-base      # and macrec-control
    python tests/related/macrec.py --run runs/films --target collab --name macrec-to-collab

letters  n items that have the modality, N items, K values of a code, d width of a vector that is
         cut into codes, B items in a batch
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

from variation import makes_codes, only_seed, own_options, script

three = script(3)
four = script(4)
five = script(5)

VARIANTS = {
    "macrec": "what two codes leave is contrasted by the other modality's clusters",
    "macrec-base": "the same autoencoder, weight 0",
    "macrec-control": "clusters permuted over the items",
}
BASE = "macrec-base"
WEIGHT = 0.1
TAU = 0.1
STEPS = 1000
BATCH = 256


def contrast(left, label):
    """The mean of all L_i. left: what codes leave of z, (B, d); label: (B,), -1: none -> ()"""
    f = F.normalize(left, dim=1)                                # (B, d)
    log_p = (f @ f.T / TAU).fill_diagonal_(-torch.inf).log_softmax(1)  # (B, B)
    shared = ((label == label.unsqueeze(1)) & (label >= 0)).fill_diagonal_(False)  # (B, B)
    return -(log_p.masked_fill(~shared, 0).sum(1) / shared.sum(1).clamp(min=1)).mean()  # ()


def after_two_codes(z, codebooks):
    """What two codes leave of z. Centroids are constants: it has the gradient of z. -> (B, d)"""
    for codebook in codebooks[:2]:
        z = z - codebook[three.nearest(z.detach(), codebook)]   # (B, d)
    return z


def cross(x, label, weight, K, steps, rng):
    """Trains the autoencoder of one modality. x: (n, d), label: (n,)

    -> z, standardised (n, d), and its codebooks (3, K, d)
    """
    d = x.shape[1]
    encode = nn.Sequential(nn.Linear(d, d), nn.ReLU(), nn.Linear(d, d))
    decode = nn.Sequential(nn.Linear(d, d), nn.ReLU(), nn.Linear(d, d))
    optimizer = torch.optim.Adam([*encode.parameters(), *decode.parameters()])
    quantiser = three.ResidualQuantiser(three.residual_kmeans(encode(x).detach(), K, rng))
    for _ in range(steps):
        # No item twice: its copy would be the easiest of its P(i).
        some = torch.randperm(len(x), generator=rng)[:BATCH]    # (B,)
        z = encode(x[some])                                     # (B, d)
        z_q, commitment = quantiser(z)                          # (B, d), ()
        loss = F.mse_loss(decode(z_q), x[some]) + three.BETA * commitment / len(z)  # ()
        left = after_two_codes(z, quantiser.codebooks)          # (B, d)
        loss = loss + weight * contrast(left, label[some])      # ()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        quantiser.update(z.detach())
    # The codebooks are always a little behind: as in 03, ten steps of k-means bring them here.
    z = encode(x).detach()                                      # (n, d)
    for _ in range(10):
        quantiser.update(z, decay=0)
    return three.standardise(z, quantiser.codebooks)


def make_codes(name, run, args):
    """Writes NAME-image_codes.pt and NAME-text_codes.pt."""
    rng = torch.manual_seed(args.seed)
    data = run.load("data.pt", "01_data.py")
    text = run.load("text_codes.pt", "04_text_codes.py")
    pictures = (run.folder / "image_codes.pt").exists() and data["has_image"].any()
    if not pictures or not text["known"].any():
        five.fail(f"MACRec needs texts and pictures both: {run.folder} lacks them, or their codes.")
    image = run.load("image_codes.pt", "03_dino_quantizer.py")

    weight = 0 if name == "macrec-base" else WEIGHT
    steps = 20 if args.smoke else STEPS
    for kind, own, other in (("image", image, text), ("text", text, image)):
        known = own["known"]                                    # (N+1,)
        label = torch.where(other["known"], other["codes"][:, 0], -1)[known]  # (n,)
        if name == "macrec-control":
            label = label[torch.randperm(len(label))]           # (n,)
        x = own["embeddings"]                                   # (N+1, d)
        K = own["codebooks"].shape[1]
        x[known], codebooks = cross(x[known], label, weight, K, steps, rng)  # (n, d), (3, K, d)
        four.save_codes(f"{name}-{kind}_codes.pt", x, known, data, run, only_seed(args),
                        codebooks)


def main(argv=None):
    """Makes the codes of both modalities, then calls 05, which shows them and writes the text's."""
    name, line = own_options(argv, __doc__, VARIANTS)
    args = five.options(line)
    if makes_codes(args):
        make_codes(name, four.Run(args.run), args)
    five.main(["--modalities", f"{name}-image,{name}-text,collab", "--target", f"{name}-text",
               *line])


if __name__ == "__main__":
    five.start(main)
