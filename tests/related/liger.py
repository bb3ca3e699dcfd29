"""LIGER: a generator finds candidates, and vectors of texts and pictures rank them.

A generator has learnt to write the codes of items that were taken, and hardly ever writes those of
a new one, which no training event shows. So the encoder learns something else beside the codes,
with the same weight: its output q_t at the last token of item t shall be near the next item,

    loss = sum_l loss_l - log softmax_i( cos(q_t, P v_i) / 0.07 ),   i: items with training events

where v_i holds the vectors of an item's text and picture, which new items have, too. Candidates are
the 20 items of the beam and all new ones, and this cosine ranks them. (liger-joined, ours, leaves
the beam in its order, and puts each new item where its softmax of cosines over all items belongs.)
It prints who gains and who pays: Recall@10 of those who look for a new item, and of the others
(nan: there are none). Left out: vectors in the history, which shows codes alone here; vectors of a
language model; a beam of 100. And our codebooks of texts and pictures have seen the new items,
LIGER's have not.

Yang et al., Unifying Generative and Dense Retrieval for Sequential Recommendation,
arXiv 2411.18814. New items are in the runs that "tests/questions.py unseen --run runs/toy" leaves:

    python 05_generator.py --run runs/toy/unseen-0
    python tests/related/liger.py --run runs/toy/unseen-0 --seed 0
    python tests/related/liger.py --run runs/toy/unseen-0 --seed 0 --variant liger-control

letters  B users in a batch, T items of history, M tokens of an item of history, L codes of an item,
         N items, U users, E width of the model, d width of an item's text and picture vectors
"""
import torch
import torch.nn.functional as F

from variation import own_options, recalls, script

BASE = "mscgrec"
VARIANTS = {
    "liger": "the items of the beam and all new ones, by the cosine",
    "liger-control": "the same, but every new item has the vectors of another new one",
    "liger-beam": "the items of the beam alone, by the cosine",
    "liger-joined": "the order of the beam, and new items by how likely the cosine makes them",
    "liger-trained": "LIGER's training, the order of the beam: to be seen beside liger-beam",
}
TEMPERATURE = 0.07

plain = script(5)  # 05 as it is
five = script(5)   # 05 as main changes it


class Question:
    """What a generator has besides. main sets the variant and counts, training events, (N+1,)."""

    def __init__(self, sources, modalities, target, trie, size, *neighbours):
        super().__init__(sources, modalities, target, trie, size, *neighbours)
        new = self.counts == 0                                          # (N+1,) and padding
        # Who is a candidate whatever the beam finds?
        joins = new & (self.variant != "liger-beam")                    # (N+1,)
        parts = [sources[name]["embeddings"] for name in ("text", "image") if name in modalities]
        content = torch.cat([torch.zeros(len(new), 0), *parts], 1)  # v (N+1, d)
        if not content.any():
            five.fail("LIGER ranks by texts and pictures, and these modalities have neither.")
        if self.variant == "liger-control":
            rows = new.nonzero()[1:, 0]                                # (new,), without padding
            content[rows] = content[rows.roll(len(rows) // 2)]
        self.register_buffer("new", new, persistent=False)
        self.register_buffer("joins", joins, persistent=False)
        self.register_buffer("content", content, persistent=False)
        self.project = torch.nn.Linear(content.shape[1], size.width, bias=False)  # P

    def encode(self, history, hidden, carried):
        x = super().encode(history, hidden, carried)                    # (B, T * M, E)
        self.question = x.unflatten(1, (history.shape[1], -1))[:, :, -1]  # q (B, T, E)
        return x

    def cosines(self):
        """cos(q_t, P v_i) / 0.07 for all items, after each place of the history. -> (B, T, N+1)"""
        question = F.normalize(self.question.float(), dim=2)            # (B, T, E)
        items = F.normalize(self.project(self.content), dim=1)          # (N+1, E)
        return question @ items.T / TEMPERATURE                         # (B, T, N+1)


class Liger(Question, plain.Generator):
    """05's model, and the question."""


class LigerLookahead(Question, plain.Lookahead):
    """The same with --lookahead."""


def batch_losses(model, trie, events, args):
    """The losses of the codes, as in 05, and with them that of the question. -> (L,)"""
    losses = plain.batch_losses(model, trie, events, args)              # (L,)
    asked = getattr(model, "module", model)  # under torchrun the model is wrapped
    scores = asked.cosines().masked_fill(asked.new, -torch.inf).flatten(0, 1)  # (B * T, N+1)
    loss = F.cross_entropy(scores, events[:, 1:].flatten(), reduction="sum")  # ()
    # What is added is 0, but has the gradient of `loss`: the values, which 05 prints, stay those of
    # the codes.
    return losses + (loss - loss.detach()) / len(losses)                # (L,)


@torch.no_grad()
def beam_search(model, trie, history, beam, trace=None):
    """The candidates, by the cosine. -> items (B, beams), log p among all candidates (B, beams)"""
    found, log_p = plain.beam_search(model, trie, history, beam, trace)  # (B, beams) both
    candidate = model.joins.repeat(len(found), 1).scatter(1, found, True)  # (B, N+1)
    candidate[:, 0] = False  # padding
    scores = model.cosines()[:, -1]                                     # (B, N+1)
    if model.variant == "liger-joined":  # log p of all items; those of the beam keep theirs
        scores = scores.log_softmax(1).scatter(1, found, log_p)         # (B, N+1)
    scores = scores.masked_fill(~candidate, -torch.inf)                 # (B, N+1)
    best, items = scores.log_softmax(1).topk(min(found.shape[1], len(model.new)))  # (B, beams)
    return items.masked_fill(best == -torch.inf, 0), best


def report(args, data, new):
    """What is won on new items and lost on others: by the base, if it lies in the run, and by ours.
    """
    looks = new[data["events"][data["offsets"][1:] - 1].long()]         # (U,) for a new item
    groups = {"those who look for a new item": looks, "others": ~looks}
    for recall, top in recalls([BASE, args.name], groups, data, args):  # (U, 10)
        # If the new items that are shown were drawn at random from all new ones, this share of
        # those who look for one would see theirs: new items in a first ten / new items.
        chance = (new[top] & (top > 0)).sum() / len(top) / new[1:].sum()  # ()
        print(f"{recall}; new items by chance {chance:.4f}")


def main(argv=None):
    variant, line = own_options(argv, __doc__, VARIANTS)
    args = five.options(line)
    data = five.Run(args.run).load("data.pt", "01_data.py")

    Question.variant = variant
    Question.counts = data["train_counts"]                              # (N+1,)
    five.Generator = Liger
    five.Lookahead = LigerLookahead
    five.batch_losses = batch_losses
    five.beam_search = plain.beam_search if variant == "liger-trained" else beam_search
    five.main(line)
    if args.history is None:
        report(args, data, Question.counts == 0)


if __name__ == "__main__":
    five.start(main)
