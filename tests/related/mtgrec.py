"""MTGRec: every item has several codes, from neighbouring versions of one quantiser.

The quantiser that made the codes which are written (the target's) goes on learning, pass after pass
over the same vectors, and now and then a version of it is kept. From one version to the next, few
items change their first code and more change a later one; what a code means hardly changes. In each
step of the training all items have their codes of one version v, drawn at random; so an item shares
codes with more others, from which a rare one learns. In the last fifth of the training, and
wherever items are ranked, they have those of the last version, so that codes name items again.

    loss = - sum_l log p( c_l^v | c_1^v .. c_(l-1)^v, history ),   the history in codes of v as well

Left out: RQ-VAE's encoder (here vectors stay and centroids move), a draw for each example, versions
of the codes of texts and pictures, and the curriculum, which prefers those versions whose gradient
helps on validation. The base has the codes of the last version from the beginning.

Zheng et al., Pre-training Generative Recommender with Multi-Identifier Item Tokenization,
SIGIR 2025, arXiv 2504.04400.

    python tests/related/mtgrec.py --run runs/toy --seed 0
    python tests/related/mtgrec.py --run runs/toy --seed 0 --variant mtgrec-base

letters  N items, L codes of an item, K values of a code, d width of a vector that is cut into
         codes, V versions, n vectors that are cut into codes
"""
import torch

from variation import own_options, script

BASE = "mtgrec-base"
VARIANTS = {
    "mtgrec": "neighbouring versions of one quantiser",
    "mtgrec-base": "its last version alone",
    "mtgrec-control": "versions of quantisers that begin anew: code 7 means something else in each",
    "mtgrec-noise": "the items that change in mtgrec swap codes: what these mean changes, too",
}
PASSES = [20, 3, 3, 3, 3]  # of the quantiser, before each version is kept
MEMBERS = 3                # vectors in a batch for each centroid: with fewer, more items change
LAST = 0.2                 # share of the training that has the last version alone

three = script(3)
plain = script(5)  # 05 as it is
five = script(5)   # 05 as main changes it


def quantisers(x, codebooks, rng):
    """Yields the codebooks of one version after another, (3, K, d). x: (n, d)"""
    quantiser = three.ResidualQuantiser(codebooks.clone())
    for passes in PASSES:
        for _ in range(passes):
            order = torch.randperm(len(x), generator=rng)               # (n,)
            for rows in order.split(MEMBERS * codebooks.shape[1]):
                quantiser.update(x[rows])
        yield quantiser.codebooks.clone()


def make_versions(source, train_counts, variant, rng):
    """The codes of all versions, the last one first. -> (V, N+1, L), codebooks of that one"""
    known = source["known"]                                             # (N+1,)
    x = source["embeddings"]                                            # (N+1, d)
    codebooks = list(quantisers(x[known], source["codebooks"], rng))[::-1]
    versions = []
    for v, books in enumerate(codebooks):
        if variant == "mtgrec-control" and v > 0:
            books = three.residual_kmeans(x[known], books.shape[1], rng)
        # An item without a vector has random codes: the same ones in all versions.
        same = torch.Generator().manual_seed(rng.initial_seed())
        codes, _ = three.finish_codes(x, known, books, train_counts, same)  # (N+1, L)
        if variant == "mtgrec-noise" and v > 0:
            # Items that change get the last version's codes of each other: each those of the one
            # before it.
            changed = known & (codes != versions[0]).any(1)             # (N+1,)
            codes = versions[0].clone()                                 # (N+1, L)
            codes[changed] = codes[changed].roll(1, 0)
        versions.append(codes)
    versions = torch.stack(versions)                                    # (V, N+1, L)
    differ = (versions[1:] != versions[0])[:, known].float()            # (V-1, n, L)
    print(f"from the last version the others differ in {differ[:, :, 0].mean():.1%} of the first "
          f"codes, and in some code of {differ.amax(2).mean():.1%} of the items")
    return versions, codebooks[0]


def build(sources, data, args):
    """05's model of the last version, with models of all versions, of which it borrows tables."""
    target = sources[args.target]
    rng = torch.Generator().manual_seed(args.seed)
    versions, codebooks = make_versions(target, data["train_counts"], five.variant, rng)
    models = []
    for codes in [versions[0], *versions]:
        version = target | {"codes": codes, "codebooks": codebooks}
        models.append(plain.build(sources | {args.target: version}, data, args)[0])
    models[0].versions = models[1:]  # a plain list: their weights are none of the model's
    # Saved with the weights, so that 05, which knows other codes, does not take them for its own.
    models[0].register_buffer("codes", versions[0].long().to(args.device))
    return models[0], models[0].trie


def show(model, v):
    """From now on the model reads and writes codes of version v."""
    # (With --lookahead the table, too: it holds the means of the items that share a first code.)
    for name in ("shown", "written", "trie", "beneath", "table"):
        if hasattr(model, name):
            setattr(model, name, getattr(model.versions[v], name))


def train_step(model, trie, optimizer, events, args):
    """A step of 05, in which all items have their codes of one version. -> losses (L,)"""
    inner = getattr(model, "module", model)  # under torchrun the model is wrapped
    # The last fifth of the training has the last version alone. How far is it? A step knows by its
    # learning rate, which falls along a cosine and is lower than this from there on (and in the
    # very first steps, while it rises).
    late = optimizer.param_groups[0]["lr"] < five.learning_rate(1 - LAST, args.lr)
    if not late:
        show(inner, int(torch.randint(len(inner.versions), ())))
    losses = plain.train_step(model, inner.trie, optimizer, events, args)  # (L,)
    show(inner, 0)
    return losses


def main(argv=None):
    five.variant, line = own_options(argv, __doc__, VARIANTS)
    five.build = build
    five.train_step = plain.train_step if five.variant == BASE else train_step
    five.main(line)


if __name__ == "__main__":
    five.start(main)
