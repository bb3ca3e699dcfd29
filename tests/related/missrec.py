"""MISSRec: a history is also the set of its interests, where ten items that are alike count once.

MISSRec (Wang et al., ACM Multimedia 2023, arXiv 2308.11175) clusters what texts and pictures say of
all items: a cluster is an interest. SASRec hears of them here: with each event of a history comes
one interest for each modality, the first code that its item has there, and one that was there
before adds nothing. The interests attend to each other, then every event to the interests that
there are by then; what it hears is added to x_t, what SASRec has before its last norm:

    S_t = the clusters of all items up to event t: a set, no interest is in it twice
    r_k = c_k + attention of c_k to all c_j with j in S_s, where event s was the first to bring k
    y_t = x_t + attention of x_t to all r_k with k in S_t

with c_k the centroid of cluster k, projected as --content is, and normed; y_t goes to SASRec's last
norm. The two attentions are all that is new. Left out: training on other shops first, contrast
between histories, a mixture of text and picture of each user's own, clusters of both together that
are found anew each epoch, feed-forward layers, a regulariser.

    python tests/related/missrec.py --run runs/toy --seed 0           # after 01, 03 and 04
    python tests/related/missrec.py --run runs/office --content text --variant missrec-control

letters  those of 02_sasrec.py, and D modalities, d width of all content of an item, K clusters of
         a modality, J interests that a history brings, repeated or not (T D)
"""
import math

import torch
import torch.nn as nn

from variation import own_options, script

s = script(2)

VARIANTS = {
    "missrec": "each event also hears from the distinct interests of its history",
    "missrec-control": "the same, but each item has the interests of another",
    "missrec-repeats": "an interest is heard as often as it came: is it the set?",
}
BASE = "sasrec-content"


class MISSRec(s.SASRec):
    """SASRec that asks the interests of a history, too."""
    variant = "missrec"
    sources = []  # what the files of the modalities' codes hold

    def __init__(self, N, T, E, H, layers, dropout, content):
        super().__init__(N, T, E, H, layers, dropout, content)
        books = [source["codebooks"][0] for source in self.sources]     # (K, width of one) each
        centroids = torch.block_diag(*books) / math.sqrt(content.shape[1])  # (D K, d), as content
        self.centroids = centroids.to(content.device)                   # (D K, d)
        first = torch.stack([source["codes"][:, 0] for source in self.sources], 1)  # (N+1, D)
        known = torch.stack([source["known"] for source in self.sources], 1)  # (N+1, D)
        K = torch.tensor([len(book) for book in books])                 # (D,)
        cluster = torch.where(known, first + K.cumsum(0) - K, -1)       # (N+1, D)
        if self.variant == "missrec-control":
            cluster[1:] = cluster[1 + torch.randperm(N)]
        self.cluster = cluster.to(content.device)                       # (N+1, D)
        # A key of zeros is always there: who has no interest yet is told nothing.
        self.relate = nn.MultiheadAttention(E, H, bias=False, add_zero_attn=True, batch_first=True)
        self.ask = nn.MultiheadAttention(E, H, bias=False, add_zero_attn=True, batch_first=True)

    def forward(self, history):
        x = self.dropout(self.embed(history))                           # (B, T, E)
        for block in self.blocks:
            x = block(x)                                                # (B, T, E)
        x = x + self.dropout(self.interests(x, history))                # (B, T, E)
        return self.norm(x)                                             # (B, T, E)

    def interests(self, x, history):
        """What each event hears from the interests up to it. (B, T, E), (B, T) -> (B, T, E)"""
        k = self.cluster[history].flatten(1)                            # (B, J)
        # Where there is no interest, k = -1 takes the last row: `no_key` hides it.
        c = s.normed(self.project(self.centroids))[k]                   # (B, J, E)
        no_key = k == -1                                                # (B, J)
        if self.variant != "missrec-repeats":
            same = k.unsqueeze(2) == k.unsqueeze(1)                     # (B, J, J)
            no_key = no_key | same.tril(-1).any(2)                      # (B, J) came before
        event = torch.arange(history.shape[1], device=k.device)         # (T,)
        of = event.repeat_interleave(self.cluster.shape[1])             # (J,) who brings each

        c = c + attention(self.relate, c, c, no_key, of > of.unsqueeze(1))  # (B, J, E)
        return attention(self.ask, x, c, no_key, of > event.unsqueeze(1))  # (B, T, E)


def attention(module, x, y, no_key, later):
    """x: (B, n, E), y: (B, J, E), no_key: (B, J), later: (n, J) is not yet there -> (B, n, E)"""
    hidden = no_key.unsqueeze(1) | later                                # (B, n, J)
    hidden = hidden.repeat_interleave(module.num_heads, 0)              # (B H, n, J)
    y = s.normed(y)                                                     # (B, J, E)
    return module(s.normed(x), y, y, attn_mask=hidden, need_weights=False)[0]  # (B, n, E)


def distinct(data, source):
    """Of the training events whose items have this modality: what share brings an interest that the
    history had not? source: what the file of its codes holds -> float
    """
    length = data["offsets"].diff()                                     # (U,)
    user = torch.arange(len(length)).repeat_interleave(length)          # (events,)
    training = torch.arange(len(user)) < data["offsets"][1:][user] - 2  # (events,)
    item = data["events"].long()                                        # (events,)
    pairs = torch.stack([user, source["codes"][item, 0]])               # (2, events)
    pairs = pairs[:, training & source["known"][item]]                  # (2, counted)
    return pairs.unique(dim=1).shape[1] / max(1, pairs.shape[1])


def main(argv=None):
    MISSRec.variant, line = own_options(argv, __doc__, VARIANTS)
    line = ["--content", "text,image", *line]
    s.NAMED = "missrec"
    args = s.options(line)
    if args.post_norm:
        s.fail("missrec.py has no --post-norm.")
    run = s.Run(args.run)
    MISSRec.sources = [run.load(f"{m}_codes.pt", "its script") for m in args.content.split(",")]
    data = run.load("data.pt", "01_data.py")
    for m, source in zip(args.content.split(","), MISSRec.sources):
        print(f"{m}: {distinct(data, source):.2f} new interests an event")
    s.SASRec = MISSRec
    s.main(line)


if __name__ == "__main__":
    s.start(main)
