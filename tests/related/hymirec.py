"""HyMiRec: one user asks several questions at once, each learns another part of what comes next.

HyMiRec (Zhou et al., arXiv 2510.13738) shortens a long history with a small model and lets a large
language model read it; its user has several interest queries. Only these are tried here: from the
output h of SASRec come Q queries, the next W events are put into Q clusters, and of all Q! ways to
give each cluster c a query p(c) the one is taken whose cosines have the largest sum. So each query
goes on learning the part that it is nearest to already, where one vector would have to lie between
all interests:

    q_j = A_j h,   best = the order p with the largest sum over c of cos(centre_c, q_p(c)),
    loss = -log softmax over all items i of scale cos(q_best(c), e_i), at each item of cluster c,
    score of item i = max over j of cos(q_j, e_i)

Two more variants have one query, to tell what several of them add: hymirec-next is SASRec with
cosines and a learnt scale, and hymirec-base has the next W events as targets, too. Left out: the
language model, the cut of the history into long and short, query tokens (here q_j is a map of h),
the cosine codebook, balanced clusters, the dropping of negatives that nearly equal the target.

    python tests/related/hymirec.py --run runs/toy --seed 0                          # after 01
    python tests/related/hymirec.py --run runs/toy --seed 0 --variant hymirec-base

letters  those of 02_sasrec.py, and Q queries of a user, W events that they are to find, n places
         in histories (B T), P = Q! orders
"""
import itertools

import torch
import torch.nn as nn
import torch.nn.functional as F

from variation import own_options, script

s = script(2)

VARIANTS = {
    "hymirec": "three queries, each taught by a cluster of the next four events",
    "hymirec-control": "the same, but the clusters are dealt to the queries at random",
    "hymirec-base": "one query, taught by the next four events: no clusters to deal",
    "hymirec-next": "one query, taught by the next event: SASRec with cosines",
}
BASE = "hymirec-base"
SIZES = {  # Q, W
    "hymirec": (3, 4),
    "hymirec-control": (3, 4),
    "hymirec-base": (1, 4),
    "hymirec-next": (1, 1),
}
SCALE = 1 / 0.07  # of the cosines, at first


def cluster(items, Q):
    """K-means by cosine, from the first Q of the items. Where a cluster gets none, its centre is 0.

    items: (n, W, E), of length 1, or 0 where there is none -> label (n, W), centre (n, Q, E)
    """
    centre = items[:, :Q]                                               # (n, Q, E)
    for _ in range(5):
        label = (items @ centre.mT).argmax(2)                           # (n, W)
        member = F.one_hot(label, Q).float()                            # (n, W, Q)
        centre = F.normalize(member.mT @ items, dim=2)                  # (n, Q, E)
    return label, centre


def best_match(centre, queries):
    """Of all orders of the queries the one that is nearest to the centres.

    centre, queries: (n, Q, E) -> the query of each cluster (n, Q)
    """
    Q = queries.shape[1]
    orders = torch.tensor(list(itertools.permutations(range(Q))))       # (P, Q)
    orders = orders.to(centre.device)                                   # (P, Q)
    cosine = centre @ queries.mT                                        # (n, Q, Q)
    total = cosine[:, torch.arange(Q), orders].sum(2)                   # (n, P)
    return orders[total.argmax(1)]                                      # (n, Q)


def random_match(centre, queries):
    """Any order of the queries. centre, queries: (n, Q, E) -> the query of each cluster (n, Q)"""
    return torch.rand(queries.shape[:2], device=queries.device).argsort(1)  # (n, Q)


class HyMiRec(s.SASRec):
    """SASRec's output is turned into Q queries; an item's score is the best of their cosines."""
    variant = "hymirec"

    def __init__(self, N, T, E, *rest):
        super().__init__(N, T, E, *rest)
        self.Q, self.W = SIZES[self.variant]
        self.match = random_match if self.variant == "hymirec-control" else best_match
        self.ask = nn.Linear(E, self.Q * E)
        # The scale is SCALE times exp of this. Weight decay shrinks this number, and so brings the
        # scale back to SCALE. If log(SCALE) itself were learnt, decay would bring the scale to 1.
        self.log_scale = nn.Parameter(torch.zeros(()))

    def vectors(self):
        return F.normalize(super().vectors(), dim=1)                    # (N+1, E)

    def queries(self, hidden):
        """hidden: (n, E) -> (n, Q, E), of length 1"""
        return F.normalize(self.ask(hidden).unflatten(1, (self.Q, -1)), dim=2)  # (n, Q, E)

    def score(self, hidden, table):
        return (self.queries(hidden) @ table).amax(1)                   # (n, N)

    def loss(self, hidden, events, log_q, args):
        # The next W events of each place, as far as this piece of the history goes: never those
        # that are held out.
        later = F.pad(events[:, 1:], (0, self.W - 1))                   # (B, T+W-1)
        window = later.unfold(1, self.W, 1).flatten(0, 1)               # (n, W), 0: there is none
        vectors = self.vectors()                                        # (N+1, E)
        there = window > 0                                              # (n, W)
        items = vectors[window].detach() * there.unsqueeze(2)           # (n, W, E)

        queries = self.queries(hidden.flatten(0, 1))                    # (n, Q, E)
        label, centre = cluster(items, self.Q)                          # (n, W), (n, Q, E)
        query = self.match(centre, queries.detach()).gather(1, label)   # (n, W)
        mine = queries.take_along_dim(query.unsqueeze(2), 1)            # (n, W, E)

        scale = SCALE * self.log_scale.exp()                            # ()
        total = s.chosen_loss(scale * mine[there], vectors, window[there], log_q, args)  # ()
        # A mean, and then a sum over places, so that W changes no learning rate.
        return total / there.sum().clamp(min=1) * len(window)           # ()


def main(argv=None):
    HyMiRec.variant, line = own_options(argv, __doc__, VARIANTS)
    s.NAMED = "hymirec"
    if s.options(line).post_norm:
        s.fail("hymirec.py has no --post-norm.")
    s.SASRec = HyMiRec
    s.main(line)


if __name__ == "__main__":
    s.start(main)
