"""CCFRec: an item is what its codes have heard from its texts and pictures, and nothing of its own.

CCFRec (Liu, Zheng, Zhao and Wen, 2025, arXiv 2503.12183) makes codes the bridge between content and
behaviour: many items share a code, so what is learnt of one item is known of others. Each code asks
the item's content vectors what matters, and the item is the mean of what its codes have heard:

    heard_j = z_j + sum over m of a_jm x_m
    a_jm = softmax over m of (Q n(z_j)) . (K n(x_m)) / sqrt(E)
    e_i = mean over j of heard_j

with z_j the vector of the item's code j, x_m its content of modality m, projected as --content is,
and n(x) the vector x with mean 0 and variance 1. Only modalities that the item has are heard. (In
SASRec with content there is one z and all a = 1.) A second loss is added: of the items of a batch
half of the codes, drawn at random, are replaced by masks, and what a mask hears must tell the code:
-log softmax over all codes v of cos(heard_j, z_v) / 0.07.

Left out: codes that ask each other, more layers, five fields of text (here one x for all texts),
product quantisation into 20 codes, a contrast of each history with the same one whose codes are
masked, hidden codes that stay as they are or become random ones (a tenth each: here all are masks),
cosines in the main loss.

    python tests/related/ccfrec.py --run runs/toy --seed 0            # after 01, 03 and 04
    python tests/related/ccfrec.py --run runs/office --content text --variant ccfrec-control

letters  those of 02_sasrec.py, and D modalities, C codes of an item that ask (3 D), V values that
         they have in all codebooks together, d width of all content of an item, n items, g codes
         to be guessed
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

from variation import own_options, script

s = script(2)

VARIANTS = {
    "ccfrec": "codes ask texts and pictures; masked codes are guessed",
    "ccfrec-control": "the same, but each item has the codes of another",
    "ccfrec-plain": "codes ask, and nothing is masked: is the second loss needed?",
    "ccfrec-id": "as plain, but a vector of the item's own asks: are codes needed?",
}
BASE = "sasrec-content"
WEIGHT = 0.4  # of the second loss


def codes_that_ask(sources, variant):
    """Three codes of each modality, numbered through all codebooks. sources: what the files hold

    -> (N+1, C), V. Behind the V values stand C masks, one a place: the padding has them all, and
    an item has those of a modality that it lacks.
    """
    codes = torch.cat([source["codes"][:, :3] for source in sources], 1).long()  # (N+1, C)
    if variant == "ccfrec-id":
        return torch.arange(len(codes)).roll(1).unsqueeze(1), len(codes) - 1
    known = torch.stack([source["known"] for source in sources], 1)     # (N+1, D)
    place = torch.arange(codes.shape[1])                                # (C,)
    K = codes.max().item() + 1
    V = K * len(place)
    codes = torch.where(known.repeat_interleave(3, 1), K * place + codes, V + place)  # (N+1, C)
    if variant == "ccfrec-control":
        codes[1:] = codes[1 + torch.randperm(len(codes) - 1)]
    return codes, V


class CCFRec(s.SASRec):
    """SASRec with items that their codes make."""
    variant = "ccfrec"
    sources = []  # what the files of the modalities' codes hold

    def __init__(self, N, T, E, H, layers, dropout, content):
        super().__init__(N, T, E, H, layers, dropout, content)
        widths = [source["embeddings"].shape[1] for source in self.sources]
        # Row m says which columns of the content are those of modality m.
        self.own = torch.block_diag(*(content.new_ones(1, width) for width in widths))  # (D, d)
        codes, self.V = codes_that_ask(self.sources, self.variant)      # (N+1, C)
        self.codes = codes.to(content.device)                           # (N+1, C)
        # In place of a vector for each item: one for each code, and the masks.
        self.items = nn.Embedding(self.V + codes.shape[1], E)
        self.query = nn.Linear(E, E, bias=False)
        self.key = nn.Linear(E, E, bias=False)

    def heard(self, codes, content):
        """What each code knows in the end. codes: (.., C), content: (.., d) -> (.., C, E)"""
        parts = content.unsqueeze(-2) * self.own                        # (.., D, d)
        x = self.project(parts)                                         # (.., D, E)
        # A modality that the item lacks is all zeros, and no key. (Who lacks all hears 0.)
        bias = -1e9 * (parts == 0).all(-1).unsqueeze(-2)                # (.., 1, D)
        question = self.query(s.normed(self.items.weight))[codes]       # (.., C, E)
        key = self.key(s.normed(x))                                     # (.., D, E)
        answer = F.scaled_dot_product_attention(question, key, x, bias)  # (.., C, E)
        return self.items(codes) + answer                               # (.., C, E)

    def vectors(self):
        return self.heard(self.codes, self.content).mean(1)             # (N+1, E)

    def embed(self, history):
        items = self.heard(self.codes[history], self.content[history]).mean(2)  # (B, T, E)
        return s.normed(items) + self.positions.weight[:history.shape[1]]  # (B, T, E)

    def loss(self, hidden, events, log_q, args):
        share = 0.5 if self.variant in ("ccfrec", "ccfrec-control") else 0.0
        items = events.unique()                                         # (n,)
        codes = self.codes[items]                                       # (n, C)
        hide = (torch.rand(codes.shape, device=codes.device) < share) & (codes < self.V)  # (n, C)
        shown = torch.where(hide, self.codes[0], codes)                 # (n, C), masks there
        heard = self.heard(shown, self.content[items])[hide]            # (g, E)
        z = F.normalize(self.items.weight[:self.V], dim=1)              # (V, E)
        cosine = F.normalize(heard, dim=1) @ z.T                        # (g, V)
        guess = F.cross_entropy(cosine / 0.07, codes[hide], reduction="sum")  # ()
        # The other loss is a sum over the targets: the mean guess counts once for each of them.
        guess = guess / max(1, len(heard)) * hidden[..., 0].numel()     # ()
        return super().loss(hidden, events, log_q, args) + WEIGHT * guess  # ()


def main(argv=None):
    CCFRec.variant, line = own_options(argv, __doc__, VARIANTS)
    line = ["--content", "text,image", *line]
    s.NAMED = "ccfrec"
    args = s.options(line)
    if args.post_norm:
        s.fail("ccfrec.py has no --post-norm.")
    run = s.Run(args.run)
    CCFRec.sources = [run.load(f"{m}_codes.pt", "its script") for m in args.content.split(",")]
    s.SASRec = CCFRec
    s.main(line)


if __name__ == "__main__":
    s.start(main)
