"""MMGRec: codes of content that was mixed over the graph of who bought what.

MMGRec (Liu et al., arXiv 2404.16555) mixes the content vectors of items over the graph of users and
items, and cuts the result into codes, which a transformer writes. Tried here is this one idea: such
codes take the place of SASRec's, shown and written. The nodes of the graph are users and items, an
edge is a training event, and with x the content vectors of items, image and text end to end,

    h_0 = [vectors of users; W x],   h_(l+1) = Own_l h_l + Near_l (mean of the neighbours' h_l)

with a leaky ReLU between the two layers. BPR trains them: - log sigmoid(h_u . h_i - h_u . h_j),
where user u had item i, and j is any item. Left out: its attention for sets (our histories have an
order), its autoencoder around the quantiser, audio, users' vectors in the generator. Its order of
items that share three codes, the most bought first, all our codes have (detail 9 in
tests/README.md); mmgrec-unsorted shows what that is worth.

    python tests/related/mmgrec.py --run runs/toy
    python tests/related/mmgrec.py --run runs/toy --variant mmgrec-control   # or another
    python tests/related/mmgrec.py --run runs/toy --lookahead --name mmgrec-lookahead

letters  N items, U users, d width of the content vectors, E width of the model
"""
import torch
import torch.nn as nn
import torch.nn.functional as F

from variation import makes_codes, only_seed, own_options, script

four = script(4)
five = script(5)

VARIANTS = {
    "mmgrec": "content mixed over the graph of training events",
    "mmgrec-control": "the edges' items permuted, all degrees kept: content and popularity alone",
    "mmgrec-no-content": "content permuted over the items: the graph alone",
    "mmgrec-unsorted": "items that share three codes are numbered at random",
}
BASE = "mscgrec"
# Chosen, when this file was written, by how often h_u . h_i has the validation item among its first
# ten. So the graph is tuned on validation, and the generator is not.
STEPS = 300
LR = 3e-3
DROPOUT = 0.5  # of content


def training_edges(data):
    """Who had what, all but each user's last two events. -> users, items, (edges,) both"""
    offsets = data["offsets"]                                   # (U+1,)
    user = torch.arange(len(offsets) - 1).repeat_interleave(offsets.diff())  # (events,)
    training = torch.arange(len(user)) < offsets[1:][user] - 2  # (events,)
    return user[training], data["events"][training].long()


class Graph(nn.Module):
    """Two layers in which each node hears its neighbours (GraphSAGE)."""

    def __init__(self, user, item, U, N, d, E):
        super().__init__()
        self.users = nn.Parameter(0.1 * torch.randn(U, E))
        self.content = nn.Sequential(nn.Dropout(DROPOUT), nn.Linear(d, E))
        self.first = nn.Linear(2 * E, E)  # Own_0 and Near_0 side by side
        self.second = nn.Linear(2 * E, E)

        # The matrix whose product with the vectors of all nodes is the mean of each one's
        # neighbours. Nodes are the users, then the items from padding on; an edge leads both ways.
        ends = torch.stack([user, U + item])                    # (2, edges)
        ends = torch.cat([ends, ends.flip(0)], 1)               # (2, 2 edges)
        share = 1 / ends[0].bincount()[ends[0]]                 # (2 edges,)
        size = (U + N + 1, U + N + 1)
        self.mean = torch.sparse_coo_tensor(ends, share, size, check_invariants=True)

    def forward(self, x):
        """x: (N+1, d) -> vectors of users and items, (U, E) and (N+1, E)"""
        h = torch.cat([self.users, self.content(x)])            # (U+N+1, E)
        h = F.leaky_relu(self.first(torch.cat([h, self.mean @ h], 1)))  # (U+N+1, E)
        h = self.second(torch.cat([h, self.mean @ h], 1))       # (U+N+1, E)
        return h.split([len(self.users), len(x)])


def mix(x, user, item, U, E):
    """Trains the graph. x: (N+1, d); user, item: (edges,) both

    -> vectors of users and items, (U, E) and (N+1, E)
    """
    graph = Graph(user, item, U, len(x) - 1, x.shape[1], E)
    optimizer = torch.optim.Adam(graph.parameters(), lr=LR)
    for _ in range(STEPS):
        users, items = graph(x)                                 # (U, E), (N+1, E)
        other = torch.randint(1, len(x), item.shape)            # (edges,)
        lead = (users[user] * (items[item] - items[other])).sum(1)  # (edges,)
        optimizer.zero_grad()
        F.softplus(-lead).mean().backward()  # softplus(-x) is - log sigmoid(x)
        optimizer.step()
    return [h.detach() for h in graph.eval()(x)]


def make_codes(name, shown, run, args):
    """Writes NAME_codes.pt. shown: the modalities that content is made of"""
    torch.manual_seed(args.seed)
    data = run.load("data.pt", "01_data.py")
    parts = [run.load(f"{kind}_codes.pt", "03 or 04")["embeddings"] for kind in shown]
    x = torch.cat(parts, 1)                                     # (N+1, d)
    user, item = training_edges(data)                           # (edges,) both
    known = (data["train_counts"] > 0) | (x != 0).any(1)        # (N+1,)

    if name == "mmgrec-control":
        item = item[torch.randperm(len(item))]                  # (edges,)
    if name == "mmgrec-no-content":
        x[1:] = x[1:][torch.randperm(len(x) - 1)]               # (N, d)
    _, h = mix(x, user, item, len(data["user_ids"]), args.width)  # (N+1, E)
    if name == "mmgrec-unsorted":  # drawn after the graph is trained, which is that of mmgrec
        data["train_counts"] = torch.randperm(len(x))           # (N+1,)
    embeddings = four.standard_embeddings(h[known], known)      # (N+1, E)
    four.save_codes(f"{name}_codes.pt", embeddings, known, data, run, only_seed(args))


def main(argv=None):
    """Makes the codes of a variant, then calls 05, which shows and writes them."""
    name, line = own_options(argv, __doc__, VARIANTS)
    args = five.options(line)
    run = four.Run(args.run)
    shown = ["image", "text"] if (run.folder / "image_codes.pt").exists() else ["text"]
    if makes_codes(args):
        make_codes(name, shown, run, args)
    # Its vectors were learnt from the histories, as SASRec's: see --shrunk.
    five.main(["--modalities", ",".join([*shown, name]), "--target", name,
               "--shrunk", f"{args.shrunk},{name}", *line])


if __name__ == "__main__":
    five.start(main)
