"""Train the colour models that ship, on the emoji that `lab/emoji.py` draws: `guidance-interval train --data emoji`.

Two judges first, on the emoji whose names are not held out: one learns subgroups and judges adherence, the other
learns names and artists, never sees a subgroup and measures distances. Then the denoiser, with the subgroup dropped
for a share of the images (Ho & Salimans 2022). Seeds are fixed. Everything that running needs lands in one
safetensors file; the images themselves do not, but for a strip of thumbnails.
"""

import copy
import platform
import time

import torch
from torch.nn import functional as F
from tqdm.auto import trange

from ..errors import UserError
from ..files import output_file
from ..toy import data, model, networks
from . import emoji
from .scores import class_spread
from .train import augment

UNET = dict(channels=(48, 96, 160), blocks=(2, 1, 1), attention=(2,), emb=192, dropout=0.1, image_channels=3)
JUDGE = dict(channels=(32, 64, 64), hidden=128, dropout=0.3, image_channels=3, image_size=32)
RULER = {k: JUDGE[k] for k in ("channels", "image_channels")}
# Subgroups with writing, directions or a fixed hand: a mirror image is not one of them.
NEVER_MIRRORED = {
    "alphanum", "arrow", "av-symbol", "country-flag", "currency", "flag", "gender", "keycap", "math", "music",
    "other-symbol", "punctuation", "religion", "time", "transport-sign", "warning", "zodiac",
}  # fmt: skip


def mirrored(x, may):
    """Mirror about half of the images of x [B, C, H, W] for which `may` [B] is true."""
    flip = may & (torch.rand(len(x), device=x.device) < 0.5)
    return torch.where(flip[:, None, None, None], x.flip(-1), x)


def train_classifier(x, targets, may, steps, batch=256, lr=2e-3):
    """Return a Classifier of one or several targets at once, [(labels [N], number of classes)], trained on x."""
    torch.manual_seed(0)
    sizes = [n for _, n in targets]
    net = networks.Classifier(**JUDGE, num_classes=sum(sizes)).to(x.device).train()
    opt = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=0.05, fused=x.is_cuda)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=lr, total_steps=steps)
    for _ in trange(steps, desc="judge", mininterval=5):
        i = torch.randint(len(x), [batch], device=x.device)
        logits = net(mirrored(augment(x[i]), may[i]))[1].split(sizes, dim=1)
        loss = sum(F.cross_entropy(part, labels[i]) for part, (labels, _) in zip(logits, targets, strict=True))
        opt.zero_grad()
        loss.backward()
        opt.step()
        schedule.step()
    return net.eval().requires_grad_(False)


def train_denoiser(net, x, labels, may, steps, batch, seed, lr, label_dropout, p_mean, p_std, ema_halflife):
    """Return the moving average of `net` after `steps` batches, and its loss. On a GPU a step is one CUDA graph."""
    torch.manual_seed(seed)
    device, net = x.device, net.to(x.device, memory_format=torch.channels_last).train()
    ema = copy.deepcopy(net).requires_grad_(False)
    params, averages = list(net.parameters()), list(ema.parameters())
    rate = torch.tensor(lr, device=device)
    opt = torch.optim.Adam(params, lr=rate, betas=(0.9, 0.99), capturable=x.is_cuda, fused=x.is_cuda)
    loss_fn = torch.compile(net.loss) if x.is_cuda else net.loss
    decay, mean_loss = 0.5 ** (1 / ema_halflife), torch.zeros([], device=device)

    def step():
        i = torch.randint(len(x), [batch], device=device)
        class_cond = torch.where(torch.rand(batch, device=device) < label_dropout, net.null_class, labels[i])
        sigma = (torch.randn(batch, device=device) * p_std + p_mean).exp()
        images = mirrored(x[i], may[i])
        loss = loss_fn(images, torch.randn_like(images), sigma, class_cond=class_cond).mean()
        opt.zero_grad(set_to_none=False)
        loss.backward()
        opt.step()
        with torch.no_grad():
            torch._foreach_lerp_(averages, params, 1 - decay)
        mean_loss.lerp_(loss.detach(), 0.002)

    graph = None
    for n in trange(steps, desc="denoiser", mininterval=10):
        # Linear warm-up, then cosine to zero.
        rate.fill_(lr * min(n / 500, 1) * 0.5 * (1 + torch.cos(torch.tensor(n / steps * torch.pi)).item()))
        if x.is_cuda and n == 10:  # What the first steps allocate is there by now.
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                step()
        graph.replay() if graph else step()
    return ema.eval(), mean_loss.item()


@torch.inference_mode()
def features_of(network, x):
    """Features [N, D] of x [N, 3, 32, 32], of a Classifier or of Features alone."""
    return torch.cat([networks.Features.forward(network, part) for part in x.split(500)])


def spread_evenly(labels):
    """labels [N] in an order of which every beginning has about the class frequencies of all."""
    generator = torch.Generator().manual_seed(0)
    counts = labels.bincount()
    rank = torch.stack([(labels == c).cumsum(0) for c in range(len(counts))])  # [class, N]
    rank = rank.gather(0, labels[None])[0] - 1  # Of each image in its class.
    shift = torch.rand(len(counts), generator=generator)
    return labels[((rank + shift[labels]) / counts[labels]).argsort()]


def reference(ruler, classifier, x, labels, may, num_features=3000):
    """What the model's file says of the real images x, as they are and, as often, mirrored where they `may` be.

    See `model.Lab`; `features` and `class_features` are of `num_features` of the images, drawn at random. An image that
    is not to be mirrored counts twice: the classes have the frequencies of `labels`, which are those of the samples.
    """
    other = torch.where(may[:, None, None, None], x.flip(-1), x)
    generator = torch.Generator().manual_seed(0)
    some = torch.randperm(len(x), generator=generator)[:num_features].to(x.device)
    flipped = (torch.rand(len(some), generator=generator) < 0.5).to(x.device)
    found = dict(labels=spread_evenly(labels.cpu()).short())
    for prefix, network in (("", ruler), ("class_", classifier)):
        once, again = (features_of(network, part).double() for part in (x, other))
        both = torch.cat([once, again])
        found |= {f"{prefix}mean": both.mean(0).float(), f"{prefix}cov": both.T.cov().float()}
        found[f"{prefix}features"] = torch.where(flipped[:, None], again[some], once[some]).half()
        if network is ruler:  # Over different images alone.
            once, both_labels = torch.cat([once, again[may]]), torch.cat([labels, labels[may]])
            found["spread"] = class_spread(once, both_labels, int(labels.max()) + 1).float()
    return found


def run(data_path, out, device, steps, batch, lr, seed, classifier_steps, donor=None):
    """Train on the emoji that `lab/emoji.py` drew and write the model file `out`.

    donor: a model file whose judges are taken instead of training them: distances compare then. Raises UserError for
    a file that cannot be read or written, before anything is trained.
    """
    out, device = output_file(out), torch.device(device)
    arrays = emoji.load(data_path)
    donor = None if donor is None else model.load(donor, device)
    if donor is not None and donor.config.get("classes") != arrays["classes"].tolist():
        raise UserError("the classifier's model file is of other emoji; take one that was trained on these")
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    classes, train = arrays["classes"].tolist(), ~torch.as_tensor(arrays["held_out"], device=device)
    pixels = torch.as_tensor(arrays["images"]) / 255
    pixel_mean, pixel_std = pixels.mean().item(), pixels.std().item()
    x = data.to_model(arrays["images"], pixel_mean, pixel_std).to(device)
    labels, names, styles = (torch.as_tensor(arrays[k], device=device) for k in ("labels", "names", "styles"))
    may = torch.tensor([c not in NEVER_MIRRORED for c in classes], device=device)[labels]

    begin = time.time()
    if donor is None:
        targets = [(labels[train], len(classes))]
        classifier = train_classifier(x[train], targets, may[train], classifier_steps)
        right = (classifier(x)[1].argmax(1) == labels).float()
        accuracy = dict(train=round(right[train].mean().item(), 4), held_out=round(right[~train].mean().item(), 4))
        print(f"classifier: {accuracy['held_out']:.1%} of the held-out emoji are right")
        targets = [(names[train], len(arrays["name_list"])), (styles[train], len(emoji.SETS))]
        ruler = networks.Features(**RULER).to(device)
        ruler.lower.load_state_dict(
            train_classifier(x[train], targets, may[train], classifier_steps).lower.state_dict()
        )
    else:
        classifier, ruler, accuracy = donor.classifier, donor.ruler, donor.record["classifier_accuracy"]
    net = networks.Denoiser(networks.LevelUNet(**UNET, num_classes=len(classes)))
    hyper = dict(lr=lr, label_dropout=0.12, p_mean=-0.8, p_std=1.4, ema_halflife=1_000)
    net, loss = train_denoiser(net, x[train], labels[train], may[train], steps, batch, seed, **hyper)
    if not all(p.isfinite().all() for p in net.parameters()):
        raise UserError(f"training with a learning rate of {lr:g} diverged, nothing is written; take a lower one")
    record = dict(
        data=f"Colour emoji of six openly licensed sets: {emoji.SOURCE}; names and subgroups: {emoji.NAMES}.",
        images=int(train.sum()),
        held_out_images=int((~train).sum()),
        classifier_steps=classifier_steps,
        classifier_accuracy=accuracy,
        denoiser_parameters=sum(p.numel() for p in net.parameters()),
        steps=steps, batch=batch, seed=seed, last_loss=round(loss, 4), seconds=round(time.time() - begin),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        torch=torch.__version__,
        **hyper,
    )  # fmt: skip
    write(out, net, classifier, ruler, arrays, record)


def write(out, net, classifier, ruler, arrays, record):
    """Write the model file with its reference, from the arrays of `lab/emoji.py` and the trained networks."""
    device, classes = next(net.parameters()).device, arrays["classes"].tolist()
    train = ~torch.as_tensor(arrays["held_out"], device=device)
    pixels = torch.as_tensor(arrays["images"]) / 255
    scale = dict(pixel_mean=pixels.mean().item(), pixel_std=pixels.std().item())
    x = data.to_model(arrays["images"], **scale).to(device)
    labels = torch.as_tensor(arrays["labels"], device=device)
    may = torch.tensor([c not in NEVER_MIRRORED for c in classes], device=device)[labels]
    config = dict(
        unet=dict(UNET, num_classes=len(classes)), classifier=dict(JUDGE, num_classes=len(classes)), ruler=RULER,
        sigma_data=data.SIGMA_DATA, **scale, num_classes=len(classes), image_size=x.shape[-1],
        image_channels=x.shape[1], classes=classes,
    )  # fmt: skip
    found = reference(ruler, classifier, x[train], labels[train], may[train])
    first = [int(((labels == c) & train).nonzero()[0]) for c in range(len(classes))]
    found["thumbnails"] = torch.as_tensor(arrays["images"])[first]
    judges = [copy.deepcopy(judge).half() for judge in (classifier, ruler)]
    model.save(out, net, judges[0], found, config, record, judges[1])
    print(f"wrote {out} ({out.stat().st_size / 2**20:.2f} MiB): {record}")
