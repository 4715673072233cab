"""Train the models that ship: `guidance-interval train` (`make train`).

The classifier is trained first, on four fifths of each class with small shifts, turns and zooms, and scored on
the rest; then the denoiser on everything, with the class dropped for a share of it (Ho & Salimans 2022). Seeds
are fixed. Everything lands in one safetensors file, with the record of how it was made.
"""

import copy
import json
import platform
import time

import torch
from torch.nn import functional as F
from tqdm.auto import trange

from ..errors import UserError
from ..files import output_file
from ..toy import data, model, networks

UNET = dict(channels=(32, 128), mid_blocks=2, emb=128, dropout=0.1)
CLASSIFIER = dict(channels=(32, 64, 64), hidden=64, dropout=0.3)
# What the recipe changes for another data set than the digits.
RECIPES = {
    "digits": dict(unet={}, classifier={}),
    "optdigits": dict(unet=dict(channels=(32, 64), dropout=0.2), classifier=dict(image_size=8, stride=1)),
    "clips": dict(unet=dict(image_channels=data.FRAMES), classifier=dict(image_channels=data.FRAMES, image_size=20)),
}


def augment(x):
    """Random turn up to 12 degrees, zoom up to 10 % and shift up to 2 pixels of each image, [B, 1, H, W]."""
    turn, zoom, dx, dy = (torch.rand(4, x.shape[0], device=x.device) * 2 - 1).unbind()
    angle, zoom = turn * 0.21, 1 + zoom * 0.1
    cos, sin = angle.cos() * zoom, angle.sin() * zoom
    theta = torch.stack([cos, -sin, dx * 4 / x.shape[-1], sin, cos, dy * 4 / x.shape[-2]], dim=1).view(-1, 2, 3)
    grid = F.affine_grid(theta, list(x.shape), align_corners=False)
    background = x.amin()
    return F.grid_sample(x - background, grid, align_corners=False) + background


def train_classifier(config, x, labels, steps, batch, lr=2e-3):
    """Return the classifier, trained on all but the last fifth of each class, and its accuracy on that."""
    torch.manual_seed(0)
    rank = torch.stack([(labels == c).cumsum(0) for c in range(data.NUM_CLASSES)])  # [class, N]
    held_out = rank.gather(0, labels[None])[0] > 0.8 * labels.bincount()[labels]
    train_x, train_labels = x[~held_out], labels[~held_out]
    net = networks.Classifier(**config).to(x.device).train()
    opt = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=lr, total_steps=steps)
    for _ in trange(steps, desc="classifier"):
        i = torch.randint(len(train_x), [batch], device=x.device)
        loss = F.cross_entropy(net(augment(train_x[i]))[1], train_labels[i])
        opt.zero_grad()
        loss.backward()
        opt.step()
        schedule.step()
    net.eval().requires_grad_(False)
    accuracy = (net(x[held_out])[1].argmax(1) == labels[held_out]).float().mean().item()
    return net, accuracy


def train_denoiser(config, x, labels, steps, batch, seed, lr, label_dropout, p_mean, p_std, ema_halflife, compiled):
    """Return the exponential moving average of a denoiser trained for `steps` batches, and its last loss."""
    torch.manual_seed(seed)
    net = networks.Denoiser(networks.UNet(**config)).to(x.device).train()
    ema = copy.deepcopy(net).requires_grad_(False)
    opt = torch.optim.Adam(net.parameters(), lr=lr, betas=(0.9, 0.99), fused=x.is_cuda)
    loss_fn = torch.compile(net.loss, mode="reduce-overhead") if compiled else net.loss  # CUDA graphs.
    decay, mean_loss = 0.5 ** (1 / ema_halflife), 0.0
    bar = trange(steps, desc="denoiser")
    for step in bar:
        for group in opt.param_groups:  # Linear warm-up, then cosine to zero.
            progress = torch.tensor(step / steps)
            group["lr"] = lr * min(step / 500, 1) * 0.5 * (1 + torch.cos(progress * torch.pi)).item()
        i = torch.randint(len(x), [batch], device=x.device)
        class_cond = torch.where(torch.rand(batch, device=x.device) < label_dropout, net.null_class, labels[i])
        sigma = (torch.randn(batch, device=x.device) * p_std + p_mean).exp()
        loss = loss_fn(x[i], torch.randn_like(x[i]), sigma, class_cond=class_cond).mean()
        opt.zero_grad()
        loss.backward()
        opt.step()
        torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - decay)
        if step % 500 == 499:
            mean_loss = loss.item()
            bar.set_postfix(loss=f"{mean_loss:.4f}")
    return ema.eval(), mean_loss


def reference_statistics(classifier, x, labels):
    """Mean, covariance and within-class spread of the real images' features."""
    from .scores import class_spread

    features = torch.cat([classifier(part)[0] for part in x.split(500)]).double()
    return dict(
        mean=features.mean(0).float(),
        cov=features.T.cov().float(),
        spread=class_spread(features, labels, data.NUM_CLASSES).float(),
    )


def run(data_name, out, device, steps, batch, lr, seed, classifier_steps, donor=None):
    """Train on a data set of `data.DATA` and write the model file `out`.

    donor: a model file whose classifier is taken instead of training one. Raises UserError for a file that cannot
    be read or written, before anything is trained, and for a loss that is not finite.
    """
    out, device = output_file(out), torch.device(device)
    donor = None if donor is None else model.load(donor, device)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    images, labels = data.DATA[data_name]()
    pixels = torch.as_tensor(images) / 255
    pixel_mean, pixel_std = pixels.mean().item(), pixels.std().item()
    x = data.to_model(images, pixel_mean, pixel_std).to(device)
    labels = torch.as_tensor(labels, device=device)
    unet, judge = UNET | RECIPES[data_name]["unet"], CLASSIFIER | RECIPES[data_name]["classifier"]
    if donor is not None and donor.config["classifier"] != json.loads(json.dumps(judge)):
        raise UserError("the classifier's model file is of another data set; take one of the same")

    begin = time.time()
    if donor is None:
        classifier, accuracy = train_classifier(judge, x, labels, classifier_steps, 256)
        print(f"classifier: {accuracy:.2%} of the held-out digits are right")
    else:
        classifier, accuracy = donor.classifier, donor.record["classifier_held_out_accuracy"]
    hyper = dict(lr=lr, label_dropout=0.15, p_mean=-0.8, p_std=1.4, ema_halflife=1_000)
    compiled = device.type == "cuda"
    denoiser, loss = train_denoiser(unet, x, labels, steps, batch, seed, compiled=compiled, **hyper)
    if not all(p.isfinite().all() for p in denoiser.parameters()):
        raise UserError(f"training with a learning rate of {lr:g} diverged, nothing is written; take a lower one")
    record = dict(
        data=data.DATA[data_name].__doc__.splitlines()[0],
        classifier_steps=classifier_steps,
        classifier_held_out_accuracy=round(accuracy, 4),
        denoiser_parameters=sum(p.numel() for p in denoiser.parameters()),
        steps=steps,
        batch=batch,
        seed=seed,
        last_loss=round(loss, 4),
        seconds=round(time.time() - begin),
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or "cpu",
        torch=torch.__version__,
        **hyper,
    )
    config = dict(
        unet=unet,
        classifier=judge,
        sigma_data=data.SIGMA_DATA,
        pixel_mean=pixel_mean,
        pixel_std=pixel_std,
        num_classes=data.NUM_CLASSES,
        image_size=x.shape[-1],
        image_channels=x.shape[1],
    )
    model.save(out, denoiser, classifier, reference_statistics(classifier, x, labels), config, record)
    print(f"wrote {out} ({out.stat().st_size / 2**20:.2f} MiB): {record}")
