"""RQ-DINO: image codes from a ViT that is trained with its quantiser inside.

DINO trains a student to say of one crop of a picture what a teacher, the student's running
average, says of another: no labels. Here a residual quantiser sits between the student's ViT and
head, so that three codes must carry the answer (MSCGRec, arXiv 2602.03713, the image modality):
L = L_DINO + beta sum_l ||r_{l-1} - sg(C_l[c_l])||^2.

    python 03_dino_quantizer.py                    # after 01_data.py
    python 03_dino_quantizer.py --plain            # control: DINO, then residual k-means
    python 03_dino_quantizer.py --run runs/shop --init dino_vits16.pth --crop-size 224

reads   data.pt, images.pt
writes  dino.pt
          student           dict                    weights: backbone.* (public names), head.*
          teacher           dict                    their running average; --init reads this file
          center            float32 (O)             running mean of the teacher's outputs
          losses            float32 (epochs)        L_DINO, nats
          teacher_entropy   float32 (epochs)        nats; near 0 or log O: collapse
          perplexity        float32 (epochs, 3)     exp(entropy) of the codes' use; 1 if --plain
          seconds           float                   of training
          peak_memory       int                     bytes, the process's largest resident set
          options           dict                    the options of this run
        image_codes.pt
          codes             int16 (N+1, L)          row 0 = -1; level 4 separates collisions
          codebooks         float32 (3, K, d)       d: width of the ViT
          embeddings        float32 (N+1, d)        standardised; zero where there is no picture
          known             bool (N+1)              the item has a picture
          stats             dict                    use, perplexity, uniqueness, moved items

On the toy shop: 38 seconds, 0.6 GiB (2 cores of an AMD EPYC).
"""
import argparse, copy, math, os, pathlib, resource, sys, time
from collections import Counter

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

STUDENT_TEMP, CENTER_MOMENTUM = 0.1, 0.9  # tau_s; of the running mean of the teacher's outputs
CLIP, BETA = 3.0, 0.25      # largest norm of the gradient; weight of the commitment term
DECAY, DEAD = 0.95, 0.05    # centroids average ~20 steps; restart below DEAD members
GLOBAL_SCALE, LOCAL_SCALE = (0.4, 1.0), (0.1, 0.4)  # share of the picture's area that a crop shows
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet: public weights expect them
JITTER, HUE = 0.4, 0.3      # shift of light, contrast, saturation; turn of hue in radians
YIQ = ((0.299, 0.587, 0.114), (0.596, -0.274, -0.322), (0.211, -0.523, 0.312))  # from RGB

# --- Files ---------------------------------------------------------------------------------------
def fail(message):
    """Ends the script with one sentence and exit code 2: no traceback, nothing half-written."""
    print(message, file=sys.stderr)
    sys.exit(2)

def load(path, maker, mmap=False):
    """Reads one artifact of the run; `maker` is the script that writes it."""
    if not path.exists():
        fail(f"{path} is missing: run {maker} with the same --run first.")
    try:
        return torch.load(path, weights_only=True, map_location="cpu", mmap=mmap)
    except Exception as error:
        fail(f"{path} cannot be read ({type(error).__name__}): delete it, run {maker} again.")

def save(artifact, path):
    """Writes beside the file, flushes, renames: nobody ever sees half an artifact."""
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        torch.save(artifact, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)

# --- Residual codes ------------------------------------------------------------------------------
def codebook_size(N):
    """K, our rule: the power of two nearest to sqrt(N), from 8 to 256, the paper's."""
    return 2 ** min(8, max(3, round(math.log2(max(N, 1)) / 2)))

def nearest(x, codebook):
    """argmin_k ||x - C[k]||^2 for every row. x: (n, d), codebook: (K, d) -> (n,)"""
    half_norm = codebook.square().sum(1) / 2  # (K,)
    return torch.cat([(half_norm - part @ codebook.T).argmin(1) for part in x.split(65536)])

def kmeans(x, K, rng, steps=30):
    """Lloyd's algorithm; a centroid without members restarts at the vector that is served worst.

    x: (n, d) -> codebook (K, d)"""
    start = torch.randperm(max(len(x), K), generator=rng)[:K] % len(x)  # (K,)
    codebook = x[start].clone()  # (K, d)
    for _ in range(steps):
        codes = nearest(x, codebook)  # (n,)
        members = torch.bincount(codes, minlength=K).unsqueeze(1)  # (K, 1)
        sums = torch.zeros_like(codebook).index_add_(0, codes, x)  # (K, d)
        codebook = torch.where(members > 0, sums / members.clamp(min=1), codebook)  # (K, d)
        empty = (members[:, 0] == 0).nonzero()[:len(x), 0]  # (empty,)
        worst = (x - codebook[codes]).square().sum(1).topk(len(empty)).indices  # (empty,)
        codebook[empty] = x[worst]
    return codebook

def residual_kmeans(x, K, rng):
    """A codebook for x, one for what it leaves, one for what that leaves: (n, d) -> (3, K, d)"""
    codebooks = []
    for _ in range(3):
        codebooks.append(kmeans(x, K, rng))  # (K, d)
        x = x - codebooks[-1][nearest(x, codebooks[-1])]  # (n, d)
    return torch.stack(codebooks)  # (3, K, d)

def quantise(x, codebooks):
    """r_0 = x; c_l = argmin_k ||r_{l-1} - C_l[k]||^2; r_l = r_{l-1} - C_l[c_l].

    x: (n, d), codebooks: (3, K, d) -> codes (n, 3)"""
    codes, residual = [], x
    for codebook in codebooks:
        codes.append(nearest(residual, codebook))  # (n,)
        residual = residual - codebook[codes[-1]]  # (n, d)
    return torch.stack(codes, 1)  # (n, 3)

def nearest_first(x, codebooks, prefix=()):
    """All (c_1, c_2, c_3), the nearest to x (d,) first, level by level."""
    if len(prefix) == len(codebooks):
        yield prefix
        return
    distance = (x - codebooks[len(prefix)]).square().sum(1)  # (K,)
    for k in distance.argsort(stable=True).tolist():
        yield from nearest_first(x - codebooks[len(prefix)][k], codebooks, prefix + (k,))

def number_in_group(group, order):
    """Numbers the members of each group from 0, in the given order. (n,), (n,) -> (n,)"""
    order = order[group[order].argsort(stable=True)]  # (n,)
    _, size = group[order].unique_consecutive(return_counts=True)  # (groups,)
    number = torch.empty_like(group)  # (n,)
    number[order] = torch.arange(len(group)) - (size.cumsum(0) - size).repeat_interleave(size)
    return number

def finish_codes(embeddings, known, codebooks, train_counts, rng):
    """Semantic levels 1-3 and the collision level 4: every item gets a code that no other has.

    An item without this modality gets a random place in the tree: it may still be a target.
    Items that share (c_1, c_2, c_3) are numbered, the most bought first. Where more than K share
    it, those with the largest residual move to the nearest one with room (empty-leaf
    redistribution). embeddings: (N+1, d), known: bool (N+1,), codebooks: (3, K, d)
    -> codes int16 (N+1, 4), row 0 = -1, and statistics of the known items' codes."""
    K = codebooks.shape[1]
    codes = quantise(embeddings, codebooks)  # (N+1, 3)
    codes[~known] = torch.randint(K, codes[~known].shape, generator=rng)
    residual = embeddings - sum(C[codes[:, l]] for l, C in enumerate(codebooks))  # (N+1, d)
    worst_last = residual.square().sum(1).argsort(stable=True)  # (N+1,)
    prefix = (codes * torch.tensor([K * K, K, 1])).sum(1)  # (N+1,)
    prefix[0] = -1  # padding shares its place with nobody
    moved = (number_in_group(prefix, worst_last) >= K).nonzero()[:, 0].tolist()
    size = Counter(prefix.tolist()) if moved else {}
    for item in moved:
        for code in nearest_first(embeddings[item], codebooks):
            place = (code[0] * K + code[1]) * K + code[2]
            if size[place] < K:
                size[place] += 1
                codes[item], prefix[item] = torch.tensor(code), place
                break

    most_bought = (-train_counts.long()).argsort(stable=True)  # (N+1,)
    codes = torch.cat([codes, number_in_group(prefix, most_bought).unsqueeze(1)], 1)  # (N+1, 4)
    codes[0] = -1
    use = [torch.bincount(codes[known, l], minlength=K).float() for l in range(4)]
    entropy = [torch.special.entr(n / n.sum().clamp(min=1)).sum().item() for n in use]
    shared = [codes[known, :l].unique(dim=0, return_counts=True)[1] for l in (1, 2, 3)]
    stats = {"used": [(n > 0).float().mean().item() for n in use],
             "perplexity": [math.exp(h) for h in entropy], "moved": len(moved),
             "unique": [(n == 1).sum().item() / max(1, n.sum().item()) for n in shared],
             "largest": [max(n.tolist(), default=0) for n in shared]}
    print(f"codes: {min(stats['used'][:3]):.0%} or more of {K} in use, {stats['unique'][2]:.0%} of "
          f"the items alone after level 3, at most {stats['largest'][2]} together")
    return codes.to(torch.int16), stats

# --- Views of a picture --------------------------------------------------------------------------
def crops(x, size, scale):
    """A random view of each picture, `scale` (from, to) of its area, mirrored or not, in other
    light and colours. x: (n, 3, S, S) in 0..1 -> (n, 3, size, size)"""
    n, draw = len(x), lambda low, high, *n: torch.empty(*n, device=x.device).uniform_(low, high)
    side, stretch = draw(*scale, n).sqrt(), draw(3 / 4, 4 / 3, n).sqrt()  # (n,), (n,)
    half = torch.stack([side * stretch, side / stretch], 1).clamp(max=1)  # (n, 2)
    middle = (1 - half) * draw(-1, 1, n, 2)  # (n, 2)
    half[:, 0] *= draw(-1, 1, n).sign()  # a negative width flips
    box = torch.cat([torch.diag_embed(half), middle.unsqueeze(2)], 2)  # (n, 2, 3)
    grid = F.affine_grid(box, (n, 3, size, size), align_corners=False)  # (n, size, size, 2)
    x = F.grid_sample(x, grid, padding_mode="border", align_corners=False)  # (n, 3, size, size)
    # Colour shifts are linear in RGB: hue turns the plane of colours, saturation stretches it.
    light, contrast, saturation = 1 + JITTER * draw(-1, 1, 3, n, 1, 1, 1)  # (n, 1, 1, 1) each
    hue = HUE * draw(-1, 1, n)  # (n,)
    turn = torch.stack([hue.cos(), -hue.sin(), hue.sin(), hue.cos()], 1).view(n, 2, 2)  # (n, 2, 2)
    to_yiq = torch.tensor(YIQ, device=x.device)  # (3, 3)
    grey, colours = torch.einsum("ij,njhw->nihw", to_yiq, x).split([1, 2], 1)  # 1 and 2 channels
    colours = saturation * torch.einsum("nij,njhw->nihw", turn, colours)  # (n, 2, size, size)
    x = torch.einsum("ij,njhw->nihw", to_yiq.inverse(), torch.cat([grey, colours], 1))
    mean = x.mean((1, 2, 3), keepdim=True)  # (n, 1, 1, 1)
    return (light * (mean + contrast * (x - mean))).clamp(0, 1)  # (n, 3, size, size)

def pictures(images, items, size, device):
    """The un-augmented pictures of `items`. -> (n, 3, size, size) in 0..1"""
    x = images[items].to(device).float() / 255  # (n, 3, S, S)
    return F.interpolate(x, (size, size), mode="bilinear", antialias=True)  # (n, 3, size, size)

# --- Model: named as in the public release, whose weights fit ------------------------------------
class Block(nn.Module):
    def __init__(self, E):
        super().__init__()
        self.heads = max(3, E // 64)  # right for every public ViT
        self.norm1, self.norm2 = nn.LayerNorm(E, eps=1e-6), nn.LayerNorm(E, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(E, 3 * E), "proj": nn.Linear(E, E)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(E, 4 * E), "fc2": nn.Linear(4 * E, E)})

    def forward(self, x):
        qkv = self.attn["qkv"](self.norm1(x)).unflatten(2, (3, self.heads, -1))  # (n, T, 3, H, E/H)
        y = F.scaled_dot_product_attention(*qkv.permute(2, 0, 3, 1, 4))  # (n, H, T, E/H)
        x = x + self.attn["proj"](y.transpose(1, 2).flatten(2))  # (n, T, E)
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))  # (n, T, E)

class VisionTransformer(nn.Module):
    """x: (n, 3, S, S) in 0..1, any S that `patch` divides -> [CLS] (n, E)"""
    def __init__(self, size, patch, E, depth):
        super().__init__()
        self.cls_token = nn.Parameter(0.02 * torch.randn(1, 1, E))
        self.pos_embed = nn.Parameter(0.02 * torch.randn(1, 1 + (size // patch) ** 2, E))
        self.patch_embed = nn.ModuleDict({"proj": nn.Conv2d(3, E, patch, patch)})
        self.blocks = nn.ModuleList(Block(E) for _ in range(depth))
        self.norm = nn.LayerNorm(E, eps=1e-6)

    def forward(self, x):
        mean, std = torch.tensor((MEAN, STD), device=x.device).view(2, 3, 1, 1)  # (3, 1, 1) each
        x = self.patch_embed["proj"]((x - mean) / std)  # (n, E, s, s)
        place = resample(self.pos_embed, x.shape[-1])  # (1, 1 + s*s, E)
        cls = self.cls_token.expand(len(x), -1, -1)  # (n, 1, E)
        x = torch.cat([cls, x.flatten(2).transpose(1, 2)], 1) + place  # (n, 1 + s*s, E)
        for block in self.blocks:
            x = block(x)  # (n, 1 + s*s, E)
        return self.norm(x[:, 0])  # (n, E)

def resample(pos_embed, side):
    """Places of a grid of s x s patches, stretched to side x side. -> (1, 1 + side*side, E)"""
    s = math.isqrt(pos_embed.shape[1] - 1)
    grid = pos_embed[:, 1:].transpose(1, 2).unflatten(2, (s, s))  # (1, E, s, s)
    grid = F.interpolate(grid, (side, side), mode="bicubic")  # (1, E, side, side)
    return torch.cat([pos_embed[:, :1], grid.flatten(2).transpose(1, 2)], 1)

class Head(nn.Module):
    """Cosine with each of O learned prototypes. (n, E) -> (n, O)"""
    def __init__(self, E, O):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(E, 4 * E), nn.GELU(), nn.Linear(4 * E, 4 * E),
                                 nn.GELU(), nn.Linear(4 * E, E))
        self.last_layer = nn.Linear(E, O, bias=False)

    def forward(self, z):
        # Prototypes of unit length are the release's weight norm with its gain held at g = 1.
        prototypes = F.normalize(self.last_layer.weight, dim=1)  # (O, E)
        return F.normalize(self.mlp(z), dim=1) @ prototypes.T  # (n, O)

class ResidualQuantiser(nn.Module):
    """z_q = sum_l C_l[c_l]. Codebooks are no parameters: they follow the means of their members."""
    def __init__(self, codebooks):
        super().__init__()
        self.register_buffer("codebooks", codebooks)  # (3, K, E)
        self.register_buffer("sums", codebooks.clone())  # (3, K, E)
        self.register_buffer("members", torch.ones(codebooks.shape[:2]))  # (3, K)

    def forward(self, z):
        """z: (n, E) -> z_q (n, E), commitment (), codes (n, 3)"""
        codes = quantise(z.detach(), self.codebooks)  # (n, 3)
        z_q, commitment = torch.zeros_like(z), 0
        for level, codebook in enumerate(self.codebooks):
            z_q = z_q + codebook[codes[:, level]]  # (n, E)
            # What levels 1..l leave of z; a mean over d, not a sum: one beta for all widths.
            commitment = commitment + (z - z_q).square().mean()
        return z + (z_q - z).detach(), commitment, codes  # argmin has no gradient: straight through

    @torch.no_grad()
    def update(self, z, codes, decay=DECAY):
        """Centroids follow the mean of their members, dead ones jump to a residual. z: (n, E)"""
        residual = z
        for level, codebook in enumerate(self.codebooks):
            members, sums, code = self.members[level], self.sums[level], codes[:, level]
            members.mul_(decay).add_(torch.bincount(code, minlength=len(members)), alpha=1 - decay)
            sums.mul_(decay).index_add_(0, code, residual, alpha=1 - decay)
            dead = (members < DEAD).nonzero()[:, 0]  # (dead,)
            sums[dead] = residual[torch.randint(len(z), dead.shape, device=z.device)]  # (dead, E)
            members[dead] = 1
            residual = residual - codebook[code]  # (n, E)
            codebook.copy_(sums / members.unsqueeze(1))

def load_backbone(path, size):
    """The ViT in a file of the public release or in our dino.pt, for pictures of size x size."""
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
        state = state.get("teacher", state.get("student", state))
        state = {name.removeprefix("module.").removeprefix("backbone."): w
                 for name, w in state.items() if "head." not in name}
        width, _, _, patch = state["patch_embed.proj.weight"].shape
        vit = VisionTransformer(size, patch, width, sum("norm1.weight" in name for name in state))
        vit.load_state_dict(state | {"pos_embed": resample(state["pos_embed"], size // patch)})
        return vit
    except Exception as error:
        fail(f"--init {path}: no ViT in it ({type(error).__name__}), give a backbone or a dino.pt.")

@torch.no_grad()
def embed(vit, images, items, size, device):
    """[CLS] of the un-augmented pictures. -> (n, E) on the CPU"""
    return torch.cat([vit(pictures(images, part, size, device)).cpu() for part in items.split(256)])

# --- Loss and schedules --------------------------------------------------------------------------
def dino_loss(p_t, logits):
    """Mean cross-entropy of the pairs (teacher's crop t, student's crop v), t != v. The student's
    crops 0 and 1 are the teacher's two. p_t: (2, B, O), logits: (V, B, O) -> ()"""
    log_p_s = (logits / STUDENT_TEMP).log_softmax(2)  # (V, B, O)
    pairs = -torch.einsum("tbo,vbo->tv", p_t, log_p_s) / p_t.shape[1]  # (2, V)
    return (pairs.sum() - pairs.diagonal().sum()) / (pairs.numel() - 2)

@torch.no_grad()
def update_teacher(teacher, student, momentum):
    for average, weight in zip(teacher.parameters(), student.parameters()):
        average.lerp_(weight, 1 - momentum)

def main(argv=None):
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--run", default="runs/toy", help="folder of this experiment's .pt files")
    add("--seed", type=int, default=0, help="of every random choice")
    add("--device", default="auto", help="cuda, mps, cpu, or auto: the best there is")
    add("--smoke", action="store_true", help="tiny sizes: is everything in place?")
    add("--plain", action="store_true", help="no quantiser in training, k-means afterwards")
    add("--init", help="file of ViT weights to start from; sets width, depth, patch")
    add("--epochs", type=int, default=8, help="passes over the pictures")
    add("--batch", type=int, default=32, help="pictures a step")
    add("--lr", type=float, default=1e-3, help="learning rate of AdamW, at its highest")
    add("--width", type=int, default=96, help="E: width of the ViT")
    add("--depth", type=int, default=4, help="blocks of the ViT")
    add("--patch", type=int, default=0, help="pixels along a patch; 0: an eighth of a crop's")
    add("--crop-size", type=int, default=0, help="pixels along a global crop; 0: as stored")
    add("--local-crops", type=int, default=2, help="crops of half that size, for the student only")
    add("--out-dim", type=int, default=1024, help="O: prototypes of the head")
    if parser.parse_known_args(argv)[0].smoke:
        parser.set_defaults(epochs=1, width=24, depth=1, out_dim=64)
    args = parser.parse_args(argv)
    torch.manual_seed(args.seed)
    run, rng = pathlib.Path(args.run), torch.Generator().manual_seed(args.seed)
    device = torch.device(args.device if args.device != "auto" else
                          torch.accelerator.current_accelerator(check_available=True) or "cpu")
    data = load(run / "data.pt", "01_data.py")
    images = load(run / "images.pt", "01_data.py", mmap=True)["images"]  # (N+1, 3, S, S)
    known = data["has_image"]  # (N+1,)
    items, K = known.nonzero()[:, 0], codebook_size(len(known) - 1)  # (n,)
    size, width = args.crop_size or images.shape[-1], args.width
    patch = args.patch or max(1, size // 8)  # so 64 patches, at the same cost for any picture size
    sizes = (args.epochs, args.batch, args.depth, patch, args.out_dim, width, args.local_crops + 1)
    if min(sizes) < 1 or size % patch or width % max(3, width // 64):
        fail(f"Sizes start at 1; patches of {patch} must tile crops of {size}, heads {width}.")
    vit = load_backbone(args.init, size) if args.init else \
        VisionTransformer(size, patch, width, args.depth)
    width, _, _, patch = vit.patch_embed["proj"].weight.shape
    student = nn.ModuleDict({"backbone": vit, "head": Head(width, args.out_dim)}).to(device)
    teacher, quantiser = copy.deepcopy(student).requires_grad_(False), None
    center = torch.zeros(args.out_dim, device=device)  # (O,)
    weights = list(student.parameters())  # weight decay .04 -> .4 on matrices, none on vectors
    optimizer = torch.optim.AdamW([{"params": [w for w in weights if (w.ndim > 1) == matrix]}
                                   for matrix in (True, False)])
    local = max(1, size // 2 // patch) * patch  # half a global crop, in whole patches
    kinds = [(2, size, GLOBAL_SCALE), (args.local_crops, local, LOCAL_SCALE)]
    steps = args.epochs * math.ceil(len(items) / args.batch)
    # The teacher averages 250 steps (.996) as published; fewer in short runs, or it hardly moves.
    momentum = 1 - 1 / min(250, max(2, steps / 25))
    print(f"{len(items)} of {len(known) - 1} items have a picture; K = {K}; {steps} steps; crops "
          f"of {size} and {local} px; a uniform guess has loss {math.log(args.out_dim):.2f}")
    curves, started = [], time.time()
    for epoch in range(args.epochs if len(items) else 0):
        sums, counts = torch.zeros(2), torch.zeros(3, K)  # (2,), (3, K)
        order = items[torch.randperm(len(items), generator=rng)]  # (n,)
        bar = tqdm(order.split(args.batch), f"epoch {epoch + 1}", leave=False, disable=None)
        for step, batch in enumerate(bar, epoch * (steps // args.epochs)):
            done, wave = step / steps, (1 + math.cos(math.pi * step / steps)) / 2  # 0 to 1, 1 to 0
            for group, decay in zip(optimizer.param_groups, (0.4 - 0.36 * wave, 0)):
                group["lr"], group["weight_decay"] = args.lr * min(wave, 10 * done + 0.01), decay
            temperature = min(0.07, 0.04 + 0.1 * done)  # tau_t
            x = pictures(images, batch, size, device)  # (B, 3, size, size)
            views = [crops(x.repeat(n, 1, 1, 1), side, scale) for n, side, scale in kinds if n]
            with torch.no_grad():
                out = teacher["head"](teacher["backbone"](views[0]))  # (2B, O)
                p_t = ((out - center) / temperature).softmax(1).view(2, len(batch), -1)  # (2, B, O)
                center.lerp_(out.mean(0), 1 - CENTER_MOMENTUM)
            z = torch.cat([student["backbone"](view) for view in views])  # (V*B, d)
            z_q, commitment = z, 0.0
            if not args.plain:
                if quantiser is None:
                    first = embed(student["backbone"], images, order[:16 * K], size, device)
                    quantiser = ResidualQuantiser(residual_kmeans(first, K, rng)).to(device)
                z_q, commitment, codes = quantiser(z)  # (V*B, d), (), (V*B, 3)
                quantiser.update(z.detach(), codes)
                counts += torch.stack([torch.bincount(c, minlength=K) for c in codes.T]).cpu()
            # A second term with z itself, past the quantiser, measured no better: left out.
            loss = dino_loss(p_t, student["head"](z_q).view(-1, *p_t.shape[1:]))  # L_DINO
            optimizer.zero_grad()
            (loss + BETA * commitment).backward()
            if epoch == 0:  # the prototypes wait until there is something to be like
                student["head"].last_layer.weight.grad = None
            nn.utils.clip_grad_norm_(weights, CLIP)
            optimizer.step()
            update_teacher(teacher, student, 1 - (1 - momentum) * wave)
            sums += torch.tensor([loss.item(), torch.special.entr(p_t).sum(2).mean()]) / len(bar)
            if step == 0:
                print(f"first loss {loss.item():.2f}: before there is a centre, all look alike")
        perplexity = torch.special.entr(F.normalize(counts, p=1, dim=1)).sum(1).exp()  # (3,)
        curves.append(torch.cat([sums, perplexity]).tolist())
        print(f"epoch {epoch + 1}: loss {sums[0]:.2f} = entropy of p_t {sums[1]:.2f} + KL; "
              f"perplexity {perplexity.int().tolist()} of {K}; {time.time() - started:.0f} s")

    seconds, peak = time.time() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    embeddings = torch.zeros(len(known), width if len(items) else 1)  # (N+1, d)
    codebooks = torch.zeros(3, K, embeddings.shape[1])  # (3, K, d)
    if len(items):
        z = embed(teacher["backbone"], images, items, size, device)  # (n, d)
        if quantiser:
            # Ours: ten of Lloyd's steps, from the student's crops to the teacher's whole pictures.
            codebooks = quantiser.cpu().codebooks  # (3, K, d)
            for _ in range(10):
                quantiser.update(z, quantise(z, codebooks), decay=0)
        else:
            codebooks = residual_kmeans(z, K, rng)  # (3, K, d)
        # Standardised with one scale for all coordinates, which leaves every code as it is.
        mean, scale = z.mean(0), z.var(0, correction=0).mean().sqrt().clamp(min=1e-6)  # (d,), ()
        embeddings[items] = (z - mean) / scale  # (n, d)
        codebooks[0] -= mean
        codebooks /= scale
    codes, stats = finish_codes(embeddings, known, codebooks, data["train_counts"], rng)  # (N+1, 4)
    curves = torch.tensor(curves).view(-1, 5)  # (epochs, 5)
    save({"student": student.cpu().state_dict(), "teacher": teacher.cpu().state_dict(),
          "center": center.cpu(), "losses": curves[:, 0], "teacher_entropy": curves[:, 1],
          "perplexity": curves[:, 2:], "seconds": seconds, "peak_memory": peak,
          "options": vars(args)}, run / "dino.pt")
    save({"codes": codes, "codebooks": codebooks, "embeddings": embeddings, "known": known,
          "stats": stats}, run / "image_codes.pt")
    shelf = items[codes[items, 0] == codes[items[:1], 0]][:8].tolist()
    print("items of one first code: " + " | ".join(data["titles"][i] for i in shelf) if shelf else
          "No item has a picture: every image code is a random place of its own.")

if __name__ == "__main__":
    main()
