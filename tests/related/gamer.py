"""GAMER: an event has a level, and strong events look back at the weaker ones before them.

In GAMER the levels are clicks, carts, purchases; here 01 makes them of ratings: 0, 1, .. Strong
events are rare, and the weak ones before them tell why they came. So a learnt vector for the level
is added to each token of an event, and the encoder's output x goes through one more attention, with
a gate, in which an event sees only earlier ones of lower levels. With q, k and v made of x,

    x + silu(G x) * softmax(q . k + mask) v,
    mask = 0 where the key's event is earlier and its level is lower, else -inf

A token that sees no key, as all those of level 0, gets exactly 0. (In the authors' published code
there such a token sees all tokens with equal weight, future ones too: their mask is finite.) The
decoder is told the level of the event to write, in the search the highest one for everybody. The
base knows no levels, so what the attention adds is seen beside gamer-told, which has all but it.
It prints Recall@10 by the level of the test event: the idea is made for the highest one. Left out:
sessions, a decoder without an encoder (so the codes that are written do not look back by level),
several such layers, experts by position, copies of histories without some of the weak events.

Wang et al., Generative Sequential Recommendation via Hierarchical Behavior Modeling,
arXiv 2511.03155.

    python tests/related/gamer.py --run runs/films --seed 0
    python tests/related/gamer.py --run runs/films --seed 0 --variant gamer-control

letters  B users in a batch, T items of history, M tokens of an item of history, N items, U users,
         E width of the model, L codes of an item, V levels, n tokens of a history (T * M)
"""
import torch

from variation import own_options, recalls, script

BASE = "mscgrec"
VARIANTS = {
    "gamer": "an event sees earlier ones of lower levels",
    "gamer-control": "the same, but the levels of each user's events are shuffled",
    "gamer-reversed": "it sees earlier ones of higher levels",
    "gamer-bias": "it sees all earlier ones, with a learnt bias for each pair of levels",
    "gamer-told": "it sees none: encoder and decoder are told the levels, and that is all",
}

plain = script(5)  # 05 as it is
five = script(5)   # 05 as main changes it


class Levels:
    """What a generator has besides. An event is one number, item + (N+1) * level: see events_at.
    main sets the variant and V, how many levels there are."""

    def __init__(self, sources, modalities, target, trie, size, *neighbours):
        super().__init__(sources, modalities, target, trie, size, *neighbours)
        self.rows = len(self.shown)  # N+1
        self.level = torch.nn.Embedding(self.V, size.width)
        torch.nn.init.normal_(self.level.weight, std=plain.TOKEN_SCALE)
        self.attention = plain.Attention(size.width, size.heads, size.head)
        self.gate = torch.nn.Linear(size.width, size.width, bias=False)  # G
        # May an event of level a (row) see one of level b (column)? log 1 = 0, log 0 = -inf.
        yes = torch.ones(self.V, self.V)                                # (V, V)
        sees = {"gamer-reversed": yes.triu(1), "gamer-bias": yes, "gamer-told": 0 * yes}
        sees = sees.get(self.variant, yes.tril(-1))                     # (V, V)
        self.mask = torch.nn.Parameter(sees.log(), requires_grad=self.variant == "gamer-bias")
        # The loss looks up an event in the tree, and finds its item whatever the level.
        trie.codes = trie.codes.repeat(self.V, 1)                       # (V * (N+1), L)
        trie.path = trie.path.repeat(self.V, 1)                         # (V * (N+1), L)

    def carried(self, history):
        return super().carried(history % self.rows)

    def embed(self, history, hidden, carried):
        x = super().embed(history % self.rows, hidden, carried)         # (B, T, M, E)
        return x + self.level(history // self.rows).unsqueeze(2)        # (B, T, M, E)

    def encode(self, history, hidden, carried):
        x = super().encode(history, hidden, carried)                    # (B, n, E)
        return x + self.dropout(self.look_back(x, history // self.rows))  # (B, n, E)

    def look_back(self, x, level):
        """What tokens take from those that they see. x: (B, n, E), level: (B, T) -> (B, n, E)"""
        M = x.shape[1] // level.shape[1]
        level = level.repeat_interleave(M, 1)                           # (B, n)
        place = torch.arange(x.shape[1], device=x.device) // M          # (n,) of the event
        mask = self.mask[level.unsqueeze(2), level.unsqueeze(1)]        # (B, n, n): query, key
        mask = mask.masked_fill(place >= place.unsqueeze(1), -torch.inf)  # (B, n, n)

        # A softmax over nothing is no number. So who sees no key sees all for now, and gets 0.
        blind = mask.isneginf().all(2, keepdim=True)                    # (B, n, 1)
        mask = mask.masked_fill(blind, 0).unsqueeze(1)                  # (B, 1, n, n), all heads
        seen = self.attention(x, *self.attention.keys_values(x), mask)  # (B, n, E)
        return torch.nn.functional.silu(self.gate(x)) * seen.masked_fill(blind, 0)  # (B, n, E)

    def begin(self, history, hidden, carried):
        # (B, T); in the search the highest one.
        level = self.to_write if self.training else torch.full_like(history, self.V - 1)
        begin = super().begin(history % self.rows, hidden, carried)     # (B, T, 1, E), or all alike
        return begin + self.level(level).unsqueeze(2)                   # (B, T, 1, E)

    def forward(self, history, target, masking=0.0):
        self.to_write = target // self.rows                             # (B, T)
        return super().forward(history, target % self.rows, masking)


class Gamer(Levels, plain.Generator):
    """05's model, and the levels."""


class GamerLookahead(Levels, plain.Lookahead):
    """The same with --lookahead."""


def events_at(data, start, T, args):
    """As in 05, but the number of an event tells its level, too. -> (B, T)"""
    levels = plain.events_at({"events": five.levels}, start, T, args)   # (B, T)
    return plain.events_at(data, start, T, args) + len(data["item_ids"]) * levels  # (B, T)


def main(argv=None):
    Levels.variant, line = own_options(argv, __doc__, VARIANTS)
    args = five.options(line)
    if args.history is not None:
        five.fail("gamer.py has no --history: nobody says of which levels those events were.")
    data = five.Run(args.run).load("data.pt", "01_data.py")
    if "levels" not in data:
        five.fail(f"{args.run}/data.pt has no levels: no ratings, all alike, or made by an old 01.")

    five.levels = data["levels"]                                        # (events,)
    if Levels.variant == "gamer-control":
        rng = torch.Generator().manual_seed(args.seed)
        for part in five.levels.split(data["offsets"].diff().tolist()):  # of one user
            # Not those of the last two events, which are held out: training is not to see them.
            part[:-2] = part[:-2][torch.randperm(len(part) - 2, generator=rng)]
    Levels.V = five.levels.max().item() + 1
    five.Generator = Gamer
    five.Lookahead = GamerLookahead
    five.events_at = events_at
    five.main(line)
    last = data["levels"][data["offsets"][1:] - 1]                      # (U,) of the test events
    groups = {f"level {v}": last == v for v in range(Levels.V)}
    for recall, _ in recalls([BASE, "gamer-told", args.name], groups, data, args):
        print(recall)


if __name__ == "__main__":
    five.start(main)
