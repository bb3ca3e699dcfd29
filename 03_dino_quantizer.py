"""RQ-DINO: image codes from a ViT that is trained with its quantiser inside.

DINO trains a student to say of one crop of a picture what a teacher, the student's running
average, says of another: no labels. Here a residual quantiser sits between the student's ViT and
head, so that three codes must carry the answer (MSCGRec, arXiv 2602.03713, the image modality):
loss = L_DINO + beta sum_l ||r_{l-1} - sg(C_l[c_l])||^2 / d + .1 KoLeo, means over views and
pictures;  r_0 = z, the ViT's vector;  r_l = r_{l-1} - C_l[c_l], with C_l the codebook and c_l the
code of level l; sg: no gradient passes. KoLeo, and Sinkhorn's centring inside L_DINO, are DINOv2's:
they keep it from saying the same of all pictures.

    python 03_dino_quantizer.py                    # after 01_data.py
    python 03_dino_quantizer.py --plain            # control: DINO, then residual k-means
    torchrun --nproc_per_node=2 -- 03_dino_quantizer.py  # several GPUs

Numbers in brackets, as [14], are the details that tests/README.md lists.

letters  B pictures in a batch, b pictures of it in this process, V views of a picture,
         S side of a picture, s patches along a side, E width of the model, H heads,
         O prototypes of the head, d width of a vector that is cut into codes,
         K values of a code, L codes of an item in one modality, N items

reads   data.pt, images.pt
writes  dino.pt
          teacher           dict                    backbone.* (public names: for --init), head.*
          losses            float32 (epochs)        L_DINO, nats
          teacher_entropy   float32 (epochs)        nats; near log O: collapse
          seconds           float                   of training
          options           dict                    the options of this run
        image_codes.pt
          codes             int16 (N+1, L)          row 0 = -1; level 4 separates collisions
          codebooks         float32 (3, K, d)       d: width of the ViT; 1 without pictures
          embeddings        float32 (N+1, d)        mean 0, one scale for all; zero if unknown
          known             bool (N+1)              the item has a picture
          moved             int                     items that redistribution moved

On the toy shop: 109 seconds, 0.4 GiB (2 cores of an AMD EPYC).
"""
import argparse
import atexit
import contextlib
import copy
import hashlib
import math
import os
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

GLOBAL_SCALE = (0.5, 1.0)     # share of a picture's area that a global crop shows: from, to
LOCAL_SCALE = (0.25, 0.6)     # the same of a local crop: a pattern needs two periods to be seen
JITTER = 0.4                  # light, contrast and saturation change by up to this share
BALANCE = 0.2                 # red, green and blue each change by up to this share
GREY = 0.3                    # share of views without colour
MEAN = (0.485, 0.456, 0.406)  # of red, green, blue in ImageNet: the public weights expect them
STD = (0.229, 0.224, 0.225)   # their deviation
CODEBOOK_DECAY = 0.95         # what stays of a centroid in a step: it averages about 20 batches
DEAD = 0.05                   # with fewer members a batch, on average, a centroid starts anew
STUDENT_TEMP = 0.1            # tau_s: outputs are divided by it before the softmax
TEACHER_TEMP = 0.015          # tau_t: published .04 to .07; after few steps pictures differ little
SINKHORN = 3                  # rounds of centring
KOLEO = 0.1                   # weight of the term that keeps vectors apart
BETA = 0.25                   # weight of the commitment term
LR = 3e-3                     # learning rate of AdamW, before warm-up and cosine
CLIP = 3.0                    # largest norm of the gradient


# --- Views of a picture --------------------------------------------------------------------------
# A view is a crop, changed in light and colour. Two global ones show much of a picture, and the
# teacher sees these alone; local ones show a small part, and only the student sees them.
# DINO learns what the views of a picture have in common. Whatever it should not care about is
# therefore left to chance in each of them:
#
#   crop, stretch     A thing is the same thing when it is nearer, or stands elsewhere. The smallest
#                     crop still shows two periods of a pattern: less could not tell it.
#   mirror            Seen from the other side it is the same. Never upside down: stripes that lie
#                     and bars that stand are two patterns.
#   light, contrast,  A brighter lamp, fog, a faded print. They blur how bright the background is,
#   saturation        which covers more pixels than anything that matters.
#   white balance     A yellow lamp, a blue evening. What is pale takes any tint, so a tint cannot
#                     be the answer; a strong colour stays what it is.
#   grey              Colour is the easiest answer, and who has one looks for no other. In views
#                     without it the pattern has to answer.


def draw_views(V, B, rng):
    """What is left to chance in V views of each of B pictures: twelve numbers in -1..1, namely
    area, stretch, left, top, mirror, light, contrast, saturation, red, green, blue, grey.

    -> (V, B, 12)
    """
    return 2 * torch.rand(V, B, 12, generator=rng) - 1              # (V, B, 12)


def crops(x, size, scale, draws):
    """One view of each picture. It shows a share of the picture's area between the two of `scale`.

    x: (n, 3, S, S) in 0..1, size: pixels along the view, draws: (n, 12) as draw_views makes them
    -> (n, 3, size, size)
    """
    area, stretch, left, top, mirror = draws[:, :5].unbind(1)       # (n,) each
    light, contrast, saturation = draws[:, 5:8].unbind(1)           # (n,) each
    balance = draws[:, 8:11]                                        # (n, 3): of red, green, blue
    grey_view = (1 + draws[:, 11]) / 2 < GREY                       # (n,)

    # The view shows a window of the picture. If the window has `side` times the picture's width and
    # height, it has side^2 of its area: the smallest share at area = -1, the largest at 1.
    smallest, largest = scale
    between = (1 + area) / 2                                        # (n,) 0 to 1
    side = (smallest + between * (largest - smallest)).sqrt()       # (n,)

    # Then it is stretched, up to width / height = 3/4 or 4/3, of which `root` is the square root.
    # Coordinates run from -1 (left, top) to 1 (right, bottom): in them half the width of the
    # picture is 1, and that of the window is:
    root = (4 / 3) ** (stretch / 2)                                 # (n,)
    half = torch.stack([side * root, side / root], 1)               # (n, 2): of width, of height
    half = half.clamp(max=1)  # not beyond the picture              # (n, 2)

    # At left = -1 the window lies at the picture's left edge, at 1 at its right; top likewise.
    middle = (1 - half) * torch.stack([left, top], 1)               # (n, 2)

    # A negative width mirrors: then the view's left is the window's right.
    half[:, 0] *= mirror.sign()                                     # (n,)

    # A pixel whose place in the view is p shows the point middle + half * p of the picture. Two
    # pixels have their places at -1/2 and 1/2, four at -3/4, -1/4, 1/4 and 3/4.
    odd = torch.arange(1, 2 * size, 2, device=x.device)             # (size,): 1, 3, 5, ..
    place = odd / size - 1                                          # (size,)
    across, down = torch.meshgrid(place, place, indexing="xy")      # (size, size) each
    places = torch.stack([across, down], 2)                         # (size, size, 2)
    middle = middle[:, None, None]                                  # (n, 1, 1, 2)
    half = half[:, None, None]                                      # (n, 1, 1, 2)
    points = middle + half * places                                 # (n, size, size, 2)
    # A point within half a pixel of the picture's edge has the colour of the edge.
    x = F.grid_sample(x, points, padding_mode="border", align_corners=False)  # (n, 3, size, size)

    # White balance: each of the three channels has a light of its own.
    x = x * (1 + BALANCE * balance)[:, :, None, None]               # (n, 3, size, size)

    # A pixel is the mean of its view + what its own grey adds + what its colour adds:
    #     x = mean + (grey - mean) + (x - grey)
    # Saturation scales the last of the three (in grey views by 0), contrast the last two, light
    # all of them.
    grey = x.mean(1, keepdim=True)                                  # (n, 1, size, size)
    mean = x.mean((1, 2, 3), keepdim=True)                          # (n, 1, 1, 1)
    saturation = (1 + JITTER * saturation).masked_fill(grey_view, 0)  # (n,)
    saturation = saturation.view(-1, 1, 1, 1)                       # (n, 1, 1, 1)
    contrast = (1 + JITTER * contrast).view(-1, 1, 1, 1)            # (n, 1, 1, 1)
    light = (1 + JITTER * light).view(-1, 1, 1, 1)                  # (n, 1, 1, 1)
    colour = saturation * (x - grey)                                # (n, 3, size, size)
    x = mean + contrast * (grey - mean + colour)                    # (n, 3, size, size)
    return (light * x).clamp(0, 1)                                  # (n, 3, size, size)


def make_views(pictures, draws, size, patch):
    """Two global crops and V - 2 local ones, of half their side, of each picture.

    pictures: (b, 3, S, S) in 0..1, draws: (V, b, 12)
    -> global crops (2, b, 3, size, size), local crops (V-2, b, 3, local, local)
    """
    # Rows are all pictures for the first crop, then all for the second, as in `repeat`.
    V, b, _ = draws.shape
    twice = pictures.repeat(2, 1, 1, 1)                             # (2b, 3, S, S)
    large = crops(twice, size, GLOBAL_SCALE, draws[:2].flatten(0, 1))

    local = max(1, size // 2 // patch) * patch  # whole patches, at least one
    often = pictures.repeat(V - 2, 1, 1, 1)                         # ((V-2)b, 3, S, S)
    small = crops(often, local, LOCAL_SCALE, draws[2:].flatten(0, 1))

    return large.unflatten(0, (2, b)), small.unflatten(0, (V - 2, b))


# --- The ViT -------------------------------------------------------------------------------------
# A picture is cut into patches, each patch is a token, and one more token, [CLS], gathers what all
# of them show. The names are those of the public release (facebookresearch/dino), so that its
# checkpoints load. Attention is written by hand here, to be read; in 02 it is PyTorch's own, which
# is fused and faster, and in 05 it has learnt biases, and caches for the search.


def number_of_heads(E):
    """H: 64 coordinates a head, as in the ViTs of the public release, but at least 3 heads."""
    return max(3, E // 64)


class Block(nn.Module):
    """Attention, in which tokens ask each other, then an MLP on each; both are added to x."""

    def __init__(self, E):
        super().__init__()
        self.heads = number_of_heads(E)
        self.norm1 = nn.LayerNorm(E, eps=1e-6)
        self.norm2 = nn.LayerNorm(E, eps=1e-6)
        self.attn = nn.ModuleDict({
            "qkv": nn.Linear(E, 3 * E),
            "proj": nn.Linear(E, E),
        })
        self.mlp = nn.ModuleDict({
            "fc1": nn.Linear(E, 4 * E),
            "fc2": nn.Linear(4 * E, E),
        })

    def forward(self, x, asking=None):
        """x: (n, tokens, E) -> (n, asking, E), the first `asking` tokens (None: all of them)"""
        # One product gives the queries, keys and values of all heads.
        qkv = self.attn["qkv"](self.norm1(x))                       # (n, tokens, 3E)
        qkv = qkv.unflatten(2, (3, self.heads, -1))                 # (n, tokens, 3, H, E/H)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)                        # (n, H, tokens, E/H) each
        q = q[:, :, :asking]                                        # (n, H, asking, E/H)

        # softmax(q k^T / sqrt(E/H)) v
        scores = q @ k.transpose(2, 3) / math.sqrt(k.shape[3])      # (n, H, asking, tokens)
        y = scores.softmax(3) @ v                                   # (n, H, asking, E/H)
        y = y.transpose(1, 2).flatten(2)                            # (n, asking, E)
        x = x[:, :asking] + self.attn["proj"](y)                    # (n, asking, E)

        hidden = F.gelu(self.mlp["fc1"](self.norm2(x)))             # (n, asking, 4E)
        return x + self.mlp["fc2"](hidden)                          # (n, asking, E)


class VisionTransformer(nn.Module):
    """x: (n, 3, S, S) in 0..1, any S that `patch` divides -> [CLS] (n, E)"""

    def __init__(self, size, patch, E, depth):
        super().__init__()
        self.size = size    # pixels along a global crop; whole pictures are resized to it
        self.patch = patch  # pixels along a patch
        patches = (size // patch) ** 2
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, E))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, 1 + patches, E))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, E, patch, patch)})
        self.blocks = nn.ModuleList(Block(E) for _ in range(depth))
        self.norm = nn.LayerNorm(E, eps=1e-6)
        mean = torch.tensor(MEAN).view(3, 1, 1)                     # (3, 1, 1), of the channels
        std = torch.tensor(STD).view(3, 1, 1)                       # (3, 1, 1)
        self.register_buffer("mean", mean, persistent=False)
        self.register_buffer("std", std, persistent=False)

    def forward(self, x):
        x = (x - self.mean) / self.std                              # (n, 3, S, S)

        # The convolution moves by whole patches, of which s lie along a side: a vector for each.
        x = self.patch_embed["proj"](x)                             # (n, E, s, s)
        place = resample(self.pos_embed, x.shape[3])                # (1, 1 + s*s, E)
        patches = x.flatten(2).transpose(1, 2)                      # (n, s*s, E)
        cls = self.cls_token.expand(len(x), -1, -1)                 # (n, 1, E)
        x = torch.cat([cls, patches], 1) + place                    # (n, 1 + s*s, E)

        # In the last block only [CLS] asks: nothing reads what the patches would become there.
        for block in self.blocks[:-1]:
            x = block(x)                                            # (n, 1 + s*s, E)
        x = self.blocks[-1](x, asking=1)                            # (n, 1, E)
        return self.norm(x[:, 0])                                   # (n, E)


def resample(pos_embed, s):
    """Embeddings of the places of all patches, stretched to s x s of them: local crops have fewer.

    pos_embed: (1, 1 + patches, E), that of [CLS] first -> (1, 1 + s*s, E)
    """
    side = math.isqrt(pos_embed.shape[1] - 1)  # patches are side * side
    grid = pos_embed[:, 1:].transpose(1, 2)                         # (1, E, patches)
    grid = grid.unflatten(2, (side, side))                          # (1, E, side, side)
    grid = F.interpolate(grid, (s, s), mode="bicubic")              # (1, E, s, s)
    grid = grid.flatten(2).transpose(1, 2)                          # (1, s*s, E)
    return torch.cat([pos_embed[:, :1], grid], 1)                   # (1, 1 + s*s, E)


def load_backbone(path, size):
    """The ViT in a file of the public release or in our dino.pt, for pictures of size x size."""
    try:
        # Whole checkpoints of the release hold both networks, and the options of their command.
        with torch.serialization.safe_globals([argparse.Namespace]):
            state = torch.load(path, weights_only=True, map_location="cpu")
        state = state.get("teacher", state.get("student", state))
        weights = {}
        for name, weight in state.items():
            name = name.removeprefix("module.").removeprefix("backbone.")
            if not name.startswith("head."):
                weights[name] = weight

        E, _, _, patch = weights["patch_embed.proj.weight"].shape
        depth = sum("norm1.weight" in name for name in weights)
        check_sizes(size, patch, E)
        weights["pos_embed"] = resample(weights["pos_embed"], size // patch)
        vit = VisionTransformer(size, patch, E, depth)
        vit.load_state_dict(weights)
    except Exception as error:
        fail(f"--init {path} ({type(error).__name__}): what fits is a ViT of facebookresearch/dino "
             "(dino_deitsmall16_pretrain.pth, say) or a dino.pt of this script; DINOv2, other ViTs "
             "and .safetensors do not.")
    return vit


def check_sizes(size, patch, E):
    """Ends the script where a ViT cannot have these sizes."""
    heads = number_of_heads(E)
    if size % patch or E % heads:
        fail(f"Patches of {patch} must tile crops of {size}, and {heads} heads a width of {E}.")


# --- The head ------------------------------------------------------------------------------------
# Without labels there are no classes, so DINO makes up its own: O prototypes, directions that are
# learnt, and the head says how similar a crop is to each.


class Head(nn.Module):
    """The cosine of mlp(z) with each of O prototypes: both are scaled to length 1.

    z: (n, E) -> (n, O) in -1..1
    """

    def __init__(self, E, O):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(E, 4 * E),
            nn.GELU(),
            nn.Linear(4 * E, 4 * E),
            nn.GELU(),
            nn.Linear(4 * E, E),
        )
        self.last_layer = nn.Linear(E, O, bias=False)

    def forward(self, z):
        z = F.normalize(self.mlp(z), dim=1)                         # (n, E)
        prototypes = F.normalize(self.last_layer.weight, dim=1)     # (O, E)
        return z @ prototypes.T                                     # (n, O)


# --- The residual quantiser ----------------------------------------------------------------------
# The idea of this script: between ViT and head, z is rounded to a sum of three centroids, so that
# whatever the student knows of a picture has to pass through three codes.
#
# The trouble is the gradient. A code is an argmin, and an argmin is a staircase: move z a little,
# and no code changes; move it more, and one jumps. So the derivative of z_q by z is 0 wherever it
# exists, and no gradient would reach the ViT. The straight-through gradient (VQ-VAE, van den Oord
# et al. 2017) rounds on the way forward, and on the way back acts as if z had not been rounded:
#
#     forward     z_q = C_1[c_1] + C_2[c_2] + C_3[c_3]
#     backward    dL/dz = dL/dz_q
#
# One expression does both: z + sg(z_q - z), where sg (`detach`) makes a constant of its argument.
# Its value is z_q, and its derivative by z is 1. How wrong that gradient is depends on how far z_q
# is from z, and the commitment term of the loss keeps them close.


class ResidualQuantiser(nn.Module):
    """Three codebooks. They are no parameters: no gradient moves a centroid, it follows the running
    mean of its members, the vectors that it is nearest to.

    codebooks: (3, K, d) to start with, d = E of the ViT
    """

    def __init__(self, codebooks):
        super().__init__()
        # Each centroid starts as if it had had one member a batch, itself.
        members = codebooks.new_ones(codebooks.shape[:2])
        self.register_buffer("codebooks", codebooks)                # (3, K, d)
        self.register_buffer("sums", codebooks.clone())             # (3, K, d) of the members
        self.register_buffer("members", members)                    # (3, K) how many

    def forward(self, z):
        """z: (n, d) -> z_q (n, d), commitment sum_l ||r_{l-1} - sg(C_l[c_l])||^2 / d of all n ()"""
        residual = z                                                # (n, d)
        z_q = torch.zeros_like(z)                                   # (n, d)
        commitment = 0.0
        for codebook in self.codebooks:
            code = nearest(residual.detach(), codebook)             # (n,)
            centroid = codebook[code]                               # (n, d), without gradient
            z_q = z_q + centroid                                    # (n, d)
            # r_l = r_{l-1} - C_l[c_l] is what the commitment squares, too. We take the mean over d,
            # not the sum, so that one beta is right for all widths.
            residual = residual - centroid                          # (n, d)
            commitment = commitment + residual.square().mean(1).sum()  # ()

        straight_through = z + (z_q - z).detach()                   # (n, d)  [14]
        return straight_through, commitment

    def update(self, residual, decay=CODEBOOK_DECAY):
        """Moves the centroids: C_l[k] = sum of its members / their number, both running means, that
        is to say new = decay * old + (1 - decay) * what this batch has. residual: (n, d), r_0 = z
        """
        # What the loop names are views: what changes in place in them changes in the buffers.
        for members, sums, codebook in zip(self.members, self.sums, self.codebooks):
            code = nearest(residual, codebook)                      # (n,)
            one = torch.ones_like(code, dtype=members.dtype)        # (n,)
            members.mul_(decay)
            members.index_add_(0, code, one, alpha=1 - decay)       # (K,)
            sums.mul_(decay)
            sums.index_add_(0, code, residual, alpha=1 - decay)     # (K, d)

            # A centroid without members would stay where no vector is, and its code unused. It
            # starts anew at a vector of this batch, centroid k of K at a share k / K of it: of 8
            # vectors and K = 4, centroid 3 at vector 6.  [15]
            dead = members < DEAD                                   # (K,)
            place = torch.arange(len(members), device=residual.device)  # (K,)
            anew = residual[place * len(residual) // len(members)]  # (K, d)
            sums.copy_(torch.where(dead.unsqueeze(1), anew, sums))  # (K, d)
            members.masked_fill_(dead, 1)                           # (K,)

            # The next level is about what this one leaves, before its centroids move.
            residual = residual - codebook[code]                    # (n, d)
            codebook.copy_(sums / members.unsqueeze(1))             # (K, d)


# --- Student and teacher -------------------------------------------------------------------------
# Two networks of one shape, but only the student has a quantiser: the teacher sets the target,
# and what rounds the teacher rounds the target.  [13]


class Model(nn.Module):
    """ViT, quantiser (in a student, but not with --plain), head. bf16: the ViT is in bfloat16."""

    def __init__(self, backbone, head, bf16):
        super().__init__()
        self.backbone = backbone
        self.head = head
        self.bf16 = bf16
        self.quantiser = None  # `build` gives one to the student

    def forward(self, views):
        """views: a list of tensors (some, b, 3, side, side), each of one size; V views together

        -> what the head says (V, b, O); z (V, b, E), E being d; commitment of all of them ()
        """
        vectors = []
        with torch.autocast(views[0].device.type, torch.bfloat16, enabled=self.bf16):
            for view in views:
                vectors.append(self.backbone(view.flatten(0, 1)))   # (some * b, E)
        z = torch.cat(vectors).float()                              # (V * b, E)

        z_q = z                                                     # (V * b, E)
        commitment = 0.0
        if self.quantiser is not None:
            z_q, commitment = self.quantiser(z)                     # (V * b, E), ()
        out = self.head(z_q)                                        # (V * b, O)

        V = sum(len(view) for view in views)
        b = views[0].shape[1]
        out = out.unflatten(0, (V, b))                              # (V, b, O)
        z = z.unflatten(0, (V, b))                                  # (V, b, E)
        return out, z, commitment


# --- The loss ------------------------------------------------------------------------------------
# Both networks say of a crop how likely it belongs to each prototype: p_t the teacher, p_s the
# student. The teacher sees global crops only, the student all views: it has to guess the whole
# from a part.


def dino_loss(p_t, logits):
    """Cross-entropy: what the teacher says of crop t, the student has to say of every other view v.

    L_DINO = mean over all pairs t != v of  - sum_o p_t[t, o] log p_s[v, o]
    p_s = softmax(logits / tau_s)

    p_t: (2, b, O), logits: (V, b, O) of all views, the teacher's two first -> (), nats, the sum
    over b pictures. Caron et al. 2021, equation 3
    """
    log_p_s = (logits / STUDENT_TEMP).log_softmax(2)                # (V, b, O)
    pairs = -torch.einsum("tbo,vbo->tv", p_t, log_p_s)              # (2, V)

    # On the diagonal, t = v, the student sees what the teacher sees: nothing to guess.  [11]
    same_crop = pairs.diagonal().sum()                              # ()
    return (pairs.sum() - same_crop) / (pairs.numel() - 2)          # ()


# Nothing in this loss forbids the same answer for all crops, or one that is sure of nothing. Two
# parts of DINOv2 (Oquab et al. 2023) prevent both  [12]: centring, without which the teacher soon
# said the same of all pictures, and KoLeo, without which vectors drew together and lost the
# pattern.


def sinkhorn(out):
    """p_t of crops that share a batch. Each crop must say something, and each prototype must be
    said equally often: in turn both are put right, as Sinkhorn and Knopp do.  [12]

    out: (crops, O), cosines -> (crops, O), what is said of a crop adds up to 1
    """
    log_p = (out / TEACHER_TEMP).log_softmax(1)                     # (crops, O)
    for _ in range(SINKHORN):
        log_p = log_p.log_softmax(0)  # of each prototype the crops' shares add up to 1
        log_p = log_p.log_softmax(1)  # of each crop the prototypes' shares do
    return log_p.exp()                                              # (crops, O)


def koleo(z, everyone):
    """- log of the distance to the nearest other picture: vectors of length 1 that push each other
    apart fill the sphere, and what tells two pictures apart grows in them.  [12]

    z: (2, b, E), of the pictures that this process has; everyone: (2, B, E), the whole batch
    without gradient -> (), the mean over the two crops, the sum over b pictures
    """
    if everyone.shape[1] < 2:  # nobody to keep away from
        return z.new_zeros(())                                      # ()
    z = F.normalize(z, dim=2)                                       # (2, b, E)
    everyone = F.normalize(everyone, dim=2)                         # (2, B, E)

    # On the sphere the nearest has the largest cosine. A picture's nearest is itself: we take the
    # second.
    cosines = z.detach() @ everyone.transpose(1, 2)                 # (2, b, B)
    second = cosines.topk(2, dim=2).indices[:, :, 1:]               # (2, b, 1)
    neighbour = everyone.gather(1, second.expand(-1, -1, z.shape[2]))  # (2, b, E)

    # 1e-8: two equal pictures have distance 0, whose logarithm is infinite.
    square = (z - neighbour).square().sum(2)                        # (2, b)
    distance = (square + 1e-8).sqrt()                               # (2, b)
    return -distance.log().mean(0).sum()                            # ()


# --- What changes during training ----------------------------------------------------------------
# `done` is the share of all steps that are over: 0 at the first step, 1 after the last.


def cosine(done):
    """From 1 to 0, slowly at both ends."""
    return (1 + math.cos(math.pi * done)) / 2


def learning_rate(done):
    """Warm-up: from a hundredth of LR in a straight line, until it meets the cosine to 0."""
    warm_up = 10 * done + 0.01
    return LR * min(cosine(done), warm_up)


def weight_decay(done):
    """From .04 to .4: weights may grow at first, and must be worth it later."""
    return 0.4 - 0.36 * cosine(done)


def teacher_momentum(done, steps):
    """m, what stays of the teacher in a step. It rises to 1; published: from .996.

    With .996 it is an average of about 250 steps. A run of few steps averages over a 25th of them.
    """
    average_over = min(250, max(2, steps / 25))
    first = 1 - 1 / average_over
    return 1 - (1 - first) * cosine(done)


def make_optimizer(student):
    """AdamW; each step sets its rates. Biases and norms (second group) do not decay."""
    matrices = [weight for weight in student.parameters() if weight.ndim > 1]
    vectors = [weight for weight in student.parameters() if weight.ndim < 2]
    groups = [{"params": matrices}, {"params": vectors, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, fused=True)


def set_rates(optimizer, done):
    """Learning rate and weight decay of the step that follows."""
    matrices, vectors = optimizer.param_groups
    matrices["lr"] = learning_rate(done)
    vectors["lr"] = learning_rate(done)
    matrices["weight_decay"] = weight_decay(done)


# --- One step of training ------------------------------------------------------------------------
# Under torchrun several processes share a batch. Of each tensor `gather` makes that of the whole
# batch, `my_share` is what this process has of it, `add_up` adds all processes' tensors, `replica`
# is the student, `backward` makes gradients of the sum of all losses. Where there is one process,
# gather and add_up change nothing, and backward is loss.backward(). The next section has them.


def train_step(student, replica, teacher, optimizer, views, B, step, steps, epoch):
    """Step number `step` of `steps`. Changes student, teacher and optimizer in place.

    replica: the student, as several processes train it; views: global crops (2, b, 3, size, size),
    local ones (V-2, b, 3, local, local); B: pictures in the batch, with those of other processes
    -> L_DINO and the entropy of p_t, nats, means over the batch (2,)
    """
    global_crops, local_crops = views
    V = len(global_crops) + len(local_crops)
    done = step / steps

    # The teacher: p_t = sinkhorn(head_t(ViT_t(x)) / tau_t), of global crops only, those of the
    # whole batch together. Were one prototype to win everywhere, centring would make p_t uniform.
    # And a small tau_t makes small differences large: p_t does not stay uniform.
    with torch.no_grad():
        out, _, _ = teacher([global_crops])                         # (2, b, O)
        out = gather(out, B)                                        # (2, B, O)
        p_t = sinkhorn(out.flatten(0, 1)).view_as(out)              # (2, B, O)
        p_t = p_t[:, my_share()]                                    # (2, b, O)
    entropy = torch.special.entr(p_t).sum() / (2 * B)               # (), - sum_o p_t log p_t

    # The student: p_s = softmax(head(z_q) / tau_s), of all views.
    logits, z, commitment = replica([global_crops, local_crops])    # (V, b, O), (V, b, d), ()
    l_dino = dino_loss(p_t, logits) / B                             # ()

    # The second term commits z to the centroids that were chosen, a mean over views and pictures,
    # the third keeps global crops of different pictures apart:
    # loss = L_DINO + BETA sum_l ||r_{l-1} - sg(C_l[c_l])||^2 / d + KOLEO KoLeo
    everyone = gather(z.detach(), B)                                # (V, B, d)
    apart = koleo(z[:2], everyone[:2]) / B                          # ()
    loss = l_dino + BETA * commitment / (V * B) + KOLEO * apart     # ()
    optimizer.zero_grad()
    backward(loss)

    # In the first epoch the prototypes do not move: the targets are still close to random, and it
    # is the ViT that has to make sense of them.  [16]
    if epoch == 0:
        student.head.last_layer.weight.grad = None
    nn.utils.clip_grad_norm_(student.parameters(), CLIP)
    set_rates(optimizer, done)
    optimizer.step()

    # No gradient moves the teacher: it is the running average of the student (`lerp_`),
    # teacher = m teacher + (1 - m) student
    m = teacher_momentum(done, steps)
    averages = list(teacher.parameters())
    weights = [weight.detach() for weight in student.parameters()]
    torch._foreach_lerp_(averages, weights, 1 - m)

    # Centroids are running means, too: C_l[k] of its members among the z of all views.
    if student.quantiser is not None:
        student.quantiser.update(everyone.flatten(0, 1))            # (V * B, d)

    return add_up(torch.stack([l_dino.detach(), entropy]))          # (2,)


# --- Several processes that share a batch --------------------------------------------------------
# Under torchrun each process has a share of every batch, and all of them together learn what one
# process would learn from the whole. A single process has a share of everything.


def my_share():
    """Which pictures of a batch this process has: of two processes, every second one. -> slice"""
    if not dist.is_initialized():
        return slice(None)
    return slice(dist.get_rank(), None, dist.get_world_size())


def replicate(student):
    """The student in a wrapper, in which all processes agree on its gradients and its codebooks."""
    if not dist.is_initialized():
        return student
    return nn.parallel.DistributedDataParallel(student)


def read_ahead(batches, images):
    """The pictures of this process's share of one batch after another. A thread reads the next ones
    (from the disk, where they do not fit into memory) while these are learnt from.

    batches: item numbers (B,) each, images: uint8 (N+1, 3, S, S) -> an iterator, (b, 3, S, S) each
    """
    def read(batch):
        pictures = images[batch[my_share()]]                        # (b, 3, S, S)
        if torch.cuda.is_available():
            pictures = pictures.pin_memory()  # a GPU can fetch them by itself
        return pictures

    with ThreadPoolExecutor(1) as thread:
        coming = thread.submit(read, batches[0])
        for batch in batches[1:]:
            pictures = coming.result()                              # (b, 3, S, S)
            coming = thread.submit(read, batch)
            yield pictures
        yield coming.result()


def views_of(pictures, B, V, vit, rng):
    """The views of this process's share of a batch of B pictures. pictures: uint8 (b, 3, S, S)

    -> as make_views
    """
    # Everybody draws for the whole batch: so all draw the same, and a picture gets the same views
    # whoever has it.
    draws = draw_views(V, B, rng)[:, my_share()]                    # (V, b, 12)
    device = vit.cls_token.device
    on_gpu = device.type == "cuda"  # that fetches them while the processor goes on
    draws = draws.to(device, non_blocking=on_gpu)                   # (V, b, 12)
    pictures = pictures.to(device, non_blocking=on_gpu) / 255       # (b, 3, S, S)
    return make_views(pictures, draws, vit.size, vit.patch)


def gather(z, B):
    """The whole batch in its order. z: (V, b, d or O), what this process has -> (V, B, d or O)"""
    everyone = z.new_zeros(len(z), B, z.shape[2])                   # (V, B, d or O)
    everyone[:, my_share()] = z                                     # (V, b, d or O)
    return add_up(everyone)                                         # (V, B, d or O)


def backward(loss):
    """Gradients of a loss that is the sum of all processes' losses. loss: (), this process's"""
    # DistributedDataParallel takes the mean of their gradients: the sum is that many times larger.
    world = 1
    if dist.is_initialized():
        world = dist.get_world_size()
    (world * loss).backward()


# --- Reading codes -------------------------------------------------------------------------------
# Whole pictures, not cropped, go through the teacher's ViT, which is the steadier of the two, and
# codebooks that are fitted to what it says cut that into codes.


@torch.no_grad()
def embed(vit, images, items):
    """[CLS] of whole pictures. images: uint8 (N+1, 3, S, S), items: (n,) -> (n, E)"""
    vectors = []
    for part in tqdm(items.split(256), "whole pictures", leave=False, disable=None):
        pictures = images[part].to(vit.cls_token.device) / 255      # (256, 3, S, S)
        pictures = F.interpolate(pictures, (vit.size, vit.size), mode="bilinear",
                                 antialias=True)                    # (256, 3, size, size)
        vectors.append(vit(pictures))                               # (256, E)
    return torch.cat(vectors)                                       # (n, E)


def standardise(z, codebooks):
    """z with mean 0, and variance 1 on average over the coordinates: 05 starts its tokens from the
    centroids. One scale for all coordinates leaves every code as it is.

    z: (n, d), codebooks: (3, K, d) -> the two anew
    """
    mean = z.mean(0)                                                # (d,)
    variance = z.var(0, correction=0).mean()                        # ()
    scale = variance.sqrt().clamp(min=1e-6)                         # ()

    # Only the first codebook sees the mean: the others see what the first one leaves.
    first = (codebooks[:1] - mean) / scale                          # (1, K, d)
    others = codebooks[1:] / scale                                  # (2, K, d)
    return (z - mean) / scale, torch.cat([first, others])           # (n, d), (3, K, d)


def read_image_codes(student, teacher, images, data, rng):
    """Vectors and codes of all items. -> dict, as image_codes.pt holds it"""
    known = data["has_image"]                                       # (N+1,)
    items = known.nonzero()[:, 0]                                   # (n,)
    K = codebook_size(len(known) - 1)
    if len(items) == 0:
        embeddings = torch.zeros(len(known), 1)                     # (N+1, d): d = 1
        codebooks = torch.zeros(3, K, 1)                            # (3, K, d)
    else:
        z = embed(teacher.backbone, images, items)                  # (n, d)
        if student.quantiser is None:
            codebooks = residual_kmeans(z.cpu(), K, rng)            # (3, K, d)
        else:
            # Ours: ten steps of k-means (decay 0: nothing old stays) take the codebooks from the
            # student's crops to the teacher's whole pictures. Where they start is the student's,
            # and the ViT has learnt to lie near such centroids.
            for _ in range(10):
                student.quantiser.update(z, decay=0)
            codebooks = student.quantiser.codebooks.cpu()           # (3, K, d)
        z, codebooks = standardise(z.cpu(), codebooks)              # (n, d), (3, K, d)
        embeddings = torch.zeros(len(known), z.shape[1])            # (N+1, d)
        embeddings[items] = z

    codes, moved = finish_codes(embeddings, known, codebooks, data["train_counts"], rng)
    return {
        "codes": codes,                                             # (N+1, L)
        "codebooks": codebooks,                                     # (3, K, d)
        "embeddings": embeddings,                                   # (N+1, d)
        "known": known,                                             # (N+1,)
        "moved": moved,
    }


# --- Codes: residual k-means of any vectors (the same text in 02, 03 and 04) ---------------------
# A codebook holds K centroids. Three numbers stand for a vector: its nearest centroid in the first
# codebook, the centroid of the second that is nearest to what the first one leaves, and once more.
# A fourth number tells apart the items that share all three.


def codebook_size(N):
    """K, our rule: the power of two nearest (in ratio) to sqrt(N), from 8 to 256, the paper's."""
    exponent = round(math.log2(max(N, 1)) / 2)
    return 2 ** min(8, max(3, exponent))


def nearest(x, codebook):
    """argmin_k ||x - C[k]||^2 for every row of x. x: (n, d), codebook: (K, d) -> (n,)"""
    # ||x - C[k]||^2 = ||x||^2 - 2 x . C[k] + ||C[k]||^2, and the first term is the same for all k.
    # So the nearest centroid has the least ||C[k]||^2 / 2 - x . C[k]: one product of matrices.
    half_norm = codebook.square().sum(1) / 2                        # (K,)
    codes = []
    for part in x.split(4096):  # few enough rows to stay in the processor's cache
        score = half_norm - part @ codebook.T                       # (part, K)
        codes.append(score.argmin(1))                               # (part,)
    return torch.cat(codes)                                         # (n,)


STEPS = 15  # of Lloyd's algorithm: after them centroids hardly move


def kmeans(x, K, rng):
    """K centroids for x. Where they end depends on where they start. So ten starts are tried on a
    part of x, and the one that ends with the least error goes on with more of it.

    x: (n, d), rng: torch.Generator -> codebook (K, d)
    """
    # 1,024 vectors a centroid find it as well as more would. Fewer than K vectors are repeated:
    # of 3 vectors and K = 5, the order 4 1 0 3 2 takes the vectors 1 1 0 0 2.
    order = torch.randperm(max(len(x), K), generator=rng)           # (max(n, K),)
    x = x[order[:1024 * K] % len(x)]                                # (sample, d)

    few = x[:64 * K]                                                # (few, d)
    candidates = []
    for _ in range(10):
        start = torch.randperm(len(few), generator=rng)[:K]         # (K,)
        candidates.append(lloyd(few, few[start], STEPS))
    best = min(candidates, key=lambda codebook: squared_error(few, codebook).sum())  # (K, d)
    return lloyd(x, best, STEPS)


def squared_error(x, codebook):
    """How far each vector is from its nearest centroid, squared. x: (n, d) -> (n,)"""
    return (x - codebook[nearest(x, codebook)]).square().sum(1)     # (n,)


def lloyd(x, codebook, steps):
    """Lloyd's algorithm: vectors join the nearest centroid, centroids move to their members' mean.

    x: (n, d), codebook: (K, d), where it starts -> (K, d)
    """
    for _ in range(steps):
        codes = nearest(x, codebook)                                # (n,)
        members = torch.bincount(codes, minlength=len(codebook))    # (K,)
        sums = torch.zeros_like(codebook).index_add_(0, codes, x)   # (K, d)

        # A centroid without members restarts at the vector that is served worst.  [8]
        empty = (members == 0).nonzero()[:, 0]                      # (empty,)
        if len(empty):
            error = (x - codebook[codes]).square().sum(1)           # (n,)
            worst = error.topk(len(empty)).indices                  # (empty,)
            sums[empty] = x[worst]                                  # (empty, d)
            members[empty] = 1                                      # (empty,)

        codebook = sums / members.unsqueeze(1)                      # (K, d)
    return codebook


def residual_kmeans(x, K, rng):
    """A codebook for x, one for what it leaves, one for what that leaves. (n, d) -> (3, K, d)"""
    codebooks = []
    for _ in range(3):
        codebook = kmeans(x, K, rng)                                # (K, d)
        codebooks.append(codebook)
        x = x - codebook[nearest(x, codebook)]                      # (n, d)
    return torch.stack(codebooks)                                   # (3, K, d)


def quantise(x, codebooks):
    """r_0 = x;  c_l = argmin_k ||r_{l-1} - C_l[k]||^2;  r_l = r_{l-1} - C_l[c_l],  l = 1, 2, 3.

    x: (n, d), codebooks: (3, K, d) -> codes (n, 3), what they leave of x, r_3 (n, d)
    """
    codes = []
    residual = x                                                    # (n, d)
    for codebook in codebooks:
        code = nearest(residual, codebook)                          # (n,)
        codes.append(code)
        residual = residual - codebook[code]                        # (n, d)  [7]
    return torch.stack(codes, 1), residual                          # (n, 3), (n, d)


def number_in_group(group, order):
    """Numbers the members of each group from 0: who comes first in `order` gets 0.

    group: (n,) the group of each member, order: (n,) a permutation of the members -> (n,)
    """
    # Bring each group together, its members in the given order.
    together = order[group[order].argsort(stable=True)]             # (n,)
    _, size = group[together].unique_consecutive(return_counts=True)  # (groups,)

    # A member's number is its place minus the place where its group begins:
    #   group   a a a b c c
    #   place   0 1 2 3 4 5
    #   begin   0 0 0 3 4 4
    #   number  0 1 2 0 0 1
    place = torch.arange(len(group))                                # (n,)
    begin = (size.cumsum(0) - size).repeat_interleave(size)         # (n,)
    number = torch.empty_like(group)                                # (n,)
    number[together] = place - begin                                # (n,)
    return number


def finish_codes(embeddings, known, codebooks, train_counts, rng):
    """Three codes by meaning and a fourth against collisions: no two items share all four.

    embeddings: (N+1, d); known: bool (N+1,), False where an item lacks this modality;
    codebooks: (3, K, d); train_counts: (N+1,), events in training
    -> codes int16 (N+1, L), row 0 = -1; how many items were moved to make room
    """
    K = codebooks.shape[1]
    codes, residual = quantise(embeddings, codebooks)               # (N+1, 3), (N+1, d)
    # An item without a vector gets random codes, as it may still be a target. Nothing serves it
    # well, so that it is the first to move where there is no room.
    codes[~known] = torch.randint(K, codes[~known].shape, generator=rng)  # (unknown, 3)
    residual[~known] = math.inf                                     # (unknown, d)

    # A prefix as one number, in base K: (3, 1, 4) is 3 K^2 + 1 K + 4.
    prefix = (codes * torch.tensor([K * K, K, 1])).sum(1)           # (N+1,)
    prefix[0] = -1  # padding shares its place with nobody

    # Level 4 has room for K items. Of a fuller prefix those move that are served worst.  [10]
    best_served_first = residual.square().sum(1).argsort(stable=True)  # (N+1,)
    moved = number_in_group(prefix, best_served_first) >= K         # (N+1,)
    if moved.any():
        redistribute(codes, prefix, moved, embeddings, codebooks)

    # Items of one prefix are numbered, the most bought first, so that 0 is the likeliest.  [9]
    most_bought_first = (-train_counts.long()).argsort(stable=True)  # (N+1,)
    collision = number_in_group(prefix, most_bought_first)          # (N+1,)
    codes = torch.cat([codes, collision.unsqueeze(1)], 1)           # (N+1, L)
    codes[0] = -1

    # Of the items that have a vector: how many codes do they use, how many share three codes?
    _, sharing = prefix[known].unique(return_counts=True)           # (prefixes,)
    alone = (sharing == 1).sum() / known.sum().clamp(1)             # ()
    used = [len(level.unique()) for level in codes[known].T]        # one number a level
    print(f"codes: K = {K}, in use at each level {used}; {alone:.0%} of the known items share "
          f"three codes with no other known one, {moved.sum()} items were moved")
    return codes.to(torch.int16), moved.sum().item()


def redistribute(codes, prefix, moved, embeddings, codebooks):
    """The paper's "empty-leaf redistribution": items of a full prefix find another with room.

    Each item in `moved` (N+1,) walks down the tree of prefixes once more, at each level into the
    nearest branch that has room. Changes codes (N+1, 3) and prefix (N+1,) in place.
    """
    # Entry p of behind[l] counts the items behind the prefix p of l + 1 codes. Were K = 10, then
    # behind[1][31] would count the items whose codes begin 3 1, with the branches 310, .. 319.
    K = codebooks.shape[1]
    stays = prefix[1:][~moved[1:]]                                  # (stays,)
    behind = [torch.bincount(stays // (K * K), minlength=K),        # (K,)
              torch.bincount(stays // K, minlength=K ** 2),         # (K^2,)
              torch.bincount(stays, minlength=K ** 3)]              # (K^3,)

    for item in moved.nonzero()[:, 0].tolist():
        residual = embeddings[item]                                 # (d,)
        node = 0  # the root
        for l, codebook in enumerate(codebooks):
            branches = behind[l][node * K:(node + 1) * K]           # (K,) a view
            full = branches == K ** (3 - l)                         # (K,) no room behind it
            distance = (residual - codebook).square().sum(1)        # (K,)
            k = distance.masked_fill(full, math.inf).argmin().item()
            branches[k] += 1
            codes[item, l] = k
            residual = residual - codebook[k]                       # (d,)
            node = node * K + k
        prefix[item] = node


# --- The script ----------------------------------------------------------------------------------


def options(argv):
    """The command line. -> argparse.Namespace"""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    devices = sorted({"auto", "cpu", best_device()})
    add("--run", default="runs/toy", help="folder of this experiment's .pt files")
    add("--seed", type=int, default=0, help="of every random choice")
    add("--device", default="auto", choices=devices, help="auto: the best")
    add("--smoke", action="store_true", help="tiny sizes: is everything in place?")
    add("--plain", action="store_true", help="no quantiser in training, k-means afterwards")
    add("--init", help="file of ViT weights to start from; sets width, depth, patch")
    add("--epochs", type=int, default=20, help="passes over the pictures")
    add("--batch", type=int, default=64, help="pictures a step, of each process")
    add("--max-steps", type=int, default=0, help="a trial: only so many, of one epoch")
    add("--fresh", action="store_true", help="start over: leave a stopped run's checkpoint aside")
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="auto: bf16 on cuda")
    add("--width", type=int, default=96, help="E: width of the ViT")
    add("--depth", type=int, default=3, help="blocks of the ViT")
    add("--crop-size", type=int, default=0, help="pixels along a global crop; 0: as stored")
    add("--local-crops", type=int, default=2, help="crops of half that size, for the student only")
    add("--out-dim", type=int, default=256, help="O: prototypes of the head")
    # --smoke changes defaults only: what is given on the command line outweighs it.
    given, _ = parser.parse_known_args(argv)
    if given.smoke:
        parser.set_defaults(epochs=1, width=24, depth=1, out_dim=64)
    args = parser.parse_args(argv)

    if not 0 <= args.seed < 2 ** 32:
        fail("--seed starts at 0, and ends below 2^32.")
    if min(args.epochs, args.batch, args.width, args.depth, args.out_dim) < 1:
        fail("--epochs, --batch, --width, --depth and --out-dim start at 1.")
    if min(args.max_steps, args.crop_size, args.local_crops) < 0:
        fail("--max-steps, --crop-size and --local-crops start at 0.")
    if args.device == "auto":
        args.device = best_device()
    args.bf16 = args.precision == "bf16"
    if args.precision == "auto":
        args.bf16 = args.device == "cuda"
    return args


def main(argv=None):
    """Trains the ViT with its quantiser, then writes both, and every item's image codes."""
    args = options(argv)
    run = Run(args.run)
    args.rank, args.world = join(run)
    rng = torch.manual_seed(args.seed)  # torch's own generator, which draws the weights too

    images = run.load("images.pt", "01_data.py", mmap=True)["images"]  # (N+1, 3, S, S)
    data = run.load("data.pt", "01_data.py")
    items = data["has_image"].nonzero()[:, 0]                       # (n,): those with a picture
    K = codebook_size(len(images) - 1)
    print(f"{len(items)} pictures, K = {K}; "
          f"a uniform guess has loss {math.log(args.out_dim):.2f}")

    student, teacher = build(images, items, K, args, rng)
    curves, seconds = train(student, teacher, images, items, run, args, rng)
    if args.max_steps:  # a trial writes nothing
        return

    rng.manual_seed(args.seed)  # the same, whether training was stopped in between or not
    image_codes = read_image_codes(student, teacher, images, data, rng)
    run.save({
        "teacher": teacher.cpu().state_dict(),
        "losses": curves[:, 0],                                     # (epochs,)
        "teacher_entropy": curves[:, 1],                            # (epochs,)
        "seconds": seconds,
        "options": vars(args),
    }, "dino.pt")
    run.save(image_codes, "image_codes.pt")
    if run.writes:
        (run.folder / "dino.checkpoint").unlink(missing_ok=True)


def build(images, items, K, args, rng):
    """A student, and a teacher that begins as its copy. -> two Models"""
    size = args.crop_size or images.shape[3]
    if args.init:
        vit = load_backbone(args.init, size)
    else:
        # 16 patches where 4 divides the size: the same cost for any. With 64 a ViT that was told
        # the labels learnt about twice as much of a step, but a step took four times as long.
        patch = max(1, size // 4)
        check_sizes(size, patch, args.width)
        vit = VisionTransformer(size, patch, args.width, args.depth)
    E = vit.cls_token.shape[2]
    student = Model(vit, Head(E, args.out_dim), args.bf16).to(args.device)
    teacher = copy.deepcopy(student).requires_grad_(False)

    # The student's quantiser begins as k-means of what its ViT says now: 16 vectors a centroid
    # are enough to begin with.
    if len(items) and not args.plain:
        order = torch.randperm(len(items), generator=rng)           # (n,)
        first = items[order[:16 * K]]                               # (16K,)
        z = embed(vit, images, first).cpu()                         # (16K, d)
        codebooks = residual_kmeans(z, K, rng)                      # (3, K, d)
        student.quantiser = ResidualQuantiser(codebooks).to(args.device)
    return student, teacher


def train(student, teacher, images, items, run, args, rng):
    """All epochs, from where a stopped run left off. -> L_DINO and entropy (epochs, 2), seconds"""
    if len(items) == 0:
        return torch.zeros(0, 2), 0.0
    optimizer = make_optimizer(student)
    state = resume(run, "dino.checkpoint", args,
                   student=student, teacher=teacher, optimizer=optimizer)
    curves = state["losses"]  # of each epoch L_DINO and the entropy (2,)
    began = time.time() - state["seconds"]

    replica = replicate(student)
    V = 2 + args.local_crops
    batch_size = args.batch * args.world
    epoch_steps = math.ceil(len(items) / batch_size)
    steps = args.epochs * epoch_steps
    bar = tqdm(total=steps, initial=len(curves) * epoch_steps, leave=False,
               disable=args.rank > 0 or None)  # None: no bar where no terminal is

    for epoch in range(len(curves), args.epochs):
        # Every epoch has random numbers of its own: a stopped run can go on from here.
        rng.manual_seed(1000 * args.seed + epoch)
        order = items[torch.randperm(len(items), generator=rng)]    # (n,)
        batches = order.split(batch_size)
        if args.max_steps:
            batches = batches[:args.max_steps]

        means = torch.zeros(2, device=args.device)                  # (2,)
        pictures = read_ahead(batches, images)
        for step, batch in enumerate(batches, epoch * epoch_steps):  # batch: (B,)
            views = views_of(next(pictures), len(batch), V, student.backbone, rng)
            losses = train_step(student, replica, teacher, optimizer, views,
                                len(batch), step, steps, epoch)     # (2,)
            means += losses / epoch_steps                           # (2,)
            bar.update()
            # To look at the loss, the processor waits for the GPU: so seldom. What is no number
            # once stays none.
            if step % 100 == 0 or batch is batches[-1]:
                loss, entropy = losses.tolist()
                bar.set_postfix_str(f"loss {loss:.2f}, entropy {entropy:.2f}", refresh=False)
                if not means.isfinite().all():
                    fail(f"by step {step} the loss is no number; whole epochs, if any, are in "
                         f"{run.folder / 'dino.checkpoint'}.")

        seconds = time.time() - began
        bar.clear()
        if args.max_steps:
            hours = seconds / 3600 * epoch_steps / len(batches)
            print(f"{len(batches)} steps; an epoch has {epoch_steps:,}: {hours:.3g} hours")
            return torch.zeros(0, 2), seconds
        means = means.cpu()                                         # (2,)
        curves.append(means)
        print_epoch(epoch, means, args.epochs)
        run.save({
            "student": student.state_dict(),
            "teacher": teacher.state_dict(),
            "optimizer": optimizer.state_dict(),
            "losses": curves,
            "seconds": seconds,
            "options": vars(args),
        }, "dino.checkpoint")
    bar.close()
    return torch.stack(curves), time.time() - began


def print_epoch(epoch, means, epochs):
    """A line for the first, each tenth and the last epoch; of a short run for each eighth of it."""
    every = min(10, math.ceil(epochs / 8))
    number = epoch + 1
    if number == 1 or number % every == 0 or number == epochs:
        loss, entropy = means.tolist()
        # Cross-entropy = entropy + KL: how unsure the teacher is, how far the student is from it.
        print(f"epoch {number}: loss {loss:.2f} = entropy of p_t {entropy:.2f} + "
              f"KL {loss - entropy:.2f}", flush=True)


# --- Files, stopped runs, several processes (the same text in every script that has it) ----------
# Nothing below belongs to the method.


def fail(message):
    """Ends the script with one sentence and exit code 2: no traceback, nothing half-written."""
    print(message, file=sys.stderr)
    sys.exit(2)


def start(main):
    """Calls main(). Ctrl-C, a full disk, too little memory (of Python, of a GPU): one sentence."""
    if sys.version_info < (3, 11):
        fail(f"Python 3.11 or later is needed, this is {sys.version.split()[0]}.")
    sys.stdout.reconfigure(errors="replace")  # a console that lacks a letter shows ? in its place
    try:
        main()
    except KeyboardInterrupt:
        fail("stopped: give the same command again (never --fresh): it takes what is written.")
    except (OSError, MemoryError, torch.OutOfMemoryError) as error:  # OSError: a full disk, say
        fail(f"stopped ({type(error).__name__}: {error}): mend that, then run the same command.")


class Run:
    """The folder of one experiment: here the scripts meet, and nowhere else.

    It remembers the SHA-256 of every file that this script has read. Whatever the script saves
    carries them as `made_from`, so that codes of one shop never meet the events of another.
    """

    def __init__(self, folder):
        self.folder = Path(folder)
        self.made_from = {}  # name of a file -> its SHA-256
        self.writes = True   # of several processes only the first one writes

    def load(self, name, maker, mmap=False):
        """Reads what the script `maker` wrote. -> dict of tensors, numbers, strings, lists, dicts

        Ends the script where the file is missing, damaged, foreign, or made from other files than
        those that were read before. mmap: tensors stay on the disk until they are used.
        """
        path = self.folder / name
        try:
            with zipfile.ZipFile(path) as parts:
                if parts.testzip() is not None:
                    raise ValueError("a checksum is wrong")
            artifact = torch.load(path, weights_only=True, map_location="cpu", mmap=mmap)
            if maker == "01_data.py":
                made_from = artifact["made_from"]  # KeyError: a foreign file of that name
            else:
                made_from = artifact.get("made_from", {})  # anybody may make codes, predictions
            with open(path, "rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except Exception as error:
            fail(f"{path} is missing or damaged ({type(error).__name__}): "
                 f"run {maker} with this --run.")
        for other, then in made_from.items():
            if self.made_from.get(other, then) != then:
                fail(f"{path} was made from another {path.with_name(other)}: run {maker} again.")
        self.made_from[name] = digest
        return artifact

    def save(self, artifact, name):
        """Writes a dict of tensors, numbers, strings, lists and dicts as a .pt file."""
        if self.writes:
            with self.writing(name) as file:
                torch.save({**artifact, "made_from": self.made_from}, file)

    @contextlib.contextmanager
    def writing(self, name):
        """Opens a file beside `name`, flushes it and renames it: nobody ever sees half a file."""
        path = self.folder / name
        partial = self.folder / f"{name}.partial"
        try:
            with open(partial, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except OSError as error:  # a full disk, a folder that is read-only
            fail(f"{path} cannot be written ({error}): make room, or choose another --run.")
        except RuntimeError:  # torch's word for a full disk
            fail(f"{path} cannot be written to its end: make room, or choose another --run.")
        finally:
            with contextlib.suppress(OSError):
                partial.unlink(missing_ok=True)


def resume(run, name, args, **parts):
    """The state that a stopped run saved after its last whole epoch, or that of a new run.

    parts (model, optimizer, ..) are restored in place. Every epoch draws its own random numbers,
    so a run that goes on ends in the same bits as one that was never stopped.
    """
    path = run.folder / name
    if args.fresh or args.max_steps or not path.exists():
        return {"losses": [], "ndcg": [], "seconds": 0.0}
    state = run.load(name, "this script with --fresh")
    del run.made_from[name]  # results are not made from a checkpoint

    before = state["options"]
    if before["world"] != args.world:
        fail(f"{path} was begun by {before['world']} processes, not {args.world}: go on with as "
             "many, or use --fresh.")
    for option, now in vars(args).items():
        free = option in ("run", "device", "rank", "world", "fresh", "bf16")
        if not free and before.get(option) != now:
            fail(f"{path} began with --{option.replace('_', '-')} {before.get(option)}, not {now}: "
                 "go on so, or use --fresh.")
    for part_name, part in parts.items():
        part.load_state_dict(state[part_name])
    return state


def join(run):
    """Meets the other processes that torchrun started. -> number of this one, number of all"""
    if not dist.is_torchelastic_launched():
        return 0, 1
    dist.init_process_group()
    # At the end Python calls these from the last to the first: wait, as gloo's threads still hand
    # tensors back, then leave.
    atexit.register(dist.destroy_process_group)
    atexit.register(time.sleep, 0.5)
    if torch.cuda.is_available():
        local = int(os.environ["LOCAL_RANK"])
        torch.cuda.set_device(local % torch.cuda.device_count())
    rank = dist.get_rank()
    if rank > 0:  # only the first process prints and writes
        sys.stdout = open(os.devnull, "w")
        run.writes = False
    return rank, dist.get_world_size()


def add_up(x):
    """The sum of a tensor over all processes, in place. x: any shape -> the same tensor"""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def best_device():
    """cuda, mps or another accelerator of this machine, else cpu. -> str"""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return accelerator.type if accelerator else "cpu"


if __name__ == "__main__":
    start(main)
