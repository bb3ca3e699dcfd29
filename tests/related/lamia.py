"""LAMIA: a palette of vectors side by side, each an aspect, in place of one that is cut again.

LAMIA (Liu et al., arXiv 2409.07276, version 3) has a language model give several vectors for an
item, a palette, and clusters each by itself: a code stands for an aspect, while the codes of a
residual quantiser go from coarse to fine. Tried here is this parallel form. A vector x is rotated
and split into three heads, and with C_a the codebook of head a,

    (p_1, p_2, p_3) = R x,   c_a = argmin_k ||p_a - C_a[k]||^2

A centroid C_a[k] is stored with zeros in the columns of the other heads, so to subtract it from
R x leaves these heads unchanged: the residual quantiser of 04 gives these very codes. R is the
rotation whose codes rebuild x best (optimised product quantisation, Ge et al., CVPR 2013): a head
that mixes two aspects would need a centroid for each pair of their values. Left out: the language
model, and how it is tuned (to rebuild texts, and by contrast). Heads are three, as many as our
codes; the decoder still writes them one after another. LAMIA cuts vectors of texts: lamia-text is
nearest to it, and is to be compared with `tiger`, which cuts such vectors residually.

    python 02_sasrec.py --name sasrec-content --content text,image     # whose vectors lamia reads
    python tests/related/lamia.py --run runs/toy
    python tests/related/lamia.py --run runs/toy --variant lamia-base  # or another
    python 05_generator.py --name tiger --modalities text --target text  # beside lamia-text

letters  n items with a vector, N items, K values of a code, d width of a vector that is cut into
         codes
"""
import torch

from variation import makes_codes, only_seed, own_options, script

four = script(4)
five = script(5)
six = script(6)

VARIANTS = {
    "lamia": "vectors of sasrec-content, three heads side by side",
    "lamia-base": "the same vectors, cut residually",
    "lamia-control": "each head permuted over the items by itself",
    "lamia-rotated": "any rotation: side by side, but nothing is learnt",
    "lamia-text": "vectors of texts, three heads, shown and written alone",
}
BASE = "lamia-base"
TURNS = 200  # of the rotation
ROUGH = 2    # steps of Lloyd's algorithm before each of them


def columns(x):
    """The columns of each head. x: (n, d) -> three tensors, d numbers in all"""
    return torch.arange(x.shape[1]).chunk(3)


def rough_kmeans(x, K, rng):
    """A codebook that is rough on purpose, and another one in each call.

    Codebooks that are fitted well to a rotation make it the best one for them: it would never turn.
    """
    start = torch.randint(len(x), (K,), generator=rng)          # (K,)
    return four.lloyd(x, x[start], ROUGH)                       # (K, d)


def parallel_kmeans(x, K, rng, kmeans=four.kmeans):
    """A codebook for each head, 0 in the columns of the others. (n, d) -> (3, K, d)"""
    codebooks = torch.zeros(3, K, x.shape[1])                   # (3, K, d)
    for codebook, own in zip(codebooks, columns(x)):
        codebook[:, own] = kmeans(x[:, own], K, rng)        # (K, own)
    return codebooks


def learn_heads(x, K, rng, turns):
    """Turns vectors so that the codes of their heads rebuild them best. x: (n, d) -> (n, d)"""
    d = x.shape[1]
    R = torch.linalg.qr(torch.randn(d, d, generator=rng)).Q     # (d, d) any rotation
    for _ in range(turns):
        heads = x @ R.T                                         # (n, d)
        codebooks = parallel_kmeans(heads, K, rng, rough_kmeans)  # (3, K, d)
        _, residual = four.quantise(heads, codebooks)           # (n, d)
        # The rotation that brings x nearest to what the codes say of it (Procrustes' problem).
        left, _, right = torch.linalg.svd((heads - residual).T @ x)  # (d, d) both
        R = left @ right                                        # (d, d)
    return x @ R.T                                              # (n, d)


def print_aspects(codes, codebooks, known, data):
    """What each code by itself says of the items' properties. codes: (N+1, 3)"""
    all_three = {"codebooks": codebooks, "known": known}
    positions = {f"code {l + 1}": all_three | {"codes": codes[:, l:l + 1]} for l in range(3)}
    labels = six.labels_of_items(data)
    told = six.describe_codes(positions, labels, torch.Generator().manual_seed(0))
    print(six.meaning_table(told, labels))


def make_codes(name, run, args):
    """Writes NAME_codes.pt, and prints what the codes say."""
    rng = torch.manual_seed(args.seed)
    data = run.load("data.pt", "01_data.py")
    if name == "lamia-text":
        saved = run.load("text_codes.pt", "04_text_codes.py")
    else:
        saved = run.load("collab-content_codes.pt", "02_sasrec.py --name sasrec-content")
    known = saved["known"]                                      # (N+1,)
    if not known.any():
        five.fail(f"{name} has nothing to cut: no item of {run.folder} has a text.")

    embeddings = saved["embeddings"]                            # (N+1, d)
    x = embeddings[known]                                       # (n, d)
    K = four.codebook_size(len(known) - 1)
    if name == "lamia-base":
        codebooks = four.residual_kmeans(x, K, rng)             # (3, K, d)
    else:
        x = learn_heads(x, K, rng, 0 if name == "lamia-rotated" else TURNS)  # (n, d)
        codebooks = parallel_kmeans(x, K, rng)                  # (3, K, d)
    if name == "lamia-control":
        for own in columns(x):
            x[:, own] = x[torch.randperm(len(x))][:, own]       # (n, own)

    embeddings[known] = x
    four.save_codes(f"{name}_codes.pt", embeddings, known, data, run, only_seed(args), codebooks)
    print_aspects(four.quantise(embeddings, codebooks)[0], codebooks, known, data)


def main(argv=None):
    """Makes the codes of a variant, then calls 05, which shows and writes them."""
    name, line = own_options(argv, __doc__, VARIANTS)
    args = five.options(line)
    run = four.Run(args.run)
    if makes_codes(args):
        make_codes(name, run, args)
    shown = ["image", "text"] if (run.folder / "image_codes.pt").exists() else ["text"]
    # With --lookahead: vectors that were learnt from the histories are shrunk, as those of 02.
    shrunk = f"{args.shrunk},{name}"
    if name == "lamia-text":
        shown = []
        shrunk = args.shrunk
    five.main(["--modalities", ",".join([*shown, name]), "--target", name,
               "--shrunk", shrunk, *line])


if __name__ == "__main__":
    five.start(main)
