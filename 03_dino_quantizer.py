"""RQ-DINO: image codes from a ViT that is trained with its quantiser inside.

DINO trains a student to say of one crop of a picture what a teacher, the student's running
average, says of another: no labels. Here a residual quantiser sits between the student's ViT and
head, so that three codes must carry the answer (MSCGRec, arXiv 2602.03713, the image modality):
L = L_DINO + beta sum_l ||r_{l-1} - sg(C_l[c_l])||^2.

    python 03_dino_quantizer.py                    # after 01_data.py
    python 03_dino_quantizer.py --plain            # control: DINO, then residual k-means

reads   data.pt, images.pt
writes  dino.pt
          teacher           dict                    backbone.* (public names: for --init), head.*
          losses            float32 (epochs)        L_DINO, nats
          teacher_entropy   float32 (epochs)        nats; near log O: collapse
          seconds           float                   of training
          options           dict                    the options of this run
        image_codes.pt
          codes             int16 (N+1, L)          row 0 = -1; level 4 separates collisions
          codebooks         float32 (3, K, d)       d: width of the ViT
          embeddings        float32 (N+1, d)        standardised; zero where there is no picture
          known             bool (N+1)              the item has a picture
          moved             int                     items that redistribution moved

On the toy shop: 39 seconds, 0.6 GiB (2 cores of an AMD EPYC).
"""
import argparse, atexit, copy, hashlib, math, os, pathlib, signal, sys, time, zipfile

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

STUDENT_TEMP, CENTER_MOMENTUM = 0.1, 0.9  # tau_s; of the running mean of the teacher's outputs
LR, CLIP, BETA = 1e-3, 3.0, 0.25  # of AdamW; largest norm of the gradient; weight of commitment
DECAY, DEAD = 0.95, 0.05    # centroids average ~20 steps; restart below DEAD members
SCALES, JITTER = ((0.4, 1.0), (0.1, 0.4)), 0.4  # area of global, local crops; change of light
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet: public weights expect them

# --- Files ---------------------------------------------------------------------------------------
MADE_FROM = {}  # SHA-256 of every file that was read; all that is saved carries them
def fail(message):
    """Ends the script with one sentence and exit code 2: no traceback, nothing half-written."""
    print(message, file=sys.stderr)
    sys.exit(2)

def load(path, maker, mmap=False):
    """Reads what `maker` wrote. Refuses a damaged or foreign file, and one of other inputs."""
    try:
        assert zipfile.ZipFile(path).testzip() is None  # all checksums are right
        artifact = torch.load(path, weights_only=True, map_location="cpu", mmap=mmap)
        for name, digest in artifact.get("made_from", None if maker[:3] == "01_" else {}).items():
            if MADE_FROM.get(name, digest) != digest:
                fail(f"{path} was made from another {path.with_name(name)}: run {maker} again.")
        MADE_FROM[path.name] = hashlib.file_digest(open(path, "rb"), "sha256").hexdigest()
        return artifact
    except Exception as error:
        fail(f"{path} is missing or damaged ({type(error).__name__}): run {maker} with this --run.")

def save(artifact, path):
    """Writes beside the file, flushes, renames: nobody ever sees half an artifact."""
    partial = path.with_name(path.name + ".partial")
    try:
        torch.save(artifact | {"made_from": MADE_FROM}, partial)
        with open(partial, "rb+") as file:
            os.fsync(file)
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:  # a full disk, a folder that is read-only
        partial.unlink(missing_ok=True)
        fail(f"{path} cannot be written ({error}): make room, or choose another --run.")

# --- Stopped runs; several processes -------------------------------------------------------------
def resume(path, args, **parts):
    """The state of a stopped run after its last epoch, its parts (model, optimizer) restored; or a
    new one. Every epoch has random numbers of its own: a resumed run ends in the very same bits."""
    signal.signal(signal.SIGINT, lambda *_: fail("stopped: run it again without --fresh to go on"))
    if args.fresh or args.max_steps or not path.exists():
        return {"losses": [], "ndcg": [], "step": 0, "seconds": 0.0}
    state, now = load(path, "this script with --fresh"), vars(args)
    del MADE_FROM[path.name]  # results are not made from it
    for name, then in state["options"].items():
        if name not in ("run", "device", "rank", "fresh", "bf16") and then != now[name]:
            fail(f"{path} began with --{name} {then}, not {now[name]}: go on so, or use --fresh.")
    for name, part in parts.items():
        part.load_state_dict(state[name])
    return state

def join():
    """Under torchrun, meets the other processes -> rank, the number of this one, world, of all."""
    if not dist.is_torchelastic_launched():
        return 0, 1
    dist.init_process_group()
    atexit.register(dist.destroy_process_group)
    atexit.register(time.sleep, 0.5)  # first: gloo's threads still give tensors back to Python
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]) % torch.cuda.device_count())
    if dist.get_rank():  # only one prints and writes
        sys.stdout, globals()["save"] = open(os.devnull, "w"), lambda *_: None
    return dist.get_rank(), dist.get_world_size()
def add_up(x):  # the sum over all processes, in place (all_reduce returns None)
    return dist.all_reduce(x) or x if dist.is_initialized() else x

# --- Codes: residual k-means of any vectors (the same text in 02, 03 and 04) ---------------------
def codebook_size(N):
    """K, our rule: the power of two nearest (in ratio) to sqrt(N), from 8 to 256, the paper's."""
    return 2 ** min(8, max(3, round(math.log2(max(N, 1)) / 2)))

def nearest(x, codebook):
    """argmin_k ||x - C[k]||^2 for every row. x: (n, d), codebook: (K, d) -> (n,)"""
    half_norm = codebook.square().sum(1) / 2  # (K,)
    return torch.cat([torch.addmm(half_norm, part, codebook.T, alpha=-1).argmin(1)  # (part, K)
                      for part in x.split(4096)])  # few enough rows to stay in the cache

def kmeans(x, K, rng, steps=15):
    """Lloyd's algorithm; a centroid without members restarts at the vector that is served worst.
    1,024 vectors a centroid find it as well as more would. x: (n, d) -> codebook (K, d)"""
    x = x[torch.randperm(max(len(x), K), generator=rng)[:1024 * K] % len(x)]  # (n, d)
    codebook = x[:K]  # (K, d)
    for _ in range(steps):
        codes = nearest(x, codebook)  # (n,)
        members = torch.bincount(codes, minlength=K).unsqueeze(1)  # (K, 1)
        sums = torch.zeros_like(codebook).index_add_(0, codes, x)  # (K, d)
        empty = (members[:, 0] == 0).nonzero()[:, 0]  # (empty,)  [8]
        if len(empty):
            worst = (x - codebook[codes]).square().sum(1).topk(len(empty)).indices  # (empty,)
            sums[empty], members[empty] = x[worst], 1
        codebook = sums / members  # (K, d)
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
    x: (n, d), codebooks: (3, K, d) -> codes (n, 3), what they leave, r_3 (n, d)"""
    codes, residual = [], x
    for codebook in codebooks:
        codes.append(nearest(residual, codebook))  # (n,)
        residual = residual - codebook[codes[-1]]  # (n, d)  [7]
    return torch.stack(codes, 1), residual  # (n, 3), (n, d)

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
    it, those with the largest residual walk down the tree anew, at each level into the nearest
    branch with room (empty-leaf redistribution).
    embeddings: (N+1, d), known: (N+1,), codebooks: (3, K, d) -> int16 (N+1, 4), items moved"""
    K = codebooks.shape[1]
    codes, residual = quantise(embeddings, codebooks)  # (N+1, 3), (N+1, d)
    codes[~known] = torch.randint(K, codes[~known].shape, generator=rng)
    prefix = (codes * torch.tensor([K * K, K, 1])).sum(1)  # (N+1,)
    prefix[0] = -1  # padding shares its place with nobody
    # Of a full prefix those move that are served worst.  [10]
    moved = number_in_group(prefix, residual.square().sum(1).argsort(stable=True)) >= K  # (N+1,)
    size = [torch.bincount(prefix[1:][~moved[1:]] // K ** (2 - l), minlength=K ** (l + 1))
            for l in range(3)]  # (K,), (K*K,), (K*K*K,): items behind each prefix
    for item in moved.nonzero()[:, 0].tolist():
        residual, place = embeddings[item], 0  # (d,)
        for l, C in enumerate(codebooks):  # the nearest branch that is not full
            full = size[l].view(-1, K)[place] == K ** (3 - l)  # (K,)
            k = (residual - C).square().sum(1).masked_fill(full, math.inf).argmin().item()
            codes[item, l], residual, place = k, residual - C[k], place * K + k
            size[l][place] += 1
        prefix[item] = place
    most_bought = (-train_counts.long()).argsort(stable=True)  # (N+1,)  [9]
    codes = torch.cat([codes, number_in_group(prefix, most_bought).unsqueeze(1)], 1)  # (N+1, 4)
    codes[0] = -1
    alone = (prefix[known].unique(return_counts=True)[1] == 1).sum() / known.sum().clamp(1)  # ()
    print(f"codes: K = {K}, {alone:.0%} of the items are alone after level 3")
    return codes.to(torch.int16), moved.sum().item()

# --- Views of a picture --------------------------------------------------------------------------
def crops(x, size, scale, luck):
    """Views that show `scale` (from, to) of a picture's area, mirrored or not, in other light and
    colours. x: (n, 3, S, S) in 0..1, luck: (n, 8) in -1..1 -> (n, 3, size, size)"""
    side = (sum(scale) + (scale[1] - scale[0]) * luck[:, 0]).div(2).sqrt()  # (n,)
    stretch = (4 / 3) ** (luck[:, 1] / 2)  # (n,)
    half = torch.stack([side * stretch, side / stretch], 1).clamp(max=1)  # (n, 2)
    middle = (1 - half) * luck[:, 2:4]  # (n, 2)
    half[:, 0] *= luck[:, 4].sign()  # a negative width flips
    pixel = torch.arange(1, 2 * size, 2, device=x.device) / size - 1  # (size,)
    square = torch.stack(torch.meshgrid(pixel, pixel, indexing="xy"), 2)  # (size, size, 2)
    grid = middle[:, None, None] + half[:, None, None] * square  # (n, size, size, 2)
    x = F.grid_sample(x, grid, padding_mode="border", align_corners=False)  # (n, 3, size, size)
    light, contrast, saturation = 1 + JITTER * luck[:, 5:8].T.view(3, -1, 1, 1, 1)
    grey, mean = x.mean(1, keepdim=True), x.mean((1, 2, 3), keepdim=True)  # 1 channel, 1 number
    return (light * (mean + contrast * (grey - mean + saturation * (x - grey)))).clamp(0, 1)

# --- Model: named as in the public release, whose weights fit ------------------------------------
class Block(nn.Module):
    def __init__(self, E):
        super().__init__()
        self.heads = max(3, E // 64)  # right for every public ViT
        self.norm1, self.norm2 = nn.LayerNorm(E, eps=1e-6), nn.LayerNorm(E, eps=1e-6)
        self.attn = nn.ModuleDict({"qkv": nn.Linear(E, 3 * E), "proj": nn.Linear(E, E)})
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(E, 4 * E), "fc2": nn.Linear(4 * E, E)})
    def forward(self, x, out=None):  # (n, m, E) -> (n, out or m, E), of the first `out` tokens
        qkv = self.attn["qkv"](self.norm1(x)).unflatten(2, (3, self.heads, -1))  # (n, m, 3, H, E/H)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (n, H, m, E/H) each
        scores = q[:, :, :out] @ k.transpose(2, 3) / math.sqrt(k.shape[3])  # (n, H, out, m)
        y = scores.softmax(3) @ v  # (n, H, out, E/H)
        x = x[:, :out] + self.attn["proj"](y.transpose(1, 2).flatten(2))  # (n, out, E)
        return x + self.mlp["fc2"](F.gelu(self.mlp["fc1"](self.norm2(x))))  # (n, out, E)

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
        for block in self.blocks[:-1]:
            x = block(x)  # (n, 1 + s*s, E)
        return self.norm(self.blocks[-1](x, 1)[:, 0])  # (n, E): the last block is asked for [CLS]

def resample(pos_embed, side):
    """Places of a grid of s x s patches, stretched to side x side. -> (1, 1 + side*side, E)"""
    s = math.isqrt(pos_embed.shape[1] - 1)
    grid = pos_embed[:, 1:].transpose(1, 2).unflatten(2, (s, s))  # (1, E, s, s)
    grid = F.interpolate(grid, (side, side), mode="bicubic")  # (1, E, side, side)
    return torch.cat([pos_embed[:, :1], grid.flatten(2).transpose(1, 2)], 1)

class Head(nn.Module):
    """Cosine with each of O prototypes: weight norm with its gain held at 1. (n, E) -> (n, O)"""
    def __init__(self, E, O):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(E, 4 * E), nn.GELU(), nn.Linear(4 * E, 4 * E),
                                 nn.GELU(), nn.Linear(4 * E, E))
        self.last_layer = nn.Linear(E, O, bias=False)
    def forward(self, z):
        prototypes = F.normalize(self.last_layer.weight, dim=1)  # (O, E)
        return F.normalize(self.mlp(z), dim=1) @ prototypes.T  # (n, O)

class ResidualQuantiser(nn.Module):
    """z_q = sum_l C_l[c_l]. Codebooks are no parameters: they follow the means of their members."""
    def __init__(self, codebooks):
        super().__init__()
        self.register_buffer("codebooks", codebooks)  # (3, K, E)
        self.register_buffer("sums", codebooks.clone())  # (3, K, E)
        self.register_buffer("members", codebooks.new_ones(codebooks.shape[:2]))  # (3, K)
    def forward(self, z):  # (n, E) -> z_q (n, E), commitment (), a sum over n
        codes = quantise(z.detach(), self.codebooks)[0].T  # (3, n)
        z_q = torch.stack([C[c] for C, c in zip(self.codebooks, codes)]).cumsum(0)  # (3, n, E)
        # What levels 1..l leave of z; a mean over d, not a sum: one beta for all widths.
        commitment = (z - z_q).square().mean(2).sum()  # ()
        return z + (z_q[2] - z).detach(), commitment  # argmin has no gradient  [14]
    def update(self, residual, rng, decay=DECAY):
        """Centroids follow the mean of their members, dead ones jump to a residual. (n, E)"""
        for members, sums, codebook in zip(self.members, self.sums, self.codebooks):
            code = nearest(residual, codebook)  # (n,)
            members.mul_(decay).add_(torch.bincount(code, minlength=len(members)), alpha=1 - decay)
            sums.mul_(decay).index_add_(0, code, residual, alpha=1 - decay)
            dead = (members < DEAD).nonzero()[:, 0]  # (dead,)  [15]
            chosen = torch.randint(len(residual), dead.shape, generator=rng)  # (dead,)
            sums[dead], members[dead] = residual[chosen], 1
            residual = residual - codebook[code]  # (n, E)
            codebook.copy_(sums / members.unsqueeze(1))

class Model(nn.ModuleDict):
    """Student or teacher: backbone (it alone may be bfloat16), the student's quantiser, head."""
    def forward(self, views, bf16=False):  # (n, 3, S, S) each -> of all: (n, O), z (n, E), ()
        with torch.autocast(views[0].device.type, torch.bfloat16, enabled=bf16):
            z = torch.cat([self["backbone"](view) for view in views]).float()  # (n, E)
        z_q, commitment = self["quantiser"](z) if "quantiser" in self else (z, 0.0)  # (n, E), ()
        return self["head"](z_q), z.detach(), commitment

def load_backbone(path, size):  # the ViT in a file of the public release or in our dino.pt
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
        state = {name.removeprefix("module.").removeprefix("backbone."): w for name, w in
                 state.get("teacher", state.get("student", state)).items() if "head." not in name}
        width, _, _, patch = state["patch_embed.proj.weight"].shape
        vit = VisionTransformer(size, patch, width, sum("norm1.weight" in name for name in state))
        vit.load_state_dict(state | {"pos_embed": resample(state["pos_embed"], size // patch)})
        return vit
    except Exception as error:
        fail(f"--init {path}: no backbone for {size} px ({type(error).__name__}): give another.")

@torch.no_grad()
def embed(vit, images, items, size):  # [CLS] of whole pictures, as they are; (n, E)
    scale = lambda x: F.interpolate(x, (size, size), mode="bilinear", antialias=True)
    return torch.cat([vit(scale(images[part].to(vit.cls_token.device) / 255))  # (256, E)
                      for part in items.split(256)])

def dino_loss(p_t, logits):
    """Cross-entropy of the teacher's crop t and the student's v, mean of all pairs but t = v, sum
    over B pictures. p_t: (2, B, O), logits: (V, B, O) -> ()"""
    log_p_s = (logits / STUDENT_TEMP).log_softmax(2)  # (V, B, O)
    pairs = -torch.einsum("tbo,vbo->tv", p_t, log_p_s)  # (2, V)
    return (pairs.sum() - pairs.diagonal().sum()) / (pairs.numel() - 2)  # [11]

def main(argv=None):
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("--run", default="runs/toy", help="folder of this experiment's .pt files")
    add("--seed", type=int, default=0, help="of every random choice")
    device = str(torch.accelerator.current_accelerator(check_available=True) or "cpu")  # cuda, mps
    add("--device", default="auto", choices=sorted({"auto", "cpu", device}), help="auto: the best")
    add("--smoke", action="store_true", help="tiny sizes: is everything in place?")
    add("--plain", action="store_true", help="no quantiser in training, k-means afterwards")
    add("--init", help="file of ViT weights to start from; sets width, depth, patch")
    add("--epochs", type=int, default=8, help="passes over the pictures")
    add("--batch", type=int, default=32, help="pictures a step")
    add("--max-steps", type=int, default=0, help="a trial: only so many, of one epoch")
    add("--fresh", action="store_true", help="start over: leave a stopped run's checkpoint aside")
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="auto: bf16 on GPUs")
    add("--width", type=int, default=96, help="E: width of the ViT")
    add("--depth", type=int, default=4, help="blocks of the ViT")
    add("--crop-size", type=int, default=0, help="pixels along a global crop; 0: as stored")
    add("--local-crops", type=int, default=2, help="crops of half that size, for the student only")
    add("--out-dim", type=int, default=1024, help="O: prototypes of the head")
    if parser.parse_known_args(argv)[0].smoke:
        parser.set_defaults(epochs=1, width=24, depth=1, out_dim=64)
    args = parser.parse_args(argv)
    if not 0 <= args.seed < 2 ** 32:
        fail("--seed starts at 0, and ends below 2^32.")
    run, rng = pathlib.Path(args.run), torch.manual_seed(args.seed)
    args.rank, args.world = rank, world = join()
    device = torch.device(device if args.device == "auto" else args.device)
    images = load(run / "images.pt", "01_data.py", mmap=True)["images"]  # (N+1, 3, S, S)
    data = load(run / "data.pt", "01_data.py")
    known = data["has_image"]  # (N+1,)
    items, K = known.nonzero()[:, 0], codebook_size(len(known) - 1)  # (n,)
    size = args.crop_size or images.shape[-1]
    vit = load_backbone(args.init, size) if args.init else None
    width, patch = vit.patch_embed["proj"].weight.shape[::3] if vit else \
        (args.width, max(1, size // 8))  # 64 patches: the same cost for any picture size
    if min(size, width, args.epochs, args.batch, args.depth, args.out_dim, args.local_crops + 1,
           args.max_steps + 1) < 1 or size % patch or width % max(3, width // 64):
        fail(f"Sizes start at 1; patches of {patch} must tile crops of {size}, heads {width}.")
    vit = vit or VisionTransformer(size, patch, width, args.depth)
    bf16 = args.precision == "bf16" or (args.precision, device.type) == ("auto", "cuda")
    student = Model({"backbone": vit, "head": Head(width, args.out_dim)}).to(device)
    teacher, quantiser = copy.deepcopy(student).requires_grad_(False), None
    if len(items) and not args.plain:  # the quantiser starts as k-means of what the ViT says now
        first = items[torch.randperm(len(items), generator=rng)[:16 * K]]  # (16K,)
        codebooks = residual_kmeans(embed(vit, images, first, size).cpu(), K, rng)  # (3, K, d)
        quantiser = student["quantiser"] = ResidualQuantiser(codebooks).to(device)
    forward = nn.parallel.DistributedDataParallel(student) if world > 1 else student
    weights = list(student.parameters())  # weight decay .04 -> .4 on matrices, none on vectors
    optimizer = torch.optim.AdamW([{"params": [w for w in weights if w.ndim > 1]},
                                   {"params": [w for w in weights if w.ndim < 2]}], fused=True)
    V, local = 2 + args.local_crops, max(1, size // 2 // patch) * patch  # views; whole patches
    steps = args.epochs * (epoch_steps := math.ceil(len(items) / (args.batch * world)))
    momentum = 1 - 1 / min(250, max(2, steps / 25))  # .996 as published, less in a short run
    print(f"{len(items)} pictures, K = {K}; a uniform guess has loss {math.log(args.out_dim):.2f}")
    checkpoint = run / "dino.checkpoint"
    state = resume(checkpoint, args, student=student, teacher=teacher, optimizer=optimizer)
    curves, started = state["losses"], time.time() - state["seconds"]
    center = state.get("center", torch.zeros(args.out_dim)).to(device)  # (O,)
    for epoch in range(len(curves), args.epochs if len(items) else 0):
        rng.manual_seed(1000 * args.seed + epoch)
        sums = torch.zeros(2)  # L_DINO, entropy of p_t
        order = items[torch.randperm(len(items), generator=rng)]  # (n,)
        bar = tqdm(order.split(args.batch * world), f"epoch {epoch + 1}", leave=False, disable=None)
        for step, batch in enumerate(bar, epoch * epoch_steps):  # batch: (B,)
            done, wave = step / steps, (1 + math.cos(math.pi * step / steps)) / 2  # 0 to 1, 1 to 0
            for group, decay in zip(optimizer.param_groups, (0.4 - 0.36 * wave, 0)):
                group["lr"], group["weight_decay"] = LR * min(wave, 10 * done + 0.01), decay
            tau_t = min(0.07, 0.04 + 0.1 * done)  # temperature of the teacher
            x, B = images[batch[rank::world]].to(device) / 255, len(batch)  # (b, 3, S, S)
            luck = 2 * torch.rand(V, B, 8, generator=rng)[:, rank::world].to(device) - 1  # V, b, 8
            views = [crops(x.repeat(len(part), 1, 1, 1), side, scale, part.flatten(0, 1))
                     for part, side, scale in zip(luck.split([2, V - 2]), (size, local), SCALES)]
            with torch.no_grad():
                out = teacher(views[:1], bf16)[0]  # (2b, O)  [13]
                p_t = ((out - center) / tau_t).softmax(1).unflatten(0, (2, len(x)))  # (2, b, O)
                center.lerp_(add_up(out.sum(0)) / (2 * B), 1 - CENTER_MOMENTUM)  # [12]
            logits, z, commitment = forward(views, bf16)  # (V*b, O), (V*b, d), ()
            if quantiser:
                everyone = torch.zeros(V, B, width, device=device)  # (V, B, d)
                everyone[:, rank::world] = z.unflatten(0, (V, len(x)))
                quantiser.update(add_up(everyone).flatten(0, 1), rng)
            loss = dino_loss(p_t, logits.unflatten(0, (V, len(x)))) / B  # our part of L_DINO
            if not loss.isfinite():
                fail(f"step {step}: the loss is no number; whole epochs: {checkpoint}")
            optimizer.zero_grad()
            # Gradients are averaged over processes, but the loss is a sum of parts: times world.
            (world * (loss + BETA * commitment / (V * B))).backward()
            if epoch == 0:  # the prototypes wait until there is something to be like
                student["head"].last_layer.weight.grad = None  # [16]
            nn.utils.clip_grad_norm_(weights, CLIP)
            optimizer.step()
            for average, weight in zip(teacher.parameters(), weights):
                average.lerp_(weight.detach(), (1 - momentum) * wave)
            entropy = torch.special.entr(p_t).sum() / (2 * B)  # ()
            sums += add_up(torch.stack([loss.detach(), entropy])).cpu() / epoch_steps
            if args.max_steps and step + 1 == min(args.max_steps, epoch_steps):
                hours = (time.time() - started) / 3600 * epoch_steps / (step + 1)
                return print(f"{step + 1} steps; an epoch has {epoch_steps:,}: {hours:.3g} hours")
        print(f"epoch {epoch + 1}: loss {sums[0]:.2f} = entropy of p_t {sums[1]:.2f} + KL")
        curves.append(sums)
        save({"student": student.state_dict(), "teacher": teacher.state_dict(), "losses": curves,
              "optimizer": optimizer.state_dict(), "center": center,
              "seconds": time.time() - started, "options": vars(args)}, checkpoint)
    rng.manual_seed(args.seed)
    curves = torch.stack([torch.zeros(2), *curves])[1:]  # (epochs, 2)
    embeddings = torch.zeros(len(known), width if len(items) else 1)  # (N+1, d)
    codebooks = torch.zeros(3, K, embeddings.shape[1])  # (3, K, d)
    if len(items):
        z = embed(teacher["backbone"], images, items, size)  # (n, d)
        # Ours: ten of Lloyd's steps, from the student's crops to the teacher's whole pictures.
        for _ in range(10 if quantiser else 0):
            quantiser.update(z, rng, decay=0)
        z = z.cpu()  # (n, d)
        codebooks = quantiser.codebooks.cpu() if quantiser else residual_kmeans(z, K, rng)
        # Standardised with one scale for all coordinates, which leaves every code as it is.
        mean, scale = z.mean(0), z.var(0, correction=0).mean().sqrt().clamp(min=1e-6)  # (d,), ()
        embeddings[items] = (z - mean) / scale  # (n, d)
        codebooks[0] -= mean
        codebooks /= scale
    codes, moved = finish_codes(embeddings, known, codebooks, data["train_counts"], rng)  # (N+1, 4)
    save({"teacher": teacher.cpu().state_dict(), "losses": curves[:, 0],
          "teacher_entropy": curves[:, 1], "seconds": time.time() - started, "options": vars(args)},
         run / "dino.pt")
    save({"codes": codes, "codebooks": codebooks, "embeddings": embeddings, "known": known,
          "moved": moved}, run / "image_codes.pt")
    rank or checkpoint.unlink(missing_ok=True)

if __name__ == "__main__":
    main()
